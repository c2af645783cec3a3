//! A key of private memory.

use netmcore_shm::{Heap, ShmHashMap};

fn make(heap: &Heap) {
    let map = ShmHashMap::<String, u32>::new_in(heap);
}

fn main() {}

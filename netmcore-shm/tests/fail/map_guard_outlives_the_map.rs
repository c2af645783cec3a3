//! What a guard is of goes with the map.

use netmcore_shm::{Heap, ShmHashMap};

fn keep(heap: &Heap) {
    let map = ShmHashMap::<u32, u32>::new_in(heap).unwrap();
    let guard = map.get(&1);
    drop(map);
    drop(guard);
}

fn main() {}

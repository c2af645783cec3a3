//! A value that two may change at the same time.

use netmcore_shm::{Heap, ShmHashMap};
use std::cell::Cell;

fn make(heap: &Heap) {
    let map = ShmHashMap::<u32, Cell<u32>>::new_in(heap);
}

fn main() {}

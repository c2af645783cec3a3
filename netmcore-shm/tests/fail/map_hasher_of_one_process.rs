//! std's hasher has other keys in each process.

use netmcore_shm::{Heap, ShmHashMap};
use std::hash::RandomState;

fn make(heap: &Heap) {
    let map = ShmHashMap::<u32, u32, (), RandomState>::with_parts_in(heap, 8, RandomState::new(), ());
}

fn main() {}

use netmcore_shm::{Arena, Heap, ShmArc, ShmArray};
use std::cell::Cell;

fn main() {
    let arena = Arena::reserve(1 << 30).unwrap();
    let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
    let array = ShmArray::init_in(&heap, 10, |_| Cell::new(0_u8)).unwrap();
    let _ = ShmArc::new_in(&heap, array);
}

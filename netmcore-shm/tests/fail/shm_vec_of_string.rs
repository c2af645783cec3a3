use netmcore_shm::{Arena, Heap, ShmVec};

fn main() {
    let arena = Arena::reserve(1 << 30).unwrap();
    let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
    let mut names = ShmVec::new_in(&heap);
    names.push(String::from("in the heap of one process")).unwrap();
}

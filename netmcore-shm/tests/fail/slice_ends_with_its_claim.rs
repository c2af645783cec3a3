use netmcore_shm::{Arena, Heap, ShmArray};

fn main() {
    let arena = Arena::reserve(1 << 30).unwrap();
    let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
    let array = ShmArray::make_in(&heap, 10, 0_u8).unwrap();
    let mut slice = array.claim(..).unwrap();
    let elements: &mut [u8] = &mut slice[2..];
    drop(slice);
    elements[0] = 1;
}

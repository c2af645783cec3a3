use netmcore_shm::{Arena, Heap, ShmArray};

fn main() {
    let arena = Arena::reserve(1 << 30).unwrap();
    let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
    let array = ShmArray::make_in(&heap, 10, 0_u8).unwrap();
    let slice = array.claim(..).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(slice));
    });
}

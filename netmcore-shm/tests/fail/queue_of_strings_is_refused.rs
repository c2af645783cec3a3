use netmcore_shm::{Heap, ShmQueue};

fn names(heap: &Heap) {
    let queue = ShmQueue::<String>::unbounded_in(heap).unwrap();
    queue.push("Ada".to_owned()).unwrap();
}

fn main() {}

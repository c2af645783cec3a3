use netmcore_shm::ShmSafe;
use std::sync::Arc;

fn put<T: ShmSafe>() {}

fn main() {
    put::<Arc<u64>>();
}

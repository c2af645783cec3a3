use netmcore_shm::ShmSafe;
use std::sync::Mutex;

fn put<T: ShmSafe>() {}

fn main() {
    put::<[Mutex<u64>; 2]>();
}

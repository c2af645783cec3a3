use netmcore_shm::ShmSafe;
use std::sync::atomic::AtomicPtr;

fn put<T: ShmSafe>() {}

fn main() {
    put::<AtomicPtr<u8>>();
}

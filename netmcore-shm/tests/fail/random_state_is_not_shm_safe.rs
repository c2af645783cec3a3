use netmcore_shm::ShmSafe;
use std::hash::RandomState;

fn put<T: ShmSafe>() {}

fn main() {
    put::<RandomState>();
}

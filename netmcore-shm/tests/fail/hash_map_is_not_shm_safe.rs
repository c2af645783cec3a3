use netmcore_shm::ShmSafe;
use std::collections::HashMap;

fn put<T: ShmSafe>() {}

fn main() {
    put::<HashMap<u64, u64>>();
}

use netmcore_shm::ShmSafe;
use std::fs::File;

fn put<T: ShmSafe>() {}

fn main() {
    put::<Result<File, u8>>();
}

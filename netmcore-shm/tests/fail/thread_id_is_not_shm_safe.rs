use netmcore_shm::ShmSafe;
use std::thread::ThreadId;

fn put<T: ShmSafe>() {}

fn main() {
    put::<ThreadId>();
}

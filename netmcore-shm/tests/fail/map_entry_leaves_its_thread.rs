//! The lock of an entry is that of a thread.

use netmcore_shm::ShmHashMap;

fn send(map: &ShmHashMap<u32, u32>) {
    let entry = map.entry(1);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(entry));
    });
}

fn main() {}

//! The pin of a guard is that of a thread.

use netmcore_shm::ShmHashMap;

fn send(map: &ShmHashMap<u32, u32>) {
    let guard = map.get(&1);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(guard));
    });
}

fn main() {}

//! The pin of a guard is that of a thread.

use netmcore_shm::ShmCell;

fn send(cell: &ShmCell<u32>) {
    let guard = cell.load();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(guard));
    });
}

fn main() {}

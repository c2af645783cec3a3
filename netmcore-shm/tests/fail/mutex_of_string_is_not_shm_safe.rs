use netmcore_sem::ShmMutex;
use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
struct Log {
    last: ShmMutex<String>,
}

fn main() {}

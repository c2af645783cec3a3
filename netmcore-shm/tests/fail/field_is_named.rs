use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
struct Job {
    number: u64,
    name: String,
}

#[derive(ShmSafe)]
enum State {
    Waiting,
    Running { by: std::thread::ThreadId },
}

fn main() {}

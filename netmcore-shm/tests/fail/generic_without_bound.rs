use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
struct Pair<T>(T, T);

fn put<T: ShmSafe>(_: T) {}

fn put_any<T: Send + 'static>(value: T) {
    put(Pair(value, value));
}

fn main() {}

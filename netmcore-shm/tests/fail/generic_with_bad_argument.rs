use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
struct Pair<T>(T, T);

fn put<T: ShmSafe>() {}

fn main() {
    put::<Pair<String>>();
}

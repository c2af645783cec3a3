use netmcore_shm::ShmSafe;

fn put<T: ShmSafe>() {}

fn main() {
    put::<fn(u64) -> u64>();
}

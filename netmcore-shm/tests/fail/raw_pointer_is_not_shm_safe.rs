use netmcore_shm::ShmSafe;

fn put<T: ShmSafe>() {}

fn main() {
    put::<(u8, *const u8)>();
}

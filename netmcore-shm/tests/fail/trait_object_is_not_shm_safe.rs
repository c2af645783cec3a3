use netmcore_shm::ShmSafe;

fn put<T: ShmSafe>() {}

fn main() {
    put::<Box<dyn Fn() + Send>>();
}

use netmcore_shm::ShmSafe;
use std::rc::Rc;

fn put<T: ShmSafe>() {}

fn main() {
    put::<Rc<u64>>();
}

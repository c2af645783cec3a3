use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
struct View<'a> {
    bytes: &'a [u8],
}

fn main() {}

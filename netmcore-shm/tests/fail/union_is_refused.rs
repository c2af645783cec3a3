use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
union Either {
    number: u64,
    bytes: [u8; 8],
}

fn main() {}

use netmcore_shm::ShmSafe;

#[derive(ShmSafe)]
#[repr(C, packed)]
struct Packed {
    kind: u8,
    number: u64,
}

fn main() {}

use netmcore_shm::Mailbox;

fn send(mailbox: &Mailbox<&'static [u8]>) {}

fn main() {}

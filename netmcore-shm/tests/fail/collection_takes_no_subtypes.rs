use netmcore_shm::{Mailbox, ShmCell, ShmHashMap, ShmQueue};
use std::marker::PhantomData;

type General = PhantomData<for<'a> fn(&'a u8)>;
type Special = PhantomData<fn(&'static u8)>;

fn cell(of: &ShmCell<General>) -> &ShmCell<Special> {
    of
}

fn map(of: &ShmHashMap<u8, General>) -> &ShmHashMap<u8, Special> {
    of
}

fn mailbox(of: &Mailbox<General>) -> &Mailbox<Special> {
    of
}

fn queue(of: &ShmQueue<General>) -> &ShmQueue<Special> {
    of
}

fn main() {}

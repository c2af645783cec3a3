//! Guards against address ranges that are not where, or not as protected, as the code above believes: reservations that
//! others land in, parts that stay accessible after unmapping, pages that keep what was given back.
//!
//! # Safety
//!
//! Mappings are made in ranges of the test's own and touched by volatile accesses only; where that is a signal, in a child.

#![allow(unsafe_code)]

mod forked;

use forked::Child;
use netmcore_sys::error::Errno;
use netmcore_sys::map::{self, Mapping, Reservation, page_size};
use netmcore_sys::process::{self, Limit, Resource};
use netmcore_sys::shm::{self, Access};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

netmcore_forktest::forktests!(
    reserved_memory_cannot_be_touched,
    large_reservation_costs_no_memory,
    address_space_limit_is_enomem,
    reserving_what_is_taken_is_eexist,
    dropped_reservation_is_free_again,
    leaked_reservation_stays,
    part_is_mapped_at_its_address_and_shared_with_forks,
    processes_that_map_later_share_at_the_same_address,
    offset_selects_the_part_of_the_object,
    unmapped_part_is_reserved_again,
    failed_map_leaves_the_range_reserved,
    read_only_part_cannot_be_written,
    part_outside_is_einval,
    mapping_of_nothing_is_einval,
    removed_pages_read_zero_in_all_mappings_and_are_freed,
    populated_pages_are_present_and_keep_their_contents,
    populate_of_what_is_not_mapped_is_an_error,
    excluded_range_is_marked,
);

fn object(page_count: u64) -> OwnedFd {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, page_count * page_size() as u64).unwrap();
    fd
}

fn read(at: *mut u8) -> u8 {
    // SAFETY: the tests see to it that it is mapped, or want the signal.
    unsafe { at.read_volatile() }
}

fn write(at: *mut u8, value: u8) {
    // SAFETY: as in `read`.
    unsafe { at.write_volatile(value) }
}

fn map_at(reservation: &Reservation, at: *mut u8, fd: &OwnedFd, page_count: usize) {
    let len = page_count * page_size();
    // SAFETY: no references are made to these mappings, only volatile accesses.
    unsafe { reservation.map(at, len, fd.as_fd(), 0, Access::ReadWrite) }.unwrap();
}

fn reserved_memory_cannot_be_touched() {
    let reservation = Reservation::reserve(page_size()).unwrap();
    Child::run(|| assert_eq!(read(reservation.base()), 0)).dies_of(libc::SIGSEGV);
}

fn large_reservation_costs_no_memory() {
    let before = process::memory_use(process::Pid::this()).unwrap();
    let reservation = Reservation::reserve(16 << 40).unwrap();
    let after = process::memory_use(process::Pid::this()).unwrap();
    assert_eq!(reservation.len(), 16 << 40);
    assert!(after.resident_bytes < before.resident_bytes + (1 << 20));
}

fn address_space_limit_is_enomem() {
    let limit = Limit {
        soft: Some(1 << 30),
        hard: Some(1 << 30),
    };
    process::set_limit(Resource::AddressSpaceBytes, limit).unwrap();
    let error = Reservation::reserve(16 << 30).unwrap_err();
    assert_eq!(error.errno, Errno::ENOMEM);
    assert!(Reservation::reserve(1 << 20).is_ok());
}

fn reserving_what_is_taken_is_eexist() {
    let reservation = Reservation::reserve(4 * page_size()).unwrap();
    let inside = reservation.base().addr() + page_size();
    let error = Reservation::reserve_at(inside, page_size()).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
    let unaligned = Reservation::reserve_at(inside + 1, page_size()).unwrap_err();
    assert_eq!(unaligned.errno, Errno::EINVAL);
}

fn dropped_reservation_is_free_again() {
    let reservation = Reservation::reserve(1 << 30).unwrap();
    let at = reservation.base();
    map_at(&reservation, at, &object(1), 1);
    drop(reservation);
    let again = Reservation::reserve_at(at.addr(), 1 << 30).unwrap();
    assert_eq!(again.base(), at);
    assert_eq!(again.len(), 1 << 30);
}

fn leaked_reservation_stays() {
    let (at, len) = Reservation::reserve(1 << 20).unwrap().leak();
    let error = Reservation::reserve_at(at.addr(), len).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
}

fn part_is_mapped_at_its_address_and_shared_with_forks() {
    let reservation = Reservation::reserve(1 << 30).unwrap();
    let at = reservation.base().wrapping_add(1 << 20);
    map_at(&reservation, at, &object(1), 1);
    Child::run(|| write(at, 5)).succeeds();
    assert_eq!(read(at), 5);
}

fn processes_that_map_later_share_at_the_same_address() {
    let reservation = Reservation::reserve(1 << 30).unwrap();
    let fd = object(1);
    let at = reservation.base();
    Child::run(|| {
        map_at(&reservation, at, &fd, 1);
        write(at, 6);
    })
    .succeeds();
    map_at(&reservation, at, &fd, 1);
    assert_eq!(read(at), 6);
}

fn offset_selects_the_part_of_the_object() {
    let (page, fd) = (page_size(), object(2));
    let whole = Mapping::map(fd.as_fd(), 2 * page, Access::ReadWrite).unwrap();
    write(whole.as_ptr().wrapping_add(page), 7);
    let reservation = Reservation::reserve(page).unwrap();
    let at = reservation.base();
    // SAFETY: no references are made to it.
    let map = |offset| unsafe { reservation.map(at, page, fd.as_fd(), offset, Access::ReadOnly) };
    map(page as u64).unwrap();
    assert_eq!(read(at), 7);
    assert_eq!(map(1).unwrap_err().errno, Errno::EINVAL);
}

fn unmapped_part_is_reserved_again() {
    let (page, fd) = (page_size(), object(3));
    let reservation = Reservation::reserve(3 * page).unwrap();
    let at = reservation.base();
    map_at(&reservation, at, &fd, 3);
    let middle = at.wrapping_add(page);
    write(at, 1);
    write(middle, 2);
    // SAFETY: no references were made to it.
    unsafe { reservation.unmap(middle, page) }.unwrap();
    Child::run(|| assert_eq!(read(middle), 0)).dies_of(libc::SIGSEGV);
    assert_eq!(read(at), 1);
    let error = Reservation::reserve_at(middle.addr(), page).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
    // The object has kept its contents.
    map_at(&reservation, at, &fd, 3);
    assert_eq!(read(middle), 2);
}

fn failed_map_leaves_the_range_reserved() {
    let path = File::open("/proc/self/exe").unwrap();
    let reservation = Reservation::reserve(4 * page_size()).unwrap();
    let at = reservation.base();
    // SAFETY: no references are made to it.
    let result = unsafe { reservation.map(at, page_size(), path.as_fd(), 0, Access::ReadWrite) };
    assert_eq!(result.unwrap_err().errno, Errno::EACCES);
    Child::run(|| assert_eq!(read(at), 0)).dies_of(libc::SIGSEGV);
    let error = Reservation::reserve_at(at.addr(), page_size()).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
}

fn read_only_part_cannot_be_written() {
    let reservation = Reservation::reserve(page_size()).unwrap();
    let (at, fd) = (reservation.base(), object(1));
    // SAFETY: no references are made to it.
    unsafe { reservation.map(at, page_size(), fd.as_fd(), 0, Access::ReadOnly) }.unwrap();
    assert_eq!(read(at), 0);
    Child::run(|| write(at, 1)).dies_of(libc::SIGSEGV);
}

fn part_outside_is_einval() {
    let (page, fd) = (page_size(), object(4));
    let reservation = Reservation::reserve(2 * page).unwrap();
    let at = reservation.base().wrapping_add(page);
    // SAFETY: it is refused.
    let result = unsafe { reservation.map(at, 2 * page, fd.as_fd(), 0, Access::ReadWrite) };
    assert_eq!(result.unwrap_err().errno, Errno::EINVAL);
    // SAFETY: it is refused.
    let result = unsafe { reservation.unmap(at, 2 * page) };
    assert_eq!(result.unwrap_err().errno, Errno::EINVAL);
}

fn mapping_of_nothing_is_einval() {
    let error = Mapping::map(object(1).as_fd(), 0, Access::ReadWrite).unwrap_err();
    assert_eq!(error.errno, Errno::EINVAL);
}

fn removed_pages_read_zero_in_all_mappings_and_are_freed() {
    let (page, fd) = (page_size(), object(4));
    let here = Mapping::map(fd.as_fd(), 4 * page, Access::ReadWrite).unwrap();
    let there = Mapping::map(fd.as_fd(), 4 * page, Access::ReadOnly).unwrap();
    for index in 0..4 {
        write(here.as_ptr().wrapping_add(index * page), 8);
    }
    let file = File::from(fd);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * page as u64);
    // SAFETY: the mapping is ours; no references were made to it.
    unsafe { map::remove_pages(here.as_ptr().wrapping_add(page), 2 * page) }.unwrap();
    let seen: Vec<u8> = (0..4)
        .map(|index| read(there.as_ptr().wrapping_add(index * page)))
        .collect();
    assert_eq!(seen, [8, 0, 0, 8]);
    assert_eq!(file.metadata().unwrap().len(), 4 * page as u64);
    write(here.as_ptr().wrapping_add(page), 9);
    assert_eq!(read(there.as_ptr().wrapping_add(page)), 9);
}

fn populated_pages_are_present_and_keep_their_contents() {
    let (page, fd) = (page_size(), shm::anonymous(c"test").unwrap());
    shm::set_len(fd.as_fd(), 64 * page as u64).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 64 * page, Access::ReadWrite).unwrap();
    write(mapping.as_ptr(), 3);
    // SAFETY: the mapping is ours.
    unsafe { map::populate_write(mapping.as_ptr(), 64 * page) }.unwrap();
    assert_eq!(read(mapping.as_ptr()), 3);
    let blocks = File::from(fd).metadata().unwrap().blocks();
    assert_eq!(blocks * 512, 64 * page as u64);
}

fn populate_of_what_is_not_mapped_is_an_error() {
    let reservation = Reservation::reserve(page_size()).unwrap();
    // SAFETY: the range is ours.
    let result = unsafe { map::populate_write(reservation.base(), page_size()) };
    assert!(result.is_err());
}

fn excluded_range_is_marked() {
    let page = page_size();
    let mapping = Mapping::map(object(1).as_fd(), page, Access::ReadWrite).unwrap();
    // SAFETY: the mapping is ours.
    unsafe { map::exclude_from_dumps(mapping.as_ptr(), page) }.unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", mapping.as_ptr().addr());
    let ours = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let flags = ours.filter_map(|line| line.strip_prefix("VmFlags:")).next();
    assert!(
        flags.unwrap().split(' ').any(|flag| flag == "dd"),
        "{flags:?}"
    );
}

//! Guards against beliefs about shared memory objects that the kernel does not share: what survives unlinking and
//! death, what a mapping beyond the end sees, and where lack of space is an error and where a signal.
//!
//! # Safety
//!
//! Mappings of the test's own are touched by volatile accesses only; where that is a signal, in a child.

#![allow(unsafe_code)]

mod forked;

use forked::{Child, Words};
use netmcore_sys::error::Errno;
use netmcore_sys::map::{self, Mapping};
use netmcore_sys::name::ObjectName;
use netmcore_sys::shm::{self, Access};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

netmcore_forktest::forktests!(
    create_is_exclusive_and_empty,
    umask_is_taken_off_the_mode,
    missing_object_is_enoent,
    read_only_descriptor_refuses_a_writable_mapping,
    unlinked_shm_stays_mapped,
    object_survives_its_creator,
    list_has_objects_and_no_semaphores,
    descriptors_are_close_on_exec,
    growth_is_seen_in_a_mapping_made_before,
    touching_beyond_the_end_is_sigbus,
    huge_mapping_of_a_small_object_costs_nothing,
    truncate_past_free_space_succeeds_and_touching_is_sigbus,
    allocate_past_free_space_is_enospc_and_takes_nothing,
    populate_past_free_space_is_an_error,
    free_space_is_that_of_the_mount,
    anonymous_file_has_no_limit_of_its_own,
    punched_hole_reads_zero_and_frees,
    sealed_file_cannot_shrink_and_can_grow_and_be_punched,
    lengths_of_zero_are_nothing,
);

const MIB: u64 = 1 << 20;

/// A name that is unlinked at the end of the test, and by the parent of a test that forks only.
struct Object(ObjectName);

impl Object {
    fn new() -> Object {
        Object(ObjectName::unique(b"/netmcore_sys_test_").unwrap())
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let _ = shm::unlink(&self.0);
    }
}

fn byte(mapping: &Mapping, at: u64) -> u8 {
    // SAFETY: in bounds of the mapping; the tests see to it that the page is there, or want the signal.
    unsafe { mapping.as_ptr().add(at as usize).read_volatile() }
}

fn set_byte(mapping: &Mapping, at: u64, value: u8) {
    // SAFETY: as in `byte`.
    unsafe { mapping.as_ptr().add(at as usize).write_volatile(value) }
}

fn allocated_bytes(fd: BorrowedFd<'_>) -> u64 {
    let file = File::from(fd.try_clone_to_owned().unwrap());
    file.metadata().unwrap().blocks() * 512
}

fn create_is_exclusive_and_empty() {
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    assert_eq!(shm::len(fd.as_fd()).unwrap(), 0);
    let error = shm::create(&object.0, 0o600).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
    assert_eq!(
        error.to_string(),
        format!("shm_open of {}: File exists (EEXIST)", object.0)
    );
}

fn umask_is_taken_off_the_mode() {
    // SAFETY: plain system call; the process is this test's alone.
    unsafe { libc::umask(0o027) };
    let object = Object::new();
    let fd = shm::create(&object.0, 0o666).unwrap();
    let mode = File::from(fd).metadata().unwrap().mode();
    assert_eq!(mode & 0o777, 0o640);
}

fn missing_object_is_enoent() {
    let object = Object::new();
    let error = shm::open(&object.0, Access::ReadOnly).unwrap_err();
    assert_eq!(error.errno, Errno::ENOENT);
    assert_eq!(shm::unlink(&object.0).unwrap_err().errno, Errno::ENOENT);
}

fn read_only_descriptor_refuses_a_writable_mapping() {
    let object = Object::new();
    let writable = shm::create(&object.0, 0o600).unwrap();
    shm::allocate(writable.as_fd(), 0, 4096).unwrap();
    let fd = shm::open(&object.0, Access::ReadOnly).unwrap();
    let error = Mapping::map(fd.as_fd(), 4096, Access::ReadWrite).unwrap_err();
    assert_eq!(error.errno, Errno::EACCES);
    let mapping = Mapping::map(fd.as_fd(), 4096, Access::ReadOnly).unwrap();
    assert_eq!(byte(&mapping, 0), 0);
    Child::run(|| set_byte(&mapping, 0, 1)).dies_of(libc::SIGSEGV);
}

fn unlinked_shm_stays_mapped() {
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    shm::allocate(fd.as_fd(), 0, 4096).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 4096, Access::ReadWrite).unwrap();
    drop(fd);
    shm::unlink(&object.0).unwrap();
    Child::run(|| set_byte(&mapping, 7, 42)).succeeds();
    assert_eq!(byte(&mapping, 7), 42);
    let again = shm::create(&object.0, 0o600).unwrap();
    assert_eq!(shm::len(again.as_fd()).unwrap(), 0);
}

fn object_survives_its_creator() {
    let object = Object::new();
    let words = Words::new();
    let child = Child::run(|| {
        let fd = shm::create(&object.0, 0o600).unwrap();
        File::from(fd).write_all_at(b"left", 0).unwrap();
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the child has created", || words.get(0) == 1);
    child.kill();
    let file = File::from(shm::open(&object.0, Access::ReadOnly).unwrap());
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"left");
}

fn list_has_objects_and_no_semaphores() {
    let object = Object::new();
    let before = shm::list().unwrap();
    assert!(!before.contains(&object.0));
    let _fd = shm::create(&object.0, 0o600).unwrap();
    assert!(shm::list().unwrap().contains(&object.0));

    let sem = Object::new();
    let _open = netmcore_sys::sem::NamedSem::create(&sem.0, 0, 0o600).unwrap();
    let objects = shm::list().unwrap();
    assert!(
        !objects
            .iter()
            .any(|name| name.as_bytes().starts_with(b"/sem."))
    );
    assert!(netmcore_sys::sem::list().unwrap().contains(&sem.0));
    netmcore_sys::sem::unlink(&sem.0).unwrap();
    assert!(!netmcore_sys::sem::list().unwrap().contains(&sem.0));
}

fn descriptors_are_close_on_exec() {
    let object = Object::new();
    let created = shm::create(&object.0, 0o600).unwrap();
    let opened = shm::open(&object.0, Access::ReadOnly).unwrap();
    let anonymous = shm::anonymous(c"test").unwrap();
    for fd in [created, opened, anonymous] {
        use std::os::fd::AsRawFd;
        // SAFETY: F_GETFD takes no argument.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
}

fn growth_is_seen_in_a_mapping_made_before() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, 4096).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 64 << 20, Access::ReadWrite).unwrap();
    Child::run(|| {
        shm::allocate(fd.as_fd(), 4096, MIB).unwrap();
        set_byte(&mapping, MIB, 9);
    })
    .succeeds();
    assert_eq!(byte(&mapping, MIB), 9);
    assert_eq!(shm::len(fd.as_fd()).unwrap(), 4096 + MIB);
}

fn touching_beyond_the_end_is_sigbus() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, 4096).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 8192, Access::ReadWrite).unwrap();
    assert_eq!(byte(&mapping, 4095), 0);
    Child::run(|| set_byte(&mapping, 4096, 1)).dies_of(libc::SIGBUS);
    // SAFETY: the second page of the mapping.
    let result = unsafe { map::populate_write(mapping.as_ptr().add(4096), 4096) };
    assert_eq!(result.unwrap_err().errno, Errno::EFAULT);
}

fn huge_mapping_of_a_small_object_costs_nothing() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, MIB).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 64 << 30, Access::ReadWrite).unwrap();
    set_byte(&mapping, MIB - 1, 1);
    assert_eq!(allocated_bytes(fd.as_fd()), MIB);
}

fn truncate_past_free_space_succeeds_and_touching_is_sigbus() {
    forked::mount_tiny_dev_shm();
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    shm::set_len(fd.as_fd(), 2 * MIB).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 2 << 20, Access::ReadWrite).unwrap();
    Child::run(|| {
        for page in 0..512 {
            set_byte(&mapping, page * 4096, 1);
        }
    })
    .dies_of(libc::SIGBUS);
}

fn allocate_past_free_space_is_enospc_and_takes_nothing() {
    forked::mount_tiny_dev_shm();
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    shm::allocate(fd.as_fd(), 0, MIB / 2).unwrap();
    let before = shm::free_space(fd.as_fd()).unwrap();
    let error = shm::allocate(fd.as_fd(), MIB / 2, MIB).unwrap_err();
    assert_eq!(error.errno, Errno::ENOSPC);
    assert_eq!(shm::len(fd.as_fd()).unwrap(), MIB / 2);
    assert_eq!(shm::free_space(fd.as_fd()).unwrap(), before);
    shm::allocate(fd.as_fd(), MIB / 2, MIB / 2).unwrap();
    assert_eq!(shm::free_space(fd.as_fd()).unwrap().free_bytes, 0);
}

fn populate_past_free_space_is_an_error() {
    forked::mount_tiny_dev_shm();
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    shm::set_len(fd.as_fd(), 2 * MIB).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 2 << 20, Access::ReadWrite).unwrap();
    // SAFETY: the mapping is ours.
    let populate = |len| unsafe { map::populate_write(mapping.as_ptr(), len) };
    populate(1 << 19).unwrap();
    assert_eq!(allocated_bytes(fd.as_fd()), MIB / 2);
    assert_eq!(populate(2 << 20).unwrap_err().errno, Errno::EFAULT);
}

fn free_space_is_that_of_the_mount() {
    forked::mount_tiny_dev_shm();
    let object = Object::new();
    let fd = shm::create(&object.0, 0o600).unwrap();
    let space = shm::free_space(fd.as_fd()).unwrap();
    assert_eq!(space.total_bytes, MIB);
    assert_eq!(space.free_bytes, MIB);
    shm::allocate(fd.as_fd(), 0, MIB / 4).unwrap();
    let space = shm::free_space(fd.as_fd()).unwrap();
    assert_eq!(space.free_bytes, MIB - MIB / 4);
}

fn anonymous_file_has_no_limit_of_its_own() {
    let fd = shm::anonymous(c"test").unwrap();
    let space = shm::free_space(fd.as_fd()).unwrap();
    assert_eq!(space.total_bytes, u64::MAX);
    assert_eq!(space.free_bytes, u64::MAX);
}

fn punched_hole_reads_zero_and_frees() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, MIB).unwrap();
    let mapping = Mapping::map(fd.as_fd(), 1 << 20, Access::ReadWrite).unwrap();
    set_byte(&mapping, 4095, 1);
    set_byte(&mapping, 4096, 2);
    set_byte(&mapping, MIB - 1, 3);
    shm::punch_hole(fd.as_fd(), 4096, MIB - 4096).unwrap();
    assert_eq!(shm::len(fd.as_fd()).unwrap(), MIB);
    assert_eq!(allocated_bytes(fd.as_fd()), 4096);
    assert_eq!(byte(&mapping, 4095), 1);
    assert_eq!(byte(&mapping, 4096), 0);
    assert_eq!(byte(&mapping, MIB - 1), 0);
}

fn sealed_file_cannot_shrink_and_can_grow_and_be_punched() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, MIB).unwrap();
    shm::seal_shrink(fd.as_fd()).unwrap();
    let error = shm::set_len(fd.as_fd(), 4096).unwrap_err();
    assert_eq!(error.errno, Errno::EPERM);
    shm::allocate(fd.as_fd(), MIB, MIB).unwrap();
    shm::punch_hole(fd.as_fd(), 0, MIB).unwrap();
    assert_eq!(allocated_bytes(fd.as_fd()), MIB);

    let object = Object::new();
    let named = shm::create(&object.0, 0o600).unwrap();
    assert!(shm::seal_shrink(named.as_fd()).is_err());
}

fn lengths_of_zero_are_nothing() {
    let fd = shm::anonymous(c"test").unwrap();
    shm::allocate(fd.as_fd(), 0, 0).unwrap();
    shm::punch_hole(fd.as_fd(), 0, 0).unwrap();
    assert_eq!(shm::len(fd.as_fd()).unwrap(), 0);
}

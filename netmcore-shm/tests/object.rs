//! Guards against objects that exist unrecorded at any instant, and against bus errors for want of space.
//!
//! # Safety
//!
//! Mappings are read and written by one process, inside of their length.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::{
    Access, Error, NoRecord, ObjectKind, ObjectName, Recorder, ShmObject, SpaceLimit,
};
use netmcore_sys::process::{Limit, Resource, get_limit, set_limit};
use netmcore_sys::{crash, shm};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use support::fork;

/// A record that checks the order of things.
#[derive(Default)]
struct Record {
    names: RefCell<BTreeSet<Vec<u8>>>,
    fails: Cell<bool>,
}

impl Recorder for Record {
    fn register(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        if self.fails.get() {
            return Err(io::Error::other("the disk is full"));
        }
        assert_eq!(kind, ObjectKind::PosixShm);
        assert!(!exists(&ObjectName::new(name).unwrap()), "made too early");
        self.names.borrow_mut().insert(name.to_owned());
        Ok(())
    }
    fn unregister(&self, _: ObjectKind, name: &[u8]) -> io::Result<()> {
        assert!(!exists(&ObjectName::new(name).unwrap()), "not yet removed");
        assert!(self.names.borrow_mut().remove(name));
        Ok(())
    }
}

impl Record {
    fn len(&self) -> usize {
        self.names.borrow().len()
    }
}

/// A record that the parent of a killed process can read: one file.
struct OneFile(PathBuf);

impl Recorder for OneFile {
    fn register(&self, _: ObjectKind, _: &[u8]) -> io::Result<()> {
        std::fs::write(&self.0, "")
    }
    fn unregister(&self, _: ObjectKind, _: &[u8]) -> io::Result<()> {
        std::fs::remove_file(&self.0)
    }
}

fn unique() -> ObjectName {
    ObjectName::unique(b"/netmcore_shm_test_").unwrap()
}

fn exists(name: &ObjectName) -> bool {
    shm::list().unwrap().contains(name)
}

fn name_is_recorded_before_it_exists_and_after() {
    let (name, record) = (unique(), Record::default());
    let object = ShmObject::create(&name, 10_000, 0o600, &record).unwrap();
    assert!(exists(&name));
    assert_eq!(record.len(), 1);
    assert_eq!(object.len_bytes().unwrap(), 10_000);
    let mapping = object.map(Access::ReadWrite).unwrap();
    // SAFETY: inside the mapping; nobody else uses it.
    unsafe { mapping.as_ptr().add(9_999).write(1) };
    ShmObject::unlink(&name, &record).unwrap();
    assert!(!exists(&name));
    assert_eq!(record.len(), 0);
    // SAFETY: as above. It is unlinked and still there.
    assert_eq!(unsafe { mapping.as_ptr().add(9_999).read() }, 1);
    ShmObject::unlink(&name, &NoRecord).unwrap();
}

fn existing_object_is_left_alone_and_unrecorded() {
    let (name, record) = (unique(), Record::default());
    let theirs = ShmObject::create(&name, 5, 0o600, &NoRecord).unwrap();
    let refused = ShmObject::create(&name, 7, 0o600, &record);
    assert!(matches!(refused, Err(Error::AlreadyExists { .. })));
    assert_eq!((record.len(), theirs.len_bytes().unwrap()), (0, 5));
    ShmObject::unlink(&name, &NoRecord).unwrap();
}

fn too_little_space_is_an_error_that_leaves_nothing() {
    let (name, record) = (unique(), Record::default());
    match ShmObject::create(&name, 1 << 50, 0o600, &record) {
        Err(Error::NoSpace {
            limit: SpaceLimit::Mount(path),
            wanted_bytes,
            free_bytes,
        }) => {
            assert_eq!(path, PathBuf::from("/dev/shm"));
            assert!(wanted_bytes == 1 << 50 && free_bytes < wanted_bytes);
        }
        other => panic!("{other:?}"),
    }
    assert!(!exists(&name));
    assert_eq!(record.len(), 0);
    record.fails.set(true);
    let refused = ShmObject::create(&name, 1, 0o600, &record);
    assert!(matches!(refused, Err(Error::Record { .. })));
    assert!(!exists(&name));
}

fn grown_object_keeps_its_bytes_and_shows_new_ones_at_once() {
    let name = unique();
    let object = ShmObject::create(&name, 4096, 0o600, &NoRecord).unwrap();
    let small = object.map(Access::ReadWrite).unwrap();
    // SAFETY: inside the mapping; nobody else uses it.
    unsafe { small.as_ptr().write(9) };
    let child = fork(|| {
        let object = ShmObject::open(&name, Access::ReadWrite).unwrap();
        object.grow(1 << 20).unwrap();
        object.grow(10).unwrap();
    });
    assert!(child.ended_well());
    assert_eq!(object.len_bytes().unwrap(), 1 << 20);
    let large = object.map(Access::ReadOnly).unwrap();
    // SAFETY: as above.
    unsafe {
        assert_eq!(large.as_ptr().read(), 9);
        assert_eq!(large.as_ptr().add((1 << 20) - 1).read(), 0);
    }
    assert!(matches!(object.grow(1 << 50), Err(Error::NoSpace { .. })));
    assert_eq!(object.len_bytes().unwrap(), 1 << 20);
    let read_only = ShmObject::open(&name, Access::ReadOnly).unwrap();
    let refused = read_only.grow(2 << 20);
    assert!(matches!(refused, Err(Error::System { .. })), "{refused:?}");
    ShmObject::unlink(&name, &NoRecord).unwrap();
}

fn limited_file_size_is_an_error_and_not_a_signal() {
    let old = get_limit(Resource::FileSizeBytes).unwrap();
    let limit = Limit {
        soft: Some(1 << 20),
        hard: old.hard,
    };
    set_limit(Resource::FileSizeBytes, limit).unwrap();
    let name = unique();
    match ShmObject::create(&name, 2 << 20, 0o600, &NoRecord) {
        Err(Error::NoSpace { limit, .. }) => assert_eq!(limit, SpaceLimit::FileSize),
        other => panic!("{other:?}"),
    }
    assert!(!exists(&name));
}

fn crash_at_any_step_leaves_nothing_unrecorded() {
    for k in 1.. {
        let name = unique();
        let file_name = format!("shm-record-{}", netmcore_sys::process::random_u64());
        let record = OneFile(std::env::temp_dir().join(file_name));
        crash::arm(Some(k));
        let child = fork(|| {
            ShmObject::create(&name, 1 << 20, 0o600, &record).unwrap();
            ShmObject::unlink(&name, &record).unwrap();
        });
        let ended_well = child.ended_well();
        crash::disarm();
        let recorded = record.0.exists();
        assert!(!exists(&name) || recorded, "{:?}", crash::died_at());
        if recorded {
            // As the next start does.
            ShmObject::unlink(&name, &record).unwrap();
        }
        assert!(!exists(&name) && !record.0.exists());
        if ended_well {
            assert_eq!(k, 5);
            return;
        }
    }
}

netmcore_forktest::forktests!(
    name_is_recorded_before_it_exists_and_after,
    existing_object_is_left_alone_and_unrecorded,
    too_little_space_is_an_error_that_leaves_nothing,
    grown_object_keeps_its_bytes_and_shows_new_ones_at_once,
    limited_file_size_is_an_error_and_not_a_signal,
    crash_at_any_step_leaves_nothing_unrecorded,
);

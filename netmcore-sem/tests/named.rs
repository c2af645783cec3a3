//! Guards against a semaphore that exists unrecorded at any instant, or a record that takes away what is somebody else's.

mod support;

use netmcore_sem::{Error, NamedSemaphore, SemContainer};
use netmcore_sys::{NoRecord, ObjectKind, ObjectName, Recorder, crash, sem};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};
use support::fork;

/// A record that checks the order of things.
#[derive(Default)]
struct Record {
    names: RefCell<BTreeSet<(ObjectKind, Vec<u8>)>>,
    fails: Cell<bool>,
}

impl Record {
    fn len(&self) -> usize {
        self.names.borrow().len()
    }
}

impl Recorder for Record {
    fn register(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        if self.fails.get() {
            return Err(io::Error::other("the disk is full"));
        }
        assert!(!exists(&ObjectName::new(name).unwrap()), "made too early");
        self.names.borrow_mut().insert((kind, name.to_owned()));
        Ok(())
    }
    fn unregister(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        assert!(!exists(&ObjectName::new(name).unwrap()), "not yet removed");
        assert!(self.names.borrow_mut().remove(&(kind, name.to_owned())));
        Ok(())
    }
}

/// A record whose changes are visible to the parent of a process that is killed: files in a folder.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> Folder {
        let name = format!("sem-record-{}", netmcore_sys::process::random_u64());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }
    fn path_of(&self, name: &[u8]) -> std::path::PathBuf {
        self.0.join(std::str::from_utf8(&name[1..]).unwrap())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

impl Recorder for Folder {
    fn register(&self, _: ObjectKind, name: &[u8]) -> io::Result<()> {
        std::fs::write(self.path_of(name), "")
    }
    fn unregister(&self, _: ObjectKind, name: &[u8]) -> io::Result<()> {
        std::fs::remove_file(self.path_of(name))
    }
}

fn unique() -> ObjectName {
    ObjectName::unique(b"/netmcore_sem_test_").unwrap()
}

fn exists(name: &ObjectName) -> bool {
    sem::list().unwrap().contains(name)
}

fn name_is_recorded_before_it_exists_and_after() {
    let (name, record) = (unique(), Record::default());
    let sem = NamedSemaphore::create(&name, 3, 0o600, &record).unwrap();
    assert!(exists(&name));
    assert_eq!(record.len(), 1);
    assert_eq!((sem.value(), sem.name()), (3, &name));
    NamedSemaphore::unlink(&name, &record).unwrap();
    assert!(!exists(&name));
    assert_eq!(record.len(), 0);
    // Open ones stay.
    sem.post().unwrap();
    assert_eq!(sem.value(), 4);
    let gone = NamedSemaphore::open(&name).unwrap_err();
    assert!(matches!(gone, Error::System { .. }), "{gone}");
    NamedSemaphore::unlink(&name, &NoRecord).unwrap();
}

fn existing_semaphore_is_left_alone_and_unrecorded() {
    let (name, record) = (unique(), Record::default());
    let theirs = NamedSemaphore::create(&name, 1, 0o600, &NoRecord).unwrap();
    let refused = NamedSemaphore::create(&name, 5, 0o600, &record).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { .. }), "{refused}");
    assert_eq!((record.len(), theirs.value()), (0, 1));
    NamedSemaphore::unlink(&name, &NoRecord).unwrap();
}

fn failed_creation_leaves_nothing() {
    let (name, record) = (unique(), Record::default());
    record.fails.set(true);
    let refused = NamedSemaphore::create(&name, 1, 0o600, &record).unwrap_err();
    assert!(matches!(refused, Error::Record { .. }), "{refused}");
    assert!(!exists(&name));
    record.fails.set(false);
    let refused = NamedSemaphore::create(&name, u32::MAX, 0o600, &record).unwrap_err();
    assert!(matches!(refused, Error::System { .. }), "{refused}");
    assert!(!exists(&name));
    assert_eq!(record.len(), 0);
    let long = ObjectName::new(format!("/{}", "x".repeat(251))).unwrap();
    let refused = NamedSemaphore::create(&long, 1, 0o600, &record).unwrap_err();
    assert!(matches!(refused, Error::Name(_)), "{refused}");
}

fn wait_ends_at_its_deadline() {
    let name = unique();
    let sem = NamedSemaphore::create(&name, 1, 0o600, &NoRecord).unwrap();
    NamedSemaphore::unlink(&name, &NoRecord).unwrap();
    let deadline = Instant::now() + Duration::from_millis(30);
    assert!(sem.wait_deadline(deadline).unwrap());
    assert!(!sem.wait_deadline(deadline).unwrap());
    assert!(Instant::now() >= deadline);
    sem.post().unwrap();
    // A deadline that is past takes what is there.
    assert!(sem.wait_deadline(deadline).unwrap());
}

fn container_removes_its_own_and_no_others() {
    let (prefix, record) = (unique(), Record::default());
    let container = SemContainer::create(&prefix, &record).unwrap();
    for number in [0, 5, u32::MAX] {
        container
            .create_semaphore(number, 1, 0o600, &record)
            .unwrap();
    }
    let other = ObjectName::new([prefix.as_bytes(), b"_x"].concat()).unwrap();
    NamedSemaphore::create(&other, 0, 0o600, &NoRecord).unwrap();
    assert_eq!(container.numbers().unwrap(), [0, 5, u32::MAX]);
    assert_eq!(record.len(), 4);
    let refused = SemContainer::create(&prefix, &record).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { .. }), "{refused}");
    container.unlink_semaphore(5, &record).unwrap();
    assert_eq!(container.numbers().unwrap(), [0, u32::MAX]);
    container.unlink(&record).unwrap();
    assert_eq!((container.numbers().unwrap(), record.len()), (vec![], 0));
    assert!(exists(&other));
    NamedSemaphore::unlink(&other, &NoRecord).unwrap();
}

/// Kills a child at every step of making and removing semaphores: what exists is recorded.
fn crash_at_any_step_leaves_nothing_unrecorded() {
    for k in 1.. {
        let (folder, prefix) = (Folder::new(), unique());
        crash::arm(Some(k));
        let child = fork(|| {
            let container = SemContainer::create(&prefix, &folder).unwrap();
            for number in 0..3 {
                container
                    .create_semaphore(number, 1, 0o600, &folder)
                    .unwrap();
            }
            container.unlink_semaphore(1, &folder).unwrap();
            container.unlink(&folder).unwrap();
        });
        let ended_well = child.ended_well();
        crash::disarm();
        let container = SemContainer::open(&prefix).unwrap();
        for number in container.numbers().unwrap() {
            let name = format!(
                "{}_{number}",
                std::str::from_utf8(prefix.as_bytes()).unwrap()
            );
            let recorded = folder.path_of(name.as_bytes()).exists();
            assert!(recorded, "{name} at {:?}", crash::died_at());
            assert!(folder.path_of(prefix.as_bytes()).exists());
        }
        // The next one cleans up.
        container.unlink(&NoRecord).unwrap();
        assert!(container.numbers().unwrap().is_empty());
        if ended_well {
            assert!(k > 10, "{k} points only");
            return;
        }
    }
}

netmcore_forktest::forktests!(
    name_is_recorded_before_it_exists_and_after,
    existing_semaphore_is_left_alone_and_unrecorded,
    failed_creation_leaves_nothing,
    wait_ends_at_its_deadline,
    container_removes_its_own_and_no_others,
    crash_at_any_step_leaves_nothing_unrecorded,
);

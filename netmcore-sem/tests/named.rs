//! Guards against a semaphore that exists unrecorded at any instant, or a record that takes away what is somebody else's.

#[path = "support/folder.rs"]
mod folder;
mod support;

use folder::Folder;
use netmcore_sem::{Error, NamedSemaphore, SemContainer};
use netmcore_sys::{NoRecord, ObjectKind, ObjectName, Recorder, crash, process, sem};
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

/// Nobody can look then whether the name is taken; that is not to say that it is.
fn without_descriptors_the_name_is_not_called_taken() {
    let (name, record) = (unique(), Record::default());
    let all = process::get_limit(process::Resource::DescriptorCount).unwrap();
    let none = process::Limit {
        soft: Some(0),
        ..all
    };
    process::set_limit(process::Resource::DescriptorCount, none).unwrap();
    let refused = NamedSemaphore::create(&name, 1, 0o600, &record).unwrap_err();
    process::set_limit(process::Resource::DescriptorCount, all).unwrap();
    assert!(matches!(refused, Error::System { .. }), "{refused}");
    assert!(!exists(&name));
    assert_eq!(record.len(), 0);
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

/// Another language's program: opens the semaphore, says its value, adds two permits, waits for one of them, says the value.
const FOREIGN_C: &str = r#"
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
int main(int argc, char **argv) {
    int value = -1;
    sem_t *sem = sem_open(argv[1], 0);
    if (argc != 2 || sem == SEM_FAILED) { perror("sem_open"); return 1; }
    if (sem_getvalue(sem, &value)) { perror("sem_getvalue"); return 1; }
    printf("%d ", value);
    if (sem_post(sem) || sem_post(sem) || sem_wait(sem)) { perror("sem_post, sem_wait"); return 1; }
    if (sem_getvalue(sem, &value)) { perror("sem_getvalue"); return 1; }
    printf("%d", value);
    return sem_close(sem);
}
"#;

/// The same in Python, which has no POSIX semaphores of its own: by the C library's functions.
const FOREIGN_PYTHON: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
sem = libc.sem_open(sys.argv[1].encode(), ctypes.c_int(0))
if not sem:
    raise OSError(ctypes.get_errno(), "sem_open")
sem, value = ctypes.c_void_p(sem), ctypes.c_int(-1)
def check(result):
    if result:
        raise OSError(ctypes.get_errno(), "a semaphore call")
check(libc.sem_getvalue(sem, ctypes.byref(value)))
print(value.value, end=" ")
check(libc.sem_post(sem)); check(libc.sem_post(sem)); check(libc.sem_wait(sem))
check(libc.sem_getvalue(sem, ctypes.byref(value)))
print(value.value, end="")
check(libc.sem_close(sem))
"#;

/// Runs the foreign program on a semaphore of ours; `command` takes the name as its last argument.
fn agrees(mut command: std::process::Command) {
    let (name, record) = (unique(), Record::default());
    let sem = NamedSemaphore::create(&name, 3, 0o600, &record).unwrap();
    sem.wait().unwrap();
    let argument = std::str::from_utf8(name.as_bytes()).unwrap();
    let output = command.arg(argument).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    assert_eq!(said, "2 3", "{complaint}");
    assert_eq!(sem.value(), 3);
    NamedSemaphore::unlink(&name, &record).unwrap();
    // Neither does the other see it now.
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{output:?}");
}

fn python_uses_the_same_semaphore() {
    let works = std::process::Command::new("python3")
        .args(["-c", "import ctypes; ctypes.CDLL(None).sem_open"])
        .output();
    match works {
        Ok(output) if output.status.success() => {}
        other => netmcore_forktest::skip(&format!("no Python with ctypes and sem_open: {other:?}")),
    }
    let mut python = std::process::Command::new("python3");
    python.args(["-c", FOREIGN_PYTHON]);
    agrees(python);
}

fn c_program_uses_the_same_semaphore() {
    let folder = Folder::new();
    let (source, program) = (folder.path_of(b"/foreign.c"), folder.path_of(b"/foreign"));
    std::fs::write(&source, FOREIGN_C).unwrap();
    let mut compiler = std::process::Command::new("cc");
    compiler.arg(&source).arg("-o").arg(&program);
    match compiler.arg("-pthread").output() {
        Ok(output) if output.status.success() => {}
        other => netmcore_forktest::skip(&format!("no C compiler: {other:?}")),
    }
    agrees(std::process::Command::new(&program));
}

/// And the other way round: what they make, we open.
fn semaphore_made_by_python_is_opened_here() {
    const MAKE: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
sem = libc.sem_open(sys.argv[1].encode(), ctypes.c_int(0o300), ctypes.c_uint(0o600), ctypes.c_uint(5))
assert sem, ctypes.get_errno()
"#;
    let name = unique();
    let made = std::process::Command::new("python3")
        .args(["-c", MAKE, std::str::from_utf8(name.as_bytes()).unwrap()])
        .output();
    match made {
        Ok(output) if output.status.success() => {}
        other => netmcore_forktest::skip(&format!("no Python with ctypes: {other:?}")),
    }
    let sem = NamedSemaphore::open(&name).unwrap();
    assert_eq!(sem.value(), 5);
    let refused = NamedSemaphore::create(&name, 1, 0o600, &NoRecord).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { .. }), "{refused}");
    NamedSemaphore::unlink(&name, &NoRecord).unwrap();
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
    without_descriptors_the_name_is_not_called_taken,
    wait_ends_at_its_deadline,
    container_removes_its_own_and_no_others,
    python_uses_the_same_semaphore,
    c_program_uses_the_same_semaphore,
    semaphore_made_by_python_is_opened_here,
    crash_at_any_step_leaves_nothing_unrecorded,
);

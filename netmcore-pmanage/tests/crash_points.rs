//! Guards against states that a death leaves behind and the next start cannot clean: each scenario is killed at each of its
//! crash points, and then run again.

mod child;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use child::Child;
use netmcore_pmanage::log::{DAMAGED_NAME, RECORD_NAME};
use netmcore_pmanage::record::{self, Operation};
use netmcore_pmanage::{ControllerSocket, KernelObject, Liveness, Log, recover};
use netmcore_sys::crash;
use netmcore_sys::name::ObjectName;
use netmcore_sys::process::ExitStatus;
use netmcore_sys::shm::Access;
use netmcore_sys::signal::SIGKILL;
use netmcore_sys::{sem, shm};

netmcore_forktest::forktests!(
    crash_in_a_program_leaves_what_the_next_start_cleans,
    crash_in_recovery_is_recoverable,
    crash_in_the_recovery_of_a_crash_is_recoverable,
    crash_in_the_controller_socket_is_recoverable,
    every_crash_point_is_met,
);

/// Runs `scenario` in a child that dies at crash point `at`. The point's name, or `None` if there are not so many.
fn run_until(at: u64, scenario: impl FnOnce()) -> Option<String> {
    crash::arm(Some(at));
    let status = Child::fork(scenario).wait();
    crash::disarm();
    match (crash::died_at(), status) {
        (
            Some(name),
            ExitStatus::Signaled {
                signal: SIGKILL, ..
            },
        ) => Some(name),
        (None, ExitStatus::Exited { code: 0 }) => None,
        (name, status) => panic!("{status} at {name:?}, point {at}"),
    }
}

fn unique() -> ObjectName {
    ObjectName::unique(b"/nmc-crash-").unwrap()
}

fn exists(object: &KernelObject) -> bool {
    match object {
        KernelObject::File(path) => fs::symlink_metadata(path).is_ok(),
        KernelObject::PosixShm(name) => shm::open(name, Access::ReadOnly).is_ok(),
        KernelObject::PosixSem(name) => sem::NamedSem::open(name).is_ok(),
        KernelObject::SemContainer(_) => false,
    }
}

fn create(object: &KernelObject) {
    match object {
        KernelObject::File(path) => drop(File::create_new(path).unwrap()),
        KernelObject::PosixShm(name) => drop(shm::create(name, 0o600).unwrap()),
        KernelObject::PosixSem(name) => drop(sem::NamedSem::create(name, 1, 0o600).unwrap()),
        KernelObject::SemContainer(_) => {}
    }
}

fn one_of_each_kind(dir: &Path) -> Vec<KernelObject> {
    vec![
        KernelObject::File(dir.join("file")),
        KernelObject::PosixShm(unique()),
        KernelObject::PosixSem(unique()),
        KernelObject::SemContainer(unique().as_bytes().to_vec()),
    ]
}

/// Names and contents of the files in a directory.
fn contents(dir: &Path) -> BTreeSet<(String, Vec<u8>)> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_file = entry.file_type().unwrap().is_file();
            // The lock file names its last master, each time another one.
            let is_read = is_file && name != "netplex.lock";
            (
                name,
                if is_read {
                    fs::read(entry.path()).unwrap()
                } else {
                    Vec::new()
                },
            )
        })
        .collect()
}

/// A start that is not disturbed.
fn start(dir: &Path) {
    let lock = Liveness::acquire(dir).unwrap();
    let _ = recover(dir, &lock).unwrap();
}

/// The life of a program: it takes over a record with a torn tail, makes and removes objects, and ends in order.
fn program(dir: &Path, objects: &[KernelObject]) {
    let lock = Liveness::acquire(dir).unwrap();
    let log = Log::open(dir).unwrap();
    log.register(objects).unwrap();
    objects.iter().for_each(create);
    log.unlink_this(&objects[0]).unwrap();
    log.register(&objects[..1]).unwrap();
    create(&objects[0]);
    log.unlink_all().unwrap().into_result().unwrap();
    drop(lock);
}

const TORN: &[u8] = b"R FILE \"/nowhere/a\"\nR FILE \"/nowh";

fn crash_program(points: &mut BTreeSet<String>) {
    for at in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let objects = one_of_each_kind(dir);
        fs::write(dir.join(RECORD_NAME), TORN).unwrap();
        let died_at = run_until(at, || program(dir, &objects));
        // At every instant each object is recorded or does not exist.
        let recorded = record::parse(&fs::read(dir.join(RECORD_NAME)).unwrap()).objects;
        for object in &objects {
            assert!(
                recorded.contains(object) || !exists(object),
                "{object} at {died_at:?}"
            );
        }
        start(dir);
        assert!(!objects.iter().any(exists), "{died_at:?}");
        let names: Vec<String> = contents(dir).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["netplex.lock", RECORD_NAME], "{died_at:?}");
        assert_eq!(fs::read(dir.join(RECORD_NAME)).unwrap(), b"", "{died_at:?}");
        match died_at {
            Some(name) => points.insert(name),
            None => return,
        };
    }
}

fn crash_in_a_program_leaves_what_the_next_start_cleans() {
    let mut points = BTreeSet::new();
    crash_program(&mut points);
    assert!(points.contains("pmanage.log.tail_cut"), "{points:?}");
    assert!(points.contains("pmanage.log.unlinked"), "{points:?}");
}

/// What a dead program left: objects, some that cannot be unlinked, damaged lines, a torn tail.
struct Leftovers {
    dir: tempfile::TempDir,
    objects: Vec<KernelObject>,
}

fn leave(some_stay: bool) -> Leftovers {
    let dir = tempfile::tempdir().unwrap();
    let objects = one_of_each_kind(dir.path());
    objects.iter().for_each(create);
    let mut text = Vec::new();
    let mut register = |object: &KernelObject, garbage: &[u8]| {
        record::encode(Operation::Register, object, &mut text);
        text.extend_from_slice(garbage);
    };
    register(&objects[0], b"garbage\n");
    register(&objects[1], b"R FILE \"/no end\n");
    register(&objects[2], b"");
    register(&objects[3], b"");
    if some_stay {
        register(&KernelObject::File("/proc".into()), b"");
        register(&KernelObject::File("/proc/self".into()), b"R FI");
    }
    fs::write(dir.path().join(RECORD_NAME), text).unwrap();
    Leftovers { dir, objects }
}

impl Leftovers {
    /// As an undisturbed start leaves it.
    fn assert_cleaned(&self, some_stay: bool, when: &str) {
        let stay = if some_stay {
            b"R FILE \"/proc\"\nR FILE \"/proc/self\"\n".as_slice()
        } else {
            b""
        };
        let expected = BTreeSet::from([
            ("netplex.lock".to_owned(), Vec::new()),
            (RECORD_NAME.to_owned(), stay.to_vec()),
            (
                DAMAGED_NAME.to_owned(),
                b"garbage\nR FILE \"/no end\n".to_vec(),
            ),
        ]);
        assert_eq!(contents(self.dir.path()), expected, "{when}");
        assert!(!self.objects.iter().any(exists), "{when}");
    }
}

fn crash_recovery(points: &mut BTreeSet<String>, some_stay: bool) {
    for at in 1.. {
        let left = leave(some_stay);
        let died_at = run_until(at, || start(left.dir.path()));
        if died_at.is_some() {
            start(left.dir.path());
        }
        left.assert_cleaned(some_stay, &format!("{died_at:?}"));
        match died_at {
            Some(name) => points.insert(name),
            None => return,
        };
    }
}

fn crash_in_recovery_is_recoverable() {
    let mut points = BTreeSet::new();
    crash_recovery(&mut points, false);
    assert!(
        !points.contains("pmanage.log.journal_committed"),
        "{points:?}"
    );
    crash_recovery(&mut points, true);
    assert!(
        points.contains("pmanage.log.journal_committed"),
        "{points:?}"
    );
}

fn crash_in_the_recovery_of_a_crash_is_recoverable() {
    for first in 1.. {
        for second in 1.. {
            let left = leave(true);
            let died_first = run_until(first, || start(left.dir.path()));
            if died_first.is_none() {
                return;
            }
            let died_second = run_until(second, || start(left.dir.path()));
            start(left.dir.path());
            left.assert_cleaned(true, &format!("{died_first:?}, then {died_second:?}"));
            if died_second.is_none() {
                break;
            }
        }
    }
}

fn crash_controller(points: &mut BTreeSet<String>) {
    for at in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let died_at = run_until(at, || {
            let lock = Liveness::acquire(dir).unwrap();
            drop(ControllerSocket::create(dir, &lock).unwrap());
            // As a dead master leaves it, the socket is replaced.
            drop(ControllerSocket::create(dir, &lock).unwrap());
            ControllerSocket::remove(dir, &lock).unwrap();
        });
        let lock = Liveness::acquire(dir).unwrap();
        let listener = ControllerSocket::create(dir, &lock).unwrap();
        let file_type = fs::symlink_metadata(ControllerSocket::path(dir))
            .unwrap()
            .file_type();
        assert!(file_type.is_socket());
        drop(listener);
        ControllerSocket::remove(dir, &lock).unwrap();
        ControllerSocket::remove(dir, &lock).unwrap();
        let names: Vec<String> = contents(dir).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["netplex.lock"], "{died_at:?}");
        match died_at {
            Some(name) => points.insert(name),
            None => return,
        };
    }
}

fn crash_in_the_controller_socket_is_recoverable() {
    let mut points = BTreeSet::new();
    crash_controller(&mut points);
    assert!(points.contains("pmanage.controller.bound"), "{points:?}");
}

fn every_crash_point_is_met() {
    let mut met = BTreeSet::new();
    crash_program(&mut met);
    crash_recovery(&mut met, true);
    crash_controller(&mut met);
    let mut written = BTreeSet::new();
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap() {
        let source = fs::read_to_string(entry.unwrap().path()).unwrap();
        for rest in source.split("crash_point!(\"").skip(1) {
            written.insert(rest.split('"').next().unwrap().to_owned());
        }
    }
    assert!(!written.is_empty());
    // Creating the objects passes points of other crates.
    met.retain(|name| name.starts_with("pmanage."));
    assert_eq!(met, written);
}

//! Guards against a record that the ancestor's tools cannot clean, or theirs that we cannot: with its own
//! `netplex-admin` where that is installed (Debian: `libocamlnet-ocaml-bin`).

mod child;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use child::wait_for_a_waiter;
use netmcore_pmanage::log::RECORD_NAME;
use netmcore_pmanage::record::{self, Operation};
use netmcore_pmanage::{ControllerSocket, KernelObject, Liveness, Log};
use netmcore_sys::file_lock::OfdGuard;
use netmcore_sys::name::ObjectName;
use netmcore_sys::record::ObjectKind;
use netmcore_sys::shm::Access;
use netmcore_sys::{sem, shm};

netmcore_forktest::forktests!(
    ancestors_tool_cleans_what_we_recorded,
    ancestors_tool_waits_for_our_lock,
    ancestors_tool_wants_the_controller_socket,
    record_that_the_ancestor_wrote_is_read_and_written_alike,
);

/// `netplex-admin -sockdir DIR -unlink`.
fn unlink_command(dir: &Path) -> Command {
    let mut command = Command::new("netplex-admin");
    command
        .arg("-sockdir")
        .arg(dir)
        .arg("-unlink")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn skip_without_the_tool() {
    match Command::new("netplex-admin").arg("-help").output() {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            netmcore_forktest::skip("netplex-admin is not installed")
        }
        Err(e) => panic!("netplex-admin: {e}"),
    }
}

#[track_caller]
fn assert_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

fn unique(prefix: &[u8]) -> ObjectName {
    ObjectName::unique(prefix).unwrap()
}

/// A file, a shared memory object and a semaphore that exist, with names that need every kind of escape, and a container.
fn make_objects(dir: &Path) -> Vec<KernelObject> {
    let file = dir.join("odd \"name\"\\\n\t\r\u{8}'\u{1}\u{7f}\u{e9}");
    let plain = dir.join("plain");
    File::create_new(&file).unwrap();
    File::create_new(&plain).unwrap();
    let shm_name = unique(b"/nmc \"ancestor\"\\\n\xc3\xa9\xff");
    drop(shm::create(&shm_name, 0o600).unwrap());
    let sem_name = unique(b"/nmc ancestor\t\x01");
    drop(sem::NamedSem::create(&sem_name, 1, 0o600).unwrap());
    vec![
        KernelObject::File(file),
        KernelObject::File(plain),
        KernelObject::PosixShm(shm_name),
        KernelObject::PosixSem(sem_name),
        KernelObject::SemContainer(unique(b"/nmc-ancestor").as_bytes().to_vec()),
    ]
}

fn exists(object: &KernelObject) -> bool {
    match object {
        KernelObject::File(path) => fs::symlink_metadata(path).is_ok(),
        KernelObject::PosixShm(name) => shm::open(name, Access::ReadOnly).is_ok(),
        KernelObject::PosixSem(name) => sem::NamedSem::open(name).is_ok(),
        KernelObject::SemContainer(_) => false,
    }
}

fn ancestors_tool_cleans_what_we_recorded() {
    skip_without_the_tool();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let lock = Liveness::acquire(dir).unwrap();
    // The listener is gone, as after a crash; its socket is what the tool looks for.
    drop(ControllerSocket::create(dir, &lock).unwrap());
    let log = Log::open(dir).unwrap();
    let objects = make_objects(dir);
    let stays = dir.join("stays");
    File::create(&stays).unwrap();
    log.register(&objects).unwrap();
    log.register(&[KernelObject::File(stays.clone())]).unwrap();
    log.unregister(&[KernelObject::File(stays.clone())])
        .unwrap();

    assert_success(&unlink_command(dir).output().unwrap());
    assert!(!objects.iter().any(exists));
    assert!(stays.exists());
    assert_eq!(fs::read(dir.join(RECORD_NAME)).unwrap(), b"");

    // And the log goes on in the file that the tool emptied.
    log.register(&objects).unwrap();
    assert_eq!(log.registered().unwrap().len(), objects.len());
}

fn ancestors_tool_waits_for_our_lock() {
    skip_without_the_tool();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let lock = Liveness::acquire(dir).unwrap();
    drop(ControllerSocket::create(dir, &lock).unwrap());
    let objects = make_objects(dir);
    Log::open(dir).unwrap().register(&objects).unwrap();

    let record = dir.join(RECORD_NAME);
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&record)
            .unwrap()
    };
    let guard = OfdGuard::lock(open()).unwrap();
    let before = fs::read(&record).unwrap();
    let tool = unlink_command(dir).spawn().unwrap();
    wait_for_a_waiter(guard.file());
    assert_eq!(fs::read(&record).unwrap(), before);
    assert!(objects.iter().filter(|object| exists(object)).count() == 4);
    drop(guard);
    assert_success(&tool.wait_with_output().unwrap());
    assert!(!objects.iter().any(exists));
}

fn ancestors_tool_wants_the_controller_socket() {
    skip_without_the_tool();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let lock = Liveness::acquire(dir).unwrap();
    let log = Log::open(dir).unwrap();
    let objects = make_objects(dir);
    log.register(&objects).unwrap();
    assert!(!unlink_command(dir).output().unwrap().status.success());
    assert_eq!(objects.iter().filter(|object| exists(object)).count(), 4);
    let _listener = ControllerSocket::create(dir, &lock).unwrap();
    assert_success(&unlink_command(dir).output().unwrap());
    assert!(!objects.iter().any(exists));
}

/// What `Netsys_pmanage` of OCamlnet 4.1.9 wrote for a list of calls.
const ANCESTORS: &[u8] = br#"R FILE "/tmp/plain"
R FILE "/tmp/odd \"name\"\\\n\t\r\b'\001\127\195\169"
R POSIX_SHM "/shm one"
R POSIX_SEM "/sem\255"
R SEM_CONT "/cont"
U POSIX_SHM "/shm one"
R POSIX_SHM "/a"
R POSIX_SEM "/b"
"#;

fn record_that_the_ancestor_wrote_is_read_and_written_alike() {
    let object = |kind, name: &[u8]| KernelObject::new(kind, name).unwrap();
    let register = |kind, name| (Operation::Register, object(kind, name));
    let calls = [
        register(ObjectKind::File, b"/tmp/plain"),
        register(
            ObjectKind::File,
            b"/tmp/odd \"name\"\\\n\t\r\x08'\x01\x7f\xc3\xa9",
        ),
        register(ObjectKind::PosixShm, b"/shm one"),
        register(ObjectKind::PosixSem, b"/sem\xff"),
        register(ObjectKind::SemContainer, b"/cont"),
        (
            Operation::Unregister,
            object(ObjectKind::PosixShm, b"/shm one"),
        ),
        register(ObjectKind::PosixShm, b"/a"),
        register(ObjectKind::PosixSem, b"/b"),
    ];
    let mut ours = Vec::new();
    for (operation, object) in &calls {
        record::encode(*operation, object, &mut ours);
    }
    assert_eq!(
        ours.escape_ascii().to_string(),
        ANCESTORS.escape_ascii().to_string()
    );
    let contents = record::parse(ANCESTORS);
    let expected: BTreeSet<_> = [0, 1, 3, 4, 6, 7].map(|n| calls[n].1.clone()).into();
    assert_eq!(contents.objects, expected);
    assert_eq!(contents.damaged, []);
}

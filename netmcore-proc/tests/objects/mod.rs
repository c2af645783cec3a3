//! What exists and what is recorded, as seen from outside.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use netmcore_pmanage::{KernelObject, Log};
use netmcore_proc::{Master, ResourceRepr};
use netmcore_sys::ObjectName;

/// Where Linux keeps a shared memory object.
pub fn shm_path(name: &ObjectName) -> PathBuf {
    in_dev_shm(b"", name)
}

/// Where glibc keeps a named semaphore.
pub fn sem_path(name: &ObjectName) -> PathBuf {
    in_dev_shm(b"sem.", name)
}

fn in_dev_shm(prefix: &[u8], name: &ObjectName) -> PathBuf {
    let bytes = [prefix, &name.as_bytes()[1..]].concat();
    Path::new("/dev/shm").join(std::ffi::OsStr::from_bytes(&bytes))
}

/// The file that stands for a resource.
pub fn path_of(repr: &ResourceRepr) -> PathBuf {
    match repr {
        ResourceRepr::File(path) => path.clone(),
        ResourceRepr::PosixSem(name) => sem_path(name),
        repr => shm_path(repr.shm_name().expect("it is no point")),
    }
}

pub fn exists(repr: &ResourceRepr) -> bool {
    fs::symlink_metadata(path_of(repr)).is_ok()
}

/// What stands in the record of `dir`.
pub fn recorded(dir: &Path) -> BTreeSet<KernelObject> {
    let log = Log::open(dir).unwrap();
    log.registered().unwrap().into_iter().collect()
}

/// What the record must say while a resource exists.
pub fn objects_of(repr: &ResourceRepr) -> Vec<KernelObject> {
    let mut objects = match repr {
        ResourceRepr::File(path) => vec![KernelObject::File(path.clone())],
        ResourceRepr::PosixSem(name) => vec![KernelObject::PosixSem(name.clone())],
        repr => vec![KernelObject::PosixShm(
            repr.shm_name().expect("it is no point").clone(),
        )],
    };
    if let Some(prefix) = repr.container_prefix() {
        objects.push(KernelObject::SemContainer(prefix.as_bytes().to_vec()));
    }
    objects
}

#[track_caller]
pub fn assert_there(dir: &Path, repr: &ResourceRepr) {
    assert!(exists(repr), "{repr} is gone");
    let recorded = recorded(dir);
    for object in objects_of(repr) {
        assert!(recorded.contains(&object), "{object} is not recorded");
    }
}

/// Neither the object nor its record is left.
#[track_caller]
pub fn assert_gone(dir: &Path, repr: &ResourceRepr) {
    assert!(!exists(repr), "{repr} is still there");
    let recorded = recorded(dir);
    for object in objects_of(repr) {
        assert!(!recorded.contains(&object), "{object} is still recorded");
    }
}

/// After an orderly end, an empty record and the lock are all that is left in the directory.
#[track_caller]
pub fn assert_clean(dir: &Path) {
    assert_eq!(recorded(dir), BTreeSet::new());
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !matches!(name.as_str(), "netplex.pmanage" | "netplex.lock"))
        .collect();
    left.sort();
    assert_eq!(left, Vec::<String>::new());
}

/// Waits for something that another process is about to do; returns how long it took.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    const LIMIT: Duration = Duration::from_secs(20);
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "in vain: {what}");
        // sleep: between two looks at what another process does; the limit fails the test.
        thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

/// Runs `body` as the first process of a master on `dir`; nothing may be left there.
#[track_caller]
pub fn run_first<R>(dir: &Path, body: impl Fn() -> R + 'static) -> R
where
    R: serde::Serialize + serde::de::DeserializeOwned + 'static,
{
    let mut master = Master::builder(dir);
    let first = master.def_process(move |()| body());
    let result = match master.run(&first, &()) {
        Ok(result) => result,
        Err(error) => panic!("{error}"),
    };
    assert_clean(dir);
    result
}

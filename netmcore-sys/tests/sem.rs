//! Guards against semaphores that other programs cannot open, that appear half made, that leave files behind, and whose
//! timed wait does not end.
//!
//! # Safety
//!
//! The C library's calls get valid names, and semaphores in a page that outlives them.

#![allow(unsafe_code)]

mod forked;

use forked::{Child, Words};
use netmcore_sys::error::Errno;
use netmcore_sys::futex::Deadline;
use netmcore_sys::name::ObjectName;
use netmcore_sys::sem::{self, MemSem, NamedSem};
use netmcore_sys::{process, signal};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

netmcore_forktest::forktests!(
    permits_pass_between_processes,
    timed_wait_ends_at_the_deadline_and_not_before,
    timed_wait_takes_a_permit_posted_by_another_process,
    past_deadline_still_takes_what_is_there,
    signals_do_not_end_a_wait,
    permit_of_a_killed_process_stays_taken,
    killed_waiter_takes_no_permit,
    create_is_exclusive,
    open_or_create_does_either,
    racing_creators_share_one_semaphore,
    missing_and_invalid_are_errors,
    file_size_limit_is_an_error_and_kills_nobody,
    unlinked_semaphore_stays_usable,
    file_is_what_the_c_library_makes,
    c_library_opens_ours_and_we_open_its,
    mode_and_umask_apply,
    post_at_the_largest_value_overflows,
    memory_semaphore_is_shared_across_processes,
);

/// A name that is unlinked at the end of the test.
struct Name(ObjectName);

impl Name {
    fn new() -> Name {
        Name(ObjectName::unique(b"/netmcore_sys_test_").unwrap())
    }

    fn create(&self, initial: u32) -> NamedSem {
        NamedSem::create(&self.0, initial, 0o600).unwrap()
    }

    fn file(&self) -> PathBuf {
        let name = String::from_utf8(self.0.as_bytes()[1..].to_vec()).unwrap();
        PathBuf::from(format!("/dev/shm/sem.{name}"))
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = sem::unlink(&self.0);
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn file_size_limit_is_an_error_and_kills_nobody() {
    let name = Name::new();
    let resource = process::Resource::FileSizeBytes;
    let before = process::get_limit(resource).unwrap();
    let narrow = process::Limit {
        soft: Some(31),
        ..before
    };
    process::set_limit(resource, narrow).unwrap();
    let created = NamedSem::create(&name.0, 1, 0o600).map(drop);
    process::set_limit(resource, before).unwrap();
    assert_eq!(created.unwrap_err().errno, Errno::EFBIG);
    assert!(!name.file().exists());
    name.create(1);
}

fn permits_pass_between_processes() {
    let name = Name::new();
    let here = name.create(0);
    let child = Child::run(|| {
        let there = NamedSem::open(&name.0).unwrap();
        for _ in 0..1000 {
            there.wait().unwrap();
        }
    });
    for _ in 0..1000 {
        here.post().unwrap();
    }
    child.succeeds();
    assert_eq!(here.value(), 0);
}

fn timed_wait_ends_at_the_deadline_and_not_before() {
    let name = Name::new();
    let empty = name.create(0);
    let start = Instant::now();
    let deadline = Deadline::after(Duration::from_millis(20));
    assert!(!empty.wait_deadline(deadline).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert!(start.elapsed() < Duration::from_secs(10));
}

fn timed_wait_takes_a_permit_posted_by_another_process() {
    let name = Name::new();
    let empty = name.create(0);
    let child = Child::run(|| assert!(empty.wait_deadline(soon()).unwrap()));
    Child::run(|| NamedSem::open(&name.0).unwrap().post().unwrap()).succeeds();
    child.succeeds();
    assert!(!empty.try_wait().unwrap());
}

fn past_deadline_still_takes_what_is_there() {
    let name = Name::new();
    let one = name.create(1);
    assert!(one.wait_deadline(Deadline::from_nanos(1)).unwrap());
    assert!(!one.wait_deadline(Deadline::from_nanos(1)).unwrap());
}

fn signals_do_not_end_a_wait() {
    let (name, words) = (Name::new(), Words::new());
    let empty = name.create(0);
    let child = Child::run(|| {
        signal::set_empty_handler(libc::SIGUSR1).unwrap();
        words.set(0, 1);
        empty.wait().unwrap();
        assert!(empty.wait_deadline(soon()).unwrap());
    });
    forked::until("the child handles the signal", || words.get(0) == 1);
    for round in 0..40 {
        process::kill(child.pid, libc::SIGUSR1).unwrap();
        // sleep: lets the child go back to sleep, so that most signals find it waiting; the outcome is the same if not.
        std::thread::sleep(Duration::from_millis(1));
        if round == 20 {
            empty.post().unwrap();
        }
    }
    assert_eq!(child.has_ended(), None);
    empty.post().unwrap();
    child.succeeds();
}

/// Why a bare semaphore is no lock for processes that may be killed.
fn permit_of_a_killed_process_stays_taken() {
    let (name, words) = (Name::new(), Words::new());
    let one = name.create(1);
    let child = Child::run(|| {
        one.wait().unwrap();
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the child has the permit", || words.get(0) == 1);
    child.kill();
    let deadline = Deadline::after(Duration::from_millis(10));
    assert!(!one.wait_deadline(deadline).unwrap());
}

fn killed_waiter_takes_no_permit() {
    let name = Name::new();
    let empty = name.create(0);
    let child = Child::run(|| empty.wait().unwrap());
    forked::until("it waits", || child.is_asleep());
    child.kill();
    empty.post().unwrap();
    assert_eq!(empty.value(), 1);
    assert!(empty.try_wait().unwrap());
}

fn create_is_exclusive() {
    let name = Name::new();
    let first = name.create(3);
    let error = NamedSem::create(&name.0, 0, 0o600).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
    assert_eq!(first.value(), 3);
}

fn open_or_create_does_either() {
    let name = Name::new();
    let created = NamedSem::open_or_create(&name.0, 2, 0o600).unwrap();
    let opened = NamedSem::open_or_create(&name.0, 5, 0o600).unwrap();
    opened.post().unwrap();
    assert_eq!(created.value(), 3);
}

fn racing_creators_share_one_semaphore() {
    let (name, words) = (Name::new(), Words::new());
    let children: Vec<Child> = (0..8)
        .map(|_| {
            Child::run(|| {
                while words.get(0) == 0 {
                    std::hint::spin_loop();
                }
                NamedSem::open_or_create(&name.0, 0, 0o600)
                    .unwrap()
                    .post()
                    .unwrap();
            })
        })
        .collect();
    words.set(0, 1);
    children.into_iter().for_each(Child::succeeds);
    assert_eq!(NamedSem::open(&name.0).unwrap().value(), 8);
}

fn missing_and_invalid_are_errors() {
    let name = Name::new();
    assert_eq!(NamedSem::open(&name.0).unwrap_err().errno, Errno::ENOENT);
    assert_eq!(sem::unlink(&name.0).unwrap_err().errno, Errno::ENOENT);
    let too_many = NamedSem::create(&name.0, sem::VALUE_MAX + 1, 0o600);
    assert_eq!(too_many.unwrap_err().errno, Errno::EINVAL);

    let long = ObjectName::new([b"/".as_slice(), &[b'x'; 251]].concat()).unwrap();
    for error in [
        NamedSem::create(&long, 0, 0o600).unwrap_err(),
        NamedSem::open(&long).unwrap_err(),
        sem::unlink(&long).unwrap_err(),
    ] {
        assert_eq!(error.errno, Errno::ENAMETOOLONG);
    }

    for contents in [b"".as_slice(), b"short"] {
        std::fs::write(name.file(), contents).unwrap();
        assert_eq!(NamedSem::open(&name.0).unwrap_err().errno, Errno::EINVAL);
    }
}

fn unlinked_semaphore_stays_usable() {
    let name = Name::new();
    let first = name.create(0);
    sem::unlink(&name.0).unwrap();
    Child::run(|| first.post().unwrap()).succeeds();
    first.wait().unwrap();
    let second = name.create(7);
    assert_eq!((first.value(), second.value()), (0, 7));
}

fn create_by_c_library(name: &Name, initial: u32) -> *mut libc::sem_t {
    let flags = libc::O_CREAT | libc::O_EXCL;
    // SAFETY: the name is a C string, the rest integers.
    let sem = unsafe { libc::sem_open(name.0.as_c_str().as_ptr(), flags, 0o600, initial) };
    assert_ne!(sem, libc::SEM_FAILED);
    sem
}

fn file_is_what_the_c_library_makes() {
    let (ours, its) = (Name::new(), Name::new());
    let _sem = ours.create(3);
    create_by_c_library(&its, 3);
    let ours = std::fs::read(ours.file()).unwrap();
    assert_eq!(ours, std::fs::read(its.file()).unwrap());
    assert_eq!(ours.len(), MemSem::SIZE);
}

fn c_library_opens_ours_and_we_open_its() {
    let (ours, its) = (Name::new(), Name::new());
    let sem = ours.create(0);
    Child::run(|| {
        // SAFETY: the name is a C string; a semaphore that is open is posted to.
        unsafe {
            let sem = libc::sem_open(ours.0.as_c_str().as_ptr(), 0);
            assert_ne!(sem, libc::SEM_FAILED);
            assert_eq!(libc::sem_post(sem), 0);
        }
    })
    .succeeds();
    assert!(sem.wait_deadline(soon()).unwrap());

    create_by_c_library(&its, 2);
    assert_eq!(NamedSem::open(&its.0).unwrap().value(), 2);
}

fn mode_and_umask_apply() {
    // SAFETY: plain system call; the process is this test's alone.
    unsafe { libc::umask(0o027) };
    let name = Name::new();
    let _sem = NamedSem::create(&name.0, 0, 0o666).unwrap();
    let mode = std::fs::metadata(name.file()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o640);
}

fn post_at_the_largest_value_overflows() {
    let name = Name::new();
    let full = name.create(sem::VALUE_MAX);
    assert_eq!(full.post().unwrap_err().errno, Errno::EOVERFLOW);
    assert_eq!(full.value(), sem::VALUE_MAX);
}

fn memory_semaphore_is_shared_across_processes() {
    assert!(sem::have_anonymous());
    let words = Words::new();
    let at: *mut MemSem = words.as_ptr().cast();
    // SAFETY: a page of memory that nobody uses yet.
    unsafe { MemSem::init(at, 1) }.unwrap();
    // SAFETY: initialised, and mapped until the end of the test.
    let sem = unsafe { &*at };
    assert!(sem.try_wait().unwrap());
    assert!(!sem.try_wait().unwrap());
    assert!(
        !sem.wait_deadline(Deadline::after(Duration::from_millis(1)))
            .unwrap()
    );
    let child = Child::run(|| {
        sem.wait().unwrap();
        assert!(sem.wait_deadline(soon()).unwrap());
    });
    sem.post().unwrap();
    sem.post().unwrap();
    child.succeeds();
    assert_eq!(sem.value(), 0);
    // SAFETY: no process uses it any more.
    unsafe { MemSem::destroy(at) }.unwrap();
    // SAFETY: as above.
    let too_many = unsafe { MemSem::init(at, sem::VALUE_MAX + 1) };
    assert_eq!(too_many.unwrap_err().errno, Errno::EINVAL);
}

//! Guards against wrong beliefs about who excludes whom: the record is kept by a lock that must hold against POSIX locks
//! of other programs, against this process itself, and across closes; liveness by one that forks inherit.
//!
//! # Safety
//!
//! Locks are asked for by `fcntl` on structures of the calling frame.

#![allow(unsafe_code)]

mod forked;

use forked::{Child, Words};
use netmcore_sys::error::Errno;
use netmcore_sys::file_lock::{self, LockHolder, OfdGuard};
use netmcore_sys::process;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

netmcore_forktest::forktests!(
    ofd_lock_excludes_posix_lock_of_another_process,
    posix_lock_of_another_process_excludes_ofd_lock,
    ofd_lock_excludes_other_descriptors_of_this_process,
    ofd_lock_survives_the_close_of_another_descriptor,
    posix_lock_does_not,
    dropped_guard_unlocks_though_a_fork_has_a_copy,
    blocked_lock_is_got_when_the_holder_is_killed,
    zombie_holds_no_lock,
    read_only_file_is_ebadf,
    flock_excludes_other_descriptors,
    flock_is_inherited_and_held_until_the_last_is_gone,
    unlock_frees_for_all_copies,
    flock_and_ofd_lock_do_not_see_each_other,
);

/// A file that its parent directory takes with it.
struct Subject {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Subject {
    fn new() -> Subject {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        File::create(&path).unwrap();
        Subject {
            path,
            _directory: directory,
        }
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .append(true)
            .open(&self.path)
            .unwrap()
    }

    fn ofd_is_free(&self) -> bool {
        OfdGuard::try_lock(self.open()).unwrap().is_some()
    }

    fn flock_is_free(&self) -> bool {
        file_lock::try_lock_exclusive(&self.open()).unwrap()
    }
}

/// What other programs do: `fcntl(F_SETLK)` with a write lock on the whole file.
fn posix_try_lock(file: &File) -> bool {
    // SAFETY: all fields are integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the structure lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) };
    if result == -1 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert!(errno == Some(libc::EAGAIN) || errno == Some(libc::EACCES));
    }
    result == 0
}

fn ofd_lock_excludes_posix_lock_of_another_process() {
    let subject = Subject::new();
    let guard = OfdGuard::lock(subject.open()).unwrap();
    Child::run(|| assert!(!posix_try_lock(&subject.open()))).succeeds();
    drop(guard);
    Child::run(|| assert!(posix_try_lock(&subject.open()))).succeeds();
}

fn posix_lock_of_another_process_excludes_ofd_lock() {
    let (subject, words) = (Subject::new(), Words::new());
    let child = Child::run(|| {
        let file = subject.open();
        assert!(posix_try_lock(&file));
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the child has locked", || words.get(0) == 1);
    assert!(!subject.ofd_is_free());
    let holder = file_lock::ofd_holder(subject.open().as_fd()).unwrap();
    let pid = child.pid.get();
    assert_eq!(holder, Some(LockHolder::Process { pid }));
    child.kill();
    assert!(subject.ofd_is_free());
    assert_eq!(file_lock::ofd_holder(subject.open().as_fd()).unwrap(), None);
}

fn ofd_lock_excludes_other_descriptors_of_this_process() {
    let subject = Subject::new();
    let guard = OfdGuard::lock(subject.open()).unwrap();
    assert!(!subject.ofd_is_free());
    let holder = file_lock::ofd_holder(subject.open().as_fd()).unwrap();
    assert_eq!(holder, Some(LockHolder::OpenFile));
    // Its own lock keeps nobody from locking who has it.
    assert_eq!(file_lock::ofd_holder(guard.as_fd()).unwrap(), None);
    assert!(file_lock::ofd_try_lock(guard.file().as_fd()).unwrap());
    drop(guard);
    assert!(subject.ofd_is_free());
}

fn ofd_lock_survives_the_close_of_another_descriptor() {
    let subject = Subject::new();
    let _guard = OfdGuard::lock(subject.open()).unwrap();
    drop(subject.open());
    assert!(!subject.ofd_is_free());
}

/// The reason for not using them: the C library's rule, kept by Linux.
fn posix_lock_does_not() {
    let subject = Subject::new();
    let file = subject.open();
    assert!(posix_try_lock(&file));
    Child::run(|| assert!(!posix_try_lock(&subject.open()))).succeeds();
    drop(subject.open());
    Child::run(|| assert!(posix_try_lock(&subject.open()))).succeeds();
    drop(file);
}

fn dropped_guard_unlocks_though_a_fork_has_a_copy() {
    let (subject, words) = (Subject::new(), Words::new());
    let guard = OfdGuard::lock(subject.open()).unwrap();
    let child = Child::run(|| {
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the child runs", || words.get(0) == 1);
    drop(guard);
    assert!(subject.ofd_is_free());
    child.kill();
}

fn blocked_lock_is_got_when_the_holder_is_killed() {
    let (subject, words) = (Subject::new(), Words::new());
    let holder = Child::run(|| {
        let _guard = OfdGuard::lock(subject.open()).unwrap();
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the holder has locked", || words.get(0) == 1);
    let waiter = Child::run(|| drop(OfdGuard::lock(subject.open()).unwrap()));
    let inode = format!(":{} ", subject.open().metadata().unwrap().ino());
    forked::until("the waiter waits", || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let mut lines = locks.lines();
        lines.any(|line| line.contains("->") && line.contains(&inode))
    });
    assert_eq!(waiter.has_ended(), None);
    holder.kill();
    waiter.succeeds();
}

fn zombie_holds_no_lock() {
    let subject = Subject::new();
    for posix in [false, true] {
        let child = Child::run(|| {
            let file = subject.open();
            if posix {
                assert!(posix_try_lock(&file));
                forked::leave_open(file);
            } else {
                assert!(file_lock::try_lock_exclusive(&file).unwrap());
                forked::leave_open(OfdGuard::lock(file).unwrap());
            }
        });
        forked::until("it is a zombie", || process::is_zombie(child.pid).unwrap());
        assert!(subject.ofd_is_free());
        assert!(subject.flock_is_free());
        child.succeeds();
    }
}

fn read_only_file_is_ebadf() {
    let subject = Subject::new();
    let file = File::open(&subject.path).unwrap();
    assert_eq!(OfdGuard::lock(file).unwrap_err().errno, Errno::EBADF);
}

fn flock_excludes_other_descriptors() {
    let subject = Subject::new();
    let file = subject.open();
    assert!(file_lock::try_lock_exclusive(&file).unwrap());
    assert!(!subject.flock_is_free());
    Child::run(|| assert!(!subject.flock_is_free())).succeeds();
    drop(file);
    file_lock::lock_exclusive(&subject.open()).unwrap();
}

fn flock_is_inherited_and_held_until_the_last_is_gone() {
    let (subject, words) = (Subject::new(), Words::new());
    let file = subject.open();
    assert!(file_lock::try_lock_exclusive(&file).unwrap());
    let child = Child::run(|| {
        words.set(0, 1);
        forked::sleep_for_ever();
    });
    forked::until("the child runs", || words.get(0) == 1);
    drop(file);
    assert!(!subject.flock_is_free());
    child.kill();
    assert!(subject.flock_is_free());
}

fn unlock_frees_for_all_copies() {
    let subject = Subject::new();
    let file = subject.open();
    assert!(file_lock::try_lock_exclusive(&file).unwrap());
    Child::run(|| file_lock::unlock(&file).unwrap()).succeeds();
    assert!(subject.flock_is_free());
}

fn flock_and_ofd_lock_do_not_see_each_other() {
    let subject = Subject::new();
    let file = subject.open();
    assert!(file_lock::try_lock_exclusive(&file).unwrap());
    assert!(subject.ofd_is_free());
    let _guard = OfdGuard::lock(subject.open()).unwrap();
    drop(file);
    assert!(subject.flock_is_free());
}

//! Guards against forks that copy a process in the middle of another thread's work, and against forks by others that
//! keep a lock held which says "this program runs".
//!
//! # Safety
//!
//! A test that forks through the C library has one thread, and its child leaves by `exit_now`. Descriptors and buffers
//! that the C library gets are alive.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::thread;

use child::{Child, hear, line, say};
use netmcore_sys::process::{self, ForkError};

netmcore_forktest::forktests!(
    fork_is_refused_with_a_second_thread,
    thread_that_was_joined_is_not_counted,
    guarded_descriptor_is_closed_in_foreign_forks_only,
    guarded_descriptor_is_closed_in_foreign_grandchildren,
    forgotten_descriptor_stays_open_everywhere,
    foreign_fork_does_not_hold_a_guarded_lock,
    programs_started_by_std_run_no_fork_handler_in_this_process,
    unflushed_c_stream_is_written_twice_and_flushed_one_once,
);

fn fork_is_refused_with_a_second_thread() {
    let (end, ended) = mpsc::channel::<()>();
    let second = thread::spawn(move || {
        let _ = ended.recv();
    });
    assert_eq!(process::thread_count().unwrap(), 2);
    // SAFETY: the fork is refused.
    let refused = unsafe { process::fork() }.unwrap_err();
    assert_eq!(refused, ForkError::MultiThreaded { threads: 2 });
    assert!(refused.to_string().contains("2 threads"), "{refused}");
    drop(end);
    second.join().unwrap();
    Child::fork(|| 0).succeeds();
}

/// The kernel counts a thread for a little longer than `join` waits for it: seen about twice in 1000 rounds.
fn thread_that_was_joined_is_not_counted() {
    for round in 0..10_000 {
        let threads = [(); 3].map(|()| thread::spawn(|| ()));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(process::thread_count().unwrap(), 1, "round {round}");
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: asks for the flags of a number that may or may not be open.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// Forks as a library would that knows nothing of ours; returns what the child's `body` returned.
fn foreign_fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the test has one thread, and the child leaves by `exit_now`.
    match unsafe { libc::fork() } {
        -1 => panic!("a fork failed"),
        0 => process::exit_now(body()),
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            assert!(libc::WIFEXITED(status), "status {status:x}");
            libc::WEXITSTATUS(status)
        }
    }
}

fn guarded_descriptor_is_closed_in_foreign_forks_only() {
    let (guarded, other) = (
        File::open("/dev/null").unwrap(),
        File::open("/dev/null").unwrap(),
    );
    let (guarded_fd, other_fd) = (guarded.as_raw_fd(), other.as_raw_fd());
    process::close_in_foreign_forks(guarded_fd);
    process::close_in_foreign_forks(guarded_fd);

    let open_in_child =
        foreign_fork(|| i32::from(is_open(guarded_fd)) | i32::from(is_open(other_fd)) << 1);
    assert_eq!(open_in_child, 0b10);
    Child::fork(|| if is_open(guarded_fd) { 0 } else { 1 }).succeeds();
    assert!(is_open(guarded_fd), "the parent keeps it");
    assert_eq!(
        foreign_fork(|| i32::from(is_open(guarded_fd))),
        0,
        "and the guard"
    );
}

fn guarded_descriptor_is_closed_in_foreign_grandchildren() {
    let guarded = File::open("/dev/null").unwrap();
    let fd = guarded.as_raw_fd();
    process::close_in_foreign_forks(fd);
    Child::fork(|| foreign_fork(|| i32::from(is_open(fd)))).succeeds();
}

fn forgotten_descriptor_stays_open_everywhere() {
    let guarded = File::open("/dev/null").unwrap();
    let fd = guarded.as_raw_fd();
    process::close_in_foreign_forks(fd);
    process::close_in_foreign_forks_forget(fd);
    process::close_in_foreign_forks_forget(fd);
    process::close_in_foreign_forks_forget(-1);
    assert_eq!(foreign_fork(|| i32::from(is_open(fd))), 1);
    // Its place in the table is free again, any number of times.
    for _ in 0..1000 {
        process::close_in_foreign_forks(fd);
        process::close_in_foreign_forks_forget(fd);
    }
}

fn foreign_fork_does_not_hold_a_guarded_lock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lock");
    let is_locked = || {
        let file = File::open(&path).unwrap();
        // SAFETY: a descriptor that is open.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) != 0 }
    };
    for (guarded, held_by_child) in [(false, true), (true, false)] {
        let file = File::create(&path).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
        if guarded {
            process::close_in_foreign_forks(file.as_raw_fd());
        }
        let (ours, childs) = line();
        // SAFETY: the test has one thread, and the child leaves by `exit_now`.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(ours);
            say(&childs, 0);
            hear(&childs);
            process::exit_now(0);
        }
        assert_eq!(hear(&ours), Some(0), "the child is out of the fork");
        assert!(is_locked());
        process::close_in_foreign_forks_forget(file.as_raw_fd());
        drop(file);
        assert_eq!(is_locked(), held_by_child, "guarded: {guarded}");
        drop((ours, childs));
        // SAFETY: waits for the child just made.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        assert!(!is_locked());
    }
}

/// `posix_spawn` shares this process's memory until the exec: a handler that ran there would close nothing of the
/// child's but clear our table.
fn programs_started_by_std_run_no_fork_handler_in_this_process() {
    let guarded = File::open("/dev/null").unwrap();
    let fd = guarded.as_raw_fd();
    process::close_in_foreign_forks(fd);
    assert!(
        std::process::Command::new("true")
            .status()
            .unwrap()
            .success()
    );
    assert!(is_open(fd));
    assert_eq!(
        foreign_fork(|| i32::from(is_open(fd))),
        0,
        "the guard is still there"
    );
}

fn unflushed_c_stream_is_written_twice_and_flushed_one_once() {
    for (flushed, expected) in [(false, "xx"), (true, "x")] {
        let mut file = tempfile::tempfile().unwrap();
        // SAFETY: duplicates an open descriptor, and makes a stream of the copy, which is fully buffered as it is
        // no terminal.
        let stream = unsafe { libc::fdopen(libc::dup(file.as_raw_fd()), c"w".as_ptr()) };
        assert!(!stream.is_null());
        // SAFETY: an open stream.
        assert!(unsafe { libc::fputs(c"x".as_ptr(), stream) } >= 0);
        if flushed {
            process::flush_c_streams();
        }
        Child::fork(|| {
            process::flush_c_streams();
            0
        })
        .succeeds();
        // SAFETY: an open stream, not used afterwards.
        unsafe { libc::fclose(stream) };
        let mut written = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut written).unwrap();
        assert_eq!(written, expected, "flushed: {flushed}");
    }
}

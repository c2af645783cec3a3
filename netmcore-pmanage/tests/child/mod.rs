//! Forked children of tests, and how to know that one waits.
//!
//! # Safety
//!
//! The only unsafe call is the fork, in a test process that has one thread.

#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use netmcore_sys::process::{self, ExitStatus, Forked, Pid, PidFd};
use netmcore_sys::signal::SIGKILL;

pub struct Child {
    pub pid: Pid,
    pub pidfd: PidFd,
}

impl Child {
    /// Forks a child that runs `body` and exits with code 0, or 101 if that panics.
    pub fn fork(body: impl FnOnce()) -> Child {
        // SAFETY: the child leaves by `exit_now`, below, and drops nothing of its parent's before.
        match unsafe { process::fork() }.expect("a fork") {
            Forked::Child => {
                let ran = catch_unwind(AssertUnwindSafe(body));
                process::exit_now(if ran.is_ok() { 0 } else { 101 })
            }
            Forked::Parent(pid) => {
                let pidfd = PidFd::open(pid).expect("a pidfd of a child");
                Child { pid, pidfd }
            }
        }
    }

    pub fn wait(self) -> ExitStatus {
        self.pidfd.wait().expect("the child's status")
    }

    /// Waits for the end, which must be an exit with code 0.
    #[track_caller]
    pub fn succeeds(self) {
        assert_eq!(self.wait(), ExitStatus::Exited { code: 0 });
    }

    /// Kills and reaps it.
    pub fn kill(self) {
        self.pidfd.send_signal(SIGKILL).expect("a kill");
        self.wait();
    }
}

/// Waits until the process has the record open more often than that: what we open, we lock next. (We ask again
/// and again for the lock, so the kernel lists no waiter.)
pub fn wait_for_an_opener(record: &Path, pid: Pid, already: usize) {
    let record = record.canonicalize().unwrap();
    let started = Instant::now();
    let open = || {
        fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| *target == record)
            .count()
    };
    while open() <= already {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "nobody opens the record"
        );
        thread::yield_now();
    }
}

/// Waits until some process waits for a lock on the record: the kernel lists it with an arrow.
pub fn wait_for_a_waiter(record: &File) {
    let inode = format!(":{} ", record.metadata().unwrap().ino());
    let started = Instant::now();
    loop {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        if locks
            .lines()
            .any(|line| line.contains("->") && line.contains(&inode))
        {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "nobody waits:\n{locks}"
        );
        thread::yield_now();
    }
}

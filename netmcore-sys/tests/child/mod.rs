//! Child processes of tests: forked, told what to do through a socket, waited for.
//!
//! # Safety
//!
//! `fork` refuses a process with threads, and the child leaves by `exit_now`.

#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use netmcore_sys::futex::Deadline;
use netmcore_sys::poll;
use netmcore_sys::process::{self, ExitStatus, Forked, Pid, PidFd};
use netmcore_sys::socket;

/// What a child exits with when it panicked; the message is in the test's output.
pub const PANICKED: i32 = 101;

/// A forked child.
pub struct Child {
    pub pid: Pid,
    pub pidfd: PidFd,
}

impl Child {
    /// Forks a child that runs `body` and exits with what that returns. What `body` owns is dropped in the parent, too:
    /// let it borrow.
    pub fn fork(body: impl FnOnce() -> i32) -> Child {
        // SAFETY: the child leaves by `exit_now`, below, and drops nothing of the parent's before.
        match unsafe { process::fork() }.expect("a fork") {
            Forked::Child => {
                let code = catch_unwind(AssertUnwindSafe(body)).unwrap_or(PANICKED);
                process::exit_now(code)
            }
            Forked::Parent(pid) => {
                let pidfd = PidFd::open(pid).expect("a pidfd of a child");
                Child { pid, pidfd }
            }
        }
    }

    /// Waits for the end, which must be an exit with code 0.
    #[track_caller]
    pub fn succeeds(self) {
        let status = self.pidfd.wait().expect("the child's status");
        assert_eq!(status, ExitStatus::Exited { code: 0 });
    }

    /// Kills and reaps it.
    pub fn kill(self) {
        self.pidfd
            .send_signal(netmcore_sys::signal::SIGKILL)
            .expect("a kill");
        self.pidfd.wait().expect("the child's status");
    }
}

/// A deadline that a working system meets by far.
pub fn soon() -> Option<Deadline> {
    Some(Deadline::after(Duration::from_secs(20)))
}

/// A deadline that has passed: for looking without waiting.
pub fn now() -> Option<Deadline> {
    Some(Deadline::after(Duration::ZERO))
}

/// Waits until `other`, child or not, has ended; false if it has not soon.
pub fn ends(other: &PidFd) -> bool {
    poll::wait_readable(other, soon()).expect("a wait")
}

/// A socket pair for telling each other things, one process at each end.
pub fn line() -> (OwnedFd, OwnedFd) {
    socket::stream_pair().expect("a socket pair")
}

/// Says a number to the other side.
pub fn say(line: &OwnedFd, number: i32) {
    let heard = socket::send_all(line, &number.to_ne_bytes()).expect("a send");
    assert!(heard, "nobody is at the other end");
}

/// Waits for a number; `None` if the other side is gone.
pub fn hear(line: &OwnedFd) -> Option<i32> {
    let mut bytes = [0; 4];
    match socket::receive(line, &mut bytes).expect("a receive") {
        0 => None,
        4 => Some(i32::from_ne_bytes(bytes)),
        len_bytes => panic!("{len_bytes} bytes of 4"),
    }
}

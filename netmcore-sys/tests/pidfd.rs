//! Guards against a supervisor that reaps its host's children, misses the end of its own, or spins on the pidfd of one
//! that is long gone.
//!
//! # Safety
//!
//! The handler uses atomics and `write`; the C structures are plain data that may be zero.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::process::Command;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::{mem, ptr};

use child::{Child, hear, line, now, soon};
use netmcore_sys::error::Errno;
use netmcore_sys::poll::{self, Epoll, EventFd, Interest};
use netmcore_sys::process::{self, ExitStatus, PidFd};
use netmcore_sys::signal::{self, SIGCHLD, SIGCONT, SIGKILL, SIGSTOP, SIGTERM};
use std::os::fd::{AsFd, AsRawFd};

netmcore_forktest::forktests!(
    pidfd_becomes_readable_at_the_end_and_tells_how,
    pidfd_of_a_stopped_child_is_not_readable,
    reaping_one_child_leaves_the_hosts_others,
    reaped_child_is_reaped_no_more,
    ignored_sigchld_loses_the_status,
    pidfd_closed_in_an_epoll_fires_for_ever_while_a_sibling_has_a_copy,
    pidfd_removed_before_its_close_is_silent,
    waits_go_on_after_interruptions,
);

fn pidfd_becomes_readable_at_the_end_and_tells_how() {
    let (ours, childs) = line();
    let child = Child::fork(|| hear(&childs).unwrap());
    let epoll = Epoll::new().unwrap();
    epoll.add(&child.pidfd, 42, Interest::Read).unwrap();
    let mut events = Vec::new();
    epoll.wait(&mut events, now()).unwrap();
    assert_eq!(events, []);
    assert_eq!(child.pidfd.wait_nonblocking().unwrap(), None);

    child::say(&ours, 7);
    epoll.wait(&mut events, soon()).unwrap();
    assert_eq!(events.len(), 1);
    assert!(events[0].readable && events[0].token == 42, "{events:?}");
    assert!(process::is_zombie(child.pid).unwrap());
    assert_eq!(
        child.pidfd.wait_nonblocking().unwrap(),
        Some(ExitStatus::Exited { code: 7 })
    );

    let killed = Child::fork(|| {
        loop {
            hear(&childs);
        }
    });
    killed.pidfd.send_signal(SIGTERM).unwrap();
    let by_signal = ExitStatus::Signaled {
        signal: SIGTERM,
        core_dumped: false,
    };
    assert_eq!(killed.pidfd.wait().unwrap(), by_signal);
}

fn pidfd_of_a_stopped_child_is_not_readable() {
    let (ours, childs) = line();
    let child = Child::fork(|| hear(&childs).unwrap());
    child.pidfd.send_signal(SIGSTOP).unwrap();
    // WNOWAIT leaves the report; it says that the stop has happened.
    let mut info = mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the structure is of this frame.
    let failed = unsafe {
        let pid = child.pid.get() as libc::id_t;
        libc::waitid(
            libc::P_PID,
            pid,
            info.as_mut_ptr(),
            libc::WSTOPPED | libc::WNOWAIT,
        )
    };
    assert_eq!(failed, 0);
    assert!(!poll::wait_readable(&child.pidfd, now()).unwrap());
    assert_eq!(child.pidfd.wait_nonblocking().unwrap(), None);
    child.pidfd.send_signal(SIGCONT).unwrap();
    child::say(&ours, 0);
    child.succeeds();
}

fn reaping_one_child_leaves_the_hosts_others() {
    let mut program = Command::new("true").spawn().unwrap();
    let mut other = Command::new("sh").args(["-c", "exit 5"]).spawn().unwrap();
    let child = Child::fork(|| 3);
    assert_eq!(child.pidfd.wait().unwrap(), ExitStatus::Exited { code: 3 });
    assert!(program.wait().unwrap().success());
    assert_eq!(other.wait().unwrap().code(), Some(5));
}

fn reaped_child_is_reaped_no_more() {
    let child = Child::fork(|| 0);
    assert!(child.pidfd.wait().unwrap().is_success());
    assert_eq!(child.pidfd.wait().unwrap_err().errno, Errno::ECHILD);
    assert_eq!(
        child.pidfd.wait_nonblocking().unwrap_err().errno,
        Errno::ECHILD
    );
    assert_eq!(
        child.pidfd.send_signal(SIGKILL).unwrap_err().errno,
        Errno::ESRCH
    );
    assert_eq!(process::kill(child.pid, 0).unwrap_err().errno, Errno::ESRCH);
    assert_eq!(PidFd::open(child.pid).unwrap_err().errno, Errno::ESRCH);
}

fn ignored_sigchld_loses_the_status() {
    let saved = signal::set_ignore(SIGCHLD).unwrap();
    assert!(saved.is_default());
    let (ours, childs) = line();
    let child = Child::fork(|| hear(&childs).unwrap());
    child::say(&ours, 3);
    assert_eq!(child.pidfd.wait().unwrap_err().errno, Errno::ECHILD);

    assert!(signal::set_default(SIGCHLD).unwrap().is_ignored());
    assert_eq!(
        Child::fork(|| 3).pidfd.wait().unwrap(),
        ExitStatus::Exited { code: 3 }
    );
}

fn pidfd_closed_in_an_epoll_fires_for_ever_while_a_sibling_has_a_copy() {
    let epoll = Epoll::new().unwrap();
    let child = Child::fork(|| 0);
    epoll.add(&child.pidfd, 1, Interest::Read).unwrap();
    let (_ours, siblings) = line();
    let sibling = Child::fork(|| {
        hear(&siblings);
        0
    });

    child.succeeds(); // reaps, and closes the pidfd
    let mut events = Vec::new();
    for round in 0..10 {
        epoll.wait(&mut events, soon()).unwrap();
        assert_eq!(events.len(), 1, "round {round}");
        assert_eq!(events[0].token, 1);
    }

    // Only the end of the copy ends it.
    sibling.kill();
    epoll.wait(&mut events, now()).unwrap();
    assert_eq!(events, []);
}

fn pidfd_removed_before_its_close_is_silent() {
    let epoll = Epoll::new().unwrap();
    let child = Child::fork(|| 0);
    epoll.add(&child.pidfd, 1, Interest::Read).unwrap();
    let (_ours, siblings) = line();
    let sibling = Child::fork(|| {
        hear(&siblings);
        0
    });

    let mut events = Vec::new();
    epoll.wait(&mut events, soon()).unwrap();
    assert_eq!(events.len(), 1);
    epoll.remove(&child.pidfd).unwrap();
    child.succeeds();
    epoll.wait(&mut events, now()).unwrap();
    assert_eq!(events, []);
    sibling.kill();
}

/// What the handler rings at the third interruption, so that a wait that gives up earlier is found out.
static BELL: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTIONS: AtomicU32 = AtomicU32::new(0);

extern "C" fn ring_at_the_third(_signal: i32) {
    if INTERRUPTIONS.fetch_add(1, Ordering::SeqCst) == 2 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes of this frame to an eventfd that stays open.
        unsafe { libc::write(BELL.load(Ordering::SeqCst), one.as_ptr().cast(), one.len()) };
    }
}

fn waits_go_on_after_interruptions() {
    let bell = EventFd::new().unwrap();
    BELL.store(bell.as_fd().as_raw_fd(), Ordering::SeqCst);
    // By libc: without SA_RESTART, so that every call is interrupted.
    // SAFETY: the handler uses atomics and `write`; the other fields may be zero.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = ring_at_the_third as *const () as libc::sighandler_t;
        assert_eq!(libc::sigaction(libc::SIGALRM, &action, ptr::null_mut()), 0);
    }
    let interval_us = |tv_usec| {
        let interval = libc::timeval { tv_sec: 0, tv_usec };
        let timer = libc::itimerval {
            it_interval: interval,
            it_value: interval,
        };
        // SAFETY: a structure of this frame.
        let failed = unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) };
        assert_eq!(failed, 0);
    };

    let epoll = Epoll::new().unwrap();
    epoll.add(&bell, 1, Interest::Read).unwrap();
    let child = Child::fork(|| {
        poll::wait_readable(&bell, soon()).unwrap();
        0
    });
    let interrupted = |wait: &mut dyn FnMut()| {
        bell.drain().unwrap();
        INTERRUPTIONS.store(0, Ordering::SeqCst);
        interval_us(2000);
        wait();
        interval_us(0);
        assert!(
            INTERRUPTIONS.load(Ordering::SeqCst) >= 3,
            "the wait gave up early"
        );
    };
    interrupted(&mut || assert!(child.pidfd.wait().unwrap().is_success()));
    interrupted(&mut || {
        let mut events = Vec::new();
        epoll.wait(&mut events, None).unwrap();
        assert_eq!(events.len(), 1);
    });
    interrupted(&mut || assert!(poll::wait_readable(&bell, None).unwrap()));
}

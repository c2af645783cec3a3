//! Guards against orphans: children that go on working when their parent was killed.
//!
//! # Safety
//!
//! The child of a forking thread makes system calls only; `prctl` writes to a variable of the frame.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::mem;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use child::{Child, ends, hear, line, now, say};
use netmcore_sys::error::Errno;
use netmcore_sys::poll;
use netmcore_sys::process::{self, ExitStatus, Pid, PidFd};
use netmcore_sys::signal::{SIGKILL, SIGTERM};

netmcore_forktest::forktests!(
    child_dies_with_its_killed_parent,
    parent_that_died_before_is_detected,
    death_signal_is_not_inherited,
    death_signal_comes_when_the_forking_thread_ends,
    command_dies_with_its_killed_parent,
    command_lives_as_long_as_its_parent,
    command_configured_in_another_process_does_not_start,
    no_signal_is_refused,
);

fn child_dies_with_its_killed_parent() {
    for signal in [SIGKILL, SIGTERM] {
        let (ours, theirs) = line();
        let parent = Child::fork(|| {
            let parent = Pid::this();
            let child = Child::fork(|| {
                assert!(process::die_with_parent(parent, signal).unwrap());
                say(&theirs, Pid::this().get());
                loop {
                    hear(&theirs);
                }
            });
            child.pidfd.wait().unwrap();
            1
        });
        let child = PidFd::open(Pid::new(hear(&ours).unwrap()).unwrap()).unwrap();
        assert!(!poll::wait_readable(&child, now()).unwrap());
        parent.kill();
        assert!(ends(&child), "signal {signal}");
    }
}

fn parent_that_died_before_is_detected() {
    let (ours, theirs) = line();
    let parent = Child::fork(|| {
        let parent = Pid::this();
        let parent_fd = PidFd::open(parent).unwrap();
        mem::forget(Child::fork(|| {
            assert!(ends(&parent_fd));
            let is_there = process::die_with_parent(parent, SIGKILL).unwrap();
            say(&theirs, i32::from(is_there));
            0
        }));
        0
    });
    parent.succeeds();
    drop(theirs);
    assert_eq!(
        hear(&ours),
        Some(0),
        "the child was told that its parent still is there"
    );
}

fn death_signal_of_this_process() -> i32 {
    let mut signal = -1;
    // SAFETY: the kernel writes one integer of this frame.
    let failed = unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &mut signal) };
    assert_eq!(failed, 0);
    signal
}

fn death_signal_is_not_inherited() {
    let this = Pid::this();
    Child::fork(|| {
        assert!(process::die_with_parent(this, SIGKILL).unwrap());
        assert_eq!(death_signal_of_this_process(), SIGKILL);
        Child::fork(death_signal_of_this_process).succeeds();
        0
    })
    .succeeds();
}

/// Why a supervisor forks from a thread that stays.
fn death_signal_comes_when_the_forking_thread_ends() {
    let this = Pid::this();
    let (ours, theirs) = line();
    let (end, ended) = mpsc::channel::<()>();
    let forking = thread::spawn(move || {
        // SAFETY: the child makes system calls only, as the child of a threaded process must.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let is_there = process::die_with_parent(this, SIGKILL).unwrap_or(false);
            say(&theirs, i32::from(is_there));
            loop {
                hear(&theirs);
            }
        }
        ended.recv().unwrap_err();
        Pid::new(pid).unwrap()
    });
    assert_eq!(hear(&ours), Some(1));
    drop(end);
    let child = PidFd::open(forking.join().unwrap()).unwrap();
    assert!(ends(&child));
    let killed = ExitStatus::Signaled {
        signal: SIGKILL,
        core_dumped: false,
    };
    assert_eq!(child.wait().unwrap(), killed);
}

/// A program that does nothing for longer than the test takes.
fn sleeping_program() -> Command {
    let mut command = Command::new("sleep");
    command.arg("600");
    process::command_dies_with_parent(&mut command);
    command
}

fn command_dies_with_its_killed_parent() {
    let (ours, theirs) = line();
    let parent = Child::fork(|| {
        let mut program = sleeping_program().spawn().unwrap();
        say(&theirs, program.id() as i32);
        program.wait().unwrap();
        1
    });
    let program = PidFd::open(Pid::new(hear(&ours).unwrap()).unwrap()).unwrap();
    assert!(!poll::wait_readable(&program, now()).unwrap());
    parent.kill();
    assert!(ends(&program));
}

fn command_lives_as_long_as_its_parent() {
    let mut program = sleeping_program().spawn().unwrap();
    assert_eq!(program.try_wait().unwrap(), None);
    program.kill().unwrap();
    program.wait().unwrap();
}

fn command_configured_in_another_process_does_not_start() {
    let mut command = sleeping_program();
    Child::fork(|| {
        let error = command.spawn().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ESRCH.raw()));
        0
    })
    .succeeds();
}

fn no_signal_is_refused() {
    let error = process::die_with_parent(Pid::this(), 65).unwrap_err();
    assert_eq!(error.errno, Errno::EINVAL);
}

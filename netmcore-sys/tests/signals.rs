//! Guards against signals that are lost, taken by the wrong process, or passed on to programs that did not ask.
//!
//! # Safety
//!
//! The handler stores to an atomic.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use child::{Child, now, soon};
use netmcore_sys::poll::{Epoll, Interest};
use netmcore_sys::process::{self, ExitStatus, Pid};
use netmcore_sys::signal::{self, SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SignalFd, SignalSet};

netmcore_forktest::forktests!(
    signalfd_gives_blocked_signals_with_their_senders,
    signalfd_tells_of_ended_children,
    signalfd_read_by_a_child_gives_the_childs_signals,
    handler_is_called_and_restored,
    empty_handler_survives_and_programs_do_not,
    ignored_signal_is_ignored_by_programs_too,
    mask_is_inherited_and_reset,
    default_effect_happens_despite_handler_and_mask,
);

fn signalfd_gives_blocked_signals_with_their_senders() {
    let set = SignalSet::empty().with(SIGUSR1).with(SIGUSR2);
    signal::block(&set).unwrap();
    let signals = SignalFd::new(&set).unwrap();
    let epoll = Epoll::new().unwrap();
    epoll.add(&signals, 5, Interest::Read).unwrap();
    let mut events = Vec::new();
    assert_eq!(signals.read_nonblocking().unwrap(), None);
    epoll.wait(&mut events, now()).unwrap();
    assert_eq!(events, []);

    let this = Pid::this();
    Child::fork(|| {
        process::kill(this, SIGUSR2).unwrap();
        process::kill(this, SIGUSR2).unwrap();
        0
    })
    .succeeds();
    epoll.wait(&mut events, soon()).unwrap();
    assert_eq!(events[0].token, 5);
    let info = signals.read_nonblocking().unwrap().unwrap();
    assert_eq!(info.signal, SIGUSR2);
    assert_eq!(info.uid, process::effective_uid());
    assert!(info.pid.is_some_and(|sender| sender != this));
    assert_eq!(
        signals.read_nonblocking().unwrap(),
        None,
        "two that came before one read are one"
    );

    process::kill(this, SIGUSR1).unwrap();
    assert_eq!(signals.read_nonblocking().unwrap().unwrap().pid, Some(this));
}

fn signalfd_tells_of_ended_children() {
    let set = SignalSet::empty().with(SIGCHLD);
    signal::block(&set).unwrap();
    let signals = SignalFd::new(&set).unwrap();
    let child = Child::fork(|| 0);
    let epoll = Epoll::new().unwrap();
    epoll.add(&signals, 0, Interest::Read).unwrap();
    let mut events = Vec::new();
    epoll.wait(&mut events, soon()).unwrap();
    assert_eq!(events.len(), 1);
    let info = signals.read_nonblocking().unwrap().unwrap();
    assert_eq!((info.signal, info.pid), (SIGCHLD, Some(child.pid)));
    child.succeeds();
}

/// Why a child must not use its parent's epoll for signals.
fn signalfd_read_by_a_child_gives_the_childs_signals() {
    let set = SignalSet::empty().with(SIGUSR1);
    signal::block(&set).unwrap();
    let signals = SignalFd::new(&set).unwrap();
    let epoll = Epoll::new().unwrap();
    epoll.add(&signals, 0, Interest::Read).unwrap();
    Child::fork(|| {
        signal::raise(SIGUSR1).unwrap();
        let mut events = Vec::new();
        epoll.wait(&mut events, now()).unwrap();
        assert_eq!(events, [], "the parent registered it, and has no signal");
        assert_eq!(signals.read_nonblocking().unwrap().unwrap().signal, SIGUSR1);
        0
    })
    .succeeds();
    assert_eq!(signals.read_nonblocking().unwrap(), None);
}

static LAST: AtomicI32 = AtomicI32::new(0);

extern "C" fn remember(signal: i32) {
    LAST.store(signal, Ordering::SeqCst);
}

fn handler_is_called_and_restored() {
    // SAFETY: the handler makes one store.
    let saved = unsafe { signal::set_handler(SIGUSR1, remember) }.unwrap();
    assert!(saved.is_default());
    signal::raise(SIGUSR1).unwrap();
    assert_eq!(LAST.swap(0, Ordering::SeqCst), SIGUSR1);

    let ours = signal::set_ignore(SIGUSR1).unwrap();
    assert!(!ours.is_default() && !ours.is_ignored());
    signal::raise(SIGUSR1).unwrap();
    assert_eq!(LAST.load(Ordering::SeqCst), 0);

    signal::restore(SIGUSR1, &ours).unwrap();
    signal::raise(SIGUSR1).unwrap();
    assert_eq!(LAST.load(Ordering::SeqCst), SIGUSR1);
    signal::restore(SIGUSR1, &saved).unwrap();
    assert!(signal::action(SIGUSR1).unwrap().is_default());
}

/// How a shell ends that interrupts itself and, if it survives, exits with 4.
fn interrupted_shell() -> std::process::ExitStatus {
    Command::new("sh")
        .args(["-c", "kill -INT $$; exit 4"])
        .status()
        .unwrap()
}

fn empty_handler_survives_and_programs_do_not() {
    signal::set_empty_handler(SIGINT).unwrap();
    signal::raise(SIGINT).unwrap();
    assert_eq!(interrupted_shell().signal(), Some(SIGINT));
}

fn ignored_signal_is_ignored_by_programs_too() {
    signal::set_ignore(SIGINT).unwrap();
    signal::raise(SIGINT).unwrap();
    assert_eq!(interrupted_shell().code(), Some(4));
}

fn mask_is_inherited_and_reset() {
    let set = SignalSet::empty().with(SIGTERM).with(SIGUSR1);
    let before = signal::set_mask(&set).unwrap();
    Child::fork(|| {
        assert_eq!(signal::mask().unwrap(), set);
        signal::raise(SIGUSR1).unwrap();
        // SAFETY: the handler makes one store.
        unsafe { signal::set_handler(SIGUSR1, remember) }.unwrap();
        assert_eq!(signal::unblock_all().unwrap(), set);
        assert_eq!(LAST.load(Ordering::SeqCst), SIGUSR1, "delivered on the way");
        assert_eq!(signal::mask().unwrap(), SignalSet::empty());
        0
    })
    .succeeds();
    signal::set_mask(&before).unwrap();
}

fn default_effect_happens_despite_handler_and_mask() {
    let child = Child::fork(|| {
        signal::set_empty_handler(SIGTERM).unwrap();
        signal::block(&SignalSet::all()).unwrap();
        signal::raise_default(SIGCHLD).unwrap();
        signal::raise_default(SIGTERM).unwrap();
        0
    });
    let killed = ExitStatus::Signaled {
        signal: SIGTERM,
        core_dumped: false,
    };
    assert_eq!(child.pidfd.wait().unwrap(), killed);
    let killed = ExitStatus::Signaled {
        signal: signal::SIGKILL,
        core_dumped: false,
    };
    let child = Child::fork(|| {
        signal::raise_default(signal::SIGKILL).unwrap();
        0
    });
    assert_eq!(child.pidfd.wait().unwrap(), killed);
}

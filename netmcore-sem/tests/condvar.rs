//! Guards against a waiter that sleeps for ever: the notification was lost, or went to one that is dead, or its sender is.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.
//!
//! # Safety
//!
//! Shared memory is mapped for ever and starts as zeros, which are free locks and valid numbers. Three calls of the C library, which take numbers
//! only, fork beside a thread that sleeps, set a filter of system calls for a child, and end it.

#![allow(unsafe_code)]

#[path = "support/crowd.rs"]
mod crowd;
mod support;

use crowd::{Crowd, sleeping, zeroed};
use netmcore_sem::condvar::CondvarPoll;
use netmcore_sem::current::uninstall;
use netmcore_sem::{ErrorChecking, ShmCondvar, ShmMutex, WaitEnd};
use netmcore_sys::crash;
use netmcore_sys::futex::Deadline;
use netmcore_sys::poll::wait_readable;
use netmcore_sys::process::{ExitStatus, Pid, PidFd, exit_now, thread_count};
use std::collections::BTreeSet;
use std::ffi::{c_int, c_long};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Child, PATIENCE, fork, wait_until};

const VICTIM: u32 = 1;

/// All in one page, zeros at first.
#[repr(C)]
struct Shared {
    /// How many may be taken.
    tokens: ShmMutex<u64>,
    more: ShmCondvar,
    checking: ShmMutex<u64, ErrorChecking>,
    stop: AtomicU32,
    waiting: AtomicU64,
    taken: AtomicU64,
    told: AtomicU64,
    progress: [AtomicU64; 16],
}

fn shared() -> &'static Shared {
    // SAFETY: zeros are free mutexes around zeros, a condvar, and zeros.
    unsafe { zeroed() }
}

/// The number is one word: it is well, whoever died.
fn lock(shared: &Shared) -> netmcore_sem::ShmMutexGuard<'_, u64> {
    shared.tokens.lock().unwrap_or_else(|died| {
        shared.told.fetch_add(1, Ordering::SeqCst);
        died.guard
    })
}

/// Takes a token, or finds that all is over.
fn take(shared: &Shared) {
    let mut guard = lock(shared);
    shared.waiting.fetch_add(1, Ordering::SeqCst);
    while *guard == 0 && shared.stop.load(Ordering::SeqCst) == 0 {
        guard = shared.more.wait(guard).unwrap_or_else(|died| {
            shared.told.fetch_add(1, Ordering::SeqCst);
            died.guard
        });
    }
    shared.waiting.fetch_sub(1, Ordering::SeqCst);
    if *guard > 0 {
        *guard -= 1;
        shared.taken.fetch_add(1, Ordering::SeqCst);
    }
}

fn put(shared: &Shared) {
    *lock(shared) += 1;
    shared.more.notify_one();
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// As many as are notified go on, in several processes.
fn notified_processes_go_on() {
    for is_supervised in [true, false] {
        if is_supervised {
            Crowd::install();
        } else {
            uninstall();
        }
        let shared = shared();
        let takers = [(); 3].map(|()| fork(|| take(shared)));
        takers.iter().for_each(sleeping);
        for _ in 0..3 {
            put(shared);
        }
        assert!(takers.iter().all(Child::ended_well));
        assert_eq!(shared.taken.load(Ordering::SeqCst), 3);
    }
}

/// Threads of several processes wait for one thing.
fn notify_all_reaches_threads_and_processes() {
    Crowd::install();
    let shared = shared();
    let waiters = [(); 3].map(|()| {
        fork(|| {
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| take(shared));
                }
            });
        })
    });
    wait_until("all wait", || shared.waiting.load(Ordering::SeqCst) == 9);
    let guard = lock(shared);
    shared.stop.store(1, Ordering::SeqCst);
    shared.more.notify_all();
    drop(guard);
    assert!(waiters.iter().all(Child::ended_well));
}

/// With a deadline, the wait ends then, and says so; not before, unless it says that it is for something else.
fn deadline_ends_the_wait_and_says_so() {
    Crowd::install();
    let shared = shared();
    let deadline = Instant::now() + Duration::from_millis(30);
    let (guard, end) = shared.more.wait_deadline(lock(shared), deadline).unwrap();
    assert_eq!(end, WaitEnd::TimedOut, "nobody else is there");
    assert!(Instant::now() >= deadline);
    let (guard, end) = shared.more.wait_deadline(guard, deadline).unwrap();
    assert!(end.is_timed_out(), "in the past");
    let deadline = Instant::now() + Duration::from_millis(30);
    let end = |guard| {
        shared
            .more
            .wait_while_deadline(guard, deadline, |count| *count == 0)
    };
    let (mut guard, timed_out) = end(guard).unwrap();
    assert!(timed_out.is_timed_out() && Instant::now() >= deadline);
    *guard = 1;
    let (guard, woken) = end(guard).unwrap();
    assert_eq!(woken, WaitEnd::Woken, "there was nothing to wait for");
    drop(guard);
    let putter = fork(|| {
        wait_until("the parent waits", || shared.tokens.owner().is_none());
        put(shared);
    });
    let (guard, end) = shared
        .more
        .wait_while_deadline(lock(shared), soon(), |count| *count < 2)
        .unwrap();
    assert_eq!((*guard, end), (2, WaitEnd::Woken));
    drop(guard);
    assert!(putter.ended_well());
    // Unsupervised, a wait ends early; but it does not say that it timed out.
    uninstall();
    let deadline = Instant::now() + Duration::from_millis(100);
    let mut guard = lock(shared);
    loop {
        let (again, end) = shared.more.wait_deadline(guard, deadline).unwrap();
        guard = again;
        if end.is_timed_out() {
            break;
        }
        assert!(Instant::now() < soon());
    }
    assert!(Instant::now() >= deadline);
}

/// The error-checking kind waits as the normal one: the lock is free meanwhile.
fn error_checking_mutex_is_free_during_the_wait() {
    Crowd::install();
    let shared = shared();
    let waiter = fork(|| {
        let guard = shared.checking.lock().unwrap();
        let guard = shared.more.wait_while(guard, |value| *value == 0).unwrap();
        assert_eq!(*guard, 4);
        assert!(shared.checking.lock().is_err(), "held again");
    });
    sleeping(&waiter);
    *shared.checking.lock().unwrap() = 4;
    shared.more.notify_one();
    assert!(waiter.ended_well());
}

/// A notifier is killed while it holds the mutex, having changed the condition: waiters are told.
fn holder_that_is_killed_ends_the_waits() {
    for is_supervised in [true, false] {
        let crowd = Crowd::install();
        if !is_supervised {
            uninstall();
        }
        let shared = shared();
        let waiters = [(); 2].map(|()| fork(|| take(shared)));
        waiters.iter().for_each(sleeping);
        let victim = fork(|| {
            let mut guard = lock(shared);
            *guard = 2;
            shared.progress[0].store(1, Ordering::SeqCst);
            // sleep: until it is killed.
            std::thread::sleep(PATIENCE);
        });
        // A waiter may have it for a moment, too: it is not asked who has it.
        wait_until("the victim holds it", || {
            shared.progress[0].load(Ordering::SeqCst) == 1
        });
        victim.kill();
        let killed = Instant::now();
        if is_supervised {
            assert!(!victim.ended_well());
            crowd.settle_death(victim.pid);
        }
        assert!(waiters.iter().all(Child::ended_well));
        eprintln!("all went on {:?} after the kill", killed.elapsed());
        assert!(killed.elapsed() < Duration::from_secs(5));
        // One found it taken by the dead, if it came through the death of the holder.
        assert!(shared.told.load(Ordering::SeqCst) == 1);
        if !is_supervised {
            assert!(!victim.ended_well());
        }
    }
}

/// A process that puts is killed at each point of it; two wait, and what was put is taken.
fn notifier_killed_at_any_point_loses_nothing() {
    let mut died_at = BTreeSet::new();
    for is_all in [false, true] {
        for k in 1.. {
            let crowd = Crowd::install();
            let shared = shared();
            let takers = [(); 2].map(|()| fork(|| take(shared)));
            takers.iter().for_each(sleeping);
            crash::arm_role(VICTIM, k);
            let victim = fork(|| {
                crash::set_role(VICTIM);
                *lock(shared) += 2;
                if is_all {
                    shared.more.notify_all();
                } else {
                    shared.more.notify_one();
                    shared.more.notify_one();
                }
            });
            let is_done = victim.ended_well();
            crash::disarm();
            if !is_done {
                died_at.extend(crash::died_at());
                crowd.settle_death(victim.pid);
                if shared.tokens.owner().is_some() || *lock(shared) == 0 {
                    // It was killed before it had put anything. The takers have looked, and wait again.
                    *lock(shared) = 2;
                    shared.more.notify_all();
                }
            }
            assert!(takers.iter().all(Child::ended_well));
            assert_eq!(shared.taken.load(Ordering::SeqCst), 2);
            if is_done {
                break;
            }
        }
    }
    for point in [
        "sem.word.locked",
        "sem.condvar.will_count_for_one",
        "sem.condvar.will_count_for_all",
        "sem.condvar.counted_for_one",
        "sem.condvar.counted_for_all",
        "sem.wait.counted_before_wake",
        "sem.wait.cleared_before_wake",
    ] {
        assert!(died_at.contains(point), "{point} is not in {died_at:?}");
    }
}

/// One of two that wait is killed at each point of its wait, the last with the only wake: the other gets the token.
fn waiter_killed_at_any_point_leaves_the_token_to_the_other() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let crowd = Crowd::install();
        let shared = shared();
        crash::arm_role(VICTIM, k);
        let victim = fork(|| {
            crash::set_role(VICTIM);
            take(shared);
        });
        // It sleeps first, so that it is woken first; or is dead already.
        let sleeps_or_is_dead = || {
            crash::died_at().is_some()
                || (shared.waiting.load(Ordering::SeqCst) == 1
                    && shared.tokens.owner().is_none()
                    && sleeps(&victim))
        };
        wait_until("the victim sleeps", sleeps_or_is_dead);
        let is_dead = crash::died_at().is_some();
        if is_dead {
            assert!(!victim.ended_well());
            crowd.settle_death(victim.pid);
        }
        let taker = fork(|| take(shared));
        sleeping(&taker);
        put(shared);
        if !is_dead {
            let is_done = victim.ended_well();
            if is_done {
                crash::disarm();
                put(shared);
                assert!(taker.ended_well());
                break;
            }
            crowd.settle_death(victim.pid);
        }
        let taken_by_the_dead = shared.taken.load(Ordering::SeqCst) == 1;
        died_at.extend(crash::died_at());
        if taken_by_the_dead && lock(shared).eq(&0) {
            put(shared);
        }
        assert!(taker.ended_well(), "after {died_at:?}");
    }
    crash::disarm();
    for point in [
        "sem.condvar.unlocked",
        "sem.wait.announced",
        "sem.wait.woken",
        "sem.wait.gained",
        "sem.condvar.woken",
    ] {
        assert!(died_at.contains(point), "{point} is not in {died_at:?}");
    }
}

fn sleeps(child: &Child) -> bool {
    let read = |what: &str| std::fs::read_to_string(format!("/proc/{}/{what}", child.pid.get()));
    read("syscall").is_ok_and(|call| call.starts_with("449 ") || call.starts_with("202 "))
        && read("stat").is_ok_and(|state| state.contains(") S "))
}

/// The descriptor becomes readable by what other processes do, as often as it is armed.
fn poll_handle_is_readable_once_notified_since_it_was_armed() {
    let crowd = Crowd::install();
    let shared = shared();
    let (begin, notify) = (&shared.progress[0], &shared.progress[1]);
    let notifier = fork(|| {
        for round in 1..=20 {
            wait_until("it is armed", || begin.load(Ordering::SeqCst) == round);
            *lock(shared) += 1;
            match round % 2 {
                0 => shared.more.notify_one(),
                _ => shared.more.notify_all(),
            }
            notify.store(round, Ordering::SeqCst);
        }
    });
    let victim = fork(|| {
        let _guard = shared.checking.lock().unwrap();
        // sleep: until it is killed.
        std::thread::sleep(PATIENCE);
    });
    wait_until("the victim holds it", || shared.checking.owner().is_some());
    let poll = shared.more.poll_handle().unwrap();
    for round in 1..=20 {
        assert!(!is_readable(&poll, None), "nobody has notified");
        begin.store(round, Ordering::SeqCst);
        assert!(is_readable(&poll, Some(PATIENCE)));
        assert!(poll.is_ready());
        assert!(is_readable(&poll, None), "until it is armed");
        wait_until("it has notified", || notify.load(Ordering::SeqCst) == round);
        let guard = lock(shared);
        assert_eq!(*guard, round);
        assert!(poll.arm());
    }
    assert!(notifier.ended_well());
    // Armed again without having been looked at: nothing changes.
    assert!(!poll.arm());
    assert!(!is_readable(&poll, None));
    victim.kill();
    assert!(!victim.ended_well());
    crowd.settle_death(victim.pid);
    assert!(is_readable(&poll, Some(PATIENCE)), "somebody has died");
    drop(poll);
    wait_until("its thread is gone", || thread_count().unwrap() == 1);
}

fn is_readable(poll: &CondvarPoll, patience: Option<Duration>) -> bool {
    let deadline = Deadline::after(patience.unwrap_or_default());
    wait_readable(poll.as_fd(), Some(deadline)).unwrap()
}

/// Without a supervisor it becomes readable by itself, for who may have died.
fn poll_handle_of_strangers_is_readable_after_a_while() {
    uninstall();
    let shared = shared();
    let poll = shared.more.poll_handle().unwrap();
    assert!(is_readable(&poll, Some(PATIENCE)));
    poll.arm();
    assert!(is_readable(&poll, Some(PATIENCE)));
}

/// How a process with a handle, which may have got the notification, leaves it to others.
#[derive(Clone, Copy, PartialEq)]
enum Leaving {
    DropRung,
    Drop,
    Arm,
}

/// A handle takes a notification and is dropped, or armed anew, before anybody looks: another waiter gets it.
fn poll_handle_that_is_not_looked_at_passes_the_notification_on() {
    Crowd::install();
    for leaving in [Leaving::DropRung, Leaving::Drop, Leaving::Arm] {
        let shared = shared();
        let [sleeps, notified] = [0, 1].map(|number| &shared.progress[number]);
        let poller = fork(|| {
            let poll = shared.more.poll_handle().unwrap();
            let helper = helper();
            wait_until("the helper sleeps", || {
                let call = std::fs::read_to_string(format!("/proc/self/task/{helper}/syscall"));
                call.is_ok_and(|call| call.starts_with("449 ") || call.starts_with("202 "))
            });
            sleeps.store(1, Ordering::SeqCst);
            wait_until("notified", || notified.load(Ordering::SeqCst) == 1);
            match leaving {
                Leaving::DropRung => assert!(is_readable(&poll, Some(PATIENCE))),
                Leaving::Drop => {}
                Leaving::Arm => {
                    // Before the helper has run, most of the time.
                    put(shared);
                    // If this handle has it, in time or passed on to itself, it leaves it to others.
                    let has_it = std::cell::Cell::new(poll.arm());
                    wait_until("the taker has it", || {
                        if has_it.take() || (is_readable(&poll, None) && poll.arm()) {
                            put(shared);
                        }
                        shared.taken.load(Ordering::SeqCst) == 1
                    });
                }
            }
            drop(poll);
        });
        wait_until("the helper sleeps", || sleeps.load(Ordering::SeqCst) == 1);
        let taker = fork(|| take(shared));
        sleeping(&taker);
        // The helper has slept longest, so it is woken.
        if leaving != Leaving::Arm {
            put(shared);
        }
        notified.store(1, Ordering::SeqCst);
        assert!(poller.ended_well());
        assert!(taker.ended_well());
    }
}

/// The thread of this process that is not the first.
fn helper() -> String {
    let me = Pid::this().get().to_string();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut names = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    names.find(|name| *name != me).unwrap()
}

/// In a forked child the handle's copy is inert: it rings nothing, disturbs nothing, and gives back its descriptor.
fn forked_copy_of_a_poll_handle_is_inert() {
    Crowd::install();
    let shared = shared();
    let mut poll = Some(shared.more.poll_handle().unwrap());
    shared.more.notify_one();
    assert!(is_readable(poll.as_ref().unwrap(), Some(PATIENCE)));
    let in_child = || {
        let poll = poll.take().unwrap();
        assert!(!poll.is_ready());
        let armed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| poll.arm()));
        assert!(armed.is_err());
        let fd = poll.as_raw_fd();
        let is_open = || std::fs::exists(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(is_open());
        drop(poll);
        assert!(!is_open());
        // Its own handle works, and not by the parent's.
        let own = shared.more.poll_handle().unwrap();
        assert!(!is_readable(&own, None));
        shared.more.notify_all();
        assert!(is_readable(&own, Some(PATIENCE)));
    };
    unsafe extern "C" {
        fn fork() -> c_int;
    }
    // SAFETY: the other thread sleeps, and holds nothing that the child uses.
    match unsafe { fork() } {
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(in_child));
            exit_now(i32::from(done.is_err()))
        }
        pid => {
            let child = PidFd::open(Pid::new(pid).unwrap()).unwrap();
            let ended = || child.wait_nonblocking().unwrap();
            let mut status = None;
            let deadline = soon();
            while status.is_none() && Instant::now() < deadline {
                status = ended();
            }
            assert_eq!(status, Some(ExitStatus::Exited { code: 0 }));
        }
    }
    let poll = poll.unwrap();
    assert!(poll.is_ready() && is_readable(&poll, None));
    poll.arm();
    assert!(!is_readable(&poll, None));
    put(shared);
    assert!(is_readable(&poll, Some(PATIENCE)));
}

/// Locking and unlocking, and notifying, make no system call while nobody waits: one would kill the child.
fn uncontended_operations_make_no_system_call() {
    const PR_SET_SECCOMP: c_int = 22;
    const SECCOMP_MODE_STRICT: usize = 1;
    let Some(sys_exit) = (match std::env::consts::ARCH {
        "x86_64" => Some(60),
        "aarch64" | "riscv64" => Some(93),
        _ => None,
    }) else {
        netmcore_forktest::skip("the number of exit is not known for this processor");
    };
    unsafe extern "C" {
        fn prctl(option: c_int, ...) -> c_int;
        fn syscall(number: c_long, ...) -> c_long;
    }
    Crowd::install();
    let shared = shared();
    let recursive: ShmMutex<u64, netmcore_sem::Recursive> = 0.into();
    let pass = || {
        for _ in 0..1_000 {
            *shared.tokens.lock().unwrap() += 1;
            *shared.tokens.try_lock().unwrap().unwrap() += 1;
            *shared.checking.lock().unwrap() += 1;
            let _outer = recursive.lock().unwrap();
            let _inner = recursive.lock().unwrap();
            shared.more.notify_one();
            shared.more.notify_all();
        }
    };
    let child = fork(|| {
        // What is done once in a thread and a process: its id.
        pass();
        // SAFETY: the filter is for this thread, which does no more than this and ends by a call that is allowed.
        unsafe {
            assert_eq!(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT), 0);
            pass();
            syscall(sys_exit, 0);
        }
    });
    assert!(child.ended_well(), "killed by a system call");
    assert_eq!(*lock(shared), 4_000);
}

/// Processes of two threads each put and take tokens; they die at random moments, and the others go on.
fn random_kills_hang_nobody() {
    let crowd = Crowd::install();
    let shared = shared();
    // One thread of each process puts one for everybody, the other takes; nobody else makes tokens.
    let work = |thread, _| match thread {
        0 => {
            let mut guard = lock(shared);
            *guard = (*guard + 1).min(100);
            drop(guard);
            shared.more.notify_one();
        }
        _ => take(shared),
    };
    let kills = crowd.kill_at_random(&shared.stop, work, || {
        let _guard = lock(shared);
        shared.more.notify_all();
    });
    let told = shared.told.load(Ordering::SeqCst);
    eprintln!("{told} of {kills} were killed holding the lock");
}

netmcore_forktest::forktests!(
    notified_processes_go_on,
    notify_all_reaches_threads_and_processes,
    deadline_ends_the_wait_and_says_so,
    error_checking_mutex_is_free_during_the_wait,
    holder_that_is_killed_ends_the_waits,
    notifier_killed_at_any_point_loses_nothing,
    waiter_killed_at_any_point_leaves_the_token_to_the_other,
    poll_handle_is_readable_once_notified_since_it_was_armed,
    poll_handle_of_strangers_is_readable_after_a_while,
    poll_handle_that_is_not_looked_at_passes_the_notification_on,
    forked_copy_of_a_poll_handle_is_inert,
    uncontended_operations_make_no_system_call,
    random_kills_hang_nobody,
);

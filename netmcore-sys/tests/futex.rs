//! Guards against lost wake-ups and waits without end: a word changed before the sleep, a waker that died, a deadline
//! in the past, a kernel that lacks `futex_waitv`.
//!
//! # Safety
//!
//! Handlers that do nothing, and a filter of system calls, are installed from structures of the calling frame.

#![allow(unsafe_code)]

mod forked;

use forked::{Child, Words};
use netmcore_sys::futex::{self, Deadline, Woken};
use netmcore_sys::process;
use netmcore_sys::signal;
use std::time::{Duration, Instant};

netmcore_forktest::forktests!(
    wake_reaches_a_sleeper_in_another_process,
    changed_word_is_not_slept_on,
    wake_takes_as_many_as_asked,
    deadline_ends_the_wait_and_not_before,
    past_deadline_does_not_sleep,
    deadline_of_one_process_holds_in_another,
    signal_handler_ends_the_wait,
    restarting_handler_does_not_end_the_wait,
    killed_sleeper_is_forgotten,
    either_of_two_words_wakes,
    any_of_three_words_wakes_or_is_not_slept_on,
    either_of_two_words_changed_is_not_slept_on,
    two_words_end_at_the_deadline,
    ping_pong_loses_nothing,
    filtered_waitv_falls_back_and_sees_both_words,
);

/// A limit for waits that must end before it.
fn soon() -> Option<Deadline> {
    Some(Deadline::after(Duration::from_secs(30)))
}

/// Wakes until somebody was asleep to be woken.
fn wake_sleeper(words: &Words, index: usize) {
    forked::until("somebody sleeps", || futex::wake(words.word(index), 1) == 1);
}

fn wake_reaches_a_sleeper_in_another_process() {
    let words = Words::new();
    let child = Child::run(|| assert_eq!(futex::wait(words.word(0), 0, soon()), Woken::Woken));
    wake_sleeper(&words, 0);
    child.succeeds();
}

fn changed_word_is_not_slept_on() {
    let words = Words::new();
    words.set(0, 1);
    assert_eq!(futex::wait(words.word(0), 0, None), Woken::Changed);
}

fn wake_takes_as_many_as_asked() {
    let words = Words::new();
    let children: Vec<Child> = (0..4)
        .map(|_| {
            Child::run(|| {
                words
                    .word(1)
                    .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                assert_eq!(futex::wait(words.word(0), 0, soon()), Woken::Woken);
            })
        })
        .collect();
    let mut woken = 0;
    forked::until("two sleep", || {
        woken += futex::wake(words.word(0), 2 - woken);
        woken == 2
    });
    forked::until("the others sleep", || {
        woken += futex::wake_all(words.word(0));
        woken == 4
    });
    children.into_iter().for_each(Child::succeeds);
}

fn deadline_ends_the_wait_and_not_before() {
    let words = Words::new();
    let start = Instant::now();
    let deadline = Deadline::after(Duration::from_millis(20));
    assert_eq!(
        futex::wait(words.word(0), 0, Some(deadline)),
        Woken::TimedOut
    );
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(deadline.is_past());
}

fn past_deadline_does_not_sleep() {
    let words = Words::new();
    let past = Some(Deadline::from_nanos(1));
    assert_eq!(futex::wait(words.word(0), 0, past), Woken::TimedOut);
    assert_eq!(futex::wait(words.word(0), 1, past), Woken::Changed);
    let two = ((words.word(0), 0), (words.word(1), 0));
    assert_eq!(futex::wait_two(two.0, two.1, past), Woken::TimedOut);
}

fn deadline_of_one_process_holds_in_another() {
    let words = Words::new();
    let deadline = Deadline::after(Duration::from_millis(20));
    let start = Instant::now();
    Child::run(|| {
        let same = Deadline::from_nanos(deadline.as_nanos());
        assert_eq!(futex::wait(words.word(0), 0, Some(same)), Woken::TimedOut);
    })
    .succeeds();
    assert!(start.elapsed() >= Duration::from_millis(20));
}

/// Runs `wait` in a child that handles SIGUSR1, and sends it that signal until it has ended.
fn signal_until_it_ends(words: &Words, restart: bool, wait: impl FnOnce()) -> Child {
    let child = Child::run(|| {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: all fields are set; the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
            assert_eq!(
                libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        words.set(9, 1);
        wait();
    });
    forked::until("the handler is there", || words.get(9) == 1);
    child
}

fn signal_handler_ends_the_wait() {
    let words = Words::new();
    let child = signal_until_it_ends(&words, false, || {
        assert_eq!(futex::wait(words.word(0), 0, soon()), Woken::Interrupted);
        words.set(8, 1);
        let two = ((words.word(0), 0), (words.word(1), 0));
        assert_eq!(futex::wait_two(two.0, two.1, soon()), Woken::Interrupted);
        words.set(8, 2);
    });
    forked::until("both waits have ended", || {
        process::kill(child.pid, libc::SIGUSR1).unwrap();
        words.get(8) == 2
    });
    child.succeeds();
}

fn restarting_handler_does_not_end_the_wait() {
    let words = Words::new();
    let child = signal_until_it_ends(&words, true, || {
        signal::unblock_all().unwrap();
        assert_eq!(futex::wait(words.word(0), 0, None), Woken::Woken);
    });
    for _ in 0..20 {
        process::kill(child.pid, libc::SIGUSR1).unwrap();
        // sleep: lets the child go back to sleep, so that most signals find it waiting; the outcome is the same if not.
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(child.has_ended(), None);
    wake_sleeper(&words, 0);
    child.succeeds();
}

fn killed_sleeper_is_forgotten() {
    let words = Words::new();
    let dead = Child::run(|| while futex::wait(words.word(0), 0, None) != Woken::Changed {});
    forked::until("it sleeps", || dead.is_asleep());
    dead.kill();
    assert_eq!(futex::wake_all(words.word(0)), 0);
}

fn either_of_two_words_wakes() {
    let words = Words::new();
    for index in [0, 1] {
        let child = Child::run(|| {
            let two = ((words.word(0), 0), (words.word(1), 0));
            assert_eq!(futex::wait_two(two.0, two.1, soon()), Woken::Woken);
        });
        wake_sleeper(&words, index);
        child.succeeds();
    }
}

fn any_of_three_words_wakes_or_is_not_slept_on() {
    let words = Words::new();
    let three = |expected: [u32; 3]| {
        let word = |index: usize| (words.word(index), expected[index]);
        futex::wait_any([word(0), word(1), word(2)], soon())
    };
    for index in 0..3 {
        let child = Child::run(|| assert_eq!(three([0; 3]), Woken::Woken));
        wake_sleeper(&words, index);
        child.succeeds();
        let mut other = [0; 3];
        other[index] = 1;
        assert_eq!(three(other), Woken::Changed);
    }
}

fn either_of_two_words_changed_is_not_slept_on() {
    let words = Words::new();
    let wait = |a, b| futex::wait_two((words.word(0), a), (words.word(1), b), None);
    assert_eq!(wait(1, 0), Woken::Changed);
    assert_eq!(wait(0, 1), Woken::Changed);
}

fn two_words_end_at_the_deadline() {
    let words = Words::new();
    let start = Instant::now();
    let deadline = Some(Deadline::after(Duration::from_millis(20)));
    let two = ((words.word(0), 0), (words.word(1), 0));
    assert_eq!(futex::wait_two(two.0, two.1, deadline), Woken::TimedOut);
    assert!(start.elapsed() >= Duration::from_millis(20));
}

/// Two processes hand a number to each other ten thousand times; a lost wake-up would be a wait without end.
fn ping_pong_loses_nothing() {
    const ROUNDS: u32 = 10_000;
    let words = Words::new();
    let play = |odd: u32| {
        let word = words.word(0);
        loop {
            let turn = words.get(0);
            if turn >= ROUNDS {
                futex::wake_all(word);
                return;
            }
            if turn % 2 == odd {
                words.set(0, turn + 1);
                futex::wake(word, 1);
            } else {
                futex::wait_two((word, turn), (words.word(1), 0), None);
            }
        }
    };
    let child = Child::run(|| play(1));
    play(0);
    child.succeeds();
}

/// Has `futex_waitv` fail with `errno` in this process, as container runtimes with old filters do.
fn filter_waitv(errno: i32) {
    let ret = |value: u32| libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: value,
    };
    let mut program = [
        libc::sock_filter {
            code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
            jt: 0,
            jf: 0,
            k: 0, // offset of the number of the call in seccomp_data
        },
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_futex_waitv as u32,
        },
        ret(libc::SECCOMP_RET_ERRNO | errno as u32),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: plain integers; then a program of four instructions that lives through the call.
    let filtered = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    if !filtered {
        netmcore_forktest::skip("no filters of system calls here");
    }
}

fn filtered_waitv_falls_back_and_sees_both_words() {
    for errno in [libc::ENOSYS, libc::EPERM] {
        let words = Words::new();
        let child = Child::run(|| {
            filter_waitv(errno);
            // SAFETY: a refused call.
            let result = unsafe { libc::syscall(libc::SYS_futex_waitv, 0, 0, 0, 0, 0) };
            assert_eq!(
                (result, std::io::Error::last_os_error().raw_os_error()),
                (-1, Some(errno))
            );

            let (a, b) = (words.word(0), words.word(1));
            // Nobody wakes in time: the deadline holds to the end although the sleep is cut into slices.
            let start = Instant::now();
            let deadline = Some(Deadline::after(Duration::from_millis(30)));
            assert_eq!(futex::wait_two((a, 0), (b, 0), deadline), Woken::TimedOut);
            assert!(start.elapsed() >= Duration::from_millis(30));
            assert_eq!(futex::wait_two((a, 0), (b, 1), None), Woken::Changed);
            assert_eq!(futex::wait_two((a, 1), (b, 0), None), Woken::Changed);

            words.set(2, 1);
            assert_eq!(futex::wait_two((a, 0), (b, 0), soon()), Woken::Woken);
            words.set(2, 2);
            // Sleeps on the first word while the second changes.
            assert_eq!(futex::wait_two((a, 0), (b, 0), soon()), Woken::Changed);
        });
        forked::until("the child sleeps", || words.get(2) == 1);
        wake_sleeper(&words, 0);
        forked::until("the child sleeps again", || words.get(2) == 2);
        words.set(1, 1);
        futex::wake_all(words.word(1));
        child.succeeds();
    }
}

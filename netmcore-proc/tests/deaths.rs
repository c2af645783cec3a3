//! Whoever joins a process that failed is told how: guards against causes that are wrong, missing or mixed up, and
//! against failures that harm others or leave memory behind.
//!
//! # Safety
//! One test writes to address 8, in a process that is to die of it; another forks a worker, which has one thread.
#![allow(unsafe_code)]

mod trial;

use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::time::{Duration, Instant};

use netmcore_proc::{
    Codec, Error, ExceededLimit, JoinError, Process, ProcessOptions, Running, StartOptions,
    on_worker_start, self_process_id, spawn,
};
use netmcore_sys::process::{self, Forked, Pid, PidFd, Resource};
use serde::{Deserialize, Serialize};
use trial::{
    Channel, SIGABRT, SIGKILL, SIGSEGV, Trial, in_a_worker, is_killed_by, kill, until,
    until_asleep, until_dead, until_others_sleep,
};

netmcore_forktest::forktests!(
    panic_is_told_with_message_place_and_stack,
    panic_without_text_is_told,
    panic_in_a_start_hook_is_told,
    panic_of_the_first_process_is_the_error_of_the_run,
    caught_panic_is_not_what_the_process_dies_of,
    panic_while_a_result_is_dropped_is_told,
    panic_while_panicking_is_told,
    panic_in_another_thread_is_that_threads_affair,
    panic_that_is_resumed_is_not_taken_for_an_earlier_one,
    forked_child_that_comes_out_of_the_function_delivers_nothing,
    panics_leave_no_memory_behind,
    exit_is_told_with_its_code,
    signals_are_told,
    stack_overflow_is_told_as_a_signal,
    allocation_beyond_the_memory_limit_is_told,
    allocation_beyond_the_memory_limit_is_told_after_a_backtrace,
    other_aborts_of_the_limited_are_not_for_lack_of_memory,
    other_aborts_of_the_limited_are_told_after_a_backtrace,
    resident_memory_beyond_the_limit_is_told,
    memory_of_the_unlimited_is_not_limited,
    time_limit_ends_the_idle_and_the_busy,
    time_limit_counts_from_the_start_of_the_function,
    finished_process_has_kept_its_limits,
    undecodable_argument_is_told,
    undecodable_result_is_told,
    self_describing_values_travel_as_json,
    unencodable_argument_starts_nothing,
    result_that_cannot_be_delivered_is_told,
    killed_process_is_told,
    kill_of_a_process_that_waits_in_the_queue,
    kill_of_an_ended_process_does_nothing,
    kill_of_a_stopped_process,
    failures_are_shown_in_words,
);

fn panic_is_told_with_message_place_and_stack() {
    #[inline(never)]
    fn innermost_function_of_the_test(number: u64) -> u64 {
        if number > 1 {
            panic!("the number is {number}");
        }
        number
    }
    in_a_worker(|| {
        let error = spawn(innermost_function_of_the_test, &5)
            .unwrap()
            .join()
            .unwrap_err();
        let JoinError::Panicked {
            message,
            location,
            backtrace,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(message, "the number is 5");
        let location = location.as_deref().unwrap();
        assert!(location.contains("deaths.rs:"), "{location}");
        let stack = backtrace.to_string();
        assert!(stack.contains("innermost_function_of_the_test"), "{stack}");
        assert!(!stack.contains("begin_panic"), "{stack}");
        assert!(error.backtrace().is_some());
    });
}

fn panic_without_text_is_told() {
    in_a_worker(|| {
        let error = spawn(|()| -> u64 { panic_any(7_u8) }, &())
            .unwrap()
            .join()
            .unwrap_err();
        assert!(matches!(error, JoinError::Panicked { .. }), "{error}");
        let resumed = |()| -> u64 { std::panic::resume_unwind(Box::new("resumed")) };
        let error = spawn(resumed, &()).unwrap().join().unwrap_err();
        assert!(
            matches!(&error, JoinError::Panicked { message, .. } if message.contains("resumed")),
            "{error}"
        );
        let long = spawn(|()| -> u64 { panic!("{}", "long ".repeat(100_000)) }, &()).unwrap();
        let error = long.join().unwrap_err();
        assert!(
            matches!(&error, JoinError::Panicked { message, .. } if message.starts_with("long long ")),
            "{error}"
        );
    });
}

fn panic_in_a_start_hook_is_told() {
    let trial = Trial::new();
    let mut master = trial.master();
    on_worker_start(|| panic!("in the hook")).unwrap();
    let first = master.def_process(|(): ()| 1_u64);
    let error = trial.try_run(master, &first, &()).unwrap_err();
    assert!(
        matches!(&error, Error::FirstProcess(JoinError::Panicked { message, .. }) if message == "in the hook"),
        "{error}"
    );
}

fn panic_of_the_first_process_is_the_error_of_the_run() {
    let trial = Trial::new();
    for round in 0..3 {
        let mut master = trial.master();
        let first = master.def_process(|round: u64| -> u64 { panic!("round {round}") });
        let error = trial.try_run(master, &first, &round).unwrap_err();
        let expected = format!("round {round}");
        assert!(
            matches!(&error, Error::FirstProcess(JoinError::Panicked { message, .. }) if *message == expected),
            "{error}"
        );
    }
}

fn caught_panic_is_not_what_the_process_dies_of() {
    fn caught(text: &str) {
        catch_unwind(|| panic!("{text}")).unwrap_err();
    }
    in_a_worker(|| {
        let succeeds = |()| {
            caught("one");
            caught("two");
            5_u64
        };
        assert_eq!(spawn(succeeds, &()).unwrap().join(), Ok(5));
        let panics = |()| -> u64 {
            caught("one");
            panic!("another")
        };
        let error = spawn(panics, &()).unwrap().join().unwrap_err();
        assert!(
            matches!(&error, JoinError::Panicked { message, .. } if message == "another"),
            "{error}"
        );
        let aborts = |()| -> u64 {
            caught("one");
            std::process::abort()
        };
        let error = spawn(aborts, &()).unwrap().join().unwrap_err();
        assert!(is_killed_by(SIGABRT, &error), "{error}");
        let exits = |()| -> u64 {
            caught("one");
            std::process::exit(6)
        };
        let error = spawn(exits, &()).unwrap().join().unwrap_err();
        assert!(
            matches!(error, JoinError::Exited { code: 6, .. }),
            "{error}"
        );
    });
}

/// Panics when it is dropped.
#[derive(Serialize, Deserialize)]
struct PanicsInDrop(bool);

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        if self.0 {
            panic!("dropped");
        }
    }
}

fn panic_while_a_result_is_dropped_is_told() {
    in_a_worker(|| {
        for _ in 0..3 {
            let running = spawn(|()| PanicsInDrop(true), &()).unwrap();
            let Err(error) = running.join() else {
                panic!("it cannot have succeeded");
            };
            assert!(
                matches!(&error, JoinError::Panicked { message, .. } if message == "dropped"),
                "{error}"
            );
        }
    });
}

fn panic_while_panicking_is_told() {
    in_a_worker(|| {
        let twice = |()| -> u64 {
            let _second = PanicsInDrop(true);
            panic!("first")
        };
        let error = spawn(twice, &()).unwrap().join().unwrap_err();
        // It aborts because of the second, which is told, and not that a destructor panicked.
        assert!(
            matches!(&error, JoinError::Panicked { message, location: Some(location), .. }
                if message == "dropped" && location.contains("deaths.rs")),
            "{error}"
        );
        extern "C" fn cannot_unwind() {
            panic!("in a C function");
        }
        let aborts = |()| -> u64 {
            cannot_unwind();
            1
        };
        let error = spawn(aborts, &()).unwrap().join().unwrap_err();
        assert!(
            matches!(&error, JoinError::Panicked { message, .. } if message == "in a C function"),
            "{error}"
        );
        // One that lets its payload panic when the worker drops it.
        let payload = |()| -> u64 { panic_any(PanicsInDrop(true)) };
        let error = spawn(payload, &()).unwrap().join().unwrap_err();
        assert!(
            matches!(error, JoinError::Panicked { .. } | JoinError::Exited { .. }),
            "{error}"
        );
    });
}

fn panic_in_another_thread_is_that_threads_affair() {
    in_a_worker(|| {
        let survives = |()| {
            let threads: Vec<_> = (0..8)
                .map(|number| std::thread::spawn(move || panic!("thread {number}")))
                .collect();
            threads
                .into_iter()
                .map(|thread| u64::from(thread.join().is_err()))
                .sum::<u64>()
        };
        for _ in 0..20 {
            assert_eq!(spawn(survives, &()).unwrap().join(), Ok(8));
        }
        // Some still panic when the process is over.
        let leaves_them = |()| {
            for _ in 0..4 {
                std::thread::spawn(move || panic!("late"));
            }
            vec![1_u64; 100]
        };
        for _ in 0..50 {
            let result = spawn(leaves_them, &()).unwrap().join();
            assert_eq!(result, Ok(vec![1; 100]));
        }
    });
}

fn panic_that_is_resumed_is_not_taken_for_an_earlier_one() {
    in_a_worker(|| {
        let resumes = |is_other: bool| -> u64 {
            let payload = catch_unwind(|| panic!("the {}", "one")).unwrap_err();
            match is_other {
                true => std::panic::resume_unwind(Box::new("the other")),
                false => std::panic::resume_unwind(payload),
            }
        };
        for (is_other, expected) in [(true, "the other"), (false, "the one")] {
            let error = spawn(resumes, &is_other).unwrap().join().unwrap_err();
            let JoinError::Panicked {
                message, location, ..
            } = &error
            else {
                panic!("{error}");
            };
            assert_eq!(message, expected);
            assert_eq!(location.is_some(), !is_other, "where it began is known");
        }
    });
}

fn forked_child_that_comes_out_of_the_function_delivers_nothing() {
    in_a_worker(|| {
        let forks = |panics: bool| -> (u32, bool) {
            // SAFETY: this worker has one thread, and the child only returns or panics.
            match unsafe { process::fork() }.unwrap() {
                Forked::Child if panics => panic!("in the child"),
                Forked::Child => (0, true),
                Forked::Parent(pid) => {
                    let status = PidFd::open(pid).unwrap().wait().unwrap();
                    (std::process::id(), status.is_success())
                }
            }
        };
        for panics in [false, true] {
            for _ in 0..10 {
                let (pid, is_success) = spawn(forks, &panics).unwrap().join().unwrap();
                assert!(pid != 0, "it is the child's result");
                assert_eq!(is_success, !panics);
            }
        }
    });
}

fn panics_leave_no_memory_behind() {
    let trial = Trial::new();
    // Nothing is printed: it would take most of the time.
    std::panic::set_hook(Box::new(|_| {}));
    // Room for a few hundred messages.
    let mut master = trial.master().message_memory(1 << 20).process_limit(16);
    let fails = master.def_process(|how: u64| match how % 4 {
        0 => panic!("{}", "not caught ".repeat(20)),
        1 => {
            catch_unwind(|| panic!("{}", "caught ".repeat(20))).unwrap_err();
            PanicsInDrop(false)
        }
        2 => PanicsInDrop(true),
        _ => {
            let _second = PanicsInDrop(true);
            panic!("twice");
        }
    });
    let first = master.def_process(move |(): ()| {
        for how in 0..6000 {
            match fails.start(&how) {
                Ok(running) => drop(running.join()),
                Err(error) => panic!("after {how}: {error}"),
            }
        }
    });
    trial.run(master, &first, &());
}

fn exit_is_told_with_its_code() {
    in_a_worker(|| {
        for code in [0, 1, 3, 101, 255] {
            let running = spawn(|code: i32| -> u64 { std::process::exit(code) }, &code).unwrap();
            let error = running.join().unwrap_err();
            assert!(
                matches!(error, JoinError::Exited { code: its, process } if its == code && process == running.id()),
                "{error}"
            );
        }
        let running = spawn(|()| -> u64 { process::exit_now(9) }, &()).unwrap();
        let error = running.join().unwrap_err();
        assert!(
            matches!(error, JoinError::Exited { code: 9, .. }),
            "{error}"
        );
    });
}

fn signals_are_told() {
    in_a_worker(|| {
        let suicide = |signal: i32| {
            kill(Pid::this(), signal);
            // Delivered before `kill` returns, or soon.
            // sleep: the process dies in it.
            std::thread::sleep(Duration::from_secs(100));
        };
        for signal in [1, 9, 10, 14, 15] {
            let error = spawn(suicide, &signal).unwrap().join().unwrap_err();
            assert!(is_killed_by(signal, &error), "{signal}: {error}");
        }
        let aborts = |()| -> u64 { std::process::abort() };
        let error = spawn(aborts, &()).unwrap().join().unwrap_err();
        assert!(is_killed_by(SIGABRT, &error), "{error}");
        let faults = |()| -> u64 {
            // SAFETY: not safe: nothing is mapped there, and the process dies of it.
            unsafe { std::ptr::without_provenance_mut::<u64>(8).write_volatile(1) };
            1
        };
        let error = spawn(faults, &()).unwrap().join().unwrap_err();
        assert!(is_killed_by(SIGSEGV, &error), "{error}");
    });
}

fn stack_overflow_is_told_as_a_signal() {
    #[allow(unconditional_recursion)]
    fn endless(depth: u64) -> u64 {
        std::hint::black_box([depth; 100])[50] + endless(depth + 1)
    }
    in_a_worker(|| {
        let error = spawn(endless, &0).unwrap().join().unwrap_err();
        assert!(
            is_killed_by(SIGABRT, &error) || is_killed_by(SIGSEGV, &error),
            "{error}"
        );
    });
}

// ---- limits ------------------------------------------------------------------------------------

const MIB: u64 = 1 << 20;

/// Says whether backtraces are printed, whatever the tests were started with. Before anything panics: the standard
/// library looks once.
fn print_backtraces(yes: bool) {
    // SAFETY: the test's process has one thread so far.
    unsafe {
        std::env::remove_var("RUST_LIB_BACKTRACE");
        std::env::set_var("RUST_BACKTRACE", if yes { "1" } else { "0" });
    }
}

fn allocation_beyond_the_memory_limit_is_told() {
    print_backtraces(false);
    exceed_the_memory_limit();
}

fn allocation_beyond_the_memory_limit_is_told_after_a_backtrace() {
    print_backtraces(true);
    exceed_the_memory_limit();
}

fn exceed_the_memory_limit() {
    let trial = Trial::new();
    let mut master = trial.master();
    let grows = master.def_process(|step: u64| {
        let mut all = Vec::new();
        loop {
            all.push(std::hint::black_box(vec![1_u8; step as usize]));
        }
    });
    let grows: Process<u64, ()> = grows;
    let fits = master.def_process(|len: u64| vec![1_u8; len as usize].len() as u64);
    let first = master.def_process(move |(): ()| {
        let limit = 64 * MIB;
        let limited = StartOptions::new().memory_limit(limit);
        let expected = ExceededLimit::MemoryBytes(limit);
        // In steps of which the kernel sees each, in steps that the allocator takes from what it has, and
        // in one that could never be.
        for step in [MIB, 1000, 1 << 40] {
            let running = grows.start_with(&step, limited.clone()).unwrap();
            let error = running.join().unwrap_err();
            assert!(
                matches!(&error, JoinError::LimitExceeded { limit, process } if *limit == expected && *process == running.id()),
                "step {step}: {error}"
            );
        }
        // Half of it is well.
        let running = fits.start_with(&(limit / 2), limited.clone()).unwrap();
        assert_eq!(running.join(), Ok(limit / 2));
    });
    trial.run(master, &first, &());
}

fn other_aborts_of_the_limited_are_not_for_lack_of_memory() {
    print_backtraces(false);
    abort_within_the_memory_limit();
}

fn other_aborts_of_the_limited_are_told_after_a_backtrace() {
    print_backtraces(true);
    abort_within_the_memory_limit();
}

fn abort_within_the_memory_limit() {
    /// Has slots that are not written to, so that they hold what earlier calls have left.
    #[inline(never)]
    fn abort_in_a_large_frame() -> ! {
        let mut slots = MaybeUninit::<[u64; 4000]>::uninit();
        std::hint::black_box(&mut slots);
        std::process::abort()
    }
    extern "C" fn cannot_unwind() {
        panic!("at a boundary");
    }
    let trial = Trial::new();
    let mut master = trial.master();
    let aborts = master.def_process(|(): ()| -> u64 { std::process::abort() });
    let aborts_deeper = master.def_process(|after: u64| -> u64 {
        if after > 0 {
            let too_long = std::hint::black_box(usize::MAX);
            catch_unwind(|| Vec::<u64>::with_capacity(too_long)).unwrap_err();
        }
        abort_in_a_large_frame()
    });
    let panics = master.def_process(|(): ()| -> u64 {
        cannot_unwind();
        0
    });
    let first = master.def_process(move |(): ()| {
        let limited = StartOptions::new().memory_limit(256 * MIB);
        let plain = aborts.start_with(&(), limited.clone()).unwrap();
        let error = plain.join().unwrap_err();
        assert!(is_killed_by(SIGABRT, &error), "{error}");
        for after_a_panic in [0, 1] {
            let deeper = aborts_deeper
                .start_with(&after_a_panic, limited.clone())
                .unwrap();
            let error = deeper.join().unwrap_err();
            assert!(is_killed_by(SIGABRT, &error), "{after_a_panic}: {error}");
        }
        let panic = panics.start_with(&(), limited.clone()).unwrap();
        let error = panic.join().unwrap_err();
        assert!(matches!(error, JoinError::Panicked { .. }), "{error}");
    });
    trial.run(master, &first, &());
}

fn resident_memory_beyond_the_limit_is_told() {
    // The stack is no "data" to the kernel, so RLIMIT_DATA does not see it.
    #[inline(never)]
    fn deep(depth: u64) -> u64 {
        let filled = std::hint::black_box([depth; 512]);
        match depth {
            0 => {
                // sleep: the process is killed in it.
                std::thread::sleep(Duration::from_secs(100));
                0
            }
            _ => deep(depth - 1) + std::hint::black_box(filled)[7],
        }
    }
    let trial = Trial::new();
    let mut master = trial.master();
    let grows = master.def_process(|(): ()| deep(300));
    let first = master.def_process(move |(): ()| {
        let mine = process::memory_use(Pid::this()).unwrap().private_bytes();
        let limit = mine + 2 * MIB;
        let limited = StartOptions::new().memory_limit(limit);
        let start = Instant::now();
        let error = grows
            .start_with(&(), limited.clone())
            .unwrap()
            .join()
            .unwrap_err();
        let expected = ExceededLimit::MemoryBytes(limit);
        assert!(
            matches!(&error, JoinError::LimitExceeded { limit, .. } if *limit == expected),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
    });
    trial.run(master, &first, &());
}

fn memory_of_the_unlimited_is_not_limited() {
    let trial = Trial::new();
    let mut master = trial.master();
    let limits = master.def_process(|(): ()| {
        let limit = process::get_limit(Resource::DataBytes).unwrap();
        (limit.soft, vec![1_u8; 100 << 20].len())
    });
    let first = master.def_process(move |(): ()| {
        let outside = process::get_limit(Resource::DataBytes).unwrap().soft;
        let limited = StartOptions::new().memory_limit(300 * MIB);
        let one = limits
            .start_with(&(), limited.clone())
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(one.0, Some(300 * MIB));
        // The next one is a copy of the master, not of the limited.
        let other = limits.start(&()).unwrap().join().unwrap();
        assert_eq!(other, (outside, 100 << 20));
    });
    trial.run(master, &first, &());
}

fn time_limit_ends_the_idle_and_the_busy() {
    let trial = Trial::new();
    let mut master = trial.master();
    let lasts = master.def_process(|is_busy: bool| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(100) {
            if !is_busy {
                // sleep: the process is killed in it.
                std::thread::sleep(Duration::from_secs(100));
            }
        }
    });
    let first = master.def_process(move |(): ()| {
        let limit = Duration::from_millis(100);
        let limited = StartOptions::new().time_limit(limit);
        for is_busy in [false, true] {
            let start = Instant::now();
            let running = lasts.start_with(&is_busy, limited.clone()).unwrap();
            let error = running.join().unwrap_err();
            let took = start.elapsed();
            let expected = ExceededLimit::Time(limit);
            assert!(
                matches!(&error, JoinError::LimitExceeded { limit, .. } if *limit == expected),
                "{error}"
            );
            assert!(took >= limit, "it took {took:?}");
            assert!(took < limit + Duration::from_secs(5), "it took {took:?}");
        }
        // Many at once, each with its own.
        let all: Vec<Running<()>> = (1..20)
            .map(|n| {
                let limit = Duration::from_millis(10 * n);
                let limited = StartOptions::new().time_limit(limit);
                lasts.start_with(&false, limited.clone()).unwrap()
            })
            .collect();
        for (index, one) in all.iter().enumerate() {
            let expected = ExceededLimit::Time(Duration::from_millis(10 * (index as u64 + 1)));
            let error = one.join().unwrap_err();
            assert!(
                matches!(&error, JoinError::LimitExceeded { limit, .. } if *limit == expected),
                "{error}"
            );
        }
    });
    trial.run(master, &first, &());
}

fn time_limit_counts_from_the_start_of_the_function() {
    let trial = Trial::new();
    let mut master = trial.master().ready_workers(0);
    let quick = master.def_process(|x: u64| x);
    let first = master.def_process(move |(): ()| {
        // The queue is not served while the master is stopped.
        let master = Pid::parent().unwrap();
        kill(master, netmcore_sys::signal::SIGSTOP);
        let limited = StartOptions::new().time_limit(Duration::from_secs(1));
        let running = quick.start_with(&3, limited.clone()).unwrap();
        // sleep: longer than the time limit, while the master is stopped.
        std::thread::sleep(Duration::from_millis(1500));
        kill(master, netmcore_sys::signal::SIGCONT);
        assert_eq!(running.join(), Ok(3));
    });
    trial.run(master, &first, &());
}

fn finished_process_has_kept_its_limits() {
    let trial = Trial::new();
    let mut master = trial.master();
    let quick = master.def_process(|micros: u64| {
        // sleep: the work of the process, of a length that the test varies.
        std::thread::sleep(Duration::from_micros(micros));
        vec![micros; 10]
    });
    let first = master.def_process(move |(): ()| {
        // Around the limit it ends either way; never with both, never with neither, never with the
        // cause of another.
        let limit = Duration::from_millis(3);
        let limited = StartOptions::new().time_limit(limit);
        let (mut in_time, mut late) = (0, 0);
        for round in 0..150 {
            let micros = 2000 + round * 20;
            match quick.start_with(&micros, limited.clone()).unwrap().join() {
                Ok(result) => {
                    assert_eq!(result, [micros; 10]);
                    in_time += 1;
                }
                Err(JoinError::LimitExceeded { limit: its, .. }) => {
                    assert_eq!(its, ExceededLimit::Time(limit));
                    late += 1;
                }
                Err(error) => panic!("{error}"),
            }
            // The next user of the slot and the worker is unharmed.
            assert_eq!(spawn(|x: u64| x, &round).unwrap().join(), Ok(round));
        }
        assert!(late > 0, "{in_time} in time, {late} late");
    });
    trial.run(master, &first, &());
}

// ---- codecs ------------------------------------------------------------------------------------

fn undecodable_argument_is_told() {
    let trial = Trial::new();
    let mut master = trial.master();
    let takes = master.def_process(|value: serde_json::Value| value.to_string());
    let first = master.def_process(move |(): ()| {
        let value = serde_json::json!({"a": [1, "b"]});
        let error = takes.start(&value).unwrap().join().unwrap_err();
        let JoinError::ArgumentUndecodable {
            type_name, reason, ..
        } = &error
        else {
            panic!("{error}");
        };
        assert!(type_name.contains("Value"), "{type_name}");
        let shown = error.to_string();
        assert!(shown.contains("Json") || shown.contains("JSON"), "{shown}");
        assert!(!reason.is_empty());
    });
    trial.run(master, &first, &());
}

fn undecodable_result_is_told() {
    let trial = Trial::new();
    let mut master = trial.master();
    let gives = master.def_process(|(): ()| serde_json::json!({"a": [1, "b"]}));
    let first = master.def_process(move |(): ()| {
        let running = gives.start(&()).unwrap();
        let error = running.join().unwrap_err();
        let JoinError::ResultUndecodable {
            type_name, process, ..
        } = &error
        else {
            panic!("{error}");
        };
        assert!(type_name.contains("Value"), "{type_name}");
        assert_eq!(*process, running.id());
        let shown = error.to_string();
        assert!(shown.contains("Json") || shown.contains("JSON"), "{shown}");
        // It has been taken, though it could not be read.
        assert!(matches!(
            running.join(),
            Err(JoinError::AlreadyJoined { .. })
        ));
    });
    trial.run(master, &first, &());
}

fn self_describing_values_travel_as_json() {
    let trial = Trial::new();
    let mut master = trial.master();
    let json = ProcessOptions::new().codec(Codec::Json);
    let wraps = master.def_process_with(
        json,
        |value: serde_json::Value| serde_json::json!({ "wrapped": value }),
    );
    let panics = master.def_process_with(json, |_: serde_json::Value| -> serde_json::Value {
        panic!("also as JSON")
    });
    let first = master.def_process(move |(): ()| {
        let value = serde_json::json!({"a": [1, "b", null, 1.5]});
        let result = wraps.start(&value).unwrap().join().unwrap();
        assert_eq!(result, serde_json::json!({ "wrapped": value }));
        let error = panics.start(&value).unwrap().join().unwrap_err();
        assert!(
            matches!(&error, JoinError::Panicked { message, .. } if message == "also as JSON"),
            "{error}"
        );
    });
    trial.run(master, &first, &());
}

/// Cannot become bytes if it holds true.
#[derive(Deserialize)]
struct Unencodable(bool);

impl Serialize for Unencodable {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            true => Err(serde::ser::Error::custom("it does not want to")),
            false => self.0.serialize(serializer),
        }
    }
}

fn unencodable_argument_starts_nothing() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(4).message_memory(1 << 20);
    let takes = master.def_process(|value: Unencodable| value.0);
    let takes_much = master.def_process(|value: Vec<u8>| value.len() as u64);
    let first = master.def_process(move |(): ()| {
        for _ in 0..20 {
            let error = takes.start(&Unencodable(true)).unwrap_err();
            let Error::Encode { type_name, reason } = &error else {
                panic!("{error}");
            };
            assert!(type_name.contains("Unencodable"), "{type_name}");
            assert!(reason.contains("it does not want to"), "{reason}");
            let error = takes_much.start(&vec![1; 4 << 20]).unwrap_err();
            assert!(matches!(error, Error::Memory { .. }), "{error}");
            // One that panics while it is encoded.
            let panicked = catch_unwind(AssertUnwindSafe(|| takes.start(&Unencodable(true))));
            assert!(panicked.unwrap().is_err());
        }
        assert_eq!(takes.start(&Unencodable(false)).unwrap().join(), Ok(false));
        let running = takes_much.start(&vec![1; 100_000]).unwrap();
        assert_eq!(running.join(), Ok(100_000));
    });
    trial.run(master, &first, &());
}

fn result_that_cannot_be_delivered_is_told() {
    let trial = Trial::new();
    let mut master = trial.master().message_memory(1 << 20);
    let gives = master.def_process(|(): ()| Unencodable(true));
    let gives_much = master.def_process(|len: u64| vec![1_u8; len as usize]);
    let first = master.def_process(move |(): ()| {
        for _ in 0..5 {
            let Err(error) = gives.start(&()).unwrap().join() else {
                panic!("it cannot have succeeded");
            };
            let JoinError::ResultNotDelivered {
                type_name, reason, ..
            } = &error
            else {
                panic!("{error}");
            };
            assert!(type_name.contains("Unencodable"), "{type_name}");
            assert!(reason.contains("it does not want to"), "{reason}");
            let error = gives_much.start(&(4 << 20)).unwrap().join().unwrap_err();
            assert!(
                matches!(error, JoinError::ResultNotDelivered { .. }),
                "{error}"
            );
        }
        let fits = gives_much.start(&100_000).unwrap().join().unwrap();
        assert_eq!(fits.len(), 100_000);
    });
    trial.run(master, &first, &());
}

// ---- kill --------------------------------------------------------------------------------------

fn killed_process_is_told() {
    let trial = Trial::new();
    let (pids, gate) = (Channel::new(), Channel::new());
    let mut master = trial.master();
    let waiter = master.def_process(move |(): ()| {
        pids.send_pid();
        gate.receive()
    });
    let killer = master.def_process(|running: Running<u64>| running.kill().unwrap());
    let suicidal: Process<(), ()> = master.declare();
    master.define(suicidal, move |(): ()| {
        let me = self_process_id().unwrap();
        let _ = suicidal.join_point().running(me).kill();
        // sleep: the process is killed in it.
        std::thread::sleep(Duration::from_secs(100));
    });
    let first = master.def_process(move |(): ()| {
        for _ in 0..20 {
            let running = waiter.start(&()).unwrap();
            let pid = pids.receive_pid();
            until_asleep(pid);
            let kill = killer.start(&running).unwrap();
            let error = running.join().unwrap_err();
            assert!(is_killed_by(SIGKILL, &error), "{error}");
            kill.join().unwrap();
        }
        // One that asks for its own death.
        let suicide: Running<()> = suicidal.start(&()).unwrap();
        let error = suicide.join().unwrap_err();
        assert!(is_killed_by(SIGKILL, &error), "{error}");
    });
    trial.run(master, &first, &());
}

fn kill_of_a_process_that_waits_in_the_queue() {
    let trial = Trial::new();
    let ran = Channel::new();
    let mut master = trial.master().ready_workers(0);
    let child = master.def_process(move |number: u64| ran.send(number));
    let first = master.def_process(move |(): ()| {
        let master = Pid::parent().unwrap();
        // Connects to the master, so that the request below is a single message.
        spawn(|()| (), &()).unwrap().kill().unwrap();
        kill(master, netmcore_sys::signal::SIGSTOP);
        // More than the master forks in one round.
        let all: Vec<_> = (0..300).map(|n| child.start(&n).unwrap()).collect();
        std::thread::scope(|scope| {
            let kill_last = scope.spawn(|| all[299].kill());
            until_others_sleep();
            kill(master, netmcore_sys::signal::SIGCONT);
            kill_last.join().unwrap().unwrap();
        });
        for (number, one) in all.iter().enumerate() {
            match one.join() {
                Ok(()) => {
                    assert!(number < 299, "it was killed");
                    ran.receive();
                }
                Err(error) => {
                    assert_eq!(number, 299, "{error}");
                    assert!(is_killed_by(SIGKILL, &error), "{error}");
                }
            }
        }
        ran.send(1000);
        assert_eq!(ran.receive(), 1000, "it ran though it was killed before");
    });
    trial.run(master, &first, &());
}

fn kill_of_an_ended_process_does_nothing() {
    let trial = Trial::new();
    let pids = Channel::new();
    let mut master = trial.master();
    let quick = master.def_process(move |x: u64| {
        pids.send_pid();
        x
    });
    let first = master.def_process(move |(): ()| {
        let running = quick.start(&5).unwrap();
        until_dead(pids.receive_pid());
        running.kill().unwrap();
        assert_eq!(running.join(), Ok(5));
        running.kill().unwrap();
        let process = running.id();
        assert_eq!(running.join(), Err(JoinError::AlreadyJoined { process }));
        // Kills that come too late hurt nobody who has the slot or the worker's place now.
        for number in 0..200 {
            let one = quick.start(&number).unwrap();
            pids.receive();
            let other = quick.start(&number).unwrap();
            pids.receive();
            let result = one.join();
            one.kill().unwrap();
            assert_eq!(result, Ok(number));
            assert_eq!(other.join(), Ok(number));
        }
    });
    trial.run(master, &first, &());
}

fn kill_of_a_stopped_process() {
    let trial = Trial::new();
    let (pids, gate) = (Channel::new(), Channel::new());
    let mut master = trial.master();
    let waiter = master.def_process(move |(): ()| {
        pids.send_pid();
        gate.receive()
    });
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        let pid = pids.receive_pid();
        kill(pid, netmcore_sys::signal::SIGSTOP);
        until("it is stopped", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.contains(") T ")
        });
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(matches!(
            running.join_deadline(soon),
            Err(JoinError::TimedOut { .. })
        ));
        running.kill().unwrap();
        let error = running.join().unwrap_err();
        assert!(is_killed_by(SIGKILL, &error), "{error}");
    });
    trial.run(master, &first, &());
}

fn failures_are_shown_in_words() {
    in_a_worker(|| {
        let running = spawn(|()| -> u64 { panic!("some words") }, &()).unwrap();
        let error = running.join().unwrap_err();
        let short = error.to_string();
        assert!(short.contains("some words"), "{short}");
        assert!(short.contains(&running.id().to_string()), "{short}");
        assert!(!short.contains('\n'), "one line: {short}");
        let long = format!("{error:#}");
        assert!(long.contains("failures_are_shown_in_words"), "{long}");
        let error = spawn(|()| -> u64 { std::process::exit(3) }, &())
            .unwrap()
            .join()
            .unwrap_err();
        assert!(error.to_string().contains('3'), "{error}");
        let error = spawn(|()| -> u64 { std::process::abort() }, &())
            .unwrap()
            .join()
            .unwrap_err();
        assert!(error.to_string().contains("SIGABRT"), "{error}");
    });
}

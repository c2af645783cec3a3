//! A death at any step leaves the others well. Guards against states that a death leaves behind and nobody
//! recovers from.

mod every_step;
mod trial;

use std::path::Path;
use std::time::{Duration, Instant};

use every_step::{EveryStep, PATIENCE, in_a_child};
use netmcore_pmanage::Log;
use netmcore_proc::{
    JoinError, Master, Process, Running, StartOptions, create_file, join_any, spawn,
};
use netmcore_sys::process::ExitStatus;
use netmcore_sys::signal::SIGKILL;
use trial::is_killed_by;

netmcore_forktest::forktests!(
    crash_with_ready_workers_harms_nobody_else,
    crash_without_ready_workers_harms_nobody_else,
    crash_with_one_ready_worker_harms_nobody_else,
    crash_in_a_small_table_harms_nobody_else,
    crash_with_large_messages_harms_nobody_else,
);

/// What one process panics with in each run.
const EXPECTED: &str = "as it should";

/// How the scenario is run.
#[derive(Clone, Copy)]
struct Setting {
    ready_workers: usize,
    process_limit: usize,
    /// Numbers in each message.
    message_len: u64,
}

/// What a process that did what it was to do returns.
type Outcome<T> = Result<T, JoinError>;

/// Fails unless it is the result, or the process was the victim, or it was started by the victim's hand.
fn check<T: PartialEq + std::fmt::Debug>(outcome: Outcome<T>, expected: &T) -> bool {
    match outcome {
        Ok(result) => {
            assert_eq!(result, *expected);
            true
        }
        Err(error) => {
            assert!(is_killed_by(SIGKILL, &error), "{error}");
            false
        }
    }
}

/// The scenario: starts, joins, detaches, failures and a resource. Whatever dies, everything else must be
/// as expected. Returns how many of those it joined were killed.
fn scenario(dir: &Path, setting: Setting) -> netmcore_proc::Result<u64> {
    let mut master = Master::builder(dir)
        .ready_workers(setting.ready_workers)
        .process_limit(setting.process_limit)
        .grace(Duration::from_secs(5));
    let len = setting.message_len;
    let square = master.def_process(|numbers: Vec<u64>| -> Vec<u64> {
        numbers.iter().map(|number| number * number).collect()
    });
    let panics = master.def_process(|text: String| -> u64 { panic!("{text}") });
    let quick = master.def_process(|x: u64| x);
    let nested = master.def_process(move |x: u64| -> Outcome<u64> {
        let one = quick.start(&x).unwrap();
        let two = quick.start(&(x + 1)).unwrap();
        let (first, result) = join_any(&[one, two]);
        let other = [two, one][first].join();
        Ok(result? + other?)
    });
    let joiner = master.def_process(|running: Running<u64>| running.join());
    let keeps_file = master.def_process(|prefix: std::path::PathBuf| {
        let file = create_file(prefix).unwrap();
        std::fs::write(file.path().unwrap(), b"content").unwrap();
        file.release().unwrap();
    });
    let prefix = dir.join("scratch-");
    let first: Process<(), u64> = master.def_process(move |(): ()| {
        let mut killed = 0;
        let mut note = |is_well: bool| killed += u64::from(!is_well);
        let numbers: Vec<u64> = (0..len).collect();
        let squares: Vec<u64> = numbers.iter().map(|number| number * number).collect();
        let one = square.start(&numbers).unwrap();
        let two = square.start(&numbers).unwrap();
        note(check(one.join(), &squares));
        note(check(two.join(), &squares));
        // A failure of its own.
        let failed = panics.start(&EXPECTED.to_owned()).unwrap();
        match failed.join() {
            Err(JoinError::Panicked { message, .. }) => assert_eq!(message, EXPECTED),
            other => note(check(other, &0)),
        }
        // Two levels, and a wait for whichever ends first.
        // Children that the victim leaves unjoined keep their slots, so not where each one counts.
        if setting.process_limit > 16 {
            match nested.start(&20).unwrap().join() {
                Ok(inner) => note(check(inner, &41)),
                Err(error) => note(check::<u64>(Err(error), &0)),
            }
        }
        // Detached at the start, while it runs or is done, and joined by another.
        let limited = StartOptions::new().time_limit(Duration::from_secs(100));
        quick.start_detached(&1).unwrap();
        quick.start_with(&2, limited).unwrap().detach().unwrap();
        let running = quick.start(&3).unwrap();
        match joiner.start(&running).unwrap().join() {
            Ok(result) => note(check(result, &3)),
            Err(error) => {
                // The joiner died; the result is there, unless it died in the middle of taking it.
                note(check::<u64>(Err(error), &0));
                match running.join() {
                    Err(JoinError::AlreadyJoined { .. }) => {}
                    other => note(check(other, &3)),
                }
            }
        }
        note(check(keeps_file.start(&prefix).unwrap().join(), &()));
        // As many as fit: no slot is lost. Those of the detached become free as they end.
        let room = setting.process_limit.min(8) as u64 - 1;
        let start = Instant::now();
        loop {
            let all: Vec<_> = (0..room)
                .map_while(|x| spawn(|x: u64| x + 1, &x).ok())
                .collect();
            for (x, one) in all.iter().enumerate() {
                note(check(one.join(), &(x as u64 + 1)));
            }
            if all.len() as u64 == room {
                break;
            }
            assert!(start.elapsed() < PATIENCE / 3, "a slot is lost");
        }
        killed
    });
    master.run(&first, &())
}

/// In a child: the next start on the directory works, and nothing is left of what was.
fn next_start(dir: &Path) {
    let status = in_a_child(|| {
        let mut master = Master::builder(dir);
        let first = master.def_process(|x: u64| spawn(|x: u64| x * x, &x).unwrap().join());
        assert_eq!(master.run(&first, &7).unwrap(), Ok(49));
    });
    assert_eq!(status, ExitStatus::Exited { code: 0 }, "the next start");
    assert_eq!(Log::open(dir).unwrap().registered().unwrap(), []);
    for entry in std::fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name();
        let name = name.to_string_lossy();
        assert!(!name.starts_with("scratch-"), "{name} is left");
    }
}

fn crash_everywhere(setting: Setting) {
    let every_step = EveryStep {
        scenario: &|dir| scenario(dir, setting),
        first: 1,
        stride: 1,
        least: 50,
        is_expected: |text| text == EXPECTED,
        next_start,
    };
    let deaths = every_step.run();
    for place in [
        "proc.control.queue",
        "proc.control.deliver",
        "proc.control.collect",
    ] {
        assert!(deaths.contains_key(place), "nobody died at {place}");
    }
}

fn crash_with_ready_workers_harms_nobody_else() {
    let setting = Setting {
        ready_workers: 2,
        process_limit: 64,
        message_len: 100,
    };
    crash_everywhere(setting);
}

fn crash_without_ready_workers_harms_nobody_else() {
    let setting = Setting {
        ready_workers: 0,
        process_limit: 64,
        message_len: 10,
    };
    crash_everywhere(setting);
}

fn crash_with_one_ready_worker_harms_nobody_else() {
    let setting = Setting {
        ready_workers: 1,
        process_limit: 64,
        message_len: 1000,
    };
    crash_everywhere(setting);
}

fn crash_in_a_small_table_harms_nobody_else() {
    let setting = Setting {
        ready_workers: 2,
        process_limit: 8,
        message_len: 1,
    };
    crash_everywhere(setting);
}

fn crash_with_large_messages_harms_nobody_else() {
    let setting = Setting {
        ready_workers: 2,
        process_limit: 64,
        message_len: 100_000,
    };
    crash_everywhere(setting);
}

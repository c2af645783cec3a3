//! A scenario that is run once to count the crash points that all its processes pass, and then once for each of them, where whoever
//! passes it dies, be it a worker or the master.
//!
//! # Safety
//! The test process is a program with one thread that forks children which only run a master and end.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use netmcore_proc::{Error, Result};
use netmcore_sys::crash;
use netmcore_sys::process::{self, ExitStatus, Forked, PidFd};
use netmcore_sys::signal::SIGKILL;

use crate::trial::{Trial, is_killed_by};

/// Longer than anything here takes, deaths included.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A scenario, and what is true of it.
pub struct EveryStep<'a> {
    /// A run in this directory; returns how many of its processes were killed.
    pub scenario: &'a dyn Fn(&Path) -> Result<u64>,
    /// The first point that somebody dies at, and how many points further the next. Who passes which point when differs from run to
    /// run, so all of them are met by a part of the steps.
    pub first: u64,
    pub stride: u64,
    /// How many points there are at least.
    pub least: u64,
    /// Whether a panic with this text belongs to the scenario; others are shown.
    pub is_expected: fn(&str) -> bool,
    /// Shows that all is well in the directory, and leaves nothing there. Called in a child, now and then and after the death of each master.
    pub next_start: fn(&Path),
}

impl EveryStep<'_> {
    /// Returns where how many have died.
    pub fn run(&self) -> BTreeMap<String, u64> {
        let trial = Trial::new();
        let show = std::panic::take_hook();
        let is_expected = self.is_expected;
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload().downcast_ref::<String>();
            if text.is_none_or(|text| !is_expected(text)) {
                show(info);
            }
        }));
        let run = |die_at: Option<u64>| {
            crash::arm(die_at);
            let status = in_a_child(|| {
                let outcome = (self.scenario)(trial.dir());
                crash::disarm();
                match outcome {
                    Ok(killed) => {
                        let died = u64::from(crash::died_at().is_some());
                        assert!(killed <= died, "{killed} were killed");
                        trial.check_nothing_is_left();
                    }
                    // The first process itself.
                    Err(Error::FirstProcess(error)) => {
                        assert!(is_killed_by(SIGKILL, &error), "{error:#}");
                        trial.check_nothing_is_left();
                    }
                    Err(error) => panic!("{error}"),
                }
            });
            crash::disarm();
            status
        };
        assert_eq!(run(None), ExitStatus::Exited { code: 0 });
        let count = crash::passed();
        assert!(count > self.least, "only {count} crash points");
        let mut deaths: BTreeMap<String, u64> = BTreeMap::new();
        let mut masters = 0;
        for (number, step) in (self.first..=count)
            .step_by(self.stride as usize)
            .enumerate()
        {
            let status = run(Some(step));
            let place = crash::died_at();
            if let Some(place) = &place {
                *deaths.entry(place.clone()).or_default() += 1;
            }
            match status {
                ExitStatus::Exited { code: 0 } => {}
                ExitStatus::Signaled {
                    signal: SIGKILL, ..
                } if place.is_some() => masters += 1,
                status => panic!("{status} at step {step}: {place:?}"),
            }
            if status != (ExitStatus::Exited { code: 0 }) || number % 10 == 0 {
                (self.next_start)(trial.dir());
            }
        }
        (self.next_start)(trial.dir());
        eprintln!("{count} points, the master died {masters} times: {deaths:#?}");
        assert!(masters > 0, "the master never died");
        deaths
    }
}

/// Forks a child that does `body` and ends with code 0, or with 101 if it panics.
pub fn in_a_child(body: impl FnOnce()) -> ExitStatus {
    // SAFETY: this process has one thread, so its memory is as good in the child.
    let pid = match unsafe { process::fork() }.unwrap() {
        Forked::Child => {
            let outcome = catch_unwind(AssertUnwindSafe(body));
            process::exit_now(if outcome.is_ok() { 0 } else { 101 });
        }
        Forked::Parent(pid) => pid,
    };
    let child = PidFd::open(pid).unwrap();
    let start = Instant::now();
    loop {
        if let Some(status) = child.wait_nonblocking().unwrap() {
            return status;
        }
        if start.elapsed() > PATIENCE {
            show_processes();
            let _ = child.send_signal(SIGKILL);
            panic!("it hangs; somebody died at {:?}", crash::died_at());
        }
        // sleep: between two looks at the child; how long does not matter.
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// What a hang looks like.
fn show_processes() {
    let shown = std::process::Command::new("ps")
        .args(["-eo", "pid,ppid,stat,wchan:20,args"])
        .output();
    if let Ok(shown) = shown {
        eprintln!("{}", String::from_utf8_lossy(&shown.stdout));
    }
}

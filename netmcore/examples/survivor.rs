//! Starts processes that come to a bad end, each in its own way, and goes on.
//!
//! Shows what the joiner of a process is told when it panics, crashes, ends itself, needs more memory or time than it may
//! have, or is killed, and that neither the program nor any other process suffers.
//!
//! Run it with `cargo run --example survivor`. What the processes themselves print (a panic's message, for one) goes to
//! standard error, as ever.

#![allow(clippy::print_stdout)]

mod command_line;

use std::process::ExitCode;

use netmcore::prelude::*;
use netmcore::sys::process::{Limit, Resource, get_limit, set_limit};
use netmcore::sys::signal::{SIGSEGV, raise_default};
use serde::{Deserialize, Serialize};

const USAGE: &str = "\
Usage: survivor [OPTIONS]

Starts processes that panic, crash, exit, take too much memory or time, or are killed, and prints what became of each.

Options:
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

/// What a process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Fate {
    Works,
    Panics,
    Segfaults,
    Aborts,
    Exits,
    EatsMemory,
    Hangs,
    IsKilled,
}

const FATES: [Fate; 9] = [
    Fate::Works,
    Fate::Panics,
    Fate::Segfaults,
    Fate::Aborts,
    Fate::Exits,
    Fate::EatsMemory,
    Fate::Hangs,
    Fate::IsKilled,
    Fate::Works,
];

const MEMORY_LIMIT_BYTES: u64 = 64 * 1024 * 1024;
const TIME_LIMIT: Duration = Duration::from_millis(500);

/// What the starter learns of one process.
#[derive(Serialize, Deserialize)]
struct Outcome {
    fate: Fate,
    /// What it returned, or what became of it instead.
    result: Result<String, String>,
}

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |_| Ok(()),
        |directory, ()| {
            tell(&meet_their_fates(directory)?);
            Ok(())
        },
    )
}

fn tell(outcomes: &[Outcome]) {
    for Outcome { fate, result } in outcomes {
        // The error names the process and says what became of it.
        let what_became_of_it = result.as_ref().unwrap_or_else(|error| error);
        println!("{:<10}  {what_became_of_it}", format!("{fate:?}"));
    }
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.result.is_err())
        .count();
    println!(
        "{} processes: {} returned, {failed} failed, the program survived",
        outcomes.len(),
        outcomes.len() - failed
    );
}

fn meet_their_fates(directory: &Path) -> netmcore::Result<Vec<Outcome>> {
    let mut master = Master::builder(directory);
    let process = master.def_process(meet);
    let all = master.def_process(move |()| -> Vec<Outcome> {
        let mut running = Vec::new();
        for fate in &FATES {
            let options = match fate {
                Fate::EatsMemory => StartOptions::new().memory_limit(MEMORY_LIMIT_BYTES),
                Fate::Hangs => StartOptions::new().time_limit(TIME_LIMIT),
                _ => StartOptions::new(),
            };
            running.push(process.start_with(fate, options).unwrap());
        }
        let mut outcomes = Vec::new();
        for (&fate, process) in FATES.iter().zip(running) {
            if fate == Fate::IsKilled {
                process.kill().unwrap();
            }
            let result = match process.join() {
                Ok(number) => Ok(format!("{} returned {number}", process.id())),
                Err(error) => Err(error.to_string()),
            };
            outcomes.push(Outcome { fate, result });
        }
        outcomes
    });
    master.run(&all, &())
}

/// The process: does what it is told.
fn meet(fate: Fate) -> u64 {
    leave_no_core_file();
    match fate {
        Fate::Works => (1..=100).sum(),
        Fate::Panics => panic!("this process was told to panic"),
        Fate::Segfaults => segfault(),
        Fate::Aborts => std::process::abort(),
        Fate::Exits => std::process::exit(3),
        Fate::EatsMemory => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(std::hint::black_box(vec![1_u8; 1024 * 1024]));
            }
        }
        Fate::Hangs | Fate::IsKilled => loop {
            std::thread::park();
        },
    }
}

/// Crashes are meant here, and need not be examined.
fn leave_no_core_file() {
    let hard = get_limit(Resource::CoreBytes).expect("it can be read").hard;
    set_limit(
        Resource::CoreBytes,
        Limit {
            soft: Some(0),
            hard,
        },
    )
    .expect("it can be lowered");
}

/// Dies as one does who follows a stray pointer, but without one.
fn segfault() -> ! {
    raise_default(SIGSEGV).expect("this process can always signal itself");
    unreachable!("SIGSEGV kills by default")
}

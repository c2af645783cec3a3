//! Counts in a hash map that all processes share while some of them are killed, and shows that the totals still add up.
//!
//! Each value of the map is a total and the part that each process has added to it. A process changes both in one step, as others see it, so
//! whoever is killed at whatever moment leaves a value in which the parts add up to the total. Besides, each process notes what it has finished:
//! the map may have one step more for one that was killed between the two, and never less.
//!
//! Run it with `cargo run --release --example counters`.

#![allow(clippy::print_stdout)]

mod command_line;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use netmcore::prelude::*;

const USAGE: &str = "\
Usage: counters [OPTIONS]

Lets processes count in a shared hash map, kills some of them, and checks the totals.

Options:
  --steps N               how often each process counts (default 20000)
  --kill N                how many of the 8 processes to kill (default 3)
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

const PROCESSES: usize = 8;
const KEYS: u64 = 100;

/// What was counted for one key: in all, and by each process.
#[derive(Clone, Copy, Debug, Default, ShmSafe)]
struct Count {
    total: u64,
    by: [u64; PROCESSES],
}

type Counts = ShmArc<ShmHashMap<u64, Count>>;
/// How many steps each process has finished.
type Finished = ShmArc<[AtomicU64; PROCESSES]>;

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |line| {
            let steps: u64 = line.number("--steps", ..)?.unwrap_or(20_000);
            let kill = line.number("--kill", ..=PROCESSES)?.unwrap_or(3);
            Ok((steps, kill))
        },
        |directory, (steps, kill)| Ok(count(directory, steps, kill)??),
    )
}

fn count(
    directory: &Path,
    steps: u64,
    kill: usize,
) -> netmcore::Result<std::result::Result<(), String>> {
    let mut master = Master::builder(directory);

    let counter = master.def_process(
        move |(number, counts, finished): (usize, Counts, Finished)| {
            for step in 0..steps {
                let key = (step * 31 + number as u64 * 17) % KEYS;
                let count_up = |count: Option<&Count>| {
                    let mut count = count.copied().unwrap_or_default();
                    count.total += 1;
                    count.by[number] += 1;
                    Some(count)
                };
                counts.update(key, count_up).unwrap();
                finished[number].fetch_add(1, Ordering::Relaxed);
            }
        },
    );

    let all = master.def_process(move |()| -> std::result::Result<(), String> {
        let heap = netmcore::shared_heap().unwrap();
        let counts: Counts = ShmArc::new_in(&heap, ShmHashMap::new_in(&heap).unwrap()).unwrap();
        let finished: Finished =
            ShmArc::new_in(&heap, [const { AtomicU64::new(0) }; PROCESSES]).unwrap();
        let running: Vec<Running<()>> = (0..PROCESSES)
            .map(|number| {
                let argument = (number, counts.clone(), finished.clone());
                counter.start(&argument).unwrap()
            })
            .collect();

        // Each of them in the middle of its work, if it is not too quick.
        let mut outcomes = [const { None }; PROCESSES];
        for (number, victim) in running.iter().enumerate().take(kill) {
            let middle = steps * (number as u64 + 1) / (kill as u64 + 1);
            while finished[number].load(Ordering::Relaxed) < middle && outcomes[number].is_none() {
                std::thread::yield_now();
                // Others may kill as well.
                outcomes[number] = victim.join_nowait().transpose();
            }
            victim.kill().unwrap();
        }

        let mut killed = [false; PROCESSES];
        for (number, process) in running.into_iter().enumerate() {
            match outcomes[number].take().unwrap_or_else(|| process.join()) {
                Ok(()) => {}
                Err(JoinError::Killed { .. }) => killed[number] = true,
                Err(error) => panic!("{error}"),
            }
        }
        check(&counts, &finished, &killed)
    });

    master.run(&all, &())
}

/// Adds up what is in the map.
fn check(
    counts: &Counts,
    finished: &Finished,
    killed: &[bool; PROCESSES],
) -> std::result::Result<(), String> {
    counts.verify().map_err(|error| error.to_string())?;
    let mut total = 0;
    let mut by = [0; PROCESSES];
    for entry in counts.iter() {
        let parts: u64 = entry.by.iter().sum();
        if parts != entry.total {
            return Err(format!(
                "key {}: the parts are {parts} together, the total is {}",
                entry.key(),
                entry.total
            ));
        }
        total += entry.total;
        by.iter_mut()
            .zip(entry.by)
            .for_each(|(sum, part)| *sum += part);
    }
    for (number, &counted) in by.iter().enumerate() {
        let finished = finished[number].load(Ordering::Relaxed);
        let is_right = counted == finished || killed[number] && counted == finished + 1;
        let fate = if killed[number] { "killed" } else { "finished" };
        println!("process {number} counted {counted:>6}, then it was {fate}");
        if !is_right {
            return Err(format!(
                "process {number} has finished {finished} steps, and the map has {counted}"
            ));
        }
    }
    println!("{total} in all, in {} keys: it adds up", counts.len());
    Ok(())
}

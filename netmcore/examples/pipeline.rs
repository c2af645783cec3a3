//! Finds the number below a limit that begins the longest Collatz sequence, by three stages of processes that queues connect.
//!
//! ```text
//! source ──ranges──► explorers ──candidates──► judge
//! ```
//!
//! The source cuts the numbers into ranges, each explorer (one for each core) walks the sequences of one range after the other, and the judge keeps
//! the best. Both queues are bounded, so a stage that is faster than the next one waits for it. Each process enrols with the queues that it uses: a
//! queue closes when all who fill it are gone, and who was killed among them is known at its end.
//!
//! Run it with `cargo run --release --example pipeline`.

#![allow(clippy::print_stdout)]

mod command_line;

use std::ops::Range;
use std::process::ExitCode;

use netmcore::prelude::*;
use serde::{Deserialize, Serialize};

const USAGE: &str = "\
Usage: pipeline [OPTIONS]

Finds the number that begins the longest Collatz sequence, by stages of processes connected by queues.

Options:
  --limit N               look at the numbers below N (default 1000000)
  --explorers N           how many processes walk sequences (default: one for each processor)
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

/// Numbers that one explorer takes at a time.
const RANGE_LEN: u64 = 10_000;
/// How many elements wait in a queue at most.
const QUEUE_LEN: usize = 16;

/// A number, and how many steps lead from it to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ShmSafe, Serialize, Deserialize)]
struct Sequence {
    start: u64,
    steps: u32,
}

type Ranges = ShmArc<ShmQueue<Range<u64>>>;
type Candidates = ShmArc<ShmQueue<Sequence>>;

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |line| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            let limit: u64 = line.number("--limit", 2..)?.unwrap_or(1_000_000);
            let explorers = line.number("--explorers", 1..)?.unwrap_or(processors);
            Ok((limit, explorers))
        },
        |directory, (limit, explorers)| Ok(pipeline(directory, limit, explorers)?),
    )
}

fn pipeline(directory: &Path, limit: u64, explorer_count: usize) -> netmcore::Result<()> {
    let mut master = Master::builder(directory);

    let source = master.def_process(move |ranges: Ranges| {
        let ranges = ranges.producer().unwrap();
        for start in (1..limit).step_by(RANGE_LEN as usize) {
            ranges.push(start..limit.min(start + RANGE_LEN)).unwrap();
        }
    });

    let explorer = master.def_process(|(ranges, candidates): (Ranges, Candidates)| -> u64 {
        let ranges = ranges.consumer().unwrap();
        let candidates = candidates.producer().unwrap();
        let mut explored = 0;
        while let Some(range) = next(&ranges) {
            explored += range.end - range.start;
            let longest = range
                .map(|start| Sequence {
                    start,
                    steps: steps(start),
                })
                .reduce(better);
            if let Some(longest) = longest {
                candidates.push(longest).unwrap();
            }
        }
        explored
    });

    let judge = master.def_process(|candidates: Candidates| -> Sequence {
        let mut best = Sequence { start: 1, steps: 0 };
        while let Some(candidate) = next(&candidates) {
            best = better(best, candidate);
        }
        best
    });

    let all = master.def_process(move |()| {
        let heap = netmcore::shared_heap().unwrap();
        let ranges: Ranges =
            ShmArc::new_in(&heap, ShmQueue::bounded_in(&heap, QUEUE_LEN).unwrap()).unwrap();
        let candidates: Candidates =
            ShmArc::new_in(&heap, ShmQueue::bounded_in(&heap, QUEUE_LEN).unwrap()).unwrap();
        // When so many have come and gone, the queue is closed.
        ranges.producers(1).unwrap();
        ranges.consumers(explorer_count).unwrap();
        candidates.producers(explorer_count).unwrap();

        let judge = judge.start(&candidates).unwrap();
        let explorers: Vec<Running<u64>> = (0..explorer_count)
            .map(|_| {
                explorer
                    .start(&(ranges.clone(), candidates.clone()))
                    .unwrap()
            })
            .collect();
        source.start(&ranges).unwrap().join().unwrap();

        for (number, explorer) in explorers.into_iter().enumerate() {
            let explored = explorer.join().unwrap();
            println!("explorer {number} walked from {explored} numbers");
        }
        let best = judge.join().unwrap();
        println!(
            "the longest sequence below {limit} begins with {}: {} steps",
            best.start, best.steps
        );
    });

    master.run(&all, &())
}

/// The next element; `None` when all who could push one have ended well.
fn next<T: ShmSafe>(queue: &ShmQueue<T>) -> Option<T> {
    match queue.pop() {
        Ok(element) => Some(element),
        Err(PopError::Closed(closed)) if closed.died.is_empty() => None,
        Err(error) => panic!("{error}"),
    }
}

fn better(one: Sequence, other: Sequence) -> Sequence {
    let key = |sequence: &Sequence| (sequence.steps, std::cmp::Reverse(sequence.start));
    std::cmp::max_by_key(one, other, key)
}

/// How many steps lead to 1: half of an even number, thrice an odd one and 1 more.
fn steps(mut number: u64) -> u32 {
    let mut steps = 0;
    while number != 1 {
        number = match number % 2 {
            0 => number / 2,
            _ => 3 * number + 1,
        };
        steps += 1;
    }
    steps
}

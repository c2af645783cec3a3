//! Guards against sequences that nobody thought of: the pool against a list of runs, with death as one of the operations.
//!
//! `NETMCORE_SEED` and `NETMCORE_CASES` replay and lengthen it.
//!
//! # Safety
//!
//! Each run has one user.

#![allow(unsafe_code)]

mod pool_ground;
mod support;

use netmcore_shm::{Error, PoolRef};
use netmcore_sys::{crash, process};
use pool_ground::{Ground, PAGE, check, fill, free, free_all};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use support::{fork, number};

#[derive(Clone, Debug)]
enum Op {
    Take {
        page_count: usize,
    },
    /// Frees the run at this place of the list, modulo its length.
    Free {
        which: usize,
    },
    /// Frees an address inside of it, which is refused.
    FreeInside {
        which: usize,
    },
    /// Gives it another note, as the layer above does for runs of the dead.
    Note {
        which: usize,
        note: u64,
    },
    Trim,
    Reclaim,
    /// Another process does this, on runs of its own, and is killed at its `at`th crash point, if it gets so far. What it had is freed
    /// at once, or stays until the next of these.
    Die {
        ops: Vec<Op>,
        at: u64,
        is_settled: bool,
    },
}

/// A run as the oracle knows it.
#[derive(Clone, Copy)]
struct Known {
    at: NonNull<u8>,
    page_count: usize,
    note: u64,
    /// What is written in it.
    filled: u64,
}

/// The oracle: who has what, in the order of addresses where it matters.
#[derive(Default)]
struct Runs(Vec<Known>);

impl Runs {
    /// The longest stretch of pages, among `total`, that no run has; and all of them.
    fn free_pages(&self, pool: PoolRef) -> (usize, usize) {
        let total = (pool.stats().total_bytes / PAGE as u64) as usize;
        let end_of_all = pool.address() + end_offset(pool);
        let start_of_all = end_of_all - total * PAGE;
        let mut ranges: Vec<(usize, usize)> = self
            .0
            .iter()
            .map(|run| (run.at.as_ptr().addr(), run.page_count * PAGE))
            .collect();
        ranges.push((end_of_all, 0));
        ranges.sort_unstable();
        let (mut from, mut largest, mut free) = (start_of_all, 0, 0);
        for (at, len) in ranges {
            let gap = at.checked_sub(from).expect("runs do not overlap");
            largest = largest.max(gap / PAGE);
            free += gap / PAGE;
            from = at + len;
        }
        (largest, free)
    }
}

/// Where the last page ends: the pool's length, less what is no whole page.
fn end_offset(pool: PoolRef) -> usize {
    // The pages begin where the first run of an empty pool does, and that was found out before.
    FIRST_PAGE.load(Ordering::Relaxed) + pool.stats().total_bytes as usize
}

static FIRST_PAGE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Some 12 MiB of pages, so that it gets full, and free pages do not all keep their memory.
const MAX_LEN_BYTES: usize = 40 << 20;
/// The note of the living, and of runs of whoever is dead and not settled.
const LIVING: u64 = 1;
const DEAD: u64 = 2;

fn page_count() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 1..3_usize,
        3 => 1..20_usize,
        2 => 20..150_usize,
        1 => 150..650_usize,
    ]
}

fn simple_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => page_count().prop_map(|page_count| Op::Take { page_count }),
        8 => any::<usize>().prop_map(|which| Op::Free { which }),
        1 => any::<usize>().prop_map(|which| Op::FreeInside { which }),
        1 => (any::<usize>(), 10..1_000_u64).prop_map(|(which, note)| Op::Note { which, note }),
        1 => Just(Op::Trim),
        1 => Just(Op::Reclaim),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        15 => simple_op(),
        1 => (prop::collection::vec(simple_op(), 1..12), 1..120_u64, any::<bool>())
            .prop_map(|(ops, at, is_settled)| Op::Die { ops, at, is_settled }),
    ]
}

fn pool_matches_list_of_runs() {
    let seed = number("NETMCORE_SEED").unwrap_or_else(process::random_u64);
    let cases = number("NETMCORE_CASES").unwrap_or(60);
    eprintln!("replay: NETMCORE_SEED={seed} NETMCORE_CASES={cases}");
    let mut runner = TestRunner::new(Config {
        cases: cases as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    });
    let checked = runner.run(&prop::collection::vec(op(), 1..100), |ops| {
        let ground = Ground::new(MAX_LEN_BYTES);
        let pool = ground.pool.pool();
        let first = pool.alloc_run(1).unwrap();
        FIRST_PAGE.store(first.as_ptr().addr() - pool.address(), Ordering::Relaxed);
        // SAFETY: nobody uses it.
        unsafe { pool.free_run(first) }.unwrap();
        let mut runs = Runs::default();
        for op in ops {
            match op {
                Op::Die {
                    ops,
                    at,
                    is_settled,
                } => die(pool, &mut runs, ops, at, is_settled),
                op => apply(pool, &mut runs, op, LIVING, true),
            }
            check_all(pool, &runs);
        }
        for run in runs.0 {
            free(pool, run.at, run.filled);
        }
        ground.check_whole();
        Ok(())
    });
    if let Err(failure) = checked {
        panic!("{failure}");
    }
}

/// Does it. If `is_alone`, the runs are all there are, so that it is known what must be possible.
fn apply(pool: PoolRef, runs: &mut Runs, op: Op, note: u64, is_alone: bool) {
    let place = |which: usize, runs: &Runs| (!runs.0.is_empty()).then(|| which % runs.0.len());
    match op {
        Op::Take { page_count } => match pool.alloc_run_noted(page_count, note) {
            Ok(at) => {
                fill(at, page_count * PAGE, note);
                runs.0.push(Known {
                    at,
                    page_count,
                    note,
                    filled: note,
                });
            }
            Err(Error::OutOfPoolMemory {
                free_bytes,
                largest_free_bytes,
                ..
            }) => {
                assert!(largest_free_bytes < (page_count * PAGE) as u64);
                if is_alone {
                    let (largest, free) = runs.free_pages(pool);
                    assert_eq!(largest_free_bytes, (largest * PAGE) as u64);
                    assert_eq!(free_bytes, (free * PAGE) as u64);
                }
            }
            Err(other) => panic!("{other}"),
        },
        Op::Free { which } => {
            if let Some(place) = place(which, runs) {
                let run = runs.0.swap_remove(place);
                free(pool, run.at, run.filled);
            }
        }
        Op::FreeInside { which } => {
            if let Some(place) = place(which, runs) {
                let Known { at, page_count, .. } = runs.0[place];
                let inside = [
                    1,
                    PAGE / 2,
                    (page_count - 1) * PAGE + 8,
                    page_count * PAGE - 1,
                ];
                for offset in inside {
                    let inside = NonNull::new(at.as_ptr().wrapping_add(offset)).unwrap();
                    // SAFETY: it is refused.
                    assert!(unsafe { pool.free_run(inside) }.is_err());
                }
            }
        }
        Op::Note { which, note } => {
            if let Some(place) = place(which, runs) {
                let run = &mut runs.0[place];
                let word = pool.note(run.at.as_ptr()).unwrap();
                let swapped =
                    word.compare_exchange(run.note, note, Ordering::AcqRel, Ordering::Relaxed);
                assert_eq!(swapped, Ok(run.note));
                run.note = note;
            }
        }
        Op::Trim => {
            pool.trim();
        }
        Op::Reclaim => {
            pool.reclaim_dead();
        }
        Op::Die { .. } => {}
    }
}

/// Another process works on the pool with runs of its own, and is gone.
fn die(pool: PoolRef, runs: &mut Runs, ops: Vec<Op>, at: u64, is_settled: bool) {
    crash::arm(Some(at));
    fork(|| {
        let mut own = Runs::default();
        for op in ops {
            // Notes stay as they are: they say what to free.
            if !matches!(op, Op::Note { .. }) {
                apply(pool, &mut own, op, DEAD, false);
            }
        }
    })
    .ended_well();
    crash::disarm();
    pool.verify().unwrap();
    if is_settled {
        free_all(pool, DEAD);
    }
    // What it had in use is there, with the dead one's note, and has its length.
    runs.0.retain(|run| run.note != DEAD);
    let theirs = pool.runs().filter(|run| run.note == DEAD);
    for run in theirs {
        fill(run.at, run.len_bytes, DEAD);
        runs.0.push(Known {
            at: run.at,
            page_count: run.len_bytes / PAGE,
            note: DEAD,
            filled: DEAD,
        });
    }
}

fn check_all(pool: PoolRef, runs: &Runs) {
    pool.verify().unwrap();
    let mut found: Vec<_> = pool
        .runs()
        .map(|run| (run.at, run.len_bytes / PAGE, run.note))
        .collect();
    let mut known: Vec<_> = runs
        .0
        .iter()
        .map(|run| (run.at, run.page_count, run.note))
        .collect();
    found.sort_unstable();
    known.sort_unstable();
    assert_eq!(found, known);
    for run in &runs.0 {
        check(run.at, run.page_count * PAGE, run.filled);
        let last = run.at.as_ptr().wrapping_add(run.page_count * PAGE - 1);
        assert_eq!(pool.run_at(last).map(|found| found.at), Some(run.at));
    }
    let in_use: usize = runs.0.iter().map(|run| run.page_count * PAGE).sum();
    let stats = pool.stats();
    // Runs that the dead were taking or freeing are in use, until somebody looks.
    assert!(stats.in_use_bytes >= in_use as u64);
    assert_eq!(stats.in_use_bytes + stats.free_bytes, stats.total_bytes);
}

netmcore_forktest::forktests!(pool_matches_list_of_runs);

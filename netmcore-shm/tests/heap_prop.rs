//! Guards against sequences that nobody thought of: the heap against a list of blocks, with death as one of the operations.
//!
//! `NETMCORE_SEED` and `NETMCORE_CASES` replay and lengthen it.

mod support;

use netmcore_shm::{Block, Error};
use netmcore_sys::{crash, process};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use support::{Person, World, fork, number, tag};

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        len: usize,
        of: u64,
    },
    /// Frees the block at this place of the list, modulo its length.
    Free {
        which: usize,
    },
    /// Frees it under another tag: nothing may happen.
    FreeAsAnother {
        which: usize,
    },
    FreeAll {
        of: u64,
    },
    /// Another process does this and is killed at its `at`th crash point, if it gets so far.
    Die {
        ops: Vec<Op>,
        at: u64,
    },
}

/// The oracle: who has what.
#[derive(Default)]
struct Blocks(Vec<(Block, u64)>);

impl Blocks {
    fn of(&self, of: u64) -> usize {
        self.0.iter().filter(|(_, owner)| *owner == of).count()
    }
}

/// Some 7 MiB of blocks, so that it gets full.
const HEAP_LEN_BYTES: usize = 8 << 20;
/// The dead one's tags are these above the living one's.
const OF_THE_DEAD: u64 = 100;

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0..700_usize,
        3 => 700..33_000_usize,
        2 => 33_000..400_000_usize,
        1 => 400_000..5_000_000_usize,
    ]
}

fn simple_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (len(), 1..4_u64).prop_map(|(len, of)| Op::Alloc { len, of }),
        3 => any::<usize>().prop_map(|which| Op::Free { which }),
        1 => any::<usize>().prop_map(|which| Op::FreeAsAnother { which }),
        1 => (1..4_u64).prop_map(|of| Op::FreeAll { of }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => simple_op(),
        1 => (prop::collection::vec(simple_op(), 1..20), 1..80_u64)
            .prop_map(|(ops, at)| Op::Die { ops, at }),
    ]
}

fn heap_matches_list_of_blocks() {
    let seed = number("NETMCORE_SEED").unwrap_or_else(process::random_u64);
    let cases = number("NETMCORE_CASES").unwrap_or(60);
    eprintln!("replay: NETMCORE_SEED={seed} NETMCORE_CASES={cases}");
    let mut runner = TestRunner::new(Config {
        cases: cases as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    });
    let checked = runner.run(&prop::collection::vec(op(), 1..120), |ops| {
        let world = World::new(HEAP_LEN_BYTES);
        let person = world.person(1, 1);
        let mut blocks = Blocks::default();
        let mut generation = 0;
        for op in ops {
            match op {
                Op::Die { ops, at } => {
                    generation += 1;
                    die(person, generation, ops, at);
                }
                op => apply(person, &mut blocks, op, 0),
            }
            check(&world, &blocks);
        }
        for of in 1..4 {
            assert_eq!(world.heap.free_all(tag(of)), blocks.of(of));
        }
        world.check_whole(person);
        Ok(())
    });
    if let Err(failure) = checked {
        panic!("{failure}");
    }
}

fn apply(person: Person<'_>, blocks: &mut Blocks, op: Op, tags_from: u64) {
    let world = person.world;
    match op {
        Op::Alloc { len, of } => {
            let of = tags_from + of;
            match world.heap.alloc(len, tag(of), &person) {
                Ok(block) => {
                    assert_eq!(block.len, len as u64);
                    assert!(block.offset + block.len <= HEAP_LEN_BYTES as u64);
                    world.fill(block, of);
                    blocks.0.push((block, of));
                }
                Err(Error::OutOfPoolMemory {
                    largest_free_bytes, ..
                }) => assert!(largest_free_bytes < len.max(65_536) as u64),
                Err(other) => panic!("{other}"),
            }
        }
        Op::Free { which } if !blocks.0.is_empty() => {
            let (block, of) = blocks.0.swap_remove(which % blocks.0.len());
            world.check(block, of);
            assert!(world.heap.free(block, tag(of)));
            assert!(!world.heap.free(block, tag(of)));
        }
        Op::FreeAsAnother { which } if !blocks.0.is_empty() => {
            let (block, of) = blocks.0[which % blocks.0.len()];
            assert!(!world.heap.free(block, tag(of + 50)));
        }
        Op::FreeAll { of } => {
            let of = tags_from + of;
            assert_eq!(world.heap.free_all(tag(of)), blocks.of(of));
            blocks.0.retain(|(_, owner)| *owner != of);
        }
        Op::Free { .. } | Op::FreeAsAnother { .. } | Op::Die { .. } => {}
    }
}

/// Another process works on the heap with tags of its own, and is gone.
fn die(person: Person<'_>, generation: u32, ops: Vec<Op>, at: u64) {
    let world = person.world;
    let mortal = world.person(2, generation);
    // Tags are never used again.
    let tags_from = OF_THE_DEAD * u64::from(generation);
    crash::arm(Some(at));
    fork(|| {
        let mut blocks = Blocks::default();
        for op in ops {
            apply(mortal, &mut blocks, op, tags_from);
        }
    })
    .ended_well();
    crash::disarm();
    world.settle_death(mortal.id);
    for of in 1..4 {
        world.heap.free_all(tag(tags_from + of));
    }
}

fn check(world: &World, blocks: &Blocks) {
    world.heap.verify().unwrap();
    assert_eq!(world.heap.stats().in_use_blocks, blocks.0.len() as u64);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &(block, of) in &blocks.0 {
        world.check(block, of);
        ranges.push((block.offset, block.offset + block.len.max(1)));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
}

netmcore_forktest::forktests!(heap_matches_list_of_blocks);

//! Guards against a heap that loses memory, gives it out twice, or blocks others, because a user of it was killed.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.

mod support;

use netmcore_shm::Block;
use netmcore_sys::crash;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{Person, Random, World, fork, number, tag};

/// The survivor's blocks, which no death may touch.
fn survivors_blocks(person: Person<'_>) -> Vec<Block> {
    let world = person.world;
    let lens = [0, 1, 64, 100, 700, 4_000, 9_000, 30_000, 33_000, 200_000];
    let blocks: Vec<Block> = lens
        .iter()
        .map(|&len| world.heap.alloc(len, tag(1), &person).unwrap())
        .collect();
    for &block in &blocks {
        world.fill(block, 1);
    }
    blocks
}

/// Everything that a user of the heap does, in a heap of 20 MiB: every branch is taken.
fn everything(person: Person<'_>, of: u64) {
    let heap = &person.world.heap;
    let alloc = |len: usize| heap.alloc(len, tag(of), &person).unwrap();
    let free = |block: Block| assert!(heap.free(block, tag(of)));
    let small = alloc(100); // a chunk of the survivor's
    let medium = alloc(6_000); // a new chunk
    let run = alloc(70_000);
    free(small);
    free(run); // kept
    let large = alloc(17 << 20); // more than is kept
    free(large); // given back
    for _ in 0..3 {
        alloc(20_000);
    }
    let last = alloc(20_000); // the second chunk of its class
    free(last);
    free(medium);
    // More than there is: before it says so it retires the empty chunks.
    let all = heap.stats().max_bytes as usize;
    assert!(heap.alloc(all, tag(of), &person).is_err());
    let blocks: Vec<Block> = (0..20).map(|_| alloc(15_000)).collect();
    free(blocks[3]);
}

/// After a death at any point the dead one's blocks are freed, the others' are whole, and nothing is lost.
fn crash_at_any_point_is_recoverable() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new(24 << 20);
        let survivor = world.person(1, 1);
        let blocks = survivors_blocks(survivor);
        let mortal = world.person(2, 1);
        crash::arm(Some(k));
        let ended_well = fork(|| everything(mortal, 2)).ended_well();
        crash::disarm();
        world.settle_death(mortal.id);
        // In either order: the lock may still be the dead one's.
        if k % 2 == 0 {
            let block = world.heap.alloc(40_000, tag(3), &survivor).unwrap();
            assert!(world.heap.free(block, tag(3)));
        }
        world.heap.free_all(tag(2));
        let at = crash::died_at();
        let checked = world.heap.verify();
        assert!(checked.is_ok(), "{at:?} ({k}): {checked:?}");
        let stats = world.heap.stats();
        assert_eq!(stats.in_use_blocks, blocks.len() as u64);
        if let Some(memory) = world.memory_bytes() {
            assert!(memory <= stats.committed_bytes, "{at:?}: memory is lost");
        }
        for &block in &blocks {
            world.check(block, 1);
            assert!(world.heap.free(block, tag(1)));
        }
        world.check_whole(survivor);
        assert_eq!(world.heap.free_all(tag(2)), 0, "{at:?} ({k})");
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for point in [
        "locked",
        "claimed",
        "freed",
        "chunk_taken",
        "chunk_present",
        "chunk_made",
        "high_raised",
        "describing",
        "run_committed",
        "run_taken",
        "run_present",
        "run_freed",
        "freeing",
        "unmarked",
        "removed",
        "removed_and_freed",
        "retiring",
        "claimed_all",
        "retired",
    ] {
        let name = match point {
            "locked" => "sem.word.locked".to_owned(),
            point => format!("shm.tagged_heap.{point}"),
        };
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

/// The one that frees a dead one's blocks may die as well: the next goes on.
fn crash_while_cleaning_up_is_recoverable() {
    for k in 1.. {
        let world = World::new(64 << 20);
        let survivor = world.person(1, 1);
        let blocks = survivors_blocks(survivor);
        let mortal = world.person(2, 1);
        let victim = fork(|| {
            for len in [10, 10, 5_000, 60_000, 17 << 20, 18 << 20] {
                world.heap.alloc(len, tag(2), &mortal).unwrap();
            }
        });
        assert!(victim.ended_well());
        world.settle_death(mortal.id);
        crash::arm(Some(k));
        let ended_well = fork(|| {
            world.heap.free_all(tag(2));
        })
        .ended_well();
        crash::disarm();
        world.heap.free_all(tag(2));
        world.heap.verify().unwrap();
        assert_eq!(world.heap.stats().in_use_blocks, blocks.len() as u64);
        blocks.iter().for_each(|&block| world.check(block, 1));
        world.heap.free_all(tag(1));
        world.check_whole(survivor);
        if ended_well {
            assert!(k > 10);
            return;
        }
    }
}

/// One dies in the middle of retiring a chunk; the one that repairs that dies as well, at every point.
fn crash_while_recovering_is_recoverable() {
    // Which pass is the one we want?
    let retiring = (1..1_000)
        .find(|&k| {
            let world = World::new(24 << 20);
            survivors_blocks(world.person(1, 1));
            let mortal = world.person(2, 1);
            crash::arm(Some(k));
            fork(|| everything(mortal, 2)).ended_well();
            crash::disarm();
            crash::died_at().as_deref() == Some("shm.tagged_heap.claimed_all")
        })
        .unwrap();
    for k in 1.. {
        let world = World::new(24 << 20);
        let survivor = world.person(1, 1);
        let blocks = survivors_blocks(survivor);
        let first = world.person(2, 1);
        crash::arm(Some(retiring));
        assert!(!fork(|| everything(first, 2)).ended_well());
        world.settle_death(first.id);
        let second = world.person(3, 1);
        crash::arm(Some(k));
        let ended_well = fork(|| {
            world.heap.alloc(50_000, tag(3), &second).unwrap();
        })
        .ended_well();
        crash::disarm();
        world.settle_death(second.id);
        world.heap.free_all(tag(2));
        world.heap.free_all(tag(3));
        world.heap.verify().unwrap();
        blocks.iter().for_each(|&block| world.check(block, 1));
        world.heap.free_all(tag(1));
        world.check_whole(survivor);
        if ended_well {
            assert!(k > 5);
            return;
        }
    }
}

/// A process killed while it takes memory for a large block does not keep that memory.
fn killed_while_populating_gives_all_of_it_back() {
    let mut random = Random::new();
    let world = World::new(1 << 30);
    let survivor = world.person(1, 1);
    for generation in 1..20 {
        let mortal = world.person(2, generation);
        let of = u64::from(generation) + 10;
        let victim = fork(|| {
            loop {
                let block = world.heap.alloc(200 << 20, tag(of), &mortal).unwrap();
                assert!(world.heap.free(block, tag(of)));
            }
        });
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        victim.kill();
        assert!(!victim.ended_well());
        world.settle_death(mortal.id);
        world.heap.free_all(tag(of));
        world.heap.verify().unwrap();
        assert_eq!(world.heap.stats().in_use_bytes, 0);
        let Some(memory) = world.memory_bytes() else {
            netmcore_forktest::skip("only root may see how much memory an anonymous file has");
        };
        // What was kept, and bookkeeping.
        assert!(memory < 18 << 20, "{memory} bytes are still taken");
        assert!(world.heap.stats().committed_bytes >= memory);
    }
    world.check_whole(survivor);
}

const WORKERS: u32 = 4;
/// The tag of blocks that are passed around.
const PARCEL: u64 = 7;

/// Random allocation by several processes, random kills; what a dead one had is freed while the others go on.
fn random_kills_lose_nothing_and_hang_nobody() {
    let mut random = Random::new();
    let kills = number("NETMCORE_KILLS").unwrap_or(250);
    let world = World::new(256 << 20);
    let start = |index: u32, generation: u32, seed: u64| {
        let person = world.person(index, generation);
        (person, fork(move || work(person, Random(seed | 1))))
    };
    let mut workers: Vec<_> = (0..WORKERS)
        .map(|index| start(index, 1, random.below(u64::MAX)))
        .collect();
    for kill in 0..kills {
        let pause = Instant::now() + Duration::from_micros(random.below(4_000));
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        let index = random.below(u64::from(WORKERS)) as usize;
        let (person, child) = &workers[index];
        child.kill();
        assert!(!child.ended_well());
        world.settle_death(person.id);
        world.heap.free_all(tag(tag_of(*person)));
        let others = || (0..WORKERS as usize).filter(|&other| other != index);
        let progress = |who: usize| world.shared().progress[who].load(Ordering::SeqCst);
        let before: Vec<u64> = (0..WORKERS as usize).map(progress).collect();
        let deadline = Instant::now() + support::PATIENCE;
        while !others().all(|other| progress(other) > before[other]) {
            assert!(Instant::now() < deadline, "somebody waits for the dead");
            std::thread::yield_now();
        }
        let generation = kill as u32 + 2;
        workers[index] = start(index as u32, generation, random.below(u64::MAX));
    }
    world.shared().stop.store(1, Ordering::SeqCst);
    assert!(workers.iter().all(|(_, child)| child.ended_well()));
    world.heap.verify().unwrap();
    for (person, _) in &workers {
        world.heap.free_all(tag(tag_of(*person)));
    }
    world.heap.free_all(tag(PARCEL));
    world.heap.verify().unwrap();
    world.check_whole(world.person(7, 1));
}

fn tag_of(person: Person<'_>) -> u64 {
    1_000 + u64::from(person.id.generation) * 16 + u64::from(person.id.index)
}

fn work(person: Person<'_>, mut random: Random) {
    let world = person.world;
    let own = tag_of(person);
    let mut blocks: Vec<Block> = Vec::new();
    while world.shared().stop.load(Ordering::Relaxed) == 0 {
        world.shared().progress[person.id.index as usize].fetch_add(1, Ordering::Relaxed);
        let len = match random.below(100) {
            0 => random.below(2 << 20),
            1..10 => random.below(150_000),
            10..30 => random.below(20_000),
            _ => random.below(600),
        } as usize;
        match random.below(8) {
            0..4 if blocks.len() < 60 => {
                let block = world.heap.alloc(len, tag(own), &person).unwrap();
                world.fill(block, own);
                blocks.push(block);
            }
            4 => {
                // Pass one on, and free what another has left there.
                let len = len.next_multiple_of(64);
                let block = world.heap.alloc(len, tag(PARCEL), &person).unwrap();
                world.fill(block, PARCEL);
                let parcel = ((block.offset / 64) << 32) | (block.len / 64);
                let place = &world.shared().parcels[random.below(16) as usize];
                let found = place.swap(parcel, Ordering::AcqRel);
                if found != 0 {
                    let block = Block {
                        offset: (found >> 32) * 64,
                        len: (found & 0xffff_ffff) * 64,
                    };
                    world.check(block, PARCEL);
                    assert!(world.heap.free(block, tag(PARCEL)));
                }
            }
            _ if !blocks.is_empty() => {
                let block = blocks.swap_remove(random.below(blocks.len() as u64) as usize);
                world.check(block, own);
                assert!(world.heap.free(block, tag(own)));
            }
            _ => {}
        }
    }
    for block in blocks {
        world.check(block, own);
    }
}

/// Processes are stopped for a while at random: what they do late must not hit what has become another's.
fn random_stops_corrupt_nothing() {
    let mut random = Random::new();
    // Room for two large blocks, for which three compete.
    let world = World::new(50 << 20);
    let children: Vec<_> = (0..3)
        .map(|index| {
            let person = world.person(index, 1);
            fork(move || compete(person))
        })
        .collect();
    for _ in 0..150 {
        let child = &children[random.below(3) as usize];
        child.send(STOP);
        // sleep: stopped for a random time, then running for one. Any are right.
        std::thread::sleep(Duration::from_micros(random.below(25_000)));
        child.send(CONTINUE);
        // sleep: as above.
        std::thread::sleep(Duration::from_micros(random.below(15_000)));
    }
    world.shared().stop.store(1, Ordering::SeqCst);
    assert!(children.iter().all(support::Child::ended_well));
    let made: u64 = (0..3)
        .map(|index| world.shared().progress[index].load(Ordering::SeqCst))
        .sum();
    assert!(made > 20, "{made}");
    world.heap.verify().unwrap();
    world.check_whole(world.person(7, 1));
}

const STOP: i32 = 19;
const CONTINUE: i32 = 18;

/// Takes a block that is larger than what is kept, uses it and frees it, over and over.
fn compete(person: Person<'_>) {
    let world = person.world;
    let of = tag_of(person);
    while world.shared().stop.load(Ordering::Relaxed) == 0 {
        let Ok(block) = world.heap.alloc(17 << 20, tag(of), &person) else {
            continue;
        };
        world.fill(block, of);
        let until = Instant::now() + Duration::from_millis(5);
        while Instant::now() < until {
            world.check(block, of);
        }
        assert!(world.heap.free(block, tag(of)));
        world.shared().progress[person.id.index as usize].fetch_add(1, Ordering::SeqCst);
    }
}

netmcore_forktest::forktests!(
    random_stops_corrupt_nothing,
    crash_at_any_point_is_recoverable,
    crash_while_cleaning_up_is_recoverable,
    crash_while_recovering_is_recoverable,
    killed_while_populating_gives_all_of_it_back,
    random_kills_lose_nothing_and_hang_nobody,
);

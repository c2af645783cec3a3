//! Guards against shared cells that give a version which is gone or torn, lose an update, or keep what nobody reads.
//!
//! # Safety
//!
//! The page of counters is mapped as long as the test runs, and holds atomics.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::{AnonRegion, Arena, Error, Heap, NotExchanged, ShmArc, ShmCell, ShmSafe};
use netmcore_sys::{crash, process};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use support::{Random, fork};

struct World {
    arena: Arena,
    heap: Heap,
    page: AnonRegion,
}

/// What the processes of a test tell each other.
#[repr(C)]
struct Page {
    made: AtomicU64,
    dropped: AtomicU64,
    steps: [AtomicU64; 8],
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 16 << 20).unwrap();
        let page = AnonRegion::create(c"page", &arena, 4096).unwrap();
        World { arena, heap, page }
    }

    fn page(&self) -> &Page {
        // SAFETY: a page of zeros, mapped as long as the world, of atomics.
        unsafe { &*self.page.at().cast::<Page>() }
    }

    fn alive(&self) -> u64 {
        self.page().made.load(SeqCst) - self.page().dropped.load(SeqCst)
    }

    fn noisy(&self, number: u64) -> Noisy {
        self.page().made.fetch_add(1, SeqCst);
        Noisy {
            words: [number; 8],
            page_at: self.page.at().addr(),
        }
    }

    fn blocks(&self) -> u64 {
        self.heap.stats().in_use_blocks
    }
}

/// A value that notices when it is used after it was dropped, dropped twice, or torn.
#[derive(Debug, ShmSafe)]
struct Noisy {
    words: [u64; 8],
    page_at: usize,
}

impl Noisy {
    fn number(&self) -> u64 {
        let number = self.words[0];
        assert!(self.words == [number; 8] && number != u64::MAX);
        number
    }

    fn page(&self) -> &Page {
        // SAFETY: the page outlives the heap's values in these tests.
        unsafe { &*std::ptr::with_exposed_provenance::<Page>(self.page_at) }
    }
}

impl Clone for Noisy {
    fn clone(&self) -> Noisy {
        self.page().made.fetch_add(1, SeqCst);
        Noisy {
            words: [self.number(); 8],
            ..*self
        }
    }
}

impl Drop for Noisy {
    fn drop(&mut self) {
        self.number();
        self.page().dropped.fetch_add(1, SeqCst);
        self.words = [u64::MAX; 8];
    }
}

fn every_way_to_replace() {
    let world = World::new();
    let cell = ShmCell::with_header_in(&world.heap, 'h', world.noisy(1)).unwrap();
    assert_eq!((*cell.header(), cell.load().number()), ('h', 1));
    let first = cell.load();
    cell.store(world.noisy(2)).unwrap();
    let second = cell.swap(world.noisy(3)).unwrap();
    assert_eq!(
        (first.number(), second.number(), cell.load().number()),
        (1, 2, 3)
    );
    let fourth = cell.update(|old| world.noisy(old.number() + 1)).unwrap();
    assert!(fourth.number() == 4 && fourth.is_same(&cell.load()));
    let rejected = cell.compare_exchange(&second, world.noisy(9)).unwrap_err();
    assert_eq!(rejected.value.number(), 9);
    match rejected.error {
        NotExchanged::Changed { now } => assert_eq!(now.number(), 4),
        NotExchanged::Failed(error) => panic!("{error}"),
    }
    cell.compare_exchange(&fourth, rejected.value).unwrap();
    assert_eq!(cell.load_cloned().number(), 9);
    let back = cell
        .store_if(|old| old.number() > 9, world.noisy(10))
        .unwrap();
    assert_eq!(back.unwrap().number(), 10);
    assert!(
        cell.store_if(|old| old.number() == 9, world.noisy(11))
            .unwrap()
            .is_none()
    );
    assert_eq!(
        (first.number(), second.number(), fourth.number()),
        (1, 2, 4)
    );
    drop((first, second, fourth));
    assert!(format!("{cell:?}").contains("11"));
    cell.reclaim().unwrap();
    assert_eq!(world.alive(), 1);
    drop(cell);
    assert_eq!(world.alive(), 0);
    // Readers' table, and its first slots.
    assert_eq!(world.blocks(), 2);
    world.heap.verify().unwrap();
}

fn what_is_refused_comes_back() {
    let world = World::new();
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let foreign = ShmArc::new_in(&other, 5_u8).unwrap();
    let rejected = ShmCell::new_in(&world.heap, Some(foreign)).unwrap_err();
    assert!(matches!(rejected.error, Error::ForeignPointer { .. }));
    let cell = ShmCell::new_in(&world.heap, None).unwrap();
    let rejected = cell.store(rejected.value).unwrap_err();
    assert_eq!(rejected.value.as_deref(), Some(&5));
    assert!(cell.load().is_none());
    let large = ShmCell::new_in(&world.heap, [0_u64; 1 << 13]).unwrap();
    let mut guards = Vec::new();
    let error = loop {
        guards.push(large.load());
        if let Err(rejected) = large.store([guards.len() as u64; 1 << 13]) {
            break rejected.error;
        }
    };
    assert!(matches!(error, Error::OutOfPoolMemory { .. }));
    assert!(
        guards
            .iter()
            .enumerate()
            .all(|(n, guard)| guard[5] == n as u64)
    );
    assert!(guards.len() > 50);
    drop(guards);
    large.reclaim().unwrap();
    // Large versions are freed at once.
    for n in 0..100 {
        large.store([n; 1 << 13]).unwrap();
    }
}

fn crash_at_any_point_leaves_old_or_new() {
    let mut died_at = BTreeSet::new();
    for die_at in 1.. {
        let world = World::new();
        let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
        let empty_blocks = world.blocks();
        let done = &world.page().steps[0];
        crash::arm(Some(die_at));
        let ended_well = fork(|| {
            let ops: [&dyn Fn(); 7] = [
                &|| cell.store(world.noisy(1)).unwrap(),
                &|| assert_eq!(cell.swap(world.noisy(2)).unwrap().number(), 1),
                &|| drop(cell.update(|old| world.noisy(old.number() + 1)).unwrap()),
                &|| {
                    let seen = cell.load();
                    cell.compare_exchange(&seen, world.noisy(4)).unwrap();
                    assert!(cell.compare_exchange(&seen, world.noisy(9)).is_err());
                },
                &|| assert!(cell.store_if(|_| true, world.noisy(5)).unwrap().is_none()),
                &|| {
                    cell.store(world.noisy(6)).unwrap();
                },
                &|| cell.reclaim().unwrap(),
            ];
            for op in ops {
                op();
                done.fetch_add(1, SeqCst);
            }
        })
        .ended_well();
        crash::disarm();
        let at = crash::died_at();
        let done = done.load(SeqCst).min(6);
        let found = cell.load().number();
        assert!(
            found == done || found == (done + 1).min(6),
            "{at:?}: {done} {found}"
        );
        cell.store(world.noisy(100)).unwrap();
        cell.reclaim().unwrap();
        world.heap.verify().unwrap();
        let lost = world.blocks() - empty_blocks;
        // One, and the slots of readers, which were not there at first.
        assert!(lost <= 2, "{at:?}: {lost}");
        // The lost one, and one or two that were on the stack of the dead.
        assert!(world.alive() <= 4, "{at:?}: {}", world.alive());
        drop(cell);
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for point in [
        "shm.epoch.block_allocated",
        "shm.epoch.block_written",
        "shm.versions.swapped",
        "shm.versions.exchanged",
        "shm.retired.stamped",
        "shm.retired.pushed",
        "shm.retired.locked",
        "shm.retired.taken_out",
        "shm.retired.freed",
        "shm.pins.pinned",
        "shm.pins.covered",
        "shm.pins.era_ended",
        "shm.pins.unpinning",
    ] {
        assert!(
            died_at.contains(point),
            "nobody died at {point}: {died_at:?}"
        );
    }
}

/// The first collection of a heap makes the table of readers, the first read its slots.
fn crash_while_the_table_is_made_is_recoverable() {
    let mut died_at = BTreeSet::new();
    for die_at in 1.. {
        let world = World::new();
        crash::arm(Some(die_at));
        let ended_well = fork(|| {
            let cell = ShmCell::new_in(&world.heap, 1_u64).unwrap();
            assert_eq!(*cell.load(), 1);
        })
        .ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        let cell = ShmCell::new_in(&world.heap, 2_u64).unwrap();
        assert_eq!(*cell.load(), 2);
        drop(cell);
        world.heap.verify().unwrap();
        assert!(world.blocks() <= 5, "{}", world.blocks());
        if ended_well {
            break;
        }
    }
    for point in [
        "domain_allocated",
        "domain_made",
        "chunk_allocated",
        "chunk_made",
    ] {
        assert!(
            died_at.contains(&format!("shm.epoch.{point}")),
            "{died_at:?}"
        );
    }
}

/// The one that clears the pin of a dead reader dies in turn.
fn crash_while_a_pin_is_cleared_is_repaired() {
    for die_at in 1..30 {
        let world = World::new();
        let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
        let reader = fork(|| {
            std::mem::forget(cell.load());
            process::kill(process::Pid::this(), 9).unwrap();
        });
        assert!(!reader.ended_well());
        crash::arm(Some(die_at));
        let cleaner = fork(|| {
            cell.store(world.noisy(1)).unwrap();
            cell.reclaim().unwrap();
        });
        let ended_well = cleaner.ended_well();
        crash::disarm();
        cell.reclaim().unwrap();
        cell.store(world.noisy(2)).unwrap();
        cell.reclaim().unwrap();
        let guard = cell.load();
        cell.store(world.noisy(3)).unwrap();
        assert_eq!(guard.number(), 2);
        drop(guard);
        cell.reclaim().unwrap();
        // The current one, and what the dead had.
        assert!(world.alive() <= if ended_well { 1 } else { 3 });
        world.heap.verify().unwrap();
        if ended_well {
            return;
        }
    }
    panic!("thirty points?");
}

/// Processes update at the same time and are killed: no update is lost, no reader sees a torn or old-fashioned value.
fn updates_add_up_under_random_kills() {
    const PROCESSES: usize = 3;
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(100);
    let world = World::new();
    let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
    let steps = &world.page().steps;
    let start = |number: usize| {
        fork(|| {
            let mut last = 0;
            let mut kept = Vec::new();
            loop {
                let new = cell.update(|old| world.noisy(old.number() + 1)).unwrap();
                steps[number].fetch_add(1, SeqCst);
                assert!(new.number() > last);
                last = new.number();
                kept.push((last, new));
                let now = cell.load().number();
                assert!(now >= last);
                last = now;
                if kept.len() == 5 {
                    assert!(kept.drain(..).all(|(seen, guard)| guard.number() == seen));
                }
            }
        })
    };
    let mut children: Vec<_> = (0..PROCESSES).map(start).collect();
    for _ in 0..kills {
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(4_000)));
        let victim = random.below(PROCESSES as u64) as usize;
        children[victim].kill();
        assert!(!children[victim].ended_well());
        children[victim] = start(victim);
    }
    for child in &children {
        child.kill();
        assert!(!child.ended_well());
    }
    let acknowledged: u64 = steps.iter().map(|count| count.load(SeqCst)).sum();
    let counted = cell.load().number();
    eprintln!("{acknowledged} updates");
    let most = acknowledged + kills + PROCESSES as u64;
    assert!(
        (acknowledged..=most).contains(&counted),
        "{counted} of {acknowledged}"
    );
    cell.reclaim().unwrap();
    world.heap.verify().unwrap();
    let blocks = world.blocks();
    assert!(blocks <= 10 + 2 * kills, "{blocks}");
    let alive = world.alive();
    assert!(alive <= 10 + 4 * kills, "{alive}");
}

/// A reader that is stopped keeps what there was, one that is killed nothing.
fn stopped_reader_keeps_one_version() {
    let world = World::new();
    let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
    let steps = &world.page().steps;
    let reader = fork(|| {
        let guard = cell.load();
        steps[0].store(1, SeqCst);
        while steps[1].load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(guard.number(), 0);
        drop(guard);
        let guard = cell.load();
        assert_eq!(guard.number(), 100_000);
        steps[0].store(2, SeqCst);
        loop {
            std::thread::park();
        }
    });
    while steps[0].load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    reader.send(19);
    for number in 1..=100_000 {
        cell.store(world.noisy(number)).unwrap();
    }
    // The first, some from when it was replaced, the current one.
    assert!(world.alive() <= 5, "{}", world.alive());
    reader.send(18);
    steps[1].store(1, SeqCst);
    while steps[0].load(SeqCst) == 1 {
        std::thread::yield_now();
    }
    reader.kill();
    assert!(!reader.ended_well());
    cell.store(world.noisy(5)).unwrap();
    cell.reclaim().unwrap();
    assert_eq!(world.alive(), 1);
}

/// By those that replace, without `reclaim`.
fn pin_of_a_killed_reader_is_cleared() {
    let world = World::new();
    let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
    for _ in 0..30 {
        let reader = fork(|| {
            std::mem::forget(cell.load());
            process::kill(process::Pid::this(), 9).unwrap();
        });
        assert!(!reader.ended_well());
        for number in 0..40 {
            cell.store(world.noisy(number)).unwrap();
        }
    }
    for number in 0..100 {
        cell.store(world.noisy(number)).unwrap();
    }
    // Before there are many, nobody asks.
    assert!(world.alive() <= 100, "{}", world.alive());
}

fn threads_read_while_others_replace() {
    let world = World::new();
    let cell = ShmCell::new_in(&world.heap, world.noisy(0)).unwrap();
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let (mut last, mut kept, mut reads) = (0, Vec::new(), 0_u64);
                    while stop.load(SeqCst) == 0 {
                        let guard = cell.load();
                        assert!(guard.number() >= last);
                        last = guard.number();
                        kept.push(guard);
                        if kept.len() > 30 {
                            kept.drain(..)
                                .for_each(|guard| assert!(guard.number() < 30_000));
                        }
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        for number in 1..30_000 {
            cell.store(world.noisy(number)).unwrap();
        }
        stop.store(1, SeqCst);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
    cell.reclaim().unwrap();
    assert_eq!(world.alive(), 1);
    world.heap.verify().unwrap();
}

/// A copy of the cell, and a copy of a guard.
fn forked_children_have_the_same_cell() {
    let world = World::new();
    let mut cell = Some(ShmCell::new_in(&world.heap, world.noisy(1)).unwrap());
    let guard = cell.as_ref().unwrap().load();
    let child = fork(|| {
        let own = cell.as_ref().unwrap();
        own.store(world.noisy(2)).unwrap();
        own.store(world.noisy(3)).unwrap();
        std::panic::set_hook(Box::new(|_| {}));
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guard.number()));
        assert!(copied.is_err());
        let exchange = || own.compare_exchange(&guard, world.noisy(9)).is_ok();
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(exchange)).is_err());
    });
    assert!(child.ended_well());
    assert_eq!(
        (guard.number(), cell.as_ref().unwrap().load().number()),
        (1, 3)
    );
    drop(guard);
    let child = fork(|| drop(cell.take()));
    assert!(child.ended_well());
    let shared = ShmArc::new_in(&world.heap, cell.take().unwrap()).unwrap();
    let child = fork(|| shared.store(world.noisy(4)).unwrap());
    assert!(child.ended_well());
    assert_eq!(shared.load().number(), 4);
}

/// Another thread may read the value after that of the guard has ended.
fn leaked_guard_keeps_its_value_until_its_process_is_dead() {
    let world = World::new();
    let cell = ShmCell::new_in(&world.heap, world.noisy(7)).unwrap();
    let child = fork(|| {
        let value: &Noisy = support::leak_in_a_thread(|| {
            let guard = Box::leak(Box::new(cell.load()));
            &**guard
        });
        for number in 0..100 {
            cell.store(world.noisy(number)).unwrap();
            cell.reclaim().unwrap();
        }
        assert_eq!(value.number(), 7);
    });
    assert!(child.ended_well());
    cell.reclaim().unwrap();
    assert_eq!(world.alive(), 1);
}

netmcore_forktest::forktests!(
    every_way_to_replace,
    leaked_guard_keeps_its_value_until_its_process_is_dead,
    what_is_refused_comes_back,
    crash_at_any_point_leaves_old_or_new,
    crash_while_the_table_is_made_is_recoverable,
    crash_while_a_pin_is_cleared_is_repaired,
    updates_add_up_under_random_kills,
    stopped_reader_keeps_one_version,
    pin_of_a_killed_reader_is_cleared,
    threads_read_while_others_replace,
    forked_children_have_the_same_cell,
);

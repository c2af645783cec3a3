//! Guards against shared maps that lose, double or half-change entries when a process dies, free what somebody reads, keep what nobody
//! reads, or let a thread wait for itself.
//!
//! # Safety
//!
//! The page of counters is mapped as long as the test runs, and holds atomics.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::hash_map::{Entry, ShmRandomState};
use netmcore_shm::{AnonRegion, Arena, Error, Heap, ShmArc, ShmHashMap, ShmSafe};
use netmcore_sys::crash;
use netmcore_sys::process::{self, ExitStatus, Forked, PidFd};
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
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
        World::with_len(64 << 20)
    }

    fn with_len(len_bytes: usize) -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES.max(2 * len_bytes)).unwrap();
        let heap = Heap::anonymous(&arena, len_bytes).unwrap();
        let page = AnonRegion::create(c"page", &arena, 4096).unwrap();
        World { arena, heap, page }
    }

    fn page(&self) -> &Page {
        // SAFETY: a page of zeros, mapped as long as the world, of atomics.
        unsafe { &*self.page.at().cast::<Page>() }
    }

    /// Values and keys that were made and not dropped.
    fn alive(&self) -> u64 {
        self.page().made.load(SeqCst) - self.page().dropped.load(SeqCst)
    }

    fn noisy(&self, number: u64) -> Noisy {
        self.page().made.fetch_add(1, SeqCst);
        Noisy {
            number,
            again: !number,
            page_at: self.page.at().addr(),
        }
    }

    fn blocks(&self) -> u64 {
        self.heap.stats().in_use_blocks
    }
}

/// A key or value that notices when it is used after it was dropped, dropped twice, or torn.
#[derive(Debug, ShmSafe)]
struct Noisy {
    number: u64,
    again: u64,
    page_at: usize,
}

impl Noisy {
    fn number(&self) -> u64 {
        assert_eq!(self.number, !self.again, "dropped, or half written");
        self.number
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
            number: self.number(),
            ..*self
        }
    }
}

impl Drop for Noisy {
    fn drop(&mut self) {
        self.number();
        self.page().dropped.fetch_add(1, SeqCst);
        self.again = self.number;
    }
}

thread_local! {
    /// Called once, by the next comparison of keys in this thread.
    static WHEN_COMPARED: Cell<Option<Box<dyn FnOnce()>>> = const { Cell::new(None) };
}

impl PartialEq for Noisy {
    fn eq(&self, other: &Noisy) -> bool {
        if let Some(call) = WHEN_COMPARED.take() {
            call();
        }
        self.number() == other.number()
    }
}

impl Eq for Noisy {}

impl Hash for Noisy {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.number().hash(state);
    }
}

impl std::borrow::Borrow<u64> for Noisy {
    fn borrow(&self) -> &u64 {
        self.number();
        &self.number
    }
}

type NoisyMap = ShmHashMap<Noisy, Noisy>;
type Oracle = HashMap<u64, u64>;

fn contents(map: &NoisyMap) -> Oracle {
    let all: Oracle = map
        .iter()
        .map(|entry| (entry.key().number(), entry.number()))
        .collect();
    assert_eq!(all.len(), map.len());
    all
}

/// What can be done to a map.
#[derive(Clone, Copy, Debug)]
enum Op {
    Insert(u64, u64),
    InsertIfAbsent(u64, u64),
    Remove(u64),
    Modify(u64, u64),
    ModifyWith(u64, u64),
    UpdateToNothing(u64),
    Update(u64, u64),
    EntryOrInsert(u64, u64),
    EntryModifyTwice(u64, u64),
    EntryRemove(u64),
    Retain(u64),
    Clear,
    Look(u64),
}

impl Op {
    fn random(random: &mut Random) -> Op {
        let (key, value) = (random.below(40), random.below(1_000));
        match random.below(60) {
            0..20 => Op::Insert(key, value),
            20..25 => Op::InsertIfAbsent(key, value),
            25..33 => Op::Remove(key),
            33..37 => Op::Modify(key, value),
            37..40 => Op::ModifyWith(key, value),
            40..42 => Op::UpdateToNothing(key),
            42..46 => Op::Update(key, value),
            46..50 => Op::EntryOrInsert(key, value),
            50..53 => Op::EntryModifyTwice(key, value),
            53..55 => Op::EntryRemove(key),
            55 => Op::Retain(2 + key % 4),
            56 if value < 300 => Op::Clear,
            _ => Op::Look(key),
        }
    }

    fn on_map(self, world: &World, map: &NoisyMap) {
        let noisy = |number| world.noisy(number);
        match self {
            Op::Insert(key, value) => drop(map.insert(noisy(key), noisy(value)).unwrap()),
            Op::InsertIfAbsent(key, value) => {
                map.insert_if_absent(noisy(key), noisy(value)).unwrap();
            }
            Op::Remove(key) => drop(map.remove(&key).unwrap()),
            Op::Modify(key, value) => {
                let change = |old: &mut Noisy| {
                    old.number = old.number.wrapping_add(value);
                    crash::pass("test.modify.half_done");
                    old.again = !old.number;
                };
                map.modify(&key, change).unwrap();
            }
            Op::ModifyWith(key, value) => {
                map.modify_with(&key, |old| noisy(old.number() + value))
                    .unwrap();
            }
            Op::UpdateToNothing(key) => drop(map.update(noisy(key), |_| None).unwrap()),
            Op::Update(key, value) => {
                let next = |old: Option<&Noisy>| Some(noisy(value + old.map_or(0, Noisy::number)));
                drop(map.update(noisy(key), next).unwrap());
            }
            Op::EntryOrInsert(key, value) => {
                let entry = map.entry(noisy(key)).unwrap();
                let there = entry.or_insert_with(|| noisy(value)).unwrap();
                there.number();
            }
            Op::EntryModifyTwice(key, value) => {
                let change = |old: &mut Noisy| *old = noisy(old.number() + value);
                let entry = map.entry(noisy(key)).unwrap();
                let entry = entry.and_modify(change).unwrap();
                drop(entry.and_modify(change).unwrap());
            }
            Op::EntryRemove(key) => {
                if let Entry::Occupied(entry) = map.entry(noisy(key)).unwrap() {
                    entry.remove().number();
                }
            }
            Op::Retain(divisor) => map.retain(|key, _| key.number() % divisor != 0).unwrap(),
            Op::Clear => map.clear().unwrap(),
            Op::Look(key) => {
                let found = map.get(&key);
                assert!(found.is_none_or(|found| found.key().number() == key));
                for entry in map {
                    crash::pass("test.iter.midway");
                    entry.number();
                }
            }
        }
    }

    fn on_oracle(self, oracle: &mut Oracle) {
        match self {
            Op::Insert(key, value) => drop(oracle.insert(key, value)),
            Op::InsertIfAbsent(key, value) | Op::EntryOrInsert(key, value) => {
                oracle.entry(key).or_insert(value);
            }
            Op::Remove(key) | Op::UpdateToNothing(key) | Op::EntryRemove(key) => {
                oracle.remove(&key);
            }
            Op::Modify(key, value) | Op::ModifyWith(key, value) => {
                oracle.entry(key).and_modify(|old| *old += value);
            }
            Op::Update(key, value) => *oracle.entry(key).or_default() += value,
            Op::EntryModifyTwice(key, value) => {
                oracle.entry(key).and_modify(|old| *old += 2 * value);
            }
            Op::Retain(divisor) => oracle.retain(|key, _| key % divisor != 0),
            Op::Clear => oracle.clear(),
            Op::Look(_) => {}
        }
    }

    /// Whether `found` is what a process that died in this operation may leave of `before`.
    fn may_leave(self, found: &Oracle, before: &Oracle) -> bool {
        let mut after = before.clone();
        self.on_oracle(&mut after);
        let is_between = || {
            let is_of = |small: &Oracle, large: &Oracle| {
                small
                    .iter()
                    .all(|(key, value)| large.get(key) == Some(value))
            };
            is_of(&after, found) && is_of(found, before)
        };
        let once = |key, value| {
            let mut once = before.clone();
            once.entry(key).and_modify(|old: &mut u64| *old += value);
            once
        };
        found == before
            || *found == after
            || match self {
                Op::Retain(_) | Op::Clear => is_between(),
                Op::EntryModifyTwice(key, value) => *found == once(key, value),
                _ => false,
            }
    }
}

/// With deaths: every tenth operation is done by a child that dies at a random point of it.
fn map_matches_std_with_deaths() {
    let mut random = Random::new();
    for round in 0..6 {
        let world = World::new();
        let shards = [1, 2, 64][round % 3];
        let map = ShmHashMap::with_shards_in(&world.heap, shards).unwrap();
        let empty_blocks = world.blocks();
        let mut oracle = Oracle::new();
        let mut deaths = 0;
        for _ in 0..1_500 {
            let op = Op::random(&mut random);
            if random.below(12) == 0 {
                crash::arm(Some(1 + random.below(20)));
                let died = !fork(|| op.on_map(&world, &map)).ended_well();
                crash::disarm();
                let found = contents(&map);
                assert!(
                    op.may_leave(&found, &oracle),
                    "{op:?} died at {:?}: {oracle:?} became {found:?}",
                    crash::died_at()
                );
                oracle = found;
                deaths += u64::from(died);
            } else {
                op.on_map(&world, &map);
                op.on_oracle(&mut oracle);
            }
            if random.below(8) == 0 {
                map.verify().unwrap();
                assert_eq!(contents(&map), oracle);
                for key in 0..40 {
                    let found = map.get(&key).map(|value| value.number());
                    assert_eq!(found, oracle.get(&key).copied());
                }
            }
        }
        assert!(deaths > 10, "{deaths}");
        world.heap.verify().unwrap();
        map.reclaim().unwrap();
        let entries = 2 * oracle.len() as u64;
        // What the dead had: a few keys and values each, and what was cleared.
        assert!(
            world.alive() <= entries + deaths * 6 + 300,
            "{}",
            world.alive()
        );
        map.clear().unwrap();
        map.reclaim().unwrap();
        assert!(world.blocks() <= empty_blocks + deaths * 3 + 150);
    }
}

/// One that dies at each point of each operation, growth among them.
fn crash_at_any_point_leaves_the_others_well() {
    let mut ops: Vec<Op> = (0..8).map(|key| Op::Insert(key, key)).collect();
    ops.extend([
        Op::Insert(3, 30),
        Op::InsertIfAbsent(3, 31),
        Op::InsertIfAbsent(50, 5),
        Op::Remove(1),
        Op::Remove(1),
        Op::Modify(2, 7),
        Op::ModifyWith(2, 8),
        Op::Update(2, 1),
        Op::Update(60, 6),
        Op::UpdateToNothing(60),
        Op::EntryOrInsert(2, 9),
        Op::EntryOrInsert(61, 9),
        Op::EntryModifyTwice(61, 1),
        Op::EntryRemove(61),
        Op::Look(2),
        Op::Retain(3),
        Op::Insert(9, 9),
        Op::Clear,
        Op::Insert(10, 10),
    ]);
    let mut died_at = BTreeSet::new();
    for die_at in 1.. {
        let world = World::new();
        let map = ShmHashMap::with_shards_in(&world.heap, 1).unwrap();
        let empty_blocks = world.blocks();
        let done = &world.page().steps[0];
        crash::arm(Some(die_at));
        let ended_well = fork(|| {
            for op in &ops {
                op.on_map(&world, &map);
                done.fetch_add(1, SeqCst);
            }
        })
        .ended_well();
        crash::disarm();
        let at = crash::died_at();
        let done = done.load(SeqCst) as usize;
        let mut before = Oracle::new();
        ops[..done].iter().for_each(|op| op.on_oracle(&mut before));
        let start = Instant::now();
        let taken_over = map.insert(world.noisy(1_000), world.noisy(1)).unwrap();
        assert!(taken_over.is_none() && start.elapsed() < Duration::from_secs(5));
        drop(map.remove(&1_000).unwrap());
        map.verify()
            .unwrap_or_else(|error| panic!("{at:?}: {error}"));
        world.heap.verify().unwrap();
        let found = contents(&map);
        match ops.get(done) {
            Some(op) => assert!(
                op.may_leave(&found, &before),
                "{op:?} died at {at:?}: {before:?} became {found:?}"
            ),
            None => assert_eq!(found, before),
        }
        for key in 0..30 {
            drop(map.insert(world.noisy(key), world.noisy(key)).unwrap());
        }
        assert!((0..30).all(|key| map.get(&key).unwrap().number() == key));
        map.verify().unwrap();
        map.clear().unwrap();
        map.reclaim().unwrap();
        let lost = world.blocks() - empty_blocks;
        let cleared = matches!(ops.get(done), Some(Op::Clear));
        // An item, a table, and the slots of readers, which were not there at first.
        assert!(
            lost <= if cleared { 14 } else { 3 },
            "{at:?}: {lost} blocks"
        );
        drop(map);
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for point in [
        "shm.epoch.block_allocated",
        "shm.epoch.block_written",
        "shm.epoch.chunk_made",
        "shm.pins.claimed",
        "shm.pins.pinned",
        "shm.pins.unpinning",
        "shm.retired.stamped",
        "shm.retired.pushed",
        "shm.retired.locked",
        "shm.retired.taken_out",
        "shm.retired.freed",
        "shm.hash_map.locked",
        "shm.hash_map.linked",
        "shm.hash_map.counted",
        "shm.hash_map.replaced",
        "shm.hash_map.unlinked",
        "shm.hash_map.retired",
        "shm.hash_map.building",
        "shm.hash_map.built",
        "shm.hash_map.grown",
        "shm.hash_map.cleared",
        "shm.hash_map.unlocking",
        "test.modify.half_done",
        "test.iter.midway",
    ] {
        assert!(
            died_at.contains(point),
            "nobody died at {point}: {died_at:?}"
        );
    }
}

/// The one who repairs dies in turn.
fn crash_while_repairing_is_repaired() {
    let mut points = BTreeSet::new();
    for first in [
        3, 6, 9, 12, 15, 17, 18, 19, 20, 21, 22, 24, 27, 30, 33, 36, 39,
    ] {
        for second in 1..14 {
            let world = World::new();
            let map = ShmHashMap::<u64, u64>::with_shards_in(&world.heap, 1).unwrap();
            map.try_extend((0..5).map(|key| (key, key))).unwrap();
            // The seventh word: the table grows.
            let grow = || map.try_extend((5..8).map(|key| (key, key))).unwrap();
            crash::arm(Some(first));
            let ended_well = fork(grow).ended_well();
            crash::arm(Some(second));
            fork(|| drop(map.insert(20, 20).unwrap())).ended_well();
            crash::disarm();
            points.extend(crash::died_at());
            map.insert(21, 21).unwrap();
            map.verify().unwrap();
            world.heap.verify().unwrap();
            assert!((0..5).all(|key| map.get_cloned(&key) == Some(key)));
            if ended_well {
                break;
            }
        }
    }
    for point in ["shm.hash_map.repairing", "shm.hash_map.repaired"] {
        assert!(points.contains(point), "{points:?}");
    }
}

/// Who waits for a shard goes on when its holder is killed.
fn waiter_goes_on_when_the_holder_is_killed() {
    let world = World::new();
    let map = ShmHashMap::<u64, u64>::new_in(&world.heap).unwrap();
    map.insert(1, 1).unwrap();
    let steps = &world.page().steps;
    let holder = fork(|| {
        let _entry = map.entry(1).unwrap();
        steps[0].store(1, SeqCst);
        loop {
            std::thread::park();
        }
    });
    while steps[0].load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let waiter = fork(|| {
        steps[1].store(1, SeqCst);
        map.insert(1, 2).unwrap();
        steps[2].store(1, SeqCst);
    });
    while steps[1].load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    // Readers do not wait.
    assert_eq!(map.get_cloned(&1), Some(1));
    assert_eq!(steps[2].load(SeqCst), 0);
    holder.kill();
    assert!(!holder.ended_well());
    let killed = Instant::now();
    assert!(waiter.ended_well());
    eprintln!("went on after {:?}", killed.elapsed());
    assert_eq!(map.get_cloned(&1), Some(2));
}

/// Several processes count by each way there is, and are killed at random: each count that was acknowledged is there.
fn totals_add_up_under_random_kills() {
    const KEYS: u64 = 16;
    const PROCESSES: usize = 3;
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(100);
    let world = World::new();
    let by_update = ShmHashMap::<u64, u64>::with_shards_in(&world.heap, 4).unwrap();
    let by_add = ShmHashMap::<u64, AtomicU64>::with_shards_in(&world.heap, 4).unwrap();
    let steps = &world.page().steps;
    let seed = random.below(u64::MAX);
    let start = |number: usize| {
        fork(|| {
            let mut random = Random(seed ^ steps[number].load(SeqCst) | 1);
            loop {
                let (key, more) = (random.below(KEYS), 1_000 + random.below(1_000_000));
                match random.below(4) {
                    0 => drop(
                        by_update
                            .update(key, |old| Some(old.map_or(1, |old| old + 1)))
                            .unwrap(),
                    ),
                    1 if by_update.contains_key(&key) => {
                        assert!(by_update.modify(&key, |old| *old += 1).unwrap());
                    }
                    1 | 2 => drop(
                        by_update
                            .entry(key)
                            .unwrap()
                            .and_modify(|old| *old += 1)
                            .unwrap()
                            .or_insert(1)
                            .unwrap(),
                    ),
                    _ => drop(by_add.add(key, 1).unwrap()),
                }
                steps[number].fetch_add(1, SeqCst);
                // The tables grow, are cleaned, and shrink.
                by_update.insert(more, 0).unwrap();
                if random.below(100) == 0 {
                    by_update.retain(|key, _| *key < KEYS).unwrap();
                }
            }
        })
    };
    let mut children: Vec<_> = (0..PROCESSES).map(start).collect();
    for _ in 0..kills {
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(5_000)));
        let victim = random.below(PROCESSES as u64) as usize;
        children[victim].kill();
        assert!(!children[victim].ended_well());
        children[victim] = start(victim);
    }
    for child in &children {
        child.kill();
        assert!(!child.ended_well());
    }
    by_update.verify().unwrap();
    by_add.verify().unwrap();
    world.heap.verify().unwrap();
    by_update.retain(|key, _| *key < KEYS).unwrap();
    let counted = by_update.values().map(|count| *count).sum::<u64>()
        + by_add.values().map(|count| count.load(SeqCst)).sum::<u64>();
    let acknowledged: u64 = steps.iter().map(|count| count.load(SeqCst)).sum();
    eprintln!("{acknowledged} counts");
    assert!(
        (acknowledged..=acknowledged + kills + PROCESSES as u64).contains(&counted),
        "{counted} of {acknowledged}"
    );
    // What the dead had is all that stays.
    by_update.clear().unwrap();
    by_update.reclaim().unwrap();
    let blocks = world.blocks();
    assert!(blocks <= 100 + 2 * kills, "{blocks}");
}

/// Readers have what they have, whatever is replaced; afterwards it is freed.
fn guards_keep_their_entries() {
    let world = World::new();
    let map = NoisyMap::new_in(&world.heap).unwrap();
    for key in 0..20 {
        map.insert(world.noisy(key), world.noisy(key + 100))
            .unwrap();
    }
    let guards: Vec<_> = (0..20).map(|key| map.get(&key).unwrap()).collect();
    let iter = map.iter();
    for key in 0..20 {
        for round in 0..10 {
            assert!(
                map.modify(&key, |value| *value = world.noisy(round))
                    .unwrap()
            );
        }
    }
    map.retain(|key, _| key.number() < 10).unwrap();
    map.clear().unwrap();
    map.reclaim().unwrap();
    assert!(world.alive() >= 2 * 20);
    for (key, guard) in guards.iter().enumerate() {
        assert_eq!(
            (guard.number(), guard.key().number()),
            (key as u64 + 100, key as u64)
        );
    }
    // Lazy: it has noted nothing yet.
    assert_eq!(iter.count(), 0);
    drop(guards);
    map.reclaim().unwrap();
    assert_eq!(world.alive(), 0);
    let removed = {
        map.insert(world.noisy(1), world.noisy(2)).unwrap();
        map.remove(&1).unwrap().unwrap()
    };
    map.insert(world.noisy(1), world.noisy(3)).unwrap();
    assert_eq!((removed.number(), map.get(&1).unwrap().number()), (2, 3));
    drop(removed);
    drop(map);
    assert_eq!(world.alive(), 0);
    // The table of readers, and its first slots.
    assert_eq!(world.blocks(), 2);
}

/// A reader that is stopped, or killed, keeps what there was and no more.
fn sleeping_reader_keeps_little_and_a_killed_one_nothing() {
    let world = World::new();
    let map = ShmHashMap::<u64, [u64; 16]>::new_in(&world.heap).unwrap();
    for key in 0..100 {
        map.insert(key, [key; 16]).unwrap();
    }
    let steps = &world.page().steps;
    let reader = fork(|| {
        let guard = map.get(&5).unwrap();
        steps[0].store(1, SeqCst);
        while steps[1].load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(*guard, [5; 16]);
        steps[0].store(2, SeqCst);
        loop {
            std::thread::park();
        }
    });
    while steps[0].load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let replace = |count: u64| {
        for round in 0..count {
            map.insert(round % 100, [round; 16]).unwrap();
        }
    };
    replace(2_000);
    let blocks = world.blocks();
    replace(50_000);
    assert!(
        world.blocks() <= blocks + 70,
        "{} after {blocks}",
        world.blocks()
    );
    // 100 that it may have, 100 that are there, one for each shard to come, tables.
    assert!(blocks < 400, "{blocks}");
    steps[1].store(1, SeqCst);
    while steps[0].load(SeqCst) == 1 {
        std::thread::yield_now();
    }
    reader.kill();
    assert!(!reader.ended_well());
    map.reclaim().unwrap();
    let blocks = world.blocks();
    assert!(blocks <= 100 + 64 + 10, "{blocks}");
}

/// As above, without anybody who calls `reclaim`.
fn pin_of_a_killed_reader_is_cleared_by_those_that_change() {
    let world = World::new();
    let map = ShmHashMap::<u64, u64>::with_shards_in(&world.heap, 1).unwrap();
    let replace = |count| (0..count).for_each(|round| drop(map.insert(round % 50, round).unwrap()));
    replace(1_000);
    let blocks = world.blocks();
    for _ in 0..30 {
        let reader = fork(|| {
            std::mem::forget(map.get(&5));
            // Not in order.
            process::kill(process::Pid::this(), 9).unwrap();
        });
        assert!(!reader.ended_well());
    }
    replace(5_000);
    assert!(world.blocks() <= blocks + 60, "{}", world.blocks());
}

fn replacing_takes_no_more_memory() {
    let world = World::new();
    let map = ShmHashMap::<u64, [u64; 4]>::new_in(&world.heap).unwrap();
    let round = |rounds: std::ops::Range<u64>| {
        for round in rounds {
            let key = round * 7 % 500;
            match round % 4 {
                0 => drop(map.insert(key, [round; 4]).unwrap()),
                1 => drop(map.modify(&key, |value| value[1] = round).unwrap()),
                2 => drop(map.update(key, |_| Some([round; 4])).unwrap()),
                _ => drop(map.remove(&key).unwrap()),
            }
        }
    };
    round(0..20_000);
    let before = world.heap.stats();
    round(20_000..120_000);
    let after = world.heap.stats();
    assert!(
        after.in_use_blocks <= before.in_use_blocks + 80,
        "{before:?} {after:?}"
    );
    assert!(
        after.in_use_bytes <= before.in_use_bytes * 5 / 4,
        "{before:?} {after:?}"
    );
    map.verify().unwrap();
}

fn who_would_wait_for_itself_is_told() {
    let world = World::new();
    let map = ShmHashMap::<u64, u64>::new_in(&world.heap).unwrap();
    let other = ShmHashMap::<u64, u64>::new_in(&world.heap).unwrap();
    map.try_extend((0..100).map(|key| (key, key))).unwrap();
    let refused = |what: &str| {
        for key in [7, 8, 200] {
            let rejected = map.insert(key, 1).unwrap_err();
            assert_eq!(rejected.value, (key, 1));
            assert!(
                matches!(rejected.error, Error::WouldDeadlock { .. }),
                "{what}"
            );
        }
        assert!(matches!(map.remove(&7), Err(Error::WouldDeadlock { .. })));
        assert!(matches!(map.clear(), Err(Error::WouldDeadlock { .. })));
        assert!(matches!(
            map.retain(|_, _| true),
            Err(Error::WouldDeadlock { .. })
        ));
        assert!(matches!(map.verify(), Err(Error::WouldDeadlock { .. })));
        assert!(map.entry(9).is_err() && map.update(9, |_| None).is_err());
        // Not refused.
        assert_eq!(map.get_cloned(&7), Some(7));
        assert_eq!(map.iter().count(), 100);
        other.insert(1, 1).unwrap();
    };
    let entry = map.entry(7).unwrap();
    refused("entry");
    let message = map.insert(1, 1).unwrap_err().to_string();
    assert!(message.contains("holds an entry"), "{message}");
    drop(entry);
    let entry = map.entry(1_000).unwrap();
    refused("vacant entry");
    drop(entry);
    assert!(map.modify(&7, |_| refused("modify")).unwrap());
    map.update(7, |old| {
        refused("update");
        old.copied()
    })
    .unwrap();
    map.retain(|_, _| {
        refused("retain");
        true
    })
    .unwrap();
    let vacant = map.entry(1_000).unwrap();
    drop(vacant.or_insert_with(|| {
        refused("or_insert_with");
        5
    }));
    map.remove(&1_000).unwrap();
    // After a panic in a function of the user's nothing is held, and nothing was changed.
    let panicked = std::panic::catch_unwind(|| map.modify(&7, |_| panic!("on purpose")));
    assert!(panicked.is_err());
    map.insert(7, 70).unwrap();
    // With guards everything goes.
    let guard = map.get(&7).unwrap();
    map.insert(7, 71).unwrap();
    map.for_each(|key, value| drop(map.insert(*key, value + 1)));
    map.remove(&7).unwrap();
    assert_eq!(*guard, 70);
}

/// A key whose equality uses the map that it is in.
#[derive(Debug, ShmSafe)]
struct Meddling {
    number: u64,
    map_at: usize,
}

impl PartialEq for Meddling {
    fn eq(&self, other: &Meddling) -> bool {
        let at = std::ptr::with_exposed_provenance::<ShmHashMap<Meddling, u64>>(self.map_at);
        // SAFETY: 0 or a map that is still there.
        if let Some(map) = unsafe { at.as_ref() } {
            let nobody = Meddling {
                number: 99,
                map_at: 0,
            };
            assert!(matches!(
                map.remove(&nobody),
                Err(Error::WouldDeadlock { .. })
            ));
        }
        self.number == other.number
    }
}

impl Eq for Meddling {}

impl Hash for Meddling {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(0);
    }
}

fn key_that_meddles_is_told() {
    let world = World::new();
    let map = ShmHashMap::<Meddling, u64>::with_shards_in(&world.heap, 1).unwrap();
    let map_at = (&raw const map).expose_provenance();
    map.insert(Meddling { number: 1, map_at }, 1).unwrap();
    map.insert(
        Meddling {
            number: 1,
            map_at: 0,
        },
        2,
    )
    .unwrap();
    map.insert(Meddling { number: 2, map_at }, 3).unwrap();
    assert_eq!(map.len(), 2);
}

/// All keys on one path.
#[derive(Clone, Debug, ShmSafe)]
struct Same;

impl BuildHasher for Same {
    type Hasher = Same;

    fn build_hasher(&self) -> Same {
        Same
    }
}

impl Hasher for Same {
    fn write(&mut self, _: &[u8]) {}

    fn finish(&self) -> u64 {
        0
    }
}

/// A look-up whose comparison of keys looks something up itself, while the rest of its path is replaced and freed.
fn comparison_that_reads_does_not_uncover_the_path() {
    let world: &World = Box::leak(Box::new(World::new()));
    let map = ShmHashMap::<Noisy, Noisy, _, _>::with_parts_in(&world.heap, 1, Same, ()).unwrap();
    let map: &ShmHashMap<_, _, _, _> = Box::leak(Box::new(map));
    let insert = |key| drop(map.insert(world.noisy(key), world.noisy(key)).unwrap());
    (1..4).for_each(insert);
    let wanted = world.noisy(3);
    WHEN_COMPARED.set(Some(Box::new(move || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Kept for the look-up under way, which ends the era; the next is born in another.
                drop(map.remove(&3).unwrap());
                insert(3);
                // The path under way leads through a table that is replaced.
                (4..20).for_each(insert);
                drop(map.remove(&3).unwrap());
                insert(3);
                drop(map.remove(&3).unwrap());
                let before = world.alive();
                map.reclaim().unwrap();
                assert!(world.alive() < before, "something was freed");
            });
        });
        // Covers what is there now.
        assert_eq!(map.get(&1).unwrap().number(), 1);
    })));
    assert!(map.get(&wanted).is_none());
}

fn threads_share_it() {
    let world = World::new();
    let map = NoisyMap::with_shards_in(&world.heap, 2).unwrap();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (map, world) = (&map, &world);
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9 + number);
                let mut kept = Vec::new();
                for _ in 0..4_000 {
                    let key = random.below(20);
                    match random.below(8) {
                        0..3 => {
                            let value = key * 1_000 + random.below(1_000);
                            map.insert(world.noisy(key), world.noisy(value)).unwrap();
                        }
                        3 => drop(map.remove(&key).unwrap()),
                        4 => drop(map.modify(&key, |value| *value = world.noisy(key * 1_000))),
                        5 if random.below(20) == 0 => map.clear().unwrap(),
                        5 => map
                            .iter()
                            .for_each(|one| assert_eq!(one.number() / 1_000, one.key().number())),
                        _ => kept.extend(map.get(&key)),
                    }
                    if kept.len() > 20 {
                        for guard in kept.drain(..) {
                            assert_eq!(guard.number() / 1_000, guard.key().number());
                        }
                    }
                }
            });
        }
    });
    map.verify().unwrap();
    map.clear().unwrap();
    map.reclaim().unwrap();
    assert_eq!(world.alive(), 0);
    world.heap.verify().unwrap();
    // Threads that have ended have given their slots back.
    for _ in 0..200 {
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(map.get(&1).is_none()));
        });
    }
    drop(map);
    assert_eq!(world.blocks(), 2);
}

/// More readers at a time than the first slots.
fn many_threads_have_slots() {
    let world = World::new();
    let map = ShmHashMap::<u64, u64>::new_in(&world.heap).unwrap();
    map.insert(1, 1).unwrap();
    let barrier = std::sync::Barrier::new(100);
    std::thread::scope(|scope| {
        for number in 0..100 {
            let (map, barrier) = (&map, &barrier);
            scope.spawn(move || {
                let guard = map.get(&1).unwrap();
                barrier.wait();
                map.insert(2, number).unwrap();
                map.insert(1, number + 2).unwrap();
                barrier.wait();
                assert_eq!(*guard, 1);
            });
        }
    });
    map.reclaim().unwrap();
    // Readers' table, two chunks of slots, shards, two tables, two entries.
    assert!(world.blocks() <= 8, "{}", world.blocks());
}

/// Children have copies of the map and of guards; both know.
fn forked_children_share_it() {
    let world = World::new();
    let mut map = Some(NoisyMap::new_in(&world.heap).unwrap());
    map.as_ref()
        .unwrap()
        .insert(world.noisy(1), world.noisy(10))
        .unwrap();
    let guard = map.as_ref().unwrap().get(&1).unwrap();
    let child = fork(|| {
        let own = map.as_ref().unwrap();
        assert_eq!(own.get(&1).unwrap().number(), 10);
        own.insert(world.noisy(1), world.noisy(11)).unwrap();
        own.insert(world.noisy(2), world.noisy(20)).unwrap();
        std::panic::set_hook(Box::new(|_| {}));
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guard.number()));
        let message = copied.unwrap_err();
        let message = message.downcast_ref::<&str>().unwrap();
        assert!(message.contains("before the fork"), "{message}");
    });
    assert!(child.ended_well());
    assert_eq!(guard.number(), 10);
    drop(guard);
    let child = fork(|| drop(map.take()));
    assert!(child.ended_well());
    let own = map.as_ref().unwrap();
    assert_eq!(contents(own), Oracle::from([(1, 11), (2, 20)]));
    // An entry that the parent holds is not the child's.
    let entry = own.entry(world.noisy(1)).unwrap();
    let child = fork(|| {
        drop(own.get(&1));
        assert!(own.iter().count() == 2 || own.len() == 2);
    });
    // It waits for the shard.
    drop(entry);
    assert!(child.ended_well());
    // In a value of its own.
    let shared = ShmArc::new_in(&world.heap, map.take().unwrap()).unwrap();
    let child = fork(|| drop(shared.insert(world.noisy(3), world.noisy(30)).unwrap()));
    assert!(child.ended_well());
    assert_eq!(shared.get(&3).unwrap().number(), 30);
    drop(shared);
    assert_eq!(world.alive(), 0);
}

/// A function that is called under the lock forks: the child has not got the lock, and must not end what the parent does.
fn child_forked_under_the_lock_changes_nothing() {
    let world = World::new();
    let map = NoisyMap::new_in(&world.heap).unwrap();
    map.insert(world.noisy(1), world.noisy(10)).unwrap();
    let mut child = None;
    let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        map.modify_with(&1, |old| {
            // SAFETY: there is one thread; the child leaves below.
            match unsafe { process::fork() }.unwrap() {
                Forked::Child => std::panic::set_hook(Box::new(|_| {})),
                Forked::Parent(pid) => child = Some(PidFd::open(pid).unwrap()),
            }
            world.noisy(old.number() + 1)
        })
    }));
    let Some(child) = child else {
        process::exit_now(i32::from(changed.is_ok()));
    };
    assert_eq!(child.wait().unwrap(), ExitStatus::Exited { code: 0 });
    assert!(changed.unwrap().unwrap());
    assert_eq!(contents(&map), Oracle::from([(1, 11)]));
    map.reclaim().unwrap();
    map.verify().unwrap();
    // A key and a value.
    assert_eq!(world.alive(), 2);
}

/// What is refused comes back, and changes nothing.
fn what_is_refused_comes_back() {
    let world = World::new();
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let map = ShmHashMap::<u64, Option<ShmArc<u64>>>::new_in(&world.heap).unwrap();
    let foreign = ShmArc::new_in(&other, 5).unwrap();
    let rejected = map.insert(1, Some(foreign)).unwrap_err();
    assert!(matches!(rejected.error, Error::ForeignPointer { .. }));
    let foreign = rejected.value.1;
    assert_eq!(foreign.as_deref(), Some(&5));
    let entry = map.entry(1).unwrap();
    assert!(entry.or_insert(foreign).is_err());
    assert!(map.is_empty());
    let with_foreign_header = ShmHashMap::<u64, u64, _>::with_header_in(
        &world.heap,
        ShmArc::new_in(&other, 7_u64).unwrap(),
    );
    assert_eq!(*with_foreign_header.unwrap_err().value, 7);
    // Out of memory.
    let small = World::with_len(1 << 20);
    let map = NoisyMap::with_shards_in(&small.heap, 1).unwrap();
    let mut count = 0;
    let rejected = loop {
        match map.insert(small.noisy(count), small.noisy(count)) {
            Ok(_) => count += 1,
            Err(rejected) => break rejected,
        }
    };
    assert!(
        matches!(rejected.error, Error::OutOfPoolMemory { .. }),
        "{rejected}"
    );
    assert_eq!(rejected.value.0.number(), count);
    assert!(count > 1_000, "{count}");
    drop(rejected);
    assert!(!map.modify(&count, |_| ()).unwrap());
    map.verify().unwrap();
    assert_eq!(map.len() as u64, count);
    assert_eq!(small.alive(), 2 * count);
    assert!((0..count).all(|key| map.get(&key).unwrap().number() == key));
    map.clear().unwrap();
    map.reclaim().unwrap();
    map.insert(small.noisy(1), small.noisy(2)).unwrap();
}

fn header_and_hasher_are_those_given() {
    let world = World::new();
    let map = ShmHashMap::<[u8; 4], u32, u64>::with_header_in(&world.heap, 17).unwrap();
    assert_eq!(*map.header(), 17);
    map.insert(*b"abcd", 1).unwrap();
    assert_eq!(map.get(b"abcd").as_deref(), Some(&1));
    // By a borrowed slice.
    assert!(map.contains_key(&b"abcd"[..]));
    let shown = format!("{map:?}");
    assert_eq!(shown, "{[97, 98, 99, 100]: 1}");
    let same = ShmRandomState::with_keys([1, 2, 3, 4]);
    let parts = ShmHashMap::<u64, u64, _, _>::with_parts_in(&world.heap, 5, same, ()).unwrap();
    assert_eq!(parts.shard_count(), 8);
    parts
        .try_extend((0..1_000).map(|key| (key, key * 2)))
        .unwrap();
    assert_eq!(parts.len(), 1_000);
    let mut keys: Vec<_> = parts.keys().map(|key| *key).collect();
    keys.sort_unstable();
    assert!(keys.into_iter().eq(0..1_000));
    parts.verify().unwrap();
}

netmcore_forktest::forktests!(
    map_matches_std_with_deaths,
    crash_at_any_point_leaves_the_others_well,
    crash_while_repairing_is_repaired,
    waiter_goes_on_when_the_holder_is_killed,
    totals_add_up_under_random_kills,
    guards_keep_their_entries,
    sleeping_reader_keeps_little_and_a_killed_one_nothing,
    pin_of_a_killed_reader_is_cleared_by_those_that_change,
    replacing_takes_no_more_memory,
    who_would_wait_for_itself_is_told,
    key_that_meddles_is_told,
    comparison_that_reads_does_not_uncover_the_path,
    threads_share_it,
    many_threads_have_slots,
    forked_children_share_it,
    child_forked_under_the_lock_changes_nothing,
    what_is_refused_comes_back,
    header_and_hasher_are_those_given,
);

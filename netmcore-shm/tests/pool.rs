//! Guards against a pool that loses memory, gives it out twice, or blocks others, because a user of it was killed; and against
//! growth that ends in a signal.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.
//!
//! # Safety
//!
//! Each run has one user at a time, but where it is passed on, and its words are looked at as atomics. Shared memory beside the pool holds
//! atomics only. Children are forked from a process with one thread.

#![allow(unsafe_code)]

mod pool_ground;
mod support;

use netmcore_sem::{OwnerId, Owners, announce_death, current};
use netmcore_shm::{
    AnonRegion, Arena, Error, NoRecord, ObjectName, PagePool, PoolRef, Region, RegionId, ShmObject,
    SpaceLimit,
};
use netmcore_sys::crash;
use pool_ground::{Ground, PAGE, check, fill, free, free_all, take, words_of};
use std::collections::BTreeSet;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{PATIENCE, Random, fork, number};

const MIB: u64 = 1 << 20;

fn at(run: NonNull<u8>) -> usize {
    run.as_ptr().expose_provenance()
}

fn pointer(address: u64) -> NonNull<u8> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
}

fn runs_are_taken_and_freed_and_found_by_address() {
    let ground = Ground::new(64 << 20);
    let pool = ground.pool.pool();
    let lens = [1, 3, 1, 70, 2];
    let runs = lens.map(|page_count| take(pool, page_count, 5));
    for (&run, page_count) in runs.iter().zip(lens) {
        assert!(at(run).is_multiple_of(PAGE));
        let len = page_count * PAGE;
        assert_eq!(pool.run_len_bytes(run.as_ptr()), Some(len));
        for inside in [0, 1, len / 2, len - 1] {
            let found = pool.run_at(run.as_ptr().wrapping_add(inside)).unwrap();
            assert_eq!((found.at, found.len_bytes, found.note), (run, len, 5));
        }
        for wrong in [1, PAGE / 2, len - 1] {
            assert_eq!(
                pool.run_len_bytes(run.as_ptr().wrapping_add(wrong)),
                None,
                "no run begins there"
            );
        }
    }
    let found: Vec<_> = pool.runs().map(|run| run.len_bytes / PAGE).collect();
    assert_eq!(found, lens);
    assert_eq!(pool.stats().in_use_bytes, (77 * PAGE) as u64);
    assert_eq!(pool.stats().in_use_runs, 5);
    assert!(
        pool.debug_info().contains("in use, note 0x5"),
        "{}",
        pool.debug_info()
    );
    pool.verify().unwrap();
    ground.check_memory();
    // Freed by another process, one by one; it has them at the same addresses.
    let child = fork(|| {
        for &run in &runs[1..] {
            free(pool, run, 5);
        }
    });
    assert!(child.ended_well());
    free(pool, runs[0], 5);
    assert!(pool.runs().next().is_none());
    ground.check_whole();
}

fn what_is_no_run_is_refused() {
    let ground = Ground::new(16 << 20);
    let pool = ground.pool.pool();
    let run = take(pool, 4, 1);
    let base = ground.pool.region().at();
    let elsewhere = Box::new(0_u64);
    let inside = |offset| run.as_ptr().wrapping_add(offset);
    for address in [
        inside(8),
        inside(PAGE),          // in the middle
        inside(4 * PAGE),      // free
        inside(100 * PAGE),    // never used
        inside(5_000 * PAGE),  // behind the end
        base,                  // the pool's own
        base.wrapping_sub(64), // before it
        pool.header_at().as_ptr(),
        (&raw const *elsewhere).cast_mut().cast(),
    ] {
        // SAFETY: it is refused.
        let refused = unsafe { pool.free_run(NonNull::new(address).unwrap()) };
        assert!(matches!(refused, Err(Error::BadRun { .. })), "{refused:?}");
        assert_eq!(pool.run_len_bytes(address), None);
        assert!(pool.note(address).is_none());
    }
    for address in [inside(4 * PAGE), base, inside(5_000 * PAGE)] {
        assert_eq!(pool.run_at(address), None);
    }
    assert!(pool.contains(base) && pool.contains(inside(0)));
    assert!(!pool.contains(base.wrapping_add(16 << 20)) && !pool.contains(base.wrapping_sub(1)));
    free(pool, run, 1);
    // SAFETY: it is refused.
    let again = unsafe { pool.free_run(run) };
    assert!(matches!(again, Err(Error::BadRun { .. })));
    ground.check_whole();
}

fn notes_are_kept_for_the_layer_above() {
    let ground = Ground::new(16 << 20);
    let pool = ground.pool.pool();
    let run = pool.alloc_run_noted(2, 77).unwrap();
    let note = pool.note(run.as_ptr()).unwrap();
    let child = fork(|| {
        let note = pool.note(run.as_ptr()).unwrap();
        let swapped = note.compare_exchange(77, 78, Ordering::AcqRel, Ordering::Relaxed);
        assert_eq!(swapped, Ok(77));
    });
    assert!(child.ended_well());
    assert_eq!(note.load(Ordering::Acquire), 78);
    assert_eq!(free_all(pool, 77), 0);
    assert_eq!(free_all(pool, 78), 1);
    let run = pool.alloc_run(2).unwrap();
    assert_eq!(pool.run_at(run.as_ptr()).unwrap().note, 0);
    // SAFETY: nobody uses it.
    unsafe { pool.free_run(run) }.unwrap();
    ground.check_whole();
}

fn pool_is_attached_by_region_and_by_address() {
    let ground = Ground::new(16 << 20);
    let pool = ground.pool.pool();
    let attached = PagePool::attach(ground.pool.region()).unwrap();
    assert_eq!(attached.pool(), pool);
    assert!(format!("{attached:?}").contains("total_bytes"));
    // SAFETY: an address of a pool that is mapped.
    let same = unsafe { PoolRef::from_address(pool.address()) }.unwrap();
    assert_eq!(same, pool);
    // The layer above has its place.
    assert_eq!(pool.header_len_bytes(), PAGE);
    let header = pool.header_at();
    words_of(header, PAGE).for_each(|word| assert_eq!(word.load(Ordering::Relaxed), 0));
    fill(header, PAGE, 9);
    let run = take(pool, 200, 3);
    check(header, PAGE, 9);
    free(pool, run, 3);
    ground.check_whole();
    check(header, PAGE, 9);

    let empty = Region::anonymous(&ground.arena, c"empty", 1 << 20).unwrap();
    let refused = PagePool::attach(&empty).unwrap_err();
    assert!(matches!(refused, Error::FormatMismatch { found: 0, .. }));
    empty.grow(4096).unwrap();
    let refused = PagePool::attach(&empty).unwrap_err();
    assert!(matches!(refused, Error::FormatMismatch { found: 0, .. }));
    let small = Region::anonymous(&ground.arena, c"small", 3 * PAGE - 1).unwrap();
    let refused = PagePool::create(&small, PAGE).unwrap_err();
    assert!(matches!(refused, Error::OutOfPoolMemory { .. }));
    // A stray write into the header makes nobody reach out of it.
    let page_count = empty.at().wrapping_add(24).cast::<u64>();
    let made = PagePool::create(&empty, 0).unwrap();
    // SAFETY: in the region, and nobody else uses it now.
    unsafe { page_count.write(1 << 40) };
    assert!(matches!(
        PagePool::attach(&empty),
        Err(Error::FormatMismatch { .. })
    ));
    // SAFETY: as above.
    unsafe { page_count.write(made.stats().total_bytes) };
}

fn verify_sees_damage() {
    let ground = Ground::new(16 << 20);
    let pool = ground.pool.pool();
    let run = take(pool, 3, 1);
    pool.verify().unwrap();
    // The map begins behind the header and the area of the layer above.
    let map = ground.pool.region().at().wrapping_add(2 * PAGE);
    for (entry, word, wrong) in [
        (0, 0, 0_u64), // a run that ends in the middle of another
        (0, 0, 3 << 62 | 4),
        (0, 0, 3 << 62 | 500),
        (0, 0, 77),
        (0, 1, 0),
        (1, 0, 3 << 62 | 1),
        (1, 1, 0),
        (2, 1, 1 << 33 | 2),
    ] {
        let place = map.wrapping_add(24 * entry + 8 * word).cast::<u64>();
        // SAFETY: in the region, and no other process runs.
        let right = unsafe { place.replace(wrong) };
        let found = pool.verify();
        // A run whose word is 0 is free, whatever is written about it.
        assert_eq!(
            found.is_ok(),
            wrong == 0 && word == 0,
            "{entry} {word} {wrong:x}"
        );
        // SAFETY: as above.
        unsafe { place.write(right) };
        pool.verify().unwrap();
    }
    free(pool, run, 1);
    ground.check_whole();
}

fn full_pool_says_how_full() {
    let ground = Ground::new(16 << 20);
    let pool = ground.pool.pool();
    let pages = (pool.stats().total_bytes / PAGE as u64) as usize;
    let runs: Vec<_> = (0..pages).map(|of| take(pool, 1, of as u64)).collect();
    let refused =
        |page_count, free_pages: usize, largest_pages: usize| match pool.alloc_run(page_count) {
            Err(Error::OutOfPoolMemory {
                wanted_bytes,
                free_bytes,
                largest_free_bytes,
            }) => {
                let expected = [page_count, free_pages, largest_pages].map(|pages| pages * PAGE);
                let found = [wanted_bytes, free_bytes, largest_free_bytes];
                assert_eq!(found, expected.map(|bytes| bytes as u64));
            }
            other => panic!("{other:?}"),
        };
    refused(1, 0, 0);
    for index in [3, 4, 7, 100, 101, 102] {
        free(pool, runs[index], index as u64);
    }
    refused(4, 6, 3);
    refused(pages + 1, 6, 3);
    let three = take(pool, 3, 1_000);
    assert_eq!(three, runs[100]);
    refused(3, 3, 2);
    free(pool, three, 1_000);
    for (index, &run) in runs.iter().enumerate() {
        if ![3, 4, 7, 100, 101, 102].contains(&index) {
            free(pool, run, index as u64);
        }
    }
    let all = take(pool, pages, 1);
    refused(1, 0, 0);
    free(pool, all, 1);
    ground.check_whole();
}

fn freed_memory_goes_back_to_the_system_but_for_some() {
    let ground = Ground::new(256 << 20);
    let pool = ground.pool.pool();
    let small = ground.memory_bytes();
    let large = take(pool, 1_600, 1);
    let other = take(pool, 1, 2);
    assert!(ground.memory_bytes() >= small + 100 * MIB);
    free(pool, large, 1);
    assert!(
        ground.memory_bytes() < small + MIB,
        "it is more than may be kept"
    );
    ground.check_memory();
    check(other, PAGE, 2);
    let runs: Vec<_> = (0..800).map(|_| take(pool, 1, 3)).collect();
    let grown = ground.memory_bytes() - pool.stats().kept_bytes;
    runs.into_iter().rev().for_each(|run| free(pool, run, 3));
    let kept = pool.stats().kept_bytes;
    assert!((8 * MIB..=16 * MIB).contains(&kept), "{kept} bytes kept");
    assert_eq!(ground.memory_bytes(), grown - 50 * MIB + kept);
    // What was kept is used first, wherever it lies: nothing is given and taken over and over.
    let before = ground.memory_bytes();
    let runs: Vec<_> = (0..200).map(|_| take(pool, 1, 3)).collect();
    assert_eq!(ground.memory_bytes(), before);
    runs.into_iter().for_each(|run| free(pool, run, 3));
    assert_eq!(pool.trim(), kept);
    assert_eq!(pool.trim(), 0);
    assert_eq!(pool.stats().kept_bytes, 0);
    free(pool, other, 2);
    ground.check_whole();
}

/// Everything that a user of the pool does.
fn everything(pool: PoolRef, of: u64) {
    let small = take(pool, 1, of);
    let run = take(pool, 3, of);
    free(pool, small, of); // kept
    let again = take(pool, 2, of);
    free(pool, run, of);
    // Enough, that pages are made present which nobody has asked for.
    let many: Vec<_> = (0..12).map(|_| take(pool, 2, of)).collect();
    many.into_iter().for_each(|run| free(pool, run, of));
    let large = take(pool, 300, of); // more than is kept
    free(pool, large, of); // given back
    let small = take(pool, 1, of);
    let mixed = take(pool, 40, of);
    free(pool, small, of);
    pool.trim();
    free(pool, again, of);
    // More than there is.
    let all = pool.stats().total_bytes as usize / PAGE;
    assert!(pool.alloc_run(all).is_err());
    free(pool, mixed, of);
    take(pool, 1, of);
    pool.reclaim_dead();
}

/// The survivor's runs, which no death may touch.
fn survivors_runs(pool: PoolRef) -> Vec<NonNull<u8>> {
    let runs: Vec<_> = [1, 2, 1, 5, 1, 30]
        .map(|page_count| take(pool, page_count, 1))
        .into_iter()
        .collect();
    free(pool, runs[2], 1);
    [0, 1, 3, 4, 5].map(|index| runs[index]).to_vec()
}

fn check_survivor(ground: &Ground, runs: &[NonNull<u8>]) {
    let pool = ground.pool.pool();
    assert_eq!(pool.runs().filter(|run| run.note == 1).count(), runs.len());
    for &run in runs {
        check(run, pool.run_len_bytes(run.as_ptr()).unwrap(), 1);
    }
}

fn crash_at_any_point_is_recoverable() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let ground = Ground::new(64 << 20);
        let pool = ground.pool.pool();
        let runs = survivors_runs(pool);
        crash::arm(Some(k));
        let ended_well = fork(|| everything(pool, 2)).ended_well();
        crash::disarm();
        let at = crash::died_at();
        pool.verify()
            .unwrap_or_else(|error| panic!("{at:?} ({k}): {error}"));
        // By whoever comes next: the lock may be the dead one's.
        let page_count = if k % 2 == 0 { 1 } else { 350 };
        let next = take(pool, page_count, 1);
        free(pool, next, 1);
        if k % 3 == 0 {
            pool.reclaim_dead();
        }
        free_all(pool, 2);
        check_survivor(&ground, &runs);
        runs.into_iter().for_each(|run| free(pool, run, 1));
        ground.check_whole();
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for point in [
        "audited",
        "described",
        "describing",
        "ensured",
        "ensured_more",
        "freed",
        "freed_more",
        "freeing",
        "high_raised",
        "map_grown",
        "present",
        "present_more",
        "punched",
        "punched_and_freed",
        "reclaimed",
        "taken",
        "trimming",
        "unmarked",
    ] {
        let name = format!("shm.pool.{point}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
    for name in ["sem.word.locked", "shm.region.allocated"] {
        assert!(died_at.contains(name), "nobody died at {name}");
    }
}

/// One dies at `point`; the next, which finds that, at each of its own points; a third is well.
fn crash_while_recovering_is_recoverable() {
    for point in [
        "described",
        "taken",
        "ensured",
        "freeing",
        "unmarked",
        "trimming",
    ] {
        let point = format!("shm.pool.{point}");
        // Which pass is the one we want? The last, so that there is much to find.
        let first = (1..1_000)
            .find(|&k| {
                let ground = Ground::new(64 << 20);
                crash::arm(Some(k));
                let ended_well = fork(|| everything(ground.pool.pool(), 2)).ended_well();
                crash::disarm();
                assert!(!ended_well, "nobody dies at {point}");
                crash::died_at().as_ref() == Some(&point)
            })
            .unwrap();
        let mut taken_over = false;
        for k in 1.. {
            let ground = Ground::new(64 << 20);
            let pool = ground.pool.pool();
            crash::arm(Some(first));
            assert!(!fork(|| everything(pool, 2)).ended_well());
            crash::arm(Some(k));
            let ended_well = fork(|| {
                pool.reclaim_dead();
                free(pool, take(pool, 2, 3), 3);
            })
            .ended_well();
            crash::disarm();
            let died_at = crash::died_at();
            taken_over |= died_at.as_deref() == Some("shm.pool.taken_over");
            pool.verify().unwrap();
            free_all(pool, 2);
            free_all(pool, 3);
            ground.check_whole();
            if ended_well {
                break;
            }
        }
        assert!(taken_over, "nobody died while it freed a dead one's run");
    }
}

/// A new ground, on which somebody has died at `point` of `work`.
fn died_at(point: &str, max_len_bytes: usize, work: impl Fn(PoolRef)) -> Ground {
    for k in 1.. {
        let ground = Ground::new(max_len_bytes);
        crash::arm(Some(k));
        let ended_well = fork(|| work(ground.pool.pool())).ended_well();
        crash::disarm();
        assert!(!ended_well, "nobody dies at {point}");
        if crash::died_at().as_deref() == Some(point) {
            return ground;
        }
    }
    unreachable!("numbers do not end")
}

/// Runs of the dead come back without anybody asking for it: when the pool is full, and before that when it grows.
fn runs_that_the_dead_were_taking_come_back() {
    let half = (256 << 20) / PAGE;
    let ground = died_at("shm.pool.taken", 512 << 20, |pool| {
        take(pool, half, 2);
    });
    let pool = ground.pool.pool();
    assert_eq!(pool.stats().in_use_bytes, (half * PAGE) as u64);
    let info = pool.debug_info();
    assert!(info.contains("being taken by"), "{info}");
    // Too much for what seems to be left.
    let run = pool.alloc_run(half + 10).unwrap();
    assert_eq!(pool.stats().in_use_runs, 1);
    // SAFETY: nobody uses it.
    unsafe { pool.free_run(run) }.unwrap();
    ground.check_whole();
    // By growth alone, long before the pool is full.
    let ground = died_at("shm.pool.taken", 1 << 30, |pool| {
        take(pool, 64, 2);
    });
    let pool = ground.pool.pool();
    assert_eq!(pool.stats().in_use_bytes, (64 * PAGE) as u64);
    let mut runs = Vec::new();
    while pool.stats().in_use_runs != runs.len() as u64 {
        runs.push(take(pool, 32, 1));
        assert!(runs.len() < 64, "the dead one's run is not found");
    }
    runs.into_iter().for_each(|run| free(pool, run, 1));
    ground.check_whole();
}

/// Owners with a supervisor: number 0 is the test, of the others one lives, and how many have died is counted, on the board.
struct Supervised {
    me: u32,
    alive: &'static AtomicU32,
    deaths: &'static AtomicU32,
}

impl Owners for Supervised {
    fn me(&self) -> OwnerId {
        OwnerId {
            index: self.me,
            generation: 1,
        }
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        owner.index == 0 || owner.index == self.alive.load(Ordering::SeqCst)
    }
    fn deaths(&self) -> &AtomicU32 {
        self.deaths
    }
}

/// Where somebody counts deaths, the first run that is taken after one brings those of the dead back.
fn announced_death_is_followed_by_an_audit() {
    let ground = Ground::new(64 << 20);
    let pool = ground.pool.pool();
    let half = |index: usize| {
        let word: *const AtomicU64 = ground.word(index);
        // SAFETY: the low half of a word of the board, which stays mapped until the process ends; nobody uses it otherwise.
        unsafe { &*word.cast::<AtomicU32>() }
    };
    let owners = |me| {
        let supervised = Supervised {
            me,
            alive: half(1),
            deaths: half(2),
        };
        // SAFETY: the test has one thread, and nothing here protects a value.
        unsafe { current::install(Box::leak(Box::new(supervised))) };
    };
    owners(0);
    free(pool, take(pool, 40, 1), 1);
    for k in 1.. {
        half(1).store(k, Ordering::SeqCst);
        crash::arm(Some(u64::from(k)));
        let ended_well = fork(|| {
            owners(k);
            take(pool, 20, 2);
        })
        .ended_well();
        crash::disarm();
        assert!(!ended_well, "it did not die where it should");
        if crash::died_at().as_deref() == Some("shm.pool.taken") {
            break;
        }
        half(1).store(0, Ordering::SeqCst);
        pool.reclaim_dead();
    }
    // Not known to be dead yet.
    let first = take(pool, 1, 1);
    assert_eq!(pool.stats().in_use_runs, 2);
    half(1).store(0, Ordering::SeqCst);
    announce_death(half(2));
    let second = take(pool, 1, 1);
    assert_eq!(pool.stats().in_use_runs, 2, "{}", pool.debug_info());
    free(pool, first, 1);
    free(pool, second, 1);
    ground.check_whole();
    current::uninstall();
}

/// Who dies while it creates a pool leaves none, and another can be made there.
fn creation_that_was_not_finished_is_told() {
    let ground = Ground::new(16 << 20);
    let region = Region::anonymous(&ground.arena, c"half", 16 << 20).unwrap();
    for k in 1.. {
        crash::arm(Some(k));
        let ended_well = fork(|| {
            PagePool::create(&region, PAGE).unwrap();
        })
        .ended_well();
        crash::disarm();
        if ended_well {
            assert!(k > 2);
            break;
        }
        let refused = PagePool::attach(&region).unwrap_err();
        assert!(matches!(refused, Error::FormatMismatch { found: 0, .. }));
    }
    let pool = PagePool::attach(&region).unwrap().pool();
    free(pool, take(pool, 5, 1), 1);
    pool.verify().unwrap();
}

/// A dead holder of the lock is nobody to wait for.
fn dead_holder_of_the_lock_is_followed_at_once() {
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let ground = died_at("shm.pool.describing", 64 << 20, |pool| {
            take(pool, 2, 2);
        });
        let pool = ground.pool.pool();
        let begin = Instant::now();
        free(pool, take(pool, 1, 1), 1);
        fastest = fastest.min(begin.elapsed());
        ground.check_whole();
    }
    assert!(fastest < Duration::from_millis(10), "{fastest:?}");
}

/// A process killed while it takes memory for a large run does not keep that memory.
fn killed_while_growing_gives_all_of_it_back() {
    let mut random = Random::new();
    let ground = Ground::new(512 << 20);
    let pool = ground.pool.pool();
    for _ in 0..20 {
        let victim = fork(|| {
            loop {
                let run = pool.alloc_run_noted(1_600, 2).unwrap();
                // SAFETY: nobody uses it.
                unsafe { pool.free_run(run) }.unwrap();
            }
        });
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        victim.kill();
        assert!(!victim.ended_well());
        pool.verify().unwrap();
        free_all(pool, 2);
        ground.check_whole();
    }
}

const WORKERS: usize = 4;
/// Where the progress of the workers is counted, and the word that ends them; behind it places where runs are passed on.
const STOP: usize = 0;
const PROGRESS: usize = 8;
const PARCELS: usize = 64;
/// The note of runs that are passed on.
const PARCEL: u64 = 7;
const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

/// Several processes take and free, are killed and stopped at random; what a dead one had is freed while the others go on.
fn random_kills_lose_nothing_and_hang_nobody() {
    let mut random = Random::new();
    let kills = number("NETMCORE_KILLS").unwrap_or(100);
    let ground = Ground::new(256 << 20);
    let pool = ground.pool.pool();
    let start = |index: usize, of: u64, seed: u64| {
        let ground = &ground;
        (of, fork(move || work(ground, index, of, Random(seed | 1))))
    };
    let mut next_of = 100;
    let mut workers: Vec<_> = (0..WORKERS)
        .map(|index| start(index, 10 + index as u64, random.below(u64::MAX)))
        .collect();
    for _ in 0..kills {
        let pause = Instant::now() + Duration::from_micros(random.below(4_000));
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        let index = random.below(WORKERS as u64) as usize;
        let stopped = random.below(WORKERS as u64) as usize;
        if random.below(4) == 0 {
            workers[stopped].1.send(SIGSTOP);
        }
        let (of, child) = &workers[index];
        child.kill();
        assert!(!child.ended_well());
        if random.below(2) == 0 {
            pool.reclaim_dead();
        }
        free_all(pool, *of);
        if stopped != index {
            workers[stopped].1.send(SIGCONT);
        }
        let others = || (0..WORKERS).filter(|&other| other != index);
        let progress = |who: usize| ground.word(PROGRESS + who).load(Ordering::SeqCst);
        let before: Vec<u64> = (0..WORKERS).map(progress).collect();
        let deadline = Instant::now() + PATIENCE;
        while !others().all(|other| progress(other) > before[other]) {
            assert!(Instant::now() < deadline, "somebody waits for the dead");
            std::thread::yield_now();
        }
        next_of += 1;
        workers[index] = start(index, next_of, random.below(u64::MAX));
    }
    ground.set(STOP, 1);
    assert!(workers.iter().all(|(_, child)| child.ended_well()));
    pool.verify().unwrap();
    for (of, _) in &workers {
        free_all(pool, *of);
    }
    free_all(pool, PARCEL);
    ground.check_whole();
}

fn work(ground: &Ground, index: usize, of: u64, mut random: Random) {
    let pool = ground.pool.pool();
    let mut runs: Vec<(NonNull<u8>, usize)> = Vec::new();
    while ground.word(STOP).load(Ordering::Relaxed) == 0 {
        ground
            .word(PROGRESS + index)
            .fetch_add(1, Ordering::Relaxed);
        let page_count = match random.below(100) {
            0 => 1 + random.below(200),
            1..10 => 1 + random.below(20),
            10..30 => 2,
            _ => 1,
        } as usize;
        match random.below(8) {
            0..4 if runs.len() < 60 => match pool.alloc_run_noted(page_count, of) {
                Ok(run) => {
                    fill(run, page_count * PAGE, of);
                    runs.push((run, page_count));
                }
                Err(Error::OutOfPoolMemory { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            4 => {
                // Pass one on, and free what another has left there.
                let Ok(run) = pool.alloc_run_noted(page_count, PARCEL) else {
                    continue;
                };
                fill(run, page_count * PAGE, PARCEL);
                let place = ground.word(PARCELS + random.below(16) as usize);
                let found = place.swap(at(run) as u64, Ordering::AcqRel);
                if found != 0 {
                    free(pool, pointer(found), PARCEL);
                }
            }
            5 if random.below(50) == 0 => {
                pool.trim();
            }
            _ if !runs.is_empty() => {
                let (run, page_count) = runs.swap_remove(random.below(runs.len() as u64) as usize);
                assert_eq!(pool.run_len_bytes(run.as_ptr()), Some(page_count * PAGE));
                free(pool, run, of);
            }
            _ => {}
        }
    }
    for (run, page_count) in runs {
        check(run, page_count * PAGE, of);
    }
}

fn threads_share_a_pool_and_so_does_a_fork_after_them() {
    let ground = Ground::new(256 << 20);
    let pool = ground.pool.pool();
    let work = |of: u64, rounds: usize| {
        let mut runs = Vec::new();
        for round in 0..rounds {
            let page_count = 1 + (round * 7919 % 5) + usize::from(round % 100 == 0) * 90;
            runs.push(take(pool, page_count, of));
            if round % 8 != 0 {
                let run = runs.swap_remove(round * 31 % runs.len());
                free(pool, run, of);
            }
        }
        runs
    };
    let kept: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4)
            .map(|of| {
                let work = &work;
                scope.spawn(move || work(of, 600).into_iter().map(at).collect::<Vec<_>>())
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    pool.verify().unwrap();
    let child = fork(|| {
        for (runs, of) in kept.iter().zip(1..) {
            for &run in runs {
                free(pool, pointer(run as u64), of);
            }
        }
        work(9, 300);
    });
    assert!(child.ended_well());
    free_all(pool, 9);
    ground.check_whole();
}

/// A process that was forked before the region existed attaches to it; both see what the other takes.
fn growth_is_seen_by_who_attached_before() {
    let max = 256 << 20;
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    let name = ObjectName::unique(b"/pool_test_").unwrap();
    let board = AnonRegion::create(c"board", &arena, 4096).unwrap();
    // The place is the next one, as the first region of the arena behind the board.
    let place = arena.place(max).unwrap();
    let ground = |pool| Ground {
        arena: arena.clone(),
        board,
        name: name.clone(),
        pool,
    };
    let object = ShmObject::create(&name, 4096, 0o600, &NoRecord).unwrap();
    let at_place = place.at().expose_provenance();
    let region = Region::attach(&arena, RegionId(1), object.name(), at_place, max).unwrap();
    let ground = ground(PagePool::create(&region, PAGE).unwrap());
    let pool = ground.pool.pool();
    let child = fork(|| {
        // It has the address only.
        // SAFETY: an address of a pool that is mapped.
        let pool = unsafe { PoolRef::from_address(at_place) }.unwrap();
        ground.set(1, 1);
        let run = pointer(ground.get(2));
        assert_eq!(pool.run_len_bytes(run.as_ptr()), Some(1_000 * PAGE));
        free(pool, run, 5);
        let run = take(pool, 1_500, 6);
        ground.set(3, at(run) as u64);
        ground.get(4);
    });
    ground.get(1);
    ground.set(2, at(take(pool, 1_000, 5)) as u64);
    free(pool, pointer(ground.get(3)), 6);
    ground.set(4, 1);
    assert!(child.ended_well());
    ground.check_whole();
}

const SMALL: &str = "NETMCORE_TEST_IN_SMALL_SHM";

/// Runs the test again where /dev/shm has `size`, if that can be had; true in that run.
fn is_in_small_shm(test: &str, size: &str) -> bool {
    if std::env::var_os(SMALL).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg(format!(
            "mount -t tmpfs -o size={size} none /dev/shm || exit 66; exec \"$0\" \"$@\""
        ))
        .arg(std::env::current_exe().unwrap())
        .args(["--run", test])
        .env(SMALL, "1")
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => netmcore_forktest::skip(&format!("unshare cannot be started: {error}")),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(66) || said.contains("unshare failed") {
        netmcore_forktest::skip(&format!("no mount namespace can be had: {said}"));
    }
    eprint!("{}{said}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", output.status);
    false
}

/// The mount is full, and says so.
fn is_no_space(error: &Error) -> bool {
    matches!(error, Error::NoSpace { limit: SpaceLimit::Mount(path), .. } if path.as_os_str() == "/dev/shm")
}

/// Takes runs until the mount is full.
fn take_until_full(pool: PoolRef, page_count: usize, of: u64) -> Vec<NonNull<u8>> {
    let mut runs = Vec::new();
    loop {
        let in_use = pool.stats().in_use_bytes;
        match pool.alloc_run_noted(page_count, of) {
            Ok(run) => {
                fill(run, page_count * PAGE, of);
                runs.push(run);
            }
            Err(error) => {
                assert!(is_no_space(&error), "{error}");
                assert_eq!(pool.stats().in_use_bytes, in_use, "nothing is half taken");
                pool.verify().unwrap();
                return runs;
            }
        }
    }
}

/// A pool of 10 GiB where there is 1 GiB: growth ends with an error, all that was stored is there, and after freeing it goes on.
fn pool_of_10_gib_on_a_mount_of_1_gib() {
    if !is_in_small_shm("pool_of_10_gib_on_a_mount_of_1_gib", "1g") {
        return;
    }
    if netmcore_shm::headroom().bytes < 2 << 30 {
        netmcore_forktest::skip("the machine has not so much memory");
    }
    let ground = Ground::new(10 << 30);
    let pool = ground.pool.pool();
    // At once: refused before anything is taken.
    let before = ground.memory_bytes();
    let error = pool.alloc_run(2 << 30 >> 16).unwrap_err();
    assert!(is_no_space(&error), "{error}");
    assert!(ground.memory_bytes() <= before + MIB);
    ground.check_memory();
    let mut runs = take_until_full(pool, 160, 1);
    let rest = take_until_full(pool, 1, 2);
    let stored = pool.stats().in_use_bytes;
    assert!(stored > 1_022 * MIB, "{stored} bytes were stored");
    ground.check_memory();
    let check_all = |runs: &[NonNull<u8>]| {
        runs.iter().for_each(|&run| check(run, 160 * PAGE, 1));
        rest.iter().for_each(|&run| check(run, PAGE, 2));
    };
    check_all(&runs);
    // Another process finds the same, and frees something.
    let child = fork(|| {
        assert!(is_no_space(&pool.alloc_run(1).unwrap_err()));
        check_all(&runs);
        runs[..40].iter().for_each(|&run| free(pool, run, 1));
    });
    assert!(child.ended_well());
    runs.drain(..40);
    runs.extend((0..39).map(|_| take(pool, 160, 1)));
    check_all(&runs);
    runs.into_iter().for_each(|run| free(pool, run, 1));
    rest.into_iter().for_each(|run| free(pool, run, 2));
    ground.check_whole();
}

/// With little memory about: free memory that was kept is given up for a run that needs it elsewhere, and who dies when there is none
/// leaves nothing.
fn full_mount_is_told_at_any_crash_point() {
    if !is_in_small_shm("full_mount_is_told_at_any_crash_point", "24m") {
        return;
    }
    for k in 1.. {
        let ground = Ground::new(1 << 30);
        let pool = ground.pool.pool();
        let runs = take_until_full(pool, 16, 1);
        // Every second: no more than 16 pages that follow each other are free, and all keep their memory.
        let (stay, go): (Vec<_>, Vec<_>) =
            runs.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
        go.into_iter().for_each(|(_, run)| free(pool, run, 1));
        assert!(pool.stats().kept_bytes > 8 * MIB);
        crash::arm(Some(k));
        let ended_well = fork(|| {
            // Memory is given up for it.
            let large = take(pool, 100, 2);
            // More than there is, in a step and by small ones.
            let error = pool.alloc_run(400).unwrap_err();
            assert!(is_no_space(&error), "{error}");
            assert!(is_no_space(&pool.alloc_run(150).unwrap_err()));
            check(large, 100 * PAGE, 2);
        })
        .ended_well();
        crash::disarm();
        pool.verify().unwrap();
        stay.iter().for_each(|(_, run)| check(*run, 16 * PAGE, 1));
        free_all(pool, 2);
        pool.reclaim_dead();
        let large = take(pool, 100, 1);
        free(pool, large, 1);
        stay.into_iter().for_each(|(_, run)| free(pool, run, 1));
        ground.check_whole();
        if ended_well {
            assert!(k > 20);
            return;
        }
    }
}

netmcore_forktest::forktests!(
    runs_are_taken_and_freed_and_found_by_address,
    what_is_no_run_is_refused,
    notes_are_kept_for_the_layer_above,
    pool_is_attached_by_region_and_by_address,
    verify_sees_damage,
    full_pool_says_how_full,
    freed_memory_goes_back_to_the_system_but_for_some,
    crash_at_any_point_is_recoverable,
    crash_while_recovering_is_recoverable,
    runs_that_the_dead_were_taking_come_back,
    announced_death_is_followed_by_an_audit,
    creation_that_was_not_finished_is_told,
    dead_holder_of_the_lock_is_followed_at_once,
    killed_while_growing_gives_all_of_it_back,
    random_kills_lose_nothing_and_hang_nobody,
    threads_share_a_pool_and_so_does_a_fork_after_them,
    growth_is_seen_by_who_attached_before,
    pool_of_10_gib_on_a_mount_of_1_gib,
    full_mount_is_told_at_any_crash_point,
);

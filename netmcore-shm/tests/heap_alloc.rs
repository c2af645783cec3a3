//! Guards against heaps that give one block to two, lose what the living can reach, or keep the pages of the dead.
//!
//! # Safety
//!
//! Blocks are written and read by the one process that has them at that time. Boards are pages of atomics that live as long as the test. Children
//! are forked from a process with one thread, or do nothing behind the fork but allocate, free and exit.

#![allow(unsafe_code)]

mod support;

use allocator_api2::alloc::Allocator;
use allocator_api2::boxed::Box as ABox;
use allocator_api2::vec::Vec as AVec;
use netmcore_shm::{
    AnonRegion, Arena, Error, Heap, HeapRef, NoRecord, ObjectName, Region, RegionId, ShmObject,
};
use netmcore_sys::crash;
use netmcore_sys::process::{self, ExitStatus, Limit, Pid, PidFd, Resource, get_limit, set_limit};
use std::alloc::Layout;
use std::collections::BTreeSet;
use std::hash::{BuildHasher, DefaultHasher, Hasher};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use support::{Random, fork};

const MIB: usize = 1 << 20;
const PAGE: u64 = 64 << 10;

fn arena() -> Arena {
    Arena::reserve(2 << 30).unwrap()
}

fn heap(arena: &Arena) -> Heap {
    Heap::anonymous(arena, 256 * MIB).unwrap()
}

/// Words that the processes of a test share.
struct Board(AnonRegion);

impl Board {
    fn new(arena: &Arena) -> Board {
        Board(AnonRegion::create(c"board", arena, 64 << 10).unwrap())
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < 8192);
        // SAFETY: in the page, which holds atomics only and is mapped as long as the board.
        unsafe { &*self.0.at().cast::<AtomicU64>().add(index) }
    }
}

/// A block, filled with a pattern of its own.
#[derive(Clone, Copy, Debug)]
struct Filled {
    at: NonNull<u8>,
    layout: Layout,
    pattern: u8,
}

fn layout(len_bytes: usize, align: usize) -> Layout {
    Layout::from_size_align(len_bytes, align).unwrap()
}

impl Filled {
    fn new(heap: HeapRef, layout: Layout, pattern: u8) -> netmcore_shm::Result<Filled> {
        let at = heap.allocate(layout)?;
        assert!(at.as_ptr().addr().is_multiple_of(layout.align()));
        assert!(heap.contains(at.as_ptr()));
        // SAFETY: the block is ours and so long.
        unsafe { at.write_bytes(pattern, layout.size()) };
        Ok(Filled {
            at,
            layout,
            pattern,
        })
    }

    fn check(&self) {
        // SAFETY: the block is ours and was written.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.at.as_ptr().cast_const(), self.layout.size())
        };
        let wrong = bytes.iter().position(|&byte| byte != self.pattern);
        assert!(wrong.is_none(), "{self:?} was overwritten at {wrong:?}");
    }

    fn free(self, heap: HeapRef) {
        self.check();
        // SAFETY: allocated with this layout, not used any more.
        unsafe { heap.deallocate(self.at, self.layout) };
    }

    fn overlaps(&self, other: &Filled) -> bool {
        let range = |block: &Filled| {
            let start = block.at.as_ptr().addr();
            start..start + block.layout.size()
        };
        let (one, two) = (range(self), range(other));
        one.start < two.end && two.start < one.end
    }
}

/// The block at an address that somebody has told.
fn open(address: usize, len_bytes: usize, pattern: u8) -> Filled {
    Filled {
        at: NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap(),
        layout: layout(len_bytes, 8),
        pattern,
    }
}

/// Mostly small, some of a page and more, a few with strange alignments.
fn random_layout(random: &mut Random) -> Layout {
    let len_bytes = match random.below(20) {
        0..12 => random.below(300),
        12..17 => random.below(9_000),
        17..19 => random.below(70_000),
        _ => random.below(400_000),
    } as usize;
    let align = match random.below(12) {
        0 => 1 << random.below(18),
        _ => 8,
    };
    layout(len_bytes, align)
}

fn in_use(heap: &Heap) -> u64 {
    heap.stats().in_use_blocks
}

/// Every page that the heap has taken holds a block in use.
fn check_no_page_is_kept(heap: &Heap) {
    heap.trim();
    for owner in heap.owners() {
        assert!(
            owner.page_bytes <= owner.in_use_bytes + PAGE * owner.in_use_blocks,
            "pages without blocks: {owner:?}"
        );
        assert!(owner.in_use_blocks > 0, "an owner of nothing: {owner:?}");
    }
}

fn all_sizes_and_alignments() {
    let arena = arena();
    let heap = heap(&arena);
    let all: Vec<_> = (0..18)
        .flat_map(|power| {
            [0, 1, 17, 100, 1_024, 1_500, 16_385, 32_704, 32_705, 70_000]
                .map(|len| layout(len, 1 << power))
        })
        .enumerate()
        .map(|(number, layout)| Filled::new(heap.allocator(), layout, number as u8).unwrap())
        .collect();
    assert_eq!(in_use(&heap), all.len() as u64);
    for (number, block) in all.iter().enumerate() {
        assert!(!all[..number].iter().any(|other| other.overlaps(block)));
    }
    let bytes: usize = all.iter().map(|block| block.layout.size()).sum();
    assert!(heap.stats().in_use_bytes >= bytes as u64);
    heap.verify().unwrap();
    all.into_iter()
        .for_each(|block| block.free(heap.allocator()));
    assert_eq!(in_use(&heap), 0);
    check_no_page_is_kept(&heap);
    assert_eq!(heap.owners(), []);
    heap.verify().unwrap();
}

/// Grown and shrunk blocks keep their contents, and stay where they are if their memory is the same.
fn resized_blocks_keep_their_contents() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let mut random = Random::new();
    for _ in 0..2_000 {
        let (old, new) = (random_layout(&mut random), random_layout(&mut random));
        let block = Allocator::allocate(&alloc, old).unwrap().cast::<u8>();
        // SAFETY: the block is ours and so long.
        unsafe { block.write_bytes(0x5a, old.size()) };
        // SAFETY: the block is of this heap and layout, and the calls are chosen by what is longer.
        let resized = unsafe {
            if new.size() < old.size() {
                alloc.shrink(block, old, new)
            } else if random.below(2) == 0 {
                alloc.grow_zeroed(block, old, new)
            } else {
                alloc.grow(block, old, new)
            }
        };
        let resized = resized.unwrap();
        assert_eq!(resized.len(), new.size());
        assert!(
            resized
                .cast::<u8>()
                .as_ptr()
                .addr()
                .is_multiple_of(new.align())
        );
        let kept = Filled {
            at: resized.cast(),
            layout: layout(old.size().min(new.size()), new.align()),
            pattern: 0x5a,
        };
        kept.check();
        // SAFETY: the block has this layout now.
        unsafe { Allocator::deallocate(&alloc, resized.cast(), new) };
        assert_eq!(in_use(&heap), 0, "{old:?} {new:?}");
    }
    let block = Allocator::allocate(&alloc, layout(50, 8))
        .unwrap()
        .cast::<u8>();
    // SAFETY: as above.
    let (same, zeroed) = unsafe {
        let same = alloc.grow(block, layout(50, 8), layout(64, 16)).unwrap();
        (same, alloc.allocate_zeroed(layout(200_000, 8)).unwrap())
    };
    assert_eq!(same.cast(), block);
    let zeroed = Filled {
        at: zeroed.cast(),
        layout: layout(200_000, 8),
        pattern: 0,
    };
    zeroed.free(alloc);
    // SAFETY: the block has this layout now.
    unsafe { alloc.deallocate(block, layout(64, 16)) };
    assert_eq!(in_use(&heap), 0);
}

/// The model: what the parent has. Children allocate, free blocks of the parent's, and die at a random step of it.
fn heap_matches_an_oracle_with_deaths() {
    let mut random = Random::new();
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let board = Board::new(&arena);
    let mut ours: Vec<Filled> = Vec::new();
    let mut lost = 0;
    let mut deaths = 0;
    let (freed_count, made_count, is_freeing, is_making) =
        (board.word(0), board.word(1), board.word(2), board.word(3));
    for round in 0..150_u64 {
        for _ in 0..random.below(60) {
            if random.below(5) < 3 {
                let layout = random_layout(&mut random);
                let new = Filled::new(alloc, layout, random.below(256) as u8).unwrap();
                assert!(!ours.iter().any(|other| other.overlaps(&new)));
                ours.push(new);
            } else if !ours.is_empty() {
                let index = random.below(ours.len() as u64) as usize;
                ours.swap_remove(index).free(alloc);
            }
        }
        assert_eq!(in_use(&heap), ours.len() as u64 + lost);
        // The child frees the first of these, and keeps half of what it allocates.
        let given = random.below(ours.len() as u64 + 1) as usize;
        let given: Vec<_> = ours.drain(..given).collect();
        for word in 0..4 {
            board.word(word).store(0, SeqCst);
        }
        let die_at = 1 + random.below(120);
        crash::arm((round % 4 != 0).then_some(die_at));
        let ended_well = fork(|| {
            for block in &given {
                is_freeing.store(1, SeqCst);
                block.free(alloc);
                freed_count.fetch_add(1, SeqCst);
                is_freeing.store(0, SeqCst);
                is_making.store(1, SeqCst);
                let own = Filled::new(alloc, random_layout(&mut random), 7).unwrap();
                made_count.fetch_add(1, SeqCst);
                is_making.store(0, SeqCst);
                if random.below(2) == 0 {
                    own.check();
                } else {
                    is_freeing.store(2, SeqCst);
                    own.free(alloc);
                    made_count.fetch_sub(1, SeqCst);
                    is_freeing.store(0, SeqCst);
                }
            }
        })
        .ended_well();
        crash::disarm();
        deaths += u64::from(!ended_well);
        heap.verify()
            .unwrap_or_else(|error| panic!("{:?}: {error}", crash::died_at()));
        // What is left of what was given is the parent's again, but for the one that was being freed.
        let freed = freed_count.load(SeqCst) as usize;
        let made = made_count.load(SeqCst);
        let in_doubt = usize::from(is_freeing.load(SeqCst) == 1);
        ours.extend(&given[(freed + in_doubt).min(given.len())..]);
        let known = ours.len() as u64 + lost + made;
        let counted = in_use(&heap);
        let most = known + is_making.load(SeqCst) + u64::from(is_freeing.load(SeqCst) == 1);
        let least = known - u64::from(is_freeing.load(SeqCst) == 2);
        assert!(
            (least..=most).contains(&counted),
            "{counted} blocks in use, {least} to {most} expected: {:?}",
            crash::died_at()
        );
        lost = counted - ours.len() as u64;
        ours.iter().for_each(Filled::check);
        // All that is lost was allocated by the dead.
        assert!(heap.stats().dead_blocks >= lost);
    }
    assert!(deaths > 30, "{deaths}");
    ours.drain(..).for_each(|block| block.free(alloc));
    let stats = heap.stats();
    assert_eq!((stats.in_use_blocks, stats.dead_blocks), (lost, lost));
    assert_eq!(stats.in_use_bytes, stats.dead_bytes);
    check_no_page_is_kept(&heap);
    heap.verify().unwrap();
}

/// What a process does with a heap.
fn everything(heap: &Heap, given: &[Filled]) {
    let alloc = heap.allocator();
    let make = |count: usize, len: usize, pattern: u8| -> Vec<Filled> {
        (0..count)
            .map(|_| Filled::new(alloc, layout(len, 8), pattern).unwrap())
            .collect()
    };
    // Adopts what the dead left, fills pages, frees them in another order, gives them back.
    let own = make(5, 14_000, 1);
    let more = make(8, 14_000, 2);
    let small = make(20, 1_000, 3);
    given.iter().for_each(|block| block.free(alloc));
    more.into_iter().for_each(|block| block.free(alloc));
    small.into_iter().rev().for_each(|block| block.free(alloc));
    Filled::new(alloc, layout(150_000, 8), 4)
        .unwrap()
        .free(alloc);
    // A thread ends, and its page is abandoned, and emptied by somebody else.
    let of_thread = || {
        let block = Filled::new(alloc, layout(3_000, 8), 5).unwrap();
        block.at.as_ptr().expose_provenance()
    };
    let at = std::thread::scope(|scope| scope.spawn(of_thread).join().unwrap());
    let block = Filled {
        at: NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap(),
        layout: layout(3_000, 8),
        pattern: 5,
    };
    block.free(alloc);
    heap.trim();
    own.into_iter().for_each(|block| block.free(alloc));
    Heap::leave();
}

/// Ends the life of a heap, so that the next children do not inherit it.
fn forget(heap: Heap) {
    let id = heap.region().id();
    drop(heap);
    // SAFETY: the tests have no reference into the heap any more, and one thread.
    unsafe { netmcore_shm::forget_regions_if(|region| region.id() == id) }.unwrap();
}

fn check_that_somebody_died_at(died_at: &BTreeSet<String>, steps: &[&str]) {
    for step in steps {
        let name = format!("shm.heap.{step}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

fn crash_at_any_point_leaves_the_others_well() {
    let mut died_at = BTreeSet::new();
    let arena = Arena::reserve(1 << 40).unwrap();
    let (mut first_at, mut k) = (40, 0);
    while first_at <= 110 {
        k += 1;
        let heap = heap(&arena);
        let alloc = heap.allocator();
        let make = |count: usize, len: usize, pattern: u8| -> Vec<Filled> {
            (0..count)
                .map(|_| Filled::new(alloc, layout(len, 8), pattern).unwrap())
                .collect()
        };
        let (ours, given) = (make(6, 14_000, 10), make(8, 1_000, 11));
        // One has died before, with pages in use, and perhaps in the middle of something.
        crash::arm(Some(first_at));
        assert!(!fork(|| everything(&heap, &[])).ended_well());
        crash::disarm();
        heap.verify().unwrap();
        let lost_before = in_use(&heap) - 14;
        assert!(lost_before <= 33, "{lost_before}");
        crash::arm(Some(k));
        let ended_well = fork(|| everything(&heap, &given)).ended_well();
        crash::disarm();
        let at = crash::died_at();
        heap.verify()
            .unwrap_or_else(|error| panic!("{at:?}: {error}"));
        ours.iter().for_each(Filled::check);
        let lost = in_use(&heap) - 6;
        // What it had, and what it was given.
        assert!(lost <= lost_before + 33 + 8, "{at:?}: {lost}");
        if ended_well {
            assert_eq!(lost, lost_before);
        }
        // The survivor goes on.
        let more = make(10, 14_000, 12);
        more.iter().chain(&ours).for_each(Filled::check);
        ours.into_iter()
            .chain(more)
            .for_each(|block| block.free(alloc));
        assert_eq!(in_use(&heap), lost, "{at:?}");
        assert!(heap.stats().dead_blocks >= lost.saturating_sub(8));
        check_no_page_is_kept(&heap);
        heap.verify()
            .unwrap_or_else(|error| panic!("{at:?}: {error}"));
        forget(heap);
        died_at.extend(at);
        if ended_well {
            (first_at, k) = (first_at + 35, 0);
        }
    }
    check_that_somebody_died_at(
        &died_at,
        &[
            "allocated",
            "freed",
            "freed_remotely",
            "page_abandoned",
            "page_adopted",
            "page_emptied",
            "page_left",
            "page_made",
            "page_returned",
            "page_taken",
            "run_allocated",
            "run_freed",
        ],
    );
}

/// One dies while it takes pages and gives them back, and the next one while it adopts them.
fn crash_while_adopting_from_the_dead() {
    let arena = Arena::reserve(1 << 40).unwrap();
    let mut died_at = BTreeSet::new();
    let mut first_at = 1;
    let mut first_ended_well = false;
    while !first_ended_well {
        for second_at in 1.. {
            let heap = heap(&arena);
            let alloc = heap.allocator();
            crash::arm(Some(first_at));
            first_ended_well = fork(|| {
                // Two pages, of which the first becomes empty.
                let blocks = [(); 5].map(|()| Filled::new(alloc, layout(20_000, 8), 1).unwrap());
                blocks
                    .into_iter()
                    .take(3)
                    .for_each(|block| block.free(alloc));
            })
            .ended_well();
            crash::disarm();
            let before = in_use(&heap);
            assert!(before <= 5);
            crash::arm(Some(second_at));
            let ended_well = fork(|| {
                let block = Filled::new(alloc, layout(30_000, 8), 2).unwrap();
                block.free(alloc);
                heap.trim();
            })
            .ended_well();
            crash::disarm();
            let at = crash::died_at();
            heap.verify()
                .unwrap_or_else(|error| panic!("{at:?}: {error}"));
            let after = in_use(&heap);
            assert!((before..=before + 1).contains(&after), "{at:?}");
            assert_eq!(
                heap.stats().dead_blocks,
                after,
                "{at:?}: all were the dead's"
            );
            check_no_page_is_kept(&heap);
            assert_eq!((in_use(&heap), heap.stats().dead_blocks), (after, after));
            heap.verify().unwrap();
            forget(heap);
            died_at.extend(at);
            if ended_well {
                break;
            }
        }
        first_at += 1;
    }
    check_that_somebody_died_at(
        &died_at,
        &[
            "dead_marked",
            "half_page_adopted",
            "page_adopted",
            "page_left",
            "page_returned",
        ],
    );
}

/// Processes exchange blocks through a board, and are killed at random.
fn random_kills_lose_only_what_the_dead_had() {
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(150);
    let arena = arena();
    let heap = heap(&arena);
    let board = Board::new(&arena);
    const PLACES: u64 = 200;
    // A parcel: the length, which the pattern follows from, and the offset.
    let base = heap.allocator().address();
    let open = |parcel: u64| {
        let len = (parcel >> 40) as usize;
        let at = std::ptr::with_exposed_provenance_mut(base + (parcel & ((1 << 40) - 1)) as usize);
        Filled {
            at: NonNull::new(at).unwrap(),
            layout: layout(len, 8),
            pattern: len as u8,
        }
    };
    let exchange = |seed: u64| {
        let mut random = Random(seed | 1);
        loop {
            let len = match random.below(30) {
                0 => 40_000 + random.below(100_000),
                1..5 => 1 + random.below(5_000),
                _ => 1 + random.below(200),
            };
            let made = Filled::new(heap.allocator(), layout(len as usize, 8), len as u8).unwrap();
            let offset = made.at.as_ptr().expose_provenance() - base;
            let place = board.word(random.below(PLACES) as usize);
            let found = place.swap(len << 40 | offset as u64, SeqCst);
            if found != 0 {
                open(found).free(heap.allocator());
            }
        }
    };
    let start = |seed| fork(|| exchange(seed));
    let mut children: Vec<_> = (0..3).map(|_| start(random.below(u64::MAX))).collect();
    for _ in 0..kills {
        // sleep: to be killed at a random moment.
        std::thread::sleep(std::time::Duration::from_micros(random.below(3_000)));
        let victim = random.below(3) as usize;
        children[victim].kill();
        assert!(!children[victim].ended_well());
        children[victim] = start(random.below(u64::MAX));
    }
    for child in children {
        child.kill();
        assert!(!child.ended_well());
    }
    heap.verify().unwrap();
    for place in 0..PLACES {
        match board.word(place as usize).load(SeqCst) {
            0 => (),
            parcel => open(parcel).free(heap.allocator()),
        }
    }
    let stats = heap.stats();
    assert!(stats.in_use_blocks <= 2 * (kills + 3), "{stats:?}");
    assert_eq!(stats.dead_blocks, stats.in_use_blocks);
    check_no_page_is_kept(&heap);
    heap.verify().unwrap();
}

/// Threads of one process exchange blocks; their pages are abandoned at their ends.
fn threads_share_a_heap() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let places: Vec<_> = (0..64)
        .map(|_| std::sync::Mutex::new(None::<(usize, usize)>))
        .collect();
    let open = |(at, len): (usize, usize)| Filled {
        at: NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap(),
        layout: layout(len, 8),
        pattern: len as u8,
    };
    for round in 0..3 {
        std::thread::scope(|scope| {
            let work = |thread: u64| {
                let (places, open) = (&places, &open);
                scope.spawn(move || {
                    let mut random = Random(round * 4 + thread + 77);
                    for _ in 0..20_000 {
                        let len = 1 + random.below(2_000) as usize;
                        let made = Filled::new(alloc, layout(len, 8), len as u8).unwrap();
                        let made = Some((made.at.as_ptr().expose_provenance(), len));
                        let place = &places[random.below(64) as usize];
                        let found = std::mem::replace(&mut *place.lock().unwrap(), made);
                        if let Some(found) = found {
                            open(found).free(alloc);
                        }
                    }
                })
            };
            // Joined, so that their pages are abandoned.
            for thread in [0, 1, 2, 3].map(work) {
                thread.join().unwrap();
            }
        });
        heap.verify().unwrap();
        assert_eq!(in_use(&heap), 64);
        let owners = heap.owners();
        assert!(
            owners
                .iter()
                .all(|owner| owner.is_alive && owner.dead_blocks == 0),
            "{owners:?}"
        );
    }
    for place in places {
        open(place.into_inner().unwrap().unwrap()).free(alloc);
    }
    assert_eq!(in_use(&heap), 0);
    heap.trim();
    assert_eq!(heap.owners(), []);
}

/// A thread forks while others are in the middle of allocations; the child must not allocate from their pages, or its parent's.
fn fork_among_threads() {
    let arena = arena();
    let heap = heap(&arena);
    let board = Board::new(&arena);
    let stop = board.word(0);
    let alloc = heap.allocator();
    let work = |rounds: u64, pattern: u8| {
        let mut random = Random(pattern.into());
        let mut own: Vec<Filled> = Vec::new();
        for _ in 0..rounds {
            if own.len() > 50 {
                own.swap_remove(random.below(50) as usize).free(alloc);
            }
            own.push(
                Filled::new(alloc, layout(1 + random.below(700) as usize, 8), pattern).unwrap(),
            );
        }
        own.into_iter().for_each(|block| block.free(alloc));
    };
    // In a child, so that the threads are its own.
    let parent = fork(|| {
        let inherited = Filled::new(alloc, layout(100, 8), 99).unwrap();
        std::thread::scope(|scope| {
            for thread in 1..3 {
                scope.spawn(move || {
                    while stop.load(SeqCst) == 0 {
                        work(500, thread)
                    }
                });
            }
            scope.spawn(|| {
                let own = Filled::new(alloc, layout(100, 8), 50).unwrap();
                for child in 0..60 {
                    let child = fork_anyhow(|| {
                        work(2_000, 100 + child);
                        own.check();
                    });
                    work(300, 51);
                    assert_eq!(child.wait().unwrap(), ExitStatus::Exited { code: 0 });
                }
                own.free(alloc);
                stop.store(1, SeqCst);
            });
        });
        inherited.free(alloc);
        heap.verify().unwrap();
    });
    assert!(parent.ended_well());
    assert_eq!(in_use(&heap), 0);
    check_no_page_is_kept(&heap);
    heap.verify().unwrap();
}

/// Forks a process that has other threads, which the system's own call allows and netmcore's does not.
fn fork_anyhow(body: impl FnOnce()) -> PidFd {
    unsafe extern "C" {
        fn fork() -> i32;
    }
    // SAFETY: the child calls `body`, which the tests keep to what is safe there, and exits.
    match unsafe { fork() } {
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            process::exit_now(if done.is_ok() { 0 } else { 101 })
        }
        pid => PidFd::open(Pid::new(pid).unwrap()).unwrap(),
    }
}

/// A hasher whose keys lie in the map. hashbrown's own takes a part of them from the process.
#[derive(Clone, Copy)]
struct Keyed(u64);

impl BuildHasher for Keyed {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}

/// `Vec`, `Box` and `HashMap` of others, made, filled and read by different processes.
fn containers_of_others_are_shared() {
    type Map = hashbrown::HashMap<u64, AVec<u64, HeapRef>, Keyed, HeapRef>;
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let map: *mut Map =
        ABox::into_raw_with_allocator(ABox::new_in(Map::with_hasher_in(Keyed(4711), alloc), alloc))
            .0;
    // SAFETY: the map is used by one process at a time, as each waits for the end of the other.
    let map = || unsafe { &mut *map };
    for child in 0..4_u64 {
        let child = fork(|| {
            for key in (0..2_000).map(|key| key * 4 + child) {
                let mut list = AVec::new_in(alloc);
                list.extend(0..key % 50);
                assert!(map().insert(key, list).is_none());
            }
            for key in (0..500).map(|key| key * 4 + child) {
                map().get_mut(&key).unwrap().push(1_000_000);
            }
        });
        assert!(child.ended_well());
    }
    assert_eq!(map().len(), 8_000);
    for key in 0..8_000 {
        let list = &map()[&key];
        let expected = (0..key % 50).chain((key < 2_000).then_some(1_000_000));
        assert!(list.iter().copied().eq(expected), "{key}");
    }
    map().retain(|key, _| key % 2 == 0);
    // SAFETY: from the box above; nobody else uses it any more.
    drop(unsafe { ABox::from_raw_in(map(), alloc) });
    assert_eq!(in_use(&heap), 0);
    heap.verify().unwrap();
}

/// What the dead allocated is counted until it is freed, whoever has adopted their pages; what the living have is not.
fn blocks_of_the_dead_are_counted() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let board = Board::new(&arena);
    let ours: Vec<_> = (0..100)
        .map(|_| Filled::new(alloc, layout(64, 8), 1).unwrap())
        .collect();
    let child = |leaves: bool| {
        let child = fork(|| {
            for number in 0..1_000 {
                let block = Filled::new(alloc, layout(64, 8), 2).unwrap();
                board
                    .word(number)
                    .store(block.at.as_ptr().expose_provenance() as u64, SeqCst);
            }
            Filled::new(alloc, layout(100_000, 8), 3).unwrap();
            if leaves {
                Heap::leave();
            }
        });
        assert!(child.ended_well());
    };
    let free = |numbers: std::ops::Range<usize>| {
        for number in numbers {
            let at = board.word(number).load(SeqCst) as usize;
            let block = Filled {
                at: NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap(),
                layout: layout(64, 8),
                pattern: 2,
            };
            block.free(alloc);
        }
    };
    child(false);
    let dead = || (heap.stats().dead_blocks, heap.stats().dead_bytes);
    assert_eq!(dead(), (1_001, 64_000 + 2 * PAGE));
    free(0..500);
    assert_eq!(dead(), (501, 32_000 + 2 * PAGE));
    // The page is adopted, and its free blocks are ours.
    let more: Vec<_> = (0..2_000)
        .map(|_| Filled::new(alloc, layout(64, 8), 4).unwrap())
        .collect();
    assert!(
        heap.owners()
            .iter()
            .any(|owner| owner.is_alive && owner.dead_blocks == 500),
        "{:?}",
        heap.owners()
    );
    assert_eq!(dead(), (501, 32_000 + 2 * PAGE));
    free(500..600);
    let again: Vec<_> = (0..2_000)
        .map(|_| Filled::new(alloc, layout(64, 8), 4).unwrap())
        .collect();
    assert_eq!(dead(), (401, 400 * 64 + 2 * PAGE));
    free(600..1_000);
    assert_eq!(dead(), (1, 2 * PAGE));
    more.into_iter()
        .chain(again)
        .for_each(|block| block.free(alloc));
    // Who says that it goes leaves nothing to the dead.
    child(true);
    assert_eq!(dead(), (1, 2 * PAGE));
    free(0..1_000);
    ours.into_iter().for_each(|block| block.free(alloc));
    assert_eq!(heap.stats().in_use_bytes, 4 * PAGE);
    heap.verify().unwrap();
}

/// A block of the dead that its adopter frees, and allocates at once, is the adopter's.
fn block_of_the_dead_is_used_again() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let board = Board::new(&arena);
    let child = fork(|| {
        for number in 0..10 {
            let block = Filled::new(alloc, layout(64, 8), 1).unwrap();
            board
                .word(number)
                .store(block.at.as_ptr().expose_provenance() as u64, SeqCst);
        }
    });
    assert!(child.ended_well());
    let mut ours = vec![Filled::new(alloc, layout(64, 8), 2).unwrap()];
    for number in 0..5 {
        open(board.word(number).load(SeqCst) as usize, 64, 1).free(alloc);
        ours.push(Filled::new(alloc, layout(64, 8), 3).unwrap());
    }
    ours.extend((0..60).map(|_| Filled::new(alloc, layout(64, 8), 4).unwrap()));
    let stats = heap.stats();
    assert_eq!((stats.in_use_blocks, stats.dead_blocks), (71, 5));
}

/// Two free blocks of a third one's, with bits in the same words, at the same time.
fn frees_of_two_at_once_are_both_done() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let board = Board::new(&arena);
    const BLOCKS: usize = 4_000;
    let start = |which: usize| {
        let (board, arrived, go) = (&board, board.word(8_000), board.word(8_001));
        fork(move || {
            for round in 1..=30 {
                arrived.fetch_add(1, SeqCst);
                while go.load(SeqCst) < round {
                    std::hint::spin_loop();
                }
                for number in (which..BLOCKS).step_by(2) {
                    open(board.word(number).load(SeqCst) as usize, 16, 1).free(alloc);
                }
            }
        })
    };
    let children = [0, 1].map(start);
    for round in 1..=30 {
        for number in 0..BLOCKS {
            let block = Filled::new(alloc, layout(16, 8), 1).unwrap();
            board
                .word(number)
                .store(block.at.as_ptr().expose_provenance() as u64, SeqCst);
        }
        assert_eq!(in_use(&heap), BLOCKS as u64);
        while board.word(8_000).load(SeqCst) < 2 * round {
            std::thread::yield_now();
        }
        board.word(8_001).store(round, SeqCst);
        while board.word(8_000).load(SeqCst) < 2 * (round + 1) && round < 30 {
            std::thread::yield_now();
        }
        if round < 30 {
            assert_eq!(in_use(&heap), 0);
        }
    }
    assert!(children.iter().all(support::Child::ended_well));
    assert_eq!(in_use(&heap), 0);
    heap.verify().unwrap();
}

/// Who frees the blocks of others tells them, and they give the pages back.
fn pages_emptied_by_others_are_given_back() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let blocks: Vec<_> = (0..20_000)
        .map(|_| Filled::new(alloc, layout(64, 8), 1).unwrap())
        .collect();
    let full = heap.owners()[0].page_bytes;
    assert!(full >= 20_000 * 64);
    let freer = fork(|| blocks.iter().for_each(|block| block.free(alloc)));
    assert!(freer.ended_well());
    assert_eq!(in_use(&heap), 0);
    // Within two words of its bitmap.
    let few: Vec<_> = (0..128)
        .map(|_| Filled::new(alloc, layout(64, 8), 1).unwrap())
        .collect();
    assert!(
        heap.owners()[0].page_bytes <= 2 * PAGE,
        "{:?}",
        heap.owners()
    );
    few.into_iter().for_each(|block| block.free(alloc));
    // Blocks freed by others are used again before the heap grows.
    for _ in 0..200 {
        let blocks: Vec<_> = (0..500)
            .map(|_| Filled::new(alloc, layout(64, 8), 1).unwrap())
            .collect();
        std::thread::scope(|scope| {
            let blocks: Vec<_> = blocks
                .iter()
                .map(|block| block.at.as_ptr().expose_provenance())
                .collect();
            scope.spawn(move || {
                for at in blocks {
                    let at = NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap();
                    Filled {
                        at,
                        layout: layout(64, 8),
                        pattern: 1,
                    }
                    .free(alloc);
                }
            });
        });
    }
    assert!(
        heap.owners()[0].page_bytes <= 4 * PAGE,
        "{:?}",
        heap.owners()
    );
}

/// Who has many pages does not look through all of them each time that others have emptied one, which took 50 µs for each block of 16 KB in flight.
fn many_pages_are_not_looked_through_for_each_hint() {
    const PER_PAGE: usize = 3;
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let make = |len: usize, count: usize| -> Vec<Filled> {
        (0..count)
            .map(|_| Filled::new(alloc, layout(len, 8), 1).unwrap())
            .collect()
    };
    let mut large = make(16_000, 100 * PER_PAGE);
    let free_a_page_elsewhere = |blocks: &mut Vec<Filled>| {
        let blocks: Vec<_> = blocks.drain(30..30 + PER_PAGE).collect();
        assert!(fork(|| blocks.iter().for_each(|block| block.free(alloc))).ended_well());
    };
    // Each opens a word of the bitmap.
    let mut words: Vec<_> = make(16, 1);
    let page_bytes = || heap.owners()[0].page_bytes;
    let full = page_bytes();
    assert_eq!(full, 101 * PAGE);
    free_a_page_elsewhere(&mut large);
    words.extend(make(16, 64));
    assert_eq!(page_bytes(), full - PAGE);
    free_a_page_elsewhere(&mut large);
    words.extend(make(16, 64));
    assert_eq!(page_bytes(), full - PAGE, "it has looked so soon again");
    words.extend(make(16, 64 * 20));
    assert_eq!(page_bytes(), full - 2 * PAGE);
    free_a_page_elsewhere(&mut large);
    words.extend(make(16, 64));
    // Who needs the memory gets it at once.
    assert!(
        fork(|| {
            heap.trim();
        })
        .ended_well()
    );
    words.extend(make(16, 64));
    assert_eq!(page_bytes(), full - 3 * PAGE);
    large
        .into_iter()
        .chain(words)
        .for_each(|block| block.free(alloc));
    heap.verify().unwrap();
}

/// A heap with a name grows while others are attached, who see what lies in the new part.
fn named_heap_grows_under_the_attached() {
    let name = Name::new();
    let arena = Arena::reserve(64 << 30).unwrap();
    let region =
        Region::create(&arena, &name.0, 0, Region::DEFAULT_MAX_LEN_BYTES, &NoRecord).unwrap();
    let heap = Heap::create(&region).unwrap();
    let short = region.len_bytes().unwrap();
    assert!(short <= MIB as u64, "{short}");
    let board = Board::new(&arena);
    let place = region.at().addr();
    let attached = fork(|| {
        // As a process that was not forked with it mapped.
        // SAFETY: this process has nothing in it.
        unsafe { netmcore_shm::forget_regions_if(|region| region.name().is_some()) }.unwrap();
        let region = Region::attach(
            &arena,
            RegionId(place as u64),
            &name.0,
            place,
            Region::DEFAULT_MAX_LEN_BYTES,
        )
        .unwrap();
        let heap = Heap::attach(&region).unwrap();
        board.word(0).store(1, SeqCst);
        for number in 1..=100 {
            while board.word(number).load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            let at = board.word(number).load(SeqCst) as usize;
            let block = Filled {
                at: NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap(),
                layout: layout(400_000, 8),
                pattern: number as u8,
            };
            block.free(heap.allocator());
        }
    });
    while board.word(0).load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let blocks: Vec<_> = (1..=100)
        .map(|number| Filled::new(heap.allocator(), layout(400_000, 8), number as u8).unwrap())
        .collect();
    for (number, block) in (1..).zip(&blocks) {
        board
            .word(number)
            .store(block.at.as_ptr().expose_provenance() as u64, SeqCst);
    }
    assert!(attached.ended_well());
    assert!(region.len_bytes().unwrap() >= 40_000_000);
    assert_eq!(in_use(&heap), 0);
    heap.verify().unwrap();
    assert!(heap.trim() > 0 || heap.stats().committed_bytes < 40_000_000);
}

struct Name(ObjectName);

impl Name {
    fn new() -> Name {
        Name(ObjectName::unique(b"/heap_test_").unwrap())
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = ShmObject::unlink(&self.0, &NoRecord);
    }
}

/// Neither the heap's own limit nor that of the system is a signal, and all that was there stays.
fn full_heap_says_so_and_stays_whole() {
    let arena = arena();
    let heap = Heap::anonymous(&arena, 8 * MIB).unwrap();
    let alloc = heap.allocator();
    let fill = |len: usize| {
        let mut blocks = Vec::new();
        let error = loop {
            match Filled::new(alloc, layout(len, 8), len as u8) {
                Ok(block) => blocks.push(block),
                Err(error) => break error,
            }
        };
        (blocks, error)
    };
    for len in [16, 64, 1_000, 30_000, 200_000] {
        let (blocks, error) = fill(len);
        assert!(matches!(error, Error::OutOfPoolMemory { .. }), "{error}");
        assert!(Allocator::allocate(&alloc, layout(len, 8)).is_err());
        let bytes = blocks.len() * len;
        assert!(bytes >= 5 * MIB, "{len}: {bytes}");
        heap.verify().unwrap();
        blocks.into_iter().for_each(|block| block.free(alloc));
        heap.verify().unwrap();
        assert_eq!(in_use(&heap), 0);
    }
    // What a dead one had, and is empty, is found before the heap is full.
    let child = fork(|| {
        let (blocks, _) = fill(100);
        blocks.into_iter().for_each(|block| block.free(alloc));
        Filled::new(alloc, layout(3_000, 8), 1).unwrap();
    });
    assert!(child.ended_well());
    let (blocks, _) = fill(500);
    assert!(blocks.len() * 500 >= 5 * MIB);
    blocks.into_iter().for_each(|block| block.free(alloc));
}

/// The limit of file sizes stands for a full file system.
fn system_without_memory_says_so() {
    let name = Name::new();
    let arena = Arena::reserve(64 << 30).unwrap();
    let region =
        Region::create(&arena, &name.0, 0, Region::DEFAULT_MAX_LEN_BYTES, &NoRecord).unwrap();
    let heap = Heap::create(&region).unwrap();
    let alloc = heap.allocator();
    let first = Filled::new(alloc, layout(1_000, 8), 1).unwrap();
    let old = get_limit(Resource::FileSizeBytes).unwrap();
    let limit = Limit {
        soft: Some(8 << 20),
        ..old
    };
    set_limit(Resource::FileSizeBytes, limit).unwrap();
    let mut blocks = Vec::new();
    let error = loop {
        match Filled::new(alloc, layout(5_000, 8), 2) {
            Ok(block) => blocks.push(block),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert!(alloc.allocate(layout(50_000_000, 8)).is_err());
    heap.verify().unwrap();
    first.check();
    assert_eq!(in_use(&heap), blocks.len() as u64 + 1);
    blocks.iter().for_each(Filled::check);
    blocks.pop().unwrap().free(alloc);
    blocks.push(Filled::new(alloc, layout(5_000, 8), 2).unwrap());
    set_limit(Resource::FileSizeBytes, old).unwrap();
    blocks.push(Filled::new(alloc, layout(50_000_000, 8), 3).unwrap());
    blocks
        .into_iter()
        .chain([first])
        .for_each(|block| block.free(alloc));
    assert_eq!(in_use(&heap), 0);
    heap.verify().unwrap();
}

/// Where no descriptor is left to ask who lives, nobody is taken for dead, whose pages would get two owners.
fn living_owners_are_not_taken_for_dead() {
    let arena = arena();
    let heap = heap(&arena);
    let alloc = heap.allocator();
    let mut ours: Vec<_> = (0..10)
        .map(|_| Filled::new(alloc, layout(14_000, 8), 1).unwrap())
        .collect();
    let before = heap.owners();
    let child = fork(|| {
        Filled::new(alloc, layout(100, 8), 2).unwrap().free(alloc);
        let none = Limit {
            soft: Some(0),
            ..get_limit(Resource::DescriptorCount).unwrap()
        };
        set_limit(Resource::DescriptorCount, none).unwrap();
        for _ in 0..20 {
            Filled::new(alloc, layout(14_000, 8), 3).unwrap();
        }
    });
    assert!(child.ended_well());
    assert!(heap.owners().contains(&before[0]), "{:?}", heap.owners());
    for _ in 0..40 {
        ours.push(Filled::new(alloc, layout(14_000, 8), 4).unwrap());
    }
    ours.into_iter().for_each(|block| block.free(alloc));
    assert_eq!((in_use(&heap), heap.stats().dead_blocks), (20, 20));
    heap.verify().unwrap();
}

netmcore_forktest::forktests!(
    living_owners_are_not_taken_for_dead,
    all_sizes_and_alignments,
    resized_blocks_keep_their_contents,
    heap_matches_an_oracle_with_deaths,
    crash_at_any_point_leaves_the_others_well,
    crash_while_adopting_from_the_dead,
    random_kills_lose_only_what_the_dead_had,
    threads_share_a_heap,
    fork_among_threads,
    containers_of_others_are_shared,
    blocks_of_the_dead_are_counted,
    block_of_the_dead_is_used_again,
    frees_of_two_at_once_are_both_done,
    pages_emptied_by_others_are_given_back,
    many_pages_are_not_looked_through_for_each_hint,
    named_heap_grows_under_the_attached,
    full_heap_says_so_and_stays_whole,
    system_without_memory_says_so,
);

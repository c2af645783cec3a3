//! Guards against arrays that two processes write at the same time, parts that stay claimed by the dead, collections that a death leaves half changed,
//! and blocks that are lost or freed twice.
//!
//! # Safety
//!
//! The page of counters is mapped as long as the test runs, and holds atomics.

#![allow(unsafe_code)]

mod support;

use netmcore_sem::ShmMutex;
use netmcore_shm::collections::BufferError;
use netmcore_shm::{
    AnonRegion, Arena, ClaimError, Error, Heap, HeapRef, ShmArc, ShmArray, ShmBox, ShmBuffer,
    ShmMatrix, ShmSafe, ShmString, ShmVec,
};
use netmcore_sys::crash;
use rayon::prelude::*;
use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::io::{BufRead, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use support::{Child, Random, assert_times_out, fork, number};

/// A heap, and counters.
struct World {
    arena: Arena,
    heap: Heap,
    page: AnonRegion,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let page = AnonRegion::create(c"counters", &arena, 4096).unwrap();
        World { arena, heap, page }
    }

    fn counters(&self) -> &[AtomicU64; 64] {
        // SAFETY: a page of zeros, mapped as long as the world, used as these atomics only.
        unsafe { &*self.page.at().cast() }
    }

    fn noisy(&self, payload: u64) -> Noisy {
        Noisy {
            payload,
            drops_at: self.page.at().addr(),
        }
    }

    fn drops(&self) -> u64 {
        self.counters()[0].load(SeqCst)
    }

    fn blocks(&self) -> u64 {
        self.heap.stats().in_use_blocks
    }

    /// Nothing is left.
    fn is_empty(&self) {
        self.heap.verify().unwrap();
        assert_eq!(self.blocks(), 0);
    }
}

/// Counts its drops, in whichever process, and notices a second one.
#[derive(Debug, PartialEq, ShmSafe)]
struct Noisy {
    payload: u64,
    drops_at: usize,
}

impl Drop for Noisy {
    fn drop(&mut self) {
        assert!(self.payload < 1_000_000, "dropped twice");
        self.payload = u64::MAX;
        // SAFETY: the page outlives the heap's values in these tests.
        let drops = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.drops_at) };
        drops.fetch_add(1, SeqCst);
    }
}

fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + support::PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come about");
        std::thread::yield_now();
    }
}

fn boxes_own_their_values() {
    let world = World::new();
    let mut one = ShmBox::new_in(&world.heap, world.noisy(1)).unwrap();
    assert!(world.heap.allocator().contains(ShmBox::as_ptr(&one).cast()));
    one.payload = 2;
    let value = ShmBox::into_inner(one);
    assert_eq!((value.payload, world.drops(), world.blocks()), (2, 0, 0));
    drop(ShmBox::new_in(&world.heap, value).unwrap());
    assert_eq!((world.drops(), world.blocks()), (1, 0));
    let unit = ShmBox::new_in(&world.heap, ()).unwrap();
    assert!(
        world
            .heap
            .allocator()
            .contains(ShmBox::as_ptr(&unit).cast())
    );
    drop(unit);
    let number = ShmBox::new_in(&world.heap, 7_u64).unwrap();
    assert_eq!(number.try_clone().unwrap(), number);
    drop(number);
    // Into another heap: the value comes back.
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let foreign = ShmBox::new_in(&other, 5_u8).unwrap();
    let rejected = ShmBox::new_in(&world.heap, foreign).unwrap_err();
    assert!(matches!(rejected.error, Error::ForeignPointer { .. }));
    assert_eq!(*rejected.value, 5);
    drop(rejected);
    assert_eq!(other.stats().in_use_blocks, 0);
    *ShmBox::leak(ShmBox::new_in(&world.heap, 1_u8).unwrap()) = 3;
    assert_eq!(world.blocks(), 1);
}

/// In a forked child the parent's owners are copies: they can be read, free nothing, and change nothing.
fn copies_by_fork_free_and_change_nothing() {
    let world = World::new();
    let heap = &world.heap;
    let mut owners = Some((
        ShmBox::new_in(heap, world.noisy(1)).unwrap(),
        ShmVec::from_iter_in(heap, (0..10).map(|k| world.noisy(k))).unwrap(),
        ShmString::from_str_in(heap, "text").unwrap(),
        ShmArray::init_in(heap, 10, |k| world.noisy(k as u64)).unwrap(),
        ShmBuffer::new_in(heap),
    ));
    let buffer = ShmBuffer::new_in(heap);
    buffer.add(b"bytes").unwrap();
    let mut pin = Some(buffer.pin(..).unwrap());
    let shared = ShmArray::make_in(heap, 3, 0_u8).unwrap();
    let shared = ShmArc::new_in(heap, shared).unwrap();
    let mut slice = Some(shared.claim(..2).unwrap());
    let child = fork(|| {
        let refuses = |what: &mut dyn FnMut()| {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
            let panic = caught.unwrap_err();
            let message = match panic.downcast_ref::<&str>() {
                Some(message) => message,
                None => panic.downcast_ref::<String>().unwrap().as_str(),
            };
            assert!(message.contains("copy made by fork"), "{message}");
        };
        std::panic::set_hook(Box::new(|_| {}));
        let (mut boxed, mut vec, mut text, array, dropped) = owners.take().unwrap();
        assert_eq!((boxed.payload, vec[9].payload), (1, 9));
        refuses(&mut || boxed.payload = 2);
        refuses(&mut || vec.push(world.noisy(1)).unwrap());
        refuses(&mut || vec[0].payload = 3);
        refuses(&mut || vec.truncate(3));
        refuses(&mut || text.push('x').unwrap());
        refuses(&mut || drop(array.claim(..)));
        refuses(&mut || drop(array.read(..)));
        refuses(&mut || drop(buffer.add(b"more")));
        refuses(&mut || buffer.clear());
        drop(pin.take());
        drop((boxed, vec, text, array, dropped));
        // The claim is its parent's.
        drop(slice.take());
        assert!(shared.try_claim(1..).unwrap().is_none());
    });
    assert!(child.ended_well());
    drop(slice);
    assert_eq!(ShmArc::try_unwrap(shared).map(drop).map_err(drop), Ok(()));
    // One was made to be refused: it was dropped by the child.
    assert_eq!(world.drops(), 1);
    heap.verify().unwrap();
    assert_eq!(pin.as_ref().unwrap().to_vec(), b"bytes");
    drop(pin);
    let (_, vec, text, ..) = owners.as_ref().unwrap();
    assert_eq!((vec.len(), text.as_str()), (10, "text"));
    drop((owners, buffer));
    assert_eq!(world.drops(), 22);
    heap.verify().unwrap();
    // The table of shared values.
    assert!(world.blocks() <= 2);
}

/// What one process puts into shared memory another drops.
fn owners_go_through_shared_memory() {
    let world = World::new();
    let heap = &world.heap;
    let slots = ShmArc::new_in(
        heap,
        ShmArray::<Option<ShmVec<ShmBox<Noisy>>>>::init_in(heap, 2, |_| None).unwrap(),
    )
    .unwrap();
    let child = fork(|| {
        let make = || {
            let boxes = (0..5).map(|k| ShmBox::new_in(heap, world.noisy(k)).unwrap());
            Some(ShmVec::from_iter_in(heap, boxes).unwrap())
        };
        slots.set(0, make()).unwrap();
        // Through the slice, without a check: the guard makes it good.
        slots.claim(1..2).unwrap()[0] = make();
    });
    assert!(child.ended_well());
    assert_eq!(world.drops(), 0);
    let taken = slots.replace(0, None).unwrap().unwrap();
    assert_eq!(taken.iter().map(|one| one.payload).sum::<u64>(), 10);
    drop(taken);
    assert_eq!(world.drops(), 5);
    drop(slots);
    assert_eq!(world.drops(), 10);
    heap.verify().unwrap();
}

/// What one process assigns through the guard of a lock, which looks at nothing, is everybody's.
fn what_is_assigned_through_a_guard_belongs_to_all() {
    let world = World::new();
    let heap = &world.heap;
    // The table of roots stays.
    drop(ShmArc::new_in(heap, 0_u8).unwrap());
    let blocks = world.blocks();
    let place = ShmMutex::new((ShmVec::<ShmBox<Noisy>>::new_in(heap), None));
    let place = ShmArc::new_in(heap, place).unwrap();
    let noisy = |k| ShmBox::new_in(heap, world.noisy(k)).unwrap();
    *place.lock().unwrap() = (
        ShmVec::from_iter_in(heap, (0..3).map(noisy)).unwrap(),
        Some(noisy(5)),
    );
    place.lock().unwrap().0[1] = noisy(4);
    assert_eq!(world.drops(), 1);
    let child = fork(|| {
        let mut guard = place.lock().unwrap();
        guard.0[1].payload += 1;
        guard.0.push(noisy(6)).unwrap();
        guard.1 = None;
        assert_eq!(world.drops(), 2);
        guard.0.truncate(2);
        assert_eq!(world.drops(), 4);
    });
    assert!(child.ended_well());
    let payloads =
        |vec: &[ShmBox<Noisy>]| -> Vec<u64> { vec.iter().map(|one| one.payload).collect() };
    assert_eq!(payloads(&place.lock().unwrap().0), [0, 5]);
    // Checked before, it can be moved out as well.
    let (own, other) = (noisy(7), noisy(8));
    heap.allocator().check(&own).unwrap();
    place.lock().unwrap().1 = Some(own);
    drop(other);
    let child = fork(|| {
        let taken = place.lock().unwrap().1.take().unwrap();
        assert_eq!(ShmBox::into_inner(taken).payload, 7);
    });
    assert!(child.ended_well());
    drop(place);
    assert_eq!((world.drops(), world.blocks()), (8, blocks));
    heap.verify().unwrap();
}

fn vec_is_what_it_says() {
    let world = World::new();
    let heap = &world.heap;
    let mut vec = ShmVec::new_in(heap);
    assert!(vec.is_empty() && vec.capacity() == 0 && vec == [0_u64; 0]);
    vec.try_extend(0..5_u64).unwrap();
    assert_eq!(vec, [0, 1, 2, 3, 4]);
    assert_eq!(format!("{vec:?}"), "[0, 1, 2, 3, 4]");
    let twin = vec.try_clone().unwrap();
    assert_eq!(twin, vec);
    vec.push(9).unwrap();
    assert!(vec > twin);
    assert_eq!(HashSet::from([1, 2]).len(), 2);
    vec.sort_by(|one, other| other.cmp(one));
    assert_eq!(vec, vec![9, 4, 3, 2, 1, 0]);
    assert_eq!(vec.into_iter().rev().take(2).collect::<Vec<_>>(), [0, 1]);
    drop(twin);
    // Whatever the size and alignment.
    #[derive(Clone, Copy, Debug, PartialEq, ShmSafe)]
    #[repr(align(128))]
    struct Large([u8; 200]);
    let mut large = ShmVec::new_in(heap);
    for k in 0..20 {
        large.push(Large([k; 200])).unwrap();
    }
    assert!(large.as_ptr().addr().is_multiple_of(128));
    assert!(
        large
            .iter()
            .zip(0..)
            .all(|(one, k)| *one == Large([k; 200]))
    );
    let mut units = ShmVec::from_slice_in(heap, &[(); 1_000]).unwrap();
    assert_eq!((units.pop(), units.len()), (Some(()), 999));
    drop((large, units));
    // Dropped once each, wherever they have gone.
    let mut noisy = ShmVec::from_iter_in(heap, (0..20).map(|k| world.noisy(k))).unwrap();
    assert_eq!(noisy.remove(3).unwrap().payload, 3);
    assert_eq!(noisy.remove(18).unwrap().payload, 19);
    noisy.insert(1, world.noisy(50)).unwrap();
    noisy.retain(|one| one.payload % 2 == 0).unwrap();
    let left: Vec<_> = noisy.iter().map(|one| one.payload).collect();
    assert_eq!(left, [0, 50, 2, 4, 6, 8, 10, 12, 14, 16, 18]);
    assert_eq!(world.drops(), 2 + 8);
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        noisy.retain(|one| one.payload < 10 || panic!("no more"))
    }));
    assert!(panics.is_err() && noisy.len() == 11);
    noisy.truncate(5);
    let mut rest = noisy.into_iter();
    assert_eq!(rest.next().unwrap().payload, 0);
    assert_eq!(rest.len(), 4);
    drop(rest);
    assert_eq!(world.drops(), 21);
    // Too large: nothing has changed, and the value is there.
    let mut filled = ShmVec::from_slice_in(heap, &[1_u8, 2]).unwrap();
    assert!(filled.reserve(usize::MAX).is_err() && filled.reserve(1 << 40).is_err());
    filled.write_all(b"\x03\x04").unwrap();
    filled.shrink_to_fit().unwrap();
    assert_eq!(
        (filled.capacity(), filled.as_slice()),
        (4, &[1, 2, 3, 4][..])
    );
    filled.clear();
    filled.shrink_to_fit().unwrap();
    assert_eq!(filled.capacity(), 0);
    world.is_empty();
}

fn full_heap_gives_the_value_back() {
    let world = World::new();
    while let Ok(filled) = ShmVec::<u8>::with_capacity_in(&world.heap, 1 << 20) {
        std::mem::forget(filled);
    }
    let mut vec: ShmVec<Noisy> = ShmVec::new_in(&world.heap);
    let mut pushed = 0;
    let rejected = loop {
        match vec.push(world.noisy(pushed)) {
            Ok(()) => pushed += 1,
            Err(rejected) => break rejected,
        }
        assert!(pushed < 999_999);
    };
    assert!(matches!(
        rejected.error,
        Error::OutOfPoolMemory { .. } | Error::NoSpace { .. }
    ));
    assert_eq!((rejected.value.payload, vec.len() as u64), (pushed, pushed));
    drop((rejected, vec));
    assert_eq!(world.drops(), pushed + 1);
    world.heap.verify().unwrap();
}

fn string_is_what_it_says() {
    let world = World::new();
    let heap = &world.heap;
    let mut text = ShmString::from_str_in(heap, "größe").unwrap();
    assert_eq!((text.len(), text.chars().count()), (7, 5));
    write!(text, "={:>3}", 7).unwrap();
    assert_eq!(text, "größe=  7");
    assert_eq!(text.pop(), Some('7'));
    text.insert_str(4, "--").unwrap();
    assert_eq!(text, "grö--ße=  ");
    text.truncate(4);
    text.push('é').unwrap();
    assert_eq!(text, String::from("gröé"));
    assert_eq!("gröé", text);
    #[allow(
        clippy::mutable_key_type,
        reason = "what is mutable in it is not part of the text"
    )]
    let mut names = HashSet::new();
    names.insert(text.try_clone().unwrap());
    assert!(names.contains("gröé") && !names.contains("x"));
    assert!(text < ShmString::from_str_in(heap, "h").unwrap());
    assert_eq!(format!("{text} {text:?}"), "gröé \"gröé\"");
    let bytes = text.into_bytes();
    let again = ShmString::from_utf8(bytes).unwrap();
    assert_eq!(again, "gröé");
    let broken = ShmVec::from_slice_in(heap, b"a\xff").unwrap();
    assert_eq!(ShmString::from_utf8(broken).unwrap_err(), b"a\xff");
    let mut within = again;
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| within.truncate(3)));
    assert!(panics.is_err() && within == "gröé");
    drop((within, names));
    world.is_empty();
}

fn array_is_what_it_says() {
    let world = World::new();
    let heap = &world.heap;
    let array = ShmArray::init_in(heap, 10, |k| k as u64)
        .unwrap()
        .with_header(AtomicU64::new(5))
        .unwrap();
    assert_eq!((array.len(), array.header().load(SeqCst)), (10, 5));
    assert!(array.read(..).unwrap().as_ptr().addr().is_multiple_of(64));
    {
        let mut low = array.claim(..5).unwrap();
        let high = array.try_claim(5..).unwrap().unwrap();
        low.iter_mut().for_each(|element| *element += 100);
        assert_eq!((low.range(), high.range(), high[0]), (0..5, 5..10, 5));
        // This thread is in its own way, for whatever.
        assert!(matches!(array.get(0), Err(ClaimError::WouldDeadlock)));
        assert!(matches!(array.claim(4..6), Err(ClaimError::WouldDeadlock)));
        assert!(matches!(array.grow(100, 0), Err(ClaimError::WouldDeadlock)));
        // Nothing is nobody's.
        assert!(array.claim(3..3).unwrap().is_empty());
    }
    assert_eq!(array.get(4).unwrap(), 104);
    {
        // Read by several; no writer.
        let (one, other) = (array.read(..).unwrap(), array.read(2..4).unwrap());
        assert_eq!((one[3], other[1]), (103, 103));
        assert!(array.set(3, 1).is_err() && array.set(3, 1).unwrap_err().value == 1);
    }
    assert_eq!(array.replace(0, 7).unwrap(), 100);
    array.update(0, |element| *element *= 2).unwrap();
    array.grow_with(12, |k| k as u64 * 10).unwrap();
    array.grow(3, 0).unwrap();
    assert_eq!(array.push(77).unwrap(), 12);
    assert_eq!(
        array.to_vec().unwrap(),
        [14, 101, 102, 103, 104, 5, 6, 7, 8, 9, 100, 110, 77]
    );
    for range in [12..14, 14..15, 40..50] {
        assert!(matches!(
            array.read(range),
            Err(ClaimError::OutOfBounds { len: 13, .. })
        ));
    }
    assert!(matches!(
        array.get(usize::MAX),
        Err(ClaimError::OutOfBounds { .. })
    ));
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let reversed = 3..2;
    assert!(matches!(
        array.read(reversed),
        Err(ClaimError::OutOfBounds { .. })
    ));
    // Many claims at a time: the table grows.
    let claims: Vec<_> = (0..13).map(|k| array.claim(k..=k).unwrap()).collect();
    let reads: Vec<_> = (0..100).map(|_| array.read(5..5).unwrap()).collect();
    drop((claims, reads));
    assert_eq!(array.abandoned(), []);
    drop(array);
    world.is_empty();

    let owned = ShmArray::with_header_in(heap, ShmString::from_str_in(heap, "of what").unwrap());
    let owned = owned.unwrap();
    owned.grow_with(30, |k| world.noisy(k as u64)).unwrap();
    owned.push(world.noisy(99)).unwrap();
    owned.set(2, world.noisy(98)).unwrap();
    assert_eq!((world.drops(), owned.header().as_str()), (1, "of what"));
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        owned.grow_with(1_000, |k| {
            assert!(k < 40, "no more");
            world.noisy(k as u64)
        })
    }));
    assert!(panics.is_err());
    assert_eq!((owned.len(), world.drops()), (31, 1 + 9));
    drop(owned);
    assert_eq!(world.drops(), 10 + 31);
    let mut pairs = ShmArray::from_iter_in(heap, [(1, 2.5), (2, 3.5)]).unwrap();
    pairs.as_mut_slice()[1].0 = 4;
    assert_eq!(pairs.to_vec().unwrap(), [(1, 2.5), (4, 3.5)]);
    drop(pairs);
    world.is_empty();
}

fn foreign_pointers_are_refused() {
    let world = World::new();
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let text = || ShmString::from_str_in(&other, "foreign").unwrap();
    let array = ShmArray::init_in(&world.heap, 2, |_| None).unwrap();
    assert!(matches!(
        array.set(0, Some(text())).unwrap_err().error,
        ClaimError::Memory(Error::ForeignPointer { .. })
    ));
    let rejected = array.push(Some(text())).unwrap_err();
    assert_eq!(rejected.value.unwrap(), "foreign");
    assert!(array.grow_with(5, |_| Some(text())).is_err());
    assert!(array.grow_with(500, |_| Some(text())).is_err());
    assert_eq!((array.len(), other.stats().in_use_blocks), (2, 0));
    let through_the_slice = std::panic::catch_unwind(|| array.claim(..).unwrap()[0] = Some(text()));
    assert!(through_the_slice.is_err());
    let mut vec = ShmVec::new_in(&world.heap);
    assert_eq!(vec.push(text()).unwrap_err().value, "foreign");
    assert!(ShmBuffer::with_header_in(&world.heap, text()).is_err());
    assert!(ShmArray::<u8, _>::with_header_in(&world.heap, text()).is_err());
    // An empty one of another heap would take its blocks from there.
    assert!(ShmArc::new_in(&world.heap, ShmVec::<u8>::new_in(&other)).is_err());
    assert!(ShmArc::new_in(&world.heap, ShmBuffer::new_in(&other)).is_err());
    drop(array.replace(0, None).unwrap());
}

/// The main use: each process has its part, some are killed, others go on with what they have left.
fn workers_on_disjoint_parts_with_kills() {
    const LEN: usize = 60_000;
    const PARTS: usize = 12;
    let mut random = Random::new();
    let world = World::new();
    let array = ShmArray::init_in(&world.heap, LEN, |_| 0_u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let done = &world.counters()[..PARTS];
    let work = |part: usize| {
        let mut slice = array.claim(array.part(part, PARTS)).unwrap();
        let from = slice.range().start;
        for round in 1..=20 {
            for (k, element) in slice.iter_mut().enumerate() {
                *element = ((from + k) * round) as u64;
            }
        }
        done[part].store(1, SeqCst);
    };
    let mut kills = 0;
    let mut running: Vec<(usize, Child)> =
        (0..PARTS).map(|part| (part, fork(|| work(part)))).collect();
    while let Some((part, child)) = running.pop() {
        if kills < 20 && random.below(2) == 0 {
            // sleep: to be killed at a random moment.
            std::thread::sleep(Duration::from_micros(random.below(2_000)));
            child.kill();
            kills += 1;
        }
        if !child.ended_well() {
            if done[part].load(SeqCst) == 0 {
                running.insert(0, (part, fork(|| work(part))));
            }
            continue;
        }
    }
    let all = array.read(..).unwrap();
    assert!(all.iter().zip(0..).all(|(element, k)| *element == k * 20));
    drop(all);
    // Killed between the last write and the end of the claim: the only ones that nobody has claimed since.
    for (range, _) in array.take_abandoned() {
        assert!((0..PARTS).any(|part| array.part(part, PARTS) == range));
    }
    assert_eq!(array.abandoned(), []);
    world.heap.verify().unwrap();
}

fn dead_ones_part_is_free_within_10_ms_and_told() {
    let world = World::new();
    let array = ShmArray::init_in(&world.heap, 100, |_| 0_u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let holds = &world.counters()[0];
    let hold = |range: std::ops::Range<usize>| {
        holds.store(0, SeqCst);
        let child = fork(|| {
            let mut slice = array.claim(range.clone()).unwrap();
            slice.fill(1);
            holds.store(1, SeqCst);
            loop {
                std::thread::park();
            }
        });
        until(|| holds.load(SeqCst) == 1);
        child
    };
    let child = hold(20..40);
    assert!(array.try_claim(39..50).unwrap().is_none());
    assert!(array.try_read(..).unwrap().is_none());
    assert!(array.try_claim(40..50).unwrap().is_some());
    let wait = Duration::from_millis(20);
    assert_times_out(wait, |deadline| {
        match array.claim_deadline(30..31, deadline) {
            Err(ClaimError::TimedOut { waited }) => waited,
            other => panic!("{other:?}"),
        }
    });
    let mut waits = Vec::new();
    for round in 0..5 {
        let child = if round == 0 { &child } else { &hold(20..40) };
        // A waiter, asleep while the holder is killed.
        let killed_at = &world.counters()[1];
        let began = Instant::now();
        let waiter = fork(|| {
            killed_at.store(1, SeqCst);
            let slice = array.claim(0..100).unwrap();
            assert!(slice.abandoned_by().is_some());
            let now = began.elapsed().as_micros() as u64;
            killed_at.store(now, SeqCst);
            assert!(slice[20..40].iter().all(|element| *element == 1));
        });
        until(|| killed_at.load(SeqCst) == 1);
        // sleep: until the waiter is asleep, most likely; right either way.
        std::thread::sleep(Duration::from_millis(10));
        let kill = began.elapsed().as_micros() as u64;
        child.kill();
        assert!(!child.ended_well());
        assert!(waiter.ended_well());
        waits.push(killed_at.load(SeqCst).saturating_sub(kill));
        // The waiter had all of it: told once.
        assert_eq!(array.abandoned(), []);
    }
    waits.sort_unstable();
    assert!(waits[0] < 10_000, "{waits:?} µs");
    // Parts of what a dead one left: told until all of it was claimed at once.
    let child = hold(20..40);
    child.kill();
    assert!(!child.ended_well());
    let left = array.abandoned();
    assert_eq!((left.len(), left[0].0.clone()), (1, 20..40));
    assert_eq!(array.read(0..30).unwrap().abandoned_by(), Some(left[0].1));
    assert_eq!(array.claim(0..30).unwrap().abandoned_by(), Some(left[0].1));
    assert!(array.claim(0..20).unwrap().abandoned_by().is_none());
    assert_eq!(array.claim(20..40).unwrap().abandoned_by(), Some(left[0].1));
    assert!(array.claim(20..40).unwrap().abandoned_by().is_none());
    assert_eq!(array.abandoned(), []);
}

fn panic_with_a_part_claimed_is_told() {
    let world = World::new();
    let array = ShmArray::init_in(&world.heap, 100, |_| 0_u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let matrix = ShmMatrix::make_in(&world.heap, (4, 4), 0_u64).unwrap();
    let matrix = ShmArc::new_in(&world.heap, matrix).unwrap();
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _only_read = array.read(60..70).unwrap();
        let mut part = array.claim(20..40).unwrap();
        let mut block = matrix.claim_block(1..3, 2..4).unwrap();
        part.fill(1);
        block[(0, 0)] = 1;
        panic!("in the middle of a change");
    }));
    assert!(panics.is_err());
    // Nobody is in the way, in this process or another.
    let me = netmcore_sem::Owners::me(&netmcore_sem::Current);
    assert_eq!(array.abandoned(), [(20..40, me)]);
    assert_eq!(matrix.abandoned(), [(1..3, 2..4, me)]);
    let told = fork(|| assert_eq!(array.claim(30..35).unwrap().abandoned_by(), Some(me)));
    assert!(told.ended_well());
    let repaired = array.try_claim(20..40).unwrap().unwrap();
    assert_eq!(repaired.abandoned_by(), Some(me));
    drop(repaired);
    assert_eq!(array.abandoned(), []);

    // Work that is done while a panic that began before goes through is no failure of its own.
    struct Tidies<'a>(&'a ShmArray<u64>);
    impl Drop for Tidies<'_> {
        fn drop(&mut self) {
            self.0.claim(20..40).unwrap().fill(0);
        }
    }
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _tidies = Tidies(&array);
        panic!("with no claim");
    }));
    assert!(panics.is_err());
    assert_eq!(array.abandoned(), []);
}

/// Overlapping claims of many processes: a counter in each element that only an exclusive claim makes right.
fn claims_exclude_each_other() {
    const ROUNDS: u64 = 1_500;
    let world = World::new();
    let array = ShmArray::init_in(&world.heap, 40, |_| 0_u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let total = &world.counters()[0];
    let seed = Random::new().0;
    let children: Vec<_> = (0..4)
        .map(|number| {
            let array = &array;
            fork(move || {
                let mut random = Random(seed.wrapping_add(number * 77) | 1);
                for round in 0..ROUNDS {
                    let start = random.below(35) as usize;
                    let end = start + 1 + random.below(5) as usize;
                    if round % 4 == 0 {
                        let slice = array.read(start..end).unwrap();
                        let seen = slice.to_vec();
                        std::thread::yield_now();
                        // Nobody is writing, nor was.
                        assert!(*slice == *seen && seen.iter().all(|element| element >> 32 == 0));
                        continue;
                    }
                    let mut slice = array.claim(start..end).unwrap();
                    for element in slice.iter_mut() {
                        assert_eq!(*element >> 32, 0);
                        *element |= (number + 1) << 32;
                    }
                    if round % 2 == 0 {
                        std::thread::yield_now();
                    }
                    for element in slice.iter_mut() {
                        assert_eq!(*element >> 32, number + 1);
                        *element = (*element & 0xffff_ffff) + 1;
                    }
                    total.fetch_add((end - start) as u64, SeqCst);
                    if round % 100 == 1 {
                        drop(slice);
                        array.push(0).unwrap();
                    }
                }
            })
        })
        .collect();
    assert!(children.iter().all(Child::ended_well));
    assert_eq!(array.len(), 40 + 4 * (ROUNDS as usize / 100));
    assert_eq!(
        array.read(..).unwrap().iter().sum::<u64>(),
        total.load(SeqCst)
    );
}

/// Growing within the capacity disturbs nobody; beyond it waits, and nothing moves under a claim.
fn growth_does_not_move_what_is_claimed() {
    let world = World::new();
    let array = ShmArray::with_capacity_in(&world.heap, 100).unwrap();
    array.grow_with(10, |k| k as u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let slice = array.claim(..).unwrap();
    let at = slice.as_ptr();
    let within = fork(|| array.grow_with(100, |k| k as u64).unwrap());
    assert!(within.ended_well());
    assert_eq!((array.len(), slice.len()), (100, 10));
    let grown = &world.counters()[0];
    let beyond = fork(|| {
        assert!(!array.try_grow_with(1_000, |k| k as u64).unwrap());
        grown.store(1, SeqCst);
        array.grow_with(1_000, |k| k as u64).unwrap();
        grown.store(2, SeqCst);
    });
    until(|| grown.load(SeqCst) == 1);
    // sleep: so that it waits, most likely; right either way.
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!((grown.load(SeqCst), slice.as_ptr(), slice[9]), (1, at, 9));
    drop(slice);
    assert!(beyond.ended_well());
    let all = array.read(..).unwrap();
    assert!(all.len() == 1_000 && all.iter().zip(0..).all(|(element, k)| *element == k));
}

fn rayon_works_on_a_claimed_part() {
    let world = World::new();
    let array = ShmArray::init_in(&world.heap, 10_000, |k| k as f64).unwrap();
    {
        let mut part = array.claim(1_000..9_000).unwrap();
        part.par_iter_mut().for_each(|element| *element *= 2.0);
        let sum: f64 = part.par_iter().sum();
        assert_eq!(sum, (1_000..9_000).map(|k| k as f64 * 2.0).sum::<f64>());
    }
    assert_eq!(array.get(999).unwrap(), 999.0);
    let matrix = ShmMatrix::make_in(&world.heap, (64, 64), 1_u32).unwrap();
    let mut block = matrix.claim_block(10..20, 30..40).unwrap();
    let rows: Vec<&mut [u32]> = block.rows_mut().collect();
    rows.into_par_iter().for_each(|row| row.fill(5));
    drop(block);
    let sum: u32 = matrix.read_rows(..).unwrap().rows().flatten().sum();
    assert_eq!(sum, 64 * 64 + 100 * 4);
}

fn matrix_is_what_it_says() {
    let world = World::new();
    let heap = &world.heap;
    let matrix = ShmMatrix::init_in(heap, (4, 3), |row, column| (row * 10 + column) as u64)
        .unwrap()
        .with_header(8_u8)
        .unwrap();
    assert_eq!((matrix.dim(), *matrix.header()), ((4, 3), 8));
    assert_eq!(matrix.get(3, 2).unwrap(), 32);
    for (row, column) in [(4, 0), (0, 3)] {
        assert!(matches!(
            matrix.get(row, column),
            Err(ClaimError::OutOfBounds { .. })
        ));
    }
    {
        // Blocks in the same rows.
        let mut left = matrix.claim_block(1..3, 0..2).unwrap();
        let mut right = matrix.claim_block(1..3, 2..3).unwrap();
        left[(1, 1)] = 100;
        right.rows_mut().for_each(|row| row[0] = 200);
        assert_eq!((left.row(1), left.dim()), (&[20, 100][..], (2, 2)));
        assert_eq!((left.row_range(), right.column_range()), (1..3, 2..3));
        assert!(left.as_slice().is_none() && right.as_mut_slice().is_none());
        assert!(matrix.try_claim_block(0..1, ..).unwrap().is_some());
        assert!(matches!(
            matrix.read_rows(..),
            Err(ClaimError::WouldDeadlock)
        ));
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| left[(0, 2)]));
        assert!(panics.is_err());
    }
    let rows = matrix.read_rows(1..).unwrap();
    assert_eq!(
        rows.as_slice().unwrap(),
        [10, 11, 200, 20, 100, 200, 30, 31, 32]
    );
    assert_eq!(
        format!("{:?}", matrix.read_rows(..1).unwrap()),
        "[[0, 1, 2]]"
    );
    drop(rows);
    matrix.set(0, 0, 9).unwrap();
    matrix.grow((5, 5), 7).unwrap();
    matrix.grow((1, 1), 1).unwrap();
    let all = matrix.read_block(.., ..).unwrap();
    let rows: Vec<_> = all.rows().map(<[u64]>::to_vec).collect();
    assert_eq!(
        rows,
        [
            [9, 1, 2, 7, 7],
            [10, 11, 200, 7, 7],
            [20, 100, 200, 7, 7],
            [30, 31, 32, 7, 7],
            [7, 7, 7, 7, 7]
        ]
    );
    drop(all);
    drop(matrix);
    let owned = ShmMatrix::with_header_in(heap, 5_u8).unwrap();
    assert!(owned.read_rows(..).unwrap().rows().next().is_none());
    let mut next = 0;
    let mut text = || {
        next += 1;
        ShmString::from_str_in(heap, &next.to_string()).unwrap()
    };
    assert!(owned.set(0, 0, text()).is_err());
    drop(owned);
    let texts = ShmMatrix::init_in(heap, (2, 2), |_, _| text()).unwrap();
    texts.set(1, 1, text()).unwrap();
    assert_eq!(texts.read_rows(1..2).unwrap()[(0, 1)], "6");
    drop(texts);
    assert_eq!(
        ShmMatrix::from_slice_in(heap, 3, &[1, 2, 3, 4, 5, 6])
            .unwrap()
            .dim(),
        (2, 3)
    );
    world.is_empty();
}

fn matrix_blocks_of_several_processes() {
    let world = World::new();
    let matrix = ShmMatrix::make_in(&world.heap, (40, 60), 0_u32).unwrap();
    let matrix = ShmArc::new_in(&world.heap, matrix).unwrap();
    let children: Vec<_> = (0..4)
        .map(|number: usize| {
            let matrix = &matrix;
            fork(move || {
                let (row, column) = (number / 2 * 20, number % 2 * 30);
                let mut block = matrix
                    .claim_block(row..row + 20, column..column + 30)
                    .unwrap();
                for row in 0..20 {
                    block.row_mut(row).fill(number as u32 + 1);
                }
                if number == 3 {
                    // Killed with its block.
                    std::process::abort();
                }
            })
        })
        .collect();
    for (number, child) in children.iter().enumerate() {
        assert_eq!(child.signal().is_some(), number == 3);
    }
    let left = matrix.abandoned();
    assert_eq!((left[0].0.clone(), left[0].1.clone()), (20..40, 30..60));
    let all = matrix.read_rows(..).unwrap();
    assert_eq!(all.abandoned_by(), Some(left[0].2));
    assert_eq!(all.rows().flatten().sum::<u32>(), 600 * (1 + 2 + 3 + 4));
    drop(all);
    assert_eq!(matrix.take_abandoned(), left);
    assert_eq!(matrix.abandoned(), []);
}

fn matrix_has_views() {
    let world = World::new();
    let matrix = ShmMatrix::init_in(&world.heap, (6, 5), |row, column| (row + column) as f64);
    let matrix = matrix.unwrap();
    {
        let mut block = matrix.claim_block(1..4, 2..5).unwrap();
        let mut view = block.view_mut();
        assert_eq!(view.dim(), (3, 3));
        view *= 10.0;
        view[(0, 0)] = 0.5;
    }
    let all = matrix.read_rows(..).unwrap();
    let view = all.view();
    assert_eq!(view.row(1).to_vec(), [1.0, 2.0, 0.5, 40.0, 50.0]);
    assert_eq!(view.column(4).sum(), 4.0 + 50.0 + 60.0 + 70.0 + 8.0 + 9.0);
    let product = view.t().dot(&view);
    assert_eq!(product.dim(), (5, 5));
    drop(all);
    let empty = matrix.read_block(2..2, ..).unwrap();
    assert_eq!(empty.view().dim(), (0, 5));
    assert_eq!(matrix.read_block(.., 5..5).unwrap().view().dim(), (6, 0));
}

fn buffer_is_what_it_says() {
    let world = World::new();
    let buffer = ShmBuffer::with_chunks_in(&world.heap, 64, 3_u8).unwrap();
    assert_eq!(
        (buffer.chunk_bytes(), buffer.is_empty(), *buffer.header()),
        (64, true, 3)
    );
    assert_eq!(buffer.add(b"").unwrap(), 0..0);
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(buffer.add(&bytes).unwrap(), 0..256);
    assert_eq!(
        buffer.add_fmt(format_args!("{}-{}", 1, 2)).unwrap(),
        256..259
    );
    (&buffer).write_all(b"!").unwrap();
    assert_eq!(buffer.sub(254..).unwrap(), b"\xfe\xff1-2!");
    let mut some = [0; 100];
    assert_eq!(buffer.read_at(100, &mut some).unwrap(), 100);
    assert_eq!(some, bytes[100..200]);
    assert_eq!(buffer.read_at(255, &mut some).unwrap(), 5);
    assert_eq!(buffer.read_at(260, &mut some).unwrap(), 0);
    assert!(buffer.read_at(261, &mut some).is_err());
    // In one chunk: where it lies.
    let pin = buffer.pin(64..128).unwrap();
    assert_eq!(pin.as_slice().unwrap(), &bytes[64..128]);
    assert!(buffer.pin(60..70).unwrap().as_slice().is_none());
    assert_eq!(buffer.with(60..70, <[u8]>::to_vec).unwrap(), bytes[60..70]);
    // Pinned bytes stay, whatever is deleted.
    let blocks = world.blocks();
    assert_eq!(buffer.delete_to(200), 200);
    assert_eq!(pin.to_vec(), bytes[64..128]);
    assert_eq!(world.blocks(), blocks - 1);
    assert!(matches!(
        buffer.pin(64..128),
        Err(BufferError::OutOfRange { .. })
    ));
    drop(pin);
    assert_eq!(world.blocks(), blocks - 3);
    assert_eq!(
        (buffer.delete_to(5), buffer.start(), buffer.len()),
        (200, 200, 60)
    );
    assert_eq!(buffer.sub(..).unwrap().len(), 60);
    assert_eq!(
        buffer.sub(250..=256).unwrap(),
        [250, 251, 252, 253, 254, 255, b'1']
    );
    // Readers have their own positions.
    let mut reader = buffer.reader();
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    assert_eq!((text.len(), reader.position()), (60, 260));
    buffer.add(b"line 1\nline 2\n").unwrap();
    let lines: Vec<_> = (&mut reader).lines().map(Result::unwrap).collect();
    assert_eq!(lines, ["line 1", "line 2"]);
    buffer.clear();
    assert_eq!((buffer.start(), buffer.len()), (274, 0));
    reader.seek_to(270);
    buffer.add(b"x").unwrap();
    let error = reader.read(&mut some).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    buffer.close();
    assert!(matches!(buffer.add(b"y"), Err(BufferError::Closed)));
    assert_eq!(buffer.sub(..).unwrap(), b"x");
    // Through many chunks the ring grows and turns.
    let long = ShmBuffer::with_chunks_in(&world.heap, 64, ()).unwrap();
    for round in 0..200_u64 {
        let from = long.add(&[round as u8; 100]).unwrap().start;
        assert_eq!(from, round * 100);
        if round > 60 {
            long.delete_to((round - 60) * 100);
        }
    }
    let all = long.sub(..).unwrap();
    assert_eq!(all.len(), 61 * 100);
    assert!(
        all.chunks(100)
            .zip(139..)
            .all(|(some, k)| *some == [k; 100])
    );
    drop(reader);
    drop((long, buffer));
    world.is_empty();
}

/// Processes append at the same time, one follows, one deletes what was read.
/// An append that is too large takes nothing away from others.
fn failed_append_gives_its_chunks_back() {
    let world = World::new();
    let buffer = ShmBuffer::new_in(&world.heap);
    buffer.add(&[1; 100]).unwrap();
    let before = world.blocks();
    let large = vec![2; 100 << 20];
    let refused = buffer.add(&large).unwrap_err();
    assert!(matches!(refused, BufferError::Memory(_)));
    // The ring has grown, no more.
    assert!(world.blocks() <= before + 1);
    assert_eq!(buffer.add(&[3; 200_000]).unwrap(), 100..200_100);
    assert_eq!(buffer.sub(200_000..).unwrap(), [3; 100]);
    assert!(buffer.add(&large).is_err());
    buffer.delete_to(200_100);
    assert!(buffer.add(&large).is_err());
    assert_eq!(buffer.add(b"end").unwrap(), 200_100..200_103);
    assert_eq!(buffer.sub(200_100..).unwrap(), b"end");
    drop(buffer);
    world.is_empty();
}

fn crash_in_failed_append_leaves_all_usable() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let heap = Heap::anonymous(&world.arena, 8 << 20).unwrap();
        let buffer = ShmBuffer::with_chunks_in(&heap, 1 << 20, ()).unwrap();
        let buffer = ShmArc::new_in(&heap, buffer).unwrap();
        buffer.add(b"abc").unwrap();
        crash::arm(Some(k));
        let child = fork(|| assert!(buffer.add(&vec![1; 16 << 20]).is_err()));
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        assert_eq!(buffer.sub(..).unwrap(), b"abc");
        assert_eq!(buffer.add(b"de").unwrap(), 3..5);
        // What the dead one has added is used by the next, or given back by it.
        assert!(buffer.add(&vec![2; 16 << 20]).is_err());
        buffer.add(&vec![3; 3 << 20]).unwrap();
        assert_eq!(buffer.sub(..6).unwrap(), b"abcde\x03");
        drop(buffer);
        heap.verify().unwrap();
        if ended_well {
            break;
        }
    }
    assert_passed(&died_at, "buffer", &["chunk_added", "unused_taken"]);
}

/// What a reader has been shown it can read, whatever is deleted.
fn reader_reads_what_it_has_been_shown() {
    let world = World::new();
    let buffer = ShmBuffer::new_in(&world.heap);
    buffer.add(b"abcdef").unwrap();
    let mut reader = buffer.reader();
    assert_eq!(reader.fill_buf().unwrap(), b"abcdef");
    reader.consume(1);
    buffer.clear();
    let mut bytes = [0; 3];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"bcd");
    assert_eq!(reader.fill_buf().unwrap(), b"ef");
    assert_eq!(reader.read(&mut bytes).unwrap(), 2);
    assert_eq!(reader.read(&mut bytes).unwrap(), 0);
}

/// There is nothing in it that could be in doubt.
fn empty_claim_of_a_dead_one_is_forgotten() {
    let world = World::new();
    let array = ShmArray::make_in(&world.heap, 10, 0_u8).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let child = fork(|| std::mem::forget((array.claim(3..3), array.claim(4..5))));
    assert!(child.ended_well());
    let abandoned = array.abandoned();
    assert_eq!(abandoned.len(), 1);
    assert_eq!(abandoned[0].0, 4..5);
}

fn buffer_lines_of_several_processes() {
    const LINES: u64 = 400;
    let world = World::new();
    let buffer = ShmBuffer::with_chunks_in(&world.heap, 256, ()).unwrap();
    let buffer = ShmArc::new_in(&world.heap, buffer).unwrap();
    let read = &world.counters()[0];
    let reader = fork(|| {
        let mut next = [0; 3];
        let mut follow = buffer.follow(0);
        let mut line = String::new();
        while follow.read_line(&mut line).unwrap() > 0 {
            let (who, number) = line.trim_end().split_once(' ').unwrap();
            let who: usize = who.parse().unwrap();
            assert_eq!(number.len(), 20 + who);
            assert_eq!(
                number.trim_start_matches('0').parse::<u64>().unwrap(),
                next[who] + 1
            );
            next[who] += 1;
            line.clear();
            read.store(follow.position(), SeqCst);
        }
        assert_eq!(next, [LINES; 3]);
    });
    let writers: Vec<_> = (0..3)
        .map(|who| {
            let buffer = &buffer;
            fork(move || {
                for number in 1..=LINES {
                    let width = 20 + who;
                    buffer
                        .add_fmt(format_args!("{who} {number:0width$}\n"))
                        .unwrap();
                }
            })
        })
        .collect();
    let deleter = fork(|| {
        let mut seen = 0;
        while !(buffer.is_closed() && seen == buffer.end()) {
            seen = read.load(SeqCst);
            buffer.delete_to(seen);
            std::thread::yield_now();
        }
    });
    assert!(writers.iter().all(Child::ended_well));
    buffer.close();
    assert!(reader.ended_well() && deleter.ended_well());
    assert!(buffer.is_empty());
    world.heap.verify().unwrap();
    // A chunk that is not full, the ring, and the value's own with its table.
    assert!(world.blocks() <= 6, "{}", world.blocks());
}

fn dead_readers_pin_is_ended() {
    let world = World::new();
    let buffer = ShmBuffer::with_chunks_in(&world.heap, 64, ()).unwrap();
    let buffer = ShmArc::new_in(&world.heap, buffer).unwrap();
    buffer.add(&[1; 640]).unwrap();
    let blocks = world.blocks();
    let pinned = &world.counters()[0];
    let reader = fork(|| {
        let _pin = buffer.pin(0..10).unwrap();
        pinned.store(1, SeqCst);
        loop {
            std::thread::park();
        }
    });
    until(|| pinned.load(SeqCst) == 1);
    buffer.delete_to(640);
    assert_eq!(world.blocks(), blocks);
    reader.kill();
    assert!(!reader.ended_well());
    buffer.delete_to(640);
    assert_eq!(world.blocks(), blocks - 10);
}

fn waiter_for_bytes_is_woken() {
    let world = World::new();
    let buffer = ShmArc::new_in(&world.heap, ShmBuffer::new_in(&world.heap)).unwrap();
    let soon = Instant::now() + Duration::from_millis(5);
    assert_eq!(buffer.wait_for(0, Some(soon)), None);
    let waiter = fork(|| {
        assert_eq!(buffer.wait_for(0, None), Some(3));
        assert_eq!(buffer.wait_for(3, None), None);
    });
    // sleep: so that it waits, most likely; right either way.
    std::thread::sleep(Duration::from_millis(3));
    buffer.add(b"abc").unwrap();
    // sleep: as above.
    std::thread::sleep(Duration::from_millis(3));
    buffer.close();
    assert!(waiter.ended_well());
}

/// What a process may do to what it shares: each step leaves what the oracle says before or after it.
#[derive(ShmSafe)]
struct Shared {
    vec: ShmVec<ShmBox<Noisy>>,
    text: ShmString,
    numbers: ShmVec<u32>,
}

/// Puts a value that is changed through `&mut` where children reach it: under an exclusive claim of one element.
fn shared(world: &World) -> ShmArc<ShmArray<Shared>> {
    let heap = &world.heap;
    let boxes = (0..6).map(|k| ShmBox::new_in(heap, world.noisy(k)).unwrap());
    let mut value = Some(Shared {
        vec: ShmVec::from_iter_in(heap, boxes).unwrap(),
        text: ShmString::from_str_in(heap, "0123456789").unwrap(),
        numbers: ShmVec::from_iter_in(heap, 0..20).unwrap(),
    });
    let array = ShmArray::init_in(heap, 1, |_| value.take().unwrap()).unwrap();
    ShmArc::new_in(heap, array).unwrap()
}

/// What it is, in private memory.
fn look(shared: &Shared) -> (Vec<u64>, String, Vec<u32>) {
    (
        shared.vec.iter().map(|one| one.payload).collect(),
        shared.text.to_string(),
        shared.numbers.to_vec(),
    )
}

/// So that every change is possible.
fn fill_again(world: &World, shared: &mut Shared) {
    shared.vec.truncate(4);
    shared.text.clear();
    shared.text.push_str("0123456789").unwrap();
    while shared.vec.len() < 4 {
        let one = ShmBox::new_in(&world.heap, world.noisy(1)).unwrap();
        shared.vec.push(one).unwrap();
    }
    shared.numbers.truncate(30);
    // What doubles it may be chosen any number of times in a row.
    if shared.numbers.capacity() > 4_096 {
        shared.numbers.shrink_to_fit().unwrap();
    }
}

type Change = fn(&World, &mut Shared);

const CHANGES: &[(&str, Change)] = &[
    ("push", |world, to| {
        let one = ShmBox::new_in(&world.heap, world.noisy(77)).unwrap();
        to.vec.push(one).unwrap();
    }),
    ("push, growing", |_, to| {
        while to.numbers.len() < to.numbers.capacity() {
            to.numbers.push(5).unwrap();
        }
        to.numbers.push(6).unwrap();
    }),
    ("pop", |_, to| drop(to.vec.pop())),
    ("insert", |world, to| {
        let one = ShmBox::new_in(&world.heap, world.noisy(77)).unwrap();
        to.vec.insert(2, one).unwrap();
    }),
    ("remove", |_, to| drop(to.vec.remove(1).unwrap())),
    ("retain", |_, to| {
        to.vec.retain(|one| one.payload % 3 == 0).unwrap();
    }),
    ("truncate", |_, to| to.vec.truncate(2)),
    ("clear", |_, to| to.vec.clear()),
    ("extend_from_slice", |_, to| {
        to.numbers.extend_from_slice(&[1; 200]).unwrap();
    }),
    ("reserve", |_, to| to.numbers.reserve(1_000).unwrap()),
    ("shrink_to_fit", |_, to| {
        to.numbers.truncate(3);
        to.numbers.shrink_to_fit().unwrap();
    }),
    ("push_str", |_, to| {
        to.text.push_str(&"x".repeat(300)).unwrap()
    }),
    ("insert_str", |_, to| to.text.insert_str(5, "ab").unwrap()),
    ("text pop", |_, to| assert!(to.text.pop().is_some())),
    ("text clear", |_, to| to.text.clear()),
];

/// These make several commits, so there are states between.
const IN_SEVERAL_STEPS: &[&str] = &["push, growing", "shrink_to_fit"];

fn crash_in_vec_leaves_it_before_or_after() {
    let mut died_at = BTreeSet::new();
    for (name, change) in CHANGES {
        for k in 1.. {
            let world = World::new();
            let array = shared(&world);
            let before = array.with(0, look).unwrap();
            crash::arm(Some(k));
            let child = fork(|| array.update(0, |shared| change(&world, shared)).unwrap());
            let ended_well = child.ended_well();
            crash::disarm();
            let at = crash::died_at();
            // Others go on, and are told.
            let slice = array.claim(..).unwrap();
            let found = look(&slice[0]);
            let is_told = slice.abandoned_by().is_some();
            drop(slice);
            // The change made in full, by one who lives.
            let oracle = shared(&world);
            oracle.update(0, |shared| change(&world, shared)).unwrap();
            let after = oracle.with(0, look).unwrap();
            if ended_well {
                assert_eq!(found, after, "{name}");
                assert!(!is_told);
            } else if !IN_SEVERAL_STEPS.contains(name) {
                assert!(
                    found == before || found == after,
                    "{name} at {at:?}: {found:?}"
                );
            } else {
                assert!(
                    found
                        .2
                        .iter()
                        .zip(&before.2)
                        .all(|(one, other)| one == other)
                );
            }
            world.heap.verify().unwrap();
            // It can be changed again, all of it, and dropped: nothing is dropped twice.
            for (_, change) in CHANGES {
                array
                    .update(0, |shared| {
                        fill_again(&world, shared);
                        change(&world, shared);
                    })
                    .unwrap();
            }
            drop((array, oracle));
            world.heap.verify().unwrap();
            died_at.extend(at);
            if ended_well {
                break;
            }
        }
    }
    assert_passed(
        &died_at,
        "vec",
        &[
            "written",
            "pushed",
            "popped",
            "allocated",
            "filled",
            "moved",
            "kept",
            "kept_alone",
            "truncated",
            "appended",
            "replacing",
            "replaced",
            "emptied",
        ],
    );
    assert_passed(&died_at, "boxed", &["allocated", "dropped"]);
    assert_passed(
        &died_at,
        "claims",
        &["written", "claimed", "ending", "ended"],
    );
}

fn assert_passed(died_at: &BTreeSet<String>, file: &str, steps: &[&str]) {
    for step in steps {
        let name = format!("shm.{file}.{step}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

fn crash_in_array_leaves_it_before_or_after() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let array = ShmArray::with_capacity_in(&world.heap, 8).unwrap();
        array.grow_with(5, |k| world.noisy(k as u64)).unwrap();
        let array = ShmArc::new_in(&world.heap, array).unwrap();
        let matrix = ShmMatrix::init_in(&world.heap, (3, 3), |r, c| (r * 3 + c) as u64).unwrap();
        let matrix = ShmArc::new_in(&world.heap, matrix).unwrap();
        crash::arm(Some(k));
        let child = fork(|| {
            // Of all kinds, one after the other.
            array.push(world.noisy(5)).unwrap();
            array.grow_with(8, |k| world.noisy(k as u64)).unwrap();
            array.grow_with(20, |k| world.noisy(k as u64)).unwrap();
            let reads: Vec<_> = (0..10).map(|k| array.read(k..k + 1).unwrap()).collect();
            drop(reads);
            array.set(3, world.noisy(103)).unwrap();
            matrix.grow((4, 3), 50).unwrap();
            matrix.grow((4, 5), 60).unwrap();
            matrix.set(0, 0, 9).unwrap();
        });
        let ended_well = child.ended_well();
        crash::disarm();
        let at = crash::died_at();
        let all = array.read(..).unwrap();
        let payloads: Vec<_> = all.iter().map(|one| one.payload).collect();
        assert!([5, 6, 8, 20].contains(&all.len()), "{at:?}");
        for (k, payload) in payloads.iter().enumerate() {
            assert!(
                *payload == k as u64 || (k, *payload) == (3, 103),
                "{at:?}: {payloads:?}"
            );
        }
        drop(all);
        for (range, _) in array.abandoned() {
            assert_eq!(range, 3..4);
        }
        let all = matrix.read_rows(..).unwrap();
        assert!([(3, 3), (4, 3), (4, 5)].contains(&all.dim()), "{at:?}");
        for (row, elements) in all.rows().enumerate() {
            for (column, element) in elements.iter().enumerate() {
                let expected = match (row, column) {
                    (_, 3..) => 60,
                    (3, _) => 50,
                    _ => (row * 3 + column) as u64,
                };
                assert!(*element == expected || (row, column, *element) == (0, 0, 9));
            }
        }
        drop(all);
        world.heap.verify().unwrap();
        // Others go on.
        array.grow_with(40, |k| world.noisy(k as u64)).unwrap();
        matrix.grow((9, 9), 1).unwrap();
        assert_eq!((array.len(), matrix.dim()), (40, (9, 9)));
        let before = world.drops();
        drop(array);
        assert_eq!(world.drops() - before, 40, "{at:?}");
        drop(matrix);
        world.heap.verify().unwrap();
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    assert_passed(
        &died_at,
        "grid",
        &["allocated", "filled", "grown", "copied", "moved"],
    );
    assert_passed(
        &died_at,
        "claims",
        &[
            "written",
            "claimed",
            "chunk_made",
            "chunk_linked",
            "ending",
            "ended",
        ],
    );
}

/// Killed while it takes over what another dead one had.
fn crash_while_settling_is_settled() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let array = ShmArray::init_in(&world.heap, 30, |_| 0_u8).unwrap();
        let array = ShmArc::new_in(&world.heap, array).unwrap();
        let dead = fork(|| {
            let _claims: Vec<_> = (0..3).map(|k| array.claim(k * 5..k * 5 + 5)).collect();
            let _read = array.read(20..25);
            std::process::abort();
        });
        assert!(dead.signal().is_some());
        crash::arm(Some(k));
        let child = fork(|| {
            let all = array.claim(..).unwrap();
            assert!(all.abandoned_by().is_some());
        });
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        if !ended_well {
            // It is the dead one's parts, or all.
            let left = array.abandoned();
            assert!(!left.is_empty() || crash::died_at().unwrap().ends_with("claims.ended"));
        }
        let all = array.claim(..).unwrap();
        drop(all);
        assert_eq!(array.abandoned(), []);
        if ended_well {
            break;
        }
    }
    assert_passed(&died_at, "claims", &["settled", "forgotten", "claimed"]);
}

fn crash_in_buffer_leaves_it_before_or_after() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let buffer = ShmBuffer::with_chunks_in(&world.heap, 64, ()).unwrap();
        let buffer = ShmArc::new_in(&world.heap, buffer).unwrap();
        buffer.add(&[0; 100]).unwrap();
        crash::arm(Some(k));
        let child = fork(|| {
            for record in 1..=14_u8 {
                buffer.add(&[record; 100]).unwrap();
            }
            let pin = buffer.pin(200..300).unwrap();
            buffer.delete_to(1_000);
            assert_eq!(pin.to_vec(), [2; 100]);
            drop(pin);
            buffer.delete_to(1_100);
            buffer.close();
        });
        let ended_well = child.ended_well();
        crash::disarm();
        let at = crash::died_at();
        // Whole records, and no half of one.
        let (start, end) = (buffer.start(), buffer.end());
        assert!(
            [0, 1_000, 1_100].contains(&start) && end % 100 == 0,
            "{at:?}"
        );
        let all = buffer.sub(..).unwrap();
        for (record, position) in all.chunks(100).zip((start..).step_by(100)) {
            assert_eq!(record, [(position / 100) as u8; 100], "{at:?}");
        }
        if !buffer.is_closed() {
            // Others go on at once, where it was.
            assert_eq!(buffer.add(&[99; 300]).unwrap(), end..end + 300);
            assert_eq!(buffer.sub(end..).unwrap(), [99; 300]);
        }
        world.heap.verify().unwrap();
        buffer.clear();
        // The last chunk, the ring, the value and its table; and what the dead one had in its hands.
        assert!(world.blocks() <= 7, "{at:?}: {}", world.blocks());
        drop(buffer);
        world.heap.verify().unwrap();
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    assert_passed(
        &died_at,
        "buffer",
        &[
            "piece_written",
            "committed",
            "unlocked",
            "chunk_allocated",
            "chunk_stored",
            "chunk_added",
            "directory_allocated",
            "directory_filled",
            "directory_stored",
            "deleted",
            "chunk_taken",
            "chunk_freed",
            "closed",
        ],
    );
}

/// Killed while it drops the last handle, or moves out of a box: nothing is dropped twice, and the heap is whole.
fn crash_in_drop_loses_only_the_value() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let array = shared(&world);
        let child = {
            let (world, array) = (&world, &array);
            crash::arm(Some(k));
            fork(move || {
                let own = shared(world);
                drop(own);
                let buffer = ShmBuffer::new_in(&world.heap);
                buffer.add(b"x").unwrap();
                drop(buffer);
                let taken = array.update(0, |shared| shared.vec.pop()).unwrap().unwrap();
                drop(ShmBox::into_inner(taken));
            })
        };
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        world.heap.verify().unwrap();
        let found = array.with(0, look).unwrap();
        assert!([5, 6].contains(&found.0.len()));
        drop(array);
        world.heap.verify().unwrap();
        if ended_well {
            break;
        }
    }
    assert_passed(&died_at, "grid", &["emptied", "dropped"]);
    assert_passed(&died_at, "buffer", &["emptied"]);
    assert_passed(&died_at, "boxed", &["emptied", "dropped", "taken"]);
    assert_passed(&died_at, "vec", &["truncated", "emptied", "popped"]);
}

/// Killed while it assigns, which drops the old value before it writes the new one: the next one assigns too, and nothing is dropped twice.
fn crash_in_assignment_lets_others_assign() {
    #[derive(ShmSafe)]
    struct Owners {
        alone: ShmBox<Noisy>,
        perhaps: Option<ShmBox<Noisy>>,
        array: ShmArray<ShmBox<Noisy>>,
        vec: ShmVec<ShmBox<Noisy>>,
        buffer: ShmBuffer,
    }
    assert_eq!(size_of::<Option<ShmBox<u8>>>(), size_of::<ShmBox<u8>>());
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let heap = &world.heap;
        let boxed = |k| ShmBox::new_in(heap, world.noisy(k)).unwrap();
        let make = || {
            let buffer = ShmBuffer::new_in(heap);
            buffer.add(b"x").unwrap();
            let owners = Owners {
                alone: boxed(1),
                perhaps: Some(boxed(2)),
                array: ShmArray::init_in(heap, 2, |k| boxed(k as u64)).unwrap(),
                vec: ShmVec::from_iter_in(heap, (0..2).map(boxed)).unwrap(),
                buffer,
            };
            heap.allocator().check(&owners).unwrap();
            owners
        };
        let place = ShmArc::new_in(heap, ShmMutex::new(make())).unwrap();
        crash::arm(Some(k));
        let child = fork(|| {
            let mut guard = place.lock().unwrap();
            *guard = make();
            *guard.alone = world.noisy(3);
        });
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        let (drops, mut guard) = match place.lock() {
            Ok(guard) => (world.drops(), guard),
            Err(died) => (world.drops(), died.guard),
        };
        // Here a second drop is noticed.
        *guard = make();
        assert!(world.drops() <= drops + 6);
        assert_eq!(guard.array.with(1, |one| one.payload).unwrap(), 1);
        drop(guard);
        drop(place);
        heap.verify().unwrap();
        if ended_well {
            break;
        }
    }
    assert_passed(&died_at, "boxed", &["emptied", "dropped"]);
    assert_passed(&died_at, "grid", &["emptied", "dropped"]);
    assert_passed(&died_at, "vec", &["truncated", "emptied"]);
    assert_passed(&died_at, "buffer", &["emptied"]);
}

/// Processes use one of each, and are killed at random moments.
fn random_kills_hang_nobody() {
    let mut random = Random::new();
    let kills = number("NETMCORE_KILLS").unwrap_or(80);
    let world = World::new();
    let heap = &world.heap;
    let array = ShmArray::init_in(heap, 64, |_| 0_u64).unwrap();
    let array = ShmArc::new_in(heap, array).unwrap();
    let buffer = ShmBuffer::with_chunks_in(heap, 128, ()).unwrap();
    let buffer = ShmArc::new_in(heap, buffer).unwrap();
    let values = shared(&world);
    let seeds = random.0;
    let start = |number: u64| {
        let (array, buffer, values, world) = (&array, &buffer, &values, &world);
        fork(move || {
            let mut random = Random(seeds.wrapping_add(number * 1_001) | 1);
            loop {
                let at = random.below(60) as usize;
                let mut slice = array.claim(at..at + 4).unwrap();
                slice.fill(number);
                drop(slice);
                let _ = array.read(..).unwrap().iter().sum::<u64>();
                let range = buffer.add(&[number as u8; 60]).unwrap();
                if let Ok(bytes) = buffer.sub(range.clone()) {
                    assert_eq!(bytes, [number as u8; 60]);
                }
                if random.below(4) == 0 {
                    buffer.delete_to(range.start);
                }
                let (_, change) = CHANGES[random.below(CHANGES.len() as u64) as usize];
                values
                    .update(0, |shared| {
                        fill_again(world, shared);
                        change(world, shared);
                    })
                    .unwrap();
            }
        })
    };
    let mut children: Vec<_> = (0..3).map(start).collect();
    for next in 3..kills + 3 {
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(4_000)));
        let victim = random.below(3) as usize;
        children[victim].kill();
        assert!(!children[victim].ended_well());
        let soon = Instant::now() + support::PATIENCE;
        drop(array.claim_deadline(.., soon).unwrap());
        drop(values.claim_deadline(.., soon).unwrap());
        children[victim] = start(next);
    }
    for child in &children {
        child.kill();
        assert!(!child.ended_well());
    }
    heap.verify().unwrap();
    let text = values.with(0, look).unwrap().1;
    assert!(text.len() <= 310);
    let all = buffer.sub(..).unwrap();
    assert!(all.len().is_multiple_of(60) && buffer.start().is_multiple_of(60));
    assert!(
        all.chunks(60)
            .all(|record| record.iter().all(|byte| *byte == record[0]))
    );
    drop((array, buffer, values));
    heap.verify().unwrap();
}

/// Every address that can be reached from a value lies in its heap.
fn all_that_is_reachable_lies_in_the_heap() {
    fn walk<T: ShmSafe>(heap: HeapRef, value: &T, seen: &mut usize) {
        value.visit_pointers(&mut |pointer| {
            assert!(heap.contains(pointer));
            *seen += 1;
        });
    }
    let world = World::new();
    let heap = world.heap.allocator();
    let mut seen = 0;
    let array = shared(&world);
    walk(heap, &array, &mut seen);
    walk(heap, &*array, &mut seen);
    for shared in array.read(..).unwrap().iter() {
        walk(heap, shared, &mut seen);
        shared.vec.iter().for_each(|one| walk(heap, one, &mut seen));
        assert!(heap.contains(shared.vec.as_ptr().cast()));
        assert!(heap.contains(shared.text.as_ptr()));
        assert!(heap.contains(shared.numbers.as_ptr().cast()));
    }
    let many: Vec<_> = (0..50).map(|_| array.read(0..0).unwrap()).collect();
    let before = seen;
    walk(heap, &*array, &mut seen);
    // Its block, its heap, and two chunks of claims.
    assert_eq!(seen - before, 4);
    drop(many);
    let buffer = ShmBuffer::with_chunks_in(&world.heap, 64, ()).unwrap();
    buffer.add(&[1; 1_000]).unwrap();
    let before = seen;
    walk(heap, &buffer, &mut seen);
    // Its heap, the ring, 16 chunks.
    assert_eq!(seen - before, 18);
    for piece in buffer.pin(..).unwrap().pieces() {
        assert!(heap.contains(piece.as_ptr()));
    }
    let matrix = ShmMatrix::make_in(&world.heap, (3, 3), 1_u8).unwrap();
    walk(heap, &matrix, &mut seen);
    assert!(heap.contains(matrix.read_rows(..).unwrap().row(2).as_ptr()));
    assert!(seen > 30);
}

/// Another thread may use the part after that of the claim has ended.
fn leaked_claim_holds_until_its_process_is_dead() {
    let world = World::new();
    let array = ShmArray::make_in(&world.heap, 4, 1_u64).unwrap();
    let array = ShmArc::new_in(&world.heap, array).unwrap();
    let child = fork(|| {
        let part = support::leak_in_a_thread(|| {
            let part = Box::leak(Box::new(array.claim(1..3).unwrap()));
            &mut part[..]
        });
        assert!(array.try_claim(2..).is_ok_and(|claim| claim.is_none()));
        part[0] = 2;
    });
    assert!(child.ended_well());
    assert_eq!(array.claim(..).unwrap()[..], [1, 2, 1, 1]);
}

netmcore_forktest::forktests!(
    boxes_own_their_values,
    copies_by_fork_free_and_change_nothing,
    leaked_claim_holds_until_its_process_is_dead,
    owners_go_through_shared_memory,
    what_is_assigned_through_a_guard_belongs_to_all,
    vec_is_what_it_says,
    full_heap_gives_the_value_back,
    string_is_what_it_says,
    array_is_what_it_says,
    foreign_pointers_are_refused,
    workers_on_disjoint_parts_with_kills,
    dead_ones_part_is_free_within_10_ms_and_told,
    panic_with_a_part_claimed_is_told,
    claims_exclude_each_other,
    growth_does_not_move_what_is_claimed,
    rayon_works_on_a_claimed_part,
    matrix_is_what_it_says,
    matrix_blocks_of_several_processes,
    matrix_has_views,
    buffer_is_what_it_says,
    failed_append_gives_its_chunks_back,
    crash_in_failed_append_leaves_all_usable,
    reader_reads_what_it_has_been_shown,
    empty_claim_of_a_dead_one_is_forgotten,
    buffer_lines_of_several_processes,
    dead_readers_pin_is_ended,
    waiter_for_bytes_is_woken,
    crash_in_vec_leaves_it_before_or_after,
    crash_in_array_leaves_it_before_or_after,
    crash_while_settling_is_settled,
    crash_in_buffer_leaves_it_before_or_after,
    crash_in_drop_loses_only_the_value,
    crash_in_assignment_lets_others_assign,
    random_kills_hang_nobody,
    all_that_is_reachable_lies_in_the_heap,
);

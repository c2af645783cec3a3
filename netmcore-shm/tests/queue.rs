//! Guards against elements that are lost, doubled or out of order when processes that push and pop are killed, and against waiting for the dead.
//!
//! # Safety
//!
//! The counters are a page of zeros, mapped as long as the test runs, and used as atomics only.

#![allow(unsafe_code)]

mod support;

use netmcore_sem::{Current, Owners};
use netmcore_shm::{
    AnonRegion, Arena, ClosedBy, EnrolError, Error, Heap, PopError, PushError, ShmArc, ShmQueue,
    ShmSafe,
};
use netmcore_sys::crash;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use support::{Random, assert_times_out, fork};

/// A death is noticed within this on an idle machine; tests allow for a busy one.
const SOON: Duration = Duration::from_secs(10);

struct World {
    arena: Arena,
    heap: Heap,
    page: AnonRegion,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let page = AnonRegion::create(c"counters", &arena, 64 << 10).unwrap();
        World { arena, heap, page }
    }

    /// Words of zeros that all processes of the test share.
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: a page of zeros, mapped as long as the world, used as atomics only.
        unsafe { std::slice::from_raw_parts(self.page.at().cast(), (64 << 10) / 8) }
    }

    fn share<T: ShmSafe>(&self, queue: ShmQueue<T>) -> ShmArc<ShmQueue<T>> {
        ShmArc::new_in(&self.heap, queue).unwrap()
    }

    fn bounded<T: ShmSafe>(&self, capacity: usize) -> ShmArc<ShmQueue<T>> {
        self.share(ShmQueue::bounded_in(&self.heap, capacity).unwrap())
    }

    fn unbounded<T: ShmSafe>(&self) -> ShmArc<ShmQueue<T>> {
        self.share(ShmQueue::unbounded_in(&self.heap).unwrap())
    }

    /// No block is in use but what a queue leaves: the table of shared values.
    fn check_empty_since(&self, blocks_before: u64, lost: u64) {
        self.heap.verify().unwrap();
        let blocks = self.heap.stats().in_use_blocks;
        assert!(
            (blocks_before..=blocks_before + lost).contains(&blocks),
            "{blocks} blocks, {blocks_before} before, at most {lost} lost"
        );
    }
}

/// Counts its drops, in whichever process.
#[derive(Debug, ShmSafe)]
struct Noisy {
    payload: u64,
    drops_at: usize,
}

impl Noisy {
    fn new(world: &World, payload: u64) -> Noisy {
        Noisy {
            payload,
            drops_at: world.page.at().addr(),
        }
    }
}

impl Drop for Noisy {
    fn drop(&mut self) {
        assert!(self.payload != u64::MAX, "dropped twice");
        self.payload = u64::MAX;
        // SAFETY: the page outlives the heap's values in these tests.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.drops_at) }
            .fetch_add(1, SeqCst);
    }
}

fn queue_is_first_in_first_out_and_full_at_its_capacity() {
    let world = World::new();
    for capacity in [1, 2, 3, 7, 8] {
        let queue = world.bounded::<u64>(capacity);
        assert_eq!(queue.capacity(), Some(capacity));
        for lap in 0..5 {
            for k in 0..capacity as u64 {
                assert_eq!(queue.len(), k as usize);
                queue.try_push(lap * 100 + k).unwrap();
            }
            match queue.try_push(99) {
                Err(error @ PushError::Full { .. }) => assert_eq!(error.into_value(), 99),
                other => panic!("{other:?}"),
            }
            assert_eq!(queue.peek(|first| *first), Some(lap * 100));
            for k in 0..capacity as u64 {
                assert_eq!(queue.try_pop(), Ok(lap * 100 + k));
            }
            assert_eq!(queue.try_pop(), Err(PopError::Empty));
            assert_eq!(queue.peek(|first| *first), None);
            // So that laps begin at other places.
            queue.push(7).unwrap();
            assert_eq!(queue.pop(), Ok(7));
        }
    }
}

/// An oracle of a few obvious lines; a child that dies in the middle of an operation is one of the operations.
fn queue_matches_vecdeque() {
    let mut random = Random::new();
    for round in 0..24 {
        let world = World::new();
        let (queue, capacity) = match round % 4 {
            0 => (world.unbounded::<[u64; 64]>(), usize::MAX),
            1 => (world.bounded(1), 1),
            2 => (world.bounded(5), 5),
            _ => (world.bounded(64), 64),
        };
        let mut oracle = VecDeque::new();
        let mut next = 0;
        for _ in 0..400 {
            let mut fresh = || {
                next += 1;
                [next; 64]
            };
            match random.below(40) {
                0..13 => {
                    let value = fresh();
                    let pushed = queue.try_push(value);
                    if oracle.len() < capacity {
                        pushed.unwrap();
                        oracle.push_back(value);
                    } else {
                        assert_eq!(pushed.unwrap_err().into_value(), value);
                    }
                }
                13..25 => assert_eq!(queue.try_pop().ok(), oracle.pop_front()),
                25..28 => {
                    let values: Vec<_> = (0..random.below(70)).map(|_| fresh()).collect();
                    let pushed = queue.push_slice(&values).unwrap();
                    assert_eq!(pushed, values.len().min(capacity - oracle.len()));
                    oracle.extend(&values[..pushed]);
                }
                28..31 => {
                    let limit = 1 + random.below(70) as usize;
                    let mut to = Vec::new();
                    let popped = queue.pop_many(limit, &mut to);
                    let count = limit.min(oracle.len());
                    assert_eq!(popped.unwrap_or(0), count);
                    assert_eq!(to, oracle.drain(..count).collect::<Vec<_>>());
                }
                31 => assert_eq!(queue.drain().take(3).count(), {
                    let count = oracle.len().min(3);
                    drop(oracle.drain(..count));
                    count
                }),
                32 => {
                    if random.below(4) == 0 {
                        queue.clear();
                        oracle.clear();
                    }
                }
                33 => assert_eq!(queue.to_vec(), oracle.iter().copied().collect::<Vec<_>>()),
                34 => assert_eq!(queue.peek(|first| first[0]), oracle.front().map(|v| v[0])),
                _ => {
                    // A child that dies somewhere in a push or pop.
                    let (value, is_push) = (fresh(), random.below(2) == 0);
                    crash::arm(Some(1 + random.below(9)));
                    let ended_well = fork(|| {
                        if is_push {
                            let _ = queue.try_push(value);
                        } else {
                            let _ = queue.try_pop();
                        }
                    })
                    .ended_well();
                    crash::disarm();
                    let change = queue.len().wrapping_sub(oracle.len()).cast_signed();
                    match (is_push, change) {
                        (_, 0) => assert!(
                            !ended_well
                                || if is_push {
                                    oracle.len() == capacity
                                } else {
                                    oracle.is_empty()
                                }
                        ),
                        (true, 1) => oracle.push_back(value),
                        (false, -1) => drop(oracle.pop_front()),
                        other => panic!("{other:?}"),
                    }
                }
            }
            assert_eq!(queue.len(), oracle.len());
            assert_eq!(queue.is_empty(), oracle.is_empty());
        }
        assert_eq!(queue.drain().collect::<VecDeque<_>>(), oracle);
        world.heap.verify().unwrap();
    }
}

fn values_are_dropped_once_and_memory_comes_back() {
    let world = World::new();
    drop(ShmArc::new_in(&world.heap, 0_u8).unwrap());
    let blocks = world.heap.stats().in_use_blocks;
    let drops = &world.words()[0];
    for is_bounded in [true, false] {
        let queue = if is_bounded {
            world.bounded(700)
        } else {
            world.unbounded()
        };
        let before = drops.load(SeqCst);
        queue.producers(3).unwrap();
        for k in 0..3_000 {
            if queue.len() == 600 {
                drop(queue.pop().unwrap());
            }
            queue.push(Noisy::new(&world, k)).unwrap();
        }
        assert_eq!(drops.load(SeqCst) - before, 2_400);
        queue.clear();
        assert_eq!(drops.load(SeqCst) - before, 3_000);
        for k in 0..10 {
            queue.push(Noisy::new(&world, k)).unwrap();
        }
        // A leaked guard does not stop the drop.
        std::mem::forget(queue.pinned());
        drop(queue);
        assert_eq!(drops.load(SeqCst) - before, 3_010);
        world.check_empty_since(blocks, 0);
    }
    // Not in a ShmArc.
    let mut queue = ShmQueue::unbounded_in(&world.heap).unwrap();
    queue.push(Noisy::new(&world, 1)).unwrap();
    let child = fork(|| {
        let copy = &queue;
        assert!(catch_unwind(AssertUnwindSafe(|| copy.pop())).is_err());
    });
    assert!(child.ended_well());
    queue = ShmQueue::bounded_in(&world.heap, 1).unwrap();
    drop(queue);
    world.check_empty_since(blocks, 0);
}

/// The drop of an element panics; the others are dropped, nothing stays locked.
fn panics_of_users_code_leave_the_queue_in_order() {
    #[derive(ShmSafe)]
    struct Fragile(u64, usize);
    impl Drop for Fragile {
        fn drop(&mut self) {
            // SAFETY: the page outlives the heap's values in these tests.
            unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.1) }
                .fetch_add(1, SeqCst);
            assert!(self.0 != 3, "as planned");
        }
    }
    let world = World::new();
    drop(ShmArc::new_in(&world.heap, 0_u8).unwrap());
    let blocks = world.heap.stats().in_use_blocks;
    let drops = &world.words()[0];
    let queue = world.unbounded();
    let fill = || {
        for k in 0..6 {
            queue.push(Fragile(k, world.page.at().addr())).unwrap();
        }
    };
    fill();
    assert!(catch_unwind(AssertUnwindSafe(|| queue.clear())).is_err());
    assert_eq!((drops.load(SeqCst), queue.len()), (4, 2));
    assert!(catch_unwind(AssertUnwindSafe(|| queue.for_each(|_| panic!("as planned")))).is_err());
    // A second look by the same thread is refused, not waited for.
    let pinned = queue.pinned();
    assert!(catch_unwind(AssertUnwindSafe(|| queue.try_pop().is_ok())).is_err());
    drop(pinned);
    queue.clear();
    assert_eq!(drops.load(SeqCst), 6);
    fill();
    assert!(catch_unwind(AssertUnwindSafe(|| drop(queue))).is_err());
    assert_eq!(drops.load(SeqCst), 12);
    // The block of the value itself: its drop did not come to an end.
    world.check_empty_since(blocks, 1);
}

fn foreign_pointers_and_full_heaps_give_the_value_back() {
    let world = World::new();
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let queue = ShmArc::new_in(&other, ShmQueue::bounded_in(&other, 4).unwrap()).unwrap();
    let foreign = ShmArc::new_in(&world.heap, 5_u32).unwrap();
    match queue.push(foreign.clone()) {
        Err(PushError::Refused {
            value,
            error: Error::ForeignPointer { .. },
        }) => assert_eq!(*value, 5),
        other => panic!("{other:?}"),
    }
    assert_eq!(queue.len(), 0);
    assert_eq!(ShmArc::strong_count(&foreign), 1);
    // A queue in another heap than its elements.
    let queue = ShmQueue::<u8>::bounded_in(&other, 4).unwrap();
    assert!(matches!(
        ShmArc::new_in(&world.heap, queue),
        Err(Error::ForeignPointer { .. })
    ));
    let queue = ShmArc::new_in(&other, ShmQueue::unbounded_in(&other).unwrap()).unwrap();
    let pushed = loop {
        match queue.push([7_u8; 60_000]) {
            Ok(()) => {}
            Err(PushError::Refused { value, error }) => {
                assert!(matches!(error, Error::OutOfPoolMemory { .. }), "{error}");
                assert_eq!(value, [7; 60_000]);
                break queue.len();
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(pushed > 50, "{pushed}");
    for _ in 0..20 {
        assert_eq!(queue.pop().unwrap()[59_999], 7);
    }
    queue.push([8; 60_000]).unwrap();
    assert_eq!(queue.len(), pushed - 19);
}

fn header_and_debug_say_what_it_is() {
    let world = World::new();
    let queue =
        ShmQueue::<u8, _>::bounded_with_header_in(&world.heap, 3, AtomicU64::new(4)).unwrap();
    let queue = ShmArc::new_in(&world.heap, queue).unwrap();
    let child = fork(|| queue.header().store(5, SeqCst));
    assert!(child.ended_well());
    assert_eq!(queue.header().load(SeqCst), 5);
    queue.push(1).unwrap();
    let text = format!("{queue:?}");
    assert!(
        text.contains("len: 1") && text.contains("capacity: Some(3)"),
        "{text}"
    );
    let pinned = queue.pinned();
    assert_eq!(format!("{pinned:?}"), "[1]");
    // A forked copy pins nothing.
    let copy = fork(|| assert!(catch_unwind(AssertUnwindSafe(|| pinned.iter().len())).is_err()));
    assert!(copy.ended_well());
}

/// Through a descriptor, as the argument of a process is.
fn descriptor_finds_the_queue() {
    let world = World::new();
    let queue = world.unbounded::<u64>();
    let text = serde_json::to_string(&queue).unwrap();
    let child = fork(|| {
        let queue: ShmArc<ShmQueue<u64>> = serde_json::from_str(&text).unwrap();
        queue.push(queue.pop().unwrap() + 1).unwrap();
    });
    queue.push(41).unwrap();
    assert!(child.ended_well());
    assert_eq!(queue.pop(), Ok(42));
}

fn deadlines_end_waits() {
    let world = World::new();
    let queue = world.bounded(1);
    let wait = Duration::from_millis(30);
    assert_times_out(wait, |deadline| match queue.pop_deadline(deadline) {
        Err(PopError::TimedOut { waited }) => waited,
        other => panic!("{other:?}"),
    });
    queue.push_deadline(1, Instant::now()).unwrap();
    assert_times_out(wait, |deadline| match queue.push_deadline(2, deadline) {
        Err(PushError::TimedOut { value: 2, waited }) => waited,
        other => panic!("{other:?}"),
    });
    assert_eq!(queue.pop_deadline(Instant::now()), Ok(1));
    // Somebody who looks for long: the deadline holds for the lock, too.
    let (go, looking) = (&world.words()[0], &world.words()[1]);
    queue.push(3).unwrap();
    let child = fork(|| {
        queue.peek(|_| {
            looking.store(1, SeqCst);
            while go.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
        });
    });
    while looking.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let timed_out = queue.pop_deadline(Instant::now() + wait);
    assert!(matches!(timed_out, Err(PopError::TimedOut { .. })));
    go.store(1, SeqCst);
    assert!(child.ended_well());
    assert_eq!(queue.pop(), Ok(3));
}

fn close_ends_all_waits() {
    let world = World::new();
    let (full, empty) = (world.bounded(1), world.bounded::<u64>(1));
    full.push(1).unwrap();
    let pusher = fork(|| match full.push(2) {
        Err(PushError::Closed { value: 2, closed }) => assert_eq!(closed.by, ClosedBy::Call),
        other => panic!("{other:?}"),
    });
    let popper = fork(|| match empty.pop() {
        Err(PopError::Closed(closed)) => assert_eq!(closed.by, ClosedBy::Call),
        other => panic!("{other:?}"),
    });
    // sleep: they should be asleep by then; the test holds if they are not.
    std::thread::sleep(Duration::from_millis(20));
    full.close();
    empty.close();
    assert!(pusher.ended_well() && popper.ended_well());
    assert_eq!(full.try_pop(), Ok(1), "what was in it stays");
    assert!(full.try_pop().unwrap_err().is_closed());
    assert!(full.push(3).unwrap_err().is_closed());
    assert!(matches!(
        full.push_slice(&[4]),
        Err(PushError::Closed { .. })
    ));
    assert!(full.pop_many(4, &mut Vec::new()).unwrap_err().is_closed());
}

fn producers_that_leave_or_die_close_the_queue() {
    let world = World::new();
    for is_bounded in [true, false] {
        let queue = if is_bounded {
            world.bounded(10)
        } else {
            world.unbounded()
        };
        assert!(matches!(queue.producer(), Err(EnrolError::NotTold)));
        queue.producers(3).unwrap();
        queue.producers(3).unwrap();
        assert!(matches!(
            queue.producers(2),
            Err(EnrolError::ToldOtherwise {
                expected: 3,
                said: 2
            })
        ));
        let mortal = &world.words()[0];
        let popper = fork(|| {
            let mut seen = Vec::new();
            let closed = loop {
                match queue.pop() {
                    Ok(value) => seen.push(value),
                    Err(PopError::Closed(closed)) => break closed,
                    other => panic!("{other:?}"),
                }
            };
            seen.sort();
            assert_eq!(seen, [0, 1, 2]);
            assert_eq!(closed.by, ClosedBy::ProducersGone);
            assert_eq!(closed.ended_count, 2);
            assert_eq!(closed.died.len(), 1);
            assert_eq!(netmcore_word(closed.died[0]), mortal.load(SeqCst));
            assert!(closed.to_string().contains("2 in order, owner"), "{closed}");
        });
        for k in 0..3 {
            let producer = fork(|| {
                let producer = queue.producer().unwrap();
                producer.push(k).unwrap();
                if k == 2 {
                    mortal.store(netmcore_word(Current.me()), SeqCst);
                    loop {
                        std::thread::park();
                    }
                }
            });
            if k < 2 {
                assert!(producer.ended_well());
                continue;
            }
            while mortal.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            let text = queue.producer().unwrap_err().to_string();
            assert!(text.contains("all 3"), "{text}");
            producer.kill();
            assert!(!producer.ended_well());
        }
        let killed = Instant::now();
        assert!(popper.ended_well());
        assert!(killed.elapsed() < SOON);
        assert!(matches!(queue.producer(), Err(EnrolError::Closed(_))));
        assert!(queue.push(5).unwrap_err().is_closed());
        mortal.store(0, SeqCst);
    }
}

fn netmcore_word(owner: netmcore_shm::OwnerId) -> u64 {
    u64::from(owner.generation) << 32 | u64::from(owner.index)
}

/// One that died is replaced before the queue closes.
fn place_of_a_dead_producer_is_given_again() {
    let world = World::new();
    let queue = world.bounded::<u64>(4);
    queue.producers(2).unwrap();
    let ours = queue.producer().unwrap();
    let mortal = fork(|| {
        std::mem::forget(queue.producer().unwrap());
        queue.push(1).unwrap();
        loop {
            std::thread::park();
        }
    });
    assert_eq!(queue.pop(), Ok(1));
    assert!(matches!(
        queue.producer(),
        Err(EnrolError::TooMany { expected: 2 })
    ));
    mortal.kill();
    assert!(!mortal.ended_well());
    let again = queue.producer().unwrap();
    drop(ours);
    again.push(2).unwrap();
    assert_eq!(queue.pop(), Ok(2));
    assert_eq!(queue.try_pop(), Err(PopError::Empty));
    // A forked copy of the guard leaves nothing.
    let copy = fork(|| {
        // SAFETY: what this process, a copy, does not use any more.
        drop(unsafe { std::ptr::read(&raw const again) });
    });
    assert!(copy.ended_well());
    let copy = fork(|| queue.push(3).unwrap());
    assert!(copy.ended_well());
    assert_eq!(queue.closed(), None);
}

/// What there is can be popped by whoever comes, also when those who pushed it have gone.
fn consumer_may_come_after_the_producers_have_gone() {
    let world = World::new();
    let queue = world.bounded::<u64>(4);
    queue.producers(1).unwrap();
    queue.consumers(2).unwrap();
    queue.producer().unwrap().push(7).unwrap();
    let late = queue.consumer().unwrap();
    assert_eq!(late.pop(), Ok(7));
    assert!(late.pop().unwrap_err().is_closed());
    let later = queue.consumer().unwrap();
    assert!(matches!(queue.producer(), Err(EnrolError::Closed(_))));
    drop((late, later));
    assert!(matches!(queue.consumer(), Err(EnrolError::Closed(_))));
}

fn consumers_that_leave_or_die_fail_pushes() {
    let world = World::new();
    for dies in [false, true] {
        let (full, endless) = (world.bounded::<u64>(2), world.unbounded::<u64>());
        let ready = &world.words()[0];
        ready.store(0, SeqCst);
        full.push(1).unwrap();
        full.push(2).unwrap();
        full.consumers(1).unwrap();
        endless.consumers(1).unwrap();
        let consumer = fork(|| {
            let (one, other) = (full.consumer().unwrap(), endless.consumer().unwrap());
            ready.store(1, SeqCst);
            while ready.load(SeqCst) == 1 {
                std::thread::yield_now();
            }
            drop((one, other));
        });
        while ready.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let blocked = fork(|| match full.push(3) {
            Err(PushError::Closed { value: 3, closed }) => {
                assert_eq!(closed.by, ClosedBy::ConsumersGone);
                assert_eq!(closed.died.len(), usize::from(dies));
                assert_eq!(closed.ended_count, usize::from(!dies));
            }
            other => panic!("{other:?}"),
        });
        if dies {
            consumer.kill();
            assert!(!consumer.ended_well());
        } else {
            ready.store(2, SeqCst);
            assert!(consumer.ended_well());
        }
        assert!(blocked.ended_well());
        // Also without waiting.
        let gone = Instant::now();
        let error = loop {
            match endless.push(1) {
                Ok(()) => assert!(gone.elapsed() < SOON),
                Err(error) => break error,
            }
        };
        assert!(error.is_closed() && error.into_value() == 1);
    }
}

/// Who polls by batches is told as who waits is.
fn batches_end_when_the_others_are_gone() {
    let world = World::new();
    let (pushed, popped) = (world.unbounded::<u64>(), world.bounded::<u64>(4));
    pushed.consumers(1).unwrap();
    popped.producers(1).unwrap();
    let ready = &world.words()[0];
    let mortal = fork(|| {
        std::mem::forget(pushed.consumer().unwrap());
        std::mem::forget(popped.producer().unwrap());
        popped.push(5).unwrap();
        ready.store(1, SeqCst);
        loop {
            std::thread::park();
        }
    });
    while ready.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    mortal.kill();
    assert!(!mortal.ended_well());
    let gone = Instant::now();
    while pushed.push_slice(&[1]).is_ok() {
        assert!(gone.elapsed() < SOON);
    }
    assert!(pushed.push_slice(&[1]).unwrap_err().is_closed());
    let mut to = Vec::new();
    let error = loop {
        match popped.pop_many(3, &mut to) {
            Ok(count) => assert_eq!(count, 1),
            Err(PopError::Empty) => assert!(gone.elapsed() < SOON),
            Err(error) => break error,
        }
    };
    assert!(error.is_closed() && to == [5]);
}

/// The one that the push has woken cannot pop before its deadline; another one sleeps, and gets the element.
fn wake_is_passed_on_by_one_that_gives_up() {
    let world = World::new();
    // A supervisor: without one all who sleep look again by themselves.
    let people: &support::World = Box::leak(Box::new(support::World::new(1 << 20)));
    let be = |index| {
        let person = Box::leak(Box::new(people.person(index, 1)));
        // SAFETY: each process has an index of its own, and has one thread.
        unsafe { netmcore_sem::current::install(person) };
    };
    be(0);
    let queue = world.bounded::<u64>(1);
    let hasty = fork(|| {
        be(1);
        let popped = queue.pop_deadline(Instant::now() + Duration::from_millis(200));
        assert!(matches!(popped, Err(PopError::TimedOut { .. })));
    });
    // sleep: it should be asleep by then; the test holds if it is not.
    std::thread::sleep(Duration::from_millis(20));
    let patient = fork(|| {
        be(2);
        assert_eq!(queue.pop(), Ok(7));
    });
    // sleep: as above.
    std::thread::sleep(Duration::from_millis(20));
    // Who comes as late as this finds the end held as well.
    let pinned = queue.pinned();
    queue.push(7).unwrap();
    assert!(hasty.ended_well());
    drop(pinned);
    assert!(patient.ended_well());
}

/// The pusher has seen less room than there is: a batch comes at once all the same.
fn batch_is_pushed_at_once_whatever_was_seen() {
    let world = World::new();
    for k in 1.. {
        let queue = world.bounded::<u64>(8);
        for _ in 0..2 {
            (0..6).for_each(|k| queue.push(k).unwrap());
            assert_eq!(queue.drain().count(), 6);
        }
        crash::arm(Some(k));
        let child = fork(|| assert_eq!(queue.push_slice(&[3; 4]).unwrap(), 4));
        assert!(!child.ended_well());
        crash::disarm();
        if crash::died_at().as_deref() == Some("shm.queue.batch_pushed") {
            assert_eq!(queue.to_vec(), [3; 4]);
            break;
        }
        assert!(queue.is_empty());
    }
}

fn values_of_any_size_and_alignment_pass() {
    #[derive(ShmSafe, Clone, Copy, Debug, PartialEq)]
    #[repr(align(512))]
    struct Wide(u8);
    let world = World::new();
    for is_bounded in [true, false] {
        let (nothings, wides) = if is_bounded {
            (world.bounded::<()>(700), world.bounded::<Wide>(70))
        } else {
            (world.unbounded(), world.unbounded())
        };
        for lap in 0..3 {
            (0..700).for_each(|_| nothings.push(()).unwrap());
            assert_eq!(nothings.pop_many(1000, &mut Vec::new()), Ok(700));
            for k in 0..70 {
                wides.push(Wide(lap * 70 + k)).unwrap();
            }
            wides.for_each(|wide| assert!((&raw const *wide).is_aligned()));
            for k in 0..70 {
                assert_eq!(wides.pop(), Ok(Wide(lap * 70 + k)));
            }
        }
    }
}

/// Sizes that are out of all reason are refused before anything is made.
fn absurd_sizes_are_refused() {
    let world = World::new();
    let made = catch_unwind(AssertUnwindSafe(|| {
        ShmQueue::<()>::bounded_in(&world.heap, usize::MAX).is_ok()
    }));
    assert!(made.is_err());
    let queue = world.bounded::<u64>(1);
    let told = catch_unwind(AssertUnwindSafe(|| queue.producers(usize::MAX).is_ok()));
    assert!(told.is_err());
    queue.producers(1).unwrap();
    let _producer = queue.producer().unwrap();
    queue.push(1).unwrap();
}

/// What a mortal does in the test below: everything, so that each crash point is passed.
fn everything(world: &World, ring: &ShmQueue<[u64; 3]>, chain: &ShmQueue<[u64; 3]>, base: u64) {
    let other = ShmQueue::<u8>::bounded_in(&world.heap, 3).unwrap();
    other.producers(1).unwrap();
    other.push(1).unwrap();
    other.close();
    drop(other);
    let producer = ring.producer().unwrap();
    for k in 0..5 {
        // Wraps around; full now and then.
        let _ = producer.try_push([base + k; 3]);
        let _ = ring.try_push([base + 10 + k; 3]);
        let _ = ring.try_pop();
    }
    let _ = ring.push_slice(&[[base + 20; 3], [base + 21; 3], [base + 22; 3]]);
    let _ = ring.pop_many(2, &mut Vec::new());
    // From one segment to the next, and the next.
    let places = 16 * 1024 / 24;
    for k in 0..2 {
        let many: Vec<_> = (0..places)
            .map(|at| [base + 100 + k * 10_000 + at; 3])
            .collect();
        let _ = chain.push_slice(&many);
        chain.push([base + 50 + k; 3]).unwrap();
        let _ = chain.pop_many(places as usize - 3, &mut Vec::new());
        for _ in 0..5 {
            let _ = chain.try_pop();
        }
    }
    drop(producer);
}

fn crash_at_any_point_leaves_the_others_well() {
    let mut died_at = BTreeSet::new();
    let mut k = 1;
    loop {
        let world = World::new();
        let (ring, chain) = (world.bounded(4), world.unbounded());
        ring.producers(2).unwrap();
        chain.push([1; 3]).unwrap();
        crash::arm(Some(k));
        let ended_well = fork(|| everything(&world, &ring, &chain, 1_000_000)).ended_well();
        crash::disarm();
        let at = crash::died_at();
        let began = Instant::now();
        for queue in [&ring, &chain] {
            // What is in it is in order, each element whole.
            let there = queue.to_vec();
            assert!(there.iter().all(|v| v[0] == v[1] && v[1] == v[2]), "{at:?}");
            assert_eq!(there.len(), queue.len());
            let mut sorted = there.clone();
            sorted.sort();
            sorted.dedup();
            assert_eq!(sorted.len(), there.len(), "{at:?}: doubled");
            assert_eq!(queue.drain().collect::<Vec<_>>(), there, "{at:?}");
            // It works on as a queue.
            for lap in 0..300 {
                for k in 0..4 {
                    queue.push([lap * 4 + k; 3]).unwrap();
                }
                for k in 0..4 {
                    assert_eq!(queue.pop(), Ok([lap * 4 + k; 3]), "{at:?}");
                }
            }
        }
        // The place of the dead producer is free, or was never taken.
        let one = ring.producer().unwrap();
        if ended_well || at.as_deref() == Some("shm.queue.left") {
            assert!(ring.producer().is_err());
        } else {
            let replaced = ring.producer();
            assert!(replaced.is_ok(), "{at:?}: {replaced:?}");
        }
        drop(one);
        assert!(matches!(ring.pop(), Err(PopError::Closed(_))), "{at:?}");
        assert!(began.elapsed() < SOON);
        drop((ring, chain));
        world.heap.verify().unwrap();
        died_at.extend(at);
        if ended_well {
            break;
        }
        // Far from the ends of segments it is always the same.
        k += if k < 300 { 1 } else { 7 };
    }
    for step in [
        "queue.made",
        "queue.written",
        "queue.pushed",
        "queue.pushed_before_wake",
        "queue.read",
        "queue.popped",
        "queue.popped_before_wake",
        "queue.batch_written",
        "queue.batch_pushed",
        "queue.batch_read",
        "queue.batch_popped",
        "queue.segment_allocated",
        "queue.spare_taken",
        "queue.segment_linked",
        "queue.segment_entered",
        "queue.segment_left",
        "queue.segment_retired",
        "queue.enrolled",
        "queue.left",
        "queue.closed_before_wake",
        "enrolment.roll_made",
        "enrolment.roll_published",
    ] {
        let name = format!("shm.{step}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

/// Each operation alone, at each point, with a partner that waits for what the dead one has done or not done.
fn partner_of_a_killed_one_goes_on() {
    for is_pusher in [true, false] {
        for k in 1.. {
            let world = World::new();
            let queue = world.bounded::<u64>(2);
            if !is_pusher {
                queue.push(1).unwrap();
                queue.push(2).unwrap();
            }
            crash::arm_role(1, k);
            let partner = fork(|| {
                if is_pusher {
                    let first = queue.pop().unwrap();
                    assert!(first == 1 || first == 7);
                } else {
                    queue.push(3).unwrap();
                }
            });
            let mortal = fork(|| {
                crash::set_role(1);
                if is_pusher {
                    queue.push(1).unwrap();
                } else {
                    assert_eq!(queue.pop(), Ok(1));
                }
            });
            let ended_well = mortal.ended_well();
            crash::disarm();
            // If it died before its commit, the partner still waits: for anybody.
            if is_pusher {
                queue.push(7).unwrap();
            } else {
                assert!(queue.pop().unwrap() <= 2);
            }
            let began = Instant::now();
            assert!(partner.ended_well());
            assert!(began.elapsed() < SOON);
            if ended_well {
                assert!(k > 4, "{k}");
                break;
            }
        }
    }
}

/// The fastest of ten, since the machine may be busy with something else: a popper whose only producer is killed; a pusher whose like is killed while it
/// holds the end.
fn survivors_go_on_within_10_ms() {
    let world = World::new();
    let [ready, ended_at] = [&world.words()[0], &world.words()[1]];
    let now = || netmcore_sys::futex::Deadline::now().as_nanos();
    let mut fastest = [u64::MAX; 2];
    for _ in 0..10 {
        let queue = world.bounded::<u64>(4);
        queue.producers(1).unwrap();
        ready.store(0, SeqCst);
        let mortal = fork(|| {
            let _producer = queue.producer().unwrap();
            ready.store(1, SeqCst);
            loop {
                std::thread::park();
            }
        });
        while ready.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let popper = fork(|| {
            assert!(queue.pop().unwrap_err().is_closed());
            ended_at.store(now(), SeqCst);
        });
        // sleep: the popper should be asleep by then; the test holds if it is not.
        std::thread::sleep(Duration::from_millis(3));
        let killed_at = now();
        mortal.kill();
        assert!(!mortal.ended_well() && popper.ended_well());
        fastest[0] = fastest[0].min(ended_at.load(SeqCst) - killed_at);

        let queue = world.bounded::<u64>(4);
        crash::arm_role(1, 2);
        let mortal = fork(|| {
            crash::set_role(1);
            queue.push(1).unwrap();
        });
        assert!(!mortal.ended_well());
        crash::disarm();
        assert_eq!(crash::died_at().as_deref(), Some("shm.queue.written"));
        let killed_at = now();
        queue.push(2).unwrap();
        fastest[1] = fastest[1].min(now() - killed_at);
        assert_eq!(queue.pop(), Ok(2));
    }
    assert!(
        fastest.iter().all(|&nanos| nanos < 10_000_000),
        "{fastest:?}"
    );
}

/// Producers and consumers are killed at random: each element comes out once, in the order of its producer; but one for each that was killed.
fn random_kills_lose_nothing() {
    const PRODUCERS: usize = 2;
    const CONSUMERS: usize = 2;
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(60);
    for is_bounded in [true, false] {
        let world = World::new();
        // [sequence, its producer]: a producer that comes after a dead one goes on with its numbers.
        let queue = if is_bounded {
            world.bounded::<[u64; 2]>(7)
        } else {
            world.unbounded()
        };
        let received = world.unbounded::<[u64; 2]>();
        let words = world.words();
        let (begun, stop) = (&words[..PRODUCERS], &words[PRODUCERS]);
        let producer = |me: usize| {
            let (queue, begun) = (&queue, &begun[me]);
            fork(move || {
                loop {
                    // Counted before: a number is used once, whatever happens.
                    let number = begun.fetch_add(1, SeqCst);
                    queue.push([number, me as u64]).unwrap();
                    // What is received has to find room.
                    if stop.load(SeqCst) != 0 || number > 200_000 {
                        return;
                    }
                }
            })
        };
        let consumer = || {
            let (queue, received) = (&queue, &received);
            fork(move || {
                while let Ok(value) = queue.pop() {
                    received.push(value).unwrap();
                }
            })
        };
        let mut producers: Vec<_> = (0..PRODUCERS).map(producer).collect();
        let mut consumers: Vec<_> = (0..CONSUMERS).map(|_| consumer()).collect();
        for _ in 0..kills / 2 {
            // sleep: to be killed at a random moment.
            std::thread::sleep(Duration::from_micros(random.below(3_000)));
            let victim = random.below((PRODUCERS + CONSUMERS) as u64) as usize;
            if victim < PRODUCERS {
                producers[victim].kill();
                // It may have sent all that it had to.
                producers[victim].ended_well();
                producers[victim] = producer(victim);
            } else {
                let victim = victim - PRODUCERS;
                consumers[victim].kill();
                assert!(!consumers[victim].ended_well());
                consumers[victim] = consumer();
            }
        }
        stop.store(1, SeqCst);
        assert!(producers.iter().all(support::Child::ended_well));
        queue.close();
        assert!(consumers.iter().all(support::Child::ended_well));
        assert!(queue.is_empty());
        let mut seen: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for [number, of] in received.drain() {
            assert!(seen.entry(of).or_default().insert(number), "twice");
        }
        let missing: u64 = (0..PRODUCERS as u64)
            .map(|of| {
                let begun = begun[of as usize].load(SeqCst);
                begun - seen.get(&of).map_or(0, |seen| seen.len() as u64)
            })
            .sum();
        // A killed producer's last number, or the element that a killed consumer had.
        assert!(missing <= kills / 2, "{missing} of {kills}");
        world.heap.verify().unwrap();
    }
}

/// One consumer sees the elements of each producer in order, whoever is killed.
fn order_is_kept_under_kills() {
    let mut random = Random::new();
    let world = World::new();
    let queue = world.unbounded::<[u64; 2]>();
    let words = world.words();
    let producer = |me: usize| {
        let (queue, begun) = (&queue, &words[me]);
        fork(move || {
            loop {
                let number = begun.fetch_add(1, SeqCst);
                queue.push([number, me as u64]).unwrap();
                // There is memory for more, but not for what two can push while the consumer is held up.
                while queue.len() > 100_000 {
                    std::thread::yield_now();
                }
            }
        })
    };
    let mut producers: Vec<_> = (0..2).map(producer).collect();
    let mut last = [None; 2];
    for round in 0..30 {
        let enough = Instant::now() + Duration::from_micros(random.below(3_000));
        while Instant::now() < enough {
            if let Ok([number, of]) = queue.try_pop() {
                assert!(last[of as usize] < Some(number));
                last[of as usize] = Some(number);
            }
        }
        let victim = round % 2;
        producers[victim].kill();
        assert!(!producers[victim].ended_well());
        producers[victim] = producer(victim);
        queue.drain().take(100_000).for_each(|[number, of]| {
            assert!(last[of as usize] < Some(number));
            last[of as usize] = Some(number);
        });
    }
    for producer in producers {
        producer.kill();
        assert!(!producer.ended_well());
    }
}

/// All pass through a small queue by threads of two processes.
fn threads_and_processes_pass_everything_once() {
    let world = World::new();
    let queue = world.bounded::<u64>(3);
    let sums = world.words();
    const EACH: u64 = 5_000;
    let consumers: Vec<_> = (0..2)
        .map(|_| {
            fork(|| {
                std::thread::scope(|scope| {
                    for _ in 0..2 {
                        scope.spawn(|| {
                            while let Ok(value) = queue.pop() {
                                sums[0].fetch_add(value, SeqCst);
                                sums[1].fetch_add(1, SeqCst);
                            }
                        });
                    }
                });
            })
        })
        .collect();
    let producers: Vec<_> = (0..2)
        .map(|_| {
            fork(|| {
                std::thread::scope(|scope| {
                    for _ in 0..2 {
                        scope.spawn(|| (1..=EACH).for_each(|k| queue.push(k).unwrap()));
                    }
                });
            })
        })
        .collect();
    assert!(producers.iter().all(support::Child::ended_well));
    queue.close();
    assert!(consumers.iter().all(support::Child::ended_well));
    assert_eq!(sums[1].load(SeqCst), 4 * EACH);
    assert_eq!(sums[0].load(SeqCst), 4 * EACH * (EACH + 1) / 2);
}

netmcore_forktest::forktests!(
    queue_is_first_in_first_out_and_full_at_its_capacity,
    queue_matches_vecdeque,
    values_are_dropped_once_and_memory_comes_back,
    panics_of_users_code_leave_the_queue_in_order,
    foreign_pointers_and_full_heaps_give_the_value_back,
    header_and_debug_say_what_it_is,
    descriptor_finds_the_queue,
    deadlines_end_waits,
    close_ends_all_waits,
    producers_that_leave_or_die_close_the_queue,
    place_of_a_dead_producer_is_given_again,
    consumer_may_come_after_the_producers_have_gone,
    consumers_that_leave_or_die_fail_pushes,
    batches_end_when_the_others_are_gone,
    wake_is_passed_on_by_one_that_gives_up,
    batch_is_pushed_at_once_whatever_was_seen,
    values_of_any_size_and_alignment_pass,
    absurd_sizes_are_refused,
    crash_at_any_point_leaves_the_others_well,
    partner_of_a_killed_one_goes_on,
    survivors_go_on_within_10_ms,
    random_kills_lose_nothing,
    order_is_kept_under_kills,
    threads_and_processes_pass_everything_once,
);

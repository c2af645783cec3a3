//! Guards against values that are dropped twice, and heaps that are damaged, when a process dies while it puts a collection in the place of another one, in
//! shared memory: that drops the old one before it writes the new one, and somebody else assigns again.
//!
//! # Safety
//!
//! The page of counters is mapped as long as the test runs, and holds atomics.

#![allow(unsafe_code)]

mod support;

use netmcore_sem::ShmMutex;
use netmcore_shm::{
    AnonRegion, Arena, Heap, Mailbox, ShmArc, ShmBox, ShmCell, ShmHashMap, ShmQueue, ShmSafe,
};
use netmcore_sys::crash;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use support::fork;

struct Counters {
    values: AtomicU64,
    /// Of each value.
    drops: [AtomicU64; 500],
    unusable: AtomicU64,
}

struct World {
    heap: Heap,
    page: AnonRegion,
    #[allow(dead_code, reason = "held")]
    arena: Arena,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let page = AnonRegion::create(c"counters", &arena, size_of::<Counters>()).unwrap();
        World { heap, page, arena }
    }

    fn counters(&self) -> &Counters {
        // SAFETY: a page of zeros, mapped as long as the world, used as these atomics only.
        unsafe { &*self.page.at().cast() }
    }

    fn counted(&self) -> Counted {
        let counters = self.counters();
        let number = counters.values.fetch_add(1, SeqCst) as usize;
        Counted {
            drops_at: (&raw const counters.drops[number]).expose_provenance(),
        }
    }

    fn boxed(&self) -> ShmBox<Counted> {
        ShmBox::new_in(&self.heap, self.counted()).unwrap()
    }
}

/// Counts its drops, in whichever process.
#[derive(ShmSafe)]
struct Counted {
    drops_at: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        // SAFETY: the page outlives the heap's values in these tests.
        let drops = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.drops_at) };
        drops.fetch_add(1, SeqCst);
    }
}

/// That the address may be null costs no room.
const _: () = {
    assert!(size_of::<Option<ShmCell<u8>>>() == size_of::<ShmCell<u8>>());
    assert!(size_of::<Option<ShmHashMap<u8, u8>>>() == size_of::<ShmHashMap<u8, u8>>());
    assert!(size_of::<Option<Mailbox<u8>>>() == size_of::<Mailbox<u8>>());
    assert!(size_of::<Option<ShmQueue<u8>>>() == size_of::<ShmQueue<u8>>());
};

/// Kills a process at each crash point of an assignment; then others use and assign what it left. `steps` are crash points it must have passed.
fn crash_in_assignment<T: ShmSafe>(
    make: impl Fn(&World) -> T,
    try_use: impl Fn(&T),
    steps: &[&str],
) {
    let mut died_at = BTreeSet::new();
    let mut was_unusable = false;
    // So that the children count together.
    crash::arm(None);
    crash::disarm();
    for k in 1.. {
        let world = World::new();
        let heap = &world.heap;
        let new = || {
            let new = make(&world);
            heap.allocator().check(&new).unwrap();
            new
        };
        let place = ShmArc::new_in(heap, ShmMutex::new(new())).unwrap();
        let child = fork(|| {
            let mut guard = place.lock().unwrap();
            let new = new();
            crash::arm(Some(k));
            *guard = new;
            crash::disarm();
        });
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        let user = fork(|| {
            let guard = place.lock().unwrap_or_else(|died| died.guard);
            heap.allocator().check(&*guard).unwrap();
            std::panic::set_hook(Box::new(|_| ()));
            let used = catch_unwind(AssertUnwindSafe(|| try_use(&guard)));
            if let Err(panic) = used {
                let message = panic.downcast_ref::<String>().unwrap();
                assert!(message.contains("a process died while it put another one"));
                world.counters().unusable.store(1, SeqCst);
            }
        });
        assert!(user.ended_well());
        was_unusable |= world.counters().unusable.load(SeqCst) != 0;
        for _ in 0..2 {
            let assigner = fork(|| {
                let mut guard = place.lock().unwrap_or_else(|died| died.guard);
                *guard = new();
                try_use(&guard);
            });
            assert!(assigner.ended_well());
        }
        drop(place);
        heap.verify().unwrap();
        let drops = &world.counters().drops;
        assert!(
            drops.iter().all(|drops| drops.load(SeqCst) <= 1),
            "dropped twice after a death at {:?}",
            crash::died_at()
        );
        if ended_well {
            break;
        }
    }
    assert!(was_unusable);
    for step in steps {
        assert!(
            died_at.contains(*step),
            "nobody died at {step}: {died_at:?}"
        );
    }
}

fn crash_in_assignment_of_cell_lets_others_assign() {
    crash_in_assignment(
        |world| {
            let cell = ShmCell::new_in(&world.heap, world.boxed()).unwrap();
            let guard = cell.load();
            // One that was replaced, and waits to be freed.
            cell.store(world.boxed()).unwrap();
            drop(guard);
            cell
        },
        |cell| {
            cell.load();
        },
        &[
            "shm.cell.emptied",
            "shm.boxed.emptied",
            "shm.heap.freed_remotely",
        ],
    );
}

fn crash_in_assignment_of_map_lets_others_assign() {
    crash_in_assignment(
        |world| {
            let map = ShmHashMap::with_shards_in(&world.heap, 2).unwrap();
            for key in 0..3_u64 {
                map.insert(key, world.boxed()).unwrap();
            }
            let guard = map.insert(0, world.boxed()).unwrap();
            drop(guard);
            map
        },
        |map| {
            map.get(&0);
        },
        &[
            "shm.hash_map.emptied",
            "shm.boxed.emptied",
            "shm.heap.freed_remotely",
        ],
    );
}

fn crash_in_assignment_of_mailbox_lets_others_assign() {
    crash_in_assignment(
        |world| {
            let mailbox = Mailbox::new_in(&world.heap, 4).unwrap();
            mailbox.senders(2).unwrap();
            for _ in 0..2 {
                mailbox.try_send(world.boxed()).unwrap();
            }
            mailbox
        },
        |mailbox| {
            mailbox.receiver().unwrap().try_recv().map(drop).unwrap();
        },
        &[
            "shm.mailbox.emptied",
            "shm.boxed.emptied",
            "shm.enrolment.roll_taken",
            "shm.heap.freed_remotely",
        ],
    );
}

fn crash_in_assignment_of_queue_lets_others_assign() {
    /// So large that few lie in a segment.
    #[derive(ShmSafe)]
    struct Large {
        #[allow(dead_code, reason = "dropped")]
        counted: ShmBox<Counted>,
        #[allow(dead_code, reason = "room")]
        rest: [u64; 511],
    }
    crash_in_assignment(
        |world| {
            let queue = ShmQueue::unbounded_in(&world.heap).unwrap();
            queue.producers(1).unwrap();
            for _ in 0..6 {
                let counted = world.boxed();
                let rest = [0; 511];
                assert!(queue.try_push(Large { counted, rest }).is_ok());
            }
            queue
        },
        // What was left when it died may be no more than the place for the next.
        |queue| {
            let _ = queue.try_pop();
        },
        &[
            "shm.queue.popped",
            "shm.queue.emptied",
            "shm.enrolment.roll_taken",
            "shm.heap.freed_remotely",
        ],
    );
}

netmcore_forktest::forktests!(
    crash_in_assignment_of_cell_lets_others_assign,
    crash_in_assignment_of_map_lets_others_assign,
    crash_in_assignment_of_mailbox_lets_others_assign,
    crash_in_assignment_of_queue_lets_others_assign,
);

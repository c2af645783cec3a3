//! Guards against collections that keep in private memory what another process would follow: when all is in shared memory, nothing of it may be
//! in the memory of the process that has put it there. (Pointers to anything else of one process are refused by the compiler: see `fail`.)
//!
//! # Safety
//!
//! The allocator is the system's.

#![allow(unsafe_code)]

use netmcore_sem::{
    ShmBarrier, ShmCondvar, ShmEvent, ShmMutex, ShmOnce, ShmOnceCell, ShmRwLock, ShmSemaphore,
};
use netmcore_shm::{
    Arena, Heap, Mailbox, ShmArc, ShmArray, ShmBox, ShmBuffer, ShmCell, ShmHashMap, ShmMatrix,
    ShmQueue, ShmSafe, ShmString, ShmVec,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// The system's allocator, and how much of it is in use.
struct Counting;

static LIVE_BLOCKS: AtomicI64 = AtomicI64::new(0);

// SAFETY: the system's allocator does it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BLOCKS.fetch_add(1, Relaxed);
        // SAFETY: the caller's duty.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE_BLOCKS.fetch_sub(1, Relaxed);
        // SAFETY: the caller's duty.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many blocks of private memory are in use after `act` that were not before.
fn private_blocks_left_by(act: impl FnOnce()) -> i64 {
    // What this thread keeps to allocate faster is its own.
    Heap::leave();
    let before = LIVE_BLOCKS.load(Relaxed);
    act();
    Heap::leave();
    LIVE_BLOCKS.load(Relaxed) - before
}

fn heap() -> Heap {
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    Heap::anonymous(&arena, 64 << 20).unwrap()
}

/// In shared memory for good.
fn keep<T: ShmSafe + Sync>(heap: &Heap, value: T) -> ShmArc<T> {
    let arc = ShmArc::new_in(heap, value).unwrap();
    ShmArc::keep(arc.clone());
    arc
}

#[derive(ShmSafe)]
struct Task {
    name: ShmString,
    steps: ShmVec<ShmBox<u64>>,
}

fn task(heap: &Heap, number: u64) -> Task {
    let boxed = |step| ShmBox::new_in(heap, step).unwrap();
    Task {
        name: ShmString::from_str_in(heap, &format!("task number {number}")).unwrap(),
        steps: ShmVec::from_iter_in(heap, (0..number % 50).map(boxed)).unwrap(),
    }
}

/// Fills one of each collection, with values that own others, and uses every path that allocates.
fn fill(heap: &Heap) {
    let queue = keep(heap, ShmQueue::unbounded_in(heap).unwrap());
    queue.producers(2).unwrap();
    std::mem::forget(queue.producer().unwrap());
    let bounded = keep(heap, ShmQueue::bounded_in(heap, 8).unwrap());
    let map = keep(heap, ShmHashMap::new_in(heap).unwrap());
    for number in 0..500 {
        queue.push(task(heap, number)).unwrap();
        let _ = bounded.try_push(task(heap, number));
        map.insert(number, ShmString::from_str_in(heap, "value").unwrap())
            .unwrap();
    }
    for number in 0..400 {
        drop(queue.pop().unwrap());
        map.remove(&number).unwrap();
    }
    let mailbox = keep(heap, Mailbox::new_in(heap, 4).unwrap());
    mailbox.senders(1).unwrap();
    std::mem::forget(mailbox.sender().unwrap());
    mailbox.send(task(heap, 3)).unwrap();
    mailbox.send(task(heap, 4)).unwrap();
    drop(mailbox.receiver().unwrap().recv().unwrap());

    let array = keep(
        heap,
        ShmArray::from_iter_in(heap, (0..100).map(|n| task(heap, n))).unwrap(),
    );
    array.grow_with(150, |n| task(heap, n as u64)).unwrap();
    let matrix = keep(heap, ShmMatrix::make_in(heap, (20, 30), 7_u64).unwrap());
    matrix.claim_rows(3..7).unwrap().row_mut(0)[5] = 9;
    std::mem::forget(matrix.read_rows(1..2).unwrap());
    let buffer = keep(heap, ShmBuffer::new_in(heap));
    for line in 0..5_000_u64 {
        buffer.add(format!("line {line}\n").as_bytes()).unwrap();
    }
    buffer.delete_to(10_000);

    let cell = keep(heap, ShmCell::new_in(heap, task(heap, 1)).unwrap());
    let pinned = cell.load();
    for number in 0..100 {
        cell.store(task(heap, number)).unwrap();
    }
    drop(pinned);

    let locked = keep(heap, ShmMutex::new(task(heap, 5)));
    locked
        .lock()
        .unwrap()
        .name
        .push_str(", longer than it was before")
        .unwrap();
    let read = keep(heap, <ShmRwLock<_>>::new(task(heap, 6)));
    std::mem::forget(read.read().unwrap());
    keep(heap, (ShmCondvar::new(), ShmEvent::new(), ShmOnce::new()));
    keep(heap, ShmOnceCell::<u64>::new()).get_or_init(|| 6);
    std::mem::forget(keep(heap, <ShmSemaphore>::new(3)).acquire(2));
    std::mem::forget(keep(heap, <ShmBarrier>::new(2)).join().unwrap());
    heap.named("a name", || AtomicU64::new(8)).unwrap();
}

fn no_collection_keeps_anything_in_private_memory() {
    let heaps = [heap(), heap()];
    // The first time, this process notes what it has to of the thread and of the region.
    fill(&heaps[0]);
    let left = private_blocks_left_by(|| fill(&heaps[1]));
    assert_eq!(left, 0);
    heaps[1].verify().unwrap();
    assert!(heaps[1].stats().in_use_blocks > 3_000);
}

/// The count sees what the other test looks for.
fn what_is_kept_in_private_memory_is_counted() {
    let heap = heap();
    let plant = || {
        let private = Box::new(7_u64);
        keep(&heap, Box::into_raw(private).addr());
    };
    plant();
    assert_eq!(private_blocks_left_by(plant), 1);
}

netmcore_forktest::forktests!(
    no_collection_keeps_anything_in_private_memory,
    what_is_kept_in_private_memory_is_counted,
);

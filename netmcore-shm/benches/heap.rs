//! What it costs to allocate from a heap in shared memory and to free, by one process and by two, beside the system's allocator.
//!
//! `cargo bench -p netmcore-shm --bench heap`. Each figure stands beside its floor, measured in the same run: the system's allocator, by one thread
//! and by two.
//!
//! # Safety
//!
//! Blocks are freed by whoever allocated them, or by the process that they were passed to. Children are forked from a process with one
//! thread, and leave by `exit_now`.

#![allow(unsafe_code)]

use criterion::Criterion;
use netmcore_shm::{AnonRegion, Arena, Heap, HeapRef};
use netmcore_sys::process::{self, Forked, PidFd};
use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// How many blocks are held at a time where they are many.
const BATCH: usize = 1_000;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let arena = Arena::reserve(64 << 30).expect("there are addresses");
    for len_bytes in [64, 4096] {
        patterns(&mut criterion, &arena, len_bytes);
    }
    passed_on(&mut criterion, &arena);
    criterion.final_summary();
}

/// An allocator as the patterns use it.
trait Subject: Copy + Send + Sync {
    fn allocate(self, layout: Layout) -> NonNull<u8>;
    fn free(self, at: NonNull<u8>, layout: Layout);
}

impl Subject for HeapRef {
    fn allocate(self, layout: Layout) -> NonNull<u8> {
        HeapRef::allocate(self, layout).expect("there is room")
    }

    fn free(self, at: NonNull<u8>, layout: Layout) {
        // SAFETY: allocated by the benchmark with this layout, not used any more.
        unsafe { self.deallocate(at, layout) }
    }
}

impl Subject for System {
    fn allocate(self, layout: Layout) -> NonNull<u8> {
        // SAFETY: the layouts are not empty.
        NonNull::new(unsafe { self.alloc(layout) }).expect("there is memory")
    }

    fn free(self, at: NonNull<u8>, layout: Layout) {
        // SAFETY: as above.
        unsafe { self.dealloc(at.as_ptr(), layout) }
    }
}

/// One block, allocated and freed.
fn pair(subject: impl Subject, layout: Layout) {
    let at = subject.allocate(layout);
    // SAFETY: the block is ours.
    unsafe { at.cast::<u64>().write(1) };
    subject.free(black_box(at), layout);
}

/// Many blocks, allocated and then freed in another order; counted as so many pairs.
fn batch(subject: impl Subject, layout: Layout, blocks: &mut Vec<NonNull<u8>>) {
    for _ in 0..BATCH {
        let at = subject.allocate(layout);
        // SAFETY: the block is ours.
        unsafe { at.cast::<u64>().write(1) };
        blocks.push(at);
    }
    // 7 and BATCH have no common divisor: each once.
    for step in 0..BATCH {
        subject.free(blocks[step * 7 % BATCH], layout);
    }
    blocks.clear();
}

fn patterns(criterion: &mut Criterion, arena: &Arena, len_bytes: usize) {
    let mut group = criterion.benchmark_group(format!("heap_{len_bytes}"));
    let heap = Heap::anonymous(arena, 1 << 30).expect("there is memory for a header");
    let heap = heap.allocator();
    let layout = Layout::from_size_align(len_bytes, 8).expect("a valid layout");
    let mut blocks = Vec::with_capacity(BATCH);
    group.bench_function("pair", |bencher| bencher.iter(|| pair(heap, layout)));
    group.bench_function("floor_pair_system", |bencher| {
        bencher.iter(|| pair(System, layout));
    });
    group.bench_function("pair_beside_a_process", |bencher| {
        let _other = Other::start(|| pair(heap, layout));
        bencher.iter(|| pair(heap, layout));
    });
    group.bench_function("floor_pair_system_beside_a_thread", |bencher| {
        beside_a_thread(
            || pair(System, layout),
            || bencher.iter(|| pair(System, layout)),
        );
    });
    group.throughput(criterion::Throughput::Elements(BATCH as u64));
    group.bench_function("batch", |bencher| {
        bencher.iter(|| batch(heap, layout, &mut blocks));
    });
    group.bench_function("floor_batch_system", |bencher| {
        bencher.iter(|| batch(System, layout, &mut blocks));
    });
    group.bench_function("batch_beside_a_process", |bencher| {
        let mut theirs = Vec::with_capacity(BATCH);
        let _other = Other::start(|| batch(heap, layout, &mut theirs));
        bencher.iter(|| batch(heap, layout, &mut blocks));
    });
    group.bench_function("floor_batch_system_beside_a_thread", |bencher| {
        beside_a_thread(
            || batch(System, layout, &mut Vec::with_capacity(BATCH)),
            || bencher.iter(|| batch(System, layout, &mut blocks)),
        );
    });
    group.finish();
}

/// Blocks that this process allocates and another frees, through a ring.
fn passed_on(criterion: &mut Criterion, arena: &Arena) {
    const PLACES: usize = 1024;
    let mut group = criterion.benchmark_group("heap_passed_on");
    let heap = Heap::anonymous(arena, 1 << 30).expect("there is memory for a header");
    let heap = heap.allocator();
    let ring = AnonRegion::create(c"ring", arena, 8 * PLACES).expect("there is memory");
    let place = |index: usize| {
        // SAFETY: in the region, which holds atomics only and outlives the children.
        unsafe { &*ring.at().cast::<AtomicU64>().add(index % PLACES) }
    };
    let layout = Layout::new::<[u64; 8]>();
    let mut taken = 0;
    let _other = Other::start(|| {
        let at = place(taken).load(Acquire);
        if at != 0 {
            place(taken).store(0, Release);
            taken += 1;
            let at = std::ptr::with_exposed_provenance_mut(at as usize);
            heap.free(NonNull::new(at).expect("not 0"), layout);
        }
    });
    let mut put = 0;
    group.bench_function("allocate_here_free_there_64", |bencher| {
        bencher.iter(|| {
            let at = Subject::allocate(heap, layout).as_ptr().expose_provenance() as u64;
            while place(put).compare_exchange(0, at, AcqRel, Relaxed).is_err() {
                std::hint::spin_loop();
            }
            put += 1;
        });
    });
    group.finish();
}

/// Another process that does something over and over, until this is dropped.
struct Other(PidFd);

impl Other {
    fn start(mut work: impl FnMut()) -> Other {
        // SAFETY: the benchmark has one thread, and the child does nothing but the work.
        match unsafe { process::fork() }.expect("processes are left") {
            Forked::Parent(pid) => Other(PidFd::open(pid).expect("descriptors are left")),
            Forked::Child => loop {
                work();
            },
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.send_signal(9).expect("it is ours");
        self.0.wait().expect("it is ours");
    }
}

fn beside_a_thread(mut work: impl FnMut() + Send, measure: impl FnOnce()) {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            while !stop.load(Relaxed) {
                work();
            }
        });
        measure();
        stop.store(true, Relaxed);
        thread.join().expect("the work does not panic");
    });
}

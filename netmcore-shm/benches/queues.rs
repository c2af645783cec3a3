//! What messages through queues and mailboxes cost, beside the physical limits and a queue for threads, in one run.
//!
//! `cargo bench -p netmcore-shm --bench queues`. Two processors are assumed: one for each side.
//!
//! # Safety
//!
//! Shared words and rings lie in regions of zeros that are mapped until the program ends. Children are forked while there is one thread, and leave
//! by `exit_now`. The raw ring's slots are written by one process and read by the other, as its two positions say.

#![allow(unsafe_code)]

use criterion::{Criterion, Throughput};
use crossbeam::queue::ArrayQueue;
use netmcore_shm::{AnonRegion, Arena, Heap, Mailbox, ShmArc, ShmQueue};
use netmcore_sys::futex;
use netmcore_sys::process::{self, Forked, PidFd};
use std::cell::UnsafeCell;
use std::hint::{black_box, spin_loop};
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

type Message = [u64; 8];

const PLACES: usize = 1024;

fn main() {
    let world = World::new();
    let mut criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    one_to_one(&mut criterion, &world);
    round_trip(&mut criterion, &world);
    large(&mut criterion, &world);
    criterion.final_summary();
}

struct World {
    arena: Arena,
    heap: Heap,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).expect("addresses");
        let heap = Heap::anonymous(&arena, 256 << 20).expect("memory");
        World { arena, heap }
    }

    /// Something that all zeros are a value of, in memory that children share.
    fn zeroed<T>(&self) -> &'static T {
        let len_bytes = size_of::<T>().next_multiple_of(4096);
        let region = AnonRegion::create(c"bench", &self.arena, len_bytes).expect("memory");
        let at = region.at().cast::<T>();
        std::mem::forget(region);
        // SAFETY: zeros, long enough, aligned to pages, never unmapped; made of atomics, or used as its positions say.
        unsafe { &*at }
    }

    fn queue(&self, places: usize) -> ShmArc<ShmQueue<Message>> {
        let queue = ShmQueue::bounded_in(&self.heap, places).expect("memory");
        ShmArc::new_in(&self.heap, queue).expect("memory")
    }
}

/// Runs one side in a child and the other here: the time from when both are ready until both are done.
fn by_processes(world: &World, theirs: impl FnOnce(), ours: impl FnOnce()) -> Duration {
    let ready = world.zeroed::<[AtomicU32; 2]>();
    // SAFETY: there is one thread; the child leaves by `exit_now`.
    let child = match unsafe { process::fork() }.expect("a child") {
        Forked::Child => {
            ready[0].store(1, SeqCst);
            while ready[1].load(SeqCst) == 0 {
                spin_loop();
            }
            theirs();
            ready[0].store(2, SeqCst);
            process::exit_now(0)
        }
        Forked::Parent(pid) => PidFd::open(pid).expect("the child"),
    };
    while ready[0].load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    ready[1].store(1, SeqCst);
    let began = Instant::now();
    ours();
    while ready[0].load(SeqCst) != 2 {
        spin_loop();
    }
    let took = began.elapsed();
    child.wait().expect("the child ends");
    took
}

fn by_threads(theirs: impl FnOnce() + Send, ours: impl FnOnce()) -> Duration {
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            ready.store(1, SeqCst);
            theirs();
        });
        while ready.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        let began = Instant::now();
        ours();
        other.join().expect("the other side ends");
        began.elapsed()
    })
}

/// Streams of messages of 64 bytes.
fn one_to_one(criterion: &mut Criterion, world: &World) {
    let mut group = criterion.benchmark_group("one_to_one_64_bytes");
    group.throughput(Throughput::Elements(1));
    let queue = world.queue(PLACES);
    let pushes = |rounds: u64| {
        for k in 0..rounds {
            queue.push([k; 8]).expect("it is open");
        }
    };
    let pops = |rounds: u64| {
        for k in 0..rounds {
            assert_eq!(queue.pop().expect("it is open")[7], k);
        }
    };
    group.bench_function("processes", |bencher| {
        bencher.iter_custom(|rounds| by_processes(world, || pops(rounds), || pushes(rounds)));
    });
    group.bench_function("threads", |bencher| {
        bencher.iter_custom(|rounds| by_threads(|| pops(rounds), || pushes(rounds)));
    });
    group.bench_function("processes_in_batches_of_32", |bencher| {
        bencher.iter_custom(|rounds| {
            let pops = || {
                let mut to = Vec::with_capacity(32);
                let mut left = rounds;
                while left > 0 {
                    match queue.pop_many(32, &mut to) {
                        Ok(count) => left -= count as u64,
                        Err(_) => spin_loop(),
                    }
                    to.clear();
                }
            };
            let pushes = || {
                let batch = black_box([[7; 8]; 32]);
                let mut left = rounds as usize;
                while left > 0 {
                    match queue
                        .push_slice(&batch[..left.min(32)])
                        .expect("it is open")
                    {
                        0 => spin_loop(),
                        count => left -= count,
                    }
                }
            };
            by_processes(world, pops, pushes)
        });
    });
    let chain = ShmQueue::<Message>::unbounded_in(&world.heap).expect("memory");
    let chain = ShmArc::new_in(&world.heap, chain).expect("memory");
    group.bench_function("processes_unbounded", |bencher| {
        bencher.iter_custom(|rounds| {
            let pops = || {
                for k in 0..rounds {
                    assert_eq!(chain.pop().expect("it is open")[7], k);
                }
            };
            let pushes = || {
                for k in 0..rounds {
                    // So that it stays in the cache, as the others do.
                    while k % 64 == 0 && chain.len() > PLACES {
                        spin_loop();
                    }
                    chain.push([k; 8]).expect("it is open");
                }
            };
            by_processes(world, pops, pushes)
        });
    });
    let ring = world.zeroed::<RawRing>();
    group.bench_function("floor_raw_ring_by_processes", |bencher| {
        bencher.iter_custom(|rounds| {
            ring.reset();
            by_processes(world, || ring.pop_all(rounds), || ring.push_all(rounds))
        });
    });
    let array = ArrayQueue::<Message>::new(PLACES);
    group.bench_function("crossbeam_array_queue_by_threads", |bencher| {
        bencher.iter_custom(|rounds| {
            let pops = || {
                for k in 0..rounds {
                    loop {
                        if let Some(message) = array.pop() {
                            assert_eq!(message[7], k);
                            break;
                        }
                        spin_loop();
                    }
                }
            };
            let pushes = || {
                for k in 0..rounds {
                    while array.push([k; 8]).is_err() {
                        spin_loop();
                    }
                }
            };
            by_threads(pops, pushes)
        });
    });
    group.bench_function("push_and_pop_by_one_thread", |bencher| {
        bencher.iter(|| {
            queue.push([7; 8]).expect("it is open");
            queue.pop()
        });
    });
    group.bench_function("crossbeam_push_and_pop_by_one_thread", |bencher| {
        bencher.iter(|| {
            array.push([7; 8]).expect("it is empty");
            array.pop()
        });
    });
    group.finish();
}

/// There and back again, 64 bytes.
fn round_trip(criterion: &mut Criterion, world: &World) {
    let mut group = criterion.benchmark_group("round_trip_64_bytes");
    let (there, back) = (world.queue(1), world.queue(1));
    group.bench_function("queues", |bencher| {
        bencher.iter_custom(|rounds| {
            let theirs = || {
                for _ in 0..rounds {
                    let message = there.pop().expect("it is open");
                    back.push(message).expect("it is open");
                }
            };
            let ours = || {
                for k in 0..rounds {
                    there.push([k; 8]).expect("it is open");
                    assert_eq!(back.pop().expect("it is open")[7], k);
                }
            };
            by_processes(world, theirs, ours)
        });
    });
    let turns = world.zeroed::<AtomicU32>();
    group.bench_function("floor_futex", |bencher| {
        bencher.iter_custom(|rounds| {
            turns.store(0, SeqCst);
            // One has the even turns, the other the odd ones.
            let play = |parity: u32| {
                for _ in 0..rounds {
                    loop {
                        let turn = turns.load(SeqCst);
                        if turn % 2 == parity {
                            turns.store(turn.wrapping_add(1), SeqCst);
                            futex::wake(turns, 1);
                            break;
                        }
                        futex::wait(turns, turn, None);
                    }
                }
            };
            by_processes(world, || play(1), || play(0))
        });
    });
    group.bench_function("floor_spinning", |bencher| {
        bencher.iter_custom(|rounds| {
            turns.store(0, SeqCst);
            let play = |parity: u32| {
                for _ in 0..rounds {
                    loop {
                        let turn = turns.load(Acquire);
                        if turn % 2 == parity {
                            turns.store(turn.wrapping_add(1), Release);
                            break;
                        }
                        spin_loop();
                    }
                }
            };
            by_processes(world, || play(1), || play(0))
        });
    });
    group.finish();
}

/// Messages of 64 KiB, each copied into a slot and read there.
fn large(criterion: &mut Criterion, world: &World) {
    const LEN: usize = 64 << 10;
    let mut group = criterion.benchmark_group("large_64_kib");
    group.throughput(Throughput::Bytes(LEN as u64));
    let mailbox = Mailbox::<[u64; LEN / 8]>::new_in(&world.heap, 8).expect("memory");
    let mailbox = ShmArc::new_in(&world.heap, mailbox).expect("memory");
    let source = black_box(vec![7_u64; LEN / 8]);
    let send_all = |rounds: u64| {
        for _ in 0..rounds {
            let sent = mailbox.send_with(|slot| {
                // SAFETY: the source is so long, and elsewhere; all of the slot is written.
                unsafe {
                    let to = slot.as_mut_ptr().cast::<u64>();
                    to.copy_from_nonoverlapping(source.as_ptr(), LEN / 8);
                    slot.assume_init_mut()
                }
            });
            sent.expect("somebody receives");
        }
    };
    // Looks at a word of each line of the cache.
    let look = |message: &[u64]| message.iter().step_by(8).sum::<u64>();
    group.bench_function("mailbox_by_processes", |bencher| {
        bencher.iter_custom(|rounds| {
            let receiver = mailbox.receiver().expect("there is none");
            let took = by_processes(
                world,
                || send_all(rounds),
                || {
                    for _ in 0..rounds {
                        let message = receiver.recv().expect("it is open");
                        assert_eq!(look(&message[..]), 7 * LEN as u64 / 64);
                    }
                },
            );
            receiver.hand_over();
            took
        });
    });
    group.bench_function("floor_copy", |bencher| {
        let mut to = black_box(vec![0_u64; LEN / 8]);
        bencher.iter(|| {
            to.copy_from_slice(black_box(&source));
            black_box(&mut to);
        });
    });
    group.bench_function("floor_copy_and_look", |bencher| {
        let mut to = black_box(vec![0_u64; LEN / 8]);
        bencher.iter(|| {
            to.copy_from_slice(black_box(&source));
            look(black_box(&to))
        });
    });
    group.finish();
}

/// What a ring of messages costs at least: one writer, one reader, no waiting but spinning, and no care for deaths.
#[repr(C, align(128))]
struct RawRing {
    tail: Line,
    head: Line,
    slots: [UnsafeCell<Message>; PLACES],
}

#[repr(C, align(128))]
struct Line(AtomicU64);

impl RawRing {
    fn reset(&self) {
        self.tail.0.store(0, SeqCst);
        self.head.0.store(0, SeqCst);
    }

    fn push_all(&self, count: u64) {
        let mut head = 0;
        for tail in 0..count {
            while tail == head + PLACES as u64 {
                head = self.head.0.load(Acquire);
                spin_loop();
            }
            let slot = self.slots[tail as usize % PLACES].get();
            // SAFETY: in bounds; the reader is through with it, as its position says.
            unsafe { slot.write([tail; 8]) };
            self.tail.0.store(tail + 1, Release);
        }
    }

    fn pop_all(&self, count: u64) {
        let mut tail = 0;
        for head in 0..count {
            while tail == head {
                tail = self.tail.0.load(Acquire);
                spin_loop();
            }
            let slot = self.slots[head as usize % PLACES].get();
            // SAFETY: in bounds; the writer has written it and leaves it alone, as its position says.
            let message = unsafe { slot.read() };
            assert_eq!(message[7], head);
            self.head.0.store(head + 1, Release);
        }
    }
}

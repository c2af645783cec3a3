//! What it costs to take a run of pages and to free it, beside what the system asks for the same.
//!
//! `cargo bench -p netmcore-shm --bench pool`. Each figure stands beside its floor, measured in the same run: a mapping made and
//! unmade, memory allocated behind a memory file and punched out again.
//!
//! # Safety
//!
//! Runs are freed by whoever took them. Children are forked from a process with one thread, and leave by `exit_now`.

#![allow(unsafe_code)]

use criterion::{BatchSize, Criterion};
use netmcore_shm::{Access, Arena, Mapping, NoRecord, ObjectName, PagePool, PoolRef};
use netmcore_shm::{Region, ShmObject};
use netmcore_sys::process::{self, Forked, PidFd};
use netmcore_sys::shm;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::ptr::NonNull;

const PAGE: usize = PagePool::PAGE_BYTES;
const MAX: usize = 1 << 30;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let arena = Arena::reserve(64 << 30).expect("there are addresses");
    reuse(&mut criterion, &arena);
    growth(&mut criterion, &arena);
    in_a_large_pool(&mut criterion, &arena);
    criterion.final_summary();
}

fn pool(arena: &Arena) -> PagePool {
    PagePool::anonymous(arena, MAX, 0).expect("there is memory for a header")
}

fn take(pool: PoolRef, page_count: usize) -> NonNull<u8> {
    pool.alloc_run(page_count).expect("there is room")
}

fn free(pool: PoolRef, run: NonNull<u8>) {
    // SAFETY: taken by the benchmark, which does not use it any more.
    unsafe { pool.free_run(run) }.expect("it is in use");
}

/// Taking what was freed just now.
fn reuse(criterion: &mut Criterion, arena: &Arena) {
    let mut group = criterion.benchmark_group("pool_reuse");
    let pool = pool(arena).pool();
    for page_count in [1, 16] {
        group.bench_function(format!("take_free_{page_count}"), |bencher| {
            bencher.iter(|| free(pool, black_box(take(pool, page_count))));
        });
    }
    {
        let _other = Other::start(|| free(pool, take(pool, 1)));
        group.bench_function("take_free_1_two_processes", |bencher| {
            bencher.iter(|| free(pool, black_box(take(pool, 1))));
        });
    }
    let file = memory_file();
    group.bench_function("floor_map_unmap_1", |bencher| {
        bencher.iter(|| black_box(Mapping::map(file.as_fd(), PAGE, Access::ReadWrite)).is_ok());
    });
    group.finish();
}

/// Taking what has no memory yet, and giving it back.
fn growth(criterion: &mut Criterion, arena: &Arena) {
    let mut group = criterion.benchmark_group("pool_growth");
    group.sample_size(20);
    let name = ObjectName::unique(b"/pool_bench_").expect("a valid name");
    let region = Region::create(arena, &name, 4096, MAX, &NoRecord).expect("a new name");
    let named = PagePool::create(&region, 0).expect("there is memory for a header");
    for (label, pool) in [("anonymous", pool(arena)), ("named", named)] {
        let pool = pool.pool();
        for page_count in [1, 16, 256] {
            group.bench_function(format!("{label}_take_{page_count}"), |bencher| {
                bencher.iter_batched(
                    || pool.trim(),
                    |_| Taken(pool, take(pool, page_count)),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    let named = PagePool::attach(&region).expect("it is there");
    for (label, pool) in [("anonymous", pool(arena)), ("named", named)] {
        let pool = pool.pool();
        // Far from the end of what was ever used.
        free(pool, take(pool, 1_000));
        group.bench_function(format!("{label}_take_1_64_times"), |bencher| {
            bencher.iter_batched(
                || pool.trim(),
                |_| {
                    (0..64)
                        .map(|_| Taken(pool, take(pool, 1)))
                        .collect::<Vec<_>>()
                },
                BatchSize::PerIteration,
            );
        });
    }
    let file = memory_file();
    for page_count in [1, 16, 256] {
        let len = (page_count * PAGE) as u64;
        group.bench_function(format!("floor_fallocate_{page_count}"), |bencher| {
            bencher.iter_batched(
                || punch(&file, len),
                |()| shm::allocate(file.as_fd(), 0, len).expect("there is memory"),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
    ShmObject::unlink(&name, &NoRecord).expect("it is ours");
}

/// Frees the run after the measurement.
struct Taken(PoolRef, NonNull<u8>);

impl Drop for Taken {
    fn drop(&mut self) {
        free(self.0, self.1);
    }
}

/// A pool with many runs, of which some in the middle come and go.
fn in_a_large_pool(criterion: &mut Criterion, arena: &Arena) {
    let mut group = criterion.benchmark_group("pool_of_16384_runs");
    let pool = PagePool::anonymous(arena, 4 << 30, 0)
        .expect("a header")
        .pool();
    let mut runs: Vec<NonNull<u8>> = (0..16_384).map(|_| take(pool, 1)).collect();
    group.bench_function("take_free_1_at_random", |bencher| {
        let mut place = 7;
        bencher.iter(|| {
            place = (place * 5 + 3) % runs.len();
            free(pool, runs[place]);
            runs[place] = take(pool, 1);
        });
    });
    group.bench_function("take_free_2", |bencher| {
        let mut place = 7;
        bencher.iter(|| {
            place = (place * 5 + 3) % runs.len();
            free(pool, runs[place]);
            free(pool, take(pool, 2));
            runs[place] = take(pool, 1);
        });
    });
    group.finish();
    for run in runs {
        free(pool, run);
    }
}

fn memory_file() -> std::os::fd::OwnedFd {
    let file = shm::anonymous(c"floor").expect("a descriptor");
    shm::allocate(file.as_fd(), 0, (256 * PAGE) as u64).expect("there is memory");
    file
}

fn punch(file: &std::os::fd::OwnedFd, len: u64) {
    shm::punch_hole(file.as_fd(), 0, len).expect("memory files have holes");
}

/// Another process that does something over and over, until this is dropped.
struct Other(PidFd);

impl Other {
    fn start(work: impl Fn()) -> Other {
        // SAFETY: the benchmark has one thread, and the child never returns.
        match unsafe { process::fork() }.expect("a process") {
            Forked::Parent(pid) => Other(PidFd::open(pid).expect("a descriptor")),
            Forked::Child => loop {
                work();
            },
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.send_signal(9).expect("our child");
        self.0.wait().expect("our child");
    }
}

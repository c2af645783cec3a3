//! What read locks, write locks and permits cost that nobody else wants, beside the standard library's lock and the bare operations under them.
//!
//! `cargo bench -p netmcore-sem --bench permits`. Figures vary on small machines: compare those of one run.

use std::hint::black_box;
use std::sync::RwLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use criterion::Criterion;
use netmcore_sem::{ShmEvent, ShmOnce, ShmRwLock, ShmSemaphore};

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    let mut group = criterion.benchmark_group("permits_alone");
    let (word, std_lock) = (AtomicU64::new(0), RwLock::new(0u64));
    let (lock, small_lock) = (<ShmRwLock<_>>::new(0u64), ShmRwLock::<_, 4>::new(0u64));
    let (permits, once, event) = (<ShmSemaphore>::new(2), ShmOnce::new(), ShmEvent::new());
    once.call_once(|| ());
    event.set();
    group.bench_function("floor_two_compare_and_swaps", |bencher| {
        bencher.iter(|| {
            let word = black_box(&word);
            let locked = word.compare_exchange(0, 1, Acquire, Relaxed).is_ok();
            locked && word.compare_exchange(1, 0, Release, Relaxed).is_ok()
        });
    });
    group.bench_function("std_read_pair", |bencher| {
        bencher.iter(|| *black_box(&std_lock).read().expect("no panic"));
    });
    group.bench_function("shm_read_pair", |bencher| {
        bencher.iter(|| *black_box(&lock).read().expect("no death"));
    });
    group.bench_function("std_write_pair", |bencher| {
        bencher.iter(|| *black_box(&std_lock).write().expect("no panic") += 1);
    });
    group.bench_function("shm_write_pair", |bencher| {
        bencher.iter(|| *black_box(&lock).write().expect("no death") += 1);
    });
    group.bench_function("shm_write_pair_4_readers", |bencher| {
        bencher.iter(|| *black_box(&small_lock).write().expect("no death") += 1);
    });
    group.bench_function("shm_semaphore_held_pair", |bencher| {
        bencher.iter(|| drop(black_box(&permits).acquire(1)));
    });
    group.bench_function("shm_semaphore_wait_and_post", |bencher| {
        bencher.iter(|| {
            black_box(&permits).wait();
            black_box(&permits).post(1);
        });
    });
    group.bench_function("shm_once_done", |bencher| {
        bencher.iter(|| black_box(&once).call_once(|| ()));
    });
    group.bench_function("shm_event_set", |bencher| {
        bencher.iter(|| black_box(&event).wait());
    });
    group.finish();
    criterion.final_summary();
}

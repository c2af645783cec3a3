//! What locking, unlocking and notifying cost, beside the standard library's locks and the bare operations under them.
//!
//! `cargo bench -p netmcore-sem --bench locks`. Figures vary on small machines: compare those of one run.
//!
//! # Safety
//! Forked children share zeroed memory that is mapped for ever, and leave by `exit_now`.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use criterion::Criterion;
use netmcore_sem::{ErrorChecking, Recursive, ShmCondvar, ShmMutex};
use netmcore_sys::futex;
use netmcore_sys::map::Mapping;
use netmcore_sys::process::{self, Forked, PidFd};
use netmcore_sys::shm::{self, Access};

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    alone(&mut criterion);
    contended(&mut criterion);
    ping_pong(&mut criterion);
    criterion.final_summary();
}

/// All in one page, zeros at first.
#[repr(C)]
struct Shared {
    stop: AtomicU32,
    mutex: Apart<ShmMutex<u64>>,
    turn: Apart<ShmMutex<u32>>,
    changed: ShmCondvar,
    word: Apart<AtomicU32>,
}

/// Not in one cache line with others.
#[repr(C, align(128))]
struct Apart<T>(T);

fn shared() -> &'static Shared {
    let file = shm::anonymous(c"sem-bench").expect("a memfd");
    shm::allocate(file.as_fd(), 0, 4096).expect("a page");
    let mapping = Mapping::map(file.as_fd(), 4096, Access::ReadWrite).expect("a mapping");
    let at = mapping.as_ptr();
    std::mem::forget(mapping);
    // SAFETY: a page of zeros, aligned, mapped for ever; zeros are free locks and numbers.
    unsafe { &*at.cast::<Shared>() }
}

/// One thread, nobody else.
fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pair_alone");
    let (word, mutex, std_mutex) = (AtomicU64::new(0), ShmMutex::new(0u64), Mutex::new(0u64));
    let checking = ShmMutex::<u64, ErrorChecking>::with_kind(0);
    let recursive = ShmMutex::<u64, Recursive>::with_kind(0);
    group.bench_function("floor_two_compare_and_swaps", |bencher| {
        bencher.iter(|| {
            let word = black_box(&word);
            let locked = word.compare_exchange(0, 1, Acquire, Relaxed).is_ok();
            locked && word.compare_exchange(1, 0, Release, Relaxed).is_ok()
        });
    });
    group.bench_function("std_mutex", |bencher| {
        bencher.iter(|| *black_box(&std_mutex).lock().expect("no panic") += 1);
    });
    group.bench_function("shm_mutex", |bencher| {
        bencher.iter(|| *black_box(&mutex).lock().expect("no death") += 1);
    });
    group.bench_function("shm_mutex_error_checking", |bencher| {
        bencher.iter(|| *black_box(&checking).lock().expect("no death") += 1);
    });
    group.bench_function("shm_mutex_recursive", |bencher| {
        bencher.iter(|| *black_box(&recursive).lock().expect("no death"));
    });
    let (condvar, std_condvar) = (ShmCondvar::new(), Condvar::new());
    group.bench_function("notify_one_without_waiters", |bencher| {
        bencher.iter(|| black_box(&condvar).notify_one());
    });
    group.bench_function("std_notify_one_without_waiters", |bencher| {
        bencher.iter(|| black_box(&std_condvar).notify_one());
    });
    group.finish();
}

/// One more does the same all the time.
fn contended(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pair_contended_by_2");
    let std_mutex = Arc::new(Mutex::new(0u64));
    let pair = {
        let mutex = std_mutex.clone();
        move || *mutex.lock().expect("no panic") += 1
    };
    group.bench_function("std_mutex_threads", |bencher| {
        beside_a_thread(pair.clone(), || bencher.iter(&pair));
    });
    let shared = shared();
    let pair = || *shared.mutex.0.lock().expect("no death") += 1;
    group.bench_function("shm_mutex_threads", |bencher| {
        beside_a_thread(pair, || bencher.iter(pair));
    });
    group.bench_function("shm_mutex_processes", |bencher| {
        let other = || {
            while shared.stop.load(Relaxed) == 0 {
                pair();
            }
        };
        beside_a_process(shared, other, || bencher.iter(pair));
    });
    group.finish();
}

/// Two that wait for each other in turn: one round trip.
fn ping_pong(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ping_pong");
    let shared = shared();
    let futex_turn = |mine: u32| {
        let word = &shared.word.0;
        loop {
            let turn = word.load(Acquire);
            if turn % 2 == mine || shared.stop.load(Relaxed) != 0 {
                break;
            }
            futex::wait(word, turn, None);
        }
        word.fetch_add(1, SeqCst);
        futex::wake(word, 1);
    };
    let condvar_turn = |mine: u32| {
        let is_other = |turn: &mut u32| *turn % 2 != mine && shared.stop.load(Relaxed) == 0;
        let turn = shared.turn.0.lock().expect("no death");
        let mut turn = shared.changed.wait_while(turn, is_other).expect("no death");
        *turn += 1;
        drop(turn);
        shared.changed.notify_one();
    };
    group.bench_function("floor_futex_processes", |bencher| {
        rounds(shared, futex_turn, bencher)
    });
    group.bench_function("shm_condvar_processes", |bencher| {
        rounds(shared, condvar_turn, bencher)
    });
    let std_shared = Arc::new((Mutex::new(0u32), Condvar::new()));
    let std_turn = {
        let shared = std_shared.clone();
        move |mine: u32| {
            let turn = shared.0.lock().expect("no panic");
            let is_other = |turn: &mut u32| *turn % 2 != mine && *turn < u32::MAX - 1;
            let mut turn = shared.1.wait_while(turn, is_other).expect("no panic");
            *turn = turn.wrapping_add(1);
            drop(turn);
            shared.1.notify_one();
        }
    };
    group.bench_function("std_condvar_threads", |bencher| {
        bencher.iter_custom(|rounds| {
            *std_shared.0.lock().expect("no panic") = 0;
            std::thread::scope(|scope| {
                scope.spawn(|| (0..rounds).for_each(|_| std_turn(1)));
                let begin = Instant::now();
                (0..rounds).for_each(|_| std_turn(0));
                begin.elapsed()
            })
        });
    });
    group.finish();
}

fn rounds(shared: &'static Shared, turn: impl Fn(u32), bencher: &mut criterion::Bencher<'_>) {
    let other = || {
        while shared.stop.load(Relaxed) == 0 {
            turn(1);
        }
    };
    shared.word.0.store(0, SeqCst);
    *shared.turn.0.lock().expect("no death") = 0;
    beside_a_process(shared, other, || {
        bencher.iter(|| turn(0));
        shared.stop.store(1, SeqCst);
        // Whatever it waits for: it shall see the stop.
        shared.word.0.fetch_add(2, SeqCst);
        futex::wake_all(&shared.word.0);
        drop(shared.turn.0.lock());
        shared.changed.notify_all();
    });
}

fn beside_a_thread(other: impl Fn() + Sync, measure: impl FnOnce()) {
    let stop = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while stop.load(Relaxed) == 0 {
                other();
            }
        });
        measure();
        stop.store(1, SeqCst);
    });
}

fn beside_a_process(shared: &Shared, other: impl FnOnce(), measure: impl FnOnce()) {
    shared.stop.store(0, SeqCst);
    // SAFETY: no other thread exists, and the child leaves by `exit_now`.
    let pid = match unsafe { process::fork() }.expect("a child") {
        Forked::Child => {
            other();
            process::exit_now(0)
        }
        Forked::Parent(pid) => pid,
    };
    let child = PidFd::open(pid).expect("the child is not reaped");
    measure();
    shared.stop.store(1, SeqCst);
    while child.wait_nonblocking().expect("a child").is_none() {
        std::thread::yield_now();
    }
}

//! What shared maps and cells cost, beside maps of one process and the floor, in one run.
//!
//! `cargo bench -p netmcore-shm --bench maps`: a million entries; with `--quick`, 200,000.
//!
//! # Safety
//!
//! Children are forked while there is one thread, and leave by `exit_now`.

#![allow(unsafe_code)]

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use netmcore_shm::hash_map::ShmRandomState;
use netmcore_shm::{Arena, Heap, ShmArc, ShmCell, ShmHashMap};
use netmcore_sys::process::{self, Forked, PidFd};
use std::hint::black_box;
use std::sync::RwLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

/// With the same hasher, so that what is compared is the maps.
type Private = hashbrown::HashMap<u64, u64, ShmRandomState>;
type Shared = ShmHashMap<u64, u64>;

fn main() {
    let count = if std::env::args().any(|argument| argument == "--quick") {
        200_000
    } else {
        1_000_000
    };
    let keys = random_keys(count);
    let arena = Arena::reserve(Arena::DEFAULT_LEN_BYTES).expect("addresses");
    let heap = Heap::anonymous(&arena, 2 << 30).expect("memory");
    let mut criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(10);
    insert_growing(&mut criterion, &heap, &keys);
    get(&mut criterion, &heap, &keys);
    change(&mut criterion, &heap, &keys);
    cell(&mut criterion, &heap);
    // Last: with threads nothing is forked any more.
    get_by_threads(&mut criterion, &keys);
    criterion.final_summary();
}

/// Numbers that look random, each once.
fn random_keys(count: usize) -> Vec<u64> {
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number
    };
    (0..count).map(next).collect()
}

fn insert_growing(criterion: &mut Criterion, heap: &Heap, keys: &[u64]) {
    let mut group = criterion.benchmark_group("insert growing");
    group.throughput(Throughput::Elements(keys.len() as u64));
    let mut of = |name: &str, fill: &dyn Fn() -> Duration| {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| (0..rounds).map(|_| fill()).sum());
        });
    };
    of("ShmHashMap", &|| {
        let map = Shared::new_in(heap).expect("memory");
        let start = Instant::now();
        for &key in keys {
            map.insert(key, key).expect("memory");
        }
        start.elapsed()
    });
    of("hashbrown in private memory", &|| {
        let mut map = Private::default();
        let start = Instant::now();
        for &key in keys {
            map.insert(key, key);
        }
        start.elapsed()
    });
    of("RwLock of hashbrown", &|| {
        let map = RwLock::new(Private::default());
        let start = Instant::now();
        for &key in keys {
            map.write().expect("no panic").insert(key, key);
        }
        start.elapsed()
    });
}

fn get(criterion: &mut Criterion, heap: &Heap, keys: &[u64]) {
    let shared = Shared::from_iter_in(heap, keys.iter().map(|&key| (key, key))).expect("memory");
    let private: Private = keys.iter().map(|&key| (key, key)).collect();
    let locked = RwLock::new(private.clone());
    let get_shared = |key: u64| shared.get(&key).map(|value| *value);
    let get_locked = |key: u64| locked.read().expect("no panic").get(&key).copied();

    let mut group = criterion.benchmark_group("get");
    one_by_one(&mut group, "ShmHashMap", keys, get_shared);
    one_by_one(&mut group, "hashbrown in private memory", keys, |key| {
        private.get(&key).copied()
    });
    one_by_one(&mut group, "RwLock of hashbrown", keys, get_locked);
    one_by_one(
        &mut group,
        "ShmHashMap, a key that is not there",
        keys,
        |key| get_shared(!key),
    );
    group.finish();

    let mut group = criterion.benchmark_group("get by 2");
    let all = |get: &dyn Fn(u64) -> Option<u64>| {
        for &key in keys {
            black_box(get(key));
        }
    };
    beside_a_child(
        || all(&get_shared),
        || {
            one_by_one(&mut group, "ShmHashMap, 2 processes", keys, get_shared);
        },
    );
    group.finish();

    let mut group = criterion.benchmark_group("get beside one that inserts");
    let insert = || {
        for &key in keys {
            shared.insert(key, key).expect("memory");
        }
    };
    beside_a_child(insert, || {
        one_by_one(&mut group, "ShmHashMap, 2 processes", keys, get_shared);
    });
}

fn get_by_threads(criterion: &mut Criterion, keys: &[u64]) {
    let locked = RwLock::new(keys.iter().map(|&key| (key, key)).collect::<Private>());
    let get = |key: u64| locked.read().expect("no panic").get(&key).copied();
    let all = || {
        for &key in keys {
            black_box(get(key));
        }
    };
    let mut group = criterion.benchmark_group("get by 2 threads");
    beside_a_thread(all, || {
        one_by_one(&mut group, "RwLock of hashbrown", keys, get)
    });
}

fn one_by_one(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    keys: &[u64],
    get: impl Fn(u64) -> Option<u64>,
) {
    // Not in the order in which they were inserted.
    let step = 7_919;
    let mut index = 0;
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            index += step;
            if index >= keys.len() {
                index -= keys.len();
            }
            get(black_box(keys[index]))
        });
    });
}

fn change(criterion: &mut Criterion, heap: &Heap, keys: &[u64]) {
    let keys = &keys[..10_000];
    let shared = Shared::from_iter_in(heap, keys.iter().map(|&key| (key, key))).expect("memory");
    let counters = ShmHashMap::<u64, AtomicU64>::new_in(heap).expect("memory");
    for &key in keys {
        counters.add(key, 0).expect("memory");
    }
    let mut private: Private = keys.iter().map(|&key| (key, key)).collect();
    let mut group = criterion.benchmark_group("change one of 10,000");
    one_by_one(&mut group, "ShmHashMap insert", keys, |key| {
        shared.insert(key, 1).expect("memory").map(|old| *old)
    });
    one_by_one(&mut group, "ShmHashMap modify", keys, |key| {
        let changed = shared.modify(&key, |value| *value += 1);
        changed.expect("memory").then_some(1)
    });
    one_by_one(&mut group, "ShmHashMap add", keys, |key| {
        counters.add(key, 1).ok()
    });
    let private = std::cell::RefCell::new(&mut private);
    one_by_one(&mut group, "hashbrown in private memory", keys, |key| {
        private.borrow_mut().insert(key, 1)
    });
    one_by_one(&mut group, "ShmHashMap insert and remove", keys, |key| {
        shared.insert(!key, 1).expect("memory");
        shared.remove(&!key).expect("not held").map(|old| *old)
    });
}

fn cell(criterion: &mut Criterion, heap: &Heap) {
    let cell = ShmCell::new_in(heap, [1_u64; 4]).expect("memory");
    let arc = ShmArc::new_in(heap, [1_u64; 4]).expect("memory");
    let word = ShmArc::new_in(heap, AtomicU64::new(1)).expect("memory");
    let mut group = criterion.benchmark_group("cell");
    group.bench_function("ShmCell load", |bencher| bencher.iter(|| cell.load()[1]));
    group.bench_function("ShmArc clone and drop", |bencher| {
        bencher.iter(|| arc.clone()[1]);
    });
    group.bench_function("load of an atomic", |bencher| {
        bencher.iter(|| black_box(&word).load(Acquire));
    });
    group.bench_function("swap of an atomic", |bencher| {
        bencher.iter(|| black_box(&word).swap(2, SeqCst));
    });
    group.bench_function("ShmCell store", |bencher| {
        bencher.iter(|| cell.store([2; 4]).expect("memory"));
    });
    group.bench_function("ShmCell update", |bencher| {
        bencher.iter(|| cell.update(|old| *old).expect("memory")[1]);
    });
    let load = || {
        black_box(cell.load()[1]);
    };
    beside_a_child(load, || {
        group.bench_function("ShmCell load, 2 processes", |bencher| {
            bencher.iter(|| cell.load()[1]);
        });
    });
    let store = || cell.store([3; 4]).expect("memory");
    beside_a_child(store, || {
        group.bench_function("ShmCell load beside one that stores", |bencher| {
            bencher.iter(|| cell.load()[1]);
        });
    });
}

/// Measures while a forked child does something all the time.
fn beside_a_child(theirs: impl Fn(), ours: impl FnOnce()) {
    // SAFETY: there is one thread; the child does not return.
    match unsafe { process::fork() }.expect("a process") {
        Forked::Child => loop {
            theirs();
        },
        Forked::Parent(pid) => {
            let child = PidFd::open(pid).expect("a child of ours");
            ours();
            child.send_signal(9).expect("a child of ours");
            child.wait().expect("a child of ours");
        }
    }
}

/// Measures while a thread does something all the time.
fn beside_a_thread(theirs: impl Fn() + Sync, ours: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                theirs();
            }
        });
        ours();
        stop.store(true, Relaxed);
    });
}

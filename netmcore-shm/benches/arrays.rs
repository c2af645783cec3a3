//! What the arrays in shared memory cost, each beside std's in private memory, measured in the same run.
//!
//! `cargo bench -p netmcore-shm --bench arrays`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use netmcore_shm::{Arena, Heap, ShmArray, ShmBuffer, ShmMatrix, ShmVec};
use std::hint::black_box;

const COUNT: usize = 100_000;

fn heap() -> Heap {
    let arena = Arena::reserve(4 << 30).expect("addresses");
    Heap::anonymous(&arena, 1 << 30).expect("a heap")
}

fn vec(criterion: &mut Criterion) {
    let heap = heap();
    let mut group = criterion.benchmark_group("vec");
    group.throughput(Throughput::Elements(COUNT as u64));
    // Into memory that is there: its first touch costs more than the element.
    let mut filled = ShmVec::<u64>::with_capacity_in(&heap, COUNT).expect("memory");
    group.bench_function("push", |bencher| {
        bencher.iter(|| {
            filled.clear();
            for k in 0..COUNT as u64 {
                filled.push(k).expect("room");
            }
        });
    });
    group.bench_function("push_growing", |bencher| {
        bencher.iter(|| {
            let mut vec = ShmVec::new_in(&heap);
            for k in 0..COUNT as u64 {
                vec.push(k).expect("memory");
            }
            vec
        });
    });
    let mut filled: Vec<u64> = Vec::with_capacity(COUNT);
    group.bench_function("push_std", |bencher| {
        bencher.iter(|| {
            filled.clear();
            for k in 0..COUNT as u64 {
                filled.push(k);
                // Somebody may look, as in shared memory.
                black_box(filled.as_ptr());
            }
        });
    });
    group.bench_function("push_growing_std", |bencher| {
        bencher.iter(|| {
            let mut vec = Vec::new();
            for k in 0..COUNT as u64 {
                vec.push(k);
                black_box(vec.as_ptr());
            }
            vec
        });
    });
    let shared = ShmVec::from_iter_in(&heap, 0..COUNT as u64).expect("memory");
    let private: Vec<u64> = (0..COUNT as u64).collect();
    group.bench_function("sum", |bencher| {
        bencher.iter(|| black_box(&shared).iter().sum::<u64>());
    });
    group.bench_function("sum_std", |bencher| {
        bencher.iter(|| black_box(&private).iter().sum::<u64>());
    });
    group.finish();
}

fn array(criterion: &mut Criterion) {
    let heap = heap();
    let array = ShmArray::init_in(&heap, COUNT, |k| k as f64).expect("memory");
    let private: Vec<f64> = (0..COUNT).map(|k| k as f64).collect();
    let mut group = criterion.benchmark_group("array");
    group.bench_function("claim_and_end", |bencher| {
        bencher.iter(|| array.claim(100..200).expect("free").len());
    });
    group.bench_function("get", |bencher| {
        bencher.iter(|| array.get(black_box(500)).expect("free"));
    });
    group.throughput(Throughput::Elements(COUNT as u64));
    group.bench_function("claim_and_scale", |bencher| {
        bencher.iter(|| {
            let mut slice = array.claim(..).expect("free");
            slice.iter_mut().for_each(|element| *element *= 1.000_001);
        });
    });
    let mut scaled = private.clone();
    group.bench_function("scale_std", |bencher| {
        bencher.iter(|| {
            black_box(&mut scaled)
                .iter_mut()
                .for_each(|element| *element *= 1.000_001);
        });
    });
    group.bench_function("read_and_sum", |bencher| {
        bencher.iter(|| array.read(..).expect("free").iter().sum::<f64>());
    });
    group.bench_function("sum_std", |bencher| {
        bencher.iter(|| black_box(&private).iter().sum::<f64>());
    });
    group.finish();
}

fn matrix(criterion: &mut Criterion) {
    const SIDE: usize = 300;
    let heap = heap();
    let matrix = ShmMatrix::make_in(&heap, (SIDE, SIDE), 1.5_f64).expect("memory");
    let private = vec![vec![1.5_f64; SIDE]; SIDE];
    let mut group = criterion.benchmark_group("matrix");
    group.throughput(Throughput::Elements((SIDE * SIDE) as u64));
    group.bench_function("sum_by_rows", |bencher| {
        bencher.iter(|| {
            let all = matrix.read_rows(..).expect("free");
            all.rows().map(|row| row.iter().sum::<f64>()).sum::<f64>()
        });
    });
    group.bench_function("sum_by_rows_each_claimed", |bencher| {
        bencher.iter(|| {
            let of_row = |row: usize| {
                let row = matrix.read_rows(row..row + 1).expect("free");
                row.row(0).iter().sum::<f64>()
            };
            (0..SIDE).map(of_row).sum::<f64>()
        });
    });
    group.bench_function("sum_by_rows_std", |bencher| {
        bencher.iter(|| {
            let rows = black_box(&private).iter();
            rows.map(|row| row.iter().sum::<f64>()).sum::<f64>()
        });
    });
    group.finish();
}

fn buffer(criterion: &mut Criterion) {
    let heap = heap();
    let mut group = criterion.benchmark_group("buffer");
    for (name, len) in [("64_bytes", 64), ("64_KiB", 64 << 10)] {
        let bytes = vec![7; len];
        group.throughput(Throughput::Bytes(len as u64));
        let buffer = ShmBuffer::new_in(&heap);
        group.bench_function(format!("append_{name}"), |bencher| {
            bencher.iter(|| {
                let end = buffer.add(&bytes).expect("memory").end;
                // So that memory is taken and freed all the time.
                if end - buffer.start() > 16 << 20 {
                    buffer.delete_to(end - (8 << 20));
                }
            });
        });
        let mut private: Vec<u8> = Vec::with_capacity(17 << 20);
        group.bench_function(format!("append_{name}_std"), |bencher| {
            bencher.iter(|| {
                if private.len() > 16 << 20 {
                    private.clear();
                }
                private.extend_from_slice(black_box(&bytes));
            });
        });
        group.bench_function(format!("read_{name}"), |bencher| {
            let mut into = vec![0; len];
            let from = buffer.start();
            bencher.iter(|| buffer.read_at(from, &mut into).expect("it is there"));
        });
    }
    group.finish();
}

criterion_group!(benches, vec, array, matrix, buffer);
criterion_main!(benches);

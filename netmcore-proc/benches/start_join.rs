//! What it costs to start a process and to join it, beside what the system asks for the same.
//!
//! `cargo bench -p netmcore-proc`. The measuring program is itself a worker, since only workers join; each
//! figure stands beside its floor, measured in the same run: a bare fork with exit and wait, a thread.
//!
//! # Safety
//! The one unsafe call forks a child that leaves at once.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use criterion::Criterion;
use netmcore_proc::{Master, Process};
use netmcore_sys::process::{self, Forked, PidFd};

fn main() {
    let dir = std::env::temp_dir().join(format!("netmcore-bench-{}", std::process::id()));
    let outcome = run(&dir);
    std::fs::remove_dir_all(&dir).expect("the benchmark's directory is its own");
    outcome.expect("the benchmark ran");
}

fn run(dir: &PathBuf) -> netmcore_proc::Result<()> {
    let mut master = Master::builder(dir);
    let nothing = master.def_process(|()| {});
    let echo = master.def_process(|bytes: Vec<u8>| bytes);
    let measure = master.def_process(move |()| measure(nothing, echo));
    master.run(&measure, &())
}

fn measure(nothing: Process<(), ()>, echo: Process<Vec<u8>, Vec<u8>>) {
    let mut criterion = Criterion::default().configure_from_args();

    let mut one = criterion.benchmark_group("one");
    one.bench_function("start_join", |bencher| {
        bencher.iter(|| start_join(nothing));
    });
    one.bench_function("start_join_with_a_ready_worker", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut total = Duration::ZERO;
            for _ in 0..rounds {
                // sleep: the master forks the next ready worker meanwhile; not in the figure.
                std::thread::sleep(Duration::from_millis(2));
                let begin = Instant::now();
                start_join(nothing);
                total += begin.elapsed();
            }
            total
        });
    });
    one.bench_function("floor_fork_exit_wait", |bencher| {
        bencher.iter(fork_exit_wait)
    });
    one.bench_function("floor_thread", |bencher| {
        bencher.iter(|| {
            std::thread::spawn(|| {})
                .join()
                .expect("the thread does nothing")
        });
    });
    one.finish();

    let mut many = criterion.benchmark_group("200_at_once");
    many.sample_size(20);
    many.bench_function("start_join", |bencher| {
        bencher.iter(|| {
            let running: Vec<_> = (0..200)
                .map(|_| nothing.start(&()).expect("200 fit in the table"))
                .collect();
            for process in running {
                process.join().expect("the process does nothing");
            }
        });
    });
    many.finish();

    let mut large = criterion.benchmark_group("1_mib");
    large.sample_size(20);
    let bytes = vec![7; 1 << 20];
    large.bench_function("there_and_back", |bencher| {
        bencher.iter(|| {
            let running = echo.start(&bytes).expect("a MiB fits");
            running.join().expect("the process returns its argument")
        });
    });
    large.bench_function("floor_4_copies", |bencher| {
        bencher.iter(|| {
            let mut copy = black_box(&bytes).clone();
            for _ in 0..3 {
                copy = black_box(&copy).clone();
            }
            copy
        });
    });
    large.finish();

    criterion.final_summary();
}

fn start_join(nothing: Process<(), ()>) {
    let running = nothing.start(&()).expect("the table has room");
    running.join().expect("the process does nothing");
}

fn fork_exit_wait() {
    // SAFETY: the child leaves at once; nothing that happens in both processes has an effect.
    match unsafe { process::fork() }.expect("a worker has one thread") {
        Forked::Child => process::exit_now(0),
        Forked::Parent(pid) => {
            PidFd::open(pid)
                .and_then(|child| child.wait())
                .expect("the child ends");
        }
    }
}

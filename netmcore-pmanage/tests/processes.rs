//! Guards against lines that are lost or mixed when several processes and threads write at once, or one is killed while it
//! writes, and against a lock that does not exclude or is lost by an unrelated close.

mod child;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use child::{Child, wait_for_an_opener};
use netmcore_pmanage::log::RECORD_NAME;
use netmcore_pmanage::record::Tail;
use netmcore_pmanage::{Error, KernelObject, Liveness, Log};
use netmcore_sys::file_lock::OfdGuard;
use netmcore_sys::poll::{EventFd, wait_readable};
use netmcore_sys::process::{Limit, Pid, Resource};
use netmcore_sys::signal::SIGKILL;
use netmcore_sys::{futex::Deadline, process};

netmcore_forktest::forktests!(
    writers_in_processes_and_threads_lose_nothing,
    killed_writer_loses_nothing_that_was_acknowledged,
    lock_excludes_other_processes_and_threads,
    log_works_on_both_sides_of_a_fork,
    removed_record_is_made_anew,
    stopped_holder_is_an_error_and_loses_nothing,
    record_that_others_write_is_waited_for,
    file_size_limit_is_an_error_and_kills_nobody,
);

fn container(name: String) -> KernelObject {
    KernelObject::SemContainer(name.into_bytes())
}

/// The kernel's own answer is SIGXFSZ.
fn file_size_limit_is_an_error_and_kills_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let objects: Vec<_> = (0..20).map(|n| container(format!("/{n}"))).collect();
    log.register(&objects[..10]).unwrap();
    let len_bytes = fs::metadata(dir.join(RECORD_NAME)).unwrap().len();
    for limit_bytes in [0, len_bytes + 5] {
        Child::fork(|| {
            let limit = Limit {
                soft: Some(limit_bytes),
                hard: None,
            };
            process::set_limit(Resource::FileSizeBytes, limit).unwrap();
            for _ in 0..2 {
                let error = log.register(&objects[10..]).unwrap_err();
                let mut said = String::new();
                let mut cause: Option<&dyn std::error::Error> = Some(&error);
                while let Some(one) = cause {
                    said += &one.to_string();
                    cause = one.source();
                }
                assert!(said.contains("ulimit -f"), "{said}");
            }
            let before: BTreeSet<_> = objects[..10].iter().cloned().collect();
            assert_eq!(BTreeSet::from_iter(log.registered().unwrap()), before);
            // Nor can one start.
            assert!(limit_bytes > 0 || Liveness::acquire(dir).is_err());
        })
        .succeeds();
    }
    log.register(&objects[10..]).unwrap();
    assert_eq!(log.registered().unwrap().len(), 20);
}

fn writers_in_processes_and_threads_lose_nothing() {
    const PROCESSES: usize = 4;
    const THREADS: usize = 3;
    const ROUNDS: usize = 60;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let writers: Vec<Child> = (0..PROCESSES)
        .map(|p| {
            Child::fork(|| {
                thread::scope(|scope| {
                    for t in 0..THREADS {
                        let log = &log;
                        scope.spawn(move || {
                            for round in 0..ROUNDS {
                                let objects: Vec<_> = (0..3)
                                    .map(|n| container(format!("/{p} {t} {round} {n}")))
                                    .collect();
                                log.register(&objects).unwrap();
                                log.unregister(&objects[1..]).unwrap();
                                assert!(log.registered().unwrap().contains(&objects[0]));
                            }
                        });
                    }
                });
            })
        })
        .collect();
    writers.into_iter().for_each(Child::succeeds);
    let contents = log.contents().unwrap();
    let mut expected = BTreeSet::new();
    for p in 0..PROCESSES {
        for t in 0..THREADS {
            expected.extend((0..ROUNDS).map(|round| container(format!("/{p} {t} {round} 0"))));
        }
    }
    assert_eq!(contents.objects, expected);
    assert_eq!(contents.damaged, []);
    assert_eq!(contents.tail, Tail::Whole);
}

/// Where each writer says how far it came, and what it was at: one number for each.
struct Progress(File);

impl Progress {
    fn create(path: &Path) -> Progress {
        let mut options = OpenOptions::new();
        Progress(
            options
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .unwrap(),
        )
    }

    fn set(&self, writer: usize, count: u64) {
        self.0
            .write_all_at(&count.to_ne_bytes(), writer as u64 * 8)
            .unwrap();
    }

    fn get(&self, writer: usize) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_at(&mut bytes, writer as u64 * 8).unwrap();
        u64::from_ne_bytes(bytes)
    }
}

fn killed_writer_loses_nothing_that_was_acknowledged() {
    const WRITERS: usize = 3;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for round in 0..25 {
        let log_dir = dir.join(format!("round-{round}"));
        netmcore_pmanage::prepare_directory(&log_dir).unwrap();
        let log = Log::open(&log_dir).unwrap();
        let progress = Progress::create(&dir.join(format!("progress-{round}")));
        // Long names, so that a kill may hit the middle of a write.
        let name =
            |writer: usize, n: u64| container(format!("/{writer}-{n}-{}", "x".repeat(20_000)));
        let writers: Vec<Child> = (0..WRITERS)
            .map(|writer| {
                Child::fork(|| {
                    for n in 0.. {
                        log.register(&[name(writer, n)]).unwrap();
                        progress.set(writer, n + 1);
                    }
                })
            })
            .collect();
        let started = Instant::now();
        while (0..WRITERS).any(|writer| progress.get(writer) < 3 + round % 5) {
            assert!(started.elapsed() < Duration::from_secs(60), "no progress");
            thread::yield_now();
        }
        writers.into_iter().for_each(Child::kill);

        // What they left is mended by the next writer.
        let mine = container("/after".to_owned());
        log.register(std::slice::from_ref(&mine)).unwrap();
        let contents = log.contents().unwrap();
        assert_eq!(contents.damaged, []);
        assert_eq!(contents.tail, Tail::Whole);
        assert!(contents.objects.contains(&mine));
        let mut acknowledged = 1;
        for writer in 0..WRITERS {
            for n in 0..progress.get(writer) {
                assert!(contents.objects.contains(&name(writer, n)), "{writer} {n}");
                acknowledged += 1;
            }
        }
        assert!(contents.objects.len() <= acknowledged + WRITERS);
    }
}

fn lock_excludes_other_processes_and_threads() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let path = dir.join(RECORD_NAME);
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap()
    };

    let guard = OfdGuard::lock(open()).unwrap();
    let done = EventFd::new().unwrap();
    let writer = Child::fork(|| {
        log.register(&[container("/process".to_owned())]).unwrap();
        done.ring().unwrap();
    });
    wait_for_an_opener(&path, writer.pid, 1);
    // Closing another descriptor of the file gives nothing up.
    drop(open());
    assert!(!wait_readable(&done, Some(Deadline::after(Duration::from_millis(50)))).unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"");
    drop(guard);
    writer.succeeds();
    assert_eq!(log.registered().unwrap().len(), 1);

    let guard = OfdGuard::lock(open()).unwrap();
    let before = fs::read(&path).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| log.register(&[container("/thread".to_owned())]));
        wait_for_an_opener(&path, Pid::this(), 1);
        assert!(!writer.is_finished());
        assert_eq!(fs::read(&path).unwrap(), before);
        drop(guard);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(log.registered().unwrap().len(), 2);

    // The lock of a killed holder is free.
    let held = EventFd::new().unwrap();
    let holder = Child::fork(|| {
        let _guard = OfdGuard::lock(open()).unwrap();
        held.ring().unwrap();
        wait_readable(EventFd::new().unwrap(), None).unwrap();
    });
    assert!(wait_readable(&held, Some(Deadline::after(Duration::from_secs(20)))).unwrap());
    process::kill(holder.pid, SIGKILL).unwrap();
    log.unregister(&[container("/thread".to_owned())]).unwrap();
    holder.wait();
    assert_eq!(log.registered().unwrap().len(), 1);
}

fn log_works_on_both_sides_of_a_fork() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path()).unwrap();
    let memory = Log::in_memory();
    let parent = Pid::this();
    Child::fork(|| {
        log.register(&[container(format!("/child of {parent}"))])
            .unwrap();
        memory.register(&[container("/child".to_owned())]).unwrap();
    })
    .succeeds();
    log.register(&[container("/parent".to_owned())]).unwrap();
    assert_eq!(log.registered().unwrap().len(), 2);
    assert_eq!(memory.registered().unwrap(), []);
}

fn removed_record_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path()).unwrap();
    let path = dir.path().join(RECORD_NAME);
    let guard = OfdGuard::lock(OpenOptions::new().write(true).open(&path).unwrap()).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| log.register(&[container("/a".to_owned())]));
        wait_for_an_opener(&path, Pid::this(), 1);
        fs::remove_file(&path).unwrap();
        drop(guard);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(fs::read(&path).unwrap(), b"R SEM_CONT \"/a\"\n");
}

fn stopped_holder_is_an_error_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path()).unwrap();
    let guard = OfdGuard::lock(open_to_write(&dir.path().join(RECORD_NAME))).unwrap();
    let object = container("/a".to_owned());
    let refused = log.register(std::slice::from_ref(&object)).unwrap_err();
    assert!(refused.to_string().contains("cannot lock"), "{refused}");
    let Error::Io { source, .. } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
    drop(guard);
    assert_eq!(log.registered().unwrap(), []);
    log.register(std::slice::from_ref(&object)).unwrap();
    assert_eq!(log.registered().unwrap(), [object]);
}

/// The lock is never free when it is asked for, as on a machine where many write all the time and one has bad luck.
fn record_that_others_write_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path()).unwrap();
    let guard = OfdGuard::lock(open_to_write(&dir.path().join(RECORD_NAME))).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| log.register(&[container("/late".to_owned())]));
        // Longer than anybody waits for one who does nothing.
        let until = Instant::now() + Duration::from_millis(2_500);
        while Instant::now() < until {
            guard.write_all_at(b"R SEM_CONT \"/busy\"\n", 0).unwrap();
            thread::yield_now();
        }
        drop(guard);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(log.registered().unwrap().len(), 2);
}

fn open_to_write(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

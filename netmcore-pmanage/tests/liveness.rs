//! Guards against two programs in one directory, against cleaning up behind processes that still run, and against
//! starts that wait for ever or refuse for ever.

mod child;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use child::Child;
use netmcore_pmanage::liveness::LOCK_NAME;
use netmcore_pmanage::{Error, KernelObject, Liveness, Log};
use netmcore_sys::futex::Deadline;
use netmcore_sys::poll::{EventFd, wait_readable};
use netmcore_sys::process::{self, ExitStatus, Pid};
use netmcore_sys::signal::SIGKILL;

netmcore_forktest::forktests!(
    second_start_is_told_who_runs_and_touches_nothing,
    lock_is_free_when_the_last_fork_is_gone,
    start_waits_for_orphans_that_go,
    start_gives_up_on_orphans_that_stay_and_names_them,
    zombie_master_is_dead,
    reused_process_id_is_not_taken_for_the_master,
    file_with_anything_in_it_is_no_obstacle,
    programs_that_were_started_do_not_hold_the_lock,
    only_one_of_many_starts_wins,
    replaced_lock_file_is_noticed,
    fork_that_drops_its_copy_changes_nothing,
);

/// Far more than a working system needs.
const SOON: Duration = Duration::from_secs(20);

fn rung(bell: &EventFd) {
    assert!(wait_readable(bell, Some(Deadline::after(SOON))).unwrap());
}

/// A master that has taken the lock of `dir`, forked `orphans` processes that wait for ever, and waits, too.
struct Program {
    master: Child,
    orphans: Vec<Pid>,
}

fn start_program(dir: &Path, orphans: usize) -> Program {
    let ready = EventFd::new().unwrap();
    let master = Child::fork(|| {
        let _lock = Liveness::acquire(dir).unwrap();
        for _ in 0..orphans {
            Child::fork(|| wait_for_ever(&EventFd::new().unwrap()));
        }
        ready.ring().unwrap();
        wait_for_ever(&EventFd::new().unwrap());
    });
    rung(&ready);
    let orphans = process::processes_with_parent(master.pid).unwrap();
    Program { master, orphans }
}

fn wait_for_ever(bell: &EventFd) {
    wait_readable(bell, None).unwrap();
}

fn contents(dir: &Path) -> BTreeSet<(String, Vec<u8>)> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.display().to_string(), fs::read(&path).unwrap())
        })
        .collect()
}

fn second_start_is_told_who_runs_and_touches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    log.register(&[KernelObject::File(dir.join("x"))]).unwrap();
    let program = start_program(dir, 1);
    let before = contents(dir);
    match Liveness::acquire(dir) {
        Err(Error::AlreadyRunning { pid, dir: found }) => {
            assert_eq!(pid, program.master.pid);
            assert_eq!(found, dir);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(contents(dir), before);
    program.master.kill();
    program
        .orphans
        .iter()
        .for_each(|&pid| process::kill(pid, SIGKILL).unwrap());
    Liveness::acquire(dir).unwrap();
}

fn lock_is_free_when_the_last_fork_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = start_program(dir, 0);
    program.master.kill();
    Liveness::acquire(dir).unwrap();
}

fn start_waits_for_orphans_that_go() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = start_program(dir, 2);
    program.master.kill();
    let go = EventFd::new().unwrap();
    let orphans = program.orphans;
    assert_eq!(orphans.len(), 2);
    let killer = Child::fork(|| {
        rung(&go);
        for pid in orphans {
            process::kill(pid, SIGKILL).unwrap();
        }
    });
    // The lock is still held now; the start sees it taken or not, as the killer is slow or fast.
    go.ring().unwrap();
    let lock = Liveness::acquire(dir).unwrap();
    assert_eq!(lock.dir(), dir);
    killer.succeeds();
}

fn start_gives_up_on_orphans_that_stay_and_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = start_program(dir, 2);
    program.master.kill();
    // Who has the file open and does not hold the lock is none of them.
    let _bystander = File::open(dir.join(LOCK_NAME)).unwrap();
    let before = contents(dir);
    let started = Instant::now();
    match Liveness::acquire(dir) {
        Err(Error::StillDying { pids, .. }) => assert_eq!(pids, program.orphans),
        other => panic!("{other:?}"),
    }
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    assert_eq!(contents(dir), before);
    program
        .orphans
        .iter()
        .for_each(|&pid| process::kill(pid, SIGKILL).unwrap());
    Liveness::acquire(dir).unwrap();
}

fn zombie_master_is_dead() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = start_program(dir, 1);
    program.master.pidfd.send_signal(SIGKILL).unwrap();
    assert!(wait_readable(&program.master.pidfd, Some(Deadline::after(SOON))).unwrap());
    assert!(process::is_zombie(program.master.pid).unwrap());
    let error = Liveness::acquire(dir).unwrap_err();
    assert!(
        matches!(&error, Error::StillDying { pids, .. } if *pids == program.orphans),
        "{error}"
    );
    process::kill(program.orphans[0], SIGKILL).unwrap();
    Liveness::acquire(dir).unwrap();
    program.master.wait();
}

fn reused_process_id_is_not_taken_for_the_master() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let program = start_program(dir, 1);
    program.master.kill();
    // This process lives, but was started at another time than the master.
    let started = process::start_time(Pid::this()).unwrap();
    let text = format!("{:>10} {:>20}\n", Pid::this(), started + 1);
    fs::write(dir.join(LOCK_NAME), text).unwrap();
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::StillDying { .. })
    ));
    let text = format!("{:>10} {:>20}\n", Pid::this(), started);
    fs::write(dir.join(LOCK_NAME), text).unwrap();
    assert!(
        matches!(Liveness::acquire(dir), Err(Error::AlreadyRunning { pid, .. }) if pid == Pid::this())
    );
    // While the orphan dies, the lock is still held, and this process would be taken for the holder.
    fs::write(dir.join(LOCK_NAME), "").unwrap();
    process::kill(program.orphans[0], SIGKILL).unwrap();
    Liveness::acquire(dir).unwrap();
}

fn file_with_anything_in_it_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for text in [
        b"".as_slice(),
        b"garbage",
        b"1",
        b"-1 5",
        b"\xff\xfe",
        &[b'9'; 200],
        b"1 1\n",
    ] {
        fs::write(dir.join(LOCK_NAME), text).unwrap();
        let lock = Liveness::acquire(dir).unwrap();
        let named = fs::read_to_string(dir.join(LOCK_NAME)).unwrap();
        let started = process::start_time(Pid::this()).unwrap();
        let named: Vec<&str> = named.split_whitespace().collect();
        assert_eq!(named, [Pid::this().to_string(), started.to_string()]);
        drop(lock);
        assert_eq!(fs::read(dir.join(LOCK_NAME)).unwrap(), b"");
    }
}

fn programs_that_were_started_do_not_hold_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let ready = EventFd::new().unwrap();
    let master = Child::fork(|| {
        let _lock = Liveness::acquire(dir).unwrap();
        // A program, started by exec; it outlives its parent.
        let mut program = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(dir.join("program"), program.id().to_string()).unwrap();
        ready.ring().unwrap();
        program.wait().unwrap();
    });
    rung(&ready);
    master.kill();
    Liveness::acquire(dir).unwrap();
    let program = fs::read_to_string(dir.join("program")).unwrap();
    process::kill(Pid::new(program.parse().unwrap()).unwrap(), SIGKILL).unwrap();
}

fn only_one_of_many_starts_wins() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for round in 0..20 {
        let go = EventFd::new().unwrap();
        let end = EventFd::new().unwrap();
        let starts: Vec<Child> = (0..6)
            .map(|n| {
                Child::fork(|| {
                    // Not drained, so it rings for all.
                    rung(&go);
                    match Liveness::acquire(dir) {
                        Ok(_lock) => {
                            File::create_new(dir.join(format!("won-{round}"))).unwrap();
                            rung(&end);
                        }
                        Err(Error::AlreadyRunning { .. }) => {
                            File::create_new(dir.join(format!("lost-{round}-{n}"))).unwrap();
                        }
                        Err(error) => panic!("{error}"),
                    }
                })
            })
            .collect();
        go.ring().unwrap();
        // All but one end by themselves.
        let started = Instant::now();
        let lost = || {
            (0..6)
                .filter(|n| dir.join(format!("lost-{round}-{n}")).exists())
                .count()
        };
        while lost() < 5 {
            assert!(
                started.elapsed() < SOON,
                "{} of 5 starts were refused",
                lost()
            );
            std::thread::yield_now();
        }
        end.ring().unwrap();
        starts.into_iter().for_each(Child::succeeds);
        assert!(dir.join(format!("won-{round}")).exists());
    }
}

fn replaced_lock_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let first = Liveness::acquire(dir).unwrap();
    // Somebody tidies up by hand: the next start gets a file of its own, and the lock of that one.
    fs::remove_file(dir.join(LOCK_NAME)).unwrap();
    let second = Liveness::acquire(dir).unwrap();
    drop(first);
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::AlreadyRunning { .. })
    ));
    drop(second);
    Liveness::acquire(dir).unwrap();
}

fn fork_that_drops_its_copy_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut lock = Some(Liveness::acquire(dir).unwrap());
    Child::fork(|| drop(lock.take())).succeeds();
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::AlreadyRunning { .. })
    ));
    // The descriptor alone holds the lock, too, and the file goes on naming its master.
    let fd = lock.take().unwrap().into_fd();
    assert!(fd.as_raw_fd() >= 0);
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::AlreadyRunning { .. })
    ));
    let child = Child::fork(|| assert!(Liveness::acquire(dir).is_err()));
    assert_eq!(child.wait(), ExitStatus::Exited { code: 0 });
    drop(fd);
    Liveness::acquire(dir).unwrap();
}

//! Guards against a value that is used by two, is lost with its holder, or is half changed and nobody is told.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.
//!
//! # Safety
//!
//! Shared memory is mapped for ever and starts as zeros, which are free locks and valid numbers.

#![allow(unsafe_code)]

#[path = "support/crowd.rs"]
mod crowd;
mod support;

use crowd::{Crowd, zeroed};
use netmcore_sem::current::uninstall;
use netmcore_sem::{
    Current, ErrorChecking, LockError, OwnerDied, OwnerId, Owners, Recursive, ShmCondvar, ShmMutex,
    ShmMutexGuard, ShmRwLock, ShmWriteGuard, SoloOwners,
};
use netmcore_sys::crash;
use netmcore_sys::process::{self, Pid};
use netmcore_sys::signal::SIGKILL;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::{Child, PATIENCE, fork, wait_until};

const VICTIM: u32 = 1;

/// All in one page, zeros at first. The two numbers of a value are equal, unless somebody is changing them.
#[repr(C)]
struct Shared {
    normal: ShmMutex<[u64; 2]>,
    checking: ShmMutex<[u64; 2], ErrorChecking>,
    recursive: ShmMutex<[Cell<u64>; 2], Recursive>,
    stop: AtomicU32,
    told: AtomicU64,
    progress: [AtomicU64; 16],
}

fn shared() -> &'static Shared {
    // SAFETY: zeros are free mutexes around zeros, and zeros.
    unsafe { zeroed() }
}

/// Holds what `lock` gives until it is killed.
fn holder<G>(lock: impl FnOnce() -> G) -> Child {
    fork(|| {
        let _guard = lock();
        // sleep: until it is killed.
        std::thread::sleep(PATIENCE);
    })
}

fn count_up(value: &mut [u64; 2]) {
    value[0] += 1;
    std::hint::spin_loop();
    value[1] += 1;
}

/// For panics on purpose: printing where they are takes longer than all else here.
fn panic_quietly() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// Locks and changes the value, repairing it first if need be; says who died.
fn work(shared: &Shared) -> Option<OwnerId> {
    let (died, mut guard) = match shared.normal.lock() {
        Ok(guard) => (None, guard),
        Err(OwnerDied { owner, mut guard }) => {
            shared.told.fetch_add(1, Ordering::SeqCst);
            guard[1] = guard[0];
            (Some(owner), guard)
        }
    };
    assert_eq!(guard[0], guard[1], "half changed, and nobody was told");
    count_up(&mut guard);
    died
}

/// A waiter in another process gets the lock of a holder that is killed, and is told.
fn killed_holder_is_told_to_a_waiter() {
    let crowd = Crowd::install();
    let shared = shared();
    let victim = holder(|| {
        let mut guard = shared.normal.lock().unwrap();
        guard[0] = 77;
        guard
    });
    wait_until("the victim holds it", || shared.normal.owner().is_some());
    let dead = shared.normal.owner();
    assert!(!shared.normal.is_in_doubt());
    let waiter = fork(|| assert_eq!(work(shared), dead));
    crowd::sleeping(&waiter);
    victim.kill();
    assert!(!victim.ended_well());
    let settled = Instant::now();
    crowd.settle_death(victim.pid);
    assert!(waiter.ended_well());
    eprintln!("told {:?} after the announcement", settled.elapsed());
    assert!(settled.elapsed() < Duration::from_secs(5));
    assert_eq!(work(shared), None);
    assert_eq!(shared.told.load(Ordering::SeqCst), 1);
}

/// The same without a supervisor.
fn killed_stranger_is_told_to_a_waiter() {
    uninstall();
    let shared = shared();
    let victim = holder(|| shared.normal.lock().unwrap());
    wait_until("the victim holds it", || shared.normal.owner().is_some());
    let dead = shared.normal.owner();
    let waiter = fork(|| assert_eq!(work(shared), dead));
    crowd::sleeping(&waiter);
    victim.kill();
    let killed = Instant::now();
    assert!(waiter.ended_well());
    eprintln!("told {:?} after the kill", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(5));
    assert!(!victim.ended_well());
}

/// Every form of locking, of every kind, tells.
fn every_form_tells_of_the_death() {
    let crowd = Crowd::install();
    let shared = shared();
    let kill = |victim: Child, owner: &dyn Fn() -> Option<OwnerId>| {
        wait_until("the victim holds it", || owner().is_some());
        let dead = owner().unwrap();
        victim.kill();
        assert!(!victim.ended_well());
        crowd.settle_death(victim.pid);
        dead
    };
    let soon = || Instant::now() + PATIENCE;

    let die = || kill(holder(|| shared.normal.lock()), &|| shared.normal.owner());
    let dead = die();
    assert!(shared.normal.is_in_doubt());
    assert_eq!(shared.normal.lock().unwrap_err().owner, dead);
    assert!(!shared.normal.is_in_doubt());
    let dead = die();
    assert_eq!(shared.normal.try_lock().unwrap_err().owner, dead);
    let dead = die();
    let LockError::OwnerDied(died) = shared.normal.lock_deadline(soon()).unwrap_err() else {
        panic!("not told");
    };
    assert_eq!(died.owner, dead);
    assert!(shared.normal.is_in_doubt(), "until it is unlocked");
    ShmMutexGuard::give_up(died.guard);
    let died = shared.normal.lock().unwrap_err();
    assert_eq!(died.owner, dead, "not the one that gave it up");
    drop(died);
    drop(shared.normal.lock().unwrap());

    let die = || {
        kill(holder(|| shared.checking.lock()), &|| {
            shared.checking.owner()
        })
    };
    let dead = die();
    let LockError::OwnerDied(died) = shared.checking.lock().unwrap_err() else {
        panic!("not told");
    };
    assert_eq!(died.owner, dead);
    assert!(matches!(
        shared.checking.lock(),
        Err(LockError::WouldDeadlock)
    ));
    assert!(matches!(
        shared.checking.lock_deadline(soon()),
        Err(LockError::WouldDeadlock)
    ));
    assert!(shared.checking.try_lock().unwrap().is_none());
    drop(died);
    let dead = die();
    assert_eq!(shared.checking.try_lock().unwrap_err().owner, dead);
    drop(shared.checking.lock().unwrap());

    // Held three times by the dead, once by those who come after.
    let die = || {
        let lock = || [(); 3].map(|()| shared.recursive.lock().ok());
        kill(holder(lock), &|| shared.recursive.owner())
    };
    let dead = die();
    let died = shared.recursive.lock().unwrap_err();
    assert_eq!(died.owner, dead);
    let again = shared.recursive.lock().unwrap();
    drop(died);
    assert!(shared.recursive.owner().is_some());
    drop(again);
    assert_eq!(shared.recursive.owner(), None);
    let dead = die();
    assert_eq!(shared.recursive.try_lock().unwrap_err().owner, dead);
    let dead = die();
    let died = shared.recursive.lock_deadline(soon()).unwrap_err();
    assert!(matches!(died, LockError::OwnerDied(died) if died.owner == dead));
    assert_eq!(shared.recursive.owner(), None);
    drop(shared.recursive.lock().unwrap());
}

/// One that is told and dies in turn is told to the next, by its own name.
fn death_of_the_one_that_was_told_is_told() {
    let crowd = Crowd::install();
    let shared = shared();
    let mut dead = None;
    for _ in 0..3 {
        let victim = fork(|| {
            match shared.normal.lock() {
                Ok(guard) => std::mem::forget(guard),
                Err(died) => {
                    assert_eq!(Some(died.owner), dead);
                    std::mem::forget(died);
                }
            };
        });
        assert!(victim.ended_well());
        crowd.settle_death(victim.pid);
        dead = shared.normal.owner();
        assert!(dead.is_some());
    }
    assert_eq!(work(shared), dead);
    assert_eq!(work(shared), None);
}

/// A panic in a process that goes on is told, as is what one gives up, until somebody repairs it.
fn panic_and_giving_up_are_told_in_other_processes() {
    let crowd = Crowd::install();
    let shared = shared();
    let child = fork(|| {
        panic_quietly();
        let caught = catch_unwind(|| {
            let _guard = shared.normal.lock().unwrap();
            panic!("on purpose");
        });
        assert!(caught.is_err());
        let unwrapped = catch_unwind(|| drop(shared.normal.lock().unwrap()));
        assert!(unwrapped.is_err(), "told again, until it is repaired");
    });
    assert!(child.ended_well());
    crowd.settle_death(child.pid);
    assert_eq!(shared.normal.owner(), None);
    assert!(shared.normal.is_in_doubt());
    let child = fork(|| ShmMutexGuard::give_up(shared.normal.lock().unwrap_err().guard));
    assert!(child.ended_well());
    let child = fork(|| assert!(work(shared).is_some()));
    assert!(child.ended_well());
    assert!(!shared.normal.is_in_doubt());
    assert_eq!(work(shared), None);
}

/// What a leaked guard has given may be used by another thread after that of the guard has ended: until the process is dead nobody else gets it.
fn leaked_guard_holds_until_its_process_is_dead() {
    for is_supervised in [true, false] {
        let crowd = Crowd::install();
        if !is_supervised {
            uninstall();
        }
        let shared = shared();
        let child = fork(|| {
            let (tell, told) = mpsc::channel();
            let thread = std::thread::spawn(move || {
                let guard = Box::leak(Box::new(shared.normal.lock().unwrap()));
                tell.send(&mut **guard).unwrap();
            });
            let value: &'static mut [u64; 2] = told.recv().unwrap();
            if is_supervised {
                thread.join().unwrap();
            } else {
                // It stays, asleep. If it has ended that is shown below.
                wait_until("the thread is through", || thread.is_finished());
                wait_until("the thread is at its end", is_asleep_or_gone(shared));
            }
            value[0] = 7;
            shared.stop.store(1, Ordering::SeqCst);
            loop {
                std::thread::park();
            }
        });
        wait_until("the thread has ended", || {
            shared.stop.load(Ordering::SeqCst) == 1
        });
        let owner = shared.normal.owner().unwrap();
        assert!(shared.normal.try_lock().unwrap().is_none());
        child.kill();
        assert!(!child.ended_well());
        crowd.settle_death(child.pid);
        let died = shared.normal.lock().unwrap_err();
        assert_eq!((died.owner, *died.guard), (owner, [7, 0]));
    }
}

/// Whatever becomes of a guard, but for being leaked, it is not counted as held at the end of the thread: that would stay.
fn thread_that_has_leaked_nothing_ends() {
    uninstall();
    let shared = shared();
    let lock = <ShmRwLock<u64>>::new(0);
    let use_all = || {
        ShmMutexGuard::give_up(shared.normal.lock().unwrap());
        let guard = shared.normal.try_lock().unwrap_err().guard;
        drop(ShmMutexGuard::map(guard, |both| &mut both[0]));
        drop(shared.checking.lock_deadline(Instant::now() + PATIENCE));
        drop((shared.recursive.lock(), shared.recursive.try_lock()));
        let guard = shared.normal.lock().unwrap();
        drop(ShmCondvar::new().wait_deadline(guard, Instant::now()));
        ShmWriteGuard::give_up(lock.write().unwrap());
        let guard = lock.write().unwrap_err().into_guard().unwrap();
        drop((ShmWriteGuard::downgrade(guard), lock.read()));
        drop(lock.try_write());
    };
    std::thread::scope(|scope| scope.spawn(use_all).join()).unwrap();
}

/// Whether the thread that has locked, which has no supervisor, sleeps in the kernel for good, or is not there.
fn is_asleep_or_gone(shared: &Shared) -> impl Fn() -> bool {
    let owner = shared.normal.owner().unwrap();
    let path = format!(
        "/proc/self/task/{}/syscall",
        owner.index - SoloOwners::INDEX_BASE
    );
    // "running", or the number of the call: that of futex.
    move || {
        let call = std::fs::read_to_string(&path);
        call.map_or(true, |call| {
            ["202 ", "98 "]
                .iter()
                .any(|number| call.starts_with(number))
        })
    }
}

/// A guard may lie in a variable of the thread that was there before its first lock, and so is destroyed late: until then its
/// thread is alive, and nobody else gets the lock.
fn guard_that_is_dropped_at_the_end_of_its_thread_holds_until_then() {
    struct Late(
        ShmMutexGuard<'static, [u64; 2]>,
        &'static ShmMutex<[u64; 2]>,
    );
    impl Drop for Late {
        fn drop(&mut self) {
            let owner = self.1.owner().unwrap();
            assert_eq!(owner, Current.me());
            assert!(Current.is_alive(owner));
            count_up(&mut self.0);
        }
    }
    thread_local! {
        static LATE: RefCell<Option<Late>> = const { RefCell::new(None) };
    }
    let crowd = Crowd::install();
    let shared = shared();
    let late = std::thread::spawn(|| {
        LATE.with_borrow_mut(|late| assert!(late.is_none(), "it is there before the lock"));
        let guard = shared.normal.lock().unwrap();
        LATE.set(Some(Late(guard, &shared.normal)));
        Current.me()
    });
    let owner = late.join().unwrap();
    assert!(!crowd.is_alive(owner), "told of its end all the same");
    assert_eq!(*shared.normal.lock().unwrap(), [1, 1]);
}

/// What a forked child copies of its parent's guards gives nothing, and its end frees nothing.
fn forked_copies_of_guards_hold_nothing() {
    Crowd::install();
    let shared = shared();
    let mut normal = shared.normal.lock().unwrap();
    normal[0] = 5;
    let second = ShmMutexGuard::map(
        shared.checking.lock().unwrap_or_else(|_| panic!()),
        |both| &mut both[1],
    );
    let recursive = shared.recursive.lock().unwrap();
    let again = shared.recursive.lock().unwrap();
    let mut guards = Some((normal, second, recursive, again));
    let child = fork(|| {
        let (normal, second, recursive, again) = guards.take().unwrap();
        panic_quietly();
        assert!(refused(|| normal[0]));
        assert!(refused(|| *second));
        assert!(refused(|| recursive[0].get()));
        assert!(refused(|| ShmCondvar::new().wait(normal).is_ok()));
        assert!(shared.normal.try_lock().unwrap().is_none(), "the parent's");
        assert!(shared.checking.try_lock().unwrap().is_none());
        assert!(shared.recursive.try_lock().unwrap().is_none());
        assert!(matches!(
            shared.checking.lock_deadline(Instant::now()),
            Err(LockError::TimedOut { .. })
        ));
        drop((second, again, recursive));
        assert!(shared.normal.owner().is_some());
        assert!(shared.checking.owner().is_some());
        assert!(shared.recursive.owner().is_some());
        assert!(!shared.normal.is_in_doubt(), "by the panics here");
    });
    assert!(child.ended_well());
    let (normal, second, recursive, again) = guards.unwrap();
    assert_eq!((normal[0], *second, recursive[0].get()), (5, 0, 0));
    drop((normal, second, recursive));
    assert!(shared.recursive.owner().is_some(), "held twice");
    drop(again);
    assert_eq!(shared.recursive.owner(), None);
    assert_eq!(shared.normal.owner(), None);
    assert!(!shared.normal.is_in_doubt() && !shared.recursive.is_in_doubt());
}

/// Whether the guard says that it is a copy.
fn refused<R>(access: impl FnOnce() -> R) -> bool {
    let Err(panic) = catch_unwind(AssertUnwindSafe(access)) else {
        return false;
    };
    panic
        .downcast_ref::<&str>()
        .is_some_and(|text| text.contains("forked copy"))
}

/// A victim passes through all that a mutex does, is killed at each point in turn, and a survivor goes on.
fn crash_at_any_point_is_told_and_recovered_from() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let crowd = Crowd::install();
        let shared = shared();
        crash::arm_role(VICTIM, k);
        let victim = fork(|| {
            crash::set_role(VICTIM);
            panic_quietly();
            work(shared);
            ShmMutexGuard::give_up(shared.normal.lock().unwrap());
            assert!(work(shared).is_some(), "told, and repaired");
            let caught = catch_unwind(|| {
                let mut guard = shared.normal.lock().unwrap();
                guard[0] += 1;
                panic!("on purpose");
            });
            assert!(caught.is_err());
            assert!(work(shared).is_some());
            // A dead one's lock is taken over.
            let dead = fork(|| {
                crash::set_role(VICTIM + 1);
                std::mem::forget(shared.normal.lock().unwrap());
            });
            assert!(dead.ended_well());
            crowd.settle_death(dead.pid);
            assert!(work(shared).is_some());
            let outer = shared.recursive.lock().unwrap();
            outer[0].set(1);
            shared.recursive.lock().unwrap()[1].set(1);
        });
        if victim.ended_well() {
            crash::disarm();
            assert_eq!(work(shared), None);
            assert!(k > 10, "only {k} points");
            break;
        }
        let point = crash::died_at().unwrap();
        // It had the lock, and now one that is dead has it: or had put the value in doubt.
        crowd.settle_death(victim.pid);
        crash::disarm();
        let survivor = fork(|| {
            let held = shared.normal.owner().is_some();
            let is_in_doubt = shared.normal.is_in_doubt();
            assert!(is_in_doubt || !held);
            assert_eq!(work(shared).is_some(), is_in_doubt);
            assert_eq!(work(shared), None);
            let held = shared.recursive.owner().is_some();
            let (is_told, guard) = match shared.recursive.lock() {
                Ok(guard) => (false, guard),
                Err(died) => (true, died.guard),
            };
            assert_eq!(is_told, held);
            drop(shared.recursive.lock().unwrap());
            drop(guard);
            assert_eq!(shared.recursive.owner(), None);
            drop(shared.recursive.lock().unwrap());
        });
        assert!(survivor.ended_well(), "after a death at {point}");
        died_at.insert(point);
    }
    for point in [
        "sem.word.locked",
        "sem.mutex.left_in_doubt",
        "sem.mutex.cleared",
        "sem.mutex.taken_over",
        "sem.mutex.in_doubt",
        "sem.mutex.deeper",
        "sem.mutex.less_deep",
    ] {
        assert!(died_at.contains(point), "{point} is not in {died_at:?}");
    }
}

/// Processes of two threads each; they die at random moments, and the others go on.
fn random_kills_hang_nobody() {
    let crowd = Crowd::install();
    let shared = shared();
    let lock = |_, _| {
        work(shared);
    };
    let kills = crowd.kill_at_random(&shared.stop, lock, || ());
    assert_eq!(work(shared), None);
    let told = shared.told.load(Ordering::SeqCst);
    eprintln!("{told} of {kills} were killed holding the lock");
    assert!(told > 0 || kills < 100);
}

/// Its two halves are equal, or it is not fit to be dropped.
#[derive(Debug)]
#[repr(C)]
struct Halves(u64, u64);

impl Drop for Halves {
    fn drop(&mut self) {
        assert_eq!(self.0, self.1, "dropped in doubt");
        self.0 = u64::MAX;
    }
}

fn value_in_doubt_is_replaced_and_not_dropped() {
    // SAFETY: zeros are a free mutex around zeros.
    let shared: &'static ShmMutex<Halves> = unsafe { zeroed() };
    let half_way = fork(|| {
        let mut guard = shared.lock().unwrap();
        guard.0 = 7;
        process::kill(Pid::this(), SIGKILL).unwrap();
    });
    assert!(!half_way.ended_well());
    let mut guard = shared.lock().unwrap_err().replace(Halves(1, 1));
    assert_eq!((guard.0, guard.1), (1, 1));
    // That one is dropped.
    *guard = Halves(2, 2);
    drop(guard);
    assert_eq!(shared.lock().unwrap().1, 2);
}

/// Another user's process, in a `/proc` that hides it.
fn hidden_process_is_not_taken_for_dead() {
    const OWNERS: &str = "NETMCORE_TEST_HIDDEN";
    if let Ok(owners) = std::env::var(OWNERS) {
        let numbers: Vec<u32> = owners
            .split(' ')
            .map(|number| number.parse().unwrap())
            .collect();
        let [living, dead] = [&numbers[..2], &numbers[2..]].map(|of| OwnerId {
            index: of[0],
            generation: of[1],
        });
        let pid = living.index - SoloOwners::INDEX_BASE;
        if std::path::Path::new(&format!("/proc/{pid}")).exists() {
            netmcore_forktest::skip("/proc hides nothing");
        }
        assert!(SoloOwners.is_alive(living));
        assert!(!SoloOwners.is_alive(dead));
        return;
    }
    let living = SoloOwners.me();
    let child = fork(|| ());
    let dead = OwnerId {
        index: SoloOwners::INDEX_BASE | child.pid.get().cast_unsigned(),
        generation: 0,
    };
    assert!(child.ended_well());
    let script = "mount -t proc -o hidepid=2 none /proc && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["--run", "hidden_process_is_not_taken_for_dead"])
        .env(
            OWNERS,
            [living, dead]
                .map(|owner| format!("{} {}", owner.index, owner.generation))
                .join(" "),
        )
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => netmcore_forktest::skip(&format!("there is no unshare: {error}")),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        // What a panic ends with.
        Some(101) => panic!("{said}"),
        _ => netmcore_forktest::skip(&format!("no such /proc can be had: {said}")),
    }
}

netmcore_forktest::forktests!(
    value_in_doubt_is_replaced_and_not_dropped,
    killed_holder_is_told_to_a_waiter,
    killed_stranger_is_told_to_a_waiter,
    every_form_tells_of_the_death,
    death_of_the_one_that_was_told_is_told,
    panic_and_giving_up_are_told_in_other_processes,
    leaked_guard_holds_until_its_process_is_dead,
    thread_that_has_leaked_nothing_ends,
    guard_that_is_dropped_at_the_end_of_its_thread_holds_until_then,
    forked_copies_of_guards_hold_nothing,
    crash_at_any_point_is_told_and_recovered_from,
    random_kills_hang_nobody,
    hidden_process_is_not_taken_for_dead,
);

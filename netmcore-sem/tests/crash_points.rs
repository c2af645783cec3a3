//! Guards against a lock that is lost, or a waiter that sleeps for ever, because a process was killed between two steps.

mod support;

use netmcore_sem::{OwnerDied, OwnerId, Owners, SoloOwners};
use netmcore_sys::crash;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use support::{PATIENCE, fork, shared, wait_until};

const VICTIM: u32 = 1;

/// Kills a child at every point that it passes while it and another fight for the lock.
fn crash_while_contending_leaves_the_lock_to_the_other() {
    const ROUNDS: u64 = 300;
    let mut died_at = BTreeSet::new();
    let mut in_vain = 0;
    for k in 1.. {
        let shared = shared();
        crash::arm_role(VICTIM, k);
        let (mortal, other) = (shared.person(1, 7), shared.person(2, 7));
        let work = |person: support::Person| {
            for _ in 0..ROUNDS {
                person.work();
            }
        };
        let victim = fork(|| {
            crash::set_role(VICTIM);
            work(mortal);
        });
        let survivor = fork(|| work(other));
        if !victim.ended_well() {
            shared.settle_death(mortal.id);
            died_at.extend(crash::died_at());
            in_vain = 0;
        } else {
            in_vain += 1;
        }
        assert!(survivor.ended_well(), "the survivor was killed");
        crash::disarm();
        // Whatever was left locked is handed over now.
        shared.person(3, 1).work();
        assert_eq!(shared.word.owner(), None);
        assert!(shared.told.load(Ordering::SeqCst) <= 1);
        // How many points it passes depends on luck; the points are few, and all are met early.
        if in_vain == 3 || k == 400 {
            break;
        }
    }
    assert!(died_at.contains("sem.word.locked"), "{died_at:?}");
}

/// A holder dies; two sleep. One is told, both get in.
fn death_of_the_holder_wakes_all_and_tells_one() {
    let shared = shared();
    crash::arm(None);
    let holder = shared.person(1, 1);
    let victim = fork(|| {
        std::mem::forget(holder.lock());
        // sleep: until it is killed.
        std::thread::sleep(PATIENCE);
    });
    wait_until("the victim holds it", || shared.word.owner().is_some());
    let waiters = [2, 3].map(|index| {
        let person = shared.person(index, 1);
        fork(move || {
            person.work();
        })
    });
    // One pass of the holder, one "contended" each.
    wait_until("both wait", || crash::passed() == 3);
    victim.kill();
    assert!(!victim.ended_well());
    let settled = Instant::now();
    shared.settle_death(holder.id);
    assert!(waiters.iter().all(support::Child::ended_well));
    assert!(settled.elapsed() < Duration::from_secs(5));
    assert_eq!(shared.told.load(Ordering::SeqCst), 1);
    assert_eq!(shared.first.load(Ordering::SeqCst), 2);
}

/// The lock is freed, and the one that should wake the next dies before it does.
fn death_between_unlock_and_wake_loses_no_wake() {
    let shared = shared();
    crash::arm_role(VICTIM, 2);
    let holder = shared.person(1, 1);
    let victim = fork(|| {
        crash::set_role(VICTIM);
        let (_, guard) = holder.lock(); // pass 1
        wait_until("a waiter sleeps", || {
            shared.stop.load(Ordering::SeqCst) == 1
        });
        drop(guard); // pass 2: unlocked, not yet woken
    });
    wait_until("the victim holds it", || shared.word.owner().is_some());
    let person = shared.person(2, 1);
    let waiter = fork(move || {
        person.work();
    });
    sleeping(&waiter);
    shared.stop.store(1, Ordering::SeqCst);
    assert!(!victim.ended_well());
    assert_eq!(
        crash::died_at().as_deref(),
        Some("sem.word.unlocked_before_wake")
    );
    shared.settle_death(holder.id);
    assert!(waiter.ended_well());
    assert_eq!(shared.told.load(Ordering::SeqCst), 0, "it was free");
}

/// Two sleep; the one that is woken dies before it can do anything.
fn death_with_the_only_wake_loses_no_wake() {
    let shared = shared();
    // The victim passes "contended", then "woken".
    crash::arm_role(VICTIM, 2);
    let holder = shared.person(0, 1);
    let (_, guard) = holder.lock();
    let mortal = shared.person(1, 1);
    let victim = fork(|| {
        crash::set_role(VICTIM);
        mortal.work();
    });
    // It sleeps first, so it is woken first.
    sleeping(&victim);
    let person = shared.person(2, 1);
    let waiter = fork(move || {
        person.work();
    });
    sleeping(&waiter);
    drop(guard);
    assert!(!victim.ended_well());
    assert_eq!(crash::died_at().as_deref(), Some("sem.word.woken"));
    shared.settle_death(mortal.id);
    assert!(waiter.ended_well());
}

/// Who knows of others whose deaths nobody announces, and looks for itself.
struct BesideStrangers(support::Person);

impl Owners for BesideStrangers {
    fn me(&self) -> OwnerId {
        self.0.me()
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        self.0.is_alive(owner)
    }
    fn deaths(&self) -> &AtomicU32 {
        self.0.deaths()
    }
    fn recheck(&self) -> Option<Duration> {
        Some(Duration::from_millis(5))
    }
}

/// The one that is woken dies, and nobody says so: one that waits for a live owner finds the lock free all the same.
fn unannounced_death_with_the_only_wake_loses_no_wake() {
    let shared = shared();
    crash::arm_role(VICTIM, 2);
    let holder = shared.person(0, 1);
    let (_, guard) = holder.lock();
    let stranger = shared.person(1, 1);
    let victim = fork(|| {
        crash::set_role(VICTIM);
        stranger.work();
    });
    sleeping(&victim);
    let person = shared.person(2, 1);
    let waiter = fork(move || drop(shared.word.lock(&BesideStrangers(person)).unwrap()));
    sleeping(&waiter);
    drop(guard);
    assert!(!victim.ended_well());
    assert_eq!(crash::died_at().as_deref(), Some("sem.word.woken"));
    assert!(waiter.ended_well());
}

/// The holder dies, and so does the one that takes the lock over from it.
fn death_after_taking_over_is_told_in_turn() {
    let shared = shared();
    let first = shared.person(1, 5);
    let victim = fork(|| std::mem::forget(first.lock()));
    assert!(victim.ended_well());
    shared.settle_death(first.id);
    crash::arm_role(VICTIM, 1);
    let second = shared.person(2, 6);
    let victim = fork(|| {
        crash::set_role(VICTIM);
        drop(second.lock());
    });
    assert!(!victim.ended_well());
    assert_eq!(crash::died_at().as_deref(), Some("sem.word.taken_over"));
    shared.settle_death(second.id);
    let third = shared.person(3, 1);
    assert_eq!(third.work(), Some(second.id));
    assert_eq!(third.work(), None);
}

/// A new tenant of the same place is not taken for the dead one.
fn next_tenant_of_the_index_is_alive() {
    let shared = shared();
    let before = shared.person(1, 1);
    std::mem::forget(before.lock());
    shared.settle_death(before.id);
    let after = shared.person(1, 2);
    let (died, guard) = after.lock();
    assert_eq!(died, Some(before.id));
    let other = shared.person(2, 1);
    assert!(shared.word.try_lock(&other).unwrap().is_none());
    drop(guard);
}

/// Without a supervisor each waiter finds out by itself.
fn solo_owners_notice_a_death_within_milliseconds() {
    let shared = shared();
    let victim = fork(|| {
        std::mem::forget(shared.word.lock(&SoloOwners));
        // sleep: until it is killed.
        std::thread::sleep(PATIENCE);
    });
    wait_until("the victim holds it", || shared.word.owner().is_some());
    let waiter = fork(|| {
        let OwnerDied { guard, .. } = shared.word.lock(&SoloOwners).unwrap_err();
        drop(guard);
    });
    sleeping(&waiter);
    victim.kill();
    let killed = Instant::now();
    // Not reaped: the zombie counts as dead.
    assert!(waiter.ended_well());
    assert!(killed.elapsed() < Duration::from_secs(5));
    assert!(!victim.ended_well());
    assert_eq!(shared.word.owner(), None);
}

/// Waits until the child sleeps in the kernel, for the lock: it does nothing else that sleeps.
fn sleeping(child: &support::Child) {
    let path = format!("/proc/{}/syscall", child.pid.get());
    wait_until("the child sleeps", || {
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        // "running", or the number of the call: futex_waitv has the same one everywhere, plain futex is the fallback.
        let number = call.split(' ').next().unwrap_or_default();
        let is_futex = ["449", "202", "98"].contains(&number.trim());
        let asleep = |state: String| state.contains(") S ");
        is_futex
            && std::fs::read_to_string(format!("/proc/{}/stat", child.pid.get())).is_ok_and(asleep)
    });
}

netmcore_forktest::forktests!(
    crash_while_contending_leaves_the_lock_to_the_other,
    death_of_the_holder_wakes_all_and_tells_one,
    death_between_unlock_and_wake_loses_no_wake,
    death_with_the_only_wake_loses_no_wake,
    unannounced_death_with_the_only_wake_loses_no_wake,
    death_after_taking_over_is_told_in_turn,
    next_tenant_of_the_index_is_alive,
    solo_owners_notice_a_death_within_milliseconds,
);

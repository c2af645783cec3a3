//! Guards against schedules that tests do not meet: two holders at once, a sleeper that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-sem --release --test loom`
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use netmcore_sem::{LockWord, OwnerId, Owners, announce_death};

const PEOPLE: usize = 3;

/// What the supervisor keeps in shared memory.
struct Shared {
    word: LockWord,
    dead: [AtomicU32; PEOPLE],
    deaths: AtomicU32,
    /// Counted up by a load and a store: a lost count shows two holders, or one that does not see the last.
    protected: AtomicU32,
}

struct Person<'a> {
    shared: &'a Shared,
    index: u32,
}

impl Owners for Person<'_> {
    fn me(&self) -> OwnerId {
        OwnerId {
            index: self.index,
            generation: 1,
        }
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        self.shared.dead[owner.index as usize].load(Ordering::Acquire) == 0
    }
    fn deaths(&self) -> &AtomicU32 {
        &self.shared.deaths
    }
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            word: LockWord::new(),
            dead: std::array::from_fn(|_| AtomicU32::new(0)),
            deaths: AtomicU32::new(0),
            protected: AtomicU32::new(0),
        })
    }

    fn person(&self, index: u32) -> Person<'_> {
        Person {
            shared: self,
            index,
        }
    }

    /// Locks, changes what is protected, unlocks. Says who died holding the lock.
    fn work(&self, index: u32) -> Option<u32> {
        let (died, guard) = match self.word.lock(&self.person(index)) {
            Ok(guard) => (None, guard),
            Err(died) => (Some(died.owner.index), died.guard),
        };
        self.count_up();
        drop(guard);
        died
    }

    /// Takes the lock and is gone; the supervisor finds out.
    fn die_holding(&self, index: u32) {
        match self.word.lock(&self.person(index)) {
            Ok(guard) => std::mem::forget(guard),
            Err(died) => std::mem::forget(died),
        }
        self.count_up();
        self.dead[index as usize].store(1, Ordering::Release);
        announce_death(&self.deaths);
    }

    fn count_up(&self) {
        let seen = self.protected.load(Ordering::Relaxed);
        self.protected.store(seen + 1, Ordering::Relaxed);
    }

    fn protected(&self) -> u32 {
        self.protected.load(Ordering::Relaxed)
    }
}

#[test]
fn two_exclude_each_other_and_none_sleeps_for_ever() {
    loom::model(|| {
        let shared = Shared::new();
        let other = {
            let shared = shared.clone();
            thread::spawn(move || (shared.work(1), shared.work(1)))
        };
        assert_eq!(shared.work(0), None);
        assert_eq!(other.join().unwrap(), (None, None));
        assert_eq!(shared.protected(), 3);
        assert_eq!(shared.word.owner(), None);
    });
}

#[test]
fn unlock_wakes_one_waiter_after_the_other() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = Shared::new();
        let others: Vec<_> = (1..3)
            .map(|index| {
                let shared = shared.clone();
                thread::spawn(move || shared.work(index))
            })
            .collect();
        assert_eq!(shared.work(0), None);
        for other in others {
            assert_eq!(other.join().unwrap(), None);
        }
        assert_eq!(shared.protected(), 3);
    });
}

#[test]
fn dead_owners_lock_is_handed_over_to_a_waiter() {
    loom::model(|| {
        let shared = Shared::new();
        let mortal = {
            let shared = shared.clone();
            thread::spawn(move || shared.die_holding(1))
        };
        let told = shared.work(0);
        mortal.join().unwrap();
        // Whoever comes after the death is told of it; if nobody came in between, that is us, now.
        let told = told.or_else(|| shared.work(0));
        assert_eq!(told, Some(1));
        assert_eq!(shared.work(0), None);
        assert!(shared.protected() >= 3);
    });
}

#[test]
fn death_with_two_waiters_tells_one_and_lets_both_in() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let shared = Shared::new();
        let mortal = {
            let shared = shared.clone();
            thread::spawn(move || shared.die_holding(1))
        };
        let waiter = {
            let shared = shared.clone();
            thread::spawn(move || shared.work(2))
        };
        let told = shared.work(0);
        mortal.join().unwrap();
        let told_too = waiter.join().unwrap();
        let told_late = shared.work(0);
        let count = [told, told_too, told_late].iter().flatten().count();
        assert_eq!(count, 1);
    });
}

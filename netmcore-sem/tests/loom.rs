//! Guards against schedules that tests do not meet: two holders at once, a sleeper that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-sem --release --test loom`
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use netmcore_sem::current::{act_as, die};
use netmcore_sem::{Current, LockWord, OwnerId, Owners, WaitWord, announce_death};

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

/// Tokens, and those who wait for one.
struct Tokens {
    count: AtomicU32,
    word: WaitWord,
}

impl Tokens {
    fn new() -> Arc<Tokens> {
        Arc::new(Tokens {
            count: AtomicU32::new(0),
            word: WaitWord::new(),
        })
    }

    fn try_take(&self) -> Option<()> {
        let less = |count: u32| count.checked_sub(1);
        let taken = self
            .count
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        taken.ok().map(drop)
    }

    fn take(&self) {
        let taken = self.word.wait(&Current, None, None, || self.try_take());
        assert_eq!(taken, Some(()));
    }

    fn put(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.word.notify_one();
    }
}

/// Runs in a thread of its own that acts under `index`.
fn spawn<S: 'static>(
    shared: &Arc<S>,
    index: u32,
    body: impl FnOnce(&S) + 'static,
) -> thread::JoinHandle<()> {
    let shared = shared.clone();
    thread::spawn(move || {
        act_as(index);
        body(&shared);
    })
}

fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn waiter_misses_no_notify() {
    loom::model(|| {
        let tokens = Tokens::new();
        let taker = spawn(&tokens, 1, Tokens::take);
        tokens.put();
        taker.join().unwrap();
    });
}

#[test]
fn two_notifies_in_a_row_wake_two() {
    bounded(3, || {
        let tokens = Tokens::new();
        let takers = [1, 2].map(|index| spawn(&tokens, index, Tokens::take));
        tokens.put();
        tokens.put();
        for taker in takers {
            taker.join().unwrap();
        }
    });
}

#[test]
fn two_notifiers_wake_two() {
    bounded(2, || {
        let tokens = Tokens::new();
        let other = spawn(&tokens, 1, Tokens::put);
        let takers = [2, 3].map(|index| spawn(&tokens, index, Tokens::take));
        tokens.put();
        for thread in takers.into_iter().chain([other]) {
            thread.join().unwrap();
        }
    });
}

/// The word that the first notify leaves behind, cleared or not, serves the next.
#[test]
fn waiter_that_comes_again_misses_no_notify() {
    bounded(4, || {
        let tokens = Tokens::new();
        let taker = spawn(&tokens, 1, |tokens| {
            tokens.take();
            tokens.take();
        });
        tokens.put();
        tokens.put();
        taker.join().unwrap();
    });
}

#[test]
fn notify_all_wakes_all() {
    bounded(3, || {
        let tokens = Tokens::new();
        let open = |tokens: &Tokens| {
            let is_open = || (tokens.count.load(Ordering::SeqCst) == 1).then_some(());
            tokens.word.wait(&Current, None, None, is_open);
        };
        let waiters = [1, 2].map(|index| spawn(&tokens, index, open));
        tokens.count.store(1, Ordering::SeqCst);
        tokens.word.notify_all();
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

#[test]
fn death_between_change_and_notify_loses_nothing() {
    bounded(3, || {
        let tokens = Tokens::new();
        let mortal = spawn(&tokens, 1, |tokens| {
            tokens.count.fetch_add(1, Ordering::SeqCst);
            die();
        });
        let taker = spawn(&tokens, 2, Tokens::take);
        mortal.join().unwrap();
        taker.join().unwrap();
    });
}

/// Of two that wait, one dies as soon as it could have had what both wait for.
#[test]
fn death_with_the_only_wake_wakes_another() {
    bounded(3, || {
        let tokens = Tokens::new();
        let mortal = spawn(&tokens, 1, |tokens| {
            let has_some = || (tokens.count.load(Ordering::SeqCst) != 0).then_some(());
            tokens.word.wait(&Current, None, None, has_some);
            die();
        });
        let taker = spawn(&tokens, 2, |tokens| {
            tokens.take();
            // If the mortal still waits, it shall end too.
            tokens.put();
        });
        tokens.put();
        taker.join().unwrap();
        mortal.join().unwrap();
    });
}

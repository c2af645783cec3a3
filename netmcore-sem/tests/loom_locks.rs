//! Guards against schedules that tests do not meet: a value used by two, a death that nobody is told of, a waiter that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-sem --release --test loom_locks`
#![cfg(loom)]

use loom::cell::Cell;
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use netmcore_sem::current::{act_as, die};
use netmcore_sem::{
    ErrorChecking, LockError, OwnerDied, Recursive, ShmCondvar, ShmMutex, ShmMutexGuard,
};

/// A number that loom watches: two that use it at once, or one that does not see the last change, are errors.
type Watched = Cell<u32>;

fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Runs in a thread of its own that acts under `index`.
fn spawn<S: 'static, R: 'static>(
    shared: &Arc<S>,
    index: u32,
    body: impl FnOnce(&S) -> R + 'static,
) -> JoinHandle<R> {
    let shared = shared.clone();
    thread::spawn(move || {
        act_as(index);
        body(&shared)
    })
}

fn add(number: &Watched) {
    number.set(number.get() + 1);
}

fn mutex() -> Arc<ShmMutex<Watched>> {
    Arc::new(ShmMutex::new(Cell::new(0)))
}

/// Counts up, and says who had died.
fn work(mutex: &ShmMutex<Watched>) -> Option<u32> {
    match mutex.lock() {
        Ok(guard) => {
            add(&guard);
            None
        }
        Err(died) => {
            add(&died.guard);
            Some(died.owner.index)
        }
    }
}

#[test]
fn holders_exclude_each_other() {
    bounded(4, || {
        let mutex = mutex();
        let other = spawn(&mutex, 1, |mutex| (work(mutex), work(mutex)));
        assert_eq!(work(&mutex), None);
        assert_eq!(other.join().unwrap(), (None, None));
        assert_eq!(mutex.lock().unwrap().get(), 3);
    });
}

#[test]
fn death_of_the_holder_is_told_to_one_with_what_it_did() {
    bounded(3, || {
        let mutex = mutex();
        let mortal = spawn(&mutex, 1, |mutex| {
            let guard = match mutex.lock() {
                Ok(guard) => guard,
                Err(_) => panic!("nobody has died"),
            };
            add(&guard);
            std::mem::forget(guard);
            die();
        });
        let waiter = spawn(&mutex, 2, work);
        let told = work(&mutex);
        let told_too = waiter.join().unwrap();
        mortal.join().unwrap();
        let told_late = work(&mutex);
        let told: Vec<u32> = [told, told_too, told_late].into_iter().flatten().collect();
        assert_eq!(told, [1]);
        assert_eq!(mutex.lock().unwrap().get(), 4);
    });
}

/// Of two that wait for the lock of a dead one, one is told and dies: the other is told of that.
#[test]
fn death_of_the_one_that_was_told_is_told() {
    bounded(4, || {
        let mutex = mutex();
        act_as(3);
        std::mem::forget(mutex.lock());
        die();
        act_as(0);
        let mortal = spawn(&mutex, 1, |mutex| {
            let told = match mutex.lock() {
                Ok(guard) => {
                    std::mem::forget(guard);
                    None
                }
                Err(OwnerDied { owner, guard }) => {
                    std::mem::forget(guard);
                    Some(owner.index)
                }
            };
            die();
            told
        });
        let told = work(&mutex);
        let mortal_was_told = mortal.join().unwrap();
        let told_late = work(&mutex);
        let was_first = mortal_was_told == Some(3);
        match (told, told_late) {
            (Some(3), Some(1)) => assert!(!was_first),
            (Some(1), None) => assert!(was_first),
            other => panic!("{other:?}, and the mortal {mortal_was_told:?}"),
        }
    });
}

#[test]
fn what_is_given_up_is_told_to_the_next() {
    bounded(4, || {
        let mutex = mutex();
        let other = spawn(&mutex, 1, |mutex| {
            ShmMutexGuard::give_up(match mutex.lock() {
                Ok(guard) => guard,
                Err(_) => panic!("nobody has died"),
            });
        });
        let told = work(&mutex);
        other.join().unwrap();
        let told_late = work(&mutex);
        assert_eq!([told, told_late].iter().flatten().count(), 1);
        assert_eq!(told.or(told_late), Some(1));
        assert!(!mutex.is_in_doubt());
    });
}

#[test]
fn recursive_holds_end_with_the_last() {
    bounded(4, || {
        let mutex: Arc<ShmMutex<Watched, Recursive>> = Arc::new(ShmMutex::with_kind(Cell::new(0)));
        let work = |mutex: &ShmMutex<Watched, Recursive>| {
            let outer = mutex.lock().ok().unwrap();
            let inner = mutex.lock().ok().unwrap();
            add(&inner);
            drop(outer);
            add(&inner);
        };
        let other = spawn(&mutex, 1, work);
        work(&mutex);
        other.join().unwrap();
        assert_eq!(mutex.lock().ok().unwrap().get(), 4);
        assert!(mutex.owner().is_none());
    });
}

#[test]
fn error_checking_waits_for_others_and_not_for_itself() {
    bounded(4, || {
        let mutex: Arc<ShmMutex<Watched, ErrorChecking>> =
            Arc::new(ShmMutex::with_kind(Cell::new(0)));
        let work = |mutex: &ShmMutex<Watched, ErrorChecking>| {
            let guard = mutex.lock().ok().unwrap();
            assert!(matches!(mutex.lock(), Err(LockError::WouldDeadlock)));
            add(&guard);
        };
        let other = spawn(&mutex, 1, work);
        work(&mutex);
        other.join().unwrap();
        assert_eq!(mutex.lock().ok().unwrap().get(), 2);
    });
}

/// Tokens, and those who wait for one.
struct Tokens {
    count: ShmMutex<Watched>,
    more: ShmCondvar,
}

impl Tokens {
    fn new() -> Arc<Tokens> {
        Arc::new(Tokens {
            count: ShmMutex::new(Cell::new(0)),
            more: ShmCondvar::new(),
        })
    }

    fn lock(&self) -> ShmMutexGuard<'_, Watched> {
        self.count.lock().unwrap_or_else(|died| died.guard)
    }

    /// Waits until there is one. Says whether it was told of a death.
    fn await_one(&self) -> (ShmMutexGuard<'_, Watched>, bool) {
        let mut is_told = false;
        let mut guard = self.count.lock().unwrap_or_else(|died| {
            is_told = true;
            died.guard
        });
        while guard.get() == 0 {
            guard = self.more.wait(guard).unwrap_or_else(|died| {
                is_told = true;
                died.guard
            });
        }
        (guard, is_told)
    }

    fn take(&self) -> bool {
        let (guard, is_told) = self.await_one();
        guard.set(guard.get() - 1);
        is_told
    }

    fn put(&self) {
        add(&self.lock());
        self.more.notify_one();
    }
}

#[test]
fn waiter_misses_no_notification() {
    bounded(4, || {
        let tokens = Tokens::new();
        let taker = spawn(&tokens, 1, Tokens::take);
        tokens.put();
        assert!(!taker.join().unwrap());
    });
}

#[test]
fn notification_under_the_lock_is_as_good() {
    bounded(4, || {
        let tokens = Tokens::new();
        let taker = spawn(&tokens, 1, Tokens::take);
        let guard = tokens.lock();
        add(&guard);
        tokens.more.notify_one();
        drop(guard);
        taker.join().unwrap();
    });
}

#[test]
fn two_notifications_wake_two() {
    bounded(3, || {
        let tokens = Tokens::new();
        let takers = [1, 2].map(|index| spawn(&tokens, index, Tokens::take));
        tokens.put();
        tokens.put();
        for taker in takers {
            taker.join().unwrap();
        }
        assert_eq!(tokens.lock().get(), 0);
    });
}

#[test]
fn notify_all_wakes_all() {
    bounded(3, || {
        let tokens = Tokens::new();
        let waiters = [1, 2].map(|index| spawn(&tokens, index, |tokens| drop(tokens.await_one())));
        add(&tokens.lock());
        tokens.more.notify_all();
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// What it has put is seen, though nobody is notified.
#[test]
fn death_before_the_notification_wakes_the_waiter() {
    bounded(4, || {
        let tokens = Tokens::new();
        let mortal = spawn(&tokens, 1, |tokens| {
            add(&tokens.lock());
            die();
        });
        let taker = spawn(&tokens, 2, Tokens::take);
        mortal.join().unwrap();
        assert!(!taker.join().unwrap());
    });
}

#[test]
fn death_of_a_holder_wakes_the_waiter_and_tells_it() {
    bounded(4, || {
        let tokens = Tokens::new();
        let mortal = spawn(&tokens, 1, |tokens| {
            let guard = tokens.lock();
            add(&guard);
            std::mem::forget(guard);
            die();
        });
        let taker = spawn(&tokens, 2, Tokens::take);
        mortal.join().unwrap();
        assert!(taker.join().unwrap());
    });
}

/// Two wait and one is notified; the one that has got it dies before it takes anything.
#[test]
fn death_with_the_only_wake_wakes_another() {
    bounded(3, || {
        let tokens = Tokens::new();
        let mortal = spawn(&tokens, 1, |tokens| {
            drop(tokens.await_one());
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

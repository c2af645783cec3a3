//! Guards against schedules that tests do not meet: a writer among readers, a permit that two have, what the dead held and nobody gets,
//! a waiter that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-sem --release --test loom_permits`
#![cfg(loom)]

use loom::cell::Cell;
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use netmcore_sem::current::{act_as, die};
use netmcore_sem::{
    BarrierError, LockError, ShmBarrier, ShmEvent, ShmOnce, ShmReadGuard, ShmRwLock, ShmSemaphore,
    ShmWriteGuard,
};

/// A number that loom watches: one that changes it while another uses it, or does not see the last change, is an error.
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

/// Does it under `index`, and is dead.
fn die_after<R>(index: u32, body: impl FnOnce() -> R) {
    act_as(index);
    std::mem::forget(body());
    die();
    act_as(0);
}

fn add(number: &Watched) {
    number.set(number.get() + 1);
}

type RwLock<const READERS: usize> = ShmRwLock<Watched, READERS>;

fn rwlock<const READERS: usize>() -> Arc<RwLock<READERS>> {
    Arc::new(ShmRwLock::new(Cell::new(0)))
}

/// A guard, and who died.
fn read<const READERS: usize>(
    lock: &RwLock<READERS>,
) -> (ShmReadGuard<'_, Watched, READERS>, Option<u32>) {
    match lock.read() {
        Ok(guard) => (guard, None),
        Err(LockError::OwnerDied(died)) => (died.guard, Some(died.owner.index)),
        Err(other) => panic!("{other}"),
    }
}

/// As [`read`].
fn write<const READERS: usize>(
    lock: &RwLock<READERS>,
) -> (ShmWriteGuard<'_, Watched, READERS>, Option<u32>) {
    match lock.write() {
        Ok(guard) => (guard, None),
        Err(LockError::OwnerDied(died)) => (died.guard, Some(died.owner.index)),
        Err(other) => panic!("{other}"),
    }
}

/// Counts up; says who died.
fn count<const READERS: usize>(lock: &RwLock<READERS>) -> Option<u32> {
    let (guard, died) = write(lock);
    add(&guard);
    died
}

/// Reads it twice, in vain if it is changed meanwhile; says who died.
fn look<const READERS: usize>(lock: &RwLock<READERS>) -> Option<u32> {
    let (guard, died) = read(lock);
    let seen = guard.get();
    assert_eq!(guard.get(), seen);
    died
}

#[test]
fn writers_exclude_readers_and_each_other() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let reader = spawn(&lock, 1, look);
        let writer = spawn(&lock, 2, count);
        assert_eq!(count(&lock), None);
        assert_eq!(reader.join().unwrap(), None);
        assert_eq!(writer.join().unwrap(), None);
        assert_eq!(lock.read().unwrap().get(), 2);
    });
}

#[test]
fn readers_and_a_writer_take_turns() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let reader = spawn(&lock, 1, |lock| (look(lock), look(lock)));
        assert_eq!((count(&lock), count(&lock)), (None, None));
        assert_eq!(reader.join().unwrap(), (None, None));
        assert_eq!(lock.reader_count(), 0);
    });
}

#[test]
fn writer_is_woken_by_the_last_of_two_readers() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let one = lock.read().unwrap();
        let writer = spawn(&lock, 1, count);
        let reader = spawn(&lock, 2, look);
        drop(one);
        assert_eq!(reader.join().unwrap(), None);
        assert_eq!(writer.join().unwrap(), None);
    });
}

#[test]
fn reader_does_not_wait_for_a_writer_that_waits_for_it() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let outer = lock.read().unwrap();
        let writer = spawn(&lock, 1, count);
        let inner = lock.read().unwrap();
        assert_eq!((outer.get(), inner.get()), (0, 0));
        drop((outer, inner));
        writer.join().unwrap();
    });
}

/// One that only tries to read takes a place for a moment; one that has found none because of that is woken.
#[test]
fn place_taken_for_a_moment_is_not_missed() {
    bounded(3, || {
        let lock = rwlock::<1>();
        let written = write(&lock).0;
        let trying = spawn(&lock, 1, |lock| drop(lock.try_read()));
        let reader = spawn(&lock, 2, look);
        drop(written);
        assert_eq!(reader.join().unwrap(), None);
        trying.join().unwrap();
    });
}

#[test]
fn readers_wait_for_a_place() {
    bounded(2, || {
        let lock = rwlock::<1>();
        let readers = [1, 2].map(|index| spawn(&lock, index, look));
        look(&lock);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), None);
        }
    });
}

#[test]
fn downgraded_lock_lets_readers_in_and_no_writer() {
    bounded(2, || {
        let lock = rwlock::<2>();
        let writer = spawn(&lock, 1, count);
        let reader = spawn(&lock, 2, look);
        let (guard, _) = write(&lock);
        add(&guard);
        let seen = guard.get();
        let guard = ShmWriteGuard::downgrade(guard);
        assert_eq!(guard.get(), seen);
        drop(guard);
        writer.join().unwrap();
        reader.join().unwrap();
        assert_eq!(lock.read().unwrap().get(), 2);
    });
}

#[test]
fn place_of_a_dead_reader_is_free() {
    bounded(2, || {
        let lock = rwlock::<1>();
        let mortal = spawn(&lock, 1, |lock| {
            std::mem::forget(read(lock));
            die();
        });
        let reader = spawn(&lock, 2, look);
        assert_eq!(count(&lock), None);
        assert_eq!(reader.join().unwrap(), None);
        mortal.join().unwrap();
        assert_eq!(count(&lock), None);
    });
}

#[test]
fn death_of_a_writer_is_told_until_it_is_mended() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let mortal = spawn(&lock, 1, |lock| {
            let (guard, _) = write(lock);
            add(&guard);
            let left = guard.get();
            std::mem::forget(guard);
            die();
            left
        });
        let reader = spawn(&lock, 2, |lock| {
            let (guard, died) = read(lock);
            (guard.get(), died)
        });
        let told = count(&lock);
        let (seen, reader_told) = reader.join().unwrap();
        let left = mortal.join().unwrap();
        if reader_told.is_some() {
            assert_eq!((reader_told, seen), (Some(1), left));
        } else {
            assert_ne!(seen, left, "in doubt, and not told");
        }
        let told: Vec<u32> = [told, count(&lock)].into_iter().flatten().collect();
        assert_eq!(told, [1]);
        assert_eq!(look(&lock), None);
    });
}

/// It waits for readers, and has changed nothing.
#[test]
fn death_of_a_writer_that_is_not_in_is_told_to_nobody() {
    bounded(3, || {
        let lock = rwlock::<2>();
        let held = lock.read().unwrap();
        let mortal = spawn(&lock, 1, |lock| {
            std::mem::forget(lock.try_write());
            die();
        });
        let writer = spawn(&lock, 2, count);
        drop(held);
        mortal.join().unwrap();
        // If the mortal was in it was told of, once.
        let told = writer.join().unwrap();
        assert!(told.is_none() || told == Some(1));
        assert!(!lock.is_in_doubt() || told.is_none());
    });
}

/// A semaphore, and what its only permit allows to use.
struct Licence<const HOLDERS: usize> {
    permits: ShmSemaphore<HOLDERS>,
    used: Watched,
}

fn licence<const HOLDERS: usize>(permits: u32) -> Arc<Licence<HOLDERS>> {
    Arc::new(Licence {
        permits: ShmSemaphore::new(permits),
        used: Cell::new(0),
    })
}

impl<const HOLDERS: usize> Licence<HOLDERS> {
    fn work(&self) {
        let permit = self.permits.acquire(1);
        add(&self.used);
        drop(permit);
    }
}

#[test]
fn one_permit_is_held_by_one() {
    bounded(3, || {
        let licence = licence::<2>(1);
        let other = spawn(&licence, 1, Licence::work);
        licence.work();
        other.join().unwrap();
        licence.work();
        assert_eq!(licence.used.get(), 3);
        assert_eq!(licence.permits.available(), 1);
    });
}

#[test]
fn permits_of_the_dead_come_back() {
    bounded(3, || {
        let licence = licence::<2>(1);
        let mortal = spawn(&licence, 1, |licence| {
            std::mem::forget(licence.permits.acquire(1));
            die();
        });
        licence.work();
        mortal.join().unwrap();
        licence.work();
        assert_eq!(licence.permits.available(), 1);
    });
}

#[test]
fn place_of_the_dead_is_used_and_its_permits_are_counted() {
    bounded(3, || {
        let permits: Arc<ShmSemaphore<1>> = Arc::new(ShmSemaphore::new(3));
        die_after(3, || permits.acquire(2));
        let other = spawn(&permits, 1, |permits| drop(permits.acquire(1)));
        drop(permits.acquire(1));
        other.join().unwrap();
        assert_eq!(permits.available(), 3);
        assert_eq!(permits.acquire(3).count(), 3);
    });
}

#[test]
fn place_given_back_wakes_one_that_waits_for_it() {
    bounded(2, || {
        let permits: Arc<ShmSemaphore<1>> = Arc::new(ShmSemaphore::new(2));
        let takers = [1, 2].map(|index| spawn(&permits, index, |permits| drop(permits.acquire(1))));
        drop(permits.acquire(1));
        for taker in takers {
            taker.join().unwrap();
        }
        assert_eq!(permits.available(), 2);
    });
}

#[test]
fn posts_wake_as_many() {
    bounded(3, || {
        let permits: Arc<ShmSemaphore<1>> = Arc::new(ShmSemaphore::new(0));
        let waiters = [1, 2].map(|index| spawn(&permits, index, |permits| permits.wait()));
        permits.post(1);
        permits.post(1);
        for waiter in waiters {
            waiter.join().unwrap();
        }
        assert_eq!((permits.available(), permits.total()), (0, 0));
    });
}

/// The one that is woken has no place; the other needs none.
#[test]
fn permit_without_a_place_goes_to_one_that_needs_none() {
    bounded(2, || {
        let permits: Arc<ShmSemaphore<1>> = Arc::new(ShmSemaphore::new(1));
        let held = permits.acquire(1);
        let needs_a_place = spawn(&permits, 1, |permits| drop(permits.acquire(1)));
        let needs_none = spawn(&permits, 2, |permits| permits.wait());
        permits.post(1);
        needs_none.join().unwrap();
        drop(held);
        needs_a_place.join().unwrap();
    });
}

/// One wants both, the other one: whoever is woken, the other is woken after it.
#[test]
fn those_that_want_different_numbers_are_all_served() {
    bounded(2, || {
        let permits: Arc<ShmSemaphore<2>> = Arc::new(ShmSemaphore::new(2));
        let takers = [(1, 2), (2, 1)].map(|(index, count)| {
            spawn(&permits, index, move |permits| drop(permits.acquire(count)))
        });
        drop(permits.acquire(1));
        for taker in takers {
            taker.join().unwrap();
        }
        assert_eq!(permits.available(), 2);
    });
}

#[test]
fn death_after_a_post_leaves_what_it_posted() {
    bounded(4, || {
        let permits: Arc<ShmSemaphore<1>> = Arc::new(ShmSemaphore::new(0));
        let mortal = spawn(&permits, 1, |permits| {
            permits.post(1);
            die();
        });
        permits.wait();
        mortal.join().unwrap();
        assert_eq!(permits.available(), 0);
    });
}

#[test]
fn all_pass_a_barrier_and_one_leads() {
    bounded(3, || {
        let barrier: Arc<ShmBarrier<2>> = Arc::new(ShmBarrier::new(2));
        let meet = |barrier: &ShmBarrier<2>| {
            let me = barrier.join().unwrap();
            [(); 2].map(|()| u32::from(me.wait().unwrap().is_leader()))
        };
        let other = spawn(&barrier, 1, meet);
        let (mine, other) = (meet(&barrier), other.join().unwrap());
        // In the second phase the other one may have left already.
        assert_eq!(mine[0] + other[0], 1);
        assert_eq!(mine[1] + other[1], 1);
        assert_eq!(barrier.phase(), 2);
    });
}

#[test]
fn death_before_a_barrier_ends_the_wait_and_after_it_does_not() {
    bounded(4, || {
        let barrier: Arc<ShmBarrier<2>> = Arc::new(ShmBarrier::new(2));
        let mortal = spawn(&barrier, 1, |barrier| {
            std::mem::forget(barrier.join());
            die();
        });
        let me = barrier.join().unwrap();
        let died = me.wait().unwrap_err();
        assert!(matches!(died, BarrierError::ParticipantDied { owner } if owner.index == 1));
        mortal.join().unwrap();
        let other = spawn(&barrier, 2, |barrier| barrier.join().unwrap().wait());
        // Until it has come, this one is told again.
        while me.wait().is_err() {
            thread::yield_now();
        }
        assert!(other.join().unwrap().is_ok());
    });
}

/// One of three is slow: that does not keep the death from the one that waits.
#[test]
fn death_is_told_before_all_others_have_arrived() {
    bounded(3, || {
        let barrier: Arc<ShmBarrier<3>> = Arc::new(ShmBarrier::new(3));
        act_as(2);
        let slow = barrier.join().unwrap();
        act_as(0);
        let mortal = spawn(&barrier, 1, |barrier| {
            std::mem::forget(barrier.join());
            die();
        });
        assert!(barrier.join().unwrap().wait().is_err());
        mortal.join().unwrap();
        drop(slow);
    });
}

#[test]
fn what_is_done_once_is_done_by_one_and_seen_by_all() {
    bounded(3, || {
        struct Made(ShmOnce, Watched);
        let made = Arc::new(Made(ShmOnce::new(), Cell::new(0)));
        let make = |made: &Made| {
            made.0.call_once(|| add(&made.1));
            made.1.get()
        };
        let other = spawn(&made, 1, make);
        let waiter = spawn(&made, 2, |made: &Made| {
            made.0.wait();
            made.1.get()
        });
        assert_eq!(make(&made), 1);
        assert_eq!((other.join().unwrap(), waiter.join().unwrap()), (1, 1));
    });
}

#[test]
fn what_the_dead_had_begun_is_done_by_the_next() {
    bounded(3, || {
        let once = Arc::new(ShmOnce::new());
        let mortal = spawn(&once, 1, |once| {
            let mut has_begun = false;
            once.call_once(|| has_begun = true);
            die();
            has_begun
        });
        let waiter = spawn(&once, 2, |once| once.wait());
        let mut have_done = false;
        once.call_once(|| have_done = true);
        assert_ne!(mortal.join().unwrap(), have_done);
        waiter.join().unwrap();
    });
}

#[test]
fn event_that_is_set_ends_all_waits_though_its_setter_dies() {
    bounded(2, || {
        let event = Arc::new(ShmEvent::new());
        let waiters = [1, 2].map(|index| spawn(&event, index, |event| event.wait()));
        let mortal = spawn(&event, 3, |event| {
            event.set();
            die();
        });
        for waiter in waiters {
            waiter.join().unwrap();
        }
        mortal.join().unwrap();
    });
}

/// It may not be set any more when the one runs that has slept for it.
#[test]
fn event_that_is_set_and_reset_ends_the_wait_of_one_that_sleeps() {
    bounded(4, || {
        let event = Arc::new(ShmEvent::new());
        let waiter = spawn(&event, 1, |event| event.wait());
        let resetter = spawn(&event, 2, |event| event.reset());
        let is_awaited = event.is_awaited();
        event.set();
        event.reset();
        resetter.join().unwrap();
        if !is_awaited {
            event.set();
        }
        waiter.join().unwrap();
    });
}

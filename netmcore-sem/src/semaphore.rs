//! Permits that are given back when their holder dies: [`ShmSemaphore`].
//!
//! **Protocol.** *Total* is how many permits there are. Each thread that holds some has a *place*: who it is, and how many. Those that nobody holds are
//! *available*: total less what the places say. A [`LockWord`] is held while any of this is changed; the number of available ones is kept as well,
//! and is counted anew when the last holder of the lock died.
//!
//! | step | committed by one store | died before it | died after it |
//! |---|---|---|---|
//! | take the first | the place's owner, its count being there | nothing was taken | the holder is dead: they come back |
//! | take more | the place's count | nothing was taken | likewise |
//! | give back some | the place's count | the holder is dead: they come back | – |
//! | give back the last | the place's owner := 0 | likewise | – |
//! | post | total | nothing was posted | it was |
//! | wait | total | nothing was taken | it was taken, and is gone |
//! | forget | total, then the place | the holder is dead: they come back | they are gone, and the holder's place is freed |
//!
//! Who finds too few available looks for places of the dead, and frees them.
//!
//! **Invariants.**
//! 1. Total, places and the number of available ones are changed by the holder of the lock only.
//! 2. A thread has one place at most.
//! 3. A place is given back by its owner only: permits that outlive their owner's id (in a destructor at the end of a thread) have come back
//!    already.
//!
//! **If a process dies here.** The table. Those that wait look again when a death is announced.
//!
//! **Not here.** Fairness: who wants several may wait while others take one at a time.

use crate::current::{Current, fork_epoch};
use crate::lock_error::LockError;
use crate::owner::{OwnerId, Owners};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence_in_models};
use crate::wait::{Asks, WaitWord};
use crate::word::{LockGuard, LockWord, held_by, owner_of};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

const EMPTY: u64 = 0;
/// Of waits.
const NO_DEADLINE: &str = "a wait without a deadline ends by what it waits for";
/// For so long nobody has the lock who runs, or the machine does nothing else.
const STALL: Duration = Duration::from_millis(100);

/// How long the lock is waited for.
#[derive(Clone, Copy)]
enum Patience {
    Endless,
    /// Until then, and for [`STALL`] at least.
    Until(Instant),
    /// For [`STALL`].
    Stall,
}

/// A counting semaphore in shared memory for threads of many processes.
///
/// In its first use permits are *held*: [`acquire`](Self::acquire) gives a guard, and dropping that gives them back. In its second use, that of a classical
/// semaphore, they are nobody's: [`wait`](Self::wait) takes one for good, and [`post`](Self::post) makes one, in any thread. Both may be mixed.
///
/// `HOLDERS`, at least 1, is how many threads can hold permits at the same time; one more waits as if there were too few. Zeroed memory is a semaphore without permits.
/// No system call unless somebody waits.
///
/// # If a process dies
///
/// Permits that it held come back at once. Permits that it took by `wait` do not: they were nobody's.
///
/// ```
/// use netmcore_sem::ShmSemaphore;
///
/// let licences = <ShmSemaphore>::new(3);
/// let two = licences.acquire(2);
/// assert!(licences.try_acquire(2).is_none());
/// drop(two);
/// std::thread::scope(|scope| {
///     scope.spawn(|| std::mem::forget(licences.acquire(3))); // dies holding all
/// });
/// assert_eq!(licences.acquire(3).count(), 3);
///
/// licences.post(1); // one more, for whoever waits
/// assert_eq!(licences.available(), 4);
/// assert!(licences.try_wait());
/// assert_eq!(licences.available(), 3);
/// ```
#[doc(alias = "Netmcore_sem")]
pub struct ShmSemaphore<const HOLDERS: usize = 32> {
    lock: LockWord,
    total: AtomicU32,
    available: AtomicU32,
    waiters: WaitWord,
    /// 1 once somebody has waited for more than one permit, or for a place: those that wait are not alike, so that it is not enough to wake any one.
    is_mixed: AtomicU32,
    places: [Place; HOLDERS],
}

struct Place {
    owner: AtomicU64,
    count: AtomicU64,
}

#[cfg(not(loom))]
impl<const HOLDERS: usize> ShmSemaphore<HOLDERS> {
    /// A semaphore with so many permits.
    #[doc(alias = "Netmcore_sem.create")]
    pub const fn new(permits: u32) -> ShmSemaphore<HOLDERS> {
        const {
            assert!(
                HOLDERS >= 1,
                "a semaphore has a place for one holder at least"
            )
        };
        ShmSemaphore {
            lock: LockWord::new(),
            total: AtomicU32::new(permits),
            available: AtomicU32::new(permits),
            waiters: WaitWord::new(),
            is_mixed: AtomicU32::new(0),
            places: [const {
                Place {
                    owner: AtomicU64::new(EMPTY),
                    count: AtomicU64::new(0),
                }
            }; HOLDERS],
        }
    }
}

#[cfg(loom)]
impl<const HOLDERS: usize> ShmSemaphore<HOLDERS> {
    /// A semaphore with so many permits.
    pub fn new(permits: u32) -> ShmSemaphore<HOLDERS> {
        ShmSemaphore {
            lock: LockWord::new(),
            total: AtomicU32::new(permits),
            available: AtomicU32::new(permits),
            waiters: WaitWord::new(),
            is_mixed: AtomicU32::new(0),
            places: std::array::from_fn(|_| Place {
                owner: AtomicU64::new(EMPTY),
                count: AtomicU64::new(0),
            }),
        }
    }
}

impl<const HOLDERS: usize> ShmSemaphore<HOLDERS> {
    /// The highest number of permits.
    pub const MAX_PERMITS: u32 = u32::MAX;

    /// Takes `count` permits, waiting without limit until so many are available.
    ///
    /// # Blocking
    ///
    /// Until there are so many: spins briefly, then sleeps. If there are fewer altogether, for ever.
    ///
    /// # If a process dies
    ///
    /// Its permits come back, and the wait goes on with them.
    #[inline]
    pub fn acquire(&self, count: u32) -> ShmPermits<'_, HOLDERS> {
        let mine = held_by(Current.me());
        let take = |asks| self.take(mine, count, asks, Patience::Endless);
        let place = take(Asks::Nobody).or_else(|| self.wait_for(None, take));
        self.permits(mine, place.expect(NO_DEADLINE), count)
    }

    /// Takes `count` permits if so many are available.
    ///
    /// # Blocking
    ///
    /// For the moment in which another one takes or gives back; 0.1 s if that one is stopped in the middle of it, and then it is `None`.
    pub fn try_acquire(&self, count: u32) -> Option<ShmPermits<'_, HOLDERS>> {
        let mine = held_by(Current.me());
        let place = self.take(mine, count, Asks::WhoLives, Patience::Stall)?;
        Some(self.permits(mine, place, count))
    }

    /// Takes `count` permits, waiting until `deadline` at most; `None` if there were too few to the end.
    ///
    /// # Blocking
    ///
    /// As [`acquire`](Self::acquire), until the deadline. With a deadline in the past: as [`try_acquire`](Self::try_acquire).
    pub fn acquire_deadline(
        &self,
        count: u32,
        deadline: Instant,
    ) -> Option<ShmPermits<'_, HOLDERS>> {
        let mine = held_by(Current.me());
        let take = |asks| self.take(mine, count, asks, Patience::Until(deadline));
        let place = self.wait_for(Some(deadline.into()), take)?;
        Some(self.permits(mine, place, count))
    }

    /// Makes `count` more permits, which nobody holds.
    ///
    /// # Panics
    ///
    /// If there would be more than [`MAX_PERMITS`](Self::MAX_PERMITS).
    ///
    /// # If a process dies
    ///
    /// They were made or not; if they were, somebody that waits has them.
    #[doc(alias = "Netmcore_sem.post")]
    pub fn post(&self, count: u32) {
        let locked = self.lock();
        let total = self.total.load(Ordering::Relaxed);
        let more = total.checked_add(count);
        assert!(
            more.is_some(),
            "{total} permits and {count} more are too many for a semaphore"
        );
        self.total.store(more.unwrap_or(total), Ordering::Relaxed);
        crash_point!("sem.semaphore.posted");
        self.add_available(count);
        self.tell(locked, count);
    }

    /// Takes a permit for good, waiting without limit until one is available.
    ///
    /// # Blocking
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # If a process dies
    ///
    /// That has taken it: it is gone.
    #[doc(alias = "Netmcore_sem.wait")]
    pub fn wait(&self) {
        let take = |asks| self.take_one(asks, Patience::Endless);
        let taken = take(Asks::Nobody).or_else(|| self.wait_for(None, take));
        taken.expect(NO_DEADLINE);
    }

    /// Takes a permit for good if one is available.
    ///
    /// # Blocking
    ///
    /// As [`try_acquire`](Self::try_acquire).
    pub fn try_wait(&self) -> bool {
        self.take_one(Asks::WhoLives, Patience::Stall).is_some()
    }

    /// Takes a permit for good, waiting until `deadline` at most; says whether it did.
    ///
    /// # Blocking
    ///
    /// As [`acquire`](Self::acquire), until the deadline. With a deadline in the past: as [`try_acquire`](Self::try_acquire).
    pub fn wait_deadline(&self, deadline: Instant) -> bool {
        let take = |asks| self.take_one(asks, Patience::Until(deadline));
        self.wait_for(Some(deadline.into()), take).is_some()
    }

    /// How many permits nobody alive holds. True only of the moment at which it was read.
    #[doc(alias = "Netmcore_sem.getvalue")]
    pub fn available(&self) -> u32 {
        let _locked = self.lock();
        self.free_dead(Asks::WhoLives);
        self.available.load(Ordering::Relaxed)
    }

    /// How many permits there are, held or not.
    pub fn total(&self) -> u32 {
        self.total.load(Ordering::SeqCst)
    }

    /// Who holds how many, the living only. True only of the moment at which it was read.
    pub fn holders(&self) -> Vec<(OwnerId, u32)> {
        let _locked = self.lock();
        self.free_dead(Asks::WhoLives);
        let held = |place: &Place| {
            let owner = owner_of(place.owner.load(Ordering::Relaxed))?;
            Some((owner, place.count.load(Ordering::Relaxed) as u32))
        };
        self.places.iter().filter_map(held).collect()
    }

    #[cold]
    fn wait_for<T>(
        &self,
        deadline: Option<Deadline>,
        mut attempt: impl FnMut(Asks) -> Option<T>,
    ) -> Option<T> {
        self.waiters.wait_asking(&Current, None, deadline, |asks| {
            fence_in_models();
            attempt(asks)
        })
    }

    /// Takes permits into the caller's place; the place.
    #[inline]
    fn take(&self, mine: u64, count: u32, asks: Asks, patience: Patience) -> Option<usize> {
        let locked = match patience {
            Patience::Endless => self.lock(),
            limited => self.lock_until(limited)?,
        };
        if self.available.load(Ordering::Relaxed) < count {
            self.free_dead(asks);
        }
        let is_enough = self.available.load(Ordering::Relaxed) >= count;
        let place = is_enough.then(|| self.place_of(mine, asks)).flatten();
        let Some(number) = place else {
            if (count != 1 || is_enough) && self.is_mixed.swap(1, Ordering::Relaxed) == 0 {
                drop(locked);
                // It may have been woken alone, for a permit that another one can take who needs no place.
                self.waiters.notify_all();
            }
            return None;
        };
        // Only now: if the place was a dead one's there are more than before.
        let available = self.available.load(Ordering::Relaxed) - count;
        let place = &self.places[number];
        let has = match place.owner.load(Ordering::Relaxed) {
            EMPTY => 0,
            _ => place.count.load(Ordering::Relaxed),
        };
        place.count.store(has + u64::from(count), Ordering::Relaxed);
        crash_point!("sem.semaphore.counted");
        place.owner.store(mine, Ordering::Release);
        crash_point!("sem.semaphore.taken");
        self.available.store(available, Ordering::Relaxed);
        Some(number)
    }

    /// The caller's place, or one that is empty.
    #[inline]
    fn place_of(&self, mine: u64, asks: Asks) -> Option<usize> {
        let first = (mine as u32 as usize) % HOLDERS;
        let owner = |number: usize| self.places[number].owner.load(Ordering::Relaxed);
        if owner(first) == mine {
            return Some(first);
        }
        let find = |wanted| {
            (first..HOLDERS)
                .chain(0..first)
                .find(|&number| owner(number) == wanted)
        };
        find(mine).or_else(|| find(EMPTY)).or_else(|| {
            self.free_dead(asks);
            find(EMPTY)
        })
    }

    /// Takes a permit from the total.
    fn take_one(&self, asks: Asks, patience: Patience) -> Option<()> {
        let _locked = match patience {
            Patience::Endless => self.lock(),
            limited => self.lock_until(limited)?,
        };
        if self.available.load(Ordering::Relaxed) == 0 {
            self.free_dead(asks);
        }
        let available = self.available.load(Ordering::Relaxed).checked_sub(1)?;
        self.total.fetch_sub(1, Ordering::Relaxed);
        crash_point!("sem.semaphore.waited");
        self.available.store(available, Ordering::Relaxed);
        Some(())
    }

    /// Gives permits of the caller's place back, or makes fewer of them altogether.
    fn put_back(&self, permits: &ShmPermits<'_, HOLDERS>, back: Back) {
        let count = permits.count;
        let locked = self.lock();
        let place = &self.places[permits.place];
        if place.owner.load(Ordering::Relaxed) != permits.mine {
            return;
        }
        if matches!(back, Back::Forgotten) {
            self.total.fetch_sub(count, Ordering::Relaxed);
            crash_point!("sem.semaphore.forgotten");
        }
        match place.count.load(Ordering::Relaxed) - u64::from(count) {
            0 => place.owner.store(EMPTY, Ordering::Relaxed),
            rest => place.count.store(rest, Ordering::Relaxed),
        }
        crash_point!("sem.semaphore.put_back");
        if matches!(back, Back::Available) {
            self.add_available(count);
        }
        // A place may be what somebody waits for.
        self.tell(locked, count.max(1));
    }

    fn add_available(&self, count: u32) {
        let available = self.available.load(Ordering::Relaxed);
        self.available.store(available + count, Ordering::Relaxed);
    }

    /// Unlocks, and wakes those that may go on now.
    #[inline]
    fn tell(&self, locked: LockGuard<'_>, count: u32) {
        // Under the lock: who makes them mixed later sees what was changed, and wakes all.
        let is_mixed = self.is_mixed.load(Ordering::Relaxed) != 0;
        drop(locked);
        if count == 1 && !is_mixed {
            self.waiters.notify_one();
        } else {
            self.waiters.notify_all();
        }
    }

    /// Frees the places of the dead.
    #[cold]
    fn free_dead(&self, asks: Asks) {
        let mut is_changed = false;
        for place in &self.places {
            let owner = owner_of(place.owner.load(Ordering::Relaxed));
            if owner.is_some_and(|owner| asks.is_dead(owner)) {
                place.owner.store(EMPTY, Ordering::Relaxed);
                crash_point!("sem.semaphore.dead_freed");
                is_changed = true;
            }
        }
        if is_changed {
            self.count_available();
        }
    }

    fn count_available(&self) {
        let held: u64 = self
            .places
            .iter()
            .filter(|place| place.owner.load(Ordering::Relaxed) != EMPTY)
            .map(|place| place.count.load(Ordering::Relaxed))
            .sum();
        let total = u64::from(self.total.load(Ordering::Relaxed));
        let available = total.saturating_sub(held) as u32;
        self.available.store(available, Ordering::Relaxed);
    }

    #[inline]
    fn lock(&self) -> LockGuard<'_> {
        match self.lock.lock(&Current) {
            Ok(guard) => guard,
            Err(died) => {
                self.count_available();
                died.guard
            }
        }
    }

    /// As [`lock`](Self::lock); `None` if another one has it for longer: that must be stopped.
    fn lock_until(&self, patience: Patience) -> Option<LockGuard<'_>> {
        let locked = match self.lock.try_lock(&Current) {
            Ok(Some(guard)) => return Some(guard),
            Ok(None) => {
                let least = Instant::now() + STALL;
                let deadline = match patience {
                    Patience::Until(deadline) => deadline.max(least),
                    _ => least,
                };
                self.lock.lock_deadline(&Current, deadline)
            }
            Err(died) => Err(LockError::OwnerDied(died)),
        };
        match locked {
            Ok(guard) => Some(guard),
            Err(LockError::OwnerDied(died)) => {
                self.count_available();
                Some(died.guard)
            }
            Err(_) => None,
        }
    }

    #[inline]
    fn permits(&self, mine: u64, place: usize, count: u32) -> ShmPermits<'_, HOLDERS> {
        ShmPermits {
            semaphore: self,
            place,
            mine,
            count,
            epoch: fork_epoch(),
            not_send: PhantomData,
        }
    }
}

/// Where permits go that a place has no more.
#[derive(Clone, Copy)]
enum Back {
    Available,
    Forgotten,
}

impl<const HOLDERS: usize> fmt::Debug for ShmSemaphore<HOLDERS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmSemaphore")
            .field("total", &self.total())
            .field("available", &self.available.load(Ordering::SeqCst))
            .finish_non_exhaustive()
    }
}

/// Permits of a [`ShmSemaphore`] that the calling thread holds; given back when this is dropped, or the thread is dead.
///
/// A forked copy of it holds nothing and gives back nothing.
///
/// ```compile_fail,E0277
/// let semaphore = <netmcore_sem::ShmSemaphore>::new(1);
/// let permit = semaphore.acquire(1);
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(permit)); // another thread
/// });
/// ```
#[must_use = "the permits are given back when it is dropped"]
pub struct ShmPermits<'a, const HOLDERS: usize = 32> {
    semaphore: &'a ShmSemaphore<HOLDERS>,
    place: usize,
    /// Whose place it is.
    mine: u64,
    count: u32,
    epoch: u64,
    not_send: PhantomData<*const ()>,
}

impl<const HOLDERS: usize> ShmPermits<'_, HOLDERS> {
    /// How many they are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Takes them out of the semaphore: there are fewer from now on, until somebody [posts](ShmSemaphore::post) as many.
    ///
    /// # If a process dies
    ///
    /// They are gone, or have come back.
    pub fn forget(self) {
        if self.epoch == fork_epoch() {
            self.semaphore.put_back(&self, Back::Forgotten);
        }
        std::mem::forget(self);
    }
}

impl<const HOLDERS: usize> Drop for ShmPermits<'_, HOLDERS> {
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            self.semaphore.put_back(self, Back::Available);
        }
    }
}

impl<const HOLDERS: usize> fmt::Debug for ShmPermits<'_, HOLDERS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmPermits")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// As when a process is stopped in the middle of a change.
    #[test]
    fn deadlines_hold_while_another_one_changes_it() {
        let semaphore = <ShmSemaphore>::new(2);
        std::thread::scope(|scope| {
            let stopped = semaphore.lock();
            let (tell, hear) = mpsc::channel();
            let semaphore = &semaphore;
            scope.spawn(move || {
                let soon = || Instant::now() + Duration::from_millis(20);
                let got = [
                    semaphore.acquire_deadline(1, soon()).is_some(),
                    semaphore.wait_deadline(soon()),
                    semaphore.wait_deadline(Instant::now()),
                    semaphore.try_acquire(1).is_some(),
                    semaphore.try_wait(),
                ];
                tell.send(got).unwrap();
                // It has been given up, and is there.
                semaphore.wait();
                tell.send([semaphore.try_wait(); 5]).unwrap();
            });
            let told = hear.recv_timeout(Duration::from_secs(60));
            drop(stopped);
            assert_eq!(told, Ok([false; 5]));
            assert_eq!(hear.recv(), Ok([true; 5]));
        });
    }
}

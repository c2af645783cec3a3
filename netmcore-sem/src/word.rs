//! A lock in one 64-bit word: spin briefly, then sleep; a dead owner's lock is handed over.
//!
//! **Protocol.** The word is `generation << 32 | contended << 31 | index + 1`, or 0. The low half is the futex.
//!
//! | word | means | its owner died |
//! |---|---|---|
//! | 0 | free; sleepers only if a wake-up is on its way | the one about to be woken died, or the one about to wake: the death wakes all; where nobody announces it, sleepers look |
//! | owner | held, nobody sleeps | the next to come takes it over by one CAS, and is told |
//! | owner, contended | held, somebody may sleep | the death wakes all; one of them takes it over, contended |
//!
//! * Lock: CAS 0 → owner. Unlock: CAS owner → 0. No system call, one CAS each.
//! * Else unlock swaps in 0 and wakes one sleeper. One that has slept takes the lock as contended, because it
//!   cannot know whether it was the last.
//! * A waiter reads the counter of deaths, then the word, then asks whether the owner lives. If not: CAS dead owner →
//!   itself, contended. If so: marks the word contended, and sleeps while the word and the counter are as read.
//!
//! **Invariants.**
//! 1. Whoever has changed the word from 0 or from a dead owner to itself holds the lock, until it changes it to 0.
//! 2. A live process sleeps only while the word is contended, or the wake for its sleep is under way, or a
//!    death is about to be announced.
//!
//! **If a process dies here.** The table. What the lock protects is in doubt then, and [`OwnerDied`] says so, once: the new
//! holder repairs it, or makes it known as broken, before it unlocks. If it dies in turn, the next is told again.
//!
//! **Not here.** Detecting that a holder locks again (it waits for itself; give a deadline), and fairness.

use crate::current::{Holding, fork_epoch};
use crate::lock_error::{LockError, OwnerDied};
use crate::owner::{Lasting, OwnerId, Owners, Waiting};
use crate::spin;
use crate::sync::{self, AtomicU64, Ordering, const_fn, low_half};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::fmt;
use std::time::{Duration, Instant};

const FREE: u64 = 0;
const CONTENDED: u64 = 1 << 31;

/// A lock for memory that processes share, all zeros when free. It lies at any address, the same or not.
///
/// It holds no data and no pointers. Owners are told apart by their [`OwnerId`]; who takes the lock twice under the same id
/// waits for itself.
///
/// ```
/// use netmcore_sem::{LockWord, SoloOwners};
///
/// let word = LockWord::new();
/// let guard = word.lock(&SoloOwners).unwrap();
/// assert!(word.try_lock(&SoloOwners).unwrap().is_none());
/// drop(guard);
/// assert!(word.try_lock(&SoloOwners).unwrap().is_some());
/// ```
#[repr(C, align(8))]
pub struct LockWord(AtomicU64);

/// How the slow path ended.
pub(crate) enum Outcome {
    Free,
    TakenOver(OwnerId),
    TimedOut,
}

impl LockWord {
    const_fn! {
        /// A free lock. So is zeroed memory.
        pub fn new() -> LockWord {
            LockWord(AtomicU64::new(FREE))
        }
    }

    /// Takes the lock, waiting for it without limit.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`] if the last owner died while it held the lock. The caller holds it then, by the guard inside.
    ///
    /// # Panics
    ///
    /// If the caller's index is not below [`OwnerId::INDEX_LIMIT`].
    ///
    /// # Blocking
    ///
    /// While a live owner holds it: spins briefly, then sleeps.
    pub fn lock<O: Owners + ?Sized>(
        &self,
        owners: &O,
    ) -> Result<LockGuard<'_>, OwnerDied<LockGuard<'_>>> {
        let mine = held_by(owners.me());
        if self.take_free(mine) {
            return Ok(self.guard(mine));
        }
        match self.lock_slow(mine, owners, None) {
            Outcome::TakenOver(owner) => Err(self.owner_died(owner, mine)),
            // Without a deadline nothing times out.
            Outcome::Free | Outcome::TimedOut => Ok(self.guard(mine)),
        }
    }

    /// Takes the lock, waiting for it until `deadline` at most.
    ///
    /// # Errors
    ///
    /// [`LockError::TimedOut`] if a live owner holds it to the end; [`LockError::OwnerDied`] as for [`lock`](Self::lock).
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    ///
    /// # Blocking
    ///
    /// As [`lock`](Self::lock), until the deadline. A deadline in the past does not block.
    pub fn lock_deadline<O: Owners + ?Sized>(
        &self,
        owners: &O,
        deadline: Instant,
    ) -> Result<LockGuard<'_>, LockError<LockGuard<'_>>> {
        let mine = held_by(owners.me());
        if self.take_free(mine) {
            return Ok(self.guard(mine));
        }
        let started = Instant::now();
        match self.lock_slow(mine, owners, Some(deadline.into())) {
            Outcome::Free => Ok(self.guard(mine)),
            Outcome::TakenOver(owner) => Err(LockError::OwnerDied(self.owner_died(owner, mine))),
            Outcome::TimedOut => Err(LockError::TimedOut {
                waited: started.elapsed(),
            }),
        }
    }

    /// Takes the lock if no live owner holds it.
    ///
    /// # Errors
    ///
    /// As [`lock`](Self::lock).
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    pub fn try_lock<O: Owners + ?Sized>(
        &self,
        owners: &O,
    ) -> Result<Option<LockGuard<'_>>, OwnerDied<LockGuard<'_>>> {
        let mine = held_by(owners.me());
        match self.try_take(mine, owners) {
            Outcome::Free => Ok(Some(self.guard(mine))),
            Outcome::TakenOver(owner) => Err(self.owner_died(owner, mine)),
            Outcome::TimedOut => Ok(None),
        }
    }

    /// Who holds the lock, dead or alive. True only of the moment at which it was read.
    #[inline]
    pub fn owner(&self) -> Option<OwnerId> {
        owner_of(self.0.load(Ordering::Acquire))
    }

    /// As [`owner`](Self::owner), in the one order of sequentially consistent steps.
    #[inline]
    pub(crate) fn owner_seq_cst(&self) -> Option<OwnerId> {
        owner_of(self.0.load(Ordering::SeqCst))
    }

    /// The fast path: takes a lock that is free. `mine` is the caller's [`held_by`].
    #[inline]
    pub(crate) fn take_free(&self, mine: u64) -> bool {
        let taken = self.change(FREE, mine).is_ok();
        if taken {
            crash_point!("sem.word.locked");
        }
        taken
    }

    /// Takes a lock that is free or a dead one's; times out otherwise, at once.
    #[inline]
    pub(crate) fn try_take<O: Owners + ?Sized>(&self, mine: u64, owners: &O) -> Outcome {
        let mut current = FREE;
        loop {
            let owner = owner_of(current);
            let wanted = match owner {
                None => mine,
                Some(owner) if owners.is_alive(owner) => return Outcome::TimedOut,
                Some(_) => mine | CONTENDED,
            };
            match self.change(current, wanted) {
                Ok(_) => return owner.map_or(Outcome::Free, Outcome::TakenOver),
                Err(found) => current = found,
            }
        }
    }

    /// Takes a lock that was not free a moment ago.
    #[cold]
    pub(crate) fn lock_slow<O: Owners + ?Sized>(
        &self,
        mine: u64,
        owners: &O,
        deadline: Option<Deadline>,
    ) -> Outcome {
        if sync::may_spin() && self.lock_spinning(mine).is_some() {
            crash_point!("sem.word.locked_spinning");
            return Outcome::Free;
        }
        let mut wanted = mine;
        let mut lasting = Lasting::new();
        loop {
            // Before the question whether the owner lives: see the protocol in `owner`.
            let deaths_seen = owners.deaths().load(Ordering::Acquire);
            let current = self.0.load(Ordering::Relaxed);
            let Some(owner) = owner_of(current) else {
                if self.change(FREE, wanted).is_ok() {
                    crash_point!("sem.word.locked_after_sleep");
                    return Outcome::Free;
                }
                continue;
            };
            if !owners.is_alive(owner) {
                if self.change(current, mine | CONTENDED).is_ok() {
                    crash_point!("sem.word.taken_over");
                    return Outcome::TakenOver(owner);
                }
                continue;
            }
            let marked = current | CONTENDED;
            if current != marked && self.change(current, marked).is_err() {
                continue;
            }
            crash_point!("sem.word.contended");
            wanted = mine | CONTENDED;
            // Only now, with the mark set: if this waiter was woken and somebody else was quicker, the mark
            // passes the wake on to another sleeper.
            if deadline.is_some_and(|deadline| deadline.is_past()) {
                return Outcome::TimedOut;
            }
            // Who took the wake for this waiter may be another than the owner, and die unannounced.
            let looks = [owners.recheck_every(owner), owners.recheck()];
            let until = sooner(deadline, looks.into_iter().flatten().min());
            let deaths = (owners.deaths(), deaths_seen);
            let at = (&raw const self.0).addr();
            lasting.sleep(owners, Waiting::Lock { at, owner }, until, |until| {
                sync::sleep(&self.0, low_half(marked), deaths, until);
            });
            crash_point!("sem.word.woken");
        }
    }

    /// Watches a lock that nobody sleeps for, and takes it when it becomes free soon.
    fn lock_spinning(&self, mine: u64) -> Option<()> {
        spin::LOCKS.spin(|| {
            (self.0.load(Ordering::Relaxed) == FREE && self.change(FREE, mine).is_ok())
                .then_some(())
        })
    }

    /// One CAS that takes a lock or marks it.
    #[inline]
    fn change(&self, from: u64, to: u64) -> Result<u64, u64> {
        self.0
            .compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn unlock(&self, mine: u64) {
        if self
            .0
            .compare_exchange(mine, FREE, Ordering::Release, Ordering::Relaxed)
            .is_err()
        {
            self.unlock_slow(mine);
        }
    }

    #[cold]
    fn unlock_slow(&self, mine: u64) {
        // The mark stays while the lock is held, so nothing else can be there, unless the lock was taken
        // over from this owner as from a dead one: not ours to free.
        let freed =
            self.0
                .compare_exchange(mine | CONTENDED, FREE, Ordering::Release, Ordering::Relaxed);
        debug_assert!(
            freed.is_ok(),
            "unlock by {:?} of a lock that is not held by it: {freed:?}",
            owner_of(mine)
        );
        if freed.is_ok() {
            crash_point!("sem.word.unlocked_before_wake");
            sync::wake_one(&self.0);
        }
    }

    #[inline]
    fn guard(&self, mine: u64) -> LockGuard<'_> {
        LockGuard {
            word: self,
            mine,
            epoch: fork_epoch(),
            _holding: Holding::begin(),
        }
    }

    fn owner_died(&self, owner: OwnerId, mine: u64) -> OwnerDied<LockGuard<'_>> {
        OwnerDied {
            owner,
            guard: self.guard(mine),
        }
    }
}

impl Default for LockWord {
    fn default() -> LockWord {
        LockWord::new()
    }
}

impl fmt::Debug for LockWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockWord")
            .field("owner", &self.owner())
            .finish()
    }
}

/// The word of a lock that `owner` holds; never 0.
#[inline]
pub(crate) fn held_by(owner: OwnerId) -> u64 {
    assert!(
        owner.index < OwnerId::INDEX_LIMIT,
        "the index of {owner} is not below 2^30"
    );
    u64::from(owner.generation) << 32 | u64::from(owner.index + 1)
}

/// Whose word that is; nobody's if it is 0.
#[inline]
pub(crate) fn owner_of(value: u64) -> Option<OwnerId> {
    let index = low_half(value & !CONTENDED).checked_sub(1)?;
    Some(OwnerId {
        index,
        generation: (value >> 32) as u32,
    })
}

/// Holds a [`LockWord`]; unlocks it when dropped.
///
/// It belongs to the thread that took the lock. The death of the process frees it, the end of the thread does not: the lock of a
/// leaked guard stays held until then. A forked copy of it (in a child of the holder) holds nothing and unlocks nothing.
#[must_use = "the lock is released when the guard is dropped"]
pub struct LockGuard<'a> {
    word: &'a LockWord,
    mine: u64,
    /// Tells the holder from its forked copies.
    epoch: u64,
    _holding: Holding,
}

impl LockGuard<'_> {
    /// Under which id the lock is held.
    pub fn owner(&self) -> OwnerId {
        // A guard exists only for an owner.
        owner_of(self.mine).unwrap_or(OwnerId {
            index: 0,
            generation: 0,
        })
    }
}

impl Drop for LockGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            self.word.unlock(self.mine);
        }
    }
}

impl fmt::Debug for LockGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("owner", &self.owner())
            .finish()
    }
}

/// The earlier of a deadline and the next look, if there are such.
pub(crate) fn sooner(deadline: Option<Deadline>, look_every: Option<Duration>) -> Option<Deadline> {
    let look = look_every.map(Deadline::after);
    match (deadline, look) {
        (Some(deadline), Some(look)) => Some(deadline.min(look)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::AtomicU32;
    use std::sync::atomic::AtomicBool;

    struct Pair {
        me: u32,
        first_is_dead: AtomicBool,
        deaths: AtomicU32,
    }

    fn id(index: u32) -> OwnerId {
        OwnerId {
            index,
            generation: u32::MAX - index,
        }
    }

    impl Pair {
        fn new(me: u32) -> Pair {
            Pair {
                me,
                first_is_dead: AtomicBool::new(false),
                deaths: AtomicU32::new(0),
            }
        }
    }

    impl Owners for Pair {
        fn me(&self) -> OwnerId {
            id(self.me)
        }
        fn is_alive(&self, owner: OwnerId) -> bool {
            !(owner == id(0) && self.first_is_dead.load(Ordering::SeqCst))
        }
        fn deaths(&self) -> &AtomicU32 {
            &self.deaths
        }
    }

    #[test]
    fn word_names_its_owner() {
        for index in [0, 1, OwnerId::INDEX_LIMIT - 1] {
            let value = held_by(id(index));
            assert_eq!(owner_of(value), Some(id(index)));
            assert_eq!(owner_of(value | CONTENDED), Some(id(index)));
            assert_eq!(value & CONTENDED, 0);
        }
        assert_eq!(owner_of(FREE), None);
    }

    #[test]
    #[should_panic(expected = "not below 2^30")]
    fn index_out_of_range_panics() {
        held_by(id(OwnerId::INDEX_LIMIT));
    }

    #[test]
    fn live_owner_keeps_the_lock() {
        let word = LockWord::new();
        let guard = word.lock(&Pair::new(0)).unwrap();
        assert_eq!(word.owner(), Some(id(0)));
        assert_eq!(guard.owner(), id(0));
        assert!(word.try_lock(&Pair::new(1)).unwrap().is_none());
        let wait = Duration::from_millis(20);
        let times_out = || {
            let deadline = Instant::now() + wait;
            let outcome = word.lock_deadline(&Pair::new(1), deadline);
            assert!(Instant::now() >= deadline);
            match outcome {
                Err(LockError::TimedOut { waited }) => waited >= wait,
                other => panic!("{other:?}"),
            }
        };
        // Its clock begins in the call; again if this thread was held up before.
        assert!((0..20).any(|_| times_out()));
        drop(guard);
        assert_eq!(word.owner(), None);
        drop(word.lock_deadline(&Pair::new(1), Instant::now()).unwrap());
    }

    #[test]
    fn dead_owner_is_named_once() {
        let word = LockWord::new();
        let second = Pair::new(1);
        second.first_is_dead.store(true, Ordering::SeqCst);
        for attempt in 0..3 {
            std::mem::forget(word.lock(&Pair::new(0)).unwrap());
            let died = match attempt {
                0 => word.lock(&second).unwrap_err(),
                1 => word.try_lock(&second).unwrap_err(),
                _ => match word.lock_deadline(&second, Instant::now()) {
                    Err(LockError::OwnerDied(died)) => died,
                    other => panic!("{other:?}"),
                },
            };
            assert_eq!(died.owner, id(0));
            assert_eq!(word.owner(), Some(id(1)));
            drop(died);
            drop(word.lock(&second).unwrap());
        }
    }

    #[test]
    fn threads_exclude_each_other() {
        let word = LockWord::new();
        let counter = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for me in 0..4 {
                let (word, counter) = (&word, &counter);
                scope.spawn(move || {
                    let owners = Pair::new(me);
                    for _ in 0..20_000 {
                        let _guard = word.lock(&owners).unwrap();
                        let seen = counter.load(Ordering::Relaxed);
                        counter.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), 80_000);
        assert_eq!(word.0.into_inner(), FREE);
    }
}

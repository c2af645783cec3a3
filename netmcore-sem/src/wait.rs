//! Sleeping until shared state allows to go on: an event count in one 32-bit word.
//!
//! **Protocol.** The state is elsewhere and is the truth; who waits for it tries, and sleeps between the tries. The word
//! is `sequence << 1 | bit 0`, and is the futex.
//!
//! | bit 0 | means | a sleeper died | one that changed the state died before its notify |
//! |---|---|---|---|
//! | 0 | nobody sleeps | – | nobody has missed it |
//! | 1 | somebody may sleep | a wake that it took, and anything it was to do, is made good by the death, which wakes all | the death wakes all, who try again |
//!
//! * A waiter tries; spins, trying; then *announces* itself: sets bit 0, and if it was set, counts the sequence up
//!   (so the word changes with every announcement). It tries once more, and sleeps while the word is as it announced, and the
//!   counter of deaths as it read it before.
//! * One that changes the state does so by a sequentially consistent write, then notifies. If bit 0 is clear that is all. Else it
//!   counts the sequence up, and wakes. To notify all, it clears bit 0 in the same step. To notify one, it leaves bit 0,
//!   because others may sleep; if the kernel says that it woke nobody, and the word is still as it left it, it clears bit 0.
//!
//! **Invariants.**
//! 1. A waiter whose last try came before a change of the state is announced before the notify reads the word, or its try sees the
//!    change: either the announcement or the write comes first in the one order of sequentially consistent steps.
//! 2. Who is announced and not asleep sleeps no more once the sequence was counted up; it tries again.
//! 3. While somebody sleeps, bit 0 is set or all that sleep are being woken. It is cleared without waking all only when
//!    nobody slept after the count-up, and nobody announced itself since: each announcement changes the word.
//! 4. So each notify of one, with somebody asleep, wakes one that has not been woken before: *n* of them wake *n*
//!    sleepers, and nobody need pass a wake on. (An event count that clears its bit with each wake must: there the
//!    second of two notifies finds the bit clear while a second sleeper sleeps.)
//!
//! A wake may go to one that is just giving up at its deadline: it tries once more after it has left the kernel's queue, before
//! it gives up. If the try itself panics after a sleep, it wakes another.
//!
//! The kernel wakes in the order of arrival, threads of real-time priority first.
//!
//! **If a process dies here.** The table. What it took in a successful try is gone with it, or its
//! owner's to recover. Without a supervisor nobody announces deaths: sleepers look again every [`Owners::recheck`].
//!
//! **Not here.** The state.

use crate::current::Current;
use crate::owner::{Lasting, OwnerId, Owners, Waiting};
use crate::spin;
use crate::sync::{self, AtomicU32, Ordering, const_fn, fence};
use crate::word::sooner;
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::fmt;
use std::time::Duration;

/// Somebody may sleep.
const SLEEPERS: u32 = 1;
/// One step of the sequence.
const STEP: u32 = 2;

/// Whether an attempt asks if those in its way live, which may cost reading files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asks {
    WhoLives,
    Nobody,
}

impl Asks {
    /// False too if nobody asks.
    #[inline]
    pub(crate) fn is_dead(self, owner: OwnerId) -> bool {
        self == Asks::WhoLives && !Current.is_alive(owner)
    }
}

/// What those sleep on that wait for a change of some shared state. Zeroed memory is a word on which nobody waits.
///
/// ```
/// use netmcore_sem::{Current, WaitWord};
/// use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
///
/// let (tokens, word) = (AtomicU32::new(0), WaitWord::new());
/// let take = || {
///     let less = |tokens: u32| tokens.checked_sub(1);
///     tokens.fetch_update(SeqCst, SeqCst, less).ok()
/// };
/// std::thread::scope(|scope| {
///     let taker = scope.spawn(|| word.wait(&Current, None, None, take));
///     tokens.fetch_add(1, SeqCst);
///     word.notify_one();
///     assert_eq!(taker.join().unwrap(), Some(1));
/// });
/// ```
#[repr(transparent)]
pub struct WaitWord(AtomicU32);

impl WaitWord {
    const_fn! {
        /// A word on which nobody waits.
        pub fn new() -> WaitWord {
            WaitWord(AtomicU32::new(0))
        }
    }

    /// Calls `attempt` until it gives something: at once, then spinning, then after each wake. `None` if the deadline passed.
    ///
    /// `attempt` reads the state by sequentially consistent loads or read-modify-writes. It takes what it gives:
    /// it is not called again after that. It may ask whether owners live.
    ///
    /// Between the calls it sleeps until notified or until a death is announced, but never longer than `recheck` (for what nobody
    /// announces, see [`Owners::recheck_every`]; [`Owners::recheck`] is taken into account anyway).
    ///
    /// # Blocking
    ///
    /// Until `attempt` gives something or the deadline. With a deadline in the past: not at all.
    ///
    /// # If a process dies
    ///
    /// All who wait try again once the death is announced.
    pub fn wait<T, O: Owners + ?Sized>(
        &self,
        owners: &O,
        recheck: Option<Duration>,
        deadline: Option<Deadline>,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        self.wait_asking(owners, recheck, deadline, |_| attempt())
    }

    /// As [`wait`](Self::wait), with an attempt that is told whether the caller is about to sleep. Only then does it ask whether
    /// owners live: a spin is shorter than the answer may take.
    pub(crate) fn wait_asking<T, O: Owners + ?Sized>(
        &self,
        owners: &O,
        recheck: Option<Duration>,
        deadline: Option<Deadline>,
        mut attempt: impl FnMut(Asks) -> Option<T>,
    ) -> Option<T> {
        if let Some(gained) = attempt(Asks::Nobody) {
            return Some(gained);
        }
        if sync::may_spin()
            && let Some(gained) = spin::EVENTS.spin(|| attempt(Asks::Nobody))
        {
            return Some(gained);
        }
        self.wait_asleep(owners, recheck, deadline, &mut || attempt(Asks::WhoLives))
    }

    #[cold]
    fn wait_asleep<T, O: Owners + ?Sized>(
        &self,
        owners: &O,
        recheck: Option<Duration>,
        deadline: Option<Deadline>,
        attempt: &mut dyn FnMut() -> Option<T>,
    ) -> Option<T> {
        // From the first sleep on this waiter may have taken a wake.
        let mut on_panic = None;
        let mut lasting = Lasting::new();
        loop {
            // Before the attempt, which may ask who lives: see the protocol in `owner`.
            let deaths_seen = owners.deaths().load(Ordering::Acquire);
            let announced = self.announce();
            crash_point!("sem.wait.announced");
            if let Some(gained) = attempt() {
                std::mem::forget(on_panic);
                crash_point!("sem.wait.gained");
                return Some(gained);
            }
            if deadline.is_some_and(|deadline| deadline.is_past()) {
                std::mem::forget(on_panic);
                return None;
            }
            // Asked each time: it may be told after a wake that somebody has come whose death nobody announces.
            let recheck = match (recheck, owners.recheck()) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            let until = sooner(deadline, recheck);
            let deaths = (owners.deaths(), deaths_seen);
            let at = (&raw const self.0).addr();
            lasting.sleep(owners, Waiting::Event { at }, until, |until| {
                sync::sleep_word(&self.0, announced, deaths, until);
            });
            on_panic = Some(PassOn(self));
            crash_point!("sem.wait.woken");
        }
    }

    /// Says that the caller is about to sleep; gives the word as it then is.
    pub(crate) fn announce(&self) -> u32 {
        let mut current = self.0.load(Ordering::Relaxed);
        loop {
            let announced = match current & SLEEPERS {
                0 => current | SLEEPERS,
                _ => current.wrapping_add(STEP),
            };
            match self.change(current, announced) {
                Ok(_) => {
                    // Invariant 1, whatever the order with which the attempt reads.
                    fence(Ordering::SeqCst);
                    return announced;
                }
                Err(found) => current = found,
            }
        }
    }

    #[cfg(loom)]
    pub(crate) fn is_announced(&self) -> bool {
        self.0.load(Ordering::SeqCst) & SLEEPERS != 0
    }

    /// What those that have announced themselves sleep on: for one that sleeps on other words too.
    #[cfg(not(loom))]
    pub(crate) fn futex(&self) -> &AtomicU32 {
        &self.0
    }

    /// Wakes one that waits, if somebody sleeps. Call it after the state was changed by a sequentially consistent write.
    ///
    /// No system call when nobody sleeps; but for one time after the last sleeper has gone.
    #[inline]
    pub fn notify_one(&self) {
        let Some(notified) = self.count_up(|current| current.wrapping_add(STEP)) else {
            return;
        };
        crash_point!("sem.wait.counted_before_wake");
        if !sync::wake_word_one(&self.0) {
            // Invariant 3. If it fails, somebody has come.
            let _ = self.change(notified, notified & !SLEEPERS);
        }
    }

    /// Wakes all that wait. As [`notify_one`](Self::notify_one) otherwise.
    pub fn notify_all(&self) {
        if self
            .count_up(|current| current.wrapping_add(STEP) & !SLEEPERS)
            .is_some()
        {
            crash_point!("sem.wait.cleared_before_wake");
            sync::wake_all(&self.0);
        }
    }

    /// Changes the word if somebody may sleep, and gives what it is then.
    #[inline]
    fn count_up(&self, next: impl Fn(u32) -> u32) -> Option<u32> {
        sync::fence_in_models();
        let mut current = self.0.load(Ordering::SeqCst);
        while current & SLEEPERS != 0 {
            match self.change(current, next(current)) {
                Ok(_) => return Some(next(current)),
                Err(found) => current = found,
            }
        }
        None
    }

    fn change(&self, from: u32, to: u32) -> Result<u32, u32> {
        self.0
            .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
    }
}

/// Wakes another when the attempt of one that was woken panics.
struct PassOn<'a>(&'a WaitWord);

impl Drop for PassOn<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.notify_one();
        }
    }
}

impl Default for WaitWord {
    fn default() -> WaitWord {
        WaitWord::new()
    }
}

impl fmt::Debug for WaitWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitWord").finish_non_exhaustive()
    }
}

//! Waiting until what a mutex protects has changed: [`ShmCondvar`], and waits for it in an event loop.
//!
//! **Protocol.** `notified` counts notifications. A waiter reads it while it holds the mutex, unlocks, and sleeps on the
//! [`WaitWord`] until the count is another one. A notifier counts up, then wakes one or all that sleep.
//!
//! | died | in the middle of | the others |
//! |---|---|---|
//! | a waiter | any step: it has left nothing in the condvar | one that is meant by the wake it took has an old count, and goes on with the death |
//! | a notifier | before counting up; what the mutex protects may be changed, or half changed | all waiters go on with the death, and look |
//! | a notifier | between counting up and waking | as above |
//!
//! * *Going on with the death*: a waiter also reads the counter of deaths while it holds the mutex. It goes on when that is another
//!   one. A condition says nothing about who will make it true, so every death makes every waiter look.
//! * Where there are those whose deaths nobody announces, a waiter goes on by itself every 20 ms, and looks.
//!
//! **Invariants.**
//! 1. What was changed under the mutex before a notification is seen by all waiters that had not counted it when they unlocked: either they read the
//!    count before the notifier took the mutex, and find another one, or they saw the change.
//! 2. Each notification wakes one that sleeps with an old count, if there is one: see [`wait`](crate::wait).
//!
//! Waits may end early, then: for no reason that the waiter can see. It looks at its condition again, as with every condvar.
//!
//! **If a process dies here.** The table. It leaves no entry, no count of waiters, nothing to be repaired.
//!
//! **Not here.** The condition. A limit of a wait that others end: [deadlines](ShmCondvar::wait_deadline).

use crate::current::Current;
use crate::lock_error::OwnerDied;
use crate::mutex::{ExclusiveKind, ShmMutexGuard};
use crate::owner::Owners;
use crate::sync::{AtomicU64, Ordering, const_fn};
use crate::wait::WaitWord;
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::fmt;
use std::time::{Duration, Instant};

#[cfg(not(loom))]
mod poll;
#[cfg(not(loom))]
pub use poll::CondvarPoll;

/// After so long one looks whether somebody has died unannounced. A process that waits so costs 50 wake-ups a second; with the time that the
/// lock needs to find out, a death is known within 50 ms.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What threads of all processes wait on until one of them says that something has changed. It lies in shared memory, at any address.
///
/// Zeroed memory is a condvar on which nobody waits. There are no entries to be managed. A notification that nobody waits for is one
/// addition, and no system call.
///
/// Use it with one [`ShmMutex`](crate::ShmMutex), which protects the condition. One of the recursive kind is refused by the
/// compiler: a thread that holds it twice would wait for what its other guard forbids.
///
/// A wait may end without a notification, so look at the condition again, or let [`wait_while`](Self::wait_while) do so.
///
/// # If a process dies
///
/// Every death that is announced ends the waits of all: the dead may have changed the condition and not said so, or hold the mutex.
/// Without a supervisor waits end every 20 ms for the same reason. If the dead held the mutex, the wait gives [`OwnerDied`].
///
/// # Example
///
/// ```
/// use netmcore_sem::{ShmCondvar, ShmMutex};
///
/// static JOBS: ShmMutex<Vec<u32>> = ShmMutex::new(Vec::new());
/// static MORE: ShmCondvar = ShmCondvar::new();
///
/// std::thread::scope(|scope| {
///     let worker = scope.spawn(|| {
///         let jobs = JOBS.lock().unwrap();
///         MORE.wait_while(jobs, |jobs| jobs.is_empty()).unwrap().pop()
///     });
///     JOBS.lock().unwrap().push(7);
///     MORE.notify_one();
///     assert_eq!(worker.join().unwrap(), Some(7));
/// });
/// ```
///
/// A recursive mutex may be held twice:
///
/// ```compile_fail,E0308
/// use netmcore_sem::{Recursive, ShmCondvar, ShmMutex};
///
/// let (mutex, condvar) = (ShmMutex::<u32, Recursive>::with_kind(0), ShmCondvar::new());
/// let _guard = condvar.wait(mutex.lock().unwrap());
/// ```
#[doc(alias = "Netmcore_condition")]
#[doc(alias = "Netmcore_condition.create_condition")]
#[repr(C)]
pub struct ShmCondvar {
    notified: AtomicU64,
    word: WaitWord,
}

/// Why a wait with a deadline ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitEnd {
    /// Somebody has notified, or has died, or for no reason; or the condition is as it was waited for.
    Woken,
    /// The deadline passed, and nothing else had happened.
    TimedOut,
}

impl WaitEnd {
    /// Whether the deadline passed.
    pub fn is_timed_out(self) -> bool {
        self == WaitEnd::TimedOut
    }
}

/// From when on one waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Since {
    notified: u64,
    deaths: u32,
}

type Waited<'a, T, K> = Result<ShmMutexGuard<'a, T, K>, OwnerDied<ShmMutexGuard<'a, T, K>>>;
type WaitedUntil<'a, T, K> =
    Result<(ShmMutexGuard<'a, T, K>, WaitEnd), OwnerDied<ShmMutexGuard<'a, T, K>>>;

impl ShmCondvar {
    const_fn! {
        /// A condvar on which nobody waits.
        pub fn new() -> ShmCondvar {
            ShmCondvar {
                notified: AtomicU64::new(0),
                word: WaitWord::new(),
            }
        }
    }

    /// Unlocks the mutex, waits for a notification, and locks again.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`] if the value is in doubt; the caller holds the lock then, by the guard inside.
    ///
    /// # Panics
    ///
    /// If the guard is a forked copy.
    ///
    /// # Blocking
    ///
    /// Until notified, or somebody has died, or for no reason; then until the mutex is free.
    #[doc(alias = "Netmcore_condition.wait")]
    pub fn wait<'a, T: ?Sized, K: ExclusiveKind>(
        &self,
        guard: ShmMutexGuard<'a, T, K>,
    ) -> Waited<'a, T, K> {
        self.wait_until(guard, None).map(|(guard, _)| guard)
    }

    /// Waits as long as `condition` holds of the value; looks at it first, then after each notification.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait). The condition is not asked about a value in doubt.
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Blocking
    ///
    /// Until the condition does not hold, or the value is in doubt.
    pub fn wait_while<'a, T: ?Sized, K: ExclusiveKind>(
        &self,
        mut guard: ShmMutexGuard<'a, T, K>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> Waited<'a, T, K> {
        while condition(&mut guard) {
            guard = self.wait(guard)?;
        }
        Ok(guard)
    }

    /// Unlocks the mutex, waits for a notification until `deadline` at most, and locks again. Says which it was.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait), in time or not.
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Blocking
    ///
    /// As [`wait`](Self::wait), until the deadline; then until the mutex is free, however long that is.
    ///
    /// # Example
    ///
    /// ```
    /// use netmcore_sem::{ShmCondvar, ShmMutex};
    /// use std::time::{Duration, Instant};
    ///
    /// let (mutex, condvar) = (ShmMutex::new(0), ShmCondvar::new());
    /// let deadline = Instant::now() + Duration::from_millis(5);
    /// let mut guard = mutex.lock().unwrap();
    /// loop {
    ///     let (again, end) = condvar.wait_deadline(guard, deadline).unwrap();
    ///     guard = again;
    ///     if end.is_timed_out() {
    ///         break;
    ///     }
    /// }
    /// assert!(Instant::now() >= deadline);
    /// ```
    pub fn wait_deadline<'a, T: ?Sized, K: ExclusiveKind>(
        &self,
        guard: ShmMutexGuard<'a, T, K>,
        deadline: Instant,
    ) -> WaitedUntil<'a, T, K> {
        self.wait_until(guard, Some(deadline.into()))
    }

    /// Waits as long as `condition` holds of the value, until `deadline` at most. It timed out if the condition holds still.
    ///
    /// # Errors
    ///
    /// As [`wait_while`](Self::wait_while), in time or not.
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Blocking
    ///
    /// As [`wait_deadline`](Self::wait_deadline), until the condition does not hold.
    pub fn wait_while_deadline<'a, T: ?Sized, K: ExclusiveKind>(
        &self,
        mut guard: ShmMutexGuard<'a, T, K>,
        deadline: Instant,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> WaitedUntil<'a, T, K> {
        let deadline = Some(deadline.into());
        let mut end = WaitEnd::Woken;
        while condition(&mut guard) {
            if end.is_timed_out() {
                return Ok((guard, end));
            }
            (guard, end) = self.wait_until(guard, deadline)?;
        }
        Ok((guard, WaitEnd::Woken))
    }

    /// Ends the wait of one that waits, if somebody does.
    ///
    /// Change the condition under the mutex before. Holding it still is not needed, nor in the way.
    #[doc(alias = "Netmcore_condition.signal")]
    #[inline]
    pub fn notify_one(&self) {
        crash_point!("sem.condvar.will_count_for_one");
        self.notified.fetch_add(1, Ordering::SeqCst);
        crash_point!("sem.condvar.counted_for_one");
        self.word.notify_one();
    }

    /// Ends the waits of all. As [`notify_one`](Self::notify_one) otherwise.
    #[doc(alias = "Netmcore_condition.broadcast")]
    #[inline]
    pub fn notify_all(&self) {
        crash_point!("sem.condvar.will_count_for_all");
        self.notified.fetch_add(1, Ordering::SeqCst);
        crash_point!("sem.condvar.counted_for_all");
        self.word.notify_all();
    }

    fn wait_until<'a, T: ?Sized, K: ExclusiveKind>(
        &self,
        guard: ShmMutexGuard<'a, T, K>,
        deadline: Option<Deadline>,
    ) -> WaitedUntil<'a, T, K> {
        let mutex = ShmMutexGuard::mutex(&guard);
        // Under the mutex: invariant 1.
        let since = self.now();
        drop(guard);
        crash_point!("sem.condvar.unlocked");
        let end = self.sleep(since, deadline);
        crash_point!("sem.condvar.woken");
        Ok((mutex.lock_waiting()?, end))
    }

    fn now(&self) -> Since {
        Since {
            notified: self.notified.load(Ordering::Relaxed),
            deaths: Current.deaths().load(Ordering::Relaxed),
        }
    }

    /// Whether one that waits since then may go on.
    fn is_over(&self, since: Since) -> bool {
        self.notified.load(Ordering::SeqCst) != since.notified
            || Current.deaths().load(Ordering::SeqCst) != since.deaths
    }

    fn sleep(&self, since: Since, deadline: Option<Deadline>) -> WaitEnd {
        let look = Current.recheck().map(|_| Deadline::after(LOOK_EVERY));
        let until = [deadline, look].into_iter().flatten().min();
        let is_over = || self.is_over(since).then_some(());
        match self.word.wait(&Current, None, until, is_over) {
            None if deadline.is_some_and(|deadline| deadline.is_past()) => WaitEnd::TimedOut,
            _ => WaitEnd::Woken,
        }
    }
}

impl Default for ShmCondvar {
    fn default() -> ShmCondvar {
        ShmCondvar::new()
    }
}

impl fmt::Debug for ShmCondvar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmCondvar").finish_non_exhaustive()
    }
}

//! Waiting on and waking a 32-bit word in shared memory: `futex(2)`, `futex_waitv`.
//!
//! **Protocol.** The word is the truth, the sleep only saves processor time. A waiter reads the word, finds that it
//! has to wait, and calls [`wait`] with the value it read; the kernel puts it to sleep only if the word still has that
//! value. Who changes the word wakes after the change. After every return the waiter reads again.
//!
//! Deadlines are absolute, so a wait that is resumed after a spurious return ends when it should.
//!
//! **If a process dies here.** A sleeper is gone from the kernel's queue. A waker that dies between its store and its
//! wake leaves sleepers asleep: that is what the second word of [`wait_two`] is for, which a supervisor changes and
//! wakes when a process has died.
//!
//! **Not here.** Private futexes: all words here may be shared. Priority inheritance and robust lists.

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Wait, WaitFlags, WaitPtr, WaitvFlags};
use rustix::thread::{ClockId, Timespec};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A point in time on the monotonic clock (`CLOCK_MONOTONIC`), in nanoseconds: the same clock in all processes of a
/// machine, and not set back or forth. A `u64` of them reaches 584 years; later points are cut to that.
///
/// ```
/// use netmcore_sys::futex::Deadline;
/// use std::time::Duration;
///
/// let deadline = Deadline::after(Duration::from_secs(60));
/// assert!(!deadline.is_past());
/// assert!(deadline.remaining() <= Duration::from_secs(60));
/// assert!(Deadline::after(Duration::ZERO).is_past());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deadline {
    nanos: u64,
}

impl Deadline {
    /// The present.
    pub fn now() -> Deadline {
        let now = rustix::time::clock_gettime(ClockId::Monotonic);
        // Both parts are positive on this clock, and the seconds are those since the machine was started.
        let nanos = (now.tv_sec as u64)
            .saturating_mul(1_000_000_000)
            .saturating_add(now.tv_nsec as u64);
        Deadline { nanos }
    }

    /// The point `wait` from now.
    pub fn after(wait: Duration) -> Deadline {
        Deadline::now().plus(wait)
    }

    /// The point `wait` later.
    pub fn plus(self, wait: Duration) -> Deadline {
        let wait = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        Deadline {
            nanos: self.nanos.saturating_add(wait),
        }
    }

    /// The point that another process of this machine gave as [`as_nanos`](Self::as_nanos).
    pub fn from_nanos(nanos: u64) -> Deadline {
        Deadline { nanos }
    }

    /// Nanoseconds on the monotonic clock.
    pub fn as_nanos(self) -> u64 {
        self.nanos
    }

    /// Whether it has come.
    pub fn is_past(self) -> bool {
        self <= Deadline::now()
    }

    /// The time until then; zero if it has come.
    pub fn remaining(self) -> Duration {
        Duration::from_nanos(self.nanos.saturating_sub(Deadline::now().nanos))
    }

    pub(crate) fn to_timespec(self) -> Timespec {
        let (seconds, nanos) = (self.nanos / 1_000_000_000, self.nanos % 1_000_000_000);
        Timespec {
            // At most 2^64 / 10^9 seconds.
            tv_sec: seconds as i64,
            tv_nsec: nanos as _,
        }
    }
}

impl From<Instant> for Deadline {
    fn from(instant: Instant) -> Deadline {
        Deadline::after(instant.saturating_duration_since(Instant::now()))
    }
}

/// Why a wait returned. Whatever the reason, the caller reads the word again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Woken by [`wake`], or for no reason.
    Woken,
    /// A word did not have its expected value: there was no sleep (`EAGAIN`).
    Changed,
    /// The deadline came.
    TimedOut,
    /// A signal handler ran that was installed without `SA_RESTART` (`EINTR`). After other handlers the wait
    /// goes on by itself.
    Interrupted,
}

/// Sleeps while `word` is `expected`, until it is woken: `FUTEX_WAIT_BITSET`.
///
/// The comparison and going to sleep are one step with respect to [`wake`]: a change made and woken after
/// `expected` was read is not missed.
///
/// # Blocking
///
/// Until woken, the deadline, or a signal handler without `SA_RESTART` has run. With a deadline that is past: not at all.
pub fn wait(word: &AtomicU32, expected: u32, deadline: Option<Deadline>) -> Woken {
    let timeout = deadline.map(Deadline::to_timespec);
    let waited = futex::wait_bitset(
        word,
        Flags::empty(),
        expected,
        timeout.as_ref(),
        NonZeroU32::MAX,
    );
    outcome(waited)
}

/// A fallback wait sleeps so long before it looks at the words beside the first again. As short as a supervisor's
/// reaction to a death may be late, and two hundred wake-ups a second cost less than 1 % of a processor.
const FALLBACK_INTERVAL: Duration = Duration::from_millis(5);

/// Whether the kernel, or a filter of system calls, has refused `futex_waitv`.
static WAITV_IS_MISSING: AtomicBool = AtomicBool::new(false);

/// Sleeps while both words have their expected values, until one of them is woken: `futex_waitv` (Linux 5.16).
///
/// Where that call is missing or filtered, it sleeps on the first word and looks at the second every 5 ms.
///
/// # Blocking
///
/// As [`wait`].
///
/// # Example
///
/// ```
/// use netmcore_sys::futex::{self, Deadline, Woken};
/// use std::sync::atomic::AtomicU32;
/// use std::time::Duration;
///
/// let (lock, deaths) = (AtomicU32::new(1), AtomicU32::new(0));
/// let deadline = Some(Deadline::after(Duration::from_millis(1)));
/// assert_eq!(futex::wait_two((&lock, 1), (&deaths, 0), deadline), Woken::TimedOut);
/// assert_eq!(futex::wait_two((&lock, 1), (&deaths, 7), deadline), Woken::Changed);
/// ```
pub fn wait_two(a: (&AtomicU32, u32), b: (&AtomicU32, u32), deadline: Option<Deadline>) -> Woken {
    wait_any([a, b], deadline)
}

/// As [`wait_two`], on `N` words: at least one, and at most 128.
///
/// # Blocking
///
/// As [`wait`].
///
/// # Panics
///
/// If there are more or less words.
pub fn wait_any<const N: usize>(
    words: [(&AtomicU32, u32); N],
    deadline: Option<Deadline>,
) -> Woken {
    if WAITV_IS_MISSING.load(Ordering::Relaxed) {
        return wait_any_by_looking(&words, deadline);
    }
    let timeout = deadline.map(Deadline::to_timespec);
    let waiters = words.map(waiter);
    let waited = futex::waitv(
        &waiters,
        WaitvFlags::empty(),
        timeout.as_ref(),
        ClockId::Monotonic,
    );
    match waited {
        Err(Errno::NOSYS | Errno::PERM) => {
            WAITV_IS_MISSING.store(true, Ordering::Relaxed);
            wait_any_by_looking(&words, deadline)
        }
        waited => outcome(waited.map(drop)),
    }
}

fn waiter((word, expected): (&AtomicU32, u32)) -> Wait {
    let mut waiter = Wait::new();
    waiter.val = u64::from(expected);
    waiter.uaddr = WaitPtr::new(word.as_ptr().cast());
    waiter.flags = WaitFlags::SIZE_U32;
    waiter
}

#[cold]
fn wait_any_by_looking(words: &[(&AtomicU32, u32)], deadline: Option<Deadline>) -> Woken {
    let Some(((first, expected), others)) = words.split_first() else {
        panic!("futex wait on no word");
    };
    loop {
        let is_changed =
            |(word, expected): &(&AtomicU32, u32)| word.load(Ordering::Acquire) != *expected;
        if others.iter().any(is_changed) {
            return Woken::Changed;
        }
        let look_again = Deadline::after(FALLBACK_INTERVAL);
        let until = deadline.map_or(look_again, |deadline| deadline.min(look_again));
        match wait(first, *expected, Some(until)) {
            Woken::TimedOut if deadline != Some(until) => {}
            woken => return woken,
        }
    }
}

fn outcome(waited: rustix::io::Result<()>) -> Woken {
    match waited {
        Ok(()) => Woken::Woken,
        Err(Errno::AGAIN) => Woken::Changed,
        Err(Errno::TIMEDOUT) => Woken::TimedOut,
        Err(Errno::INTR) => Woken::Interrupted,
        // The kernel is short of memory: to the caller a spurious return.
        Err(Errno::NOMEM) => {
            std::thread::yield_now();
            Woken::Woken
        }
        // EFAULT and EINVAL: the word is not there, or not an aligned word.
        Err(error) => panic!("futex wait on a word that cannot be waited on: {error}"),
    }
}

/// Wakes up to `count` processes or threads that sleep on `word`, and says how many: `FUTEX_WAKE`.
///
/// A call that finds no sleeper costs a third of a microsecond: skip it when the word says that nobody
/// sleeps.
pub fn wake(word: &AtomicU32, count: u32) -> u32 {
    if count == 0 {
        // The kernel would wake one.
        return 0;
    }
    let count = count.min(i32::MAX as u32);
    match futex::wake(word, Flags::empty(), count) {
        Ok(woken) => woken as u32,
        // EFAULT and EINVAL, as for waiting.
        Err(error) => panic!("futex wake of a word that cannot be waited on: {error}"),
    }
}

/// Wakes all that sleep on `word`, and says how many.
pub fn wake_all(word: &AtomicU32) -> u32 {
    wake(word, u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadline_far_away_saturates_and_sorts_last() {
        let never = Deadline::after(Duration::MAX);
        assert_eq!(never.as_nanos(), u64::MAX);
        assert!(Deadline::after(Duration::from_secs(1)) < never);
        assert!(never.remaining() > Duration::from_secs(1 << 32));
    }

    #[test]
    fn deadline_agrees_with_instant() {
        let instant = Instant::now() + Duration::from_secs(10);
        let remaining = Deadline::from(instant).remaining();
        assert!(remaining <= Duration::from_secs(10));
        assert!(remaining > Duration::from_secs(5));
        let past = Instant::now();
        assert!(Deadline::from(past).is_past());
    }

    #[test]
    fn waking_none_wakes_nobody() {
        let word = AtomicU32::new(0);
        assert_eq!(wake(&word, 0), 0);
        assert_eq!(wake_all(&word), 0);
    }
}

//! A flag that many may wait for: [`ShmEvent`].
//!
//! **Protocol.** One word counts how often it was set and reset, and is the truth; those that wait for it sleep on a [`WaitWord`].
//!
//! | changes | means | who made it so died before the wake |
//! |---|---|---|
//! | even | it is not set: they wait | – |
//! | odd | it is set: nobody waits, until it is reset | the death wakes all, who see it |
//!
//! * To set: make it odd. To reset: make it even, by counting up. Both are one atomic step.
//! * Who waits reads it before, and goes on when it is odd, or another number: then it was set meanwhile, and reset.
//!
//! **Invariants.** It is only counted up. (Who does not run during 2³² changes, and not one more, takes them for none.)
//!
//! **Not here.** Counting how often it was set: [`semaphore`](crate::semaphore). Resetting itself: a waiter that wants to be the only one
//! takes a permit.

use crate::current::Current;
use crate::sync::{AtomicU32, Ordering, const_fn, fence_in_models};
use crate::wait::WaitWord;
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::fmt;
use std::time::Instant;

const SET: u32 = 1;

/// A flag in shared memory that threads of many processes wait for. It stays set until it is reset. Zeroed memory is an event that is not set.
///
/// Setting it publishes all that the caller has written before to those whose wait ends by it.
///
/// # If a process dies
///
/// The event is set or not. Waits go on until somebody sets it: it belongs to nobody, so give a deadline where the setter may die.
///
/// ```
/// use netmcore_sem::ShmEvent;
/// use std::time::Instant;
///
/// let ready = ShmEvent::new();
/// assert!(!ready.wait_deadline(Instant::now()));
/// std::thread::scope(|scope| {
///     scope.spawn(|| ready.wait()); // in another process, for instance
///     ready.set();
/// });
/// assert!(ready.is_set());
/// ready.reset();
/// assert!(!ready.is_set());
/// ```
pub struct ShmEvent {
    changes: AtomicU32,
    waiters: WaitWord,
}

impl ShmEvent {
    const_fn! {
        /// An event that is not set.
        pub fn new() -> ShmEvent {
            ShmEvent {
                changes: AtomicU32::new(0),
                waiters: WaitWord::new(),
            }
        }
    }

    /// Sets it: all waits end, even if it is reset at once. No system call if nobody waits.
    ///
    /// # If a process dies
    ///
    /// It is set or not; if it is, all waits end, whether the process has come to wake anybody or not.
    pub fn set(&self) {
        self.changes.fetch_or(SET, Ordering::SeqCst);
        crash_point!("sem.event.set");
        // Even if it was set: who set it may not have come to wake anybody yet, and be stopped.
        self.waiters.notify_all();
    }

    /// Makes it unset. Those that waited when it was set go on all the same.
    pub fn reset(&self) {
        let even = |changes: u32| is_set(changes).then(|| changes.wrapping_add(1));
        let is_reset = self
            .changes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, even);
        if is_reset.is_ok() {
            crash_point!("sem.event.reset");
            // Who set it may not have come to wake anybody yet.
            self.waiters.notify_all();
        }
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        is_set(self.changes.load(Ordering::SeqCst))
    }

    /// Waits until it is set, without limit.
    ///
    /// # Blocking
    ///
    /// Until it is set: spins briefly, then sleeps.
    pub fn wait(&self) {
        self.wait_until(None);
    }

    /// Waits until it is set, or until `deadline`; says whether it was set.
    ///
    /// # Blocking
    ///
    /// As [`wait`](Self::wait), until the deadline. With a deadline in the past: not at all.
    pub fn wait_deadline(&self, deadline: Instant) -> bool {
        self.wait_until(Some(deadline.into()))
    }

    fn wait_until(&self, deadline: Option<Deadline>) -> bool {
        let before = self.changes.load(Ordering::SeqCst);
        if is_set(before) {
            return true;
        }
        let attempt = || {
            fence_in_models();
            (self.changes.load(Ordering::SeqCst) != before).then_some(())
        };
        self.waiters
            .wait(&Current, None, deadline, attempt)
            .is_some()
    }

    /// Whether somebody is about to sleep, who must not miss a change after that.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn is_awaited(&self) -> bool {
        self.waiters.is_announced()
    }
}

fn is_set(changes: u32) -> bool {
    changes & SET != 0
}

impl Default for ShmEvent {
    fn default() -> ShmEvent {
        ShmEvent::new()
    }
}

impl fmt::Debug for ShmEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmEvent")
            .field("is_set", &self.is_set())
            .finish()
    }
}

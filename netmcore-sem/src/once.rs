//! Something that is done once, by whichever process comes first: [`ShmOnce`]; and a value that is made so: [`ShmOnceCell`].
//!
//! **Protocol.** The *state* is the truth. Who does it holds a [`LockWord`] meanwhile.
//!
//! | state | lock | means | its holder died |
//! |---|---|---|---|
//! | 0 | free | nobody has done it | – |
//! | 0 | held | its holder does it | the next does it anew, and is told who has tried |
//! | 1 | any | it is done | nothing is in doubt |
//!
//! The one that does it stores state 1 as the last step, and wakes those that wait for it without wanting to do it.
//!
//! **Invariants.**
//! 1. The state changes from 0 to 1 once, by the holder of the lock.
//! 2. The value of a cell is written while the state is 0, by the holder of the lock, and read while it is 1.
//!
//! # Safety
//!
//! Invariant 2.

#![allow(unsafe_code)]

use crate::current::Current;
use crate::owner::{OwnerId, Owners};
use crate::sync::{AtomicU32, Ordering, const_fn, fence_in_models};
use crate::wait::WaitWord;
use crate::word::LockWord;
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::cell::UnsafeCell;
use std::fmt;
use std::mem::MaybeUninit;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::time::Instant;

const DONE: u32 = 1;

/// Something that one process does, and all others find done. It lies in shared memory; zeroed memory is one that is not done.
///
/// # If a process dies
///
/// While it does it: one of those that wait does it anew, on whatever the dead one has left, and can find out that there was somebody.
/// A panic in between likewise leaves it to the next, who is not told.
///
/// ```
/// use netmcore_sem::ShmOnce;
/// use std::sync::atomic::{AtomicU32, Ordering};
///
/// let (once, count) = (ShmOnce::new(), AtomicU32::new(0));
/// std::thread::scope(|scope| {
///     for _ in 0..3 {
///         scope.spawn(|| once.call_once(|| drop(count.fetch_add(1, Ordering::Relaxed))));
///     }
/// });
/// assert!(once.is_completed());
/// assert_eq!(count.load(Ordering::Relaxed), 1);
/// ```
pub struct ShmOnce {
    state: AtomicU32,
    waiters: WaitWord,
    lock: LockWord,
}

/// How it came that a closure of [`ShmOnce::call_once_force`] is called.
#[derive(Clone, Copy, Debug)]
pub struct ShmOnceState {
    died: Option<OwnerId>,
}

impl ShmOnceState {
    /// Who died doing it, the last of several. What it was to do may be half done.
    pub fn died(&self) -> Option<OwnerId> {
        self.died
    }
}

impl ShmOnce {
    const_fn! {
        /// Not done yet.
        pub fn new() -> ShmOnce {
            ShmOnce {
                state: AtomicU32::new(0),
                waiters: WaitWord::new(),
                lock: LockWord::new(),
            }
        }
    }

    /// Calls `f`, unless it is done. When this returns it is done, by this or another process.
    ///
    /// # Panics
    ///
    /// If `f` calls it for the same one. If `f` panics, it is not done.
    ///
    /// # Blocking
    ///
    /// While another thread does it.
    ///
    /// # If a process dies
    ///
    /// In `f`: the next does it anew.
    pub fn call_once(&self, f: impl FnOnce()) {
        self.call_once_force(|_| f());
    }

    /// As [`call_once`](Self::call_once), and says who died doing it.
    ///
    /// # Panics
    ///
    /// As [`call_once`](Self::call_once).
    ///
    /// # Blocking
    ///
    /// As [`call_once`](Self::call_once).
    ///
    /// # If a process dies
    ///
    /// In `f`: the next does it anew, and is told.
    #[inline]
    pub fn call_once_force(&self, f: impl FnOnce(&ShmOnceState)) {
        if !self.is_completed() {
            self.call_slow(f);
        }
    }

    #[cold]
    fn call_slow(&self, f: impl FnOnce(&ShmOnceState)) {
        assert!(
            self.lock.owner() != Some(Current.me()),
            "what is to be done once is asked for while it is being done"
        );
        let (died, doing) = match self.lock.lock(&Current) {
            Ok(guard) => (None, guard),
            Err(died) => (Some(died.owner), died.guard),
        };
        if self.is_completed() {
            return;
        }
        crash_point!("sem.once.doing");
        f(&ShmOnceState { died });
        crash_point!("sem.once.done_before_commit");
        self.state.store(DONE, Ordering::SeqCst);
        crash_point!("sem.once.committed");
        self.waiters.notify_all();
        drop(doing);
    }

    /// Whether it is done. What the one that did it has written is visible then.
    #[inline]
    pub fn is_completed(&self) -> bool {
        self.state.load(Ordering::SeqCst) == DONE
    }

    /// Waits until somebody has done it, without doing it.
    ///
    /// # Blocking
    ///
    /// Until it is done. If those that would do it have died, for ever: give a [deadline](Self::wait_deadline), or do it.
    pub fn wait(&self) {
        self.wait_until(None);
    }

    /// Waits until somebody has done it, or until `deadline`; says whether it is done.
    ///
    /// # Blocking
    ///
    /// As [`wait`](Self::wait), until the deadline. With a deadline in the past: not at all.
    pub fn wait_deadline(&self, deadline: Instant) -> bool {
        self.wait_until(Some(deadline.into()))
    }

    fn wait_until(&self, deadline: Option<Deadline>) -> bool {
        let attempt = || {
            fence_in_models();
            self.is_completed().then_some(())
        };
        self.waiters
            .wait(&Current, None, deadline, attempt)
            .is_some()
    }
}

impl Default for ShmOnce {
    fn default() -> ShmOnce {
        ShmOnce::new()
    }
}

impl fmt::Debug for ShmOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmOnce")
            .field("is_completed", &self.is_completed())
            .finish()
    }
}

/// A value that one process makes, and all others find. It lies in shared memory; zeroed memory is an empty one.
///
/// # If a process dies
///
/// While it makes the value: one of those that wait makes it anew. What the dead one had made is forgotten.
///
/// ```
/// use netmcore_sem::ShmOnceCell;
///
/// let size = ShmOnceCell::new();
/// assert_eq!(size.get(), None);
/// assert_eq!(*size.get_or_init(|| 40), 40);
/// assert_eq!(*size.get_or_init(|| 50), 40);
/// assert_eq!(size.set(60), Err(60));
/// ```
pub struct ShmOnceCell<T> {
    once: ShmOnce,
    value: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: as std's OnceLock: references go to several threads, and another thread than its maker's may drop the value.
unsafe impl<T: Sync + Send> Sync for ShmOnceCell<T> {}
// SAFETY: the value goes with it.
unsafe impl<T: Send> Send for ShmOnceCell<T> {}
impl<T: RefUnwindSafe + UnwindSafe> RefUnwindSafe for ShmOnceCell<T> {}
impl<T: UnwindSafe> UnwindSafe for ShmOnceCell<T> {}

impl<T> ShmOnceCell<T> {
    const_fn! {
        /// An empty cell.
        pub fn new() -> ShmOnceCell<T> {
            ShmOnceCell {
                once: ShmOnce::new(),
                value: UnsafeCell::new(MaybeUninit::uninit()),
            }
        }
    }

    /// The value, if it has been made.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        // SAFETY: it was written before the state was 1, and nobody writes it after that (invariant 2).
        self.once
            .is_completed()
            .then(|| unsafe { (*self.value.get()).assume_init_ref() })
    }

    /// The value; `init` makes it if nobody has.
    ///
    /// # Panics
    ///
    /// If `init` asks for it. If `init` panics, the cell stays empty.
    ///
    /// # Blocking
    ///
    /// While another thread makes it.
    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        self.once.call_once(|| {
            let value = init();
            // SAFETY: the state is 0 and the lock is held (invariant 2); a value that a dead one has written is forgotten.
            unsafe { (*self.value.get()).write(value) };
        });
        self.get().expect("it was made")
    }

    /// Makes the value be this one.
    ///
    /// # Errors
    ///
    /// The value, if there was one already.
    ///
    /// # Blocking
    ///
    /// While another thread makes it.
    pub fn set(&self, value: T) -> Result<(), T> {
        let mut value = Some(value);
        self.get_or_init(|| value.take().expect("called once"));
        value.map_or(Ok(()), Err)
    }

    /// The value, which nobody else uses.
    pub fn get_mut(&mut self) -> Option<&mut T> {
        let is_made = self.once.is_completed();
        // SAFETY: written; the cell is borrowed alone.
        is_made.then(|| unsafe { self.value.get_mut().assume_init_mut() })
    }

    /// The value, if it has been made.
    pub fn into_inner(mut self) -> Option<T> {
        self.take()
    }

    /// The value, if it has been made; the cell is empty afterwards.
    pub fn take(&mut self) -> Option<T> {
        if !self.once.is_completed() {
            return None;
        }
        self.once = ShmOnce::new();
        // SAFETY: written; the state is 0 now, so nobody takes it to be there.
        Some(unsafe { self.value.get_mut().assume_init_read() })
    }
}

impl<T> Drop for ShmOnceCell<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl<T> Default for ShmOnceCell<T> {
    fn default() -> ShmOnceCell<T> {
        ShmOnceCell::new()
    }
}

impl<T: fmt::Debug> fmt::Debug for ShmOnceCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ShmOnceCell").field(&self.get()).finish()
    }
}

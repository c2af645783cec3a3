//! The atomics and the sleeping that locks are made of: the system's, or loom's for model checking.
//!
//! **Not here.** Any protocol. This is the only file that knows of `cfg(loom)`.

pub(crate) use imp::*;

/// Declares a `const fn`; under loom, whose atomics have no constant constructors, a plain one.
macro_rules! const_fn {
    ($(#[$attribute:meta])* $visibility:vis fn $($rest:tt)*) => {
        #[cfg(not(loom))]
        $(#[$attribute])* $visibility const fn $($rest)*
        #[cfg(loom)]
        $(#[$attribute])* $visibility fn $($rest)*
    };
}
pub(crate) use const_fn;

/// The low half of a word: what its sleepers compare.
pub(crate) fn low_half(value: u64) -> u32 {
    (value & u64::from(u32::MAX)) as u32
}

#[cfg(not(loom))]
mod imp {
    //! # Safety
    //!
    //! One cast, from a 64-bit atomic to its low half, for the kernel's eyes only: this program never reads
    //! or writes the half by itself, so accesses of different sizes do not meet.
    #![allow(unsafe_code)]

    use netmcore_sys::futex::{self, Deadline};
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    const _: () = assert!(size_of::<crate::LockWord>() == 8 && align_of::<crate::LockWord>() == 8);

    /// Sleeps while the low half of `word` is `expected` and `deaths` is `deaths_seen`, at most until the deadline.
    /// May return early.
    pub(crate) fn sleep(
        word: &AtomicU64,
        expected: u32,
        deaths: &AtomicU32,
        deaths_seen: u32,
        deadline: Option<Deadline>,
    ) {
        futex::wait_two(
            (low_half_of(word), expected),
            (deaths, deaths_seen),
            deadline,
        );
    }

    /// Wakes one sleeper of `word`.
    pub(crate) fn wake_one(word: &AtomicU64) {
        futex::wake(low_half_of(word), 1);
    }

    /// Wakes all who sleep on `word` alone or beside another.
    pub(crate) fn wake_all(word: &AtomicU32) {
        futex::wake_all(word);
    }

    /// Whether spinning can be of use: the other side may be on another processor.
    pub(crate) use crate::spin::several_processors as may_spin;

    /// A counter of deaths that nobody counts up.
    pub(crate) fn no_deaths() -> &'static AtomicU32 {
        static NONE: AtomicU32 = AtomicU32::new(0);
        &NONE
    }

    fn low_half_of(word: &AtomicU64) -> &AtomicU32 {
        let half = usize::from(cfg!(target_endian = "big"));
        // SAFETY: both halves lie in the word, aligned for 32 bits, and live as long. Only the kernel looks
        // through this reference.
        unsafe { &*word.as_ptr().cast::<AtomicU32>().add(half) }
    }
}

#[cfg(loom)]
mod imp {
    use super::low_half;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use loom::sync::{Condvar, Mutex};
    use netmcore_sys::futex::Deadline;

    loom::lazy_static! {
        /// The kernel's queue of sleepers. One for all words: models use one lock.
        static ref QUEUE: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub(crate) fn sleep(
        word: &AtomicU64,
        expected: u32,
        deaths: &AtomicU32,
        deaths_seen: u32,
        _: Option<Deadline>,
    ) {
        let queue = QUEUE.0.lock().unwrap();
        // As in the kernel: comparing and falling asleep are one step as seen by those who wake.
        if low_half(word.load(Ordering::SeqCst)) == expected
            && deaths.load(Ordering::SeqCst) == deaths_seen
        {
            drop(QUEUE.1.wait(queue).unwrap());
        }
    }

    pub(crate) fn wake_one(_: &AtomicU64) {
        let _queue = QUEUE.0.lock().unwrap();
        QUEUE.1.notify_one();
    }

    pub(crate) fn wake_all(_: &AtomicU32) {
        let _queue = QUEUE.0.lock().unwrap();
        QUEUE.1.notify_all();
    }

    pub(crate) fn no_deaths() -> &'static AtomicU32 {
        unreachable!("models have a supervisor")
    }

    /// Spinning would only multiply the schedules to explore.
    pub(crate) fn may_spin() -> bool {
        let _unused = crate::spin::several_processors;
        false
    }
}

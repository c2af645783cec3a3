//! The atomics and the sleeping that locks are made of: the system's, or loom's for model checking.
//!
//! **Not here.** Any protocol. This file, and `current/model.rs` with the owners of models, are all that knows of `cfg(loom)`.

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
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    const _: () = assert!(size_of::<crate::LockWord>() == 8 && align_of::<crate::LockWord>() == 8);

    /// Sleeps while the low half of `word` is `expected` and `deaths` is `deaths_seen`, at most until the deadline.
    /// May return early.
    pub(crate) fn sleep(
        word: &AtomicU64,
        expected: u32,
        deaths: (&AtomicU32, u32),
        deadline: Option<Deadline>,
    ) {
        sleep_word(low_half_of(word), expected, deaths, deadline);
    }

    /// As [`sleep`], on a word of 32 bits.
    pub(crate) fn sleep_word(
        word: &AtomicU32,
        expected: u32,
        deaths: (&AtomicU32, u32),
        deadline: Option<Deadline>,
    ) {
        futex::wait_two((word, expected), deaths, deadline);
    }

    /// Wakes one sleeper of `word`.
    pub(crate) fn wake_one(word: &AtomicU64) {
        wake_word_one(low_half_of(word));
    }

    /// Wakes one sleeper of `word`, the one that has slept longest; false if nobody sleeps.
    pub(crate) fn wake_word_one(word: &AtomicU32) -> bool {
        futex::wake(word, 1) != 0
    }

    /// Wakes all who sleep on `word` alone or beside another.
    pub(crate) fn wake_all(word: &AtomicU32) {
        futex::wake_all(word);
    }

    /// Nothing: the accesses around it are sequentially consistent.
    pub(crate) fn fence_in_models() {}

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
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    use loom::sync::{Arc, Condvar, Mutex};
    use netmcore_sys::futex::Deadline;

    /// One that sleeps in the kernel.
    struct Sleeper {
        words: [usize; 2],
        ticket: u64,
        alarm: Arc<Condvar>,
    }

    #[derive(Default)]
    struct Queue {
        /// In the order of arrival.
        sleepers: Vec<Sleeper>,
        tickets: u64,
    }

    loom::lazy_static! {
        /// The kernel's queue.
        static ref QUEUE: Mutex<Queue> = Mutex::new(Queue::default());
    }

    pub(crate) fn sleep(
        word: &AtomicU64,
        expected: u32,
        deaths: (&AtomicU32, u32),
        _: Option<Deadline>,
    ) {
        let is_same = || low_half(word.load(Ordering::SeqCst)) == expected;
        sleep_while(address(word), is_same, deaths);
    }

    pub(crate) fn sleep_word(
        word: &AtomicU32,
        expected: u32,
        deaths: (&AtomicU32, u32),
        _: Option<Deadline>,
    ) {
        let is_same = || word.load(Ordering::SeqCst) == expected;
        sleep_while(address(word), is_same, deaths);
    }

    fn sleep_while(word: usize, is_same: impl Fn() -> bool, deaths: (&AtomicU32, u32)) {
        let mut queue = QUEUE.lock().unwrap();
        // As in the kernel: comparing and falling asleep are one step as seen by those who wake.
        if !is_same() || deaths.0.load(Ordering::SeqCst) != deaths.1 {
            return;
        }
        queue.tickets += 1;
        let ticket = queue.tickets;
        let alarm = Arc::new(Condvar::new());
        queue.sleepers.push(Sleeper {
            words: [word, address(deaths.0)],
            ticket,
            alarm: alarm.clone(),
        });
        while queue.sleepers.iter().any(|one| one.ticket == ticket) {
            queue = alarm.wait(queue).unwrap();
        }
    }

    fn wake(word: usize, count: usize) -> usize {
        let mut queue = QUEUE.lock().unwrap();
        let mut woken = 0;
        queue.sleepers.retain(|sleeper| {
            let is_woken = woken < count && sleeper.words.contains(&word);
            if is_woken {
                woken += 1;
                sleeper.alarm.notify_one();
            }
            !is_woken
        });
        woken
    }

    fn address<T>(word: &T) -> usize {
        (&raw const *word).addr()
    }

    pub(crate) fn wake_one(word: &AtomicU64) {
        wake(address(word), 1);
    }

    pub(crate) fn wake_word_one(word: &AtomicU32) -> bool {
        wake(address(word), 1) != 0
    }

    pub(crate) fn wake_all(word: &AtomicU32) {
        wake(address(word), usize::MAX);
    }

    /// Loom takes sequentially consistent accesses for acquire and release; a fence it takes as what it is.
    pub(crate) fn fence_in_models() {
        fence(Ordering::SeqCst);
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

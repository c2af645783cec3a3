//! Who reads at the moment, and what may be freed in spite of it.
//!
//! **Protocol.** The *era* is a counter. What readers can reach lies in blocks that were *born* in an era, and are *retired* in one, after they
//! were unlinked. Each thread that reads has a slot, in which it publishes from which era (`low`) to which (`high`) it reads.
//!
//! | slot | means | its owner died |
//! |---|---|---|
//! | owner 0 | free | – |
//! | owner, low 0 | a thread has it, and does not read | the next to need a slot takes it over |
//! | owner, low > 0 | it may use every block that lived at some time between low and high | the next scan that doubts it takes it over, and frees it |
//!
//! * Pin: `high` := era, `low` := era. Unpin: `low` := 0.
//! * Read a pointer: load it, then the era. If the era is above `high`: raise `high` to it, and begin again where all pointers begin.
//!   After a few times in vain `high` becomes the greatest number, so that a reader is not kept from its aim; afterwards it is lowered to the era.
//! * Retire: unlink, stamp with the era. Free: if no slot has `low` ≤ the stamp and `high` ≥ the birth, in a scan made after the unlinking.
//! * The era is counted up when a scan finds that it cannot free what was retired in it.
//!
//! **Invariants.**
//! 1. Publishing and the loads that follow, unlinking and the scan that follows, are in one order of sequentially consistent steps. So
//!    either the scan sees the reader, or the reader sees that the block is gone.
//! 2. A pointer that a reader may follow was loaded while `low` was no later than its block's retirement, and `high` no earlier than its
//!    birth, both published before, and on a path that began after that.
//! 3. `high`, `low` and `depth` are written by the slot's owner only.
//!
//! What a reader that sleeps for ever keeps from being freed is what lived between its `low` and its `high`: no more than there was
//! then, however much is replaced later.
//!
//! **If a process dies here.** The table. A slot whose new owner dies in the middle of taking it over is taken over from that one.
//!
//! **Not here.** Where slots and blocks lie, and which slot a thread has.

use crate::sync::{self, AtomicU64, Ordering};
use netmcore_sem::{Current, OwnerId, Owners};
use netmcore_sys::crash_point;

/// The last era, for readers that must not be disturbed.
const NEVER: u64 = u64::MAX;
/// After so many attempts a reader covers all eras to come.
const PATIENT_ATTEMPTS: u32 = 4;
/// Each so many scans that meet a slot pinned ask whether its owner lives, which may cost reading a file.
const DOUBT_EVERY: u64 = 512;
/// How many readers a scan tells apart.
const INTERVALS: usize = 32;

/// The counter of eras. Zeroed memory is one at its start.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Era(AtomicU64);

impl Era {
    /// The era, which is not 0.
    #[inline]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst) + 1
    }

    fn end(&self, era: u64) {
        let _ = self
            .0
            .compare_exchange(era - 1, era, Ordering::SeqCst, Ordering::Relaxed);
    }
}

/// The owner of a slot, in a word that is not 0.
pub fn owner_word(owner: OwnerId) -> u64 {
    u64::from(owner.generation) << 32 | u64::from(owner.index + 1)
}

fn is_dead(word: u64) -> bool {
    let Some(index) = (word as u32).checked_sub(1) else {
        return false;
    };
    let generation = (word >> 32) as u32;
    !Current.is_alive(OwnerId { index, generation })
}

/// What one thread says about its reading. Zeroed memory is a free slot.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Slot {
    owner: AtomicU64,
    /// 0 while the owner does not read.
    low: AtomicU64,
    high: AtomicU64,
    /// How many pins the owner has.
    depth: AtomicU64,
    /// How many scans met it pinned. A hint.
    met: AtomicU64,
}

impl Slot {
    /// Takes the slot if it is free, or its owner is dead and `even_of_the_dead`.
    pub fn claim(&self, me: u64, even_of_the_dead: bool) -> bool {
        let found = self.owner.load(Ordering::Acquire);
        if found != 0 && !(even_of_the_dead && is_dead(found)) {
            return false;
        }
        let taken = self
            .owner
            .compare_exchange(found, me, Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_err() {
            return false;
        }
        crash_point!("shm.pins.claimed");
        self.depth.store(0, Ordering::Relaxed);
        self.low.store(0, Ordering::Release);
        crash_point!("shm.pins.cleared");
        true
    }

    /// Gives the slot back, unless something is still pinned by it.
    pub fn release(&self, me: u64) {
        if self.depth.load(Ordering::Relaxed) == 0 {
            let _ = self
                .owner
                .compare_exchange(me, 0, Ordering::Release, Ordering::Relaxed);
        }
    }

    /// Whether it is still the owner's.
    #[inline]
    pub fn is_of(&self, owner: u64) -> bool {
        self.owner.load(Ordering::Relaxed) == owner
    }

    /// One pin more. For the owner.
    #[inline]
    pub fn pin(&self, era: &Era) {
        let depth = self.depth.load(Ordering::Relaxed);
        if depth == 0 {
            let now = era.now();
            self.high.store(now, Ordering::Relaxed);
            publish(&self.low, now);
            crash_point!("shm.pins.pinned");
        }
        self.depth.store(depth + 1, Ordering::Relaxed);
    }

    /// One pin less. For the owner.
    #[inline]
    pub fn unpin(&self) {
        let depth = self.depth.load(Ordering::Relaxed) - 1;
        self.depth.store(depth, Ordering::Relaxed);
        if depth == 0 {
            crash_point!("shm.pins.unpinning");
            self.low.store(0, Ordering::Release);
        }
    }

    /// Reads pointers by `attempt`, which loads them and, before it follows one, asks whether it may: if not, it returns `None`, and is
    /// called again. For the owner, which has it pinned.
    #[inline(always)]
    pub fn read<R>(&self, era: &Era, mut attempt: impl FnMut(&Cover<'_>) -> Option<R>) -> R {
        for attempts in 0.. {
            let high = self.high.load(Ordering::Relaxed);
            let cover = Cover {
                slot: self,
                era,
                high,
            };
            if let Some(found) = attempt(&cover) {
                self.settle(era);
                return found;
            }
            self.cover(era, attempts);
        }
        unreachable!("attempts in vain end, as all eras are covered in the end")
    }

    /// Raises `high`, so that the next attempt to read may succeed.
    #[cold]
    pub fn cover(&self, era: &Era, attempts: u32) {
        let high = if attempts < PATIENT_ATTEMPTS {
            era.now()
        } else {
            NEVER
        };
        publish(&self.high, high);
        crash_point!("shm.pins.covered");
    }

    /// Covers what was born by now, and is not retired before this has returned. For the owner, which has it pinned.
    #[inline]
    pub fn cover_born(&self, era: &Era) {
        if era.now() > self.high.load(Ordering::Relaxed) {
            self.cover(era, 0);
        }
    }

    /// Ends an attempt: what was loaded in it was born by now.
    #[inline]
    fn settle(&self, era: &Era) {
        if self.high.load(Ordering::Relaxed) == NEVER {
            self.high.store(era.now(), Ordering::Release);
        }
    }
}

/// What an attempt to read asks.
#[derive(Clone, Copy, Debug)]
pub struct Cover<'a> {
    slot: &'a Slot,
    era: &'a Era,
    /// As it was when the attempt began.
    high: u64,
}

impl Cover<'_> {
    /// Whether what was loaded so far may be followed (invariant 2).
    #[inline]
    pub fn is_enough(&self) -> bool {
        // A comparison of keys may read something itself: `high` can have been raised since the path began, or lowered.
        let now = self.era.now();
        now <= self.high && now <= self.slot.high.load(Ordering::Relaxed)
    }
}

/// A store that comes before the loads that follow, for those who scan (invariant 1).
#[inline]
fn publish(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::SeqCst);
    sync::fence_in_models();
}

/// The readers that a scan has met.
pub struct Readers {
    intervals: [(u64, u64); INTERVALS],
    count: usize,
}

impl Readers {
    /// Looks who reads. What was unlinked before the call may be freed afterwards if they do not [keep](Self::keep) it.
    ///
    /// `slots` is called then, not before: a thread that takes its first slot meanwhile may read what is unlinked later.
    ///
    /// Owners of slots are asked whether they live now and then; with `doubt`, each.
    pub fn scan<'a, I: Iterator<Item = &'a Slot>>(
        slots: impl FnOnce() -> I,
        doubt: bool,
    ) -> Readers {
        let mut readers = Readers {
            intervals: [(0, 0); INTERVALS],
            count: 0,
        };
        sync::fence_in_models();
        for slot in slots() {
            let low = slot.low.load(Ordering::SeqCst);
            if low == 0 || slot.is_left_by_the_dead(doubt) {
                continue;
            }
            readers.add(low, slot.high.load(Ordering::SeqCst));
        }
        readers
    }

    fn add(&mut self, low: u64, high: u64) {
        if let Some(place) = self.intervals.get_mut(self.count) {
            *place = (low, high);
            self.count += 1;
        } else {
            // One reader that keeps what all these do.
            let (lowest, highest) = &mut self.intervals[INTERVALS - 1];
            *lowest = low.min(*lowest);
            *highest = high.max(*highest);
        }
    }

    /// Whether somebody may use a block that lived between the two eras.
    pub fn keep(&self, birth: u64, retired: u64) -> bool {
        self.intervals[..self.count]
            .iter()
            .any(|&(low, high)| low <= retired && birth <= high)
    }
}

impl Slot {
    /// Asks, now and then, whether the owner of a pinned slot is dead; frees the slot then.
    fn is_left_by_the_dead(&self, doubt: bool) -> bool {
        let met = self.met.load(Ordering::Relaxed).wrapping_add(1);
        self.met.store(met, Ordering::Relaxed);
        if !doubt && !met.is_multiple_of(DOUBT_EVERY) {
            return false;
        }
        let owner = self.owner.load(Ordering::Acquire);
        let me = owner_word(Current.me());
        if owner == 0 || owner == me || !is_dead(owner) {
            return false;
        }
        // Not just cleared: somebody else may take the slot over and pin it meanwhile.
        if self.claim(me, true) {
            self.release(me);
        }
        // Its pin, if it was that of the dead. If the slot has changed hands, it was pinned after the unlinking of what is to be freed.
        true
    }
}

/// Ends the era if something that was retired in it had to be kept: what is born from now on is not kept by those who read now.
pub fn note_kept(era: &Era, retired: u64) {
    if era.now() <= retired {
        era.end(retired);
        crash_point!("shm.pins.era_ended");
    }
}

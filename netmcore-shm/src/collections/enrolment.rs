//! Who takes part in a queue or mailbox on one side, so that the other side notices when all of them are gone.
//!
//! **Protocol.** It is told how many there will be; then there is a *roll* with a place for each, and a 64-bit word for each place:
//! `generation << 32 | ended << 31 | index + 1` of the one that was enrolled.
//!
//! | word | means | that one died |
//! |---|---|---|
//! | 0 | nobody has come yet | – |
//! | owner | takes part | gone, dead; the place may be taken by another one if no place is unused |
//! | owner, ended | gone in order | – |
//!
//! * Enrol: CAS 0, or a dead owner if there is no 0 left, → me. Leave: store me, ended.
//! * All are gone when no word is 0 and none names a living owner. The collection then closes by a store of its own, under
//!   a lock that enrolling takes too: so it does not close while somebody enrols.
//!
//! Asking whether an owner lives may cost a system call, so it is asked only when a [`Watch`] says that something may have changed: somebody
//! has died, has come or gone; or, where nobody announces deaths, some time has passed.
//!
//! **Invariants.**
//! 1. A word that was set is never 0 again. A word that says that one has ended stays.
//! 2. A roll's memory is a roll until its collection is dropped; its address is stored once.
//!
//! **If a process dies here.** The table. A roll that was allocated and is not the collection's yet stays allocated until the heap is gone.
//!
//! # Safety
//!
//! A roll is made of atomics, and zeroed before its address is published.

#![allow(unsafe_code)]

use crate::error::Result;
use crate::heap::HeapRef;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use netmcore_sem::{Current, OwnerId, Owners};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::alloc::Layout;
use std::fmt;
use std::ptr::{self, NonNull};
use std::time::Duration;

/// The one that is enrolled there has left in order.
const ENDED: u64 = 1 << 31;

/// Where nobody announces deaths, it is looked for them so often: within the 5 ms after which sleepers look again.
const LOOK_EVERY: Duration = Duration::from_millis(4);
/// A wait that is over before costs no look at all.
const FIRST_LOOK_AFTER: Duration = Duration::from_micros(100);

/// The word of an owner.
pub fn word_of(owner: OwnerId) -> u64 {
    u64::from(owner.generation) << 32 | u64::from(owner.index + 1)
}

/// The owner of a word.
pub fn owner_of(word: u64) -> Option<OwnerId> {
    Some(OwnerId {
        index: ((word & !ENDED) as u32).checked_sub(1)?,
        generation: (word >> 32) as u32,
    })
}

fn is_alive(word: u64) -> bool {
    word & ENDED == 0 && owner_of(word).is_some_and(|owner| Current.is_alive(owner))
}

/// Takes a place for the caller, one that nobody had before if there is such: its number.
pub fn enrol(roll: &[AtomicU64]) -> Option<usize> {
    let me = word_of(Current.me());
    for is_first in [true, false] {
        for (number, place) in roll.iter().enumerate() {
            let word = place.load(Ordering::SeqCst);
            let is_free = if is_first {
                word == 0
            } else {
                word & ENDED == 0 && !is_alive(word)
            };
            if is_free
                && place
                    .compare_exchange(word, me, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            {
                return Some(number);
            }
        }
    }
    None
}

/// The one that is enrolled there leaves in order.
pub fn leave(place: &AtomicU64) {
    place.fetch_or(ENDED, Ordering::SeqCst);
}

/// Whether all have been there, and all are gone.
pub fn are_all_gone(roll: &[AtomicU64]) -> bool {
    let words = || roll.iter().map(|place| place.load(Ordering::SeqCst));
    // The cheap question first.
    words().all(|word| word != 0) && !words().any(is_alive)
}

/// How those that are gone have gone.
pub(crate) fn account(roll: &[AtomicU64]) -> (usize, Vec<OwnerId>) {
    let mut ended_count = 0;
    let mut died = Vec::new();
    for place in roll {
        let word = place.load(Ordering::SeqCst);
        if word & ENDED != 0 {
            ended_count += 1;
        } else if let Some(owner) = owner_of(word)
            && !Current.is_alive(owner)
        {
            died.push(owner);
        }
    }
    (ended_count, died)
}

/// How often to look for the death of those that are enrolled and whose deaths nobody announces.
pub(crate) fn recheck(roll: &[AtomicU64]) -> Option<Duration> {
    let words = roll.iter().map(|place| place.load(Ordering::SeqCst));
    let living = words.filter(|word| word & ENDED == 0).filter_map(owner_of);
    living
        .filter_map(|owner| Current.recheck_every(owner))
        .min()
}

/// One side of a collection: a roll if it was told how many there will be.
pub(crate) struct Side {
    /// The address of a [`RollHead`], or 0.
    roll: AtomicU64,
    /// Counts those that come and go.
    changes: AtomicU32,
    /// For those that do not wait: the counter of deaths at the last look, and when to look again.
    deaths_seen: AtomicU32,
    next_look: AtomicU64,
}

#[repr(C)]
struct RollHead {
    len: u64,
}

impl Side {
    pub(crate) fn new() -> Side {
        Side {
            roll: AtomicU64::new(0),
            changes: AtomicU32::new(0),
            deaths_seen: AtomicU32::new(0),
            next_look: AtomicU64::new(0),
        }
    }

    /// Whether it was told how many there will be.
    #[inline]
    pub(crate) fn has_roll(&self) -> bool {
        self.roll.load(Ordering::Relaxed) != 0
    }

    /// The roll; empty if there is none.
    pub(crate) fn roll(&self) -> &[AtomicU64] {
        let address = self.roll.load(Ordering::SeqCst);
        let Some(head) = NonNull::new(ptr::with_exposed_provenance_mut::<RollHead>(
            address as usize,
        )) else {
            return &[];
        };
        // SAFETY: in bounds: `tell` made it so long, and published it whole; here and there: the length does not change, the rest are
        // atomics; gone: it is freed with the collection, which is borrowed (invariant 2).
        unsafe {
            let len = head.read().len as usize;
            std::slice::from_raw_parts(head.add(1).cast().as_ptr(), len)
        }
    }

    fn layout(len: usize) -> Layout {
        let words = len.checked_add(1);
        words
            .and_then(|words| Layout::array::<u64>(words).ok())
            .expect("more are to take part than any memory has places for")
    }

    /// Makes the roll. False if there is one of another length. The caller excludes others.
    pub(crate) fn tell(&self, heap: HeapRef, len: usize) -> Result<bool> {
        if self.has_roll() {
            return Ok(self.roll().len() == len);
        }
        let block = heap.allocate(Side::layout(len))?;
        // SAFETY: in bounds: the layout; zeros are what atomics may begin with; nobody else knows of the block.
        unsafe {
            block.write_bytes(0, Side::layout(len).size());
            block.cast::<RollHead>().write(RollHead { len: len as u64 });
        }
        crash_point!("shm.enrolment.roll_made");
        let address = block.as_ptr().expose_provenance() as u64;
        self.roll.store(address, Ordering::SeqCst);
        crash_point!("shm.enrolment.roll_published");
        Ok(true)
    }

    /// Frees the roll, with its collection.
    pub(crate) fn free(&mut self, heap: HeapRef) {
        let len = self.roll().len();
        // In one step: after a death in here nobody frees it again.
        let address = self.roll.swap(0, Ordering::SeqCst) as usize;
        crash_point!("shm.enrolment.roll_taken");
        if let Some(block) = NonNull::new(ptr::with_exposed_provenance_mut(address)) {
            // SAFETY: allocated by `tell` with this layout; the collection is the caller's alone, and has no roll now.
            unsafe { heap.deallocate(block, Side::layout(len)) };
        }
    }

    /// For `visit_pointers`.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(*const u8)) {
        let address = self.roll.load(Ordering::SeqCst);
        if address != 0 {
            visit(ptr::without_provenance(address as usize));
        }
    }

    pub(crate) fn changes(&self) -> u32 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Says that somebody has come or gone; the caller then wakes who waits.
    pub(crate) fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether one that does not wait should look now. Beside a supervisor: if somebody has died since.
    #[inline]
    pub(crate) fn is_look_due(&self) -> bool {
        let deaths = Current.deaths().load(Ordering::Acquire);
        if self.deaths_seen.load(Ordering::Relaxed) != deaths {
            self.deaths_seen.store(deaths, Ordering::Relaxed);
            return true;
        }
        if Current.recheck().is_none() {
            return false;
        }
        let now = Deadline::now();
        let is_due = self.next_look.load(Ordering::Relaxed) <= now.as_nanos();
        if is_due {
            let next = now.plus(LOOK_EVERY).as_nanos();
            self.next_look.store(next, Ordering::Relaxed);
        }
        is_due
    }
}

/// When one that waits should look who is gone.
pub(crate) struct Watch {
    /// Deaths and changes, as they were at the last look.
    seen: Option<(u32, u32)>,
    next_look: Deadline,
}

impl Watch {
    pub(crate) fn new(side: &Side) -> Watch {
        // Where nobody announces deaths, to look is dear: not at once.
        let deaths = || Current.deaths().load(Ordering::Acquire);
        let seen = Current.recheck().map(|_| (deaths(), side.changes()));
        Watch {
            seen,
            next_look: Deadline::after(FIRST_LOOK_AFTER),
        }
    }

    /// Whether to look now. What changes after this was asked makes it true again.
    pub(crate) fn is_due(&mut self, side: &Side) -> bool {
        let now = (Current.deaths().load(Ordering::Acquire), side.changes());
        if self.seen == Some(now) && !self.next_look.is_past() {
            return false;
        }
        self.seen = Some(now);
        self.next_look = Deadline::after(LOOK_EVERY);
        true
    }
}

/// Nothing can be put in any more, or nothing more will come: the queue or mailbox is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Closed {
    /// Why.
    pub by: ClosedBy,
    /// How many of those that are gone have ended in order.
    pub ended_count: usize,
    /// Who of them died.
    pub died: Vec<OwnerId>,
}

/// Why a queue or mailbox is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClosedBy {
    /// Somebody has called `close`.
    Call,
    /// All enrolled producers or senders are gone.
    ProducersGone,
    /// All enrolled consumers, or the receiver, are gone.
    ConsumersGone,
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.by {
            ClosedBy::Call => return f.write_str("closed"),
            ClosedBy::ProducersGone => f.write_str("closed: all who put something in are gone")?,
            ClosedBy::ConsumersGone => {
                f.write_str("closed: all who take something out are gone")?
            }
        }
        write!(f, " ({} in order", self.ended_count)?;
        for owner in &self.died {
            write!(f, ", {owner} died")?;
        }
        f.write_str(")")
    }
}

/// Why the caller was not enrolled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// All that were to take part have come; none of them has died.
    #[error("all {expected} that were to take part are enrolled already")]
    TooMany {
        /// How many there were to be.
        expected: usize,
    },
    /// It was told another number before.
    #[error("{expected} are to take part, as was said before, not {said}")]
    ToldOtherwise {
        /// As it is.
        expected: usize,
        /// What the caller says.
        said: usize,
    },
    /// It was not told how many will take part.
    #[error("it was not said how many will take part")]
    NotTold,
    /// It is closed.
    #[error("{0}")]
    Closed(Closed),
    /// There is no memory for the roll.
    #[error(transparent)]
    Memory(#[from] crate::Error),
}

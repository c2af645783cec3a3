//! The slots of a mailbox: whose each one is, and hints where to look.
//!
//! **Protocol.** A slot's *word* is the truth:
//!
//! | word | means | its owner died |
//! |---|---|---|
//! | 0 | free | – |
//! | owner | somebody writes a message there, or drops one; its contents are nobody's to read | a sender that needs a slot takes it over by CAS; what was written is forgotten, what was being dropped is not dropped further |
//! | full, number | a message has arrived. Only the receiver touches it | the message stays, whoever sent it; the next receiver finds it, also one that the last was reading |
//!
//! * Send: CAS 0 → me; write; number := the next; store (full, number), which is the commit; set the slot's bit among the *arrived*; wake the receiver.
//! * Free: store 0, set the slot's bit among the *free*; wake a sender. If the message must be dropped first: CAS full → me before.
//! * Bits are hints. Who takes one looks at the word; a bit that is missing because its setter died is made good by a *sweep* over all words, which
//!   those who find no bit do when somebody may have died; a sender goes on with it until it finds nothing.
//!
//! The receiver keeps for itself, in private memory, which messages it knows of; a new receiver begins with a sweep.
//!
//! **Invariants.**
//! 1. A slot's contents are touched only by whom its word names, or by the receiver if it is full.
//! 2. A word that names an owner is changed by that owner, or after its death.
//! 3. Messages of one sender have growing numbers. The receiver, once it knows of one, knows of all that this sender sent before: their bits
//!    were set before, and it looks at the bits until it finds none.
//! 4. A sender asks whether the mailbox is closed after it has its slot and before it commits. So when it was closed first, and then no word names
//!    a living sender, no message comes any more.
//!
//! **Not here.** The messages, waiting, who is the receiver.

use super::super::enrolment::owner_of;
use crate::sync::{AtomicU64, Ordering, fence_in_models};
use netmcore_sem::{Current, Owners};
use netmcore_sys::crash_point;

/// A message has arrived: the number is in the other bits.
const FULL: u64 = 1 << 31;
const BITS: usize = 64;

fn full(number: u64) -> u64 {
    number >> 31 << 32 | FULL | number & (FULL - 1)
}

fn number_of(word: u64) -> Option<u64> {
    (word & FULL != 0).then_some(word >> 32 << 31 | word & (FULL - 1))
}

fn is_dead(word: u64) -> bool {
    word != 0 && word & FULL == 0 && owner_of(word).is_some_and(|owner| !Current.is_alive(owner))
}

/// A message that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrived {
    /// In the order of sending.
    pub number: u64,
    /// Where it lies.
    pub slot: usize,
}

/// How many words the hints of so many slots take.
pub fn hint_words(slots: usize) -> usize {
    slots.div_ceil(BITS)
}

/// The state of all slots, wherever it lies.
#[derive(Clone, Copy)]
pub struct Slots<'a> {
    /// One for each slot.
    pub words: &'a [AtomicU64],
    /// A bit for each slot.
    pub arrived: &'a [AtomicU64],
    /// A bit for each slot.
    pub free: &'a [AtomicU64],
    /// The number of the next message.
    pub next_number: &'a AtomicU64,
}

impl Slots<'_> {
    /// Sets the hints of slots that are all free.
    pub fn hint_all_free(self) {
        for slot in 0..self.words.len() {
            hint(self.free, slot);
        }
    }

    /// Takes a free slot for `me`, if there is a hint of one.
    #[inline]
    pub fn claim(self, me: u64) -> Option<usize> {
        for (at, hints) in self.free.iter().enumerate() {
            loop {
                let bits = hints.load(Ordering::SeqCst);
                if bits == 0 {
                    break;
                }
                let first = bits.trailing_zeros() as usize;
                // Others may be quicker.
                if hints.fetch_and(!(1 << first), Ordering::SeqCst) & 1 << first == 0 {
                    continue;
                }
                crash_point!("shm.mailbox.hint_taken");
                let slot = at * BITS + first;
                if self.change(slot, 0, me) {
                    fence_in_models();
                    crash_point!("shm.mailbox.claimed");
                    return Some(slot);
                }
            }
        }
        None
    }

    /// Takes a slot for `me` that is free, or that a dead one had.
    #[cold]
    pub fn claim_sweeping(self, me: u64) -> Option<usize> {
        let slot = (0..self.words.len()).find(|&slot| {
            let word = self.words[slot].load(Ordering::SeqCst);
            (word == 0 || is_dead(word)) && self.change(slot, word, me)
        });
        fence_in_models();
        slot
    }

    /// The message in the slot is written: it has arrived.
    #[inline]
    pub fn publish(self, slot: usize) {
        let number = self.next_number.fetch_add(1, Ordering::SeqCst);
        crash_point!("shm.mailbox.numbered");
        self.words[slot].store(full(number), Ordering::SeqCst);
        crash_point!("shm.mailbox.sent");
        hint(self.arrived, slot);
        crash_point!("shm.mailbox.sent_before_wake");
    }

    /// Frees the slot, which is the caller's.
    #[inline]
    pub fn release(self, slot: usize) {
        self.words[slot].store(0, Ordering::SeqCst);
        crash_point!("shm.mailbox.freed");
        hint(self.free, slot);
        crash_point!("shm.mailbox.freed_before_wake");
    }

    /// Takes the slot of a message for `me`, to drop the message. By the receiver.
    pub fn retract(self, arrived: Arrived, me: u64) {
        self.words[arrived.slot].store(me, Ordering::SeqCst);
        crash_point!("shm.mailbox.retracted");
    }

    /// Calls `found` for the messages that there are hints of. By the receiver.
    #[inline]
    pub fn collect(self, mut found: impl FnMut(Arrived)) {
        loop {
            let mut is_done = true;
            for (at, hints) in self.arrived.iter().enumerate() {
                if hints.load(Ordering::SeqCst) == 0 {
                    continue;
                }
                is_done = false;
                let mut bits = hints.swap(0, Ordering::SeqCst);
                crash_point!("shm.mailbox.hints_taken");
                while bits != 0 {
                    let slot = at * BITS + bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    if let Some(number) = self.number(slot) {
                        found(Arrived { number, slot });
                    }
                }
            }
            // Invariant 3: one hint word holds all or none of those that were set before.
            if is_done {
                return;
            }
        }
    }

    /// Calls `found` for all messages, perhaps twice for some. By the receiver.
    #[cold]
    pub fn sweep(self, mut found: impl FnMut(Arrived)) {
        self.all(&mut found);
        // Invariant 3: of what was sent meanwhile, the first may have been missed and the second found.
        self.collect(found);
    }

    /// Calls `found` for all messages that are there, one look at each slot.
    #[cold]
    pub fn all(self, mut found: impl FnMut(Arrived)) {
        for slot in 0..self.words.len() {
            if let Some(number) = self.number(slot) {
                found(Arrived { number, slot });
            }
        }
    }

    /// Whether somebody who lives may still send: see invariant 4.
    #[cold]
    pub fn is_being_sent(self) -> bool {
        fence_in_models();
        self.words.iter().any(|word| {
            let word = word.load(Ordering::SeqCst);
            word != 0 && word & FULL == 0 && !is_dead(word)
        })
    }

    /// The number of the message in the slot, if there is one.
    pub fn number(self, slot: usize) -> Option<u64> {
        number_of(self.words[slot].load(Ordering::SeqCst))
    }

    fn change(self, slot: usize, from: u64, to: u64) -> bool {
        self.words[slot]
            .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

#[inline]
fn hint(hints: &[AtomicU64], slot: usize) {
    hints[slot / BITS].fetch_or(1 << (slot % BITS), Ordering::SeqCst);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn word_keeps_numbers_of_63_bits_in_order() {
        let numbers = [0, 1, FULL - 1, FULL, FULL + 1, 1 << 40, (1 << 63) - 1];
        for number in numbers {
            assert_eq!(number_of(full(number)), Some(number));
        }
        assert_eq!(number_of(0), None);
        assert_eq!(
            number_of(super::super::super::enrolment::word_of(Current.me())),
            None
        );
    }
}

//! One slot of a container in memory: a word that says what is in it, whose that is, how often it was used, room for a `sem_t`.
//!
//! **Protocol.** The word is the truth about the slot. Its low half is `tag << 30 | index`. With an owner in it, the index is the owner's and the high half
//! the owner's generation; with a semaphore in it, the high half is *its* generation, and the owner of a `Live` one stands beside the word.
//!
//! | word | means | the owner died: whoever comes by |
//! |---|---|---|
//! | `Free` (0) | nothing exists | – |
//! | `Preparing(owner)` | the semaphore may exist; nobody was told of it | takes it as `Freeing`, removes what there is |
//! | `Live(generation)` | it exists, and goes with its owner | takes it as `Freeing`, removes it |
//! | `Kept(generation)` | it exists until it is freed | – |
//! | `Freeing(owner)` | it may exist still; nobody may use it | takes it over as `Freeing`, and goes on removing |
//!
//! **Invariants.**
//! 1. Only the owner, or who has found it dead, changes a `Preparing` or `Freeing` slot, and by one CAS from the very word that it read.
//! 2. `uses` and `owner` are changed by the owner of a `Preparing` slot only, the former only upwards: it is the generation of the next semaphore. So a word
//!    with a generation never comes again, and as long as it is there, `owner` is that semaphore's.
//! 3. The room for the `sem_t` holds the image of one whenever the slot is `Live` or `Kept`, is written by atomic stores only, and by
//!    the owner of a `Preparing` slot only. So a user of a semaphore that is gone does harm to permits, never to memory.

use crate::owner::{OwnerId, Owners};
use netmcore_sys::crash_point;
use netmcore_sys::sem::MemSem;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Whose a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Preparing(OwnerId),
    Live(u32),
    Kept(u32),
    Freeing(OwnerId),
}

const PREPARING: u32 = 1;
const LIVE: u32 = 2;
const FREEING: u32 = 3;
const TAG_SHIFT: u32 = 30;
const KEPT: u32 = 1;

impl State {
    /// What the word says; `None` if no slot has such a word.
    pub(super) fn of(word: u64) -> Option<State> {
        let low = (word & u64::from(u32::MAX)) as u32;
        let index = low & (OwnerId::INDEX_LIMIT - 1);
        let generation = (word >> 32) as u32;
        let owner = OwnerId { index, generation };
        match (low >> TAG_SHIFT, index) {
            (PREPARING, _) => Some(State::Preparing(owner)),
            (LIVE, 0) => Some(State::Live(generation)),
            (FREEING, _) => Some(State::Freeing(owner)),
            (0, KEPT) => Some(State::Kept(generation)),
            _ if word == 0 => Some(State::Free),
            _ => None,
        }
    }

    /// # Panics
    ///
    /// If the owner's index is not below [`OwnerId::INDEX_LIMIT`].
    pub(super) fn word(self) -> u64 {
        let (tag, index, generation) = match self {
            State::Free => (0, 0, 0),
            State::Kept(generation) => (0, KEPT, generation),
            State::Live(generation) => (LIVE, 0, generation),
            State::Preparing(owner) => (PREPARING, owner.index, owner.generation),
            State::Freeing(owner) => (FREEING, owner.index, owner.generation),
        };
        assert!(
            index < OwnerId::INDEX_LIMIT,
            "the owner's index {index} is not below 2^30"
        );
        u64::from(generation) << 32 | u64::from(tag << TAG_SHIFT | index)
    }

    /// The generation of the semaphore that can be used.
    pub(super) fn usable(self) -> Option<u32> {
        match self {
            State::Live(generation) | State::Kept(generation) => Some(generation),
            State::Free | State::Preparing(_) | State::Freeing(_) => None,
        }
    }
}

/// What lies in shared memory for each semaphore; zeros are a free one.
#[repr(C, align(64))]
pub(super) struct Slot {
    word: AtomicU64,
    uses: AtomicU32,
    reserved: AtomicU32,
    /// Of the `Live` semaphore: its index and generation.
    owner: AtomicU64,
    /// The image of a `sem_t`, for the native backend.
    sem: [AtomicU64; SEM_WORDS],
}

pub(super) const SEM_WORDS: usize = 4;

const _: () = assert!(size_of::<Slot>() == 64);
// On the systems that we know a `sem_t` has 32 bytes (glibc and musl, 64 bits).
const _: () = assert!(
    MemSem::SIZE <= SEM_WORDS * 8 && MemSem::SIZE.is_multiple_of(8) && align_of::<MemSem>() <= 8
);

impl Slot {
    /// What the slot's word says. A word that no slot has counts as somebody else's business: [`None`].
    pub(super) fn state(&self) -> Option<State> {
        State::of(self.word.load(Ordering::Acquire))
    }

    /// Whose the slot is, which is in this state; if anybody's. Right if it is in that state still.
    pub(super) fn owner(&self, state: State) -> Option<OwnerId> {
        match state {
            State::Free | State::Kept(_) => None,
            State::Preparing(owner) | State::Freeing(owner) => Some(owner),
            State::Live(_) => {
                let word = self.owner.load(Ordering::Acquire);
                Some(OwnerId {
                    index: word as u32,
                    generation: (word >> 32) as u32,
                })
            }
        }
    }

    /// Goes from one state to another, if it is still in the first.
    pub(super) fn change(&self, from: State, to: State) -> bool {
        let changed =
            self.word
                .compare_exchange(from.word(), to.word(), Ordering::AcqRel, Ordering::Relaxed);
        changed.is_ok()
    }

    /// Takes a free slot, and counts its use. Gives the generation of the semaphore to be made.
    pub(super) fn prepare(&self, me: OwnerId) -> Option<u32> {
        if !self.change(State::Free, State::Preparing(me)) {
            return None;
        }
        crash_point!("sem.container.slot_taken");
        let generation = self.uses.load(Ordering::Relaxed).wrapping_add(1);
        self.uses.store(generation, Ordering::Release);
        crash_point!("sem.container.slot_counted");
        let owner = u64::from(me.generation) << 32 | u64::from(me.index);
        // Release: who reads it sees that the word is not what it was.
        self.owner.store(owner, Ordering::Release);
        crash_point!("sem.container.slot_named");
        Some(generation)
    }

    /// Takes over what a dead owner left, to remove it; says what was there.
    pub(super) fn take_from_dead<O: Owners + ?Sized>(&self, owners: &O) -> Option<State> {
        let found = self.state()?;
        let owner = self.owner(found)?;
        if owners.is_alive(owner) {
            return None;
        }
        let taken = self.change(found, State::Freeing(owners.me()));
        if taken {
            crash_point!("sem.container.slot_taken_over");
        }
        taken.then_some(found)
    }

    /// Writes the image of a semaphore; for the owner of a `Preparing` slot.
    pub(super) fn write_sem(&self, image: [u64; SEM_WORDS]) {
        for (shared, word) in self.sem.iter().zip(image) {
            shared.store(word, Ordering::Relaxed);
            crash_point!("sem.container.sem_written");
        }
    }

    /// Where the semaphore is.
    pub(super) fn sem(&self) -> *const MemSem {
        self.sem.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_read_as_it_was_written() {
        assert_eq!(State::of(0), Some(State::Free));
        for generation in [0, 1, u32::MAX] {
            for state in [State::Live(generation), State::Kept(generation)] {
                assert_eq!(State::of(state.word()), Some(state));
            }
            for index in [0, 1, 7, OwnerId::INDEX_LIMIT - 1] {
                let owner = OwnerId { index, generation };
                for state in [State::Preparing(owner), State::Freeing(owner)] {
                    assert_eq!(State::of(state.word()), Some(state));
                }
            }
        }
        let live = State::Live(1).word();
        for stray in [2, 1 << 29, 1 << 32, live + 1] {
            assert_eq!(State::of(stray), None, "{stray:#x}");
        }
    }

    /// A stale id cannot even for a moment take the semaphore that the same owner has made in the same slot since.
    #[test]
    fn word_of_a_semaphore_never_comes_again() {
        let slot = Slot {
            word: AtomicU64::new(0),
            uses: AtomicU32::new(u32::MAX - 1),
            reserved: AtomicU32::new(0),
            owner: AtomicU64::new(0),
            sem: [const { AtomicU64::new(0) }; SEM_WORDS],
        };
        let me = OwnerId {
            index: 3,
            generation: 9,
        };
        let mut stale = None;
        for keeps in [false, true, false, true] {
            let generation = slot.prepare(me).unwrap();
            let live = State::Live(generation);
            assert!(slot.change(State::Preparing(me), live));
            assert_eq!(slot.owner(live), Some(me));
            let state = match keeps {
                true => State::Kept(generation),
                false => live,
            };
            assert!(slot.change(live, state));
            for word in [stale.map(State::Live), stale.map(State::Kept)] {
                assert!(word.is_none_or(|word| !slot.change(word, State::Freeing(me))));
            }
            assert!(slot.change(state, State::Freeing(me)));
            assert!(slot.change(State::Freeing(me), State::Free));
            stale = Some(generation);
        }
    }

    #[test]
    #[should_panic(expected = "not below 2^30")]
    fn index_out_of_range_panics() {
        let owner = OwnerId {
            index: OwnerId::INDEX_LIMIT,
            generation: 0,
        };
        State::Freeing(owner).word();
    }
}

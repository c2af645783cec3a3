//! Whose a run of pages is: the word that the page pool keeps for the owner of the pool.
//!
//! **Protocol.** A note is 0 for a run that is free, or a kind and an [`OwnerId`], or [`Holder::Abandoned`] in its place:
//!
//! | note | what the run is | its owner died |
//! |---|---|---|
//! | `Preparing(owner)` | about to be a page of small blocks, or to be given back; nobody has a block in it | whoever comes by gives it back |
//! | `Small(owner)` | a page of small blocks: `page.rs` | whoever comes by becomes the owner |
//! | `Small(abandoned)` | the same, given up by its owner in order | whoever comes by becomes the owner |
//! | `Large(owner)` | a block for which no size class is large enough | it stays allocated |
//!
//! A page changes its owner by one compare-and-swap. An id is never given twice, so the note of a dead owner does not come again.
//!
//! **If a process dies here.** As the table says.

use netmcore_sem::OwnerId;

/// The index of no owner.
const ABANDONED: u64 = OwnerId::INDEX_LIMIT as u64 - 1;

/// What a run of pages is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Preparing = 1,
    Small = 2,
    Large = 3,
}

/// Who answers for a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Holder {
    Owner(OwnerId),
    Abandoned,
}

/// A note, as it is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Note(pub(super) u64);

impl Note {
    #[inline]
    pub(super) fn new(kind: Kind, holder: Holder) -> Note {
        let (index, generation) = match holder {
            Holder::Owner(id) => (u64::from(id.index), u64::from(id.generation)),
            Holder::Abandoned => (ABANDONED, 0),
        };
        Note(index << 34 | generation << 2 | kind as u64)
    }

    /// The same owner's note of another kind.
    pub(super) fn with(self, kind: Kind) -> Note {
        Note(self.0 & !3 | kind as u64)
    }

    /// What it says; `None` if it says nothing, or was never written by a heap.
    pub(super) fn read(self) -> Option<(Kind, Holder)> {
        let kind = match self.0 & 3 {
            1 => Kind::Preparing,
            2 => Kind::Small,
            3 => Kind::Large,
            _ => return None,
        };
        let holder = match self.0 >> 34 {
            ABANDONED => Holder::Abandoned,
            index => Holder::Owner(OwnerId {
                index: index as u32,
                generation: (self.0 >> 2) as u32,
            }),
        };
        Some((kind, holder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn note_reads_as_it_was_written() {
        let owner = |index, generation| Holder::Owner(OwnerId { index, generation });
        for holder in [
            owner(0, 0),
            owner(OwnerId::INDEX_LIMIT - 2, u32::MAX),
            owner(7, 1 << 31),
            Holder::Abandoned,
        ] {
            for kind in [Kind::Preparing, Kind::Small, Kind::Large] {
                assert_eq!(Note::new(kind, holder).read(), Some((kind, holder)));
            }
        }
        assert_eq!(Note(0).read(), None);
    }
}

//! Who uses which part of an array, a matrix or a buffer: claims of areas, which end when they are dropped or their holder dies.
//!
//! **Protocol.** A table of entries, each with the thread that has the claim, its kind, and its area: a rectangle of rows and columns.
//! A lock, held for as long as it takes to look through the table, is around each entry's making; an entry ends by one
//! store of its holder, without the lock. Claims that overlap exclude each other, unless both are shared.
//!
//! | owner of an entry | kind | means | its owner died |
//! |---|---|---|---|
//! | 0 | any | free | – |
//! | somebody | shared | reads there | whoever is in its way frees the entry |
//! | somebody | exclusive | reads and writes there | whoever is in its way makes it *abandoned*; a panic while it is held does, too |
//! | somebody | sole | as exclusive, for changes that are committed by one store | as shared |
//! | a dead one | abandoned | nobody is there; what the dead one has left is in doubt | – |
//!
//! * Claim: lock; find no entry in the way, and a free one; write kind and area, then the owner: that is the claim. Unlock. An
//!   exclusive claim that covers an abandoned area then frees its entry: that area is the claim's now, and its holder is told.
//! * Who finds somebody in the way unlocks, asks whether that one lives, and if so waits for the table to change.
//! * The first entries lie in place; chunks of more are linked behind them when all are in use, and stay.
//!
//! **Invariants.**
//! 1. Kind and area of an entry in use are only changed under the lock, and only to `abandoned`.
//! 2. Of claims whose holders live and that overlap, all are shared.
//! 3. The lock is held across no system call and no code of others. So whoever dies with it leaves a table that is in order: its
//!    half-made entry is free.
//!
//! **If a process dies here.** The table above. After an entry was freed and before the wake-up: the death wakes those that wait.
//!
//! **Not here.** Fairness: many small claims may keep a large one waiting. Deadlocks among several holders, each waiting for another: give a
//! deadline. A thread in its own way is told.
//!
//! # Safety
//!
//! Chunks are made of atomics, are zeroed before they are linked, and are freed by the owner of the table only, who has it alone.
//!
//! That claims exclude each other rests on [`Owners`]: who is called dead uses nothing any more. A claim that is leaked lasts until its process is dead,
//! as the locks of netmcore-sem do.

#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::heap::HeapRef;
use netmcore_sem::current::{Holding, fork_epoch};
use netmcore_sem::{Current, LockGuard, LockWord, OwnerId, Owners, WaitWord};
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicPtr, AtomicU64};
use std::thread;
use std::time::{Duration, Instant};

/// Why a part of an array, a matrix or a buffer could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// There is no such part.
    #[error("{what} up to {end} of {len}")]
    OutOfBounds {
        /// Rows, columns, elements, bytes.
        what: &'static str,
        /// The end of what was asked for, or the index.
        end: u64,
        /// How many there are.
        len: u64,
    },
    /// The calling thread itself is in the way, by a claim that it holds.
    #[error("this thread holds a claim that is in the way")]
    WouldDeadlock,
    /// The deadline passed while another one used the part.
    #[error("others used this part for {waited:?}")]
    TimedOut {
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// There is no memory, or a value does not belong into this heap.
    #[error(transparent)]
    Memory(#[from] Error),
}

/// What a claim is for; see the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Shared,
    Exclusive,
    Sole,
}

const FREE: u64 = 0;
const SHARED: u64 = 0;
const EXCLUSIVE: u64 = 1;
const SOLE: u64 = 2;
const ABANDONED: u64 = 3;

impl Kind {
    fn to_word(self) -> u64 {
        match self {
            Kind::Shared => SHARED,
            Kind::Exclusive => EXCLUSIVE,
            Kind::Sole => SOLE,
        }
    }
}

/// A rectangle. Of what has one dimension only, the columns are `0..1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) rows: Range<u64>,
    pub(super) columns: Range<u64>,
}

impl Area {
    pub(super) fn of_rows(rows: Range<u64>) -> Area {
        Area {
            rows,
            columns: 0..u64::MAX,
        }
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() || self.columns.is_empty()
    }

    fn overlaps(&self, other: &Area) -> bool {
        fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
            one.start.max(other.start) < one.end.min(other.end)
        }
        overlap(&self.rows, &other.rows) && overlap(&self.columns, &other.columns)
    }

    fn covers(&self, other: &Area) -> bool {
        fn cover(one: &Range<u64>, other: &Range<u64>) -> bool {
            one.start <= other.start && other.end <= one.end
        }
        cover(&self.rows, &other.rows) && cover(&self.columns, &other.columns)
    }
}

/// One claim. A cache line, so that holders do not disturb each other.
#[repr(C, align(64))]
struct Entry {
    /// Written last, see the protocol.
    owner: AtomicU64,
    kind: AtomicU64,
    rows: [AtomicU64; 2],
    columns: [AtomicU64; 2],
}

impl Entry {
    const fn new() -> Entry {
        Entry {
            owner: AtomicU64::new(FREE),
            kind: AtomicU64::new(SHARED),
            rows: [const { AtomicU64::new(0) }; 2],
            columns: [const { AtomicU64::new(0) }; 2],
        }
    }

    fn area(&self) -> Area {
        let range = |ends: &[AtomicU64; 2]| ends[0].load(Relaxed)..ends[1].load(Relaxed);
        Area {
            rows: range(&self.rows),
            columns: range(&self.columns),
        }
    }

    fn is_abandoned(&self) -> bool {
        self.kind.load(Relaxed) == ABANDONED
    }
}

const ENTRIES_IN_PLACE: usize = 8;
const ENTRIES_OF_CHUNK: usize = 31;

/// More entries, in the heap.
#[repr(C)]
struct Chunk {
    next: AtomicPtr<Chunk>,
    entries: [Entry; ENTRIES_OF_CHUNK],
}

/// The table.
#[repr(C)]
pub(super) struct Claims {
    lock: LockWord,
    /// Where those that are refused wait for a claim to end.
    changed: WaitWord,
    next: AtomicPtr<Chunk>,
    entries: [Entry; ENTRIES_IN_PLACE],
}

/// What an attempt to claim came to.
enum Attempt<'a> {
    Claimed(&'a Entry, Option<OwnerId>),
    InTheWay(OwnerId),
    WouldDeadlock,
    Full,
}

/// An abandoned area and who has left it.
pub(super) type Abandoned = (Area, OwnerId);

impl Claims {
    pub(super) fn new() -> Claims {
        Claims {
            lock: LockWord::new(),
            changed: WaitWord::new(),
            next: AtomicPtr::new(ptr::null_mut()),
            entries: [const { Entry::new() }; ENTRIES_IN_PLACE],
        }
    }

    /// Claims the area, waiting for others; until the deadline at most.
    pub(super) fn claim(
        &self,
        heap: HeapRef,
        area: &Area,
        kind: Kind,
        deadline: Option<Instant>,
    ) -> std::result::Result<Claim<'_>, ClaimError> {
        let in_the_way = match self.claim_or_owner(heap, area, kind)? {
            Ok(claim) => return Ok(claim),
            Err(owner) => owner,
        };
        let started = Instant::now();
        let recheck = Current.recheck_every(in_the_way);
        let claimed = self
            .changed
            .wait(&Current, recheck, deadline.map(Into::into), || {
                match self.claim_or_owner(heap, area, kind) {
                    Ok(Err(_)) => None,
                    Ok(Ok(claim)) => Some(Ok(claim)),
                    Err(error) => Some(Err(error)),
                }
            });
        claimed.unwrap_or_else(|| {
            Err(ClaimError::TimedOut {
                waited: started.elapsed(),
            })
        })
    }

    /// Claims the area if nobody is in the way.
    pub(super) fn try_claim(
        &self,
        heap: HeapRef,
        area: &Area,
        kind: Kind,
    ) -> std::result::Result<Option<Claim<'_>>, ClaimError> {
        Ok(self.claim_or_owner(heap, area, kind)?.ok())
    }

    fn claim_or_owner(
        &self,
        heap: HeapRef,
        area: &Area,
        kind: Kind,
    ) -> std::result::Result<std::result::Result<Claim<'_>, OwnerId>, ClaimError> {
        let me = Current.me();
        loop {
            match self.attempt(me, area, kind) {
                Attempt::Claimed(entry, abandoned_by) => {
                    return Ok(Ok(Claim {
                        claims: self,
                        entry,
                        epoch: fork_epoch(),
                        abandoned_by,
                        was_panicking: thread::panicking(),
                        _holding: Holding::begin(),
                    }));
                }
                Attempt::InTheWay(owner) => return Ok(Err(owner)),
                Attempt::WouldDeadlock => return Err(ClaimError::WouldDeadlock),
                Attempt::Full => {
                    if !self.settle_the_dead() {
                        self.add_chunk(heap)?;
                    }
                }
            }
        }
    }

    fn attempt(&self, me: OwnerId, area: &Area, kind: Kind) -> Attempt<'_> {
        loop {
            let locked = self.lock();
            let mut free = None;
            let mut in_the_way = None;
            let mut abandoned_by = None;
            for entry in self.entries() {
                let owner = entry.owner.load(SeqCst);
                if owner == FREE {
                    free = free.or(Some(entry));
                } else if entry.area().overlaps(area) {
                    match entry.kind.load(Relaxed) {
                        ABANDONED => abandoned_by = owner_of(owner),
                        SHARED if kind == Kind::Shared => {}
                        _ => {
                            in_the_way = Some((entry, owner));
                            break;
                        }
                    }
                }
            }
            if let Some((entry, word)) = in_the_way {
                // Invariant 3: the question may be a system call.
                drop(locked);
                match owner_of(word) {
                    Some(owner) if owner == me => return Attempt::WouldDeadlock,
                    Some(owner) if Current.is_alive(owner) => return Attempt::InTheWay(owner),
                    _ => self.settle(entry, word),
                }
                continue;
            }
            let Some(entry) = free else {
                return Attempt::Full;
            };
            entry.kind.store(kind.to_word(), Relaxed);
            entry.rows[0].store(area.rows.start, Relaxed);
            entry.rows[1].store(area.rows.end, Relaxed);
            entry.columns[0].store(area.columns.start, Relaxed);
            entry.columns[1].store(area.columns.end, Relaxed);
            crash_point!("shm.claims.written");
            entry.owner.store(word_of(me), SeqCst);
            crash_point!("shm.claims.claimed");
            if abandoned_by.is_some() && kind == Kind::Exclusive {
                self.forget_abandoned_in(area);
            }
            return Attempt::Claimed(entry, abandoned_by);
        }
    }

    /// Under the lock.
    fn forget_abandoned_in(&self, area: &Area) {
        for entry in self.entries() {
            if entry.owner.load(SeqCst) != FREE
                && entry.is_abandoned()
                && area.covers(&entry.area())
            {
                entry.owner.store(FREE, SeqCst);
                crash_point!("shm.claims.forgotten");
            }
        }
    }

    /// Ends the claim of one that has died, or panics.
    fn settle(&self, entry: &Entry, word: u64) {
        let _locked = self.lock();
        // Another one may have settled it, and the entry may be another's; not the dead one's again.
        if entry.owner.load(SeqCst) == word {
            match entry.kind.load(Relaxed) {
                // Nothing can be in doubt in an empty area, and no claim would ever cover it.
                EXCLUSIVE if !entry.area().is_empty() => entry.kind.store(ABANDONED, SeqCst),
                ABANDONED => {}
                _ => entry.owner.store(FREE, SeqCst),
            }
            crash_point!("shm.claims.settled");
        }
    }

    /// Ends the claims of all that have died; true if an entry is free now.
    fn settle_the_dead(&self) -> bool {
        for entry in self.entries() {
            let word = entry.owner.load(SeqCst);
            let is_dead = owner_of(word).is_some_and(|owner| !Current.is_alive(owner));
            if is_dead && !entry.is_abandoned() {
                self.settle(entry, word);
            }
        }
        self.entries().any(|entry| entry.owner.load(SeqCst) == FREE)
    }

    /// What dead ones have left in doubt. With `forget` it is told for the last time.
    pub(super) fn abandoned(&self, forget: bool) -> Vec<Abandoned> {
        self.settle_the_dead();
        // Before the lock is taken (invariant 3).
        let mut found = Vec::with_capacity(self.entries().count());
        let _locked = self.lock();
        for entry in self.entries() {
            if let Some(owner) = owner_of(entry.owner.load(SeqCst))
                && entry.is_abandoned()
            {
                found.push((entry.area(), owner));
                if forget {
                    entry.owner.store(FREE, SeqCst);
                }
            }
        }
        found
    }

    /// Ends the claims of those that have died and whose rows begin below this one.
    pub(super) fn settle_the_dead_below(&self, row: u64) {
        for entry in self.entries() {
            let word = entry.owner.load(SeqCst);
            // The row may be that of another claim by now. Then the question is for nothing; `settle` looks again.
            if let Some(owner) = owner_of(word)
                && entry.rows[0].load(Relaxed) < row
                && !Current.is_alive(owner)
            {
                self.settle(entry, word);
            }
        }
    }

    /// The smallest row that is claimed, by whomever. Under the lock.
    pub(super) fn first_row_claimed(&self, _: &LockGuard<'_>) -> u64 {
        let in_use = |entry: &&Entry| entry.owner.load(SeqCst) != FREE;
        let rows = self.entries().filter(in_use);
        rows.map(|entry| entry.rows[0].load(Relaxed))
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Takes the lock, for a moment. Whoever died with it has left everything in order.
    pub(super) fn lock(&self) -> LockGuard<'_> {
        match self.lock.lock(&Current) {
            Ok(guard) => guard,
            Err(died) => died.guard,
        }
    }

    fn add_chunk(&self, heap: HeapRef) -> Result<()> {
        let layout = Layout::new::<Chunk>();
        let chunk = heap.allocate(layout)?.cast::<Chunk>();
        // SAFETY: in bounds of the new block, of which nobody else knows; zeros are a chunk of free entries.
        unsafe { chunk.write_bytes(0, 1) };
        crash_point!("shm.claims.chunk_made");
        {
            let _locked = self.lock();
            if !self.entries().any(|entry| entry.owner.load(SeqCst) == FREE) {
                let mut link = &self.next;
                // SAFETY: null, or a chunk that is linked.
                while let Some(next) = unsafe { link.load(SeqCst).as_ref() } {
                    link = &next.next;
                }
                link.store(chunk.as_ptr(), SeqCst);
                crash_point!("shm.claims.chunk_linked");
                return Ok(());
            }
        }
        // SAFETY: allocated above with this layout, and not linked.
        unsafe { heap.deallocate(chunk.cast(), layout) };
        Ok(())
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries
            .iter()
            .chain(self.chunks().flat_map(|chunk| &chunk.entries))
    }

    fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        // SAFETY: null, or a linked chunk: never unlinked while the table is shared.
        let follow = |link: &AtomicPtr<Chunk>| unsafe { link.load(SeqCst).as_ref() };
        std::iter::successors(follow(&self.next), move |chunk| follow(&chunk.next))
    }

    pub(super) fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        for chunk in self.chunks() {
            visit(ptr::from_ref(chunk).cast());
        }
    }

    /// Frees the chunks.
    ///
    /// # Safety
    ///
    /// - The heap is the one that was always given.
    pub(super) unsafe fn free(&mut self, heap: HeapRef) {
        // In one step: after a death in here nobody frees them again.
        let mut next = self.next.swap(ptr::null_mut(), SeqCst);
        while let Some(chunk) = NonNull::new(next) {
            // SAFETY: a chunk, ours alone; allocated with this layout in this heap.
            unsafe {
                next = chunk.as_ref().next.load(Relaxed);
                heap.deallocate(chunk.cast(), Layout::new::<Chunk>());
            }
        }
    }
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_use = |entry: &&Entry| entry.owner.load(SeqCst) != FREE;
        f.debug_struct("Claims")
            .field("count", &self.entries().filter(in_use).count())
            .finish()
    }
}

/// An area that the calling thread has; ends when it is dropped.
#[must_use = "the claim ends when it is dropped"]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    entry: &'a Entry,
    /// Tells the holder from its forked copies.
    epoch: u64,
    /// Somebody who died or panicked with an exclusive claim of a part of the area, which nobody has had since.
    pub(super) abandoned_by: Option<OwnerId>,
    /// Whether the thread was panicking already when it claimed.
    was_panicking: bool,
    _holding: Holding,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            crash_point!("shm.claims.ending");
            // A panic counts as a death, as it does for a mutex.
            match !self.was_panicking && thread::panicking() {
                true => {
                    let me = self.entry.owner.load(Relaxed);
                    self.claims.settle(self.entry, me);
                }
                false => self.entry.owner.store(FREE, SeqCst),
            }
            crash_point!("shm.claims.ended");
            self.claims.changed.notify_all();
        }
    }
}

fn word_of(owner: OwnerId) -> u64 {
    u64::from(owner.generation) << 32 | u64::from(owner.index + 1)
}

fn owner_of(word: u64) -> Option<OwnerId> {
    Some(OwnerId {
        index: (word as u32).checked_sub(1)?,
        generation: (word >> 32) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_overlap_where_rows_and_columns_do() {
        let area = |rows, columns| Area { rows, columns };
        let block = area(2..4, 10..20);
        assert!(block.overlaps(&area(3..9, 19..30)));
        assert!(!block.overlaps(&area(4..9, 10..20)));
        assert!(!block.overlaps(&area(2..4, 20..30)));
        assert!(!block.overlaps(&area(3..3, 10..20)), "empty");
        assert!(block.covers(&area(2..3, 11..12)) && !block.covers(&area(2..5, 11..12)));
        assert!(Area::of_rows(0..9).covers(&block));
    }

    #[test]
    fn word_is_an_owner_or_free() {
        let owner = OwnerId {
            index: 0,
            generation: 7,
        };
        assert_eq!(owner_of(word_of(owner)), Some(owner));
        assert_eq!(owner_of(FREE), None);
    }
}

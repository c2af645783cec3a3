//! Blocks that were unlinked, and wait until no reader can have them any more.
//!
//! **Protocol.** A list in shared memory, of blocks that begin with a [`Node`]. Each collection has its own, so that whoever frees knows
//! the types. Anybody puts a block in, by one compare-and-swap of the head. One at a time takes blocks out: the holder of
//! the list's lock. Nobody waits for that one; the next to put something in tries again.
//!
//! | step | the process died after it |
//! |---|---|
//! | stamped | the block is lost: it stays allocated until the heap is gone |
//! | head swapped | the next to take out finds it |
//! | locked | the lock is handed over; the list is whole at every step |
//! | taken out, by one store | the block is lost, with what its value owns |
//! | freed | – |
//!
//! **Invariants.**
//! 1. Who is in the list was unlinked before it was put in. It is in no other list, and there once.
//! 2. `next` of a block in the list is changed by the holder of the lock only, the head by all, and blocks leave by the holder's
//!    hand only. So a head that is as it was has the same list behind it.
//! 3. What is freed was in the list before the scan of the readers began, and before it was looked how many slots there are.
//!
//! **If a process dies here.** The table.
//!
//! **Not here.** Who reads: `pins`.
//!
//! # Safety
//!
//! Links are 0 or the address of a node in the list, whose memory is valid until it is taken out (invariant 2).

#![allow(unsafe_code)]

use super::pins::{Era, Readers, Slot, note_kept};
use crate::sync::{self, AtomicU64, Ordering};
use netmcore_sem::{Current, LockGuard, LockWord};
use netmcore_sys::crash_point;
use std::ptr;

/// The low bits of a link, which say what kind of block it is.
pub const KIND_MASK: u64 = 7;
/// How often one that finds the lock held by another asks whether that one lives: each so many blocks.
const ASK_EVERY: u64 = 32;

/// The beginning of each block that can be retired.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Node {
    /// An era in which nobody else could reach it yet.
    birth: AtomicU64,
    /// An era in which it had been unlinked already.
    retired: AtomicU64,
    next: AtomicU64,
}

impl Node {
    /// Of a block that is being made.
    pub fn born(era: &Era) -> Node {
        Node {
            birth: AtomicU64::new(era.now()),
            retired: AtomicU64::new(0),
            next: AtomicU64::new(0),
        }
    }

    /// When it was born.
    pub fn birth(&self) -> u64 {
        self.birth.load(Ordering::Relaxed)
    }

    /// Says that something in the block was born earlier. For the one that retires it.
    pub fn is_as_old_as(&self, birth: u64) {
        let birth = birth.min(self.birth());
        self.birth.store(birth, Ordering::Relaxed);
    }
}

/// See the module. Zeroed memory is an empty list.
#[derive(Debug, Default)]
#[repr(C)]
pub struct RetiredList {
    head: AtomicU64,
    /// About how many there are. A hint.
    count: AtomicU64,
    /// With more than so many it is worth while to look for some that can be freed. A hint.
    next_look: AtomicU64,
    lock: LockWord,
}

impl RetiredList {
    /// Whether there are more than so many, and enough more than had to be kept the last time: so looks at blocks that are kept
    /// for long cost each new block a few steps, however many there are.
    pub fn is_worth_a_look(&self, enough: u64) -> bool {
        self.count() > enough.max(self.next_look.load(Ordering::Relaxed))
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Puts a block in.
    ///
    /// # Safety
    ///
    /// - `link` is the address of a node, plus at most [`KIND_MASK`]. Its block is valid until it is freed by [`reclaim`](Self::reclaim)
    ///   or [`take_all`](Self::take_all) of this list.
    /// - Nobody who begins to read can reach it any more, and it was put into no list yet.
    pub unsafe fn push(&self, link: u64, era: &Era) {
        // SAFETY: the caller's duty.
        let node = unsafe { node(link) };
        sync::fence_in_models();
        node.retired.store(era.now(), Ordering::Relaxed);
        crash_point!("shm.retired.stamped");
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            node.next.store(head, Ordering::Relaxed);
            match self
                .head
                .compare_exchange(head, link, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(found) => head = found,
            }
        }
        crash_point!("shm.retired.pushed");
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Frees what no reader can have any more, by `free`, which is given the links. If somebody else does so, nothing.
    ///
    /// `free` may use the list; it frees nothing then.
    ///
    /// # Safety
    ///
    /// - `slots` gives those of all who read what is put into this list, as they are when it is called.
    /// - `free` frees the block, and gives it to nobody else.
    pub unsafe fn reclaim<'a, I: Iterator<Item = &'a Slot>>(
        &self,
        era: &Era,
        slots: impl FnOnce() -> I,
        doubt: bool,
        mut free: impl FnMut(u64),
    ) {
        if self.head.load(Ordering::Relaxed) == 0 {
            return;
        }
        let Some(_guard) = self.lock_if_free(doubt) else {
            return;
        };
        crash_point!("shm.retired.locked");
        // Before the scan (invariant 3).
        let mut link = self.head.load(Ordering::SeqCst);
        let readers = Readers::scan(slots, doubt);
        let mut place = &self.head;
        let (mut kept, mut kept_until) = (0, 0);
        while link != 0 {
            // SAFETY: it is in the list, and only this holder of the lock takes it out.
            let node = unsafe { node(link) };
            let next = node.next.load(Ordering::Relaxed);
            let retired = node.retired.load(Ordering::Relaxed);
            if readers.keep(node.birth(), retired) {
                kept += 1;
                kept_until = kept_until.max(retired);
                place = &node.next;
            } else {
                place = self.take_out(place, link, next);
                crash_point!("shm.retired.taken_out");
                free(link);
                crash_point!("shm.retired.freed");
            }
            link = next;
        }
        self.count.store(kept, Ordering::Relaxed);
        self.next_look.store(kept * 3 / 2, Ordering::Relaxed);
        if kept != 0 {
            note_kept(era, kept_until);
        }
    }

    /// Takes `link` out, which `place` had as its successor; gives the place that has `next` now.
    fn take_out<'a>(&'a self, place: &'a AtomicU64, link: u64, next: u64) -> &'a AtomicU64 {
        if !ptr::eq(place, &raw const self.head) {
            place.store(next, Ordering::Relaxed);
            return place;
        }
        let taken = self
            .head
            .compare_exchange(link, next, Ordering::SeqCst, Ordering::SeqCst);
        let Err(mut before) = taken else {
            return place;
        };
        // Others have put something before it.
        loop {
            // SAFETY: in the list, as the guard says.
            let node = unsafe { node(before) };
            before = node.next.load(Ordering::Relaxed);
            if before == link {
                node.next.store(next, Ordering::Relaxed);
                return &node.next;
            }
        }
    }

    /// The lock, if nobody has it. Asking whether its holder lives is dear, and not done each time.
    fn lock_if_free(&self, doubt: bool) -> Option<LockGuard<'_>> {
        let is_held = self.lock.owner().is_some();
        if is_held && !doubt && !self.count().is_multiple_of(ASK_EVERY) {
            return None;
        }
        match self.lock.try_lock(&Current) {
            Ok(guard) => guard,
            Err(died) => Some(died.guard),
        }
    }

    /// Gives each block to `free`, whoever reads.
    ///
    /// # Safety
    ///
    /// - Nobody reads any of the blocks, nor uses the list at the same time.
    /// - `free` as for [`reclaim`](Self::reclaim).
    pub unsafe fn take_all(&self, mut free: impl FnMut(u64)) {
        loop {
            let link = self.head.load(Ordering::SeqCst);
            if link == 0 {
                return;
            }
            // SAFETY: in the list.
            let next = unsafe { node(link) }.next.load(Ordering::Relaxed);
            self.head.store(next, Ordering::SeqCst);
            free(link);
        }
    }
}

/// # Safety
///
/// - The link is the address of a node that is valid for `'a`, plus its kind.
unsafe fn node<'a>(link: u64) -> &'a Node {
    let at = ptr::with_exposed_provenance::<Node>((link & !KIND_MASK) as usize);
    // SAFETY: the caller's duty; all its fields are atomics.
    unsafe { &*at }
}

//! Which blocks of a page are in use: one word of each of its three bitmaps, for 64 blocks.
//!
//! **Protocol.**
//!
//! | bitmap | who changes it | how |
//! |---|---|---|
//! | `local` | the owner of the page | a plain store |
//! | `remote` | everybody else | one atomic step |
//! | `dead` | the owner, when it adopts the page and when it looks for free blocks | plain stores |
//!
//! A block is in use if and only if its bits in `local` and `remote` differ. To allocate it, the owner turns the local bit over; to free it, the owner
//! turns the local bit over, and anybody else the remote bit. So each change is one store, and whoever dies before or after it leaves nothing to be
//! undone. What `dead` marks, and is in use, was allocated by a former owner that has died.
//!
//! Who frees a block remotely releases, and who looks for free blocks acquires: what was done with the block is done before it is allocated again, or
//! its page given back. The rest needs no order: an owner sees its own stores, and a new owner those of the former, by the swap
//! of the note that made it the owner, or because that one is known to be dead.
//!
//! **Invariants.** 1 and 2 of [`page`](super::page).
//!
//! **If a process dies here.** Each block is in use or free.

use crate::sync::{AtomicU64, Ordering};

/// The bits of 64 blocks.
#[derive(Clone, Copy, Debug)]
pub struct Word<'a> {
    /// See the module.
    pub local: &'a AtomicU64,
    /// See the module.
    pub remote: &'a AtomicU64,
    /// See the module.
    pub dead: &'a AtomicU64,
}

impl Word<'_> {
    /// The blocks in use. Those that others free at this moment may be among them.
    #[inline]
    pub fn in_use(self) -> u64 {
        self.local.load(Ordering::Relaxed) ^ self.remote.load(Ordering::Acquire)
    }

    /// Frees a block, for anybody but the owner. The commit.
    pub fn turn_remote(self, bit: u64) {
        self.remote.fetch_xor(bit, Ordering::Release);
    }

    /// Notes that all blocks in use were allocated by somebody who has died. For a new owner.
    pub fn mark_dead(self) {
        let in_use = self.in_use();
        if in_use != 0 {
            self.dead.fetch_or(in_use, Ordering::Relaxed);
        }
    }

    /// Forgets of the blocks that are free what was known of their last users, and tells which blocks in use are of
    /// the dead. For the owner, before it allocates one.
    pub fn unmark_free(self) -> u64 {
        let marked = self.dead.load(Ordering::Relaxed);
        if marked == 0 {
            return 0;
        }
        let still = marked & self.in_use();
        self.dead.store(still, Ordering::Relaxed);
        still
    }

    /// The blocks in use that the dead have allocated.
    pub fn in_use_of_dead(self) -> u64 {
        self.in_use() & self.dead.load(Ordering::Relaxed)
    }
}

/// Turns bits of a `local` word over: allocates blocks, or frees them. For the owner. The commit.
#[inline]
pub fn turn(local: &AtomicU64, bits: u64) {
    local.store(local.load(Ordering::Relaxed) ^ bits, Ordering::Relaxed);
}

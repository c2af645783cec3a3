//! A pointer that is replaced while others read through it.
//!
//! **Protocol.** `current` has the address of the block that readers find. A new one is swapped in, and the old one put into the list of
//! the retired.
//!
//! | step of replacing | the process died after it |
//! |---|---|
//! | new block made | it is lost: it stays allocated until the heap is gone |
//! | swapped | this is the commit; the old block is lost |
//! | old block in the list | the next to replace something frees it |
//!
//! **Invariants.**
//! 1. `current` is the address of a block that begins with a `Node`, and was not retired when it was stored.
//! 2. An address that a reader has, and whose block it keeps from being freed, is that of this block only. So a compare-and-swap
//!    that expects it succeeds only if nothing was swapped in between.
//!
//! **If a process dies here.** The table. A reader that dies is `pins`' business.

use super::pins::Cover;
use super::retired::RetiredList;
use crate::sync::{AtomicU64, Ordering};
use netmcore_sys::crash_point;

/// See the module.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Versions {
    current: AtomicU64,
    /// What was replaced.
    pub retired: RetiredList,
}

impl Versions {
    /// The first block.
    pub fn new(first: u64) -> Versions {
        Versions {
            current: AtomicU64::new(first),
            retired: RetiredList::default(),
        }
    }

    /// What is current, without a pin: not to be followed, but by one that is alone.
    pub fn peek(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// One attempt of a reader: what is current, if it may be followed.
    #[inline]
    pub fn load(&self, cover: &Cover<'_>) -> Option<u64> {
        let found = self.current.load(Ordering::SeqCst);
        cover.is_enough().then_some(found)
    }

    /// Makes `new` current; gives what was, which the caller retires.
    pub fn swap(&self, new: u64) -> u64 {
        let old = self.current.swap(new, Ordering::SeqCst);
        crash_point!("shm.versions.swapped");
        old
    }

    /// Makes `new` current if `expected` is, which the caller has pinned and then retires. Else gives what is current.
    ///
    /// # Errors
    ///
    /// The address that was found; not to be followed.
    pub fn compare_exchange(&self, expected: u64, new: u64) -> Result<(), u64> {
        self.current
            .compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst)?;
        crash_point!("shm.versions.exchanged");
        Ok(())
    }
}

//! Which maps the calling thread has a shard of, so that it does not wait for itself.
//!
//! **Protocol.** Who holds the lock of a shard, be it in an [`Entry`](super::Entry) or in a call that calls functions of the user, is noted here, in a
//! variable of the thread. Taking a lock of the same map is refused then, of the same shard or another: two threads
//! that do so crosswise would wait for each other.
//!
//! **If a process dies here.** All of this is its own.

use crate::epoch::copied_by_fork;
use netmcore_sem::current::fork_epoch;
use std::cell::RefCell;

thread_local! {
    /// Address of a map's shards, and the fork epoch: a forked child has not got its parent's entries.
    static MAPS: RefCell<Vec<(usize, u64)>> = const { RefCell::new(Vec::new()) };
}

/// Whether this thread has a shard of the map.
#[inline]
pub(super) fn is_inside(map: usize) -> bool {
    let is_noted = |maps: &RefCell<Vec<(usize, u64)>>| {
        let maps = maps.borrow();
        !maps.is_empty() && maps.contains(&(map, fork_epoch()))
    };
    // In a thread whose variables are being destroyed, the owner of the lock is looked at, too.
    MAPS.try_with(is_noted).unwrap_or(false)
}

/// While it lives, the thread has a shard of the map.
#[derive(Debug)]
pub(super) struct Inside {
    noted: (usize, u64),
}

impl Inside {
    pub(super) fn new(map: usize) -> Inside {
        let noted = (map, fork_epoch());
        let _ = MAPS.try_with(|maps| maps.borrow_mut().push(noted));
        Inside { noted }
    }

    /// Panics in a child that was forked since: what the thread has is the parent's.
    pub(super) fn check_process(&self) {
        if self.noted.1 != fork_epoch() {
            copied_by_fork();
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = MAPS.try_with(|maps| {
            let mut maps = maps.borrow_mut();
            if let Some(index) = maps.iter().rposition(|noted| *noted == self.noted) {
                maps.swap_remove(index);
            }
        });
    }
}

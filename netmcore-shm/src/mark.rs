//! Whose private memory an owner of shared memory lies in: a forked child has copies of all that its parent owns.
//!
//! **Protocol.** What frees something in shared memory when it is dropped carries a [`Mark`]. In private memory it is that of the process.
//! Going into shared memory, where nobody gets a copy by a fork, the owner loses it: `visit_pointers`, which every container calls before it takes a
//! value in, says so. Who has another process's mark is a copy made by a fork, and frees nothing.
//!
//! A value that was assigned through a `&mut` into shared memory has still the mark of the process that did it. Where it lies says then
//! that it is no copy. Once it was moved out from there nothing says so: who assigns calls [`HeapRef::check`](crate::HeapRef::check) before.
//!
//! What was taken out of shared memory again, or was refused by a container, has no mark: a child that is forked then must not drop its copy.

use crate::region::region_of;
use netmcore_sem::current::fork_epoch;
use std::ptr;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// The mark of what lies in shared memory.
const SHARED: u32 = 0;

/// See the module.
#[derive(Debug)]
pub(crate) struct Mark(AtomicU32);

impl Mark {
    /// Of something in the private memory of this process.
    pub(crate) fn here() -> Mark {
        Mark(AtomicU32::new(of_this_process()))
    }

    pub(crate) fn goes_into_shared_memory(&self) {
        self.0.store(SHARED, Relaxed);
    }

    #[inline]
    pub(crate) fn is_copy_by_fork(&self) -> bool {
        let mark = self.0.load(Relaxed);
        mark != SHARED && mark != of_this_process() && !self.lies_in_shared_memory()
    }

    /// Whether its owner was assigned into shared memory; then it loses its mark now.
    #[cold]
    fn lies_in_shared_memory(&self) -> bool {
        let lies_there = region_of(ptr::from_ref(self)).is_some();
        if lies_there {
            self.goes_into_shared_memory();
        }
        lies_there
    }
}

/// Not [`SHARED`], and another one in each process and its children.
fn of_this_process() -> u32 {
    // The epochs of a process and those it descends from are counted upwards, so their low halves differ as well.
    (fork_epoch() as u32).max(1)
}

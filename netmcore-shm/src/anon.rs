//! Shared memory without a name: a sparse memory file, mapped whole at a place of the arena.
//!
//! **Protocol.** A memory file is made at its full length, which takes no memory, sealed against shrinking, mapped, and its
//! descriptor closed. Children forked later have the mapping at the same address. Pages come into being when they are populated, and
//! go when they are removed, both by address.
//!
//! **If a process dies here.** Its mapping goes; the memory goes with the last mapping. Nothing has a name, so nothing
//! can leak.
//!
//! **Not here.** Objects with a name, which unrelated processes can open: [`ShmObject`](crate::ShmObject).
//!
//! # Safety
//!
//! Mapping and unmapping happen inside a place that the region took from the arena and shares with nobody.

#![allow(unsafe_code)]

use crate::arena::{Arena, Place};
use crate::error::{Error, Result, SpaceLimit};
use netmcore_sys::map::{self, page_size};
use netmcore_sys::process::{self, Resource};
use netmcore_sys::shm::{self, Access};
use std::ffi::CStr;
use std::os::fd::AsFd;

/// Anonymous shared memory of this process and of those that it forks from now on. Zeroed, left out of core dumps.
///
/// Dropping it unmaps it in this process only.
///
/// ```
/// use netmcore_shm::{AnonRegion, Arena};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let region = AnonRegion::create(c"example", &arena, 64 << 20)?; // 64 MiB of addresses, no memory yet
/// assert_eq!(region.len_bytes(), 64 << 20);
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Debug)]
pub struct AnonRegion {
    arena: Arena,
    place: Place,
    len_bytes: usize,
}

impl AnonRegion {
    /// Makes a region of `max_len_bytes`, rounded up to whole pages. `name` is for `/proc/PID/maps` and need not be unique.
    ///
    /// Touching a page takes memory; when there is none, the kernel kills. To get an error instead, look at the
    /// [`headroom`](crate::headroom()) and populate first, as [`TaggedHeap`](crate::TaggedHeap) does.
    ///
    /// # Errors
    ///
    /// [`Error::ArenaFull`]; [`Error::NoSpace`] if the limit of file sizes (`ulimit -f`) is below the length;
    /// [`Error::System`] if there is no descriptor left.
    pub fn create(name: &CStr, arena: &Arena, max_len_bytes: usize) -> Result<AnonRegion> {
        let len_bytes = max_len_bytes
            .max(1)
            .checked_next_multiple_of(page_size())
            .unwrap_or(max_len_bytes);
        check_file_size_limit(len_bytes as u64)?;
        let place = arena.place(len_bytes)?;
        let map = || -> netmcore_sys::Result<()> {
            let file = shm::anonymous(name)?;
            shm::set_len(file.as_fd(), len_bytes as u64)?;
            shm::seal_shrink(file.as_fd())?;
            let reservation = arena.reservation();
            // SAFETY: the place is new (arena, invariant 2), so there are no references into it.
            unsafe {
                reservation.map(place.at(), len_bytes, file.as_fd(), 0, Access::ReadWrite)?;
            }
            // SAFETY: the range was mapped just now.
            unsafe { map::exclude_from_dumps(place.at(), len_bytes) }
        };
        map().map_err(Error::system(format!(
            "make the anonymous region {name:?} of {len_bytes} bytes"
        )))?;
        Ok(AnonRegion {
            arena: arena.clone(),
            place,
            len_bytes,
        })
    }

    /// The first address: the same in all processes that have the region.
    pub fn at(&self) -> *mut u8 {
        self.place.at()
    }

    /// The length in bytes: whole pages.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

impl Drop for AnonRegion {
    fn drop(&mut self) {
        // SAFETY: the place is this region's alone. Those who made references into it answered for not using
        // them longer than the region.
        let unmapped = unsafe {
            self.arena
                .reservation()
                .unmap(self.place.at(), self.len_bytes)
        };
        // At the limit of mappings the memory stays mapped until the arena goes: nothing worse.
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// Growing a memory file past `RLIMIT_FSIZE` is answered by SIGXFSZ, which kills: ask first.
pub(crate) fn check_file_size_limit(wanted_bytes: u64) -> Result<()> {
    let limit = process::get_limit(Resource::FileSizeBytes)
        .map_err(Error::system("ask for the limit of file sizes"))?;
    match limit.soft {
        Some(free_bytes) if free_bytes < wanted_bytes => Err(Error::NoSpace {
            limit: SpaceLimit::FileSize,
            wanted_bytes,
            free_bytes,
        }),
        _ => Ok(()),
    }
}

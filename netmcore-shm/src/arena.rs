//! A range of addresses, reserved once, in which every region gets a place of its own.
//!
//! **Protocol.** The arena is reserved before the first fork, so all processes have it at the same addresses. Whoever makes a
//! region takes a place in it: one atomic step on a cursor that they all share. The place is then mapped, now or later, in
//! each process that uses the region.
//!
//! **Invariants.**
//! 1. The arena is `PROT_NONE` but for what was mapped into places; nothing else of the process can come to lie in it.
//! 2. The cursor only grows: places do not overlap and are never used again, so a stale pointer meets nothing new.
//! 3. The cursor lies in shared memory, in the first page of the arena.
//!
//! **If a process dies here.** A place that it took and did not use is lost: addresses, not memory.
//!
//! # Safety
//!
//! The header is a page of shared memory, mapped for the life of the arena, of which one atomic is used.

#![allow(unsafe_code)]

use crate::anon::check_file_size_limit;
use crate::error::{Error, Result};
use netmcore_sys::Errno;
use netmcore_sys::map::{Reservation, page_size};
use netmcore_sys::shm::{self, Access};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Places begin and end at multiples of this, 2 MiB: the size of a huge page, so that large regions can have them.
pub const PLACE_ALIGN_BYTES: usize = 2 << 20;

/// A reserved range of addresses from which places are taken. Clones are the same arena.
///
/// A forked child has it too, at the same addresses, and both see the same cursor; the range is unmapped in
/// a process when the last clone and the last region there are dropped.
///
/// ```
/// use netmcore_shm::Arena;
///
/// let arena = Arena::reserve(1 << 30)?;
/// let (first, second) = (arena.place(1)?, arena.place(10 << 20)?);
/// assert!(second.at() as usize >= first.at() as usize + first.len_bytes());
/// assert!(arena.place(1 << 30).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Arena {
    reservation: Arc<Reservation>,
}

/// A range of addresses in an [`Arena`], taken once and for all. It says nothing of what is mapped there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    at: *mut u8,
    len_bytes: usize,
}

// SAFETY: an address and a length, not used to access anything.
unsafe impl Send for Place {}
// SAFETY: as for Send.
unsafe impl Sync for Place {}

impl Place {
    /// The first address, a multiple of [`PLACE_ALIGN_BYTES`].
    pub fn at(self) -> *mut u8 {
        self.at
    }

    /// The length in bytes, a multiple of [`PLACE_ALIGN_BYTES`].
    pub fn len_bytes(self) -> usize {
        self.len_bytes
    }
}

impl Arena {
    /// What [`Arena::reserve`] is usually asked for: 16 TiB. It costs no memory, at fork neither.
    pub const DEFAULT_LEN_BYTES: usize = 16 << 40;
    /// What there is room for in any program, and a few regions fit into: 1 GiB.
    pub const MIN_LEN_BYTES: usize = 1 << 30;
    /// Below this an arena is not worth having: 128 MiB.
    const LEAST_LEN_BYTES: usize = 128 << 20;

    /// Reserves `len_bytes`, or, where the address space is limited (`RLIMIT_AS`, small machines), half of it, or half
    /// of that, down to 128 MiB. A smaller request is met as it is, or not at all.
    ///
    /// # Errors
    ///
    /// [`Error::Reserve`] if even the least does not fit; [`Error::System`] if there are no descriptors or no memory
    /// for the cursor; [`Error::NoSpace`] if the limit of file sizes is less than a page.
    pub fn reserve(len_bytes: usize) -> Result<Arena> {
        let mut wanted_bytes = len_bytes.max(2 * PLACE_ALIGN_BYTES);
        let reservation = loop {
            match Reservation::reserve(wanted_bytes) {
                Ok(reservation) => break reservation,
                Err(source) => {
                    let half = wanted_bytes / 2;
                    if source.errno != Errno::ENOMEM || half < Arena::LEAST_LEN_BYTES {
                        return Err(Error::Reserve {
                            wanted_bytes,
                            source,
                        });
                    }
                    wanted_bytes = half;
                }
            }
        };
        check_file_size_limit(page_size() as u64)?;
        map_header(&reservation).map_err(Error::system("make the arena's cursor"))?;
        let arena = Arena {
            reservation: Arc::new(reservation),
        };
        arena.cursor().store(
            arena.aligned_offset(page_size()).unwrap_or(usize::MAX),
            Ordering::Release,
        );
        Ok(arena)
    }

    /// Takes a place of `len_bytes`, rounded up to [`PLACE_ALIGN_BYTES`], that no other region has or ever had.
    /// Any process that has the arena may call this.
    ///
    /// # Errors
    ///
    /// [`Error::ArenaFull`].
    pub fn place(&self, len_bytes: usize) -> Result<Place> {
        let limit_bytes = self.len_bytes();
        let rounded = len_bytes
            .max(1)
            .checked_next_multiple_of(PLACE_ALIGN_BYTES)
            .filter(|&rounded| rounded <= limit_bytes);
        let taken = rounded.and_then(|rounded| {
            let next = |start: usize| {
                start
                    .checked_add(rounded)
                    .filter(|&end| end <= self.len_bytes())
            };
            let start = self
                .cursor()
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, next)
                .ok()?;
            Some((start, rounded))
        });
        let Some((start, len_bytes)) = taken else {
            return Err(Error::ArenaFull {
                limit_bytes,
                wanted_bytes: len_bytes,
                free_bytes: self.free_bytes(),
            });
        };
        Ok(Place {
            at: self.base().wrapping_add(start),
            len_bytes,
        })
    }

    /// The first address.
    pub fn base(&self) -> *mut u8 {
        self.reservation.base()
    }

    /// The length in bytes, which may be less than what was asked for.
    pub fn len_bytes(&self) -> usize {
        self.reservation.len()
    }

    /// Bytes of addresses that have not been placed.
    pub fn free_bytes(&self) -> usize {
        self.len_bytes()
            .saturating_sub(self.cursor().load(Ordering::Acquire))
    }

    /// Whether the place is one of this arena's.
    pub fn contains(&self, place: Place) -> bool {
        let start = place.at.addr().wrapping_sub(self.base().addr());
        let placed = self.cursor().load(Ordering::Acquire);
        start < placed && place.len_bytes <= placed - start
    }

    /// The address `at` as a pointer, if `[at, at + len_bytes)` has been placed and begins like a place.
    pub(crate) fn place_at(&self, at: usize, len_bytes: usize) -> Option<*mut u8> {
        let start = at.checked_sub(self.base().addr())?;
        let place = Place {
            at: self.base().wrapping_add(start),
            len_bytes,
        };
        let is_place = at.is_multiple_of(PLACE_ALIGN_BYTES) && start >= page_size();
        (is_place && self.contains(place)).then_some(place.at)
    }

    pub(crate) fn reservation(&self) -> &Reservation {
        &self.reservation
    }

    /// The offset, from `from` on, at which the address is aligned for a place.
    fn aligned_offset(&self, from: usize) -> Option<usize> {
        let base = self.base().addr();
        let aligned = base
            .checked_add(from)?
            .checked_next_multiple_of(PLACE_ALIGN_BYTES)?;
        Some(aligned - base)
    }

    /// The offset of the next place (invariants 2 and 3).
    fn cursor(&self) -> &AtomicUsize {
        // SAFETY: in bounds: the header is a page at the base, aligned; here and there: only ever used as this atomic;
        // gone: it is mapped as long as the reservation, which `self` keeps, and a dead process leaves it valid.
        unsafe { &*self.base().cast::<AtomicUsize>() }
    }
}

/// Maps a page of shared memory at the base, present so that touching it cannot fail.
fn map_header(reservation: &Reservation) -> netmcore_sys::Result<()> {
    let len = page_size();
    let file = shm::anonymous(c"netmcore-arena")?;
    shm::allocate(file.as_fd(), 0, len as u64)?;
    shm::seal_shrink(file.as_fd())?;
    // SAFETY: the arena is being made; there is no reference into it.
    unsafe { reservation.map(reservation.base(), len, file.as_fd(), 0, Access::ReadWrite) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_aligned_and_apart() {
        let arena = Arena::reserve(Arena::DEFAULT_LEN_BYTES).unwrap();
        let mut end = arena.base().addr() + page_size();
        for len in [1, PLACE_ALIGN_BYTES, PLACE_ALIGN_BYTES + 1, 16 << 30] {
            let place = arena.place(len).unwrap();
            assert!(place.at().addr() >= end);
            assert!(place.at().addr().is_multiple_of(PLACE_ALIGN_BYTES));
            assert!(place.len_bytes() >= len);
            assert!(arena.contains(place));
            end = place.at().addr() + place.len_bytes();
        }
        assert!(end <= arena.base().addr() + arena.len_bytes());
    }

    #[test]
    fn full_arena_says_so_and_takes_nothing() {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let free = arena.free_bytes();
        for wanted in [free + 1, usize::MAX] {
            match arena.place(wanted) {
                Err(Error::ArenaFull {
                    limit_bytes,
                    wanted_bytes,
                    free_bytes,
                }) => {
                    assert_eq!(limit_bytes, Arena::MIN_LEN_BYTES);
                    assert_eq!((wanted_bytes, free_bytes), (wanted, free));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(arena.free_bytes(), free);
        let whole = free / PLACE_ALIGN_BYTES * PLACE_ALIGN_BYTES;
        assert_eq!(arena.place(whole).unwrap().len_bytes(), whole);
        assert!(arena.place(1).is_err());
    }

    #[test]
    fn impossible_length_is_halved_until_it_fits() {
        let arena = Arena::reserve(1 << 62).unwrap();
        assert!(arena.len_bytes() >= Arena::MIN_LEN_BYTES);
        assert!(arena.len_bytes() < 1 << 62);
    }
}

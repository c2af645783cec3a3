//! The memory of a queue's segments: blocks of the heap, each a head and places for values.
//!
//! **If a process dies here.** A block that is allocated and not yet given to the queue stays allocated until the heap is gone.
//!
//! # Safety
//!
//! Addresses of segments come from [`Store::allocate`] and are used until [`retire`](Segments::retire), for which `ends` gives the reasons. A
//! segment's head is written before its address is given away, and consists of atomics.

#![allow(unsafe_code)]

use super::ends::{Laps, Place, Segment, Segments};
use crate::error::Result;
use crate::heap::HeapRef;
use std::alloc::Layout;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

/// A segment of an unbounded queue is about so long.
const SEGMENT_BYTES: usize = 16 << 10;
/// At least and at most so many places.
const SEGMENT_PLACES: (usize, usize) = (4, 512);

/// The segment's head has a line of the cache to itself, so that values of that size do not lie across two.
const HEAD_ALIGN_BYTES: usize = 64;

/// So far ahead of its position an end has the processor fetch places: a few lines of the cache. The other end has used them last, so each comes from another
/// processor's cache; and the locked instructions of a push or pop would wait for it.
const FETCH_AHEAD_BYTES: usize = 256;

/// Allocates segments and finds their places.
pub(super) struct Store<T> {
    heap: HeapRef,
    per_lap: u64,
    of: PhantomData<fn() -> T>,
}

impl<T> Store<T> {
    /// Where the places begin.
    const PLACES_AT: usize = {
        let align = if align_of::<T>() > HEAD_ALIGN_BYTES {
            align_of::<T>()
        } else {
            HEAD_ALIGN_BYTES
        };
        size_of::<Segment>().next_multiple_of(align)
    };

    /// The number of places for that; at least one.
    pub(super) const PLACES_AHEAD: u64 = {
        let places = if size_of::<T>() == 0 {
            1
        } else {
            FETCH_AHEAD_BYTES / size_of::<T>()
        };
        if places == 0 { 1 } else { places as u64 }
    };

    #[inline]
    pub(super) fn new(heap: HeapRef, laps: Laps) -> Store<T> {
        Store {
            heap,
            per_lap: laps.per_lap(),
            of: PhantomData,
        }
    }

    /// How many places a segment of an unbounded queue has.
    pub(super) fn places_of_segment() -> u64 {
        let (least, most) = SEGMENT_PLACES;
        (SEGMENT_BYTES / size_of::<T>().max(1)).clamp(least, most) as u64
    }

    /// # Panics
    ///
    /// If it is longer than any memory.
    fn layout(&self) -> Layout {
        let align = HEAD_ALIGN_BYTES.max(align_of::<T>());
        usize::try_from(self.per_lap)
            .ok()
            .and_then(|places| places.checked_mul(size_of::<T>()))
            .and_then(|bytes| bytes.checked_add(Self::PLACES_AT))
            .and_then(|bytes| Layout::from_size_align(bytes, align).ok())
            .expect("the capacity of a queue is larger than any memory")
    }

    /// A segment of lap 0, the last of its chain.
    pub(super) fn allocate(&self) -> Result<u64> {
        let block = self.heap.allocate(self.layout())?;
        // SAFETY: in bounds and aligned: the layout begins with it; nobody else knows of the block.
        unsafe { block.cast::<Segment>().write(Segment::new()) };
        Ok(block.as_ptr().expose_provenance() as u64)
    }

    /// Where the value of the place lies.
    #[inline]
    pub(super) fn at(&self, place: Place) -> *mut T {
        let segment = ptr::with_exposed_provenance_mut::<u8>(place.segment as usize);
        // The index is below `per_lap`: in bounds of the block.
        let places = segment.wrapping_add(Self::PLACES_AT).cast::<T>();
        places.wrapping_add(place.index as usize)
    }
}

impl<T> Store<T> {
    /// Has the processor fetch the line [ahead](Self::PLACES_AHEAD) of the place, to write to it. A hint: it may lie behind the segment.
    #[inline]
    pub(super) fn fetch_to_write(&self, place: Place) {
        let at = self.at(place).wrapping_add(Self::PLACES_AHEAD as usize);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which changes nothing that a program sees and takes any address.
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// As [`fetch_to_write`](Self::fetch_to_write), to read it.
    #[inline]
    pub(super) fn fetch_to_read(&self, place: Place) {
        let at = self.at(place).wrapping_add(Self::PLACES_AHEAD as usize);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("prefetcht0 [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }
}

impl<T> Segments for Store<T> {
    #[inline]
    fn segment(&self, address: u64) -> &Segment {
        // SAFETY: in bounds: `allocate` wrote it there; here and there: atomics; gone: not retired yet, see `ends`.
        unsafe { &*ptr::with_exposed_provenance(address as usize) }
    }

    fn retire(&self, address: u64) {
        let at = ptr::with_exposed_provenance_mut(address as usize);
        if let Some(block) = NonNull::new(at) {
            // SAFETY: allocated with that layout; nobody uses it any more, see `ends`, invariant 4.
            unsafe { self.heap.deallocate(block, self.layout()) };
        }
    }
}

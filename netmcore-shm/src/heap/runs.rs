//! The heap's way to the pool that it stands on.
//!
//! **Protocol.** The header of the heap is the area that the pool keeps for the layer above. Each run in use has a note from the start.
//!
//! # Safety
//!
//! A heap's header lies in its pool, where [`PoolRef::header_at`] says.

#![allow(unsafe_code)]

use super::adopt::ALL;
use super::note::Note;
use super::page::PAGE_BYTES;
use super::{HeapHeader, HeapRef};
use crate::error::Result;
use crate::pool::{PagePool, PoolRef};
use crate::region::Region;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

const _: () = assert!(PAGE_BYTES == PagePool::PAGE_BYTES);

/// A run in use.
pub(super) struct Run {
    pub(super) at: NonNull<u8>,
    pub(super) page_count: usize,
    pub(super) note: &'static AtomicU64,
}

/// Makes the pool of a heap, and tells where the heap's header is, which is all zeros.
pub(super) fn create(region: &Region) -> Result<HeapRef> {
    let pool = PagePool::create(region, size_of::<HeapHeader>())?;
    Ok(HeapRef(pool.header_at().cast()))
}

/// Where the heap's header is in a region with a pool; `None` if the pool has no room for one.
pub(super) fn attach(region: &Region) -> Result<Option<HeapRef>> {
    let pool = PagePool::attach(region)?;
    let has_room = pool.header_len_bytes() >= size_of::<HeapHeader>();
    Ok(has_room.then(|| HeapRef(pool.header_at().cast())))
}

pub(super) fn pool(heap: HeapRef) -> PoolRef {
    // SAFETY: a heap's header is that area of a pool.
    unsafe { PoolRef::of_header_at(heap.0.cast()) }
}

/// Takes a run of pages.
pub(super) fn allocate(heap: HeapRef, page_count: usize, note: Note) -> Result<NonNull<u8>> {
    pool(heap).alloc_run_noted(page_count, note.0)
}

/// Gives a run back.
///
/// # Safety
///
/// - Nobody uses it any more.
pub(super) unsafe fn free(heap: HeapRef, at: NonNull<u8>) {
    // SAFETY: the caller's duty.
    let freed = unsafe { pool(heap).free_run(at) };
    debug_assert!(freed.is_ok(), "{freed:?}");
}

/// The start of the run that the address lies in.
pub(super) fn start_of(heap: HeapRef, address: *const u8) -> Option<NonNull<u8>> {
    Some(pool(heap).run_at(address)?.at)
}

/// The word that says whose the run at `at` is, which is in use.
pub(super) fn note(heap: HeapRef, at: NonNull<u8>) -> Option<&'static AtomicU64> {
    pool(heap).note(at.as_ptr())
}

/// Replaces a note, if it is the expected one.
pub(super) fn exchange(word: &AtomicU64, expected: Note, note: Note) -> bool {
    word.compare_exchange(expected.0, note.0, AcqRel, Acquire)
        .is_ok()
}

/// Calls `body` for the runs in use among so many pages: all of them, or the next ones, going round with all who ask.
pub(super) fn visit(heap: HeapRef, steps: usize, mut body: impl FnMut(Run)) {
    let pool = pool(heap);
    let high = pool.high();
    let parts = if steps == ALL || steps >= high {
        [0..high, 0..0]
    } else {
        let start = heap.header().cursor.fetch_add(steps as u64, Relaxed) as usize % high;
        let end = start + steps;
        [start..end.min(high), 0..end.saturating_sub(high)]
    };
    for run in parts.into_iter().flat_map(|part| pool.runs_among(part)) {
        if let Some(note) = pool.note(run.at.as_ptr()) {
            body(Run {
                at: run.at,
                page_count: run.len_bytes / PAGE_BYTES,
                note,
            });
        }
    }
}

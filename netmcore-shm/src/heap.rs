//! A heap in shared memory, from which containers take their memory, here and in other processes.
//!
//! **Protocol.** The heap stands on a [pool](crate::pool) of pages of 64 KiB, which grows with its region. One allocation, from file to file:
//!
//! 1. `size_class`: the layout says the class of the block, up to half a page. What is longer is a run of pages.
//! 2. `local`: the thread has a page of that class, and in it a word with free blocks. It takes one by a plain store into the page: `page`.
//! 3. If there is none, it looks in its other pages, adopts those of the dead (`adopt`), or takes a page from the pool: `runs`.
//! 4. Whose a page or a run is says one word in the map of the pool: `note`.
//!
//! Freeing is the same store for the owner of the page, and one atomic step for anybody else.
//!
//! A [`Heap`] is this process's handle; a [`HeapRef`] is the header's address, which is the same everywhere, so it may lie in the heap itself.
//!
//! **Invariants.**
//! 1. Each block is in use or free, by one bit or one word of the pool's map, whatever process dies.
//! 2. A block is of the heap in which its address lies; its layout says how it is found.
//!
//! **If a process dies here.** Its blocks stay in use; its pages are adopted, its half-made pages given back, by whoever needs a page. Blocks that only
//! the dead could reach stay in use until the heap is gone. [`HeapStats::dead_bytes`] says how much that is at most.
//!
//! **Not here.** Who may reach a block, and when nobody can any more: that is for the types made of blocks.
//!
//! # Safety
//!
//! The header is mapped as long as the process lives, and only atomics of it are used. Blocks belong to whoever allocated them.

#![allow(unsafe_code)]

mod adopt;
#[cfg(not(loom))]
mod bitmaps;
#[cfg(loom)]
pub mod bitmaps;
mod local;
mod note;
mod page;
mod runs;
mod size_class;
mod verify;

pub(crate) use local::forget_unmapped;
pub use verify::OwnerUse;

use crate::error::{Error, Result};
use crate::{Arena, Region};
use allocator_api2::alloc::{AllocError, Allocator};
use netmcore_sem::OwnerId;
use netmcore_sys::crash_point;
use note::Kind;
use page::PAGE_BYTES;
use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_be_bytes(*b"nmheap02");

/// A heap in shared memory: a handle of this process. Clones are the same heap, in forked children too.
///
/// ```
/// use netmcore_shm::{Arena, Heap};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let mut squares = allocator_api2::vec::Vec::new_in(heap.allocator());
/// squares.extend((0..100_u64).map(|n| n * n));
/// assert!(heap.allocator().contains(squares.as_ptr().cast()));
/// assert!(heap.stats().in_use_bytes >= 800);
///
/// // What is longer than the heap is an error, not a signal.
/// assert!(squares.try_reserve(1 << 30).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "Netmcore_heap.heap")]
pub struct Heap {
    at: HeapRef,
    region: Region,
}

/// What a [`Heap`] holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStats {
    /// Bytes of the blocks in use, rounded up to their classes and pages.
    pub in_use_bytes: u64,
    /// Blocks in use.
    pub in_use_blocks: u64,
    /// Bytes of memory taken from the system.
    pub committed_bytes: u64,
    /// Bytes that blocks can occupy at most.
    pub max_bytes: u64,
    /// Bytes in use that were allocated by threads which have died since, or ended without [leaving](Heap::leave) their pages.
    ///
    /// It is an upper bound for what they have leaked of their own: some of it is reached by others, to whom they gave it. What others had allocated, and
    /// only a dead one could still reach (it had taken it from a queue, say), is not in it.
    pub dead_bytes: u64,
    /// The number of blocks that `dead_bytes` counts.
    pub dead_blocks: u64,
}

impl Heap {
    /// Makes a heap of at most `max_len_bytes` for this process and those that it forks. It takes memory as it is used.
    ///
    /// # Errors
    ///
    /// [`Error::ArenaFull`], [`Error::NoSpace`]; [`Error::OutOfPoolMemory`] if the length is too small for a heap.
    pub fn anonymous(arena: &Arena, max_len_bytes: usize) -> Result<Heap> {
        Heap::create(&Region::anonymous(arena, c"netmcore-heap", max_len_bytes)?)
    }

    /// Makes a heap in a region that is new and has no other use. It grows with its contents up to the region's maximum length, while other processes
    /// are [attached](Self::attach) to it.
    ///
    /// # Errors
    ///
    /// As [`anonymous`](Self::anonymous), without `ArenaFull`.
    ///
    /// # If a process dies
    ///
    /// It is a heap or not.
    pub fn create(region: &Region) -> Result<Heap> {
        let at = runs::create(region)?;
        crash_point!("shm.heap.pool_made");
        let heap = Heap {
            at,
            region: region.clone(),
        };
        at.header().magic.store(MAGIC, Ordering::Release);
        Ok(heap)
    }

    /// The heap that was made in the region.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`] if there is none.
    pub fn attach(region: &Region) -> Result<Heap> {
        let mismatch = |found| Error::FormatMismatch {
            object: format!("the heap in {}", region.id()),
            expected: MAGIC,
            found,
        };
        let at = runs::attach(region)?.ok_or_else(|| mismatch(0))?;
        match at.header().magic.load(Ordering::Acquire) {
            MAGIC => Ok(Heap {
                at,
                region: region.clone(),
            }),
            found => Err(mismatch(found)),
        }
    }

    /// The region that it lies in.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What containers in this heap take as their allocator.
    pub fn allocator(&self) -> HeapRef {
        self.at
    }

    /// Gives back what memory it can: the empty pages of this thread and of the dead go to the pool, and the pool's free memory to the system. Returns how
    /// many bytes the system got. Other threads give back their empty pages when they next allocate; a later call finds them.
    ///
    /// # If a process dies
    ///
    /// A part of it is given back.
    ///
    /// # Blocking
    ///
    /// While the kernel takes the memory: some 50 ms for 1 GiB.
    pub fn trim(&self) -> u64 {
        local::with_cache(self.at, local::Cache::reclaim);
        let pool = runs::pool(self.at);
        pool.reclaim_dead();
        pool.trim()
    }

    /// Gives up the pages of the calling thread in all heaps, so that others may allocate from them at once. It can go on to use heaps.
    ///
    /// Threads do so by themselves when they end. A process that ends by `_exit` with its contents in order does it before; if it does not, its pages are
    /// adopted as those of the dead, and its blocks count as [`dead_bytes`](HeapStats::dead_bytes).
    pub fn leave() {
        local::leave_all();
    }
}

/// A heap as containers in it see it: the address of its header. Plain data of 8 bytes, valid wherever the heap is mapped.
///
/// It does not keep the heap mapped: regions stay mapped until the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct HeapRef(NonNull<HeapHeader>);

/// What lies at the start of the pool.
#[derive(Debug)]
#[repr(C)]
struct HeapHeader {
    magic: AtomicU64,
    anchors: [AtomicU64; ANCHORS],
    /// Where to look next for pages of the dead.
    cursor: AtomicU64,
    _reserved: [u64; 6],
    /// For owners, by a part of their ids: in which classes others have emptied pages of theirs. A lost one costs memory until the next.
    hints: [AtomicU64; HINTS],
}

/// How many words [`HeapRef::anchors`] has.
const ANCHORS: usize = 8;
const HINTS: usize = 128;
/// A hint that asks for all empty pages, at once.
const HINT_ALL: u64 = u64::MAX;

const _: () = assert!(size_class::COUNT < 64 && size_of::<HeapHeader>() == 128 + 8 * HINTS);

// SAFETY: an address of memory that all threads have; only atomics of the header are used.
unsafe impl Send for HeapRef {}
// SAFETY: as for Send.
unsafe impl Sync for HeapRef {}

impl HeapRef {
    /// Allocates a block of the layout. The contents are whatever was there. The memory is present: to touch it is no bus error.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] if the heap is used up; [`Error::NoSpace`] if the system has not the memory.
    ///
    /// # If a process dies
    ///
    /// The block is allocated or free; if nobody knows of it, it stays allocated until the heap is gone.
    #[inline]
    pub fn allocate(self, layout: Layout) -> Result<NonNull<u8>> {
        match size_class::class_of_usual(layout) {
            Some(class) => local::allocate(self, class),
            None => self.allocate_unusual(layout),
        }
    }

    /// Frees a block. Any process and thread may do so.
    ///
    /// # Safety
    ///
    /// - The block was allocated from this heap with this layout, and has not been freed.
    /// - Nobody uses it any more, in any process.
    ///
    /// # If a process dies
    ///
    /// The block is allocated or free.
    #[inline]
    pub unsafe fn deallocate(self, at: NonNull<u8>, layout: Layout) {
        match size_class::class_of_usual(layout) {
            // SAFETY: it is a block of that class, as it was allocated with this layout.
            Some(class) => unsafe { local::deallocate(self, class, at) },
            // SAFETY: the caller's duty.
            None => unsafe { self.deallocate_unusual(at, layout) },
        }
    }

    #[inline(never)]
    fn allocate_unusual(self, layout: Layout) -> Result<NonNull<u8>> {
        match size_class::class_of(layout) {
            Some(class) => local::allocate(self, class),
            None => self.allocate_run(layout),
        }
    }

    /// # Safety
    ///
    /// - As [`deallocate`](Self::deallocate).
    #[inline(never)]
    unsafe fn deallocate_unusual(self, at: NonNull<u8>, layout: Layout) {
        match size_class::class_of(layout) {
            // SAFETY: it is a block of that class, as it was allocated with this layout.
            Some(class) => unsafe { local::deallocate(self, class, at) },
            // SAFETY: it is a run, as it was allocated with this layout.
            None => unsafe { self.deallocate_run(at, layout) },
        }
    }

    #[cold]
    fn allocate_run(self, layout: Layout) -> Result<NonNull<u8>> {
        local::with_cache(self, |cache| {
            let page_count = page_count(layout);
            let note = cache.note(Kind::Large);
            let at = match runs::allocate(self, page_count, note) {
                Ok(at) => at,
                Err(error) => {
                    cache.reclaim();
                    runs::allocate(self, page_count, note).map_err(|_| error)?
                }
            };
            crash_point!("shm.heap.run_allocated");
            cache.has_large();
            let inside = at.as_ptr().addr();
            let skipped = inside.next_multiple_of(layout.align()) - inside;
            // SAFETY: in bounds, as the run is longer by the alignment if that is above a page's.
            Ok(unsafe { at.add(skipped) })
        })
    }

    /// # Safety
    ///
    /// - As [`deallocate`](Self::deallocate), of a run.
    #[cold]
    unsafe fn deallocate_run(self, at: NonNull<u8>, layout: Layout) {
        let start = if layout.align() <= PAGE_BYTES {
            at
        } else {
            match runs::start_of(self, at.as_ptr()) {
                Some(start) => start,
                None => return debug_assert!(false, "no run in use is at {at:p}"),
            }
        };
        // SAFETY: the caller's duty.
        unsafe { runs::free(self, start) };
        crash_point!("shm.heap.run_freed");
    }

    /// Whether the address lies in the heap's range, in use or not.
    #[inline]
    pub fn contains(self, at: *const u8) -> bool {
        runs::pool(self).contains(at)
    }

    /// The address of the heap, which names it.
    pub fn address(self) -> usize {
        self.0.as_ptr().addr()
    }

    /// The heap whose header lies at `address`, as another process has sent it.
    ///
    /// # Safety
    ///
    /// - It is an [`address`](Self::address) of a heap that this process has mapped.
    pub unsafe fn from_address(address: usize) -> Option<HeapRef> {
        let at = NonNull::new(std::ptr::with_exposed_provenance_mut(address))?;
        Some(HeapRef(at))
    }

    /// Words of the heap that are all zeros at first, for those who must be found without an address.
    pub(crate) fn anchors(self) -> &'static [AtomicU64; ANCHORS] {
        &self.header().anchors
    }

    fn as_pointer(self) -> *const u8 {
        self.0.as_ptr().cast()
    }

    /// Where the owner finds in which classes others have emptied pages.
    fn hint(self, owner: OwnerId) -> &'static AtomicU64 {
        &self.header().hints[owner.index as usize % HINTS]
    }

    /// Asks all owners to give back their empty pages.
    fn hint_all(self) {
        for hint in &self.header().hints {
            hint.store(HINT_ALL, Ordering::Relaxed);
        }
    }

    fn header(self) -> &'static HeapHeader {
        // SAFETY: in bounds: a `HeapRef` is made for a header only; here, there: atomics; gone: mapped as long as
        // the handle, and the dead leave it valid.
        unsafe { self.0.as_ref() }
    }
}

/// How many pages a block of the layout takes that is in no class.
fn page_count(layout: Layout) -> usize {
    // A `Layout` with its alignment is below half of the address range.
    let beyond = layout.align().saturating_sub(PAGE_BYTES);
    (layout.size().max(1) + beyond).div_ceil(PAGE_BYTES)
}

// SAFETY: blocks stay where they are until they are deallocated, by whichever copy of the reference; the memory is
// valid as long as it is mapped, which does not depend on the reference.
unsafe impl Allocator for HeapRef {
    #[inline]
    fn allocate(&self, layout: Layout) -> std::result::Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            return Ok(NonNull::slice_from_raw_parts(dangling(layout), 0));
        }
        let at = HeapRef::allocate(*self, layout).map_err(|_| AllocError)?;
        Ok(NonNull::slice_from_raw_parts(at, layout.size()))
    }

    #[inline]
    unsafe fn deallocate(&self, at: NonNull<u8>, layout: Layout) {
        if layout.size() != 0 {
            // SAFETY: the caller's duty.
            unsafe { HeapRef::deallocate(*self, at, layout) }
        }
    }

    unsafe fn grow(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's duty; the new one is not shorter.
        unsafe { self.resize(at, old, new) }
    }

    unsafe fn grow_zeroed(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's duty.
        let block = unsafe { self.resize(at, old, new) }?;
        // SAFETY: in bounds of the block, which is the caller's alone.
        unsafe {
            let behind = block.cast::<u8>().add(old.size());
            behind.write_bytes(0, new.size() - old.size());
        }
        Ok(block)
    }

    unsafe fn shrink(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's duty; the new one is not longer.
        unsafe { self.resize(at, old, new) }
    }
}

impl HeapRef {
    /// Makes a block longer or shorter: where it is, if the memory is the same, else elsewhere.
    ///
    /// # Safety
    ///
    /// - The block was allocated from this heap with the old layout, and is the caller's.
    unsafe fn resize(
        self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        if is_same_memory(old, new) && at.as_ptr().addr().is_multiple_of(new.align()) {
            return Ok(NonNull::slice_from_raw_parts(at, new.size()));
        }
        let block = Allocator::allocate(&self, new)?;
        // SAFETY: both blocks are so long, and the new one is nobody else's.
        unsafe {
            at.copy_to_nonoverlapping(block.cast(), old.size().min(new.size()));
            Allocator::deallocate(&self, at, old);
        }
        Ok(block)
    }
}

/// Whether a block of one layout can be used, and freed, as one of the other, if it has the alignment.
fn is_same_memory(old: Layout, new: Layout) -> bool {
    if old.size() == 0 || new.size() == 0 {
        return old.size() == new.size();
    }
    match (size_class::class_of(old), size_class::class_of(new)) {
        (Some(old), Some(new)) => old == new,
        // Where in the run the block begins depends on an alignment above a page's.
        (None, None) => {
            page_count(old) == page_count(new)
                && old.align().max(PAGE_BYTES) == new.align().max(PAGE_BYTES)
        }
        _ => false,
    }
}

fn dangling(layout: Layout) -> NonNull<u8> {
    NonNull::new(std::ptr::without_provenance_mut(layout.align())).expect("an alignment is not 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_alignment_and_come_back() {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let mut blocks = Vec::new();
        for align in (0..17).map(|power| 1 << power) {
            for size in [1, 64, 1_000, 70_000] {
                let layout = Layout::from_size_align(size, align).unwrap();
                let at = heap.allocator().allocate(layout).unwrap();
                assert!(at.as_ptr().addr().is_multiple_of(align));
                assert!(heap.allocator().contains(at.as_ptr()));
                // SAFETY: the block is ours and so long.
                unsafe { at.write_bytes(0xaa, size) };
                blocks.push((at, layout));
            }
        }
        for (at, layout) in blocks {
            // SAFETY: allocated above with this layout, not used any more.
            unsafe { heap.allocator().deallocate(at, layout) };
        }
        assert_eq!(heap.stats().in_use_blocks, 0);
        heap.verify().unwrap();
    }

    #[test]
    fn containers_of_others_live_in_it() {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let mut words = allocator_api2::vec::Vec::new_in(heap.allocator());
        words.extend(0..10_000_u64);
        let boxed = allocator_api2::boxed::Box::new_in(words, heap.allocator());
        assert_eq!(boxed.iter().sum::<u64>(), 10_000 * 9_999 / 2);
        assert!(heap.stats().in_use_bytes >= 80_000);
        drop(boxed);
        assert_eq!(heap.stats().in_use_blocks, 0);
    }
}

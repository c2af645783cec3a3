//! A heap in shared memory whose every allocation is one word that says whose it is.
//!
//! Made for processes that are killed at any instruction: what a dead one had is found by its tag, and what it was doing
//! leaves nothing in between, because nothing is in between.
//!
//! **Protocol.** A *tag* is a number that stands for a user of blocks, and is never used for another.
//!
//! | word of the block | means | a process dies |
//! |---|---|---|
//! | 0 | free | – |
//! | tag | it belongs to the tag | the tag's own: [`free_all`](TaggedHeap::free_all) frees it; any other: nothing |
//! | tag, freeing | whoever set this gives its memory back | it may have done so in part; `free_all` of the tag does it again, and frees it |
//!
//! * The heap is pages of 64 KiB. A *run* of pages is a large block; the word is the map entry of its first page. A *chunk* is a run
//!   of one page, divided into small blocks of one class, whose words lie in the row of the page. A chunk's own word says so.
//! * Allocation of a small block: a hint says where to look; one CAS, 0 → tag, takes the block. Then the page must still be
//!   a chunk of that class; else the block is put back. No lock.
//! * Allocation of a run, or of a new chunk: under the lock, search the map, describe the pages, store the tag. Outside of the lock, make
//!   them present; for a chunk, store the chunk's word.
//! * Freeing: one CAS, tag → 0. No lock, so nobody waits to free, whoever has died. If much memory lies free already, the run's memory
//!   is given back before, while it is still the tag's.
//! * An empty chunk is retired under the lock: all its words are claimed by CAS; then it belongs to nobody else, and is freed.
//!
//! **Invariants.**
//! 1. A page belongs to a run if the word of the run's first page is not 0 and the run is long enough to reach it. Pages that
//!    belong to nothing are free, whatever else is written about them.
//! 2. Block words change from 0 to a tag or a claim, and back to 0, and in no other way. So a late CAS by
//!    somebody who holds the page for what it was takes nothing that is in use, and is undone.
//! 3. Words of rows that are claimed (retiring) are so by the holder of the lock; if there is none, by a dead one.
//! 4. Everything in `layout::Hints` and `layout::Lane` is a hint.
//!
//! **If a process dies here.** Holding the lock: the next to take it is told, and undoes claims and rebuilds the hints
//! from the words. In `alloc`: the block is the tag's or free. In `free`: see the table. A chunk made for a block that was then not
//! taken is empty, and retired some time.
//!
//! **Not here.** Knowing when a tag is dead: that is the caller's. Sharing one block by several owners.
//!
//! # Safety
//!
//! The memory is reached through `layout` only, whose conditions the callers of `create` and `attach` promise. References to the
//! bytes of blocks are made here, from blocks that were checked; who else uses the same block is
//! the caller's part.

#![allow(unsafe_code)]

mod layout;
mod runs;
mod size_class;
mod verify;

pub use verify::HeapStats;

use crate::error::{Error, Result, SpaceLimit};
use crate::headroom::{HEADROOM_FROM_BYTES, headroom};
use layout::{Info, LANES, MAGIC, PAGE_BYTES, ROW_WORDS, View, truth};
use netmcore_sem::Owners;
use netmcore_sys::map::page_size;
use netmcore_sys::{Errno, SysError, crash_point};
use std::num::NonZeroU64;
use std::sync::atomic::Ordering;

/// A heap of tagged blocks in shared memory: this process's view of it.
///
/// The view is a plain value: copies are the same heap, in forked children too. It does not own the memory.
///
/// ```
/// use netmcore_sem::SoloOwners;
/// use netmcore_shm::{AnonRegion, Arena, TaggedHeap};
/// use std::num::NonZeroU64;
///
/// let arena = Arena::reserve(1 << 30)?;
/// let region = AnonRegion::create(c"example", &arena, 64 << 20)?;
/// // SAFETY: the region is new, zeroed, and lives longer than the view.
/// let heap = unsafe { TaggedHeap::create(region.at(), region.len_bytes()) }?;
///
/// let (ours, theirs) = (NonZeroU64::new(1).unwrap(), NonZeroU64::new(2).unwrap());
/// let block = heap.alloc(5, ours, &SoloOwners)?;
/// // SAFETY: nobody else knows of the block.
/// unsafe { heap.bytes_mut(block) }?.copy_from_slice(b"hello");
/// assert!(!heap.free(block, theirs));
/// assert!(heap.free(block, ours));
/// assert!(!heap.free(block, ours), "it is no longer ours");
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TaggedHeap {
    view: View,
}

/// A block of a [`TaggedHeap`]: where it begins, from the heap's start, and its length, in bytes.
///
/// Plain data, to be stored in shared memory and sent to others; the heap checks every one that it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Block {
    /// The offset from the start of the heap, in bytes: a multiple of 64.
    pub offset: u64,
    /// The length that was asked for, in bytes.
    pub len: u64,
}

/// What an offset names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Located {
    Small {
        page: usize,
        index: usize,
        class: usize,
    },
    Run {
        page: usize,
        page_count: usize,
    },
}

/// What became of an attempt to take a block of a chunk.
#[derive(Debug, PartialEq, Eq)]
enum Claim {
    /// The block of this index is taken.
    Taken(usize),
    /// It had no free block.
    Full,
    /// The page is no chunk of the class, or was none any more when the block was taken, which is undone.
    NotThisClass,
}

impl TaggedHeap {
    /// Tags are below this: 2⁶². The rest of a word's values the heap needs itself.
    pub const TAG_LIMIT: u64 = truth::FREEING;
    /// Every block begins at a multiple of this, counted from the start of the heap.
    pub const BLOCK_ALIGN_BYTES: usize = 64;
    /// The least length of a heap's memory. A useful one is larger: an eighth of it is bookkeeping, which takes memory as
    /// the rest is used.
    pub const MIN_LEN_BYTES: usize = 5 * PAGE_BYTES;

    /// Makes an empty heap in zeroed memory. It takes memory as it is used: a few KiB at first.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] if `max_len_bytes` is below [`MIN_LEN_BYTES`](Self::MIN_LEN_BYTES); [`Error::NoSpace`] if there is not
    /// even memory for the header.
    ///
    /// # Panics
    ///
    /// If `at` is not aligned to the system's pages.
    ///
    /// # Safety
    ///
    /// - `[at, at + max_len_bytes)` is a shared, readable and writable mapping of whole pages, all zeros, which
    ///   lives as long as this view, its copies, and references from it are used, in each process for itself.
    /// - It has no other use, here and in other processes. Its object is not shrunk.
    ///
    /// # If a process dies
    ///
    /// It is a heap or not: [`attach`](Self::attach) tells.
    pub unsafe fn create(at: *mut u8, max_len_bytes: usize) -> Result<TaggedHeap> {
        check_alignment(at);
        // SAFETY: the caller's duty, and the alignment was checked.
        let view = unsafe { View::new(at, max_len_bytes) };
        let Some(view) = view.filter(|_| max_len_bytes >= Self::MIN_LEN_BYTES) else {
            return Err(Error::OutOfPoolMemory {
                wanted_bytes: Self::MIN_LEN_BYTES as u64,
                free_bytes: max_len_bytes as u64,
                largest_free_bytes: max_len_bytes as u64,
            });
        };
        view.populate_header()
            .map_err(|error| no_memory(page_size(), error))?;
        let header = view.header();
        header
            .max_len_bytes
            .store(max_len_bytes as u64, Ordering::Relaxed);
        header
            .page_count
            .store(view.page_count() as u64, Ordering::Relaxed);
        crash_point!("shm.tagged_heap.create");
        // The commit.
        header.magic.store(MAGIC, Ordering::Release);
        Ok(TaggedHeap { view })
    }

    /// Views a heap that was made by [`create`](Self::create), here or in another process, at any address.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`] if there is none, or its creation was not finished.
    ///
    /// # Panics
    ///
    /// As [`create`](Self::create).
    ///
    /// # Safety
    ///
    /// - At `at` lies what `create` was given, mapped in whole; or else at least a page of memory that holds no heap.
    /// - As for `create`.
    pub unsafe fn attach(at: *mut u8) -> Result<TaggedHeap> {
        check_alignment(at);
        // SAFETY: the caller's duty.
        match unsafe { View::attach(at) } {
            Ok(view) => Ok(TaggedHeap { view }),
            Err(found) => Err(Error::FormatMismatch {
                object: format!("tagged heap at {at:p}"),
                expected: MAGIC,
                found,
            }),
        }
    }

    /// Allocates `len_bytes` for `tag`, of any length that fits; 0 is a block too. The contents are whatever was there.
    ///
    /// The memory is present afterwards: to touch it is no bus error.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] if the heap has no such run of pages; [`Error::NoSpace`] if the system has not the memory. Nothing is
    /// allocated then.
    ///
    /// # Panics
    ///
    /// If the tag is not below [`TAG_LIMIT`](Self::TAG_LIMIT).
    ///
    /// # If a process dies
    ///
    /// The block is the tag's or free; [`free_all`](Self::free_all) of the tag settles it.
    ///
    /// # Blocking
    ///
    /// Up to half a page, usually not; else for a lock that is held for microseconds. If its holder is stopped or dying,
    /// until that is over.
    pub fn alloc<O: Owners + ?Sized>(
        &self,
        len_bytes: usize,
        tag: NonZeroU64,
        owners: &O,
    ) -> Result<Block> {
        let tag = tag.get();
        assert!(truth::is_tag(tag), "the tag {tag} is not below 2^62");
        let offset = match size_class::class_of(len_bytes) {
            Some(class) => self.alloc_small(class, tag, owners)?,
            None => self.alloc_run(len_bytes, tag, owners)?,
        };
        Ok(Block {
            offset: offset as u64,
            len: len_bytes as u64,
        })
    }

    /// The bytes of a block, to read.
    ///
    /// # Errors
    ///
    /// [`Error::BadBlock`] if there is no such block in use, or it is shorter.
    ///
    /// # Safety
    ///
    /// - Until the reference is gone, nobody frees the block or writes to it, in any process, and it stays mapped.
    pub unsafe fn bytes<'a>(&self, block: Block) -> Result<&'a [u8]> {
        let (at, len) = self.range(block)?;
        // SAFETY: in bounds of a block in use, as `range` has checked; initialised, as all mapped memory is; aliasing
        // here and in other processes, and the end of it, are the caller's duty.
        unsafe { Ok(std::slice::from_raw_parts(at, len)) }
    }

    /// The bytes of a block, to write.
    ///
    /// # Errors
    ///
    /// As [`bytes`](Self::bytes).
    ///
    /// # Safety
    ///
    /// - Until the reference is gone, nobody else reads, writes or frees the block, in any process, and it stays mapped.
    pub unsafe fn bytes_mut<'a>(&self, block: Block) -> Result<&'a mut [u8]> {
        let (at, len) = self.range(block)?;
        // SAFETY: as for `bytes`, with the stronger duty of the caller.
        unsafe { Ok(std::slice::from_raw_parts_mut(at, len)) }
    }

    /// Frees a block of `tag`. False if there is no such block, or it is not the tag's, or no longer. Any process may call it.
    ///
    /// # If a process dies
    ///
    /// The block is free, or still the tag's with its contents, or still the tag's and half given back: then only
    /// [`free_all`](Self::free_all) frees it.
    ///
    /// # Blocking
    ///
    /// Never for another process. Giving back the memory of a large block takes time, some 50 ms for 1 GiB.
    pub fn free(&self, block: Block, tag: NonZeroU64) -> bool {
        let tag = tag.get();
        if !truth::is_tag(tag) {
            return false;
        }
        match self.locate(block.offset) {
            Some(Located::Small { page, index, class }) => self.free_small(page, index, class, tag),
            Some(Located::Run { page, .. }) => self.free_run(page, tag),
            None => false,
        }
    }

    /// Frees all blocks of `tag` and says how many: the recovery after a death. A walk over the whole map; about 1 ms for each GiB
    /// of small blocks, and very little for large ones.
    ///
    /// Call it when no live process uses blocks of the tag, nor allocates nor frees some. It may be repeated.
    ///
    /// # If a process dies
    ///
    /// Some are freed; call it again.
    ///
    /// # Blocking
    ///
    /// As [`free`](Self::free).
    pub fn free_all(&self, tag: NonZeroU64) -> usize {
        let tag = tag.get();
        if !truth::is_tag(tag) {
            return 0;
        }
        let mut freed = 0;
        for page in 0..self.high() {
            let entry = self.view.entry(page);
            let word = entry.truth.load(Ordering::Acquire);
            if word == tag {
                freed += usize::from(self.free_run(page, tag));
            } else if word == tag | truth::FREEING {
                self.finish_freeing(page);
                freed += 1;
            }
            // Chunks, and pages that were: a late claim may have been left in either (invariant 2).
            let class = truth::class_of_chunk(word);
            for index in 0..entry.info().row_words() {
                let word = &self.view.row(page)[index];
                if word.load(Ordering::Relaxed) == tag
                    && word
                        .compare_exchange(tag, truth::FREE, Ordering::Release, Ordering::Relaxed)
                        .is_ok()
                {
                    freed += 1;
                    crash_point!("shm.tagged_heap.free_all");
                    if let Some(class) = class {
                        self.note_free_block(page, index, class, tag);
                    }
                }
            }
        }
        freed
    }

    /// Takes a block of `class` and returns its offset.
    fn alloc_small<O: Owners + ?Sized>(&self, class: usize, tag: u64, owners: &O) -> Result<usize> {
        let lane = &self.view.header().lanes[tag as usize % LANES].0;
        let current = &lane.current[class];
        let taken = |page, index| {
            current.store(pack(page, index + 1), Ordering::Relaxed);
            self.view.offset_of(page) + index * size_class::size(class)
        };
        loop {
            let (page, index) = unpack(current.load(Ordering::Relaxed)).unwrap_or((0, 0));
            match self.claim(page, class, index, tag) {
                Claim::Taken(index) => return Ok(taken(page, index)),
                Claim::NotThisClass => {}
                Claim::Full => {
                    // The flag goes first; a block that is freed after the second look sets it again.
                    self.unflag(page, class);
                    if let Claim::Taken(index) = self.claim(page, class, 0, tag) {
                        self.flag(page, class);
                        return Ok(taken(page, index));
                    }
                }
            }
            let page = match self.find_flagged(class, page + 1) {
                Some(page) => page,
                None => self.make_chunk(class, tag, owners)?,
            };
            current.store(pack(page, 0), Ordering::Relaxed);
        }
    }

    /// Takes a free block of the page, from block `first` on and then around, if it is a chunk of the class.
    fn claim(&self, page: usize, class: usize, first: usize, tag: u64) -> Claim {
        if page >= self.high() || !self.is_chunk(page, class) {
            return Claim::NotThisClass;
        }
        let words = &self.view.row(page)[..size_class::blocks_in_page(class)];
        let (before, after) = words.split_at(first.min(words.len()));
        let around = (first..).zip(after).chain((0..).zip(before));
        for (index, word) in around {
            if word.load(Ordering::Relaxed) != truth::FREE {
                continue;
            }
            match self.claim_block(page, class, index, tag) {
                Claim::Full => {}
                decided => return decided,
            }
        }
        Claim::Full
    }

    /// Takes this block, unless somebody else is quicker ([`Claim::Full`]) or the page is no chunk of the class any more.
    fn claim_block(&self, page: usize, class: usize, index: usize, tag: u64) -> Claim {
        let word = &self.view.row(page)[index];
        let taken = word.compare_exchange(truth::FREE, tag, Ordering::Acquire, Ordering::Relaxed);
        if taken.is_err() {
            return Claim::Full;
        }
        crash_point!("shm.tagged_heap.claimed");
        // While the word is ours the chunk cannot be retired; but it may have been before (invariant 2).
        if self.is_chunk(page, class) {
            return Claim::Taken(index);
        }
        word.store(truth::FREE, Ordering::Release);
        Claim::NotThisClass
    }

    fn is_chunk(&self, page: usize, class: usize) -> bool {
        self.view.entry(page).truth.load(Ordering::Acquire) == truth::chunk(class)
    }

    fn free_small(&self, page: usize, index: usize, class: usize, tag: u64) -> bool {
        let freed = self.view.row(page)[index].compare_exchange(
            tag,
            truth::FREE,
            Ordering::Release,
            Ordering::Relaxed,
        );
        if freed.is_ok() {
            crash_point!("shm.tagged_heap.freed");
            self.note_free_block(page, index, class, tag);
        }
        freed.is_ok()
    }

    /// Hints that the block is free.
    fn note_free_block(&self, page: usize, index: usize, class: usize, tag: u64) {
        let lane = &self.view.header().lanes[tag as usize % LANES].0;
        lane.current[class].store(pack(page, index), Ordering::Relaxed);
        self.flag(page, class);
    }

    fn flag(&self, page: usize, class: usize) {
        let info = &self.view.entry(page).info;
        if info.load(Ordering::Relaxed) & Info::FLAGGED == 0
            && info.fetch_or(Info::FLAGGED, Ordering::Relaxed) & Info::FLAGGED == 0
        {
            self.hints().flagged[class].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn unflag(&self, page: usize, class: usize) {
        let info = &self.view.entry(page).info;
        if info.load(Ordering::Relaxed) & Info::FLAGGED != 0
            && info.fetch_and(!Info::FLAGGED, Ordering::Relaxed) & Info::FLAGGED != 0
        {
            self.hints().flagged[class].fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// A chunk of the class that may have a free block, looked for from page `first` on and then around.
    fn find_flagged(&self, class: usize, first: usize) -> Option<usize> {
        let flagged = &self.hints().flagged[class];
        let claimed = flagged.load(Ordering::Relaxed);
        if claimed <= 0 {
            return None;
        }
        let high = self.high();
        let first = first.min(high);
        for (from, until) in [(first, high), (0, first)] {
            let mut page = from;
            while page < until {
                let entry = self.view.entry(page);
                let word = entry.truth.load(Ordering::Acquire);
                let info = entry.info();
                if word == truth::chunk(class) && info.has(Info::FLAGGED) {
                    return Some(page);
                }
                page += match info.page_count() {
                    Some(page_count) if word != truth::FREE => page_count.max(1),
                    _ => 1,
                };
            }
        }
        // The count was wrong. If it has not changed since, put it right.
        let _ = flagged.compare_exchange(claimed, 0, Ordering::Relaxed, Ordering::Relaxed);
        None
    }

    /// Makes a new chunk. Nobody may have taken a block from it when this returns, or all.
    fn make_chunk<O: Owners + ?Sized>(&self, class: usize, tag: u64, owners: &O) -> Result<usize> {
        let page = self.take_run(1, tag, owners, runs::For::Chunk)?;
        crash_point!("shm.tagged_heap.chunk_taken");
        let entry = self.view.entry(page);
        let info = entry.info();
        let (words, row_flags) = if size_class::blocks_in_page(class) <= ROW_WORDS / 2 {
            (ROW_WORDS / 2, Info::HALF_ROW)
        } else {
            (ROW_WORDS, Info::HALF_ROW | Info::ROW)
        };
        let populate = || -> netmcore_sys::Result<()> {
            if info.row_words() < words {
                self.view.populate_row(page, words)?;
            }
            if !info.has(Info::PRESENT) {
                self.view.populate_data(page, 1)?;
            }
            Ok(())
        };
        if let Err(error) = populate() {
            self.free_run(page, tag);
            return Err(no_memory(PAGE_BYTES, error));
        }
        entry.set_info(Info(
            entry.info().0 | row_flags | Info::PRESENT | Info::FLAGGED,
        ));
        crash_point!("shm.tagged_heap.chunk_present");
        // The commit: from here on anybody may take blocks.
        entry.truth.store(truth::chunk(class), Ordering::Release);
        crash_point!("shm.tagged_heap.chunk_made");
        self.hints().flagged[class].fetch_add(1, Ordering::Relaxed);
        Ok(page)
    }

    /// Takes a run and returns its offset.
    fn alloc_run<O: Owners + ?Sized>(
        &self,
        len_bytes: usize,
        tag: u64,
        owners: &O,
    ) -> Result<usize> {
        let page_count = len_bytes.div_ceil(PAGE_BYTES);
        if page_count > self.view.page_count() {
            return Err(self.out_of_pool_memory(len_bytes));
        }
        if len_bytes as u64 >= HEADROOM_FROM_BYTES {
            let room = headroom();
            if room.bytes < len_bytes as u64 {
                return Err(Error::NoSpace {
                    limit: room.limit,
                    wanted_bytes: len_bytes as u64,
                    free_bytes: room.bytes,
                });
            }
        }
        let page = self.take_run(page_count, tag, owners, runs::For::Block)?;
        crash_point!("shm.tagged_heap.run_taken");
        // Also where the pages are present: it maps them here in one go, cheaper than fault by fault.
        if let Err(error) = self.view.populate_data(page, page_count) {
            self.free_run(page, tag);
            return Err(no_memory(len_bytes, error));
        }
        crash_point!("shm.tagged_heap.run_present");
        self.mark_present(page, page_count, true);
        Ok(self.view.offset_of(page))
    }

    /// The address and length of a block in use.
    fn range(&self, block: Block) -> Result<(*mut u8, usize)> {
        let bad = |why| Error::BadBlock { block, why };
        let (word, capacity) = match self.locate(block.offset) {
            None => return Err(bad("no block begins there")),
            Some(Located::Small { page, index, class }) => {
                (&self.view.row(page)[index], size_class::size(class))
            }
            Some(Located::Run { page, page_count }) => {
                (&self.view.entry(page).truth, page_count * PAGE_BYTES)
            }
        };
        if !truth::is_tag(word.load(Ordering::Acquire)) {
            return Err(bad("it is not in use"));
        }
        if block.len > capacity as u64 {
            return Err(bad("it is not that long"));
        }
        // Both lie below the length of the heap.
        let (offset, len) = (block.offset as usize, block.len as usize);
        Ok((self.view.address(offset), len))
    }

    /// Which block begins at the offset, in use or not. Trusts nothing about the offset.
    fn locate(&self, offset: u64) -> Option<Located> {
        let (page, inside) = self.view.page_at(offset)?;
        if page >= self.high() {
            return None;
        }
        let entry = self.view.entry(page);
        let word = entry.truth.load(Ordering::Acquire);
        if let Some(class) = truth::class_of_chunk(word) {
            let index = size_class::index_at(class, inside);
            let begins = index * size_class::size(class) == inside;
            return (begins && index < size_class::blocks_in_page(class))
                .then_some(Located::Small { page, index, class });
        }
        let page_count = entry.info().page_count()?;
        // A run that reaches beyond the heap is none, whoever wrote that.
        let fits = page_count <= self.view.page_count() - page;
        (inside == 0 && word != truth::FREE && fits).then_some(Located::Run { page, page_count })
    }

    /// Pages below were in use at some time. Garbage that a stray store left there is no reason to fall.
    fn high(&self) -> usize {
        let high = self.view.header().high.load(Ordering::Acquire) as usize;
        high.min(self.view.page_count())
    }

    fn hints(&self) -> &layout::Hints {
        &self.view.header().hints.0
    }
}

fn check_alignment(at: *mut u8) {
    assert!(
        at.addr().is_multiple_of(page_size()) && !at.is_null(),
        "the heap's memory at {at:p} is not aligned to pages"
    );
}

/// Memory could not be made present. The kernel says `ENOMEM`, or `EFAULT` where a touch would have been a bus error.
fn no_memory(wanted_bytes: usize, source: SysError) -> Error {
    if source.errno != Errno::ENOMEM && source.errno != Errno::EFAULT {
        return Error::system("make memory of a tagged heap present")(source);
    }
    let room = headroom();
    let enough = room.bytes >= wanted_bytes as u64;
    Error::NoSpace {
        limit: if enough {
            SpaceLimit::Kernel
        } else {
            room.limit
        },
        wanted_bytes: wanted_bytes as u64,
        free_bytes: room.bytes,
    }
}

fn pack(page: usize, index: usize) -> u64 {
    (page as u64 + 1) << 16 | index as u64
}

fn unpack(hint: u64) -> Option<(usize, usize)> {
    let page = (hint >> 16).checked_sub(1)?;
    Some((page as usize, (hint & 0xffff) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AnonRegion, Arena};
    use netmcore_sem::SoloOwners;

    const TAG: NonZeroU64 = NonZeroU64::MIN;

    fn heap() -> (TaggedHeap, AnonRegion) {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let region = AnonRegion::create(c"test", &arena, 8 << 20).unwrap();
        // SAFETY: the region is new and returned beside the view.
        let heap = unsafe { TaggedHeap::create(region.at(), region.len_bytes()) }.unwrap();
        (heap, region)
    }

    /// Makes a chunk of blocks of 100 bytes and retires it again; its page and class.
    fn retired_chunk(heap: &TaggedHeap) -> (usize, usize) {
        let block = heap.alloc(100, TAG, &SoloOwners).unwrap();
        let Some(Located::Small { page, class, .. }) = heap.locate(block.offset) else {
            panic!("not small");
        };
        assert!(heap.free(block, TAG));
        assert!(heap.is_chunk(page, class));
        let all = heap.stats().max_bytes as usize;
        let all = heap.alloc(all, TAG, &SoloOwners).unwrap();
        assert!(!heap.is_chunk(page, class), "it was retired");
        assert!(heap.free(all, TAG));
        (page, class)
    }

    #[test]
    fn late_claim_of_a_retired_chunk_is_undone() {
        let (heap, _region) = heap();
        let (page, class) = retired_chunk(&heap);
        // As by somebody who has seen the chunk, and was stopped until now.
        let claim = heap.claim_block(page, class, 3, TAG.get());
        assert_eq!(claim, Claim::NotThisClass);
        heap.verify().unwrap();
        // The page is now a chunk of another class, where the block exists as well.
        let block = heap.alloc(1_000, TAG, &SoloOwners).unwrap();
        assert_eq!(heap.view.page_at(block.offset).unwrap().0, page);
        let claim = heap.claim_block(page, class, 3, TAG.get());
        assert_eq!(claim, Claim::NotThisClass);
        assert!(heap.free(block, TAG));
        assert_eq!(heap.stats().in_use_blocks, 0);
        heap.verify().unwrap();
    }

    #[test]
    fn late_claim_of_a_dead_process_is_swept_wherever_it_is() {
        let (heap, _region) = heap();
        let (page, _) = retired_chunk(&heap);
        let dead = NonZeroU64::new(77).unwrap();
        // Killed between its late claim and undoing it.
        let word = &heap.view.row(page)[5];
        word.store(dead.get(), Ordering::Relaxed);
        assert!(heap.verify().is_err());
        assert_eq!(heap.free_all(dead), 1);
        heap.verify().unwrap();
        // In a page that has become a chunk in the meantime it is a block in use, until it is swept.
        word.store(dead.get(), Ordering::Relaxed);
        let block = heap.alloc(100, TAG, &SoloOwners).unwrap();
        assert_eq!(heap.view.page_at(block.offset).unwrap().0, page);
        for _ in 1..512 {
            heap.alloc(100, TAG, &SoloOwners).unwrap();
        }
        assert_eq!(word.load(Ordering::Relaxed), dead.get());
        assert_eq!(heap.free_all(dead), 1);
        assert_eq!(heap.free_all(TAG), 512);
        heap.verify().unwrap();
    }

    #[test]
    fn hints_may_be_anything() {
        let (heap, _region) = heap();
        let kept = heap.alloc(100, TAG, &SoloOwners).unwrap();
        let garbage = [0, 1, 0xffff, 1 << 16 | 0xffff, 7 << 16, u64::MAX];
        for (round, &value) in garbage.iter().cycle().take(60).enumerate() {
            for lane in &heap.view.header().lanes {
                for current in &lane.0.current {
                    current.store(value, Ordering::Relaxed);
                }
            }
            let hints = heap.hints();
            for lowest in &hints.lowest {
                lowest.store(value % 200, Ordering::Relaxed);
            }
            for flagged in &hints.flagged {
                flagged.store(value as i64, Ordering::Relaxed);
            }
            hints.kept_pages.store(value as i64, Ordering::Relaxed);
            hints.chunk_count.store(value, Ordering::Relaxed);
            hints.sweep_at.store(value, Ordering::Relaxed);
            let blocks = [10, 1_000, 30_000, 200_000, 1 << 20];
            let blocks = blocks.map(|len| heap.alloc(len + round, TAG, &SoloOwners).unwrap());
            assert_eq!(heap.stats().in_use_blocks, 6);
            assert!(blocks.iter().all(|&block| heap.free(block, TAG)));
            assert_eq!(heap.stats().in_use_blocks, 1);
        }
        assert!(heap.free(kept, TAG));
        for lowest in &heap.hints().lowest {
            lowest.store(0, Ordering::Relaxed);
        }
        heap.verify().unwrap();
    }
}

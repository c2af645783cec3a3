//! What lies where in a tagged heap, what its words mean, and the only pointers into it.
//!
//! ```text
//! at            header, one page (its hints included)
//! + 64 KiB      map: an Entry of 16 bytes for each page of data
//! + ...         rows: 1024 block words for each page of data; present only if the page ever was a chunk
//! + ...         data: pages of 64 KiB
//! ```
//!
//! **Invariants.**
//! 1. A view's range `[at, at + len)` is one shared mapping, alive and writable as long as views of it are used.
//! 2. Header, map and rows are accessed as atomics only, by everybody.
//! 3. Map entries below `Header::map_present`, and rows as far as the flags in their page's entry say, are present memory.
//!    Others are not touched.
//!
//! # Safety
//!
//! All pointers are made here, from `at` and offsets that are checked against the geometry, which is fixed at creation; the
//! invariants answer the rest.

#![allow(unsafe_code)]

use super::size_class;
use netmcore_sem::LockWord;
use netmcore_sys::map::{self, page_size};
use netmcore_sys::{Errno, SysError};
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};

/// A page of the heap, whatever the system's pages are: 64 KiB.
pub(super) const PAGE_BYTES: usize = 64 << 10;
/// Block words for each page: enough for the smallest blocks.
pub(super) const ROW_WORDS: usize = PAGE_BYTES / 64;
/// Lanes spread processes over different chunks, by tag.
pub(super) const LANES: usize = 4;
/// Lengths of runs, in pages, from which on a hint of their own is kept.
pub(super) const BUCKETS: [usize; 4] = [1, 2, 8, 64];

/// "nmcHeap1": the format of this file. Stored last when a heap is created.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"nmcHeap1");

/// The start of a heap.
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: AtomicU64,
    pub(super) max_len_bytes: AtomicU64,
    pub(super) page_count: AtomicU64,
    /// Guards the taking of runs: searching and committing.
    pub(super) lock: Line<LockWord>,
    /// Every page that ever was in a run is below this. Stored before the run is committed; only grows.
    pub(super) high: AtomicU64,
    /// Map entries below this are present; only grows.
    pub(super) map_present: AtomicU64,
    /// All below are hints: any value is right, and recovery finds better ones.
    pub(super) hints: Line<Hints>,
    pub(super) lanes: [Line<Lane>; LANES],
}

#[repr(C)]
pub(super) struct Hints {
    /// For each of `BUCKETS`: no free run of that many pages is known below this page.
    pub(super) lowest: [AtomicU64; BUCKETS.len()],
    /// Free pages that still have memory.
    pub(super) kept_pages: AtomicI64,
    /// Chunks, and how many there may be before empty ones are looked for. Changed under the lock.
    pub(super) chunk_count: AtomicU64,
    pub(super) sweep_at: AtomicU64,
    /// Chunks of each class that are flagged as having a free block.
    pub(super) flagged: [AtomicI64; size_class::COUNT],
}

/// Where to look first for a free block of each class: `(page + 1) << 16 | index`, or 0.
#[repr(C)]
pub(super) struct Lane {
    pub(super) current: [AtomicU64; size_class::COUNT],
}

/// Keeps what is written often apart from its neighbours.
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// What is known of a page of data.
#[repr(C)]
pub(super) struct Entry {
    /// Whose page it is, if it is the first of a run; see [`truth`]. Zero in the others.
    pub(super) truth: AtomicU64,
    /// See [`Info`].
    pub(super) info: AtomicU64,
}

const _: () = assert!(size_of::<Header>() <= 4096 && size_of::<Entry>() == 16);
const _: () = assert!(BUCKETS[0] == 1);

/// Words that say whose a block is: 0 nobody's, a tag, or one of these.
pub(super) mod truth {
    use super::size_class;

    pub(in super::super) const FREE: u64 = 0;
    /// A tag with this bit: its memory is being given back, by whoever set the bit.
    pub(in super::super) const FREEING: u64 = 1 << 62;
    /// Of pages: the page is a chunk of small blocks; the class is in the low bits.
    const CHUNK: u64 = 1 << 63;
    /// Of block words: claimed by the holder of the lock, who is about to free the chunk.
    pub(in super::super) const RETIRING: u64 = u64::MAX;

    pub(in super::super) const fn is_tag(word: u64) -> bool {
        word != FREE && word < FREEING
    }

    pub(in super::super) const fn chunk(class: usize) -> u64 {
        CHUNK | class as u64
    }

    /// The class of a page that is a chunk.
    pub(in super::super) fn class_of_chunk(word: u64) -> Option<usize> {
        let class = (word ^ CHUNK) as usize;
        (word & CHUNK != 0 && class < size_class::COUNT).then_some(class)
    }
}

/// What else is known of a page. Meaningful for the pages of a run whose first page is somebody's; the flags always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Info(pub(super) u64);

impl Info {
    const NUMBER: u64 = 0xffff_ffff;
    const HEAD: u64 = 1 << 32;
    const INTERIOR: u64 = 1 << 33;
    /// The page has memory.
    pub(super) const PRESENT: u64 = 1 << 40;
    /// Half of its row, or all of it, has memory.
    pub(super) const HALF_ROW: u64 = 1 << 41;
    pub(super) const ROW: u64 = 1 << 42;
    /// It is a chunk that may have a free block. A hint, and the only bit changed by those who do not own the page.
    pub(super) const FLAGGED: u64 = 1 << 43;
    /// What stays when a page changes its use.
    const LASTING: u64 = Info::PRESENT | Info::HALF_ROW | Info::ROW;

    /// The first of a run of `page_count` pages.
    pub(super) fn head(self, page_count: usize) -> Info {
        Info(self.0 & Info::LASTING | Info::HEAD | page_count as u64)
    }

    /// The page at `distance` behind the first of its run.
    pub(super) fn interior(self, distance: usize) -> Info {
        Info(self.0 & Info::LASTING | Info::INTERIOR | distance as u64)
    }

    /// The number of pages, if it is the first of a run.
    pub(super) fn page_count(self) -> Option<usize> {
        (self.0 & Info::HEAD != 0).then_some((self.0 & Info::NUMBER) as usize)
    }

    /// The distance to the first page, if it is another.
    pub(super) fn distance(self) -> Option<usize> {
        (self.0 & Info::INTERIOR != 0).then_some((self.0 & Info::NUMBER) as usize)
    }

    pub(super) fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    /// How many words of the page's row are present.
    pub(super) fn row_words(self) -> usize {
        if self.has(Info::ROW) {
            ROW_WORDS
        } else if self.has(Info::HALF_ROW) {
            ROW_WORDS / 2
        } else {
            0
        }
    }
}

impl Entry {
    pub(super) fn info(&self) -> Info {
        Info(self.info.load(Ordering::Acquire))
    }

    /// For the owner of the page only.
    pub(super) fn set_info(&self, info: Info) {
        self.info.store(info.0, Ordering::Release);
    }
}

/// Where everything is, in this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    at: *mut u8,
    geometry: Geometry,
}

// SAFETY: the view is an address and numbers. What it points to is shared by processes anyway: accessed as
// atomics, or through functions that put the duties of references on their callers.
unsafe impl Send for View {}
// SAFETY: as for Send.
unsafe impl Sync for View {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    page_count: usize,
    rows_offset: usize,
    data_offset: usize,
}

impl Geometry {
    /// As many pages as fit; `None` if not even one does.
    fn of(max_len_bytes: usize) -> Option<Geometry> {
        let for_each_page = size_of::<Entry>() + ROW_WORDS * 8 + PAGE_BYTES;
        // One page for the header, and rounding of map and rows costs less than one each.
        let page_count = max_len_bytes.checked_sub(3 * PAGE_BYTES)? / for_each_page;
        let geometry = Geometry::with(page_count);
        (page_count > 0).then_some(geometry)
    }

    fn with(page_count: usize) -> Geometry {
        let map_end = PAGE_BYTES + page_count * size_of::<Entry>();
        let rows_offset = map_end.next_multiple_of(PAGE_BYTES);
        let rows_end = rows_offset + page_count * ROW_WORDS * 8;
        Geometry {
            page_count,
            rows_offset,
            data_offset: rows_end.next_multiple_of(PAGE_BYTES),
        }
    }
}

impl View {
    /// Lays out a new heap; `None` if `max_len_bytes` is too small for one. Publishes nothing.
    ///
    /// # Safety
    ///
    /// - Invariant 1, for a range of `max_len_bytes`.
    /// - `at` is aligned to the system's pages.
    pub(super) unsafe fn new(at: *mut u8, max_len_bytes: usize) -> Option<View> {
        let geometry = Geometry::of(max_len_bytes)?;
        Some(View { at, geometry })
    }

    /// Views an existing heap; `Err` with the magic number that is there if there is none, or a damaged one.
    ///
    /// # Safety
    ///
    /// - As for [`new`](Self::new), for the range with which the heap was created if there is one, else for a page.
    pub(super) unsafe fn attach(at: *mut u8) -> Result<View, u64> {
        let one_page = Geometry::with(0);
        let claimed = View {
            at,
            geometry: one_page,
        };
        let found = claimed.header().magic.load(Ordering::Acquire);
        if found != MAGIC {
            return Err(found);
        }
        // Of the same program or another of the same format: but a stray write must not make us reach out of the mapping.
        let max_len_bytes = claimed.header().max_len_bytes.load(Ordering::Relaxed);
        let page_count = claimed.header().page_count.load(Ordering::Relaxed);
        match Geometry::of(max_len_bytes as usize) {
            Some(geometry) if geometry.page_count as u64 == page_count => Ok(View { at, geometry }),
            _ => Err(found),
        }
    }

    pub(super) fn page_count(&self) -> usize {
        self.geometry.page_count
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: in bounds: at least a page is there, and the header is smaller; aligned, because `at` is to a page.
        // Here and there: atomics only (invariant 2). Gone: any values are valid.
        unsafe { &*self.at.cast::<Header>() }
    }

    /// # Panics
    ///
    /// If there is no such page.
    pub(super) fn entry(&self, page: usize) -> &Entry {
        assert!(page < self.geometry.page_count, "no page {page}");
        // SAFETY: in bounds by the assertion; 16 bytes each behind a page: aligned. The rest as for the header; the callers
        // keep below `map_present` (invariant 3).
        unsafe { &*self.at.add(PAGE_BYTES).cast::<Entry>().add(page) }
    }

    /// The block words of a page. Touch those only that the page's entry says are present.
    pub(super) fn row(&self, page: usize) -> &[AtomicU64; ROW_WORDS] {
        assert!(page < self.geometry.page_count, "no page {page}");
        // SAFETY: as for the entry.
        unsafe {
            let rows = self.at.add(self.geometry.rows_offset);
            &*rows.cast::<[AtomicU64; ROW_WORDS]>().add(page)
        }
    }

    /// The offset from the start of the heap to the start of a page of data.
    pub(super) fn offset_of(&self, page: usize) -> usize {
        self.geometry.data_offset + page * PAGE_BYTES
    }

    /// The page of data that the offset lies in, and the offset inside of it.
    pub(super) fn page_at(&self, offset: u64) -> Option<(usize, usize)> {
        let data = usize::try_from(offset)
            .ok()?
            .checked_sub(self.geometry.data_offset)?;
        let page = data / PAGE_BYTES;
        (page < self.geometry.page_count).then_some((page, data % PAGE_BYTES))
    }

    /// The address at an offset that lies in the heap.
    pub(super) fn address(&self, offset: usize) -> *mut u8 {
        self.at.wrapping_add(offset)
    }

    /// Makes the header present.
    pub(super) fn populate_header(&self) -> Result<(), SysError> {
        self.populate(0, size_of::<Header>())
    }

    /// Makes the map present for pages below `page_count`, and some more.
    pub(super) fn populate_map(&self, page_count: usize) -> Result<(), SysError> {
        let present = &self.header().map_present;
        let from = present.load(Ordering::Acquire) as usize;
        if page_count <= from {
            return Ok(());
        }
        let in_system_page = page_size() / size_of::<Entry>();
        let until = page_count
            .next_multiple_of(in_system_page)
            .min(self.geometry.page_count);
        let (from_offset, until_offset) = (from * size_of::<Entry>(), until * size_of::<Entry>());
        self.populate(PAGE_BYTES + from_offset, until_offset - from_offset)?;
        present.store(until as u64, Ordering::Release);
        Ok(())
    }

    /// Makes the first `word_count` block words of a page present.
    pub(super) fn populate_row(&self, page: usize, word_count: usize) -> Result<(), SysError> {
        let offset = self.geometry.rows_offset + page * ROW_WORDS * 8;
        self.populate(offset, word_count * 8)
    }

    /// Makes pages of data present.
    pub(super) fn populate_data(&self, page: usize, page_count: usize) -> Result<(), SysError> {
        self.populate(self.offset_of(page), page_count * PAGE_BYTES)
    }

    /// Gives the memory of pages of data back. They read zero afterwards.
    ///
    /// # Safety
    ///
    /// - The pages belong to the caller alone: nobody has, or makes, references to them.
    pub(super) unsafe fn remove_data(
        &self,
        page: usize,
        page_count: usize,
    ) -> Result<(), SysError> {
        assert!(
            page + page_count <= self.geometry.page_count,
            "no such pages"
        );
        let at = self.address(self.offset_of(page));
        // SAFETY: in bounds by the assertion, of a shared mapping (invariant 1); that losing the contents is
        // right, and that there are no references, is the caller's duty.
        unsafe { map::remove_pages(at, page_count * PAGE_BYTES) }
    }

    fn populate(&self, offset: usize, len_bytes: usize) -> Result<(), SysError> {
        let start = offset / page_size() * page_size();
        let end = (offset + len_bytes).next_multiple_of(page_size());
        let at = self.address(start);
        // SAFETY: the range lies in the mapping (invariant 1): all parts end in whole system pages, up to the end
        // of the mapping, which is whole pages itself.
        match unsafe { map::populate_write(at, end - start) } {
            // Linux before 5.14: touch the pages instead. Where there is no memory the kernel then kills.
            Err(error) if error.errno == Errno::EINVAL => {
                for page in (start..end).step_by(page_size()) {
                    // SAFETY: in bounds as above; an atomic change that changes nothing, whatever others do there.
                    let byte = unsafe { &*self.address(page).cast::<AtomicU8>() };
                    byte.fetch_or(0, Ordering::Relaxed);
                }
                Ok(())
            }
            done => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_fits_into_the_length() {
        for len in [
            1 << 20,
            3 * PAGE_BYTES + 80_000,
            16 << 30,
            1 << 40,
            12_345_678,
        ] {
            let geometry = Geometry::of(len).unwrap();
            assert!(geometry.data_offset + geometry.page_count * PAGE_BYTES <= len);
            let usable = geometry.page_count * PAGE_BYTES;
            assert!(len < 1 << 24 || usable * 8 > len * 7, "{len}: {usable}");
        }
        assert_eq!(Geometry::of(0), None);
        assert_eq!(Geometry::of(3 * PAGE_BYTES + 10), None);
    }

    #[test]
    fn words_keep_apart() {
        for class in 0..size_class::COUNT {
            let word = truth::chunk(class);
            assert_eq!(truth::class_of_chunk(word), Some(class));
            assert!(!truth::is_tag(word));
        }
        assert_eq!(truth::class_of_chunk(truth::RETIRING), None);
        for tag in [1, truth::FREEING - 1] {
            assert!(truth::is_tag(tag));
            assert!(!truth::is_tag(tag | truth::FREEING));
            assert_eq!(truth::class_of_chunk(tag | truth::FREEING), None);
        }
        let flags = Info(Info::PRESENT | Info::ROW | Info::FLAGGED);
        assert_eq!(flags.head(7).page_count(), Some(7));
        assert_eq!(flags.head(7).distance(), None);
        let interior = flags.head(7).interior(3);
        assert_eq!(
            (interior.distance(), interior.page_count()),
            (Some(3), None)
        );
        assert!(interior.has(Info::PRESENT) && !interior.has(Info::FLAGGED));
        assert_eq!(interior.row_words(), ROW_WORDS);
    }
}

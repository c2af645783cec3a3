//! What lies where in a page pool, what its words mean, and the only pointers into it.
//!
//! ```text
//! at            header, in 64 KiB of addresses
//! + 64 KiB      what the layer above keeps, as long as `create` was told
//! + ...         map: an Entry of 24 bytes for each page; present as far as Header::map_present says
//! + ...         Bits of 16 bytes for each 64 pages; present as far
//! + ...         pages of 64 KiB, aligned to 64 KiB
//! ```
//!
//! **Invariants.**
//! 1. A `PoolRef` names a header that is mapped here with all of its region behind it, as long as it is used.
//! 2. Header and map are accessed as atomics only, by everybody.
//! 3. Map entries and bits of pages below `Header::map_present` are present memory. Others are not touched.
//!
//! # Safety
//!
//! All pointers are made here, from the address of the header and offsets that are checked against the geometry, which is
//! fixed at creation; the invariants answer the rest.

#![allow(unsafe_code)]

use super::PoolRef;
use netmcore_sem::{LockWord, OwnerId};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// A page of the pool, whatever the system's pages are.
pub(super) const PAGE_BYTES: usize = 64 << 10;
/// Where the area of the layer above begins.
pub(super) const HEADER_OFFSET_BYTES: usize = 64 << 10;
/// The longest run: what fits into a word.
const PAGE_COUNT_MAX: usize = u32::MAX as usize;
/// Pages of one `Bits`.
pub(super) const GROUP_PAGES: usize = 64;

/// "nmPool01": the format of this file. Stored last when a pool is created.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"nmPool01");

/// The start of a pool.
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: AtomicU64,
    pub(super) max_len_bytes: AtomicU64,
    pub(super) header_len_bytes: AtomicU64,
    pub(super) page_count: AtomicU64,
    pub(super) map_offset: AtomicU64,
    pub(super) bits_offset: AtomicU64,
    pub(super) data_offset: AtomicU64,
    /// So many pages are made present at a time, where that pays.
    pub(super) step_pages: AtomicU64,
    /// Guards the taking of runs: searching and committing.
    pub(super) lock: Line<LockWord>,
    /// Every page that ever was in a run is below this. Stored before the run is committed; only grows.
    pub(super) high: AtomicU64,
    /// Map entries below this are present; only grows.
    pub(super) map_present: AtomicU64,
    /// All below are hints: any value is right, and an audit finds better ones.
    pub(super) hints: Line<Hints>,
}

#[repr(C)]
pub(super) struct Hints {
    /// For each [`Kind`]: no bit is set in the groups below this one.
    pub(super) lowest: [AtomicU64; 2],
    /// Free pages that still have memory.
    pub(super) kept_pages: AtomicI64,
    /// How often a holder of the lock was found dead since the last audit.
    pub(super) suspicions: AtomicU64,
    /// The counter of deaths, as it was before the last audit.
    pub(super) deaths_seen: AtomicU64,
    /// The next audit is due when so many pages are in reach.
    pub(super) audit_at: AtomicU64,
}

/// Which free pages: of 64 pages, those that are likely free, and those of them that likely have memory. Hints, too: a bit is set after a page became
/// free, cleared when it is taken or was found not to be free, and never believed.
#[repr(C)]
pub(super) struct Bits(pub(super) [AtomicU64; 2]);

/// What a bit in [`Bits`] says of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Free,
    /// Free, and with memory.
    Kept,
}

/// Keeps what is written often apart from its neighbours.
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// What is known of a page.
#[repr(C)]
pub(super) struct Entry {
    /// Whose run begins here: see [`State`]. Zero in pages where none begins.
    pub(super) word: AtomicU64,
    /// See [`Info`].
    pub(super) info: AtomicU64,
    /// What the layer above says of the run that begins here.
    pub(super) note: AtomicU64,
}

const _: () = assert!(size_of::<Header>() <= 4096 && size_of::<Entry>() == 24);
const _: () = assert!(size_of::<Bits>() == 16);

/// What the word of a run says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Taking(OwnerId),
    Freeing(OwnerId),
    /// In use, with its length in pages.
    InUse(usize),
}

const KIND: u64 = 3 << 62;
const TAKING: u64 = 1 << 62;
const FREEING: u64 = 2 << 62;
const IN_USE: u64 = 3 << 62;

impl State {
    pub(super) const FREE: u64 = 0;

    pub(super) fn of(word: u64) -> State {
        let owner = OwnerId {
            index: (word & u64::from(OwnerId::INDEX_LIMIT - 1)) as u32,
            generation: (word >> 30) as u32,
        };
        match word & KIND {
            TAKING => State::Taking(owner),
            FREEING => State::Freeing(owner),
            IN_USE => State::InUse((word & !KIND) as usize),
            _ => State::Free,
        }
    }

    pub(super) fn word(self) -> u64 {
        // An index is below 2^30, or no lock could be taken under it: 62 bits.
        let pack = |owner: OwnerId| u64::from(owner.generation) << 30 | u64::from(owner.index);
        match self {
            State::Free => State::FREE,
            State::Taking(owner) => TAKING | pack(owner),
            State::Freeing(owner) => FREEING | pack(owner),
            State::InUse(page_count) => IN_USE | page_count as u64,
        }
    }
}

/// What else is known of a page. Where it belongs to a run, that holds of the place in it; whether it has memory always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Info(pub(super) u64);

impl Info {
    const NUMBER: u64 = 0xffff_ffff;
    const HEAD: u64 = 1 << 32;
    const INTERIOR: u64 = 1 << 33;
    const PRESENT: u64 = 1 << 40;

    /// The first of a run of `page_count` pages.
    pub(super) fn head(self, page_count: usize) -> Info {
        Info(self.0 & Info::PRESENT | Info::HEAD | page_count as u64)
    }

    /// The page at `distance` behind the first of its run.
    pub(super) fn interior(self, distance: usize) -> Info {
        Info(self.0 & Info::PRESENT | Info::INTERIOR | distance as u64)
    }

    /// The number of pages, if it is the first of a run.
    pub(super) fn page_count(self) -> Option<usize> {
        (self.0 & Info::HEAD != 0).then_some((self.0 & Info::NUMBER) as usize)
    }

    /// The distance to the first page, if it is another.
    pub(super) fn distance(self) -> Option<usize> {
        (self.0 & Info::INTERIOR != 0).then_some((self.0 & Info::NUMBER) as usize)
    }

    /// Whether the page has memory.
    pub(super) fn is_present(self) -> bool {
        self.0 & Info::PRESENT != 0
    }

    pub(super) fn with_present(self, is_present: bool) -> Info {
        match is_present {
            true => Info(self.0 | Info::PRESENT),
            false => Info(self.0 & !Info::PRESENT),
        }
    }
}

impl Entry {
    pub(super) fn state(&self) -> State {
        State::of(self.word.load(Ordering::Acquire))
    }

    pub(super) fn info(&self) -> Info {
        Info(self.info.load(Ordering::Acquire))
    }

    /// For the owner of the page only; of a free page that is the holder of the lock.
    pub(super) fn set_info(&self, info: Info) {
        self.info.store(info.0, Ordering::Release);
    }
}

/// Where things are, from the start of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) page_count: usize,
    pub(super) map_offset: usize,
    pub(super) bits_offset: usize,
    pub(super) data_offset: usize,
}

impl Geometry {
    /// As many pages as fit; `None` if not even one does.
    pub(super) fn of(max_len_bytes: usize, header_len_bytes: usize) -> Option<Geometry> {
        let map_offset = HEADER_OFFSET_BYTES
            .checked_add(header_len_bytes)?
            .checked_next_multiple_of(PAGE_BYTES)?;
        let room = max_len_bytes.checked_sub(map_offset)?;
        // The bits, and rounding up, cost a page, and one for each 16 GiB.
        let most = (room / (PAGE_BYTES + size_of::<Entry>())).min(PAGE_COUNT_MAX);
        (most.saturating_sub(2 + most / 200_000)..=most)
            .rev()
            .map(|page_count| Geometry::with(page_count, map_offset))
            .find(|it| it.page_count > 0 && it.end() <= max_len_bytes)
    }

    fn with(page_count: usize, map_offset: usize) -> Geometry {
        let map_end = map_offset + page_count * size_of::<Entry>();
        let bits_offset = map_end.next_multiple_of(size_of::<Bits>());
        let bits_end = bits_offset + page_count.div_ceil(GROUP_PAGES) * size_of::<Bits>();
        Geometry {
            page_count,
            map_offset,
            bits_offset,
            data_offset: bits_end.next_multiple_of(PAGE_BYTES),
        }
    }

    fn end(self) -> usize {
        self.data_offset + self.page_count * PAGE_BYTES
    }
}

impl PoolRef {
    pub(super) fn header(self) -> &'static Header {
        // SAFETY: in bounds: there is a header (invariant 1), aligned as its region; here and there: atomics only (invariant
        // 2); gone: mapped as long as it is used, and any values are valid.
        unsafe { self.0.as_ref() }
    }

    pub(super) fn hints(self) -> &'static Hints {
        &self.header().hints.0
    }

    /// How many pages there are, used or not.
    pub(super) fn page_count(self) -> usize {
        self.header().page_count.load(Ordering::Relaxed) as usize
    }

    /// Pages below were in use at some time. Garbage that a stray store left there is no reason to fall.
    pub(crate) fn high(self) -> usize {
        let high = self.header().high.load(Ordering::Acquire) as usize;
        high.min(self.page_count())
    }

    /// # Panics
    ///
    /// If there is no such page.
    pub(super) fn entry(self, page: usize) -> &'static Entry {
        assert!(page < self.page_count(), "no page {page}");
        let map_offset = self.header().map_offset.load(Ordering::Relaxed) as usize;
        let start = self.at().as_ptr();
        // SAFETY: in bounds by the assertion and invariant 1; the map begins at a multiple of 64 KiB, and entries are 24
        // bytes: aligned. The rest as for the header; the callers keep below `map_present` (invariant 3).
        unsafe { &*start.add(map_offset).cast::<Entry>().add(page) }
    }

    /// # Panics
    ///
    /// If there is no such group.
    pub(super) fn bits(self, group: usize) -> &'static Bits {
        let group_count = self.page_count().div_ceil(GROUP_PAGES);
        assert!(group < group_count, "no group {group}");
        let bits_offset = self.header().bits_offset.load(Ordering::Relaxed) as usize;
        let start = self.at().as_ptr();
        // SAFETY: as for an entry; they begin at a multiple of 16.
        unsafe { &*start.add(bits_offset).cast::<Bits>().add(group) }
    }

    /// The offset of a page from the start of the pool.
    pub(super) fn offset_of(self, page: usize) -> usize {
        self.header().data_offset.load(Ordering::Relaxed) as usize + page * PAGE_BYTES
    }

    /// The address of a page, which may be the one behind the last.
    pub(super) fn address_of(self, page: usize) -> NonNull<u8> {
        debug_assert!(page <= self.page_count(), "no page {page}");
        // SAFETY: in bounds of the region (invariant 1), or its end.
        unsafe { self.at().add(self.offset_of(page)) }
    }

    /// The page that the address lies in.
    pub(super) fn page_of(self, address: *const u8) -> Option<usize> {
        let data_offset = self.header().data_offset.load(Ordering::Relaxed) as usize;
        let offset = address.addr().checked_sub(self.address() + data_offset)?;
        let page = offset / PAGE_BYTES;
        (page < self.page_count()).then_some(page)
    }

    /// The start of the pool.
    pub(super) fn at(self) -> NonNull<u8> {
        self.0.cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_fits_into_the_length() {
        for len in [1 << 20, 400_000, 12_345_678, 16 << 30, 16 << 40] {
            for header_len in [0, 1, PAGE_BYTES, 100_000] {
                let geometry = Geometry::of(len, header_len).unwrap();
                assert!(geometry.map_offset >= HEADER_OFFSET_BYTES + header_len);
                let (pages, groups) = (geometry.page_count, geometry.page_count.div_ceil(64));
                assert!(geometry.bits_offset >= geometry.map_offset + pages * 24);
                assert!(geometry.data_offset >= geometry.bits_offset + groups * 16);
                assert!(geometry.bits_offset.is_multiple_of(16));
                assert!(geometry.end() <= len, "{len} {header_len}: {geometry:?}");
                let lost = len - geometry.page_count * PAGE_BYTES;
                assert!(lost < 6 * PAGE_BYTES + len / 2_000, "{len}: {lost}");
            }
        }
        assert_eq!(Geometry::of(0, 0), None);
        assert_eq!(Geometry::of(3 * PAGE_BYTES - 1, 0), None);
        assert_eq!(Geometry::of(1 << 20, usize::MAX - 5), None);
        assert_eq!(Geometry::of(3 * PAGE_BYTES, 0).unwrap().page_count, 1);
    }

    #[test]
    fn words_keep_apart() {
        let owners = [
            (0, 0),
            (OwnerId::INDEX_LIMIT - 1, u32::MAX),
            (7, 1),
            (1 << 29, 9),
        ];
        for (index, generation) in owners {
            let owner = OwnerId { index, generation };
            for state in [State::Taking(owner), State::Freeing(owner)] {
                assert_eq!(State::of(state.word()), state);
            }
        }
        for page_count in [1, 1 << 20, PAGE_COUNT_MAX] {
            let state = State::InUse(page_count);
            assert_eq!(State::of(state.word()), state);
        }
        assert_eq!(State::of(State::FREE), State::Free);
        let present = Info(0).with_present(true);
        assert_eq!(present.head(7).page_count(), Some(7));
        assert_eq!(present.head(7).distance(), None);
        let interior = present.head(7).interior(3);
        assert_eq!(
            (interior.distance(), interior.page_count()),
            (Some(3), None)
        );
        assert!(interior.is_present() && !interior.with_present(false).is_present());
    }
}

//! Runs of pages in a region, which grows as they are taken and gives memory back as they are freed.
//!
//! **Protocol.** A pool is a header, an area for the layer above, a map, and pages of 64 KiB. A *run* is pages that follow each other. The word of
//! its first page, in the map, is the truth about it; only its stores and swaps take a run or free it.
//!
//! | word | means | the owner that it names died |
//! |---|---|---|
//! | 0 | no run begins here | – |
//! | taking, owner | the owner makes the run's memory present; nobody has its address yet | whoever finds it makes it freeing, by one CAS, and goes on as below |
//! | in use, length | somebody has it; all its pages are present | it names none: the note may, for the layer above |
//! | freeing, owner | the owner gives the memory back | whoever finds it makes itself the owner, by one CAS, and does all of it again |
//!
//! * To take: under the lock, search the map, describe the pages, store *taking*. Outside of the lock, make present what is missing;
//!   store *in use*.
//! * To free: CAS in use → 0, if little free memory lies about; else CAS in use → freeing, punch, store 0. No lock, so nobody waits to free,
//!   whoever has died.
//! * Each run has a *note*, a word for the layer above, set before the run is in use. So a run whose taker died before it told anybody is
//!   found by its note.
//! * An *audit* looks for runs of the dead, and puts the hints right. It is due when the lock was a dead one's, when the counter of deaths has
//!   changed, before the pool says that it is full, and when it has grown by a quarter.
//!
//! **Pages** are 64 KiB. A layer that divides runs of one page into small blocks then finds its page header by masking an address, has room for a
//! thousand blocks of 64 bytes behind it, and the map costs 24 bytes for each, 0.04 %. Of 4 KiB the map would be sixteen times as long to
//! search, and a block of 2 KiB would waste half a page for its header; of 2 MiB a process that uses each size once would take 60 MiB.
//!
//! **Memory.** Up to 16 MiB of free pages, or a sixteenth of what was ever in use if that is more, keep their memory: to take a page of fresh memory
//! takes some hundred times as long. They are taken first. When the system has no memory for a run, they are given back and it is tried
//! again. In a region with a name, which must be opened to grow, up to seven pages behind a short run are made present with it, and kept.
//!
//! **Invariants.**
//! 1. A page belongs to a run if the word of the run's first page is not 0 and the run is long enough to reach it. Pages that
//!    belong to nothing are free, whatever else is written about them.
//! 2. What is written about a page is changed by the owner of its run; of a free page, by the holder of the lock.
//! 3. A page that is marked present has memory. All pages of a run in use are.
//! 4. `layout::Hints` and `layout::Bits` are hints: where to look first. What they say is checked in the map before it is used, and what they do
//!    not say is found by an audit.
//! 5. No system call is made under the lock, but those of waiting for it.
//!
//! **If a process dies here.** Holding the lock: its pages are described and free, or it was taking; nothing has to be undone. Elsewhere: the table.
//! A run that it had is in use until the layer above frees it.
//!
//! **Not here.** Blocks smaller than a page, and whose a run is: the [heap](crate::heap). Who creates and unlinks the region.
//!
//! # Safety
//!
//! The header and the map are reached through `layout` only. The pages are never touched here: a run is given back to the system while it
//! belongs to whoever does so, after its user has promised not to use it any more.

#![allow(unsafe_code)]

mod layout;
mod runs;
mod search;
mod verify;

pub use verify::PoolStats;

use crate::error::{Error, Result};
use crate::{Arena, Region, ShmSafe, region_of};
use layout::{Geometry, HEADER_OFFSET_BYTES, Header, MAGIC, PAGE_BYTES, State};
use netmcore_sys::crash_point;
use std::fmt;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages made present at a time in a region with a name, half a MiB: it has to be opened for that, which costs half as much as the memory of
/// one page. By address it costs nothing extra.
const NAMED_STEP_PAGES: usize = 8;

/// Runs of pages in a region: a handle of this process. Clones are the same pool, in forked children too. What can be done with it stands at
/// [`PoolRef`].
///
/// No semaphores belong to it (the ancestor's pools had a `sem_container`): its lock lies in its own memory. Its name is that
/// of its [region](Self::region). It is gone when its region is: [`ShmObject::unlink`](crate::ShmObject::unlink).
///
/// ```
/// use netmcore_shm::{Arena, Error, PagePool};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let pool = PagePool::anonymous(&arena, 64 << 20, 0)?;
/// let run = pool.alloc_run(3)?;
/// // SAFETY: the run is ours and so long.
/// unsafe { run.write_bytes(7, 3 * PagePool::PAGE_BYTES) };
/// assert_eq!(pool.run_len_bytes(run.as_ptr()), Some(3 * PagePool::PAGE_BYTES));
/// // SAFETY: it is not used any more.
/// unsafe { pool.free_run(run) }?;
/// assert_eq!(pool.stats().in_use_bytes, 0);
/// assert!(matches!(pool.alloc_run(1 << 20), Err(Error::OutOfPoolMemory { .. })));
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Clone)]
#[doc(alias = "Netmcore_mempool")]
#[doc(alias = "sem_container")]
#[doc(alias = "unlink_mempool")]
pub struct PagePool {
    pool: PoolRef,
    region: Region,
}

/// A pool, as those who live in it see it: the address of its header. Plain data of 8 bytes, valid wherever the pool is mapped.
///
/// It does not keep the pool mapped: regions stay mapped until the process ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PoolRef(NonNull<Header>);

/// A run in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first address, a multiple of [`PagePool::PAGE_BYTES`].
    pub at: NonNull<u8>,
    /// The length in bytes, a multiple of [`PagePool::PAGE_BYTES`].
    pub len_bytes: usize,
    /// What the layer above says of it.
    pub note: u64,
}

// SAFETY: an address of memory that all threads have; only atomics of the header and the map are used.
unsafe impl Send for PoolRef {}
// SAFETY: as for Send.
unsafe impl Sync for PoolRef {}
// SAFETY: an address that is the same, and mapped, wherever the pool's region is; it reports it.
unsafe impl ShmSafe for PoolRef {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        visit(self.0.as_ptr().cast());
    }
}

impl PagePool {
    /// The length of a page of a pool, 64 KiB, whatever the system's is. Runs begin and end at multiples of it.
    pub const PAGE_BYTES: usize = PAGE_BYTES;

    /// Makes a pool of at most `max_len_bytes` for this process and those that it forks. It takes memory as it is used.
    ///
    /// # Errors
    ///
    /// [`Error::ArenaFull`]; otherwise as [`create`](Self::create).
    pub fn anonymous(
        arena: &Arena,
        max_len_bytes: usize,
        header_len_bytes: usize,
    ) -> Result<PagePool> {
        let region = Region::anonymous(arena, c"netmcore-pool", max_len_bytes)?;
        PagePool::create(&region, header_len_bytes)
    }

    /// Makes a pool in a region that is new and has no other use, of the region's maximum length. It takes memory as it is used. Other
    /// processes [attach](Self::attach) to it.
    ///
    /// `header_len_bytes` at [`PoolRef::header_at`] are for the layer above: present, and zeros at first.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] if there is no room for a single page; [`Error::NoSpace`] if there is no memory for the headers.
    ///
    /// # If a process dies
    ///
    /// It is a pool or not; if not, it may be created again.
    #[doc(alias = "Netmcore_mempool.create_mempool")]
    pub fn create(region: &Region, header_len_bytes: usize) -> Result<PagePool> {
        let max_len_bytes = region.max_len_bytes();
        let Some(geometry) = Geometry::of(max_len_bytes, header_len_bytes) else {
            return Err(Error::OutOfPoolMemory {
                wanted_bytes: (3 * PAGE_BYTES).saturating_add(header_len_bytes) as u64,
                free_bytes: max_len_bytes as u64,
                largest_free_bytes: max_len_bytes as u64,
            });
        };
        region.ensure(0, size_of::<Header>() as u64)?;
        region.ensure(HEADER_OFFSET_BYTES as u64, header_len_bytes as u64)?;
        let pool = PoolRef::of_region(region);
        let header = pool.header();
        let step_pages = match region.name() {
            Some(_) => NAMED_STEP_PAGES,
            None => 1,
        };
        for (word, value) in [
            (&header.max_len_bytes, max_len_bytes),
            (&header.header_len_bytes, header_len_bytes),
            (&header.page_count, geometry.page_count),
            (&header.map_offset, geometry.map_offset),
            (&header.bits_offset, geometry.bits_offset),
            (&header.data_offset, geometry.data_offset),
            (&header.step_pages, step_pages),
        ] {
            word.store(value as u64, Ordering::Relaxed);
        }
        crash_point!("shm.pool.created");
        // The commit.
        header.magic.store(MAGIC, Ordering::Release);
        Ok(PagePool {
            pool,
            region: region.clone(),
        })
    }

    /// The pool that was made in the region.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`] if there is none, or its creation was not finished; otherwise as [`Region::len_bytes`].
    pub fn attach(region: &Region) -> Result<PagePool> {
        let pool = PoolRef::of_region(region);
        let mismatch = |found| {
            Err(Error::FormatMismatch {
                object: format!("the page pool in {}", region.id()),
                expected: MAGIC,
                found,
            })
        };
        if region.len_bytes()? < size_of::<Header>() as u64 {
            return mismatch(0);
        }
        let header = pool.header();
        let found = header.magic.load(Ordering::Acquire);
        if found != MAGIC {
            return mismatch(found);
        }
        // Of the same program or another of the same format: but a stray write must not make us reach out of the mapping.
        let claims = |word: &AtomicU64| word.load(Ordering::Relaxed) as usize;
        let geometry = Geometry::of(
            claims(&header.max_len_bytes),
            claims(&header.header_len_bytes),
        );
        let is_sound = claims(&header.max_len_bytes) == region.max_len_bytes()
            && geometry.is_some_and(|geometry| {
                geometry.page_count == claims(&header.page_count)
                    && geometry.map_offset == claims(&header.map_offset)
                    && geometry.bits_offset == claims(&header.bits_offset)
                    && geometry.data_offset == claims(&header.data_offset)
            });
        if !is_sound {
            return mismatch(found);
        }
        Ok(PagePool {
            pool,
            region: region.clone(),
        })
    }

    /// The region that it lies in, whose name is the pool's.
    #[doc(alias = "Netmcore_mempool.shm_name")]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What those who live in this pool take as their handle.
    pub fn pool(&self) -> PoolRef {
        self.pool
    }
}

impl Deref for PagePool {
    type Target = PoolRef;

    fn deref(&self) -> &PoolRef {
        &self.pool
    }
}

impl fmt::Debug for PagePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagePool")
            .field("region", &self.region)
            .field("stats", &self.stats())
            .finish()
    }
}

impl PoolRef {
    /// Takes `page_count` pages that follow each other. Their contents are whatever was there; zeros, if nobody ever had them. They are present: to
    /// touch them is no bus error.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] if the pool has no such run; [`Error::NoSpace`] if the system has not the memory; [`Error::NoRegion`] if
    /// the pool's region is not mapped here as a [`Region`]; otherwise as [`Region::ensure`]. Nothing is taken then, and all that was stored stays.
    ///
    /// # Panics
    ///
    /// If `page_count` is 0.
    ///
    /// # If a process dies
    ///
    /// The run is free, or it will be found to be; or it is in use, and its note is 0.
    ///
    /// # Blocking
    ///
    /// For a lock that is held for microseconds: if its holder is stopped or dying, until that is over. While the kernel
    /// clears the memory.
    #[doc(alias = "Netmcore_mempool.alloc_mem")]
    pub fn alloc_run(self, page_count: usize) -> Result<NonNull<u8>> {
        self.alloc_run_noted(page_count, 0)
    }

    /// As [`alloc_run`](Self::alloc_run), with a note that is there as soon as the run is in use. If the note says whose the run is, nothing
    /// is lost with a process that dies before it has stored the address: see [`runs`](Self::runs).
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn alloc_run_noted(self, page_count: usize, note: u64) -> Result<NonNull<u8>> {
        assert!(page_count > 0, "a run has at least one page");
        if page_count > self.page_count() {
            self.audit();
            return Err(self.out_of_pool_memory(page_count));
        }
        match self.try_alloc(page_count, note) {
            // Other free pages may have the memory that is missing.
            Err(Error::NoSpace { .. }) if self.trim() > 0 => self.try_alloc(page_count, note),
            done => done,
        }
    }

    fn try_alloc(self, page_count: usize, note: u64) -> Result<NonNull<u8>> {
        let taken = self.take(page_count, note)?;
        crash_point!("shm.pool.taken");
        if let Err(error) = self.make_present(taken, page_count) {
            self.finish_freeing(taken.page);
            return Err(error);
        }
        // The commit, and the last step: who dies before it has taken nothing.
        let word = &self.entry(taken.page).word;
        word.store(State::InUse(page_count).word(), Ordering::Release);
        Ok(self.address_of(taken.page))
    }

    /// Frees a run. Any process and thread may do so.
    ///
    /// # Errors
    ///
    /// [`Error::BadRun`] if no run in use begins there. Nothing is changed then.
    ///
    /// # Safety
    ///
    /// - Nobody uses the run any more, in any process.
    ///
    /// # If a process dies
    ///
    /// The run is in use, or free, or it will be found to be.
    ///
    /// # Blocking
    ///
    /// Never for another process. Giving memory back takes time, some 50 ms for 1 GiB.
    #[doc(alias = "Netmcore_mempool.free_mem")]
    pub unsafe fn free_run(self, at: NonNull<u8>) -> Result<()> {
        let bad = |why| {
            Err(Error::BadRun {
                address: at.as_ptr().addr(),
                why,
            })
        };
        let Some(page) = self.first_page(at.as_ptr()) else {
            return bad("no run begins there");
        };
        let word = self.entry(page).word.load(Ordering::Acquire);
        let State::InUse(page_count) = State::of(word) else {
            return bad("no run in use begins there");
        };
        if self.release(page, page_count) {
            Ok(())
        } else {
            bad("somebody else has just freed it")
        }
    }

    /// The length in bytes of the run that begins at `at`; `None` if no run in use does.
    #[doc(alias = "Netmcore_mempool.size_mem")]
    pub fn run_len_bytes(self, at: *const u8) -> Option<usize> {
        match self.entry(self.first_page(at)?).state() {
            State::InUse(page_count) => Some(page_count * PAGE_BYTES),
            _ => None,
        }
    }

    /// The run that the address lies in; `None` if that is not in use. True for as long as nobody frees the run.
    #[doc(alias = "Netmcore_mempool.size_mem_at_addr")]
    pub fn run_at(self, address: *const u8) -> Option<Run> {
        let page = self.page_of(address).filter(|&page| page < self.high())?;
        let head = match self.entry(page).state() {
            State::Free => page.checked_sub(self.entry(page).info().distance()?)?,
            _ => page,
        };
        self.run(head)
            .filter(|run| page - head < run.len_bytes / PAGE_BYTES)
    }

    /// The note of the run that begins at `at`, to read and to change; `None` if no run in use does.
    ///
    /// Nobody else changes it until the run is freed. Later it is another's: who does not have the run swaps only what it has read
    /// for what cannot be there then.
    pub fn note(self, at: *const u8) -> Option<&'static AtomicU64> {
        let entry = self.entry(self.first_page(at)?);
        matches!(entry.state(), State::InUse(_)).then_some(&entry.note)
    }

    /// All runs in use, in the order of their addresses. Of those that are taken and freed meanwhile it may show any.
    pub fn runs(self) -> impl Iterator<Item = Run> {
        self.runs_among(0..usize::MAX)
    }

    /// As [`runs`](Self::runs), those that begin with one of these pages. Each page is looked at, or skipped with its run.
    pub(crate) fn runs_among(self, pages: Range<usize>) -> impl Iterator<Item = Run> {
        let mut page = pages.start;
        std::iter::from_fn(move || {
            while page < self.high().min(pages.end) {
                let run = self.run(page);
                page += run.map_or(1, |run| run.len_bytes / PAGE_BYTES);
                if run.is_some() {
                    return run;
                }
            }
            None
        })
    }

    /// Frees the runs that processes were taking or freeing when they died, and says how many. Allocation does it by itself, in time; a supervisor
    /// may call it after a death. What the dead had in use stays.
    ///
    /// # If a process dies
    ///
    /// The rest is left to the next call.
    ///
    /// # Blocking
    ///
    /// Never for another process.
    pub fn reclaim_dead(self) -> usize {
        self.audit()
    }

    /// Gives the memory of free pages back to the system, and says how many bytes.
    ///
    /// # Blocking
    ///
    /// As [`alloc_run`](Self::alloc_run).
    pub fn trim(self) -> u64 {
        self.give_back_kept()
    }

    /// Where the area of the layer above begins: 64 KiB behind the start of the pool.
    pub fn header_at(self) -> NonNull<u8> {
        // SAFETY: in bounds of the pool.
        unsafe { self.at().add(HEADER_OFFSET_BYTES) }
    }

    /// The pool of the area that begins at `at`.
    ///
    /// # Safety
    ///
    /// - It is what [`header_at`](Self::header_at) has told.
    pub(crate) unsafe fn of_header_at(at: NonNull<u8>) -> PoolRef {
        // SAFETY: in bounds of the pool.
        PoolRef(unsafe { at.sub(HEADER_OFFSET_BYTES) }.cast())
    }

    /// The length of that area, as [`PagePool::create`] was told.
    pub fn header_len_bytes(self) -> usize {
        self.header().header_len_bytes.load(Ordering::Relaxed) as usize
    }

    /// Whether the address lies in the pool's range, in use or not.
    pub fn contains(self, address: *const u8) -> bool {
        let offset = address.addr().wrapping_sub(self.address());
        (offset as u64) < self.header().max_len_bytes.load(Ordering::Relaxed)
    }

    /// The address of the pool, which names it.
    pub fn address(self) -> usize {
        self.0.as_ptr().addr()
    }

    /// The pool at `address`, as another process has sent it.
    ///
    /// # Safety
    ///
    /// - It is an [`address`](Self::address) of a pool that this process has mapped.
    pub unsafe fn from_address(address: usize) -> Option<PoolRef> {
        let at = NonNull::new(std::ptr::with_exposed_provenance_mut(address))?;
        Some(PoolRef(at))
    }

    fn of_region(region: &Region) -> PoolRef {
        let at = NonNull::new(region.at().cast());
        PoolRef(at.expect("a region does not lie at the null address"))
    }

    /// The region around it, known to this process.
    fn region(self) -> Result<Region> {
        let at = self.at().as_ptr();
        region_of(at).ok_or(Error::NoRegion {
            id: crate::RegionId(at.addr() as u64),
        })
    }

    /// The page that begins at the address and was in use at some time.
    fn first_page(self, at: *const u8) -> Option<usize> {
        let page = self.page_of(at).filter(|&page| page < self.high())?;
        (self.address_of(page).as_ptr().cast_const() == at).then_some(page)
    }

    /// The run in use that begins with the page.
    fn run(self, page: usize) -> Option<Run> {
        let entry = self.entry(page);
        match entry.state() {
            State::InUse(page_count) => Some(Run {
                at: self.address_of(page),
                len_bytes: page_count * PAGE_BYTES,
                note: entry.note.load(Ordering::Acquire),
            }),
            _ => None,
        }
    }
}

impl fmt::Debug for PoolRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolRef({:p})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> PagePool {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        PagePool::anonymous(&arena, 64 << 20, 100).unwrap()
    }

    fn free(pool: &PagePool, run: NonNull<u8>) {
        // SAFETY: the test's, and not used any more.
        unsafe { pool.free_run(run) }.unwrap();
    }

    #[test]
    fn hints_may_be_anything() {
        let pool = pool();
        let kept = pool.alloc_run(7).unwrap();
        let garbage = [0, 1, 5, 0xffff, 1 << 40, u64::MAX, 0x5555_5555_5555_5555];
        for &value in garbage.iter().cycle().take(14) {
            let hints = pool.hints();
            for word in [
                &hints.lowest[0],
                &hints.lowest[1],
                &hints.suspicions,
                &hints.deaths_seen,
                &hints.audit_at,
            ] {
                word.store(value, Ordering::Relaxed);
            }
            hints.kept_pages.store(value as i64, Ordering::Relaxed);
            for group in 0..pool.high().div_ceil(layout::GROUP_PAGES) {
                for bits in &pool.bits(group).0 {
                    bits.store(value, Ordering::Relaxed);
                }
            }
            let runs = [1, 3, 1, 100, 300].map(|page_count| pool.alloc_run(page_count).unwrap());
            assert_eq!(pool.stats().in_use_bytes, (412 * PAGE_BYTES) as u64);
            pool.verify().unwrap();
            for run in runs {
                free(&pool, run);
            }
            let all = pool.stats().largest_free_bytes as usize / PAGE_BYTES;
            free(&pool, pool.alloc_run(all).unwrap());
            assert_eq!(pool.stats().in_use_runs, 1);
            assert!(pool.alloc_run(all + 1).is_err());
        }
        free(&pool, kept);
        pool.verify().unwrap();
    }

    #[test]
    fn bits_that_somebody_sets_late_give_nothing_out_twice() {
        let pool = pool();
        let runs = [1, 2, 1].map(|page_count| pool.alloc_run(page_count).unwrap());
        // As by one who has freed the pages before they were taken, and was stopped until now.
        pool.note_free(0, 4, true);
        pool.hints().kept_pages.store(4, Ordering::Relaxed);
        let next = [1, 2].map(|page_count| pool.alloc_run(page_count).unwrap());
        pool.verify().unwrap();
        assert_eq!(pool.stats().in_use_bytes, (7 * PAGE_BYTES) as u64);
        for run in runs.into_iter().chain(next) {
            free(&pool, run);
        }
        assert_eq!(pool.stats().in_use_runs, 0);
    }

    #[test]
    #[should_panic(expected = "at least one page")]
    fn run_of_nothing_panics() {
        let _ = pool().alloc_run(0);
    }
}

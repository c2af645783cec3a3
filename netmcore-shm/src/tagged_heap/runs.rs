//! Runs of pages: taking them under the lock, freeing them without, and what the next holder of the lock repairs.
//!
//! **Protocol** and **invariants**: those of [`tagged_heap`](super). Searching and committing happen under the lock, so there is one
//! taker at a time; meanwhile others may free, which only makes more pages free.
//!
//! **If a process dies here.** Describing pages before the commit: they stay free, because the word of the first is
//! still 0, and no page of another run was touched. Retiring a chunk: [`TaggedHeap::recover`] undoes the claims.
//!
//! # Safety
//!
//! One call gives memory back; it is made while the pages belong to the caller.

#![allow(unsafe_code)]

use super::layout::{BUCKETS, Entry, Info, PAGE_BYTES, truth};
use super::{TaggedHeap, no_memory, size_class};
use crate::error::{Error, Result};
use netmcore_sem::{LockGuard, Owners};
use netmcore_sys::crash_point;
use std::sync::atomic::{AtomicU64, Ordering};

/// Free pages that may keep their memory, 16 MiB: what was used will be used again, and fresh memory is dear (2.3 µs for
/// each 4 KiB).
const KEPT_MAX_PAGES: i64 = 256;
/// With fewer chunks than this it is not worth looking for empty ones: 4 MiB.
const SWEEP_MIN_CHUNKS: u64 = 64;

/// What a run is taken for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    Block,
    Chunk,
}

/// Where a run was found.
struct Found {
    page: usize,
    /// No run of the bucket's length begins below this.
    lowest: usize,
}

impl TaggedHeap {
    /// Takes a run of pages for `tag` and returns the first.
    pub(super) fn take_run<O: Owners + ?Sized>(
        &self,
        page_count: usize,
        tag: u64,
        owners: &O,
        purpose: For,
    ) -> Result<usize> {
        let guard = self.lock(owners);
        let hints = self.hints();
        if purpose == For::Chunk {
            let sweep_at = hints.sweep_at.load(Ordering::Relaxed).max(SWEEP_MIN_CHUNKS);
            if hints.chunk_count.fetch_add(1, Ordering::Relaxed) >= sweep_at {
                self.sweep();
            }
        }
        let bucket = bucket_of(page_count);
        let hint = hints.lowest[bucket].load(Ordering::Acquire);
        let found = self
            .find(page_count, bucket, hint as usize)
            .or_else(|| self.find(page_count, bucket, 0))
            .or_else(|| {
                self.sweep();
                self.find(page_count, bucket, 0)
            });
        let Some(Found { page, lowest }) = found else {
            drop(guard);
            return Err(self.out_of_pool_memory(page_count * PAGE_BYTES));
        };
        let end = page + page_count;
        self.view
            .populate_map(end)
            .map_err(|error| no_memory(page_count * size_of::<Entry>(), error))?;
        let high = &self.view.header().high;
        if high.load(Ordering::Relaxed) < end as u64 {
            high.store(end as u64, Ordering::Release);
            crash_point!("shm.tagged_heap.high_raised");
        }
        let mut kept_pages = 0;
        for distance in 0..page_count {
            let entry = self.view.entry(page + distance);
            let info = entry.info();
            kept_pages += i64::from(info.has(Info::PRESENT));
            entry.set_info(match distance {
                0 => info.head(page_count),
                _ => info.interior(distance),
            });
            if distance < 2 {
                crash_point!("shm.tagged_heap.describing");
            }
        }
        // The commit.
        self.view.entry(page).truth.store(tag, Ordering::Release);
        crash_point!("shm.tagged_heap.run_committed");
        hints.kept_pages.fetch_sub(kept_pages, Ordering::Relaxed);
        // Unless somebody has freed below in the meantime.
        let _ = hints.lowest[bucket].compare_exchange(
            hint,
            lowest as u64,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        drop(guard);
        Ok(page)
    }

    /// Frees the run that begins at `page` if it is the tag's.
    pub(super) fn free_run(&self, page: usize, tag: u64) -> bool {
        let word = &self.view.entry(page).truth;
        let change = |to| {
            word.compare_exchange(tag, to, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        if word.load(Ordering::Acquire) != tag {
            return false;
        }
        if let Some(kept) = self.may_keep(page) {
            let freed = change(truth::FREE);
            if freed {
                crash_point!("shm.tagged_heap.run_freed");
                self.hints().kept_pages.fetch_add(kept, Ordering::Relaxed);
                self.lower_hints(page);
            }
            return freed;
        }
        // One of those who free it at the same time wins the right to give its memory back.
        let freed = change(tag | truth::FREEING);
        if freed {
            crash_point!("shm.tagged_heap.freeing");
            self.finish_freeing(page);
        }
        freed
    }

    /// Gives the memory of a run back that is being freed, and frees it. For whoever set the mark, or follows a dead one.
    pub(super) fn finish_freeing(&self, page: usize) {
        let entry = self.view.entry(page);
        let page_count = self.pages_of_run(page);
        // In this order: a page that is marked has memory.
        self.mark_present(page, page_count, false);
        crash_point!("shm.tagged_heap.unmarked");
        // SAFETY: the run is being freed, by us alone: its user has given it up, and nobody is given it before the store below.
        // Where the system cannot (it always can on memory files), the memory is just kept.
        let _ = unsafe { self.view.remove_data(page, page_count) };
        crash_point!("shm.tagged_heap.removed");
        entry.truth.store(truth::FREE, Ordering::Release);
        crash_point!("shm.tagged_heap.removed_and_freed");
        self.lower_hints(page);
    }

    pub(super) fn mark_present(&self, page: usize, page_count: usize, present: bool) {
        for page in page..page + page_count {
            let entry = self.view.entry(page);
            let info = entry.info().0;
            entry.set_info(Info(if present {
                info | Info::PRESENT
            } else {
                info & !Info::PRESENT
            }));
        }
    }

    /// The number of pages, if the run that begins at `page` is wholly present and may stay so when it is free.
    fn may_keep(&self, page: usize) -> Option<i64> {
        let page_count = self.pages_of_run(page);
        let kept = self.hints().kept_pages.load(Ordering::Relaxed).max(0);
        if page_count as i64 > KEPT_MAX_PAGES - kept.min(KEPT_MAX_PAGES) {
            return None;
        }
        let present = |page| self.view.entry(page).info().has(Info::PRESENT);
        (page..page + page_count)
            .all(present)
            .then_some(page_count as i64)
    }

    /// The length of the run whose first page this is: at least 1, and inside the heap.
    fn pages_of_run(&self, page: usize) -> usize {
        let page_count = self.view.entry(page).info().page_count().unwrap_or(1);
        page_count.clamp(1, self.view.page_count() - page)
    }

    /// Hints that there are free pages from `page` on.
    fn lower_hints(&self, page: usize) {
        for lowest in &self.hints().lowest {
            if lowest.load(Ordering::Relaxed) > page as u64 {
                lowest.fetch_min(page as u64, Ordering::AcqRel);
            }
        }
    }

    /// Takes the lock, and repairs what a dead holder left.
    fn lock<O: Owners + ?Sized>(&self, owners: &O) -> LockGuard<'_> {
        match self.view.header().lock.0.lock(owners) {
            Ok(guard) => guard,
            Err(died) => {
                self.recover();
                died.guard
            }
        }
    }

    /// Finds the lowest run of free pages that is long enough, from page `from` on. Under the lock.
    fn find(&self, page_count: usize, bucket: usize, from: usize) -> Option<Found> {
        let (high, all) = (self.high(), self.view.page_count());
        let mut lowest = None;
        let mut start = from.min(high);
        let mut page = start;
        let found = loop {
            if page - start >= page_count {
                break start;
            }
            if page - start >= BUCKETS[bucket] {
                lowest.get_or_insert(start);
            }
            if page >= high {
                // What is above was never used: free.
                if page_count > all - start {
                    return None;
                }
                break start;
            }
            match self.run_over(page) {
                Some(end) => {
                    page = end;
                    start = end;
                }
                None => page += 1,
            }
        };
        Some(Found {
            page: found,
            lowest: match lowest {
                Some(lowest) if lowest < found => lowest,
                _ => found + page_count,
            },
        })
    }

    /// If the page belongs to a run, the end of that run (invariant 1). Under the lock.
    pub(super) fn run_over(&self, page: usize) -> Option<usize> {
        let info = self.view.entry(page).info();
        let head = page.checked_sub(info.distance().unwrap_or(0))?;
        let entry = self.view.entry(head);
        let in_use = entry.truth.load(Ordering::Acquire) != truth::FREE;
        let end = head + entry.info().page_count()?;
        (in_use && end > page).then_some(end)
    }

    /// Looks at all chunks: frees those that are empty and flags those that have room. Under the lock.
    fn sweep(&self) {
        let hints = self.hints();
        let mut flagged = [0; size_class::COUNT];
        let mut chunk_count = 0;
        for page in 0..self.high() {
            let entry = self.view.entry(page);
            let Some(class) = truth::class_of_chunk(entry.truth.load(Ordering::Acquire)) else {
                continue;
            };
            let words = &self.view.row(page)[..size_class::blocks_in_page(class)];
            let is_free = |word: &AtomicU64| word.load(Ordering::Relaxed) == truth::FREE;
            if words.iter().all(is_free) && self.retire(page) {
                continue;
            }
            chunk_count += 1;
            if words.iter().any(is_free) {
                entry.info.fetch_or(Info::FLAGGED, Ordering::Relaxed);
                flagged[class] += 1;
            }
        }
        for (hint, count) in hints.flagged.iter().zip(flagged) {
            hint.store(count, Ordering::Relaxed);
        }
        hints.chunk_count.store(chunk_count, Ordering::Relaxed);
        hints.sweep_at.store(2 * chunk_count, Ordering::Relaxed);
    }

    /// Frees the chunk if all its blocks are free. Under the lock.
    fn retire(&self, page: usize) -> bool {
        let entry = self.view.entry(page);
        let words = &self.view.row(page)[..entry.info().row_words()];
        for (index, word) in words.iter().enumerate() {
            let claimed = word.compare_exchange(
                truth::FREE,
                truth::RETIRING,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if claimed.is_err() {
                unclaim(&words[..index]);
                return false;
            }
            if index == 0 {
                crash_point!("shm.tagged_heap.retiring");
            }
        }
        crash_point!("shm.tagged_heap.claimed_all");
        // Every word is ours, so nobody can take a block: the page is ours.
        let hints = self.hints();
        let keep = hints.kept_pages.load(Ordering::Relaxed) < KEPT_MAX_PAGES;
        if keep {
            hints.kept_pages.fetch_add(1, Ordering::Relaxed);
        } else {
            self.mark_present(page, 1, false);
            crash_point!("shm.tagged_heap.retired_unmarked");
            // SAFETY: the page is ours, and no block of it is in use.
            let _ = unsafe { self.view.remove_data(page, 1) };
        }
        // The commit. Before the claims go: who takes a word of them sees this.
        entry.truth.store(truth::FREE, Ordering::Release);
        crash_point!("shm.tagged_heap.retired");
        unclaim(words);
        self.lower_hints(page);
        true
    }

    /// Repairs what a holder of the lock left when it died. Under the lock; may be repeated.
    fn recover(&self) {
        let mut kept_pages = 0;
        for page in 0..self.high() {
            let info = self.view.entry(page).info();
            unclaim(&self.view.row(page)[..info.row_words()]);
            let is_kept = info.has(Info::PRESENT) && self.run_over(page).is_none();
            kept_pages += i64::from(is_kept);
        }
        crash_point!("shm.tagged_heap.unclaimed");
        let hints = self.hints();
        hints.kept_pages.store(kept_pages, Ordering::Relaxed);
        for lowest in &hints.lowest {
            lowest.store(0, Ordering::Relaxed);
        }
        self.sweep();
    }

    pub(super) fn out_of_pool_memory(&self, wanted_bytes: usize) -> Error {
        let (free_bytes, largest_free_bytes) = self.free_space();
        Error::OutOfPoolMemory {
            wanted_bytes: wanted_bytes as u64,
            free_bytes,
            largest_free_bytes,
        }
    }
}

/// Gives up claims on block words (invariant 3).
fn unclaim(words: &[AtomicU64]) {
    for word in words {
        if word.load(Ordering::Relaxed) == truth::RETIRING {
            word.store(truth::FREE, Ordering::Release);
        }
    }
}

fn bucket_of(page_count: usize) -> usize {
    BUCKETS
        .iter()
        .rposition(|&least| least <= page_count)
        .unwrap_or(0)
}

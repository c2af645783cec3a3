//! Walks over the whole heap: statistics, and the check of its invariants.

use super::layout::{Entry, Info, PAGE_BYTES, ROW_WORDS, truth};
use super::{TaggedHeap, size_class};
use crate::error::Corrupt;
use netmcore_sys::map::page_size;
use std::sync::atomic::Ordering;

/// What a heap holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStats {
    /// Bytes that blocks in use occupy, rounded up to their classes and pages.
    pub in_use_bytes: u64,
    /// Blocks in use.
    pub in_use_blocks: u64,
    /// Bytes of memory taken from the system: blocks in use, kept free pages, bookkeeping.
    pub committed_bytes: u64,
    /// Bytes that blocks can occupy at most.
    pub max_bytes: u64,
}

impl TaggedHeap {
    /// Counts what is in use. While others allocate and free, the figures are of no single moment.
    pub fn stats(&self) -> HeapStats {
        let mut stats = HeapStats {
            max_bytes: (self.view.page_count() * PAGE_BYTES) as u64,
            ..HeapStats::default()
        };
        let map_entries = self.view.header().map_present.load(Ordering::Acquire);
        let map_bytes = map_entries as usize * size_of::<Entry>();
        stats.committed_bytes = (page_size() + map_bytes.next_multiple_of(page_size())) as u64;
        for page in 0..self.high() {
            let entry = self.view.entry(page);
            let (word, info) = (entry.truth.load(Ordering::Acquire), entry.info());
            stats.committed_bytes += info.row_words() as u64 * 8;
            if info.has(Info::PRESENT) {
                stats.committed_bytes += PAGE_BYTES as u64;
            }
            if let Some(class) = truth::class_of_chunk(word) {
                let words = &self.view.row(page)[..size_class::blocks_in_page(class)];
                let in_use = |word: u64| truth::is_tag(word);
                let blocks = words
                    .iter()
                    .filter(|word| in_use(word.load(Ordering::Relaxed)));
                let blocks = blocks.count() as u64;
                stats.in_use_blocks += blocks;
                stats.in_use_bytes += blocks * size_class::size(class) as u64;
            } else if word != truth::FREE {
                stats.in_use_blocks += 1;
                stats.in_use_bytes += (info.page_count().unwrap_or(1) * PAGE_BYTES) as u64;
            }
        }
        stats
    }

    /// Free bytes in whole pages: all, and in the largest run.
    pub(super) fn free_space(&self) -> (u64, u64) {
        let (mut free, mut largest, mut start, mut page) = (0, 0, 0, 0);
        let high = self.high();
        while page < high {
            match self.run_over(page) {
                Some(end) => {
                    page = end;
                    start = end;
                }
                None => {
                    page += 1;
                    free += 1;
                    largest = largest.max(page - start);
                }
            }
        }
        let above = self.view.page_count() - high.min(self.view.page_count());
        largest = largest.max(high.saturating_sub(start) + above);
        let bytes = |pages: usize| (pages * PAGE_BYTES) as u64;
        (bytes(free + above), bytes(largest))
    }

    /// Checks every invariant that holds whatever processes died. To be called while nobody changes the heap, and after
    /// [`free_all`](Self::free_all) for those who died.
    ///
    /// # Errors
    ///
    /// The first rule that is broken, and where.
    pub fn verify(&self) -> Result<(), Corrupt> {
        let header = self.view.header();
        let high = self.high();
        let map_present = header.map_present.load(Ordering::Acquire) as usize;
        if high > map_present || map_present > self.view.page_count() {
            return Err(corrupt(0, "pages in use have map entries that are present"));
        }
        let lock_is_free = header.lock.0.owner().is_none();
        let mut page = 0;
        while page < high {
            let page_count = self.verify_run(page)?;
            for page in page..page + page_count {
                self.verify_row(page, lock_is_free)?;
            }
            page += page_count;
        }
        for lowest in &header.hints.0.lowest {
            if lowest.load(Ordering::Relaxed) > self.view.page_count() as u64 {
                return Err(corrupt(0, "hints name pages"));
            }
        }
        Ok(())
    }

    /// Checks what begins at a page, and returns its length in pages.
    fn verify_run(&self, page: usize) -> Result<usize, Corrupt> {
        let broken = |page, invariant| Err(corrupt(self.view.offset_of(page), invariant));
        let entry = self.view.entry(page);
        let word = entry.truth.load(Ordering::Acquire);
        if word == truth::FREE {
            return match self.run_over(page) {
                None => Ok(1),
                Some(_) => broken(page, "a free page is in no run"),
            };
        }
        let is_chunk = truth::class_of_chunk(word).is_some();
        if !is_chunk && !truth::is_tag(word & !truth::FREEING) {
            return broken(
                page,
                "a page's word is 0, a tag, or a chunk of a known class",
            );
        }
        let Some(page_count) = entry.info().page_count() else {
            return broken(page, "a run in use has a length");
        };
        if page_count == 0 || page_count > self.high() - page {
            return broken(page, "a run lies below the highest page that was ever used");
        }
        if is_chunk && (page_count != 1 || !entry.info().has(Info::PRESENT)) {
            return broken(page, "a chunk is one page that is present");
        }
        for distance in 1..page_count {
            let inner = self.view.entry(page + distance);
            if inner.truth.load(Ordering::Acquire) != truth::FREE {
                return broken(page + distance, "runs do not overlap");
            }
            if inner.info().distance() != Some(distance) {
                return broken(page + distance, "a page of a run knows its first page");
            }
        }
        Ok(page_count)
    }

    fn verify_row(&self, page: usize, lock_is_free: bool) -> Result<(), Corrupt> {
        let broken = |invariant| Err(corrupt(self.view.offset_of(page), invariant));
        let entry = self.view.entry(page);
        let class = truth::class_of_chunk(entry.truth.load(Ordering::Acquire));
        let block_count = class.map_or(0, size_class::blocks_in_page);
        let present = entry.info().row_words();
        if present < block_count || present > ROW_WORDS {
            return broken("the block words of a chunk are present");
        }
        let words = self.view.row(page)[..present].iter();
        for (index, word) in words.map(|word| word.load(Ordering::Acquire)).enumerate() {
            let is_valid = match word {
                truth::FREE => true,
                truth::RETIRING => !lock_is_free,
                word => truth::is_tag(word) && index < block_count,
            };
            if !is_valid {
                return broken("a block word is 0 or a tag, and 0 where there is no block");
            }
        }
        Ok(())
    }
}

fn corrupt(offset: usize, invariant: &str) -> Corrupt {
    Corrupt {
        object: "tagged heap".into(),
        offset: offset as u64,
        invariant: invariant.into(),
    }
}

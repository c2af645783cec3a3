//! Walks over the whole pool: statistics, what is in it, and the check of its invariants.

use super::PoolRef;
use super::layout::{Bits, Entry, GROUP_PAGES, Header, PAGE_BYTES, State};
use crate::error::{Corrupt, Result};
use netmcore_sys::map::page_size;
use std::fmt::Write;
use std::sync::atomic::Ordering;

/// What a [`PagePool`](crate::PagePool) holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// What runs can occupy at most.
    pub total_bytes: u64,
    /// What runs occupy, those included that are being taken or freed.
    pub in_use_bytes: u64,
    /// How many runs that are.
    pub in_use_runs: u64,
    /// What they do not occupy.
    pub free_bytes: u64,
    /// The longest run that could be taken.
    pub largest_free_bytes: u64,
    /// Free pages that have kept their memory.
    pub kept_bytes: u64,
    /// Memory taken from the system: runs in use, kept pages, headers and the map.
    pub committed_bytes: u64,
}

impl PoolRef {
    /// Counts what is in use. A walk over the map, without the lock: while others take and free, the figures are of no single moment.
    #[doc(alias = "Netmcore_mempool.stats")]
    pub fn stats(self) -> PoolStats {
        let bytes = |pages: usize| (pages * PAGE_BYTES) as u64;
        let page_count = self.page_count();
        let mut stats = PoolStats {
            total_bytes: bytes(page_count),
            ..PoolStats::default()
        };
        let (mut page, mut start, mut largest) = (0, 0, 0);
        let (mut in_use, mut kept, mut present) = (0, 0, 0);
        let high = self.high();
        while page < high {
            if let Some(end) = self.run_over(page) {
                in_use += end - page;
                stats.in_use_runs += 1;
                present += (page..end.min(high))
                    .filter(|&page| self.entry(page).info().is_present())
                    .count();
                page = end;
                start = end;
            } else {
                kept += usize::from(self.entry(page).info().is_present());
                page += 1;
                largest = largest.max(page - start);
            }
        }
        largest = largest.max(page_count.saturating_sub(start));
        stats.in_use_bytes = bytes(in_use);
        stats.free_bytes = bytes(page_count.saturating_sub(in_use));
        stats.largest_free_bytes = bytes(largest);
        stats.kept_bytes = bytes(kept);
        let whole = |len: usize| len.next_multiple_of(page_size()) as u64;
        stats.committed_bytes = bytes(present + kept)
            + whole(size_of::<Header>())
            + whole(self.header_len_bytes())
            + self.map_bytes();
        stats
    }

    /// The memory of the map and the bits: they may have a page in common.
    fn map_bytes(self) -> u64 {
        let header = self.header();
        let entries = header.map_present.load(Ordering::Acquire) as usize;
        let (map, bits) = (&header.map_offset, &header.bits_offset);
        let [map, bits] = [map, bits].map(|offset| offset.load(Ordering::Relaxed) as usize);
        let page = page_size();
        let map_end = (map + entries * size_of::<Entry>()).next_multiple_of(page);
        let bits_end = bits + entries.div_ceil(GROUP_PAGES) * size_of::<Bits>();
        let bits_pages = bits / page * page..bits_end.next_multiple_of(page);
        let both = map_end.saturating_sub(bits_pages.start);
        (map_end - map + bits_pages.len() - both) as u64
    }

    /// Writes down what is in the pool, a line for each run and each stretch of free pages: for people.
    #[doc(alias = "Netmcore_mempool.debug_info")]
    pub fn debug_info(self) -> String {
        let mut text = format!("{:?} {:?}\n", self, self.stats());
        let high = self.high();
        let mut page = 0;
        while page < high {
            let start = page;
            let state = self.entry(page).state();
            let what = if let Some(end) = self.run_over(page) {
                page = end;
                let note = self.entry(start).note.load(Ordering::Relaxed);
                match state {
                    State::Taking(owner) => format!("being taken by {owner}"),
                    State::Freeing(owner) => format!("being freed by {owner}"),
                    _ => format!("in use, note {note:#x}"),
                }
            } else {
                let is_kept = |page| self.entry(page).info().is_present();
                let kept = is_kept(page);
                while page < high && self.run_over(page).is_none() && is_kept(page) == kept {
                    page += 1;
                }
                (if kept { "free, kept" } else { "free" }).to_owned()
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "pages {start}..{page}: {what}");
        }
        text
    }

    /// Checks every invariant that holds whatever processes died. To be called while nobody changes the pool. Runs that the
    /// dead were taking or freeing are in order.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`](crate::Error::Corrupt): a stray write, or a bug.
    pub fn verify(self) -> Result<()> {
        let high = self.header().high.load(Ordering::Acquire);
        let map_present = self.header().map_present.load(Ordering::Acquire);
        if high > map_present || map_present > self.page_count() as u64 {
            return Err(corrupt(0, "pages in use have map entries that are present").into());
        }
        let mut page = 0;
        while page < self.high() {
            page += self.verify_run(page)?;
        }
        Ok(())
    }

    /// Checks what begins at a page, and returns its length in pages.
    fn verify_run(self, page: usize) -> std::result::Result<usize, Corrupt> {
        let broken = |page, invariant| Err(corrupt(self.offset_of(page), invariant));
        let entry = self.entry(page);
        let word = entry.word.load(Ordering::Acquire);
        let state = State::of(word);
        if state == State::Free {
            if word != State::FREE {
                return broken(page, "a page's word is 0 or that of a run");
            }
            return match self.run_over(page) {
                None => Ok(1),
                Some(_) => broken(page, "a free page is in no run"),
            };
        }
        let Some(page_count) = entry.info().page_count() else {
            return broken(page, "a run has a length");
        };
        if page_count == 0 || page_count > self.high() - page {
            return broken(
                page,
                "a run lies below the highest page that was ever in one",
            );
        }
        let is_in_use = matches!(state, State::InUse(_));
        if is_in_use && state != State::InUse(page_count) {
            return broken(page, "a run has one length");
        }
        for distance in 0..page_count {
            let inner = self.entry(page + distance);
            if distance > 0 {
                if inner.word.load(Ordering::Acquire) != State::FREE {
                    return broken(page + distance, "runs do not overlap");
                }
                if inner.info().distance() != Some(distance) {
                    return broken(page + distance, "a page of a run knows its first page");
                }
            }
            if is_in_use && !inner.info().is_present() {
                return broken(page + distance, "pages in use are present");
            }
        }
        Ok(page_count)
    }
}

fn corrupt(offset: usize, invariant: &str) -> Corrupt {
    Corrupt {
        object: "page pool".into(),
        offset: offset as u64,
        invariant: invariant.into(),
    }
}

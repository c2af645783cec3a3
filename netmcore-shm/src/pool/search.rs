//! Where free pages are: bits beside the map, 64 pages in a word, so that a search does not walk over the runs.
//!
//! **Protocol.** Who has freed a page sets its bits after that; who takes one clears them, under the lock. So a page may be free and not be noted,
//! if somebody died in between, until an audit. And a bit may be set late, when the page has been taken again: a search looks at
//! the map before it believes what it has found, and clears what is wrong.
//!
//! **Invariants.** Those of [`pool`](super). Nothing here is believed.
//!
//! **If a process dies here.** A page may be noted wrongly: see above.

use super::PoolRef;
use super::layout::{GROUP_PAGES, Kind};
use std::ops::Range;
use std::sync::atomic::Ordering;

impl PoolRef {
    /// Finds a free run: one with memory if there is one, else the lowest. Under the lock.
    pub(super) fn search(self, page_count: usize) -> Option<usize> {
        let kept_pages = self.hints().kept_pages.load(Ordering::Relaxed);
        let mut found = None;
        if kept_pages >= page_count as i64 {
            found = self.search_kind(page_count, Kind::Kept);
        }
        found.or_else(|| self.search_kind(page_count, Kind::Free))
    }

    fn search_kind(self, page_count: usize, kind: Kind) -> Option<usize> {
        loop {
            let page = self.find(page_count, kind)?;
            // What lies above was never used.
            let end = (page + page_count).min(self.high());
            let wrong = (page..end).find(|&page| !self.is(page, kind));
            let Some(wrong) = wrong else {
                return Some(page);
            };
            self.clear(wrong, 1, kind);
        }
    }

    /// Whether the page is what its bit may say. Under the lock.
    fn is(self, page: usize, kind: Kind) -> bool {
        self.run_over(page).is_none()
            && (kind == Kind::Free || self.entry(page).info().is_present())
    }

    /// Finds the lowest pages that follow each other and are noted.
    fn find(self, page_count: usize, kind: Kind) -> Option<usize> {
        let (high, all) = (self.high(), self.page_count());
        let seen = self.hints().lowest[kind as usize].load(Ordering::SeqCst);
        let groups = high.div_ceil(GROUP_PAGES);
        // Pages noted so far that follow each other.
        let mut noted = 0..0;
        let mut nothing_below = true;
        for group in (seen as usize).min(groups)..groups {
            let word = self.bits(group).0[kind as usize].load(Ordering::Acquire);
            // Pages that were never used are not noted, whatever a stray store says.
            let word = word & mask_below(high - group * GROUP_PAGES);
            if word == 0 {
                continue;
            }
            if nothing_below {
                nothing_below = false;
                self.raise_lowest(kind, seen as usize, group);
            }
            for stretch in stretches(word) {
                let base = group * GROUP_PAGES;
                let stretch = base + stretch.start..base + stretch.end;
                noted = if noted.end == stretch.start {
                    noted.start..stretch.end
                } else {
                    stretch
                };
                if noted.len() >= page_count {
                    return Some(noted.start);
                }
            }
        }
        if nothing_below {
            self.raise_lowest(kind, seen as usize, groups);
        }
        // What is above was never used: free, and without memory.
        let start = if noted.end == high { noted.start } else { high };
        (kind == Kind::Free && page_count <= all - start).then_some(start)
    }

    /// Hints that no bit is set below the group `to`, as seen from `from` on.
    fn raise_lowest(self, kind: Kind, from: usize, to: usize) {
        if from >= to {
            return;
        }
        let lowest = &self.hints().lowest[kind as usize];
        // Unless somebody has freed below in the meantime, and has lowered it.
        let raised =
            lowest.compare_exchange(from as u64, to as u64, Ordering::SeqCst, Ordering::Relaxed);
        if raised.is_err() {
            return;
        }
        // One that set a bit behind our back may have seen the hint still low enough: of its bit and our hint, one is seen by the other.
        let is_set = |&group: &usize| self.bits(group).0[kind as usize].load(Ordering::SeqCst) != 0;
        if let Some(group) = (from..to).find(is_set) {
            lowest.fetch_min(group as u64, Ordering::SeqCst);
        }
    }

    /// Notes that pages are free.
    pub(super) fn note_free(self, page: usize, page_count: usize, are_present: bool) {
        let kinds: &[Kind] = match are_present {
            true => &[Kind::Free, Kind::Kept],
            false => &[Kind::Free],
        };
        for &kind in kinds {
            for (group, mask) in masks(page, page_count) {
                let word = &self.bits(group).0[kind as usize];
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::SeqCst);
                }
            }
            let group = (page / GROUP_PAGES) as u64;
            let lowest = &self.hints().lowest[kind as usize];
            if lowest.load(Ordering::SeqCst) > group {
                lowest.fetch_min(group, Ordering::SeqCst);
            }
        }
    }

    /// Notes that pages are not free any more. Under the lock.
    pub(super) fn note_taken(self, page: usize, page_count: usize) {
        self.clear(page, page_count, Kind::Free);
        self.clear(page, page_count, Kind::Kept);
    }

    fn clear(self, page: usize, page_count: usize, kind: Kind) {
        for (group, mask) in masks(page, page_count) {
            let word = &self.bits(group).0[kind as usize];
            if word.load(Ordering::Relaxed) & mask != 0 {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    /// The lowest free pages with memory, as many as follow each other. Under the lock.
    pub(super) fn find_kept(self) -> Option<Range<usize>> {
        let start = self.search_kind(1, Kind::Kept)?;
        let high = self.high();
        let end = (start..high).find(|&page| !self.is(page, Kind::Kept));
        Some(start..end.unwrap_or(high))
    }
}

/// The bits of the first pages of a group.
fn mask_below(page_count: usize) -> u64 {
    match page_count {
        0 => 0,
        count => u64::MAX >> GROUP_PAGES.saturating_sub(count),
    }
}

/// The stretches of bits that are set, in ascending order.
fn stretches(word: u64) -> impl Iterator<Item = Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = word.checked_shr(from)?;
        if rest == 0 {
            return None;
        }
        let start = from + rest.trailing_zeros();
        let end = start + (word >> start).trailing_ones();
        from = end;
        Some(start as usize..end as usize)
    })
}

/// The groups that the pages lie in, with a bit set for each page.
fn masks(page: usize, page_count: usize) -> impl Iterator<Item = (usize, u64)> {
    let end = page + page_count;
    (page / GROUP_PAGES..end.div_ceil(GROUP_PAGES)).map(move |group| {
        let base = group * GROUP_PAGES;
        let (first, last) = (
            page.max(base) - base,
            end.min(base + GROUP_PAGES) - base - 1,
        );
        (
            group,
            u64::MAX << first & u64::MAX >> (GROUP_PAGES - 1 - last),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_stretches_are_inverse() {
        for (page, page_count) in [
            (0, 1),
            (63, 1),
            (63, 2),
            (0, 64),
            (5, 59),
            (70, 200),
            (128, 128),
        ] {
            let mut pages = Vec::new();
            for (group, mask) in masks(page, page_count) {
                for stretch in stretches(mask) {
                    pages.extend(stretch.map(|bit| group * GROUP_PAGES + bit));
                }
            }
            assert!(pages.into_iter().eq(page..page + page_count));
        }
        let found: Vec<_> = stretches(0b1011_0001 | 1 << 63).collect();
        assert_eq!(found, [0..1, 4..6, 7..8, 63..64]);
        assert_eq!(stretches(0).next(), None);
        assert_eq!(stretches(u64::MAX).next(), Some(0..64));
        assert_eq!(stretches(u64::MAX).count(), 1);
    }
}

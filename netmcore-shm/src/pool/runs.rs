//! Runs of pages: taking them under the lock, making them present without, freeing them, and what is done for the dead.
//!
//! **Protocol** and **invariants**: those of [`pool`](super). Searching and committing happen under the lock, so there is one
//! taker at a time; meanwhile others may free, which only makes more pages free.
//!
//! **If a process dies here.** Describing pages before the commit: they stay free, because the word of the first is
//! still 0, and no page of another run was touched.
//!
//! # Safety
//!
//! One call gives memory back; it is made while the pages belong to the caller.

#![allow(unsafe_code)]

use super::PoolRef;
use super::layout::{Bits, Entry, GROUP_PAGES, PAGE_BYTES, State};
use crate::error::{Error, Result};
use crate::headroom::{HEADROOM_FROM_BYTES, headroom};
use netmcore_sem::{Current, LockGuard, Owners};
use netmcore_sys::crash_point;
use netmcore_sys::map::page_size;
use std::sync::atomic::Ordering;

/// So many free pages may always keep their memory, 16 MiB: what was used will be used again.
const KEPT_MIN_PAGES: i64 = 256;
/// Else so much of what was ever in use: a sixteenth.
const KEPT_SHIFT: u32 = 4;
/// An audit is due after the pool has grown by so many pages, 64 MiB, or by a quarter.
const AUDIT_MIN_PAGES: usize = 1024;

/// A run that was just taken.
#[derive(Clone, Copy)]
pub(super) struct Taken {
    pub(super) page: usize,
    /// How many of its pages have no memory.
    missing_pages: usize,
    /// Pages behind it: a run of its own, taken to be made present in one go with the first, and then kept. May be 0.
    extra_pages: usize,
}

impl PoolRef {
    /// Takes a run of pages, which is being taken by this thread when it returns.
    pub(super) fn take(self, page_count: usize, note: u64) -> Result<Taken> {
        let taking = State::Taking(Current.me()).word();
        let mut may_audit = true;
        loop {
            let guard = self.lock();
            let found = self.search(page_count);
            let end = found.map_or(0, |page| page + page_count);
            if may_audit && (found.is_none() || self.audit_is_due(end)) {
                drop(guard);
                self.audit();
                may_audit = false;
                continue;
            }
            let Some(page) = found else {
                drop(guard);
                return Err(self.out_of_pool_memory(page_count));
            };
            if self.header().map_present.load(Ordering::Acquire) < end as u64 {
                drop(guard);
                self.make_map_present(end)?;
                continue;
            }
            let high = &self.header().high;
            if high.load(Ordering::Relaxed) < end as u64 {
                high.store(end as u64, Ordering::Release);
                crash_point!("shm.pool.high_raised");
            }
            // A late swap by the layer above may hit this, or come before; either way nobody has the run yet.
            self.entry(page).note.store(note, Ordering::Relaxed);
            let missing_pages = self.describe(page, page_count, taking);
            let kept_pages = (page_count - missing_pages) as i64;
            if kept_pages > 0 {
                let kept = &self.hints().kept_pages;
                kept.fetch_sub(kept_pages, Ordering::Relaxed);
            }
            let mut extra_pages = 0;
            if missing_pages == page_count {
                extra_pages = self.extra_pages(page_count, end);
            }
            if extra_pages > 0 {
                high.fetch_max((end + extra_pages) as u64, Ordering::Release);
                self.describe(end, extra_pages, taking);
            }
            drop(guard);
            return Ok(Taken {
                page,
                missing_pages,
                extra_pages,
            });
        }
    }

    /// How many pages behind a run that ends at `end` are worth to be made present with it: free ones without memory, at most an eighth of what
    /// was ever in use, and few of what never was, so that nobody misses them meanwhile. Under the lock.
    fn extra_pages(self, page_count: usize, end: usize) -> usize {
        let header = self.header();
        let step_pages = header.step_pages.load(Ordering::Relaxed) as usize;
        let map_present = header.map_present.load(Ordering::Relaxed) as usize;
        let high = self.high();
        let most = step_pages
            .saturating_sub(page_count)
            .min(high / 8)
            .min((self.page_count() - high) / 64)
            .min(map_present.saturating_sub(end));
        let is_missing = |&page: &usize| {
            let is_free = || self.run_over(page).is_none();
            page >= high || is_free() && !self.entry(page).info().is_present()
        };
        (end..end + most).take_while(is_missing).count()
    }

    /// Writes about free pages that they are a run, and commits it with `word`. Returns how many have no memory. Under the lock.
    fn describe(self, page: usize, page_count: usize, word: u64) -> usize {
        let mut missing_pages = 0;
        for distance in 0..page_count {
            let entry = self.entry(page + distance);
            let info = entry.info();
            missing_pages += usize::from(!info.is_present());
            entry.set_info(match distance {
                0 => info.head(page_count),
                _ => info.interior(distance),
            });
            if distance < 2 {
                crash_point!("shm.pool.describing");
            }
        }
        // The commit.
        self.entry(page).word.store(word, Ordering::Release);
        crash_point!("shm.pool.described");
        self.note_taken(page, page_count);
        missing_pages
    }

    /// Makes those pages of a run present that are not. By its owner, without the lock.
    pub(super) fn make_present(self, taken: Taken, page_count: usize) -> Result<()> {
        if taken.missing_pages == 0 {
            return Ok(());
        }
        if taken.extra_pages > 0 && self.make_more_present(taken, page_count) {
            return Ok(());
        }
        let region = self.region()?;
        let missing_bytes = (taken.missing_pages * PAGE_BYTES) as u64;
        let end = taken.page + page_count;
        let is_present = |page: usize| self.entry(page).info().is_present();
        let mut page = taken.page;
        let mut is_first = true;
        while page < end {
            if is_present(page) {
                page += 1;
                continue;
            }
            let until = (page..end).find(|&page| is_present(page)).unwrap_or(end);
            let len_bytes = ((until - page) * PAGE_BYTES) as u64;
            // The region looks at the headroom for what it is asked for at a time: if that is not all, look for all.
            if is_first && len_bytes < missing_bytes && missing_bytes >= HEADROOM_FROM_BYTES {
                let room = headroom();
                if room.bytes < missing_bytes {
                    return Err(Error::NoSpace {
                        limit: room.limit,
                        wanted_bytes: missing_bytes,
                        free_bytes: room.bytes,
                    });
                }
            }
            is_first = false;
            region.ensure(self.offset_of(page) as u64, len_bytes)?;
            crash_point!("shm.pool.ensured");
            self.mark_present(page, until - page, true);
            page = until;
        }
        crash_point!("shm.pool.present");
        Ok(())
    }

    /// Makes a run and the extra pages behind it present, or neither. The extra pages are free then.
    fn make_more_present(self, taken: Taken, page_count: usize) -> bool {
        let both_pages = page_count + taken.extra_pages;
        let ensure = || -> Result<()> {
            let offset = self.offset_of(taken.page) as u64;
            self.region()?
                .ensure(offset, (both_pages * PAGE_BYTES) as u64)
        };
        let extra = taken.page + page_count;
        if ensure().is_err() {
            // It may be for want of the extra ones.
            self.finish_freeing(extra);
            return false;
        }
        crash_point!("shm.pool.ensured_more");
        self.mark_present(taken.page, both_pages, true);
        crash_point!("shm.pool.present_more");
        let word = &self.entry(extra).word;
        word.store(State::FREE, Ordering::Release);
        crash_point!("shm.pool.freed_more");
        self.note_kept(extra, taken.extra_pages);
        true
    }

    /// Notes that pages are free and have kept their memory.
    fn note_kept(self, page: usize, page_count: usize) {
        let kept = &self.hints().kept_pages;
        kept.fetch_add(page_count as i64, Ordering::Relaxed);
        self.note_free(page, page_count, true);
    }

    fn mark_present(self, page: usize, page_count: usize, is_present: bool) {
        for page in page..page + page_count {
            let entry = self.entry(page);
            entry.set_info(entry.info().with_present(is_present));
        }
    }

    /// Makes the map present for pages below `end`, and some more: as many again, so that large pools do not come here often.
    fn make_map_present(self, end: usize) -> Result<()> {
        let present = &self.header().map_present;
        let from = present.load(Ordering::Acquire) as usize;
        if end <= from {
            return Ok(());
        }
        let entries = end.max(2 * from).min(self.page_count());
        let header = self.header();
        let (map, bits) = (&header.map_offset, &header.bits_offset);
        let [map, bits] = [map, bits].map(|offset| offset.load(Ordering::Relaxed));
        // To the end of the system's page.
        let map_end = map as usize + entries * size_of::<Entry>();
        let map_end = map_end.next_multiple_of(page_size()) - map as usize;
        let until = (map_end / size_of::<Entry>()).min(self.page_count());
        let region = self.region()?;
        let ensure = |offset: u64, start: usize, end: usize| {
            region.ensure(offset + start as u64, (end - start) as u64)
        };
        ensure(map, from * size_of::<Entry>(), until * size_of::<Entry>())?;
        ensure(
            bits,
            from / GROUP_PAGES * size_of::<Bits>(),
            until.div_ceil(GROUP_PAGES) * size_of::<Bits>(),
        )?;
        crash_point!("shm.pool.map_grown");
        present.fetch_max(until as u64, Ordering::AcqRel);
        Ok(())
    }

    /// Frees a run in use; false if somebody else was quicker.
    pub(super) fn release(self, page: usize, page_count: usize) -> bool {
        let word = &self.entry(page).word;
        let change = |to| {
            let in_use = State::InUse(page_count).word();
            word.compare_exchange(in_use, to, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        if self.may_keep(page_count) {
            // All its pages are present (invariant 3), and stay so.
            let freed = change(State::FREE);
            if freed {
                crash_point!("shm.pool.freed");
                self.note_kept(page, page_count);
            }
            return freed;
        }
        let freed = change(State::Freeing(Current.me()).word());
        if freed {
            crash_point!("shm.pool.freeing");
            self.finish_freeing(page);
        }
        freed
    }

    /// Gives the memory of a run back, and frees it. For whoever owns it: while it is being taken or freed.
    pub(super) fn finish_freeing(self, page: usize) {
        let entry = self.entry(page);
        let page_count = self.pages_of_run(page);
        // In this order: a page that is marked has memory.
        self.mark_present(page, page_count, false);
        crash_point!("shm.pool.unmarked");
        let offset = self.offset_of(page) as u64;
        if let Ok(region) = self.region() {
            // SAFETY: the run is ours alone: its user has given it up, and nobody is given it before the store below; there are
            // no references into it.
            let punched = unsafe { region.punch(offset, (page_count * PAGE_BYTES) as u64) };
            // Where the system cannot (it always can), the memory is just kept, and nobody counts on it.
            debug_assert!(punched.is_ok(), "{punched:?}");
        }
        crash_point!("shm.pool.punched");
        entry.word.store(State::FREE, Ordering::Release);
        crash_point!("shm.pool.punched_and_freed");
        self.note_free(page, page_count, false);
    }

    /// Whether so many more free pages may keep their memory.
    fn may_keep(self, page_count: usize) -> bool {
        let kept = self.hints().kept_pages.load(Ordering::Relaxed).max(0);
        let limit = KEPT_MIN_PAGES.max(self.high() as i64 >> KEPT_SHIFT);
        kept.saturating_add(page_count as i64) <= limit
    }

    /// The length of the run whose first page this is: at least 1, and inside the pool.
    fn pages_of_run(self, page: usize) -> usize {
        let page_count = self.entry(page).info().page_count().unwrap_or(1);
        page_count.clamp(1, self.page_count() - page)
    }

    /// Takes the lock. What a dead holder left is in order, but it may have left more elsewhere.
    fn lock(self) -> LockGuard<'static> {
        match self.header().lock.0.lock(&Current) {
            Ok(guard) => guard,
            Err(died) => {
                self.hints().suspicions.fetch_add(1, Ordering::Relaxed);
                died.guard
            }
        }
    }

    /// If the page belongs to a run, the end of that run (invariant 1). Exact under the lock, or for the owner of the run.
    pub(super) fn run_over(self, page: usize) -> Option<usize> {
        let info = self.entry(page).info();
        let head = page.checked_sub(info.distance().unwrap_or(0))?;
        let entry = self.entry(head);
        let in_use = entry.state() != State::Free;
        let end = (head + entry.info().page_count()?).min(self.page_count());
        (in_use && end > page).then_some(end)
    }

    /// Whether the hints say that somebody should look for what the dead left, when the pool is used up to page `end`.
    fn audit_is_due(self, end: usize) -> bool {
        let hints = self.hints();
        // Without a supervisor nobody counts deaths.
        let deaths = Current.deaths().load(Ordering::Acquire);
        hints.suspicions.load(Ordering::Relaxed) != 0
            || deaths != 0 && hints.deaths_seen.load(Ordering::Relaxed) != u64::from(deaths)
            || end > self.high() && end as u64 >= hints.audit_at.load(Ordering::Relaxed)
    }

    /// Frees the runs that the dead were taking or freeing, says how many, and puts the hints right. Without the lock; several may do so at a
    /// time.
    pub(super) fn audit(self) -> usize {
        let hints = self.hints();
        let suspicions = hints.suspicions.load(Ordering::Acquire);
        let deaths = Current.deaths().load(Ordering::Acquire);
        let reclaimed = self.finish_for_the_dead();
        crash_point!("shm.pool.reclaimed");
        let (mut page, mut kept_pages) = (0, 0);
        while page < self.high() {
            page = self.run_over(page).unwrap_or_else(|| {
                let is_present = self.entry(page).info().is_present();
                kept_pages += i64::from(is_present);
                self.note_free(page, 1, is_present);
                page + 1
            });
        }
        hints.kept_pages.store(kept_pages, Ordering::Relaxed);
        let next = page + AUDIT_MIN_PAGES.max(page / 4);
        hints.audit_at.store(next as u64, Ordering::Relaxed);
        hints
            .deaths_seen
            .store(u64::from(deaths), Ordering::Relaxed);
        crash_point!("shm.pool.audited");
        // Last: if we die before, the next to take something does all of it again.
        let _ =
            hints
                .suspicions
                .compare_exchange(suspicions, 0, Ordering::AcqRel, Ordering::Relaxed);
        reclaimed
    }

    fn finish_for_the_dead(self) -> usize {
        let me = Current.me();
        let (mut page, mut finished) = (0, 0);
        while page < self.high() {
            let entry = self.entry(page);
            let word = entry.word.load(Ordering::Acquire);
            match State::of(word) {
                State::Taking(owner) | State::Freeing(owner)
                    if owner != me && !Current.is_alive(owner) =>
                {
                    let ours = State::Freeing(me).word();
                    let taken_over = entry.word.compare_exchange(
                        word,
                        ours,
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    );
                    if taken_over.is_ok() {
                        crash_point!("shm.pool.taken_over");
                        self.finish_freeing(page);
                        finished += 1;
                    }
                    page += 1;
                }
                State::InUse(page_count) => page += page_count.max(1),
                State::Free | State::Taking(_) | State::Freeing(_) => page += 1,
            }
        }
        finished
    }

    /// Punches all free pages that have memory, and returns how many bytes.
    pub(super) fn give_back_kept(self) -> u64 {
        // For pages that a dead one freed and did not note.
        self.audit();
        let freeing = State::Freeing(Current.me()).word();
        // Not for ever, while others free.
        let most_pages = self.high();
        let mut given_pages = 0;
        while given_pages < most_pages {
            let guard = self.lock();
            let Some(kept) = self.find_kept() else {
                break;
            };
            self.describe(kept.start, kept.len(), freeing);
            let kept_pages = &self.hints().kept_pages;
            kept_pages.fetch_sub(kept.len() as i64, Ordering::Relaxed);
            drop(guard);
            crash_point!("shm.pool.trimming");
            self.finish_freeing(kept.start);
            given_pages += kept.len();
        }
        (given_pages * PAGE_BYTES) as u64
    }

    pub(super) fn out_of_pool_memory(self, page_count: usize) -> Error {
        let stats = self.stats();
        Error::OutOfPoolMemory {
            wanted_bytes: (page_count as u64).saturating_mul(PAGE_BYTES as u64),
            free_bytes: stats.free_bytes,
            largest_free_bytes: stats.largest_free_bytes,
        }
    }
}

//! Pages of owners that have died or ended, and who becomes their owner.
//!
//! **Protocol.** Before a thread takes a new page it looks at some runs of the heap, going round with all others, by a cursor that they share. A page whose
//! owner has abandoned it or does not live becomes the thread's by one compare-and-swap on its note, of whatever class it is. What a dead owner was
//! preparing or giving back is given back.
//!
//! Whether an owner lives may cost system calls, so the answer "yes" is kept until somebody dies, or, where nobody tells of deaths, until it is time to ask
//! again.
//!
//! **If a process dies here.** It is the owner, or it is not. If it did not yet mark the blocks of the dead, all blocks in use of the page are those of
//! a dead owner: its own.
//!
//! # Safety
//!
//! The header of a page is looked at by its owner only: after the compare-and-swap.

#![allow(unsafe_code)]

use super::local::{Cache, give_back_run};
use super::note::{Holder, Kind, Note};
use super::page::Page;
use super::runs::{self, Run, exchange};
use netmcore_sem::{Current, OwnerId, Owners};
use netmcore_sys::crash_point;
use std::cell::Cell;
use std::sync::atomic::Ordering::Acquire;
use std::time::Instant;

/// All runs, or pages, there are.
pub(super) const ALL: usize = usize::MAX;

/// Owners that were alive when they were last asked about.
pub(super) struct Living {
    known: [Cell<Option<Known>>; KNOWN],
    next: Cell<usize>,
}

const KNOWN: usize = 8;

#[derive(Clone, Copy)]
struct Known {
    owner: OwnerId,
    /// The counter of deaths, read before.
    deaths: u32,
    asked_at: Instant,
}

impl Known {
    fn is_good(&self) -> bool {
        self.deaths == Current.deaths().load(Acquire)
            && Current
                .recheck_every(self.owner)
                .is_none_or(|interval| self.asked_at.elapsed() < interval)
    }
}

impl Living {
    pub(super) fn new() -> Living {
        Living {
            known: [const { Cell::new(None) }; KNOWN],
            next: Cell::new(0),
        }
    }

    /// Whether the owner has died or ended. Not at once, if it was alive a moment ago.
    pub(super) fn is_dead(&self, owner: OwnerId) -> bool {
        let mut known = self.known.iter().filter_map(Cell::get);
        if known.any(|known| known.owner == owner && known.is_good()) {
            return false;
        }
        let deaths = Current.deaths().load(Acquire);
        if !Current.is_alive(owner) {
            return true;
        }
        let place = self
            .known
            .iter()
            .position(|known| known.get().is_some_and(|known| known.owner == owner))
            .unwrap_or_else(|| self.next.replace((self.next.get() + 1) % KNOWN));
        self.known[place].set(Some(Known {
            owner,
            deaths,
            asked_at: Instant::now(),
        }));
        false
    }
}

impl Cache {
    /// Looks at so many runs, adopts the pages of the dead among them, and gives back the empty ones. Returns how many there were.
    pub(super) fn adopt(&self, steps: usize) -> usize {
        let mut count = 0;
        runs::visit(self.heap(), steps, |run| {
            if self.adopt_run(&run) {
                count += 1;
            }
        });
        count
    }

    fn adopt_run(&self, run: &Run) -> bool {
        let note = Note(run.note.load(Acquire));
        let is_dead = |owner| owner != self.me() && self.living().is_dead(owner);
        match note.read() {
            Some((Kind::Preparing, Holder::Owner(owner))) if is_dead(owner) => {
                let mine = self.note(Kind::Preparing);
                if !exchange(run.note, note, mine) {
                    return false;
                }
                crash_point!("shm.heap.half_page_adopted");
                // SAFETY: the run is this thread's, and nobody has a block in it.
                unsafe { runs::free(self.heap(), run.at) };
                true
            }
            Some((Kind::Small, holder)) => {
                let was_alive = match holder {
                    Holder::Abandoned => true,
                    Holder::Owner(owner) if is_dead(owner) => false,
                    Holder::Owner(_) => return false,
                };
                let mine = self.small();
                if !exchange(run.note, note, mine) {
                    return false;
                }
                crash_point!("shm.heap.page_adopted");
                // SAFETY: the page is this thread's.
                let page = unsafe { Page::at(run.at) };
                let Some(class) = page.class() else {
                    // Damaged: nobody shall allocate from it.
                    return false;
                };
                if page.is_empty(class) {
                    give_back_run(self.heap(), page, mine);
                    return true;
                }
                if !was_alive {
                    page.mark_dead(class);
                    crash_point!("shm.heap.dead_marked");
                }
                self.link(class, page);
                true
            }
            _ => false,
        }
    }
}

//! What a heap holds, counted, and the invariants of the heap, checked.
//!
//! **Not here.** The pool's own invariants: [`pool`](crate::pool). Shared values: [`arc`](crate::arc).
//!
//! # Safety
//!
//! Headers of pages are read whose owners may be others, who may give them back meanwhile: copies are counted. They are checked in place, while
//! nobody uses the heap.

#![allow(unsafe_code)]

use super::adopt::ALL;
use super::local::with_cache;
use super::note::{Holder, Kind, Note};
use super::page::{Copied, PAGE_BYTES, Page, words};
use super::runs::{self, Run};
use super::{Heap, HeapStats, size_class};
use crate::error::{Corrupt, Error, Result};
use netmcore_sem::{Current, OwnerId, Owners};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Acquire;

/// What the pages of one owner hold: [`Heap::owners`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerUse {
    /// The owner; `None` for pages that were abandoned by threads which ended, and not yet adopted.
    pub owner: Option<OwnerId>,
    /// Whether it lives; what was abandoned in order counts as alive.
    pub is_alive: bool,
    /// Bytes of its pages, and of its runs of pages.
    pub page_bytes: u64,
    /// Bytes of the blocks in use in them.
    pub in_use_bytes: u64,
    /// Blocks in use in them.
    pub in_use_blocks: u64,
    /// Bytes of those blocks in use that were allocated by the dead.
    pub dead_bytes: u64,
    /// The number of blocks that `dead_bytes` counts.
    pub dead_blocks: u64,
}

/// Blocks in use of one run.
#[derive(Default)]
struct InRun {
    in_use_blocks: u64,
    /// Of those that the owner has adopted from the dead.
    dead_blocks: u64,
    block_bytes: u64,
}

/// Counts the blocks of a run that says of itself that it is of that kind.
fn count(run: &Run, kind: Kind, copied: &mut Copied) -> InRun {
    let page_bytes = (run.page_count * PAGE_BYTES) as u64;
    match kind {
        Kind::Preparing => InRun::default(),
        Kind::Large => InRun {
            in_use_blocks: 1,
            dead_blocks: 0,
            block_bytes: page_bytes,
        },
        Kind::Small => {
            let page = copied.copy(run.at);
            let Some((page, class)) = page.and_then(|page| Some((page, page.class()?))) else {
                return InRun::default();
            };
            let sum = |bits: &dyn Fn(usize) -> u64| {
                let count = |word| u64::from(bits(word).count_ones());
                (0..words(class)).map(count).sum()
            };
            InRun {
                in_use_blocks: sum(&|word| page.in_use(class, word)),
                dead_blocks: sum(&|word| page.bits(class, word).in_use_of_dead()),
                block_bytes: size_class::size(class) as u64,
            }
        }
    }
}

impl Heap {
    /// Counts what is in use. While others allocate and free, the figures are of no single moment.
    ///
    /// It looks at each page of small blocks, by a system call: 1 µs.
    #[doc(alias = "Netmcore_heap.debug_info")]
    pub fn stats(&self) -> HeapStats {
        let pool = runs::pool(self.at).stats();
        let mut stats = HeapStats {
            committed_bytes: pool.committed_bytes,
            max_bytes: pool.total_bytes,
            ..HeapStats::default()
        };
        for owner in self.owners() {
            stats.in_use_bytes += owner.in_use_bytes;
            stats.in_use_blocks += owner.in_use_blocks;
            stats.dead_bytes += owner.dead_bytes;
            stats.dead_blocks += owner.dead_blocks;
        }
        stats
    }

    /// What each owner of pages holds: the threads, alive or dead, that have allocated from the heap. The blocks in use were allocated by the owner, or by
    /// those from whom it has adopted pages.
    pub fn owners(&self) -> Vec<OwnerUse> {
        let (mut owners, mut copied) = (BTreeMap::new(), Copied::new());
        runs::visit(self.at, ALL, |run| {
            let Some((kind, holder)) = Note(run.note.load(Acquire)).read() else {
                return;
            };
            let of_owner = owners.entry(holder).or_insert_with(|| OwnerUse {
                owner: match holder {
                    Holder::Owner(id) => Some(id),
                    Holder::Abandoned => None,
                },
                is_alive: match holder {
                    Holder::Owner(id) => Current.is_alive(id),
                    Holder::Abandoned => true,
                },
                page_bytes: 0,
                in_use_bytes: 0,
                in_use_blocks: 0,
                dead_bytes: 0,
                dead_blocks: 0,
            });
            let blocks = count(&run, kind, &mut copied);
            let dead_blocks = match of_owner.is_alive {
                true => blocks.dead_blocks,
                false => blocks.in_use_blocks,
            };
            of_owner.page_bytes += (run.page_count * PAGE_BYTES) as u64;
            of_owner.in_use_blocks += blocks.in_use_blocks;
            of_owner.in_use_bytes += blocks.in_use_blocks * blocks.block_bytes;
            of_owner.dead_blocks += dead_blocks;
            of_owner.dead_bytes += dead_blocks * blocks.block_bytes;
        });
        owners.into_values().collect()
    }

    /// Checks every invariant that holds whatever process dies, while nobody uses the heap: those of the pool, of each page, of what this thread keeps
    /// of its pages, and of shared values.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`]: a stray write, or a bug.
    pub fn verify(&self) -> Result<()> {
        runs::pool(self.at).verify()?;
        let heap = self.at;
        let broken = with_cache(heap, |cache| {
            let (mut broken, mut mine) = (None, 0);
            runs::visit(heap, ALL, |run| {
                mine += usize::from(Note(run.note.load(Acquire)) == cache.small());
                if let Some(invariant) = find_broken(&run) {
                    broken.get_or_insert((run.at, invariant));
                }
            });
            let mut in_rings = 0;
            for class in 0..size_class::COUNT {
                match cache.check(class) {
                    Ok(page_count) => in_rings += page_count,
                    Err(at) => {
                        broken.get_or_insert((
                            at,
                            "a thread's ring holds pages of its own and its free blocks are free"
                                .to_owned(),
                        ));
                    }
                }
            }
            if in_rings != mine {
                let invariant =
                    format!("this thread's {mine} pages are in its rings, not {in_rings}");
                broken.get_or_insert((heap.0.cast(), invariant));
            }
            broken
        });
        match broken {
            Some((at, invariant)) => Err(self.corrupt(at, invariant)),
            None => crate::arc::verify(heap),
        }
    }

    fn corrupt(&self, at: NonNull<u8>, invariant: String) -> Error {
        Error::Corrupt(Corrupt {
            object: format!("the heap in {}", self.region.id()),
            offset: (at.as_ptr().addr() - self.region.at().addr()) as u64,
            invariant,
        })
    }
}

fn find_broken(run: &Run) -> Option<String> {
    let note = run.note.load(Acquire);
    let Some((kind, holder)) = Note(note).read() else {
        return Some(format!("a run in use has a note of a heap, not {note:#x}"));
    };
    if kind == Kind::Large {
        return None;
    }
    if run.page_count != 1 {
        return Some(format!(
            "pages of small blocks are single, not {}",
            run.page_count
        ));
    }
    if kind == Kind::Preparing {
        return (holder == Holder::Abandoned)
            .then(|| "nobody abandons a page that it prepares".to_owned());
    }
    // SAFETY: nobody uses the heap, so pages of small blocks stay such.
    let page = unsafe { Page::at(run.at) };
    match page.class() {
        None => Some("a page begins with its class".to_owned()),
        Some(class) if page.has_stray_bits(class) => {
            Some("bits of blocks that do not exist are 0".to_owned())
        }
        Some(_) if !is_claimed_rightly(page, Note(note)) => {
            Some("a page is claimed by nobody who lives but its owner".to_owned())
        }
        Some(_) => None,
    }
}

/// Whether the claim, if there is one, is the owner's, or of a dead one from whom nobody has adopted the page yet.
fn is_claimed_rightly(page: Page, note: Note) -> bool {
    let claim = page.claim();
    match claim.read() {
        Some((Kind::Small, Holder::Owner(owner))) => claim == note || !Current.is_alive(owner),
        _ => claim.0 == 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, PagePool};
    use std::alloc::Layout;
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering::Relaxed;

    /// A word of a page that somebody has overwritten is told of, and followed nowhere.
    #[test]
    fn damaged_page_is_told_of() {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let allocate = |len| {
            let layout = Layout::from_size_align(len, 8).unwrap();
            heap.allocator().allocate(layout).unwrap().as_ptr()
        };
        let pages = [(); 4].map(|()| {
            let blocks = [allocate(20_000), allocate(20_000), allocate(20_000)];
            blocks[0].map_addr(|at| at / PAGE_BYTES * PAGE_BYTES)
        });
        let other = allocate(64).map_addr(|at| at / PAGE_BYTES * PAGE_BYTES);
        heap.verify().unwrap();
        let address = |page: *mut u8| page.addr() as u64;
        let word = |page: *mut u8, offset: usize| {
            // SAFETY: in the page's header, whose words are used as atomics only.
            unsafe { &*page.add(offset).cast::<AtomicU64>() }
        };
        let note = runs::note(heap.at, NonNull::new(pages[1]).unwrap()).unwrap();
        let links = [
            0,
            1 << 20,
            u64::MAX,
            address(pages[1]),
            address(pages[1]) + 8,
            address(pages[3]) + 5 * PagePool::PAGE_BYTES as u64,
            address(other),
        ];
        let damages = [(0, 1), (24, 7), (24, note.load(Relaxed) ^ 3), (32, 1 << 63)]
            .into_iter()
            .chain(links.map(|link| (8, link)))
            .chain(links.map(|link| (16, link)));
        for (offset, damaged) in damages {
            let sound = word(pages[1], offset).swap(damaged, Relaxed);
            let told = heap.verify();
            assert!(told.is_err(), "{damaged:#x} at {offset}");
            word(pages[1], offset).store(sound, Relaxed);
            heap.verify().unwrap();
        }
        for damaged in [0, note.load(Relaxed) ^ 1 << 40] {
            let sound = note.swap(damaged, Relaxed);
            assert!(heap.verify().is_err(), "{damaged:#x}");
            note.store(sound, Relaxed);
        }
        // A page of this thread that is in no ring would be lost to it.
        let [before, behind] = [16, 8].map(|link| word(pages[1], link).load(Relaxed));
        let neighbour = |address: u64| pages[0].with_addr(address as usize);
        word(neighbour(before), 8).store(behind, Relaxed);
        word(neighbour(behind), 16).store(before, Relaxed);
        assert!(heap.verify().is_err());
        word(neighbour(before), 8).store(address(pages[1]), Relaxed);
        word(neighbour(behind), 16).store(address(pages[1]), Relaxed);
        heap.verify().unwrap();
    }
}

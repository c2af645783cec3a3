//! Reading without locks what others replace and free: pins of readers, and when a block is free to go.
//!
//! **Protocol.** One domain for each heap: the era, and a slot for each thread that reads (`pins`, with the state table). Found by an anchor
//! of the heap; made with the first collection that needs it. A thread takes a slot at its first [`Pin`], keeps it, and gives it back at its
//! end. Collections put what they unlink into lists of their own (`retired`), and free from there what no slot keeps.
//!
//! The slots lie in chunks, each twice as long as the one before.
//!
//! **Invariants.**
//! 1. The domain, its chunks and slots are never freed; what is stored of an address there is 0 or final.
//! 2. A slot belongs to one thread of one process. A forked child has copies of its parent's pins: they neither pin nor unpin.
//! 3. `used` is above the index of every slot that has ever been claimed, before its owner pins.
//!
//! **If a process dies here.** Its slots are taken over from it (`pins`). A chunk that was allocated and not published is lost.
//!
//! **Not here.** What is behind the pointers.
//!
//! # Safety
//!
//! References to the domain and its slots are `'static`: invariant 1, and the heap stays mapped until the process ends. A thread that ends
//! asks whether it is, because a newborn worker forgets regions.

#![allow(unsafe_code)]

pub mod pins;
pub mod retired;
pub mod versions;

use crate::collections::Rejected;
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::region::region_of;
use netmcore_sem::current::{Holding, fork_epoch};
use netmcore_sem::{Current, Owners};
use netmcore_sys::crash_point;
pub(crate) use pins::Cover;
use pins::{Era, Slot, owner_word};
use retired::{Node, RetiredList};
use std::alloc::Layout;
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, SeqCst};

/// Which of the heap's anchors holds the address of the domain.
const ANCHOR: usize = 1;
const MAGIC: u64 = u64::from_be_bytes(*b"nmepoch1");
/// Slots of the first chunk.
const FIRST_CHUNK: usize = 64;
const MAX_CHUNKS: usize = 20;
/// A list is looked through when it has as many blocks as a part of the slots: so a look costs each block a few slots.
const SLOTS_PER_BLOCK: u64 = 8;
/// With so many blocks in a list, each look asks of those that keep them whether they live. It takes a third as many new blocks to the next look.
const DOUBT_FROM: u64 = 64;
/// Blocks from this size on are worth a look each time.
const LARGE_BYTES: usize = 1024;

#[derive(Debug)]
#[repr(C)]
pub(crate) struct Domain {
    magic: AtomicU64,
    used: AtomicU64,
    /// Chunk k: `FIRST_CHUNK << k` slots; 0 if not made.
    chunks: [AtomicU64; MAX_CHUNKS],
    era: Era,
}

impl Domain {
    /// The heap's domain, made if there is none yet.
    pub(crate) fn of(heap: HeapRef) -> Result<&'static Domain> {
        let anchor = &heap.anchors()[ANCHOR];
        if anchor.load(Acquire) == 0 {
            Domain::make(heap, anchor)?;
        }
        // SAFETY: published by `make`, zeroed before that (invariant 1).
        let domain = unsafe { published::<Domain>(anchor.load(Acquire)) };
        match domain.magic.load(Acquire) {
            MAGIC => Ok(domain),
            found => Err(Error::FormatMismatch {
                object: "the table of readers".to_owned(),
                expected: MAGIC,
                found,
            }),
        }
    }

    #[cold]
    fn make(heap: HeapRef, anchor: &AtomicU64) -> Result<()> {
        let layout = Layout::new::<Domain>();
        let at = zeroed(heap, layout)?;
        crash_point!("shm.epoch.domain_allocated");
        // SAFETY: zeroed memory of its layout is a domain, and it is ours until it is published.
        let domain = unsafe { at.cast::<Domain>().as_ref() };
        domain.magic.store(MAGIC, SeqCst);
        publish(heap, anchor, at, layout);
        crash_point!("shm.epoch.domain_made");
        Ok(())
    }

    pub(crate) fn era(&self) -> &Era {
        &self.era
    }

    /// Takes a slot for the calling thread.
    fn claim_slot(&self, heap: HeapRef, me: u64) -> Result<&'static Slot> {
        loop {
            let chunks = self.chunk_count();
            for even_of_the_dead in [false, true] {
                let mut index = 0;
                for slot in (0..chunks).flat_map(|chunk| self.chunk(chunk)) {
                    index += 1;
                    if slot.claim(me, even_of_the_dead) {
                        self.used.fetch_max(index, SeqCst);
                        return Ok(slot);
                    }
                }
            }
            self.grow(heap, chunks)?;
        }
    }

    fn chunk_count(&self) -> usize {
        let is_made = |chunk: &&AtomicU64| chunk.load(Acquire) != 0;
        self.chunks.iter().take_while(is_made).count()
    }

    fn chunk(&self, chunk: usize) -> &'static [Slot] {
        let at = self.chunks[chunk].load(Acquire) as usize;
        let at = ptr::with_exposed_provenance::<Slot>(at);
        // SAFETY: in bounds: so many zeroed slots were published there (invariant 1); here, there, gone: atomics.
        unsafe { std::slice::from_raw_parts(at, FIRST_CHUNK << chunk) }
    }

    fn grow(&self, heap: HeapRef, chunk: usize) -> Result<()> {
        let Some(place) = self.chunks.get(chunk) else {
            return Err(Error::OutOfPoolMemory {
                wanted_bytes: size_of::<Slot>() as u64,
                free_bytes: 0,
                largest_free_bytes: 0,
            });
        };
        let layout =
            Layout::array::<Slot>(FIRST_CHUNK << chunk).expect("a chunk of slots is not so long");
        let at = zeroed(heap, layout)?;
        crash_point!("shm.epoch.chunk_allocated");
        publish(heap, place, at, layout);
        crash_point!("shm.epoch.chunk_made");
        Ok(())
    }

    /// All slots that anybody may read under.
    fn slots(&self) -> impl Iterator<Item = &'static Slot> {
        // Invariant 3.
        let used = self.used.load(SeqCst) as usize;
        (0..self.chunk_count())
            .flat_map(|chunk| self.chunk(chunk))
            .take(used)
    }

    /// Puts a block, which was unlinked, into the list.
    ///
    /// # Safety
    ///
    /// As [`RetiredList::push`].
    pub(crate) unsafe fn retire(&self, list: &RetiredList, link: u64) {
        // SAFETY: the caller's duty.
        unsafe { list.push(link, &self.era) }
    }

    /// Frees blocks of the list that nobody can have any more, if it is worth it. A block has about so many bytes.
    ///
    /// # Safety
    ///
    /// - `free` as for [`RetiredList::reclaim`]; the list is of this domain.
    pub(crate) unsafe fn reclaim_some(
        &self,
        list: &RetiredList,
        block_bytes: usize,
        free: impl FnMut(u64),
    ) {
        let (enough, too_many) = if block_bytes >= LARGE_BYTES {
            (0, 4)
        } else {
            (self.used.load(SeqCst) / SLOTS_PER_BLOCK, DOUBT_FROM)
        };
        if list.is_worth_a_look(enough) {
            let doubt = list.is_worth_a_look(too_many);
            // SAFETY: all slots; the rest is the caller's duty.
            unsafe { list.reclaim(&self.era, || self.slots(), doubt, free) }
        }
    }

    /// Frees all blocks of the list that nobody can have any more, and asks whether those live that have the others.
    ///
    /// # Safety
    ///
    /// As [`reclaim_some`](Self::reclaim_some).
    pub(crate) unsafe fn reclaim_all(&self, list: &RetiredList, free: impl FnMut(u64)) {
        // SAFETY: all slots; the rest is the caller's duty.
        unsafe { list.reclaim(&self.era, || self.slots(), true, free) }
    }
}

/// While it lives, nothing is freed that the thread has read since it was made. It belongs to its thread.
#[derive(Debug)]
pub(crate) struct Pin {
    domain: &'static Domain,
    slot: &'static Slot,
    owner: u64,
    /// Tells the pin from its forked copies.
    epoch: u64,
    _holding: Holding,
}

impl Pin {
    /// # Errors
    ///
    /// If the thread has no slot yet, and there is no memory for one.
    #[inline(always)]
    pub(crate) fn try_new(heap: HeapRef) -> Result<Pin> {
        let kept = KEPT.get();
        let epoch = fork_epoch();
        let place = match kept {
            Some(place) if place.heap == heap && place.epoch == epoch => place,
            _ => find_place(heap, epoch)?,
        };
        place.slot.pin(&place.domain.era);
        Ok(Pin {
            domain: place.domain,
            slot: place.slot,
            owner: place.owner,
            epoch,
            _holding: Holding::begin(),
        })
    }

    /// # Panics
    ///
    /// Where [`try_new`](Self::try_new) has an error.
    #[inline(always)]
    pub(crate) fn new(heap: HeapRef) -> Pin {
        match Pin::try_new(heap) {
            Ok(pin) => pin,
            Err(error) => no_slot(&error),
        }
    }

    /// The pin, with what is found under it.
    ///
    /// As if the closure were called and the pin moved then; but what is moved is a copy that was never in memory. A pin that is loaded in
    /// larger pieces than it was stored in waits until all before it is done, the look-ups of other entries included.
    #[inline(always)]
    pub(crate) fn with<R>(self, find: impl FnOnce(&Pin) -> Option<R>) -> Option<(Pin, R)> {
        // SAFETY: of the two one is dropped and the other forgotten: this one, unless something has been found.
        let holding = unsafe { ptr::read(&raw const self._holding) };
        let moved = ManuallyDrop::new(Pin {
            _holding: holding,
            ..self
        });
        let found = find(&self)?;
        std::mem::forget(self);
        Some((ManuallyDrop::into_inner(moved), found))
    }

    /// Another pin of the same thread.
    #[inline]
    pub(crate) fn again(&self) -> Pin {
        self.check_process();
        self.slot.pin(&self.domain.era);
        Pin {
            _holding: Holding::begin(),
            ..*self
        }
    }

    /// Reads pointers by `attempt`, which loads them and, before it follows one, asks whether it may: if not, it returns `None` and is
    /// called again.
    #[inline(always)]
    pub(crate) fn read<R>(&self, attempt: impl FnMut(&Cover<'_>) -> Option<R>) -> R {
        self.slot.read(&self.domain.era, attempt)
    }

    /// Covers what is born by now, and stays linked, or known to the caller only, until the caller has returned.
    #[inline]
    pub(crate) fn cover_born(&self) {
        self.check_process();
        self.slot.cover_born(&self.domain.era);
    }

    /// Panics in a forked child: what the pin keeps is kept for the parent.
    #[inline]
    pub(crate) fn check_process(&self) {
        if self.epoch != fork_epoch() {
            copied_by_fork();
        }
    }
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        // Not in a forked child; nor if the thread ended before its own variables, and the slot is another's.
        if self.epoch == fork_epoch() && self.slot.is_of(self.owner) {
            self.slot.unpin();
        }
    }
}

#[cold]
fn no_slot(error: &Error) -> ! {
    panic!("this thread has read nothing in this heap yet, and cannot now: {error}")
}

#[cold]
pub(crate) fn copied_by_fork() -> ! {
    panic!("a guard that was made before the fork is used in the child: read the value anew")
}

/// The slot of this thread in a heap.
#[derive(Clone, Copy)]
struct Place {
    heap: HeapRef,
    epoch: u64,
    owner: u64,
    domain: &'static Domain,
    slot: &'static Slot,
}

/// The slots of a thread, to be given back at its end.
struct Places(RefCell<Vec<Place>>);

impl Drop for Places {
    fn drop(&mut self) {
        KEPT.set(None);
        let epoch = fork_epoch();
        for place in self.0.get_mut().drain(..) {
            let is_mapped = || region_of(ptr::from_ref(place.slot)).is_some();
            if place.epoch == epoch && is_mapped() {
                place.slot.release(place.owner);
            }
        }
    }
}

thread_local! {
    // The one used last. Without a destructor: it can be used to the very end of the thread.
    static KEPT: Cell<Option<Place>> = const { Cell::new(None) };
    static PLACES: Places = const { Places(RefCell::new(Vec::new())) };
}

#[cold]
fn find_place(heap: HeapRef, epoch: u64) -> Result<Place> {
    let known = PLACES.try_with(|places| {
        let mut places = places.0.borrow_mut();
        places.retain(|place| place.epoch == epoch);
        places.iter().find(|place| place.heap == heap).copied()
    });
    let place = match known {
        Ok(Some(place)) => place,
        _ => {
            let domain = Domain::of(heap)?;
            let owner = owner_word(Current.me());
            let slot = domain.claim_slot(heap, owner)?;
            let place = Place {
                heap,
                epoch,
                owner,
                domain,
                slot,
            };
            // In a thread whose variables are being destroyed, the slot is found free when the thread has ended.
            let _ = PLACES.try_with(|places| places.0.borrow_mut().push(place));
            place
        }
    };
    KEPT.set(Some(place));
    Ok(place)
}

/// A block that begins with a [`Node`], made and not linked yet. Dropped, it is freed, and what is in it dropped.
pub(crate) struct Unlinked<B> {
    heap: HeapRef,
    at: NonNull<B>,
}

impl<B> Unlinked<B> {
    /// Makes a block of a node and the contents, which come back if there is no memory.
    pub(crate) fn make<C>(
        heap: HeapRef,
        contents: C,
        assemble: impl FnOnce(Node, C) -> B,
    ) -> std::result::Result<Unlinked<B>, Rejected<C>> {
        let room = Domain::of(heap).and_then(|domain| {
            let at = heap.allocate(Layout::new::<B>())?;
            Ok((domain, at.cast::<B>()))
        });
        let (domain, at) = match room {
            Ok(room) => room,
            Err(error) => return Err(Rejected::new(contents, error)),
        };
        crash_point!("shm.epoch.block_allocated");
        // SAFETY: in bounds and aligned, by the layout; nobody else knows of it.
        unsafe { at.write(assemble(Node::born(&domain.era), contents)) };
        crash_point!("shm.epoch.block_written");
        Ok(Unlinked { heap, at })
    }

    pub(crate) fn address(&self) -> NonNull<B> {
        self.at
    }

    /// Gives the block up: it is to be linked.
    pub(crate) fn into_raw(self) -> NonNull<B> {
        let at = self.at;
        std::mem::forget(self);
        at
    }

    /// Takes the contents out, and frees the block.
    pub(crate) fn into_inner(self) -> B {
        let (heap, at) = (self.heap, self.into_raw());
        // SAFETY: written by `make`, and not used after this.
        let block = unsafe { at.read() };
        // SAFETY: allocated by `make` with this layout, and nobody knows of it.
        unsafe { heap.deallocate(at.cast(), Layout::new::<B>()) };
        block
    }
}

impl<B> std::ops::Deref for Unlinked<B> {
    type Target = B;

    fn deref(&self) -> &B {
        // SAFETY: written by `make`; nobody else knows of it.
        unsafe { self.at.as_ref() }
    }
}

impl<B> Drop for Unlinked<B> {
    fn drop(&mut self) {
        // SAFETY: written by `make`, nobody else knows of it, and it is not used after this.
        unsafe { free(self.heap, self.at) }
    }
}

/// Drops what is in a block, and frees it.
///
/// # Safety
///
/// - The block was allocated in the heap with the layout of `B`, holds a `B`, and nobody uses it any more.
pub(crate) unsafe fn free<B>(heap: HeapRef, at: NonNull<B>) {
    // SAFETY: the caller's duty.
    unsafe {
        at.drop_in_place();
        heap.deallocate(at.cast(), Layout::new::<B>());
    }
}

/// The address of a block, for a word of shared memory.
pub(crate) fn to_word<B>(at: NonNull<B>) -> u64 {
    at.as_ptr().expose_provenance() as u64
}

/// The block whose address a word holds.
pub(crate) fn from_word<B>(word: u64) -> Option<NonNull<B>> {
    NonNull::new(ptr::with_exposed_provenance_mut(word as usize))
}

/// # Safety
///
/// - A `T` that is made of atomics lies at the address, for ever.
unsafe fn published<T>(address: u64) -> &'static T {
    let at = ptr::with_exposed_provenance::<T>(address as usize);
    // SAFETY: the caller's duty.
    unsafe { &*at }
}

fn zeroed(heap: HeapRef, layout: Layout) -> Result<NonNull<u8>> {
    let at = heap.allocate(layout)?;
    // SAFETY: in bounds of the new block, of which nobody else knows.
    unsafe { at.write_bytes(0, layout.size()) };
    Ok(at)
}

/// Stores the address of a new block in `place`, or frees the block if somebody else was quicker.
fn publish(heap: HeapRef, place: &AtomicU64, at: NonNull<u8>, layout: Layout) {
    if place
        .compare_exchange(0, to_word(at), SeqCst, SeqCst)
        .is_err()
    {
        // SAFETY: allocated with this layout, and not published.
        unsafe { heap.deallocate(at, layout) };
    }
}

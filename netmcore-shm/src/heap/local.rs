//! What a thread keeps of the heaps that it allocates from: for each size class the pages that it owns, and free blocks of one of them.
//!
//! **Protocol.** A [`Cache`] is private memory of one thread, made when it first allocates from a heap. For each class it has a ring of pages that
//! the thread owns, one of which is *current*, and one word of that page's bitmaps, with its free blocks, is *open*.
//!
//! * To allocate is to take a bit of the open word, and to turn it over in the page: no locked instruction, no system call.
//! * When the open word has no more, another is opened: that of the block which the thread has freed last; of the current page; of the next pages in
//!   the ring; of pages adopted from the dead (`adopt.rs`); of a new page. Each step looks at a few pages only, so that allocating stays cheap
//!   whatever the number of pages.
//! * To free a block of one's own page is to turn its bit over. A page that becomes empty, and is not current, goes back to the pool.
//! * Others free by an atomic step. Who frees the last block of a page in that way leaves a *hint* to its owner, who gives the page back when it
//!   next opens a word, or, if it has many pages, after it has opened some more.
//! * When the thread ends, its pages are abandoned: anybody may adopt them.
//!
//! **Invariants.**
//! 1. A cache is used by its thread only, while that acts under the id for which the cache was made: not in a forked child.
//! 2. The pages in the rings are the thread's, and it lives, so nobody else adopts them.
//! 3. The free blocks of the open word are free in the page.
//!
//! **If a process dies here.** A cache is its own. A page that it was taking from the pool or giving back is given back by whoever comes by.
//!
//! # Safety
//!
//! Caches are boxes in a list of the thread's own, freed when the thread ends or when their heap is unmapped. No reference to one is kept across a call
//! that could free it. Pages are those of invariant 2.

#![allow(unsafe_code)]

use super::adopt::{ALL, Living};
use super::bitmaps::turn;
use super::note::{Holder, Kind, Note};
use super::page::{Page, Place, words};
use super::runs::{self, exchange};
use super::size_class::{self, COUNT};
use super::{HINT_ALL, HeapRef};
use crate::error::Result;
use crate::region::region_of;
use crate::sync::AtomicU64;
use netmcore_sem::current::{Standing, fork_epoch};
use netmcore_sem::{Current, OwnerId, Owners};
use netmcore_sys::crash_point;
use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// How many pages of the ring are looked at for a free block before a new page is taken. So pages with free blocks are found before
/// an eighth more has been taken than is needed.
const RING_STEPS: usize = 8;
/// How many runs of the heap are looked at for a page to adopt, likewise.
const ADOPTION_STEPS: usize = 16;

/// See the module.
#[repr(C)]
pub(super) struct Cache {
    heap: HeapRef,
    /// While it holds, the thread's id is `me`.
    standing: Cell<Standing>,
    me: OwnerId,
    /// The note of its pages.
    small: Note,
    /// The fork epoch in which it was made.
    epoch: u64,
    bins: [Bin; COUNT],
    rings: [Ring; COUNT],
    /// How many words it has opened, or tried to.
    opened: Cell<usize>,
    /// In which classes others have emptied pages, as hints have said.
    hinted: Cell<u64>,
    living: Living,
    has_large: Cell<bool>,
    next: Cell<*mut Cache>,
}

/// What else is known of the ring of a class.
struct Ring {
    page_count: Cell<usize>,
    /// What `opened` was when it was last looked through for empty pages.
    looked_at: Cell<usize>,
}

/// The pages of one class.
#[repr(align(64))]
struct Bin {
    /// Free blocks of the open word (invariant 3).
    free: Cell<u64>,
    /// Those of the open word that may be put back into `free`: not those that the dead allocated, whose marks have to go first.
    may_return: Cell<u64>,
    /// The open word of `local` in the current page.
    open: Cell<*const AtomicU64>,
    /// The first block of the open word.
    first: Cell<*mut u8>,
    open_index: Cell<usize>,
    /// The size of a block.
    block_bytes: usize,
    /// The current page, in the ring; `None` if the ring is empty.
    page: Cell<Option<Page>>,
    /// A block that the thread has freed elsewhere than in the open word.
    freed: Cell<Option<NonNull<u8>>>,
}

impl Bin {
    fn new(class: usize) -> Bin {
        Bin {
            free: Cell::new(0),
            may_return: Cell::new(0),
            open: Cell::new(ptr::null()),
            first: Cell::new(ptr::null_mut()),
            open_index: Cell::new(0),
            block_bytes: size_class::size(class),
            page: Cell::new(None),
            freed: Cell::new(None),
        }
    }

    /// Takes a free block of the open word, if there is one.
    #[inline]
    fn take(&self) -> Option<NonNull<u8>> {
        let free = self.free.get();
        if free == 0 {
            return None;
        }
        let bit = free.trailing_zeros() as usize;
        self.free.set(free & (free - 1));
        // SAFETY: in bounds: a word is open, as it has a free block; here, there: an atomic that the owner changes; gone: invariant 2.
        turn(unsafe { &*self.open.get() }, 1 << bit);
        crash_point!("shm.heap.allocated");
        let at = self.first.get().wrapping_add(bit * self.block_bytes);
        // SAFETY: the address of a block.
        Some(unsafe { NonNull::new_unchecked(at) })
    }

    /// Opens a word of a page of the ring; false if it has no free block.
    fn open(&self, class: usize, page: Page, word: usize) -> bool {
        let free = page.free(class, word);
        if free == 0 {
            return false;
        }
        self.may_return.set(!page.bits(class, word).unmark_free());
        self.free.set(free);
        self.open.set(page.local(class, word));
        self.first.set(page.blocks_of_word(class, word).as_ptr());
        self.open_index.set(word);
        self.page.set(Some(page));
        true
    }

    fn close(&self) {
        self.free.set(0);
        self.open.set(ptr::null());
    }
}

thread_local! {
    // Without a destructor: they can be used to the very end of the thread.
    /// The caches of this thread.
    static CACHES: Cell<*mut Cache> = const { Cell::new(ptr::null_mut()) };
    /// Those used last, each at the place of its heap; null, or in the list.
    static RECENT: [Cell<*const Cache>; RECENT_COUNT] =
        const { [const { Cell::new(ptr::null()) }; RECENT_COUNT] };
    static END: End = const { End };
}

const RECENT_COUNT: usize = 8;

/// The place of a heap among those used last. Regions lie 2 MiB apart, or 16 GiB.
#[inline]
fn recent_index(heap: HeapRef) -> usize {
    let address = heap.address();
    (address >> 21 ^ address >> 34) % RECENT_COUNT
}

/// Abandons the thread's pages when it ends.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        leave_all();
    }
}

/// Allocates a block of the class.
#[inline]
pub(super) fn allocate(heap: HeapRef, class: usize) -> Result<NonNull<u8>> {
    match recent(heap).and_then(|cache| cache.bins[class].take()) {
        Some(block) => Ok(block),
        None => allocate_slowly(heap, class),
    }
}

/// Frees a block of the class.
///
/// # Safety
///
/// - It is a block in use of this heap and class, and the caller has it.
#[inline]
pub(super) unsafe fn deallocate(heap: HeapRef, class: usize, block: NonNull<u8>) {
    debug_assert!(
        heap.contains(block.as_ptr()),
        "{block:p} is of another heap"
    );
    // SAFETY: the caller has the block.
    let page = unsafe { Page::of(block) };
    debug_assert!(page.class() == Some(class) && page.has_block_at(class, block));
    let place = page.place(class, block);
    debug_assert!(
        page.in_use(class, place.word) & place.bit != 0,
        "the block at {block:p} is freed twice"
    );
    match recent(heap) {
        Some(cache) if page.is_claimed_by(cache.small) => cache.free(class, page, place, block),
        _ => deallocate_slowly(heap, class, page, place, block),
    }
}

/// Frees a block in a page of somebody else, or of a heap that was not used for long.
#[inline(never)]
fn deallocate_slowly(heap: HeapRef, class: usize, page: Page, place: Place, block: NonNull<u8>) {
    match cache_of(heap) {
        Some(cache) if page.is_claimed_by(cache.small) => cache.free(class, page, place, block),
        _ => deallocate_remotely(heap, class, page, place),
    }
}

/// Frees a block in a page of somebody else.
fn deallocate_remotely(heap: HeapRef, class: usize, page: Page, place: Place) {
    // Before the block is free: behind that the page may be gone.
    let note = runs::note(heap, page.address()).map(|word| Note(word.load(Acquire)));
    let is_last = page.is_last(class, place);
    page.turn_remote(class, place);
    crash_point!("shm.heap.freed_remotely");
    if !is_last {
        return;
    }
    match note.and_then(Note::read) {
        Some((Kind::Small, Holder::Owner(owner))) => {
            heap.hint(owner).fetch_or(1 << class, Relaxed);
        }
        Some((Kind::Small, Holder::Abandoned)) => give_back_abandoned(heap, page.address()),
        _ => (),
    }
}

/// Gives back an abandoned page, if it is one, and is empty.
fn give_back_abandoned(heap: HeapRef, at: NonNull<u8>) {
    let Some(word) = runs::note(heap, at) else {
        return;
    };
    let abandoned = Note::new(Kind::Small, Holder::Abandoned);
    let mine = Note::new(Kind::Small, Holder::Owner(Current.me()));
    if exchange(word, abandoned, mine) {
        crash_point!("shm.heap.page_emptied");
        // SAFETY: the page is this thread's.
        let page = unsafe { Page::at(at) };
        if page.class().is_some_and(|class| page.is_empty(class)) {
            give_back_run(heap, page, mine);
        } else {
            exchange(word, mine, abandoned);
        }
    }
}

/// Gives an empty page back to the pool, whose note is `mine`, of this thread.
pub(super) fn give_back_run(heap: HeapRef, page: Page, mine: Note) {
    let preparing = mine.with(Kind::Preparing);
    if runs::note(heap, page.address()).is_some_and(|word| exchange(word, mine, preparing)) {
        crash_point!("shm.heap.page_left");
        // SAFETY: the run is this thread's, and nobody has a block in it.
        unsafe { runs::free(heap, page.address()) };
        crash_point!("shm.heap.page_returned");
    }
}

/// The thread's cache of the heap, if that is one of those used last. Without a call, so that allocating and freeing need no stack.
#[inline]
fn recent<'a>(heap: HeapRef) -> Option<&'a Cache> {
    let recent = RECENT.with(|recent| recent[recent_index(heap)].get());
    // SAFETY: null, or a box that this thread frees when none of its calls here is under way.
    let cache = unsafe { recent.as_ref() }?;
    (cache.heap == heap && cache.standing.get().holds()).then_some(cache)
}

/// The thread's cache of the heap, if it has one.
fn cache_of<'a>(heap: HeapRef) -> Option<&'a Cache> {
    recent(heap).or_else(|| look_up(heap, Standing::now()))
}

#[cold]
fn look_up<'a>(heap: HeapRef, standing: Standing) -> Option<&'a Cache> {
    let mut at = CACHES.get();
    // SAFETY: the list consists of boxes of this thread, freed as above, and ends with null.
    while let Some(cache) = unsafe { at.as_ref() } {
        if cache.heap == heap && cache.me == standing.id() {
            // The same id may have been given anew.
            cache.standing.set(standing);
            RECENT.with(|recent| recent[recent_index(heap)].set(at));
            return Some(cache);
        }
        at = cache.next.get();
    }
    None
}

#[cold]
fn allocate_slowly(heap: HeapRef, class: usize) -> Result<NonNull<u8>> {
    with_cache(heap, |cache| cache.allocate(class))
}

/// Calls `body` with the thread's cache of the heap.
pub(super) fn with_cache<T>(heap: HeapRef, body: impl FnOnce(&Cache) -> T) -> T {
    // First, as destructors run in the reverse order: pages are abandoned under an id that is still good.
    let standing = Standing::now();
    if END.try_with(|_| ()).is_err() {
        // The thread's variables are being destroyed: nobody would abandon the pages later.
        let cache = Cache::new(heap, standing);
        let done = body(&cache);
        cache.leave();
        return done;
    }
    if let Some(cache) = cache_of(heap) {
        return body(cache);
    }
    if let Some(former) = take_out(|cache| cache.heap == heap) {
        // Of a parent, or under owners that were replaced.
        former.leave();
    }
    let cache = Box::new(Cache::new(heap, standing));
    cache.next.set(CACHES.get());
    let cache = Box::into_raw(cache);
    CACHES.set(cache);
    // SAFETY: a box of this thread, which nothing that `body` may call frees.
    body(unsafe { &*cache })
}

/// Takes the first cache that `is_it` out of the thread's list.
fn take_out(is_it: impl Fn(&Cache) -> bool) -> Option<Box<Cache>> {
    let (mut previous, mut at) = (ptr::null_mut::<Cache>(), CACHES.get());
    // SAFETY: the list consists of boxes of this thread, and ends with null.
    while let Some(cache) = unsafe { at.as_ref() } {
        if is_it(cache) {
            // SAFETY: as above.
            match unsafe { previous.as_ref() } {
                Some(previous) => previous.next.set(cache.next.get()),
                None => CACHES.set(cache.next.get()),
            }
            RECENT.with(|recent| {
                for place in recent.iter().filter(|place| ptr::eq(place.get(), at)) {
                    place.set(ptr::null());
                }
            });
            // SAFETY: made by `with_cache` from a box, and not in the list any more.
            return Some(unsafe { Box::from_raw(at) });
        }
        (previous, at) = (at, cache.next.get());
    }
    None
}

/// Gives up all pages of this thread, in all heaps: a thread that ends in order.
pub(super) fn leave_all() {
    while let Some(cache) = take_out(|_| true) {
        cache.leave();
    }
}

/// Forgets the pages of this thread in heaps that are not mapped any more.
pub(crate) fn forget_unmapped() {
    while take_out(|cache| region_of(cache.heap.as_pointer()).is_none()).is_some() {}
}

impl Cache {
    fn new(heap: HeapRef, standing: Standing) -> Cache {
        let me = standing.id();
        Cache {
            heap,
            standing: Cell::new(standing),
            me,
            small: Note::new(Kind::Small, Holder::Owner(me)),
            epoch: fork_epoch(),
            bins: std::array::from_fn(Bin::new),
            rings: [const {
                Ring {
                    page_count: Cell::new(0),
                    looked_at: Cell::new(0),
                }
            }; COUNT],
            opened: Cell::new(0),
            hinted: Cell::new(0),
            living: Living::new(),
            has_large: Cell::new(false),
            next: Cell::new(ptr::null_mut()),
        }
    }

    pub(super) fn heap(&self) -> HeapRef {
        self.heap
    }

    pub(super) fn me(&self) -> OwnerId {
        self.me
    }

    pub(super) fn living(&self) -> &Living {
        &self.living
    }

    /// The note of a page of this thread.
    pub(super) fn small(&self) -> Note {
        self.small
    }

    /// The note of a run of this thread.
    pub(super) fn note(&self, kind: Kind) -> Note {
        Note::new(kind, Holder::Owner(self.me))
    }

    /// Remembers that the thread has large blocks.
    pub(super) fn has_large(&self) {
        self.has_large.set(true);
    }

    fn allocate(&self, class: usize) -> Result<NonNull<u8>> {
        let bin = &self.bins[class];
        if let Some(block) = bin.take() {
            return Ok(block);
        }
        self.refill(class)?;
        Ok(bin.take().expect("a word is open that has a free block"))
    }

    /// Frees a block of one of its pages.
    #[inline]
    fn free(&self, class: usize, page: Page, place: Place, block: NonNull<u8>) {
        let bin = &self.bins[class];
        page.turn_local(class, place);
        crash_point!("shm.heap.freed");
        if ptr::eq(page.local(class, place.word), bin.open.get()) {
            let freed = place.bit & bin.may_return.get();
            bin.free.set(bin.free.get() | freed);
            return;
        }
        bin.freed.set(Some(block));
        if bin.page.get() != Some(page) && page.in_use(class, place.word) == 0 {
            self.give_back_if_empty(class, page);
        }
    }

    #[cold]
    fn give_back_if_empty(&self, class: usize, page: Page) {
        if page.is_empty(class) {
            self.give_back(class, page);
        }
    }

    /// Opens a word that has free blocks, of a page of the class.
    fn refill(&self, class: usize) -> Result<()> {
        let bin = &self.bins[class];
        if let Some(block) = bin.freed.take() {
            // SAFETY: its page is this thread's: a page that is given back takes the block along.
            let page = unsafe { Page::of(block) };
            if bin.open(class, page, page.place(class, block).word) {
                return Ok(());
            }
        }
        self.heed_hints();
        if self.open_in_ring(class, RING_STEPS) {
            return Ok(());
        }
        if self.adopt(ADOPTION_STEPS) > 0 && self.open_in_ring(class, RING_STEPS) {
            return Ok(());
        }
        let Err(error) = self.add_page(class) else {
            return Ok(());
        };
        self.reclaim();
        if self.open_in_ring(class, ALL) || self.add_page(class).is_ok() {
            return Ok(());
        }
        Err(error)
    }

    /// Opens a word of the current page, or of one of the next in the ring.
    fn open_in_ring(&self, class: usize, steps: usize) -> bool {
        let bin = &self.bins[class];
        let Some(current) = bin.page.get() else {
            return false;
        };
        // The open word last: what others free in it meanwhile is collected in one go.
        let first = bin.open_index.get() + usize::from(!bin.open.get().is_null());
        let mut in_turn = (0..words(class)).map(|step| (first + step) % words(class));
        if in_turn.any(|word| bin.open(class, current, word)) {
            return true;
        }
        let mut page = current;
        for _ in 0..steps {
            page = page.next();
            if page == current {
                break;
            }
            if (0..words(class)).any(|word| bin.open(class, page, word)) {
                return true;
            }
        }
        // Next time the pages behind are looked at.
        bin.close();
        bin.page.set(Some(page));
        bin.open_index.set(0);
        false
    }

    /// Takes a new page, and opens it.
    fn add_page(&self, class: usize) -> Result<()> {
        let at = runs::allocate(self.heap, 1, self.note(Kind::Preparing))?;
        crash_point!("shm.heap.page_taken");
        // SAFETY: the run is this thread's.
        let page = unsafe { Page::at(at) };
        page.prepare(class);
        let word = runs::note(self.heap, at).expect("the run is this thread's");
        word.store(self.small.0, Release);
        crash_point!("shm.heap.page_made");
        self.link(class, page);
        self.bins[class].open(class, page, 0);
        Ok(())
    }

    /// Puts a page that has become this thread's into its ring, to be looked at next.
    pub(super) fn link(&self, class: usize, page: Page) {
        page.set_claim(Some(self.small));
        let page_count = &self.rings[class].page_count;
        page_count.set(page_count.get() + 1);
        let bin = &self.bins[class];
        match bin.page.get() {
            Some(current) => page.link_behind(current),
            None => {
                page.link_alone();
                bin.close();
                bin.page.set(Some(page));
                bin.open_index.set(0);
            }
        }
    }

    /// Takes a page out of its ring, for good.
    fn unlink(&self, class: usize, page: Page) {
        page.set_claim(None);
        let page_count = &self.rings[class].page_count;
        page_count.set(page_count.get() - 1);
        let bin = &self.bins[class];
        let next = page.unlink();
        if bin.page.get() == Some(page) {
            bin.close();
            bin.page.set(next);
            bin.open_index.set(0);
        }
        // SAFETY: the block lies in a page of this thread.
        let is_in_page = |block: &NonNull<u8>| unsafe { Page::of(*block) } == page;
        bin.freed
            .set(bin.freed.get().filter(|block| !is_in_page(block)));
    }

    /// Gives an empty page of a ring back.
    fn give_back(&self, class: usize, page: Page) {
        self.unlink(class, page);
        give_back_run(self.heap, page, self.small);
    }

    /// Gives back pages that others have emptied. Many pages are not looked through for each that is emptied: only once so many words have been
    /// opened since the last time that a few pages come to each.
    fn heed_hints(&self) {
        let opened = self.opened.get().wrapping_add(1);
        self.opened.set(opened);
        let hints = self.heap.hint(self.me);
        let mut hinted = self.hinted.get();
        if hints.load(Relaxed) != 0 {
            hinted |= hints.swap(0, Acquire);
        }
        if hinted == 0 {
            return;
        }
        let is_urgent = hinted == HINT_ALL;
        let mut later = 0;
        for class in (0..COUNT).filter(|class| hinted >> class & 1 != 0) {
            let Ring {
                page_count,
                looked_at,
            } = &self.rings[class];
            let may_look_at = opened.wrapping_sub(looked_at.get()) * RING_STEPS;
            if is_urgent || page_count.get() <= may_look_at {
                looked_at.set(opened);
                self.give_back_empty(class);
            } else {
                later |= 1 << class;
            }
        }
        self.hinted.set(later);
    }

    /// Gives back the empty pages of a class but the current one. Returns how many.
    fn give_back_empty(&self, class: usize) -> usize {
        let Some(current) = self.bins[class].page.get() else {
            return 0;
        };
        let (mut page, mut count) = (current.next(), 0);
        while page != current {
            let next = page.next();
            if page.is_empty(class) {
                self.give_back(class, page);
                count += 1;
            }
            page = next;
        }
        count
    }

    /// Gives back all empty pages of this thread and of the dead. Others are asked to do the same when they next have time. Returns how many.
    pub(super) fn reclaim(&self) -> usize {
        let mut count = self.adopt(ALL);
        for class in 0..COUNT {
            count += self.give_back_empty(class);
            let bin = &self.bins[class];
            if let Some(page) = bin.page.get().filter(|page| page.is_empty(class)) {
                self.give_back(class, page);
                count += 1;
            }
        }
        self.heap.hint_all();
        count
    }

    /// Gives up its pages, if they are this process's to give up.
    fn leave(&self) {
        let is_mine = self.epoch == fork_epoch() && Current.is_alive(self.me);
        if !is_mine || region_of(self.heap.as_pointer()).is_none() {
            return;
        }
        let abandoned = |kind| Note::new(kind, Holder::Abandoned);
        for class in 0..COUNT {
            while let Some(page) = self.bins[class].page.get() {
                if page.is_empty(class) {
                    self.give_back(class, page);
                } else {
                    self.unlink(class, page);
                    if let Some(word) = runs::note(self.heap, page.address()) {
                        exchange(word, self.small, abandoned(Kind::Small));
                    }
                    crash_point!("shm.heap.page_abandoned");
                }
            }
        }
        if self.has_large.get() {
            runs::visit(self.heap, ALL, |run| {
                exchange(run.note, self.note(Kind::Large), abandoned(Kind::Large));
            });
        }
    }

    /// Checks invariants 2 and 3 for a class. Returns how many pages are in its ring, or the address of the page that breaks them.
    pub(super) fn check(&self, class: usize) -> std::result::Result<usize, NonNull<u8>> {
        let bin = &self.bins[class];
        let Some(current) = bin.page.get() else {
            return Ok(0);
        };
        // Before anything of a page is looked at: a damaged link may name any address.
        let is_mine = |page: &Page| {
            let note = runs::note(self.heap, page.address()).map(|word| Note(word.load(Relaxed)));
            note == Some(self.small)
                && page.class() == Some(class)
                && page.is_claimed_by(self.small)
        };
        let (mut page, mut page_count) = (Some(current).filter(is_mine), 0);
        loop {
            let this = page.ok_or(current.address())?;
            let [_, next] = this.neighbours();
            // Where each page is the one before its next, the way leads back to the first.
            page = next
                .filter(is_mine)
                .filter(|next| next.neighbours()[0] == Some(this));
            page_count += 1;
            if page.ok_or(this.address())? == current {
                break;
            }
        }
        let free = bin.free.get();
        let is_open = || ptr::eq(bin.open.get(), current.local(class, bin.open_index.get()));
        let is_free = || free & !current.free(class, bin.open_index.get()) == 0;
        let is_counted = self.rings[class].page_count.get() == page_count;
        match is_counted && (free == 0 || is_open() && is_free()) {
            true => Ok(page_count),
            false => Err(current.address()),
        }
    }
}

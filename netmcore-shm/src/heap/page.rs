//! A page of small blocks of one size: which of them are in use is said by two bits for each.
//!
//! **Protocol.** A page begins with a header: its class, the links of its owner's ring, and three bitmaps with a bit for each block, which `bitmaps.rs`
//! is about: to allocate or free a block is to turn one bit over.
//!
//! **Invariants.**
//! 1. The bits of blocks that do not exist are 0.
//! 2. A block is freed by the one that has it, so nobody else turns its bits over at that time.
//! 3. While a block of it is in use, a page is not given back.
//! 4. A page claimed by a thread is owned by it. An owner sets its claim after it has become the owner, and takes it away before it
//!    gives the page up; nobody else writes it.
//!
//! **If a process dies here.** Each block is in use or free. The links are the owner's own: who adopts the page sets them anew.
//!
//! **Not here.** Who owns a page: `note.rs`. Which one to allocate from: `local.rs`.
//!
//! # Safety
//!
//! A [`Page`] is the address of mapped memory of one page, of which the header is accessed, as atomics only. It is reached by an owner of the page,
//! or by somebody who has a block in it (invariant 3): others may meet a page that was given back, whose memory is gone, and look at a copy.

#![allow(unsafe_code)]

use super::bitmaps::{Word, turn};
use super::note::Note;
use super::size_class::{self, COUNT};
use crate::sync;
use netmcore_sys::Errno;
use netmcore_sys::map::copy_if_present;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

/// The length of a page, and its alignment.
pub(super) const PAGE_BYTES: usize = 64 << 10;

/// Beside the class in the first word.
const MAGIC: u64 = u64::from_be_bytes(*b"nmpage1\0");

/// What comes before the bitmaps.
#[repr(C)]
struct Header {
    /// [`MAGIC`] and the class.
    class: AtomicU64,
    /// The addresses of the neighbours in the ring of its owner.
    next: AtomicUsize,
    previous: AtomicUsize,
    /// The note of its owner, or 0: says quickly what is true.
    claim: AtomicU64,
}

const LOCAL_AT: usize = 32;
const _: () = assert!(size_of::<Header>() == LOCAL_AT);

/// Bitmaps of different writers, and blocks, lie in different cache lines.
const LINE_BYTES: usize = 64;

/// Where things lie in the pages of a class.
struct Geometry {
    blocks: u16,
    words: u16,
    remote_at: u16,
    first_at: u16,
}

const GEOMETRIES: [Geometry; COUNT] = {
    let mut geometries = [const {
        Geometry {
            blocks: 0,
            words: 0,
            remote_at: 0,
            first_at: 0,
        }
    }; COUNT];
    let mut class = 0;
    while class < COUNT {
        geometries[class] = geometry(class);
        class += 1;
    }
    geometries
};

const fn geometry(class: usize) -> Geometry {
    let size = size_class::size(class);
    let mut blocks = PAGE_BYTES / size;
    loop {
        let words = blocks.div_ceil(64);
        let remote_at = (LOCAL_AT + 2 * 8 * words).next_multiple_of(LINE_BYTES);
        let header_bytes = (remote_at + 8 * words).next_multiple_of(LINE_BYTES);
        let first_at = header_bytes.next_multiple_of(size_class::natural_align(class));
        if first_at + blocks * size <= PAGE_BYTES {
            return Geometry {
                blocks: blocks as u16,
                words: words as u16,
                remote_at: remote_at as u16,
                first_at: first_at as u16,
            };
        }
        blocks -= 1;
    }
}

/// How many blocks a page of the class has.
pub(super) const fn blocks(class: usize) -> usize {
    GEOMETRIES[class].blocks as usize
}

/// How many words each bitmap of a page of the class has.
#[inline]
pub(super) fn words(class: usize) -> usize {
    usize::from(GEOMETRIES[class].words)
}

/// The bits of a word of a bitmap that stand for blocks.
fn existing(class: usize, word: usize) -> u64 {
    match blocks(class) - 64 * word {
        count @ 0..64 => (1 << count) - 1,
        _ => u64::MAX,
    }
}

/// A page of small blocks, by its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Page(NonNull<u8>);

/// The longest header with its bitmaps: that of the smallest blocks.
const HEADER_MAX_BYTES: usize = GEOMETRIES[0].first_at as usize;

/// A copy of the header of a page that may be anybody's, or not be there any more.
pub(super) struct Copied(Box<[u64; HEADER_MAX_BYTES / 8]>);

impl Copied {
    pub(super) fn new() -> Copied {
        Copied(Box::new([0; HEADER_MAX_BYTES / 8]))
    }

    /// Copies the header of the page at `at`; `None` if it is not there.
    pub(super) fn copy(&mut self, at: NonNull<u8>) -> Option<Page> {
        let words: *mut [u64; HEADER_MAX_BYTES / 8] = &raw mut *self.0;
        // SAFETY: plain words, which are as many bytes.
        let bytes = unsafe { &mut *words.cast::<[u8; HEADER_MAX_BYTES]>() };
        match copy_if_present(at.as_ptr(), bytes) {
            Ok(()) => Some(Page(NonNull::from(bytes).cast())),
            Err(error) if error.errno == Errno::EFAULT => None,
            // Not allowed here: the page itself, which is there but for the rarest of moments.
            Err(_) => Some(Page(at)),
        }
    }
}

/// A block of a page: the word of the bitmaps, and its bit there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) word: usize,
    pub(super) bit: u64,
}

impl Page {
    /// The page at that address.
    ///
    /// # Safety
    ///
    /// - It is a multiple of [`PAGE_BYTES`], and the memory of the page is mapped as long as anybody uses it.
    /// - The caller owns the page or is preparing it, or has a block in it.
    pub(super) unsafe fn at(at: NonNull<u8>) -> Page {
        debug_assert!(at.as_ptr().addr().is_multiple_of(PAGE_BYTES));
        Page(at)
    }

    /// The page that the block lies in.
    ///
    /// # Safety
    ///
    /// - It is a small block that the caller has.
    #[inline]
    pub(super) unsafe fn of(block: NonNull<u8>) -> Page {
        let inside = block.as_ptr().addr() % PAGE_BYTES;
        // SAFETY: the page is aligned to its length, so this is its start.
        Page(unsafe { block.sub(inside) })
    }

    /// The address.
    #[inline]
    pub(super) fn address(self) -> NonNull<u8> {
        self.0
    }

    /// Makes it a page of the class with all blocks free. It is nobody else's yet.
    pub(super) fn prepare(self, class: usize) {
        for word in 0..words(class) {
            let Word {
                local,
                remote,
                dead,
            } = self.bits(class, word);
            for bits in [local, remote, dead] {
                bits.store(0, Relaxed);
            }
        }
        self.set_claim(None);
        self.header().class.store(MAGIC | class as u64, Relaxed);
    }

    /// Its class; `None` if it is no page.
    pub(super) fn class(self) -> Option<usize> {
        let class = (self.header().class.load(Relaxed) ^ MAGIC) as usize;
        (class < COUNT).then_some(class)
    }

    /// Whether the thread of that note claims it, and so owns it (invariant 4).
    #[inline]
    pub(super) fn is_claimed_by(self, mine: Note) -> bool {
        self.claim() == mine
    }

    /// Claims it for its owner, or takes the claim away.
    pub(super) fn set_claim(self, note: Option<Note>) {
        let claim = note.map_or(0, |note| note.0);
        self.header().claim.store(claim, Relaxed);
    }

    /// Where the block is in the bitmaps.
    #[inline]
    pub(super) fn place(self, class: usize, block: NonNull<u8>) -> Place {
        let first = self.0.as_ptr().addr() + usize::from(GEOMETRIES[class].first_at);
        let index = size_class::index_at(class, block.as_ptr().addr() - first);
        Place {
            word: index / 64,
            bit: 1 << (index % 64),
        }
    }

    /// The first of the 64 blocks of a word of the bitmaps.
    pub(super) fn blocks_of_word(self, class: usize, word: usize) -> NonNull<u8> {
        let offset = usize::from(GEOMETRIES[class].first_at) + 64 * word * size_class::size(class);
        // SAFETY: in bounds of the page, which has a block of that word.
        unsafe { self.0.add(offset) }
    }

    /// Whether a block, if it is at all, begins at that address.
    pub(super) fn has_block_at(self, class: usize, block: NonNull<u8>) -> bool {
        let first = self.0.as_ptr().addr() + usize::from(GEOMETRIES[class].first_at);
        let size = size_class::size(class);
        block
            .as_ptr()
            .addr()
            .checked_sub(first)
            .is_some_and(|offset| offset.is_multiple_of(size) && offset / size < blocks(class))
    }

    /// Turns the bit over, of a block that the owner, who calls this, allocates or frees. The commit.
    #[inline]
    pub(super) fn turn_local(self, class: usize, place: Place) {
        turn(self.local(class, place.word), place.bit);
    }

    /// Turns the bit over, of a block that the caller, who need not be the owner, frees. The commit.
    pub(super) fn turn_remote(self, class: usize, place: Place) {
        self.bits(class, place.word).turn_remote(place.bit);
    }

    /// The blocks in use of a word. Those that others free at this moment may be among them.
    #[inline]
    pub(super) fn in_use(self, class: usize, word: usize) -> u64 {
        self.bits(class, word).in_use()
    }

    /// The free blocks of a word. Only the owner changes that to the contrary.
    pub(super) fn free(self, class: usize, word: usize) -> u64 {
        !self.in_use(class, word) & existing(class, word)
    }

    /// Whether no block is in use. For an owner it stays so.
    pub(super) fn is_empty(self, class: usize) -> bool {
        (0..words(class)).all(|word| self.in_use(class, word) == 0)
    }

    /// Whether no block but this is in use, as far as one can see who has it.
    pub(super) fn is_last(self, class: usize, place: Place) -> bool {
        (0..words(class)).all(|word| {
            let mine = if word == place.word { place.bit } else { 0 };
            self.in_use(class, word) == mine
        })
    }

    /// Notes that all blocks in use were allocated by somebody who has died. For a new owner.
    pub(super) fn mark_dead(self, class: usize) {
        (0..words(class)).for_each(|word| self.bits(class, word).mark_dead());
    }

    /// Whether bits are 1 that stand for no block (invariant 1).
    pub(super) fn has_stray_bits(self, class: usize) -> bool {
        (0..words(class)).any(|word| {
            let Word {
                local,
                remote,
                dead,
            } = self.bits(class, word);
            let all = local.load(Relaxed) | remote.load(Relaxed) | dead.load(Relaxed);
            all & !existing(class, word) != 0
        })
    }

    /// The next page in the ring.
    pub(super) fn next(self) -> Page {
        linked(&self.header().next).expect("the pages of an owner are linked")
    }

    /// The pages before and behind it in the ring, as the links say, which may be damaged.
    pub(super) fn neighbours(self) -> [Option<Page>; 2] {
        [linked(&self.header().previous), linked(&self.header().next)]
    }

    /// The note of the thread that claims it; 0 if none does.
    #[inline]
    pub(super) fn claim(self) -> Note {
        Note(self.header().claim.load(Relaxed))
    }

    /// Makes it a ring of its own.
    pub(super) fn link_alone(self) {
        self.header().next.store(self.exposed(), Relaxed);
        self.header().previous.store(self.exposed(), Relaxed);
    }

    /// Puts it into the ring of the same owner, behind `other`.
    pub(super) fn link_behind(self, other: Page) {
        let next = other.next();
        self.header().next.store(next.exposed(), Relaxed);
        self.header().previous.store(other.exposed(), Relaxed);
        other.header().next.store(self.exposed(), Relaxed);
        next.header().previous.store(self.exposed(), Relaxed);
    }

    /// Takes it out of its ring, and tells the page that was behind it, if any other is.
    pub(super) fn unlink(self) -> Option<Page> {
        let [previous, next] = self
            .neighbours()
            .map(|page| page.expect("the pages of an owner are linked"));
        next.header().previous.store(previous.exposed(), Relaxed);
        previous.header().next.store(next.exposed(), Relaxed);
        (next != self).then_some(next)
    }

    fn exposed(self) -> usize {
        self.0.as_ptr().expose_provenance()
    }

    fn header(self) -> &'static Header {
        // SAFETY: in bounds, aligned; here, there: atomics; gone: whoever has a `Page` may access its header.
        unsafe { self.0.cast().as_ref() }
    }

    /// A word of each bitmap.
    #[inline]
    pub(super) fn bits(self, class: usize, word: usize) -> Word<'static> {
        Word {
            local: self.local(class, word),
            remote: self.word_at(usize::from(GEOMETRIES[class].remote_at), class, word),
            dead: self.word_at(LOCAL_AT + 8 * words(class), class, word),
        }
    }

    #[inline]
    pub(super) fn local(self, class: usize, word: usize) -> &'static sync::AtomicU64 {
        self.word_at(LOCAL_AT, class, word)
    }

    #[inline]
    fn word_at(self, bitmap_at: usize, class: usize, word: usize) -> &'static sync::AtomicU64 {
        debug_assert!(word < words(class));
        // SAFETY: in bounds: the bitmap has so many words and lies in the page, aligned; otherwise as for the header.
        unsafe { self.0.add(bitmap_at + 8 * word).cast().as_ref() }
    }
}

/// The neighbour that a link names.
fn linked(link: &AtomicUsize) -> Option<Page> {
    let at = std::ptr::with_exposed_provenance_mut(link.load(Relaxed));
    NonNull::new(at).map(Page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_the_page_behind_the_header() {
        for (class, geometry) in GEOMETRIES.iter().enumerate() {
            let &Geometry {
                blocks,
                words,
                remote_at,
                first_at,
            } = geometry;
            let (blocks, words) = (usize::from(blocks), usize::from(words));
            let (remote_at, first_at) = (usize::from(remote_at), usize::from(first_at));
            let size = size_class::size(class);
            assert!(LOCAL_AT + 16 * words <= remote_at);
            assert!(remote_at + 8 * words <= first_at);
            assert!(first_at.is_multiple_of(size_class::natural_align(class)));
            assert!(first_at + blocks * size <= PAGE_BYTES);
            assert!((blocks - 1) / 64 < words && blocks >= 2);
            let used = blocks * size;
            let least = if size < 16_384 { 7 } else { 6 };
            assert!(used * 8 >= PAGE_BYTES * least, "{size}: {used} of a page");
        }
    }
}

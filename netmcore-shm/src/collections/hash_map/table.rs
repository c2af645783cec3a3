//! A table of words, each of which has the address of an item, and the items.
//!
//! **Protocol.** Open addressing: an item is in the first place that was free on its path, which begins where its hash says and goes
//! upwards, around the end. It stays there until it is unlinked.
//!
//! | word | means | next |
//! |---|---|---|
//! | 0 | empty: no path leads beyond | item |
//! | 1 | was unlinked; paths lead beyond | item, or empty if the word behind is empty |
//! | tag, address | an item with this tag, 16 bits of its hash | another item of the same key, 1, or empty if the word behind is empty |
//!
//! Each arrow is one store, by the holder of the shard's lock. A table that was replaced does not change any more. Behind the words lie as many
//! numbers, of which that of an item is the lower half of its hash, stored before its word: with it and the tag, a larger table is made
//! without a look at the items, which would have to be fetched from all over the memory.
//!
//! **Invariants.**
//! 1. One word at least is empty.
//! 2. Of two items in a table none has the same key.
//! 3. Tags are odd, so that 1 and 0 have none.
//!
//! **If a process dies here.** Every store leaves a table.
//!
//! # Safety
//!
//! A table is a header with so many words and numbers behind it as the header says. Addresses in words are of items; who follows them has the lock or a pin.

#![allow(unsafe_code)]

use crate::epoch::retired::Node;
use crate::epoch::{self, Domain, from_word, to_word};
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use std::alloc::Layout;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

pub(super) const EMPTY: u64 = 0;
pub(super) const WAS_UNLINKED: u64 = 1;
const TAG_SHIFT: u32 = 48;
const ADDRESS: u64 = (1 << TAG_SHIFT) - 1;
/// The kinds of blocks in the list of the retired, beside items.
pub(super) const KIND_TABLE: u64 = 1;
pub(super) const KIND_TABLE_WITH_ITEMS: u64 = 2;

const MIN_CAPACITY: usize = 8;

/// A key and its value. They are not changed while others can reach them, but for what is atomic in the value.
#[repr(C)]
pub(super) struct Item<K, V> {
    pub(super) node: Node,
    /// The birth of the first item that had this very key; 0 if another item has it now, by a copy of its bytes.
    key_birth: AtomicU64,
    key: ManuallyDrop<K>,
    pub(super) value: V,
}

impl<K, V> Item<K, V> {
    pub(super) fn new(node: Node, key: K, value: V) -> Item<K, V> {
        Item {
            key_birth: AtomicU64::new(node.birth()),
            node,
            key: ManuallyDrop::new(key),
            value,
        }
    }

    /// One that has the bytes of another's key. The key is not its own until [`inherit`](Self::inherit).
    pub(super) fn with_key_of(node: Node, other: &Item<K, V>, value: V) -> Item<K, V> {
        // SAFETY: two copies of one key, of which one is dropped: that of the item whose `key_birth` is not 0.
        let key = unsafe { (&raw const other.key).read() };
        Item {
            node,
            key_birth: AtomicU64::new(0),
            key,
            value,
        }
    }

    #[inline]
    pub(super) fn key(&self) -> &K {
        &self.key
    }

    /// Before it takes the place of the other one: it has the key, as soon as the other [gives it up](Self::give_up_key).
    pub(super) fn inherit(&self, other: &Item<K, V>) {
        self.key_birth.store(other.key_birth.load(Relaxed), Relaxed);
    }

    /// After it was replaced by one that has its key.
    pub(super) fn give_up_key(&self) {
        self.key_birth.store(0, Relaxed);
    }

    /// Before it is retired. Readers of its predecessors may use its key, if that owns memory.
    pub(super) fn consider_predecessors(&self) {
        let birth = self.key_birth.load(Relaxed);
        if std::mem::needs_drop::<K>() && birth != 0 {
            self.node.is_as_old_as(birth);
        }
    }

    pub(super) fn into_parts(self) -> (K, V) {
        let this = ManuallyDrop::new(self);
        // SAFETY: neither is used here after this, nor dropped.
        unsafe {
            let key = (&raw const this.key).read();
            let value = (&raw const this.value).read();
            (ManuallyDrop::into_inner(key), value)
        }
    }
}

impl<K, V> Drop for Item<K, V> {
    fn drop(&mut self) {
        if self.key_birth.load(Relaxed) != 0 {
            // SAFETY: it is not used after this, and no other item drops it.
            unsafe { ManuallyDrop::drop(&mut self.key) };
        }
    }
}

/// The word of an item.
pub(super) fn word_of<K, V>(hash: u64, item: NonNull<Item<K, V>>) -> u64 {
    let address = to_word(item);
    debug_assert!(address & !ADDRESS == 0, "an address of more than 48 bits");
    tag_of(hash) << TAG_SHIFT | address
}

/// The item of a word, if it has one.
#[inline]
pub(super) fn item_of<K, V>(word: u64) -> Option<NonNull<Item<K, V>>> {
    if word >> TAG_SHIFT == 0 {
        return None;
    }
    from_word(word & ADDRESS)
}

/// Bits 40 to 55: those below say where the path begins, those above which shard.
#[inline]
fn tag_of(hash: u64) -> u64 {
    hash >> 40 & 0xffff | 1
}

#[inline]
pub(super) fn has_tag(word: u64, hash: u64) -> bool {
    word >> TAG_SHIFT == tag_of(hash)
}

/// The header of a table; the words lie behind, and the numbers behind these.
#[repr(C)]
pub(super) struct Table {
    pub(super) node: Node,
    capacity: AtomicU64,
}

impl Table {
    fn layout(capacity: usize) -> Result<Layout> {
        let too_long = || Error::OutOfPoolMemory {
            wanted_bytes: u64::MAX,
            free_bytes: 0,
            largest_free_bytes: 0,
        };
        let behind = capacity.checked_mul(size_of::<AtomicU64>() + size_of::<AtomicU32>());
        let whole = behind.and_then(|behind| behind.checked_add(size_of::<Table>()));
        let whole = whole.filter(|_| u32::try_from(capacity).is_ok());
        let whole =
            whole.and_then(|bytes| Layout::from_size_align(bytes, align_of::<Table>()).ok());
        whole.ok_or_else(too_long)
    }

    /// The capacity of a table for so many items, with as many again to come.
    pub(super) fn capacity_for(items: usize) -> usize {
        (items * 2).next_power_of_two().max(MIN_CAPACITY)
    }

    /// Makes an empty table.
    pub(super) fn make(heap: HeapRef, capacity: usize) -> Result<NonNull<Table>> {
        let domain = Domain::of(heap)?;
        let layout = Table::layout(capacity)?;
        let at = heap.allocate(layout)?;
        let table = at.cast::<Table>();
        let header = Table {
            node: Node::born(domain.era()),
            capacity: AtomicU64::new(capacity as u64),
        };
        // SAFETY: in bounds and aligned, by the layout; nobody else knows of it.
        unsafe {
            at.write_bytes(0, layout.size());
            table.write(header);
        }
        Ok(table)
    }

    /// Frees a table, not its items.
    ///
    /// # Safety
    ///
    /// - `make` made it in this heap, and nobody uses it any more.
    pub(super) unsafe fn free(heap: HeapRef, table: NonNull<Table>) {
        // SAFETY: valid, as the caller says.
        let capacity = unsafe { table.as_ref() }.capacity();
        if let Ok(layout) = Table::layout(capacity) {
            // SAFETY: the layout it was allocated with; the rest is the caller's duty.
            unsafe { heap.deallocate(table.cast(), layout) };
        }
    }

    /// Frees the items of a table that was retired with them, one after the other, so that somebody else can go on.
    ///
    /// # Safety
    ///
    /// - The items are of these types and in this heap; nobody uses them, and nobody else frees them at the same time.
    pub(super) unsafe fn free_items<K, V>(&self, heap: HeapRef) {
        for word in self.words() {
            if let Some(item) = item_of::<K, V>(word.load(Relaxed)) {
                word.store(EMPTY, SeqCst);
                // SAFETY: the caller's duty; its word is gone.
                unsafe { epoch::free(heap, item) };
            }
        }
    }

    #[inline]
    pub(super) fn capacity(&self) -> usize {
        self.capacity.load(Relaxed) as usize
    }

    /// Whether so many words may be in use.
    pub(super) fn has_room_for(&self, used: usize) -> bool {
        used <= self.capacity() / 4 * 3
    }

    #[inline]
    pub(super) fn words(&self) -> &[AtomicU64] {
        let words = std::ptr::from_ref(self).addr() + size_of::<Table>();
        let words = std::ptr::with_exposed_provenance::<AtomicU64>(words);
        // SAFETY: in bounds: they lie behind the header; here, there, gone: atomics.
        unsafe { std::slice::from_raw_parts(words, self.capacity()) }
    }

    fn numbers(&self) -> &[AtomicU32] {
        let words = self.words().as_ptr_range();
        let numbers = std::ptr::with_exposed_provenance::<AtomicU32>(words.end.addr());
        // SAFETY: in bounds: they lie behind the words; here, there, gone: atomics.
        unsafe { std::slice::from_raw_parts(numbers, self.capacity()) }
    }

    /// The words on the path of a hash, around the table for ever.
    #[inline]
    pub(super) fn path(&self, hash: u64) -> impl Iterator<Item = (usize, &AtomicU64)> {
        let words = self.words();
        let mask = words.len() - 1;
        let mut index = hash as usize & mask;
        std::iter::from_fn(move || {
            let at = index & mask;
            index = at + 1;
            Some((at, &words[at]))
        })
    }

    /// Links an item: its word with this tag goes to the first place on its path that has none. In a table that nobody else changes.
    /// Says whether the word was empty.
    pub(super) fn link(&self, hash: u64, word: u64) -> bool {
        let mut path = self.path(hash);
        let free = path.find(|(_, word)| word.load(Relaxed) >> TAG_SHIFT == 0);
        let (index, place) = free.expect("a path goes round for ever, and one word is empty");
        let was_empty = place.load(Relaxed) == EMPTY;
        self.numbers()[index].store(hash as u32, Relaxed);
        place.store(word, SeqCst);
        was_empty
    }

    /// Links all items of another table in this one, which nobody else knows of.
    pub(super) fn copy(&self, other: &Table) {
        let words = other.words().iter().zip(other.numbers());
        for (word, number) in words {
            let word = word.load(Relaxed);
            if word >> TAG_SHIFT != 0 {
                self.link(u64::from(number.load(Relaxed)), word);
            }
        }
    }

    /// Takes the item out of its word. Gives how many words are in use less.
    pub(super) fn unlink(&self, index: usize) -> usize {
        let words = self.words();
        let at = |index: usize| &words[index & (words.len() - 1)];
        if at(index + 1).load(Relaxed) != EMPTY {
            at(index).store(WAS_UNLINKED, SeqCst);
            return 0;
        }
        // No path leads beyond. Nor beyond those before it that only lead here.
        at(index).store(EMPTY, SeqCst);
        let mut freed = 1;
        let mut before = index.wrapping_sub(1);
        while at(before).load(Relaxed) == WAS_UNLINKED {
            at(before).store(EMPTY, SeqCst);
            freed += 1;
            before = before.wrapping_sub(1);
        }
        freed
    }
}

//! A part of a map: its lock, its table, and what is done to an entry under the lock.
//!
//! **Protocol.** The word `table` has the address of the table, or 0. Whoever has the lock changes words of the table, or makes another table
//! and stores its address. The rest are counts, which can be made anew.
//!
//! | step | the process died after it: what the next holder of the lock does |
//! |---|---|
//! | locked | counts items and words in use |
//! | an item was made | the item is lost: it stays allocated until the heap is gone; as above |
//! | its word was stored: this is the commit | as above |
//! | the item that was there before is in the list of the retired | as above |
//! | a table is being built: its address is in `building` | frees it; as above |
//! | the address of the new table was stored: this is the commit | `building` := 0; the old table is lost; as above |
//! | cleared: `table` := 0 | what was there is lost if it is not yet in the list; as above |
//!
//! **Invariants.**
//! 1. Words and the table are changed by the holder of the lock only. `len` and `used` are right when the lock is free, unless its holder died.
//! 2. An item is linked in one word of one shard, or it was retired, or nobody but its maker knows of it.
//! 3. `building` has a table that nobody can reach, or the one that is in `table`.
//!
//! **If a process dies here.** The table above.
//!
//! # Safety
//!
//! Addresses in `table` and in words are valid for the holder of the lock: what is linked is not freed.

#![allow(unsafe_code)]

use super::inside::{Inside, is_inside};
use super::table::{
    EMPTY, Item, KIND_TABLE, KIND_TABLE_WITH_ITEMS, Table, has_tag, item_of, word_of,
};
use super::{Linked, ShmHashMap};
use crate::epoch::retired::{KIND_MASK, RetiredList};
use crate::epoch::{self, Domain, Unlinked, from_word, to_word};
use crate::error::{Corrupt, Error, Result};
use crate::safe::ShmSafe;
use netmcore_sem::{Current, LockGuard, LockWord, Owners};
use netmcore_sys::crash_point;
use std::borrow::Borrow;
use std::hash::{BuildHasher, Hash};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Two lines: readers use the first only.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Shard {
    pub(super) table: TableWord,
    lock: LockWord,
    building: AtomicU64,
    pub(super) len: AtomicU64,
    /// Words that are not empty.
    used: AtomicU64,
    pub(super) retired: RetiredList,
}

#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct TableWord(AtomicU64);

impl TableWord {
    #[inline]
    pub(super) fn load(&self) -> u64 {
        self.0.load(SeqCst)
    }
}

/// # Safety
///
/// - `word` is of a table that is not freed during `'a`.
#[inline]
pub(super) unsafe fn table_at<'a>(word: u64) -> Option<&'a Table> {
    // SAFETY: the caller's duty; it is made of atomics.
    from_word::<Table>(word).map(|table| unsafe { table.as_ref() })
}

/// A shard whose lock the thread has. Dropped, it unlocks, and frees what was retired.
pub(super) struct Locked<
    'a,
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
> {
    pub(super) map: &'a ShmHashMap<K, V, H, S>,
    pub(super) shard: &'a Shard,
    guard: Option<LockGuard<'a>>,
    inside: Option<Inside>,
    /// The largest block that was retired, in bytes.
    retired_bytes: usize,
}

impl Shard {
    pub(super) fn new() -> Shard {
        Shard {
            table: TableWord(AtomicU64::new(0)),
            lock: LockWord::new(),
            building: AtomicU64::new(0),
            len: AtomicU64::new(0),
            used: AtomicU64::new(0),
            retired: RetiredList::default(),
        }
    }

    /// The word of the table, and none is left. For the one that drops the map.
    pub(super) fn take_table(&self) -> Option<u64> {
        let word = self.table.0.swap(0, SeqCst);
        (word != 0).then_some(word)
    }
}

impl<'a, K, V, H, S> Locked<'a, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    /// Takes the lock of a shard.
    pub(super) fn new(map: &'a ShmHashMap<K, V, H, S>, shard: &'a Shard) -> Result<Self> {
        // The second: in a thread whose variables are being destroyed.
        if is_inside(map.address()) || shard.lock.owner() == Some(Current.me()) {
            return Err(Error::WouldDeadlock { what: "ShmHashMap" });
        }
        let (guard, owner_died) = match shard.lock.lock(&Current) {
            Ok(guard) => (guard, false),
            Err(died) => (died.guard, true),
        };
        crash_point!("shm.hash_map.locked");
        let locked = Locked {
            map,
            shard,
            guard: Some(guard),
            inside: Some(Inside::new(map.address())),
            retired_bytes: 0,
        };
        if owner_died {
            locked.repair();
        }
        Ok(locked)
    }

    /// Panics in a child that was forked since, be it in a function of the user that was called under the lock.
    fn check_process(&self) {
        if let Some(inside) = &self.inside {
            inside.check_process();
        }
    }

    pub(super) fn table(&self) -> Option<&'a Table> {
        // SAFETY: it is freed after it was replaced, by which time this holder has not got it any more: `Place` is used up by that.
        unsafe { table_at(self.shard.table.load()) }
    }

    /// The last holder died.
    #[cold]
    fn repair(&self) {
        let building = self.shard.building.swap(0, SeqCst);
        crash_point!("shm.hash_map.repairing");
        if building != self.shard.table.load()
            && let Some(table) = from_word::<Table>(building)
        {
            // SAFETY: the dead one made it, and told nobody (invariant 3).
            unsafe { Table::free(self.map.heap, table) };
        }
        let (len, used) = self.count();
        self.shard.len.store(len, Relaxed);
        self.shard.used.store(used, Relaxed);
        crash_point!("shm.hash_map.repaired");
    }

    /// Items and words in use, counted.
    fn count(&self) -> (u64, u64) {
        let words = self.table().map_or(&[][..], Table::words);
        let count = |is: fn(u64) -> bool| {
            let words = words.iter().map(|word| word.load(Relaxed));
            words.filter(|&word| is(word)).count() as u64
        };
        (
            count(|word| item_of::<K, V>(word).is_some()),
            count(|word| word != EMPTY),
        )
    }

    /// Adds to the counts, after a commit.
    fn add(&self, items: i64, used: i64) {
        let add = |count: &AtomicU64, number: i64| {
            count.store(count.load(Relaxed).wrapping_add_signed(number), Relaxed);
        };
        add(&self.shard.len, items);
        add(&self.shard.used, used);
        crash_point!("shm.hash_map.counted");
    }

    /// Puts an item into the list of the retired.
    fn retire_item(&mut self, item: NonNull<Item<K, V>>) {
        // SAFETY: it was linked, and is not freed before it is in the list.
        unsafe { item.as_ref() }.consider_predecessors();
        self.retire(to_word(item), size_of::<Item<K, V>>());
    }

    fn retire(&mut self, link: u64, bytes: usize) {
        // There is a domain: what is retired was made with one.
        if let Ok(domain) = Domain::of(self.map.heap) {
            // SAFETY: unlinked by this holder of the lock, and nobody else.
            unsafe { domain.retire(&self.shard.retired, link) };
        }
        self.retired_bytes = self.retired_bytes.max(bytes);
        crash_point!("shm.hash_map.retired");
    }

    /// Unlinks everything, in one step.
    pub(super) fn clear(&mut self) {
        let word = self.shard.table.0.swap(0, SeqCst);
        crash_point!("shm.hash_map.cleared");
        self.shard.len.store(0, Relaxed);
        self.shard.used.store(0, Relaxed);
        // SAFETY: it was linked, and is not freed before it is in the list.
        if let Some(table) = unsafe { table_at(word) } {
            // Items in it may be as old as any.
            table.node.is_as_old_as(0);
            self.retire(word | KIND_TABLE_WITH_ITEMS, usize::MAX);
        }
    }

    /// Unlinks the items of which `keep` does not say so.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) {
        let Some(table) = self.table() else { return };
        for (index, word) in table.words().iter().enumerate() {
            let Some(item) = item_of::<K, V>(word.load(Relaxed)) else {
                continue;
            };
            // SAFETY: linked, so valid, and not changed.
            let entry = unsafe { item.as_ref() };
            if !keep(entry.key(), &entry.value) {
                self.unlink(table, index, item);
            }
        }
    }

    fn unlink(&mut self, table: &Table, index: usize, item: NonNull<Item<K, V>>) {
        self.check_process();
        let freed = table.unlink(index);
        crash_point!("shm.hash_map.unlinked");
        self.add(-1, -(freed as i64));
        self.retire_item(item);
    }

    /// Calls `visit` for each item.
    pub(super) fn for_each(&self, visit: impl FnMut(NonNull<Item<K, V>>)) {
        let words = self.table().map_or(&[][..], Table::words);
        let items = words.iter().filter_map(|word| item_of(word.load(Relaxed)));
        items.for_each(visit);
    }

    /// Checks all that holds while the lock is free.
    pub(super) fn verify(&self) -> Result<()>
    where
        K: Hash + Eq,
        S: BuildHasher,
    {
        let broken = |invariant: &str| {
            Error::Corrupt(Corrupt {
                object: "a ShmHashMap".to_owned(),
                offset: (&raw const *self.shard).addr() as u64,
                invariant: invariant.to_owned(),
            })
        };
        let (len, used) = self.count();
        if (len, used) != (self.shard.len.load(Relaxed), self.shard.used.load(Relaxed)) {
            return Err(broken("items are counted"));
        }
        let Some(table) = self.table() else {
            return Ok(());
        };
        if !table.has_room_for(used as usize) {
            return Err(broken("three quarters of the words at most are in use"));
        }
        let mut result = Ok(());
        self.for_each(|item| {
            // SAFETY: linked, so valid.
            let key = unsafe { item.as_ref() }.key();
            let hash = self.map.hash(key);
            let is_here = std::ptr::eq(self.map.shard(hash), self.shard);
            let found = self.find(hash, key);
            if !is_here || !matches!(found, Place::Taken { item: at, .. } if at == item) {
                result = Err(broken("an item is found by its key"));
            }
        });
        result
    }

    /// Looks for a key.
    pub(super) fn find<Q>(&self, hash: u64, key: &Q) -> Place<'a, K, V>
    where
        K: Borrow<Q>,
        Q: Eq + ?Sized,
    {
        let Some(table) = self.table() else {
            return Place::Free;
        };
        for (index, at) in table.path(hash) {
            let word = at.load(Relaxed);
            if word == EMPTY {
                break;
            }
            if !has_tag(word, hash) {
                continue;
            }
            if let Some(item) = item_of::<K, V>(word) {
                // SAFETY: linked, so valid, and not changed.
                if unsafe { item.as_ref() }.key().borrow() == key {
                    return Place::Taken { table, index, item };
                }
            }
        }
        Place::Free
    }

    /// Links an item whose key is not there.
    ///
    /// # Errors
    ///
    /// The item and the reason, if there is no memory for a larger table.
    pub(super) fn link(
        &mut self,
        hash: u64,
        item: Unlinked<Item<K, V>>,
    ) -> Linked<NonNull<Item<K, V>>, K, V> {
        self.check_process();
        let used = self.shard.used.load(Relaxed) as usize;
        let table = match self.table() {
            Some(table) if table.has_room_for(used + 1) => table,
            _ => match self.grow() {
                Ok(table) => table,
                Err(error) => return Err((item, error)),
            },
        };
        let item = item.into_raw();
        let was_empty = table.link(hash, word_of(hash, item));
        crash_point!("shm.hash_map.linked");
        self.add(1, i64::from(was_empty));
        Ok(item)
    }

    /// Moves the items to a table with more room, or as much, without the words that lead to nothing.
    fn grow(&mut self) -> Result<&'a Table> {
        let heap = self.map.heap;
        let len = self.shard.len.load(Relaxed);
        let new = Table::make(heap, Table::capacity_for(len as usize + 1))?;
        self.shard.building.store(to_word(new), SeqCst);
        crash_point!("shm.hash_map.building");
        // SAFETY: made just now; it is freed after it was replaced, as `table` says.
        let table: &'a Table = unsafe { new.as_ref() };
        let old_table = self.table();
        if let Some(old_table) = old_table {
            table.copy(old_table);
        }
        crash_point!("shm.hash_map.built");
        let old = self.shard.table.0.swap(to_word(new), SeqCst);
        crash_point!("shm.hash_map.grown");
        self.shard.building.store(0, SeqCst);
        self.shard.used.store(len, Relaxed);
        if let Some(old_table) = old_table {
            self.retire(old | KIND_TABLE, old_table.capacity() * 12);
        }
        Ok(table)
    }

    /// Puts another item of the same key in the place of one. Gives the old one, which was retired: to be used under a pin from before.
    pub(super) fn replace(
        &mut self,
        hash: u64,
        place: (&Table, usize, NonNull<Item<K, V>>),
        new: Unlinked<Item<K, V>>,
        key_is_inherited: bool,
    ) -> NonNull<Item<K, V>> {
        self.check_process();
        let (table, index, old) = place;
        // SAFETY: linked, so valid, and not changed but for its atomics.
        let old_item = unsafe { old.as_ref() };
        if key_is_inherited {
            new.inherit(old_item);
        }
        let new = new.into_raw();
        table.words()[index].store(word_of(hash, new), SeqCst);
        crash_point!("shm.hash_map.replaced");
        if key_is_inherited {
            old_item.give_up_key();
        }
        self.retire_item(old);
        new
    }

    /// Takes an item out. It was retired: to be used under a pin from before.
    pub(super) fn remove(&mut self, place: (&Table, usize, NonNull<Item<K, V>>)) {
        let (table, index, item) = place;
        self.unlink(table, index, item);
    }
}

impl<K, V, H, S> Drop for Locked<'_, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    fn drop(&mut self) {
        crash_point!("shm.hash_map.unlocking");
        self.guard = None;
        // What is dropped now may use the map.
        self.inside = None;
        if self.retired_bytes != 0 {
            self.map.reclaim_some(self.shard, self.retired_bytes);
        }
    }
}

/// Where a key is, as long as the lock is held and nothing changed.
pub(super) enum Place<'a, K, V> {
    Taken {
        table: &'a Table,
        index: usize,
        item: NonNull<Item<K, V>>,
    },
    Free,
}

/// Frees a block that a list of the map has given out.
///
/// # Safety
///
/// - The link is of a map with these types in this heap; nobody uses the block any more.
pub(super) unsafe fn free_block<K, V>(heap: crate::HeapRef, link: u64) {
    let address = link & !KIND_MASK;
    if link & KIND_MASK == 0 {
        if let Some(item) = from_word::<Item<K, V>>(address) {
            // SAFETY: the caller's duty.
            unsafe { epoch::free(heap, item) };
        }
        return;
    }
    let Some(table) = from_word::<Table>(address) else {
        return;
    };
    if link & KIND_MASK == KIND_TABLE_WITH_ITEMS {
        // SAFETY: the caller's duty.
        unsafe { table.as_ref().free_items::<K, V>(heap) };
    }
    // SAFETY: as above.
    unsafe { Table::free(heap, table) };
}

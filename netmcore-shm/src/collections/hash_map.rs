//! A hash map that processes share: [`ShmHashMap`].
//!
//! **Protocol.** The map is cut into shards by the upper bits of the hash. Each has a lock for those that change it, and a table of words, which have
//! the addresses of the items: `table` and `shard` have the state tables. Who looks something up takes no lock: it pins itself
//! (module `epoch`), loads the address of the table, follows words, and may use the item as long as it is pinned. What is unlinked goes
//! into a list of the shard, and is freed when nobody can have it any more.
//!
//! An item is never changed. To change the value of a key is to link another item in its place.
//!
//! **Invariants.** Those of `table`, `shard` and `epoch`, and:
//! 1. Who follows the address of a table or an item has the shard's lock, or a pin from before it began at the shard's `table`, or is alone.
//! 2. The address of the shards is null once the map is being dropped. Others find such a map only after a death in the middle of an assignment,
//!    which drops the old one before it writes the new one: it can be replaced and dropped, and panics where it is used.
//!
//! **If a process dies here.** Each change is committed by one store to one word, so it was made or not. The shard's lock is handed over, and the next
//! that takes it frees or counts anew what is in doubt. At most an item and a table are lost with each death, which means that they
//! stay allocated until the heap is gone (with a `clear`: the entries of one shard).
//!
//! **Not here.** Several values of a key, of which the last hides the others: a map of vectors.
//!
//! # Safety
//!
//! The shards' block lives as long as the map that is not a copy by fork. Items and tables: invariant 1.

#![allow(unsafe_code)]

mod counter;
mod entry;
mod hasher;
mod inside;
mod iter;
mod shard;
mod table;

pub use counter::ShmCounter;
pub use entry::{Entry, OccupiedEntry, VacantEntry};
pub use hasher::ShmRandomState;
pub use iter::{Iter, KeyRef};

use crate::collections::{Invariant, Rejected};
use crate::epoch::{Domain, Pin, Unlinked};
use crate::error::Result;
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use netmcore_sys::crash_point;
use shard::{Locked, Place, Shard, free_block, table_at};
use std::alloc::Layout;
use std::any::type_name;
use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use table::{EMPTY, Item, KIND_TABLE_WITH_ITEMS, has_tag, item_of};

/// A result with the value that was not taken in, if there is one.
pub type Taken<T, V> = std::result::Result<T, Rejected<V>>;

/// A result with the item that was not linked, if there is one.
type Linked<T, K, V> = std::result::Result<T, (Unlinked<Item<K, V>>, crate::Error)>;

/// How many shards a map has unless told otherwise.
const DEFAULT_SHARDS: usize = 64;
/// The upper bits of the hash say which shard: so many at most.
const SHARD_BITS: u32 = 8;

/// A hash map in shared memory that all its users change through `&self`. Looking something up takes no lock.
///
/// [`get`](Self::get) gives a guard of the entry as it is then; whoever replaces or removes it does not disturb the guard, and no guard keeps others,
/// or its own thread, from changing the map. Only an [`entry`](Self::entry) is locked: a thread that has one, or is in a function
/// that `modify`, `update`, `retain` or an entry calls, gets [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) when it changes the same map otherwise.
/// Looking up and iterating is always allowed. (Entries of two maps, taken by two threads in different order, wait for each other,
/// as two mutexes do.)
///
/// Values are replaced, not changed in place. For counters and the like let the value be an atomic, and change it through the guard,
/// or by [`add`](Self::add). It has a *header* of the user's type, set when the map is made. The hasher's keys lie in
/// the map, the same for all processes; std's `RandomState` is refused by the compiler.
///
/// **Memory.** An entry that was replaced or removed is freed by one of those that change its shard later, as soon as nobody has a guard that may be of it.
/// Guards that are kept for long keep what was there between the first and the last look-up of their thread, no more. Pins of killed
/// processes are cleared. [`reclaim`](Self::reclaim) frees what can be freed now.
///
/// **Fork.** A forked child has copies of its parent's maps in private memory. They can be used as long as the parent keeps its own;
/// dropping one in the child does nothing.
///
/// # If a process dies
///
/// Each change of an entry was made or not, at every instant. Locks are handed over, and counts repaired, without anybody being told. If the map itself was being assigned,
/// as a part of something in shared memory, it is the old one, the new one or none; being none it panics where it is used, and may be assigned anew.
///
/// ```
/// use netmcore_shm::{Arena, Error, Heap, ShmHashMap};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// // Found by its name in all processes; without one: in a ShmArc, which can be sent to them.
/// let ages = heap.try_named("ages", || ShmHashMap::<u64, u32>::new_in(&heap))?;
/// ages.insert(17, 30)?; // in a forked child, for instance
/// let before = ages.insert(17, 31)?;
/// assert_eq!(before.as_deref(), Some(&30));
/// assert_eq!(ages.get(&17).as_deref(), Some(&31));
/// ages.update(17, |age| age.map(|age| age + 1))?;
/// assert_eq!(ages.get_cloned(&17), Some(32));
/// // The entry is locked as long as it is held.
/// let entry = ages.entry(17)?;
/// assert!(matches!(ages.remove(&17), Err(Error::WouldDeadlock { .. })));
/// drop(entry);
/// assert!(ages.remove(&17)?.is_some());
/// assert!(ages.get(&17).is_none());
/// # Ok::<(), Error>(())
/// ```
///
/// Several values for a key, of which the last hides those before:
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmHashMap, ShmVec};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let marks = ShmHashMap::<u64, ShmVec<u8>>::new_in(&heap)?;
/// for mark in [3, 1] {
///     let before = marks.get(&17);
///     let mut all = match &before {
///         Some(marks) => marks.try_clone()?,
///         None => ShmVec::new_in(&heap),
///     };
///     all.push(mark)?;
///     marks.insert(17, all)?;
/// }
/// let all = marks.get(&17).unwrap();
/// assert_eq!((all.last(), &all[..]), (Some(&1), &[3, 1][..]));
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[doc(alias = "Netmcore_hashtbl")]
pub struct ShmHashMap<
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync = (),
    S: ShmSafe + Sync = ShmRandomState,
> {
    heap: HeapRef,
    shards: AtomicPtr<Shard>,
    shard_count: usize,
    mark: Mark,
    hasher: S,
    header: H,
    of: Invariant<(K, V, H)>,
}

// SAFETY: addresses in the heap, which mean the same wherever it is mapped, and are reported; a hasher and a header that are ShmSafe. Keys and values
// were checked when they were put in. It may be dropped anywhere: it loses its mark on the way.
unsafe impl<K, V, H, S> ShmSafe for ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        self.heap.visit_pointers(visit);
        let shards = self.shards.load(Relaxed);
        if !shards.is_null() {
            visit(shards.cast());
        }
        self.hasher.visit_pointers(visit);
        self.header.visit_pointers(visit);
    }
}

impl<K: ShmSafe + Sync, V: ShmSafe + Sync> ShmHashMap<K, V> {
    /// Makes an empty map.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`](crate::Error::OutOfPoolMemory) and [`Error::NoSpace`](crate::Error::NoSpace) if there is no memory.
    ///
    /// # If a process dies
    ///
    /// A block may stay allocated until the heap is gone.
    #[doc(alias = "Netmcore_hashtbl.create")]
    pub fn new_in(heap: impl Into<HeapRef>) -> Result<Self> {
        Self::with_shards_in(heap, DEFAULT_SHARDS)
    }

    /// Makes an empty map that so many can change at the same time: rounded up to a power of two, 256 at most. Each shard costs 128
    /// bytes. Without this call it has 64.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in).
    pub fn with_shards_in(heap: impl Into<HeapRef>, shard_count: usize) -> Result<Self> {
        Ok(Self::with_parts_in(
            heap,
            shard_count,
            ShmRandomState::new(),
            (),
        )?)
    }
}

impl<K: ShmSafe + Sync, V: ShmSafe + Sync, H: ShmSafe + Sync> ShmHashMap<K, V, H> {
    /// Makes an empty map with a header.
    ///
    /// # Errors
    ///
    /// As [`new_in`](ShmHashMap::new_in); [`Error::ForeignPointer`](crate::Error::ForeignPointer) if the header has pointers into another region. It comes back.
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        header: H,
    ) -> std::result::Result<Self, Rejected<H>> {
        Self::with_parts_in(heap, DEFAULT_SHARDS, ShmRandomState::new(), header)
    }
}

impl<K, V, H, S> ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    /// Makes an empty map of all that can be chosen. The hasher must hash alike in all processes, which it does if all it has is itself.
    ///
    /// # Errors
    ///
    /// As [`with_header_in`](ShmHashMap::with_header_in), for the hasher too.
    pub fn with_parts_in(
        heap: impl Into<HeapRef>,
        shard_count: usize,
        hasher: S,
        header: H,
    ) -> std::result::Result<Self, Rejected<H>> {
        let heap = heap.into();
        let shard_count = shard_count.clamp(1, 1 << SHARD_BITS).next_power_of_two();
        let shards = || {
            heap.check(&header)?;
            heap.check(&hasher)?;
            Domain::of(heap)?;
            heap.allocate(Self::layout(shard_count))
        };
        let shards = match shards() {
            Ok(at) => at.cast::<Shard>(),
            Err(error) => return Err(Rejected::new(header, error)),
        };
        for index in 0..shard_count {
            // SAFETY: in bounds and aligned, by the layout; nobody else knows of it.
            unsafe { shards.add(index).write(Shard::new()) };
        }
        Ok(ShmHashMap {
            heap,
            shards: AtomicPtr::new(shards.as_ptr()),
            shard_count,
            mark: Mark::here(),
            hasher,
            header,
            of: PhantomData,
        })
    }

    fn layout(shard_count: usize) -> Layout {
        Layout::array::<Shard>(shard_count).expect("there are few shards")
    }

    /// The header.
    #[doc(alias = "Netmcore_hashtbl.header")]
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The heap that the entries lie in.
    pub fn heap(&self) -> HeapRef {
        self.heap
    }

    /// The hasher.
    pub fn hasher(&self) -> &S {
        &self.hasher
    }

    /// How many can change the map at the same time.
    pub fn shard_count(&self) -> usize {
        self.shard_count
    }

    /// The number of entries, as it was in each shard at one moment after the other. After a death it may be wrong by one until the shard is changed.
    #[doc(alias = "Netmcore_hashtbl.length")]
    pub fn len(&self) -> usize {
        let lens = self.shards().iter().map(|shard| shard.len.load(Relaxed));
        lens.sum::<u64>() as usize
    }

    /// Whether there is no entry; as [`len`](Self::len).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All entries. Each shard is seen as it was at one moment, one shard after the other.
    ///
    /// Notes the entries of a shard, and keeps them until it is done with them: memory of the process, 8 bytes for each.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Blocking
    ///
    /// While another one changes the shard that is next; a thread that has an entry of this map does not wait, and sees
    /// shards as they change.
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmHashMap};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let squares = ShmHashMap::from_iter_in(&heap, (0..10_u64).map(|n| (n, n * n)))?;
    /// assert!(squares.iter().all(|entry| *entry == entry.key() * entry.key()));
    /// assert_eq!(squares.values().map(|square| *square).sum::<u64>(), 285);
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    #[doc(alias = "Netmcore_hashtbl.iter")]
    pub fn iter(&self) -> Iter<'_, K, V, H, S> {
        Iter::new(self)
    }

    /// Calls `visit` for each entry; as [`iter`](Self::iter). It may use the map.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Blocking
    ///
    /// As [`iter`](Self::iter).
    pub fn for_each(&self, mut visit: impl FnMut(&K, &V)) {
        self.iter().for_each(|entry| visit(entry.key(), &entry));
    }

    /// All keys; as [`iter`](Self::iter).
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Blocking
    ///
    /// As [`iter`](Self::iter).
    pub fn keys(&self) -> impl Iterator<Item = KeyRef<'_, K, V>> {
        self.iter().map(KeyRef)
    }

    /// All values; as [`iter`](Self::iter), which gives the same guards.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    ///
    /// # Blocking
    ///
    /// As [`iter`](Self::iter).
    pub fn values(&self) -> impl Iterator<Item = Ref<'_, K, V>> {
        self.iter()
    }

    /// Removes all entries, of one shard after the other.
    ///
    /// # Errors
    ///
    /// [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) if the thread has an entry of the map; nothing was removed then.
    ///
    /// # Blocking
    ///
    /// While others change the shards.
    ///
    /// # If a process dies
    ///
    /// Shards are empty, or as they were. What was in one of them may stay allocated until the heap is gone.
    #[doc(alias = "Netmcore_hashtbl.clear")]
    pub fn clear(&self) -> Result<()> {
        for shard in self.shards() {
            Locked::new(self, shard)?.clear();
        }
        Ok(())
    }

    /// Removes the entries of which `keep` does not say so. It is asked with the shard locked: it must not change the map.
    ///
    /// # Errors
    ///
    /// [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) if the thread has an entry of the map; nothing was removed then.
    ///
    /// # Blocking
    ///
    /// While others change the shards.
    ///
    /// # If a process dies
    ///
    /// What it had removed is gone, the rest is there.
    pub fn retain(&self, mut keep: impl FnMut(&K, &V) -> bool) -> Result<()> {
        for shard in self.shards() {
            Locked::new(self, shard)?.retain(&mut keep);
        }
        Ok(())
    }

    /// Frees what was removed or replaced and nobody reads any more; asks of each reader that is in the way whether it lives.
    ///
    /// Changes of a shard do so too, now and then; this is for a map that is not changed any more.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`](crate::Error::FormatMismatch) if the heap was written over.
    pub fn reclaim(&self) -> Result<()> {
        let domain = Domain::of(self.heap)?;
        for shard in self.shards() {
            // SAFETY: the list has blocks of this map; who is given one frees it.
            unsafe {
                domain.reclaim_all(&shard.retired, |link| free_block::<K, V>(self.heap, link));
            }
        }
        Ok(())
    }

    fn reclaim_some(&self, shard: &Shard, block_bytes: usize) {
        if let Ok(domain) = Domain::of(self.heap) {
            // SAFETY: as above.
            unsafe {
                domain.reclaim_some(&shard.retired, block_bytes, |link| {
                    free_block::<K, V>(self.heap, link);
                });
            }
        }
    }

    #[inline]
    fn shards(&self) -> &[Shard] {
        let shards = self.shards.load(Relaxed);
        if shards.is_null() {
            no_shards(type_name::<(K, V)>());
        }
        // SAFETY: in bounds: written when the map was made; here and there: atomics; gone: valid at every step.
        unsafe { std::slice::from_raw_parts(shards, self.shard_count) }
    }

    #[inline]
    fn shard(&self, hash: u64) -> &Shard {
        let upper = (hash >> (u64::BITS - SHARD_BITS)) as usize;
        &self.shards()[upper & (self.shard_count - 1)]
    }

    /// What names the map in this process.
    fn address(&self) -> usize {
        self.shards.load(Relaxed).addr()
    }
}

/// Invariant 2.
#[cold]
fn no_shards(type_name: &str) -> ! {
    panic!(
        "this ShmHashMap of {type_name} has no entries any more: a process died while it put another one in its place"
    )
}

impl<K, V, H, S> ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync + Hash + Eq,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync + BuildHasher,
{
    /// The entry of a key as it is now. The guard keeps it, whatever is done to the map later.
    ///
    /// Waits for nobody, takes no lock and allocates nothing, but that a thread's first read in a heap may have to make room for its pin.
    ///
    /// # Panics
    ///
    /// If there was no memory for that pin. The first 64 threads find room that is there.
    ///
    /// # If a process dies
    ///
    /// Its pins are cleared by one of those that change the map.
    #[doc(alias = "Netmcore_hashtbl.find_p")]
    #[doc(alias = "Netmcore_hashtbl.find_ro")]
    #[inline]
    pub fn get<Q>(&self, key: &Q) -> Option<Ref<'_, K, V>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let found = Pin::new(self.heap).with(|pin| self.find(pin, key));
        found.map(|(pin, item)| Ref::new(pin, item))
    }

    /// A copy of the value of a key.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    #[doc(alias = "Netmcore_hashtbl.find_c")]
    pub fn get_cloned<Q>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
        V: Clone,
    {
        self.get(key).map(|value| V::clone(&value))
    }

    /// Whether the key has a value.
    ///
    /// # Panics
    ///
    /// As [`get`](Self::get).
    #[doc(alias = "Netmcore_hashtbl.mem")]
    pub fn contains_key<Q>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.get(key).is_some()
    }

    /// Looks a key up under the pin.
    #[inline(always)]
    fn find<Q>(&self, pin: &Pin, key: &Q) -> Option<NonNull<Item<K, V>>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let hash = self.hash(key);
        let shard = self.shard(hash);
        pin.read(|cover| {
            let word = shard.table.load();
            if !cover.is_enough() {
                return None;
            }
            // SAFETY: loaded under the pin, and covered (invariant 1).
            let Some(table) = (unsafe { table_at(word) }) else {
                return Some(None);
            };
            for (_, word) in table.path(hash) {
                let word = word.load(SeqCst);
                if word == EMPTY {
                    break;
                }
                if !has_tag(word, hash) {
                    continue;
                }
                if !cover.is_enough() {
                    return None;
                }
                let item = item_of::<K, V>(word);
                // SAFETY: as above.
                if item.is_some_and(|item| unsafe { item.as_ref() }.key().borrow() == key) {
                    return Some(item);
                }
            }
            Some(None)
        })
    }

    #[inline]
    fn hash<Q: Hash + ?Sized>(&self, key: &Q) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Puts a value in, in the place of the one that the key had, of which it gives a guard.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPointer`](crate::Error::ForeignPointer) if key or value have pointers into another region;
    /// [`Error::OutOfPoolMemory`](crate::Error::OutOfPoolMemory) and [`Error::NoSpace`](crate::Error::NoSpace) if there is no memory;
    /// [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) if the thread has an entry of the map. Key and value come back, and the map is as it was.
    ///
    /// # Blocking
    ///
    /// While another one changes the shard.
    ///
    /// # If a process dies
    ///
    /// The key has the value from before, or none if it had none, or the new one. Key and value may stay allocated until the heap is gone.
    #[doc(alias = "Netmcore_hashtbl.replace")]
    #[doc(alias = "Netmcore_hashtbl.add")]
    pub fn insert(&self, key: K, value: V) -> Taken<Option<Ref<'_, K, V>>, (K, V)> {
        let item = self.make_item(key, value)?;
        self.insert_item(item)
            .map_err(|(item, error)| Rejected::new(item.into_inner().into_parts(), error))
    }

    fn make_item(&self, key: K, value: V) -> Taken<Unlinked<Item<K, V>>, (K, V)> {
        let checked = self.heap.check(&key).and_then(|()| self.heap.check(&value));
        match checked {
            Err(error) => Err(Rejected::new((key, value), error)),
            Ok(()) => Unlinked::make(self.heap, (key, value), |node, (key, value)| {
                Item::new(node, key, value)
            }),
        }
    }

    fn insert_item(&self, item: Unlinked<Item<K, V>>) -> Linked<Option<Ref<'_, K, V>>, K, V> {
        let hash = self.hash(item.key());
        let mut locked = match Locked::new(self, self.shard(hash)) {
            Ok(locked) => locked,
            Err(error) => return Err((item, error)),
        };
        match locked.find(hash, item.key()) {
            Place::Free => locked.link(hash, item).map(|_| None),
            Place::Taken {
                table,
                index,
                item: old,
            } => {
                let pin = match Pin::try_new(self.heap) {
                    Ok(pin) => pin,
                    Err(error) => return Err((item, error)),
                };
                pin.cover_born();
                locked.replace(hash, (table, index, old), item, false);
                Ok(Some(Ref::new(pin, old)))
            }
        }
    }

    /// Puts a value in if the key has none. Says whether it did so; if not, key and value are dropped.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # If a process dies
    ///
    /// As [`insert`](Self::insert).
    pub fn insert_if_absent(&self, key: K, value: V) -> Taken<bool, (K, V)> {
        let item = self.make_item(key, value)?;
        let hash = self.hash(item.key());
        let mut locked = match Locked::new(self, self.shard(hash)) {
            Ok(locked) => locked,
            Err(error) => return Err(Rejected::new(item.into_inner().into_parts(), error)),
        };
        if let Place::Taken { .. } = locked.find(hash, item.key()) {
            drop(locked);
            return Ok(false);
        }
        match locked.link(hash, item) {
            Ok(_) => Ok(true),
            Err((item, error)) => Err(Rejected::new(item.into_inner().into_parts(), error)),
        }
    }

    /// Takes the entry of a key out of the map; gives a guard of it.
    ///
    /// # Errors
    ///
    /// [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) if the thread has an entry of the map.
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # If a process dies
    ///
    /// The entry is there or not. It may stay allocated until the heap is gone.
    #[doc(alias = "Netmcore_hashtbl.remove")]
    pub fn remove<Q>(&self, key: &Q) -> Result<Option<Ref<'_, K, V>>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let hash = self.hash(key);
        let mut locked = Locked::new(self, self.shard(hash))?;
        let Place::Taken { table, index, item } = locked.find(hash, key) else {
            return Ok(None);
        };
        let pin = Pin::try_new(self.heap)?;
        pin.cover_born();
        locked.remove((table, index, item));
        Ok(Some(Ref::new(pin, item)))
    }

    /// The entry of a key, locked, to look at it and decide then. Other threads and processes read it meanwhile, and change other shards.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert). The key comes back.
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert). Others that change the shard wait until the entry is dropped: keep it for a short time.
    ///
    /// # If a process dies
    ///
    /// With an entry, the lock is handed over, and the map is as it was after the last change.
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmHashMap};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let words = ShmHashMap::<[u8; 4], u32>::new_in(&heap)?;
    /// for word in [*b"this", *b"that", *b"this"] {
    ///     words.entry(word)?.and_modify(|count| *count += 1)?.or_insert(1)?;
    /// }
    /// assert_eq!(words.get_cloned(b"this"), Some(2));
    /// assert_eq!(*words.entry(*b"that")?.or_default()?, 1);
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn entry(&self, key: K) -> std::result::Result<Entry<'_, K, V, H, S>, Rejected<K>> {
        Entry::new(self, key)
    }

    /// Changes a copy of the value of a key, and puts it in its place, in one step as seen by others. False if the key has no value.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert). Others that change the shard wait for `change`, which must not change the map itself.
    ///
    /// # If a process dies
    ///
    /// The key has the value from before or the new one, also if `change` was half done.
    pub fn modify<Q>(&self, key: &Q, change: impl FnOnce(&mut V)) -> Result<bool>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
        V: Clone,
    {
        self.modify_with(key, |value| {
            let mut value = value.clone();
            change(&mut value);
            value
        })
    }

    /// As [`modify`](Self::modify), for values that cannot be cloned: `next` makes the new value from the old one.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # Blocking
    ///
    /// As [`modify`](Self::modify).
    ///
    /// # If a process dies
    ///
    /// As [`modify`](Self::modify).
    pub fn modify_with<Q>(&self, key: &Q, next: impl FnOnce(&V) -> V) -> Result<bool>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let hash = self.hash(key);
        let mut locked = Locked::new(self, self.shard(hash))?;
        let Place::Taken { table, index, item } = locked.find(hash, key) else {
            return Ok(false);
        };
        // SAFETY: linked as long as the lock is held and nothing done to it; not changed.
        let old = unsafe { item.as_ref() };
        let value = next(&old.value);
        self.heap.check(&value)?;
        let assemble = |node, value| Item::with_key_of(node, old, value);
        let new = Unlinked::make(self.heap, value, assemble)?;
        locked.replace(hash, (table, index, item), new, true);
        Ok(true)
    }

    /// Makes the new value of a key from the old one, in one step as seen by others: `None` means that the key has no value. Gives a guard of the new one.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # Blocking
    ///
    /// As [`modify`](Self::modify).
    ///
    /// # If a process dies
    ///
    /// As [`modify`](Self::modify).
    pub fn update(
        &self,
        key: K,
        next: impl FnOnce(Option<&V>) -> Option<V>,
    ) -> Result<Option<Ref<'_, K, V>>> {
        match self.entry(key)? {
            Entry::Vacant(entry) => match next(None) {
                None => Ok(None),
                Some(value) => Ok(Some(entry.insert(value)?)),
            },
            Entry::Occupied(mut entry) => match next(Some(entry.get())) {
                None => {
                    entry.remove();
                    Ok(None)
                }
                Some(value) => {
                    entry.insert(value)?;
                    Ok(Some(entry.into_ref()))
                }
            },
        }
    }

    /// Adds to the counter of a key, which starts at 0; gives the number before. Takes no lock if the key is there.
    ///
    /// What is added while somebody removes or replaces the entry may be gone with it.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert), if the key is not there.
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert), if the key is not there.
    ///
    /// # If a process dies
    ///
    /// It was added or not.
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmHashMap};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// let hits = ShmHashMap::<u32, AtomicU64>::new_in(&heap)?;
    /// assert_eq!(hits.add(404, 1)?, 0);
    /// assert_eq!(hits.add(404, 2)?, 1);
    /// assert_eq!(hits.get(&404).map(|hits| hits.load(Ordering::Relaxed)), Some(3));
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn add(&self, key: K, number: V::Number) -> Result<V::Number>
    where
        V: ShmCounter,
    {
        if let Some(counter) = self.get(&key) {
            return Ok(counter.add(number));
        }
        match self.entry(key)? {
            Entry::Occupied(entry) => Ok(entry.get().add(number)),
            Entry::Vacant(entry) => {
                entry.insert(V::starting_at(number))?;
                Ok(V::Number::default())
            }
        }
    }

    /// Inserts all pairs, one after the other.
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert): the first pair that was not taken comes back, those before are in the map, those after are dropped with the iterator.
    ///
    /// # Blocking
    ///
    /// As [`insert`](Self::insert).
    ///
    /// # If a process dies
    ///
    /// Some are in the map.
    pub fn try_extend(
        &self,
        pairs: impl IntoIterator<Item = (K, V)>,
    ) -> std::result::Result<(), Rejected<(K, V)>> {
        for (key, value) in pairs {
            self.insert(key, value)?;
        }
        Ok(())
    }

    /// Checks every rule that holds whatever process dies: each entry is found by its key, and all are counted.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`](crate::Error::Corrupt): a stray write, a key that changes its hash, or a bug. [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) if
    /// the thread has an entry of the map.
    ///
    /// # Blocking
    ///
    /// While others change the shards.
    pub fn verify(&self) -> Result<()> {
        for shard in self.shards() {
            Locked::new(self, shard)?.verify()?;
        }
        Ok(())
    }
}

impl<K: ShmSafe + Sync + Hash + Eq, V: ShmSafe + Sync> ShmHashMap<K, V> {
    /// Makes a map of these pairs.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in) and [`insert`](Self::insert).
    pub fn from_iter_in(
        heap: impl Into<HeapRef>,
        pairs: impl IntoIterator<Item = (K, V)>,
    ) -> Result<Self> {
        let map = ShmHashMap::new_in(heap)?;
        map.try_extend(pairs)?;
        Ok(map)
    }
}

impl<K, V, H, S> Drop for ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        // Before anything else (invariant 2).
        let Some(at) = NonNull::new(self.shards.swap(ptr::null_mut(), SeqCst)) else {
            return;
        };
        crash_point!("shm.hash_map.emptied");
        // SAFETY: as for `shards`; they are freed below.
        let shards = unsafe { std::slice::from_raw_parts(at.as_ptr(), self.shard_count) };
        for shard in shards {
            // SAFETY: the map is being dropped, so nobody uses the list, and no guard is left.
            unsafe {
                shard
                    .retired
                    .take_all(|link| free_block::<K, V>(self.heap, link));
            }
            if let Some(table) = shard.take_table() {
                // SAFETY: as above.
                unsafe { free_block::<K, V>(self.heap, table | KIND_TABLE_WITH_ITEMS) };
            }
        }
        // SAFETY: allocated with this layout in this heap; nobody uses it any more.
        unsafe {
            self.heap
                .deallocate(at.cast(), Self::layout(self.shard_count));
        }
    }
}

impl<'a, K, V, H, S> IntoIterator for &'a ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    type Item = Ref<'a, K, V>;
    type IntoIter = Iter<'a, K, V, H, S>;

    fn into_iter(self) -> Iter<'a, K, V, H, S> {
        self.iter()
    }
}

impl<K, V, H, S> fmt::Debug for ShmHashMap<K, V, H, S>
where
    K: ShmSafe + Sync + fmt::Debug,
    V: ShmSafe + Sync + fmt::Debug,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for entry in self {
            map.entry(entry.key(), &*entry);
        }
        map.finish()
    }
}

/// An entry of a [`ShmHashMap`] as it was when it was looked up: dereferences to its value. It lives as long as this guard, which belongs to its thread.
///
/// A forked child must not use the copy that it has; it panics there.
pub struct Ref<'a, K, V> {
    pin: Pin,
    item: NonNull<Item<K, V>>,
    of: PhantomData<&'a (K, V)>,
}

impl<K, V> Ref<'_, K, V> {
    /// Of an item that the pin keeps.
    #[inline]
    fn new(pin: Pin, item: NonNull<Item<K, V>>) -> Self {
        Ref {
            pin,
            item,
            of: PhantomData,
        }
    }

    #[inline]
    fn item(&self) -> &Item<K, V> {
        self.pin.check_process();
        // SAFETY: in bounds: an item; here and there: all have `&K` and `&V` only, until it is freed; gone: it is freed when no pin of
        // a live thread keeps it, and the guard has one.
        unsafe { self.item.as_ref() }
    }

    /// The key.
    #[inline]
    pub fn key(&self) -> &K {
        self.item().key()
    }
}

impl<K, V> Deref for Ref<'_, K, V> {
    type Target = V;

    #[inline]
    fn deref(&self) -> &V {
        &self.item().value
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Ref<'_, K, V> {
    /// As the pair.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.key(), &**self).fmt(f)
    }
}

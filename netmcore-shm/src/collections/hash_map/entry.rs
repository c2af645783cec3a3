//! One entry of a map, locked: look at it, then decide.
//!
//! **Protocol.** An entry has the lock of its shard, so nobody else changes the shard meanwhile; others read. Each change is committed as the map's
//! own calls do it. A change of a value is made to a copy, which replaces the entry.
//!
//! **If a process dies here.** The lock is handed over; the entry is as it was, or changed.
//!
//! # Safety
//!
//! The item of an occupied entry is linked as long as the entry has the lock.

#![allow(unsafe_code)]

use super::shard::{Locked, Place};
use super::table::{Item, Table};
use super::{Ref, ShmHashMap};
use crate::collections::Rejected;
use crate::epoch::{Pin, Unlinked};
use crate::error::Result;
use crate::safe::ShmSafe;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::ptr::NonNull;

/// The entry of a key, which is locked as long as this lives. Made by [`ShmHashMap::entry`].
pub enum Entry<'a, K: ShmSafe + Sync, V: ShmSafe + Sync, H: ShmSafe + Sync, S: ShmSafe + Sync> {
    /// The key has a value.
    Occupied(OccupiedEntry<'a, K, V, H, S>),
    /// It has none.
    Vacant(VacantEntry<'a, K, V, H, S>),
}

/// The lock, and where the key is.
struct Held<'a, K: ShmSafe + Sync, V: ShmSafe + Sync, H: ShmSafe + Sync, S: ShmSafe + Sync> {
    // Dropped first: what is freed when the lock is given back is more without it.
    pin: Pin,
    locked: Locked<'a, K, V, H, S>,
    hash: u64,
}

/// The entry of a key that has a value.
pub struct OccupiedEntry<
    'a,
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
> {
    held: Held<'a, K, V, H, S>,
    key: K,
    table: &'a Table,
    index: usize,
    item: NonNull<Item<K, V>>,
}

/// The entry of a key that has no value.
pub struct VacantEntry<
    'a,
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
> {
    held: Held<'a, K, V, H, S>,
    key: K,
}

impl<'a, K, V, H, S> Entry<'a, K, V, H, S>
where
    K: ShmSafe + Sync + Hash + Eq,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync + BuildHasher,
{
    pub(super) fn new(
        map: &'a ShmHashMap<K, V, H, S>,
        key: K,
    ) -> std::result::Result<Self, Rejected<K>> {
        let open = || -> Result<_> {
            map.heap().check(&key)?;
            let pin = Pin::try_new(map.heap())?;
            let hash = map.hash(&key);
            let locked = Locked::new(map, map.shard(hash))?;
            let place = locked.find(hash, &key);
            let held = Held { locked, pin, hash };
            Ok((held, place))
        };
        match open() {
            Err(error) => Err(Rejected::new(key, error)),
            Ok((held, Place::Free)) => Ok(Entry::Vacant(VacantEntry { held, key })),
            Ok((held, Place::Taken { table, index, item })) => Ok(Entry::Occupied(OccupiedEntry {
                held,
                key,
                table,
                index,
                item,
            })),
        }
    }

    /// The key that was asked for.
    pub fn key(&self) -> &K {
        match self {
            Entry::Occupied(entry) => &entry.key,
            Entry::Vacant(entry) => &entry.key,
        }
    }

    /// The value, put in if there is none.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`].
    pub fn or_insert(self, value: V) -> Result<Ref<'a, K, V>> {
        self.or_try_insert_with(|_| Ok(value))
    }

    /// The value, put in as the function makes it if there is none.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`].
    pub fn or_insert_with(self, value: impl FnOnce() -> V) -> Result<Ref<'a, K, V>> {
        self.or_try_insert_with(|_| Ok(value()))
    }

    /// As [`or_insert_with`](Self::or_insert_with), with a function that is given the key and may fail.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`], and what the function says.
    pub fn or_try_insert_with(self, value: impl FnOnce(&K) -> Result<V>) -> Result<Ref<'a, K, V>> {
        match self {
            Entry::Occupied(entry) => Ok(entry.into_ref()),
            Entry::Vacant(entry) => {
                let value = value(&entry.key)?;
                Ok(entry.insert(value)?)
            }
        }
    }

    /// The value, put in as its type's default if there is none.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`].
    pub fn or_default(self) -> Result<Ref<'a, K, V>>
    where
        V: Default,
    {
        self.or_insert_with(V::default)
    }

    /// Changes the value, if there is one: see [`OccupiedEntry::modify`].
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`].
    pub fn and_modify(mut self, change: impl FnOnce(&mut V)) -> Result<Self>
    where
        V: Clone,
    {
        if let Entry::Occupied(entry) = &mut self {
            entry.modify(change)?;
        }
        Ok(self)
    }
}

impl<'a, K, V, H, S> OccupiedEntry<'a, K, V, H, S>
where
    K: ShmSafe + Sync + Hash + Eq,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync + BuildHasher,
{
    /// The key, as it is in the map.
    pub fn key(&self) -> &K {
        self.item().key()
    }

    /// The value.
    pub fn get(&self) -> &V {
        &self.item().value
    }

    fn item(&self) -> &Item<K, V> {
        self.held.pin.check_process();
        // SAFETY: in bounds, there, gone: linked, so valid, and not changed; it is replaced or unlinked by `&mut self` only.
        unsafe { self.item.as_ref() }
    }

    /// Gives back the lock and the key; the guard of the value stays.
    pub fn into_ref(self) -> Ref<'a, K, V> {
        let Held { pin, .. } = self.held;
        pin.cover_born();
        Ref::new(pin, self.item)
    }

    /// Replaces the value.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`]; the value comes back.
    pub fn insert(&mut self, value: V) -> std::result::Result<(), Rejected<V>> {
        let heap = self.held.locked.map.heap();
        if let Err(error) = heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        let old = self.item();
        let assemble = |node, value| Item::with_key_of(node, old, value);
        let new = Unlinked::make(heap, value, assemble)?;
        let place = (self.table, self.index, self.item);
        self.item = self.held.locked.replace(self.held.hash, place, new, true);
        Ok(())
    }

    /// Changes a copy of the value, and puts that in its place.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`]; the value is as it was.
    pub fn modify(&mut self, change: impl FnOnce(&mut V)) -> Result<()>
    where
        V: Clone,
    {
        let mut value = self.get().clone();
        change(&mut value);
        Ok(self.insert(value)?)
    }

    /// Takes the entry out of the map; gives a guard of it.
    pub fn remove(mut self) -> Ref<'a, K, V> {
        self.held.pin.cover_born();
        let pin = self.held.pin.again();
        let removed = Ref::new(pin, self.item);
        let place = (self.table, self.index, self.item);
        self.held.locked.remove(place);
        removed
    }
}

impl<'a, K, V, H, S> VacantEntry<'a, K, V, H, S>
where
    K: ShmSafe + Sync + Hash + Eq,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync + BuildHasher,
{
    /// The key that was asked for.
    pub fn key(&self) -> &K {
        &self.key
    }

    /// The key, and no entry.
    pub fn into_key(self) -> K {
        self.key
    }

    /// Puts the value in; gives a guard of it.
    ///
    /// # Errors
    ///
    /// As [`ShmHashMap::insert`]; the value comes back.
    pub fn insert(self, value: V) -> std::result::Result<Ref<'a, K, V>, Rejected<V>> {
        let VacantEntry { mut held, key } = self;
        let heap = held.locked.map.heap();
        if let Err(error) = heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        let assemble = |node, (key, value)| Item::new(node, key, value);
        let item = match Unlinked::make(heap, (key, value), assemble) {
            Ok(item) => item,
            Err(Rejected { value, error }) => return Err(Rejected::new(value.1, error)),
        };
        match held.locked.link(held.hash, item) {
            Ok(item) => {
                let Held { pin, locked, .. } = held;
                pin.cover_born();
                drop(locked);
                Ok(Ref::new(pin, item))
            }
            Err((item, error)) => Err(Rejected::new(item.into_inner().into_parts().1, error)),
        }
    }
}

impl<K, V, H, S> fmt::Debug for Entry<'_, K, V, H, S>
where
    K: ShmSafe + Sync + Hash + Eq + fmt::Debug,
    V: ShmSafe + Sync + fmt::Debug,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync + BuildHasher,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Entry");
        debug.field("key", self.key());
        if let Entry::Occupied(entry) = self {
            debug.field("value", entry.get());
        }
        debug.finish_non_exhaustive()
    }
}

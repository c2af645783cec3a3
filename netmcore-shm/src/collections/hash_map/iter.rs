//! All entries of a map, shard after shard.
//!
//! **Protocol.** The items of a shard are noted under its lock, in private memory; then they are given out, under a pin from before. So a shard is seen
//! as it was at one moment, the shards at one moment after the other. A thread that has an entry of the map takes no lock, and
//! sees even a shard as it changes.
//!
//! **If a process dies here.** Its pin is cleared; the lock is handed over.
//!
//! # Safety
//!
//! Items that were noted are kept by the pin, which covered all that was linked then.

#![allow(unsafe_code)]

use super::shard::{Locked, table_at};
use super::table::{Item, item_of};
use super::{Ref, ShmHashMap};
use crate::epoch::Pin;
use crate::safe::ShmSafe;
use std::fmt;
use std::iter::FusedIterator;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::SeqCst;

/// The entries of a map, made by [`ShmHashMap::iter`].
pub struct Iter<'a, K: ShmSafe + Sync, V: ShmSafe + Sync, H: ShmSafe + Sync, S: ShmSafe + Sync> {
    map: &'a ShmHashMap<K, V, H, S>,
    pin: Pin,
    next_shard: usize,
    items: std::vec::IntoIter<NonNull<Item<K, V>>>,
}

impl<'a, K, V, H, S> Iter<'a, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    pub(super) fn new(map: &'a ShmHashMap<K, V, H, S>) -> Self {
        Iter {
            map,
            pin: Pin::new(map.heap()),
            next_shard: 0,
            items: Vec::new().into_iter(),
        }
    }

    fn note_items(&mut self) -> bool {
        self.pin.check_process();
        let Some(shard) = self.map.shards().get(self.next_shard) else {
            return false;
        };
        self.next_shard += 1;
        let mut items = Vec::new();
        if let Ok(locked) = Locked::new(self.map, shard) {
            self.pin.cover_born();
            locked.for_each(|item| items.push(item));
        } else {
            self.pin.read(|cover| {
                items.clear();
                let word = shard.table.load();
                // SAFETY: under the pin, and covered if it is asked; if it is not, the address is not followed.
                let table = cover.is_enough().then(|| unsafe { table_at(word) })?;
                let words = table.map_or(&[][..], |table| table.words());
                items.extend(words.iter().filter_map(|word| item_of(word.load(SeqCst))));
                cover.is_enough().then_some(())
            });
        }
        self.items = items.into_iter();
        true
    }
}

impl<'a, K, V, H, S> Iterator for Iter<'a, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    type Item = Ref<'a, K, V>;

    fn next(&mut self) -> Option<Ref<'a, K, V>> {
        loop {
            if let Some(item) = self.items.next() {
                return Some(Ref::new(self.pin.again(), item));
            }
            if !self.note_items() {
                return None;
            }
        }
    }
}

impl<K, V, H, S> FusedIterator for Iter<'_, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
}

impl<K, V, H, S> fmt::Debug for Iter<'_, K, V, H, S>
where
    K: ShmSafe + Sync,
    V: ShmSafe + Sync,
    H: ShmSafe + Sync,
    S: ShmSafe + Sync,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iter").finish_non_exhaustive()
    }
}

/// The key of an entry, as a [`Ref`] is of its value.
pub struct KeyRef<'a, K, V>(pub(super) Ref<'a, K, V>);

impl<K, V> Deref for KeyRef<'_, K, V> {
    type Target = K;

    #[inline]
    fn deref(&self) -> &K {
        self.0.key()
    }
}

impl<K: fmt::Debug, V> fmt::Debug for KeyRef<'_, K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

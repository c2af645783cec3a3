//! What a process inherits: written by its asker, and a use of each region in it while the slot is queued or running.
//!
//! **Protocol.** The asker writes the set into the slot while that is `Preparing`; from `Queued` on it is constant. All:
//! the resource counter as it is then, so that every id below it is in the set. Only: the ids in a block.
//! Starting asks nobody: the master looks at the slots when a region has no other user.
//!
//! The master reads a block while others may free it and write a new one there; it uses what it has read only if the slot
//! is as before afterwards.
//!
//! **If a process dies here.** The asker: the slot is freed with the set. The worker: the slot fails, and the master looks again.
//!
//! # Safety
//! Blocks are read by atomic loads, inside the bounds that the heap has checked.
#![allow(unsafe_code)]

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use netmcore_sem::{Current, LockGuard};
use netmcore_shm::Block;

use super::layout::{Heirs, InheritOrder, Slot, SlotState, Word, WorkerIndex};
use super::{Control, Place, inherit_tag, tag_of};
use crate::error::Error;
use crate::id::{ProcessId, ResourceId};
use crate::resource::Inherit;

const ID_LEN_BYTES: usize = size_of::<u64>();

impl Control {
    /// Puts what `process` inherits where [`Order`](super::Order) can name it.
    pub(crate) fn place_inherit(
        &self,
        inherit: &Inherit,
        process: ProcessId,
        me: WorkerIndex,
    ) -> Result<InheritOrder, Error> {
        let ids = match inherit {
            Inherit::All => return Ok(InheritOrder::All),
            Inherit::Only(ids) if ids.is_empty() => return Ok(InheritOrder::Only(None)),
            Inherit::Only(ids) => ids,
        };
        let tag = inherit_tag(tag_of(process));
        let block = self
            .heap
            .alloc(ids.len() * ID_LEN_BYTES, tag, &self.owners(me))
            .map_err(Error::memory(
                "allocating memory for what a process inherits",
            ))?;
        let mut place = Place::new(&self.heap, tag, block);
        for (bytes, id) in place.as_mut().chunks_exact_mut(ID_LEN_BYTES).zip(ids) {
            bytes.copy_from_slice(&id.get().to_ne_bytes());
        }
        Ok(InheritOrder::Only(Some(place.keep())))
    }

    /// While the slot is `Preparing`.
    pub(super) fn set_inherit(&self, slot: &Slot, inherit: InheritOrder) {
        let (below, only) = match inherit {
            InheritOrder::All => (self.header().next_resource.0.load(SeqCst), None),
            InheritOrder::Only(block) => (0, block),
        };
        slot.inherit_below.store(below, Relaxed);
        slot.inherit_only.store(only);
    }

    /// Says that all ids below this one have been given out, before anybody is told of one.
    pub(crate) fn set_next_resource(&self, next: ResourceId) {
        self.header().next_resource.0.store(next.get(), SeqCst);
    }

    /// The region of the run-wide heap of named objects.
    pub(crate) fn named_heap(&self) -> Option<ResourceId> {
        match self.header().named_heap.load(SeqCst) {
            0 => None,
            id => Some(ResourceId::from_raw(id)),
        }
    }

    /// Called by the master.
    pub(crate) fn set_named_heap(&self, id: Option<ResourceId>) {
        let cell = &self.header().named_heap;
        cell.store(id.map_or(0, ResourceId::get), SeqCst);
    }

    /// Held by the one that makes the heap of named objects; a dead one's is handed over.
    pub(crate) fn lock_named_heap(&self) -> LockGuard<'_> {
        match self.header().named_heap_maker.lock(&Current) {
            Ok(guard) => guard,
            Err(died) => died.guard,
        }
    }

    /// What `process`, which the caller runs, inherits; `None`: everything.
    pub(crate) fn inherits_only(&self, process: ProcessId) -> Option<Vec<ResourceId>> {
        let (slot, _) = self.key(process);
        if slot.inherit_below.load(Relaxed) > 0 {
            return None;
        }
        let ids = self.inherited_ids(slot.inherit_only.load());
        Some(ids.into_iter().map(ResourceId::from_raw).collect())
    }

    /// What all queued and running processes inherit.
    pub(crate) fn heirs(&self) -> Heirs {
        let mut heirs = Heirs::default();
        for index in self.used_slots() {
            let slot = self.slot_at(index);
            // Again if it goes from one of the two states to the other meanwhile: then it was an heir all the time.
            while let Some((_, word)) = self.occupant(index) {
                if !matches!(word.state(), SlotState::Queued | SlotState::Running) {
                    break;
                }
                let below = slot.inherit_below.load(Relaxed);
                let only = match below {
                    0 => self.inherited_ids(slot.inherit_only.load()),
                    _ => Vec::new(),
                };
                let now = Word(slot.word.load(SeqCst));
                if now.generation() == word.generation() && now.state() == word.state() {
                    heirs.below = heirs.below.max(below);
                    heirs.only.extend(only);
                    break;
                }
            }
        }
        heirs
    }

    /// The ids in a block. Whatever others do with it meanwhile: they are of use only if the slot is the same afterwards.
    fn inherited_ids(&self, block: Option<Block>) -> Vec<u64> {
        let Some(Ok(bytes)) = block.map(|block| self.bytes(block)) else {
            return Vec::new();
        };
        let words = bytes.as_ptr().cast::<AtomicU64>();
        (0..bytes.len() / ID_LEN_BYTES)
            .map(|position| {
                // SAFETY: in bounds: whole words of the block, which lie aligned as all blocks do; here and there: an atomic
                // load, so it may be written meanwhile; gone: a dead process's block stays mapped.
                unsafe { (*words.add(position)).load(Relaxed) }
            })
            .collect()
    }
}

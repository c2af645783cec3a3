//! Shared values found by a name: made by whoever asks first.
//!
//! **Protocol.** A name is an entry in one of 64 lists, added by one CAS of the list's head and never removed. The entry has a
//! lock and the id of a root.
//!
//! | entry | lock | means | the lock's owner died |
//! |---|---|---|---|
//! | no root | free | nobody has made the value, or it was removed | – |
//! | no root | held | its holder makes the value | the next makes it |
//! | a root that is free | held | the value is made, and will be born by the store of the root's word | the next makes it anew |
//! | a root that lives | any | there it is; the name holds one handle | nothing is in doubt |
//!
//! **If a process dies here.** The table. An entry that was allocated and not yet in a list is lost. Removing: between
//! the store in the entry and the handle, the handle is lost, so the value stays until the heap is gone.
//!
//! # Safety
//!
//! As for roots: entries are `'static`, published when complete, never freed, and changed by atomics only. The bytes
//! of the name lie behind the entry and never change.

#![allow(unsafe_code)]

use super::roots::{self, Held, RootId, Unborn};
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::safe::ShmSafe;
use netmcore_sem::{Current, LockGuard, LockWord, Owners};
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

/// The longest name, in bytes.
pub const NAME_MAX_BYTES: usize = 255;

#[repr(C)]
struct Entry {
    next: AtomicU64,
    /// A [`RootId`], or 0.
    root: AtomicU64,
    lock: LockWord,
    name_len_bytes: AtomicU64,
}

impl Entry {
    fn name(&'static self) -> &'static [u8] {
        let len = self.name_len_bytes.load(SeqCst) as usize;
        let at = std::ptr::from_ref(self).addr() + size_of::<Entry>();
        // SAFETY: in bounds: `add` allocated so much behind the entry; nobody changes it once the entry is published.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(at), len) }
    }

    /// The value, with a handle for the caller, if it lives.
    fn get<T: ShmSafe>(&self, heap: HeapRef) -> Result<Option<Held<T>>> {
        let Some(id) = RootId::from_word(self.root.load(SeqCst)) else {
            return Ok(None);
        };
        match Held::acquire(heap, id) {
            Ok(held) => Ok(Some(held)),
            Err(Error::Gone { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Panics
    ///
    /// If the caller has it already.
    fn lock(&self, name: &str) -> LockGuard<'_> {
        assert!(
            self.lock.owner() != Some(Current.me()),
            "the value named {name:?} is asked for in its own initialisation"
        );
        match self.lock.lock(&Current) {
            Ok(guard) => guard,
            // The table says what there is now.
            Err(died) => died.guard,
        }
    }
}

/// The value of that name, with a handle for the caller; `init` makes it if there is none.
pub(super) fn get_or_make<T: ShmSafe>(
    heap: HeapRef,
    name: &str,
    init: impl FnOnce() -> Result<T>,
) -> Result<Held<T>> {
    let entry = find_or_add(heap, name)?;
    if let Some(held) = entry.get(heap)? {
        return Ok(held);
    }
    let _making = entry.lock(name);
    if let Some(held) = entry.get(heap)? {
        return Ok(held);
    }
    crash_point!("shm.arc.name_locked");
    let unborn = Unborn::make(heap, init()?)?;
    entry.root.store(unborn.id().to_word(), SeqCst);
    crash_point!("shm.arc.named");
    // One for the name.
    Ok(unborn.bear(2))
}

/// The value of that name, if it has been made.
pub(super) fn get<T: ShmSafe>(heap: HeapRef, name: &str) -> Result<Option<Held<T>>> {
    check_name(name)?;
    match find(heap, name)? {
        Some(entry) => entry.get(heap),
        None => Ok(None),
    }
}

/// Takes the name's handle from it.
pub(super) fn remove<T: ShmSafe>(heap: HeapRef, name: &str) -> Result<Option<Held<T>>> {
    check_name(name)?;
    let Some(entry) = find(heap, name)? else {
        return Ok(None);
    };
    let _removing = entry.lock(name);
    let Some(held) = entry.get::<T>(heap)? else {
        return Ok(None);
    };
    entry.root.store(0, SeqCst);
    crash_point!("shm.arc.unnamed");
    // SAFETY: the name's handle, which nobody finds any more; ours remains.
    unsafe { held.root.remove_handle::<T>() };
    Ok(Some(held))
}

fn check_name(name: &str) -> Result<()> {
    if (1..=NAME_MAX_BYTES).contains(&name.len()) {
        Ok(())
    } else {
        Err(Error::NameLength {
            len_bytes: name.len(),
            limit_bytes: NAME_MAX_BYTES,
        })
    }
}

fn bucket(heap: HeapRef, name: &str) -> Result<&'static AtomicU64> {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let buckets = roots::name_buckets(heap)?;
    Ok(&buckets[hasher.finish() as usize % buckets.len()])
}

/// Looks in the list from `at` to its end.
fn find_from(mut at: u64, name: &str) -> Option<&'static Entry> {
    while at != 0 {
        // SAFETY: published by `find_or_add`.
        let entry = unsafe { roots::published::<Entry>(at) };
        if entry.name() == name.as_bytes() {
            return Some(entry);
        }
        at = entry.next.load(SeqCst);
    }
    None
}

fn find(heap: HeapRef, name: &str) -> Result<Option<&'static Entry>> {
    Ok(find_from(bucket(heap, name)?.load(SeqCst), name))
}

fn find_or_add(heap: HeapRef, name: &str) -> Result<&'static Entry> {
    check_name(name)?;
    let head = bucket(heap, name)?;
    let mut first = head.load(SeqCst);
    if let Some(entry) = find_from(first, name) {
        return Ok(entry);
    }
    let layout = Layout::from_size_align(size_of::<Entry>() + name.len(), align_of::<Entry>())
        .expect("a name is short");
    let at = roots::zeroed(heap, layout)?;
    crash_point!("shm.arc.name_allocated");
    // SAFETY: in bounds: the name's place is behind the entry; ours alone until it is published.
    unsafe {
        let bytes = at.as_ptr().add(size_of::<Entry>());
        bytes.copy_from_nonoverlapping(name.as_ptr(), name.len());
    }
    let address = at.as_ptr().expose_provenance() as u64;
    // SAFETY: zeroed memory of its layout is an entry.
    let entry = unsafe { roots::published::<Entry>(address) };
    entry.name_len_bytes.store(name.len() as u64, SeqCst);
    loop {
        entry.next.store(first, SeqCst);
        match head.compare_exchange(first, address, SeqCst, SeqCst) {
            Ok(_) => return Ok(entry),
            Err(found) => first = found,
        }
        if let Some(quicker) = find_from(first, name) {
            // SAFETY: allocated above with this layout, and not published.
            unsafe { heap.deallocate(at, layout) };
            return Ok(quicker);
        }
    }
}

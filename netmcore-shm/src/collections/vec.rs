//! A growable array in the heap with one owner: [`ShmVec`].
//!
//! **Protocol.** The elements lie in a block of the heap, behind a head with the capacity and the length. The vector is the
//! block's address; a vector without a block is empty. It lies in private memory, or in a value in the same heap. It is changed through `&mut`.
//!
//! * At the end: an element is written behind the last, then the length is stored. It is taken after the length was stored.
//! * All else, and growth: a new block is made ready, then its address is stored, then the old block is freed. The elements have moved.
//!
//! So each change of the vector is committed by one store, of the length or of the address.
//!
//! **Invariants.**
//! 1. Of all vectors with that address one is no copy made by a fork: it owns the block.
//! 2. The elements below the length are values, and belong to the vector; those behind are none.
//! 3. A block's capacity does not change.
//!
//! **If a process dies here.** A vector in shared memory is as it was before the call or after it. Blocks that it does not have, and
//! elements that it has no more, stay allocated until the heap is gone. What was changed through `&mut [T]` is as far as that had come: an
//! element that was being assigned is in doubt, and elements that own something may be there twice after a swap or a sort. That is for
//! the lock around the vector to tell.
//!
//! **Not here.** The speed of std's: for that there is allocator-api2's `Vec` in a [`HeapRef`], which a death leaves in doubt.
//!
//! # Safety
//!
//! The owner alone reaches the block (invariant 1). It is written only through `&mut` of the owner, up to its capacity. Head and
//! length are read through shared references as atomics.

#![allow(unsafe_code)]

use super::rejected::Rejected;
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::any::type_name;
use std::borrow::{Borrow, BorrowMut};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::slice;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicUsize};

/// A growable array in shared memory with one owner: what std's `Vec` is in private memory.
///
/// It is changed through `&mut`: under a lock, or before it is shared. What can fail for lack of memory says so, and gives
/// values back. It derefs to a slice.
///
/// **Fork.** A forked child has a copy of its parent's vector. It may read it as long as the parent neither changes nor drops it;
/// dropping it does nothing, and changing it panics. To share a vector put it into an [`ShmArc`](crate::ShmArc).
///
/// **Assigning.** `vec[k] = value` does not look whether the pointers in the value lie in the same heap, as [`push`](Self::push) does: call
/// [`HeapRef::check`] before, if it has any.
///
/// # If a process dies
///
/// The vector lies in shared memory: it is as it was before the call or after it. An element that was being assigned through `&mut [T]` is
/// in doubt. The vector lies in the process's own memory: its elements stay allocated until the heap is gone.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmArc, ShmString, ShmVec};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let mut words = ShmVec::new_in(&heap);
/// for word in ["one", "two"] {
///     words.push(ShmString::from_str_in(&heap, word)?)?;
/// }
/// assert_eq!(words.last().unwrap(), "two");
/// let words = ShmArc::new_in(&heap, words)?; // for all processes
/// assert_eq!(words.len(), 2);
///
/// let mut large: ShmVec<u64> = ShmVec::new_in(&heap);
/// assert!(large.reserve(1 << 40).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
pub struct ShmVec<T: ShmSafe> {
    /// Null, or a block.
    block: AtomicPtr<Head>,
    heap: HeapRef,
    mark: Mark,
    owns: PhantomData<T>,
}

/// What a block begins with. The elements follow, aligned.
#[repr(C)]
struct Head {
    capacity: usize,
    len: AtomicUsize,
}

// SAFETY: the address of a block, which is reported, and of values that are themselves ShmSafe. It may be dropped elsewhere, as it
// loses its mark on the way into shared memory.
unsafe impl<T: ShmSafe> ShmSafe for ShmVec<T> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        let block = self.block.load(Relaxed);
        if !block.is_null() {
            visit(block.cast());
        }
        self.heap.visit_pointers(visit);
    }
}

impl<T: ShmSafe> ShmVec<T> {
    /// Where the elements begin in a block.
    const ELEMENTS_AT: usize = size_of::<Head>().next_multiple_of(align_of::<T>());
    /// The first block's capacity: about a cache line.
    const FIRST_CAPACITY: usize = match size_of::<T>() {
        0 => 1,
        size if size <= 12 => (64 - Self::ELEMENTS_AT) / size,
        _ => 4,
    };

    /// An empty vector, which has no block yet.
    pub fn new_in(heap: impl Into<HeapRef>) -> ShmVec<T> {
        ShmVec {
            block: AtomicPtr::new(ptr::null_mut()),
            heap: heap.into(),
            mark: Mark::here(),
            owns: PhantomData,
        }
    }

    /// An empty vector with room for `capacity` elements.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] and [`Error::NoSpace`] if there is no memory.
    pub fn with_capacity_in(heap: impl Into<HeapRef>, capacity: usize) -> Result<ShmVec<T>> {
        let mut vec = ShmVec::new_in(heap);
        vec.reserve(capacity)?;
        Ok(vec)
    }

    /// A vector of what the iterator gives.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push); what was taken so far is dropped.
    pub fn from_iter_in(
        heap: impl Into<HeapRef>,
        values: impl IntoIterator<Item = T>,
    ) -> Result<ShmVec<T>> {
        let mut vec = ShmVec::new_in(heap);
        vec.try_extend(values)?;
        Ok(vec)
    }

    /// A vector of clones of the elements.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn from_slice_in(heap: impl Into<HeapRef>, values: &[T]) -> Result<ShmVec<T>>
    where
        T: Clone,
    {
        let mut vec = ShmVec::new_in(heap);
        vec.extend_from_slice(values)?;
        Ok(vec)
    }

    /// A vector with clones of the elements, in the same heap.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn try_clone(&self) -> Result<ShmVec<T>>
    where
        T: Clone,
    {
        ShmVec::from_slice_in(self.heap, self)
    }

    /// The heap that the elements lie in.
    pub fn heap(&self) -> HeapRef {
        self.heap
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self.head() {
            Some(head) => head.len.load(Relaxed),
            None => 0,
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many elements there may be before a new block is needed.
    pub fn capacity(&self) -> usize {
        self.head().map_or(0, |head| head.capacity)
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        self
    }

    /// The elements, to be changed.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self
    }

    /// Appends an element.
    ///
    /// # Errors
    ///
    /// The value, with [`Error::ForeignPointer`] if it has pointers into another region, or [`Error::OutOfPoolMemory`] or
    /// [`Error::NoSpace`] if there is no memory.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The element is there, whole, or not.
    pub fn push(&mut self, value: T) -> std::result::Result<(), Rejected<T>> {
        self.must_own();
        if let Err(error) = self.heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        let mut head = self.block.load(Relaxed);
        // SAFETY: null, or our block.
        let (mut len, capacity) = match unsafe { head.as_ref() } {
            Some(head) => (head.len.load(Relaxed), head.capacity),
            None => (0, 0),
        };
        if len == capacity {
            match self.grow(1) {
                Ok(grown) => head = grown,
                Err(error) => return Err(Rejected::new(value, error)),
            }
            len = self.len();
        }
        // SAFETY: in bounds: the length is below the capacity; the block is ours.
        unsafe {
            Self::elements(head).add(len).write(value);
            crash_point!("shm.vec.written");
            (*head).len.store(len + 1, Release);
        }
        crash_point!("shm.vec.pushed");
        Ok(())
    }

    /// Takes the last element.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The element is in the vector, or lost with the process.
    pub fn pop(&mut self) -> Option<T> {
        self.must_own();
        let len = self.len().checked_sub(1)?;
        self.set_len(len);
        crash_point!("shm.vec.popped");
        // SAFETY: it was an element, and belongs to the caller since the length was stored (invariant 2).
        Some(unsafe { self.as_mut_ptr().add(len).read() })
    }

    /// Puts an element before the one at `index`. Other than std's it copies all elements to a new block, unless it is at the end.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    ///
    /// # Panics
    ///
    /// If `index` is greater than the length, or it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// All elements are there, with the new one or without.
    pub fn insert(&mut self, index: usize, value: T) -> std::result::Result<(), Rejected<T>> {
        let len = self.len();
        assert!(
            index <= len,
            "insertion at {index} into a ShmVec of {len} elements"
        );
        if index == len {
            return self.push(value);
        }
        self.must_own();
        if let Err(error) = self.heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        let capacity = match len == self.capacity() {
            true => self.amortized(1),
            false => self.capacity(),
        };
        let new = match Self::allocate(self.heap, capacity) {
            Ok(new) => new,
            Err(error) => return Err(Rejected::new(value, error)),
        };
        let from = self.as_mut_ptr();
        // SAFETY: in bounds: the new block has room for one more than the length; nobody else knows of it. The elements are copied
        // before the block becomes the vector's, and those in the old one are not used after.
        unsafe {
            let to = Self::elements(new);
            to.copy_from_nonoverlapping(from, index);
            to.add(index).write(value);
            to.add(index + 1)
                .copy_from_nonoverlapping(from.add(index), len - index);
            *(*new).len.get_mut() = len + 1;
            self.replace_block(new);
        }
        Ok(())
    }

    /// Takes the element at `index`; those behind it move up. Other than std's it copies the rest to a new block, unless it is at
    /// the end, so it may fail.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] and [`Error::NoSpace`] if there is no memory: nothing has changed.
    ///
    /// # Panics
    ///
    /// If there is no such element, or it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The element is in the vector, or lost with the process.
    pub fn remove(&mut self, index: usize) -> Result<T> {
        let len = self.len();
        assert!(
            index < len,
            "removal of element {index} of a ShmVec of {len} elements"
        );
        if index == len - 1
            && let Some(last) = self.pop()
        {
            return Ok(last);
        }
        self.must_own();
        let new = Self::allocate(self.heap, self.capacity())?;
        let from = self.as_mut_ptr();
        // SAFETY: as for `insert`; the element itself is the caller's, since the new block has it no more.
        unsafe {
            let value = from.add(index).read();
            let to = Self::elements(new);
            to.copy_from_nonoverlapping(from, index);
            to.add(index)
                .copy_from_nonoverlapping(from.add(index + 1), len - index - 1);
            *(*new).len.get_mut() = len - 1;
            self.replace_block(new);
            Ok(value)
        }
    }

    /// Keeps the elements for which `keep` is true, in their order, in a new block.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork. If `keep` panics, nothing has changed.
    ///
    /// # If a process dies
    ///
    /// All are there, or those that were kept.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) -> Result<()> {
        self.must_own();
        if self.is_empty() {
            return Ok(());
        }
        let keeps: Vec<bool> = self.iter().map(&mut keep).collect();
        if keeps.iter().all(|keep| *keep) {
            return Ok(());
        }
        let new = Self::allocate(self.heap, self.capacity())?;
        let (from, heap) = (self.as_mut_ptr(), self.heap);
        let old = self.block.load(Relaxed);
        let mut kept = 0;
        // SAFETY: as for `insert`. The old block is kept until the elements in it that were not kept are dropped.
        unsafe {
            let to = Self::elements(new);
            for (index, _) in keeps.iter().enumerate().filter(|(_, keep)| **keep) {
                to.add(kept).copy_from_nonoverlapping(from.add(index), 1);
                kept += 1;
            }
            *(*new).len.get_mut() = kept;
            crash_point!("shm.vec.kept");
            self.block.store(new, Release);
            crash_point!("shm.vec.kept_alone");
            let _old = Block::<T>::of(old, heap);
            for (index, _) in keeps.iter().enumerate().filter(|(_, keep)| !**keep) {
                from.add(index).drop_in_place();
            }
        }
        Ok(())
    }

    /// Drops the elements from `len` on.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// All are there, or `len` elements; what the others own is lost with the process.
    pub fn truncate(&mut self, len: usize) {
        self.must_own();
        let old_len = self.len();
        if len >= old_len {
            return;
        }
        self.set_len(len);
        crash_point!("shm.vec.truncated");
        // SAFETY: they were elements, and belong to us since the length was stored.
        unsafe {
            ptr::slice_from_raw_parts_mut(self.as_mut_ptr().add(len), old_len - len)
                .drop_in_place();
        }
    }

    /// Drops all elements, and keeps the block.
    ///
    /// # Panics
    ///
    /// As [`truncate`](Self::truncate).
    ///
    /// # If a process dies
    ///
    /// As [`truncate`](Self::truncate).
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Appends what the iterator gives.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), of the first that could not be appended. Those before it are there; those after it were not asked for.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The first of them are there, whole; up to all.
    #[doc(alias = "extend")]
    pub fn try_extend(
        &mut self,
        values: impl IntoIterator<Item = T>,
    ) -> std::result::Result<(), Rejected<T>> {
        let mut values = values.into_iter();
        let Some(first) = values.next() else {
            return Ok(());
        };
        if let Err(error) = self.reserve(values.size_hint().0.saturating_add(1)) {
            return Err(Rejected::new(first, error));
        }
        self.push(first)?;
        values.try_for_each(|value| self.push(value))
    }

    /// Appends clones of all the elements, which appear at once.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), without a value; nothing has changed.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork. If a clone panics, nothing has changed.
    ///
    /// # If a process dies
    ///
    /// All of them are there, or none.
    pub fn extend_from_slice(&mut self, values: &[T]) -> Result<()>
    where
        T: Clone,
    {
        self.must_own();
        if values.is_empty() {
            return Ok(());
        }
        self.reserve(values.len())?;
        let len = self.len();
        let mut written = Written::<T> {
            // SAFETY: the capacity is at least the length.
            at: unsafe { self.as_mut_ptr().add(len) },
            count: 0,
        };
        for value in values {
            let value = value.clone();
            self.heap.check(&value)?;
            // SAFETY: in bounds, as so many were reserved; behind the length, so no element is there.
            unsafe { written.at.add(written.count).write(value) };
            written.count += 1;
        }
        mem::forget(written);
        crash_point!("shm.vec.appended");
        self.set_len(len + values.len());
        Ok(())
    }

    /// Makes room for `more` elements, so that appending them cannot fail for lack of memory.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] and [`Error::NoSpace`] if there is no memory.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The elements are the same.
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        self.must_own();
        if more > self.capacity() - self.len() {
            self.grow(more)?;
        }
        Ok(())
    }

    /// Gives up room for elements that are not there, where that saves memory.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    ///
    /// # Panics
    ///
    /// As [`reserve`](Self::reserve).
    ///
    /// # If a process dies
    ///
    /// The elements are the same.
    pub fn shrink_to_fit(&mut self) -> Result<()> {
        self.must_own();
        match self.len() {
            len if len == self.capacity() => Ok(()),
            0 => {
                self.free_block();
                Ok(())
            }
            len => self.move_to(len).map(|_| ()),
        }
    }

    /// Makes a block with room for `more` than the length. Gives it.
    #[cold]
    fn grow(&mut self, more: usize) -> Result<*mut Head> {
        self.move_to(self.amortized(more))
    }

    fn amortized(&self, more: usize) -> usize {
        self.len()
            .saturating_add(more)
            .max(self.capacity().saturating_mul(2))
            .max(Self::FIRST_CAPACITY)
    }

    /// Moves the elements into a new block of that capacity.
    fn move_to(&mut self, capacity: usize) -> Result<*mut Head> {
        let new = Self::allocate(self.heap, capacity)?;
        let len = self.len();
        // SAFETY: in bounds: the capacity is at least the length; nobody else knows of the block. As for `insert`.
        unsafe {
            if len > 0 {
                Self::elements(new).copy_from_nonoverlapping(self.as_mut_ptr(), len);
            }
            *(*new).len.get_mut() = len;
            self.replace_block(new);
        }
        Ok(new)
    }

    /// Commits a new block, and frees the old one, not its elements.
    ///
    /// # Safety
    ///
    /// - The new block has all elements that the vector is to have, by bitwise copies.
    unsafe fn replace_block(&mut self, new: *mut Head) {
        let old = self.block.load(Relaxed);
        crash_point!("shm.vec.filled");
        self.block.store(new, Release);
        crash_point!("shm.vec.moved");
        drop(Block::<T>::of(old, self.heap));
    }

    /// Becomes what `other`, of the same heap, is, by one store. The old elements are dropped after it.
    pub(super) fn take_block_of(&mut self, other: ShmVec<T>) {
        self.must_own();
        debug_assert!(self.heap == other.heap);
        let other = mem::ManuallyDrop::new(other);
        let old = self.block.load(Relaxed);
        crash_point!("shm.vec.replacing");
        self.block.store(other.block.load(Relaxed), Release);
        crash_point!("shm.vec.replaced");
        drop(ShmVec::<T> {
            block: AtomicPtr::new(old),
            heap: self.heap,
            mark: Mark::here(),
            owns: PhantomData,
        });
    }

    /// Lets go of the block, whose elements are gone.
    fn free_block(&mut self) {
        let old = self.block.load(Relaxed);
        self.block.store(ptr::null_mut(), Release);
        crash_point!("shm.vec.emptied");
        drop(Block::<T>::of(old, self.heap));
    }

    /// A block without elements.
    fn allocate(heap: HeapRef, capacity: usize) -> Result<*mut Head> {
        let Some(layout) = Self::layout(capacity) else {
            return Err(Error::OutOfPoolMemory {
                wanted_bytes: (capacity as u64).saturating_mul(size_of::<T>() as u64),
                free_bytes: 0,
                largest_free_bytes: 0,
            });
        };
        let at = heap.allocate(layout)?.cast::<Head>().as_ptr();
        // SAFETY: in bounds of the new block, which is aligned for a head; nobody else knows of it.
        unsafe {
            at.write(Head {
                capacity,
                len: AtomicUsize::new(0),
            });
        }
        crash_point!("shm.vec.allocated");
        Ok(at)
    }

    fn layout(capacity: usize) -> Option<Layout> {
        let bytes = capacity
            .checked_mul(size_of::<T>())?
            .checked_add(Self::ELEMENTS_AT)?;
        let align = align_of::<T>().max(align_of::<Head>());
        Layout::from_size_align(bytes, align).ok()
    }

    /// Where the elements of a block lie.
    ///
    /// # Safety
    ///
    /// - It is a block.
    unsafe fn elements(block: *mut Head) -> *mut T {
        // SAFETY: in bounds of the block, of which the head is the beginning.
        unsafe { block.cast::<u8>().add(Self::ELEMENTS_AT).cast() }
    }

    fn head(&self) -> Option<&Head> {
        // SAFETY: in bounds: null, or a block's head; here and there: changed only through `&mut` of the owner; gone: ours to free.
        unsafe { self.block.load(Relaxed).as_ref() }
    }

    /// Where the elements lie; dangling for a vector without a block.
    fn as_mut_ptr(&mut self) -> *mut T {
        let block = self.block.load(Relaxed);
        if block.is_null() {
            ptr::dangling_mut()
        } else {
            // SAFETY: a block.
            unsafe { Self::elements(block) }
        }
    }

    /// Commits a new length: elements behind it are the caller's.
    fn set_len(&mut self, len: usize) {
        if let Some(head) = self.head() {
            head.len.store(len, Release);
        }
    }

    fn must_own(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "this ShmVec<{}> is a copy made by fork: only the process that made it may change it",
            type_name::<T>()
        );
    }
}

/// A block to be freed, without its elements. Perhaps null.
struct Block<T: ShmSafe> {
    at: *mut Head,
    heap: HeapRef,
    of: PhantomData<T>,
}

impl<T: ShmSafe> Block<T> {
    fn of(at: *mut Head, heap: HeapRef) -> Block<T> {
        Block {
            at,
            heap,
            of: PhantomData,
        }
    }
}

impl<T: ShmSafe> Drop for Block<T> {
    fn drop(&mut self) {
        let Some(at) = ptr::NonNull::new(self.at) else {
            return;
        };
        // SAFETY: a block that the vector has no more; its capacity gives the layout that it was allocated with.
        unsafe {
            let layout = ShmVec::<T>::layout((*self.at).capacity);
            self.heap
                .deallocate(at.cast(), layout.expect("it was allocated"));
        }
    }
}

/// Elements that are written and not yet the vector's.
struct Written<T> {
    at: *mut T,
    count: usize,
}

impl<T> Drop for Written<T> {
    fn drop(&mut self) {
        // SAFETY: so many were written there, and nobody else has them.
        unsafe { ptr::slice_from_raw_parts_mut(self.at, self.count).drop_in_place() };
    }
}

impl<T: ShmSafe> Drop for ShmVec<T> {
    fn drop(&mut self) {
        if !self.mark.is_copy_by_fork() && self.head().is_some() {
            self.truncate(0);
            self.free_block();
        }
    }
}

impl<T: ShmSafe> Deref for ShmVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let block = self.block.load(Relaxed);
        if block.is_null() {
            return &[];
        }
        // SAFETY: in bounds: so many elements lie there (invariant 2); here and there: the owner is borrowed, so nobody changes them;
        // gone: nobody else frees them.
        unsafe { slice::from_raw_parts(Self::elements(block), (*block).len.load(Relaxed)) }
    }
}

impl<T: ShmSafe> DerefMut for ShmVec<T> {
    /// # Panics
    ///
    /// If it is a copy made by fork.
    fn deref_mut(&mut self) -> &mut [T] {
        self.must_own();
        let len = self.len();
        // SAFETY: as for `deref`; the owner is borrowed mutably, and not a copy.
        unsafe { slice::from_raw_parts_mut(self.as_mut_ptr(), len) }
    }
}

impl<T: ShmSafe> AsRef<[T]> for ShmVec<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: ShmSafe> AsMut<[T]> for ShmVec<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self
    }
}

impl<T: ShmSafe> Borrow<[T]> for ShmVec<T> {
    fn borrow(&self) -> &[T] {
        self
    }
}

impl<T: ShmSafe> BorrowMut<[T]> for ShmVec<T> {
    fn borrow_mut(&mut self) -> &mut [T] {
        self
    }
}

impl<T: ShmSafe + fmt::Debug> fmt::Debug for ShmVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ShmSafe + PartialEq<U>, U: ShmSafe> PartialEq<ShmVec<U>> for ShmVec<T> {
    fn eq(&self, other: &ShmVec<U>) -> bool {
        **self == **other
    }
}

macro_rules! compares_with {
    ($([$($parameter:tt)*] $other:ty),* $(,)?) => {
        $(
            impl<T: ShmSafe + PartialEq<U>, U, $($parameter)*> PartialEq<$other> for ShmVec<T> {
                fn eq(&self, other: &$other) -> bool {
                    **self == other[..]
                }
            }
        )*
    };
}

compares_with!([] [U], [] &[U], [const N: usize] [U; N], [const N: usize] &[U; N], [] Vec<U>);

impl<T: ShmSafe + Eq> Eq for ShmVec<T> {}

impl<T: ShmSafe + PartialOrd> PartialOrd for ShmVec<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (**self).partial_cmp(&**other)
    }
}

impl<T: ShmSafe + Ord> Ord for ShmVec<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl<T: ShmSafe + Hash> Hash for ShmVec<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

/// Appends the bytes of each call at once.
impl io::Write for ShmVec<u8> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.extend_from_slice(bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a, T: ShmSafe> IntoIterator for &'a ShmVec<T> {
    type Item = &'a T;
    type IntoIter = slice::Iter<'a, T>;

    fn into_iter(self) -> slice::Iter<'a, T> {
        self.iter()
    }
}

impl<'a, T: ShmSafe> IntoIterator for &'a mut ShmVec<T> {
    type Item = &'a mut T;
    type IntoIter = slice::IterMut<'a, T>;

    fn into_iter(self) -> slice::IterMut<'a, T> {
        self.iter_mut()
    }
}

impl<T: ShmSafe> IntoIterator for ShmVec<T> {
    type Item = T;
    type IntoIter = ShmVecIntoIter<T>;

    /// # Panics
    ///
    /// If it is a copy made by fork.
    fn into_iter(mut self) -> ShmVecIntoIter<T> {
        self.must_own();
        let end = self.len();
        // From here on the elements are the iterator's.
        self.set_len(0);
        ShmVecIntoIter {
            vec: self,
            next: 0,
            end,
        }
    }
}

/// The elements of a [`ShmVec`], moved out.
pub struct ShmVecIntoIter<T: ShmSafe> {
    /// The block; its length is 0.
    vec: ShmVec<T>,
    next: usize,
    end: usize,
}

impl<T: ShmSafe> Iterator for ShmVecIntoIter<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.next == self.end {
            return None;
        }
        let index = self.next;
        self.next += 1;
        // SAFETY: an element that nobody has taken yet.
        Some(unsafe { self.vec.as_mut_ptr().add(index).read() })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.end - self.next, Some(self.end - self.next))
    }
}

impl<T: ShmSafe> DoubleEndedIterator for ShmVecIntoIter<T> {
    fn next_back(&mut self) -> Option<T> {
        if self.next == self.end {
            return None;
        }
        self.end -= 1;
        // SAFETY: as for `next`.
        Some(unsafe { self.vec.as_mut_ptr().add(self.end).read() })
    }
}

impl<T: ShmSafe> ExactSizeIterator for ShmVecIntoIter<T> {}

impl<T: ShmSafe> FusedIterator for ShmVecIntoIter<T> {}

impl<T: ShmSafe> Drop for ShmVecIntoIter<T> {
    fn drop(&mut self) {
        if self.vec.mark.is_copy_by_fork() {
            return;
        }
        let (at, count) = (self.next, self.end - self.next);
        // SAFETY: elements that nobody has taken; the block is freed after this, with the vector.
        unsafe {
            ptr::slice_from_raw_parts_mut(self.vec.as_mut_ptr().add(at), count).drop_in_place();
        }
    }
}

impl<T: ShmSafe + fmt::Debug> fmt::Debug for ShmVecIntoIter<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmVecIntoIter")
            .field("left", &self.len())
            .finish()
    }
}

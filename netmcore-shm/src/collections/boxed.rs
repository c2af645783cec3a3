//! A value in the heap with one owner: [`ShmBox`].
//!
//! **Protocol.** The value lies in a block of its own; the box is the block's address. The box lies in private memory, or in a value in the same heap.
//!
//! **Invariants.**
//! 1. Of all boxes with that address one is no copy made by a fork: it owns the value.
//!
//! 2. The address is null once the value is being dropped. Only a death in the middle of an assignment, which drops the old value before it writes
//!    the new one, leaves such a box where others find it.
//!
//! **If a process dies here.** A value that nobody else can reach stays allocated until the heap is gone. A box without a value may stay (invariant 2):
//! it can be replaced and dropped like any other; to use its value is a panic.
//!
//! **Not here.** Several owners: [`ShmArc`](crate::ShmArc).
//!
//! # Safety
//!
//! The owner alone reaches the value (invariant 1), and the block stays allocated until the owner frees it, which it does after the address was made null.

#![allow(unsafe_code)]

use super::rejected::Rejected;
use crate::error::Result;
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
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Relaxed, Release};

/// A value in shared memory with one owner: what std's `Box` is in private memory. For recursive types, and for large parts of values.
///
/// **Fork.** A forked child has a copy of its parent's box. It may read the value as long as the parent neither changes nor drops it;
/// dropping it does nothing, and changing the value through it panics. To share a value use [`ShmArc`](crate::ShmArc).
///
/// **Assigning.** `*boxed = value` does not look whether the pointers in the value lie in the same heap: call [`HeapRef::check`] before, if it has any.
///
/// # If a process dies
///
/// The box lies in shared memory: its value stays, as whoever was changing it left it. If the box itself was being assigned, it has
/// the old value, the new one or none; having none it panics where the value is used, and may be assigned anew. It lies in the process's own
/// memory: the value stays allocated until the heap is gone.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmArc, ShmBox, ShmSafe};
///
/// #[derive(ShmSafe)]
/// enum List {
///     Cons(u64, ShmBox<List>),
///     Nil,
/// }
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let mut list = List::Nil;
/// for number in 0..3 {
///     list = List::Cons(number, ShmBox::new_in(&heap, list)?);
/// }
/// let list = ShmArc::new_in(&heap, list)?; // for all processes
/// assert!(matches!(&*list, List::Cons(2, rest) if matches!(**rest, List::Cons(1, _))));
///
/// let other = Heap::anonymous(&arena, 64 << 20)?;
/// let foreign = ShmBox::new_in(&other, 5_u8)?;
/// assert!(ShmBox::new_in(&heap, foreign).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
pub struct ShmBox<T: ShmSafe> {
    value: AtomicPtr<T>,
    heap: HeapRef,
    mark: Mark,
    owns: PhantomData<T>,
}

// SAFETY: the address of a value that is itself ShmSafe; reported. It may be dropped elsewhere, as it loses its mark on the way into
// shared memory.
unsafe impl<T: ShmSafe> ShmSafe for ShmBox<T> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        let value = self.value.load(Relaxed);
        if !value.is_null() {
            visit(value.cast());
        }
        self.heap.visit_pointers(visit);
    }
}

impl<T: ShmSafe> ShmBox<T> {
    /// One byte at least, so that every box has a block, and an address in the heap.
    const LAYOUT: Layout = {
        let layout = Layout::new::<T>();
        match layout.size() {
            0 => match Layout::from_size_align(1, layout.align()) {
                Ok(layout) => layout,
                Err(_) => layout,
            },
            _ => layout,
        }
    };

    /// Puts the value into a new block of the heap.
    ///
    /// # Errors
    ///
    /// The value, with [`ForeignPointer`](crate::Error::ForeignPointer) if it has pointers into another region, or
    /// [`OutOfPoolMemory`](crate::Error::OutOfPoolMemory) or [`NoSpace`](crate::Error::NoSpace) if there is no memory.
    ///
    /// # If a process dies
    ///
    /// The block, and what the value owns, stay allocated until the heap is gone.
    pub fn new_in(
        heap: impl Into<HeapRef>,
        value: T,
    ) -> std::result::Result<ShmBox<T>, Rejected<T>> {
        let heap = heap.into();
        if let Err(error) = heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        let block = match heap.allocate(Self::LAYOUT) {
            Ok(block) => block.cast::<T>(),
            Err(error) => return Err(Rejected::new(value, error)),
        };
        crash_point!("shm.boxed.allocated");
        // SAFETY: in bounds: a block of T's layout; nobody else knows of it.
        unsafe { block.write(value) };
        Ok(ShmBox {
            value: AtomicPtr::new(block.as_ptr()),
            heap,
            mark: Mark::here(),
            owns: PhantomData,
        })
    }

    /// Moves the value out, and frees its block.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The value is lost with the process.
    pub fn into_inner(this: Self) -> T {
        this.must_own();
        let this = ManuallyDrop::new(this);
        let at = this.at();
        // SAFETY: the value is ours, and not touched any more.
        let value = unsafe { at.read() };
        crash_point!("shm.boxed.taken");
        // SAFETY: allocated with this layout by `new_in`; the value has moved out.
        unsafe { this.heap.deallocate(at.cast(), Self::LAYOUT) };
        value
    }

    /// Keeps the value until the heap is gone, and gives it for as long as the process lives.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    pub fn leak(this: Self) -> &'static mut T {
        this.must_own();
        let this = ManuallyDrop::new(this);
        // SAFETY: ours alone, and never freed; the region stays mapped until the process ends.
        unsafe { this.at().as_mut() }
    }

    /// A box with a clone of the value, in the same heap.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in).
    pub fn try_clone(&self) -> Result<ShmBox<T>>
    where
        T: Clone,
    {
        Ok(ShmBox::new_in(self.heap, T::clone(self))?)
    }

    /// Where the value lies, in every process.
    pub fn as_ptr(this: &Self) -> *const T {
        this.at().as_ptr()
    }

    /// The heap that the value lies in.
    pub fn heap(this: &Self) -> HeapRef {
        this.heap
    }

    #[inline]
    fn at(&self) -> NonNull<T> {
        match NonNull::new(self.value.load(Relaxed)) {
            Some(at) => at,
            None => no_value(type_name::<T>()),
        }
    }

    fn must_own(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "this ShmBox<{}> is a copy made by fork: only the process that made it may change it",
            type_name::<T>()
        );
    }
}

/// Invariant 2.
#[cold]
fn no_value(type_name: &str) -> ! {
    panic!(
        "this ShmBox<{type_name}> has no value: a process died while it put another one in its place"
    )
}

impl<T: ShmSafe> Drop for ShmBox<T> {
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        let Some(at) = NonNull::new(*self.value.get_mut()) else {
            return;
        };
        // Before anything else: whoever finds the box after a death in here does not drop the value again.
        self.value.store(ptr::null_mut(), Release);
        crash_point!("shm.boxed.emptied");
        // SAFETY: ours (invariant 1), and not used after this.
        unsafe { at.drop_in_place() };
        crash_point!("shm.boxed.dropped");
        // SAFETY: allocated with this layout by `new_in`.
        unsafe { self.heap.deallocate(at.cast(), Self::LAYOUT) };
    }
}

impl<T: ShmSafe> Deref for ShmBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: in bounds: a T lies there; here and there: the owner is borrowed, so nobody changes it; gone: nobody else frees it.
        unsafe { self.at().as_ref() }
    }
}

impl<T: ShmSafe> DerefMut for ShmBox<T> {
    /// # Panics
    ///
    /// If it is a copy made by fork.
    fn deref_mut(&mut self) -> &mut T {
        self.must_own();
        // SAFETY: as for `deref`; the owner is borrowed mutably.
        unsafe { self.at().as_mut() }
    }
}

impl<T: ShmSafe> AsRef<T> for ShmBox<T> {
    fn as_ref(&self) -> &T {
        self
    }
}

impl<T: ShmSafe> AsMut<T> for ShmBox<T> {
    fn as_mut(&mut self) -> &mut T {
        self
    }
}

impl<T: ShmSafe> Borrow<T> for ShmBox<T> {
    fn borrow(&self) -> &T {
        self
    }
}

impl<T: ShmSafe> BorrowMut<T> for ShmBox<T> {
    fn borrow_mut(&mut self) -> &mut T {
        self
    }
}

impl<T: ShmSafe + fmt::Debug> fmt::Debug for ShmBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ShmSafe + fmt::Display> fmt::Display for ShmBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ShmSafe + PartialEq> PartialEq for ShmBox<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: ShmSafe + Eq> Eq for ShmBox<T> {}

impl<T: ShmSafe + PartialOrd> PartialOrd for ShmBox<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (**self).partial_cmp(&**other)
    }
}

impl<T: ShmSafe + Ord> Ord for ShmBox<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl<T: ShmSafe + Hash> Hash for ShmBox<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

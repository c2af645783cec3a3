//! A value that is replaced as a whole while others read it: [`ShmCell`].
//!
//! **Protocol.** Each version of the value lies in a block of its own, and is not changed. A word has the address of the current one; to
//! replace it is to swap the word. Readers pin themselves (module `epoch`), load the word, and use the version as long as they like; it is freed when
//! nobody can have it any more, by one of those that replace.
//!
//! The word lies in a block, not in the cell, so that the copies of a cell that forked children have in private memory are the same cell.
//!
//! **Invariants.** Those of `epoch::versions`, and:
//! 1. Who follows the word, or an address it once had, has a pin from before the load, or is alone.
//! 2. The address of the word's block is null once the cell is being dropped. Others find such a cell only after a death in the middle of an assignment,
//!    which drops the old one before it writes the new one: it can be replaced and dropped, and panics where it is used.
//!
//! **If a process dies here.** The cell has the version from before or the new one: the swap is the commit. At most one version is lost,
//! which means that it stays allocated until the heap is gone. A reader's pin is cleared when somebody replaces.
//!
//! # Safety
//!
//! The word's block lives as long as the cell that is not a copy by fork. Versions: invariant 1.

#![allow(unsafe_code)]

use crate::collections::{Invariant, Rejected};
use crate::epoch::retired::Node;
use crate::epoch::versions::Versions;
use crate::epoch::{self, Domain, Pin, Unlinked, from_word, to_word};
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// A value in shared memory that is replaced as a whole, by anybody, while others read it. Readers never wait, and never make others wait.
///
/// [`load`](Self::load) gives a guard of the value as it is then; whoever replaces it does not disturb the guard. It has a *header* of the
/// user's type, which is set when the cell is made.
///
/// **Memory.** A version that was replaced is freed by one of those that replace it later, as soon as nobody has a guard from the time
/// when it was current. With guards that are kept for long, what stays is what was current, or about to be, between the first
/// and the last [`load`](Self::load) of one thread's guards: not more, however often the value is replaced later. The pin of a killed
/// reader is cleared. [`reclaim`](Self::reclaim) frees what can be freed now.
///
/// **Fork.** A forked child has copies of its parent's cells in private memory. They can be used as long as the parent keeps its own;
/// dropping one in the child does nothing.
///
/// # If a process dies
///
/// Each change is made by one atomic step: it was made or not. See the module. If the cell itself was being assigned, as a part of something in shared memory, it is
/// the old one, the new one or none; being none it panics where it is used, and may be assigned anew.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmArc, ShmCell};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let limits = ShmArc::new_in(&heap, ShmCell::new_in(&heap, (10_u32, 0.5_f64))?)?;
/// let before = limits.load();
/// limits.store((20, 0.75))?; // in a forked child, for instance
/// assert_eq!(*before, (10, 0.5));
/// assert_eq!(*limits.load(), (20, 0.75));
/// // Who has seen an old version replaces nothing.
/// assert!(limits.compare_exchange(&before, (30, 1.0)).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[doc(alias = "Netmcore_ref")]
#[doc(alias = "Netmcore_ref.sref")]
pub struct ShmCell<T: ShmSafe + Sync, H: ShmSafe + Sync = ()> {
    heap: HeapRef,
    versions: AtomicPtr<Versions>,
    mark: Mark,
    header: H,
    of: Invariant<(T, H)>,
}

/// One version of the value.
#[repr(C)]
struct Version<T> {
    node: Node,
    value: T,
}

// SAFETY: addresses of blocks of the heap, which mean the same wherever it is mapped, and are reported; a header that is ShmSafe. Versions were
// checked when they were put in. It may be dropped anywhere: it loses its mark on the way.
unsafe impl<T: ShmSafe + Sync, H: ShmSafe + Sync> ShmSafe for ShmCell<T, H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        self.heap.visit_pointers(visit);
        let versions = self.versions.load(Relaxed);
        if !versions.is_null() {
            visit(versions.cast());
        }
        self.header.visit_pointers(visit);
    }
}

impl<T: ShmSafe + Sync> ShmCell<T> {
    /// Makes a cell with this value.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPointer`] if the value has pointers into another region; [`Error::OutOfPoolMemory`] and
    /// [`Error::NoSpace`] if there is no memory. The value comes back.
    ///
    /// # If a process dies
    ///
    /// Two blocks may stay allocated until the heap is gone.
    pub fn new_in(
        heap: impl Into<HeapRef>,
        value: T,
    ) -> std::result::Result<ShmCell<T>, Rejected<T>> {
        ShmCell::with_header_in(heap, (), value)
    }
}

impl<T: ShmSafe + Sync, H: ShmSafe + Sync> ShmCell<T, H> {
    /// Makes a cell with a header and this value.
    ///
    /// # Errors
    ///
    /// As [`ShmCell::new_in`], for the header too.
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        header: H,
        value: T,
    ) -> std::result::Result<ShmCell<T, H>, Rejected<T>> {
        let heap = heap.into();
        if let Err(error) = heap.check(&header) {
            return Err(Rejected::new(value, error));
        }
        let first = Version::make(heap, value)?;
        let versions = match heap.allocate(Layout::new::<Versions>()) {
            Ok(at) => at.cast::<Versions>(),
            Err(error) => return Err(Rejected::new(first.into_inner().value, error)),
        };
        let first = to_word(first.into_raw());
        // SAFETY: in bounds and aligned, by the layout; nobody else knows of it.
        unsafe { versions.write(Versions::new(first)) };
        Ok(ShmCell {
            heap,
            versions: AtomicPtr::new(versions.as_ptr()),
            mark: Mark::here(),
            header,
            of: PhantomData,
        })
    }

    /// The header.
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The heap that the values lie in.
    pub fn heap(&self) -> HeapRef {
        self.heap
    }

    /// The value as it is now. The guard keeps this version, whatever is stored later.
    ///
    /// Waits for nobody, takes no lock and allocates nothing, but that a thread's first read in a heap may have to make room for its pin.
    ///
    /// # Panics
    ///
    /// If there was no memory for that pin. The first 64 threads find room that is there.
    ///
    /// # If a process dies
    ///
    /// Its pins are cleared by one of those that replace the value.
    #[doc(alias = "Netmcore_ref.deref_p")]
    #[doc(alias = "Netmcore_ref.deref_ro")]
    #[inline]
    pub fn load(&self) -> CellRef<'_, T> {
        self.load_under(Pin::new(self.heap))
    }

    fn load_under(&self, pin: Pin) -> CellRef<'_, T> {
        let word = pin.read(|cover| self.versions().load(cover));
        CellRef::new(pin, word)
    }

    /// A copy of the value as it is now.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[doc(alias = "Netmcore_ref.deref_c")]
    pub fn load_cloned(&self) -> T
    where
        T: Clone,
    {
        T::clone(&self.load())
    }

    /// Replaces the value.
    ///
    /// # Errors
    ///
    /// As [`ShmCell::new_in`]. The value comes back, and the cell is as it was.
    ///
    /// # If a process dies
    ///
    /// The cell has the old value or the new one. The other one may stay allocated until the heap is gone.
    #[doc(alias = "Netmcore_ref.assign")]
    pub fn store(&self, value: T) -> std::result::Result<(), Rejected<T>> {
        let new = Version::make(self.heap, value)?;
        let old = self.versions().swap(to_word(new.into_raw()));
        self.retire(old);
        Ok(())
    }

    /// Replaces the value, and gives a guard of the one before.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    ///
    /// # If a process dies
    ///
    /// As [`store`](Self::store).
    pub fn swap(&self, value: T) -> std::result::Result<CellRef<'_, T>, Rejected<T>> {
        let pin = match Pin::try_new(self.heap) {
            Ok(pin) => pin,
            Err(error) => return Err(Rejected::new(value, error)),
        };
        let new = Version::make(self.heap, value)?;
        let old = self.versions().swap(to_word(new.into_raw()));
        // It is not retired before the next step.
        pin.cover_born();
        let old: CellRef<'_, T> = CellRef::new(pin, old);
        self.retire(old.word());
        Ok(old)
    }

    /// Replaces the value by what `next` makes of it, and gives a guard of the new one.
    ///
    /// If somebody else replaces it meanwhile, `next` is called again, with the newer value: no update is lost.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPointer`], [`Error::OutOfPoolMemory`], [`Error::NoSpace`]; the cell is as it was.
    ///
    /// # If a process dies
    ///
    /// As [`store`](Self::store).
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmCell};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let sum = ShmCell::new_in(&heap, 0_u64)?;
    /// std::thread::scope(|scope| {
    ///     for _ in 0..2 {
    ///         scope.spawn(|| (0..100).try_for_each(|_| sum.update(|sum| sum + 1).map(drop)));
    ///     }
    /// });
    /// assert_eq!(sum.load_cloned(), 200);
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn update(&self, mut next: impl FnMut(&T) -> T) -> Result<CellRef<'_, T>> {
        let pin = Pin::try_new(self.heap)?;
        loop {
            let before = self.load_under(pin.again());
            let new = Version::make(self.heap, next(&before))?;
            // Somebody may replace it before this returns.
            pin.cover_born();
            if let Ok(word) = self.exchange(&before, new) {
                return Ok(CellRef::new(pin, word));
            }
        }
    }

    /// Replaces the value if `expected` is still what the cell has.
    ///
    /// # Errors
    ///
    /// [`NotExchanged::Changed`] with a guard of what the cell has instead; [`NotExchanged::Failed`] as for [`store`](Self::store).
    /// The value comes back.
    ///
    /// # If a process dies
    ///
    /// As [`store`](Self::store).
    pub fn compare_exchange(
        &self,
        expected: &CellRef<'_, T>,
        value: T,
    ) -> std::result::Result<(), Rejected<T, NotExchanged<'_, T>>> {
        let new = Version::make(self.heap, value)
            .map_err(|rejected| Rejected::new(rejected.value, rejected.error))?;
        match self.exchange(expected, new) {
            Ok(_) => Ok(()),
            Err(new) => {
                let now = self.load_under(expected.pin.again());
                let value = new.into_inner().value;
                Err(Rejected::new(value, NotExchanged::Changed { now }))
            }
        }
    }

    /// Replaces the value if `may_replace` says so of what the cell has. Gives the value back if not.
    ///
    /// If somebody else replaces it meanwhile, it is asked again.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    ///
    /// # If a process dies
    ///
    /// As [`store`](Self::store).
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmCell};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let best = ShmCell::new_in(&heap, 7.5_f64)?;
    /// assert_eq!(best.store_if(|best| 8.0 > *best, 8.0)?, None);
    /// assert_eq!(best.store_if(|best| 6.0 > *best, 6.0)?, Some(6.0));
    /// assert_eq!(*best.load(), 8.0);
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn store_if(
        &self,
        mut may_replace: impl FnMut(&T) -> bool,
        value: T,
    ) -> std::result::Result<Option<T>, Rejected<T>> {
        let mut new = Version::make(self.heap, value)?;
        loop {
            let before = self.load();
            if !may_replace(&before) {
                return Ok(Some(new.into_inner().value));
            }
            match self.exchange(&before, new) {
                Ok(_) => return Ok(None),
                Err(again) => new = again,
            }
        }
    }

    /// Frees what was replaced and nobody reads any more; asks of each reader that is in the way whether it lives.
    ///
    /// Replacing does so too, now and then; this is for a cell that is not replaced any more.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`] if the heap was written over.
    pub fn reclaim(&self) -> Result<()> {
        let domain = Domain::of(self.heap)?;
        // SAFETY: the list has versions of this cell.
        unsafe { domain.reclaim_all(&self.versions().retired, |link| self.free(link)) };
        Ok(())
    }

    /// The word of the new version, if the cell still had `expected`.
    fn exchange(
        &self,
        expected: &CellRef<'_, T>,
        new: Unlinked<Version<T>>,
    ) -> std::result::Result<u64, Unlinked<Version<T>>> {
        expected.pin.check_process();
        let word = to_word(new.address());
        match self.versions().compare_exchange(expected.word(), word) {
            Ok(()) => {
                let _ = new.into_raw();
                self.retire(expected.word());
                Ok(word)
            }
            Err(_) => Err(new),
        }
    }

    /// Puts a version that was swapped out into the list, and frees what can be freed.
    fn retire(&self, old: u64) {
        // A version was made, so there is a domain.
        let Ok(domain) = Domain::of(self.heap) else {
            return;
        };
        let retired = &self.versions().retired;
        let len = size_of::<Version<T>>();
        // SAFETY: the address of a version, which was swapped out by the caller and by nobody else; versions are freed by this list only.
        unsafe { domain.retire(retired, old) };
        // SAFETY: the list has versions of this cell.
        unsafe { domain.reclaim_some(retired, len, |link| self.free(link)) };
    }

    /// Frees a version that the list has given out.
    fn free(&self, link: u64) {
        if let Some(version) = from_word::<Version<T>>(link) {
            // SAFETY: made by `Version::make` in this heap; the list gives it out once, when nobody reads it.
            unsafe { epoch::free(self.heap, version) }
        }
    }

    #[inline]
    fn versions(&self) -> &Versions {
        let versions = self.versions.load(Relaxed);
        if versions.is_null() {
            no_versions(type_name::<T>());
        }
        // SAFETY: in bounds: written when the cell was made; here and there: atomics; gone: valid at every step.
        unsafe { &*versions }
    }
}

/// Invariant 2.
#[cold]
fn no_versions(type_name: &str) -> ! {
    panic!(
        "this ShmCell<{type_name}> has no value: a process died while it put another one in its place"
    )
}

impl<T: ShmSafe + Sync, H: ShmSafe + Sync> Drop for ShmCell<T, H> {
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        // Before anything else (invariant 2).
        let Some(at) = NonNull::new(self.versions.swap(ptr::null_mut(), SeqCst)) else {
            return;
        };
        crash_point!("shm.cell.emptied");
        // SAFETY: as for `versions`; it is freed below.
        let versions = unsafe { at.as_ref() };
        // SAFETY: the cell is being dropped, so nobody uses the list, and no guard of it is left.
        unsafe { versions.retired.take_all(|link| self.free(link)) };
        self.free(versions.peek());
        // SAFETY: allocated with this layout in this heap; nobody uses it any more.
        unsafe { self.heap.deallocate(at.cast(), Layout::new::<Versions>()) };
    }
}

impl<T: ShmSafe + Sync + fmt::Debug, H: ShmSafe + Sync + fmt::Debug> fmt::Debug for ShmCell<T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmCell")
            .field("value", &*self.load())
            .field("header", &self.header)
            .finish()
    }
}

impl<T: ShmSafe + Sync> Version<T> {
    fn make(heap: HeapRef, value: T) -> std::result::Result<Unlinked<Version<T>>, Rejected<T>> {
        if let Err(error) = heap.check(&value) {
            return Err(Rejected::new(value, error));
        }
        Unlinked::make(heap, value, |node, value| Version { node, value })
    }
}

/// A version of the value in a [`ShmCell`], which lives as long as this guard. It belongs to its thread.
///
/// A forked child must not use the copy that it has; it panics there.
pub struct CellRef<'a, T> {
    pin: Pin,
    version: NonNull<Version<T>>,
    of: PhantomData<&'a T>,
}

impl<T> CellRef<'_, T> {
    /// Of a version that the pin keeps.
    fn new(pin: Pin, word: u64) -> Self {
        CellRef {
            pin,
            version: from_word(word).expect("a cell has a value"),
            of: PhantomData,
        }
    }

    fn word(&self) -> u64 {
        to_word(self.version)
    }

    /// Whether both are the same version.
    pub fn is_same(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

impl<T> Deref for CellRef<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.pin.check_process();
        // SAFETY: in bounds: a version; here and there: all have `&T` only, until it is freed; gone: it is freed when no pin of
        // a live thread keeps it, and the guard has one.
        unsafe { &self.version.as_ref().value }
    }
}

impl<T: fmt::Debug> fmt::Debug for CellRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Why [`ShmCell::compare_exchange`] replaced nothing.
#[derive(Debug)]
pub enum NotExchanged<'a, T> {
    /// The cell has another version.
    Changed {
        /// Which.
        now: CellRef<'a, T>,
    },
    /// It could not be put in.
    Failed(Error),
}

impl<T> From<Error> for NotExchanged<'_, T> {
    fn from(error: Error) -> Self {
        NotExchanged::Failed(error)
    }
}

impl<T> fmt::Display for NotExchanged<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotExchanged::Changed { .. } => f.write_str("the cell has been changed meanwhile"),
            NotExchanged::Failed(error) => error.fmt(f),
        }
    }
}

impl<T: fmt::Debug> std::error::Error for NotExchanged<'_, T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            NotExchanged::Changed { .. } => None,
            NotExchanged::Failed(error) => error.source(),
        }
    }
}

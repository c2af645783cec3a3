//! Values with several owners in several processes: [`ShmArc`], its [`Descriptor`] for messages, and names.
//!
//! **Protocol.** A value lies in a block of the heap; a root in the heap's table says whether it lives and how many handles it
//! has (`roots`, with the states and who frees what when somebody dies). A handle is the addresses of both. It may lie in the same heap
//! itself. To other regions and through messages goes a descriptor, which counts nothing: resolving it makes a handle, if the value still lives.
//!
//! **Invariants.**
//! 1. Each handle counts, wherever it lies, but for the copies that a forked child has of its parent's.
//! 2. A handle with another process's mark is such a copy.
//! 3. A message that was [sent with handles](SentHandle) has them until it is decoded. They are counted twice: with all others, so that
//!    the value lives, and apart, so that nobody can take more of them than there are, whatever was decoded.
//! 4. A handle has no address of a value once it is being given back. Only a death in the middle of an assignment, which drops the old handle before it
//!    writes the new one, leaves such a handle where others find it.
//!
//! **If a process dies here.** Its handles stay counted, so what it had stays allocated until the heap is gone, and remains
//! usable for the others. A handle without a value may stay (invariant 4): it can be replaced and dropped like any other; to use its value is a panic.
//! In the middle of making or dropping a value: see `roots`.
//!
//! # Safety
//!
//! A handle that counts keeps the value alive (roots, invariant 2). The heap stays mapped until the process ends.

#![allow(unsafe_code)]

mod names;
mod roots;

pub use names::NAME_MAX_BYTES;
pub(crate) use roots::verify;
pub use roots::{RootInfo, RootState};

use crate::error::{Error, Result};
use crate::heap::{Heap, HeapRef};
use crate::mark::Mark;
use crate::region::{self, RegionId};
use crate::safe::ShmSafe;
use netmcore_sys::crash_point;
use roots::{Held, Root, RootId, Unborn, type_hash};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::any::type_name;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Relaxed, Release};

/// A value in shared memory with several owners, in several processes: what std's `Arc` is for threads.
///
/// Clones and drops count; whoever drops the last handle drops the value in place. A handle can be stored in the same heap, moved
/// to another process through the shared collections, and sent anywhere in a message: it is serialised as a [`Descriptor`].
///
/// In a message of a supervisor (an argument or a result, in netmcore-proc) a handle travels along. Serialised in any other way it counts nothing
/// while it travels: keep the handle until the receiver has its own, or [`keep`](Self::keep) it.
///
/// **Fork.** A forked child has copies of its parent's handles. They can be used, and cloned, as long as the parent keeps
/// its own; dropping one in the child does nothing. **Cycles** of handles never get free, as with `Arc`.
///
/// # If a process dies
///
/// Its handles still count: the value lives until the heap is gone. If a handle that lies in shared memory was being assigned, it is the old one, the
/// new one or none, which panics where the value is used and may be assigned anew. Dying while dropping the last handle leaves the value *half-dropped*:
/// it is listed as such by [`Heap::shared_values`], nobody can reach it, and its memory comes back with the heap.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmArc};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let hits = ShmArc::new_in(&heap, AtomicU64::new(0))?;
/// let again = hits.clone();
/// again.fetch_add(1, Ordering::Relaxed); // in a forked child, for instance
/// assert_eq!(hits.load(Ordering::Relaxed), 1);
/// assert_eq!(ShmArc::strong_count(&hits), 2);
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
pub struct ShmArc<T: ShmSafe + Sync> {
    root: NonNull<Root>,
    /// Null once the handle is being given back (invariant 4).
    value: AtomicPtr<T>,
    generation: u32,
    mark: Mark,
}

// SAFETY: as std's Arc: handles give `&T` to several threads, and the last drops T in any; the count is atomic, and so is the address.
unsafe impl<T: ShmSafe + Sync> Send for ShmArc<T> {}
// SAFETY: as for Send; the mark is an atomic.
unsafe impl<T: ShmSafe + Sync> Sync for ShmArc<T> {}

// SAFETY: the addresses of a root and a value, which mean the same wherever the heap is mapped; both are reported. It may be dropped in
// another process: it counts there, as it loses its mark on the way into shared memory (invariant 2).
unsafe impl<T: ShmSafe + Sync> ShmSafe for ShmArc<T> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        visit(self.root.as_ptr().cast());
        let value = self.value.load(Relaxed);
        if !value.is_null() {
            visit(value.cast());
        }
    }
}

impl<T: ShmSafe + Sync> ShmArc<T> {
    /// Puts the value into a new block of the heap, with one handle.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPointer`] if the value has pointers into another region; [`Error::OutOfPoolMemory`] and
    /// [`Error::NoSpace`] if there is no memory.
    ///
    /// # If a process dies
    ///
    /// There is no value. Its block is freed when its place is used again, or with the heap.
    pub fn new_in(heap: impl Into<HeapRef>, value: T) -> Result<ShmArc<T>> {
        Ok(ShmArc::of(Unborn::make(heap.into(), value)?.bear(1)))
    }

    /// A handle that takes over the count.
    fn of(held: Held<T>) -> ShmArc<T> {
        ShmArc {
            root: NonNull::from(held.root),
            value: AtomicPtr::new(held.value.as_ptr()),
            generation: held.generation,
            mark: Mark::here(),
        }
    }

    /// The number of handles, in all processes, those of killed ones included. True only of the moment at which it was read.
    pub fn strong_count(this: &Self) -> usize {
        this.root().handle_count() as usize
    }

    /// Whether both are handles of one value.
    pub fn ptr_eq(this: &Self, other: &Self) -> bool {
        this.at() == other.at()
    }

    /// Where the value lies, in every process.
    pub fn as_ptr(this: &Self) -> *const T {
        this.at().as_ptr()
    }

    /// The value itself, if no other handle exists.
    ///
    /// All descriptors made so far are void from then on: nobody else can get at the value.
    pub fn get_mut(this: &mut Self) -> Option<&mut T> {
        if this.is_copy_by_fork() {
            return None;
        }
        let mut value = this.at();
        this.generation = this.root().renew(this.generation)?;
        // SAFETY: in bounds: the value lives; here and there: ours is the only handle, none can be made but from it, which is
        // borrowed mutably; gone: if we die, nobody has a handle.
        Some(unsafe { value.as_mut() })
    }

    /// Moves the value out if no other handle exists; gives the handle back otherwise.
    ///
    /// # If a process dies
    ///
    /// As for dropping the last handle.
    pub fn try_unwrap(this: Self) -> std::result::Result<T, Self> {
        if this.is_copy_by_fork() {
            return Err(this);
        }
        this.at();
        let this = ManuallyDrop::new(this);
        // SAFETY: it has a handle, which is not dropped if the value comes out.
        match unsafe { this.root().take_value(this.generation) } {
            Some(value) => Ok(value),
            None => Err(ManuallyDrop::into_inner(this)),
        }
    }

    /// Keeps the value alive until the heap is gone: gives up the handle, not its count.
    pub fn keep(this: Self) {
        std::mem::forget(this);
    }

    /// What finds the value in other processes and regions, without counting.
    ///
    /// # Errors
    ///
    /// [`Error::NoRegion`] if the value lies in no region that has an id.
    pub fn descriptor(this: &Self) -> Result<Descriptor<T>> {
        let address = this.at().as_ptr();
        let region = region::region_of(address).ok_or(Error::NoRegion {
            id: RegionId(address.addr() as u64),
        })?;
        Ok(Descriptor {
            region: region.id(),
            index: this.root().index(),
            generation: this.generation,
            type_hash: type_hash::<T>(),
            of: PhantomData,
        })
    }

    /// # Panics
    ///
    /// If there is none (invariant 4).
    #[inline]
    fn at(&self) -> NonNull<T> {
        match NonNull::new(self.value.load(Relaxed)) {
            Some(at) => at,
            None => no_value(type_name::<T>()),
        }
    }

    fn root(&self) -> &'static Root {
        // SAFETY: roots are mapped and valid until the process ends (roots, invariant 1).
        unsafe { self.root.as_ref() }
    }

    fn is_copy_by_fork(&self) -> bool {
        self.mark.is_copy_by_fork()
    }
}

impl<T: ShmSafe + Sync> Clone for ShmArc<T> {
    /// Another handle of the same value.
    ///
    /// # Panics
    ///
    /// In a forked child, if this is a copy of a handle of the parent's and the value is gone.
    fn clone(&self) -> ShmArc<T> {
        let value = self.at();
        if self.is_copy_by_fork() {
            let alive = self.root().add_handle_if_alive(self.generation);
            assert!(
                alive,
                "the handle of a {} is a copy made by fork, and the process that had the handle has dropped it",
                type_name::<T>()
            );
        } else {
            self.root().add_handle();
        }
        ShmArc::of(Held {
            root: self.root(),
            generation: self.generation,
            value,
        })
    }
}

impl<T: ShmSafe + Sync> Drop for ShmArc<T> {
    fn drop(&mut self) {
        if self.is_copy_by_fork() || self.value.get_mut().is_null() {
            return;
        }
        // Before anything else: whoever finds the handle after a death in here does not give it back again.
        self.value.store(ptr::null_mut(), Release);
        crash_point!("shm.arc.emptied");
        // SAFETY: the handle counts, and is not used after this.
        unsafe { self.root().remove_handle::<T>() };
    }
}

/// Invariant 4.
#[cold]
fn no_value(type_name: &str) -> ! {
    panic!(
        "this ShmArc<{type_name}> has no value: a process died while it put another one in its place"
    )
}

impl<T: ShmSafe + Sync> Deref for ShmArc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: in bounds: a T lies there; here and there: all have `&T` only, but for `get_mut`, which is alone; gone: the count keeps it
        // alive, whoever dies.
        unsafe { self.at().as_ref() }
    }
}

impl<T: ShmSafe + Sync> AsRef<T> for ShmArc<T> {
    fn as_ref(&self) -> &T {
        self
    }
}

impl<T: ShmSafe + Sync + fmt::Debug> fmt::Debug for ShmArc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ShmSafe + Sync + fmt::Display> fmt::Display for ShmArc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ShmSafe + Sync + PartialEq> PartialEq for ShmArc<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: ShmSafe + Sync + Eq> Eq for ShmArc<T> {}

impl<T: ShmSafe + Sync + PartialOrd> PartialOrd for ShmArc<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (**self).partial_cmp(&**other)
    }
}

impl<T: ShmSafe + Sync + Ord> Ord for ShmArc<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl<T: ShmSafe + Sync + Hash> Hash for ShmArc<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

/// Serialises the [`Descriptor`]. In the message of a supervisor the value has a [handle](SentHandle) of its own; elsewhere it is
/// not counted: keep the handle until the receiver has one.
impl<T: ShmSafe + Sync> Serialize for ShmArc<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let descriptor = ShmArc::descriptor(self).map_err(serde::ser::Error::custom)?;
        // A copy by fork counts nothing, and its original may be gone.
        let own = match self.is_copy_by_fork() {
            true => Some(descriptor.resolve().map_err(serde::ser::Error::custom)?),
            false => None,
        };
        let counted = own.as_ref().unwrap_or(self);
        region::note_sent(descriptor.region, &|| SentHandle::of(counted));
        descriptor.serialize(serializer)
    }
}

/// Resolves the [`Descriptor`]: a handle of the same value, the message's if that has one.
impl<'de, T: ShmSafe + Sync> Deserialize<'de> for ShmArc<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let descriptor = Descriptor::<T>::deserialize(deserializer)?;
        let arrives = region::is_receiving();
        descriptor.get(arrives).map_err(serde::de::Error::custom)
    }
}

/// A handle that belongs to a message: it keeps the value alive while nobody but the message has it.
///
/// Whoever sends a message makes one for each [`ShmArc`] in it, and [leaves](Self::leave) it there when the message can be found. Who
/// decodes the message takes it. A message that is not sent after all gives it back, by dropping this.
///
/// # If a process dies
///
/// The handle of a message that nobody receives counts until the heap is gone, like those of killed processes.
#[must_use = "dropped, it is given back: the message is not sent"]
pub struct SentHandle {
    root: &'static Root,
    generation: u32,
    give_back: fn(&'static Root, u32),
}

impl SentHandle {
    fn of<T: ShmSafe + Sync>(handle: &ShmArc<T>) -> SentHandle {
        let handle = ManuallyDrop::new(handle.clone());
        let (root, generation) = (handle.root(), handle.generation);
        root.leave_handle(generation);
        SentHandle {
            root,
            generation,
            give_back: |root, generation| {
                if root.take_handle(generation) {
                    // SAFETY: it is a handle of a value of type T, taken just now.
                    unsafe { root.remove_handle::<T>() };
                }
            },
        }
    }

    /// The message has it from now on.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for SentHandle {
    fn drop(&mut self) {
        (self.give_back)(self.root, self.generation);
    }
}

impl fmt::Debug for SentHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentHandle")
            .field("index", &self.root.index())
            .field("generation", &self.generation)
            .finish()
    }
}

/// Names a shared value in any process: the region, the value's number and generation there, and its type. Plain data.
///
/// It counts nothing and keeps nothing alive. It may lie in any region, and in messages.
///
/// ```
/// use netmcore_shm::{Arena, Error, Heap, ShmArc};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let first = ShmArc::new_in(&heap, 5_u32)?;
/// let descriptor = ShmArc::descriptor(&first)?;
/// let second = descriptor.resolve()?;
/// drop((first, second));
/// assert!(matches!(descriptor.resolve(), Err(Error::Gone { .. })));
/// # Ok::<(), Error>(())
/// ```
#[derive(Serialize, Deserialize)]
#[serde(bound = "", rename = "ShmArc")]
pub struct Descriptor<T> {
    #[serde(with = "region_number")]
    region: RegionId,
    index: u32,
    generation: u32,
    type_hash: u64,
    #[serde(skip)]
    of: PhantomData<fn() -> T>,
}

mod region_number {
    use crate::region::RegionId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &RegionId, to: S) -> Result<S::Ok, S::Error> {
        id.0.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RegionId, D::Error> {
        u64::deserialize(from).map(RegionId)
    }
}

impl<T: ShmSafe + Sync> Descriptor<T> {
    /// A handle of the value. Attaches to its region if this process has not done so.
    ///
    /// # Errors
    ///
    /// [`Error::Gone`] if the last handle was dropped; [`Error::TypeMismatch`] if the value is not a `T`; what attaching to the region says.
    pub fn resolve(&self) -> Result<ShmArc<T>> {
        self.get(false)
    }

    /// The handle of the message that it `arrives` in, if that has one; else a new one.
    fn get(&self, arrives: bool) -> Result<ShmArc<T>> {
        let heap = Heap::attach(&region::resolve(self.region)?)?;
        let id = RootId {
            index: self.index,
            generation: self.generation,
        };
        if self.type_hash != type_hash::<T>() {
            // Made for another type, or by another program: what is there says more.
            let found = roots::label_of(heap.allocator(), id)?;
            return Err(Error::TypeMismatch {
                expected: type_name::<T>(),
                found: found.unwrap_or_else(|| "a value that is gone".to_owned()),
            });
        }
        let held = match arrives {
            true => Held::take(heap.allocator(), id)?,
            false => Held::acquire(heap.allocator(), id)?,
        };
        Ok(ShmArc::of(held))
    }

    /// The region that the value lies in.
    pub fn region(&self) -> RegionId {
        self.region
    }
}

// SAFETY: numbers.
unsafe impl<T: 'static> ShmSafe for Descriptor<T> {}

impl<T> Copy for Descriptor<T> {}

impl<T> Clone for Descriptor<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> PartialEq for Descriptor<T> {
    fn eq(&self, other: &Self) -> bool {
        let words = |d: &Self| (d.region, d.index, d.generation, d.type_hash);
        words(self) == words(other)
    }
}

impl<T> Eq for Descriptor<T> {}

impl<T> fmt::Debug for Descriptor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Descriptor")
            .field("region", &self.region)
            .field("index", &self.index)
            .field("generation", &self.generation)
            .field("of", &type_name::<T>())
            .finish()
    }
}

impl From<&Heap> for HeapRef {
    fn from(heap: &Heap) -> HeapRef {
        heap.allocator()
    }
}

/// Shared values of the heap.
impl Heap {
    /// The shared value of that name. If there is none, `init` makes it: of all who ask at the same time, in all processes, one does, and
    /// the others wait for it. The name holds a handle: the value lives until the heap is gone, or the name is
    /// [removed](Self::remove_named).
    ///
    /// # Errors
    ///
    /// [`Error::TypeMismatch`] if the name is that of a value of another type; [`Error::NameLength`] if it is empty or longer than 255 bytes;
    /// otherwise as [`ShmArc::new_in`].
    ///
    /// # Panics
    ///
    /// If `init` asks for the same name. If `init` panics, the next to ask makes the value.
    ///
    /// # Blocking
    ///
    /// While another one makes the value.
    ///
    /// # If a process dies
    ///
    /// While it makes the value: one of those who wait makes it. Blocks that `init` had allocated stay allocated until the heap is gone.
    ///
    /// ```
    /// use netmcore_shm::{Arena, Heap};
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// let arena = Arena::reserve(1 << 30)?;
    /// let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let hits = heap.named("hits", || AtomicU64::new(0))?;
    /// hits.fetch_add(1, Ordering::Relaxed);
    /// let same = heap.named("hits", || AtomicU64::new(0))?; // anywhere
    /// assert_eq!(same.load(Ordering::Relaxed), 1);
    /// assert!(heap.named("hits", || 0_u8).is_err());
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn named<T: ShmSafe + Sync>(
        &self,
        name: &str,
        init: impl FnOnce() -> T,
    ) -> Result<ShmArc<T>> {
        self.try_named(name, || Ok(init()))
    }

    /// As [`named`](Self::named), with an `init` that may fail: its error is the caller's, and the next to ask tries again.
    ///
    /// # Errors
    ///
    /// As [`named`](Self::named), and what `init` says.
    ///
    /// # Panics
    ///
    /// As [`named`](Self::named).
    ///
    /// # Blocking
    ///
    /// As [`named`](Self::named).
    pub fn try_named<T: ShmSafe + Sync>(
        &self,
        name: &str,
        init: impl FnOnce() -> Result<T>,
    ) -> Result<ShmArc<T>> {
        Ok(ShmArc::of(names::get_or_make(
            self.allocator(),
            name,
            init,
        )?))
    }

    /// The shared value of that name, if it has been made.
    ///
    /// # Errors
    ///
    /// As [`named`](Self::named).
    pub fn get_named<T: ShmSafe + Sync>(&self, name: &str) -> Result<Option<ShmArc<T>>> {
        Ok(names::get(self.allocator(), name)?.map(ShmArc::of))
    }

    /// Takes the value from the name: it lives as long as it has handles, and the next to ask for the name makes another.
    ///
    /// # Errors
    ///
    /// As [`named`](Self::named).
    ///
    /// # Blocking
    ///
    /// While another one makes the value.
    ///
    /// # If a process dies
    ///
    /// The name has the value, or not; the value may stay until the heap is gone.
    pub fn remove_named<T: ShmSafe + Sync>(&self, name: &str) -> Result<Option<ShmArc<T>>> {
        Ok(names::remove(self.allocator(), name)?.map(ShmArc::of))
    }

    /// Lists the values that handles refer to, and what killed processes have left of such.
    ///
    /// # Errors
    ///
    /// [`Error::FormatMismatch`] if the heap was written over.
    pub fn shared_values(&self) -> Result<Vec<RootInfo>> {
        roots::list(self.allocator())
    }
}

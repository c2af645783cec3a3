//! An array for several processes, who use disjoint parts of it as slices: [`ShmArray`].
//!
//! **Protocol.** The elements lie in a row in one block (`grid`). A process claims a range (`claims`) and has it as a slice until the claim
//! is dropped, or it dies. Claims for reading may overlap each other.
//!
//! **Invariants.**
//! 1. While a claim for writing is held, nobody else has a slice of any of its elements. The elements do not move while they are claimed.
//!
//! **If a process dies here.** Its claims end. What it had claimed for writing is in doubt: the next to claim any of it is told, and
//! [`ShmArray::abandoned`] lists it. Growth is done or not.
//!
//! **Not here.** The table of claims, growth: `claims`, `grid`.
//!
//! # Safety
//!
//! Slices are made of the parts that a grid gives: in bounds, of live elements, and as exclusive as the claim.

#![allow(unsafe_code)]

use super::claims::{ClaimError, Kind};
use super::grid::{Grid, Part, Patience, Shape};
use super::rejected::Rejected;
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::safe::ShmSafe;
use netmcore_sem::OwnerId;
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::ops::{Bound, Deref, DerefMut, Range, RangeBounds};
use std::slice;
use std::time::Instant;

/// An array in shared memory, with a header of the user's type. Many processes use it through `&self`.
///
/// Whoever computes on a part of it [claims](Self::claim) the part, and has it as a plain `&mut [T]`: claims that do not overlap
/// never wait for each other. A claim costs about as much as a lock; the elements then cost nothing. Single elements can be got
/// and set, by a claim each.
///
/// The array grows. Elements do not move while they are claimed: beyond its capacity it grows when nobody has claimed anything.
///
/// # If a process dies
///
/// Its claims end, and others get theirs. What it had claimed for writing is as it left it. The next to claim a part of that for
/// writing is told ([`ArraySliceMut::abandoned_by`]); until all of it was claimed so, [`abandoned`](Self::abandoned) lists it. A panic while
/// a part is claimed for writing counts as a death.
///
/// ```
/// use netmcore_shm::{Arena, ClaimError, Heap, ShmArc, ShmArray};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let array = ShmArc::new_in(&heap, ShmArray::make_in(&heap, 1_000, 0.0_f64)?)?;
/// // Each worker, in its own process: its part of the elements.
/// for worker in 0..3 {
///     let mut part = array.claim(array.part(worker, 3))?;
///     let from = part.range().start;
///     for (k, element) in part.iter_mut().enumerate() {
///         *element = (from + k) as f64;
///     }
/// }
/// assert_eq!(array.read(..)?.iter().sum::<f64>(), 499_500.0);
/// assert!(matches!(array.claim(990..1_001), Err(ClaimError::OutOfBounds { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ShmArray<T: ShmSafe, H = ()> {
    grid: Grid<T>,
    header: H,
}

// SAFETY: a header, which is ShmSafe, and the addresses of blocks with elements that are; all are reported. Claims are held by threads of whatever
// process.
unsafe impl<T: ShmSafe, H: ShmSafe> ShmSafe for ShmArray<T, H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.grid.visit_pointers(visit);
        self.header.visit_pointers(visit);
    }
}

impl<T: ShmSafe> ShmArray<T> {
    /// An empty array.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`] and [`Error::NoSpace`] if there is no memory.
    #[doc(alias = "Netmcore_array.create")]
    pub fn new_in(heap: impl Into<HeapRef>) -> Result<ShmArray<T>> {
        ShmArray::with_capacity_in(heap, 0)
    }

    /// An empty array that can grow to `capacity` elements without waiting for those who use it.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in).
    pub fn with_capacity_in(heap: impl Into<HeapRef>, capacity: usize) -> Result<ShmArray<T>> {
        let none = |_, _| unreachable!("no elements");
        ShmArray::of(heap, 0, capacity, none)
    }

    /// An array of `len` clones of the value.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in); [`Error::ForeignPointer`] if the value has pointers into another region.
    #[doc(alias = "Netmcore_array.make")]
    pub fn make_in(heap: impl Into<HeapRef>, len: usize, value: T) -> Result<ShmArray<T>>
    where
        T: Clone,
    {
        ShmArray::of(heap, len, 0, |_, _| value.clone())
    }

    /// An array of `len` elements, which `element` makes of their indices.
    ///
    /// # Errors
    ///
    /// As [`make_in`](Self::make_in).
    ///
    /// # If a process dies
    ///
    /// There is no array. What was allocated for it stays allocated until the heap is gone.
    #[doc(alias = "Netmcore_array.init")]
    pub fn init_in(
        heap: impl Into<HeapRef>,
        len: usize,
        mut element: impl FnMut(usize) -> T,
    ) -> Result<ShmArray<T>> {
        ShmArray::of(heap, len, 0, |index, _| element(index))
    }

    /// An array of clones of the elements.
    ///
    /// # Errors
    ///
    /// As [`make_in`](Self::make_in).
    pub fn from_slice_in(heap: impl Into<HeapRef>, values: &[T]) -> Result<ShmArray<T>>
    where
        T: Clone,
    {
        ShmArray::of(heap, values.len(), 0, |index, _| values[index].clone())
    }

    /// An array of what the iterator gives.
    ///
    /// # Errors
    ///
    /// As [`make_in`](Self::make_in).
    pub fn from_iter_in(
        heap: impl Into<HeapRef>,
        values: impl IntoIterator<Item = T>,
    ) -> Result<ShmArray<T>> {
        let values: Vec<T> = values.into_iter().collect();
        let len = values.len();
        let mut values = values.into_iter();
        ShmArray::of(heap, len, 0, |_, _| {
            values.next().expect("as many as were counted")
        })
    }

    fn of(
        heap: impl Into<HeapRef>,
        len: usize,
        capacity: usize,
        element: impl FnMut(usize, usize) -> T,
    ) -> Result<ShmArray<T>> {
        let shape = Shape {
            rows: len,
            columns: 1,
        };
        Ok(ShmArray {
            grid: Grid::new(heap.into(), shape, capacity, element)?,
            header: (),
        })
    }
}

impl<T: ShmSafe, H: ShmSafe> ShmArray<T, H> {
    /// An empty array with a header.
    ///
    /// # Errors
    ///
    /// As [`new_in`](Self::new_in), with the header.
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        header: H,
    ) -> std::result::Result<ShmArray<T, H>, Rejected<H>> {
        match ShmArray::new_in(heap) {
            Ok(array) => array.with_header(header),
            Err(error) => Err(Rejected::new(header, error)),
        }
    }

    /// The same array with another header.
    ///
    /// # Errors
    ///
    /// The header, with [`Error::ForeignPointer`] if it has pointers into another region. The array is gone then.
    pub fn with_header<G: ShmSafe>(
        self,
        header: G,
    ) -> std::result::Result<ShmArray<T, G>, Rejected<G>> {
        match self.grid.heap().check(&header) {
            Ok(()) => Ok(ShmArray {
                grid: self.grid,
                header,
            }),
            Err(error) => Err(Rejected::new(header, error)),
        }
    }

    /// The header.
    #[doc(alias = "Netmcore_array.header")]
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The heap that the elements lie in.
    pub fn heap(&self) -> HeapRef {
        self.grid.heap()
    }

    /// How many elements there are. It only grows.
    #[doc(alias = "Netmcore_array.length")]
    pub fn len(&self) -> usize {
        self.grid.shape().rows
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// To how many elements it can grow without waiting for those who use it.
    pub fn capacity(&self) -> usize {
        self.grid.capacity()
    }

    /// Of `parts` parts, as equal as can be, the one of that number: a worker's share.
    ///
    /// # Panics
    ///
    /// If `part` is not below `parts`.
    pub fn part(&self, part: usize, parts: usize) -> Range<usize> {
        share(self.len(), part, parts)
    }

    /// Makes the array at least `len` elements long; those that are new are clones of the value.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Memory`] if there is no memory, or the value has pointers into another region; [`ClaimError::WouldDeadlock`] if the calling
    /// thread has claimed a part, and the elements have to move. Nothing has changed then.
    ///
    /// # Blocking
    ///
    /// Beyond the capacity: until nobody has claimed any part. Otherwise while another one lets it grow.
    ///
    /// # If a process dies
    ///
    /// The array has all of the new elements, or none.
    #[doc(alias = "Netmcore_array.grow")]
    pub fn grow(&self, len: usize, value: T) -> std::result::Result<(), ClaimError>
    where
        T: Clone,
    {
        self.grow_with(len, |_| value.clone())
    }

    /// Makes the array at least `len` elements long; `element` makes the new ones of their indices. As [`grow`](Self::grow).
    ///
    /// # Errors
    ///
    /// As [`grow`](Self::grow).
    ///
    /// # Blocking
    ///
    /// As [`grow`](Self::grow).
    ///
    /// # If a process dies
    ///
    /// As [`grow`](Self::grow).
    pub fn grow_with(
        &self,
        len: usize,
        mut element: impl FnMut(usize) -> T,
    ) -> std::result::Result<(), ClaimError> {
        let to = |old: Shape| Shape { rows: len, ..old };
        let element = |index, _| element(index);
        self.grid.grow(to, Patience::Endless, element).map(|_| ())
    }

    /// As [`grow_with`](Self::grow_with); false, and nothing has changed, if it would have to wait.
    ///
    /// # Errors
    ///
    /// As [`grow`](Self::grow).
    pub fn try_grow_with(
        &self,
        len: usize,
        mut element: impl FnMut(usize) -> T,
    ) -> std::result::Result<bool, ClaimError> {
        let to = |old: Shape| Shape { rows: len, ..old };
        self.grid
            .grow(to, Patience::None, |index, _| element(index))
    }

    /// Appends an element, and gives its index. As [`grow`](Self::grow).
    ///
    /// # Errors
    ///
    /// The value, with the errors of [`grow`](Self::grow).
    ///
    /// # Blocking
    ///
    /// As [`grow`](Self::grow).
    ///
    /// # If a process dies
    ///
    /// The element is there, whole, or not.
    pub fn push(&self, value: T) -> std::result::Result<usize, Rejected<T, ClaimError>> {
        if let Err(error) = self.heap().check(&value) {
            return Err(Rejected::new(value, error));
        }
        let mut value = Some(value);
        let mut place = 0;
        let to = |old: Shape| Shape {
            rows: old.rows + 1,
            ..old
        };
        let grown = self.grid.grow(to, Patience::Endless, |index, _| {
            place = index;
            value.take().expect("one element is new")
        });
        match (grown, value) {
            (Err(error), Some(value)) => Err(Rejected { value, error }),
            (Err(error), None) => unreachable!("the value was checked: {error}"),
            (Ok(_), _) => Ok(place),
        }
    }

    /// Claims a part for writing: nobody else uses any of it until the claim is dropped.
    ///
    /// # Errors
    ///
    /// [`ClaimError::OutOfBounds`] if there is no such part; [`ClaimError::WouldDeadlock`] if the calling thread has claimed an element of
    /// it; [`ClaimError::Memory`] if there are more claims than ever before, and no memory to note them.
    ///
    /// # Blocking
    ///
    /// While others use a part of it: spins briefly, then sleeps. Whoever holds one claim and waits for another may wait for
    /// one that waits for it: use [`claim_deadline`](Self::claim_deadline) then, or claim in the order of the elements.
    ///
    /// # If a process dies
    ///
    /// Its claim ends. What it had written is there; an element that it was writing is in doubt. The next to claim any of it is told.
    pub fn claim(
        &self,
        range: impl RangeBounds<usize>,
    ) -> std::result::Result<ArraySliceMut<'_, T>, ClaimError> {
        let part = self.claimed(range, Kind::Exclusive, Patience::Endless)?;
        Ok(ArraySliceMut::of(part.expect("waited for"), self.heap()))
    }

    /// As [`claim`](Self::claim); `None` if somebody uses a part of it.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    pub fn try_claim(
        &self,
        range: impl RangeBounds<usize>,
    ) -> std::result::Result<Option<ArraySliceMut<'_, T>>, ClaimError> {
        let part = self.claimed(range, Kind::Exclusive, Patience::None)?;
        Ok(part.map(|part| ArraySliceMut::of(part, self.heap())))
    }

    /// As [`claim`](Self::claim), until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim); [`ClaimError::TimedOut`] if somebody used a part of it to the end.
    pub fn claim_deadline(
        &self,
        range: impl RangeBounds<usize>,
        deadline: Instant,
    ) -> std::result::Result<ArraySliceMut<'_, T>, ClaimError> {
        let part = self.claimed(range, Kind::Exclusive, Patience::Until(deadline))?;
        Ok(ArraySliceMut::of(part.expect("waited for"), self.heap()))
    }

    /// Claims a part for reading: nobody writes to it until the claim is dropped; others may read it too.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # Blocking
    ///
    /// While somebody has claimed a part of it for writing.
    ///
    /// # If a process dies
    ///
    /// Its claim ends.
    #[doc(alias = "Netmcore_array.get_p")]
    pub fn read(
        &self,
        range: impl RangeBounds<usize>,
    ) -> std::result::Result<ArraySlice<'_, T>, ClaimError> {
        let part = self.claimed(range, Kind::Shared, Patience::Endless)?;
        Ok(ArraySlice(part.expect("waited for")))
    }

    /// As [`read`](Self::read); `None` if somebody has claimed a part of it for writing.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    pub fn try_read(
        &self,
        range: impl RangeBounds<usize>,
    ) -> std::result::Result<Option<ArraySlice<'_, T>>, ClaimError> {
        Ok(self
            .claimed(range, Kind::Shared, Patience::None)?
            .map(ArraySlice))
    }

    /// As [`read`](Self::read), until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`claim_deadline`](Self::claim_deadline).
    pub fn read_deadline(
        &self,
        range: impl RangeBounds<usize>,
        deadline: Instant,
    ) -> std::result::Result<ArraySlice<'_, T>, ClaimError> {
        let part = self.claimed(range, Kind::Shared, Patience::Until(deadline))?;
        Ok(ArraySlice(part.expect("waited for")))
    }

    fn claimed(
        &self,
        range: impl RangeBounds<usize>,
        kind: Kind,
        patience: Patience,
    ) -> std::result::Result<Option<Part<'_, T>>, ClaimError> {
        let range = ends(&range, || self.len());
        let part = self.grid.part(range, 0..1, kind, patience);
        part.map_err(|error| match error {
            ClaimError::OutOfBounds { end, len, .. } => ClaimError::OutOfBounds {
                what: "elements",
                end,
                len,
            },
            other => other,
        })
    }

    /// A clone of the element.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    ///
    /// # Blocking
    ///
    /// As [`read`](Self::read).
    #[doc(alias = "Netmcore_array.get_c")]
    pub fn get(&self, index: usize) -> std::result::Result<T, ClaimError>
    where
        T: Clone,
    {
        self.with(index, T::clone)
    }

    /// Calls `look` with the element, which nobody changes meanwhile.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    ///
    /// # Blocking
    ///
    /// As [`read`](Self::read).
    #[doc(alias = "Netmcore_array.get_ro")]
    pub fn with<R>(
        &self,
        index: usize,
        look: impl FnOnce(&T) -> R,
    ) -> std::result::Result<R, ClaimError> {
        Ok(look(&self.read(one(index))?[0]))
    }

    /// Puts the value in place of the element.
    ///
    /// # Errors
    ///
    /// The value, with those of [`claim`](Self::claim), or [`Error::ForeignPointer`] if it has pointers into another region.
    ///
    /// # Blocking
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # If a process dies
    ///
    /// The element is in doubt, and [abandoned](Self::abandoned).
    #[doc(alias = "Netmcore_array.set")]
    pub fn set(&self, index: usize, value: T) -> std::result::Result<(), Rejected<T, ClaimError>> {
        // What was there is dropped after the claim has ended.
        self.replace(index, value).map(drop)
    }

    /// Puts the value in place of the element, which it gives. As [`set`](Self::set).
    ///
    /// # Errors
    ///
    /// As [`set`](Self::set).
    ///
    /// # Blocking
    ///
    /// As [`set`](Self::set).
    ///
    /// # If a process dies
    ///
    /// As [`set`](Self::set).
    pub fn replace(
        &self,
        index: usize,
        value: T,
    ) -> std::result::Result<T, Rejected<T, ClaimError>> {
        if let Err(error) = self.heap().check(&value) {
            return Err(Rejected::new(value, error));
        }
        match self.claim(one(index)) {
            Ok(mut element) => Ok(mem::replace(&mut element[0], value)),
            Err(error) => Err(Rejected { value, error }),
        }
    }

    /// Calls `change` with the element, which nobody else uses meanwhile.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # Blocking
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # If a process dies
    ///
    /// The element is in doubt, and [abandoned](Self::abandoned).
    pub fn update<R>(
        &self,
        index: usize,
        change: impl FnOnce(&mut T) -> R,
    ) -> std::result::Result<R, ClaimError> {
        Ok(change(&mut self.claim(one(index))?[0]))
    }

    /// Clones of all elements, of one moment.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    ///
    /// # Blocking
    ///
    /// As [`read`](Self::read).
    pub fn to_vec(&self) -> std::result::Result<Vec<T>, ClaimError>
    where
        T: Clone,
    {
        Ok(self.read(..)?.to_vec())
    }

    /// The parts that somebody had claimed for writing and died, or panicked, and that nobody has claimed whole since; with who it was.
    /// In no order.
    pub fn abandoned(&self) -> Vec<(Range<usize>, OwnerId)> {
        ranges(self.grid.abandoned(false))
    }

    /// As [`abandoned`](Self::abandoned), and they are not told again.
    pub fn take_abandoned(&self) -> Vec<(Range<usize>, OwnerId)> {
        ranges(self.grid.abandoned(true))
    }

    /// All elements, of an array that nobody else has.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self.grid.all_mut()
    }
}

fn one(index: usize) -> Range<usize> {
    index..index.saturating_add(1)
}

fn ranges(abandoned: Vec<super::claims::Abandoned>) -> Vec<(Range<usize>, OwnerId)> {
    let range = |rows: Range<u64>| rows.start as usize..rows.end as usize;
    abandoned
        .into_iter()
        .map(|(area, owner)| (range(area.rows), owner))
        .collect()
}

/// The part of that number of as many equal parts of `0..len`.
pub(super) fn share(len: usize, part: usize, parts: usize) -> Range<usize> {
    assert!(part < parts, "part {part} of {parts}");
    let (each, more) = (len / parts, len % parts);
    let start = part * each + part.min(more);
    start..start + each + usize::from(part < more)
}

/// The range as a half-open one.
pub(super) fn ends(range: &impl RangeBounds<usize>, len: impl FnOnce() -> usize) -> Range<usize> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => len().max(start),
    };
    start..end
}

impl<T: ShmSafe, H: ShmSafe + fmt::Debug> fmt::Debug for ShmArray<T, H> {
    /// Without the elements, which others may be using.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmArray")
            .field("header", &self.header)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// A part of a [`ShmArray`], claimed for reading: a slice.
///
/// It belongs to the thread that claimed it. A forked child must not use its copy.
#[must_use = "the claim ends when it is dropped"]
pub struct ArraySlice<'a, T>(Part<'a, T>);

impl<T> ArraySlice<'_, T> {
    /// Which elements of the array it has.
    pub fn range(&self) -> Range<usize> {
        self.0.rows.clone()
    }

    /// Who died, or panicked, with a claim for writing of some of it, that nobody has claimed since. What it wrote there is in doubt.
    pub fn abandoned_by(&self) -> Option<OwnerId> {
        self.0.claim.abandoned_by
    }
}

impl<T> Deref for ArraySlice<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: in bounds: so many elements lie there; here and there: all that have claims of them only read; gone: the claim keeps
        // them, and is this thread's.
        unsafe { slice::from_raw_parts(self.0.first.as_ptr(), self.0.rows.len()) }
    }
}

impl<T: fmt::Debug> fmt::Debug for ArraySlice<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A part of a [`ShmArray`], claimed for writing: a slice that nobody else uses.
///
/// It belongs to the thread that claimed it, so it is not `Send`; the slice may be given to other threads of the process, by
/// scoped threads or by rayon. If this is leaked, the claim lasts until its process is dead, as the lock of a leaked guard.
/// A forked child must not use its copy.
///
/// Elements that own something in shared memory are looked through when it is dropped: to put in one with pointers into
/// another region is a mistake that panics then. [`ShmArray::set`] says so at once.
#[must_use = "the claim ends when it is dropped"]
pub struct ArraySliceMut<'a, T: ShmSafe> {
    part: Part<'a, T>,
    heap: HeapRef,
    borrows: PhantomData<&'a mut T>,
}

impl<'a, T: ShmSafe> ArraySliceMut<'a, T> {
    fn of(part: Part<'a, T>, heap: HeapRef) -> ArraySliceMut<'a, T> {
        ArraySliceMut {
            part,
            heap,
            borrows: PhantomData,
        }
    }

    /// Which elements of the array it has.
    pub fn range(&self) -> Range<usize> {
        self.part.rows.clone()
    }

    /// Who died, or panicked, with a claim for writing of some of it, that nobody has claimed since. What it wrote there is in doubt.
    pub fn abandoned_by(&self) -> Option<OwnerId> {
        self.part.claim.abandoned_by
    }
}

impl<T: ShmSafe> Deref for ArraySliceMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: in bounds: so many elements lie there; here and there: nobody else has a claim of them; gone: the claim keeps them, and is
        // this thread's.
        unsafe { slice::from_raw_parts(self.part.first.as_ptr(), self.part.rows.len()) }
    }
}

impl<T: ShmSafe> DerefMut for ArraySliceMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; this claim is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.part.first.as_ptr(), self.part.rows.len()) }
    }
}

impl<T: ShmSafe> Drop for ArraySliceMut<'_, T> {
    fn drop(&mut self) {
        check_written(self.heap, self);
    }
}

/// Elements that were written through `&mut` have not been checked yet; and owners among them lie in shared memory now.
pub(super) fn check_written<T: ShmSafe>(heap: HeapRef, elements: &[T]) {
    if !T::HAS_POINTERS {
        return;
    }
    for element in elements {
        let checked: std::result::Result<(), Error> = heap.check(element);
        if let Err(error) = checked
            && !std::thread::panicking()
        {
            panic!("{error}");
        }
    }
}

impl<T: ShmSafe + fmt::Debug> fmt::Debug for ArraySliceMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_there_is_and_differ_by_one_at_most() {
        for len in 0..40 {
            for parts in 1..9 {
                let shares: Vec<_> = (0..parts).map(|part| share(len, part, parts)).collect();
                assert_eq!((shares[0].start, shares[parts - 1].end), (0, len));
                assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(
                    shares
                        .iter()
                        .all(|share| share.len().abs_diff(len / parts) <= 1)
                );
            }
        }
    }
}

//! A matrix for several processes, who use disjoint blocks of it: [`ShmMatrix`].
//!
//! **Protocol.** As for [`ShmArray`](crate::ShmArray), with areas of rows and columns: the elements lie row after row in one block (`grid`), and a process
//! claims a rectangle (`claims`), whose rows it has as slices.
//!
//! **Invariants.**
//! 1. While a claim for writing is held, nobody else has a slice of any of its elements. The elements do not move while any are claimed.
//!
//! **If a process dies here.** As for arrays: its claims end, what it had claimed for writing is in doubt, and [`ShmMatrix::abandoned`] lists it.
//!
//! **Not here.** Arithmetic: with the feature `ndarray` a claim is a view of that crate.
//!
//! # Safety
//!
//! Slices are made of rows of the parts that a grid gives: in bounds, of live elements, and as exclusive as the claim. Different rows of a part do not overlap, as its
//! columns are within the stride.

#![allow(unsafe_code)]

use super::array::{check_written, ends, share};
use super::claims::{Abandoned, ClaimError, Kind};
use super::grid::{Grid, Part, Patience, Shape};
use super::rejected::Rejected;
use crate::error::Result;
use crate::heap::HeapRef;
use crate::safe::ShmSafe;
use netmcore_sem::OwnerId;
use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::ops::{Index, IndexMut, Range, RangeBounds};
use std::slice;
use std::time::Instant;

/// A matrix in shared memory, row by row, with a header of the user's type. Many processes use it through `&self`.
///
/// Whoever computes on a part of it claims [rows](Self::claim_rows) or a [block](Self::claim_block), and has each row of it as a plain
/// slice: claims that do not overlap never wait for each other. Single elements can be got and set, by a claim each.
///
/// # If a process dies
///
/// Its claims end. What it had claimed for writing is as it left it; the next to claim a part of that for writing is told, and
/// [`abandoned`](Self::abandoned) lists it until all of it was claimed so. A panic while a part is claimed for writing counts as a death.
///
/// ```
/// use netmcore_shm::{Arena, ClaimError, Heap, ShmArc, ShmMatrix};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let matrix = ShmArc::new_in(&heap, ShmMatrix::make_in(&heap, (100, 80), 0.0_f64)?)?;
/// // Each worker, in its own process: its rows.
/// for worker in 0..3 {
///     let mut part = matrix.claim_rows(matrix.part(worker, 3))?;
///     for row in part.rows_mut() {
///         row.fill(worker as f64);
///     }
/// }
/// assert_eq!((matrix.get(0, 79)?, matrix.get(99, 0)?), (0.0, 2.0));
/// assert!(matches!(matrix.get(100, 0), Err(ClaimError::OutOfBounds { what: "rows", .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ShmMatrix<T: ShmSafe, H = ()> {
    grid: Grid<T>,
    header: H,
}

// SAFETY: as for ShmArray: a header that is ShmSafe, and the addresses of blocks with elements that are; all are reported.
unsafe impl<T: ShmSafe, H: ShmSafe> ShmSafe for ShmMatrix<T, H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.grid.visit_pointers(visit);
        self.header.visit_pointers(visit);
    }
}

impl<T: ShmSafe> ShmMatrix<T> {
    /// A matrix of that many rows and columns, of clones of the value.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`](crate::Error::OutOfPoolMemory) and [`Error::NoSpace`](crate::Error::NoSpace) if there is no memory;
    /// [`Error::ForeignPointer`](crate::Error::ForeignPointer) if the value has pointers into another region.
    #[doc(alias = "Netmcore_matrix.make")]
    pub fn make_in(
        heap: impl Into<HeapRef>,
        (rows, columns): (usize, usize),
        value: T,
    ) -> Result<ShmMatrix<T>>
    where
        T: Clone,
    {
        ShmMatrix::init_in(heap, (rows, columns), |_, _| value.clone())
    }

    /// A matrix of that many rows and columns; `element` makes the elements of their row and column, row by row.
    ///
    /// # Errors
    ///
    /// As [`make_in`](Self::make_in).
    ///
    /// # If a process dies
    ///
    /// There is no matrix. What was allocated for it stays allocated until the heap is gone.
    #[doc(alias = "Netmcore_matrix.init")]
    pub fn init_in(
        heap: impl Into<HeapRef>,
        (rows, columns): (usize, usize),
        element: impl FnMut(usize, usize) -> T,
    ) -> Result<ShmMatrix<T>> {
        Ok(ShmMatrix {
            grid: Grid::new(heap.into(), Shape { rows, columns }, 0, element)?,
            header: (),
        })
    }

    /// A matrix of clones of the elements, given row by row.
    ///
    /// # Errors
    ///
    /// As [`make_in`](Self::make_in).
    ///
    /// # Panics
    ///
    /// If the number of elements is not that of whole rows, or there are elements and no columns.
    pub fn from_slice_in(
        heap: impl Into<HeapRef>,
        columns: usize,
        values: &[T],
    ) -> Result<ShmMatrix<T>>
    where
        T: Clone,
    {
        assert!(
            values.is_empty() || values.len().checked_rem(columns) == Some(0),
            "{} elements in rows of {columns}",
            values.len()
        );
        let rows = values.len().checked_div(columns).unwrap_or(0);
        ShmMatrix::init_in(heap, (rows, columns), |row, column| {
            values[row * columns + column].clone()
        })
    }
}

impl<T: ShmSafe, H: ShmSafe> ShmMatrix<T, H> {
    /// A matrix without rows and columns, with a header. [`grow`](Self::grow) gives it some.
    ///
    /// # Errors
    ///
    /// The header, with the errors of [`make_in`](Self::make_in).
    #[doc(alias = "Netmcore_matrix.create")]
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        header: H,
    ) -> std::result::Result<ShmMatrix<T, H>, Rejected<H>> {
        match ShmMatrix::init_in(heap, (0, 0), |_, _| unreachable!("no elements")) {
            Ok(matrix) => matrix.with_header(header),
            Err(error) => Err(Rejected::new(header, error)),
        }
    }

    /// The same matrix with another header.
    ///
    /// # Errors
    ///
    /// The header, with [`Error::ForeignPointer`](crate::Error::ForeignPointer) if it has pointers into another region. The matrix is gone then.
    pub fn with_header<G: ShmSafe>(
        self,
        header: G,
    ) -> std::result::Result<ShmMatrix<T, G>, Rejected<G>> {
        match self.grid.heap().check(&header) {
            Ok(()) => Ok(ShmMatrix {
                grid: self.grid,
                header,
            }),
            Err(error) => Err(Rejected::new(header, error)),
        }
    }

    /// The header.
    #[doc(alias = "Netmcore_matrix.header")]
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The heap that the elements lie in.
    pub fn heap(&self) -> HeapRef {
        self.grid.heap()
    }

    /// How many rows and columns there are. Both only grow.
    #[doc(alias = "Netmcore_matrix.dim")]
    pub fn dim(&self) -> (usize, usize) {
        let shape = self.grid.shape();
        (shape.rows, shape.columns)
    }

    /// Of `parts` parts of the rows, as equal as can be, the one of that number: a worker's share.
    ///
    /// # Panics
    ///
    /// If `part` is not below `parts`.
    pub fn part(&self, part: usize, parts: usize) -> Range<usize> {
        share(self.dim().0, part, parts)
    }

    /// Makes the matrix at least that many rows and columns large; elements that are new are clones of the value.
    ///
    /// # Errors
    ///
    /// [`ClaimError::Memory`] if there is no memory, or the value has pointers into another region; [`ClaimError::WouldDeadlock`] if the
    /// calling thread has claimed a part. Nothing has changed then.
    ///
    /// # Blocking
    ///
    /// Until nobody has claimed any part: the elements move.
    ///
    /// # If a process dies
    ///
    /// The matrix has the new shape, and all of the new elements, or the old one.
    #[doc(alias = "Netmcore_matrix.grow")]
    pub fn grow(
        &self,
        (rows, columns): (usize, usize),
        value: T,
    ) -> std::result::Result<(), ClaimError>
    where
        T: Clone,
    {
        let to = |_| Shape { rows, columns };
        let element = |_, _| value.clone();
        self.grid.grow(to, Patience::Endless, element).map(|_| ())
    }

    /// Claims rows for writing: nobody else uses any of them until the claim is dropped.
    ///
    /// # Errors
    ///
    /// [`ClaimError::OutOfBounds`] if there are no such rows; [`ClaimError::WouldDeadlock`] if the calling thread has claimed an element of
    /// them; [`ClaimError::Memory`] if there are more claims than ever before, and no memory to note them.
    ///
    /// # Blocking
    ///
    /// While others use a part of them: spins briefly, then sleeps.
    ///
    /// # If a process dies
    ///
    /// Its claim ends. What it had written is there; an element that it was writing is in doubt. The next to claim any of it is told.
    pub fn claim_rows(
        &self,
        rows: impl RangeBounds<usize>,
    ) -> std::result::Result<MatrixBlockMut<'_, T>, ClaimError> {
        self.claim_block(rows, ..)
    }

    /// Claims the elements that are in these rows and in these columns for writing. As [`claim_rows`](Self::claim_rows).
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows).
    ///
    /// # Blocking
    ///
    /// As [`claim_rows`](Self::claim_rows).
    ///
    /// # If a process dies
    ///
    /// As [`claim_rows`](Self::claim_rows).
    pub fn claim_block(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
    ) -> std::result::Result<MatrixBlockMut<'_, T>, ClaimError> {
        let part = self.claimed(rows, columns, Kind::Exclusive, Patience::Endless)?;
        Ok(MatrixBlockMut::of(part.expect("waited for"), self.heap()))
    }

    /// As [`claim_block`](Self::claim_block); `None` if somebody uses a part of it.
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows).
    pub fn try_claim_block(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
    ) -> std::result::Result<Option<MatrixBlockMut<'_, T>>, ClaimError> {
        let part = self.claimed(rows, columns, Kind::Exclusive, Patience::None)?;
        Ok(part.map(|part| MatrixBlockMut::of(part, self.heap())))
    }

    /// As [`claim_block`](Self::claim_block), until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows); [`ClaimError::TimedOut`] if somebody used a part of it to the end.
    pub fn claim_block_deadline(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
        deadline: Instant,
    ) -> std::result::Result<MatrixBlockMut<'_, T>, ClaimError> {
        let patience = Patience::Until(deadline);
        let part = self.claimed(rows, columns, Kind::Exclusive, patience)?;
        Ok(MatrixBlockMut::of(part.expect("waited for"), self.heap()))
    }

    /// Claims rows for reading: nobody writes to them until the claim is dropped; others may read them too.
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows).
    ///
    /// # Blocking
    ///
    /// While somebody has claimed a part of them for writing.
    ///
    /// # If a process dies
    ///
    /// Its claim ends.
    pub fn read_rows(
        &self,
        rows: impl RangeBounds<usize>,
    ) -> std::result::Result<MatrixBlock<'_, T>, ClaimError> {
        self.read_block(rows, ..)
    }

    /// Claims the elements that are in these rows and in these columns for reading. As [`read_rows`](Self::read_rows).
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows).
    ///
    /// # Blocking
    ///
    /// As [`read_rows`](Self::read_rows).
    ///
    /// # If a process dies
    ///
    /// Its claim ends.
    pub fn read_block(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
    ) -> std::result::Result<MatrixBlock<'_, T>, ClaimError> {
        let part = self.claimed(rows, columns, Kind::Shared, Patience::Endless)?;
        Ok(MatrixBlock(part.expect("waited for")))
    }

    /// As [`read_block`](Self::read_block); `None` if somebody has claimed a part of it for writing.
    ///
    /// # Errors
    ///
    /// As [`claim_rows`](Self::claim_rows).
    pub fn try_read_block(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
    ) -> std::result::Result<Option<MatrixBlock<'_, T>>, ClaimError> {
        Ok(self
            .claimed(rows, columns, Kind::Shared, Patience::None)?
            .map(MatrixBlock))
    }

    /// As [`read_block`](Self::read_block), until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`claim_block_deadline`](Self::claim_block_deadline).
    pub fn read_block_deadline(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
        deadline: Instant,
    ) -> std::result::Result<MatrixBlock<'_, T>, ClaimError> {
        let part = self.claimed(rows, columns, Kind::Shared, Patience::Until(deadline))?;
        Ok(MatrixBlock(part.expect("waited for")))
    }

    fn claimed(
        &self,
        rows: impl RangeBounds<usize>,
        columns: impl RangeBounds<usize>,
        kind: Kind,
        patience: Patience,
    ) -> std::result::Result<Option<Part<'_, T>>, ClaimError> {
        let rows = ends(&rows, || self.dim().0);
        let columns = ends(&columns, || self.dim().1);
        self.grid.part(rows, columns, kind, patience)
    }

    /// A clone of the element.
    ///
    /// # Errors
    ///
    /// As [`read_rows`](Self::read_rows).
    ///
    /// # Blocking
    ///
    /// As [`read_rows`](Self::read_rows).
    #[doc(alias = "Netmcore_matrix.get_c")]
    pub fn get(&self, row: usize, column: usize) -> std::result::Result<T, ClaimError>
    where
        T: Clone,
    {
        self.with(row, column, T::clone)
    }

    /// Calls `look` with the element, which nobody changes meanwhile.
    ///
    /// # Errors
    ///
    /// As [`read_rows`](Self::read_rows).
    ///
    /// # Blocking
    ///
    /// As [`read_rows`](Self::read_rows).
    #[doc(alias = "Netmcore_matrix.get_ro")]
    pub fn with<R>(
        &self,
        row: usize,
        column: usize,
        look: impl FnOnce(&T) -> R,
    ) -> std::result::Result<R, ClaimError> {
        Ok(look(&self.read_block(row..=row, column..=column)?[(0, 0)]))
    }

    /// Puts the value in place of the element.
    ///
    /// # Errors
    ///
    /// The value, with those of [`claim_rows`](Self::claim_rows), or
    /// [`Error::ForeignPointer`](crate::Error::ForeignPointer) if it has pointers into another region.
    ///
    /// # Blocking
    ///
    /// As [`claim_rows`](Self::claim_rows).
    ///
    /// # If a process dies
    ///
    /// The element is in doubt, and [abandoned](Self::abandoned).
    #[doc(alias = "Netmcore_matrix.set")]
    pub fn set(
        &self,
        row: usize,
        column: usize,
        value: T,
    ) -> std::result::Result<(), Rejected<T, ClaimError>> {
        self.replace(row, column, value).map(drop)
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
        row: usize,
        column: usize,
        value: T,
    ) -> std::result::Result<T, Rejected<T, ClaimError>> {
        if let Err(error) = self.heap().check(&value) {
            return Err(Rejected::new(value, error));
        }
        match self.claim_block(row..=row, column..=column) {
            Ok(mut element) => Ok(mem::replace(&mut element[(0, 0)], value)),
            Err(error) => Err(Rejected { value, error }),
        }
    }

    /// The blocks that somebody had claimed for writing and died, or panicked, as rows and columns, and that nobody has claimed whole
    /// since; with who it was. In no order.
    pub fn abandoned(&self) -> Vec<(Range<usize>, Range<usize>, OwnerId)> {
        blocks(self.grid.abandoned(false))
    }

    /// As [`abandoned`](Self::abandoned), and they are not told again.
    pub fn take_abandoned(&self) -> Vec<(Range<usize>, Range<usize>, OwnerId)> {
        blocks(self.grid.abandoned(true))
    }

    /// All elements, row by row, of a matrix that nobody else has.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self.grid.all_mut()
    }
}

fn blocks(abandoned: Vec<Abandoned>) -> Vec<(Range<usize>, Range<usize>, OwnerId)> {
    let range = |ends: Range<u64>| ends.start as usize..ends.end as usize;
    abandoned
        .into_iter()
        .map(|(area, owner)| (range(area.rows), range(area.columns), owner))
        .collect()
}

impl<T: ShmSafe, H: ShmSafe + fmt::Debug> fmt::Debug for ShmMatrix<T, H> {
    /// Without the elements, which others may be using.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmMatrix")
            .field("header", &self.header)
            .field("dim", &self.dim())
            .finish_non_exhaustive()
    }
}

impl<T> Part<'_, T> {
    fn dim(&self) -> (usize, usize) {
        (self.rows.len(), self.columns.len())
    }

    /// Where a row of the part begins, and how long it is.
    fn row(&self, row: usize) -> (*mut T, usize) {
        let (rows, columns) = self.dim();
        assert!(row < rows, "row {row} of {rows}");
        (self.first.as_ptr().wrapping_add(row * self.stride), columns)
    }

    fn element(&self, (row, column): (usize, usize)) -> *mut T {
        let (at, columns) = self.row(row);
        assert!(column < columns, "column {column} of {columns}");
        at.wrapping_add(column)
    }

    /// All of it, if its rows lie one behind the other.
    fn all(&self) -> Option<(*mut T, usize)> {
        let (rows, columns) = self.dim();
        let is_whole = columns == self.stride || rows <= 1 || columns == 0;
        is_whole.then(|| (self.first.as_ptr(), rows * columns))
    }
}

macro_rules! reads {
    ($block:ident [$($bound:tt)*], $part:tt) => {
        impl<T: $($bound)*> $block<'_, T> {
            /// How many rows and columns it has.
            pub fn dim(&self) -> (usize, usize) {
                self.$part.dim()
            }

            /// Which rows of the matrix it has.
            pub fn row_range(&self) -> Range<usize> {
                self.$part.rows.clone()
            }

            /// Which columns of the matrix it has.
            pub fn column_range(&self) -> Range<usize> {
                self.$part.columns.clone()
            }

            /// Who died, or panicked, with a claim for writing of some of it, that nobody has claimed since. What it wrote there is in doubt.
            pub fn abandoned_by(&self) -> Option<OwnerId> {
                self.$part.claim.abandoned_by
            }

            /// A row, counted from the first that was claimed: the elements in the claimed columns.
            ///
            /// # Panics
            ///
            /// If it has no such row.
            pub fn row(&self, row: usize) -> &[T] {
                let (at, len) = self.$part.row(row);
                // SAFETY: in bounds: a row of the part; here and there: nobody writes there while this is borrowed; gone: the claim keeps it.
                unsafe { slice::from_raw_parts(at, len) }
            }

            /// The rows, one after the other.
            pub fn rows(&self) -> impl ExactSizeIterator<Item = &[T]> {
                (0..self.dim().0).map(|row| self.row(row))
            }

            /// All elements, row by row, if whole rows were claimed, or one.
            pub fn as_slice(&self) -> Option<&[T]> {
                let (at, len) = self.$part.all()?;
                // SAFETY: as for `row`; the rows lie one behind the other.
                Some(unsafe { slice::from_raw_parts(at, len) })
            }

            /// It as a view of ndarray's.
            #[cfg(feature = "ndarray")]
            pub fn view(&self) -> ndarray::ArrayView2<'_, T> {
                use ndarray::ShapeBuilder;
                let shape = self.dim().strides((self.$part.stride.max(1), 1));
                // SAFETY: as for `row`: all elements of the shape are in bounds and live, and the view borrows this.
                unsafe { ndarray::ArrayView2::from_shape_ptr(shape, self.$part.first.as_ptr()) }
            }
        }

        impl<T: $($bound)*> Index<(usize, usize)> for $block<'_, T> {
            type Output = T;

            /// The element in that row and column, counted from the first that were claimed.
            fn index(&self, place: (usize, usize)) -> &T {
                // SAFETY: as for `row`; in bounds by the check in there.
                unsafe { &*self.$part.element(place) }
            }
        }

        impl<T: $($bound)* + fmt::Debug> fmt::Debug for $block<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_list().entries(self.rows()).finish()
            }
        }
    };
}

/// A part of a [`ShmMatrix`], claimed for reading.
///
/// It belongs to the thread that claimed it. A forked child must not use its copy.
#[must_use = "the claim ends when it is dropped"]
pub struct MatrixBlock<'a, T: ShmSafe>(Part<'a, T>);

reads!(MatrixBlock[ShmSafe], 0);

/// A part of a [`ShmMatrix`], claimed for writing: nobody else uses it.
///
/// It belongs to the thread that claimed it, so it is not `Send`; its rows may be given to other threads of the process, by scoped threads
/// or by rayon. A forked child must not use its copy. Elements that own something are looked through when it is dropped, as for
/// [`ArraySliceMut`](crate::collections::ArraySliceMut).
#[must_use = "the claim ends when it is dropped"]
pub struct MatrixBlockMut<'a, T: ShmSafe> {
    part: Part<'a, T>,
    heap: HeapRef,
    borrows: PhantomData<&'a mut T>,
}

reads!(MatrixBlockMut[ShmSafe], part);

impl<'a, T: ShmSafe> MatrixBlockMut<'a, T> {
    fn of(part: Part<'a, T>, heap: HeapRef) -> MatrixBlockMut<'a, T> {
        MatrixBlockMut {
            part,
            heap,
            borrows: PhantomData,
        }
    }

    /// A row, counted from the first that was claimed: the elements in the claimed columns.
    ///
    /// # Panics
    ///
    /// If it has no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [T] {
        let (at, len) = self.part.row(row);
        // SAFETY: as for `row`; nobody else has a claim of it, and this one is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(at, len) }
    }

    /// The rows, one after the other; they may be given to several threads.
    pub fn rows_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [T]> {
        let part = &self.part;
        (0..part.dim().0).map(move |row| {
            let (at, len) = part.row(row);
            // SAFETY: as for `row_mut`; each row is given once, and rows do not overlap.
            unsafe { slice::from_raw_parts_mut(at, len) }
        })
    }

    /// All elements, row by row, if whole rows were claimed, or one.
    pub fn as_mut_slice(&mut self) -> Option<&mut [T]> {
        let (at, len) = self.part.all()?;
        // SAFETY: as for `row_mut`; the rows lie one behind the other.
        Some(unsafe { slice::from_raw_parts_mut(at, len) })
    }

    /// It as a view of ndarray's.
    #[cfg(feature = "ndarray")]
    pub fn view_mut(&mut self) -> ndarray::ArrayViewMut2<'_, T> {
        use ndarray::ShapeBuilder;
        let shape = self.dim().strides((self.part.stride.max(1), 1));
        // SAFETY: as for `row_mut`: all elements of the shape are in bounds, live and different, and the view borrows this.
        unsafe { ndarray::ArrayViewMut2::from_shape_ptr(shape, self.part.first.as_ptr()) }
    }
}

impl<T: ShmSafe> IndexMut<(usize, usize)> for MatrixBlockMut<'_, T> {
    fn index_mut(&mut self, place: (usize, usize)) -> &mut T {
        // SAFETY: as for `row_mut`; in bounds by the check in there.
        unsafe { &mut *self.part.element(place) }
    }
}

impl<T: ShmSafe> Drop for MatrixBlockMut<'_, T> {
    fn drop(&mut self) {
        for row in self.rows() {
            check_written(self.heap, row);
        }
    }
}

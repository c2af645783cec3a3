//! Elements in rows and columns, shared by claims of areas: what arrays and matrices are made of.
//!
//! **Protocol.** The elements lie row after row in one block of the heap, behind a head with the number of columns and of
//! rows. Whoever has claimed an area reads or writes the elements in it, through slices; the claim is also what keeps the block.
//!
//! * Growing claims the rows behind the last. If the block has room, the new elements are written there, and the number of rows
//!   is stored. Else it claims all there is, which waits until nobody uses anything; copies the elements to a new
//!   block, writes the new ones, stores the block's address, and frees the old block.
//! * The dimensions are read under the table's lock, and the address is stored under it, so no claim is needed to ask for them.
//!
//! **Invariants.**
//! 1. The elements in the rows and columns of the head are values. Those behind are none.
//! 2. A block is freed only by one that has claimed everything, after it has stored another address; or with the grid.
//! 3. The columns and the capacity of a block do not change. Its rows only grow.
//! 4. Elements are touched only by those that have claimed them, or have the grid for themselves.
//! 5. The address is null once the grid is being dropped. Others find such a grid only after a death in the middle of an assignment, which drops the old
//!    one before it writes the new one: it can be replaced and dropped, and panics where it is used.
//!
//! **If a process dies here.** While growing: the grid is as before or after; a block that was not stored yet, or not freed yet, stays allocated until the
//! heap is gone. While writing elements that it had claimed: they are in doubt, and the claim's area is abandoned (see `claims`).
//!
//! # Safety
//!
//! Claims exclude each other where they overlap (claims, invariant 2), so the slices made for them do too, but for those made for shared claims, through
//! which nothing is written.

#![allow(unsafe_code)]

use super::claims::{Abandoned, Area, Claim, ClaimError, Claims, Kind};
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicPtr, AtomicU64};
use std::time::Instant;

/// What a block begins with. The elements follow.
#[repr(C)]
struct Head {
    /// In elements.
    capacity: u64,
    columns: u64,
    rows: AtomicU64,
}

/// How long to wait for a claim.
#[derive(Clone, Copy)]
pub(super) enum Patience {
    Endless,
    Until(Instant),
    None,
}

/// Elements in shared memory; see the module.
#[repr(C)]
pub(super) struct Grid<T: ShmSafe> {
    claims: Claims,
    block: AtomicPtr<Head>,
    heap: HeapRef,
    mark: Mark,
    owns: PhantomData<T>,
    /// Through `&self`, as a `Cell`: so not those of a subtype.
    takes: PhantomData<fn(T)>,
}

/// A claimed area: a rectangle of elements.
pub(super) struct Part<'a, T> {
    pub(super) claim: Claim<'a>,
    /// The first element. Dangling if there is none.
    pub(super) first: NonNull<T>,
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    /// From one row to the next, in elements.
    pub(super) stride: usize,
}

/// The dimensions that a grid is to have.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Shape {
    fn count(self) -> Result<usize> {
        self.rows.checked_mul(self.columns).ok_or_else(too_large)
    }
}

fn too_large() -> Error {
    Error::OutOfPoolMemory {
        wanted_bytes: u64::MAX,
        free_bytes: 0,
        largest_free_bytes: 0,
    }
}

impl<T: ShmSafe> Grid<T> {
    const ALIGN: usize = if align_of::<T>() > 64 {
        align_of::<T>()
    } else {
        64
    };
    /// Where the elements begin in a block: at a cache line.
    const ELEMENTS_AT: usize = size_of::<Head>().next_multiple_of(Self::ALIGN);

    /// A grid with room for `capacity` elements; `element` gives them, row by row.
    pub(super) fn new(
        heap: HeapRef,
        shape: Shape,
        capacity: usize,
        mut element: impl FnMut(usize, usize) -> T,
    ) -> Result<Grid<T>> {
        let count = shape.count()?;
        let mut filling = Filling::new(heap, shape, capacity.max(count))?;
        filling.fill(0..count, in_rows(shape.columns, 0, &mut element))?;
        Ok(Grid {
            claims: Claims::new(),
            block: AtomicPtr::new(filling.done()),
            heap,
            mark: Mark::here(),
            owns: PhantomData,
            takes: PhantomData,
        })
    }

    pub(super) fn heap(&self) -> HeapRef {
        self.heap
    }

    /// Rows and columns.
    pub(super) fn shape(&self) -> Shape {
        self.must_be_in_place();
        let _locked = self.claims.lock();
        // SAFETY: not freed while the lock is held: invariant 2, and the address is stored under it.
        unsafe { Self::shape_of(self.block.load(SeqCst)) }
    }

    /// How many elements there can be before growing has to move them.
    pub(super) fn capacity(&self) -> usize {
        self.must_be_in_place();
        let _locked = self.claims.lock();
        // SAFETY: as for `shape`.
        unsafe { (*self.block.load(SeqCst)).capacity as usize }
    }

    pub(super) fn abandoned(&self, forget: bool) -> Vec<Abandoned> {
        self.must_be_in_place();
        self.claims.abandoned(forget)
    }

    /// Claims an area.
    pub(super) fn part(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        kind: Kind,
        patience: Patience,
    ) -> std::result::Result<Option<Part<'_, T>>, ClaimError> {
        let area = Area {
            rows: rows.start as u64..rows.end as u64,
            columns: columns.start as u64..columns.end as u64,
        };
        let Some(claim) = self.claim(&area, kind, patience)? else {
            return Ok(None);
        };
        // Only now: the claim keeps the block.
        let block = self.block.load(SeqCst);
        // An empty area keeps nothing; the lock does, for a moment.
        let shape = if area.rows.is_empty() || area.columns.is_empty() {
            self.shape()
        } else {
            // SAFETY: a block, kept by the claim: freeing it takes a claim that overlaps.
            unsafe { Self::shape_of(block) }
        };
        for (what, range, len) in [
            ("rows", &rows, shape.rows),
            ("columns", &columns, shape.columns),
        ] {
            if range.start > range.end || range.end > len {
                return Err(ClaimError::OutOfBounds {
                    what,
                    end: range.end.max(range.start) as u64,
                    len: len as u64,
                });
            }
        }
        let first = if rows.is_empty() || columns.is_empty() {
            NonNull::dangling()
        } else {
            // SAFETY: in bounds of the block, by the checks above; it is kept by the claim.
            unsafe {
                let at = rows.start * shape.columns + columns.start;
                NonNull::new_unchecked(Self::elements(block).add(at))
            }
        };
        Ok(Some(Part {
            claim,
            first,
            rows,
            columns,
            stride: shape.columns,
        }))
    }

    fn claim(
        &self,
        area: &Area,
        kind: Kind,
        patience: Patience,
    ) -> std::result::Result<Option<Claim<'_>>, ClaimError> {
        self.must_be_in_place();
        match patience {
            Patience::None => self.claims.try_claim(self.heap, area, kind),
            Patience::Endless => self.claims.claim(self.heap, area, kind, None).map(Some),
            Patience::Until(deadline) => self
                .claims
                .claim(self.heap, area, kind, Some(deadline))
                .map(Some),
        }
    }

    /// Grows to that shape at least; `element` gives what is new. False if somebody is in the way and there is no patience.
    pub(super) fn grow(
        &self,
        to: impl Fn(Shape) -> Shape,
        patience: Patience,
        mut element: impl FnMut(usize, usize) -> T,
    ) -> std::result::Result<bool, ClaimError> {
        let mut rows_from = self.shape().rows as u64;
        loop {
            let area = Area::of_rows(rows_from..u64::MAX);
            let Some(_claim) = self.claim(&area, Kind::Sole, patience)? else {
                return Ok(false);
            };
            // SAFETY: only growing changes or frees it, and of those that grow one has this claim.
            let block = unsafe { &*self.block.load(SeqCst) };
            // SAFETY: as above.
            let old = unsafe { Self::shape_of(block) };
            let wanted = to(old);
            let new = Shape {
                rows: old.rows.max(wanted.rows),
                columns: old.columns.max(wanted.columns),
            };
            if (new.rows, new.columns) == (old.rows, old.columns) {
                return Ok(true);
            }
            let capacity = block.capacity as usize;
            if new.columns == old.columns && new.count()? <= capacity {
                self.grow_in_place(block, new, &mut element)?;
                return Ok(true);
            }
            if rows_from > 0 {
                // Again, with everything.
                rows_from = 0;
                continue;
            }
            self.grow_elsewhere(old, new, capacity, &mut element)?;
            return Ok(true);
        }
    }

    /// The caller has claimed what is behind the last row.
    fn grow_in_place(
        &self,
        block: &Head,
        new: Shape,
        element: &mut impl FnMut(usize, usize) -> T,
    ) -> Result<()> {
        let old_rows = block.rows.load(SeqCst) as usize;
        let (from, to) = (old_rows * new.columns, new.rows * new.columns);
        // SAFETY: in bounds of the block, as the capacity suffices; no elements are there (invariant 1), and nobody else writes there.
        let mut written =
            unsafe { Written::<T>::at(Self::elements(ptr::from_ref(block).cast_mut()).add(from)) };
        // SAFETY: as above.
        unsafe {
            written.fill(
                self.heap,
                to - from,
                in_rows(new.columns, old_rows, element),
            )?
        };
        std::mem::forget(written);
        crash_point!("shm.grid.filled");
        block.rows.store(new.rows as u64, SeqCst);
        crash_point!("shm.grid.grown");
        Ok(())
    }

    /// The caller has claimed everything.
    fn grow_elsewhere(
        &self,
        old: Shape,
        new: Shape,
        old_capacity: usize,
        element: &mut impl FnMut(usize, usize) -> T,
    ) -> Result<()> {
        let capacity = new.count()?.max(old_capacity.saturating_mul(2));
        let mut filling = match Filling::new(self.heap, new, capacity) {
            Err(_) => Filling::new(self.heap, new, new.count()?)?,
            Ok(filling) => filling,
        };
        let old_block = self.block.load(SeqCst);
        // What is new first: it may fail.
        if old.columns < new.columns {
            for row in 0..old.rows {
                let mut column = old.columns;
                let in_row = row * new.columns;
                filling.fill(in_row + column..in_row + new.columns, || {
                    column += 1;
                    element(row, column - 1)
                })?;
            }
        }
        let behind = old.rows * new.columns..new.count()?;
        filling.fill(behind, in_rows(new.columns, old.rows, element))?;
        let new_block = filling.done();
        // SAFETY: in bounds of both blocks, by their shapes. The old elements are not used after the new address is stored; nobody
        // else uses any, by the claim. The old block was allocated with its layout, and nobody reads its head without a claim or the lock.
        unsafe {
            let (from, to) = (Self::elements(old_block), Self::elements(new_block));
            for row in 0..old.rows {
                let (from, to) = (from.add(row * old.columns), to.add(row * new.columns));
                to.copy_from_nonoverlapping(from, old.columns);
            }
            crash_point!("shm.grid.copied");
            {
                let _locked = self.claims.lock();
                self.block.store(new_block, SeqCst);
                crash_point!("shm.grid.moved");
            }
            Self::free(self.heap, old_block);
        }
        Ok(())
    }

    /// All elements.
    pub(super) fn all_mut(&mut self) -> &mut [T] {
        self.must_be_in_place();
        let block = *self.block.get_mut();
        // SAFETY: in bounds: invariant 1; the grid is borrowed mutably, so there is no claim of others, but for leaked ones, whose guards are gone.
        unsafe {
            let shape = Self::shape_of(block);
            std::slice::from_raw_parts_mut(Self::elements(block), shape.rows * shape.columns)
        }
    }

    pub(super) fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        let block = self.block.load(SeqCst);
        if !block.is_null() {
            visit(block.cast());
        }
        self.heap.visit_pointers(visit);
        self.claims.visit_pointers(visit);
    }

    /// In a copy made by fork the claims are a copy too, so they would exclude nobody.
    fn must_be_in_place(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "this array of {} is a copy made by fork: put it into a ShmArc, to share it",
            type_name::<T>()
        );
        assert!(
            !self.block.load(Relaxed).is_null(),
            "this array of {} has no elements any more: a process died while it put another one in its place",
            type_name::<T>()
        );
    }

    /// # Safety
    ///
    /// - It is a block, which nobody frees meanwhile.
    unsafe fn shape_of(block: *const Head) -> Shape {
        // SAFETY: the caller's duty; the columns do not change (invariant 3).
        let head = unsafe { &*block };
        Shape {
            rows: head.rows.load(SeqCst) as usize,
            columns: head.columns as usize,
        }
    }

    /// # Safety
    ///
    /// - It is a block.
    unsafe fn elements(block: *mut Head) -> *mut T {
        // SAFETY: in bounds of the block, of which the head is the beginning.
        unsafe { block.cast::<u8>().add(Self::ELEMENTS_AT).cast() }
    }

    fn layout(capacity: usize) -> Option<Layout> {
        let bytes = capacity
            .checked_mul(size_of::<T>())?
            .checked_add(Self::ELEMENTS_AT)?;
        Layout::from_size_align(bytes, Self::ALIGN).ok()
    }

    /// Frees a block, without its elements.
    ///
    /// # Safety
    ///
    /// - It is a block that nobody uses any more.
    unsafe fn free(heap: HeapRef, block: *mut Head) {
        // SAFETY: the caller's duty; the capacity gives the layout that it was allocated with.
        unsafe {
            let layout = Self::layout((*block).capacity as usize).expect("it was allocated");
            heap.deallocate(NonNull::new_unchecked(block.cast()), layout);
        }
    }
}

impl<T: ShmSafe> Drop for Grid<T> {
    fn drop(&mut self) {
        let (heap, block) = (self.heap, *self.block.get_mut());
        if self.mark.is_copy_by_fork() || block.is_null() {
            return;
        }
        let elements: *mut [T] = self.all_mut();
        // Before anything else (invariant 5).
        self.block.store(ptr::null_mut(), SeqCst);
        crash_point!("shm.grid.emptied");
        // SAFETY: the grid is the caller's alone and is not used after this; the chunks came from this heap.
        unsafe {
            elements.drop_in_place();
            crash_point!("shm.grid.dropped");
            Self::free(heap, block);
            self.claims.free(heap);
        }
    }
}

impl<T: ShmSafe> fmt::Debug for Grid<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grid")
            .field("claims", &self.claims)
            .finish_non_exhaustive()
    }
}

/// A block that is being filled. Until it is done, dropping it drops the elements and frees it.
struct Filling<T: ShmSafe> {
    block: *mut Head,
    heap: HeapRef,
    written: Vec<Written<T>>,
}

impl<T: ShmSafe> Filling<T> {
    fn new(heap: HeapRef, shape: Shape, capacity: usize) -> Result<Filling<T>> {
        let layout = Grid::<T>::layout(capacity).ok_or_else(too_large)?;
        let block = heap.allocate(layout)?.cast::<Head>().as_ptr();
        // SAFETY: in bounds of the new block, which is aligned for a head; nobody else knows of it.
        unsafe {
            block.write(Head {
                capacity: capacity as u64,
                columns: shape.columns as u64,
                rows: AtomicU64::new(shape.rows as u64),
            });
        }
        crash_point!("shm.grid.allocated");
        Ok(Filling {
            block,
            heap,
            written: Vec::new(),
        })
    }

    /// Writes the elements of these indices, where none are yet.
    fn fill(&mut self, indices: Range<usize>, element: impl FnMut() -> T) -> Result<()> {
        if indices.is_empty() {
            return Ok(());
        }
        // SAFETY: in bounds of the block, by its shape.
        let mut written =
            unsafe { Written::at(Grid::<T>::elements(self.block).add(indices.start)) };
        // SAFETY: as above; no elements are there, and nobody else knows of the block.
        unsafe { written.fill(self.heap, indices.len(), element)? };
        self.written.push(written);
        Ok(())
    }

    fn done(self) -> *mut Head {
        let mut this = std::mem::ManuallyDrop::new(self);
        let written = std::mem::take(&mut this.written);
        written.into_iter().for_each(std::mem::forget);
        this.block
    }
}

impl<T: ShmSafe> Drop for Filling<T> {
    fn drop(&mut self) {
        self.written.clear();
        // SAFETY: never published.
        unsafe { Grid::<T>::free(self.heap, self.block) };
    }
}

/// Calls `element` with the rows and columns in their order, from that row on.
fn in_rows<T>(
    columns: usize,
    first_row: usize,
    mut element: impl FnMut(usize, usize) -> T,
) -> impl FnMut() -> T {
    let (mut row, mut column) = (first_row, 0);
    move || {
        let value = element(row, column);
        column += 1;
        if column == columns {
            (row, column) = (row + 1, 0);
        }
        value
    }
}

/// Elements that are written and not yet anybody's.
struct Written<T> {
    at: *mut T,
    count: usize,
}

impl<T: ShmSafe> Written<T> {
    fn at(at: *mut T) -> Written<T> {
        Written { at, count: 0 }
    }

    /// Writes so many.
    ///
    /// # Safety
    ///
    /// - There is room for so many, no elements are there, and nobody else uses it.
    unsafe fn fill(
        &mut self,
        heap: HeapRef,
        count: usize,
        mut element: impl FnMut() -> T,
    ) -> Result<()> {
        while self.count < count {
            let value = element();
            heap.check(&value)?;
            // SAFETY: the caller's duty.
            unsafe { self.at.add(self.count).write(value) };
            self.count += 1;
        }
        Ok(())
    }
}

impl<T> Drop for Written<T> {
    fn drop(&mut self) {
        // SAFETY: so many were written there, and nobody else has them.
        unsafe { ptr::slice_from_raw_parts_mut(self.at, self.count).drop_in_place() };
    }
}

//! Bytes that several processes append and read, at positions that never change: [`ShmBuffer`].
//!
//! **Protocol.** The bytes at the positions `start..end` are there. They lie in chunks of one length; chunk *k* has the positions from *k* times that length on. A directory, a
//! ring of addresses, says where the chunks from `first` to below `next` lie. All of this is changed under the lock of a table of `claims`, whose
//! shared claims are the pins of those that read.
//!
//! * Append: lock; see that there are chunks up to the new end, else unlock and allocate what is missing; write the bytes behind the end; store the
//!   end: that is the commit. Unlock, wake.
//! * Pin: claim the range; then look whether the start is beyond its beginning, and if so give up. The bytes are read without the lock, since nobody changes
//!   them or frees them: who frees chunks sees the claim, or had stored a start that is seen.
//! * Delete: lock; store the start: that is the commit. Unlock. Then *collect*, as does whoever unpins: chunks that lie wholly below the start and below
//!   every pin are taken from the directory by storing `first`, and freed.
//!
//! **Invariants.**
//! 1. `first` · length ≤ `start` ≤ `end` ≤ `next` · length. None of them ever becomes smaller, but for `next`, when an append finds no memory for all its chunks.
//! 2. The bytes below the end do not change. Those behind it are written by the holder of the lock only.
//! 3. A chunk is freed by whoever has stored a `first` beyond it, under the lock, when no pin began before its end.
//! 4. An address in the directory is read under the lock, or by one that has pinned bytes of its chunk; then it is used without.
//!
//! **If a process dies here.**
//!
//! | it died | what is there |
//! |---|---|
//! | appending | nothing of its bytes before the commit, all of them after. Chunks that it added stay and are used by the next |
//! | having allocated a chunk or a directory that is not stored yet, or taken one out | that block stays allocated until the heap is gone |
//! | deleting | done or not; the next to delete or unpin frees the chunks |
//! | reading | its pins end when somebody collects |
//!
//! **Not here.** The pins: `claims`.
//!
//! # Safety
//!
//! Bytes are given as slices only while they are pinned and below the end (invariants 2 and 3). What lies behind the end is written through raw pointers, by one
//! process at a time.

#![allow(unsafe_code)]

use super::claims::{Area, Claim, ClaimError, Claims, Kind};
use super::rejected::Rejected;
use crate::error::{Error, Result};
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use netmcore_sem::{Current, LockGuard, WaitWord};
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::fmt;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64};
use std::time::Instant;

/// Bytes in shared memory, appended at the end and deleted at the start, with a header of the user's type. Many processes use it through `&self`.
///
/// The first byte ever appended has position 0, and each byte keeps its position: whoever knows it finds the byte, until it is deleted. What one
/// [`add`](Self::add) appends lies at consecutive positions and becomes visible at once. Bytes do not move and do not change.
///
/// `&ShmBuffer` is a [`std::io::Write`]; [`reader`](Self::reader) and [`follow`](Self::follow) give a [`std::io::BufRead`].
///
/// # If a process dies
///
/// While it appends: all of the bytes of that call are there, or none. While it reads: what it had pinned can be freed.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmArc, ShmBuffer};
/// use std::io::BufRead;
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let log = ShmArc::new_in(&heap, ShmBuffer::new_in(&heap))?;
/// let first = log.add(b"one\n")?; // in any process
/// let second = log.add(b"two\n")?;
/// assert_eq!((first, second.clone()), (0..4, 4..8));
/// log.delete_to(4);
/// assert_eq!(log.sub(second)?, b"two\n");
/// assert_eq!(log.reader().lines().next().unwrap()?, "two");
/// assert!(log.sub(0..4).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[repr(C)]
pub struct ShmBuffer<H = ()> {
    claims: Claims,
    start: AtomicU64,
    end: AtomicU64,
    /// Numbers of chunks: the first that is there, and behind the last.
    first: AtomicU64,
    next: AtomicU64,
    /// Null, or the ring.
    directory: AtomicPtr<Directory>,
    /// 1: nothing is appended any more.
    closed: AtomicU32,
    /// Where those wait that read behind the end.
    appended: WaitWord,
    heap: HeapRef,
    chunk_shift: u32,
    mark: Mark,
    header: H,
}

/// What the ring begins with. The addresses follow, that of chunk *k* at *k* modulo the capacity.
#[repr(C)]
struct Directory {
    /// A power of two.
    capacity: u64,
}

const DEFAULT_CHUNK_BYTES: usize = 64 << 10;
const MIN_CHUNK_BYTES: usize = 64;
const FIRST_DIRECTORY: u64 = 16;

// SAFETY: numbers, a header that is ShmSafe, and the addresses of blocks of bytes and of the ring; all are reported.
unsafe impl<H: ShmSafe> ShmSafe for ShmBuffer<H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        self.heap.visit_pointers(visit);
        self.claims.visit_pointers(visit);
        self.header.visit_pointers(visit);
        let directory = self.directory.load(SeqCst);
        if !directory.is_null() {
            visit(directory.cast());
            for number in self.first.load(SeqCst)..self.next.load(SeqCst) {
                // SAFETY: a ring, in which these chunks are.
                visit(unsafe { slot(directory, number) }.load(SeqCst));
            }
        }
    }
}

impl ShmBuffer {
    /// An empty buffer, in chunks of 64 KiB.
    #[doc(alias = "Netmcore_buffer.create")]
    pub fn new_in(heap: impl Into<HeapRef>) -> ShmBuffer {
        ShmBuffer::of(heap.into(), DEFAULT_CHUNK_BYTES, ())
    }
}

impl<H: ShmSafe> ShmBuffer<H> {
    /// An empty buffer with a header.
    ///
    /// # Errors
    ///
    /// The header, with [`Error::ForeignPointer`] if it has pointers into another region.
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        header: H,
    ) -> std::result::Result<ShmBuffer<H>, Rejected<H>> {
        ShmBuffer::with_chunks_in(heap, DEFAULT_CHUNK_BYTES, header)
    }

    /// An empty buffer with a header, in chunks of `chunk_bytes`, rounded up to a power of two.
    ///
    /// Bytes of one chunk can be had as one slice; memory is taken and freed by chunks.
    ///
    /// # Errors
    ///
    /// As [`with_header_in`](Self::with_header_in).
    pub fn with_chunks_in(
        heap: impl Into<HeapRef>,
        chunk_bytes: usize,
        header: H,
    ) -> std::result::Result<ShmBuffer<H>, Rejected<H>> {
        let heap = heap.into();
        match heap.check(&header) {
            Ok(()) => Ok(ShmBuffer::of(heap, chunk_bytes, header)),
            Err(error) => Err(Rejected::new(header, error)),
        }
    }

    fn of(heap: HeapRef, chunk_bytes: usize, header: H) -> ShmBuffer<H> {
        ShmBuffer {
            claims: Claims::new(),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            first: AtomicU64::new(0),
            next: AtomicU64::new(0),
            directory: AtomicPtr::new(ptr::null_mut()),
            closed: AtomicU32::new(0),
            appended: WaitWord::new(),
            heap,
            chunk_shift: chunk_bytes
                .clamp(MIN_CHUNK_BYTES, 1 << 40)
                .next_power_of_two()
                .ilog2(),
            mark: Mark::here(),
            header,
        }
    }

    /// The header.
    #[doc(alias = "Netmcore_buffer.header")]
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The heap that the bytes lie in.
    pub fn heap(&self) -> HeapRef {
        self.heap
    }

    /// The length of a chunk.
    pub fn chunk_bytes(&self) -> usize {
        1 << self.chunk_shift
    }

    /// The position of the first byte that is not deleted.
    #[doc(alias = "Netmcore_buffer.start")]
    pub fn start(&self) -> u64 {
        self.start.load(SeqCst)
    }

    /// The position behind the last byte: how many were ever appended.
    #[doc(alias = "Netmcore_buffer.end")]
    pub fn end(&self) -> u64 {
        self.end.load(SeqCst)
    }

    /// How many bytes there are. While others append and delete, of no single moment.
    #[doc(alias = "Netmcore_buffer.length")]
    pub fn len(&self) -> u64 {
        // The start first: it is never beyond an end that is read later.
        let start = self.start();
        self.end() - start
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the bytes, and gives their positions. They become visible at once.
    ///
    /// # Errors
    ///
    /// [`BufferError::Closed`] if the buffer was closed; [`BufferError::Memory`] if there is no memory. Nothing was appended then.
    ///
    /// # Blocking
    ///
    /// While another one appends.
    ///
    /// # If a process dies
    ///
    /// All of the bytes are there, or none.
    #[doc(alias("Netmcore_buffer.add_string", "append"))]
    pub fn add(&self, bytes: &[u8]) -> std::result::Result<Range<u64>, BufferError> {
        self.must_be_in_place();
        loop {
            let locked = self.claims.lock();
            if self.is_closed() {
                return Err(BufferError::Closed);
            }
            let from = self.end.load(SeqCst);
            let to = from + bytes.len() as u64;
            let next = self.next.load(SeqCst);
            if next << self.chunk_shift < to {
                drop(locked);
                if let Err(error) = self.add_chunk(next) {
                    self.free_unused();
                    return Err(error.into());
                }
                continue;
            }
            let mut rest = bytes;
            for (at, len) in self.pieces(&locked, from..to) {
                let (piece, behind) = rest.split_at(len);
                // SAFETY: in bounds of the chunk; behind the end, so nobody reads it, and written with the lock (invariant 2).
                unsafe { at.copy_from_nonoverlapping(piece.as_ptr(), len) };
                crash_point!("shm.buffer.piece_written");
                rest = behind;
            }
            self.end.store(to, SeqCst);
            crash_point!("shm.buffer.committed");
            drop(locked);
            crash_point!("shm.buffer.unlocked");
            self.appended.notify_all();
            return Ok(from..to);
        }
    }

    /// Appends a formatted text at once, as [`add`](Self::add); `write!` would append it piece by piece.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    ///
    /// # Blocking
    ///
    /// As [`add`](Self::add).
    ///
    /// # If a process dies
    ///
    /// As [`add`](Self::add).
    pub fn add_fmt(
        &self,
        text: fmt::Arguments<'_>,
    ) -> std::result::Result<Range<u64>, BufferError> {
        match text.as_str() {
            Some(text) => self.add(text.as_bytes()),
            None => self.add(text.to_string().as_bytes()),
        }
    }

    /// Makes sure that chunk `number` is there.
    #[cold]
    fn add_chunk(&self, number: u64) -> Result<()> {
        let chunk = Block::new(self.heap, self.chunk_layout()?)?;
        crash_point!("shm.buffer.chunk_allocated");
        loop {
            let locked = self.claims.lock();
            if self.next.load(SeqCst) != number {
                return Ok(());
            }
            let directory = self.directory.load(SeqCst);
            let in_use = number - self.first.load(SeqCst);
            // SAFETY: null, or a ring, which is freed under the lock only.
            let capacity = unsafe { directory.as_ref() }.map_or(0, |ring| ring.capacity);
            if in_use < capacity {
                // SAFETY: a ring; this place is that of no chunk.
                unsafe { slot(directory, number) }.store(chunk.keep(), SeqCst);
                crash_point!("shm.buffer.chunk_stored");
                self.next.store(number + 1, SeqCst);
                crash_point!("shm.buffer.chunk_added");
                return Ok(());
            }
            drop(locked);
            self.grow_directory(capacity)?;
        }
    }

    /// Frees the chunks that lie wholly behind the end, so that an append that failed does not keep the memory that it found. Another one that appends
    /// meanwhile looks again whether there are enough.
    #[cold]
    fn free_unused(&self) {
        loop {
            let locked = self.claims.lock();
            let needed = self.end.load(SeqCst).div_ceil(self.chunk_bytes() as u64);
            let next = self.next.load(SeqCst);
            if next <= needed.max(self.first.load(SeqCst)) {
                return;
            }
            // SAFETY: a ring, in which the last chunk is.
            let chunk = unsafe { slot(self.directory.load(SeqCst), next - 1) }.load(SeqCst);
            self.next.store(next - 1, SeqCst);
            crash_point!("shm.buffer.unused_taken");
            drop(locked);
            if let (Some(chunk), Ok(layout)) = (NonNull::new(chunk), self.chunk_layout()) {
                // SAFETY: allocated with this layout; behind the end, so nobody has it pinned, and out of the ring.
                unsafe { self.heap.deallocate(chunk, layout) };
            }
        }
    }

    /// Puts a larger ring in place of one of that capacity.
    fn grow_directory(&self, old_capacity: u64) -> Result<()> {
        let capacity = (old_capacity * 2).max(FIRST_DIRECTORY);
        let new = Block::new(self.heap, directory_layout(capacity)?)?;
        let ring = new.at.cast::<Directory>();
        // SAFETY: in bounds of the new block, of which nobody else knows; zeros are addresses of nothing.
        unsafe {
            new.at.write_bytes(0, new.layout.size());
            ring.write(Directory { capacity });
        }
        crash_point!("shm.buffer.directory_allocated");
        let _locked = self.claims.lock();
        let old = self.directory.load(SeqCst);
        // SAFETY: null, or a ring, which is freed under the lock only.
        let found = unsafe { old.as_ref() }.map_or(0, |ring| ring.capacity);
        if found != old_capacity {
            return Ok(());
        }
        for number in self.first.load(SeqCst)..self.next.load(SeqCst) {
            // SAFETY: rings, of which the old one has these chunks, and the new one has room for more.
            unsafe { slot(ring, number).store(slot(old, number).load(SeqCst), SeqCst) };
        }
        crash_point!("shm.buffer.directory_filled");
        new.keep();
        self.directory.store(ring, SeqCst);
        crash_point!("shm.buffer.directory_stored");
        if let Some(at) = NonNull::new(old) {
            // SAFETY: allocated with this layout; read under the lock only, which is held.
            unsafe {
                self.heap
                    .deallocate(at.cast(), directory_layout(old_capacity)?)
            };
        }
        Ok(())
    }

    /// Where the bytes of a range lie, chunk by chunk. All of these chunks are there.
    fn pieces(
        &self,
        _: &LockGuard<'_>,
        range: Range<u64>,
    ) -> impl Iterator<Item = (*mut u8, usize)> {
        let directory = self.directory.load(SeqCst);
        let mut position = range.start;
        std::iter::from_fn(move || {
            if position >= range.end {
                return None;
            }
            let number = position >> self.chunk_shift;
            let chunk_end = (number + 1) << self.chunk_shift;
            let end = chunk_end.min(range.end);
            let offset = (position & (self.chunk_bytes() as u64 - 1)) as usize;
            // SAFETY: a ring, in which this chunk is; the lock is held (invariant 4).
            let chunk = unsafe { slot(directory, number) }.load(SeqCst);
            let piece = (chunk.wrapping_add(offset), (end - position) as usize);
            position = end;
            Some(piece)
        })
    }

    /// Deletes the bytes before `position`; all of them, if that is beyond the end. Gives the start.
    ///
    /// Their memory is freed by chunks, once nobody has them pinned.
    ///
    /// # Blocking
    ///
    /// While another one appends.
    ///
    /// # If a process dies
    ///
    /// They are deleted or not.
    #[doc(alias = "Netmcore_buffer.delete_hd")]
    pub fn delete_to(&self, position: u64) -> u64 {
        self.must_be_in_place();
        let start = {
            let _locked = self.claims.lock();
            let end = self.end.load(SeqCst);
            let start = self.start.load(SeqCst).max(position.min(end));
            self.start.store(start, SeqCst);
            crash_point!("shm.buffer.deleted");
            start
        };
        self.collect();
        start
    }

    /// Deletes all bytes.
    ///
    /// # Blocking
    ///
    /// As [`delete_to`](Self::delete_to).
    ///
    /// # If a process dies
    ///
    /// As [`delete_to`](Self::delete_to).
    #[doc(alias = "Netmcore_buffer.clear")]
    pub fn clear(&self) {
        self.delete_to(u64::MAX);
    }

    /// Frees the chunks that nobody can reach any more.
    fn collect(&self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        let whole = |position: u64| position >> self.chunk_shift;
        while self.first.load(SeqCst) < whole(self.start()) {
            self.claims.settle_the_dead_below(self.start());
            let locked = self.claims.lock();
            let first = self.first.load(SeqCst);
            let kept_from = self.claims.first_row_claimed(&locked).min(self.start());
            if first >= whole(kept_from) {
                return;
            }
            // SAFETY: a ring, in which the first chunk is.
            let chunk = unsafe { slot(self.directory.load(SeqCst), first) }.load(SeqCst);
            self.first.store(first + 1, SeqCst);
            crash_point!("shm.buffer.chunk_taken");
            drop(locked);
            if let (Some(chunk), Ok(layout)) = (NonNull::new(chunk), self.chunk_layout()) {
                // SAFETY: allocated with this layout; nobody reaches it any more (invariant 3).
                unsafe { self.heap.deallocate(chunk, layout) };
            }
            crash_point!("shm.buffer.chunk_freed");
        }
    }

    /// Pins bytes: they stay, even if they are deleted, until the pin is dropped.
    ///
    /// # Errors
    ///
    /// [`BufferError::OutOfRange`] if not all of them are there; [`BufferError::Memory`] if there are more pins than ever before, and no
    /// memory to note them.
    ///
    /// # If a process dies
    ///
    /// Its pins end.
    pub fn pin(
        &self,
        range: impl RangeBounds<u64>,
    ) -> std::result::Result<BufferPin<'_, H>, BufferError> {
        self.must_be_in_place();
        let from = match range.start_bound() {
            Bound::Included(from) => Some(*from),
            Bound::Excluded(before) => Some(before.saturating_add(1)),
            Bound::Unbounded => None,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => Some(last.saturating_add(1)),
            Bound::Excluded(to) => Some(*to),
            Bound::Unbounded => None,
        };
        self.pin_clipped(|there| {
            let range = from.unwrap_or(there.start)..to.unwrap_or(there.end);
            let is_there =
                range.start >= there.start && range.end <= there.end && range.start <= range.end;
            if is_there {
                Ok(range)
            } else {
                Err(BufferError::OutOfRange {
                    wanted: range,
                    there,
                })
            }
        })
    }

    /// Pins what `choose` says, given what is there.
    fn pin_clipped(
        &self,
        choose: impl Fn(Range<u64>) -> std::result::Result<Range<u64>, BufferError>,
    ) -> std::result::Result<BufferPin<'_, H>, BufferError> {
        loop {
            // The start first: it is never beyond an end that is read later.
            let start = self.start();
            let range = choose(start..self.end())?;
            let area = Area {
                rows: range.clone(),
                columns: 0..1,
            };
            let Some(claim) = self.claims.try_claim(self.heap, &area, Kind::Shared)? else {
                unreachable!("all claims of a buffer are shared");
            };
            // Deleted before the claim was made? Then its chunks may be gone.
            if self.start() <= range.start || range.is_empty() {
                return Ok(BufferPin {
                    claim: Some(claim),
                    buffer: self,
                    range,
                });
            }
            // It may have kept chunks from being freed.
            drop(claim);
            self.collect();
        }
    }

    /// A copy of the bytes.
    ///
    /// # Errors
    ///
    /// As [`pin`](Self::pin).
    #[doc(alias = "Netmcore_buffer.sub")]
    pub fn sub(&self, range: impl RangeBounds<u64>) -> std::result::Result<Vec<u8>, BufferError> {
        Ok(self.pin(range)?.to_vec())
    }

    /// Copies the bytes from `position` on: as many as there are and have room. Gives how many.
    ///
    /// # Errors
    ///
    /// [`BufferError::OutOfRange`] if the position is before the start, or behind the end; otherwise as [`pin`](Self::pin).
    #[doc(alias = "Netmcore_buffer.blit_to_bytes")]
    pub fn read_at(
        &self,
        position: u64,
        into: &mut [u8],
    ) -> std::result::Result<usize, BufferError> {
        let pin = self.pin_from(position, into.len() as u64)?;
        let mut len = 0;
        for piece in pin.pieces() {
            into[len..len + piece.len()].copy_from_slice(piece);
            len += piece.len();
        }
        Ok(len)
    }

    /// Pins at most `len` bytes from the position on.
    fn pin_from(
        &self,
        position: u64,
        len: u64,
    ) -> std::result::Result<BufferPin<'_, H>, BufferError> {
        self.must_be_in_place();
        self.pin_clipped(|there| {
            if position < there.start || position > there.end {
                return Err(BufferError::OutOfRange {
                    wanted: position..position.saturating_add(len),
                    there,
                });
            }
            Ok(position..position.saturating_add(len).min(there.end))
        })
    }

    /// Calls `look` with the bytes, where they lie; with a copy, if they lie in several chunks.
    ///
    /// # Errors
    ///
    /// As [`pin`](Self::pin).
    #[doc(alias = "Netmcore_buffer.access")]
    pub fn with<R>(
        &self,
        range: impl RangeBounds<u64>,
        look: impl FnOnce(&[u8]) -> R,
    ) -> std::result::Result<R, BufferError> {
        let pin = self.pin(range)?;
        Ok(match pin.as_slice() {
            Some(bytes) => look(bytes),
            None => look(&pin.to_vec()),
        })
    }

    /// Waits until there is a byte at the position or behind it; gives the end then. `None` if the buffer was closed before that, or the deadline
    /// has passed.
    ///
    /// # Blocking
    ///
    /// Until another one appends or closes, or the deadline. Nobody knows who is to append: if all who might are dead, only the deadline ends it.
    pub fn wait_for(&self, position: u64, deadline: Option<Instant>) -> Option<u64> {
        self.must_be_in_place();
        let attempt = || {
            // Before the end: what was appended before it was closed is there.
            let is_closed = self.is_closed();
            match self.end() {
                end if end > position => Some(Some(end)),
                _ if is_closed => Some(None),
                _ => None,
            }
        };
        let deadline = deadline.map(Into::into);
        self.appended
            .wait(&Current, None, deadline, attempt)
            .flatten()
    }

    /// Ends it: nothing can be appended any more, and who waits for more is told. What is there stays.
    ///
    /// # If a process dies
    ///
    /// It is closed or not.
    pub fn close(&self) {
        self.must_be_in_place();
        {
            let _locked = self.claims.lock();
            self.closed.store(1, SeqCst);
        }
        crash_point!("shm.buffer.closed");
        self.appended.notify_all();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst) != 0
    }

    /// Reads from the start on, up to the end, where it gives 0 bytes; it can go on when there are more.
    pub fn reader(&self) -> BufferReader<'_, H> {
        self.reader_at(self.start())
    }

    /// As [`reader`](Self::reader), from a position on.
    pub fn reader_at(&self, position: u64) -> BufferReader<'_, H> {
        BufferReader {
            buffer: self,
            position,
            waits: false,
            pin: None,
        }
    }

    /// As [`reader_at`](Self::reader_at), and waits at the end for more, until the buffer is [closed](Self::close).
    pub fn follow(&self, position: u64) -> BufferReader<'_, H> {
        BufferReader {
            waits: true,
            ..self.reader_at(position)
        }
    }

    fn chunk_layout(&self) -> Result<Layout> {
        Layout::from_size_align(self.chunk_bytes(), 64).map_err(|_| too_large())
    }

    /// In a copy made by fork the lock and the positions are a copy too.
    fn must_be_in_place(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "this ShmBuffer is a copy made by fork: put it into a ShmArc, to share it"
        );
    }
}

fn too_large() -> Error {
    Error::OutOfPoolMemory {
        wanted_bytes: u64::MAX,
        free_bytes: 0,
        largest_free_bytes: 0,
    }
}

fn directory_layout(capacity: u64) -> Result<Layout> {
    let bytes = size_of::<Directory>() + capacity as usize * size_of::<AtomicPtr<u8>>();
    Layout::from_size_align(bytes, align_of::<Directory>()).map_err(|_| too_large())
}

/// The place of a chunk's address.
///
/// # Safety
///
/// - It is a ring, and nobody frees it as long as the place is used.
unsafe fn slot<'a>(directory: *mut Directory, number: u64) -> &'a AtomicPtr<u8> {
    // SAFETY: the caller's duty; in bounds of the block, behind its head, by the capacity.
    unsafe {
        let place = (number & ((*directory).capacity - 1)) as usize;
        &*directory.add(1).cast::<AtomicPtr<u8>>().add(place)
    }
}

/// A new block, freed if it is not kept.
struct Block {
    at: *mut u8,
    layout: Layout,
    heap: HeapRef,
}

impl Block {
    fn new(heap: HeapRef, layout: Layout) -> Result<Block> {
        Ok(Block {
            at: heap.allocate(layout)?.as_ptr(),
            layout,
            heap,
        })
    }

    fn keep(self) -> *mut u8 {
        std::mem::ManuallyDrop::new(self).at
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(at) = NonNull::new(self.at) {
            // SAFETY: allocated with this layout, and nobody else knows of it.
            unsafe { self.heap.deallocate(at, self.layout) };
        }
    }
}

impl<H> Drop for ShmBuffer<H> {
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        let directory = *self.directory.get_mut();
        if let Some(ring) = NonNull::new(directory) {
            let chunk = Layout::from_size_align(1 << self.chunk_shift, 64);
            // Ours alone. Each is taken out before it is freed: after a death in the middle of this nobody frees it again.
            for number in *self.first.get_mut()..*self.next.get_mut() {
                // SAFETY: a ring, in which this chunk is.
                let at = unsafe { slot(directory, number) }.load(Relaxed);
                self.first.store(number + 1, SeqCst);
                if let (Some(at), Ok(layout)) = (NonNull::new(at), &chunk) {
                    // SAFETY: allocated with this layout; the buffer is the caller's alone.
                    unsafe { self.heap.deallocate(at, *layout) };
                }
            }
            self.directory.store(ptr::null_mut(), SeqCst);
            crash_point!("shm.buffer.emptied");
            // SAFETY: a ring, allocated with this layout, that is the buffer's no more.
            unsafe {
                if let Ok(layout) = directory_layout(ring.as_ref().capacity) {
                    self.heap.deallocate(ring.cast(), layout);
                }
            }
        }
        // SAFETY: the heap that was always given.
        unsafe { self.claims.free(self.heap) };
    }
}

impl<H: fmt::Debug + ShmSafe> fmt::Debug for ShmBuffer<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmBuffer")
            .field("header", &self.header)
            .field("positions", &(self.start()..self.end()))
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

/// Each `write` is one [`add`](ShmBuffer::add) of all the bytes.
impl<H: ShmSafe> io::Write for &ShmBuffer<H> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a buffer did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BufferError {
    /// Not all of these bytes are there: some were deleted, or are not there yet.
    #[error("positions {wanted:?} were asked for, and {there:?} are there")]
    OutOfRange {
        /// What was asked for.
        wanted: Range<u64>,
        /// What was there then.
        there: Range<u64>,
    },
    /// Nothing can be appended any more.
    #[error("the buffer is closed")]
    Closed,
    /// There is no memory.
    #[error(transparent)]
    Memory(#[from] Error),
}

impl From<ClaimError> for BufferError {
    fn from(error: ClaimError) -> BufferError {
        match error {
            ClaimError::Memory(error) => BufferError::Memory(error),
            other => unreachable!("all claims of a buffer are shared: {other}"),
        }
    }
}

impl From<BufferError> for io::Error {
    fn from(error: BufferError) -> io::Error {
        let kind = match error {
            BufferError::OutOfRange { .. } => io::ErrorKind::InvalidInput,
            BufferError::Closed => io::ErrorKind::BrokenPipe,
            BufferError::Memory(_) => io::ErrorKind::OutOfMemory,
        };
        io::Error::new(kind, error)
    }
}

/// Bytes of a [`ShmBuffer`] that stay until this is dropped.
///
/// It belongs to the thread that pinned them. A forked child must not use its copy.
#[must_use = "the bytes may be freed when it is dropped"]
pub struct BufferPin<'a, H: ShmSafe = ()> {
    /// Until it is dropped.
    claim: Option<Claim<'a>>,
    buffer: &'a ShmBuffer<H>,
    range: Range<u64>,
}

impl<H: ShmSafe> BufferPin<'_, H> {
    /// Their positions.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The bytes where they lie, chunk by chunk.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let mut position = self.range.start;
        std::iter::from_fn(move || {
            let piece = self.piece(position)?;
            position += piece.len() as u64;
            Some(piece)
        })
    }

    /// The bytes from a position on, up to the end of its chunk.
    fn piece(&self, position: u64) -> Option<&[u8]> {
        if position >= self.range.end {
            return None;
        }
        let locked = self.buffer.claims.lock();
        let (at, len) = self
            .buffer
            .pieces(&locked, position..self.range.end)
            .next()?;
        // SAFETY: in bounds of the chunk; here and there: below the end, so nobody writes there (invariant 2); gone: pinned (invariant 3).
        Some(unsafe { slice::from_raw_parts(at, len) })
    }

    /// The bytes as one slice, if they lie in one chunk.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match self.piece(self.range.start) {
            None => Some(&[]),
            Some(piece) if piece.len() == self.len() => Some(piece),
            Some(_) => None,
        }
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        self.pieces()
            .for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    }
}

impl<H: ShmSafe> Drop for BufferPin<'_, H> {
    fn drop(&mut self) {
        self.claim = None;
        // A forked copy frees nothing: the pin of its parent is still there.
        self.buffer.collect();
    }
}

impl<H: ShmSafe> fmt::Debug for BufferPin<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BufferPin").field(&self.range).finish()
    }
}

/// Reads a [`ShmBuffer`] from a position on; the position is its own, so each reader sees everything.
///
/// If the bytes at its position were deleted, reading says so by an error of [`io::ErrorKind::InvalidInput`]; [`seek_to`](Self::seek_to) goes on elsewhere.
pub struct BufferReader<'a, H: ShmSafe = ()> {
    buffer: &'a ShmBuffer<H>,
    position: u64,
    waits: bool,
    /// What `fill_buf` has given.
    pin: Option<BufferPin<'a, H>>,
}

impl<H: ShmSafe> BufferReader<'_, H> {
    /// The position of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes on at that position.
    pub fn seek_to(&mut self, position: u64) {
        self.position = position;
        self.pin = None;
    }

    /// Whether there are bytes at its position, or errors; waits for them if it is one that waits. False at the end.
    fn has_more(&self) -> bool {
        if self.waits {
            self.buffer.wait_for(self.position, None).is_some()
        } else {
            self.position < self.buffer.end()
        }
    }
}

impl<H: ShmSafe> io::Read for BufferReader<'_, H> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        // What `fill_buf` has shown is read first, even if it was deleted since.
        if let Some(piece) = self.pin.as_ref().and_then(|pin| pin.piece(self.position)) {
            let len = piece.len().min(into.len());
            into[..len].copy_from_slice(&piece[..len]);
            io::BufRead::consume(self, len);
            return Ok(len);
        }
        if !self.has_more() {
            return Ok(0);
        }
        let len = self.buffer.read_at(self.position, into)?;
        self.seek_to(self.position + len as u64);
        Ok(len)
    }
}

impl<H: ShmSafe> io::BufRead for BufferReader<'_, H> {
    /// The bytes where they lie: at most those of one chunk. They stay pinned until the reader goes on.
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let is_pinned = self
            .pin
            .as_ref()
            .is_some_and(|pin| pin.range.contains(&self.position));
        if !is_pinned {
            self.pin = None;
            if !self.has_more() {
                return Ok(&[]);
            }
            let chunk_bytes = self.buffer.chunk_bytes() as u64;
            let in_chunk = chunk_bytes - self.position % chunk_bytes;
            self.pin = Some(self.buffer.pin_from(self.position, in_chunk)?);
        }
        let pin = self.pin.as_ref();
        Ok(pin
            .and_then(|pin| pin.piece(self.position))
            .unwrap_or_default())
    }

    fn consume(&mut self, len: usize) {
        self.position += len as u64;
        if self
            .pin
            .as_ref()
            .is_some_and(|pin| pin.range.end <= self.position)
        {
            self.pin = None;
        }
    }
}

impl<H: ShmSafe> fmt::Debug for BufferReader<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferReader")
            .field("position", &self.position)
            .field("waits", &self.waits)
            .finish_non_exhaustive()
    }
}

//! A queue in shared memory, many to many, bounded or not: [`ShmQueue`].
//!
//! **Protocol.** Two ends, each with a lock and a position, in `ends`; the elements lie in segments between them. A push or pop
//! is committed by one store of a position. Who takes part can be enrolled (`enrolment`): then the queue closes when one side is gone.
//!
//! **Invariants.** Those of `ends`; and:
//! 1. A queue in the private memory of a process is used by that process only, not by the copies that its forked children have of it.
//! 2. The address of the first segment, the number of places, the heap and the header do not change.
//! 3. A queue whose segments are being freed with it says so (`ends`, invariant 7). Others find such a queue only after a death in the middle of an assignment,
//!    which drops the old one before it writes the new one: it can be replaced and dropped, is empty, and panics where something is to be pushed or popped.
//!
//! **If a process dies here.** The table in `ends`: no element that was pushed is lost or doubled, the order stays. What the dead one
//! was pushing is in the queue or not; what it was popping is in the queue or gone with it.
//!
//! # Safety
//!
//! Values are written to and read from places by the holder of the lock of an end (`ends`, invariant 2), or by the queue's only user while it
//! is dropped. The type says that values may be moved to other processes.

#![allow(unsafe_code)]

#[cfg(loom)]
#[allow(missing_docs, reason = "for models")]
pub mod ends;
#[cfg(not(loom))]
mod ends;
mod error;
mod segments;

pub use error::{PopError, PushError};

use super::Invariant;
use super::enrolment::{self, Closed, ClosedBy, EnrolError, Side, Watch};
#[allow(unused_imports, reason = "for links in the documentation")]
use crate::error::Error;
use crate::error::Result;
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use ends::{
    CLOSED_BY_CALL, CONSUMERS_GONE, Ends, Laps, NO_SEGMENTS, PRODUCERS_GONE, PopTurn, Walk,
};
use netmcore_sem::WaitWord;
use netmcore_sem::current::fork_epoch;
use netmcore_sys::crash_point;
use segments::Store;
use std::any::type_name;
use std::fmt;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::Deref;
use std::ptr;
use std::time::Instant;

/// A queue in shared memory: first in, first out, with any number of producers and consumers in any processes and threads.
///
/// It is made in a heap and lies there in place: put it into a [`ShmArc`](crate::ShmArc), or give it a name with
/// [`Heap::named`](crate::Heap::named). Elements lie in the heap as they are, and are moved in and out. `H` is a header of the user's, which lies beside.
///
/// *Bounded* (`bounded_in`): a push waits while the queue is full. *Unbounded* (`unbounded_in`): it takes memory as it grows.
///
/// **Who waits for whom.** Producers exclude each other for the moment of a push, consumers for that of a pop; a producer and a consumer do not meet.
/// One that is stopped (not dead) in the middle of a push stops the other producers.
///
/// **Closing.** [`close`](Self::close) does; and if it was said how many [producers](Self::producers) or [consumers](Self::consumers) there will be, the queue closes when
/// so many have been enrolled and all are gone, by leaving or by dying. Then nothing can be pushed any more, and what is in the queue can still be popped.
///
/// # If a process dies
///
/// In the middle of an operation: the others go on at once. Its push has happened or not; the element that it was popping is still in the
/// queue, or gone with it. No other element is lost, doubled or moved in the order. A segment of an unbounded queue may stay
/// allocated until the heap is gone. If the queue itself was being assigned, as a part of something in shared memory, it is the old one, perhaps
/// with the last of its elements only, the new one or none; being none it panics where something is pushed or popped, and may be assigned anew.
///
/// ```
/// use netmcore_shm::{Arena, Heap, PopError, ShmArc, ShmQueue};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let queue = ShmArc::new_in(&heap, ShmQueue::bounded_in(&heap, 100)?)?;
/// queue.push([1_u8, 2]).unwrap(); // in a forked child, for instance
/// queue.push([3, 4]).unwrap();
/// assert_eq!(queue.pop(), Ok([1, 2]));
/// queue.close();
/// assert_eq!(queue.pop(), Ok([3, 4]));
/// assert!(matches!(queue.pop(), Err(PopError::Closed(_))));
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[doc(alias = "Netmcore_queue")]
pub struct ShmQueue<T: ShmSafe, H = ()> {
    ends: Ends,
    producers: Side,
    consumers: Side,
    heap: HeapRef,
    mark: Mark,
    header: H,
    of: Invariant<(T, H)>,
}

// SAFETY: what it owns lies in shared memory; T and H may be moved.
unsafe impl<T: ShmSafe, H: Send> Send for ShmQueue<T, H> {}
// SAFETY: elements are looked at and moved by one thread at a time, under a lock of theirs; the header is shared as it is.
unsafe impl<T: ShmSafe, H: Sync> Sync for ShmQueue<T, H> {}

// SAFETY: addresses that mean the same wherever the heap is mapped; they are reported, and so are the header's. It may be dropped elsewhere: it loses its
// mark on the way into shared memory. The elements have been checked when they were pushed.
unsafe impl<T: ShmSafe, H: ShmSafe> ShmSafe for ShmQueue<T, H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        self.heap.visit_pointers(visit);
        if let Some(segment) = self.ends.some_segment() {
            visit(ptr::without_provenance(segment as usize));
        }
        self.producers.visit(visit);
        self.consumers.visit(visit);
        self.header.visit_pointers(visit);
    }
}

/// How long a caller is ready to wait.
#[derive(Clone, Copy)]
enum Patience {
    None,
    Until(Instant),
    Endless,
}

impl Patience {
    fn deadline(self) -> Option<Instant> {
        match self {
            Patience::Until(deadline) => Some(deadline),
            Patience::None | Patience::Endless => None,
        }
    }
}

/// How an attempt to push ended.
enum Pushed {
    Done,
    Full,
    Closed,
    NeedsSegment,
    /// Somebody held the end until the deadline.
    TooLate,
}

/// What a wait for an element or for room gave.
enum Woken<R> {
    Gained(R),
    Closed,
    /// Those who take part have changed: how to wait for them is asked anew.
    Changed,
}

impl<T: ShmSafe> ShmQueue<T> {
    /// Makes an empty queue for at most `capacity` elements, whose places are allocated at once.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`], [`Error::NoSpace`].
    ///
    /// # Panics
    ///
    /// If the capacity is 0, or more than 2^48, or no memory could be so large.
    #[doc(alias = "Netmcore_queue.create")]
    pub fn bounded_in(heap: impl Into<HeapRef>, capacity: usize) -> Result<ShmQueue<T>> {
        ShmQueue::bounded_with_header_in(heap, capacity, ())
    }

    /// Makes an empty queue that takes memory as it grows, and gives most of it back as it shrinks.
    ///
    /// # Errors
    ///
    /// As [`bounded_in`](Self::bounded_in).
    #[doc(alias = "Netmcore_queue.create")]
    pub fn unbounded_in(heap: impl Into<HeapRef>) -> Result<ShmQueue<T>> {
        ShmQueue::unbounded_with_header_in(heap, ())
    }

    /// Makes an unbounded queue of the elements.
    ///
    /// # Errors
    ///
    /// As [`bounded_in`](Self::bounded_in), and [`Error::ForeignPointer`] if an element points into another region.
    pub fn from_iter_in(
        heap: impl Into<HeapRef>,
        elements: impl IntoIterator<Item = T>,
    ) -> Result<ShmQueue<T>> {
        let queue = ShmQueue::unbounded_in(heap)?;
        for element in elements {
            if let Err(PushError::Refused { error, .. }) = queue.try_push(element) {
                return Err(error);
            }
        }
        Ok(queue)
    }
}

impl<T: ShmSafe, H: ShmSafe> ShmQueue<T, H> {
    /// As [`bounded_in`](ShmQueue::bounded_in), with a header.
    ///
    /// # Errors
    ///
    /// As there, and [`Error::ForeignPointer`] if the header points into another region.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn bounded_with_header_in(
        heap: impl Into<HeapRef>,
        capacity: usize,
        header: H,
    ) -> Result<ShmQueue<T, H>> {
        assert!(capacity > 0, "a queue of capacity 0 never has room");
        ShmQueue::make(heap.into(), Laps::ring(capacity as u64), header)
    }

    /// As [`unbounded_in`](ShmQueue::unbounded_in), with a header.
    ///
    /// # Errors
    ///
    /// As there, and [`Error::ForeignPointer`] if the header points into another region.
    pub fn unbounded_with_header_in(heap: impl Into<HeapRef>, header: H) -> Result<ShmQueue<T, H>> {
        let laps = Laps::chain(Store::<T>::places_of_segment());
        ShmQueue::make(heap.into(), laps, header)
    }

    fn make(heap: HeapRef, laps: Laps, header: H) -> Result<ShmQueue<T, H>> {
        heap.check(&header)?;
        let segment = Store::<T>::new(heap, laps).allocate()?;
        crash_point!("shm.queue.made");
        Ok(ShmQueue {
            ends: Ends::new(laps, segment),
            producers: Side::new(),
            consumers: Side::new(),
            heap,
            mark: Mark::here(),
            header,
            of: PhantomData,
        })
    }
}

impl<T: ShmSafe, H> ShmQueue<T, H> {
    /// What the queue was made with.
    #[doc(alias = "Netmcore_queue.header")]
    pub fn header(&self) -> &H {
        &self.header
    }

    /// The most elements that it can hold; `None` if it is unbounded.
    pub fn capacity(&self) -> Option<usize> {
        let laps = self.ends.laps();
        laps.is_ring().then_some(laps.per_lap() as usize)
    }

    /// How many elements are in it. True only of the moment at which it was read.
    #[doc(alias = "Netmcore_queue.length")]
    pub fn len(&self) -> usize {
        let len = self.ends.len() as usize;
        // Meanwhile something may have been popped and pushed.
        self.capacity().map_or(len, |capacity| len.min(capacity))
    }

    /// Whether it has no elements. True only of the moment at which it was read.
    #[doc(alias = "Netmcore_queue.is_empty")]
    pub fn is_empty(&self) -> bool {
        self.ends.looks_empty()
    }

    /// Appends the value; waits for room if the queue is bounded.
    ///
    /// # Errors
    ///
    /// [`PushError::Closed`]; [`PushError::Refused`] if the value points into another region, or there is no memory. The value comes back.
    ///
    /// # Panics
    ///
    /// If the queue lies in private memory of another process, of which this one is a fork.
    ///
    /// # If a process dies
    ///
    /// The value is in the queue, or gone with the process.
    ///
    /// # Blocking
    ///
    /// While the queue is full; while another one just pushes.
    #[inline]
    #[doc(alias = "Netmcore_queue.push")]
    pub fn push(&self, value: T) -> std::result::Result<(), PushError<T>> {
        self.push_patiently(value, Patience::Endless)
    }

    /// Appends the value if there is room.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and [`PushError::Full`].
    ///
    /// # Panics
    ///
    /// As [`push`](Self::push).
    ///
    /// # Blocking
    ///
    /// While another one just pushes.
    #[inline]
    pub fn try_push(&self, value: T) -> std::result::Result<(), PushError<T>> {
        self.push_patiently(value, Patience::None)
    }

    /// Appends the value; waits for room until the deadline at most.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and [`PushError::TimedOut`].
    ///
    /// # Panics
    ///
    /// As [`push`](Self::push).
    ///
    /// # Blocking
    ///
    /// As [`push`](Self::push), until the deadline.
    pub fn push_deadline(
        &self,
        value: T,
        deadline: Instant,
    ) -> std::result::Result<(), PushError<T>> {
        self.push_patiently(value, Patience::Until(deadline))
    }

    /// Pushes the elements one after the other; waits for room if the queue is bounded.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), with the first that was not pushed. Those before it were; those after it are still in the iterator, if it was given by
    /// reference.
    pub fn try_extend(
        &self,
        elements: impl IntoIterator<Item = T>,
    ) -> std::result::Result<(), PushError<T>> {
        elements
            .into_iter()
            .try_for_each(|element| self.push(element))
    }

    /// Appends as many of the elements as there is room for, at the price of one push for each segment: how many.
    ///
    /// Those that are pushed into one segment come into the queue at once: consumers see all of them or none. A bounded queue is one segment, which is used from
    /// its start again: those behind its end come as if into the next.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), without a value. Nothing has been pushed then.
    ///
    /// # Panics
    ///
    /// As [`push`](Self::push).
    ///
    /// # Blocking
    ///
    /// While another one just pushes.
    pub fn push_slice(&self, elements: &[T]) -> std::result::Result<usize, PushError<()>>
    where
        T: Copy,
    {
        self.refuse_copies();
        for element in elements {
            if let Err(error) = self.heap.check(element) {
                return Err(PushError::Refused { value: (), error });
            }
        }
        self.look_at_consumers(None);
        let store = self.store();
        let mut pushed = 0;
        while pushed < elements.len() {
            let rest = &elements[pushed..];
            // Without a deadline there is always a turn.
            let Some(mut turn) = self.ends.push_turn(None) else {
                break;
            };
            if turn.is_closed() {
                drop(turn);
                if pushed > 0 {
                    break;
                }
                let closed = self.closed_for(ClosedBy::ConsumersGone);
                return Err(PushError::Closed { value: (), closed });
            }
            let count = turn.room(rest.len() as u64);
            if count == 0 {
                break;
            }
            let Some(place) = turn.place(&store) else {
                drop(turn);
                match self.make_spare(&store) {
                    Ok(()) => continue,
                    Err(_) if pushed > 0 => break,
                    Err(error) => return Err(PushError::Refused { value: (), error }),
                }
            };
            // SAFETY: in bounds: so many places are left in the segment, and they are free; here and there: the push end is held; the source is
            // not in the segment's free places; gone: nothing there counts before the commit.
            unsafe {
                ptr::copy_nonoverlapping(rest.as_ptr(), store.at(place), count as usize);
            }
            crash_point!("shm.queue.batch_written");
            turn.commit(count);
            crash_point!("shm.queue.batch_pushed");
            drop(turn);
            self.ends.wake_all();
            pushed += count as usize;
        }
        Ok(pushed)
    }

    #[inline]
    fn push_patiently(
        &self,
        value: T,
        patience: Patience,
    ) -> std::result::Result<(), PushError<T>> {
        self.refuse_copies();
        if let Err(error) = self.heap.check(&value) {
            return Err(PushError::Refused { value, error });
        }
        // It belongs to the queue once it is pushed.
        let value = ManuallyDrop::new(value);
        if let Pushed::Done = self.push_once(&value, patience.deadline()) {
            return Ok(());
        }
        self.push_slowly(value, patience)
    }

    /// Moves the value into the queue if it says `Done`.
    #[inline]
    fn push_once(&self, value: &ManuallyDrop<T>, deadline: Option<Instant>) -> Pushed {
        self.look_at_consumers(deadline);
        let store = self.store();
        let Some(mut turn) = self.ends.push_turn(deadline) else {
            return Pushed::TooLate;
        };
        if turn.is_closed() {
            return Pushed::Closed;
        }
        if !turn.has_room() {
            return Pushed::Full;
        }
        let Some(place) = turn.place(&store) else {
            return Pushed::NeedsSegment;
        };
        if turn.has_room_ahead(Store::<T>::PLACES_AHEAD) {
            store.fetch_to_write(place);
        }
        // SAFETY: in bounds: a place of the segment, which is free; here and there: the push end is held; gone: what is written there does not
        // count before the commit.
        unsafe { ptr::copy_nonoverlapping(&raw const **value, store.at(place), 1) };
        crash_point!("shm.queue.written");
        turn.commit(1);
        crash_point!("shm.queue.pushed");
        drop(turn);
        crash_point!("shm.queue.pushed_before_wake");
        self.ends.wake_popper();
        Pushed::Done
    }

    #[cold]
    fn push_slowly(
        &self,
        value: ManuallyDrop<T>,
        patience: Patience,
    ) -> std::result::Result<(), PushError<T>> {
        let started = Instant::now();
        let store = self.store();
        let deadline = patience.deadline();
        loop {
            match self.push_once(&value, deadline) {
                Pushed::Done => return Ok(()),
                Pushed::Closed => {
                    let value = ManuallyDrop::into_inner(value);
                    let closed = self.closed_for(ClosedBy::ConsumersGone);
                    return Err(PushError::Closed { value, closed });
                }
                Pushed::NeedsSegment => {
                    if let Err(error) = self.make_spare(&store) {
                        let value = ManuallyDrop::into_inner(value);
                        return Err(PushError::Refused { value, error });
                    }
                }
                Pushed::Full => {
                    if let Patience::None = patience {
                        let value = ManuallyDrop::into_inner(value);
                        return Err(PushError::Full { value });
                    }
                    let gained = self.wait_for(self.ends.room(), &self.consumers, deadline, || {
                        (!self.ends.looks_full()).then_some(())
                    });
                    // Closed or with room: found out by the next attempt.
                    if gained.is_some() {
                        continue;
                    }
                    let value = ManuallyDrop::into_inner(value);
                    let waited = started.elapsed();
                    return Err(PushError::TimedOut { value, waited });
                }
                Pushed::TooLate => {
                    // It may have been woken for this room, which is another's now.
                    if !self.ends.looks_full() {
                        self.ends.room().notify_one();
                    }
                    let value = ManuallyDrop::into_inner(value);
                    let waited = started.elapsed();
                    return Err(PushError::TimedOut { value, waited });
                }
            }
        }
    }

    #[cold]
    fn make_spare(&self, store: &Store<T>) -> Result<()> {
        // Without a lock: to allocate may take a system call.
        let segment = store.allocate()?;
        crash_point!("shm.queue.segment_allocated");
        if let Err(segment) = self.ends.give_spare(segment) {
            ends::Segments::retire(store, segment);
        }
        Ok(())
    }

    /// Takes the first element; waits for one.
    ///
    /// # Errors
    ///
    /// [`PopError::Closed`] if the queue is empty and closed: nothing will come.
    ///
    /// # Panics
    ///
    /// If the queue lies in private memory of another process, of which this one is a fork. If this thread holds the queue [pinned](Self::pinned).
    ///
    /// # If a process dies
    ///
    /// The element is still in the queue, as the first, or gone with the process.
    ///
    /// # Blocking
    ///
    /// While the queue is empty; while another one just pops, or looks at the elements.
    #[inline]
    #[doc(alias = "Netmcore_queue.pop_p")]
    #[doc(alias = "Netmcore_queue.pop_c")]
    pub fn pop(&self) -> std::result::Result<T, PopError> {
        self.pop_patiently(Patience::Endless)
    }

    /// Takes the first element if there is one.
    ///
    /// # Errors
    ///
    /// As [`pop`](Self::pop), and [`PopError::Empty`].
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # Blocking
    ///
    /// While another one just pops, or looks at the elements.
    #[inline]
    pub fn try_pop(&self) -> std::result::Result<T, PopError> {
        self.pop_patiently(Patience::None)
    }

    /// Takes the first element; waits for one until the deadline at most.
    ///
    /// # Errors
    ///
    /// As [`pop`](Self::pop), and [`PopError::TimedOut`].
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # Blocking
    ///
    /// As [`pop`](Self::pop), until the deadline.
    pub fn pop_deadline(&self, deadline: Instant) -> std::result::Result<T, PopError> {
        self.pop_patiently(Patience::Until(deadline))
    }

    /// Takes up to `limit` elements that are there, appends them to `to`, and says how many; at the price of one pop for each segment.
    ///
    /// # Errors
    ///
    /// As [`try_pop`](Self::try_pop), if there is none.
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # If a process dies
    ///
    /// Those of one segment are all still in the queue, or all gone with the process.
    ///
    /// # Blocking
    ///
    /// As [`try_pop`](Self::try_pop).
    pub fn pop_many(&self, limit: usize, to: &mut Vec<T>) -> std::result::Result<usize, PopError> {
        self.refuse_copies();
        let mut popped = self.pop_those_there(limit, to);
        let mut closed = 0;
        if popped == 0 && limit > 0 {
            closed = self.closed_without_waiting();
            if closed != 0 {
                // What was pushed before it was closed.
                popped = self.pop_those_there(limit, to);
            }
        }
        match popped {
            0 if closed != 0 => Err(PopError::Closed(self.closed_for(ClosedBy::ProducersGone))),
            0 if limit > 0 => Err(PopError::Empty),
            _ => Ok(popped),
        }
    }

    fn pop_those_there(&self, limit: usize, to: &mut Vec<T>) -> usize {
        let store = self.store();
        let mut popped = 0;
        while popped < limit {
            // No allocation while the end is held.
            to.reserve((limit - popped).min(self.len().max(1)));
            // Without a deadline there is always a turn.
            let Some(mut turn) = self.ends.pop_turn(None) else {
                break;
            };
            let space = (to.capacity() - to.len()).min(limit - popped);
            let count = turn.items(space as u64) as usize;
            if count == 0 {
                break;
            }
            // SAFETY: in bounds: so many elements lie there, in one segment, and `to` has room for them; here and there: the pop end is held;
            // gone: if we die before the commit, our copies are nobody's.
            unsafe {
                let behind = to.as_mut_ptr().add(to.len());
                ptr::copy_nonoverlapping(store.at(turn.place(&store)), behind, count);
            }
            crash_point!("shm.queue.batch_read");
            turn.commit(count as u64);
            // SAFETY: they were copied there, and are not the queue's any more.
            unsafe { to.set_len(to.len() + count) };
            crash_point!("shm.queue.batch_popped");
            drop(turn);
            self.ends.wake_all();
            popped += count;
        }
        popped
    }

    /// Takes the elements that are there, one after the other, until there is none.
    ///
    /// Those that are not asked for stay in the queue.
    pub fn drain(&self) -> Drain<'_, T, H> {
        Drain { queue: self }
    }

    /// Removes the elements that are in the queue now, and drops them.
    ///
    /// # Blocking
    ///
    /// As [`try_pop`](Self::try_pop).
    #[doc(alias = "Netmcore_queue.clear")]
    pub fn clear(&self) {
        for _ in 0..self.len() {
            // Dropped without the lock: it may panic, or use the queue.
            if self.try_pop().is_err() {
                return;
            }
        }
    }

    #[inline]
    fn pop_patiently(&self, patience: Patience) -> std::result::Result<T, PopError> {
        self.refuse_copies();
        if let Some(value) = self.pop_once(patience.deadline()) {
            return Ok(value);
        }
        self.pop_slowly(patience)
    }

    #[inline]
    fn pop_once(&self, deadline: Option<Instant>) -> Option<T> {
        let mut turn = self.ends.pop_turn(deadline)?;
        if !turn.has_item() {
            return None;
        }
        let store = self.store();
        let place = turn.place(&store);
        if turn.has_item_ahead(Store::<T>::PLACES_AHEAD) {
            store.fetch_to_read(place);
        }
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: in bounds: an element lies there; here and there: the pop end is held; gone: if we die before the commit, our copy is
        // nobody's.
        unsafe {
            ptr::copy_nonoverlapping(store.at(place), value.as_mut_ptr(), 1);
        }
        crash_point!("shm.queue.read");
        turn.commit(1);
        crash_point!("shm.queue.popped");
        drop(turn);
        crash_point!("shm.queue.popped_before_wake");
        self.ends.wake_pusher();
        // SAFETY: it was copied there, and is not the queue's any more.
        Some(unsafe { value.assume_init() })
    }

    #[cold]
    fn pop_slowly(&self, patience: Patience) -> std::result::Result<T, PopError> {
        let started = Instant::now();
        let deadline = patience.deadline();
        if let Patience::None = patience {
            if self.closed_without_waiting() == 0 {
                return Err(PopError::Empty);
            }
            // What was pushed before it was closed.
            let value = self.pop_once(None);
            return value.ok_or_else(|| PopError::Closed(self.closed_for(ClosedBy::ProducersGone)));
        }
        loop {
            let gained = self.wait_for(self.ends.items(), &self.producers, deadline, || {
                if self.ends.looks_empty() {
                    return None;
                }
                self.pop_once(deadline)
            });
            match gained {
                Some(Woken::Gained(value)) => return Ok(value),
                Some(Woken::Changed) => {}
                Some(Woken::Closed) => {
                    // What was pushed before it was closed.
                    if let Some(value) = self.pop_once(deadline) {
                        return Ok(value);
                    }
                    if self.ends.looks_empty() {
                        let closed = self.closed_for(ClosedBy::ProducersGone);
                        return Err(PopError::Closed(closed));
                    }
                    // Somebody else holds the end.
                    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                        let waited = started.elapsed();
                        return Err(PopError::TimedOut { waited });
                    }
                }
                None => {
                    // Somebody held the end until the deadline: it may have been woken for this element, which is another's now.
                    if !self.ends.looks_empty() {
                        self.ends.items().notify_one();
                    }
                    let waited = started.elapsed();
                    return Err(PopError::TimedOut { waited });
                }
            }
        }
    }

    /// Why the queue is closed, 0 if it is not; looks whether the producers are gone, now and then.
    fn closed_without_waiting(&self) -> u32 {
        if self.producers.has_roll() && self.producers.is_look_due() {
            // If somebody just pushes, it is not closed yet.
            self.close_if_gone(Some(Instant::now()));
        }
        self.ends.closed()
    }

    /// Closes the queue if the consumers are gone; looks for that now and then.
    #[inline]
    fn look_at_consumers(&self, deadline: Option<Instant>) {
        if self.consumers.has_roll() && self.consumers.is_look_due() {
            self.close_if_gone(deadline);
        }
    }

    /// Waits until the attempt gives something, the queue is closed, or the deadline comes. Looks meanwhile whether those on the `peers`' side
    /// are gone.
    fn wait_for<R>(
        &self,
        word: &WaitWord,
        peers: &Side,
        deadline: Option<Instant>,
        mut attempt: impl FnMut() -> Option<R>,
    ) -> Option<Woken<R>> {
        let changes = peers.changes();
        let recheck = enrolment::recheck(peers.roll());
        let mut watch = None;
        word.wait(
            &netmcore_sem::Current,
            recheck,
            deadline.map(Into::into),
            || {
                if let Some(gained) = attempt() {
                    return Some(Woken::Gained(gained));
                }
                if self.ends.closed() != 0 {
                    return Some(Woken::Closed);
                }
                if peers.changes() != changes {
                    return Some(Woken::Changed);
                }
                if peers.has_roll()
                    && watch.get_or_insert_with(|| Watch::new(peers)).is_due(peers)
                    && self.close_if_gone(deadline) != 0
                {
                    return Some(Woken::Closed);
                }
                None
            },
        )
    }

    /// Calls `look` with the first element, if there is one; it stays in the queue.
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # Blocking
    ///
    /// As [`try_pop`](Self::try_pop). Meanwhile others cannot pop.
    #[doc(alias = "Netmcore_queue.top_p")]
    #[doc(alias = "Netmcore_queue.top_c")]
    pub fn peek<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        self.pinned().iter().next().map(look)
    }

    /// Calls `each` with every element, first to last; they stay in the queue.
    ///
    /// It is the queue at one moment, but that pushes go on: what is pushed meanwhile is not shown.
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # Blocking
    ///
    /// As [`peek`](Self::peek).
    #[doc(alias = "Netmcore_queue.iter")]
    pub fn for_each(&self, each: impl FnMut(&T)) {
        self.pinned().iter().for_each(each);
    }

    /// Calls `step` with the result so far and every element, first to last; they stay in the queue. As [`for_each`](Self::for_each).
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # Blocking
    ///
    /// As [`peek`](Self::peek).
    #[doc(alias = "Netmcore_queue.fold")]
    pub fn fold<R>(&self, start: R, step: impl FnMut(R, &T) -> R) -> R {
        self.pinned().iter().fold(start, step)
    }

    /// Copies of the elements, first to last. As [`for_each`](Self::for_each).
    pub fn to_vec(&self) -> Vec<T>
    where
        T: Clone,
    {
        self.pinned().iter().cloned().collect()
    }

    /// Keeps all elements where they are while the guard lives, for looking at them.
    ///
    /// # Panics
    ///
    /// As [`pop`](Self::pop).
    ///
    /// # If a process dies
    ///
    /// Having it pinned: the others go on.
    ///
    /// # Blocking
    ///
    /// As [`peek`](Self::peek).
    ///
    /// # Example
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, ShmQueue};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let queue = ShmQueue::from_iter_in(&heap, [1, 2, 3])?;
    /// let pinned = queue.pinned();
    /// queue.push(4).unwrap(); // pushing goes on
    /// assert_eq!(pinned.iter().sum::<i32>(), 10);
    /// drop(pinned);
    /// assert_eq!(queue.pop(), Ok(1));
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn pinned(&self) -> Pinned<'_, T, H> {
        self.refuse_copies();
        let turn = self.ends.pop_turn(None);
        Pinned {
            queue: self,
            turn: turn.expect("without a deadline there is always a turn"),
            epoch: fork_epoch(),
        }
    }

    /// Closes the queue: nothing can be pushed any more. What is in it can still be popped; then poppers are told [`PopError::Closed`].
    ///
    /// # Panics
    ///
    /// As [`push`](Self::push).
    ///
    /// # Blocking
    ///
    /// While another one just pushes.
    pub fn close(&self) {
        self.refuse_copies();
        // Without a deadline there is always a turn.
        self.ends.close_if(CLOSED_BY_CALL, None, || true);
    }

    /// Why the queue is closed, if it is. It does not look whether somebody is gone since.
    pub fn closed(&self) -> Option<Closed> {
        (self.ends.closed() != 0).then(|| self.closed_for(ClosedBy::ProducersGone))
    }

    /// Says how many producers there will be: when so many have been [enrolled](Self::producer) and all are gone, the queue closes.
    ///
    /// # Errors
    ///
    /// [`EnrolError::ToldOtherwise`] if another number was said before; [`EnrolError::Memory`].
    ///
    /// # Panics
    ///
    /// If `count` is 0, or no memory could hold so many places.
    ///
    /// # Blocking
    ///
    /// While another one just pushes.
    pub fn producers(&self, count: usize) -> std::result::Result<(), EnrolError> {
        self.tell(&self.producers, count)
    }

    /// Says how many consumers there will be: when so many have been [enrolled](Self::consumer) and all are gone, the queue closes: pushes fail.
    ///
    /// # Errors
    ///
    /// As [`producers`](Self::producers).
    ///
    /// # Panics
    ///
    /// As [`producers`](Self::producers).
    ///
    /// # Blocking
    ///
    /// As [`producers`](Self::producers).
    pub fn consumers(&self, count: usize) -> std::result::Result<(), EnrolError> {
        self.tell(&self.consumers, count)
    }

    /// Enrols the calling thread as one of the [producers](Self::producers), until the guard is dropped or the thread is dead.
    ///
    /// If all places are taken, the place of one that died is given to the new one.
    ///
    /// # Errors
    ///
    /// [`EnrolError::NotTold`], [`EnrolError::TooMany`], [`EnrolError::Closed`].
    ///
    /// # Example
    ///
    /// ```
    /// # use netmcore_shm::{Arena, ClosedBy, Heap, PopError, ShmQueue};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let queue = ShmQueue::bounded_in(&heap, 10)?;
    /// queue.producers(1).unwrap();
    /// let producer = queue.producer().unwrap();
    /// producer.push(7).unwrap();
    /// drop(producer);
    /// assert_eq!(queue.pop(), Ok(7));
    /// match queue.pop() {
    ///     Err(PopError::Closed(closed)) => {
    ///         assert_eq!(closed.by, ClosedBy::ProducersGone);
    ///         assert_eq!((closed.ended_count, closed.died.len()), (1, 0));
    ///     }
    ///     other => panic!("{other:?}"),
    /// }
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    pub fn producer(&self) -> std::result::Result<Producer<'_, T, H>, EnrolError> {
        let seat = self.enrol(&self.producers)?;
        Ok(Producer { seat })
    }

    /// Enrols the calling thread as one of the [consumers](Self::consumers), as [`producer`](Self::producer) does; also when no producer is left, since there may be
    /// something to pop.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn consumer(&self) -> std::result::Result<Consumer<'_, T, H>, EnrolError> {
        let seat = self.enrol(&self.consumers)?;
        Ok(Consumer { seat })
    }

    fn tell(&self, side: &Side, count: usize) -> std::result::Result<(), EnrolError> {
        assert!(count > 0, "a queue that 0 are to use");
        self.refuse_copies();
        let turn = self.ends.push_turn(None);
        let told = side.tell(self.heap, count)?;
        drop(turn);
        if told {
            // Who waits must look for deaths now.
            side.note_change();
            self.ends.wake_all();
            Ok(())
        } else {
            Err(EnrolError::ToldOtherwise {
                expected: side.roll().len(),
                said: count,
            })
        }
    }

    fn enrol<'a>(&'a self, side: &'a Side) -> std::result::Result<Seat<'a, T, H>, EnrolError> {
        self.refuse_copies();
        if !side.has_roll() {
            return Err(EnrolError::NotTold);
        }
        self.close_if_gone(None);
        // Who comes late may still pop what is there, unless the side has gone for good.
        let (refused_by, reason) = match ptr::eq(side, &self.consumers) {
            true => (CONSUMERS_GONE, ClosedBy::ConsumersGone),
            false => (u32::MAX, ClosedBy::ProducersGone),
        };
        let turn = self.ends.push_turn(None);
        if self.ends.closed() & refused_by != 0 {
            drop(turn);
            return Err(EnrolError::Closed(self.closed_for(reason)));
        }
        let number = enrolment::enrol(side.roll());
        drop(turn);
        let number = number.ok_or(EnrolError::TooMany {
            expected: side.roll().len(),
        })?;
        crash_point!("shm.queue.enrolled");
        side.note_change();
        self.ends.wake_all();
        Ok(Seat {
            queue: self,
            side,
            number,
            epoch: fork_epoch(),
            not_send: PhantomData,
        })
    }

    /// Closes the queue if one side is gone, and if nobody pushes until the deadline; says why it is closed, 0 if it is not.
    #[cold]
    fn close_if_gone(&self, deadline: Option<Instant>) -> u32 {
        for (why, side) in [
            (PRODUCERS_GONE, &self.producers),
            (CONSUMERS_GONE, &self.consumers),
        ] {
            let is_gone = || side.has_roll() && enrolment::are_all_gone(side.roll());
            if self.ends.closed() & why == 0 && is_gone() {
                self.ends.close_if(why, deadline, is_gone);
            }
        }
        self.ends.closed()
    }

    /// What to tell of a closed queue, preferably that `side` is gone.
    #[cold]
    fn closed_for(&self, side: ClosedBy) -> Closed {
        let why = self.ends.closed();
        // Invariant 3.
        assert!(
            why & NO_SEGMENTS == 0,
            "this ShmQueue of {} has no elements any more: a process died while it put another one in its place",
            type_name::<T>()
        );
        let is = |by| match by {
            ClosedBy::Call => why & CLOSED_BY_CALL != 0,
            ClosedBy::ProducersGone => why & PRODUCERS_GONE != 0,
            ClosedBy::ConsumersGone => why & CONSUMERS_GONE != 0,
        };
        let all = [
            side,
            ClosedBy::ProducersGone,
            ClosedBy::ConsumersGone,
            ClosedBy::Call,
        ];
        let by = all.into_iter().find(|&by| is(by)).unwrap_or(ClosedBy::Call);
        let (ended_count, died) = match by {
            ClosedBy::Call => (0, Vec::new()),
            ClosedBy::ProducersGone => enrolment::account(self.producers.roll()),
            ClosedBy::ConsumersGone => enrolment::account(self.consumers.roll()),
        };
        Closed {
            by,
            ended_count,
            died,
        }
    }

    #[inline]
    fn store(&self) -> Store<T> {
        Store::new(self.heap, self.ends.laps())
    }

    /// Invariant 1.
    #[inline]
    fn refuse_copies(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "a queue in private memory was copied by fork: put it into a ShmArc, or give it a name, before forking"
        );
    }
}

impl<T: ShmSafe, H> Drop for ShmQueue<T, H> {
    /// Drops the elements and frees all memory.
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        self.ends.forget_holders();
        let rest = Rest(self);
        while let Some(element) = rest.0.pop_once(None) {
            drop(element);
        }
    }
}

/// Goes on with dropping if the drop of an element panics.
struct Rest<'a, T: ShmSafe, H>(&'a mut ShmQueue<T, H>);

impl<T: ShmSafe, H> Drop for Rest<'_, T, H> {
    fn drop(&mut self) {
        while let Some(element) = self.0.pop_once(None) {
            drop(element);
        }
        let (heap, store) = (self.0.heap, self.0.store());
        self.0.ends.retire_all(&store);
        self.0.producers.free(heap);
        self.0.consumers.free(heap);
    }
}

impl<T: ShmSafe, H: fmt::Debug> fmt::Debug for ShmQueue<T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmQueue")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .field("header", &self.header)
            .field("is_closed", &(self.ends.closed() != 0))
            .finish_non_exhaustive()
    }
}

/// The elements of a queue, which stay where they are while this lives; from [`ShmQueue::pinned`].
#[must_use = "the elements are free to go when it is dropped"]
pub struct Pinned<'a, T: ShmSafe, H = ()> {
    queue: &'a ShmQueue<T, H>,
    turn: PopTurn<'a>,
    /// Tells the one that pins from its forked copies.
    epoch: u64,
}

impl<T: ShmSafe, H> Pinned<'_, T, H> {
    /// The elements that are there now, first to last.
    ///
    /// # Panics
    ///
    /// In a forked child, if this is a copy: it pins nothing.
    pub fn iter(&self) -> Iter<'_, T> {
        assert!(
            self.epoch == fork_epoch(),
            "the elements are pinned by another process, of which this one is a fork"
        );
        Iter {
            walk: self.turn.walk(),
            store: self.queue.store(),
            of: PhantomData,
        }
    }

    /// The first one.
    ///
    /// # Panics
    ///
    /// As [`iter`](Self::iter).
    pub fn first(&self) -> Option<&T> {
        self.iter().next()
    }
}

impl<'a, T: ShmSafe, H> IntoIterator for &'a Pinned<'_, T, H> {
    type Item = &'a T;
    type IntoIter = Iter<'a, T>;

    fn into_iter(self) -> Iter<'a, T> {
        self.iter()
    }
}

impl<T: ShmSafe + fmt::Debug, H> fmt::Debug for Pinned<'_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

/// The elements of a pinned queue, first to last.
pub struct Iter<'a, T> {
    walk: Walk<'a>,
    store: Store<T>,
    of: PhantomData<&'a T>,
}

impl<'a, T> Iterator for Iter<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        let place = self.walk.next(&self.store)?;
        // SAFETY: in bounds: an element lies there; here and there: the pop end is held for 'a, and nobody else touches it (`ends`, invariant 2);
        // gone: a pusher that dies does not touch it either.
        Some(unsafe { &*self.store.at(place) })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = self.walk.len() as usize;
        (len, Some(len))
    }
}

impl<T> ExactSizeIterator for Iter<'_, T> {}

/// Takes what is in a queue; from [`ShmQueue::drain`].
pub struct Drain<'a, T: ShmSafe, H = ()> {
    queue: &'a ShmQueue<T, H>,
}

impl<T: ShmSafe, H> Iterator for Drain<'_, T, H> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.queue.try_pop().ok()
    }
}

/// A place on a roll.
struct Seat<'a, T: ShmSafe, H> {
    queue: &'a ShmQueue<T, H>,
    side: &'a Side,
    number: usize,
    /// Tells the one that was enrolled from its forked copies.
    epoch: u64,
    /// It is the thread that is enrolled.
    not_send: PhantomData<*const ()>,
}

impl<T: ShmSafe, H> Drop for Seat<'_, T, H> {
    fn drop(&mut self) {
        if self.epoch != fork_epoch() {
            return;
        }
        enrolment::leave(&self.side.roll()[self.number]);
        crash_point!("shm.queue.left");
        self.side.note_change();
        if self.queue.close_if_gone(None) == 0 {
            self.queue.ends.wake_all();
        }
    }
}

macro_rules! seats {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// It stands for the thread that was enrolled, which leaves in order when this is dropped. A forked child's copy does nothing.
            /// Everything else is the [`ShmQueue`]'s.
            #[must_use = "who drops it leaves the queue"]
            pub struct $name<'a, T: ShmSafe, H = ()> {
                seat: Seat<'a, T, H>,
            }

            impl<T: ShmSafe, H> Deref for $name<'_, T, H> {
                type Target = ShmQueue<T, H>;

                fn deref(&self) -> &ShmQueue<T, H> {
                    self.seat.queue
                }
            }

            impl<T: ShmSafe, H> fmt::Debug for $name<'_, T, H> {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.debug_struct(stringify!($name)).field("number", &self.seat.number).finish_non_exhaustive()
                }
            }
        )*
    };
}

seats! {
    /// One of the producers of a queue; from [`ShmQueue::producer`].
    Producer;
    /// One of the consumers of a queue; from [`ShmQueue::consumer`].
    Consumer;
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Arena, Heap};
    use std::sync::mpsc;
    use std::time::Duration;

    /// As when a process is stopped in the middle of a push, and all who are enrolled are gone.
    #[test]
    fn deadlines_hold_while_another_pushes() {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 8 << 20).unwrap();
        let queue = ShmQueue::bounded_in(&heap, 4).unwrap();
        queue.producers(1).unwrap();
        queue.consumers(1).unwrap();
        std::thread::scope(|scope| {
            let mortal = scope.spawn(|| {
                std::mem::forget(queue.producer().unwrap());
                std::mem::forget(queue.consumer().unwrap());
            });
            mortal.join().unwrap();
            let turn = queue.ends.push_turn(None);
            let (tell, hear) = mpsc::channel();
            let queue = &queue;
            scope.spawn(move || {
                let soon = || Instant::now() + Duration::from_millis(20);
                let (pushed, popped) = (queue.push_deadline(7, soon()), queue.pop_deadline(soon()));
                tell.send((pushed, popped, queue.try_pop())).unwrap();
            });
            let told = hear.recv_timeout(Duration::from_secs(60));
            drop(turn);
            match told.expect("it waits for the one that pushes") {
                (
                    Err(PushError::TimedOut { value: 7, .. }),
                    Err(PopError::TimedOut { .. }),
                    Err(PopError::Empty),
                ) => {}
                other => panic!("{other:?}"),
            }
        });
    }
}

//! A mailbox in shared memory, many to one, whose messages are read in place: [`Mailbox`].
//!
//! **Protocol.** A fixed number of slots, each for one message, whose states are told in `slots`. One thread is the receiver:
//!
//! | receiver's word | means | that one died |
//! |---|---|---|
//! | 0 | there is none now; senders go on while there is room | – |
//! | owner | that one receives | senders are told; the next to ask is the receiver, by CAS |
//! | owner, ended | it has ended; senders are told | – ; the next to ask is the receiver |
//!
//! Senders can be enrolled (`enrolment`); then the mailbox closes when all are gone.
//!
//! **Invariants.** Those of `slots`; and:
//! 1. Only the thread that the receiver's word names receives, through the one [`MailboxReceiver`] that it was given.
//! 2. A mailbox in the private memory of a process is used by that process only, not by the copies that its forked children have of it.
//! 3. The block's address is null once the mailbox is being dropped. Others find such a mailbox only after a death in the middle of an assignment,
//!    which drops the old one before it writes the new one: it can be replaced and dropped, and panics where it is used.
//!
//! **If a process dies here.** A message that was being sent has arrived or not. One that was being read stays, and the next receiver reads it again. One that was being
//! taken is there or gone with the one that took it. One that was being dropped may be lost with what it owns.
//!
//! # Safety
//!
//! Messages are written by those that a slot's word names, and read by the one receiver (`slots`, invariant 1).

#![allow(unsafe_code)]

mod error;
#[cfg(loom)]
#[allow(missing_docs, reason = "for models")]
pub mod slots;
#[cfg(not(loom))]
mod slots;

pub use error::{HasReceiver, RecvError, SendError};

use super::Invariant;
use super::enrolment::{self, Closed, ClosedBy, EnrolError, Side, Watch, owner_of, word_of};
use crate::error::Result;
use crate::heap::HeapRef;
use crate::mark::Mark;
use crate::safe::ShmSafe;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use netmcore_sem::current::{Holding, fork_epoch};
use netmcore_sem::{Current, LockGuard, LockWord, OwnerId, Owners, WaitWord};
use netmcore_sys::crash_point;
use slots::{Arrived, Slots, hint_words};
use std::alloc::Layout;
use std::any::type_name;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit, needs_drop};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicPtr;
use std::time::Instant;

const CLOSED_BY_CALL: u32 = 1;
const SENDERS_GONE: u32 = 2;

/// The receiver has ended in order.
const ENDED: u64 = 1 << 31;

/// A mailbox in shared memory: any number of senders, one receiver, and a fixed number of slots in which messages lie and are read.
///
/// It is made in a heap and lies there in place: put it into a [`ShmArc`](crate::ShmArc), or give it a name with
/// [`Heap::named`](crate::Heap::named). `H` is a header of the user's.
///
/// A message is written once, into its slot, and read there: a [`Message`] is a reference to it, and frees the slot when it is dropped. So large messages
/// are copied once, or not at all if they are [made in place](Self::send_with). Messages can be freed in any order; each sender's arrive in the order in which it sent
/// them.
///
/// # If a process dies
///
/// The message that it was sending has arrived or not, and its slot is free for others. The messages that the receiver was reading are there for the next
/// one. No other message is lost, doubled or moved in the order. If the mailbox itself was being assigned, as a part of something in shared memory, it is the old one, the
/// new one or none; being none it panics where it is used, and may be assigned anew.
///
/// ```
/// use netmcore_shm::{Arena, Heap, Mailbox, ShmArc};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let mailbox = ShmArc::new_in(&heap, Mailbox::new_in(&heap, 8)?)?;
/// mailbox.send([1_u8; 1000]).unwrap(); // in a forked child, for instance
/// let receiver = mailbox.receiver().unwrap();
/// let message = receiver.recv().unwrap();
/// assert_eq!(message[999], 1);
/// drop(message); // its slot is free
/// assert!(receiver.try_recv().is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[doc(alias = "Netmcore_camlbox")]
pub struct Mailbox<T: ShmSafe, H = ()> {
    /// Where the receiver sleeps.
    arrivals: WaitWord,
    /// Where senders sleep.
    room: WaitWord,
    next_number: AtomicU64,
    receiver: AtomicU64,
    /// The receiver's word, when somebody has seen that it is dead.
    dead_receiver: AtomicU64,
    closed: AtomicU32,
    /// Whether slots may be free that no hint tells of: somebody has died, and not all were looked at since. 0 or 1.
    unswept: AtomicU32,
    /// Held to enrol, and to close because all are gone.
    roll_lock: LockWord,
    senders: Side,
    /// No roll: it counts the changes of the receiver.
    receiving: Side,
    heap: HeapRef,
    /// Words, hints, hints, messages.
    block: AtomicPtr<u8>,
    slot_count: usize,
    /// Where in the block the messages begin.
    messages_at: usize,
    mark: Mark,
    header: H,
    of: Invariant<(T, H)>,
}

// SAFETY: what it owns lies in shared memory; T and H may be moved.
unsafe impl<T: ShmSafe, H: Send> Send for Mailbox<T, H> {}
// SAFETY: messages are touched by one thread at a time; the header is shared as it is.
unsafe impl<T: ShmSafe, H: Sync> Sync for Mailbox<T, H> {}

// SAFETY: addresses that mean the same wherever the heap is mapped; they are reported, and so are the header's. It may be dropped elsewhere: it loses its
// mark on the way into shared memory. The messages have been checked when they were sent.
unsafe impl<T: ShmSafe, H: ShmSafe> ShmSafe for Mailbox<T, H> {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.mark.goes_into_shared_memory();
        self.heap.visit_pointers(visit);
        let block = self.block.load(Ordering::Relaxed);
        if !block.is_null() {
            visit(block);
        }
        self.senders.visit(visit);
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

/// Why there was no slot.
enum NoSlot {
    Full,
    Closed(Closed),
    ReceiverDied(OwnerId),
}

/// What a wait for a slot gave.
enum Waited {
    Slot(usize),
    No(NoSlot),
    Changed,
}

impl<T: ShmSafe> Mailbox<T> {
    /// Makes a mailbox of so many slots, whose memory is allocated at once.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfPoolMemory`](crate::Error::OutOfPoolMemory), [`Error::NoSpace`](crate::Error::NoSpace).
    ///
    /// # Panics
    ///
    /// If there are to be no slots, or no memory could be so large.
    #[doc(alias = "Netmcore_camlbox.create_camlbox")]
    pub fn new_in(heap: impl Into<HeapRef>, slots: usize) -> Result<Mailbox<T>> {
        Mailbox::with_header_in(heap, slots, ())
    }
}

impl<T: ShmSafe, H: ShmSafe> Mailbox<T, H> {
    /// As [`new_in`](Mailbox::new_in), with a header.
    ///
    /// # Errors
    ///
    /// As there, and [`Error::ForeignPointer`](crate::Error::ForeignPointer) if the header points into another region.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn with_header_in(
        heap: impl Into<HeapRef>,
        slots: usize,
        header: H,
    ) -> Result<Mailbox<T, H>> {
        assert!(slots > 0, "a mailbox without slots takes no message");
        let heap = heap.into();
        heap.check(&header)?;
        let (layout, messages_at) = Self::layout(slots);
        let block = heap.allocate(layout)?;
        // SAFETY: in bounds; zeros are what the words and hints begin with; nobody else knows of the block.
        unsafe { block.write_bytes(0, messages_at) };
        crash_point!("shm.mailbox.made");
        let mailbox = Mailbox {
            arrivals: WaitWord::new(),
            room: WaitWord::new(),
            next_number: AtomicU64::new(0),
            receiver: AtomicU64::new(0),
            dead_receiver: AtomicU64::new(0),
            closed: AtomicU32::new(0),
            unswept: AtomicU32::new(0),
            roll_lock: LockWord::new(),
            senders: Side::new(),
            receiving: Side::new(),
            heap,
            block: AtomicPtr::new(block.as_ptr()),
            slot_count: slots,
            messages_at,
            mark: Mark::here(),
            header,
            of: PhantomData,
        };
        mailbox.slots().hint_all_free();
        Ok(mailbox)
    }
}

impl<T: ShmSafe, H> Mailbox<T, H> {
    /// The block's layout, and where in it the messages begin.
    fn layout(slots: usize) -> (Layout, usize) {
        let words = slots.checked_add(2 * hint_words(slots));
        words
            .and_then(|words| Layout::array::<u64>(words).ok())
            .and_then(|words| words.align_to(64).ok())
            .map(|words| words.pad_to_align())
            .and_then(|words| words.extend(Layout::array::<T>(slots).ok()?).ok())
            .expect("the slots of a mailbox are larger than any memory")
    }

    #[inline]
    fn slots(&self) -> Slots<'_> {
        let Some(block) = NonNull::new(self.block.load(Ordering::Relaxed)) else {
            no_slots(type_name::<T>());
        };
        // SAFETY: it is freed with the mailbox, which is borrowed.
        unsafe { self.slots_in(block) }
    }

    /// # Safety
    ///
    /// - It is the mailbox's block, and not freed while it is borrowed.
    #[inline]
    unsafe fn slots_in(&self, block: NonNull<u8>) -> Slots<'_> {
        let words = block.cast::<AtomicU64>();
        let hints = hint_words(self.slot_count);
        // SAFETY: in bounds: the layout begins with them; here and there: atomics, zeroed before the mailbox was anybody's; gone: the caller's duty.
        unsafe {
            let words = words.as_ptr();
            let arrived = words.add(self.slot_count);
            Slots {
                words: std::slice::from_raw_parts(words, self.slot_count),
                arrived: std::slice::from_raw_parts(arrived, hints),
                free: std::slice::from_raw_parts(arrived.add(hints), hints),
                next_number: &self.next_number,
            }
        }
    }

    /// Where the slot's message lies. Who has a slot has found the block there.
    #[inline]
    fn at(&self, slot: usize) -> *mut T {
        self.at_in(self.block.load(Ordering::Relaxed), slot)
    }

    #[inline]
    fn at_in(&self, block: *mut u8, slot: usize) -> *mut T {
        let messages = block.wrapping_add(self.messages_at);
        messages.cast::<T>().wrapping_add(slot)
    }

    /// What the mailbox was made with.
    pub fn header(&self) -> &H {
        &self.header
    }

    /// How many messages it can hold.
    #[doc(alias = "Netmcore_camlbox.camlbox_capacity")]
    pub fn capacity(&self) -> usize {
        self.slot_count
    }

    /// How many messages are in it: those that have arrived and those that are being read. True only of the moment at which it was read.
    #[doc(alias = "Netmcore_camlbox.camlbox_messages")]
    pub fn len(&self) -> usize {
        let mut len = 0;
        self.slots().all(|_| len += 1);
        len
    }

    /// Whether no messages are in it. True only of the moment at which it was read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends the message; waits for a free slot.
    ///
    /// # Errors
    ///
    /// [`SendError::Closed`], [`SendError::ReceiverDied`], [`SendError::Refused`]. The message comes back.
    ///
    /// # Panics
    ///
    /// If the mailbox lies in private memory of another process, of which this one is a fork.
    ///
    /// # If a process dies
    ///
    /// The message has arrived, or is gone with the process.
    ///
    /// # Blocking
    ///
    /// While no slot is free.
    #[inline]
    #[doc(alias = "Netmcore_camlbox.camlbox_send")]
    pub fn send(&self, value: T) -> std::result::Result<(), SendError<T>> {
        self.send_patiently(value, Patience::Endless)
    }

    /// Sends the message if a slot is free.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendError::Full`].
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    #[inline]
    pub fn try_send(&self, value: T) -> std::result::Result<(), SendError<T>> {
        self.send_patiently(value, Patience::None)
    }

    /// Sends the message; waits for a free slot until the deadline at most.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendError::TimedOut`].
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    ///
    /// # Blocking
    ///
    /// As [`send`](Self::send), until the deadline.
    pub fn send_deadline(
        &self,
        value: T,
        deadline: Instant,
    ) -> std::result::Result<(), SendError<T>> {
        self.send_patiently(value, Patience::Until(deadline))
    }

    /// Sends a message that `make` makes in its slot; waits for a free slot.
    ///
    /// `make` gives back what it has written, which is what [`MaybeUninit::write`] gives.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); nothing was made then, but for [`SendError::Refused`], after which the message has been dropped.
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send); if `make` gives back something else than what lies in the slot. If `make` panics, nothing is sent.
    ///
    /// # If a process dies
    ///
    /// As [`send`](Self::send).
    ///
    /// # Blocking
    ///
    /// As [`send`](Self::send).
    ///
    /// # Example
    ///
    /// ```
    /// # use netmcore_shm::{Arena, Heap, Mailbox};
    /// # let arena = Arena::reserve(1 << 30)?;
    /// # let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let mailbox = Mailbox::new_in(&heap, 4)?;
    /// let page = [7_u8; 4096];
    /// mailbox.send_with(|slot| slot.write(page)).unwrap(); // copied once
    /// assert_eq!(mailbox.receiver().unwrap().recv().unwrap()[4095], 7);
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    #[inline]
    pub fn send_with(
        &self,
        make: impl for<'s> FnOnce(&'s mut MaybeUninit<T>) -> &'s mut T,
    ) -> std::result::Result<(), SendError<()>> {
        self.make_patiently(make, Patience::Endless)
    }

    /// As [`send_with`](Self::send_with), if a slot is free.
    ///
    /// # Errors
    ///
    /// As [`send_with`](Self::send_with), and [`SendError::Full`].
    ///
    /// # Panics
    ///
    /// As [`send_with`](Self::send_with).
    pub fn try_send_with(
        &self,
        make: impl for<'s> FnOnce(&'s mut MaybeUninit<T>) -> &'s mut T,
    ) -> std::result::Result<(), SendError<()>> {
        self.make_patiently(make, Patience::None)
    }

    /// As [`send_with`](Self::send_with), until the deadline at most.
    ///
    /// # Errors
    ///
    /// As [`send_with`](Self::send_with), and [`SendError::TimedOut`].
    ///
    /// # Panics
    ///
    /// As [`send_with`](Self::send_with).
    ///
    /// # Blocking
    ///
    /// As [`send`](Self::send), until the deadline.
    pub fn send_with_deadline(
        &self,
        make: impl for<'s> FnOnce(&'s mut MaybeUninit<T>) -> &'s mut T,
        deadline: Instant,
    ) -> std::result::Result<(), SendError<()>> {
        self.make_patiently(make, Patience::Until(deadline))
    }

    #[inline]
    fn send_patiently(
        &self,
        value: T,
        patience: Patience,
    ) -> std::result::Result<(), SendError<T>> {
        if let Err(error) = self.heap.check(&value) {
            return Err(SendError::Refused { value, error });
        }
        match self.claim(patience) {
            Ok(claim) => {
                // SAFETY: in bounds: a slot; here and there: it is ours (`slots`, invariant 1); gone: what we write does not count yet.
                unsafe { self.at(claim.slot).write(value) };
                crash_point!("shm.mailbox.written");
                claim.publish();
                Ok(())
            }
            Err(error) => Err(error.replace(value).1),
        }
    }

    #[inline]
    fn make_patiently(
        &self,
        make: impl for<'s> FnOnce(&'s mut MaybeUninit<T>) -> &'s mut T,
        patience: Patience,
    ) -> std::result::Result<(), SendError<()>> {
        let claim = self.claim(patience)?;
        let at = self.at(claim.slot);
        // SAFETY: in bounds: a slot, uninitialised or not; here and there: it is ours (`slots`, invariant 1); gone: what is written does not count yet.
        let made: *mut T = make(unsafe { &mut *at.cast::<MaybeUninit<T>>() });
        assert!(
            ptr::eq(made, at),
            "the message was not made in its slot: write it there, and give back what `write` gives"
        );
        crash_point!("shm.mailbox.written_in_place");
        // SAFETY: a value lies there, as the reference to it shows; as above.
        if let Err(error) = self.heap.check(unsafe { &*at }) {
            // SAFETY: as above; the slot is freed then, by the claim.
            unsafe { ptr::drop_in_place(at) };
            return Err(SendError::Refused { value: (), error });
        }
        claim.publish();
        Ok(())
    }

    /// Takes a slot for the caller.
    #[inline]
    fn claim(&self, patience: Patience) -> std::result::Result<Claim<'_, T, H>, SendError<()>> {
        self.refuse_copies();
        let claim = |slot| Claim {
            mailbox: self,
            slot,
            epoch: fork_epoch(),
        };
        match self.claim_once(self.receiving.is_look_due()) {
            Ok(slot) => return Ok(claim(slot)),
            Err(NoSlot::Full) => {}
            Err(no) => return Err(no.into()),
        }
        if let Patience::None = patience {
            return Err(SendError::Full { value: () });
        }
        self.claim_slowly(patience.deadline()).map(claim)
    }

    /// `looks` whether the receiver lives, and for slots that dead ones had.
    #[inline]
    fn claim_once(&self, looks: bool) -> std::result::Result<usize, NoSlot> {
        let receiver = self.receiver.load(Ordering::SeqCst);
        if receiver & ENDED != 0 {
            return Err(NoSlot::Closed(self.closed_for(ClosedBy::ConsumersGone)));
        }
        if let Some(owner) = owner_of(receiver) {
            if looks && !Current.is_alive(owner) {
                self.dead_receiver.store(receiver, Ordering::SeqCst);
            }
            if self.dead_receiver.load(Ordering::SeqCst) == receiver {
                return Err(NoSlot::ReceiverDied(owner));
            }
        }
        if looks {
            // To be done when a slot is missing, by whoever misses it.
            self.unswept.store(1, Ordering::SeqCst);
        }
        let me = word_of(Current.me());
        let slot = self
            .slots()
            .claim(me)
            .or_else(|| self.claim_sweeping_if_due(me));
        // Invariant 4 of `slots`: asked only when the slot is ours.
        if self.closed.load(Ordering::SeqCst) != 0 {
            if let Some(slot) = slot {
                self.give_back(slot);
            }
            return Err(NoSlot::Closed(self.closed_for(ClosedBy::Call)));
        }
        slot.ok_or(NoSlot::Full)
    }

    /// Takes a slot that a dead one had, as long as there are such.
    #[cold]
    fn claim_sweeping_if_due(&self, me: u64) -> Option<usize> {
        // Who dies in the middle makes that it is looked again.
        if self.unswept.load(Ordering::SeqCst) == 0 || self.unswept.swap(0, Ordering::SeqCst) == 0 {
            return None;
        }
        let slot = self.slots().claim_sweeping(me)?;
        self.unswept.store(1, Ordering::SeqCst);
        Some(slot)
    }

    #[cold]
    fn claim_slowly(&self, deadline: Option<Instant>) -> std::result::Result<usize, SendError<()>> {
        let started = Instant::now();
        loop {
            let changes = self.receiving.changes();
            let receiver = owner_of(self.receiver.load(Ordering::SeqCst));
            let recheck = receiver.and_then(|owner| Current.recheck_every(owner));
            let mut watch = Watch::new(&self.receiving);
            let waited = self
                .room
                .wait(&Current, recheck, deadline.map(Into::into), || {
                    if self.receiving.changes() != changes {
                        return Some(Waited::Changed);
                    }
                    match self.claim_once(watch.is_due(&self.receiving)) {
                        Ok(slot) => Some(Waited::Slot(slot)),
                        Err(NoSlot::Full) => None,
                        Err(no) => Some(Waited::No(no)),
                    }
                });
            match waited {
                Some(Waited::Slot(slot)) => return Ok(slot),
                Some(Waited::No(no)) => return Err(no.into()),
                Some(Waited::Changed) => {}
                None => {
                    let waited = started.elapsed();
                    return Err(SendError::TimedOut { value: (), waited });
                }
            }
        }
    }

    /// Frees a slot of the caller's in which there is no message.
    fn give_back(&self, slot: usize) {
        self.slots().release(slot);
        self.room.notify_one();
        // A receiver that waits for the last messages.
        self.arrivals.notify_one();
    }

    /// Makes the calling thread the receiver, until the guard is dropped, [hands over](MailboxReceiver::hand_over), or the thread is dead.
    ///
    /// # Errors
    ///
    /// [`HasReceiver`] if there is a receiver who lives. The place of a dead one, or of one that has ended, is taken over, with the messages that have arrived.
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    pub fn receiver(&self) -> std::result::Result<MailboxReceiver<'_, T, H>, HasReceiver> {
        self.refuse_copies();
        let me = word_of(Current.me());
        loop {
            let current = self.receiver.load(Ordering::SeqCst);
            if current & ENDED == 0
                && let Some(owner) = owner_of(current)
                && Current.is_alive(owner)
            {
                return Err(HasReceiver { owner });
            }
            if self
                .receiver
                .compare_exchange(current, me, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
            {
                break;
            }
        }
        crash_point!("shm.mailbox.receiver_taken");
        self.receiver_changed();
        let receiver = MailboxReceiver {
            mailbox: self,
            inbox: RefCell::new(Inbox {
                waiting: BinaryHeap::new(),
                is_known: vec![false; self.slot_count],
            }),
            me,
            epoch: fork_epoch(),
            holding: Holding::begin(),
        };
        receiver.look(true);
        Ok(receiver)
    }

    fn receiver_changed(&self) {
        self.receiving.note_change();
        self.room.notify_all();
    }

    /// Says how many senders there will be: when so many have been [enrolled](Self::sender) and all are gone, the mailbox closes.
    ///
    /// # Errors
    ///
    /// [`EnrolError::ToldOtherwise`] if another number was said before; [`EnrolError::Memory`].
    ///
    /// # Panics
    ///
    /// If `count` is 0, or no memory could hold so many places.
    pub fn senders(&self, count: usize) -> std::result::Result<(), EnrolError> {
        assert!(count > 0, "a mailbox that 0 are to use");
        self.refuse_copies();
        // Without a deadline it is had.
        let guard = self.lock_roll(None);
        let told = self.senders.tell(self.heap, count)?;
        drop(guard);
        if told {
            self.senders_changed();
            Ok(())
        } else {
            Err(EnrolError::ToldOtherwise {
                expected: self.senders.roll().len(),
                said: count,
            })
        }
    }

    /// Enrols the calling thread as one of the [senders](Self::senders), until the guard is dropped or the thread is dead.
    ///
    /// If all places are taken, the place of one that died is given to the new one.
    ///
    /// # Errors
    ///
    /// [`EnrolError::NotTold`], [`EnrolError::TooMany`], [`EnrolError::Closed`].
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    #[doc(alias = "Netmcore_camlbox.camlbox_sender")]
    pub fn sender(&self) -> std::result::Result<MailboxSender<'_, T, H>, EnrolError> {
        self.refuse_copies();
        if !self.senders.has_roll() {
            return Err(EnrolError::NotTold);
        }
        self.close_if_gone(None);
        let guard = self.lock_roll(None);
        if self.closed.load(Ordering::SeqCst) != 0 {
            let closed = self.closed_for(ClosedBy::ProducersGone);
            return Err(EnrolError::Closed(closed));
        }
        let number = enrolment::enrol(self.senders.roll());
        drop(guard);
        let number = number.ok_or(EnrolError::TooMany {
            expected: self.senders.roll().len(),
        })?;
        crash_point!("shm.mailbox.enrolled");
        self.senders_changed();
        Ok(MailboxSender {
            mailbox: self,
            number,
            epoch: fork_epoch(),
            not_send: PhantomData,
        })
    }

    fn senders_changed(&self) {
        self.senders.note_change();
        self.arrivals.notify_all();
    }

    /// Held for a moment, and without anything in doubt if its holder dies. `None` if the deadline passes.
    fn lock_roll(&self, deadline: Option<Instant>) -> Option<LockGuard<'_>> {
        match deadline {
            None => Some(match self.roll_lock.lock(&Current) {
                Ok(guard) => guard,
                Err(died) => died.guard,
            }),
            Some(deadline) => match self.roll_lock.lock_deadline(&Current, deadline) {
                Ok(guard) => Some(guard),
                Err(error) => error.into_guard(),
            },
        }
    }

    /// Closes the mailbox: nothing can be sent any more. What has arrived can still be received; then the receiver is told.
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    pub fn close(&self) {
        self.refuse_copies();
        self.closed.fetch_or(CLOSED_BY_CALL, Ordering::SeqCst);
        crash_point!("shm.mailbox.closed_before_wake");
        self.arrivals.notify_all();
        self.room.notify_all();
    }

    /// Closes the mailbox if all its enrolled senders are gone, and if nobody enrols until the deadline.
    #[cold]
    fn close_if_gone(&self, deadline: Option<Instant>) {
        let is_gone = || self.senders.has_roll() && enrolment::are_all_gone(self.senders.roll());
        if self.closed.load(Ordering::SeqCst) & SENDERS_GONE == 0 && is_gone() {
            // Nobody enrols meanwhile.
            let Some(guard) = self.lock_roll(deadline) else {
                return;
            };
            if is_gone() {
                self.closed.fetch_or(SENDERS_GONE, Ordering::SeqCst);
            }
            drop(guard);
            self.arrivals.notify_all();
            self.room.notify_all();
        }
    }

    /// What to tell of a closed mailbox, preferably that `side` is gone.
    #[cold]
    fn closed_for(&self, side: ClosedBy) -> Closed {
        let why = self.closed.load(Ordering::SeqCst);
        let (by, (ended_count, died)) = if side == ClosedBy::ConsumersGone {
            (side, (1, Vec::new()))
        } else if why & SENDERS_GONE != 0 {
            let gone = enrolment::account(self.senders.roll());
            (ClosedBy::ProducersGone, gone)
        } else {
            (ClosedBy::Call, (0, Vec::new()))
        };
        Closed {
            by,
            ended_count,
            died,
        }
    }

    /// Invariant 2.
    #[inline]
    fn refuse_copies(&self) {
        assert!(
            !self.mark.is_copy_by_fork(),
            "a mailbox in private memory was copied by fork: put it into a ShmArc, or give it a name, before forking"
        );
    }
}

impl From<NoSlot> for SendError<()> {
    fn from(no: NoSlot) -> SendError<()> {
        let value = ();
        match no {
            NoSlot::Full => SendError::Full { value },
            NoSlot::Closed(closed) => SendError::Closed { value, closed },
            NoSlot::ReceiverDied(owner) => SendError::ReceiverDied { value, owner },
        }
    }
}

/// A slot that is the caller's; given back if nothing is sent.
struct Claim<'a, T: ShmSafe, H> {
    mailbox: &'a Mailbox<T, H>,
    slot: usize,
    /// Tells the one that has it from its forked copies.
    epoch: u64,
}

impl<T: ShmSafe, H> Claim<'_, T, H> {
    #[inline]
    fn publish(self) {
        assert!(
            self.epoch == fork_epoch(),
            "the message is sent by another process, of which this one is a fork"
        );
        let this = ManuallyDrop::new(self);
        this.mailbox.slots().publish(this.slot);
        this.mailbox.arrivals.notify_one();
    }
}

impl<T: ShmSafe, H> Drop for Claim<'_, T, H> {
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            self.mailbox.give_back(self.slot);
        }
    }
}

impl<T: ShmSafe, H> Drop for Mailbox<T, H> {
    /// Drops the messages and frees all memory.
    fn drop(&mut self) {
        if self.mark.is_copy_by_fork() {
            return;
        }
        // Before anything else (invariant 3).
        let block = self.block.swap(ptr::null_mut(), Ordering::SeqCst);
        let Some(block) = NonNull::new(block) else {
            return;
        };
        crash_point!("shm.mailbox.emptied");
        drop(Rest {
            mailbox: self,
            block,
            slot: 0,
        });
    }
}

/// Invariant 3.
#[cold]
fn no_slots(type_name: &str) -> ! {
    panic!(
        "this Mailbox of {type_name} has no slots any more: a process died while it put another one in its place"
    )
}

/// Drops the messages from the slot on, and goes on if one panics.
struct Rest<'a, T: ShmSafe, H> {
    mailbox: &'a mut Mailbox<T, H>,
    block: NonNull<u8>,
    slot: usize,
}

impl<T: ShmSafe, H> Drop for Rest<'_, T, H> {
    fn drop(&mut self) {
        let count = self.mailbox.slot_count;
        while self.slot < count {
            let slot = self.slot;
            // SAFETY: the block was the mailbox's, and is freed below.
            let slots = unsafe { self.mailbox.slots_in(self.block) };
            if slots.number(slot).is_some() {
                let message = self.mailbox.at_in(self.block.as_ptr(), slot);
                let rest = Rest {
                    mailbox: &mut *self.mailbox,
                    block: self.block,
                    slot: slot + 1,
                };
                // SAFETY: in bounds; a message lies there, and the mailbox is ours alone; it is not looked at again.
                unsafe { ptr::drop_in_place(message) };
                std::mem::forget(rest);
            }
            self.slot += 1;
        }
        let heap = self.mailbox.heap;
        self.mailbox.senders.free(heap);
        let (layout, _) = Mailbox::<T, H>::layout(count);
        // SAFETY: allocated with this layout; the mailbox is ours alone and ends here.
        unsafe { heap.deallocate(self.block, layout) };
    }
}

impl<T: ShmSafe, H: fmt::Debug> fmt::Debug for Mailbox<T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .field("header", &self.header)
            .field("receiver", &owner_of(self.receiver.load(Ordering::SeqCst)))
            .finish_non_exhaustive()
    }
}

/// One of the enrolled senders of a mailbox; from [`Mailbox::sender`].
///
/// It stands for the thread that was enrolled, which leaves in order when this is dropped. A forked child's copy does nothing. Everything else is the
/// [`Mailbox`]'s, which can be used without being enrolled.
#[must_use = "who drops it leaves the mailbox"]
#[doc(alias = "Netmcore_camlbox.camlbox_sender")]
pub struct MailboxSender<'a, T: ShmSafe, H = ()> {
    mailbox: &'a Mailbox<T, H>,
    number: usize,
    epoch: u64,
    not_send: PhantomData<*const ()>,
}

impl<T: ShmSafe, H> Deref for MailboxSender<'_, T, H> {
    type Target = Mailbox<T, H>;

    fn deref(&self) -> &Mailbox<T, H> {
        self.mailbox
    }
}

impl<T: ShmSafe, H> Drop for MailboxSender<'_, T, H> {
    fn drop(&mut self) {
        if self.epoch != fork_epoch() {
            return;
        }
        enrolment::leave(&self.mailbox.senders.roll()[self.number]);
        crash_point!("shm.mailbox.left");
        self.mailbox.senders_changed();
    }
}

impl<T: ShmSafe, H> fmt::Debug for MailboxSender<'_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailboxSender")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// What the receiver knows of, in its private memory.
struct Inbox {
    /// Messages that have arrived, first to last.
    waiting: BinaryHeap<Reverse<Arrived>>,
    /// For each slot: whether its message is waiting or being read.
    is_known: Vec<bool>,
}

/// The one who receives; from [`Mailbox::receiver`].
///
/// When it is dropped, there is no receiver any more, and senders are told so. It belongs to its thread; a forked child's copy must not be used.
#[must_use = "who drops it ends receiving"]
pub struct MailboxReceiver<'a, T: ShmSafe, H = ()> {
    mailbox: &'a Mailbox<T, H>,
    inbox: RefCell<Inbox>,
    me: u64,
    /// Tells the receiver from its forked copies.
    epoch: u64,
    /// Messages that are being read lie in the mailbox.
    holding: Holding,
}

impl<'a, T: ShmSafe, H> MailboxReceiver<'a, T, H> {
    /// The mailbox.
    pub fn mailbox(&self) -> &'a Mailbox<T, H> {
        self.mailbox
    }

    /// The first message that has arrived and has not been received; waits for one.
    ///
    /// # Errors
    ///
    /// [`RecvError::Closed`] if the mailbox is closed and nothing will arrive any more.
    ///
    /// # Panics
    ///
    /// In a forked child, if this is a copy.
    ///
    /// # If a process dies
    ///
    /// The message stays in the mailbox, for the next receiver.
    ///
    /// # Blocking
    ///
    /// While no message has arrived.
    #[inline]
    #[doc(alias = "Netmcore_camlbox.camlbox_wait")]
    #[doc(alias = "Netmcore_camlbox.camlbox_get")]
    pub fn recv(&self) -> std::result::Result<Message<'_, T, H>, RecvError> {
        self.recv_patiently(Patience::Endless)
    }

    /// The first message that has arrived and has not been received, if there is one.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv), and [`RecvError::Empty`].
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    #[inline]
    pub fn try_recv(&self) -> std::result::Result<Message<'_, T, H>, RecvError> {
        self.recv_patiently(Patience::None)
    }

    /// As [`recv`](Self::recv), until the deadline at most.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv), and [`RecvError::TimedOut`].
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    ///
    /// # Blocking
    ///
    /// As [`recv`](Self::recv), until the deadline.
    pub fn recv_deadline(
        &self,
        deadline: Instant,
    ) -> std::result::Result<Message<'_, T, H>, RecvError> {
        self.recv_patiently(Patience::Until(deadline))
    }

    /// All messages that have arrived and have not been received, first to last; none if there are none. They can be read and freed in any order.
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    pub fn arrived(&self) -> Vec<Message<'_, T, H>> {
        self.refuse_copies();
        self.look(self.mailbox.senders.is_look_due());
        std::iter::from_fn(|| self.first()).collect()
    }

    /// As [`arrived`](Self::arrived), when there are at least so many; waits for them.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv), if fewer have arrived and no more will. They are still there.
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv). If so many do not fit into the mailbox, beside those that are being read.
    ///
    /// # Blocking
    ///
    /// While fewer have arrived.
    #[doc(alias = "Netmcore_camlbox.camlbox_wait")]
    pub fn recv_many(
        &self,
        at_least: usize,
    ) -> std::result::Result<Vec<Message<'_, T, H>>, RecvError> {
        self.wait_for(at_least, None)?;
        Ok(self.arrived())
    }

    /// As [`recv_many`](Self::recv_many), until the deadline at most.
    ///
    /// # Errors
    ///
    /// As there, and [`RecvError::TimedOut`]. Those that have arrived are still there.
    ///
    /// # Panics
    ///
    /// As there.
    ///
    /// # Blocking
    ///
    /// As there, until the deadline.
    pub fn recv_many_deadline(
        &self,
        at_least: usize,
        deadline: Instant,
    ) -> std::result::Result<Vec<Message<'_, T, H>>, RecvError> {
        self.wait_for(at_least, Some(deadline))?;
        Ok(self.arrived())
    }

    /// Gives up receiving: others go on sending, and the next to ask is the receiver, with all messages that have arrived.
    pub fn hand_over(self) {
        if self.epoch != fork_epoch() {
            return;
        }
        let this = ManuallyDrop::new(self);
        this.mailbox.receiver.store(0, Ordering::SeqCst);
        crash_point!("shm.mailbox.handed_over");
        this.mailbox.receiver_changed();
        // SAFETY: they are not used any more, and dropped once.
        drop(unsafe {
            (
                ptr::read(&raw const this.inbox),
                ptr::read(&raw const this.holding),
            )
        });
    }

    #[inline]
    fn recv_patiently(
        &self,
        patience: Patience,
    ) -> std::result::Result<Message<'_, T, H>, RecvError> {
        self.refuse_copies();
        self.look(false);
        if let Some(message) = self.first() {
            return Ok(message);
        }
        if let Patience::None = patience {
            return self.try_slowly();
        }
        self.wait_for(1, patience.deadline())?;
        // It waited until there was one.
        self.first().ok_or(RecvError::Empty)
    }

    #[cold]
    fn try_slowly(&self) -> std::result::Result<Message<'_, T, H>, RecvError> {
        let is_due = self.mailbox.senders.is_look_due();
        if is_due {
            // If somebody just enrols, it is not closed yet.
            self.mailbox.close_if_gone(Some(Instant::now()));
        }
        let is_over = self.is_over();
        if is_due || is_over {
            self.look(true);
        }
        match self.first() {
            Some(message) => Ok(message),
            None if is_over => {
                let closed = self.mailbox.closed_for(ClosedBy::ProducersGone);
                Err(RecvError::Closed(closed))
            }
            None => Err(RecvError::Empty),
        }
    }

    /// Waits until so many are waiting.
    #[cold]
    fn wait_for(
        &self,
        at_least: usize,
        deadline: Option<Instant>,
    ) -> std::result::Result<(), RecvError> {
        self.refuse_copies();
        let waiting = || self.inbox.borrow().waiting.len();
        let read = {
            let inbox = self.inbox.borrow();
            let known = inbox.is_known.iter().filter(|&&is_known| is_known);
            known.count() - inbox.waiting.len()
        };
        let mailbox = self.mailbox;
        assert!(
            at_least <= mailbox.slot_count - read,
            "{at_least} messages cannot arrive in {} slots, of which {read} are being read",
            mailbox.slot_count
        );
        let started = Instant::now();
        loop {
            let changes = mailbox.senders.changes();
            let recheck = enrolment::recheck(mailbox.senders.roll());
            let mut watch = Watch::new(&mailbox.senders);
            let outcome =
                mailbox
                    .arrivals
                    .wait(&Current, recheck, deadline.map(Into::into), || {
                        self.look(false);
                        if waiting() >= at_least {
                            return Some(Some(true));
                        }
                        if mailbox.senders.changes() != changes {
                            return Some(None);
                        }
                        if watch.is_due(&mailbox.senders) {
                            mailbox.close_if_gone(deadline);
                            self.look(true);
                        }
                        let is_over = self.is_over();
                        if is_over {
                            self.look(true);
                        }
                        (is_over || waiting() >= at_least).then_some(Some(waiting() >= at_least))
                    });
            match outcome {
                Some(Some(true)) => return Ok(()),
                Some(Some(false)) => {
                    let closed = mailbox.closed_for(ClosedBy::ProducersGone);
                    return Err(RecvError::Closed(closed));
                }
                Some(None) => {}
                None => {
                    let waited = started.elapsed();
                    return Err(RecvError::TimedOut { waited });
                }
            }
        }
    }

    /// Whether nothing will arrive any more but what has: a look at all slots then finds it (`slots`, invariant 4).
    fn is_over(&self) -> bool {
        self.mailbox.closed.load(Ordering::SeqCst) != 0 && !self.mailbox.slots().is_being_sent()
    }

    /// Looks what has arrived: by hints, or at all slots.
    #[inline]
    fn look(&self, sweeps: bool) {
        let mut inbox = self.inbox.borrow_mut();
        let found = |arrived: Arrived| {
            if !std::mem::replace(&mut inbox.is_known[arrived.slot], true) {
                inbox.waiting.push(Reverse(arrived));
            }
        };
        if sweeps {
            self.mailbox.slots().sweep(found);
        } else {
            self.mailbox.slots().collect(found);
        }
    }

    #[inline]
    fn first(&self) -> Option<Message<'_, T, H>> {
        let Reverse(arrived) = self.inbox.borrow_mut().waiting.pop()?;
        Some(Message {
            receiver: self,
            arrived,
        })
    }

    #[inline]
    fn refuse_copies(&self) {
        assert!(
            self.epoch == fork_epoch(),
            "the receiver is another process, of which this one is a fork"
        );
    }
}

impl<T: ShmSafe, H> Drop for MailboxReceiver<'_, T, H> {
    fn drop(&mut self) {
        if self.epoch != fork_epoch() {
            return;
        }
        self.mailbox
            .receiver
            .store(self.me | ENDED, Ordering::SeqCst);
        crash_point!("shm.mailbox.receiver_ended");
        self.mailbox.receiver_changed();
    }
}

impl<T: ShmSafe, H> fmt::Debug for MailboxReceiver<'_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailboxReceiver")
            .field("waiting", &self.inbox.borrow().waiting.len())
            .finish_non_exhaustive()
    }
}

/// A message, where it lies in the mailbox. Dropped, it is dropped there, and its slot is free.
#[must_use = "the message is dropped"]
pub struct Message<'a, T: ShmSafe, H = ()> {
    receiver: &'a MailboxReceiver<'a, T, H>,
    arrived: Arrived,
}

impl<T: ShmSafe, H> Message<'_, T, H> {
    /// In which order it was sent: grows with each message of the mailbox.
    pub fn number(&self) -> u64 {
        self.arrived.number
    }

    /// Moves the message out, and frees its slot.
    ///
    /// # If a process dies
    ///
    /// The message is still in the mailbox, or gone with the process.
    pub fn take(self) -> T {
        self.receiver.refuse_copies();
        let this = ManuallyDrop::new(self);
        // SAFETY: in bounds: a message lies there; here and there: we are the receiver (`slots`, invariant 1); gone: if we die before the slot is
        // freed, our copy is nobody's.
        let value = unsafe { this.receiver.mailbox.at(this.arrived.slot).read() };
        crash_point!("shm.mailbox.copied");
        this.free();
        value
    }

    /// Puts the message back: it waits in its place in the order, to be received again.
    pub fn put_back(self) {
        let this = ManuallyDrop::new(self);
        let inbox = &this.receiver.inbox;
        inbox.borrow_mut().waiting.push(Reverse(this.arrived));
    }

    #[inline]
    fn free(&self) {
        let slot = self.arrived.slot;
        self.receiver.inbox.borrow_mut().is_known[slot] = false;
        self.receiver.mailbox.slots().release(slot);
        self.receiver.mailbox.room.notify_one();
    }
}

impl<T: ShmSafe, H> Deref for Message<'_, T, H> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.receiver.refuse_copies();
        // SAFETY: in bounds: a message lies there; here and there: only the receiver touches it, which we are (`slots`, invariant 1); gone: it stays,
        // whoever sent it.
        unsafe { &*self.receiver.mailbox.at(self.arrived.slot) }
    }
}

impl<T: ShmSafe, H> Drop for Message<'_, T, H> {
    #[doc(alias = "Netmcore_camlbox.camlbox_delete")]
    fn drop(&mut self) {
        if self.receiver.epoch != fork_epoch() {
            return;
        }
        if !needs_drop::<T>() {
            return self.free();
        }
        let mailbox = self.receiver.mailbox;
        // Who dies in the middle leaves nothing that is read again.
        mailbox.slots().retract(self.arrived, self.receiver.me);
        struct FreeAfter<'m, 'a, T: ShmSafe, H>(&'m Message<'a, T, H>);
        impl<T: ShmSafe, H> Drop for FreeAfter<'_, '_, T, H> {
            fn drop(&mut self) {
                self.0.free();
            }
        }
        // Also if the drop panics.
        let _free = FreeAfter(self);
        // SAFETY: in bounds: a message lies there; here and there: the slot is ours; it is not looked at again.
        unsafe { ptr::drop_in_place(mailbox.at(self.arrived.slot)) };
        crash_point!("shm.mailbox.dropped");
    }
}

impl<T: ShmSafe + fmt::Debug, H> fmt::Debug for Message<'_, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

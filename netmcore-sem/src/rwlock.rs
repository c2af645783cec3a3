//! A value in shared memory that many may read or one may write: [`ShmRwLock`].
//!
//! **Protocol.** A [`LockWord`] says who writes or is about to. A table has one *place* for each read lock that is held: 0, or who holds it. The
//! *use* says whose changes may be half done.
//!
//! | word | places | use | means | its holder died |
//! |---|---|---|---|---|
//! | free | any | 0 | readers | a reader: its place is freed by whoever finds it in the way |
//! | held | some | 0 | a writer waits for the readers to go | it has changed nothing: nobody is told |
//! | held | none | holder | it is being written | the next is told, reader or writer |
//! | held | none | another | a writer that was told, and is not yet in | the next is told of the other |
//! | free | any | owner | the last writer has panicked, or has given it up | – the next is told, as after a death |
//!
//! * Read: take a place by CAS, then look at the word. If a live writer is there, free the place and wait. Else the lock is held.
//!   Meanwhile another reader may have found no place. It sleeps on what the writer will notify when it goes; if that writer has gone
//!   before the place was free, the one that freed the place notifies.
//! * Write: take the word, then look at the places until all are free; the dead's are freed by CAS. So one of the two sees the other.
//! * A reader that has a read lock already does not wait for a writer that waits for it.
//!
//! **Invariants.**
//! 1. While a write guard exists, the word is held by it and no live reader has passed its look at the word. While a read guard exists,
//!    no writer has passed its look at the places.
//! 2. The use is written by the holder of the word only, when no reader is left.
//! 3. A place is changed from 0 to an owner by that owner, and back by it or, when it is dead, by anybody: always by a CAS from that owner, so
//!    that a guard which outlives its owner's id (in a destructor at the end of a thread) frees nothing that has become another's.
//!
//! **If a process dies here.** The table. A reader cannot have changed anything. Readers that are told do not end the doubt: a writer does.
//!
//! **Not here.** Fairness. Writers go before readers that come later; readers may wait for long while writers take turns.
//!
//! # Safety
//!
//! References to the value are made by guards only, and when it is owned; invariant 1.

#![allow(unsafe_code)]

use crate::current::{Current, Holding, fork_epoch};
use crate::lock_error::{LockError, OwnerDied};
use crate::owner::{OwnerId, Owners};
use crate::sync::{AtomicU64, Ordering, fence, fence_in_models};
use crate::wait::{Asks, WaitWord};
use crate::word::{LockGuard, LockWord, held_by, owner_of};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::cell::UnsafeCell;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::thread;
use std::time::Instant;

const FREE: u64 = 0;
const IN_ORDER: u64 = 0;

/// A value that many threads of all processes may read at the same time, or one may write. It lies in shared memory, at any address, and
/// does not move while it is used.
///
/// `READERS`, at least 1, is how many read locks can be held at the same time; one more waits until there is a place. Zeroed memory is a free lock around a
/// zeroed value, if that is a valid one. Without contention, taking and giving back are an atomic step or two each, and no system call.
///
/// # If a process dies
///
/// A reader: its read locks are given back, and nobody is told. A writer: the next one to lock, reader or writer, gets its guard in an
/// [`OwnerDied`]; a panic while it is written counts as a death, as with [`ShmMutex`](crate::ShmMutex). Readers are told until a writer that was told has
/// unlocked: that says that all is well again. The locks of leaked guards stay held until the process is dead, as with
/// [`ShmMutex`](crate::ShmMutex).
///
/// ```
/// use netmcore_sem::ShmRwLock;
///
/// let limits = <ShmRwLock<_>>::new([10, 20]);
/// {
///     let (one, two) = (limits.read().unwrap(), limits.read().unwrap());
///     assert_eq!(one[0] + two[1], 30);
///     assert!(limits.try_write().is_err(), "this thread would wait for itself");
/// }
/// limits.write().unwrap()[0] = 11;
///
/// let died = std::panic::catch_unwind(|| {
///     let _guard = limits.write().unwrap();
///     panic!("in the middle of a change"); // or the process is killed here
/// });
/// assert!(died.is_err());
/// assert!(limits.read().is_err());
/// let mut repaired = limits.write().unwrap_err().into_guard().unwrap();
/// *repaired = [10, 20];
/// drop(repaired);
/// assert!(limits.read().is_ok());
/// ```
///
/// ```compile_fail,E0277
/// let lock = <netmcore_sem::ShmRwLock<_>>::new(5);
/// let guard = lock.read().unwrap();
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(guard)); // another thread
/// });
/// ```
#[repr(C)]
pub struct ShmRwLock<T: ?Sized, const READERS: usize = 32> {
    core: Core<READERS>,
    value: UnsafeCell<T>,
}

#[repr(C)]
struct Core<const READERS: usize> {
    writer: LockWord,
    used_by: AtomicU64,
    /// On which a writer waits for readers to go.
    drained: WaitWord,
    /// On which readers wait for a writer to go, or for a place.
    admitted: WaitWord,
    places: [AtomicU64; READERS],
}

// SAFETY: the value goes with it, and is dropped by one thread.
unsafe impl<T: ?Sized + Send, const READERS: usize> Send for ShmRwLock<T, READERS> {}
// SAFETY: as for std's: shared references go to several threads, exclusive ones to one (invariant 1).
unsafe impl<T: ?Sized + Send + Sync, const READERS: usize> Sync for ShmRwLock<T, READERS> {}
// A panic while it is written is told to the next.
impl<T: ?Sized, const READERS: usize> UnwindSafe for ShmRwLock<T, READERS> {}
impl<T: ?Sized, const READERS: usize> RefUnwindSafe for ShmRwLock<T, READERS> {}

/// What a call of a lock gives: a guard, or why there is none in good order.
pub type RwLockResult<G> = Result<G, LockError<G>>;

impl<T, const READERS: usize> ShmRwLock<T, READERS> {
    /// A free lock around `value`.
    #[cfg(not(loom))]
    pub const fn new(value: T) -> ShmRwLock<T, READERS> {
        const { assert!(READERS >= 1, "a lock has a place for one reader at least") };
        ShmRwLock {
            core: Core {
                writer: LockWord::new(),
                used_by: AtomicU64::new(IN_ORDER),
                drained: WaitWord::new(),
                admitted: WaitWord::new(),
                places: [const { AtomicU64::new(FREE) }; READERS],
            },
            value: UnsafeCell::new(value),
        }
    }

    /// A free lock around `value`.
    #[cfg(loom)]
    pub fn new(value: T) -> ShmRwLock<T, READERS> {
        ShmRwLock {
            core: Core {
                writer: LockWord::new(),
                used_by: AtomicU64::new(IN_ORDER),
                drained: WaitWord::new(),
                admitted: WaitWord::new(),
                places: std::array::from_fn(|_| AtomicU64::new(FREE)),
            },
            value: UnsafeCell::new(value),
        }
    }

    /// The value. Nobody uses it, since the lock is owned.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`], with the value as its guard, if the value is [in doubt](Self::is_in_doubt).
    pub fn into_inner(self) -> Result<T, OwnerDied<T>> {
        match self.core.in_doubt_by() {
            None => Ok(self.value.into_inner()),
            Some(owner) => Err(OwnerDied {
                owner,
                guard: self.value.into_inner(),
            }),
        }
    }
}

impl<T: ?Sized, const READERS: usize> ShmRwLock<T, READERS> {
    /// Takes a read lock, waiting without limit. A thread may take several.
    ///
    /// # Errors
    ///
    /// [`LockError::OwnerDied`] if the value is in doubt: the caller holds a read lock then, by the guard inside.
    /// [`LockError::WouldDeadlock`] if the calling thread has the write lock, or has all read locks that there can be.
    ///
    /// # Blocking
    ///
    /// While another thread writes, or waits to; and while all places for readers are taken. Spins briefly, then sleeps.
    ///
    /// # If a process dies
    ///
    /// If it is the writer, the wait ends as soon as the death is announced.
    #[inline]
    pub fn read(&self) -> RwLockResult<ShmReadGuard<'_, T, READERS>> {
        self.read_until(None)
    }

    /// Takes a read lock, if that is possible at once; `None` if not.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    #[allow(clippy::type_complexity, reason = "a guard, named twice")]
    pub fn try_read(
        &self,
    ) -> Result<Option<ShmReadGuard<'_, T, READERS>>, LockError<ShmReadGuard<'_, T, READERS>>> {
        let mine = held_by(Current.me());
        match self.core.try_read(mine, Asks::WhoLives) {
            Read::Granted(place) => self.read_guard(mine, place).map(Some),
            Read::WouldDeadlock => Err(LockError::WouldDeadlock),
            Read::Busy => Ok(None),
        }
    }

    /// Takes a read lock, waiting until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and [`LockError::TimedOut`].
    ///
    /// # Blocking
    ///
    /// As [`read`](Self::read), until the deadline. With a deadline in the past: not at all.
    pub fn read_deadline(&self, deadline: Instant) -> RwLockResult<ShmReadGuard<'_, T, READERS>> {
        self.read_until(Some(deadline))
    }

    #[inline]
    fn read_until(&self, deadline: Option<Instant>) -> RwLockResult<ShmReadGuard<'_, T, READERS>> {
        let mine = held_by(Current.me());
        match self.core.read(mine, deadline) {
            Ok(place) => self.read_guard(mine, place),
            Err(error) => Err(error.map(|never| match never {})),
        }
    }

    #[inline]
    fn read_guard(&self, mine: u64, place: usize) -> RwLockResult<ShmReadGuard<'_, T, READERS>> {
        let guard = ShmReadGuard {
            lock: self,
            place,
            mine,
            epoch: fork_epoch(),
            _holding: Holding::begin(),
        };
        // Nobody writes it as long as this reader is there (invariant 2).
        match owner_of(self.core.used_by.load(Ordering::Relaxed)) {
            None => Ok(guard),
            Some(owner) => Err(LockError::OwnerDied(OwnerDied { owner, guard })),
        }
    }

    /// Takes the write lock, waiting without limit.
    ///
    /// # Errors
    ///
    /// [`LockError::OwnerDied`] if the value is in doubt: the caller holds the write lock then, by the guard inside.
    /// [`LockError::WouldDeadlock`] if the calling thread has the write lock or a read lock.
    ///
    /// # Blocking
    ///
    /// While others read or write: spins briefly, then sleeps.
    ///
    /// # If a process dies
    ///
    /// If it has the lock, the wait ends as soon as the death is announced.
    #[inline]
    pub fn write(&self) -> RwLockResult<ShmWriteGuard<'_, T, READERS>> {
        let (word, died) = self.core.write(None)?;
        self.write_guard(word, died)
    }

    /// Takes the write lock, if that is possible at once; `None` if not.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    #[allow(clippy::type_complexity, reason = "a guard, named twice")]
    pub fn try_write(
        &self,
    ) -> Result<Option<ShmWriteGuard<'_, T, READERS>>, LockError<ShmWriteGuard<'_, T, READERS>>>
    {
        // A deadline in the past does not wait.
        match self.core.write(Some(Instant::now())) {
            Ok((word, died)) => self.write_guard(word, died).map(Some),
            Err(NotWritten::TimedOut { .. }) => Ok(None),
            Err(NotWritten::WouldDeadlock) => Err(LockError::WouldDeadlock),
        }
    }

    /// Takes the write lock, waiting until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`LockError::TimedOut`].
    ///
    /// # Blocking
    ///
    /// As [`write`](Self::write), until the deadline. With a deadline in the past: not at all.
    pub fn write_deadline(&self, deadline: Instant) -> RwLockResult<ShmWriteGuard<'_, T, READERS>> {
        let (word, died) = self.core.write(Some(deadline))?;
        self.write_guard(word, died)
    }

    #[inline]
    fn write_guard<'a>(
        &'a self,
        word: LockGuard<'a>,
        died: Option<OwnerId>,
    ) -> RwLockResult<ShmWriteGuard<'a, T, READERS>> {
        let guard = ShmWriteGuard {
            lock: self,
            word: ManuallyDrop::new(word),
            before: died.map_or(IN_ORDER, held_by),
            epoch: fork_epoch(),
            was_panicking: thread::panicking(),
        };
        match died {
            None => Ok(guard),
            Some(owner) => Err(LockError::OwnerDied(OwnerDied { owner, guard })),
        }
    }

    /// The value. Nobody else uses it, since the lock is borrowed alone.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`], with the reference as its guard, if the value is [in doubt](Self::is_in_doubt). It stays so.
    pub fn get_mut(&mut self) -> Result<&mut T, OwnerDied<&mut T>> {
        match self.core.in_doubt_by() {
            None => Ok(self.value.get_mut()),
            Some(owner) => Err(OwnerDied {
                owner,
                guard: self.value.get_mut(),
            }),
        }
    }

    /// Whether the next to lock it will be told that its value may be half changed. True only of the moment at which it was read.
    pub fn is_in_doubt(&self) -> bool {
        self.core.in_doubt_by().is_some()
    }

    /// Who has the write lock, or waits for the readers to go, dead or alive. True only of the moment at which it was read.
    pub fn writer(&self) -> Option<OwnerId> {
        self.core.writer.owner()
    }

    /// How many read locks the living hold. True only of the moment at which it was read.
    pub fn reader_count(&self) -> usize {
        let places = self.core.places.iter();
        places
            .filter_map(|place| owner_of(place.load(Ordering::SeqCst)))
            .filter(|&owner| Current.is_alive(owner))
            .count()
    }

    /// Where the value lies. Others may be using it: what may be done there is what a guard allows.
    pub fn data_ptr(&self) -> *mut T {
        self.value.get()
    }
}

/// How an attempt to read ended.
enum Read {
    /// By the place of that number.
    Granted(usize),
    WouldDeadlock,
    Busy,
}

/// Why there is no write lock.
enum NotWritten {
    WouldDeadlock,
    TimedOut { started: Instant },
}

impl<G> From<NotWritten> for LockError<G> {
    fn from(why: NotWritten) -> LockError<G> {
        match why {
            NotWritten::WouldDeadlock => LockError::WouldDeadlock,
            NotWritten::TimedOut { started } => LockError::TimedOut {
                waited: started.elapsed(),
            },
        }
    }
}

impl<const READERS: usize> Core<READERS> {
    #[inline]
    fn read(
        &self,
        mine: u64,
        deadline: Option<Instant>,
    ) -> Result<usize, LockError<std::convert::Infallible>> {
        match self.try_read(mine, Asks::Nobody) {
            Read::Granted(place) => Ok(place),
            Read::WouldDeadlock => Err(LockError::WouldDeadlock),
            Read::Busy => self.read_slow(mine, deadline),
        }
    }

    #[cold]
    fn read_slow(
        &self,
        mine: u64,
        deadline: Option<Instant>,
    ) -> Result<usize, LockError<std::convert::Infallible>> {
        let started = Instant::now();
        let until = deadline.map(Deadline::from);
        let attempt = |asks| match self.try_read(mine, asks) {
            Read::Granted(place) => Some(Ok(place)),
            Read::WouldDeadlock => Some(Err(LockError::WouldDeadlock)),
            Read::Busy => None,
        };
        let outcome = (self.admitted).wait_asking(&Current, None, until, attempt);
        outcome.unwrap_or_else(|| {
            Err(LockError::TimedOut {
                waited: started.elapsed(),
            })
        })
    }

    #[inline]
    fn try_read(&self, mine: u64, asks: Asks) -> Read {
        let Some(number) = self.take_place(mine, asks) else {
            return self.full(mine);
        };
        crash_point!("sem.rwlock.place_taken");
        fence_in_models();
        // After the place was taken, both sequentially consistent: see the protocol.
        match self.writer.owner_seq_cst() {
            None => Read::Granted(number),
            Some(writer) => self.decide(mine, number, writer, asks),
        }
    }

    /// Without a place.
    #[cold]
    fn full(&self, mine: u64) -> Read {
        let is_mine = |place: &AtomicU64| place.load(Ordering::Relaxed) == mine;
        if self.writer.owner() == owner_of(mine) || self.places.iter().all(is_mine) {
            Read::WouldDeadlock
        } else {
            Read::Busy
        }
    }

    /// With a place taken, and somebody in the word.
    #[cold]
    fn decide(&self, mine: u64, number: usize, writer: OwnerId, asks: Asks) -> Read {
        let is_mine = owner_of(mine) == Some(writer);
        let has_another = || {
            let mut places = self.places.iter().enumerate();
            places.any(|(other, place)| other != number && place.load(Ordering::SeqCst) == mine)
        };
        if !is_mine && (asks.is_dead(writer) || has_another()) {
            return Read::Granted(number);
        }
        self.free_place(number, mine);
        fence_in_models();
        // Readers that found no place because of this one wait for the writer. It notifies them when it goes; if it has gone
        // while this place was taken, it may have come too early.
        if self.writer.owner_seq_cst() != Some(writer) {
            self.admitted.notify_one();
        }
        if is_mine {
            Read::WouldDeadlock
        } else {
            Read::Busy
        }
    }

    /// Takes a place for a reader, a free one or that of a dead one.
    #[inline]
    fn take_place(&self, mine: u64, asks: Asks) -> Option<usize> {
        // Threads begin at different places.
        let first = (mine as u32 as usize) % READERS;
        let place = &self.places[first];
        if place.load(Ordering::Relaxed) == FREE && change(place, FREE, mine) {
            return Some(first);
        }
        self.take_place_from(first, mine, asks)
    }

    #[cold]
    fn take_place_from(&self, first: usize, mine: u64, asks: Asks) -> Option<usize> {
        let numbers = || (first..READERS).chain(0..first);
        let free = numbers().find(|&number| {
            let place = &self.places[number];
            place.load(Ordering::Relaxed) == FREE && change(place, FREE, mine)
        });
        free.or_else(|| {
            numbers().find(|&number| {
                let place = &self.places[number];
                let there = place.load(Ordering::SeqCst);
                is_dead(there, asks) && change(place, there, mine)
            })
        })
    }

    /// False if it was not the caller's any more: one that is taken to be dead has no place.
    #[inline]
    fn free_place(&self, number: usize, mine: u64) -> bool {
        let is_freed = change(&self.places[number], mine, FREE);
        if is_freed {
            crash_point!("sem.rwlock.place_freed");
            self.drained.notify_one();
        }
        is_freed
    }

    #[inline]
    fn give_back(&self, number: usize, mine: u64) {
        if !self.free_place(number, mine) {
            return;
        }
        // For one that has found no place.
        self.admitted.notify_one();
    }

    /// The write lock, and who has left the value in doubt.
    #[inline]
    fn write(
        &self,
        deadline: Option<Instant>,
    ) -> Result<(LockGuard<'_>, Option<OwnerId>), NotWritten> {
        let word = match self.writer.try_lock(&Current) {
            Ok(Some(word)) => word,
            // The use says whether it has changed anything.
            Err(died) => died.guard,
            Ok(None) => self.wait_for_writers(deadline)?,
        };
        crash_point!("sem.rwlock.word_locked");
        // The places are looked at after this, the word by readers after they have taken one.
        fence(Ordering::SeqCst);
        let mine = held_by(word.owner());
        if !self.is_drained(Asks::Nobody)
            && let Err(why) = self.wait_for_readers(mine, deadline)
        {
            drop(word);
            self.admitted.notify_all();
            return Err(why);
        }
        let died = owner_of(self.used_by.load(Ordering::Relaxed));
        self.used_by.store(mine, Ordering::Relaxed);
        crash_point!("sem.rwlock.writing");
        Ok((word, died))
    }

    #[cold]
    fn wait_for_writers(&self, deadline: Option<Instant>) -> Result<LockGuard<'_>, NotWritten> {
        if self.writer.owner() == Some(Current.me()) {
            return Err(NotWritten::WouldDeadlock);
        }
        let started = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= started) {
            return Err(NotWritten::TimedOut { started });
        }
        let locked = match deadline {
            None => self.writer.lock(&Current).map_err(LockError::from),
            Some(deadline) => self.writer.lock_deadline(&Current, deadline),
        };
        locked.or_else(|error| error.into_guard().ok_or(NotWritten::TimedOut { started }))
    }

    /// Whether no live reader is left.
    #[inline]
    fn is_drained(&self, asks: Asks) -> bool {
        self.places.iter().all(|place| {
            let there = place.load(Ordering::SeqCst);
            there == FREE || is_dead(there, asks) && change(place, there, FREE)
        })
    }

    #[cold]
    fn wait_for_readers(&self, mine: u64, deadline: Option<Instant>) -> Result<(), NotWritten> {
        let is_mine = |place: &AtomicU64| place.load(Ordering::SeqCst) == mine;
        if self.places.iter().any(is_mine) {
            return Err(NotWritten::WouldDeadlock);
        }
        let started = Instant::now();
        let until = deadline.map(Deadline::from);
        let attempt = |asks| {
            fence_in_models();
            self.is_drained(asks).then_some(())
        };
        self.drained
            .wait_asking(&Current, None, until, attempt)
            .ok_or(NotWritten::TimedOut { started })
    }

    fn in_doubt_by(&self) -> Option<OwnerId> {
        let user = owner_of(self.used_by.load(Ordering::SeqCst))?;
        let is_writing = self.writer.owner() == Some(user) && Current.is_alive(user);
        (!is_writing).then_some(user)
    }
}

#[inline]
fn change(place: &AtomicU64, from: u64, to: u64) -> bool {
    place
        .compare_exchange(from, to, Ordering::SeqCst, Ordering::Relaxed)
        .is_ok()
}

fn is_dead(there: u64, asks: Asks) -> bool {
    owner_of(there).is_some_and(|owner| asks.is_dead(owner))
}

impl<T: Default, const READERS: usize> Default for ShmRwLock<T, READERS> {
    fn default() -> Self {
        ShmRwLock::new(T::default())
    }
}

impl<T: ?Sized + fmt::Debug, const READERS: usize> fmt::Debug for ShmRwLock<T, READERS> {
    /// The value is shown if it can be read at once.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ShmRwLock");
        match self.try_read() {
            Ok(Some(guard)) => debug.field("value", &&*guard),
            Err(LockError::OwnerDied(died)) => debug
                .field("value", &&*died.guard)
                .field("in_doubt_by", &died.owner),
            _ => debug.field("writer", &self.writer()),
        };
        debug.finish_non_exhaustive()
    }
}

/// Holds a read lock of a [`ShmRwLock`], and gives it back when dropped.
///
/// It belongs to the thread that took it. A forked copy of it holds nothing, gives back nothing, and panics when it is asked for the value.
#[must_use = "the lock is given back when the guard is dropped"]
pub struct ShmReadGuard<'a, T: ?Sized, const READERS: usize = 32> {
    lock: &'a ShmRwLock<T, READERS>,
    place: usize,
    /// Whose place it is.
    mine: u64,
    epoch: u64,
    _holding: Holding,
}

// SAFETY: through a shared reference it gives shared references to the value.
unsafe impl<T: ?Sized + Sync, const READERS: usize> Sync for ShmReadGuard<'_, T, READERS> {}

impl<T: ?Sized, const READERS: usize> Deref for ShmReadGuard<'_, T, READERS> {
    type Target = T;

    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        check(self.epoch);
        // SAFETY: no writer is there as long as this guard (invariant 1).
        unsafe { &*self.lock.value.get() }
    }
}

impl<T: ?Sized, const READERS: usize> Drop for ShmReadGuard<'_, T, READERS> {
    #[inline]
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            self.lock.core.give_back(self.place, self.mine);
        }
    }
}

impl<T: ?Sized + fmt::Debug, const READERS: usize> fmt::Debug for ShmReadGuard<'_, T, READERS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Holds the write lock of a [`ShmRwLock`], and unlocks it when dropped.
///
/// It belongs to the thread that took it. A forked copy of it holds nothing, unlocks nothing, and panics when it is asked for the value.
#[must_use = "the lock is released when the guard is dropped"]
pub struct ShmWriteGuard<'a, T: ?Sized, const READERS: usize = 32> {
    lock: &'a ShmRwLock<T, READERS>,
    word: ManuallyDrop<LockGuard<'a>>,
    /// What the use was before: whom the holder has been told of.
    before: u64,
    epoch: u64,
    was_panicking: bool,
}

// SAFETY: through a shared reference it gives shared references to the value.
unsafe impl<T: ?Sized + Sync, const READERS: usize> Sync for ShmWriteGuard<'_, T, READERS> {}

impl<'a, T: ?Sized, const READERS: usize> ShmWriteGuard<'a, T, READERS> {
    /// Unlocks it, and leaves the value in doubt: the next to lock it is told, as if this one had died; or as this one was told, if it was.
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn give_up(guard: Self) {
        check(guard.epoch);
        let mut guard = ManuallyDrop::new(guard);
        if guard.before != IN_ORDER {
            let used_by = &guard.lock.core.used_by;
            used_by.store(guard.before, Ordering::Relaxed);
        }
        guard.unlock();
    }

    /// Makes it a read lock, without letting another writer in between. It says that all is well, as unlocking does.
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    ///
    /// ```
    /// use netmcore_sem::{ShmRwLock, ShmWriteGuard};
    ///
    /// let lock = <ShmRwLock<_>>::new(1);
    /// let mut guard = lock.write().unwrap();
    /// *guard = 2;
    /// let guard = ShmWriteGuard::downgrade(guard);
    /// assert_eq!(*lock.read().unwrap() + *guard, 4);
    /// ```
    pub fn downgrade(guard: Self) -> ShmReadGuard<'a, T, READERS> {
        check(guard.epoch);
        let mut guard = ManuallyDrop::new(guard);
        let (lock, epoch) = (guard.lock, guard.epoch);
        let mine = held_by(guard.word.owner());
        lock.core.used_by.store(IN_ORDER, Ordering::Relaxed);
        let place = loop {
            // Others that try to read take places for a moment only.
            if let Some(place) = lock.core.take_place(mine, Asks::WhoLives) {
                break place;
            }
            thread::yield_now();
        };
        crash_point!("sem.rwlock.downgrading");
        guard.unlock();
        ShmReadGuard {
            lock,
            place,
            mine,
            epoch,
            _holding: Holding::begin(),
        }
    }

    #[inline]
    fn unlock(&mut self) {
        // SAFETY: once: by `drop`, or by a call whose guard is not dropped after it.
        unsafe { ManuallyDrop::drop(&mut self.word) };
        crash_point!("sem.rwlock.unlocked");
        self.lock.core.admitted.notify_all();
    }
}

impl<T: ?Sized, const READERS: usize> Deref for ShmWriteGuard<'_, T, READERS> {
    type Target = T;

    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        check(self.epoch);
        // SAFETY: this is the only guard (invariant 1), borrowed as long as the value.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T: ?Sized, const READERS: usize> DerefMut for ShmWriteGuard<'_, T, READERS> {
    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref_mut(&mut self) -> &mut T {
        check(self.epoch);
        // SAFETY: this is the only guard (invariant 1), borrowed alone as long as the value.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T: ?Sized, const READERS: usize> Drop for ShmWriteGuard<'_, T, READERS> {
    #[inline]
    fn drop(&mut self) {
        if self.epoch != fork_epoch() {
            return;
        }
        // A panic leaves the use as it is: the next is told.
        if self.was_panicking || !thread::panicking() {
            self.lock.core.used_by.store(IN_ORDER, Ordering::Relaxed);
            crash_point!("sem.rwlock.in_order");
        }
        self.unlock();
    }
}

impl<T: ?Sized + fmt::Debug, const READERS: usize> fmt::Debug for ShmWriteGuard<'_, T, READERS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[inline]
#[track_caller]
fn check(epoch: u64) {
    assert!(
        epoch == fork_epoch(),
        "this guard is a forked copy: the parent process holds the lock"
    );
}

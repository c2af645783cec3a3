//! A value in shared memory that one thread at a time may use: [`ShmMutex`]; who dies or panics while using it is made known to the next.
//!
//! **Protocol.** A [`LockWord`] says who holds the value. Beside it lies the *doubt*: 0, or the owner whose death or panic has put
//! the value in doubt. Only the holder writes the doubt.
//!
//! | word | doubt | means | its holder died |
//! |---|---|---|---|
//! | free | 0 | all is well | – |
//! | held | 0 | it is being used | the next takes the word over, and is told |
//! | held | owner | its holder has been told, and repairs it; or has panicked, and unlocks; or gives it up | the next is told that this one has died |
//! | free | owner | the last holder has panicked, or has given it up | – the next is told, as after a death |
//!
//! * Who takes the word over from the dead writes the doubt. Who finds the word free reads the doubt. Either way, with a
//!   doubt there the guard is handed over in an [`OwnerDied`].
//! * Unlocking after having been told says that all is well: the doubt is cleared, then the word freed. Unlocking in a panic
//!   that began while the lock was held writes the doubt, or leaves the one that is there.
//! * A recursive lock counts how often it is held beyond the first time. Only the holder writes this *depth*. Who takes the word
//!   over from the dead sets it to 0. If one of its guards leaves the value in doubt that another was told of, it marks the doubt, so that
//!   the other does not clear it.
//!
//! **Invariants.**
//! 1. A guard exists only in the thread that has taken the word, until the word is freed (or in a forked copy of that thread, where it
//!    refuses to give the value).
//! 2. While a guard of a normal or error-checking lock exists, it is the only one, in all processes.
//! 3. While the word is free, the depth is 0; while it is held by the living, it is the number of guards less one.
//!
//! **If a process dies here.** The word is the truth: while it names the dead, the next is told, whatever doubt and depth say, and sets both
//! right. A death after the doubt was cleared and before the word was freed is told too: once too often, not too seldom.
//!
//! **Why a panic counts as a death.** In a worker it is one: the process ends. Whether the guard is dropped on the way depends on the setting
//! of `panic`, and the next holder should not. As with std's mutex, `lock().unwrap()` is then safe to write: it panics
//! in everybody until somebody looks after the value.
//!
//! **Not here.** The lock itself ([`word`](crate::word)); waiting for a change of the value ([`condvar`](crate::condvar)).
//!
//! # Safety
//!
//! References to the value are made from the cell in which it lies, by guards only, and when the value is owned. Guards are exclusive by
//! invariant 2, or give shared references in one thread only.
//!
//! All of it rests on [`Owners`]: an owner that is called dead must use no value any more. A thread that ends has dropped its guards, or leaked them. A
//! reference made from a leaked guard may be used in another thread afterwards, so that one's owner is alive until the process is dead: see
//! [`current`](crate::current).

#![allow(unsafe_code)]

use crate::current::{Current, Holding, fork_epoch};
use crate::lock_error::{LockError, OwnerDied};
use crate::owner::{OwnerId, Owners};
use crate::sync::{AtomicU32, AtomicU64, Ordering, const_fn};
use crate::word::{LockWord, Outcome, held_by, owner_of};
use netmcore_sys::crash_point;
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr::NonNull;
use std::thread;
use std::time::Instant;

/// Nothing is in doubt.
const NO_DOUBT: u64 = 0;
/// Beside an owner in the doubt: one of several guards of a thread has left it, after another was told.
const LEFT_AGAIN: u64 = 1 << 31;

mod sealed {
    pub trait Kind {
        /// The thread that holds it may lock it again.
        const IS_RECURSIVE: bool;
        /// The thread that holds it and locks again is told so.
        const IS_CHECKING: bool;
    }
}

/// What a mutex does when the thread that holds it locks it again: [`Normal`], [`ErrorChecking`], [`Recursive`].
pub trait MutexKind: sealed::Kind + 'static {}

/// The kinds whose holder is the only one with access: all but [`Recursive`].
pub trait ExclusiveKind: MutexKind {}

/// A thread that locks it again waits for itself, for ever or until its deadline.
#[derive(Debug)]
pub enum Normal {}

/// A thread that locks it again gets [`LockError::WouldDeadlock`].
#[derive(Debug)]
pub enum ErrorChecking {}

/// A thread may lock it again, and unlocks it as often. Its guards give shared access only.
#[derive(Debug)]
pub enum Recursive {}

macro_rules! kinds {
    ($($kind:ident: recursive $recursive:literal, checking $checking:literal;)*) => {
        $(
            impl sealed::Kind for $kind {
                const IS_RECURSIVE: bool = $recursive;
                const IS_CHECKING: bool = $checking;
            }
            impl MutexKind for $kind {}
        )*
    };
}

kinds! {
    Normal: recursive false, checking false;
    ErrorChecking: recursive false, checking true;
    Recursive: recursive true, checking false;
}

impl ExclusiveKind for Normal {}
impl ExclusiveKind for ErrorChecking {}

/// A value that one thread of all processes at a time may use. It lies in shared memory, at any address, and does not move while it is used.
///
/// Zeroed memory is a free mutex around a zeroed value, if that is a valid one. Without contention, locking and unlocking are one
/// compare-and-swap each, and no system call. Threads act under the ids that [`Current`] gives them.
///
/// `K` says what happens when a thread locks again what it holds already.
///
/// # If a process dies
///
/// If it held the lock, the next one to lock gets the guard in an [`OwnerDied`]: the value may be half changed. A panic while the lock is held
/// counts as a death, as with std's mutex. When that guard is dropped, all is well again: repair the value
/// first, or hand the trouble on by [`give_up`](ShmMutexGuard::give_up). If the one that was told dies or panics in turn, the next is told.
///
/// The lock of a leaked guard stays held until the process of its thread is dead: references that were made from the guard may be used by other threads
/// after that one has ended. (A thread without a supervisor that has leaked a guard does not end before its process.)
///
/// # Example
///
/// ```
/// use netmcore_sem::{OwnerDied, ShmMutex};
/// use std::panic::catch_unwind;
///
/// // In shared memory, as a rule; here in that of one process, for brevity.
/// let account = ShmMutex::new([100, 0]);
/// account.lock().unwrap()[1] += 1;
/// assert!(account.try_lock().unwrap().is_some());
///
/// let died = catch_unwind(|| {
///     let mut money = account.lock().unwrap();
///     money[0] -= 30;
///     panic!("in the middle of a change"); // or the process is killed here
/// });
/// assert!(died.is_err());
/// match account.lock() {
///     Ok(_) => unreachable!(),
///     Err(OwnerDied { owner, mut guard }) => {
///         println!("{owner} died; the sum is {}", guard.iter().sum::<i32>());
///         *guard = [100, 0];
///     }
/// }
/// assert_eq!(*account.lock().unwrap(), [100, 0]);
/// ```
///
/// What belongs to one thread cannot be shared by it:
///
/// ```compile_fail,E0277
/// fn is_sync<T: Sync>() {}
/// is_sync::<netmcore_sem::ShmMutex<std::rc::Rc<u8>>>();
/// ```
#[doc(alias = "Netmcore_mutex")]
#[repr(C)]
pub struct ShmMutex<T: ?Sized, K: MutexKind = Normal> {
    core: Core,
    kind: PhantomData<fn() -> K>,
    value: UnsafeCell<T>,
}

/// What there is beside the value.
#[repr(C)]
struct Core {
    word: LockWord,
    /// [`NO_DOUBT`], or the lock word of an owner.
    doubt: AtomicU64,
    depth: AtomicU32,
}

// SAFETY: the value goes with it, and is accessed by one thread at a time.
unsafe impl<T: ?Sized + Send, K: MutexKind> Send for ShmMutex<T, K> {}
// SAFETY: guards are in one thread at a time (invariants 1 and 2), so sharing the mutex is sending the value there. The recursive
// kind gives shared references, all of them in one thread.
unsafe impl<T: ?Sized + Send, K: MutexKind> Sync for ShmMutex<T, K> {}

// A panic while it is held is told to the next.
impl<T: ?Sized, K: MutexKind> UnwindSafe for ShmMutex<T, K> {}
impl<T: ?Sized, K: MutexKind> RefUnwindSafe for ShmMutex<T, K> {}

impl<T> ShmMutex<T> {
    const_fn! {
        /// A free mutex of the normal kind around `value`.
        #[doc(alias = "Netmcore_mutex.create")]
        pub fn new(value: T) -> ShmMutex<T> {
            ShmMutex::with_kind(value)
        }
    }
}

impl<T, K: MutexKind> ShmMutex<T, K> {
    const_fn! {
        /// A free mutex around `value`, of the kind that the type says.
        ///
        /// ```
        /// use netmcore_sem::{LockError, ShmMutex, mutex::ErrorChecking};
        ///
        /// static MUTEX: ShmMutex<u32, ErrorChecking> = ShmMutex::with_kind(5);
        /// let guard = MUTEX.lock().unwrap();
        /// assert!(matches!(MUTEX.lock(), Err(LockError::WouldDeadlock)));
        /// assert_eq!(*guard, 5);
        /// ```
        pub fn with_kind(value: T) -> ShmMutex<T, K> {
            ShmMutex {
                core: Core {
                    word: LockWord::new(),
                    doubt: AtomicU64::new(NO_DOUBT),
                    depth: AtomicU32::new(0),
                },
                kind: PhantomData,
                value: UnsafeCell::new(value),
            }
        }
    }

    /// The value. Nobody uses it, since the mutex is owned.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`], with the value as its guard, if the value is [in doubt](Self::is_in_doubt).
    pub fn into_inner(self) -> Result<T, OwnerDied<T>> {
        let doubt = self.in_doubt_by();
        told(doubt, self.value.into_inner())
    }
}

impl<T: ?Sized> ShmMutex<T, Normal> {
    /// Locks it, waiting without limit.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`] if the value is in doubt; the caller holds the lock then, by the guard inside.
    ///
    /// # Blocking
    ///
    /// While another thread holds it: spins briefly, then sleeps. If the calling thread holds it: for ever.
    ///
    /// # If a process dies
    ///
    /// If it is the holder, the wait ends as soon as the death is announced; without a supervisor, within 5 ms.
    #[doc(alias = "Netmcore_mutex.lock")]
    #[inline]
    pub fn lock(&self) -> Result<ShmMutexGuard<'_, T>, OwnerDied<ShmMutexGuard<'_, T>>> {
        self.lock_waiting()
    }
}

impl<T: ?Sized> ShmMutex<T, ErrorChecking> {
    /// Locks it, waiting without limit.
    ///
    /// # Errors
    ///
    /// [`LockError::WouldDeadlock`] if the calling thread holds it; [`LockError::OwnerDied`] if the value is in doubt; the caller holds the
    /// lock then, by the guard inside.
    ///
    /// # Blocking
    ///
    /// While another thread holds it: spins briefly, then sleeps.
    ///
    /// # If a process dies
    ///
    /// If it is the holder, the wait ends as soon as the death is announced; without a supervisor, within 5 ms.
    #[inline]
    pub fn lock(
        &self,
    ) -> Result<ShmMutexGuard<'_, T, ErrorChecking>, LockError<ShmMutexGuard<'_, T, ErrorChecking>>>
    {
        let mine = held_by(Current.me());
        if !self.core.word.take_free(mine) {
            if self.owner() == owner_of(mine) {
                return Err(LockError::WouldDeadlock);
            }
            self.core.lock_slow(mine);
        }
        let (held, doubt) = self.core.held(mine);
        Ok(told(doubt, self.guard(held))?)
    }
}

impl<T: ?Sized, K: ExclusiveKind> ShmMutex<T, K> {
    /// Locks it if nobody alive holds it.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`] if the value is in doubt; the caller holds the lock then, by the guard inside.
    #[doc(alias = "Netmcore_mutex.try_lock")]
    #[allow(clippy::type_complexity, reason = "a guard, named twice")]
    #[inline]
    pub fn try_lock(
        &self,
    ) -> Result<Option<ShmMutexGuard<'_, T, K>>, OwnerDied<ShmMutexGuard<'_, T, K>>> {
        match self.core.try_lock() {
            None => Ok(None),
            Some((held, doubt)) => told(doubt, self.guard(held)).map(Some),
        }
    }

    /// Locks it, waiting until `deadline` at most.
    ///
    /// # Errors
    ///
    /// [`LockError::TimedOut`] if others hold it to the end; [`LockError::WouldDeadlock`] if the calling thread holds it and
    /// the kind is [`ErrorChecking`]; [`LockError::OwnerDied`] if the value is in doubt: the caller holds the lock then.
    ///
    /// # Blocking
    ///
    /// While another thread holds it, until the deadline. With a deadline in the past: not at all.
    pub fn lock_deadline(
        &self,
        deadline: Instant,
    ) -> Result<ShmMutexGuard<'_, T, K>, LockError<ShmMutexGuard<'_, T, K>>> {
        if K::IS_CHECKING && self.is_held_here() {
            return Err(LockError::WouldDeadlock);
        }
        let (held, doubt) = self.core.lock_deadline(deadline)?;
        Ok(told(doubt, self.guard(held))?)
    }

    /// Locks it, whatever the kind, when the calling thread does not hold it.
    #[inline]
    pub(crate) fn lock_waiting(
        &self,
    ) -> Result<ShmMutexGuard<'_, T, K>, OwnerDied<ShmMutexGuard<'_, T, K>>> {
        let (held, doubt) = self.core.lock();
        told(doubt, self.guard(held))
    }

    #[inline]
    fn guard<'a>(&'a self, held: Held<'a, K>) -> ShmMutexGuard<'a, T, K> {
        ShmMutexGuard { held, mutex: self }
    }
}

impl<T: ?Sized> ShmMutex<T, Recursive> {
    /// Locks it, waiting without limit; at once if the calling thread holds it already.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`] if the value is in doubt; the caller holds the lock then, by the guard inside. A thread that holds the lock already
    /// is not told again.
    ///
    /// # Panics
    ///
    /// If it is held 2³² times.
    ///
    /// # Blocking
    ///
    /// While another thread holds it: spins briefly, then sleeps.
    ///
    /// # Example
    ///
    /// ```
    /// use netmcore_sem::{ShmMutex, mutex::Recursive};
    /// use std::cell::Cell;
    ///
    /// let mutex = ShmMutex::<Cell<u32>, Recursive>::with_kind(Cell::new(1));
    /// let outer = mutex.lock().unwrap();
    /// mutex.lock().unwrap().set(outer.get() + 1);
    /// assert_eq!(outer.get(), 2);
    /// assert!(mutex.owner().is_some());
    /// drop(outer);
    /// assert!(mutex.owner().is_none());
    /// ```
    #[inline]
    pub fn lock(
        &self,
    ) -> Result<ShmRecursiveMutexGuard<'_, T>, OwnerDied<ShmRecursiveMutexGuard<'_, T>>> {
        let mine = held_by(Current.me());
        if !self.core.word.take_free(mine) {
            if let Some(held) = self.core.hold_again(mine) {
                return Ok(self.recursive_guard(held));
            }
            self.core.lock_slow(mine);
        }
        let (held, doubt) = self.core.held(mine);
        told(doubt, self.recursive_guard(held))
    }

    /// Locks it if the calling thread holds it, or nobody alive.
    ///
    /// # Errors
    ///
    /// As [`lock`](Self::lock).
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    pub fn try_lock(
        &self,
    ) -> Result<Option<ShmRecursiveMutexGuard<'_, T>>, OwnerDied<ShmRecursiveMutexGuard<'_, T>>>
    {
        if let Some(held) = self.core.hold_again(held_by(Current.me())) {
            return Ok(Some(self.recursive_guard(held)));
        }
        match self.core.try_lock() {
            None => Ok(None),
            Some((held, doubt)) => told(doubt, self.recursive_guard(held)).map(Some),
        }
    }

    /// Locks it, waiting until `deadline` at most; at once if the calling thread holds it already.
    ///
    /// # Errors
    ///
    /// [`LockError::TimedOut`] if others hold it to the end; [`LockError::OwnerDied`] as for [`lock`](Self::lock).
    ///
    /// # Panics
    ///
    /// As [`lock`](Self::lock).
    ///
    /// # Blocking
    ///
    /// While another thread holds it, until the deadline. With a deadline in the past: not at all.
    pub fn lock_deadline(
        &self,
        deadline: Instant,
    ) -> Result<ShmRecursiveMutexGuard<'_, T>, LockError<ShmRecursiveMutexGuard<'_, T>>> {
        if let Some(held) = self.core.hold_again(held_by(Current.me())) {
            return Ok(self.recursive_guard(held));
        }
        let (held, doubt) = self.core.lock_deadline(deadline)?;
        Ok(told(doubt, self.recursive_guard(held))?)
    }

    #[inline]
    fn recursive_guard<'a>(&'a self, held: Held<'a, Recursive>) -> ShmRecursiveMutexGuard<'a, T> {
        ShmRecursiveMutexGuard { held, mutex: self }
    }
}

impl<T: ?Sized, K: MutexKind> ShmMutex<T, K> {
    /// The value. Nobody else uses it, since the mutex is borrowed alone.
    ///
    /// # Errors
    ///
    /// [`OwnerDied`], with the reference as its guard, if the value is [in doubt](Self::is_in_doubt). It stays so: locking and
    /// unlocking says that all is well.
    pub fn get_mut(&mut self) -> Result<&mut T, OwnerDied<&mut T>> {
        let doubt = self.in_doubt_by();
        told(doubt, self.value.get_mut())
    }

    /// Who holds the lock, dead or alive. True only of the moment at which it was read.
    pub fn owner(&self) -> Option<OwnerId> {
        self.core.word.owner()
    }

    /// Whether the value may be half changed: the next to lock it will be told, or the one that has been told has it now. True
    /// only of the moment at which it was read.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt_by().is_some()
    }

    /// Where the value lies. Others may be using it: what may be done there is what a guard allows.
    pub fn data_ptr(&self) -> *mut T {
        self.value.get()
    }

    fn in_doubt_by(&self) -> Option<OwnerId> {
        let dead = self.owner().filter(|&owner| !Current.is_alive(owner));
        dead.or_else(|| owner_of(self.core.doubt.load(Ordering::Relaxed)))
    }

    #[inline]
    fn is_held_here(&self) -> bool {
        self.owner() == Some(Current.me())
    }
}

/// The value, or the guard of it, with the death that put it in doubt.
#[inline]
fn told<V>(doubt: Option<OwnerId>, value: V) -> Result<V, OwnerDied<V>> {
    match doubt {
        None => Ok(value),
        Some(owner) => Err(OwnerDied {
            owner,
            guard: value,
        }),
    }
}

impl Core {
    /// Takes the word, and says whose death has put the value in doubt.
    #[inline]
    fn lock<K: MutexKind>(&self) -> (Held<'_, K>, Option<OwnerId>) {
        let mine = held_by(Current.me());
        if !self.word.take_free(mine) {
            self.lock_slow(mine);
        }
        self.held(mine)
    }

    #[cold]
    fn lock_slow(&self, mine: u64) {
        match self.word.lock_slow(mine, &Current, None) {
            Outcome::TakenOver(dead) => self.take_over(dead),
            // Without a deadline nothing times out.
            Outcome::Free | Outcome::TimedOut => {}
        }
    }

    fn lock_deadline<K: MutexKind, G>(
        &self,
        deadline: Instant,
    ) -> Result<(Held<'_, K>, Option<OwnerId>), LockError<G>> {
        let mine = held_by(Current.me());
        if !self.word.take_free(mine) {
            let started = Instant::now();
            match self.word.lock_slow(mine, &Current, Some(deadline.into())) {
                Outcome::Free => {}
                Outcome::TakenOver(dead) => self.take_over(dead),
                Outcome::TimedOut => {
                    return Err(LockError::TimedOut {
                        waited: started.elapsed(),
                    });
                }
            }
        }
        Ok(self.held(mine))
    }

    #[inline]
    fn try_lock<K: MutexKind>(&self) -> Option<(Held<'_, K>, Option<OwnerId>)> {
        let mine = held_by(Current.me());
        match self.word.try_take(mine, &Current) {
            Outcome::Free => {}
            Outcome::TakenOver(dead) => self.take_over(dead),
            Outcome::TimedOut => return None,
        }
        Some(self.held(mine))
    }

    /// Sets right what lies beside a word that was taken from the dead.
    #[cold]
    fn take_over(&self, dead: OwnerId) {
        crash_point!("sem.mutex.taken_over");
        self.depth.store(0, Ordering::Relaxed);
        self.doubt.store(held_by(dead), Ordering::Relaxed);
        crash_point!("sem.mutex.in_doubt");
    }

    /// What holds the word that the caller has just taken, and whose death has put the value in doubt.
    #[inline]
    fn held<K: MutexKind>(&self, mine: u64) -> (Held<'_, K>, Option<OwnerId>) {
        // Relaxed: who wrote it has freed the word since, or is this thread.
        let doubt = self.doubt.load(Ordering::Relaxed);
        if K::IS_RECURSIVE && doubt & LEFT_AGAIN != 0 {
            // Told now, so that this holder may clear it.
            self.doubt.store(doubt & !LEFT_AGAIN, Ordering::Relaxed);
        }
        let doubt = owner_of(doubt);
        (Held::new(self, mine, doubt.is_some()), doubt)
    }

    /// Holds it once more, if the calling thread holds it.
    #[inline]
    fn hold_again(&self, mine: u64) -> Option<Held<'_, Recursive>> {
        if self.word.owner() != owner_of(mine) {
            return None;
        }
        let depth = self.depth.load(Ordering::Relaxed);
        let deeper = depth.checked_add(1).expect("held 2^32 times");
        self.depth.store(deeper, Ordering::Relaxed);
        crash_point!("sem.mutex.deeper");
        Some(Held::new(self, mine, false))
    }
}

/// The part of all guards that unlocks.
struct Held<'a, K: MutexKind> {
    core: &'a Core,
    /// The word as it was taken.
    mine: u64,
    /// Tells the holder from its forked copies.
    epoch: u64,
    /// Whether dropping it says that all is well again.
    is_told: bool,
    /// Whether the thread was panicking already when it locked.
    was_panicking: bool,
    _holding: Holding,
    kind: PhantomData<K>,
}

impl<'a, K: MutexKind> Held<'a, K> {
    #[inline]
    fn new(core: &'a Core, mine: u64, is_told: bool) -> Held<'a, K> {
        Held {
            core,
            mine,
            epoch: fork_epoch(),
            is_told,
            was_panicking: thread::panicking(),
            _holding: Holding::begin(),
            kind: PhantomData,
        }
    }

    #[inline]
    fn is_of_this_process(&self) -> bool {
        self.epoch == fork_epoch()
    }

    /// # Panics
    ///
    /// In a forked child.
    #[inline]
    #[track_caller]
    fn check(&self) {
        if !self.is_of_this_process() {
            not_held_here();
        }
    }

    #[cold]
    fn settle_doubt(&mut self) {
        if !self.is_of_this_process() {
            return;
        }
        if !self.was_panicking && thread::panicking() {
            self.leave_doubt();
        } else if self.is_told && self.core.doubt.load(Ordering::Relaxed) & LEFT_AGAIN == 0 {
            self.core.doubt.store(NO_DOUBT, Ordering::Relaxed);
            crash_point!("sem.mutex.cleared");
        }
    }

    fn leave_doubt(&mut self) {
        self.is_told = false;
        match self.core.doubt.load(Ordering::Relaxed) {
            NO_DOUBT => self.core.doubt.store(self.mine, Ordering::Relaxed),
            doubt if K::IS_RECURSIVE => {
                let marked = doubt | LEFT_AGAIN;
                self.core.doubt.store(marked, Ordering::Relaxed);
            }
            _ => {}
        }
        crash_point!("sem.mutex.left_in_doubt");
    }

    /// For the recursive kind: gives up one of several holds, and says whether it was one.
    #[inline]
    fn is_held_still(&self) -> bool {
        match self.core.depth.load(Ordering::Relaxed).checked_sub(1) {
            None => false,
            Some(less) => {
                self.core.depth.store(less, Ordering::Relaxed);
                crash_point!("sem.mutex.less_deep");
                true
            }
        }
    }
}

impl<K: MutexKind> Drop for Held<'_, K> {
    #[inline]
    fn drop(&mut self) {
        if self.is_told || (thread::panicking() && !self.was_panicking) {
            self.settle_doubt();
        }
        if self.is_of_this_process() && !(K::IS_RECURSIVE && self.is_held_still()) {
            self.core.word.unlock(self.mine);
        }
    }
}

#[cold]
#[track_caller]
fn not_held_here() -> ! {
    panic!("this guard is a forked copy: the parent process holds the lock")
}

/// Holds a [`ShmMutex`], gives its value, and unlocks it when dropped.
///
/// It belongs to the thread that has locked. A forked copy of it holds nothing, unlocks nothing, and panics when it is asked for the value.
///
/// ```compile_fail,E0277
/// let mutex = netmcore_sem::ShmMutex::new(5);
/// let guard = mutex.lock().unwrap();
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(guard)); // another thread
/// });
/// ```
#[must_use = "the lock is released when the guard is dropped"]
pub struct ShmMutexGuard<'a, T: ?Sized, K: ExclusiveKind = Normal> {
    held: Held<'a, K>,
    mutex: &'a ShmMutex<T, K>,
}

// SAFETY: through a shared reference it gives shared references to the value.
unsafe impl<T: ?Sized + Sync, K: ExclusiveKind> Sync for ShmMutexGuard<'_, T, K> {}

impl<'a, T: ?Sized, K: ExclusiveKind> ShmMutexGuard<'a, T, K> {
    /// Unlocks it, and leaves the value in doubt: the next to lock it is told, as if this one had died.
    ///
    /// For one that was told and cannot repair the value, or has itself made something of it that others must not rely on. Who was told by
    /// [`OwnerDied`] and passes it on as an error of another kind should call this first.
    ///
    /// ```
    /// use netmcore_sem::{ShmMutex, ShmMutexGuard};
    ///
    /// let mutex = ShmMutex::new(7);
    /// ShmMutexGuard::give_up(mutex.lock().unwrap());
    /// ShmMutexGuard::give_up(mutex.lock().unwrap_err().guard);
    /// let died = mutex.lock().unwrap_err();
    /// drop(died);
    /// assert!(mutex.lock().is_ok());
    /// ```
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn give_up(mut guard: Self) {
        guard.held.check();
        guard.held.leave_doubt();
    }

    /// Makes it a guard of a part of the value.
    ///
    /// ```
    /// use netmcore_sem::{ShmMutex, ShmMutexGuard};
    ///
    /// let mutex = ShmMutex::new((1, 2));
    /// let mut second = ShmMutexGuard::map(mutex.lock().unwrap(), |pair| &mut pair.1);
    /// *second += 1;
    /// drop(second);
    /// assert_eq!(*mutex.lock().unwrap(), (1, 3));
    /// ```
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn map<U: ?Sized>(
        mut guard: Self,
        part: impl FnOnce(&mut T) -> &mut U,
    ) -> MappedShmMutexGuard<'a, U, K> {
        let part = NonNull::from(part(&mut guard));
        MappedShmMutexGuard {
            held: guard.held,
            part,
            borrows: PhantomData,
        }
    }

    /// Makes it a guard of a part of the value, if there is one; else gives it back.
    ///
    /// # Errors
    ///
    /// The guard, if `part` gives nothing.
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn filter_map<U: ?Sized>(
        mut guard: Self,
        part: impl FnOnce(&mut T) -> Option<&mut U>,
    ) -> Result<MappedShmMutexGuard<'a, U, K>, Self> {
        match part(&mut guard).map(NonNull::from) {
            Some(part) => Ok(MappedShmMutexGuard {
                held: guard.held,
                part,
                borrows: PhantomData,
            }),
            None => Err(guard),
        }
    }

    /// What it is a guard of.
    pub(crate) fn mutex(guard: &Self) -> &'a ShmMutex<T, K> {
        guard.held.check();
        guard.mutex
    }
}

impl<T: ?Sized, K: ExclusiveKind> Deref for ShmMutexGuard<'_, T, K> {
    type Target = T;

    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        self.held.check();
        // SAFETY: this is the only guard (invariant 2), and it is borrowed as long as the value.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T: ?Sized, K: ExclusiveKind> DerefMut for ShmMutexGuard<'_, T, K> {
    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref_mut(&mut self) -> &mut T {
        self.held.check();
        // SAFETY: this is the only guard (invariant 2), and it is borrowed alone as long as the value.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T: ?Sized + fmt::Debug, K: ExclusiveKind> fmt::Debug for ShmMutexGuard<'_, T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Display, K: ExclusiveKind> fmt::Display for ShmMutexGuard<'_, T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Holds a [`ShmMutex`] and gives a part of its value: see [`ShmMutexGuard::map`].
#[must_use = "the lock is released when the guard is dropped"]
pub struct MappedShmMutexGuard<'a, U: ?Sized, K: ExclusiveKind = Normal> {
    held: Held<'a, K>,
    part: NonNull<U>,
    borrows: PhantomData<&'a mut U>,
}

// SAFETY: through a shared reference it gives shared references to the part.
unsafe impl<U: ?Sized + Sync, K: ExclusiveKind> Sync for MappedShmMutexGuard<'_, U, K> {}

impl<'a, U: ?Sized, K: ExclusiveKind> MappedShmMutexGuard<'a, U, K> {
    /// As [`ShmMutexGuard::give_up`].
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn give_up(mut guard: Self) {
        guard.held.check();
        guard.held.leave_doubt();
    }

    /// As [`ShmMutexGuard::map`].
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn map<V: ?Sized>(
        mut guard: Self,
        part: impl FnOnce(&mut U) -> &mut V,
    ) -> MappedShmMutexGuard<'a, V, K> {
        let part = NonNull::from(part(&mut guard));
        MappedShmMutexGuard {
            held: guard.held,
            part,
            borrows: PhantomData,
        }
    }
}

impl<U: ?Sized, K: ExclusiveKind> Deref for MappedShmMutexGuard<'_, U, K> {
    type Target = U;

    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &U {
        self.held.check();
        // SAFETY: a part of the value, borrowed from it for as long as this guard exists, which is the only one.
        unsafe { self.part.as_ref() }
    }
}

impl<U: ?Sized, K: ExclusiveKind> DerefMut for MappedShmMutexGuard<'_, U, K> {
    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref_mut(&mut self) -> &mut U {
        self.held.check();
        // SAFETY: as for `deref`; borrowed alone.
        unsafe { self.part.as_mut() }
    }
}

impl<U: ?Sized + fmt::Debug, K: ExclusiveKind> fmt::Debug for MappedShmMutexGuard<'_, U, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<U: ?Sized + fmt::Display, K: ExclusiveKind> fmt::Display for MappedShmMutexGuard<'_, U, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Holds a [`ShmMutex`] of the kind [`Recursive`], once; the last of them that is dropped unlocks it.
///
/// It gives shared references, because the same thread may have others: put a [`Cell`](std::cell::Cell) or an atomic behind it. It belongs to the thread that has locked. A forked copy of it holds
/// nothing, unlocks nothing, and panics when it is asked for the value.
///
/// ```compile_fail,E0277
/// use netmcore_sem::{ShmMutex, mutex::Recursive};
///
/// let mutex = ShmMutex::<u32, Recursive>::with_kind(5);
/// let guard = mutex.lock().unwrap();
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(guard)); // another thread
/// });
/// ```
#[must_use = "the lock is released when the guard is dropped"]
pub struct ShmRecursiveMutexGuard<'a, T: ?Sized> {
    held: Held<'a, Recursive>,
    mutex: &'a ShmMutex<T, Recursive>,
}

// SAFETY: it gives shared references to the value.
unsafe impl<T: ?Sized + Sync> Sync for ShmRecursiveMutexGuard<'_, T> {}

impl<T: ?Sized> ShmRecursiveMutexGuard<'_, T> {
    /// As [`ShmMutexGuard::give_up`]; the next is told once the last guard is gone.
    ///
    /// # Panics
    ///
    /// In a forked copy of the guard.
    pub fn give_up(mut guard: Self) {
        guard.held.check();
        guard.held.leave_doubt();
    }
}

impl<T: ?Sized> Deref for ShmRecursiveMutexGuard<'_, T> {
    type Target = T;

    /// # Panics
    ///
    /// In a forked copy of the guard.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        self.held.check();
        // SAFETY: all guards are in this thread (invariant 1), and none gives more than a shared reference.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for ShmRecursiveMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Display> fmt::Display for ShmRecursiveMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Default, K: MutexKind> Default for ShmMutex<T, K> {
    fn default() -> ShmMutex<T, K> {
        ShmMutex::with_kind(T::default())
    }
}

impl<T, K: MutexKind> From<T> for ShmMutex<T, K> {
    fn from(value: T) -> ShmMutex<T, K> {
        ShmMutex::with_kind(value)
    }
}

/// Says who holds it, not what it holds: that would need the lock.
impl<T: ?Sized, K: MutexKind> fmt::Debug for ShmMutex<T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmMutex")
            .field("owner", &self.owner())
            .field("is_in_doubt", &self.is_in_doubt())
            .finish_non_exhaustive()
    }
}

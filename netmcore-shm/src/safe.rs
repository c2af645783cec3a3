//! What may lie in shared memory: [`ShmSafe`], and the check of pointers when a value is put there.
//!
//! **Protocol.** A container in shared memory takes `T: ShmSafe` only, so the compiler refuses what belongs to one process. A value
//! that holds pointers into shared memory ([`HAS_POINTERS`](ShmSafe::HAS_POINTERS)) is asked for them
//! ([`visit_pointers`](ShmSafe::visit_pointers)) before it is put in: each must lie in the region of the container.
//!
//! | a value gets there | who asks |
//! |---|---|
//! | by a call that takes it: `new_in`, `push`, `insert`, `set`, `store` | the call: the value comes back with the error |
//! | through a claim of an array or a matrix | the claim, when it is dropped: a panic |
//! | by an assignment through any other `&mut`: a lock's guard, `DerefMut` of a `ShmBox`, an element of a `ShmVec` | nobody; who assigns calls [`HeapRef::check`] before |
//!
//! No guard stands behind such a `&mut`, or it is that of a lock, which knows of no heap. What comes of not asking: see [`HeapRef::check`].
//!
//! **Invariants.**
//! 1. What is `ShmSafe` means the same, at the same address, in every process that has its region mapped.
//! 2. In a region lie pointers into that region only, as far as it is asked. So a process that has the region has all that is reachable in it.
//!
//! **Not here.** Whether several processes may use a value at the same time: that is `Sync`, as for threads.
//!
//! # Safety
//!
//! The implementations here are for types whose bytes are the whole value (numbers, enums, addresses of the network,
//! moments of clocks that the machine's processes share), for the locks of netmcore-sem, which are made for
//! this, and for std's compositions of such types.

#![allow(unsafe_code)]

use crate::error::Error;
use crate::heap::HeapRef;
use netmcore_sem::{
    ErrorChecking, LockError, Normal, Recursive, ShmBarrier, ShmMutex, ShmMutexGuard, ShmOnceCell,
    ShmRecursiveMutexGuard, ShmRwLock, ShmSemaphore,
};
use std::any::type_name;
use std::cell::{Cell, UnsafeCell};
use std::cmp::Reverse;
use std::marker::{PhantomData, PhantomPinned};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::num::{self, Saturating, Wrapping};
use std::ops::{Bound, ControlFlow, Range, RangeFrom, RangeInclusive, RangeTo, RangeToInclusive};
use std::sync::atomic;

/// Types whose values may lie in memory that processes share.
///
/// Numbers, `bool`, `char`, tuples, arrays, `Option` and `Result` of such types are, and so are the types of this crate; structs and enums of
/// them are by `#[derive(ShmSafe)]`. What belongs to one process is not: `String`, `Vec`, `Box`, `Rc`, `Arc`, references, raw and
/// function pointers, trait objects, file descriptors, thread ids, std's locks, and hash maps with std's hasher, whose keys are
/// different in each process.
///
/// ```
/// use netmcore_shm::ShmSafe;
/// use std::sync::atomic::AtomicU64;
///
/// #[derive(ShmSafe)]
/// struct Progress<T> {
///     done: AtomicU64,
///     last: Option<T>,
/// }
///
/// fn is_shm_safe<T: ShmSafe>() {}
/// is_shm_safe::<Progress<[u32; 4]>>();
/// ```
///
/// ```compile_fail
/// # use netmcore_shm::ShmSafe;
/// #[derive(ShmSafe)]
/// struct Job {
///     name: String, // its bytes lie in the heap of one process
/// }
/// ```
///
/// # Safety
///
/// Who implements it by hand promises, of every value:
///
/// * It means the same in every process of the run. It holds nothing of one process: no pointers, references or slices
///   of private memory, no function pointers or vtables, no descriptors, no process-wide ids or seeds, neither itself nor in what it owns.
/// * It may be used and dropped in another process than the one that made it.
/// * [`visit_pointers`](Self::visit_pointers) reports every pointer into shared memory that it holds, and
///   [`HAS_POINTERS`](Self::HAS_POINTERS) is true if it may hold any.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot lie in shared memory",
    label = "`{Self}` is not `ShmSafe`",
    note = "a type of your own can be made so: `#[derive(ShmSafe)]`, if all its fields are",
    note = "instead of `String`, `Vec`, `Box`, `Rc` or `Arc`, `HashMap`, `Mutex` use `ShmString`, `ShmVec`, `ShmBox`, `ShmArc`, `ShmHashMap`, `ShmMutex`",
    note = "references, raw and function pointers, trait objects and file descriptors mean something in one process only: store a value, an index or an enum"
)]
pub unsafe trait ShmSafe: Send + 'static {
    /// Whether values may hold pointers into shared memory, for which [`visit_pointers`](Self::visit_pointers) must be asked.
    const HAS_POINTERS: bool = false;

    /// Reports each pointer into shared memory that the value holds itself, not those behind these.
    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        let _ = visit;
    }
}

/// Checks that every pointer that `value` holds lies where `is_inside` says so (invariant 2).
fn check_pointers<T: ShmSafe>(
    value: &T,
    is_inside: impl Fn(*const u8) -> bool,
) -> Result<(), Error> {
    if !T::HAS_POINTERS {
        return Ok(());
    }
    let mut foreign = None;
    value.visit_pointers(&mut |pointer| {
        if foreign.is_none() && !is_inside(pointer) {
            foreign = Some(pointer);
        }
    });
    match foreign {
        None => Ok(()),
        Some(pointer) => Err(Error::ForeignPointer {
            type_name: type_name::<T>(),
            address: pointer.addr(),
        }),
    }
}

impl HeapRef {
    /// Checks that every pointer that `value` holds lies in this heap's region, so that it may be put there.
    ///
    /// For containers, before they take the value in. Costs nothing for types without pointers. It also tells the owners in the value (boxes, vectors,
    /// handles) that they go into shared memory.
    ///
    /// Call it before you assign a value with pointers through a `&mut` into shared memory: through the guard of a lock, the `DerefMut` of a
    /// [`ShmBox`](crate::ShmBox), an element of a [`ShmVec`](crate::ShmVec). Nothing else asks there. Without it
    ///
    /// * pointers into another region are not found. A process that has not that region mapped is killed by `SIGSEGV` when it follows one: its place is
    ///   kept free in every process, so nothing else is read or changed;
    /// * an owner can be used, changed and dropped where it lies, by all; but if it is moved out by another process than the one that assigned it,
    ///   it is taken for a copy made by fork: it frees nothing, and panics when it is changed.
    ///
    /// ```
    /// use netmcore_sem::ShmMutex;
    /// use netmcore_shm::{Arena, Heap, ShmArc, ShmString};
    ///
    /// let arena = Arena::reserve(1 << 30)?;
    /// let heap = Heap::anonymous(&arena, 64 << 20)?;
    /// let title = ShmArc::new_in(&heap, ShmMutex::new(None))?;
    /// let text = ShmString::from_str_in(&heap, "assigned")?;
    /// heap.allocator().check(&text)?;
    /// *title.lock().unwrap() = Some(text); // any process can take it out
    ///
    /// let other = Heap::anonymous(&arena, 64 << 20)?;
    /// assert!(heap.allocator().check(&ShmString::from_str_in(&other, "foreign")?).is_err());
    /// # Ok::<(), netmcore_shm::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ForeignPointer`] with the first pointer that does not.
    pub fn check<T: ShmSafe>(self, value: &T) -> Result<(), Error> {
        check_pointers(value, |pointer| self.contains(pointer))
    }
}

// SAFETY: an address that is the same, and mapped, wherever the heap's region is; it reports it.
unsafe impl ShmSafe for HeapRef {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        visit(std::ptr::without_provenance(self.address()));
    }
}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: plain data, see the module's Safety; no pointers.
            #[diagnostic::do_not_recommend]
            unsafe impl ShmSafe for $type {}
        )*
    };
}

plain! {
    u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64, bool, char, (),
    num::NonZeroU8, num::NonZeroU16, num::NonZeroU32, num::NonZeroU64, num::NonZeroU128, num::NonZeroUsize,
    num::NonZeroI8, num::NonZeroI16, num::NonZeroI32, num::NonZeroI64, num::NonZeroI128, num::NonZeroIsize,
    atomic::AtomicBool, atomic::AtomicU8, atomic::AtomicU16, atomic::AtomicU32, atomic::AtomicU64,
    atomic::AtomicUsize, atomic::AtomicI8, atomic::AtomicI16, atomic::AtomicI32, atomic::AtomicI64,
    atomic::AtomicIsize,
    std::cmp::Ordering, std::convert::Infallible, std::fmt::Alignment, std::ops::RangeFull, PhantomPinned,
    std::alloc::Layout,
    // Of CLOCK_MONOTONIC and CLOCK_REALTIME, which all processes of the machine share.
    std::time::Duration, std::time::Instant, std::time::SystemTime,
    std::net::Ipv4Addr, std::net::Ipv6Addr, std::net::IpAddr,
    std::net::SocketAddrV4, std::net::SocketAddrV6, std::net::SocketAddr,
    netmcore_sem::OwnerId, netmcore_sem::LockWord, netmcore_sem::ShmCondvar,
    netmcore_sem::WaitWord,
    netmcore_sem::ShmEvent, netmcore_sem::ShmOnce,
}

// SAFETY: words that processes share.
#[diagnostic::do_not_recommend]
unsafe impl<const HOLDERS: usize> ShmSafe for ShmSemaphore<HOLDERS> {}

// SAFETY: words that processes share.
#[diagnostic::do_not_recommend]
unsafe impl<const SEATS: usize> ShmSafe for ShmBarrier<SEATS> {}

// SAFETY: words that processes share, and a value that is ShmSafe. What is put in later is not asked for its pointers, so a type that may have some
// is refused by the compiler where it is used.
unsafe impl<T: ShmSafe> ShmSafe for ShmOnceCell<T> {
    const HAS_POINTERS: bool = without_pointers::<T>();
}

macro_rules! composed {
    ($($type:ident<$($parameter:ident),*> { $self:ident, $visit:ident => $body:expr })*) => {
        $(
            // SAFETY: it holds nothing but values that are ShmSafe, and reports those of them that it holds now.
            unsafe impl<$($parameter: ShmSafe),*> ShmSafe for $type<$($parameter),*> {
                const HAS_POINTERS: bool = $($parameter::HAS_POINTERS)||*;

                fn visit_pointers(&$self, $visit: &mut dyn FnMut(*const u8)) {
                    $body
                }
            }
        )*
    };
}

composed! {
    Option<T> { self, visit => if let Some(value) = self { value.visit_pointers(visit) } }
    Result<T, E> {
        self, visit => match self {
            Ok(value) => value.visit_pointers(visit),
            Err(error) => error.visit_pointers(visit),
        }
    }
    ControlFlow<B, C> {
        self, visit => match self {
            ControlFlow::Break(value) => value.visit_pointers(visit),
            ControlFlow::Continue(value) => value.visit_pointers(visit),
        }
    }
    Bound<T> {
        self, visit => match self {
            Bound::Included(value) | Bound::Excluded(value) => value.visit_pointers(visit),
            Bound::Unbounded => {}
        }
    }
    Range<T> {
        self, visit => {
            self.start.visit_pointers(visit);
            self.end.visit_pointers(visit);
        }
    }
    RangeInclusive<T> {
        self, visit => {
            self.start().visit_pointers(visit);
            self.end().visit_pointers(visit);
        }
    }
    RangeFrom<T> { self, visit => self.start.visit_pointers(visit) }
    RangeTo<T> { self, visit => self.end.visit_pointers(visit) }
    RangeToInclusive<T> { self, visit => self.end.visit_pointers(visit) }
    Reverse<T> { self, visit => self.0.visit_pointers(visit) }
    Wrapping<T> { self, visit => self.0.visit_pointers(visit) }
    Saturating<T> { self, visit => self.0.visit_pointers(visit) }
    ManuallyDrop<T> { self, visit => (**self).visit_pointers(visit) }
}

// SAFETY: nothing lies there.
#[diagnostic::do_not_recommend]
unsafe impl<T: ?Sized + Send + 'static> ShmSafe for PhantomData<T> {}

// SAFETY: it holds a value that is ShmSafe, and reports what that holds.
unsafe impl<T: ShmSafe + Copy> ShmSafe for Cell<T> {
    const HAS_POINTERS: bool = T::HAS_POINTERS;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.get().visit_pointers(visit);
    }
}

// SAFETY: it holds a value that is ShmSafe, or rubbish that nobody may read. It cannot be asked for pointers,
// so a type that may have some is refused by the compiler where it is used.
unsafe impl<T: ShmSafe> ShmSafe for MaybeUninit<T> {
    const HAS_POINTERS: bool = without_pointers::<T>();
}

// SAFETY: as for MaybeUninit; here because somebody may be writing.
unsafe impl<T: ShmSafe> ShmSafe for UnsafeCell<T> {
    const HAS_POINTERS: bool = without_pointers::<T>();
}

/// False, or an error of compilation.
const fn without_pointers<T: ShmSafe>() -> bool {
    assert!(
        !T::HAS_POINTERS,
        "a MaybeUninit or UnsafeCell in shared memory cannot be asked for its pointers: implement ShmSafe for the type around it"
    );
    false
}

// SAFETY: it holds values that are ShmSafe, and reports what they hold.
unsafe impl<T: ShmSafe, const N: usize> ShmSafe for [T; N] {
    const HAS_POINTERS: bool = T::HAS_POINTERS;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        if T::HAS_POINTERS {
            self.iter().for_each(|value| value.visit_pointers(visit));
        }
    }
}

/// In no region.
const NOWHERE: *const u8 = std::ptr::null();

macro_rules! mutexes {
    ($($kind:ident: $guard:ident;)*) => {
        $(
            /// A mutex is asked for its pointers before others can see it, when it is free. While others hold it, it cannot be
            /// asked, so it cannot be put in.
            // SAFETY: words that processes share, and a value that is ShmSafe. It reports that value's pointers, or, where
            // it cannot, one that is in no region.
            unsafe impl<T: ShmSafe> ShmSafe for ShmMutex<T, $kind> {
                const HAS_POINTERS: bool = T::HAS_POINTERS;

                fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
                    match self.try_lock() {
                        Ok(Some(guard)) => guard.visit_pointers(visit),
                        Ok(None) => visit(NOWHERE),
                        Err(died) => {
                            died.guard.visit_pointers(visit);
                            $guard::give_up(died.guard);
                        }
                    }
                }
            }
        )*
    };
}

mutexes! {
    Normal: ShmMutexGuard;
    ErrorChecking: ShmMutexGuard;
    Recursive: ShmRecursiveMutexGuard;
}

/// As a mutex, it is asked before others can see it; while somebody writes, it cannot be put in.
// SAFETY: words that processes share, and a value that is ShmSafe, whose pointers it reports, or, where it cannot, one that is in no region.
unsafe impl<T: ShmSafe, const READERS: usize> ShmSafe for ShmRwLock<T, READERS> {
    const HAS_POINTERS: bool = T::HAS_POINTERS;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        match self.try_read() {
            Ok(Some(guard)) => guard.visit_pointers(visit),
            Err(LockError::OwnerDied(died)) => died.guard.visit_pointers(visit),
            Ok(None) | Err(_) => visit(NOWHERE),
        }
    }
}

macro_rules! tuples {
    ($($($name:ident)+;)*) => {
        $(
            // SAFETY: it holds values that are ShmSafe, and reports what they hold.
            unsafe impl<$($name: ShmSafe),+> ShmSafe for ($($name,)+) {
                const HAS_POINTERS: bool = $($name::HAS_POINTERS)||+;

                fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
                    #[allow(non_snake_case)]
                    let ($($name,)+) = self;
                    $($name.visit_pointers(visit);)+
                }
            }
        )*
    };
}

tuples! {
    A;
    A B;
    A B C;
    A B C D;
    A B C D E;
    A B C D E F;
    A B C D E F G;
    A B C D E F G H;
    A B C D E F G H I;
    A B C D E F G H I J;
    A B C D E F G H I J K;
    A B C D E F G H I J K L;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands for a pointer into shared memory.
    struct To(usize);

    // SAFETY: an address that nobody follows.
    unsafe impl ShmSafe for To {
        const HAS_POINTERS: bool = true;

        fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
            visit(std::ptr::without_provenance(self.0));
        }
    }

    fn pointers<T: ShmSafe>(value: &T) -> Vec<usize> {
        assert!(T::HAS_POINTERS);
        let mut seen = Vec::new();
        value.visit_pointers(&mut |pointer| seen.push(pointer.addr()));
        seen
    }

    #[test]
    fn compositions_report_every_pointer_they_hold() {
        assert_eq!(pointers(&(To(1), 5u8, [To(2), To(3)])), [1, 2, 3]);
        assert_eq!(pointers(&Some(To(4))), [4]);
        assert_eq!(pointers(&None::<To>), []);
        assert_eq!(pointers(&Ok::<To, u8>(To(5))), [5]);
        assert_eq!(pointers(&Err::<u8, To>(To(6))), [6]);
        assert_eq!(pointers(&(To(1)..To(2))), [1, 2]);
        assert_eq!(pointers(&(To(1)..=To(2))), [1, 2]);
        assert_eq!(pointers(&Bound::Excluded(To(9))), [9]);
        assert_eq!(pointers(&ControlFlow::<To, u8>::Break(To(3))), [3]);
        assert_eq!(pointers(&Reverse(Wrapping(ManuallyDrop::new(To(8))))), [8]);
    }

    #[test]
    fn lock_reports_what_it_holds_and_stays_as_it_is() {
        let mutex = ShmMutex::new([To(1), To(2)]);
        assert_eq!(pointers(&mutex), [1, 2]);
        let guard = mutex.lock().unwrap();
        assert_eq!(pointers(&mutex), [0], "cannot be asked: in no region");
        ShmMutexGuard::give_up(guard);
        assert_eq!(pointers(&mutex), [1, 2]);
        assert!(mutex.is_in_doubt(), "still");
        let recursive = ShmMutex::<_, Recursive>::with_kind(To(3));
        let _guard = recursive.lock().unwrap();
        assert_eq!(pointers(&recursive), [3]);
        assert_eq!(
            pointers(&ShmMutex::<_, ErrorChecking>::with_kind(To(4))),
            [4]
        );
        let lock = <ShmRwLock<_>>::new(To(5));
        assert_eq!(pointers(&lock), [5]);
        let _guard = lock.write().unwrap();
        assert_eq!(pointers(&lock), [0]);
    }

    #[test]
    fn plain_data_has_no_pointers() {
        fn has<T: ShmSafe>() -> bool {
            T::HAS_POINTERS
        }
        assert!(!has::<(u8, [f64; 3], Option<char>, std::net::SocketAddr)>());
        assert!(!has::<MaybeUninit<u64>>() && !has::<UnsafeCell<u64>>());
        assert!(!has::<PhantomData<String>>());
        assert!(!has::<ShmMutex<u64>>() && !has::<netmcore_sem::ShmCondvar>());
        assert!(has::<Cell<Option<u8>>>() == has::<u8>());
    }

    #[test]
    fn foreign_pointer_is_named() {
        let inside = |pointer: *const u8| (100..200).contains(&pointer.addr());
        assert!(check_pointers(&[To(100), To(199)], inside).is_ok());
        match check_pointers(&[To(100), To(0x1234)], inside) {
            Err(Error::ForeignPointer { type_name, address }) => {
                assert!(type_name.ends_with("To; 2]"), "{type_name}");
                assert_eq!(address, 0x1234);
            }
            other => panic!("{other:?}"),
        }
    }
}

//! Guards against a mutex that keeps less, or tells more or less, than its kind promises: among the threads of one process.
//!
//! A program of its own, since its threads act under the owners of the process, which other tests change.
//!
//! # Safety
//!
//! One transmutation, of zeros to a mutex, which is what is tested.

#![allow(unsafe_code)]

use netmcore_sem::mutex::MappedShmMutexGuard;
use netmcore_sem::{
    Current, LockError, Owners, Recursive, ShmMutex, ShmMutexGuard, ShmRecursiveMutexGuard,
};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

fn panics(body: impl FnOnce()) {
    assert!(catch_unwind(AssertUnwindSafe(body)).is_err());
}

#[test]
fn zeroed_memory_is_a_free_mutex() {
    let zeros = [0u64; size_of::<ShmMutex<u64>>() / 8];
    // SAFETY: of the same size and alignment, and zeros are valid for atomics and numbers.
    let mutex: ShmMutex<u64> = unsafe { std::mem::transmute(zeros) };
    assert_eq!(*mutex.lock().unwrap(), 0);
    assert_eq!(size_of::<ShmMutex<()>>(), 24);
}

#[test]
fn value_is_changed_by_one_thread_at_a_time() {
    let mutex = ShmMutex::new(0u64);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    *mutex.lock().unwrap() += 1;
                }
            });
        }
    });
    assert_eq!(mutex.into_inner().unwrap(), 80_000);
}

#[test]
fn holder_is_named_and_excludes_others_until_the_deadline() {
    let mutex = ShmMutex::new(1);
    let guard = mutex.lock().unwrap();
    assert_eq!(mutex.owner(), Some(Current.me()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(mutex.try_lock().unwrap().is_none());
            let wait = Duration::from_millis(10);
            let times_out = || {
                let deadline = Instant::now() + wait;
                let outcome = mutex.lock_deadline(deadline);
                assert!(Instant::now() >= deadline);
                match outcome {
                    Err(LockError::TimedOut { waited }) => waited >= wait,
                    other => panic!("{other:?}"),
                }
            };
            // Its clock begins in the call; again if this thread was held up before.
            assert!((0..20).any(|_| times_out()));
        });
    });
    drop(guard);
    assert_eq!(mutex.owner(), None);
    assert_eq!(*mutex.lock_deadline(Instant::now()).unwrap(), 1);
}

#[test]
fn panic_is_told_until_somebody_unlocks_in_order() {
    let mut mutex = ShmMutex::new(1);
    panics(|| {
        let _guard = mutex.lock().unwrap();
        panic!("on purpose");
    });
    assert_eq!(mutex.owner(), None);
    assert!(mutex.is_in_doubt());
    // Unwrapping panics, and dropping the guard in that panic repairs nothing.
    panics(|| drop(mutex.lock().unwrap()));
    panics(|| drop(mutex.try_lock().unwrap()));
    assert_eq!(mutex.get_mut().unwrap_err().owner, Current.me());
    let died = mutex.lock().unwrap_err();
    assert_eq!(died.owner, Current.me());
    assert!(mutex.is_in_doubt());
    drop(died);
    assert!(!mutex.is_in_doubt());
    assert_eq!(mutex.get_mut().unwrap(), &mut 1);
    panics(|| {
        let _guard = mutex.lock().unwrap();
        panic!("on purpose");
    });
    assert_eq!(mutex.into_inner().unwrap_err().guard, 1);
}

/// A destructor that locks and unlocks while its thread unwinds has done all it wanted.
#[test]
fn lock_taken_in_a_panic_is_not_in_doubt_after() {
    struct CountsAtEnd<'a>(&'a ShmMutex<u32>);
    impl Drop for CountsAtEnd<'_> {
        fn drop(&mut self) {
            *self.0.lock().unwrap() += 1;
        }
    }
    let mutex = ShmMutex::new(0);
    panics(|| {
        let _counts = CountsAtEnd(&mutex);
        panic!("on purpose");
    });
    assert_eq!(*mutex.lock().unwrap(), 1);
}

#[test]
fn parts_keep_the_lock_and_panics_in_them_count() {
    let mutex = ShmMutex::new((1, Some(2)));
    let first = ShmMutexGuard::map(mutex.lock().unwrap(), |pair| &mut pair.0);
    assert!(mutex.owner().is_some());
    assert_eq!(*first, 1);
    drop(first);
    let mut second = ShmMutexGuard::filter_map(mutex.lock().unwrap(), |pair| pair.1.as_mut());
    **second.as_mut().unwrap() += 1;
    let second = MappedShmMutexGuard::map(second.unwrap(), |number| number);
    drop(second);
    mutex.lock().unwrap().1 = None;
    let none = ShmMutexGuard::filter_map(mutex.lock().unwrap(), |pair| pair.1.as_mut());
    assert_eq!(*none.unwrap_err(), (1, None));
    assert_eq!(mutex.owner(), None);
    panics(|| {
        let _ = ShmMutexGuard::map(mutex.lock().unwrap(), |_| -> &mut u8 {
            panic!("on purpose")
        });
    });
    let first = ShmMutexGuard::map(mutex.lock().unwrap_err().guard, |pair| &mut pair.0);
    MappedShmMutexGuard::give_up(first);
    assert!(mutex.is_in_doubt());
}

#[test]
fn recursive_lock_is_free_after_as_many_unlocks_in_any_order() {
    let mutex: ShmMutex<_, Recursive> = Cell::new(0).into();
    let first = mutex.lock().unwrap();
    let second = mutex.try_lock().unwrap().unwrap();
    let third = mutex.lock_deadline(Instant::now()).unwrap();
    second.set(third.get() + 1);
    let others = |is_free: bool| {
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(mutex.try_lock().unwrap().is_some(), is_free));
        });
    };
    drop(first);
    others(false);
    drop(third);
    others(false);
    drop(second);
    others(true);
    assert_eq!(mutex.into_inner().unwrap().get(), 1);
}

/// The outer guard was not told of the panic, so it cannot say that all is well.
#[test]
fn panic_of_an_inner_hold_is_told_when_the_outer_is_gone() {
    let mutex: ShmMutex<_, Recursive> = Cell::new(0).into();
    let outer = mutex.lock().unwrap();
    panics(|| {
        let _inner = mutex.lock().unwrap();
        panic!("on purpose");
    });
    // It holds the lock: whoever it calls does not wait for it.
    drop(mutex.lock().unwrap());
    drop(outer);
    let told = mutex.lock().unwrap_err().guard;
    drop(mutex.lock().unwrap());
    ShmRecursiveMutexGuard::give_up(told);
    drop(mutex.lock().unwrap_err());
    drop(mutex.lock().unwrap());
}

#[test]
fn debug_shows_the_holder_and_takes_nothing() {
    let mutex = ShmMutex::new(5);
    let guard = mutex.lock().unwrap();
    assert!(format!("{mutex:?}").contains("owner: Some"), "{mutex:?}");
    assert_eq!(format!("{guard:?} {guard}"), "5 5");
    drop(guard);
    assert!(format!("{mutex:?}").contains("owner: None"), "{mutex:?}");
}

/// Whoever was told of the first doubt does not clear the second one, which another guard of the same thread leaves.
#[test]
fn doubt_that_an_inner_guard_leaves_is_told_though_the_outer_was_told() {
    let mutex = ShmMutex::<Cell<u32>, Recursive>::with_kind(Cell::new(0));
    ShmRecursiveMutexGuard::give_up(mutex.lock().unwrap());
    for _ in 0..2 {
        let outer = mutex.lock().unwrap_err().guard;
        ShmRecursiveMutexGuard::give_up(mutex.lock().unwrap());
        drop(outer);
        assert!(mutex.is_in_doubt());
    }
    let outer = mutex.lock().unwrap_err().guard;
    panics(|| {
        let _inner = mutex.lock().unwrap();
        panic!("on purpose");
    });
    drop(outer);
    // Told of all of it, and mended.
    drop(mutex.lock().unwrap_err());
    drop(mutex.lock().unwrap());
}

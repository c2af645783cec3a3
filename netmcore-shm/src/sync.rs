//! The atomics and cells that the protocols of collections are made of: std's, or loom's for model checking.
//!
//! A protocol that a model is to check lies in a module of its own, which takes these and knows nothing of heaps; under
//! `cfg(loom)` that module is public, so that a test program can use it.
//!
//! **Not here.** Any protocol; locks and waiting, which are netmcore-sem's and are loom's in models too.

#[allow(unused_imports, reason = "not every protocol uses each of them")]
pub(crate) use imp::*;

#[cfg(not(loom))]
#[allow(unused_imports, reason = "not every protocol uses each of them")]
mod imp {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    /// Nothing: the accesses around it are sequentially consistent.
    #[inline(always)]
    pub(crate) fn fence_in_models() {}

    /// As std's, with loom's way to get at what is inside.
    #[repr(transparent)]
    #[allow(dead_code, reason = "not every protocol uses it")]
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    #[allow(dead_code, reason = "as above")]
    impl<T> UnsafeCell<T> {
        pub(crate) const fn new(value: T) -> UnsafeCell<T> {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        /// Reads through the pointer: what `UnsafeCell::get` says about shared use holds.
        #[inline(always)]
        pub(crate) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
            read(self.0.get())
        }

        /// Writes through the pointer: what `UnsafeCell::get` says about exclusive use holds.
        #[inline(always)]
        pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

#[cfg(loom)]
#[allow(unused_imports, reason = "as above")]
mod imp {
    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    /// Loom takes sequentially consistent accesses for acquire and release; a fence it takes as what it is.
    pub(crate) fn fence_in_models() {
        fence(Ordering::SeqCst);
    }
}

//! A descriptor that children keep only if they are our workers.
//!
//! CLOEXEC is enough for children that exec. A child that some library forks would keep a copy for as long
//! as it lives, and could speak in the name of the worker that it came from.
//!
//! **If a process dies here** its descriptors go with it, and so does the registration.

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd as _};

use netmcore_sys::process;

/// A descriptor's owner; the descriptor is closed in all forks but ours.
#[derive(Debug)]
pub(crate) struct OwnFd<T: AsFd>(T);

impl<T: AsFd> OwnFd<T> {
    pub(crate) fn new(owner: T) -> OwnFd<T> {
        process::close_in_foreign_forks(owner.as_fd().as_raw_fd());
        OwnFd(owner)
    }
}

impl<T: AsFd> Deref for OwnFd<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: AsFd> Drop for OwnFd<T> {
    fn drop(&mut self) {
        // Before the number can be another descriptor's.
        process::close_in_foreign_forks_forget(self.0.as_fd().as_raw_fd());
    }
}

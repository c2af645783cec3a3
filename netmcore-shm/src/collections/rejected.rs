//! A value that a collection did not take, given back with the reason.

use crate::error::Error;
use std::fmt;

/// A value that was not taken in, and why. The collection is as it was before.
///
/// `?` turns it into the error alone where the value does not matter.
pub struct Rejected<T, E = Error> {
    /// What was to be put in. It belongs to the caller again.
    pub value: T,
    /// Why it was not.
    pub error: E,
}

impl<T, E> Rejected<T, E> {
    pub(crate) fn new(value: T, error: impl Into<E>) -> Rejected<T, E> {
        Rejected {
            value,
            error: error.into(),
        }
    }
}

impl<T, E: fmt::Debug> fmt::Debug for Rejected<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected")
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl<T, E: fmt::Display> fmt::Display for Rejected<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T, E: std::error::Error> std::error::Error for Rejected<T, E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<T> From<Rejected<T>> for Error {
    fn from(rejected: Rejected<T>) -> Error {
        rejected.error
    }
}

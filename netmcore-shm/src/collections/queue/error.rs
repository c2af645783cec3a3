//! Why an element was not pushed or popped; a value that was not taken in comes back.

use super::super::enrolment::Closed;
use crate::error::Error;
use std::fmt;
use std::time::Duration;

/// Why a value was not pushed. It comes back: [`into_value`](Self::into_value).
#[non_exhaustive]
pub enum PushError<T> {
    /// The queue is full; from `try_push`.
    Full {
        /// What was to be pushed.
        value: T,
    },
    /// There was no room until the deadline.
    TimedOut {
        /// What was to be pushed.
        value: T,
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// The queue is closed.
    Closed {
        /// What was to be pushed.
        value: T,
        /// Why it is closed.
        closed: Closed,
    },
    /// The value cannot lie in this heap ([`Error::ForeignPointer`]), or there is no memory for it.
    Refused {
        /// What was to be pushed.
        value: T,
        /// Why.
        error: Error,
    },
}

impl<T> PushError<T> {
    /// The value that was not pushed.
    pub fn into_value(self) -> T {
        match self {
            PushError::Full { value }
            | PushError::TimedOut { value, .. }
            | PushError::Closed { value, .. }
            | PushError::Refused { value, .. } => value,
        }
    }

    /// Whether waiting may help: the queue is or was full.
    pub fn is_full(&self) -> bool {
        matches!(self, PushError::Full { .. } | PushError::TimedOut { .. })
    }

    /// Whether the queue is closed.
    pub fn is_closed(&self) -> bool {
        matches!(self, PushError::Closed { .. })
    }
}

impl<T> fmt::Debug for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PushError::Full { .. } => f.debug_struct("Full").finish_non_exhaustive(),
            PushError::TimedOut { waited, .. } => f
                .debug_struct("TimedOut")
                .field("waited", waited)
                .finish_non_exhaustive(),
            PushError::Closed { closed, .. } => f
                .debug_struct("Closed")
                .field("closed", closed)
                .finish_non_exhaustive(),
            PushError::Refused { error, .. } => f
                .debug_struct("Refused")
                .field("error", error)
                .finish_non_exhaustive(),
        }
    }
}

impl<T> fmt::Display for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PushError::Full { .. } => f.write_str("the queue is full"),
            PushError::TimedOut { waited, .. } => {
                write!(f, "the queue had no room within {waited:?}")
            }
            PushError::Closed { closed, .. } => write!(f, "the queue is {closed}"),
            PushError::Refused { error, .. } => error.fmt(f),
        }
    }
}

impl<T> std::error::Error for PushError<T> {}

/// Why no element was popped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PopError {
    /// The queue is empty; from `try_pop`.
    Empty,
    /// There was no element until the deadline.
    TimedOut {
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// The queue is empty and closed.
    Closed(Closed),
}

impl PopError {
    /// Whether waiting may help: the queue is or was empty.
    pub fn is_empty(&self) -> bool {
        matches!(self, PopError::Empty | PopError::TimedOut { .. })
    }

    /// Whether the queue is closed.
    pub fn is_closed(&self) -> bool {
        matches!(self, PopError::Closed(_))
    }
}

impl fmt::Display for PopError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PopError::Empty => f.write_str("the queue is empty"),
            PopError::TimedOut { waited } => {
                write!(f, "the queue was empty for {waited:?}")
            }
            PopError::Closed(closed) => write!(f, "the queue is empty and {closed}"),
        }
    }
}

impl std::error::Error for PopError {}

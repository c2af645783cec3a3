//! Why a message was not sent or received; one that was not sent comes back.

use super::super::enrolment::Closed;
use crate::error::Error;
use netmcore_sem::OwnerId;
use std::fmt;
use std::time::Duration;

/// Why a message was not sent. It comes back: [`into_value`](Self::into_value).
#[non_exhaustive]
pub enum SendError<T> {
    /// No slot is free; from `try_send`.
    Full {
        /// What was to be sent.
        value: T,
    },
    /// No slot was free until the deadline.
    TimedOut {
        /// What was to be sent.
        value: T,
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// The mailbox is closed, or its receiver has ended.
    Closed {
        /// What was to be sent.
        value: T,
        /// Why it is closed.
        closed: Closed,
    },
    /// The receiver died, and there is no new one yet.
    ReceiverDied {
        /// What was to be sent.
        value: T,
        /// Who it was.
        owner: OwnerId,
    },
    /// The message cannot lie in this heap ([`Error::ForeignPointer`]).
    Refused {
        /// What was to be sent.
        value: T,
        /// Why.
        error: Error,
    },
}

impl<T> SendError<T> {
    /// The message that was not sent.
    pub fn into_value(self) -> T {
        self.replace(()).0
    }

    /// The message, and the error with something else in its place.
    pub(super) fn replace<U>(self, new: U) -> (T, SendError<U>) {
        match self {
            SendError::Full { value } => (value, SendError::Full { value: new }),
            SendError::TimedOut { value, waited } => {
                (value, SendError::TimedOut { value: new, waited })
            }
            SendError::Closed { value, closed } => {
                (value, SendError::Closed { value: new, closed })
            }
            SendError::ReceiverDied { value, owner } => {
                (value, SendError::ReceiverDied { value: new, owner })
            }
            SendError::Refused { value, error } => {
                (value, SendError::Refused { value: new, error })
            }
        }
    }

    /// Whether waiting may help: no slot is or was free.
    pub fn is_full(&self) -> bool {
        matches!(self, SendError::Full { .. } | SendError::TimedOut { .. })
    }
}

impl<T> fmt::Debug for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = match self {
            SendError::Full { .. } => f.debug_struct("Full"),
            SendError::TimedOut { .. } => f.debug_struct("TimedOut"),
            SendError::Closed { .. } => f.debug_struct("Closed"),
            SendError::ReceiverDied { .. } => f.debug_struct("ReceiverDied"),
            SendError::Refused { .. } => f.debug_struct("Refused"),
        };
        match self {
            SendError::Full { .. } => &mut debug,
            SendError::TimedOut { waited, .. } => debug.field("waited", waited),
            SendError::Closed { closed, .. } => debug.field("closed", closed),
            SendError::ReceiverDied { owner, .. } => debug.field("owner", owner),
            SendError::Refused { error, .. } => debug.field("error", error),
        }
        .finish_non_exhaustive()
    }
}

impl<T> fmt::Display for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Full { .. } => f.write_str("the mailbox has no free slot"),
            SendError::TimedOut { waited, .. } => {
                write!(f, "the mailbox had no free slot within {waited:?}")
            }
            SendError::Closed { closed, .. } => write!(f, "the mailbox is {closed}"),
            SendError::ReceiverDied { owner, .. } => {
                write!(f, "the receiver of the mailbox, {owner}, died")
            }
            SendError::Refused { error, .. } => error.fmt(f),
        }
    }
}

impl<T> std::error::Error for SendError<T> {}

/// Why no message was received.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecvError {
    /// None has arrived; from `try_recv`.
    Empty,
    /// None arrived until the deadline, or not as many as were waited for.
    TimedOut {
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// The mailbox is closed, and all that arrived has been received.
    Closed(Closed),
}

impl RecvError {
    /// Whether the mailbox is closed.
    pub fn is_closed(&self) -> bool {
        matches!(self, RecvError::Closed(_))
    }
}

impl fmt::Display for RecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecvError::Empty => f.write_str("no message has arrived"),
            RecvError::TimedOut { waited } => write!(f, "no message arrived within {waited:?}"),
            RecvError::Closed(closed) => {
                write!(f, "no message has arrived, and the mailbox is {closed}")
            }
        }
    }
}

impl std::error::Error for RecvError {}

/// A mailbox has one receiver at a time, and that one lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{owner} is the receiver of the mailbox")]
pub struct HasReceiver {
    /// Who it is.
    pub owner: OwnerId,
}

//! What can go wrong with semaphores and their containers.

use crate::container::SemId;
use netmcore_sys::{NameError, ObjectName, SysError};
use std::fmt;

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something about semaphores could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A semaphore (or a semaphore of the container) of that name exists already. It is left alone.
    #[error("the semaphore {name} exists already")]
    AlreadyExists {
        /// The name.
        name: ObjectName,
    },
    /// No semaphore can have that name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The record of persistent objects could not be changed.
    #[error("cannot record {doing}")]
    Record {
        /// Which change.
        doing: String,
        /// What the recorder said.
        source: std::io::Error,
    },
    /// Some semaphores of a container could not be removed. The others were; these stay recorded.
    #[error("cannot remove {}", Failures(.failures))]
    Unlink {
        /// All that are left, and why.
        failures: Vec<Error>,
    },
    /// All semaphores of a container in memory are in use by the living. Free some, or let it grow.
    #[error("all {capacity} semaphores of the container {prefix} are in use")]
    ContainerFull {
        /// The container.
        prefix: ObjectName,
        /// For how many it has room.
        capacity: u32,
    },
    /// The container has no such semaphore: it was freed, or its owner died, or it never was.
    #[error("the container {prefix} has no {id}")]
    NoSemaphore {
        /// The container.
        prefix: ObjectName,
        /// Which semaphore was asked for.
        id: SemId,
    },
    /// The memory holds no container that can be used: it was never finished, or was removed, or it is of another version.
    #[error("there is no semaphore container at {at:#x}: {reason}")]
    NoContainer {
        /// Where it should be.
        at: usize,
        /// What was found.
        reason: String,
    },
    /// The memory is too small for what was asked.
    #[error("a semaphore container needs {wanted_bytes} bytes, and there are {len_bytes}")]
    TooSmall {
        /// What is needed.
        wanted_bytes: usize,
        /// What there is.
        len_bytes: usize,
    },
    /// The container contradicts itself: somebody has written to its memory, or removed its semaphores behind its back.
    #[error("the container {prefix} is damaged: {invariant}")]
    Corrupt {
        /// The container.
        prefix: ObjectName,
        /// What does not hold.
        invariant: String,
    },
    /// A system call failed.
    #[error("cannot {doing}")]
    System {
        /// What was being done to which semaphore.
        doing: String,
        /// What the system said.
        source: SysError,
    },
}

impl Error {
    /// For `map_err` on system calls.
    pub(crate) fn system(doing: &str, name: &ObjectName) -> impl FnOnce(SysError) -> Error {
        let doing = format!("{doing} the semaphore {name}");
        |source| Error::System { doing, source }
    }

    /// For `map_err` on the recorder.
    pub(crate) fn record(
        what: &'static str,
        name: &ObjectName,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let doing = format!("{what} {name}");
        |source| Error::Record { doing, source }
    }
}

struct Failures<'a>(&'a [Error]);

impl fmt::Display for Failures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} semaphores", self.0.len())?;
        for failure in self.0 {
            write!(f, "; {failure}")?;
            let source = std::error::Error::source(failure);
            source.map_or(Ok(()), |source| write!(f, ": {source}"))?;
        }
        Ok(())
    }
}

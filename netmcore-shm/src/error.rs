//! What can go wrong with shared memory: which limit, how much was wanted, how much there is.

use crate::Block;
use netmcore_sys::{ObjectName, SysError};
use std::fmt;
use std::path::PathBuf;

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something about shared memory could not be done. After an error nothing half-done remains.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no range of addresses for an arena, not even of the smallest size. Raise `ulimit -v` (`RLIMIT_AS`).
    #[error(
        "cannot reserve {wanted_bytes} bytes of addresses for the arena (is the limit of address space, ulimit -v, too low?)"
    )]
    Reserve {
        /// The smallest length tried.
        wanted_bytes: usize,
        /// What the system said.
        source: SysError,
    },
    /// The arena has no such range left. Places are never used again: reserve a larger arena.
    #[error(
        "the arena of {limit_bytes} bytes is full: {wanted_bytes} bytes of addresses wanted, {free_bytes} left"
    )]
    ArenaFull {
        /// The length of the arena.
        limit_bytes: usize,
        /// The length of the place that was asked for.
        wanted_bytes: usize,
        /// What has not been placed.
        free_bytes: usize,
    },
    /// There is not enough memory, as far as can be told in advance.
    #[error("{wanted_bytes} bytes of shared memory wanted, {free_bytes} available: {limit}")]
    NoSpace {
        /// Which limit is in the way.
        limit: SpaceLimit,
        /// What was asked for.
        wanted_bytes: u64,
        /// What that limit leaves.
        free_bytes: u64,
    },
    /// The pool's own range is used up or too fragmented. Free something, or create it larger.
    #[error(
        "out of pool memory: {wanted_bytes} bytes wanted, {free_bytes} free, the largest free run has {largest_free_bytes}"
    )]
    OutOfPoolMemory {
        /// What was asked for.
        wanted_bytes: u64,
        /// Free bytes altogether.
        free_bytes: u64,
        /// The largest request that could be met.
        largest_free_bytes: u64,
    },
    /// The memory does not hold what the caller attaches to.
    #[error("{object} has the format {found:#x}, {expected:#x} was expected")]
    FormatMismatch {
        /// What was looked at.
        object: String,
        /// The magic number of this version.
        expected: u64,
        /// What is there; 0 if its creation was not finished.
        found: u64,
    },
    /// The block is none that this heap gave out, or it has been freed.
    #[error("{block:?} is not a block of this heap: {why}")]
    BadBlock {
        /// The claim.
        block: Block,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The memory breaks a rule that holds whatever process dies: a stray write, or a bug.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// An object of that name exists already. It is left alone, and so is the record.
    #[error("the shared memory object {name} exists already")]
    AlreadyExists {
        /// The name.
        name: ObjectName,
    },
    /// The record of persistent objects could not be changed.
    #[error("cannot record {doing}")]
    Record {
        /// Which change.
        doing: String,
        /// What the recorder said.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("cannot {doing}")]
    System {
        /// What was being done to which object.
        doing: String,
        /// What the system said.
        source: SysError,
    },
}

impl Error {
    /// For `map_err` on system calls.
    pub(crate) fn system(doing: impl Into<String>) -> impl FnOnce(SysError) -> Error {
        let doing = doing.into();
        |source| Error::System { doing, source }
    }
}

/// A rule that the memory breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object} is corrupt at offset {offset:#x}: {invariant}")]
pub struct Corrupt {
    /// What was looked at.
    pub object: String,
    /// Where, in bytes from its start.
    pub offset: u64,
    /// The rule, and what was found.
    pub invariant: String,
}

/// A limit of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpaceLimit {
    /// The size of the file system that the object lies in.
    Mount(PathBuf),
    /// The memory limit of a control group.
    Cgroup(PathBuf),
    /// The memory of the machine (`MemAvailable`).
    Machine,
    /// The limit of file sizes of this process, `RLIMIT_FSIZE`, which counts for shared memory too.
    FileSize,
    /// The kernel refused, without saying for which limit.
    Kernel,
}

impl fmt::Display for SpaceLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SpaceLimit::Mount(path) => write!(
                f,
                "the file system {} is full (raise its size: mount -o remount,size=…)",
                path.display()
            ),
            SpaceLimit::Cgroup(path) => {
                write!(
                    f,
                    "the memory limit of the control group {}",
                    path.display()
                )
            }
            SpaceLimit::Machine => f.write_str("the machine has no more memory available"),
            SpaceLimit::FileSize => {
                f.write_str("the limit of file sizes (ulimit -f) counts for shared memory too")
            }
            SpaceLimit::Kernel => f.write_str("the kernel has no more memory for this process"),
        }
    }
}

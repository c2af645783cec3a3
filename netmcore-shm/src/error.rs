//! What can go wrong with shared memory: which limit, how much was wanted, how much there is.

use crate::Block;
use crate::region::RegionId;
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
    /// The arena has no such range left. Places are never used again: reserve a larger arena, or make regions of a smaller
    /// maximum length. Where `ulimit -v` limits addresses, the arena is smaller than it was asked for.
    #[error(
        "the arena of {limit_bytes} bytes is full: {wanted_bytes} bytes of addresses wanted, {free_bytes} left; \
         give regions a smaller maximum length, or raise the limit of address space (ulimit -v) if there is one"
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
    /// The address is not that of a run of pages in use.
    #[error("{address:#x} is not a run of pages in use: {why}")]
    BadRun {
        /// The claim.
        address: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A value with a pointer to somewhere else was to be put into a region. Make both in the same heap, or store a descriptor.
    #[error(
        "a {type_name} with a pointer ({address:#x}) into another region, or into none, cannot be put into this one"
    )]
    ForeignPointer {
        /// The type of the value.
        type_name: &'static str,
        /// Where the pointer points to.
        address: usize,
    },
    /// The value is of another type than the one that was asked for.
    #[error("a shared value of type {expected} was expected, and it is {found}")]
    TypeMismatch {
        /// What was asked for.
        expected: &'static str,
        /// What there is, without paths.
        found: String,
    },
    /// The value that a descriptor names has lost its last handle.
    #[error(
        "the shared {type_name} number {index} is gone: its last handle was dropped; \
         keep a handle until the receiver has its own, or call keep on it"
    )]
    Gone {
        /// What was asked for.
        type_name: &'static str,
        /// Its number in the heap.
        index: u32,
    },
    /// A name of a shared value must not be empty, nor longer than the limit.
    #[error("a name of {len_bytes} bytes: 1 to {limit_bytes} are possible")]
    NameLength {
        /// The name's length.
        len_bytes: usize,
        /// The longest possible.
        limit_bytes: usize,
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
    /// There is no such region, or not for this process.
    #[error("{id} is not mapped here, and nobody knows how to attach to it")]
    NoRegion {
        /// Which.
        id: RegionId,
    },
    /// The supervisor does not attach this process to the region.
    #[error("{id}: {source}")]
    Refused {
        /// Which.
        id: RegionId,
        /// What the supervisor says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The calling thread has an entry of the map, which is locked, or is in a function that the map calls with the entry locked: it would
    /// wait for itself. Drop the entry first, or do it after the call.
    #[error("the calling thread holds an entry of this {what} already: it would wait for itself")]
    WouldDeadlock {
        /// The kind of collection.
        what: &'static str,
    },
    /// A region cannot be mapped there, or is not what is mapped there any more.
    #[error("{id} at {at:#x}: {why}")]
    WrongPlace {
        /// Which region.
        id: RegionId,
        /// The first address.
        at: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The record of persistent objects could not be changed.
    #[error("cannot record {doing}")]
    Record {
        /// Which change.
        doing: String,
        /// What the recorder said.
        source: std::io::Error,
    },
    /// A call of the standard library failed.
    #[error("cannot {doing}")]
    Io {
        /// What was being done to which object.
        doing: String,
        /// What it said.
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
    /// The maximum length of the region, which was chosen when it was made.
    Region,
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
            SpaceLimit::Region => {
                f.write_str("the region has a maximum length, given when it was made")
            }
            SpaceLimit::Kernel => f.write_str("the kernel has no more memory for this process"),
        }
    }
}

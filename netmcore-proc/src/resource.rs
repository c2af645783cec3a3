//! What a resource is, and who uses it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The eight types of managed resources.
#[doc(alias = "compute_resource_type")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum ResourceType {
    /// A temporary file.
    File,
    /// The means to start processes of one kind.
    ForkPoint,
    /// The means to wait for the results of processes of one kind.
    JoinPoint,
    /// A named POSIX semaphore.
    PosixSem,
    /// A POSIX shared memory object.
    PosixShm,
    /// A POSIX shared memory object that the manager created and placed in the arena.
    PosixShmPreallocated,
    /// The same with a semaphore container.
    PosixShmPreallocatedSc,
    /// A POSIX shared memory object with its semaphore container.
    PosixShmSc,
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ResourceType::File => "temporary file",
            ResourceType::ForkPoint => "fork point",
            ResourceType::JoinPoint => "join point",
            ResourceType::PosixSem => "named semaphore",
            ResourceType::PosixShm => "shared memory object",
            ResourceType::PosixShmPreallocated => "preallocated shared memory object",
            ResourceType::PosixShmPreallocatedSc => {
                "preallocated shared memory object with semaphore container"
            }
            ResourceType::PosixShmSc => "shared memory object with semaphore container",
        })
    }
}

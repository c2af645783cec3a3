//! What most programs name: `use netmcore::prelude::*`.
//!
//! From the standard library it has the types that occur in the signatures: paths, and the two kinds of time.

pub use std::path::{Path, PathBuf};
pub use std::time::{Duration, Instant};

pub use crate::{
    ForkPoint, JoinError, JoinPoint, Mailbox, Master, PopError, Process, ProcessId, RecvError,
    Running, ShmArc, ShmArray, ShmBarrier, ShmBox, ShmBuffer, ShmCell, ShmCondvar, ShmEvent,
    ShmHashMap, ShmMatrix, ShmMutex, ShmOnce, ShmQueue, ShmRwLock, ShmSafe, ShmSemaphore,
    ShmString, ShmVec, StartOptions, join_any, named, shared_heap, spawn,
};

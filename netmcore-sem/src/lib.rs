#![doc = include_str!("../README.md")]

pub mod barrier;
pub mod condvar;
pub mod container;
#[cfg(not(loom))]
pub mod current;
#[cfg(loom)]
#[path = "current/model.rs"]
pub mod current;
pub mod error;
pub mod event;
mod lock_error;
pub mod mutex;
pub mod named;
pub mod once;
pub mod owner;
pub mod rwlock;
pub mod semaphore;
mod spin;
mod sync;
pub mod wait;
pub mod word;

pub use barrier::{BarrierError, BarrierPass, ShmBarrier, ShmParticipant};
pub use condvar::{ShmCondvar, WaitEnd};
pub use container::{Backend, InMemory, Sem, SemContainer, SemId, SemMemory, have_anon_semaphores};
pub use current::Current;
pub use error::{Error, Result};
pub use event::ShmEvent;
pub use lock_error::{LockError, OwnerDied};
pub use mutex::{
    ErrorChecking, Normal, Recursive, ShmMutex, ShmMutexGuard, ShmRecursiveMutexGuard,
};
pub use named::NamedSemaphore;
pub use once::{ShmOnce, ShmOnceCell, ShmOnceState};
pub use owner::{OwnerId, Owners, SoloOwners, Waiting, announce_death};
pub use rwlock::{RwLockResult, ShmReadGuard, ShmRwLock, ShmWriteGuard};
pub use semaphore::{ShmPermits, ShmSemaphore};
pub use wait::WaitWord;
pub use word::{LockGuard, LockWord};
// What the calls here take and give.
pub use netmcore_sys::{NameError, NoRecord, ObjectKind, ObjectName, Recorder, SysError};

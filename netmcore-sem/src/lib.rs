#![doc = include_str!("../README.md")]

pub mod container;
pub mod error;
pub mod named;
pub mod owner;
mod spin;
mod sync;
pub mod word;

pub use container::SemContainer;
pub use error::{Error, Result};
pub use named::NamedSemaphore;
pub use owner::{OwnerId, Owners, SoloOwners, announce_death};
pub use word::{LockGuard, LockWord, OwnerDied, TimedLockError};
// What the calls here take and give.
pub use netmcore_sys::{NameError, NoRecord, ObjectKind, ObjectName, Recorder, SysError};

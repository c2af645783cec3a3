//! System calls for process-parallel programs on Linux: owned, typed, tested against the kernel.
//!
#![doc = include_str!("../README.md")]

pub mod crash;
pub mod error;
pub mod file_lock;
pub mod futex;
pub mod map;
pub mod name;
pub mod poll;
pub mod process;
pub mod record;
pub mod sem;
pub mod shm;
pub mod signal;
pub mod socket;
pub mod stack;

pub use error::{Errno, Result, SysError};
pub use name::{NameError, NameProblem, ObjectName};
pub use record::{NoRecord, ObjectKind, Recorder};

#![doc = include_str!("../README.md")]

pub mod owner;
mod spin;
mod sync;
pub mod word;

pub use owner::{OwnerId, Owners, SoloOwners, announce_death};
pub use word::{LockGuard, LockWord, OwnerDied, TimedLockError};

#![doc = include_str!("../README.md")]

pub mod anon;
pub mod arena;
pub mod error;
pub mod headroom;
pub mod object;
pub mod tagged_heap;

pub use anon::AnonRegion;
pub use arena::{Arena, Place};
pub use error::{Corrupt, Error, Result, SpaceLimit};
pub use headroom::{Headroom, headroom};
pub use object::ShmObject;
pub use tagged_heap::{Block, HeapStats, TaggedHeap};
// What the calls here take and give.
pub use netmcore_sem::{OwnerId, Owners, SoloOwners};
pub use netmcore_sys::map::Mapping;
pub use netmcore_sys::shm::Access;
pub use netmcore_sys::{NoRecord, ObjectKind, ObjectName, Recorder, SysError};

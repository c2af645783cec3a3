#![doc = include_str!("../README.md")]

// So that the derive's paths also hold in here.
extern crate self as netmcore_shm;

pub mod anon;
pub mod arc;
pub mod arena;
pub mod collections;
#[cfg(loom)]
pub mod epoch;
#[cfg(not(loom))]
mod epoch;
pub mod error;
pub mod headroom;
pub mod heap;
mod mark;
pub mod object;
pub mod pool;
pub mod region;
pub mod safe;
mod sync;
pub mod tagged_heap;

pub use anon::AnonRegion;
pub use arc::{Descriptor, RootInfo, RootState, SentHandle, ShmArc};
pub use arena::{Arena, Place};
pub use collections::hash_map;
pub use collections::mailbox::{HasReceiver, RecvError, SendError};
pub use collections::queue::{PopError, PushError};
pub use collections::{
    CellRef, ClaimError, Closed, ClosedBy, EnrolError, Mailbox, MailboxReceiver, MailboxSender,
    Message, NotExchanged, Rejected, ShmArray, ShmBox, ShmBuffer, ShmCell, ShmHashMap, ShmMatrix,
    ShmQueue, ShmString, ShmVec,
};
pub use error::{Corrupt, Error, Result, SpaceLimit};
pub use headroom::{Headroom, headroom};
pub use heap::{Heap, HeapRef, HeapStats};
pub use netmcore_shm_derive::ShmSafe;
pub use object::ShmObject;
pub use pool::{PagePool, PoolRef, PoolStats, Run};
pub use region::{
    Region, RegionId, Resolver, forget_regions, forget_regions_if, install_resolver, region_of,
    resolve,
};
pub use safe::ShmSafe;
pub use tagged_heap::{Block, TaggedHeap};
// What the calls here take and give.
pub use netmcore_sem::{OwnerId, Owners, SoloOwners};
pub use netmcore_sys::map::Mapping;
pub use netmcore_sys::shm::Access;
pub use netmcore_sys::{NoRecord, ObjectKind, ObjectName, Recorder, SysError};

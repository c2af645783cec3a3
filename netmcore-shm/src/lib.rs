//! Shared memory at one address: objects, arena, pages and blocks.

pub mod anon;
pub mod arena;
pub mod error;
pub mod headroom;
pub mod tagged_heap;

pub use anon::AnonRegion;
pub use arena::{Arena, Place};
pub use error::{Corrupt, Error, Result, SpaceLimit};
pub use headroom::{Headroom, headroom};
pub use tagged_heap::{Block, HeapStats, TaggedHeap};

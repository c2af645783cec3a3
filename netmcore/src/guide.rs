//! The guide: six chapters, each on its own page.

#[doc = include_str!("guide/processes.md")]
pub mod processes {}

#[doc = include_str!("guide/errors.md")]
pub mod errors {}

#[doc = include_str!("guide/resources.md")]
pub mod resources {}

#[doc = include_str!("guide/memory.md")]
pub mod memory {}

#[doc = include_str!("guide/collections.md")]
pub mod collections {}

#[doc = include_str!("guide/workers.md")]
pub mod workers {}

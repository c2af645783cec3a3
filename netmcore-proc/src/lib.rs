//! A master that forks workers, typed processes, and resources that never leak.

mod backtrace;
mod codec;
pub mod dynamic;
mod error;
mod id;
mod resource;
mod wire;

pub use backtrace::Backtrace;
pub use codec::Codec;
pub use error::{Error, ExceededLimit, JoinError, Result};
pub use id::{ProcessId, ResourceId};
pub use resource::{Inherit, ResourceRepr, ResourceType};
pub use wire::WireError;

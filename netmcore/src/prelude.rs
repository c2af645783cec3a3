//! What most programs name: `use netmcore::prelude::*`.
//!
//! From the standard library it has the types that occur in the signatures: paths, and the two kinds of time.

pub use std::path::{Path, PathBuf};
pub use std::time::{Duration, Instant};

pub use crate::{
    ForkPoint, JoinError, JoinPoint, Master, Process, ProcessId, Running, StartOptions, join_any,
    spawn,
};

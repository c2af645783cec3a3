//! The record of kernel-persistent objects, and recovery from it.
#![forbid(unsafe_code)]

pub mod controller;
pub mod error;
pub mod liveness;
pub mod log;
pub mod object;
pub mod record;
pub mod recovery;
pub mod trust;

pub use controller::ControllerSocket;
pub use error::{Error, Result};
pub use liveness::Liveness;
pub use log::Log;
pub use object::{InvalidName, KernelObject, NameRule, Unlinked};
pub use recovery::{Recovery, recover};
pub use trust::{Distrust, prepare_directory};

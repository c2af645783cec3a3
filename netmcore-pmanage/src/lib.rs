#![doc = include_str!("../README.md")]
//!
//! # Where to look
//!
//! A start goes through the modules in this order: [`trust`] (is the directory ours?), [`liveness`] (is the last program
//! dead?), [`recovery`] (what did it leave?), [`log`](mod@log) (register and unregister), [`controller`] (the socket). [`mod@record`] is
//! the text's grammar, [`object`] what a line names.
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

// What the functions above take and give, so that this crate is enough to use them.
pub use netmcore_sys::error::{Errno, SysError};
pub use netmcore_sys::name::{NameError, NameProblem, ObjectName};
pub use netmcore_sys::process::Pid;
pub use netmcore_sys::record::{NoRecord, ObjectKind, Recorder};
pub use netmcore_sys::socket::Listener;

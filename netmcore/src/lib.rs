//! Process-parallel computing: a lean master, typed worker processes, shared memory, and nothing left behind.
//!
//! The calling process becomes the *master*. It forks every *worker*, also when another worker asked for it, and never
//! computes. A worker runs one typed function on one argument, returns one result, and may be killed at any instruction:
//! whoever waits for it is told what became of it, and what it had is given back.
//!
//! # Features
//!
//! | feature | default | what it is |
//! | --- | --- | --- |
//! | `proc` | yes | master, workers, fork and join points, resources: what this page is about; needs `shm` and `pmanage` |
//! | `shm` | yes | shared memory at one address; needs `sem` |
//! | `sem` | yes | semaphores and locks that survive a dead owner; needs `sys` |
//! | `pmanage` | yes | the record of objects that outlive their process, and recovery; needs `sys` |
//! | `sys` | yes | system calls |
//! | `progress` | no | progress bars over running processes (`progress`); adds indicatif |
//! | `cli`, `ndarray`, `tokio` | no | reserved for the `netmcore` command, array views and async joins; each adds the dependency it will need (clap, ndarray, tokio) and nothing else yet |
//!
//! Each layer is a crate of its own and is useful alone; here they are the modules `sys`, `pmanage`, `sem`, `shm` and
//! `proc`.
//!
//! # Platform
//!
//! Linux. A program forks, so it has one thread when it becomes the master; more are refused with an error that names
//! their number.
#![forbid(unsafe_code)]

#[cfg(feature = "pmanage")]
#[doc(inline)]
pub use netmcore_pmanage as pmanage;
#[cfg(feature = "proc")]
#[doc(inline)]
pub use netmcore_proc as proc;
#[cfg(feature = "sem")]
#[doc(inline)]
pub use netmcore_sem as sem;
#[cfg(feature = "shm")]
#[doc(inline)]
pub use netmcore_shm as shm;
#[cfg(feature = "sys")]
#[doc(inline)]
pub use netmcore_sys as sys;

#[cfg(feature = "proc")]
#[doc(inline)]
pub use netmcore_proc::*;

#[cfg(feature = "progress")]
pub mod progress;

//! Process-parallel computing: a lean master, typed worker processes, shared memory, and nothing left behind.
//!
//! The calling process becomes the *master*. It forks every *worker*, also when another worker asked for it, and never
//! computes. A worker runs one typed function on one argument, returns one result, and may be killed at any instruction:
//! whoever waits for it is told what became of it, and what it had is given back.
//!
//! ```rust,standalone_crate
//! use netmcore::prelude::*;
//!
//! fn squares(dir: &Path) -> netmcore::Result<()> {
//!     let mut master = Master::builder(dir);                          // the socket directory: ours alone, mode 0700
//!     let square = master.def_process(|k: u64| k * k);                // captures allowed: defined before the first worker
//!     let sum = master.def_process(move |upto: u64| -> u64 {
//!         let running: Vec<_> = (1..=upto).map(|k| square.start(&k).unwrap()).collect();   // from a worker
//!         running.into_iter().map(|process| process.join().unwrap()).sum()                 // Result<u64, JoinError>
//!     });
//!     println!("{}", master.run(&sum, &10)?);                         // becomes the master; returns the first process's result
//!     Ok(())
//! }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! #     let dir = tempfile::tempdir()?;
//! #     Ok(squares(dir.path())?)
//! # }
//! ```
//!
//! The [`guide`] tells the rest in six chapters: [processes](guide::processes), [errors](guide::errors),
//! [resources](guide::resources), [shared memory](guide::memory), [collections and locks](guide::collections), and
//! [what a worker finds](guide::workers).
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
//! | `ndarray` | no | views of ndarray's over the parts of a shared matrix; needs `shm` |
//! | `cli`, `tokio` | no | reserved for the `netmcore` command and async joins; each adds the dependency it will need (clap, tokio) and nothing else yet |
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
#[cfg(feature = "sem")]
#[doc(inline)]
pub use netmcore_sem::{
    ShmBarrier, ShmCondvar, ShmEvent, ShmMutex, ShmOnce, ShmOnceCell, ShmRwLock, ShmSemaphore,
};
#[cfg(feature = "shm")]
#[doc(inline)]
pub use netmcore_shm::{
    Mailbox, PopError, PushError, RecvError, SendError, ShmArray, ShmBox, ShmBuffer, ShmCell,
    ShmHashMap, ShmMatrix, ShmQueue, ShmString, ShmVec, collections,
};

#[cfg(feature = "proc")]
pub mod guide;
#[cfg(feature = "proc")]
pub mod prelude;
#[cfg(feature = "progress")]
pub mod progress;

// Reserved features: the dependency is declared and built, and nothing uses it yet.
#[cfg(feature = "cli")]
use clap as _;
#[cfg(feature = "tokio")]
use tokio as _;

/// The examples in the READMEs are tests.
#[cfg(all(doctest, feature = "proc"))]
mod readme {
    #[doc = include_str!("../README.md")]
    struct OfThisCrate;
    #[doc = include_str!("../../README.md")]
    struct OfTheProject;
}

#![doc = include_str!("../README.md")]
//!
//! # The processes
//!
//! ```text
//!  your program ── run(&first, &arg) ──► master       forks, reaps, keeps the books; never computes
//!                                       ╱  │   ╲
//!                                worker  worker  ready worker, parked
//!                                 │  │     ▲        ▲
//!                     start(&arg) │  │     │ claims │ wakes
//!                                 │  │     │        │
//!                                 ▼  ▼ join│        │
//!                       control block: slots, arguments, results, deaths (a memfd, at one address)
//!
//!  worker ── manage, get, release ──► master ── records; unlinks, then drops ──► DIR/netplex.pmanage
//!    │        (frames over DIR/netplex.controller/admin)
//!    └── creates what is recorded
//! ```
//!
//! The slot of a process is the truth about it: free, being prepared, queued, running, done or failed, joined. Each step is one
//! atomic store, and a table says what the master makes of it when a party to it has died.
//!
//! # A worker's life
//!
//! 1. The master flushes its output and forks; the worker asks the kernel to be killed with its master.
//! 2. It closes the master's descriptors and restores signals and limits as the program had them.
//! 3. It parks, if it was forked in advance: a futex that a `start` wakes. It claims one queued process.
//! 4. It sets its limits, and calls the hooks of [`on_worker_start`].
//! 5. It decodes the argument; resources in it become its own.
//! 6. It runs the function. A panic is caught, with message, place and raw backtrace.
//! 7. It encodes the result; resources in it are told to the master, so that they outlive it.
//! 8. It gives up all its uses and flushes its output.
//! 9. It stores `Done` or `Failed` in the slot, and wakes its joiner.
//! 10. It leaves by `_exit`; the master reaps it and forks the next one.
//!
//! # Where to look
//!
//! `control` is the control block and its table of deaths; `point` starts and joins; `worker` is the list above; `master` is the
//! run from builder to end, with its loop in `run`, its decisions in `state`, the fork in `birth`; `manage` and `resource` are
//! resources, seen by their users and by the master; `wire` and `codec` are what travels.

mod abort;
mod backtrace;
mod codec;
mod context;
mod control;
pub mod debug;
pub mod dynamic;
mod error;
mod heap;
mod id;
mod inside;
mod manage;
mod master;
mod own_fd;
mod owners;
mod point;
mod region;
mod resource;
mod spawn;
mod wire;
mod worker;

pub use backtrace::Backtrace;
pub use codec::Codec;
pub use error::{Error, ExceededLimit, JoinError, Result};
pub use heap::{
    create_heap, create_heap_with_max, get_heap, get_named, named, remove_named, shared_heap,
    try_named,
};
pub use id::{ProcessId, ResourceId};
pub use inside::{command, on_worker_start, self_process_id, shutdown_requested, worker_seed};
pub use manage::{
    Resource, create_file, create_sem, create_shm, create_shm_sc, destroy_resources, get_file,
    get_resource, get_sem, get_sem_container, get_shm, manage_file, manage_sem, manage_shm,
    manage_shm_sc, release,
};
pub use master::{Controller, Master, ProcessOptions, record};
pub use point::{ForkPoint, JoinPoint, Process, Running, StartOptions, join_any};
pub use region::{create_preallocated_shm, create_preallocated_shm_sc, create_region, get_region};
pub use resource::{Inherit, ResourceRepr, ResourceType};
pub use spawn::{spawn, spawn_with};
pub use wire::WireError;

// What the functions above take and give, so that this crate is enough to use them.
pub use netmcore_pmanage::Log;
pub use netmcore_sem::{NamedSemaphore, SemContainer};
pub use netmcore_shm::{
    Access, Descriptor, Heap, HeapRef, HeapStats, Region, ShmArc, ShmObject, ShmSafe,
};
pub use netmcore_sys::{NameError, NoRecord, ObjectName, Recorder, SysError};

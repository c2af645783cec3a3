//! A master that forks workers, typed processes, and resources that never leak.

mod abort;
mod backtrace;
mod codec;
mod context;
mod control;
pub mod debug;
pub mod dynamic;
mod error;
mod id;
mod inside;
mod manage;
mod master;
mod own_fd;
mod point;
mod resource;
mod spawn;
mod wire;
mod worker;

pub use backtrace::Backtrace;
pub use codec::Codec;
pub use error::{Error, ExceededLimit, JoinError, Result};
pub use id::{ProcessId, ResourceId};
pub use inside::{command, on_worker_start, self_process_id, shutdown_requested, worker_seed};
pub use manage::{
    Resource, create_file, create_sem, create_shm, create_shm_sc, destroy_resources, get_file,
    get_resource, get_sem, get_sem_container, get_shm, manage_file, manage_sem, manage_shm,
    manage_shm_sc, release,
};
pub use master::{Controller, Master, ProcessOptions, record};
pub use point::{ForkPoint, JoinPoint, Process, Running, StartOptions, join_any};
pub use resource::{Inherit, ResourceRepr, ResourceType};
pub use spawn::spawn;
pub use wire::WireError;

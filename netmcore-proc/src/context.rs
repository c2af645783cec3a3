//! Who this process is: the master, a worker, or neither; and the run that it belongs to.
//!
//! One [`Runtime`] exists for each run. The master creates it before the first fork, so that every
//! worker finds it at the same address; a pointer to it and the role are the only globals. It is
//! never freed, because handles from an earlier run may still be asked; its control block is.
//!
//! # Safety
//! `RUNTIME` only ever holds null or a pointer from `Box::leak`. Definitions are not `Sync`; they
//! are called and changed only by the thread that forks (in the master) or was forked (in a worker),
//! which is the only thread of the process at that time (the fork is refused otherwise).
#![allow(unsafe_code)]

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use netmcore_shm::{AnonRegion, Arena};
use netmcore_sys::poll::EventFd;
use netmcore_sys::process::Pid;

use crate::control::{Control, Entry, WorkerIndex};
use crate::error::Error;
use crate::id::ProcessId;
use crate::own_fd::OwnFd;
use crate::worker::Body;

/// What the processes of one run share through fork.
pub(crate) struct Runtime {
    pub control: Control,
    /// Keeps the control block mapped until the next run begins.
    pub memory: Mutex<Option<(AnonRegion, Arena)>>,
    pub definitions: RwLock<Vec<Arc<Definition>>>,
    /// Addresses at which functions may lie, as they were when the run began.
    pub executable: Vec<Range<usize>>,
    /// Rung by workers when only the master can help.
    pub doorbell: Mutex<Option<Arc<OwnFd<EventFd>>>>,
    /// The process that is the master.
    pub master: Pid,
    /// The socket on which the master takes requests.
    pub admin_socket: PathBuf,
    /// Where the record of kernel-persistent objects is; `None` with `disable_pmanage`.
    pub recorded_dir: Option<PathBuf>,
    /// To what length the heap of named objects may grow, if that has been said.
    pub shared_heap_max_bytes: Option<u64>,
    /// Whether another process can run while this one spins.
    pub is_multiprocessor: bool,
    /// What worker seeds are derived from.
    pub seed: u64,
}

impl Runtime {
    /// Tells the master to look.
    pub(crate) fn ring(&self) -> Result<(), Error> {
        let doorbell = self.doorbell.lock().unwrap_or_else(PoisonError::into_inner);
        match &*doorbell {
            // Closed in the fork: the number may be another descriptor's by now.
            _ if role() == Role::Foreign => Ok(()),
            Some(doorbell) => doorbell
                .ring()
                .map_err(Error::system("ringing the master's doorbell")),
            None => Ok(()),
        }
    }

    /// What an entry runs, in words.
    pub(crate) fn describe(&self, entry: Entry) -> String {
        match entry {
            Entry::Spawned(address) => format!("a function at {address:#x}"),
            Entry::Defined(index) => {
                let definitions = self
                    .definitions
                    .read()
                    .unwrap_or_else(PoisonError::into_inner);
                definitions
                    .get(index as usize)
                    .map_or("?", |definition| definition.name)
                    .to_owned()
            }
        }
    }
}

/// A process definition: its body, once it has one, and how it is called.
pub(crate) struct Definition {
    pub body: std::sync::OnceLock<BodyCell>,
    pub name: &'static str,
}

/// A body, which only one thread of each process ever calls (module docs).
pub(crate) struct BodyCell(pub Box<Body>);

// SAFETY: see the module docs: only the forking or forked thread touches it.
unsafe impl Send for BodyCell {}
// SAFETY: as above.
unsafe impl Sync for BodyCell {}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    None,
    Master,
    Worker,
    /// A child that the program or a library forked from a master or a worker: it has their memory, but
    /// not their descriptors, and must not speak in their name.
    Foreign,
}

static RUNTIME: AtomicPtr<Runtime> = AtomicPtr::new(std::ptr::null_mut());
static ROLE: AtomicU32 = AtomicU32::new(0);
/// The Unix pid of the process that has the role: forks that are not ours inherit the memory.
static ROLE_OF: AtomicU32 = AtomicU32::new(0);
static WORKER: AtomicU32 = AtomicU32::new(0);
static PROCESS: AtomicU64 = AtomicU64::new(0);

/// The run that this process belongs to.
pub(crate) fn runtime() -> Option<&'static Runtime> {
    // SAFETY: null or leaked (module docs).
    unsafe { RUNTIME.load(Acquire).as_ref() }
}

/// The run, or `NotRunning`.
pub(crate) fn running(call: &'static str) -> Result<&'static Runtime, Error> {
    runtime().ok_or(Error::NotRunning { call })
}

/// Makes `runtime` the run of this process and its future forks.
pub(crate) fn install(runtime: Runtime) -> &'static Runtime {
    let leaked = Box::leak(Box::new(runtime));
    RUNTIME.store(leaked, Release);
    leaked
}

/// Unmaps the control block of the last run: its handles are of no use any more.
pub(crate) fn retire_runtime() {
    let last = RUNTIME.swap(std::ptr::null_mut(), std::sync::atomic::Ordering::AcqRel);
    // SAFETY: null or leaked (module docs).
    if let Some(last) = unsafe { last.as_ref() } {
        *last.memory.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

pub(crate) fn role() -> Role {
    let role = match ROLE.load(Relaxed) {
        1 => Role::Master,
        2 => Role::Worker,
        _ => return Role::None,
    };
    match ROLE_OF.load(Relaxed) == std::process::id() {
        true => role,
        false => Role::Foreign,
    }
}

pub(crate) fn become_master() {
    ROLE_OF.store(std::process::id(), Relaxed);
    ROLE.store(1, Relaxed);
}

/// The process is neither master nor worker any more (or not yet).
pub(crate) fn become_nobody() {
    ROLE.store(0, Relaxed);
}

pub(crate) fn become_worker(index: WorkerIndex) {
    WORKER.store(index.0, Relaxed);
    PROCESS.store(0, Relaxed);
    ROLE_OF.store(std::process::id(), Relaxed);
    ROLE.store(2, Relaxed);
}

pub(crate) fn begin_process(process: ProcessId) {
    PROCESS.store(process.get(), Relaxed);
}

/// The worker table entry of this process; the master's in the master.
pub(crate) fn me() -> WorkerIndex {
    WorkerIndex(WORKER.load(Relaxed))
}

/// The process that this worker runs.
pub(crate) fn self_process() -> Option<ProcessId> {
    match PROCESS.load(Relaxed) {
        0 => None,
        id => Some(ProcessId::from_raw(id)),
    }
}

/// Spins for a few microseconds until `done`, if that has paid lately and another processor can do
/// the work meanwhile. A spinner whose partner has no processor to run on makes things slower.
pub(crate) fn spin(runtime: &Runtime, done: &dyn Fn() -> bool) {
    /// About 20 µs of loads and pauses.
    const ROUNDS: u32 = 400;
    /// Credit after a success; each failure takes one, and at 0 only every 16th call spins.
    const FULL_CREDIT: u32 = 4;
    static CREDIT: AtomicU32 = AtomicU32::new(FULL_CREDIT);
    static CALLS: AtomicU32 = AtomicU32::new(0);

    if !runtime.is_multiprocessor {
        return;
    }
    let credit = CREDIT.load(Relaxed);
    if credit == 0 && !CALLS.fetch_add(1, Relaxed).is_multiple_of(16) {
        return;
    }
    for _ in 0..ROUNDS {
        if done() {
            CREDIT.store(FULL_CREDIT, Relaxed);
            return;
        }
        for _ in 0..8 {
            std::hint::spin_loop();
        }
    }
    CREDIT.store(credit.saturating_sub(1), Relaxed);
}

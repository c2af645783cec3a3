//! What a worker can ask about itself, and what a program sets for all its workers.

use std::ffi::OsStr;
use std::process::Command;
use std::sync::PoisonError;

use netmcore_sys::process;

use crate::context::{self, Role};
use crate::control::Phase;
use crate::error::{Error, Result};
use crate::id::ProcessId;
use crate::worker;

/// Returns the id of the process that this worker runs.
///
/// # Errors
/// [`Error::NotInMaster`] in the master, [`Error::NotRunning`] in a process that is neither.
#[doc(alias = "Netmcore.self_process_id")]
pub fn self_process_id() -> Result<ProcessId> {
    let call = "self_process_id";
    match context::role() {
        Role::Worker => context::self_process().ok_or(Error::NotRunning { call }),
        Role::Master => Err(Error::NotInMaster { call }),
        Role::None | Role::Foreign => Err(Error::NotRunning { call }),
    }
}

/// Returns a seed for random number generators that no other process of the run has.
///
/// A generator that was seeded in the master gives the same numbers in every worker, since each worker
/// is a copy of the master: seed it anew with this, in the process or in a hook ([`on_worker_start`]).
/// Derived from the system's random source; the same for each call in one process.
///
/// # Errors
/// As for [`self_process_id`].
pub fn worker_seed() -> Result<[u8; 32]> {
    let process = self_process_id()?;
    let runtime = context::running("worker_seed")?;
    let mut state = runtime.seed ^ process.get().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut seed = [0; 32];
    for chunk in seed.chunks_exact_mut(8) {
        chunk.copy_from_slice(&split_mix(&mut state).to_le_bytes());
    }
    Ok(seed)
}

/// SplitMix64 (Steele, Lea and Flood, 2014): spreads a seed over all bits.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Has `hook` called at the start of each process, before its function: to reseed generators, or to
/// set up what each worker needs once. Called in the master, before the run or in a hook.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, on_worker_start, worker_seed};
/// use std::sync::Mutex;
///
/// static SEED: Mutex<[u8; 32]> = Mutex::new([0; 32]);
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// on_worker_start(|| *SEED.lock().unwrap() = worker_seed().unwrap())?;
/// let mut master = Master::builder(&directory);
/// let draw = master.def_process(|()| *SEED.lock().unwrap());
/// let first = master.def_process(move |()| {
///     let [one, other] = [(), ()].map(|()| draw.start(&()).unwrap());
///     assert_ne!(one.join().unwrap(), other.join().unwrap());
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::NotInWorker`].
pub fn on_worker_start(hook: fn()) -> Result<()> {
    if context::role() == Role::Worker {
        return Err(Error::NotInWorker {
            call: "on_worker_start",
        });
    }
    worker::START_HOOKS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(hook);
    if let (Role::Master, Some(runtime)) = (context::role(), context::runtime()) {
        runtime.control.advance_image();
    }
    Ok(())
}

/// Whether the master has asked all workers to end. A long computation that looks at this now and then
/// can end in order within the grace period; after it, workers are killed.
pub fn shutdown_requested() -> bool {
    context::runtime().is_some_and(|runtime| runtime.control.phase() != Phase::Running)
}

/// Makes a command whose child dies with this worker: SIGKILL by the kernel when the thread that
/// spawned it ends, however it ends. Children started otherwise are the program's own affair.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    process::command_dies_with_parent(&mut command);
    command
}

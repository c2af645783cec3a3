//! Functions that need no definition: all workers are forks of one image, so a function that captures
//! nothing is known to all of them by its address.
//!
//! **Protocol.** [`spawn`] sends the address of a monomorphised entry, [`entry`]; the worker checks
//! that it lies in a range that was executable when the run began, and calls it.
//!
//! # Safety
//! The address in a slot was written by `spawn` in a process of the same image (the slot can be
//! written by nobody else), and it is checked against the executable ranges before it is called. The
//! function value is of a zero-sized `Copy` type of which a value existed (the argument of `spawn`).
#![allow(unsafe_code)]

use serde::Serialize;
use serde::de::DeserializeOwned;

use netmcore_shm::Block;

use crate::codec::Codec;
use crate::context::{self, Runtime};
use crate::control::{Entry, InheritOrder, Order};
use crate::error::{Error, Failure, Result};
use crate::id::ResourceId;
use crate::point::{Running, StartOptions, start};
use crate::worker::Call;

type EntryFn = fn(&Call<'_>) -> Result<Option<Block>, Failure>;

/// Starts a function that captures nothing as a process, without a definition.
///
/// `f` is a function or a closure without captures (the compiler refuses others); the rest is as in
/// [`Process::start`](crate::Process::start).
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, spawn};
///
/// fn fibonacci(n: u32) -> u64 {
///     if n < 2 {
///         return n.into();
///     }
///     let smaller = spawn(fibonacci, &(n - 2)).unwrap(); // runs beside this one
///     spawn(fibonacci, &(n - 1)).unwrap().join().unwrap() + smaller.join().unwrap()
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(fibonacci);
/// assert_eq!(master.run(&first, &6)?, 8);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`Process::start`](crate::Process::start), and [`Error::NotAFunctionOfThisProgram`] if `f`
/// lies in code that was loaded after the run began.
pub fn spawn<F, A, R>(f: F, arg: &A) -> Result<Running<R>>
where
    F: Fn(A) -> R + Copy + 'static,
    A: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    spawn_with(f, arg, StartOptions::default())
}

/// Starts a function that captures nothing as a process, with options; else as [`spawn`].
///
/// # Errors
/// As for [`spawn`].
pub fn spawn_with<F, A, R>(f: F, arg: &A, options: StartOptions) -> Result<Running<R>>
where
    F: Fn(A) -> R + Copy + 'static,
    A: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    const {
        assert!(
            size_of::<F>() == 0,
            "spawn takes functions and closures that capture nothing; use def_process for others"
        );
    }
    let _ = f;
    let runtime = context::running("spawn")?;
    let address = entry::<F, A, R> as EntryFn as usize;
    if !is_executable(runtime, address) {
        return Err(Error::NotAFunctionOfThisProgram { address });
    }
    let order = Order {
        entry: Entry::Spawned(address as u64),
        fork_point: 0,
        join_point: 0,
        codec: Codec::Bincode.number(),
        detached: false,
        memory_limit_bytes: None,
        time_limit_ns: None,
        inherit: InheritOrder::All,
    };
    let process = start(runtime, Codec::Bincode, arg, order, &options)?;
    Ok(Running::new(
        process,
        ResourceId::from_raw(0),
        None,
        Codec::Bincode,
    ))
}

/// What a worker runs for `spawn::<F, A, R>`.
fn entry<F, A, R>(call: &Call<'_>) -> Result<Option<Block>, Failure>
where
    F: Fn(A) -> R + Copy + 'static,
    A: DeserializeOwned,
    R: Serialize,
{
    // SAFETY: F is zero-sized (checked at compile time in `spawn`, the only place that names this
    // entry), so the read touches no memory; it is Copy, and the caller of `spawn` had a value of it.
    let f: F = unsafe { std::ptr::NonNull::<F>::dangling().read() };
    call.run(&f)
}

fn is_executable(runtime: &Runtime, address: usize) -> bool {
    runtime
        .executable
        .iter()
        .any(|range| range.contains(&address))
}

/// Runs the entry at `address` in a worker.
pub(crate) fn call(
    runtime: &Runtime,
    address: u64,
    call: &Call<'_>,
) -> Result<Option<Block>, Failure> {
    let address = address as usize;
    if !is_executable(runtime, address) {
        let error = Error::NotAFunctionOfThisProgram { address };
        return Err(Failure::NotStarted {
            reason: error.to_string(),
        });
    }
    // SAFETY: the address comes from `spawn` in a process of this image and lies in its code (module
    // docs), so it is that of an `EntryFn`.
    let entry: EntryFn = unsafe { std::mem::transmute::<usize, EntryFn>(address) };
    entry(call)
}

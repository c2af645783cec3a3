//! Inside the child: reset, park, decode, run, encode, exit.
//!
//! **Protocol.** A worker's life, in order: it asks for SIGKILL on its master's death and checks that
//! the master is still there; closes the master's descriptors; restores signals and limits; parks
//! (ready workers) until it claims a process; decodes the argument; runs the function; encodes the
//! result; gives up its uses; flushes its output; stores `Done`; exits by `_exit`.
//!
//! **Invariants.**
//! 1. Before `Done` is stored, everything that a joiner could notice of the worker has happened.
//! 2. No code of the master runs in a worker: the child never returns from [`live`].
//!
//! **If the worker dies here** the master settles its slot (see `control`); uses and connections end
//! with the process.
//!
//! **Not here:** who forks and reaps (`master`).

use std::any::type_name;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use netmcore_shm::{Block, SentHandle};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use netmcore_sys::process::{self, Limit};

use crate::abort;
use crate::backtrace::user_code;
use crate::codec::{self, Codec, EncodeError};
use crate::context::{self, Runtime};
use crate::control::{Control, Entry, Job, Parked, WorkerIndex};
use crate::error::{Error, Failure};
use crate::id::ProcessId;
use crate::manage;
use crate::master::Inheritance;
use crate::owners;
use crate::region;
use crate::resource::Leg;
use crate::spawn;

/// The type-erased body of a process: decode, call, encode.
pub(crate) type Body = dyn Fn(&Call<'_>) -> Result<Option<Block>, Failure>;

/// How a newborn worker gets its work.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Birth {
    /// Parked at this place until something is queued.
    Ready { place: u32, image: u32 },
    /// The master has claimed this process for it.
    For(ProcessId),
}

/// One call of a body.
pub(crate) struct Call<'a> {
    runtime: &'a Runtime,
    job: Job,
    codec: Codec,
}

impl Call<'_> {
    /// Decodes the argument, calls `f`, and encodes its result into a block.
    pub(crate) fn run<A, R>(&self, f: &dyn Fn(A) -> R) -> Result<Option<Block>, Failure>
    where
        A: DeserializeOwned,
        R: Serialize,
    {
        let control = &self.runtime.control;
        let argument = match self.job.argument.map(|block| control.bytes(block)) {
            Some(Err(error)) => {
                return Err(Failure::ArgumentUndecodable {
                    type_name: type_name::<A>().to_owned(),
                    reason: error.to_string(),
                });
            }
            bytes => {
                let bytes = bytes.and_then(Result::ok).unwrap_or(&[]);
                manage::receiving(|| codec::decode::<A>(self.codec, bytes))
                    .map_err(|error| Failure::argument_undecodable(&error))?
            }
        };
        control.free_argument(self.job.process);
        manage::landed_argument(self.job.process);
        let result = user_code(|| f(argument));
        leave_if_foreign(0);
        let (block, handles) = encode_block(
            self.runtime,
            self.codec,
            &result,
            self.job.process,
            Leg::Result,
        )
        .map_err(|error| match error {
            EncodeError::Codec(error) => Failure::result_not_encodable(&error),
            EncodeError::Place(error) => Failure::ResultNotDelivered {
                type_name: type_name::<R>().to_owned(),
                reason: error.to_string(),
            },
        })?;
        handles.into_iter().for_each(SentHandle::leave);
        crash_point!("proc.worker.encoded");
        Ok(Some(block))
    }
}

/// Encodes `value` into a block of `process`. What the value sends along (resources) is registered
/// with the master before anybody can find the block; handles of shared values are left to the message by the caller.
pub(crate) fn encode_block<T: Serialize + ?Sized>(
    runtime: &Runtime,
    codec: Codec,
    value: &T,
    process: ProcessId,
    leg: Leg,
) -> Result<(Block, Vec<SentHandle>), EncodeError<Error>> {
    let place = |len| runtime.control.place(len, process, context::me());
    let (place, sent) = manage::sending(|| codec::encode(codec, value, place));
    let place = place?;
    let mut ids = sent.resources;
    if leg == Leg::Result {
        // The receiver of an argument inherits its regions, or may not use them.
        ids.extend(sent.regions);
    }
    if !ids.is_empty() {
        manage::send(process, leg, ids).map_err(EncodeError::Place)?;
        if leg == Leg::Result {
            runtime.control.note_carries(process);
        }
    }
    Ok((place.keep(), sent.handles))
}

/// What a process says instead of a result. There is nothing to say it with if there is no memory for it.
fn encode_failure(runtime: &Runtime, failure: &Failure, process: ProcessId) -> Option<Block> {
    let encoded = encode_block(runtime, Codec::Bincode, failure, process, Leg::Result);
    encoded.ok().map(|(block, _)| block)
}

thread_local! {
    /// What the panic hook saw on this thread, for the `catch_unwind` below.
    static LAST_PANIC: RefCell<Option<Failure>> = const { RefCell::new(None) };
}

/// Hooks of the program that run at the start of each worker's process.
pub(crate) static START_HOOKS: Mutex<Vec<fn()>> = Mutex::new(Vec::new());

/// The whole life of a worker. Called in the child of a fork; never returns.
pub(crate) fn live(
    runtime: &'static Runtime,
    index: WorkerIndex,
    birth: Birth,
    inheritance: &Inheritance,
) -> ! {
    context::become_worker(index);
    owners::be_first_thread();
    manage::forget_uses();
    if !reset(inheritance) {
        process::exit_now(0);
    }
    let control = &runtime.control;
    let job = match birth {
        Birth::For(process) => control.job(process),
        Birth::Ready { place, image } => match control.park(index, place, image) {
            Parked::Retire => {
                control.sign_off(index);
                process::exit_now(0)
            }
            Parked::Serve { job, was_last } => {
                if was_last || job.time_limit_ns.is_some() || job.memory_limit_bytes.is_some() {
                    // A doorbell that cannot be rung means that the master is gone.
                    let _ = runtime.ring();
                }
                job
            }
        },
    };
    serve(runtime, index, job);
    control.sign_off(index);
    process::exit_now(0)
}

/// The first acts of a worker. False: the master is dead already.
fn reset(inheritance: &Inheritance) -> bool {
    const SIGKILL: i32 = 9;
    if !process::die_with_parent(inheritance.master, SIGKILL).unwrap_or(false) {
        return false;
    }
    inheritance.restore_in_worker();
    true
}

fn serve(runtime: &'static Runtime, index: WorkerIndex, job: Job) {
    let control = &runtime.control;
    let process = job.process;
    context::begin_process(process);
    control.note_start(process, Deadline::after(Duration::ZERO).as_nanos());
    // Aborts are looked at before they take effect: out of memory, a panic that could not unwind,
    // or neither.
    abort::diagnose();
    if let Some(bytes) = job.memory_limit_bytes {
        abort::expect_memory_limit();
        limit_memory(bytes);
    }
    region::forget_others(runtime, process);
    crash_point!("proc.worker.begin");
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        for hook in START_HOOKS
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .iter()
        {
            hook();
        }
        call(runtime, job)
    }));
    let outcome = outcome.unwrap_or_else(|payload| {
        leave_if_foreign(101);
        // Nothing was noted if the program has set a hook of its own since the run began, or has called
        // `resume_unwind`, which calls none; then there may be a note of a panic before it.
        let noted = LAST_PANIC
            .take()
            .filter(|noted| noted.is_of_panic(&*payload));
        Err(noted.unwrap_or_else(|| Failure::caught(&*payload)))
    });
    close_panic_notes(control, process);
    crash_point!("proc.worker.ran");
    if outcome.is_err() {
        control.drop_blocks(process);
    }
    let (succeeded, block) = match outcome {
        Ok(block) => (true, block),
        Err(failure) => (false, encode_failure(runtime, &failure, process)),
    };
    if succeeded {
        // Its contents are in order: what it leaves in heaps is not what the dead leave.
        netmcore_shm::Heap::leave();
    }
    manage::release_all_uses();
    flush_output();
    crash_point!("proc.worker.deliver");
    control.deliver(process, index, succeeded, block);
}

/// Ends a child that the function has forked and that came out of the function with its parent's stack: the
/// process is its parent's.
fn leave_if_foreign(code: i32) {
    if context::role() != context::Role::Worker {
        process::exit_now(code);
    }
}

fn call(runtime: &'static Runtime, job: Job) -> Result<Option<Block>, Failure> {
    let codec = Codec::from_number(job.codec);
    let call = Call {
        runtime,
        job,
        codec,
    };
    match job.entry {
        Entry::Defined(number) => {
            let definition = {
                let definitions = runtime
                    .definitions
                    .read()
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                definitions.get(number as usize).cloned()
            };
            match definition
                .as_ref()
                .and_then(|definition| definition.body.get())
            {
                Some(body) => (body.0)(&call),
                None => Err(Failure::NotStarted {
                    reason: format!(
                        "the process was declared, but `define` was never called for it (definition {number})"
                    ),
                }),
            }
        }
        Entry::Spawned(address) => spawn::call(runtime, address, &call),
    }
}

/// Limits all private writable memory of the process, its copy of the master's included: RLIMIT_DATA.
/// (RLIMIT_AS would count the arena.)
fn limit_memory(bytes: u64) {
    let limit = Limit {
        soft: Some(bytes),
        hard: Some(bytes),
    };
    // Refused only if the hard limit is lower already, and then that one holds.
    let _ = process::set_limit(process::Resource::DataBytes, limit);
}

pub(crate) fn flush_output() {
    use std::io::Write as _;
    // Whoever closed the other end of the output has had what it wanted.
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    process::flush_c_streams();
}

/// Puts a hook before the program's own that notes, in workers, what panicked and where. Addresses
/// are noted raw; the joiner resolves them. Works with `panic = "abort"`, too: the note is in the
/// slot before the process ends.
pub(crate) fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if context::role() == context::Role::Worker {
                note_panic(info);
            }
            next(info);
        }));
    });
}

fn note_panic(info: &std::panic::PanicHookInfo<'_>) {
    let (Some(runtime), Some(process)) = (context::runtime(), context::self_process()) else {
        return;
    };
    /// What the standard library says when a panic may not go on; the panic itself says more.
    const AFTERMATHS: [&str; 2] = [
        "panic in a destructor during cleanup",
        "panic in a function that cannot unwind",
    ];
    let is_aftermath = info
        .payload()
        .downcast_ref::<&str>()
        .is_some_and(|text| AFTERMATHS.contains(text));
    if is_aftermath && LAST_PANIC.with_borrow(Option::is_some) {
        return;
    }
    let failure = Failure::panicked(info);
    let _in_flight = runtime.control.enter(context::me());
    let is_open = PANIC_NOTES_OPEN
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if *is_open {
        // Nothing more can be done here if there is no memory for the note.
        let block = encode_failure(runtime, &failure, process);
        runtime.control.note_panic(process, block);
    }
    LAST_PANIC.set(Some(failure));
}

/// Panics of any thread are noted in the process's slot while it holds true; by one thread at a time.
static PANIC_NOTES_OPEN: Mutex<bool> = Mutex::new(true);

/// The process has survived its panics, and its slot will soon be another's.
fn close_panic_notes(control: &Control, process: ProcessId) {
    let mut is_open = PANIC_NOTES_OPEN
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    *is_open = false;
    control.note_panic(process, None);
}

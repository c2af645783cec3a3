//! What a worker that aborts says of itself: out of memory, a panic that could not unwind, or neither.
//!
//! The exit status says only SIGABRT. A handler looks once more before that takes effect: an allocation
//! that failed leaves ENOMEM in errno, or, where printing a backtrace has changed that, a call of
//! `handle_alloc_error` on the stack; and a panic that aborts has noted itself (see `worker`).
//!
//! # Safety
//! The handler is async-signal-safe: it reads statics, the errno that it is given, the stack as the kernel
//! copies it, and the panic count of the standard library (an atomic and a thread-local that is there from
//! the thread's start), and stores to atomics of the control block.
#![allow(unsafe_code)]

use std::alloc::{Layout, handle_alloc_error};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use netmcore_sys::stack::CallProbe;
use netmcore_sys::{Errno, signal};

use crate::context;
use crate::control::Outcome;

/// The program asked this worker to be limited in memory: an abort may mean that.
static MEMORY_LIMITED: AtomicBool = AtomicBool::new(false);

/// Whether this worker's main thread is inside `handle_alloc_error`. Unset, or `None`: only errno tells.
static ALLOCATION_FAILURE: OnceLock<Option<CallProbe>> = OnceLock::new();

/// From now on an abort after a failed allocation is one for lack of memory. Called by the worker's main thread,
/// before the limit is set: it allocates.
pub(crate) fn expect_memory_limit() {
    let failure: fn(Layout) -> ! = handle_alloc_error;
    ALLOCATION_FAILURE.get_or_init(|| CallProbe::new(failure as *const ()));
    MEMORY_LIMITED.store(true, Relaxed);
}

/// Installs the handler, unless the program has one of its own.
pub(crate) fn diagnose() {
    let is_default = signal::action(signal::SIGABRT).is_ok_and(|action| action.is_default());
    if is_default {
        // SAFETY: the hook is async-signal-safe (module docs). It fails for no valid signal.
        let _ = unsafe { signal::on_abort(note_cause) };
    }
}

extern "C" fn note_cause(errno: i32) {
    let (Some(runtime), Some(process)) = (context::runtime(), context::self_process()) else {
        return;
    };
    // A child that the worker forked otherwise dies for itself.
    if std::thread::panicking() || context::role() != context::Role::Worker {
        return;
    }
    // The panic that was noted has been caught: it is not what the process dies of.
    runtime.control.forget_panic(process);
    if MEMORY_LIMITED.load(Relaxed) && (errno == Errno::ENOMEM.raw() || has_allocation_failed()) {
        runtime
            .control
            .note_outcome(process, context::me(), Outcome::MemoryLimit);
    }
}

/// Async-signal-safe: the cell is only read, and was set before the limit.
fn has_allocation_failed() -> bool {
    let probe = ALLOCATION_FAILURE.get().and_then(Option::as_ref);
    probe.is_some_and(CallProbe::is_under_way)
}

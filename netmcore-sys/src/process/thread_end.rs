//! What is to be done at the very end of a thread, after the destructors of its thread-local variables.
//!
//! **Protocol.** Each thread that has something to do keeps a list of it behind a key of the C library. The C library destroys what is
//! behind keys after the variables that Rust and C++ know of; where Rust's own are behind a key too (musl), in no order: so the
//! list lets one round of such destructors pass first.
//!
//! **If a process dies here.** Nothing of this is done. A forked child has a copy of the list of the thread that forked.
//!
//! # Safety
//!
//! Unsafe code here calls `pthread_key_create`, `pthread_getspecific` and `pthread_setspecific`, and turns a box into the key's value and back.
//! The value is null or such a box, owned by the thread, and used by nobody else.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use crate::error::{Errno, SysError};

struct AtEnd {
    has_waited: bool,
    todo: Vec<Box<dyn FnOnce()>>,
}

/// Has `end` called by the calling thread as the last that it does: after the destructors of its thread-local variables.
///
/// What it calls must not need such variables, those without destructors excepted. It is not called for a thread that is killed with its
/// process, nor for the first thread of a process that exits. In a forked child it is called at the end of the copy of this thread, too.
///
/// # Errors
///
/// `EAGAIN` if the process uses all keys that the C library has (1024), `ENOMEM`: it will not be called then.
///
/// # Panics
///
/// A panic in `end` ends the process.
///
/// ```
/// use netmcore_sys::process::at_thread_end;
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// static IS_OVER: AtomicBool = AtomicBool::new(false);
/// let thread = std::thread::spawn(|| {
///     at_thread_end(Box::new(|| IS_OVER.store(true, Ordering::SeqCst))).unwrap();
///     assert!(!IS_OVER.load(Ordering::SeqCst));
/// });
/// thread.join().unwrap();
/// assert!(IS_OVER.load(Ordering::SeqCst));
/// ```
pub fn at_thread_end(end: Box<dyn FnOnce()>) -> Result<(), SysError> {
    let key = key()?;
    // SAFETY: a key that exists.
    let at = unsafe { libc::pthread_getspecific(key) }.cast::<AtEnd>();
    // SAFETY: null, or this thread's box, which nobody else uses.
    if let Some(list) = unsafe { at.as_mut() } {
        list.todo.push(end);
        return Ok(());
    }
    let list = Box::into_raw(Box::new(AtEnd {
        has_waited: false,
        todo: vec![end],
    }));
    let failed = keep(key, list);
    if failed != 0 {
        // SAFETY: the box was not kept.
        drop(unsafe { Box::from_raw(list) });
        return Err(error("pthread_setspecific", failed));
    }
    Ok(())
}

fn keep(key: libc::pthread_key_t, list: *mut AtEnd) -> c_int {
    // SAFETY: a key that exists; what is kept is given to `run` alone.
    unsafe { libc::pthread_setspecific(key, list.cast::<c_void>().cast_const()) }
}

/// The key, or the number of an error.
fn key() -> Result<libc::pthread_key_t, SysError> {
    static KEY: OnceLock<Result<libc::pthread_key_t, c_int>> = OnceLock::new();
    let created = KEY.get_or_init(|| {
        let mut key = 0;
        // SAFETY: writes the key; the destructor takes what `keep` has kept.
        match unsafe { libc::pthread_key_create(&raw mut key, Some(run)) } {
            0 => Ok(key),
            failed => Err(failed),
        }
    });
    created.map_err(|failed| error("pthread_key_create", failed))
}

fn error(call: &'static str, number: c_int) -> SysError {
    SysError::new(call, "the end of a thread", Errno::from_raw(number))
}

/// The C library calls it at the end of a thread, with what was kept, which is null by then.
extern "C" fn run(kept: *mut c_void) {
    let at = kept.cast::<AtEnd>();
    // SAFETY: the box that `at_thread_end` has kept.
    let list = unsafe { &mut *at };
    if !list.has_waited {
        list.has_waited = true;
        // The C library comes again, after the other keys. Where it does not, nothing remains to be waited for.
        if key().is_ok_and(|key| keep(key, at) == 0) {
            return;
        }
    }
    // SAFETY: as above; it is kept no more.
    for end in unsafe { Box::from_raw(at) }.todo {
        end();
    }
}

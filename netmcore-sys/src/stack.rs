//! Whether a function that never returns is being called right now: told from the stack, in a signal handler.
//!
//! **Protocol.** [`CallProbe::new`] notes in advance what cannot be found out in a handler: where the function's code
//! begins and ends, and where the thread's stack ends. [`CallProbe::is_under_way`] then looks at each word of the stack,
//! from its own frame to the end, for an address behind a call instruction of that function.
//!
//! **What it is worth.** Such an address is on the stack while the function calls another one. It may also be left over
//! in a slot that no live frame has written to, so the function must be one that never returns: then there is nothing
//! to be left over. What the probe itself leaves behind while it measures the function is overwritten.
//! Where return addresses are signed (pointer authentication on Arm), none is recognised.
//!
//! **Not here**: walking the frames, which takes locks and memory (the `backtrace` crate).
//!
//! # Safety
//!
//! The stack is read by the kernel (`process_vm_readv(2)` on this process), never through a pointer: an address that
//! is not mapped, or not the stack's, gives an error or useless words, not a fault. The other call is one of the
//! unwinder that std links, which only compares the address that it is given with its tables.
#![allow(unsafe_code)]

use crate::map;
use rustix::thread::{Pid, gettid};
use std::ffi::c_void;
use std::hint::black_box;
use std::mem;

/// No function that is of use here is longer, in bytes.
const MAX_FUNCTION_LEN: usize = 4096;

/// How far below the stack's end a frame may be, in bytes. The kernel keeps at least 128 MiB under the end of the main
/// stack free of other mappings, so what is nearer is not an alternate stack.
const MAX_DEPTH: usize = 64 << 20;

unsafe extern "C" {
    /// The start of the function that `pc`, a return address, lies in; null if none is known.
    fn _Unwind_FindEnclosingFunction(pc: *mut c_void) -> *mut c_void;
}

/// Tells whether the thread that made it is inside a call of one function.
#[derive(Debug)]
pub struct CallProbe {
    function: usize,
    /// Return addresses into the function are those of `function + 1 ..= function + len`. The sum is stored nowhere:
    /// it would be found on the stack.
    len: usize,
    thread: Pid,
    stack_end: usize,
}

impl CallProbe {
    /// A probe for calls of `function` by the calling thread.
    ///
    /// `function` is a function's address (`f as *const ()`), of one that never returns and calls another one out of
    /// line. `None` where nothing can be told: the function's length is unknown to the unwinder, or `/proc` is not
    /// mounted. Allocates and takes locks; not for handlers.
    pub fn new(function: *const ()) -> Option<CallProbe> {
        let len = function_len(function.addr());
        overwrite_unused_stack();
        let here = 0_u8;
        let stack = map::range_of((&raw const here).addr()).ok()??;
        Some(CallProbe {
            function: function.addr(),
            len: len?,
            thread: gettid(),
            stack_end: stack.end,
        })
    }

    /// Whether the function is being called by the calling thread, below this call.
    ///
    /// No in other threads than the one that made the probe (in a fork, that is every thread), on alternate stacks, more
    /// than 64 MiB into the stack, and where a filter of system calls forbids `process_vm_readv(2)`.
    /// Async-signal-safe, but for `errno`.
    pub fn is_under_way(&self) -> bool {
        if gettid() != self.thread {
            return false;
        }
        let mut words = [0_usize; 256];
        let mut at = (&raw const words).addr();
        if self.stack_end.wrapping_sub(at) > MAX_DEPTH {
            return false;
        }
        while at < self.stack_end {
            let count = words.len().min((self.stack_end - at) / size_of::<usize>());
            if count == 0 || !read_words(at, &mut words[..count]) {
                return false;
            }
            if words[..count].iter().any(|&word| self.returns_there(word)) {
                return true;
            }
            at += count * size_of::<usize>();
        }
        false
    }

    /// Whether `word` is a return address into the function. The call may be its last instruction, as it never returns:
    /// then the address is that of its end.
    fn returns_there(&self, word: usize) -> bool {
        word.wrapping_sub(self.function).wrapping_sub(1) < self.len
    }
}

/// The length of the function that starts at `start`, in bytes, by the unwinder's tables; one more with those unwinders
/// that take the byte before a return address for its place (libgcc's). No call ends one byte into the next function.
#[inline(never)]
fn function_len(start: usize) -> Option<usize> {
    let belongs = |len: &usize| {
        let pc = (start + len) as *mut c_void;
        // SAFETY: any address may be asked for: it is compared, not read.
        let found = unsafe { _Unwind_FindEnclosingFunction(pc) };
        found.addr() == start
    };
    let last = (1..MAX_FUNCTION_LEN).take_while(belongs).last()?;
    (last + 1 < MAX_FUNCTION_LEN).then_some(last + 1)
}

/// Overwrites what calls by the caller have left behind below its frame.
#[inline(never)]
fn overwrite_unused_stack() {
    black_box(&mut [0_usize; 4096]);
}

/// Copies words of this process's memory. False if not all of them can be read.
fn read_words(from: usize, to: &mut [usize]) -> bool {
    let len_bytes = mem::size_of_val(to);
    let local = libc::iovec {
        iov_base: to.as_mut_ptr().cast(),
        iov_len: len_bytes,
    };
    let remote = libc::iovec {
        iov_base: from as *mut c_void,
        iov_len: len_bytes,
    };
    // SAFETY: the local part is a slice that this function may write to, and any bytes are integers; the remote part is
    // checked by the kernel.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    usize::try_from(read) == Ok(len_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::MaybeUninit;
    use std::panic::{catch_unwind, panic_any};

    /// Does not return, and calls something out of line.
    #[inline(never)]
    fn leaves(with: fn()) -> ! {
        black_box(with)();
        panic_any(())
    }

    /// The function whose code is likely to come next.
    #[inline(never)]
    fn another(with: fn()) -> usize {
        black_box(with)();
        black_box(with) as usize
    }

    std::thread_local! {
        static PROBE: CallProbe = CallProbe::new(leaves as *const ()).unwrap();
    }

    fn expect(under_way: bool) {
        PROBE.with(|probe| assert_eq!(probe.is_under_way(), under_way));
    }

    #[test]
    fn call_is_seen_while_it_lasts() {
        expect(false);
        another(|| expect(false));
        catch_unwind(|| leaves(|| expect(true))).unwrap_err();
        catch_unwind(|| leaves(|| assert_ne!(another(|| expect(true)), 0))).unwrap_err();
    }

    #[test]
    fn making_a_probe_leaves_nothing_that_it_finds() {
        #[inline(never)]
        fn with_unwritten_slots(probe: &CallProbe) {
            let mut slots = MaybeUninit::<[usize; 2000]>::uninit();
            black_box(&mut slots);
            assert!(!probe.is_under_way());
        }
        for _ in 0..3 {
            let probe = CallProbe::new(leaves as *const ()).unwrap();
            with_unwritten_slots(&probe);
        }
    }

    #[test]
    fn other_threads_see_nothing() {
        static OTHERS: std::sync::OnceLock<CallProbe> = std::sync::OnceLock::new();
        OTHERS.get_or_init(|| CallProbe::new(leaves as *const ()).unwrap());
        let other = std::thread::spawn(|| {
            leaves(|| assert!(!OTHERS.get().unwrap().is_under_way()));
        });
        // It has panicked with what `leaves` panics with, not with the assertion's text.
        assert!(other.join().unwrap_err().is::<()>());
    }

    #[test]
    fn length_is_that_of_the_function() {
        let start = leaves as *const () as usize;
        let len = function_len(start).unwrap();
        assert!((8..1000).contains(&len), "{len}");
        // Not a function's start: belongs to it, but is not it.
        assert_eq!(function_len(start + 1), None);
        assert_eq!(function_len(8), None);
    }

    #[test]
    fn what_cannot_be_read_is_not_read() {
        let mut words = [0; 2];
        assert!(!read_words(8, &mut words));
        let there = [3_usize, 4];
        assert!(read_words((&raw const there).addr(), &mut words));
        assert_eq!(words, there);
    }
}

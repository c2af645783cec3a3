//! Where a worker was when it panicked: addresses now, names only when somebody reads them.
//!
//! **Protocol.** A dying worker captures raw return addresses, which takes microseconds and reads no debug information
//! (resolving the first symbol in a fresh process takes tens of milliseconds). Whoever prints the backtrace resolves
//! them: all workers are forks of one image, so an address means the same in each. What was resolved once is kept for
//! the life of the resolving process, so the same bug in a thousand workers is looked up once.
//!
//! **Trimming.** At the top, the frames of the capture and of the panic machinery are left out; at the bottom, all below
//! [`user_code`], through which workers call what the user wrote.

#![allow(dead_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// A deeper stack is cut off here, so that the record of a death stays small.
const FRAMES_MAX: usize = 256;

/// The call stack of a worker at the instant of its panic.
///
/// It travels as raw addresses. `Display` looks up names and lines, innermost frame first, and leaves out the frames
/// of the panic machinery; the first look-up in a process takes tens of milliseconds, later ones are cached. Names are
/// found when the program has symbols, lines when it has debug information.
///
/// A backtrace that comes from another image (another program, or another run of this one) prints its addresses only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backtrace {
    /// Where [`user_code`] lies in the process that captured this: tells whether the addresses mean anything here.
    image: u64,
    /// Return addresses, innermost first.
    addresses: Vec<u64>,
}

impl Backtrace {
    /// Captures the stack of the calling thread, without names.
    #[inline(never)]
    pub fn capture() -> Self {
        let mut addresses = Vec::with_capacity(32);
        ::backtrace::trace(|frame| {
            addresses.push(frame.ip() as u64);
            addresses.len() < FRAMES_MAX
        });
        Backtrace {
            image: image(),
            addresses,
        }
    }

    /// Returns the raw return addresses, innermost first.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    /// Says whether no frame was captured.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    fn is_of_this_image(&self) -> bool {
        self.image == image()
    }
}

/// Prints one frame in two lines, `N: function` and `at file:line:column`.
impl fmt::Display for Backtrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.addresses.is_empty() {
            return f.write_str("no frames were captured");
        }
        if !self.is_of_this_image() {
            f.write_str("captured in another image, so without names:")?;
            for (number, address) in self.addresses.iter().enumerate() {
                write!(f, "\n{number:4}: {address:#x}")?;
            }
            return Ok(());
        }
        let frames: Vec<Frame> = self.addresses.iter().flat_map(|&a| resolve(a)).collect();
        for (number, frame) in trim(&frames).iter().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            match &frame.function {
                Some(function) => write!(f, "{number:4}: {function}")?,
                None => write!(f, "{number:4}: {:#x}", frame.address)?,
            }
            if let Some(file) = &frame.file {
                write!(f, "\n             at {}", file.display())?;
                if let Some(line) = frame.line {
                    write!(f, ":{line}")?;
                    if let Some(column) = frame.column {
                        write!(f, ":{column}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Backtrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backtrace({} frames)", self.addresses.len())
    }
}

/// Calls what the user wrote; backtraces end here.
#[inline(never)]
pub(crate) fn user_code<R>(f: impl FnOnce() -> R) -> R {
    let result = f();
    // Keeps the call from becoming a tail call, which would leave no frame.
    std::hint::black_box(());
    result
}

fn image() -> u64 {
    Backtrace::capture as fn() -> Backtrace as usize as u64
}

/// One function of the stack; an address in inlined code stands for several.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Frame {
    address: u64,
    function: Option<String>,
    file: Option<PathBuf>,
    line: Option<u32>,
    column: Option<u32>,
}

/// Everything this process has resolved. It is bounded by the number of call sites in the program.
static RESOLVED: Mutex<Option<HashMap<u64, Vec<Frame>>>> = Mutex::new(None);

fn resolve(address: u64) -> Vec<Frame> {
    let mut resolved = RESOLVED.lock().unwrap_or_else(PoisonError::into_inner);
    let resolved = resolved.get_or_insert_default();
    if let Some(frames) = resolved.get(&address) {
        return frames.clone();
    }
    let mut frames = Vec::new();
    // `resolve` takes a return address, and itself looks up the call before it.
    ::backtrace::resolve(address as usize as *mut c_void, |symbol| {
        frames.push(Frame {
            address,
            // The alternate form leaves out the hash.
            function: symbol.name().map(|name| format!("{name:#}")),
            file: symbol.filename().map(PathBuf::from),
            line: symbol.lineno(),
            column: symbol.colno(),
        });
    });
    if frames.is_empty() {
        frames.push(Frame {
            address,
            function: None,
            file: None,
            line: None,
            column: None,
        });
    }
    resolved.insert(address, frames.clone());
    frames
}

/// Cuts off what is not the user's, at both ends; gives all when nothing would be left.
fn trim(frames: &[Frame]) -> &[Frame] {
    let name = |frame: &Frame| frame.function.clone().unwrap_or_default();
    let bottom = frames
        .iter()
        .position(|frame| is_bottom(&name(frame)))
        .unwrap_or(frames.len());
    let above = &frames[..bottom];
    // The hook that captured may be anybody's, so it is found by what called it, not by its own name. A panic in a
    // destructor during unwinding has the machinery twice; only the upper one is cut.
    let top = above
        .iter()
        .position(|frame| is_panic_entry(&name(frame)))
        .unwrap_or(0);
    let is_machinery =
        |frame: &&Frame| is_capture(&name(frame)) || is_panic_machinery(&name(frame));
    let top = top + above[top..].iter().take_while(is_machinery).count();
    if top == above.len() {
        frames
    } else {
        &above[top..]
    }
}

fn is_bottom(function: &str) -> bool {
    function.starts_with("netmcore_proc::backtrace::user_code")
        || function.contains("__rust_begin_short_backtrace")
}

fn is_capture(function: &str) -> bool {
    let function = function.trim_start_matches('<');
    function.starts_with("backtrace::")
        || function.starts_with("netmcore_proc::backtrace::Backtrace")
}

fn is_panic_entry(function: &str) -> bool {
    function.contains("__rust_end_short_backtrace") || function.contains("rust_begin_unwind")
}

fn is_panic_machinery(function: &str) -> bool {
    is_panic_entry(function)
        || function.starts_with("std::panicking::")
        || function.starts_with("std::panic::panic_any")
        || function.starts_with("core::panicking::")
        || (function.starts_with("core::") && function.ends_with("_failed"))
}

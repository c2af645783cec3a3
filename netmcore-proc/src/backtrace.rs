//! Where a worker was when it panicked: addresses now, names only when somebody reads them.
//!
//! **Protocol.** A dying worker captures raw return addresses, which takes microseconds and reads no debug information
//! (resolving the first symbol in a fresh process takes tens of milliseconds). Whoever prints the backtrace resolves
//! them: all workers are forks of one image, so an address means the same in each. What was resolved once is kept for
//! the life of the resolving process, so the same bug in a thousand workers is looked up once.
//!
//! **Trimming.** At the top, the frames of the capture and of the panic machinery are left out; at the bottom, all below
//! [`user_code`], through which workers call what the user wrote.

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
    let position = |is_it: fn(&str) -> bool| {
        let function = |frame: &Frame| frame.function.as_deref().is_some_and(is_it);
        frames.iter().position(function)
    };
    let bottom = position(is_bottom).unwrap_or(frames.len());
    // The hook that captured may be anybody's, so it is found by what called it, not by its own name. A panic in a
    // destructor during unwinding has the machinery twice; only the upper one is cut.
    let top = match (position(is_panic_entry), position(is_capture)) {
        (Some(entry), _) => entry,
        (None, Some(capture)) => capture + 1,
        (None, None) => 0,
    };
    let Some(users) = frames.get(top..bottom) else {
        return frames;
    };
    let is_machinery = |frame: &&Frame| frame.function.as_deref().is_some_and(is_panic_machinery);
    match &users[users.iter().take_while(is_machinery).count()..] {
        [] => frames,
        users => users,
    }
}

fn is_bottom(function: &str) -> bool {
    function.starts_with("netmcore_proc::backtrace::user_code")
        || function.contains("__rust_begin_short_backtrace")
}

fn is_capture(function: &str) -> bool {
    function.starts_with("netmcore_proc::backtrace::Backtrace::capture")
        || function.starts_with("<netmcore_proc::backtrace::Backtrace>::capture")
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::panic::{self, catch_unwind};

    use super::*;
    use crate::codec::{Codec, decode, encode_to_vec};
    use crate::error::Failure;

    thread_local! {
        static LAST: RefCell<Option<Failure>> = const { RefCell::new(None) };
    }

    /// What the hook makes of the panic of `f`, which is called as a worker calls it.
    fn failure_of(f: fn()) -> (String, Option<String>, Backtrace) {
        static HOOK: std::sync::Once = std::sync::Once::new();
        // Other tests may panic in other threads: the hook only adds.
        HOOK.call_once(|| {
            let former = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                LAST.set(Some(Failure::panicked(info)));
                former(info);
            }));
        });
        catch_unwind(|| user_code(f)).unwrap_err();
        match LAST.take() {
            Some(Failure::Panicked {
                message,
                location,
                backtrace,
            }) => (message, location, backtrace),
            other => panic!("{other:?}"),
        }
    }

    /// The functions in the printed form.
    fn functions(backtrace: &Backtrace) -> Vec<String> {
        let printed = backtrace.to_string();
        let lines = printed
            .lines()
            .filter(|line| !line.trim_start().starts_with("at "));
        lines
            .map(|line| line.split_once(": ").unwrap().1.to_string())
            .collect()
    }

    #[inline(never)]
    fn gives_up() {
        panic!("gave up after {} tries", std::hint::black_box(3));
    }

    #[inline(never)]
    fn calls_one_that_gives_up() {
        gives_up();
        std::hint::black_box(());
    }

    #[inline(never)]
    fn unwraps_nothing() {
        std::hint::black_box(None::<u8>).unwrap();
    }

    #[inline(never)]
    fn indexes_beyond_the_end() {
        let empty: &[u8] = std::hint::black_box(&[]);
        std::hint::black_box(empty[1]);
    }

    #[inline(never)]
    fn panics_with_a_number() {
        panic::panic_any(7_u8);
    }

    #[inline(never)]
    fn panics_at_length() {
        panic!("{}", "é".repeat(1 << 16));
    }

    #[test]
    fn panic_shows_the_users_frames_and_no_others() {
        let (message, location, backtrace) = failure_of(calls_one_that_gives_up);
        assert_eq!(message, "gave up after 3 tries");
        let location = location.unwrap();
        assert!(location.contains("src/backtrace.rs:"), "{location}");
        let functions = functions(&backtrace);
        let module = "netmcore_proc::backtrace::tests";
        assert_eq!(functions[0], format!("{module}::gives_up"), "{backtrace}");
        assert_eq!(
            functions[1],
            format!("{module}::calls_one_that_gives_up"),
            "{backtrace}"
        );
        assert!(backtrace.to_string().contains(&location) || !has_lines(&backtrace));
        // At most the call through a pointer lies between the function and `user_code`.
        assert!(functions.len() <= 3, "{backtrace}");
    }

    /// Whether this build has line tables.
    fn has_lines(backtrace: &Backtrace) -> bool {
        backtrace.to_string().contains(".rs:")
    }

    #[test]
    fn machinery_of_each_kind_of_panic_is_left_out() {
        for (f, name) in [
            (unwraps_nothing as fn(), "unwraps_nothing"),
            (indexes_beyond_the_end, "indexes_beyond_the_end"),
            (panics_with_a_number, "panics_with_a_number"),
        ] {
            let (_, _, backtrace) = failure_of(f);
            let functions = functions(&backtrace);
            // An inlined `unwrap` or indexing may stand above it; it is where the user's code left it.
            assert!(
                functions
                    .iter()
                    .take(3)
                    .any(|function| function.ends_with(name)),
                "{backtrace}"
            );
            for function in &functions {
                assert!(
                    !function.contains("panicking") && !function.contains("user_code"),
                    "{backtrace}"
                );
            }
        }
    }

    #[test]
    fn panic_without_text_says_so() {
        let (message, _, _) = failure_of(panics_with_a_number);
        assert_eq!(message, "a value that is not text (by `panic_any`)");
    }

    #[test]
    fn long_message_is_cut_between_characters() {
        let (message, _, _) = failure_of(panics_at_length);
        assert_eq!(message.chars().filter(|&c| c == 'é').count(), 1 << 15);
        assert!(message.ends_with("é … and 65536 bytes more"));
    }

    #[test]
    fn capture_outside_a_panic_begins_at_its_caller() {
        #[inline(never)]
        fn captures() -> Backtrace {
            Backtrace::capture()
        }
        let backtrace = user_code(captures);
        assert!(
            functions(&backtrace)[0].ends_with("::captures"),
            "{backtrace}"
        );
    }

    #[test]
    fn backtrace_survives_a_journey() {
        let backtrace = Backtrace::capture();
        let bytes = encode_to_vec(Codec::Bincode, &backtrace).unwrap();
        let arrived: Backtrace = decode(Codec::Bincode, &bytes).unwrap();
        assert_eq!(arrived, backtrace);
        assert_eq!(arrived.to_string(), backtrace.to_string());
    }

    #[test]
    fn addresses_are_resolved_once() {
        let backtrace = Backtrace::capture();
        backtrace.to_string();
        let resolved = RESOLVED.lock().unwrap();
        let resolved = resolved.as_ref().unwrap();
        assert!(
            backtrace
                .addresses()
                .iter()
                .all(|address| resolved.contains_key(address))
        );
    }

    #[test]
    fn backtrace_of_another_image_has_no_names() {
        let foreign = Backtrace {
            image: image() + 4096,
            addresses: vec![0x1000, 0x2000],
        };
        assert_eq!(
            foreign.to_string(),
            "captured in another image, so without names:\n   0: 0x1000\n   1: 0x2000"
        );
        let none = Backtrace {
            image: 0,
            addresses: vec![],
        };
        assert_eq!(none.to_string(), "no frames were captured");
        assert_eq!(format!("{foreign:?}"), "Backtrace(2 frames)");
    }
}

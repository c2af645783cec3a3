//! What can go wrong, told to someone who has not read this code.
//!
//! **Rules.** Each message says what was attempted, on which object, which limit was met and what to change; lower
//! case, no full stop. `Display` tells the whole story, the cause included; `source()` gives the cause to programs.

use std::any::Any;
use std::fmt;
use std::panic::PanicHookInfo;
use std::path::PathBuf;
use std::time::Duration;

use netmcore_sys::process::signal_name;
use netmcore_sys::{NameError, SysError};
use serde::{Deserialize, Serialize};

use crate::backtrace::Backtrace;
use crate::codec::CodecError;
use crate::id::{ProcessId, ResourceId};
use crate::resource::ResourceType;
use crate::wire::WireError;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. Why a *process* failed is a [`JoinError`].
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no resource with this id, or it is not of the type that was asked for.
    #[doc(alias = "No_resource")]
    #[error("{}", no_resource(*id, *expected, *found))]
    NoResource {
        /// The id that was looked up.
        id: ResourceId,
        /// The type that the call needs; `None` when any would do.
        expected: Option<ResourceType>,
        /// The type that the resource has; `None` when there is no such resource.
        found: Option<ResourceType>,
    },

    /// The process gave up or passed on a use of a resource that it does not have.
    #[error(
        "this process does not use {id}: it never got it, or has released it as often as it got it"
    )]
    NotAUser {
        /// The resource.
        id: ResourceId,
    },

    /// The object is managed already, as a resource of another type or with other data.
    #[error(
        "cannot manage a {wanted}: it is managed as a {found} ({id}); use that, or release it first"
    )]
    AlreadyManaged {
        /// The resource that it is.
        id: ResourceId,
        /// What it was to be.
        wanted: String,
        /// What it is.
        found: String,
    },

    /// A region is not among those that this process was started with.
    #[error("{}", not_inherited(*id, *process, inherited))]
    NotInherited {
        /// The region.
        id: ResourceId,
        /// This process.
        process: ProcessId,
        /// What it inherits.
        inherited: Vec<ResourceId>,
    },

    /// The call is for workers only.
    #[error(
        "`{call}` is refused in the master, which must never wait or compute: call it in a worker"
    )]
    NotInMaster {
        /// The function that was called.
        call: &'static str,
    },

    /// The call is for the master only.
    #[error("`{call}` is refused in a worker: call it in the master, before the run or in a hook")]
    NotInWorker {
        /// The function that was called.
        call: &'static str,
    },

    /// There is no master that the call could turn to.
    #[error(
        "`{call}` needs a master, and this process has none: call it in a worker, in a hook of the master, or after building a `Master`"
    )]
    NotRunning {
        /// The function that was called.
        call: &'static str,
    },

    /// The process has more than one thread, so it cannot become a master: a fork copies only the thread that forks,
    /// and locks held by the others would stay locked in every worker.
    #[error(
        "cannot fork workers: this process has {threads} threads, and a fork copies only the one that forks; start the master before any thread (async runtimes and test harnesses start threads too), or use host mode"
    )]
    MultiThreaded {
        /// The number of threads, the calling one included.
        threads: usize,
    },

    /// Too many processes are waiting to be run or joined.
    #[error(
        "cannot start a process: the table is full, {limit} processes are neither joined nor detached; join or detach some, or raise `process_limit`"
    )]
    ProcessTableFull {
        /// The number of processes that the table holds.
        limit: usize,
    },

    /// The master is ending the run, so nothing new begins.
    #[error("the master is shutting down: nothing new can be started")]
    ShutDown,

    /// The master died without shutting down.
    #[error(
        "the master process is gone: it died without shutting down; the next start on the same directory cleans up"
    )]
    MasterGone,

    /// The master answered with a refusal.
    #[error("{doing}: the master refused: {reason}")]
    Refused {
        /// What was asked for, with the object.
        doing: String,
        /// What the master said.
        reason: String,
    },

    /// An argument, or another value for another process, did not become bytes.
    #[error("cannot send a value of type {type_name}: {reason}")]
    Encode {
        /// The type of the value.
        type_name: &'static str,
        /// What the codec said.
        reason: String,
    },

    /// Bytes from another process did not become a value of the type.
    #[error("cannot read a value of type {type_name}: {reason}")]
    Decode {
        /// The type of the value.
        type_name: &'static str,
        /// What the codec said.
        reason: String,
    },

    /// A dynamically typed value was unwrapped at another type than it was wrapped with.
    #[doc(alias = "Type_mismatch")]
    #[error("cannot unwrap a value as {expected}: it was wrapped as {found}")]
    TypeMismatch {
        /// The type that was asked for.
        expected: &'static str,
        /// The type that the value was wrapped with.
        found: String,
    },

    /// The address of a function that came in does not lie in this program's code.
    #[error(
        "cannot run the function at {address:#x}: it is not in the code of this program as it was when the master started (code loaded later cannot be spawned)"
    )]
    NotAFunctionOfThisProgram {
        /// The address.
        address: usize,
    },

    /// The directory's path is so long that a socket in it cannot have an address.
    #[error("cannot use {}: a Unix socket needs a path of at most {limit} bytes, and this one has {len}; choose a directory with a shorter path", path.display())]
    PathTooLong {
        /// The path of the socket.
        path: PathBuf,
        /// The most bytes that a socket's path may have.
        limit: usize,
        /// The bytes that this one has.
        len: usize,
    },

    /// The path cannot be used for what it was given for.
    #[error("cannot use the path {}: {why}", path.display())]
    InvalidPath {
        /// The path as it was given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },

    /// The name is not one that a shared memory object or semaphore can have.
    #[error(transparent)]
    InvalidName(#[from] NameError),

    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was being done, and to which object.
        doing: String,
        /// The call and its error number.
        source: SysError,
    },

    /// Every worker waited without deadline (for a process, for a lock or for an event in shared memory), and nothing was queued, so
    /// the master ended the run.
    ///
    /// Children of workers are looked for, since they may have the memory. A process outside of the run that has mapped it by name is
    /// not seen: wait for such with a deadline.
    #[error("{}", deadlock(who, on_what))]
    Deadlock {
        /// The workers that waited.
        who: Vec<ProcessId>,
        /// What each of them waited for, in the same order: `Process 7`, `the lock at Resource 3+0x40, held by Process 7`, `an event at
        /// Resource 3+0x80`. Of a worker with several threads, what one of them waited for.
        on_what: Vec<String>,
    },

    /// A signal asked the master to end the run.
    #[error("the run was ended by {}", Signal(*signal))]
    Signalled {
        /// The number of the signal.
        signal: i32,
    },

    /// Shared memory could not be had, or is not as it should be.
    #[error("{doing}: {}", with_causes(source))]
    Memory {
        /// What was being done, and to which object.
        doing: String,
        /// Which limit was met, or what is wrong.
        source: netmcore_shm::Error,
    },

    /// The record of kernel-persistent objects, or the directory it is in, cannot be used.
    #[error(transparent)]
    Record(#[from] netmcore_pmanage::Error),

    /// What came from the peer of a connection was not what the protocol says.
    #[error("{doing}: {source}")]
    Wire {
        /// What was being done.
        doing: String,
        /// What was wrong.
        source: WireError,
    },

    /// A named semaphore, or a container of them, could not be created or deleted.
    #[error(transparent)]
    Semaphore(#[from] netmcore_sem::Error),

    /// This process is a master already: one run must end before the next begins.
    #[error("this process is the master of a run already; one run must end before the next begins")]
    AlreadyMaster,

    /// The first process ended without a result.
    #[error("the first process has no result: {0}")]
    FirstProcess(#[source] JoinError),

    /// Another process ended without a result.
    #[error(transparent)]
    Join(#[from] JoinError),
}

impl Error {
    /// Makes a [`Error::System`] from a failed system call: for `map_err(Error::system("…"))`.
    pub(crate) fn system(doing: impl Into<String>) -> impl FnOnce(SysError) -> Error {
        let doing = doing.into();
        move |source| Error::System { doing, source }
    }

    /// Makes an [`Error::Memory`], in the same way.
    pub(crate) fn memory(doing: impl Into<String>) -> impl FnOnce(netmcore_shm::Error) -> Error {
        let doing = doing.into();
        move |source| Error::Memory { doing, source }
    }
}

/// Why a process has no result for its joiner.
///
/// `{}` is one line; `{:#}` adds the backtrace of a panic.
#[non_exhaustive]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum JoinError {
    /// It panicked.
    Panicked {
        /// The process.
        process: ProcessId,
        /// What it said.
        message: String,
        /// Where, as `file:line:column`.
        location: Option<String>,
        /// How it came there.
        backtrace: Backtrace,
    },
    /// It called `exit`, or something in it did.
    Exited {
        /// The process.
        process: ProcessId,
        /// The code that it exited with.
        code: i32,
    },
    /// A signal killed it.
    Killed {
        /// The process.
        process: ProcessId,
        /// The number of the signal.
        signal: i32,
        /// Whether the kernel wrote a core file.
        core_dumped: bool,
    },
    /// The master killed it because it exceeded a limit that it was started with.
    LimitExceeded {
        /// The process.
        process: ProcessId,
        /// The limit.
        limit: ExceededLimit,
    },
    /// It finished, but its result is not a value of the type that the joiner expects.
    ResultUndecodable {
        /// The process.
        process: ProcessId,
        /// The type that the joiner expects.
        type_name: String,
        /// What the codec said.
        reason: String,
    },
    /// It could not begin, because its argument is not a value of the type that it expects.
    ArgumentUndecodable {
        /// The process.
        process: ProcessId,
        /// The type that the process expects.
        type_name: String,
        /// What the codec said.
        reason: String,
    },
    /// It finished, but there was no way to store its result.
    ResultNotDelivered {
        /// The process.
        process: ProcessId,
        /// The type of the result.
        type_name: String,
        /// Why: not encodable, or no memory left.
        reason: String,
    },
    /// No worker could be forked for it.
    NotStarted {
        /// The process.
        process: ProcessId,
        /// Which limit was met.
        reason: String,
    },
    /// Another join has taken the result.
    AlreadyJoined {
        /// The process.
        process: ProcessId,
    },
    /// It was joined through the join point of another kind of processes.
    WrongJoinPoint {
        /// The process.
        process: ProcessId,
        /// The join point that belongs to the process.
        expected: ResourceId,
        /// The join point that was used.
        found: ResourceId,
    },
    /// The join point does not exist or has been released.
    NoResource {
        /// The process.
        process: ProcessId,
        /// The join point.
        id: ResourceId,
    },
    /// There is no such process in this run.
    NoSuchProcess {
        /// The process.
        process: ProcessId,
    },
    /// The caller is the master, which must not wait.
    NotInMaster {
        /// The process.
        process: ProcessId,
    },
    /// The deadline passed first. The process goes on, and may be joined later.
    TimedOut {
        /// The process.
        process: ProcessId,
    },
    /// The master is ending the run.
    ShutDown {
        /// The process.
        process: ProcessId,
    },
    /// The master died, and all workers die with it.
    MasterGone {
        /// The process.
        process: ProcessId,
    },
    /// The wait could never end: a process joined itself.
    WouldDeadlock {
        /// The process.
        process: ProcessId,
    },
    /// It was detached, so its result is dropped.
    Detached {
        /// The process.
        process: ProcessId,
    },
}

impl JoinError {
    /// Returns the process that was to be joined.
    pub fn process(&self) -> ProcessId {
        match *self {
            JoinError::Panicked { process, .. }
            | JoinError::Exited { process, .. }
            | JoinError::Killed { process, .. }
            | JoinError::LimitExceeded { process, .. }
            | JoinError::ResultUndecodable { process, .. }
            | JoinError::ArgumentUndecodable { process, .. }
            | JoinError::ResultNotDelivered { process, .. }
            | JoinError::NotStarted { process, .. }
            | JoinError::AlreadyJoined { process }
            | JoinError::WrongJoinPoint { process, .. }
            | JoinError::NoResource { process, .. }
            | JoinError::NoSuchProcess { process }
            | JoinError::NotInMaster { process }
            | JoinError::TimedOut { process }
            | JoinError::ShutDown { process }
            | JoinError::MasterGone { process }
            | JoinError::WouldDeadlock { process }
            | JoinError::Detached { process } => process,
        }
    }

    /// Returns the call stack of a panic.
    pub fn backtrace(&self) -> Option<&Backtrace> {
        match self {
            JoinError::Panicked { backtrace, .. } => Some(backtrace),
            _ => None,
        }
    }
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "join of {}: ", self.process())?;
        match self {
            JoinError::Panicked {
                message,
                location,
                backtrace,
                ..
            } => {
                match location {
                    Some(location) => write!(f, "it panicked at {location}: {message}")?,
                    None => write!(f, "it panicked: {message}")?,
                }
                if f.alternate() && !backtrace.is_empty() {
                    write!(f, "\nstack backtrace:\n{backtrace}")?;
                }
                Ok(())
            }
            JoinError::Exited { code, .. } => {
                write!(f, "it exited with code {code} before it returned a result")
            }
            JoinError::Killed {
                signal,
                core_dumped,
                ..
            } => {
                write!(f, "it was killed by {}", Signal(*signal))?;
                if *core_dumped {
                    f.write_str(", and the kernel wrote a core file")?;
                }
                if *signal == SIGKILL {
                    f.write_str(
                        " (sent by `kill`, by an administrator, or by the kernel when memory ran out)",
                    )?;
                }
                Ok(())
            }
            JoinError::LimitExceeded { limit, .. } => match limit {
                ExceededLimit::MemoryBytes(bytes) => write!(
                    f,
                    "it was killed because it used more than its memory limit of {bytes} bytes; \
                     raise `memory_limit` in its start options"
                ),
                ExceededLimit::Time(time) => write!(
                    f,
                    "it was killed because it ran longer than its time limit of {time:?}; \
                     raise `time_limit` in its start options"
                ),
            },
            JoinError::ResultUndecodable {
                type_name, reason, ..
            } => write!(
                f,
                "it finished, but its result cannot be read as {type_name}: {reason}"
            ),
            JoinError::ArgumentUndecodable {
                type_name, reason, ..
            } => write!(
                f,
                "it could not begin, because its argument cannot be read as {type_name}: {reason}"
            ),
            JoinError::ResultNotDelivered {
                type_name, reason, ..
            } => write!(
                f,
                "it finished, but its result of type {type_name} could not be stored: {reason}"
            ),
            JoinError::NotStarted { reason, .. } => {
                write!(f, "no worker could be forked for it: {reason}")
            }
            JoinError::AlreadyJoined { .. } => {
                f.write_str("its result has been taken by another join; only the first one gets it")
            }
            JoinError::WrongJoinPoint {
                expected, found, ..
            } => write!(
                f,
                "it belongs to the join point {expected}, and was joined through {found}"
            ),
            JoinError::NoResource { id, .. } => write!(
                f,
                "the join point {id} does not exist, or has been released"
            ),
            JoinError::NoSuchProcess { .. } => {
                f.write_str("there is no such process in this run")
            }
            JoinError::NotInMaster { .. } => f.write_str(
                "refused in the master, which must never wait: join in a worker, or use `join_nowait`",
            ),
            JoinError::TimedOut { .. } => {
                f.write_str("it had not ended when the deadline passed; it goes on, and can be joined later")
            }
            JoinError::ShutDown { .. } => {
                f.write_str("the master is shutting down, so it will not end with a result")
            }
            JoinError::MasterGone { .. } => {
                f.write_str("the master process is gone, and its workers die with it")
            }
            JoinError::WouldDeadlock { .. } => {
                f.write_str("a process cannot join itself: it would wait for ever")
            }
            JoinError::Detached { .. } => {
                f.write_str("it was detached, so its result is dropped; start it without detaching to join it")
            }
        }
    }
}

impl std::error::Error for JoinError {}

/// The limit that a process exceeded.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ExceededLimit {
    /// Private memory, in bytes.
    MemoryBytes(u64),
    /// Time since the process began to run.
    Time(Duration),
}

/// What a dying worker, or the master for it, stores for the joiner: a [`JoinError`] without the process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Failure {
    Panicked {
        message: String,
        location: Option<String>,
        backtrace: Backtrace,
    },
    Exited {
        code: i32,
    },
    Killed {
        signal: i32,
        core_dumped: bool,
    },
    LimitExceeded(ExceededLimit),
    ArgumentUndecodable {
        type_name: String,
        reason: String,
    },
    ResultNotDelivered {
        type_name: String,
        reason: String,
    },
    NotStarted {
        reason: String,
    },
    ShutDown,
}

/// The longest part of a panic's message that is kept.
const PANIC_MESSAGE_LIMIT_BYTES: usize = 64 << 10;

/// What a panic says, cut to a length that is always delivered.
fn panic_message(payload: &dyn Any) -> String {
    let text = match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "a value that is not text (by `panic_any`)",
    };
    let mut kept_bytes = text.len().min(PANIC_MESSAGE_LIMIT_BYTES);
    while !text.is_char_boundary(kept_bytes) {
        kept_bytes -= 1;
    }
    let kept = &text[..kept_bytes];
    let mut message = kept.to_string();
    if kept.len() < text.len() {
        message.push_str(&format!(" … and {} bytes more", text.len() - kept.len()));
    }
    message
}

impl Failure {
    /// Records a panic; to be called in the panic hook, where the stack is still there.
    pub(crate) fn panicked(info: &PanicHookInfo<'_>) -> Failure {
        Failure::Panicked {
            message: panic_message(info.payload()),
            location: info.location().map(ToString::to_string),
            backtrace: Backtrace::capture(),
        }
    }

    /// Records a panic that no hook has seen, by what was caught.
    pub(crate) fn caught(payload: &(dyn Any + Send)) -> Failure {
        Failure::Panicked {
            message: panic_message(payload),
            location: None,
            backtrace: Backtrace::capture(),
        }
    }

    /// Whether the record may be of the panic that was caught: by what it said.
    pub(crate) fn is_of_panic(&self, payload: &(dyn Any + Send)) -> bool {
        matches!(self, Failure::Panicked { message, .. } if *message == panic_message(payload))
    }

    pub(crate) fn argument_undecodable(error: &CodecError) -> Failure {
        Failure::ArgumentUndecodable {
            type_name: error.type_name.into(),
            reason: error.reason_and_hint(),
        }
    }

    pub(crate) fn result_not_encodable(error: &CodecError) -> Failure {
        Failure::ResultNotDelivered {
            type_name: error.type_name.into(),
            reason: error.reason_and_hint(),
        }
    }

    /// What the joiner of `process` is told.
    pub(crate) fn into_join_error(self, process: ProcessId) -> JoinError {
        match self {
            Failure::Panicked {
                message,
                location,
                backtrace,
            } => JoinError::Panicked {
                process,
                message,
                location,
                backtrace,
            },
            Failure::Exited { code } => JoinError::Exited { process, code },
            Failure::Killed {
                signal,
                core_dumped,
            } => JoinError::Killed {
                process,
                signal,
                core_dumped,
            },
            Failure::LimitExceeded(limit) => JoinError::LimitExceeded { process, limit },
            Failure::ArgumentUndecodable { type_name, reason } => JoinError::ArgumentUndecodable {
                process,
                type_name,
                reason,
            },
            Failure::ResultNotDelivered { type_name, reason } => JoinError::ResultNotDelivered {
                process,
                type_name,
                reason,
            },
            Failure::NotStarted { reason } => JoinError::NotStarted { process, reason },
            Failure::ShutDown => JoinError::ShutDown { process },
        }
    }
}

impl CodecError {
    pub(crate) fn into_encode(self) -> Error {
        Error::Encode {
            type_name: self.type_name,
            reason: self.reason_and_hint(),
        }
    }

    pub(crate) fn into_decode(self) -> Error {
        Error::Decode {
            type_name: self.type_name,
            reason: self.reason_and_hint(),
        }
    }

    pub(crate) fn into_result_undecodable(self, process: ProcessId) -> JoinError {
        JoinError::ResultUndecodable {
            process,
            type_name: self.type_name.into(),
            reason: self.reason_and_hint(),
        }
    }
}

fn not_inherited(id: ResourceId, process: ProcessId, inherited: &[ResourceId]) -> String {
    let has = match inherited {
        [] => "without regions".to_owned(),
        ids => {
            let ids: Vec<String> = ids.iter().map(ResourceId::to_string).collect();
            format!("with these regions only: {}", ids.join(", "))
        }
    };
    format!(
        "{process} cannot use {id}: it was started {has}; add {id} to its `Inherit::Only`, or start it with `Inherit::All`"
    )
}

fn no_resource(
    id: ResourceId,
    expected: Option<ResourceType>,
    found: Option<ResourceType>,
) -> String {
    const GONE: &str = "it was never made in this run, or its last user has released it";
    match (expected, found) {
        (Some(expected), Some(found)) => {
            format!("the call needs a {expected}, and {id} is a {found}")
        }
        (Some(expected), None) => format!("there is no {expected} {id}: {GONE}"),
        (None, Some(found)) => format!("the call does not take a {found}, which {id} is"),
        (None, None) => format!("there is no {id}: {GONE}"),
    }
}

/// An error's message with those of its causes, each once: some errors show their cause themselves.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    message
}

fn deadlock(who: &[ProcessId], on_what: &[String]) -> String {
    let mut message = String::from(
        "deadlock, so the run was ended: every worker waits without deadline and nothing is queued",
    );
    for (index, process) in who.iter().enumerate() {
        message.push_str(if index == 0 { ": " } else { ", " });
        match on_what.get(index) {
            Some(what) => message.push_str(&format!("{process} waits for {what}")),
            None => message.push_str(&process.to_string()),
        }
    }
    message
}

const SIGKILL: i32 = 9;

/// A signal in words.
struct Signal(i32);

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match signal_name(self.0) {
            name if name.starts_with("SIG") => write!(f, "{name} (signal {})", self.0),
            // "real-time signal" or "no signal"
            words => write!(f, "{words} {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use netmcore_sys::{Errno, ObjectName};

    use super::*;

    fn process(number: u64) -> ProcessId {
        ProcessId::from_raw(number)
    }

    fn resource(number: u64) -> ResourceId {
        ResourceId::from_raw(number)
    }

    fn broken_disk() -> netmcore_pmanage::Error {
        netmcore_pmanage::Error::Io {
            path: "/run/job/netplex.pmanage".into(),
            doing: "cannot open",
            source: std::io::Error::from_raw_os_error(5),
        }
    }

    /// Every variant, with the message that a user gets.
    fn all_errors() -> Vec<(Error, &'static str)> {
        vec![
            (
                Error::NoResource {
                    id: resource(7),
                    expected: Some(ResourceType::JoinPoint),
                    found: Some(ResourceType::File),
                },
                "the call needs a join point, and Resource 7 is a temporary file",
            ),
            (
                Error::NoResource {
                    id: resource(7),
                    expected: Some(ResourceType::PosixShmSc),
                    found: None,
                },
                "there is no shared memory object with semaphore container Resource 7: it was never made in this run, \
                 or its last user has released it",
            ),
            (
                Error::NoResource {
                    id: resource(7),
                    expected: None,
                    found: None,
                },
                "there is no Resource 7: it was never made in this run, or its last user has released it",
            ),
            (
                Error::NoResource {
                    id: resource(7),
                    expected: None,
                    found: Some(ResourceType::ForkPoint),
                },
                "the call does not take a fork point, which Resource 7 is",
            ),
            (
                Error::NotAUser { id: resource(7) },
                "this process does not use Resource 7: it never got it, or has released it as often as it got it",
            ),
            (
                Error::AlreadyManaged {
                    id: resource(7),
                    wanted: "shared memory object /x with semaphore container /y".into(),
                    found: "shared memory object /x".into(),
                },
                "cannot manage a shared memory object /x with semaphore container /y: it is managed as a shared memory \
                 object /x (Resource 7); use that, or release it first",
            ),
            (
                Error::NotInMaster {
                    call: "self_process_id",
                },
                "`self_process_id` is refused in the master, which must never wait or compute: call it in a worker",
            ),
            (
                Error::NotInWorker {
                    call: "destroy_resources",
                },
                "`destroy_resources` is refused in a worker: call it in the master, before the run or in a hook",
            ),
            (
                Error::NotRunning {
                    call: "manage_file",
                },
                "`manage_file` needs a master, and this process has none: call it in a worker, in a hook of the master, \
                 or after building a `Master`",
            ),
            (
                Error::MultiThreaded { threads: 3 },
                "cannot fork workers: this process has 3 threads, and a fork copies only the one that forks; start the \
                 master before any thread (async runtimes and test harnesses start threads too), or use host mode",
            ),
            (
                Error::ProcessTableFull { limit: 4096 },
                "cannot start a process: the table is full, 4096 processes are neither joined nor detached; join or \
                 detach some, or raise `process_limit`",
            ),
            (
                Error::ShutDown,
                "the master is shutting down: nothing new can be started",
            ),
            (
                Error::MasterGone,
                "the master process is gone: it died without shutting down; the next start on the same directory \
                 cleans up",
            ),
            (
                Error::Refused {
                    doing: "create_shm(\"/part\", 4096)".into(),
                    reason: "no space left in /dev/shm".into(),
                },
                "create_shm(\"/part\", 4096): the master refused: no space left in /dev/shm",
            ),
            (
                Error::Encode {
                    type_name: "app::Job",
                    reason: "the mutex is poisoned".into(),
                },
                "cannot send a value of type app::Job: the mutex is poisoned",
            ),
            (
                Error::Decode {
                    type_name: "app::Job",
                    reason: "the bytes end before the value does".into(),
                },
                "cannot read a value of type app::Job: the bytes end before the value does",
            ),
            (
                Error::TypeMismatch {
                    expected: "u32",
                    found: "i64".into(),
                },
                "cannot unwrap a value as u32: it was wrapped as i64",
            ),
            (
                Error::NotAFunctionOfThisProgram { address: 0xdead },
                "cannot run the function at 0xdead: it is not in the code of this program as it was when the master \
                 started (code loaded later cannot be spawned)",
            ),
            (
                Error::PathTooLong {
                    path: "/a/very/long/one".into(),
                    limit: 107,
                    len: 140,
                },
                "cannot use /a/very/long/one: a Unix socket needs a path of at most 107 bytes, and this one has 140; \
                 choose a directory with a shorter path",
            ),
            (
                Error::InvalidPath {
                    path: "a\0b".into(),
                    why: "it contains a NUL byte".into(),
                },
                "cannot use the path a\0b: it contains a NUL byte",
            ),
            (
                Error::Deadlock {
                    who: vec![process(1), process(4)],
                    on_what: vec!["Process 4".into(), "the lock at 0x1000".into()],
                },
                "deadlock, so the run was ended: every worker waits without deadline and nothing is queued: Process 1 \
                 waits for Process 4, Process 4 waits for the lock at 0x1000",
            ),
            (
                Error::Signalled { signal: 15 },
                "the run was ended by SIGTERM (signal 15)",
            ),
            (
                ObjectName::new("x").unwrap_err().into(),
                "object name \"x\" does not begin with a slash",
            ),
            (
                Error::system("cannot fork a worker")(SysError::new("fork", "", Errno::EAGAIN)),
                "cannot fork a worker: fork: Resource temporarily unavailable (EAGAIN)",
            ),
            (
                broken_disk().into(),
                "cannot open /run/job/netplex.pmanage: Input/output error (os error 5)",
            ),
            (
                Error::memory("cannot store the argument of Process 7")(
                    netmcore_shm::Error::NoSpace {
                        limit: netmcore_shm::SpaceLimit::Machine,
                        wanted_bytes: 4096,
                        free_bytes: 100,
                    },
                ),
                "cannot store the argument of Process 7: 4096 bytes of shared memory wanted, 100 available: the machine \
                 has no more memory available",
            ),
            (
                Error::memory("cannot create the control block")(netmcore_shm::Error::System {
                    doing: "make room in /x".into(),
                    source: SysError::new("fallocate", "/x", Errno::ENOSPC),
                }),
                "cannot create the control block: cannot make room in /x: fallocate of /x: No space left on device \
                 (ENOSPC)",
            ),
            (
                Error::Wire {
                    doing: "release of Resource 7".into(),
                    source: WireError::Truncated {
                        have_bytes: 3,
                        want_bytes: 12,
                    },
                },
                "release of Resource 7: the connection ended in the middle of a message, after 3 of 12 bytes",
            ),
            (
                Error::FirstProcess(JoinError::Exited {
                    process: process(1),
                    code: 3,
                }),
                "the first process has no result: join of Process 1: it exited with code 3 before it returned a result",
            ),
            (
                Error::Join(JoinError::TimedOut {
                    process: process(9),
                }),
                "join of Process 9: it had not ended when the deadline passed; it goes on, and can be joined later",
            ),
        ]
    }

    fn all_join_errors() -> Vec<(JoinError, &'static str)> {
        let process = process(7);
        let type_name = String::from("app::Job");
        vec![
            (
                JoinError::Panicked {
                    process,
                    message: "index out of bounds".into(),
                    location: Some("src/main.rs:3:5".into()),
                    backtrace: Backtrace::capture(),
                },
                "join of Process 7: it panicked at src/main.rs:3:5: index out of bounds",
            ),
            (
                JoinError::Panicked {
                    process,
                    message: "index out of bounds".into(),
                    location: None,
                    backtrace: Backtrace::capture(),
                },
                "join of Process 7: it panicked: index out of bounds",
            ),
            (
                JoinError::Exited { process, code: 3 },
                "join of Process 7: it exited with code 3 before it returned a result",
            ),
            (
                JoinError::Killed {
                    process,
                    signal: 11,
                    core_dumped: true,
                },
                "join of Process 7: it was killed by SIGSEGV (signal 11), and the kernel wrote a core file",
            ),
            (
                JoinError::Killed {
                    process,
                    signal: 9,
                    core_dumped: false,
                },
                "join of Process 7: it was killed by SIGKILL (signal 9) (sent by `kill`, by an administrator, or by \
                 the kernel when memory ran out)",
            ),
            (
                JoinError::Killed {
                    process,
                    signal: 40,
                    core_dumped: false,
                },
                "join of Process 7: it was killed by real-time signal 40",
            ),
            (
                JoinError::LimitExceeded {
                    process,
                    limit: ExceededLimit::MemoryBytes(1 << 20),
                },
                "join of Process 7: it was killed because it used more than its memory limit of 1048576 bytes; raise \
                 `memory_limit` in its start options",
            ),
            (
                JoinError::LimitExceeded {
                    process,
                    limit: ExceededLimit::Time(Duration::from_millis(1500)),
                },
                "join of Process 7: it was killed because it ran longer than its time limit of 1.5s; raise \
                 `time_limit` in its start options",
            ),
            (
                JoinError::ResultUndecodable {
                    process,
                    type_name: type_name.clone(),
                    reason: "the bytes end before the value does".into(),
                },
                "join of Process 7: it finished, but its result cannot be read as app::Job: the bytes end before the \
                 value does",
            ),
            (
                JoinError::ArgumentUndecodable {
                    process,
                    type_name: type_name.clone(),
                    reason: "the bytes end before the value does".into(),
                },
                "join of Process 7: it could not begin, because its argument cannot be read as app::Job: the bytes end \
                 before the value does",
            ),
            (
                JoinError::ResultNotDelivered {
                    process,
                    type_name,
                    reason: "no memory left for 4096 bytes".into(),
                },
                "join of Process 7: it finished, but its result of type app::Job could not be stored: no memory left \
                 for 4096 bytes",
            ),
            (
                JoinError::NotStarted {
                    process,
                    reason: "fork: Resource temporarily unavailable (EAGAIN)".into(),
                },
                "join of Process 7: no worker could be forked for it: fork: Resource temporarily unavailable (EAGAIN)",
            ),
            (
                JoinError::AlreadyJoined { process },
                "join of Process 7: its result has been taken by another join; only the first one gets it",
            ),
            (
                JoinError::WrongJoinPoint {
                    process,
                    expected: resource(2),
                    found: resource(4),
                },
                "join of Process 7: it belongs to the join point Resource 2, and was joined through Resource 4",
            ),
            (
                JoinError::NoResource {
                    process,
                    id: resource(4),
                },
                "join of Process 7: the join point Resource 4 does not exist, or has been released",
            ),
            (
                JoinError::NoSuchProcess { process },
                "join of Process 7: there is no such process in this run",
            ),
            (
                JoinError::NotInMaster { process },
                "join of Process 7: refused in the master, which must never wait: join in a worker, or use \
                 `join_nowait`",
            ),
            (
                JoinError::TimedOut { process },
                "join of Process 7: it had not ended when the deadline passed; it goes on, and can be joined later",
            ),
            (
                JoinError::ShutDown { process },
                "join of Process 7: the master is shutting down, so it will not end with a result",
            ),
            (
                JoinError::MasterGone { process },
                "join of Process 7: the master process is gone, and its workers die with it",
            ),
            (
                JoinError::WouldDeadlock { process },
                "join of Process 7: a process cannot join itself: it would wait for ever",
            ),
            (
                JoinError::Detached { process },
                "join of Process 7: it was detached, so its result is dropped; start it without detaching to join it",
            ),
        ]
    }

    #[test]
    fn every_error_says_what_failed_and_what_to_do() {
        for (error, message) in all_errors() {
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn every_join_error_says_how_the_process_ended() {
        for (error, message) in all_join_errors() {
            assert_eq!(error.to_string(), message);
            assert_eq!(error.process(), process(7));
        }
    }

    #[test]
    fn messages_are_one_lower_case_line_without_full_stop() {
        let errors = all_errors().into_iter().map(|(error, _)| error.to_string());
        let join_errors = all_join_errors()
            .into_iter()
            .map(|(error, _)| error.to_string());
        for message in errors.chain(join_errors) {
            assert!(!message.starts_with(char::is_uppercase), "{message}");
            assert!(!message.ends_with('.'), "{message}");
            assert!(
                !message.contains(['\n']) && !message.contains("  "),
                "{message}"
            );
        }
    }

    #[test]
    fn source_leads_to_the_cause() {
        let cause = SysError::new("fork", "", Errno::EAGAIN);
        let error = Error::system("cannot fork a worker")(cause.clone());
        let source = error.source().unwrap();
        assert_eq!(source.downcast_ref::<SysError>(), Some(&cause));

        let cause = JoinError::TimedOut {
            process: process(1),
        };
        let error = Error::FirstProcess(cause.clone());
        let source = error.source().unwrap();
        assert_eq!(source.downcast_ref::<JoinError>(), Some(&cause));

        let error = Error::from(broken_disk());
        let source = error.source().unwrap();
        let io = source.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(io.raw_os_error(), Some(5));
    }

    #[test]
    fn alternate_form_of_a_panic_adds_the_backtrace() {
        for (error, message) in all_join_errors() {
            let long = format!("{error:#}");
            match error.backtrace() {
                Some(backtrace) => {
                    assert_eq!(long, format!("{message}\nstack backtrace:\n{backtrace}"))
                }
                None => assert_eq!(long, message),
            }
        }
    }

    #[test]
    fn errors_travel() {
        for (error, _) in all_join_errors() {
            let bytes = crate::codec::encode_to_vec(crate::Codec::Bincode, &error).unwrap();
            assert_eq!(
                crate::codec::decode::<JoinError>(crate::Codec::Bincode, &bytes),
                Ok(error)
            );
        }
    }

    #[test]
    fn failure_becomes_the_join_error_of_its_process() {
        let reason = String::from("because");
        let type_name = String::from("u8");
        let backtrace = Backtrace::capture();
        for (failure, expected) in [
            (
                Failure::Panicked {
                    message: "no".into(),
                    location: None,
                    backtrace: backtrace.clone(),
                },
                JoinError::Panicked {
                    process: process(3),
                    message: "no".into(),
                    location: None,
                    backtrace,
                },
            ),
            (
                Failure::NotStarted {
                    reason: reason.clone(),
                },
                JoinError::NotStarted {
                    process: process(3),
                    reason: reason.clone(),
                },
            ),
            (
                Failure::ResultNotDelivered {
                    type_name: type_name.clone(),
                    reason: reason.clone(),
                },
                JoinError::ResultNotDelivered {
                    process: process(3),
                    type_name,
                    reason,
                },
            ),
            (
                Failure::ShutDown,
                JoinError::ShutDown {
                    process: process(3),
                },
            ),
        ] {
            assert_eq!(failure.into_join_error(process(3)), expected);
        }
    }
}

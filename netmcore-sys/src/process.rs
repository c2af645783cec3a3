//! Processes: checked fork, what a child does first, death and its causes, limits, and what `/proc` tells.
//!
//! **Order of a life**: [`fork`], in the child [`die_with_parent`] and [`close_range`], then work, then
//! [`flush_c_streams`] and [`exit_now`]; in the parent a [`PidFd`] that becomes readable at the child's end and
//! reaps it, and only it, with its [`ExitStatus`].
//!
//! **If a process dies here**: a process has no state here that another one could find half-done. A child killed
//! before [`die_with_parent`] is an ordinary dead child; a parent killed before it is what the re-check of the
//! parent in it is for.
//!
//! **Not here**: signal masks and handlers ([`crate::signal`]), waiting for several descriptors
//! ([`crate::poll`]).
//!
//! # Safety
//!
//! Unsafe code here calls `fork`, `pthread_atfork`, `prctl`, `close`, `fflush` and `_exit` through libc. The
//! handler that runs between `fork` and its return in the child touches atomics and calls `close`, which is
//! async-signal-safe; it takes no lock and allocates nothing. The closure given to `pre_exec` is held to the same
//! rule.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::error::{Errno, SysError};

mod descriptors;
mod limits;
mod pidfd;
mod proc_fs;
mod processors;
mod thread_end;

pub use crate::signal::name as signal_name;
pub use descriptors::{close_range, move_above, open_descriptors};
pub use limits::{Limit, Resource, get_limit, get_limit_of, set_limit, set_limit_of};
pub use pidfd::{ExitStatus, PidFd, kill_and_reap};
pub use proc_fs::{
    MemoryUse, has_live_children, is_dying, is_zombie, memory_use, processes_with_parent,
    sleeping_threads, start_time, thread_count,
};
pub use processors::{available_processors, get_affinity, set_affinity};
pub use thread_end::at_thread_end;

/// The id that the kernel gives a process: positive, and free for another process once this one is reaped.
///
/// To know a process again later, keep its [`start_time`] with it, or a [`PidFd`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(i32);

impl Pid {
    /// Makes a `Pid` of a number; `None` unless it is positive (0 and negative numbers mean groups of processes
    /// to most system calls).
    pub const fn new(raw: i32) -> Option<Pid> {
        if raw > 0 { Some(Pid(raw)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> i32 {
        self.0
    }

    /// Returns the calling process's id: `getpid(2)`.
    pub fn this() -> Pid {
        from_rustix(rustix::process::getpid())
    }

    /// Returns the calling thread's id: `gettid(2)`. It is the process's own in its first thread; no two threads or
    /// processes that live have the same. `/proc` knows a thread under its id too.
    pub fn this_thread() -> Pid {
        from_rustix(rustix::thread::gettid())
    }

    /// Returns the parent's id now: `getppid(2)`. `None` if the parent is in an outer pid namespace (the first
    /// process of a container, for instance).
    ///
    /// # If a process dies
    ///
    /// When the parent dies, this becomes the id of the process that adopts orphans.
    pub fn parent() -> Option<Pid> {
        rustix::process::getppid().map(from_rustix)
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pid({})", self.0)
    }
}

fn from_rustix(pid: rustix::process::Pid) -> Pid {
    Pid(pid.as_raw_nonzero().get())
}

/// Which of the two processes returned from [`fork`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The caller of `fork`; the child's id. The child stays a zombie until it is reaped ([`PidFd::wait`]).
    Parent(Pid),
    /// The new process.
    Child,
}

/// Why there is no new process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForkError {
    /// The calling process has other threads, which would be missing in the child while the locks they hold
    /// stay locked there. Nothing was forked.
    MultiThreaded {
        /// Threads of this process that can still run code, the caller included.
        threads: usize,
    },
    /// The kernel refused (`EAGAIN`: the limit of processes, here or of the control group; `ENOMEM`), or the
    /// threads could not be counted.
    Sys(SysError),
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ForkError::MultiThreaded { threads } => write!(
                f,
                "fork refused: this process has {threads} threads, and a fork copies only the calling one"
            ),
            ForkError::Sys(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ForkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ForkError::MultiThreaded { .. } => None,
            ForkError::Sys(error) => Some(error),
        }
    }
}

impl From<SysError> for ForkError {
    fn from(error: SysError) -> Self {
        ForkError::Sys(error)
    }
}

/// True between the check and the return of [`fork`]: the child handler then keeps the guarded descriptors.
static FORK_IS_OURS: AtomicBool = AtomicBool::new(false);

/// Forks this process after a check that it has no other thread: `fork(2)`.
///
/// The fork counts as *ours*: descriptors given to [`close_in_foreign_forks`] stay open in the child. Handlers
/// registered with `pthread_atfork` run as in any fork. Nothing is flushed: what the standard streams have
/// buffered would be written twice, so flush them first (Rust's by `flush`, C's by [`flush_c_streams`]).
///
/// # Errors
///
/// [`ForkError::MultiThreaded`] if there is a second thread (a thread that has been joined and is only on its way
/// out does not count); [`ForkError::Sys`] if the kernel refuses, or `/proc` is not there to count in.
///
/// # Safety
///
/// * Both processes return from here. What must happen once (destructors with an effect outside of the process,
///   such as removing a file) must be kept from happening twice: usually the child leaves by [`exit_now`].
/// * No thread may be started between the check and the fork: not by a signal handler, that is.
pub unsafe fn fork() -> Result<Forked, ForkError> {
    let threads = thread_count()?;
    if threads > 1 {
        return Err(ForkError::MultiThreaded { threads });
    }
    FORK_IS_OURS.store(true, Ordering::SeqCst);
    // SAFETY: this is the only thread, as just counted, so that no lock of libc or of the program is held by a
    // thread that the child lacks; the caller answers for what then happens twice.
    let pid = unsafe { libc::fork() };
    let errno = Errno::last();
    FORK_IS_OURS.store(false, Ordering::SeqCst);
    match pid {
        0 => Ok(Forked::Child),
        pid => match Pid::new(pid) {
            Some(pid) => Ok(Forked::Parent(pid)),
            None => Err(ForkError::Sys(SysError::new("fork", "this process", errno))),
        },
    }
}

/// How many descriptors [`close_in_foreign_forks`] holds at once.
const GUARDED_MAX: usize = 32;
/// The value of a free entry.
const UNGUARDED: RawFd = -1;

/// The guarded descriptors. An entry is taken and given back by one compare-and-swap, so the child handler finds
/// whole entries whenever the fork comes.
static GUARDED: [AtomicI32; GUARDED_MAX] = [const { AtomicI32::new(UNGUARDED) }; GUARDED_MAX];
static GUARD_HANDLER: Once = Once::new();

/// Has `fd` closed in every child that is forked by anyone but [`fork`]: `pthread_atfork(3)`.
///
/// For a descriptor that means "a process of this program lives" (a `flock` that forks inherit on purpose): a
/// grandchild made by some library would otherwise hold it for as long as it likes. The flag CLOEXEC is no help
/// there, since it acts at `exec` only. The child closes it on its way out of the fork, which may be later than the
/// parent's. Children made without libc's `fork` (`vfork`, `posix_spawn`, a bare
/// `clone`) do not run the handler; those that exec are covered by CLOEXEC.
///
/// The registration is inherited by children, ours too. It is by number: call [`close_in_foreign_forks_forget`]
/// before the descriptor is closed, or the number's next user is closed in its place. Code that runs in a foreign
/// child must not drop an owner of the descriptor, which is closed already.
///
/// # Panics
///
/// If 32 descriptors are registered already, `fd` is negative, or libc has no memory for the handler.
pub fn close_in_foreign_forks(fd: RawFd) {
    assert!(fd >= 0, "{fd} is no descriptor");
    GUARD_HANDLER.call_once(|| {
        // SAFETY: the handler is an `extern "C"` function of this image that lives as long as the program, and
        // it does what a child of any fork may do: atomics and `close`.
        let failed = unsafe { libc::pthread_atfork(None, None, Some(close_guarded_in_child)) };
        assert!(
            failed == 0,
            "pthread_atfork failed: {}",
            Errno::from_raw(failed)
        );
    });
    if GUARDED
        .iter()
        .any(|entry| entry.load(Ordering::SeqCst) == fd)
    {
        return;
    }
    let taken = GUARDED.iter().any(|entry| {
        entry
            .compare_exchange(UNGUARDED, fd, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    });
    assert!(
        taken,
        "more than {GUARDED_MAX} descriptors to close in foreign forks"
    );
}

/// Takes back [`close_in_foreign_forks`]; does nothing for a descriptor that is not registered.
pub fn close_in_foreign_forks_forget(fd: RawFd) {
    if fd < 0 {
        return;
    }
    for entry in &GUARDED {
        let _ = entry.compare_exchange(fd, UNGUARDED, Ordering::SeqCst, Ordering::SeqCst);
    }
}

/// The child handler. Async-signal-safe: the forking process may have had any number of threads.
extern "C" fn close_guarded_in_child() {
    if FORK_IS_OURS.load(Ordering::SeqCst) {
        return;
    }
    for entry in &GUARDED {
        let fd = entry.swap(UNGUARDED, Ordering::SeqCst);
        if fd != UNGUARDED {
            // SAFETY: the one who registered the descriptor asked for this; nobody in the child has used it yet,
            // because the child is still inside of `fork`.
            unsafe { libc::close(fd) };
        }
    }
}

/// Has the kernel send `signal` to this process when its parent dies, and tells whether the parent still is
/// `expected_parent`: `prctl(PR_SET_PDEATHSIG)`, then `getppid(2)`.
///
/// `Ok(false)` means that the parent died before the request: no signal will come, so leave at once. Both belong
/// together; a parent may die at any time between `fork` and this call.
///
/// A child that is stopped (SIGSTOP) before this call has not asked yet: it outlives its parent until it is continued.
///
/// Three traps. The signal comes when the *thread* that forked ends, even if its process goes on: fork from a
/// thread that stays to the end. The request is dropped by a fork (the child's child has none) and by the exec of a
/// set-user-id or capable program. And across a pid namespace the parent's id reads as 0, which never is
/// `expected_parent`.
///
/// # Errors
///
/// `EINVAL` if `signal` is no signal.
pub fn die_with_parent(expected_parent: Pid, signal: i32) -> crate::Result<bool> {
    ask_for_death_signal(signal).map_err(|errno| {
        SysError::new("prctl(PR_SET_PDEATHSIG)", format!("signal {signal}"), errno)
    })?;
    Ok(Pid::parent() == Some(expected_parent))
}

/// `prctl(PR_SET_PDEATHSIG)` and nothing else: async-signal-safe.
fn ask_for_death_signal(signal: i32) -> Result<(), Errno> {
    // SAFETY: PR_SET_PDEATHSIG takes one integer, and touches no memory of ours.
    let failed = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) };
    if failed == 0 {
        Ok(())
    } else {
        Err(Errno::last())
    }
}

/// Makes `command`'s child die with this process: it asks for SIGKILL at its parent's death after the fork, and
/// does not exec if its parent is another process by then.
///
/// Configure the command in the process that will spawn it: the expected parent is the process that calls this
/// function, and a command carried across a fork fails to spawn, with `ESRCH`.
///
/// The signal belongs to the *thread* that spawns: the child is killed when that thread ends, even though its
/// process goes on. Spawn from the main thread, or from one that outlives the child. A set-user-id program drops
/// the request at exec; grandchildren never have it.
///
/// The child is made by `fork` and `exec` rather than by `posix_spawn`, as with any `pre_exec`.
pub fn command_dies_with_parent(command: &mut Command) {
    let expected_parent = Pid::this();
    // SAFETY: between fork and exec the closure makes two system calls and builds an error that allocates
    // nothing (`from_raw_os_error`): async-signal-safe, so it may run in the child of a threaded process.
    unsafe {
        command.pre_exec(move || {
            ask_for_death_signal(libc::SIGKILL)
                .map_err(|errno| io::Error::from_raw_os_error(errno.raw()))?;
            if Pid::parent() == Some(expected_parent) {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::ESRCH))
            }
        });
    }
}

/// Sends a signal to a process: `kill(2)`. Signal 0 sends nothing and checks only whether that would be possible.
///
/// The id may meanwhile belong to another process unless the target is an unreaped child of ours; a [`PidFd`] has
/// no such doubt. A zombie takes signals, and nothing happens.
///
/// # Errors
///
/// `ESRCH` if there is no such process, `EPERM` if it is not ours to signal, `EINVAL` for no signal.
pub fn kill(pid: Pid, signal: i32) -> crate::Result<()> {
    // SAFETY: two integers. The id is positive, so this is one process, never a group.
    if unsafe { libc::kill(pid.get(), signal) } == 0 {
        return Ok(());
    }
    Err(SysError::last(
        "kill",
        format!("process {pid} with {}", signal_name(signal)),
    ))
}

/// Ends this process at once: `_exit(2)`. No destructor runs, nothing is flushed, no `atexit` function is called.
///
/// How a forked child ends: the buffers and exit functions it inherited are its parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` touches nothing and does not return.
    unsafe { libc::_exit(code) }
}

/// Writes out what C's output streams have buffered: `fflush(NULL)`. Failures are C's to keep (`ferror`).
///
/// Before a fork, or each process writes the buffer once; and before [`exit_now`].
pub fn flush_c_streams() {
    // SAFETY: a null stream means all open output streams; libc locks each.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

/// Returns 64 bits that no other call or process gets, but by chance: `getrandom(2)`.
///
/// # Panics
///
/// If the kernel has no such call (it came with Linux 3.17).
///
/// # Blocking
///
/// At most once after boot, until the kernel has gathered entropy.
pub fn random_u64() -> u64 {
    let mut bytes = [0u8; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("getrandom failed: {errno}"),
        }
    }
    u64::from_ne_bytes(bytes)
}

/// Returns the user id that this process acts with: `geteuid(2)`.
pub fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

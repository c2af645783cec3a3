//! Signals: sets and masks, what is done at a signal's arrival, signals as a descriptor, and a last word on abort.
//!
//! **Invariants**
//!
//! 1. A fork inherits mask and actions; an exec resets handlers to the default but keeps "ignored" and the mask.
//!    So a handler that does nothing is what a process sets that wants to survive a signal without its programs
//!    surviving it, too ([`set_empty_handler`]).
//! 2. Masks belong to threads, actions to the process.
//! 3. Handlers are installed with SA_RESTART: a system call that was interrupted goes on. (Some never do:
//!    `epoll_wait`, `poll`, `futex` with a deadline; this crate repeats those.)
//!
//! **Not here**: sending signals to other processes ([`crate::process::kill`], [`crate::process::PidFd`]).
//!
//! # Safety
//!
//! Unsafe code here calls libc's signal functions on structures of the calling frame. What a handler may do is the
//! duty of whoever installs it; the two handlers of this module use atomics and async-signal-safe functions only.
#![allow(unsafe_code)]

use std::fmt;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::error::{During, Errno, SysError};
use crate::process::Pid;

macro_rules! signals {
    ($($name:ident $text:literal,)*) => {
        $(
            #[doc = concat!($text, ".")]
            pub const $name: i32 = libc::$name;
        )*

        fn standard_name(signal: i32) -> Option<&'static str> {
            match signal {
                $($name => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

signals! {
    SIGHUP "Hang-up of the controlling terminal",
    SIGINT "Interrupt from the terminal",
    SIGQUIT "Quit from the terminal",
    SIGILL "Illegal instruction",
    SIGTRAP "Trap for a debugger",
    SIGABRT "Abort",
    SIGBUS "Memory access that its object cannot serve",
    SIGFPE "Arithmetic error",
    SIGKILL "Kill; cannot be caught, blocked or ignored",
    SIGUSR1 "First of the two for users",
    SIGSEGV "Memory access that is not allowed",
    SIGUSR2 "Second of the two for users",
    SIGPIPE "Write to a pipe or socket without readers",
    SIGALRM "Timer",
    SIGTERM "Termination",
    SIGSTKFLT "Stack fault of a coprocessor; unused",
    SIGCHLD "A child ended, stopped or went on",
    SIGCONT "Go on after a stop",
    SIGSTOP "Stop; cannot be caught, blocked or ignored",
    SIGTSTP "Stop from the terminal",
    SIGTTIN "Terminal input for a background process",
    SIGTTOU "Terminal output of a background process",
    SIGURG "Urgent data on a socket",
    SIGXCPU "Limit of processor time exceeded",
    SIGXFSZ "Limit of file size exceeded",
    SIGVTALRM "Timer of processor time",
    SIGPROF "Profiling timer",
    SIGWINCH "The terminal's window changed size",
    SIGIO "Input or output is possible",
    SIGPWR "Power failure",
    SIGSYS "System call that is not allowed",
}

/// Returns a signal's name as `SIGKILL`, `"real-time signal"` for those from 32 to 64, and `"no signal"` for numbers
/// that are none (0 among them).
pub fn name(signal: i32) -> &'static str {
    match standard_name(signal) {
        Some(name) => name,
        None if (32..=64).contains(&signal) => "real-time signal",
        None => "no signal",
    }
}

/// A set of signals: `sigset_t`.
#[derive(Clone, Copy)]
pub struct SignalSet(libc::sigset_t);

impl SignalSet {
    /// The set of no signal.
    pub fn empty() -> SignalSet {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: `sigemptyset` initialises the set and cannot fail.
        SignalSet(unsafe {
            libc::sigemptyset(raw.as_mut_ptr());
            raw.assume_init()
        })
    }

    /// The set of all signals, but for those that the C library keeps to itself. SIGKILL and SIGSTOP are in it,
    /// and are left alone by every call that takes a set.
    pub fn all() -> SignalSet {
        let mut raw = MaybeUninit::uninit();
        // SAFETY: `sigfillset` initialises the set and cannot fail.
        SignalSet(unsafe {
            libc::sigfillset(raw.as_mut_ptr());
            raw.assume_init()
        })
    }

    /// This set and `signal`.
    ///
    /// # Panics
    ///
    /// If there is no such signal, or the C library keeps it to itself.
    #[must_use]
    pub fn with(mut self, signal: i32) -> SignalSet {
        // SAFETY: the set is initialised.
        let failed = unsafe { libc::sigaddset(&mut self.0, signal) };
        assert!(failed == 0, "{signal} is no signal");
        self
    }

    /// This set without `signal`.
    ///
    /// # Panics
    ///
    /// As [`with`](Self::with).
    #[must_use]
    pub fn without(mut self, signal: i32) -> SignalSet {
        // SAFETY: the set is initialised.
        let failed = unsafe { libc::sigdelset(&mut self.0, signal) };
        assert!(failed == 0, "{signal} is no signal");
        self
    }

    /// Whether `signal` is in it; no for numbers that are no signal.
    pub fn contains(&self, signal: i32) -> bool {
        // SAFETY: the set is initialised; a bad number gives -1.
        unsafe { libc::sigismember(&self.0, signal) == 1 }
    }

    /// The signals in it, ascending.
    pub fn iter(&self) -> impl Iterator<Item = i32> + '_ {
        (1..=64).filter(|&signal| self.contains(signal))
    }
}

impl Default for SignalSet {
    fn default() -> Self {
        SignalSet::empty()
    }
}

impl FromIterator<i32> for SignalSet {
    fn from_iter<I: IntoIterator<Item = i32>>(signals: I) -> Self {
        signals
            .into_iter()
            .fold(SignalSet::empty(), SignalSet::with)
    }
}

impl PartialEq for SignalSet {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for SignalSet {}

impl fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Signal(i32);
        impl fmt::Debug for Signal {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match standard_name(self.0) {
                    Some(name) => f.write_str(name),
                    None => self.0.fmt(f),
                }
            }
        }
        f.debug_set().entries(self.iter().map(Signal)).finish()
    }
}

/// Blocks these signals in the calling thread, too, and returns the mask as it was: `pthread_sigmask(3)`. A blocked
/// signal stays pending until it is unblocked or read from a [`SignalFd`].
///
/// # Errors
///
/// None that Linux knows.
pub fn block(set: &SignalSet) -> crate::Result<SignalSet> {
    change_mask(libc::SIG_BLOCK, Some(set))
}

/// Unblocks these signals in the calling thread, and returns the mask as it was. Those that are pending are
/// delivered before this returns.
///
/// # Errors
///
/// None that Linux knows.
pub fn unblock(set: &SignalSet) -> crate::Result<SignalSet> {
    change_mask(libc::SIG_UNBLOCK, Some(set))
}

/// Unblocks all signals in the calling thread, and returns the mask as it was.
///
/// # Errors
///
/// None that Linux knows.
pub fn unblock_all() -> crate::Result<SignalSet> {
    set_mask(&SignalSet::empty())
}

/// Blocks exactly these signals in the calling thread, and returns the mask as it was, to be set again.
///
/// # Errors
///
/// None that Linux knows.
pub fn set_mask(set: &SignalSet) -> crate::Result<SignalSet> {
    change_mask(libc::SIG_SETMASK, Some(set))
}

/// Returns the signals that are blocked in the calling thread.
///
/// # Errors
///
/// None that Linux knows.
pub fn mask() -> crate::Result<SignalSet> {
    change_mask(libc::SIG_BLOCK, None)
}

fn change_mask(how: i32, set: Option<&SignalSet>) -> crate::Result<SignalSet> {
    let mut old = SignalSet::empty();
    let new = set.map_or(ptr::null(), |set| ptr::from_ref(&set.0));
    // SAFETY: `new` is null or an initialised set that is only read, `old` an initialised one of this frame.
    let failed = unsafe { libc::pthread_sigmask(how, new, &mut old.0) };
    match failed {
        0 => Ok(old),
        errno => Err(SysError::new("pthread_sigmask", "", Errno::from_raw(errno))),
    }
}

/// What is done when a signal arrives, as it was at some time: to be set again by [`restore`].
#[derive(Clone, Copy)]
pub struct SavedAction(libc::sigaction);

impl SavedAction {
    /// Whether the signal had its default effect.
    pub fn is_default(&self) -> bool {
        self.0.sa_sigaction == libc::SIG_DFL
    }

    /// Whether the signal was ignored.
    pub fn is_ignored(&self) -> bool {
        self.0.sa_sigaction == libc::SIG_IGN
    }
}

impl fmt::Debug for SavedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match () {
            () if self.is_default() => "SavedAction(default)",
            () if self.is_ignored() => "SavedAction(ignored)",
            () => "SavedAction(handler)",
        })
    }
}

/// Returns what is done at a signal: `sigaction(2)`.
///
/// # Errors
///
/// `EINVAL` for no signal.
pub fn action(signal: i32) -> crate::Result<SavedAction> {
    // SAFETY: no action is given.
    unsafe { change_action(signal, None) }
}

/// Gives a signal its default effect, and returns what was done before.
///
/// Needed for SIGCHLD before any child is made: a process started with SIGCHLD ignored (it is inherited across
/// exec) loses the exit statuses of its children.
///
/// # Errors
///
/// `EINVAL` for no signal, SIGKILL and SIGSTOP.
pub fn set_default(signal: i32) -> crate::Result<SavedAction> {
    // SAFETY: no handler is installed.
    unsafe { change_action(signal, Some(&new_action(libc::SIG_DFL))) }
}

/// Ignores a signal, and returns what was done before. Programs that are exec'd ignore it, too (invariant 1).
///
/// # Errors
///
/// `EINVAL` for no signal, SIGKILL and SIGSTOP.
pub fn set_ignore(signal: i32) -> crate::Result<SavedAction> {
    // SAFETY: no handler is installed.
    unsafe { change_action(signal, Some(&new_action(libc::SIG_IGN))) }
}

/// Has `handler` called with the signal's number, and returns what was done before. Interrupted system calls go on
/// (SA_RESTART); the handler runs on the alternate stack where the thread has one.
///
/// # Errors
///
/// `EINVAL` for no signal, SIGKILL and SIGSTOP.
///
/// # Safety
///
/// * `handler` may be called between any two instructions of any thread that does not block the signal, so it may
///   only do what is async-signal-safe (`signal-safety(7)`): no allocation, no lock, no panic.
/// * It must leave `errno` as it found it, unless it does not return.
pub unsafe fn set_handler(
    signal: i32,
    handler: extern "C" fn(libc::c_int),
) -> crate::Result<SavedAction> {
    let handler = handler as *const () as libc::sighandler_t;
    // SAFETY: the caller answers for the handler, which is a function of one integer, as SA_SIGINFO is not set.
    unsafe { change_action(signal, Some(&new_action(handler))) }
}

/// Has nothing done at a signal, and returns what was done before. As [`set_ignore`], but programs that are exec'd
/// get the default effect again, and a call that waits for signals ends.
///
/// # Errors
///
/// `EINVAL` for no signal, SIGKILL and SIGSTOP.
pub fn set_empty_handler(signal: i32) -> crate::Result<SavedAction> {
    extern "C" fn do_nothing(_signal: libc::c_int) {}
    // SAFETY: the handler does nothing.
    unsafe { set_handler(signal, do_nothing) }
}

/// Sets what [`action`] or one of the setters returned.
///
/// # Errors
///
/// `EINVAL` for no signal, SIGKILL and SIGSTOP.
pub fn restore(signal: i32, saved: &SavedAction) -> crate::Result<()> {
    // SAFETY: the action was in force in this image before (a `SavedAction` comes from nowhere else), so whoever
    // installed its handler has answered for it.
    unsafe { change_action(signal, Some(&saved.0)) }.map(drop)
}

fn new_action(handler: libc::sighandler_t) -> libc::sigaction {
    // SAFETY: all fields are integers, sets of bits or an optional function: zero is a value of each.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_mask = SignalSet::empty().0;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    action
}

/// `sigaction(2)`.
///
/// # Safety
///
/// * A handler in `new` must be async-signal-safe.
unsafe fn change_action(signal: i32, new: Option<&libc::sigaction>) -> crate::Result<SavedAction> {
    let mut old = new_action(libc::SIG_DFL);
    // SAFETY: `new` is null or an initialised structure that is only read, `old` one of this frame; the caller
    // answers for the handler.
    let failed =
        unsafe { libc::sigaction(signal, new.map_or(ptr::null(), ptr::from_ref), &mut old) };
    match failed {
        0 => Ok(SavedAction(old)),
        _ => Err(SysError::last(
            "sigaction",
            format!("signal {signal} ({})", name(signal)),
        )),
    }
}

/// Sends a signal to the calling thread: `raise(3)`. If it is not blocked, its handler has returned when this
/// returns.
///
/// # Errors
///
/// `EINVAL` for no signal.
pub fn raise(signal: i32) -> crate::Result<()> {
    // SAFETY: an integer.
    match unsafe { libc::raise(signal) } {
        0 => Ok(()),
        _ => Err(SysError::last(
            "raise",
            format!("signal {signal} ({})", name(signal)),
        )),
    }
}

/// Lets the default effect of a signal happen to this process, whatever handler and mask were set: so a process
/// that caught a signal to tidy up can still be seen to have died of it.
///
/// Returns only for signals whose default is to do nothing (SIGCHLD, SIGURG, SIGWINCH, SIGCONT), or for a stop once
/// it is over.
/// The signal keeps its default effect, and is unblocked in this thread.
///
/// # Errors
///
/// `EINVAL` for no signal.
pub fn raise_default(signal: i32) -> crate::Result<()> {
    if signal != SIGKILL && signal != SIGSTOP {
        set_default(signal)?;
        unblock(&SignalSet::empty().with(signal))?;
    }
    raise(signal)
}

/// The function given to [`on_abort`], as a pointer; null: none.
static ABORT_HOOK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// Has `hook` called with the value of `errno` when this process aborts; then the abort happens: the process dies
/// of SIGABRT.
///
/// What it is for: when an allocation fails (a memory limit, [`Resource::DataBytes`](crate::process::Resource)),
/// Rust aborts, and `errno` still is `ENOMEM`. The hook can leave a note of that in shared memory, so that the
/// death can be told from a bug. The note is a hint: other causes may leave `ENOMEM` behind as well, and the message
/// that is printed before may change it: where `RUST_BACKTRACE` is set, it does.
/// [`CallProbe`](crate::stack::CallProbe) says more.
///
/// The hook runs on the stack of the thread that aborts, below its frames, never on the alternate stack.
///
/// The handler is inherited by forks; [`set_default`]`(SIGABRT)` takes it off. Calling this again replaces the hook.
///
/// # Errors
///
/// None that Linux knows.
///
/// # Safety
///
/// * `hook` may be called between any two instructions of any thread, and by several threads at once, so it may only
///   do what is async-signal-safe: atomics, stores to memory that is mapped for the rest of the process's life, and
///   system calls; no allocation, no lock, no panic.
pub unsafe fn on_abort(hook: extern "C" fn(libc::c_int)) -> crate::Result<()> {
    ABORT_HOOK.store(hook as *mut (), Ordering::SeqCst);
    let mut new = new_action(call_abort_hook as *const () as libc::sighandler_t);
    new.sa_flags &= !libc::SA_ONSTACK;
    // SAFETY: the handler does what is async-signal-safe, given that the hook does; it does not return.
    unsafe { change_action(SIGABRT, Some(&new)) }.map(drop)
}

extern "C" fn call_abort_hook(_signal: libc::c_int) {
    let errno = raw_errno();
    let hook = ABORT_HOOK.load(Ordering::SeqCst);
    if !hook.is_null() {
        // SAFETY: a pointer that is not null was stored by `on_abort`, from a function of this type.
        let hook = unsafe { mem::transmute::<*mut (), extern "C" fn(libc::c_int)>(hook) };
        hook(errno);
    }
    // SAFETY: all of these are async-signal-safe, and get structures of this frame. The signal is blocked while its
    // handler runs; unblocked, the second one is delivered here and ends the process.
    unsafe {
        libc::sigaction(SIGABRT, &new_action(libc::SIG_DFL), ptr::null_mut());
        let set = SignalSet::empty().with(SIGABRT);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set.0, ptr::null_mut());
        libc::raise(SIGABRT);
        libc::_exit(128 + SIGABRT);
    }
}

/// Whether the calling thread's `errno` is `ENOMEM`: an allocation or a system call found no memory since it was
/// last set. Async-signal-safe.
pub fn errno_is_enomem() -> bool {
    raw_errno() == libc::ENOMEM
}

/// Reads `errno` and nothing else. Async-signal-safe.
fn raw_errno() -> libc::c_int {
    // SAFETY: libc gives the address of this thread's `errno`, valid for as long as the thread.
    unsafe { *libc::__errno_location() }
}

/// A signal that was read from a [`SignalFd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalInfo {
    /// Its number.
    pub signal: i32,
    /// The sender, as far as there was one: the child for SIGCHLD; `None` for the kernel and for processes of outer
    /// pid namespaces.
    pub pid: Option<Pid>,
    /// The sender's user id; 0 when there was no sender.
    pub uid: u32,
}

/// Signals as a descriptor: `signalfd(2)`. Non-blocking, close-on-exec; readable while one of its signals is
/// pending, for an [`Epoll`](crate::poll::Epoll).
///
/// The signals must be [`block`]ed in every thread, or they take their usual effect. Standard signals do not
/// queue: several that came before one read are one.
///
/// **Trap**: a `SignalFd` reads signals of whoever reads, but an epoll reports those of the process that registered
/// it. A forked child must neither use the parent's epoll nor rely on the inherited descriptor in it.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Makes a descriptor for these signals. SIGKILL and SIGSTOP in the set do nothing.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE` without free descriptors; `ENOMEM`.
    pub fn new(set: &SignalSet) -> crate::Result<SignalFd> {
        // SAFETY: the set is initialised, and only read.
        let fd = unsafe { libc::signalfd(-1, &set.0, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(SysError::last("signalfd", format!("{set:?}")));
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(SignalFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the next pending signal; `None` if there is none.
    ///
    /// # Errors
    ///
    /// None that Linux knows.
    pub fn read_nonblocking(&self) -> crate::Result<Option<SignalInfo>> {
        let mut record = [0u8; mem::size_of::<libc::signalfd_siginfo>()];
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut record[..]));
        if read == Err(rustix::io::Errno::AGAIN) {
            return Ok(None);
        }
        let target = format_args!("signalfd {}", self.0.as_raw_fd());
        let read_len_bytes = read.during("read", target)?;
        // The kernel writes whole records only.
        assert_eq!(
            read_len_bytes,
            record.len(),
            "signalfd gave part of a record"
        );
        // SAFETY: the record is as long as the structure, and any bytes are values of its integers; it is read
        // unaligned.
        let info = unsafe {
            record
                .as_ptr()
                .cast::<libc::signalfd_siginfo>()
                .read_unaligned()
        };
        Ok(Some(SignalInfo {
            signal: info.ssi_signo as i32,
            pid: Pid::new(info.ssi_pid as i32),
            uid: info.ssi_uid,
        }))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes a descriptor that `signalfd` made, moved to another number perhaps. It should be non-blocking.
impl From<OwnedFd> for SignalFd {
    fn from(fd: OwnedFd) -> Self {
        SignalFd(fd)
    }
}

impl From<SignalFd> for OwnedFd {
    fn from(signal_fd: SignalFd) -> Self {
        signal_fd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_signals() {
        assert_eq!(name(SIGXFSZ), "SIGXFSZ");
        assert_eq!(name(9), "SIGKILL");
        assert_eq!(name(libc::SIGRTMIN()), "real-time signal");
        assert_eq!(name(0), "no signal");
        assert_eq!(name(65), "no signal");
        assert!((1..32).all(|signal| name(signal).starts_with("SIG")));
    }

    #[test]
    fn set_holds_what_was_put_in() {
        let set = SignalSet::empty()
            .with(SIGINT)
            .with(SIGTERM)
            .with(SIGHUP)
            .without(SIGTERM);
        assert!(set.contains(SIGINT) && !set.contains(SIGTERM) && !set.contains(0));
        assert_eq!(set.iter().collect::<Vec<_>>(), [SIGHUP, SIGINT]);
        assert_eq!(set, [SIGINT, SIGHUP].into_iter().collect());
        assert_eq!(format!("{set:?}"), "{SIGHUP, SIGINT}");
        assert!(SignalSet::all().contains(SIGUSR1));
    }

    #[test]
    #[should_panic(expected = "0 is no signal")]
    fn set_refuses_what_is_no_signal() {
        let _ = SignalSet::empty().with(0);
    }

    #[test]
    fn mask_is_set_and_restored() {
        let only = SignalSet::empty().with(SIGUSR1);
        let before = set_mask(&only).unwrap();
        assert_eq!(mask().unwrap(), only);
        assert_eq!(block(&SignalSet::empty().with(SIGUSR2)).unwrap(), only);
        assert_eq!(unblock(&only).unwrap(), only.with(SIGUSR2));
        assert_eq!(mask().unwrap(), SignalSet::empty().with(SIGUSR2));
        set_mask(&before).unwrap();
        assert_eq!(mask().unwrap(), before);
    }

    #[test]
    fn action_of_kill_cannot_be_set() {
        assert_eq!(set_ignore(SIGKILL).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(action(0).unwrap_err().errno, Errno::EINVAL);
    }
}

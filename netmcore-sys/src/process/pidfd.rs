//! A descriptor that is one process and no other, and how that process ended.
//!
//! **Invariants**
//!
//! 1. A `PidFd` refers to the same process for ever, also when its id has been given to another.
//! 2. Only a parent reaps, and through its own children's `PidFd`s only the named one: a host program's other
//!    children, and its `wait`, are left alone.
//!
//! # Safety
//!
//! Unsafe code here is one system call that rustix offers for named signals only; it touches no memory of ours.
#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus};

use super::{Pid, signal_name};
use crate::error::{During, SysError};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    /// By `exit`.
    Exited {
        /// The low 8 bits of what it gave to `exit`.
        code: i32,
    },
    /// By a signal.
    Signaled {
        /// The signal's number.
        signal: i32,
        /// Whether a core dump was written.
        core_dumped: bool,
    },
}

impl ExitStatus {
    /// Whether the process ended by `exit(0)`.
    pub fn is_success(self) -> bool {
        self == ExitStatus::Exited { code: 0 }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            ExitStatus::Exited { code } => write!(f, "exited with code {code}"),
            ExitStatus::Signaled {
                signal,
                core_dumped,
            } => {
                write!(f, "killed by signal {signal} ({})", signal_name(signal))?;
                if core_dumped {
                    f.write_str(", core dumped")
                } else {
                    Ok(())
                }
            }
        }
    }
}

/// A process as a descriptor: `pidfd_open(2)`, from Linux 5.3 on. Close-on-exec.
///
/// It becomes readable when the process has ended (as a zombie, so before it is reaped), and stays so: it can be
/// registered in an [`Epoll`](crate::poll::Epoll).
///
/// **Trap**: a registration in an epoll ends when the last copy of the descriptor is closed, not when ours is. A
/// sibling forked meanwhile holds a copy, so a closed `PidFd` would go on firing for ever: remove it from the epoll
/// before it is dropped.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens process `pid`. Safe from mistaking another process for it only while `pid` cannot be reused: for
    /// children of the caller that are not reaped yet.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is no such process; `EMFILE`, `ENFILE` without free descriptors.
    pub fn open(pid: Pid) -> crate::Result<PidFd> {
        rustix::process::Pid::from_raw(pid.get())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
            .map(PidFd)
            .during("pidfd_open", format_args!("process {pid}"))
    }

    /// Sends a signal to this very process: `pidfd_send_signal(2)`. Signal 0 only checks.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has been reaped; `EPERM`; `EINVAL` for no signal. A zombie takes signals, and nothing happens.
    pub fn send_signal(&self, signal: i32) -> crate::Result<()> {
        // SAFETY: a descriptor that `self` keeps open, an integer, a null siginfo (meaning: as kill(2) does), and
        // no flags; the kernel writes nothing.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0u32,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        Err(SysError::last(
            "pidfd_send_signal",
            format!("{} to pidfd {}", signal_name(signal), self.0.as_raw_fd()),
        ))
    }

    /// Reaps the process if it has ended: `waitid(P_PIDFD, WEXITED|WNOHANG)`. `None` while it runs.
    ///
    /// # Errors
    ///
    /// `ECHILD` if it is no child of the caller, has been reaped before, or SIGCHLD is ignored (the kernel then
    /// reaps by itself, and the status is lost: set SIGCHLD to its default first).
    pub fn wait_nonblocking(&self) -> crate::Result<Option<ExitStatus>> {
        self.waitid(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Waits until the process has ended, and reaps it: `waitid(P_PIDFD, WEXITED)`.
    ///
    /// # Errors
    ///
    /// As [`wait_nonblocking`](Self::wait_nonblocking).
    ///
    /// # Blocking
    ///
    /// Until the process ends. Interruptions by signals are waited out.
    pub fn wait(&self) -> crate::Result<ExitStatus> {
        loop {
            if let Some(status) = self.waitid(WaitIdOptions::EXITED)? {
                return Ok(status);
            }
        }
    }

    fn waitid(&self, options: WaitIdOptions) -> crate::Result<Option<ExitStatus>> {
        let id = || WaitId::PidFd(self.0.as_fd());
        rustix::io::retry_on_intr(|| rustix::process::waitid(id(), options))
            .map(|status| status.map(|status| exit_status(&status)))
            .during("waitid", format_args!("pidfd {}", self.0.as_raw_fd()))
    }
}

/// Kills a child that the caller could not get a [`PidFd`] for, and reaps it: `kill(2)` with SIGKILL, then
/// `waitid(P_PID, WEXITED)`.
///
/// # Errors
///
/// `ECHILD` if it is no child of the caller, or has been reaped.
///
/// # Blocking
///
/// Until the child is gone, which a child in an uninterruptible system call may delay.
pub fn kill_and_reap(pid: Pid) -> crate::Result<ExitStatus> {
    super::kill(pid, libc::SIGKILL)?;
    loop {
        let waitid = || match rustix::process::Pid::from_raw(pid.get()) {
            Some(pid) => rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED),
            None => Err(rustix::io::Errno::CHILD),
        };
        let status =
            rustix::io::retry_on_intr(waitid).during("waitid", format_args!("process {pid}"))?;
        if let Some(status) = status {
            return Ok(exit_status(&status));
        }
    }
}

fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    if let Some(code) = status.exit_status() {
        return ExitStatus::Exited { code };
    }
    ExitStatus::Signaled {
        signal: status.terminating_signal().unwrap_or(0),
        core_dumped: status.dumped(),
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes a descriptor that `pidfd_open` or `clone` with `CLONE_PIDFD` made.
impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        PidFd(fd)
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> Self {
        pidfd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Errno;

    #[test]
    fn exit_status_display_says_how() {
        assert_eq!(
            ExitStatus::Exited { code: 3 }.to_string(),
            "exited with code 3"
        );
        assert_eq!(
            ExitStatus::Signaled {
                signal: 9,
                core_dumped: false
            }
            .to_string(),
            "killed by signal 9 (SIGKILL)"
        );
        assert_eq!(
            ExitStatus::Signaled {
                signal: 11,
                core_dumped: true
            }
            .to_string(),
            "killed by signal 11 (SIGSEGV), core dumped"
        );
    }

    #[test]
    fn pidfd_of_a_process_that_is_not_is_esrch() {
        // Above the largest pid_max that Linux allows (2^22).
        let error = PidFd::open(Pid::new(i32::MAX).unwrap()).unwrap_err();
        assert_eq!(error.errno, Errno::ESRCH);
    }

    #[test]
    fn pidfd_of_no_child_is_echild() {
        let error = PidFd::open(Pid::this())
            .unwrap()
            .wait_nonblocking()
            .unwrap_err();
        assert_eq!(error.errno, Errno::ECHILD);
    }
}

//! Locks on whole files: `flock(2)`, and open file description locks (`F_OFD_SETLK`, `fcntl(2)`).
//!
//! | | excludes | a fork's copy of the descriptor | freed when |
//! |---|---|---|---|
//! | `flock` ([`lock_exclusive`]) | other `flock`s | holds the lock, too | unlocked through any copy, or the last copy is closed |
//! | OFD lock ([`OfdGuard`]) | other OFD locks and POSIX record locks | holds the lock, too | the same |
//!
//! Neither is dropped when some other descriptor of the same file is closed, as POSIX record locks are. The
//! two do not see each other.
//!
//! **If a process dies here.** The kernel closes its descriptors; a lock is free as soon as the last process
//! that has a copy of its descriptor is gone. A stopped process holds its locks; a zombie, whose descriptors
//! are closed, does not.
//!
//! **Not here.** POSIX record locks: they belong to the process, vanish when *any* descriptor of the file is
//! closed, and do not exclude the threads of one process.
//!
//! # Safety
//!
//! `fcntl` is called with a pointer to a `struct flock` on the stack, which lives through the call.

#![allow(unsafe_code)]

use crate::error::{Errno, Result, SysError};
use fs2::FileExt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Takes the exclusive `flock(2)` of `file` if it is free: whether it is ours now.
///
/// The lock belongs to the open file description: forked children hold it, too, until the last of
/// them is gone or one of them calls [`unlock`].
///
/// # Errors
///
/// `ENOLCK` or what the file system says.
pub fn try_lock_exclusive(file: &File) -> Result<bool> {
    loop {
        match FileExt::try_lock_exclusive(file) {
            Ok(()) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(flock_error(file, &e)),
        }
    }
}

/// Takes the exclusive `flock(2)` of `file`.
///
/// # Blocking
///
/// Until every other holder is gone; signals do not end the wait.
///
/// # Errors
///
/// As [`try_lock_exclusive`].
pub fn lock_exclusive(file: &File) -> Result<()> {
    loop {
        match FileExt::lock_exclusive(file) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(flock_error(file, &e)),
        }
    }
}

/// Gives up the `flock(2)` of `file`: for all processes that share the descriptor.
///
/// # Errors
///
/// As [`try_lock_exclusive`]. That it was not locked is no error.
pub fn unlock(file: &File) -> Result<()> {
    FileExt::unlock(file).map_err(|e| flock_error(file, &e))
}

fn flock_error(file: &File, error: &io::Error) -> SysError {
    SysError::new("flock", describe(file.as_fd()), Errno::from_io(error))
}

/// A file with an open file description lock on all of it, for as long as the guard lives.
///
/// It excludes other such locks (also of threads of this process, if each opens the file afresh)
/// and POSIX record locks of other processes.
///
/// Open the file for it, and do not fork while it is held: a child's copy of the descriptor is the same lock.
/// Dropping the guard unlocks for all copies, then closes.
///
/// ```
/// use netmcore_sys::file_lock::OfdGuard;
/// use std::fs::OpenOptions;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("log");
/// let open = || OpenOptions::new().create(true).append(true).open(&path);
/// let guard = OfdGuard::lock(open()?)?;
/// assert!(OfdGuard::try_lock(open()?)?.is_none());
/// drop(guard);
/// assert!(OfdGuard::try_lock(open()?)?.is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OfdGuard {
    file: File,
}

impl OfdGuard {
    /// Locks `file`: `F_OFD_SETLKW` with a write lock.
    ///
    /// # Blocking
    ///
    /// Until every other holder has gone or unlocked; signals do not end the wait.
    ///
    /// # Errors
    ///
    /// `EBADF` if the file is not open for writing; what the file system says.
    pub fn lock(file: File) -> Result<OfdGuard> {
        while let Err(error) = set_lock(file.as_fd(), libc::F_OFD_SETLKW, libc::F_WRLCK) {
            if error.errno != Errno::EINTR {
                return Err(error);
            }
        }
        Ok(OfdGuard { file })
    }

    /// Locks `file` if nobody else has; `None` (and the file closed) if somebody has.
    ///
    /// # Errors
    ///
    /// As [`lock`](Self::lock).
    pub fn try_lock(file: File) -> Result<Option<OfdGuard>> {
        Ok(ofd_try_lock(file.as_fd())?.then(|| OfdGuard { file }))
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Deref for OfdGuard {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for OfdGuard {
    fn drop(&mut self) {
        // Closing is not enough if a fork has a copy. Unlocking a lock that is held cannot fail.
        let _ = ofd_unlock(self.file.as_fd());
    }
}

/// Takes the write lock of the whole file for the open file description of `fd`, if nobody else has a lock:
/// whether it is held now. For one that is taken already, true.
///
/// # Errors
///
/// `EBADF` if it is not open for writing; what the file system says.
pub fn ofd_try_lock(fd: BorrowedFd<'_>) -> Result<bool> {
    match set_lock(fd, libc::F_OFD_SETLK, libc::F_WRLCK) {
        Ok(()) => Ok(true),
        Err(e) if e.errno == Errno::EAGAIN || e.errno == Errno::EACCES => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives up the lock that [`ofd_try_lock`] took, for all copies of the descriptor.
///
/// # Errors
///
/// What the file system says. That it was not locked is no error.
pub fn ofd_unlock(fd: BorrowedFd<'_>) -> Result<()> {
    set_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK)
}

/// Who holds a lock that [`ofd_try_lock`] would have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockHolder {
    /// A process, with a POSIX record lock.
    Process {
        /// Its id, in the pid namespace of the caller; 0 if it is not visible from there.
        pid: i32,
    },
    /// An open file description, with an OFD lock; any number of processes may share it.
    OpenFile,
}

/// Asks who holds a lock that keeps `fd` from locking the whole file: `F_OFD_GETLK`. `None` if nobody does,
/// or if it is `fd`'s own open file description.
///
/// The answer may be out of date when it is read.
///
/// # Errors
///
/// What the file system says.
pub fn ofd_holder(fd: BorrowedFd<'_>) -> Result<Option<LockHolder>> {
    let mut lock = whole_file(libc::F_WRLCK);
    // SAFETY: `lock` lives through the call, which writes the answer into it.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } == -1 {
        return Err(SysError::last("fcntl(F_OFD_GETLK)", describe(fd)));
    }
    Ok(match (i32::from(lock.l_type), lock.l_pid) {
        (libc::F_UNLCK, _) => None,
        (_, -1) => Some(LockHolder::OpenFile),
        (_, pid) => Some(LockHolder::Process { pid }),
    })
}

fn set_lock(fd: BorrowedFd<'_>, command: i32, lock_type: i32) -> Result<()> {
    let lock = whole_file(lock_type);
    // SAFETY: `lock` lives through the call, which reads it.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const lock) } == -1 {
        return Err(SysError::last("fcntl(F_OFD_SETLK)", describe(fd)));
    }
    Ok(())
}

fn whole_file(lock_type: i32) -> libc::flock {
    // SAFETY: all fields are integers; some systems have more of them than are set here.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // F_WRLCK and F_UNLCK are 1 and 2.
    lock.l_type = lock_type as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

fn describe(fd: BorrowedFd<'_>) -> String {
    format!("descriptor {}", fd.as_raw_fd())
}

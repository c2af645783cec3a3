//! The socket that the ancestor's admin tool looks for: `netplex.controller/admin`.
//!
//! **Protocol.** Made by the master once the liveness lock is its own, removed at an orderly end. `netplex-admin`
//! cleans a directory only if this is a Unix socket; it need not answer.
//!
//! **If a process dies here.** The socket stays, so that the tool can clean; the next start replaces it.
//!
//! **Not here.** What is spoken over the socket: that is for the one who listens.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use netmcore_sys::crash_point;
use netmcore_sys::socket::{self, Listener, SocketError};

use crate::error::{Error, Result, While};
use crate::liveness::Liveness;
use crate::trust::{self, Expected};

const CONTROLLER_NAME: &str = "netplex.controller";
const SOCKET_NAME: &str = "admin";

/// A path in the file system that a Unix socket listens at, for the administration of one directory.
///
/// ```
/// use netmcore_pmanage::{ControllerSocket, Liveness};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let dir = temporary.path();
/// let lock = Liveness::acquire(dir)?;
/// let listener = ControllerSocket::create(dir, &lock)?;
/// assert!(ControllerSocket::path(dir).ends_with("netplex.controller/admin"));
/// assert!(listener.accept_nonblocking()?.is_none());
/// ControllerSocket::remove(dir, &lock)?;
/// assert!(!dir.join("netplex.controller").exists());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ControllerSocket(());

impl ControllerSocket {
    /// Where the socket of `dir` is.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join(CONTROLLER_NAME).join(SOCKET_NAME)
    }

    /// Makes the socket of `dir`, in place of the one that a dead master left, and listens at it. Only the caller's
    /// user can connect.
    ///
    /// # Errors
    ///
    /// [`Error::SocketPathTooLong`]; nothing was made then. [`Error::Untrusted`] if what is there is not ours or not a
    /// socket; it stays. [`Error::System`] and [`Error::Io`].
    ///
    /// # Panics
    ///
    /// If `lock` is the lock of another directory.
    pub fn create(dir: &Path, lock: &Liveness) -> Result<Listener> {
        lock.assert_of(dir)?;
        let path = ControllerSocket::path(dir);
        socket::check_path(&path)?;
        trust::check_directory(&trust::absolute(dir)?)?;
        trust::prepare_directory(&dir.join(CONTROLLER_NAME))?;
        crash_point!("pmanage.controller.directory_made");
        if trust::look(&path, Expected::Socket)?.is_some() {
            trust::remove(&path)?;
        }
        crash_point!("pmanage.controller.stale_removed");
        let listener = Listener::bind(&path)?;
        crash_point!("pmanage.controller.bound");
        Ok(listener)
    }

    /// Removes the socket of `dir` and its directory. That they are not there is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`] if there is something else in its place; [`Error::Io`], also if something else stands
    /// in the socket's directory.
    ///
    /// # Panics
    ///
    /// If `lock` is the lock of another directory.
    pub fn remove(dir: &Path, lock: &Liveness) -> Result<()> {
        lock.assert_of(dir)?;
        let controller = dir.join(CONTROLLER_NAME);
        if trust::look(&controller, Expected::Directory)?.is_none() {
            return Ok(());
        }
        let path = ControllerSocket::path(dir);
        if trust::look(&path, Expected::Socket)?.is_some() {
            trust::remove(&path)?;
        }
        crash_point!("pmanage.controller.removed");
        match fs::remove_dir(&controller) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).on(&controller, "cannot remove the directory")
            }
            _ => Ok(()),
        }
    }
}

impl From<SocketError> for Error {
    fn from(error: SocketError) -> Error {
        match error {
            SocketError::PathTooLong {
                path,
                limit_bytes,
                len_bytes,
            } => Error::SocketPathTooLong {
                path,
                len_bytes,
                limit_bytes,
            },
            SocketError::Sys(error) => Error::System(error),
            // The enum may grow.
            error => Error::Io {
                path: PathBuf::new(),
                doing: "cannot make the socket",
                source: io::Error::other(error),
            },
        }
    }
}

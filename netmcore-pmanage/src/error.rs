//! What can go wrong with a record, and what a caller may do about it.

use std::io;
use std::path::{Path, PathBuf};

use netmcore_sys::error::SysError;
use netmcore_sys::process::Pid;

use crate::object::{InvalidName, KernelObject};
use crate::record::Damaged;
use crate::trust::Distrust;

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on a file of the directory failed.
    #[error("{doing} {path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done to it: `cannot open`.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory is in use by a live program. Nothing was touched.
    #[error("a program already runs in {dir}: process {pid}", dir = dir.display())]
    AlreadyRunning {
        /// The directory.
        dir: PathBuf,
        /// The program's master.
        pid: Pid,
    },
    /// The master of the last program in the directory is dead, but processes of that program still
    /// hold its lock after two seconds. Nothing was touched.
    #[error("the last program in {dir} is dead, but not all of its processes are: {pids}", dir = dir.display(), pids = in_words(pids))]
    StillDying {
        /// The directory.
        dir: PathBuf,
        /// The processes that hold the lock, as far as this process may see them; empty if they belong to
        /// another user or live in another pid namespace.
        pids: Vec<Pid>,
    },
    /// The record names things to delete, and others than the caller can decide what it says. Nothing was
    /// read from it and nothing written.
    #[error("{path} cannot be trusted: {why}", path = path.display())]
    Untrusted {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: Distrust,
    },
    /// A line of the record cannot be read. See [`Recovery::into_result`](crate::Recovery::into_result).
    #[error("damaged record {path}: {damaged}", path = path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// The line, with its number and what is wrong with it.
        damaged: Damaged,
    },
    /// Objects could not be unlinked. They stay in the record.
    #[error("cannot unlink {count} of the recorded objects: {list}", count = objects.len(), list = listed(objects))]
    Unlink {
        /// All of them, each with the reason.
        objects: Vec<(KernelObject, SysError)>,
    },
    /// An object that was to be recorded or unlinked has a name that cannot be.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// The path of the controller socket is longer than a socket address can hold.
    #[error("the socket path {path} has {len_bytes} bytes, more than {limit_bytes}: use a shorter directory", path = path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len_bytes: usize,
        /// The most that the kernel takes.
        limit_bytes: usize,
    },
    /// A system call that concerns no file of the directory failed.
    #[error(transparent)]
    System(#[from] SysError),
}

fn in_words(pids: &[Pid]) -> String {
    if pids.is_empty() {
        return "processes that cannot be seen from here".to_owned();
    }
    let pids: Vec<String> = pids.iter().map(Pid::to_string).collect();
    pids.join(", ")
}

fn listed(objects: &[(KernelObject, SysError)]) -> String {
    let objects: Vec<String> = objects
        .iter()
        .map(|(object, error)| format!("{object} ({error})"))
        .collect();
    objects.join("; ")
}

/// For use as a [`Recorder`](netmcore_sys::Recorder): keeps the message and, where there is one, the kind.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Io { source, .. } => source.kind(),
            Error::Untrusted { .. } => io::ErrorKind::PermissionDenied,
            Error::InvalidName(_) => io::ErrorKind::InvalidInput,
            Error::System(source) => source.errno.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// Says what was being done to which file.
pub(crate) trait While<T> {
    fn on(self, path: &Path, doing: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> While<T> for std::result::Result<T, E> {
    fn on(self, path: &Path, doing: &'static str) -> Result<T> {
        self.map_err(|source| Error::Io {
            path: path.to_owned(),
            doing,
            source: source.into(),
        })
    }
}

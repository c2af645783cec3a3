//! Which directories and files are believed: those that are ours, and that nobody else can write.
//!
//! **Protocol.** A path is looked at without following a link; if it is what it should be, it is opened, and
//! what was opened is looked at again: it must be the same file. Since nobody else can write the directory,
//! nobody else can exchange the file in between.
//!
//! **Not here.** Directories above the one given: whoever may rename those may replace all of it, with or
//! without a record.

use std::fmt;
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use netmcore_sys::process::effective_uid;

use crate::error::{Error, Result, While};

/// Why a file or directory is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Distrust {
    /// It belongs to another user.
    Owner {
        /// Whose it is.
        uid: u32,
        /// Who we are.
        expected_uid: u32,
    },
    /// Its group or others may write it.
    WritableByOthers {
        /// Its mode: the lowest 12 bits of `st_mode`.
        mode: u32,
    },
    /// It is a symbolic link.
    Link,
    /// It is not a directory.
    NotADirectory,
    /// It is not a regular file.
    NotARegularFile,
    /// It is not a socket.
    NotASocket,
    /// It was replaced while it was being opened.
    Replaced,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Distrust::Owner { uid, expected_uid } => {
                write!(
                    f,
                    "it belongs to user {uid}, and this is user {expected_uid}"
                )
            }
            Distrust::WritableByOthers { mode } => {
                write!(f, "its mode {mode:03o} lets others write it")
            }
            Distrust::Link => f.write_str("it is a symbolic link"),
            Distrust::NotADirectory => f.write_str("it is not a directory"),
            Distrust::NotARegularFile => f.write_str("it is not a regular file"),
            Distrust::NotASocket => f.write_str("it is not a socket"),
            Distrust::Replaced => f.write_str("it was replaced while it was being opened"),
        }
    }
}

/// What a path must be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    Directory,
    RegularFile,
    Socket,
}

/// Makes `dir` if it does not exist, for its owner alone (mode 0700), or checks that it is a directory that
/// is ours and that nobody else can write. The directory above must exist.
///
/// # Errors
///
/// [`Error::Untrusted`], and [`Error::Io`] if it cannot be made.
pub fn prepare_directory(dir: &Path) -> Result<()> {
    let dir = absolute(dir)?;
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(e).on(&dir, "cannot create the directory");
        }
        _ => {}
    }
    check_directory(&dir)
}

/// The directory by an absolute path without `.` and without a slash at its end, which would hide that it is a link.
pub(crate) fn absolute(dir: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(dir).on(dir, "cannot make absolute")?;
    Ok(absolute.components().collect())
}

pub(crate) fn check_directory(dir: &Path) -> Result<()> {
    match look(dir, Expected::Directory)? {
        Some(_) => Ok(()),
        None => Err(io::Error::from(io::ErrorKind::NotFound)).on(dir, "cannot find the directory"),
    }
}

/// What stands at `path`, if it is as `expected`, ours, and closed to other writers; `None` if nothing does.
pub(crate) fn look(path: &Path, expected: Expected) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => {
            believe(path, &metadata, expected)?;
            Ok(Some(metadata))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).on(path, "cannot look at"),
    }
}

fn believe(path: &Path, metadata: &Metadata, expected: Expected) -> Result<()> {
    let file_type = metadata.file_type();
    let mode = metadata.mode() & 0o7777;
    let expected_uid = effective_uid();
    let why = if file_type.is_symlink() {
        Distrust::Link
    } else if expected == Expected::Directory && !file_type.is_dir() {
        Distrust::NotADirectory
    } else if expected == Expected::RegularFile && !file_type.is_file() {
        Distrust::NotARegularFile
    } else if expected == Expected::Socket && !file_type.is_socket() {
        Distrust::NotASocket
    } else if metadata.uid() != expected_uid {
        Distrust::Owner {
            uid: metadata.uid(),
            expected_uid,
        }
    } else if mode & 0o022 != 0 && expected != Expected::Socket {
        // A socket's mode says who may connect; who may replace it is for its directory to say.
        Distrust::WritableByOthers { mode }
    } else {
        return Ok(());
    };
    Err(Error::Untrusted {
        path: path.to_owned(),
        why,
    })
}

/// Opens the regular file at `path` for reading and writing; `None` if there is none.
pub(crate) fn open(path: &Path) -> Result<Option<File>> {
    let Some(seen) = look(path, Expected::RegularFile)? else {
        return Ok(None);
    };
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).on(path, "cannot open"),
    };
    let opened = file.metadata().on(path, "cannot look at")?;
    believe(path, &opened, Expected::RegularFile)?;
    if !is_same_file(&seen, &opened) {
        return Err(Error::Untrusted {
            path: path.to_owned(),
            why: Distrust::Replaced,
        });
    }
    Ok(Some(file))
}

/// Opens the regular file at `path` for reading and writing, and makes it first (mode 0600) if there is none.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    loop {
        if let Some(file) = open(path)? {
            return Ok(file);
        }
        match create_new(path) {
            Ok(file) => return Ok(file),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).on(path, "cannot create"),
        }
    }
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Whether `path` still leads to `file`.
pub(crate) fn still_leads_to(path: &Path, file: &File) -> Result<bool> {
    let Some(seen) = look(path, Expected::RegularFile)? else {
        return Ok(false);
    };
    let opened = file.metadata().on(path, "cannot look at")?;
    Ok(is_same_file(&seen, &opened))
}

pub(crate) fn is_same_file(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Removes the file or socket at `path`, if there is one.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on(path, "cannot remove"),
        _ => Ok(()),
    }
}

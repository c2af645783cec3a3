//! One object that outlives the process that made it, and its unlink.
//!
//! **Invariants.** What [`KernelObject::new`] and [`KernelObject::check`] let pass could have been
//! created under that name: a shared memory object or semaphore by `shm_open` or `sem_open`, a file by
//! a path that is absolute, has no `..` and ends in a name. Only such names are written to a record or
//! unlinked.
//!
//! **Not here.** Who still uses an object: that is for the owner of the record to know. The
//! semaphores behind a container: they are recorded as what they are.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use netmcore_sys::error::{Errno, SysError};
use netmcore_sys::name::{NameError, ObjectName};
use netmcore_sys::record::ObjectKind;

/// An object with a name that the kernel keeps until somebody unlinks it.
///
/// ```
/// use netmcore_pmanage::{KernelObject, ObjectKind};
///
/// let object = KernelObject::new(ObjectKind::PosixShm, b"/results").unwrap();
/// assert_eq!(object.name(), b"/results");
/// assert!(KernelObject::new(ObjectKind::File, b"relative/path").is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelObject {
    /// A file; the path is absolute. Recorded as `FILE`.
    File(PathBuf),
    /// A POSIX shared memory object: `shm_overview(7)`. Recorded as `POSIX_SHM`.
    PosixShm(ObjectName),
    /// A named POSIX semaphore: `sem_overview(7)`. Recorded as `POSIX_SEM`.
    PosixSem(ObjectName),
    /// A container of semaphores, by the prefix of their names, which begins with `/`. Recorded as
    /// `SEM_CONT`.
    SemContainer(Vec<u8>),
}

/// What [`KernelObject::unlink`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlinked {
    /// The object was there and has no name any more.
    Removed,
    /// There was nothing of this name.
    NotThere,
}

impl KernelObject {
    /// The object of this kind and name, if such an object could exist.
    ///
    /// # Errors
    ///
    /// [`InvalidName`] says which rule the name breaks.
    pub fn new(kind: ObjectKind, name: &[u8]) -> Result<KernelObject, InvalidName> {
        let object = match kind {
            ObjectKind::File => KernelObject::File(PathBuf::from(OsStr::from_bytes(name))),
            ObjectKind::PosixShm => KernelObject::PosixShm(object_name(kind, name)?),
            ObjectKind::PosixSem => KernelObject::PosixSem(object_name(kind, name)?),
            ObjectKind::SemContainer => KernelObject::SemContainer(name.to_vec()),
        };
        object.check()?;
        Ok(object)
    }

    /// Checks what the type does not: that the path is one a file could have been created by, the
    /// semaphore's name is short enough, the prefix begins with `/` and no name has a NUL byte.
    ///
    /// # Errors
    ///
    /// [`InvalidName`] says which rule the name breaks.
    pub fn check(&self) -> Result<(), InvalidName> {
        match self {
            KernelObject::File(path) => check_path(path).map_err(|why| self.invalid(why)),
            KernelObject::PosixShm(_) => Ok(()),
            KernelObject::PosixSem(name) => name
                .for_semaphore()
                .map_err(|e| self.invalid(NameRule::ObjectName(e))),
            KernelObject::SemContainer(prefix) => {
                if !prefix.starts_with(b"/") {
                    Err(self.invalid(NameRule::NotAbsolute))
                } else if prefix.contains(&0) {
                    Err(self.invalid(NameRule::Nul))
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The object's kind.
    pub fn kind(&self) -> ObjectKind {
        match self {
            KernelObject::File(_) => ObjectKind::File,
            KernelObject::PosixShm(_) => ObjectKind::PosixShm,
            KernelObject::PosixSem(_) => ObjectKind::PosixSem,
            KernelObject::SemContainer(_) => ObjectKind::SemContainer,
        }
    }

    /// The bytes of the name, as they stand in the record before escaping.
    pub fn name(&self) -> &[u8] {
        match self {
            KernelObject::File(path) => path.as_os_str().as_bytes(),
            KernelObject::PosixShm(name) | KernelObject::PosixSem(name) => name.as_bytes(),
            KernelObject::SemContainer(prefix) => prefix,
        }
    }

    /// Takes the object's name away: `unlink(2)`, `shm_unlink(3)`, `sem_unlink(3)`. Processes that
    /// have the object open keep it.
    ///
    /// A final symbolic link is removed itself, never what it points to; a directory is never removed. For
    /// a container there is nothing to do, since its semaphores lie in a shared memory object or are
    /// recorded each by its own name.
    ///
    /// # Errors
    ///
    /// The call's error, or `EINVAL` for a name that [`check`](Self::check) refuses. That the object does
    /// not exist is no error.
    pub fn unlink(&self) -> Result<Unlinked, SysError> {
        if let Err(invalid) = self.check() {
            return Err(SysError::new("unlink", invalid.to_string(), Errno::EINVAL));
        }
        let outcome = match self {
            KernelObject::File(path) => fs::remove_file(path).map_err(|e| unlink_error(path, &e)),
            KernelObject::PosixShm(name) => netmcore_sys::shm::unlink(name),
            KernelObject::PosixSem(name) => netmcore_sys::sem::unlink(name),
            KernelObject::SemContainer(_) => return Ok(Unlinked::NotThere),
        };
        match outcome {
            Ok(()) => Ok(Unlinked::Removed),
            // ENOTDIR: what would have to be its directory is not one.
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR) => {
                Ok(Unlinked::NotThere)
            }
            Err(error) => Err(error),
        }
    }

    fn invalid(&self, rule: NameRule) -> InvalidName {
        InvalidName {
            kind: self.kind(),
            name: self.name().to_vec(),
            rule,
        }
    }
}

fn object_name(kind: ObjectKind, name: &[u8]) -> Result<ObjectName, InvalidName> {
    ObjectName::new(name).map_err(|e| InvalidName {
        kind,
        name: name.to_vec(),
        rule: NameRule::ObjectName(e),
    })
}

pub(crate) fn unlink_error(path: &Path, error: &io::Error) -> SysError {
    SysError::new("unlink", path.display().to_string(), Errno::from_io(error))
}

/// Longest path that the kernel takes, without the NUL at its end: `PATH_MAX - 1`.
const PATH_LIMIT_BYTES: usize = 4095;
/// Longest name of one directory entry: `NAME_MAX`.
const COMPONENT_LIMIT_BYTES: usize = 255;

fn check_path(path: &Path) -> Result<(), NameRule> {
    let bytes = path.as_os_str().as_bytes();
    if !bytes.starts_with(b"/") {
        return Err(NameRule::NotAbsolute);
    }
    if bytes.contains(&0) {
        return Err(NameRule::Nul);
    }
    let mut last: &[u8] = b"";
    let mut longest = 0;
    for component in bytes.split(|&b| b == b'/') {
        if component == b".." {
            return Err(NameRule::ParentDirectory);
        }
        longest = longest.max(component.len());
        last = component;
    }
    if last.is_empty() || last == b"." {
        return Err(NameRule::NotAFileName);
    }
    for (len_bytes, limit_bytes) in [
        (longest, COMPONENT_LIMIT_BYTES),
        (bytes.len(), PATH_LIMIT_BYTES),
    ] {
        if len_bytes > limit_bytes {
            return Err(NameRule::TooLong {
                len_bytes,
                limit_bytes,
            });
        }
    }
    Ok(())
}

/// The object's kind in words and its name, with bytes that are not printable ASCII escaped.
impl fmt::Display for KernelObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}",
            kind_in_words(self.kind()),
            self.name().escape_ascii()
        )
    }
}

fn kind_in_words(kind: ObjectKind) -> &'static str {
    match kind {
        ObjectKind::File => "file",
        ObjectKind::PosixShm => "shared memory object",
        ObjectKind::PosixSem => "semaphore",
        ObjectKind::SemContainer => "semaphore container",
    }
}

/// A name that no object of this kind can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidName {
    /// What it should have named.
    pub kind: ObjectKind,
    /// The name.
    pub name: Vec<u8>,
    /// The rule that it breaks.
    pub rule: NameRule,
}

/// The rule that an [`InvalidName`] breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameRule {
    /// It does not begin with `/`.
    NotAbsolute,
    /// It contains a NUL byte.
    Nul,
    /// The path has a component `..`.
    ParentDirectory,
    /// The path ends in `/` or `/.`: it can only be a directory.
    NotAFileName,
    /// The path, or one component of it, is longer than the kernel takes.
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// The most that is allowed.
        limit_bytes: usize,
    },
    /// It cannot be the name of a shared memory object or semaphore.
    ObjectName(NameError),
}

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {} can be called ", kind_in_words(self.kind))?;
        if self.name.len() > 80 {
            write!(f, "\"{}...\": ", self.name[..80].escape_ascii())?;
        } else {
            write!(f, "\"{}\": ", self.name.escape_ascii())?;
        }
        match &self.rule {
            NameRule::NotAbsolute => f.write_str("it does not begin with a slash"),
            NameRule::Nul => f.write_str("it contains a NUL byte"),
            NameRule::ParentDirectory => f.write_str("it has a component \"..\""),
            NameRule::NotAFileName => f.write_str("it does not end in the name of a file"),
            NameRule::TooLong {
                len_bytes,
                limit_bytes,
            } => write!(f, "{len_bytes} bytes are more than {limit_bytes}"),
            NameRule::ObjectName(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for InvalidName {}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(kind: ObjectKind, name: &[u8]) -> NameRule {
        KernelObject::new(kind, name).unwrap_err().rule
    }

    #[test]
    fn names_that_no_creating_call_takes_are_refused() {
        use ObjectKind::{File, PosixSem, PosixShm, SemContainer};
        for kind in [File, SemContainer] {
            assert_eq!(rule(kind, b""), NameRule::NotAbsolute);
            assert_eq!(rule(kind, b"a/b"), NameRule::NotAbsolute);
            assert_eq!(rule(kind, b"/a\0"), NameRule::Nul);
        }
        assert_eq!(rule(File, b"/a/../b"), NameRule::ParentDirectory);
        assert_eq!(rule(File, b"/.."), NameRule::ParentDirectory);
        for path in [b"/".as_slice(), b"/a/", b"/a/.", b"//"] {
            assert_eq!(rule(File, path), NameRule::NotAFileName);
        }
        let component = [b"/tmp/".as_slice(), &[b'x'; 256]].concat();
        assert!(matches!(
            rule(File, &component),
            NameRule::TooLong { len_bytes: 256, .. }
        ));
        assert!(KernelObject::new(File, &component[..260]).is_ok());
        let path = b"/abc".repeat(1024);
        assert!(matches!(
            rule(File, &path),
            NameRule::TooLong {
                len_bytes: 4096,
                ..
            }
        ));
        assert!(KernelObject::new(File, &path[..4095]).is_ok());
        for kind in [PosixShm, PosixSem] {
            for name in [b"".as_slice(), b"/", b"/..", b"/../etc/passwd", b"x"] {
                assert!(matches!(rule(kind, name), NameRule::ObjectName(_)));
            }
        }
        let name = [b"/".as_slice(), &[b'x'; 254]].concat();
        assert!(KernelObject::new(PosixShm, &name).is_ok());
        assert!(matches!(rule(PosixSem, &name), NameRule::ObjectName(_)));
    }

    #[test]
    fn unlink_refuses_what_check_refuses() {
        let object = KernelObject::File(PathBuf::from("relative"));
        assert_eq!(object.unlink().unwrap_err().errno, Errno::EINVAL);
    }

    #[test]
    fn unlink_takes_a_link_and_leaves_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let link = dir.path().join("link");
        fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let object = KernelObject::File(link.clone());
        assert_eq!(object.unlink(), Ok(Unlinked::Removed));
        assert_eq!(object.unlink(), Ok(Unlinked::NotThere));
        assert_eq!(fs::read(&target).unwrap(), b"kept");
        assert!(fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn unlink_never_takes_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let error = KernelObject::File(inner.clone()).unlink().unwrap_err();
        assert!(matches!(error.errno, Errno::EISDIR | Errno::EPERM));
        assert!(inner.is_dir());
    }

    #[test]
    fn file_below_a_file_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let object = KernelObject::File(file.join("below"));
        assert_eq!(object.unlink(), Ok(Unlinked::NotThere));
        assert!(file.exists());
    }

    #[test]
    fn display_escapes_and_says_the_kind() {
        let object = KernelObject::new(ObjectKind::PosixSem, b"/s\n\xff").unwrap();
        assert_eq!(object.to_string(), "semaphore /s\\n\\xff");
    }
}

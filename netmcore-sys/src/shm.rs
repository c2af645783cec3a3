//! POSIX shared memory objects and anonymous memory files, as owned descriptors.
//!
//! **Protocol.** An object is created exclusively, sized by [`allocate`] (which says `ENOSPC` now instead of
//! `SIGBUS` later), mapped ([`map`](crate::map)), and unlinked once. Descriptor, mapping and name are
//! independent: an unlinked object lives on while it is mapped or open.
//!
//! **If a process dies here.** Its descriptors and mappings go; the name stays until somebody unlinks it.
//! Recording names for that is the caller's part ([`record`](crate::record)). An anonymous file
//! has no name and goes with its last descriptor and mapping.
//!
//! **Not here.** Mapping: [`map`](crate::map).

use crate::error::{During, Result};
use crate::name::ObjectName;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::{Errno as KernelErrno, retry_on_intr};
use rustix::shm::{Mode, OFlags};
use std::ffi::{CStr, OsStr};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Where Linux keeps the objects; `shm_overview(7)`.
pub(crate) const MOUNT: &str = "/dev/shm";
/// What the C library puts before the name of a semaphore's file there.
pub(crate) const SEMAPHORE_PREFIX: &str = "sem.";

/// What may be done through a descriptor or a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Creates an object that does not exist yet: `shm_open(3)` with `O_CREAT|O_EXCL|O_RDWR`. It has length 0.
///
/// `mode` are the permission bits; the umask is taken off.
///
/// # Errors
///
/// `EEXIST` if the name is taken; `ENOSPC` if the file system is out of inodes; `EMFILE`, `EACCES`.
pub fn create(name: &ObjectName, mode: u32) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
    retry_on_intr(|| rustix::shm::open(name.as_c_str(), flags, Mode::from_raw_mode(mode)))
        .during("shm_open", name)
}

/// Opens an object that exists: `shm_open(3)`.
///
/// # Errors
///
/// `ENOENT`, `EACCES`, `EMFILE`.
pub fn open(name: &ObjectName, access: Access) -> Result<OwnedFd> {
    let flags = match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    retry_on_intr(|| rustix::shm::open(name.as_c_str(), flags, Mode::empty()))
        .during("shm_open", name)
}

/// Removes the name: `shm_unlink(3)`. Who has the object open or mapped keeps it.
///
/// # Errors
///
/// `ENOENT` if there is none, `EACCES` if it belongs to somebody else.
pub fn unlink(name: &ObjectName) -> Result<()> {
    rustix::shm::unlink(name.as_c_str()).during("shm_unlink", name)
}

/// The shared memory objects that exist now, of all users, in the order of their names. Semaphores, which
/// the C library keeps in the same place, are left out ([`sem::list`](crate::sem::list)).
///
/// # Errors
///
/// Those of reading the directory.
pub fn list() -> Result<Vec<ObjectName>> {
    list_files(|file_name| {
        (!file_name.starts_with(SEMAPHORE_PREFIX.as_bytes())).then_some(file_name)
    })
}

/// The objects whose file names `select` turns into names without the slash.
pub(crate) fn list_files(select: impl Fn(&[u8]) -> Option<&[u8]>) -> Result<Vec<ObjectName>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(MOUNT).during("opendir", MOUNT)? {
        let entry = entry.during("readdir", MOUNT)?;
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let file_name = entry.file_name();
        if let Some(name) = select(OsStr::as_bytes(&file_name)) {
            names.extend(ObjectName::new([b"/", name].concat()));
        }
    }
    names.sort();
    Ok(names)
}

/// Makes a memory file that has no name in the file system: `memfd_create(2)`. Its length is 0.
///
/// `name` is shown in `/proc/PID/maps` and need not be unique. The file can be [sealed](seal_shrink).
///
/// # Errors
///
/// `EMFILE`; `EINVAL` if `name` has more than 249 bytes.
pub fn anonymous(name: &CStr) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let created = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know the flag.
        Err(KernelErrno::INVAL) => rustix::fs::memfd_create(name, flags),
        created => created,
    };
    created.during("memfd_create", name.to_bytes().escape_ascii())
}

/// Sets the length: `ftruncate(2)`. New bytes are zero and take no memory yet.
///
/// Growing past the free space succeeds, and touching such a page is then a `SIGBUS`: use
/// [`allocate`] to grow. Shrinking takes pages away from all who have them mapped.
///
/// # Errors
///
/// `EFBIG`, `EPERM` if sealed against it.
pub fn set_len(fd: BorrowedFd<'_>, len_bytes: u64) -> Result<()> {
    retry_on_intr(|| rustix::fs::ftruncate(fd, len_bytes)).during("ftruncate", Descriptor(fd))
}

/// The length in bytes: `fstat(2)`.
///
/// # Errors
///
/// None for an object of this module.
pub fn len(fd: BorrowedFd<'_>) -> Result<u64> {
    let stat = rustix::fs::fstat(fd).during("fstat", Descriptor(fd))?;
    // The kernel keeps lengths below 2^63.
    Ok(stat.st_size as u64)
}

/// Makes `len_bytes` bytes from `offset` on present, and extends the length if they reach beyond it:
/// `fallocate(2)` with mode 0. Bytes that were there keep their contents, new ones are zero.
///
/// Memory is taken now: 64 KiB cost some ten microseconds, 256 MiB some 60 milliseconds. A length of 0 is
/// done at once.
///
/// # Errors
///
/// `ENOSPC` if the mount has not enough space, or `ENOMEM`; nothing is changed then.
pub fn allocate(fd: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<()> {
    if len_bytes == 0 {
        return Ok(());
    }
    retry_on_intr(|| rustix::fs::fallocate(fd, FallocateFlags::empty(), offset, len_bytes))
        .during("fallocate", Descriptor(fd))
}

/// Gives back the memory of a range, which reads as zero from then on; the length stays:
/// `fallocate(2)` with `FALLOC_FL_PUNCH_HOLE`. Pages that lie partly in the range are only zeroed.
///
/// Touching the range afterwards takes memory anew, without the promise that [`allocate`] makes.
///
/// # Errors
///
/// `EPERM` if sealed against writing.
pub fn punch_hole(fd: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> Result<()> {
    if len_bytes == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    retry_on_intr(|| rustix::fs::fallocate(fd, flags, offset, len_bytes))
        .during("fallocate(FALLOC_FL_PUNCH_HOLE)", Descriptor(fd))
}

/// Forbids for ever to shrink an [`anonymous`] file, so that nobody can take pages away from a mapping
/// of it: `F_SEAL_SHRINK`. Growing it and punching holes remain possible.
///
/// # Errors
///
/// `EINVAL` if it is not an anonymous file.
pub fn seal_shrink(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK).during("fcntl(F_ADD_SEALS)", Descriptor(fd))
}

/// Space in the file system of an object, in bytes; `u64::MAX` where it sets no limit of its own (as for
/// anonymous files).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeSpace {
    /// What can still be allocated.
    pub free_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
}

/// Asks for the space in the file system that `fd` lies in: `fstatfs(2)`.
///
/// The answer may be out of date when it is read: it is for messages and early warnings, not
/// a promise. [`allocate`] decides.
///
/// # Errors
///
/// None for an object of this module.
pub fn free_space(fd: BorrowedFd<'_>) -> Result<FreeSpace> {
    let stat = rustix::fs::fstatvfs(fd).during("fstatfs", Descriptor(fd))?;
    // A tmpfs without a size reports no blocks at all.
    Ok(match stat.f_blocks {
        0 => FreeSpace {
            free_bytes: u64::MAX,
            total_bytes: u64::MAX,
        },
        blocks => FreeSpace {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            total_bytes: blocks.saturating_mul(stat.f_frsize),
        },
    })
}

/// A descriptor as it is named in messages.
pub(crate) struct Descriptor<'fd>(pub(crate) BorrowedFd<'fd>);

impl fmt::Display for Descriptor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "descriptor {}", self.0.as_raw_fd())
    }
}

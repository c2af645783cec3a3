//! Shared memory objects with a name: recorded before they exist, and never larger than the memory behind them.
//!
//! **Protocol.** Look whether the name is free; record it; create the object; allocate its memory. To remove: unlink it; drop
//! the record. So it is recorded, or it does not exist. Memory is allocated when the object is made and when it grows, so
//! a lack of it is an error then, and not a bus error later.
//!
//! **If a process dies here.** Between recording and creating, or between unlinking and dropping the record: the record names
//! nothing. Between creating and allocating: the object is there, recorded, and empty or shorter. Its length is what it is, whoever died.
//!
//! **Not here.** Memory without a name: [`AnonRegion`](crate::AnonRegion).

use crate::anon::check_file_size_limit;
use crate::error::{Error, Result, SpaceLimit};
use crate::headroom::{HEADROOM_FROM_BYTES, headroom};
use netmcore_sys::map::Mapping;
use netmcore_sys::shm::{self, Access};
use netmcore_sys::{Errno, ObjectKind, ObjectName, Recorder, SysError, crash_point};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Where Linux keeps the objects; `shm_overview(7)`.
pub(crate) const MOUNT: &str = "/dev/shm";

/// A POSIX shared memory object, open in this process.
///
/// Dropping it closes it here. The object stays until it is [unlinked](Self::unlink), and even then for those who have it open
/// or mapped.
///
/// ```
/// use netmcore_shm::{Access, NoRecord, ObjectName, ShmObject};
///
/// let name = ObjectName::unique(b"/example_")?;
/// let object = ShmObject::create(&name, 8192, 0o600, &NoRecord)?;
/// assert_eq!(object.len_bytes()?, 8192);
/// let mapping = ShmObject::open(&name, Access::ReadOnly)?.map(Access::ReadOnly)?;
/// assert_eq!(mapping.len(), 8192);
/// ShmObject::unlink(&name, &NoRecord)?;
/// assert!(ShmObject::open(&name, Access::ReadOnly).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ShmObject {
    fd: OwnedFd,
    name: ObjectName,
}

impl ShmObject {
    /// Records and creates an object that does not exist yet: `shm_open(3)` with `O_CREAT|O_EXCL`. It has `len_bytes`
    /// zero bytes, whose memory is taken now. The umask is taken off the permission bits `mode`.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`]; [`Error::NoSpace`]; [`Error::Record`], nothing being created then; [`Error::System`]. The object does not
    /// exist afterwards, and is not recorded (unless it is somebody else's).
    ///
    /// # If a process dies
    ///
    /// The name is recorded; the object exists in full, or shorter, or not.
    ///
    /// # Blocking
    ///
    /// While the kernel clears the memory: 0.4 ms for 2 MiB, 58 ms for 256 MiB.
    #[doc(alias = "shm_create")]
    pub fn create(
        name: &ObjectName,
        len_bytes: u64,
        mode: u32,
        recorder: &dyn Recorder,
    ) -> Result<ShmObject> {
        // Before it is recorded: what is recorded will be deleted some day, and this is not ours.
        if exists(name) {
            return Err(Error::AlreadyExists { name: name.clone() });
        }
        recorder
            .register(ObjectKind::PosixShm, name.as_bytes())
            .map_err(|source| Error::Record {
                doing: format!("the shared memory object {name}"),
                source,
            })?;
        crash_point!("shm.object.recorded");
        let object = match shm::create(name, mode) {
            Ok(fd) => ShmObject {
                fd,
                name: name.clone(),
            },
            // It came into being since we looked. Most likely another process of this program has made it, and recorded it
            // under the same name: the record must stay.
            Err(error) if error.errno == Errno::EEXIST => {
                return Err(Error::AlreadyExists { name: name.clone() });
            }
            Err(error) => {
                // A failure here leaves a record too many.
                let _ = Self::unlink(name, recorder);
                return Err(failed("create", name, error));
            }
        };
        crash_point!("shm.object.created");
        if let Err(error) = object.grow(len_bytes) {
            let _ = Self::unlink(name, recorder);
            return Err(error);
        }
        crash_point!("shm.object.allocated");
        Ok(object)
    }

    /// Opens an object that exists: `shm_open(3)`.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`ENOENT`, `EACCES`, `EMFILE`).
    #[doc(alias = "shm_open")]
    pub fn open(name: &ObjectName, access: Access) -> Result<ShmObject> {
        match shm::open(name, access) {
            Ok(fd) => Ok(ShmObject {
                fd,
                name: name.clone(),
            }),
            Err(error) => Err(failed("open", name, error)),
        }
    }

    /// The name it was opened by.
    pub fn name(&self) -> &ObjectName {
        &self.name
    }

    /// The length in bytes, now; others may grow it at any time.
    ///
    /// # Errors
    ///
    /// None in practice.
    pub fn len_bytes(&self) -> Result<u64> {
        shm::len(self.fd.as_fd()).map_err(|error| failed("measure", &self.name, error))
    }

    /// Maps the whole object as long as it is now, where the kernel finds room.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`EACCES`: not open for that access; `EINVAL`: it is empty; `ENOMEM`).
    pub fn map(&self, access: Access) -> Result<Mapping> {
        let len_bytes = usize::try_from(self.len_bytes()?).unwrap_or(usize::MAX);
        Mapping::map(self.fd.as_fd(), len_bytes, access)
            .map_err(|error| failed("map", &self.name, error))
    }

    /// Makes it at least `len_bytes` long and takes the memory for it. New bytes are zero. It never becomes shorter, so
    /// several processes may do this at once.
    ///
    /// # Errors
    ///
    /// [`Error::NoSpace`] with the limit in the way; [`Error::System`] (`EBADF`: open to read only). The length is as before then.
    ///
    /// # If a process dies
    ///
    /// It has the old length or the new one; memory allocated beyond the old one is used when it grows again.
    ///
    /// # Blocking
    ///
    /// As [`create`](Self::create).
    pub fn grow(&self, len_bytes: u64) -> Result<()> {
        let old_len_bytes = self.len_bytes()?;
        let Some(more_bytes) = len_bytes.checked_sub(old_len_bytes) else {
            return Ok(());
        };
        check_file_size_limit(len_bytes)?;
        let no_space = |limit, free_bytes| Error::NoSpace {
            limit,
            wanted_bytes: more_bytes,
            free_bytes,
        };
        let free_bytes = || -> Result<u64> {
            let space = shm::free_space(self.fd.as_fd());
            Ok(space
                .map_err(|error| failed("measure", &self.name, error))?
                .free_bytes)
        };
        if more_bytes >= HEADROOM_FROM_BYTES {
            let free_bytes = free_bytes()?;
            if free_bytes < more_bytes {
                return Err(no_space(SpaceLimit::Mount(MOUNT.into()), free_bytes));
            }
            let room = headroom();
            if room.bytes < more_bytes {
                return Err(no_space(room.limit, room.bytes));
            }
        }
        match shm::allocate(self.fd.as_fd(), old_len_bytes, more_bytes) {
            Ok(()) => Ok(()),
            Err(error) if error.errno == Errno::ENOSPC => {
                Err(no_space(SpaceLimit::Mount(MOUNT.into()), free_bytes()?))
            }
            Err(error) if error.errno == Errno::ENOMEM => {
                Err(no_space(SpaceLimit::Kernel, headroom().bytes))
            }
            Err(error) => Err(failed("grow", &self.name, error)),
        }
    }

    /// Removes the name, then the record: `shm_unlink(3)`. A name that is gone already is no error.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`EACCES`: it is somebody else's), the record staying; [`Error::Record`] if the record cannot be dropped,
    /// which does no harm.
    ///
    /// # If a process dies
    ///
    /// The record names nothing, at worst.
    #[doc(alias = "shm_unlink")]
    pub fn unlink(name: &ObjectName, recorder: &dyn Recorder) -> Result<()> {
        match shm::unlink(name) {
            Err(error) if error.errno != Errno::ENOENT => {
                return Err(failed("unlink", name, error));
            }
            _ => {}
        }
        crash_point!("shm.object.unlinked");
        recorder
            .unregister(ObjectKind::PosixShm, name.as_bytes())
            .map_err(|source| Error::Record {
                doing: format!("the end of the shared memory object {name}"),
                source,
            })
    }
}

impl AsFd for ShmObject {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether something has the name, ours or not.
fn exists(name: &ObjectName) -> bool {
    !matches!(shm::open(name, Access::ReadOnly), Err(error) if error.errno == Errno::ENOENT)
}

fn failed(doing: &str, name: &ObjectName, source: SysError) -> Error {
    Error::system(format!("{doing} the shared memory object {name}"))(source)
}

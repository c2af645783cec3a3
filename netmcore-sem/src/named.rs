//! Named POSIX semaphores, recorded before they exist: the same that C and Python programs open.
//!
//! **Protocol.** Look whether the name is free; record it; create the semaphore. To remove: unlink it; drop the record. So it
//! is recorded, or it does not exist.
//!
//! **If a process dies here.** Between recording and creating, or between unlinking and dropping the record: the
//! record names nothing; cleaning up finds it absent. A process that dies with a permit keeps it: a semaphore has no owner.
//! Wait with a deadline where that matters, or use a lock.

use crate::error::{Error, Result};
use netmcore_sys::futex::Deadline;
use netmcore_sys::sem::{self, NamedSem};
use netmcore_sys::{Errno, ObjectKind, ObjectName, Recorder, crash_point};
use std::time::Instant;

/// A named semaphore, open in this process: `sem_overview(7)`.
///
/// Dropping it closes it here. The semaphore stays until it is [unlinked](Self::unlink), and even then for those who
/// have it open.
///
/// ```
/// use netmcore_sem::{NamedSemaphore, NoRecord, ObjectName};
///
/// let name = ObjectName::unique(b"/permits_")?;
/// let permits = NamedSemaphore::create(&name, 2, 0o600, &NoRecord)?;
/// permits.wait()?;
/// assert!(permits.try_wait()?);
/// assert!(!permits.try_wait()?, "both are taken");
/// permits.post()?;
/// assert_eq!(NamedSemaphore::open(&name)?.value(), 1);
/// NamedSemaphore::unlink(&name, &NoRecord)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NamedSemaphore {
    sem: NamedSem,
}

impl NamedSemaphore {
    /// Records and creates a semaphore that does not exist yet, with `initial` permits: `sem_open(3)` with
    /// `O_CREAT|O_EXCL`. The umask is taken off the permission bits `mode`.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`]; [`Error::Name`] if a semaphore's name cannot be that long; [`Error::Record`], nothing being created
    /// then; [`Error::System`] (`EINVAL`: `initial` is above 2³¹ − 1; `EMFILE`, `ENFILE`, `ENOMEM`, `ENOSPC`).
    ///
    /// # If a process dies
    ///
    /// The name is recorded, and the semaphore exists whole or not at all.
    #[doc(alias = "sem_create")]
    pub fn create(
        name: &ObjectName,
        initial: u32,
        mode: u32,
        recorder: &dyn Recorder,
    ) -> Result<NamedSemaphore> {
        name.for_semaphore()?;
        // Before it is recorded: what is recorded will be deleted some day, and this is not ours.
        match NamedSem::open(name) {
            Err(error) if error.errno == Errno::ENOENT => {}
            // It cannot be seen whether it exists.
            Err(error) if [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM].contains(&error.errno) => {
                return Err(Error::system("create", name)(error));
            }
            // Ours, or a file that is none of ours.
            _ => return Err(Error::AlreadyExists { name: name.clone() }),
        }
        recorder
            .register(ObjectKind::PosixSem, name.as_bytes())
            .map_err(Error::record("the semaphore", name))?;
        crash_point!("sem.named.recorded");
        match NamedSem::create(name, initial, mode) {
            Ok(sem) => {
                crash_point!("sem.named.created");
                Ok(NamedSemaphore { sem })
            }
            // It came into being since we looked. Most likely another process of this program has made it, and recorded it
            // under the same name: the record must stay.
            Err(error) if error.errno == Errno::EEXIST => {
                Err(Error::AlreadyExists { name: name.clone() })
            }
            Err(error) => {
                // It may exist and only not be open, for want of descriptors. A failure here leaves a record too many.
                let _ = Self::unlink(name, recorder);
                Err(Error::system("create", name)(error))
            }
        }
    }

    /// Opens a semaphore that exists: `sem_open(3)`.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`ENOENT`, `EACCES`, `EMFILE`; `EINVAL` if it is no semaphore).
    #[doc(alias = "sem_open")]
    pub fn open(name: &ObjectName) -> Result<NamedSemaphore> {
        match NamedSem::open(name) {
            Ok(sem) => Ok(NamedSemaphore { sem }),
            Err(error) => Err(Error::system("open", name)(error)),
        }
    }

    /// The name.
    pub fn name(&self) -> &ObjectName {
        self.sem.name()
    }

    /// Adds a permit and wakes a waiter: `sem_post(3)`.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`EOVERFLOW` at 2³¹ − 1 permits).
    #[doc(alias = "sem_post")]
    pub fn post(&self) -> Result<()> {
        self.sem
            .post()
            .map_err(|error| Error::system("post", self.name())(error))
    }

    /// Takes a permit, waiting for it without limit: `sem_wait(3)`.
    ///
    /// # Errors
    ///
    /// None in practice.
    ///
    /// # Blocking
    ///
    /// Until somebody posts; for ever if who should has died.
    #[doc(alias = "sem_wait")]
    pub fn wait(&self) -> Result<()> {
        self.sem
            .wait()
            .map_err(|error| Error::system("wait for", self.name())(error))
    }

    /// Takes a permit if there is one, and says whether: `sem_trywait(3)`.
    ///
    /// # Errors
    ///
    /// None in practice.
    pub fn try_wait(&self) -> Result<bool> {
        self.sem
            .try_wait()
            .map_err(|error| Error::system("wait for", self.name())(error))
    }

    /// Takes a permit, waiting for it until the deadline at most, and says whether: `sem_clockwait(3)`.
    ///
    /// # Errors
    ///
    /// None in practice.
    ///
    /// # Blocking
    ///
    /// Until the deadline.
    pub fn wait_deadline(&self, deadline: Instant) -> Result<bool> {
        self.sem
            .wait_deadline(Deadline::from(deadline))
            .map_err(|error| Error::system("wait for", self.name())(error))
    }

    /// The number of permits, which may have changed when it is read: `sem_getvalue(3)`.
    #[doc(alias = "sem_getvalue")]
    pub fn value(&self) -> u32 {
        self.sem.value()
    }

    /// Removes the name, then the record: `sem_unlink(3)`. A name that is gone already is no error.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`EACCES`: it is somebody else's), the record staying; [`Error::Record`] if the record cannot be dropped,
    /// which does no harm.
    ///
    /// # If a process dies
    ///
    /// The record names nothing, at worst.
    #[doc(alias = "sem_unlink")]
    pub fn unlink(name: &ObjectName, recorder: &dyn Recorder) -> Result<()> {
        match sem::unlink(name) {
            Err(error) if error.errno != Errno::ENOENT => {
                return Err(Error::system("unlink", name)(error));
            }
            _ => {}
        }
        crash_point!("sem.named.unlinked");
        recorder
            .unregister(ObjectKind::PosixSem, name.as_bytes())
            .map_err(Error::record("the end of the semaphore", name))
    }
}

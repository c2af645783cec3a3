//! One semaphore of a container in memory, ready for use in this process, and the id that others find it by.
//!
//! **Not here.** Making and freeing them: [`memory`](super::memory).

use crate::error::{Error, Result};
use crate::named::NamedSemaphore;
use netmcore_sys::futex::Deadline;
use netmcore_sys::sem::MemSem;
use netmcore_sys::{ObjectName, SysError};
use std::fmt;
use std::time::Instant;

/// Names a semaphore of a container, for all processes: plain data, to be passed on or stored in shared memory.
///
/// When the semaphore is freed, its place may get another one, which has another generation. A stale id is told from
/// a good one until the place was used 2³² times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SemId {
    /// The place in the container, which is also the number in the name `prefix_number` with the named backend.
    pub index: u32,
    /// Tells the semaphores apart that were in that place.
    pub generation: u32,
}

impl fmt::Display for SemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "semaphore {}.{}", self.index, self.generation)
    }
}

/// A semaphore of a container, ready for use in this process. Dropping it does nothing to the semaphore.
///
/// Like every POSIX semaphore it has no owner: who dies with a permit keeps it. Wait with a deadline where that matters.
#[doc(alias = "anon_semaphore")]
#[derive(Debug)]
pub struct Sem<'a> {
    pub(super) id: SemId,
    pub(super) prefix: &'a ObjectName,
    pub(super) sem: Kind<'a>,
}

#[derive(Debug)]
pub(super) enum Kind<'a> {
    Native(&'a MemSem),
    Named(NamedSemaphore),
}

impl Sem<'_> {
    /// The id by which others find it.
    pub fn id(&self) -> SemId {
        self.id
    }

    /// Adds a permit and wakes a waiter: `sem_post(3)`.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`EOVERFLOW` at 2³¹ − 1 permits).
    #[doc(alias = "sem_post")]
    pub fn post(&self) -> Result<()> {
        match &self.sem {
            Kind::Native(sem) => sem.post().map_err(self.failed("post")),
            Kind::Named(sem) => sem.post(),
        }
    }

    /// Takes a permit, waiting for it without limit: `sem_wait(3)`.
    ///
    /// # Errors
    ///
    /// None in practice.
    ///
    /// # Blocking
    ///
    /// Until somebody posts; for ever if who should has died, or if the semaphore is freed in the meantime.
    #[doc(alias = "sem_wait")]
    pub fn wait(&self) -> Result<()> {
        match &self.sem {
            Kind::Native(sem) => sem.wait().map_err(self.failed("wait for")),
            Kind::Named(sem) => sem.wait(),
        }
    }

    /// Takes a permit if there is one, and says whether: `sem_trywait(3)`.
    ///
    /// # Errors
    ///
    /// None in practice.
    pub fn try_wait(&self) -> Result<bool> {
        match &self.sem {
            Kind::Native(sem) => sem.try_wait().map_err(self.failed("wait for")),
            Kind::Named(sem) => sem.try_wait(),
        }
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
        match &self.sem {
            Kind::Native(sem) => sem
                .wait_deadline(Deadline::from(deadline))
                .map_err(self.failed("wait for")),
            Kind::Named(sem) => sem.wait_deadline(deadline),
        }
    }

    /// The number of permits, which may have changed when it is read: `sem_getvalue(3)`.
    #[doc(alias = "sem_getvalue")]
    pub fn value(&self) -> u32 {
        match &self.sem {
            Kind::Native(sem) => sem.value(),
            Kind::Named(sem) => sem.value(),
        }
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(SysError) -> Error {
        let doing = format!("{doing} {} of the container {}", self.id, self.prefix);
        |source| Error::System { doing, source }
    }
}

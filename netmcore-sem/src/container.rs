//! A family of semaphores under one prefix, removed together.
//!
//! A container comes in two forms. `SemContainer` alone is a prefix: its user chooses the numbers of the semaphores. [`SemContainer<InMemory>`] has
//! shared memory too: it allocates its semaphores there, and gives back those of the dead ([`memory`]).
//!
//! **Protocol.** Semaphore *n* of the container `/p` is the named semaphore `/p_n`. The container is recorded as what it is, and so is each of
//! its semaphores, before it exists. Removing it removes all semaphores of the prefix, then the record.
//!
//! **Invariants.** A container without memory has no state but the names that exist, so there is nothing that a death could leave wrong.
//!
//! **If a process dies here.** Some semaphores are removed, the rest are recorded still; removing again goes on.

pub mod handle;
pub mod memory;
mod slot;

pub use handle::{Sem, SemId};
pub use memory::{Backend, InMemory, SemInfo, SemMemory};

use crate::error::{Error, Result};
use crate::named::NamedSemaphore;
use netmcore_sys::sem::{self, MemSem};
use netmcore_sys::{NameError, ObjectKind, ObjectName, Recorder, crash_point};

/// The largest value of a semaphore.
#[doc(alias = "sem_value_max")]
pub const SEM_VALUE_MAX: u32 = sem::VALUE_MAX;

/// The size of a semaphore in memory: of a `sem_t`.
#[doc(alias = "sem_size")]
pub const SEM_LEN_BYTES: usize = MemSem::SIZE;

/// Whether the system has semaphores in memory that processes can share, so that [`Backend::Native`] works. It tries one.
///
/// [`Backend::Named`] works where named semaphores do.
pub fn have_anon_semaphores() -> bool {
    sem::have_anonymous()
}

/// The form of a container without memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamesOnly;

/// A prefix that owns semaphores. As it stands here, their numbers are chosen by the user; `SemContainer<InMemory>` allocates them.
///
/// ```
/// use netmcore_sem::{NoRecord, ObjectName, SemContainer};
///
/// let prefix = ObjectName::unique(b"/family_")?;
/// let container = SemContainer::create(&prefix, &NoRecord)?;
/// let third = container.create_semaphore(3, 1, 0o600, &NoRecord)?;
/// assert!(container.open_semaphore(3)?.try_wait()?);
/// assert_eq!(third.value(), 0);
/// assert_eq!(container.numbers()?, [3]);
/// container.unlink(&NoRecord)?;
/// assert!(container.numbers()?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "Netsys_sem")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SemContainer<M = NamesOnly> {
    prefix: ObjectName,
    memory: M,
}

impl SemContainer {
    /// Records a container of which no semaphore exists.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`] if one does; [`Error::Name`] if names made of the prefix could be too long (more than 240 bytes);
    /// [`Error::Record`].
    pub fn create(prefix: &ObjectName, recorder: &dyn Recorder) -> Result<SemContainer> {
        let container = SemContainer::open(prefix)?;
        if let Some(&number) = container.numbers()?.first() {
            let name = container.name_of(number)?;
            return Err(Error::AlreadyExists { name });
        }
        recorder
            .register(ObjectKind::SemContainer, prefix.as_bytes())
            .map_err(Error::record("the semaphore container", prefix))?;
        crash_point!("sem.container.recorded");
        Ok(container)
    }

    /// Records a container, after removing all semaphores that an earlier one of that prefix left.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create) and [`unlink`](Self::unlink).
    #[doc(alias = "create_container")]
    pub fn create_anew(prefix: &ObjectName, recorder: &dyn Recorder) -> Result<SemContainer> {
        SemContainer::open(prefix)?.unlink(recorder)?;
        crash_point!("sem.container.removed_to_create");
        SemContainer::create(prefix, recorder)
    }

    /// The container of that prefix, which some process has created.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] as [`create`](Self::create).
    #[doc(alias = "container")]
    pub fn open(prefix: &ObjectName) -> Result<SemContainer> {
        let container = SemContainer {
            prefix: prefix.clone(),
            memory: NamesOnly,
        };
        container.name_of(u32::MAX)?;
        Ok(container)
    }

    /// Records and creates semaphore `number` with `initial` permits, as [`NamedSemaphore::create`] does.
    ///
    /// # Errors
    ///
    /// As there.
    #[doc(alias = "sem_init")]
    pub fn create_semaphore(
        &self,
        number: u32,
        initial: u32,
        mode: u32,
        recorder: &dyn Recorder,
    ) -> Result<NamedSemaphore> {
        NamedSemaphore::create(&self.name_of(number)?, initial, mode, recorder)
    }

    /// Opens semaphore `number`.
    ///
    /// # Errors
    ///
    /// As [`NamedSemaphore::open`].
    #[doc(alias = "as_sem")]
    pub fn open_semaphore(&self, number: u32) -> Result<NamedSemaphore> {
        NamedSemaphore::open(&self.name_of(number)?)
    }

    /// Removes semaphore `number`; those who have it open keep it.
    ///
    /// # Errors
    ///
    /// As [`NamedSemaphore::unlink`].
    #[doc(alias = "sem_destroy")]
    pub fn unlink_semaphore(&self, number: u32, recorder: &dyn Recorder) -> Result<()> {
        NamedSemaphore::unlink(&self.name_of(number)?, recorder)
    }

    /// Removes all semaphores of the container, whoever made them, then its record. It may be repeated.
    ///
    /// # Errors
    ///
    /// [`Error::Unlink`] with all that could not be removed; they and the container stay recorded. [`Error::Record`], which does no harm.
    ///
    /// # If a process dies
    ///
    /// What is left is recorded.
    #[doc(alias = "drop")]
    pub fn unlink(&self, recorder: &dyn Recorder) -> Result<()> {
        loop {
            let numbers = self.numbers()?;
            if numbers.is_empty() {
                break;
            }
            let unlink = |number| self.unlink_semaphore(number, recorder).err();
            let failures: Vec<Error> = numbers.into_iter().filter_map(unlink).collect();
            if !failures.is_empty() {
                return Err(Error::Unlink { failures });
            }
            // Again: others may have made more in the meantime.
        }
        crash_point!("sem.container.emptied");
        recorder
            .unregister(ObjectKind::SemContainer, self.prefix.as_bytes())
            .map_err(Error::record(
                "the end of the semaphore container",
                &self.prefix,
            ))
    }
}

impl<M> SemContainer<M> {
    /// The prefix.
    pub fn prefix(&self) -> &ObjectName {
        &self.prefix
    }

    /// The numbers of the named semaphores that exist now, ascending.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the system's semaphores cannot be listed.
    pub fn numbers(&self) -> Result<Vec<u32>> {
        let names = sem::list().map_err(Error::system("list", &self.prefix))?;
        let mut numbers: Vec<u32> = names
            .iter()
            .filter_map(|name| self.number_of(name))
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn name_of(&self, number: u32) -> std::result::Result<ObjectName, NameError> {
        let mut bytes = self.prefix.as_bytes().to_owned();
        bytes.extend(format!("_{number}").bytes());
        let name = ObjectName::new(bytes)?;
        name.for_semaphore()?;
        Ok(name)
    }

    /// The number, if the name is one of this container's: exactly as `name_of` writes it.
    fn number_of(&self, name: &ObjectName) -> Option<u32> {
        let digits = name.as_bytes().strip_prefix(self.prefix.as_bytes())?;
        let digits = std::str::from_utf8(digits.strip_prefix(b"_")?).ok()?;
        let number = digits.parse().ok()?;
        (u32::to_string(&number) == digits).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_it_writes_them_are_its_own() {
        let container = SemContainer::open(&ObjectName::new("/p").unwrap()).unwrap();
        let number_of = |name: &str| container.number_of(&ObjectName::new(name).unwrap());
        for number in [0, 7, u32::MAX] {
            let name = container.name_of(number).unwrap();
            assert_eq!(container.number_of(&name), Some(number));
        }
        for other in [
            "/p",
            "/p_",
            "/p_x",
            "/p_01",
            "/p_+1",
            "/p_1_2",
            "/pp_1",
            "/p_4294967296",
            "/q_1",
        ] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    #[test]
    fn prefix_leaves_room_for_numbers() {
        let prefix = |len: usize| ObjectName::new(format!("/{}", "x".repeat(len - 1))).unwrap();
        assert!(SemContainer::open(&prefix(240)).is_ok());
        assert!(matches!(
            SemContainer::open(&prefix(241)),
            Err(Error::Name(_))
        ));
    }
}

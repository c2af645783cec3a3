//! A container in shared memory: it allocates its semaphores, and gives back those of the dead.
//!
//! **Protocol.** The memory is a header, then slots of 64 bytes; `slot.rs` has the table of a slot's states. Two backends
//! share all of it. *Native*: the semaphore is a `sem_t` in the slot. *Named*: the slot only says that there is one; semaphore *n* is the
//! named semaphore `prefix_n`, recorded before it exists.
//!
//! * Allocate: `Free → Preparing(me)`; count the use, note me; make the semaphore; `→ Live(generation)`.
//! * Free: `Live` or `Kept → Freeing(me)`; remove the semaphore, then its record; `→ Free`.
//! * Reclaim: any slot of a dead owner `→ Freeing(me)`, and on as for freeing. Allocating does so when no slot is free.
//! * Grow: the length in the header goes up; all see more slots at once.
//! * Unlink: the header says closed; then all named semaphores of the prefix are removed, then the record.
//!
//! **Invariants.**
//! 1. The header's magic number is stored last when a container is made; nothing in the header but the length and the hint changes after that,
//!    and those bytes of memory that the length covers are usable wherever the container is attached.
//! 2. With the named backend a semaphore of the prefix exists only for slots that are not `Free`, and for each that is `Live` or `Kept`.
//! 3. The hint, where to look for a free slot first, may have any value.
//!
//! **If a process dies here.** A slot that it had taken names it, and whoever comes next undoes the rest, whatever had been done of it. In
//! [`create_at`](SemContainer::create_at): no magic number, so there is no container yet; creating it again is right.
//! In [`unlink`](SemContainer::unlink): it is closed, and what is left is recorded; unlinking again goes on.
//!
//! **Not here.** Getting the memory: the caller knows an address. Waiting: the semaphores of this module are POSIX ones, which have no owner; who
//! waits for a permit of the dead waits for ever. A lock tells its next owner.
//!
//! # Safety
//!
//! All access goes through references to the header and the slots, made of atomics only, for which zeros and any other bytes are valid. That the
//! memory is there, in this process and for as long as the container is used, is the duty of who calls `create_at`, `attach_at` and `grow_to`.

#![allow(unsafe_code)]

use super::handle::{Kind, Sem, SemId};
use super::slot::{SEM_WORDS, Slot, State};
use super::{NamesOnly, SEM_VALUE_MAX, SemContainer};
use crate::current::Current;
use crate::error::{Error, Result};
use crate::named::NamedSemaphore;
use crate::owner::{OwnerId, Owners};
use netmcore_sys::sem::MemSem;
use netmcore_sys::{Errno, ObjectName, Recorder, SysError, crash_point};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// How a container in memory makes its semaphores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// As `sem_t` in the memory. Nothing of them outlives it.
    Native,
    /// As named semaphores, with these permission bits (the umask is taken off): for systems without the other kind, and for
    /// programs that do not share the memory.
    Named {
        /// Such as `0o600`.
        mode: u32,
    },
}

/// Memory for a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SemMemory {
    /// Where it begins: a multiple of 64.
    pub at: *mut u8,
    /// How much of it the container may use now.
    pub len_bytes: usize,
    /// How far it may grow: so much is mapped here, even where there is nothing behind it yet.
    pub mapped_len_bytes: usize,
}

impl SemMemory {
    /// Memory that stays as long as it is.
    pub fn new(at: *mut u8, len_bytes: usize) -> SemMemory {
        SemMemory {
            at,
            len_bytes,
            mapped_len_bytes: len_bytes,
        }
    }

    /// How many bytes a container of so many semaphores needs.
    pub const fn len_bytes_for(capacity: u32) -> usize {
        size_of::<Header>() + capacity as usize * size_of::<Slot>()
    }
}

/// The form of a container that has memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InMemory {
    at: NonNull<Header>,
    mapped_len_bytes: usize,
    backend: Backend,
}

// SAFETY: the memory is shared between processes, so all access to it is atomic; that it stays is promised for all threads.
unsafe impl Send for InMemory {}
// SAFETY: as for Send.
unsafe impl Sync for InMemory {}

/// What [`SemContainer::iter`] tells of a semaphore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SemInfo {
    /// Its id.
    pub id: SemId,
    /// With whom it goes; `None` if it is kept until it is freed.
    pub owner: Option<OwnerId>,
}

#[repr(C, align(64))]
struct Header {
    /// [`MAGIC`] or [`CLOSED`]; anything else is no container.
    magic: AtomicU64,
    /// [`NATIVE`] or [`NAMED`].
    backend: AtomicU32,
    mode: AtomicU32,
    len_bytes: AtomicU64,
    hint: AtomicU32,
    prefix_len: AtomicU32,
    prefix: [AtomicU8; ObjectName::MAX_LEN_BYTES],
}

/// Also the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"nmc-sem2");
const CLOSED: u64 = u64::from_le_bytes(*b"nmc-sem0");
const NATIVE: u32 = 1;
const NAMED: u32 = 2;

const _: () = assert!(size_of::<Header>() == 320 && align_of::<Header>() == 64);

impl SemContainer<InMemory> {
    /// Records a container and makes it in the memory; none of its semaphores exists.
    ///
    /// ```
    /// use netmcore_sem::{Backend, NoRecord, ObjectName, SemContainer, SemMemory};
    ///
    /// #[repr(align(64))]
    /// struct Room([u8; SemMemory::len_bytes_for(3)]);
    /// // Zeroed memory that processes share; here it is private, for brevity.
    /// let room = Box::leak(Box::new(Room([0; _])));
    /// let memory = SemMemory::new(room.0.as_mut_ptr(), size_of::<Room>());
    ///
    /// let prefix = ObjectName::unique(b"/family_")?;
    /// // SAFETY: the memory is zeroed, aligned, never given back, and nobody else's.
    /// let container = unsafe { SemContainer::create_at(&prefix, Backend::Native, memory, &NoRecord)? };
    /// let permits = container.alloc(1, &NoRecord)?;
    /// assert!(permits.try_wait()?);
    /// let id = permits.id(); // others get at it by this
    /// container.get(id)?.post()?;
    /// assert_eq!((permits.value(), container.capacity(), container.iter().count()), (1, 3, 1));
    /// container.free(id, &NoRecord)?;
    /// assert!(container.get(id).is_err());
    /// container.unlink(&NoRecord)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`] if there are named semaphores of that prefix; [`Error::NoContainer`] if a container is in the memory already;
    /// [`Error::TooSmall`]; [`Error::Name`] and [`Error::Record`] as for [`SemContainer::create`].
    ///
    /// # Panics
    ///
    /// If the address is null or no multiple of 64.
    ///
    /// # Safety
    ///
    /// - The first `len_bytes` bytes are readable and writable until nobody uses the container, its clones or its semaphores any more, in this
    ///   process and in all that attach it; nothing else uses them.
    /// - They are zero, or as an earlier call left them whose process died in it.
    /// - Nobody else creates a container there at the same time.
    ///
    /// # If a process dies
    ///
    /// There is no container, and at worst the record names it.
    pub unsafe fn create_at(
        prefix: &ObjectName,
        backend: Backend,
        memory: SemMemory,
        recorder: &dyn Recorder,
    ) -> Result<SemContainer<InMemory>> {
        let at = checked(memory.at);
        let wanted_bytes = SemMemory::len_bytes_for(1);
        let len_bytes = memory.len_bytes.min(memory.mapped_len_bytes);
        if len_bytes < wanted_bytes {
            return Err(Error::TooSmall {
                wanted_bytes,
                len_bytes,
            });
        }
        // SAFETY: in bounds and aligned: just checked. Here and there: atomics only. Gone: the caller keeps it.
        let header = unsafe { at.as_ref() };
        if header.magic.load(Ordering::Acquire) == MAGIC {
            let reason = "another one is there already".to_owned();
            let at = at.addr().get();
            return Err(Error::NoContainer { at, reason });
        }
        SemContainer::create(prefix, recorder)?;
        let (kind, mode) = match backend {
            Backend::Native => (NATIVE, 0),
            Backend::Named { mode } => (NAMED, mode),
        };
        header.backend.store(kind, Ordering::Relaxed);
        header.mode.store(mode, Ordering::Relaxed);
        header.len_bytes.store(len_bytes as u64, Ordering::Relaxed);
        let bytes = prefix.as_bytes();
        for (shared, &byte) in header.prefix.iter().zip(bytes) {
            shared.store(byte, Ordering::Relaxed);
        }
        header
            .prefix_len
            .store(bytes.len() as u32, Ordering::Relaxed);
        crash_point!("sem.container.described");
        header.magic.store(MAGIC, Ordering::Release);
        crash_point!("sem.container.published");
        Ok(SemContainer {
            prefix: prefix.clone(),
            memory: InMemory {
                at,
                mapped_len_bytes: memory.mapped_len_bytes,
                backend,
            },
        })
    }

    /// The container that is in the memory. How long it is, it knows itself; `len_bytes` is not looked at.
    ///
    /// # Errors
    ///
    /// [`Error::NoContainer`] if there is none, or it has been unlinked.
    ///
    /// # Panics
    ///
    /// If the address is null or no multiple of 64.
    ///
    /// # Safety
    ///
    /// - As much of the first `mapped_len_bytes` bytes as the container has grown to, and 320 at least, is readable and writable until nobody
    ///   uses what this call returns, its clones and its semaphores; only a container uses it.
    #[doc(alias = "as_sem")]
    pub unsafe fn attach_at(memory: SemMemory) -> Result<SemContainer<InMemory>> {
        let at = checked(memory.at);
        let no_container = |reason: String| Error::NoContainer {
            at: at.addr().get(),
            reason,
        };
        if memory.mapped_len_bytes < size_of::<Header>() {
            return Err(no_container("the memory is too small".to_owned()));
        }
        // SAFETY: as in `create_at`.
        let header = unsafe { at.as_ref() };
        match header.magic.load(Ordering::Acquire) {
            MAGIC => {}
            CLOSED => return Err(no_container("it was removed".to_owned())),
            other => return Err(no_container(format!("it begins with {other:#x}"))),
        }
        let backend = match header.backend.load(Ordering::Relaxed) {
            NATIVE => Backend::Native,
            NAMED => Backend::Named {
                mode: header.mode.load(Ordering::Relaxed),
            },
            other => return Err(no_container(format!("its backend is {other}"))),
        };
        let prefix_len = header.prefix_len.load(Ordering::Relaxed) as usize;
        let bytes = header.prefix.iter().take(prefix_len);
        let bytes: Vec<u8> = bytes.map(|byte| byte.load(Ordering::Relaxed)).collect();
        let prefix = ObjectName::new(bytes)?;
        SemContainer::<NamesOnly>::open(&prefix)?;
        Ok(SemContainer {
            prefix,
            memory: InMemory {
                at,
                mapped_len_bytes: memory.mapped_len_bytes,
                backend,
            },
        })
    }

    /// How its semaphores are made.
    pub fn backend(&self) -> Backend {
        self.memory.backend
    }

    /// For how many semaphores it has room: as many as its memory now, and as what of it is mapped here.
    pub fn capacity(&self) -> u32 {
        let len_bytes = self.header().len_bytes.load(Ordering::Acquire);
        let len_bytes = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        let len_bytes = len_bytes.min(self.memory.mapped_len_bytes);
        let count = len_bytes.saturating_sub(size_of::<Header>()) / size_of::<Slot>();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Takes more memory into use: `len_bytes` of it altogether. All see it at once; less than before changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::TooSmall`] if that much is not mapped here.
    ///
    /// # Safety
    ///
    /// - For the first `len_bytes` bytes, all that [`create_at`](Self::create_at) says, in this process and in all that have attached the container
    ///   with so much mapped. The new ones are zero.
    pub unsafe fn grow_to(&self, len_bytes: usize) -> Result<()> {
        if len_bytes > self.memory.mapped_len_bytes {
            return Err(Error::TooSmall {
                wanted_bytes: len_bytes,
                len_bytes: self.memory.mapped_len_bytes,
            });
        }
        let header = self.header();
        header
            .len_bytes
            .fetch_max(len_bytes as u64, Ordering::AcqRel);
        crash_point!("sem.container.grown");
        Ok(())
    }

    /// Allocates a semaphore with `initial` permits. It belongs to the calling thread, and is given back some time after that
    /// has ended, unless it is [kept](Self::keep).
    ///
    /// # Errors
    ///
    /// [`Error::ContainerFull`] if the living use all; [`Error::System`] (`EINVAL`: `initial` is above 2³¹ − 1); [`Error::NoContainer`] if the container
    /// has been unlinked. With the named backend those of [`NamedSemaphore::create`]; and [`Error::Unlink`] if there is room only for
    /// semaphores of the dead that cannot be removed.
    ///
    /// # If a process dies
    ///
    /// The next one that finds no free slot, or [reclaims](Self::reclaim), removes what it made.
    #[doc(alias = "sem_init")]
    pub fn alloc(&self, initial: u32, recorder: &dyn Recorder) -> Result<Sem<'_>> {
        self.alloc_as(initial, &Current, recorder)
    }

    /// [`alloc`](Self::alloc), for a caller among `owners`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn alloc_as<O: Owners + ?Sized>(
        &self,
        initial: u32,
        owners: &O,
        recorder: &dyn Recorder,
    ) -> Result<Sem<'_>> {
        self.check_open()?;
        let image = image(initial).map_err(Error::system("initialise", &self.prefix))?;
        let me = owners.me();
        loop {
            let mut refused = None;
            let capacity = self.capacity();
            let first = self.header().hint.load(Ordering::Relaxed);
            for step in 0..capacity {
                let index = (u64::from(first) + u64::from(step)) % u64::from(capacity);
                let index = index as u32;
                let slot = self.slot(index);
                if slot.state() != Some(State::Free) {
                    continue;
                }
                let Some(generation) = slot.prepare(me) else {
                    continue;
                };
                let id = SemId { index, generation };
                match self.fill(id, image, initial, me, recorder) {
                    Ok(sem) => return Ok(sem),
                    // Somebody has made one of our names by hand: it is left alone, and so is the slot.
                    Err(error @ Error::AlreadyExists { .. }) => refused = Some(error),
                    Err(error) => return Err(error),
                }
            }
            let (reclaimed_count, failures) = self.reclaim_slots(owners, recorder);
            if reclaimed_count > 0 {
                continue;
            }
            return Err(match refused {
                Some(error) => error,
                None if failures.is_empty() => {
                    let prefix = self.prefix.clone();
                    Error::ContainerFull { prefix, capacity }
                }
                None => Error::Unlink { failures },
            });
        }
    }

    /// Makes the semaphore of a slot that the caller has prepared; on an error the slot is free again.
    fn fill(
        &self,
        id: SemId,
        image: [u64; SEM_WORDS],
        initial: u32,
        me: OwnerId,
        recorder: &dyn Recorder,
    ) -> Result<Sem<'_>> {
        let SemId { index, generation } = id;
        let slot = self.slot(index);
        let made = match self.memory.backend {
            Backend::Native => {
                slot.write_sem(image);
                Ok(Kind::Native(self.native(slot)))
            }
            Backend::Named { mode } => self
                .name_of(index)
                .map_err(Error::from)
                .and_then(|name| NamedSemaphore::create(&name, initial, mode, recorder))
                .map(Kind::Named),
        };
        let sem = match made {
            Ok(sem) => sem,
            Err(error) => {
                slot.change(State::Preparing(me), State::Free);
                // It may have been unlinked while we made it.
                return Err(self.check_open().err().unwrap_or(error));
            }
        };
        crash_point!("sem.container.made");
        // `unlink` closes first and lists what exists then: either it finds the new name, or this finds it closed.
        if let Err(closed) = self.check_open() {
            if slot.change(State::Preparing(me), State::Freeing(me)) {
                self.remove(index, me, State::Freeing(me), recorder)?;
            }
            return Err(closed);
        }
        self.header().hint.store(index + 1, Ordering::Relaxed);
        let done = slot.change(State::Preparing(me), State::Live(generation));
        debug_assert!(done, "a slot was taken from a live owner");
        crash_point!("sem.container.allocated");
        Ok(Sem {
            id,
            prefix: &self.prefix,
            sem,
        })
    }

    /// Lets a semaphore outlive its owner: from now on it stays until somebody frees it, or the container is unlinked.
    ///
    /// # Errors
    ///
    /// [`Error::NoSemaphore`].
    pub fn keep(&self, id: SemId) -> Result<()> {
        let (slot, state) = self.usable(id)?;
        let kept = State::Kept(id.generation);
        if state == kept || slot.change(state, kept) {
            crash_point!("sem.container.kept");
            return Ok(());
        }
        // Changed in between: kept by somebody else, or gone.
        self.usable(id).map(drop)
    }

    /// The semaphore of that id, whoever has allocated it.
    ///
    /// # Errors
    ///
    /// [`Error::NoSemaphore`]; [`Error::System`] if a named one cannot be opened.
    #[doc(alias = "as_sem")]
    pub fn get(&self, id: SemId) -> Result<Sem<'_>> {
        let (slot, _) = self.usable(id)?;
        let sem = match self.memory.backend {
            Backend::Native => Kind::Native(self.native(slot)),
            Backend::Named { .. } => {
                let opened = NamedSemaphore::open(&self.name_of(id.index)?);
                // It may have been freed in between, and the name may be another one's by now.
                self.usable(id)?;
                Kind::Named(opened?)
            }
        };
        Ok(Sem {
            id,
            prefix: &self.prefix,
            sem,
        })
    }

    /// Frees a semaphore, whoever has allocated it. Nobody may use it any more: who waits for it waits for ever, and with the native
    /// backend who uses it later gives or takes the permits of its place's next semaphore.
    ///
    /// # Errors
    ///
    /// [`Error::NoSemaphore`] if it is gone already. With the named backend those of [`NamedSemaphore::unlink`]; if it could not be
    /// removed, it is as it was.
    ///
    /// # If a process dies
    ///
    /// Nobody gets at the semaphore any more; the next one that finds no free slot, or reclaims, removes the rest.
    #[doc(alias = "sem_destroy")]
    pub fn free(&self, id: SemId, recorder: &dyn Recorder) -> Result<()> {
        self.free_as(id, &Current, recorder)
    }

    /// [`free`](Self::free), for a caller among `owners`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn free_as<O: Owners + ?Sized>(
        &self,
        id: SemId,
        owners: &O,
        recorder: &dyn Recorder,
    ) -> Result<()> {
        let me = owners.me();
        loop {
            let (slot, state) = self.usable(id)?;
            if slot.change(state, State::Freeing(me)) {
                crash_point!("sem.container.freeing");
                return self.remove(id.index, me, state, recorder);
            }
        }
    }

    /// Removes the semaphore of a slot that the caller has as `Freeing`; puts the slot back to `before` if it cannot.
    fn remove(
        &self,
        index: u32,
        me: OwnerId,
        before: State,
        recorder: &dyn Recorder,
    ) -> Result<()> {
        let removed = match self.memory.backend {
            // `sem_destroy` gives nothing back on Linux, and what stays is an image of a semaphore (slot, invariant 3).
            Backend::Native => Ok(()),
            Backend::Named { .. } => self
                .name_of(index)
                .map_err(Error::from)
                .and_then(|name| NamedSemaphore::unlink(&name, recorder)),
        };
        crash_point!("sem.container.slot_emptied");
        let slot = self.slot(index);
        match removed {
            // A record too many does no harm.
            Ok(()) | Err(Error::Record { .. }) => {
                slot.change(State::Freeing(me), State::Free);
                self.header().hint.store(index, Ordering::Relaxed);
                crash_point!("sem.container.slot_freed");
            }
            Err(_) => {
                slot.change(State::Freeing(me), before);
            }
        }
        removed
    }

    /// Gives back the semaphores of those that have died, and what they left half-made or half-freed. Says how many slots that were.
    ///
    /// # Errors
    ///
    /// [`Error::Unlink`] with all that could not be removed; the others were.
    ///
    /// # If a process dies
    ///
    /// The next one goes on.
    pub fn reclaim(&self, recorder: &dyn Recorder) -> Result<u32> {
        self.reclaim_as(&Current, recorder)
    }

    /// [`reclaim`](Self::reclaim), for a caller among `owners`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn reclaim_as<O: Owners + ?Sized>(
        &self,
        owners: &O,
        recorder: &dyn Recorder,
    ) -> Result<u32> {
        let (reclaimed_count, failures) = self.reclaim_slots(owners, recorder);
        match failures.is_empty() {
            true => Ok(reclaimed_count),
            false => Err(Error::Unlink { failures }),
        }
    }

    fn reclaim_slots<O: Owners + ?Sized>(
        &self,
        owners: &O,
        recorder: &dyn Recorder,
    ) -> (u32, Vec<Error>) {
        let me = owners.me();
        let (mut reclaimed_count, mut failures) = (0, Vec::new());
        for index in 0..self.capacity() {
            let Some(before) = self.slot(index).take_from_dead(owners) else {
                continue;
            };
            match self.remove(index, me, before, recorder) {
                Ok(()) => reclaimed_count += 1,
                Err(error) => failures.push(error),
            }
        }
        (reclaimed_count, failures)
    }

    /// The semaphores that can be used now, each as it is when its turn comes.
    pub fn iter(&self) -> impl Iterator<Item = SemInfo> {
        (0..self.capacity()).filter_map(|index| {
            let slot = self.slot(index);
            loop {
                let state = slot.state()?;
                let generation = state.usable()?;
                let owner = slot.owner(state);
                if slot.state() == Some(state) {
                    let id = SemId { index, generation };
                    return Some(SemInfo { id, owner });
                }
            }
        })
    }

    /// Looks whether the container is what it should be. Nobody may change it meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] with what does not hold; [`Error::System`] if the system's semaphores cannot be listed.
    pub fn verify(&self) -> Result<()> {
        let corrupt = |invariant: String| {
            let prefix = self.prefix.clone();
            Err(Error::Corrupt { prefix, invariant })
        };
        let numbers = self.numbers()?;
        let is_named = matches!(self.memory.backend, Backend::Named { .. });
        for index in 0..self.capacity() {
            let exists = numbers.binary_search(&index).is_ok();
            match self.slot(index).state() {
                None => return corrupt(format!("slot {index} has a word that no slot has")),
                Some(State::Free) if is_named && exists => {
                    return corrupt(format!("slot {index} is free, and its semaphore exists"));
                }
                Some(State::Live(_) | State::Kept(_)) if is_named && !exists => {
                    return corrupt(format!("slot {index} is in use, and has no semaphore"));
                }
                Some(_) if !is_named && exists => {
                    return corrupt(format!("semaphore {index} has a name"));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Closes the container for all, and removes its semaphores, whoever made them, then its record. It may be repeated.
    ///
    /// What is allocated can still be used by who has it at hand. The memory may be given back when nobody uses that any more.
    ///
    /// # Errors
    ///
    /// As [`SemContainer::unlink`] without memory.
    ///
    /// # If a process dies
    ///
    /// What is left is recorded.
    #[doc(alias = "drop")]
    pub fn unlink(&self, recorder: &dyn Recorder) -> Result<()> {
        self.header().magic.store(CLOSED, Ordering::SeqCst);
        crash_point!("sem.container.closed");
        if let Backend::Named { .. } = self.memory.backend {
            let mut failures = Vec::new();
            for index in 0..self.capacity() {
                // Also those that are gone already: who removed them may have died before it dropped the record. The slots stay as they are.
                if self.slot(index).state() != Some(State::Free) {
                    let removed = NamedSemaphore::unlink(&self.name_of(index)?, recorder);
                    failures.extend(removed.err());
                }
            }
            if !failures.is_empty() {
                return Err(Error::Unlink { failures });
            }
        }
        SemContainer::<NamesOnly>::open(&self.prefix)?.unlink(recorder)
    }

    fn check_open(&self) -> Result<()> {
        if self.header().magic.load(Ordering::SeqCst) == MAGIC {
            return Ok(());
        }
        Err(Error::NoContainer {
            at: self.memory.at.addr().get(),
            reason: "it was removed".to_owned(),
        })
    }

    /// The slot of a semaphore that exists, and its state.
    fn usable(&self, id: SemId) -> Result<(&Slot, State)> {
        let no_semaphore = || Error::NoSemaphore {
            prefix: self.prefix.clone(),
            id,
        };
        self.check_open()?;
        if id.index >= self.capacity() {
            return Err(no_semaphore());
        }
        let slot = self.slot(id.index);
        let is_the_one = |state: &State| state.usable() == Some(id.generation);
        let state = slot.state().filter(is_the_one);
        state.map(|state| (slot, state)).ok_or_else(no_semaphore)
    }

    fn header(&self) -> &Header {
        // SAFETY: in bounds: checked when the container was made. Here and there: atomics only. Gone: who made this value keeps the memory
        // as long as it is used.
        unsafe { self.memory.at.as_ref() }
    }

    fn slot(&self, index: u32) -> &Slot {
        debug_assert!(index < self.capacity());
        // SAFETY: in bounds: the callers take indices below `capacity`, which never goes down and is limited to what is mapped here; the slots
        // begin behind the header. Here, there and gone: as for the header.
        unsafe {
            let slots = self.memory.at.add(1).cast::<Slot>();
            slots.add(index as usize).as_ref()
        }
    }

    fn native(&self, slot: &Slot) -> &MemSem {
        // SAFETY: in bounds: the room is large and aligned enough (asserted in `slot`). Here and there: the C library changes it by atomic
        // operations, as we do, and it holds the image of a semaphore (slot, invariant 3): `fill` has written one, or `usable` has found one. Gone: as for
        // the header, which the lifetime of `self` stands for.
        unsafe { &*slot.sem() }
    }
}

/// The bytes of a semaphore with so many permits that processes share.
fn image(initial: u32) -> std::result::Result<[u64; SEM_WORDS], SysError> {
    if initial > SEM_VALUE_MAX {
        let target = format!("{initial} permits");
        return Err(SysError::new("sem_init", target, Errno::EINVAL));
    }
    let mut image = MaybeUninit::<[u64; SEM_WORDS]>::zeroed();
    // SAFETY: there is room for a `sem_t`, aligned (asserted in `slot`); nobody uses it as a semaphore, here or ever: it is copied. All its bytes were
    // zeroed first, so all are initialised.
    unsafe {
        MemSem::init(image.as_mut_ptr().cast(), initial)?;
        Ok(image.assume_init())
    }
}

/// # Panics
///
/// If no header can lie there.
fn checked(at: *mut u8) -> NonNull<Header> {
    let at = NonNull::new(at.cast::<Header>());
    let at = at.expect("a semaphore container needs memory, and the address is null");
    assert!(
        at.is_aligned(),
        "a semaphore container lies at a multiple of 64, not at {at:p}"
    );
    at
}

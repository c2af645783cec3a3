//! Memory at one address in every process that uses it: an object mapped at its maximum length, which grows in place.
//!
//! **Protocol.** A region takes a place of its maximum length in the arena, and the whole place is mapped at once; the object
//! behind it is shorter. To grow, one process allocates memory behind more of it (`fallocate(2)`, or `MADV_POPULATE_WRITE`
//! where there is no name), and all see it, without mapping anything again. To shrink, holes are punched.
//!
//! | region | behind it | grows by |
//! |---|---|---|
//! | named | a POSIX shared memory object | opening it by name, each time, and `fallocate` |
//! | anonymous | a memory file of its full length, sparse, and a page with the length so far | populating by address |
//!
//! No region keeps a descriptor: one that a forked child inherits may be closed there, or name something else, and a thousand
//! regions would need a thousand. Opening costs 2 µs beside the 0.4 ms of 2 MiB. Whether the name is still that of the mapped
//! object is checked by device and inode, which cannot be given again while the mapping exists.
//!
//! **Invariants.**
//! 1. A region in the registry is mapped, whole, at its place, until the process ends or [`forget_regions`].
//! 2. The registry is of this process, and a forked child has a copy of it, as of the mappings. Entries are never freed,
//!    so it is read without a lock.
//! 3. A place is mapped once in a process: `MAPPING` is held from the look into the registry to the entry.
//! 4. Lengths only grow.
//!
//! **If a process dies here.** Creating: the object is recorded, and shorter or absent; a place may be lost, which is addresses
//! only. Growing: the region has the old length or a longer one; memory beyond it is used when it grows again.
//!
//! **Not here.** Who may attach to which region, and when the object is unlinked: that is the supervisor's.
//!
//! # Safety
//!
//! Mapping happens in places that are this region's alone. Registry entries are leaked boxes. The length of an anonymous
//! region is one atomic in a page behind it that is mapped with it.

#![allow(unsafe_code)]

use crate::anon::check_file_size_limit;
use crate::arc::SentHandle;
use crate::arena::Arena;
use crate::error::{Error, Result, SpaceLimit};
use crate::headroom::{HEADROOM_FROM_BYTES, headroom};
use crate::object::ShmObject;
use netmcore_sys::map::{self, page_size};
use netmcore_sys::shm::{self, Access};
use netmcore_sys::{Errno, ObjectName, Recorder, crash_point};
use std::ffi::{CStr, CString};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory is allocated in steps of this length, 16 MiB, some 4 ms each: `fallocate` starts again when a signal comes, so a longer
/// one might never end in a program with a fast timer.
const STEP_BYTES: u64 = 16 << 20;

/// Names a region, in all processes that may attach to it.
///
/// A supervisor numbers its regions from 1; a region without a supervisor is named by its address, which is above [`PLACE_ALIGN_BYTES`](crate::arena::PLACE_ALIGN_BYTES).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {:#x}", self.0)
    }
}

/// A range of shared memory that is mapped here, at the same address as in every other process that uses it. Clones are the same.
///
/// Once mapped it stays mapped until the process ends, whatever handles are dropped: pointers in shared memory rely on it. A
/// forked child has it too. It is left out of core dumps.
///
/// ```
/// use netmcore_shm::{Arena, Region};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// let arena = Arena::reserve(1 << 30)?;
/// let region = Region::anonymous(&arena, c"example", 256 << 20)?;
/// assert_eq!(region.len_bytes()?, 0); // addresses only
/// region.grow(1 << 20)?;
/// // SAFETY: in the region, aligned, zeroed, and used as an atomic only.
/// let word = unsafe { &*region.at().cast::<AtomicU64>() };
/// word.store(7, Ordering::Relaxed); // what processes forked from here on see
/// assert!(region.grow(1 << 40).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
#[derive(Clone)]
pub struct Region(Arc<Inner>);

struct Inner {
    id: RegionId,
    arena: Arena,
    at: *mut u8,
    max_len_bytes: usize,
    backing: Backing,
    /// Allocated by this process since it last looked at the headroom.
    unlooked_bytes: AtomicU64,
}

// SAFETY: addresses and a name; what lies at the address is accessed by callers, who answer for it.
unsafe impl Send for Inner {}
// SAFETY: as for Send; the rest are atomics.
unsafe impl Sync for Inner {}

enum Backing {
    Named {
        name: ObjectName,
        device: u64,
        inode: u64,
    },
    /// The length so far is an atomic at the start of the page behind `max_len_bytes`.
    Anonymous { label: CString },
}

impl Region {
    /// The maximum length of a region of which nothing else is said: 16 GiB. It costs addresses only.
    pub const DEFAULT_MAX_LEN_BYTES: usize = 16 << 30;

    /// Records and creates a shared memory object of `len_bytes` that may grow to `max_len_bytes`, and maps it at a new place of the
    /// arena. Lengths are rounded up to whole pages. Its id is its address. Others attach by name and address.
    ///
    /// # Errors
    ///
    /// As [`ShmObject::create`], and [`Error::ArenaFull`]; [`Error::NoSpace`] with [`SpaceLimit::Region`] if the length is above
    /// the maximum. There is no object then, and it is not recorded.
    ///
    /// # If a process dies
    ///
    /// As [`ShmObject::create`].
    ///
    /// # Blocking
    ///
    /// While the kernel clears the memory: 58 ms for 256 MiB.
    pub fn create(
        arena: &Arena,
        name: &ObjectName,
        len_bytes: u64,
        max_len_bytes: usize,
        recorder: &dyn Recorder,
    ) -> Result<Region> {
        let max_len_bytes = whole_pages(max_len_bytes);
        let len_bytes = len_bytes
            .checked_next_multiple_of(page_size() as u64)
            .unwrap_or(len_bytes);
        if len_bytes > max_len_bytes as u64 {
            return Err(beyond_maximum(len_bytes, max_len_bytes as u64));
        }
        let object = ShmObject::create(name, len_bytes, 0o600, recorder)?;
        let make = || {
            let place = arena.place(max_len_bytes)?;
            crash_point!("shm.region.placed");
            let id = RegionId(place.at().addr() as u64);
            let mapping = lock_mapping();
            Self::map_named(
                arena,
                id,
                name,
                object.as_fd(),
                place.at(),
                max_len_bytes,
                &mapping,
            )
        };
        make().inspect_err(|_| {
            // The first error is the one to tell; a failure here leaves a name in the record.
            let _ = ShmObject::unlink(name, recorder);
        })
    }

    /// Maps the object `name`, made by [`create`](Self::create) or as a [`ShmObject`], at the place `at` of the arena, which was taken for it
    /// by some process. If the region `id` is mapped here already, it is returned as it is.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`ENOENT`, `EACCES`); [`Error::WrongPlace`] if `at` is not a place of the arena with that length, or
    /// another region is mapped there, or `id` is mapped elsewhere.
    pub fn attach(
        arena: &Arena,
        id: RegionId,
        name: &ObjectName,
        at: usize,
        max_len_bytes: usize,
    ) -> Result<Region> {
        let max_len_bytes = whole_pages(max_len_bytes);
        let mapping = lock_mapping();
        if let Some(known) = find(|region| region.0.id == id) {
            return if known.at().addr() == at {
                Ok(known)
            } else {
                Err(Error::WrongPlace {
                    id,
                    at,
                    why: "the region is mapped at another",
                })
            };
        }
        let wrong = |why| Err(Error::WrongPlace { id, at, why });
        let Some(start) = arena.place_at(at, max_len_bytes) else {
            return wrong("the arena has no such place");
        };
        let end = at + max_len_bytes;
        if find(|other| other.at().addr() < end && at < other.end()).is_some() {
            return wrong("another region is mapped there");
        }
        let object = ShmObject::open(name, Access::ReadWrite)?;
        Self::map_named(
            arena,
            id,
            name,
            object.as_fd(),
            start,
            max_len_bytes,
            &mapping,
        )
    }

    /// Makes memory without a name, of `max_len_bytes` rounded up to whole pages and of the length 0, for this process and those it
    /// forks from now on. `label` is for `/proc/PID/maps` and need not be unique. Its id is its address.
    ///
    /// # Errors
    ///
    /// [`Error::ArenaFull`]; [`Error::NoSpace`] if the limit of file sizes (`ulimit -f`) is below the maximum;
    /// [`Error::System`] if there is no descriptor left for a moment.
    pub fn anonymous(arena: &Arena, label: &CStr, max_len_bytes: usize) -> Result<Region> {
        let max_len_bytes = whole_pages(max_len_bytes);
        let file_len = max_len_bytes.saturating_add(page_size());
        check_file_size_limit(file_len as u64)?;
        let place = arena.place(file_len)?;
        let mapping = lock_mapping();
        let map = || -> netmcore_sys::Result<()> {
            let file = shm::anonymous(label)?;
            shm::set_len(file.as_fd(), file_len as u64)?;
            shm::allocate(file.as_fd(), max_len_bytes as u64, page_size() as u64)?;
            shm::seal_shrink(file.as_fd())?;
            // SAFETY: the place is new (arena, invariant 2), so there are no references into it.
            unsafe { map_at(arena, place.at(), file_len, file.as_fd()) }
        };
        map().map_err(Error::system(format!(
            "make the anonymous region {label:?} of {max_len_bytes} bytes"
        )))?;
        Ok(register(
            Inner {
                id: RegionId(place.at().addr() as u64),
                arena: arena.clone(),
                at: place.at(),
                max_len_bytes,
                backing: Backing::Anonymous {
                    label: label.to_owned(),
                },
                unlooked_bytes: AtomicU64::new(0),
            },
            &mapping,
        ))
    }

    fn map_named(
        arena: &Arena,
        id: RegionId,
        name: &ObjectName,
        object: BorrowedFd<'_>,
        at: *mut u8,
        max_len_bytes: usize,
        mapping: &Mapping,
    ) -> Result<Region> {
        let (device, inode) = identity(name, object)?;
        // SAFETY: nothing is mapped at the place, as the caller has seen (invariant 3) or because it is new.
        unsafe { map_at(arena, at, max_len_bytes, object) }
            .map_err(Error::system(format!("map the {id}, {name}")))?;
        Ok(register(
            Inner {
                id,
                arena: arena.clone(),
                at,
                max_len_bytes,
                backing: Backing::Named {
                    name: name.clone(),
                    device,
                    inode,
                },
                unlooked_bytes: AtomicU64::new(0),
            },
            mapping,
        ))
    }

    /// Its name among the regions.
    pub fn id(&self) -> RegionId {
        self.0.id
    }

    /// The first address, a multiple of [`PLACE_ALIGN_BYTES`](crate::arena::PLACE_ALIGN_BYTES), in every process.
    pub fn at(&self) -> *mut u8 {
        self.0.at
    }

    /// To what length it may grow, in bytes: whole pages. So much is mapped.
    pub fn max_len_bytes(&self) -> usize {
        self.0.max_len_bytes
    }

    /// The name of the object behind it; `None` if it is anonymous.
    #[doc(alias = "shm_name")]
    pub fn name(&self) -> Option<&ObjectName> {
        match &self.0.backing {
            Backing::Named { name, .. } => Some(name),
            Backing::Anonymous { .. } => None,
        }
    }

    /// Whether the address lies in it, below the maximum length.
    pub fn contains<T: ?Sized>(&self, address: *const T) -> bool {
        let offset = address.cast::<u8>().addr().wrapping_sub(self.0.at.addr());
        offset < self.0.max_len_bytes
    }

    /// The length in bytes, now: touching a page behind it is a bus error, or takes memory that nobody has looked for. Others may
    /// grow it at any time, here too. A system call or two, for a region with a name.
    ///
    /// # Errors
    ///
    /// [`Error::System`] (`ENOENT`) if the name was unlinked, [`Error::WrongPlace`] if it is that of another object now.
    pub fn len_bytes(&self) -> Result<u64> {
        match &self.0.backing {
            Backing::Anonymous { .. } => Ok(self.anonymous_len().load(Ordering::Acquire)),
            Backing::Named { name, .. } => {
                let file = self.open()?;
                shm::len(file.as_fd())
                    .map_err(Error::system(format!("measure the {}, {name}", self.0.id)))
            }
        }
    }

    /// Makes it at least `to_len_bytes` long, all of it present. It never becomes shorter, and any process may do this at any time.
    ///
    /// # Errors
    ///
    /// [`Error::NoSpace`] with the limit in the way; otherwise as [`len_bytes`](Self::len_bytes). All that was stored stays as it
    /// is; the region may have become longer by a part.
    ///
    /// # If a process dies
    ///
    /// It has the old length or a longer one.
    ///
    /// # Blocking
    ///
    /// While the kernel clears the memory: 0.4 ms for 2 MiB.
    pub fn grow(&self, to_len_bytes: u64) -> Result<()> {
        let len_bytes = self.len_bytes()?;
        match to_len_bytes.checked_sub(len_bytes) {
            None | Some(0) => Ok(()),
            Some(more_bytes) => self.ensure(len_bytes, more_bytes),
        }
    }

    /// Makes the memory from `offset` on present, `len_bytes` of it, so that touching it cannot fail; and the region long enough. What
    /// is present keeps its contents, the rest is zero. Rounded outwards to whole pages.
    ///
    /// Steps of 16 MiB and more, or so much since the last look, first look at the [`headroom`](crate::headroom()) and the free
    /// space of the mount, so as not to end in an out-of-memory kill.
    ///
    /// # Errors
    ///
    /// As [`grow`](Self::grow). A part of it may have been made present: [`punch`](Self::punch) gives back what is yours.
    ///
    /// # If a process dies
    ///
    /// A part of it may be present.
    ///
    /// # Blocking
    ///
    /// As [`grow`](Self::grow).
    pub fn ensure(&self, offset: u64, len_bytes: u64) -> Result<()> {
        let page = page_size() as u64;
        let start = offset / page * page;
        let end = offset
            .checked_add(len_bytes)
            .and_then(|end| end.checked_next_multiple_of(page))
            .unwrap_or(u64::MAX);
        let max_len_bytes = self.0.max_len_bytes as u64;
        if end > max_len_bytes {
            return Err(beyond_maximum(end, max_len_bytes));
        }
        if start >= end {
            return Ok(());
        }
        match &self.0.backing {
            Backing::Named { name, .. } => self.ensure_named(name, start, end),
            Backing::Anonymous { label } => self.ensure_anonymous(label, start, end),
        }
    }

    fn ensure_named(&self, name: &ObjectName, start: u64, end: u64) -> Result<()> {
        let file = self.open()?;
        let fd = file.as_fd();
        let system = |doing| Error::system(format!("{doing} the {}, {name}", self.0.id));
        if shm::len(fd).map_err(system("measure"))? < end {
            check_file_size_limit(end)?;
        }
        let wanted_bytes = end - start;
        let free_bytes = || -> Result<u64> {
            let space = shm::free_space(fd).map_err(system("ask for the space of"))?;
            Ok(space.free_bytes)
        };
        let mount_is_full = |free_bytes| Error::NoSpace {
            limit: SpaceLimit::Mount(crate::object::MOUNT.into()),
            wanted_bytes,
            free_bytes,
        };
        if self.is_time_to_look(wanted_bytes) {
            // Part of it may be present already, which only a try can tell: too little space is final only for large steps.
            let free_bytes = free_bytes()?;
            if wanted_bytes >= HEADROOM_FROM_BYTES && free_bytes < wanted_bytes {
                return Err(mount_is_full(free_bytes));
            }
            look_at_headroom(wanted_bytes)?;
        }
        for (from, step) in steps(start, end) {
            if let Err(error) = shm::allocate(fd, from, step) {
                return Err(match error.errno {
                    Errno::ENOSPC => mount_is_full(free_bytes()?),
                    Errno::ENOMEM => no_memory(wanted_bytes),
                    _ => system("grow")(error),
                });
            }
            crash_point!("shm.region.allocated");
        }
        Ok(())
    }

    fn ensure_anonymous(&self, label: &CStr, start: u64, end: u64) -> Result<()> {
        let wanted_bytes = end - start;
        if self.is_time_to_look(wanted_bytes) {
            look_at_headroom(wanted_bytes)?;
        }
        for (from, step) in steps(start, end) {
            // In bounds of an address range, hence of usize.
            let at = self.0.at.wrapping_add(from as usize);
            // SAFETY: in the region, which is mapped (invariant 1).
            if let Err(error) = unsafe { map::populate_write(at, step as usize) } {
                return Err(match error.errno {
                    // `EFAULT` is said where a touch would have been a bus error.
                    Errno::ENOMEM | Errno::EFAULT => no_memory(wanted_bytes),
                    _ => {
                        Error::system(format!("grow the anonymous {}, {label:?}", self.0.id))(error)
                    }
                });
            }
            crash_point!("shm.region.populated");
        }
        self.anonymous_len().fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Gives back the memory of a range, which reads as zero from then on, in all processes. The length stays. Rounded inwards to
    /// whole pages.
    ///
    /// Touching the range afterwards takes memory without a look whether there is some: [`ensure`](Self::ensure) it first.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel refuses; the memory is kept then.
    ///
    /// # Safety
    ///
    /// - Losing the contents is right for everyone who uses the region, in all processes.
    /// - No reference into the range is alive in this process, other than to atomics.
    pub unsafe fn punch(&self, offset: u64, len_bytes: u64) -> Result<()> {
        let page = page_size() as u64;
        let end = offset.saturating_add(len_bytes);
        let end = end.min(self.0.max_len_bytes as u64) / page * page;
        let start = offset.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        if start >= end {
            return Ok(());
        }
        // In bounds of an address range, hence of usize.
        let (at, len) = (
            self.0.at.wrapping_add(start as usize),
            (end - start) as usize,
        );
        // SAFETY: in the region, which is mapped (invariant 1); that the contents may go is the caller's duty.
        unsafe { map::remove_pages(at, len) }.map_err(Error::system(format!(
            "give back memory of the {}",
            self.0.id
        )))
    }

    /// Opens the object behind a named region. It must be the one that is mapped.
    fn open(&self) -> Result<OwnedFd> {
        let Backing::Named {
            name,
            device,
            inode,
        } = &self.0.backing
        else {
            unreachable!("an anonymous region has nothing to open");
        };
        let system = Error::system(format!("open the {}, {name}", self.0.id));
        let fd = shm::open(name, Access::ReadWrite).map_err(system)?;
        if identity(name, fd.as_fd())? != (*device, *inode) {
            return Err(Error::WrongPlace {
                id: self.0.id,
                at: self.0.at.addr(),
                why: "its name is that of another object now",
            });
        }
        Ok(fd)
    }

    /// How far an anonymous region has grown.
    fn anonymous_len(&self) -> &AtomicU64 {
        debug_assert!(matches!(self.0.backing, Backing::Anonymous { .. }));
        let word = self.0.at.wrapping_add(self.0.max_len_bytes);
        // SAFETY: in bounds: the page behind the maximum, mapped and present since the region was made; here and there:
        // only ever this atomic; gone: it is mapped as long as the region, and every value of it is a length that was reached.
        unsafe { &*word.cast::<AtomicU64>() }
    }

    /// The first address behind it.
    fn end(&self) -> usize {
        self.0.at.addr() + self.0.max_len_bytes
    }

    /// Whether so many more bytes are worth a look at the headroom.
    fn is_time_to_look(&self, wanted_bytes: u64) -> bool {
        let unlooked_bytes = &self.0.unlooked_bytes;
        let before = unlooked_bytes.fetch_add(wanted_bytes, Ordering::Relaxed);
        let look = before.saturating_add(wanted_bytes) >= HEADROOM_FROM_BYTES;
        if look {
            unlooked_bytes.store(0, Ordering::Relaxed);
        }
        look
    }
}

impl PartialEq for Region {
    fn eq(&self, other: &Region) -> bool {
        self.0.id == other.0.id && self.0.at == other.0.at
    }
}

impl Eq for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Region");
        debug
            .field("id", &self.0.id)
            .field("at", &self.0.at)
            .field("max_len_bytes", &self.0.max_len_bytes);
        match &self.0.backing {
            Backing::Named { name, .. } => debug.field("name", name),
            Backing::Anonymous { label } => debug.field("label", label),
        };
        debug.finish()
    }
}

/// Maps the object at `at`, in whole, and keeps it out of core dumps.
///
/// # Safety
///
/// - Nothing is mapped at `[at, at + len)`, a place of the arena, and the caller keeps others from mapping something there.
unsafe fn map_at(
    arena: &Arena,
    at: *mut u8,
    len: usize,
    fd: BorrowedFd<'_>,
) -> netmcore_sys::Result<()> {
    // SAFETY: nothing is mapped there, so there are no references.
    unsafe {
        arena.reservation().map(at, len, fd, 0, Access::ReadWrite)?;
    }
    // SAFETY: mapped just now.
    unsafe { map::exclude_from_dumps(at, len) }
}

/// Device and inode.
fn identity(name: &ObjectName, object: BorrowedFd<'_>) -> Result<(u64, u64)> {
    let metadata = object
        .try_clone_to_owned()
        .and_then(|fd| File::from(fd).metadata())
        .map_err(|source| Error::Io {
            doing: format!("identify the shared memory object {name}"),
            source,
        })?;
    Ok((metadata.dev(), metadata.ino()))
}

fn steps(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    (start..end)
        .step_by(STEP_BYTES as usize)
        .map(move |from| (from, STEP_BYTES.min(end - from)))
}

fn whole_pages(len_bytes: usize) -> usize {
    len_bytes
        .max(1)
        .checked_next_multiple_of(page_size())
        .unwrap_or(len_bytes)
}

fn beyond_maximum(wanted_bytes: u64, max_len_bytes: u64) -> Error {
    Error::NoSpace {
        limit: SpaceLimit::Region,
        wanted_bytes,
        free_bytes: max_len_bytes,
    }
}

fn look_at_headroom(wanted_bytes: u64) -> Result<()> {
    let room = headroom();
    if room.bytes >= wanted_bytes {
        return Ok(());
    }
    Err(Error::NoSpace {
        limit: room.limit,
        wanted_bytes,
        free_bytes: room.bytes,
    })
}

/// The kernel had none, whatever the headroom says now.
fn no_memory(wanted_bytes: u64) -> Error {
    match look_at_headroom(wanted_bytes) {
        Err(error) => error,
        Ok(()) => Error::NoSpace {
            limit: SpaceLimit::Kernel,
            wanted_bytes,
            free_bytes: headroom().bytes,
        },
    }
}

/// The regions of this process: a list that only grows, newest first (invariant 2).
static REGISTRY: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

struct Entry {
    region: Region,
    next: *const Entry,
}

/// Held while something is mapped (invariant 3). Not needed to look.
static MAPPING: Mutex<()> = Mutex::new(());

type Mapping = MutexGuard<'static, ()>;

fn lock_mapping() -> Mapping {
    // Nothing is left half-done by a panic: the entry is made last, by one store.
    MAPPING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Enters a region that has been mapped.
fn register(inner: Inner, _: &Mapping) -> Region {
    let region = Region(Arc::new(inner));
    let entry = Box::new(Entry {
        region: region.clone(),
        next: REGISTRY.load(Ordering::Relaxed),
    });
    REGISTRY.store(Box::into_raw(entry), Ordering::Release);
    region
}

/// The newest region that `is_it`.
fn find(is_it: impl Fn(&Region) -> bool) -> Option<Region> {
    let mut entry = REGISTRY.load(Ordering::Acquire).cast_const();
    // SAFETY: null or an entry that was complete when it was stored, is not changed and never freed (invariant 2).
    while let Some(Entry { region, next }) = unsafe { entry.as_ref() } {
        if is_it(region) {
            return Some(region.clone());
        }
        entry = *next;
    }
    None
}

/// The region of this process that the address lies in.
pub fn region_of<T: ?Sized>(address: *const T) -> Option<Region> {
    find(|region| region.contains(address))
}

/// Knows how to attach to regions that this process has not mapped yet.
pub trait Resolver: Sync {
    /// Attaches to the region, by [`Region::attach`] with what it knows of it.
    ///
    /// # Errors
    ///
    /// [`Error::NoRegion`] or [`Error::Refused`] if there is none, or it is not for this process; what attaching says.
    fn attach(&self, id: RegionId) -> Result<Region>;

    /// Hears that a handle of a value in the region becomes bytes. If they go to another process in a message, the region should live
    /// until that arrives; and if it arrives once, what `handle` gives belongs to the message: see [`SentHandle`].
    fn is_sent(&self, id: RegionId, handle: &dyn Fn() -> SentHandle) {
        let _ = (id, handle);
    }

    /// Whether what this thread decodes now is a message whose handles were given to it by [`is_sent`](Self::is_sent).
    fn is_receiving(&self) -> bool {
        false
    }
}

static RESOLVER: AtomicPtr<&'static dyn Resolver> = AtomicPtr::new(ptr::null_mut());

/// Sets whom [`resolve`] asks, in this process and those it forks from now on, in the place of an earlier one.
pub fn install_resolver(resolver: &'static dyn Resolver) {
    // A few bytes for each call, never freed: another thread may be about to read the earlier one.
    RESOLVER.store(Box::into_raw(Box::new(resolver)), Ordering::Release);
}

fn resolver() -> Option<&'static dyn Resolver> {
    // SAFETY: null, or a box that was never freed.
    unsafe { RESOLVER.load(Ordering::Acquire).as_ref() }.copied()
}

/// Tells the resolver that a handle becomes bytes. Called where handles are serialised.
pub(crate) fn note_sent(id: RegionId, handle: &dyn Fn() -> SentHandle) {
    if let Some(resolver) = resolver() {
        resolver.is_sent(id, handle);
    }
}

/// Whether handles that are decoded now are those of a message.
pub(crate) fn is_receiving() -> bool {
    resolver().is_some_and(|resolver| resolver.is_receiving())
}

/// The region of that id, attached now if it was not: by the resolver that is [installed](install_resolver).
///
/// # Errors
///
/// [`Error::NoRegion`] if it is not mapped here and there is no resolver; what the resolver says.
pub fn resolve(id: RegionId) -> Result<Region> {
    if let Some(region) = find(|region| region.0.id == id) {
        return Ok(region);
    }
    match resolver() {
        Some(resolver) => resolver.attach(id),
        None => Err(Error::NoRegion { id }),
    }
}

/// Unmaps all regions of this process and empties the registry: for a newborn worker, which shall have in reach
/// only what it resolves itself. Their places are inaccessible then, and can be attached to again. Returns how many there were.
///
/// # Errors
///
/// [`Error::System`] at the limit of mappings; the regions in question stay mapped and known.
///
/// # Safety
///
/// - Nothing in this process uses memory of a region any more, unless it resolves it anew: no references, no collections, and no
///   value that frees shared memory when it is dropped.
/// - No other thread runs that knows a handle or an address of a region, or is about to resolve one.
pub unsafe fn forget_regions() -> Result<usize> {
    // SAFETY: the caller's duty.
    unsafe { forget_regions_if(|_| true) }
}

/// As [`forget_regions`], for those regions only of which `is_forgotten` says so.
///
/// # Errors
///
/// As there.
///
/// # Safety
///
/// As there, for these regions.
pub unsafe fn forget_regions_if(is_forgotten: impl Fn(&Region) -> bool) -> Result<usize> {
    let _mapping = lock_mapping();
    let mut kept = Vec::new();
    let (mut forgotten, mut failed) = (0, None);
    let mut entry = REGISTRY.load(Ordering::Acquire).cast_const();
    // SAFETY: as in `find`.
    while let Some(Entry { region, next }) = unsafe { entry.as_ref() } {
        entry = *next;
        if !is_forgotten(region) {
            kept.push(region);
            continue;
        }
        let inner = &region.0;
        let len = match inner.backing {
            Backing::Named { .. } => inner.max_len_bytes,
            Backing::Anonymous { .. } => inner.max_len_bytes + page_size(),
        };
        // SAFETY: the caller's duty.
        match unsafe { inner.arena.reservation().unmap(inner.at, len) } {
            Ok(()) => forgotten += 1,
            Err(source) => {
                kept.push(region);
                failed = Some(Error::system(format!("unmap the {}", inner.id))(source));
            }
        }
    }
    if forgotten > 0 {
        let mut list: *const Entry = ptr::null();
        for region in kept.into_iter().rev() {
            list = Box::into_raw(Box::new(Entry {
                region: region.clone(),
                next: list,
            }));
        }
        REGISTRY.store(list.cast_mut(), Ordering::Release);
        crate::heap::forget_unmapped();
    }
    failed.map_or(Ok(forgotten), Err)
}

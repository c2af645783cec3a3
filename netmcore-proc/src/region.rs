//! Preallocated regions: shared memory objects that lie at the same address in every process of the run.
//!
//! **Protocol.**
//!
//! 1. Whoever makes a region takes a place in the arena (one step on a cursor that all share), has the name recorded by the master
//!    together with the place, and creates the object. Nobody need map it.
//! 2. Whoever first resolves a handle of the region asks the master where it lies, becomes a user until its end, and maps it there.
//! 3. When the last user is gone, the master gives the memory back, unlinks the object, and drops the record.
//!
//! What the master has mapped when it forks is mapped in the worker, so that a definition can capture a handle. If the process was
//! started with `Inherit::Only`, the rest is unmapped before its function begins.
//!
//! **If a process dies here.** A place without an object is lost: addresses only. Everything else ends with its uses.
//!
//! **Not here.** What lies in a region: netmcore-shm.
//!
//! # Safety
//! Regions are forgotten by a newborn worker that has one thread; a handle to one of them, captured by its function, is the
//! program's error, and is answered by SIGSEGV, since the addresses are never given again.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, Once, PoisonError};

use netmcore_sem::SemContainer;
use netmcore_shm::arena::PLACE_ALIGN_BYTES;
use netmcore_shm::{Arena, Region, RegionId, Resolver, SentHandle};
use netmcore_sys::map::page_size;
use netmcore_sys::{ObjectName, crash_point};

use crate::context::{self, Role, Runtime};
use crate::error::{Error, Result};
use crate::id::{ProcessId, ResourceId};
use crate::manage::{self, Resource};
use crate::master;
use crate::resource::ResourceRepr;

/// What this process has created, and may use whatever it inherits.
static OWN: Mutex<BTreeSet<ResourceId>> = Mutex::new(BTreeSet::new());
/// This process or its master has mapped a region.
static HAS_MAPPED: AtomicBool = AtomicBool::new(false);

/// Creates a shared memory object of `len_bytes` (mode 0600, recorded first) with a place in the arena: every process of the run
/// that uses it has it at the same address, those that run already included. `prefix` begins with `/`.
///
/// The caller is a user of it until it ends or calls [`release`](crate::release); its memory is reached by [`get_region`]. It
/// can grow to [`Region::DEFAULT_MAX_LEN_BYTES`], or to a sixteenth of the arena if that is less (where `ulimit -v` limits addresses),
/// or is as long as it is now if that is more.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, ResourceId, create_preallocated_shm, get_region, spawn};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// /// The first word of a region, and where it lies.
/// fn word(id: ResourceId) -> (&'static AtomicU64, usize) {
///     let region = get_region(id).unwrap();
///     // SAFETY: mapped until the process ends, aligned, and used as an atomic only.
///     (unsafe { &*region.at().cast() }, region.at().addr())
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let (id, _name) = create_preallocated_shm("/example-", 4096).unwrap();
///     let add = |id: ResourceId| {
///         let (word, at) = word(id);
///         word.fetch_add(1, Ordering::Relaxed);
///         at
///     };
///     let running: Vec<_> = (0..3).map(|_| spawn(add, &id).unwrap()).collect();
///     let (word, at) = word(id);
///     assert!(running.iter().all(|process| process.join().unwrap() == at));
///     assert_eq!(word.load(Ordering::Relaxed), 3);
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`create_shm`](crate::create_shm), and [`Error::Memory`] with `ArenaFull` if there are no addresses left. Nothing is
/// left after an error.
///
/// # Blocking
/// As [`create_shm`](crate::create_shm).
#[doc(alias = "Netmcore.create_preallocated_shm")]
pub fn create_preallocated_shm(
    prefix: impl AsRef<[u8]>,
    len_bytes: u64,
) -> Result<(ResourceId, ObjectName)> {
    let (resource, name) = create(prefix.as_ref(), len_bytes, None, Container::No)?;
    Ok((resource.keep(), name))
}

/// As [`create_preallocated_shm`], with a semaphore container.
///
/// # Errors
/// As there; the prefix may be shorter only, since the names of the semaphores are made of it.
#[doc(alias = "Netmcore.create_preallocated_shm_sc")]
pub fn create_preallocated_shm_sc(
    prefix: impl AsRef<[u8]>,
    len_bytes: u64,
) -> Result<(ResourceId, ObjectName, SemContainer)> {
    let (resource, name) = create(prefix.as_ref(), len_bytes, None, Container::Yes)?;
    let container = SemContainer::open(&name)?;
    Ok((resource.keep(), name, container))
}

/// Creates a region that can grow to `max_len_bytes`, and maps it here; else as [`create_preallocated_shm`].
///
/// The guard is the use that the creation gives. The mapping is another, which lasts until this process ends.
///
/// # Errors
/// As [`create_preallocated_shm`], and `NoSpace` with `SpaceLimit::Region` if it is to be longer than its maximum.
///
/// # Blocking
/// As [`create_shm`](crate::create_shm).
pub fn create_region(
    prefix: impl AsRef<[u8]>,
    len_bytes: u64,
    max_len_bytes: u64,
) -> Result<(Resource, Region)> {
    let max_len_bytes = Some(max_len_bytes);
    let (resource, _) = create(prefix.as_ref(), len_bytes, max_len_bytes, Container::No)?;
    let region = get_region(resource.id())?;
    Ok((resource, region))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Container {
    No,
    Yes,
}

fn create(
    prefix: &[u8],
    len_bytes: u64,
    max_len_bytes: Option<u64>,
    container: Container,
) -> Result<(Resource, ObjectName)> {
    let doing = "creating a preallocated shared memory object";
    let name = ObjectName::unique(prefix)?;
    if container == Container::Yes {
        // A container is its prefix: it exists as soon as it is recorded. This checks it.
        SemContainer::open(&name)?;
    }
    let whole_pages = |bytes: u64| bytes.checked_next_multiple_of(page_size() as u64);
    let len_bytes = whole_pages(len_bytes).unwrap_or(len_bytes);
    let max_len_bytes = match max_len_bytes {
        Some(max_len_bytes) => whole_pages(max_len_bytes.max(1)).unwrap_or(max_len_bytes),
        None => len_bytes.max(default_max_len_bytes()?),
    };
    if len_bytes > max_len_bytes {
        return Err(Error::memory(doing)(netmcore_shm::Error::NoSpace {
            limit: netmcore_shm::SpaceLimit::Region,
            wanted_bytes: len_bytes,
            free_bytes: max_len_bytes,
        }));
    }
    let place = arena()?
        .place(usize::try_from(max_len_bytes).unwrap_or(usize::MAX))
        .map_err(Error::memory(doing))?;
    crash_point!("proc.region.placed");
    let at = place.at().addr() as u64;
    let repr = match container {
        Container::No => ResourceRepr::PosixShmPreallocated {
            name: name.clone(),
            at,
            len_bytes,
            max_len_bytes,
        },
        Container::Yes => ResourceRepr::PosixShmPreallocatedSc {
            name: name.clone(),
            at,
            len_bytes,
            max_len_bytes,
            prefix: name.clone(),
        },
    };
    let resource = manage::create(doing, repr, || manage::make_shm(&name, len_bytes))?;
    lock_own().insert(resource.id());
    Ok((resource, name))
}

/// Returns a region, mapped in this process at the same address as in all others.
///
/// The first call asks the master; the process is then a user of the region until it ends, however often it calls
/// [`release`](crate::release).
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource, or it has no place in the arena; [`Error::NotInherited`] if this process was
/// started without it.
pub fn get_region(id: ResourceId) -> Result<Region> {
    install();
    netmcore_shm::resolve(RegionId(id.get())).map_err(|error| match error {
        netmcore_shm::Error::Refused { id, source } => match source.downcast::<Error>() {
            Ok(error) => *error,
            Err(source) => {
                Error::memory("mapping a region")(netmcore_shm::Error::Refused { id, source })
            }
        },
        error => Error::memory(format!("mapping {id}"))(error),
    })
}

/// Has handles of regions resolved by the master of this process; once for a program.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    static REGIONS: Regions = Regions;
    ONCE.call_once(|| netmcore_shm::install_resolver(&REGIONS));
}

/// Resolves handles of regions that this process has not mapped yet.
struct Regions;

impl Resolver for Regions {
    fn attach(&self, id: RegionId) -> netmcore_shm::Result<Region> {
        let Some(resource) = resource_of(id) else {
            return Err(netmcore_shm::Error::NoRegion { id });
        };
        attach(resource).map_err(|error| match error {
            Error::Memory { source, .. } => source,
            other => netmcore_shm::Error::Refused {
                id,
                source: Box::new(other),
            },
        })
    }

    fn is_sent(&self, id: RegionId, handle: &dyn Fn() -> SentHandle) {
        manage::note_handle_sent(resource_of(id), handle);
    }

    fn is_receiving(&self) -> bool {
        manage::is_receiving()
    }
}

/// The resource that the region is; regions of the program's own have addresses as ids.
pub(crate) fn resource_of(id: RegionId) -> Option<ResourceId> {
    (id.0 > 0 && id.0 < PLACE_ALIGN_BYTES as u64).then(|| ResourceId::from_raw(id.0))
}

fn attach(id: ResourceId) -> Result<Region> {
    let doing = format!("mapping {id}");
    check_inherited(id)?;
    let repr = manage::map(id)?;
    crash_point!("proc.region.used");
    let (Some((at, max_len_bytes)), Some(name)) = (repr.place(), repr.shm_name()) else {
        return Err(Error::Refused {
            doing,
            reason: format!("it is a {}", repr.ty()),
        });
    };
    // What does not fit is no place of the arena, and refused as such.
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let max_len_bytes = usize::try_from(max_len_bytes).unwrap_or(usize::MAX);
    HAS_MAPPED.store(true, Relaxed);
    let region = Region::attach(&arena()?, RegionId(id.get()), name, at, max_len_bytes);
    crash_point!("proc.region.mapped");
    region.map_err(Error::memory(doing))
}

/// The arena of the run: in the master also before it.
fn arena() -> Result<Arena> {
    match context::role() {
        Role::Worker => {
            let runtime = context::running("mapping a region")?;
            let memory = runtime
                .memory
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            memory
                .as_ref()
                .map(|(_, arena)| arena.clone())
                .ok_or(Error::NotRunning {
                    call: "mapping a region",
                })
        }
        Role::Master | Role::None | Role::Foreign => master::arena_here(),
    }
}

/// To what length a region may grow of which nothing else is said: so that sixteen of them fit into an arena that is
/// smaller than usual.
pub(crate) fn default_max_len_bytes() -> Result<u64> {
    let share = arena()?.len_bytes() / 16 / PLACE_ALIGN_BYTES * PLACE_ALIGN_BYTES;
    Ok(share.min(Region::DEFAULT_MAX_LEN_BYTES) as u64)
}

/// Whether this process may use the region: it has made it, or inherits it, or it is the heap that everybody has.
pub(crate) fn check_inherited(id: ResourceId) -> Result<()> {
    if context::role() != Role::Worker {
        return Ok(());
    }
    let (Some(runtime), Some(process)) = (context::runtime(), context::self_process()) else {
        return Ok(());
    };
    let Some(inherited) = runtime.control.inherits_only(process) else {
        return Ok(());
    };
    let is_allowed = inherited.contains(&id)
        || runtime.control.named_heap() == Some(id)
        || lock_own().contains(&id);
    match is_allowed {
        true => Ok(()),
        false => Err(Error::NotInherited {
            id,
            process,
            inherited,
        }),
    }
}

fn lock_own() -> std::sync::MutexGuard<'static, BTreeSet<ResourceId>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A newborn worker has created nothing, whatever its master has.
pub(crate) fn forget_own() {
    lock_own().clear();
}

/// Before the function of `process` begins, unmaps what the master had mapped and the process does not inherit.
pub(crate) fn forget_others(runtime: &Runtime, process: ProcessId) {
    if !HAS_MAPPED.load(Relaxed) {
        return;
    }
    let Some(inherited) = runtime.control.inherits_only(process) else {
        return;
    };
    let is_forgotten = |region: &Region| {
        resource_of(region.id())
            .is_some_and(|id| !inherited.contains(&id) && runtime.control.named_heap() != Some(id))
    };
    // SAFETY: a newborn worker has one thread, and nothing in it uses a region yet (module docs).
    if let Err(error) = unsafe { netmcore_shm::forget_regions_if(is_forgotten) } {
        tracing::warn!(target: "netmcore", %error, "a region stays mapped that the process does not inherit");
    }
}

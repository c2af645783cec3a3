//! Heaps in a run, and the one heap that all of it shares, in which values are found by name.
//!
//! **Protocol.** A heap is a region and ends as one: with its last user. The heap of named objects is made by whoever asks for
//! it first, while it holds a lock in the control block, and offered to the master, which is a user of it to the end of the run.
//!
//! | the maker | died there: |
//! |---|---|
//! | has made a region | it goes with its only user; the next to ask makes another |
//! | has made the heap in it | likewise |
//! | has offered it | it is the run's |
//!
//! **Not here.** What lies in a heap: netmcore-shm. Who may use which region: `region`.
//!
//! # Safety
//! A region is unmapped when no heap could be made in it: nobody has an address in it then.
#![allow(unsafe_code)]

use netmcore_shm::{Heap, Region, RegionId, ShmArc, ShmSafe};
use netmcore_sys::crash_point;
use netmcore_sys::map::page_size;

use crate::context::{self, Role};
use crate::error::{Error, Result};
use crate::id::ResourceId;
use crate::manage::{self, Resource};
use crate::master;
use crate::region::{self, create_region, get_region};

/// The prefix of the heap of named objects.
const SHARED_PREFIX: &str = "/netmcore-heap-";

/// Creates a heap in a shared memory object of its own (recorded first), whose name begins with `prefix`. It takes memory as it
/// is used, up to the maximum length that regions have by default.
///
/// The caller is a user of it until it ends. So is whoever gets a handle to something in it, by an argument or a result or by
/// [`get_heap`]; the heap goes with its last user. One that nobody else has used comes back whole when its maker ends or is killed,
/// whatever is in it.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, ShmArc, create_heap, spawn};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let heap = create_heap("/example-").unwrap();
///     let hits = ShmArc::new_in(&heap, AtomicU64::new(0)).unwrap();
///     let add = |hits: ShmArc<AtomicU64>| hits.fetch_add(1, Ordering::Relaxed);
///     let running: Vec<_> = (0..3).map(|_| spawn(add, &hits).unwrap()).collect();
///     running.iter().for_each(|process| drop(process.join().unwrap()));
///     assert_eq!(hits.load(Ordering::Relaxed), 3);
///
///     // What has been dropped is gone, and said to be.
///     let descriptor = ShmArc::descriptor(&hits).unwrap();
///     drop(hits);
///     assert!(descriptor.resolve().is_err());
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`create_preallocated_shm`](crate::create_preallocated_shm). Nothing is left after an error.
///
/// # If a process dies
/// Before this has returned: there is no heap.
///
/// # Blocking
/// As [`create_shm`](crate::create_shm).
#[doc(alias = "Netmcore_heap.create_heap")]
#[doc(alias = "Netmcore_mempool.create_mempool")]
pub fn create_heap(prefix: impl AsRef<[u8]>) -> Result<Heap> {
    make(prefix.as_ref(), region::default_max_len_bytes()?)
}

/// As [`create_heap`], for a heap that takes `max_len_bytes` at the most. Addresses for so much are taken at once, and never
/// given again in the run.
///
/// # Errors
/// As there.
///
/// # If a process dies
/// As there.
///
/// # Blocking
/// As there.
pub fn create_heap_with_max(prefix: impl AsRef<[u8]>, max_len_bytes: u64) -> Result<Heap> {
    make(prefix.as_ref(), max_len_bytes)
}

fn make(prefix: &[u8], max_len_bytes: u64) -> Result<Heap> {
    let (resource, region) = create_region(prefix, 0, max_len_bytes)?;
    crash_point!("proc.heap.mapped");
    match Heap::create(&region) {
        Ok(heap) => {
            crash_point!("proc.heap.made");
            // It ends with the process, as the mapping does.
            resource.keep();
            Ok(heap)
        }
        Err(error) => {
            discard(resource, region);
            Err(Error::memory("creating a heap")(error))
        }
    }
}

/// Takes back a region that this process has made, and in which nothing is.
fn discard(resource: Resource, region: Region) {
    let id = region.id();
    drop(region);
    // SAFETY: this process has made it just now and told nobody; no heap was made in it, so that nothing refers to it.
    let forgotten = unsafe { netmcore_shm::forget_regions_if(|region| region.id() == id) };
    let outcome = match forgotten {
        Ok(_) => manage::unmap(resource.id()),
        Err(error) => Err(Error::memory("unmapping a region")(error)),
    };
    if let Err(error) = outcome {
        tracing::warn!(target: "netmcore", %error, "a region without contents stays until the process ends");
    }
}

/// Returns the heap that was made in a region; its id is that of its [region](Heap::region). The caller is a user of it until it ends.
///
/// # Errors
/// As for [`get_region`]; [`Error::Refused`], or [`Error::Memory`] with `FormatMismatch`, if there is no heap in the region.
pub fn get_heap(id: ResourceId) -> Result<Heap> {
    let doing = || format!("getting the heap in {id}");
    let region = get_region(id)?;
    // A region without memory has nothing to read, not even that there is no heap.
    let len_bytes = region.len_bytes().map_err(Error::memory(doing()))?;
    if len_bytes < page_size() as u64 {
        return Err(Error::Refused {
            doing: doing(),
            reason: "there is no heap in it".to_owned(),
        });
    }
    Heap::attach(&region).map_err(Error::memory(doing()))
}

/// Returns the heap that all processes of the run share, also those that were started with [`Inherit::Only`](crate::Inherit): the one
/// that the named objects are in. Whoever asks first makes it; it lives to the end of the run.
///
/// It is the heap for what has no better one. What several processes kill each other over is best kept in a heap of its own, which
/// comes back when they are gone ([`create_heap`]).
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, ShmArc, shared_heap, spawn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory).shared_heap_max_bytes(1 << 30);
/// let first = master.def_process(|()| {
///     let make = |words: u64| ShmArc::new_in(&shared_heap().unwrap(), words).unwrap();
///     let seven = spawn(make, &7).unwrap().join().unwrap(); // its maker has ended
///     assert_eq!(*seven, 7);
///     let heap = shared_heap().unwrap();
///     assert!(heap.allocator().contains(ShmArc::as_ptr(&seven).cast()));
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`create_heap`]; the next to ask tries again.
///
/// # If a process dies
/// While it makes the heap: the next to ask makes it, or has it.
///
/// # Blocking
/// While another process makes it.
pub fn shared_heap() -> Result<Heap> {
    if let Some(id) = present()? {
        return get_heap(id);
    }
    let runtime = context::runtime().filter(|_| context::role() != Role::None);
    let _making = runtime.map(|runtime| runtime.control.lock_named_heap());
    if let Some(id) = present()? {
        return get_heap(id);
    }
    crash_point!("proc.heap.named_locked");
    let max_len_bytes = match runtime {
        Some(runtime) => runtime.shared_heap_max_bytes,
        None => master::shared_heap_max_bytes_here()?,
    };
    let max_len_bytes = match max_len_bytes {
        Some(max_len_bytes) => max_len_bytes,
        None => region::default_max_len_bytes()?,
    };
    let heap = make(SHARED_PREFIX.as_bytes(), max_len_bytes)?;
    let id = id_of(&heap)?;
    let chosen = manage::offer_heap(id)?;
    crash_point!("proc.heap.offered");
    match chosen == id {
        true => Ok(heap),
        false => get_heap(chosen),
    }
}

/// The heap of named objects, if there is one.
fn present() -> Result<Option<ResourceId>> {
    match (context::role(), context::runtime()) {
        (Role::None, _) | (_, None) => master::named_heap_here(),
        (_, Some(runtime)) => Ok(runtime.control.named_heap()),
    }
}

fn id_of(heap: &Heap) -> Result<ResourceId> {
    let RegionId(id) = heap.region().id();
    region::resource_of(RegionId(id)).ok_or(Error::Memory {
        doing: "naming a heap".to_owned(),
        source: netmcore_shm::Error::NoRegion { id: RegionId(id) },
    })
}

/// Returns the shared value of that name in this run. If there is none, `init` makes it: of all who ask at the same time, in all
/// processes, one does, and the others wait for it. It lives to the end of the run, or until its name is
/// [removed](remove_named) and its last handle dropped.
///
/// The ancestor's shared variables, mutexes, semaphores and mailboxes by name are this, with the type in question.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, named, spawn};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let hit = |()| {
///         let hits = named("hits", || AtomicU64::new(0)).unwrap();
///         hits.fetch_add(1, Ordering::Relaxed);
///     };
///     let running: Vec<_> = (0..3).map(|_| spawn(hit, &()).unwrap()).collect();
///     running.iter().for_each(|process| process.join().unwrap());
///     assert_eq!(named("hits", || AtomicU64::new(0)).unwrap().load(Ordering::Relaxed), 3);
///     assert!(named("hits", || 0_u8).is_err()); // it is another type's
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Memory`] with `TypeMismatch` if the name is that of a value of another type, with `NameLength` if it is empty or longer than
/// 255 bytes; otherwise as for [`shared_heap`].
///
/// # Panics
/// If `init` asks for the same name. If `init` panics, the next to ask makes the value.
///
/// # If a process dies
/// While it makes the value: one of those who wait makes it.
///
/// # Blocking
/// While another one makes the value.
#[doc(alias = "Netplex_sharedvar")]
#[doc(alias = "Netplex_mutex")]
#[doc(alias = "Netplex_semaphore")]
#[doc(alias = "Netplex_mbox")]
pub fn named<T: ShmSafe + Sync>(name: &str, init: impl FnOnce() -> T) -> Result<ShmArc<T>> {
    try_named(name, |_| Ok(init()))
}

/// As [`named`], with an `init` that takes its memory from the heap, and may fail: its error is the caller's, and the next to ask tries
/// again.
///
/// # Errors
/// As for [`named`], and what `init` says.
///
/// # Panics
/// As [`named`].
///
/// # If a process dies
/// As for [`named`]. Blocks that `init` had allocated stay allocated until the end of the run.
///
/// # Blocking
/// As [`named`].
pub fn try_named<T: ShmSafe + Sync>(
    name: &str,
    init: impl FnOnce(&Heap) -> netmcore_shm::Result<T>,
) -> Result<ShmArc<T>> {
    let heap = shared_heap()?;
    let made = heap.try_named(name, || init(&heap));
    made.map_err(Error::memory(doing(name)))
}

/// Returns the shared value of that name, if it has been made.
///
/// # Errors
/// As for [`named`].
pub fn get_named<T: ShmSafe + Sync>(name: &str) -> Result<Option<ShmArc<T>>> {
    match present()? {
        Some(id) => get_heap(id)?
            .get_named(name)
            .map_err(Error::memory(doing(name))),
        None => Ok(None),
    }
}

/// Takes the value from the name: it lives as long as it has handles, and the next to ask for the name makes another.
///
/// # Errors
/// As for [`named`].
///
/// # If a process dies
/// The name has the value, or not; the value may stay to the end of the run.
///
/// # Blocking
/// While another one makes the value.
pub fn remove_named<T: ShmSafe + Sync>(name: &str) -> Result<Option<ShmArc<T>>> {
    match present()? {
        Some(id) => get_heap(id)?
            .remove_named(name)
            .map_err(Error::memory(doing(name))),
        None => Ok(None),
    }
}

fn doing(name: &str) -> String {
    format!("the shared value named {name:?}")
}

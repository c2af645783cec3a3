//! Which resources there are, and who uses each: a pure table that the master owns.
//!
//! **Protocol.** A resource lives from [`insert`](ResourceTable::insert) until nobody uses it. A *use* belongs to a
//! [`User`] and is counted: each create, manage or get adds one, a release takes one, the user's end takes all. A
//! resource inside an argument or a result has a use of its own while it is under way:
//!
//! | step | uses of the resource |
//! |---|---|
//! | the sender holds it | `Process(sender)` |
//! | `send(Process(sender), P, leg, ids)` | and `InFlight { P, leg }` |
//! | the sender releases it, or dies | `InFlight { P, leg }` |
//! | the receiver has decoded it (`acquire`) | and `Process(receiver)` |
//! | `land(P, leg)` | `Process(receiver)` |
//!
//! The last use gone does not delete: [`take_unused`](ResourceTable::take_unused) does, the only door (besides
//! `remove` and `destroy_all`, which ask nobody). It is told what else counts as a use: slots of the process table,
//! which are users of what their processes inherit, do not appear here.
//!
//! **Invariants.**
//! 1. An id names one resource for the life of the program; ids count up from 1.
//! 2. A kernel object has one entry at most, so nobody deletes it while another entry uses it.
//! 3. An entry without uses is in `unused`, and no other is.
//!
//! **If a process dies here.** The master learns of it and calls [`process_ended`](ResourceTable::process_ended). If the
//! master dies, this table is gone and all workers with it; the record has what to clean up.
//!
//! **Not here.** The guard that users hold, and the deletion itself: the worker's and the master's business.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use netmcore_pmanage::KernelObject;
use netmcore_sys::ObjectName;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::id::{ProcessId, ResourceId};

/// The eight types of managed resources.
#[doc(alias = "compute_resource_type")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum ResourceType {
    /// A temporary file.
    File,
    /// The means to start processes of one kind.
    ForkPoint,
    /// The means to wait for the results of processes of one kind.
    JoinPoint,
    /// A named POSIX semaphore.
    PosixSem,
    /// A POSIX shared memory object.
    PosixShm,
    /// A POSIX shared memory object with a place in the arena, the same in every process.
    PosixShmPreallocated,
    /// The same with a semaphore container.
    PosixShmPreallocatedSc,
    /// A POSIX shared memory object with its semaphore container.
    PosixShmSc,
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ResourceType::File => "temporary file",
            ResourceType::ForkPoint => "fork point",
            ResourceType::JoinPoint => "join point",
            ResourceType::PosixSem => "named semaphore",
            ResourceType::PosixShm => "shared memory object",
            ResourceType::PosixShmPreallocated => "preallocated shared memory object",
            ResourceType::PosixShmPreallocatedSc => {
                "preallocated shared memory object with semaphore container"
            }
            ResourceType::PosixShmSc => "shared memory object with semaphore container",
        })
    }
}

/// A managed resource: its type, and the data that each type has.
///
/// ```
/// use netmcore_proc::{ResourceRepr, ResourceType};
///
/// let file = ResourceRepr::File("/tmp/part_1".into());
/// assert_eq!(file.ty(), ResourceType::File);
/// assert_eq!(file.to_string(), "temporary file /tmp/part_1");
/// ```
#[doc(alias = "compute_resource_repr")]
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum ResourceRepr {
    /// A temporary file: its absolute path.
    File(#[serde(with = "path_bytes")] PathBuf),
    /// A fork point: the number of its definition, counted in the order of definition.
    ForkPoint(u32),
    /// A join point: the number of its definition, counted in the order of definition.
    JoinPoint(u32),
    /// A named semaphore.
    PosixSem(#[serde(with = "name_bytes")] ObjectName),
    /// A shared memory object.
    PosixShm(#[serde(with = "name_bytes")] ObjectName),
    /// A shared memory object with a place in the arena.
    PosixShmPreallocated {
        /// Its name.
        #[serde(with = "name_bytes")]
        name: ObjectName,
        /// The address of its place, the same in every process.
        at: u64,
        /// Its length when it was created; it may have grown since.
        len_bytes: u64,
        /// The length of its place, to which it can grow.
        max_len_bytes: u64,
    },
    /// A shared memory object with a place in the arena and a semaphore container.
    PosixShmPreallocatedSc {
        /// Its name.
        #[serde(with = "name_bytes")]
        name: ObjectName,
        /// The address of its place, the same in every process.
        at: u64,
        /// Its length when it was created; it may have grown since.
        len_bytes: u64,
        /// The length of its place, to which it can grow.
        max_len_bytes: u64,
        /// The prefix of the semaphore container.
        #[serde(with = "name_bytes")]
        prefix: ObjectName,
    },
    /// A shared memory object with its semaphore container.
    PosixShmSc {
        /// Its name.
        #[serde(with = "name_bytes")]
        name: ObjectName,
        /// The prefix of the semaphore container.
        #[serde(with = "name_bytes")]
        prefix: ObjectName,
    },
}

impl ResourceRepr {
    /// Returns the type.
    pub fn ty(&self) -> ResourceType {
        match self {
            ResourceRepr::File(_) => ResourceType::File,
            ResourceRepr::ForkPoint(_) => ResourceType::ForkPoint,
            ResourceRepr::JoinPoint(_) => ResourceType::JoinPoint,
            ResourceRepr::PosixSem(_) => ResourceType::PosixSem,
            ResourceRepr::PosixShm(_) => ResourceType::PosixShm,
            ResourceRepr::PosixShmPreallocated { .. } => ResourceType::PosixShmPreallocated,
            ResourceRepr::PosixShmPreallocatedSc { .. } => ResourceType::PosixShmPreallocatedSc,
            ResourceRepr::PosixShmSc { .. } => ResourceType::PosixShmSc,
        }
    }

    /// Returns where a preallocated object lies: the address of its place, and the most bytes that it can grow to.
    pub(crate) fn place(&self) -> Option<(u64, u64)> {
        match *self {
            ResourceRepr::PosixShmPreallocated {
                at, max_len_bytes, ..
            }
            | ResourceRepr::PosixShmPreallocatedSc {
                at, max_len_bytes, ..
            } => Some((at, max_len_bytes)),
            _ => None,
        }
    }

    /// Returns the name of the shared memory object, for the four types that are one.
    pub fn shm_name(&self) -> Option<&ObjectName> {
        match self {
            ResourceRepr::PosixShm(name)
            | ResourceRepr::PosixShmPreallocated { name, .. }
            | ResourceRepr::PosixShmPreallocatedSc { name, .. }
            | ResourceRepr::PosixShmSc { name, .. } => Some(name),
            _ => None,
        }
    }

    /// Returns the prefix of the semaphore container, for the two types that have one.
    pub fn container_prefix(&self) -> Option<&ObjectName> {
        match self {
            ResourceRepr::PosixShmPreallocatedSc { prefix, .. }
            | ResourceRepr::PosixShmSc { prefix, .. } => Some(prefix),
            _ => None,
        }
    }

    /// What outlives the program and stands in the record, in the order of creation: nothing for the two kinds of points.
    pub(crate) fn kernel_objects(&self) -> Vec<KernelObject> {
        let container =
            |prefix: &ObjectName| KernelObject::SemContainer(prefix.as_bytes().to_vec());
        match self {
            ResourceRepr::File(path) => vec![KernelObject::File(path.clone())],
            ResourceRepr::ForkPoint(_) | ResourceRepr::JoinPoint(_) => vec![],
            ResourceRepr::PosixSem(name) => vec![KernelObject::PosixSem(name.clone())],
            ResourceRepr::PosixShm(name) | ResourceRepr::PosixShmPreallocated { name, .. } => {
                vec![KernelObject::PosixShm(name.clone())]
            }
            ResourceRepr::PosixShmPreallocatedSc { name, prefix, .. }
            | ResourceRepr::PosixShmSc { name, prefix } => {
                vec![KernelObject::PosixShm(name.clone()), container(prefix)]
            }
        }
    }

    /// What two entries must not share.
    fn object(&self) -> Object {
        match self {
            ResourceRepr::File(path) => Object::File(path.clone()),
            ResourceRepr::ForkPoint(definition) => Object::ForkPoint(*definition),
            ResourceRepr::JoinPoint(definition) => Object::JoinPoint(*definition),
            ResourceRepr::PosixSem(name) => Object::Sem(name.clone()),
            ResourceRepr::PosixShm(name)
            | ResourceRepr::PosixShmPreallocated { name, .. }
            | ResourceRepr::PosixShmPreallocatedSc { name, .. }
            | ResourceRepr::PosixShmSc { name, .. } => Object::Shm(name.clone()),
        }
    }
}

/// The type in words with the name, as messages have it.
impl fmt::Display for ResourceRepr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ResourceRepr::File(path) => write!(f, "temporary file {}", path.display()),
            ResourceRepr::ForkPoint(definition) => {
                write!(f, "fork point of definition {definition}")
            }
            ResourceRepr::JoinPoint(definition) => {
                write!(f, "join point of definition {definition}")
            }
            ResourceRepr::PosixSem(name) => write!(f, "named semaphore {name}"),
            ResourceRepr::PosixShm(name) => write!(f, "shared memory object {name}"),
            ResourceRepr::PosixShmPreallocated { name, .. } => {
                write!(f, "preallocated shared memory object {name}")
            }
            ResourceRepr::PosixShmPreallocatedSc { name, prefix, .. } => write!(
                f,
                "preallocated shared memory object {name} with semaphore container {prefix}"
            ),
            ResourceRepr::PosixShmSc { name, prefix } => {
                write!(
                    f,
                    "shared memory object {name} with semaphore container {prefix}"
                )
            }
        }
    }
}

/// Which preallocated regions a new process may see. It is a user of each from the start on, until it ends.
///
/// Looking at another one, in whatever form its handle came, is refused with
/// [`Error::NotInherited`](crate::Error::NotInherited). Resources of other types are not inherited: whoever knows
/// the id gets them.
#[doc(alias = "inherit_request")]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Inherit {
    /// All: those that exist when the process is started are kept alive for it, and younger ones are in reach.
    #[default]
    All,
    /// These, and what the process creates itself.
    #[doc(alias = "Resources")]
    Only(Vec<ResourceId>),
}

/// Makes the path of a file that is to be managed absolute, so that it means the same in every process.
///
/// # Errors
///
/// [`Error::InvalidPath`] for a path that is empty, contains `..` (it would depend on what links exist when the file is
/// deleted), names a directory by its form, or has a NUL byte.
pub(crate) fn managed_path(path: &Path, current_dir: &Path) -> Result<PathBuf, Error> {
    let invalid = |why: &str| {
        Err(Error::InvalidPath {
            path: path.to_path_buf(),
            why: why.into(),
        })
    };
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return invalid("it is empty");
    }
    if bytes.contains(&0) {
        return invalid("it contains a NUL byte, which no file name can");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return invalid(
            "it contains `..`, whose meaning may have changed when the file is deleted; give the path without it",
        );
    }
    if bytes.ends_with(b"/") || bytes.ends_with(b"/.") || bytes == b"." {
        return invalid("it is the path of a directory, and only files are managed");
    }
    // Collecting the components drops `.` and doubled slashes, so one file has one spelling.
    Ok(current_dir.join(path).components().collect())
}

/// Who can use a resource.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub(crate) enum User {
    /// The master itself, for what hooks create, and for the points of definitions.
    Master,
    /// A worker, until it ends.
    Process(ProcessId),
    /// A region's mapping in a worker, or in the master (`None`). It cannot be released: pointers into the region may
    /// lie anywhere.
    Mapping(Option<ProcessId>),
    /// A message on its way: it uses what is in it until the receiver has taken it over.
    InFlight { process: ProcessId, leg: Leg },
}

impl User {
    /// The user that stands for this one's mappings.
    fn mapping(self) -> User {
        match self {
            User::Process(process) => User::Mapping(Some(process)),
            User::Master | User::Mapping(_) | User::InFlight { .. } => User::Mapping(None),
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Master => f.write_str("the master"),
            User::Process(process) => write!(f, "{process}"),
            User::Mapping(None) => f.write_str("a mapping in the master"),
            User::Mapping(Some(process)) => write!(f, "a mapping in {process}"),
            User::InFlight {
                process,
                leg: Leg::Argument,
            } => write!(f, "the argument of {process}"),
            User::InFlight {
                process,
                leg: Leg::Result,
            } => write!(f, "the result of {process}"),
        }
    }
}

/// The two messages in the life of a process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub(crate) enum Leg {
    /// From the process that starts it to the process.
    Argument,
    /// From the process to the one that joins it.
    Result,
}

/// Why the table refuses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum ResourceError {
    /// No such id, or not of the type asked for.
    NoResource {
        id: ResourceId,
        expected: Option<ResourceType>,
        found: Option<ResourceType>,
    },
    /// The user has no use to give up or to pass on.
    NotAUser { id: ResourceId },
    /// The object is managed already, as something else.
    AlreadyManaged {
        id: ResourceId,
        wanted: String,
        found: String,
    },
}

impl From<ResourceError> for Error {
    fn from(error: ResourceError) -> Error {
        match error {
            ResourceError::NoResource {
                id,
                expected,
                found,
            } => Error::NoResource {
                id,
                expected,
                found,
            },
            ResourceError::NotAUser { id } => Error::NotAUser { id },
            ResourceError::AlreadyManaged { id, wanted, found } => {
                Error::AlreadyManaged { id, wanted, found }
            }
        }
    }
}

/// The most users that a line of a listing names, so that a page of lines has a bounded size.
pub(crate) const USERS_LISTED: usize = 256;

/// One line of a listing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ResourceLine {
    pub(crate) id: ResourceId,
    pub(crate) repr: ResourceRepr,
    /// How many users it has; processes that only inherit are not among them.
    pub(crate) user_count: u64,
    /// The first [`USERS_LISTED`] of them, each with the number of its uses.
    pub(crate) users: Vec<(User, u64)>,
}

/// The outcome of [`ResourceTable::insert`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Inserted {
    pub(crate) id: ResourceId,
    /// Whether the object was not in the table before.
    pub(crate) is_new: bool,
}

/// The resources of a program and their uses.
#[derive(Debug)]
pub(crate) struct ResourceTable {
    next: u64,
    entries: BTreeMap<ResourceId, Entry>,
    by_object: HashMap<Object, ResourceId>,
    /// Never zero; ordered, so that all uses of one user stand together.
    uses: BTreeMap<(User, ResourceId), u64>,
    unused: BTreeSet<ResourceId>,
}

#[derive(Debug)]
struct Entry {
    repr: ResourceRepr,
    /// The sum over all users.
    use_count: u64,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Object {
    File(PathBuf),
    ForkPoint(u32),
    JoinPoint(u32),
    Sem(ObjectName),
    Shm(ObjectName),
}

impl Default for ResourceTable {
    fn default() -> Self {
        ResourceTable {
            next: 1,
            entries: BTreeMap::new(),
            by_object: HashMap::new(),
            uses: BTreeMap::new(),
            unused: BTreeSet::new(),
        }
    }
}

impl ResourceTable {
    /// Makes an empty table whose ids begin at this number, behind those of an earlier run.
    pub(crate) fn starting_at(next: u64) -> Self {
        ResourceTable {
            next,
            ..ResourceTable::default()
        }
    }

    /// Returns the id that the next new resource will have: a process that is started now and inherits all, inherits
    /// every id below it.
    pub(crate) fn next_id(&self) -> ResourceId {
        ResourceId::from_raw(self.next)
    }

    /// Adds a resource with `user` as its user. An object that is in the table already keeps its id, and `user` gets
    /// one more use of it.
    ///
    /// # Errors
    ///
    /// `AlreadyManaged` when the object is in the table as a resource of another type, or with other data.
    pub(crate) fn insert(
        &mut self,
        repr: ResourceRepr,
        user: User,
    ) -> Result<Inserted, ResourceError> {
        let object = repr.object();
        if let Some(&id) = self.by_object.get(&object) {
            let present = &self.entries[&id].repr;
            if *present != repr {
                return Err(ResourceError::AlreadyManaged {
                    id,
                    wanted: repr.to_string(),
                    found: present.to_string(),
                });
            }
            self.add_use(id, user);
            return Ok(Inserted { id, is_new: false });
        }
        let id = self.next_id();
        self.next += 1;
        self.by_object.insert(object, id);
        self.entries.insert(id, Entry { repr, use_count: 0 });
        self.add_use(id, user);
        Ok(Inserted { id, is_new: true })
    }

    /// Looks a resource up, of any type or of the expected one.
    pub(crate) fn get(
        &self,
        id: ResourceId,
        expected: Option<ResourceType>,
    ) -> Result<&ResourceRepr, ResourceError> {
        let found = self.entries.get(&id).map(|entry| &entry.repr);
        match found {
            Some(repr) if expected.is_none_or(|expected| expected == repr.ty()) => Ok(repr),
            _ => Err(ResourceError::NoResource {
                id,
                expected,
                found: found.map(ResourceRepr::ty),
            }),
        }
    }

    /// Looks a resource up and gives `user` a use of it.
    pub(crate) fn acquire(
        &mut self,
        id: ResourceId,
        expected: Option<ResourceType>,
        user: User,
    ) -> Result<&ResourceRepr, ResourceError> {
        self.get(id, expected)?;
        self.add_use(id, user);
        Ok(&self.entries[&id].repr)
    }

    /// Looks a region up that `user` is about to map, and enters the mapping, once however often it is asked for.
    ///
    /// # Errors
    ///
    /// `NoResource` when there is no such resource, or it has no place in the arena.
    pub(crate) fn map(
        &mut self,
        id: ResourceId,
        user: User,
    ) -> Result<&ResourceRepr, ResourceError> {
        let repr = self.get(id, None)?;
        if repr.place().is_none() {
            return Err(ResourceError::NoResource {
                id,
                expected: Some(ResourceType::PosixShmPreallocated),
                found: Some(repr.ty()),
            });
        }
        let mapping = user.mapping();
        if !self.is_user(id, mapping) {
            self.add_use(id, mapping);
        }
        Ok(&self.entries[&id].repr)
    }

    /// Takes back what [`map`](Self::map) has entered.
    pub(crate) fn unmap(&mut self, id: ResourceId, user: User) -> Result<(), ResourceError> {
        self.release(id, user.mapping())
    }

    /// The region that an address lies in, and how far behind its beginning.
    pub(crate) fn region_at(&self, address: u64) -> Option<(ResourceId, u64)> {
        self.entries.iter().find_map(|(&id, entry)| {
            let (at, max_len_bytes) = entry.repr.place()?;
            let offset = address.checked_sub(at)?;
            (offset < max_len_bytes).then_some((id, offset))
        })
    }

    /// The regions that `user` has mapped.
    pub(crate) fn mapped_by(&self, user: User) -> BTreeSet<ResourceId> {
        self.uses_of(user.mapping()).map(|(id, _)| id).collect()
    }

    /// Takes one use from `user`.
    pub(crate) fn release(&mut self, id: ResourceId, user: User) -> Result<(), ResourceError> {
        self.get(id, None)?;
        if self.take_uses(id, user, 1) {
            Ok(())
        } else {
            Err(ResourceError::NotAUser { id })
        }
    }

    /// Takes all uses from `user`, those of its mappings too if it has no use for them any more.
    pub(crate) fn release_all(&mut self, user: User, with_mappings: bool) {
        self.drop_user(user);
        if with_mappings {
            self.drop_user(user.mapping());
        }
    }

    /// Takes all uses from `user`.
    fn drop_user(&mut self, user: User) {
        let used: Vec<_> = self.uses_of(user).collect();
        for (id, count) in used {
            self.take_uses(id, user, count);
        }
    }

    /// Takes all uses that end with a process, however it ended: its own, and those of the argument it did not take
    /// over. Its result goes on being under way until it lands or is dropped.
    pub(crate) fn process_ended(&mut self, process: ProcessId) {
        self.release_all(User::Process(process), true);
        self.land(process, Leg::Argument);
    }

    /// Gives the message of this leg a use of each resource in it; a resource that is in it twice counts twice.
    /// `inherits` tells what the sender uses without being in this table.
    ///
    /// # Errors
    ///
    /// `NoResource` for an id that does not exist, `NotAUser` for one that the sender does not use. Nothing has
    /// changed then.
    pub(crate) fn send(
        &mut self,
        sender: User,
        process: ProcessId,
        leg: Leg,
        ids: &[ResourceId],
        inherits: impl Fn(ResourceId) -> bool,
    ) -> Result<(), ResourceError> {
        for &id in ids {
            self.get(id, None)?;
            let is_user = |user| self.is_user(id, user);
            // What the master has mapped is mapped in its workers without a use of their own.
            let uses = [sender, sender.mapping(), User::Mapping(None)]
                .into_iter()
                .any(is_user);
            if !uses && !inherits(id) {
                return Err(ResourceError::NotAUser { id });
            }
        }
        for &id in ids {
            self.add_use(id, User::InFlight { process, leg });
        }
        Ok(())
    }

    /// Takes all uses from the message of this leg: its receiver has its own now, or will never come.
    pub(crate) fn land(&mut self, process: ProcessId, leg: Leg) {
        self.drop_user(User::InFlight { process, leg });
    }

    /// Removes one resource whoever uses it: how a fork or join point is released.
    pub(crate) fn remove(
        &mut self,
        id: ResourceId,
        expected: Option<ResourceType>,
    ) -> Result<ResourceRepr, ResourceError> {
        self.get(id, expected)?;
        self.uses.retain(|&(_, used), _| used != id);
        Ok(self.forget(id))
    }

    /// Removes a fork or join point, whoever uses it.
    pub(crate) fn remove_point(&mut self, id: ResourceId) -> Result<ResourceRepr, ResourceError> {
        match self.get(id, None)? {
            ResourceRepr::ForkPoint(_) | ResourceRepr::JoinPoint(_) => self.remove(id, None),
            other => Err(ResourceError::NoResource {
                id,
                expected: Some(ResourceType::ForkPoint),
                found: Some(other.ty()),
            }),
        }
    }

    /// Whether there is a region without a user here: then those that inherit are to be asked for.
    pub(crate) fn has_unused_regions(&self) -> bool {
        self.unused
            .iter()
            .any(|id| self.entries[id].repr.place().is_some())
    }

    /// Removes the resources that have no user here and are not `held` elsewhere, and hands them out for deletion,
    /// youngest first. Those that are held stay, and are asked about again next time.
    pub(crate) fn take_unused(
        &mut self,
        held: impl Fn(ResourceId, &ResourceRepr) -> bool,
    ) -> Vec<(ResourceId, ResourceRepr)> {
        let unused: Vec<_> = self.unused.iter().rev().copied().collect();
        unused
            .into_iter()
            .filter(|id| !held(*id, &self.entries[id].repr))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|id| (id, self.forget(id)))
            .collect()
    }

    /// Removes all resources whoever uses them, and hands them out for deletion, youngest first.
    pub(crate) fn destroy_all(&mut self) -> Vec<(ResourceId, ResourceRepr)> {
        self.by_object.clear();
        self.uses.clear();
        self.unused.clear();
        let entries = std::mem::take(&mut self.entries);
        entries
            .into_iter()
            .rev()
            .map(|(id, entry)| (id, entry.repr))
            .collect()
    }

    /// Removes all resources but fork and join points, whoever uses them, and hands them out for deletion, youngest first.
    pub(crate) fn destroy_objects(&mut self) -> Vec<(ResourceId, ResourceRepr)> {
        let objects: Vec<_> = self
            .entries
            .iter()
            .rev()
            .filter(|(_, entry)| !entry.repr.kernel_objects().is_empty())
            .map(|(&id, _)| id)
            .collect();
        let entries = &self.entries;
        self.uses
            .retain(|(_, used), _| entries[used].repr.kernel_objects().is_empty());
        objects
            .into_iter()
            .map(|id| (id, self.forget(id)))
            .collect()
    }

    /// Lists the resources behind `after` (or from the first) in the order of their ids, `line_count` at most, each with
    /// its users.
    pub(crate) fn list(&self, after: Option<ResourceId>, line_count: usize) -> Vec<ResourceLine> {
        let first = after.map_or(0, |id| id.get().saturating_add(1));
        let mut lines: BTreeMap<ResourceId, ResourceLine> = self
            .entries
            .range(ResourceId::from_raw(first)..)
            .take(line_count)
            .map(|(&id, entry)| {
                let repr = entry.repr.clone();
                let line = ResourceLine {
                    id,
                    repr,
                    user_count: 0,
                    users: Vec::new(),
                };
                (id, line)
            })
            .collect();
        for (&(user, id), &use_count) in &self.uses {
            if let Some(line) = lines.get_mut(&id) {
                line.user_count += 1;
                if line.users.len() < USERS_LISTED {
                    line.users.push((user, use_count));
                }
            }
        }
        lines.into_values().collect()
    }

    pub(crate) fn is_user(&self, id: ResourceId, user: User) -> bool {
        self.uses.contains_key(&(user, id))
    }

    fn uses_of(&self, user: User) -> impl Iterator<Item = (ResourceId, u64)> {
        let first = (user, ResourceId::from_raw(0));
        let last = (user, ResourceId::from_raw(u64::MAX));
        self.uses
            .range(first..=last)
            .map(|(&(_, id), &count)| (id, count))
    }

    fn add_use(&mut self, id: ResourceId, user: User) {
        let entry = self.entries.get_mut(&id).expect("the caller looked it up");
        entry.use_count += 1;
        *self.uses.entry((user, id)).or_insert(0) += 1;
        self.unused.remove(&id);
    }

    /// Says whether `user` had that many uses; takes none if not.
    fn take_uses(&mut self, id: ResourceId, user: User, count: u64) -> bool {
        let Some(uses) = self
            .uses
            .get_mut(&(user, id))
            .filter(|uses| **uses >= count)
        else {
            return false;
        };
        *uses -= count;
        if *uses == 0 {
            self.uses.remove(&(user, id));
        }
        let entry = self.entries.get_mut(&id).expect("what is used exists");
        entry.use_count -= count;
        if entry.use_count == 0 {
            self.unused.insert(id);
        }
        true
    }

    /// Removes an entry whose uses are gone.
    fn forget(&mut self, id: ResourceId) -> ResourceRepr {
        let entry = self.entries.remove(&id).expect("the caller looked it up");
        self.by_object.remove(&entry.repr.object());
        self.unused.remove(&id);
        entry.repr
    }
}

/// Paths travel as bytes (serde's own form refuses those that are not UTF-8), and are checked when they arrive: they name
/// things to delete.
mod path_bytes {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        from: D,
    ) -> Result<PathBuf, D::Error> {
        use serde::de::Error as _;
        let path = PathBuf::from(std::ffi::OsString::from_vec(Vec::deserialize(from)?));
        if !path.is_absolute() {
            return Err(D::Error::custom(format_args!(
                "the path {} of a temporary file is not absolute",
                path.display()
            )));
        }
        managed_path(&path, Path::new("/")).map_err(D::Error::custom)
    }
}

/// Object names travel as bytes, and are checked when they arrive: they name things to delete.
mod name_bytes {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(
        name: &ObjectName,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        name.as_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        from: D,
    ) -> Result<ObjectName, D::Error> {
        ObjectName::new(Vec::<u8>::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::Codec;
    use crate::codec::{decode, encode_to_vec};

    fn name(text: &str) -> ObjectName {
        ObjectName::new(text).unwrap()
    }

    fn shm(text: &str) -> ResourceRepr {
        ResourceRepr::PosixShm(name(text))
    }

    fn one_of_each() -> [ResourceRepr; 8] {
        let (at, len_bytes, max_len_bytes) = (0x1000_0000_0000, 65536, 1 << 30);
        [
            ResourceRepr::File("/tmp/a".into()),
            ResourceRepr::ForkPoint(3),
            ResourceRepr::JoinPoint(3),
            ResourceRepr::PosixSem(name("/sem")),
            shm("/shm"),
            ResourceRepr::PosixShmPreallocated {
                name: name("/pre"),
                at,
                len_bytes,
                max_len_bytes,
            },
            ResourceRepr::PosixShmPreallocatedSc {
                name: name("/presc"),
                at,
                len_bytes,
                max_len_bytes,
                prefix: name("/c"),
            },
            ResourceRepr::PosixShmSc {
                name: name("/sc"),
                prefix: name("/d"),
            },
        ]
    }

    fn process(number: u64) -> ProcessId {
        ProcessId::from_raw(number)
    }

    fn list(table: &ResourceTable) -> Vec<ResourceLine> {
        table.list(None, usize::MAX)
    }

    const NOBODY: fn(ResourceId) -> bool = |_| false;
    const UNHELD: fn(ResourceId, &ResourceRepr) -> bool = |_, _| false;

    #[test]
    fn reprs_are_shown_in_words() {
        let shown = one_of_each().map(|repr| repr.to_string());
        assert_eq!(
            shown,
            [
                "temporary file /tmp/a",
                "fork point of definition 3",
                "join point of definition 3",
                "named semaphore /sem",
                "shared memory object /shm",
                "preallocated shared memory object /pre",
                "preallocated shared memory object /presc with semaphore container /c",
                "shared memory object /sc with semaphore container /d",
            ]
        );
        for repr in one_of_each() {
            assert!(repr.to_string().starts_with(&*match repr.ty() {
                ResourceType::PosixShmPreallocatedSc => "preallocated shared".to_string(),
                ResourceType::PosixShmSc => "shared".to_string(),
                ty => ty.to_string(),
            }));
        }
    }

    #[test]
    fn reprs_survive_both_codecs() {
        let odd_path = PathBuf::from(std::ffi::OsString::from_vec(b"/tmp/\xff\n".to_vec()));
        let mut reprs = Vec::from(one_of_each());
        reprs.push(ResourceRepr::File(odd_path));
        reprs.push(ResourceRepr::PosixSem(
            ObjectName::new(b"/\xfe\x01").unwrap(),
        ));
        for codec in [Codec::Bincode, Codec::Json] {
            for repr in &reprs {
                let bytes = encode_to_vec(codec, repr).unwrap();
                assert_eq!(decode::<ResourceRepr>(codec, &bytes).as_ref(), Ok(repr));
            }
        }
    }

    #[test]
    fn names_from_others_are_checked_on_arrival() {
        let refused = |json: &str| {
            decode::<ResourceRepr>(Codec::Json, json.as_bytes())
                .unwrap_err()
                .reason
        };
        // The bytes of "a", "/a/../b", "/.." and "/a/".
        let reason = refused(r#"{"File":[97]}"#);
        assert!(
            reason.contains("the path a of a temporary file is not absolute"),
            "{reason}"
        );
        let reason = refused(r#"{"File":[47,97,47,46,46,47,98]}"#);
        assert!(
            reason.contains("cannot use the path /a/../b: it contains `..`"),
            "{reason}"
        );
        let reason = refused(r#"{"PosixShm":[47,46,46]}"#);
        assert!(reason.contains("is not the name of a file"), "{reason}");
        let reason = refused(r#"{"PosixSem":[47,97,47]}"#);
        assert!(reason.contains("has more than one slash"), "{reason}");
    }

    #[test]
    fn managed_path_has_one_spelling() {
        let managed = |path: &str| managed_path(Path::new(path), Path::new("/home/me"));
        assert_eq!(managed("part").unwrap(), Path::new("/home/me/part"));
        assert_eq!(managed("./part").unwrap(), Path::new("/home/me/part"));
        assert_eq!(managed("/tmp//./part").unwrap().as_os_str(), "/tmp/part");
        for (path, message) in [
            ("", "cannot use the path : it is empty"),
            (
                "a/../b",
                "cannot use the path a/../b: it contains `..`, whose meaning may have changed when the file is \
                 deleted; give the path without it",
            ),
            (
                "/tmp/",
                "cannot use the path /tmp/: it is the path of a directory, and only files are managed",
            ),
            (
                ".",
                "cannot use the path .: it is the path of a directory, and only files are managed",
            ),
        ] {
            assert_eq!(managed(path).unwrap_err().to_string(), message);
        }
        assert!(managed("a\0b").is_err());
        assert!(managed("..").is_err());
        assert!(managed("/").is_err());
    }

    #[test]
    fn object_managed_twice_keeps_its_id_and_counts_two_uses() {
        let mut table = ResourceTable::default();
        let first = table.insert(shm("/a"), User::Master).unwrap();
        let again = table.insert(shm("/a"), User::Master).unwrap();
        assert_eq!((first.id, first.is_new), (ResourceId::from_raw(1), true));
        assert_eq!((again.id, again.is_new), (first.id, false));
        table.release(first.id, User::Master).unwrap();
        assert_eq!(table.take_unused(UNHELD), []);
        table.release(first.id, User::Master).unwrap();
        assert_eq!(
            table.release(first.id, User::Master),
            Err(ResourceError::NotAUser { id: first.id })
        );
        assert_eq!(table.take_unused(UNHELD), [(first.id, shm("/a"))]);
        let later = table.insert(shm("/a"), User::Master).unwrap();
        assert_eq!((later.id, later.is_new), (ResourceId::from_raw(2), true));
    }

    #[test]
    fn object_managed_as_something_else_is_refused() {
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Master).unwrap().id;
        let other = ResourceRepr::PosixShmSc {
            name: name("/a"),
            prefix: name("/p"),
        };
        let error = table.insert(other, User::Master).unwrap_err();
        assert_eq!(
            Error::from(error).to_string(),
            "cannot manage a shared memory object /a with semaphore container /p: it is managed as a shared memory \
             object /a (Resource 1); use that, or release it first"
        );
        assert_eq!(list(&table)[0].users, [(User::Master, 1)]);
        // A semaphore may have the name of a shared memory object: they are different objects.
        let sem = ResourceRepr::PosixSem(name("/a"));
        assert_ne!(table.insert(sem, User::Master).unwrap().id, id);
    }

    #[test]
    fn resource_in_a_message_outlives_its_sender() {
        let (sender, receiver) = (process(1), process(2));
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Process(sender)).unwrap().id;
        table
            .send(
                User::Process(sender),
                receiver,
                Leg::Argument,
                &[id],
                NOBODY,
            )
            .unwrap();
        table.process_ended(sender);
        assert_eq!(table.take_unused(UNHELD), []);
        table.acquire(id, None, User::Process(receiver)).unwrap();
        table.land(receiver, Leg::Argument);
        assert_eq!(table.take_unused(UNHELD), []);
        table.process_ended(receiver);
        assert_eq!(table.take_unused(UNHELD), [(id, shm("/a"))]);
    }

    #[test]
    fn resource_in_an_argument_goes_with_the_process_that_never_took_it() {
        let (sender, receiver) = (process(1), process(2));
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Process(sender)).unwrap().id;
        table
            .send(
                User::Process(sender),
                receiver,
                Leg::Argument,
                &[id],
                NOBODY,
            )
            .unwrap();
        table.process_ended(sender);
        table.process_ended(receiver);
        assert_eq!(table.take_unused(UNHELD), [(id, shm("/a"))]);
    }

    #[test]
    fn resource_in_a_result_stays_until_joined() {
        let (worker, joiner) = (process(2), process(1));
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Process(worker)).unwrap().id;
        table
            .send(User::Process(worker), worker, Leg::Result, &[id], NOBODY)
            .unwrap();
        table.process_ended(worker);
        assert_eq!(table.take_unused(UNHELD), []);
        table.acquire(id, None, User::Process(joiner)).unwrap();
        table.land(worker, Leg::Result);
        assert_eq!(list(&table)[0].users, [(User::Process(joiner), 1)]);
    }

    #[test]
    fn mapping_outlasts_releases_and_ends_with_its_process() {
        let mut table = ResourceTable::default();
        let user = User::Process(process(1));
        let [.., region, _, _] = one_of_each();
        let id = table.insert(region.clone(), user).unwrap().id;
        for _ in 0..2 {
            assert_eq!(table.map(id, user), Ok(&region));
        }
        table.release(id, user).unwrap();
        assert_eq!(table.release(id, user), Err(ResourceError::NotAUser { id }));
        assert_eq!(table.mapped_by(user), BTreeSet::from([id]));
        assert_eq!(table.mapped_by(User::Master), BTreeSet::new());
        table.release_all(user, false);
        assert_eq!(table.take_unused(UNHELD), []);
        table.process_ended(process(1));
        assert!(table.has_unused_regions());
        assert_eq!(table.take_unused(UNHELD), [(id, region)]);

        let file = ResourceRepr::File("/tmp/a".into());
        let file = table.insert(file, user).unwrap().id;
        assert!(matches!(
            table.map(file, user),
            Err(ResourceError::NoResource {
                found: Some(ResourceType::File),
                ..
            })
        ));
    }

    #[test]
    fn unmapped_region_has_a_use_less() {
        let mut table = ResourceTable::default();
        let user = User::Process(process(1));
        let repr = one_of_each()
            .into_iter()
            .find(|repr| repr.place().is_some())
            .unwrap();
        let (at, max_len_bytes) = repr.place().unwrap();
        let id = table.insert(repr, user).unwrap().id;
        let end = at + max_len_bytes;
        assert_eq!(table.region_at(at - 1), None);
        assert_eq!(table.region_at(end - 1), Some((id, max_len_bytes - 1)));
        assert_eq!(table.region_at(end), None);

        assert_eq!(
            table.unmap(id, user),
            Err(ResourceError::NotAUser { id }),
            "it is not mapped"
        );
        table.map(id, user).unwrap();
        table.release(id, user).unwrap();
        assert!(!table.has_unused_regions());
        table.unmap(id, user).unwrap();
        assert!(table.has_unused_regions());
    }

    #[test]
    fn destroyed_objects_leave_the_points() {
        let mut table = ResourceTable::default();
        let point = table.insert(ResourceRepr::ForkPoint(0), User::Master);
        let point = point.unwrap().id;
        let used = table.insert(shm("/a"), User::Process(process(1)));
        let used = used.unwrap().id;
        let under_way = table.insert(shm("/b"), User::Master).unwrap().id;
        table
            .send(
                User::Master,
                process(1),
                Leg::Argument,
                &[under_way],
                NOBODY,
            )
            .unwrap();
        assert_eq!(
            table.destroy_objects(),
            [(under_way, shm("/b")), (used, shm("/a"))]
        );
        assert_eq!(table.list(None, 9).len(), 1);
        assert_eq!(table.get(point, None), Ok(&ResourceRepr::ForkPoint(0)));
        assert!(table.uses.keys().all(|(_, id)| *id == point));
        // The names are free again.
        assert!(table.insert(shm("/a"), User::Master).unwrap().is_new);
    }

    #[test]
    fn heir_may_send_what_it_inherits_and_others_may_not() {
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Master).unwrap().id;
        let heir = User::Process(process(1));
        assert_eq!(
            table.send(heir, process(2), Leg::Argument, &[id], NOBODY),
            Err(ResourceError::NotAUser { id })
        );
        table
            .send(heir, process(2), Leg::Argument, &[id], |_| true)
            .unwrap();
    }

    #[test]
    fn listing_goes_on_behind_a_line_and_names_a_bounded_number_of_users() {
        let mut table = ResourceTable::default();
        let user = |number| User::Process(process(number));
        let first = table.insert(shm("/a"), user(0)).unwrap().id;
        let second = table.insert(shm("/b"), user(0)).unwrap().id;
        for number in 1..300 {
            table.acquire(second, None, user(number)).unwrap();
        }
        let page = table.list(None, 1);
        assert_eq!((page.len(), page[0].id), (1, first));
        let page = table.list(Some(first), 64);
        assert_eq!((page.len(), page[0].id), (1, second));
        assert_eq!(page[0].user_count, 300);
        assert_eq!(page[0].users.len(), USERS_LISTED);
        assert_eq!(table.list(Some(second), 64), []);
        assert_eq!(table.list(Some(ResourceId::from_raw(u64::MAX)), 64), []);
    }

    #[test]
    fn refusals_name_the_types() {
        let mut table = ResourceTable::default();
        let id = table.insert(shm("/a"), User::Master).unwrap().id;
        let error = table
            .acquire(id, Some(ResourceType::File), User::Master)
            .unwrap_err();
        assert_eq!(
            Error::from(error).to_string(),
            "the call needs a temporary file, and Resource 1 is a shared memory object"
        );
        assert_eq!(list(&table)[0].users, [(User::Master, 1)]);
    }

    /// The oracle: a list of resources, and a list of uses with an element for each.
    #[derive(Default)]
    struct Naive {
        made: u64,
        resources: Vec<(ResourceId, ResourceRepr)>,
        uses: Vec<(User, ResourceId)>,
    }

    impl Naive {
        fn count(&self, user: User, id: ResourceId) -> u64 {
            self.uses.iter().filter(|use_| **use_ == (user, id)).count() as u64
        }

        fn exists(&self, id: ResourceId) -> bool {
            self.resources.iter().any(|(other, _)| *other == id)
        }

        fn is_used(&self, id: ResourceId) -> bool {
            self.uses.iter().any(|(_, used)| *used == id)
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Manage(ResourceRepr, User),
        Get(u64, Option<ResourceType>, User),
        Release(u64, User),
        ReleasePoint(u64),
        Send(User, u64, Leg, Vec<u64>),
        Land(u64, Leg),
        ProcessEnds(u64),
        Sweep(BTreeSet<u64>),
        DestroyAll,
    }

    fn user() -> impl Strategy<Value = User> {
        prop_oneof![
            1 => Just(User::Master),
            4 => (1..4_u64).prop_map(|number| User::Process(process(number))),
        ]
    }

    fn leg() -> impl Strategy<Value = Leg> {
        prop_oneof![Just(Leg::Argument), Just(Leg::Result)]
    }

    fn repr() -> impl Strategy<Value = ResourceRepr> {
        prop_oneof![
            4 => prop::sample::select(Vec::from(one_of_each())),
            // Conflicts with one of the above.
            1 => Just(shm("/sc")),
        ]
    }

    fn op() -> impl Strategy<Value = Op> {
        let id = 1..12_u64;
        prop_oneof![
            6 => (repr(), user()).prop_map(|(repr, user)| Op::Manage(repr, user)),
            4 => (id.clone(), prop::option::of(repr()), user())
                .prop_map(|(id, like, user)| Op::Get(id, like.map(|repr| repr.ty()), user)),
            6 => (id.clone(), user()).prop_map(|(id, user)| Op::Release(id, user)),
            1 => id.clone().prop_map(Op::ReleasePoint),
            4 => (user(), 1..4_u64, leg(), prop::collection::vec(id.clone(), 0..3))
                .prop_map(|(sender, process, leg, ids)| Op::Send(sender, process, leg, ids)),
            2 => (1..4_u64, leg()).prop_map(|(process, leg)| Op::Land(process, leg)),
            3 => (1..4_u64).prop_map(Op::ProcessEnds),
            3 => prop::collection::btree_set(id, 0..3).prop_map(Op::Sweep),
            1 => Just(Op::DestroyAll),
        ]
    }

    fn step(table: &mut ResourceTable, naive: &mut Naive, op: Op) {
        match op {
            Op::Manage(repr, user) => {
                let same = naive.resources.iter().find(|(_, r)| *r == repr).cloned();
                let conflict = naive.resources.iter().any(|(_, r)| {
                    *r != repr && r.shm_name().is_some() && r.shm_name() == repr.shm_name()
                });
                let answer = table.insert(repr.clone(), user);
                if conflict {
                    assert!(matches!(answer, Err(ResourceError::AlreadyManaged { .. })));
                } else if let Some((id, _)) = same {
                    assert_eq!(answer, Ok(Inserted { id, is_new: false }));
                    naive.uses.push((user, id));
                } else {
                    naive.made += 1;
                    let id = ResourceId::from_raw(naive.made);
                    assert_eq!(answer, Ok(Inserted { id, is_new: true }));
                    naive.resources.push((id, repr));
                    naive.uses.push((user, id));
                }
            }
            Op::Get(id, expected, user) => {
                let id = ResourceId::from_raw(id);
                let found = naive.resources.iter().find(|(other, _)| *other == id);
                let answer = table.acquire(id, expected, user);
                match found {
                    Some((_, repr)) if expected.is_none_or(|ty| ty == repr.ty()) => {
                        assert_eq!(answer, Ok(repr));
                        naive.uses.push((user, id));
                    }
                    _ => assert_eq!(
                        answer,
                        Err(ResourceError::NoResource {
                            id,
                            expected,
                            found: found.map(|(_, repr)| repr.ty())
                        })
                    ),
                }
            }
            Op::Release(id, user) => {
                let id = ResourceId::from_raw(id);
                let answer = table.release(id, user);
                match naive.uses.iter().position(|use_| *use_ == (user, id)) {
                    Some(at) => {
                        assert_eq!(answer, Ok(()));
                        naive.uses.remove(at);
                    }
                    None if naive.exists(id) => {
                        assert_eq!(answer, Err(ResourceError::NotAUser { id }));
                    }
                    None => assert!(matches!(answer, Err(ResourceError::NoResource { .. }))),
                }
            }
            Op::ReleasePoint(id) => {
                let id = ResourceId::from_raw(id);
                let answer = table.remove(id, Some(ResourceType::ForkPoint));
                let is_point = naive
                    .resources
                    .iter()
                    .any(|(other, repr)| *other == id && repr.ty() == ResourceType::ForkPoint);
                assert_eq!(answer.is_ok(), is_point);
                if is_point {
                    naive.resources.retain(|(other, _)| *other != id);
                    naive.uses.retain(|(_, used)| *used != id);
                }
            }
            Op::Send(sender, receiver, leg, ids) => {
                let ids: Vec<_> = ids.into_iter().map(ResourceId::from_raw).collect();
                let inherits = |id: ResourceId| id.get().is_multiple_of(5);
                let allowed = ids
                    .iter()
                    .all(|&id| naive.exists(id) && (naive.count(sender, id) > 0 || inherits(id)));
                let answer = table.send(sender, process(receiver), leg, &ids, inherits);
                assert_eq!(answer.is_ok(), allowed, "{answer:?}");
                if allowed {
                    let process = process(receiver);
                    let user = User::InFlight { process, leg };
                    naive.uses.extend(ids.into_iter().map(|id| (user, id)));
                }
            }
            Op::Land(receiver, leg) => {
                let process = process(receiver);
                table.land(process, leg);
                naive
                    .uses
                    .retain(|(user, _)| *user != User::InFlight { process, leg });
            }
            Op::ProcessEnds(number) => {
                let process = process(number);
                let leg = Leg::Argument;
                table.process_ended(process);
                naive.uses.retain(|(user, _)| {
                    *user != User::Process(process) && *user != User::InFlight { process, leg }
                });
            }
            Op::Sweep(held) => {
                let gone = |id: ResourceId| !naive.is_used(id) && !held.contains(&id.get());
                let mut expected: Vec<_> = naive.resources.clone();
                expected.retain(|(id, _)| gone(*id));
                expected.reverse();
                let kept = naive.resources.iter().filter(|(id, _)| !gone(*id));
                let kept: Vec<_> = kept.cloned().collect();
                assert_eq!(
                    table.take_unused(|id, _| held.contains(&id.get())),
                    expected
                );
                naive.resources = kept;
            }
            Op::DestroyAll => {
                let mut expected = std::mem::take(&mut naive.resources);
                expected.reverse();
                naive.uses.clear();
                assert_eq!(table.destroy_all(), expected);
            }
        }
    }

    /// The invariants of the module documentation, and equality with the oracle.
    fn verify(table: &ResourceTable, naive: &Naive) {
        assert_eq!(table.next_id().get(), naive.made + 1);
        let listed = list(table);
        let resources: Vec<_> = listed
            .iter()
            .map(|line| (line.id, line.repr.clone()))
            .collect();
        assert_eq!(resources, naive.resources);
        for line in &listed {
            let total: u64 = line.users.iter().map(|(_, count)| count).sum();
            assert_eq!(total, table.entries[&line.id].use_count);
            assert_eq!(line.user_count, line.users.len() as u64);
            assert_eq!(table.unused.contains(&line.id), total == 0);
            assert_eq!(table.by_object[&line.repr.object()], line.id);
            for &(user, count) in &line.users {
                assert!(count > 0);
                assert_eq!(count, naive.count(user, line.id));
            }
            let uses = naive
                .uses
                .iter()
                .filter(|(_, used)| *used == line.id)
                .count();
            assert_eq!(total, uses as u64);
        }
        assert_eq!(table.by_object.len(), listed.len());
        assert!(table.unused.iter().all(|id| table.entries.contains_key(id)));
        assert!(
            table
                .uses
                .keys()
                .all(|(_, id)| table.entries.contains_key(id))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn table_matches_naive(ops in prop::collection::vec(op(), 1..80)) {
            let mut table = ResourceTable::default();
            let mut naive = Naive::default();
            for op in ops {
                step(&mut table, &mut naive, op);
                verify(&table, &naive);
            }
        }
    }
}

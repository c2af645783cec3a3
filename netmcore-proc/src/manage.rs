//! Resources: objects that the kernel keeps, handed to the master so that they are deleted when their
//! last user is gone.
//!
//! **Protocol.** A worker asks the master over a socket that it connects on first use; the master asks
//! itself. Each `create_*`, `manage_*` and `get_*` adds one use for the calling process; releasing the
//! guard takes one; the end of the process takes all. The object is recorded by the master before the
//! asker creates it, and unlinked before the record is dropped, both by the master.
//!
//! **A resource in a message** is registered with the master while the message is encoded, so that the
//! object lives until the receiver holds it, whatever becomes of the sender.
//!
//! **If a process dies here** the master reads the end of its connection, and takes its uses when it
//! has been reaped.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError, RwLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use netmcore_sem::{NamedSemaphore, SemContainer};
use netmcore_shm::{Region, SentHandle, ShmObject};
use netmcore_sys::crash_point;
use netmcore_sys::process::{self, Limit, Pid};
use netmcore_sys::socket;
use netmcore_sys::{NoRecord, ObjectName};

use crate::context::{self, Role, Runtime};
use crate::control::WaitsFor;
use crate::error::{Error, Result};
use crate::id::{ProcessId, ResourceId};
use crate::master;
use crate::own_fd::OwnFd;
use crate::region;
use crate::resource::{Leg, ResourceRepr, ResourceType, managed_path};
use crate::wire::{FrameReader, RefusedReason, Reply, Request, WireError, frame};

/// One use of a resource by this process. Dropping it gives the use up.
///
/// As part of an argument or a result it keeps its object alive until the receiver holds its own.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Error, Master, Resource, create_sem, get_sem, release, spawn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let permits = create_sem("/example-", 3).unwrap();
///
///     // By its id any process can become a user, while there is one.
///     let id = permits.id();
///     let other = spawn(|id| get_sem(id).unwrap().keep(), &id).unwrap(); // used until it ends
///     other.join().unwrap();
///
///     // In a message it lives until the receiver holds it.
///     let echo = spawn(|permits: Resource| permits, &permits).unwrap();
///     drop(permits);
///     let permits = echo.join().unwrap();
///
///     permits.release().unwrap(); // the last use: it is gone
///     assert!(matches!(get_sem(id), Err(Error::NoResource { .. })));
///     assert!(matches!(release(id), Err(Error::NoResource { .. })));
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it gives up the use; `keep` keeps it until the process ends"]
#[derive(Debug)]
pub struct Resource {
    id: ResourceId,
    repr: ResourceRepr,
    is_released: bool,
}

impl Resource {
    fn new(id: ResourceId, repr: ResourceRepr) -> Self {
        Resource {
            id,
            repr,
            is_released: false,
        }
    }

    /// Returns its id, by which any process of the run can get it.
    pub fn id(&self) -> ResourceId {
        self.id
    }

    /// Returns its type.
    pub fn ty(&self) -> ResourceType {
        self.repr.ty()
    }

    /// Returns its type with its data.
    pub fn repr(&self) -> &ResourceRepr {
        &self.repr
    }

    /// Returns the absolute path, if it is a file.
    pub fn path(&self) -> Option<&Path> {
        match &self.repr {
            ResourceRepr::File(path) => Some(path),
            _ => None,
        }
    }

    /// Returns the name, if it is a shared memory object or a semaphore.
    pub fn name(&self) -> Option<&ObjectName> {
        match &self.repr {
            ResourceRepr::PosixSem(name) => Some(name),
            repr => repr.shm_name(),
        }
    }

    /// Returns the region, mapped here; see [`get_region`](crate::get_region).
    ///
    /// # Errors
    /// As there.
    pub fn region(&self) -> Result<Region> {
        region::get_region(self.id)
    }

    /// Returns the semaphore container, if it has one. To create semaphores in it that are recorded
    /// first, give [`record`](crate::record) as the recorder.
    pub fn container(&self) -> Option<SemContainer> {
        SemContainer::open(self.repr.container_prefix()?).ok()
    }

    /// Gives up the use, and says what went wrong with it.
    ///
    /// # Errors
    /// Fails if the master cannot be reached; the use then ends with the process.
    pub fn release(mut self) -> Result<()> {
        self.is_released = true;
        release(self.id)
    }

    /// Gives up the guard, not the use: it lasts until the process ends or calls [`release`].
    pub fn keep(mut self) -> ResourceId {
        self.is_released = true;
        self.id
    }
}

impl Drop for Resource {
    fn drop(&mut self) {
        if !self.is_released
            && let Err(error) = release(self.id)
            && !matches!(error, Error::NotRunning { .. })
        {
            tracing::warn!(target: "netmcore", id = %self.id, %error, "a use was not given up; it ends with the process");
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id, self.repr)
    }
}

impl Serialize for Resource {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let is_sending = SENDING.with_borrow_mut(|sending| match sending {
            Some(sent) => {
                sent.resources.push(self.id);
                true
            }
            None => false,
        });
        if !is_sending {
            return Err(serde::ser::Error::custom(
                "a Resource can only be sent in an argument or a result; elsewhere send its id",
            ));
        }
        self.id.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Resource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let id = ResourceId::deserialize(deserializer)?;
        if !IS_RECEIVING.get() {
            return Err(serde::de::Error::custom(
                "a Resource can only come in an argument or a result; elsewhere send its id",
            ));
        }
        let resource = get_resource(id).map_err(serde::de::Error::custom)?;
        HAS_RECEIVED.set(true);
        Ok(resource)
    }
}

/// What a message that is being encoded holds.
#[derive(Default)]
pub(crate) struct Sent {
    pub(crate) resources: Vec<ResourceId>,
    /// Regions of which there are handles in it.
    pub(crate) regions: Vec<ResourceId>,
    /// Handles of shared values that belong to the message.
    pub(crate) handles: Vec<SentHandle>,
    /// The encoder only measures: it will pass over the value once more.
    is_measuring: bool,
}

thread_local! {
    /// What is in the message that this thread encodes.
    static SENDING: RefCell<Option<Sent>> = const { RefCell::new(None) };
    static IS_RECEIVING: Cell<bool> = const { Cell::new(false) };
    /// The message that this thread has decoded held a resource.
    static HAS_RECEIVED: Cell<bool> = const { Cell::new(false) };
}

/// Runs an encoder, and returns the resources that it met.
pub(crate) fn sending<T>(encode: impl FnOnce() -> T) -> (T, Sent) {
    /// Puts back what an outer encoder had, also when this one panics.
    struct Outer(Option<Sent>);
    impl Drop for Outer {
        fn drop(&mut self) {
            SENDING.set(self.0.take());
        }
    }
    let _outer = Outer(SENDING.replace(Some(Sent::default())));
    let result = encode();
    let mut sent = SENDING.take().unwrap_or_default();
    // An encoder passes over the value twice: once for the size.
    for ids in [&mut sent.resources, &mut sent.regions] {
        ids.sort_unstable();
        ids.dedup();
    }
    (result, sent)
}

/// A handle of a value in the region is in the message that this thread encodes, if it encodes one.
pub(crate) fn note_handle_sent(id: Option<ResourceId>, handle: &dyn Fn() -> SentHandle) {
    SENDING.with_borrow_mut(|sending| {
        if let Some(sent) = sending {
            sent.regions.extend(id);
            if !sent.is_measuring {
                sent.handles.push(handle());
            }
        }
    });
}

/// Runs the pass of an encoder that only measures.
pub(crate) fn measuring<T>(measure: impl FnOnce() -> T) -> T {
    let set = |is_measuring| {
        SENDING.with_borrow_mut(|sending| match sending {
            Some(sent) => std::mem::replace(&mut sent.is_measuring, is_measuring),
            None => false,
        })
    };
    // A value that is measured may talk to the master, and so encode a request.
    let before = set(true);
    let result = measure();
    set(before);
    result
}

/// Whether this thread decodes a message that was [sent](sending) by a process.
pub(crate) fn is_receiving() -> bool {
    IS_RECEIVING.get()
}

/// Runs a decoder in which resources may come.
pub(crate) fn receiving<T>(decode: impl FnOnce() -> T) -> T {
    /// A value may join a process while it is decoded, and may panic.
    struct Outer(bool);
    impl Drop for Outer {
        fn drop(&mut self) {
            IS_RECEIVING.set(self.0);
        }
    }
    let _outer = Outer(IS_RECEIVING.replace(true));
    decode()
}

/// Tells the master that a message about to be published holds these resources.
pub(crate) fn send(process: ProcessId, leg: Leg, ids: Vec<ResourceId>) -> Result<()> {
    expect_done("sending resources", Request::Send { process, leg, ids })
}

/// Tells the master that this process holds what its argument held.
pub(crate) fn landed_argument(process: ProcessId) {
    if HAS_RECEIVED.replace(false) {
        let landed = Request::Landed {
            process,
            leg: Leg::Argument,
        };
        // Without the master the process is about to be killed.
        let _ = expect_done("receiving resources", landed);
    }
}

/// The same for a result that has been joined or dropped: the master sees by the slot that it is gone,
/// and is only told to look.
pub(crate) fn result_gone(runtime: &Runtime) {
    // A doorbell that cannot be rung means that the master is gone.
    let _ = runtime.ring();
}

/// A blocking connection to the master.
struct Client {
    socket: OwnFd<OwnedFd>,
    reader: FrameReader,
}

static CLIENT: Mutex<Option<Client>> = Mutex::new(None);
/// Read while an object is recorded and created.
static CREATING: RwLock<()> = RwLock::new(());
/// This worker may have uses that must be given up before its result can be seen.
static HAS_USES: AtomicBool = AtomicBool::new(false);

impl Client {
    fn connect(runtime: &Runtime) -> Result<Client> {
        let socket = socket::connect(&runtime.admin_socket).map_err(|_| gone(runtime))?;
        Ok(Client {
            socket: OwnFd::new(socket),
            reader: FrameReader::default(),
        })
    }

    fn ask(&mut self, runtime: &Runtime, request: &Request) -> Result<Reply> {
        let bytes = frame(request).map_err(wire_error)?;
        if !socket::send_all(&*self.socket, &bytes).unwrap_or(false) {
            return Err(gone(runtime));
        }
        crash_point!("proc.manage.asked");
        let mut buffer = [0; 4096];
        loop {
            let count = match socket::receive(&*self.socket, &mut buffer) {
                Ok(count) if count > 0 => count,
                _ => return Err(gone(runtime)),
            };
            if let Some(frame) = self.reader.push(&buffer[..count]).map_err(wire_error)? {
                crash_point!("proc.manage.answered");
                return frame.message::<Reply>().map_err(wire_error);
            }
        }
    }
}

fn wire_error(source: WireError) -> Error {
    Error::Wire {
        doing: "talking to the master".to_owned(),
        source,
    }
}

/// Why the master does not answer.
fn gone(runtime: &Runtime) -> Error {
    if runtime.control.phase() == crate::control::Phase::Over {
        return Error::NotRunning {
            call: "a request to the master",
        };
    }
    // A master that is killed closes its sockets before its children are told.
    let is_parent = Pid::parent() == Some(runtime.master);
    if !is_parent || process::is_dying(runtime.master).unwrap_or(true) {
        return Error::MasterGone;
    }
    Error::Refused {
        doing: "talking to the master".to_owned(),
        reason: "it closed the connection; it may have no descriptor left (`ulimit -n`), or its socket directory is gone".to_owned(),
    }
}

/// Asks the master, wherever it is.
fn ask(doing: &str, request: Request) -> Result<Reply> {
    let reply = match context::role() {
        Role::Worker => {
            let runtime = context::running("a request to the master")?;
            let mut client = CLIENT.lock().unwrap_or_else(PoisonError::into_inner);
            let connected = match client.take() {
                Some(connected) => connected,
                None => Client::connect(runtime)?,
            };
            // Kept only after an answer: a connection in the middle of one is of no use.
            let connected = client.insert(connected);
            match connected.ask(runtime, &request) {
                Ok(reply) => reply,
                Err(error) => {
                    *client = None;
                    return Err(error);
                }
            }
        }
        Role::Master | Role::None | Role::Foreign => master::answer_here(request)?,
    };
    match reply {
        Reply::Refused(reason) => Err(refusal(reason, doing)),
        reply => Ok(reply),
    }
}

fn refusal(reason: RefusedReason, doing: &str) -> Error {
    reason.into_error(doing)
}

fn expect_done(doing: &str, request: Request) -> Result<()> {
    match ask(doing, request)? {
        Reply::Done => Ok(()),
        _ => Err(unexpected(doing)),
    }
}

fn unexpected(doing: &str) -> Error {
    Error::Refused {
        doing: doing.to_owned(),
        reason: "the master gave an answer to another question".to_owned(),
    }
}

fn manage(doing: &str, repr: ResourceRepr) -> Result<Resource> {
    HAS_USES.store(true, Relaxed);
    match ask(doing, Request::Manage(repr.clone()))? {
        Reply::Id(id) => Ok(Resource::new(id, repr)),
        _ => Err(unexpected(doing)),
    }
}

/// Permission bits of what is created.
const MODE: u32 = 0o600;

/// Has a new name recorded, then creates the object here: the master serves others while the kernel
/// clears the memory. After an error the guard gives both up.
pub(crate) fn create(
    doing: &str,
    repr: ResourceRepr,
    make: impl FnOnce() -> Result<()>,
) -> Result<Resource> {
    let _creating = CREATING.read().unwrap_or_else(PoisonError::into_inner);
    let resource = manage(doing, repr)?;
    crash_point!("proc.manage.recorded");
    make()?;
    crash_point!("proc.manage.created");
    Ok(resource)
}

/// The object is in the record already.
pub(crate) fn make_shm(name: &ObjectName, len_bytes: u64) -> Result<()> {
    let doing = || format!("creating the shared memory object {name}");
    ShmObject::create(name, len_bytes, MODE, &NoRecord)
        .map(drop)
        .map_err(Error::memory(doing()))
}

fn get(doing: &str, id: ResourceId, expected: Option<ResourceType>) -> Result<Resource> {
    HAS_USES.store(true, Relaxed);
    let resource = match ask(doing, Request::Get { id, expected })? {
        Reply::Repr(repr) => Resource::new(id, repr),
        _ => return Err(unexpected(doing)),
    };
    if resource.repr.place().is_some() {
        region::check_inherited(id)?;
    }
    Ok(resource)
}

/// Becomes a user of a region until this process ends; returns where it lies.
pub(crate) fn map(id: ResourceId) -> Result<ResourceRepr> {
    HAS_USES.store(true, Relaxed);
    let doing = "mapping a region";
    match ask(doing, Request::Map { id })? {
        Reply::Repr(repr) => Ok(repr),
        _ => Err(unexpected(doing)),
    }
}

/// Says that a region that this process had mapped is not mapped here any more, and nothing refers to it.
pub(crate) fn unmap(id: ResourceId) -> Result<()> {
    expect_done("unmapping a region", Request::Unmap { id })
}

/// Offers a heap as the one of named objects; returns the region of the one that it is.
pub(crate) fn offer_heap(id: ResourceId) -> Result<ResourceId> {
    let doing = "making the heap of named objects";
    match ask(doing, Request::OfferHeap { id })? {
        Reply::Id(id) => Ok(id),
        _ => Err(unexpected(doing)),
    }
}

fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    let current_dir = std::env::current_dir().map_err(|error| Error::InvalidPath {
        path: path.to_path_buf(),
        why: format!("the current directory cannot be found: {error}"),
    })?;
    managed_path(path, &current_dir)
}

/// Hands a temporary file to the manager: it is deleted when its last user is gone, at the latest by
/// the next start on the same directory. The file need not exist yet, which is the leak-free order.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Error, Master, manage_file};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path().to_path_buf();
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(move |()| {
///     let path = directory.join("scratch");
///     manage_file(&path).unwrap().keep(); // this process is a user until it ends
///     std::fs::write(&path, "work in progress").unwrap();
///     // The same file again is the same resource, with one more use.
///     drop(manage_file(&path).unwrap());
///     assert!(path.exists());
///     assert!(matches!(manage_file("../scratch"), Err(Error::InvalidPath { .. })));
///     path
/// });
/// assert!(!master.run(&first, &())?.exists());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::InvalidPath`] for a path with `..` or of a directory; else as the master's record.
#[doc(alias = "Netmcore.manage_file")]
pub fn manage_file(path: impl AsRef<Path>) -> Result<Resource> {
    let path = absolute(path.as_ref())?;
    manage("managing a temporary file", ResourceRepr::File(path))
}

/// Becomes a user of a managed file; its path is [`Resource::path`].
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource, or it is not a file.
pub fn get_file(id: ResourceId) -> Result<Resource> {
    get("getting a temporary file", id, Some(ResourceType::File))
}

/// Creates an empty file (mode 0600) whose name begins with `prefix` and is not in use, recorded first.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, create_file};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path().to_path_buf();
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(move |()| {
///     let scratch = create_file(directory.join("scratch-")).unwrap();
///     let path = scratch.path().unwrap().to_path_buf();
///     std::fs::write(&path, "work in progress").unwrap();
///     path // the guard is dropped: its last user is gone
/// });
/// assert!(!master.run(&first, &())?.exists());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::InvalidPath`] if the file cannot be created; nothing is left then.
pub fn create_file(prefix: impl AsRef<Path>) -> Result<Resource> {
    let mut path = absolute(prefix.as_ref())?.into_os_string();
    path.push(format!("{:016x}", process::random_u64()));
    let path = PathBuf::from(path);
    let repr = ResourceRepr::File(path.clone());
    create("creating a temporary file", repr, || {
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&path);
        created.map(drop).map_err(|error| Error::InvalidPath {
            path: path.clone(),
            why: error.to_string(),
        })
    })
}

/// Hands a shared memory object to the manager; see [`manage_file`].
///
/// # Errors
/// Fails if the object is managed already as something else, or cannot be recorded.
#[doc(alias = "Netmcore.manage_shm")]
pub fn manage_shm(name: &ObjectName) -> Result<Resource> {
    manage(
        "managing a shared memory object",
        ResourceRepr::PosixShm(name.clone()),
    )
}

/// Becomes a user of a managed shared memory object; its name is [`Resource::name`].
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource, or it is not a shared memory object.
pub fn get_shm(id: ResourceId) -> Result<Resource> {
    get(
        "getting a shared memory object",
        id,
        Some(ResourceType::PosixShm),
    )
}

/// Creates a shared memory object of `len_bytes` (mode 0600), recorded first. `prefix` begins with `/`.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Access, Master, ResourceId, ShmObject, create_shm, get_shm, spawn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let memory = create_shm("/example-", 8192).unwrap();
///     let length = |id: ResourceId| {
///         let memory = get_shm(id).unwrap();
///         let object = ShmObject::open(memory.name().unwrap(), Access::ReadWrite).unwrap();
///         object.len_bytes().unwrap()
///     };
///     assert_eq!(spawn(length, &memory.id()).unwrap().join().unwrap(), 8192);
///
///     // More than there is room for is an error, and leaves nothing.
///     assert!(create_shm("/example-", 1 << 60).is_err());
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Memory`] with `NoSpace` if there is not so much memory, or the process may not write so large a file;
/// the error of a bad prefix. Nothing is left after an error.
///
/// # Blocking
/// While the kernel clears the memory: about 60 ms for 256 MiB. The master serves others meanwhile.
pub fn create_shm(prefix: impl AsRef<[u8]>, len_bytes: u64) -> Result<Resource> {
    let name = ObjectName::unique(prefix.as_ref())?;
    let repr = ResourceRepr::PosixShm(name.clone());
    create("creating a shared memory object", repr, || {
        make_shm(&name, len_bytes)
    })
}

/// Hands a shared memory object together with its semaphore container to the manager.
///
/// # Errors
/// As for [`manage_shm`].
#[doc(alias = "Netmcore.manage_shm_sc")]
pub fn manage_shm_sc(name: &ObjectName, container_prefix: &ObjectName) -> Result<Resource> {
    let repr = ResourceRepr::PosixShmSc {
        name: name.clone(),
        prefix: container_prefix.clone(),
    };
    manage(
        "managing a shared memory object with its semaphore container",
        repr,
    )
}

/// Becomes a user of a managed shared memory object with semaphore container, preallocated or not.
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource, or it has no container; [`Error::NotInherited`].
pub fn get_sem_container(id: ResourceId) -> Result<Resource> {
    let resource = get("getting a semaphore container", id, None).map_err(|error| match error {
        Error::NoResource { id, found, .. } => Error::NoResource {
            id,
            expected: Some(ResourceType::PosixShmSc),
            found,
        },
        error => error,
    })?;
    match resource.repr.container_prefix() {
        Some(_) => Ok(resource),
        None => Err(Error::NoResource {
            id,
            expected: Some(ResourceType::PosixShmSc),
            found: Some(resource.ty()),
        }),
    }
}

/// Creates a shared memory object with its semaphore container, recorded first.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, create_shm_sc, record};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let memory = create_shm_sc("/example-", 4096).unwrap();
///     let container = memory.container().unwrap();
///     let third = container.create_semaphore(3, 1, 0o600, &record().unwrap()).unwrap();
///     assert!(container.open_semaphore(3).unwrap().try_wait().unwrap());
///     assert_eq!(third.value(), 0);
/// }); // the object goes with its last user, and its semaphores with it
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`create_shm`].
pub fn create_shm_sc(prefix: impl AsRef<[u8]>, len_bytes: u64) -> Result<Resource> {
    let name = ObjectName::unique(prefix.as_ref())?;
    // A container is its prefix: it exists as soon as it is recorded. This checks it.
    SemContainer::open(&name)?;
    let repr = ResourceRepr::PosixShmSc {
        name: name.clone(),
        prefix: name.clone(),
    };
    create(
        "creating a shared memory object with its semaphore container",
        repr,
        || make_shm(&name, len_bytes),
    )
}

/// Hands a named semaphore to the manager; see [`manage_file`].
///
/// # Errors
/// As for [`manage_shm`].
#[doc(alias = "Netmcore.manage_sem")]
pub fn manage_sem(name: &ObjectName) -> Result<Resource> {
    name.for_semaphore()?;
    manage(
        "managing a named semaphore",
        ResourceRepr::PosixSem(name.clone()),
    )
}

/// Becomes a user of a managed named semaphore; its name is [`Resource::name`].
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource, or it is not a semaphore.
pub fn get_sem(id: ResourceId) -> Result<Resource> {
    get(
        "getting a named semaphore",
        id,
        Some(ResourceType::PosixSem),
    )
}

/// Creates a named semaphore (mode 0600) with this value, recorded first. `prefix` begins with `/`.
///
/// # Errors
/// [`Error::Semaphore`] if the system refuses it, or `initial` is above 2³¹ − 1; the error of a bad prefix. Nothing
/// is left after an error.
pub fn create_sem(prefix: impl AsRef<[u8]>, initial: u32) -> Result<Resource> {
    let name = ObjectName::unique(prefix.as_ref())?;
    name.for_semaphore()?;
    let repr = ResourceRepr::PosixSem(name.clone());
    create("creating a named semaphore", repr, || {
        NamedSemaphore::create(&name, initial, MODE, &NoRecord)?;
        Ok(())
    })
}

/// Becomes a user of a resource of any type.
///
/// # Errors
/// [`Error::NoResource`] if there is no such resource.
#[doc(alias = "Netmcore.get_resource")]
pub fn get_resource(id: ResourceId) -> Result<Resource> {
    get("getting a resource", id, None)
}

/// Takes one use of a resource from this process; the last one deletes the object.
///
/// # Errors
/// [`Error::NoResource`], [`Error::NotAUser`].
#[doc(alias = "Netmcore.release")]
pub fn release(id: ResourceId) -> Result<()> {
    expect_done("releasing a resource", Request::Release { id })
}

/// Deletes all resources that are left, whoever uses them, but for fork and join points. Master only.
///
/// # Errors
/// [`Error::NotInWorker`]; else names every object that could not be deleted.
#[doc(alias = "Netmcore.destroy_resources")]
pub fn destroy_resources() -> Result<()> {
    if context::role() == Role::Worker {
        return Err(Error::NotInWorker {
            call: "destroy_resources",
        });
    }
    expect_done("destroying all resources", Request::DestroyResources)
}

/// Releases a fork or join point for everybody.
pub(crate) fn release_point(id: ResourceId, ty: ResourceType) -> Result<()> {
    expect_done(&format!("releasing a {ty}"), Request::ReleasePoint { id })
}

pub(crate) fn kill(process: ProcessId) -> Result<()> {
    const SIGKILL: i32 = 9;
    expect_done(
        &format!("killing {process}"),
        Request::Kill {
            process,
            signal: SIGKILL,
        },
    )
}

/// A newborn worker has no uses, whatever its master has.
pub(crate) fn forget_uses() {
    HAS_USES.store(false, Relaxed);
    region::forget_own();
}

/// Before a worker's result can be seen, it is a user of nothing.
pub(crate) fn release_all_uses() {
    if HAS_USES.swap(false, Relaxed) {
        // Another thread that is between record and object would create it after the record is dropped:
        // it is waited for, and nobody begins after it until the process has ended.
        std::mem::forget(CREATING.write().unwrap_or_else(PoisonError::into_inner));
        // A thread that goes on may look at a region until the process has ended.
        let with_mappings = process::thread_count().is_ok_and(|count| count == 1);
        let release = Request::ReleaseAll { with_mappings };
        // Without the master the process is about to be killed, and the uses end with it.
        let _ = expect_done("releasing all resources", release);
    }
}

/// Marks the beginning or the end (`None`) of a wait without deadline; the last worker that begins to wait
/// tells the master to look for a deadlock.
pub(crate) fn note_wait(runtime: &Runtime, on: Option<WaitsFor>) {
    match on {
        Some(on) if runtime.control.note_wait(context::me(), on) => drop(runtime.ring()),
        Some(_) => {}
        None => runtime.control.note_wait_over(context::me()),
    }
}

/// Why the kernel refused to fork, in words.
pub(crate) fn fork_refusal(errno: i32) -> String {
    let shown = |limit: process::Resource| match process::get_limit(limit) {
        Ok(Limit {
            soft: Some(limit), ..
        }) => format!("{limit}"),
        _ => "unlimited".to_owned(),
    };
    let errno = netmcore_sys::Errno::from_raw(errno);
    if errno == netmcore_sys::Errno::EAGAIN {
        let limit = shown(process::Resource::ProcessCount);
        return format!(
            "the limit of processes is reached (`ulimit -u` is {limit}; a control group may allow fewer)"
        );
    }
    if errno == netmcore_sys::Errno::EMFILE || errno == netmcore_sys::Errno::ENFILE {
        let limit = shown(process::Resource::DescriptorCount);
        return format!(
            "the master has no descriptor left to watch it by (`ulimit -n` is {limit} here; one is needed for each live process)"
        );
    }
    format!("the kernel refused: {errno}")
}

//! The master: it forks and watches all workers, manages resources, and never computes.
//!
//! **Protocol.** A program's run, in order:
//!
//! 1. `Master::builder(dir)`, definitions: nothing is touched yet.
//! 2. Open (at `run`, or at the first resource call before it): the directory is made or checked, the
//!    liveness lock taken, what the last run left is deleted.
//! 3. The arena is reserved, the control block made, the admin socket bound; the init hook runs.
//! 4. The first process is started, ready workers are forked, the loop runs until the end.
//! 5. Shutdown: all waits end, a grace period, SIGKILL; results can be looked at; resources are deleted;
//!    socket and pidfile are removed, the record is emptied, signals and limits are as before.
//!
//! **If the master dies here** its workers are killed by the kernel (parent-death signal); what is
//! recorded is deleted by the next start.
//!
//! **Not here:** decisions (`state`), their execution (`run`), the fork itself (`birth`).

pub(crate) mod birth;
pub(crate) mod run;
pub(crate) mod state;

use std::any::type_name;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use netmcore_pmanage::{ControllerSocket, Liveness, Log};
use netmcore_sem::current;
use netmcore_shm::Arena;
use netmcore_sys::crash_point;
use netmcore_sys::poll::EventFd;
use netmcore_sys::process::Pid;
use netmcore_sys::{map, process, signal};

pub(crate) use birth::Inheritance;

use crate::codec::Codec;
use crate::context::{self, BodyCell, Definition, Role, Runtime};
use crate::control::{Control, Heirs, POINT_LIMIT, READY_LIMIT, Seen};
use crate::error::{Error, JoinError, Result};
use crate::id::{ProcessId, ResourceId};
use crate::own_fd::OwnFd;
use crate::owners;
use crate::point::{PointKey, Process, Running};
use crate::region;
use crate::resource::{ResourceRepr, ResourceTable, User};
use crate::wire::{Reply, Request};
use crate::worker;
use run::{Lookers, Objects, Run};
use state::{EndReason, State};

/// Address space for arguments and results; memory is taken only as they need it.
const CONTROL_LEN_BYTES: usize = 64 << 30;
/// The arena that regions get their places in.
const ARENA_LEN_BYTES: usize = 16 << 40;
/// Time that workers have to end by themselves at shutdown.
const GRACE: Duration = Duration::from_secs(1);
/// Processes that are neither joined nor detached, at once.
const PROCESS_LIMIT: usize = 4096;

/// Process ids go on from run to run: they are unique for the life of the program.
static NEXT_PROCESS: AtomicU64 = AtomicU64::new(1);
/// Resource ids likewise.
static NEXT_RESOURCE: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The master that free functions of this process talk to: the one built last.
    static CURRENT: RefCell<Option<Rc<RefCell<Core>>>> = const { RefCell::new(None) };
}

type InitHook = Box<dyn FnOnce(&mut Controller) -> Result<()>>;

struct Config {
    dir: PathBuf,
    pidfile: Option<PathBuf>,
    grace: Duration,
    disable_pmanage: bool,
    no_unlink: bool,
    ready_workers: usize,
    process_limit: usize,
    control_len_bytes: Option<usize>,
    shared_heap_max_bytes: Option<u64>,
}

/// The master of this process, before, in and after its run.
struct Core {
    config: Config,
    definitions: Vec<Arc<Definition>>,
    keys: Vec<PointKey>,
    state: State,
    opened: Option<Opened>,
    /// Where regions that are made before the run get their places.
    arena: Option<Arena>,
    run: Option<Run>,
    /// The pidfile that has been written, by a path that holds wherever the program goes.
    written_pidfile: Option<PathBuf>,
    /// The run is over, or was given up: nothing is opened again.
    is_over: bool,
}

/// The directory is ours.
struct Opened {
    objects: Objects,
    liveness: Liveness,
    dir: PathBuf,
    /// The process that holds the lock. Forks that are not ours have a copy of this, but not of the lock.
    pid: Pid,
}

impl Core {
    /// Step 2 of the module docs; once.
    fn open(&mut self) -> Result<()> {
        match &self.opened {
            Some(opened) if opened.pid == Pid::this() => return Ok(()),
            Some(_) => {
                return Err(Error::NotRunning {
                    call: "a request to the master",
                });
            }
            None => {}
        }
        if self.is_over {
            return Err(Error::NotRunning {
                call: "a request to the master",
            });
        }
        let dir = std::path::absolute(&self.config.dir).map_err(|error| Error::InvalidPath {
            path: self.config.dir.clone(),
            why: error.to_string(),
        })?;
        check_socket_path(&dir)?;
        netmcore_pmanage::prepare_directory(&dir)?;
        let liveness = Liveness::acquire(&dir)?;
        let log = match self.config.disable_pmanage {
            true => None,
            false => {
                if !self.config.no_unlink {
                    clean(&dir, &liveness)?;
                }
                Some(Log::open(&dir)?)
            }
        };
        self.opened = Some(Opened {
            objects: Objects { log },
            liveness,
            dir,
            pid: Pid::this(),
        });
        Ok(())
    }

    /// The arena of the run that is under way, or will be.
    fn arena(&mut self) -> Result<Arena> {
        if let Some(run) = &self.run {
            let memory = run.runtime.memory.lock().expect("one thread");
            if let Some((_, arena)) = &*memory {
                return Ok(arena.clone());
            }
        }
        self.open()?;
        reserve(&mut self.arena)
    }

    fn define(&mut self, name: &'static str, codec: Codec) -> PointKey {
        let index = self.definitions.len();
        assert!(
            index < POINT_LIMIT,
            "more than {POINT_LIMIT} process definitions in one run"
        );
        let index = index as u32;
        let mut point = |repr| {
            let inserted = self.state.resources.insert(repr, User::Master);
            inserted.expect("a new definition has no resource yet").id
        };
        let key = PointKey {
            index,
            fork_point: point(ResourceRepr::ForkPoint(index)),
            join_point: point(ResourceRepr::JoinPoint(index)),
            codec,
        };
        let definition = Arc::new(Definition {
            body: OnceLock::new(),
            name,
        });
        self.definitions.push(Arc::clone(&definition));
        self.keys.push(key);
        if let Some(run) = &self.run {
            let runtime = run.runtime;
            runtime
                .definitions
                .write()
                .expect("one thread")
                .push(definition);
            runtime.control.advance_image();
        }
        key
    }

    fn set_body<A, R>(&mut self, key: &PointKey, f: impl Fn(A) -> R + 'static)
    where
        A: DeserializeOwned + 'static,
        R: Serialize + 'static,
    {
        let is_ours = self.keys.get(key.index as usize) == Some(key);
        assert!(is_ours, "the process was declared by another master");
        let body: Box<worker::Body> = Box::new(move |call| call.run(&f));
        let set = self.definitions[key.index as usize]
            .body
            .set(BodyCell(body));
        assert!(set.is_ok(), "the process has been defined before");
        if let Some(run) = &self.run {
            run.runtime.control.advance_image();
        }
    }

    /// Answers a request of this process itself.
    fn answer(&mut self, request: Request) -> Result<Reply> {
        if let (None, false, Request::Release { id }) = (&self.opened, self.is_over, &request) {
            // A guard of an earlier master: nothing is opened for what cannot be here.
            let (expected, found) = (None, None);
            return Err(Error::NoResource {
                id: *id,
                expected,
                found,
            });
        }
        self.open()?;
        let opened = self.opened.as_ref().expect("it has just been opened");
        let mut events = VecDeque::new();
        let reply = match &mut self.run {
            Some(run) => run.answer(
                Some(User::Master),
                request,
                &mut self.state,
                &opened.objects,
                &mut events,
            ),
            None => run::answer_about_resources(
                Some(User::Master),
                request,
                &mut self.state,
                &opened.objects,
            ),
        };
        events.push_back(state::Event::ResourcesChanged);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            self.state.step(event, &mut actions);
            for action in actions {
                match (&mut self.run, action) {
                    (Some(run), action) => {
                        run.perform_now(action, &opened.objects, &mut self.state);
                    }
                    // Nothing has been started that could inherit.
                    (None, state::Action::LookForHeirs) => {
                        events.push_back(state::Event::Heirs(Heirs::default()));
                    }
                    (None, state::Action::Destroy(id, repr)) => {
                        opened.objects.destroy(id, &repr, Lookers::None);
                    }
                    (None, _) => {}
                }
            }
        }
        Ok(reply)
    }
}

/// The arena, reserved when it is first needed.
fn reserve(arena: &mut Option<Arena>) -> Result<Arena> {
    let reserved = match arena.take() {
        Some(arena) => arena,
        None => Arena::reserve(ARENA_LEN_BYTES)
            .map_err(Error::memory("reserving addresses for shared memory"))?,
    };
    Ok(arena.insert(reserved).clone())
}

/// [`CONTROL_LEN_BYTES`], or less where addresses or the sizes of files are limited: the control block is a file, with more in it.
fn default_control_len_bytes(arena: &Arena) -> Result<usize> {
    let of_files = process::get_limit(process::Resource::FileSizeBytes)
        .map_err(Error::system("asking for the limit of file sizes"))?
        .soft
        .map_or(usize::MAX, |limit| {
            usize::try_from(limit / 2).unwrap_or(usize::MAX)
        });
    let len_bytes = CONTROL_LEN_BYTES.min(arena.len_bytes() / 4).min(of_files);
    Ok(len_bytes / map::page_size() * map::page_size())
}

/// Deletes what the record names, and empties it.
fn clean(dir: &Path, liveness: &Liveness) -> Result<()> {
    let recovery = netmcore_pmanage::recover(dir, liveness)?;
    for (object, error) in &recovery.kept {
        tracing::warn!(target: "netmcore", ?object, %error, "an object of an earlier run cannot be deleted; it stays in the record");
    }
    for damaged in &recovery.damaged {
        tracing::warn!(target: "netmcore", record = %recovery.record.display(), %damaged, "a line of the record is damaged; it is kept in a copy beside the record");
    }
    if !recovery.deleted.is_empty() {
        tracing::info!(target: "netmcore", count = recovery.deleted.len(), "objects that an earlier run left were deleted");
    }
    Ok(())
}

fn check_socket_path(dir: &Path) -> Result<()> {
    let path = ControllerSocket::path(dir);
    match netmcore_sys::socket::check_path(&path) {
        Err(netmcore_sys::socket::SocketError::PathTooLong {
            limit_bytes,
            len_bytes,
            ..
        }) => Err(Error::PathTooLong {
            path,
            limit: limit_bytes,
            len: len_bytes,
        }),
        _ => Ok(()),
    }
}

/// Answers a request in the master process, in a hook or before or after the run.
pub(crate) fn answer_here(request: Request) -> Result<Reply> {
    let core = CURRENT.with_borrow(Clone::clone);
    let core = core.ok_or(Error::NotRunning {
        call: "a request to the master",
    })?;
    // Borrowed for good in the children of workers, which are copies of the master in the middle of its loop.
    let answer = core.try_borrow_mut().map(|mut core| core.answer(request));
    answer.unwrap_or(Err(Error::NotRunning {
        call: "a request to the master",
    }))
}

/// The arena, in the master process: in a hook, or before the run.
pub(crate) fn arena_here() -> Result<Arena> {
    let missing = Error::NotRunning {
        call: "mapping a region",
    };
    let Some(core) = CURRENT.with_borrow(Clone::clone) else {
        return Err(missing);
    };
    let arena = core.try_borrow_mut().map(|mut core| core.arena());
    arena.unwrap_or(Err(missing))
}

/// The heap of named objects, before the run.
pub(crate) fn named_heap_here() -> Result<Option<ResourceId>> {
    core_here(|core| core.state.named_heap)
}

/// To what length it may grow, before the run.
pub(crate) fn shared_heap_max_bytes_here() -> Result<Option<u64>> {
    core_here(|core| core.config.shared_heap_max_bytes)
}

fn core_here<T>(ask: impl FnOnce(&Core) -> T) -> Result<T> {
    let missing = || Error::NotRunning {
        call: "a request to the master",
    };
    let core = CURRENT.with_borrow(Clone::clone).ok_or_else(missing)?;
    let core = core.try_borrow().map_err(|_| missing())?;
    match core.is_over {
        true => Err(missing()),
        false => Ok(ask(&core)),
    }
}

/// Returns the record of kernel-persistent objects of the run, for a program that records objects of
/// its own, or wants to look. It is a [`Recorder`](netmcore_sys::Recorder) for functions that create
/// objects record first.
///
/// # Errors
/// [`Error::NotRunning`] if there is no master, or it keeps no record (`disable_pmanage`).
#[doc(alias = "netplex.pmanage")]
pub fn record() -> Result<Log> {
    let missing = || Error::NotRunning { call: "record" };
    if context::role() == Role::Worker {
        let dir = context::running("record")?
            .recorded_dir
            .as_ref()
            .ok_or_else(missing)?;
        return Ok(Log::open(dir)?);
    }
    let core = CURRENT.with_borrow(Clone::clone).ok_or_else(missing)?;
    let mut core = core.try_borrow_mut().map_err(|_| missing())?;
    core.open()?;
    core.opened
        .as_ref()
        .and_then(|opened| opened.objects.log.clone())
        .ok_or_else(missing)
}

/// How processes of one definition are called.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessOptions {
    codec: Codec,
}

impl ProcessOptions {
    /// Makes the default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses how arguments and results become bytes. Self-describing types, as
    /// `serde_json::Value` and untagged enums, need [`Codec::Json`].
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }
}

/// A master to be: options and process definitions, until it is run.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Error, JoinError, Master};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path();
/// let mut master = Master::builder(directory);
/// let square = master.def_process(|k: u64| k.checked_mul(k).expect("too large"));
/// assert_eq!(master.run(&square, &7)?, 49);
///
/// // One run follows the other; the first process's failure is the run's.
/// let mut master = Master::builder(directory);
/// let square = master.def_process(|k: u64| k.checked_mul(k).expect("too large"));
/// let error = master.run(&square, &u64::MAX).unwrap_err();
/// assert!(matches!(error, Error::FirstProcess(JoinError::Panicked { .. })));
/// # Ok(())
/// # }
/// ```
///
/// The process that calls [`run`](Master::run) becomes the master and never computes; every worker is
/// a fork of it. It must have one thread only.
#[doc(alias = "Netmcore.startup")]
pub struct Master {
    core: Rc<RefCell<Core>>,
    init: Option<InitHook>,
}

impl std::fmt::Debug for Master {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let core = self.core.borrow();
        f.debug_struct("Master")
            .field("directory", &core.config.dir)
            .field("definitions", &core.definitions.len())
            .finish_non_exhaustive()
    }
}

impl Master {
    /// Begins a master on a socket directory: its own, created with mode 0700 if it is not there. Only
    /// one program at a time can use a directory; nothing is touched before the run or the first
    /// resource call.
    #[doc(alias = "socket_directory")]
    pub fn builder(socket_directory: impl AsRef<Path>) -> Master {
        let config = Config {
            dir: socket_directory.as_ref().to_path_buf(),
            pidfile: None,
            grace: GRACE,
            disable_pmanage: false,
            no_unlink: false,
            ready_workers: process::available_processors(),
            process_limit: PROCESS_LIMIT,
            control_len_bytes: None,
            shared_heap_max_bytes: None,
        };
        let first_resource = NEXT_RESOURCE.load(Relaxed);
        let core = Rc::new(RefCell::new(Core {
            config,
            definitions: Vec::new(),
            keys: Vec::new(),
            state: State::new(ResourceTable::starting_at(first_resource)),
            opened: None,
            arena: None,
            run: None,
            written_pidfile: None,
            is_over: false,
        }));
        // The last master may be dropped here, and what its definitions hold asks for the current one.
        drop(CURRENT.take());
        CURRENT.set(Some(Rc::clone(&core)));
        Master { core, init: None }
    }

    fn configure(self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.core.borrow_mut().config);
        self
    }

    /// Writes the master's pid into this file during the run, and removes it at an orderly end.
    pub fn pidfile(self, path: impl AsRef<Path>) -> Self {
        self.configure(|config| config.pidfile = Some(path.as_ref().to_path_buf()))
    }

    /// Calls `hook` in the master when everything is set up, before the first process is started. An
    /// error ends the run before it begins.
    #[doc(alias = "init_ctrl")]
    pub fn init(mut self, hook: impl FnOnce(&mut Controller) -> Result<()> + 'static) -> Self {
        self.init = Some(Box::new(hook));
        self
    }

    /// How long workers may take to end by themselves at shutdown, before they are killed; 1 s by
    /// default.
    pub fn grace(self, grace: Duration) -> Self {
        self.configure(|config| config.grace = grace)
    }

    /// Does without the record: it is neither read nor acted on nor written. What outlives the run
    /// when it is killed then stays for ever; at an orderly end everything is deleted as usual.
    pub fn disable_pmanage(self, disable: bool) -> Self {
        self.configure(|config| config.disable_pmanage = disable)
    }

    /// Leaves what the record names as it is, at the start and at the end; new lines are appended.
    /// For a program that starts up twice in sequence on one directory.
    pub fn no_unlink(self, no_unlink: bool) -> Self {
        self.configure(|config| config.no_unlink = no_unlink)
    }

    /// How many workers are kept forked and parked, so that a start need not wait for a fork; by
    /// default one for each processor that this process may use, at most 64. With 0 each start forks.
    pub fn ready_workers(self, count: usize) -> Self {
        self.configure(|config| config.ready_workers = count.min(READY_LIMIT))
    }

    /// How many processes there may be at once that are neither joined nor detached; 4096 by default,
    /// rounded up to a power of two, at most a million.
    pub fn process_limit(self, limit: usize) -> Self {
        self.configure(|config| config.process_limit = limit.clamp(1, 1 << 20))
    }

    /// Address space for arguments and results that are under way, in bytes; 64 GiB by default, or a quarter of the arena where
    /// `ulimit -v` limits addresses, or half of what `ulimit -f` allows for a file. Memory is taken only as they need it.
    pub fn message_memory(self, bytes: usize) -> Self {
        self.configure(|config| config.control_len_bytes = Some(bytes.max(1 << 20)))
    }

    /// To what length the heap that all processes share ([`shared_heap`](crate::shared_heap)) may grow, in bytes; as for other
    /// regions by default, [`Region::DEFAULT_MAX_LEN_BYTES`](crate::Region::DEFAULT_MAX_LEN_BYTES). Memory is taken only as it is used.
    pub fn shared_heap_max_bytes(self, bytes: u64) -> Self {
        self.configure(|config| config.shared_heap_max_bytes = Some(bytes))
    }

    /// Defines a process: a function that workers will run, with what it captures.
    ///
    /// # Panics
    /// After 4096 definitions.
    #[doc(alias = "Netmcore.def_process")]
    pub fn def_process<A, R, F>(&mut self, f: F) -> Process<A, R>
    where
        A: Serialize + DeserializeOwned + 'static,
        R: Serialize + DeserializeOwned + 'static,
        F: Fn(A) -> R + 'static,
    {
        self.def_process_with(ProcessOptions::default(), f)
    }

    /// Defines a process with options.
    ///
    /// # Panics
    /// After 4096 definitions.
    pub fn def_process_with<A, R, F>(&mut self, options: ProcessOptions, f: F) -> Process<A, R>
    where
        A: Serialize + DeserializeOwned + 'static,
        R: Serialize + DeserializeOwned + 'static,
        F: Fn(A) -> R + 'static,
    {
        let mut core = self.core.borrow_mut();
        let key = core.define(type_name::<F>(), options.codec);
        core.set_body(&key, f);
        Process::from_key(key)
    }

    /// Declares a process whose function comes later ([`define`](Master::define)), so that functions
    /// can refer to themselves and to each other.
    ///
    /// ```rust,standalone_crate
    /// # use netmcore_proc::Master;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// let mut master = Master::builder(&directory);
    /// let depth = master.declare::<u32, u32>();
    /// master.define(depth, move |levels| match levels {
    ///     0 => 0,
    ///     levels => 1 + depth.start(&(levels - 1)).unwrap().join().unwrap(),
    /// });
    /// assert_eq!(master.run(&depth, &5)?, 5);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    /// After 4096 definitions.
    pub fn declare<A, R>(&mut self) -> Process<A, R> {
        Process::from_key(
            self.core
                .borrow_mut()
                .define("a declared process", Codec::default()),
        )
    }

    /// Gives a declared process its function.
    ///
    /// # Panics
    /// If it has one, or was declared by another master.
    pub fn define<A, R, F>(&mut self, process: Process<A, R>, f: F)
    where
        A: Serialize + DeserializeOwned + 'static,
        R: Serialize + DeserializeOwned + 'static,
        F: Fn(A) -> R + 'static,
    {
        self.core.borrow_mut().set_body(&process.key, f);
    }

    /// Becomes the master, starts `process` as the first one, and returns its result when it has ended
    /// and all else has been shut down.
    ///
    /// # Errors
    /// [`Error::FirstProcess`] if it has no result; [`Error::Deadlock`] if all processes wait for each
    /// other; else what kept the run from beginning, [`Error::MultiThreaded`] for instance. After an
    /// error everything has been cleaned up as well.
    ///
    /// On SIGINT and SIGTERM the run ends in order, and the signal then has the effect that it had
    /// before; if the program survives that, the error is [`Error::Signalled`].
    #[doc(alias = "Netmcore.run")]
    pub fn run<A, R>(self, process: &Process<A, R>, arg: &A) -> Result<R>
    where
        A: Serialize + DeserializeOwned,
        R: Serialize + DeserializeOwned,
    {
        let handle = RefCell::new(None::<Running<R>>);
        let start = || {
            let running = process.start(arg)?;
            handle.replace(Some(running));
            Ok(running.id())
        };
        let extract = |_| handle.borrow().as_ref().map(Running::join_nowait);
        match self.run_with(start, extract)? {
            Some(Ok(Some(result))) => Ok(result),
            Some(Err(error)) => Err(Error::FirstProcess(error)),
            _ => Err(Error::ShutDown),
        }
    }

    /// Becomes the master; `first_process` starts the first process and returns its id; returns when
    /// that has ended and all else has been shut down.
    ///
    /// # Errors
    /// As for [`run`](Master::run), except that the first process's result is not looked at.
    #[doc(alias = "Netmcore.startup")]
    pub fn startup(self, first_process: impl FnOnce() -> Result<ProcessId>) -> Result<()> {
        self.run_with(first_process, drop)
    }

    /// As [`startup`](Master::startup); `extract_result` is called in the master when all workers are
    /// gone, and may take results (`join_nowait`) and use resources, which are deleted afterwards.
    ///
    /// ```rust,standalone_crate
    /// # use netmcore_proc::Master;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// let mut master = Master::builder(&directory);
    /// let square = master.def_process(|k: u64| k * k);
    /// let result = master.run_with(
    ///     || square.fork_point().start(&7),
    ///     |first| square.join_point().join_nowait(first),
    /// )?;
    /// assert_eq!(result?, Some(49));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`startup`](Master::startup).
    pub fn run_with<T>(
        mut self,
        first_process: impl FnOnce() -> Result<ProcessId>,
        extract_result: impl FnOnce(ProcessId) -> T,
    ) -> Result<T> {
        let init = self.init.take();
        match context::role() {
            Role::None | Role::Foreign => {}
            Role::Master => return Err(Error::AlreadyMaster),
            Role::Worker => return Err(Error::NotInWorker { call: "run" }),
        }
        let begun = self.core.borrow_mut().begin();
        let outcome = begun.and_then(|()| self.run_begun(init, first_process, extract_result));
        let ended = self.core.borrow_mut().end();
        let outcome = match (outcome, ended) {
            (Ok(value), Ok(())) => Ok(value),
            (Ok(_), Err(error)) | (Err(error), _) => Err(error),
        };
        if let Err(Error::Signalled { signal }) = &outcome {
            // What the signal would have done if nobody had taken it: usually the end of the program.
            let _ = signal::raise(*signal);
        }
        outcome
    }

    fn run_begun<T>(
        &mut self,
        init: Option<InitHook>,
        first_process: impl FnOnce() -> Result<ProcessId>,
        extract_result: impl FnOnce(ProcessId) -> T,
    ) -> Result<T> {
        if let Some(init) = init {
            init(&mut Controller {
                core: Rc::clone(&self.core),
            })?;
        }
        let first = first_process()?;
        // The hooks were the program's: with SIGCHLD ignored, exit statuses would be lost.
        signal::set_default(signal::SIGCHLD).map_err(Error::system("taking SIGCHLD back"))?;
        let reason = self.core.borrow_mut().drive(first)?;
        match reason {
            EndReason::Deadlock { who, on_what } => Err(Error::Deadlock { who, on_what }),
            EndReason::Signal(signal) => Err(Error::Signalled { signal }),
            EndReason::FirstProcessEnded | EndReason::Asked => Ok(extract_result(first)),
        }
    }
}

/// A master that was opened by a resource call, but never run, ends in order, too.
impl Drop for Master {
    fn drop(&mut self) {
        if let Ok(mut core) = self.core.try_borrow_mut()
            && core.opened.is_some()
        {
            // Failures have been logged; there is nobody to tell.
            let _ = core.end();
        }
    }
}

impl Core {
    /// Steps 2 and 3 of the module docs.
    fn begin(&mut self) -> Result<()> {
        let threads = process::thread_count().map_err(Error::system(
            "counting threads in /proc, which must be mounted",
        ))?;
        if threads > 1 {
            return Err(Error::MultiThreaded { threads });
        }
        self.open()?;
        region::install();
        crash_point!("proc.master.opened");
        let opened = self.opened.as_ref().expect("it has just been opened");
        context::retire_runtime();
        let doing = || Error::system("setting up the master");
        let arena = reserve(&mut self.arena)?;
        let control_len_bytes = match self.config.control_len_bytes {
            Some(len_bytes) => len_bytes,
            None => default_control_len_bytes(&arena)?,
        };
        let first_process = NEXT_PROCESS.load(Relaxed);
        let (control, region) = Control::create(
            &arena,
            self.config.process_limit,
            control_len_bytes,
            first_process,
        )?;
        if let Some(pidfile) = &self.config.pidfile {
            let pid = format!("{}\n", std::process::id());
            let written = std::path::absolute(pidfile)
                .and_then(|path| std::fs::write(&path, pid).map(|()| path));
            let written = written.map_err(|error| Error::InvalidPath {
                path: pidfile.clone(),
                why: error.to_string(),
            })?;
            self.written_pidfile = Some(written);
        }
        let doorbell = Arc::new(OwnFd::new(EventFd::new().map_err(doing())?));
        let room = birth::choose_room()?;
        let base = room.base;
        let listener = ControllerSocket::create(&opened.dir, &opened.liveness)?;
        let inheritance = Inheritance::note(room)?;
        worker::install_panic_hook();
        let worker_limit = control.worker_limit();
        let runtime = context::install(Runtime {
            control,
            memory: Mutex::new(Some((region, arena))),
            definitions: RwLock::new(self.definitions.clone()),
            executable: map::executable_ranges().map_err(doing())?,
            doorbell: Mutex::new(Some(Arc::clone(&doorbell))),
            master: Pid::this(),
            admin_socket: ControllerSocket::path(&opened.dir),
            recorded_dir: opened.objects.log.as_ref().map(|_| opened.dir.clone()),
            shared_heap_max_bytes: self.config.shared_heap_max_bytes,
            is_multiprocessor: process::available_processors() > 1,
            seed: process::random_u64(),
        });
        runtime
            .control
            .set_next_resource(self.state.resources.next_id());
        runtime.control.set_named_heap(self.state.named_heap);
        for key in &self.keys {
            if self.state.resources.get(key.fork_point, None).is_err() {
                runtime.control.release_fork_point(key.index);
            }
            if self.state.resources.get(key.join_point, None).is_err() {
                runtime.control.release_join_point(key.index);
            }
        }
        context::become_master();
        owners::install();
        self.state
            .begin(self.config.grace, self.config.ready_workers, worker_limit);
        self.run = Some(Run::new(runtime, inheritance, base, doorbell, listener)?);
        crash_point!("proc.master.begun");
        tracing::info!(target: "netmcore", directory = %opened.dir.display(), pid = std::process::id(), "the run begins");
        Ok(())
    }

    /// Step 4.
    fn drive(&mut self, first: ProcessId) -> Result<EndReason> {
        let run = self.run.as_mut().expect("the run has begun");
        let has_ended = match run.runtime.control.look(first) {
            Seen::Never => {
                return Err(Error::FirstProcess(JoinError::NoSuchProcess {
                    process: first,
                }));
            }
            Seen::Finished | Seen::Gone => true,
            Seen::Unfinished => false,
        };
        self.state.set_first(first, has_ended);
        let opened = self.opened.as_ref().expect("the run has begun");
        run.drive(&mut self.state, &opened.objects);
        run.enter_over();
        if let Some(error) = run.fatal.take() {
            return Err(error);
        }
        let reason = self.state.end_reason().cloned();
        let reason = reason.unwrap_or(EndReason::Asked);
        tracing::info!(target: "netmcore", ?reason, "the run ends");
        Ok(reason)
    }

    /// Step 5, from wherever the run has come to. All of it is tried; the first failure is told.
    fn end(&mut self) -> Result<()> {
        if self
            .opened
            .as_ref()
            .is_some_and(|opened| opened.pid != Pid::this())
        {
            // A fork that is not ours, with a copy of all this: it is not its to end, and the descriptors
            // that it names are closed here.
            std::mem::forget((self.run.take(), self.opened.take()));
            self.is_over = true;
            return Ok(());
        }
        let mut first_error = None;
        let mut note = |result: Result<()>| {
            if let Err(error) = result {
                tracing::warn!(target: "netmcore", %error, "cleaning up");
                first_error.get_or_insert(error);
            }
        };
        // It restores signals last: one that is pending, as when a key is pressed again, usually ends the
        // program, and must find nothing left to tidy up.
        let mut run = self.run.take();
        if let Some(run) = &mut run {
            if run.has_children() {
                // The run failed before or in its first start: nobody is owed a grace period.
                run.kill_and_reap_all();
            }
            run.enter_over();
            NEXT_PROCESS.fetch_max(run.runtime.control.id_after_the_run(), Relaxed);
            *run.runtime.doorbell.lock().expect("one thread") = None;
        }
        crash_point!("proc.master.over");
        if let Some(opened) = self.opened.take() {
            // The program may still hold handles that it has taken out of the run: that memory goes with the program.
            let mapped = self.state.resources.mapped_by(User::Master);
            for (id, repr) in self.state.resources.destroy_all() {
                let lookers = match mapped.contains(&id) {
                    true => Lookers::Some,
                    false => Lookers::None,
                };
                for error in opened.objects.destroy(id, &repr, lookers) {
                    note(Err(error));
                }
            }
            note(ControllerSocket::remove(&opened.dir, &opened.liveness).map_err(Error::from));
            if !self.config.disable_pmanage && !self.config.no_unlink {
                note(clean(&opened.dir, &opened.liveness));
            }
        }
        NEXT_RESOURCE.fetch_max(self.state.resources.next_id().get(), Relaxed);
        if let Some(pidfile) = self.written_pidfile.take()
            && let Err(error) = std::fs::remove_file(&pidfile)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            note(Err(Error::InvalidPath {
                path: pidfile,
                why: error.to_string(),
            }));
        }
        self.is_over = true;
        if run.is_some() {
            current::uninstall();
        }
        context::become_nobody();
        drop(run);
        tracing::info!(target: "netmcore", "the run is over");
        first_error.map_or(Ok(()), Err)
    }
}

/// What the init hook can do with the master that is about to begin.
#[doc(alias = "controller")]
pub struct Controller {
    core: Rc<RefCell<Core>>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").finish_non_exhaustive()
    }
}

impl Controller {
    /// Defines a process; as [`Master::def_process`].
    ///
    /// # Panics
    /// After 4096 definitions.
    pub fn def_process<A, R, F>(&mut self, f: F) -> Process<A, R>
    where
        A: Serialize + DeserializeOwned + 'static,
        R: Serialize + DeserializeOwned + 'static,
        F: Fn(A) -> R + 'static,
    {
        let mut core = self.core.borrow_mut();
        let key = core.define(type_name::<F>(), Codec::default());
        core.set_body(&key, f);
        Process::from_key(key)
    }

    /// Returns the socket directory, as an absolute path.
    pub fn directory(&self) -> PathBuf {
        let core = self.core.borrow();
        core.opened
            .as_ref()
            .map_or_else(|| core.config.dir.clone(), |opened| opened.dir.clone())
    }
}

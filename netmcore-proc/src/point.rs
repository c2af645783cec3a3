//! Typed handles: start a process, wait for it, take its result.
//!
//! **Protocol.** `start` takes a slot, encodes the argument into a block, queues the slot, and wakes
//! one ready worker; no system call but the wake. `join` claims the result (one claim succeeds),
//! sleeps on the slot until it is finished, decodes the block, and frees both.
//!
//! **If a process dies here** the master applies the table of `control`: a start is undone or stands,
//! a claim is given back.

use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use netmcore_shm::SentHandle;
use netmcore_sys::futex::Deadline;

use crate::codec::{self, Codec, EncodeError};
use crate::context::{self, Role, Runtime};
use crate::control::{
    ClaimError, Entry, InheritOrder, Joining, Order, Outcome, Seen, Waited, WaitsFor,
};
use crate::error::{Error, ExceededLimit, Failure, JoinError, Result};
use crate::id::{ProcessId, ResourceId};
use crate::manage;
use crate::resource::{Inherit, Leg, ResourceType};
use crate::worker;

/// How a process is started; the default is without limits, and all regions are inherited.
///
/// ```
/// use netmcore_proc::StartOptions;
/// use std::time::Duration;
///
/// let options = StartOptions::new().memory_limit(64 << 20).time_limit(Duration::from_secs(10));
/// ```
#[derive(Clone, Debug, Default)]
pub struct StartOptions {
    memory_limit_bytes: Option<u64>,
    time_limit: Option<Duration>,
    inherit: Inherit,
}

impl StartOptions {
    /// The order with these limits.
    fn limited(&self, order: Order) -> Order {
        Order {
            memory_limit_bytes: self.memory_limit_bytes,
            time_limit_ns: self.time_limit.map(as_ns),
            ..order
        }
    }

    /// Makes the default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits the private memory of the process (its copy of the master's included), in bytes.
    ///
    /// An allocation beyond it fails (`RLIMIT_DATA`), and resident memory beyond it is noticed within
    /// a tenth of a second; the joiner gets [`JoinError::LimitExceeded`] in both cases. Shared memory
    /// does not count.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit_bytes = Some(bytes.max(1));
        self
    }

    /// Says which preallocated regions the process may see; all by default.
    ///
    /// It is a user of them from now on until it ends, whether it looks at them or not.
    #[doc(alias = "inherit_resources")]
    pub fn inherit(mut self, inherit: Inherit) -> Self {
        self.inherit = inherit;
        self
    }

    /// Kills the process when it has run for this long; the joiner gets
    /// [`JoinError::LimitExceeded`]. The time in the queue does not count.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit.max(Duration::from_nanos(1)));
        self
    }
}

/// What a definition's handles have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub(crate) struct PointKey {
    pub(crate) index: u32,
    pub(crate) fork_point: ResourceId,
    pub(crate) join_point: ResourceId,
    pub(crate) codec: Codec,
}

macro_rules! plain_handle {
    ($name:ident<$($parameter:ident),+>) => {
        impl<$($parameter),+> Clone for $name<$($parameter),+> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<$($parameter),+> Copy for $name<$($parameter),+> {}
        impl<$($parameter),+> PartialEq for $name<$($parameter),+> {
            fn eq(&self, other: &Self) -> bool {
                self.key == other.key
            }
        }
        impl<$($parameter),+> Eq for $name<$($parameter),+> {}
        impl<$($parameter),+> Serialize for $name<$($parameter),+> {
            fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                self.key.serialize(serializer)
            }
        }
        impl<'de, $($parameter),+> Deserialize<'de> for $name<$($parameter),+> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                Ok($name { key: Deserialize::deserialize(deserializer)?, types: PhantomData })
            }
        }
    };
}

/// A defined process: a function from `A` to `R` that workers run.
///
/// It may be copied, captured by other definitions, and sent to any process of the program.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{JoinError, Master, StartOptions};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let nap = master.def_process(|ms: u64| std::thread::sleep(Duration::from_millis(ms)));
/// let first = master.def_process(move |()| {
///     nap.start(&1).unwrap().join().unwrap();
///
///     let limits = StartOptions::new().time_limit(Duration::from_millis(20));
///     let outcome = nap.start_with(&3_600_000, limits).unwrap().join();
///     assert!(matches!(outcome, Err(JoinError::LimitExceeded { .. })));
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "def_process")]
pub struct Process<A, R> {
    pub(crate) key: PointKey,
    types: PhantomData<fn(A) -> R>,
}

/// Starts processes of one kind.
#[doc(alias = "fork_point")]
pub struct ForkPoint<A> {
    key: PointKey,
    types: PhantomData<fn(A)>,
}

/// Waits for the results of processes of one kind.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{JoinError, Master};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let square = master.def_process(|k: u64| k * k);
/// let double = master.def_process(|k: u64| 2 * k);
/// let first = master.def_process(move |()| {
///     let process = square.fork_point().start(&7).unwrap();
///     assert!(matches!(
///         double.join_point().join(process),
///         Err(JoinError::WrongJoinPoint { .. })
///     ));
///     assert_eq!(square.join_point().join(process).unwrap(), 49);
///
///     // Released: no process can be started by it any more, anywhere.
///     square.fork_point().release().unwrap();
///     assert!(square.start(&8).is_err());
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
#[doc(alias = "join_point")]
pub struct JoinPoint<R> {
    key: PointKey,
    types: PhantomData<fn() -> R>,
}

plain_handle!(Process<A, R>);
plain_handle!(ForkPoint<A>);
plain_handle!(JoinPoint<R>);

impl<A, R> fmt::Debug for Process<A, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Process({}, {})",
            self.key.fork_point, self.key.join_point
        )
    }
}
impl<A> fmt::Debug for ForkPoint<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ForkPoint({})", self.key.fork_point)
    }
}
impl<R> fmt::Debug for JoinPoint<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinPoint({})", self.key.join_point)
    }
}

impl<A, R> Process<A, R> {
    pub(crate) fn from_key(key: PointKey) -> Self {
        Process {
            key,
            types: PhantomData,
        }
    }

    /// Returns the means to start it, without its result's type.
    pub fn fork_point(&self) -> ForkPoint<A> {
        ForkPoint {
            key: self.key,
            types: PhantomData,
        }
    }

    /// Returns the means to wait for it, without its argument's type.
    pub fn join_point(&self) -> JoinPoint<R> {
        JoinPoint {
            key: self.key,
            types: PhantomData,
        }
    }
}

impl<A: Serialize + DeserializeOwned, R: Serialize + DeserializeOwned> Process<A, R> {
    /// Starts a process with `arg` and returns the handle to join it by.
    ///
    /// May be called in any worker, and in hooks of the master. The worker is a fresh fork of the
    /// master; nothing is inherited from the caller but the argument. Returns as soon as the process
    /// is queued.
    ///
    /// # Errors
    /// [`Error::Encode`] if the argument cannot be encoded, [`Error::ProcessTableFull`],
    /// [`Error::ShutDown`], [`Error::NoResource`] if the fork point was released, or the memory
    /// error if there is no memory for the argument. After an error nothing has been started.
    ///
    /// # If a process dies
    /// A caller killed inside leaves either a started process or nothing.
    pub fn start(&self, arg: &A) -> Result<Running<R>> {
        self.start_with(arg, StartOptions::default())
    }

    /// Starts a process with limits; else as [`Process::start`].
    ///
    /// # Errors
    /// As for [`Process::start`].
    pub fn start_with(&self, arg: &A, options: StartOptions) -> Result<Running<R>> {
        let process = start_defined(&self.key, arg, &options, false)?;
        Ok(Running::new(
            process,
            self.key.join_point,
            Some(self.key.index),
            self.key.codec,
        ))
    }

    /// Starts a process that nobody will join: its result is dropped and its slot freed when it is
    /// done.
    ///
    /// # Errors
    /// As for [`Process::start`].
    pub fn start_detached(&self, arg: &A) -> Result<ProcessId> {
        start_defined(&self.key, arg, &StartOptions::default(), true)
    }
}

impl<A: Serialize> ForkPoint<A> {
    /// Starts a process with `arg`; join it through the [`JoinPoint`] of the same definition.
    ///
    /// # Errors
    /// As for [`Process::start`].
    pub fn start(&self, arg: &A) -> Result<ProcessId> {
        start_defined(&self.key, arg, &StartOptions::default(), false)
    }

    /// Starts a process with limits.
    ///
    /// # Errors
    /// As for [`Process::start`].
    pub fn start_with(&self, arg: &A, options: StartOptions) -> Result<ProcessId> {
        start_defined(&self.key, arg, &options, false)
    }
}

impl<A> ForkPoint<A> {
    /// Returns the id of this resource.
    pub fn id(&self) -> ResourceId {
        self.key.fork_point
    }

    /// Releases the fork point: no more processes can be started by it, anywhere.
    ///
    /// # Errors
    /// [`Error::NoResource`] if it has been released before.
    #[doc(alias = "release_fork_point")]
    pub fn release(&self) -> Result<()> {
        manage::release_point(self.key.fork_point, ResourceType::ForkPoint)
    }
}

impl<R: DeserializeOwned> JoinPoint<R> {
    /// Waits for the end of a process and takes its result.
    ///
    /// # Errors
    /// Says why there is no result; see [`JoinError`]. The first join of a process gets its result,
    /// or the reason why there is none; every other gets [`JoinError::AlreadyJoined`] at once.
    ///
    /// # If a process dies
    /// The death of the joined process ends the wait. If the joiner dies, another may join.
    pub fn join(&self, process: ProcessId) -> Result<R, JoinError> {
        self.running(process).join()
    }

    /// As [`JoinPoint::join`], until `deadline` at the most.
    ///
    /// # Errors
    /// As for [`JoinPoint::join`]; [`JoinError::TimedOut`] leaves the process as it is.
    pub fn join_deadline(&self, process: ProcessId, deadline: Instant) -> Result<R, JoinError> {
        self.running(process).join_deadline(deadline)
    }

    /// Takes the result if the process has ended; `None` means: not yet. Allowed in the master, and
    /// after the run.
    ///
    /// # Errors
    /// As for [`JoinPoint::join`].
    pub fn join_nowait(&self, process: ProcessId) -> Result<Option<R>, JoinError> {
        self.running(process).join_nowait()
    }

    /// The typed handle of a process that was started through the fork point of this definition.
    pub fn running(&self, process: ProcessId) -> Running<R> {
        Running::new(
            process,
            self.key.join_point,
            Some(self.key.index),
            self.key.codec,
        )
    }
}

impl<R> JoinPoint<R> {
    /// Returns the id of this resource.
    pub fn id(&self) -> ResourceId {
        self.key.join_point
    }

    /// Releases the join point: results are dropped as they come, and joins fail.
    ///
    /// # Errors
    /// [`Error::NoResource`] if it has been released before.
    #[doc(alias = "release_join_point")]
    pub fn release(&self) -> Result<()> {
        manage::release_point(self.key.join_point, ResourceType::JoinPoint)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
struct RunningKey {
    process: ProcessId,
    /// Raw id, 0 for functions that were spawned.
    join_point: u64,
    definition: Option<u32>,
    codec: Codec,
}

/// A started process, by the type of its result.
///
/// It may be copied and sent to any process of the program; whoever joins first gets the result.
/// Dropping it does nothing to the process.
///
/// ```rust,standalone_crate
/// use netmcore_proc::{JoinError, Master, Running, spawn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let sum = spawn(|numbers: Vec<u64>| numbers.iter().sum::<u64>(), &vec![1, 2, 3]).unwrap();
///
///     // Another process may join in our place; then we cannot.
///     let joiner = spawn(|sum: Running<u64>| sum.join().unwrap(), &sum).unwrap();
///     assert_eq!(joiner.join().unwrap(), 6);
///     assert!(matches!(sum.join(), Err(JoinError::AlreadyJoined { .. })));
///
///     let idle = spawn(|()| loop { std::thread::park() }, &()).unwrap();
///     assert!(matches!(idle.join_nowait(), Ok(None))); // not yet
///     idle.kill().unwrap();
///     let outcome: Result<(), _> = idle.join();
///     assert!(matches!(outcome, Err(JoinError::Killed { signal: 9, .. })));
/// });
/// master.run(&first, &())?;
/// # Ok(())
/// # }
/// ```
pub struct Running<R> {
    key: RunningKey,
    types: PhantomData<fn() -> R>,
}

plain_handle!(Running<R>);

impl<R> fmt::Debug for Running<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Running({})", self.key.process)
    }
}

impl<R> Running<R> {
    pub(crate) fn new(
        process: ProcessId,
        join_point: ResourceId,
        definition: Option<u32>,
        codec: Codec,
    ) -> Self {
        let key = RunningKey {
            process,
            join_point: join_point.get(),
            definition,
            codec,
        };
        Running {
            key,
            types: PhantomData,
        }
    }

    /// Returns the id of the process.
    pub fn id(&self) -> ProcessId {
        self.key.process
    }

    /// Kills the process, wherever it is in its life; its joiner gets [`JoinError::Killed`]. Does
    /// nothing to a process that has ended.
    ///
    /// # Errors
    /// Fails if the master cannot be reached.
    pub fn kill(&self) -> Result<()> {
        manage::kill(self.key.process)
    }

    /// Says that nobody will join the process: its slot is freed when it is done.
    ///
    /// # Errors
    /// [`JoinError::AlreadyJoined`] if somebody has joined it or is waiting for it.
    pub fn detach(&self) -> Result<(), JoinError> {
        let process = self.key.process;
        let runtime = context::runtime().filter(|_| context::role() != Role::Foreign);
        let runtime = runtime.ok_or(JoinError::NoSuchProcess { process })?;
        let _in_flight = runtime.control.enter(context::me());
        let must_ring = runtime
            .control
            .detach(process, context::me())
            .map_err(|error| claim_error(process, error))?;
        if must_ring {
            manage::result_gone(runtime);
        }
        Ok(())
    }
}

impl<R: DeserializeOwned> Running<R> {
    /// Waits for the end of the process and takes its result.
    ///
    /// # Errors
    /// Says why there is no result; see [`JoinError`]. The first join of a process gets its result,
    /// or the reason why there is none; every other gets [`JoinError::AlreadyJoined`] at once.
    ///
    /// # If a process dies
    /// The death of the joined process ends the wait. If the joiner dies, another may join.
    pub fn join(&self) -> Result<R, JoinError> {
        match self.take(Wait::Forever)? {
            Some(result) => Ok(result),
            None => Err(JoinError::TimedOut {
                process: self.key.process,
            }),
        }
    }

    /// As [`Running::join`], until `deadline` at the most.
    ///
    /// # Errors
    /// As for [`Running::join`]; [`JoinError::TimedOut`] leaves the process as it is.
    pub fn join_deadline(&self, deadline: Instant) -> Result<R, JoinError> {
        match self.take(Wait::Until(Deadline::from(deadline)))? {
            Some(result) => Ok(result),
            None => Err(JoinError::TimedOut {
                process: self.key.process,
            }),
        }
    }

    /// Takes the result if the process has ended; `None` means: not yet. Allowed in the master, and
    /// after the run.
    ///
    /// # Errors
    /// As for [`Running::join`].
    pub fn join_nowait(&self) -> Result<Option<R>, JoinError> {
        self.take(Wait::Never)
    }

    fn take(&self, wait: Wait) -> Result<Option<R>, JoinError> {
        let process = self.key.process;
        match (context::role(), wait) {
            (Role::Worker, _) | (Role::Master | Role::None, Wait::Never) => {}
            (Role::Foreign, _) => return Err(JoinError::NoSuchProcess { process }),
            _ => return Err(JoinError::NotInMaster { process }),
        }
        if context::self_process() == Some(process) && matches!(wait, Wait::Forever) {
            return Err(JoinError::WouldDeadlock { process });
        }
        let runtime = context::runtime().ok_or(JoinError::NoSuchProcess { process })?;
        let control = &runtime.control;
        let me = context::me();
        let _in_flight = control.enter(me);
        if let Some(index) = self.key.definition
            && control.is_join_point_released(index)
        {
            let id = ResourceId::from_raw(self.key.join_point);
            return Err(JoinError::NoResource { process, id });
        }
        self.check_join_point(runtime)?;
        if matches!(wait, Wait::Never)
            && !control
                .peek(process)
                .map_err(|error| claim_error(process, error))?
        {
            return Ok(None);
        }
        let joining = control
            .claim_result(process, me)
            .map_err(|error| claim_error(process, error))?;
        // The slot may have been another process's while the join point was looked at.
        self.check_join_point(runtime)?;
        let waited = match wait {
            Wait::Never if joining.is_finished() => Waited::Finished,
            Wait::Never => return Ok(None),
            Wait::Forever => joining.wait(
                None,
                |done| context::spin(runtime, done),
                |begins| {
                    manage::note_wait(runtime, begins.then_some(WaitsFor::Process(process)));
                },
            ),
            Wait::Until(deadline) => {
                joining.wait(Some(deadline), |done| context::spin(runtime, done), |_| {})
            }
        };
        match waited {
            Waited::Finished => self.decode(runtime, joining).map(Some),
            Waited::TimedOut => Ok(None),
            Waited::ShutDown => Err(JoinError::ShutDown { process }),
        }
    }

    fn check_join_point(&self, runtime: &Runtime) -> Result<(), JoinError> {
        let process = self.key.process;
        if matches!(runtime.control.look(process), Seen::Never | Seen::Gone) {
            return Ok(());
        }
        let expected = runtime.control.join_point_of(process);
        // What was read is of this process only if it is still there.
        let is_gone = runtime.control.look(process) == Seen::Gone;
        if expected == self.key.join_point || is_gone {
            return Ok(());
        }
        Err(JoinError::WrongJoinPoint {
            process,
            expected: ResourceId::from_raw(expected),
            found: ResourceId::from_raw(self.key.join_point),
        })
    }

    /// Decodes what the process left, and frees it.
    fn decode(&self, runtime: &Runtime, joining: Joining<'_>) -> Result<R, JoinError> {
        let process = self.key.process;
        let (outcome, block) = joining.result();
        let bytes = match block.map(|block| runtime.control.bytes(block)) {
            None => Ok(&[][..]),
            Some(Ok(bytes)) => Ok(bytes),
            Some(Err(error)) => Err(error.to_string()),
        };
        let undecodable = |reason: String| JoinError::ResultUndecodable {
            process,
            type_name: std::any::type_name::<R>().to_owned(),
            reason,
        };
        let result = match (outcome, bytes) {
            (_, Err(reason)) => Err(undecodable(reason)),
            (Outcome::None, Ok(bytes)) => {
                manage::receiving(|| codec::decode::<R>(self.key.codec, bytes))
                    .map_err(|error| error.into_result_undecodable(process))
            }
            (Outcome::Reported, Ok(bytes)) => {
                match codec::decode::<Failure>(Codec::Bincode, bytes) {
                    Ok(failure) => Err(failure.into_join_error(process)),
                    Err(error) => Err(undecodable(error.to_string())),
                }
            }
            (cause, Ok(_)) => Err(join_error(process, cause, joining.limits())),
        };
        let carries = joining.carries();
        joining.collect();
        if carries {
            manage::result_gone(runtime);
        }
        result
    }
}

/// Why a process has no result, from what the master noted of its end.
fn join_error(process: ProcessId, cause: Outcome, limits: (u64, u64)) -> JoinError {
    let (memory_bytes, time_ns) = limits;
    match cause {
        Outcome::Exited { code } => JoinError::Exited { process, code },
        Outcome::Killed {
            signal,
            core_dumped,
        } => JoinError::Killed {
            process,
            signal,
            core_dumped,
        },
        Outcome::MemoryLimit => {
            let limit = ExceededLimit::MemoryBytes(memory_bytes);
            JoinError::LimitExceeded { process, limit }
        }
        Outcome::TimeLimit => {
            let limit = ExceededLimit::Time(Duration::from_nanos(time_ns));
            JoinError::LimitExceeded { process, limit }
        }
        Outcome::NotForked { errno } => {
            let reason = manage::fork_refusal(errno);
            JoinError::NotStarted { process, reason }
        }
        Outcome::None | Outcome::Reported | Outcome::ShutDown => JoinError::ShutDown { process },
    }
}

fn claim_error(process: ProcessId, error: ClaimError) -> JoinError {
    match error {
        ClaimError::Never => JoinError::NoSuchProcess { process },
        ClaimError::AlreadyJoined => JoinError::AlreadyJoined { process },
        ClaimError::Detached => JoinError::Detached { process },
    }
}

#[derive(Clone, Copy)]
enum Wait {
    Never,
    Until(Deadline),
    Forever,
}

/// Waits until one of `running` has ended, takes its result, and says which one it was.
///
/// Those that somebody else has joined count as ended, with [`JoinError::AlreadyJoined`].
///
/// ```rust,standalone_crate
/// use netmcore_proc::{Master, join_any, spawn};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let mut master = Master::builder(&directory);
/// let first = master.def_process(|()| {
///     let nap = |ms: u64| std::thread::sleep(Duration::from_millis(ms));
///     let mut running: Vec<_> = [3_600_000, 1].iter().map(|ms| spawn(nap, ms).unwrap()).collect();
///     let (position, outcome) = join_any(&running);
///     outcome.unwrap();
///     running.swap_remove(position); // for the next round: it has been joined
///     running.remove(0).kill().unwrap();
///     position
/// });
/// assert_eq!(master.run(&first, &())?, 1);
/// # Ok(())
/// # }
/// ```
///
/// # Panics
/// If `running` is empty: the wait could never end.
pub fn join_any<R: DeserializeOwned>(running: &[Running<R>]) -> (usize, Result<R, JoinError>) {
    assert!(
        !running.is_empty(),
        "join_any of no processes would wait for ever"
    );
    let first = running[0].key.process;
    if context::role() != Role::Worker {
        return (0, Err(JoinError::NotInMaster { process: first }));
    }
    let Some(runtime) = context::runtime() else {
        return (0, Err(JoinError::NoSuchProcess { process: first }));
    };
    let processes: Vec<ProcessId> = running.iter().map(|one| one.key.process).collect();
    let _in_flight = runtime.control.enter(context::me());
    loop {
        let ended = runtime.control.wait_any(&processes, None, |begins| {
            manage::note_wait(runtime, begins.then_some(WaitsFor::Process(first)));
        });
        let Some(position) = ended else {
            return (0, Err(JoinError::ShutDown { process: first }));
        };
        match running[position].join_nowait() {
            Ok(Some(result)) => return (position, Ok(result)),
            Err(error) => return (position, Err(error)),
            Ok(None) => {}
        }
    }
}

fn start_defined<A: Serialize>(
    key: &PointKey,
    arg: &A,
    options: &StartOptions,
    detached: bool,
) -> Result<ProcessId> {
    let runtime = context::running("start")?;
    if runtime.control.is_fork_point_released(key.index) {
        let expected = Some(ResourceType::ForkPoint);
        return Err(Error::NoResource {
            id: key.fork_point,
            expected,
            found: None,
        });
    }
    let order = Order {
        entry: Entry::Defined(key.index),
        fork_point: key.fork_point.get(),
        join_point: key.join_point.get(),
        codec: key.codec.number(),
        detached: detached || runtime.control.is_join_point_released(key.index),
        memory_limit_bytes: None,
        time_limit_ns: None,
        inherit: InheritOrder::All,
    };
    start(runtime, key.codec, arg, order, options)
}

fn as_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Starts a process: the steps of the module docs.
pub(crate) fn start<A: Serialize + ?Sized>(
    runtime: &Runtime,
    codec: Codec,
    arg: &A,
    order: Order,
    options: &StartOptions,
) -> Result<ProcessId> {
    let control = &runtime.control;
    match control.phase() {
        crate::control::Phase::Running => {}
        _ => return Err(Error::ShutDown),
    }
    if matches!(context::role(), Role::None | Role::Foreign) {
        return Err(Error::NotRunning { call: "start" });
    }
    let me = context::me();
    let _in_flight = control.enter(me);
    let preparing = control.prepare(me)?;
    let (block, handles) =
        worker::encode_block(runtime, codec, arg, preparing.process(), Leg::Argument).map_err(
            |error| match error {
                EncodeError::Codec(error) => error.into_encode(),
                EncodeError::Place(error) => error,
            },
        )?;
    preparing.set_argument(block);
    let mut order = options.limited(order);
    order.inherit = control.place_inherit(&options.inherit, preparing.process(), me)?;
    let (process, must_ring) = preparing.queue(order);
    handles.into_iter().for_each(SentHandle::leave);
    if let Entry::Defined(index) = order.entry
        && !order.detached
        && control.is_join_point_released(index)
    {
        // Released since the order was made: whoever released it may have passed over the slot.
        let _ = control.detach(process, me);
    }
    if must_ring {
        // The process is queued and cannot be taken back; without a doorbell the master finds it when it
        // looks next.
        let _ = runtime.ring();
    }
    Ok(process)
}

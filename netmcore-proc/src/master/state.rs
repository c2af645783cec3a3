//! What the master knows and how it decides: a pure function from events to actions.
//!
//! **Protocol.** `step(event)` changes the state and appends actions; it reads nothing else and does
//! nothing else, so it is tested without any process. The loop (`master::run`) turns what happens into
//! events and performs the actions in order.
//!
//! | phase | left when |
//! |---|---|
//! | `Running` | the first process has ended, an ending signal came, somebody asked, or all wait for ever |
//! | `Asked { kill_at }` (from the next survey on) | all workers are gone, or the grace period is over, or a second signal came |
//! | `Killing` | all workers are gone |
//! | `Over` | never |
//!
//! **Invariants.**
//! 1. A worker index is in use from `Born` to `Settled`, and is not given away between.
//! 2. A resource without a user is handed out for deletion in the same step that took its last use; a region
//!    in the next one, which is told what processes inherit.
//!
//! **If a worker dies** its `Ended` and `Settled` are two events like any other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use netmcore_sys::process::ExitStatus;

use crate::control::{Heirs, Phase, QueueFacts, READY_LIMIT, Settled, WorkerIndex};
use crate::id::{ProcessId, ResourceId};
use crate::resource::{Leg, ResourceRepr, ResourceTable, User};

/// Time on the monotonic clock, in nanoseconds.
pub(crate) type Nanos = u64;

/// How often the memory of limited workers is looked at.
const MEMORY_SAMPLE_NS: Nanos = 50_000_000;
/// How long no ready worker is forked after a fork has failed.
const FORK_PAUSE_NS: Nanos = 1_000_000_000;
/// How many workers are forked before the loop looks at other events again.
const FORKS_PER_ROUND: usize = 64;

/// The limits that a process was started with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Limits {
    pub memory_bytes: Option<u64>,
    pub time_ns: Option<u64>,
}

impl Limits {
    fn is_none(&self) -> bool {
        self.memory_bytes.is_none() && self.time_ns.is_none()
    }
}

/// All that can happen to the master.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// A round of the loop begins.
    Survey { now: Nanos, queue: QueueFacts },
    /// A worker has been forked.
    Born {
        worker: WorkerIndex,
        place: Option<u32>,
        process: Option<ProcessId>,
        limits: Limits,
    },
    /// A fork failed; what it was for has been told.
    NotBorn {
        worker: WorkerIndex,
        place: Option<u32>,
        now: Nanos,
    },
    /// The index was not needed after all.
    Unneeded { worker: WorkerIndex },
    /// A process has failed before it had a worker.
    FailedToStart { process: ProcessId },
    /// A ready worker has taken a process.
    Claimed {
        worker: WorkerIndex,
        process: ProcessId,
        limits: Limits,
    },
    /// A limited process is seen to run since then.
    Started { process: ProcessId, at: Nanos },
    /// The private memory of a limited worker.
    MemoryUsed { process: ProcessId, bytes: u64 },
    /// A worker's exit status has been fetched.
    Ended {
        worker: WorkerIndex,
        status: ExitStatus,
    },
    /// What it left has been settled.
    Settled {
        worker: WorkerIndex,
        settled: Settled,
    },
    /// An ending signal came.
    Signal(i32),
    /// Somebody who may asked for the end of the run.
    ShutdownAsked,
    /// Every worker waits for ever.
    Deadlocked {
        who: Vec<ProcessId>,
        on_what: Vec<String>,
    },
    /// A message with resources in it has arrived, or never will.
    MessageGone { process: ProcessId, leg: Leg },
    /// Resources have changed (by a request, which the loop answers itself).
    ResourcesChanged,
    /// What queued and running processes inherit now.
    Heirs(Heirs),
}

/// All that the master can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// Fork a ready worker for this parking place.
    ForkReady { worker: WorkerIndex, place: u32 },
    /// Nobody is parked there any more, whatever it looks like.
    ClosePlace { place: u32 },
    /// Take the oldest queued process and fork a worker for it.
    ForkForOldest { worker: WorkerIndex },
    /// Settle the slots of a dead worker.
    Settle {
        worker: WorkerIndex,
        status: ExitStatus,
    },
    /// Note why a process is about to be killed, then kill its worker.
    KillFor {
        worker: WorkerIndex,
        process: ProcessId,
        cause: KillCause,
    },
    /// Kill a worker.
    Kill { worker: WorkerIndex },
    /// Enter a phase of the control block and wake everybody.
    EnterPhase(Phase),
    /// Fail all that is queued.
    FailQueued,
    /// Look at the memory of this limited worker.
    SampleMemory {
        worker: WorkerIndex,
        process: ProcessId,
    },
    /// Delete an object that nobody uses any more.
    Destroy(ResourceId, ResourceRepr),
    /// Look who inherits what: there is a region that nobody else uses.
    LookForHeirs,
}

/// Which limit a process has exceeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum KillCause {
    Memory,
    Time,
}

/// Why the run ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum EndReason {
    FirstProcessEnded,
    Signal(i32),
    Asked,
    Deadlock {
        who: Vec<ProcessId>,
        on_what: Vec<String>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RunPhase {
    Running,
    /// `None` until the clock has been read: the time of the last survey may be long past.
    Asked {
        kill_at: Option<Nanos>,
    },
    Killing,
    Over,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Worker {
    place: Option<u32>,
    process: Option<ProcessId>,
}

/// A process with limits.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Limited {
    worker: WorkerIndex,
    limits: Limits,
    /// When it began to run, once that is known.
    started: Option<Nanos>,
    is_being_killed: bool,
}

/// The master's knowledge.
#[derive(Debug)]
pub(crate) struct State {
    phase: RunPhase,
    grace: Duration,
    ready_target: usize,
    first: Option<ProcessId>,
    /// It was over before the loop began.
    has_first_ended: bool,
    end_reason: Option<EndReason>,
    workers: BTreeMap<WorkerIndex, Worker>,
    limited: BTreeMap<ProcessId, Limited>,
    /// Parking places with a worker that has claimed nothing, or is being forked.
    places: BTreeMap<u32, WorkerIndex>,
    /// Indices below `next_index` that no worker has.
    spare: BTreeSet<WorkerIndex>,
    next_index: u32,
    worker_limit: u32,
    now: Nanos,
    no_fork_before: Nanos,
    next_sample: Nanos,
    /// Messages with resources in them that have not arrived.
    messages_under_way: BTreeSet<(ProcessId, Leg)>,
    /// The region of the heap of named objects, of which the master is a user.
    pub(crate) named_heap: Option<ResourceId>,
    pub(crate) resources: ResourceTable,
}

impl State {
    pub(crate) fn new(resources: ResourceTable) -> State {
        State {
            phase: RunPhase::Running,
            grace: Duration::ZERO,
            ready_target: 0,
            first: None,
            has_first_ended: false,
            end_reason: None,
            workers: BTreeMap::new(),
            limited: BTreeMap::new(),
            places: BTreeMap::new(),
            spare: BTreeSet::new(),
            next_index: 1,
            worker_limit: 0,
            now: 0,
            no_fork_before: 0,
            next_sample: 0,
            messages_under_way: BTreeSet::new(),
            named_heap: None,
            resources,
        }
    }

    /// Prepares for a run.
    pub(crate) fn begin(&mut self, grace: Duration, ready_target: usize, worker_limit: usize) {
        self.phase = RunPhase::Running;
        self.grace = grace;
        self.ready_target = ready_target.min(READY_LIMIT);
        self.worker_limit = u32::try_from(worker_limit).unwrap_or(u32::MAX);
        self.first = None;
        self.end_reason = None;
    }

    /// Names the process whose end ends the run, and whether that has come already.
    pub(crate) fn set_first(&mut self, process: ProcessId, has_ended: bool) {
        self.first = Some(process);
        self.has_first_ended = has_ended;
    }

    pub(crate) fn is_over(&self) -> bool {
        self.phase == RunPhase::Over
    }
    pub(crate) fn is_running(&self) -> bool {
        self.phase == RunPhase::Running
    }
    pub(crate) fn end_reason(&self) -> Option<&EndReason> {
        self.end_reason.as_ref()
    }

    /// All live workers.
    pub(crate) fn workers(&self) -> impl Iterator<Item = WorkerIndex> {
        self.workers.keys().copied()
    }
    /// Ready workers that have not been seen to serve a process.
    pub(crate) fn unclaimed(&self) -> impl Iterator<Item = WorkerIndex> {
        self.places.values().copied()
    }
    /// Processes with limits that have not been seen to run.
    pub(crate) fn unstarted(&self) -> impl Iterator<Item = ProcessId> {
        self.limited
            .iter()
            .filter(|(_, limited)| limited.started.is_none())
            .map(|(&process, _)| process)
    }
    /// Whether some process will be killed at a known time, so that nobody waits for ever.
    pub(crate) fn has_time_limits(&self) -> bool {
        self.limited
            .values()
            .any(|limited| limited.limits.time_ns.is_some())
    }
    /// Messages with resources in them that have not arrived, as far as is known.
    pub(crate) fn messages_under_way(&self) -> impl Iterator<Item = (ProcessId, Leg)> {
        self.messages_under_way.iter().copied()
    }
    /// A message with resources in it is about to be sent.
    pub(crate) fn note_message(&mut self, process: ProcessId, leg: Leg) {
        self.messages_under_way.insert((process, leg));
    }

    /// When the loop must look again though nothing has happened.
    pub(crate) fn wake_at(&self) -> Option<Nanos> {
        let mut wake_at = match self.phase {
            RunPhase::Asked { kill_at } => kill_at,
            _ => None,
        };
        let mut sooner = |at: Nanos| wake_at = Some(wake_at.map_or(at, |old: Nanos| old.min(at)));
        if self.is_running() && self.no_fork_before > self.now {
            sooner(self.no_fork_before);
        }
        let is_enforced = matches!(self.phase, RunPhase::Running | RunPhase::Asked { .. });
        for limited in self
            .limited
            .values()
            .filter(|limited| is_enforced && !limited.is_being_killed)
        {
            match limited.started {
                // It has been claimed and will note its start within microseconds.
                None => sooner(self.now + 1_000_000),
                Some(started) => {
                    if let Some(limit) = limited.limits.time_ns {
                        sooner(started.saturating_add(limit));
                    }
                }
            }
            if limited.limits.memory_bytes.is_some() {
                sooner(self.next_sample);
            }
        }
        wake_at
    }

    pub(crate) fn step(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Survey { now, queue } => {
                self.now = now;
                self.survey(queue, actions);
            }
            Event::Born {
                worker,
                place,
                process,
                limits,
            } => {
                self.workers.insert(worker, Worker { place, process });
                if let Some(process) = process {
                    self.limit(worker, process, limits);
                }
            }
            Event::NotBorn { worker, place, now } => {
                self.spare.insert(worker);
                if let Some(place) = place {
                    self.places.remove(&place);
                }
                self.no_fork_before = now + FORK_PAUSE_NS;
            }
            Event::Unneeded { worker } => drop(self.spare.insert(worker)),
            Event::FailedToStart { process } => self.process_ended(process, actions),
            Event::Claimed {
                worker,
                process,
                limits,
            } => {
                if let Some(claimer) = self.workers.get_mut(&worker) {
                    claimer.process = Some(process);
                    if let Some(place) = claimer.place.take() {
                        self.places.remove(&place);
                    }
                    self.limit(worker, process, limits);
                }
            }
            Event::Started { process, at } => {
                if let Some(limited) = self.limited.get_mut(&process) {
                    limited.started = Some(at);
                }
            }
            Event::MemoryUsed { process, bytes } => self.memory_used(process, bytes, actions),
            Event::Ended { worker, status } => actions.push(Action::Settle { worker, status }),
            Event::Settled { worker, settled } => self.settled(worker, settled, actions),
            Event::Signal(signal) => self.signalled(signal, actions),
            Event::ShutdownAsked => self.shut_down(EndReason::Asked, actions),
            Event::Deadlocked { who, on_what } => {
                self.shut_down(EndReason::Deadlock { who, on_what }, actions);
            }
            Event::MessageGone { process, leg } => {
                self.messages_under_way.remove(&(process, leg));
                self.resources.land(process, leg);
                self.destroy_unused(actions);
            }
            Event::ResourcesChanged => self.destroy_unused(actions),
            Event::Heirs(heirs) => {
                let unused = self.resources.take_unused(|id, _| heirs.hold(id));
                actions.extend(unused.into_iter().map(destroy));
            }
        }
    }

    fn limit(&mut self, worker: WorkerIndex, process: ProcessId, limits: Limits) {
        if !limits.is_none() {
            let limited = Limited {
                worker,
                limits,
                started: None,
                is_being_killed: false,
            };
            self.limited.insert(process, limited);
        }
    }

    /// A round begins: serve the queue, refill the parking places, look at limits and at the clock.
    fn survey(&mut self, queue: QueueFacts, actions: &mut Vec<Action>) {
        if self.has_first_ended {
            self.shut_down(EndReason::FirstProcessEnded, actions);
        }
        match self.phase {
            RunPhase::Running => {
                self.serve_queue(queue, actions);
                self.enforce_limits(actions);
            }
            RunPhase::Asked { kill_at } => {
                self.enforce_limits(actions);
                let grace = u64::try_from(self.grace.as_nanos()).unwrap_or(u64::MAX);
                let kill_at = kill_at.unwrap_or(self.now.saturating_add(grace));
                if self.workers.is_empty() {
                    self.phase = RunPhase::Over;
                } else if self.now >= kill_at {
                    self.kill_all(actions);
                } else {
                    self.phase = RunPhase::Asked {
                        kill_at: Some(kill_at),
                    };
                }
            }
            RunPhase::Killing if self.workers.is_empty() => self.phase = RunPhase::Over,
            RunPhase::Killing | RunPhase::Over => {}
        }
    }

    fn serve_queue(&mut self, queue: QueueFacts, actions: &mut Vec<Action>) {
        let unserved = queue.queued.saturating_sub(queue.idle).min(FORKS_PER_ROUND);
        for _ in 0..unserved {
            let Some(worker) = self.free_index() else {
                break;
            };
            actions.push(Action::ForkForOldest { worker });
        }
        if self.now < self.no_fork_before {
            return;
        }
        for place in 0..READY_LIMIT as u32 {
            if self.places.len() >= self.ready_target {
                break;
            }
            if self.places.contains_key(&place) {
                continue;
            }
            let Some(worker) = self.free_index() else {
                break;
            };
            self.places.insert(place, worker);
            actions.push(Action::ForkReady { worker, place });
        }
    }

    /// The lowest index that no worker has; it counts as taken from now on.
    fn free_index(&mut self) -> Option<WorkerIndex> {
        if let Some(index) = self.spare.pop_first() {
            return Some(index);
        }
        let index = (self.next_index < self.worker_limit).then_some(WorkerIndex(self.next_index));
        self.next_index += u32::from(index.is_some());
        index
    }

    fn enforce_limits(&mut self, actions: &mut Vec<Action>) {
        let must_sample = self.now >= self.next_sample;
        for (&process, limited) in &mut self.limited {
            if limited.is_being_killed {
                continue;
            }
            let worker = limited.worker;
            if let (Some(started), Some(limit)) = (limited.started, limited.limits.time_ns)
                && self.now >= started.saturating_add(limit)
            {
                limited.is_being_killed = true;
                actions.push(Action::KillFor {
                    worker,
                    process,
                    cause: KillCause::Time,
                });
            } else if must_sample && limited.limits.memory_bytes.is_some() {
                actions.push(Action::SampleMemory { worker, process });
            }
        }
        if must_sample {
            self.next_sample = self.now + MEMORY_SAMPLE_NS;
        }
    }

    fn memory_used(&mut self, process: ProcessId, bytes: u64, actions: &mut Vec<Action>) {
        let Some(limited) = self.limited.get_mut(&process) else {
            return;
        };
        let exceeded = limited
            .limits
            .memory_bytes
            .is_some_and(|limit| bytes > limit);
        if exceeded && !limited.is_being_killed {
            limited.is_being_killed = true;
            let (worker, cause) = (limited.worker, KillCause::Memory);
            actions.push(Action::KillFor {
                worker,
                process,
                cause,
            });
        }
    }

    fn settled(&mut self, worker: WorkerIndex, settled: Settled, actions: &mut Vec<Action>) {
        if let Some(Worker {
            place: Some(place), ..
        }) = self.workers.remove(&worker)
        {
            self.places.remove(&place);
            actions.push(Action::ClosePlace { place });
        }
        self.spare.insert(worker);
        if let Some(process) = settled.process {
            self.limited.remove(&process);
            self.process_ended(process, actions);
        }
    }

    fn process_ended(&mut self, process: ProcessId, actions: &mut Vec<Action>) {
        self.resources.process_ended(process);
        self.messages_under_way.remove(&(process, Leg::Argument));
        self.destroy_unused(actions);
        if self.first == Some(process) {
            self.shut_down(EndReason::FirstProcessEnded, actions);
        }
    }

    fn signalled(&mut self, signal: i32, actions: &mut Vec<Action>) {
        match self.phase {
            RunPhase::Running => self.shut_down(EndReason::Signal(signal), actions),
            // Whoever presses the key again does not want to wait.
            RunPhase::Asked { .. } => self.kill_all(actions),
            RunPhase::Killing | RunPhase::Over => {}
        }
    }

    fn shut_down(&mut self, reason: EndReason, actions: &mut Vec<Action>) {
        if self.phase != RunPhase::Running {
            return;
        }
        self.end_reason = Some(reason);
        self.phase = RunPhase::Asked { kill_at: None };
        actions.push(Action::EnterPhase(Phase::ShuttingDown));
        actions.push(Action::FailQueued);
    }

    fn kill_all(&mut self, actions: &mut Vec<Action>) {
        self.phase = RunPhase::Killing;
        actions.extend(self.workers.keys().map(|&worker| Action::Kill { worker }));
    }

    fn destroy_unused(&mut self, actions: &mut Vec<Action>) {
        let is_region = |repr: &ResourceRepr| repr.place().is_some();
        let unused = self.resources.take_unused(|_, repr| is_region(repr));
        actions.extend(unused.into_iter().map(destroy));
        if self.resources.has_unused_regions() {
            actions.push(Action::LookForHeirs);
        }
    }

    /// Who speaks when this worker asks for something.
    pub(crate) fn user(&self, worker: WorkerIndex) -> Option<User> {
        self.workers.get(&worker)?.process.map(User::Process)
    }
}

fn destroy((id, repr): (ResourceId, ResourceRepr)) -> Action {
    Action::Destroy(id, repr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const MS: Nanos = 1_000_000;
    const GRACE: Duration = Duration::from_millis(100);
    const ENDED: ExitStatus = ExitStatus::Exited { code: 0 };

    /// A worker as it really is, whatever the state knows of it.
    #[derive(Clone, Debug, Default)]
    struct Body {
        place: Option<u32>,
        process: Option<ProcessId>,
        limits: Limits,
        started: Option<Nanos>,
        killed_for: Option<KillCause>,
        is_killed: bool,
    }

    /// The world around the state: it performs actions, and checks that they may be performed.
    struct World {
        state: State,
        now: Nanos,
        bodies: BTreeMap<WorkerIndex, Body>,
        queue: VecDeque<(ProcessId, Limits)>,
        next_process: u64,
        ready_target: usize,
        worker_limit: u32,
        forks_fail: bool,
        last_failure: Option<Nanos>,
        phases: Vec<Phase>,
    }

    #[derive(Clone, Debug)]
    enum Op {
        Start { limits: Limits },
        ReadyClaims { which: usize },
        NotesStart { which: usize },
        UsesMemory { which: usize, bytes: u64 },
        Ends { which: usize },
        Advance { ms: u64 },
        ForksFail { fail: bool },
        Round,
        Signal,
        ShutdownAsked,
        Deadlocked,
    }

    fn op() -> impl Strategy<Value = Op> {
        let limits = (prop::option::of(1_u64..50), prop::option::of(1_u64..100));
        let limits = limits.prop_map(|(ms, bytes)| Limits {
            memory_bytes: bytes,
            time_ns: ms.map(|ms| ms * MS),
        });
        prop_oneof![
            8 => prop_oneof![Just(Limits::default()), limits].prop_map(|limits| Op::Start { limits }),
            6 => any::<usize>().prop_map(|which| Op::ReadyClaims { which }),
            4 => any::<usize>().prop_map(|which| Op::NotesStart { which }),
            2 => (any::<usize>(), 0_u64..150).prop_map(|(which, bytes)| Op::UsesMemory { which, bytes }),
            5 => any::<usize>().prop_map(|which| Op::Ends { which }),
            3 => (1_u64..60).prop_map(|ms| Op::Advance { ms }),
            1 => any::<bool>().prop_map(|fail| Op::ForksFail { fail }),
            12 => Just(Op::Round),
            1 => prop_oneof![
                30 => Just(Op::Round),
                1 => Just(Op::Signal),
                1 => Just(Op::ShutdownAsked),
                1 => Just(Op::Deadlocked),
            ],
        ]
    }

    impl World {
        fn new(ready_target: usize, worker_limit: u32) -> World {
            let mut state = State::new(ResourceTable::starting_at(1));
            state.begin(GRACE, ready_target, worker_limit as usize);
            World {
                state,
                now: 1,
                bodies: BTreeMap::new(),
                queue: VecDeque::new(),
                next_process: 1,
                ready_target,
                worker_limit,
                forks_fail: false,
                last_failure: None,
                phases: Vec::new(),
            }
        }

        fn idle(&self) -> Vec<WorkerIndex> {
            let idle = |body: &Body| body.place.is_some() && body.process.is_none();
            let bodies = self.bodies.iter().filter(|(_, body)| idle(body));
            bodies.map(|(&worker, _)| worker).collect()
        }

        fn pick(&self, which: usize, from: Vec<WorkerIndex>) -> Option<WorkerIndex> {
            (!from.is_empty()).then(|| from[which % from.len()])
        }

        /// What the loop does with an event.
        fn happen(&mut self, event: Event) {
            let mut events = VecDeque::from([event]);
            while let Some(event) = events.pop_front() {
                let mut actions = Vec::new();
                self.state.step(event, &mut actions);
                for action in actions {
                    self.perform(action, &mut events);
                }
            }
        }

        fn perform(&mut self, action: Action, events: &mut VecDeque<Event>) {
            let is_shutting_down = !self.phases.is_empty();
            match action {
                Action::ForkReady { worker, place } => {
                    assert!(!is_shutting_down, "no forks after the shutdown");
                    assert!((place as usize) < READY_LIMIT);
                    let is_taken = self
                        .bodies
                        .values()
                        .any(|body| body.process.is_none() && body.place == Some(place));
                    assert!(!is_taken, "place {place} is taken");
                    let body = Body {
                        place: Some(place),
                        ..Body::default()
                    };
                    if self.fork(worker, body) {
                        events.push_back(Event::Born {
                            worker,
                            place: Some(place),
                            process: None,
                            limits: Limits::default(),
                        });
                    } else {
                        let (place, now) = (Some(place), self.now);
                        events.push_back(Event::NotBorn { worker, place, now });
                    }
                }
                Action::ForkForOldest { worker } => {
                    assert!(!is_shutting_down, "no forks after the shutdown");
                    let Some((process, limits)) = self.queue.pop_front() else {
                        self.check_index(worker);
                        return events.push_back(Event::Unneeded { worker });
                    };
                    let body = Body {
                        process: Some(process),
                        limits,
                        ..Body::default()
                    };
                    if self.fork(worker, body) {
                        events.push_back(Event::Born {
                            worker,
                            place: None,
                            process: Some(process),
                            limits,
                        });
                    } else {
                        let (place, now) = (None, self.now);
                        events.push_back(Event::NotBorn { worker, place, now });
                        events.push_back(Event::FailedToStart { process });
                    }
                }
                Action::LookForHeirs => events.push_back(Event::Heirs(Heirs::default())),
                Action::Settle { worker, .. } => {
                    let body = self.bodies.remove(&worker).expect("it lived until now");
                    let settled = Settled {
                        process: body.process,
                        in_order: !body.is_killed,
                    };
                    events.push_back(Event::Settled { worker, settled });
                }
                Action::KillFor {
                    worker,
                    process,
                    cause,
                } => {
                    let now = self.now;
                    let body = self.bodies.get_mut(&worker).expect("it lives");
                    assert_eq!(body.process, Some(process));
                    assert_eq!(body.killed_for, None, "killed twice");
                    if cause == KillCause::Time {
                        let end = body.started.unwrap() + body.limits.time_ns.unwrap();
                        assert!(end <= now, "killed too early");
                    }
                    body.killed_for = Some(cause);
                    body.is_killed = true;
                }
                Action::Kill { worker } => {
                    self.bodies.get_mut(&worker).expect("it lives").is_killed = true;
                }
                Action::EnterPhase(phase) => self.phases.push(phase),
                Action::FailQueued => self.queue.clear(),
                Action::SampleMemory { worker, process } => {
                    let body = &self.bodies[&worker];
                    assert_eq!(body.process, Some(process));
                    assert!(body.limits.memory_bytes.is_some());
                }
                Action::ClosePlace { place } => {
                    let is_idle = |worker| self.bodies[&worker].place == Some(place);
                    assert!(!self.idle().into_iter().any(is_idle), "{place} is in use");
                }
                Action::Destroy(id, _) => panic!("{id} was never created"),
            }
        }

        fn check_index(&self, worker: WorkerIndex) {
            assert!(!self.bodies.contains_key(&worker), "{worker:?} is in use");
            assert!((1..self.worker_limit).contains(&worker.0), "{worker:?}");
        }

        fn fork(&mut self, worker: WorkerIndex, body: Body) -> bool {
            self.check_index(worker);
            match self.forks_fail {
                true => self.last_failure = Some(self.now),
                false => drop(self.bodies.insert(worker, body)),
            }
            !self.forks_fail
        }

        fn round(&mut self) {
            let unclaimed: Vec<WorkerIndex> = self.state.unclaimed().collect();
            for worker in unclaimed {
                let body = &self.bodies[&worker];
                if let Some(process) = body.process {
                    let limits = body.limits;
                    self.happen(Event::Claimed {
                        worker,
                        process,
                        limits,
                    });
                }
            }
            let unstarted: Vec<ProcessId> = self.state.unstarted().collect();
            for process in unstarted {
                let mut bodies = self.bodies.values();
                let body = bodies.find(|body| body.process == Some(process));
                if let Some(at) = body.expect("it runs").started {
                    self.happen(Event::Started { process, at });
                }
            }
            let queue = QueueFacts {
                queued: self.queue.len(),
                idle: self.idle().len(),
            };
            let now = self.now;
            self.happen(Event::Survey { now, queue });
            self.check_round(queue);
        }

        fn check_round(&self, before: QueueFacts) {
            let known: Vec<WorkerIndex> = self.state.workers().collect();
            let live: Vec<WorkerIndex> = self.bodies.keys().copied().collect();
            assert_eq!(known, live);
            assert!(self.idle().len() <= self.ready_target, "too many are ready");
            for (worker, body) in &self.bodies {
                let user = self.state.user(*worker);
                assert_eq!(user, body.process.map(User::Process), "{worker:?}");
                let (Some(started), Some(limit)) = (body.started, body.limits.time_ns) else {
                    continue;
                };
                let is_late = started + limit <= self.now;
                let is_over = self.state.is_over() || self.state.phase == RunPhase::Killing;
                assert!(!is_late || body.is_killed || is_over, "{worker:?} is late");
                if !is_late && !body.is_killed && !is_over {
                    let wake_at = self.state.wake_at().expect("there is a limit");
                    assert!(wake_at <= started + limit, "it would sleep too long");
                }
            }
            if !self.state.is_running() {
                return;
            }
            let has_room = self.bodies.len() + 1 < self.worker_limit as usize;
            let pause_end = self.last_failure.map_or(0, |at| at + FORK_PAUSE_NS);
            if has_room && !self.forks_fail {
                let unserved = before.queued.saturating_sub(before.idle);
                let left = before.queued - unserved.min(FORKS_PER_ROUND);
                assert_eq!(self.queue.len(), left, "the queue is served");
                if self.now >= pause_end {
                    assert_eq!(self.idle().len(), self.ready_target, "as many are ready");
                }
            }
            if self.now < pause_end {
                assert!(self.state.wake_at().is_some_and(|at| at <= pause_end));
            }
        }

        fn apply(&mut self, op: Op) {
            let is_over = self.state.is_over();
            let all = || self.bodies.keys().copied().collect::<Vec<_>>();
            match op {
                Op::Start { limits } => {
                    if self.phases.is_empty() {
                        let process = ProcessId::from_raw(self.next_process);
                        self.next_process += 1;
                        self.queue.push_back((process, limits));
                    }
                }
                Op::ReadyClaims { which } => {
                    if let Some(worker) = self.pick(which, self.idle())
                        && let Some((process, limits)) = self.queue.pop_front()
                    {
                        let body = self.bodies.get_mut(&worker).unwrap();
                        body.process = Some(process);
                        body.limits = limits;
                    }
                }
                Op::NotesStart { which } => {
                    if let Some(worker) = self.pick(which, all()) {
                        let body = self.bodies.get_mut(&worker).unwrap();
                        if body.process.is_some() {
                            body.started.get_or_insert(self.now);
                        }
                    }
                }
                Op::UsesMemory { which, bytes } => {
                    if let Some(worker) = self.pick(which, all())
                        && let Some(process) = self.bodies[&worker].process
                    {
                        self.happen(Event::MemoryUsed { process, bytes });
                        let body = &self.bodies[&worker];
                        let is_known = self.state.limited.contains_key(&process);
                        let limit = body.limits.memory_bytes;
                        let exceeds = limit.is_some_and(|limit| bytes > limit);
                        assert!(!exceeds || !is_known || body.is_killed, "it lives on");
                    }
                }
                Op::Ends { which } => {
                    if let Some(worker) = self.pick(which, all()) {
                        let status = ENDED;
                        self.happen(Event::Ended { worker, status });
                    }
                }
                Op::Advance { ms } => self.now += ms * MS,
                Op::ForksFail { fail } => self.forks_fail = fail,
                Op::Round => self.round(),
                Op::Signal => self.happen(Event::Signal(15)),
                Op::ShutdownAsked => self.happen(Event::ShutdownAsked),
                Op::Deadlocked => self.happen(Event::Deadlocked {
                    who: Vec::new(),
                    on_what: Vec::new(),
                }),
            }
            assert!(self.phases.len() <= 1, "the shutdown begins once");
            assert!(!is_over || self.state.is_over(), "over stays over");
            assert!(!self.state.is_over() || self.bodies.is_empty());
        }

        /// Whatever has happened: asked to, it ends, at the latest when the grace period is over and those
        /// that were killed are dead.
        fn end(&mut self) {
            self.happen(Event::ShutdownAsked);
            assert_eq!(self.phases, [Phase::ShuttingDown]);
            assert!(self.state.end_reason().is_some());
            assert_eq!(self.queue, []);
            self.round();
            self.now += GRACE.as_nanos() as Nanos;
            if !self.state.is_over() && self.state.phase != RunPhase::Killing {
                let wake_at = self.state.wake_at();
                assert!(
                    wake_at.is_some_and(|at| at <= self.now),
                    "it would sleep on"
                );
            }
            self.round();
            assert!(
                self.bodies.values().all(|body| body.is_killed),
                "some are spared"
            );
            for worker in self.bodies.keys().copied().collect::<Vec<_>>() {
                let status = ENDED;
                self.happen(Event::Ended { worker, status });
            }
            self.round();
            assert!(self.state.is_over());
            assert_eq!(self.state.wake_at(), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn state_keeps_its_promises_whatever_happens(
            ready_target in 0_usize..5,
            worker_limit in 2_u32..40,
            ops in prop::collection::vec(op(), 1..200),
        ) {
            let mut world = World::new(ready_target, worker_limit);
            for op in ops {
                world.apply(op);
            }
            world.end();
        }
    }

    #[test]
    fn end_of_the_first_process_ends_the_run() {
        for is_known_before in [false, true] {
            let mut world = World::new(1, 10);
            world.round();
            world.apply(Op::Start {
                limits: Limits::default(),
            });
            world.apply(Op::ReadyClaims { which: 0 });
            let first = ProcessId::from_raw(1);
            world.state.set_first(first, is_known_before);
            world.round();
            if is_known_before {
                assert_eq!(world.phases, [Phase::ShuttingDown]);
            }
            for worker in world.bodies.keys().copied().collect::<Vec<_>>() {
                let status = ENDED;
                world.happen(Event::Ended { worker, status });
            }
            assert_eq!(world.phases, [Phase::ShuttingDown]);
            assert_eq!(
                world.state.end_reason(),
                Some(&EndReason::FirstProcessEnded)
            );
            world.round();
            assert!(world.state.is_over());
        }
    }

    #[test]
    fn region_without_users_lives_while_somebody_inherits_it() {
        let mut state = State::new(ResourceTable::starting_at(1));
        let repr = ResourceRepr::PosixShmPreallocated {
            name: netmcore_sys::ObjectName::new("/a").unwrap(),
            at: 1 << 40,
            len_bytes: 4096,
            max_len_bytes: 1 << 30,
        };
        let worker = User::Process(ProcessId::from_raw(1));
        let id = state.resources.insert(repr.clone(), worker).unwrap().id;
        let mut step = |event| {
            let mut actions = Vec::new();
            state.step(event, &mut actions);
            actions
        };
        let heirs = |below, only: &[u64]| {
            Event::Heirs(Heirs {
                below,
                only: only.iter().copied().collect(),
            })
        };
        assert_eq!(step(Event::ResourcesChanged), []);
        let process = ProcessId::from_raw(1);
        // It is asked about whenever a process has ended, until nobody inherits it.
        let ended = Event::FailedToStart { process };
        assert_eq!(step(ended.clone()), [Action::LookForHeirs]);
        assert_eq!(step(heirs(2, &[])), []);
        assert_eq!(step(ended.clone()), [Action::LookForHeirs]);
        assert_eq!(step(heirs(0, &[7, id.get()])), []);
        assert_eq!(step(heirs(1, &[7])), [Action::Destroy(id, repr)]);
        assert_eq!(step(ended), []);
    }

    #[test]
    fn second_signal_kills_at_once() {
        let mut world = World::new(3, 10);
        world.round();
        world.apply(Op::Signal);
        world.round();
        assert!(world.bodies.values().all(|body| !body.is_killed));
        world.apply(Op::Signal);
        assert!(world.bodies.values().all(|body| body.is_killed));
        world.end();
    }

    #[test]
    fn failed_fork_is_not_repeated_at_once() {
        let mut world = World::new(2, 10);
        world.forks_fail = true;
        world.round();
        world.forks_fail = false;
        world.round();
        assert_eq!(world.idle(), [], "too soon");
        world.now += FORK_PAUSE_NS;
        world.round();
        assert_eq!(world.idle().len(), 2);
        world.end();
    }
}

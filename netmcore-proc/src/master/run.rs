//! The master's loop and everything it acts on: `next_event` is the only place that blocks, `state.step`
//! decides, `perform` is the only place that acts.
//!
//! **Protocol.** Each round begins with a survey of the control block, then waits for descriptors: pidfds
//! of workers, the doorbell, ending signals, the admin socket and its connections. No worker can stop
//! the master: sockets do not block, no lock in shared memory is taken, and the record's lock, which a
//! stopped process may hold, is waited for two seconds at the most, after which the request fails. What
//! a worker sent is a claim that is checked; a bad frame closes that worker's connection and nothing else.
//!
//! **Invariants.**
//! 1. A descriptor is removed from the epoll set before it is closed: a fork may hold a copy, which would
//!    keep the event firing for ever.
//! 2. An object is recorded before it is created, and unlinked before its record is dropped.
//!
//! **If a process dies here** (a worker): its pidfd becomes readable, its connection reads end of stream.
//! If the master dies, its workers are killed by the kernel and the next start cleans up by the record.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use netmcore_pmanage::Log;
use netmcore_sem::SemContainer;
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use netmcore_sys::poll::{Epoll, EventFd, Interest};
use netmcore_sys::process::{self, ExitStatus, Pid, PidFd};
use netmcore_sys::shm::{self, Access};
use netmcore_sys::signal::{self, SignalFd};
use netmcore_sys::socket::{self, Listener, Received, Sent};
use netmcore_sys::{NoRecord, Recorder};

use crate::context::Runtime;
use crate::control::{Outcome, Phase, Seen, WaitFacts, WaitsFor, WorkerIndex};
use crate::error::{Error, Result};
use crate::id::{ProcessId, ResourceId};
use crate::master::birth::{self, BirthError, Inheritance};
use crate::master::state::{Action, Event, KillCause, Limits, State};
use crate::own_fd::OwnFd;
use crate::resource::{Leg, ResourceRepr, ResourceType, User};
use crate::wire::{
    self, FrameReader, PAGE_LINES, ProcessLine, RefusedReason, Reply, Request, WireError,
};
use crate::worker::Birth;

/// The tokens of the epoll set: a kind in the high byte, a number below.
const KIND_WORKER: u64 = 1 << 56;
const KIND_CONNECTION: u64 = 2 << 56;
const DOORBELL: u64 = 3 << 56;
const SIGNALS: u64 = 4 << 56;
const LISTENER: u64 = 5 << 56;
const NUMBER: u64 = (1 << 56) - 1;

/// A queue longer than this is not counted further in one round.
const QUEUE_GLANCE: usize = 256;
/// Bytes that are read from a connection before others have their turn: some dozens of requests.
const READ_LEN_BYTES: usize = 4096;
/// Bytes that a connection may leave unread before it is closed.
const UNREAD_LIMIT_BYTES: usize = 4 << 20;

struct Child {
    pid: Pid,
    pidfd: PidFd,
}

struct Connection {
    fd: OwnedFd,
    peer: Peer,
    reader: FrameReader,
    unsent: VecDeque<u8>,
}

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Peer {
    Worker(WorkerIndex),
    /// Another process of the same user (or root): an administrator.
    Administrator,
}

/// What resources are recorded in and created by, in a run or before it.
pub(crate) struct Objects {
    /// `None` with `disable_pmanage`.
    pub(crate) log: Option<Log>,
}

/// Whether a process of the run may still look at the memory of an object that is about to be deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lookers {
    None,
    Some,
}

impl Objects {
    /// Records an object that somebody hands over.
    fn register(&self, repr: &ResourceRepr) -> Result<()> {
        match &self.log {
            Some(log) => Ok(log.register(&repr.kernel_objects())?),
            None => Ok(()),
        }
    }

    fn recorder(&self) -> &dyn Recorder {
        match &self.log {
            Some(log) => log,
            None => &NoRecord,
        }
    }

    /// Unlinks an object, then drops its record. What cannot be unlinked stays in the record. The memory of a region
    /// that no process of the run looks at is given back first, whoever else has it mapped.
    pub(crate) fn destroy(
        &self,
        id: ResourceId,
        repr: &ResourceRepr,
        lookers: Lookers,
    ) -> Vec<Error> {
        tracing::debug!(target: "netmcore", %id, resource = %repr, "a resource is deleted");
        let mut failures = Vec::new();
        if lookers == Lookers::None
            && repr.place().is_some()
            && let Some(name) = repr.shm_name()
        {
            // Gone already, or never created: then there is nothing to give back.
            if let Ok(object) = shm::open(name, Access::ReadWrite) {
                let emptied = shm::set_len(object.as_fd(), 0);
                failures.extend(emptied.err().map(Error::system(format!("emptying {repr}"))));
            }
            crash_point!("proc.run.emptied");
        }
        if let Some(prefix) = repr.container_prefix() {
            let container = SemContainer::open(prefix);
            let outcome = container.and_then(|container| container.unlink(self.recorder()));
            failures.extend(outcome.err().map(Error::from));
        }
        for object in repr.kernel_objects() {
            let outcome = match &self.log {
                Some(log) => log.unlink_this(&object).map(drop).map_err(Error::from),
                None => object
                    .unlink()
                    .map(drop)
                    .map_err(Error::system(format!("deleting {id} ({repr})"))),
            };
            failures.extend(outcome.err());
        }
        for failure in &failures {
            tracing::warn!(target: "netmcore", %id, error = %failure, "an object could not be deleted");
        }
        failures
    }
}

/// Everything a run needs beyond its state.
pub(crate) struct Run {
    pub(crate) runtime: &'static Runtime,
    pub(crate) inheritance: Inheritance,
    base: RawFd,
    epoll: Epoll,
    doorbell: Arc<OwnFd<EventFd>>,
    signals: SignalFd,
    listener: Listener,
    children: BTreeMap<WorkerIndex, Child>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    /// Given up for a moment to turn a connection away when there is no other descriptor.
    spare: Option<OwnedFd>,
    /// Everybody seems to wait for ever, but not all are asleep: looked at again after this time.
    look_again: Option<Duration>,
    /// Why forks are refused altogether: an error of the program, not of the machine.
    pub(crate) fatal: Option<Error>,
}

/// What a look for a deadlock found.
enum Deadlock {
    No,
    /// Nobody seems to have anything to do, but not all are asleep.
    Maybe,
    Found(Event),
}

impl Run {
    pub(crate) fn new(
        runtime: &'static Runtime,
        inheritance: Inheritance,
        base: RawFd,
        doorbell: Arc<OwnFd<EventFd>>,
        listener: Listener,
    ) -> Result<Run> {
        let doing = || Error::system("setting up the master's event loop");
        let epoll = birth::place_fd(Epoll::new().map_err(doing())?, base)?;
        let signals = SignalFd::new(&inheritance.ending_signals()).map_err(doing())?;
        let signals = birth::place_fd(signals, base)?;
        let listener = birth::place_fd(listener, base)?;
        let spare = birth::place_fd(EventFd::new().map_err(doing())?, base)?;
        epoll
            .add(&**doorbell, DOORBELL, Interest::Read)
            .map_err(doing())?;
        epoll
            .add(&signals, SIGNALS, Interest::Read)
            .map_err(doing())?;
        epoll
            .add(&listener, LISTENER, Interest::Read)
            .map_err(doing())?;
        Ok(Run {
            runtime,
            inheritance,
            base,
            epoll,
            doorbell,
            signals,
            listener,
            children: BTreeMap::new(),
            connections: BTreeMap::new(),
            next_connection: 0,
            spare: Some(spare.into()),
            look_again: None,
            fatal: None,
        })
    }

    /// Runs until the state is over.
    pub(crate) fn drive(&mut self, state: &mut State, objects: &Objects) {
        let mut events = VecDeque::new();
        while !state.is_over() {
            self.next_event(state, objects, &mut events);
            self.act(state, objects, &mut events);
        }
    }

    /// Lets the state decide on all events, and does what it decides.
    fn act(&mut self, state: &mut State, objects: &Objects, events: &mut VecDeque<Event>) {
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            tracing::trace!(target: "netmcore", ?event);
            state.step(event, &mut actions);
            for action in actions.drain(..) {
                tracing::trace!(target: "netmcore", ?action);
                self.perform(action, objects, events);
            }
        }
    }

    // ---- what happens -----------------------------------------------------------------------

    /// Fills `events` with at least a survey; blocks until something happens if the last round left
    /// nothing to do.
    fn next_event(&mut self, state: &mut State, objects: &Objects, events: &mut VecDeque<Event>) {
        let survey = self.survey(state);
        let mut actions = Vec::new();
        for event in survey {
            state.step(event, &mut actions);
        }
        let has_acted = !actions.is_empty();
        for action in actions {
            self.perform(action, objects, events);
        }
        if state.is_over() {
            return;
        }
        // However much there is to do, a look at what has happened meanwhile comes between.
        let deadline = match has_acted || !events.is_empty() {
            true => Some(Deadline::after(Duration::ZERO)),
            false => [
                state.wake_at().map(Deadline::from_nanos),
                self.look_again.map(Deadline::after),
            ]
            .into_iter()
            .flatten()
            .min(),
        };
        let mut ready = Vec::new();
        if let Err(error) = self.epoll.wait(&mut ready, deadline) {
            // Only a programming error or a lack of kernel memory; looked at again in the next round.
            tracing::error!(target: "netmcore", %error, "waiting for events failed");
        }
        for event in ready {
            match event.token & !NUMBER {
                KIND_WORKER => {
                    self.worker_ready(WorkerIndex((event.token & NUMBER) as u32), events)
                }
                KIND_CONNECTION => {
                    self.connection_ready(event.token & NUMBER, state, objects, events);
                }
                DOORBELL => drop(self.doorbell.drain()),
                SIGNALS => {
                    while let Ok(Some(info)) = self.signals.read_nonblocking() {
                        events.push_back(Event::Signal(info.signal));
                    }
                }
                LISTENER => self.accept(),
                _ => {}
            }
        }
    }

    /// What the control block shows.
    fn survey(&mut self, state: &State) -> Vec<Event> {
        let control = &self.runtime.control;
        let mut events = Vec::new();
        for worker in state.unclaimed() {
            if let Some(process) = control.process_served_by(worker) {
                events.push(Event::Claimed {
                    worker,
                    process,
                    limits: self.limits_of(process),
                });
            }
        }
        for process in state.unstarted() {
            if let Some(at) = control.started_ns(process) {
                events.push(Event::Started { process, at });
            }
        }
        events.extend(self.messages_gone(state));
        if state.is_running() {
            match self.find_deadlock(state) {
                Deadlock::No => self.look_again = None,
                Deadlock::Maybe => {
                    const LEAST: Duration = Duration::from_millis(1);
                    const MOST: Duration = Duration::from_secs(1);
                    let pause = self.look_again.map_or(LEAST, |pause| (pause * 2).min(MOST));
                    self.look_again = Some(pause);
                }
                Deadlock::Found(event) => events.push(event),
            }
        }
        let now = Deadline::after(Duration::ZERO).as_nanos();
        events.push(Event::Survey {
            now,
            queue: control.queue_facts(QUEUE_GLANCE),
        });
        events
    }

    fn messages_gone(&self, state: &State) -> impl Iterator<Item = Event> {
        let control = &self.runtime.control;
        state
            .messages_under_way()
            .filter(|&(process, leg)| control.is_message_gone(process, leg))
            .map(|(process, leg)| Event::MessageGone { process, leg })
    }

    fn limits_of(&self, process: ProcessId) -> Limits {
        let job = self.runtime.control.job(process);
        Limits {
            memory_bytes: job.memory_limit_bytes,
            time_ns: job.time_limit_ns,
        }
    }

    /// Looks for the state that nobody can leave: every thread of every worker waits without deadline,
    /// nothing is queued, no result is on its way, and all that held for a while.
    ///
    /// Whoever could wake a waiter is itself seen to wait, and a waiter that has been woken is not asleep
    /// any more, whether or not it has had a processor since. So it is enough that all are asleep (asked
    /// second), and that no wait began or ended since the first look (asked last).
    ///
    /// That holds if only workers can wake: a child that one of them has forked has its memory, and may go on
    /// as long as it lives.
    fn find_deadlock(&self, state: &State) -> Deadlock {
        let control = &self.runtime.control;
        let mut waits = Vec::new();
        for worker in state.workers() {
            let Some(process) = control.process_served_by(worker) else {
                continue;
            };
            let wait = control.wait_of(worker);
            if wait.threads == 0 {
                return Deadlock::No;
            }
            waits.push((worker, process, wait));
        }
        let is_waiting = |worker, process| {
            waits
                .iter()
                .any(|&(waiter, its, _)| waiter == worker && its == process)
        };
        if waits.is_empty() || state.has_time_limits() || control.is_anything_pending(is_waiting) {
            return Deadlock::No;
        }
        let is_asleep = |worker: WorkerIndex, threads: u32| {
            let child = self.children.get(&worker)?;
            let asleep = process::sleeping_threads(child.pid).ok()??;
            Some(asleep == threads as usize)
        };
        let all_sleep = waits
            .iter()
            .all(|&(worker, _, wait)| is_asleep(worker, wait.threads) == Some(true));
        let is_for_word = |wait: WaitFacts| !matches!(wait.on, WaitsFor::Process(_));
        let has_children = |worker| {
            let child = self.children.get(&worker);
            child.is_none_or(|child| process::has_live_children(child.pid).unwrap_or(true))
        };
        let others_go_on = all_sleep
            && waits.iter().any(|&(_, _, wait)| is_for_word(wait))
            && (control.has_strangers() || waits.iter().any(|&(worker, ..)| has_children(worker)));
        let has_changed = waits
            .iter()
            .any(|&(worker, _, wait)| control.wait_of(worker) != wait);
        if !all_sleep || has_changed || others_go_on {
            // One that has rung is not asleep yet, or another thread is about to end.
            return Deadlock::Maybe;
        }
        Deadlock::Found(Event::Deadlocked {
            who: waits.iter().map(|&(_, process, _)| process).collect(),
            on_what: waits
                .iter()
                .map(|&(_, _, wait)| self.describe_wait(wait.on, state))
                .collect(),
        })
    }

    /// What is waited for, in words.
    fn describe_wait(&self, on: WaitsFor, state: &State) -> String {
        let place = |at| match state.resources.region_at(at) {
            Some((id, offset)) => format!("{id}+{offset:#x}"),
            None => format!("{at:#x}"),
        };
        match on {
            WaitsFor::Process(process) => process.to_string(),
            WaitsFor::Event { at } => format!("an event at {}", place(at)),
            WaitsFor::Lock { at, owner } => {
                let control = &self.runtime.control;
                let worker = control.tenant(owner);
                let holder = worker.and_then(|worker| control.process_served_by(worker));
                let holder = match (worker, holder) {
                    (Some(WorkerIndex::MASTER), _) => ", held by the master".to_owned(),
                    (_, Some(process)) => format!(", held by {process}"),
                    // It was another's when the wait began.
                    (_, None) => String::new(),
                };
                format!("the lock at {}{holder}", place(at))
            }
        }
    }

    fn worker_ready(&mut self, worker: WorkerIndex, events: &mut VecDeque<Event>) {
        let Some(child) = self.children.get(&worker) else {
            return;
        };
        match child.pidfd.wait_nonblocking() {
            Ok(None) => {}
            Ok(Some(status)) => {
                self.forget_child(worker);
                events.push_back(Event::Ended { worker, status });
            }
            Err(error) => {
                // Somebody else has reaped it, and its status is lost; that it has ended is not.
                tracing::error!(target: "netmcore", pid = %child.pid, %error, "a worker cannot be reaped");
                let status = ExitStatus::Signaled {
                    signal: 0,
                    core_dumped: false,
                };
                self.forget_child(worker);
                events.push_back(Event::Ended { worker, status });
            }
        }
    }

    fn forget_child(&mut self, worker: WorkerIndex) {
        if let Some(child) = self.children.remove(&worker) {
            let _ = self.epoll.remove(&child.pidfd);
        }
        self.close_connections_of(worker);
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept_nonblocking() {
                Ok(Some(fd)) => self.admit(fd),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(target: "netmcore", %error, "a connection cannot be accepted");
                    if !self.turn_away() {
                        return;
                    }
                }
            }
        }
    }

    /// Without a descriptor for it, a connection would stay in the queue and wake the master for ever:
    /// the spare one takes it and closes it. False: that did not help either.
    fn turn_away(&mut self) -> bool {
        if self.spare.take().is_none() {
            return false;
        }
        let turned_away = matches!(self.listener.accept_nonblocking(), Ok(Some(_)));
        self.spare = EventFd::new()
            .and_then(|spare| process::move_above(spare.into(), self.base))
            .ok();
        turned_away
    }

    fn admit(&mut self, fd: OwnedFd) {
        let Ok(credentials) = socket::peer_credentials(&fd) else {
            return;
        };
        let worker = self
            .children
            .iter()
            .find(|(_, child)| Some(child.pid) == credentials.pid)
            .map(|(&worker, _)| worker);
        let peer = match worker {
            Some(worker) => Peer::Worker(worker),
            None if credentials.uid == process::effective_uid() || credentials.uid == 0 => {
                Peer::Administrator
            }
            None => return,
        };
        let Ok(fd) = birth::place_fd(fd, self.base) else {
            return;
        };
        let number = self.next_connection;
        self.next_connection += 1;
        if self
            .epoll
            .add(&fd, KIND_CONNECTION | number, Interest::Read)
            .is_ok()
        {
            let reader = FrameReader::default();
            let unsent = VecDeque::new();
            self.connections.insert(
                number,
                Connection {
                    fd,
                    peer,
                    reader,
                    unsent,
                },
            );
        }
    }

    fn close_connections_of(&mut self, worker: WorkerIndex) {
        let of_worker = |connection: &Connection| connection.peer == Peer::Worker(worker);
        let numbers: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| of_worker(connection))
            .map(|(&number, _)| number)
            .collect();
        for number in numbers {
            self.close_connection(number);
        }
    }

    fn close_connection(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            let _ = self.epoll.remove(&connection.fd);
        }
    }

    fn connection_ready(
        &mut self,
        number: u64,
        state: &mut State,
        objects: &Objects,
        events: &mut VecDeque<Event>,
    ) {
        if !self.flush(number) {
            return self.close_connection(number);
        }
        // One buffer a round: whoever sends more has to let the others have their turn.
        let mut buffer = [0; READ_LEN_BYTES];
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let count = match socket::receive_nonblocking(&connection.fd, &mut buffer) {
            Ok(Received::Bytes(count)) => count,
            Ok(Received::WouldBlock) => return,
            Ok(Received::Closed) | Err(_) => {
                if let Err(error) = connection.reader.finish() {
                    tracing::warn!(target: "netmcore", peer = ?connection.peer, %error, "a connection has ended");
                }
                return self.close_connection(number);
            }
        };
        let mut bytes = &buffer[..count];
        loop {
            let Some(connection) = self.connections.get_mut(&number) else {
                return;
            };
            let peer = connection.peer;
            let frame = connection.reader.push(std::mem::take(&mut bytes));
            let request = match frame.and_then(|frame| frame.map(|f| f.message()).transpose()) {
                Ok(Some(request)) => request,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(target: "netmcore", ?peer, %error, "a connection is closed");
                    self.refuse_foreign(number, &error);
                    return self.close_connection(number);
                }
            };
            let from = match peer {
                Peer::Worker(worker) => state.user(worker),
                Peer::Administrator => None,
            };
            let reply = self.answer(from, request, state, objects, events);
            // All that the request leads to is done when it is answered: what was released is gone.
            self.act(state, objects, events);
            crash_point!("proc.run.done");
            if !self.send(number, &reply) {
                return self.close_connection(number);
            }
        }
    }

    /// A peer that speaks another protocol gets an answer that it understands, where there is one.
    fn refuse_foreign(&mut self, number: u64, error: &WireError) {
        if let (Some(connection), WireError::ForeignProtocol { first_bytes }) =
            (self.connections.get(&number), error)
            && let Some(answer) = wire::sun_rpc_refusal(first_bytes)
        {
            let _ = socket::send_nonblocking(&connection.fd, &answer);
        }
    }

    /// Queues a reply and sends what can be sent now. False: the connection is of no use any more.
    fn send(&mut self, number: u64, reply: &Reply) -> bool {
        let Some(connection) = self.connections.get_mut(&number) else {
            return true;
        };
        match wire::frame(reply) {
            Ok(bytes) => connection.unsent.extend(bytes),
            Err(error) => {
                tracing::error!(target: "netmcore", %error, "a reply cannot be encoded");
                return false;
            }
        }
        connection.unsent.len() <= UNREAD_LIMIT_BYTES && self.flush(number)
    }

    fn flush(&mut self, number: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&number) else {
            return true;
        };
        let had_unsent = !connection.unsent.is_empty();
        while !connection.unsent.is_empty() {
            let bytes = connection.unsent.make_contiguous();
            match socket::send_nonblocking(&connection.fd, bytes) {
                Ok(Sent::Bytes(count)) => drop(connection.unsent.drain(..count)),
                Ok(Sent::WouldBlock) => break,
                Ok(Sent::Closed) | Err(_) => return false,
            }
        }
        let interest = match connection.unsent.is_empty() {
            true => Interest::Read,
            false => Interest::ReadWrite,
        };
        !had_unsent
            || self
                .epoll
                .modify(&connection.fd, KIND_CONNECTION | number, interest)
                .is_ok()
    }

    /// Answers one request. `from` is the user on whose behalf; `None` for an administrator.
    pub(crate) fn answer(
        &mut self,
        from: Option<User>,
        request: Request,
        state: &mut State,
        objects: &Objects,
        events: &mut VecDeque<Event>,
    ) -> Reply {
        match request {
            Request::Hello { .. } => Reply::Done,
            Request::Shutdown => {
                events.push_back(Event::ShutdownAsked);
                Reply::Done
            }
            Request::Kill { process, signal } => self.kill_process(process, signal, events),
            Request::Processes { after } => self.list_processes(after),
            Request::ReleasePoint { id } => self.release_point(id, state),
            Request::Landed { process, leg } => {
                if from != Some(User::Process(process)) || leg != Leg::Argument {
                    let reason = "a message has arrived where its receiver says so".to_owned();
                    return Reply::Refused(RefusedReason::Other(reason));
                }
                events.push_back(Event::MessageGone { process, leg });
                Reply::Done
            }
            request => {
                // A result that was joined before this request must not outlive it.
                events.extend(self.messages_gone(state));
                let sent = match &request {
                    Request::Send { process, leg, .. } => Some((*process, *leg)),
                    _ => None,
                };
                if let Some((process, leg)) = sent {
                    let may_send = match leg {
                        Leg::Argument => self.runtime.control.look(process) == Seen::Unfinished,
                        Leg::Result => from == Some(User::Process(process)),
                    };
                    if !may_send {
                        return Reply::Refused(RefusedReason::NoSuchProcess(process));
                    }
                    state.note_message(process, leg);
                }
                let reply = answer_about_resources(from, request, state, objects);
                // Before the asker knows the id, and can tell it to others.
                let control = &self.runtime.control;
                control.set_next_resource(state.resources.next_id());
                control.set_named_heap(state.named_heap);
                events.push_back(Event::ResourcesChanged);
                reply
            }
        }
    }

    fn kill_process(
        &mut self,
        process: ProcessId,
        signal: i32,
        events: &mut VecDeque<Event>,
    ) -> Reply {
        /// The signals whose default is to end a process: one that is queued ends by no other.
        const ENDING: [i32; 6] = [
            signal::SIGKILL,
            signal::SIGTERM,
            signal::SIGINT,
            signal::SIGHUP,
            signal::SIGQUIT,
            signal::SIGABRT,
        ];
        let control = &self.runtime.control;
        let killed = Outcome::Killed {
            signal,
            core_dumped: false,
        };
        if ENDING.contains(&signal) && control.fail_queued(process, killed) {
            events.push_back(Event::FailedToStart { process });
            return Reply::Done;
        }
        if let Some(child) = control
            .worker_of(process)
            .and_then(|worker| self.children.get(&worker))
            && let Err(error) = child.pidfd.send_signal(signal)
        {
            return Reply::Refused(RefusedReason::Other(error.to_string()));
        }
        match control.look(process) {
            Seen::Never => Reply::Refused(RefusedReason::NoSuchProcess(process)),
            _ => Reply::Done,
        }
    }

    fn release_point(&mut self, id: ResourceId, state: &mut State) -> Reply {
        let control = &self.runtime.control;
        match state.resources.remove_point(id) {
            Ok(ResourceRepr::ForkPoint(index)) => {
                control.release_fork_point(index);
                Reply::Done
            }
            Ok(ResourceRepr::JoinPoint(index)) => {
                control.release_join_point(index);
                control.collect_released(id.get());
                Reply::Done
            }
            Ok(_) => Reply::Done,
            Err(error) => Reply::Refused(error.into()),
        }
    }

    fn list_processes(&self, after: Option<ProcessId>) -> Reply {
        let control = &self.runtime.control;
        let mut lines: Vec<ProcessLine> = control
            .processes()
            .into_iter()
            .filter(|(id, ..)| after.is_none_or(|after| *id > after))
            .map(|(id, state, worker)| ProcessLine {
                id,
                state,
                pid: worker
                    .and_then(|worker| self.children.get(&worker))
                    .map(|child| child.pid.get()),
                started_by: None,
                definition: self.runtime.describe(control.job(id).entry),
            })
            .collect();
        lines.sort_by_key(|line| line.id);
        let more = lines.len() > PAGE_LINES;
        lines.truncate(PAGE_LINES);
        Reply::Processes { lines, more }
    }

    // ---- what is done -----------------------------------------------------------------------

    fn perform(&mut self, action: Action, objects: &Objects, events: &mut VecDeque<Event>) {
        let control = &self.runtime.control;
        match action {
            Action::ForkReady { worker, place } => {
                control.enrol(worker);
                control.open_place(place);
                let image = control.image();
                let birth = Birth::Ready { place, image };
                match self.fork(worker, birth, events) {
                    Ok(()) => events.push_back(Event::Born {
                        worker,
                        place: Some(place),
                        process: None,
                        limits: Limits::default(),
                    }),
                    Err(_) => {
                        control.close_place(place);
                        self.not_born(worker, Some(place), events);
                    }
                }
            }
            Action::ClosePlace { place } => drop(control.close_place(place)),
            Action::ForkForOldest { worker } => self.fork_for_oldest(worker, events),
            Action::Settle { worker, status } => {
                crash_point!("proc.run.reaped");
                let settled = control.settle(worker, status);
                crash_point!("proc.run.settled");
                tracing::debug!(target: "netmcore", worker = worker.0, ?status, process = ?settled.process, "a worker has ended");
                events.push_back(Event::Settled { worker, settled });
            }
            Action::KillFor {
                worker,
                process,
                cause,
            } => {
                let outcome = match cause {
                    KillCause::Memory => Outcome::MemoryLimit,
                    KillCause::Time => Outcome::TimeLimit,
                };
                if control.worker_of(process) == Some(worker) {
                    control.note_kill(worker, outcome);
                    self.kill(worker);
                }
            }
            Action::Kill { worker } => self.kill(worker),
            Action::EnterPhase(phase) => {
                tracing::debug!(target: "netmcore", ?phase, "the run enters a phase");
                control.set_phase(phase);
            }
            Action::FailQueued => {
                for process in control.queued() {
                    control.fail_queued(process, Outcome::ShutDown);
                }
            }
            Action::SampleMemory { worker, process } => {
                if let Some(child) = self.children.get(&worker)
                    && let Ok(used) = process::memory_use(child.pid)
                {
                    events.push_back(Event::MemoryUsed {
                        process,
                        bytes: used.private_bytes(),
                    });
                }
            }
            Action::LookForHeirs => events.push_back(Event::Heirs(control.heirs())),
            Action::Destroy(_, ResourceRepr::ForkPoint(index)) => {
                control.release_fork_point(index);
            }
            Action::Destroy(id, ResourceRepr::JoinPoint(index)) => {
                control.release_join_point(index);
                control.collect_released(id.get());
            }
            Action::Destroy(id, repr) => {
                objects.destroy(id, &repr, Lookers::None);
            }
        }
    }

    fn not_born(&mut self, worker: WorkerIndex, place: Option<u32>, events: &mut VecDeque<Event>) {
        let now = Deadline::after(Duration::ZERO).as_nanos();
        events.push_back(Event::NotBorn { worker, place, now });
        if self.fatal.is_some() {
            events.push_back(Event::ShutdownAsked);
        }
    }

    fn fork_for_oldest(&mut self, worker: WorkerIndex, events: &mut VecDeque<Event>) {
        let control = &self.runtime.control;
        control.enrol(worker);
        let Some(process) = control.claim_for_fork(worker) else {
            // A ready worker was quicker.
            events.push_back(Event::Unneeded { worker });
            return;
        };
        let limits = self.limits_of(process);
        match self.fork(worker, Birth::For(process), events) {
            Ok(()) => {
                events.push_back(Event::Born {
                    worker,
                    place: None,
                    process: Some(process),
                    limits,
                });
            }
            Err(errno) => {
                control.fail_unforked(process, worker, errno);
                self.not_born(worker, None, events);
                events.push_back(Event::FailedToStart { process });
            }
        }
    }

    /// Forks a worker and watches it. After an error (an errno) there is none.
    fn fork(
        &mut self,
        worker: WorkerIndex,
        birth: Birth,
        events: &mut VecDeque<Event>,
    ) -> std::result::Result<(), i32> {
        let reserved = self.reserve_descriptor()?;
        let pid = match birth::fork_worker(self.runtime, worker, birth, &self.inheritance) {
            Ok(pid) => pid,
            Err(BirthError::Errno(errno)) => return Err(errno),
            Err(BirthError::MultiThreaded { threads }) => {
                self.fatal = Some(Error::MultiThreaded { threads });
                return Err(netmcore_sys::Errno::EAGAIN.raw());
            }
        };
        crash_point!("proc.run.forked");
        drop(reserved);
        self.runtime.control.set_unix_pid(worker, pid.get() as u32);
        match self.watch(worker, pid) {
            Ok(pidfd) => {
                tracing::debug!(target: "netmcore", worker = worker.0, %pid, ?birth, "a worker has been forked");
                self.children.insert(worker, Child { pid, pidfd });
                Ok(())
            }
            Err(errno) => {
                // A worker that cannot be watched must not live. It may have begun already.
                let control = &self.runtime.control;
                control.note_kill(worker, Outcome::NotForked { errno });
                if let Ok(status) = process::kill_and_reap(pid)
                    && let Some(process) = control.settle(worker, status).process
                    && matches!(birth, Birth::Ready { .. })
                {
                    events.push_back(Event::FailedToStart { process });
                }
                Err(errno)
            }
        }
    }

    /// Takes a descriptor so that there will be one to watch a worker by, before there is a worker. Two are
    /// needed for a moment, as by [`Run::watch`].
    fn reserve_descriptor(&self) -> std::result::Result<OwnedFd, i32> {
        let any = self.doorbell.as_fd().try_clone_to_owned();
        let any = any.map_err(|error| error.raw_os_error().unwrap_or_default())?;
        process::move_above(any, self.base).map_err(|error| error.errno.raw())
    }

    fn watch(&self, worker: WorkerIndex, pid: Pid) -> std::result::Result<PidFd, i32> {
        let pidfd = PidFd::open(pid).map_err(|error| error.errno.raw())?;
        let pidfd =
            process::move_above(pidfd.into(), self.base).map_err(|error| error.errno.raw())?;
        let pidfd = PidFd::from(pidfd);
        self.epoll
            .add(&pidfd, KIND_WORKER | u64::from(worker.0), Interest::Read)
            .map_err(|error| error.errno.raw())?;
        Ok(pidfd)
    }

    fn kill(&mut self, worker: WorkerIndex) {
        if let Some(child) = self.children.get(&worker) {
            // It fails only if the worker is a zombie already.
            let _ = child.pidfd.send_signal(signal::SIGKILL);
        }
    }

    /// Whether all workers have been reaped.
    pub(crate) fn has_children(&self) -> bool {
        !self.children.is_empty()
    }

    /// Ends all workers at once and waits for them; for a run that failed to begin.
    pub(crate) fn kill_and_reap_all(&mut self) {
        for (worker, child) in std::mem::take(&mut self.children) {
            // It fails only for a worker that is a zombie already, and that is reaped as well.
            let _ = child.pidfd.send_signal(signal::SIGKILL);
            if let Ok(status) = child.pidfd.wait() {
                self.runtime.control.settle(worker, status);
            }
            let _ = self.epoll.remove(&child.pidfd);
        }
    }

    /// Performs an action outside of the loop.
    pub(crate) fn perform_now(&mut self, action: Action, objects: &Objects, state: &mut State) {
        let mut events = VecDeque::new();
        let mut actions = VecDeque::from([action]);
        while let Some(action) = actions.pop_front() {
            self.perform(action, objects, &mut events);
            let mut more = Vec::new();
            for event in events.drain(..) {
                state.step(event, &mut more);
            }
            actions.extend(more);
        }
    }

    pub(crate) fn enter_over(&self) {
        let control = &self.runtime.control;
        // An asker that was in the middle of a start when the shutdown began may have queued it since.
        for process in control.queued() {
            control.fail_queued(process, Outcome::ShutDown);
        }
        control.set_phase(Phase::Over);
    }
}

/// Requests that need only the resource table and the record: they work before and after a run, too.
pub(crate) fn answer_about_resources(
    from: Option<User>,
    request: Request,
    state: &mut State,
    objects: &Objects,
) -> Reply {
    let refuse = |error: Error| Reply::Refused(error.into());
    let administrators_may = matches!(request, Request::Resources { .. });
    let user = match from {
        Some(user) => user,
        None if administrators_may => User::Master,
        None => {
            let reason = "only processes of the run may use its resources".to_owned();
            return Reply::Refused(RefusedReason::Other(reason));
        }
    };
    let resources = &mut state.resources;
    match request {
        Request::Manage(repr) => {
            if matches!(repr.ty(), ResourceType::ForkPoint | ResourceType::JoinPoint) {
                let reason = "fork and join points come from definitions".to_owned();
                return Reply::Refused(RefusedReason::Other(reason));
            }
            match resources.insert(repr.clone(), user) {
                Err(error) => Reply::Refused(error.into()),
                Ok(inserted) => match objects.register(&repr) {
                    Ok(()) => {
                        crash_point!("proc.run.managed");
                        tracing::debug!(target: "netmcore", id = %inserted.id, resource = %repr, ?user, "a resource is managed");
                        Reply::Id(inserted.id)
                    }
                    Err(error) => {
                        if inserted.is_new {
                            let _ = resources.remove(inserted.id, None);
                        } else {
                            let _ = resources.release(inserted.id, user);
                        }
                        refuse(error)
                    }
                },
            }
        }
        Request::Map { id } => match resources.map(id, user) {
            Ok(repr) => Reply::Repr(repr.clone()),
            Err(error) => Reply::Refused(error.into()),
        },
        Request::Unmap { id } => match resources.unmap(id, user) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Refused(error.into()),
        },
        // The first heap that is offered is the run's, until the run ends.
        Request::OfferHeap { id } => {
            if let Some(present) = state.named_heap {
                return Reply::Id(present);
            }
            let expected = Some(ResourceType::PosixShmPreallocated);
            match resources.acquire(id, expected, User::Master) {
                Ok(_) => {
                    crash_point!("proc.run.heap_kept");
                    state.named_heap = Some(id);
                    tracing::debug!(target: "netmcore", %id, "the run has a heap of named objects");
                    Reply::Id(id)
                }
                Err(error) => Reply::Refused(error.into()),
            }
        }
        Request::Get { id, expected } => match resources.acquire(id, expected, user) {
            Ok(repr) => Reply::Repr(repr.clone()),
            Err(error) => Reply::Refused(error.into()),
        },
        Request::Release { id } => match resources.release(id, user) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Refused(error.into()),
        },
        Request::ReleaseAll { with_mappings } => {
            resources.release_all(user, with_mappings);
            Reply::Done
        }
        // Before a run: nothing has been started by the point, or ever will be.
        Request::ReleasePoint { id } => match resources.remove_point(id) {
            Ok(_) => Reply::Done,
            Err(error) => Reply::Refused(error.into()),
        },
        Request::Send { process, leg, ids } => {
            match resources.send(user, process, leg, &ids, |_| false) {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(error.into()),
            }
        }
        Request::DestroyResources => match from {
            Some(User::Master) => destroy_all(state, objects),
            _ => refuse(Error::NotInWorker {
                call: "destroy_resources",
            }),
        },
        Request::Resources { after } => {
            let mut lines = resources.list(after, PAGE_LINES + 1);
            let more = lines.len() > PAGE_LINES;
            lines.truncate(PAGE_LINES);
            Reply::Resources { lines, more }
        }
        other => {
            let reason = format!("{other:?} needs a run, and none is under way");
            Reply::Refused(RefusedReason::Other(reason))
        }
    }
}

fn destroy_all(state: &mut State, objects: &Objects) -> Reply {
    let mut failures = Vec::new();
    state.named_heap = None;
    for (id, repr) in state.resources.destroy_objects() {
        let failed = objects.destroy(id, &repr, Lookers::Some);
        failures.extend(failed.iter().map(|error| wire::with_causes(error)));
    }
    match failures.is_empty() {
        true => Reply::Done,
        false => Reply::Refused(RefusedReason::Other(failures.join("; "))),
    }
}

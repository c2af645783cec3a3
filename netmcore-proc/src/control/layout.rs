//! What lies in the control block: words, cells, tables, and where each begins.
//!
//! **Invariant.** Everything that others can see is an atomic; what a value means is in the protocol of
//! the parent module.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use netmcore_sem::{LockWord, OwnerId};
use netmcore_shm::Block;
use netmcore_sys::process::ExitStatus;

use crate::id::{ProcessId, ResourceId};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"nmcctl01");
/// Most process definitions in one run.
pub(crate) const POINT_LIMIT: usize = 4096;
/// Most threads of workers that take locks at once, apart from the first thread of each.
pub(crate) const THREAD_LIMIT: usize = 4096;
/// Most ready workers: one bit each in [`Header::idle`].
pub(crate) const READY_LIMIT: usize = 64;

/// Index into the worker table; 0 is the master.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct WorkerIndex(pub u32);

impl WorkerIndex {
    pub(crate) const MASTER: WorkerIndex = WorkerIndex(0);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum SlotState {
    Free = 0,
    Preparing = 1,
    Queued = 2,
    Running = 3,
    Done = 4,
    Failed = 5,
    Collected = 6,
}

/// A decoded slot word: `generation:32 | actor:24 | flags:4 | state:4`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Word(pub(super) u64);

impl Word {
    /// Somebody sleeps on the word.
    pub(super) const SLEEPERS: u64 = 1 << 4;
    /// Nobody will join: whoever ends the process frees its slot.
    pub(super) const DETACHED: u64 = 1 << 5;
    /// A `join_any` waits for `completions`.
    pub(super) const ANY: u64 = 1 << 6;
    /// Changed at shutdown, so that a joiner about to sleep sees that something happened.
    pub(super) const KICKED: u64 = 1 << 7;
    pub(super) const STATE: u64 = 0xf;
    pub(super) const ACTOR_SHIFT: u32 = 8;

    pub(super) fn new(generation: u32, state: SlotState, actor: WorkerIndex) -> Word {
        Word(u64::from(generation) << 32 | u64::from(actor.0) << Self::ACTOR_SHIFT | state as u64)
    }
    pub(super) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    pub(super) fn state(self) -> SlotState {
        match self.0 & Self::STATE {
            0 => SlotState::Free,
            1 => SlotState::Preparing,
            2 => SlotState::Queued,
            3 => SlotState::Running,
            4 => SlotState::Done,
            5 => SlotState::Failed,
            _ => SlotState::Collected,
        }
    }
    pub(super) fn actor(self) -> WorkerIndex {
        WorkerIndex((self.0 as u32) >> Self::ACTOR_SHIFT)
    }
    pub(super) fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }
    /// The same generation in another state; flags stay, the actor changes.
    pub(super) fn to(self, state: SlotState, actor: WorkerIndex) -> Word {
        let flags = self.0 & (Self::SLEEPERS | Self::DETACHED | Self::ANY | Self::KICKED);
        Word(Word::new(self.generation(), state, actor).0 | flags)
    }
    pub(super) fn futex_value(self) -> u32 {
        self.0 as u32
    }
    pub(super) fn is_finished(self) -> bool {
        matches!(self.state(), SlotState::Done | SlotState::Failed)
    }
}

/// Why a process failed, as one 64-bit word in its slot: `kind:32 | code:32`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    None,
    /// The `result` block holds an encoded `Failure`.
    Reported,
    /// The worker ended by itself without delivering.
    Exited {
        code: i32,
    },
    Killed {
        signal: i32,
        core_dumped: bool,
    },
    MemoryLimit,
    TimeLimit,
    /// The run ended before it began to run.
    ShutDown,
    /// The fork failed with this errno.
    NotForked {
        errno: i32,
    },
}

impl Outcome {
    pub(super) fn to_word(self) -> u64 {
        let (kind, code) = match self {
            Outcome::None => (0, 0),
            Outcome::Reported => (1, 0),
            Outcome::Exited { code } => (2, code),
            Outcome::Killed {
                signal,
                core_dumped: false,
            } => (3, signal),
            Outcome::Killed {
                signal,
                core_dumped: true,
            } => (4, signal),
            Outcome::MemoryLimit => (5, 0),
            Outcome::TimeLimit => (6, 0),
            Outcome::NotForked { errno } => (7, errno),
            Outcome::ShutDown => (8, 0),
        };
        kind << 32 | u64::from(code as u32)
    }
    pub(super) fn from_word(word: u64) -> Outcome {
        let code = word as u32 as i32;
        match word >> 32 {
            1 => Outcome::Reported,
            2 => Outcome::Exited { code },
            3 => Outcome::Killed {
                signal: code,
                core_dumped: false,
            },
            4 => Outcome::Killed {
                signal: code,
                core_dumped: true,
            },
            5 => Outcome::MemoryLimit,
            6 => Outcome::TimeLimit,
            7 => Outcome::NotForked { errno: code },
            8 => Outcome::ShutDown,
            _ => Outcome::None,
        }
    }
    pub(super) fn from_status(status: ExitStatus) -> Outcome {
        match status {
            ExitStatus::Exited { code } => Outcome::Exited { code },
            ExitStatus::Signaled {
                signal,
                core_dumped,
            } => Outcome::Killed {
                signal,
                core_dumped,
            },
        }
    }
}

/// A block as two words in shared memory. `len + 1` is stored, so that all zero means none.
#[derive(Default)]
#[repr(C)]
pub(super) struct BlockCell {
    pub(super) offset: AtomicU64,
    pub(super) len_plus_one: AtomicU64,
}

impl BlockCell {
    pub(super) fn store(&self, block: Option<Block>) {
        match block {
            None => self.len_plus_one.store(0, Relaxed),
            Some(block) => {
                self.offset.store(block.offset, Relaxed);
                self.len_plus_one.store(block.len + 1, Relaxed);
            }
        }
    }
    pub(super) fn load(&self) -> Option<Block> {
        let len = self.len_plus_one.load(Relaxed).checked_sub(1)?;
        Some(Block {
            offset: self.offset.load(Relaxed),
            len,
        })
    }
}

#[repr(C, align(128))]
pub(super) struct Header {
    pub(super) magic: AtomicU64,
    pub(super) slot_count: AtomicU64,
    pub(super) worker_count: AtomicU64,
    /// See [`Phase`].
    pub(super) phase: AtomicU32,
    /// Which version of the master's memory `start` expects its worker to be a copy of.
    pub(super) image: AtomicU32,
    /// No worker with a higher index has ever lived.
    pub(super) highest_worker: AtomicU32,
    pub(super) next_process: Line<AtomicU64>,
    /// `version:20 | process id:44`: no slot of a smaller id is queued.
    pub(super) cursor: Line<AtomicU64>,
    /// Parked ready workers sleep on it; it counts announcements.
    pub(super) tickets: Line<AtomicU32>,
    /// How many sleep on `tickets`; too high after a death, which costs a wake and nothing else.
    pub(super) ticket_sleepers: AtomicU32,
    /// Bit i: the ready worker of parking place i has claimed nothing yet.
    pub(super) idle: Line<AtomicU64>,
    /// Counts deaths of workers; sleepers that wait for a peer sleep on it too.
    pub(super) deaths: Line<AtomicU32>,
    /// Counts ends of processes that a `join_any` waits for.
    pub(super) completions: Line<AtomicU32>,
    /// Resource ids from here on have not been given out.
    pub(super) next_resource: Line<AtomicU64>,
    /// The region of the run-wide heap of named objects; 0 while there is none.
    pub(super) named_heap: AtomicU64,
    /// Held by the one that makes it.
    pub(super) named_heap_maker: LockWord,
    /// Where the next thread begins to look for a free entry.
    pub(super) thread_hint: AtomicU32,
    /// Not 0: some process takes locks whose death the master does not announce.
    pub(super) has_strangers: AtomicU32,
}

/// A value alone on its cache lines.
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// Where the run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Phase {
    Running = 0,
    /// No new starts; waits end with `ShutDown`.
    ShuttingDown = 1,
    /// All workers are gone; results can still be taken by the master.
    Over = 2,
}

/// What the fast path must know of a process definition.
#[repr(C)]
pub(super) struct Point {
    pub(super) flags: AtomicU32,
}

pub(super) const FORK_RELEASED: u32 = 1;
pub(super) const JOIN_RELEASED: u32 = 2;

#[repr(C, align(128))]
pub(super) struct WorkerEntry {
    /// Raised when the worker is settled: an `OwnerId` with an older generation is dead.
    pub(super) generation: AtomicU32,
    pub(super) unix_pid: AtomicU32,
    /// The process it serves; 0 while it is parked.
    pub(super) process: AtomicU64,
    /// Calls under way in which a slot has this worker as its actor, and [`SIGNED_OFF`].
    pub(super) in_flight: AtomicU32,
    /// `waits begun:16 | threads now in waits without deadline:16`: joins, and waits for words that have lasted.
    pub(super) waiting: AtomicU32,
    /// What the last such wait is for: a process id, or the address of a word.
    pub(super) waits_for: AtomicU64,
    /// Of the word: 0, or `generation << 32 | index + 1` of the owner of a lock; [`NO_WORD`] for a process.
    pub(super) waits_for_owner: AtomicU64,
    /// It is about to exit and has nothing left to settle.
    pub(super) in_order: AtomicU32,
    /// [`HAS_THREADS`], [`ANNOUNCES`]: what the master must do for the owners of locks in it.
    pub(super) owner_flags: AtomicU32,
    /// Why the master kills it: an [`Outcome`].
    pub(super) kill_cause: AtomicU64,
}

#[repr(C, align(128))]
pub(super) struct Slot {
    pub(super) word: AtomicU64,
    /// `generation:32 | (joiner + 1):32`, 0 in the low half while nobody has claimed the result.
    pub(super) joiner: AtomicU64,
    /// Definition index (`entry_kind` 0), or the address of a spawned function (1).
    pub(super) entry: AtomicU64,
    pub(super) entry_kind: AtomicU32,
    pub(super) image: AtomicU32,
    pub(super) fork_point: AtomicU64,
    pub(super) join_point: AtomicU64,
    pub(super) codec: AtomicU32,
    pub(super) flags: AtomicU32,
    pub(super) memory_limit_bytes: AtomicU64,
    pub(super) time_limit_ns: AtomicU64,
    /// Monotonic clock, set when it begins to run; 0 before.
    pub(super) started_ns: AtomicU64,
    pub(super) argument: BlockCell,
    pub(super) result: BlockCell,
    pub(super) panic: BlockCell,
    pub(super) outcome: AtomicU64,
    /// The process inherits all resources below this id; 0: only those in `inherit_only`.
    pub(super) inherit_below: AtomicU64,
    /// Their ids, in a block of its own ([`inherit_tag`](super::inherit_tag)) that stays until the slot is freed.
    pub(super) inherit_only: BlockCell,
}

/// The part of [`Header::cursor`] that is an id; the rest is the version.
pub(super) const CURSOR_ID: u64 = (1 << 44) - 1;

/// In [`WorkerEntry::waits_for_owner`]: it is a process that is waited for.
pub(super) const NO_WORD: u64 = u64::MAX;

/// In [`WorkerEntry::in_flight`]: the worker is exiting.
pub(super) const SIGNED_OFF: u32 = 1 << 31;

/// In [`WorkerEntry::owner_flags`]: threads of it may have entries in the thread table.
pub(super) const HAS_THREADS: u32 = 1;
/// In [`WorkerEntry::owner_flags`]: it has taken locks, and may leave one locked however it ends.
pub(super) const ANNOUNCES: u32 = 2;

/// In [`Slot::flags`]: blocks that no cell names may still carry the process's tag.
pub(super) const SWEEP: u32 = 1;
/// In [`Slot::flags`]: resources are under way in the result, so the master must hear when it is gone.
pub(super) const CARRIES: u32 = 2;

const _: () = {
    assert!(size_of::<WorkerEntry>() == 128);
    assert!(size_of::<Slot>() == 256);
};

/// What a worker runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    /// The definition with this index.
    Defined(u32),
    /// The monomorphised entry of a function without captures, at this address.
    Spawned(u64),
}

/// What an asker writes into a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub entry: Entry,
    /// Raw resource ids; 0 for spawned functions.
    pub fork_point: u64,
    pub join_point: u64,
    pub codec: u32,
    pub detached: bool,
    pub memory_limit_bytes: Option<u64>,
    pub time_limit_ns: Option<u64>,
    pub inherit: InheritOrder,
}

/// What an asker says of the resources that its process inherits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum InheritOrder {
    #[default]
    All,
    /// The ids in this block; none at all without one.
    Only(Option<Block>),
}

/// What queued and running processes inherit, together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Heirs {
    /// Somebody inherits everything below this id.
    pub below: u64,
    /// Somebody inherits each of these.
    pub only: BTreeSet<u64>,
}

impl Heirs {
    pub(crate) fn hold(&self, id: ResourceId) -> bool {
        id.get() < self.below || self.only.contains(&id.get())
    }
}

/// What a worker reads from the slot it serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub process: ProcessId,
    pub entry: Entry,
    pub codec: u32,
    pub argument: Option<Block>,
    pub memory_limit_bytes: Option<u64>,
    pub time_limit_ns: Option<u64>,
}

/// What stands in a slot when somebody looks at it for a process id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    /// No process has had this id yet.
    Never,
    /// It has been joined, or was detached and is over.
    Gone,
    /// Queued or running.
    Unfinished,
    Finished,
}

/// Why a joiner could not claim a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ClaimError {
    Never,
    AlreadyJoined,
    Detached,
}

/// What the end of a worker left to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Settled {
    /// The process it served.
    pub process: Option<ProcessId>,
    /// It held nothing and nobody but its joiners need be woken.
    pub in_order: bool,
}

/// What stands in the queue and in the parking places.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct QueueFacts {
    pub queued: usize,
    /// Ready workers that have claimed nothing.
    pub idle: usize,
}

/// How a worker waits, by its own word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WaitFacts {
    /// Threads in waits without deadline.
    pub threads: u32,
    /// Changes whenever such a wait begins or ends.
    pub word: u32,
    /// What the last such wait is for.
    pub on: WaitsFor,
}

/// What a thread waits for without deadline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WaitsFor {
    /// That the process ends.
    Process(ProcessId),
    /// That this owner, or whoever came after it, unlocks the lock at this address.
    Lock { at: u64, owner: OwnerId },
    /// That somebody notifies the word at this address.
    Event { at: u64 },
}

impl WaitsFor {
    /// For [`WorkerEntry::waits_for`] and [`WorkerEntry::waits_for_owner`].
    pub(super) fn to_words(self) -> (u64, u64) {
        match self {
            WaitsFor::Process(process) => (process.get(), NO_WORD),
            WaitsFor::Lock { at, owner } => {
                let owner = u64::from(owner.generation) << 32 | u64::from(owner.index + 1);
                (at, owner)
            }
            WaitsFor::Event { at } => (at, 0),
        }
    }

    pub(super) fn from_words(what: u64, owner: u64) -> WaitsFor {
        match (owner, (owner as u32).checked_sub(1)) {
            (NO_WORD, _) => WaitsFor::Process(ProcessId::from_raw(what)),
            (_, None) => WaitsFor::Event { at: what },
            (_, Some(index)) => WaitsFor::Lock {
                at: what,
                owner: OwnerId {
                    index,
                    generation: (owner >> 32) as u32,
                },
            },
        }
    }
}

/// Sizes and places, computed once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) points: usize,
    pub(super) workers: usize,
    pub(super) threads: usize,
    pub(super) slots: usize,
    pub(super) heap: usize,
}

impl Layout {
    pub(super) fn new(slot_count: usize, worker_count: usize) -> Layout {
        let points = size_of::<Header>().next_multiple_of(128);
        let workers = (points + POINT_LIMIT * size_of::<Point>()).next_multiple_of(128);
        let threads = workers + worker_count * size_of::<WorkerEntry>();
        let slots = threads + THREAD_LIMIT * size_of::<AtomicU64>();
        let heap = (slots + slot_count * size_of::<Slot>()).next_multiple_of(64 * 1024);
        Layout {
            points,
            workers,
            threads,
            slots,
            heap,
        }
    }
}

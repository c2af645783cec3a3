//! The control block: the memory through which master and workers start, run and join processes.
//!
//! It is an anonymous region (it has no name, so it cannot leak) that the master maps before the
//! first fork and every worker inherits at the same address:
//!
//! ```text
//! Header | Point × 4096 | WorkerEntry × w | Slot × n | heap for arguments and results
//! ```
//!
//! **Protocol.** A process id is the key to its slot: slot `id mod n`, generation `id / n + 1`. One
//! 64-bit word in the slot is the truth about the process; it holds the generation in its high half
//! and, in the half that joiners sleep on, state, flags and the actor of the state:
//!
//! | state | who may change it | actor died: what the master does |
//! |---|---|---|
//! | `Free` | an asker, to `Preparing` | – |
//! | `Preparing(asker)` | the asker, to `Queued` | blocks freed, `Free` |
//! | `Queued` | a ready worker or the master, to `Running` | stays: it has no actor; served by another |
//! | `Running(worker)` | the worker, to `Done` or `Failed` | `Failed(status)`, joiners woken |
//! | `Done`, `Failed` | the joiner that holds `joiner`, to `Collected` | joiner died: `joiner` is cleared |
//! | `Collected(actor)` | the actor, to `Free` | blocks freed, `Free` |
//!
//! The queue of started processes is the sequence of process ids itself: whoever serves the queue
//! walks from `cursor` to `next_process` and takes the first `Queued` slot by one compare-and-swap.
//! `cursor` is a hint, versioned so that nobody can move it past a slot that has just been queued.
//!
//! **Invariants.**
//! 1. Everything here is an atomic; no reference to plain data is ever made from this memory,
//!    except to blocks of the heap by their one holder.
//! 2. Blocks are tagged with the process id they belong to; ids are never used twice, so freeing
//!    all blocks of a process twice is harmless.
//! 3. A slot's fields are written by its `Preparing` asker only, and are constant from `Queued` to
//!    `Free`, except `result`, `outcome` and `panic`, which the `Running` worker writes (or the
//!    master, when that worker is dead).
//! 4. A bit in `idle` is set only for a live worker that has not claimed anything.
//!
//! **If a process dies here** [`Control::settle`] finds every slot whose actor it was and applies the
//! table. It reads only words, never the dead process's memory.
//!
//! **Not here:** what an argument looks like (`codec`), who forks (`master`), what runs (`worker`).
//!
//! # Safety
//! The view dereferences addresses inside a mapping that lives as long as the view (it is unmapped
//! only when the next run in the same program begins, by its owner `Runtime`), is zeroed at birth,
//! properly aligned by `Layout`, and only holds atomics (invariant 1).
#![allow(unsafe_code)]

use std::num::NonZeroU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use netmcore_sem::{OwnerId, Owners};
use netmcore_shm::{AnonRegion, Arena, Block, TaggedHeap};
use netmcore_sys::crash_point;
use netmcore_sys::futex::{self, Deadline};
use netmcore_sys::process::ExitStatus;

use crate::error::Error;
use crate::id::ProcessId;
use crate::resource::Leg;
use crate::wire::ProcessState;

#[cfg(test)]
mod tests;

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!(
    "netmcore-proc needs a 64-bit little-endian target: the futex is the low half of a 64-bit word"
);

const MAGIC: u64 = u64::from_le_bytes(*b"nmcctl01");
/// Most process definitions in one run.
pub(crate) const POINT_LIMIT: usize = 4096;
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
struct Word(u64);

impl Word {
    /// Somebody sleeps on the word.
    const SLEEPERS: u64 = 1 << 4;
    /// Nobody will join: whoever ends the process frees its slot.
    const DETACHED: u64 = 1 << 5;
    /// A `join_any` waits for `completions`.
    const ANY: u64 = 1 << 6;
    /// Changed at shutdown, so that a joiner about to sleep sees that something happened.
    const KICKED: u64 = 1 << 7;
    const STATE: u64 = 0xf;
    const ACTOR_SHIFT: u32 = 8;

    fn new(generation: u32, state: SlotState, actor: WorkerIndex) -> Word {
        Word(u64::from(generation) << 32 | u64::from(actor.0) << Self::ACTOR_SHIFT | state as u64)
    }
    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    fn state(self) -> SlotState {
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
    fn actor(self) -> WorkerIndex {
        WorkerIndex((self.0 as u32) >> Self::ACTOR_SHIFT)
    }
    fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }
    /// The same generation in another state; flags stay, the actor changes.
    fn to(self, state: SlotState, actor: WorkerIndex) -> Word {
        let flags = self.0 & (Self::SLEEPERS | Self::DETACHED | Self::ANY | Self::KICKED);
        Word(Word::new(self.generation(), state, actor).0 | flags)
    }
    fn futex_value(self) -> u32 {
        self.0 as u32
    }
    fn is_finished(self) -> bool {
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
    fn to_word(self) -> u64 {
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
    fn from_word(word: u64) -> Outcome {
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
    fn from_status(status: ExitStatus) -> Outcome {
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
struct BlockCell {
    offset: AtomicU64,
    len_plus_one: AtomicU64,
}

impl BlockCell {
    fn store(&self, block: Option<Block>) {
        match block {
            None => self.len_plus_one.store(0, Relaxed),
            Some(block) => {
                self.offset.store(block.offset, Relaxed);
                self.len_plus_one.store(block.len + 1, Relaxed);
            }
        }
    }
    fn load(&self) -> Option<Block> {
        let len = self.len_plus_one.load(Relaxed).checked_sub(1)?;
        Some(Block {
            offset: self.offset.load(Relaxed),
            len,
        })
    }
}

#[repr(C, align(128))]
struct Header {
    magic: AtomicU64,
    slot_count: AtomicU64,
    worker_count: AtomicU64,
    /// See [`Phase`].
    phase: AtomicU32,
    /// Which version of the master's memory `start` expects its worker to be a copy of.
    image: AtomicU32,
    /// No worker with a higher index has ever lived.
    highest_worker: AtomicU32,
    next_process: Line<AtomicU64>,
    /// `version:20 | process id:44`: no slot of a smaller id is queued.
    cursor: Line<AtomicU64>,
    /// Parked ready workers sleep on it; it counts announcements.
    tickets: Line<AtomicU32>,
    /// How many sleep on `tickets`; too high after a death, which costs a wake and nothing else.
    ticket_sleepers: AtomicU32,
    /// Bit i: the ready worker of parking place i has claimed nothing yet.
    idle: Line<AtomicU64>,
    /// Counts deaths of workers; sleepers that wait for a peer sleep on it too.
    deaths: Line<AtomicU32>,
    /// Counts ends of processes that a `join_any` waits for.
    completions: Line<AtomicU32>,
}

/// A value alone on its cache lines.
#[repr(C, align(128))]
struct Line<T>(T);

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
struct Point {
    flags: AtomicU32,
}

const FORK_RELEASED: u32 = 1;
const JOIN_RELEASED: u32 = 2;

#[repr(C, align(128))]
struct WorkerEntry {
    /// Raised when the worker is settled: an [`OwnerId`] with an older generation is dead.
    generation: AtomicU32,
    unix_pid: AtomicU32,
    /// The process it serves; 0 while it is parked.
    process: AtomicU64,
    /// Calls under way in which a slot has this worker as its actor, and [`SIGNED_OFF`].
    in_flight: AtomicU32,
    /// `waits begun:16 | threads now in waits without deadline:16`.
    waiting: AtomicU32,
    /// The process that the last such wait is for.
    waits_for: AtomicU64,
    /// It is about to exit and has nothing left to settle.
    in_order: AtomicU32,
    /// Why the master kills it: an [`Outcome`].
    kill_cause: AtomicU64,
}

#[repr(C, align(128))]
struct Slot {
    word: AtomicU64,
    /// `generation:32 | (joiner + 1):32`, 0 in the low half while nobody has claimed the result.
    joiner: AtomicU64,
    /// Definition index, or the address of a spawned function with [`ENTRY_SPAWNED`] beside it.
    entry: AtomicU64,
    entry_kind: AtomicU32,
    image: AtomicU32,
    fork_point: AtomicU64,
    join_point: AtomicU64,
    codec: AtomicU32,
    flags: AtomicU32,
    memory_limit_bytes: AtomicU64,
    time_limit_ns: AtomicU64,
    /// Monotonic clock, set when it begins to run; 0 before.
    started_ns: AtomicU64,
    argument: BlockCell,
    result: BlockCell,
    panic: BlockCell,
    outcome: AtomicU64,
}

/// The part of [`Header::cursor`] that is an id; the rest is the version.
const CURSOR_ID: u64 = (1 << 44) - 1;

/// In [`WorkerEntry::in_flight`]: the worker is exiting.
const SIGNED_OFF: u32 = 1 << 31;

/// In [`Slot::flags`]: blocks that no cell names may still carry the process's tag.
const SWEEP: u32 = 1;
/// In [`Slot::flags`]: resources are under way in the result, so the master must hear when it is gone.
const CARRIES: u32 = 2;

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
    pub on: ProcessId,
}

/// Sizes and places, computed once.
#[derive(Clone, Copy, Debug)]
struct Layout {
    points: usize,
    workers: usize,
    slots: usize,
    heap: usize,
}

impl Layout {
    fn new(slot_count: usize, worker_count: usize) -> Layout {
        let points = size_of::<Header>().next_multiple_of(128);
        let workers = (points + POINT_LIMIT * size_of::<Point>()).next_multiple_of(128);
        let slots = workers + worker_count * size_of::<WorkerEntry>();
        let heap = (slots + slot_count * size_of::<Slot>()).next_multiple_of(64 * 1024);
        Layout {
            points,
            workers,
            slots,
            heap,
        }
    }
}

/// A process's view of the control block. Plain addresses: valid in every fork.
pub(crate) struct Control {
    base: *mut u8,
    layout: Layout,
    slot_count: usize,
    worker_count: usize,
    /// Smaller ids belong to earlier runs of the program.
    first_process: u64,
    heap: TaggedHeap,
}

// SAFETY: the view is addresses and sizes; what they point to is atomics only (invariant 1).
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    /// Lays out a new control block in `arena`, for at most `process_limit` processes that are not
    /// yet joined (rounded up to a power of two), with `len_bytes` of address space.
    pub(crate) fn create(
        arena: &Arena,
        process_limit: usize,
        len_bytes: usize,
        first_process: u64,
    ) -> Result<(Control, AnonRegion), Error> {
        let slot_count = process_limit.max(1).next_power_of_two();
        let worker_count = slot_count + READY_LIMIT + 1;
        let layout = Layout::new(slot_count, worker_count);
        let doing = "creating the control block";
        let region = AnonRegion::create(c"netmcore-control", arena, layout.heap + len_bytes)
            .map_err(Error::memory(doing))?;
        let base = region.at();
        // SAFETY: [base + heap, + len) lies in the region, which is zeroed, shared and outlives the
        // view (module docs).
        let heap = unsafe { TaggedHeap::create(base.add(layout.heap), len_bytes) }
            .map_err(Error::memory(doing))?;
        let control = Control {
            base,
            layout,
            slot_count,
            worker_count,
            first_process,
            heap,
        };
        let header = control.header();
        header.slot_count.store(slot_count as u64, Relaxed);
        header.worker_count.store(worker_count as u64, Relaxed);
        header.next_process.0.store(first_process, Relaxed);
        header.cursor.0.store(first_process, Relaxed);
        for index in 0..worker_count {
            control
                .worker(WorkerIndex(index as u32))
                .generation
                .store(1, Relaxed);
        }
        header.magic.store(MAGIC, Release);
        Ok((control, region))
    }

    fn header(&self) -> &Header {
        // SAFETY: in bounds and aligned by Layout; here and there: atomics only; gone: no holder.
        unsafe { &*self.base.cast::<Header>() }
    }
    fn point(&self, index: u32) -> &Point {
        assert!(
            (index as usize) < POINT_LIMIT,
            "process definition {index} is out of range"
        );
        // SAFETY: as in `header`, the index has just been checked.
        unsafe {
            &*self
                .base
                .add(self.layout.points)
                .cast::<Point>()
                .add(index as usize)
        }
    }
    fn worker(&self, index: WorkerIndex) -> &WorkerEntry {
        assert!(
            (index.0 as usize) < self.worker_count,
            "worker {} is out of range",
            index.0
        );
        // SAFETY: as in `header`, the index has just been checked.
        unsafe {
            &*self
                .base
                .add(self.layout.workers)
                .cast::<WorkerEntry>()
                .add(index.0 as usize)
        }
    }
    fn slot_at(&self, index: usize) -> &Slot {
        assert!(index < self.slot_count, "slot {index} is out of range");
        // SAFETY: as in `header`, the index has just been checked.
        unsafe { &*self.base.add(self.layout.slots).cast::<Slot>().add(index) }
    }
    fn futex_of<'a>(&self, slot: &'a Slot) -> &'a AtomicU32 {
        // SAFETY: the low half of the word on a little-endian machine; the kernel alone reads it.
        unsafe { &*(&raw const slot.word).cast::<AtomicU32>() }
    }
    fn key(&self, process: ProcessId) -> (&Slot, u32) {
        let id = process.get();
        let slots = self.slot_count as u64;
        // A number that no process can have must not name another's generation.
        let generation = u32::try_from((id / slots).saturating_add(1)).unwrap_or(u32::MAX);
        (self.slot_at((id % slots) as usize), generation)
    }
    fn process_of(&self, slot_index: usize, generation: u32) -> ProcessId {
        ProcessId::from_raw(
            (u64::from(generation) - 1) * self.slot_count as u64 + slot_index as u64,
        )
    }

    /// The process in a slot, with its word. None: the slot is free, or its word is garbage that a
    /// process of this run cannot have.
    fn occupant(&self, slot_index: usize) -> Option<(ProcessId, Word)> {
        let word = Word(self.slot_at(slot_index).word.load(SeqCst));
        if word.state() == SlotState::Free || word.generation() == 0 {
            return None;
        }
        let process = self.process_of(slot_index, word.generation());
        (process.get() >= self.first_process).then_some((process, word))
    }

    /// The slots that have ever been used: walks of the table need not touch the others.
    fn used_slots(&self) -> impl Iterator<Item = usize> + use<> {
        let slots = self.slot_count as u64;
        let first = self.first_process;
        let used = self.next_process().saturating_sub(first).min(slots);
        (first..first + used).map(move |id| (id % slots) as usize)
    }

    /// Allocates a block of `len_bytes` for `process`.
    pub(crate) fn place(
        &self,
        len_bytes: usize,
        process: ProcessId,
        me: WorkerIndex,
    ) -> Result<Place<'_>, Error> {
        let tag = tag_of(process);
        let block = self
            .heap
            .alloc(len_bytes, tag, &self.owners(me))
            .map_err(Error::memory("allocating memory for a value to send"))?;
        Ok(Place {
            heap: &self.heap,
            tag,
            block,
            is_kept: false,
        })
    }

    /// The content of a published block.
    pub(crate) fn bytes(&self, block: Block) -> Result<&[u8], netmcore_shm::Error> {
        // SAFETY: in bounds: checked by the heap; here and there: a published block is not written again
        // until it is freed, which only its one holder does (invariant 2); gone: a dead holder's blocks
        // are freed by the master only after it has ended.
        unsafe { self.heap.bytes(block) }
    }

    /// Frees a block of `process`, unless that has happened already.
    pub(crate) fn free_block(&self, block: Block, process: ProcessId) {
        self.heap.free(block, tag_of(process));
    }
    pub(crate) fn worker_limit(&self) -> usize {
        self.worker_count
    }
    /// Where the ids of a next run can begin. A number that no run can reach is garbage that a worker has
    /// written, and is not carried on.
    pub(crate) fn id_after_the_run(&self) -> u64 {
        let next = self.next_process();
        match next <= CURSOR_ID / 2 {
            true => next,
            false => self.first_process + self.slot_count as u64,
        }
    }
    /// The id that the next process will have at the least.
    pub(crate) fn next_process(&self) -> u64 {
        self.header().next_process.0.load(Relaxed)
    }

    // ---- the run ----------------------------------------------------------------------------

    pub(crate) fn phase(&self) -> Phase {
        match self.header().phase.load(SeqCst) {
            0 => Phase::Running,
            1 => Phase::ShuttingDown,
            _ => Phase::Over,
        }
    }

    /// Enters a phase and wakes everybody who sleeps, so that they look at it.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.header().phase.store(phase as u32, SeqCst);
        for index in self.used_slots() {
            let slot = self.slot_at(index);
            let word = Word(slot.word.load(SeqCst));
            if word.has(Word::SLEEPERS) {
                slot.word.fetch_xor(Word::KICKED, SeqCst);
                futex::wake_all(self.futex_of(slot));
            }
        }
        self.wake_sleepers_of_all();
    }

    /// Wakes everybody who sleeps on a word that is not a slot.
    fn wake_sleepers_of_all(&self) {
        let header = self.header();
        for word in [&header.tickets.0, &header.deaths.0, &header.completions.0] {
            word.fetch_add(1, SeqCst);
            futex::wake_all(word);
        }
    }

    pub(crate) fn image(&self) -> u32 {
        self.header().image.load(Acquire)
    }
    /// Says that the master's memory has changed in a way that later workers must see.
    pub(crate) fn advance_image(&self) {
        self.header().image.fetch_add(1, SeqCst);
        self.header().tickets.0.fetch_add(1, SeqCst);
        futex::wake_all(&self.header().tickets.0);
    }

    pub(crate) fn release_fork_point(&self, index: u32) -> bool {
        self.point(index).flags.fetch_or(FORK_RELEASED, SeqCst) & FORK_RELEASED == 0
    }
    pub(crate) fn release_join_point(&self, index: u32) -> bool {
        self.point(index).flags.fetch_or(JOIN_RELEASED, SeqCst) & JOIN_RELEASED == 0
    }
    pub(crate) fn is_fork_point_released(&self, index: u32) -> bool {
        self.point(index).flags.load(SeqCst) & FORK_RELEASED != 0
    }
    pub(crate) fn is_join_point_released(&self, index: u32) -> bool {
        self.point(index).flags.load(SeqCst) & JOIN_RELEASED != 0
    }

    // ---- asking for a process ---------------------------------------------------------------

    /// Takes a free slot for a new process: `Free → Preparing(asker)`.
    pub(crate) fn prepare(&self, asker: WorkerIndex) -> Result<Preparing<'_>, Error> {
        let header = self.header();
        let mut next = header.next_process.0.load(SeqCst);
        loop {
            for id in next..next + self.slot_count as u64 {
                let process = ProcessId::from_raw(id);
                let (slot, generation) = self.key(process);
                let word = Word(slot.word.load(Acquire));
                if word.state() == SlotState::Free && word.generation() < generation {
                    let claimed = Word::new(generation, SlotState::Preparing, asker);
                    // First, so that whoever walks the used slots finds the claim. If it fails, the id
                    // is never used.
                    header.next_process.0.fetch_max(id + 1, SeqCst);
                    if slot
                        .word
                        .compare_exchange(word.0, claimed.0, SeqCst, Relaxed)
                        .is_ok()
                    {
                        crash_point!("proc.control.prepare");
                        slot.joiner.store(u64::from(generation) << 32, Relaxed);
                        for cell in [&slot.argument, &slot.result, &slot.panic] {
                            cell.store(None);
                        }
                        slot.outcome.store(0, Relaxed);
                        slot.flags.store(0, Relaxed);
                        slot.started_ns.store(0, Relaxed);
                        return Ok(Preparing {
                            control: self,
                            slot,
                            process,
                            asker,
                            queued: false,
                        });
                    }
                }
            }
            // While others start processes, slots that are free may have been passed over.
            match header.next_process.0.load(SeqCst) {
                same if same == next => break,
                later => next = later,
            }
        }
        Err(Error::ProcessTableFull {
            limit: self.slot_count,
        })
    }

    /// Tells whoever can serve it that something is queued from `process` on. True: no ready worker
    /// is idle, so the master must be told.
    fn announce(&self, process: ProcessId) -> bool {
        self.lower_cursor(process);
        crash_point!("proc.control.announce");
        let header = self.header();
        if header.idle.0.load(SeqCst) == 0 {
            return true;
        }
        header.tickets.0.fetch_add(1, SeqCst);
        if header.ticket_sleepers.load(SeqCst) > 0 {
            futex::wake(&header.tickets.0, 1);
        }
        false
    }

    /// Makes sure that the walk of the queue begins at `process` or before, and that no walk under
    /// way moves the cursor past it.
    fn lower_cursor(&self, process: ProcessId) {
        let cursor = &self.header().cursor.0;
        let mut old = cursor.load(SeqCst);
        loop {
            let version = (old & !CURSOR_ID).wrapping_add(CURSOR_ID + 1);
            let new = version | (old & CURSOR_ID).min(process.get());
            match cursor.compare_exchange_weak(old, new, SeqCst, SeqCst) {
                Ok(_) => return,
                Err(seen) => old = seen,
            }
        }
    }

    /// The oldest queued process, if any. Moves the cursor over what is served.
    fn oldest_queued(&self) -> Option<(ProcessId, Word)> {
        let cursor = self.header().cursor.0.load(SeqCst);
        let begin = cursor & CURSOR_ID;
        let end = self.header().next_process.0.load(SeqCst);
        let found = self.first_queued(begin, end);
        let served_up_to = found.map_or(end, |(process, _)| process.get());
        if served_up_to > begin && served_up_to <= CURSOR_ID {
            let moved = (cursor & !CURSOR_ID) | served_up_to;
            let _ = self
                .header()
                .cursor
                .0
                .compare_exchange(cursor, moved, SeqCst, Relaxed);
        }
        found
    }

    /// Walks the ids, or all slots if those are fewer. A slot that is being prepared is passed over: its
    /// asker lowers the cursor when it is queued.
    fn first_queued(&self, begin: u64, end: u64) -> Option<(ProcessId, Word)> {
        if end.saturating_sub(begin) > self.slot_count as u64 {
            return self
                .used_slots()
                .filter_map(|index| self.occupant(index))
                .filter(|(_, word)| word.state() == SlotState::Queued)
                .min_by_key(|(process, _)| *process);
        }
        (begin..end).find_map(|id| {
            let process = ProcessId::from_raw(id);
            let (slot, generation) = self.key(process);
            let word = Word(slot.word.load(SeqCst));
            (word.generation() == generation && word.state() == SlotState::Queued)
                .then_some((process, word))
        })
    }

    /// Takes the oldest queued process: `Queued → Running(worker)`. A worker that is a copy of an
    /// older master than a start asked for takes nothing.
    pub(crate) fn claim_oldest(&self, worker: WorkerIndex, image: u32) -> Option<Job> {
        loop {
            let (process, word) = self.oldest_queued()?;
            let (slot, _) = self.key(process);
            if slot.image.load(Relaxed) > image {
                return None;
            }
            let running = word.to(SlotState::Running, worker);
            if slot
                .word
                .compare_exchange(word.0, running.0, SeqCst, Relaxed)
                .is_ok()
            {
                self.worker(worker).process.store(process.get(), SeqCst);
                return Some(self.job(process));
            }
        }
    }

    pub(crate) fn job(&self, process: ProcessId) -> Job {
        let (slot, _) = self.key(process);
        let entry = slot.entry.load(Relaxed);
        let limit = |cell: &AtomicU64| Some(cell.load(Relaxed)).filter(|&limit| limit > 0);
        Job {
            process,
            entry: match slot.entry_kind.load(Relaxed) {
                0 => Entry::Defined(entry as u32),
                _ => Entry::Spawned(entry),
            },
            codec: slot.codec.load(Relaxed),
            argument: slot.argument.load(),
            memory_limit_bytes: limit(&slot.memory_limit_bytes),
            time_limit_ns: limit(&slot.time_limit_ns),
        }
    }

    pub(crate) fn is_anything_queued(&self) -> bool {
        self.oldest_queued().is_some()
    }

    /// Counts the queue, up to `enough`, and the idle ready workers.
    pub(crate) fn queue_facts(&self, enough: usize) -> QueueFacts {
        let queued = match self.oldest_queued() {
            None => 0,
            Some((first, _)) => {
                let last = self.next_process().saturating_sub(1);
                // Ids beyond one round of the table come to the same slots again.
                (first.get()..=last.min(first.get() + self.slot_count as u64 - 1))
                    .filter(|&id| {
                        let (slot, _) = self.key(ProcessId::from_raw(id));
                        Word(slot.word.load(SeqCst)).state() == SlotState::Queued
                    })
                    .take(enough)
                    .count()
            }
        };
        QueueFacts {
            queued,
            idle: self.header().idle.0.load(SeqCst).count_ones() as usize,
        }
    }

    // ---- ready workers ----------------------------------------------------------------------

    /// A parking place that is marked idle by the master before it forks the worker for it.
    pub(crate) fn open_place(&self, place: u32) {
        self.header().idle.0.fetch_or(1 << place, SeqCst);
    }
    /// The place's worker claims something, or is gone. True: no idle worker is left.
    pub(crate) fn close_place(&self, place: u32) -> bool {
        self.header().idle.0.fetch_and(!(1 << place), SeqCst) & !(1 << place) == 0
    }

    /// What a parked worker does until there is something to serve.
    pub(crate) fn park(&self, worker: WorkerIndex, place: u32, image: u32) -> Parked {
        let header = self.header();
        loop {
            let ticket = header.tickets.0.load(SeqCst);
            if self.phase() != Phase::Running || self.image() != image {
                self.close_place(place);
                return Parked::Retire;
            }
            if self.is_anything_queued() {
                let was_last = self.close_place(place);
                crash_point!("proc.control.park");
                if let Some(job) = self.claim_oldest(worker, image) {
                    return Parked::Serve { job, was_last };
                }
                if self.image() != image {
                    return Parked::Retire;
                }
                self.open_place(place);
                // Queued between the walk and the mark, its asker saw no idle worker and told the
                // master; looking once more costs less than waiting for a fork.
                if self.is_anything_queued() {
                    continue;
                }
            }
            header.ticket_sleepers.fetch_add(1, SeqCst);
            futex::wait(&header.tickets.0, ticket, None);
            header.ticket_sleepers.fetch_sub(1, SeqCst);
        }
    }

    /// Wakes all parked workers, after a death that may have swallowed a wake.
    pub(crate) fn wake_parked(&self) {
        self.header().tickets.0.fetch_add(1, SeqCst);
        futex::wake_all(&self.header().tickets.0);
    }

    // ---- delivering -------------------------------------------------------------------------

    /// Notes when the process began to run, for its time limit.
    pub(crate) fn note_start(&self, process: ProcessId, now_ns: u64) {
        self.key(process).0.started_ns.store(now_ns.max(1), Release);
    }
    /// When it began to run, if it runs now.
    pub(crate) fn started_ns(&self, process: ProcessId) -> Option<u64> {
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(Acquire));
        let running = word.generation() == generation && word.state() == SlotState::Running;
        Some(slot.started_ns.load(Acquire)).filter(|&ns| running && ns > 0)
    }

    /// The argument has been decoded: its block is free again.
    pub(crate) fn free_argument(&self, process: ProcessId) {
        let (slot, _) = self.key(process);
        if let Some(block) = slot.argument.load() {
            slot.argument.store(None);
            self.heap.free(block, tag_of(process));
        }
    }

    /// Notes what a panic left to say, in case the process does not survive it. Whoever calls this or
    /// [`Control::drop_panic_note`] is the only one who does.
    pub(crate) fn note_panic(&self, process: ProcessId, block: Option<Block>) {
        let (slot, _) = self.key(process);
        let old = slot.panic.load();
        slot.panic.store(block);
        if let Some(old) = old {
            self.free_block(old, process);
        }
    }
    /// The process does not die of the panic that was noted. Async-signal-safe: the block is freed with
    /// all others when the process has died of what it does die of.
    pub(crate) fn forget_panic(&self, process: ProcessId) {
        self.key(process).0.panic.store(None);
    }
    /// Notes a cause that the exit status will not tell, if `worker` still runs the process.
    /// Async-signal-safe.
    pub(crate) fn note_outcome(&self, process: ProcessId, worker: WorkerIndex, outcome: Outcome) {
        if self.worker_of(process) == Some(worker) {
            let (slot, _) = self.key(process);
            slot.outcome.store(outcome.to_word(), Release);
        }
    }
    /// Notes why the master is about to kill a worker.
    pub(crate) fn note_kill(&self, worker: WorkerIndex, cause: Outcome) {
        self.worker(worker)
            .kill_cause
            .store(cause.to_word(), Relaxed);
    }

    /// Frees all that the process has, except its slot: it has failed, and only that is left to say.
    pub(crate) fn drop_blocks(&self, process: ProcessId) {
        let (slot, _) = self.key(process);
        for cell in [&slot.argument, &slot.result, &slot.panic] {
            cell.store(None);
        }
        self.heap.free_all(tag_of(process));
    }

    /// Ends the process that `worker` serves: `Running → Done` with its result, or `→ Failed` with
    /// an encoded failure. If nobody will join, the slot is freed at once.
    pub(crate) fn deliver(
        &self,
        process: ProcessId,
        worker: WorkerIndex,
        succeeded: bool,
        block: Option<Block>,
    ) {
        let (slot, generation) = self.key(process);
        slot.result.store(block);
        let (state, outcome) = match succeeded {
            true => (SlotState::Done, Outcome::None),
            false => (SlotState::Failed, Outcome::Reported),
        };
        slot.outcome.store(outcome.to_word(), Relaxed);
        crash_point!("proc.control.deliver");
        self.finish(slot, generation, SlotState::Running, Some(worker), state);
    }

    /// Moves a slot from `from` (of `actor`) to `Done` or `Failed` and wakes its joiners. False if
    /// it was not in that state.
    fn finish(
        &self,
        slot: &Slot,
        generation: u32,
        from: SlotState,
        actor: Option<WorkerIndex>,
        to: SlotState,
    ) -> bool {
        let mut word = Word(slot.word.load(Acquire));
        loop {
            let mine = word.generation() == generation
                && word.state() == from
                && actor.is_none_or(|actor| word.actor() == actor);
            if !mine {
                return false;
            }
            let next = if word.has(Word::DETACHED) {
                word.to(SlotState::Collected, actor.unwrap_or(WorkerIndex::MASTER))
            } else {
                word.to(to, WorkerIndex::MASTER)
            };
            match slot
                .word
                .compare_exchange_weak(word.0, next.0, SeqCst, Acquire)
            {
                Ok(_) => break,
                Err(seen) => word = Word(seen),
            }
        }
        crash_point!("proc.control.finish");
        if word.has(Word::DETACHED) {
            self.free_slot(slot, generation);
        }
        self.wake_joiners(slot, word);
        true
    }

    fn wake_joiners(&self, slot: &Slot, word: Word) {
        if word.has(Word::SLEEPERS) {
            futex::wake_all(self.futex_of(slot));
        }
        if word.has(Word::ANY) {
            self.header().completions.0.fetch_add(1, SeqCst);
            futex::wake_all(&self.header().completions.0);
        }
    }

    /// `Collected → Free`: frees the blocks, then the slot.
    fn free_slot(&self, slot: &Slot, generation: u32) {
        let index = self.index_of(slot);
        let tag = tag_of(self.process_of(index, generation));
        for cell in [&slot.argument, &slot.result, &slot.panic] {
            if let Some(block) = cell.load() {
                self.heap.free(block, tag);
            }
        }
        if slot.flags.load(Relaxed) & SWEEP != 0 {
            self.heap.free_all(tag);
        }
        crash_point!("proc.control.free_slot");
        slot.word.store(
            Word::new(generation, SlotState::Free, WorkerIndex::MASTER).0,
            SeqCst,
        );
    }

    fn index_of(&self, slot: &Slot) -> usize {
        ((&raw const *slot).addr() - self.base.addr() - self.layout.slots) / size_of::<Slot>()
    }

    // ---- joining ----------------------------------------------------------------------------

    /// What stands in the slot of `process` now.
    pub(crate) fn look(&self, process: ProcessId) -> Seen {
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(Acquire));
        if word.generation() < generation {
            let known = (self.first_process..self.next_process()).contains(&process.get());
            return if known { Seen::Gone } else { Seen::Never };
        }
        if word.generation() > generation {
            return Seen::Gone;
        }
        match word.state() {
            SlotState::Free | SlotState::Collected => Seen::Gone,
            SlotState::Done | SlotState::Failed => Seen::Finished,
            _ => Seen::Unfinished,
        }
    }

    /// The join point that the process was started for (raw resource id, 0 for spawned ones).
    pub(crate) fn join_point_of(&self, process: ProcessId) -> u64 {
        self.key(process).0.join_point.load(Relaxed)
    }

    /// Whether `process` has finished, for somebody who would not wait; without claiming anything, so that
    /// whoever would wait is not turned away meanwhile.
    pub(crate) fn peek(&self, process: ProcessId) -> Result<bool, ClaimError> {
        let (slot, generation) = self.key(process);
        let is_unfinished = self.look(process) == Seen::Unfinished;
        let is_detached = Word(slot.word.load(Acquire)).has(Word::DETACHED);
        let joiner = slot.joiner.load(Acquire);
        // What was read is of this process only if it is still there.
        if !is_unfinished || self.look(process) != Seen::Unfinished {
            return Ok(true);
        }
        match joiner == u64::from(generation) << 32 {
            true => Ok(false),
            false if is_detached => Err(ClaimError::Detached),
            false => Err(ClaimError::AlreadyJoined),
        }
    }

    /// Claims the result of `process` for `joiner`, finished or not. Exactly one claim succeeds.
    pub(crate) fn claim_result(
        &self,
        process: ProcessId,
        joiner: WorkerIndex,
    ) -> Result<Joining<'_>, ClaimError> {
        match self.look(process) {
            Seen::Never => return Err(ClaimError::Never),
            Seen::Gone => return Err(ClaimError::AlreadyJoined),
            Seen::Unfinished | Seen::Finished => {}
        }
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(Acquire));
        if word.state() == SlotState::Preparing {
            // Its asker has yet to store the word, without the flags that a claimant would set.
            return Err(ClaimError::Never);
        }
        if word.has(Word::DETACHED) {
            return Err(ClaimError::Detached);
        }
        let free = u64::from(generation) << 32;
        let mine = free | u64::from(joiner.0 + 1);
        if slot
            .joiner
            .compare_exchange(free, mine, SeqCst, Relaxed)
            .is_err()
        {
            return Err(ClaimError::AlreadyJoined);
        }
        crash_point!("proc.control.claimed");
        Ok(Joining {
            control: self,
            slot,
            generation,
            process,
            mine,
            done: false,
        })
    }

    /// Whether the argument or result of `process` is not on its way any more: it has arrived, or it
    /// never will.
    pub(crate) fn is_message_gone(&self, process: ProcessId, leg: Leg) -> bool {
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(Acquire));
        if word.generation() != generation {
            return true;
        }
        match (word.state(), leg) {
            (SlotState::Free | SlotState::Collected | SlotState::Failed, _) => true,
            (SlotState::Done, leg) => leg == Leg::Argument,
            (SlotState::Preparing | SlotState::Queued | SlotState::Running, _) => false,
        }
    }

    /// Notes that resources are under way in the result that `process` is about to deliver.
    pub(crate) fn note_carries(&self, process: ProcessId) {
        self.key(process).0.flags.fetch_or(CARRIES, Relaxed);
    }

    /// Says that nobody will join `process`: its slot is freed when it ends, or now if it has. True: it
    /// has, and there were resources in its result, so the master should look.
    pub(crate) fn detach(
        &self,
        process: ProcessId,
        caller: WorkerIndex,
    ) -> Result<bool, ClaimError> {
        let joining = self.claim_result(process, caller)?;
        let (slot, generation) = self.key(process);
        let mut word = Word(slot.word.load(Acquire));
        while word.generation() == generation && !word.is_finished() {
            let detached = Word(word.0 | Word::DETACHED);
            match slot
                .word
                .compare_exchange_weak(word.0, detached.0, SeqCst, Acquire)
            {
                Ok(_) => {
                    crash_point!("proc.control.detached");
                    // The claim stays with the slot: nobody can join a detached process.
                    std::mem::forget(joining);
                    return Ok(false);
                }
                Err(seen) => word = Word(seen),
            }
        }
        let carries = joining.carries();
        joining.collect();
        Ok(carries)
    }

    /// Waits until one of `processes` has finished (or is gone, or was never there), and returns its
    /// position. `None`: the deadline has passed, or the run is not running any more.
    pub(crate) fn wait_any(
        &self,
        processes: &[ProcessId],
        deadline: Option<Deadline>,
        mut before_sleep: impl FnMut(bool),
    ) -> Option<usize> {
        let completions = &self.header().completions.0;
        let finished = || {
            processes
                .iter()
                .position(|&id| self.look(id) != Seen::Unfinished)
        };
        let result = loop {
            let seen = completions.load(SeqCst);
            for &process in processes {
                self.set_flag(process, Word::ANY);
            }
            if let Some(position) = finished() {
                break Some(position);
            }
            if self.phase() != Phase::Running || deadline.is_some_and(|deadline| deadline.is_past())
            {
                break None;
            }
            before_sleep(true);
            futex::wait(completions, seen, deadline);
            before_sleep(false);
        };
        // The flag stays on those still unfinished: another `join_any` may wait for them, too.
        result
    }

    /// Sets a flag in the word of a process that is not finished; returns the word it then has.
    fn set_flag(&self, process: ProcessId, flag: u64) -> Option<Word> {
        let (slot, generation) = self.key(process);
        let mut word = Word(slot.word.load(Acquire));
        loop {
            let is_unfinished = matches!(word.state(), SlotState::Queued | SlotState::Running);
            if word.generation() != generation || !is_unfinished {
                return None;
            }
            let flagged = Word(word.0 | flag);
            if flagged == word {
                return Some(word);
            }
            match slot
                .word
                .compare_exchange_weak(word.0, flagged.0, SeqCst, Acquire)
            {
                Ok(_) => return Some(flagged),
                Err(seen) => word = Word(seen),
            }
        }
    }

    // ---- the master's part ------------------------------------------------------------------

    /// Takes the oldest queued process for a worker that is about to be forked for it.
    pub(crate) fn claim_for_fork(&self, worker: WorkerIndex) -> Option<ProcessId> {
        self.claim_oldest(worker, u32::MAX).map(|job| job.process)
    }

    /// The fork for `process` failed: `Running → Failed`.
    pub(crate) fn fail_unforked(&self, process: ProcessId, worker: WorkerIndex, errno: i32) {
        if self.worker_of(process) != Some(worker) {
            // A worker that lived for a moment was settled, or has delivered.
            return;
        }
        let (slot, generation) = self.key(process);
        slot.outcome
            .store(Outcome::NotForked { errno }.to_word(), Relaxed);
        self.finish(
            slot,
            generation,
            SlotState::Running,
            Some(worker),
            SlotState::Failed,
        );
        self.worker(worker).process.store(0, Relaxed);
    }

    /// Ends a process that no worker has taken yet: `Queued → Failed`. False: it is not queued.
    pub(crate) fn fail_queued(&self, process: ProcessId, outcome: Outcome) -> bool {
        let (slot, generation) = self.key(process);
        // Taken first, so that nobody else writes the slot while its outcome is noted.
        let mut word = Word(slot.word.load(Acquire));
        loop {
            if word.generation() != generation || word.state() != SlotState::Queued {
                return false;
            }
            let mine = word.to(SlotState::Running, WorkerIndex::MASTER);
            match slot
                .word
                .compare_exchange_weak(word.0, mine.0, SeqCst, Acquire)
            {
                Ok(_) => break,
                Err(seen) => word = Word(seen),
            }
        }
        slot.outcome.store(outcome.to_word(), Relaxed);
        self.finish(
            slot,
            generation,
            SlotState::Running,
            Some(WorkerIndex::MASTER),
            SlotState::Failed,
        )
    }

    /// The ids of all queued processes, at shutdown.
    pub(crate) fn queued(&self) -> Vec<ProcessId> {
        self.unfinished(SlotState::Queued)
    }

    fn unfinished(&self, state: SlotState) -> Vec<ProcessId> {
        self.used_slots()
            .filter_map(|index| self.occupant(index))
            .filter(|(_, word)| word.state() == state)
            .map(|(process, _)| process)
            .collect()
    }

    /// All processes that are not joined, with their state and, if they run, their worker.
    pub(crate) fn processes(&self) -> Vec<(ProcessId, ProcessState, Option<WorkerIndex>)> {
        let states = [
            (SlotState::Queued, ProcessState::Queued),
            (SlotState::Running, ProcessState::Running),
            (SlotState::Done, ProcessState::Done),
            (SlotState::Failed, ProcessState::Failed),
        ];
        self.used_slots()
            .filter_map(|index| {
                let (process, word) = self.occupant(index)?;
                let (_, state) = states
                    .into_iter()
                    .find(|(state, _)| *state == word.state())?;
                let worker = (state == ProcessState::Running).then(|| word.actor());
                Some((process, state, worker))
            })
            .collect()
    }

    /// Enters a newborn worker into the table, before its fork. Returns its generation.
    pub(crate) fn enrol(&self, worker: WorkerIndex) -> u32 {
        let entry = self.worker(worker);
        for counter in [
            &entry.in_flight,
            &entry.waiting,
            &entry.in_order,
            &entry.unix_pid,
        ] {
            counter.store(0, Relaxed);
        }
        entry.kill_cause.store(0, Relaxed);
        self.header().highest_worker.fetch_max(worker.0, SeqCst);
        entry.generation.load(Relaxed)
    }
    pub(crate) fn set_unix_pid(&self, worker: WorkerIndex, pid: u32) {
        self.worker(worker).unix_pid.store(pid, Relaxed);
    }
    pub(crate) fn process_served_by(&self, worker: WorkerIndex) -> Option<ProcessId> {
        let id = self.worker(worker).process.load(SeqCst);
        (id != 0).then(|| ProcessId::from_raw(id))
    }
    /// The worker that runs `process` now.
    pub(crate) fn worker_of(&self, process: ProcessId) -> Option<WorkerIndex> {
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(Acquire));
        (word.generation() == generation && word.state() == SlotState::Running)
            .then(|| word.actor())
    }

    /// The last store of a worker that leaves in order.
    pub(crate) fn sign_off(&self, worker: WorkerIndex) {
        let entry = self.worker(worker);
        // From here on no other thread of it begins anything that would have to be settled.
        let is_quiet = entry
            .in_flight
            .compare_exchange(0, SIGNED_OFF, SeqCst, SeqCst)
            .is_ok();
        entry.in_order.store(u32::from(is_quiet), SeqCst);
    }

    /// Settles every slot whose actor or joiner was the dead `worker` (module docs, table), frees its
    /// table entry, and wakes whoever waits.
    pub(crate) fn settle(&self, worker: WorkerIndex, status: ExitStatus) -> Settled {
        let entry = self.worker(worker);
        let in_order = entry.in_order.load(SeqCst) == 1;
        let mut settled = Settled {
            process: self.process_served_by(worker),
            in_order,
        };
        let mut running = None;
        if !in_order {
            for index in self.used_slots() {
                running = self.settle_slot(index, worker).or(running);
            }
            // It may have been told of something queued, or been about to tell.
            self.wake_parked();
        } else if let Some(process) = settled.process {
            // The wake of its joiners may have been its last act, or may not have been reached.
            let (slot, generation) = self.key(process);
            let word = Word(slot.word.load(Acquire));
            if word.generation() == generation {
                self.wake_joiners(slot, word);
            }
        }
        entry.process.store(0, Relaxed);
        entry.waiting.store(0, Relaxed);
        entry.generation.fetch_add(1, SeqCst);
        // Last, so that whoever is told of the death finds nothing held by the dead.
        if let Some(process) = running {
            settled.process = Some(process);
            self.fail_running(process, worker, status);
        }
        if !in_order {
            // The end of a detached process leaves nothing in the table that would say whom to wake.
            let header = self.header();
            for word in [&header.completions.0, &header.deaths.0] {
                word.fetch_add(1, SeqCst);
                futex::wake_all(word);
            }
        }
        settled
    }

    /// Applies the table to one slot, except that the process that the dead worker was running is only
    /// returned.
    fn settle_slot(&self, index: usize, dead: WorkerIndex) -> Option<ProcessId> {
        let (process, word) = self.occupant(index)?;
        let (slot, generation) = (self.slot_at(index), word.generation());
        let joiner = slot.joiner.load(Acquire);
        if joiner == (u64::from(generation) << 32 | u64::from(dead.0 + 1))
            && !word.has(Word::DETACHED)
            && word.state() != SlotState::Collected
        {
            let free = u64::from(generation) << 32;
            let _ = slot.joiner.compare_exchange(joiner, free, SeqCst, Relaxed);
            self.drop_if_released(slot, process, WorkerIndex::MASTER);
        }
        match word.state() {
            SlotState::Queued => {
                // Its asker may have died before it told anybody.
                self.lower_cursor(process);
                None
            }
            SlotState::Done | SlotState::Failed => {
                self.wake_joiners(slot, word);
                None
            }
            _ if word.actor() != dead => None,
            SlotState::Running => Some(process),
            SlotState::Preparing | SlotState::Collected => {
                self.heap.free_all(tag_of(process));
                self.free_slot(slot, generation);
                None
            }
            SlotState::Free => None,
        }
    }

    /// `Running(dead) → Failed`: keeps what the worker noted of the cause, frees all other blocks.
    fn fail_running(&self, process: ProcessId, dead: WorkerIndex, status: ExitStatus) {
        let (slot, generation) = self.key(process);
        let entry = self.worker(dead);
        let killed = matches!(
            status,
            ExitStatus::Signaled {
                signal: SIGKILL,
                ..
            }
        );
        let noted = match Outcome::from_word(entry.kill_cause.load(Relaxed)) {
            Outcome::None => Outcome::from_word(slot.outcome.load(Acquire)),
            cause if killed => cause,
            _ => Outcome::None,
        };
        let panic = slot.panic.load();
        let aborted = matches!(
            status,
            ExitStatus::Signaled {
                signal: SIGABRT,
                ..
            }
        );
        let (outcome, keep) = match (noted, panic) {
            (Outcome::MemoryLimit | Outcome::TimeLimit | Outcome::NotForked { .. }, _) => {
                (noted, None)
            }
            (_, Some(block)) if aborted => (Outcome::Reported, Some(block)),
            _ => (Outcome::from_status(status), None),
        };
        let tag = tag_of(process);
        for cell in [&slot.argument, &slot.result, &slot.panic] {
            match cell.load() {
                Some(block) if Some(block) != keep => {
                    self.heap.free(block, tag);
                }
                _ => {}
            }
        }
        // Blocks that it had taken but not yet written into its slot.
        match keep {
            None => drop(self.heap.free_all(tag)),
            Some(_) => drop(slot.flags.fetch_or(SWEEP, Relaxed)),
        }
        slot.argument.store(None);
        slot.panic.store(None);
        slot.result.store(keep);
        slot.outcome.store(outcome.to_word(), Relaxed);
        self.finish(
            slot,
            generation,
            SlotState::Running,
            Some(dead),
            SlotState::Failed,
        );
    }

    /// `actor` has given back a claim: if the join point has been released meanwhile, nobody else can
    /// make one, so the result is dropped when it comes.
    fn drop_if_released(&self, slot: &Slot, process: ProcessId, actor: WorkerIndex) {
        let is_defined = slot.entry_kind.load(Relaxed) == 0;
        let index = slot.entry.load(Relaxed);
        // If the slot is another process's by now, both may be anything, and detaching is refused.
        if is_defined && index < POINT_LIMIT as u64 && self.is_join_point_released(index as u32) {
            // Refused if somebody who was let in before the release joins it.
            let _ = self.detach(process, actor);
        }
    }

    /// Drops the results of all finished processes of a released join point.
    pub(crate) fn collect_released(&self, join_point: u64) {
        for index in self.used_slots() {
            let Some((process, _)) = self.occupant(index) else {
                continue;
            };
            if self.slot_at(index).join_point.load(Relaxed) != join_point {
                continue;
            }
            // Refused when somebody joins it right now: then that joiner collects it.
            let _ = self.detach(process, WorkerIndex::MASTER);
        }
    }

    // ---- who waits --------------------------------------------------------------------------

    /// Marks a thread of `worker` as waiting without deadline for `process`, or as going on. True: it
    /// seems that nobody is left who does not wait, so the master should look.
    pub(crate) fn note_wait(&self, worker: WorkerIndex, process: ProcessId, begins: bool) -> bool {
        let entry = self.worker(worker);
        if !begins {
            entry.waiting.fetch_sub(1, SeqCst);
            return false;
        }
        entry.waits_for.store(process.get(), Relaxed);
        entry.waiting.fetch_add(1 << 16 | 1, SeqCst);
        let (slot, generation) = self.key(process);
        let word = Word(slot.word.load(SeqCst));
        if word.generation() == generation && word.state() == SlotState::Queued {
            // Whoever serves it will be busy, and look when it begins to wait.
            return false;
        }
        let highest = self.header().highest_worker.load(SeqCst);
        !(1..=highest).map(WorkerIndex).any(|worker| {
            self.process_served_by(worker).is_some() && self.wait_of(worker).threads == 0
        })
    }

    pub(crate) fn wait_of(&self, worker: WorkerIndex) -> WaitFacts {
        let entry = self.worker(worker);
        let word = entry.waiting.load(SeqCst);
        WaitFacts {
            threads: word & 0xffff,
            word,
            on: ProcessId::from_raw(entry.waits_for.load(Relaxed)),
        }
    }

    /// Whether anything can still happen without a worker that is seen to be awake: something queued,
    /// being prepared, or run by a worker that was not seen to wait; or a result that its joiner has not
    /// fetched yet.
    pub(crate) fn is_anything_pending(
        &self,
        is_waiting: impl Fn(WorkerIndex, ProcessId) -> bool,
    ) -> bool {
        self.used_slots().any(|index| match self.occupant(index) {
            None => false,
            Some((process, word)) => match word.state() {
                SlotState::Queued | SlotState::Preparing | SlotState::Collected => true,
                SlotState::Done | SlotState::Failed => {
                    self.slot_at(index).joiner.load(SeqCst) as u32 != 0
                }
                SlotState::Running => !is_waiting(word.actor(), process),
                SlotState::Free => false,
            },
        })
    }

    /// A call by `worker` in which a slot may have it as its actor.
    pub(crate) fn enter(&self, worker: WorkerIndex) -> InFlight<'_> {
        let count = &self.worker(worker).in_flight;
        if count.fetch_add(1, SeqCst) & SIGNED_OFF != 0 {
            // The process is exiting: this thread has nothing more to do.
            loop {
                std::thread::park();
            }
        }
        InFlight { count }
    }

    pub(crate) fn owners(&self, me: WorkerIndex) -> WorkerOwners<'_> {
        WorkerOwners { control: self, me }
    }
}

const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;

/// Blocks of a process carry its id.
fn tag_of(process: ProcessId) -> NonZeroU64 {
    NonZeroU64::new(process.get()).expect("process ids begin at 1")
}

/// What became of a parked worker.
#[derive(Debug)]
pub(crate) enum Parked {
    Serve {
        job: Job,
        was_last: bool,
    },
    /// The run is over, or the master has changed since the worker was forked.
    Retire,
}

/// Counts a call of this worker that the master must settle if the worker dies in it.
pub(crate) struct InFlight<'a> {
    count: &'a AtomicU32,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, SeqCst);
    }
}

/// A block being filled for a process; dropped before it is [kept](Place::keep), it is freed.
pub(crate) struct Place<'a> {
    heap: &'a TaggedHeap,
    tag: NonZeroU64,
    block: Block,
    is_kept: bool,
}

impl Place<'_> {
    /// Leaves the block to the process that it is tagged with.
    pub(crate) fn keep(mut self) -> Block {
        self.is_kept = true;
        self.block
    }
}

impl AsMut<[u8]> for Place<'_> {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: in bounds: checked by the heap; here: the place is borrowed exclusively and nobody
        // else knows the block yet; there: likewise, it is published only after `keep`; gone: a dead
        // process's blocks are freed by their tag, their content never read.
        match unsafe { self.heap.bytes_mut(self.block) } {
            Ok(bytes) => bytes,
            Err(error) => panic!("a block that has just been allocated is not valid: {error}"),
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.heap.free(self.block, self.tag);
        }
    }
}

/// A slot in state `Preparing`; dropped before it is queued, it is freed.
pub(crate) struct Preparing<'a> {
    control: &'a Control,
    slot: &'a Slot,
    process: ProcessId,
    asker: WorkerIndex,
    queued: bool,
}

impl Preparing<'_> {
    pub(crate) fn process(&self) -> ProcessId {
        self.process
    }

    pub(crate) fn set_argument(&self, block: Block) {
        self.slot.argument.store(Some(block));
    }

    /// `Preparing → Queued`. True: the master must be told, since no ready worker is idle.
    pub(crate) fn queue(mut self, order: Order) -> (ProcessId, bool) {
        let slot = self.slot;
        let (kind, entry) = match order.entry {
            Entry::Defined(index) => (0, u64::from(index)),
            Entry::Spawned(address) => (1, address),
        };
        slot.entry.store(entry, Relaxed);
        slot.entry_kind.store(kind, Relaxed);
        slot.image.store(self.control.image(), Relaxed);
        slot.fork_point.store(order.fork_point, Relaxed);
        slot.join_point.store(order.join_point, Relaxed);
        slot.codec.store(order.codec, Relaxed);
        slot.memory_limit_bytes
            .store(order.memory_limit_bytes.unwrap_or(0), Relaxed);
        slot.time_limit_ns
            .store(order.time_limit_ns.unwrap_or(0), Relaxed);
        let (_, generation) = self.control.key(self.process);
        let mut queued = Word::new(generation, SlotState::Queued, WorkerIndex::MASTER);
        if order.detached {
            queued = Word(queued.0 | Word::DETACHED);
            slot.joiner
                .store(u64::from(generation) << 32 | u64::from(u32::MAX), Relaxed);
        }
        crash_point!("proc.control.queue");
        self.queued = true;
        slot.word.store(queued.0, SeqCst);
        crash_point!("proc.control.queued");
        (self.process, self.control.announce(self.process))
    }
}

impl Drop for Preparing<'_> {
    fn drop(&mut self) {
        if !self.queued {
            let (_, generation) = self.control.key(self.process);
            let collected = Word::new(generation, SlotState::Collected, self.asker);
            self.slot.word.store(collected.0, SeqCst);
            self.control.free_slot(self.slot, generation);
        }
    }
}

/// The claim on a result; dropped before it is collected, another may join.
pub(crate) struct Joining<'a> {
    control: &'a Control,
    slot: &'a Slot,
    generation: u32,
    process: ProcessId,
    mine: u64,
    done: bool,
}

/// How a wait for the end of a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Waited {
    Finished,
    TimedOut,
    ShutDown,
}

impl<'a> Joining<'a> {
    pub(crate) fn is_finished(&self) -> bool {
        Word(self.slot.word.load(Acquire)).is_finished()
    }

    /// Sleeps until the process has ended. `before_sleep(true)` is called before each sleep,
    /// `before_sleep(false)` after it.
    pub(crate) fn wait(
        &self,
        deadline: Option<Deadline>,
        spin: impl Fn(&dyn Fn() -> bool),
        mut before_sleep: impl FnMut(bool),
    ) -> Waited {
        let load = || Word(self.slot.word.load(Acquire));
        if load().state() == SlotState::Running {
            spin(&|| load().is_finished());
        }
        loop {
            let Some(word) = self.control.set_flag(self.process, Word::SLEEPERS) else {
                return Waited::Finished;
            };
            if self.control.phase() != Phase::Running {
                return Waited::ShutDown;
            }
            if deadline.is_some_and(|deadline| deadline.is_past()) {
                return Waited::TimedOut;
            }
            before_sleep(true);
            futex::wait(
                self.control.futex_of(self.slot),
                word.futex_value(),
                deadline,
            );
            before_sleep(false);
        }
    }

    /// Whether it succeeded, and its block. Valid until the claim is collected or dropped.
    pub(crate) fn result(&self) -> (Outcome, Option<Block>) {
        (
            Outcome::from_word(self.slot.outcome.load(Acquire)),
            self.slot.result.load(),
        )
    }

    /// The limits that the process ran under: memory in bytes, time in nanoseconds.
    pub(crate) fn limits(&self) -> (u64, u64) {
        let slot = self.slot;
        (
            slot.memory_limit_bytes.load(Relaxed),
            slot.time_limit_ns.load(Relaxed),
        )
    }

    /// Whether there are resources in the result.
    pub(crate) fn carries(&self) -> bool {
        self.slot.flags.load(Relaxed) & CARRIES != 0
    }

    /// Frees the blocks and the slot: the process is joined. It must have ended.
    pub(crate) fn collect(mut self) {
        let word = Word(self.slot.word.load(Acquire));
        assert!(
            word.is_finished(),
            "{} is collected before it has ended",
            self.process
        );
        self.done = true;
        let actor = WorkerIndex((self.mine as u32) - 1);
        self.slot
            .word
            .store(word.to(SlotState::Collected, actor).0, SeqCst);
        crash_point!("proc.control.collect");
        self.control.free_slot(self.slot, self.generation);
    }
}

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        if !self.done {
            let free = u64::from(self.generation) << 32;
            let _ = self
                .slot
                .joiner
                .compare_exchange(self.mine, free, SeqCst, Relaxed);
            let actor = WorkerIndex(self.mine as u32 - 1);
            self.control
                .drop_if_released(self.slot, self.process, actor);
        }
    }
}

/// Who owns a lock in the control block: workers, known by their table entries.
pub(crate) struct WorkerOwners<'a> {
    control: &'a Control,
    me: WorkerIndex,
}

impl Owners for WorkerOwners<'_> {
    fn me(&self) -> OwnerId {
        let generation = self.control.worker(self.me).generation.load(Relaxed);
        OwnerId {
            index: self.me.0,
            generation,
        }
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        (owner.index as usize) < self.control.worker_count
            && self
                .control
                .worker(WorkerIndex(owner.index))
                .generation
                .load(SeqCst)
                == owner.generation
    }
    fn deaths(&self) -> &AtomicU32 {
        &self.control.header().deaths.0
    }
}

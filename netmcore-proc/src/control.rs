//! The control block: the memory through which master and workers start, run and join processes.
//!
//! It is an anonymous region (it has no name, so it cannot leak) that the master maps before the
//! first fork and every worker inherits at the same address:
//!
//! ```text
//! Header | Point × 4096 | WorkerEntry × w | thread × 4096 | Slot × n | heap for arguments and results
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
//!    `Free`, except `result`, `outcome`, `panic` and `flags`, which the `Running` worker writes (or the
//!    master, when that worker is dead), and `joiner`, which whoever joins takes by compare-and-swap.
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
use netmcore_sys::futex::{self};

use crate::error::Error;
use crate::id::ProcessId;
use layout::{
    CURSOR_ID, FORK_RELEASED, Header, JOIN_RELEASED, Layout, MAGIC, Point, SIGNED_OFF, SWEEP, Slot,
    THREAD_LIMIT, Word, WorkerEntry,
};

mod inherit;
mod join;
mod layout;
mod queue;
mod settle;
#[cfg(test)]
mod tests;
mod threads;

pub(crate) use join::{Joining, Waited};
pub(crate) use layout::{
    ClaimError, Entry, Heirs, InheritOrder, Job, Order, Outcome, POINT_LIMIT, Phase, QueueFacts,
    READY_LIMIT, Seen, Settled, SlotState, WaitFacts, WaitsFor, WorkerIndex,
};
pub(crate) use queue::Parked;

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!(
    "netmcore-proc needs a 64-bit little-endian target: the futex is the low half of a 64-bit word"
);

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
    fn thread(&self, number: usize) -> &AtomicU64 {
        assert!(number < THREAD_LIMIT, "thread {number} is out of range");
        // SAFETY: as in `header`, the number has just been checked.
        unsafe {
            &*self
                .base
                .add(self.layout.threads)
                .cast::<AtomicU64>()
                .add(number)
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
        Ok(Place::new(&self.heap, tag, block))
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

    /// Notes what a panic left to say, in case the process does not survive it. Only one thread of the
    /// worker calls this at a time.
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
        if let Some(block) = slot.inherit_only.load() {
            self.heap.free(block, inherit_tag(tag));
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

/// Blocks of a process carry its id.
fn tag_of(process: ProcessId) -> NonZeroU64 {
    NonZeroU64::new(process.get()).expect("process ids begin at 1")
}

/// The set of what a process inherits is tagged apart: it outlives all other blocks of the process, since the master
/// may look at it as long as the slot is queued or running.
fn inherit_tag(tag: NonZeroU64) -> NonZeroU64 {
    tag | 1 << 61
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

impl<'a> Place<'a> {
    fn new(heap: &'a TaggedHeap, tag: NonZeroU64, block: Block) -> Place<'a> {
        Place {
            heap,
            tag,
            block,
            is_kept: false,
        }
    }

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

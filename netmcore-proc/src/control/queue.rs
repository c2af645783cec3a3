//! From an asker to a worker: taking a slot, queueing it, and serving the queue; parked workers.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use netmcore_shm::Block;
use netmcore_sys::crash_point;
use netmcore_sys::futex;

use super::Control;
use super::layout::{
    CURSOR_ID, Entry, Job, Order, Phase, QueueFacts, Slot, SlotState, Word, WorkerIndex,
};
use crate::error::Error;
use crate::id::ProcessId;

impl Control {
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
                        for cell in [
                            &slot.argument,
                            &slot.result,
                            &slot.panic,
                            &slot.inherit_only,
                        ] {
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
    pub(super) fn announce(&self, process: ProcessId) -> bool {
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
    pub(super) fn lower_cursor(&self, process: ProcessId) {
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
    pub(super) fn oldest_queued(&self) -> Option<(ProcessId, Word)> {
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
    pub(super) fn first_queued(&self, begin: u64, end: u64) -> Option<(ProcessId, Word)> {
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
        self.control.set_inherit(slot, order.inherit);
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

//! The thread table: under which ids the threads of a worker take locks, besides its first one.
//!
//! **Protocol.** The first thread of a worker acts under the worker's own entry, so a worker with one thread takes nothing here.
//! Every other thread takes an entry when it first asks for its id. An entry is one word, `generation << 32 | worker + 1`:
//!
//! | word | changed by | its worker died: what the master does |
//! |---|---|---|
//! | `g, 0`: free | a thread, to `g, worker + 1` | – |
//! | `g, worker + 1`: an owner's | the thread at its end, unless it has leaked a guard, to `g + 1, 0` | `g + 1, 0`, before it announces the death |
//!
//! Before its first entry a worker sets [`HAS_THREADS`], so that the master need not look at the table for others. A full table
//! is no error: the thread then acts as one without a supervisor, whose death those that wait find out themselves.
//!
//! **Invariants.**
//! 1. The owner `(index, g)` lives while the generation of the entry is `g` and its low half is not 0. Generations are not used
//!    again before 2³² threads have had the entry.
//! 2. An entry is freed once: by its thread, or, when its process has ended, by the master.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use netmcore_sem::{OwnerId, announce_death};
use netmcore_sys::crash_point;

use super::Control;
use super::layout::{ANNOUNCES, HAS_THREADS, THREAD_LIMIT, WorkerIndex};

fn word(generation: u32, worker: Option<WorkerIndex>) -> u64 {
    u64::from(generation) << 32 | worker.map_or(0, |worker| u64::from(worker.0) + 1)
}

fn generation_of(word: u64) -> u32 {
    (word >> 32) as u32
}

fn worker_of(word: u64) -> Option<WorkerIndex> {
    (word as u32).checked_sub(1).map(WorkerIndex)
}

impl Control {
    /// The id of the first thread of `worker`. From here on its end is announced: it may leave something locked.
    pub(crate) fn own_first_thread(&self, worker: WorkerIndex) -> OwnerId {
        let entry = self.worker(worker);
        entry.owner_flags.fetch_or(ANNOUNCES, SeqCst);
        crash_point!("proc.control.owner");
        OwnerId {
            index: worker.0,
            generation: entry.generation.load(Relaxed),
        }
    }

    /// An id for another thread of `worker`; `None` if the table is full.
    pub(crate) fn claim_thread(&self, worker: WorkerIndex) -> Option<OwnerId> {
        self.worker(worker)
            .owner_flags
            .fetch_or(HAS_THREADS | ANNOUNCES, SeqCst);
        let first = self.header().thread_hint.fetch_add(1, Relaxed) as usize;
        for number in (first..first + THREAD_LIMIT).map(|number| number % THREAD_LIMIT) {
            let entry = self.thread(number);
            let found = entry.load(Relaxed);
            if worker_of(found).is_some() {
                continue;
            }
            let generation = generation_of(found);
            let claimed = word(generation, Some(worker));
            if entry
                .compare_exchange(found, claimed, SeqCst, Relaxed)
                .is_ok()
            {
                crash_point!("proc.control.thread_claimed");
                return Some(OwnerId {
                    index: self.worker_count as u32 + number as u32,
                    generation,
                });
            }
        }
        None
    }

    /// A thread ends that has claimed `id`, and leaves nothing that others could use by what it has leaked.
    pub(crate) fn end_thread(&self, id: OwnerId) {
        let Some(entry) = self.thread_of(id) else {
            return;
        };
        let found = entry.load(Relaxed);
        if generation_of(found) == id.generation && worker_of(found).is_some() {
            let free = word(id.generation.wrapping_add(1), None);
            let ended = entry.compare_exchange(found, free, SeqCst, Relaxed).is_ok();
            crash_point!("proc.control.thread_ended");
            if ended {
                announce_death(&self.header().deaths.0);
            }
        }
    }

    /// Ends all threads of a worker that has been reaped.
    pub(super) fn end_threads_of(&self, worker: WorkerIndex) {
        for number in 0..THREAD_LIMIT {
            let entry = self.thread(number);
            let found = entry.load(SeqCst);
            if worker_of(found) == Some(worker) {
                let free = word(generation_of(found).wrapping_add(1), None);
                entry.store(free, SeqCst);
            }
        }
    }

    /// Whether the owner may still run, and for which worker.
    pub(crate) fn tenant(&self, owner: OwnerId) -> Option<WorkerIndex> {
        if (owner.index as usize) < self.worker_count {
            let worker = WorkerIndex(owner.index);
            let generation = self.worker(worker).generation.load(SeqCst);
            return (generation == owner.generation).then_some(worker);
        }
        let found = self.thread_of(owner)?.load(SeqCst);
        worker_of(found).filter(|_| generation_of(found) == owner.generation)
    }

    fn thread_of(&self, owner: OwnerId) -> Option<&AtomicU64> {
        let number = (owner.index as usize).checked_sub(self.worker_count)?;
        (number < THREAD_LIMIT).then(|| self.thread(number))
    }

    /// Says that processes take locks whose deaths nobody announces; those that sleep must look for themselves from now on.
    pub(crate) fn note_stranger(&self) {
        let header = self.header();
        if header.has_strangers.swap(1, SeqCst) == 0 {
            crash_point!("proc.control.stranger");
            announce_death(&header.deaths.0);
        }
    }

    pub(crate) fn has_strangers(&self) -> bool {
        self.header().has_strangers.load(SeqCst) != 0
    }

    pub(crate) fn deaths(&self) -> &std::sync::atomic::AtomicU32 {
        &self.header().deaths.0
    }

    /// The pid of a worker, 0 while it is not known.
    pub(crate) fn unix_pid(&self, worker: WorkerIndex) -> u32 {
        self.worker(worker).unix_pid.load(Relaxed)
    }
}

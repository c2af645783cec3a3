//! The master's part: who lives, what the dead have left midway, who waits for whom.

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use netmcore_sem::announce_death;
use netmcore_sys::futex;
use netmcore_sys::process::ExitStatus;

use super::layout::{
    ANNOUNCES, HAS_THREADS, Outcome, POINT_LIMIT, SIGNED_OFF, SWEEP, Settled, Slot, SlotState,
    WaitFacts, WaitsFor, Word, WorkerIndex,
};
use super::{Control, inherit_tag, tag_of};
use crate::id::ProcessId;
use crate::wire::ProcessState;

const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;

impl Control {
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

    pub(super) fn unfinished(&self, state: SlotState) -> Vec<ProcessId> {
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
            &entry.owner_flags,
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
        let owner_flags = entry.owner_flags.load(SeqCst);
        if owner_flags & HAS_THREADS != 0 {
            self.end_threads_of(worker);
        }
        entry.generation.fetch_add(1, SeqCst);
        // Last, so that whoever is told of the death finds nothing held by the dead.
        if let Some(process) = running {
            settled.process = Some(process);
            self.fail_running(process, worker, status);
        }
        if !in_order {
            // The end of a detached process leaves nothing in the table that would say whom to wake.
            let completions = &self.header().completions.0;
            completions.fetch_add(1, SeqCst);
            futex::wake_all(completions);
        }
        if !in_order || owner_flags & ANNOUNCES != 0 {
            announce_death(&self.header().deaths.0);
        }
        settled
    }

    /// Applies the table to one slot, except that the process that the dead worker was running is only
    /// returned.
    pub(super) fn settle_slot(&self, index: usize, dead: WorkerIndex) -> Option<ProcessId> {
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
                self.heap.free_all(inherit_tag(tag_of(process)));
                self.free_slot(slot, generation);
                None
            }
            SlotState::Free => None,
        }
    }

    /// `Running(dead) → Failed`: keeps what the worker noted of the cause, frees all other blocks.
    pub(super) fn fail_running(&self, process: ProcessId, dead: WorkerIndex, status: ExitStatus) {
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
    pub(super) fn drop_if_released(&self, slot: &Slot, process: ProcessId, actor: WorkerIndex) {
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

    /// Marks a thread of `worker` as going on that was [waiting](Self::note_wait).
    pub(crate) fn note_wait_over(&self, worker: WorkerIndex) {
        self.worker(worker).waiting.fetch_sub(1, SeqCst);
    }

    /// Marks a thread of `worker` as waiting without deadline. True: it seems that nobody is left who does not wait, so the
    /// master should look.
    pub(crate) fn note_wait(&self, worker: WorkerIndex, on: WaitsFor) -> bool {
        let entry = self.worker(worker);
        let (what, owner) = on.to_words();
        entry.waits_for.store(what, Relaxed);
        entry.waits_for_owner.store(owner, Relaxed);
        entry.waiting.fetch_add(1 << 16 | 1, SeqCst);
        if let WaitsFor::Process(process) = on {
            let (slot, generation) = self.key(process);
            let word = Word(slot.word.load(SeqCst));
            if word.generation() == generation && word.state() == SlotState::Queued {
                // Whoever serves it will be busy, and look when it begins to wait.
                return false;
            }
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
            on: WaitsFor::from_words(
                entry.waits_for.load(Relaxed),
                entry.waits_for_owner.load(Relaxed),
            ),
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
}

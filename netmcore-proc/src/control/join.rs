//! From a worker to a joiner: claiming a result, waiting for it, collecting it; detaching.

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use netmcore_shm::Block;
use netmcore_sys::crash_point;
use netmcore_sys::futex::{self, Deadline};

use super::Control;
use super::layout::{
    CARRIES, ClaimError, Outcome, Phase, Seen, Slot, SlotState, Word, WorkerIndex,
};
use crate::id::ProcessId;
use crate::resource::Leg;

impl Control {
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
    pub(super) fn set_flag(&self, process: ProcessId, flag: u64) -> Option<Word> {
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

//! The table of the module docs, row by row, with workers that are only numbers.

use netmcore_sys::process::ExitStatus;
use netmcore_sys::signal::SIGABRT;

use super::*;
use crate::id::ResourceId;
use crate::resource::Inherit;

const KILLED: ExitStatus = ExitStatus::Signaled {
    signal: 9,
    core_dumped: false,
};
const ASKER: WorkerIndex = WorkerIndex(1);
const SERVER: WorkerIndex = WorkerIndex(2);
const JOINER: WorkerIndex = WorkerIndex(3);

/// A control block for four processes, and what keeps it mapped.
struct Fixture {
    control: Control,
    _memory: (AnonRegion, Arena),
}

fn fixture(first_process: u64) -> Fixture {
    let arena = Arena::reserve(1 << 30).unwrap();
    let (control, region) = Control::create(&arena, 4, 64 << 20, first_process).unwrap();
    for worker in [ASKER, SERVER, JOINER] {
        control.enrol(worker);
    }
    Fixture {
        control,
        _memory: (region, arena),
    }
}

fn order() -> Order {
    Order {
        entry: Entry::Defined(0),
        fork_point: 1,
        join_point: 2,
        codec: 0,
        detached: false,
        memory_limit_bytes: None,
        time_limit_ns: None,
        inherit: InheritOrder::All,
    }
}

fn place(control: &Control, process: ProcessId, bytes: &[u8]) -> Block {
    let mut place = control.place(bytes.len(), process, ASKER).unwrap();
    place.as_mut().copy_from_slice(bytes);
    place.keep()
}

fn queue(control: &Control, order: Order) -> ProcessId {
    let preparing = control.prepare(ASKER).unwrap();
    preparing.set_argument(place(control, preparing.process(), b"argument"));
    preparing.queue(order).0
}

fn run(control: &Control) -> ProcessId {
    control.claim_oldest(SERVER, u32::MAX).unwrap().process
}

fn deliver(control: &Control, process: ProcessId) {
    let block = place(control, process, b"result");
    control.free_argument(process);
    control.deliver(process, SERVER, true, Some(block));
}

fn blocks(control: &Control) -> u64 {
    control.heap.stats().in_use_blocks
}

#[test]
fn process_started_and_joined_leaves_nothing() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    assert_eq!(run(control), process);
    deliver(control, process);
    let joining = control.claim_result(process, JOINER).unwrap();
    let (outcome, block) = joining.result();
    assert_eq!(
        (outcome, control.bytes(block.unwrap()).unwrap()),
        (Outcome::None, &b"result"[..])
    );
    joining.collect();
    assert_eq!(control.look(process), Seen::Gone);
    assert_eq!(blocks(control), 0);
    control.heap.verify().unwrap();
}

#[test]
fn queue_is_served_in_the_order_of_starts() {
    let Fixture { control, .. } = &fixture(1);
    let queued: Vec<_> = (0..3).map(|_| queue(control, order())).collect();
    assert_eq!(control.queue_facts(10).queued, 3);
    let served: Vec<_> = (0..3).map(|_| run(control)).collect();
    assert_eq!(served, queued);
    assert!(control.claim_oldest(SERVER, u32::MAX).is_none());
}

#[test]
fn full_table_is_an_error_until_a_slot_is_freed_and_ids_are_never_used_twice() {
    let Fixture { control, .. } = &fixture(1);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let processes: Vec<_> = (0..4).map(|_| queue(control, order())).collect();
        let refused = control.prepare(ASKER).map(drop);
        assert!(
            matches!(refused, Err(Error::ProcessTableFull { limit: 4 })),
            "{refused:?}"
        );
        for process in processes {
            assert!(seen.insert(process), "{process} was given out twice");
            assert_eq!(run(control), process);
            deliver(control, process);
            control.claim_result(process, JOINER).unwrap().collect();
        }
    }
    assert_eq!(blocks(control), 0);
}

#[test]
fn slot_that_stays_taken_is_passed_over() {
    let Fixture { control, .. } = &fixture(1);
    let long_lived = queue(control, order());
    assert_eq!(run(control), long_lived);
    for _ in 0..20 {
        let process = queue(control, order());
        assert_eq!(run(control), process);
        deliver(control, process);
        control.claim_result(process, JOINER).unwrap().collect();
    }
    assert_eq!(control.look(long_lived), Seen::Unfinished);
}

#[test]
fn ids_of_earlier_runs_and_of_the_future_are_unknown() {
    let Fixture { control, .. } = &fixture(1000);
    let process = queue(control, order());
    assert_eq!(process.get(), 1000);
    assert_eq!(control.look(ProcessId::from_raw(999)), Seen::Never);
    assert_eq!(control.look(ProcessId::from_raw(1001)), Seen::Never);
    let claimed = control
        .claim_result(ProcessId::from_raw(999), JOINER)
        .map(drop);
    assert_eq!(claimed, Err(ClaimError::Never));
}

#[test]
fn only_one_claims_a_result_and_may_give_it_back() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    let joining = control.claim_result(process, JOINER).unwrap();
    let second = control.claim_result(process, ASKER).map(drop);
    assert_eq!(second, Err(ClaimError::AlreadyJoined));
    drop(joining);
    assert!(control.claim_result(process, ASKER).is_ok());
}

#[test]
fn asker_dead_while_preparing_frees_slot_and_blocks() {
    let Fixture { control, .. } = &fixture(1);
    let preparing = control.prepare(ASKER).unwrap();
    let process = preparing.process();
    preparing.set_argument(place(control, process, b"argument"));
    place(control, process, b"not yet in the slot");
    std::mem::forget(preparing);
    let settled = control.settle(ASKER, KILLED);
    assert_eq!(
        settled,
        Settled {
            process: None,
            in_order: false
        }
    );
    assert_eq!(control.look(process), Seen::Gone);
    assert_eq!(blocks(control), 0);
}

#[test]
fn asker_dead_after_queueing_leaves_the_process_to_be_served() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    // As if it had died before it told anybody: the cursor has passed the slot.
    control.header().cursor.0.store(process.get() + 1, SeqCst);
    assert!(!control.is_anything_queued());
    control.settle(ASKER, KILLED);
    assert_eq!(run(control), process);
}

#[test]
fn worker_dead_while_running_fails_its_process_and_frees_its_blocks() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    place(control, process, b"half a result");
    let settled = control.settle(SERVER, KILLED);
    assert_eq!(settled.process, Some(process));
    let joining = control.claim_result(process, JOINER).unwrap();
    assert_eq!(
        joining.result(),
        (
            Outcome::Killed {
                signal: 9,
                core_dumped: false
            },
            None
        )
    );
    assert_eq!(blocks(control), 0);
    joining.collect();
}

#[test]
fn worker_dead_before_it_noted_its_claim_fails_the_process_all_the_same() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    control.worker(SERVER).process.store(0, SeqCst);
    assert_eq!(control.settle(SERVER, KILLED).process, Some(process));
    assert_eq!(control.look(process), Seen::Finished);
}

#[test]
fn worker_dead_after_delivering_loses_nothing() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    deliver(control, process);
    control.settle(SERVER, KILLED);
    let joining = control.claim_result(process, JOINER).unwrap();
    assert_eq!(joining.result().0, Outcome::None);
    joining.collect();
}

#[test]
fn joiner_dead_gives_its_claim_back() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    std::mem::forget(control.claim_result(process, JOINER).unwrap());
    deliver(control, process);
    control.settle(JOINER, KILLED);
    let joining = control.claim_result(process, ASKER).unwrap();
    assert_eq!(
        control.bytes(joining.result().1.unwrap()).unwrap(),
        b"result"
    );
}

#[test]
fn joiner_dead_while_collecting_is_finished_for_it() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    deliver(control, process);
    let (slot, generation) = control.key(process);
    let collected = Word::new(generation, SlotState::Collected, JOINER);
    slot.word.store(collected.0, SeqCst);
    control.settle(JOINER, KILLED);
    assert_eq!(control.look(process), Seen::Gone);
    assert_eq!(Word(slot.word.load(SeqCst)).state(), SlotState::Free);
    assert_eq!(blocks(control), 0);
}

#[test]
fn death_of_one_leaves_the_processes_of_others_alone() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    control.settle(JOINER, KILLED);
    assert_eq!(control.look(process), Seen::Unfinished);
    deliver(control, process);
    control.claim_result(process, ASKER).unwrap().collect();
}

#[test]
fn detached_process_is_freed_at_its_end_and_cannot_be_joined() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(
        control,
        Order {
            detached: true,
            ..order()
        },
    );
    let refused = control.claim_result(process, JOINER).map(drop);
    assert_eq!(refused, Err(ClaimError::Detached));
    run(control);
    deliver(control, process);
    assert_eq!((control.look(process), blocks(control)), (Seen::Gone, 0));
}

#[test]
fn nobody_claims_a_process_that_is_being_prepared() {
    let Fixture { control, .. } = &fixture(1);
    for _ in 0..4 {
        let process = queue(control, order());
        run(control);
        deliver(control, process);
        control.claim_result(process, JOINER).unwrap().collect();
    }
    let preparing = control.prepare(ASKER).unwrap();
    let process = preparing.process();
    // The slot still names the join point of the process before.
    control.collect_released(order().join_point);
    let guessed = control.claim_result(process, JOINER).map(drop);
    assert_eq!(guessed, Err(ClaimError::Never));
    preparing.queue(Order {
        join_point: 7,
        ..order()
    });
    assert_eq!(run(control), process);
    deliver(control, process);
    control.claim_result(process, JOINER).unwrap().collect();
    assert_eq!(blocks(control), 0);
}

#[test]
fn detach_of_a_running_process_that_is_then_killed_frees_it() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    control.detach(process, ASKER).unwrap();
    control.settle(SERVER, KILLED);
    assert_eq!((control.look(process), blocks(control)), (Seen::Gone, 0));
}

#[test]
fn noted_limit_is_told_instead_of_the_signal() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    control.note_kill(SERVER, Outcome::TimeLimit);
    control.settle(SERVER, KILLED);
    let joining = control.claim_result(process, JOINER).unwrap();
    assert_eq!(joining.result(), (Outcome::TimeLimit, None));
}

#[test]
fn panic_note_is_told_only_by_an_abort() {
    let abort = ExitStatus::Signaled {
        signal: SIGABRT,
        core_dumped: false,
    };
    for (status, expected) in [
        (abort, Outcome::Reported),
        (
            KILLED,
            Outcome::Killed {
                signal: 9,
                core_dumped: false,
            },
        ),
    ] {
        let Fixture { control, .. } = &fixture(1);
        let process = queue(control, order());
        run(control);
        place(control, process, b"unnamed");
        control.note_panic(process, Some(place(control, process, b"panic")));
        control.settle(SERVER, status);
        let joining = control.claim_result(process, JOINER).unwrap();
        assert_eq!(joining.result().0, expected);
        joining.collect();
        assert_eq!(blocks(control), 0);
    }
}

#[test]
fn process_failed_in_the_queue_is_not_served() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    assert!(control.fail_queued(process, Outcome::ShutDown));
    assert!(!control.fail_queued(process, Outcome::ShutDown));
    assert!(control.claim_oldest(SERVER, u32::MAX).is_none());
    let joining = control.claim_result(process, JOINER).unwrap();
    assert_eq!(joining.result(), (Outcome::ShutDown, None));
    joining.collect();
    assert_eq!(blocks(control), 0);
}

#[test]
fn worker_older_than_the_start_takes_nothing() {
    let Fixture { control, .. } = &fixture(1);
    control.advance_image();
    queue(control, order());
    assert!(control.claim_oldest(SERVER, 0).is_none());
    assert!(control.claim_oldest(SERVER, 1).is_some());
}

#[test]
fn garbage_in_words_and_counters_is_passed_over() {
    let Fixture { control, .. } = &fixture(1);
    let process = queue(control, order());
    run(control);
    for (index, word) in [(0, 1 << 32 | 1 | 2 << 8), (3, 6 | 2 << 8), (2, u64::MAX)] {
        control.slot_at(index).word.store(word, SeqCst);
    }
    control.header().next_process.0.store(u64::MAX, SeqCst);
    assert!(!control.is_anything_queued());
    assert_eq!(control.queue_facts(10).queued, 0);
    assert_eq!(control.settle(SERVER, KILLED).process, Some(process));
    assert_eq!(control.queued(), []);
    control.set_phase(Phase::ShuttingDown);
    control.look(ProcessId::from_raw(u64::MAX));
    assert_eq!(control.id_after_the_run(), 5);
}

#[test]
fn outcome_survives_its_word() {
    for outcome in [
        Outcome::None,
        Outcome::Reported,
        Outcome::Exited { code: -1 },
        Outcome::Killed {
            signal: 11,
            core_dumped: true,
        },
        Outcome::Killed {
            signal: 9,
            core_dumped: false,
        },
        Outcome::MemoryLimit,
        Outcome::TimeLimit,
        Outcome::NotForked { errno: 11 },
        Outcome::ShutDown,
    ] {
        assert_eq!(Outcome::from_word(outcome.to_word()), outcome);
    }
}

#[test]
fn process_inherits_from_the_queue_to_its_end() {
    let Fixture { control, .. } = &fixture(1);
    let id = ResourceId::from_raw;
    control.set_next_resource(id(5));
    let only = |ids: &[u64]| Inherit::Only(ids.iter().copied().map(ResourceId::from_raw).collect());
    let start = |inherit: &Inherit| {
        let preparing = control.prepare(ASKER).unwrap();
        let inherit = control
            .place_inherit(inherit, preparing.process(), ASKER)
            .unwrap();
        preparing.queue(Order { inherit, ..order() }).0
    };
    assert_eq!(control.heirs(), Heirs::default());
    let all = start(&Inherit::All);
    // What is made later is in reach of a process that inherits all, but not kept for it.
    control.set_next_resource(id(9));
    let some = start(&only(&[7, 6]));
    let none = start(&only(&[]));
    let heirs = Heirs {
        below: 5,
        only: [6, 7].into(),
    };
    assert_eq!(control.heirs(), heirs);
    assert!(heirs.hold(id(4)) && heirs.hold(id(7)) && !heirs.hold(id(5)));
    assert_eq!(control.inherits_only(all), None);
    assert_eq!(control.inherits_only(some), Some(vec![id(7), id(6)]));
    assert_eq!(control.inherits_only(none), Some(vec![]));

    for process in [all, some, none] {
        assert_eq!(run(control), process);
    }
    assert_eq!(control.heirs(), heirs);
    for process in [all, some] {
        // A failure frees what it has, but not what it inherits.
        control.drop_blocks(process);
        assert_eq!(control.inherits_only(some), Some(vec![id(7), id(6)]));
        deliver(control, process);
    }
    assert_eq!(control.heirs(), Heirs::default());
    control.settle(SERVER, KILLED);
    for process in [all, some, none] {
        control.claim_result(process, JOINER).unwrap().collect();
    }
    assert_eq!(blocks(control), 0);
}

#[test]
fn asker_that_dies_before_it_queues_leaves_nothing_of_what_is_inherited() {
    let Fixture { control, .. } = &fixture(1);
    let preparing = control.prepare(ASKER).unwrap();
    let only = Inherit::Only(vec![ResourceId::from_raw(3)]);
    let inherit = control.place_inherit(&only, preparing.process(), ASKER);
    assert!(matches!(inherit, Ok(InheritOrder::Only(Some(_)))));
    assert_eq!(control.heirs(), Heirs::default());
    std::mem::forget(preparing);
    control.settle(ASKER, KILLED);
    assert_eq!(blocks(control), 0);
}

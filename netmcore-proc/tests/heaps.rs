//! Guards against shared values that go while they are in a message, that nobody can count any more, or that stay when nobody uses
//! them; against heaps that outlive their users; and against two heaps of named objects in one run.

#[path = "objects/mod.rs"]
mod objects;
mod trial;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use netmcore_proc::{
    Codec, Error, Heap, Inherit, JoinError, ProcessId, ProcessOptions, ResourceId, ResourceRepr,
    Running, ShmArc, StartOptions, create_heap, create_heap_with_max, create_preallocated_shm,
    create_region, destroy_resources, get_heap, get_named, get_resource, named, remove_named,
    shared_heap, spawn, spawn_with, try_named,
};
use netmcore_sys::process::Pid;
use objects::{assert_gone, assert_there, exists, recorded, wait_until};
use trial::{Channel, SIGKILL, Trial, in_a_worker, is_killed_by, kill};

netmcore_forktest::forktests!(
    handle_in_an_argument_is_one_of_the_same_value,
    handle_reaches_one_that_ran_before_the_heap_was,
    handle_in_a_result_outlives_its_maker,
    handle_in_an_argument_outlives_its_sender,
    handles_in_messages_are_counted_exactly,
    handle_in_a_message_that_is_not_sent_is_given_back,
    handle_of_one_that_died_before_it_took_it_counts,
    handle_of_a_region_that_is_not_inherited_is_refused,
    heap_of_one_process_goes_with_it,
    heap_goes_with_its_last_user,
    heap_of_the_master_is_used_before_in_and_after_the_run,
    what_is_no_heap_is_told,
    heap_that_cannot_be_made_leaves_nothing,
    named_value_is_made_once_by_many,
    named_value_is_found_in_hooks_before_and_after_the_run,
    named_value_is_removed_and_made_anew,
    name_of_another_type_is_told,
    named_values_are_in_reach_whatever_is_inherited,
    shared_heap_is_one_whoever_asks,
    shared_heap_has_the_length_that_was_said,
    shared_heap_goes_with_the_run_and_not_before,
    shared_heap_is_made_anew_after_all_was_destroyed,
    second_run_has_names_of_its_own,
);

type Counter = ShmArc<AtomicU64>;

fn counter_in(heap: &Heap, value: u64) -> Counter {
    ShmArc::new_in(heap, AtomicU64::new(value)).unwrap()
}

fn add(counter: Counter) -> u64 {
    counter.fetch_add(1, SeqCst)
}

fn id_of(heap: &Heap) -> ResourceId {
    ResourceId::from_raw(heap.region().id().0)
}

fn repr_of(heap: &Heap) -> ResourceRepr {
    get_resource(id_of(heap)).unwrap().repr().clone()
}

// ---- handles in messages -------------------------------------------------------------------------

fn handle_in_an_argument_is_one_of_the_same_value() {
    in_a_worker(|| {
        let counter = counter_in(&create_heap("/nmc-heaps-").unwrap(), 5);
        let look = |counter: Counter| {
            let at = ShmArc::as_ptr(&counter).addr() as u64;
            (at, add(counter))
        };
        let at = ShmArc::as_ptr(&counter).addr() as u64;
        for expected in 5..8 {
            let seen = spawn(look, &counter).unwrap().join().unwrap();
            assert_eq!(seen, (at, expected));
        }
        assert_eq!(counter.load(SeqCst), 8);
        assert_eq!(ShmArc::strong_count(&counter), 1);
    });
}

fn handle_reaches_one_that_ran_before_the_heap_was() {
    let trial = Trial::new();
    let ids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let maker = master.def_process(|value: u64| {
        let heap = create_heap("/nmc-heaps-").unwrap();
        counter_in(&heap, value)
    });
    let old = master.def_process(move |()| {
        // By a result, by a named value, and by the heap's id.
        let made = maker
            .join_point()
            .running(ProcessId::from_raw(ids.receive()));
        let made = made.join().unwrap();
        let found = get_named::<AtomicU64>("late").unwrap().unwrap();
        let heap = get_heap(ResourceId::from_raw(ids.receive())).unwrap();
        let by_name = heap.get_named::<AtomicU64>("inside").unwrap().unwrap();
        [add(made), add(found), add(by_name)]
    });
    let first = master.def_process(move |()| {
        let old = old.start(&()).unwrap();
        named("late", || AtomicU64::new(20)).unwrap();
        let heap = create_heap("/nmc-heaps-").unwrap();
        let inside = heap.named("inside", || AtomicU64::new(30)).unwrap();
        let made = maker.start(&10).unwrap();
        ids.send(made.id().get());
        ids.send(id_of(&heap).get());
        assert_eq!(old.join().unwrap(), [10, 20, 30]);
        assert_eq!(inside.load(SeqCst), 31);
    });
    trial.run(master, &first, &());
}

fn handle_in_a_result_outlives_its_maker() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let pids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let maker = master.def_process(move |value: u64| {
        let heap = create_heap("/nmc-heaps-").unwrap();
        pids.send_pid();
        (counter_in(&heap, value), repr_of(&heap))
    });
    let first = master.def_process(move |()| {
        let making = maker.start(&7).unwrap();
        trial::until_dead(pids.receive_pid());
        let (counter, repr) = making.join().unwrap();
        assert_eq!(add(counter.clone()), 7);
        assert_eq!(ShmArc::strong_count(&counter), 1);
        assert_there(&dir, &repr);
        // Nobody joins this one, so its heap goes with the run, or when it is detached.
        let never = maker.start(&8).unwrap();
        trial::until_dead(pids.receive_pid());
        assert_eq!(recorded(&dir).len(), 2);
        never.detach().unwrap();
        wait_until("it is gone", || recorded(&dir).len() == 1);
        maker.start(&9).unwrap();
        trial::until_dead(pids.receive_pid());
        repr
    });
    let repr = trial.run(master, &first, &());
    assert_gone(trial.dir(), &repr);
}

fn handle_in_an_argument_outlives_its_sender() {
    let trial = Trial::new();
    let go: &'static Channel = Channel::new();
    let mut master = trial.master().ready_workers(0);
    let late = master.def_process(add);
    let sender = master.def_process(move |()| {
        let counter = counter_in(&shared_heap().unwrap(), 3);
        // Not taken before its sender is gone.
        let stopped = Pid::parent().unwrap();
        kill(stopped, 19);
        let running = late.start(&counter).unwrap();
        drop(counter);
        go.send(1);
        let _continues = Continue(stopped);
        running
    });
    let first = master.def_process(move |()| {
        let running = sender.start(&()).unwrap().join().unwrap();
        assert_eq!(go.receive(), 1);
        assert_eq!(running.join().unwrap(), 3);
        // Nobody has it any more.
        let left = shared_heap().unwrap().shared_values().unwrap();
        assert_eq!(left, []);
    });
    trial.run(master, &first, &());
}

/// Lets the master go on, at the end.
struct Continue(Pid);

impl Drop for Continue {
    fn drop(&mut self) {
        kill(self.0, 18);
    }
}

fn handles_in_messages_are_counted_exactly() {
    for codec in [Codec::Bincode, Codec::Json] {
        let trial = Trial::new();
        let mut master = trial.master();
        let options = ProcessOptions::new().codec(codec);
        let echo = master.def_process_with(options, |all: Vec<(String, Counter)>| {
            for (_, one) in &all {
                one.fetch_add(1, SeqCst);
            }
            all
        });
        let first = master.def_process(move |()| {
            let heap = create_heap("/nmc-heaps-").unwrap();
            let counters = [0, 100].map(|value| counter_in(&heap, value));
            let all: Vec<(String, Counter)> = (0..10)
                .map(|number| (format!("{number}"), counters[number % 2].clone()))
                .collect();
            let counts = || [0, 1].map(|which| ShmArc::strong_count(&counters[which]));
            assert_eq!(counts(), [6, 6]);
            let running = echo.start(&all).unwrap();
            let echoed = running.join().unwrap();
            assert_eq!(counts(), [11, 11]);
            assert_eq!(counters[1].load(SeqCst), 105);
            drop((all, echoed));
            assert_eq!(counts(), [1, 1]);
            heap.verify().unwrap();
            drop(counters);
            assert_eq!(heap.shared_values().unwrap(), []);
        });
        trial.run(master, &first, &());
    }
}

fn handle_in_a_message_that_is_not_sent_is_given_back() {
    let trial = Trial::new();
    let mut master = trial.master().message_memory(1 << 20);
    let takes = master.def_process(|(_, counter): (Vec<u64>, Counter)| add(counter));
    let gives = master.def_process(|len: usize| {
        let counter = counter_in(&shared_heap().unwrap(), 1);
        (vec![0_u64; len], counter)
    });
    let first = master.def_process(move |()| {
        let counter = counter_in(&shared_heap().unwrap(), 0);
        for _ in 0..3 {
            let too_long = vec![0; 1 << 20];
            let refused = takes.start(&(too_long, counter.clone())).unwrap_err();
            assert!(matches!(refused, Error::Memory { .. }), "{refused}");
            assert_eq!(ShmArc::strong_count(&counter), 1);
            let refused = gives.start(&(1 << 20)).unwrap().join();
            assert!(refused.is_err());
        }
        let fits = takes.start(&(vec![0; 10], counter.clone())).unwrap();
        assert_eq!(fits.join().unwrap(), 0);
        drop(counter);
        assert_eq!(shared_heap().unwrap().shared_values().unwrap(), []);
    });
    trial.run(master, &first, &());
}

/// Ends the worker if it is told to, before it has decoded its argument.
fn die_if_told() {
    let told = get_named::<AtomicU64>("the next is to die").unwrap();
    if told.is_some_and(|told| told.swap(0, SeqCst) == 1) {
        kill(Pid::this(), SIGKILL);
    }
}

fn handle_of_one_that_died_before_it_took_it_counts() {
    netmcore_proc::on_worker_start(die_if_told).unwrap();
    in_a_worker(|| {
        let heap = create_heap("/nmc-heaps-").unwrap();
        let counter = counter_in(&heap, 0);
        let die = named("the next is to die", || AtomicU64::new(0)).unwrap();
        for killed in 1..4 {
            die.store(1, SeqCst);
            let running = spawn(add, &counter).unwrap();
            assert!(is_killed_by(SIGKILL, &running.join().unwrap_err()));
            assert_eq!(ShmArc::strong_count(&counter), killed + 1);
            heap.verify().unwrap();
        }
        // The value is as good as before, and messages are.
        for expected in 0..5 {
            assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), expected);
            assert_eq!(ShmArc::strong_count(&counter), 4);
        }
    });
}

fn handle_of_a_region_that_is_not_inherited_is_refused() {
    in_a_worker(|| {
        let heaps = [(), ()].map(|()| create_heap("/nmc-heaps-").unwrap());
        let ids = [0, 1].map(|which| id_of(&heaps[which]));
        let counters = [0, 1].map(|which| counter_in(&heaps[which], 0));
        let only = |id| StartOptions::new().inherit(Inherit::Only(vec![id]));
        let run = |which: usize, id| spawn_with(add, &counters[which], only(id)).unwrap().join();
        assert_eq!(run(0, ids[0]).unwrap(), 0);
        match run(0, ids[1]).unwrap_err() {
            JoinError::ArgumentUndecodable { reason, .. } => {
                let says = |text: &str| assert!(reason.contains(text), "{reason}");
                says(&format!("cannot use {}", ids[0]));
                says(&format!("with these regions only: {}", ids[1]));
                says("`Inherit::Only`");
            }
            other => panic!("{other}"),
        }
        let look = |id: ResourceId| matches!(get_heap(id), Err(Error::NotInherited { .. }));
        assert!(
            spawn_with(look, &ids[0], only(ids[1]))
                .unwrap()
                .join()
                .unwrap()
        );
        assert_eq!(counters[0].load(SeqCst), 1);
    });
}

// ---- the life of a heap --------------------------------------------------------------------------

fn heap_of_one_process_goes_with_it() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let made: &'static Channel = Channel::new();
    let mut master = trial.master();
    let maker = master.def_process(move |is_to_stay: bool| {
        let heap = create_heap("/nmc-heaps-").unwrap();
        std::mem::forget(counter_in(&heap, 1));
        made.send(id_of(&heap).get());
        if is_to_stay {
            loop {
                std::thread::park();
            }
        }
    });
    let first = master.def_process(move |()| {
        for is_killed in [false, true] {
            let before = recorded(&dir);
            let running = maker.start(&is_killed).unwrap();
            let id = ResourceId::from_raw(made.receive());
            if is_killed {
                assert_eq!(recorded(&dir).len(), before.len() + 1);
                running.kill().unwrap();
                assert!(is_killed_by(SIGKILL, &running.join().unwrap_err()));
                wait_until("it is gone", || recorded(&dir) == before);
            } else {
                running.join().unwrap();
                assert_eq!(recorded(&dir), before);
            }
            assert!(matches!(get_heap(id), Err(Error::NoResource { .. })));
        }
    });
    trial.run(master, &first, &());
}

fn heap_goes_with_its_last_user() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let told: &'static Channel = Channel::new();
    let mut master = trial.master();
    let holder = master.def_process(move |counter: Counter| {
        told.send(1);
        loop {
            std::thread::park();
            assert!(counter.load(SeqCst) < 9);
        }
    });
    let maker = master.def_process(move |()| {
        let heap = create_heap("/nmc-heaps-").unwrap();
        let running: Running<()> = holder.start(&counter_in(&heap, 1)).unwrap();
        assert_eq!(told.receive(), 1);
        (running, repr_of(&heap))
    });
    let first = master.def_process(move |()| {
        let (holder, repr) = maker.start(&()).unwrap().join().unwrap();
        assert_there(&dir, &repr);
        holder.kill().unwrap();
        let outcome: Result<(), _> = holder.join();
        assert!(is_killed_by(SIGKILL, &outcome.unwrap_err()));
        wait_until("it is gone", || !exists(&repr));
    });
    trial.run(master, &first, &());
}

fn heap_of_the_master_is_used_before_in_and_after_the_run() {
    let trial = Trial::new();
    let mut master = trial.master();
    let heap = create_heap("/nmc-heaps-").unwrap();
    let counter = counter_in(&heap, 1);
    let captured = counter.clone();
    let first = master.def_process(move |sent: Counter| {
        // The captured one is a copy, and can be used.
        assert_eq!(add(captured.clone()), 1);
        assert_eq!(add(sent), 2);
        spawn(add, &captured.clone()).unwrap().join().unwrap()
    });
    let result = master.run_with(
        || first.fork_point().start(&counter),
        |process| {
            assert_eq!(first.join_point().join_nowait(process).unwrap(), Some(3));
            assert_eq!(add(counter.clone()), 4);
            let late = counter_in(&heap, 9);
            assert_eq!(late.load(SeqCst), 9);
        },
    );
    result.unwrap();
    trial.check_nothing_is_left();
    // What was mapped stays readable.
    assert_eq!(counter.load(SeqCst), 5);
    assert!(matches!(
        create_heap("/nmc-heaps-"),
        Err(Error::NotRunning { .. })
    ));
}

fn what_is_no_heap_is_told() {
    in_a_worker(|| {
        let (empty, region) = create_region("/nmc-heaps-", 0, 1 << 20).unwrap();
        let (other, _) = create_preallocated_shm("/nmc-heaps-", 8192).unwrap();
        for id in [empty.id(), other] {
            let error = get_heap(id).unwrap_err();
            assert!(
                matches!(error, Error::Refused { .. } | Error::Memory { .. }),
                "{error}"
            );
            assert!(error.to_string().contains("heap in"), "{error}");
        }
        // It can become one.
        let heap = Heap::create(&region).unwrap();
        drop(counter_in(&heap, 1));
        assert!(get_heap(empty.id()).is_ok());
        let unknown = get_heap(ResourceId::from_raw(7777)).unwrap_err();
        assert!(matches!(unknown, Error::NoResource { .. }), "{unknown}");
    });
}

fn heap_that_cannot_be_made_leaves_nothing() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let before = recorded(&dir);
        let objects = mapped_objects();
        for _ in 0..3 {
            // Too short for anything, too long for the arena, and a bad name.
            assert!(create_heap_with_max("/nmc-heaps-", 1).is_err());
            assert!(create_heap_with_max("/nmc-heaps-", 1 << 50).is_err());
            assert!(create_heap("no-slash").is_err());
            assert_eq!(recorded(&dir), before);
        }
        assert_eq!(mapped_objects(), objects);
        let heap = create_heap("/nmc-heaps-").unwrap();
        assert_eq!(add(counter_in(&heap, 4)), 4);
    });
    trial.run(master, &first, &());
}

/// How many shared memory objects are mapped here.
fn mapped_objects() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains("/dev/shm/"))
        .count()
}

// ---- names ---------------------------------------------------------------------------------------

fn named_value_is_made_once_by_many() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master().ready_workers(8);
    let asks = master.def_process(|name: String| {
        let made = Cell::new(0_u64);
        let value = named(&name, || {
            made.set(1);
            AtomicU64::new(0)
        });
        value.unwrap().fetch_add(1, SeqCst);
        made.get()
    });
    let first = master.def_process(move |()| {
        for round in 0..5 {
            let name = format!("round {round}");
            let running: Vec<_> = (0..8).map(|_| asks.start(&name).unwrap()).collect();
            let made: u64 = running.iter().map(|one| one.join().unwrap()).sum();
            assert_eq!(made, 1);
            let value = get_named::<AtomicU64>(&name).unwrap().unwrap();
            assert_eq!(value.load(SeqCst), 8);
        }
        // One heap, whoever was first.
        assert_eq!(recorded(&dir).len(), 1);
        shared_heap().unwrap().verify().unwrap();
    });
    trial.run(master, &first, &());
}

fn named_value_is_found_in_hooks_before_and_after_the_run() {
    let trial = Trial::new();
    let mut master = trial.master();
    assert!(get_named::<AtomicU64>("early").unwrap().is_none());
    let early = named("early", || AtomicU64::new(1)).unwrap();
    let first = master.def_process(|()| {
        let early = named("early", || AtomicU64::new(100)).unwrap();
        let hook = named("hook", || AtomicU64::new(200)).unwrap();
        let late = named("late", || AtomicU64::new(300)).unwrap();
        [add(early), add(hook), add(late)]
    });
    let master = master.init(|_| {
        named("hook", || AtomicU64::new(2))?;
        Ok(())
    });
    let result = master.run_with(
        || first.fork_point().start(&()),
        |process| {
            let seen = first.join_point().join_nowait(process).unwrap().unwrap();
            assert_eq!(seen, [1, 2, 300]);
            assert_eq!(early.load(SeqCst), 2);
            let late = get_named::<AtomicU64>("late").unwrap().unwrap();
            assert_eq!(late.load(SeqCst), 301);
        },
    );
    result.unwrap();
    trial.check_nothing_is_left();
    assert!(matches!(
        named("early", || AtomicU64::new(1)),
        Err(Error::NotRunning { .. })
    ));
}

fn named_value_is_removed_and_made_anew() {
    in_a_worker(|| {
        assert!(remove_named::<AtomicU64>("one").unwrap().is_none());
        let one = named("one", || AtomicU64::new(1)).unwrap();
        assert_eq!(ShmArc::strong_count(&one), 2);
        let removed = remove_named::<AtomicU64>("one").unwrap().unwrap();
        assert!(ShmArc::ptr_eq(&one, &removed));
        assert_eq!(ShmArc::strong_count(&one), 2);
        assert!(get_named::<AtomicU64>("one").unwrap().is_none());
        let again = spawn(
            |()| named("one", || AtomicU64::new(10)).map(add).unwrap(),
            &(),
        );
        assert_eq!(again.unwrap().join().unwrap(), 10);
        assert_eq!(one.load(SeqCst), 1);

        let failed = try_named::<AtomicU64>("two", |heap| {
            assert!(heap.stats().in_use_bytes > 0);
            ShmArc::new_in(heap, 0_u8)?;
            Err(netmcore_shm::Error::NameLength {
                len_bytes: 0,
                limit_bytes: 0,
            })
        });
        assert!(matches!(failed, Err(Error::Memory { .. })));
        let nested = try_named("two", |heap| ShmArc::new_in(heap, AtomicU64::new(3)));
        assert_eq!(nested.unwrap().load(SeqCst), 3);
    });
}

fn name_of_another_type_is_told() {
    in_a_worker(|| {
        let _value = named("seven", || 7_u64).unwrap();
        let error = named("seven", || 7_u32).unwrap_err().to_string();
        for part in ["\"seven\"", "u32", "u64"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(get_named::<u32>("seven").is_err());
        for bad in [String::new(), "x".repeat(256)] {
            let error = named(&bad, || 7_u64).unwrap_err();
            assert!(error.to_string().contains("255"), "{error}");
        }
    });
}

fn named_values_are_in_reach_whatever_is_inherited() {
    in_a_worker(|| {
        let look = |()| named("here", || AtomicU64::new(0)).map(add).unwrap();
        let none = || StartOptions::new().inherit(Inherit::Only(Vec::new()));
        // Made by one that inherits nothing, and found by another.
        assert_eq!(spawn_with(look, &(), none()).unwrap().join().unwrap(), 0);
        assert_eq!(spawn(look, &()).unwrap().join().unwrap(), 1);
        assert_eq!(spawn_with(look, &(), none()).unwrap().join().unwrap(), 2);
        let value = named("here", || AtomicU64::new(0)).unwrap();
        let sent = spawn_with(add, &value, none()).unwrap();
        assert_eq!(sent.join().unwrap(), 3);
    });
}

fn shared_heap_is_one_whoever_asks() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master().ready_workers(6);
    let first = master.def_process(move |()| {
        let ask = |()| {
            let asked = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..3)
                    .map(|_| scope.spawn(|| id_of(&shared_heap().unwrap())))
                    .collect();
                let ids = threads.into_iter().map(|one| one.join().unwrap());
                ids.collect::<BTreeSet<_>>()
            });
            asked.into_iter().collect::<Vec<_>>()
        };
        let running: Vec<_> = (0..6).map(|_| spawn(ask, &()).unwrap()).collect();
        let ids: BTreeSet<_> = running.iter().flat_map(|one| one.join().unwrap()).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(recorded(&dir).len(), 1);
    });
    trial.run(master, &first, &());
}

fn shared_heap_has_the_length_that_was_said() {
    for max_len_bytes in [4 << 20, 1 << 30] {
        let trial = Trial::new();
        let mut master = trial.master().shared_heap_max_bytes(max_len_bytes);
        let first = master.def_process(|()| shared_heap().unwrap().region().max_len_bytes() as u64);
        assert_eq!(trial.run(master, &first, &()), max_len_bytes);
    }
    let trial = Trial::new();
    let _master = trial.master().shared_heap_max_bytes(8 << 20);
    assert_eq!(shared_heap().unwrap().region().max_len_bytes(), 8 << 20);
}

fn shared_heap_goes_with_the_run_and_not_before() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let repr = spawn(|()| repr_of(&shared_heap().unwrap()), &());
        let repr = repr.unwrap().join().unwrap();
        // Nobody uses it now.
        assert_there(&dir, &repr);
        assert_eq!(repr_of(&shared_heap().unwrap()), repr);
        repr
    });
    let repr = trial.run(master, &first, &());
    assert_gone(trial.dir(), &repr);
}

fn shared_heap_is_made_anew_after_all_was_destroyed() {
    let trial = Trial::new();
    let mut master = trial.master();
    let before = named("one", || AtomicU64::new(1)).unwrap();
    destroy_resources().unwrap();
    assert!(get_named::<AtomicU64>("one").unwrap().is_none());
    let after = named("one", || AtomicU64::new(2)).unwrap();
    assert!(!ShmArc::ptr_eq(&before, &after));
    let first = master.def_process(|()| named("one", || AtomicU64::new(3)).map(add).unwrap());
    assert_eq!(trial.run(master, &first, &()), 2);
    assert_eq!(before.load(SeqCst), 1);
}

fn second_run_has_names_of_its_own() {
    let trial = Trial::new();
    for _ in 0..2 {
        let mut master = trial.master();
        let first = master.def_process(|()| named("one", || AtomicU64::new(7)).map(add).unwrap());
        assert_eq!(trial.run(master, &first, &()), 7);
    }
}

//! When everybody waits for ever the run ends and says who waits for whom; and it never ends so while somebody
//! can still go on. Guards against hangs, and against deadlocks that are none.

mod trial;

use std::time::{Duration, Instant};

use netmcore_proc::{
    Error, JoinError, Master, Process, ProcessId, Running, join_any, self_process_id, spawn,
};
use trial::{Channel, SIGKILL, Trial, kill};

netmcore_forktest::forktests!(
    two_that_join_each_other_are_told,
    ring_of_five_is_told,
    deadlock_is_told_with_any_number_of_ready_workers,
    waits_for_any_can_deadlock,
    deadlock_of_some_waits_for_the_others_to_end,
    deadlock_is_found_when_a_second_thread_ends,
    deadlock_is_found_when_one_that_could_go_on_dies,
    wait_with_deadline_is_no_deadlock,
    second_thread_that_goes_on_is_no_deadlock,
    wait_for_something_else_is_no_deadlock,
    second_run_after_a_deadlock_works,
    deep_tree_is_no_deadlock,
    broad_tree_is_no_deadlock,
    tree_of_waits_for_any_is_no_deadlock,
    detached_ends_are_no_deadlock,
);

/// A handle on the process that calls it.
fn own_handle<A, R: serde::de::DeserializeOwned>(process: &Process<A, R>) -> Running<R> {
    process.join_point().running(self_process_id().unwrap())
}

/// Runs what must deadlock; returns who waited, and for what.
fn deadlock_in<A, R>(
    trial: &Trial,
    master: Master,
    first: &Process<A, R>,
    arg: &A,
) -> Vec<(ProcessId, String)>
where
    A: serde::Serialize + serde::de::DeserializeOwned,
    R: serde::Serialize + serde::de::DeserializeOwned,
{
    let start = Instant::now();
    match trial.try_run(master, first, arg) {
        Err(Error::Deadlock { who, on_what }) => {
            let took = start.elapsed();
            assert!(took < Duration::from_secs(10), "it took {took:?}");
            assert_eq!(who.len(), on_what.len());
            who.into_iter().zip(on_what).collect()
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("there was no deadlock"),
    }
}

/// A process that starts `depth` others, each by the last, of which the innermost joins the first.
fn define_ring(master: &mut Master) -> Process<(u64, Option<Running<u64>>), u64> {
    let ring: Process<(u64, Option<Running<u64>>), u64> = master.declare();
    master.define(
        ring,
        move |(depth, outermost): (u64, Option<Running<u64>>)| {
            let outermost = outermost.unwrap_or_else(|| own_handle(&ring));
            let next = match depth {
                0 => outermost,
                _ => ring.start(&(depth - 1, Some(outermost))).unwrap(),
            };
            let process = next.id();
            // The wait ends when the run does.
            assert_eq!(next.join(), Err(JoinError::ShutDown { process }));
            depth
        },
    );
    ring
}

fn ring_of(length: u64, master: impl FnOnce(Master) -> Master) {
    let trial = Trial::new();
    let mut master = master(trial.master());
    let ring = define_ring(&mut master);
    let mut waits = deadlock_in(&trial, master, &ring, &(length - 1, None));
    waits.sort();
    assert_eq!(waits.len() as u64, length, "{waits:?}");
    for (index, (_, on_what)) in waits.iter().enumerate() {
        let next = waits[(index + 1) % waits.len()].0;
        assert_eq!(*on_what, next.to_string(), "{waits:?}");
    }
}

fn two_that_join_each_other_are_told() {
    ring_of(2, |master| master);
}

fn ring_of_five_is_told() {
    for _ in 0..10 {
        ring_of(5, |master| master);
    }
}

fn deadlock_is_told_with_any_number_of_ready_workers() {
    for ready in [0, 1, 2, 7, 64] {
        ring_of(3, |master| master.ready_workers(ready));
    }
    ring_of(40, |master| master);
}

fn waits_for_any_can_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let quick = master.def_process(|x: u64| x);
    let inner = master.def_process(|handles: Vec<Running<u64>>| join_any(&handles).1.is_ok());
    let outer: Process<(), u64> = master.declare();
    master.define(outer, move |(): ()| {
        // One that was waited for by a wait that has ended, and that nobody joins.
        let left = quick.start(&1).unwrap();
        let taken = quick.start(&2).unwrap();
        let (_, result) = join_any(&[left, taken]);
        result.unwrap();
        let me = own_handle(&outer);
        let waits = inner.start(&vec![me, me]).unwrap();
        assert!(join_any(&[waits]).1.is_err());
        0
    });
    let waits = deadlock_in(&trial, master, &outer, &());
    assert_eq!(waits.len(), 2, "{waits:?}");
}

/// A first process that does something, and then waits for one that waits for it.
fn define_embrace(master: &mut Master, before: impl Fn() + 'static) -> Process<(), u64> {
    let outer: Process<(), u64> = master.declare();
    let inner = master.def_process(|outer: Running<u64>| outer.join().is_ok());
    master.define(outer, move |(): ()| {
        before();
        let _ = inner.start(&own_handle(&outer)).unwrap().join();
        0
    });
    outer
}

fn deadlock_of_some_waits_for_the_others_to_end() {
    let trial = Trial::new();
    let mut master = trial.master();
    let ended = Channel::new();
    let busy = master.def_process(move |(): ()| {
        // sleep: the others are to wait for longer than the master takes to look.
        std::thread::sleep(Duration::from_millis(300));
        ended.send(1);
    });
    let first = define_embrace(&mut master, move || {
        busy.start_detached(&()).unwrap();
    });
    let waits = deadlock_in(&trial, master, &first, &());
    assert_eq!(waits.len(), 2, "{waits:?}");
    assert_eq!(ended.receive(), 1);
}

fn deadlock_is_found_when_a_second_thread_ends() {
    let trial = Trial::new();
    let mut master = trial.master();
    let ended = Channel::new();
    let first = define_embrace(&mut master, move || {
        std::thread::spawn(move || {
            // sleep: the others are to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(300));
            ended.send(1);
        });
    });
    deadlock_in(&trial, master, &first, &());
    assert_eq!(ended.receive(), 1, "the thread could still go on");
}

fn deadlock_is_found_when_one_that_could_go_on_dies() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (pids, gate) = (Channel::new(), Channel::new());
    let waiter = master.def_process(move |(): ()| {
        pids.send_pid();
        gate.receive()
    });
    let first = define_embrace(&mut master, move || {
        waiter.start_detached(&()).unwrap();
        let victim = pids.receive_pid();
        std::thread::spawn(move || {
            // sleep: everybody is to wait before the victim is killed; sooner tests less, and still passes.
            std::thread::sleep(Duration::from_millis(200));
            kill(victim, SIGKILL);
        });
    });
    deadlock_in(&trial, master, &first, &());
}

// ---- no deadlock -------------------------------------------------------------------------------

fn wait_with_deadline_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let outer: Process<(), u64> = master.declare();
    let inner = master.def_process(|outer: Running<u64>| outer.join());
    master.define(outer, move |(): ()| {
        let inner = inner.start(&own_handle(&outer)).unwrap();
        for _ in 0..5 {
            let soon = Instant::now() + Duration::from_millis(50);
            let process = inner.id();
            assert_eq!(
                inner.join_deadline(soon),
                Err(JoinError::TimedOut { process })
            );
        }
        7
    });
    // The inner one waits until the end, and takes the result from under the run.
    match trial.try_run(master, &outer, &()) {
        Err(Error::FirstProcess(JoinError::AlreadyJoined { .. })) | Ok(7) => {}
        other => panic!("{other:?}"),
    }
}

fn second_thread_that_goes_on_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let gate = Channel::new();
    let outer: Process<bool, u64> = master.declare();
    let inner = master.def_process(move |outer: Running<u64>| {
        let join = std::thread::spawn(move || outer.join());
        // This thread sleeps, while everybody else waits for a process that waits for a process.
        // sleep: the others are to wait for longer than the master takes to look.
        std::thread::sleep(Duration::from_millis(500));
        gate.send(5);
        join.join().unwrap()
    });
    master.define(outer, move |is_inner: bool| {
        if is_inner {
            return gate.receive();
        }
        let waiter = outer.start(&true).unwrap();
        inner.start(&waiter).unwrap().join().unwrap().unwrap()
    });
    assert_eq!(trial.run(master, &outer, &false), 5);
    // The same, with nobody in it that waits for anything but a process.
    let mut master = trial.master();
    let outer: Process<(), u64> = master.declare();
    let inner = master.def_process(move |outer: Running<u64>| {
        std::thread::spawn(move || {
            // sleep: the others are to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(500));
            std::process::exit(3);
        });
        outer.join()
    });
    master.define(outer, move |(): ()| {
        let inner = inner.start(&own_handle(&outer)).unwrap();
        match inner.join() {
            Err(JoinError::Exited { code: 3, .. }) => 6,
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(trial.run(master, &outer, &()), 6);
}

fn wait_for_something_else_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let gate = Channel::new();
    let waiter = master.def_process(move |(): ()| gate.receive());
    let first = master.def_process(move |(): ()| waiter.start(&()).unwrap().join().unwrap());
    // From outside of the run: nobody in it could know.
    let mut helper = std::process::Command::new("sh")
        .args(["-c", "sleep 0.5; printf '\\003\\0\\0\\0\\0\\0\\0\\0'"])
        .stdin(std::process::Stdio::null())
        .stdout(gate.sender())
        .spawn()
        .unwrap();
    assert_eq!(master.run(&first, &()).unwrap(), 3);
    helper.wait().unwrap();
    trial.check_nothing_is_left();
}

fn second_run_after_a_deadlock_works() {
    let trial = Trial::new();
    for _ in 0..3 {
        let mut master = trial.master();
        let ring = define_ring(&mut master);
        deadlock_in(&trial, master, &ring, &(2, None));
        let mut master = trial.master();
        let first = master.def_process(|(): ()| spawn(|x: u64| x, &1).unwrap().join().unwrap());
        assert_eq!(trial.run(master, &first, &()), 1);
    }
}

/// Rounds of trees, each with other numbers of ready workers, of which none may seem to be a deadlock.
fn grow(trees: u64, define: impl Fn(&mut Master) -> Process<u64, u64>, depth: u64, expected: u64) {
    let trial = Trial::new();
    for round in 0..trees {
        let mut master = trial
            .master()
            .ready_workers([2, 0, 5][round as usize % 3])
            .process_limit(8192);
        let node = define(&mut master);
        assert_eq!(trial.run(master, &node, &depth), expected, "round {round}");
    }
}

/// Counts itself and its children, one after the other: nearly everybody waits all the time.
fn deep_tree_is_no_deadlock() {
    let define = |master: &mut Master| {
        let node: Process<u64, u64> = master.declare();
        master.define(node, move |depth: u64| {
            let children = if depth == 0 { 0 } else { 4 };
            let sum = |_| node.start(&(depth - 1)).unwrap().join().unwrap();
            1 + (0..children).map(sum).sum::<u64>()
        });
        node
    };
    // 1 + 4 + 16 + … + 1024.
    grow(6, define, 5, 1365);
}

fn broad_tree_is_no_deadlock() {
    let define = |master: &mut Master| {
        let node: Process<u64, u64> = master.declare();
        master.define(node, move |depth: u64| {
            let children = if depth == 0 { 0 } else { 3 };
            let all: Vec<_> = (0..children)
                .map(|_| node.start(&(depth - 1)).unwrap())
                .collect();
            1 + all.iter().map(|one| one.join().unwrap()).sum::<u64>()
        });
        node
    };
    grow(6, define, 5, 364);
    grow(1, define, 7, 3280);
}

fn tree_of_waits_for_any_is_no_deadlock() {
    let define = |master: &mut Master| {
        let node: Process<u64, u64> = master.declare();
        master.define(node, move |depth: u64| {
            let children = if depth == 0 { 0 } else { 3 };
            let mut all: Vec<_> = (0..children)
                .map(|_| node.start(&(depth - 1)).unwrap())
                .collect();
            let mut sum = 1;
            while !all.is_empty() {
                let (position, result) = join_any(&all);
                sum += result.unwrap();
                all.swap_remove(position);
            }
            sum
        });
        node
    };
    grow(6, define, 5, 364);
}

fn detached_ends_are_no_deadlock() {
    let define = |master: &mut Master| {
        let quick = master.def_process(|x: u64| x);
        let waits = master.def_process(|running: Running<u64>| join_any(&[running]).1.is_ok());
        master.def_process(move |rounds: u64| {
            for _ in 0..rounds {
                // The end of what it waits for leaves no trace but a wake.
                let running = quick.start(&1).unwrap();
                let wait = waits.start(&running).unwrap();
                let _ = running.detach();
                wait.join().unwrap();
            }
            rounds
        })
    };
    grow(3, define, 400, 400);
}

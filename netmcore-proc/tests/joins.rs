//! A join never hangs, and a result goes to exactly one joiner. Guards against waits for the dead, results
//! that are lost or given twice, slots that are never freed, and errors that name the wrong cause.

mod trial;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use netmcore_proc::{
    Error, JoinError, Master, Process, ProcessId, Running, join_any, self_process_id, spawn,
};
use netmcore_sys::crash;
use netmcore_sys::process::Pid;
use serde::{Deserialize, Serialize};
use trial::{
    Channel, SIGKILL, Trial, in_a_worker, is_killed_by, kill, until, until_asleep, until_dead,
};

netmcore_forktest::forktests!(
    killed_worker_ends_the_join_of_a_sleeper,
    killed_worker_is_told_to_a_later_joiner,
    killed_worker_ends_a_join_any_and_a_join_with_deadline,
    worker_killed_at_each_step_is_joined,
    asker_killed_at_each_step_leaves_a_start_or_nothing,
    joiner_killed_at_each_step_leaves_or_takes_the_result,
    detacher_killed_at_each_step_leaves_or_frees_the_slot,
    dead_joiner_leaves_the_result_to_another,
    dead_sleeping_joiner_leaves_the_process_to_another,
    one_of_two_joiners_gets_the_result_and_the_other_an_error_at_once,
    one_of_two_threads_gets_the_result,
    second_join_is_refused,
    nowait_says_not_yet_until_the_end,
    nowait_does_not_take_the_place_of_a_joiner,
    deadline_leaves_the_process_as_it_is,
    join_any_takes_each_once,
    join_any_twice_on_one_handle,
    join_any_of_a_process_that_somebody_detaches,
    wrong_join_point_is_told_and_harms_nothing,
    released_fork_point_starts_nothing,
    released_join_point_drops_results,
    claim_given_back_after_the_release_keeps_no_slot,
    detached_processes_free_their_slots,
    detach_after_the_end_frees_the_slot,
    detached_process_cannot_be_joined,
    full_table_is_an_error_until_one_is_joined,
    table_of_one_slot_works,
    self_join_is_refused,
    join_in_the_master_is_refused,
    nowait_works_in_the_master_after_the_run,
    results_that_nobody_took_are_told_after_the_run,
    start_outside_a_run_is_refused,
    handles_of_an_earlier_run_are_unknown,
    ids_that_never_were_are_unknown,
    nested_starts_to_depth_fifty,
    declared_process_calls_itself,
    declared_processes_call_each_other,
    functions_and_closures_without_captures_are_spawned,
    declared_process_without_function_is_told,
    running_handle_is_joined_by_another_worker,
    process_handle_is_started_by_another_worker,
    low_level_points_start_and_join,
    low_ready_counts_work,
);

/// A process that says its pid and then waits until it is told to end with a number.
fn define_waiter(master: &mut Master) -> (Process<(), u64>, &'static Channel, &'static Channel) {
    let (pids, gate) = (Channel::new(), Channel::new());
    let waiter = master.def_process(move |(): ()| {
        pids.send_pid();
        gate.receive()
    });
    (waiter, pids, gate)
}

// ---- deaths ------------------------------------------------------------------------------------

fn killed_worker_ends_the_join_of_a_sleeper() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, _) = define_waiter(&mut master);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        running
            .join()
            .map_err(|error| is_killed_by(SIGKILL, &error))
    });
    let first = master.def_process(move |(): ()| {
        for _ in 0..20 {
            let running = waiter.start(&()).unwrap();
            let victim = pids.receive_pid();
            let join = joiner.start(&running).unwrap();
            until_asleep(joiner_pids.receive_pid());
            let start = Instant::now();
            kill(victim, SIGKILL);
            assert_eq!(join.join().unwrap(), Err(true));
            let took = start.elapsed();
            assert!(took < Duration::from_secs(2), "it took {took:?}");
            assert!(matches!(
                running.join(),
                Err(JoinError::AlreadyJoined { .. })
            ));
        }
    });
    trial.run(master, &first, &());
}

fn killed_worker_is_told_to_a_later_joiner() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, _) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        let victim = pids.receive_pid();
        kill(victim, SIGKILL);
        until_dead(victim);
        let error = running.join().unwrap_err();
        assert!(is_killed_by(SIGKILL, &error), "{error}");
        assert_eq!(error.process(), running.id());
    });
    trial.run(master, &first, &());
}

fn killed_worker_ends_a_join_any_and_a_join_with_deadline() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        let one = waiter.start(&()).unwrap();
        let one_pid = pids.receive_pid();
        let two = waiter.start(&()).unwrap();
        let two_pid = pids.receive_pid();
        kill(two_pid, SIGKILL);
        let (position, result) = join_any(&[one, two]);
        assert_eq!(position, 1);
        assert!(is_killed_by(SIGKILL, &result.unwrap_err()));
        kill(one_pid, SIGKILL);
        let far = Instant::now() + Duration::from_secs(100);
        let error = one.join_deadline(far).unwrap_err();
        assert!(is_killed_by(SIGKILL, &error));
        gate.send(0);
    });
    trial.run(master, &first, &());
}

/// The role of processes that are to die.
const VICTIM: u32 = 1;

/// Calls `attempt` with a victim that dies at its first crash point, then at its second, and so on until
/// it passes through unharmed. `attempt` is told where the victim died.
fn kill_at_each_step(attempt: impl Fn(&dyn Fn() -> Option<String>)) {
    let mut names = Vec::new();
    for step in 1.. {
        crash::arm_role(VICTIM, step);
        attempt(&crash::died_at);
        crash::disarm();
        match crash::died_at() {
            None => break,
            Some(name) => names.push(name),
        }
        assert!(step < 200, "the victim never lives: {names:?}");
    }
    assert!(!names.is_empty(), "the victim has passed no crash point");
    eprintln!("died at: {names:?}");
}

fn worker_killed_at_each_step_is_joined() {
    let trial = Trial::new();
    // The page that the victims count in must be there before they are forked.
    crash::arm(None);
    crash::disarm();
    let mut master = trial.master().process_limit(8);
    let victim = master.def_process(|number: u64| {
        crash::set_role(VICTIM);
        vec![number; 100]
    });
    let first = master.def_process(move |(): ()| {
        kill_at_each_step(|died_at| {
            let running = victim.start(&7).unwrap();
            let result = running.join();
            match result {
                Ok(numbers) => assert_eq!(numbers, vec![7; 100]),
                Err(error) => {
                    assert!(is_killed_by(SIGKILL, &error), "{error}");
                    until("the place of death", || died_at().is_some());
                    let place = died_at().unwrap();
                    assert!(
                        place != "proc.control.finish",
                        "delivered, but lost at {place}"
                    );
                }
            }
            // It is well afterwards, however often that happens.
            assert_eq!(spawn(|x: u64| x + 1, &1).unwrap().join().unwrap(), 2);
        });
    });
    trial.run(master, &first, &());
}

fn asker_killed_at_each_step_leaves_a_start_or_nothing() {
    let trial = Trial::new();
    crash::arm(None);
    crash::disarm();
    let ran = Channel::new();
    // Each slot that is lost would be missed soon.
    let mut master = trial.master().process_limit(8);
    let child = master.def_process(move |_: Vec<u64>| ran.send(1));
    let asker = master.def_process(move |(): ()| {
        crash::set_role(VICTIM);
        child.start_detached(&vec![1; 100]).unwrap();
        crash::set_role(0);
    });
    let first = master.def_process(move |(): ()| {
        for _ in 0..3 {
            kill_at_each_step(|died_at| {
                let started = match asker.start(&()).unwrap().join() {
                    Ok(()) => true,
                    Err(error) => {
                        assert!(is_killed_by(SIGKILL, &error), "{error}");
                        let place = died_at().unwrap();
                        ["proc.control.queued", "proc.control.announce"].contains(&&*place)
                    }
                };
                if started {
                    ran.receive();
                } else {
                    // If it ran all the same, the next attempt would receive too much too early, and
                    // the last one would leave a number behind.
                }
            });
            // As many as fit at once: none is lost.
            let all: Vec<_> = (0..6)
                .map(|number| spawn(|x: u64| x, &number).unwrap())
                .collect();
            for (number, one) in all.iter().enumerate() {
                assert_eq!(one.join().unwrap(), number as u64);
            }
        }
        ran.send(99);
        assert_eq!(ran.receive(), 99, "a start ran that was not to");
    });
    trial.run(master, &first, &());
}

fn joiner_killed_at_each_step_leaves_or_takes_the_result() {
    let trial = Trial::new();
    crash::arm(None);
    crash::disarm();
    let mut master = trial.master().process_limit(8);
    let joiner = master.def_process(|running: Running<Vec<u64>>| {
        crash::set_role(VICTIM);
        let result = running.join();
        crash::set_role(0);
        assert_eq!(result.unwrap().len(), 100);
    });
    let first = master.def_process(move |(): ()| {
        kill_at_each_step(|died_at| {
            let running = spawn(|number: u64| vec![number; 100], &7).unwrap();
            let died = joiner.start(&running).unwrap().join().is_err();
            match running.join() {
                Ok(numbers) => {
                    assert_eq!(numbers, vec![7; 100]);
                    assert!(died, "it was given twice");
                    let place = died_at().unwrap();
                    assert!(place != "proc.control.collect", "given again after {place}");
                }
                Err(JoinError::AlreadyJoined { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        });
    });
    trial.run(master, &first, &());
}

fn detacher_killed_at_each_step_leaves_or_frees_the_slot() {
    let trial = Trial::new();
    crash::arm(None);
    crash::disarm();
    let gate = Channel::new();
    let mut master = trial.master().process_limit(8);
    let detacher = master.def_process(|running: Running<u64>| {
        crash::set_role(VICTIM);
        let result = running.detach();
        crash::set_role(0);
        result.unwrap();
    });
    let waiter = master.def_process(move |(): ()| gate.receive());
    let enders = Channel::new();
    let ender = master.def_process(move |(): ()| {
        enders.send_pid();
        7
    });
    let first = master.def_process(move |(): ()| {
        for has_ended in [true, false, true, false] {
            kill_at_each_step(|_| {
                let running = match has_ended {
                    true => ender.start(&()).unwrap(),
                    false => waiter.start(&()).unwrap(),
                };
                if has_ended {
                    until_dead(enders.receive_pid());
                }
                let _ = detacher.start(&running).unwrap().join();
                if !has_ended {
                    gate.send(7);
                }
                match running.join() {
                    Ok(number) => assert_eq!(number, 7),
                    Err(JoinError::AlreadyJoined { .. } | JoinError::Detached { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            });
        }
        until("slots of detached processes are free", || {
            let all: Vec<_> = (0..7).map_while(|n| spawn(|x: u64| x, &n).ok()).collect();
            all.iter().all(|one| one.join().is_ok()) && all.len() == 7
        });
    });
    trial.run(master, &first, &());
}

fn dead_joiner_leaves_the_result_to_another() {
    #[derive(Serialize)]
    struct Deadly;
    impl<'de> Deserialize<'de> for Deadly {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            kill(Pid::this(), SIGKILL);
            unreachable!("it is dead")
        }
    }
    let trial = Trial::new();
    let mut master = trial.master();
    let deadly = master.def_process(|(): ()| Deadly);
    let joiner = master.def_process(move |process: ProcessId| {
        let _ = deadly.join_point().join(process);
    });
    let first = master.def_process(move |(): ()| {
        let running = deadly.start(&()).unwrap();
        for _ in 0..5 {
            // They die while they hold the claim, in the middle of decoding.
            let error = joiner.start(&running.id()).unwrap().join().unwrap_err();
            assert!(is_killed_by(SIGKILL, &error), "{error}");
        }
        running.detach().unwrap();
    });
    trial.run(master, &first, &());
}

fn dead_sleeping_joiner_leaves_the_process_to_another() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        running.join().unwrap()
    });
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        pids.receive();
        for _ in 0..5 {
            let join = joiner.start(&running).unwrap();
            let pid = joiner_pids.receive_pid();
            until_asleep(pid);
            assert!(matches!(
                running.join(),
                Err(JoinError::AlreadyJoined { .. })
            ));
            kill(pid, SIGKILL);
            assert!(is_killed_by(SIGKILL, &join.join().unwrap_err()));
        }
        gate.send(5);
        assert_eq!(running.join().unwrap(), 5);
    });
    trial.run(master, &first, &());
}

// ---- who gets the result -----------------------------------------------------------------------

fn one_of_two_joiners_gets_the_result_and_the_other_an_error_at_once() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner = master.def_process(move |running: Running<u64>| running.join());
    let first = master.def_process(move |(): ()| {
        for round in 0..50 {
            let running = waiter.start(&()).unwrap();
            pids.receive();
            let joins = [
                joiner.start(&running).unwrap(),
                joiner.start(&running).unwrap(),
            ];
            // One of them ends while the process still runs.
            let (loser, result) = join_any(&joins);
            let refused = result.unwrap();
            assert!(
                matches!(refused, Err(JoinError::AlreadyJoined { process }) if process == running.id()),
                "{refused:?}"
            );
            gate.send(round);
            assert_eq!(joins[1 - loser].join().unwrap(), Ok(round));
        }
    });
    trial.run(master, &first, &());
}

fn one_of_two_threads_gets_the_result() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        for round in 0..50 {
            let running = waiter.start(&()).unwrap();
            pids.receive();
            let (ended, ends) = std::sync::mpsc::channel();
            for _ in 0..2 {
                let ended = ended.clone();
                std::thread::spawn(move || ended.send(running.join()));
            }
            let refused = ends.recv().unwrap();
            assert!(
                matches!(refused, Err(JoinError::AlreadyJoined { .. })),
                "{refused:?}"
            );
            gate.send(round);
            assert_eq!(ends.recv().unwrap(), Ok(round));
        }
    });
    trial.run(master, &first, &());
}

fn second_join_is_refused() {
    in_a_worker(|| {
        let running = spawn(|x: u64| x, &3).unwrap();
        assert_eq!(running.join(), Ok(3));
        let process = running.id();
        let refused = Err(JoinError::AlreadyJoined { process });
        assert_eq!(running.join(), refused);
        assert_eq!(running.join_deadline(Instant::now()), refused);
        assert_eq!(running.join_nowait().map(Option::unwrap), refused);
        assert_eq!(join_any(&[running]), (0, refused));
        let refused = running.detach().unwrap_err();
        assert_eq!(refused, JoinError::AlreadyJoined { process });
    });
}

fn nowait_says_not_yet_until_the_end() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let failing = master.def_process(|(): ()| -> u64 { std::process::exit(4) });
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        pids.receive();
        for _ in 0..1000 {
            assert_eq!(running.join_nowait(), Ok(None));
        }
        gate.send(5);
        until("the result", || match running.join_nowait() {
            Ok(None) => false,
            other => {
                assert_eq!(other, Ok(Some(5)));
                true
            }
        });
        let failed = failing.start(&()).unwrap();
        until("the failure", || match failed.join_nowait() {
            Ok(None) => false,
            other => {
                assert!(
                    matches!(other, Err(JoinError::Exited { code: 4, .. })),
                    "{other:?}"
                );
                true
            }
        });
    });
    trial.run(master, &first, &());
}

fn nowait_does_not_take_the_place_of_a_joiner() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        running.join()
    });
    let first = master.def_process(move |(): ()| {
        for round in 0..30 {
            let running = waiter.start(&()).unwrap();
            pids.receive();
            // Somebody asks all the time, from a thread, while another joins.
            let stop = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let answer = running.join_nowait();
                        assert!(
                            matches!(answer, Ok(None) | Err(JoinError::AlreadyJoined { .. })),
                            "{answer:?}"
                        );
                    }
                });
                let join = joiner.start(&running).unwrap();
                until_asleep(joiner_pids.receive_pid());
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                gate.send(round);
                assert_eq!(join.join().unwrap(), Ok(round));
            });
        }
    });
    trial.run(master, &first, &());
}

fn deadline_leaves_the_process_as_it_is() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        pids.receive();
        let process = running.id();
        let late = Err(JoinError::TimedOut { process });
        assert_eq!(running.join_deadline(Instant::now()), late);
        let start = Instant::now();
        let limit = Duration::from_millis(30);
        assert_eq!(running.join_deadline(start + limit), late);
        assert!(start.elapsed() >= limit, "it came back early");
        assert_eq!(
            waiter.join_point().join_deadline(process, start + limit),
            late
        );
        gate.send(8);
        let far = Instant::now() + Duration::from_secs(60);
        assert_eq!(running.join_deadline(far), Ok(8));
    });
    trial.run(master, &first, &());
}

fn join_any_takes_each_once() {
    in_a_worker(|| {
        let mut left: Vec<(u64, Running<u64>)> = (0..60)
            .map(|number| {
                let body = |number: u64| match number % 4 {
                    0 => panic!("number {number}"),
                    1 => std::process::exit(3),
                    _ => number * 2,
                };
                (number, spawn(body, &number).unwrap())
            })
            .collect();
        while !left.is_empty() {
            let handles: Vec<_> = left.iter().map(|(_, running)| *running).collect();
            let (position, result) = join_any(&handles);
            let (number, running) = left.swap_remove(position);
            match (number % 4, result) {
                (
                    0,
                    Err(JoinError::Panicked {
                        message, process, ..
                    }),
                ) => {
                    assert_eq!(message, format!("number {number}"));
                    assert_eq!(process, running.id());
                }
                (1, Err(JoinError::Exited { code: 3, .. })) => {}
                (2 | 3, Ok(double)) => assert_eq!(double, number * 2),
                (_, other) => panic!("{number}: {other:?}"),
            }
        }
    });
}

fn join_any_twice_on_one_handle() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |handles: Vec<Running<u64>>| {
        joiner_pids.send_pid();
        let (position, result) = join_any(&handles);
        (position, result)
    });
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        let other = waiter.start(&()).unwrap();
        pids.receive();
        pids.receive();
        let joins = [
            joiner.start(&vec![running]).unwrap(),
            joiner.start(&vec![running]).unwrap(),
        ];
        until_asleep(joiner_pids.receive_pid());
        until_asleep(joiner_pids.receive_pid());
        gate.send(9);
        gate.send(9);
        let mut results = joins.map(|join| join.join().unwrap().1);
        results.sort_by_key(Result::is_err);
        assert_eq!(results[0], Ok(9));
        let process = running.id();
        assert_eq!(results[1], Err(JoinError::AlreadyJoined { process }));
        assert_eq!(other.join(), Ok(9));
    });
    trial.run(master, &first, &());
}

fn join_any_of_a_process_that_somebody_detaches() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        join_any(&[running]).1
    });
    let first = master.def_process(move |is_killed: bool| {
        for _ in 0..20 {
            let running = waiter.start(&()).unwrap();
            let victim = pids.receive_pid();
            let join = joiner.start(&running).unwrap();
            until_asleep(joiner_pids.receive_pid());
            running.detach().unwrap();
            match is_killed {
                true => kill(victim, SIGKILL),
                false => gate.send(1),
            }
            let result = join.join().unwrap();
            assert!(
                matches!(
                    result,
                    Err(JoinError::AlreadyJoined { .. } | JoinError::Detached { .. })
                ),
                "{result:?}"
            );
        }
    });
    let both = master.def_process(move |(): ()| {
        first.start(&false).unwrap().join().unwrap();
        first.start(&true).unwrap().join().unwrap();
    });
    trial.run(master, &both, &());
}

// ---- points ------------------------------------------------------------------------------------

fn wrong_join_point_is_told_and_harms_nothing() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let other = master.def_process(|(): ()| 0_u64);
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        pids.receive();
        let wrong = other.join_point();
        let expected = Err(JoinError::WrongJoinPoint {
            process: running.id(),
            expected: waiter.join_point().id(),
            found: wrong.id(),
        });
        assert_eq!(wrong.join(running.id()), expected);
        assert_eq!(wrong.join_nowait(running.id()).map(|_| 0), expected);
        assert_eq!(
            wrong.join_deadline(running.id(), Instant::now() + Duration::from_secs(60)),
            expected
        );
        gate.send(6);
        assert_eq!(waiter.join_point().join(running.id()), Ok(6));
        // A spawned function has no join point.
        let spawned = spawn(|x: u64| x, &1).unwrap();
        let refused = wrong.join(spawned.id()).unwrap_err();
        assert!(matches!(refused, JoinError::WrongJoinPoint { .. }));
        assert_eq!(spawned.join(), Ok(1));
    });
    trial.run(master, &first, &());
}

fn released_fork_point_starts_nothing() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        pids.receive();
        waiter.fork_point().release().unwrap();
        let error = waiter.start(&()).unwrap_err();
        assert!(
            matches!(error, Error::NoResource { id, .. } if id == waiter.fork_point().id()),
            "{error}"
        );
        assert!(waiter.fork_point().start(&()).is_err());
        assert!(waiter.start_detached(&()).is_err());
        let error = waiter.fork_point().release().unwrap_err();
        assert!(matches!(error, Error::NoResource { .. }), "{error}");
        // What runs already is not touched.
        gate.send(2);
        assert_eq!(running.join(), Ok(2));
    });
    trial.run(master, &first, &());
}

fn released_join_point_drops_results() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(8);
    let (waiter, pids, gate) = define_waiter(&mut master);
    let quick = master.def_process(|x: u64| x);
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        running.join()
    });
    let first = master.def_process(move |(): ()| {
        let joined = waiter.start(&()).unwrap();
        pids.receive();
        let join = joiner.start(&joined).unwrap();
        until_asleep(joiner_pids.receive_pid());
        let running = waiter.start(&()).unwrap();
        pids.receive();
        waiter.join_point().release().unwrap();
        let released = Err(JoinError::NoResource {
            process: running.id(),
            id: waiter.join_point().id(),
        });
        assert_eq!(running.join(), released);
        assert_eq!(running.join_nowait().map(Option::unwrap), released);
        gate.send(1);
        gate.send(1);
        // Whoever waited already still gets the result.
        assert_eq!(join.join().unwrap(), Ok(1));
        // Results are dropped: far more than the table holds.
        quick.join_point().release().unwrap();
        for number in 0..100 {
            until("a slot", || match quick.start(&number) {
                Ok(_) => true,
                Err(Error::ProcessTableFull { .. }) => false,
                Err(error) => panic!("{error}"),
            });
        }
        let error = quick.join_point().release().unwrap_err();
        assert!(matches!(error, Error::NoResource { .. }), "{error}");
    });
    trial.run(master, &first, &());
}

fn claim_given_back_after_the_release_keeps_no_slot() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(8);
    let (pids, gate) = (Channel::new(), Channel::new());
    let waiters: Vec<Process<(), u64>> = (0..8)
        .map(|_| {
            master.def_process(move |(): ()| {
                pids.send_pid();
                gate.receive()
            })
        })
        .collect();
    let joiner_pids = Channel::new();
    let joiner = master.def_process(move |running: Running<u64>| {
        joiner_pids.send_pid();
        running.join()
    });
    let first = master.def_process(move |(): ()| {
        for (number, waiter) in waiters.iter().enumerate() {
            let running = waiter.start(&()).unwrap();
            let victim = pids.receive_pid();
            if number % 2 == 0 {
                let join = joiner.start(&running).unwrap();
                let pid = joiner_pids.receive_pid();
                until_asleep(pid);
                waiter.join_point().release().unwrap();
                kill(pid, SIGKILL);
                join.join().unwrap_err();
            } else {
                std::thread::scope(|scope| {
                    let soon = Instant::now() + Duration::from_millis(50);
                    let join = scope.spawn(move || running.join_deadline(soon));
                    // Or has waited: on a busy machine nobody may have seen it.
                    until("the thread waits", || {
                        running.join_nowait() != Ok(None) || join.is_finished()
                    });
                    waiter.join_point().release().unwrap();
                    join.join().unwrap().unwrap_err();
                });
            }
            gate.send(1);
            until_dead(victim);
        }
        let all: Vec<_> = (0..7).map(|n| spawn(|x: u64| x, &n).unwrap()).collect();
        all.iter().map(|one| one.join().unwrap()).sum::<u64>()
    });
    assert_eq!(trial.run(master, &first, &()), 21);
}

// ---- detaching ---------------------------------------------------------------------------------

fn detached_processes_free_their_slots() {
    let trial = Trial::new();
    let ran = Channel::new();
    let mut master = trial.master().process_limit(4);
    let quick = master.def_process(move |number: u64| {
        ran.send(number);
        if number.is_multiple_of(7) {
            panic!("nobody hears this");
        }
        vec![number; 1000]
    });
    let first = master.def_process(move |(): ()| {
        let mut sum = 0;
        for number in 1..=200 {
            until("a slot", || match quick.start_detached(&number) {
                Ok(_) => true,
                Err(Error::ProcessTableFull { limit: 4 }) => false,
                Err(error) => panic!("{error}"),
            });
            sum += ran.receive();
        }
        assert_eq!(sum, 200 * 201 / 2, "each ran once");
    });
    trial.run(master, &first, &());
}

fn detach_after_the_end_frees_the_slot() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(4);
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |is_over: bool| {
        for number in 0..50 {
            let mut started = None;
            until("a slot", || {
                started = waiter.start(&()).ok();
                started.is_some()
            });
            let running = started.unwrap();
            let pid = pids.receive_pid();
            if is_over {
                gate.send(number);
                until_dead(pid);
            }
            running.detach().unwrap();
            if !is_over {
                gate.send(number);
            }
        }
    });
    let both = master.def_process(move |(): ()| {
        first.start(&true).unwrap().join().unwrap();
        first.start(&false).unwrap().join().unwrap();
    });
    trial.run(master, &both, &());
}

fn detached_process_cannot_be_joined() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        let running = waiter.start(&()).unwrap();
        running.detach().unwrap();
        let process = running.id();
        assert_eq!(running.join(), Err(JoinError::Detached { process }));
        assert_eq!(running.detach(), Err(JoinError::Detached { process }));
        let born_detached = waiter.start_detached(&()).unwrap();
        let refused = waiter.join_point().join(born_detached);
        let process = born_detached;
        assert_eq!(refused, Err(JoinError::Detached { process }));
        // Somebody waits for it: it cannot be detached.
        let waited_for = waiter.start(&()).unwrap();
        for _ in 0..3 {
            pids.receive();
        }
        std::thread::scope(|scope| {
            let join = scope.spawn(|| waited_for.join());
            let process = waited_for.id();
            until("the thread waits", || {
                waited_for.join_nowait() == Err(JoinError::AlreadyJoined { process })
            });
            assert_eq!(
                waited_for.detach(),
                Err(JoinError::AlreadyJoined { process })
            );
            for _ in 0..3 {
                gate.send(4);
            }
            assert_eq!(join.join().unwrap(), Ok(4));
        });
    });
    trial.run(master, &first, &());
}

// ---- the table ---------------------------------------------------------------------------------

fn full_table_is_an_error_until_one_is_joined() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(16);
    let (waiter, pids, gate) = define_waiter(&mut master);
    let first = master.def_process(move |(): ()| {
        for _ in 0..3 {
            // The first process has a slot itself.
            let all: Vec<_> = (0..15).map(|_| waiter.start(&()).unwrap()).collect();
            for _ in 0..5 {
                let error = waiter.start(&()).unwrap_err();
                assert!(
                    matches!(error, Error::ProcessTableFull { limit: 16 }),
                    "{error}"
                );
                assert!(error.to_string().contains("16"), "{error}");
            }
            assert!(spawn(|x: u64| x, &0).is_err());
            for number in 0..15 {
                pids.receive();
                gate.send(number);
            }
            all[7].join().unwrap();
            let one_more = spawn(|x: u64| x, &3).unwrap();
            assert_eq!(one_more.join(), Ok(3));
            let mut sum = 0;
            for (index, one) in all.iter().enumerate() {
                sum += if index == 7 { 0 } else { one.join().unwrap() };
            }
            assert!((91..=105).contains(&sum), "{sum}");
        }
    });
    trial.run(master, &first, &());
}

fn table_of_one_slot_works() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(1);
    let child = master.def_process(|(): ()| ());
    let first = master.def_process(move |(): ()| {
        matches!(child.start(&()), Err(Error::ProcessTableFull { limit: 1 }))
    });
    assert!(trial.run(master, &first, &()));
}

// ---- refusals ----------------------------------------------------------------------------------

fn self_join_is_refused() {
    let trial = Trial::new();
    let mut master = trial.master();
    let point: Process<(), u64> = master.declare();
    master.define(point, move |(): ()| {
        let process = self_process_id().unwrap();
        let me = point.join_point();
        assert_eq!(me.join(process), Err(JoinError::WouldDeadlock { process }));
        let soon = Instant::now() + Duration::from_millis(10);
        assert_eq!(
            me.join_deadline(process, soon),
            Err(JoinError::TimedOut { process })
        );
        assert_eq!(me.join_nowait(process), Ok(None));
        17
    });
    assert_eq!(trial.run(master, &point, &()), 17);
}

fn join_in_the_master_is_refused() {
    let trial = Trial::new();
    let started = Rc::new(RefCell::new(None));
    let in_hook = Rc::clone(&started);
    let mut master = trial.master();
    let child = master.def_process(|x: u64| x + 1);
    let first = master.def_process(move |running: Running<u64>| running.join().unwrap());
    let master = master.init(move |_| {
        let running = child.start(&1)?;
        let process = running.id();
        let refused = Err(JoinError::NotInMaster { process });
        assert_eq!(running.join(), refused);
        let far = Instant::now() + Duration::from_secs(100);
        assert_eq!(running.join_deadline(far), refused);
        assert_eq!(join_any(&[running]), (0, refused));
        assert_eq!(running.join_nowait(), Ok(None));
        assert!(matches!(self_process_id(), Err(Error::NotInMaster { .. })));
        *in_hook.borrow_mut() = Some(running);
        Ok(())
    });
    let handle = RefCell::new(None);
    let start = || {
        let running = started.borrow().expect("the hook has run");
        let first = first.start(&running)?;
        handle.replace(Some(first));
        Ok(first.id())
    };
    let result = master
        .run_with(start, |_| handle.borrow().unwrap().join_nowait())
        .unwrap();
    assert_eq!(result, Ok(Some(2)));
    trial.check_nothing_is_left();
}

fn nowait_works_in_the_master_after_the_run() {
    let trial = Trial::new();
    let mut master = trial.master();
    let leaves = master.def_process(|x: u64| x * 3);
    let panics = master.def_process(|_: u64| -> u64 { panic!("left behind") });
    let first = master.def_process(move |(): ()| {
        let ids: Vec<ProcessId> = (0..5)
            .map(|number| leaves.fork_point().start(&number).unwrap())
            .collect();
        let failed = panics.fork_point().start(&0).unwrap();
        // Their ends, without joining them.
        let all_ended = |ids: &[ProcessId]| {
            ids.iter().all(|&id| {
                !matches!(
                    panics.join_point().join_nowait(id),
                    Err(JoinError::NoSuchProcess { .. })
                )
            })
        };
        assert!(all_ended(&ids));
        let done = spawn(
            |()| {
                // sleep: the work of the process.
                std::thread::sleep(Duration::from_millis(50));
            },
            &(),
        );
        done.unwrap().join().unwrap();
        (ids, failed)
    });
    let handle = RefCell::new(None);
    let start = || {
        let running = first.start(&())?;
        handle.replace(Some(running));
        Ok(running.id())
    };
    let (numbers, message, again) = master
        .run_with(start, |_| {
            let (ids, failed) = handle.borrow().unwrap().join_nowait().unwrap().unwrap();
            let join = |id: &ProcessId| leaves.join_point().join_nowait(*id).unwrap().unwrap();
            let numbers: Vec<u64> = ids.iter().map(join).collect();
            let error = panics.join_point().join_nowait(failed).unwrap_err();
            let again = leaves.join_point().join_nowait(ids[0]);
            (numbers, error.to_string(), again)
        })
        .unwrap();
    assert_eq!(numbers, [0, 3, 6, 9, 12]);
    assert!(message.contains("left behind"), "{message}");
    assert!(matches!(again, Err(JoinError::AlreadyJoined { .. })));
    trial.check_nothing_is_left();
}

fn results_that_nobody_took_are_told_after_the_run() {
    let trial = Trial::new();
    // No worker is left for the second waiter, so it is never begun.
    let mut master = trial.master().ready_workers(0).grace(Duration::ZERO);
    let (waiter, pids, _) = define_waiter(&mut master);
    let ids = Rc::new(RefCell::new(Vec::new()));
    let first = master.def_process(move |ids: Vec<ProcessId>| {
        pids.receive();
        let late: Vec<_> = (0..20).map(|_| waiter.start(&()).unwrap().id()).collect();
        [ids, late].concat()
    });
    let handle = RefCell::new(None);
    let start = || {
        ids.borrow_mut().push(waiter.start(&())?.id());
        let running = first.start(&ids.borrow())?;
        handle.replace(Some(running));
        Ok(running.id())
    };
    let errors = master
        .run_with(start, |_| {
            let ids = handle.borrow().unwrap().join_nowait().unwrap().unwrap();
            assert_eq!(ids.len(), 21);
            let join = |id: &ProcessId| waiter.join_point().join_nowait(*id);
            ids.iter().map(join).collect::<Vec<_>>()
        })
        .unwrap();
    for error in errors {
        // "Not yet" would be a lie: the run is over.
        assert!(
            matches!(
                error,
                Err(JoinError::ShutDown { .. } | JoinError::Killed { .. })
            ),
            "{error:?}"
        );
    }
    trial.check_nothing_is_left();
}

fn start_outside_a_run_is_refused() {
    let error = spawn(|x: u64| x, &1).unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
    let trial = Trial::new();
    let mut master = trial.master();
    let process = master.def_process(|x: u64| x);
    let error = process.start(&1).unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
    assert_eq!(trial.run(master, &process, &5), 5);
    // The run is over.
    let error = process.start(&1).unwrap_err();
    assert!(
        matches!(error, Error::NotRunning { .. } | Error::ShutDown),
        "{error}"
    );
    let error = spawn(|x: u64| x, &1).unwrap_err();
    assert!(
        matches!(error, Error::NotRunning { .. } | Error::ShutDown),
        "{error}"
    );
}

fn handles_of_an_earlier_run_are_unknown() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|(): ()| spawn(|x: u64| x, &1).unwrap());
    let old = trial.run(master, &first, &());
    let mut master = trial.master();
    let first = master.def_process(|old: Running<u64>| {
        let process = old.id();
        assert!(process < self_process_id().unwrap(), "ids count up");
        let unknown = Err(JoinError::NoSuchProcess { process });
        assert_eq!(old.join(), unknown);
        assert_eq!(old.join_nowait().map(Option::unwrap), unknown);
        assert!(old.detach().is_err());
        assert!(old.kill().is_err());
    });
    trial.run(master, &first, &old);
}

fn ids_that_never_were_are_unknown() {
    let trial = Trial::new();
    let mut master = trial.master();
    let process = master.def_process(|(): ()| 0_u64);
    let first = master.def_process(move |(): ()| {
        let mine = self_process_id().unwrap().get();
        for number in [
            0,
            mine + 1,
            mine + 4096,
            u64::MAX,
            u64::MAX / 2,
            // The slot of this process, in a generation whose low half is that of this process.
            mine + (4096 << 32),
        ] {
            let process_id = ProcessId::from_raw(number);
            let joined = process.join_point().join(process_id);
            assert!(
                matches!(
                    joined,
                    Err(JoinError::NoSuchProcess { .. } | JoinError::AlreadyJoined { .. })
                ),
                "{number}: {joined:?}"
            );
            let running = process.join_point().running(process_id);
            assert!(running.detach().is_err(), "{number}");
            let _ = running.kill();
        }
        // Nobody was hurt.
        spawn(|x: u64| x, &1).unwrap().join().unwrap()
    });
    assert_eq!(trial.run(master, &first, &()), 1);
}

// ---- shapes ------------------------------------------------------------------------------------

fn nested_starts_to_depth_fifty() {
    fn deeper(depth: u64) -> u64 {
        match depth {
            0 => 0,
            _ => 1 + spawn(deeper, &(depth - 1)).unwrap().join().unwrap(),
        }
    }
    assert_eq!(in_a_worker(|| deeper(50)), 50);
}

fn declared_process_calls_itself() {
    let trial = Trial::new();
    let mut master = trial.master();
    let fib: Process<u64, u64> = master.declare();
    master.define(fib, move |n: u64| match n {
        0 | 1 => n,
        _ => {
            let (one, two) = (fib.start(&(n - 1)).unwrap(), fib.start(&(n - 2)).unwrap());
            one.join().unwrap() + two.join().unwrap()
        }
    });
    assert_eq!(trial.run(master, &fib, &11), 89);
}

fn declared_processes_call_each_other() {
    let trial = Trial::new();
    let mut master = trial.master();
    let even: Process<u64, bool> = master.declare();
    let odd = master.def_process(move |n: u64| match n {
        0 => false,
        _ => even.start(&(n - 1)).unwrap().join().unwrap(),
    });
    master.define(even, move |n: u64| match n {
        0 => true,
        _ => odd.start(&(n - 1)).unwrap().join().unwrap(),
    });
    let both = master.def_process(move |(): ()| {
        let ask = |point: &Process<u64, bool>, n| point.start(&n).unwrap().join().unwrap();
        [ask(&even, 20), ask(&even, 21), ask(&odd, 20), ask(&odd, 21)]
    });
    assert_eq!(trial.run(master, &both, &()), [true, false, false, true]);
}

fn functions_and_closures_without_captures_are_spawned() {
    fn triple(x: u64) -> u64 {
        3 * x
    }
    fn length<T: AsRef<str>>(text: T) -> usize {
        text.as_ref().len()
    }
    in_a_worker(|| {
        assert_eq!(spawn(triple, &2).unwrap().join(), Ok(6));
        assert_eq!(spawn(|x: u64| x + 1, &2).unwrap().join(), Ok(3));
        assert_eq!(spawn(|()| (), &()).unwrap().join(), Ok(()));
        let texts = ["", "one", "eleven letters"].map(str::to_owned);
        for text in texts {
            let running = spawn(length::<String>, &text).unwrap();
            assert_eq!(running.join(), Ok(text.len()));
        }
        // A function that is an argument of a generic one.
        fn twice<F: Fn(u64) -> u64 + Copy + 'static>(f: F, x: u64) -> u64 {
            let once = spawn(f, &x).unwrap().join().unwrap();
            spawn(f, &once).unwrap().join().unwrap()
        }
        assert_eq!(twice(triple, 1), 9);
    });
}

fn declared_process_without_function_is_told() {
    let trial = Trial::new();
    let mut master = trial.master();
    let nothing: Process<u64, u64> = master.declare();
    let first = master.def_process(move |(): ()| {
        let error = nothing.start(&1).unwrap().join().unwrap_err();
        let JoinError::NotStarted { reason, .. } = &error else {
            panic!("{error}");
        };
        assert!(reason.contains("define"), "{reason}");
    });
    trial.run(master, &first, &());
}

fn running_handle_is_joined_by_another_worker() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (waiter, pids, gate) = define_waiter(&mut master);
    let joiner = master.def_process(|handles: Vec<Option<Running<u64>>>| -> u64 {
        let handles = handles.into_iter().flatten();
        handles.map(|running| running.join().unwrap()).sum()
    });
    let first = master.def_process(move |(): ()| {
        let one = waiter.start(&()).unwrap();
        let two = waiter.start(&()).unwrap();
        let join = joiner.start(&vec![Some(one), None, Some(two)]).unwrap();
        for number in [30, 12] {
            pids.receive();
            gate.send(number);
        }
        // A handle of a join, returned as a result and joined by its receiver.
        let wrap = spawn(|running: Running<u64>| running, &join).unwrap();
        let join = wrap.join().unwrap();
        assert_eq!(join.join(), Ok(42));
    });
    trial.run(master, &first, &());
}

fn process_handle_is_started_by_another_worker() {
    let trial = Trial::new();
    let mut master = trial.master();
    let square = master.def_process(|x: u64| x * x);
    let caller = master.def_process(|(process, x): (Process<u64, u64>, u64)| {
        process.start(&x).unwrap().join().unwrap()
    });
    let first = master.def_process(move |(): ()| {
        let running = caller.start(&(square, 7)).unwrap();
        assert_eq!(running.join(), Ok(49));
    });
    trial.run(master, &first, &());
}

fn low_level_points_start_and_join() {
    let trial = Trial::new();
    let mut master = trial.master();
    let square = master.def_process(|x: u64| x * x);
    let first = master.def_process(move |(): ()| {
        let (fork_point, join_point) = (square.fork_point(), square.join_point());
        let ids: Vec<_> = (0..20).map(|x| fork_point.start(&x).unwrap()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{ids:?}");
        for (x, id) in ids.iter().enumerate() {
            assert_eq!(join_point.join(*id), Ok((x * x) as u64));
        }
    });
    trial.run(master, &first, &());
}

fn low_ready_counts_work() {
    for ready in [0, 1, 64] {
        let trial = Trial::new();
        let mut master = trial.master().ready_workers(ready);
        let first = master.def_process(move |(): ()| -> u64 {
            let start = |x| spawn(|x: u64| x, &x).unwrap();
            (0..5)
                .map(|round| {
                    let all: Vec<_> = (0..20).map(|x| start(x * round)).collect();
                    all.iter().map(|one| one.join().unwrap()).sum::<u64>()
                })
                .sum()
        });
        assert_eq!(trial.run(master, &first, &()), 190 * 10);
    }
}

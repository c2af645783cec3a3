//! Guards against regions that a process may use without having inherited them, and against regions that go while somebody who
//! inherits them has not looked at them yet.
//!
//! # Safety
//! Regions are read and written as atomics only.
#![allow(unsafe_code)]

#[path = "objects/mod.rs"]
mod objects;
mod trial;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use netmcore_proc::{
    Error, Inherit, Process, ProcessId, Region, ResourceId, ResourceRepr, StartOptions,
    create_preallocated_shm, create_shm, get_region, get_resource, get_shm, release,
    self_process_id, spawn, spawn_with,
};
use netmcore_sys::crash;
use objects::{exists, wait_until};
use trial::{Channel, SIGKILL, SIGSEGV, Trial, in_a_worker, is_killed_by};

netmcore_forktest::forktests!(
    only_what_was_named_is_in_reach,
    all_is_in_reach_by_default_and_younger_regions_too,
    own_regions_are_in_reach_whatever_is_inherited,
    other_types_are_not_inherited,
    refusal_names_what_to_change,
    what_the_master_has_mapped_is_forgotten_where_it_is_not_inherited,
    queued_process_keeps_what_it_inherits,
    running_process_keeps_what_it_inherits_without_looking,
    process_does_not_keep_what_it_does_not_inherit,
    asker_killed_at_each_step_leaves_the_region_to_a_heir_or_to_nobody,
    queued_process_killed_gives_up_what_it_inherits,
    asker_killed_while_its_process_is_queued,
    many_sets_at_once,
);

/// The first word of a region.
fn word(region: &Region) -> &'static AtomicU64 {
    // SAFETY: in bounds, aligned, mapped until the process ends, and an atomic for all.
    unsafe { &*region.at().cast() }
}

fn make() -> ResourceId {
    create_preallocated_shm("/nmc-inherit-", 4096).unwrap().0
}

fn only(ids: &[ResourceId]) -> StartOptions {
    StartOptions::new().inherit(Inherit::Only(ids.to_vec()))
}

fn repr_of(id: ResourceId) -> ResourceRepr {
    get_resource(id).unwrap().repr().clone()
}

/// Whether each of them is in reach; any error but the one expected fails.
fn reach(ids: Vec<ResourceId>) -> Vec<bool> {
    let me = self_process_id().unwrap();
    ids.into_iter()
        .map(|id| match get_region(id) {
            Ok(region) => {
                word(&region).fetch_add(1, SeqCst);
                true
            }
            Err(Error::NotInherited {
                id: its, process, ..
            }) => {
                assert_eq!((its, process), (id, me));
                let by_id = get_resource(id).map(drop);
                assert!(matches!(by_id, Err(Error::NotInherited { .. })));
                false
            }
            Err(error) => panic!("{error}"),
        })
        .collect()
}

// ---- in reach ------------------------------------------------------------------------------------

fn only_what_was_named_is_in_reach() {
    in_a_worker(|| {
        let ids = vec![make(), make(), make()];
        let reached = |options| spawn_with(reach, &ids, options).unwrap().join().unwrap();
        assert_eq!(reached(only(&[])), [false, false, false]);
        assert_eq!(reached(only(&ids[1..2])), [false, true, false]);
        assert_eq!(reached(only(&ids)), [true, true, true]);
        assert_eq!(reached(StartOptions::new()), [true, true, true]);
        assert_eq!(
            reached(StartOptions::new().inherit(Inherit::All)),
            [true, true, true]
        );
        let counts: Vec<u64> = ids
            .iter()
            .map(|&id| word(&get_region(id).unwrap()).load(SeqCst))
            .collect();
        assert_eq!(counts, [3, 4, 3]);
    });
}

fn all_is_in_reach_by_default_and_younger_regions_too() {
    let trial = Trial::new();
    let ids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let receives = master.def_process(move |()| reach(vec![ResourceId::from_raw(ids.receive())]));
    let first = master.def_process(move |()| {
        let all = receives.start(&()).unwrap();
        let id = make();
        ids.send(id.get());
        let all = all.join().unwrap();
        let none = receives.start_with(&(), only(&[])).unwrap();
        ids.send(id.get());
        (all, none.join().unwrap())
    });
    assert_eq!(trial.run(master, &first, &()), (vec![true], vec![false]));
}

fn own_regions_are_in_reach_whatever_is_inherited() {
    in_a_worker(|| {
        let maker = |()| {
            let id = make();
            // And what it makes for others to see.
            let child = spawn(reach, &vec![id]).unwrap().join().unwrap();
            (reach(vec![id]), child)
        };
        let made = spawn_with(maker, &(), only(&[])).unwrap().join().unwrap();
        assert_eq!(made, (vec![true], vec![true]));
    });
}

fn other_types_are_not_inherited() {
    in_a_worker(|| {
        let object = create_shm("/nmc-inherit-", 4096).unwrap();
        let get = |id: ResourceId| get_shm(id).map(|object| object.name().is_some()).unwrap();
        let got = spawn_with(get, &object.id(), only(&[])).unwrap();
        assert!(got.join().unwrap());
        // Nor are they kept for those that inherit all.
        let repr = object.repr().clone();
        let idle = spawn(
            |()| loop {
                std::thread::park()
            },
            &(),
        )
        .unwrap();
        object.release().unwrap();
        assert!(!exists(&repr));
        idle.kill().unwrap();
        let _: Result<(), _> = idle.join();
    });
}

fn refusal_names_what_to_change() {
    in_a_worker(|| {
        let (one, other) = (make(), make());
        let message = |id: ResourceId| {
            let error = get_region(id).unwrap_err();
            (error.to_string(), self_process_id().unwrap())
        };
        let (text, process): (String, ProcessId) = spawn_with(message, &one, only(&[other]))
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(
            text,
            format!(
                "{process} cannot use {one}: it was started with these regions only: {other}; add {one} to its \
                 `Inherit::Only`, or start it with `Inherit::All`"
            )
        );
        let (text, _) = spawn_with(message, &one, only(&[]))
            .unwrap()
            .join()
            .unwrap();
        assert!(text.contains("without regions"), "{text}");
    });
}

fn what_the_master_has_mapped_is_forgotten_where_it_is_not_inherited() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (one, other) = (make(), make());
    let regions = [one, other].map(|id| get_region(id).unwrap());
    let add = master.def_process(move |which: usize| word(&regions[which]).fetch_add(1, SeqCst));
    let first = master.def_process(move |()| {
        let ids = vec![one, other];
        let run = |which: usize, options| add.start_with(&which, options).unwrap().join();
        assert_eq!(run(0, StartOptions::new()).unwrap(), 0);
        assert_eq!(run(1, StartOptions::new()).unwrap(), 0);
        assert_eq!(run(1, only(&[other])).unwrap(), 1);
        // The handle was captured; the region is not there.
        assert!(is_killed_by(SIGSEGV, &run(0, only(&[other])).unwrap_err()));
        let reached = spawn_with(reach, &ids, only(&[other])).unwrap();
        assert_eq!(reached.join().unwrap(), [false, true]);
    });
    trial.run(master, &first, &());
}

// ---- kept alive ----------------------------------------------------------------------------------

/// A run without ready workers whose first process gets a process that stays until it is told to end.
fn with_sleeper(body: impl Fn(&Process<ResourceId, bool>, &Channel) + 'static) {
    let trial = Trial::new();
    let end: &'static Channel = Channel::new();
    let mut master = trial.master();
    let sleeper = master.def_process(move |id: ResourceId| {
        end.receive();
        get_region(id).is_ok()
    });
    let first = master.def_process(move |()| body(&sleeper, end));
    trial.run(master, &first, &());
}

fn queued_process_keeps_what_it_inherits() {
    let trial = Trial::new();
    let steps: &'static Channel = Channel::new();
    let mut master = trial.master().ready_workers(0);
    let looks = master.def_process(reach);
    let first = master.def_process(move |()| {
        let id = make();
        let repr = repr_of(id);
        // The master forks nothing while it is stopped, so the process stays in the queue.
        let stopped = stop_master();
        let running = looks.start_with(&vec![id], only(&[id])).unwrap();
        drop(stopped);
        release(id).unwrap();
        assert!(exists(&repr) || running.join_nowait().is_ok());
        assert_eq!(running.join().unwrap(), [true]);
        wait_until("the region is gone", || !exists(&repr));
        steps.send(1);
    });
    trial.run(master, &first, &());
    assert_eq!(steps.receive(), 1);
}

/// Keeps the master from running until it is dropped.
struct Stopped(netmcore_sys::process::Pid);

fn stop_master() -> Stopped {
    const SIGSTOP: i32 = 19;
    let master = netmcore_sys::process::Pid::parent().unwrap();
    trial::kill(master, SIGSTOP);
    Stopped(master)
}

impl Drop for Stopped {
    fn drop(&mut self) {
        const SIGCONT: i32 = 18;
        trial::kill(self.0, SIGCONT);
    }
}

fn running_process_keeps_what_it_inherits_without_looking() {
    for inherits_all in [true, false] {
        with_sleeper(move |sleeper, end| {
            for is_killed in [false, true] {
                let id = make();
                let repr = repr_of(id);
                let options = match inherits_all {
                    true => StartOptions::new(),
                    false => only(&[id]),
                };
                let running = sleeper.start_with(&id, options).unwrap();
                release(id).unwrap();
                assert!(exists(&repr), "it is in use");
                // Another round of the master changes nothing.
                spawn(|()| (), &()).unwrap().join().unwrap();
                assert!(exists(&repr), "it is in use");
                if is_killed {
                    running.kill().unwrap();
                    assert!(is_killed_by(SIGKILL, &running.join().unwrap_err()));
                } else {
                    end.send(1);
                    assert!(running.join().unwrap());
                }
                wait_until("the region is gone", || !exists(&repr));
            }
        });
    }
}

fn process_does_not_keep_what_it_does_not_inherit() {
    with_sleeper(|sleeper, end| {
        let (early, other) = (make(), make());
        let running = [
            sleeper.start_with(&early, only(&[])).unwrap(),
            sleeper.start_with(&early, only(&[other])).unwrap(),
        ];
        let all = sleeper.start(&early).unwrap();
        let late = make();
        let [early_repr, late_repr] = [early, late].map(repr_of);
        release(late).unwrap();
        assert!(!exists(&late_repr), "it is younger than all that run");
        release(early).unwrap();
        assert!(exists(&early_repr), "one inherits all");
        all.kill().unwrap();
        assert!(all.join().is_err());
        wait_until("the region is gone", || !exists(&early_repr));
        running.iter().for_each(|_| end.send(1));
        assert!(running.iter().all(|one| !one.join().unwrap()));
    });
}

// ---- deaths --------------------------------------------------------------------------------------

fn asker_killed_at_each_step_leaves_the_region_to_a_heir_or_to_nobody() {
    let trial = Trial::new();
    let mut master = trial.master();
    let started: &'static Channel = Channel::new();
    let end: &'static Channel = Channel::new();
    let looks = master.def_process(move |id: ResourceId| {
        started.send(1);
        end.receive();
        reach(vec![id])
    });
    let asker = master.def_process(move |at: u64| {
        let id = make();
        started.send(id.get());
        crash::set_role(1);
        crash::arm_role(1, at);
        let heir = looks.start_with(&id, only(&[id]));
        crash::disarm();
        heir.unwrap()
    });
    let first = master.def_process(move |()| {
        for at in 1.. {
            let outcome = asker.start(&at).unwrap().join();
            let _id = started.receive();
            let region = std::fs::read_dir("/dev/shm").unwrap().flatten();
            let count = || {
                std::fs::read_dir("/dev/shm")
                    .unwrap()
                    .flatten()
                    .filter(|entry| {
                        entry
                            .file_name()
                            .to_string_lossy()
                            .starts_with("nmc-inherit-")
                    })
                    .count()
            };
            drop(region);
            match outcome {
                Ok(heir) => {
                    assert_eq!(started.receive(), 1);
                    assert_eq!(count(), 1, "its heir runs");
                    end.send(1);
                    assert_eq!(heir.join().unwrap(), [true]);
                    wait_until("the region is gone", || count() == 0);
                    assert!(at > 3, "there are points in a start");
                    return;
                }
                Err(error) => {
                    assert!(is_killed_by(SIGKILL, &error), "{error}");
                    // Either it is queued, and lives as long as its process, or it is gone.
                    wait_until("it is one or the other", || {
                        count() == 0 || started.receive_nowait().is_some()
                    });
                    if count() == 1 {
                        end.send(1);
                    }
                    wait_until("the region is gone", || count() == 0);
                }
            }
        }
    });
    trial.run(master, &first, &());
}

fn queued_process_killed_gives_up_what_it_inherits() {
    let trial = Trial::new();
    let mut master = trial.master().ready_workers(0);
    let looks = master.def_process(reach);
    let first = master.def_process(move |()| {
        let id = make();
        let repr = repr_of(id);
        let stopped = stop_master();
        let running = looks.start_with(&vec![id], only(&[id])).unwrap();
        drop(stopped);
        // In the queue or running: either way its set goes with it.
        running.kill().unwrap();
        assert!(running.join().is_err());
        release(id).unwrap();
        wait_until("the region is gone", || !exists(&repr));
    });
    trial.run(master, &first, &());
}

fn asker_killed_while_its_process_is_queued() {
    let trial = Trial::new();
    let names: &'static Channel = Channel::new();
    let mut master = trial.master().ready_workers(0);
    let looks = master.def_process(move |id: ResourceId| {
        let region = get_region(id);
        let seen = region.map_or(0, |region| word(&region).load(SeqCst));
        names.send(seen);
    });
    let asker = master.def_process(move |()| {
        let id = make();
        word(&get_region(id).unwrap()).store(77, SeqCst);
        let _stopped = std::mem::ManuallyDrop::new(stop_master());
        looks.start_detached(&id).unwrap();
        // Nobody else can let the master run: a child does when this process is gone.
        let script = format!(
            "while kill -0 {} 2>/dev/null && ! grep -q ') Z' /proc/{}/stat; do sleep 0.01; done; kill -CONT {}",
            std::process::id(),
            std::process::id(),
            netmcore_sys::process::Pid::parent().unwrap()
        );
        #[expect(clippy::zombie_processes, reason = "this process is killed next")]
        std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
        trial::kill(netmcore_sys::process::Pid::this(), SIGKILL);
    });
    let first = master.def_process(move |()| {
        let asker = asker.start(&()).unwrap();
        assert!(is_killed_by(SIGKILL, &asker.join().unwrap_err()));
        // The only process that ever held it is dead; its heir was in the queue all the time.
        assert_eq!(names.receive(), 77);
    });
    trial.run(master, &first, &());
}

fn many_sets_at_once() {
    in_a_worker(|| {
        let ids: Vec<ResourceId> = (0..40).map(|_| make()).collect();
        let running: Vec<_> = (0..40)
            .map(|at| {
                let set: Vec<_> = ids.iter().copied().skip(at).collect();
                spawn_with(reach, &ids, only(&set)).unwrap()
            })
            .collect();
        let reprs: Vec<_> = ids.iter().map(|&id| repr_of(id)).collect();
        for (at, one) in running.iter().enumerate() {
            let reached = one.join().unwrap();
            assert!(reached.iter().enumerate().all(|(i, &has)| has == (i >= at)));
        }
        for (id, repr) in ids.into_iter().zip(reprs) {
            release(id).unwrap();
            wait_until("the region is gone", || !exists(&repr));
        }
    });
}

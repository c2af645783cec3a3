//! Guards against objects that a death in the middle of a request leaves behind: the master is killed at each point of
//! each request, and so is each party to a message with a resource in it.
//!
//! # Safety
//!
//! The only unsafe call is the fork of a program, in a test process that has one thread.
#![allow(unsafe_code)]

#[path = "objects/mod.rs"]
mod objects;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use netmcore_pmanage::KernelObject;
use netmcore_proc::{
    JoinError, Master, Resource, ResourceRepr, Running, create_file, create_sem, create_shm,
    create_shm_sc, destroy_resources, get_resource, manage_file, manage_sem, manage_shm,
    manage_shm_sc, record, spawn,
};
use netmcore_sys::process::{self, ExitStatus, Forked, PidFd};
use netmcore_sys::{ObjectName, crash, sem, shm};
use objects::{assert_clean, path_of, recorded, run_first, wait_until};
use serde::{Deserialize, Deserializer, Serialize};

netmcore_forktest::forktests!(
    master_killed_in_its_own_requests,
    master_killed_while_it_serves_a_worker,
    master_killed_while_it_destroys_resources,
    master_killed_while_it_cleans_up_after_a_worker,
    master_killed_while_a_message_is_under_way,
    asker_killed_at_each_point,
    sender_of_a_resource_killed_at_each_point,
    receiver_of_a_resource_killed_at_each_point,
    joiner_of_a_resource_killed_at_each_point,
);

/// The role of the process that dies.
const VICTIM: u32 = 7;
/// The role of all others.
const BYSTANDER: u32 = 0;

// ---- programs that die ---------------------------------------------------------------------------

/// Runs `program` in a forked process; its status.
fn run_program(program: impl FnOnce()) -> ExitStatus {
    // SAFETY: the child leaves by `exit_now` and drops nothing of its parent's before.
    match unsafe { process::fork() }.expect("a fork") {
        Forked::Child => {
            let ran = catch_unwind(AssertUnwindSafe(program));
            process::exit_now(if ran.is_ok() { 0 } else { 101 })
        }
        Forked::Parent(pid) => PidFd::open(pid).unwrap().wait().unwrap(),
    }
}

const SUCCESS: ExitStatus = ExitStatus::Exited { code: 0 };

/// The objects of this test that exist: in its directory, and in shared memory under its prefix.
fn existing(dir: &Path) -> BTreeSet<KernelObject> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("made-") {
            found.insert(KernelObject::File(entry.path()));
        }
    }
    let prefix = prefix();
    for entry in fs::read_dir("/dev/shm").unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        let object = |name: &str| {
            let name = format!("/{name}");
            name.starts_with(&prefix)
                .then(|| ObjectName::new(&name).unwrap())
        };
        match name.strip_prefix("sem.") {
            Some(name) => found.extend(object(name).map(KernelObject::PosixSem)),
            None => found.extend(object(&name).map(KernelObject::PosixShm)),
        }
    }
    found
}

/// One for the test process and all that it forks.
fn prefix() -> String {
    static PREFIX: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    PREFIX
        .get_or_init(|| format!("/nmc-crash-{:x}-", process::random_u64()))
        .clone()
}

/// Kills the victim of `program` at each of its points in turn, until there are no more of them. After each, `check` says
/// whether all is well. Returns the names of the points.
#[track_caller]
fn at_each_point(
    dir: &Path,
    expected: fn(ExitStatus) -> bool,
    program: impl Fn(),
) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    prefix();
    for at in 1.. {
        assert!(at < 500, "there is no end of points");
        // Counted from 0 again when the program says `begin`.
        crash::arm_role(u32::MAX, at);
        AT.store(at, std::sync::atomic::Ordering::SeqCst);
        let status = run_program(&program);
        crash::disarm();
        let died_at = crash::died_at();
        // The promise: what exists is recorded.
        let recorded = recorded(dir);
        for object in existing(dir) {
            assert!(
                recorded.contains(&object),
                "{object} is not recorded; died at {died_at:?}, point {at}"
            );
        }
        // And the next start leaves nothing.
        let next = run_program(|| run_first(dir, || ()));
        assert_eq!(next, SUCCESS, "the start after a death at {died_at:?}");
        assert_eq!(existing(dir), BTreeSet::new(), "died at {died_at:?}");
        assert_clean(dir);
        match died_at {
            None => {
                assert_eq!(status, SUCCESS, "without a death");
                eprintln!("{} points: {names:?}", at - 1);
                return names;
            }
            Some(name) => {
                assert!(expected(status), "{status} after a death at {name}");
                names.insert(name);
            }
        }
    }
    unreachable!("the loop returns")
}

static AT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// From here on the victim's points count. In the victim, or where it is known that it is at rest.
fn begin() {
    crash::arm_role(VICTIM, AT.load(std::sync::atomic::Ordering::SeqCst));
}

fn is_killed(status: ExitStatus) -> bool {
    matches!(status, ExitStatus::Signaled { signal: 9, .. })
}

fn is_success(status: ExitStatus) -> bool {
    status == SUCCESS
}

#[track_caller]
fn assert_met(names: &BTreeSet<String>, expected: &[&str]) {
    for name in expected {
        assert!(names.contains(*name), "{name} was not met: {names:?}");
    }
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let owner = tempfile::tempdir().unwrap();
    let dir = owner.path().join("sockets");
    assert_eq!(run_program(|| run_first(&dir, || ())), SUCCESS);
    (owner, dir)
}

// ---- what is asked for ---------------------------------------------------------------------------

fn create_one_of_each(dir: &Path) -> Vec<Resource> {
    vec![
        create_file(dir.join("made-")).unwrap(),
        create_shm(prefix(), 8192).unwrap(),
        create_shm_sc(prefix(), 4096).unwrap(),
        create_sem(prefix(), 2).unwrap(),
    ]
}

fn manage_one_of_each(dir: &Path) -> Vec<Resource> {
    let name = || ObjectName::unique(prefix().as_bytes()).unwrap();
    let (file, shm, sc, sem) = (dir.join("made-by-hand"), name(), name(), name());
    let managed = vec![
        manage_file(&file).unwrap(),
        manage_shm(&shm).unwrap(),
        manage_shm_sc(&sc, &name()).unwrap(),
        manage_sem(&sem).unwrap(),
    ];
    drop(File::create_new(&file).unwrap());
    drop(shm::create(&shm, 0o600).unwrap());
    drop(shm::create(&sc, 0o600).unwrap());
    drop(sem::NamedSem::create(&sem, 1, 0o600).unwrap());
    managed
}

fn ask_for_everything(dir: &Path) {
    let created = create_one_of_each(dir);
    let managed = manage_one_of_each(dir);
    let got: Vec<_> = created
        .iter()
        .chain(&managed)
        .map(|resource| get_resource(resource.id()).unwrap())
        .collect();
    drop(created);
    assert!(got.iter().all(|resource| objects::exists(resource.repr())));
    let container = got[2].container().unwrap();
    let log = record().unwrap();
    for number in 0..2 {
        container.create_semaphore(number, 1, 0o600, &log).unwrap();
    }
    drop(managed);
    for resource in got {
        let path = path_of(resource.repr());
        resource.release().unwrap();
        assert!(!path.exists());
    }
    assert!(existing(dir).is_empty());
}

/// What every creating and deleting request passes.
const CREATING_AND_DELETING: [&str; 14] = [
    "pmanage.log.appended",
    "pmanage.log.unlinked",
    "proc.run.managed",
    "proc.manage.recorded",
    "proc.manage.created",
    "shm.object.recorded",
    "shm.object.created",
    "shm.object.allocated",
    "sem.named.recorded",
    "sem.named.created",
    "sem.named.unlinked",
    "sem.container.emptied",
    "sys.sem.create_unlinked",
    "proc.master.over",
];

// ---- the master dies -----------------------------------------------------------------------------

fn master_killed_in_its_own_requests() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_killed, || {
        let mut master = Master::builder(&dir);
        let first = master.def_process(|()| ());
        let in_hook = dir.clone();
        let master = master.init(move |_| {
            crash::set_role(VICTIM);
            begin();
            ask_for_everything(&in_hook);
            crash::set_role(BYSTANDER);
            Ok(())
        });
        let start = || first.start(&()).map(|running| running.id());
        let in_extract = dir.clone();
        master
            .run_with(start, |_| {
                // What is left at the end is deleted by the end.
                for resource in create_one_of_each(&in_extract) {
                    resource.keep();
                }
                crash::set_role(VICTIM);
            })
            .unwrap();
    });
    assert_met(&names, &CREATING_AND_DELETING);
}

/// A program whose first process runs `body`, and whose master is the victim while it does.
fn serving(dir: &Path, body: impl Fn() + 'static) {
    // Without ready workers the master forks nothing while it serves requests.
    let mut master = Master::builder(dir).ready_workers(0);
    let first = master.def_process(move |()| {
        crash::set_role(BYSTANDER);
        begin();
        body();
        crash::disarm();
    });
    let master = master.init(|_| {
        crash::set_role(VICTIM);
        Ok(())
    });
    master.run(&first, &()).unwrap();
}

fn master_killed_while_it_serves_a_worker() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_killed, || {
        let in_first = dir.clone();
        serving(&dir, move || ask_for_everything(&in_first));
    });
    assert_met(&names, &["proc.run.done", "proc.run.managed"]);
}

fn master_killed_while_it_destroys_resources() {
    let (_owner, dir) = directory();
    at_each_point(&dir, is_killed, || {
        let mut master = Master::builder(&dir);
        let first = master.def_process(|()| ());
        let in_hook = dir.clone();
        let master = master.init(move |_| {
            let made = [create_one_of_each(&in_hook), manage_one_of_each(&in_hook)];
            crash::set_role(VICTIM);
            begin();
            destroy_resources()?;
            crash::set_role(BYSTANDER);
            assert!(existing(&in_hook).is_empty());
            drop(made);
            Ok(())
        });
        master.run(&first, &()).unwrap();
    });
}

fn master_killed_while_it_cleans_up_after_a_worker() {
    let (_owner, dir) = directory();
    for is_killed_worker in [false, true] {
        at_each_point(&dir, is_killed, || {
            let in_first = dir.clone();
            serving(&dir, move || {
                crash::disarm();
                let worker = spawn(
                    |(dir, must_die): (PathBuf, bool)| {
                        crash::set_role(BYSTANDER);
                        for resource in create_one_of_each(&dir) {
                            resource.keep();
                        }
                        // The master has answered, and is at rest.
                        begin();
                        if must_die {
                            process::kill(process::Pid::this(), 9).unwrap();
                        }
                    },
                    &(in_first.clone(), is_killed_worker),
                )
                .unwrap();
                let outcome = worker.join();
                assert_eq!(outcome.is_err(), is_killed_worker);
                wait_until("all is gone", || existing(&in_first).is_empty());
            });
        });
    }
}

fn master_killed_while_a_message_is_under_way() {
    let (_owner, dir) = directory();
    at_each_point(&dir, is_killed, || {
        let in_first = dir.clone();
        serving(&dir, move || {
            let echo = |resources: Vec<Resource>| {
                crash::set_role(BYSTANDER);
                resources
            };
            let made = create_one_of_each(&in_first);
            // The newborn worker counts until it says that it is not the victim; it may die for it.
            let running = spawn(echo, &made).unwrap();
            drop(made);
            if let Ok(back) = running.join() {
                assert_eq!(existing(&in_first).len(), 4);
                drop(back);
            }
            wait_until("all is gone", || existing(&in_first).is_empty());
        });
        // A worker that died in the master's place: end as the master would have.
        if crash::died_at().is_some() {
            process::kill(process::Pid::this(), 9).unwrap();
        }
    });
}

// ---- a worker dies -------------------------------------------------------------------------------

/// A program whose first process runs `body`; nothing may be left when that has come to its end, with the run still on.
fn with_a_victim(dir: &Path, body: fn(&Path)) {
    let in_first = dir.to_path_buf();
    run_first(dir, move || {
        body(&in_first);
        wait_until("all is gone while the run goes on", || {
            existing(&in_first).is_empty()
        });
        crash::disarm();
    });
}

fn asker_killed_at_each_point() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_success, || {
        with_a_victim(&dir, |dir| {
            let asker = spawn(
                |dir: PathBuf| {
                    crash::set_role(VICTIM);
                    begin();
                    ask_for_everything(&dir);
                    for resource in create_one_of_each(&dir) {
                        resource.keep();
                    }
                },
                &dir.to_path_buf(),
            );
            let outcome = asker.unwrap().join();
            assert!(matches!(outcome, Ok(()) | Err(JoinError::Killed { .. })));
        });
    });
    assert_met(
        &names,
        &[
            "proc.manage.asked",
            "proc.manage.answered",
            "proc.manage.recorded",
            "proc.manage.created",
            "proc.control.deliver",
            "shm.object.created",
            "sem.named.recorded",
        ],
    );
}

/// A value that makes its receiver the victim before the rest is decoded.
#[derive(Serialize)]
struct ForVictim<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ForVictim<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        crash::set_role(VICTIM);
        begin();
        T::deserialize(from).map(ForVictim)
    }
}

fn sender_of_a_resource_killed_at_each_point() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_success, || {
        with_a_victim(&dir, |dir| {
            let sender = spawn(
                |dir: PathBuf| {
                    let made = create_one_of_each(&dir);
                    crash::set_role(VICTIM);
                    begin();
                    let receiver = |resources: Vec<Resource>| {
                        assert!(resources.iter().all(|one| objects::exists(one.repr())));
                    };
                    spawn(receiver, &made).unwrap().detach().unwrap();
                },
                &dir.to_path_buf(),
            );
            let outcome = sender.unwrap().join();
            assert!(matches!(outcome, Ok(()) | Err(JoinError::Killed { .. })));
        });
    });
    assert_met(
        &names,
        &[
            "proc.control.prepare",
            "proc.manage.asked",
            "proc.manage.answered",
            "proc.control.queue",
            "proc.control.queued",
        ],
    );
}

fn receiver_of_a_resource_killed_at_each_point() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_success, || {
        with_a_victim(&dir, |dir| {
            let made = create_one_of_each(dir);
            let reprs: Vec<ResourceRepr> = made.iter().map(|one| one.repr().clone()).collect();
            let receiver = spawn(
                |ForVictim(resources): ForVictim<Vec<Resource>>| {
                    assert!(resources.iter().all(|one| objects::exists(one.repr())));
                    resources
                },
                &ForVictim(made),
            );
            match receiver.unwrap().join() {
                Ok(back) => {
                    let back: Vec<_> = back.iter().map(|one| one.repr().clone()).collect();
                    assert_eq!(back, reprs);
                    assert!(reprs.iter().all(objects::exists) || back.is_empty());
                }
                Err(JoinError::Killed { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        });
    });
    assert_met(
        &names,
        &[
            "proc.manage.asked",
            "proc.manage.answered",
            "proc.worker.ran",
            "proc.control.deliver",
            "proc.control.finish",
        ],
    );
}

fn joiner_of_a_resource_killed_at_each_point() {
    let (_owner, dir) = directory();
    let names = at_each_point(&dir, is_success, || {
        with_a_victim(&dir, |dir| {
            let maker: Running<Vec<Resource>> =
                spawn(|dir: PathBuf| create_one_of_each(&dir), &dir.to_path_buf()).unwrap();
            let joiner = spawn(
                |maker: Running<Vec<Resource>>| {
                    crash::set_role(VICTIM);
                    begin();
                    let resources = maker.join().unwrap();
                    assert!(resources.iter().all(|one| objects::exists(one.repr())));
                },
                &maker,
            );
            let outcome = joiner.unwrap().join();
            // The joiner had it, or this one gets it.
            match (outcome, maker.join()) {
                (Ok(()), Err(JoinError::AlreadyJoined { .. })) => {}
                (Err(JoinError::Killed { .. }), Err(JoinError::AlreadyJoined { .. })) => {}
                (Err(JoinError::Killed { .. }), Ok(resources)) => {
                    assert!(resources.iter().all(|one| objects::exists(one.repr())));
                }
                (outcome, again) => panic!("{outcome:?}, then {again:?}"),
            }
        });
    });
    assert_met(
        &names,
        &[
            "proc.manage.asked",
            "proc.manage.answered",
            "proc.control.collect",
            "proc.control.free_slot",
        ],
    );
}

//! Guards against objects that outlive their last user, and against objects that are deleted under one.

#[path = "objects/mod.rs"]
mod objects;

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use netmcore_pmanage::{KernelObject, Liveness, Log};
use netmcore_proc::{
    Codec, Error, JoinError, Master, ProcessOptions, Resource, ResourceId, ResourceRepr,
    ResourceType, Result, Running, create_file, create_sem, create_shm, create_shm_sc,
    destroy_resources, get_file, get_resource, get_sem, get_sem_container, get_shm, manage_file,
    manage_sem, manage_shm, manage_shm_sc, record, release, spawn,
};
use netmcore_sys::{ObjectName, process, sem, shm};
use objects::{
    assert_clean, assert_gone, assert_there, exists, path_of, recorded, run_first, sem_path,
    shm_path, wait_until,
};
use serde::{Deserialize, Deserializer, Serialize};

netmcore_forktest::forktests!(
    created_object_is_recorded_and_goes_with_its_guard,
    managed_object_goes_with_its_guard,
    managed_object_need_not_exist_yet,
    managed_path_becomes_absolute,
    managed_path_that_may_change_its_meaning_is_refused,
    each_get_takes_one_release,
    kept_use_lasts_to_the_end_of_the_process,
    object_stays_while_another_process_uses_it,
    killed_users_object_goes_at_once,
    panicking_users_object_is_gone_when_it_is_joined,
    object_managed_twice_is_one_resource_with_two_uses,
    object_managed_as_something_else_is_refused,
    object_managed_while_others_use_it_stays_until_the_last_is_done,
    wrong_type_and_unknown_id_are_told_apart,
    only_users_can_release,
    points_are_resources,
    container_holds_semaphores_until_the_last_user_is_gone,
    resource_in_an_argument_outlives_its_sender,
    resource_in_an_argument_outlives_its_killed_sender,
    resource_in_an_argument_goes_when_the_receiver_is_killed_before_it_has_it,
    resource_in_an_argument_goes_when_the_process_is_killed_in_the_queue,
    resource_in_an_argument_that_cannot_be_decoded_goes,
    receiver_of_an_argument_is_the_only_user_left,
    resource_in_a_result_belongs_to_the_joiner,
    resource_in_a_result_waits_for_a_late_joiner,
    resource_in_a_result_survives_its_first_joiner,
    resource_in_a_result_goes_when_it_is_detached,
    resource_in_a_result_goes_with_a_decoding_error,
    resource_in_a_result_that_nobody_joins_goes_with_the_run,
    resource_may_be_in_a_message_twice,
    resource_travels_in_json,
    resource_is_not_serialised_outside_of_messages,
    master_uses_resources_before_the_run,
    first_resource_call_cleans_up_after_the_last_run,
    resource_call_in_a_directory_in_use_is_refused,
    master_that_never_ran_deletes_its_objects,
    guard_in_a_definition_of_a_master_that_never_ran_goes_with_it,
    master_uses_resources_in_the_init_hook,
    master_uses_resources_when_extracting_results,
    guard_that_outlives_the_run_opens_nothing,
    master_without_a_run_gives_its_answer,
    masters_uses_are_not_its_workers_uses,
    destroyed_resources_are_gone_and_the_run_goes_on,
    destroying_resources_is_for_the_master,
    record_is_the_runs_own,
    without_a_record_objects_still_go,
    threads_of_a_worker_make_any_call_at_once,
    object_got_while_others_release_it_is_there_or_refused,
    file_that_cannot_be_created_leaves_no_record,
    object_larger_than_its_creator_may_write_is_refused,
    full_memory_is_told_and_leaves_nothing,
);

/// The four types that a program makes by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Kind {
    File,
    Shm,
    ShmSc,
    Sem,
}

const KINDS: [Kind; 4] = [Kind::File, Kind::Shm, Kind::ShmSc, Kind::Sem];
const PREFIX: &str = "/nmc-resources-";

impl Kind {
    fn create(self, dir: &Path) -> Result<Resource> {
        match self {
            Kind::File => create_file(dir.join("made-")),
            Kind::Shm => create_shm(PREFIX, 4096),
            Kind::ShmSc => create_shm_sc(PREFIX, 4096),
            Kind::Sem => create_sem(PREFIX, 3),
        }
    }

    fn ty(self) -> ResourceType {
        match self {
            Kind::File => ResourceType::File,
            Kind::Shm => ResourceType::PosixShm,
            Kind::ShmSc => ResourceType::PosixShmSc,
            Kind::Sem => ResourceType::PosixSem,
        }
    }

    fn get(self, id: ResourceId) -> Result<Resource> {
        match self {
            Kind::File => get_file(id),
            Kind::Shm => get_shm(id),
            Kind::ShmSc => get_sem_container(id),
            Kind::Sem => get_sem(id),
        }
    }

    /// A name of this kind that is not in use.
    fn name(self, dir: &Path) -> ResourceRepr {
        let name = || ObjectName::unique(PREFIX.as_bytes()).unwrap();
        match self {
            Kind::File => {
                ResourceRepr::File(dir.join(format!("managed-{:x}", process::random_u64())))
            }
            Kind::Shm => ResourceRepr::PosixShm(name()),
            Kind::ShmSc => {
                let (name, prefix) = (name(), name());
                ResourceRepr::PosixShmSc { name, prefix }
            }
            Kind::Sem => ResourceRepr::PosixSem(name()),
        }
    }
}

fn manage(repr: &ResourceRepr) -> Result<Resource> {
    match repr {
        ResourceRepr::File(path) => manage_file(path),
        ResourceRepr::PosixShm(name) => manage_shm(name),
        ResourceRepr::PosixShmSc { name, prefix } => manage_shm_sc(name, prefix),
        ResourceRepr::PosixSem(name) => manage_sem(name),
        other => panic!("{other} cannot be managed"),
    }
}

/// Makes the object by the means of the system, as a program does that hands it over.
fn make(repr: &ResourceRepr) {
    match repr {
        ResourceRepr::File(path) => drop(File::create_new(path).unwrap()),
        ResourceRepr::PosixSem(name) => drop(sem::NamedSem::create(name, 1, 0o600).unwrap()),
        repr => drop(shm::create(repr.shm_name().unwrap(), 0o600).unwrap()),
    }
}

/// A socket directory of the test's own.
fn directory() -> (tempfile::TempDir, PathBuf) {
    let owner = tempfile::tempdir().unwrap();
    let dir = owner.path().join("sockets");
    (owner, dir)
}

/// Runs `body` for each kind in the first process of a run.
#[track_caller]
fn for_each_kind(body: fn(Kind, &Path)) {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        for kind in KINDS {
            eprintln!("{kind:?}");
            body(kind, &dir);
        }
    });
}

#[track_caller]
fn assert_no_resource(
    outcome: Result<Resource>,
    id: ResourceId,
    expected: Option<ResourceType>,
    found: Option<ResourceType>,
) {
    match outcome {
        Err(Error::NoResource {
            id: its,
            expected: wanted,
            found: was,
        }) => assert_eq!((its, wanted, was), (id, expected, found)),
        other => panic!("{other:?}"),
    }
}

/// Pipes between the processes of a test, made before the run so that all of them have them.
struct Line {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Line {
    fn new() -> Line {
        let (reader, writer) = io::pipe().unwrap();
        Line { reader, writer }
    }

    fn send<T: Serialize>(&self, message: &T) {
        let mut text = serde_json::to_vec(message).unwrap();
        text.push(b'\n');
        (&self.writer).write_all(&text).unwrap();
    }

    /// One message is under way at a time, so nothing is read ahead.
    fn receive<T: for<'de> Deserialize<'de>>(&self) -> T {
        let mut text = String::new();
        BufReader::new(&self.reader).read_line(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

struct Lines {
    reports: Line,
    gate: Line,
    arrivals: Line,
}

static LINES: OnceLock<Lines> = OnceLock::new();

/// Before the run.
fn lay_lines() {
    let lines = Lines {
        reports: Line::new(),
        gate: Line::new(),
        arrivals: Line::new(),
    };
    assert!(LINES.set(lines).is_ok());
}

fn lines() -> &'static Lines {
    LINES.get().expect("the test lays them")
}

/// Says that it has come, and waits to be let through.
fn pass_gate() {
    (&lines().arrivals.writer).write_all(b"a").unwrap();
    (&lines().gate.reader).read_exact(&mut [0]).unwrap();
}

fn wait_for_arrival() {
    (&lines().arrivals.reader).read_exact(&mut [0]).unwrap();
}

fn open_gate() {
    (&lines().gate.writer).write_all(b"g").unwrap();
}

/// A value whose receiver stops at the gate before it decodes it.
#[derive(Serialize)]
struct Gated<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Gated<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        pass_gate();
        T::deserialize(from).map(Gated)
    }
}

/// A value that cannot be decoded.
#[derive(Serialize)]
struct Undecodable;

impl<'de> Deserialize<'de> for Undecodable {
    fn deserialize<D: Deserializer<'de>>(_: D) -> std::result::Result<Self, D::Error> {
        Err(serde::de::Error::custom("as the test wants"))
    }
}

fn die() -> ! {
    let _ = process::kill(process::Pid::this(), 9);
    unreachable!("SIGKILL cannot be survived")
}

fn wait_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

#[track_caller]
fn assert_killed<R>(outcome: std::result::Result<R, JoinError>) {
    match outcome {
        Err(JoinError::Killed { signal: 9, .. }) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not killed"),
    }
}

/// How soon after a death what only the dead used must be gone. The master needs well under a
/// millisecond; the rest is for a machine that does other things, too.
const SOON: Duration = Duration::from_millis(500);

#[track_caller]
fn assert_goes_soon(dir: &Path, repr: &ResourceRepr) {
    let took = wait_until("its last user is gone", || !exists(repr));
    wait_until("its record is dropped", || {
        let recorded = recorded(dir);
        !objects::objects_of(repr)
            .iter()
            .any(|object| recorded.contains(object))
    });
    assert!(took < SOON, "{repr} was there {took:?} after the death");
}

// ---- the life of an object ----------------------------------------------------------------------

fn created_object_is_recorded_and_goes_with_its_guard() {
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let repr = resource.repr().clone();
        assert_eq!((resource.ty(), repr.ty()), (kind.ty(), kind.ty()));
        assert_there(dir, &repr);
        let mode = fs::metadata(path_of(&repr)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        match &repr {
            ResourceRepr::File(path) => assert_eq!(resource.path(), Some(path.as_path())),
            repr => {
                assert_eq!(resource.path(), None);
                let name = resource.name().unwrap();
                assert!(name.as_bytes().starts_with(PREFIX.as_bytes()), "{repr}");
            }
        }
        drop(resource);
        assert_gone(dir, &repr);

        let resource = kind.create(dir).unwrap();
        let second = resource.repr().clone();
        assert_ne!(second, repr);
        resource.release().unwrap();
        assert_gone(dir, &second);
    });
}

fn managed_object_goes_with_its_guard() {
    for_each_kind(|kind, dir| {
        let repr = kind.name(dir);
        make(&repr);
        let resource = manage(&repr).unwrap();
        assert_eq!(*resource.repr(), repr);
        assert_there(dir, &repr);
        drop(resource);
        assert_gone(dir, &repr);
    });
}

fn managed_object_need_not_exist_yet() {
    for_each_kind(|kind, dir| {
        let repr = kind.name(dir);
        let resource = manage(&repr).unwrap();
        assert!(!exists(&repr));
        for object in objects::objects_of(&repr) {
            assert!(recorded(dir).contains(&object), "{object}");
        }
        make(&repr);
        assert_there(dir, &repr);
        drop(resource);
        assert_gone(dir, &repr);

        // And it need not come into being at all.
        let resource = manage(&repr).unwrap();
        resource.release().unwrap();
        assert_gone(dir, &repr);
    });
}

fn managed_path_becomes_absolute() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        std::env::set_current_dir(&dir).unwrap();
        for (given, managed) in [
            ("a", "a"),
            ("./a", "a"),
            ("b//./c", "b/c"),
            ("..a", "..a"),
            ("a..", "a.."),
            ("...", "..."),
        ] {
            let resource = manage_file(given).unwrap();
            assert_eq!(resource.path(), Some(dir.join(managed).as_path()));
            assert!(recorded(&dir).contains(&KernelObject::File(dir.join(managed))));
        }
        let absolute = dir.join("x");
        assert_eq!(manage_file(&absolute).unwrap().path(), Some(&*absolute));

        // The same file by two of its spellings is one resource.
        let (one, other) = (manage_file("a").unwrap(), manage_file("./a").unwrap());
        assert_eq!(one.id(), other.id());

        let created = create_file("made-").unwrap();
        let path = created.path().unwrap();
        assert_eq!(path.parent(), Some(dir.as_path()));
        assert!(path.is_file());
    });
}

fn managed_path_that_may_change_its_meaning_is_refused() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        std::env::set_current_dir(&dir).unwrap();
        for path in [
            "..", "../a", "a/../b", "a/..", "/../a", "", "a/", "a/.", ".", "/", "a\0b",
        ] {
            for outcome in [manage_file(path), create_file(path)] {
                match outcome {
                    Err(Error::InvalidPath { path: its, why }) => {
                        assert_eq!(its, Path::new(path));
                        assert!(!why.is_empty());
                    }
                    other => panic!("{path:?}: {other:?}"),
                }
            }
        }
        assert!(recorded(&dir).is_empty());
    });
}

// ---- counting ----------------------------------------------------------------------------------

fn each_get_takes_one_release() {
    for_each_kind(|kind, dir| {
        let created = kind.create(dir).unwrap();
        let (id, repr) = (created.id(), created.repr().clone());
        let got = kind.get(id).unwrap();
        let got_untyped = get_resource(id).unwrap();
        assert_eq!((got.id(), got_untyped.id()), (id, id));
        assert_eq!(*got.repr(), repr);
        assert_eq!(*got_untyped.repr(), repr);
        created.keep();

        release(id).unwrap();
        assert_there(dir, &repr);
        drop(got);
        assert_there(dir, &repr);
        got_untyped.release().unwrap();
        assert_gone(dir, &repr);

        assert!(matches!(
            release(id),
            Err(Error::NoResource { id: its, expected: None, found: None }) if its == id
        ));
        assert_no_resource(kind.get(id), id, Some(kind.ty()), None);
        assert_no_resource(get_resource(id), id, None, None);
        assert_ne!(
            kind.create(dir).unwrap().id(),
            id,
            "ids are never used again"
        );
    });
}

fn kept_use_lasts_to_the_end_of_the_process() {
    for_each_kind(|kind, dir| {
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                let repr = resource.repr().clone();
                let id = resource.keep();
                // Several uses end as one.
                kind.get(id).unwrap().keep();
                kind.get(id).unwrap().keep();
                assert_there(&dir, &repr);
                repr
            },
            &(kind, dir.to_path_buf()),
        );
        let repr = process.unwrap().join().unwrap();
        assert_gone(dir, &repr);
    });
}

fn object_stays_while_another_process_uses_it() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let repr = resource.repr().clone();
        let other = spawn(
            |(kind, dir, id): (Kind, PathBuf, ResourceId)| {
                let resource = kind.get(id).unwrap();
                pass_gate();
                assert_there(&dir, resource.repr());
                resource.keep();
            },
            &(kind, dir.to_path_buf(), resource.id()),
        )
        .unwrap();
        wait_for_arrival();
        drop(resource);
        assert_there(dir, &repr);
        open_gate();
        other.join().unwrap();
        assert_gone(dir, &repr);
    });
}

fn killed_users_object_goes_at_once() {
    lay_lines();
    for_each_kind(|kind, dir| {
        // Killed while it waits.
        let arg = (kind, dir.to_path_buf());
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                lines().reports.send(resource.repr());
                wait_for_ever();
            },
            &arg,
        );
        let process: Running<()> = process.unwrap();
        let repr: ResourceRepr = lines().reports.receive();
        assert_there(dir, &repr);
        process.kill().unwrap();
        assert_killed(process.join());
        assert_goes_soon(dir, &repr);

        // Killed by itself, in the next instruction.
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                lines().reports.send(resource.repr());
                die();
            },
            &arg,
        );
        let process: Running<()> = process.unwrap();
        let repr: ResourceRepr = lines().reports.receive();
        assert_killed(process.join());
        assert_goes_soon(dir, &repr);
    });
}

fn panicking_users_object_is_gone_when_it_is_joined() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let kept = kind.create(&dir).unwrap();
                lines().reports.send(kept.repr());
                kept.keep();
                let _guard = kind.create(&dir).unwrap();
                panic!("as the test wants");
            },
            &(kind, dir.to_path_buf()),
        );
        let process: Running<()> = process.unwrap();
        let repr: ResourceRepr = lines().reports.receive();
        assert!(matches!(process.join(), Err(JoinError::Panicked { .. })));
        assert_gone(dir, &repr);
        assert!(recorded(dir).is_empty());
    });
}

fn object_managed_twice_is_one_resource_with_two_uses() {
    for_each_kind(|kind, dir| {
        let repr = kind.name(dir);
        let first = manage(&repr).unwrap();
        make(&repr);
        let second = manage(&repr).unwrap();
        assert_eq!(first.id(), second.id());
        drop(first);
        assert_there(dir, &repr);
        drop(second);
        assert_gone(dir, &repr);

        // What was created can be managed, too.
        let created = kind.create(dir).unwrap();
        let managed = manage(created.repr()).unwrap();
        assert_eq!(created.id(), managed.id());
        drop(created);
        assert_there(dir, managed.repr());
    });
}

fn object_managed_as_something_else_is_refused() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let name = ObjectName::unique(PREFIX.as_bytes()).unwrap();
        let prefix = ObjectName::unique(PREFIX.as_bytes()).unwrap();
        let plain = manage_shm(&name).unwrap();
        match manage_shm_sc(&name, &prefix) {
            Err(Error::AlreadyManaged { id, wanted, found }) => {
                assert_eq!(id, plain.id());
                assert!(wanted.contains("semaphore container"), "{wanted}");
                assert!(!found.contains("semaphore container"), "{found}");
            }
            other => panic!("{other:?}"),
        }
        drop(plain);
        let with_container = manage_shm_sc(&name, &prefix).unwrap();
        assert!(matches!(
            manage_shm(&name),
            Err(Error::AlreadyManaged { .. })
        ));
        assert!(matches!(
            manage_shm_sc(&name, &name),
            Err(Error::AlreadyManaged { .. })
        ));
        // A semaphore and a shared memory object of one name are two objects.
        let semaphore = manage_sem(&name).unwrap();
        assert_ne!(semaphore.id(), with_container.id());
    });
}

fn object_managed_while_others_use_it_stays_until_the_last_is_done() {
    const ROUNDS: usize = 60;
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let shared: Vec<_> = KINDS.map(|kind| kind.name(&dir)).into();
        let anchors: Vec<_> = shared.iter().map(|repr| manage(repr).unwrap()).collect();
        shared.iter().for_each(make);
        let workers: Vec<_> = (0..4_u64)
            .map(|seed| {
                spawn(
                    |(seed, dir, shared): (u64, PathBuf, Vec<ResourceRepr>)| {
                        for round in 0..ROUNDS as u64 {
                            let repr = &shared[(seed + round) as usize % shared.len()];
                            let first = manage(repr).unwrap();
                            let second = get_resource(first.id()).unwrap();
                            if round % 3 == 0 {
                                assert_there(&dir, repr);
                            }
                            drop(first);
                            assert!(exists(repr), "{repr} went while it was used");
                            match round % 5 {
                                0 => drop(second.keep()),
                                _ => drop(second),
                            }
                        }
                    },
                    &(seed, dir.clone(), shared.clone()),
                )
                .unwrap()
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        for (anchor, repr) in anchors.into_iter().zip(&shared) {
            assert_there(&dir, repr);
            drop(anchor);
            assert_gone(&dir, repr);
        }
    });
}

fn wrong_type_and_unknown_id_are_told_apart() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let made = KINDS.map(|kind| (kind, kind.create(&dir).unwrap()));
        for (kind, resource) in &made {
            for other in KINDS.into_iter().filter(|other| other != kind) {
                assert_no_resource(
                    other.get(resource.id()),
                    resource.id(),
                    Some(other.ty()),
                    Some(kind.ty()),
                );
            }
        }
        let unknown = ResourceId::from_raw(1 << 40);
        for kind in KINDS {
            assert_no_resource(kind.get(unknown), unknown, Some(kind.ty()), None);
        }
        // A refused get is no use.
        let reprs = made.map(|(_, resource)| {
            let repr = resource.repr().clone();
            resource.release().unwrap();
            repr
        });
        for repr in &reprs {
            assert_gone(&dir, repr);
        }
    });
}

fn only_users_can_release() {
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let stranger = spawn(
            |id: ResourceId| match release(id) {
                Err(Error::NotAUser { id: its }) => its == id,
                other => panic!("{other:?}"),
            },
            &resource.id(),
        );
        assert!(stranger.unwrap().join().unwrap());
        assert_there(dir, resource.repr());
    });
}

fn points_are_resources() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let square = master.def_process(|k: u64| k * k);
    let first = master.def_process(move |()| {
        let (fork_point, join_point) = (square.fork_point().id(), square.join_point().id());
        assert_no_resource(
            get_file(fork_point),
            fork_point,
            Some(ResourceType::File),
            Some(ResourceType::ForkPoint),
        );
        assert_eq!(
            get_resource(fork_point).unwrap().ty(),
            ResourceType::ForkPoint
        );
        assert_eq!(
            get_resource(join_point).unwrap().ty(),
            ResourceType::JoinPoint
        );
        // Somebody else's use ends without an end of the point.
        assert_eq!(square.start(&7).unwrap().join().unwrap(), 49);
        assert!(matches!(release(fork_point), Err(Error::NotAUser { .. })));
        assert_eq!(square.start(&8).unwrap().join().unwrap(), 64);

        square.fork_point().release().unwrap();
        assert!(matches!(
            square.start(&7),
            Err(Error::NoResource { id, .. }) if id == fork_point
        ));
        assert_no_resource(get_resource(fork_point), fork_point, None, None);
        assert!(matches!(
            square.fork_point().release(),
            Err(Error::NoResource { .. })
        ));
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn container_holds_semaphores_until_the_last_user_is_gone() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let resource = create_shm_sc(PREFIX, 4096).unwrap();
        let container = resource.container().unwrap();
        assert_eq!(Some(container.prefix()), resource.repr().container_prefix());
        let log = record().unwrap();
        let first = container.create_semaphore(0, 2, 0o600, &log).unwrap();
        let second = container.create_semaphore(7, 0, 0o600, &log).unwrap();
        let names = [first.name().clone(), second.name().clone()];
        for name in &names {
            assert!(sem_path(name).exists());
            assert!(recorded(&dir).contains(&KernelObject::PosixSem(name.clone())));
        }
        // Another process finds them by the id alone.
        let other = spawn(
            |id: ResourceId| {
                let resource = get_sem_container(id).unwrap();
                let container = resource.container().unwrap();
                let numbers = container.numbers().unwrap();
                let values = numbers
                    .iter()
                    .map(|&number| container.open_semaphore(number).unwrap().value());
                values.collect::<Vec<_>>()
            },
            &resource.id(),
        );
        let mut values = other.unwrap().join().unwrap();
        values.sort_unstable();
        assert_eq!(values, [0, 2]);
        assert!(names.iter().all(|name| sem_path(name).exists()));
        drop(resource);
        for name in &names {
            assert!(!sem_path(name).exists(), "{name} is left");
        }
        assert!(recorded(&dir).is_empty());

        // A plain object has none.
        assert!(create_shm(PREFIX, 4096).unwrap().container().is_none());
    });
}

// ---- in messages ---------------------------------------------------------------------------------

fn receive_and_look((dir, Gated(resource)): (PathBuf, Gated<Resource>)) {
    assert_there(&dir, resource.repr());
}

fn resource_in_an_argument_outlives_its_sender() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let sender = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                let repr = resource.repr().clone();
                let receiver = spawn(receive_and_look, &(dir, Gated(resource))).unwrap();
                (receiver, repr)
            },
            &(kind, dir.to_path_buf()),
        );
        let (receiver, repr) = sender.unwrap().join().unwrap();
        assert_there(dir, &repr);
        wait_for_arrival();
        assert_there(dir, &repr);
        open_gate();
        receiver.join().unwrap();
        assert_gone(dir, &repr);
    });
}

fn resource_in_an_argument_outlives_its_killed_sender() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let sender = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                let repr = resource.repr().clone();
                let receiver = spawn(receive_and_look, &(dir, Gated(resource))).unwrap();
                lines().reports.send(&(receiver, repr));
                die();
            },
            &(kind, dir.to_path_buf()),
        );
        let sender: Running<()> = sender.unwrap();
        let (receiver, repr): (Running<()>, ResourceRepr) = lines().reports.receive();
        assert_killed(sender.join());
        wait_for_arrival();
        assert_there(dir, &repr);
        open_gate();
        receiver.join().unwrap();
        assert_gone(dir, &repr);
    });
}

fn resource_in_an_argument_goes_when_the_receiver_is_killed_before_it_has_it() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let repr = resource.repr().clone();
        let receiver = spawn(receive_and_look, &(dir.to_path_buf(), Gated(resource))).unwrap();
        wait_for_arrival();
        assert_there(dir, &repr);
        receiver.kill().unwrap();
        assert_killed(receiver.join());
        assert_goes_soon(dir, &repr);
    });
}

fn resource_in_an_argument_goes_when_the_process_is_killed_in_the_queue() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let receiver = master.def_process(|_: Resource| ());
    let first = master.def_process(|()| ());
    let in_hook = dir.clone();
    // In the hook nothing that is started can begin to run.
    let master = master.init(move |_| {
        for kind in KINDS {
            let resource = kind.create(&in_hook)?;
            let repr = resource.repr().clone();
            let running = receiver.start(&resource)?;
            drop(resource);
            assert_there(&in_hook, &repr);
            running.kill()?;
            assert_gone(&in_hook, &repr);
        }
        Ok(())
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn resource_in_an_argument_that_cannot_be_decoded_goes() {
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let repr = resource.repr().clone();
        let receiver = spawn(|_: (Resource, Undecodable)| (), &(resource, Undecodable));
        assert!(matches!(
            receiver.unwrap().join(),
            Err(JoinError::ArgumentUndecodable { .. })
        ));
        assert_goes_soon(dir, &repr);

        let resource = kind.create(dir).unwrap();
        let repr = resource.repr().clone();
        let receiver = spawn(|_: (Undecodable, Resource)| (), &(Undecodable, resource));
        assert!(matches!(
            receiver.unwrap().join(),
            Err(JoinError::ArgumentUndecodable { .. })
        ));
        assert_goes_soon(dir, &repr);
    });
}

fn receiver_of_an_argument_is_the_only_user_left() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let id = resource.id();
        let receiver = spawn(
            |(dir, resource): (PathBuf, Resource)| {
                pass_gate();
                let repr = resource.repr().clone();
                assert_there(&dir, &repr);
                drop(resource);
                assert_gone(&dir, &repr);
            },
            &(dir.to_path_buf(), resource),
        );
        // The sender's guard is gone, and so is the message.
        wait_for_arrival();
        open_gate();
        receiver.unwrap().join().unwrap();
        assert_no_resource(get_resource(id), id, None, None);
    });
}

fn create_and_return((kind, dir): (Kind, PathBuf)) -> Resource {
    kind.create(&dir).unwrap()
}

fn resource_in_a_result_belongs_to_the_joiner() {
    for_each_kind(|kind, dir| {
        let process = spawn(create_and_return, &(kind, dir.to_path_buf())).unwrap();
        let resource = process.join().unwrap();
        let repr = resource.repr().clone();
        assert_eq!(repr.ty(), kind.ty());
        assert_there(dir, &repr);
        let second = get_resource(resource.id()).unwrap();
        drop(resource);
        assert_there(dir, &repr);
        drop(second);
        assert_gone(dir, &repr);
    });
}

fn resource_in_a_result_waits_for_a_late_joiner() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                lines()
                    .reports
                    .send(&(std::process::id(), resource.repr().clone()));
                resource
            },
            &(kind, dir.to_path_buf()),
        );
        let (pid, repr): (u32, ResourceRepr) = lines().reports.receive();
        wait_until("the process is gone", || {
            !Path::new(&format!("/proc/{pid}")).exists()
        });
        assert_there(dir, &repr);
        let resource = process.unwrap().join().unwrap();
        assert_eq!(*resource.repr(), repr);
        assert_there(dir, &repr);
        drop(resource);
        assert_gone(dir, &repr);
    });
}

fn resource_in_a_result_survives_its_first_joiner() {
    lay_lines();
    for_each_kind(|kind, dir| {
        let process = spawn(
            |arg: (Kind, PathBuf)| {
                let resource = create_and_return(arg);
                lines().reports.send(resource.repr());
                Gated(resource)
            },
            &(kind, dir.to_path_buf()),
        );
        let process = process.unwrap();
        let repr: ResourceRepr = lines().reports.receive();
        let joiner = spawn(
            |process: Running<Gated<Resource>>| drop(process.join()),
            &process,
        );
        let joiner = joiner.unwrap();
        wait_for_arrival();
        assert_there(dir, &repr);
        joiner.kill().unwrap();
        assert_killed(joiner.join());
        open_gate();
        let Gated(resource) = process.join().unwrap();
        wait_for_arrival();
        assert_eq!(*resource.repr(), repr);
        assert_there(dir, &repr);
        drop(resource);
        assert_gone(dir, &repr);
    });
}

fn resource_in_a_result_goes_when_it_is_detached() {
    lay_lines();
    for_each_kind(|kind, dir| {
        // While it runs.
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                lines().reports.send(resource.repr());
                pass_gate();
                resource
            },
            &(kind, dir.to_path_buf()),
        );
        let repr: ResourceRepr = lines().reports.receive();
        wait_for_arrival();
        process.unwrap().detach().unwrap();
        assert_there(dir, &repr);
        open_gate();
        assert_goes_soon(dir, &repr);

        // When it is done.
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| {
                let resource = kind.create(&dir).unwrap();
                lines()
                    .reports
                    .send(&(std::process::id(), resource.repr().clone()));
                resource
            },
            &(kind, dir.to_path_buf()),
        );
        let (pid, repr): (u32, ResourceRepr) = lines().reports.receive();
        wait_until("the process is gone", || {
            !Path::new(&format!("/proc/{pid}")).exists()
        });
        assert_there(dir, &repr);
        process.unwrap().detach().unwrap();
        assert_goes_soon(dir, &repr);
    });
}

fn resource_in_a_result_goes_with_a_decoding_error() {
    for_each_kind(|kind, dir| {
        let process = spawn(
            |(kind, dir): (Kind, PathBuf)| (Undecodable, kind.create(&dir).unwrap()),
            &(kind, dir.to_path_buf()),
        );
        assert!(matches!(
            process.unwrap().join(),
            Err(JoinError::ResultUndecodable { .. })
        ));
        wait_until("the object is gone", || recorded(dir).is_empty());
    });
}

fn resource_in_a_result_that_nobody_joins_goes_with_the_run() {
    lay_lines();
    let (_owner, dir) = directory();
    let reprs = run_first(&dir.clone(), move || {
        KINDS.map(|kind| {
            let process = spawn(
                |(kind, dir): (Kind, PathBuf)| {
                    let resource = kind.create(&dir).unwrap();
                    lines().reports.send(resource.repr());
                    resource
                },
                &(kind, dir.clone()),
            );
            process.unwrap();
            lines().reports.receive::<ResourceRepr>()
        })
    });
    for repr in &reprs {
        assert!(!exists(repr), "{repr}");
    }
}

fn resource_may_be_in_a_message_twice() {
    for_each_kind(|kind, dir| {
        let one = kind.create(dir).unwrap();
        let repr = one.repr().clone();
        let other = get_resource(one.id()).unwrap();
        let third = kind.create(dir).unwrap();
        let echo = spawn(|message: Vec<Resource>| message, &vec![one, third, other]);
        let mut message = echo.unwrap().join().unwrap();
        assert_eq!(message.len(), 3);
        assert_eq!(message[0].id(), message[2].id());
        assert_ne!(message[0].id(), message[1].id());
        assert_there(dir, &repr);
        drop(message.pop());
        assert_there(dir, &repr);
        drop(message);
        assert_gone(dir, &repr);
        assert!(recorded(dir).is_empty());
    });
}

fn resource_travels_in_json() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let echo = master.def_process_with(
        ProcessOptions::new().codec(Codec::Json),
        |resource: Resource| resource,
    );
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        for kind in KINDS {
            let resource = kind.create(&in_first).unwrap();
            let id = resource.id();
            let running = echo.start(&resource).unwrap();
            drop(resource);
            let back = running.join().unwrap();
            assert_eq!(back.id(), id);
            assert_there(&in_first, back.repr());
        }
        assert!(recorded(&in_first).is_empty());
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn resource_is_not_serialised_outside_of_messages() {
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        let error = serde_json::to_string(&resource).unwrap_err().to_string();
        assert!(error.contains("argument or a result"), "{error}");
        let id = serde_json::to_string(&resource.id()).unwrap();
        let error = serde_json::from_str::<Resource>(&id).unwrap_err();
        assert!(
            error.to_string().contains("argument or a result"),
            "{error}"
        );
        let repr = resource.repr().clone();
        drop(resource);
        assert_gone(dir, &repr);
    });
}

// ---- in the master ------------------------------------------------------------------------------

fn master_uses_resources_before_the_run() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let made = KINDS.map(|kind| (kind, kind.create(&dir).unwrap()));
    let dropped = Kind::File.create(&dir).unwrap();
    let dropped_repr = dropped.repr().clone();
    drop(dropped);
    assert_gone(&dir, &dropped_repr);
    let known =
        made.map(|(kind, resource)| (kind, resource.id(), resource.repr().clone(), resource));
    let in_first = dir.clone();
    let first = master.def_process(move |ids: Vec<(Kind, ResourceId, ResourceRepr)>| {
        for (kind, id, repr) in ids {
            assert_there(&in_first, &repr);
            assert_eq!(*kind.get(id).unwrap().repr(), repr);
            assert_there(&in_first, &repr);
        }
    });
    let ids = known
        .iter()
        .map(|(kind, id, repr, _)| (*kind, *id, repr.clone()))
        .collect();
    master.run(&first, &ids).unwrap();
    for (_, _, repr) in &ids {
        assert_gone(&dir, repr);
    }
    assert_clean(&dir);
}

/// Leaves a directory as a program does that was killed.
fn leave_objects(dir: &Path) -> Vec<ResourceRepr> {
    netmcore_pmanage::prepare_directory(dir).unwrap();
    let log = Log::open(dir).unwrap();
    let left: Vec<_> = KINDS.iter().map(|kind| kind.name(dir)).collect();
    for repr in &left {
        log.register(&objects::objects_of(repr)).unwrap();
        make(repr);
    }
    left
}

fn first_resource_call_cleans_up_after_the_last_run() {
    let (_owner, dir) = directory();
    let left = leave_objects(&dir);
    let master = Master::builder(&dir);
    assert!(left.iter().all(exists), "nothing is touched before");
    let made = create_file(dir.join("made-")).unwrap();
    for repr in &left {
        assert_gone(&dir, repr);
    }
    assert_there(&dir, made.repr());
    drop((made, master));
    assert_clean(&dir);

    // With `no_unlink` it does not.
    let left = leave_objects(&dir);
    let master = Master::builder(&dir).no_unlink(true);
    let made = create_file(dir.join("made-")).unwrap();
    for repr in &left {
        assert_there(&dir, repr);
    }
    let repr = made.repr().clone();
    drop(made);
    assert_gone(&dir, &repr);
    drop(master);
    for repr in &left {
        assert_there(&dir, repr);
    }
    drop(Liveness::acquire(&dir).unwrap());
    Log::open(&dir)
        .unwrap()
        .unlink_all()
        .unwrap()
        .into_result()
        .unwrap();
}

fn resource_call_in_a_directory_in_use_is_refused() {
    let (_owner, dir) = directory();
    let left = leave_objects(&dir);
    let alive = Liveness::acquire(&dir).unwrap();
    let master = Master::builder(&dir);
    match create_file(dir.join("made-")) {
        Err(Error::Record(netmcore_pmanage::Error::AlreadyRunning { .. })) => {}
        other => panic!("{other:?}"),
    }
    for repr in &left {
        assert_there(&dir, repr);
    }
    // When the other is gone, the next call does it.
    drop(alive);
    drop(create_file(dir.join("made-")).unwrap());
    for repr in &left {
        assert_gone(&dir, repr);
    }
    drop(master);
    assert_clean(&dir);
}

fn master_that_never_ran_deletes_its_objects() {
    let (_owner, dir) = directory();
    let master = Master::builder(&dir);
    let reprs = KINDS.map(|kind| {
        let resource = kind.create(&dir).unwrap();
        let repr = resource.repr().clone();
        resource.keep();
        repr
    });
    drop(master);
    for repr in &reprs {
        assert_gone(&dir, repr);
    }
    assert_clean(&dir);
}

fn guard_in_a_definition_of_a_master_that_never_ran_goes_with_it() {
    let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let path = one.path().join("captured");
    {
        let mut master = Master::builder(one.path());
        let file = manage_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        let _process = master.def_process(move |(): ()| file.id());
    }
    assert!(!path.exists());
    let _master = Master::builder(other.path());
    // The guard has gone, and has not asked the new master.
    assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
}

fn master_uses_resources_in_the_init_hook() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let in_first = dir.clone();
    let (reader, writer) = io::pipe().unwrap();
    let first = master.def_process(move |()| {
        let mut text = String::new();
        BufReader::new(&reader).read_line(&mut text).unwrap();
        let kept: Vec<(Kind, ResourceId)> = serde_json::from_str(&text).unwrap();
        for (kind, id) in kept {
            let resource = kind.get(id).unwrap();
            assert_there(&in_first, resource.repr());
            let repr = resource.repr().clone();
            drop(resource);
            assert_there(&in_first, &repr);
            assert!(matches!(release(id), Err(Error::NotAUser { .. })));
        }
    });
    let in_hook = dir.clone();
    let master = master.init(move |controller| {
        assert_eq!(controller.directory(), in_hook);
        let mut kept = Vec::new();
        for kind in KINDS {
            let resource = kind.create(&in_hook)?;
            let repr = resource.repr().clone();
            assert_there(&in_hook, &repr);
            assert_eq!(kind.get(resource.id())?.repr(), &repr);
            assert_no_resource(
                get_resource(ResourceId::from_raw(1 << 40)),
                ResourceId::from_raw(1 << 40),
                None,
                None,
            );
            kept.push((kind, kind.create(&in_hook)?.keep()));
            drop(resource);
            assert_gone(&in_hook, &repr);
        }
        let mut text = serde_json::to_vec(&kept).unwrap();
        text.push(b'\n');
        (&writer).write_all(&text).unwrap();
        Ok(())
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn master_uses_resources_when_extracting_results() {
    lay_lines();
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    // The first process leaves the handle of one that nobody has joined.
    let first = master.def_process(|arg: (Kind, PathBuf)| {
        let process = spawn(
            |arg: (Kind, PathBuf)| {
                let resource = create_and_return(arg);
                lines().reports.send(&std::process::id());
                resource
            },
            &arg,
        );
        let pid: u32 = lines().reports.receive();
        wait_until("it has ended", || {
            !Path::new(&format!("/proc/{pid}")).exists()
        });
        process.unwrap()
    });
    let handle = std::cell::RefCell::new(None);
    let arg = (Kind::Shm, dir.clone());
    let start = || {
        let running = first.start(&arg)?;
        handle.replace(Some(running));
        Ok(running.id())
    };
    let in_master = dir.clone();
    let kept = master.run_with(start, |_| {
        let unjoined = handle.take().unwrap().join_nowait().unwrap().unwrap();
        let resource = unjoined.join_nowait().unwrap().unwrap();
        let repr = resource.repr().clone();
        assert_there(&in_master, &repr);
        drop(resource);
        assert_gone(&in_master, &repr);
        for kind in KINDS {
            let resource = kind.create(&in_master).unwrap();
            let repr = resource.repr().clone();
            assert_there(&in_master, &repr);
            let again = get_resource(resource.id()).unwrap();
            resource.release().unwrap();
            assert_there(&in_master, &repr);
            drop(again);
            assert_gone(&in_master, &repr);
        }
        let kept = Kind::Sem.create(&in_master).unwrap();
        let repr = kept.repr().clone();
        kept.keep();
        repr
    });
    assert_gone(&dir, &kept.unwrap());
    assert_clean(&dir);
}

fn guard_that_outlives_the_run_opens_nothing() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let before = create_file(dir.join("made-")).unwrap();
    let first = master.def_process(|()| ());
    let start = || first.start(&()).map(|running| running.id());
    let in_extract = dir.clone();
    let during = master
        .run_with(start, move |_| {
            create_file(in_extract.join("made-")).unwrap()
        })
        .unwrap();
    assert!(!exists(before.repr()) && !exists(during.repr()));
    fs::remove_dir_all(&dir).unwrap();
    drop(before);
    assert!(matches!(during.release(), Err(Error::NotRunning { .. })));
    assert!(matches!(
        create_file(dir.join("made-")),
        Err(Error::NotRunning { .. })
    ));
    assert!(matches!(record(), Err(Error::NotRunning { .. })));
    assert!(!dir.exists(), "a late guard has made the directory again");
}

fn master_without_a_run_gives_its_answer() {
    // No master at all.
    let id = ResourceId::from_raw(1);
    for outcome in [
        get_resource(id),
        get_file(id),
        create_file("/tmp/nmc-never-"),
    ] {
        assert!(
            matches!(outcome, Err(Error::NotRunning { .. })),
            "{outcome:?}"
        );
    }
    assert!(matches!(release(id), Err(Error::NotRunning { .. })));
    assert!(matches!(record(), Err(Error::NotRunning { .. })));

    // Points can be released before the run, and are in it.
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let square = master.def_process(|k: u64| k * k);
    let double = master.def_process(|k: u64| 2 * k);
    square.fork_point().release().unwrap();
    release(double.fork_point().id()).unwrap();
    let first = master.def_process(move |()| {
        for process in [square, double] {
            assert!(matches!(process.start(&7), Err(Error::NoResource { .. })));
        }
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn masters_uses_are_not_its_workers_uses() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let resource = create_file(dir.join("made-")).unwrap();
    let repr = resource.repr().clone();
    let id = resource.id();
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        // The guard in this copy of the master's memory is the master's.
        let _ = &resource;
        assert!(matches!(release(id), Err(Error::NotAUser { .. })));
        spawn(|()| (), &()).unwrap().join().unwrap();
        assert_there(&in_first, &repr);
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn destroyed_resources_are_gone_and_the_run_goes_on() {
    let (_owner, dir) = directory();
    let mut master = Master::builder(&dir);
    let square = master.def_process(|k: u64| k * k);
    let first = master.def_process(move |()| {
        let result = square.start(&7).unwrap().join().unwrap();
        square.fork_point().release().unwrap();
        result
    });
    let before = create_file(dir.join("made-")).unwrap();
    destroy_resources().unwrap();
    assert_gone(&dir, before.repr());
    let in_hook = dir.clone();
    let master = master.init(move |_| {
        let made = KINDS.map(|kind| kind.create(&in_hook).unwrap());
        let reprs: Vec<_> = made.iter().map(|made| made.repr().clone()).collect();
        destroy_resources()?;
        for repr in &reprs {
            assert_gone(&in_hook, repr);
        }
        for resource in made {
            let id = resource.id();
            assert_no_resource(get_resource(id), id, None, None);
            assert!(matches!(resource.release(), Err(Error::NoResource { .. })));
        }
        Ok(())
    });
    let handle = std::cell::RefCell::new(None);
    let start = || {
        let running = first.start(&())?;
        handle.replace(Some(running));
        Ok(running.id())
    };
    let in_extract = dir.clone();
    let result = master.run_with(start, |_| {
        let kept = Kind::ShmSc.create(&in_extract).unwrap();
        let repr = kept.repr().clone();
        destroy_resources().unwrap();
        assert_gone(&in_extract, &repr);
        handle.take().unwrap().join_nowait().unwrap().unwrap()
    });
    assert_eq!(result.unwrap(), 49);
    drop(before);
    assert_clean(&dir);
}

fn destroying_resources_is_for_the_master() {
    for_each_kind(|kind, dir| {
        let resource = kind.create(dir).unwrap();
        assert!(matches!(
            destroy_resources(),
            Err(Error::NotInWorker {
                call: "destroy_resources"
            })
        ));
        assert_there(dir, resource.repr());
    });
}

fn record_is_the_runs_own() {
    let (_owner, dir) = directory();
    let path = dir.join("netplex.pmanage");
    let mut master = Master::builder(&dir);
    assert_eq!(record().unwrap().path(), Some(path.as_path()));
    let (in_first, in_hook) = (path.clone(), path.clone());
    let first = master.def_process(move |()| {
        let log = record().unwrap();
        assert_eq!(log.path(), Some(in_first.as_path()));
        // What a program records itself is deleted with the rest.
        let own = in_first.with_file_name("own");
        log.register(&[KernelObject::File(own.clone())]).unwrap();
        fs::write(&own, "x").unwrap();
    });
    let master = master.init(move |_| {
        assert_eq!(record()?.path(), Some(in_hook.as_path()));
        Ok(())
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

fn without_a_record_objects_still_go() {
    let (_owner, dir) = directory();
    let left = leave_objects(&dir);
    let before = fs::read(dir.join("netplex.pmanage")).unwrap();
    let mut master = Master::builder(&dir).disable_pmanage(true);
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        assert!(matches!(record(), Err(Error::NotRunning { .. })));
        KINDS.map(|kind| {
            let resource = kind.create(&in_first).unwrap();
            assert!(exists(resource.repr()));
            let repr = resource.repr().clone();
            drop(resource);
            assert!(!exists(&repr));
            let kept = kind.create(&in_first).unwrap();
            let repr = kept.repr().clone();
            kept.keep();
            repr
        })
    });
    for repr in master.run(&first, &()).unwrap() {
        assert!(!exists(&repr), "{repr} is left");
    }
    assert!(left.iter().all(exists), "the old record was acted on");
    let after = fs::read(dir.join("netplex.pmanage")).unwrap();
    assert_eq!(after, before);
    Log::open(&dir)
        .unwrap()
        .unlink_all()
        .unwrap()
        .into_result()
        .unwrap();
}

// ---- at once -------------------------------------------------------------------------------------

fn threads_of_a_worker_make_any_call_at_once() {
    const THREADS: usize = 8;
    const ROUNDS: usize = 25;
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let shared = KINDS.map(|kind| (kind, kind.create(&dir).unwrap()));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (dir, shared) = (&dir, &shared);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let (kind, anchor) = &shared[(thread + round) % shared.len()];
                        let got = kind.get(anchor.id()).unwrap();
                        assert_eq!(got.repr(), anchor.repr());
                        let made = kind.create(dir).unwrap();
                        assert_there(dir, made.repr());
                        let repr = made.repr().clone();
                        let sent = spawn(
                            |(dir, resource): (PathBuf, Resource)| {
                                assert_there(&dir, resource.repr());
                                resource
                            },
                            &(dir.clone(), made),
                        );
                        let back = sent.unwrap().join().unwrap();
                        assert_eq!(*back.repr(), repr);
                        drop(got);
                        assert!(exists(anchor.repr()));
                        drop(back);
                        assert_gone(dir, &repr);
                    }
                });
            }
        });
        for (_, anchor) in shared {
            let repr = anchor.repr().clone();
            assert_there(&dir, &repr);
            drop(anchor);
            assert_gone(&dir, &repr);
        }
        assert!(recorded(&dir).is_empty());
    });
}

fn object_got_while_others_release_it_is_there_or_refused() {
    const ROUNDS: usize = 400;
    let (_owner, dir) = directory();
    let pipes: Vec<_> = (0..2).map(|_| Line::new()).collect();
    let mut master = Master::builder(&dir);
    let pipes = std::rc::Rc::new(pipes);
    let of_getter = std::rc::Rc::clone(&pipes);
    let getter = master.def_process(move |number: usize| {
        let mut reader = BufReader::new(&of_getter[number].reader);
        let (mut hits, mut text) = (0_usize, String::new());
        for _ in 0..ROUNDS {
            text.clear();
            reader.read_line(&mut text).unwrap();
            let id: ResourceId = serde_json::from_str(&text).unwrap();
            match get_resource(id) {
                Ok(resource) => {
                    assert!(exists(resource.repr()), "{resource} is used and gone");
                    hits += 1;
                }
                Err(Error::NoResource { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        hits
    });
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        let getters = [0, 1].map(|number| getter.start(&number).unwrap());
        for round in 0..ROUNDS {
            let kind = KINDS[round % KINDS.len()];
            let resource = kind.create(&in_first).unwrap();
            for pipe in pipes.iter() {
                pipe.send(&resource.id());
            }
            if round % 2 == 0 {
                std::thread::yield_now();
            }
            drop(resource);
        }
        let hits = getters.map(|getter| getter.join().unwrap());
        eprintln!("{hits:?} of {ROUNDS} came in time");
        assert!(recorded(&in_first).is_empty());
    });
    master.run(&first, &()).unwrap();
    assert_clean(&dir);
}

// ---- when there is no room -----------------------------------------------------------------------

fn file_that_cannot_be_created_leaves_no_record() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        File::create(dir.join("file")).unwrap();
        for prefix in [dir.join("missing/made-"), dir.join("file/made-")] {
            match create_file(&prefix) {
                Err(error) => assert!(
                    error.to_string().contains(prefix.to_str().unwrap()),
                    "{error}"
                ),
                Ok(resource) => panic!("{resource}"),
            }
        }
        let long = dir.join("x".repeat(250));
        assert!(create_file(long).is_err());
        for bad in ["", "no-slash", "/two/slashes", "/nul\0", "/"] {
            let long = format!("/{}", "x".repeat(300));
            for outcome in [
                create_shm(bad, 4096),
                create_shm_sc(bad, 4096),
                create_sem(bad, 0),
                create_sem(&long, 0),
            ] {
                // A slash alone is a prefix like any other.
                assert!(outcome.is_err() || bad == "/", "{bad:?}: {outcome:?}");
            }
        }
        assert!(create_sem(PREFIX, u32::MAX).is_err());
        assert!(recorded(&dir).is_empty());
        fs::remove_file(dir.join("file")).unwrap();
    });
}

/// The largest file that a process may write is its own affair, not the master's.
fn object_larger_than_its_creator_may_write_is_refused() {
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        let limited = spawn(
            |dir: PathBuf| {
                let limit = process::Limit {
                    soft: Some(8192),
                    hard: Some(8192),
                };
                process::set_limit(process::Resource::FileSizeBytes, limit).unwrap();
                drop(create_shm(PREFIX, 8192).unwrap());
                let error = create_shm(PREFIX, 8193).unwrap_err();
                let Error::Memory { source, .. } = error else {
                    panic!("{error:?}")
                };
                assert!(matches!(source, netmcore_shm::Error::NoSpace { .. }));
                assert!(recorded(&dir).is_empty());
            },
            &dir,
        );
        limited.unwrap().join().unwrap();
        drop(create_shm(PREFIX, 8193).unwrap());
    });
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

const TINY: &str = "NETMCORE_TEST_IN_TINY_SHM";

fn full_memory_is_told_and_leaves_nothing() {
    if std::env::var_os(TINY).is_some() {
        return in_tiny_shm();
    }
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount -t tmpfs -o size=1m,nr_inodes=16 none /dev/shm || exit 66; exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .args(["--run", "full_memory_is_told_and_leaves_nothing"])
        .env(TINY, "1")
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => netmcore_forktest::skip(&format!("unshare cannot be started: {error}")),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(66) || said.contains("unshare failed") {
        netmcore_forktest::skip(&format!("no mount namespace can be had: {said}"));
    }
    eprint!("{}{said}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", output.status);
}

fn objects_in_shm() -> usize {
    fs::read_dir("/dev/shm").unwrap().count()
}

fn in_tiny_shm() {
    assert_eq!(objects_in_shm(), 0);
    let (_owner, dir) = directory();
    run_first(&dir.clone(), move || {
        for create in [
            (|| create_shm(PREFIX, 2 << 20)) as fn() -> Result<Resource>,
            || create_shm_sc(PREFIX, 2 << 20),
            || create_shm(PREFIX, 1 << 60),
        ] {
            let error = create().unwrap_err();
            assert!(error.to_string().contains("/dev/shm"), "{error}");
            match error {
                Error::Memory { source, .. } => {
                    assert!(matches!(source, netmcore_shm::Error::NoSpace { .. }));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(objects_in_shm(), 0);
            assert!(recorded(&dir).is_empty());
        }
        // As much as there is fits.
        let held = create_shm(PREFIX, 1 << 20).unwrap();
        assert_eq!(
            fs::metadata(shm_path(held.name().unwrap())).unwrap().len(),
            1 << 20
        );
        let error = create_shm(PREFIX, 1).unwrap_err().to_string();
        assert!(error.contains("/dev/shm"), "{error}");
        let error = with_causes(&create_sem(PREFIX, 0).unwrap_err());
        assert!(error.contains("space"), "{error}");
        assert_eq!(objects_in_shm(), 1);
        assert_eq!(recorded(&dir).len(), 1);
        drop(held);
        assert_eq!(objects_in_shm(), 0);

        // No inodes are left: each create fails or succeeds, and no half is left.
        let mut held = Vec::new();
        let error = loop {
            match create_sem(PREFIX, 0) {
                Ok(resource) => held.push(resource),
                Err(error) => break with_causes(&error),
            }
            assert!(held.len() < 32, "the mount has 16 inodes");
        };
        assert!(error.contains("space"), "{error}");
        assert!(create_shm(PREFIX, 16).is_err());
        assert!(create_shm_sc(PREFIX, 16).is_err());
        assert_eq!(objects_in_shm(), held.len());
        assert_eq!(recorded(&dir).len(), held.len());
        drop(held);
        assert_eq!(objects_in_shm(), 0);
        assert!(recorded(&dir).is_empty());
        drop(create_shm(PREFIX, 1 << 20).unwrap());
    });
}

//! The master's life: what it leaves behind, whom it lets in, how it ends. Guards against a second program that
//! harms the first, against traces of a run in the program or its directory, and against clients that bring
//! the master down.
#![allow(
    clippy::print_stdout,
    reason = "programs tell the test how far they are"
)]

mod program;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use netmcore_pmanage::{Distrust, KernelObject, Log};
use netmcore_proc::{
    Error, JoinError, Master, Process, ProcessId, ResourceId, Running, create_file, create_sem,
    create_shm, destroy_resources, get_file, manage_file, record, release, self_process_id,
    shutdown_requested, spawn,
};
use netmcore_sys::process::{self, Pid, Resource};
use netmcore_sys::signal::{self, SIGCHLD, SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use program::{Program, descriptors_of, holds_within, start};

tests_and_programs! {
    tests:
        run_leaves_only_the_record,
        run_leaves_only_the_record_after_deaths,
        run_leaves_only_the_record_after_each_error,
        signal_at_the_end_finds_everything_tidied_up,
        second_start_is_refused_and_harms_nothing,
        start_after_a_killed_master_succeeds_and_cleans_up,
        two_starts_at_once_have_one_winner,
        threads_are_refused,
        pidfile_is_there_during_the_run,
        pidfile_that_cannot_be_written_ends_the_run,
        init_hook_runs_before_the_first_process,
        resource_calls_before_the_run_open_the_directory,
        grace_period_is_for_workers_that_end_by_themselves,
        worker_that_hangs_is_killed_after_the_grace_period,
        parked_workers_take_no_grace_period,
        without_record_nothing_is_read_or_written,
        without_record_the_lock_holds,
        no_unlink_leaves_the_old_record,
        two_runs_in_one_program_count_on,
        path_too_long_for_a_socket_is_refused,
        directory_of_others_is_refused,
        children_of_the_program_stay_its_own,
        ignored_child_deaths_are_seen_nevertheless,
        without_ready_workers_each_start_forks,
        master_survives_garbage,
        master_survives_clients_that_do_not_read,
        flood_of_one_client_keeps_nobody_else_waiting,
        sun_rpc_call_is_refused_in_its_own_protocol,
        debug_prints_what_the_master_does;
    programs:
        ends_by_a_late_signal,
        holds_objects,
        holds_objects_without_record,
        starts_with_the_others,
        serves_until_told,
        debugs,
}

/// The files in a directory, those in directories below included, with their contents.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(contents(&path));
        } else if kind.is_file() {
            found.insert(path.clone(), fs::read(&path).unwrap());
        } else {
            found.insert(path, Vec::new());
        }
    }
    found
}

/// What a run leaves in its directory.
fn assert_only_the_record_is_left(dir: &Path) {
    let left = contents(dir);
    let names: Vec<_> = left
        .keys()
        .map(|path| path.strip_prefix(dir).unwrap())
        .collect();
    assert_eq!(
        names,
        [Path::new("netplex.lock"), Path::new("netplex.pmanage")]
    );
    assert_eq!(
        left[&dir.join("netplex.pmanage")],
        b"",
        "the record is empty"
    );
}

/// What a run must not change in the program.
#[derive(PartialEq, Debug)]
struct Surroundings {
    descriptors: Vec<(i32, String)>,
    children: Vec<Pid>,
    mask: signal::SignalSet,
    actions: Vec<String>,
    descriptor_limit: process::Limit,
    working_directory: PathBuf,
}

impl Surroundings {
    fn now() -> Surroundings {
        let action = |signal| match signal::action(signal) {
            Ok(action) => format!("{action:?}"),
            Err(error) => error.to_string(),
        };
        Surroundings {
            descriptors: descriptors_of(Pid::this()),
            // Zombies included.
            children: process::processes_with_parent(Pid::this()).unwrap(),
            mask: signal::mask().unwrap(),
            actions: (1..=64).map(action).collect(),
            descriptor_limit: process::get_limit(Resource::DescriptorCount).unwrap(),
            working_directory: std::env::current_dir().unwrap(),
        }
    }
}

/// A master with a process that does nothing.
fn idle(dir: &Path) -> (Master, Process<(), ()>) {
    let mut master = Master::builder(dir);
    let nothing = master.def_process(|_: ()| ());
    (master, nothing)
}

fn run_nothing(dir: &Path) -> Result<(), Error> {
    let (master, nothing) = idle(dir);
    master.run(&nothing, &())
}

/// Three objects, one of each kind that can be created.
fn create_objects() -> Vec<ResourceId> {
    let prefix = "/netmcore-test-";
    vec![
        create_file("/tmp/netmcore-test-").unwrap().keep(),
        create_shm(prefix, 4096).unwrap().keep(),
        create_sem(prefix, 1).unwrap().keep(),
    ]
}

/// The files behind the objects that a record names.
fn recorded(dir: &Path) -> Vec<PathBuf> {
    let log = Log::open(dir).unwrap();
    let recorded = log.registered().unwrap();
    let path = |object: &KernelObject| match object {
        KernelObject::File(path) => path.clone(),
        KernelObject::PosixShm(name) => PathBuf::from(format!("/dev/shm{name}")),
        KernelObject::PosixSem(name) => {
            let name = name.to_string();
            PathBuf::from(format!("/dev/shm/sem.{}", name.trim_start_matches('/')))
        }
        object => panic!("{object:?}"),
    };
    recorded.iter().map(path).collect()
}

// ---- what is left ---------------------------------------------------------------------------

fn run_leaves_only_the_record() {
    let dir = tempfile::tempdir().unwrap();
    signal::set_mask(&signal::mask().unwrap().with(SIGUSR1)).unwrap();
    let before = Surroundings::now();
    for ready in [0, 1, 4] {
        let mut master = Master::builder(dir.path()).ready_workers(ready);
        let leaf = master.def_process(|k: u64| {
            create_objects();
            k
        });
        let first = master.def_process(move |_: ()| {
            create_objects();
            let running: Vec<_> = (0..10).map(|k| leaf.start(&k).unwrap()).collect();
            let sum: u64 = running.iter().map(|one| one.join().unwrap()).sum();
            // Never joined, still running at the end, or only queued.
            for k in 0..20 {
                leaf.start(&k).unwrap();
            }
            sum
        });
        assert_eq!(master.run(&first, &()).unwrap(), 45);
        assert_eq!(Surroundings::now(), before);
        assert_only_the_record_is_left(dir.path());
    }
}

fn run_leaves_only_the_record_after_deaths() {
    let dir = tempfile::tempdir().unwrap();
    let before = Surroundings::now();
    let mut master = Master::builder(dir.path());
    let dies = master.def_process(|how: u32| {
        create_objects();
        match how {
            0 => panic!("as told"),
            1 => std::process::exit(3),
            2 => signal::raise(SIGKILL).unwrap(),
            _ => std::process::abort(),
        }
    });
    let first = master.def_process(move |_: ()| {
        let running = [0, 1, 2, 3].map(|how| dies.start(&how).unwrap());
        let ends = running.map(|one| one.join().unwrap_err());
        assert!(matches!(ends[0], JoinError::Panicked { .. }), "{ends:?}");
        assert!(
            matches!(ends[1], JoinError::Exited { code: 3, .. }),
            "{ends:?}"
        );
        assert!(
            matches!(ends[2], JoinError::Killed { signal: 9, .. }),
            "{ends:?}"
        );
        assert!(
            matches!(ends[3], JoinError::Killed { signal: 6, .. }),
            "{ends:?}"
        );
        // The first process, too.
        signal::raise(SIGKILL).unwrap();
    });
    let outcome = master.run(&first, &());
    assert!(
        matches!(
            outcome,
            Err(Error::FirstProcess(JoinError::Killed { signal: 9, .. }))
        ),
        "{outcome:?}"
    );
    assert_eq!(Surroundings::now(), before);
    assert_only_the_record_is_left(dir.path());
}

fn run_leaves_only_the_record_after_each_error() {
    let dir = tempfile::tempdir().unwrap();
    let before = Surroundings::now();
    let check = |what: &str| {
        assert_eq!(Surroundings::now(), before, "{what}");
        assert_only_the_record_is_left(dir.path());
    };

    let (master, nothing) = idle(dir.path());
    let refuse = |_: &mut _| {
        create_objects();
        Err(Error::ShutDown)
    };
    let outcome = master.init(refuse).run(&nothing, &());
    assert!(matches!(outcome, Err(Error::ShutDown)), "{outcome:?}");
    check("an init hook that fails");

    let (master, nothing) = idle(dir.path());
    let start_and_refuse = move |_: &mut _| {
        nothing.start(&())?;
        Err(Error::ShutDown)
    };
    let outcome = master.init(start_and_refuse).run(&nothing, &());
    assert!(matches!(outcome, Err(Error::ShutDown)), "{outcome:?}");
    check("an init hook that starts a process and fails");

    let (master, nothing) = idle(dir.path());
    let panic = |_: &mut _| {
        create_objects();
        panic!("in the hook")
    };
    let master = master.init(panic);
    let run = std::panic::AssertUnwindSafe(|| master.run(&nothing, &()));
    std::panic::catch_unwind(run).unwrap_err();
    check("an init hook that panics");

    let (master, _) = idle(dir.path());
    let outcome = master.startup(|| Err(Error::ShutDown));
    assert!(matches!(outcome, Err(Error::ShutDown)), "{outcome:?}");
    check("a first process that does not start");

    let (master, nothing) = idle(dir.path());
    let outcome = master.run_with(|| Ok(nothing.start(&())?.id()), |_| create_objects().len());
    assert_eq!(outcome.unwrap(), 3);
    check("objects of the one who extracts results");

    let (master, nothing) = idle(dir.path());
    let run = std::panic::AssertUnwindSafe(|| {
        master.run_with(|| Ok(nothing.start(&())?.id()), |_| panic!("extracting"))
    });
    std::panic::catch_unwind(run).unwrap_err();
    check("a panic of the one who extracts results");

    run_nothing(dir.path()).unwrap();
    check("a run after all that");
}

fn ends_by_a_late_signal(arguments: &[String]) {
    let (master, nothing) = idle(Path::new(&arguments[0]));
    let pidfile = Path::new(&arguments[0]).join("pid");
    let master = master.pidfile(pidfile);
    let start = || Ok(nothing.start(&())?.id());
    let extract = |_| {
        create_objects();
        // As a key that is pressed once more while the run ends.
        signal::raise(SIGINT).unwrap();
    };
    master.run_with(start, extract).unwrap();
}

fn signal_at_the_end_finds_everything_tidied_up() {
    let dir = tempfile::tempdir().unwrap();
    start("ends_by_a_late_signal", &[dir.path()]).dies_of(SIGINT);
    assert_only_the_record_is_left(dir.path());
}

// ---- two programs ---------------------------------------------------------------------------

/// Runs workers that hold objects, until a file exists.
fn hold_objects(master: Master, go_on: &str) {
    let mut master = master;
    let go_on = PathBuf::from(go_on);
    let leaf = master.def_process(move |_: ()| {
        let mine = create_objects();
        println!("holds {}", Pid::this());
        let told = holds_within(Duration::from_secs(100), || go_on.exists());
        // They are still there, and ours.
        for id in mine {
            release(id).unwrap();
        }
        told
    });
    let first = master.def_process(move |_: ()| {
        let running = [(), (), ()].map(|()| leaf.start(&()).unwrap());
        running.iter().all(|one| one.join().unwrap())
    });
    assert!(master.run(&first, &()).unwrap());
}

fn holds_objects(arguments: &[String]) {
    let dir = Path::new(&arguments[0]);
    hold_objects(Master::builder(dir).pidfile(dir.join("pid")), &arguments[1]);
}

fn holds_objects_without_record(arguments: &[String]) {
    let dir = Path::new(&arguments[0]);
    hold_objects(Master::builder(dir).disable_pmanage(true), &arguments[1]);
}

fn until_objects_are_held(program: &mut Program) -> Vec<Pid> {
    let worker = |_| program.line_after("holds ").parse().unwrap();
    (0..3)
        .map(worker)
        .map(|pid| Pid::new(pid).unwrap())
        .collect()
}

/// Checks that a start on `dir` is refused because `pid` runs there.
fn assert_refused(dir: &Path, pid: Pid) {
    let (master, nothing) = idle(dir);
    let outcome = master.pidfile(dir.join("pid")).run(&nothing, &());
    let Err(Error::Record(netmcore_pmanage::Error::AlreadyRunning { pid: found, .. })) = &outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!(*found, pid);
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains(&pid.to_string()), "{message}");
}

fn second_start_is_refused_and_harms_nothing() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let go_on = notes.path().join("go on");
    let mut program = start("holds_objects", &[dir.path(), &go_on]);
    until_objects_are_held(&mut program);
    let before = contents(dir.path());
    let objects = recorded(dir.path());
    assert_eq!(objects.len(), 9);
    let surroundings = Surroundings::now();
    for _ in 0..3 {
        assert_refused(dir.path(), program.pid());
        assert_eq!(contents(dir.path()), before);
        assert_eq!(Surroundings::now(), surroundings);
    }
    for object in &objects {
        assert!(object.exists(), "{} is gone", object.display());
    }
    File::create(&go_on).unwrap();
    program.succeeds();
    assert_only_the_record_is_left(dir.path());
    for object in &objects {
        assert!(!object.exists(), "{} is left", object.display());
    }
    run_nothing(dir.path()).unwrap();
}

fn start_after_a_killed_master_succeeds_and_cleans_up() {
    for round in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let mut program = start("holds_objects", &[dir.path(), Path::new("/never")]);
        let workers = until_objects_are_held(&mut program);
        let objects = recorded(dir.path());
        assert_eq!(objects.len(), 9);
        if round % 2 == 1 {
            // A worker that is stopped dies no less.
            process::kill(workers[round / 2], signal::SIGSTOP).unwrap();
        }
        program.signal(SIGKILL);
        // At once, while workers die and the master is a zombie.
        run_nothing(dir.path()).unwrap();
        for worker in workers {
            assert!(!program::is_alive(worker), "{worker} is alive");
        }
        for object in &objects {
            assert!(!object.exists(), "{} is left", object.display());
        }
        program.dies_of(SIGKILL);
        // The dead run's pidfile is nobody's.
        fs::remove_file(dir.path().join("pid")).unwrap();
        assert_only_the_record_is_left(dir.path());
    }
}

fn starts_with_the_others(arguments: &[String]) {
    let [dir, gate, go_on] = [0, 1, 2].map(|k| PathBuf::from(&arguments[k]));
    let mut master = Master::builder(&dir);
    let first = master.def_process(move |_: ()| {
        println!("won");
        holds_within(Duration::from_secs(100), || go_on.exists())
    });
    println!("ready");
    while !gate.exists() {
        std::hint::spin_loop();
    }
    match master.run(&first, &()) {
        Ok(true) => println!("done"),
        Err(Error::Record(netmcore_pmanage::Error::AlreadyRunning { pid, .. })) => {
            println!("lost to {pid}");
        }
        other => panic!("{other:?}"),
    }
}

fn two_starts_at_once_have_one_winner() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..10 {
        let notes = tempfile::tempdir().unwrap();
        let (gate, go_on) = (notes.path().join("gate"), notes.path().join("go on"));
        let arguments = [dir.path(), &gate, &go_on];
        let mut programs: Vec<_> = (0..2 + round % 2)
            .map(|_| start("starts_with_the_others", &arguments))
            .collect();
        for program in &mut programs {
            program.line_after("ready");
        }
        File::create(&gate).unwrap();
        let said: Vec<_> = programs.iter_mut().map(|one| one.line().unwrap()).collect();
        let winners: Vec<_> = (0..said.len()).filter(|&k| said[k] == "won").collect();
        assert_eq!(winners.len(), 1, "{said:?}");
        let winner = programs[winners[0]].pid();
        for (k, said) in said.iter().enumerate() {
            assert!(
                k == winners[0] || *said == format!("lost to {winner}"),
                "{said}"
            );
        }
        File::create(&go_on).unwrap();
        for program in &mut programs {
            program.succeeds();
        }
        assert_only_the_record_is_left(dir.path());
    }
}

// ---- what is checked at the start -----------------------------------------------------------

fn threads_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("d");
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let threads: Vec<_> = (0..2)
        .map(|_| std::thread::spawn(sleep_until_unparked))
        .collect();
    let outcome = run_nothing(&dir);
    assert!(
        matches!(outcome, Err(Error::MultiThreaded { threads: 3 })),
        "{outcome:?}"
    );
    assert!(!dir.exists(), "something was made");
    for thread in threads {
        thread.thread().unpark();
        thread.join().unwrap();
    }
    run_nothing(&dir).unwrap();

    // Started when the run has begun: nothing can be forked any more.
    let before = Surroundings::now();
    let (master, nothing) = idle(&dir);
    let master = master.init(move |_| {
        std::thread::spawn(move || ended.recv());
        Ok(())
    });
    let outcome = master.run(&nothing, &());
    assert!(
        matches!(outcome, Err(Error::MultiThreaded { threads: 2 })),
        "{outcome:?}"
    );
    assert_only_the_record_is_left(&dir);
    drop(end);
    assert!(holds_within(
        Duration::from_secs(5),
        || process::thread_count().unwrap() == 1
    ));
    assert_eq!(Surroundings::now(), before);
    run_nothing(&dir).unwrap();
}

fn sleep_until_unparked() {
    std::thread::park();
}

fn pidfile_is_there_during_the_run() {
    let place = tempfile::tempdir().unwrap();
    let (dir, elsewhere) = (place.path().join("d"), place.path().join("e"));
    fs::create_dir(&elsewhere).unwrap();
    std::env::set_current_dir(place.path()).unwrap();
    for pidfile in [place.path().join("pid"), PathBuf::from("pid")] {
        let mut master = Master::builder(&dir).pidfile(&pidfile);
        let absolute = place.path().join("pid");
        let first = master.def_process(move |_: ()| fs::read_to_string(&absolute).unwrap());
        let elsewhere = elsewhere.clone();
        let master = master.init(move |_| {
            // A relative path keeps its meaning.
            std::env::set_current_dir(elsewhere).unwrap();
            Ok(())
        });
        assert_eq!(
            master.run(&first, &()).unwrap(),
            format!("{}\n", Pid::this())
        );
        std::env::set_current_dir(place.path()).unwrap();
        assert!(!pidfile.exists());
        assert_only_the_record_is_left(&dir);
    }
}

fn pidfile_that_cannot_be_written_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let before = Surroundings::now();
    let (master, nothing) = idle(dir.path());
    let pidfile = Path::new("/nowhere/pid");
    let outcome = master.pidfile(pidfile).run(&nothing, &());
    match outcome {
        Err(Error::InvalidPath { path, .. }) => assert_eq!(path, pidfile),
        other => panic!("{other:?}"),
    }
    assert_eq!(Surroundings::now(), before);
    assert_only_the_record_is_left(dir.path());
}

fn init_hook_runs_before_the_first_process() {
    static ORDER: Mutex<Vec<&str>> = Mutex::new(Vec::new());
    let note = |what| ORDER.lock().unwrap().push(what);
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path()).init(move |controller| {
        note("init");
        let place = controller.directory().join("netplex.pmanage");
        assert_eq!(record()?.path(), Some(&*place));
        let in_master = self_process_id();
        assert!(
            matches!(in_master, Err(Error::NotInMaster { .. })),
            "{in_master:?}"
        );
        create_objects();
        assert_eq!(recorded(&controller.directory()).len(), 3);
        destroy_resources()?;
        assert_eq!(recorded(&controller.directory()).len(), 0);
        Ok(())
    });
    let first = master.def_process(move |_: ()| {
        note("first");
        ORDER.lock().unwrap().join(" ")
    });
    let start = || {
        note("start");
        Ok(first.start(&())?.id())
    };
    let extract = |process| {
        note("extract");
        first.join_point().join_nowait(process).unwrap().unwrap()
    };
    let seen = master.run_with(start, extract).unwrap();
    assert_eq!(seen, "init start first");
    assert_eq!(ORDER.lock().unwrap().join(" "), "init start extract");
}

fn resource_calls_before_the_run_open_the_directory() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("d");
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    let old = place.path().join("old");
    File::create(&old).unwrap();
    Log::open(&dir)
        .unwrap()
        .register(&[KernelObject::File(old.clone())])
        .unwrap();
    let mut master = Master::builder(&dir);
    assert!(old.exists(), "building a master touches nothing");
    let file = create_file(place.path().join("new-")).unwrap();
    assert!(!old.exists(), "the last run's objects are deleted first");
    assert_eq!(recorded(&dir), [file.path().unwrap()]);
    let id = file.keep();
    let first = master.def_process(move |_: ()| get_file(id).unwrap().path().unwrap().exists());
    assert!(master.run(&first, &()).unwrap());
    assert_only_the_record_is_left(&dir);

    // A master that is never run gives up all the same.
    let before = Surroundings::now();
    let master = Master::builder(&dir);
    let file = create_file(place.path().join("new-")).unwrap();
    let path = file.path().unwrap().to_owned();
    file.keep();
    drop(master);
    assert!(!path.exists());
    assert_eq!(Surroundings::now(), before);
    assert_only_the_record_is_left(&dir);
}

// ---- the end --------------------------------------------------------------------------------

/// Sleeps in a worker: what comes later is to come when the master has slept for as long.
fn idle_for(duration: Duration) {
    // sleep: the master is to sleep that long; how long exactly does not matter.
    std::thread::sleep(duration);
}

fn grace_period_is_for_workers_that_end_by_themselves() {
    const GRACE: Duration = Duration::from_millis(1500);
    let place = tempfile::tempdir().unwrap();
    let noted = place.path().join("noted");
    let mut master = Master::builder(place.path().join("d")).grace(GRACE);
    let note = noted.clone();
    let other = master.def_process(move |_: ()| {
        while !shutdown_requested() {
            // sleep: paces the polling of the master's wish.
            std::thread::sleep(Duration::from_millis(1));
        }
        idle_for(GRACE / 10);
        File::create(&note).unwrap();
        7
    });
    let first = master.def_process(move |_: ()| {
        let running = other.start(&()).unwrap();
        // Longer than the grace period, which does not count from the master's last deed.
        idle_for(GRACE * 3 / 2);
        running
    });
    let started = Mutex::new(None);
    let start = || {
        let running = first.start(&())?;
        let id = running.id();
        *started.lock().unwrap() = Some(running);
        Ok(id)
    };
    let extract = |_| {
        let running = started.lock().unwrap().take().unwrap();
        let other: Running<i32> = running.join_nowait().unwrap().unwrap();
        other.join_nowait()
    };
    let result = master.run_with(start, extract).unwrap();
    assert!(noted.exists(), "the worker was killed");
    assert_eq!(result.unwrap(), Some(7));
}

fn worker_that_hangs_is_killed_after_the_grace_period() {
    const GRACE: Duration = Duration::from_millis(400);
    let place = tempfile::tempdir().unwrap();
    let (dir, noted) = (place.path().join("d"), place.path().join("noted"));
    let mut master = Master::builder(&dir).grace(GRACE);
    let note = noted.clone();
    let hangs = master.def_process(move |_: ()| {
        File::create(&note).unwrap();
        idle_for(Duration::from_secs(600));
    });
    let first = master.def_process(move |_: ()| {
        let running = hangs.start(&()).unwrap();
        assert!(holds_within(Duration::from_secs(60), || noted.exists()));
        running
    });
    let first_running = Mutex::new(None);
    let start = || {
        let running = first.start(&())?;
        let id = running.id();
        *first_running.lock().unwrap() = Some(running);
        Ok(id)
    };
    let began = Instant::now();
    let extract = |_| {
        let running = first_running.lock().unwrap().take().unwrap();
        let hung: Running<()> = running.join_nowait().unwrap().unwrap();
        hung.join_nowait()
    };
    let result = master.run_with(start, extract).unwrap();
    let took = began.elapsed();
    assert!(
        matches!(result, Err(JoinError::Killed { signal: 9, .. })),
        "{result:?}"
    );
    assert!(took >= GRACE, "{took:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_only_the_record_is_left(&dir);
}

fn parked_workers_take_no_grace_period() {
    let dir = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let (master, nothing) = idle(dir.path());
    let master = master.ready_workers(8).grace(Duration::from_secs(3600));
    master.run(&nothing, &()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(60));
}

// ---- the switches ---------------------------------------------------------------------------

/// A directory with the record of a dead run that names an existing file.
fn directory_with_a_record(place: &Path) -> (PathBuf, PathBuf) {
    let (dir, old) = (place.join("d"), place.join("old"));
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    File::create(&old).unwrap();
    let log = Log::open(&dir).unwrap();
    log.register(&[KernelObject::File(old.clone())]).unwrap();
    (dir, old)
}

fn without_record_nothing_is_read_or_written() {
    let place = tempfile::tempdir().unwrap();
    let (dir, old) = directory_with_a_record(place.path());
    let record_path = dir.join("netplex.pmanage");
    let line = fs::read(&record_path).unwrap();
    let modified = || fs::metadata(&record_path).unwrap().modified().unwrap();
    let before = modified();
    let mut master = Master::builder(&dir).disable_pmanage(true);
    let in_run = (record_path.clone(), line.clone());
    let first = master.def_process(move |_: ()| {
        let no_record = record();
        assert!(
            matches!(no_record, Err(Error::NotRunning { .. })),
            "{no_record:?}"
        );
        create_objects();
        let file = create_file("/tmp/netmcore-test-").unwrap();
        assert_eq!(fs::read(&in_run.0).unwrap(), in_run.1);
        let path = file.path().unwrap().to_owned();
        assert!(path.exists());
        file.keep();
        path
    });
    let file = master.run(&first, &()).unwrap();
    assert!(!file.exists(), "objects are deleted at an orderly end");
    assert!(old.exists(), "the old record was acted on");
    assert_eq!(fs::read(&record_path).unwrap(), line);
    assert_eq!(modified(), before);

    // Where there is no record, none is made.
    let dir = place.path().join("e");
    let (master, nothing) = idle(&dir);
    master.disable_pmanage(true).run(&nothing, &()).unwrap();
    let names: Vec<_> = contents(&dir).into_keys().collect();
    assert_eq!(names, [dir.join("netplex.lock")]);
}

fn without_record_the_lock_holds() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let go_on = notes.path().join("go on");
    let mut program = start("holds_objects_without_record", &[dir.path(), &go_on]);
    until_objects_are_held(&mut program);
    assert_refused(dir.path(), program.pid());
    let (master, nothing) = idle(dir.path());
    let outcome = master.disable_pmanage(true).run(&nothing, &());
    assert!(matches!(outcome, Err(Error::Record(_))), "{outcome:?}");
    File::create(&go_on).unwrap();
    program.succeeds();
    run_nothing(dir.path()).unwrap();
}

fn no_unlink_leaves_the_old_record() {
    let place = tempfile::tempdir().unwrap();
    let (dir, old) = directory_with_a_record(place.path());
    let record_path = dir.join("netplex.pmanage");
    let mut lines = fs::read_to_string(&record_path).unwrap();
    let kept = place.path().join("kept");
    // Twice in sequence, as one program that starts up twice on one directory.
    for _ in 0..2 {
        let mut master = Master::builder(&dir).no_unlink(true);
        let kept = kept.clone();
        let first = master.def_process(move |_: ()| {
            manage_file(&kept).unwrap().keep();
            File::create(&kept).unwrap();
            create_objects().len()
        });
        assert_eq!(master.run(&first, &()).unwrap(), 3);
        assert!(old.exists(), "the old record was acted on");
        let now = fs::read_to_string(&record_path).unwrap();
        assert!(now.starts_with(&lines), "{lines}\nhas become\n{now}");
        // Four objects, recorded and dropped from the record.
        assert_eq!(now.lines().count(), lines.lines().count() + 8, "{now}");
        lines = now;
        // What belongs to a run is deleted when its last user is gone.
        assert!(!place.path().join("kept").exists());
        assert_eq!(recorded(&dir), [old.as_path()]);
    }
    run_nothing(&dir).unwrap();
    assert!(!old.exists());
    assert_only_the_record_is_left(&dir);
}

fn two_runs_in_one_program_count_on() {
    static STARTED: Mutex<Vec<(ProcessId, ResourceId)>> = Mutex::new(Vec::new());
    let dir = tempfile::tempdir().unwrap();
    let mut old = None;
    for _ in 0..3 {
        let mut master = Master::builder(dir.path());
        let leaf = master.def_process(|_: ()| {
            let file = create_file("/tmp/netmcore-test-").unwrap();
            (self_process_id().unwrap(), file.id())
        });
        let first = master.def_process(move |_: ()| {
            [leaf.start(&()), leaf.start(&())].map(|one| one.unwrap().join().unwrap())
        });
        let start = || Ok(first.start(&())?.id());
        let extract = |process| (process, first.join_point().join_nowait(process));
        let (process, result) = master.run_with(start, extract).unwrap();
        let mut seen = STARTED.lock().unwrap();
        let highest_process = seen.iter().map(|one| one.0).max();
        let highest_resource = seen.iter().map(|one| one.1).max();
        for (process, resource) in result.unwrap().unwrap() {
            assert!(Some(process) > highest_process, "{process} again");
            assert!(Some(resource) > highest_resource, "{resource} again");
            assert!(seen.iter().all(|one| one.0 != process && one.1 != resource));
            seen.push((process, resource));
        }
        // A handle from the run before finds nothing, and nothing of this run.
        if let Some((point, process)) = old.replace((first.join_point(), process)) {
            let outcome = point.join_nowait(process);
            assert!(
                matches!(outcome, Err(JoinError::NoSuchProcess { .. })),
                "{outcome:?}"
            );
        }
    }
}

// ---- directories that will not do -----------------------------------------------------------

fn path_too_long_for_a_socket_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("d".repeat(120));
    match run_nothing(&dir) {
        Err(Error::PathTooLong { path, limit, len }) => {
            assert!(path.starts_with(&dir));
            assert_eq!(len, path.as_os_str().len());
            assert!(limit < len);
        }
        other => panic!("{other:?}"),
    }
    assert!(!dir.exists());
}

fn directory_of_others_is_refused() {
    fn distrust(dir: &Path) -> Distrust {
        let before = contents(dir);
        let outcome = run_nothing(dir);
        let Err(Error::Record(netmcore_pmanage::Error::Untrusted { why, .. })) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(contents(dir), before, "something was written");
        why
    }
    let place = tempfile::tempdir().unwrap();
    let (dir, old) = directory_with_a_record(place.path());
    for mode in [0o777, 0o770, 0o702] {
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
        let why = distrust(&dir);
        assert!(
            matches!(why, Distrust::WritableByOthers { mode: found } if found == mode),
            "{why:?}"
        );
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    let link = place.path().join("link");
    std::os::unix::fs::symlink(&dir, &link).unwrap();
    assert!(matches!(distrust(&link), Distrust::Link));
    if process::effective_uid() == 0 {
        std::os::unix::fs::chown(&dir, Some(12345), None).unwrap();
        assert!(matches!(distrust(&dir), Distrust::Owner { uid: 12345, .. }));
        std::os::unix::fs::chown(&dir, Some(0), None).unwrap();
    }
    let file = place.path().join("file");
    File::create(&file).unwrap();
    let outcome = run_nothing(&file);
    assert!(
        matches!(
            outcome,
            Err(Error::Record(netmcore_pmanage::Error::Untrusted { .. }))
        ),
        "{outcome:?}"
    );
    assert!(old.exists());
    run_nothing(&dir).unwrap();
    assert!(!old.exists());
}

// ---- children of the program ----------------------------------------------------------------

fn children_of_the_program_stay_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<_> = (0..3)
        .map(|code| {
            let script = format!("exit {code}");
            Command::new("sh").args(["-c", &script]).spawn().unwrap()
        })
        .collect();
    let pids: Vec<_> = children
        .iter()
        .map(|one| Pid::new(one.id() as i32).unwrap())
        .collect();
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(|_: ()| ());
    let first = master.def_process(move |_: ()| {
        let is_zombie = |&pid: &Pid| process::is_zombie(pid).unwrap();
        let ended = holds_within(Duration::from_secs(20), || pids.iter().all(is_zombie));
        for _ in 0..10 {
            leaf.start(&()).unwrap().join().unwrap();
        }
        ended && pids.iter().all(is_zombie)
    });
    assert!(master.run(&first, &()).unwrap(), "a child was reaped");
    for (code, child) in children.iter_mut().enumerate() {
        assert_eq!(child.wait().unwrap().code(), Some(code as i32));
    }
}

fn ignored_child_deaths_are_seen_nevertheless() {
    let dir = tempfile::tempdir().unwrap();
    signal::set_ignore(SIGCHLD).unwrap();
    let mut master = Master::builder(dir.path());
    let first = master.def_process(|_: ()| {
        let exits = spawn(|code: i32| -> () { std::process::exit(code) }, &5).unwrap();
        let outcome = exits.join();
        assert!(
            matches!(outcome, Err(JoinError::Exited { code: 5, .. })),
            "{outcome:?}"
        );
        let killed = spawn(|signal: i32| signal::raise(signal).unwrap(), &SIGTERM).unwrap();
        let outcome = killed.join();
        let is_named = matches!(
            outcome,
            Err(JoinError::Killed {
                signal: SIGTERM,
                ..
            })
        );
        assert!(is_named, "{outcome:?}");
    });
    master.run(&first, &()).unwrap();
    assert!(signal::action(SIGCHLD).unwrap().is_ignored());
    assert!(
        process::processes_with_parent(Pid::this())
            .unwrap()
            .is_empty()
    );
}

fn without_ready_workers_each_start_forks() {
    fn sum(upto: u64) -> u64 {
        match upto {
            0 => 0,
            _ => upto + spawn(sum, &(upto - 1)).unwrap().join().unwrap(),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path()).ready_workers(0);
    let leaf = master.def_process(|k: u64| k * k);
    let first = master.def_process(move |_: ()| {
        let running: Vec<_> = (0..50).map(|k| leaf.start(&k).unwrap()).collect();
        let squares: u64 = running.iter().map(|one| one.join().unwrap()).sum();
        (squares, sum(20))
    });
    assert_eq!(master.run(&first, &()).unwrap(), (40425, 210));
}

// ---- clients --------------------------------------------------------------------------------

/// Serves starts and resources until a file exists.
fn serves_until_told(arguments: &[String]) {
    let mut master = Master::builder(&arguments[0]);
    let go_on = PathBuf::from(&arguments[1]);
    let leaf = master.def_process(|k: u64| {
        drop(create_file("/tmp/netmcore-test-").unwrap());
        k + 1
    });
    let first = master.def_process(move |_: ()| {
        println!("serves");
        let mut served = 0_u64;
        loop {
            served = leaf.start(&served).unwrap().join().unwrap();
            if go_on.exists() {
                return served;
            }
        }
    });
    let served = master.run(&first, &()).unwrap();
    println!("served {served}");
}

/// A program that serves, and the means to talk to its master.
struct Served {
    program: Program,
    dir: tempfile::TempDir,
    go_on: PathBuf,
}

impl Served {
    fn start() -> Served {
        let dir = tempfile::tempdir().unwrap();
        let go_on = dir.path().join("go on");
        let mut program = start("serves_until_told", &[dir.path(), &go_on]);
        program.line_after("serves");
        Served {
            program,
            dir,
            go_on,
        }
    }

    fn connect(&self) -> UnixStream {
        let path = self.dir.path().join("netplex.controller/admin");
        let stream = UnixStream::connect(path).unwrap();
        // Only for a test that fails.
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).unwrap();
        stream.set_write_timeout(limit).unwrap();
        stream
    }

    /// Asks for the list of processes, and checks the answer.
    fn answers(&self) {
        self.answers_on(&mut self.connect());
    }

    fn answers_on(&self, stream: &mut UnixStream) {
        stream.write_all(&list_processes()).unwrap();
        let body = read_reply(stream);
        // The first process is there, if nothing else.
        assert_eq!(body[..4], 4_u32.to_le_bytes(), "a listing");
        assert_ne!(body[4..12], 0_u64.to_le_bytes(), "the number of lines");
    }

    fn ends_in_order(mut self) {
        File::create(&self.go_on).unwrap();
        let served: u64 = self.program.line_after("served ").parse().unwrap();
        assert!(served > 0);
        self.program.succeeds();
        fs::remove_file(&self.go_on).unwrap();
        assert_only_the_record_is_left(self.dir.path());
    }
}

/// A frame as `wire` has it: magic, version, kind, length, body.
fn frame(version: u16, kind: u16, len: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"nmcw".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The version of the protocol.
const VERSION: u16 = 3;
/// A request for the first page of processes, and one of resources: the variant, and behind none.
const LIST_PROCESSES: [u8; 5] = [14, 0, 0, 0, 0];
const LIST_RESOURCES: [u8; 5] = [15, 0, 0, 0, 0];

fn list_processes() -> Vec<u8> {
    frame(VERSION, 1, 5, &LIST_PROCESSES)
}

fn read_reply(stream: &mut UnixStream) -> Vec<u8> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[..8], frame(VERSION, 2, 0, &[])[..8]);
    let len = u32::from_le_bytes(header[8..].try_into().unwrap());
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).unwrap();
    body
}

/// Whether the master closes the connection, whatever it says before.
fn is_closed(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn seed() -> u64 {
    let given = std::env::var("NETMCORE_SEED").ok();
    let seed = given.map_or_else(process::random_u64, |seed| seed.parse().unwrap());
    println!("replay with NETMCORE_SEED={seed}");
    seed
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn master_survives_garbage() {
    let mut random = seed();
    let served = Served::start();
    // Well-behaved, and still served at the end.
    let mut good = served.connect();
    let mut half_open = Vec::new();
    for round in 0..100 {
        let mut bad = served.connect();
        let len = 1 + next(&mut random) as usize % 3000;
        let mut noise: Vec<u8> = (0..len).map(|_| next(&mut random) as u8).collect();
        // Nothing that could become a frame, or a call of another protocol that gets an answer.
        noise[0] = b'x';
        let bytes = match round % 10 {
            0 => noise,
            1 => frame(VERSION, 1, u32::MAX, &noise),
            2 => frame(VERSION, 1, (1 << 20) + 1, &[]),
            3 => frame(VERSION + 1, 1, 5, &LIST_PROCESSES),
            4 => frame(VERSION, 2, 5, &LIST_PROCESSES),
            5 => frame(VERSION, 1, len as u32, &noise),
            // No such request, and one with a tail.
            6 => frame(VERSION, 1, 4, &[200, 0, 0, 0]),
            7 => frame(VERSION, 1, 6, &[14, 0, 0, 0, 0, 0]),
            // A message of a process, with a list of resources that says it is huge.
            8 => {
                let mut body = vec![8, 0, 0, 0];
                body.extend(1_u64.to_le_bytes());
                body.extend(0_u32.to_le_bytes());
                body.extend(u64::MAX.to_le_bytes());
                frame(VERSION, 1, body.len() as u32, &body)
            }
            _ => list_processes()[..1 + len % 16].to_vec(),
        };
        // It may be closed while we write: the first bytes say enough.
        let _ = bad.write_all(&bytes);
        if round % 10 == 9 {
            half_open.push(bad);
        } else {
            assert!(
                is_closed(&mut bad),
                "round {round}: the connection stays open"
            );
        }
        served.answers_on(&mut good);
    }
    for _ in 0..300 {
        drop(served.connect());
    }
    served.answers();
    for mut stream in half_open {
        // What was begun can be ended, or cut off.
        let _ = stream.write_all(&[0]);
    }
    served.answers_on(&mut good);
    served.ends_in_order();
}

fn master_survives_clients_that_do_not_read() {
    let served = Served::start();
    let requests = frame(VERSION, 1, 5, &LIST_RESOURCES).repeat(1000);
    let mut clients: Vec<_> = (0..3).map(|_| served.connect()).collect();
    for client in &mut clients {
        // The master takes requests until it holds too many answers, and then gives up this client.
        let refused = (0..10_000).find_map(|_| client.write_all(&requests).err());
        let refused = refused
            .expect("the master holds answers without limit")
            .kind();
        let closed = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(closed.contains(&refused), "{refused}");
        served.answers();
    }
    served.ends_in_order();
}

fn flood_of_one_client_keeps_nobody_else_waiting() {
    let served = Served::start();
    let flood = served.connect();
    let mut requests = flood.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let bytes = list_processes().repeat(200);
        while requests.write_all(&bytes).is_ok() {}
    });
    let mut replies = flood.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while replies.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    for _ in 0..20 {
        served.answers();
    }
    flood.shutdown(std::net::Shutdown::Both).unwrap();
    writer.join().unwrap();
    reader.join().unwrap();
    served.ends_in_order();
}

fn sun_rpc_call_is_refused_in_its_own_protocol() {
    let served = Served::start();
    let mut admin = served.connect();
    // A call of the ancestor's admin tool: last fragment, 40 bytes; xid, call, version 2 of RPC, program,
    // version, procedure, no credentials, no verifier.
    let words: [u32; 11] = [
        0x8000_0028,
        0xdead_beef,
        0,
        2,
        0x2000_0003,
        2,
        1,
        0,
        0,
        0,
        0,
    ];
    let call: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    admin.write_all(&call).unwrap();
    let mut answer = Vec::new();
    admin.read_to_end(&mut answer).unwrap();
    // Last fragment, 24 bytes; xid, reply, accepted, no verifier, program unavailable.
    let words: [u32; 7] = [0x8000_0018, 0xdead_beef, 1, 0, 0, 0, 1];
    let expected: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    assert_eq!(answer, expected);
    served.ends_in_order();
}

// ---- debug ----------------------------------------------------------------------------------

fn debugs(arguments: &[String]) {
    assert!(netmcore_proc::debug::enable());
    assert!(
        !netmcore_proc::debug::enable(),
        "only the first has an effect"
    );
    let mut master = Master::builder(&arguments[0]);
    let first = master.def_process(|_: ()| {
        println!("worker {}", Pid::this());
        drop(create_file("/tmp/netmcore-test-").unwrap());
    });
    master.run(&first, &()).unwrap();
}

fn debug_prints_what_the_master_does() {
    let dir = tempfile::tempdir().unwrap();
    let output = program::command("debugs", &[dir.path()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{text}");
    let said = String::from_utf8(output.stdout).unwrap();
    let worker = said.trim().strip_prefix("worker ").unwrap();
    let expected = [
        "INFO: the run begins directory=".to_owned(),
        format!("DEBUG: a worker has been forked worker=1 pid={worker}"),
        "DEBUG: a resource is managed id=".to_owned(),
        "DEBUG: a resource is deleted id=".to_owned(),
        "DEBUG: a worker has ended worker=".to_owned(),
        "INFO: the run ends reason=".to_owned(),
        "INFO: the run is over".to_owned(),
    ];
    for expected in expected {
        assert_eq!(
            text.matches(&expected).count().min(1),
            1,
            "{expected} in\n{text}"
        );
    }
    for line in text.lines() {
        assert!(
            line.starts_with('[') && line.contains("] netmcore "),
            "{line}"
        );
    }
}

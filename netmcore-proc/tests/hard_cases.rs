//! Guards against a master that waits for ever, or falls, over something that is off: a first process that
//! is over before the loop begins, a hook that spoils SIGCHLD, a stopped holder of the record's lock, a
//! thread that creates an object while its process ends, garbage in a guard or a message.

use netmcore_forktest::forktests;
use netmcore_proc::{
    Error, JoinError, Master, ObjectName, ProcessId, Resource, create_shm, manage_file, record,
    spawn,
};
use netmcore_sys::process::{self, Pid};
use netmcore_sys::signal;

fn first_process_that_is_over_before_the_loop_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let one = master.def_process(|k: u64| k);
    let start = || {
        let running = one.start(&1)?;
        running.kill()?;
        Ok(running.id())
    };
    let joined = master.run_with(start, |first| one.join_point().join_nowait(first));
    assert!(
        matches!(joined, Ok(Err(JoinError::Killed { signal: 9, .. }))),
        "{joined:?}"
    );
}

fn first_process_that_never_was_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = Master::builder(dir.path()).startup(|| Ok(ProcessId::from_raw(4711)));
    assert!(
        matches!(
            outcome,
            Err(Error::FirstProcess(JoinError::NoSuchProcess { .. }))
        ),
        "{outcome:?}"
    );
}

fn hook_that_ignores_child_deaths_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path()).init(|_| {
        signal::set_ignore(signal::SIGCHLD).unwrap();
        Ok(())
    });
    let echo = master.def_process(|k: u64| k);
    assert_eq!(master.run(&echo, &7).unwrap(), 7);
}

/// Takes the record's lock, stops, and never gives it back.
fn stop_with_the_lock(record: std::path::PathBuf) -> u64 {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(record)
        .unwrap();
    let _guard = netmcore_sys::file_lock::OfdGuard::lock(file).unwrap();
    process::kill(Pid::this(), signal::SIGSTOP).unwrap();
    0
}

fn stopped_holder_of_the_records_lock_stops_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let first = master.def_process(|()| {
        let path = record().unwrap().path().unwrap().to_path_buf();
        let stopped = spawn(stop_with_the_lock, &path).unwrap();
        // Until it holds the lock, managing succeeds.
        let refusal = loop {
            match manage_file("/tmp/netmcore-test-never-made") {
                Ok(file) => file.release().unwrap(),
                Err(error) => break error.to_string(),
            }
        };
        // The master still serves: it can be asked to kill.
        stopped.kill().unwrap();
        let joined = stopped.join();
        assert!(
            matches!(joined, Err(JoinError::Killed { signal: 9, .. })),
            "{joined:?}"
        );
        manage_file("/tmp/netmcore-test-never-made")
            .and_then(Resource::release)
            .unwrap();
        refusal
    });
    let refusal = master.run(&first, &()).unwrap();
    assert!(
        refusal.contains("another process has held its lock"),
        "{refusal}"
    );
}

fn thread_that_creates_while_its_process_ends_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let creator = master.def_process(|prefix: String| {
        let (ready, begun) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            loop {
                create_shm(&prefix, 4096).unwrap().keep();
                let _ = ready.send(());
            }
        });
        begun.recv().unwrap();
    });
    let prefix = String::from_utf8(
        ObjectName::unique(b"/nmc-race")
            .unwrap()
            .as_bytes()
            .to_vec(),
    );
    let prefix = prefix.unwrap();
    let marked = prefix.clone();
    let first = master.def_process(move |()| {
        for _ in 0..50 {
            creator.start(&marked).unwrap().join().unwrap();
        }
    });
    master.run(&first, &()).unwrap();
    let name = prefix.trim_start_matches('/');
    let left: Vec<_> = std::fs::read_dir("/dev/shm")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap_or_default())
        .filter(|file| file.starts_with(name))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn guard_of_an_earlier_master_opens_nothing() {
    let (earlier, later) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let master = Master::builder(earlier.path());
    let guard = manage_file(earlier.path().join("x")).unwrap();
    drop(master);
    let untouched = later.path().join("not made before the run");
    let _master = Master::builder(&untouched);
    drop(guard);
    assert!(!untouched.exists());
}

forktests!(
    first_process_that_is_over_before_the_loop_ends_the_run,
    first_process_that_never_was_is_an_error,
    hook_that_ignores_child_deaths_does_no_harm,
    stopped_holder_of_the_records_lock_stops_nobody_else,
    thread_that_creates_while_its_process_ends_leaves_nothing,
    guard_of_an_earlier_master_opens_nothing,
);

//! What a worker finds: fork surprises people, and ours must not. Guards against output that comes twice or never,
//! signals and limits of the master that leak into workers, descriptors that leak into workers and their
//! children, generators that repeat, and hooks that are lost.
//!
//! # Safety
//! Declares functions of the C library that only tests need. `putchar`, `fork`, `_exit` and `atexit` touch no memory of
//! ours; the forked child only makes system calls and ends by `_exit`. Handlers only add to atomics or
//! write a line to a file at the end of the program.
#![allow(unsafe_code)]
#![allow(
    clippy::print_stdout,
    reason = "what becomes of printed output is tested"
)]

mod program;

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use netmcore_proc::{
    Error, JoinError, Master, command, on_worker_start, shutdown_requested, spawn, worker_seed,
};
use netmcore_sys::process::{self, Limit, Pid, Resource, exit_now};
use netmcore_sys::signal::{self, SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use program::{descriptors_of, holds_within, is_alive, start, start_into};
use serde::Serialize;
use serde::de::DeserializeOwned;

tests_and_programs! {
    tests:
        output_of_the_master_appears_once,
        output_of_a_worker_appears_before_its_join_returns,
        exit_functions_run_in_the_master_only,
        mask_and_actions_are_those_of_the_program,
        interrupt_from_the_terminal_ends_the_run_and_the_program,
        interrupt_of_a_program_with_a_handler_ends_only_the_run,
        termination_of_the_master_ends_the_run_and_the_program,
        ignored_interrupt_ends_nothing,
        second_signal_kills_at_once,
        hangup_is_left_to_the_program,
        seeds_differ_between_workers_and_not_within_one,
        start_hook_reseeds_every_worker,
        panic_hook_of_the_program_is_called,
        panic_hook_set_in_a_worker_hides_no_message,
        worker_has_no_descriptor_of_the_master,
        forked_grandchild_holds_no_descriptor_of_ours,
        forked_grandchild_cannot_act_for_its_parent,
        spawned_grandchild_holds_no_descriptor_of_ours,
        descriptor_limit_is_that_of_the_program,
        worker_dies_with_the_master,
        commands_die_with_the_worker_and_other_children_do_not,
        control_block_is_left_out_of_core_dumps,
        threads_that_outlive_the_function_do_not_matter,
        environment_and_directory_are_the_masters,
        worker_is_a_copy_of_the_master_after_its_hook;
    programs:
        prints_before_forking,
        prints_in_workers,
        has_exit_functions,
        runs_until_asked,
        handles_interrupts,
        ignores_interrupts,
        does_not_end_by_itself,
        handles_hangups,
        panics_here_and_there,
        waits_for_ever,
}

unsafe extern "C" {
    safe fn putchar(character: c_int) -> c_int;
    safe fn fork() -> c_int;
    safe fn atexit(function: extern "C" fn()) -> c_int;
}

/// Prints through C's buffered stream.
fn c_print(text: &str) {
    for byte in text.bytes() {
        assert_eq!(putchar(c_int::from(byte)), c_int::from(byte));
    }
}

/// Runs `f` in the first worker of a run of its own.
fn in_worker<A, R>(arg: A, f: impl Fn(A) -> R + 'static) -> R
where
    A: Serialize + DeserializeOwned + 'static,
    R: Serialize + DeserializeOwned + 'static,
{
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let process = master.def_process(f);
    master.run(&process, &arg).unwrap()
}

fn append(path: &Path, line: &str) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn lines_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

// ---- output ---------------------------------------------------------------------------------

fn output_of_the_master_appears_once() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("output");
    for ready in ["0", "3"] {
        start_into("prints_before_forking", &[ready], &output).succeeds();
        let text = fs::read_to_string(&output).unwrap();
        assert_eq!(text.matches("rust-in-master").count(), 1, "{text}");
        assert_eq!(text.matches("c-in-master").count(), 1, "{text}");
        assert_eq!(text.matches("worker").count(), 4, "{text}");
        fs::remove_file(&output).unwrap();
    }
}

fn prints_before_forking(arguments: &[String]) {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path()).ready_workers(arguments[0].parse().unwrap());
    let leaf = master.def_process(|_: ()| print!("worker "));
    let first = master.def_process(move |_: ()| {
        print!("worker ");
        for _ in 0..3 {
            leaf.start(&()).unwrap().join().unwrap();
        }
    });
    print!("rust-in-master ");
    c_print("c-in-master ");
    master.run(&first, &()).unwrap();
}

fn output_of_a_worker_appears_before_its_join_returns() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("output");
    start_into("prints_in_workers", &[&output], &output).succeeds();
    let text = fs::read_to_string(&output).unwrap();
    assert_eq!(text.matches("rust-0").count(), 1, "{text}");
}

fn prints_in_workers(arguments: &[String]) {
    let output = PathBuf::from(&arguments[0]);
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(|k: u32| {
        print!("rust-{k} ");
        c_print(&format!("c-{k} "));
        assert!(k.is_multiple_of(2), "odd");
    });
    let first = master.def_process(move |_: ()| {
        for k in 0..4 {
            let joined = leaf.start(&k).unwrap().join();
            // One that panicked has printed as well.
            assert_eq!(joined.is_ok(), k.is_multiple_of(2), "{joined:?}");
            let text = fs::read_to_string(&output).unwrap();
            for expected in [format!("rust-{k} "), format!("c-{k} ")] {
                assert_eq!(text.matches(&expected).count(), 1, "{expected} in {text}");
            }
        }
    });
    master.run(&first, &()).unwrap();
}

static EXIT_NOTES: OnceLock<PathBuf> = OnceLock::new();

extern "C" fn note_exit() {
    append(
        EXIT_NOTES.get().unwrap(),
        &format!("exit of {}", Pid::this()),
    );
}

fn exit_functions_run_in_the_master_only() {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    let mut program = start("has_exit_functions", &[&notes]);
    let pid = program.pid();
    program.succeeds();
    assert_eq!(lines_of(&notes), [format!("exit of {pid}")]);
}

fn has_exit_functions(arguments: &[String]) {
    EXIT_NOTES.set(PathBuf::from(&arguments[0])).unwrap();
    assert_eq!(atexit(note_exit), 0);
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(|fails: bool| assert!(!fails, "as told"));
    let first = master.def_process(move |_: ()| {
        leaf.start(&false).unwrap().join().unwrap();
        leaf.start(&true).unwrap().join().unwrap_err();
    });
    master.run(&first, &()).unwrap();
}

// ---- signals --------------------------------------------------------------------------------

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: c_int) {
    HANDLED.fetch_add(1, SeqCst);
}

fn handle(signal: i32) {
    // SAFETY: the handler adds to an atomic, and leaves errno alone.
    unsafe { signal::set_handler(signal, count) }.unwrap();
}

fn mask_and_actions_are_those_of_the_program() {
    let mask = signal::mask().unwrap().with(SIGUSR1);
    signal::set_mask(&mask).unwrap();
    handle(SIGUSR2);
    signal::set_ignore(SIGHUP).unwrap();
    signal::set_ignore(SIGCHLD).unwrap();
    for ready in [0, 2] {
        let dir = tempfile::tempdir().unwrap();
        let mut master = Master::builder(dir.path()).ready_workers(ready);
        let leaf = master.def_process(move |_: ()| {
            assert_eq!(signal::mask().unwrap(), mask);
            let handled = HANDLED.load(SeqCst);
            signal::raise(SIGUSR2).unwrap();
            assert_eq!(HANDLED.load(SeqCst), handled + 1);
            assert!(signal::action(SIGHUP).unwrap().is_ignored());
            assert!(signal::action(SIGCHLD).unwrap().is_ignored());
            assert!(signal::action(SIGTERM).unwrap().is_default());
            // An interrupt comes to all processes of a terminal, and does nothing here.
            let interrupt = signal::action(SIGINT).unwrap();
            assert!(!interrupt.is_default() && !interrupt.is_ignored());
            signal::raise(SIGINT).unwrap();
        });
        let first = master.def_process(move |_: ()| leaf.start(&()).unwrap().join().unwrap());
        master.run(&first, &()).unwrap();
        // And in the program after the run, which has seen none of the workers' signals.
        assert_eq!(HANDLED.load(SeqCst), 0);
        assert!(signal::action(SIGCHLD).unwrap().is_ignored());
        assert!(signal::action(SIGINT).unwrap().is_default());
    }
    assert_eq!(signal::mask().unwrap(), mask);
}

/// A worker that ends when the master asks for it, and notes that it has.
fn run_until_asked(dir: &Path, notes: PathBuf) -> Result<u32, Error> {
    let mut master = Master::builder(dir).grace(Duration::from_secs(30));
    let leaf = master.def_process(move |k: u32| {
        println!("started {k}");
        while !shutdown_requested() {
            // sleep: paces the polling of the master's wish, which may come at any time.
            std::thread::sleep(Duration::from_millis(1));
        }
        append(&notes, &format!("{k} ended in order"));
        k
    });
    let first = master.def_process(move |_: ()| {
        let running = [1, 2, 3].map(|k| leaf.start(&k).unwrap());
        running
            .map(|process| process.join().unwrap_or(0))
            .into_iter()
            .sum::<u32>()
    });
    master.run(&first, &())
}

/// What a run leaves in its directory: the record, empty, and the lock file.
fn assert_only_the_record_is_left(dir: &Path) {
    let names: BTreeSet<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = ["netplex.lock", "netplex.pmanage"].map(str::to_owned);
    assert_eq!(names, BTreeSet::from(expected));
    assert_eq!(fs::metadata(dir.join("netplex.pmanage")).unwrap().len(), 0);
}

fn until_all_have_started(program: &mut program::Program) {
    for _ in 0..3 {
        program.line_after("started ");
    }
}

fn assert_all_ended_in_order(notes: &Path) {
    let mut noted = lines_of(notes);
    noted.sort();
    assert_eq!(noted, [1, 2, 3].map(|k| format!("{k} ended in order")));
}

fn runs_until_asked(arguments: &[String]) {
    run_until_asked(Path::new(&arguments[0]), PathBuf::from(&arguments[1])).unwrap();
}

fn interrupt_from_the_terminal_ends_the_run_and_the_program() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let notes = notes.path().join("notes");
    let mut program = start("runs_until_asked", &[dir.path(), &notes]);
    until_all_have_started(&mut program);
    program.signal_group(SIGINT);
    program.dies_of(SIGINT);
    assert_all_ended_in_order(&notes);
    assert_only_the_record_is_left(dir.path());
}

fn termination_of_the_master_ends_the_run_and_the_program() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let notes = notes.path().join("notes");
    let mut program = start("runs_until_asked", &[dir.path(), &notes]);
    until_all_have_started(&mut program);
    program.signal(SIGTERM);
    program.dies_of(SIGTERM);
    assert_all_ended_in_order(&notes);
    assert_only_the_record_is_left(dir.path());
}

fn handles_interrupts(arguments: &[String]) {
    handle(SIGINT);
    handle(SIGTERM);
    let outcome = run_until_asked(Path::new(&arguments[0]), PathBuf::from(&arguments[1]));
    let Err(Error::Signalled { signal }) = outcome else {
        panic!("{outcome:?}");
    };
    println!("ended by {signal}, handled {}", HANDLED.load(SeqCst));
}

fn interrupt_of_a_program_with_a_handler_ends_only_the_run() {
    for sent in [SIGINT, SIGTERM] {
        let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let notes = notes.path().join("notes");
        let mut program = start("handles_interrupts", &[dir.path(), &notes]);
        until_all_have_started(&mut program);
        program.signal_group(sent);
        // Once, when the run is over.
        assert_eq!(
            program.line_after("ended by "),
            format!("{sent}, handled 1")
        );
        program.succeeds();
        assert_all_ended_in_order(&notes);
        assert_only_the_record_is_left(dir.path());
    }
}

fn ignores_interrupts(arguments: &[String]) {
    signal::set_ignore(SIGINT).unwrap();
    let mut master = Master::builder(&arguments[0]);
    let go_on = PathBuf::from(&arguments[1]);
    let first = master.def_process(move |_: ()| {
        println!("started");
        holds_within(Duration::from_secs(60), || go_on.exists())
    });
    assert!(master.run(&first, &()).unwrap());
    println!("went on");
}

fn ignored_interrupt_ends_nothing() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let go_on = notes.path().join("go on");
    let mut program = start("ignores_interrupts", &[dir.path(), &go_on]);
    program.line_after("started");
    program.signal_group(SIGINT);
    File::create(&go_on).unwrap();
    program.line_after("went on");
    program.succeeds();
}

fn does_not_end_by_itself(arguments: &[String]) {
    let mut master = Master::builder(&arguments[0]).grace(Duration::from_secs(600));
    let first = master.def_process(move |_: ()| {
        println!("started");
        while !shutdown_requested() {
            std::hint::spin_loop();
        }
        println!("asked");
        sleep_long();
    });
    master.run(&first, &()).unwrap();
}

fn second_signal_kills_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = start("does_not_end_by_itself", &[dir.path()]);
    program.line_after("started");
    program.signal_group(SIGINT);
    program.line_after("asked");
    let again = Instant::now();
    program.signal_group(SIGINT);
    program.dies_of(SIGINT);
    assert!(
        again.elapsed() < Duration::from_secs(20),
        "{:?}",
        again.elapsed()
    );
    assert_only_the_record_is_left(dir.path());
}

fn handles_hangups(arguments: &[String]) {
    handle(SIGHUP);
    let mut master = Master::builder(&arguments[0]);
    let go_on = PathBuf::from(&arguments[1]);
    let first = master.def_process(move |_: ()| {
        println!("started");
        holds_within(Duration::from_secs(60), || go_on.exists())
    });
    assert!(master.run(&first, &()).unwrap());
    println!("handled {}", HANDLED.load(SeqCst));
}

fn hangup_is_left_to_the_program() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let go_on = notes.path().join("go on");
    let mut program = start("handles_hangups", &[dir.path(), &go_on]);
    program.line_after("started");
    program.signal(SIGHUP);
    File::create(&go_on).unwrap();
    assert_eq!(program.line_after("handled "), "1");
    program.succeeds();

    let mut program = start("waits_for_ever", &[dir.path()]);
    let worker = program.line_after("worker ").parse().unwrap();
    let worker = Pid::new(worker).unwrap();
    program.signal(SIGHUP);
    program.dies_of(SIGHUP);
    assert!(holds_within(Duration::from_secs(5), || !is_alive(worker)));
}

// ---- seeds ----------------------------------------------------------------------------------

fn seeds_differ_between_workers_and_not_within_one() {
    const COUNT: usize = 40;
    let refused = worker_seed();
    assert!(
        matches!(refused, Err(Error::NotRunning { .. })),
        "{refused:?}"
    );
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(|_: ()| [worker_seed().unwrap(), worker_seed().unwrap()]);
    let first = master.def_process(move |_: ()| {
        let running: Vec<_> = (0..COUNT).map(|_| leaf.start(&()).unwrap()).collect();
        let seeds = running.iter().map(|process| process.join().unwrap());
        let mut seen: BTreeSet<[u8; 32]> = seeds
            .map(|[once, again]| {
                assert_eq!(once, again);
                once
            })
            .collect();
        seen.insert(worker_seed().unwrap());
        seen.len()
    });
    assert_eq!(master.run(&first, &()).unwrap(), COUNT + 1);
}

static GENERATOR: AtomicU64 = AtomicU64::new(1);

fn reseed() {
    let seed = worker_seed().unwrap();
    let word = u64::from_le_bytes(seed[..8].try_into().unwrap());
    GENERATOR.store(word, SeqCst);
}

fn start_hook_reseeds_every_worker() {
    const COUNT: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path()).init(|_| {
        // In the hook, that is, when the run has begun.
        on_worker_start(reseed)
    });
    let leaf = master.def_process(|_: ()| GENERATOR.load(SeqCst));
    let first = master.def_process(move |_: ()| {
        let refused = on_worker_start(reseed);
        assert!(
            matches!(refused, Err(Error::NotInWorker { .. })),
            "{refused:?}"
        );
        let running: Vec<_> = (0..COUNT).map(|_| leaf.start(&()).unwrap()).collect();
        let drawn: BTreeSet<u64> = running.iter().map(|one| one.join().unwrap()).collect();
        assert!(!drawn.contains(&1), "a worker has the master's generator");
        drawn.len()
    });
    assert_eq!(master.run(&first, &()).unwrap(), COUNT);
    assert_eq!(GENERATOR.load(SeqCst), 1, "the hook ran in the master");
}

// ---- panics ---------------------------------------------------------------------------------

fn panics_here_and_there(arguments: &[String]) {
    let notes = PathBuf::from(&arguments[1]);
    std::panic::set_hook(Box::new(move |info| {
        append(
            &notes,
            &format!(
                "{} {}",
                Pid::this(),
                info.payload().downcast_ref::<&str>().unwrap_or(&"?")
            ),
        );
    }));
    let mut master = Master::builder(&arguments[0]);
    let leaf = master.def_process(|fails: bool| {
        println!("worker {}", Pid::this());
        assert!(!fails, "in the worker");
    });
    let first = master.def_process(move |_: ()| match leaf.start(&true).unwrap().join() {
        Err(JoinError::Panicked {
            message, location, ..
        }) => {
            assert_eq!(message, "in the worker");
            assert!(location.unwrap().contains("worker_finds.rs:"));
        }
        other => panic!("{other:?}"),
    });
    master.run(&first, &()).unwrap();
    std::panic::catch_unwind(|| panic!("in the master")).unwrap_err();
}

fn panic_hook_of_the_program_is_called() {
    let (dir, notes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let notes = notes.path().join("notes");
    let mut program = start("panics_here_and_there", &[dir.path(), &notes]);
    let worker = program.line_after("worker ");
    program.succeeds();
    let master = program.pid();
    let expected = [
        format!("{worker} in the worker"),
        format!("{master} in the master"),
    ];
    assert_eq!(lines_of(&notes), expected);
}

fn panic_hook_set_in_a_worker_hides_no_message() {
    in_worker((), |()| {
        for (how, expected) in [(0, "in so many words"), (1, "in 1 word")] {
            let leaf = spawn(
                |how: u32| {
                    std::panic::set_hook(Box::new(|_| {}));
                    assert!(how != 0, "in so many words");
                    assert!(how != 1, "in {how} word");
                },
                &how,
            );
            match leaf.unwrap().join() {
                Err(JoinError::Panicked { message, .. }) => assert_eq!(message, expected),
                other => panic!("{other:?}"),
            }
        }
    });
}

// ---- descriptors and limits -----------------------------------------------------------------

/// Descriptors by what they lead to, those of the worker that no program should have opened.
fn names(descriptors: &[(i32, String)]) -> Vec<String> {
    let mut names: Vec<String> = descriptors.iter().map(|(_, name)| name.clone()).collect();
    names.sort();
    names
}

fn worker_has_no_descriptor_of_the_master() {
    let dir = tempfile::tempdir().unwrap();
    let own = File::create(dir.path().join("opened by the program")).unwrap();
    let lock = dir.path().join("d/netplex.lock");
    for ready in [0, 4] {
        let before = descriptors_of(Pid::this());
        let mut expected = names(&before);
        expected.push(lock.to_str().unwrap().to_owned());
        expected.push("anon_inode:[eventfd]".to_owned());
        expected.sort();
        let mut master = Master::builder(dir.path().join("d")).ready_workers(ready);
        let leaf = master.def_process(|depth: u32| {
            let found = descriptors_of(Pid::this());
            match depth {
                0 => found,
                // While siblings and connections are there.
                _ => spawn(look_deeper, &depth).unwrap().join().unwrap(),
            }
        });
        let first = master.def_process(move |_: ()| {
            let file = netmcore_proc::create_file("/tmp/netmcore-test-").unwrap();
            let running: Vec<_> = (0..6).map(|k| leaf.start(&k).unwrap()).collect();
            let found: Vec<_> = running.iter().map(|one| one.join().unwrap()).collect();
            drop(file);
            found
        });
        for found in master.run(&first, &()).unwrap() {
            assert_eq!(names(&found), expected, "{found:?}");
            for descriptor in &before {
                assert!(found.contains(descriptor), "{descriptor:?} has moved");
            }
        }
        assert_eq!(descriptors_of(Pid::this()), before);
    }
    drop(own);
}

fn look_deeper(depth: u32) -> Vec<(i32, String)> {
    match depth {
        0 => descriptors_of(Pid::this()),
        _ => spawn(look_deeper, &(depth - 1)).unwrap().join().unwrap(),
    }
}

/// Forks as a library would that knows nothing of us; `child` may only make system calls.
fn fork_foreign(child: impl FnOnce()) -> Pid {
    match fork() {
        0 => {
            child();
            exit_now(0)
        }
        pid => Pid::new(pid).unwrap(),
    }
}

fn sleep_long() {
    // sleep: the process is to be there until it is killed.
    std::thread::sleep(Duration::from_secs(600));
}

fn forked_grandchild_holds_no_descriptor_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let before = names(&descriptors_of(Pid::this()));
    let mut master = Master::builder(dir.path());
    let first = master.def_process(|_: ()| {
        let file = netmcore_proc::create_file("/tmp/netmcore-test-").unwrap();
        let id = file.keep();
        let grandchild = fork_foreign(sleep_long);
        // The connection to the master is still this worker's.
        netmcore_proc::release(id).unwrap();
        grandchild.get()
    });
    let grandchild = Pid::new(master.run(&first, &()).unwrap()).unwrap();
    assert!(is_alive(grandchild));
    let ours = || {
        let mut found = names(&descriptors_of(grandchild));
        found.retain(|name| !before.contains(name));
        found
    };
    // It closes them on its way out of the fork, which may be later than its parent's.
    let are_closed = holds_within(Duration::from_secs(20), || ours().is_empty());
    let ours = ours();
    let again = Master::builder(dir.path()).run_nothing();
    process::kill(grandchild, 9).unwrap();
    again.unwrap();
    assert!(are_closed, "{ours:?}");
}

/// Forks as a library would, and waits for the child's verdict.
fn fork_foreign_and_wait(child: impl FnOnce()) {
    let pid = fork_foreign(|| {
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        exit_now(i32::from(ran.is_err()));
    });
    let status = process::PidFd::open(pid).unwrap().wait().unwrap();
    assert!(status.is_success(), "the child ended with {status:?}");
}

/// What neither a child of a worker nor one of the master may do.
fn assert_powerless(resource: netmcore_proc::Resource, running: &netmcore_proc::Running<u32>) {
    fn is_not_running<T: std::fmt::Debug>(outcome: Result<T, Error>) {
        assert!(
            matches!(outcome, Err(Error::NotRunning { .. })),
            "{outcome:?}"
        );
    }
    // Numbers of descriptors that are closed here belong to others soon: nothing may be written to them.
    let mut others: Vec<File> = (0..40).map(|_| tempfile::tempfile().unwrap()).collect();
    is_not_running(netmcore_proc::self_process_id());
    is_not_running(worker_seed());
    is_not_running(netmcore_proc::create_file("/tmp/netmcore-test-"));
    is_not_running(netmcore_proc::get_file(resource.id()));
    is_not_running(spawn(|k: u32| k, &1));
    is_not_running(running.kill());
    is_not_running(resource.release());
    let joined = running.join_nowait();
    assert!(
        matches!(joined, Err(JoinError::NoSuchProcess { .. })),
        "{joined:?}"
    );
    let joined = running.join();
    assert!(
        matches!(joined, Err(JoinError::NoSuchProcess { .. })),
        "{joined:?}"
    );
    running.detach().unwrap_err();
    let panicked = std::panic::catch_unwind(|| panic!("in a child that is no worker"));
    panicked.unwrap_err();
    for other in &mut others {
        assert_eq!(other.metadata().unwrap().len(), 0);
    }
}

fn forked_grandchild_cannot_act_for_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(|k: u32| k + 1);
    let mut master = master.init(move |_| {
        let file = netmcore_proc::create_file("/tmp/netmcore-test-")?;
        let path = file.path().unwrap().to_owned();
        let running = leaf.start(&1)?;
        let again = netmcore_proc::get_file(file.id())?;
        fork_foreign_and_wait(move || assert_powerless(again, &running));
        assert!(path.exists(), "the master's file is gone");
        running.detach().unwrap();
        Ok(())
    });
    let first = master.def_process(move |_: ()| {
        let file = netmcore_proc::create_file("/tmp/netmcore-test-").unwrap();
        let running = leaf.start(&6).unwrap();
        let again = netmcore_proc::get_file(file.id()).unwrap();
        fork_foreign_and_wait(move || assert_powerless(again, &running));
        assert!(file.path().unwrap().exists(), "the worker's file is gone");
        // The use of the second guard has been given up once: here, with the closure.
        file.release().unwrap();
        running.join().unwrap()
    });
    assert_eq!(master.run(&first, &()).unwrap(), 7);

    // A child that drops its copy of a master takes nothing from the original.
    let mut master = Master::builder(dir.path());
    let first = master.def_process(|_: ()| 3);
    let file = netmcore_proc::create_file("/tmp/netmcore-test-").unwrap();
    let mut copies = Some((master, file));
    fork_foreign_and_wait(|| drop(copies.take()));
    let (master, file) = copies.take().unwrap();
    assert!(file.path().unwrap().exists());
    assert_eq!(master.run(&first, &()).unwrap(), 3);
}

fn spawned_grandchild_holds_no_descriptor_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let before = names(&descriptors_of(Pid::this()));
    let mut master = Master::builder(dir.path());
    let first = master.def_process(|_: ()| {
        let file = netmcore_proc::create_file("/tmp/netmcore-test-").unwrap();
        let child = long_command(Command::new("sleep"));
        drop(file);
        child
    });
    let child = Pid::new(master.run(&first, &()).unwrap()).unwrap();
    assert!(is_alive(child));
    // Its dynamic linker may still have open what it needs: that goes, ours would stay.
    let ours = || -> Vec<_> {
        let found = names(&descriptors_of(child)).into_iter();
        let is_other = |name: &String| !before.contains(name) && name != "/dev/null";
        found.filter(is_other).collect()
    };
    let start = Instant::now();
    while !ours().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", ours());
        std::thread::yield_now();
    }
    let again = Master::builder(dir.path()).run_nothing();
    process::kill(child, 9).unwrap();
    again.unwrap();
}

trait RunNothing {
    /// Runs a process that does nothing.
    fn run_nothing(self) -> Result<(), Error>;
}

impl RunNothing for Master {
    fn run_nothing(mut self) -> Result<(), Error> {
        let nothing = self.def_process(|_: ()| ());
        self.run(&nothing, &())
    }
}

fn descriptor_limit_is_that_of_the_program() {
    let hard = process::get_limit(Resource::DescriptorCount).unwrap().hard;
    let own = Limit {
        soft: Some(200),
        hard,
    };
    process::set_limit(Resource::DescriptorCount, own).unwrap();
    let limit = || {
        let limit = process::get_limit(Resource::DescriptorCount).unwrap();
        (limit.soft, limit.hard)
    };
    static IN_MASTER: Mutex<Option<Option<u64>>> = Mutex::new(None);
    for ready in [0, 2] {
        let dir = tempfile::tempdir().unwrap();
        let mut master = Master::builder(dir.path())
            .ready_workers(ready)
            .init(move |_| {
                *IN_MASTER.lock().unwrap() = Some(limit().0);
                Ok(())
            });
        let leaf = master.def_process(move |_: ()| limit());
        let first = master.def_process(move |_: ()| leaf.start(&()).unwrap().join().unwrap());
        assert_eq!(master.run(&first, &()).unwrap(), (Some(200), hard));
        assert_eq!(limit(), (Some(200), hard));
        assert_eq!(IN_MASTER.lock().unwrap().take(), Some(hard));
    }
}

// ---- lives and deaths -----------------------------------------------------------------------

fn waits_for_ever(arguments: &[String]) {
    let mut master = Master::builder(&arguments[0]);
    let first = master.def_process(|_: ()| {
        println!("worker {}", Pid::this());
        sleep_long();
    });
    master.run(&first, &()).unwrap();
}

fn worker_dies_with_the_master() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = start("waits_for_ever", &[dir.path()]);
    let worker = Pid::new(program.line_after("worker ").parse().unwrap()).unwrap();
    assert!(is_alive(worker));
    program.signal(signal::SIGKILL);
    program.dies_of(signal::SIGKILL);
    assert!(holds_within(Duration::from_secs(1), || !is_alive(worker)));
    // The parked workers have closed the output, too: they are gone.
    while program.line().is_some() {}
}

fn long_command(mut command: Command) -> i32 {
    let command = command.arg("600").stdin(Stdio::null());
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    child.unwrap().id() as i32
}

fn commands_die_with_the_worker_and_other_children_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    in_worker(notes, |notes| {
        for is_killed in [false, true] {
            let leaf = spawn(
                |(is_killed, notes): (bool, PathBuf)| {
                    let dies = long_command(command("sleep"));
                    let lives = long_command(Command::new("sleep"));
                    fs::write(&notes, format!("{dies} {lives}")).unwrap();
                    if is_killed {
                        signal::raise(signal::SIGKILL).unwrap();
                    }
                },
                &(is_killed, notes.clone()),
            );
            assert_eq!(leaf.unwrap().join().is_err(), is_killed);
            let noted = fs::read_to_string(&notes).unwrap();
            let pids = noted.split(' ').map(|pid| pid.parse().unwrap());
            let [dies, lives] = pids.map(|pid| Pid::new(pid).unwrap()).collect::<Vec<_>>()[..]
            else {
                panic!("{noted}");
            };
            let is_gone = holds_within(Duration::from_secs(5), || !is_alive(dies));
            let stays = is_alive(lives);
            process::kill(lives, 9).unwrap();
            assert!(is_gone && stays, "gone: {is_gone}, stays: {stays}");
        }
    });
}

fn control_block_is_left_out_of_core_dumps() {
    in_worker((), |()| {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_control = false;
        let mut flags = Vec::new();
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap();
            if !first.ends_with(':') {
                is_control = line.contains("netmcore-control");
            } else if is_control && first == "VmFlags:" {
                flags.push(line.to_owned());
            }
        }
        assert!(!flags.is_empty(), "{maps}");
        for line in flags {
            assert!(line.split(' ').any(|flag| flag == "dd"), "{line}");
        }
    });
}

fn threads_that_outlive_the_function_do_not_matter() {
    in_worker((), |()| {
        let began = Instant::now();
        let leaf = spawn(
            |k: u32| {
                std::thread::spawn(sleep_long);
                std::thread::spawn(|| {
                    loop {
                        std::hint::black_box(vec![0_u8; 4096]);
                    }
                });
                k
            },
            &7,
        );
        assert_eq!(leaf.unwrap().join().unwrap(), 7);
        assert!(began.elapsed() < Duration::from_secs(20));
    });
}

fn environment_and_directory_are_the_masters() {
    let (dir, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let here_path = here.path().canonicalize().unwrap();
    std::env::set_current_dir(&here_path).unwrap();
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var("NETMCORE_TEST_PLACE", "master") };
    let surroundings = |_: ()| {
        let place = std::env::var("NETMCORE_TEST_PLACE").unwrap_or_default();
        (std::env::current_dir().unwrap(), place)
    };
    let mut master = Master::builder(dir.path());
    let leaf = master.def_process(surroundings);
    let first = master.def_process(move |_: ()| {
        std::env::set_current_dir("/").unwrap();
        // SAFETY: this process has one thread.
        unsafe { std::env::set_var("NETMCORE_TEST_PLACE", "asker") };
        leaf.start(&()).unwrap().join().unwrap()
    });
    let found = master.run(&first, &()).unwrap();
    assert_eq!(found, (here_path.clone(), "master".to_owned()));
    assert_eq!(std::env::current_dir().unwrap(), here_path);
}

fn worker_is_a_copy_of_the_master_after_its_hook() {
    static STATE: AtomicU32 = AtomicU32::new(1);
    static STARTS: AtomicU32 = AtomicU32::new(0);
    let dir = tempfile::tempdir().unwrap();
    let mut master = Master::builder(dir.path());
    let late = master.declare::<u32, u32>();
    let look = master.def_process(move |k: u32| {
        // A late definition, a late change, a late start hook: all are there.
        let from_late = late.start(&k).unwrap().join().unwrap();
        (from_late, STATE.load(SeqCst), STARTS.load(SeqCst))
    });
    master.define(late, |k: u32| {
        let seen = STATE.load(SeqCst);
        // What a worker changes is its own.
        STATE.store(100, SeqCst);
        k + seen
    });
    static DEFINED_LATE: OnceLock<netmcore_proc::Process<u32, u32>> = OnceLock::new();
    let mut master = master.init(move |controller| {
        let first = late.start(&1)?;
        STATE.store(2, SeqCst);
        on_worker_start(|| {
            STARTS.fetch_add(1, SeqCst);
        })?;
        DEFINED_LATE
            .set(controller.def_process(|k: u32| k * 3))
            .unwrap();
        first.detach()?;
        Ok(())
    });
    let first = master.def_process(move |_: ()| {
        let tripled = DEFINED_LATE
            .get()
            .unwrap()
            .start(&5)
            .unwrap()
            .join()
            .unwrap();
        (tripled, look.start(&40).unwrap().join().unwrap())
    });
    assert_eq!(master.run(&first, &()).unwrap(), (15, (42, 2, 1)));
    assert_eq!(STATE.load(SeqCst), 2);
    assert_eq!(STARTS.load(SeqCst), 0);
}

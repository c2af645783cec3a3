//! `cargo xtask test-leaks`: what do programs leave behind?
//!
//! **Steps**, for each program:
//!
//! 1. It gets a [`cage`]: mount, IPC and pid namespaces of its own with a fresh `/dev/shm` and a fresh `TMPDIR`, or,
//!    where the system permits no namespaces, a mark in its environment that its descendants inherit.
//! 2. In the cage the [`probe`] takes a [`snapshot`], runs the program with descriptors 0, 1 and 2 only, gives
//!    what it started one second to end, takes another snapshot and reports the difference.
//! 3. An example of the facade is then run again several times: its main process is killed with SIGKILL at a
//!    random moment, no process may be left a second later, and after a second start in the same socket
//!    directory nothing at all may be left.
//!
//! **Looked at**: `/dev/shm` (shared memory objects and named semaphores), System V IPC, files in `TMPDIR` (and in
//! `/tmp`, where a private one can be mounted), processes.
//!
//! **Not here**: descriptors that a program leaks within itself. They end with it; tests count their own.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use crate::random::{fresh_seed, hash, random};
use crate::workspace::{TestProgram, Workspace, rust_libraries};

mod cage;
mod probe;
mod snapshot;

pub use probe::{PROBE, run_probe};

use cage::Cage;
use probe::{Report, Scenario};

/// How long a test program may run.
const TEST_LIMIT: Duration = Duration::from_secs(900);
/// How long an example may run, each time.
const EXAMPLE_LIMIT: Duration = Duration::from_secs(120);

/// A program with what it needs to run.
struct Job {
    name: String,
    program: OsString,
    arguments: Vec<OsString>,
    /// Its working folder.
    folder: PathBuf,
    environment: Vec<(&'static str, OsString)>,
    time_limit: Duration,
    /// Takes `--socket-directory DIR`, and is to survive the death of its main process.
    kill_rounds: u32,
    takes_socket_directory: bool,
    /// Whether its output goes to ours instead of a file that is shown on failure.
    shows_output: bool,
}

struct Options {
    seed: u64,
    rounds: u32,
    mode: Option<String>,
    jobs: usize,
    only: Option<String>,
    kill_master: bool,
    program: Option<Vec<String>>,
}

/// The command.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let workspace = Workspace::read()?;
    let cage = Cage::find(options.mode.as_deref(), &workspace.target_directory)?;
    println!("test-leaks: {}; seed {}", cage.description(), options.seed);
    let jobs = match &options.program {
        Some(program) => vec![own_program(program, &options)?],
        None => tests_and_examples(&workspace, &options)?,
    };
    // In record mode a parallel program's objects would look like this one's.
    let parallel = if cage.is_private() { options.jobs } else { 1 };
    let bad = run_all(jobs, &cage, options.seed, parallel);
    let found = bad.failed + bad.leaked;
    // Once more, where a log that shows its end only has them.
    if bad.runs > 1 {
        for report in &bad.reports {
            println!("{report}");
        }
    }
    println!(
        "test-leaks: {} runs, {} leaked, {} failed",
        bad.runs, bad.leaked, bad.failed
    );
    if bad.runs == 0 {
        return Err("test-leaks: nothing was run".to_owned());
    }
    if found == 0 {
        Ok(())
    } else {
        Err(format!(
            "test-leaks: {found} of {} runs leaked or failed",
            bad.runs
        ))
    }
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Options, String> {
        let mut options = Options {
            seed: fresh_seed(),
            rounds: 3,
            mode: None,
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            only: None,
            kill_master: false,
            program: None,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                options.program = Some(arguments.by_ref().cloned().collect());
            } else if argument == "--kill-master" {
                options.kill_master = true;
            } else {
                let value = arguments.next();
                let value =
                    value.ok_or_else(|| format!("{argument} needs a value, or is unknown"))?;
                let number = || {
                    let parsed = value.parse::<u64>();
                    parsed.map_err(|error| format!("{argument} {value}: {error}"))
                };
                match argument.as_str() {
                    "--seed" => options.seed = number()?,
                    "--rounds" => options.rounds = number()? as u32,
                    "--jobs" => options.jobs = number()?.max(1) as usize,
                    "--mode" => options.mode = Some(value.clone()),
                    "--only" => options.only = Some(value.clone()),
                    unknown => return Err(format!("test-leaks does not know {unknown}")),
                }
            }
        }
        if options.kill_master && options.program.is_none() {
            return Err(
                "--kill-master goes with `-- PROGRAM ARGS…`; examples have it anyway".into(),
            );
        }
        Ok(options)
    }
}

fn own_program(program: &[String], options: &Options) -> Result<Job, String> {
    let (program, arguments) = program
        .split_first()
        .ok_or("`--` is followed by no program")?;
    Ok(Job {
        name: program.clone(),
        program: program.into(),
        arguments: arguments.iter().map(OsString::from).collect(),
        folder: std::env::current_dir().map_err(|error| format!("current folder: {error}"))?,
        environment: Vec::new(),
        time_limit: TEST_LIMIT,
        kill_rounds: if options.kill_master {
            options.rounds
        } else {
            0
        },
        takes_socket_directory: options.kill_master,
        shows_output: true,
    })
}

/// Every test and example of the workspace.
fn tests_and_examples(workspace: &Workspace, options: &Options) -> Result<Vec<Job>, String> {
    let programs = workspace.build_tests()?;
    let libraries = rust_libraries();
    let jobs = programs
        .into_iter()
        .map(|program| job_of(program, options, &libraries));
    Ok(match &options.only {
        Some(only) => jobs.filter(|job| job.name.contains(only)).collect(),
        None => jobs.collect(),
    })
}

fn job_of(program: TestProgram, options: &Options, libraries: &OsStr) -> Job {
    let example = program.kind == "example";
    let of_facade = example && program.package == "netmcore";
    Job {
        name: program.title(),
        environment: program.environment(libraries).into(),
        program: program.path.into(),
        arguments: Vec::new(),
        folder: program.folder,
        time_limit: if example { EXAMPLE_LIMIT } else { TEST_LIMIT },
        kill_rounds: if of_facade { options.rounds } else { 0 },
        takes_socket_directory: of_facade,
        shows_output: false,
    }
}

#[derive(Default)]
struct Totals {
    runs: u32,
    leaked: u32,
    failed: u32,
    /// What was said of those that leaked or failed.
    reports: Vec<String>,
}

fn run_all(jobs: Vec<Job>, cage: &Cage, seed: u64, parallel: usize) -> Totals {
    let queue = Mutex::new(VecDeque::from(jobs));
    let totals = Mutex::new(Totals::default());
    let next = || queue.lock().ok()?.pop_front();
    let tell = |name: &str, report: &Report| {
        if let Ok(mut totals) = totals.lock() {
            let text = report.display(name);
            println!("{text}");
            totals.runs += 1;
            if !report.is_clean() {
                totals.reports.push(text);
            }
            totals.leaked += u32::from(!report.leaks.is_empty());
            totals.failed += u32::from(report.failure.is_some());
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                while let Some(job) = next() {
                    run_job(&job, cage, seed, &tell);
                }
            });
        }
    });
    totals.into_inner().unwrap_or_default()
}

fn run_job(job: &Job, cage: &Cage, seed: u64, tell: &dyn Fn(&str, &Report)) {
    let whole = cage.run(job, Scenario::Once);
    tell(&job.name, &whole);
    if whole.failure.is_some() {
        return;
    }
    for round in 0..job.kill_rounds {
        // A fraction of the undisturbed run, so that the same seed kills at about the same step.
        let share = random(seed ^ hash(&job.name) ^ u64::from(round)) as f64 / u64::MAX as f64;
        let delay = whole.elapsed.mul_f64(share);
        let report = cage.run(job, Scenario::KillMaster { after: delay });
        let name = format!(
            "{}, killed after {:.1} ms",
            job.name,
            delay.as_secs_f64() * 1e3
        );
        tell(&name, &report);
    }
}

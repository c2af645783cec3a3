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
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::workspace::{Workspace, array, cargo, string};

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
        let clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut options = Options {
            seed: clock.map_or(1, |since| u64::from(since.subsec_nanos())),
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

/// Builds every test and example of the workspace and lists them.
fn tests_and_examples(workspace: &Workspace, options: &Options) -> Result<Vec<Job>, String> {
    let output = cargo(&workspace.root)
        .args(["test", "--workspace", "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("running cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("building the tests: {}", output.status));
    }
    let libraries = cage::rust_libraries();
    let mut jobs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        jobs.extend(job_of(&message, options, &libraries));
    }
    if let Some(only) = &options.only {
        jobs.retain(|job| job.name.contains(only));
    }
    Ok(jobs)
}

/// The job for a test or example that cargo says it built.
fn job_of(message: &Value, options: &Options, libraries: &OsStr) -> Option<Job> {
    let program = message["executable"].as_str()?;
    let target = &message["target"];
    let example = array(&target["kind"]).iter().any(|kind| kind == "example");
    let test = message["profile"]["test"] == true;
    if !example && !test {
        return None;
    }
    let manifest = string(&message["manifest_path"]);
    let folder = Path::new(&manifest).parent()?;
    let package = folder.file_name()?.to_str()?;
    let of_facade = example && package == "netmcore";
    Some(Job {
        name: format!(
            "{package} {} {}",
            string(&target["kind"][0]),
            string(&target["name"])
        ),
        program: program.into(),
        arguments: Vec::new(),
        folder: folder.to_owned(),
        environment: vec![
            ("CARGO_MANIFEST_DIR", folder.into()),
            ("CARGO_PKG_NAME", package.into()),
            ("LD_LIBRARY_PATH", libraries.to_owned()),
        ],
        time_limit: if example { EXAMPLE_LIMIT } else { TEST_LIMIT },
        kill_rounds: if of_facade { options.rounds } else { 0 },
        takes_socket_directory: of_facade,
        shows_output: false,
    })
}

#[derive(Default)]
struct Totals {
    runs: u32,
    leaked: u32,
    failed: u32,
}

fn run_all(jobs: Vec<Job>, cage: &Cage, seed: u64, parallel: usize) -> Totals {
    let queue = Mutex::new(VecDeque::from(jobs));
    let totals = Mutex::new(Totals::default());
    let next = || queue.lock().ok()?.pop_front();
    let tell = |name: &str, report: &Report| {
        if let Ok(mut totals) = totals.lock() {
            println!("{}", report.display(name));
            totals.runs += 1;
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

/// The first number that splitmix64 makes of `seed`.
fn random(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

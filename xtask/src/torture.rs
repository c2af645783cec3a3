//! `cargo xtask torture`: the random tests, again and again, with new seeds and more kills, until time is up.
//!
//! **Steps.** All tests are built; those whose sources read `NETMCORE_SEED` or `NETMCORE_KILLS` are chosen (`--every-test`: all but this
//! crate's). `--jobs` of them run at a time, in an order and with seeds that `--seed` decides. Meanwhile processes that they have started are
//! stopped at random for some milliseconds, since that is what a loaded machine makes of them; this alone is not repeated by the seed. A program
//! that fails or takes longer than [`LIMIT`] is reported with its output and the command that replays it; the others go on.
//!
//! **Not here**: what the tests do. Each kills, fills and damages what its own file says.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::random::{fresh_seed, hash, random};
use crate::workspace::{Package, TestProgram, Workspace, rust_libraries};

/// How long one program may run.
const LIMIT: Duration = Duration::from_secs(600);

/// What the tests read: a seed; how many kills, cases or rounds.
const SEED: &str = "NETMCORE_SEED";
const KILLS: &str = "NETMCORE_KILLS";
const CASES: &str = "NETMCORE_CASES";

struct Options {
    seconds: u64,
    seed: u64,
    jobs: usize,
    only: Option<String>,
    kills: Option<u64>,
    every_test: bool,
    stops: bool,
}

#[derive(Default)]
struct Totals {
    runs: u32,
    failed: Vec<String>,
    stops: u64,
}

/// The command.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let workspace = Workspace::read()?;
    let programs = programs(&workspace, &options)?;
    println!(
        "torture: {} programs for {} s, {} at a time; seed {}",
        programs.len(),
        options.seconds,
        options.jobs,
        options.seed
    );
    let outputs = workspace.target_directory.join("xtask").join("torture");
    std::fs::create_dir_all(&outputs)
        .map_err(|error| format!("creating {}: {error}", outputs.display()))?;
    let totals = repeat(&programs, &options, &outputs);
    println!(
        "torture: {} runs, {} failed, {} times a process was stopped; seed {}",
        totals.runs,
        totals.failed.len(),
        totals.stops,
        options.seed
    );
    if totals.failed.is_empty() {
        Ok(())
    } else {
        Err(format!("torture: {}", totals.failed.join("; ")))
    }
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Options, String> {
        let mut options = Options {
            seconds: 60,
            seed: fresh_seed(),
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            only: None,
            kills: None,
            every_test: false,
            stops: true,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--every-test" => options.every_test = true,
                "--no-stops" => options.stops = false,
                "--seconds" | "--seed" | "--jobs" | "--kills" | "--only" => {
                    let value = arguments.next();
                    let value = value.ok_or_else(|| format!("{argument} needs a value"))?;
                    let number = || {
                        let parsed = value.parse::<u64>();
                        parsed.map_err(|error| format!("{argument} {value}: {error}"))
                    };
                    match argument.as_str() {
                        "--seconds" => options.seconds = number()?,
                        "--seed" => options.seed = number()?,
                        "--jobs" => options.jobs = number()?.max(1) as usize,
                        "--kills" => options.kills = Some(number()?),
                        _ => options.only = Some(value.clone()),
                    }
                }
                unknown => return Err(format!("torture does not know {unknown}")),
            }
        }
        Ok(options)
    }
}

/// The tests to run, built.
fn programs(workspace: &Workspace, options: &Options) -> Result<Vec<TestProgram>, String> {
    let mut programs = workspace.build_tests()?;
    programs.retain(|program| {
        let wanted = if options.every_test {
            // This crate's own look for what anybody leaves on the machine.
            program.kind != "example" && program.package != "xtask"
        } else {
            let package = workspace
                .packages
                .iter()
                .find(|package| package.folder.file_name() == Some(OsStr::new(&program.package)));
            package.is_some_and(|package| is_random(package, program))
        };
        let named = |only: &String| program.title().contains(only);
        wanted && options.only.as_ref().is_none_or(named)
    });
    if programs.is_empty() {
        return Err("torture: no test is so called".to_owned());
    }
    Ok(programs)
}

/// Whether a test reads what makes it another one each time.
fn is_random(package: &Package, program: &TestProgram) -> bool {
    let root = package
        .targets
        .iter()
        .find(|target| target.kind == "test" && target.name == program.name)
        .map(|target| target.root_file.as_path());
    program.kind == "test"
        && package.sources.iter().any(|source| {
            Some(source.path.as_path()) == root
                && [SEED, KILLS].iter().any(|name| source.text.contains(name))
        })
}

fn repeat(programs: &[TestProgram], options: &Options, outputs: &Path) -> Totals {
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let libraries = rust_libraries();
    let totals = Mutex::new(Totals::default());
    let queue = Mutex::new((0, VecDeque::new()));
    // Each round runs all of them, in an order of its own.
    let next = || {
        let mut queue = queue.lock().ok()?;
        if queue.1.is_empty() {
            let round: u64 = queue.0;
            queue.0 += 1;
            let mut order: Vec<_> = programs
                .iter()
                .map(|program| {
                    let seed = random(options.seed ^ hash(&program.title()) ^ round);
                    (seed, program)
                })
                .collect();
            order.sort_by_key(|(seed, _)| *seed);
            queue.1.extend(order);
        }
        queue.1.pop_front()
    };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                while Instant::now() < end {
                    let Some((seed, program)) = next() else { break };
                    let mut run = Run::new(program, seed, options, outputs);
                    let outcome = run.perform(&libraries);
                    let Ok(mut totals) = totals.lock() else { break };
                    totals.runs += 1;
                    totals.stops += run.stops;
                    match outcome {
                        Ok(elapsed) => {
                            println!(
                                "ok     {} ({:.1} s)",
                                program.title(),
                                elapsed.as_secs_f64()
                            );
                        }
                        Err(failure) => {
                            println!("FAILED {}: {failure}", program.title());
                            totals
                                .failed
                                .push(format!("{}: {failure}", program.title()));
                        }
                    }
                }
            });
        }
    });
    totals.into_inner().unwrap_or_default()
}

/// One run of one program.
struct Run<'a> {
    program: &'a TestProgram,
    seed: u64,
    /// What the tests are told in their environment.
    told: Vec<(&'static str, String)>,
    are_stopped: bool,
    output: PathBuf,
    stops: u64,
}

impl<'a> Run<'a> {
    fn new(program: &'a TestProgram, seed: u64, options: &Options, outputs: &Path) -> Run<'a> {
        let mut told = vec![(SEED, seed.to_string())];
        if let Some(kills) = options.kills {
            told.push((KILLS, kills.to_string()));
            told.push((CASES, kills.to_string()));
        }
        let name = format!("{}-{seed:x}", program.title().replace(' ', "-"));
        Run {
            program,
            seed,
            told,
            are_stopped: options.stops,
            output: outputs.join(name),
            stops: 0,
        }
    }

    /// Runs it to its end; how long it took, or what went wrong.
    fn perform(&mut self, libraries: &OsString) -> Result<Duration, String> {
        let start = Instant::now();
        let mut child = self.start(libraries)?;
        let status = self.watch(&mut child, start);
        let status = status?;
        if status.success() {
            // Kept for failures only; what cannot be removed goes with `cargo clean`.
            let _ = std::fs::remove_file(&self.output);
            return Ok(start.elapsed());
        }
        Err(format!(
            "{status}, see {}; replay: {}",
            self.output.display(),
            self.replay()
        ))
    }

    fn start(&self, libraries: &OsString) -> Result<Child, String> {
        let file = File::create(&self.output).and_then(|file| Ok((file.try_clone()?, file)));
        let file = file.map_err(|error| format!("creating {}: {error}", self.output.display()))?;
        Command::new(&self.program.path)
            .current_dir(&self.program.folder)
            .envs(self.program.environment(libraries))
            .envs(self.told.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(file.0)
            .stderr(file.1)
            .spawn()
            .map_err(|error| format!("running {}: {error}", self.program.path.display()))
    }

    /// Waits for its end, and stops some of its processes now and then.
    fn watch(&mut self, child: &mut Child, start: Instant) -> Result<ExitStatus, String> {
        let mut step = self.seed;
        loop {
            let ended = child.try_wait();
            if let Some(status) = ended.map_err(|error| format!("waiting: {error}"))? {
                return Ok(status);
            }
            if start.elapsed() > LIMIT {
                // What it leaves running would disturb the next ones.
                for process in descendants(child.id()) {
                    signal(&process, "KILL");
                }
                signal(&child.id().to_string(), "KILL");
                // Reaped, so that its number stays its own until now; how it ended is known.
                let _ = child.wait();
                return Err(format!(
                    "it ran longer than {LIMIT:?}, see {}; replay: {}",
                    self.output.display(),
                    self.replay()
                ));
            }
            step = random(step);
            // sleep: paces the polling of a child and the stops; its end is seen at the next turn whenever it comes.
            std::thread::sleep(Duration::from_millis(5 + step % 60));
            if !self.are_stopped {
                continue;
            }
            let descendants = descendants(child.id());
            let chosen = step as usize / 64 % descendants.len().max(1);
            let Some(process) = descendants.get(chosen) else {
                continue;
            };
            // One that has ended meanwhile cannot be stopped, and its number is not given again so soon.
            signal(process, "STOP");
            // sleep: this is how long it is stopped.
            std::thread::sleep(Duration::from_millis(step / 4096 % 20));
            signal(process, "CONT");
            self.stops += 1;
        }
    }

    fn replay(&self) -> String {
        let mut words: Vec<String> = self.told.iter().map(|(n, v)| format!("{n}={v}")).collect();
        words.push(self.program.path.display().to_string());
        words.join(" ")
    }
}

/// The processes that this one has started, and those that they have started; without it.
fn descendants(ancestor: u32) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let parents: Vec<(String, String)> = names
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(|name| {
            let stat = std::fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
            // Behind the name, which may hold blanks: state, parent.
            let (_, fields) = stat.rsplit_once(')')?;
            Some((fields.split_whitespace().nth(1)?.to_owned(), name))
        })
        .collect();
    let mut found = vec![ancestor.to_string()];
    let mut next = 0;
    while let Some(one) = found.get(next).cloned() {
        let children = parents.iter().filter(|(parent, _)| *parent == one);
        found.extend(children.map(|(_, child)| child.clone()));
        next += 1;
    }
    found.split_off(1)
}

/// Sends a signal to a process; that it is gone is no error.
fn signal(process: &str, name: &str) {
    let mut command = Command::new("kill");
    command.args(["-s", name, process]);
    // It says so if there is no such process.
    let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
}

//! Runs each test of a test program in a fresh process that has one thread.
//!
//! For test targets with `harness = false` whose tests fork: libtest runs tests in threads, and a process
//! with threads cannot be forked safely. The program re-executes itself as `--run NAME` for each test, in a
//! process group of its own, with its output captured and a time limit. Arguments and output are those
//! of libtest as far as test runners use them.
//!
//! ```no_run
//! fn sums() {
//!     assert_eq!(1 + 1, 2);
//! }
//!
//! netmcore_forktest::forktests!(sums);
//! ```
//!
//! **If a process dies here.** A test that is killed has failed, and the rest of its process group is killed
//! with it. If the runner is killed, so is the test that it runs.
//!
//! # Safety
//!
//! `kill`, `waitid` and `prctl` are declared here rather than taken from a crate, so that this one depends on
//! nothing. They are called with values only (`waitid` with a null pointer, which Linux takes as "no details
//! wanted"), so no memory is at stake.

#![allow(unsafe_code)]

use std::env;
use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Command, ExitStatus, Stdio};
use std::ptr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a test may take, unless `FORKTEST_TIME_LIMIT_SECONDS` says otherwise.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(120);
/// How much of a failed test's output is shown: its end.
const SHOWN_OUTPUT_LEN_BYTES: u64 = 64 * 1024;
/// Exit code of a test that cannot run here.
const EXIT_SKIPPED: i32 = 77;
/// Exit code of a run with failures; libtest's.
const EXIT_FAILED: i32 = 101;
/// What a skipped test prints before its reason.
const SKIPPED: &str = "skipped: ";

/// One test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Its name, for filters and messages.
    pub name: &'static str,
    /// The test; it fails by panicking, by exiting with a code other than 0, or by dying of a signal.
    pub run: fn(),
}

/// Defines `main` so that it runs the named functions as tests.
#[macro_export]
macro_rules! forktests {
    ($($name:ident),* $(,)?) => {
        fn main() {
            $crate::run(&[$($crate::Test { name: stringify!($name), run: $name }),*])
        }
    };
}

/// Ends a test that cannot run here; it counts as ignored. Call it in the test's own process.
pub fn skip(reason: &str) -> ! {
    say(format_args!("\n{SKIPPED}{reason}\n"));
    process::exit(EXIT_SKIPPED)
}

/// The `main` of a `harness = false` test target.
///
/// Ends the process with code 101 if a test failed; returns if none did.
pub fn run(tests: &[Test]) {
    let arguments = Arguments::parse(env::args().skip(1));
    if let Some(name) = &arguments.run_here {
        let test = tests.iter().find(|test| test.name == name);
        let test = test.unwrap_or_else(|| panic!("there is no test {name}"));
        (test.run)();
        let _ = io::stdout().flush();
        process::exit(0);
    }
    let selected: Vec<Test> = tests
        .iter()
        .filter(|test| arguments.selects(test.name))
        .copied()
        .collect();
    if arguments.list {
        list(&selected, arguments.terse);
    } else if !run_all(&selected, tests.len(), &arguments) {
        process::exit(EXIT_FAILED);
    }
}

/// What the command line asks for; as libtest's.
#[derive(Default)]
struct Arguments {
    run_here: Option<String>,
    filters: Vec<String>,
    skipped: Vec<String>,
    exact: bool,
    list: bool,
    terse: bool,
    capture_off: bool,
    only_ignored: bool,
}

impl Arguments {
    fn parse(arguments: impl Iterator<Item = String>) -> Arguments {
        let mut parsed = Arguments::default();
        let mut arguments = arguments.peekable();
        while let Some(argument) = arguments.next() {
            let (option, inline_value) = match argument.split_once('=') {
                Some((option, value)) if option.starts_with('-') => {
                    (option.to_owned(), Some(value.to_owned()))
                }
                _ => (argument, None),
            };
            let mut value = || inline_value.clone().or_else(|| arguments.next());
            match option.as_str() {
                "--run" => parsed.run_here = value(),
                "--exact" => parsed.exact = true,
                "--list" => parsed.list = true,
                "--nocapture" | "--no-capture" => parsed.capture_off = true,
                "--ignored" => parsed.only_ignored = true,
                "--skip" => parsed.skipped.extend(value()),
                "--format" => parsed.terse = value().as_deref() == Some("terse"),
                "-q" | "--quiet" => parsed.terse = true,
                "--test-threads" | "--color" | "-Z" | "--logfile" | "--shuffle-seed" => {
                    value();
                }
                flag if flag.starts_with('-') => {}
                filter => parsed.filters.push(filter.to_owned()),
            }
        }
        parsed
    }

    fn selects(&self, name: &str) -> bool {
        let matches = |pattern: &String| {
            if self.exact {
                name == pattern
            } else {
                name.contains(pattern.as_str())
            }
        };
        !self.only_ignored
            && (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skipped.iter().any(matches)
    }
}

fn list(tests: &[Test], terse: bool) {
    for test in tests {
        say(format_args!("{}: test\n", test.name));
    }
    if !terse {
        say(format_args!("\n{} tests, 0 benchmarks\n", tests.len()));
    }
}

enum Outcome {
    Passed,
    Ignored { reason: String },
    Failed { why: String, output: String },
}

/// Runs the tests one after the other; false if one failed.
fn run_all(tests: &[Test], defined_count: usize, arguments: &Arguments) -> bool {
    let start = Instant::now();
    let plural = if tests.len() == 1 { "" } else { "s" };
    say(format_args!("\nrunning {} test{plural}\n", tests.len()));
    let (mut passed_count, mut ignored_count, mut failures) = (0, 0, Vec::new());
    for test in tests {
        say(format_args!("test {} ... ", test.name));
        match run_one(test, arguments.capture_off) {
            Ok(Outcome::Passed) => {
                say(format_args!("ok\n"));
                passed_count += 1;
            }
            Ok(Outcome::Ignored { reason }) => {
                say(format_args!("ignored, {reason}\n"));
                ignored_count += 1;
            }
            Ok(Outcome::Failed { why, output }) => {
                say(format_args!("FAILED\n"));
                failures.push((test.name, why, output));
            }
            Err(error) => {
                say(format_args!("FAILED\n"));
                failures.push((test.name, format!("cannot be run: {error}"), String::new()));
            }
        }
    }
    if !failures.is_empty() {
        say(format_args!("\nfailures:\n\n"));
        for (name, why, output) in &failures {
            say(format_args!(
                "---- {name} stdout ----\n{output}\n{name} {why}\n\n"
            ));
        }
        say(format_args!("\nfailures:\n"));
        for (name, ..) in &failures {
            say(format_args!("    {name}\n"));
        }
    }
    say(format_args!(
        "\ntest result: {}. {passed_count} passed; {} failed; {ignored_count} ignored; 0 measured; \
         {} filtered out; finished in {:.2}s\n\n",
        if failures.is_empty() { "ok" } else { "FAILED" },
        failures.len(),
        defined_count - tests.len(),
        start.elapsed().as_secs_f64(),
    ));
    failures.is_empty()
}

fn run_one(test: &Test, capture_off: bool) -> io::Result<Outcome> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["--run", test.name]).stdin(Stdio::null());
    command.process_group(0);
    let mut captured = None;
    if !capture_off {
        let file = capture_file()?;
        command.stdout(file.try_clone()?).stderr(file.try_clone()?);
        captured = Some(file);
    }
    // SAFETY: between fork and exec only prctl and signal are called, which are plain system calls.
    unsafe { command.pre_exec(die_with_parent).pre_exec(heed_terminal) };
    let mut child = command.spawn()?;
    let process_id = child.id();

    // The end is awaited without reaping, so that the number of the process group is still ours to kill.
    let (ended, at_end) = mpsc::channel();
    thread::spawn(move || {
        wait_for_end(process_id);
        let _ = ended.send(());
    });
    let time_limit = time_limit();
    let timed_out = at_end.recv_timeout(time_limit).is_err();
    kill_group(process_id);
    let status = child.wait()?;

    let output = match &mut captured {
        Some(file) => end_of(file)?,
        None => String::new(),
    };
    if timed_out {
        let why = format!("was killed after {} s", time_limit.as_secs());
        return Ok(Outcome::Failed { why, output });
    }
    Ok(match (status.code(), skip_reason(&output)) {
        (Some(0), _) => Outcome::Passed,
        (Some(EXIT_SKIPPED), Some(reason)) => Outcome::Ignored { reason },
        (Some(EXIT_SKIPPED), None) if capture_off => Outcome::Ignored {
            reason: "for the reason above".to_owned(),
        },
        _ => Outcome::Failed {
            why: describe(status),
            output,
        },
    })
}

/// A file without a name: captured output leaves nothing behind, and no reader hangs on a descriptor that
/// a stray grandchild keeps open.
fn capture_file() -> io::Result<File> {
    let nanos = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_nanos());
    let path = env::temp_dir().join(format!("forktest-{}-{nanos}", process::id()));
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

fn end_of(file: &mut File) -> io::Result<String> {
    let len_bytes = file.metadata()?.len();
    let left_out = len_bytes.saturating_sub(SHOWN_OUTPUT_LEN_BYTES);
    file.seek(SeekFrom::Start(left_out))?;
    let mut bytes = Vec::new();
    file.take(SHOWN_OUTPUT_LEN_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match left_out {
        0 => text.into_owned(),
        _ => format!("[{left_out} bytes left out]\n{text}"),
    })
}

fn skip_reason(output: &str) -> Option<String> {
    let mut lines = output.lines().rev();
    lines.find_map(|line| line.strip_prefix(SKIPPED).map(str::to_owned))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(EXIT_FAILED), _) => "panicked".to_owned(),
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => format!("ended: {status}"),
    }
}

fn time_limit() -> Duration {
    env::var("FORKTEST_TIME_LIMIT_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .map_or(DEFAULT_TIME_LIMIT, Duration::from_secs)
}

/// Writes to standard output at once; a reader that has gone away is not an error of the tests.
fn say(text: std::fmt::Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_fmt(text);
    let _ = stdout.flush();
}

const SIGHUP: c_int = 1;
const SIGINT: c_int = 2;
const SIGQUIT: c_int = 3;
const SIGKILL: c_int = 9;
const SIG_DFL: usize = 0;
const PR_SET_PDEATHSIG: c_int = 1;
const P_PID: c_uint = 1;
const WEXITED: c_int = 4;
const WNOWAIT: c_int = 0x0100_0000;

unsafe extern "C" {
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn waitid(id_type: c_uint, id: c_uint, info: *mut c_void, options: c_int) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn signal(signal: c_int, action: usize) -> usize;
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
    match unsafe { prctl(PR_SET_PDEATHSIG, SIGKILL as c_ulong) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A shell that starts the tests in the background, or by `nohup`, has them ignore what comes from the terminal, and all that they start
/// would inherit that.
fn heed_terminal() -> io::Result<()> {
    for from_terminal in [SIGHUP, SIGINT, SIGQUIT] {
        // SAFETY: the default action is no function, so nothing is called.
        if unsafe { signal(from_terminal, SIG_DFL) } == usize::MAX {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn wait_for_end(process_id: u32) {
    // SAFETY: a null `info` is allowed; with WNOWAIT the process stays waitable.
    while unsafe { waitid(P_PID, process_id, ptr::null_mut(), WEXITED | WNOWAIT) } == -1
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

fn kill_group(leader: u32) {
    // SAFETY: the leader is not reaped, so the group's number cannot have been given to another one.
    unsafe { kill(-(leader as c_int), SIGKILL) };
}

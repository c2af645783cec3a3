//! The part of `test-leaks` that runs inside the cage, beside the program it watches.
//!
//! **If a process dies here**: a probe that writes no report is a failure of the run, told by the outer side.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::cage::MARK;
use super::snapshot::{Snapshot, Whose, describe_process, registered};
use crate::workspace::{array, string};

/// The hidden command's name.
pub const PROBE: &str = "leak-probe";

/// How long processes may outlive the program that started them.
const GRACE: Duration = Duration::from_secs(1);
/// How often a wait looks again.
const PAUSE: Duration = Duration::from_millis(1);
/// Close-on-exec in the `flags` line of `/proc/PID/fdinfo`, which is octal.
const CLOSE_ON_EXEC: u32 = 0o2_000_000;

/// What is done with a program.
#[derive(Clone, Copy, Debug)]
pub enum Scenario {
    /// It runs to its end.
    Once,
    /// Its main process is killed after this time, then it is started again and runs to its end.
    KillMaster { after: Duration },
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Of the last run, in a scenario of several.
    pub elapsed: Duration,
    /// The program did not end well.
    pub failure: Option<String>,
    /// What it left behind.
    pub leaks: Vec<String>,
    /// Worth saying, no fault.
    pub notes: Vec<String>,
    /// What the program printed.
    pub output: Vec<u8>,
}

impl Report {
    /// A run that came to nothing.
    pub fn failed(failure: String) -> Report {
        Report {
            failure: Some(failure),
            ..Report::default()
        }
    }

    /// Reads what [`Report::write`] wrote.
    pub fn read(path: &Path) -> Result<Report, String> {
        let text = fs::read(path).map_err(|error| format!("no report from the probe: {error}"))?;
        let value: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| format!("a damaged report from the probe: {error}"))?;
        let strings = |name: &str| array(&value[name]).iter().map(string).collect();
        Ok(Report {
            elapsed: Duration::from_micros(value["elapsed_us"].as_u64().unwrap_or(0)),
            failure: value["failure"].as_str().map(str::to_owned),
            leaks: strings("leaks"),
            notes: strings("notes"),
            output: Vec::new(),
        })
    }

    fn write(&self, path: &Path) -> Result<(), String> {
        let value = json!({
            "elapsed_us": self.elapsed.as_micros() as u64,
            "failure": self.failure,
            "leaks": self.leaks,
            "notes": self.notes,
        });
        fs::write(path, value.to_string())
            .map_err(|error| format!("writing {}: {error}", path.display()))
    }

    /// Neither failed nor left anything behind.
    pub fn is_clean(&self) -> bool {
        self.failure.is_none() && self.leaks.is_empty()
    }

    /// For people: one line, and what is wrong below it.
    pub fn display(&self, name: &str) -> String {
        let word = match (&self.failure, self.leaks.as_slice()) {
            (Some(_), _) => "FAILED",
            (None, []) => "clean ",
            (None, _) => "LEAKED",
        };
        let mut text = format!("{word} {name} ({:.2} s)", self.elapsed.as_secs_f64());
        for note in &self.notes {
            let _ = write!(text, "\n       note: {note}");
        }
        for leak in &self.leaks {
            let _ = write!(text, "\n       left behind: {leak}");
        }
        if let Some(failure) = &self.failure {
            let _ = write!(text, "\n       {failure}");
            let output = String::from_utf8_lossy(&self.output);
            let skipped = output.lines().count().saturating_sub(60);
            for line in output.lines().skip(skipped) {
                let _ = write!(text, "\n       | {line}");
            }
        }
        text
    }
}

/// What the outer side tells the probe.
#[derive(Debug)]
struct Orders {
    report: PathBuf,
    temporary: PathBuf,
    limit: Duration,
    mark: Option<String>,
    socket_directory: Option<PathBuf>,
    kill_after: Option<Duration>,
    program: Vec<String>,
}

/// The hidden command.
pub fn run_probe(arguments: &[String]) -> Result<(), String> {
    let orders = Orders::parse(arguments)?;
    let report = orders.carry_out();
    report.write(&orders.report)
}

impl Orders {
    fn parse(arguments: &[String]) -> Result<Orders, String> {
        let mut orders = Orders {
            report: PathBuf::new(),
            temporary: PathBuf::new(),
            limit: Duration::ZERO,
            mark: None,
            socket_directory: None,
            kill_after: None,
            program: Vec::new(),
        };
        let mut has_socket_directory = false;
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                orders.program = arguments.by_ref().cloned().collect();
                continue;
            }
            if argument == "--socket-directory" {
                has_socket_directory = true;
                continue;
            }
            let value = arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|error| format!("{argument}: {error}"))
            };
            match argument.as_str() {
                "--report" => orders.report = value.into(),
                "--temporary" => orders.temporary = value.into(),
                "--limit-ms" => orders.limit = Duration::from_millis(number()?),
                "--mark" => orders.mark = Some(value.clone()),
                "--kill-after-us" => orders.kill_after = Some(Duration::from_micros(number()?)),
                unknown => return Err(format!("{PROBE} does not know {unknown}")),
            }
        }
        if orders.program.is_empty() {
            return Err(format!("{PROBE} is started by test-leaks only"));
        }
        orders.socket_directory = has_socket_directory.then(|| orders.temporary.join("sockets"));
        Ok(orders)
    }

    fn whose(&self) -> Whose {
        match &self.mark {
            Some(mark) => Whose::Marked(mark.clone()),
            None => Whose::Everybody,
        }
    }

    fn carry_out(&self) -> Report {
        let mut report = Report::default();
        let inherited = inheritable_descriptors();
        if !inherited.is_empty() {
            let failure =
                format!("the program would inherit descriptors {inherited:?} from its cage");
            return Report::failed(failure);
        }
        let before = Snapshot::take(&self.temporary);
        if let Some(after) = self.kill_after {
            self.run_and_kill(after, &mut report);
        }
        self.run_to_the_end(&mut report);
        let after = Snapshot::take(&self.temporary);
        self.compare(&before, &after, &mut report);
        report
    }

    fn start(&self) -> Result<Child, String> {
        let (program, arguments) = self.program.split_first().ok_or("no program")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.env("TMPDIR", &self.temporary);
        if let Some(directory) = &self.socket_directory {
            command.arg("--socket-directory").arg(directory);
        }
        if let Some(mark) = &self.mark {
            command.env(MARK, mark);
        }
        command
            .spawn()
            .map_err(|error| format!("starting {program}: {error}"))
    }

    fn run_to_the_end(&self, report: &mut Report) {
        let start = Instant::now();
        let status = self.start().and_then(|mut child| {
            let ended = wait(&mut child, self.limit)?;
            if ended.is_none() {
                kill(&mut child)?;
            }
            Ok(ended)
        });
        report.elapsed = start.elapsed();
        match status {
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => report.failure = Some(status.to_string()),
            Ok(None) => report.failure = Some(format!("still running after {:?}", self.limit)),
            Err(error) => report.failure = Some(error),
        }
        self.expect_no_process("the program's end", report);
    }

    fn run_and_kill(&self, after: Duration, report: &mut Report) {
        let killed = self.start().and_then(|mut child| {
            if let Some(status) = wait(&mut child, after)? {
                report
                    .notes
                    .push(format!("it had ended before the kill: {status}"));
            } else {
                kill(&mut child)?;
            }
            Ok(())
        });
        if let Err(error) = killed {
            report.failure = Some(error);
        }
        self.expect_no_process("the kill of its main process", report);
    }

    /// Waits until the program has no process left; what still lives after [`GRACE`] is a leak, and is killed.
    fn expect_no_process(&self, event: &str, report: &mut Report) {
        let whose = self.whose();
        let start = Instant::now();
        let mut left = whose.processes();
        while (left.is_unclear || !left.living.is_empty()) && start.elapsed() < GRACE {
            // sleep: paces the polling of a condition that is given GRACE to become true.
            std::thread::sleep(PAUSE);
            left = whose.processes();
        }
        for pid in left.living {
            let process = describe_process(pid);
            report
                .leaks
                .push(format!("{process}, alive {GRACE:?} after {event}"));
            let _ = Command::new("kill")
                .args(["-KILL", &pid.to_string()])
                .status();
        }
    }

    fn compare(&self, before: &Snapshot, after: &Snapshot, report: &mut Report) {
        let whose = self.whose();
        for object in after.shm.difference(&before.shm) {
            let size = fs::symlink_metadata(object).map_or(0, |data| data.len());
            let text = format!("{} ({size} bytes)", object.display());
            if whose.is_mapped_by_others(object) {
                report
                    .notes
                    .push(format!("{text} belongs to somebody else"));
            } else {
                report.leaks.push(text);
            }
        }
        for object in after.system_v.difference(&before.system_v) {
            report.leaks.push(format!("System V {object}"));
        }
        let allowed = self.allowed_files(report);
        for file in after.files.difference(&before.files) {
            if !allowed.contains(file) {
                report.leaks.push(format!("{}", file.display()));
            }
        }
    }

    /// A socket directory may hold a record that names nothing, and the lock file.
    fn allowed_files(&self, report: &mut Report) -> BTreeSet<PathBuf> {
        let Some(directory) = &self.socket_directory else {
            return BTreeSet::new();
        };
        let record = directory.join("netplex.pmanage");
        let text = fs::read(&record).unwrap_or_default();
        for object in registered(&String::from_utf8_lossy(&text)) {
            report
                .leaks
                .push(format!("{} still names {object}", record.display()));
        }
        BTreeSet::from([directory.clone(), record, directory.join("netplex.lock")])
    }
}

/// Waits up to `limit`; `None` if the child still runs then.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>, String> {
    let start = Instant::now();
    loop {
        let ended = child
            .try_wait()
            .map_err(|error| format!("waiting for the program: {error}"))?;
        let left = limit.saturating_sub(start.elapsed());
        if ended.is_some() || left.is_zero() {
            return Ok(ended);
        }
        // sleep: paces the polling of a child, and ends with the limit.
        std::thread::sleep(PAUSE.min(left));
    }
}

/// Kills the child with SIGKILL and reaps it.
fn kill(child: &mut Child) -> Result<(), String> {
    let killed = child.kill().and_then(|()| child.wait());
    killed
        .map(|_| ())
        .map_err(|error| format!("killing the program: {error}"))
}

/// Descriptors above 2 of this process that a program started by it would get.
fn inheritable_descriptors() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fdinfo")
        .into_iter()
        .flatten()
        .flatten()
    {
        let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|text| u32::from_str_radix(text.trim(), 8).ok());
        if number > 2 && flags.is_some_and(|flags| flags & CLOSE_ON_EXEC == 0) {
            found.push(number);
        }
    }
    found
}

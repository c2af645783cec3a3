//! A test file run again as a program of its own: for tests in which a whole program is killed, ends by a
//! signal, or has its output read.
//!
//! A program is a process group of its own, as a job of a shell is, and dies with the test that started it.

// Not every test file needs all of it.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use netmcore_forktest::Test;
use netmcore_sys::process::{self, Pid};

/// What a program does with its arguments; the process then returns from `main`.
pub type Body = fn(&[String]);

/// The `main` of a test file that has programs.
pub fn main(programs: &[(&str, Body)], tests: &[Test]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_none_or(|first| first != "--program") {
        return netmcore_forktest::run(tests);
    }
    let found = programs.iter().find(|(name, _)| *name == arguments[1]);
    let (_, body) = found.unwrap_or_else(|| panic!("there is no program {}", arguments[1]));
    body(&arguments[2..]);
}

/// Defines `main` for tests and the programs that they start.
#[macro_export]
macro_rules! tests_and_programs {
    (tests: $($test:ident),* $(,)?; programs: $($program:ident),* $(,)?) => {
        fn main() {
            $crate::program::main(
                &[$((stringify!($program), $program)),*],
                &[$(netmcore_forktest::Test { name: stringify!($test), run: $test }),*],
            )
        }
    };
}

/// A running program.
pub struct Program {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
}

/// Starts a program of this test file, its standard output to be read line by line.
pub fn start<A: AsRef<OsStr>>(name: &str, arguments: &[A]) -> Program {
    let mut child = command(name, arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = child.stdout.take().map(BufReader::new);
    Program { child, lines }
}

/// Starts a program of this test file with its standard output in a file.
pub fn start_into<A: AsRef<OsStr>>(name: &str, arguments: &[A], output: &Path) -> Program {
    let output = File::options()
        .create(true)
        .append(true)
        .open(output)
        .unwrap();
    let child = command(name, arguments).stdout(output).spawn().unwrap();
    Program { child, lines: None }
}

/// A program of this test file, to be started.
pub fn command<A: AsRef<OsStr>>(name: &str, arguments: &[A]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--program", name]).args(arguments);
    command.stdin(Stdio::null()).process_group(0);
    process::command_dies_with_parent(&mut command);
    command
}

impl Program {
    pub fn pid(&self) -> Pid {
        Pid::new(self.child.id() as i32).unwrap()
    }

    /// The next line of its output, without its end; `None` when all its processes have closed it.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let lines = self
            .lines
            .as_mut()
            .expect("the output is read line by line");
        let count = lines.read_line(&mut line).unwrap();
        (count > 0).then(|| line.trim_end().to_owned())
    }

    /// Reads lines until one begins with `start`, and returns its rest.
    pub fn line_after(&mut self, start: &str) -> String {
        loop {
            let Some(line) = self.line() else {
                panic!(
                    "the program has ended without saying {start:?}: {:?}",
                    self.wait()
                );
            };
            if let Some(rest) = line.strip_prefix(start) {
                return rest.to_owned();
            }
        }
    }

    pub fn signal(&self, signal: i32) {
        process::kill(self.pid(), signal).unwrap();
    }

    /// Sends a signal to all its processes, as a terminal does.
    pub fn signal_group(&self, signal: i32) {
        let script = format!("kill -{signal} -{}", self.child.id());
        assert!(
            Command::new("sh")
                .args(["-c", &script])
                .status()
                .unwrap()
                .success()
        );
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Waits for its end, and checks that it ended with code 0.
    pub fn succeeds(&mut self) {
        let status = self.wait();
        assert!(status.success(), "the program ended with {status}");
    }

    /// Waits for its end, and checks that it died of `signal`.
    pub fn dies_of(&mut self, signal: i32) {
        let status = self.wait();
        assert_eq!(
            status.signal(),
            Some(signal),
            "the program ended with {status}"
        );
    }
}

/// Waits until `condition` holds; false if it does not within `limit`.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        // sleep: paces the polling of something that wakes nobody; the deadline above ends it.
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Whether the process can still run: it is there, and no zombie.
pub fn is_alive(pid: Pid) -> bool {
    process::is_zombie(pid).is_ok_and(|is_zombie| !is_zombie)
}

/// What the descriptors of a process lead to.
pub fn descriptors_of(pid: Pid) -> Vec<(i32, String)> {
    let mut found: Vec<(i32, String)> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let number = entry.file_name().to_str()?.parse().ok()?;
            // The descriptor that the listing itself uses is closed by now, or that of its like.
            let target = std::fs::read_link(entry.path()).ok()?;
            let target = target.to_string_lossy().into_owned();
            let is_listing = target.starts_with("/proc/") && target.ends_with("/fd");
            (!is_listing).then_some((number, target))
        })
        .collect();
    found.sort();
    found
}

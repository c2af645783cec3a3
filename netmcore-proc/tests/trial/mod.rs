//! A run in a directory of its own, looked at from outside when it is over; and what its processes talk
//! by without what is tested: pipes.

// Not every test file needs all of it.
#![allow(dead_code)]

use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use netmcore_pmanage::Log;
use netmcore_proc::{Error, JoinError, Master, Process, Result};
use netmcore_sys::futex::Deadline;
use netmcore_sys::poll::wait_readable;
use netmcore_sys::process::{self, Pid};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

/// A directory for one run after the other.
pub struct Trial {
    dir: TempDir,
}

impl Trial {
    pub fn new() -> Trial {
        let dir = tempfile::Builder::new()
            .prefix("nmc-")
            .tempdir()
            .expect("a directory for a run");
        Trial { dir }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn master(&self) -> Master {
        Master::builder(self.dir())
    }

    /// Runs `first`, and checks that nothing is left. A failed run fails the test.
    pub fn run<A, R>(&self, master: Master, first: &Process<A, R>, arg: &A) -> R
    where
        A: Serialize + DeserializeOwned,
        R: Serialize + DeserializeOwned,
    {
        match self.try_run(master, first, arg) {
            Ok(result) => result,
            Err(Error::FirstProcess(error)) => panic!("the first process failed: {error:#}"),
            Err(error) => panic!("the run failed: {error}"),
        }
    }

    /// As `run`, but the run may fail.
    pub fn try_run<A, R>(&self, master: Master, first: &Process<A, R>, arg: &A) -> Result<R>
    where
        A: Serialize + DeserializeOwned,
        R: Serialize + DeserializeOwned,
    {
        let result = master.run(first, arg);
        self.check_nothing_is_left();
        result
    }

    /// No process, no recorded object, no socket.
    pub fn check_nothing_is_left(&self) {
        let children = process::processes_with_parent(Pid::this()).expect("/proc");
        assert_eq!(children, [], "processes are left");
        let recorded = Log::open(self.dir())
            .and_then(|log| log.registered())
            .expect("the record");
        assert_eq!(recorded, [], "the record is not empty");
        let socket = self.dir().join("netplex.controller/admin");
        assert!(!socket.exists(), "the socket is left");
    }
}

/// Runs `body` as the first process of a run with default options.
pub fn in_a_worker<R>(body: impl Fn() -> R + 'static) -> R
where
    R: Serialize + DeserializeOwned + 'static,
{
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(move |(): ()| body());
    trial.run(master, &first, &())
}

/// Numbers through a pipe: made before the run, known to all its processes.
pub struct Channel {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Channel {
    pub fn new() -> &'static Channel {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        Box::leak(Box::new(Channel { reader, writer }))
    }

    pub fn send(&self, number: u64) {
        (&self.writer)
            .write_all(&number.to_le_bytes())
            .expect("the pipe is open");
    }

    /// Waits for the next number. Several may wait; each number goes to one of them.
    pub fn receive(&self) -> u64 {
        let mut bytes = [0; 8];
        (&self.reader)
            .read_exact(&mut bytes)
            .expect("the pipe is open");
        u64::from_le_bytes(bytes)
    }

    /// The next number, if there is one now. For a single receiver.
    pub fn receive_nowait(&self) -> Option<u64> {
        let is_there =
            wait_readable(&self.reader, Some(Deadline::now())).expect("the pipe is open");
        is_there.then(|| self.receive())
    }

    /// A copy of the sending end.
    pub fn sender(&self) -> PipeWriter {
        self.writer.try_clone().expect("a descriptor")
    }

    pub fn send_pid(&self) {
        self.send(u64::from(std::process::id()));
    }

    pub fn receive_pid(&self) -> Pid {
        Pid::new(i32::try_from(self.receive()).expect("a pid")).expect("a pid")
    }
}

/// Waits until `condition` holds, ten seconds at the most.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "waited ten seconds for this: {what}"
        );
        // sleep: between two looks; how long does not matter.
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits until all threads of the process sleep.
pub fn until_asleep(pid: Pid) {
    until("a process sleeps", || {
        process::sleeping_threads(pid)
            .expect("it lives")
            .is_some_and(|count| count > 0)
    });
}

/// Waits until all other threads of this process sleep, of which there is one at least.
pub fn until_others_sleep() {
    until("the other threads sleep", || {
        let this = std::fs::read_link("/proc/thread-self").expect("/proc");
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
        let others: Vec<bool> = tasks
            .flatten()
            .filter(|task| Some(&*task.file_name()) != this.file_name())
            .map(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.contains(") S ")
            })
            .collect();
        !others.is_empty() && others.iter().all(|&sleeps| sleeps)
    });
}

/// Waits until nothing of the process is left but its pid, or not even that.
pub fn until_dead(pid: Pid) {
    until("a process is dead", || {
        process::is_zombie(pid).unwrap_or(true)
    });
}

pub fn kill(pid: Pid, signal: i32) {
    process::kill(pid, signal).expect("it lives");
}

pub const SIGKILL: i32 = 9;
pub const SIGSEGV: i32 = 11;
pub const SIGABRT: i32 = 6;

pub fn is_killed_by(signal: i32, error: &JoinError) -> bool {
    matches!(error, JoinError::Killed { signal: its, .. } if *its == signal)
}

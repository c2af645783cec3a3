//! The lock that says whether the program of a directory is alive.
//!
//! **Protocol.** A `flock` on `netplex.lock`, taken by the master for the whole run. Forks inherit it on purpose, so it is free
//! exactly when the last process of the run is gone. The file holds the master's process id and start time:
//!
//! | lock | process named in the file | a new start |
//! |---|---|---|
//! | free | any | takes it, writes its own id and start time |
//! | taken | lives | [`AlreadyRunning`](Error::AlreadyRunning) |
//! | taken | dead, a zombie, about to be killed, or none named (not yet, or not any more) | waits until the lock is free or somebody else has it, at most 2 s; then [`StillDying`](Error::StillDying) |
//!
//! **Invariants.**
//! 1. The file is never removed, so two programs cannot hold the lock of two different files of this name. (If
//!    somebody else removes it, a start that had opened it before looks again.)
//! 2. The lock is never given up explicitly, since that would give it up for all processes that inherited it: it
//!    goes with the last descriptor.
//!
//! A master that ends in order takes its name out of the file before it closes its descriptor, so that a start right
//! after it waits for what is left of its processes rather than taking it for alive.
//!
//! **If a process dies here.** The kernel closes its descriptor. Killed after taking the lock and before writing the
//! file: the file names the program before, which is dead, so the next start waits for the
//! orphans of ours, of which there are none yet.
//!
//! **Not here.** What is cleaned once the lock is ours: [`recover`](crate::recover).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use netmcore_sys::crash_point;
use netmcore_sys::file_lock;
use netmcore_sys::process::{self, Pid};

use crate::error::{Error, Result, While};
use crate::log::write_at;
use crate::trust;

/// Name of the lock file in its directory.
pub const LOCK_NAME: &str = "netplex.lock";

/// How long a start waits for the orphans of a dead master. They ask for SIGKILL on its death, so this is for the kernel to
/// take them apart, which can take a while with gigabytes of memory each.
const ORPHANS_DEADLINE: Duration = Duration::from_secs(2);

/// How often the lock is tried meanwhile. `flock` has no form with a deadline that would need neither a thread nor a
/// signal, and a master must have neither.
const RETRY_INTERVAL: Duration = Duration::from_millis(2);

/// The proof that the program in a directory is this one, and that the last one is dead.
///
/// Held for the whole run; inherited by forks made with [`netmcore_sys::process::fork`], and closed in all others
/// ([`process::close_in_foreign_forks`]) and at `exec`. Dropping it closes this process's copy, and in the process that took the
/// lock says in the file that the master has ended; the lock is free when no process has a copy any more. Code in a foreign fork must not drop it: the descriptor is closed there already.
///
/// ```
/// use netmcore_pmanage::{Error, Liveness};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let dir = temporary.path();
/// let lock = Liveness::acquire(dir)?;
/// match Liveness::acquire(dir) {
///     Err(Error::AlreadyRunning { pid, .. }) => assert_eq!(pid.get() as u32, std::process::id()),
///     other => panic!("{other:?}"),
/// }
/// drop(lock);
/// Liveness::acquire(dir)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Liveness {
    dir: PathBuf,
    /// The process that took the lock, which the file names.
    master: Pid,
    /// `None` only after [`into_fd`](Self::into_fd).
    file: Option<File>,
}

impl Liveness {
    /// Takes the liveness lock of `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyRunning`] if a live program has it, and [`Error::StillDying`] if it is dead, but some of its
    /// processes are not; nothing is touched then. [`Error::Untrusted`], [`Error::Io`], [`Error::System`].
    ///
    /// # Blocking
    ///
    /// At most two seconds, for processes of a dead program.
    ///
    /// # Panics
    ///
    /// As [`process::close_in_foreign_forks`]: if this process holds more than 32 such locks.
    pub fn acquire(dir: &Path) -> Result<Liveness> {
        let dir = trust::absolute(dir)?;
        let path = dir.join(LOCK_NAME);
        let deadline = Instant::now() + ORPHANS_DEADLINE;
        loop {
            trust::check_directory(&dir)?;
            let file = trust::open_or_create(&path)?;
            if file_lock::try_lock_exclusive(&file)? {
                if !trust::still_leads_to(&path, &file)? {
                    continue;
                }
                crash_point!("pmanage.liveness.locked");
                write_master(&file).on(&path, "cannot write")?;
                crash_point!("pmanage.liveness.written");
                process::close_in_foreign_forks(file.as_raw_fd());
                return Ok(Liveness {
                    dir,
                    master: Pid::this(),
                    file: Some(file),
                });
            }
            if let Some(pid) = live_master(&file).on(&path, "cannot read")? {
                return Err(Error::AlreadyRunning { dir, pid });
            }
            if Instant::now() >= deadline {
                let pids = holders(&file).on(&path, "cannot find the holders of")?;
                return Err(Error::StillDying { dir, pids });
            }
            // sleep: paces the polling of a lock that tells nobody when it is free; the deadline above ends it.
            thread::sleep(RETRY_INTERVAL);
        }
    }

    /// The directory, as an absolute path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The descriptor whose copies hold the lock.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file
            .as_ref()
            .expect("the file is there until into_fd")
            .as_fd()
    }

    /// Gives up the type, not the lock: the descriptor's owner now has to see that it is inherited where it should be, and
    /// only there ([`process::close_in_foreign_forks`]).
    pub fn into_fd(mut self) -> OwnedFd {
        let file = self.file.take().expect("the file is there until into_fd");
        process::close_in_foreign_forks_forget(file.as_raw_fd());
        file.into()
    }

    /// Panics unless this is the lock of `dir`: it would prove nothing.
    pub(crate) fn assert_of(&self, dir: &Path) -> Result<()> {
        let look = |dir: &Path| fs::metadata(dir).on(dir, "cannot look at");
        assert!(
            trust::is_same_file(&look(&self.dir)?, &look(dir)?),
            "the lock of {} says nothing about {}",
            self.dir.display(),
            dir.display()
        );
        Ok(())
    }
}

impl AsFd for Liveness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        Liveness::as_fd(self)
    }
}

impl Drop for Liveness {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        process::close_in_foreign_forks_forget(file.as_raw_fd());
        if self.master == Pid::this() {
            // If this fails, a start while copies are left is told that we still run.
            let _ = file.set_len(0);
        }
    }
}

/// Writes who has the lock, in a width that is always the same: a reader in the middle of the write sees a
/// process that does not exist, and looks again.
fn write_master(file: &File) -> io::Result<()> {
    let pid = Pid::this();
    let text = format!("{pid:>10} {:>20}\n", process::start_time(pid)?);
    write_at(file, text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// The process that the file names, if it lives.
fn live_master(file: &File) -> io::Result<Option<Pid>> {
    let mut bytes = [0; 64];
    let len = file.read_at(&mut bytes, 0)?;
    let Ok(text) = str::from_utf8(&bytes[..len]) else {
        return Ok(None);
    };
    let mut numbers = text.split_ascii_whitespace();
    let pid = numbers.next().and_then(|pid| Pid::new(pid.parse().ok()?));
    let started: Option<u64> = numbers.next().and_then(|ticks| ticks.parse().ok());
    let (Some(pid), Some(started)) = (pid, started) else {
        return Ok(None);
    };
    // Errors mean that there is no such process (any more).
    let is_alive = process::start_time(pid).is_ok_and(|ticks| ticks == started)
        && process::is_dying(pid).is_ok_and(|is_dying| !is_dying);
    Ok(is_alive.then_some(pid))
}

/// The processes that hold the lock on the file, as far as this process may see them.
fn holders(file: &File) -> io::Result<Vec<Pid>> {
    let lock = file.metadata()?;
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|pid| Pid::new(pid.parse().ok()?)) else {
            continue;
        };
        // Gone meanwhile, or not for us to see.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let holds_it = descriptors.flatten().any(|descriptor| {
            let is_the_file =
                fs::metadata(descriptor.path()).is_ok_and(|open| trust::is_same_file(&open, &lock));
            is_the_file && has_flock(pid, &descriptor.file_name())
        });
        if holds_it {
            holders.push(pid);
        }
    }
    holders.sort_unstable();
    Ok(holders)
}

/// Whether a descriptor's open file has a `flock`: others only wait for it.
fn has_flock(pid: Pid, descriptor: &OsStr) -> bool {
    let path = Path::new("/proc")
        .join(pid.to_string())
        .join("fdinfo")
        .join(descriptor);
    fs::read_to_string(path).is_ok_and(|info| {
        info.lines()
            .any(|line| line.starts_with("lock:") && line.contains("FLOCK"))
    })
}

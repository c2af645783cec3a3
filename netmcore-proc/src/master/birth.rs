//! The fork of a worker, and what it must undo of its master.
//!
//! **Invariants.**
//! 1. All descriptors of the master lie at `base` or above, except the liveness lock and the doorbell,
//!    which workers keep. A worker closes all from `base` on, except those that the program had open
//!    there before (none, unless it has been given strange numbers or few).
//! 2. A worker has the signal mask, the actions and the descriptor limit that the program had when it
//!    called `run`; except that SIGINT, if it had the default action, does nothing, since the terminal
//!    sends it to the whole group and the master ends its workers in order.
//!
//! # Safety
//! `fork` is refused unless the process has one thread, so the child's copy of memory is consistent.
//! The child runs [`worker::live`], which does not return, inside a guard that turns an unwinding
//! panic into an exit: it never comes back into the master's loop.
#![allow(unsafe_code)]

use std::os::fd::{OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use netmcore_sys::process::{self, ForkError, Forked, Limit, Pid, Resource};
use netmcore_sys::signal::{self, SavedAction, SignalSet};

use crate::context::Runtime;
use crate::control::WorkerIndex;
use crate::error::Error;
use crate::worker::{self, Birth};

/// What a worker restores, and the master when the run is over.
pub(crate) struct Inheritance {
    pub(crate) master: Pid,
    room: Room,
    mask: SignalSet,
    sigchld: SavedAction,
    has_default_sigint: bool,
    descriptors: Limit,
}

/// The signals that end a run in order.
pub(crate) const ENDING_SIGNALS: [i32; 2] = [signal::SIGINT, signal::SIGTERM];

impl Inheritance {
    /// Notes what the program has, then makes it fit for a master: ending signals blocked (they come
    /// through a descriptor), SIGCHLD at its default (if it is ignored, exit statuses are lost), as
    /// many descriptors as are allowed.
    pub(crate) fn note(room: Room) -> Result<Inheritance, Error> {
        let doing = || Error::system("preparing signals and limits for a master");
        let descriptors = process::get_limit(Resource::DescriptorCount).map_err(doing())?;
        let raised = Limit {
            soft: descriptors.hard,
            hard: descriptors.hard,
        };
        process::set_limit(Resource::DescriptorCount, raised).map_err(doing())?;
        let mut ending = SignalSet::empty();
        for signal in ENDING_SIGNALS {
            if !signal::action(signal).map_err(doing())?.is_ignored() {
                ending = ending.with(signal);
            }
        }
        let has_default_sigint = signal::action(signal::SIGINT)
            .map_err(doing())?
            .is_default();
        let sigchld = signal::set_default(signal::SIGCHLD).map_err(doing())?;
        let mask = signal::block(&ending).map_err(doing())?;
        Ok(Inheritance {
            master: Pid::this(),
            room,
            mask,
            sigchld,
            has_default_sigint,
            descriptors,
        })
    }

    /// The signals that come through the master's descriptor.
    pub(crate) fn ending_signals(&self) -> SignalSet {
        let mut set = SignalSet::empty();
        for signal in ENDING_SIGNALS {
            if !signal::action(signal).is_ok_and(|action| action.is_ignored()) {
                set = set.with(signal);
            }
        }
        set
    }

    /// In a worker. Failures are not told: each call takes values that the kernel gave before.
    pub(crate) fn restore_in_worker(&self) {
        let mut from = self.room.base;
        for &kept in &self.room.kept {
            if from < kept {
                // SAFETY: as below.
                let _ = unsafe { process::close_range(from, kept - 1) };
            }
            from = kept + 1;
        }
        // SAFETY: the descriptors from here on are the master's (invariant 1); their owners lie in
        // memory that a worker never touches or drops.
        let _ = unsafe { process::close_range(from, RawFd::MAX) };
        if self.has_default_sigint {
            let _ = signal::set_empty_handler(signal::SIGINT);
        }
        self.restore();
    }

    fn restore(&self) {
        let _ = signal::restore(signal::SIGCHLD, &self.sigchld);
        let _ = process::set_limit(Resource::DescriptorCount, self.descriptors);
        let _ = signal::set_mask(&self.mask);
    }
}

/// In the master, when the run is over or could not begin. A worker never drops its copy.
impl Drop for Inheritance {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Where the master's descriptors lie.
pub(crate) struct Room {
    /// None of them is lower.
    pub(crate) base: RawFd,
    /// What the program itself has open from there on, in ascending order.
    kept: Vec<RawFd>,
}

/// Chooses the lowest number for the master's descriptors: far above what the program has open, so that the
/// program's own never come to lie among them, and low enough to keep the table that each fork
/// copies short.
pub(crate) fn choose_room() -> Result<Room, Error> {
    const LEAST: RawFd = 256;
    /// What the program may still open without reaching the base.
    const SPACE: RawFd = 64;
    let doing = || Error::system("looking for room for the master's descriptors");
    let mut open = process::open_descriptors().map_err(doing())?;
    open.sort_unstable();
    let highest = open.last().copied().unwrap_or(2);
    let hard = process::get_limit(Resource::DescriptorCount)
        .map_err(doing())?
        .hard;
    let most = hard.map_or(RawFd::MAX, |limit| {
        RawFd::try_from(limit).unwrap_or(RawFd::MAX)
    });
    let base = LEAST.max(highest.saturating_add(SPACE)).min(most / 2);
    open.retain(|&fd| fd >= base);
    Ok(Room { base, kept: open })
}

/// Moves a descriptor among the master's.
pub(crate) fn place_fd<T: From<OwnedFd> + Into<OwnedFd>>(
    owner: T,
    base: RawFd,
) -> Result<T, Error> {
    let moved = process::move_above(owner.into(), base).map_err(Error::system(
        "giving a descriptor of the master its place (the limit is `ulimit -n`)",
    ))?;
    Ok(T::from(moved))
}

/// Why no worker could be forked.
#[derive(Debug)]
pub(crate) enum BirthError {
    MultiThreaded { threads: usize },
    Errno(i32),
}

/// Forks a worker.
pub(crate) fn fork_worker(
    runtime: &'static Runtime,
    index: WorkerIndex,
    birth: Birth,
    inheritance: &Inheritance,
) -> Result<Pid, BirthError> {
    worker::flush_output();
    // SAFETY: one thread (checked by fork); the child runs `live` and nothing else (module docs).
    match unsafe { process::fork() } {
        Ok(Forked::Parent(pid)) => Ok(pid),
        Ok(Forked::Child) => {
            let _ = catch_unwind(AssertUnwindSafe(|| {
                worker::live(runtime, index, birth, inheritance);
            }));
            process::exit_now(101)
        }
        Err(ForkError::MultiThreaded { threads }) => Err(BirthError::MultiThreaded { threads }),
        Err(ForkError::Sys(error)) => Err(BirthError::Errno(error.errno.raw())),
        Err(_) => Err(BirthError::Errno(netmcore_sys::Errno::EAGAIN.raw())),
    }
}

//! Who holds a lock, and whether it still lives: what locks must be told about the processes that use them.
//!
//! **Protocol.** A supervisor gives each user of its locks an [`OwnerId`]. When one has died it first makes
//! [`Owners::is_alive`] false for it, in all processes, and then calls [`announce_death`]. Sleepers read the counter of
//! deaths before they ask whether an owner lives, and sleep only while the counter is as they read it; so a death
//! is either seen by the question or ends the sleep.
//!
//! **Invariants.**
//! 1. An id is never used again for another owner while a lock may still name it.
//! 2. Once `is_alive` is false for an id it stays so, and nobody acts under that id any more.
//!
//! **If a process dies here.** Between the two steps of the supervisor: sleepers are left until its successor
//! announces a death, or until they ask by themselves, where [`Owners::recheck_every`] says so.

use crate::sync::{self, AtomicU32, Ordering};
use netmcore_sys::process::{self, Pid};
use std::fmt;
use std::time::Duration;

/// Names one user of locks, for good: a place in the supervisor's table, and which of its tenants.
///
/// It is not a process id: those are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerId {
    /// The place in the table, below [`OwnerId::INDEX_LIMIT`].
    pub index: u32,
    /// Tells the tenants of one place apart.
    pub generation: u32,
}

impl OwnerId {
    /// Indices are below this: 2³⁰.
    pub const INDEX_LIMIT: u32 = 1 << 30;
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "owner {}.{}", self.index, self.generation)
    }
}

/// What a lock must know of those that use it. The module says what a supervisor has to do.
pub trait Owners {
    /// The id under which the caller takes locks.
    fn me(&self) -> OwnerId;

    /// Whether the owner may still run. False is final (invariant 2).
    ///
    /// Asked only when a lock was not free, so it may cost a system call. A supervisor that takes locks itself,
    /// and alone finds out about deaths, must really look here (a zombie is dead), or it would
    /// wait for its own report.
    fn is_alive(&self, owner: OwnerId) -> bool;

    /// The counter of deaths in shared memory, on which waiters sleep: see [`announce_death`].
    fn deaths(&self) -> &AtomicU32;

    /// How often a sleeper asks [`is_alive`](Self::is_alive) by itself, where nobody announces deaths.
    fn recheck_every(&self) -> Option<Duration> {
        None
    }
}

impl<O: Owners + ?Sized> Owners for &O {
    fn me(&self) -> OwnerId {
        (**self).me()
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        (**self).is_alive(owner)
    }

    fn deaths(&self) -> &AtomicU32 {
        (**self).deaths()
    }

    fn recheck_every(&self) -> Option<Duration> {
        (**self).recheck_every()
    }
}

/// Tells all sleepers that somebody has died: counts `deaths` up and wakes them. The supervisor's second step.
pub fn announce_death(deaths: &AtomicU32) {
    deaths.fetch_add(1, Ordering::Release);
    sync::wake_all(deaths);
}

/// Owners without a supervisor: an owner is a process, told apart by its id and the time at which it started.
///
/// For programs that share a lock without a master. Processes must see each other under the same process ids (one pid
/// namespace). A death is noticed within 5 ms by those that wait, because each looks for itself. An owner
/// being a process, the death of a *thread* that holds a lock is not noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoloOwners;

impl SoloOwners {
    /// The id of the process `pid`, if it lives.
    fn id_of(pid: Pid) -> Option<OwnerId> {
        // Started at the same tick with the same pid: not within 2³² ticks, 497 days. The low half is enough.
        let start = process::start_time(pid).ok()?;
        Some(OwnerId {
            index: pid.get().cast_unsigned(),
            generation: start as u32,
        })
    }
}

impl Owners for SoloOwners {
    /// # Panics
    ///
    /// If `/proc` is not mounted.
    fn me(&self) -> OwnerId {
        use std::sync::atomic::AtomicU64;
        /// This process's id in one word, kept across calls but not across a fork.
        static ME: AtomicU64 = AtomicU64::new(0);

        let pid = Pid::this();
        let index = pid.get().cast_unsigned();
        let kept = ME.load(Ordering::Relaxed);
        if kept >> 32 == u64::from(index) {
            return OwnerId {
                index,
                generation: kept as u32,
            };
        }
        let Some(me) = Self::id_of(pid) else {
            panic!("the start time of this process cannot be read: is /proc mounted?");
        };
        ME.store(
            u64::from(index) << 32 | u64::from(me.generation),
            Ordering::Relaxed,
        );
        me
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        let Some(pid) = Pid::new(owner.index.cast_signed()) else {
            return false;
        };
        Self::id_of(pid) == Some(owner) && !process::is_zombie(pid).unwrap_or(true)
    }

    fn deaths(&self) -> &AtomicU32 {
        sync::no_deaths()
    }

    fn recheck_every(&self) -> Option<Duration> {
        Some(Duration::from_millis(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solo_owner_lives_while_its_process_does() {
        let me = SoloOwners.me();
        assert_eq!(me, SoloOwners.me());
        assert!(SoloOwners.is_alive(me));
        let tenant_before = OwnerId {
            generation: me.generation.wrapping_sub(1),
            ..me
        };
        assert!(!SoloOwners.is_alive(tenant_before));
        assert!(!SoloOwners.is_alive(OwnerId {
            index: 0,
            generation: 0
        }));

        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid::new(child.id().cast_signed()).unwrap();
        let id = SoloOwners::id_of(pid).unwrap();
        assert!(SoloOwners.is_alive(id));
        child.kill().unwrap();
        // Not reaped yet: a zombie is dead.
        while SoloOwners.is_alive(id) {
            std::thread::yield_now();
        }
        assert_eq!(SoloOwners::id_of(pid), Some(id));
        child.wait().unwrap();
        assert!(!SoloOwners.is_alive(id));
    }
}

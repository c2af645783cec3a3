//! Why a lock was not taken in good order: what all locks here have in common.

use crate::owner::OwnerId;
use std::fmt;
use std::ops::DerefMut;
use std::time::Duration;

/// The last owner died holding the lock; the caller holds it now, and what it protects is in doubt.
///
/// It is told once: unlocking says that all is well again.
///
/// What may have come of the value depends on what it is. A number is the old or the new one. A value whose every change is committed by one store, such as the
/// collections of netmcore-shm, is whole, but for one case: it was just being assigned as a whole (`*guard = other`), or moved, and has words of both. A container that
/// knows nothing of deaths, such as allocator-api2's `Vec`, may have been in the middle of any change. Neither is fit even to be dropped: put a new one in its
/// place by [`replace`](Self::replace). What the old one had in the heap stays there until the heap is gone.
pub struct OwnerDied<G> {
    /// Who died.
    pub owner: OwnerId,
    /// The lock, held by the caller.
    pub guard: G,
}

impl<G: DerefMut<Target: Sized>> OwnerDied<G> {
    /// Puts `value` in the place of the one in doubt, which is not dropped, and returns the guard.
    ///
    /// ```
    /// # fn reset(counts: &netmcore_sem::ShmMutex<[u64; 4]>) {
    /// let guard = counts.lock().unwrap_or_else(|died| died.replace([0; 4]));
    /// # drop(guard);
    /// # }
    /// ```
    ///
    /// # If a process dies
    ///
    /// The next to lock is told, and the value is in doubt as before.
    pub fn replace(mut self, value: G::Target) -> G {
        std::mem::forget(std::mem::replace(&mut *self.guard, value));
        self.guard
    }
}

impl<G> OwnerDied<G> {
    /// The same death, with the guard made into something else.
    pub(crate) fn map<H>(self, into: impl FnOnce(G) -> H) -> OwnerDied<H> {
        OwnerDied {
            owner: self.owner,
            guard: into(self.guard),
        }
    }
}

impl<G> fmt::Debug for OwnerDied<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnerDied")
            .field("owner", &self.owner)
            .finish_non_exhaustive()
    }
}

impl<G> fmt::Display for OwnerDied<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} died while it held the lock", self.owner)
    }
}

impl<G> std::error::Error for OwnerDied<G> {}

/// Why a lock was not taken in good order.
#[non_exhaustive]
pub enum LockError<G> {
    /// The lock is held, after a dead owner.
    OwnerDied(OwnerDied<G>),
    /// The calling thread holds it already, and the lock is of a kind that says so.
    WouldDeadlock,
    /// The deadline passed; the lock is not held.
    TimedOut {
        /// For how long the caller has waited.
        waited: Duration,
    },
}

impl<G> LockError<G> {
    /// The lock, if it is held: what it protects is in doubt then.
    pub fn into_guard(self) -> Option<G> {
        match self {
            LockError::OwnerDied(died) => Some(died.guard),
            LockError::WouldDeadlock | LockError::TimedOut { .. } => None,
        }
    }

    /// The same error, with the guard made into something else.
    pub(crate) fn map<H>(self, into: impl FnOnce(G) -> H) -> LockError<H> {
        match self {
            LockError::OwnerDied(died) => LockError::OwnerDied(died.map(into)),
            LockError::WouldDeadlock => LockError::WouldDeadlock,
            LockError::TimedOut { waited } => LockError::TimedOut { waited },
        }
    }
}

impl<G> From<OwnerDied<G>> for LockError<G> {
    fn from(died: OwnerDied<G>) -> LockError<G> {
        LockError::OwnerDied(died)
    }
}

impl<G> fmt::Debug for LockError<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::OwnerDied(died) => died.fmt(f),
            LockError::WouldDeadlock => f.write_str("WouldDeadlock"),
            LockError::TimedOut { waited } => {
                f.debug_struct("TimedOut").field("waited", waited).finish()
            }
        }
    }
}

impl<G> fmt::Display for LockError<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::OwnerDied(died) => died.fmt(f),
            LockError::WouldDeadlock => f.write_str("this thread holds the lock already"),
            LockError::TimedOut { waited } => {
                write!(f, "the lock was not free within {waited:?}")
            }
        }
    }
}

impl<G> std::error::Error for LockError<G> {}

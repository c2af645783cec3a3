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
//!
//! **Not here.** Which owners this process has, and under which id a thread acts: [`current`](crate::current).

use crate::current::fork_epoch;
use crate::sync::{self, AtomicU32, Ordering};
use netmcore_sys::futex::Deadline;
use netmcore_sys::process::{self, Pid};
use netmcore_sys::{Errno, SysError};
use std::cell::Cell;
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
///
/// Locks that are used without naming their owners take [`Current`](crate::Current): the owners that this process
/// has [installed](crate::current::install), else [`SoloOwners`].
pub trait Owners {
    /// The id under which the calling thread takes locks.
    ///
    /// Each thread has its own, or the threads of one process could not exclude each other. Asked through
    /// [`Current`](crate::Current), once for each thread and again after a fork.
    fn me(&self) -> OwnerId;

    /// Whether the owner may still run. False is final (invariant 2).
    ///
    /// Asked only when a lock was not free, so it may cost a system call. A supervisor that takes locks itself,
    /// and alone finds out about deaths, must really look here (a zombie is dead), or it would
    /// wait for its own report.
    fn is_alive(&self, owner: OwnerId) -> bool;

    /// The counter of deaths in shared memory, on which waiters sleep: see [`announce_death`].
    fn deaths(&self) -> &AtomicU32;

    /// How often one that waits for `owner` asks [`is_alive`](Self::is_alive) by itself, because nobody announces *its*
    /// death. `None`: a supervisor does.
    fn recheck_every(&self, owner: OwnerId) -> Option<Duration> {
        let _ = owner;
        None
    }

    /// How often one that waits for something without an owner (that a queue is filled) looks by itself, because nobody
    /// announces the death of one that has changed it and not woken anybody yet. One that waits for a lock does so too, because such a
    /// one may have taken the wake that was to be passed on. `None`: a supervisor announces all deaths.
    fn recheck(&self) -> Option<Duration> {
        None
    }

    /// How long a thread waits before it is told by [`sleeps`](Self::sleeps). `None`: it is not told.
    ///
    /// Long enough that the waits of good order, of which there are many, are not told; they cost nothing then.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// The calling thread has waited for longer than [`patience`](Self::patience), and is about to sleep again: for a live owner, or for
    /// something without an owner, without a deadline, and without looking by itself whether somebody has died. If nobody wakes it, it
    /// sleeps for ever: a supervisor that hears so of everybody has found a deadlock.
    fn sleeps(&self, on: Waiting) {
        let _ = on;
    }

    /// The sleep that was told by [`sleeps`](Self::sleeps) is over, whatever it was that woke the thread. It may be about to sleep again.
    fn wakes(&self) {}

    /// The calling thread, which had asked for [`me`](Self::me) through [`Current`](crate::Current), is about to end:
    /// it holds no lock under this id any more.
    ///
    /// Called after the destructors of the thread's own variables, which may drop guards. It does not come for threads that have leaked a guard: a
    /// reference from that may be used by other threads, so the id lives until the process is dead. Nor for threads that are killed with
    /// their process, for the first thread of a process that exits, and for the copy of a thread in a forked child.
    fn thread_ends(&self, me: OwnerId) {
        let _ = me;
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

    fn recheck_every(&self, owner: OwnerId) -> Option<Duration> {
        (**self).recheck_every(owner)
    }

    fn recheck(&self) -> Option<Duration> {
        (**self).recheck()
    }

    fn patience(&self) -> Option<Duration> {
        (**self).patience()
    }

    fn sleeps(&self, on: Waiting) {
        (**self).sleeps(on);
    }

    fn wakes(&self) {
        (**self).wakes();
    }

    fn thread_ends(&self, me: OwnerId) {
        (**self).thread_ends(me);
    }
}

/// What a thread waits for that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waiting {
    /// A lock.
    Lock {
        /// Where its word lies in this process.
        at: usize,
        /// Who held it when the sleep began.
        owner: OwnerId,
    },
    /// Something without an owner: a change of the state that belongs to a [`WaitWord`](crate::WaitWord).
    Event {
        /// Where its word lies in this process.
        at: usize,
    },
}

/// A wait that tells the owners of itself when it lasts.
pub(crate) struct Lasting {
    /// When it will have lasted for too long; `None` until the first sleep.
    told_from: Option<Deadline>,
}

impl Lasting {
    pub(crate) fn new() -> Lasting {
        Lasting { told_from: None }
    }

    /// Sleeps by `sleep` until a deadline that is `until` at the latest, and tells the owners if the wait lasts. One that ends
    /// or looks by itself is not told of.
    pub(crate) fn sleep<O: Owners + ?Sized>(
        &mut self,
        owners: &O,
        on: Waiting,
        until: Option<Deadline>,
        sleep: impl FnOnce(Option<Deadline>),
    ) {
        let (None, Some(patience)) = (until, owners.patience()) else {
            return sleep(until);
        };
        let told_from = *self
            .told_from
            .get_or_insert_with(|| Deadline::after(patience));
        if !told_from.is_past() {
            return sleep(Some(told_from));
        }
        owners.sleeps(on);
        sleep(None);
        owners.wakes();
    }
}

/// Tells all sleepers that somebody has died: counts `deaths` up and wakes them. The supervisor's second step.
pub fn announce_death(deaths: &AtomicU32) {
    deaths.fetch_add(1, Ordering::Release);
    sync::wake_all(deaths);
}

/// Owners without a supervisor: an owner is a thread, told apart by its id and the time at which it started.
///
/// For programs that share a lock without a master. Processes must see each other under the same ids (one pid
/// namespace) and have `/proc` mounted; where that hides the processes of other users (`hidepid`), an id that is in use again counts as alive. A death is noticed within 5 ms by those that wait, because each looks for itself. So is the end of a
/// thread; but one that has leaked a guard stays until its process is dead, if it has locked by way of [`Current`](crate::Current). A thread
/// that executes another program (`exec`) keeps its id and its locks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoloOwners;

/// How often those that wait look whether somebody has died.
const SOLO_RECHECK: Duration = Duration::from_millis(5);

impl SoloOwners {
    /// Indices of these owners are this plus a thread's id; a supervisor's are below. Linux's ids are below 2²².
    pub const INDEX_BASE: u32 = 1 << 29;

    /// The id of the thread `tid`, if it lives or is a zombie.
    fn id_of(tid: Pid) -> Option<OwnerId> {
        // Started at the same tick with the same id: not within 2³² ticks, 497 days. The low half is enough.
        let start = process::start_time(tid).ok()?;
        Some(OwnerId {
            index: SoloOwners::INDEX_BASE | tid.get().cast_unsigned(),
            generation: start as u32,
        })
    }
}

thread_local! {
    /// This thread's id, and the fork epoch in which it was read.
    static SOLO_ME: Cell<(u64, OwnerId)> = const {
        Cell::new((0, OwnerId { index: 0, generation: 0 }))
    };
}

impl Owners for SoloOwners {
    /// # Panics
    ///
    /// If `/proc` is not mounted.
    fn me(&self) -> OwnerId {
        let epoch = fork_epoch();
        let (epoch_then, me) = SOLO_ME.get();
        if epoch_then == epoch {
            return me;
        }
        let Some(me) = Self::id_of(Pid::this_thread()) else {
            panic!("the start time of this thread cannot be read: is /proc mounted?");
        };
        SOLO_ME.set((epoch, me));
        me
    }

    /// True of the ids of a supervisor, of which only that supervisor knows.
    fn is_alive(&self, owner: OwnerId) -> bool {
        let Some(tid) = owner.index.checked_sub(Self::INDEX_BASE) else {
            return true;
        };
        let Some(tid) = Pid::new(tid.cast_signed()) else {
            return false;
        };
        let state = || -> netmcore_sys::Result<bool> {
            let is_same = process::start_time(tid)? as u32 == owner.generation;
            Ok(is_same && !process::is_zombie(tid)?)
        };
        // Gone is only what the kernel says is gone. It says something else where descriptors or memory are short; and what it hides in
        // `/proc` (`hidepid`) it still does not deny: then whoever has the id is taken for the owner.
        let is_gone = |error: SysError| error.errno == Errno::ESRCH;
        state()
            .unwrap_or_else(|error| !is_gone(error) || !process::kill(tid, 0).is_err_and(is_gone))
    }

    fn deaths(&self) -> &AtomicU32 {
        sync::no_deaths()
    }

    fn recheck_every(&self, _: OwnerId) -> Option<Duration> {
        Some(SOLO_RECHECK)
    }

    fn recheck(&self) -> Option<Duration> {
        Some(SOLO_RECHECK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn solo_owner_lives_while_its_process_does() {
        let me = SoloOwners.me();
        assert_eq!(me, SoloOwners.me());
        assert!(me.index < OwnerId::INDEX_LIMIT);
        assert!(SoloOwners.is_alive(me));
        let tenant_before = OwnerId {
            generation: me.generation.wrapping_sub(1),
            ..me
        };
        assert!(!SoloOwners.is_alive(tenant_before));
        assert!(!SoloOwners.is_alive(OwnerId {
            index: SoloOwners::INDEX_BASE,
            generation: 0
        }));
        let supervised = OwnerId {
            index: 7,
            generation: 0,
        };
        assert!(SoloOwners.is_alive(supervised), "not ours to say");

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

    #[test]
    fn solo_owner_is_a_thread_and_ends_with_it() {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(SoloOwners.me()).unwrap();
            let _ = ended.recv();
        });
        let other = told.recv().unwrap();
        assert_ne!(other, SoloOwners.me());
        assert!(SoloOwners.is_alive(other));
        drop(end);
        thread.join().unwrap();
        // The kernel lets go of a thread a little after `join` returns.
        while SoloOwners.is_alive(other) {
            std::thread::yield_now();
        }
    }

    /// Says who it is, and keeps what it is told.
    struct Told {
        me: u32,
        deaths: AtomicU32,
        /// [`Owners::sleeps`] or [`Owners::wakes`].
        log: mpsc::Sender<Option<Waiting>>,
    }

    impl Owners for Told {
        fn me(&self) -> OwnerId {
            OwnerId {
                index: self.me,
                generation: 1,
            }
        }
        fn is_alive(&self, _: OwnerId) -> bool {
            true
        }
        fn deaths(&self) -> &AtomicU32 {
            &self.deaths
        }
        fn patience(&self) -> Option<Duration> {
            Some(Duration::from_millis(20))
        }
        fn sleeps(&self, on: Waiting) {
            self.log.send(Some(on)).unwrap();
        }
        fn wakes(&self) {
            self.log.send(None).unwrap();
        }
    }

    #[test]
    fn wait_that_lasts_is_told_and_no_other() {
        let (log, told) = mpsc::channel();
        let told_as = |me| Told {
            me,
            deaths: AtomicU32::new(0),
            log: log.clone(),
        };
        let (holder, waiter) = (told_as(0), told_as(1));
        let (word, event) = (crate::LockWord::new(), crate::WaitWord::new());
        let is_open = AtomicU32::new(0);
        let attempt = || (is_open.load(Ordering::SeqCst) == 1).then_some(());
        let open = || {
            is_open.store(1, Ordering::SeqCst);
            event.notify_all();
        };
        let held = word.lock(&holder).unwrap();

        // With a deadline, or looking by itself.
        let until = std::time::Instant::now() + Duration::from_millis(60);
        assert!(word.lock_deadline(&waiter, until).is_err());
        let until = Some(Deadline::after(Duration::from_millis(60)));
        assert!(event.wait(&waiter, None, until, attempt).is_none());
        let looks = Some(Duration::from_millis(1));
        std::thread::scope(|scope| {
            scope.spawn(|| event.wait(&waiter, looks, None, attempt));
            // sleep: nothing is to happen meanwhile.
            std::thread::sleep(Duration::from_millis(60));
            open();
        });
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));

        // Without.
        std::thread::scope(|scope| {
            scope.spawn(|| drop(word.lock(&waiter).unwrap()));
            let at = (&raw const word).addr();
            let owner = holder.me();
            assert_eq!(told.recv(), Ok(Some(Waiting::Lock { at, owner })));
            drop(held);
            assert_eq!(told.recv(), Ok(None));
        });
        is_open.store(0, Ordering::SeqCst);
        std::thread::scope(|scope| {
            scope.spawn(|| event.wait(&waiter, None, None, attempt));
            let at = (&raw const event).addr();
            assert_eq!(told.recv(), Ok(Some(Waiting::Event { at })));
            open();
            assert_eq!(told.recv(), Ok(None));
        });
    }
}

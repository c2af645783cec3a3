//! Who takes the locks in shared memory: every thread of the master and of its workers, known to all by the control block.
//!
//! **Protocol.** [`Threads`] are installed as the owners of the master's process before the first fork, and so of all workers. The
//! first thread of a process acts under its entry in the worker table, others under entries in the thread table. Children that a worker
//! has forked itself, and threads for which the table has no room, act without a supervisor: under their thread ids.
//!
//! | who ends | who says so | those that wait are woken |
//! |---|---|---|
//! | a worker, killed or not, that has taken a lock | the master, when it has been reaped | by the master |
//! | a worker that has not | – | not at all |
//! | a thread of a worker that has taken a lock | the thread itself; if it has leaked a guard, or is killed, the master with its worker | by either |
//! | a stranger: a process that is no worker | nobody | not: they look themselves, every 5 ms |
//!
//! The master would wait for its own report, so it looks at pids itself when it waits.
//!
//! Waits that last are noted in the worker table, as joins are, for the master to find deadlocks: see `Run::find_deadlock`. Those
//! that look by themselves, because of strangers, are not.
//!
//! # Safety
//! One call, which promises that what the owners say is true: the table above, and invariants 1 and 2 of the thread table.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use netmcore_sem::{OwnerId, Owners, SoloOwners, Waiting, current};
use netmcore_sys::process::{self, Pid};

use crate::context::{self, Role};
use crate::control::{Control, WaitsFor};
use crate::manage;

/// How often those that wait for something without an owner look whether a stranger has died in the middle of it, once there has
/// been a stranger.
const STRANGER_RECHECK: Duration = Duration::from_millis(50);
/// Waits that are over sooner are of no interest to one who looks for deadlocks: a round trip through another process takes less
/// than a tenth of this, and a deadlock can be told of so much later.
const PATIENCE: Duration = Duration::from_millis(20);
/// How often the master looks while it waits, in a hook.
const MASTER_RECHECK: Duration = Duration::from_millis(5);

thread_local! {
    static IS_FIRST_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// The owners of this process and its forks from now on; called by the thread that will fork.
pub(crate) fn install() {
    static THREADS: Threads = Threads;
    be_first_thread();
    // SAFETY: the tables of the control block, which all processes of the run share, give each thread an id that no other has or had; a worker is
    // said to be dead when it has been reaped, a thread when it tells so itself, last of all, and holding nothing.
    unsafe { current::install(&THREADS) };
}

/// In a newborn worker.
pub(crate) fn be_first_thread() {
    IS_FIRST_THREAD.set(true);
}

/// The threads of a run.
struct Threads;

fn control() -> Option<&'static Control> {
    context::runtime().map(|runtime| &runtime.control)
}

impl Owners for Threads {
    fn me(&self) -> OwnerId {
        let role = context::role();
        match (role, control()) {
            (Role::Worker | Role::Master, Some(control)) => {
                let process = context::me();
                if IS_FIRST_THREAD.get() {
                    return control.own_first_thread(process);
                }
                control.claim_thread(process).unwrap_or_else(|| {
                    control.note_stranger();
                    SoloOwners.me()
                })
            }
            (_, Some(control)) => {
                control.note_stranger();
                SoloOwners.me()
            }
            (_, None) => SoloOwners.me(),
        }
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        if owner.index >= SoloOwners::INDEX_BASE {
            return SoloOwners.is_alive(owner);
        }
        let Some(control) = control() else {
            return false;
        };
        match control.tenant(owner) {
            None => false,
            Some(worker) if context::role() == Role::Master && worker != context::me() => {
                // A worker that has ended and not been reaped: nobody but this process would do that.
                let pid = Pid::new(control.unix_pid(worker).cast_signed());
                pid.is_none_or(|pid| !process::is_zombie(pid).unwrap_or(true))
                    && control.tenant(owner).is_some()
            }
            Some(_) => true,
        }
    }

    fn deaths(&self) -> &AtomicU32 {
        static NONE: AtomicU32 = AtomicU32::new(0);
        control().map_or(&NONE, Control::deaths)
    }

    fn recheck_every(&self, owner: OwnerId) -> Option<Duration> {
        if owner.index >= SoloOwners::INDEX_BASE {
            return SoloOwners.recheck_every(owner);
        }
        (context::role() == Role::Master).then_some(MASTER_RECHECK)
    }

    fn recheck(&self) -> Option<Duration> {
        match control() {
            _ if context::role() == Role::Master => Some(MASTER_RECHECK),
            Some(control) if control.has_strangers() => Some(STRANGER_RECHECK),
            _ => None,
        }
    }

    fn patience(&self) -> Option<Duration> {
        (context::role() == Role::Worker).then_some(PATIENCE)
    }

    fn sleeps(&self, on: Waiting) {
        let on = match on {
            Waiting::Lock { at, owner } => {
                let at = at as u64;
                WaitsFor::Lock { at, owner }
            }
            Waiting::Event { at } => WaitsFor::Event { at: at as u64 },
            _ => return,
        };
        if let (Role::Worker, Some(runtime)) = (context::role(), context::runtime()) {
            manage::note_wait(runtime, Some(on));
        }
    }

    fn wakes(&self) {
        if let (Role::Worker, Some(runtime)) = (context::role(), context::runtime()) {
            manage::note_wait(runtime, None);
        }
    }

    fn thread_ends(&self, me: OwnerId) {
        if let (Role::Worker | Role::Master, Some(control)) = (context::role(), control()) {
            control.end_thread(me);
        }
    }
}

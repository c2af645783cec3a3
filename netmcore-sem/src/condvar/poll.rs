//! Waiting for a condvar in an event loop: [`CondvarPoll`], a descriptor that becomes readable with a notification.
//!
//! **Protocol.** Descriptors do not reach into other processes, and notifiers know no descriptors. So a thread of the waiting process, the
//! *helper*, waits on the condvar as others do, and rings an eventfd. What it shall do is its *order*:
//!
//! | order | the helper | goes to |
//! |---|---|---|
//! | watch since | sleeps on the condvar, the counter of deaths, and the word `orders` | rest, when the wait is over: it rings first |
//! | rest | sleeps on `orders` | watch, by [`arm`](CondvarPoll::arm) |
//! | end | ends | – |
//!
//! Who gives an order changes `orders` and wakes the helper. Order and bell are changed under one mutex of the process, so a ring never
//! belongs to an order that is no more.
//!
//! **Invariants.**
//! 1. The descriptor is readable only while the order is rest (or end).
//! 2. A notification that has woken the helper is not lost for others: the user has seen it (it has armed again after a ring), or it is passed on, when
//!    the handle is armed anew before the ring, or dropped.
//!
//! **If a process dies here.** The helper dies with it, as a waiter. A forked child has no helper: the handle's copy there only closes its
//! descriptor.
//!
//! # Safety
//!
//! In a forked child the descriptor is taken out of a structure that nobody else there can reach.

#![allow(unsafe_code)]

use super::{LOOK_EVERY, ShmCondvar, Since};
use crate::current::{Current, fork_epoch};
use crate::error::{Error, Result};
use crate::owner::Owners;
use netmcore_sys::futex::{self, Deadline, Woken};
use netmcore_sys::poll::EventFd;
use netmcore_sys::signal::{self, SignalSet};
use netmcore_sys::{Errno, SysError, crash_point};
use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// The helper calls nothing deep.
const HELPER_STACK_BYTES: usize = 256 * 1024;

/// A wait on a [`ShmCondvar`] that an event loop can poll: a descriptor that is readable once the condvar has been notified, by whatever
/// process, since the handle was armed.
///
/// A new handle is armed. When it is readable, look at the condition under the mutex, and if it is not as wanted, [`arm`](Self::arm)
/// again before unlocking. The descriptor is for `poll`, `epoll` and the like; do not read from it. A limit of the wait is that of the poll.
///
/// An armed handle is a waiter as others are: a [`notify_one`](ShmCondvar::notify_one) may go to it. A handle that is dropped before
/// it was looked at passes the notification on.
///
/// Each handle has a thread of its own, until it is dropped; so make none in a master, which must not have threads.
///
/// # If a process dies
///
/// Each death that is announced makes it readable, as it ends every wait: look at the condition. Without a supervisor it becomes readable after
/// 20 ms in any case.
///
/// # Forked children
///
/// In a forked child a copy of the handle is never armed again, and the descriptor is that of the parent.
///
/// # Example
///
/// ```
/// use netmcore_sem::{ShmCondvar, ShmMutex, condvar::CondvarPoll};
/// use std::os::fd::AsFd;
/// use std::sync::Arc;
///
/// // A `ShmArc` in shared memory, as a rule.
/// let shared = Arc::new((ShmMutex::new(0), ShmCondvar::new()));
/// let poll = CondvarPoll::new(shared.clone(), |shared| &shared.1).unwrap();
/// let notifier = std::thread::spawn({
///     let shared = shared.clone();
///     move || {
///         *shared.0.lock().unwrap() = 5;
///         shared.1.notify_one();
///     }
/// });
/// loop {
///     let value = shared.0.lock().unwrap();
///     if *value == 5 {
///         break;
///     }
///     poll.arm();
///     drop(value);
///     netmcore_sys::poll::wait_readable(poll.as_fd(), None).unwrap(); // the event loop
/// }
/// notifier.join().unwrap();
/// ```
#[doc(alias = "Netmcore_condition.wait_e")]
pub struct CondvarPoll {
    shared: Arc<Shared>,
    /// `None` once it has been joined, or in a forked child.
    helper: Option<JoinHandle<()>>,
    epoch: u64,
}

/// What the handle and its helper share.
struct Shared {
    source: Box<dyn Source>,
    bell: EventFd,
    state: Mutex<State>,
    /// Counts orders; the helper sleeps on it.
    orders: AtomicU32,
}

struct State {
    order: Order,
    /// Whether the bell has been rung, and nobody has armed since.
    has_rung: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Watch(Since),
    Rest,
    End,
}

/// Whatever keeps the condvar where it is.
trait Source: Send + Sync {
    fn condvar(&self) -> &ShmCondvar;
}

struct Selected<P, F> {
    owner: P,
    select: F,
}

impl<P, F> Source for Selected<P, F>
where
    P: Deref + Send + Sync,
    F: Fn(&P::Target) -> &ShmCondvar + Send + Sync,
{
    fn condvar(&self) -> &ShmCondvar {
        (self.select)(&self.owner)
    }
}

impl ShmCondvar {
    /// A wait that an event loop can poll; it counts from now. For a condvar that some owner keeps, see [`CondvarPoll::new`].
    ///
    /// # Errors
    ///
    /// [`Error::System`] without free descriptors or threads.
    #[doc(alias = "Netmcore_condition.wait_e")]
    pub fn poll_handle(&'static self) -> Result<CondvarPoll> {
        CondvarPoll::new(self, |condvar| condvar)
    }
}

impl CondvarPoll {
    /// A wait that an event loop can poll, on the condvar that `select` finds behind `owner`; it counts from now.
    ///
    /// The handle keeps the owner until it is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::System`] without free descriptors or threads.
    pub fn new<P, F>(owner: P, select: F) -> Result<CondvarPoll>
    where
        P: Deref + Send + Sync + 'static,
        F: Fn(&P::Target) -> &ShmCondvar + Send + Sync + 'static,
    {
        let bell = EventFd::new().map_err(cannot("make a bell for a condvar"))?;
        let source = Box::new(Selected { owner, select });
        let state = State {
            order: Order::Watch(source.condvar().now()),
            has_rung: false,
        };
        let shared = Arc::new(Shared {
            source,
            bell,
            state: Mutex::new(state),
            orders: AtomicU32::new(0),
        });
        let helper = start_helper(shared.clone())
            .map_err(cannot("start a thread that waits for a condvar"))?;
        Ok(CondvarPoll {
            shared,
            helper: Some(helper),
            epoch: fork_epoch(),
        })
    }

    /// Counts from now on: the descriptor is not readable until the condvar is notified again. Says whether it was readable.
    ///
    /// Call it with the mutex held, before or after looking at the condition: then nothing is missed. If it was readable, the notification
    /// has been this handle's, and whoever looks has had it.
    ///
    /// # Panics
    ///
    /// In a forked child of the process that made the handle.
    pub fn arm(&self) -> bool {
        assert!(
            self.epoch == fork_epoch(),
            "a handle of a condvar is armed in a forked child"
        );
        let condvar = self.shared.source.condvar();
        let mut state = self.shared.state();
        let since = condvar.now();
        let was_ready = std::mem::take(&mut state.has_rung);
        if was_ready {
            // None that Linux knows.
            let _ = self.shared.bell.drain();
        }
        let mut is_to_pass_on = false;
        if let Order::Watch(before) = state.order {
            if before == since {
                return was_ready;
            }
            is_to_pass_on = true;
        }
        state.order = Order::Watch(since);
        self.shared.give_order(state);
        if is_to_pass_on {
            // Invariant 2. It may come back to this handle, which will ring then.
            condvar.notify_one();
        }
        was_ready
    }

    /// Whether the descriptor is readable.
    pub fn is_ready(&self) -> bool {
        self.epoch == fork_epoch() && self.shared.state().has_rung
    }
}

fn cannot(doing: &'static str) -> impl FnOnce(SysError) -> Error {
    move |source| Error::System {
        doing: doing.to_owned(),
        source,
    }
}

/// Starts the helper with all signals blocked: they are for the threads of the program.
fn start_helper(shared: Arc<Shared>) -> std::result::Result<JoinHandle<()>, SysError> {
    let mask = signal::block(&SignalSet::all())?;
    let helper = thread::Builder::new()
        .name("netmcore-condvar".to_owned())
        .stack_size(HELPER_STACK_BYTES)
        .spawn(move || shared.help());
    signal::set_mask(&mask)?;
    helper.map_err(|error| SysError::new("pthread_create", "", Errno::from_io(&error)))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that panics is done under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_order(&self, state: MutexGuard<'_, State>) {
        self.orders.fetch_add(1, Ordering::Release);
        drop(state);
        futex::wake_all(&self.orders);
    }

    fn help(&self) {
        loop {
            let orders_seen = self.orders.load(Ordering::Acquire);
            let order = self.state().order;
            match order {
                Order::Watch(since) => self.watch(since, orders_seen),
                Order::Rest => {
                    futex::wait(&self.orders, orders_seen, None);
                }
                Order::End => return,
            }
        }
    }

    /// One sleep, unless the wait is over.
    fn watch(&self, since: Since, orders_seen: u32) {
        let condvar = self.source.condvar();
        // As `WaitWord::wait` does it.
        let deaths_seen = Current.deaths().load(Ordering::Acquire);
        let announced = condvar.word.announce();
        crash_point!("sem.poll.announced");
        if condvar.is_over(since) {
            return self.ring(since);
        }
        let words = [
            (condvar.word.futex(), announced),
            (Current.deaths(), deaths_seen),
            (&self.orders, orders_seen),
        ];
        let look = Current.recheck().map(|_| Deadline::after(LOOK_EVERY));
        if futex::wait_any(words, look) == Woken::TimedOut {
            self.ring(since);
        }
        crash_point!("sem.poll.woken");
    }

    fn ring(&self, since: Since) {
        let mut state = self.state();
        if state.order == Order::Watch(since) {
            state.order = Order::Rest;
            state.has_rung = true;
            // None that Linux knows.
            let _ = self.bell.ring();
        }
    }
}

impl Drop for CondvarPoll {
    fn drop(&mut self) {
        if self.epoch != fork_epoch() {
            let bell = self.shared.bell.as_fd().as_raw_fd();
            // So that nobody else closes it.
            std::mem::forget(self.shared.clone());
            // SAFETY: the descriptor is open. The helper does not exist in this process, and the structure is never dropped
            // here, so nobody else uses or closes it.
            drop(unsafe { OwnedFd::from_raw_fd(bell) });
            // The thread is the parent's: joining or detaching it means nothing here.
            std::mem::forget(self.helper.take());
            return;
        }
        let mut state = self.shared.state();
        let before = std::mem::replace(&mut state.order, Order::End);
        self.shared.give_order(state);
        if let Some(helper) = self.helper.take() {
            // It does not panic, and sleeps on nothing but what has just been woken.
            let _ = helper.join();
        }
        let condvar = self.shared.source.condvar();
        let is_to_pass_on = match before {
            Order::Watch(since) => condvar.is_over(since),
            Order::Rest | Order::End => self.shared.state().has_rung,
        };
        if is_to_pass_on {
            condvar.notify_one();
        }
    }
}

impl AsFd for CondvarPoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }
}

impl AsRawFd for CondvarPoll {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.bell.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for CondvarPoll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CondvarPoll")
            .field("fd", &self.as_raw_fd())
            .field("is_ready", &self.is_ready())
            .finish_non_exhaustive()
    }
}

//! A place where a known number of threads wait for each other, again and again: [`ShmBarrier`].
//!
//! **Protocol.** The *phase* counts how often all have met. Each participant has a seat: who it is, and in how many phases it has *arrived*.
//!
//! | seat: owner | arrived | means | its owner died |
//! |---|---|---|---|
//! | 0 | 0 | nobody has come yet | – |
//! | owner | phase | it has yet to arrive | the others' waits end with an error, until somebody takes the seat |
//! | owner | phase + 1 | it waits for the others | it has arrived all the same; the next phase waits for it, and fails |
//! | owner, gone | as above | it has dropped its guard in a panic, which is told as a death | – |
//! | left | any | it has left in order: nobody waits for it | – |
//!
//! * To arrive: store `arrived`. Then everybody who waits looks at all seats, and the first to see that all have arrived counts the phase up by
//!   one CAS: that one is the leader. So a death between any two steps leaves it to the next one who looks.
//! * Who waits is told of a death at once, though others have yet to arrive: they may wait for the dead one, too.
//! * To come: CAS a seat from 0, or from an owner that is dead or gone, whose arrival, if it had arrived, then counts as that of the new one.
//!
//! **Invariants.**
//! 1. A seat becomes left or gone by its owner only, by CAS: one that is taken to be dead may have lost it.
//! 2. `arrived` is written by the seat's owner only, and is the phase or one more.
//! 3. The phase is counted up only while all seats have arrived in it or are left.
//!
//! **If a process dies here.** The table.
//!
//! **Not here.** Participants whose number is not known in advance.

use crate::current::{Current, fork_epoch};
use crate::owner::{OwnerId, Owners};
use crate::sync::{AtomicU32, AtomicU64, Ordering, const_fn, fence_in_models};
use crate::wait::{Asks, WaitWord};
use crate::word::{held_by, owner_of};
use netmcore_sys::crash_point;
use netmcore_sys::futex::Deadline;
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

const EMPTY: u64 = 0;
/// No owner: its index would be too large.
const LEFT: u64 = u64::MAX;
/// Beside an owner, where its lock words have the mark of contention.
const GONE: u64 = 1 << 31;

/// A barrier in shared memory for a number of participants that is said when it is made; `SEATS` at most.
///
/// Each participant [joins](Self::join) once, and then [waits](ShmParticipant::wait) as often as it likes: each wait ends when all have come to theirs.
///
/// # If a process dies
///
/// A participant that dies before it has arrived ends the waits of the others with [`BarrierError::ParticipantDied`]; so do all later waits, until
/// another thread joins in its place. A participant that leaves in order, by dropping its guard, is not waited for any more.
/// One that has not joined yet is not known: give a deadline where it may die before.
///
/// ```
/// use netmcore_sem::ShmBarrier;
///
/// let barrier = <ShmBarrier>::new(3);
/// std::thread::scope(|scope| {
///     let others = [(); 2].map(|()| scope.spawn(|| barrier.join().unwrap().wait().unwrap().is_leader()));
///     let leaders = usize::from(barrier.join().unwrap().wait().unwrap().is_leader());
///     let others = others.map(|other| usize::from(other.join().unwrap()));
///     assert_eq!(leaders + others.iter().sum::<usize>(), 1);
/// });
/// assert!(barrier.join().is_err(), "three have joined");
/// ```
pub struct ShmBarrier<const SEATS: usize = 32> {
    participants: AtomicU32,
    waiters: WaitWord,
    phase: AtomicU64,
    seats: [Seat; SEATS],
}

struct Seat {
    owner: AtomicU64,
    arrived: AtomicU64,
}

impl Seat {
    const_fn! {
        fn new() -> Seat {
            Seat {
                owner: AtomicU64::new(EMPTY),
                arrived: AtomicU64::new(0),
            }
        }
    }
}

/// Why a barrier did not let a participant pass. Waiting again goes on with the same phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BarrierError {
    /// Somebody who had joined died, panicked, or ended without leaving, before it arrived.
    #[error("{owner} died before it arrived at the barrier; another thread may join in its place")]
    ParticipantDied {
        /// Who it was, one of several perhaps.
        owner: OwnerId,
    },
    /// The deadline passed. The caller has arrived all the same.
    #[error("the others did not arrive at the barrier within {waited:?}")]
    TimedOut {
        /// For how long the caller has waited.
        waited: Duration,
    },
    /// All have joined.
    #[error("all {participants} participants have joined the barrier, and none of them has died")]
    Full {
        /// How many.
        participants: u32,
    },
}

/// How a wait at a barrier ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarrierPass {
    is_leader: bool,
}

impl BarrierPass {
    /// True for one of the participants in each phase; for none if that one is killed in the moment.
    pub fn is_leader(self) -> bool {
        self.is_leader
    }
}

/// How things stand for one that waits.
enum Look {
    Passed(BarrierPass),
    Died(OwnerId),
    Waiting,
}

#[cfg(not(loom))]
impl<const SEATS: usize> ShmBarrier<SEATS> {
    /// A barrier for so many participants.
    ///
    /// # Panics
    ///
    /// If they are none, or more than there are seats.
    pub const fn new(participants: u32) -> ShmBarrier<SEATS> {
        check_participants(participants, SEATS);
        ShmBarrier {
            participants: AtomicU32::new(participants),
            waiters: WaitWord::new(),
            phase: AtomicU64::new(0),
            seats: [const { Seat::new() }; SEATS],
        }
    }
}

#[cfg(loom)]
impl<const SEATS: usize> ShmBarrier<SEATS> {
    /// A barrier for so many participants.
    pub fn new(participants: u32) -> ShmBarrier<SEATS> {
        check_participants(participants, SEATS);
        ShmBarrier {
            participants: AtomicU32::new(participants),
            waiters: WaitWord::new(),
            phase: AtomicU64::new(0),
            seats: std::array::from_fn(|_| Seat::new()),
        }
    }
}

const fn check_participants(participants: u32, seats: usize) {
    assert!(participants >= 1, "a barrier has at least one participant");
    assert!(
        participants as usize <= seats,
        "a barrier has at most as many participants as its type has seats"
    );
}

impl<const SEATS: usize> ShmBarrier<SEATS> {
    /// For how many participants it is.
    pub fn participants(&self) -> u32 {
        self.participants.load(Ordering::Relaxed)
    }

    /// How often all have met.
    pub fn phase(&self) -> u64 {
        self.phase.load(Ordering::SeqCst)
    }

    /// Makes the calling thread one of the participants, until the guard is dropped.
    ///
    /// It takes a seat that nobody has had, else that of one that has died: if that one had arrived, so has the caller.
    ///
    /// # Errors
    ///
    /// [`BarrierError::Full`] if all have joined, and none of them is dead.
    pub fn join(&self) -> Result<ShmParticipant<'_, SEATS>, BarrierError> {
        let mine = held_by(Current.me());
        let dead = |seat: &Seat| {
            let owner = seat.owner.load(Ordering::SeqCst);
            died(owner, Asks::WhoLives).map(|_| owner)
        };
        let empty = |seat: &Seat| (seat.owner.load(Ordering::SeqCst) == EMPTY).then_some(EMPTY);
        for is_free in [&empty as &dyn Fn(&Seat) -> Option<u64>, &dead] {
            for (number, seat) in self.seats().iter().enumerate() {
                let Some(owner) = is_free(seat) else { continue };
                let taken =
                    seat.owner
                        .compare_exchange(owner, mine, Ordering::SeqCst, Ordering::SeqCst);
                if taken.is_ok() {
                    crash_point!("sem.barrier.joined");
                    // Of a dead one, which may have arrived.
                    let arrived = seat.arrived.load(Ordering::SeqCst);
                    let is_ahead = arrived > self.phase.load(Ordering::SeqCst);
                    return Ok(ShmParticipant {
                        barrier: self,
                        number,
                        mine,
                        waits_for: Cell::new(is_ahead.then(|| arrived - 1)),
                        epoch: fork_epoch(),
                        not_send: PhantomData,
                    });
                }
            }
        }
        Err(BarrierError::Full {
            participants: self.participants(),
        })
    }

    fn seats(&self) -> &[Seat] {
        &self.seats[..self.participants() as usize]
    }

    /// Looks at all seats, for one that has arrived in `phase`, and lets all pass if they have arrived too.
    fn look(&self, phase: u64, asks: Asks) -> Look {
        if self.phase.load(Ordering::SeqCst) > phase {
            return Look::Passed(BarrierPass { is_leader: false });
        }
        let (mut dead, mut is_awaited) = (None, false);
        for seat in self.seats() {
            let owner = seat.owner.load(Ordering::SeqCst);
            if owner == LEFT || seat.arrived.load(Ordering::SeqCst) > phase {
                continue;
            }
            match died(owner, asks) {
                None => is_awaited = true,
                died => dead = died,
            }
        }
        if let Some(owner) = dead {
            return Look::Died(owner);
        }
        if is_awaited {
            return Look::Waiting;
        }
        crash_point!("sem.barrier.all_arrived");
        let passed =
            self.phase
                .compare_exchange(phase, phase + 1, Ordering::SeqCst, Ordering::SeqCst);
        if passed.is_ok() {
            crash_point!("sem.barrier.passed");
            self.waiters.notify_all();
        }
        Look::Passed(BarrierPass {
            is_leader: passed.is_ok(),
        })
    }
}

/// Who had the seat, if it does not come any more, and has not left in order.
fn died(seat: u64, asks: Asks) -> Option<OwnerId> {
    let owner = owner_of(seat).filter(|_| seat != LEFT)?;
    (seat & GONE != 0 || asks.is_dead(owner)).then_some(owner)
}

impl<const SEATS: usize> fmt::Debug for ShmBarrier<SEATS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmBarrier")
            .field("participants", &self.participants())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}

/// One of the participants of a [`ShmBarrier`]. Dropping it leaves the barrier, in order: the others do not wait for it any more. (Dropping it in a
/// panic does not: the others are told that it died.)
///
/// It belongs to the thread that joined. A forked copy of it is nobody.
///
/// ```compile_fail,E0277
/// let barrier = <netmcore_sem::ShmBarrier>::new(1);
/// let me = barrier.join().unwrap();
/// std::thread::scope(|scope| {
///     scope.spawn(move || drop(me)); // another thread
/// });
/// ```
#[must_use = "the barrier is left when it is dropped"]
pub struct ShmParticipant<'a, const SEATS: usize = 32> {
    barrier: &'a ShmBarrier<SEATS>,
    number: usize,
    /// Whose seat it is.
    mine: u64,
    /// The phase in which it has arrived, and has not passed as far as it knows.
    waits_for: Cell<Option<u64>>,
    epoch: u64,
    not_send: PhantomData<*const ()>,
}

impl<const SEATS: usize> ShmParticipant<'_, SEATS> {
    /// Arrives, and waits until all others have, without limit. After an error it waits on for the same phase.
    ///
    /// # Errors
    ///
    /// [`BarrierError::ParticipantDied`].
    ///
    /// # Panics
    ///
    /// In a forked copy.
    ///
    /// # Blocking
    ///
    /// Until all have arrived: spins briefly, then sleeps.
    ///
    /// # If a process dies
    ///
    /// Before it has arrived: the others are told. After that: the others pass.
    pub fn wait(&self) -> Result<BarrierPass, BarrierError> {
        self.wait_until(None)
    }

    /// As [`wait`](Self::wait), until `deadline` at most.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait), and [`BarrierError::TimedOut`]: it has arrived all the same.
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Blocking
    ///
    /// As [`wait`](Self::wait), until the deadline. With a deadline in the past: not at all.
    pub fn wait_deadline(&self, deadline: Instant) -> Result<BarrierPass, BarrierError> {
        self.wait_until(Some(deadline))
    }

    fn wait_until(&self, deadline: Option<Instant>) -> Result<BarrierPass, BarrierError> {
        assert!(
            self.epoch == fork_epoch(),
            "this participant is a forked copy: the parent process has joined the barrier"
        );
        let barrier = self.barrier;
        let phase = self.waits_for.get().unwrap_or_else(|| {
            // While it has not arrived the phase stays.
            let phase = barrier.phase.load(Ordering::SeqCst);
            let arrived = &barrier.seats[self.number].arrived;
            arrived.store(phase + 1, Ordering::SeqCst);
            self.waits_for.set(Some(phase));
            crash_point!("sem.barrier.arrived");
            phase
        });
        let started = Instant::now();
        let look = |asks| {
            fence_in_models();
            match barrier.look(phase, asks) {
                Look::Passed(pass) => Some(Ok(pass)),
                Look::Died(owner) => Some(Err(BarrierError::ParticipantDied { owner })),
                Look::Waiting => None,
            }
        };
        let until = deadline.map(Deadline::from);
        let outcome = (barrier.waiters).wait_asking(&Current, None, until, look);
        if let Some(Ok(_)) = outcome {
            self.waits_for.set(None);
        }
        outcome.unwrap_or_else(|| {
            Err(BarrierError::TimedOut {
                waited: started.elapsed(),
            })
        })
    }
}

impl<const SEATS: usize> Drop for ShmParticipant<'_, SEATS> {
    fn drop(&mut self) {
        if self.epoch == fork_epoch() {
            let owner = &self.barrier.seats[self.number].owner;
            let after = match std::thread::panicking() {
                false => LEFT,
                true => self.mine | GONE,
            };
            let left =
                owner.compare_exchange(self.mine, after, Ordering::SeqCst, Ordering::Relaxed);
            crash_point!("sem.barrier.left");
            if left.is_ok() {
                self.barrier.waiters.notify_all();
            }
        }
    }
}

impl<const SEATS: usize> fmt::Debug for ShmParticipant<'_, SEATS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmParticipant")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

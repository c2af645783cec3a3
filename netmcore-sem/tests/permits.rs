//! Guards against read locks, permits and seats that are lost with their holder or counted twice, and against waiting for the dead.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.
//!
//! # Safety
//!
//! Shared memory is mapped for ever and starts as zeros, which are free locks without permits and valid numbers. Barriers, which are
//! not zeros, are written before anybody else knows of them.

#![allow(unsafe_code)]

#[path = "support/crowd.rs"]
mod crowd;
mod support;

use crowd::{Crowd, zeroed};
use netmcore_sem::current::uninstall;
use netmcore_sem::{
    BarrierError, LockError, OwnerId, ShmBarrier, ShmEvent, ShmOnce, ShmOnceCell, ShmReadGuard,
    ShmRwLock, ShmSemaphore, ShmWriteGuard,
};
use netmcore_sys::crash;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use support::{Child, PATIENCE, fork, wait_until};

const VICTIM: u32 = 1;
const PERMITS: u32 = 3;
/// Few, so that they are all taken at times.
const READERS: usize = 3;
const HOLDERS: usize = 3;

/// All in shared memory, zeros at first.
#[repr(C)]
struct Shared {
    lock: ShmRwLock<[u64; 2], READERS>,
    semaphore: ShmSemaphore<HOLDERS>,
    event: ShmEvent,
    once: ShmOnce,
    cell: ShmOnceCell<[u64; 2]>,
    stop: AtomicU32,
    told: AtomicU64,
    /// Permits in use, as those that use them count.
    used: AtomicU32,
    progress: [AtomicU64; 16],
}

fn shared() -> &'static Shared {
    // SAFETY: zeros are free locks around zeros, and zeros.
    let shared: &Shared = unsafe { zeroed() };
    shared.semaphore.post(PERMITS);
    shared
}

type ReadGuard = ShmReadGuard<'static, [u64; 2], READERS>;
type WriteGuard = ShmWriteGuard<'static, [u64; 2], READERS>;

/// Whatever there is to tell.
fn read(shared: &'static Shared) -> (Option<OwnerId>, ReadGuard) {
    match shared.lock.read() {
        Ok(guard) => (None, guard),
        Err(LockError::OwnerDied(died)) => (Some(died.owner), died.guard),
        Err(other) => panic!("{other:?}"),
    }
}

/// Repairs what a dead one has left.
fn write(shared: &'static Shared) -> (Option<OwnerId>, WriteGuard) {
    match shared.lock.write() {
        Ok(guard) => (None, guard),
        Err(LockError::OwnerDied(died)) => {
            let mut guard = died.guard;
            guard[1] = guard[0];
            shared.told.fetch_add(1, SeqCst);
            (Some(died.owner), guard)
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn check_whole(value: &[u64; 2]) {
    assert_eq!(value[0], value[1], "half changed, and nobody was told");
}

fn count_up(value: &mut [u64; 2]) {
    check_whole(value);
    value[0] += 1;
    std::hint::spin_loop();
    value[1] += 1;
}

/// Holds what `take` gives until it is killed.
fn holder<G>(take: impl FnOnce() -> G) -> Child {
    fork(|| {
        let _guard = take();
        // sleep: until it is killed.
        std::thread::sleep(PATIENCE);
    })
}

/// A waiter sleeps for a victim that is killed; what it took comes to the waiter.
fn comes_back(crowd: &Crowd, victim: Child, wait: impl FnOnce()) {
    let waiter = fork(wait);
    crowd::sleeping(&waiter);
    victim.kill();
    assert!(!victim.ended_well());
    let settled = Instant::now();
    crowd.settle_death(victim.pid);
    assert!(waiter.ended_well());
    eprintln!("{:?} after the announcement", settled.elapsed());
}

fn what_the_dead_held_comes_to_those_that_wait() {
    let crowd = Crowd::install();
    let shared = shared();
    // A reader: nobody is told.
    let victim = holder(|| (shared.lock.read(), shared.lock.read()));
    wait_until("it reads", || shared.lock.reader_count() == 2);
    comes_back(crowd, victim, || assert_eq!(write(shared).0, None));
    assert_eq!(shared.lock.reader_count(), 0);
    // A writer: readers are told until a writer has been.
    let victim = holder(|| {
        let mut guard = shared.lock.write().unwrap();
        guard[0] = 7;
        guard
    });
    wait_until("it writes", || shared.lock.writer().is_some());
    let dead = shared.lock.writer();
    comes_back(crowd, victim, || assert_eq!(read(shared).0, dead));
    assert!(shared.lock.is_in_doubt());
    assert_eq!(read(shared).0, dead);
    assert_eq!(write(shared).0, dead);
    assert_eq!(read(shared).0, None);
    // Permits.
    let victim = holder(|| shared.semaphore.acquire(2));
    wait_until("it has them", || shared.semaphore.available() == 1);
    comes_back(crowd, victim, || {
        assert_eq!(shared.semaphore.acquire(3).count(), 3)
    });
    assert_eq!(shared.semaphore.available(), PERMITS);
    assert_eq!(shared.semaphore.holders(), []);
    // Something that is done once.
    let victim = holder(|| {
        shared.once.call_once(|| {
            shared.used.store(77, SeqCst);
            // sleep: until it is killed.
            std::thread::sleep(PATIENCE);
        })
    });
    wait_until("it does it", || shared.used.load(SeqCst) == 77);
    comes_back(crowd, victim, || {
        let mut died = None;
        shared.once.call_once_force(|state| died = state.died());
        assert!(died.is_some());
    });
    assert!(shared.once.is_completed());
    shared.once.call_once(|| panic!("done already"));
}

/// The same without a supervisor: those that wait look for themselves.
fn what_dead_strangers_held_comes_back() {
    uninstall();
    let shared = shared();
    let victims = [
        holder(|| shared.lock.read().unwrap()),
        holder(|| shared.semaphore.acquire(3)),
    ];
    wait_until("they have it", || {
        shared.lock.reader_count() == 1 && shared.semaphore.available() == 0
    });
    let waiters = [
        fork(|| assert_eq!(write(shared).0, None)),
        fork(|| drop(shared.semaphore.acquire(1))),
    ];
    waiters.iter().for_each(crowd::sleeping);
    victims.iter().for_each(Child::kill);
    assert!(victims.iter().all(|victim| !victim.ended_well()));
    let killed = Instant::now();
    assert!(waiters.iter().all(Child::ended_well));
    eprintln!("{:?} after the deaths", killed.elapsed());
}

fn a_thread_does_not_wait_for_itself() {
    let _crowd = Crowd::install();
    let shared = shared();
    let soon = || Instant::now() + Duration::from_millis(20);
    let one = shared.lock.read().unwrap();
    assert!(matches!(shared.lock.write(), Err(LockError::WouldDeadlock)));
    assert!(matches!(
        shared.lock.try_write(),
        Err(LockError::WouldDeadlock)
    ));
    // A writer waits for the reader; the reader may read again all the same, others may not.
    let writer = fork(|| count_up(&mut write(shared).1));
    wait_until("it waits", || shared.lock.writer().is_some());
    let two = shared.lock.read().unwrap();
    let other = fork(|| {
        assert!(shared.lock.try_read().unwrap().is_none());
        assert!(matches!(
            shared.lock.read_deadline(soon()),
            Err(LockError::TimedOut { .. })
        ));
        assert!(shared.lock.try_write().unwrap().is_none());
        assert!(matches!(
            shared.lock.write_deadline(soon()),
            Err(LockError::TimedOut { .. })
        ));
    });
    assert!(other.ended_well());
    drop((one, two));
    assert!(writer.ended_well());
    // A writer that gives up waiting lets readers in again.
    let one = shared.lock.read().unwrap();
    let impatient = fork(|| {
        assert!(matches!(
            shared.lock.write_deadline(soon()),
            Err(LockError::TimedOut { .. })
        ));
    });
    assert!(impatient.ended_well());
    assert!(fork(|| drop(shared.lock.read().unwrap())).ended_well());
    drop(one);
    let all = [(); READERS].map(|()| shared.lock.read().unwrap());
    assert!(matches!(shared.lock.read(), Err(LockError::WouldDeadlock)));
    assert!(fork(|| assert!(shared.lock.try_read().unwrap().is_none())).ended_well());
    drop(all);
    let guard = shared.lock.write().unwrap();
    assert!(matches!(shared.lock.read(), Err(LockError::WouldDeadlock)));
    assert!(matches!(shared.lock.write(), Err(LockError::WouldDeadlock)));
    let reader = ShmWriteGuard::downgrade(guard);
    assert!(fork(|| check_whole(&shared.lock.read().unwrap())).ended_well());
    drop(reader);
    assert_eq!(shared.lock.read().unwrap()[0], 1);
}

/// More readers and holders than there are places, in threads of several processes: nobody is lost.
fn places_that_are_used_up_are_waited_for() {
    let crowd = Crowd::install();
    let shared = shared();
    let crowd_of = || {
        fork(|| {
            std::thread::scope(|scope| {
                for _ in 0..5 {
                    scope.spawn(|| {
                        for round in 0..300 {
                            let (_, guard) = read(shared);
                            check_whole(&guard);
                            drop(guard);
                            if round % 10 == 0 {
                                count_up(&mut write(shared).1);
                            }
                            let permit = shared.semaphore.acquire(1 + round % 2);
                            let used = shared.used.fetch_add(permit.count(), SeqCst);
                            assert!(used + permit.count() <= PERMITS);
                            shared.used.fetch_sub(permit.count(), SeqCst);
                        }
                    });
                }
            });
        })
    };
    let children = [crowd_of(), crowd_of()];
    assert!(children.iter().all(Child::ended_well));
    assert_eq!(read(shared).1[0], 2 * 5 * 30);
    assert_eq!(shared.semaphore.available(), PERMITS);
    // The places are those of the dead, all of them.
    let victims: Vec<Child> = (0..READERS)
        .map(|_| holder(|| (shared.lock.read(), shared.semaphore.acquire(1))))
        .collect();
    wait_until("all places are taken", || {
        shared.lock.reader_count() == READERS && shared.semaphore.available() == 0
    });
    assert!(shared.lock.try_read().unwrap().is_none());
    for victim in &victims {
        crowd.kill(victim);
    }
    drop(shared.lock.read().unwrap());
    drop(shared.semaphore.acquire(PERMITS));
}

fn forked_copies_hold_nothing() {
    let _crowd = Crowd::install();
    let shared = shared();
    let (reader, permits) = (shared.lock.read().unwrap(), shared.semaphore.acquire(2));
    let mut copies = Some((reader, permits));
    let child = fork(|| {
        let (reader, permits) = copies.take().unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| reader[0])).is_err());
        drop((reader, permits));
        assert_eq!(shared.lock.reader_count(), 1);
        assert_eq!(shared.semaphore.available(), 1);
    });
    assert!(child.ended_well());
    drop(copies);
    let mut writer = Some(shared.lock.write().unwrap());
    assert!(fork(|| drop(writer.take())).ended_well());
    assert!(shared.lock.writer().is_some());
    drop(writer);
    assert!(shared.lock.writer().is_none());
    assert_eq!(shared.semaphore.available(), PERMITS);
}

fn posts_and_waits_count_whoever_makes_them() {
    let crowd = Crowd::install();
    let shared = shared();
    let semaphore = &shared.semaphore;
    assert!((0..PERMITS).all(|_| semaphore.try_wait()));
    assert!(!semaphore.try_wait());
    assert!(!semaphore.wait_deadline(Instant::now() + Duration::from_millis(5)));
    assert!(semaphore.acquire_deadline(1, Instant::now()).is_none());
    let waiter = fork(|| semaphore.wait());
    crowd::sleeping(&waiter);
    semaphore.post(1);
    assert!(waiter.ended_well());
    // What a dead one took by waiting is gone, what it had acquired is not.
    semaphore.post(3);
    let victim = holder(|| {
        semaphore.wait();
        semaphore.acquire(1)
    });
    wait_until("it has both", || semaphore.available() == 1);
    crowd.kill(&victim);
    assert_eq!((semaphore.available(), semaphore.total()), (2, 2));
    semaphore.acquire(1).forget();
    assert_eq!((semaphore.available(), semaphore.total()), (1, 1));
    // One that wants two is woken when the second comes, whoever else waits.
    let wants_two = fork(|| drop(semaphore.acquire(2)));
    crowd::sleeping(&wants_two);
    semaphore.post(1);
    assert!(wants_two.ended_well());
    semaphore.post(u32::MAX - 2);
    assert!(catch_unwind(|| semaphore.post(1)).is_err());
    assert_eq!(semaphore.available(), u32::MAX);
}

/// Woken for a permit, one finds that it has no place: another that needs none gets the permit.
fn permit_without_a_place_goes_to_one_that_needs_none() {
    let _crowd = Crowd::install();
    // SAFETY: zeros are a semaphore without permits.
    let semaphore: &ShmSemaphore<1> = unsafe { zeroed() };
    semaphore.post(1);
    let held = semaphore.acquire(1);
    let needs_a_place = fork(|| drop(semaphore.acquire(1)));
    crowd::sleeping(&needs_a_place);
    let needs_none = fork(|| semaphore.wait());
    crowd::sleeping(&needs_none);
    // It wakes the first that sleeps.
    semaphore.post(1);
    assert!(needs_none.ended_well());
    drop(held);
    assert!(needs_a_place.ended_well());
    assert_eq!((semaphore.available(), semaphore.total()), (1, 1));
}

/// Asking who lives may cost reading files: it is done once for each sleep, and not in every round of a spin.
fn those_that_wait_ask_who_lives_before_they_sleep() {
    let crowd = Crowd::install();
    let shared = shared();
    let barrier = barrier(2);
    let questions_of = |wait: &dyn Fn()| {
        let before = crowd.asked.load(SeqCst);
        wait();
        crowd.asked.load(SeqCst) - before
    };
    let victim = holder(|| {
        let held = (shared.lock.read(), shared.semaphore.acquire(PERMITS));
        let me = barrier.join();
        shared.used.store(1, SeqCst);
        (held, me)
    });
    wait_until("it has all", || shared.used.load(SeqCst) == 1);
    let me = barrier.join().unwrap();
    let past = Instant::now();
    let waits: [&dyn Fn(); 4] = [
        &|| assert!(shared.lock.write_deadline(past).is_err()),
        &|| assert!(shared.semaphore.acquire_deadline(1, past).is_none()),
        &|| assert!(!shared.semaphore.wait_deadline(past)),
        &|| assert!(me.wait_deadline(past).is_err()),
    ];
    for wait in waits {
        assert_eq!(questions_of(wait), 1);
    }
    crowd.kill(&victim);
    let victim = holder(|| {
        let guard = shared.lock.write();
        shared.used.store(2, SeqCst);
        guard
    });
    wait_until("it writes", || shared.used.load(SeqCst) == 2);
    let read = || assert!(shared.lock.read_deadline(past).is_err());
    assert_eq!(questions_of(&read), 1);
    crowd.kill(&victim);
}

/// A process does everything, and is killed at each point; the others find locks and permits as if it had never been.
fn crash_at_any_point_gives_all_of_it_back() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let crowd = Crowd::install();
        let shared = shared();
        crash::arm_role(VICTIM, k);
        let victim = fork(|| {
            crash::set_role(VICTIM);
            count_up(&mut write(shared).1);
            let (_, one) = read(shared);
            drop((read(shared), one));
            let reader = ShmWriteGuard::downgrade(write(shared).1);
            assert!(shared.lock.try_write().is_err());
            drop(reader);
            ShmWriteGuard::give_up(write(shared).1);
            assert!(write(shared).0.is_some());
            let semaphore = &shared.semaphore;
            let one = semaphore.acquire(1);
            let two = semaphore.acquire(1);
            drop(one);
            drop(two);
            semaphore.acquire(2).forget();
            semaphore.post(2);
            semaphore.wait();
            semaphore.post(1);
            shared.event.set();
            shared.event.reset();
            shared.once.call_once(|| ());
            assert_eq!(*shared.cell.get_or_init(|| [5, 5]), [5, 5]);
        });
        let ended_well = victim.ended_well();
        if !ended_well {
            crowd.settle_death(victim.pid);
        }
        crash::disarm();
        let at = crash::died_at();
        let survivor = fork(|| {
            let is_in_doubt = shared.lock.is_in_doubt();
            assert_eq!(read(shared).0.is_some(), is_in_doubt);
            assert_eq!(write(shared).0.is_some(), is_in_doubt);
            count_up(&mut write(shared).1);
            assert_eq!(read(shared).0, None);
            assert_eq!(shared.lock.reader_count(), 0);
            let permits = shared.semaphore.available();
            // `forget` and `wait` are committed, or not; `post` likewise.
            assert!([1, 2, 3].contains(&permits), "{permits}");
            assert_eq!(shared.semaphore.total(), permits);
            drop(shared.semaphore.acquire(permits));
            shared.once.call_once(|| ());
            assert_eq!(
                *shared.cell.get_or_init(|| [6, 6]),
                *shared.cell.get().unwrap()
            );
        });
        assert!(survivor.ended_well(), "after a death at {at:?}");
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for point in [
        "rwlock.place_taken",
        "rwlock.place_freed",
        "rwlock.word_locked",
        "rwlock.writing",
        "rwlock.in_order",
        "rwlock.unlocked",
        "rwlock.downgrading",
        "semaphore.posted",
        "semaphore.counted",
        "semaphore.taken",
        "semaphore.waited",
        "semaphore.forgotten",
        "semaphore.put_back",
        "event.set",
        "event.reset",
        "once.doing",
        "once.done_before_commit",
        "once.committed",
    ] {
        let point = format!("sem.{point}");
        assert!(died_at.contains(&point), "{point} is not in {died_at:?}");
    }
}

fn barrier(participants: u32) -> &'static ShmBarrier<4> {
    // SAFETY: memory of atomics, so zeros are valid.
    let place: &'static ShmBarrier<4> = unsafe { zeroed() };
    // SAFETY: nobody else knows of it yet.
    unsafe {
        std::ptr::from_ref(place)
            .cast_mut()
            .write(ShmBarrier::new(participants));
    }
    place
}

fn barrier_lets_all_pass_together_and_has_one_leader() {
    const ROUNDS: u64 = 500;
    let _crowd = Crowd::install();
    let (shared, barrier) = (shared(), barrier(4));
    let children: Vec<Child> = (0..4)
        .map(|number: usize| {
            fork(move || {
                let me = barrier.join().unwrap();
                for round in 0..ROUNDS {
                    shared.progress[number].store(round + 1, SeqCst);
                    let pass = me.wait().unwrap();
                    if pass.is_leader() {
                        shared.told.fetch_add(1, SeqCst);
                    }
                    for other in 0..4 {
                        assert!(shared.progress[other].load(SeqCst) > round);
                    }
                    me.wait().unwrap();
                }
            })
        })
        .collect();
    assert!(children.iter().all(Child::ended_well));
    assert_eq!(shared.told.load(SeqCst), ROUNDS);
    assert_eq!(barrier.phase(), 2 * ROUNDS);
    assert!(matches!(
        barrier.join(),
        Err(BarrierError::Full { participants: 4 })
    ));
}

fn death_before_arriving_is_told_and_another_may_come() {
    let crowd = Crowd::install();
    let (shared, barrier) = (shared(), barrier(3));
    let me = barrier.join().unwrap();
    let deadline = Instant::now() + Duration::from_millis(5);
    assert!(matches!(
        me.wait_deadline(deadline),
        Err(BarrierError::TimedOut { .. })
    ));
    let victim = holder(|| {
        let me = barrier.join().unwrap();
        shared.used.store(1, SeqCst);
        me
    });
    wait_until("the victim has joined", || shared.used.load(SeqCst) == 1);
    let other = fork(|| {
        let me = barrier.join().unwrap();
        shared.used.store(2, SeqCst);
        assert!(matches!(
            me.wait(),
            Err(BarrierError::ParticipantDied { .. })
        ));
        shared.used.store(3, SeqCst);
        // Waits on, for the same phase.
        while matches!(me.wait(), Err(BarrierError::ParticipantDied { .. })) {
            std::thread::yield_now();
        }
    });
    wait_until("the other has joined", || shared.used.load(SeqCst) == 2);
    crowd::sleeping(&other);
    crowd.kill(&victim);
    assert!(matches!(
        me.wait(),
        Err(BarrierError::ParticipantDied { .. })
    ));
    wait_until("the other is told", || shared.used.load(SeqCst) == 3);
    let third = fork(|| assert!(barrier.join().unwrap().wait().is_ok()));
    wait_until("all have arrived", || me.wait().is_ok());
    assert!(other.ended_well() && third.ended_well());
    // Those two have left in order.
    assert_eq!(barrier.phase(), 1);
    assert!(me.wait().unwrap().is_leader());
}

/// One that panics does not come any more, even if its thread goes on.
fn panic_of_a_participant_is_told_as_a_death() {
    let _crowd = Crowd::install();
    let (shared, barrier) = (shared(), barrier(2));
    let me = barrier.join().unwrap();
    let other = fork(|| {
        std::panic::set_hook(Box::new(|_| {}));
        let panicked = catch_unwind(|| {
            let _me = barrier.join().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        wait_until("the other is told", || shared.stop.load(SeqCst) == 1);
        // It may come again, in its own place.
        barrier.join().unwrap().wait().unwrap();
    });
    // Told while that process lives: it waits for this.
    assert!(matches!(
        me.wait(),
        Err(BarrierError::ParticipantDied { .. })
    ));
    shared.stop.store(1, SeqCst);
    wait_until("both have arrived", || me.wait().is_ok());
    assert!(other.ended_well());
    assert!(matches!(barrier.join(), Err(BarrierError::Full { .. })));
}

/// A participant is killed at each point; the others pass, or are told.
fn crash_at_any_point_of_a_barrier_hangs_nobody() {
    let wanted = ["joined", "arrived", "left"].map(|point| format!("sem.barrier.{point}"));
    let mut died_at = BTreeSet::new();
    let (mut in_vain, mut k) = (0, 0);
    for _ in 0..2_000 {
        k += 1;
        let crowd = Crowd::install();
        let barrier = barrier(2);
        crash::arm_role(VICTIM, k);
        let visit = || -> Result<(), BarrierError> {
            let me = barrier.join()?;
            for _ in 0..3 {
                me.wait()?;
            }
            Ok(())
        };
        let other = fork(|| match visit() {
            Ok(()) | Err(BarrierError::ParticipantDied { .. }) => {}
            Err(error) => panic!("{error}"),
        });
        let victim = fork(|| {
            crash::set_role(VICTIM);
            visit().unwrap();
        });
        let ended_well = victim.ended_well();
        if !ended_well {
            crowd.settle_death(victim.pid);
            // One that died before it had a seat is not known: another comes.
            if let Ok(me) = barrier.join() {
                while me.wait().is_ok() && barrier.phase() < 3 {}
            }
        }
        assert!(
            other.ended_well(),
            "after a death at {:?}",
            crash::died_at()
        );
        crash::disarm();
        died_at.extend(crash::died_at());
        // How many points it passes depends on luck: on who comes first, and whether it sleeps.
        in_vain = if ended_well { in_vain + 1 } else { 0 };
        if in_vain == 5 {
            if wanted.iter().all(|point| died_at.contains(point)) {
                return;
            }
            (in_vain, k) = (0, 0);
        }
    }
    panic!("not all of {wanted:?} are in {died_at:?}");
}

fn event_stays_until_it_is_reset() {
    let crowd = Crowd::install();
    let shared = shared();
    let waiters = [(); 3].map(|()| fork(|| shared.event.wait()));
    waiters.iter().for_each(crowd::sleeping);
    // Set by one that dies before it wakes anybody.
    crash::arm_role(VICTIM, 1);
    let setter = fork(|| {
        crash::set_role(VICTIM);
        shared.event.set();
    });
    assert!(!setter.ended_well());
    assert_eq!(crash::died_at().as_deref(), Some("sem.event.set"));
    crash::disarm();
    crowd.settle_death(setter.pid);
    assert!(waiters.iter().all(Child::ended_well));
    shared.event.wait();
    shared.event.reset();
    assert!(
        !shared
            .event
            .wait_deadline(Instant::now() + Duration::from_millis(5))
    );
    // Those that have waited go on, though it is not set any more when they run.
    let waiters = [(); 3].map(|()| fork(|| shared.event.wait()));
    waiters.iter().for_each(crowd::sleeping);
    shared.event.set();
    shared.event.reset();
    assert!(waiters.iter().all(Child::ended_well));
    assert!(!shared.event.is_set());
    shared.event.set();
    shared.event.set();
    assert!(shared.event.wait_deadline(Instant::now()));
    shared.event.reset();
    shared.event.reset();
    assert!(!shared.event.wait_deadline(Instant::now()));

    assert!(!shared.once.wait_deadline(Instant::now()));
    let waiter = fork(|| shared.once.wait());
    crowd::sleeping(&waiter);
    shared.once.call_once(|| ());
    assert!(waiter.ended_well());
}

/// Threads of several processes read, write and hold permits; some processes are killed at any moment.
fn random_kills_hang_nobody_and_lose_nothing() {
    let crowd = Crowd::install();
    let shared = shared();
    let work = |_, round: u64| {
        if round.is_multiple_of(3) {
            count_up(&mut write(shared).1);
        } else {
            let (died, guard) = read(shared);
            if died.is_none() {
                check_whole(&guard);
            }
        }
        let permits = shared.semaphore.acquire(1 + (round % 3) as u32);
        std::hint::spin_loop();
        drop(permits);
    };
    let kills = crowd.kill_at_random(&shared.stop, work, || ());
    check_whole(&write(shared).1);
    assert_eq!(shared.lock.reader_count(), 0);
    assert_eq!(shared.semaphore.available(), PERMITS);
    let told = shared.told.load(SeqCst);
    eprintln!("{told} of {kills} were killed writing");
}

netmcore_forktest::forktests!(
    what_the_dead_held_comes_to_those_that_wait,
    what_dead_strangers_held_comes_back,
    a_thread_does_not_wait_for_itself,
    places_that_are_used_up_are_waited_for,
    forked_copies_hold_nothing,
    posts_and_waits_count_whoever_makes_them,
    permit_without_a_place_goes_to_one_that_needs_none,
    those_that_wait_ask_who_lives_before_they_sleep,
    crash_at_any_point_gives_all_of_it_back,
    barrier_lets_all_pass_together_and_has_one_leader,
    death_before_arriving_is_told_and_another_may_come,
    panic_of_a_participant_is_told_as_a_death,
    crash_at_any_point_of_a_barrier_hangs_nobody,
    event_stays_until_it_is_reset,
    random_kills_hang_nobody_and_lose_nothing,
);

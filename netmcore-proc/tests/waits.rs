//! Guards against waits for the dead, on locks and events in shared memory; against waits of all that nobody tells of; and against
//! deadlocks that are none.
//!
//! # Safety
//! Children are forked in workers with one thread, use what their parent has mapped, and leave by `exit_now` or a signal.
#![allow(unsafe_code)]

mod trial;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use netmcore_proc::{
    Error, Master, Process, ProcessId, Running, ShmArc, ShmSafe, named, shared_heap,
};
use netmcore_sem::{Current, LockError, LockWord, Owners as _, SoloOwners, WaitWord};
use netmcore_sys::futex::Deadline;
use netmcore_sys::process::{self, Forked, Pid};
use serde::Serialize;
use serde::de::DeserializeOwned;
use trial::{Channel, SIGKILL, Trial, kill, until, until_asleep};

netmcore_forktest::forktests!(
    lock_of_a_worker_that_is_killed_while_another_sleeps,
    lock_of_a_worker_that_was_killed_before,
    lock_of_a_second_thread_whose_worker_is_killed,
    lock_leaked_by_a_thread_is_held_until_its_worker_ends,
    lock_leaked_by_a_worker_that_ends_in_order,
    lock_of_a_worker_is_handed_to_a_stranger,
    lock_of_a_stranger_that_is_killed_while_a_worker_sleeps,
    event_of_a_stranger_that_was_killed_before_it_notified,
    event_of_a_worker_that_was_killed_before_it_notified,
    locks_taken_in_both_orders_are_a_deadlock,
    lock_taken_twice_is_a_deadlock,
    event_that_nobody_brings_about_is_a_deadlock,
    lock_event_and_join_in_one_deadlock,
    lock_of_the_master_is_a_deadlock,
    deadlock_is_found_when_one_that_could_go_on_dies,
    deadlock_is_found_when_a_child_ends,
    waits_with_deadline_are_no_deadlock,
    slow_notifier_is_no_deadlock,
    child_of_a_worker_that_goes_on_is_no_deadlock,
    lock_of_a_stranger_is_no_deadlock,
    second_thread_that_goes_on_is_no_deadlock,
    slow_ring_is_no_deadlock,
    fast_ring_is_no_deadlock,
);

/// A count of tokens, to wait for.
#[derive(ShmSafe, Default)]
struct Tokens {
    count: AtomicU64,
    word: WaitWord,
}

impl Tokens {
    fn put(&self) {
        self.count.fetch_add(1, SeqCst);
        self.word.notify_one();
    }

    fn attempt(&self) -> Option<u64> {
        let less = |count: u64| count.checked_sub(1);
        self.count.fetch_update(SeqCst, SeqCst, less).ok()
    }

    fn take(&self) {
        self.word
            .wait(&Current, None, None, || self.attempt())
            .expect("without a deadline");
    }

    fn take_within(&self, limit: Duration) -> bool {
        let deadline = Some(Deadline::after(limit));
        let taken = self.word.wait(&Current, None, deadline, || self.attempt());
        taken.is_some()
    }
}

fn lock_named(name: &str) -> ShmArc<LockWord> {
    named(name, LockWord::new).unwrap()
}

fn tokens_named(name: &str) -> ShmArc<Tokens> {
    named(name, Tokens::default).unwrap()
}

fn now() -> u64 {
    Deadline::now().as_nanos()
}

/// Takes the lock, which its owner left behind. Says when.
fn take_over(word: &LockWord) -> u64 {
    let died = word.lock(&Current).expect_err("its owner died");
    let at = now();
    assert_ne!(died.owner, Current.me());
    drop(died);
    // It is told once.
    drop(word.lock(&Current).unwrap());
    at
}

/// How long a waiter took, in nanoseconds.
#[derive(Clone, Copy, Serialize, serde::Deserialize)]
struct Took {
    /// From the death on.
    since_death: u64,
    /// From when others knew of it: the kernel may take its time with a death on a busy machine. 0 if the waiter was quicker.
    since_known: u64,
}

impl Took {
    fn new(died: u64, known: u64, had: u64) -> Took {
        Took {
            since_death: had.checked_sub(died).expect("it waited for the death"),
            since_known: had.saturating_sub(known),
        }
    }
}

/// Prints how long it took, and fails if it never was as quick as it should be.
fn judge(what: &str, took: &[Took], limit: Duration) {
    let sorted = |time: fn(&Took) -> u64| {
        let mut times: Vec<_> = took.iter().map(time).map(Duration::from_nanos).collect();
        times.sort_unstable();
        times
    };
    let times = sorted(|one| one.since_death);
    let [least, .., most] = &times[..] else {
        panic!("nothing was measured");
    };
    let median = times[times.len() / 2];
    let shown = format!("{what}: {least:?} to {most:?}, median {median:?} after the death");
    eprintln!("{shown}");
    let least = sorted(|one| one.since_known)[0];
    assert!(
        least < limit,
        "{shown}, {least:?} after it was known, and {limit:?} is the limit"
    );
}

const ROUNDS: usize = 15;
const LIMIT_FOR_WORKERS: Duration = Duration::from_millis(10);
const LIMIT_FOR_STRANGERS: Duration = Duration::from_millis(50);

// ---- dead owners ---------------------------------------------------------------------------------

/// How a process comes to hold the lock, and stays.
fn hold(word: &LockWord) -> ! {
    std::mem::forget(word.lock(&Current).unwrap());
    loop {
        std::thread::park();
    }
}

/// Processes: one that holds the lock, one that waits for it and says when it had it, and the first, which kills the one
/// when the other sleeps. Returns the times from the kill to the end of the wait.
fn times_to_take_over(
    holds: impl Fn(&LockWord) + 'static,
    waits: impl Fn(&LockWord) -> u64 + 'static,
) -> Vec<Took> {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let holder = master.def_process(move |word: ShmArc<LockWord>| {
        pids.send_pid();
        holds(&word);
    });
    let waiter = master.def_process(move |word: ShmArc<LockWord>| {
        pids.send_pid();
        waits(&word)
    });
    let first = master.def_process(move |()| {
        let round = |_| {
            let word = ShmArc::new_in(&shared_heap().unwrap(), LockWord::new()).unwrap();
            let holding = holder.start(&word).unwrap();
            let victim = pids.receive_pid();
            until("it is held", || word.owner().is_some());
            until_asleep(victim);
            let waiting = waiter.start(&word).unwrap();
            until_asleep(pids.receive_pid());
            let killed = now();
            kill(victim, SIGKILL);
            assert!(holding.join().is_err());
            let known = now();
            Took::new(killed, known, waiting.join().unwrap())
        };
        (0..ROUNDS).map(round).collect::<Vec<Took>>()
    });
    trial.run(master, &first, &())
}

fn lock_of_a_worker_that_is_killed_while_another_sleeps() {
    let times = times_to_take_over(|word| hold(word), take_over);
    judge("a worker waits for a worker", &times, LIMIT_FOR_WORKERS);
}

fn lock_of_a_second_thread_whose_worker_is_killed() {
    let holds = |word: &LockWord| {
        std::thread::scope(|scope| drop(scope.spawn(|| hold(word))));
    };
    let waits = |word: &LockWord| {
        std::thread::scope(|scope| scope.spawn(|| take_over(word)).join().unwrap())
    };
    let times = times_to_take_over(holds, waits);
    judge("a thread waits for a thread", &times, LIMIT_FOR_WORKERS);
}

fn lock_of_a_worker_that_was_killed_before() {
    let trial = Trial::new();
    let mut master = trial.master();
    let holder = master.def_process(|name: String| hold(&lock_named(&name)));
    let first = master.def_process(move |()| {
        for name in ["tried", "waited for", "waited for a while"] {
            let word = lock_named(name);
            let holding: Running<()> = holder.start(&name.to_owned()).unwrap();
            until("it is held", || word.owner().is_some());
            assert!(word.try_lock(&Current).unwrap().is_none());
            holding.kill().unwrap();
            // Its death is known when it has been joined.
            holding.join().unwrap_err();
            let started = Instant::now();
            let died = match name {
                "tried" => word.try_lock(&Current).map(drop).unwrap_err(),
                "waited for" => word.lock(&Current).unwrap_err(),
                _ => match word.lock_deadline(&Current, started) {
                    Err(LockError::OwnerDied(died)) => died,
                    other => panic!("{other:?}"),
                },
            };
            assert_eq!(died.guard.owner(), Current.me());
        }
    });
    trial.run(master, &first, &());
}

/// What the leaked guard refers to may be used by other threads of the worker.
fn lock_leaked_by_a_thread_is_held_until_its_worker_ends() {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let go: &'static Channel = Channel::new();
    let mut master = trial.master();
    let leaks = master.def_process(move |()| {
        let word = lock_named("leaked");
        let thread = std::thread::spawn(move || {
            std::mem::forget(word.lock(&Current).unwrap());
        });
        thread.join().unwrap();
        pids.send_pid();
        go.receive();
        now()
    });
    let waiter = master.def_process(move |()| {
        pids.send_pid();
        take_over(&lock_named("leaked"))
    });
    let first = master.def_process(move |()| {
        let leaking = leaks.start(&()).unwrap();
        pids.receive_pid();
        let word = lock_named("leaked");
        assert!(word.try_lock(&Current).unwrap().is_none());
        let waiting = waiter.start(&()).unwrap();
        until_asleep(pids.receive_pid());
        go.send(1);
        let ends = leaking.join().unwrap();
        assert!(waiting.join().unwrap() > ends, "it was held until then");
    });
    trial.run(master, &first, &());
}

fn lock_leaked_by_a_worker_that_ends_in_order() {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let go: &'static Channel = Channel::new();
    let mut master = trial.master();
    let leaks = master.def_process(move |()| {
        std::mem::forget(lock_named("leaked").lock(&Current).unwrap());
        go.receive();
        now()
    });
    let waiter = master.def_process(move |()| {
        pids.send_pid();
        take_over(&lock_named("leaked"))
    });
    let first = master.def_process(move |()| {
        let word = lock_named("leaked");
        let round = |_| {
            let leaking = leaks.start(&()).unwrap();
            until("it is held", || word.owner().is_some());
            let waiting = waiter.start(&()).unwrap();
            until_asleep(pids.receive_pid());
            go.send(1);
            let ends = leaking.join().unwrap();
            let known = now();
            Took::new(ends, known, waiting.join().unwrap())
        };
        (0..ROUNDS).map(round).collect::<Vec<Took>>()
    });
    let times = trial.run(master, &first, &());
    judge(
        "a worker waits for one that ends",
        &times,
        LIMIT_FOR_WORKERS,
    );
}

/// Forks a child of this worker: a stranger to the master.
fn fork_stranger(body: impl FnOnce()) -> Pid {
    // SAFETY: this worker has one thread; the child leaves by `exit_now`.
    match unsafe { process::fork() }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            body();
            process::exit_now(0)
        }
    }
}

fn reap(pid: Pid) {
    let _ = process::PidFd::open(pid).unwrap().wait().unwrap();
}

fn lock_of_a_worker_is_handed_to_a_stranger() {
    let waits = |word: &LockWord| {
        let had = ShmArc::new_in(&shared_heap().unwrap(), AtomicU64::new(0)).unwrap();
        let child = fork_stranger(|| had.store(take_over(word), SeqCst));
        reap(child);
        let had = had.load(SeqCst);
        assert_ne!(had, 0, "the child failed");
        had
    };
    let times = times_to_take_over(|word| hold(word), waits);
    judge("a stranger waits for a worker", &times, LIMIT_FOR_WORKERS);
}

fn lock_of_a_stranger_that_is_killed_while_a_worker_sleeps() {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let waiter = master.def_process(move |word: ShmArc<LockWord>| {
        pids.send_pid();
        take_over(&word)
    });
    let first = master.def_process(move |()| {
        let round = |_| {
            let word = ShmArc::new_in(&shared_heap().unwrap(), LockWord::new()).unwrap();
            let stranger = fork_stranger(|| hold(&word));
            until("it is held", || word.owner().is_some());
            assert!(word.owner().unwrap().index >= SoloOwners::INDEX_BASE);
            let waiting = waiter.start(&word).unwrap();
            until_asleep(pids.receive_pid());
            let killed = now();
            kill(stranger, SIGKILL);
            reap(stranger);
            let known = now();
            Took::new(killed, known, waiting.join().unwrap())
        };
        (0..ROUNDS).map(round).collect::<Vec<Took>>()
    });
    let times = trial.run(master, &first, &());
    judge("a worker waits for a stranger", &times, LIMIT_FOR_STRANGERS);
}

/// One changes the state, and is killed before it tells anybody: those that wait find out.
fn times_to_find_out(kill_one_that_changes: impl Fn(&Tokens) + 'static) -> Vec<Took> {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let waiter = master.def_process(move |tokens: ShmArc<Tokens>| {
        pids.send_pid();
        tokens.take();
        now()
    });
    let first = master.def_process(move |()| {
        let round = |_| {
            let tokens = ShmArc::new_in(&shared_heap().unwrap(), Tokens::default()).unwrap();
            let waiting = waiter.start(&tokens).unwrap();
            until_asleep(pids.receive_pid());
            let begun = now();
            kill_one_that_changes(&tokens);
            let known = now();
            Took::new(begun, known, waiting.join().unwrap())
        };
        (0..ROUNDS).map(round).collect::<Vec<Took>>()
    });
    trial.run(master, &first, &())
}

fn event_of_a_stranger_that_was_killed_before_it_notified() {
    let times = times_to_find_out(|tokens| {
        let stranger = fork_stranger(|| {
            // It makes itself known by the lock that the change would need.
            drop(LockWord::new().lock(&Current).unwrap());
            tokens.count.fetch_add(1, SeqCst);
            kill(Pid::this(), SIGKILL);
        });
        reap(stranger);
    });
    judge("an event of a stranger", &times, 2 * LIMIT_FOR_STRANGERS);
}

fn event_of_a_worker_that_was_killed_before_it_notified() {
    let times = times_to_find_out(|tokens| {
        let shared = netmcore_shm::region_of(tokens).unwrap();
        assert!(shared.name().is_some());
        let at = std::ptr::from_ref(tokens).addr() as u64;
        let changes = |at: u64| {
            let _heap = shared_heap().unwrap();
            let at: *const Tokens = std::ptr::with_exposed_provenance(at as usize);
            // SAFETY: the tokens of the asker, which keeps them until this process has ended; the heap is mapped.
            unsafe { &*at }.count.fetch_add(1, SeqCst);
            kill(Pid::this(), SIGKILL);
        };
        let changing: Running<()> = netmcore_proc::spawn(changes, &at).unwrap();
        changing.join().unwrap_err();
    });
    judge("an event of a worker", &times, LIMIT_FOR_WORKERS);
}

// ---- deadlocks -----------------------------------------------------------------------------------

/// Runs what must deadlock; returns who waited, and for what.
fn deadlock_in<A, R>(
    trial: &Trial,
    master: Master,
    first: &Process<A, R>,
    arg: &A,
) -> Vec<(ProcessId, String)>
where
    A: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    // Nobody can leave these waits, whatever the master says.
    let master = master.grace(Duration::from_millis(20));
    let start = Instant::now();
    match trial.try_run(master, first, arg) {
        Err(Error::Deadlock { who, on_what }) => {
            let took = start.elapsed();
            assert!(took < Duration::from_secs(10), "it took {took:?}");
            assert_eq!(who.len(), on_what.len());
            let mut waits: Vec<_> = who.into_iter().zip(on_what).collect();
            waits.sort();
            waits
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("there was no deadlock"),
    }
}

fn assert_is_held_by(on_what: &str, holder: ProcessId) {
    let (place, held_by) = on_what.split_once(", ").expect("it says by whom");
    assert!(place.starts_with("the lock at Resource "), "{on_what}");
    assert!(place.contains("+0x"), "{on_what}");
    assert_eq!(held_by, format!("held by {holder}"));
}

fn locks_taken_in_both_orders_are_a_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let takes = master.def_process(|names: [String; 2]| {
        let [one, other] = names.map(|name| lock_named(&name));
        let _one = one.lock(&Current).unwrap();
        tokens_named("has one").put();
        tokens_named("go on").take();
        let _other = other.lock(&Current).unwrap();
    });
    let first = master.def_process(move |()| {
        let names = ["left".to_owned(), "right".to_owned()];
        let mut back = names.clone();
        back.reverse();
        takes.start_detached(&names).unwrap();
        takes.start_detached(&back).unwrap();
        (0..2).for_each(|_| tokens_named("has one").take());
        (0..2).for_each(|_| tokens_named("go on").put());
        tokens_named("never").take();
    });
    let waits = deadlock_in(&trial, master, &first, &());
    let [(_, never), (one, for_other), (other, for_one)] = &waits[..] else {
        panic!("{waits:?}")
    };
    assert!(never.starts_with("an event at Resource "), "{never}");
    assert_is_held_by(for_other, *other);
    assert_is_held_by(for_one, *one);
    assert_ne!(for_one.split(',').next(), for_other.split(',').next());
}

fn lock_taken_twice_is_a_deadlock() {
    let trial = Trial::new();
    for ready_workers in [0, 2] {
        let mut master = trial.master().ready_workers(ready_workers);
        let first = master.def_process(|()| {
            let word = lock_named("twice");
            let _held = word.lock(&Current).unwrap();
            let _again = word.lock(&Current).unwrap();
        });
        let waits = deadlock_in(&trial, master, &first, &());
        let [(who, on_what)] = &waits[..] else {
            panic!("{waits:?}")
        };
        assert_is_held_by(on_what, *who);
    }
}

fn event_that_nobody_brings_about_is_a_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let waits = master.def_process(|()| tokens_named("never").take());
    let first = master.def_process(move |()| {
        for _ in 0..5 {
            waits.start_detached(&()).unwrap();
        }
        tokens_named("never").take();
    });
    let start = Instant::now();
    let waits = deadlock_in(&trial, master, &first, &());
    eprintln!(
        "told after {:?}, the end of the run included",
        start.elapsed()
    );
    assert_eq!(waits.len(), 6);
    for (_, on_what) in &waits {
        assert!(on_what.starts_with("an event at Resource "), "{on_what}");
        assert_eq!(on_what, &waits[0].1);
    }
}

fn lock_event_and_join_in_one_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let wants = master.def_process(|()| drop(lock_named("wanted").lock(&Current).unwrap()));
    let waits = master.def_process(move |()| {
        let running = wants.start(&()).unwrap();
        let _ = running.join();
    });
    let first = master.def_process(move |()| {
        let word = lock_named("wanted");
        let _held = word.lock(&Current).unwrap();
        waits.start_detached(&()).unwrap();
        tokens_named("never").take();
    });
    let waits = deadlock_in(&trial, master, &first, &());
    let [(first, event), (_, join), (inner, lock)] = &waits[..] else {
        panic!("{waits:?}")
    };
    assert!(event.starts_with("an event at Resource "), "{event}");
    assert_eq!(*join, inner.to_string());
    assert_is_held_by(lock, *first);
}

fn lock_of_the_master_is_a_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| drop(lock_named("kept").lock(&Current).unwrap()));
    let master = master.init(|_| {
        std::mem::forget(lock_named("kept").lock(&Current).unwrap());
        Ok(())
    });
    let waits = deadlock_in(&trial, master, &first, &());
    assert!(waits[0].1.ends_with(", held by the master"), "{waits:?}");
}

fn deadlock_is_found_when_one_that_could_go_on_dies() {
    let trial = Trial::new();
    let pids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let could = master.def_process(move |()| {
        pids.send_pid();
        loop {
            std::thread::park();
        }
    });
    let first = master.def_process(move |()| {
        let running: Running<()> = could.start(&()).unwrap();
        running.detach().unwrap();
        let victim = pids.receive_pid();
        std::thread::spawn(move || {
            // sleep: everybody is to wait before the victim is killed; sooner tests less, and still passes.
            std::thread::sleep(Duration::from_millis(100));
            kill(victim, SIGKILL);
        });
        tokens_named("never").take();
    });
    assert_eq!(deadlock_in(&trial, master, &first, &()).len(), 1);
}

fn deadlock_is_found_when_a_child_ends() {
    let trial = Trial::new();
    let ended: &'static Channel = Channel::new();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let tokens = tokens_named("never");
        fork_stranger(|| {
            // sleep: everybody is to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(200));
            ended.send(5);
        });
        tokens.take();
    });
    assert_eq!(deadlock_in(&trial, master, &first, &()).len(), 1);
    // Not before, and not for the zombie that it is.
    assert_eq!(ended.receive_nowait(), Some(5));
}

// ---- no deadlock -------------------------------------------------------------------------------

fn waits_with_deadline_are_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| {
        let never = tokens_named("never");
        let word = lock_named("held");
        let _held = word.lock(&Current).unwrap();
        for _ in 0..3 {
            assert!(!never.take_within(Duration::from_millis(70)));
            let deadline = Instant::now() + Duration::from_millis(70);
            assert!(word.lock_deadline(&Current, deadline).is_err());
        }
        7
    });
    assert_eq!(trial.run(master, &first, &()), 7);
}

fn slow_notifier_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let waits = master.def_process(|()| tokens_named("late").take());
    let first = master.def_process(move |()| {
        let running: Vec<_> = (0..4).map(|_| waits.start(&()).unwrap()).collect();
        let computes = |()| {
            // sleep: the others are to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(300));
            (0..4).for_each(|_| tokens_named("late").put());
        };
        netmcore_proc::spawn(computes, &())
            .unwrap()
            .detach()
            .unwrap();
        running.iter().for_each(|one| one.join().unwrap());
    });
    trial.run(master, &first, &());
}

fn child_of_a_worker_that_goes_on_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| {
        let tokens = tokens_named("of the child");
        let child = fork_stranger(|| {
            // sleep: its parent is to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(300));
            tokens.put();
        });
        tokens.take();
        reap(child);
    });
    trial.run(master, &first, &());
}

fn lock_of_a_stranger_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| {
        let word = lock_named("of the child");
        let child = fork_stranger(|| {
            let _held = word.lock(&Current).unwrap();
            // Nobody's child any more that a look at the workers would find.
            fork_stranger(|| ());
            // sleep: the others are to wait for longer than the master takes to look.
            std::thread::sleep(Duration::from_millis(300));
        });
        until("it is held", || word.owner().is_some());
        drop(word.lock(&Current).unwrap());
        reap(child);
    });
    trial.run(master, &first, &());
}

fn second_thread_that_goes_on_is_no_deadlock() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| {
        let tokens = tokens_named("of the thread");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // sleep: the other is to wait for longer than the master takes to look.
                std::thread::sleep(Duration::from_millis(300));
                tokens.put();
            });
            tokens.take();
        });
    });
    trial.run(master, &first, &());
}

/// Tokens in a ring: nearly everybody waits all the time.
fn ring(members: u64, rounds: u64, pause: impl Fn(u64) + 'static) {
    let trial = Trial::new();
    let mut master = trial.master();
    let member = master.def_process(move |(number, rounds): (u64, u64)| {
        let mine = tokens_named(&format!("member {number}"));
        let next = tokens_named(&format!("member {}", (number + 1) % members));
        for round in 0..rounds {
            mine.take();
            pause(number + round);
            next.put();
        }
    });
    let first = master.def_process(move |()| {
        let start = |number| member.start(&(number, rounds)).unwrap();
        let running: Vec<_> = (0..members).map(start).collect();
        tokens_named("member 0").put();
        running.iter().for_each(|one| one.join().unwrap());
        assert_eq!(tokens_named("member 0").count.load(SeqCst), 1);
    });
    trial.run(master, &first, &());
}

fn slow_ring_is_no_deadlock() {
    ring(3, 10, |number| {
        // sleep: waits of about the length from which on they are told of.
        std::thread::sleep(Duration::from_millis(5 + number * 7 % 20));
    });
}

fn fast_ring_is_no_deadlock() {
    ring(3, 2_000, |_| ());
}

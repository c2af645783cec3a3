//! A death at any step of making, sending and naming shared values leaves the others well. Guards against heaps that stay, names that
//! nobody can use any more, locks that nobody gets, and counts that are wrong after a death.

mod every_step;
mod trial;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use every_step::{EveryStep, PATIENCE, in_a_child};
use netmcore_pmanage::Log;
use netmcore_proc::{
    JoinError, Master, Process, Running, ShmArc, ShmSafe, create_heap_with_max, named,
    remove_named, shared_heap, spawn, try_named,
};
use netmcore_sem::{Current, LockWord, WaitWord};
use netmcore_shm::Heap;
use netmcore_sys::crash;
use netmcore_sys::process::ExitStatus;
use netmcore_sys::signal::SIGKILL;
use trial::{Trial, is_killed_by, until};

netmcore_forktest::forktests!(
    crash_with_ready_workers_harms_no_shared_value,
    crash_without_ready_workers_harms_no_shared_value,
    maker_of_a_heap_killed_at_each_point,
    maker_of_a_named_value_killed_at_each_point,
    maker_of_the_shared_heap_killed_at_each_point,
);

const HEAP_PREFIX: &str = "/nmc-hcrash-";
/// So long that each heap is made in a moment.
const HEAP_MAX_BYTES: u64 = 4 << 20;

type Counter = ShmArc<AtomicU64>;

/// A number that two words hold, under a lock: a death between the two is repaired by the next.
#[derive(ShmSafe, Default)]
struct Pair {
    lock: LockWord,
    left: AtomicU64,
    right: AtomicU64,
    changed: WaitWord,
}

impl Pair {
    fn add_one(&self) {
        let _guard = match self.lock.lock(&Current) {
            Ok(guard) => {
                assert_eq!(self.left.load(SeqCst), self.right.load(SeqCst));
                guard
            }
            Err(died) => {
                self.right.store(self.left.load(SeqCst), SeqCst);
                died.guard
            }
        };
        self.left.fetch_add(1, SeqCst);
        netmcore_sys::crash_point!("test.pair.half");
        self.right.fetch_add(1, SeqCst);
        self.changed.notify_all();
    }

    /// Waits until it has been reached, or nobody can reach it any more.
    fn wait_for(&self, number: u64, limit: Duration) -> u64 {
        let deadline = Some(netmcore_sys::futex::Deadline::after(limit));
        let reached = || Some(self.right.load(SeqCst)).filter(|&now| now >= number);
        let now = self.changed.wait(&Current, None, deadline, reached);
        now.unwrap_or_else(|| self.right.load(SeqCst))
    }
}

fn pair() -> ShmArc<Pair> {
    named("pair", Pair::default).unwrap()
}

/// What a process that did what it was to do returns.
fn value<T>(outcome: Result<T, JoinError>, killed: &mut u64) -> Option<T> {
    match outcome {
        Ok(result) => Some(result),
        Err(error) => {
            assert!(is_killed_by(SIGKILL, &error), "{error}");
            *killed += 1;
            None
        }
    }
}

/// The scenario. Whatever dies, everything else must be as expected. Returns how many of those it joined were killed.
fn scenario(dir: &Path, ready_workers: usize) -> netmcore_proc::Result<u64> {
    let mut master = Master::builder(dir)
        .ready_workers(ready_workers)
        .shared_heap_max_bytes(HEAP_MAX_BYTES)
        .grace(Duration::from_secs(5));
    let names = master.def_process(|()| pair().add_one());
    let add = master.def_process(|counter: Counter| counter.fetch_add(1, SeqCst));
    let echo = master.def_process(|all: Vec<Counter>| all);
    let makes = master.def_process(|value: u64| {
        let heap = create_heap_with_max(HEAP_PREFIX, HEAP_MAX_BYTES).unwrap();
        let made = ShmArc::new_in(&heap, AtomicU64::new(value)).unwrap();
        drop(ShmArc::new_in(&heap, [0_u8; 500]).unwrap());
        made
    });
    let renames = master.def_process(|()| {
        let one = try_named("one", |heap| ShmArc::new_in(heap, AtomicU64::new(1)));
        assert_eq!(one.unwrap().load(SeqCst), 1);
        remove_named::<ShmArc<AtomicU64>>("one").unwrap();
    });
    let first: Process<(), u64> = master.def_process(move |(): ()| {
        let mut killed = 0;
        // Several ask for the heap of the run, and for a name in it, at once.
        let asking: Vec<Running<()>> = (0..3).map(|_| names.start(&()).unwrap()).collect();
        let done = asking
            .iter()
            .filter_map(|one| value(one.join(), &mut killed))
            .count() as u64;
        let waited = match killed {
            0 => pair().wait_for(3, PATIENCE),
            _ => pair().wait_for(done, PATIENCE),
        };
        assert!((done..=done + killed).contains(&waited), "{waited}");
        pair().add_one();
        assert_eq!(pair().left.load(SeqCst), pair().right.load(SeqCst));

        // A value from a process that has ended, to others and back.
        if let Some(counter) = value(makes.start(&5).unwrap().join(), &mut killed) {
            let before = killed;
            value(add.start(&counter).unwrap().join(), &mut killed);
            let all = vec![counter.clone(), counter.clone()];
            let echoed = value(echo.start(&all).unwrap().join(), &mut killed);
            let added = counter.load(SeqCst) - 5;
            assert!((1 - (killed - before).min(1)..=1).contains(&added));
            if killed == before {
                assert_eq!(ShmArc::strong_count(&counter), 5);
            }
            drop((all, echoed));
            let handles = ShmArc::strong_count(&counter) as u64;
            assert!(handles <= 1 + 4 * (killed - before), "{handles} are left");
            let region = netmcore_shm::region_of(ShmArc::as_ptr(&counter)).unwrap();
            Heap::attach(&region).unwrap().verify().unwrap();
        }
        for _ in 0..2 {
            value(renames.start(&()).unwrap().join(), &mut killed);
        }
        shared_heap().unwrap().verify().unwrap();
        killed
    });
    master.run(&first, &())
}

/// Objects of ours that exist.
fn objects_left() -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").unwrap().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&HEAP_PREFIX[1..]))
        .collect()
}

/// In a child: the next start on the directory works, and nothing is left of what was.
fn next_start(dir: &Path) {
    let recorded = Log::open(dir).unwrap().registered().unwrap();
    let status = in_a_child(|| {
        let mut master = Master::builder(dir).shared_heap_max_bytes(HEAP_MAX_BYTES);
        let first = master.def_process(|x: u64| {
            pair().add_one();
            spawn(|x: u64| x + pair().right.load(SeqCst), &x)
                .unwrap()
                .join()
        });
        assert_eq!(master.run(&first, &7).unwrap(), Ok(8), "a name has stayed");
    });
    assert_eq!(status, ExitStatus::Exited { code: 0 }, "the next start");
    assert_eq!(Log::open(dir).unwrap().registered().unwrap(), []);
    for object in recorded {
        let name = String::from_utf8_lossy(&object.name()[1..]).into_owned();
        assert!(
            !Path::new("/dev/shm").join(name).exists(),
            "{object} is left"
        );
    }
    assert_eq!(objects_left(), Vec::<String>::new());
}

fn crash_everywhere(ready_workers: usize, first: u64) {
    let every_step = EveryStep {
        scenario: &|dir| scenario(dir, ready_workers),
        first,
        stride: 3,
        least: 100,
        // What workers fail with whose master was the victim.
        is_expected: |text| text.contains("MasterGone"),
        next_start,
    };
    let deaths = every_step.run();
    for kind in ["proc.run.", "proc.worker.", "sem.", "shm.arc."] {
        let is_kind = |place: &String| place.starts_with(kind);
        assert!(deaths.keys().any(is_kind), "nobody died at {kind}");
    }
}

/// Runs what a victim does, by a worker that dies at each of its points in turn, until it comes to its end. Others go on meanwhile, and
/// after it. Returns where it died.
fn victims(act: fn(u64), others: fn(u64, bool)) -> BTreeMap<String, u64> {
    /// The role of the process that dies.
    const VICTIM: u32 = 7;
    // What counts is shared by those that are forked from now on.
    crash::arm_role(VICTIM, 0);
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master().shared_heap_max_bytes(HEAP_MAX_BYTES);
    let victim = master.def_process(move |at: u64| {
        crash::set_role(VICTIM);
        act(at);
    });
    let other = master.def_process(move |(at, is_after)| others(at, is_after));
    let first = master.def_process(move |()| {
        let mut deaths = BTreeMap::new();
        for at in 1.. {
            let before = Log::open(&dir).unwrap().registered().unwrap().len();
            crash::arm_role(VICTIM, at);
            let running = victim.start(&at).unwrap();
            let beside = other.start(&(at, false)).unwrap();
            let outcome = running.join();
            crash::disarm();
            beside.join().unwrap();
            other.start(&(at, true)).unwrap().join().unwrap();
            match outcome {
                Ok(()) => break,
                Err(error) => assert!(is_killed_by(SIGKILL, &error), "{error}"),
            }
            *deaths.entry(crash::died_at().unwrap()).or_default() += 1;
            // The heap of the run may have come, but no other.
            until("its heap is gone", || {
                let heaps = Log::open(&dir).unwrap().registered().unwrap().len();
                heaps <= before.max(1) && objects_left().is_empty()
            });
        }
        deaths
    });
    trial.run(master, &first, &())
}

fn assert_died_at(deaths: &BTreeMap<String, u64>, places: &[&str]) {
    eprintln!("{deaths:#?}");
    for &place in places {
        assert!(deaths.contains_key(place), "nobody died at {place}");
    }
}

fn maker_of_a_heap_killed_at_each_point() {
    let make = |_| {
        let heap = create_heap_with_max(HEAP_PREFIX, HEAP_MAX_BYTES).unwrap();
        drop(ShmArc::new_in(&heap, AtomicU64::new(1)).unwrap());
    };
    let deaths = victims(make, |_, _| ());
    assert_died_at(
        &deaths,
        &["proc.region.placed", "proc.heap.mapped", "proc.heap.made"],
    );
}

fn maker_of_a_named_value_killed_at_each_point() {
    fn name(at: u64) {
        let value = named(&format!("of round {at}"), || AtomicU64::new(at)).unwrap();
        assert_eq!(value.load(SeqCst), at);
        pair().add_one();
    }
    let others = |at, is_after| {
        pair().add_one();
        if is_after {
            name(at);
        }
    };
    let deaths = victims(name, others);
    assert_died_at(&deaths, &["shm.arc.name_locked", "test.pair.half"]);
}

/// The heap of a run is made once, so each death needs a run.
fn maker_of_the_shared_heap_killed_at_each_point() {
    let mut deaths = BTreeMap::new();
    for at in 1.. {
        let trial = Trial::new();
        let mut master = trial.master().shared_heap_max_bytes(HEAP_MAX_BYTES);
        crash::arm_role(1, at);
        let asks = master.def_process(|is_victim: bool| {
            crash::set_role(u32::from(is_victim));
            let heap = shared_heap().unwrap();
            drop(ShmArc::new_in(&heap, AtomicU64::new(1)).unwrap());
            heap.region().id().0
        });
        let dir = trial.dir().to_path_buf();
        let first = master.def_process(move |()| {
            let victim = asks.start(&true).unwrap();
            let others: Vec<_> = (0..2).map(|_| asks.start(&false).unwrap()).collect();
            let mut ids: Vec<u64> = others.iter().map(|one| one.join().unwrap()).collect();
            let mut killed = 0;
            ids.extend(value(victim.join(), &mut killed));
            ids.dedup();
            assert_eq!(ids.len(), 1, "there is one heap");
            until("there is one heap only", || {
                Log::open(&dir).unwrap().registered().unwrap().len() == 1
            });
            shared_heap().unwrap().verify().unwrap();
            killed
        });
        let killed = trial.run(master, &first, &());
        crash::disarm();
        if killed == 0 {
            break;
        }
        *deaths.entry(crash::died_at().unwrap()).or_default() += 1;
    }
    assert!(deaths.len() > 5, "{deaths:?}");
    assert_died_at(&deaths, &[]);
}

fn crash_with_ready_workers_harms_no_shared_value() {
    crash_everywhere(3, 1);
}

fn crash_without_ready_workers_harms_no_shared_value() {
    crash_everywhere(0, 2);
}

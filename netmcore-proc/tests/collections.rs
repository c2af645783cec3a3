//! Guards against collections and locks that hold up the others, or lose what others have put in, when a worker is killed: all of them together,
//! under a real master.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the random kills.

mod trial;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use netmcore_proc::{JoinError, Process, Running, ShmArc, shared_heap};
use netmcore_sem::{LockError, OwnerDied, ShmMutex, ShmRwLock, ShmSemaphore};
use netmcore_shm::{Heap, Mailbox, ShmArray, ShmBuffer, ShmCell, ShmHashMap, ShmQueue, ShmSafe};
use serde::{Deserialize, Serialize};
use trial::Trial;

netmcore_forktest::forktests!(random_kills_of_workers_hold_up_nobody);

const WORKERS: usize = 4;
const PERMITS: u32 = 2;
const KEYS: u64 = 50;
const RECORD_BYTES: usize = 16;
/// Longer than anything that is in order, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Both halves are alike, unless somebody is in the middle of changing it.
type Pair = [u64; 2];

fn count_up(pair: &mut Pair) {
    assert_whole(pair);
    pair[0] += 1;
    std::hint::spin_loop();
    pair[1] += 1;
}

fn assert_whole(pair: &Pair) {
    assert_eq!(pair[0], pair[1], "half changed, and nobody was told");
}

fn repair(pair: &mut Pair) {
    pair[1] = pair[0];
}

/// One of each.
#[derive(Clone, Serialize, Deserialize)]
struct Everything {
    queue: ShmArc<ShmQueue<Pair>>,
    mailbox: ShmArc<Mailbox<Pair>>,
    map: ShmArc<ShmHashMap<u64, Pair>>,
    array: ShmArc<ShmArray<Pair>>,
    buffer: ShmArc<ShmBuffer>,
    cell: ShmArc<ShmCell<Pair>>,
    mutex: ShmArc<ShmMutex<Pair>>,
    lock: ShmArc<ShmRwLock<Pair>>,
    permits: ShmArc<ShmSemaphore>,
    /// Rounds that each worker has finished, its predecessors included.
    progress: ShmArc<[AtomicU64; WORKERS]>,
    stop: ShmArc<AtomicU64>,
}

fn share<T: ShmSafe + Sync>(heap: &Heap, value: T) -> ShmArc<T> {
    ShmArc::new_in(heap, value).unwrap()
}

impl Everything {
    fn new() -> Everything {
        let heap = &shared_heap().unwrap();
        Everything {
            queue: share(heap, ShmQueue::unbounded_in(heap).unwrap()),
            mailbox: share(heap, Mailbox::new_in(heap, 4).unwrap()),
            map: share(heap, ShmHashMap::new_in(heap).unwrap()),
            array: share(heap, ShmArray::make_in(heap, 40, [0, 0]).unwrap()),
            buffer: share(heap, ShmBuffer::new_in(heap)),
            cell: share(heap, ShmCell::new_in(heap, [0, 0]).unwrap()),
            mutex: share(heap, ShmMutex::new([0, 0])),
            lock: share(heap, ShmRwLock::new([0, 0])),
            permits: share(heap, ShmSemaphore::new(PERMITS)),
            progress: share(heap, [const { AtomicU64::new(0) }; WORKERS]),
            stop: share(heap, AtomicU64::new(0)),
        }
    }

    /// What a worker does again and again: every operation ends, whoever is killed.
    fn round(&self, number: usize, round: u64) {
        // No more is popped than was pushed by the same one, so no pop waits for ever.
        self.queue.push([round, round]).unwrap();
        assert_whole(&self.queue.pop().unwrap());

        let _ = self.mailbox.try_send([round, round]);
        if number == 0
            && let Ok(receiver) = self.mailbox.receiver()
        {
            receiver
                .arrived()
                .iter()
                .for_each(|message| assert_whole(message));
        }

        let key = (round * 7 + number as u64) % KEYS;
        let next = |pair: Option<&Pair>| {
            let mut pair = pair.copied().unwrap_or_default();
            count_up(&mut pair);
            Some(pair)
        };
        self.map.update(key, next).unwrap();
        if let Some(pair) = self.map.get(&(round % KEYS)) {
            assert_whole(&pair);
        }
        if round.is_multiple_of(13) {
            self.map.remove(&key).unwrap();
        }

        let start = (round as usize * 3) % 35;
        let mut part = self.array.claim(start..start + 5).unwrap();
        if part.abandoned_by().is_some() {
            part.iter_mut().for_each(repair);
        }
        part.iter_mut().for_each(count_up);
        drop(part);

        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&round.to_le_bytes());
        record[8..].copy_from_slice(&round.to_le_bytes());
        let added = self.buffer.add(&record).unwrap();
        self.buffer.delete_to(added.start.saturating_sub(1 << 16));

        assert_whole(&self.cell.load());
        self.cell.update(|pair| pair.map(|half| half + 1)).unwrap();

        match self.mutex.lock() {
            Ok(mut guard) => count_up(&mut guard),
            Err(OwnerDied { mut guard, .. }) => repair(&mut guard),
        }
        match self.lock.read() {
            Ok(guard) => assert_whole(&guard),
            Err(LockError::OwnerDied(_)) => {}
            Err(error) => panic!("{error}"),
        }
        match self.lock.write() {
            Ok(mut guard) => count_up(&mut guard),
            Err(LockError::OwnerDied(mut died)) => repair(&mut died.guard),
            Err(error) => panic!("{error}"),
        }
        drop(self.permits.acquire(1 + (round % 2) as u32));
        self.progress[number].fetch_add(1, SeqCst);
    }

    /// What holds when nobody works any more.
    fn check(&self) {
        self.map.verify().unwrap();
        self.map.for_each(|_, pair| assert_whole(pair));
        assert!(self.queue.len() <= WORKERS * 100);
        self.queue.for_each(assert_whole);
        if !self.array.take_abandoned().is_empty() {
            self.array.claim(..).unwrap().iter_mut().for_each(repair);
        }
        self.array.read(..).unwrap().iter().for_each(assert_whole);
        let records = self.buffer.sub(..).unwrap();
        assert!(records.len().is_multiple_of(RECORD_BYTES));
        for record in records.chunks(RECORD_BYTES) {
            assert_eq!(record[..8], record[8..]);
        }
        assert_eq!(self.permits.available(), PERMITS);
        assert_eq!(self.lock.reader_count(), 0);
        let heap = shared_heap().unwrap();
        heap.verify().unwrap();
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn random_kills_of_workers_hold_up_nobody() {
    let seed = number("NETMCORE_SEED").unwrap_or_else(netmcore_sys::process::random_u64);
    let kills = number("NETMCORE_KILLS").unwrap_or(100);
    eprintln!("replay: NETMCORE_SEED={seed} NETMCORE_KILLS={kills}");
    let trial = Trial::new();
    let mut master = trial.master();
    let worker = master.def_process(|(number, everything): (usize, Everything)| {
        let mut round = 0;
        while everything.stop.load(SeqCst) == 0 {
            everything.round(number, round);
            round += 1;
        }
    });
    let first = master.def_process(move |()| kill_some(worker, seed, kills));
    let (calm, after_kills) = trial.run(master, &first, &());
    for (what, mut waits) in [("nothing", calm), ("a kill", after_kills)] {
        waits.sort_unstable();
        let at = |share: usize| waits[(waits.len() - 1) * share / 100];
        let (half, most, all) = (at(50), at(90), at(100));
        eprintln!(
            "after {what} all others had gone on in {half} µs (median), {most} (9 of 10), {all} (all)"
        );
    }
}

/// Kills workers at random moments. For each, after how many microseconds all others had finished a round since; before it the same without a
/// death, for comparison.
fn kill_some(
    worker: Process<(usize, Everything), ()>,
    seed: u64,
    kills: u64,
) -> (Vec<u64>, Vec<u64>) {
    let mut random = seed | 1;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    let everything = Everything::new();
    let start = |number| worker.start(&(number, everything.clone())).unwrap();
    let mut running: Vec<Running<()>> = (0..WORKERS).map(start).collect();
    let progress = || {
        everything
            .progress
            .each_ref()
            .map(|rounds| rounds.load(SeqCst))
    };
    let wait_until_all_go_on = |but: Option<usize>| {
        let (before, since) = (progress(), Instant::now());
        let go_on = || {
            let now = progress();
            (0..WORKERS).all(|one| Some(one) == but || now[one] > before[one])
        };
        while !go_on() {
            assert!(
                since.elapsed() < PATIENCE,
                "{before:?}, and now {:?}",
                progress()
            );
            std::thread::yield_now();
        }
        since.elapsed().as_micros() as u64
    };
    wait_until_all_go_on(None);
    let waits = (0..kills).map(|_| {
        let pause = Instant::now() + Duration::from_micros(below(3_000));
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        let victim = below(WORKERS as u64) as usize;
        let calm = wait_until_all_go_on(Some(victim));
        running[victim].kill().unwrap();
        match running[victim].join() {
            Err(JoinError::Killed { .. }) => {}
            other => panic!("{other:?}"),
        }
        let wait = wait_until_all_go_on(Some(victim));
        running[victim] = start(victim);
        (calm, wait)
    });
    let waits = waits.unzip();
    wait_until_all_go_on(None);
    everything.stop.store(1, SeqCst);
    running.iter().for_each(|process| process.join().unwrap());
    everything.check();
    waits
}

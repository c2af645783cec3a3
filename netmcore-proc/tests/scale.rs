//! Many, large and long: guards against costs that grow without need, limits that are met without a word, and
//! numbers that wrap.

mod trial;

use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::Instant;

use netmcore_proc::{Error, JoinError, Process, Running, spawn};
use netmcore_sys::process::{self, Limit, Pid, Resource};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use trial::{Channel, Trial, in_a_worker, until};

netmcore_forktest::forktests!(
    two_thousand_processes_live_at_once,
    generations_of_a_small_table_do_not_mix,
    many_askers_share_a_small_table,
    many_threads_of_one_worker_start_and_join,
    messages_of_all_lengths_arrive,
    message_of_a_gibibyte_arrives,
    memory_of_messages_is_given_back,
    too_few_processes_allowed_is_told,
    too_few_descriptors_allowed_is_told,
    hardly_any_descriptors_is_an_error_at_the_start,
);

fn two_thousand_processes_live_at_once() {
    let lines = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available_kib: u64 = lines
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap();
    let descriptors = process::get_limit(Resource::DescriptorCount).unwrap().hard;
    let processes = process::get_limit(Resource::ProcessCount).unwrap().soft;
    // A small worker has some 300 KiB of its own, page tables included.
    let count = 2000
        .min(available_kib / 1000)
        .min(descriptors.unwrap_or(u64::MAX).saturating_sub(100))
        .min(processes.unwrap_or(u64::MAX).saturating_sub(100));
    eprintln!("{count} processes");
    let trial = Trial::new();
    let mut master = trial.master();
    let (here, gate) = (Channel::new(), Channel::new());
    let waiter = master.def_process(move |number: u64| {
        here.send(number);
        gate.receive();
        number
    });
    let first = master.def_process(move |(): ()| {
        let all: Vec<Running<u64>> = (0..count).map(|n| waiter.start(&n).unwrap()).collect();
        let mut sum = 0;
        for _ in 0..count {
            sum += here.receive();
        }
        assert_eq!(sum, count * (count - 1) / 2, "all of them are here");
        let master = Pid::parent().unwrap();
        let alive = process::processes_with_parent(master).unwrap().len() as u64;
        assert!(alive > count, "{alive} are alive");
        for number in 0..count {
            gate.send(number);
        }
        for (number, one) in all.iter().enumerate() {
            assert_eq!(one.join(), Ok(number as u64));
        }
    });
    trial.run(master, &first, &());
}

fn generations_of_a_small_table_do_not_mix() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(64);
    let twice = master.def_process(|x: u64| 2 * x);
    let first = master.def_process(move |(): ()| {
        let mut last = None;
        let mut old: Vec<Running<u64>> = Vec::new();
        for number in 0..20_000 {
            let running = twice.start(&number).unwrap();
            assert!(Some(running.id()) > last, "ids count up");
            last = Some(running.id());
            assert_eq!(running.join(), Ok(2 * number));
            // Handles of all ages stay dead.
            old.push(running);
            if number % 500 == 499 {
                for (index, handle) in old.iter().enumerate().step_by(97) {
                    let joined = handle.join_nowait();
                    assert!(
                        matches!(joined, Err(JoinError::AlreadyJoined { .. })),
                        "{index}: {joined:?}"
                    );
                }
            }
        }
    });
    trial.run(master, &first, &());
}

/// Starts as soon as there is room.
fn start_when_possible<A, R>(process: &Process<A, R>, arg: &A) -> Running<R>
where
    A: Serialize + de::DeserializeOwned,
    R: Serialize + de::DeserializeOwned,
{
    let mut started = None;
    until("room in the table", || match process.start(arg) {
        Ok(running) => {
            started = Some(running);
            true
        }
        Err(Error::ProcessTableFull { .. }) => false,
        Err(error) => panic!("{error}"),
    });
    started.unwrap()
}

fn many_askers_share_a_small_table() {
    let trial = Trial::new();
    let mut master = trial.master().process_limit(16);
    let twice = master.def_process(|x: u64| 2 * x);
    let asker = master.def_process(move |from: u64| {
        for number in from..from + 150 {
            let running = start_when_possible(&twice, &number);
            assert_eq!(running.join(), Ok(2 * number));
        }
    });
    let first = master.def_process(move |(): ()| {
        let askers: Vec<_> = (0..8)
            .map(|n| start_when_possible(&asker, &(n * 1000)))
            .collect();
        for one in askers {
            one.join().unwrap();
        }
        // None of the slots has been lost.
        let all: Vec<_> = (0..15).map(|n| twice.start(&n).unwrap()).collect();
        all.iter().map(|one| one.join().unwrap()).sum::<u64>()
    });
    assert_eq!(trial.run(master, &first, &()), 210);
}

fn many_threads_of_one_worker_start_and_join() {
    in_a_worker(|| {
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                scope.spawn(move || {
                    for number in 0..100 {
                        let sent = thread * 1000 + number;
                        let one = spawn(|x: u64| vec![x; 50], &sent).unwrap();
                        let two = spawn(|x: u64| x + 1, &sent).unwrap();
                        assert_eq!(two.join(), Ok(sent + 1));
                        assert_eq!(one.join(), Ok(vec![sent; 50]));
                    }
                });
            }
        });
    });
}

// ---- messages ----------------------------------------------------------------------------------

/// Bytes that serde takes as a whole.
#[derive(PartialEq)]
struct Bytes(Vec<u8>);

impl Bytes {
    /// A pattern by which misplaced pieces are found.
    fn new(len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        for (index, chunk) in bytes.chunks_mut(4096).enumerate() {
            chunk[0] = (index % 251) as u8;
        }
        Bytes(bytes)
    }

    fn check(&self, len: usize) {
        assert_eq!(self.0.len(), len);
        for (index, chunk) in self.0.chunks(4096).enumerate() {
            assert_eq!(chunk[0], (index % 251) as u8, "page {index}");
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;
        impl Visitor<'_> for Whole {
            type Value = Bytes;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Whole)
    }
}

fn messages_of_all_lengths_arrive() {
    let trial = Trial::new();
    let mut master = trial.master();
    let back = master.def_process(|bytes: Bytes| bytes);
    let first = master.def_process(move |(): ()| {
        let mut len = 0;
        while len < 20 << 20 {
            let running = back.start(&Bytes::new(len)).unwrap();
            running.join().unwrap().check(len);
            len = len * 5 / 3 + 1;
        }
        for page in [1 << 12, 1 << 15, 1 << 16, 1 << 20, 1 << 24] {
            for len in [page - 9, page - 8, page - 1, page, page + 1] {
                let running = back.start(&Bytes::new(len)).unwrap();
                running.join().unwrap().check(len);
            }
        }
    });
    trial.run(master, &first, &());
}

fn message_of_a_gibibyte_arrives() {
    const GIB: usize = 1 << 30;
    let lines = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available_kib: u64 = lines
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap();
    if available_kib < 6 << 20 {
        netmcore_forktest::skip("less than 6 GiB of memory are available");
    }
    let trial = Trial::new();
    let mut master = trial.master();
    let gives = master.def_process(|len: usize| Bytes::new(len));
    let takes = master.def_process(|bytes: Bytes| bytes.check(GIB));
    let first = master.def_process(move |(): ()| {
        let start = Instant::now();
        let whole = gives.start(&GIB).unwrap().join().unwrap();
        whole.check(GIB);
        eprintln!("result: {:?}", start.elapsed());
        let start = Instant::now();
        takes.start(&whole).unwrap().join().unwrap();
        eprintln!("argument: {:?}", start.elapsed());
    });
    trial.run(master, &first, &());
}

fn memory_of_messages_is_given_back() {
    let trial = Trial::new();
    // Room for a few at once only.
    let mut master = trial.master().message_memory(64 << 20);
    let back = master.def_process(|bytes: Bytes| bytes);
    let dies = master.def_process(|bytes: Bytes| -> Bytes {
        let _kept = bytes;
        process::exit_now(1)
    });
    let first = master.def_process(move |(): ()| {
        for round in 0..60 {
            let len = (1 << 20) * (1 + round % 16);
            let running = back.start(&Bytes::new(len)).unwrap();
            running.join().unwrap().check(len);
            assert!(dies.start(&Bytes::new(len)).unwrap().join().is_err());
            // Taken, and thrown away.
            back.start(&Bytes::new(len)).unwrap().detach().unwrap();
        }
        // Not all of it, since the last of the detached may still be there.
        back.start(&Bytes::new(20 << 20)).unwrap().join().unwrap();
    });
    trial.run(master, &first, &());
}

// ---- limits ------------------------------------------------------------------------------------

/// Waiters beyond what the machine allows: some live, the others are told why they do not; afterwards all is
/// as before.
fn start_too_many(trial: &Trial, ready_workers: usize, limit_name: &'static str) {
    let mut master = trial.master().ready_workers(ready_workers);
    let (here, gate) = (Channel::new(), Channel::new());
    let waiter = master.def_process(move |number: u64| {
        here.send(number);
        gate.receive()
    });
    let first = master.def_process(move |(): ()| {
        for _ in 0..2 {
            let mut left: Vec<Running<u64>> = Vec::new();
            let mut refused = 0;
            let mut here_count = 0;
            left.extend((0..60).map(|n| waiter.start(&n).unwrap()));
            // Those that live wait for the gate. (No thread counts them: it would need a process, too.)
            until("each lives or is refused", || {
                left.retain(|one| match one.join_nowait() {
                    Ok(None) => true,
                    Err(JoinError::NotStarted { reason, .. }) => {
                        assert!(reason.contains(limit_name), "{reason}");
                        refused += 1;
                        false
                    }
                    other => panic!("{other:?}"),
                });
                while here.receive_nowait().is_some() {
                    here_count += 1;
                }
                here_count == left.len()
            });
            assert!(refused > 0, "none was refused");
            assert!(!left.is_empty(), "none was started");
            assert_eq!(refused + left.len(), 60);
            for _ in &left {
                gate.send(7);
            }
            for one in left {
                assert_eq!(one.join(), Ok(7));
            }
            // There is room again; for one at a time, at least.
            until("a start", || {
                let running = spawn(|x: u64| x, &3).unwrap();
                running.join() == Ok(3)
            });
        }
    });
    trial.run(master, &first, &());
}

fn too_few_processes_allowed_is_told() {
    const ALLOWED: u64 = 12;
    /// Hopefully nobody's.
    const UID: &str = "54321";
    const MARK: &str = "NETMCORE_TEST_AS_NOBODY";
    if std::env::var_os(MARK).is_some() {
        let limit = Limit {
            soft: Some(ALLOWED),
            hard: Some(ALLOWED),
        };
        process::set_limit(Resource::ProcessCount, limit).unwrap();
        for ready_workers in [0, 3, 30] {
            let trial = Trial::new();
            start_too_many(&trial, ready_workers, "ulimit -u");
        }
        return;
    }
    if process::effective_uid() != 0 {
        netmcore_forktest::skip("only root can become a user that has no other processes");
    }
    // The limit does not hold for root.
    let status = Command::new("setpriv")
        .args(["--reuid", UID, "--regid", UID, "--clear-groups"])
        .arg(std::env::current_exe().unwrap())
        .args(["--run", "too_few_processes_allowed_is_told"])
        .env(MARK, "1")
        // Ours may be closed to that user.
        .env("TMPDIR", "/tmp")
        .status();
    match status {
        Ok(status) if [126, 127].contains(&status.code().unwrap_or(0)) => {
            netmcore_forktest::skip("setpriv cannot run this program as another user")
        }
        Ok(status) => assert!(status.success(), "as another user: {status}"),
        Err(error) => netmcore_forktest::skip(&format!("setpriv: {error}")),
    }
}

fn too_few_descriptors_allowed_is_told() {
    let limit = Limit {
        soft: Some(48),
        hard: Some(48),
    };
    // One that the program was given with a number that it could not get now.
    let given = std::fs::File::open("/dev/null").unwrap();
    let given = process::move_above(given.into(), 300).unwrap();
    process::set_limit(Resource::DescriptorCount, limit).unwrap();
    for ready_workers in [0, 3, 64] {
        let trial = Trial::new();
        start_too_many(&trial, ready_workers, "ulimit -n");
        // Workers have it, too.
        let mut master = trial.master();
        let number = given.as_raw_fd();
        let first = master.def_process(move |(): ()| {
            let open = process::open_descriptors().unwrap();
            assert!(open.contains(&number), "{open:?}");
        });
        trial.run(master, &first, &());
    }
}

fn hardly_any_descriptors_is_an_error_at_the_start() {
    let trial = Trial::new();
    let mut outcomes = Vec::new();
    // From what is open now: what the run itself needs is missing, or hardly there.
    for allowed in (8..40).rev() {
        let limit = Limit {
            soft: Some(allowed),
            hard: Some(allowed),
        };
        process::set_limit(Resource::DescriptorCount, limit).unwrap();
        let mut master = trial.master().ready_workers(1);
        let first = master.def_process(|x: u64| x + 1);
        match master.run(&first, &1) {
            Ok(result) => {
                assert_eq!(result, 2);
                outcomes.push(true);
            }
            Err(error) => {
                let shown = error.to_string();
                assert!(
                    ["EMFILE", "ulimit -n", "Too many open files", "os error 24"]
                        .iter()
                        .any(|word| shown.contains(word)),
                    "{allowed}: {shown}"
                );
                outcomes.push(false);
            }
        }
    }
    assert!(outcomes[0], "40 are enough");
    assert!(!outcomes[outcomes.len() - 1], "8 are not");
}

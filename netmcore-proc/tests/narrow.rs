//! Guards against programs that need more addresses or more shared memory than there is, and die of it: a run under `ulimit -v`, and
//! one with a tiny /dev/shm.

#[path = "objects/mod.rs"]
mod objects;
mod trial;

use std::process::{Command, Output};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use netmcore_proc::{
    Error, Heap, JoinError, Region, ResourceId, ShmArc, create_heap, create_preallocated_shm,
    create_region, get_region, named, shared_heap, spawn,
};
use netmcore_shm::SpaceLimit;
use objects::{recorded, wait_until};
use trial::{Trial, in_a_worker};

netmcore_forktest::forktests!(
    run_in_4_gib_of_addresses,
    run_in_1_gib_of_addresses,
    run_in_512_mib_of_addresses,
    too_few_addresses_are_told,
    run_with_small_files,
    full_shm_is_told_and_the_run_goes_on,
    no_shm_at_all_is_told,
);

/// Set in the program that is run again, inside of the limits.
const INSIDE: &str = "NETMCORE_TEST_NARROW";

const MIB: u64 = 1 << 20;

/// Runs this test once more, behind a shell that sets limits: `script` ends in `exec "$0" "$@"`. True: this is inside.
fn inside(test: &str, shell: &[&str], script: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new(shell[0])
        .args(&shell[1..])
        .args(["-c", &format!("{script} || exit 66; exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--run", test])
        .env(INSIDE, "1")
        .output();
    match output {
        Err(error) => netmcore_forktest::skip(&format!("{shell:?} cannot be started: {error}")),
        Ok(output) => judge(&output),
    }
    false
}

fn judge(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(66) || said.contains("unshare failed") {
        netmcore_forktest::skip(&format!("the limits cannot be had: {said}"));
    }
    eprint!("{}{said}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", output.status);
}

fn inside_addresses(test: &str, limit_mib: u64) -> bool {
    inside(test, &["sh"], &format!("ulimit -v {}", limit_mib * 1024))
}

/// In a mount namespace of its own.
fn inside_shm(test: &str, options: &str) -> bool {
    let unshare = ["unshare", "--mount", "--propagation", "private", "sh"];
    let mount = format!("mount -t tmpfs -o {options} none /dev/shm");
    inside(test, &unshare, &mount)
}

// ---- addresses -----------------------------------------------------------------------------------

fn add(counter: ShmArc<AtomicU64>) -> u64 {
    counter.fetch_add(1, SeqCst)
}

/// A run with all that takes addresses.
fn use_addresses() {
    in_a_worker(|| {
        let default = |region: &Region| region.max_len_bytes() as u64;
        let counter = named("counter", || AtomicU64::new(1)).unwrap();
        assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), 1);
        let heaps: Vec<Heap> = (0..4)
            .map(|_| create_heap("/nmc-narrow-").unwrap())
            .collect();
        let (id, _) = create_preallocated_shm("/nmc-narrow-", 4096).unwrap();
        let region = get_region(id).unwrap();
        let shared = shared_heap().unwrap();
        for region in [&region, shared.region(), heaps[0].region()] {
            assert!(default(region) < Region::DEFAULT_MAX_LEN_BYTES as u64);
            assert!(default(region) >= 8 * MIB, "{region:?}");
        }
        eprintln!("regions may grow to {} MiB", default(&region) / MIB);
        for heap in &heaps {
            let words = ShmArc::new_in(heap, [7_u64; 100_000]).unwrap();
            let last = |words: ShmArc<[u64; 100_000]>| words[99_999];
            assert_eq!(spawn(last, &words).unwrap().join().unwrap(), 7);
        }
        // Long messages, threads, and many processes.
        let long = vec![9_u8; 4 << 20];
        let echoed = spawn(|bytes: Vec<u8>| bytes, &long).unwrap().join();
        assert_eq!(echoed.unwrap(), long);
        let threads = |()| {
            let spawned: Vec<_> = (0..4).map(|n| std::thread::spawn(move || n)).collect();
            let ended = spawned.into_iter().map(|one| one.join().unwrap());
            ended.sum::<u64>()
        };
        let running: Vec<_> = (0..20).map(|_| spawn(threads, &()).unwrap()).collect();
        assert!(running.iter().all(|one| one.join() == Ok(6)));

        // When there are no more addresses it is said what to change, and all goes on.
        let mut made = 0;
        let error = loop {
            match create_preallocated_shm("/nmc-narrow-", 4096) {
                Ok(_) => made += 1,
                Err(error) => break error,
            }
            assert!(made < 20, "sixteen of them fit into the arena");
        };
        let Error::Memory { source, .. } = &error else {
            panic!("{error}");
        };
        assert!(matches!(source, netmcore_shm::Error::ArenaFull { .. }));
        let text = error.to_string();
        for part in ["smaller maximum length", "ulimit -v"] {
            assert!(text.contains(part), "{text}");
        }
        let (_small, region) = create_region("/nmc-narrow-", 4096, MIB).unwrap();
        assert_eq!(region.max_len_bytes() as u64, MIB);
        assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), 2);
    });
}

fn run_in_4_gib_of_addresses() {
    if inside_addresses("run_in_4_gib_of_addresses", 4096) {
        use_addresses();
    }
}

fn run_in_1_gib_of_addresses() {
    if inside_addresses("run_in_1_gib_of_addresses", 1024) {
        use_addresses();
    }
}

fn run_in_512_mib_of_addresses() {
    if inside_addresses("run_in_512_mib_of_addresses", 512) {
        use_addresses();
    }
}

fn too_few_addresses_are_told() {
    if inside_addresses("too_few_addresses_are_told", 128) {
        let trial = Trial::new();
        let mut master = trial.master();
        let first = master.def_process(|()| ());
        let error = trial.try_run(master, &first, &()).unwrap_err();
        assert!(error.to_string().contains("ulimit -v"), "{error}");
        let error = {
            let _master = trial.master();
            create_heap("/nmc-narrow-").unwrap_err()
        };
        assert!(error.to_string().contains("ulimit -v"), "{error}");
    }
}

// ---- files ---------------------------------------------------------------------------------------

/// Shared memory counts as files: of 64 MiB at the most.
fn run_with_small_files() {
    // In blocks of 512 bytes in some shells, of 1024 in others.
    if !inside("run_with_small_files", &["bash"], "ulimit -f 65536") {
        return;
    }
    in_a_worker(|| {
        let counter = named("counter", || AtomicU64::new(1)).unwrap();
        assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), 1);
        let long = vec![9_u8; 4 << 20];
        let echo = |bytes: Vec<u8>| bytes;
        assert_eq!(spawn(echo, &long).unwrap().join().unwrap(), long);
        // What is too long for a file is told by whoever asks for it, and all goes on.
        let too_long = vec![9_u8; 40 << 20];
        let error = spawn(echo, &too_long).map(drop).unwrap_err();
        assert!(error.to_string().contains("bytes"), "{error}");
        let (_region, region) = create_region("/nmc-narrow-", 4096, 1 << 30).unwrap();
        region.grow(60 * MIB).unwrap();
        let error = region.grow(65 * MIB).unwrap_err();
        assert!(error.to_string().contains("ulimit -f"), "{error}");
        let fill = |()| {
            let heap = create_heap("/nmc-narrow-").unwrap();
            let mut held = Vec::new();
            loop {
                match ShmArc::new_in(&heap, [1_u64; 32 << 10]) {
                    Ok(words) => held.push(words),
                    Err(error) => break error.to_string(),
                }
                assert!(held.len() < 1000, "there are 64 MiB");
            }
        };
        let error = spawn(fill, &()).unwrap().join().unwrap();
        assert!(error.contains("ulimit -f"), "{error}");
        assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), 2);
    });
}

// ---- shared memory -------------------------------------------------------------------------------

fn assert_mount_is_full(error: &netmcore_shm::Error) {
    assert!(
        matches!(
            error,
            netmcore_shm::Error::NoSpace {
                limit: SpaceLimit::Mount(_),
                ..
            }
        ),
        "{error}"
    );
    let text = error.to_string();
    assert!(text.contains("/dev/shm"), "{text}");
}

fn of_memory(error: Error) -> netmcore_shm::Error {
    match error {
        Error::Memory { source, .. } => source,
        other => panic!("{other}"),
    }
}

/// The names of what is there.
fn objects_in_shm() -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn full_shm_is_told_and_the_run_goes_on() {
    const TEST: &str = "full_shm_is_told_and_the_run_goes_on";
    if !inside_shm(TEST, "size=96m,nr_inodes=64") {
        return;
    }
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let counter = named("counter", || AtomicU64::new(0)).unwrap();
        // Growth takes what there is, and no more.
        let (filler, region) = create_region("/nmc-narrow-", 4096, 1 << 30).unwrap();
        assert_mount_is_full(&region.grow(128 * MIB).unwrap_err());
        let mut len_bytes = region.len_bytes().unwrap();
        for step in [MIB / 4, 4096] {
            while region.grow(len_bytes + step).is_ok() {
                len_bytes = region.len_bytes().unwrap();
            }
        }
        assert_mount_is_full(&region.grow(len_bytes + MIB).unwrap_err());

        // With the mount full, nothing new can be had, here or elsewhere, and nothing is left of the attempts.
        let objects = (objects_in_shm(), recorded(&dir));
        let make = |()| {
            for _ in 0..40 {
                let source = of_memory(create_heap("/nmc-narrow-").unwrap_err());
                assert_mount_is_full(&source);
            }
            let source = of_memory(create_preallocated_shm("/nmc-narrow-", MIB).unwrap_err());
            assert_mount_is_full(&source);
        };
        spawn(make, &()).unwrap().join().unwrap();
        make(());
        assert_eq!((objects_in_shm(), recorded(&dir)), objects);

        // The heap that is there is used up at some time, and then says so, in every process.
        let fill = |()| {
            let heap = shared_heap().unwrap();
            let mut held = Vec::new();
            let error = loop {
                match ShmArc::new_in(&heap, [1_u64; 32 << 10]) {
                    Ok(words) => held.push(words),
                    Err(error) => break error,
                }
                assert!(held.len() < 1000, "there are 96 MiB");
            };
            let text = error.to_string();
            assert!(
                matches!(
                    error,
                    netmcore_shm::Error::NoSpace { .. }
                        | netmcore_shm::Error::OutOfPoolMemory { .. }
                ),
                "{text}"
            );
            held.iter().all(|words| words.iter().all(|&word| word == 1))
        };
        assert!(spawn(fill, &()).unwrap().join().unwrap());
        assert!(spawn(fill, &()).unwrap().join().unwrap());
        shared_heap().unwrap().verify().unwrap();

        // The run goes on: what was there is, and processes start and end.
        assert_eq!(spawn(add, &counter).unwrap().join().unwrap(), 0);
        let id: ResourceId = filler.id();
        let touch = |id: ResourceId| {
            let region = get_region(id).unwrap();
            region.len_bytes().unwrap()
        };
        assert_eq!(spawn(touch, &id).unwrap().join().unwrap(), len_bytes);
        assert_eq!(counter.load(SeqCst), 1);
    });
    trial.run(master, &first, &());
    assert_eq!(objects_in_shm(), [""; 0]);
}

fn no_shm_at_all_is_told() {
    const TEST: &str = "no_shm_at_all_is_told";
    if !inside_shm(TEST, "size=4k,nr_inodes=16") {
        return;
    }
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| {
        let ask = |()| {
            let source = of_memory(shared_heap().map(drop).unwrap_err());
            assert_mount_is_full(&source);
            let source = of_memory(named("one", || 1_u64).map(drop).unwrap_err());
            assert_mount_is_full(&source);
        };
        ask(());
        // Each that asks tries, and those that wait do not wait for ever.
        let running: Vec<_> = (0..6).map(|_| spawn(ask, &()).unwrap()).collect();
        let ended: Result<Vec<()>, JoinError> = running.iter().map(|one| one.join()).collect();
        ended.unwrap();
        // A process that was started while another one had its region inherited that: it goes when the master has seen the end of both.
        wait_until("no region is left", || objects_in_shm().is_empty());
    });
    trial.run(master, &first, &());
}

//! Guards against what a killed master could leave: workers that live on, objects that stay for ever, a directory
//! in which nothing can be started.
//!
//! The master is killed at random moments: while it starts, while eight workers create and release objects and start
//! processes, while it shuts down; some of its workers are stopped. `NETMCORE_KILLS` says how often (40 by
//! default), `NETMCORE_SEED` replays the choices of a run.
#![allow(
    clippy::print_stdout,
    reason = "programs tell the test how far they are"
)]

mod program;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use netmcore_pmanage::Log;
use netmcore_proc::{
    Error, JoinError, Master, Resource, command, create_file, create_sem, create_shm,
    create_shm_sc, manage_file,
};
use netmcore_sys::process::{self, Pid};
use netmcore_sys::signal::{SIGKILL, SIGSTOP};
use program::{Program, holds_within, start};

tests_and_programs! {
    tests: killed_master_leaves_nothing_behind;
    programs: works,
}

const WORKERS: u64 = 8;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

// ---- the program ----------------------------------------------------------------------------

/// Tells of an error, unless it is one of the short time between the master's death and its workers'.
fn tell(master: Pid, error: &dyn std::error::Error) {
    if !process::is_dying(master).unwrap_or(true) {
        println!("error: {error}");
    }
}

/// Arguments: the directory, that of temporary files, a file that ends the run, the prefix of names, a seed.
fn works(arguments: &[String]) {
    let [dir, files, go_on] = [0, 1, 2].map(|k| PathBuf::from(&arguments[k]));
    let (prefix, seed): (String, u64) = (arguments[3].clone(), arguments[4].parse().unwrap());
    let this = Pid::this();
    let mut master = Master::builder(dir);
    let receive = master.def_process(|resource: Resource| drop(resource));
    let worker = master.def_process(move |number: u64| {
        println!("working");
        let mut random = Random(seed ^ number);
        if number == 0 {
            // A child that is to die with its worker.
            let sleep = command("sleep").arg("600").spawn();
            drop(sleep.unwrap());
        }
        let mut held = Vec::new();
        let mut step = || -> Result<(), Error> {
            let file = files.join("created-");
            match random.below(8) {
                0 => held.push(create_file(&file)?),
                1 => held.push(create_shm(&prefix, 1 + random.below(100_000))?),
                2 => held.push(create_sem(&prefix, 1)?),
                3 => held.push(create_shm_sc(&prefix, 4096)?),
                4 => {
                    let path = files.join(format!("managed-{number}-{}", random.next()));
                    held.push(manage_file(&path)?);
                    // Gone again, if it was released in the meantime.
                    File::create(&path).unwrap();
                }
                5 => match receive.start(&create_file(&file)?)?.join() {
                    Ok(()) => {}
                    Err(JoinError::ShutDown { .. }) => return Err(Error::ShutDown),
                    Err(error) => return Err(error.into()),
                },
                6 => drop(held.pop()),
                _ => held.truncate(2),
            }
            held.truncate(12);
            Ok(())
        };
        while !go_on.exists() {
            match step() {
                Ok(()) => {}
                Err(Error::ShutDown) => break,
                Err(error) => {
                    tell(this, &error);
                    break;
                }
            }
        }
    });
    let first = master.def_process(move |_: ()| {
        let running: Vec<_> = (0..WORKERS).map(|k| worker.start(&k).unwrap()).collect();
        for one in running {
            match one.join() {
                Ok(()) | Err(JoinError::ShutDown { .. }) => {}
                Err(error) => tell(this, &error),
            }
        }
    });
    master.run(&first, &()).unwrap();
}

// ---- the test -------------------------------------------------------------------------------

/// The live processes of a process group.
fn live_members(group: Pid) -> Vec<Pid> {
    let is_live_member = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the name: state, parent, group.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let is_zombie = matches!(fields.next()?, "Z" | "X");
        Some(!is_zombie && fields.nth(1)? == group.to_string())
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Pid::new(entry.unwrap().file_name().to_str()?.parse().ok()?))
        .filter(|pid| is_live_member(pid) == Some(true))
        .collect()
}

/// Whether the process has asked for its signal on its parent's death: what is stopped before that stays until it
/// is continued, and then sees that its parent is gone.
fn is_settled(pid: Pid, master: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let is_worker = status.contains(&format!("\nPPid:\t{master}\n"));
    if !is_worker {
        // Asked for between fork and exec.
        return status.starts_with("Name:\tsleep\n");
    }
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    // A worker's second act is to close the descriptors of the master.
    let mut targets = descriptors.flatten().map(|one| fs::read_link(one.path()));
    targets.all(|target| target.is_ok_and(|target| !target.ends_with("anon_inode:[eventpoll]")))
}

/// A process in words, for the message of a failure.
fn describe(pid: Pid) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let wanted = ["Name:", "State:", "PPid:", "SigPnd:", "ShdPnd:"];
    let lines = status
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    format!("{pid}: {}", lines.collect::<Vec<_>>().join(", "))
}

fn names_in(dir: &Path, containing: &str) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains(containing))
        .collect()
}

/// Waits without sleeping on a grid of the scheduler: the moment of the kill is to be any.
fn wait_exactly(duration: Duration) {
    let until = Instant::now() + duration;
    while Instant::now() < until {
        std::thread::yield_now();
    }
}

struct Round {
    dir: PathBuf,
    files: PathBuf,
    go_on: PathBuf,
    prefix: String,
}

impl Round {
    fn start(&self, seed: u64) -> Program {
        let arguments = [
            self.dir.to_str().unwrap(),
            self.files.to_str().unwrap(),
            self.go_on.to_str().unwrap(),
            &self.prefix,
            &seed.to_string(),
        ];
        start("works", &arguments)
    }

    /// Kills the master at a random moment; how many objects it had recorded then.
    fn kill(&self, program: &mut Program, random: &mut Random) -> usize {
        let moment = random.below(3);
        if moment > 0 {
            for _ in 0..WORKERS {
                let line = program.line();
                assert_eq!(line.as_deref(), Some("working"));
            }
            wait_exactly(Duration::from_micros(random.below(20_000)));
        }
        if moment == 2 && random.below(2) == 0 {
            // While it shuts down, if it has not ended before.
            File::create(&self.go_on).unwrap();
        } else if random.below(2) == 0 {
            let mut members = live_members(program.pid());
            members.retain(|&pid| pid != program.pid() && is_settled(pid, program.pid()));
            for _ in 0..3.min(members.len()) {
                let chosen = members.swap_remove(random.below(members.len() as u64) as usize);
                // It may have ended by itself.
                let _ = process::kill(chosen, SIGSTOP);
            }
        }
        wait_exactly(Duration::from_micros(random.below(15_000)));
        let _ = process::kill(program.pid(), SIGKILL);
        let recorded = Log::open(&self.dir).and_then(|log| log.registered());
        // There is no directory yet if it was killed very early.
        recorded.map_or(0, |objects| objects.len())
    }

    fn assert_nothing_is_left(&self) {
        let mut names = names_in(&self.dir, "");
        names.sort();
        assert_eq!(names, ["netplex.lock", "netplex.pmanage"]);
        let record = fs::read(self.dir.join("netplex.pmanage")).unwrap();
        assert!(record.is_empty(), "{}", String::from_utf8_lossy(&record));
        assert_eq!(names_in(&self.files, ""), [""; 0], "temporary files");
        let objects = names_in(Path::new("/dev/shm"), &self.prefix[1..]);
        assert_eq!(objects, [""; 0], "shared memory and semaphores");
    }
}

fn killed_master_leaves_nothing_behind() {
    let given = |name| std::env::var(name).ok().map(|value| value.parse().unwrap());
    let seed = given("NETMCORE_SEED").unwrap_or_else(process::random_u64);
    let rounds = given("NETMCORE_KILLS").unwrap_or(40);
    println!("replay with NETMCORE_SEED={seed} NETMCORE_KILLS={rounds}");
    let mut random = Random(seed);
    let place = tempfile::tempdir().unwrap();
    let mut recorded = 0;
    for number in 0..rounds {
        let round = Round {
            // One after the other in one directory, as a program that is started again.
            dir: place.path().join("d"),
            files: place.path().join("files"),
            go_on: place.path().join(format!("go-on-{number}")),
            prefix: format!("/netmcore-kill-{}-{number}-", Pid::this()),
        };
        fs::create_dir_all(&round.files).unwrap();
        let mut program = round.start(random.next());
        recorded += round.kill(&mut program, &mut random);

        let group = program.pid();
        let deadline = Instant::now() + Duration::from_secs(1);
        let are_gone = holds_within(Duration::from_secs(1), || live_members(group).is_empty());
        assert!(
            are_gone,
            "round {number}: {:?} live on",
            live_members(group)
                .into_iter()
                .map(describe)
                .collect::<Vec<_>>()
        );
        // Nobody holds the output any more; what has been written tells of no error.
        while let Some(line) = program.line() {
            assert_eq!(line, "working", "round {number}");
        }
        program.wait();
        assert!(Instant::now() < deadline + Duration::from_secs(5));

        let mut master = Master::builder(&round.dir);
        let nothing = master.def_process(|_: ()| ());
        let outcome = master.run(&nothing, &());
        assert!(outcome.is_ok(), "round {number}: {outcome:?}");
        round.assert_nothing_is_left();
    }
    println!("{recorded} objects were recorded when the masters died");
    assert!(recorded as u64 >= rounds, "the workers had hardly begun");
}

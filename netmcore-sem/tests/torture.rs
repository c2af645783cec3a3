//! Guards against what nobody thought of: kills at random moments, hundreds of times, and nobody may wait for the dead.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen it.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{Child, Person, Random, fork, number, shared, wait_until};

const WORKERS: u32 = 4;

fn random_kills_hang_nobody() {
    let mut random = Random::replayed();
    let kills = number("NETMCORE_KILLS").unwrap_or(400);
    eprintln!("replay: NETMCORE_SEED={} NETMCORE_KILLS={kills}", random.0);
    let shared = shared();
    let start = |index: u32, generation: u32| -> (Person, Child) {
        let person = shared.person(index, generation);
        let child = fork(move || {
            while shared.stop.load(Ordering::Relaxed) == 0 {
                person.work();
            }
        });
        (person, child)
    };
    let mut workers: Vec<_> = (0..WORKERS).map(|index| start(index, 1)).collect();
    for kill in 0..kills {
        let pause = Instant::now() + Duration::from_micros(random.below(1_500));
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        let index = random.below(u64::from(WORKERS)) as u32;
        let (person, child) = &workers[index as usize];
        child.kill();
        assert!(!child.ended_well());
        shared.settle_death(person.id);
        // The others go on.
        let made: Vec<u64> = progress(shared);
        wait_until("everybody has got the lock again", || {
            (0..WORKERS as usize)
                .all(|other| other == index as usize || progress(shared)[other] > made[other])
        });
        workers[index as usize] = start(index, kill as u32 + 2);
    }
    shared.stop.store(1, Ordering::SeqCst);
    assert!(workers.iter().all(|(_, child)| child.ended_well()));
    assert_eq!(shared.word.owner(), None);
    assert_eq!(
        shared.first.load(Ordering::SeqCst),
        shared.second.load(Ordering::SeqCst)
    );
    let told = shared.told.load(Ordering::SeqCst);
    eprintln!("{told} of {kills} were killed holding the lock");
    assert!(told > 0 || kills < 100);
}

fn progress(shared: &support::Shared) -> Vec<u64> {
    let counts = shared.progress.iter();
    counts.map(|count| count.load(Ordering::SeqCst)).collect()
}

netmcore_forktest::forktests!(random_kills_hang_nobody);

//! What the tests here share: a page of shared memory with a lock, and children that are killed.
//!
//! # Safety
//!
//! The shared page is mapped for ever and holds atomics only. Children are forked from a process with one thread.

#![allow(dead_code, unsafe_code)]

use netmcore_sem::{LockGuard, LockWord, OwnerId, Owners, announce_death};
use netmcore_sys::map::Mapping;
use netmcore_sys::process::{self, ExitStatus, Forked, Pid, PidFd};
use netmcore_sys::shm::{self, Access};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PEOPLE: usize = 8;
/// Longer than any wait that is in order, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What lies in shared memory. All zeros at first.
#[repr(C)]
pub struct Shared {
    pub word: LockWord,
    pub deaths: AtomicU32,
    /// The generation that lives at each index; 0 for nobody.
    alive: [AtomicU32; PEOPLE],
    /// Protected by the lock: equal while nobody holds it.
    pub first: AtomicU64,
    pub second: AtomicU64,
    /// How often each index has held the lock.
    pub progress: [AtomicU64; PEOPLE],
    /// How often somebody was told of a dead owner.
    pub told: AtomicU64,
    pub stop: AtomicU32,
}

/// A shared page for a test and its children. Never unmapped.
pub fn shared() -> &'static Shared {
    let file = shm::anonymous(c"sem-test").unwrap();
    shm::allocate(file.as_fd(), 0, 4096).unwrap();
    let mapping = Mapping::map(file.as_fd(), 4096, Access::ReadWrite).unwrap();
    let at = mapping.as_ptr();
    std::mem::forget(mapping);
    // SAFETY: a page of zeros, aligned, mapped for ever; all fields are atomics, for which zeros are valid.
    unsafe { &*at.cast::<Shared>() }
}

/// One user of the lock.
#[derive(Clone, Copy)]
pub struct Person {
    pub shared: &'static Shared,
    pub id: OwnerId,
}

impl Owners for Person {
    fn me(&self) -> OwnerId {
        self.id
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        let place = &self.shared.alive[owner.index as usize];
        place.load(Ordering::Acquire) == owner.generation
    }
    fn deaths(&self) -> &AtomicU32 {
        &self.shared.deaths
    }
}

impl Shared {
    pub fn person(&'static self, index: u32, generation: u32) -> Person {
        self.alive[index as usize].store(generation, Ordering::Release);
        Person {
            shared: self,
            id: OwnerId { index, generation },
        }
    }

    /// What a supervisor does after it has reaped somebody.
    pub fn settle_death(&self, id: OwnerId) {
        self.alive[id.index as usize].store(0, Ordering::Release);
        announce_death(&self.deaths);
    }
}

impl Person {
    /// Takes the lock, repairing what a dead owner left, and says who that was.
    pub fn lock(&self) -> (Option<OwnerId>, LockGuard<'static>) {
        match self.shared.word.lock(self) {
            Ok(guard) => (None, guard),
            Err(died) => {
                self.shared.told.fetch_add(1, Ordering::SeqCst);
                let first = self.shared.first.load(Ordering::Relaxed);
                self.shared.second.store(first, Ordering::Relaxed);
                (Some(died.owner), died.guard)
            }
        }
    }

    /// Changes what the lock protects. Two in here at once, or one that does not see the last, are noticed.
    pub fn work(&self) -> Option<OwnerId> {
        let (died, guard) = self.lock();
        let first = self.shared.first.load(Ordering::Relaxed);
        let second = self.shared.second.load(Ordering::Relaxed);
        assert_eq!(first, second, "a change by somebody else is under way");
        self.shared.first.store(first + 1, Ordering::Relaxed);
        std::hint::spin_loop();
        self.shared.second.store(second + 1, Ordering::Relaxed);
        self.shared.progress[self.id.index as usize].fetch_add(1, Ordering::Relaxed);
        drop(guard);
        died
    }
}

/// Runs `body` in a forked child, which then exits.
pub fn fork(body: impl FnOnce()) -> Child {
    // SAFETY: the tests have one thread, and the child leaves by `exit_now`; a panic in it ends the process too.
    match unsafe { process::fork() }.unwrap() {
        Forked::Parent(pid) => Child {
            pidfd: PidFd::open(pid).unwrap(),
            pid,
        },
        Forked::Child => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            process::exit_now(if done.is_ok() { 0 } else { 101 })
        }
    }
}

pub struct Child {
    pidfd: PidFd,
    pub pid: Pid,
}

impl Child {
    /// Waits for its end; true if it ended well, false if it was killed.
    pub fn ended_well(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.pidfd.wait_nonblocking().unwrap() {
                Some(ExitStatus::Exited { code: 0 }) => return true,
                Some(ExitStatus::Signaled { signal: 9, .. }) => return false,
                Some(other) => panic!("a child ended by {other:?}"),
                None => assert!(Instant::now() < deadline, "a child hangs"),
            }
            // sleep: between looks; only the deadline above decides.
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn kill(&self) {
        self.pidfd.send_signal(9).unwrap();
    }
}

/// Waits until the condition holds.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        // sleep: between looks; only the deadline above decides.
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// What the environment says.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Random numbers (xorshift) that their seed decides.
pub struct Random(pub u64);

impl Random {
    /// Those of `NETMCORE_SEED`, or new ones. The seed is printed by the test.
    pub fn replayed() -> Random {
        Random(number("NETMCORE_SEED").unwrap_or_else(process::random_u64) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

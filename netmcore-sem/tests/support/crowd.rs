//! A supervisor for tests with several threads in several processes, and memory that they share.
//!
//! `NETMCORE_SEED` and `NETMCORE_KILLS` replay and lengthen the [random kills](Crowd::kill_at_random).
//!
//! # Safety
//!
//! Memory is mapped for ever and zeroed; the callers promise that zeros are valid for what they put there.

#![allow(dead_code, unsafe_code)]

use crate::support::{Child, Random, fork, number, wait_until};
use netmcore_sem::{OwnerId, Owners, announce_death, current};
use netmcore_sys::map::Mapping;
use netmcore_sys::process::Pid;
use netmcore_sys::shm::{self, Access};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PLACES: usize = 8192;
const GENERATION: u32 = 1;

/// Memory that this process and its forks share, all zeros. Never unmapped.
///
/// # Safety
///
/// Zeroed memory is a valid `T`.
pub unsafe fn zeroed<T: Sync>() -> &'static T {
    let len_bytes = size_of::<T>().next_multiple_of(4096);
    let file = shm::anonymous(c"sem-test").unwrap();
    shm::allocate(file.as_fd(), 0, len_bytes as u64).unwrap();
    let mapping = Mapping::map(file.as_fd(), len_bytes, Access::ReadWrite).unwrap();
    let at = mapping.as_ptr();
    std::mem::forget(mapping);
    // SAFETY: zeros, aligned to a page, mapped for ever; valid for a `T`, as the caller says.
    unsafe { &*at.cast::<T>() }
}

/// Who lives: every thread that asks gets a place, and none is used twice.
pub struct Crowd {
    deaths: AtomicU32,
    used: AtomicU32,
    /// How often somebody has asked who lives.
    pub asked: AtomicU32,
    /// The pid of the process whose thread has the place; 0 when it has ended.
    places: [AtomicU32; PLACES],
}

impl Crowd {
    /// A new crowd, which is the owners of this process and its forks from now on.
    pub fn install() -> &'static Crowd {
        // SAFETY: atomics only.
        let crowd: &'static Crowd = unsafe { zeroed() };
        // SAFETY: a place is given to one thread; a test settles deaths of processes that it has reaped.
        unsafe { current::install(crowd) };
        crowd
    }

    /// What a supervisor does after it has reaped a process.
    pub fn settle_death(&self, pid: Pid) {
        let pid = pid.get().cast_unsigned();
        for place in &self.places {
            let _ = place.compare_exchange(pid, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        announce_death(&self.deaths);
    }

    /// Kills a process at once, and says so to all.
    pub fn kill(&self, child: &Child) {
        child.kill();
        assert!(!child.ended_well());
        self.settle_death(child.pid);
    }

    /// Processes of two threads each do `work`, which is told the thread's number in its process and the round, over and over; one after the
    /// other is killed at a random moment, and all others must go on. Then they are told to stop, `last` is called, and all must end. Returns how
    /// many were killed.
    pub fn kill_at_random(
        &self,
        stop: &AtomicU32,
        work: impl Fn(usize, u64) + Sync,
        last: impl FnOnce(),
    ) -> u64 {
        const PROCESSES: usize = 3;
        const THREADS: usize = 2;
        let mut random = Random::replayed();
        let kills = number("NETMCORE_KILLS").unwrap_or(200);
        eprintln!("replay: NETMCORE_SEED={} NETMCORE_KILLS={kills}", random.0);
        // SAFETY: atomics only.
        let rounds: &[AtomicU64; PROCESSES * THREADS] = unsafe { zeroed() };
        let start = |process: usize| {
            fork(|| {
                std::thread::scope(|scope| {
                    for thread in 0..THREADS {
                        let (work, rounds) = (&work, &rounds[process * THREADS + thread]);
                        scope.spawn(move || {
                            for round in 0.. {
                                if stop.load(Ordering::SeqCst) != 0 {
                                    break;
                                }
                                work(thread, round);
                                rounds.fetch_add(1, Ordering::SeqCst);
                            }
                        });
                    }
                });
            })
        };
        let mut children: Vec<Child> = (0..PROCESSES).map(start).collect();
        for _ in 0..kills {
            let pause = Instant::now() + Duration::from_micros(random.below(1_500));
            while Instant::now() < pause {
                std::hint::spin_loop();
            }
            let killed = random.below(PROCESSES as u64) as usize;
            self.kill(&children[killed]);
            let now = || rounds.each_ref().map(|count| count.load(Ordering::SeqCst));
            let then = now();
            wait_until("all others have gone on", || {
                let now = now();
                (0..PROCESSES * THREADS)
                    .all(|thread| thread / THREADS == killed || now[thread] > then[thread])
            });
            children[killed] = start(killed);
        }
        stop.store(1, Ordering::SeqCst);
        last();
        assert!(children.iter().all(Child::ended_well));
        kills
    }
}

impl Owners for Crowd {
    fn me(&self) -> OwnerId {
        let index = self.used.fetch_add(1, Ordering::SeqCst);
        let pid = Pid::this().get().cast_unsigned();
        self.places[index as usize].store(pid, Ordering::SeqCst);
        OwnerId {
            index,
            generation: GENERATION,
        }
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.places[owner.index as usize].load(Ordering::SeqCst) != 0
    }

    fn deaths(&self) -> &AtomicU32 {
        &self.deaths
    }

    fn thread_ends(&self, me: OwnerId) {
        self.places[me.index as usize].store(0, Ordering::SeqCst);
        announce_death(&self.deaths);
    }
}

/// Waits until the first thread of the child sleeps in the kernel, on a futex.
pub fn sleeping(child: &Child) {
    let path = format!("/proc/{}/syscall", child.pid.get());
    wait_until("the child sleeps", || {
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        // "running", or the number of the call: futex_waitv has the same one everywhere, plain futex is the fallback.
        let number = call.split(' ').next().unwrap_or_default();
        let is_futex = ["449", "202", "98"].contains(&number.trim());
        let asleep = |state: String| state.contains(") S ");
        is_futex
            && std::fs::read_to_string(format!("/proc/{}/stat", child.pid.get())).is_ok_and(asleep)
    });
}

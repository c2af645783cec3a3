//! A supervisor for tests with several threads in several processes, and memory that they share.
//!
//! # Safety
//!
//! Memory is mapped for ever and zeroed; the callers promise that zeros are valid for what they put there.

#![allow(dead_code, unsafe_code)]

use netmcore_sem::{OwnerId, Owners, announce_death, current};
use netmcore_sys::map::Mapping;
use netmcore_sys::process::Pid;
use netmcore_sys::shm::{self, Access};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

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
pub fn sleeping(child: &crate::support::Child) {
    let path = format!("/proc/{}/syscall", child.pid.get());
    crate::support::wait_until("the child sleeps", || {
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        // "running", or the number of the call: futex_waitv has the same one everywhere, plain futex is the fallback.
        let number = call.split(' ').next().unwrap_or_default();
        let is_futex = ["449", "202", "98"].contains(&number.trim());
        let asleep = |state: String| state.contains(") S ");
        is_futex
            && std::fs::read_to_string(format!("/proc/{}/stat", child.pid.get())).is_ok_and(asleep)
    });
}

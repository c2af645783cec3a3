//! Places where a test can kill the process: [`crash_point!`](crate::crash_point).
//!
//! **Protocol.** Code that changes shared state marks the places between its stores as
//! `crash_point!("crate.file.step")`. Without the feature `crash-points` they are nothing. With it, and once
//! a test has called `arm`, all processes forked since count the places they pass, together; the one that passes number *k* dies
//! there by SIGKILL. A test runs a scenario once with `arm(None)` to count, then once for each *k*, and checks each time that
//! the survivors are well. Benchmarks are compiled with `--cfg netmcore_measured` (`cargo xtask bench`), which leaves the points out although
//! the tests' feature is on.
//!
//! **If a process dies here.** That is the purpose. The counter lies in shared memory and is atomic.
//!
//! # Safety
//!
//! The counters are one anonymous shared page, mapped once and never unmapped, which holds only atomics; the pointer to it is null or valid.

#![cfg_attr(feature = "crash-points", allow(unsafe_code))]

/// Marks a place where a test can kill the process; see [`crash`](crate::crash).
///
/// Here the feature `crash-points` is on: it counts, and kills if it is this pass's turn.
#[cfg(all(feature = "crash-points", not(netmcore_measured)))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::pass($name)
    };
}

/// Marks a place where a test can kill the process; see [`crash`](crate::crash).
///
/// Here the feature `crash-points` is off, or benchmarks are compiled: it is nothing.
#[cfg(any(not(feature = "crash-points"), netmcore_measured))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        ()
    };
}

#[cfg(feature = "crash-points")]
pub use armed::{arm, arm_role, died_at, disarm, pass, passed, set_role};

#[cfg(feature = "crash-points")]
mod armed {
    use rustix::mm::{MapFlags, ProtFlags};
    use rustix::process::{Signal, getpid, kill_process};
    use std::ptr;
    use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
    use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64};

    /// What the processes of a test share.
    struct Page {
        armed: AtomicU32,
        /// `ANY_ROLE`, or the one role that counts.
        role: AtomicU64,
        passed: AtomicU64,
        /// The pass that dies, counted from 1; 0 for none.
        die_at: AtomicU64,
        /// 0 until somebody died; then the length of the name in `died_name`, stored after it.
        died_len: AtomicU32,
        died_name: [AtomicU8; 256],
    }

    const ANY_ROLE: u64 = u64::MAX;

    static PAGE: AtomicPtr<Page> = AtomicPtr::new(ptr::null_mut());

    /// The role of this process.
    static ROLE: AtomicU32 = AtomicU32::new(0);

    /// Starts counting from 0 in this process and all that it forks from now on. The process that passes
    /// number `die_at` (from 1) dies there; with `None` nobody does.
    ///
    /// Call it before forking; processes forked before the first call never count. Processes left from an
    /// earlier run count with the new one.
    ///
    /// # Panics
    ///
    /// When there is no memory for the counters.
    pub fn arm(die_at: Option<u64>) {
        start(ANY_ROLE, die_at.unwrap_or(0));
    }

    /// As [`arm`], but only passes in processes of this role count. `die_at` 0 only counts.
    ///
    /// # Panics
    ///
    /// When there is no memory for the counters.
    pub fn arm_role(role: u32, die_at: u64) {
        start(u64::from(role), die_at);
    }

    fn start(role: u64, die_at: u64) {
        let page = page().unwrap_or_else(map_page);
        page.armed.store(0, SeqCst);
        page.role.store(role, SeqCst);
        page.passed.store(0, SeqCst);
        page.die_at.store(die_at, SeqCst);
        page.died_len.store(0, SeqCst);
        page.armed.store(1, SeqCst);
    }

    /// Stops counting and killing. What was counted can still be asked for.
    pub fn disarm() {
        if let Some(page) = page() {
            page.armed.store(0, SeqCst);
        }
    }

    /// The passes since the last [`arm`], the deadly one included.
    pub fn passed() -> u64 {
        page().map_or(0, |page| page.passed.load(SeqCst))
    }

    /// The name of the point at which a process died since the last [`arm`].
    pub fn died_at() -> Option<String> {
        let page = page()?;
        let len = page.died_len.load(Acquire) as usize;
        let bytes: Vec<u8> = page.died_name[..len]
            .iter()
            .map(|b| b.load(Relaxed))
            .collect();
        (len > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Sets the role of this process, and of what it forks from now on; 0 at first.
    pub fn set_role(role: u32) {
        ROLE.store(role, Relaxed);
    }

    /// Counts a pass, and dies if it is its turn. Called by [`crash_point!`](crate::crash_point).
    ///
    /// Next to nothing in a process that was never armed: a plain `cargo bench` is built with the points, too.
    #[inline]
    pub fn pass(name: &'static str) {
        if let Some(page) = page() {
            pass_on(page, name);
        }
    }

    #[cold]
    fn pass_on(page: &Page, name: &'static str) {
        if page.armed.load(SeqCst) == 0 {
            return;
        }
        let role = page.role.load(SeqCst);
        if role != ANY_ROLE && role != u64::from(ROLE.load(Relaxed)) {
            return;
        }
        let pass = page.passed.fetch_add(1, SeqCst) + 1;
        if pass == page.die_at.load(SeqCst) {
            die(page, name);
        }
    }

    #[cold]
    fn die(page: &Page, name: &str) -> ! {
        let len = name.len().min(page.died_name.len());
        for (shared, byte) in page.died_name.iter().zip(name.bytes()) {
            shared.store(byte, Relaxed);
        }
        page.died_len.store(len as u32, Release);
        loop {
            // It ends all threads of this process, at this instruction as seen from here.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }

    #[inline]
    fn page() -> Option<&'static Page> {
        // SAFETY: null, or the page that `map_page` mapped for ever and that only holds atomics.
        unsafe { PAGE.load(Acquire).as_ref() }
    }

    fn map_page() -> &'static Page {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                size_of::<Page>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        };
        let page: *mut Page = mapped.expect("a page for the counters").cast();
        PAGE.store(page, Release);
        // SAFETY: large enough, page-aligned, never unmapped; zeroes are valid for atomics, through which alone
        // it is read and written, here and in forks.
        unsafe { &*page }
    }
}

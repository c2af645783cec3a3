//! A forked child for the test programs, and memory that it shares with them.
//!
//! # Safety
//!
//! The child of a fork leaves by `exit_now`. The shared memory is a page that is used through atomics only. Mounts are made in a namespace of the
//! test's own.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(unsafe_code)]

use netmcore_sys::map::Mapping;
use netmcore_sys::process::{self, ExitStatus, Forked, Pid, PidFd};
use netmcore_sys::shm::{self, Access};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A process that runs a closure and exits with 0, or with 101 if the closure panics.
pub struct Child {
    pub pid: Pid,
    pidfd: PidFd,
}

impl Child {
    pub fn run(work: impl FnOnce()) -> Child {
        // SAFETY: the child leaves by exit_now and so does nothing twice.
        match unsafe { process::fork() }.unwrap() {
            Forked::Parent(pid) => Child {
                pid,
                pidfd: PidFd::open(pid).unwrap(),
            },
            Forked::Child => {
                let code = match catch_unwind(AssertUnwindSafe(work)) {
                    Ok(()) => 0,
                    Err(_) => 101,
                };
                process::exit_now(code)
            }
        }
    }

    /// Waits for the end and reaps.
    pub fn wait(self) -> ExitStatus {
        self.pidfd.wait().unwrap()
    }

    pub fn has_ended(&self) -> Option<ExitStatus> {
        self.pidfd.wait_nonblocking().unwrap()
    }

    /// Whether it is in an interruptible sleep, as in a system call that waits.
    pub fn is_asleep(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid.get())).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('S')
    }

    #[track_caller]
    pub fn succeeds(self) {
        assert_eq!(self.wait(), ExitStatus::Exited { code: 0 });
    }

    #[track_caller]
    pub fn dies_of(self, expected: i32) {
        match self.wait() {
            ExitStatus::Signaled { signal, .. } => assert_eq!(signal, expected),
            other => panic!("{other}"),
        }
    }

    pub fn kill(self) {
        self.pidfd.send_signal(libc::SIGKILL).unwrap();
        self.dies_of(libc::SIGKILL);
    }
}

/// Sleeps until somebody kills this process.
pub fn sleep_for_ever() -> ! {
    loop {
        // sleep: waits for nothing but the end.
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Keeps a value, with its descriptors and locks, to the end of the process.
pub fn leave_open<T>(value: T) {
    std::mem::forget(value);
}

/// Looks until `condition` holds; fails after half a minute.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < limit, "in vain: {what}");
        // sleep: between two looks at the condition, not instead of it.
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Puts an empty file system of 1 MiB in the place of /dev/shm, for this process and its children only.
pub fn mount_tiny_dev_shm() {
    // SAFETY: system calls on this process and on C strings; it has no other thread.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0
            && libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) != 0
        {
            netmcore_forktest::skip("no mount namespace of its own is allowed here");
        }
        let none = std::ptr::null();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let shm = c"/dev/shm".as_ptr();
        let options = c"size=1m,mode=1777".as_ptr();
        if libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0
            || libc::mount(c"tmpfs".as_ptr(), shm, c"tmpfs".as_ptr(), 0, options.cast()) != 0
        {
            netmcore_forktest::skip("no mount is allowed here");
        }
    }
}

/// Words of zeroed memory that this process and those it forks share.
pub struct Words(Mapping);

impl Words {
    pub fn new() -> Words {
        let file = shm::anonymous(c"words").unwrap();
        shm::allocate(file.as_fd(), 0, 4096).unwrap();
        Words(Mapping::map(file.as_fd(), 4096, Access::ReadWrite).unwrap())
    }

    pub fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < 1024);
        // SAFETY: in bounds, aligned, zeroed by the kernel, and used through atomics only.
        unsafe { &*self.0.as_ptr().cast::<AtomicU32>().add(index) }
    }

    pub fn get(&self, index: usize) -> u32 {
        self.word(index).load(Ordering::SeqCst)
    }

    pub fn set(&self, index: usize, value: u32) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }
}

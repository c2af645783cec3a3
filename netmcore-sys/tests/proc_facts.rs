//! Guards against taking one process for another: by a name that looks like fields, by a number given out again.
//!
//! # Safety
//!
//! A name that is a C string, and a mapping that is written within its bounds.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::ffi::CStr;

use child::{Child, ends, hear, line, say};
use netmcore_sys::error::Errno;
use netmcore_sys::process::{self, MemoryUse, Pid};
use netmcore_sys::signal::{SIGKILL, SIGTERM};

netmcore_forktest::forktests!(
    start_time_is_read_behind_strange_names,
    start_time_tells_processes_apart,
    zombie_is_told_from_the_living_and_the_gone,
    sleeping_threads_are_counted_when_all_sleep,
    killed_process_is_dying_at_once,
    children_are_found_by_their_parent,
    private_memory_is_counted_as_resident_and_data,
    shared_memory_is_counted_as_shared_and_not_as_data,
);

fn rename(name: &CStr) {
    // SAFETY: the kernel reads up to 16 bytes of a string that ends with NUL.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }, 0);
}

fn start_time_is_read_behind_strange_names() {
    let this = Pid::this();
    let start_time = process::start_time(this).unwrap();
    for name in [
        c") Z 1 1 (",
        c"a b c",
        c"((((",
        c")))) ",
        c"\n) Z 1\n",
        c"",
        c"\xff\xfe",
    ] {
        rename(name);
        assert_eq!(process::start_time(this).unwrap(), start_time, "{name:?}");
        assert!(!process::is_zombie(this).unwrap(), "{name:?}");
    }
    rename(c") Z 1 1 (");
    Child::fork(|| 0).succeeds();
    assert!(process::processes_with_parent(this).unwrap().is_empty());
}

fn start_time_tells_processes_apart() {
    let before = process::start_time(Pid::this()).unwrap();
    // A tick is 10 ms: of children made one after the other, one must be in a later tick than the first.
    let later = (0..100_000).find(|_| {
        let (_ours, childs) = line();
        let child = Child::fork(|| {
            hear(&childs);
            0
        });
        let start_time = process::start_time(child.pid).unwrap();
        assert!(start_time >= before);
        child.kill();
        start_time > before
    });
    assert!(later.is_some());
}

fn killed_process_is_dying_at_once() {
    for _ in 0..200 {
        let (_ours, childs) = line();
        let child = Child::fork(|| {
            hear(&childs);
            0
        });
        assert!(!process::is_dying(child.pid).unwrap());
        child.pidfd.send_signal(SIGKILL).unwrap();
        assert!(process::is_dying(child.pid).unwrap());
        assert!(ends(&child.pidfd));
        assert!(process::is_dying(child.pid).unwrap());
        child.pidfd.wait().unwrap();
        let gone = process::is_dying(child.pid).unwrap_err();
        assert_eq!(gone.errno, Errno::ESRCH);
    }
}

fn zombie_is_told_from_the_living_and_the_gone() {
    let (_ours, childs) = line();
    let child = Child::fork(|| {
        hear(&childs);
        0
    });
    let start_time = process::start_time(child.pid).unwrap();
    assert!(!process::is_zombie(child.pid).unwrap());

    child.pidfd.send_signal(SIGTERM).unwrap();
    assert!(ends(&child.pidfd));
    assert!(process::is_zombie(child.pid).unwrap());
    assert_eq!(process::start_time(child.pid).unwrap(), start_time);
    process::kill(child.pid, 0).unwrap();
    let nothing = MemoryUse {
        resident_bytes: 0,
        shared_bytes: 0,
        data_bytes: 0,
    };
    assert_eq!(process::memory_use(child.pid).unwrap(), nothing);

    child.pidfd.wait().unwrap();
    assert_eq!(
        process::is_zombie(child.pid).unwrap_err().errno,
        Errno::ESRCH
    );
    assert_eq!(
        process::start_time(child.pid).unwrap_err().errno,
        Errno::ESRCH
    );
}

fn sleeping_threads_are_counted_when_all_sleep() {
    let this = Pid::this();
    assert_eq!(process::sleeping_threads(this), Ok(None), "it asks");
    let (ours, childs) = line();
    let child = Child::fork(|| {
        // sleep: the thread is to be asleep until the process is killed.
        let second = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(100)));
        hear(&childs);
        drop(second);
        0
    });
    let until = |wanted| {
        while process::sleeping_threads(child.pid) != Ok(wanted) {
            std::thread::yield_now();
        }
    };
    until(Some(2));
    process::kill(child.pid, netmcore_sys::signal::SIGSTOP).unwrap();
    until(None);
    process::kill(child.pid, netmcore_sys::signal::SIGCONT).unwrap();
    until(Some(2));
    say(&ours, 0);
    child.succeeds();
}

fn children_are_found_by_their_parent() {
    let this = Pid::this();
    assert_eq!(process::processes_with_parent(this).unwrap(), []);
    assert_eq!(process::has_live_children(this), Ok(false));
    let (ours, childs) = line();
    let child = Child::fork(|| {
        let grandchild = Child::fork(|| {
            loop {
                hear(&childs);
            }
        });
        say(&childs, grandchild.pid.get());
        grandchild.pidfd.wait().unwrap();
        0
    });
    let grandchild = Pid::new(hear(&ours).unwrap()).unwrap();
    assert_eq!(process::processes_with_parent(this).unwrap(), [child.pid]);
    assert_eq!(process::has_live_children(this), Ok(true));
    assert_eq!(process::has_live_children(child.pid), Ok(true));
    assert_eq!(process::has_live_children(grandchild), Ok(false));
    assert_eq!(
        process::processes_with_parent(child.pid).unwrap(),
        [grandchild]
    );
    process::kill(grandchild, SIGTERM).unwrap();
    while !process::is_zombie(child.pid).unwrap() {
        std::thread::yield_now();
    }
    assert_eq!(
        process::has_live_children(this),
        Ok(false),
        "it is a zombie"
    );
    child.succeeds();
    assert_eq!(process::processes_with_parent(this).unwrap(), []);
}

/// What the kernel's counters may be off by.
const SLACK_BYTES: u64 = 2 << 20;
const WANTED_BYTES: u64 = 64 << 20;

fn map_and_touch(flags: i32) {
    let len_bytes = WANTED_BYTES as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, written within its bounds.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len_bytes, protection, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        std::ptr::write_bytes(at.cast::<u8>(), 1, len_bytes);
    }
}

/// How much more memory a child uses after mapping and touching `WANTED_BYTES`, seen from here.
fn growth(flags: i32) -> MemoryUse {
    let (ours, childs) = line();
    let child = Child::fork(|| {
        say(&childs, 0);
        hear(&childs);
        map_and_touch(flags);
        say(&childs, 0);
        hear(&childs);
        0
    });
    hear(&ours);
    let before = process::memory_use(child.pid).unwrap();
    say(&ours, 0);
    hear(&ours);
    let after = process::memory_use(child.pid).unwrap();
    say(&ours, 0);
    child.succeeds();
    MemoryUse {
        resident_bytes: after.resident_bytes.saturating_sub(before.resident_bytes),
        shared_bytes: after.shared_bytes.saturating_sub(before.shared_bytes),
        data_bytes: after.data_bytes.saturating_sub(before.data_bytes),
    }
}

fn is_wanted(bytes: u64) -> bool {
    bytes.abs_diff(WANTED_BYTES) <= SLACK_BYTES
}

fn private_memory_is_counted_as_resident_and_data() {
    let growth = growth(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    assert!(is_wanted(growth.resident_bytes), "{growth:?}");
    assert!(is_wanted(growth.private_bytes()), "{growth:?}");
    assert!(is_wanted(growth.data_bytes), "{growth:?}");
}

fn shared_memory_is_counted_as_shared_and_not_as_data() {
    let growth = growth(libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    assert!(is_wanted(growth.resident_bytes), "{growth:?}");
    assert!(is_wanted(growth.shared_bytes), "{growth:?}");
    assert!(growth.data_bytes <= SLACK_BYTES, "{growth:?}");
}

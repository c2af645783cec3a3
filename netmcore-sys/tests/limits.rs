//! Guards against a memory limit that stops the wrong memory, or a process that dies of a limit without a trace of
//! which one.
//!
//! # Safety
//!
//! Memory that is touched was mapped by the test, and is touched within its bounds; the hook makes one store.

#![allow(unsafe_code)]

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use std::fs::File;
use std::io::Write;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

use child::{Child, hear, line, say};
use netmcore_sys::error::Errno;
use netmcore_sys::process::{self, ExitStatus, Limit, Pid, Resource};
use netmcore_sys::signal::{self, SIGABRT, SIGXFSZ};

netmcore_forktest::forktests!(
    data_limit_stops_private_memory_and_spares_the_rest,
    failed_allocation_aborts_with_enomem_noted,
    abort_without_cause_is_noted_too,
    descriptor_limit_is_set_enforced_and_restored,
    limit_of_another_process_is_set,
    limits_are_inherited,
    file_size_limit_kills_by_sigxfsz,
    descriptors_above_a_base_are_closed_and_lower_ones_spared,
);

fn mmap(len_bytes: usize, protection: i32, flags: i32) -> Result<*mut libc::c_void, Errno> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let at = unsafe { libc::mmap(ptr::null_mut(), len_bytes, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(at)
    }
}

/// Leaves room for `more_bytes` of private memory beyond what there is.
fn limit_data(more_bytes: u64) {
    let now_bytes = process::memory_use(Pid::this()).unwrap().data_bytes;
    let hard = process::get_limit(Resource::DataBytes).unwrap().hard;
    let limit = Limit {
        soft: Some(now_bytes + more_bytes),
        hard,
    };
    process::set_limit(Resource::DataBytes, limit).unwrap();
}

fn data_limit_stops_private_memory_and_spares_the_rest() {
    const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;
    const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    limit_data(32 << 20);
    mmap(8 << 20, WRITABLE, PRIVATE).expect("what is within the limit");
    assert_eq!(
        mmap(64 << 20, WRITABLE, PRIVATE).unwrap_err(),
        Errno::ENOMEM
    );
    let mut vec = Vec::<u8>::new();
    assert!(vec.try_reserve(64 << 20).is_err(), "and so for allocations");

    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    mmap(64 << 20, WRITABLE, shared).expect("shared memory is not data");
    let reserved = mmap(1 << 40, libc::PROT_NONE, PRIVATE | libc::MAP_NORESERVE)
        .expect("reserved addresses are not data");
    // SAFETY: the range was mapped above.
    let failed = unsafe { libc::mprotect(reserved, 64 << 20, WRITABLE) };
    assert_eq!(
        (failed, Errno::last()),
        (-1, Errno::ENOMEM),
        "until they are made writable"
    );
}

/// In shared memory: what the hook noted.
static NOTE: AtomicPtr<AtomicI32> = AtomicPtr::new(ptr::null_mut());

extern "C" fn note(errno: i32) {
    // SAFETY: set before the hook is installed, to a mapping that stays.
    unsafe { (*NOTE.load(Ordering::SeqCst)).store(errno, Ordering::SeqCst) };
}

/// Runs `body` in a child that notes how it aborts; returns the note, which was -1 before.
fn note_of(body: impl FnOnce()) -> i32 {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let at = mmap(4096, libc::PROT_READ | libc::PROT_WRITE, flags).unwrap();
    NOTE.store(at.cast(), Ordering::SeqCst);
    // SAFETY: the page is mapped for the rest of the test.
    let noted = unsafe { &*at.cast::<AtomicI32>() };
    noted.store(-1, Ordering::SeqCst);
    let child = Child::fork(|| {
        let core = process::get_limit(Resource::CoreBytes).unwrap();
        let none = Limit {
            soft: Some(0),
            ..core
        };
        process::set_limit(Resource::CoreBytes, none).unwrap();
        // SAFETY: the hook makes one store.
        unsafe { signal::on_abort(note) }.unwrap();
        body();
        0
    });
    let aborted = ExitStatus::Signaled {
        signal: SIGABRT,
        core_dumped: false,
    };
    assert_eq!(child.pidfd.wait().unwrap(), aborted);
    noted.load(Ordering::SeqCst)
}

fn failed_allocation_aborts_with_enomem_noted() {
    let noted = note_of(|| {
        // Printing a backtrace changes errno.
        // SAFETY: the test's processes have one thread each.
        unsafe { std::env::set_var("RUST_BACKTRACE", "0") };
        limit_data(32 << 20);
        std::hint::black_box(Vec::<u8>::with_capacity(64 << 20));
    });
    assert_eq!(noted, Errno::ENOMEM.raw());
}

fn set_errno(errno: Errno) {
    // SAFETY: this thread's `errno`.
    unsafe { *libc::__errno_location() = errno.raw() };
}

fn abort_without_cause_is_noted_too() {
    let by_abort = note_of(|| {
        set_errno(Errno::from_raw(0));
        std::process::abort();
    });
    assert_eq!(by_abort, 0);
    let by_signal = note_of(|| {
        set_errno(Errno::ENOMEM);
        assert!(signal::errno_is_enomem());
        // SAFETY: a signal to this process.
        unsafe { libc::kill(libc::getpid(), SIGABRT) };
    });
    assert_eq!(by_signal, Errno::ENOMEM.raw());
}

fn descriptor_limit_is_set_enforced_and_restored() {
    let before = process::get_limit(Resource::DescriptorCount).unwrap();
    let tight = Limit {
        soft: Some(20),
        ..before
    };
    assert_eq!(
        process::set_limit(Resource::DescriptorCount, tight).unwrap(),
        before
    );
    let mut files = Vec::new();
    let error = loop {
        match File::open("/dev/null") {
            Ok(file) => files.push(file),
            Err(error) => break error,
        }
    };
    assert_eq!(Errno::from_io(&error), Errno::EMFILE);
    assert!(files.len() < 20);
    assert_eq!(
        process::set_limit(Resource::DescriptorCount, before).unwrap(),
        tight
    );
    File::open("/dev/null").unwrap();
}

fn limit_of_another_process_is_set() {
    let (ours, childs) = line();
    let child = Child::fork(|| {
        hear(&childs);
        process::get_limit(Resource::DescriptorCount)
            .unwrap()
            .soft
            .unwrap() as i32
    });
    let before = process::get_limit_of(child.pid, Resource::DescriptorCount).unwrap();
    assert_eq!(
        before,
        process::get_limit(Resource::DescriptorCount).unwrap()
    );
    let limit = Limit {
        soft: Some(77),
        ..before
    };
    let replaced = process::set_limit_of(child.pid, Resource::DescriptorCount, limit).unwrap();
    assert_eq!(replaced, before);
    say(&ours, 0);
    assert_eq!(child.pidfd.wait().unwrap(), ExitStatus::Exited { code: 77 });
    assert_eq!(
        process::get_limit(Resource::DescriptorCount).unwrap(),
        before
    );
    let error = process::get_limit_of(child.pid, Resource::DescriptorCount).unwrap_err();
    assert_eq!(error.errno, Errno::ESRCH);
}

fn limits_are_inherited() {
    let before = process::get_limit(Resource::DescriptorCount).unwrap();
    let limit = Limit {
        soft: Some(99),
        ..before
    };
    process::set_limit(Resource::DescriptorCount, limit).unwrap();
    Child::fork(|| {
        assert_eq!(
            process::get_limit(Resource::DescriptorCount).unwrap(),
            limit
        );
        0
    })
    .succeeds();
}

fn file_size_limit_kills_by_sigxfsz() {
    let child = Child::fork(|| {
        process::set_limit(
            Resource::CoreBytes,
            Limit {
                soft: Some(0),
                hard: Some(0),
            },
        )
        .unwrap();
        let limit = Limit {
            soft: Some(4096),
            hard: Some(4096),
        };
        process::set_limit(Resource::FileSizeBytes, limit).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 4096]).unwrap();
        let _ = file.write_all(&[0; 1]);
        0
    });
    let status = child.pidfd.wait().unwrap();
    assert_eq!(
        status,
        ExitStatus::Signaled {
            signal: SIGXFSZ,
            core_dumped: false
        }
    );
    assert_eq!(status.to_string(), "killed by signal 25 (SIGXFSZ)");
}

fn descriptors_above_a_base_are_closed_and_lower_ones_spared() {
    const BASE: i32 = 300;
    let before = process::open_descriptors().unwrap();
    assert!(before.iter().all(|&fd| fd < BASE), "{before:?}");
    let mut high = Vec::new();
    for _ in 0..50 {
        let file = File::open("/dev/null").unwrap();
        high.push(process::move_above(file.into(), BASE).unwrap());
    }
    assert_eq!(
        process::open_descriptors().unwrap().len(),
        before.len() + 50
    );
    Child::fork(|| {
        std::mem::forget(high);
        // SAFETY: the owners of the descriptors above were just forgotten.
        unsafe { process::close_range(BASE, i32::MAX) }.unwrap();
        assert_eq!(process::open_descriptors().unwrap(), before);
        0
    })
    .succeeds();
}

//! POSIX semaphores, named and in memory: `sem_overview(7)`.
//!
//! Named ones are the C library's, so programs in other languages can open the same.
//!
//! **Protocol.** A semaphore counts permits: `post` adds one, `wait` takes one or sleeps until there is one.
//!
//! **Invariants.** A named semaphore appears at once and whole: its file is made without a name, initialised, and then
//! linked. (The C library's own `sem_open` makes it under a temporary name first; a process killed at that
//! moment leaves a `/dev/shm/sem.XXXXXX` for ever. It is used only where files without a name do not exist.)
//!
//! **If a process dies here.** A permit that it took stays taken: a semaphore has no owner. Waiters sleep until
//! somebody posts; the deadline forms are the remedy. A waiter that dies leaves the semaphore usable. The name stays
//! until somebody unlinks it.
//!
//! **Not here.** Locks that notice the death of their owner; recording names: both one floor up.
//!
//! # Safety
//!
//! All calls take a pointer to a `sem_t`, which must be initialised and mapped. A [`NamedSem`] has one from `sem_open`
//! and closes it once. A reference to a [`MemSem`] can come only from [`MemSem::init`]'s caller, who
//! answers for it. The functions of the C library are safe to call from any thread and process at the same time.

#![allow(unsafe_code)]

use crate::error::{During, Errno, Result, SysError};
use crate::futex::Deadline;
use crate::name::ObjectName;
use crate::process;
use crate::shm;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_uint};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// The largest value of a semaphore: `SEM_VALUE_MAX`.
pub const VALUE_MAX: u32 = c_int::MAX as u32;

/// A named semaphore, open in this process: `sem_open(3)`.
///
/// Dropping it closes it here; the semaphore and its name stay ([`unlink`]). A forked child inherits it open.
///
/// ```
/// use netmcore_sys::name::ObjectName;
/// use netmcore_sys::sem::{self, NamedSem};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let name = ObjectName::unique(b"/example_")?;
/// let permits = NamedSem::create(&name, 1, 0o600)?;
/// sem::unlink(&name)?; // stays usable here
/// assert!(permits.try_wait()?);
/// assert!(!permits.try_wait()?);
/// permits.post()?;
/// assert_eq!(permits.value(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct NamedSem {
    sem: NonNull<libc::sem_t>,
    name: ObjectName,
}

// SAFETY: the pointer is to shared memory that the C library keeps mapped until `sem_close`, which only drop calls; a
// semaphore may be used by any thread.
unsafe impl Send for NamedSem {}
// SAFETY: as for Send: all operations are atomic.
unsafe impl Sync for NamedSem {}

impl NamedSem {
    /// Creates a semaphore that does not exist yet, with `initial` permits: `sem_open(3)` with
    /// `O_CREAT|O_EXCL`. `mode` are the permission bits; the umask is taken off.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the name is taken; `EINVAL` if `initial` exceeds [`VALUE_MAX`]; `ENAMETOOLONG` if the name has more than
    /// 251 bytes; `EFBIG` if this process may write no file of 32 bytes (`RLIMIT_FSIZE`); `ENOSPC`, `EMFILE`, `EACCES`.
    ///
    /// # If a process dies
    ///
    /// The semaphore exists whole or not at all.
    pub fn create(name: &ObjectName, initial: u32, mode: u32) -> Result<NamedSem> {
        check_name(name)?;
        if initial > VALUE_MAX {
            return Err(SysError::new("sem_open", name.to_string(), Errno::EINVAL));
        }
        // It is a file, and the kernel's own answer is SIGXFSZ, which kills.
        let limit = process::get_limit(process::Resource::FileSizeBytes)?.soft;
        if limit.is_some_and(|limit| limit < MemSem::SIZE as u64) {
            return Err(SysError::new("sem_open", name.to_string(), Errno::EFBIG));
        }
        match create_whole(name, initial, mode)? {
            Created::Whole => NamedSem::open(name),
            Created::Unsupported => {
                open_by_c_library(name, libc::O_CREAT | libc::O_EXCL, mode, initial)
            }
        }
    }

    /// Opens a semaphore that exists: `sem_open(3)`.
    ///
    /// # Errors
    ///
    /// `ENOENT`; `EACCES`; `EINVAL` if the file of that name is not a semaphore; `EMFILE`.
    pub fn open(name: &ObjectName) -> Result<NamedSem> {
        check_name(name)?;
        check_file(name)?;
        open_by_c_library(name, 0, 0, 0)
    }

    /// Opens the semaphore, or creates it with `initial` permits: `sem_open(3)` with `O_CREAT`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) and [`create`](Self::create), without `ENOENT` and `EEXIST`.
    pub fn open_or_create(name: &ObjectName, initial: u32, mode: u32) -> Result<NamedSem> {
        loop {
            match NamedSem::open(name) {
                Err(error) if error.errno == Errno::ENOENT => {}
                opened => return opened,
            }
            match NamedSem::create(name, initial, mode) {
                // Somebody else made it in between, or unlinked ours before it was open.
                Err(error) if error.errno == Errno::EEXIST || error.errno == Errno::ENOENT => {}
                created => return created,
            }
        }
    }

    /// The name it was opened by.
    pub fn name(&self) -> &ObjectName {
        &self.name
    }

    /// Adds a permit and wakes a waiter: `sem_post(3)`. Async-signal-safe as long as it succeeds.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` at [`VALUE_MAX`].
    pub fn post(&self) -> Result<()> {
        // SAFETY: open until drop.
        unsafe { post(self.sem.as_ptr(), &self.name) }
    }

    /// Takes a permit: `sem_wait(3)`. Signals do not end the wait.
    ///
    /// # Blocking
    ///
    /// Until there is a permit; for ever, if its holder died.
    ///
    /// # Errors
    ///
    /// None is known for an open semaphore.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: open until drop.
        unsafe { wait(self.sem.as_ptr(), &self.name) }
    }

    /// Takes a permit if there is one, and says whether: `sem_trywait(3)`.
    ///
    /// # Errors
    ///
    /// None is known for an open semaphore.
    pub fn try_wait(&self) -> Result<bool> {
        // SAFETY: open until drop.
        unsafe { try_wait(self.sem.as_ptr(), &self.name) }
    }

    /// Takes a permit if there is one before the deadline, and says whether: `sem_clockwait(3)`. Signals do not end the wait.
    ///
    /// # Errors
    ///
    /// None is known for an open semaphore.
    pub fn wait_deadline(&self, deadline: Deadline) -> Result<bool> {
        // SAFETY: open until drop.
        unsafe { wait_deadline(self.sem.as_ptr(), deadline, &self.name) }
    }

    /// The number of permits now: `sem_getvalue(3)`. It may be out of date when it is read.
    pub fn value(&self) -> u32 {
        // SAFETY: open until drop.
        unsafe { value(self.sem.as_ptr()) }
    }
}

impl Drop for NamedSem {
    fn drop(&mut self) {
        // SAFETY: opened once by this value, closed once.
        unsafe { libc::sem_close(self.sem.as_ptr()) };
    }
}

/// Removes the name: `sem_unlink(3)`. Who has the semaphore open keeps it.
///
/// # Errors
///
/// `ENOENT`, `EACCES`; `ENAMETOOLONG` if no semaphore can have that name.
pub fn unlink(name: &ObjectName) -> Result<()> {
    check_name(name)?;
    // SAFETY: the name is a C string.
    match unsafe { libc::sem_unlink(name.as_c_str().as_ptr()) } {
        0 => Ok(()),
        _ => Err(SysError::last("sem_unlink", name.to_string())),
    }
}

/// The named semaphores that exist now, of all users, in the order of their names.
///
/// # Errors
///
/// Those of reading the directory.
pub fn list() -> Result<Vec<ObjectName>> {
    shm::list_files(|file_name| file_name.strip_prefix(shm::SEMAPHORE_PREFIX.as_bytes()))
}

fn check_name(name: &ObjectName) -> Result<()> {
    name.for_semaphore()
        .map_err(|_| SysError::new("sem_open", name.to_string(), Errno::ENAMETOOLONG))
}

fn open_by_c_library(name: &ObjectName, flags: c_int, mode: u32, initial: u32) -> Result<NamedSem> {
    loop {
        // SAFETY: the name is a C string; the C library reads the last two only with O_CREAT, as unsigned integers.
        let sem = unsafe {
            let initial: c_uint = initial;
            libc::sem_open(name.as_c_str().as_ptr(), flags, mode, initial)
        };
        if let (Some(sem), false) = (NonNull::new(sem), sem == libc::SEM_FAILED) {
            return Ok(NamedSem {
                sem,
                name: name.clone(),
            });
        }
        let error = SysError::last("sem_open", name.to_string());
        if error.errno != Errno::EINTR {
            return Err(error);
        }
    }
}

enum Created {
    Whole,
    Unsupported,
}

/// Makes the semaphore's file as glibc does (`/dev/shm/sem.NAME`, the bytes of a shared `sem_t`), but
/// without a temporary name.
#[cfg(target_env = "gnu")]
fn create_whole(name: &ObjectName, initial: u32, mode: u32) -> Result<Created> {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags};
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = match rustix::fs::open(shm::MOUNT, flags, Mode::from_raw_mode(mode)) {
        // No such files on this mount, or no mount: the C library may know better.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
            return Ok(Created::Unsupported);
        }
        opened => File::from(opened.during("sem_open", name)?),
    };

    let mut sem = MaybeUninit::<libc::sem_t>::zeroed();
    // SAFETY: there is room for a `sem_t`. It is not used as a semaphore here, so it needs no destroying.
    if unsafe { libc::sem_init(sem.as_mut_ptr(), 1, initial) } != 0 {
        return Err(SysError::last("sem_init", name.to_string()));
    }
    // SAFETY: all bytes were zeroed before, so none is uninitialised; the slice ends before `sem` does.
    let bytes = unsafe { std::slice::from_raw_parts(sem.as_ptr().cast::<u8>(), size_of_val(&sem)) };
    (&file).write_all(bytes).during("sem_open", name)?;

    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    crate::crash_point!("sys.sem.create_unlinked");
    match rustix::fs::linkat(CWD, unnamed, CWD, path_of(name), AtFlags::SYMLINK_FOLLOW) {
        // No /proc.
        Err(rustix::io::Errno::NOENT) => Ok(Created::Unsupported),
        linked => linked.map(|()| Created::Whole).during("sem_open", name),
    }
}

/// Refuses a file that is too short to be a semaphore: glibc would map it, and an empty one is a `SIGBUS` at first use.
#[cfg(target_env = "gnu")]
fn check_file(name: &ObjectName) -> Result<()> {
    match rustix::fs::stat(path_of(name)) {
        Ok(stat) if stat.st_size < MemSem::SIZE as _ => {
            Err(SysError::new("sem_open", name.to_string(), Errno::EINVAL))
        }
        // What else may be wrong, sem_open will say.
        _ => Ok(()),
    }
}

#[cfg(target_env = "gnu")]
fn path_of(name: &ObjectName) -> Vec<u8> {
    let file_name = &name.as_bytes()[1..];
    [
        shm::MOUNT.as_bytes(),
        b"/",
        shm::SEMAPHORE_PREFIX.as_bytes(),
        file_name,
    ]
    .concat()
}

/// Other C libraries keep the file elsewhere.
#[cfg(not(target_env = "gnu"))]
fn create_whole(_: &ObjectName, _: u32, _: u32) -> Result<Created> {
    Ok(Created::Unsupported)
}

#[cfg(not(target_env = "gnu"))]
fn check_file(_: &ObjectName) -> Result<()> {
    Ok(())
}

/// A semaphore in memory, which may be shared between processes: `sem_init(3)`.
///
/// It is a `sem_t` and nothing else. There is no safe constructor: [`init`](Self::init) prepares the memory where it
/// will stay, and a reference may be made to it only then.
#[repr(transparent)]
pub struct MemSem(UnsafeCell<libc::sem_t>);

// SAFETY: a semaphore is made to be used by many threads; all operations are atomic.
unsafe impl Sync for MemSem {}
// SAFETY: it may be destroyed by another thread than the one that initialised it.
unsafe impl Send for MemSem {}

impl MemSem {
    /// Its size in bytes.
    pub const SIZE: usize = size_of::<libc::sem_t>();

    /// Initialises the memory as a semaphore that processes share, with `initial` permits: `sem_init(3)`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `initial` exceeds [`VALUE_MAX`]; `ENOSYS` where there are no such semaphores.
    ///
    /// # Safety
    ///
    /// - `this` is valid for writes and aligned.
    /// - Nobody uses it as a semaphore now, in this or another process.
    pub unsafe fn init(this: *mut MemSem, initial: u32) -> Result<()> {
        // SAFETY: the type is a transparent `sem_t`; the caller's duties are the call's.
        match unsafe { libc::sem_init(this.cast(), 1, initial) } {
            0 => Ok(()),
            _ => Err(SysError::last("sem_init", format!("{initial} permits"))),
        }
    }

    /// Ends its use as a semaphore: `sem_destroy(3)`.
    ///
    /// # Errors
    ///
    /// None is known.
    ///
    /// # Safety
    ///
    /// - It is initialised, and no process waits for it or will use it. That one process has done with it is not
    ///   enough.
    pub unsafe fn destroy(this: *mut MemSem) -> Result<()> {
        // SAFETY: the caller's duties are the call's.
        match unsafe { libc::sem_destroy(this.cast()) } {
            0 => Ok(()),
            _ => Err(SysError::last("sem_destroy", format!("{this:p}"))),
        }
    }

    /// Adds a permit and wakes a waiter: `sem_post(3)`. Async-signal-safe as long as it succeeds.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` at [`VALUE_MAX`].
    pub fn post(&self) -> Result<()> {
        // SAFETY: a reference is made only to an initialised semaphore (`init`).
        unsafe { post(self.0.get(), self) }
    }

    /// Takes a permit: `sem_wait(3)`. Signals do not end the wait.
    ///
    /// # Blocking
    ///
    /// Until there is a permit; for ever, if its holder died.
    ///
    /// # Errors
    ///
    /// None is known.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: as in `post`.
        unsafe { wait(self.0.get(), self) }
    }

    /// Takes a permit if there is one, and says whether: `sem_trywait(3)`.
    ///
    /// # Errors
    ///
    /// None is known.
    pub fn try_wait(&self) -> Result<bool> {
        // SAFETY: as in `post`.
        unsafe { try_wait(self.0.get(), self) }
    }

    /// Takes a permit if there is one before the deadline, and says whether: `sem_clockwait(3)`. Signals do not end the wait.
    ///
    /// # Errors
    ///
    /// None is known.
    pub fn wait_deadline(&self, deadline: Deadline) -> Result<bool> {
        // SAFETY: as in `post`.
        unsafe { wait_deadline(self.0.get(), deadline, self) }
    }

    /// The number of permits now: `sem_getvalue(3)`. It may be out of date when it is read.
    pub fn value(&self) -> u32 {
        // SAFETY: as in `post`.
        unsafe { value(self.0.get()) }
    }
}

/// Where it is, as it is named in messages.
impl fmt::Display for MemSem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the semaphore at {self:p}")
    }
}

impl fmt::Debug for MemSem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemSem").field(&self.value()).finish()
    }
}

/// Whether semaphores in memory can be shared between processes here: tries one.
pub fn have_anonymous() -> bool {
    let mut sem = MaybeUninit::<MemSem>::uninit();
    // SAFETY: the memory is ours alone; nobody waits when it is destroyed.
    unsafe {
        MemSem::init(sem.as_mut_ptr(), 0).is_ok() && MemSem::destroy(sem.as_mut_ptr()).is_ok()
    }
}

/// # Safety
///
/// For this and the next four: `sem` is an initialised semaphore.
unsafe fn post(sem: *mut libc::sem_t, target: &dyn fmt::Display) -> Result<()> {
    // SAFETY: the caller's duty.
    match unsafe { libc::sem_post(sem) } {
        0 => Ok(()),
        _ => Err(SysError::last("sem_post", target.to_string())),
    }
}

unsafe fn wait(sem: *mut libc::sem_t, target: &dyn fmt::Display) -> Result<()> {
    // SAFETY: the caller's duty.
    while unsafe { libc::sem_wait(sem) } != 0 {
        let errno = Errno::last();
        if errno != Errno::EINTR {
            return Err(SysError::new("sem_wait", target.to_string(), errno));
        }
    }
    Ok(())
}

unsafe fn try_wait(sem: *mut libc::sem_t, target: &dyn fmt::Display) -> Result<bool> {
    // SAFETY: the caller's duty.
    while unsafe { libc::sem_trywait(sem) } != 0 {
        match Errno::last() {
            Errno::EAGAIN => return Ok(false),
            Errno::EINTR => {}
            errno => return Err(SysError::new("sem_trywait", target.to_string(), errno)),
        }
    }
    Ok(true)
}

unsafe fn wait_deadline(
    sem: *mut libc::sem_t,
    deadline: Deadline,
    target: &dyn fmt::Display,
) -> Result<bool> {
    // SAFETY: the caller's duty.
    while unsafe { clock_wait(sem, deadline) } != 0 {
        match Errno::last() {
            Errno::ETIMEDOUT if deadline.is_past() => return Ok(false),
            Errno::ETIMEDOUT | Errno::EINTR => {}
            errno => return Err(SysError::new("sem_clockwait", target.to_string(), errno)),
        }
    }
    Ok(true)
}

unsafe fn value(sem: *mut libc::sem_t) -> u32 {
    let mut value: c_int = 0;
    // SAFETY: the caller's duty; `value` lives through the call.
    let result = unsafe { libc::sem_getvalue(sem, &raw mut value) };
    debug_assert_eq!(result, 0);
    // POSIX allows a negative number of waiters; Linux says 0.
    value.max(0) as u32
}

/// Waits until the deadline at most: glibc 2.30 has a call for the monotonic clock.
///
/// # Safety
///
/// `sem` is an initialised semaphore.
#[cfg(target_env = "gnu")]
unsafe fn clock_wait(sem: *mut libc::sem_t, deadline: Deadline) -> c_int {
    // The libc crate has it for other systems only.
    unsafe extern "C" {
        fn sem_clockwait(
            sem: *mut libc::sem_t,
            clock: libc::clockid_t,
            until: *const libc::timespec,
        ) -> c_int;
    }
    let until = c_timespec(deadline.to_timespec());
    // SAFETY: the caller's duty for `sem`; `until` lives through the call.
    unsafe { sem_clockwait(sem, libc::CLOCK_MONOTONIC, &raw const until) }
}

/// Waits until the deadline at most, by the clock of the day and therefore a second at a time: a clock that is set
/// makes the wait late by that much at most.
///
/// # Safety
///
/// `sem` is an initialised semaphore.
#[cfg(not(target_env = "gnu"))]
unsafe fn clock_wait(sem: *mut libc::sem_t, deadline: Deadline) -> c_int {
    use rustix::time::{ClockId, clock_gettime};
    use std::time::Duration;

    let slice = deadline.remaining().min(Duration::from_secs(1));
    let mut until = clock_gettime(ClockId::Realtime);
    let nanos = until.tv_nsec + i64::from(slice.subsec_nanos());
    until.tv_sec += slice.as_secs() as i64 + nanos / 1_000_000_000;
    until.tv_nsec = nanos % 1_000_000_000;
    let until = c_timespec(until);
    // SAFETY: the caller's duty for `sem`; `until` lives through the call.
    unsafe { libc::sem_timedwait(sem, &raw const until) }
}

fn c_timespec(time: rustix::time::Timespec) -> libc::timespec {
    libc::timespec {
        tv_sec: time.tv_sec as _,
        tv_nsec: time.tv_nsec as _,
    }
}

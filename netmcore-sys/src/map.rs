//! Address ranges: reserved, mapped from shared memory, populated, given back.
//!
//! **Protocol.** A [`Reservation`] is a range of addresses that nothing else will be placed in: inaccessible
//! (`PROT_NONE`), without memory behind it. Parts of it are mapped to shared memory at addresses of the caller's
//! choice, and unmapped back to being reserved. A [`Mapping`] is a mapping whose address does not matter.
//!
//! **Invariants.**
//! 1. A reservation owns `[base, base + len)` until it is dropped or leaked: page-aligned, not wrapping.
//! 2. Every part of it is at any time either reserved or mapped by [`Reservation::map`], never free for others.
//!
//! A mapping may reach beyond the end of its object: touching those pages is a `SIGBUS` until the object has
//! grown, and growth is visible at once in all mappings.
//!
//! **If a process dies here.** Its address space goes with it; shared memory is as it was left.
//!
//! # Safety
//!
//! Mapping and unmapping change what addresses mean. The functions that do so at addresses that the caller names
//! are `unsafe` and list the duties; those that let the kernel choose free addresses are safe. This module
//! never reads or writes through the addresses.

#![allow(unsafe_code)]

use crate::error::{During, Errno, Result, SysError};
pub use crate::shm::Access;
use memmap2::{MmapOptions, MmapRaw};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

/// The size of a page in bytes, a power of two.
pub fn page_size() -> usize {
    rustix::param::page_size()
}

/// A range of addresses kept free for mappings at places of our choice: `mmap(2)` with `PROT_NONE`.
///
/// It costs no memory, but counts against `RLIMIT_AS`. A forked child inherits the range with all
/// that is mapped in it; there it belongs to the child's copy of this value.
#[derive(Debug)]
pub struct Reservation {
    base: *mut u8,
    len: usize,
}

// SAFETY: the value is an address and a length; it accesses no memory, and `map` and `unmap` hand the duties to
// their callers, whatever thread they are in.
unsafe impl Send for Reservation {}
// SAFETY: as for Send.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes, rounded up to whole pages, where the kernel finds room.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no such range or `RLIMIT_AS` forbids it; `EINVAL` for a length of 0.
    pub fn reserve(len: usize) -> Result<Reservation> {
        let len = round_up_to_pages(len)?;
        // SAFETY: a new range at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .during("mmap", format_args!("{len} reserved bytes"))?;
        Ok(Reservation {
            base: base.cast(),
            len,
        })
    }

    /// Reserves `len` bytes, rounded up to whole pages, at the page-aligned address `at`: `MAP_FIXED_NOREPLACE`.
    ///
    /// # Errors
    ///
    /// `EEXIST` if something is there; otherwise as [`reserve`](Self::reserve).
    pub fn reserve_at(at: usize, len: usize) -> Result<Reservation> {
        let len = round_up_to_pages(len)?;
        let wanted = ptr::without_provenance_mut::<u8>(at);
        let valid = at != 0 && at.is_multiple_of(page_size()) && at.checked_add(len).is_some();
        let reserved = if valid {
            reserve_fixed_noreplace(wanted, len)
        } else {
            Err(rustix::io::Errno::INVAL)
        };
        let base = reserved.during("mmap", format_args!("{len} reserved bytes at {wanted:p}"))?;
        Ok(Reservation { base, len })
    }

    /// The first address.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// The length in bytes: whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Maps `len` bytes of the object `fd`, from `offset` on, at the address `at` inside this range:
    /// `mmap(2)` with `MAP_SHARED|MAP_FIXED|MAP_NORESERVE`. What was mapped there is replaced.
    ///
    /// The mapping stays until [`unmap`](Self::unmap) or the end of the reservation; `fd` may be closed.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the part is not inside, or `at`, `len` or `offset` are not whole pages, or `len` is 0; `EACCES`
    /// if `fd` is not open for that access; `ENOMEM` at the limit of mappings (`vm.max_map_count`). The range is reserved or as before then.
    ///
    /// # Safety
    ///
    /// - No reference to memory in `[at, at + len)` is alive in this process, and no thread accesses it
    ///   during the call.
    /// - Whoever makes references to the mapped memory answers for what other processes do to it: writes,
    ///   and shrinking of the object below the pages that are touched.
    pub unsafe fn map(
        &self,
        at: *mut u8,
        len: usize,
        fd: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> Result<()> {
        self.check_part(at, len)?;
        let protection = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the part lies in the range that this value owns (invariant 1), so nothing of anybody
        // else is replaced; that no reference to it is alive is the caller's duty.
        let mapped = unsafe { rustix::mm::mmap(at.cast(), len, protection, flags, fd, offset) };
        if mapped.is_err() {
            // The kernel may have unmapped what was there before it failed (invariant 2).
            // EEXIST says that the part is still occupied, and is fine.
            let _ = reserve_fixed_noreplace(at, len);
        }
        mapped.map(drop).during(
            "mmap",
            format_args!("{len} bytes of descriptor {} at {at:p}", fd.as_raw_fd()),
        )
    }

    /// Makes the part `[at, at + len)` inaccessible and reserved again, whatever is mapped in it.
    ///
    /// # Errors
    ///
    /// `EINVAL` as for [`map`](Self::map); `ENOMEM` at the limit of mappings: it may be tried again.
    ///
    /// # Safety
    ///
    /// - No reference to memory in the part is alive in this process, and no thread accesses it any more.
    pub unsafe fn unmap(&self, at: *mut u8, len: usize) -> Result<()> {
        self.check_part(at, len)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `map`.
        unsafe { rustix::mm::mmap_anonymous(at.cast(), len, ProtFlags::empty(), flags) }
            .map(drop)
            .during("mmap", format_args!("{len} reserved bytes at {at:p}"))
    }

    /// Gives the range up without unmapping it: it stays for the life of the process.
    pub fn leak(self) -> (*mut u8, usize) {
        let parts = (self.base, self.len);
        std::mem::forget(self);
        parts
    }

    fn check_part(&self, at: *mut u8, len: usize) -> Result<()> {
        if self.has_part(at, len) {
            return Ok(());
        }
        let Reservation { base, len: whole } = self;
        let target = format!("{len} bytes at {at:p} in {whole} reserved bytes at {base:p}");
        Err(SysError::new("mmap", target, Errno::EINVAL))
    }

    /// Whether `[at, at + len)` are whole pages inside this range.
    fn has_part(&self, at: *mut u8, len: usize) -> bool {
        let page = page_size();
        let Some(start) = at.addr().checked_sub(self.base.addr()) else {
            return false;
        };
        let inside = start <= self.len && len <= self.len - start;
        inside && len != 0 && len.is_multiple_of(page) && start.is_multiple_of(page)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is this value's (invariant 1). Mappings in it were made through `map`, whose callers
        // answer for their references.
        let unmapped = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// Reserves a range at `at` unless something is there (`EEXIST`).
fn reserve_fixed_noreplace(at: *mut u8, len: usize) -> rustix::io::Result<*mut u8> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE replaces nothing that exists.
    let base = unsafe { rustix::mm::mmap_anonymous(at.cast(), len, ProtFlags::empty(), flags) }?;
    if base != at.cast() {
        // Linux before 4.17 ignores the flag and takes the address for a hint.
        // SAFETY: the range was made by the call above; nobody else knows of it.
        unsafe { rustix::mm::munmap(base, len) }?;
        return Err(rustix::io::Errno::EXIST);
    }
    Ok(at)
}

fn round_up_to_pages(len: usize) -> Result<usize> {
    match len.checked_next_multiple_of(page_size()) {
        None => Err(SysError::new("mmap", format!("{len} bytes"), Errno::ENOMEM)),
        Some(0) => Err(SysError::new("mmap", "0 bytes", Errno::EINVAL)),
        Some(rounded) => Ok(rounded),
    }
}

/// A shared mapping of an object from its start, at an address of the kernel's choice.
///
/// ```
/// use netmcore_sys::map::Mapping;
/// use netmcore_sys::shm::{self, Access};
/// use std::os::fd::AsFd;
///
/// # fn main() -> netmcore_sys::Result<()> {
/// let file = shm::anonymous(c"example")?;
/// shm::allocate(file.as_fd(), 0, 4096)?;
/// let mapping = Mapping::map(file.as_fd(), 4096, Access::ReadWrite)?;
/// assert_eq!(mapping.len(), 4096);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Mapping {
    raw: MmapRaw,
}

impl Mapping {
    /// Maps the first `len` bytes of the object `fd`, which may be closed afterwards: `mmap(2)` with `MAP_SHARED`.
    ///
    /// The length may exceed the object's; see the module.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a length of 0; `EACCES` if `fd` is not open for that access; `ENOMEM`.
    pub fn map(fd: BorrowedFd<'_>, len: usize, access: Access) -> Result<Mapping> {
        if len == 0 {
            return Err(SysError::new("mmap", "0 bytes", Errno::EINVAL));
        }
        let mut options = MmapOptions::new();
        options.len(len).no_reserve_swap();
        let raw = match access {
            Access::ReadOnly => options.map_raw_read_only(&fd),
            Access::ReadWrite => options.map_raw(&fd),
        }
        .during(
            "mmap",
            format_args!("{len} bytes of descriptor {}", fd.as_raw_fd()),
        )?;
        Ok(Mapping { raw })
    }

    /// The first address. Dereferencing is up to the caller: others may write, and pages beyond the end
    /// of the object are a `SIGBUS`. Writing through a read-only mapping is a `SIGSEGV`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.raw.as_mut_ptr()
    }

    /// The length in bytes, as given to [`map`](Self::map).
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Whether it is empty: never.
    pub fn is_empty(&self) -> bool {
        self.raw.len() == 0
    }
}

/// Makes the pages of `[at, at + len)` present and writable now: `MADV_POPULATE_WRITE` (Linux 5.14). Contents
/// are kept. Where touching would be a `SIGBUS`, this is an error.
///
/// # Errors
///
/// `EFAULT` for pages beyond the end of the object or without space in its file system, `ENOMEM` if something is not mapped or
/// there is no memory, `EINVAL` if it is not writable, `at` is not page-aligned, or Linux is older. Some pages may have been made present.
///
/// # Safety
///
/// - `[at, at + len)` is a mapping of the caller's.
pub unsafe fn populate_write(at: *mut u8, len: usize) -> Result<()> {
    // SAFETY: the advice keeps contents; the range is the caller's.
    unsafe { advise(at, len, Advice::LinuxPopulateWrite) }.during(
        "madvise(MADV_POPULATE_WRITE)",
        format_args!("{len} bytes at {at:p}"),
    )
}

/// Copies memory of this process, from `at` on, as far as it can be read: `process_vm_readv(2)` of oneself. Where touching it would be a
/// `SIGBUS` or `SIGSEGV`, this is an error. What others write meanwhile is copied as it is found.
///
/// # Errors
///
/// `EFAULT` if it is not there, or not all of it; `EPERM` or `ENOSYS` where a sandbox forbids the call.
pub fn copy_if_present(at: *const u8, into: &mut [u8]) -> Result<()> {
    let local = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    let remote = libc::iovec {
        iov_base: at.cast_mut().cast(),
        iov_len: into.len(),
    };
    let this = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel writes to `into` only, which is ours, and reads from wherever it can.
    let copied =
        unsafe { libc::process_vm_readv(this, &raw const local, 1, &raw const remote, 1, 0) };
    let errno = match usize::try_from(copied) {
        Ok(copied) if copied == into.len() => return Ok(()),
        Ok(_) => Errno::EFAULT,
        Err(_) => Errno::last(),
    };
    Err(SysError::new(
        "process_vm_readv",
        format!("{} bytes at {at:p}", into.len()),
        errno,
    ))
}

/// Gives back the memory behind `[at, at + len)`, in the object itself: `MADV_REMOVE`. All mappings of it read zero
/// from then on. It does by address what [`punch_hole`](crate::shm::punch_hole) does by offset.
///
/// # Errors
///
/// `EINVAL` if it is not a shared writable mapping or not page-aligned; `EFAULT` if something is not mapped.
///
/// # Safety
///
/// - `[at, at + len)` is a shared mapping of the caller's, and losing its contents is right for everyone
///   who uses the object.
/// - No reference to it is alive in this process, other than to types that others may change
///   at any time (atomics, cells of raw bytes).
pub unsafe fn remove_pages(at: *mut u8, len: usize) -> Result<()> {
    // SAFETY: that the contents go is what the caller answers for.
    unsafe { advise(at, len, Advice::LinuxRemove) }.during(
        "madvise(MADV_REMOVE)",
        format_args!("{len} bytes at {at:p}"),
    )
}

/// Leaves `[at, at + len)` out of core dumps: `MADV_DONTDUMP`. It holds for this mapping and for forks of it.
///
/// # Errors
///
/// `ENOMEM` if something is not mapped, `EINVAL` if `at` is not page-aligned.
///
/// # Safety
///
/// - `[at, at + len)` is a mapping of the caller's.
pub unsafe fn exclude_from_dumps(at: *mut u8, len: usize) -> Result<()> {
    // SAFETY: the advice changes neither contents nor access.
    unsafe { advise(at, len, Advice::LinuxDontDump) }.during(
        "madvise(MADV_DONTDUMP)",
        format_args!("{len} bytes at {at:p}"),
    )
}

/// Makes a word of this process alone, 0 at first, that is 0 again in each forked child: `MADV_WIPEONFORK` (Linux 4.14).
///
/// It takes a page, for good. The kernel wipes it whoever forks and however (libc's handlers need not run).
/// A child that shares its parent's memory (`vfork`) shares the word too.
///
/// # Errors
///
/// `EINVAL` if Linux is older; `ENOMEM`.
pub fn word_wiped_on_fork() -> Result<&'static AtomicU64> {
    let len = page_size();
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }
    .during("mmap", "a page to be wiped on fork")?;
    // SAFETY: the page is ours, and nobody has used it yet.
    let advised = unsafe { advise(page.cast(), len, Advice::LinuxWipeOnFork) };
    if let Err(errno) = advised {
        // SAFETY: as before; nobody else knows of it.
        let unmapped = unsafe { rustix::mm::munmap(page, len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
        return Err(errno).during("madvise(MADV_WIPEONFORK)", format_args!("{page:p}"));
    }
    // SAFETY: in bounds: a page, aligned, never unmapped; here and there: an atomic of this process, for which
    // zeros are valid; gone: wiped in a child before the fork returns there.
    Ok(unsafe { &*page.cast::<AtomicU64>() })
}

/// # Safety
///
/// Those of the advice.
unsafe fn advise(at: *mut u8, len: usize, advice: Advice) -> rustix::io::Result<()> {
    loop {
        // SAFETY: the caller's duties are the same.
        match unsafe { rustix::mm::madvise(at.cast::<c_void>(), len, advice) } {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => std::thread::yield_now(),
            done => return done,
        }
    }
}

/// The ranges of addresses that this process may execute, in ascending order: the program, its libraries, the
/// kernel's vdso; from `/proc/self/maps`, `proc_pid_maps(5)`.
///
/// # Errors
///
/// Those of reading the file: `ENOENT` where `/proc` is not mounted.
pub fn executable_ranges() -> Result<Vec<Range<usize>>> {
    const MAPS: &str = "/proc/self/maps";
    let maps = std::fs::read(MAPS).during("read", MAPS)?;
    let lines = maps.split(|&byte| byte == b'\n');
    Ok(lines.filter_map(executable_range).collect())
}

/// The mapping that `address` lies in, `None` if there is none: for an address on the stack, the stack (of a thread: its
/// stack, and neighbours of the same kind); from `/proc/self/maps`, `proc_pid_maps(5)`.
///
/// # Errors
///
/// Those of reading the file: `ENOENT` where `/proc` is not mounted.
pub fn range_of(address: usize) -> Result<Option<Range<usize>>> {
    const MAPS: &str = "/proc/self/maps";
    let maps = std::fs::read(MAPS).during("read", MAPS)?;
    let mut lines = maps.split(|&byte| byte == b'\n');
    Ok(lines.find_map(|line| range(line).filter(|range| range.contains(&address))))
}

/// The range of a line like `55d0c0a00000-55d0c0a21000 r-xp 00000000 08:01 1234 /bin/x`, if it is executable.
fn executable_range(line: &[u8]) -> Option<Range<usize>> {
    let permissions = line.split(|&byte| byte == b' ').nth(1)?;
    if permissions.get(2) != Some(&b'x') {
        return None;
    }
    range(line)
}

/// The range of such a line.
fn range(line: &[u8]) -> Option<Range<usize>> {
    let range = line.split(|&byte| byte == b' ').next()?;
    let range = std::str::from_utf8(range).ok()?;
    let (start, end) = range.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_line_is_read() {
        let line = b"7f00a000-7f00b000 r-xp 00000000 08:01 1234    /lib/a b\xff.so";
        assert_eq!(executable_range(line), Some(0x7f00_a000..0x7f00_b000));
        assert_eq!(executable_range(b"1000-2000 rw-p 0 0:0 0"), None);
        assert_eq!(executable_range(b""), None);
    }

    #[test]
    fn own_function_lies_in_an_executable_range() {
        let here = executable_range as fn(&[u8]) -> _ as usize;
        let ranges = executable_ranges().unwrap();
        assert!(ranges.iter().any(|range| range.contains(&here)));
        let on_the_heap = Box::new(0_u8);
        let there = (&raw const *on_the_heap).addr();
        assert!(!ranges.iter().any(|range| range.contains(&there)));
    }

    #[test]
    fn what_is_not_there_is_not_copied() {
        let here = *b"0123456789";
        let mut copy = [0; 10];
        copy_if_present(here.as_ptr(), &mut copy).unwrap();
        assert_eq!(copy, here);
        let reservation = Reservation::reserve(page_size()).unwrap();
        let error = copy_if_present(reservation.base(), &mut copy).unwrap_err();
        assert_eq!(error.errno, Errno::EFAULT);
        assert!(copy_if_present(ptr::null(), &mut copy).is_err());
    }

    #[test]
    fn variable_lies_in_a_range() {
        let here = 0_u8;
        let here = (&raw const here).addr();
        assert!(range_of(here).unwrap().unwrap().contains(&here));
        assert_eq!(range_of(8), Ok(None));
    }

    #[test]
    fn parts_outside_or_unaligned_are_refused() {
        let page = page_size();
        let reservation = Reservation::reserve(4 * page).unwrap();
        let base = reservation.base();
        assert!(reservation.has_part(base, 4 * page));
        assert!(reservation.has_part(base.wrapping_add(3 * page), page));
        assert!(!reservation.has_part(base.wrapping_add(3 * page), 2 * page));
        assert!(!reservation.has_part(base.wrapping_sub(page), page));
        assert!(!reservation.has_part(base.wrapping_add(1), page));
        assert!(!reservation.has_part(base, 1));
        assert!(!reservation.has_part(base, 0));
        assert!(!reservation.has_part(base.wrapping_add(page), usize::MAX - page + 1));
    }

    #[test]
    fn lengths_that_cannot_be_are_errors() {
        assert_eq!(Reservation::reserve(0).unwrap_err().errno, Errno::EINVAL);
        let error = Reservation::reserve(usize::MAX).unwrap_err();
        assert_eq!(error.errno, Errno::ENOMEM);
        let error = Reservation::reserve(1 << 60).unwrap_err();
        assert_eq!(error.errno, Errno::ENOMEM);
    }
}

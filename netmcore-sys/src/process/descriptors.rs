//! The descriptor table of this process as a whole: closing ranges, moving above a base, listing.
//!
//! # Safety
//!
//! Unsafe code here closes descriptors by number; whose they are is the caller's to know.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};

use crate::error::{During, Errno, SysError};

/// Closes all descriptors from `first` to `last`, both included: `close_range(2)`, from Linux 5.9 on. `RawFd::MAX`
/// as `last` means all above. Numbers that are not open do not matter. On older kernels, or where a filter refuses
/// the call, the open descriptors are listed and closed one by one.
///
/// How a forked worker sheds its master's descriptors, which CLOEXEC does not do.
///
/// # Errors
///
/// `EINVAL` if `first` is negative or above `last`; whatever keeps `/proc/self/fd` from being listed where the call
/// is missing.
///
/// # Safety
///
/// * Nothing in this process may use a descriptor of the range afterwards, close it, or drop an owner of it: the
///   number may by then be someone else's. Owners that live on must be forgotten.
pub unsafe fn close_range(first: RawFd, last: RawFd) -> crate::Result<()> {
    let failed = |errno| {
        SysError::new(
            "close_range",
            format!("descriptors {first} to {last}"),
            errno,
        )
    };
    if first < 0 || first > last {
        return Err(failed(Errno::EINVAL));
    }
    // SAFETY: three integers; the caller answers for the descriptors.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    let errno = Errno::last();
    if errno != Errno::ENOSYS && errno != Errno::EPERM {
        return Err(failed(errno));
    }
    // SAFETY: as the caller promised for this function.
    unsafe { close_each(first, last) }
}

/// What [`close_range`] does without the system call.
///
/// # Safety
///
/// * As [`close_range`].
unsafe fn close_each(first: RawFd, last: RawFd) -> crate::Result<()> {
    for fd in open_descriptors()? {
        if (first..=last).contains(&fd) {
            // SAFETY: the caller answers for the descriptor. The result does not matter: on Linux the number is
            // free even after an error.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}

/// Moves a descriptor to the lowest free number that is at least `base`: `fcntl(F_DUPFD_CLOEXEC)`, then `close`.
/// The new one is close-on-exec. One that is there already stays where it is.
///
/// # Errors
///
/// `EMFILE` if there is no free number below the limit, `EINVAL` if `base` is above it. The descriptor is closed.
pub fn move_above(fd: OwnedFd, base: RawFd) -> crate::Result<OwnedFd> {
    if fd.as_raw_fd() >= base {
        return Ok(fd);
    }
    rustix::io::fcntl_dupfd_cloexec(&fd, base).during(
        "fcntl(F_DUPFD_CLOEXEC)",
        format_args!("descriptor {} above {base}", fd.as_raw_fd()),
    )
}

/// Returns the open descriptors of this process, ascending: `/proc/self/fd`. The one that the listing itself uses
/// is left out.
///
/// # Errors
///
/// `ENOENT` where `/proc` is not mounted; `EMFILE` if there is no descriptor free to list with.
pub fn open_descriptors() -> crate::Result<Vec<RawFd>> {
    const PATH: &str = "/proc/self/fd";
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listing = rustix::io::retry_on_intr(|| rustix::fs::open(PATH, flags, Mode::empty()))
        .during("open", PATH)?;
    let listing_number = listing.as_raw_fd();
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::new(listing).during("opendir", PATH)? {
        let entry = entry.during("readdir", PATH)?;
        let number = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|name| name.parse::<RawFd>().ok());
        found.extend(number.filter(|&number| number != listing_number));
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn open_descriptors_lists_what_is_open() {
        let file = File::open("/dev/null").unwrap();
        assert!(open_descriptors().unwrap().contains(&file.as_raw_fd()));
    }

    #[test]
    fn close_range_refuses_what_is_no_range() {
        for (first, last) in [(-1, 5), (9, 8)] {
            // SAFETY: both ranges are empty, so nothing is closed.
            let error = unsafe { close_range(first, last) }.unwrap_err();
            assert_eq!(error.errno, Errno::EINVAL);
        }
    }

    #[test]
    fn close_each_closes_what_close_range_would() {
        // Numbers that no other test of this process uses.
        let open = |base| {
            let fd = OwnedFd::from(File::open("/dev/null").unwrap());
            std::os::fd::IntoRawFd::into_raw_fd(move_above(fd, base).unwrap())
        };
        let numbers = [700, 705, 710, 711].map(open);
        assert_eq!(numbers, [700, 705, 710, 711]);
        // SAFETY: nobody owns these descriptors.
        unsafe { close_each(700, 710) }.unwrap();
        let left = |numbers: Vec<RawFd>| numbers.into_iter().filter(|fd| (700..800).contains(fd));
        assert_eq!(left(open_descriptors().unwrap()).collect::<Vec<_>>(), [711]);
        // SAFETY: as above.
        unsafe { close_range(711, 711) }.unwrap();
        assert_eq!(left(open_descriptors().unwrap()).count(), 0);
    }

    #[test]
    fn move_above_moves_and_closes_the_old_number() {
        let fd = OwnedFd::from(File::open("/dev/null").unwrap());
        let moved = move_above(fd, 200).unwrap();
        let number = moved.as_raw_fd();
        assert!(number >= 200);
        assert!(
            rustix::io::fcntl_getfd(&moved)
                .unwrap()
                .contains(rustix::io::FdFlags::CLOEXEC)
        );
        assert_eq!(
            move_above(moved, 200).unwrap().as_raw_fd(),
            number,
            "already there"
        );
    }
}

//! Resource limits of this and of other processes: `prlimit(2)`.
//!
//! # Safety
//!
//! Unsafe code here is the system call, on two structures of this frame.
#![allow(unsafe_code)]

use std::fmt;
use std::ptr;

use super::Pid;
use crate::error::{Errno, SysError};

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// The number of open descriptors, exactly: one above the highest number. RLIMIT_NOFILE.
    DescriptorCount,
    /// Writable private memory: heap, data, anonymous private mappings; neither shared memory nor reserved
    /// address space. Allocations beyond it fail. RLIMIT_DATA.
    DataBytes,
    /// All mapped addresses, reserved ones included. RLIMIT_AS.
    AddressSpaceBytes,
    /// Size of a core dump; 0: none. RLIMIT_CORE.
    CoreBytes,
    /// Processes and threads of the user (not for a privileged one). RLIMIT_NPROC.
    ProcessCount,
    /// Size of a file that this process extends; beyond it comes SIGXFSZ, or `EFBIG` where that is ignored. Holds
    /// for shared memory objects too. RLIMIT_FSIZE.
    FileSizeBytes,
    /// The main thread's stack. RLIMIT_STACK.
    StackBytes,
    /// Processor time; at the soft limit SIGXCPU, at the hard one SIGKILL. RLIMIT_CPU.
    ProcessorSeconds,
}

impl Resource {
    fn raw(self) -> libc::__rlimit_resource_t {
        match self {
            Resource::DescriptorCount => libc::RLIMIT_NOFILE,
            Resource::DataBytes => libc::RLIMIT_DATA,
            Resource::AddressSpaceBytes => libc::RLIMIT_AS,
            Resource::CoreBytes => libc::RLIMIT_CORE,
            Resource::ProcessCount => libc::RLIMIT_NPROC,
            Resource::FileSizeBytes => libc::RLIMIT_FSIZE,
            Resource::StackBytes => libc::RLIMIT_STACK,
            Resource::ProcessorSeconds => libc::RLIMIT_CPU,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Resource::DescriptorCount => "RLIMIT_NOFILE",
            Resource::DataBytes => "RLIMIT_DATA",
            Resource::AddressSpaceBytes => "RLIMIT_AS",
            Resource::CoreBytes => "RLIMIT_CORE",
            Resource::ProcessCount => "RLIMIT_NPROC",
            Resource::FileSizeBytes => "RLIMIT_FSIZE",
            Resource::StackBytes => "RLIMIT_STACK",
            Resource::ProcessorSeconds => "RLIMIT_CPU",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The two limits of a [`Resource`], in its unit; `None`: unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limit {
    /// The limit that is enforced.
    pub soft: Option<u64>,
    /// How far the soft limit can be raised. Lowering it is for good, but for privileged processes.
    pub hard: Option<u64>,
}

impl Limit {
    fn from_raw(raw: &libc::rlimit64) -> Limit {
        let value = |raw| {
            if raw == libc::RLIM64_INFINITY {
                None
            } else {
                Some(raw)
            }
        };
        Limit {
            soft: value(raw.rlim_cur),
            hard: value(raw.rlim_max),
        }
    }

    fn to_raw(self) -> libc::rlimit64 {
        libc::rlimit64 {
            rlim_cur: self.soft.unwrap_or(libc::RLIM64_INFINITY),
            rlim_max: self.hard.unwrap_or(libc::RLIM64_INFINITY),
        }
    }
}

/// Returns this process's limit.
///
/// # Errors
///
/// None but those of a kernel or filter without `prlimit`.
pub fn get_limit(resource: Resource) -> crate::Result<Limit> {
    prlimit(None, resource, None)
}

/// Returns another process's limit.
///
/// # Errors
///
/// `ESRCH` if there is no such process, `EPERM` if it belongs to another user.
pub fn get_limit_of(pid: Pid, resource: Resource) -> crate::Result<Limit> {
    prlimit(Some(pid), resource, None)
}

/// Sets this process's limit, and returns the one it had, to be restored.
///
/// Limits are inherited by forks and kept across exec.
///
/// # Errors
///
/// `EPERM` if the hard limit is raised without privilege, or beyond the system's (`fs.nr_open` for descriptors);
/// `EINVAL` if the soft limit is above the hard one.
pub fn set_limit(resource: Resource, limit: Limit) -> crate::Result<Limit> {
    prlimit(None, resource, Some(limit))
}

/// Sets another process's limit, and returns the one it had.
///
/// # Errors
///
/// As [`set_limit`], and `ESRCH` if there is no such process, `EPERM` if it belongs to another user.
pub fn set_limit_of(pid: Pid, resource: Resource, limit: Limit) -> crate::Result<Limit> {
    prlimit(Some(pid), resource, Some(limit))
}

fn prlimit(pid: Option<Pid>, resource: Resource, new: Option<Limit>) -> crate::Result<Limit> {
    let new = new.map(Limit::to_raw);
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `new` is null or a structure of this frame that is only read; `old` is one that is only written.
    let failed = unsafe {
        libc::prlimit64(
            pid.map_or(0, Pid::get),
            resource.raw(),
            new.as_ref().map_or(ptr::null(), ptr::from_ref),
            &mut old,
        )
    };
    if failed == 0 {
        return Ok(Limit::from_raw(&old));
    }
    let errno = Errno::last();
    let target = match pid {
        None => format!("{resource} of this process"),
        Some(pid) => format!("{resource} of process {pid}"),
    };
    Err(SysError::new("prlimit", target, errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_unlimited_round_trips() {
        for limit in [
            Limit {
                soft: None,
                hard: None,
            },
            Limit {
                soft: Some(0),
                hard: None,
            },
            Limit {
                soft: Some(1),
                hard: Some(2),
            },
        ] {
            assert_eq!(Limit::from_raw(&limit.to_raw()), limit);
        }
    }

    #[test]
    fn limit_soft_above_hard_is_einval() {
        let error = set_limit(
            Resource::CoreBytes,
            Limit {
                soft: Some(2),
                hard: Some(1),
            },
        )
        .unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL);
        assert!(error.to_string().contains("RLIMIT_CORE"), "{error}");
    }

    #[test]
    fn limit_of_a_process_that_is_not_is_esrch() {
        let nobody = Pid::new(i32::MAX).unwrap();
        let error = get_limit_of(nobody, Resource::CoreBytes).unwrap_err();
        assert_eq!(error.errno, Errno::ESRCH);
    }
}

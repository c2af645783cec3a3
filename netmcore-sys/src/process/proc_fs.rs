//! What `/proc` tells about processes: threads, start time, state, memory, children. See `proc(5)`.
//!
//! A process that is gone is `ESRCH` here, whatever the file system said: `/proc` answers `ENOENT` to an open and
//! `ESRCH` to a read, depending on the instant.

use std::fs;
use std::io;

use super::Pid;
use crate::error::{During, Errno, SysError};

/// The kernel's flag of a thread that is past its last instruction outside of the kernel (`PF_EXITING`).
const FLAG_EXITING: u64 = 0x4;

/// The fields of `/proc/PID/stat` that are of use here.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// One letter: R running, S sleeping, D in the kernel, T stopped, Z zombie, X dead.
    state: u8,
    parent: i32,
    /// The kernel's `task->flags`.
    flags: u64,
    /// Clock ticks since boot.
    start_time: u64,
}

impl Stat {
    /// Parses one line. The second field is the program's name in parentheses, chosen by the program: it may hold
    /// blanks, newlines and parentheses, so fields are counted from the *last* closing one.
    fn parse(line: &[u8]) -> Option<Stat> {
        let name_end = line.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(&line[name_end + 1..]).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        // Numbers as in proc(5); the field after the name is number 3.
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        let flags = fields.nth(9 - 5)?.parse().ok()?;
        let start_time = fields.nth(22 - 10)?.parse().ok()?;
        Some(Stat {
            state,
            parent,
            flags,
            start_time,
        })
    }

    fn read(path: &str) -> crate::Result<Stat> {
        Stat::parse(&read(path)?).ok_or_else(|| SysError::new("read", path, Errno::EPROTO))
    }
}

fn read(path: &str) -> crate::Result<Vec<u8>> {
    fs::read(path).map_err(|error| io_error("read", path, &error))
}

fn io_error(call: &'static str, path: &str, error: &io::Error) -> SysError {
    let errno = match error.raw_os_error() {
        Some(libc::ENOENT) => Errno::ESRCH,
        Some(raw) => Errno::from_raw(raw),
        None => Errno::EIO,
    };
    SysError::new(call, path, errno)
}

/// Counts the threads of this process that can still run code, the caller included.
///
/// The number of links of `/proc/self/task` says it at once when there is only one. Else each thread is looked
/// at: one that has been joined stays in the kernel's count for some microseconds, while it is taken apart, and is
/// no danger to a fork.
///
/// # Errors
///
/// Whatever keeps `/proc/self/task` from being read (`ENOENT` where `/proc` is not mounted).
pub fn thread_count() -> crate::Result<usize> {
    const TASKS: &str = "/proc/self/task";
    let links = rustix::fs::stat(TASKS).during("stat", TASKS)?.st_nlink;
    // The directory's own two links, and one for each thread.
    if links == 3 {
        return Ok(1);
    }
    let mut count = 0;
    for entry in fs::read_dir(TASKS).map_err(|error| io_error("opendir", TASKS, &error))? {
        let entry = entry.map_err(|error| io_error("readdir", TASKS, &error))?;
        let Some(thread) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        match Stat::read(&format!("{TASKS}/{thread}/stat")) {
            Ok(stat) if stat.flags & FLAG_EXITING != 0 => {}
            Ok(_) => count += 1,
            Err(error) if error.errno == Errno::ESRCH => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// Counts the threads of a process if all of them are asleep: `None` if one runs, waits for a processor, is stopped, or waits
/// in the kernel where nothing can interrupt it. Threads that are past their last instruction do not count.
///
/// A thread that has been woken is not asleep any more, whether or not it has had a processor since.
///
/// # Errors
///
/// `ESRCH` if there is no such process (any more).
pub fn sleeping_threads(pid: Pid) -> crate::Result<Option<usize>> {
    let tasks = format!("/proc/{pid}/task");
    let mut count = 0;
    for entry in fs::read_dir(&tasks).map_err(|error| io_error("opendir", &tasks, &error))? {
        let entry = entry.map_err(|error| io_error("readdir", &tasks, &error))?;
        let stat = match Stat::read(&format!("{}/stat", entry.path().display())) {
            Ok(stat) => stat,
            Err(error) if error.errno == Errno::ESRCH => continue,
            Err(error) => return Err(error),
        };
        match stat.state {
            _ if stat.flags & FLAG_EXITING != 0 => {}
            b'S' => count += 1,
            _ => return Ok(None),
        }
    }
    Ok(Some(count))
}

/// Returns when a process was started, in clock ticks since boot (field 22 of `/proc/PID/stat`): together with the
/// id it names a process for good, for an id is not given out again within one tick.
///
/// # Errors
///
/// `ESRCH` if there is no such process. A zombie still has its start time.
pub fn start_time(pid: Pid) -> crate::Result<u64> {
    Ok(Stat::read(&format!("/proc/{pid}/stat"))?.start_time)
}

/// Tells whether a process has ended and waits to be reaped.
///
/// # Errors
///
/// `ESRCH` if there is no such process (any more).
pub fn is_zombie(pid: Pid) -> crate::Result<bool> {
    Ok(matches!(
        Stat::read(&format!("/proc/{pid}/stat"))?.state,
        b'Z' | b'X' | b'x'
    ))
}

/// Tells whether a process will run no more code of its program: it is a zombie, on its way out, or SIGKILL waits
/// for it.
///
/// For someone who has killed a process and does not want to wait until it is gone. "No" may be out of date at once.
///
/// # Errors
///
/// `ESRCH` if there is no such process (any more).
pub fn is_dying(pid: Pid) -> crate::Result<bool> {
    /// The bit of SIGKILL in a set of signals as `/proc` shows it.
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let has_ended = || -> crate::Result<bool> {
        let stat = Stat::read(&format!("/proc/{pid}/stat"))?;
        Ok(matches!(stat.state, b'Z' | b'X' | b'x') || stat.flags & FLAG_EXITING != 0)
    };
    if has_ended()? {
        return Ok(true);
    }
    let status = read(&format!("/proc/{pid}/status"))?;
    let pending = |line: &str| {
        let set = line
            .strip_prefix("SigPnd:")
            .or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(set.trim(), 16).ok()
    };
    let is_killed = String::from_utf8_lossy(&status)
        .lines()
        .filter_map(pending)
        .any(|set| set & SIGKILL != 0);
    // The signal is taken before the process is marked: look again at what it may have become meanwhile.
    Ok(is_killed || has_ended()?)
}

/// Tells whether the process has children that run, or will again: zombies are none.
///
/// # Errors
///
/// `ESRCH` or `ENOENT` if there is no such process (any more).
pub fn has_live_children(parent: Pid) -> crate::Result<bool> {
    let tasks = format!("/proc/{parent}/task");
    let mut children = Vec::new();
    for entry in fs::read_dir(&tasks).map_err(|error| io_error("opendir", &tasks, &error))? {
        let entry = entry.map_err(|error| io_error("readdir", &tasks, &error))?;
        match read(&format!("{}/children", entry.path().display())) {
            Ok(pids) => children.extend(
                String::from_utf8_lossy(&pids)
                    .split_whitespace()
                    .filter_map(|pid| Pid::new(pid.parse().ok()?)),
            ),
            // A kernel without CONFIG_PROC_CHILDREN, or a thread that has ended meanwhile.
            Err(_) => {
                children = processes_with_parent(parent)?;
                break;
            }
        }
    }
    Ok(children
        .into_iter()
        .any(|child| is_zombie(child).is_ok_and(|is_zombie| !is_zombie)))
}

/// Returns the processes whose parent is `parent` now, zombies included, in ascending order.
///
/// A look at all of `/proc`, one process after the other, while processes come and go: those that were there
/// throughout are found. Processes of other pid namespaces, and those that `/proc` is mounted to hide, are not.
///
/// # Errors
///
/// Whatever keeps `/proc` from being listed.
pub fn processes_with_parent(parent: Pid) -> crate::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").map_err(|error| io_error("opendir", "/proc", &error))? {
        let entry = entry.map_err(|error| io_error("readdir", "/proc", &error))?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
            .and_then(Pid::new)
        else {
            continue;
        };
        // One that cannot be read is gone, or hidden from us: no child of `parent` that we could name.
        if Stat::read(&format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.parent == parent.get()) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The memory of a process, in bytes: `/proc/PID/statm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Present in memory: its own and shared pages, each page in full however many processes share it.
    pub resident_bytes: u64,
    /// The part of `resident_bytes` that belongs to files and shared memory.
    pub shared_bytes: u64,
    /// Size of the writable private mappings and the stack, present or not: what RLIMIT_DATA limits, plus the
    /// stack.
    pub data_bytes: u64,
}

impl MemoryUse {
    fn parse(statm: &[u8], page_bytes: u64) -> Option<MemoryUse> {
        let mut fields = std::str::from_utf8(statm).ok()?.split_ascii_whitespace();
        let mut bytes_at = |skip: usize| -> Option<u64> {
            fields
                .nth(skip)?
                .parse::<u64>()
                .ok()?
                .checked_mul(page_bytes)
        };
        // size, resident, shared, text, lib (always 0), data, dt (always 0)
        Some(MemoryUse {
            resident_bytes: bytes_at(1)?,
            shared_bytes: bytes_at(0)?,
            data_bytes: bytes_at(2)?,
        })
    }

    /// The part of `resident_bytes` that no file and no shared memory backs: what this process's end gives back.
    pub fn private_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.shared_bytes)
    }
}

/// Returns the memory that a process uses now. All zero for a zombie.
///
/// The kernel keeps the resident figures in counters for each processor and thread: they may be some dozens of
/// pages off.
///
/// # Errors
///
/// `ESRCH` if there is no such process.
pub fn memory_use(pid: Pid) -> crate::Result<MemoryUse> {
    let path = format!("/proc/{pid}/statm");
    let page_bytes = rustix::param::page_size() as u64;
    MemoryUse::parse(&read(&path)?, page_bytes)
        .ok_or_else(|| SysError::new("read", path, Errno::EPROTO))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: &str =
        " S 41 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 10 11 18446744073709551615 1 1\n";

    #[test]
    fn stat_parse_takes_any_name() {
        let names = [
            "cat",
            "a b",
            "x) R 1 2",
            "((",
            ")",
            ") S 1 1 1 (",
            "new\nline",
            "",
        ];
        for name in names {
            let line = format!("42 ({name}){TAIL}");
            let expected = Stat {
                state: b'S',
                parent: 41,
                flags: 4194560,
                start_time: 987654,
            };
            assert_eq!(
                Stat::parse(line.as_bytes()),
                Some(expected),
                "name {name:?}"
            );
        }
        let mut raw = b"42 (\xff\xfe)".to_vec();
        raw.extend_from_slice(TAIL.as_bytes());
        assert!(Stat::parse(&raw).is_some(), "a name need not be UTF-8");
    }

    #[test]
    fn stat_parse_refuses_what_is_cut_off() {
        let whole = format!("42 (cat){TAIL}");
        let start_time_end = whole.find("987654").unwrap() + 1;
        for cut in 0..start_time_end {
            assert_eq!(Stat::parse(&whole.as_bytes()[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn statm_parse_scales_by_page() {
        assert_eq!(
            MemoryUse::parse(b"100 20 5 3 0 40 0\n", 4096),
            Some(MemoryUse {
                resident_bytes: 81920,
                shared_bytes: 20480,
                data_bytes: 163840
            })
        );
        assert_eq!(MemoryUse::parse(b"100 20 5 3 0", 4096), None);
        assert_eq!(
            MemoryUse::parse(b"100 99999999999999999 5 3 0 40 0", 4096),
            None
        );
    }

    #[test]
    fn a_process_that_is_not_is_esrch() {
        let nobody = Pid::new(i32::MAX).unwrap();
        assert_eq!(start_time(nobody).unwrap_err().errno, Errno::ESRCH);
        assert_eq!(is_zombie(nobody).unwrap_err().errno, Errno::ESRCH);
        assert_eq!(memory_use(nobody).unwrap_err().errno, Errno::ESRCH);
        assert_eq!(processes_with_parent(nobody).unwrap(), vec![]);
    }

    #[test]
    fn this_process_is_found_under_its_parent() {
        let parent = Pid::parent().expect("a test runs under a parent in its own namespace");
        assert!(
            processes_with_parent(parent)
                .unwrap()
                .contains(&Pid::this())
        );
    }
}

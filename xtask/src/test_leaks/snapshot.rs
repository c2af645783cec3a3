//! What exists at one moment of all that can outlive a process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::cage::MARK;

/// Names of everything found, each with the kind of thing it is in front.
#[derive(Debug, Default, PartialEq)]
pub struct Snapshot {
    /// `/dev/shm`: shared memory objects, and named semaphores as `sem.NAME`.
    pub shm: BTreeSet<PathBuf>,
    /// System V IPC, as `shm 17`, `sem 3` or `msg 4`.
    pub system_v: BTreeSet<String>,
    /// Files and folders in the temporary folder.
    pub files: BTreeSet<PathBuf>,
}

impl Snapshot {
    /// Looks at `/dev/shm`, `/proc/sysvipc` and the folder `temporary`.
    pub fn take(temporary: &Path) -> Snapshot {
        let mut shm = BTreeSet::new();
        list(Path::new("/dev/shm"), &mut shm);
        let mut files = BTreeSet::new();
        list(temporary, &mut files);
        Snapshot {
            shm,
            system_v: system_v(),
            files,
        }
    }
}

/// Adds everything under `folder`; links are not followed.
fn list(folder: &Path, paths: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&path, paths);
        }
        paths.insert(path);
    }
}

fn system_v() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for kind in ["shm", "sem", "msg"] {
        let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
        for line in table.lines().skip(1) {
            let id = line.split_whitespace().nth(1).unwrap_or("?");
            found.insert(format!("{kind} {id}"));
        }
    }
    found
}

/// Which processes belong to the program that is looked at.
#[derive(Clone, Debug)]
pub enum Whose {
    /// All but process 1 and this one: the pid namespace holds nobody else.
    Everybody,
    /// Those with this value of [`MARK`] in their environment.
    Marked(String),
}

/// The processes of a program at one moment.
#[derive(Debug, Default)]
pub struct Processes {
    /// Those that live, zombies left out.
    pub living: Vec<u32>,
    /// Whether there may be more: a process that is in the middle of an `exec` shows no environment.
    pub is_unclear: bool,
}

impl Whose {
    /// Looks for them.
    pub fn processes(&self) -> Processes {
        let own = std::process::id();
        let own_start = Stat::read(own).map_or(0, |stat| stat.start_time);
        let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mut found = Processes::default();
        for pid in numbers.filter(|&pid| pid != own) {
            match self.includes(pid) {
                Some(false) => {}
                Some(true) if is_alive(pid) => found.living.push(pid),
                Some(true) => {}
                // What had none before the program began is none of its processes.
                None => {
                    found.is_unclear |= Stat::read(pid).is_some_and(|stat| {
                        stat.is_alive() && !stat.is_of_kernel() && stat.start_time >= own_start
                    });
                }
            }
        }
        found.living.sort_unstable();
        found
    }

    /// `None` if the process shows no environment.
    fn includes(&self, pid: u32) -> Option<bool> {
        match self {
            Whose::Everybody => Some(pid != 1),
            Whose::Marked(value) => {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                let wanted = format!("{MARK}={value}");
                let mut entries = environment.split(|&byte| byte == 0);
                (!environment.is_empty()).then(|| entries.any(|entry| entry == wanted.as_bytes()))
            }
        }
    }

    /// Whether a process of somebody else has `object` in `/dev/shm` mapped.
    pub fn is_mapped_by_others(&self, object: &Path) -> bool {
        let Whose::Marked(_) = self else { return false };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let object = object.to_string_lossy();
        pids.any(|pid| {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            maps.lines().any(|line| line.ends_with(&*object)) && self.includes(pid) != Some(true)
        })
    }
}

/// What `/proc/PID/stat` says; `proc(5)`.
struct Stat {
    state: char,
    flags: u64,
    /// Clock ticks since boot.
    start_time: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Stat> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; the third field follows the last one.
        let mut fields = stat.rsplit(')').next()?.split_whitespace();
        Some(Stat {
            state: fields.next()?.chars().next()?,
            flags: fields.nth(9 - 4)?.parse().ok()?,
            start_time: fields.nth(22 - 10)?.parse().ok()?,
        })
    }

    fn is_alive(&self) -> bool {
        self.state != 'Z' && self.state != 'X'
    }

    fn is_of_kernel(&self) -> bool {
        const PF_KTHREAD: u64 = 0x0020_0000;
        self.flags & PF_KTHREAD != 0
    }
}

/// Whether `pid` exists and is no zombie.
fn is_alive(pid: u32) -> bool {
    Stat::read(pid).is_some_and(|stat| stat.is_alive())
}

/// A process for people: number, command line, and the descriptors it holds.
pub fn describe_process(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = command
        .split(|&byte| byte == 0)
        .map(String::from_utf8_lossy);
    let command = words.collect::<Vec<_>>().join(" ");
    let mut descriptors = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let number = entry.file_name().to_string_lossy().into_owned();
        if let Ok(target) = fs::read_link(entry.path())
            && !matches!(number.as_str(), "0" | "1" | "2")
        {
            descriptors.push(format!("{number} {}", target.display()));
        }
    }
    let mut text = format!("process {pid}: {}", command.trim());
    if !descriptors.is_empty() {
        text += &format!(" (descriptors: {})", descriptors.join(", "));
    }
    text
}

/// What a record of kernel-persistent objects still registers: `R` lines whose object has no later `U` line.
///
/// Compares the lines as text, which is right for what netmcore writes.
pub fn registered(record: &str) -> BTreeSet<&str> {
    let mut registered = BTreeSet::new();
    for line in record.lines() {
        let line = line.trim_end_matches('\0').trim();
        match line.split_once(' ') {
            Some(("U", object)) => {
                registered.remove(object);
            }
            Some((_, object)) => {
                registered.insert(object);
            }
            None if line.is_empty() => {}
            None => {
                registered.insert(line);
            }
        }
    }
    registered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_empty_when_all_is_unregistered() {
        assert!(registered("").is_empty());
        assert!(registered("R FILE \"/a\"\nR FILE \"/a\"\nU FILE \"/a\"\n").is_empty());
        assert_eq!(
            registered("R FILE \"/a b\"\nR POSIX_SHM \"/a\"\nU POSIX_SHM \"/a\"\n").len(),
            1
        );
        assert_eq!(registered("U FILE \"/a\"\nR FILE \"/a\"").len(), 1);
        assert_eq!(registered("torn").len(), 1);
    }

    #[test]
    fn this_process_is_alive_and_nobody_is_marked() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
        let nobody = Whose::Marked("nobody".to_owned()).processes();
        assert!(nobody.living.is_empty());
    }

    #[test]
    fn process_without_environment_is_unclear() {
        let whose = Whose::Marked(format!("test-{}", std::process::id()));
        // As in the middle of an `exec`.
        let mut bare = std::process::Command::new("sleep")
            .arg("100")
            .env_clear()
            .spawn()
            .unwrap();
        let stat = Stat::read(bare.id()).unwrap();
        assert!(stat.is_alive() && !stat.is_of_kernel() && stat.start_time > 0);
        let environment = || fs::read(format!("/proc/{}/environ", bare.id())).unwrap();
        while !environment().is_empty() {
            std::thread::yield_now();
        }
        assert!(whose.processes().is_unclear);
        bare.kill().unwrap();
        bare.wait().unwrap();
    }
}

//! How much more memory may be taken before the kernel kills somebody for it.
//!
//! Shared memory that is promised by `fallocate` or populated pages is charged to the control group of the
//! process that touches it first. Beyond a group's limit the kernel kills; so large requests look here
//! first and become an error instead. It is a look, not a reservation: a race with others is lost by a death.
//!
//! **Protocol.** The least of: `MemAvailable` of the machine; for each control group from the process's own up to
//! the mount, limit − usage + what it could drop at once (`inactive_file`). Both versions of control groups.
//!
//! **Not here.** The free space of a mount: [`ShmObject`](crate::ShmObject) asks for its own.

use crate::error::SpaceLimit;
use std::fs;
use std::path::{Path, PathBuf};

/// Requests from this length on look here first. To look costs 0.1 ms, to take so much memory 3 ms and more.
pub(crate) const HEADROOM_FROM_BYTES: u64 = 16 << 20;

/// Memory that may still be taken, and what limits it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headroom {
    /// Bytes, about.
    pub bytes: u64,
    /// The tightest limit.
    pub limit: SpaceLimit,
}

/// How much more memory this process may take, as far as can be told. Reads some ten small files: 0.1 to 0.3 ms.
///
/// Without `/proc`, or with limits in none of the usual places, it is `u64::MAX`.
pub fn headroom() -> Headroom {
    let mut least = Headroom {
        bytes: available_memory().unwrap_or(u64::MAX),
        limit: SpaceLimit::Machine,
    };
    let groups = read_lossy("/proc/self/cgroup").unwrap_or_default();
    let mounts = read_lossy("/proc/self/mountinfo").unwrap_or_default();
    for chain in group_chains(&groups, &mounts) {
        for folder in chain.folders() {
            let Some(bytes) = chain.version.room_in(folder) else {
                continue;
            };
            if bytes < least.bytes {
                least = Headroom {
                    bytes,
                    limit: SpaceLimit::Cgroup(folder.to_owned()),
                };
            }
        }
    }
    least
}

fn available_memory() -> Option<u64> {
    let meminfo = read_lossy("/proc/meminfo")?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Bytes that the group in `folder` may still take; `None` if it sets no limit.
    fn room_in(self, folder: &Path) -> Option<u64> {
        let (limit, usage, inactive) = match self {
            Version::One => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            Version::Two => ("memory.max", "memory.current", "inactive_file"),
        };
        // Version 2 says "max" where there is none, version 1 a number near 2^63.
        let limit: u64 = read_lossy(folder.join(limit))?.trim().parse().ok()?;
        if limit >= 1 << 62 {
            return None;
        }
        let usage: u64 = read_lossy(folder.join(usage))?.trim().parse().ok()?;
        let stat = read_lossy(folder.join("memory.stat")).unwrap_or_default();
        let inactive = stat.lines().find_map(|line| {
            let (key, value) = line.split_once(' ')?;
            (key == inactive).then(|| value.parse::<u64>().ok())?
        });
        let in_use = usage.saturating_sub(inactive.unwrap_or(0));
        Some(limit.saturating_sub(in_use))
    }
}

/// The folders of a process's group and of those around it.
#[derive(Debug, PartialEq, Eq)]
struct GroupChain {
    version: Version,
    own: PathBuf,
    mount: PathBuf,
}

impl GroupChain {
    /// From the process's own group up to the mount.
    fn folders(&self) -> impl Iterator<Item = &Path> {
        self.own
            .ancestors()
            .take_while(|folder| folder.starts_with(&self.mount))
    }
}

/// Finds the groups that limit memory, from `/proc/self/cgroup` and `/proc/self/mountinfo` (`cgroups(7)`).
fn group_chains(groups: &str, mounts: &str) -> Vec<GroupChain> {
    let mut chains = Vec::new();
    for mount in mounts.lines().filter_map(GroupMount::parse) {
        let own = groups.lines().find_map(|line| {
            // hierarchy:controllers:path; the only group of version 2 has hierarchy 0 and no controllers.
            let mut fields = line.splitn(3, ':');
            let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let fits = match mount.version {
                Version::Two => hierarchy == "0",
                Version::One => controllers.split(',').any(|name| name == "memory"),
            };
            fits.then_some(path)
        });
        let Some(own) = own else { continue };
        // In a container the mount may show a part of the tree only; a group outside of that part is not to be seen.
        let below = Path::new(own).strip_prefix(mount.root);
        chains.push(GroupChain {
            version: mount.version,
            own: below.map_or_else(|_| mount.at.clone(), |below| mount.at.join(below)),
            mount: mount.at,
        });
    }
    chains
}

struct GroupMount<'a> {
    version: Version,
    root: &'a str,
    at: PathBuf,
}

impl GroupMount<'_> {
    /// A line like `36 35 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory`.
    fn parse(line: &str) -> Option<GroupMount<'_>> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let kind = file_system.next()?;
        let options = file_system.nth(1)?;
        let version = match kind {
            "cgroup2" => Version::Two,
            "cgroup" if options.split(',').any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        let mut mount = mount.split(' ').skip(3);
        Some(GroupMount {
            version,
            root: mount.next()?,
            at: unescape(mount.next()?),
        })
    }
}

/// Undoes the octal escapes of `/proc/self/mountinfo`, `\040` for a blank.
fn unescape(field: &str) -> PathBuf {
    let mut out = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).map(|code| u8::from_str_radix(code, 8)) {
            Some(Ok(byte)) if byte.is_ascii() => {
                out.push(byte.into());
                rest = &after[3..];
            }
            _ => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out.into()
}

fn read_lossy(path: impl AsRef<Path>) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(groups: &str, mounts: &str) -> Vec<String> {
        let chains = group_chains(groups, mounts);
        let folders = chains.iter().flat_map(GroupChain::folders);
        folders.map(|folder| folder.display().to_string()).collect()
    }

    #[test]
    fn version_2_is_followed_up_to_the_mount() {
        let mounts = "24 23 0:21 / /proc rw - proc proc rw\n\
                      31 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            folders("0::/user.slice/run-7.scope\n", mounts),
            [
                "/sys/fs/cgroup/user.slice/run-7.scope",
                "/sys/fs/cgroup/user.slice",
                "/sys/fs/cgroup"
            ]
        );
        assert_eq!(folders("0::/\n", mounts), ["/sys/fs/cgroup/"]);
    }

    #[test]
    fn version_1_uses_the_memory_hierarchy() {
        let mounts = "36 35 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      37 35 0:31 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n";
        assert_eq!(
            folders(
                "4:memory:/job/inner\n1:cpu:/\n0::/elsewhere:with:colons\n",
                mounts
            ),
            [
                "/sys/fs/cgroup/memory/job/inner",
                "/sys/fs/cgroup/memory/job",
                "/sys/fs/cgroup/memory"
            ]
        );
    }

    #[test]
    fn container_sees_its_own_part_of_the_tree() {
        let mounts = "37 35 0:31 /docker/4f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        assert_eq!(
            folders("4:memory:/docker/4f/job\n", mounts),
            ["/sys/fs/cgroup/memory/job", "/sys/fs/cgroup/memory"]
        );
        assert_eq!(
            folders("4:memory:/elsewhere\n", mounts),
            ["/sys/fs/cgroup/memory"]
        );
    }

    #[test]
    fn garbage_is_passed_over() {
        assert_eq!(
            folders("", "x - \n - cgroup2\n1 2 3 / - cgroup2 a b\n"),
            [""; 0]
        );
        assert_eq!(
            unescape(r"/a\040b\\c\999\0"),
            PathBuf::from(r"/a b\\c\999\0")
        );
    }

    #[test]
    fn room_is_limit_minus_what_cannot_be_dropped() {
        let folder = tempfile_folder();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        assert_eq!(Version::Two.room_in(&folder), None);
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        write("memory.stat", "anon 600\nfile 100\ninactive_file 50\n");
        assert_eq!(Version::Two.room_in(&folder), None);
        write("memory.max", "1000\n");
        assert_eq!(Version::Two.room_in(&folder), Some(350));
        write("memory.max", "500\n");
        assert_eq!(Version::Two.room_in(&folder), Some(0));
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.usage_in_bytes", "10\n");
        assert_eq!(Version::One.room_in(&folder), None);
        fs::remove_dir_all(folder).unwrap();
    }

    fn tempfile_folder() -> PathBuf {
        let name = format!("headroom-{}", netmcore_sys::process::random_u64());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    }

    #[test]
    fn this_machine_has_some() {
        let room = headroom();
        assert!(room.bytes > 0);
        assert!(room.bytes < 1 << 50, "{room:?}: no limit was found");
    }
}

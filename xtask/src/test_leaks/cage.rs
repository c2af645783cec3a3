//! Where a program runs so that all it leaves behind can be told from what others made.
//!
//! **Namespaces**: `unshare` makes mount, IPC and pid namespaces; bash, as process 1 in them, mounts a fresh
//! `/dev/shm` (and `/tmp`, unless the program or its folder lies there), closes every descriptor above 2, starts the
//! probe and reaps orphans, as an init does. When bash ends the kernel kills whatever is left.
//!
//! **Record**: no namespace. The program is marked by a variable in its environment, which its descendants inherit
//! whoever their parent is now; `/dev/shm` is compared before and after, and objects that an unmarked process has mapped are
//! taken for somebody else's.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Job;
use super::probe::{PROBE, Report, Scenario};

const UNSHARE: &[&str] = &[
    "--mount",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
];
const AS_ROOT_OF_ITS_OWN: &[&str] = &["--user", "--map-root-user"];

/// Descriptors above 2 are closed, so that the program starts with 0, 1 and 2 only.
const CLOSE_DESCRIPTORS: &str = r#"
for link in /proc/self/fd/*; do
    number=${link##*/}
    if [ "$number" -gt 2 ]; then eval "exec $number>&-"; fi
done
"#;

const MOUNT: &str = r#"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 125
if [ "$1" = private-tmp ]; then mount -t tmpfs -o mode=1777 tmpfs /tmp || exit 125; fi
shift
"#;

/// Not the shell's last command, so that the shell stays process 1 and reaps.
const RUN: &str = "\"$@\"\nexit $?\n";

/// What the marked processes of record mode have in their environment.
pub const MARK: &str = "NETMCORE_LEAK_RUN";

/// How to run programs so that what they leave behind is seen.
pub struct Cage {
    kind: Kind,
    /// This program: a copy, as cargo may replace the original while it builds the tests.
    probe: PathBuf,
    /// For the copy, for reports and for outputs.
    folder: PathBuf,
}

enum Kind {
    Namespace { of_user: bool },
    Record { reason: String },
}

impl Cage {
    /// Takes the `wanted` mode, or the best one that this system permits.
    pub fn find(wanted: Option<&str>, target_directory: &Path) -> Result<Cage, String> {
        let kind = match wanted {
            None => namespace().unwrap_or_else(|reason| Kind::Record { reason }),
            Some("namespace") => namespace()?,
            Some("record") => Kind::Record {
                reason: "as asked for".to_owned(),
            },
            Some(other) => return Err(format!("--mode is namespace or record, not {other}")),
        };
        let folder = target_directory.join("xtask").join(unique("leaks"));
        let probe = folder.join("probe");
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::copy("/proc/self/exe", &probe))
            .map_err(|error| format!("copying this program to {}: {error}", probe.display()))?;
        Ok(Cage {
            kind,
            probe,
            folder,
        })
    }

    /// Which mode this is, for people.
    pub fn description(&self) -> String {
        match &self.kind {
            Kind::Namespace { of_user: false } => "mode namespace (mount, IPC, pid)".to_owned(),
            Kind::Namespace { of_user: true } => {
                "mode namespace (user, mount, IPC, pid)".to_owned()
            }
            Kind::Record { reason } => format!("mode record, no namespaces: {reason}"),
        }
    }

    /// Whether nobody else can leave anything where this cage looks.
    pub fn is_private(&self) -> bool {
        matches!(self.kind, Kind::Namespace { .. })
    }

    /// Runs `job` in a fresh cage.
    pub fn run(&self, job: &Job, scenario: Scenario) -> Report {
        let files = self.folder.join(unique("run"));
        let report_file = files.with_extension("report");
        let output_file = files.with_extension("output");
        let outcome = self.run_probe(job, scenario, &report_file, &output_file);
        let mut report = match outcome {
            Ok(status) => Report::read(&report_file)
                .unwrap_or_else(|error| Report::failed(format!("{error}; its cage: {status}"))),
            Err(error) => Report::failed(error),
        };
        if !job.shows_output {
            report.output = std::fs::read(&output_file).unwrap_or_default();
        }
        report
    }

    fn run_probe(
        &self,
        job: &Job,
        scenario: Scenario,
        report_file: &Path,
        output_file: &Path,
    ) -> Result<ExitStatus, String> {
        let private_tmp = self.is_private() && self.may_hide_tmp(job);
        let temporary = if private_tmp {
            PathBuf::from("/tmp")
        } else {
            let folder = std::env::temp_dir().join(unique("nmc"));
            std::fs::create_dir(&folder)
                .map_err(|error| format!("creating {}: {error}", folder.display()))?;
            folder
        };
        let mut command = self.shell(private_tmp);
        command.arg(&self.probe).arg(PROBE);
        for argument in probe_arguments(job, scenario, report_file, &temporary, self.is_private()) {
            command.arg(argument);
        }
        command.envs(job.environment.iter().map(|(name, value)| (name, value)));
        command.current_dir(&job.folder).stdin(Stdio::null());
        if !job.shows_output {
            let file = File::create(output_file)
                .and_then(|file| Ok((file.try_clone()?, file)))
                .map_err(|error| format!("creating {}: {error}", output_file.display()))?;
            command.stdout(file.0).stderr(file.1);
        }
        // The probe has its own limits; this is for a cage that never comes to an end.
        let limit = 2 * job.time_limit + Duration::from_secs(30);
        let status = run_with_limit(&mut command, limit);
        if !private_tmp {
            // What is left in it has been reported.
            let _ = std::fs::remove_dir_all(&temporary);
        }
        status.map_err(|error| format!("running {}: {error}", job.name))
    }

    /// A command that still lacks the program to run.
    fn shell(&self, private_tmp: bool) -> Command {
        let Kind::Namespace { of_user } = self.kind else {
            let mut command = Command::new("bash");
            command.args(["-c", &format!("{CLOSE_DESCRIPTORS}{RUN}"), "bash"]);
            return command;
        };
        let mut command = unshare(of_user);
        command.args([
            "bash",
            "-c",
            &format!("{MOUNT}{CLOSE_DESCRIPTORS}{RUN}"),
            "bash",
        ]);
        command.arg(if private_tmp {
            "private-tmp"
        } else {
            "shared-tmp"
        });
        command
    }

    /// Whether nothing that `job` needs lies in `/tmp`.
    fn may_hide_tmp(&self, job: &Job) -> bool {
        let needed = [
            job.folder.as_os_str(),
            self.folder.as_os_str(),
            &job.program,
        ];
        let in_tmp = |path: &&std::ffi::OsStr| Path::new(path).starts_with("/tmp");
        let arguments = job.arguments.iter().map(OsString::as_os_str);
        !needed
            .into_iter()
            .chain(arguments)
            .any(|path| in_tmp(&path))
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        // Build output: what cannot be removed now goes with `cargo clean`.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn probe_arguments(
    job: &Job,
    scenario: Scenario,
    report_file: &Path,
    temporary: &Path,
    private: bool,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![
        "--report".into(),
        report_file.into(),
        "--temporary".into(),
        temporary.into(),
        "--limit-ms".into(),
        job.time_limit.as_millis().to_string().into(),
    ];
    if !private {
        arguments.extend(["--mark".into(), unique("mark").into()]);
    }
    if job.takes_socket_directory {
        arguments.push("--socket-directory".into());
    }
    if let Scenario::KillMaster { after } = scenario {
        arguments.extend([
            "--kill-after-us".into(),
            after.as_micros().to_string().into(),
        ]);
    }
    arguments.push("--".into());
    arguments.push(job.program.clone());
    arguments.extend(job.arguments.iter().cloned());
    arguments
}

/// Finds out whether namespaces can be had, as root or as root of a user namespace.
fn namespace() -> Result<Kind, String> {
    let mut reasons = Vec::new();
    for of_user in [false, true] {
        let trial = unshare(of_user)
            .args([
                "bash",
                "-c",
                &format!("{MOUNT}{RUN}"),
                "bash",
                "private-tmp",
                "true",
            ])
            .stdin(Stdio::null())
            .output();
        match trial {
            Ok(output) if output.status.success() => return Ok(Kind::Namespace { of_user }),
            Ok(output) => {
                reasons.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
            }
            Err(error) => return Err(format!("running unshare (util-linux): {error}")),
        }
    }
    Err(reasons.join("; "))
}

fn unshare(of_user: bool) -> Command {
    let mut command = Command::new("unshare");
    if of_user {
        command.args(AS_ROOT_OF_ITS_OWN);
    }
    command.args(UNSHARE).arg("--");
    command
}

/// Runs `command` and kills it when `limit` has passed.
pub fn run_with_limit(command: &mut Command, limit: Duration) -> std::io::Result<ExitStatus> {
    let start = Instant::now();
    let mut child = command.spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > limit {
            child.kill()?;
            return child.wait();
        }
        // sleep: paces the polling of a child; its end is seen at the next turn whenever it comes.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A name that no other call of this function, here or in another process, returns.
fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = clock.map_or(0, |since| since.as_nanos() as u64);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{:x}-{nanoseconds:x}-{count}", std::process::id())
}

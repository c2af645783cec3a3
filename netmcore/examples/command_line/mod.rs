//! The command line of the examples: long options in any order, and the socket directory they all take.

#![allow(dead_code, clippy::print_stdout, reason = "no example uses all of it")]

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::Permissions;
use std::io;
use std::ops::RangeBounds;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use netmcore::sys::signal::{SIGINT, SIGTERM, SignalSet, block};

/// The arguments that nobody has taken yet.
pub struct CommandLine {
    left: Vec<OsString>,
    /// What stood behind `--`: never options.
    verbatim: Vec<OsString>,
}

/// What the user typed is not what the program takes.
#[derive(Debug)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for UsageError {}

/// The whole `main` of an example whose name is the second word of its usage: prints the usage if asked to, has `take` take
/// the options, and calls `job` with them and the socket directory.
pub fn run<O>(
    usage: &str,
    take: impl FnOnce(&mut CommandLine) -> Result<O, UsageError>,
    job: impl FnOnce(&Path, O) -> Result<(), Box<dyn Error>>,
) -> ExitCode {
    let name = usage.split_whitespace().nth(1).unwrap_or("example");
    let mut line = CommandLine::of_this_program();
    if line.flag("--help") {
        print!("{usage}");
        return ExitCode::SUCCESS;
    }
    let parsed = line.socket_directory().and_then(|directory| {
        let options = take(&mut line)?;
        line.nothing_left()?;
        Ok((directory, options))
    });
    let (directory, options) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            eprintln!("{name}: {error}; try --help");
            return ExitCode::from(2);
        }
    };
    match directory.with(|directory| job(directory, options)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{name}: the fresh socket directory: {error}");
            ExitCode::FAILURE
        }
    }
}

impl CommandLine {
    /// The arguments of this program, without its name.
    pub fn of_this_program() -> CommandLine {
        let mut left: Vec<OsString> = std::env::args_os().skip(1).collect();
        let verbatim = match left.iter().position(|argument| argument == "--") {
            Some(at) => left.split_off(at).split_off(1),
            None => Vec::new(),
        };
        CommandLine { left, verbatim }
    }

    /// Takes a flag such as `--help`: was it there?
    pub fn flag(&mut self, name: &str) -> bool {
        let before = self.left.len();
        self.left.retain(|argument| argument != name);
        self.left.len() != before
    }

    /// Takes `NAME VALUE` or `NAME=VALUE`; of several the last one counts.
    pub fn value(&mut self, name: &str) -> Result<Option<OsString>, UsageError> {
        let mut found = None;
        let mut at = 0;
        while at < self.left.len() {
            let behind_name = self.left[at].as_bytes().strip_prefix(name.as_bytes());
            match behind_name {
                Some([]) if at + 1 < self.left.len() => {
                    found = self.left.drain(at..at + 2).next_back();
                }
                Some([]) => return Err(UsageError(format!("{name} wants a value"))),
                Some([b'=', value @ ..]) => {
                    found = Some(OsString::from_vec(value.to_vec()));
                    self.left.remove(at);
                }
                _ => at += 1,
            }
        }
        Ok(found)
    }

    /// Takes an option whose value is a number in `range`.
    pub fn number<N: FromStr + PartialOrd>(
        &mut self,
        name: &str,
        range: impl RangeBounds<N> + fmt::Debug,
    ) -> Result<Option<N>, UsageError> {
        let Some(value) = self.value(name)? else {
            return Ok(None);
        };
        match value.to_str().and_then(|text| text.parse().ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(_) => Err(UsageError(format!(
                "{name} is {}, and must be in {range:?}",
                value.display()
            ))),
            None => Err(UsageError(format!(
                "{name} wants a number, not {}",
                value.display()
            ))),
        }
    }

    /// Ends the parsing: what is left are operands, such as file names.
    pub fn operands(self) -> Result<Vec<OsString>, UsageError> {
        let is_option =
            |argument: &&OsString| argument.as_bytes().starts_with(b"-") && argument.len() > 1;
        if let Some(unknown) = self.left.iter().find(is_option) {
            return Err(UsageError(format!(
                "there is no option {}",
                unknown.display()
            )));
        }
        Ok(self.left.into_iter().chain(self.verbatim).collect())
    }

    /// Ends the parsing of a program that takes no operands.
    pub fn nothing_left(self) -> Result<(), UsageError> {
        match self.operands()?.first() {
            None => Ok(()),
            Some(operand) => Err(UsageError(format!("cannot use {} here", operand.display()))),
        }
    }

    /// Takes `--socket-directory DIR`.
    pub fn socket_directory(&mut self) -> Result<SocketDirectory, UsageError> {
        Ok(SocketDirectory {
            given: self.value("--socket-directory")?.map(PathBuf::from),
        })
    }
}

/// Where the master keeps its record and its socket.
pub struct SocketDirectory {
    given: Option<PathBuf>,
}

impl SocketDirectory {
    /// Calls `job` with the directory: the one that was given, which stays, or a fresh one, which is removed afterwards.
    ///
    /// A program that is to clean up what an earlier run of it left behind (because it was killed, say) gives the same
    /// directory at each start.
    pub fn with<T>(&self, job: impl FnOnce(&Path) -> T) -> io::Result<T> {
        match &self.given {
            Some(directory) => Ok(job(directory)),
            None => {
                let name: &OsStr = "netmcore-".as_ref();
                // Blocked, an interrupt waits for the run, ends that, and lets this process remove the directory.
                block(&SignalSet::empty().with(SIGINT).with(SIGTERM))?;
                let ours_alone = Permissions::from_mode(0o700);
                let fresh = tempfile::Builder::new()
                    .prefix(name)
                    .permissions(ours_alone)
                    .tempdir()?;
                let result = job(fresh.path());
                fresh.close()?;
                Ok(result)
            }
        }
    }
}

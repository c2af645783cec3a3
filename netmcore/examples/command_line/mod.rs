//! The command line of the examples: long options in any order, and the socket directory they all take.

#![allow(dead_code, reason = "no example uses all of it")]

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
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

impl std::error::Error for UsageError {}

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

    /// Takes an option whose value is a number.
    pub fn number<N: FromStr>(&mut self, name: &str) -> Result<Option<N>, UsageError> {
        self.value(name)?
            .map(|value| {
                value
                    .to_str()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| {
                        UsageError(format!("{name} wants a number, not {}", value.display()))
                    })
            })
            .transpose()
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
                let fresh = tempfile::Builder::new().prefix(name).tempdir()?; // mode 0700
                let result = job(fresh.path());
                fresh.close()?;
                Ok(result)
            }
        }
    }
}

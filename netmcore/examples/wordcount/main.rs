//! Counts the words of texts with many processes.
//!
//! Shows the shape of most jobs: a first process cuts the work into shares, keeps one process running for each of a
//! few of them, takes the results in the order in which they come, and returns the sum. The program itself is the
//! master: it computes nothing, so a process that fails costs an error message and not the program.
//!
//! Run it with `cargo run --release --example wordcount`; `-- --help` tells the options. What a word is: see `words.rs`.

mod words;

#[path = "../command_line/mod.rs"]
mod command_line;

use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::time::Instant;

use netmcore::prelude::*;

use command_line::{CommandLine, SocketDirectory, UsageError};
use words::{Counts, Share};

const USAGE: &str = "\
Usage: wordcount [OPTIONS] [FILE]...

Counts the words of all FILEs together (default: the Jargon File, which comes with this example), each share of them
in a process of its own, and prints the most frequent ones.

A word is a longest run of the ASCII letters, upper and lower case being the same. These tools count alike:
  LC_ALL=C tr -cs A-Za-z '\\n' < FILE | tr A-Z a-z | grep . | sort | uniq -c | sort -k1,1nr -k2

Options:
  --top N                 how many words to print (default 10; 0: all)
  --processes N           how many processes at a time (default: one for each processor)
  --share-bytes N         size of a share (default: so that there are eight for each of the processes)
  --check                 count again in this process alone, and fail if that makes a difference
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

/// The text that is counted when no file is given: see `text/SOURCE.md`.
const TEXT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/examples/wordcount/text/jargon.txt"
);

/// Shares are neither so small that starting a process costs more than counting, nor so large that the bar stands still.
const SHARE_BYTES: std::ops::RangeInclusive<u64> = 64 * 1024..=64 * 1024 * 1024;

struct Options {
    files: Vec<OsString>,
    top: usize,
    processes: usize,
    share_bytes: Option<u64>,
    check: bool,
    socket_directory: SocketDirectory,
}

fn main() -> ExitCode {
    let mut command_line = CommandLine::of_this_program();
    if command_line.flag("--help") {
        return print(USAGE);
    }
    let options = match Options::take(command_line) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("wordcount: {error}; try --help");
            return ExitCode::from(2);
        }
    };
    match wordcount(&options) {
        Ok(report) => print(&report),
        Err(error) => {
            eprintln!("wordcount: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn take(mut line: CommandLine) -> Result<Options, UsageError> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Options {
            top: line.number("--top", ..)?.unwrap_or(10),
            processes: line.number("--processes", 1..)?.unwrap_or(processors),
            share_bytes: line.number("--share-bytes", 1..)?,
            check: line.flag("--check"),
            socket_directory: line.socket_directory()?,
            files: match line.operands()? {
                none if none.is_empty() => vec![TEXT.into()],
                files => files,
            },
        })
    }
}

/// Counts, and returns what is to be printed.
fn wordcount(options: &Options) -> Result<String, Box<dyn Error>> {
    let start = Instant::now();
    let (files, shares) = open_and_cut(options)?;
    let share_count = shares.len();
    let counts = options.socket_directory.with(|directory| {
        // The files are open already: every worker has them, because it is a fork of this process.
        let files: Vec<File> = files
            .iter()
            .map(File::try_clone)
            .collect::<io::Result<_>>()?;
        count_by_processes(directory, files, shares, options.processes)
    })??;
    let elapsed = start.elapsed();

    let mut report = String::new();
    let table = words::sorted(&counts);
    let shown = if options.top == 0 {
        table.len()
    } else {
        options.top.min(table.len())
    };
    for (word, count) in &table[..shown] {
        report += &format!("{count:>7} {word}\n");
    }
    let total: u64 = counts.values().sum();
    report += &format!("\n{total} words, {} different ones\n", table.len());
    report += &format!(
        "{share_count} processes, {} at a time: {:.3} s\n",
        options.processes,
        elapsed.as_secs_f64()
    );

    if options.check {
        let start = Instant::now();
        let mut expected = Counts::new();
        for file in &files {
            words::add(
                &mut expected,
                words::count(file, 0..file.metadata()?.len())?,
            );
        }
        let elapsed = start.elapsed();
        if counts != expected {
            return Err("this process alone counts differently".into());
        }
        report += &format!(
            "this process alone counts the same: {:.3} s\n",
            elapsed.as_secs_f64()
        );
    }
    Ok(report)
}

fn open_and_cut(options: &Options) -> Result<(Vec<File>, Vec<Share>), Box<dyn Error>> {
    let name_of = |index: usize| options.files[index].display();
    let mut files = Vec::new();
    let mut lens_bytes = Vec::new();
    for (index, name) in options.files.iter().enumerate() {
        let opened = File::open(name).and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) =
            opened.map_err(|error| format!("cannot open {}: {error}", name_of(index)))?;
        if !metadata.is_file() {
            return Err(format!(
                "{} is not a regular file: it cannot be cut into shares",
                name_of(index)
            )
            .into());
        }
        lens_bytes.push(metadata.len());
        files.push(file);
    }
    let share_bytes = options.share_bytes.unwrap_or_else(|| {
        let share_bytes = lens_bytes.iter().sum::<u64>() / (8 * options.processes as u64);
        share_bytes.clamp(*SHARE_BYTES.start(), *SHARE_BYTES.end())
    });
    let mut shares = Vec::new();
    for (index, (file, &len_bytes)) in files.iter().zip(&lens_bytes).enumerate() {
        let cut = words::cut(index, file, len_bytes, share_bytes);
        shares.extend(cut.map_err(|error| format!("cannot read {}: {error}", name_of(index)))?);
    }
    Ok((files, shares))
}

/// The job: becomes the master, and returns what the first process returns.
fn count_by_processes(
    directory: &Path,
    files: Vec<File>,
    shares: Vec<Share>,
    at_a_time: usize,
) -> Result<Counts, Box<dyn Error>> {
    let mut master = Master::builder(directory);

    // One share in one process. What fails in an orderly way is a value like any other.
    let count = master.def_process(move |share: Share| -> Result<Counts, String> {
        words::count(&files[share.file], share.range).map_err(|error| error.to_string())
    });

    // The first process: hands out the shares and adds up.
    let total = master.def_process(move |()| -> Result<Counts, String> {
        let bar = netmcore::progress::bytes(shares.iter().map(Share::len_bytes).sum());
        let mut counts = Counts::new();
        let mut waiting = shares.iter();
        let mut running: Vec<Running<_>> = Vec::new();
        let mut share_of: HashMap<ProcessId, &Share> = HashMap::new();
        loop {
            for share in waiting.by_ref().take(at_a_time - running.len()) {
                let process = count.start(share).map_err(|error| error.to_string())?;
                share_of.insert(process.id(), share);
                running.push(process);
            }
            if running.is_empty() {
                break;
            }
            let (index, result) = join_any(&running);
            let process = running.swap_remove(index);
            let share = share_of[&process.id()];
            // The process may have failed (the outer result), or what it did (the inner one).
            let of_share = result
                .map_err(|error| error.to_string())
                .and_then(|returned| returned)
                .map_err(|error| {
                    format!("bytes {:?} of file {}: {error}", share.range, share.file)
                })?;
            words::add(&mut counts, of_share);
            bar.inc(share.len_bytes());
        }
        bar.finish_and_clear();
        Ok(counts)
    });

    Ok(master.run(&total, &())??)
}

/// Prints to standard output; a reader that has gone away (`| head`) is no failure.
fn print(text: &str) -> ExitCode {
    let mut stdout = BufWriter::new(io::stdout().lock());
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("wordcount: cannot print: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

//! The workspace's own commands, `cargo xtask COMMAND`.
//!
//! | command | says |
//! | --- | --- |
//! | `ci [STEP…]` | everything that must hold before a change lands ([`ci`]) |
//! | `tidy` | the rules that neither rustc nor clippy knows ([`tidy`]) |
//! | `test-leaks [-- PROGRAM ARGS…]` | what a program leaves behind ([`test_leaks`]) |
//! | `torture` | whether the random tests find anything, given time ([`torture`]) |
//! | `bench [FILTER]` | how fast it is, without crash points ([`mod@bench`]) |
//!
//! **Not here**: anything that a crate's own tests can show.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "printing is what these commands do")]

use std::process::ExitCode;

mod bench;
mod ci;
mod random;
mod source;
mod test_leaks;
mod tidy;
mod torture;
mod workspace;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  ci [--keep-going] [STEP…]
                   all steps, or the named ones; `ci --list` lists them
  tidy             the rules that neither rustc nor clippy knows
  test-leaks [--seed N] [--rounds N] [--mode namespace|record] [--jobs N] [--only TEXT]
                   every test and example: what does it leave behind?
  test-leaks [--mode …] [--kill-master] -- PROGRAM ARGS…
                   the same for a program of your own
  torture [--seconds N] [--seed S] [--jobs N] [--kills N] [--only TEXT] [--no-stops] [--every-test]
                   the random tests, again and again, with new seeds
  bench [-p PACKAGE] [--bench NAME] [-- FILTER…]
                   all benchmarks, or those of a package, without crash points";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("", &[][..]),
    };
    let outcome = match command {
        "ci" => ci::run(rest),
        "tidy" => tidy::run(rest),
        "test-leaks" => test_leaks::run(rest),
        "torture" => torture::run(rest),
        "bench" => bench::run(rest),
        test_leaks::PROBE => test_leaks::run_probe(rest),
        "" | "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        unknown => Err(format!("no such command: {unknown}\n\n{USAGE}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            if !message.is_empty() {
                eprintln!("xtask: {message}");
            }
            ExitCode::FAILURE
        }
    }
}

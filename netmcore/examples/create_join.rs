//! Starts ten processes from a process, and joins them: the sum of the squares of 1 to 10.
//!
//! The program becomes the master. It starts the first process, `sum`, which starts one process `square` for each number
//! and adds up their results; all eleven are children of the master, whoever asked for them.
//!
//! Run it with `cargo run --example create_join`.

#![allow(clippy::print_stdout)]

mod command_line;

use std::process::ExitCode;

use netmcore::prelude::*;

const USAGE: &str = "\
Usage: create_join [OPTIONS]

Starts ten processes from a process and adds up the squares that they return.

Options:
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |_| Ok(()),
        |directory, ()| {
            println!("Final result: {}", sum_of_squares(directory)?);
            Ok(())
        },
    )
}

fn sum_of_squares(directory: &Path) -> netmcore::Result<u64> {
    let mut master = Master::builder(directory);

    let square = master.def_process(|number: u64| {
        println!("the square of {number} is {}", number * number);
        number * number
    });

    // A failure in here is a panic of this process; `run` returns it as an error, message and all.
    let sum = master.def_process(move |upto: u64| -> u64 {
        let running: Vec<_> = (1..=upto)
            .map(|number| square.start(&number).unwrap())
            .collect();
        running
            .into_iter()
            .map(|process| process.join().unwrap())
            .sum()
    });

    master.run(&sum, &10)
}

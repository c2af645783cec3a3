//! Counts the ways to place N queens on a board of N × N so that none attacks another, up to symmetry, for N = 1 to 12.
//!
//! Each process searches the boards with the first queen in one column, and puts every solution into a hash map that all share, in the
//! form that stands for its eight rotations and reflections. So the map ends up with one entry for each solution up to symmetry, whoever found it
//! first, and the counters in it add up to the number of all solutions.
//!
//! Run it with `cargo run --release --example nqueens`; `-- --processes 1` uses one core.

#![allow(clippy::print_stdout)]

mod command_line;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use netmcore::prelude::*;

const USAGE: &str = "\
Usage: nqueens [OPTIONS]

Counts the solutions of the N queens problem up to symmetry, in a hash map that all processes share.

Options:
  --max N                 count for boards of 1 × 1 to N × N (default 12, at most 14)
  --processes N           how many processes at a time (default: one for each processor)
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

/// A board: for each row the column of its queen, four bits each.
type Board = u64;

/// How many solutions look like each board when turned and mirrored.
type Boards = ShmArc<ShmHashMap<Board, AtomicU64>>;

const LARGEST: usize = 14;

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |line| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            let max = line.number("--max", 1..=LARGEST)?.unwrap_or(12);
            let processes = line.number("--processes", 1..)?.unwrap_or(processors);
            Ok((max, processes))
        },
        |directory, (max, processes)| Ok(nqueens(directory, max, processes)?),
    )
}

fn nqueens(directory: &Path, max: usize, at_a_time: usize) -> netmcore::Result<()> {
    let mut master = Master::builder(directory);

    let search = master.def_process(|(size, column, boards): (usize, usize, Boards)| {
        let mut columns = vec![column];
        place(size, &mut columns, &mut |solution| {
            boards.add(standard_form(solution), 1).unwrap();
        });
    });

    let all = master.def_process(move |()| {
        for size in 1..=max {
            let start = Instant::now();
            let heap = netmcore::shared_heap().unwrap();
            let boards: Boards = ShmArc::new_in(&heap, ShmHashMap::new_in(&heap).unwrap()).unwrap();
            let mut running: Vec<Running<()>> = Vec::new();
            for column in 0..size {
                if running.len() == at_a_time {
                    finish_one(&mut running);
                }
                running.push(search.start(&(size, column, boards.clone())).unwrap());
            }
            while !running.is_empty() {
                finish_one(&mut running);
            }
            let found: u64 = boards
                .values()
                .map(|count| count.load(Ordering::Relaxed))
                .sum();
            println!(
                "{size:>2} queens: {:>5} solutions up to symmetry, {found:>6} in all, {:.3} s",
                boards.len(),
                start.elapsed().as_secs_f64()
            );
        }
    });

    master.run(&all, &())
}

fn finish_one(running: &mut Vec<Running<()>>) {
    let (index, result) = join_any(running);
    running.swap_remove(index);
    result.unwrap();
}

/// Places queens in the rows that have none, in all ways, and calls `found` with each board that is full.
fn place(size: usize, columns: &mut Vec<usize>, found: &mut impl FnMut(&[usize])) {
    let row = columns.len();
    if row == size {
        found(columns);
        return;
    }
    for column in 0..size {
        let attacked = columns
            .iter()
            .enumerate()
            .any(|(above, &other)| other == column || other.abs_diff(column) == row - above);
        if !attacked {
            columns.push(column);
            place(size, columns, found);
            columns.pop();
        }
    }
}

/// The smallest of the eight boards that come of this one by turning and mirroring.
fn standard_form(columns: &[usize]) -> Board {
    let last = columns.len() - 1;
    let queens = || columns.iter().copied().enumerate();
    let board = |place: &dyn Fn(usize, usize) -> (usize, usize)| {
        queens().fold(0, |board, (row, column)| {
            let (row, column) = place(row, column);
            board | (column as Board) << (4 * row)
        })
    };
    [
        board(&|row, column| (row, column)),
        board(&|row, column| (row, last - column)),
        board(&|row, column| (last - row, column)),
        board(&|row, column| (last - row, last - column)),
        board(&|row, column| (column, row)),
        board(&|row, column| (column, last - row)),
        board(&|row, column| (last - column, row)),
        board(&|row, column| (last - column, last - row)),
    ]
    .into_iter()
    .fold(Board::MAX, Board::min)
}

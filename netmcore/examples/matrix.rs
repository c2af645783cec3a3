//! Multiplies two matrices that lie in shared memory, block by block, by many processes, and compares the product with a serial one.
//!
//! Each process claims one block of the product for writing, so no two write to the same, and the compiler lets nobody write elsewhere. Both factors are
//! read by all. What is sent to a process is three descriptors and two ranges, whatever the size of the matrices.
//!
//! Run it with `cargo run --release --example matrix`; `-- --size 1000` for a larger one.

#![allow(clippy::print_stdout)]

mod command_line;

use std::ops::Range;
use std::process::ExitCode;

use netmcore::prelude::*;

const USAGE: &str = "\
Usage: matrix [OPTIONS]

Multiplies two square matrices in shared memory by blocks, and checks the product against a serial one.

Options:
  --size N                rows and columns of the matrices (default 384)
  --block N               rows and columns of a block (default 128)
  --processes N           how many processes at a time (default: one for each processor)
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

type Matrix = ShmArc<ShmMatrix<f64>>;
type Block = (Range<usize>, Range<usize>);

#[derive(Clone, Copy)]
struct Sizes {
    size: usize,
    block: usize,
    processes: usize,
}

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |line| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            Ok(Sizes {
                size: line.number("--size", 1..)?.unwrap_or(384),
                block: line.number("--block", 1..)?.unwrap_or(128),
                processes: line.number("--processes", 1..)?.unwrap_or(processors),
            })
        },
        |directory, sizes| {
            let worst = multiply(directory, sizes)?;
            if worst > 1e-9 {
                return Err(format!("the serial product differs by {worst}").into());
            }
            println!("the serial product is the same");
            Ok(())
        },
    )
}

/// Multiplies, and returns the largest difference to the serial product, in relation to the size of the elements.
fn multiply(directory: &Path, sizes: Sizes) -> netmcore::Result<f64> {
    let mut master = Master::builder(directory);

    let multiply_block = master.def_process(
        |(left, right, product, (rows, columns)): (Matrix, Matrix, Matrix, Block)| {
            let left = left.read_rows(rows.clone()).unwrap();
            let right = right.read_block(.., columns.clone()).unwrap();
            let mut product = product.claim_block(rows, columns).unwrap();
            for (row, into) in product.rows_mut().enumerate() {
                for (&factor, others) in left.row(row).iter().zip(right.rows()) {
                    for (sum, &other) in into.iter_mut().zip(others) {
                        *sum += factor * other;
                    }
                }
            }
        },
    );

    let all = master.def_process(move |()| -> f64 {
        let Sizes { size, block, .. } = sizes;
        let heap = netmcore::shared_heap().unwrap();
        let make = |element: fn(usize, usize) -> f64| {
            let matrix = ShmMatrix::init_in(&heap, (size, size), element).unwrap();
            ShmArc::new_in(&heap, matrix).unwrap()
        };
        let left = make(|row, column| ((row * 7 + column * 3) % 11) as f64 - 5.0);
        let right = make(|row, column| 1.0 / (1 + row + column) as f64);
        let product = make(|_, _| 0.0);

        let start = Instant::now();
        let cut = |at: usize| at..size.min(at + block);
        let blocks = (0..size)
            .step_by(block)
            .flat_map(|row| (0..size).step_by(block).map(move |column| (row, column)));
        let mut running: Vec<Running<()>> = Vec::new();
        let mut block_count = 0;
        for (row, column) in blocks {
            if running.len() == sizes.processes {
                let (index, result) = join_any(&running);
                running.swap_remove(index);
                result.unwrap();
            }
            let argument = (
                left.clone(),
                right.clone(),
                product.clone(),
                (cut(row), cut(column)),
            );
            running.push(multiply_block.start(&argument).unwrap());
            block_count += 1;
        }
        for process in running {
            process.join().unwrap();
        }
        println!(
            "{size} × {size} in {block_count} blocks, {} processes at a time: {:.3} s",
            sizes.processes,
            start.elapsed().as_secs_f64()
        );

        let start = Instant::now();
        let worst = difference(&left, &right, &product);
        println!("serial: {:.3} s", start.elapsed().as_secs_f64());
        worst
    });

    master.run(&all, &())
}

/// How far the product is from the one that this process alone makes.
fn difference(left: &Matrix, right: &Matrix, product: &Matrix) -> f64 {
    let [left, right, product] = [left, right, product].map(|matrix| matrix.read_rows(..).unwrap());
    let (rows, columns) = product.dim();
    let mut worst = 0.0_f64;
    for row in 0..rows {
        let mut expected = vec![0.0; columns];
        for (&factor, others) in left.row(row).iter().zip(right.rows()) {
            for (sum, &other) in expected.iter_mut().zip(others) {
                *sum += factor * other;
            }
        }
        for (found, expected) in product.row(row).iter().zip(expected) {
            worst = worst.max((found - expected).abs() / expected.abs().max(1.0));
        }
    }
    worst
}

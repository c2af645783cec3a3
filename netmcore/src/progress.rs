//! Progress bars for processes that wait for others (feature `progress`).
//!
//! The bars are [indicatif]'s. They are drawn by the process that calls [`bytes`] or [`count`], on standard error, and only if that is
//! a terminal. No thread is started.

use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

use crate::{JoinError, Running, join_any};

/// A bar for work that is measured in bytes.
///
/// `bar.inc(len_bytes)` moves it; `bar.finish_and_clear()` removes it.
///
/// ```
/// let bar = netmcore::progress::bytes(4096);
/// bar.inc(1024);
/// assert_eq!(bar.position(), 1024);
/// bar.finish_and_clear();
/// ```
pub fn bytes(len_bytes: u64) -> ProgressBar {
    bar(
        len_bytes,
        "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    )
}

/// A bar for work that is measured in processes.
///
/// ```
/// let bar = netmcore::progress::count(10);
/// bar.inc(1);
/// assert_eq!(bar.length(), Some(10));
/// ```
pub fn count(process_count: u64) -> ProgressBar {
    bar(process_count, "{wide_bar} {pos}/{len} {eta}")
}

/// Joins processes in the order in which they end, and moves `bar` by one at each. The results are in the order of `running`.
///
/// # Blocking
///
/// Until the last of them has ended.
///
/// ```rust,standalone_crate
/// use netmcore::prelude::*;
/// use netmcore::progress;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// let mut master = Master::builder(dir);
/// let square = master.def_process(|k: u64| k * k);
/// let squares = master.def_process(move |upto: u64| {
///     let running: Vec<_> = (1..=upto).map(|k| square.start(&k).unwrap()).collect();
///     let results = progress::join_all(&running, &progress::count(upto));
///     results.into_iter().map(Result::unwrap).collect::<Vec<u64>>()
/// });
/// assert_eq!(master.run(&squares, &3)?, [1, 4, 9]);
/// # Ok(())
/// # }
/// ```
pub fn join_all<R: DeserializeOwned>(
    running: &[Running<R>],
    bar: &ProgressBar,
) -> Vec<Result<R, JoinError>> {
    let mut results: Vec<Option<Result<R, JoinError>>> = running.iter().map(|_| None).collect();
    let mut waiting: Vec<(usize, Running<R>)> = running.iter().copied().enumerate().collect();
    while !waiting.is_empty() {
        let handles: Vec<Running<R>> = waiting.iter().map(|&(_, process)| process).collect();
        let (position, result) = join_any(&handles);
        let (index, _) = waiting.swap_remove(position);
        results[index] = Some(result);
        bar.inc(1);
    }
    results.into_iter().flatten().collect()
}

fn bar(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is right");
    ProgressBar::new(len).with_style(style)
}

//! Progress bars for processes that wait for others (feature `progress`).
//!
//! The bars are [indicatif]'s. They are drawn by the process that calls [`bytes`] or [`count`], on standard error, and only if that is
//! a terminal. No thread is started.

use indicatif::{ProgressBar, ProgressStyle};

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

fn bar(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is right");
    ProgressBar::new(len).with_style(style)
}

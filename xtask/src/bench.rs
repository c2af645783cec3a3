//! `cargo xtask bench`: the benchmarks, of the code as users build it.
//!
//! A plain `cargo bench` compiles the crash points in, as tests want them and cargo merges the features of both. Here a `--cfg` leaves them
//! out (`netmcore_sys::crash`).

use crate::workspace::{Workspace, cargo};

/// What `crash_point!` looks for.
const WITHOUT_CRASH_POINTS: &str = "--cfg netmcore_measured";

/// The command; what it is given goes on to `cargo bench`.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let workspace = Workspace::read()?;
    let mut command = cargo(&workspace.root);
    command.arg("bench");
    let are_chosen = |by: &str| arguments.iter().any(|argument| argument == by);
    if !are_chosen("-p") {
        command.arg("--workspace");
    }
    if !are_chosen("--bench") {
        command.arg("--benches");
    }
    let status = command
        .args(arguments)
        .env("RUSTFLAGS", WITHOUT_CRASH_POINTS)
        .status();
    let status = status.map_err(|error| format!("running cargo bench: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo bench: {status}"))
    }
}

//! `cargo xtask ci`: everything that must hold before a change lands.
//!
//! **Steps** run in the order of [`STEPS`]; the first that fails ends the run, unless `--keep-going` is said.
//! Whatever happens, the last lines are a table of times, the sum of all test results in cargo's format, and the
//! same as `N passed, N failed, N skipped`.
//!
//! **Target folders**: all steps share one. Tests, doc tests and scratch packages use the dev profile and the same
//! builds of the dependencies; clippy and the feature sets share their check artefacts; only the examples are built
//! in release.
//!
//! **Not here**: installing anything. `.ci/run` does.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::workspace::{Package, Workspace, array, cargo, cargo_metadata, string};
use crate::{test_leaks, tidy};

mod counts;
mod example;
mod features;
mod readme;

use counts::Counts;

/// What the steps share.
struct Context {
    workspace: Workspace,
    counts: Counts,
}

/// How long one `cargo test` may take in CI, building included.
const TESTS_LIMIT: Duration = Duration::from_secs(40 * 60);

type Step = fn(&mut Context) -> Result<(), String>;

const STEPS: &[(&str, Step)] = &[
    ("fmt", fmt),
    ("clippy", clippy),
    ("tidy", |_| tidy::run(&[])),
    ("tests", tests),
    ("doc-tests", doc_tests),
    ("loom", loom),
    ("docs", docs),
    ("examples", example::all_in_release),
    ("test-leaks", |_| test_leaks::run(&[])),
    ("features", features::powerset),
    ("single-crates", features::single_crates),
    ("readmes", readme::all),
    ("msrv", msrv),
    ("deny", deny),
];

/// The command.
pub fn run(arguments: &[String]) -> Result<(), String> {
    if arguments.iter().any(|argument| argument == "--list") {
        for (name, _) in STEPS {
            println!("{name}");
        }
        return Ok(());
    }
    let keep_going = arguments.iter().any(|argument| argument == "--keep-going");
    let steps: Vec<&String> = arguments
        .iter()
        .filter(|argument| *argument != "--keep-going")
        .collect();
    for argument in &steps {
        if !STEPS.iter().any(|(name, _)| name == argument) {
            return Err(format!("no such step: {argument}; `ci --list` lists them"));
        }
    }
    let chosen = |name: &str| steps.is_empty() || steps.iter().any(|step| *step == name);
    let mut context = Context {
        workspace: Workspace::read()?,
        counts: Counts::default(),
    };
    let start = Instant::now();
    let mut table = Vec::new();
    let mut failures = Vec::new();
    for (name, step) in STEPS.iter().filter(|(name, _)| chosen(name)) {
        if !failures.is_empty() && !keep_going {
            table.push(format!("{:>8}  {name}: not run", ""));
            continue;
        }
        println!("\n=== {name}");
        let began = Instant::now();
        let outcome = step(&mut context);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        table.push(format!(
            "{:>7.1}s  {name}: {word}",
            began.elapsed().as_secs_f64()
        ));
        if let Err(message) = outcome {
            eprintln!("xtask: step {name} failed: {message}");
            failures.push(format!("step {name} failed: {message}"));
        }
    }
    println!("\n=== summary");
    for line in table {
        println!("{line}");
    }
    println!("{:>7.1}s  in all", start.elapsed().as_secs_f64());
    for failure in &failures {
        println!("xtask: {failure}");
    }
    let counts = context.counts;
    println!(
        "\n{}\n",
        counts.as_cargo_test(failures.is_empty(), start.elapsed())
    );
    println!("{counts}");
    // The message has been printed; these counts are to stay the last line.
    if failures.is_empty() {
        Ok(())
    } else {
        Err(String::new())
    }
}

fn fmt(context: &mut Context) -> Result<(), String> {
    let mut command = cargo(&context.workspace.root);
    check(command.args(["fmt", "--all", "--check"]))
}

fn clippy(context: &mut Context) -> Result<(), String> {
    for features in [&[][..], &["--all-features"]] {
        let mut command = cargo(&context.workspace.root);
        command
            .args(["clippy", "--workspace", "--all-targets"])
            .args(features);
        check(command.args(["--", "-D", "warnings", "-D", "clippy::incompatible_msrv"]))?;
    }
    Ok(())
}

fn tests(context: &mut Context) -> Result<(), String> {
    // The tests of the examples run them as programs. (`cargo test --examples` would build them as tests.)
    let mut examples = cargo(&context.workspace.root);
    check(examples.args(["build", "--workspace", "--examples"]))?;
    let mut command = cargo(&context.workspace.root);
    command.args(["test", "--workspace", "--lib", "--bins", "--tests"]);
    command.arg("--no-fail-fast");
    count_tests(&mut command, &mut context.counts)
}

fn doc_tests(context: &mut Context) -> Result<(), String> {
    let mut command = cargo(&context.workspace.root);
    command.args(["test", "--workspace", "--doc", "--no-fail-fast"]);
    count_tests(&mut command, &mut context.counts)
}

/// Test files called `loom….rs`, of whatever crate has any, are compiled once more, with loom's atomics instead of std's.
fn loom(context: &mut Context) -> Result<(), String> {
    let mut failures = Vec::new();
    let mut found = false;
    for package in &context.workspace.packages {
        let programs = loom_tests(package);
        if programs.is_empty() {
            continue;
        }
        found = true;
        let mut command = cargo(&context.workspace.root);
        command.args(["test", "--release", "--no-fail-fast", "-p", &package.name]);
        for program in programs {
            command.args(["--test", program]);
        }
        command.env("RUSTFLAGS", "--cfg loom");
        if std::env::var_os("LOOM_MAX_PREEMPTIONS").is_none() {
            command.env("LOOM_MAX_PREEMPTIONS", "3");
        }
        // The models of one crate say nothing of those of another.
        failures.extend(count_tests(&mut command, &mut context.counts).err());
    }
    if !found {
        println!("no test file is called loom….rs");
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

/// The test programs of a package that are models.
fn loom_tests(package: &Package) -> Vec<&str> {
    let tests = package
        .targets
        .iter()
        .filter(|target| target.kind == "test");
    let names = tests.map(|target| target.name.as_str());
    names.filter(|name| name.starts_with("loom")).collect()
}

fn docs(context: &mut Context) -> Result<(), String> {
    let mut command = cargo(&context.workspace.root);
    command.args(["doc", "--workspace", "--no-deps", "--all-features"]);
    check(command.env("RUSTDOCFLAGS", "-Dwarnings"))
}

/// Checks with the oldest supported toolchain if it is installed; otherwise at least what the dependencies ask for.
fn msrv(context: &mut Context) -> Result<(), String> {
    let root = &context.workspace.root;
    // Without the filter cargo downloads what other systems need.
    let metadata = cargo_metadata(root, &["--locked", "--filter-platform", &host()?])?;
    let packages = array(&metadata["packages"]);
    let ours = packages
        .iter()
        .find(|package| package["name"] == "netmcore");
    let wanted = string(&ours.ok_or("the workspace has no netmcore")?["rust_version"]);
    let toolchains = Command::new("rustup").args(["toolchain", "list"]).output();
    let toolchains = toolchains.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let toolchains = toolchains.unwrap_or_default();
    if toolchains.lines().any(|line| line.starts_with(&wanted)) {
        let toolchain = format!("+{wanted}");
        let mut command = cargo(root);
        return check(command.args([&toolchain, "check", "--workspace", "--all-targets"]));
    }
    println!("no check with Rust {wanted}: that toolchain is not installed");
    println!(
        "instead: clippy::incompatible_msrv was denied, and no dependency may want a newer one"
    );
    let too_new: Vec<String> = packages
        .iter()
        .filter(|package| version(&string(&package["rust_version"])) > version(&wanted))
        .map(|package| format!("{} wants {}", package["name"], package["rust_version"]))
        .collect();
    println!("{} packages looked at", packages.len());
    if too_new.is_empty() {
        Ok(())
    } else {
        Err(too_new.join(", "))
    }
}

/// The platform that rustc builds for.
fn host() -> Result<String, String> {
    let output = Command::new("rustc").arg("-vV").output();
    let output = output.map_err(|error| format!("running rustc: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned)
        .ok_or_else(|| "rustc -vV names no host".to_owned())
}

/// The numbers of a version, so that 1.9 comes before 1.88 and 1.88.0 is the same; none for an empty text.
fn version(text: &str) -> Vec<u32> {
    let text = text.strip_suffix(".0").unwrap_or(text);
    text.split('.')
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// Licences, sources and duplicates; advisories need a database from the network and are looked at by hand.
fn deny(context: &mut Context) -> Result<(), String> {
    let installed = Command::new("cargo-deny").arg("--version").output();
    if installed.is_err() {
        println!("not run: cargo-deny is not installed");
        return Ok(());
    }
    let mut command = cargo(&context.workspace.root);
    check(command.args(["deny", "--offline", "check", "bans", "licenses", "sources"]))
}

/// Runs a command to its end; an error if it fails.
fn check(command: &mut Command) -> Result<(), String> {
    announce(command);
    let status = command.status();
    let status = status.map_err(|error| format!("running {}: {error}", shown(command)))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{}: {status}", shown(command)))
    }
}

/// Runs a `cargo test`, passes its output on and adds its results to `counts`.
fn count_tests(command: &mut Command, counts: &mut Counts) -> Result<(), String> {
    announce(command);
    // A process group of its own does not hear the terminal's Ctrl-C, so people get no time limit.
    let mut limited = within(TESTS_LIMIT, command);
    let running = if std::env::var_os("CI").is_some() {
        &mut limited
    } else {
        &mut *command
    };
    let failed = |error| format!("running cargo test: {error}");
    let mut child = running.stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut here = Counts::default();
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // Tests may print anything, so lines are bytes.
        while output.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            here.add_line(&text);
            line.clear();
        }
    }
    let status = child.wait().map_err(failed)?;
    counts.add(&here);
    if !status.success() {
        return Err(format!("{}: {status}, {here}", shown(command)));
    }
    if here.failed > 0 {
        return Err(format!(
            "{} ended well and reported failures: {here}",
            shown(command)
        ));
    }
    Ok(())
}

/// `command` under `timeout`, which kills it with all its process group when `limit` has passed.
fn within(limit: Duration, command: &Command) -> Command {
    let mut limited = Command::new("timeout");
    limited.args(["--kill-after=5", &limit.as_secs().to_string()]);
    limited.arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        limited.current_dir(folder);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited.stdin(Stdio::null());
    limited
}

fn announce(command: &Command) {
    println!("$ {}", shown(command));
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(
        command
            .get_args()
            .map(|argument| argument.to_string_lossy()),
    );
    words.join(" ")
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(version("1.9") < version("1.88"));
        assert!(version("1.88.1") > version("1.88"));
        assert!(version("1.88.0") == version("1.88"));
        assert!(version("") < version("1.0"));
    }

    #[test]
    fn models_of_every_crate_are_found() {
        let workspace = Workspace::read().unwrap();
        let found = |package| loom_tests(workspace.package(package).unwrap());
        for program in ["loom", "loom_locks", "loom_permits"] {
            assert!(found("netmcore-sem").contains(&program), "{program}");
        }
        for program in ["loom_cell", "loom_queues"] {
            assert!(found("netmcore-shm").contains(&program), "{program}");
        }
        assert!(found("netmcore-sys").is_empty());
    }

    #[test]
    fn failing_command_fails_its_step() {
        assert_eq!(check(&mut shell("exit 0")), Ok(()));
        assert!(check(&mut shell("exit 1")).is_err());
        assert!(check(&mut Command::new("/nonexistent/program")).is_err());
    }

    #[test]
    fn endless_command_fails_its_step() {
        let second = Duration::from_secs(1);
        assert!(check(&mut within(second, &shell("sleep 1000"))).is_err());
    }

    #[test]
    fn failed_test_fails_its_step_and_is_counted() {
        let mut counts = Counts::default();
        let one_failed = "echo 'test result: FAILED. 2 passed; 1 failed; 0 ignored'";
        assert!(count_tests(&mut shell(&format!("{one_failed}; exit 101")), &mut counts).is_err());
        assert_eq!((counts.passed, counts.failed), (2, 1));
        assert!(count_tests(&mut shell(one_failed), &mut counts).is_err());
        assert_eq!((counts.passed, counts.failed), (4, 2));
        let all_passed = "printf '\\377\\n'; echo 'test result: ok. 3 passed; 0 failed; 1 ignored'";
        assert_eq!(count_tests(&mut shell(all_passed), &mut counts), Ok(()));
        assert_eq!((counts.passed, counts.failed, counts.skipped), (7, 2, 1));
    }
}

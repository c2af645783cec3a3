//! Guards against a runner that reports what did not happen: each way for a test to end is produced in an
//! inner run of this program, and the outer tests check what the inner run says.

use netmcore_forktest::Test;
use std::process::{Command, exit};
use std::time::{Duration, Instant};

const INNER: &str = "FORKTEST_INNER";

fn main() {
    if std::env::var_os(INNER).is_some() {
        netmcore_forktest::run(&[
            test("passes", || {}),
            test("panics", || panic!("the message")),
            test("exits", || exit(3)),
            test("aborts", || std::process::abort()),
            test("skips", || netmcore_forktest::skip("not on this machine")),
            test("hangs", || {
                loop {
                    std::thread::park();
                }
            }),
            test("leaves_a_child", || {
                #[allow(clippy::zombie_processes, reason = "left on purpose")]
                let child = Command::new("sleep").arg("1000").spawn().unwrap();
                eprintln!("child {}", child.id());
                panic!("shows the output");
            }),
            test("ignores_nothing_from_the_terminal", || {
                let status = std::fs::read_to_string("/proc/self/status").unwrap();
                let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
                let ignored = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
                // SIGHUP, SIGINT and SIGQUIT.
                assert_eq!(ignored & 0b111, 0, "{status}");
            }),
            test("has_one_thread", || {
                assert_eq!(std::fs::read_dir("/proc/self/task").unwrap().count(), 1);
            }),
        ]);
        return;
    }
    netmcore_forktest::run(&[
        test("success_is_reported", success_is_reported),
        test("failures_are_reported", failures_are_reported),
        test("skipped_counts_as_ignored", skipped_counts_as_ignored),
        test("hanging_test_is_killed", hanging_test_is_killed),
        test("children_left_are_killed", children_left_are_killed),
        test("terminal_is_heeded", terminal_is_heeded),
        test("filters_select", filters_select),
        test("no_capture_shows_output", no_capture_shows_output),
    ]);
}

fn test(name: &'static str, run: fn()) -> Test {
    Test { name, run }
}

fn inner(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments);
    outcome(command)
}

fn outcome(mut command: Command) -> (Option<i32>, String) {
    let output = command
        .env(INNER, "1")
        .env("FORKTEST_TIME_LIMIT_SECONDS", "1")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    eprintln!("{text}");
    (output.status.code(), text)
}

fn success_is_reported() {
    let (code, text) = inner(&["passes", "has_one_thread"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("\nrunning 2 tests\n"));
    assert!(text.contains("\ntest passes ... ok\n"));
    assert!(text.contains(
        "\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in "
    ));
}

fn failures_are_reported() {
    let (code, text) = inner(&["panics", "exits", "aborts"]);
    assert_eq!(code, Some(101));
    for expected in [
        "test panics ... FAILED",
        "the message",
        "panics panicked",
        "exits exited with code 3",
        "aborts was killed by signal 6",
        "test result: FAILED. 0 passed; 3 failed;",
    ] {
        assert!(text.contains(expected), "{expected}");
    }
}

fn skipped_counts_as_ignored() {
    let (code, text) = inner(&["skips"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("test skips ... ignored, not on this machine\n"));
    assert!(text.contains("0 passed; 0 failed; 1 ignored;"));
}

fn hanging_test_is_killed() {
    let start = Instant::now();
    let (code, text) = inner(&["hangs"]);
    assert_eq!(code, Some(101));
    assert!(text.contains("hangs was killed after 1 s"));
    assert!(start.elapsed() < Duration::from_secs(30));
}

fn children_left_are_killed() {
    let (_, text) = inner(&["leaves_a_child"]);
    let line = text.lines().find_map(|line| line.strip_prefix("child "));
    let process_id: u32 = line.unwrap().parse().unwrap();
    let limit = Instant::now() + Duration::from_secs(30);
    // SIGKILL is delivered when it is sent; the process may be seen until its new parent has reaped it.
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            break;
        }
        assert!(Instant::now() < limit, "{stat}");
        // sleep: between two looks at the condition, not instead of it.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// As when a shell has put the run into the background, or `nohup` has started it.
fn terminal_is_heeded() {
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP INT QUIT; exec \"$0\" \"$@\""]);
    shell.arg(std::env::current_exe().unwrap());
    shell.arg("ignores_nothing_from_the_terminal");
    let (code, text) = outcome(shell);
    assert_eq!(code, Some(0), "{text}");
}

fn filters_select() {
    let (_, text) = inner(&["--list", "--format", "terse", "--exact", "exits", "ski"]);
    assert_eq!(text, "exits: test\n");
    let (_, text) = inner(&["--list", "--skip", "s", "--skip=other"]);
    assert_eq!(text, "\n0 tests, 0 benchmarks\n");
    let (code, text) = inner(&["--ignored"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("running 0 tests"));
}

fn no_capture_shows_output() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["panics", "--nocapture", "--test-threads=1"])
        .env(INNER, "1")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("the message"));
}

//! Guards against a `test-leaks` that sees nothing: every kind of leak is planted once and must be reported.

use std::process::{Command, Output};

/// Runs `cargo xtask test-leaks OPTIONS -- sh -c SCRIPT`.
fn test_leaks(options: &[&str], script: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("test-leaks")
        .args(options)
        // The word behind the script is its $0; what test-leaks adds follows as $1 and so on.
        .args(["--", "sh", "-c", script, "sh"])
        .output()
        .expect("xtask runs")
}

#[track_caller]
fn assert_clean(options: &[&str], script: &str) {
    let output = test_leaks(options, script);
    assert!(output.status.success(), "{output:#?}");
    assert!(
        stdout(&output).contains(" 0 leaked, 0 failed"),
        "{output:#?}"
    );
}

#[track_caller]
fn assert_leaks(options: &[&str], script: &str, expected: &str) {
    let output = test_leaks(options, script);
    assert!(!output.status.success(), "{output:#?}");
    let text = stdout(&output);
    let mut reported = text.lines().filter(|line| line.contains("left behind: "));
    assert!(reported.any(|line| line.contains(expected)), "{output:#?}");
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const RECORD: &[&str] = &["--mode", "record"];
const KILL_MASTER: &[&str] = &["--kill-master", "--rounds", "2", "--seed", "7"];

#[test]
fn clean_program_is_clean() {
    for options in [&[][..], RECORD] {
        assert_clean(
            options,
            "echo > /dev/shm/xtask-clean.$$ && rm /dev/shm/xtask-clean.$$ &&
             echo > $TMPDIR/x && rm $TMPDIR/x && sleep 0.1 & wait",
        );
    }
}

#[test]
fn shm_object_is_found() {
    assert_leaks(&[], "echo > /dev/shm/planted", "/dev/shm/planted (1 bytes)");
}

#[test]
fn shm_object_is_found_without_namespaces() {
    let name = format!("/dev/shm/xtask-planted-{}", std::process::id());
    let output = test_leaks(RECORD, &format!("echo > {name}"));
    let _ = std::fs::remove_file(&name);
    assert!(!output.status.success(), "{output:#?}");
    assert!(
        stdout(&output).contains(&format!("left behind: {name}")),
        "{output:#?}"
    );
}

#[test]
fn named_semaphore_is_found() {
    assert_leaks(&[], "echo > /dev/shm/sem.planted", "/dev/shm/sem.planted");
}

#[test]
fn system_v_object_is_found() {
    assert_leaks(&[], "ipcmk --shmem 4096", "System V shm");
}

#[test]
fn temporary_file_is_found() {
    for options in [&[][..], RECORD] {
        assert_leaks(
            options,
            "mkdir $TMPDIR/folder && echo > $TMPDIR/folder/planted",
            "/folder/planted",
        );
    }
}

#[test]
fn process_is_found() {
    for options in [&[][..], RECORD] {
        assert_leaks(options, "sleep 100 &", "sleep 100");
    }
}

#[test]
fn process_that_left_its_session_is_found() {
    for options in [&[][..], RECORD] {
        assert_leaks(options, "setsid sleep 101 &", "sleep 101");
    }
}

#[test]
fn failing_program_is_a_failure() {
    let output = test_leaks(&[], "exit 3");
    assert!(!output.status.success(), "{output:#?}");
    assert!(stdout(&output).contains("exit status: 3"), "{output:#?}");
}

#[test]
fn missing_program_is_a_failure() {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["test-leaks", "--", "/nonexistent/program"])
        .output()
        .expect("xtask runs");
    assert!(!output.status.success(), "{output:#?}");
}

#[test]
fn program_starts_with_three_descriptors() {
    // The fourth one is what ls reads the folder with.
    assert_clean(&[], "test \"$(ls /proc/self/fd | wc -l)\" -eq 4");
}

/// A master in shell: records its object, creates it, works, cleans up; a second start cleans up after the first.
const MASTER: &str = "
    mkdir -p $2; touch $2/netplex.lock
    rm -f /dev/shm/master-object
    echo \"R POSIX_SHM /master-object\" >> $2/netplex.pmanage
    echo > /dev/shm/master-object
    sleep 0.3
    rm /dev/shm/master-object
    echo \"U POSIX_SHM /master-object\" >> $2/netplex.pmanage";

/// `MASTER` without its processes: the shell's `sleep` does not die with the shell, so the shell itself reads.
fn master_without_children() -> String {
    MASTER.replace("sleep 0.3", "read -t 0.3 <> <(:) || :")
}

#[test]
fn killed_master_that_recovers_is_clean() {
    let script = master_without_children();
    let output = test_leaks_bash(KILL_MASTER, &script);
    assert!(output.status.success(), "{output:#?}");
    assert!(
        stdout(&output).contains("3 runs, 0 leaked, 0 failed"),
        "{output:#?}"
    );
}

#[test]
fn killed_master_that_does_not_recover_is_found() {
    // Each start has an object of its own, and none looks after those of the last one. It has it for so long that a
    // kill at a tenth of its life, as the seed gives, finds it also on a loaded machine.
    let script = master_without_children()
        .replace("master-object", "object.$$")
        .replace("-t 0.3", "-t 3");
    let output = test_leaks_bash(KILL_MASTER, &script);
    assert!(!output.status.success(), "{output:#?}");
    let text = stdout(&output);
    assert!(
        text.contains("left behind: /dev/shm/object."),
        "{output:#?}"
    );
    assert!(text.contains("still names POSIX_SHM"), "{output:#?}");
}

#[test]
fn orphan_of_a_killed_master_is_found() {
    let script = MASTER.replace("sleep 0.3", "sleep 2");
    let output = test_leaks_bash(KILL_MASTER, &script);
    assert!(!output.status.success(), "{output:#?}");
    let text = stdout(&output);
    assert!(
        text.contains("alive 1s after the kill of its main process"),
        "{output:#?}"
    );
}

/// Like [`test_leaks`], with bash, whose `read` has a time limit.
fn test_leaks_bash(options: &[&str], script: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("test-leaks")
        .args(options)
        .args(["--", "bash", "-c", script, "bash"])
        .output()
        .expect("xtask runs")
}

//! Guards against a workspace that its own rules refuse.

use std::process::Command;

#[test]
fn workspace_is_tidy() {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("tidy")
        .output()
        .expect("xtask runs");
    let findings = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{findings}");
}

#[test]
fn tidy_refuses_what_it_does_not_know() {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["tidy", "everything"])
        .output()
        .expect("xtask runs");
    assert!(!output.status.success());
}

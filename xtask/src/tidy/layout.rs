//! Rules about where files lie and what they are called.

use crate::tidy::Finding;
use crate::workspace::Workspace;

/// Names that say nothing about a file's subject.
const WITHOUT_SUBJECT: &[&str] = &[
    "util", "utils", "common", "helper", "helpers", "misc", "types",
];

/// What lies beside the root manifest: exactly this.
pub const TOP_LEVEL: &[&str] = &[
    ".cargo/",
    ".ci/",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "deny.toml",
    "netmcore-pmanage/",
    "netmcore-proc/",
    "netmcore-sem/",
    "netmcore-shm/",
    "netmcore-sys/",
    "netmcore/",
    "rustfmt.toml",
    "xtask/",
];

/// No source file or folder is named after nothing.
pub fn file_names(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        for source in &package.sources {
            let inside = source
                .path
                .strip_prefix(&package.folder)
                .unwrap_or(&source.path);
            for part in inside.iter().filter_map(|part| part.to_str()) {
                let name = part.strip_suffix(".rs").unwrap_or(part);
                if WITHOUT_SUBJECT.contains(&name) {
                    findings.push(Finding::in_file(
                        &source.path,
                        format!("{name} names no subject"),
                    ));
                }
            }
        }
    }
    findings
}

/// The top level holds [`TOP_LEVEL`] and nothing else.
pub fn top_level(workspace: &Workspace) -> Vec<Finding> {
    let found = &workspace.top_level;
    let extra = found
        .iter()
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()))
        .map(|name| Finding::in_file(name, "has no place at the top level"));
    let missing = TOP_LEVEL
        .iter()
        .filter(|name| !found.iter().any(|found| found == *name))
        .map(|name| Finding::in_file(name, "is missing at the top level"));
    extra.chain(missing).collect()
}

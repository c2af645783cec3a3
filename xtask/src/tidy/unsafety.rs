//! Rules about `unsafe`: where it may stand, and what must stand beside it.

use crate::source::words;
use crate::tidy::Finding;
use crate::workspace::Workspace;

/// Packages whose libraries and programs forbid it altogether.
const FORBIDDING: &[&str] = &["netmcore-pmanage", "netmcore", "xtask"];

/// The crate roots of [`FORBIDDING`] say so.
pub fn forbidden(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        if !FORBIDDING.contains(&package.name.as_str()) {
            continue;
        }
        for source in &package.sources {
            if package.is_crate_root(&source.path)
                && !source.has_inner_lint("forbid", "unsafe_code")
            {
                findings.push(Finding::in_file(
                    &source.path,
                    "does not say `#![forbid(unsafe_code)]`",
                ));
            }
        }
    }
    findings
}

/// `unsafe` stands only in module files that allow it for themselves under a `# Safety` paragraph.
pub fn modules(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        let src = package.folder.join("src");
        let mut files = package
            .sources
            .iter()
            .filter(|file| file.path.starts_with(&src));
        let has_modules = files.nth(1).is_some();
        for source in &package.sources {
            // What a file that forbids it says of it is what it writes for others: a derive.
            if source.has_inner_lint("forbid", "unsafe_code") {
                continue;
            }
            let first = words(&source.code, "unsafe").next();
            let allows = source.has_inner_lint("allow", "unsafe_code");
            let mut find = |message| findings.push(Finding::in_file(&source.path, message));
            if source.has_outer_lint("allow", "unsafe_code") {
                find("allows unsafe code for one item: a module file allows it for itself");
            }
            if allows && has_modules && package.is_crate_root(&source.path) {
                find("allows unsafe code for the whole crate: a module file allows it for itself");
            }
            if allows && first.is_none() {
                find("allows unsafe code and has none");
            }
            if allows && !has_safety_paragraph(&source.comments) {
                find("allows unsafe code and has no `# Safety` paragraph in its module docs");
            }
            if let Some(offset) = first
                && !allows
            {
                let message = "unsafe in a file that does not say `#![allow(unsafe_code)]`";
                findings.push(Finding::at(source, offset, message));
            }
        }
    }
    findings
}

fn has_safety_paragraph(comments: &str) -> bool {
    comments.lines().any(|line| {
        let line = line.trim();
        let heading = line.strip_prefix("//!").unwrap_or("").trim();
        heading.starts_with('#') && heading.trim_start_matches('#').trim() == "Safety"
    })
}

/// Every unsafe block and unsafe impl has its `// SAFETY:` comment, also where clippy does not look: in macros.
pub fn comments(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in workspace.packages.iter().flat_map(|p| &p.sources) {
        for offset in words(&source.code, "unsafe") {
            let next = source.code[offset + "unsafe".len()..].trim_start();
            let needs_one = next.starts_with('{') || next.starts_with("impl");
            if needs_one && !source.comment_above(offset, "// SAFETY:") {
                findings.push(Finding::at(
                    source,
                    offset,
                    "unsafe without a `// SAFETY:` comment",
                ));
            }
        }
    }
    findings
}

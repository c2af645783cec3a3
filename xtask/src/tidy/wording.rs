//! Rules about what the sources say: names kept to one place, no placeholders, explained sleeps, crash points.

use std::collections::BTreeMap;
use std::path::Path;

use crate::source::{Source, words};
use crate::tidy::Finding;
use crate::workspace::{Package, Workspace};

/// A crate's name and the package, and if need be the file, that alone may say it.
const CONFINED: &[(&str, &str, Option<&str>)] = &[
    ("libc", "netmcore-sys", None),
    ("rustix", "netmcore-sys", None),
    ("fs2", "netmcore-sys", Some("netmcore-sys/src/file_lock.rs")),
    (
        "bincode",
        "netmcore-proc",
        Some("netmcore-proc/src/codec.rs"),
    ),
];

/// The names in [`CONFINED`] are said in their place only.
pub fn confined_names(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (package, source) in sources(workspace) {
        for (name, owner, file) in CONFINED {
            let at_home =
                package.name == *owner && file.is_none_or(|file| source.path == Path::new(file));
            let first = words(&source.code, name).next();
            if let Some(offset) = first
                && !at_home
            {
                let place = file.unwrap_or(owner);
                findings.push(Finding::at(
                    source,
                    offset,
                    format!("only {place} names {name}"),
                ));
            }
        }
    }
    findings
}

/// Nothing is left to be written, and no test or doc test is switched off.
pub fn placeholders(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (_, source) in sources(workspace) {
        for name in ["todo", "unimplemented"] {
            for offset in words(&source.code, name) {
                if source.code[offset + name.len()..].starts_with('!') {
                    findings.push(Finding::at(source, offset, format!("{name}! is left")));
                }
            }
        }
        for offset in words(&source.code, "ignore") {
            if is_in_attribute(&source.code, offset) {
                findings.push(Finding::at(source, offset, "a test is switched off"));
            }
        }
        for (offset, _) in source.comments.match_indices("```ignore") {
            findings.push(Finding::at(source, offset, "a doc test is switched off"));
        }
    }
    findings
}

/// Whether an attribute `#[ignore…` or `#[cfg_attr(…` opens before `offset` on the same line.
fn is_in_attribute(code: &str, offset: usize) -> bool {
    let line = code[..offset]
        .rsplit('\n')
        .next()
        .unwrap_or("")
        .trim_start();
    line == "#[" || line.starts_with("#[cfg_attr(")
}

/// Every sleep says why it hides no race.
pub fn sleeps(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (_, source) in sources(workspace) {
        for offset in words(&source.code, "sleep") {
            let of_thread = source.code[..offset].ends_with("thread::");
            if of_thread && !source.comment_above(offset, "// sleep:") {
                let message =
                    "thread::sleep without a `// sleep:` comment that says why it hides no race";
                findings.push(Finding::at(source, offset, message));
            }
        }
    }
    findings
}

/// Crash points in `src` are called `crate.file.step`, each name once.
pub fn crash_points(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for (package, source) in sources(workspace) {
        if !source.path.starts_with(package.folder.join("src")) {
            continue;
        }
        for offset in words(&source.code, "crash_point") {
            let after = offset + "crash_point".len();
            let Some(argument) = source.code[after..].strip_prefix("!(") else {
                continue;
            };
            let argument = after + 2 + (argument.len() - argument.trim_start().len());
            let message = match literal(&source.text[argument..]) {
                None => Some("a crash point's name is a string literal".to_owned()),
                Some(name) => {
                    let place = format!("{}:{}", source.path.display(), source.line(offset));
                    let earlier = seen.insert(name.to_owned(), place);
                    let earlier = earlier.map(|at| format!("crash point {name} is also at {at}"));
                    misnamed(package, source, name).or(earlier)
                }
            };
            findings.extend(message.map(|message| Finding::at(source, offset, message)));
        }
    }
    findings
}

fn literal(text: &str) -> Option<&str> {
    let inside = text.strip_prefix('"')?;
    Some(&inside[..inside.find('"')?])
}

/// The file's part may also be the folder of the module that the file is a piece of.
fn misnamed(package: &Package, source: &Source, name: &str) -> Option<String> {
    let crate_part = package
        .name
        .strip_prefix("netmcore-")
        .unwrap_or(&package.name)
        .replace('-', "_");
    let src = package.folder.join("src");
    let inside = source.path.strip_prefix(src).unwrap_or(&source.path);
    let folders = inside.parent().into_iter().flat_map(Path::iter);
    let mut files = folders
        .filter_map(|folder| folder.to_str())
        .chain([source.stem()]);
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let is_step = |step: &str| !step.is_empty() && step.chars().all(valid);
    let named_well = files.any(|file| {
        name.strip_prefix(&format!("{crate_part}.{file}."))
            .is_some_and(is_step)
    });
    (!named_well).then(|| {
        let stem = source.stem();
        format!("crash point {name} is not called {crate_part}.{stem}.step")
    })
}

fn sources(workspace: &Workspace) -> impl Iterator<Item = (&Package, &Source)> {
    let packages = workspace.packages.iter();
    packages.flat_map(|package| package.sources.iter().map(move |source| (package, source)))
}

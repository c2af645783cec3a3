//! Rules about manifests: which crate may know which, and that every declared dependency is used.

use crate::source::words;
use crate::tidy::Finding;
use crate::workspace::{Dependency, DependencyKind, Package, Workspace};

/// The crates of this workspace with the crates that each may depend on. A package in another's folder, such as a
/// derive, needs no line: its owner may use it, and in tests it may use its owner.
const EDGES: &[(&str, &[&str])] = &[
    ("netmcore-sys", &[]),
    ("netmcore-forktest", &[]),
    ("netmcore-pmanage", &["netmcore-sys"]),
    ("netmcore-sem", &["netmcore-sys"]),
    ("netmcore-shm", &["netmcore-sem", "netmcore-sys"]),
    (
        "netmcore-proc",
        &[
            "netmcore-shm",
            "netmcore-sem",
            "netmcore-pmanage",
            "netmcore-sys",
        ],
    ),
    (
        "netmcore",
        &[
            "netmcore-proc",
            "netmcore-shm",
            "netmcore-sem",
            "netmcore-pmanage",
            "netmcore-sys",
        ],
    ),
    ("xtask", &[]),
];

/// What the tests of any crate but xtask may depend on besides.
const EDGES_OF_TESTS: &[&str] = &["netmcore-forktest", "netmcore-sys"];

/// Libraries that only one package may declare.
const CONFINED: &[(&str, &str)] = &[
    ("libc", "netmcore-sys"),
    ("rustix", "netmcore-sys"),
    ("memmap2", "netmcore-sys"),
    ("fs2", "netmcore-sys"),
    ("bincode", "netmcore-proc"),
];

/// No edge between our crates but the drawn ones.
pub fn edges(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        let manifest = package.folder.join("Cargo.toml");
        let drawn = EDGES.iter().find(|(name, _)| *name == package.name);
        if drawn.is_none() && owner(workspace, package).is_none() {
            findings.push(Finding::in_file(
                &manifest,
                format!(
                    "{} is not in the crate graph of xtask/src/tidy/manifest.rs",
                    package.name
                ),
            ));
            continue;
        }
        for dependency in &package.dependencies {
            let Some(target) = workspace.package(&dependency.package) else {
                continue;
            };
            if !edge_is_drawn(workspace, package, dependency, target) {
                findings.push(Finding::in_file(
                    &manifest,
                    format!("no edge {} → {} is drawn", package.name, target.name),
                ));
            } else if dependency.kind != DependencyKind::Dev
                && dependency
                    .features
                    .iter()
                    .any(|feature| feature == "crash-points")
            {
                findings.push(Finding::in_file(
                    &manifest,
                    "crash points are for tests only",
                ));
            }
        }
    }
    findings
}

fn edge_is_drawn(
    workspace: &Workspace,
    from: &Package,
    dependency: &Dependency,
    to: &Package,
) -> bool {
    let in_tests = dependency.kind == DependencyKind::Dev;
    let owned = owner(workspace, to).is_some_and(|owner| owner.name == from.name);
    let owner_in_tests =
        in_tests && owner(workspace, from).is_some_and(|owner| owner.name == to.name);
    let drawn = EDGES
        .iter()
        .any(|(name, targets)| *name == from.name && targets.contains(&to.name.as_str()));
    let drawn_for_tests =
        in_tests && from.name != "xtask" && EDGES_OF_TESTS.contains(&to.name.as_str());
    // A crate may ask itself for a feature that its tests and examples need.
    let itself = in_tests && from.name == to.name;
    owned || owner_in_tests || drawn || drawn_for_tests || itself
}

/// The package in whose folder an undrawn `package` lies.
fn owner<'a>(workspace: &'a Workspace, package: &Package) -> Option<&'a Package> {
    if EDGES.iter().any(|(name, _)| *name == package.name) {
        return None;
    }
    workspace
        .packages
        .iter()
        .find(|other| other.folder != package.folder && package.folder.starts_with(&other.folder))
}

/// Libraries that only one crate may declare are declared there only.
pub fn confined_dependencies(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        for dependency in &package.dependencies {
            let confined = CONFINED
                .iter()
                .find(|(name, _)| *name == dependency.package);
            if let Some((name, owner)) = confined
                && *owner != package.name
            {
                findings.push(Finding::in_file(
                    package.folder.join("Cargo.toml"),
                    format!("only {owner} depends on {name}"),
                ));
            }
        }
    }
    findings
}

/// Every declared dependency is named: a normal one in `src`, one for tests anywhere, doc tests included, one for
/// the build script there.
pub fn unused_dependencies(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &workspace.packages {
        for dependency in &package.dependencies {
            if !is_used(package, dependency) {
                findings.push(Finding::in_file(
                    package.folder.join("Cargo.toml"),
                    format!("{} is declared and not used", dependency.package),
                ));
            }
        }
    }
    findings
}

fn is_used(package: &Package, dependency: &Dependency) -> bool {
    let name = dependency.crate_name.as_str();
    let names = |text: &str| words(text, name).next().is_some();
    let script = package.folder.join("build.rs");
    match dependency.kind {
        DependencyKind::Normal => {
            let src = package.folder.join("src");
            let mut sources = package.sources.iter();
            sources.any(|source| source.path.starts_with(&src) && names(&source.code))
        }
        DependencyKind::Build => {
            let mut sources = package.sources.iter();
            sources.any(|source| source.path == script && names(&source.code))
        }
        DependencyKind::Dev => {
            // Declared for the sake of a feature: the normal declaration, or the crate itself, answers for its use.
            let itself = dependency.package == package.name;
            let normal = package.dependencies.iter().any(|other| {
                other.kind == DependencyKind::Normal && other.package == dependency.package
            });
            let mut sources = package.sources.iter();
            normal
                || itself
                || sources.any(|source| names(&source.code) || names(&source.comments))
                || package.readme.as_deref().is_some_and(names)
        }
    }
}

/// Every line of `[workspace.dependencies]` is used by a member.
pub fn unused_in_workspace(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, text) in section(&workspace.manifest, "[workspace.dependencies]") {
        let Some((name, _)) = text.split_once('=') else {
            continue;
        };
        let name = name.trim();
        let mut declared = workspace.packages.iter().flat_map(|p| &p.dependencies);
        let member = workspace.package(name).is_some();
        if !member && !declared.any(|dependency| dependency.package == name) {
            findings.push(Finding {
                line: Some(line),
                ..Finding::in_file("Cargo.toml", format!("no member depends on {name}"))
            });
        }
    }
    findings
}

/// Every member takes the lints of the workspace.
pub fn workspace_lints(workspace: &Workspace) -> Vec<Finding> {
    let takes_them = |package: &&Package| {
        section(&package.manifest, "[lints]")
            .iter()
            .any(|(_, line)| line.replace(' ', "") == "workspace=true")
    };
    let packages = workspace.packages.iter();
    packages
        .filter(|package| !takes_them(package))
        .map(|package| {
            Finding::in_file(
                package.folder.join("Cargo.toml"),
                "does not say `[lints] workspace = true`",
            )
        })
        .collect()
}

/// Every member has a README.md that says something.
pub fn readme(workspace: &Workspace) -> Vec<Finding> {
    let packages = workspace.packages.iter();
    packages
        .filter(|package| package.readme.as_deref().unwrap_or("").trim().is_empty())
        .map(|package| Finding::in_file(package.folder.join("README.md"), "missing or empty"))
        .collect()
}

/// The lines, numbered from 1 and without comments, between the header `name` and the next header.
fn section<'a>(manifest: &'a str, name: &str) -> Vec<(usize, &'a str)> {
    let mut inside = false;
    let mut lines = Vec::new();
    for (index, line) in manifest.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        if line.starts_with('[') {
            inside = line == name;
        } else if inside && !line.is_empty() {
            lines.push((index + 1, line));
        }
    }
    lines
}

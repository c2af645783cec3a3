//! `cargo xtask tidy`: the rules that neither rustc nor clippy knows.
//!
//! Each rule is a function from the workspace to its findings, and stands in [`RULES`] beside a planted sample that
//! breaks it; a test shows that every rule finds its sample and lets a clean workspace pass.
//!
//! **Not here**: formatting, and whatever a lint of the workspace denies.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::workspace::Workspace;

mod layout;
mod manifest;
mod unsafety;
mod wording;

/// One broken rule at one place.
#[derive(Debug, PartialEq)]
pub struct Finding {
    path: PathBuf,
    line: Option<usize>,
    message: String,
}

impl Finding {
    fn in_file(path: impl AsRef<Path>, message: impl Into<String>) -> Finding {
        Finding {
            path: path.as_ref().to_owned(),
            line: None,
            message: message.into(),
        }
    }

    fn at(source: &crate::source::Source, offset: usize, message: impl Into<String>) -> Finding {
        Finding {
            line: Some(source.line(offset)),
            ..Finding::in_file(&source.path, message)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)
    }
}

type Rule = fn(&Workspace) -> Vec<Finding>;

const RULES: &[(&str, Rule)] = &[
    ("edges", manifest::edges),
    ("confined-dependencies", manifest::confined_dependencies),
    ("unused-dependencies", manifest::unused_dependencies),
    (
        "unused-workspace-dependencies",
        manifest::unused_in_workspace,
    ),
    ("workspace-lints", manifest::workspace_lints),
    ("readme", manifest::readme),
    ("forbid-unsafe", unsafety::forbidden),
    ("unsafe-modules", unsafety::modules),
    ("safety-comments", unsafety::comments),
    ("confined-names", wording::confined_names),
    ("placeholders", wording::placeholders),
    ("sleeps", wording::sleeps),
    ("crash-points", wording::crash_points),
    ("file-names", layout::file_names),
    ("top-level", layout::top_level),
];

/// Runs every rule and prints what it finds.
pub fn run(arguments: &[String]) -> Result<(), String> {
    if let Some(unknown) = arguments.first() {
        return Err(format!("tidy takes no argument, found {unknown}"));
    }
    let workspace = Workspace::read()?;
    let mut count = 0;
    for (name, rule) in RULES {
        for finding in rule(&workspace) {
            println!("{finding} [{name}]");
            count += 1;
        }
    }
    let files: usize = workspace.packages.iter().map(|p| p.sources.len()).sum();
    println!(
        "tidy: {} rules, {files} files, {count} findings",
        RULES.len()
    );
    if count == 0 {
        Ok(())
    } else {
        Err(format!("tidy: {count} findings"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::source::Source;
    use crate::workspace::{Dependency, DependencyKind, Package, Target};

    fn dependency(package: &str, kind: DependencyKind) -> Dependency {
        Dependency {
            package: package.to_owned(),
            crate_name: package.replace('-', "_"),
            kind,
            features: Vec::new(),
        }
    }

    fn package(name: &str, folder: &str, root: &str) -> Package {
        let root_file = PathBuf::from(format!("{folder}/src/lib.rs"));
        Package {
            name: name.to_owned(),
            folder: PathBuf::from(folder),
            manifest: "[package]\n\n[lints]\nworkspace = true\n".to_owned(),
            readme: Some(format!("# {name}\n")),
            dependencies: Vec::new(),
            features: BTreeMap::new(),
            targets: vec![Target {
                name: name.replace('-', "_"),
                kind: "lib".to_owned(),
                root_file: root_file.clone(),
            }],
            sources: vec![Source::new(root_file, root)],
        }
    }

    /// A workspace that breaks no rule and comes close to breaking each.
    fn clean() -> Workspace {
        let mut sys = package(
            "netmcore-sys",
            "netmcore-sys",
            "//! Calls.\n\npub mod shm;\npub mod file_lock;\n",
        );
        sys.dependencies = vec![
            dependency("libc", DependencyKind::Normal),
            dependency("fs2", DependencyKind::Normal),
            dependency("netmcore-forktest", DependencyKind::Dev),
        ];
        sys.sources.push(Source::new(
            "netmcore-sys/src/shm.rs",
            "//! Objects.\n//!\n//! # Safety\n//!\n//! Ours.\n#![allow(unsafe_code)]\n\nfn f() {\n    crash_point!(\"sys.shm.create\");\n    // SAFETY: no duties.\n    let pid =\n        unsafe { libc::getpid() };\n    crash_point!(\"sys.shm.created\");\n}\n",
        ));
        sys.sources.push(Source::new(
            "netmcore-sys/src/file_lock.rs",
            "//! Locks.\nuse fs2::FileExt;\n",
        ));
        sys.sources.push(Source::new(
            "netmcore-sys/tests/shm.rs",
            "//! unsafe, libc, todo! in words only.\nnetmcore_forktest::forktests!(a);\nfn a() {\n    // sleep: lets the child run first, which no assertion relies on.\n    std::thread::sleep(SHORT);\n}\n",
        ));
        let forktest = package(
            "netmcore-forktest",
            "netmcore-sys/forktest",
            "//! Runs.\n//!\n//! # Safety\n//!\n//! Values only.\n\n#![allow(unsafe_code)]\n\n// SAFETY: no duties.\nunsafe impl A for B {}\n",
        );
        let mut proc = package(
            "netmcore-proc",
            "netmcore-proc",
            "//! Processes.\nmod codec;\nuse netmcore_sys as sys;\n",
        );
        proc.sources.push(Source::new(
            "netmcore-proc/src/master/reap.rs",
            "fn f() {\n    crash_point!(\"proc.reap.a\");\n    crash_point!(\"proc.master.b\");\n}\n",
        ));
        proc.dependencies = vec![
            dependency("netmcore-sys", DependencyKind::Normal),
            dependency("bincode", DependencyKind::Normal),
            Dependency {
                features: vec!["crash-points".to_owned()],
                ..dependency("netmcore-sys", DependencyKind::Dev)
            },
            dependency("tempfile", DependencyKind::Dev),
        ];
        proc.sources.push(Source::new(
            "netmcore-proc/src/codec.rs",
            "//! Codec.\nuse bincode::Options;\n/// ```\n/// let dir = tempfile::tempdir();\n/// ```\nfn f() {}\n",
        ));
        let mut derive = package(
            "netmcore-shm-derive",
            "netmcore-shm/derive",
            "//! Derive.\n",
        );
        derive.targets[0].kind = "proc-macro".to_owned();
        let mut shm = package(
            "netmcore-shm",
            "netmcore-shm",
            "//! Shm.\npub use netmcore_shm_derive::ShmSafe;\n",
        );
        shm.dependencies = vec![dependency("netmcore-shm-derive", DependencyKind::Normal)];
        let mut facade = package(
            "netmcore",
            "netmcore",
            "//! Facade.\n#![forbid(unsafe_code)]\npub use netmcore_proc as proc;\n",
        );
        facade.dependencies = vec![
            dependency("netmcore-proc", DependencyKind::Normal),
            dependency("netmcore", DependencyKind::Dev),
        ];
        Workspace {
            root: PathBuf::from("/nowhere"),
            target_directory: PathBuf::from("/nowhere/target"),
            manifest: "[workspace]\n\n[workspace.dependencies]\nbincode = \"1\" # pinned\nlibc = \"0.2\"\nfs2 = \"0.4\"\ntempfile = \"3\"\n\n[workspace.lints.rust]\nunsafe_code = \"deny\"\n".to_owned(),
            top_level: layout::TOP_LEVEL.iter().map(|name| (*name).to_owned()).collect(),
            packages: vec![sys, forktest, proc, derive, shm, facade],
        }
    }

    /// `clean` with one change.
    fn with(change: impl FnOnce(&mut Workspace)) -> Workspace {
        let mut workspace = clean();
        change(&mut workspace);
        workspace
    }

    fn named<'a>(workspace: &'a mut Workspace, name: &str) -> &'a mut Package {
        let mut packages = workspace.packages.iter_mut();
        packages.find(|package| package.name == name).unwrap()
    }

    /// `clean` with another file.
    fn with_file(package: &str, path: &str, text: &str) -> Workspace {
        with(|w| named(w, package).sources.push(Source::new(path, text)))
    }

    fn with_dependency(package: &str, dependency: Dependency) -> Workspace {
        with(|w| named(w, package).dependencies.push(dependency))
    }

    /// Each planted sample with the rule that must find it.
    fn planted() -> Vec<(&'static str, &'static str, Workspace)> {
        use DependencyKind::{Build, Dev, Normal};
        let sys_file = |text: &str| with_file("netmcore-sys", "netmcore-sys/src/planted.rs", text);
        let proc_file =
            |text: &str| with_file("netmcore-proc", "netmcore-proc/src/planted.rs", text);
        let safety = "//! Planted.\n//!\n//! # Safety\n//!\n//! None.\n#![allow(unsafe_code)]\n";
        vec![
            (
                "edges",
                "an edge upwards",
                with_dependency("netmcore-sys", dependency("netmcore-proc", Normal)),
            ),
            (
                "edges",
                "an edge sideways",
                with_dependency("netmcore-shm", dependency("netmcore-proc", Dev)),
            ),
            (
                "edges",
                "forktest outside of tests",
                with_dependency("netmcore-proc", dependency("netmcore-forktest", Normal)),
            ),
            (
                "edges",
                "crash points in a normal build",
                with_dependency(
                    "netmcore-proc",
                    Dependency {
                        features: vec!["crash-points".into()],
                        ..dependency("netmcore-sys", Normal)
                    },
                ),
            ),
            (
                "edges",
                "a nested package used by another's owner",
                with_dependency("netmcore-proc", dependency("netmcore-shm-derive", Normal)),
            ),
            (
                "edges",
                "a member nobody drew",
                with(|w| {
                    w.packages
                        .push(package("netmcore-new", "netmcore-new", "//! New.\n"))
                }),
            ),
            (
                "confined-dependencies",
                "libc elsewhere",
                with_dependency("netmcore-proc", dependency("libc", Dev)),
            ),
            (
                "confined-dependencies",
                "bincode elsewhere",
                with_dependency("netmcore", dependency("bincode", Normal)),
            ),
            (
                "unused-dependencies",
                "a library that no source names",
                with_dependency("netmcore-proc", dependency("backtrace", Normal)),
            ),
            (
                "unused-dependencies",
                "a library named in a test only",
                with(|w| {
                    let proc = named(w, "netmcore-proc");
                    proc.dependencies.push(dependency("backtrace", Normal));
                    proc.sources.push(Source::new(
                        "netmcore-proc/tests/a.rs",
                        "use backtrace::trace;",
                    ));
                }),
            ),
            (
                "unused-dependencies",
                "a test library that nothing names",
                with_dependency("netmcore-proc", dependency("proptest", Dev)),
            ),
            (
                "unused-dependencies",
                "a build library without build script",
                with_dependency("netmcore-proc", dependency("cc", Build)),
            ),
            (
                "unused-workspace-dependencies",
                "a line no member uses",
                with(|w| w.manifest = w.manifest.replace("libc =", "loom = \"0.7\"\nlibc =")),
            ),
            (
                "workspace-lints",
                "no lints section",
                with(|w| {
                    named(w, "netmcore-proc").manifest = "[package]\nworkspace = true\n".into()
                }),
            ),
            (
                "workspace-lints",
                "lints of its own",
                with(|w| {
                    named(w, "netmcore-proc").manifest =
                        "[lints]\n# workspace = true\n[lints.rust]\nunsafe_code = \"deny\"\n".into()
                }),
            ),
            (
                "readme",
                "no README.md",
                with(|w| named(w, "netmcore-proc").readme = None),
            ),
            (
                "readme",
                "an empty README.md",
                with(|w| named(w, "netmcore-proc").readme = Some(" \n".into())),
            ),
            (
                "forbid-unsafe",
                "a facade that only denies",
                with(|w| {
                    named(w, "netmcore").sources[0] = Source::new(
                        "netmcore/src/lib.rs",
                        "//! Facade.\n#![deny(unsafe_code)]\nuse netmcore_proc;\n",
                    )
                }),
            ),
            (
                "unsafe-modules",
                "unsafe without allowance",
                sys_file("//! X.\nfn f() {\n    // SAFETY: fine.\n    unsafe { g() }\n}\n"),
            ),
            (
                "unsafe-modules",
                "no Safety paragraph",
                sys_file(
                    "//! X.\n#![allow(unsafe_code)]\nfn f() {\n    // SAFETY: fine.\n    unsafe { g() }\n}\n",
                ),
            ),
            (
                "unsafe-modules",
                "an allowance nobody needs",
                sys_file(&format!("{safety}fn f() {{}}\n")),
            ),
            (
                "unsafe-modules",
                "an allowance for one item",
                sys_file("//! X.\n#[allow(unsafe_code)]\nmod y;\n"),
            ),
            (
                "unsafe-modules",
                "a whole library",
                with(|w| {
                    named(w, "netmcore-sys").sources[0] = Source::new(
                        "netmcore-sys/src/lib.rs",
                        format!("{safety}unsafe fn f() {{}}\n"),
                    )
                }),
            ),
            (
                "safety-comments",
                "a block",
                sys_file(&format!(
                    "{safety}fn f() {{\n    let x = 1;\n    unsafe {{ g(x) }}\n}}\n"
                )),
            ),
            (
                "safety-comments",
                "a block in a macro",
                sys_file(&format!(
                    "{safety}macro_rules! m {{\n    () => {{\n        unsafe {{ g() }}\n    }};\n}}\n"
                )),
            ),
            (
                "safety-comments",
                "an impl",
                sys_file(&format!("{safety}struct X;\nunsafe impl Send for X {{}}\n")),
            ),
            (
                "confined-names",
                "libc above sys",
                proc_file("fn f() -> libc::c_int { 0 }\n"),
            ),
            (
                "confined-names",
                "rustix above sys",
                proc_file("use rustix as r;\n"),
            ),
            (
                "confined-names",
                "libc in forktest",
                with_file(
                    "netmcore-forktest",
                    "netmcore-sys/forktest/src/a.rs",
                    "use libc;",
                ),
            ),
            (
                "confined-names",
                "bincode outside the codec",
                proc_file("use bincode;\n"),
            ),
            (
                "confined-names",
                "fs2 outside its module",
                sys_file("use fs2;\n"),
            ),
            ("placeholders", "todo", proc_file("fn f() { todo!() }\n")),
            (
                "placeholders",
                "unimplemented",
                proc_file("fn f() { unimplemented!(\"later\") }\n"),
            ),
            (
                "placeholders",
                "ignored test",
                proc_file("#[test]\n#[ignore = \"slow\"]\nfn f() {}\n"),
            ),
            (
                "placeholders",
                "ignored by cfg_attr",
                proc_file("#[test]\n#[cfg_attr(miri, ignore)]\nfn f() {}\n"),
            ),
            (
                "placeholders",
                "ignored doc test",
                proc_file("/// ```ignore\n/// f()\n/// ```\nfn f() {}\n"),
            ),
            (
                "sleeps",
                "no reason",
                proc_file("fn f() {\n    std::thread::sleep(SHORT);\n}\n"),
            ),
            (
                "sleeps",
                "another comment",
                proc_file("fn f() {\n    // wait a little\n    thread::sleep(SHORT);\n}\n"),
            ),
            ("sleeps", "imported", proc_file("use std::thread::sleep;\n")),
            (
                "sleeps",
                "a reason for the sleep before",
                proc_file(
                    "fn f() {\n    // sleep: paced\n    thread::sleep(SHORT);\n    thread::sleep(SHORT);\n}\n",
                ),
            ),
            (
                "crash-points",
                "two parts",
                proc_file("fn f() { crash_point!(\"proc.planted\"); }\n"),
            ),
            (
                "crash-points",
                "another crate's name",
                proc_file("fn f() { crash_point!(\"sys.planted.step\"); }\n"),
            ),
            (
                "crash-points",
                "another file's name",
                proc_file("fn f() { crash_point!(\"proc.other.step\"); }\n"),
            ),
            (
                "crash-points",
                "bad characters",
                proc_file("fn f() { crash_point!(\"proc.planted.Step one\"); }\n"),
            ),
            (
                "crash-points",
                "the same name twice",
                proc_file(
                    "fn f() { crash_point!(\"proc.planted.a\"); crash_point!(\n    \"proc.planted.a\"\n); }\n",
                ),
            ),
            (
                "crash-points",
                "no literal",
                proc_file("fn f() { crash_point!(NAME); }\n"),
            ),
            (
                "file-names",
                "utils.rs",
                with_file("netmcore-sys", "netmcore-sys/src/utils.rs", ""),
            ),
            (
                "file-names",
                "tests/common/mod.rs",
                with_file("netmcore-sys", "netmcore-sys/tests/common/mod.rs", ""),
            ),
            (
                "top-level",
                "a new folder",
                with(|w| w.top_level.push("scripts/".into())),
            ),
            (
                "top-level",
                "a new file",
                with(|w| w.top_level.push("NOTES.txt".into())),
            ),
            (
                "top-level",
                "a missing folder",
                with(|w| w.top_level.retain(|name| name != "netmcore-sem/")),
            ),
        ]
    }

    #[test]
    fn clean_workspace_breaks_no_rule() {
        let workspace = clean();
        for (name, rule) in RULES {
            assert_eq!(rule(&workspace), [], "{name}");
        }
    }

    #[test]
    fn planted_samples_are_found_by_their_rule() {
        for (expected, what, workspace) in planted() {
            let (_, rule) = RULES.iter().find(|(name, _)| *name == expected).unwrap();
            assert_ne!(rule(&workspace), [], "{expected}: {what}");
        }
    }

    #[test]
    fn planted_samples_cover_every_rule() {
        let samples = planted();
        for (name, _) in RULES {
            assert!(samples.iter().any(|sample| sample.0 == *name), "{name}");
        }
    }

    #[test]
    fn findings_name_file_and_line() {
        let workspace = with_file(
            "netmcore-proc",
            "netmcore-proc/src/planted.rs",
            "\nuse bincode;\n",
        );
        let findings = wording::confined_names(&workspace);
        assert_eq!(findings.len(), 1);
        let text = findings[0].to_string();
        assert!(
            text.starts_with("netmcore-proc/src/planted.rs:2: "),
            "{text}"
        );
    }
}

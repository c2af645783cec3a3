//! The workspace as `cargo metadata` tells it, with its sources.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::source::Source;

/// What the commands of this crate know of the workspace.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The folder of the root manifest.
    pub root: PathBuf,
    /// Where cargo builds.
    pub target_directory: PathBuf,
    /// The root manifest's text.
    pub manifest: String,
    /// What lies beside the root manifest, without `.git` and what `.gitignore` names; folders end with `/`.
    pub top_level: Vec<String>,
    /// The members.
    pub packages: Vec<Package>,
}

/// A member of the workspace.
#[derive(Debug, Default)]
pub struct Package {
    pub name: String,
    /// Relative to the workspace's root.
    pub folder: PathBuf,
    /// The manifest's text.
    pub manifest: String,
    /// The text of its README.md.
    pub readme: Option<String>,
    pub dependencies: Vec<Dependency>,
    pub features: BTreeMap<String, Vec<String>>,
    pub targets: Vec<Target>,
    pub sources: Vec<Source>,
}

/// A dependency as a manifest declares it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dependency {
    /// The package that is depended on.
    pub package: String,
    /// What the sources call it.
    pub crate_name: String,
    pub kind: DependencyKind,
    pub features: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DependencyKind {
    #[default]
    Normal,
    Dev,
    Build,
}

/// Something that cargo builds: a library, a program, a test, an example.
#[derive(Debug, Default)]
pub struct Target {
    pub name: String,
    /// As cargo names it: `lib`, `bin`, `test`, `example`, `bench`, `proc-macro`.
    pub kind: String,
    /// Relative to the workspace's root.
    pub root_file: PathBuf,
}

impl Workspace {
    /// Asks `cargo metadata` about the workspace that this program was built in, and reads its sources.
    pub fn read() -> Result<Workspace, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .ok_or("xtask has no parent folder")?;
        let metadata = cargo_metadata(root, &["--no-deps"])?;
        let mut packages = Vec::new();
        for package in array(&metadata["packages"]) {
            packages.push(Package::read(root, package)?);
        }
        let folders: Vec<PathBuf> = packages.iter().map(|p| p.folder.clone()).collect();
        for package in &mut packages {
            let nested: Vec<&PathBuf> = folders
                .iter()
                .filter(|folder| **folder != package.folder)
                .collect();
            read_sources(root, &package.folder, &nested, &mut package.sources)?;
        }
        Ok(Workspace {
            root: root.to_owned(),
            target_directory: PathBuf::from(string(&metadata["target_directory"])),
            manifest: read(&root.join("Cargo.toml"))?,
            top_level: top_level(root)?,
            packages,
        })
    }

    /// Builds every test and example.
    pub fn build_tests(&self) -> Result<Vec<TestProgram>, String> {
        let output = cargo(&self.root)
            .args(["test", "--workspace", "--no-run"])
            .arg("--message-format=json-render-diagnostics")
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| format!("running cargo: {error}"))?;
        if !output.status.success() {
            return Err(format!("building the tests: {}", output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let messages = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(messages
            .filter_map(|message| TestProgram::read(&message))
            .collect())
    }

    /// The member called `name`.
    pub fn package(&self, name: &str) -> Option<&Package> {
        self.packages.iter().find(|package| package.name == name)
    }
}

/// A test or example, built.
#[derive(Debug)]
pub struct TestProgram {
    /// The member's folder's name.
    pub package: String,
    /// As cargo names it: `lib`, `bin`, `test`, `example`.
    pub kind: String,
    pub name: String,
    pub path: PathBuf,
    /// The member's folder, in which it is to run.
    pub folder: PathBuf,
}

impl TestProgram {
    /// What cargo says it built, if it is a test or an example.
    fn read(message: &Value) -> Option<TestProgram> {
        let path = message["executable"].as_str()?.into();
        let target = &message["target"];
        let kind = string(&target["kind"][0]);
        if kind != "example" && message["profile"]["test"] != true {
            return None;
        }
        let manifest = string(&message["manifest_path"]);
        let folder = Path::new(&manifest).parent()?.to_owned();
        Some(TestProgram {
            package: folder.file_name()?.to_str()?.to_owned(),
            kind,
            name: string(&target["name"]),
            path,
            folder,
        })
    }

    /// How people may call it.
    pub fn title(&self) -> String {
        format!("{} {} {}", self.package, self.kind, self.name)
    }

    /// What cargo would tell it; `libraries` are [`rust_libraries`].
    pub fn environment(&self, libraries: &OsStr) -> [(&'static str, OsString); 3] {
        [
            ("CARGO_MANIFEST_DIR", self.folder.clone().into()),
            ("CARGO_PKG_NAME", self.package.clone().into()),
            ("LD_LIBRARY_PATH", libraries.to_owned()),
        ]
    }
}

impl Package {
    fn read(root: &Path, package: &Value) -> Result<Package, String> {
        let relative = |path: &Value| {
            let path = Path::new(path.as_str().unwrap_or_default());
            path.strip_prefix(root).unwrap_or(path).to_owned()
        };
        let manifest_path = relative(&package["manifest_path"]);
        let folder = manifest_path.parent().unwrap_or(Path::new("")).to_owned();
        let features = package["features"].as_object();
        Ok(Package {
            name: string(&package["name"]),
            manifest: read(&root.join(&manifest_path))?,
            readme: read(&root.join(&folder).join("README.md")).ok(),
            dependencies: array(&package["dependencies"])
                .iter()
                .map(Dependency::read)
                .collect(),
            features: features
                .into_iter()
                .flatten()
                .map(|(name, enables)| (name.clone(), array(enables).iter().map(string).collect()))
                .collect(),
            targets: array(&package["targets"])
                .iter()
                .map(|target| Target {
                    name: string(&target["name"]),
                    kind: string(&target["kind"][0]),
                    root_file: relative(&target["src_path"]),
                })
                .collect(),
            sources: Vec::new(),
            folder,
        })
    }

    /// Whether `path`, relative to the workspace's root, is the root file of this package's library or of a program.
    pub fn is_crate_root(&self, path: &Path) -> bool {
        self.targets.iter().any(|target| {
            matches!(target.kind.as_str(), "lib" | "bin" | "proc-macro") && target.root_file == path
        })
    }
}

impl Dependency {
    fn read(dependency: &Value) -> Dependency {
        let package = string(&dependency["name"]);
        let renamed = dependency["rename"].as_str().unwrap_or(&package);
        Dependency {
            crate_name: renamed.replace('-', "_"),
            kind: match dependency["kind"].as_str() {
                Some("dev") => DependencyKind::Dev,
                Some("build") => DependencyKind::Build,
                _ => DependencyKind::Normal,
            },
            features: array(&dependency["features"]).iter().map(string).collect(),
            package,
        }
    }
}

/// The answer of `cargo metadata` in `root`.
pub fn cargo_metadata(root: &Path, arguments: &[&str]) -> Result<Value, String> {
    let output = cargo(root)
        .args(["metadata", "--format-version", "1"])
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("running cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", output.status));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("reading the answer of cargo metadata: {error}"))
}

/// `cargo` in `folder`, without standard input and without what `cargo run` told this program about itself.
pub fn cargo(folder: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Where the dynamic linker finds Rust's own libraries, which the tests of a procedural macro need: the compiler's, and the standard one.
pub fn rust_libraries() -> OsString {
    let printed = |what| {
        let output = Command::new("rustc").args(["--print", what]).output();
        output.map_or_else(
            |_| String::new(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
    };
    let (compiler, standard) = (printed("sysroot"), printed("target-libdir"));
    format!("{compiler}/lib:{standard}").into()
}

/// The elements of a JSON array; none of anything else.
pub fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A JSON string; empty for anything else.
pub fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("reading {}: {error}", path.display()))
}

/// All `.rs` files under `folder`, without those of `nested` packages and without build output.
fn read_sources(
    root: &Path,
    folder: &Path,
    nested: &[&PathBuf],
    sources: &mut Vec<Source>,
) -> Result<(), String> {
    let full = root.join(folder);
    let entries = full
        .read_dir()
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("reading {}: {error}", full.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .iter()
        .map(|entry| folder.join(entry.file_name()))
        .collect();
    paths.sort();
    for path in paths {
        if root.join(&path).is_dir() {
            let foreign = nested.contains(&&path) || path.ends_with("target");
            if !foreign {
                read_sources(root, &path, nested, sources)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = read(&root.join(&path))?;
            sources.push(Source::new(path, text));
        }
    }
    Ok(())
}

fn top_level(root: &Path) -> Result<Vec<String>, String> {
    let ignored = std::fs::read_to_string(root.join(".gitignore")).unwrap_or_default();
    let ignored: Vec<&str> = ignored
        .lines()
        .filter_map(|line| line.strip_prefix('/'))
        .map(|line| line.trim_end_matches('/'))
        .collect();
    let mut names = Vec::new();
    let entries = root
        .read_dir()
        .map_err(|error| format!("reading {}: {error}", root.display()))?;
    for entry in entries.flatten() {
        let mut name = entry.file_name().to_string_lossy().into_owned();
        if name == ".git" || ignored.contains(&name.as_str()) {
            continue;
        }
        if entry.path().is_dir() {
            name.push('/');
        }
        names.push(name);
    }
    names.sort();
    Ok(names)
}

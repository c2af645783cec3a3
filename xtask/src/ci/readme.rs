//! The example in each crate's README.md, built and run by a package that depends on that crate alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::ci::{Context, check, within};
use crate::workspace::{Package, Workspace, cargo};

const LIMIT: Duration = Duration::from_secs(120);

/// Packages whose README.md shows no program: they are of use in this workspace only.
const WITHOUT_EXAMPLE: &[&str] = &["xtask", "netmcore-forktest"];

/// Every crate's example compiles and ends well.
pub fn all(context: &mut Context) -> Result<(), String> {
    let workspace = &context.workspace;
    let folder = std::env::temp_dir().join(format!("nmc-readmes-{}", std::process::id()));
    let mut failures = Vec::new();
    for package in &workspace.packages {
        let procedural = package
            .targets
            .iter()
            .any(|target| target.kind == "proc-macro");
        if procedural || WITHOUT_EXAMPLE.contains(&package.name.as_str()) {
            continue;
        }
        if let Err(error) = try_example(workspace, package, &folder) {
            failures.push(format!("{}: {error}", package.name));
        }
    }
    let _ = fs::remove_dir_all(&folder);
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

fn try_example(workspace: &Workspace, package: &Package, folder: &Path) -> Result<(), String> {
    let readme = package.readme.as_deref().unwrap_or("");
    let block = first_rust_block(readme).ok_or("its README.md has no block of Rust")?;
    let scratch = folder.join(&package.name);
    let name = format!("readme-of-{}", package.name);
    write(scratch.join("src/main.rs"), &as_program(&block))?;
    write(
        scratch.join("Cargo.toml"),
        &manifest(workspace, package, &name),
    )?;
    // The same versions as in the workspace, and nothing to ask a registry for.
    let lock = fs::read_to_string(workspace.root.join("Cargo.lock"));
    write(
        scratch.join("Cargo.lock"),
        &lock.map_err(|error| format!("Cargo.lock: {error}"))?,
    )?;
    let mut build = cargo(&scratch);
    build
        .args(["build", "--quiet", "--offline", "--target-dir"])
        .arg(&workspace.target_directory);
    check(&mut build)?;
    let mut program = Command::new(workspace.target_directory.join("debug").join(&name));
    program.current_dir(&scratch);
    check(&mut within(LIMIT, &program))
}

/// The profiles are the workspace's, so that its builds of the dependencies serve here too.
fn manifest(workspace: &Workspace, package: &Package, name: &str) -> String {
    let folder = workspace.root.join(&package.folder);
    format!(
        "[package]\nname = \"{name}\"\nversion = \"0.0.0\"\nedition = \"2024\"\npublish = false\n\n\
         [workspace]\n\n[dependencies]\n{} = {{ path = {:?} }}\n\n{}",
        package.name,
        folder,
        profiles(&workspace.manifest)
    )
}

/// The `[profile…]` sections of a manifest.
fn profiles(manifest: &str) -> String {
    let mut inside = false;
    let mut kept = String::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[profile");
        }
        if inside {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// The inside of the first block that begins with ```` ```rust ````.
fn first_rust_block(readme: &str) -> Option<String> {
    let is_rust = |line: &&str| {
        let language = line.trim().strip_prefix("```").unwrap_or("");
        language.split(',').next() == Some("rust")
    };
    let mut lines = readme.lines().skip_while(|line| !is_rust(line));
    lines.next()?;
    let block: Vec<&str> = lines.take_while(|line| line.trim() != "```").collect();
    Some(block.join("\n"))
}

/// As rustdoc does: hidden lines are uncovered, and a block without `main` is the inside of one.
fn as_program(block: &str) -> String {
    let uncovered: Vec<&str> = block
        .lines()
        .map(|line| match line.trim_start() {
            "#" => "",
            hidden => hidden.strip_prefix("# ").unwrap_or(line),
        })
        .collect();
    let code = uncovered.join("\n");
    if code.contains("fn main(") {
        code + "\n"
    } else {
        format!("fn main() {{\n{code}\n}}\n")
    }
}

fn write(path: PathBuf, text: &str) -> Result<(), String> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, text))
        .map_err(|error| format!("writing {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_rust_block_is_found() {
        let readme = "# x\n```toml\na = 1\n```\n```rust,edition2024\nfn main() {}\n```\n```rust\nlater\n```\n";
        assert_eq!(first_rust_block(readme).as_deref(), Some("fn main() {}"));
        assert_eq!(first_rust_block("# x\n```\nplain\n```\n"), None);
    }

    #[test]
    fn programs_get_a_main_and_their_hidden_lines() {
        assert_eq!(
            as_program("# use a::b;\nb();"),
            "fn main() {\nuse a::b;\nb();\n}\n"
        );
        assert_eq!(as_program("#[x]\nfn main() {}"), "#[x]\nfn main() {}\n");
    }

    #[test]
    fn profiles_are_copied_and_nothing_else() {
        let manifest = "[workspace]\na = 1\n\n[profile.dev]\ndebug = 1\n\n[lints]\nx = 2\n";
        assert_eq!(profiles(manifest), "[profile.dev]\ndebug = 1\n\n");
    }
}

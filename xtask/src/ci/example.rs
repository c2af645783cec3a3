//! The facade's examples, built in release and run as a user would.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::ci::{Context, check, within};
use crate::workspace::cargo;

const LIMIT: Duration = Duration::from_secs(120);

/// Builds all and runs each in a fresh socket directory, which must end well.
pub fn all_in_release(context: &mut Context) -> Result<(), String> {
    let workspace = &context.workspace;
    let facade = workspace
        .package("netmcore")
        .ok_or("the workspace has no netmcore")?;
    check(cargo(&workspace.root).args(["build", "--release", "-p", "netmcore", "--examples"]))?;
    let examples: Vec<_> = facade
        .targets
        .iter()
        .filter(|target| target.kind == "example")
        .collect();
    if examples.is_empty() {
        return Err("the facade has no example".to_owned());
    }
    for example in examples {
        let program = workspace
            .target_directory
            .join("release/examples")
            .join(&example.name);
        let directory = socket_directory(&example.name)?;
        let mut command = Command::new(program);
        command.arg("--socket-directory").arg(&directory);
        let outcome = check(&mut within(LIMIT, &command));
        let _ = std::fs::remove_dir_all(&directory);
        outcome?;
    }
    Ok(())
}

/// A fresh folder with a short path, as a socket's path has a limit of about 100 bytes.
fn socket_directory(example: &str) -> Result<PathBuf, String> {
    use std::os::unix::fs::DirBuilderExt;
    let path = std::env::temp_dir().join(format!("nmc-{}-{example}", std::process::id()));
    let created = std::fs::DirBuilder::new().mode(0o700).create(&path);
    created.map_err(|error| format!("creating {}: {error}", path.display()))?;
    Ok(path)
}

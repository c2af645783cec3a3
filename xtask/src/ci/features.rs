//! Every feature set compiles, without warnings: of the facade all of them, and each crate alone.

use std::collections::{BTreeMap, BTreeSet};

use crate::ci::{Context, check};
use crate::workspace::cargo;

/// Past this number of feature sets only those of the default features are all tried.
const MOST_SETS: usize = 100;

/// The facade with every set of its features; sets that enable the same are tried once.
pub fn powerset(context: &mut Context) -> Result<(), String> {
    let workspace = &context.workspace;
    let facade = workspace
        .package("netmcore")
        .ok_or("the workspace has no netmcore")?;
    let sets = sets(&facade.features);
    println!("{} different feature sets", sets.len());
    for set in sets {
        let mut command = cargo(&workspace.root);
        command.args([
            "clippy",
            "--quiet",
            "-p",
            "netmcore",
            "--no-default-features",
        ]);
        if !set.is_empty() {
            command.args(["--features", &set.join(",")]);
        }
        check(command.args(["--", "-D", "warnings"]))?;
    }
    Ok(())
}

/// Each crate by itself, so that none leans on a feature that another one enables.
pub fn single_crates(context: &mut Context) -> Result<(), String> {
    let workspace = &context.workspace;
    for package in &workspace.packages {
        for features in [&[][..], &["--no-default-features"], &["--all-features"]] {
            if !features.is_empty() && package.features.is_empty() {
                continue;
            }
            let mut command = cargo(&workspace.root);
            command
                .args(["clippy", "--quiet", "-p", &package.name])
                .args(features);
            check(command.args(["--", "-D", "warnings"]))?;
        }
    }
    Ok(())
}

/// Sets of features no two of which enable the same, the smallest for each. All of them if they are not too many;
/// otherwise all of the default features, and each other feature alone and with all defaults.
fn sets(features: &BTreeMap<String, Vec<String>>) -> Vec<Vec<String>> {
    let names: Vec<&str> = features
        .keys()
        .map(String::as_str)
        .filter(|name| *name != "default")
        .collect();
    let defaults: Vec<&str> = features
        .get("default")
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let all = distinct(features, subsets(&names));
    if all.len() <= MOST_SETS {
        return all;
    }
    let mut some = subsets(&defaults);
    for other in names.iter().filter(|name| !defaults.contains(name)) {
        some.push(vec![*other]);
        some.push(defaults.iter().copied().chain([*other]).collect());
    }
    distinct(features, some)
}

/// All subsets, the smaller ones first.
fn subsets<'a>(names: &[&'a str]) -> Vec<Vec<&'a str>> {
    let mut sets: Vec<Vec<&str>> = (0_u64..1 << names.len())
        .map(|bits| {
            let chosen = names.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1);
            chosen.map(|(_, name)| *name).collect()
        })
        .collect();
    sets.sort_by_key(Vec::len);
    sets
}

fn distinct(features: &BTreeMap<String, Vec<String>>, sets: Vec<Vec<&str>>) -> Vec<Vec<String>> {
    let mut seen = BTreeSet::new();
    let mut distinct = Vec::new();
    for set in sets {
        if seen.insert(enabled(features, &set)) {
            distinct.push(set.into_iter().map(str::to_owned).collect());
        }
    }
    distinct
}

/// Everything that the features of `set` enable, themselves included.
fn enabled<'a>(features: &'a BTreeMap<String, Vec<String>>, set: &[&'a str]) -> BTreeSet<&'a str> {
    let mut enabled = BTreeSet::new();
    let mut open = set.to_vec();
    while let Some(name) = open.pop() {
        if enabled.insert(name) {
            open.extend(features.get(name).into_iter().flatten().map(String::as_str));
        }
    }
    enabled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(lines: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        lines
            .iter()
            .map(|(name, enables)| ((*name).to_owned(), own(enables)))
            .collect()
    }

    #[test]
    fn sets_that_enable_the_same_are_one() {
        let features = features(&[
            ("default", &["upper"]),
            ("upper", &["lower", "dep:upper"]),
            ("lower", &["dep:lower"]),
            ("extra", &[]),
        ]);
        let sets = sets(&features);
        // Nothing, lower, upper (with lower), each without and with extra.
        assert_eq!(sets.len(), 6);
        assert!(sets.contains(&vec![]));
        assert!(sets.contains(&vec!["upper".to_owned()]));
    }

    #[test]
    fn too_many_sets_become_those_of_the_defaults_and_each_other_feature() {
        let others: Vec<String> = (0..7).map(|i| format!("other{i}")).collect();
        let mut lines: Vec<(&str, &[&str])> =
            others.iter().map(|name| (name.as_str(), &[][..])).collect();
        lines.extend([("default", &["a", "b"][..]), ("a", &[]), ("b", &[])]);
        assert_eq!(sets(&features(&lines)).len(), 4 + 2 * 7);
    }
}

//! What can be said of the documentation as such. What it says is tested where it belongs.

use crate::support::*;
use std::fs;
use std::process::Command;

const PAGES: [&str; 7] = [
    "README.md",
    "SECURITY.md",
    "nix/README.md",
    "nix/operating.md",
    "nix/own-stores.md",
    "nix/providers.md",
    "test/README.md",
];

/// As GitHub and GitLab make them of headings.
fn anchors(page: &str) -> Vec<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        text.chars()
            .filter(kept)
            .collect::<String>()
            .replace(' ', "-")
    };
    headings.map(anchor).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut links = 0;
    for name in PAGES {
        let page = fs::read_to_string(project(name)).unwrap();
        let targets = page.split("](").skip(1);
        for target in targets.map(|rest| rest.split(')').next().unwrap()) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match path {
                "" => project(name),
                _ => project(name).parent().unwrap().join(path),
            };
            assert!(file.exists(), "{name} leads to {target}");
            if !anchor.is_empty() {
                let there = anchors(&fs::read_to_string(file).unwrap());
                assert!(there.iter().any(|one| one == anchor), "{name}: {target}");
            }
            links += 1;
        }
    }
    assert!(links > 20, "{links} links");
}

/// The tag of a release must agree with Cargo.toml.
#[test]
fn the_first_release_has_this_version() {
    let readme = fs::read_to_string(project("README.md")).unwrap();
    assert!(readme.contains(concat!("git tag v", env!("CARGO_PKG_VERSION"), " ")));
}

/// A stranger reads all of it.
#[test]
fn the_readme_is_short() {
    let readme = fs::read_to_string(project("README.md")).unwrap();
    let lines = readme.lines().count();
    let words = readme.split_whitespace().count();
    assert!(
        lines <= 240 && words <= 2000,
        "{lines} lines, {words} words"
    );
}

/// What the package leaves out of its check is there to be left out.
#[test]
fn the_package_skips_tests_that_exist() {
    let list = Command::new(std::env::current_exe().unwrap())
        .arg("--list")
        .output()
        .unwrap();
    let tests = String::from_utf8(list.stdout).unwrap();
    let package = fs::read_to_string(project("nix/package.nix")).unwrap();
    let names = package
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix('"'));
    let skipped: Vec<_> = names.filter(|name| name.contains("::")).collect();
    assert!(skipped.len() > 20, "{skipped:?}");
    for name in skipped {
        assert!(tests.lines().any(|test| test.starts_with(name)), "{name}");
    }
}

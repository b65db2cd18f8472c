//! What can be said of the documentation as such. What it says is tested where it belongs.

use crate::support::*;
use std::fs;

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

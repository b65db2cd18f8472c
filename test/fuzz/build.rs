//! Puts main.rs where each target can include it as a part of itself, for what is private there to be in reach.

use std::{env, fs, path::Path};

/// What targets begin with, although it is private even in its module.
const OPENED: [&str; 4] = [
    "fn parse(bytes: &[u8])",
    "struct Key {",
    "fn fetch_jwks(&self",
    "Vec<Arc<Issuer>>);",
];

fn main() {
    let (top, out) = (Path::new("../.."), env::var("OUT_DIR").unwrap());
    for name in ["main.rs", "client.rs", "config.example.toml"] {
        let from = top.join(name);
        println!("cargo::rerun-if-changed={}", from.display());
        let mut text = fs::read_to_string(from).unwrap();
        if name == "main.rs" {
            // Attributes and documentation of a whole crate cannot be included.
            let lines = text.split_inclusive('\n');
            text = lines
                .filter(|line| !line.starts_with("//!") && !line.starts_with("#!["))
                .collect();
            for opened in OPENED {
                assert_eq!(
                    text.matches(opened).count(),
                    1,
                    "main.rs has not one `{opened}`"
                );
                text = text.replace(opened, &format!("pub {opened}"));
            }
        }
        fs::write(Path::new(&out).join(name), text).unwrap();
    }
}

//! Puts main.rs where each target can include it as a part of itself, for what is private there to be in reach.

use std::{env, fs, path::Path};

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
        }
        fs::write(Path::new(&out).join(name), text).unwrap();
    }
}

//! The flake, the module for NixOS, and the unit, as far as they can be tried without nixpkgs; nix/README.md says what
//! that leaves out.

use crate::support::{nix::*, *};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// The files that Nix sees, where nothing else is.
const SOURCES: [&str; 11] = [
    ".github",
    "Cargo.lock",
    "Cargo.toml",
    "client.sh",
    "config.example.toml",
    "flake.lock",
    "flake.nix",
    "client.rs",
    "main.rs",
    "nix",
    "test",
];

/// A machine with Nix and this flake, and the reference of that.
fn flake() -> (Runner, Dir, String) {
    let source = Dir::new();
    let status = Command::new("cp")
        .arg("-r")
        .args(SOURCES.map(project))
        .arg(source.path(""))
        .status();
    assert!(status.unwrap().success());
    let reference = format!("path:{}", source.path("").display());
    (Runner::alone(), source, reference)
}

/// What test/module.nix finds.
pub fn module() -> Value {
    let home = Dir::new();
    let mut command = job("nix-instantiate", &home);
    command.args([
        "--eval",
        "--strict",
        "--json",
        "--expr",
        "import ./test/module.nix { }",
    ]);
    command
        .env("NIX_REMOTE", "dummy://")
        .current_dir(project(""));
    if let Some(lib) = std::env::var_os("NIXPKGS_LIB") {
        command.env("NIXPKGS_LIB", lib);
    }
    let (out, log) = texts(&command.output().unwrap());
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}:\n{log}"))
}

#[test]
fn every_expression_parses() {
    let mut command = Command::new("find");
    command.args([
        "flake.nix",
        "nix",
        "test",
        "-name",
        "*.nix",
        "-exec",
        "nix-instantiate",
        "--parse",
        "{}",
        "+",
    ]);
    let (out, log) = texts(
        &command
            .env("NIX_REMOTE", "dummy://")
            .current_dir(project(""))
            .output()
            .unwrap(),
    );
    assert!(out.lines().count() > 10 && log.is_empty(), "{log}");
}

#[test]
fn the_module_does_what_its_options_say() {
    let failures = &module()["failures"];
    assert_eq!(failures, &json!({}), "{failures:#}");
}

#[test]
fn the_relay_takes_what_the_module_writes() {
    let dir = Dir::new();
    let module = module();
    let written = module["written"].as_object().unwrap();
    assert!(written.len() > 5);
    for (name, settings) in written {
        let file = dir.write("nix-relay.toml", &toml::to_string(settings).unwrap());
        let (_, log) = texts(&binary().arg("--check").arg(file).output().unwrap());
        assert_eq!(log, "", "{name}: {settings:#}");
    }
}

/// As far as it goes without mounting it.
#[test]
fn a_store_has_a_file_system_of_the_size_that_the_module_says() {
    let (dir, script) = (Dir::new(), module()["size"].as_str().unwrap().to_owned());
    let place = dir.path("").display().to_string();
    let script = script
        .replace("/var/lib/", &place)
        .replace(" nix-relay)", " nobody)");
    let listed = |size: &str| {
        let list = "debugfs -R stats $image; debugfs -R 'stat /' $image";
        let script = format!("PATH=$PATH:/sbin\n{}{list}", script.replace("20G", size));
        let output = Command::new("bash").args(["-euc", &script]).output();
        let (out, log) = texts(&output.unwrap());
        assert!(out.contains("Reserved block count:     0"), "{out}{log}");
        assert!(out.contains("User: 65534   Group: 65534"), "{out}{log}");
        let blocks = out.split_once("\nBlock count:").unwrap().1;
        blocks.split_whitespace().next().unwrap().to_owned()
    };
    let sizes = [("1G", "262144"), ("1G", "262144"), ("2G", "524288")];
    for (size, blocks) in sizes {
        assert_eq!(listed(size), blocks);
    }
}

#[test]
fn the_lock_is_accepted_as_it_is() {
    let (runner, source, flake) = flake();
    let told = runner.run(&[
        "flake",
        "metadata",
        "--json",
        "--no-update-lock-file",
        &flake,
    ]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let lock = fs::read_to_string(source.path("flake.lock")).unwrap();
    assert_eq!(told["locks"], serde_json::from_str::<Value>(&lock).unwrap());
    runner.run(&["flake", "lock", "--no-update-lock-file", &flake]);
    assert_eq!(fs::read_to_string(source.path("flake.lock")).unwrap(), lock);
}

/// Every output is evaluated, with something in place of nixpkgs.
#[test]
fn the_flake_has_its_outputs() {
    let (runner, source, flake) = flake();
    let stand_in = format!("path:{}", source.path("test/support/nixpkgs").display());
    // Before 2.16, Nix looked at all systems anyway, and did not know this for all commands.
    let all_systems: &[&str] = match nix_version() < (2, 16) {
        true => &[],
        false => &["--all-systems"],
    };
    let with = |command: &[&str]| {
        let inputs = ["--override-input", "nixpkgs", &stand_in];
        runner.run(&[command, all_systems, &inputs, &[&flake]].concat())
    };
    with(&["flake", "check", "--no-build"]);
    let shown: Value = serde_json::from_str(&with(&["flake", "show", "--json"])).unwrap();
    let names = |output: &Value| {
        output
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
            .join(" ")
    };
    for system in ["x86_64-linux", "aarch64-linux"] {
        let packages = &shown["packages"][system];
        assert_eq!(
            names(packages),
            "default nix-relay nix-relay-client nix-relay-static"
        );
        assert_eq!(
            packages["default"]["name"],
            concat!("nix-relay-", env!("CARGO_PKG_VERSION"))
        );
        assert_eq!(
            names(&shown["checks"][system]),
            "example lints module nix-relay nix-relay-client nixos"
        );
        assert_eq!(names(&shown["devShells"][system]), "default");
        assert_eq!(names(&shown["apps"][system]), "default demo");
    }
    for system in ["x86_64-darwin", "aarch64-darwin"] {
        assert_eq!(
            names(&shown["packages"][system]),
            "default nix-relay-client"
        );
    }
    assert_eq!(
        names(&shown["formatter"]),
        "aarch64-darwin aarch64-linux x86_64-darwin x86_64-linux"
    );
    assert_eq!(names(&shown["nixosModules"]), "client default nix-relay");
    assert_eq!(names(&shown["overlays"]), "default");
}

/// The script that makes the package, with the binary under test.
#[test]
fn on_linux_the_client_is_the_binary_under_both_names() {
    let (runner, source, flake) = flake();
    let stand_in = format!("path:{}", source.path("test/support/nixpkgs").display());
    let attribute = |name: &str| {
        let attribute = format!("{flake}#packages.x86_64-linux.{name}");
        let rest = ["--override-input", "nixpkgs", &stand_in, &attribute];
        runner.run(&[&["eval", "--raw"], &rest[..]].concat())
    };
    let binary = format!("{}/bin/nix-relay", attribute("nix-relay-static"));
    let script = attribute("nix-relay-client.script");
    let script = script.replace(&binary, env!("CARGO_BIN_EXE_nix-relay"));
    let out = Dir::new();
    let mut made = Command::new("sh");
    made.args(["-euc", &script]).env("out", out.path(""));
    assert!(made.status().unwrap().success(), "{script}");
    for name in ["nix-relay", "nix-relay-client"] {
        let program = out.path("bin").join(name);
        let (version, _) = texts(&Command::new(program).arg("--version").output().unwrap());
        assert_eq!(
            version,
            concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n")
        );
    }
}

/// As other distributions have it, and as NixOS changes it.
#[test]
fn systemd_takes_the_unit_and_finds_it_safe() {
    let dir = Dir::new();
    let unit = fs::read_to_string(project("nix/nix-relay.service")).unwrap();
    let program = env!("CARGO_BIN_EXE_nix-relay");
    let file = dir.write(
        "nix-relay.service",
        &unit.replace("/usr/local/bin/nix-relay", program),
    );
    fs::copy(
        project("nix/nix-relay.socket"),
        dir.path("nix-relay.socket"),
    )
    .unwrap();
    let analyze = |arguments: &[&str]| {
        let mut command = Command::new("systemd-analyze");
        command
            .args(arguments)
            .arg(&file)
            .env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path("").display()));
        let output = command.output().unwrap();
        let (out, log) = texts(&output);
        assert!(
            output.status.success() && log.is_empty(),
            "{arguments:?}\n{out}{log}"
        );
        out
    };
    analyze(&["verify", "--man=no"]);
    let socket = dir.path("nix-relay.socket").display().to_string();
    analyze(&["verify", "--man=no", &socket]);
    let exposure = analyze(&["security", "--offline=yes", "--threshold=15"]);

    let mut lines = "[Service]\n".to_owned();
    for (key, value) in module()["service"].as_object().unwrap() {
        for value in value.as_array().unwrap_or(&vec![value.clone()]) {
            let value = value.as_str().map_or(value.to_string(), |text| {
                text.replace("/nix-relay/bin/nix-relay", program)
            });
            lines += &format!("{key}={value}\n");
        }
    }
    fs::create_dir(dir.path("nix-relay.service.d")).unwrap();
    dir.write("nix-relay.service.d/overrides.conf", &lines);
    analyze(&["verify", "--man=no"]);
    assert_eq!(
        analyze(&["security", "--offline=yes", "--threshold=15"]),
        exposure
    );
}

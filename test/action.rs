//! The action for jobs on GitHub, with a release on a server of the test's own; and what a release begins with.

use crate::support::{nix::*, *};
use std::fs;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

const NAME: &str = "some-organisation/their-relay";

/// A runner that has downloaded the action, and the server from which it gets releases.
struct Actions {
    dir: Dir,
    server: Arc<tiny_http::Server>,
}

impl Actions {
    /// The release has this binary for this machine, and what its checksums are made of.
    fn start(binary: Vec<u8>, summed: &[u8]) -> Actions {
        let dir = Dir::new();
        let action = format!("_actions/{NAME}/v1/.github/actions/client");
        fs::create_dir_all(dir.path(&action)).unwrap();
        fs::create_dir(dir.path("temp")).unwrap();
        for (file, to) in [
            (
                ".github/actions/client/install",
                format!("{action}/install"),
            ),
            ("Cargo.toml", format!("_actions/{NAME}/v1/Cargo.toml")),
        ] {
            fs::copy(project(file), dir.path(&to)).unwrap();
        }
        let asset = format!("nix-relay-{}-linux", std::env::consts::ARCH);
        fs::write(dir.path(&asset), summed).unwrap();
        let mut sum = Command::new("sha256sum");
        let sum = sum.arg(&asset).current_dir(dir.path("")).output().unwrap();
        let sums = texts(&sum).0 + &texts(&sum).0.replace(&asset, "another");
        let server = Arc::new(tiny_http::Server::http("127.0.0.1:0").unwrap());
        let serving = server.clone();
        std::thread::spawn(move || {
            let tag = concat!("v", env!("CARGO_PKG_VERSION"));
            let release = format!("/{NAME}/releases/download/{tag}");
            for request in serving.incoming_requests() {
                let (body, status) = match request.url().strip_prefix(&release) {
                    Some("/SHA256SUMS") => (sums.clone().into_bytes(), 200),
                    Some(path) if path[1..] == asset => (binary.clone(), 200),
                    _ => (Vec::new(), 404),
                };
                let answer = tiny_http::Response::from_data(body).with_status_code(status);
                let _ = request.respond(answer);
            }
        });
        Actions { dir, server }
    }

    /// What the step of the action does.
    fn install(&self, url: &str, change: impl FnOnce(&mut Command)) -> Output {
        let action = format!("_actions/{NAME}/v1/.github/actions/client/install");
        let mut command = job(self.dir.path(&action), &self.dir);
        command
            .env("RELAY_URL", url)
            .env("RELAY_AUDIENCE", "some audience")
            .env("RUNNER_TEMP", self.dir.path("temp"))
            .env("GITHUB_PATH", self.dir.path("path"))
            .env("GITHUB_ENV", self.dir.path("env"))
            .env("GITHUB_REPOSITORY", "job/repository")
            .env(
                "GITHUB_SERVER_URL",
                format!("http://{}", self.server.server_addr()),
            );
        change(&mut command);
        command.output().unwrap()
    }

    /// What it says as it fails, before which nothing is in the path.
    fn failure(&self, url: &str, change: impl FnOnce(&mut Command)) -> String {
        let output = self.install(url, change);
        assert!(!output.status.success() && !self.dir.path("path").exists());
        let (out, _) = texts(&output);
        let error = out
            .lines()
            .find_map(|line| line.strip_prefix("::error::nix-relay: "));
        error.unwrap_or_else(|| panic!("no error: {out}")).into()
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

fn the_binary() -> Vec<u8> {
    fs::read(native()).unwrap()
}

#[test]
fn the_released_client_is_in_the_path_and_knows_its_relay() {
    let (issuer, binary) = (Issuer::start(), the_binary());
    let relay = Setup::new(&issuer).daemon("echo hello").start();
    let actions = Actions::start(binary.clone(), &binary);
    let output = actions.install(&format!("ws://{}", relay.address), |_| ());
    assert!(output.status.success(), "{:?}", texts(&output));
    let file = |name| fs::read_to_string(actions.dir.path(name)).unwrap();
    let path = format!("{}:{}", file("path").trim(), std::env::var("PATH").unwrap());
    let variables = file("env");
    assert!(
        variables.ends_with("\nNIX_RELAY_AUDIENCE=some audience\n"),
        "{variables}"
    );
    let mut next = job("sh", &actions.dir);
    next.args(["-c", "exec nix-relay --stdio"])
        .env("PATH", path)
        .env("NIX_RELAY_TOKEN", issuer.token())
        .envs(variables.lines().filter_map(|line| line.split_once('=')));
    let mut next = next
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = next.stdin.take();
    assert_eq!(texts(&next.wait_with_output().unwrap()).0, "hello\n");
    drop(input);
}

#[test]
fn another_binary_than_that_of_the_checksums() {
    let actions = Actions::start(b"#!/bin/sh\n".into(), b"another");
    let error = actions.failure("wss://relay", |_| ());
    assert!(
        error.contains("-linux is not what its SHA256SUMS says"),
        "{error}"
    );
}

#[test]
fn no_release_or_none_for_this_machine() {
    let actions = Actions::start(the_binary(), b"");
    let manifest = actions.dir.path(&format!("_actions/{NAME}/v1/Cargo.toml"));
    fs::write(manifest, "version = \"7.0.0\"\n").unwrap();
    let error = actions.failure("wss://relay", |_| ());
    assert!(
        error.starts_with("cannot download http") && error.ends_with("/v7.0.0/SHA256SUMS"),
        "{error}"
    );
    actions
        .dir
        .script("uname", "[ \"$1\" = -s ] && echo Linux || echo riscv64");
    let path = format!(
        "{}:{}",
        actions.dir.path("").display(),
        std::env::var("PATH").unwrap()
    );
    let error = actions.failure("wss://relay", |command| {
        command.env("PATH", path);
    });
    assert!(
        error.starts_with("there is no binary for Linux on riscv64: "),
        "{error}"
    );
}

#[test]
fn inputs_that_cannot_be() {
    let actions = Actions::start(the_binary(), &the_binary());
    let error = actions.failure("https://relay", |_| ());
    assert!(
        error.ends_with("must begin with wss:// (or ws://), but it is 'https://relay'"),
        "{error}"
    );
    let error = actions.failure("wss://relay\nLD_PRELOAD=x", |_| ());
    assert!(error.contains("must each be one line"), "{error}");
}

#[test]
fn a_release_has_the_version_of_its_tag() {
    let output = Command::new(project(".github/release"))
        .arg("v7.0.0")
        .output()
        .unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let line = format!("the tag is v7.0.0, but Cargo.toml has version {version}\n");
    assert_eq!((output.status.code(), texts(&output).1), (Some(1), line));
}

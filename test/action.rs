//! The action for jobs on GitHub, with a release on a server of the test's own; and what a release begins with.

use crate::support::{nix::*, *};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

const NAME: &str = "some-organisation/their-relay";

/// A runner that has downloaded the action, and the server from which it gets releases.
struct Actions {
    dir: Dir,
    server: Arc<tiny_http::Server>,
    /// Where the action is.
    root: String,
}

impl Actions {
    fn start() -> Actions {
        // The binary itself, not optimised, takes seconds to download.
        let binary = format!("#!/bin/sh\nexec {} \"$@\"\n", native().display());
        Actions::of(binary.as_bytes(), binary.as_bytes())
    }

    /// The release has this binary for this machine, and what its checksums are made of.
    fn of(binary: &[u8], summed: &[u8]) -> Actions {
        let dir = Dir::new();
        fs::create_dir(dir.path("temp")).unwrap();
        let asset = format!("nix-relay-{}-linux", std::env::consts::ARCH);
        fs::write(dir.path(&asset), summed).unwrap();
        let mut sum = Command::new("sha256sum");
        let sum = sum.arg(&asset).current_dir(dir.path("")).output().unwrap();
        let sums = texts(&sum).0 + &texts(&sum).0.replace(&asset, "another");
        let server = Arc::new(tiny_http::Server::http("127.0.0.1:0").unwrap());
        let (serving, binary) = (server.clone(), binary.to_vec());
        std::thread::spawn(move || {
            let tag = concat!("v", env!("CARGO_PKG_VERSION"));
            let api = format!("http://{}/api/assets", serving.server_addr());
            // In GitHub's order.
            let file = |number, name: &str| {
                let url = format!("{api}/releases/assets/{number}");
                format!(r#"{{"url":"{url}","id":1,"name":"{name}","uploader":{{"id":7}}}}"#)
            };
            let assets = format!("[{},{}]", file(1, "SHA256SUMS"), file(2, &asset));
            for request in serving.incoming_requests() {
                let headers = request.headers().iter();
                let mut headers = headers.map(|header| header.to_string());
                let may_read = headers.any(|header| header == "Authorization: Bearer may-read");
                let public = format!("/{NAME}/releases/download/{tag}/");
                let of_api = format!("/api/repos/{NAME}/releases/tags/{tag}");
                let (body, status) = match request.url() {
                    url if may_read && url == of_api => (assets.clone().into_bytes(), 200),
                    url if may_read && url.ends_with("/assets/1") => (sums.clone().into(), 200),
                    url if may_read && url.ends_with("/assets/2") => (binary.clone(), 200),
                    url if url == format!("{public}SHA256SUMS") => (sums.clone().into(), 200),
                    url if url == format!("{public}{asset}") => (binary.clone(), 200),
                    _ => (Vec::new(), 404),
                };
                let answer = tiny_http::Response::from_data(body).with_status_code(status);
                let _ = request.respond(answer);
            }
        });
        let root = String::new();
        Actions { dir, server, root }.at(&format!("_actions/{NAME}/v1"))
    }

    /// The same with the action elsewhere.
    fn at(mut self, root: &str) -> Actions {
        let action = self.dir.path(root).join(".github/actions/client");
        fs::create_dir_all(&action).unwrap();
        for file in fs::read_dir(project(".github/actions/client")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), action.join(file.file_name())).unwrap();
        }
        let manifest = self.dir.path(root).join("Cargo.toml");
        fs::copy(project("Cargo.toml"), manifest).unwrap();
        self.root = root.into();
        self
    }

    fn url(&self) -> String {
        format!("http://{}", self.server.server_addr())
    }

    /// The step of the action, with these inputs, as action.yml passes them on.
    fn step(&self, program: impl AsRef<std::ffi::OsStr>, inputs: &[(&str, &str)]) -> Command {
        let manifest = fs::read_to_string(project(".github/actions/client/action.yml")).unwrap();
        let mut command = job(program, &self.dir);
        for line in manifest.lines() {
            let Some((name, input)) = line.trim().split_once(": ${{ inputs.") else {
                continue;
            };
            let input = input.split([' ', '}']).next().unwrap();
            let declared = manifest.split_once(&format!("\n  {input}:\n")).unwrap().1;
            let of_it = declared.lines().take_while(|line| line.starts_with("    "));
            let default = of_it.filter_map(|line| line.trim().strip_prefix("default: "));
            let given = inputs.iter().find(|(name, _)| *name == input);
            let value = given.map(|(_, value)| value.to_string());
            let default = default.map(|value| value.trim_matches('"').to_owned());
            command.env(name, value.or(default.last()).unwrap_or_default());
        }
        command
            .env("RUNNER_TEMP", self.dir.path("temp"))
            .env("GITHUB_PATH", self.dir.path("path"))
            .env("GITHUB_ENV", self.dir.path("env"))
            .env("GITHUB_OUTPUT", self.dir.path("output"))
            .env("GITHUB_EVENT_NAME", "push")
            .env("GITHUB_REPOSITORY", "job/repository")
            .env("GITHUB_API_URL", self.url() + "/api")
            .env("GITHUB_SERVER_URL", self.url());
        command
    }

    fn program(&self) -> std::path::PathBuf {
        self.dir
            .path(&self.root)
            .join(".github/actions/client/install")
    }

    fn install(&self, inputs: &[(&str, &str)], change: impl FnOnce(&mut Command)) -> Output {
        let mut command = self.step(self.program(), inputs);
        change(&mut command);
        command.output().unwrap()
    }

    /// What it says as it fails, before which nothing is in the path.
    fn failure(&self, inputs: &[(&str, &str)], change: impl FnOnce(&mut Command)) -> String {
        let output = self.install(inputs, change);
        assert!(!output.status.success() && !self.dir.path("path").exists());
        let (out, log) = texts(&output);
        let error = out
            .lines()
            .find_map(|line| line.strip_prefix("::error::nix-relay: "));
        error
            .unwrap_or_else(|| panic!("no error: {out}{log}"))
            .into()
    }

    /// What it has written to a file that the runner reads.
    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path(name)).unwrap_or_default()
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

const URL: (&str, &str) = ("url", "wss://relay");

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{:?}", texts(output));
}

#[test]
fn the_released_client_is_in_the_path_and_knows_its_relay() {
    let (issuer, actions) = (Issuer::start(), Actions::start());
    let relay = Setup::new(&issuer).daemon("echo hello").start();
    let url = format!("ws://{}", relay.address);
    let inputs = [
        ("url", &*url),
        ("audience", "some audience"),
        ("compress", "zstd"),
    ];
    succeeds(&actions.install(&inputs, |_| ()));
    let path = actions.file("path");
    let output = format!(
        "path={}/nix-relay\nversion={}\nremote=false\n",
        path.trim(),
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(actions.file("output"), output);
    let path = format!("{}:{}", path.trim(), std::env::var("PATH").unwrap());
    let variables = actions.file("env");
    assert!(
        variables.ends_with("\nNIX_RELAY_AUDIENCE=some audience\nNIX_RELAY_COMPRESS=zstd\n"),
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

/// What a job does whose nix-daemon knows nothing of it: the action's step, and then, as a user whom that daemon does not
/// trust, a plain `nix build`.
fn job_with_nix_daemon(farm: &Farm, relay: &str, script: &str) -> (Output, Runner, String) {
    let (actions, runner) = (Actions::start(), farm.runner());
    let file = runner.derivation("hello", script);
    let nix = actions.dir.path("nix");
    // Like that of nixos/nix, a link into what nobody may change.
    actions
        .dir
        .write("nix.conf.there", "max-jobs = 4\nbuilders =\n");
    fs::create_dir(actions.dir.path("etc")).unwrap();
    symlink("../nix.conf.there", actions.dir.path("etc/nix.conf")).unwrap();
    // And like that of Determinate Nix, with another file for changes.
    actions.dir.write("etc/nix.custom.conf", "");
    fs::create_dir(actions.dir.path("home")).unwrap();
    let all = fs::Permissions::from_mode(0o777);
    fs::set_permissions(actions.dir.path("home"), all).unwrap();
    // Processes of its own, so that no other nix-daemon is restarted by mistake.
    let mut command = actions.step("timeout", &[("url", relay), ("builders", "true")]);
    command.args(["60", "unshare", "--pid", "--fork", "--kill-child"]);
    let own_store = project("test/support/own-store");
    command.arg("--mount-proc").arg(own_store).arg(&nix);
    command.args(["bash", "-euc"]).arg(
        r#"nix-store --init
        (for name in ${!ACTIONS_@}; do unset "$name"; done; exec nix-daemon 2>$HOME/journal) &
        until nix store ping --store daemon 2>&-; do sleep 0.1; done
        "$0"
        for name in ${!ACTIONS_@} ${!NIX_RELAY_@}; do unset "$name"; done
        export HOME=$HOME/home NIX_REMOTE=daemon
        setpriv --reuid=65534 --regid=65534 --clear-groups nix build -L --no-link -f "$1""#,
    );
    command.arg(actions.program()).arg(&file);
    command
        .env("NIX_CONFIG", CONFIG)
        .env("NIX_CONF_DIR", actions.dir.path("etc"))
        .env("NIX_RELAY_RETRY_SECS", "1")
        .envs(token_variables(&farm.issuer));
    let output = command.output().unwrap();
    assert!(actions.file("nix.conf.there").ends_with("builders =\n"));
    assert!(
        actions
            .file("etc/nix.custom.conf")
            .contains("\nmax-jobs = 0\n")
    );
    let out = runner.out_path(&file);
    (output, runner, out)
}

#[test]
fn with_builders_all_that_a_nix_daemon_builds_is_built_behind_the_relay() {
    let farm = Farm::start();
    let relay = format!("ws://{}", farm.relay.address);
    let (output, _runner, path) = job_with_nix_daemon(&farm, &relay, "echo hi > $out");
    succeeds(&output);
    assert_eq!(fs::read(farm.file(&path)).unwrap(), b"hi\n");
}

/// Nix itself says only that it has found no machine.
#[test]
fn with_builders_whoever_waits_for_the_build_sees_why_there_is_none() {
    let farm = Farm::start();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = format!("ws://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let (output, ..) = job_with_nix_daemon(&farm, &relay, "echo hi > $out");
    let (_, log) = texts(&output);
    assert!(!output.status.success(), "{log}");
    assert!(log.contains("nix-relay: cannot reach"), "{log}");
    assert!(log.contains("Failed to find a machine"), "{log}");
}

#[test]
fn another_binary_than_that_of_the_checksums() {
    let actions = Actions::of(b"#!/bin/sh\n", b"another");
    let error = actions.failure(&[URL], |_| ());
    assert!(
        error.contains("-linux is not what its SHA256SUMS says"),
        "{error}"
    );
}

#[test]
fn no_release_or_none_for_this_machine() {
    let actions = Actions::start();
    let manifest = actions.dir.path(&actions.root).join("Cargo.toml");
    fs::write(manifest, "version = \"7.0.0\"\n").unwrap();
    let error = actions.failure(&[URL], |_| ());
    assert!(
        error.starts_with("cannot download http") && error.ends_with("/v7.0.0/SHA256SUMS"),
        "{error}"
    );
    let uname = "[ \"$1\" = -s ] && echo Linux || echo riscv64";
    actions.dir.script("uname", uname);
    let error = actions.failure(&[URL], |command| first_in_path(command, &actions.dir));
    assert!(
        error.starts_with("there is no binary for Linux on riscv64: "),
        "{error}"
    );
}

fn first_in_path(command: &mut Command, dir: &Dir) {
    let rest = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{rest}", dir.path("").display()));
}

#[test]
fn inputs_that_cannot_be() {
    let actions = Actions::start();
    for (input, value, words) in [
        (
            "url",
            "https://relay",
            "must begin with wss:// (or ws://), but it is 'https://relay'",
        ),
        (
            "url",
            "wss://relay\nLD_PRELOAD=x",
            "each input must be one line",
        ),
        ("builders", "yes", "must be true or false, but one is 'yes'"),
        (
            "compress",
            "gzip",
            "must be zstd, or left out, but it is 'gzip'",
        ),
        (
            "jobs",
            "0",
            "the input jobs must be a number, but it is '0'",
        ),
        (
            "systems",
            "x86_64-linux - 99; ssh://other",
            "must be names, separated by commas",
        ),
        ("binary", "not-there", "but there is none at 'not-there'"),
        (
            "repository",
            "org/name",
            "must be an address such as https://github.com/OWNER/NAME",
        ),
    ] {
        let error = actions.failure(&[(input, value), URL], |_| ());
        assert!(error.contains(words), "{error}");
    }
}

/// Where a program is.
fn found(program: &str) -> String {
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", &format!("command -v {program}")]);
    texts(&shell.output().unwrap()).0.trim().into()
}

/// As images for containers have them: no sed, no grep, and a sha256sum that knows no options.
#[test]
fn few_programs_are_enough_and_each_that_is_missing_is_named() {
    let (actions, few) = (Actions::start(), Dir::new());
    for program in [
        "bash", "chmod", "dirname", "env", "mkdir", "mktemp", "mv", "uname", "curl",
    ] {
        symlink(found(program), few.path(program)).unwrap();
    }
    let only_few = |command: &mut Command| {
        command.env("PATH", few.path(""));
    };
    let error = actions.failure(&[URL], only_few);
    assert!(error.starts_with("sha256sum is missing, "), "{error}");
    let sum = format!("[ $# = 1 ] && exec {} \"$1\"", found("sha256sum"));
    few.script("sha256sum", &sum);
    succeeds(&actions.install(&[URL], only_few));
}

#[test]
fn without_a_token_a_pull_request_builds_here_and_a_push_fails() {
    let actions = Actions::start();
    let event = |name: &'static str| {
        move |command: &mut Command| {
            command.env("GITHUB_EVENT_NAME", name);
        }
    };
    let inputs = [URL, ("builders", "true"), ("require-token", "true")];
    for (inputs, name) in [(&inputs[..2], "push"), (&inputs, "pull_request")] {
        let error = actions.failure(inputs, event(name));
        assert!(error.starts_with("no token: "), "{error}");
    }
    let output = actions.install(&inputs[..2], event("pull_request"));
    succeeds(&output);
    let (out, _) = texts(&output);
    assert!(out.starts_with("::notice::nix-relay: ") && out.lines().count() == 1);
    assert_eq!(actions.file("output"), "remote=false\n");
}

#[test]
fn a_client_of_ones_own() {
    let actions = Actions::start();
    let own = actions.dir.script("own client", "echo nix-relay 7.8.9");
    let inputs = [URL, ("binary", own.to_str().unwrap())];
    succeeds(&actions.install(&inputs, |_| ()));
    assert!(actions.file("output").contains("\nversion=7.8.9\n"));
    let script = script();
    let inputs = [URL, ("binary", script.to_str().unwrap())];
    succeeds(&actions.install(&inputs, |_| ()));
    fs::write(&own, "\x7fELF").unwrap();
    let inputs = [URL, ("binary", own.to_str().unwrap())];
    let output = actions.install(&inputs, |_| ());
    assert!(texts(&output).0.contains("does not run here: "));
}

/// As Forgejo has it, and GitHub if the job names it by its path.
#[test]
fn an_action_that_does_not_know_where_it_is_from_asks() {
    let actions = Actions::start().at("checkout");
    let error = actions.failure(&[URL], |_| ());
    assert!(error.starts_with("set the input repository "), "{error}");
    let repository = format!("{}/{NAME}", actions.url());
    succeeds(&actions.install(&[URL, ("repository", &repository)], |_| ()));
}

#[test]
fn a_private_release_takes_a_token() {
    let actions = Actions::start();
    let error = actions.failure(&[URL, ("token", "may-not")], |_| ());
    assert!(error.contains("/api/repos/some-organisation/their-relay/releases/tags/v"));
    succeeds(&actions.install(&[URL, ("token", "may-read")], |_| ()));
}

#[test]
fn the_attestation_is_for_the_commit_or_tag_that_the_job_names() {
    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    let tag = concat!("--source-ref refs/tags/v", env!("CARGO_PKG_VERSION"));
    for (name, wanted) in [
        ("v1", tag.into()),
        (COMMIT, format!("--source-digest {COMMIT}")),
    ] {
        let actions = Actions::start().at(&format!("_actions/{NAME}/{name}"));
        let (dir, url) = (&actions.dir, &actions.url());
        let gh =
            "[ $3 != --help ] || exec echo --source-digest\necho \"$@\" >$HOME/asked\nexit $STATUS";
        dir.script("gh", gh);
        let curl = format!(
            "for a; do shift; case $a in https://github.com/*) a=$SERVER/${{a#https://github.com/}};; esac; \
             set -- \"$@\" \"$a\"; done; exec {} \"$@\"",
            found("curl")
        );
        dir.script("curl", &curl);
        let on_github = |status: &'static str| {
            move |command: &mut Command| {
                first_in_path(command, dir);
                command.env("GITHUB_SERVER_URL", "https://github.com");
                command.env("SERVER", url).env("STATUS", status);
            }
        };
        let error = actions.failure(&[URL], on_github("1"));
        assert!(
            error.contains("has no attestation that some-organisation/their-relay built it from"),
            "{error}"
        );
        succeeds(&actions.install(&[URL], on_github("0")));
        let asked = actions.file("asked");
        assert!(asked.contains(&wanted), "{asked}");
    }
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

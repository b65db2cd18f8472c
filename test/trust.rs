//! What Nix lets a client do is what the rule says that its token matches.

use crate::support::{nix::*, *};
use std::fs;
use std::process::Child;

const RULES: &str = "
[[auth.rule]]
name = 'main'
bound_claims = { ref = 'refs/heads/main' }
extra_args = ['root']

[[auth.rule]]
name = 'everybody else'
bound_claims = { repository_owner = '*' }
extra_args = ['nobody']
";

/// As root, nix-daemon answers for the store itself, and trusts its client; as a user that is not trusted, it passes the
/// bytes on to the system's daemon.
const DAEMON: &str = "
case $1 in
root) exec $NIX_IN_REMOTE nix-daemon --stdio ;;
nobody) exec $NIX_IN_REMOTE setpriv --reuid=65534 --regid=65534 --clear-groups nix-daemon --stdio ;;
esac";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        signal("KILL", self.0.id());
        let _ = self.0.wait();
    }
}

#[test]
fn trust_is_what_the_rule_says() {
    let farm = Farm::start_with(|setup| setup.config(RULES).set("ALLOWED_ORG", "").daemon(DAEMON));
    let _system = Killed(farm.command("nix-daemon").spawn().unwrap());
    let socket = farm.file("/var/lib/nix-relay-test/var/daemon-socket/socket");
    eventually("the system's daemon listens", LIMIT, || socket.exists());
    let runner = farm.runner();
    let token = |branch: &str| farm.issuer.token_with(json!({ "ref": branch }));
    let (trusted, other) = (token("refs/heads/main"), token("refs/heads/dev"));

    for (name, token) in [("trusted", &trusted), ("other", &other)] {
        let file = runner.derivation(&format!("built-by-{name}"), "echo > $out");
        let (_, log) = texts(
            &runner
                .build(&file)
                .env("NIX_RELAY_TOKEN", token)
                .output()
                .unwrap(),
        );
        assert!(
            farm.file(&runner.out_path(&file)).exists(),
            "{name} may build: {log}"
        );
    }
    // Input-addressed and unsigned: whoever adds it says what is in it.
    let copy = |name: &str, token: &str| {
        let file = runner.derivation(name, "echo forged > $out");
        runner.run(&["build", "--no-link", "-f", &file]);
        let path = runner.out_path(&file);
        let remote = runner.remote();
        let mut copy = runner.nix(&["copy", "--no-check-sigs", "--to", &remote, &path]);
        let (_, log) = texts(&copy.env("NIX_RELAY_TOKEN", token).output().unwrap());
        (farm.file(&path).exists(), log)
    };
    let (there, log) = copy("copied-by-trusted", &trusted);
    assert!(there, "a trusted client may add what it likes: {log}");
    let (there, log) = copy("copied-by-other", &other);
    assert!(
        !there && lacks_signature(&log),
        "one that is not may not: {log}"
    );
    farm.relay.log.wait("rule=\"everybody else\"");
}

/// The hook of nix/operating.md makes a root for each result. Without one, any client can have the result deleted.
#[test]
fn a_result_with_a_root_survives_a_collection() {
    let page = fs::read_to_string(project("nix/operating.md")).unwrap();
    let (_, hook) = page.split_once("```sh\n#!/bin/sh\n").unwrap();
    let (hook, _) = hook.split_once("```").unwrap();
    let (dir, roots) = (Dir::new(), "/var/lib/nix-relay-test/var/gcroots/relay");
    let hook = dir.script("keep", &hook.replace("/nix/var/nix/gcroots/relay", roots));
    let farm = Farm::start_with(|setup| setup.daemon(DAEMON).config(RULES).set("ALLOWED_ORG", ""));
    fs::create_dir_all(farm.file(roots)).unwrap();
    let config = format!("{CONFIG}post-build-hook = {}\n", hook.display());
    let mut system = farm.command("nix-daemon");
    let _system = Killed(system.env("NIX_CONFIG", config).spawn().unwrap());
    let socket = farm.file("/var/lib/nix-relay-test/var/daemon-socket/socket");
    eventually("the system's daemon listens", LIMIT, || socket.exists());
    let (runner, untrusted) = (farm.runner(), json!({"ref": "refs/heads/dev"}));
    let token = farm.issuer.token_with(untrusted);
    let file = runner.derivation("kept", "echo > $out");
    let path = runner.out_path(&file);
    let built = runner
        .build(&file)
        .env("NIX_RELAY_TOKEN", &token)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", texts(&built).1);
    let collect = || {
        let mut gc = runner.nix(&["store", "gc", "--store", &runner.remote()]);
        let output = gc.env("NIX_RELAY_TOKEN", &token).output().unwrap();
        assert!(output.status.success(), "{}", texts(&output).1);
        farm.file(&path).exists()
    };
    assert!(collect());
    fs::remove_dir_all(farm.file(roots)).unwrap();
    assert!(!collect());
}

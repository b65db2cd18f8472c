//! A real nix, through client.sh and the relay, to a real nix-daemon with a store of its own.

use crate::support::{nix::*, *};
use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

#[test]
fn a_build_happens_remotely_and_its_result_comes_back() {
    let farm = Farm::start();
    let runner = farm.runner();
    let file = runner.derivation("hello", "echo in the builder; echo hello > $out");
    let (_, log) = texts(&runner.build(&file).output().unwrap());
    assert!(log.contains("hello> in the builder"), "{log}");
    let path = runner.out_path(&file);
    assert_eq!(fs::read(farm.file(&path)).unwrap(), b"hello\n");
    assert!(!runner.file(&path).exists(), "the stores are one");
    runner.run(&["copy", "--no-check-sigs", "--from", &runner.remote(), &path]);
    assert_eq!(fs::read(runner.file(&path)).unwrap(), b"hello\n");
}

#[test]
fn a_failing_build_shows_its_log_and_fails() {
    let farm = Farm::start();
    let runner = farm.runner();
    let file = runner.derivation("bad", "echo this went wrong; exit 3");
    let output = runner.build(&file).output().unwrap();
    let (_, log) = texts(&output);
    assert!(
        log.contains("bad> this went wrong") && log.contains("failed with exit code 3"),
        "{log}"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn copies_64_mib_each_way() {
    let farm = Farm::start();
    let (runner, other) = (farm.runner(), farm.runner());
    let mut random = Vec::new();
    fs::File::open("/dev/urandom")
        .unwrap()
        .take(64 << 20)
        .read_to_end(&mut random)
        .unwrap();
    let source = Dir::new();
    fs::write(source.path("random"), &random).unwrap();
    let path = runner.run(&["store", "add-file", source.path("random").to_str().unwrap()]);
    let path = path.trim();
    runner.run(&["copy", "--no-check-sigs", "--to", &runner.remote(), path]);
    assert!(
        fs::read(farm.file(path)).unwrap() == random,
        "it changed on the way there"
    );
    other.run(&["copy", "--no-check-sigs", "--from", &other.remote(), path]);
    assert!(
        fs::read(other.file(path)).unwrap() == random,
        "it changed on the way back"
    );
    other.run(&["store", "verify", "--no-trust", path]);
}

#[test]
fn store_ping_and_path_info() {
    let farm = Farm::start();
    let (runner, remote) = (farm.runner(), farm.runner().remote());
    runner.run(&["store", "ping", "--store", &remote]);
    farm.relay.log.wait("session ended session=1 ");
    let file = runner.derivation("known", "echo > $out");
    let path = runner.out_path(&file);
    let info = ["path-info", "--store", &remote, &path];
    assert!(
        !runner.nix(&info).status().unwrap().success(),
        "it is not built yet"
    );
    assert!(runner.build(&file).status().unwrap().success());
    assert_eq!(runner.run(&info).trim(), path);
    assert!(
        !runner
            .nix(&["path-info", &path])
            .status()
            .unwrap()
            .success(),
        "the stores are one"
    );
}

/// Each part of each build is a session of its own, and waits until all twelve are there.
#[test]
fn four_builds_at_once_over_several_connections_each() {
    let farm = Farm::start();
    let meeting = Dir::new();
    let script = "echo > DIR/$name; until [ $(/bin/ls DIR | /usr/bin/wc -l) = 12 ]; do \
                  /bin/sleep 0.05; done; echo > $out"
        .replace("DIR", meeting.path("").to_str().unwrap());
    let runners: Vec<Runner> = (0..4).map(|_| farm.runner()).collect();
    let builds = runners.iter().enumerate().map(|(number, runner)| {
        let parts = (0..3).map(|part| derivation(&format!("part-{part}-of-{number}"), &script));
        let parts = parts
            .map(|part| format!("({part})"))
            .collect::<Vec<_>>()
            .join(" ");
        let builders = format!("{} - - 3", runner.remote());
        let file = runner.expression("parts", &format!("[ {parts} ]"));
        let arguments = [
            "build",
            "-j0",
            "--no-link",
            "--builders",
            &builders,
            "-f",
            &file,
        ];
        runner.nix(&arguments).spawn().unwrap()
    });
    for mut build in builds.collect::<Vec<_>>() {
        assert!(wait(&mut build, LIMIT).success());
    }
    farm.relay.log.wait("session opened session=12 ");
}

/// Breaks a build off in the middle, after which nothing of it may be left.
fn a_build_ends_when(break_off: impl FnOnce(&mut std::process::Child, &Proxy)) {
    let farm = Farm::start_with(|setup| setup.set("MAX_CONNECTIONS", "2"));
    let proxy = Proxy::start(&farm.relay);
    let runner = farm.runner_for(proxy.address);
    let mark = format!("mark-of-{}", proxy.address.port());
    let file = runner.derivation(&mark, "echo started; /bin/sleep 600; echo not reached");
    let mut build = runner.build(&file).stderr(Stdio::piped()).spawn().unwrap();
    Log::of(build.stderr.take().unwrap()).wait("> started");
    assert!(anyone_with(&format!("name={mark}")) && !farm.relay.children().is_empty());
    break_off(&mut build, &proxy);
    eventually(
        "builder, shell and nix-daemon are gone",
        Duration::from_secs(15),
        || !anyone_with(&format!("name={mark}")) && farm.relay.children().is_empty(),
    );
    assert!(!wait(&mut build, LIMIT).success());
    let token = farm.issuer.token();
    let _both_permits = [farm.relay.connect(&token), farm.relay.connect(&token)];
}

#[test]
fn a_build_ends_when_nix_is_terminated() {
    a_build_ends_when(|nix, _| signal("TERM", nix.id()));
}

#[test]
fn a_build_ends_when_nix_is_interrupted() {
    a_build_ends_when(|nix, _| signal("INT", nix.id()));
}

#[test]
fn a_build_ends_when_nix_is_killed() {
    a_build_ends_when(|nix, _| signal("KILL", nix.id()));
}

#[test]
fn a_build_ends_when_the_client_is_killed() {
    a_build_ends_when(|nix, _| {
        let is_client = |id: &u32| {
            let name = fs::read_to_string(format!("/proc/{id}/comm"));
            name.is_ok_and(|name| name.trim() == "websocat")
        };
        signal(
            "KILL",
            descendants(nix.id()).into_iter().find(is_client).unwrap(),
        );
    });
}

#[test]
fn a_build_ends_when_the_connection_is_reset() {
    a_build_ends_when(|_, proxy| proxy.reset());
}

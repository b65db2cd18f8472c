//! A real nix, through each client and the relay, to a real nix-daemon with a store of its own.

use crate::support::{nix::*, *};
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A test for each client.
macro_rules! with_each_client {
    ($($test:ident),*) => {$(mod $test {
        #[test]
        fn native() {
            super::$test(crate::support::nix::native());
        }

        #[test]
        fn script() {
            super::$test(crate::support::nix::script());
        }
    })*};
}

with_each_client! {
    a_build_happens_remotely_and_its_result_comes_back,
    a_failing_build_shows_its_log_and_fails,
    copies_64_mib_each_way,
    store_ping_and_path_info,
    four_builds_at_once_over_several_connections_each,
    a_build_ends_when_nix_is_terminated,
    a_build_ends_when_nix_is_interrupted,
    a_build_ends_when_nix_is_killed,
    a_build_ends_when_the_client_is_killed,
    a_build_ends_when_the_connection_is_reset,
    sessions_end_well
}

fn a_build_happens_remotely_and_its_result_comes_back(client: PathBuf) {
    let farm = Farm::start();
    let runner = farm.runner().with(client);
    let file = runner.derivation("hello", "echo in the builder; echo hello > $out");
    let (_, log) = texts(&runner.build(&file).output().unwrap());
    assert!(log.contains("hello> in the builder"), "{log}");
    let path = runner.out_path(&file);
    assert_eq!(fs::read(farm.file(&path)).unwrap(), b"hello\n");
    assert!(!runner.file(&path).exists(), "the stores are one");
    runner.run(&["copy", "--no-check-sigs", "--from", &runner.remote(), &path]);
    assert_eq!(fs::read(runner.file(&path)).unwrap(), b"hello\n");
}

fn a_failing_build_shows_its_log_and_fails(client: PathBuf) {
    let farm = Farm::start();
    let runner = farm.runner().with(client);
    let file = runner.derivation("bad", "echo this went wrong; exit 3");
    let output = runner.build(&file).output().unwrap();
    let (_, log) = texts(&output);
    assert!(
        log.contains("bad> this went wrong") && log.contains("failed with exit code 3"),
        "{log}"
    );
    assert_eq!(output.status.code(), Some(1));
}

fn copies_64_mib_each_way(client: PathBuf) {
    let farm = Farm::start();
    let runner = farm.runner().with(client.clone());
    let other = farm.runner().with(client);
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

fn store_ping_and_path_info(client: PathBuf) {
    let farm = Farm::start();
    let runner = farm.runner().with(client);
    let remote = runner.remote();
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
fn four_builds_at_once_over_several_connections_each(client: PathBuf) {
    let farm = Farm::start();
    let meeting = Dir::new();
    let script = "echo > DIR/$name; until [ $(/bin/ls DIR | /usr/bin/wc -l) = 12 ]; do \
                  /bin/sleep 0.05; done; echo > $out"
        .replace("DIR", meeting.path("").to_str().unwrap());
    let runners: Vec<Runner> = (0..4).map(|_| farm.runner().with(client.clone())).collect();
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
fn a_build_ends_when(client: PathBuf, break_off: impl FnOnce(&mut std::process::Child, &Proxy)) {
    let farm = Farm::start_with(|setup| setup.set("MAX_CONNECTIONS", "2"));
    let proxy = Proxy::start(farm.relay.address);
    let runner = farm.runner_for(proxy.address).with(client);
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

fn a_build_ends_when_nix_is_terminated(client: PathBuf) {
    a_build_ends_when(client, |nix, _| signal("TERM", nix.id()));
}

fn a_build_ends_when_nix_is_interrupted(client: PathBuf) {
    a_build_ends_when(client, |nix, _| signal("INT", nix.id()));
}

fn a_build_ends_when_nix_is_killed(client: PathBuf) {
    a_build_ends_when(client, |nix, _| signal("KILL", nix.id()));
}

/// The process of it that has the connection: the last one of nix-relay's two.
fn a_build_ends_when_the_client_is_killed(client: PathBuf) {
    a_build_ends_when(client, |nix, _| {
        let has_connection = |id: &u32| {
            let name = fs::read_to_string(format!("/proc/{id}/comm"));
            name.is_ok_and(|name| ["websocat", "nix-relay"].contains(&name.trim()))
        };
        let mut all = descendants(nix.id()).into_iter().filter(has_connection);
        signal("KILL", all.next_back().unwrap());
    });
}

fn a_build_ends_when_the_connection_is_reset(client: PathBuf) {
    a_build_ends_when(client, |_, proxy| proxy.reset());
}

/// Nix kills its client when it is done, which the relay is to hear of as a good end.
fn sessions_end_well(client: PathBuf) {
    let farm = Farm::start();
    let runner = farm.runner().with(client);
    let file = runner.derivation("hello", "echo hello > $out");
    let remote = runner.remote();
    for _ in 0..3 {
        runner.run(&["store", "ping", "--store", &remote]);
    }
    assert!(runner.build(&file).status().unwrap().success());
    let path = runner.out_path(&file);
    runner.run(&["copy", "--no-check-sigs", "--from", &remote, &path]);
    all_ended_well(&farm, &runner);
}

/// As from a terminal, whose Ctrl-C all of the foreground hears. It ends client.sh's websocat at once.
#[test]
fn ctrl_c_ends_a_session_well() {
    let farm = Farm::start();
    let runner = farm.runner().with(native());
    let file = runner.derivation("slow", "echo started; /bin/sleep 600");
    let mut build = runner.build(&file);
    let mut build = build
        .process_group(0)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::of(build.stderr.take().unwrap());
    log.wait("> started");
    let group = format!("kill -INT -{}", build.id());
    assert!(
        Command::new("sh")
            .args(["-c", &group])
            .status()
            .unwrap()
            .success()
    );
    assert!(!wait(&mut build, LIMIT).success());
    all_ended_well(&farm, &runner);
    assert!(!log.text().contains("nix-relay: "), "{}", log.text());
}

fn all_ended_well(farm: &Farm, runner: &Runner) {
    let count = |what: &str| farm.relay.log.text().matches(what).count();
    eventually("all sessions have ended", LIMIT, || {
        count("session ended") == count("session opened")
    });
    assert_eq!(count(" reason=client-closed "), count("session ended"));
    eventually("no process is left", LIMIT, || !runner.has_processes());
}

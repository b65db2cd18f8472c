//! The relay as one of Nix's `builders`, and `builders` behind the relay.

use crate::support::{nix::*, *};
use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

/// The lines for nix.conf from README.md, and those of the tests.
fn config() -> String {
    let readme = fs::read_to_string(project("README.md")).unwrap();
    let section = readme.split_once("### As one of the builders\n").unwrap().1;
    let block = section
        .split_once("```ini\nbuilders = ")
        .unwrap()
        .1
        .split_once("```")
        .unwrap()
        .0;
    let client = "/usr/local/bin/nix-relay";
    let system = "x86_64-linux";
    assert!(block.contains(client) && block.contains(system) && block.contains("max-jobs = 0"));
    let here = format!("{}-linux", std::env::consts::ARCH);
    let block = block
        .replace(client, env!("CARGO_BIN_EXE_nix-relay"))
        .replace(system, &here);
    format!("{CONFIG}builders = {block}")
}

/// A nix-daemon for all whose store is in `dir`, and what it says.
struct Daemon(Child, Log);

impl Daemon {
    fn start(command: &mut Command) -> Daemon {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::of(child.stderr.take().unwrap());
        Daemon(child, log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log:\n{}\n---", self.1.text());
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn builds_there_what_is_wanted_here() {
    let farm = Farm::start();
    let runner = farm.runner();
    let needed = derivation("needed", "echo hello > $out");
    let script = format!("read line < ${{{needed}}}; echo $line again > $out");
    let file = runner.derivation("hello", &script);
    let output = runner
        .nix(&["build", "-L", "--no-link", "-f", &file])
        .env("NIX_CONFIG", config())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", texts(&output).1);
    let path = runner.out_path(&file);
    assert_eq!(fs::read(runner.file(&path)).unwrap(), b"hello again\n");
    assert_eq!(fs::read(farm.file(&path)).unwrap(), b"hello again\n");
}

#[test]
fn a_build_that_fails_there() {
    let farm = Farm::start();
    let runner = farm.runner();
    let file = runner.derivation("failing", "echo the reason; exit 1");
    let mut build = runner.nix(&["build", "-L", "--no-link", "-f", &file]);
    let said = texts(&build.env("NIX_CONFIG", config()).output().unwrap()).1;
    assert!(said.contains("the reason"), "{said}");
    let row = ["error: path '", "' is not valid"];
    let has_row = row.iter().all(|part| said.contains(part));
    assert_eq!(has_row, nix_version() >= (2, 26), "{said}");
}

/// The build hook runs where the store is.
#[test]
fn with_a_nix_daemon_here_the_variables_must_be_its() {
    let farm = Farm::start();
    let runner = farm.runner();
    let build = |store: &str, name: &str| {
        let file = runner.derivation(name, "echo hello > $out");
        let mut nix = runner.nix(&["build", "-L", "--no-link", "-f", &file]);
        let output = nix
            .env("NIX_CONFIG", config())
            .env("NIX_REMOTE", store)
            .output()
            .unwrap();
        (output.status.success(), texts(&output).1)
    };
    for with_variables in [false, true] {
        let command = runner.nix(&[]);
        let store = command.get_args().next().unwrap();
        let is_ours = |name: &str| name.starts_with("NIX_RELAY_") || name.starts_with("ACTIONS_");
        let variables = command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?)));
        let mut daemon = Command::new(command.get_program());
        daemon
            .env_clear()
            .envs(variables.filter(|(name, _)| with_variables || !is_ours(name.to_str().unwrap())));
        let daemon = Daemon::start(
            daemon
                .arg(store)
                .arg("nix-daemon")
                .env("NIX_CONFIG", config()),
        );
        let ping = || {
            runner
                .nix(&["store", "ping", "--store", "daemon"])
                .status()
                .unwrap()
                .success()
        };
        eventually("the daemon is there", LIMIT, ping);
        let (built, log) = build("daemon", "by-the-daemon");
        assert_eq!(built, with_variables, "{log}");
        if !built {
            daemon.1.wait("nix-relay: set NIX_RELAY_URL");
            let (built, log) = build("local", "without-the-daemon");
            assert!(built, "{log}");
        }
    }
}

/// What services.nix-relay-client writes, with a nix-daemon that knows nothing else of the relay. Its PATH is no
/// longer than on NixOS.
#[test]
fn a_nixos_machine_as_a_client() {
    let (farm, dir) = (Farm::start(), Dir::new());
    let runner = farm.runner();
    let client = &crate::nixos::module()["client"];
    let script = client["builder"].as_str().unwrap();
    let (keys, url) = (dir.path(""), format!("ws://{}", farm.relay.address));
    let script = script
        .replace("/run/keys/", &keys.display().to_string())
        .replace("wss://relay.example.com", &url)
        .replace("/nix-relay/bin/nix-relay", env!("CARGO_BIN_EXE_nix-relay"));
    let builder = dir.script("builder", "exec bash \"$0.bash\" \"$@\"");
    dir.write("builder.bash", &script);
    dir.write("it's", "no token");
    let line = client["line"].as_str().unwrap();
    let line = line
        .replace("/nix-relay-builder", &builder.display().to_string())
        .replace("x86_64", std::env::consts::ARCH);
    let machines = dir.write("machines", &line).display().to_string();
    let config =
        format!("{CONFIG}builders = @{machines}\nmax-jobs = 0\nbuilders-use-substitutes = true\n");

    let mut daemon = job(project("test/support/own-store"), &dir);
    daemon.args(runner.nix(&[]).get_args().take(1));
    let programs = dir.path("programs");
    fs::create_dir(&programs).unwrap();
    assert_eq!(client["path"], json!(["/bash"]));
    for program in ["nix", "nix-daemon", "cat", "bash", "sh"] {
        let found = Command::new("which").arg(program).output().unwrap();
        symlink(texts(&found).0.trim(), programs.join(program)).unwrap();
    }
    let path = format!("PATH={}", programs.display());
    daemon.args(["env", &path, "nix-daemon"]);
    let _daemon = Daemon::start(daemon.env("NIX_CONFIG", &config));

    let ping = || {
        let ping = ["store", "ping", "--store", "daemon"];
        runner.nix(&ping).status().unwrap().success()
    };
    eventually("the daemon is there", LIMIT, ping);
    let file = runner.derivation("hello", "echo hello > $out");
    let build = || {
        let mut nix = runner.nix(&["build", "-L", "--no-link", "-f", &file]);
        nix.env("NIX_REMOTE", "daemon").env("NIX_CONFIG", &config);
        texts(&nix.output().unwrap()).1
    };
    let log = build();
    assert!(log.contains("nix-relay: the token from "), "{log}");
    dir.write("it's", &farm.issuer.token());
    let log = build();
    let path = runner.out_path(&file);
    assert!(runner.file(&path).exists(), "{log}");
    assert_eq!(fs::read(farm.file(&path)).unwrap(), b"hello\n");
}

/// The relay's nix-daemon builds nothing itself: it has a builder in turn, which it reaches through another relay.
#[test]
fn the_daemon_behind_the_relay_has_builders_itself() {
    let far = Farm::start();
    let dir = Dir::new();
    let url = far.relay.address;
    let token = far.issuer.token();
    let client = project("client.sh");
    let way = format!(
        "export NIX_RELAY_URL=ws://{url} NIX_RELAY_TOKEN={token}\nexec {}",
        client.display()
    );
    let way = dir.script("way", &way);
    let builders = format!(
        "{CONFIG}max-jobs = 0\nbuilders = ssh-ng://localhost?remote-program={}\n",
        way.display()
    );
    let path = job("", &dir)
        .get_envs()
        .find(|(name, _)| *name == "PATH")
        .unwrap()
        .1
        .unwrap()
        .to_owned();
    let near = Farm::start_with(|setup| {
        setup
            .env("NIX_CONFIG", &builders)
            .env("PATH", path.to_str().unwrap())
    });
    let runner = near.runner();
    let file = runner.derivation("hello", "echo hello > $out");
    let output = runner.build(&file).output().unwrap();
    assert!(output.status.success(), "{}", texts(&output).1);
    let path = runner.out_path(&file);
    assert_eq!(fs::read(near.file(&path)).unwrap(), b"hello\n");
    assert_eq!(fs::read(far.file(&path)).unwrap(), b"hello\n");
}

/// As an unprivileged user, nix-daemon hands all to that of the system.
#[test]
fn a_builder_must_trust_its_clients() {
    let farm = Farm::start();
    let dir = Dir::new();
    let store = format!(
        "{} {}",
        project("test/support/own-store").display(),
        dir.path("nix").display()
    );
    let in_store = |program: &str| {
        let mut command = job("sh", &dir);
        command
            .args(["-c", &format!("exec {store} {program}")])
            .env("NIX_CONFIG", CONFIG);
        command
    };
    assert!(in_store("nix-store --init").status().unwrap().success());
    let _system = Daemon::start(&mut in_store("nix-daemon"));
    let ping = || {
        in_store("nix store ping --store daemon")
            .status()
            .unwrap()
            .success()
    };
    eventually("the daemon is there", LIMIT, ping);
    let nobody = format!(
        "exec {store} setpriv --reuid=65534 --regid=65534 --clear-groups nix-daemon \"$@\""
    );
    let setup = Setup::new(&farm.issuer)
        .daemon(&nobody)
        .env("NIX_REMOTE", "daemon")
        .env("NIX_CONFIG", CONFIG);
    let relay = setup.env("HOME", "/").start();
    let runner = farm.runner_for(relay.address);
    // Builds with the builder: whether the result is here then, and what Nix says.
    let build = |file: &str| {
        let mut nix = runner.nix(&["build", "-L", "--no-link", "-f", file]);
        let (_, log) = texts(&nix.env("NIX_CONFIG", config()).output().unwrap());
        (runner.file(&runner.out_path(file)).exists(), log)
    };
    let file = runner.derivation("hello", "echo hello > $out");
    let (built, log) = build(&file);
    if nix_version() < (2, 16) {
        let refusal = "you are not privileged to build input-addressed derivations";
        assert!(!built && log.contains(refusal), "{log}");
    } else {
        // Nix sees that it is not trusted, and has the derivation itself built there.
        assert!(built, "{log}");
    }
    // No Nix lets it say what was in an input that was built elsewhere.
    let needed = derivation("needed", "echo forged > $out");
    let input = runner.expression("needed", &needed);
    runner.run(&["build", "--no-link", "-f", &input]);
    let file = runner.derivation(
        "needs-it",
        &format!("read line < ${{{needed}}}; echo $line > $out"),
    );
    let (built, log) = build(&file);
    assert!(!built && lacks_signature(&log), "{log}");
    let output = runner.build(&file).output().unwrap();
    assert!(output.status.success(), "{}", texts(&output).1);
}

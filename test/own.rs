//! A store of its own for each rule, behind nix/nix-relay-store.

use crate::support::{nix::*, *};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// A copy of the binary, by another process: while one of ours has it open to write, a child that another test starts has
/// so, too, and nobody can run it.
fn install(to: &std::path::Path) {
    let status = Command::new("install").arg(native()).arg(to).status();
    assert!(status.unwrap().success());
}

/// Rules whose names are the branches that they are for. Without walls is how not to do it.
const RULES: &str = "
[[auth.rule]]
name = 'main'
bound_claims = { ref = 'main' }
extra_args = ['DIR/main', '--', 'nix-daemon', '--stdio']

[[auth.rule]]
name = 'other'
bound_claims = { ref = 'other' }
extra_args = ['DIR/other', '--', 'nix-daemon', '--stdio']

[[auth.rule]]
name = 'offline'
bound_claims = { ref = 'offline' }
extra_args = ['DIR/offline', '--unshare-net', '--', 'nix-daemon', '--stdio']

[[auth.rule]]
name = 'limited'
bound_claims = { ref = 'limited' }
extra_args = ['DIR/limited', '--', 'nix-daemon', '--stdio', '--option', 'cores', '3', '--option', 'timeout', '2']

[[auth.rule]]
name = 'no-walls'
bound_claims = { ref = 'no-walls' }
extra_args = ['--stdio', '--store', 'DIR/no-walls'SHELL]
";

struct Stores {
    issuer: Issuer,
    relay: Relay,
    dir: Dir,
}

impl Stores {
    fn start() -> Stores {
        Stores::start_after("true")
    }

    /// The same with commands that root runs before, with mounts of its own.
    fn start_after(commands: &str) -> Stores {
        let (issuer, dir) = (Issuer::start(), Dir::new());
        let place = dir.path("main").parent().unwrap().display().to_string();
        for store in ["main", "other", "offline", "limited", "no-walls", "home"] {
            fs::create_dir(dir.path(store)).unwrap();
        }
        // That user may not look into the project.
        install(&dir.path("nix-relay"));
        let script = fs::read_to_string(project("nix/nix-relay-store")).unwrap();
        let daemon = dir.script("nix-relay-store", &script);
        // Debian's Nix has none of its own for its sandbox.
        let shell = match fs::exists("/bin/busybox").unwrap() {
            true => ", '--option', 'sandbox-paths', '/bin/sh=/bin/busybox'",
            false => "",
        };
        let config = dir.write(
            "relay.toml",
            &RULES.replace("SHELL", shell).replace("DIR", &place),
        );
        let owner = ["-R", "65534:65534", &place];
        let owned = Command::new("chown").args(owner).status().unwrap();
        assert!(owned.success());
        let text = |path: PathBuf| path.display().to_string();
        let user = "setpriv --reuid=65534 --regid=65534 --clear-groups";
        let commands = commands.replace("DIR", &place);
        let setup = Setup::of(relay_at(&text(dir.path("nix-relay"))), &issuer)
            .env("NIX_RELAY_CONFIG", &text(config))
            .set("DAEMON_PATH", &text(daemon))
            .set("ALLOWED_ORG", "")
            .env("HOME", &text(dir.path("home")))
            .env("NIX_CONFIG", "substituters =\n")
            .under(&format!(
                "exec unshare --mount bash -ec '{commands}; exec {user} \"$0\"' \"$0\""
            ));
        let relay = setup.start();
        Stores { issuer, relay, dir }
    }

    /// A job on a branch.
    fn job(&self, branch: &str) -> Job {
        Job {
            url: format!("ws://{}", self.relay.address),
            token: self.issuer.token_with(json!({ "ref": branch })),
            home: Dir::new(),
        }
    }

    /// Where a store path is among the files of a rule.
    fn file(&self, rule: &str, store_path: &str) -> PathBuf {
        self.dir.path(&format!("{rule}{store_path}"))
    }

    /// Has a job on a branch run a program outside of any build, the hook after one, and returns what it says.
    fn hook(&self, branch: &str, script: &str) -> String {
        let job = self.job(branch);
        let hook = job.add("hook", &format!("#!/bin/sh\nexec 2>&1\n{script}\n"));
        job.nix(&["copy", "--no-check-sigs", "--to", REMOTE, &hook], "");
        let root = match branch {
            "no-walls" => self.dir.path(branch).display().to_string(),
            _ => "/own".into(),
        };
        let setting = format!("post-build-hook = {root}{hook}\n");
        let drv = derivation("any", "echo > $out");
        let output = job.building(&job.socket(), &drv, &setting).output();
        texts(&output.unwrap()).1
    }
}

const REMOTE: &str = "ssh-ng://localhost?remote-program=nix-relay";

/// Over a socket, they are the daemon's as well.
const SETTINGS: &str =
    "build-users-group =\nsubstituters =\nextra-experimental-features = nix-command flakes\n";

/// A machine whose store is in its home, under the name that stores have everywhere.
struct Job {
    url: String,
    token: String,
    home: Dir,
}

impl Job {
    fn command(&self, arguments: &[&str], settings: &str) -> Command {
        let programs = native().parent().unwrap().display().to_string();
        // Without this right, Nix leaves mount namespaces alone.
        let mut command = job("setpriv", &self.home);
        command
            .args(["--bounding-set=-sys_admin", "nix"])
            .args(arguments)
            .env("NIX_REMOTE", self.home.path("root"))
            .env("NIX_CONFIG", format!("{SETTINGS}{settings}"))
            .env("NIX_RELAY_URL", &self.url)
            .env("NIX_RELAY_TOKEN", &self.token);
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap());
        command.env("PATH", path);
        command
    }

    /// A `nix` that must succeed: what it prints, and what it says.
    fn nix(&self, arguments: &[&str], settings: &str) -> (String, String) {
        let output = self.command(arguments, settings).output().unwrap();
        let (out, log) = texts(&output);
        assert!(output.status.success(), "nix {arguments:?}:\n{log}");
        (out.trim().to_owned(), log)
    }

    /// Adds an executable file to the store of this machine.
    fn add(&self, name: &str, text: &str) -> String {
        let file = self.home.script(name, "");
        fs::write(&file, text).unwrap();
        self.nix(&["store", "add-path", file.to_str().unwrap()], "")
            .0
    }

    /// The same store as a local daemon: to that, Nix passes all settings on.
    fn socket(&self) -> String {
        let (path, command) = (self.home.path("socket"), self.command(&[], ""));
        let variables = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
        let (listener, variables) = (
            UnixListener::bind(&path).unwrap(),
            variables.collect::<Vec<_>>(),
        );
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut client = Command::new(native());
                client.arg("--stdio").env_clear().envs(variables.clone());
                client.stdin(OwnedFd::from(stream.try_clone().unwrap()));
                let client = client.stdout(OwnedFd::from(stream)).spawn();
                thread::spawn(move || client.unwrap().wait());
            }
        });
        format!("unix://{}", path.display())
    }

    fn building(&self, remote: &str, expression: &str, settings: &str) -> Command {
        // `auto` would be the machine's own.
        let here = self.home.path("root").display().to_string();
        let remote = ["--eval-store", &here, "--store", remote, "-L", "--no-link"];
        let what = ["--impure", "--expr", expression];
        self.command(&[&["build"], &remote[..], &what].concat(), settings)
    }

    /// Builds behind the relay: the path of the result, and what Nix says.
    fn build(&self, expression: &str, settings: &str) -> (String, String) {
        let output = self
            .building(REMOTE, expression, settings)
            .output()
            .unwrap();
        let (_, log) = texts(&output);
        assert!(output.status.success(), "{log}");
        (self.out_path(expression), log)
    }

    fn out_path(&self, expression: &str) -> String {
        let expression = format!("({expression}).outPath");
        self.nix(&["eval", "--raw", "--impure", "--expr", &expression], "")
            .0
    }
}

#[test]
fn a_job_is_trusted_in_its_own_store_and_sees_no_other() {
    let stores = Stores::start();
    let (job, other) = (stores.job("main"), stores.job("other"));
    let script = "echo in the sandbox: $(cd / && echo *); echo hello > $out";
    let (built, log) = job.build(&derivation("hello", script), "");
    assert!(
        log.contains("sandbox: bin build dev etc nix proc tmp"),
        "{log}"
    );
    assert!(stores.file("main", &built).exists());
    job.nix(&["copy", "--no-check-sigs", "--from", REMOTE, &built], "");
    // Nobody signed this.
    let added = job.add("added", "anything");
    job.nix(&["copy", "--no-check-sigs", "--to", REMOTE, &added], "");
    for path in [&built, &added] {
        let seen = ["path-info", "--store", REMOTE, path];
        job.nix(&seen, "");
        assert!(!other.command(&seen, "").status().unwrap().success());
        assert!(!stores.file("other", path).exists());
    }
}

/// What a job may set runs as the relay's user. Within the walls there is nothing of the relay to be had, and nothing of
/// another rule.
#[test]
fn hooks_cannot_leave_the_store() {
    let stores = Stores::start();
    let relay = stores.relay.child.id();
    let secret = stores.dir.write("secret", "outside");
    let port = stores.relay.address.port();
    stores
        .job("other")
        .build(&derivation("hidden", "echo > $out"), "");
    let others = fs::read_dir(stores.dir.path("other/nix/store")).unwrap();
    let hidden = others
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .find(|name| name.ends_with("-hidden"));
    let attack = format!(
        "echo the hook runs
         cat {secret} && echo REACHED FILE
         ls -d {dir}/other {dir}/relay.toml && echo REACHED PLACE
         find /own {dir} -name {hidden} 2>/dev/null | grep . && echo REACHED STORE
         kill -0 {relay} && echo REACHED SIGNAL
         grep -qx nix-relay /proc/[0-9]*/comm && echo REACHED PROCESS
         cat /proc/[12]/environ | grep -z . && echo REACHED ENVIRONMENT
         touch /usr/bin/x /etc/x && echo REACHED WRITE
         umount /usr && echo REACHED UMOUNT
         ls -d /home /root /run /var /srv /sys && echo REACHED MACHINE
         bash -c 'exec 2>/dev/null; : </dev/tcp/127.0.0.1/{port}' && echo REACHED NETWORK
         (trap '' HUP; exec sleep 600.{port}) >/dev/null 2>&1 & sleep 0.1; [ -e /own ] || kill $!",
        secret = secret.display(),
        dir = secret.parent().unwrap().display(),
        hidden = hidden.unwrap(),
    );
    let reached = |branch: &str| {
        let log = stores.hook(branch, &attack);
        assert!(log.contains("the hook runs"), "{log}");
        let words = log.split("REACHED ").skip(1);
        let words = words.map(|rest| rest.split_whitespace().next().unwrap());
        words.collect::<Vec<_>>().join(" ")
    };
    // The network is the machine's, as it is for every fixed-output build, unless the rule has none.
    assert_eq!(reached("main"), "NETWORK");
    eventually("what the hook left is gone", LIMIT, || {
        !anyone_with(&format!("600.{port}"))
    });
    assert_eq!(reached("offline"), "");
    let without = reached("no-walls");
    for what in [
        "FILE", "PLACE", "STORE", "SIGNAL", "PROCESS", "MACHINE", "NETWORK",
    ] {
        assert!(without.contains(what), "{what} is no test: {without}");
    }
}

#[test]
fn as_one_of_the_builders() {
    let stores = Stores::start();
    let script = "read line < ${(NEEDED)}; echo $line again > $out";
    let job = stores.job("main");
    let needed = derivation("needed", "echo hello > $out");
    let expression = derivation("both", &script.replace("NEEDED", &needed));
    let builders = format!("builders = {REMOTE} - - 2\nmax-jobs = 0\n");
    let what = ["build", "--no-link", "--impure", "--expr", &expression];
    job.nix(&what, &builders);
    let here = job.home.path(&format!("root{}", job.out_path(&expression)));
    assert_eq!(fs::read(here).unwrap(), b"hello again\n");
}

/// Its builders are the relay's descendants now.
#[test]
fn a_cancelled_build_leaves_nothing() {
    let stores = Stores::start();
    let job = stores.job("main");
    let slow = derivation("slow", "echo started; /bin/sh -c 'kill -STOP $$'; true");
    for ends in ["nix", "relay"] {
        let mut nix = job.building(REMOTE, &slow, "");
        let mut nix = nix.stderr(Stdio::piped()).spawn().unwrap();
        Log::of(nix.stderr.take().unwrap()).wait("> started");
        let below = stores.relay.children();
        assert!(below.len() > 4, "{below:?}");
        let id = match ends {
            "nix" => nix.id(),
            _ => stores.relay.child.id(),
        };
        signal("KILL", id);
        eventually("nothing of it is left", Duration::from_secs(15), || {
            let there = |id: &u32| fs::read_link(format!("/proc/{id}/exe")).is_ok();
            !below.iter().any(there)
        });
        wait(&mut nix, LIMIT);
        let lock = format!("{}.lock", job.out_path(&slow));
        fs::File::open(stores.file("main", &lock))
            .unwrap()
            .try_lock()
            .unwrap();
    }
}

/// Four in each of two stores, of which each waits for those in its own.
#[test]
fn builds_at_once() {
    let (stores, mut running) = (Stores::start(), Vec::new());
    for store in ["main", "other"] {
        let meet = "extra-sandbox-paths = /meet=/tmp\n";
        stores.dir.write(&format!("{store}/nix.conf"), meet);
    }
    let script = "echo > /meet/$name; until [ -e /meet/0 -a -e /meet/1 -a -e /meet/2 -a -e /meet/3 ]; do \
                  read line < /dev/null; done; echo > $out";
    for (branch, number) in (0..8).map(|n| (["main", "other"][n % 2], n / 2)) {
        let (job, drv) = (stores.job(branch), derivation(&number.to_string(), script));
        // Before the build, for which its database may be busy.
        let path = job.out_path(&drv);
        let nix = job.building(REMOTE, &drv, "").spawn().unwrap();
        running.push((nix, path, branch, job));
    }
    for (mut nix, path, branch, _job) in running {
        assert!(wait(&mut nix, LIMIT).success());
        assert!(stores.file(branch, &path).exists());
    }
}

/// Nix finds out by process ids which sessions are there; each has process ids of its own.
#[test]
fn a_collection_spares_what_a_session_uses() {
    let stores = Stores::start();
    let (job, other) = (stores.job("main"), stores.job("main"));
    stores
        .dir
        .write("main/nix.conf", "extra-sandbox-paths = /meet=/tmp\n");
    let input = derivation("input", "echo in use > $out");
    let script = "echo started; until [ -e /meet/go ]; do read line < /dev/null; done; \
                  read -r line < ${(INPUT)}; echo $line > $out";
    let drv = derivation("user", &script.replace("INPUT", &input));
    let input = job.out_path(&input);
    let mut nix = job.building(REMOTE, &drv, "");
    let mut nix = nix.stderr(Stdio::piped()).spawn().unwrap();
    Log::of(nix.stderr.take().unwrap()).wait("> started");
    let garbage = other.add("garbage", "not in use");
    other.nix(&["copy", "--no-check-sigs", "--to", REMOTE, &garbage], "");
    other.nix(&["store", "gc", "--store", REMOTE], "");
    assert!(!stores.file("main", &garbage).exists());
    assert!(stores.file("main", &input).exists());
    stores.dir.write("main/tmp/go", "");
    assert!(wait(&mut nix, LIMIT).success());
    let built = job.out_path(&drv);
    assert_eq!(fs::read(stores.file("main", &built)).unwrap(), b"in use\n");
    // As an operator keeps one.
    let roots = stores.dir.path("main/nix/var/nix/gcroots/kept");
    std::os::unix::fs::symlink(&built, &roots).unwrap();
    other.nix(&["store", "gc", "--store", REMOTE], "");
    assert!(stores.file("main", &built).exists());
    fs::remove_file(roots).unwrap();
    other.nix(&["store", "gc", "--store", REMOTE], "");
    assert!(!stores.file("main", &built).exists());
}

#[test]
fn a_full_disk_is_one_rules_alone() {
    let stores =
        Stores::start_after("mount -t tmpfs -o size=16m,mode=700,uid=65534 tmpfs DIR/main");
    let big = derivation(
        "big",
        "while echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; do :; done > $out",
    );
    let output = stores
        .job("main")
        .building(REMOTE, &big, "")
        .output()
        .unwrap();
    let (_, log) = texts(&output);
    assert!(
        !output.status.success() && log.contains("No space left"),
        "{log}"
    );
    stores
        .job("other")
        .build(&derivation("small", "echo > $out"), "");
    stores
        .job("main")
        .nix(&["store", "gc", "--store", REMOTE], "");
    stores
        .job("main")
        .build(&derivation("small", "echo > $out"), "");
}

/// Which ssh-ng does not pass on.
#[test]
fn settings_of_nix_for_a_rule() {
    let stores = Stores::start();
    let drv = derivation(
        "slow",
        "echo cores: $NIX_BUILD_CORES; /bin/sh -c 'kill -STOP $$'; true",
    );
    let output = stores
        .job("limited")
        .building(REMOTE, &drv, "cores = 1\n")
        .output();
    let (_, log) = texts(&output.unwrap());
    assert!(
        log.contains("cores: 3") && log.contains("timed out after 2 seconds"),
        "{log}"
    );
}

/// The first block of own-stores.md, run as it stands where it can change nothing: /etc, /usr/local/bin and /var/lib are
/// copies, or empty, and there is no systemd. Then the relay, as the unit would start it.
#[test]
fn the_recipe_for_debian() {
    let page = fs::read_to_string(project("nix/own-stores.md")).unwrap();
    let section = page.split_once("## Debian\n\n").unwrap().1;
    let block = section
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.starts_with("    ") || line.is_empty());
    let block = block
        .map(|line| line.strip_prefix("    ").unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    let (issuer, dir) = (Issuer::start(), Dir::new());
    for name in ["target/release", "programs", "etc"] {
        fs::create_dir_all(dir.path(name)).unwrap();
    }
    install(&dir.path("target/release/nix-relay"));
    std::os::unix::fs::symlink(project("nix"), dir.path("nix")).unwrap();
    dir.script("programs/systemctl", "echo systemctl \"$@\" >>log");
    // They are installed already, or the test cannot be run.
    dir.script("programs/apt-get", "echo apt-get \"$@\" >>log");
    dir.write("recipe", &block);
    let unit = fs::read_to_string(project("nix/own-stores.conf")).unwrap();
    let daemon = unit
        .lines()
        .find_map(|line| line.strip_prefix("Environment=NIX_RELAY_DAEMON_PATH="));
    let relay = Setup::of(relay_at("/usr/local/bin/nix-relay"), &issuer)
        .set("ALLOWED_ORG", "")
        .set("DAEMON_PATH", daemon.unwrap())
        .set("AUDIENCE", issuer::AUDIENCE)
        .env("NIX_RELAY_CONFIG", "/etc/nix-relay.toml")
        .env("NIX_CONFIG", "substituters =\n")
        .under(&format!(
            "cd {}; exec unshare --mount bash -euc '
             cp -a /etc/. etc; mount --bind etc /etc
             mount -t tmpfs tmpfs /usr/local/bin; mount -t tmpfs tmpfs /var/lib
             sed -i /^nix-relay:/d /etc/passwd /etc/shadow /etc/group /etc/gshadow
             PATH=$PWD/programs:$PATH sh -eu recipe >&2
             mkdir -m 700 /var/lib/nix-relay; chown nix-relay: /var/lib/nix-relay
             exec setpriv --reuid=nix-relay --regid=nix-relay --clear-groups \"$0\"' \"$0\"",
            dir.path("").display()
        ))
        .start();
    let job = Job {
        url: format!("ws://{}", relay.address),
        token: issuer.token_with(json!({ "repository_owner": "your-organisation" })),
        home: Dir::new(),
    };
    let (_, log) = job.build(&derivation("any", "echo here; echo > $out"), "");
    assert!(log.contains("any> here"), "{log}");
    relay.log.wait("rule=\"everything else\"");
    let told = fs::read_to_string(dir.path("log")).unwrap();
    assert!(
        told.starts_with("apt-get install ")
            && told.contains("\nsystemctl enable --now nix-relay "),
        "{told}"
    );
}

#[test]
fn systemd_takes_the_units() {
    let (dir, program) = (Dir::new(), env!("CARGO_BIN_EXE_nix-relay"));
    let wrapper = project("nix/nix-relay-store").display().to_string();
    let copy = |name: &str, to: &str| {
        let text = fs::read_to_string(project("nix").join(name)).unwrap();
        let text = text.replace("/usr/local/bin/nix-relay-store", &wrapper);
        dir.write(to, &text.replace("/usr/local/bin/nix-relay", program))
            .display()
            .to_string()
    };
    let relay = copy("nix-relay.service", "nix-relay.service");
    fs::create_dir(dir.path("nix-relay.service.d")).unwrap();
    copy("own-stores.conf", "nix-relay.service.d/own-stores.conf");
    let collection = copy("nix-relay-gc@.service", "nix-relay-gc@main.service");
    let timer = copy("nix-relay-gc@.timer", "nix-relay-gc@main.timer");
    let security = ["security", "--offline=yes", "--threshold=30", &relay];
    let verify = ["verify", "--man=no", &relay, &collection, &timer];
    for arguments in [&security[..], &verify] {
        let mut analyze = Command::new("systemd-analyze");
        analyze
            .args(arguments)
            .env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path("").display()));
        let output = analyze.output().unwrap();
        let (out, log) = texts(&output);
        assert!(output.status.success() && log.is_empty(), "{out}{log}");
    }
}

/// Such as a unit on NixOS has: no shell, and nothing of /usr.
#[test]
fn few_programs_are_enough() {
    let (dir, programs) = (Dir::new(), Dir::new());
    let wrapper = fs::read_to_string(project("nix/nix-relay-store")).unwrap();
    let wrapper = dir.script("nix-relay-store", &wrapper);
    let found = "find chmod rm mkdir id readlink bwrap unshare flock";
    let script = format!(
        "for name in {found}; do ln -s $(command -v $name) $1; done
         cp $(readlink -f $(command -v nix)) $1/nix-daemon; ln -s nix-daemon $1/nix-store
         chown 65534 $2; chmod 755 $1 $2"
    );
    let places = [&programs, &dir].map(|dir| dir.path("").display().to_string());
    let made = Command::new("bash")
        .args(["-euc", &script, "-"])
        .args(&places)
        .status();
    assert!(made.unwrap().success());
    let unit = fs::read_to_string(project("nix/nix-relay-gc@.service")).unwrap();
    let (_, command) = unit.split_once(" -- ").unwrap();
    let (command, _) = command.split_once("\nCap").unwrap();
    let [programs, store] = places;
    let script = format!(
        "PATH={programs} exec {} {store}/store --ro-bind {programs} {programs} -- {}",
        wrapper.display(),
        command.replace("\\\n", "")
    );
    let user = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/bin/sh",
        "-c",
        &script,
    ];
    let output = Command::new("setpriv").args(user).output().unwrap();
    let (_, log) = texts(&output);
    assert!(output.status.success() && !log.contains("flock:"), "{log}");
}

#[test]
fn the_wrapper_says_what_is_wrong() {
    let (dir, wrapper) = (Dir::new(), project("nix/nix-relay-store"));
    let wrapper = fs::read_to_string(wrapper).unwrap();
    let wrapper = dir
        .script("nix-relay-store", &wrapper)
        .display()
        .to_string();
    assert!(
        Command::new("chown")
            .arg("65534")
            .arg(dir.path(""))
            .status()
            .unwrap()
            .success()
    );
    let store = dir.path("store").display().to_string();
    let user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let runs = [
        (
            &[][..],
            &["--", "true"][..],
            "not for root: run the relay as a user of its own",
        ),
        (
            &user,
            &["nix-daemon", "--stdio"],
            "no program: extra_args must be STORE, then --, nix-daemon and --stdio",
        ),
        (&user, &["--", "no-such-program"], "no-such-program"),
    ];
    for (before, after, says) in runs {
        let all = [before, &[&wrapper, &store], after].concat();
        let output = Command::new(all[0]).args(&all[1..]).output().unwrap();
        let (_, log) = texts(&output);
        assert!(!output.status.success() && log.contains(says), "{log}");
    }
}

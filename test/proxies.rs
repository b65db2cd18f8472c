//! Behind nginx, HAProxy and Caddy, as the files in nix/ configure them.

use crate::support::{nix::*, *};
use rustix::net::{self, AddressFamily, SocketType, sockopt};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Each runs in a directory of its own, from a file `conf`.
pub struct Program {
    name: &'static str,
    /// Its configuration, in nix/.
    file: &'static str,
    /// What its package has around that file.
    around: &'static str,
    /// In that file, and here.
    listen: (&'static str, &'static str),
    start: &'static str,
    /// What it says once it can be reloaded, too.
    ready: &'static str,
    /// $0 is its process.
    reload: &'static str,
}

pub static NGINX: Program = Program {
    name: "nginx",
    file: "nginx.conf",
    around: "daemon off; worker_processes 2; error_log stderr notice; pid pid; events {}
        http { access_log /dev/stdout; client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c;
        uwsgi_temp_path d; scgi_temp_path e;\nFILE}",
    listen: ("listen 443 ssl;", "listen 127.0.0.1:PORT ssl reuseport;"),
    start: "exec nginx -e stderr -p $PWD -c $PWD/conf",
    ready: "start worker process ",
    reload: "kill -HUP $0",
};

static HAPROXY: Program = Program {
    name: "haproxy",
    file: "haproxy.cfg",
    around:
        "global\n log stdout format raw local0\ndefaults\n log global\n mode http\n option httplog
        timeout connect 5s\n timeout client 50s\n timeout server 50s\nFILE",
    listen: ("bind :443 ", "bind 127.0.0.1:PORT "),
    start: "exec haproxy -W -f conf",
    ready: "Loading success",
    reload: "kill -USR2 $0",
};

static CADDY: Program = Program {
    name: "caddy",
    file: "Caddyfile",
    around: "{\n admin unix/admin\n auto_https disable_redirects\n}\nFILE",
    listen: (
        "relay.example.com {",
        "https://localhost:PORT {\nbind 127.0.0.1",
    ),
    start: "exec caddy run --adapter caddyfile --config conf",
    ready: "serving initial configuration",
    reload: "caddy reload --force --adapter caddyfile --config conf --address unix/admin",
};

/// A test for each of them.
macro_rules! through {
    ($($test:ident: $($name:ident $program:ident),*;)*) => {$(mod $test {$(
        #[test]
        fn $name() {
            super::$test(&super::$program);
        }
    )*})*};
}

through! {
    a_build: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    carries_50_mb_each_way: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    who_comes_and_nothing_of_their_token_is_logged: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    heads: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    // Caddy ends no connection because it is idle.
    pings_keep_an_idle_session: nginx NGINX, haproxy HAPROXY;
    a_reload_loses_nothing: nginx NGINX, haproxy HAPROXY;
    a_reload_ends_all: caddy CADDY;
    a_new_release_beside_the_old: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    the_next_session_goes_where_the_fewest_are: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    those_from_one_address_stay_together: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    what_one_client_causes_keeps_nobody_out: nginx NGINX, haproxy HAPROXY, caddy CADDY;
    forty_sessions_on_three_relays: nginx NGINX, haproxy HAPROXY;
    builds_on_three_machines: nginx NGINX, haproxy HAPROXY;
}

/// One that runs, with a certificate of a private authority for `localhost`.
pub struct Running {
    program: &'static Program,
    change: fn(String) -> String,
    dir: Dir,
    child: Child,
    log: Log,
    /// Bound, and not listening: it is shared with the program, and nobody else gets it.
    port: TcpListener,
}

impl Running {
    pub fn start(program: &'static Program, relays: &[SocketAddr]) -> Running {
        Running::start_with(program, relays, |text| text)
    }

    /// With more changes to the configuration.
    pub fn start_with(
        program: &'static Program,
        relays: &[SocketAddr],
        change: fn(String) -> String,
    ) -> Running {
        let dir = Dir::new();
        let make = "make='openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
            $make -subj /CN=authority -keyout ca.key -out ca.pem
            $make -subj /CN=relay -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE \
                -CA ca.pem -CAkey ca.key -keyout relay.key -out relay.pem
            cat relay.pem relay.key >relay-and-key.pem && chmod 755 . && chmod 644 *";
        let made = Command::new("sh")
            .args(["-c", make])
            .current_dir(dir.path(""))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", texts(&made).1);
        let port = net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseport(&port, true).unwrap();
        net::bind(&port, &SocketAddrV4::new([127, 0, 0, 1].into(), 0)).unwrap();
        let port = TcpListener::from(port);
        configure(program, &dir, &port, relays, change);
        let (output, input) = std::io::pipe().unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", program.start])
            .current_dir(dir.path(""))
            .env("HOME", dir.path(""))
            .stdin(Stdio::null());
        let child = command
            .stdout(input.try_clone().unwrap())
            .stderr(input)
            .spawn()
            .unwrap();
        let running = Running {
            program,
            change,
            dir,
            child,
            log: Log::of(output),
            port,
        };
        running.log.wait(program.ready);
        running
    }

    fn address(&self) -> SocketAddr {
        self.port.local_addr().unwrap()
    }

    /// From now on, or soon, to these relays.
    fn reload(&self, relays: &[SocketAddr]) {
        configure(self.program, &self.dir, &self.port, relays, self.change);
        let mut command = Command::new("sh");
        command
            .args(["-c", self.program.reload, &self.child.id().to_string()])
            .current_dir(self.dir.path(""));
        let output = command.env("HOME", self.dir.path("")).output().unwrap();
        assert!(output.status.success(), "{}", texts(&output).1);
    }

    /// What a job has to have to get there.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let url = format!("wss://localhost:{}", self.address().port());
        [
            ("NIX_RELAY_URL", url),
            (
                "SSL_CERT_FILE",
                self.dir.path("ca.pem").display().to_string(),
            ),
        ]
    }

    /// A request from another address of this machine: the status, and what came with it.
    fn curl(&self, arguments: &[&str]) -> (String, String) {
        let mut command = job("curl", &self.dir);
        command.args([
            "-sS",
            "--http1.1",
            "--max-time",
            "30",
            "--interface",
            "127.0.0.2",
            "-w",
            "\n%{http_code}",
        ]);
        let url = format!("https://localhost:{}/relay", self.address().port());
        let output = command
            .args(arguments)
            .arg(url)
            .envs(self.variables())
            .output()
            .unwrap();
        let (out, log) = texts(&output);
        assert!(output.status.success(), "{log}");
        let (body, status) = out.rsplit_once('\n').unwrap();
        (status.into(), body.into())
    }

    fn session(&self, token: &str) -> Session {
        self.session_of(&script(), token)
    }

    fn session_of(&self, client: &Path, token: &str) -> Session {
        let home = Dir::new();
        let mut command = job(client, &home);
        command
            .arg("--stdio")
            .envs(self.variables())
            .env("NIX_RELAY_TOKEN", token);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        Session {
            stdin,
            stdout,
            child,
            _home: home,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let conf = fs::read_to_string(self.dir.path("conf")).unwrap_or_default();
            eprintln!(
                "--- {}'s configuration:\n{conf}\n--- its log:\n{}\n---",
                self.program.name,
                self.log.text()
            );
        }
        signal("TERM", self.child.id());
        let _ = self.child.wait();
    }
}

/// Writes its configuration: the file in nix/, with the port, the certificates and the relays of a test.
fn configure(
    program: &Program,
    dir: &Dir,
    port: &TcpListener,
    relays: &[SocketAddr],
    change: fn(String) -> String,
) {
    let file = fs::read_to_string(project("nix").join(program.file)).unwrap();
    let (there, here) = program.listen;
    let here = here.replace("PORT", &port.local_addr().unwrap().port().to_string());
    assert!(
        file.contains(there)
            && file.contains("/etc/ssl/")
            && file.matches("127.0.0.1:8080").count() == 1
    );
    let file = file
        .replace(there, &here)
        .replace("relay.example.com", "localhost")
        .replace("/etc/ssl/", "");
    let mut text = String::new();
    for line in file.split_inclusive('\n') {
        let relays = if line.contains("127.0.0.1:8080") {
            relays
        } else {
            &relays[..1]
        };
        for (number, relay) in relays.iter().enumerate() {
            let line = line.replace("127.0.0.1:8080", &relay.to_string());
            text += &line.replace("relay1", &format!("relay{}", number + 1));
        }
    }
    dir.write("conf", &change(program.around.replace("FILE", &text)));
}

/// client.sh, connected or about to be.
struct Session {
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    child: Child,
    _home: Dir,
}

impl Session {
    /// Whether what is sent to `cat` comes back.
    fn works(&mut self) -> bool {
        let mut answer = [0; 5];
        let sent = self.stdin.as_mut().unwrap().write_all(b"hello").is_ok();
        sent && self.stdout.read_exact(&mut answer).is_ok() && &answer == b"hello"
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn a_build(program: &'static Program) {
    let farm = Farm::start();
    let proxy = Running::start(program, &[farm.relay.address]);
    let runner = farm.runner();
    let file = runner.derivation("hello", "echo in the builder; echo hello > $out");
    let (_, log) = texts(
        &runner
            .build(&file)
            .envs(proxy.variables())
            .output()
            .unwrap(),
    );
    assert!(log.contains("hello> in the builder"), "{log}");
    assert_eq!(
        fs::read(farm.file(&runner.out_path(&file))).unwrap(),
        b"hello\n"
    );
    farm.relay.log.wait(" forwarded_for=\"127.0.0.1\" ");
}

fn carries_50_mb_each_way(program: &'static Program) {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let proxy = Running::start(program, &[relay.address]);
    let mut random = Vec::new();
    fs::File::open("/dev/urandom")
        .unwrap()
        .take(50_000_000)
        .read_to_end(&mut random)
        .unwrap();
    for client in [script(), native()] {
        let mut session = proxy.session_of(&client, &issuer.token());
        let (mut stdin, sent, mut received) = (
            session.stdin.take().unwrap(),
            random.clone(),
            vec![0; random.len()],
        );
        let writer = std::thread::spawn(move || stdin.write_all(&sent).map(|()| stdin));
        session.stdout.read_exact(&mut received).unwrap();
        assert!(received == random, "it changed on the way");
        session.stdin = Some(writer.join().unwrap().unwrap());
        assert!(session.works());
    }
}

/// A client that claims to come from elsewhere is not believed.
fn who_comes_and_nothing_of_their_token_is_logged(program: &'static Program) {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let proxy = Running::start(program, &[relay.address]);
    let token = issuer.token();
    let bearer = format!("Authorization: Bearer {token}");
    let (status, _) = proxy.curl(&[
        "-A",
        "curl-of-the-test",
        "-H",
        "X-Forwarded-For: 192.0.2.1",
        "-H",
        &bearer,
    ]);
    assert_eq!(status, "426");
    let line = relay.log.wait("status=426");
    assert!(line.contains(" forwarded_for=\"127.0.0.2\" "), "{line}");
    assert!(proxy.session(&token).works());
    relay.log.wait("session ended session=");
    for path in ["/relay", "426"] {
        proxy.log.wait(path);
    }
    let parts = token.split('.').any(|part| proxy.log.text().contains(part));
    assert!(!parts, "{}", proxy.log.text());
}

/// As long as the relay takes them, and longer.
fn heads(program: &'static Program) {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let proxy = Running::start(program, &[relay.address]);
    let token = issuer.token_with(json!({"padding": "p".repeat(8_300)}));
    assert!(
        token.len() * 4 / 3 > 15 << 10,
        "HAProxy takes it without being told to"
    );
    assert!(proxy.session(&token).works());
    for length in [16 << 10, 32 << 10] {
        let (status, _) = proxy.curl(&["-H", &format!("Padding: {}", "p".repeat(length))]);
        assert!(["400", "431"].contains(&&*status), "{status}");
    }
    assert!(proxy.session(&issuer.token()).works());
}

/// Sessions that nobody uses, and a time-out of two seconds: where neither the client nor the relay pings, it ends.
fn pings_keep_an_idle_session(program: &'static Program) {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let script = fs::read_to_string(project("client.sh"))
        .unwrap()
        .replace(" --ping-interval 1", "");
    let quiet = dir.script(
        "client",
        &format!("exec bash {}", dir.write("client.sh", &script).display()),
    );
    let shorter = |text: String| {
        let shorter = text.replace("proxy_read_timeout 2m", "proxy_read_timeout 2s");
        shorter.replace("timeout tunnel 1h", "timeout tunnel 2s")
    };
    let relays = ["1", "0"].map(|secs| Setup::new(&issuer).set("KEEPALIVE_SECS", secs).start());
    let proxies = relays
        .each_ref()
        .map(|relay| Running::start_with(program, &[relay.address], shorter));
    let [mut pinged, mut silent] = proxies
        .each_ref()
        .map(|proxy| proxy.session_of(&quiet, &issuer.token()));
    let mut pinging = proxies[1].session(&issuer.token());
    assert!(pinged.works() && pinging.works() && silent.works());
    eventually("the silent one ends", LIMIT, || {
        silent.child.try_wait().unwrap().is_some()
    });
    assert!(pinged.works() && pinging.works());
}

/// Though from then on there is another relay in the configuration.
fn a_reload_loses_nothing(program: &'static Program) {
    let issuer = Issuer::start();
    let [before, after] = [(); 2].map(|()| Relay::start(&issuer));
    let proxy = Running::start(program, &[before.address]);
    let mut session = proxy.session(&issuer.token());
    assert!(session.works());
    proxy.reload(&[after.address]);
    eventually("sessions go to the other relay", LIMIT, || {
        assert!(proxy.session(&issuer.token()).works());
        after.log.text().contains("session opened")
    });
    assert!(session.works());
}

/// Which nix/operating.md warns of.
fn a_reload_ends_all(program: &'static Program) {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let proxy = Running::start(program, &[relay.address]);
    let mut session = proxy.session(&issuer.token());
    assert!(session.works());
    proxy.reload(&[relay.address]);
    eventually("the session ends", LIMIT, || {
        session.child.try_wait().unwrap().is_some()
    });
    assert!(proxy.session(&issuer.token()).works());
}

/// What nix/operating.md has under "Upgrades", without systemctl.
#[test]
fn the_unit_for_two_ports() {
    let operating = fs::read_to_string(project("nix/operating.md")).unwrap();
    let commands = operating
        .split_once("    cd /etc/systemd/system\n")
        .unwrap()
        .1
        .split_once("    systemctl")
        .unwrap()
        .0;
    let dir = Dir::new();
    let unit = fs::read_to_string(project("nix/nix-relay.service")).unwrap();
    dir.write(
        "nix-relay.service",
        &unit.replace("/usr/local/bin/nix-relay", env!("CARGO_BIN_EXE_nix-relay")),
    );
    let verify = "systemd-analyze verify --man=no ./nix-relay@8081.service";
    let commands = format!(
        "set -e\n{commands}\n{verify} && grep -E '^(Environment=NIX|ExecS|TimeoutS)' nix-relay@.service"
    );
    let output = Command::new("sh")
        .args(["-c", &commands])
        .current_dir(dir.path(""))
        .output()
        .unwrap();
    let (out, log) = texts(&output);
    assert_eq!(log, "");
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[1].starts_with("ExecStart=/"), "{out}");
    assert_eq!(
        [lines[0], lines[2], lines[3]],
        [
            "Environment=NIX_RELAY_LISTEN=127.0.0.1:%i NIX_RELAY_ADMIN_LISTEN=127.0.0.1:1%i",
            "Environment=NIX_RELAY_SHUTDOWN_GRACE_SECS=3600",
            "TimeoutStopSec=2h"
        ],
        "{out}"
    );
}

fn opened(relay: &Relay) -> usize {
    relay.log.text().matches("session opened").count()
}

/// On two ports, both of which the proxy knows, as it does when nobody listens on one.
fn a_new_release_beside_the_old(program: &'static Program) {
    let issuer = Issuer::start();
    let mut old = Setup::new(&issuer)
        .set("SHUTDOWN_GRACE_SECS", "600")
        .start();
    // Not where other tests have their ports, so that it stays free.
    let second = TcpListener::bind("127.0.0.3:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let proxy = Running::start(program, &[old.address, second]);
    let mut session = proxy.session(&issuer.token());
    assert!(session.works() && proxy.session(&issuer.token()).works());
    let new = Setup::new(&issuer)
        .set("LISTEN", &second.to_string())
        .start();
    eventually("sessions go to the new one", LIMIT, || {
        assert!(proxy.session(&issuer.token()).works());
        opened(&new) > 0
    });
    old.signal("TERM");
    old.log.wait("shutting down");
    let before = opened(&old);
    assert!(session.works() && proxy.session(&issuer.token()).works());
    drop(session);
    assert_eq!(old.wait().code(), Some(0));
    assert!(proxy.session(&issuer.token()).works());
    assert_eq!(opened(&old), before);
}

/// Always to the second, while the first has one.
fn the_next_session_goes_where_the_fewest_are(program: &'static Program) {
    let issuer = Issuer::start();
    let relays = [(); 2].map(|()| Relay::start(&issuer));
    let proxy = Running::start(program, &relays.each_ref().map(|relay| relay.address));
    let mut first = proxy.session(&issuer.token());
    assert!(first.works());
    for number in 1..=8 {
        assert!(proxy.session(&issuer.token()).works());
        let ended = |relay: &Relay| relay.log.text().matches("session ended").count();
        eventually("it has ended", LIMIT, || {
            relays.iter().map(ended).sum::<usize>() == number
        });
    }
    let mut counts = relays.each_ref().map(opened);
    counts.sort();
    assert_eq!(counts, [1, 8]);
}

/// With what nix/operating.md has for `--store`.
fn those_from_one_address_stay_together(program: &'static Program) {
    let issuer = Issuer::start();
    let relays = [(); 2].map(|()| Relay::start(&issuer));
    let by_address = |mut text: String| {
        let operating = fs::read_to_string(project("nix/operating.md")).unwrap();
        for (fewest, address) in [
            ("least_conn;", "ip_hash;"),
            ("balance leastconn", "balance source"),
            ("lb_policy least_conn", "lb_policy ip_hash"),
        ] {
            assert!(operating.contains(&format!("`{address}`")));
            text = text.replace(fewest, address);
        }
        text
    };
    let proxy = Running::start_with(
        program,
        &relays.each_ref().map(|relay| relay.address),
        by_address,
    );
    let mut sessions: Vec<Session> = (0..8).map(|_| proxy.session(&issuer.token())).collect();
    assert!(sessions.iter_mut().all(Session::works));
    let mut counts = relays.each_ref().map(opened);
    counts.sort();
    assert_eq!(counts, [0, 8]);
}

/// No relay counts as broken because of what a client gets from it: a 503 for the keys of an issuer that is down, a
/// refused handshake.
fn what_one_client_causes_keeps_nobody_out(program: &'static Program) {
    let (issuer, down) = (Issuer::start(), "http://127.0.0.1:1");
    let rule = |name, issuer: &str| {
        format!("[[auth.rule]]\nname = '{name}'\nissuer = '{issuer}'\nbound_claims.ref = '**'\n")
    };
    let rules = rule("down", down) + &rule("good", &issuer.url());
    let relays = [(); 2].map(|()| {
        Setup::new(&issuer)
            .set("ALLOWED_ORG", "")
            .config(&rules)
            .start()
    });
    let proxy = Running::start(program, &relays.each_ref().map(|relay| relay.address));
    let refused = issuer.token_with(json!({ "iss": down }));
    let (good, mut cases) = (issuer.token(), vec![(refused, "Upgrade")]);
    // nginx writes that header itself.
    if program.name != "nginx" {
        cases.push((good.clone(), "keep-alive Upgrade"));
    }
    for (token, connection) in cases {
        for _ in 0..5 {
            let (status, _) = proxy.curl(&[
                "-H",
                &format!("Authorization: Bearer {token}"),
                "-H",
                &format!("Connection: {connection}"),
                "-H",
                "Upgrade: websocket",
                "-H",
                "Sec-WebSocket-Version: 13",
                "-H",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            ]);
            assert!(status.starts_with(['4', '5']), "{status}");
            assert!(proxy.session(&good).works());
        }
    }
}

fn forty_sessions_on_three_relays(program: &'static Program) {
    let issuer = Issuer::start();
    let mut relays = [(); 3].map(|()| {
        Setup::new(&issuer)
            .set("SHUTDOWN_GRACE_SECS", "600")
            .start()
    });
    let proxy = Running::start(program, &relays.each_ref().map(|relay| relay.address));
    let mut sessions: Vec<Session> = (0..40).map(|_| proxy.session(&issuer.token())).collect();
    assert!(sessions.iter_mut().all(Session::works));
    let before = relays.each_ref().map(opened);
    assert!(before.iter().all(|&number| number >= 12), "{before:?}");
    // The first takes no more and keeps what it has; and then the second is killed.
    relays[0].signal("TERM");
    relays[0].log.wait("shutting down");
    sessions.extend((0..8).map(|_| proxy.session(&issuer.token())));
    assert!(sessions.iter_mut().all(Session::works));
    assert_eq!(opened(&relays[0]), before[0]);
    relays[1].signal("KILL");
    relays[1].wait();
    assert!(proxy.session(&issuer.token()).works());
    let left = sessions
        .iter_mut()
        .filter_map(|session| session.works().then_some(()))
        .count();
    assert_eq!(left, 48 - opened(&relays[1]));
}

/// As `builders`, each build in a connection of its own.
fn builds_on_three_machines(program: &'static Program) {
    const BUILDS: usize = 40;
    let issuer = Issuer::start();
    let mut farms = [(); 3].map(|()| {
        Farm::start_with(|setup| {
            setup
                .set("ISSUER", &issuer.url())
                .set("SHUTDOWN_GRACE_SECS", "600")
        })
    });
    let proxy = Running::start(program, &farms.each_ref().map(|farm| farm.relay.address));
    let (meeting, gate) = (Dir::new(), Dir::new());
    let runner = farms[0].runner();
    let build = |names: &[String], script: &str| {
        let parts: Vec<_> = names
            .iter()
            .map(|name| format!("({})", derivation(name, script)))
            .collect();
        let file = runner.expression(&names[0], &format!("[ {} ]", parts.join(" ")));
        let builders = format!("{} - - {BUILDS}", runner.remote());
        let mut nix = runner.nix(&[
            "build",
            "-j0",
            "--keep-going",
            "--no-link",
            "--builders",
            &builders,
            "-f",
            &file,
        ]);
        nix.envs(proxy.variables())
            .env("NIX_RELAY_TOKEN", issuer.token());
        (nix, file)
    };
    let script = format!(
        "echo > {}/$name; until [ -e {} ]; do /bin/sleep 0.1; done; echo > $out",
        meeting.path("").display(),
        gate.path("open").display()
    );
    let names: Vec<_> = (0..BUILDS).map(|number| format!("part-{number}")).collect();
    let (mut nix, file) = build(&names, &script);
    let mut nix = nix.stderr(Stdio::piped()).spawn().unwrap();
    let log = Log::of(nix.stderr.take().unwrap());
    eventually("all builds have begun", LIMIT, || {
        fs::read_dir(meeting.path("")).unwrap().count() == BUILDS
    });
    let before = farms.each_ref().map(|farm| opened(&farm.relay));
    assert!(
        before.iter().all(|&number| number >= 3) && before.iter().sum::<usize>() == BUILDS,
        "{before:?}"
    );
    farms[0].relay.signal("TERM");
    farms[0].relay.log.wait("shutting down");
    farms[1].relay.signal("KILL");
    farms[1].relay.wait();
    let (mut next, _) = build(&["next".into()], "echo > $out");
    let next = next.output().unwrap();
    assert!(next.status.success(), "{}", texts(&next).1);
    assert_eq!(opened(&farms[2].relay), before[2] + 1);
    gate.write("open", "");
    wait(&mut nix, LIMIT);
    let paths = runner.run(&[
        "eval",
        "--raw",
        "-f",
        &file,
        "--apply",
        "all: toString (map (part: part.outPath) all)",
    ]);
    let built = paths
        .split(' ')
        .filter(|path| runner.file(path).exists())
        .count();
    assert_eq!(built, BUILDS - before[1], "{}", log.text());
    assert_eq!(farms[0].relay.wait().code(), Some(0));
}

//! Each row of the README's troubleshooting table, produced for real.

use crate::support::{issuer::now, nix::*, *};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// What stands in the first column of each row: a text, or several for different versions of Nix.
fn symptoms() -> Vec<Vec<String>> {
    let readme = std::fs::read_to_string(project("README.md")).unwrap();
    let (_, table) = readme
        .split_once("| what you see |")
        .expect("no table in the README");
    let rows = table.lines().skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|row| {
            let column = row.split('|').nth(1).unwrap();
            let texts: Vec<_> = column.split('`').skip(1).step_by(2).collect();
            assert!(!texts.is_empty(), "no symptom: {row}");
            texts.into_iter().map(String::from).collect()
        })
        .collect()
}

/// Whether a text says it; `…` stands for anything on the line.
fn says(text: &str, symptom: &str) -> bool {
    text.lines().any(|line| {
        let mut rest = Some(line);
        for part in symptom.split('…') {
            rest = rest.and_then(|rest| Some(rest.split_once(part)?.1));
        }
        rest.is_some()
    })
}

/// Fails if nobody says one of the texts of a row.
fn check<'a>(rows: impl Iterator<Item = &'a Vec<String>>, said: &[String]) {
    for row in rows {
        let seen = row
            .iter()
            .any(|symptom| said.iter().any(|text| says(text, symptom)));
        assert!(seen, "nobody says {row:?}:\n{}", said.join("\n"));
    }
}

/// All that a program says, whose input does not end before it does.
fn output(command: &mut Command) -> String {
    let piped = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    let input = child.stdin.take();
    let (out, err) = texts(&child.wait_with_output().unwrap());
    drop(input);
    out + &err
}

/// The client in a job with a token, for a relay or what is in its place. It neither waits nor tries again.
fn client(url: &str, home: &Dir, token: &str) -> Command {
    let mut command = job(env!("CARGO_BIN_EXE_nix-relay"), home);
    command
        .arg("--stdio")
        .env("NIX_RELAY_URL", url)
        .env("NIX_RELAY_TOKEN", token)
        .env("NIX_RELAY_RETRY_SECS", "0")
        .env("NIX_RELAY_QUEUE_SECS", "0");
    command
}

/// The same with client.sh.
fn script(url: &str, home: &Dir, token: &str) -> Command {
    let mut command = job(project("client.sh"), home);
    command
        .env("NIX_RELAY_URL", url)
        .env("NIX_RELAY_TOKEN", token)
        .env("NIX_RELAY_QUEUE_SECS", "0");
    command
}

/// What a relay says that cannot start, with one variable more.
fn start(name: &str, value: &str) -> String {
    output(
        binary()
            .env("NIX_RELAY_LISTEN", "127.0.0.1:0")
            .env("NIX_RELAY_ALLOWED_ORG", "org")
            .env(name, value),
    )
}

/// Something in the relay's place, which answers the head of each request as told.
fn server(answer: impl Fn(&str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let head = read_head(&mut stream);
            let _ = stream.write_all(answer(&head).as_bytes());
        }
    });
    url
}

/// A proxy that does not pass on `Upgrade`.
fn without_upgrade(relay: SocketAddr) -> String {
    server(move |head| {
        let lines = head.split_inclusive("\r\n");
        let kept = lines.filter(|line| !line.to_lowercase().starts_with("upgrade:"));
        exchange(relay, kept.collect::<String>().as_bytes())
    })
}

/// What nginx answers while the relay is down.
const BAD_GATEWAY: &str = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n\
    Content-Length: 45\r\nConnection: close\r\n\r\n<html><title>502 Bad Gateway</title></html>\r\n";

/// A TLS server with the certificate that nix/operating.md makes.
struct TlsServer {
    dir: Dir,
    child: Child,
    url: String,
}

impl TlsServer {
    fn start() -> TlsServer {
        let operating = std::fs::read_to_string(project("nix/operating.md")).unwrap();
        let (_, make) = operating.split_once("\n    openssl req ").unwrap();
        let (make, _) = make.split_once("\n\n").unwrap();
        assert!(make.contains("DNS:relay.example.com"));
        let make = format!("openssl req {make}").replace("relay.example.com", "localhost");
        let dir = Dir::new();
        let mut sh = Command::new("sh");
        let made = sh.args(["-c", &make]).current_dir(dir.path("")).output();
        assert!(made.unwrap().status.success());
        let mut command = Command::new("openssl");
        command.args(["s_server", "-accept", "127.0.0.1:0", "-www"]);
        command.args(["-cert", "relay.pem", "-key", "relay.key"]);
        let piped = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = piped.current_dir(dir.path("")).spawn().unwrap();
        let line = Log::of(child.stdout.take().unwrap()).wait("ACCEPT ");
        let port = line.rsplit(':').next().unwrap();
        let url = format!("wss://localhost:{port}");
        TlsServer { dir, child, url }
    }
}

impl TlsServer {
    fn certificate(&self) -> PathBuf {
        self.dir.path("relay.pem")
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A session whose relay is killed.
fn broken_off(issuer: &Issuer, home: &Dir) -> String {
    let mut relay = Setup::new(issuer).start();
    let url = format!("ws://{}", relay.address);
    let mut command = client(&url, home, &issuer.token());
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = piped.stderr(Stdio::piped()).spawn().unwrap();
    relay.log.wait("session opened");
    relay.signal("KILL");
    relay.wait();
    let mut said = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    let _ = child.wait();
    said
}

#[test]
fn each_row_is_true() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "0")
        .start();
    let url = format!("ws://{}", relay.address);
    let good = issuer.token();
    let tls = TlsServer::start();
    // Nobody has told this relay of the issuer's keys.
    let down = Setup::new(&issuer)
        .set("ISSUER", "http://127.0.0.1:1")
        .start();
    let broken = Setup::new(&issuer).set("DAEMON_PATH", "/nothing").start();
    let failing = Setup::new(&issuer)
        .daemon("echo 'error: no such setting' >&2; exit 1")
        .start();
    let short = Setup::new(&issuer).set("TIMEOUT_SECS", "1").start();

    let mut said = Vec::new();
    for client in [client, script] {
        let with = |changes| client(&url, &home, &issuer.token_with(changes));
        let to = |url: &str| client(url, &home, &good);
        let behind = |relay: &Relay| client(&format!("ws://{}", relay.address), &home, &good);
        let only = relay.connect(&good);
        let mut full = vec![output(&mut to(&url))];
        drop(only);
        eventually("the session is over", LIMIT, || {
            relay.log.text().matches("session ended").count() > said.len()
        });
        full.extend(
            [
                to(&url).env_remove("NIX_RELAY_URL"),
                to("relay.example.com").env_remove("NIX_RELAY_TOKEN"),
                to(&url).env_remove("NIX_RELAY_TOKEN"),
                &mut to("ws://127.0.0.1:1"),
                &mut to(&format!("{url}/another")),
                &mut to(&without_upgrade(relay.address)),
                &mut to(&server(|_| BAD_GATEWAY.into())),
                &mut to(&tls.url),
                &mut with(json!({"exp": now() - 100})),
                &mut with(json!({"iat": now() + 1000})),
                &mut with(json!({"aud": "another"})),
                &mut with(json!({"iss": "https://another.example.com"})),
                &mut with(json!({"ref": "refs/heads/dev", "repository_owner": "another"})),
                &mut client(
                    &format!("ws://{}", down.address),
                    &home,
                    &issuer.token_with(json!({"iss": "http://127.0.0.1:1"})),
                ),
                &mut behind(&broken),
                &mut behind(&failing),
                &mut behind(&short),
            ]
            .map(output),
        );
        said.push(full);
    }
    let mut native = said.remove(0);
    let script = said.remove(0);
    let trusted = output(client(&tls.url, &home, &good).env("SSL_CERT_FILE", tls.certificate()));
    assert!(!trusted.contains("certificate"), "{trusted}");
    native.extend([
        broken_off(&issuer, &home),
        output(job(env!("CARGO_BIN_EXE_nix-relay"), &home).args(["--serve", "--write"])),
        start("NIX_RELAY_ALLOWED_ORG", ""),
        start("NIX_RELAY_LISTEN", &relay.address.to_string()),
        down.log.wait("could not fetch keys"),
    ]);

    let rows = symptoms();
    assert!(rows.len() >= 20, "{} rows", rows.len());
    let ours = || rows.iter().filter(|row| !row[0].starts_with("error: "));
    check(ours(), &native);
    // What client.sh says is the same where it is about the relay, and not about TCP and TLS.
    let same = [
        "refused: ",
        "ended the session: ",
        "set NIX_RELAY_URL",
        "a proxy or web server",
        "no token",
    ];
    let same: Vec<Vec<String>> = ours()
        .filter(|row| same.iter().any(|words| row[0].contains(words)))
        .map(|row| vec![row[0].replace("nix-relay: ", "nix-relay-client: ")])
        .collect();
    assert!(same.len() >= 10, "{} rows", same.len());
    check(same.iter(), &script);
}

/// The rows with Nix's own words.
#[test]
fn what_nix_says() {
    let farm = Farm::start_with(|setup| {
        setup.daemon("exec $NIX_IN_REMOTE setpriv --reuid=65534 --clear-groups nix-daemon --stdio")
    });
    let mut system = farm.command("nix-daemon").spawn().unwrap();
    let socket = farm.file("/var/lib/nix-relay-test/var/daemon-socket/socket");
    eventually("the system's daemon listens", LIMIT, || socket.exists());
    let runner = farm.runner();
    let remote = runner.remote();
    let file = runner.derivation("hello", "echo > $out");
    runner.run(&["build", "--no-link", "-f", &file]);
    let path = runner.out_path(&file);
    let needed = runner.derivation("needed", "echo > $out");
    let flake = Dir::new();
    let system_name = format!("{}-linux", std::env::consts::ARCH);
    let check_of = derivation("check", "exit 1").replace("builtins.currentSystem", "name");
    flake.write(
        "flake.nix",
        &format!(
            "{{ outputs = _: let name = \"{system_name}\"; in {{ checks.${{name}}.bad = {check_of}; }}; }}"
        ),
    );
    let flake = format!("path:{}", flake.path("").display());
    let builders = format!("{remote} {system_name} - 4 1");
    let there = ["--eval-store", "auto", "--store", &remote];
    let said = [
        runner
            .nix(&["store", "ping", "--store", &remote])
            .env("NIX_RELAY_TOKEN", "no"),
        &mut runner.nix(&["copy", "--no-check-sigs", "--to", &remote, &path]),
        &mut runner.nix(&["build", "-j0", "--builders", &builders, "-f", &needed]),
        &mut runner.nix(&[&["flake", "check"], &there[..], &[&flake]].concat()),
        &mut runner.nix(&["log", "--store", &remote, &path]),
        &mut runner.nix(&[&["shell"], &there[..], &["-f", &file, "-c", "hello"]].concat()),
    ]
    .map(output);
    signal("KILL", system.id());
    let _ = system.wait();
    let rows = symptoms();
    let rows = rows.iter().filter(|row| row[0].starts_with("error: "));
    // What builders.rs has.
    let rows = rows.filter(|row| !row[0].contains("is not valid"));
    // Nix 2.16 and newer let such a client build.
    let rows = rows.filter(|row| nix_version() < (2, 16) || !row[0].contains("privileged"));
    // Nix 2.26 fails at the directory of the test's store before that.
    let other = said
        .iter()
        .any(|text| text.contains("error: path '/var' is not in the Nix store"));
    let rows = rows.filter(|row| !other || !row[0].contains("command execution"));
    check(rows, &said);
}

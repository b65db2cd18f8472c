//! Each row of the README's troubleshooting table, produced for real.

use crate::support::{issuer::now, nix::*, *};

use std::process::{Command, Stdio};

/// What stands in the first column, without the rest of a row.
fn symptoms() -> Vec<String> {
    let readme = std::fs::read_to_string(project("README.md")).unwrap();
    let table = readme
        .split("| what is said |")
        .nth(1)
        .expect("no table in the README");
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        row.split('`')
            .nth(1)
            .unwrap_or_else(|| panic!("no symptom: {row}"))
            .to_owned()
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

/// client.sh for a relay, with a token.
fn client(relay: &Relay, home: &Dir, token: &str) -> Command {
    let mut command = job(project("client.sh"), home);
    command
        .env("NIX_RELAY_URL", format!("ws://{}", relay.address))
        .env("NIX_RELAY_TOKEN", token);
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

#[test]
fn each_row_is_true() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "0")
        .start();
    let good = issuer.token();
    let path = std::env::var("PATH").unwrap();
    let without_websocat = path
        .split(':')
        .filter(|dir| !project(dir).join("websocat").exists())
        .collect::<Vec<_>>()
        .join(":");
    let with = |changes| output(&mut client(&relay, &home, &issuer.token_with(changes)));
    let behind = |setup: Setup, token: &str| output(&mut client(&setup.start(), &home, token));
    let mut said = vec![
        output(client(&relay, &home, &good).env("PATH", &without_websocat)),
        output(client(&relay, &home, &good).env("NIX_RELAY_URL", "relay.example.com")),
        output(client(&relay, &home, &good).env("NIX_RELAY_URL", "ws://127.0.0.1:1")),
        output(
            client(&relay, &home, &good).env("NIX_RELAY_URL", format!("ws://{}/", relay.address)),
        ),
        output(client(&relay, &home, &good).env_remove("NIX_RELAY_TOKEN")),
        with(json!({"exp": now() - 100})),
        with(json!({"aud": "another"})),
        with(json!({"iss": "https://another.example.com"})),
        with(json!({"ref": "refs/heads/dev", "repository_owner": "another"})),
        exchange(relay.address, b"GET /relay HTTP/1.1\r\nHost: relay\r\n\r\n"),
        behind(
            Setup::new(&issuer).set("ISSUER", "http://127.0.0.1:1"),
            &issuer.token_with(json!({"iss": "http://127.0.0.1:1"})),
        ),
        behind(Setup::new(&issuer).set("DAEMON_PATH", "/nothing"), &good),
        behind(
            Setup::new(&issuer).daemon("echo 'error: no such setting' >&2; exit 1"),
            &good,
        ),
        behind(Setup::new(&issuer).set("TIMEOUT_SECS", "1"), &good),
        start("NIX_RELAY_ALLOWED_ORG", ""),
        start("NIX_RELAY_LISTEN", &relay.address.to_string()),
        start(
            "NIX_RELAY_CONFIG",
            home.write("relay.toml", "server.lissten = 'x'\n")
                .to_str()
                .unwrap(),
        ),
        start("SSL_CERT_FILE", "/dev/null"),
    ];
    let only = relay.connect(&good);
    said.push(output(&mut client(&relay, &home, &good)));
    drop(only);
    let down = Setup::new(&issuer)
        .set("ISSUER", "http://127.0.0.1:1")
        .start();
    said.push(down.log.wait("could not fetch keys"));

    let rows = symptoms();
    assert!(rows.len() >= 16, "{} rows", rows.len());
    for symptom in rows.iter().filter(|row| !row.starts_with("error: ")) {
        assert!(
            said.iter().any(|text| says(text, symptom)),
            "nobody says {symptom}:\n{}",
            said.join("\n")
        );
    }
}

/// The rows with Nix's own words.
#[test]
fn what_nix_says() {
    let farm = Farm::start_with(|setup| {
        setup.daemon("exec $NIX_IN_REMOTE setpriv --reuid=65534 --clear-groups nix-daemon --stdio")
    });
    let runner = farm.runner();
    let file = runner.derivation("unsigned", "echo > $out");
    runner.run(&["build", "--no-link", "-f", &file]);
    let (path, remote) = (runner.out_path(&file), runner.remote());
    let mut said = vec![
        output(
            runner
                .nix(&["store", "ping", "--store", &remote])
                .env("NIX_RELAY_TOKEN", "no"),
        ),
        output(&mut runner.nix(&[
            "store",
            "ping",
            "--store",
            "ssh-ng://localhost?remote-program=/no/client.sh",
        ])),
        output(&mut runner.nix(&["copy", "--no-check-sigs", "--to", &remote, &path])),
    ];
    let mut system = farm.command("nix-daemon").spawn().unwrap();
    let socket = farm.file("/var/lib/nix-relay-test/var/daemon-socket/socket");
    eventually("the system's daemon listens", LIMIT, || socket.exists());
    said.push(output(&mut runner.nix(&[
        "copy",
        "--no-check-sigs",
        "--to",
        &remote,
        &path,
    ])));
    signal("KILL", system.id());
    let _ = system.wait();
    for symptom in symptoms().iter().filter(|row| row.starts_with("error: ")) {
        assert!(
            said.iter().any(|text| says(text, symptom)),
            "nobody says {symptom}:\n{}",
            said.join("\n")
        );
    }
}

//! What both clients promise, each case over both: `nix-relay --stdio` and client.sh. Their words may differ, so this is
//! about the exit status, standard output, and the word that tells what is wrong.

use crate::support::{nix::*, *};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread;
use tungstenite::{accept, protocol::CloseFrame};

const TOKEN: &str = "NIX_RELAY_TOKEN";
const ACTIONS: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
const GITLAB: &str = "GITLAB_OIDC_TOKEN";
const CIRCLE: &str = "CIRCLE_OIDC_TOKEN_V2";

/// Both clients, as Nix runs them in a job that has the URL of a relay; they do not try again.
fn clients(home: &Dir, url: &str) -> [Command; 2] {
    [script(), native()].map(|program| {
        let mut command = job(program, home);
        command.arg("--stdio").env("NIX_RELAY_URL", url);
        command.env("NIX_RELAY_RETRY_SECS", "0");
        command
    })
}

fn url(relay: &Relay) -> String {
    format!("ws://{}", relay.address)
}

/// What one says before it fails: one line, with nothing on standard output. Its input stays open.
fn failure(command: &mut Command) -> String {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(input);
    let (out, log) = texts(&output);
    assert_eq!((output.status.code(), &*out), (Some(1), ""), "{log}");
    let is_one = log.starts_with("nix-relay") && log.matches('\n').count() == 1;
    assert!(is_one, "not one line: {log:?}");
    log
}

/// Both fail with a line that has all of these words.
fn both_fail(home: &Dir, url: &str, variables: &[(&str, &str)], words: &[&str]) {
    for mut command in clients(home, url) {
        let line = failure(command.envs(variables.iter().copied()));
        let has_all = words.iter().all(|word| line.contains(word));
        assert!(has_all, "{url:?} {variables:?}: {line}");
        assert!(!line.contains("secret"), "{line}");
    }
}

/// A session that echoes, and ends well with its input: the `sub` of the token that got in.
fn who(relay: &Relay, number: usize, command: &mut Command) -> String {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut answer = [0];
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"x").unwrap();
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut answer).unwrap();
    drop(stdin);
    assert!(wait(&mut child, LIMIT).success());
    let line = relay.log.wait(&format!("session opened session={number} "));
    let sub = line.split("sub=\"").nth(1).unwrap();
    sub.split('"').next().unwrap().to_owned()
}

/// As one does that waits for what another session holds.
#[test]
fn a_daemon_that_reads_nothing_for_long() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let setup = Setup::new(&issuer).set("KEEPALIVE_SECS", "1");
    let relay = setup.daemon("sleep 6; exec wc -c").start();
    for mut command in clients(&home, &url(&relay)) {
        command.env("NIX_RELAY_KEEPALIVE_SECS", "1");
        command.env(TOKEN, issuer.token()).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        thread::spawn(move || stdin.write_all(&vec![0; 32 << 20]));
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (texts(&output).0, output.status.code()),
            ("33554432\n".into(), Some(0))
        );
    }
}

/// Each request gets this answer.
fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            read_head(&mut stream);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    url
}

/// Each session ends at once with this Close.
fn closing(frame: Option<CloseFrame>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut socket = accept(stream).unwrap();
            let _ = socket.close(frame.clone());
            while socket.read().is_ok() {}
        }
    });
    address
}

#[test]
fn settings_that_cannot_be() {
    let home = Dir::new();
    for url in ["", "https://relay", "relay:80", "https://user:secret@relay"] {
        both_fail(&home, url, &[], &["NIX_RELAY_URL"]);
    }
    let url = "ws://127.0.0.1:1";
    for token in ["a\r\nX: secret", "'secret'", "secret b", "\n"] {
        both_fail(&home, url, &[(TOKEN, token)], &[TOKEN, "invalid"]);
    }
    let name = "NIX_RELAY_KEEPALIVE_SECS";
    both_fail(&home, url, &[(name, "1m"), (TOKEN, "x")], &[name, "1m"]);
    both_fail(
        &home,
        url,
        &[],
        &["no token", TOKEN, ACTIONS, GITLAB, CIRCLE],
    );
}

/// What Nix passes for a store of ssh://.
#[test]
fn the_other_protocol_of_nix() {
    let home = Dir::new();
    for program in [script(), native()] {
        let line = failure(job(program, &home).args(["--serve", "--write"]));
        assert!(line.contains("ssh-ng://"), "{line}");
    }
}

#[test]
fn no_relay_there() {
    let home = Dir::new();
    let token = [(TOKEN, "token")];
    let closed = "ws://127.0.0.1:1";
    both_fail(
        &home,
        closed,
        &token,
        &["cannot reach ws://127.0.0.1:1/relay: "],
    );
    let named = "ws://user:secret@127.0.0.1:1/a";
    both_fail(&home, named, &token, &["cannot reach ws://127.0.0.1:1/a: "]);
    both_fail(&home, "wss://nowhere.invalid", &token, &["nowhere.invalid"]);
}

#[test]
fn each_token_source_in_its_order() {
    let issuer = Issuer::start();
    let home = Dir::new();
    for client in 0..2 {
        let relay = Relay::start(&issuer);
        let named = |name: &str| issuer.token_with(json!({"sub": name}));
        let [sh, rs] = clients(&home, &url(&relay));
        let mut command = [sh, rs].into_iter().nth(client).unwrap();
        let mut number = 0;
        let mut is = |command: &mut Command, expected: &str| {
            number += 1;
            assert_eq!(who(&relay, number, command), expected);
        };
        is(command.env(CIRCLE, named("circle")), "circle");
        is(command.env(GITLAB, named("gitlab")), "gitlab");
        let of_actions = "repo:example-org/project:ref:refs/heads/main";
        is(command.envs(token_variables(&issuer)), of_actions);
        is(command.env(TOKEN, named("line") + "\r\n"), "line");
        command.env("NIX_RELAY_URL", url(&relay) + "/\r\n");
        is(command.env(TOKEN, "").env(ACTIONS, ""), "gitlab");
    }
}

#[test]
fn the_audience_is_asked_for() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let setup = Setup::new(&issuer).set("AUDIENCE", "https://relay:1/a");
    let relay = setup.start();
    for (number, mut command) in clients(&home, &url(&relay)).into_iter().enumerate() {
        let line = failure(command.envs(token_variables(&issuer)));
        assert!(line.contains("401"), "{line}");
        command.env("NIX_RELAY_AUDIENCE", "https://relay:1/a");
        command.env(ACTIONS, format!("{}/token?a=b", issuer.url()));
        who(&relay, number + 1, &mut command);
    }
    let asked = issuer.requests();
    let with_query = asked
        .iter()
        .filter(|url| url.starts_with("/token?a=b&audience=https%3"));
    assert_eq!(with_query.count(), 2, "{asked:?}");
}

#[test]
fn a_token_endpoint_that_fails() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let [endpoint, secret] = token_variables(&issuer);
    // A token elsewhere is not taken instead.
    let variables = [
        (endpoint.0, &*endpoint.1),
        (secret.0, &*secret.1),
        (GITLAB, "token"),
    ];
    let fail = |words: &[&str]| both_fail(&home, "ws://127.0.0.1:1", &variables, words);
    for (status, shown) in [(302, "302"), (401, "401"), (404, "404"), (500, "500")] {
        issuer.answer("/token", status, "{\"value\": \"wrong\"}");
        fail(&[ACTIONS, shown]);
    }
    for junk in [
        "",
        "<html>",
        "{}",
        "[]",
        "{\"value\": 3}",
        "{\"value\": \"\"}",
    ] {
        issuer.answer("/token", 200, junk);
        fail(&[ACTIONS, "value"]);
    }
    issuer.answer("/token", 200, "{\"value\": \"a b\"}");
    fail(&[ACTIONS, "invalid"]);
}

#[test]
fn refusals() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let stranger = issuer.token_with(json!({"repository_owner": "stranger"}));
    for (path, token, status) in [
        ("relay", "junk", "401"),
        ("relay", &stranger, "403"),
        ("no", "junk", "404"),
    ] {
        let request = upgrade_request(&format!("Authorization: Bearer {token}\r\n"));
        let request = request.replace("/relay", &format!("/{path}"));
        let answer = relay.exchange(request.as_bytes());
        let body = answer.split("\r\n\r\n").nth(1).unwrap().trim();
        let url = format!("{}/{path}", url(&relay));
        both_fail(
            &home,
            &url,
            &[(TOKEN, token)],
            &["the relay refused: ", status, body],
        );
    }
}

/// From who is not the relay, or would do something to a terminal.
#[test]
fn answers_of_others() {
    let home = Dir::new();
    let token = [(TOKEN, "token")];
    let page = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n\
                <html><head></head><body>nginx</body></html>\n";
    let of_a_proxy = ["a proxy or web server answered in the relay's place", "502"];
    both_fail(&home, &answering(page), &token, &of_a_proxy);
    // Text that the relay, whose codes end with 503, would not send.
    for (answer, status) in [
        (
            "HTTP/1.1 521\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\nerror code: 521",
            "521",
        ),
        (
            "HTTP/1.1 301 Moved\r\nLocation: https://elsewhere.invalid/\r\nContent-Length: 0\r\n\r\n",
            "301",
        ),
    ] {
        let of_a_proxy = [of_a_proxy[0], status];
        both_fail(&home, &answering(answer), &token, &of_a_proxy);
    }
    let strange = "HTTP/1.1 403 No\r\nContent-Type: text/plain\r\nContent-Length: 5000000\r\n\r\na\x1b]0;b\x07c\u{9b}d\u{202e}e\u{2066}f\u{61c}g\nnor anyone";
    let address = answering(strange);
    for mut command in clients(&home, &address) {
        let line = failure(command.envs(token));
        assert!(line.contains("the relay refused: 403: a"), "{line}");
        let is_harmful = |c: char| c.is_control() || "\u{202e}\u{2066}\u{61c}".contains(c);
        assert!(!line.trim_end().contains(is_harmful), "{line:?}");
    }
}

#[test]
fn the_reason_of_an_early_end_is_shown() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let setup = Setup::new(&issuer).daemon("echo boom >&2; exit 7");
    let relay = setup.start();
    let token = issuer.token();
    let words = ["the relay ended the session", "1011", "boom"];
    both_fail(&home, &url(&relay), &[(TOKEN, &token)], &words);
    for code in [1001, 1002, 1008, 1012] {
        let code = code.into();
        let reason = "it had to be".into();
        let frame = CloseFrame { code, reason };
        let place = format!("ws://{}", closing(Some(frame)));
        let words = ["the relay ended the session", "it had to be"];
        both_fail(&home, &place, &[(TOKEN, "token")], &words);
    }
    let place = format!("ws://{}", closing(None));
    both_fail(
        &home,
        &place,
        &[(TOKEN, "token")],
        &["the relay ended the session"],
    );
}

#[test]
fn a_warning_without_tls() {
    let home = Dir::new();
    for (place, warned) in [
        ("ws://nowhere.invalid:80", true),
        ("ws://localhost:1", false),
        ("ws://127.0.0.2:1", false),
        ("ws://[::1]:1", false),
        ("wss://nowhere.invalid", false),
    ] {
        for mut command in clients(&home, place) {
            let (_, log) = texts(&command.env(TOKEN, "token").output().unwrap());
            assert_eq!(log.contains("unencrypted"), warned, "{log}");
        }
    }
}

const COMMAND: &str = "NIX_RELAY_TOKEN_COMMAND";

#[test]
fn a_token_of_a_command() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let file = home.write("token", &issuer.token_with(json!({"sub": "file"})));
    let circle = issuer.token_with(json!({"sub": "circle"}));
    for (number, mut command) in clients(&home, &url(&relay)).into_iter().enumerate() {
        command.env(GITLAB, issuer.token()).env("FILE", &file);
        command.env(COMMAND, "cat $FILE; echo");
        assert_eq!(who(&relay, 2 * number + 1, &mut command), "file");
        // It may need what is a secret of the job's.
        command.env(CIRCLE, &circle);
        command.env(COMMAND, format!("printenv {CIRCLE}"));
        assert_eq!(who(&relay, 2 * number + 2, &mut command), "circle");
        let output = command.env(COMMAND, "echo why >&2; exit 3").output();
        let (_, log) = texts(&output.unwrap());
        let ended = format!("no token from {COMMAND}: it ended with ");
        assert!(log.starts_with("why\n") && log.contains(&ended), "{log}");
    }
    let too_long = "head -c 17000 /dev/zero | tr '\\0' x";
    let place = "ws://127.0.0.1:1";
    both_fail(&home, place, &[(COMMAND, too_long)], &[COMMAND, "16 KiB"]);
    both_fail(&home, place, &[(COMMAND, "true")], &[COMMAND, "invalid"]);
}

/// And what it has started.
#[test]
fn a_command_that_does_not_end() {
    let home = Dir::new();
    let endless = [(COMMAND, "echo token; sleep 600; true")];
    let words = [COMMAND, "it did not end within 30 s"];
    both_fail(&home, "ws://127.0.0.1:1", &endless, &words);
    let home = format!("HOME={}", home.path("").display());
    eventually("it is gone", LIMIT, || !anyone_with(&home));
}

/// A secret that would go in the clear, even with a name that looks like this machine's.
#[test]
fn a_token_endpoint_without_tls() {
    let home = Dir::new();
    for place in [
        "http://issuer.invalid",
        "http://127.0.0.1.issuer.invalid/",
        "http://localhost@issuer.invalid",
        "http://localhost:x@issuer.invalid",
        "ftp://localhost",
        "localhost",
    ] {
        for mut command in clients(&home, "ws://127.0.0.1:1") {
            command.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "hidden");
            let line = failure(command.env(ACTIONS, place));
            let is_refused = line.contains(ACTIONS) && line.contains("https");
            assert!(is_refused && !line.contains("hidden"), "{line}");
        }
    }
    // Here it is for this machine alone, whatever proxy there is.
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    for (number, mut command) in clients(&home, &url(&relay)).into_iter().enumerate() {
        command.envs(token_variables(&issuer));
        command.env("http_proxy", "http://127.0.0.1:1");
        who(&relay, number + 1, &mut command);
    }
}

#[test]
fn a_full_relay_is_not_waited_for_any_longer() {
    let home = Dir::new();
    let full = "HTTP/1.1 503 Service Unavailable\r\nNix-Relay-Queue: full\r\nRetry-After: 2\r\n\
                Content-Type: text/plain\r\nContent-Length: 5\r\n\r\nfull\n";
    for mut command in clients(&home, &answering(full)) {
        command.env(TOKEN, "token").env("NIX_RELAY_QUEUE_SECS", "4");
        let output = command.stdin(Stdio::piped()).output().unwrap();
        let (_, log) = texts(&output);
        assert_eq!((output.status.code(), log.lines().count()), (Some(1), 2));
        assert!(log.contains("all sessions are in use; waiting for up to "));
        assert!(log.ends_with(": the relay refused: 503: full\n"), "{log}");
    }
}

/// What a relay still sends when the client has closed, and how it ends.
#[test]
fn what_is_on_its_way_when_the_input_ends() {
    let home = Dir::new();
    for (code, expected) in [(1000_u16, 0), (1011, 1)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut socket = accept(stream).unwrap();
                let stream = socket.get_mut();
                // Their frames are short here: a byte for the kind, one for the length, and a mask.
                let mut head = [0; 6];
                while head[0] != 0x88 {
                    stream.read_exact(&mut head).unwrap();
                    let length = (head[1] & 0x7f).into();
                    stream.read_exact(&mut vec![0; length]).unwrap();
                }
                for _ in 0..3 {
                    stream.write_all(&[0x82, 127]).unwrap();
                    stream.write_all(&1_000_000_u64.to_be_bytes()).unwrap();
                    stream.write_all(&[b'x'; 1_000_000]).unwrap();
                }
                let code = code.to_be_bytes();
                stream.write_all(&[0x88, 2, code[0], code[1]]).unwrap();
                let _ = stream.read_to_end(&mut vec![]);
            }
        });
        for mut command in clients(&home, &url) {
            command.env(TOKEN, "token").stdin(Stdio::null());
            let output = command.output().unwrap();
            assert_eq!(output.stdout.len(), 3_000_000, "{:?}", texts(&output).1);
            assert_eq!(output.status.code(), Some(expected));
        }
    }
}

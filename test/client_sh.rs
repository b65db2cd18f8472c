//! client.sh: what curl and websocat do for it, and what it leaves behind. What it has in common with the other client is
//! in clients.rs.

use crate::client_rs::{certificates, serve_tls};
use crate::support::{nix::*, *};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use tungstenite::protocol::CloseFrame;
use tungstenite::{WebSocket, accept};

/// client.sh, as Nix runs it, in a job with these variables.
fn client(relay: &Relay, home: &Dir) -> Command {
    let mut command = job(project("client.sh"), home);
    command
        .arg("--stdio")
        .env("NIX_RELAY_URL", format!("ws://{}", relay.address));
    command
}

/// What it says before it fails: one line, with nothing on standard output.
fn failure(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, log) = texts(&output);
    assert_eq!((output.status.code(), out.as_str()), (Some(1), ""), "{log}");
    let line = log
        .strip_prefix("nix-relay-client: ")
        .and_then(|rest| rest.strip_suffix('\n'));
    line.filter(|line| !line.contains('\n'))
        .unwrap_or_else(|| panic!("not one line: {log:?}"))
        .into()
}

/// The `sub` of the token that got in.
fn who(relay: &Relay, command: &mut Command) -> String {
    let opened = || -> Vec<String> {
        let text = relay.log.text();
        text.lines()
            .filter(|line| line.contains("session opened"))
            .map(String::from)
            .collect()
    };
    let before = opened().len();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answer = [0];
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut answer)
        .unwrap();
    drop(child.stdin.take());
    assert!(wait(&mut child, LIMIT).success());
    eventually("the session is in the log", LIMIT, || {
        opened().len() > before
    });
    opened()[before]
        .split("sub=\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned()
}

/// Certificates, the file of authorities, and what it advises.
#[test]
fn what_mends_a_certificate() {
    let (dir, home) = (certificates(), Dir::new());
    let ca = dir.path("ca.pem").display().to_string();
    let intermediate = "; does the server send its intermediate certificates? Otherwise, ";
    let own = format!("{intermediate}if the CA is your own, set SSL_CERT_FILE to its certificate");
    let missing = "/no-cert-file.crt";
    let lacks = format!("{intermediate}{missing} lacks its CA, or is not there");
    let other = "; does the relay run, and is NIX_RELAY_URL right?";
    let clock = "; check the certificate, and the clock";
    let client_certificate = "; does it want a client certificate? There is none";
    for (certificate, argument, variable, file, advice) in [
        ("good", "-WWW", "HOME", missing, &*own),
        ("good", "-WWW", "SSL_CERT_FILE", missing, &lacks),
        (
            "good",
            "-WWW",
            "NIX_SSL_CERT_FILE",
            &ca,
            "relay's place: 200",
        ),
        ("expired", "-WWW", "SSL_CERT_FILE", &ca, clock),
        ("other", "-WWW", "SSL_CERT_FILE", &ca, other),
        (
            "good",
            "-Verify=1",
            "SSL_CERT_FILE",
            &ca,
            client_certificate,
        ),
    ] {
        let arguments: Vec<&str> = argument.split('=').collect();
        let (_server, address) = serve_tls(&dir, certificate, &arguments);
        let mut command = job(project("client.sh"), &home);
        command.env("NIX_RELAY_TOKEN", "token").env(variable, file);
        let url = format!("wss://{address}");
        let line = failure(command.arg("--stdio").env("NIX_RELAY_URL", url));
        assert!(line.contains(advice), "{argument} {variable}: {line}");
    }
    // That of the token endpoint, too.
    let (_server, address) = serve_tls(&dir, "good", &["-WWW"]);
    let mut command = job(project("client.sh"), &home);
    command.env("ACTIONS_ID_TOKEN_REQUEST_URL", format!("https://{address}"));
    command.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret");
    let line = failure(
        command
            .arg("--stdio")
            .env("NIX_RELAY_URL", "ws://127.0.0.1:1"),
    );
    assert!(
        line.starts_with("no token from ") && line.ends_with(&own),
        "{line}"
    );
}

/// However short the time between the last of it and the end.
#[test]
fn an_answer_arrives_to_its_end() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("head -c 100000 /dev/zero; echo end")
        .start();
    for _ in 0..20 {
        let home = Dir::new();
        let mut command = client(&relay, &home);
        let command = command
            .env("NIX_RELAY_TOKEN", issuer.token())
            .stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut answer = Vec::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut answer)
            .unwrap();
        assert!(
            answer.len() == 100_004 && answer.ends_with(b"end\n"),
            "{} bytes",
            answer.len()
        );
        wait(&mut child, LIMIT);
    }
}

/// Everything that is started for client.sh goes through wrappers that note their arguments, and all
/// that is in /proc meanwhile is looked at too.
#[test]
fn no_secret_is_in_an_argument_list() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let bin = Dir::new();
    let relay = Relay::start(&issuer);
    let seen = home.path("seen");
    for name in ["curl", "websocat"] {
        let found = job("sh", &home)
            .args(["-c", &format!("command -v {name}")])
            .output()
            .unwrap();
        let program = texts(&found).0;
        let seen = seen.display();
        bin.script(
            name,
            &format!(
                "echo {name} \"$@\" >>{seen}\nexec {} \"$@\"",
                program.trim()
            ),
        );
    }
    let path = format!(
        "{}:{}",
        bin.path("").display(),
        std::env::var("PATH").unwrap()
    );
    let mut command = client(&relay, &home);
    command.env("PATH", path).envs(token_variables(&issuer));
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    let mut answer = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut answer)
        .unwrap();
    let of = |id, file| fs::read_to_string(format!("/proc/{id}/{file}")).unwrap_or_default();
    let all = descendants(child.id()).into_iter().chain([child.id()]);
    let lines: Vec<(u32, String)> = all.map(|id| (id, of(id, "cmdline"))).collect();
    let started = lines.iter().filter(|(_, line)| !line.contains("client.sh"));
    let environments: Vec<(String, String)> = started
        .map(|(id, line)| (line.clone(), of(*id, "environ")))
        .collect();
    let lines = lines.into_iter().map(|(_, line)| line);
    let lines = lines.collect::<String>() + &fs::read_to_string(&seen).unwrap();
    drop(child.stdin.take());
    wait(&mut child, LIMIT);
    command.env("NIX_RELAY_TOKEN", "eyJ.refused.token");
    assert!(failure(&mut command).contains("401"));
    let lines = lines + &fs::read_to_string(&seen).unwrap();
    for name in ["curl -q -sS --fail", "websocat --binary", "curl -q -sS -D"] {
        assert!(lines.contains(name), "{name} was not seen in {lines}");
    }
    for secret in [issuer::REQUEST_TOKEN, "eyJ"] {
        assert!(!lines.contains(secret), "{secret} in {lines}");
    }
    // websocat needs the relay's token, and has it alone; its sh takes it away from what that starts.
    for (line, environment) in &environments {
        let has_one = environment.contains("eyJ");
        let may = line.contains("websocat\0") || line.starts_with("sh\0");
        assert!(may || !has_one, "{line} has a token");
        assert!(!environment.contains(issuer::REQUEST_TOKEN), "{line}");
    }
    let with = |part| environments.iter().any(|(_, all)| all.contains(part));
    assert!(with("WEBSOCAT_BASIC_AUTH=oidc:eyJ"), "{lines}");
}

#[test]
fn carries_50_mb_each_way() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let mut random = Vec::new();
    fs::File::open("/dev/urandom")
        .unwrap()
        .take(50_000_000)
        .read_to_end(&mut random)
        .unwrap();
    let mut command = client(&relay, &home);
    let command = command
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let sent = random.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).map(|()| stdin));
    let mut received = vec![0; random.len()];
    stdout.read_exact(&mut received).unwrap();
    assert!(received == random, "it changed on the way");
    drop(writer.join().unwrap());
    assert!(wait(&mut child, LIMIT).success());
}

#[test]
fn killed_it_leaves_nothing() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let mut command = client(&relay, &home);
    let command = command
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    relay.log.wait("session opened session=1 ");
    child.kill().unwrap();
    relay.log.wait("session ended session=1 ");
    let home = format!("HOME={}", home.path("").display());
    eventually("websocat and its helper are gone", LIMIT, || {
        child.try_wait().unwrap().is_some() && !anyone_with(&home)
    });
}

/// What listens where a relay, or a token endpoint, should: it does this with each connection, and its number.
fn stranger(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let serve = Arc::new(serve);
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let serve = serve.clone();
            thread::spawn(move || serve(number, stream));
        }
    });
    address
}

/// One that answers every request with this.
fn answering(answer: impl Into<Vec<u8>>) -> SocketAddr {
    let answer = answer.into();
    stranger(move |_, mut stream| {
        read_head(&mut stream);
        let _ = stream.write_all(&answer);
    })
}

/// One that opens a session for everybody.
fn session(serve: impl Fn(&mut WebSocket<TcpStream>) + Send + Sync + 'static) -> SocketAddr {
    stranger(move |_, stream| {
        if let Ok(mut socket) = accept(stream) {
            serve(&mut socket);
        }
    })
}

fn close(socket: &mut WebSocket<TcpStream>, code: u16, reason: &str) {
    let frame = CloseFrame {
        code: code.into(),
        reason: reason.into(),
    };
    let _ = socket.close(Some(frame));
    while socket.read().is_ok() {}
}

/// client.sh with a token, for what listens at an address; as in the background of a script, where SIGINT is ignored.
fn client_at(address: SocketAddr, home: &Dir) -> Command {
    let mut command = job("sh", home);
    command
        .args(["-c", "trap '' INT; exec \"$0\""])
        .arg(project("client.sh"))
        .env("NIX_RELAY_URL", format!("ws://{address}"))
        .env("NIX_RELAY_TOKEN", "token");
    command
}

/// One with a session, whose input is open: its status, its output and what it says.
fn run(command: &mut Command) -> (Option<i32>, Vec<u8>, String) {
    let mut child = spawn(command);
    let input = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(input);
    (
        output.status.code(),
        output.stdout.clone(),
        texts(&output).1,
    )
}

fn spawn(command: &mut Command) -> Child {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    piped.stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_token_request_is_tried_again() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let body = json!({"value": issuer.token()}).to_string();
    let endpoint = stranger(move |number, mut stream| {
        read_head(&mut stream);
        let status = ["503 Busy", "200 OK"][number.min(1)];
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let _ = stream.write_all((head + &body).as_bytes());
    });
    home.write(".curlrc", "verbose\ninclude\n");
    let mut command = client(&relay, &home);
    command.envs(token_variables(&issuer));
    command.env(
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        format!("http://{endpoint}/token"),
    );
    who(&relay, &mut command);
}

/// Control characters of all kinds, in a body of 5 MB of which no more is read than is shown.
#[test]
fn what_a_relay_says_is_shown_without_harm() {
    let home = Dir::new();
    let strange = "a\x1b]0;b\x07c\u{9b}d\u{202e}e\u{2066}f\u{61c}g\u{7f}h";
    let head = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n";
    let body = strange.to_owned() + &"x".repeat(5_000_000);
    let address = stranger(move |_, mut stream| {
        read_head(&mut stream);
        let whole = stream
            .write_all((head.to_owned() + &body).as_bytes())
            .is_ok();
        assert!(!whole, "all of it was taken");
    });
    let line = failure(&mut client_at(address, &home));
    let text = line.strip_prefix("the relay refused: 403: ").unwrap();
    assert!(
        text.bytes().all(|byte| (b' '..=b'~').contains(&byte)),
        "{line:?}"
    );
    assert!(text.starts_with("a?]0;b?c") && text.len() <= 400, "{line}");
    let reason = format!("\"{strange}\"");
    let address = session(move |socket| {
        close(socket, 1011, &reason);
    });
    let (status, _, log) = run(&mut client_at(address, &home));
    assert!(
        log.starts_with("nix-relay-client: the relay ended the session: 1011: \"a"),
        "{log}"
    );
    assert!(
        log.trim_end()
            .bytes()
            .all(|byte| (b' '..=b'~').contains(&byte)),
        "{log:?}"
    );
    assert_eq!(status, Some(1));
}

/// websocat of before 1.14 does as this one: it does not know the variable with the token.
#[test]
fn an_old_websocat_is_named() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let bin = Dir::new();
    let relay = Relay::start(&issuer);
    let path = format!(
        "{}:{}",
        project("target/tools/bin").display(),
        std::env::var("PATH").unwrap()
    );
    bin.script(
        "websocat",
        &format!(
            "[ \"$1\" != --version ] || exec echo websocat 1.13.0\nunset WEBSOCAT_BASIC_AUTH\n\
             PATH={path}\nexec websocat \"$@\""
        ),
    );
    let mut command = client(&relay, &home);
    command.env("NIX_RELAY_TOKEN", issuer.token());
    let line = failure(command.env("PATH", format!("{}:{path}", bin.path("").display())));
    assert!(line.starts_with("websocat 1.13.0 is too old: "), "{line}");
}

/// What curl asks after websocat failed does not hold the session that it gets.
#[test]
fn the_question_why_there_is_no_session_holds_none() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let bin = Dir::new();
    let relay = Relay::start(&issuer);
    bin.script(
        "websocat",
        "[ \"$1\" != --version ] || exec echo websocat 1.14.1\n\
         echo 'websocat: WebSocketError: WebSocketError: TLS: certificate verify failed' >&2; exit 1",
    );
    let path = format!(
        "{}:{}",
        bin.path("").display(),
        std::env::var("PATH").unwrap()
    );
    let mut command = client(&relay, &home);
    command
        .env("NIX_RELAY_TOKEN", issuer.token())
        .env("PATH", path);
    let before = Instant::now();
    let line = failure(&mut command);
    assert!(before.elapsed() < Duration::from_secs(8), "it waited");
    let why = ": TLS: certificate verify failed; does the server send its intermediate certificates? Otherwise, if the CA is your own, set SSL_CERT_FILE to its certificate";
    assert!(
        line.starts_with("cannot reach ws://") && line.ends_with(why),
        "{line}"
    );
    relay.log.wait("session ended session=1 ");
}

/// A listener that takes connections and says nothing, to a WebSocket and to TLS.
#[test]
fn a_listener_that_never_answers() {
    let address =
        stranger(|_, mut stream| while stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {});
    let ask = move |scheme: &str| {
        let home = Dir::new();
        let mut command = client_at(address, &home);
        failure(command.env("NIX_RELAY_URL", format!("{scheme}://{address}")))
    };
    let tls = thread::spawn(move || ask("wss"));
    let line = ask("ws");
    assert!(
        line.contains("/relay: Operation timed out after "),
        "{line}"
    );
    let line = tls.join().unwrap();
    assert!(line.contains("/relay: ") && line.contains("time"), "{line}");
}

/// It takes what comes, and answers nothing more.
#[test]
fn a_peer_that_vanishes() {
    let home = Dir::new();
    let address =
        session(|socket| while socket.get_mut().read(&mut [0; 4096]).is_ok_and(|n| n > 0) {});
    let (status, _, log) = run(client_at(address, &home).env("NIX_RELAY_KEEPALIVE_SECS", "1"));
    let line =
        "the session broke off: no response from the relay for three keepalive intervals (3 s)";
    assert_eq!(
        (status, log),
        (Some(1), format!("nix-relay-client: {line}\n"))
    );
}

/// Waits until websocat has pinged so often, and does not answer.
fn unanswered(socket: &mut WebSocket<TcpStream>, pings: usize) {
    for _ in 0..pings {
        let mut head = [0; 18];
        socket.get_mut().read_exact(&mut head).unwrap();
        assert_eq!(head[..2], [0x89, 0x8c], "not a ping of websocat");
    }
}

/// A relay that is too busy to answer pings, but for data.
#[test]
fn data_is_a_sign_of_life() {
    let home = Dir::new();
    let address = session(|socket| {
        for _ in 0..8 {
            unanswered(socket, 1);
            socket.send(Message::Binary("x".into())).unwrap();
        }
        close(socket, 1000, "");
    });
    let (status, out, log) = run(client_at(address, &home).env("NIX_RELAY_KEEPALIVE_SECS", "1"));
    assert_eq!(
        (status, out.as_slice(), &*log),
        (Some(0), &b"xxxxxxxx"[..], "")
    );
}

/// A Nix that is too busy to take what came, behind which pongs wait.
#[test]
fn nobody_is_gone_while_nix_is_busy() {
    let home = Dir::new();
    let length = 1_000_000;
    let (seen, pings_are_seen) = mpsc::channel();
    let address = session(move |socket| {
        socket
            .send(Message::Binary(vec![1; length].into()))
            .unwrap();
        unanswered(socket, 8);
        seen.send(()).unwrap();
        close(socket, 1000, "");
    });
    let mut command = client_at(address, &home);
    let mut child = spawn(command.env("NIX_RELAY_KEEPALIVE_SECS", "1"));
    let log = Log::of(child.stderr.take().unwrap());
    pings_are_seen.recv_timeout(LIMIT).unwrap();
    let mut received = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut received)
        .unwrap();
    assert!(wait(&mut child, LIMIT).success());
    assert_eq!((received.len(), log.text()), (length, String::new()));
}

/// Nix kills its client when it is done, and the relay hears a Close all the same.
#[test]
fn good_sessions_of_nix_end_with_a_close() {
    let farm = Farm::start();
    let runner = farm.runner();
    let remote = farm.runner().remote();
    for _ in 0..5 {
        runner.run(&["store", "ping", "--store", &remote]);
    }
    let file = runner.derivation("good", "echo > $out");
    assert!(runner.build(&file).status().unwrap().success());
    let path = runner.out_path(&file);
    runner.run(&["copy", "--no-check-sigs", "--from", &remote, &path]);
    let count = |part| farm.relay.log.text().matches(part).count();
    eventually("all sessions have ended", LIMIT, || {
        count("session opened ") == count("session ended ")
    });
    assert!(count("session ended ") >= 7);
    assert_eq!(count("session ended "), count(" reason=client-closed "));
}

/// Ctrl-C goes to all that has the terminal.
#[test]
fn an_interrupted_nix_leaves_nothing() {
    let farm = Farm::start();
    let runner = farm.runner();
    let file = runner.derivation("endless", "echo started; /bin/sleep 600");
    let mut command = runner.build(&file);
    let command = command.process_group(0).stderr(Stdio::piped());
    let mut build = command.spawn().unwrap();
    Log::of(build.stderr.take().unwrap()).wait("> started");
    let url = format!("NIX_RELAY_URL=ws://{}", farm.relay.address);
    assert!(anyone_with(&url));
    let group = format!("kill -INT -{}", build.id());
    assert!(
        Command::new("sh")
            .args(["-c", &group])
            .status()
            .unwrap()
            .success()
    );
    assert!(!wait(&mut build, LIMIT).success());
    eventually("nix and its clients are gone", LIMIT, || !anyone_with(&url));
    farm.relay.log.wait("session ended session=1 ");
}

/// Answers that the relay is full.
const FULL: &str =
    "HTTP/1.1 503 Service Unavailable\r\nNix-Relay-Queue: full\r\nContent-Length: 5\r\n\r\nfull\n";

/// A session, its second attempt, with a token of its own; what asks in between is curl.
#[test]
fn a_full_relay_is_waited_for() {
    let home = Dir::new();
    let address = stranger(|number, mut stream| {
        if number < 2 {
            read_head(&mut stream);
            let _ = stream.write_all(FULL.as_bytes());
        } else {
            close(&mut accept(stream).unwrap(), 1000, "");
        }
    });
    let mut command = client_at(address, &home);
    command.env_remove("NIX_RELAY_TOKEN").env(
        "NIX_RELAY_TOKEN_COMMAND",
        "echo x >>$HOME/asked; echo token",
    );
    let (status, _, log) = run(&mut command);
    assert_eq!(status, Some(0), "{log}");
    let line = "nix-relay-client: all sessions are in use; waiting for up to 3";
    assert!(log.starts_with(line) && log.lines().count() == 1, "{log}");
    assert_eq!(fs::read_to_string(home.path("asked")).unwrap(), "x\nx\n");
}

/// No process is left that would take a session for a Nix that is gone.
#[test]
fn waiting_ends_with_nix() {
    let home = Dir::new();
    let mut command = client_at(answering(FULL), &home);
    let nix = "trap '' INT; \"$0\" & wait";
    let mut command = rewrapped(&mut command, nix);
    let mut nix = spawn(&mut command);
    Log::of(nix.stderr.take().unwrap()).wait("waiting for up to ");
    nix.kill().unwrap();
    nix.wait().unwrap();
    let home = format!("HOME={}", home.path("").display());
    eventually("nothing is left", LIMIT, || !anyone_with(&home));
}

/// Another script for the shell that starts client.sh.
fn rewrapped(command: &mut Command, script: &str) -> Command {
    let mut other = Command::new("sh");
    other.args(["-c", script]).arg(project("client.sh"));
    for (name, value) in command.get_envs() {
        other.env(name, value.unwrap());
    }
    other
}

/// A directory with nothing in it but these programs, as PATH.
fn programs(names: &[&str], home: &Dir) -> Dir {
    let bin = Dir::new();
    for name in names {
        let mut find = job("sh", home);
        let found = find.args(["-c", &format!("command -v {name}")]).output();
        let found = texts(&found.unwrap()).0;
        std::os::unix::fs::symlink(found.trim(), bin.path(name)).unwrap();
    }
    bin
}

#[test]
fn programs_that_are_missing_are_named() {
    let home = Dir::new();
    let all = ["bash", "cat", "curl", "env", "sh", "sleep", "websocat"];
    for missing in &all[1..] {
        let others: Vec<&str> = all.into_iter().filter(|name| name != missing).collect();
        let bin = programs(&others, &home);
        let line = failure(job(project("client.sh"), &home).env("PATH", bin.path("")));
        assert_eq!(line, format!("not installed: {missing}"));
    }
    let bin = programs(&["bash", "cat", "env", "sh", "sleep"], &home);
    let line = failure(job(project("client.sh"), &home).env("PATH", bin.path("")));
    assert_eq!(line, "not installed: curl, websocat");
}

/// An image with BusyBox, and a path with a space.
#[test]
fn nothing_but_busybox() {
    let issuer = Issuer::start();
    let home = Dir::new();
    let relay = Relay::start(&issuer);
    let bin = programs(&["bash", "curl", "websocat", "busybox"], &home);
    for name in ["cat", "env", "sh", "sleep", "timeout"] {
        std::os::unix::fs::symlink("busybox", bin.path(name)).unwrap();
    }
    fs::create_dir(home.path("a b")).unwrap();
    fs::copy(project("client.sh"), home.path("a b/client.sh")).unwrap();
    let mut command = job(home.path("a b/client.sh"), &home);
    command.env("NIX_RELAY_URL", format!("ws://{}", relay.address));
    command
        .env("PATH", bin.path(""))
        .env("TOKEN", issuer.token());
    let command = command.env("NIX_RELAY_TOKEN_COMMAND", "echo $TOKEN");
    who(&relay, command);
    let home = format!("HOME={}", home.path("").display());
    eventually("nothing is left", LIMIT, || !anyone_with(&home));
}

//! client.sh: where it finds a token, what it says when something is wrong, and what it leaves behind.

use crate::support::{nix::*, *};
use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

const GITLAB: &str = "GITLAB_OIDC_TOKEN";
const CIRCLE: &str = "CIRCLE_OIDC_TOKEN_V2";

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

#[test]
fn each_token_source_in_its_order() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Relay::start(&issuer);
    let named = |name: &str| issuer.token_with(json!({"sub": name}));
    let mut command = client(&relay, &home);
    assert_eq!(who(&relay, command.env(CIRCLE, named("circle"))), "circle");
    assert_eq!(who(&relay, command.env(GITLAB, named("gitlab"))), "gitlab");
    command.envs(token_variables(&issuer));
    assert_eq!(
        who(&relay, &mut command),
        "repo:example-org/project:ref:refs/heads/main"
    );
    assert_eq!(
        who(&relay, command.env("NIX_RELAY_TOKEN", named("given"))),
        "given"
    );
    let empty = command
        .env("NIX_RELAY_TOKEN", "")
        .env("ACTIONS_ID_TOKEN_REQUEST_URL", "");
    assert_eq!(who(&relay, empty), "gitlab");
}

#[test]
fn the_audience_is_asked_for() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer)
        .set("AUDIENCE", "https://relay:1/a")
        .start();
    let mut command = client(&relay, &home);
    command.envs(token_variables(&issuer));
    assert!(failure(&mut command).starts_with("the relay refused: 401: "));
    command.env("NIX_RELAY_AUDIENCE", "https://relay:1/a");
    who(&relay, &mut command);
    who(
        &relay,
        command.env(
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            format!("{}/token?a=b", issuer.url()),
        ),
    );
    let asked = issuer.requests();
    for query in [
        "?audience=api%3A%2F%2Fnix-relay",
        "?audience=https%3A%2F%2Frelay%3A1%2Fa",
    ] {
        assert!(asked.contains(&format!("/token{query}")), "{asked:?}");
    }
    assert!(
        asked.contains(&"/token?a=b&audience=https%3A%2F%2Frelay%3A1%2Fa".into()),
        "{asked:?}"
    );
}

#[test]
fn a_refused_token_and_an_unreachable_relay() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Relay::start(&issuer);
    let mut command = client(&relay, &home);
    let stranger = issuer.token_with(json!({"repository_owner": "stranger"}));
    let line = failure(command.env("NIX_RELAY_TOKEN", &stranger));
    let body = relay.upgrade(&format!("Authorization: Bearer {stranger}\r\n"));
    let body = body.split("\r\n\r\n").nth(1).unwrap().trim();
    assert_eq!(line, format!("the relay refused: 403: {body}"));
    assert!(
        failure(command.env("NIX_RELAY_TOKEN", "junk")).starts_with("the relay refused: 401: ")
    );
    assert!(
        failure(command.env("NIX_RELAY_TOKEN", "a\r\nX: y")).contains("the token has characters")
    );
    let line = failure(
        command
            .env("NIX_RELAY_URL", "ws://127.0.0.1:1")
            .env("NIX_RELAY_TOKEN", "junk"),
    );
    assert!(
        line.starts_with("cannot reach ws://127.0.0.1:1/relay: Failed to connect"),
        "{line}"
    );
    let line = failure(command.env("NIX_RELAY_URL", "ws://nowhere.invalid"));
    assert!(
        line.contains("Could not resolve host: nowhere.invalid"),
        "{line}"
    );
}

#[test]
fn what_is_missing_is_named() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Relay::start(&issuer);
    let line = failure(&mut client(&relay, &home));
    for name in [
        "NIX_RELAY_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        GITLAB,
        CIRCLE,
    ] {
        assert!(line.contains(name), "{line}");
    }
    for url in ["", "https://relay", "relay:80"] {
        let line = failure(client(&relay, &home).env("NIX_RELAY_URL", url));
        assert!(line.starts_with("set NIX_RELAY_URL "), "{line}");
    }
    for missing in ["curl", "jq", "websocat", "cat", "sh"] {
        let bin = Dir::new();
        for present in ["bash", "curl", "jq", "websocat", "cat", "sh"]
            .into_iter()
            .filter(|name| *name != missing)
        {
            let found = job("sh", &home)
                .args(["-c", &format!("command -v {present}")])
                .output()
                .unwrap();
            std::os::unix::fs::symlink(texts(&found).0.trim(), bin.path(present)).unwrap();
        }
        let line = failure(client(&relay, &home).env("PATH", bin.path("")));
        assert!(
            line.starts_with(&format!("{missing} is not installed")),
            "{line}"
        );
    }
}

#[test]
fn a_token_endpoint_that_fails() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Relay::start(&issuer);
    let mut command = client(&relay, &home);
    command
        .envs(token_variables(&issuer))
        .env(GITLAB, issuer.token());
    issuer.answer("/token", 500, "{\"value\": \"wrong\"}");
    let from = "no token from ACTIONS_ID_TOKEN_REQUEST_URL: ";
    assert_eq!(
        failure(&mut command),
        format!("{from}The requested URL returned error: 500")
    );
    for junk in [
        "",
        "<html>",
        "{}",
        "[]",
        "{\"value\": 3}",
        "{\"value\": \"\"}",
        "{\"value\": null}",
    ] {
        issuer.answer("/token", 200, junk);
        assert_eq!(
            failure(&mut command),
            format!("{from}its answer has no .value"),
            "{junk}"
        );
    }
}

#[test]
fn the_reason_of_an_early_end_is_shown() {
    let (issuer, home) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer)
        .daemon("read line; echo boom >&2; exit 7")
        .start();
    let mut command = client(&relay, &home);
    let command = command
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(b"line\n").unwrap();
    let mut log = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(
        log.starts_with("nix-relay-client: the relay ended the session: 1011: "),
        "{log}"
    );
    assert!(
        log.contains("exited with status 7: boom") && log.matches('\n').count() == 1,
        "{log}"
    );
    assert!(wait(&mut child, LIMIT).code().is_some());
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
    let (issuer, home, bin) = (Issuer::start(), Dir::new(), Dir::new());
    let relay = Relay::start(&issuer);
    let seen = home.path("seen");
    for name in ["curl", "jq", "tr", "websocat"] {
        let found = job("sh", &home)
            .args(["-c", &format!("command -v {name}")])
            .output()
            .unwrap();
        let (program, seen) = (texts(&found).0, seen.display());
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
    let all = descendants(child.id()).into_iter().chain([child.id()]);
    let lines = all.map(|id| fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap());
    let lines = lines.collect::<String>() + &fs::read_to_string(&seen).unwrap();
    let environment = fs::read_to_string(format!("/proc/{}/environ", child.id())).unwrap();
    drop(child.stdin.take());
    wait(&mut child, LIMIT);
    command.env("NIX_RELAY_TOKEN", "eyJ.refused.token");
    assert!(failure(&mut command).contains("401"));
    let lines = lines + &fs::read_to_string(&seen).unwrap();
    for name in [
        "curl -sS --fail",
        "jq -rn",
        "jq -r .value",
        "websocat --binary",
        "curl -sS --noproxy",
        "tr -d",
    ] {
        assert!(lines.contains(name), "{name} was not seen in {lines}");
    }
    for secret in [issuer::REQUEST_TOKEN, "eyJ"] {
        assert!(!lines.contains(secret), "{secret} in {lines}");
    }
    // What is left when it has become websocat: the relay's token, which that needs, alone.
    assert!(environment.contains("WEBSOCAT_BASIC_AUTH=oidc:eyJ"));
    assert!(
        !environment.contains(issuer::REQUEST_TOKEN),
        "{environment}"
    );
}

#[test]
fn carries_50_mb_each_way() {
    let (issuer, home) = (Issuer::start(), Dir::new());
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
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
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
    let (issuer, home) = (Issuer::start(), Dir::new());
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

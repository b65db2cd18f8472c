//! The HTTP table: every row, byte for byte.

use crate::support::*;
use jwt_simple::reexports::ct_codecs::{Base64, Encoder};
use std::io::{ErrorKind, Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

const BEARER: &str = "www-authenticate: Bearer realm=\"nix-relay\"";
const INVALID: &str = "www-authenticate: Bearer realm=\"nix-relay\", error=\"invalid_token\"";
const UPGRADE: &[&str] = &[
    "upgrade: websocket",
    "sec-websocket-version: 13",
    "connection: upgrade",
];
const RETRY: &str = "retry-after: 2";

/// Every byte of an answer is checked, but for the words of its line, which must say `says`; and
/// the log must have a line of it.
fn refused(relay: &Relay, request: impl AsRef<[u8]>, status: &str, headers: &[&str], says: &str) {
    let (answer, line) = relay.refused(request.as_ref());
    let request = request.as_ref().escape_ascii();
    let about = format!("{request:.300}\nwas answered\n{answer}and logged\n{line}");
    let body = check_head(&answer, status, headers, &about);
    let is_said = body.to_lowercase().contains(&says.to_lowercase());
    assert!(is_said, "no {says:?}: {about}");
    assert_eq!(
        body.find('\n'),
        Some(body.len() - 1),
        "not one line: {about}"
    );
    assert!(
        line.contains(&format!(" status={} reason=\"", &status[..3])),
        "{about}"
    );
}

/// Compares the head of an answer, in whatever order its headers are, and returns the body.
fn check_head<'a>(answer: &'a str, status: &str, headers: &[&str], about: &str) -> &'a str {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no head: {about}"));
    let lower = |line: &str| match line.split_once(": ") {
        Some((name, value)) => format!("{}: {value}", name.to_lowercase()),
        None => line.to_owned(),
    };
    let mut head: Vec<_> = head.split("\r\n").map(lower).collect();
    // One of a list, or a line of its own, is the same (RFC 9110, section 5.3).
    if let Some(both) = head
        .iter()
        .position(|line| line == "connection: upgrade, close")
    {
        head[both] = "connection: close".into();
        head.push("connection: upgrade".into());
    }
    let date = head.iter().position(|line| line.starts_with("date: "));
    let date = head.remove(date.unwrap_or_else(|| panic!("no Date: {about}")));
    check_date(date.strip_prefix("date: ").unwrap());
    let status = format!("HTTP/1.1 {status}");
    let length = format!("content-length: {}", body.len());
    let mut expected = vec![
        &status,
        "content-type: text/plain; charset=utf-8",
        &length,
        "connection: close",
    ];
    expected.extend(headers);
    head[1..].sort();
    expected[1..].sort();
    assert_eq!(head, expected, "{about}");
    body
}

/// In the form that RFC 9110 wants (section 5.6.7), and not another time than now.
fn check_date(date: &str) {
    let output = Command::new("date").args(["+%s", "-d", date]).output();
    let secs = String::from_utf8(output.unwrap().stdout).unwrap();
    let secs: u64 = secs.trim().parse().unwrap_or_else(|_| panic!("{date}"));
    assert!(issuer::now().abs_diff(secs) < 60, "{date}");
    let format = ["-u", "+%a, %d %b %Y %T GMT", "-d", date];
    let output = Command::new("date")
        .env("LC_ALL", "C")
        .args(format)
        .output();
    assert_eq!(
        String::from_utf8(output.unwrap().stdout).unwrap().trim(),
        date
    );
}

/// A request with nothing but these header lines.
fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: relay\r\n{headers}\r\n")
}

/// The head of the 101, or of what came instead.
fn upgraded(relay: &Relay, headers: &str) -> String {
    let mut stream = relay.tcp();
    stream
        .write_all(upgrade_request(headers).as_bytes())
        .unwrap();
    read_head(&mut stream)
}

/// An answer but for its Date, which may be a second later than another.
fn undated(answer: &str) -> String {
    let is_date = |line: &&str| line.to_lowercase().starts_with("date: ");
    let lines = answer.split_inclusive("\r\n");
    lines.filter(|line| !is_date(line)).collect()
}

#[test]
fn healthz() {
    let relay = Relay::start(&Issuer::start());
    let answer = relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
    assert_eq!(check_head(&answer, "200 OK", &[], &answer), "ok\n");
    let head = answer.strip_suffix("ok\n").unwrap();
    let got = relay.exchange(b"HEAD /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
    assert_eq!(undated(&got), undated(head));
}

#[test]
fn a_good_token_opens_a_session() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut client = relay.connect(&issuer.token());
    client.send("hello");
    assert_eq!(client.receive(), b"hello");
    client.close();
    relay
        .log
        .wait("session ended session=1 reason=client-closed");
}

#[test]
fn switching_protocols() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let authorization = format!("Authorization: Bearer {}\r\n", issuer.token());
    let rows = [
        ("", ""),
        (
            "Sec-WebSocket-Protocol: binary\r\n",
            "sec-websocket-protocol: binary\r\n",
        ),
        (
            "Sec-WebSocket-Protocol: mqtt, binary\r\n",
            "sec-websocket-protocol: binary\r\n",
        ),
        (
            "Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Protocol: binary\r\n",
            "sec-websocket-protocol: binary\r\n",
        ),
        (
            "Sec-WebSocket-Protocol: binary, nix-relay.zstd\r\n",
            "sec-websocket-protocol: nix-relay.zstd\r\n",
        ),
        ("Sec-WebSocket-Protocol: mqtt, binary2\r\n", ""),
    ];
    for (offered, chosen) in rows {
        let expected = format!(
            "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n{chosen}\r\n"
        );
        assert_eq!(
            upgraded(&relay, &format!("{offered}{authorization}")),
            expected,
            "{offered}"
        );
    }
}

/// Lists over several lines, with spaces and tabs around their members (RFC 9110, section 5.6.1).
#[test]
fn an_upgrade_among_others() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let connection = "Connection: Upgrade\r\n";
    let upgrade = "Upgrade: websocket\r\n";
    for (part, instead) in [
        (connection, "Connection: keep-alive, Upgrade\r\n"),
        (connection, "Connection: keep-alive,upgrade\r\n"),
        (
            connection,
            "Connection: keep-alive\r\nConnection: Upgrade\r\n",
        ),
        (
            connection,
            "Connection: Upgrade\r\nconnection: keep-alive\r\n",
        ),
        (connection, "Connection:\tkeep-alive\t,\tUPGRADE\t\r\n"),
        (connection, "Connection: , ,Upgrade, \r\n"),
        (upgrade, "Upgrade: h2c, websocket\r\n"),
        (upgrade, "Upgrade: h2c\r\nUpgrade: WebSocket\r\n"),
        (upgrade, "Upgrade:\twebsocket ,\th2c\r\n"),
        // None at all is no body.
        (connection, "Connection: Upgrade\r\nContent-Length: 0\r\n"),
        ("Host: relay\r\n", "Host:\r\n"),
    ] {
        assert!(request.contains(part));
        let mut stream = relay.tcp();
        stream
            .write_all(request.replacen(part, instead, 1).as_bytes())
            .unwrap();
        let head = read_head(&mut stream);
        assert!(head.starts_with("HTTP/1.1 101 "), "{instead}{head}");
    }
}

#[test]
fn refusals() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    let token = issuer.token();
    let stranger = issuer.token_with(json!({"repository_owner": "somebody-else"}));
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let basic = |pair: &str| {
        format!(
            "Authorization: Basic {}\r\n",
            Base64::encode_to_string(pair).unwrap()
        )
    };
    let good = upgrade_request(&bearer(&token));
    let padded = |length: usize| {
        let head = get("/nothing", "Padding: \r\n");
        head.replace(
            "Padding: ",
            &format!("Padding: {}", "p".repeat(length - head.len())),
        )
    };
    let mut rows: Vec<(String, &str, &[&str], &str)> = vec![
        (get("/", ""), "404 Not Found", &[], "/relay"),
        (get("/relay/", ""), "404 Not Found", &[], "/relay"),
        (get("/healthz/", ""), "404 Not Found", &[], "/relay"),
        (get("/RELAY", ""), "404 Not Found", &[], "/relay"),
        (padded(16 << 10), "404 Not Found", &[], "/relay"),
        (
            good.replace("GET", "POST"),
            "405 Method Not Allowed",
            &["allow: GET"],
            "method",
        ),
        (
            good.replace("GET", "get"),
            "405 Method Not Allowed",
            &["allow: GET"],
            "method",
        ),
        (
            "PUT /healthz HTTP/1.1\r\nHost: relay\r\n\r\n".into(),
            "405 Method Not Allowed",
            &["allow: GET, HEAD"],
            "method",
        ),
        ("junk\r\n\r\n".into(), "400 Bad Request", &[], "HTTP/1.1"),
        (
            "\u{16}\u{3}\u{1}\u{2}\u{0}".into(),
            "400 Bad Request",
            &[],
            "TLS",
        ),
        (
            "GET /relay HTTP/2.0\r\n\r\n".into(),
            "400 Bad Request",
            &[],
            "HTTP/1.1",
        ),
        (
            get("/relay", "no colon\r\n"),
            "400 Bad Request",
            &[],
            "HTTP/1.1",
        ),
        (
            get("/relay", "Na me: value\r\n"),
            "400 Bad Request",
            &[],
            "HTTP/1.1",
        ),
        (
            get("/relay", "Name: va\0lue\r\n"),
            "400 Bad Request",
            &[],
            "HTTP/1.1",
        ),
        (
            upgrade_request(&(bearer(&token) + &bearer(&token))),
            "400 Bad Request",
            &[],
            "Authorization",
        ),
        (
            padded((16 << 10) + 1),
            "431 Request Header Fields Too Large",
            &[],
            "16 KiB",
        ),
        (
            "p".repeat(20 << 10),
            "431 Request Header Fields Too Large",
            &[],
            "16 KiB",
        ),
        (
            upgrade_request(&bearer("junk")),
            "401 Unauthorized",
            &[INVALID],
            "token",
        ),
        (
            upgrade_request(&basic("user:junk")),
            "401 Unauthorized",
            &[INVALID],
            "token",
        ),
        (
            upgrade_request(&bearer(&stranger)),
            "403 Forbidden",
            &[],
            "token",
        ),
    ];
    let host = "Host: relay\r\n";
    let bearer_line = bearer(&token);
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let with = |line: &str| good.replacen(&bearer_line, &(line.to_owned() + &bearer_line), 1);
    let proxied = |header: &str| format!("{header}{good}");
    for (request, says) in [
        (good.replace(host, ""), "Host"),
        (good.replace(host, "Host: relay\r\nHost: relay\r\n"), "Host"),
        (good.replace(host, "Host: relay\r\nhost: other\r\n"), "Host"),
        (get("/healthz", "").replace(host, ""), "Host"),
        (get("/healthz", host), "Host"),
        (get("/nothing", "").replace(host, ""), "Host"),
        (with("Content-Length: 5\r\n") + "abcde", "body"),
        (with("Transfer-Encoding: chunked\r\n") + "0\r\n\r\n", "body"),
        (with(key), "Sec-WebSocket-Key"),
        (
            with("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"),
            "Sec-WebSocket-Key",
        ),
        (
            proxied("PROXY TCP4 192.0.2.1 192.0.2.2 5000 80\r\n"),
            "PROXY protocol",
        ),
        (proxied("PROXY UNKNOWN\r\n"), "PROXY protocol"),
        // Version 2, whose first twelve bytes are the same whatever follows.
        (
            proxied("\r\n\r\n\0\r\nQUIT\n\u{20}\0\0\0"),
            "PROXY protocol",
        ),
    ] {
        rows.push((request, "400 Bad Request", &[], says));
    }
    for path in ["/relay", "/relay?x=y", "http://relay/relay"] {
        rows.push((get(path, ""), "426 Upgrade Required", UPGRADE, "WebSocket"));
        rows.push((
            get(path, &bearer(&token)),
            "426 Upgrade Required",
            UPGRADE,
            "WebSocket",
        ));
    }
    for (part, instead) in [
        ("HTTP/1.1", "HTTP/1.0"),
        ("HTTP/1.1\r\nHost: relay", "HTTP/1.0"),
        ("Connection: Upgrade\r\n", ""),
        ("Connection: Upgrade", "Connection: keep-alive"),
        // A proxy that reads these as RFC 9110 has them would take a 101 for an error of the relay.
        ("Connection: Upgrade", "Connection: keep-alive Upgrade"),
        ("Connection: Upgrade", "Connection: Upgrade keep-alive"),
        ("Connection: Upgrade", "Connection: Upgraded"),
        ("Upgrade: websocket", "Upgrade: h2c websocket"),
        ("Upgrade: websocket", "Upgrade: websockets"),
        ("Upgrade: websocket\r\n", ""),
        ("Upgrade: websocket", "Upgrade: h2c"),
        ("Sec-WebSocket-Version: 13\r\n", ""),
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 8"),
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
        ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j"),
        ("dGhlIHNhbXBsZSBub25jZQ==", "%%%%IHNhbXBsZSBub25jZQ=="),
    ] {
        assert!(good.contains(part));
        rows.push((
            good.replace(part, instead),
            "426 Upgrade Required",
            UPGRADE,
            "WebSocket",
        ));
    }
    for authorization in [
        "".into(),
        "Authorization:\r\n".into(),
        "Authorization: Bearer\r\n".into(),
        format!("Authorization: {token}\r\n"),
        format!("Authorization: Token {token}\r\n"),
        format!("Authorization: Digest {token}\r\n"),
        format!("Authorization: Basic {token}\r\n"),
        format!("Cookie: {token}\r\n"),
        basic(&token),
    ] {
        rows.push((
            upgrade_request(&authorization),
            "401 Unauthorized",
            &[BEARER],
            "token",
        ));
    }
    for (request, status, headers, says) in &rows {
        refused(&relay, request, status, headers, says);
    }
    let log = relay.stop();
    assert_eq!(log.matches("refused ").count(), rows.len());
    assert!(!log.contains("session opened"));
    for token in [token, stranger] {
        assert!(
            token.split('.').all(|part| !log.contains(part)),
            "a token in the log"
        );
    }
}

#[test]
fn the_answer_to_head_is_that_to_get_without_its_body() {
    let relay = Relay::start(&Issuer::start());
    for (path, status) in [("/nothing", "404"), ("/healthz", "200")] {
        let got = relay.exchange(get(path, "").as_bytes());
        let (head, body) = got.split_at(got.find("\r\n\r\n").unwrap() + 4);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")) && !body.is_empty());
        let asked = relay.exchange(get(path, "").replace("GET", "HEAD").as_bytes());
        assert_eq!(undated(&asked), undated(head));
    }
    let head = relay.exchange(b"HEAD /relay HTTP/1.1\r\nHost: relay\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 405 ") && head.contains("\r\nAllow: GET\r\n"),
        "{head}"
    );
    assert!(head.ends_with("\r\n\r\n"), "a body: {head}");
}

#[test]
fn a_token_may_come_in_several_ways() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let token = issuer.token();
    let basic = |user: &str| Base64::encode_to_string(format!("{user}:{token}")).unwrap();
    for authorization in [
        format!("Authorization: Bearer {token}\r\n"),
        format!("authorization:bearer {token}\r\n"),
        format!("AUTHORIZATION:  BEARER   {token}  \r\n"),
        format!("Authorization: Basic {}\r\n", basic("oidc")),
        format!("Authorization: basic {}\r\n", basic("")),
        format!("Authorization: BASIC {}\r\n", basic("somebody@example.org")),
    ] {
        let head = upgraded(&relay, &authorization);
        assert!(head.starts_with("HTTP/1.1 101 "), "{authorization}{head}");
    }
}

#[test]
fn a_request_may_come_in_pieces() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut stream = relay.tcp();
    stream.set_nodelay(true).unwrap();
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    for byte in request.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 101 "));
}

#[test]
fn issuer_without_keys() {
    let issuer = Issuer::start();
    issuer.answer("/jwks", 500, "");
    let relay = Relay::start(&issuer);
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    refused(&relay, request, "503 Service Unavailable", &[RETRY], "keys");
}

#[test]
fn no_permit_in_time() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "1")
        .start();
    let mut first = relay.connect(&issuer.token());
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let start = Instant::now();
    refused(
        &relay,
        request,
        "503 Service Unavailable",
        &[RETRY, "nix-relay-queue: full"],
        "try again",
    );
    assert!(start.elapsed() >= Duration::from_secs(1), "it did not wait");
    first.close();
    relay.log.wait("session ended session=1 ");
    relay.connect(&issuer.token()).close();
}

#[test]
fn a_permit_in_time() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("MAX_CONNECTIONS", "1").start();
    let mut first = relay.connect(&issuer.token());
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let mut second = relay.tcp();
    second.write_all(request.as_bytes()).unwrap();
    first.close();
    assert!(read_head(&mut second).starts_with("HTTP/1.1 101 "));
}

#[test]
fn draining() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    let mut client = relay.connect(&issuer.token());
    relay.signal("TERM");
    relay.log.wait("shutting down");
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    refused(
        &relay,
        request,
        "503 Service Unavailable",
        &[RETRY],
        "shutting down",
    );
    let answer = relay.exchange(get("/healthz", "").as_bytes());
    assert_eq!(
        check_head(&answer, "503 Service Unavailable", &[], &answer),
        "draining\n"
    );
    let head = relay.exchange(get("/healthz", "").replace("GET", "HEAD").as_bytes());
    let answered = answer.strip_suffix("draining\n").unwrap();
    assert_eq!(undated(&head), undated(answered));
    client.send("still here");
    assert_eq!(client.receive(), b"still here");
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
}

#[test]
fn a_daemon_that_does_not_start() {
    let issuer = Issuer::start();
    let dir = Dir::new();
    let not_executable = dir.write("not-executable", "#!/bin/sh\n");
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    for (path, cause) in [
        (dir.path("missing").to_str().unwrap(), "No such file"),
        (not_executable.to_str().unwrap(), "ermission denied"),
        ("missing-from-path", "No such file"),
    ] {
        let relay = Setup::new(&issuer)
            .set("DAEMON_PATH", path)
            .set("MAX_CONNECTIONS", "1")
            .start();
        // Twice, as the first must give its permit back.
        for _ in 0..2 {
            refused(
                &relay,
                &request,
                "502 Bad Gateway",
                &["nix-relay-retry: no"],
                "nix-daemon",
            );
            let (answer, line) = relay.refused(request.as_bytes());
            assert!(line.contains(path) && line.contains(cause), "{line}");
            assert!(
                !answer.contains(path) && !answer.contains(cause),
                "{answer}"
            );
        }
    }
}

#[test]
fn a_head_that_does_not_come_in_time() {
    let relay = Setup::new(&Issuer::start())
        .set("HANDSHAKE_TIMEOUT_SECS", "1")
        .start();
    refused(&relay, "", "408 Request Timeout", &[], "in time");
    refused(
        &relay,
        "GET /healthz HTTP/1.1\r\n",
        "408 Request Timeout",
        &[],
        "in time",
    );
}

#[test]
fn a_head_that_trickles_does_not_come_in_time_either() {
    let relay = Setup::new(&Issuer::start())
        .set("HANDSHAKE_TIMEOUT_SECS", "1")
        .start();
    let mut stream = relay.tcp();
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nPadding: ")
        .unwrap();
    let mut answer = Vec::new();
    eventually("the relay has enough of it", LIMIT, || {
        match stream.read_to_end(&mut answer) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => stream.write_all(b"p").is_err(),
            end => end.is_ok(),
        }
    });
    assert!(
        answer.starts_with(b"HTTP/1.1 408 "),
        "{}",
        answer.escape_ascii()
    );
}

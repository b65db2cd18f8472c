//! The log as an audit trail, and what the service manager is told.

use crate::support::*;
use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;

/// The message and the fields of a line, whose values are numbers, words, or quoted and escaped.
fn parse(line: &str) -> (String, HashMap<String, String>) {
    let (_, text) = line
        .split_once("] ")
        .unwrap_or_else(|| panic!("no prefix: {line}"));
    let first = text
        .find('=')
        .map_or(text.len(), |at| text[..at].rfind(' ').unwrap_or(0));
    let message = text[..first].to_owned();
    let mut rest = text[first..].trim_start();
    let mut fields = HashMap::new();
    while !rest.is_empty() {
        let (name, value) = rest
            .split_once('=')
            .unwrap_or_else(|| panic!("no field: {line}"));
        assert!(
            name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
            "{name:?} for a name: {line}"
        );
        let mut escaped = false;
        let quoted = value.strip_prefix('"').map(|inner| {
            let end = inner.find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            end.unwrap_or_else(|| panic!("no end of {name}: {line}")) + 2
        });
        let length = quoted.unwrap_or_else(|| value.find(' ').unwrap_or(value.len()));
        let twice = fields.insert(name.to_owned(), value[..length].to_owned());
        assert!(twice.is_none(), "{name} twice: {line}");
        rest = value[length..]
            .strip_prefix(' ')
            .unwrap_or(&value[length..]);
    }
    (message, fields)
}

/// Each session has one opening and one ending line; nothing that a client chose makes a line or a field.
#[test]
fn a_mixed_run() {
    let issuer = Issuer::start();
    let forged = "x\" reason=\"client-closed\n[2026-01-01T00:00:00Z INFO  nix_relay] session ended session=1\u{1b}[2J\r\u{7}";
    let mut relay = Setup::new(&issuer)
        .daemon("echo \"a \\\"b\\\" c=d\" >&2; printf 'e\\033[2J\\n' >&2; exec cat")
        .start();
    let mut numbers = Vec::new();
    for (sub, forwarded) in [
        (forged, "203.0.113.7"),
        ("plain", forged),
        (&"y".repeat(10_000), "192.0.2.1, 198.51.100.1"),
    ] {
        let token = issuer.token_with(json!({"sub": sub, "ref": forged}));
        let forwarded = forwarded.replace(['\n', '\r'], "\t").replace('\u{7}', "");
        let request = upgrade_request(&format!(
            "Authorization: Bearer {token}\r\nX-Forwarded-For: {forwarded}\r\n"
        ));
        let mut stream = relay.tcp();
        std::io::Write::write_all(&mut stream, request.replace('\u{1b}', "").as_bytes()).unwrap();
        assert!(read_head(&mut stream).starts_with("HTTP/1.1 101 "));
        let peer = stream.local_addr().unwrap();
        let (_, fields) = parse(&relay.log.wait(&format!(
            "session opened session={} peer={peer} ",
            numbers.len() + 1
        )));
        assert!(
            fields["forwarded_for"].len() < 600 && fields["sub"].len() < 600,
            "{fields:?}"
        );
        numbers.push(fields["session"].clone());
        drop(stream);
    }
    let mut client = relay.connect(&issuer.token());
    client.send("12345");
    assert_eq!(client.receive(), b"12345");
    client.close();
    numbers.push((numbers.len() + 1).to_string());
    relay.refused(
        upgrade_request(&format!(
            "Authorization: Bearer {}\r\n",
            issuer.token_with(json!({"iss": forged}))
        ))
        .as_bytes(),
    );
    let stranger = issuer.token_with(json!({"repository_owner": forged}));
    relay.refused(upgrade_request(&format!("Authorization: Bearer {stranger}\r\n")).as_bytes());
    let log = relay.stop();
    assert!(!log.contains(['\u{1b}', '\r', '\u{7}']), "{log}");
    assert!(log.lines().all(|line| line.len() < 4000), "{log}");
    let lines: Vec<_> = log.lines().map(parse).collect();
    let of = |message: &str, number: &str| -> Vec<&HashMap<String, String>> {
        let fields = lines.iter().filter(|(m, fields)| {
            m == message && fields.get("session").is_some_and(|n| n == number)
        });
        fields.map(|(_, fields)| fields).collect()
    };
    for number in &numbers {
        let opened = of("session opened", number);
        let ended = of("session ended", number);
        assert_eq!(
            (opened.len(), ended.len()),
            (1, 1),
            "session {number} in\n{log}"
        );
        for name in ["peer", "rule", "sub", "repository", "ref"] {
            assert!(opened[0].contains_key(name), "no {name}: {opened:?}");
        }
        for name in ["reason", "detail", "secs", "bytes_in", "bytes_out", "exit"] {
            assert!(ended[0].contains_key(name), "no {name}: {ended:?}");
        }
    }
    let last = of("session ended", &numbers[3])[0];
    assert_eq!(
        (&*last["reason"], &*last["bytes_in"], &*last["bytes_out"]),
        ("client-closed", "5", "5")
    );
    assert_eq!(
        lines
            .iter()
            .filter(|(message, _)| message == "session opened")
            .count(),
        numbers.len(),
        "{log}"
    );
    assert_eq!(
        lines
            .iter()
            .filter(|(message, _)| message == "refused")
            .count(),
        2,
        "{log}"
    );
}

/// Each proxy appends, so what counts is the end; what stands before it may be anybody's.
#[test]
fn the_last_proxy_is_in_the_log_whatever_a_client_claims() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let claimed = "1".repeat(8000);
    for lines in [
        format!("X-Forwarded-For: {claimed}, 203.0.113.7\r\n"),
        format!("X-Forwarded-For: {claimed}\r\nX-Forwarded-For: 203.0.113.7\r\n"),
        format!("X-Forwarded-For: {}, 203.0.113.7\r\n", "ä\t".repeat(2000)),
    ] {
        let (_, line) = relay.refused(upgrade_request(&lines).as_bytes());
        let (_, fields) = parse(&line);
        let forwarded = &fields["forwarded_for"];
        assert!(forwarded.ends_with("203.0.113.7\""), "{forwarded}");
        assert!(forwarded.len() < 500, "{forwarded}");
    }
}

/// The first process of a container inherits what others leave behind, and does not wait for it.
#[test]
fn process_one_says_what_it_needs() {
    let issuer = Issuer::start();
    let first = "exec unshare --pid --fork --kill-child \"$0\"";
    let relay = Setup::new(&issuer).under(first).start();
    let line = relay.log.wait("--init");
    assert!(line.contains(" WARN "), "{line}");
    relay.connect(&issuer.token()).close();
    let mut other = Relay::start(&issuer);
    assert!(!other.stop().contains("--init"));
}

#[test]
fn rust_log_chooses() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    let log = relay.stop();
    assert!(log.contains(" INFO ") && !log.contains("DEBUG"), "{log}");
    let taken = relay.address.to_string();
    let _listener = std::net::TcpListener::bind(&taken).unwrap();
    for (level, expected) in [("error", "ERROR"), ("off", "")] {
        let mut command = binary();
        command
            .env("NIX_RELAY_ALLOWED_ORG", "org")
            .env("NIX_RELAY_LISTEN", &taken)
            .env("RUST_LOG", level);
        let said = String::from_utf8(command.output().unwrap().stderr).unwrap();
        assert!(
            said.contains(expected)
                && !said.contains("INFO")
                && said.is_empty() == expected.is_empty(),
            "{said}"
        );
    }
}

/// In its place there is the priority, as the journal wants it (sd-daemon(3)).
#[test]
fn no_time_in_the_journal() {
    let issuer = Issuer::start();
    let commands = "export JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr)";
    let mut relay = Setup::new(&issuer).under(commands).start();
    relay.connect(&issuer.token()).close();
    let log = relay.stop();
    let (warnings, others): (Vec<_>, Vec<_>) = log.lines().partition(|line| line.contains("root"));
    assert!(warnings.iter().all(|line| line.starts_with("<4>")), "{log}");
    assert!(others.iter().all(|line| line.starts_with("<6>")), "{log}");
    // A variable that came from elsewhere means another stream.
    let mut relay = Setup::new(&issuer).env("JOURNAL_STREAM", "1:2").start();
    assert!(relay.stop().lines().all(|line| line.starts_with('[')));
}

#[test]
fn the_service_manager_is_told() {
    let issuer = Issuer::start();
    let dir = Dir::new();
    let socket = UnixDatagram::bind(dir.path("notify")).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let told = || {
        let mut message = [0; 100];
        let length = socket.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let script = "echo \"NOTIFY_SOCKET=$NOTIFY_SOCKET\"; exec cat";
    let setup = Setup::new(&issuer)
        .daemon(script)
        .env("NOTIFY_SOCKET", dir.path("notify").to_str().unwrap());
    let mut relay = setup.start();
    assert_eq!(told(), "READY=1\n");
    let mut client = relay.connect(&issuer.token());
    assert_eq!(
        client.receive(),
        b"NOTIFY_SOCKET=\n",
        "it is not for the daemon"
    );
    relay.signal("TERM");
    assert_eq!(told(), "STOPPING=1\n");
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
}

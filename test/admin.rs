//! The admin listener: health and metrics, and what it must not do to sessions.

use crate::support::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

fn setup(issuer: &Issuer) -> Setup {
    Setup::new(issuer).set("ADMIN_LISTEN", "127.0.0.1:0")
}

fn get(address: SocketAddr, path: &str) -> String {
    exchange(
        address,
        format!("GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").as_bytes(),
    )
}

/// Each series with its value, without the `nix_relay_` that all begin with.
fn metrics(relay: &Relay) -> BTreeMap<String, f64> {
    let answer = get(relay.admin(), "/metrics");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\nContent-Type: text/plain; "),
        "{head}"
    );
    let series = body
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (
                name.strip_prefix("nix_relay_").unwrap().to_owned(),
                value.parse().unwrap(),
            )
        });
    series.collect()
}

/// What promtool has to say of a text, beyond that it is well.
fn promtool(what: &[&str], text: &str) -> String {
    let mut command = Command::new("promtool");
    let piped = command
        .args(["check"])
        .args(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{text}");
    said
}

#[test]
fn off_by_default() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    assert!(get(relay.address, "/metrics").starts_with("HTTP/1.1 404 "));
    assert!(!relay.stop().contains("admin listening"));
}

#[test]
fn requests() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    for (request, status, part) in [
        ("GET /healthz", "200", "ok\n"),
        ("GET /metrics", "200", "\nnix_relay_build_info{version=\""),
        ("GET /relay", "404", ""),
        ("GET /", "404", ""),
        ("POST /metrics", "405", "\r\nAllow: GET, HEAD\r\n"),
        ("DELETE /healthz", "405", "\r\nAllow: GET, HEAD\r\n"),
    ] {
        let answer = exchange(
            relay.admin(),
            format!("{request} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").as_bytes(),
        );
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part),
            "{request}: {answer}"
        );
    }
    let head = exchange(
        relay.admin(),
        b"HEAD /metrics HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n",
    );
    assert!(
        head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    // A token opens nothing here.
    assert!(
        open(tcp(relay.admin()), &issuer.token())
            .err()
            .unwrap()
            .starts_with("HTTP/1.1 404 ")
    );
}

#[test]
fn whoever_has_the_101_is_counted() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    let mut clients = Vec::new();
    for count in 1..=32 {
        clients.push(relay.connect(&issuer.token()));
        assert_eq!(metrics(&relay)["sessions_active"], count as f64);
    }
}

#[test]
fn counters_agree_with_what_was_done() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).daemon("head -c 1000; exit 3").start();
    relay.log.wait("fetched keys");
    // Where there was no zero, an alert does not see the first event.
    for status in [
        "400", "401", "403", "404", "405", "408", "426", "431", "502", "503",
    ] {
        assert_eq!(
            metrics(&relay)[&format!("refusals_total{{status=\"{status}\"}}")],
            0.0
        );
    }
    let mut active = relay.connect(&issuer.token());
    active.send(vec![0; 600]);
    eventually("its bytes are counted", LIMIT, || {
        metrics(&relay)["bytes_total{direction=\"in\"}"] == 600.0
    });
    assert_eq!(metrics(&relay)["sessions_active"], 1.0);
    active.send(vec![0; 400]);
    let (output, code, _) = active.until_close();
    assert_eq!((output.len(), code), (1000, 1011));
    let mut leaving = relay.connect(&issuer.token());
    leaving.send("bye");
    leaving.close();
    relay.log.wait(" reason=client-closed ");
    for _ in 0..2 {
        relay.refused(upgrade_request("").as_bytes());
    }
    relay.refused(b"GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n");
    let stranger = issuer.token_with(json!({"repository_owner": "stranger"}));
    relay.refused(upgrade_request(&format!("Authorization: Bearer {stranger}\r\n")).as_bytes());
    eventually("both have ended", LIMIT, || {
        metrics(&relay)["sessions_active"] == 0.0
    });
    let metrics = metrics(&relay);
    for (name, value) in [
        (
            concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"),
            1.0,
        ),
        ("bytes_total{direction=\"in\"}", 1003.0),
        ("jwks_refreshes_total{result=\"ok\"}", 1.0),
        ("refusals_total{status=\"401\"}", 2.0),
        ("refusals_total{status=\"403\"}", 1.0),
        ("refusals_total{status=\"404\"}", 1.0),
        ("session_seconds_bucket{le=\"+Inf\"}", 2.0),
        ("session_seconds_count", 2.0),
        ("sessions_total{reason=\"client-closed\"}", 1.0),
        ("sessions_total{reason=\"daemon-exited\"}", 1.0),
    ] {
        assert_eq!(metrics.get(name), Some(&value), "{name} in {metrics:#?}");
    }
    // Whether the daemon still got to say something to the second is for the two of them.
    assert!(
        [1000.0, 1003.0].contains(&metrics["bytes_total{direction=\"out\"}"]),
        "{metrics:#?}"
    );
    let secs = metrics["session_seconds_sum"];
    assert!(secs > 0.0 && secs < LIMIT.as_secs_f64(), "{secs}");
    let mut last = 0.0;
    for bucket in ["1", "10", "100", "1000", "10000", "+Inf"] {
        let sessions = metrics[&format!("session_seconds_bucket{{le=\"{bucket}\"}}")];
        assert!(sessions >= last, "{metrics:#?}");
        last = sessions;
    }
}

#[test]
fn prometheus_can_read_them() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    relay.connect(&issuer.token()).close();
    relay.log.wait("session ended ");
    relay.refused(upgrade_request("").as_bytes());
    let answer = get(relay.admin(), "/metrics");
    let text = answer.split_once("\r\n\r\n").unwrap().1;
    assert_eq!(promtool(&["metrics"], text), "");
    for name in [
        "sessions_active",
        "sessions_total",
        "refusals_total",
        "bytes_total",
        "session_seconds",
        "build_info",
    ] {
        assert!(
            text.contains(&format!("\n# TYPE nix_relay_{name} ")),
            "no {name}: {text}"
        );
    }
}

/// nix/alerts.yml, over metrics that there are, and what it makes of them.
#[test]
fn alert_rules() {
    let file = project("nix/alerts.yml");
    let rules = std::fs::read_to_string(&file).unwrap();
    let said = promtool(&["rules", file.to_str().unwrap()], "");
    assert!(said.contains("SUCCESS: 6 rules found"), "{said}");
    let mut cases = Command::new("promtool");
    cases
        .args(["test", "rules"])
        .arg(project("test/alerts.yml"));
    let output = cases.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    let known = get(relay.admin(), "/metrics");
    // Each metric with its label, but for values that are patterns.
    let exprs = rules.lines().filter(|line| line.contains("expr: "));
    for series in exprs.flat_map(|expr| expr.split("nix_relay_").skip(1)) {
        let series = series.split(['[', '~', ' ']).next().unwrap();
        let series = format!("\nnix_relay_{}", series.trim_end_matches('='));
        assert!(known.contains(&series), "no {series} in {known}");
    }
}

#[test]
fn silent_clients_change_nothing_for_sessions() {
    let issuer = Issuer::start();
    let mut relay = setup(&issuer).set("HANDSHAKE_TIMEOUT_SECS", "600").start();
    let before = relay.at_rest();
    let mut client = relay.connect(&issuer.token());
    let silent: Vec<TcpStream> = (0..1000).map(|_| tcp(relay.admin())).collect();
    client.send("still there");
    assert_eq!(client.receive(), b"still there");
    relay.connect(&issuer.token()).close();
    assert!(get(relay.admin(), "/healthz").ends_with("\r\n\r\nok\n"));
    client.close();
    drop(silent);
    relay.back_to(before);
    relay.stop();
}

/// It has nothing to do with how many wait at the other.
#[test]
fn a_flood_of_the_relays_own_listener() {
    let issuer = Issuer::start();
    let setup = setup(&issuer).set("QUEUE_TIMEOUT_SECS", "30");
    let relay = setup.set("HANDSHAKE_TIMEOUT_SECS", "600").start();
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let waiting = (0..288).map(|_| {
        let mut stream = relay.tcp();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    });
    let _waiting: Vec<TcpStream> = waiting.collect();
    for _ in 0..10 {
        assert!(get(relay.admin(), "/healthz").ends_with("\r\n\r\nok\n"));
    }
    eventually("all sessions are there", LIMIT, || {
        metrics(&relay)["sessions_active"] == 32.0
    });
    let _silent: Vec<TcpStream> = (0..600).map(|_| relay.tcp()).collect();
    assert!(get(relay.admin(), "/healthz").ends_with("\r\n\r\nok\n"));
}

/// A connection takes several, so that they can run out at any step of it.
#[test]
fn a_moment_without_descriptors() {
    let issuer = Issuer::start();
    for limit in 64..67 {
        let limits = format!("ulimit -n {limit}");
        let relay = setup(&issuer).under(&limits).start();
        let before = relay.at_rest();
        let admin = relay.admin();
        let silent: Vec<TcpStream> = (0..100).map(|_| tcp(admin)).collect();
        eventually("they run out", LIMIT, || relay.resources().1 > limit - 5);
        drop(silent);
        for _ in 0..10 {
            let answer = get(admin, "/healthz");
            assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
        }
        relay.back_to(before);
        relay.connect(&issuer.token()).close();
    }
}

#[test]
fn a_moment_without_threads() {
    let issuer = Issuer::start();
    let dir = Dir::new();
    let relay = crate::scarcity::with_few_threads(setup(&issuer), &dir).start();
    let before = relay.at_rest();
    let admin = relay.admin();
    relay.limit("--nproc=1:24");
    drop(tcp(admin));
    relay.log.wait("the relay is busy; try again later: ");
    relay.limit("--nproc=24:24");
    for _ in 0..10 {
        let answer = get(admin, "/healthz");
        assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
    }
    relay.back_to(before);
}

#[test]
fn draining() {
    let issuer = Issuer::start();
    let mut relay = setup(&issuer).start();
    let client = relay.connect(&issuer.token());
    relay.signal("TERM");
    relay.log.wait("shutting down");
    let answer = get(relay.admin(), "/healthz");
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("\r\n\r\ndraining\n"),
        "{answer}"
    );
    assert!(get(relay.admin(), "/metrics").contains("\nnix_relay_sessions_active 1\n"));
    drop(client);
    assert_eq!(relay.wait().code(), Some(0));
}

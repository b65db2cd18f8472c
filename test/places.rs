//! The states of a connection, each with a limit of its own: whoever is in one keeps nobody out of another.

use crate::support::*;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

const DISCOVERY: &str = "/.well-known/openid-configuration";
/// As long as a test should take that measures how long answers take.
const A_WHILE: Duration = Duration::from_secs(4);
const A_MINUTE: Duration = Duration::from_secs(60);
/// It takes milliseconds, and a second where the other tests have the machine to themselves.
const AT_ONCE: Duration = Duration::from_secs(5);
/// What the design promises, where nothing else runs.
const A_SECOND: Duration = Duration::from_secs(1);
/// How many may wait for an issuer's keys, and how many for the permits of a rule.
const MAX_WAITING: usize = 64;

/// A rule for all tokens of an issuer whose `ref` is this, with more lines.
fn rule(issuer: &Issuer, branch: &str, more: &str) -> String {
    let url = issuer.url();
    format!(
        "[[auth.rule]]\nname = '{branch}'\nissuer = '{url}'\nbound_claims.ref = '{branch}'\n{more}\n"
    )
}

fn start(setup: Setup, rules: &str) -> Relay {
    let setup = setup.set("ALLOWED_ORG", "").config(rules);
    setup.set("ADMIN_LISTEN", "127.0.0.1:0").start()
}

fn token(issuer: &Issuer, branch: &str) -> String {
    issuer.token_with(json!({ "ref": branch }))
}

fn upgrade(token: &str) -> String {
    upgrade_request(&format!("Authorization: Bearer {token}\r\n"))
}

/// A token that nobody has signed, of a key that nobody has published.
fn unsigned(issuer: &Issuer) -> String {
    let header = issuer::encode(json!({"alg": "ES256", "kid": "unknown"}).to_string());
    let claims = issuer::encode(issuer.claims(json!({})).to_string());
    format!("{header}.{claims}.AAAA")
}

/// A connection on which this was sent.
fn sending(relay: &Relay, request: &str) -> TcpStream {
    let mut stream = relay.tcp();
    stream.write_all(request.as_bytes()).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// The status line and all that came behind it, once there is a head.
fn answer(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => None,
        Ok(length) => Some(String::from_utf8_lossy(&bytes[..length]).into_owned()),
        Err(e) => Some(e.to_string()),
    }
}

/// So many clients that send this, and come again a second after they were answered.
fn flood(relay: &Relay, count: usize, request: &str, until: Instant) {
    let mut clients: Vec<_> = (0..count)
        .map(|_| (sending(relay, request), None))
        .collect();
    while Instant::now() < until {
        for (stream, answered) in &mut clients {
            match *answered {
                None => *answered = answer(stream).map(|_| Instant::now()),
                Some(at) if at.elapsed() < A_SECOND => {}
                Some(_) => (*stream, *answered) = (sending(relay, request), None),
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Makes these requests one after the other until the time is over, and prints how long each took at most.
fn answered_at_once(until: Instant, limit: Duration, requests: &[(&str, &dyn Fn())]) {
    let mut worst = vec![Duration::ZERO; requests.len()];
    while Instant::now() < until {
        for ((_, request), worst) in requests.iter().zip(&mut worst) {
            let asked = Instant::now();
            request();
            *worst = asked.elapsed().max(*worst);
        }
        thread::sleep(Duration::from_millis(10));
    }
    for ((what, _), worst) in requests.iter().zip(worst) {
        println!("{what}: {worst:?} at most");
        assert!(worst < limit, "{what}: after {worst:?}");
    }
}

/// An answer with this status.
fn answers(address: SocketAddr, request: &str, status: &str) {
    let answer = exchange(address, request.as_bytes());
    assert!(
        answer.starts_with(&format!("HTTP/1.1 {status} ")),
        "{answer}"
    );
}

const HEALTHZ: &str = "GET /healthz HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n";

/// An issuer whose keys the relay has, and which from then on takes its time; a good one; and a relay for both.
fn with_a_hanging_issuer() -> (Issuer, Issuer, Relay) {
    let (good, hanging) = (Issuer::start(), Issuer::start());
    let rules = rule(&good, "main", "") + &rule(&hanging, "main", "");
    let relay = start(Setup::new(&good), &rules);
    relay.connect(&token(&good, "main")).close();
    relay.connect(&token(&hanging, "main")).close();
    hanging.slow(DISCOVERY, 10 * A_MINUTE);
    (good, hanging, relay)
}

fn strangers_of_an_issuer_that_hangs(time: Duration, limit: Duration) {
    let (good, hanging, relay) = with_a_hanging_issuer();
    let (until, request) = (Instant::now() + time, upgrade(&unsigned(&hanging)));
    let [good, cached] = [&good, &hanging].map(|issuer| token(issuer, "main"));
    thread::scope(|scope| {
        scope.spawn(|| flood(&relay, 300, &request, until));
        eventually("they wait", LIMIT, || hanging.requests().len() == 3);
        answered_at_once(
            until,
            limit,
            &[
                ("a job of another issuer", &|| relay.connect(&good).close()),
                ("a job with a cached key", &|| {
                    relay.connect(&cached).close()
                }),
                ("/healthz", &|| answers(relay.address, HEALTHZ, "200")),
                ("the admin listener", &|| {
                    answers(relay.admin(), HEALTHZ, "200")
                }),
            ],
        );
    });
}

#[test]
fn strangers_of_an_issuer_that_hangs_for_a_while() {
    strangers_of_an_issuer_that_hangs(A_WHILE, AT_ONCE);
}

#[test]
#[ignore = "takes a minute: cargo test --release --locked -- --ignored --nocapture --test-threads 1"]
fn strangers_of_an_issuer_that_hangs_for_a_minute() {
    strangers_of_an_issuer_that_hangs(A_MINUTE, A_SECOND);
}

/// The answers that have come, and those who got them are gone.
fn answered(streams: &mut Vec<TcpStream>) -> Vec<String> {
    let mut told = Vec::new();
    streams.retain_mut(|stream| {
        let answer = answer(stream);
        let waits = answer.is_none();
        told.extend(answer);
        waits
    });
    told
}

#[test]
fn so_many_wait_for_the_keys_of_an_issuer() {
    let (_good, hanging, relay) = with_a_hanging_issuer();
    let request = upgrade(&unsigned(&hanging));
    let mut strangers: Vec<_> = (0..100).map(|_| sending(&relay, &request)).collect();
    let (asked, mut told) = (Instant::now(), Vec::new());
    eventually("the others are told at once", AT_ONCE, || {
        told.extend(answered(&mut strangers));
        strangers.len() == MAX_WAITING
    });
    for answer in &told {
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nRetry-After: 2\r\n"),
            "{answer}"
        );
    }
    // Keys are waited for eight seconds.
    eventually("all are told", LIMIT, || {
        answered(&mut strangers);
        strangers.is_empty()
    });
    assert!(
        asked.elapsed() > Duration::from_secs(4),
        "nobody has waited for keys"
    );
    assert_eq!(hanging.requests().len(), 3, "one fetch at a time");
}

/// A relay whose permits are all taken, each session's daemon has left a line in a file.
struct Full {
    issuer: Issuer,
    relay: Relay,
    sessions: Vec<Client>,
    dir: Dir,
}

fn full() -> Full {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let started = dir.path("started").display().to_string();
    let setup = Setup::new(&issuer).set("QUEUE_TIMEOUT_SECS", "30");
    let setup = setup.daemon(&format!("echo started >>{started}; exec cat"));
    let relay = start(setup, &rule(&issuer, "main", ""));
    let token = token(&issuer, "main");
    let sessions = (0..32).map(|_| relay.connect(&token)).collect();
    Full {
        issuer,
        relay,
        sessions,
        dir,
    }
}

fn clients_of_a_full_relay(time: Duration, limit: Duration) {
    let full = full();
    let (relay, until) = (&full.relay, Instant::now() + time);
    let request = upgrade(&token(&full.issuer, "main"));
    let threads = relay.resources().0;
    thread::scope(|scope| {
        scope.spawn(|| flood(relay, 256, &request, until));
        eventually("they wait", LIMIT, || {
            relay.resources().0 >= threads + MAX_WAITING
        });
        answered_at_once(
            until,
            limit,
            &[
                ("one without a token", &|| {
                    answers(relay.address, &upgrade_request(""), "401")
                }),
                ("/healthz", &|| answers(relay.address, HEALTHZ, "200")),
                ("the admin listener", &|| {
                    answers(relay.admin(), HEALTHZ, "200")
                }),
            ],
        );
    });
}

#[test]
fn clients_of_a_full_relay_for_a_while() {
    clients_of_a_full_relay(A_WHILE, AT_ONCE);
}

#[test]
#[ignore = "takes a minute: cargo test --release --locked -- --ignored --nocapture --test-threads 1"]
fn clients_of_a_full_relay_for_a_minute() {
    clients_of_a_full_relay(A_MINUTE, A_SECOND);
}

/// They are forgotten, and nothing is started for them.
#[test]
fn clients_that_hang_up_while_they_wait() {
    let mut full = full();
    let request = upgrade(&token(&full.issuer, "main"));
    let threads = full.relay.resources().0;
    let mut waiting: Vec<_> = (0..256).map(|_| sending(&full.relay, &request)).collect();
    let mut told = Vec::new();
    eventually("those above the limit are told", AT_ONCE, || {
        told.extend(answered(&mut waiting));
        waiting.len() == MAX_WAITING
    });
    for answer in &told {
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nRetry-After: 2\r\n"),
            "{answer}"
        );
    }
    eventually("the others wait", AT_ONCE, || {
        full.relay.resources().0 == threads + MAX_WAITING
    });
    drop(waiting);
    eventually("they are forgotten", AT_ONCE, || {
        full.relay.resources().0 == threads
    });
    // There is room to wait again, and what is free goes to who is there.
    let newcomer = full.relay.tcp();
    thread::scope(|scope| {
        let token = token(&full.issuer, "main");
        let newcomer = scope.spawn(move || open(newcomer, &token).unwrap());
        full.sessions.pop().unwrap().close();
        let mut newcomer = newcomer.join().unwrap();
        newcomer.send("served");
        assert_eq!(newcomer.receive(), b"served");
    });
    let opened = full.relay.log.text();
    assert_eq!(opened.matches("session opened").count(), 33);
    // Perhaps one more, which the relay starts at its own start and kills at once.
    let started = std::fs::read_to_string(full.dir.path("started")).unwrap();
    assert!((33..=34).contains(&started.lines().count()), "{started}");
}

/// Pull requests that fill their rule leave the rest to others, in sessions and in waiting.
#[test]
fn a_rule_has_a_limit_of_its_own() {
    let issuer = Issuer::start();
    let rules = rule(&issuer, "pulls", "max_connections = 2") + &rule(&issuer, "main", "");
    let setup = Setup::new(&issuer)
        .set("QUEUE_TIMEOUT_SECS", "30")
        .set("MAX_CONNECTIONS", "4");
    let relay = start(setup, &rules);
    let [pull, main] = ["pulls", "main"].map(|branch| token(&issuer, branch));
    let mut pulls = [relay.connect(&pull), relay.connect(&pull)];
    let mut waiting: Vec<_> = (0..=MAX_WAITING)
        .map(|_| sending(&relay, &upgrade(&pull)))
        .collect();
    let mut told = Vec::new();
    eventually("one too many is told", LIMIT, || {
        told.extend(answered(&mut waiting));
        !told.is_empty()
    });
    assert!(
        told.len() == 1 && told[0].starts_with("HTTP/1.1 503 "),
        "{told:?}"
    );
    let mut mains = [relay.connect(&main), relay.connect(&main)];
    assert_eq!(
        (relay.children().len(), answered(&mut waiting).len()),
        (4, 0)
    );
    // What main gives back is not for pulls, and what a pull gives back is.
    mains[0].close();
    relay.connect(&main).close();
    eventually("main's sessions are over", LIMIT, || {
        relay.children().len() == 3
    });
    assert_eq!(answered(&mut waiting), Vec::<String>::new());
    pulls[0].close();
    eventually("one of them is let in", LIMIT, || {
        answered(&mut waiting)
            .iter()
            .any(|told| told.starts_with("HTTP/1.1 101 "))
    });
}

/// Each event wakes one of those who wait, not all.
#[test]
fn strangers_cost_the_same_whoever_waits() {
    let issuer = Issuer::start();
    let branches = ["a", "b", "c"];
    let rules = branches.map(|branch| rule(&issuer, branch, "")).concat();
    let setup = Setup::new(&issuer)
        .set("QUEUE_TIMEOUT_SECS", "30")
        .set("MAX_CONNECTIONS", "1");
    let relay = start(setup, &rules);
    let _session = relay.connect(&token(&issuer, "a"));
    let threads = relay.resources().0;
    let refuse = || {
        let before = relay.processor_time();
        for _ in 0..500 {
            answers(relay.address, &upgrade_request(""), "401");
        }
        relay.processor_time() - before
    };
    let alone = refuse();
    let _waiting = branches.map(|branch| {
        let request = upgrade(&token(&issuer, branch));
        [(); MAX_WAITING].map(|()| sending(&relay, &request))
    });
    eventually("they wait", LIMIT, || {
        relay.resources().0 >= threads + 3 * MAX_WAITING
    });
    let with_others = refuse();
    println!("500 refusals: {alone} hundredths of a second, and {with_others} while 192 wait");
    assert!(
        with_others < 5 * alone.max(10),
        "{with_others} after {alone}"
    );
}

/// Who has come as far as to wait for a permit has no place that a stranger could take.
#[test]
fn who_waits_for_a_permit_survives_a_flood() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("QUEUE_TIMEOUT_SECS", "30")
        .set("HANDSHAKE_TIMEOUT_SECS", "600")
        .set("MAX_CONNECTIONS", "1");
    let relay = start(setup, &rule(&issuer, "main", ""));
    let token = token(&issuer, "main");
    let mut session = relay.connect(&token);
    let (threads, mut waiting) = (relay.resources().0, sending(&relay, &upgrade(&token)));
    eventually("it waits", LIMIT, || relay.resources().0 > threads);
    let silent: Vec<TcpStream> = (0..600).map(|_| relay.tcp()).collect();
    answers(relay.address, HEALTHZ, "200");
    session.close();
    eventually("it is let in", LIMIT, || {
        answer(&mut waiting).is_some_and(|told| told.starts_with("HTTP/1.1 101 "))
    });
    drop(silent);
}

/// The kernel would drop those for whom there is no room, and they try again only a second later.
#[test]
fn a_burst_waits_to_be_accepted() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).start();
    relay.signal("STOP");
    let connect = |_| TcpStream::connect_timeout(&relay.address, AT_ONCE).expect("room");
    let burst: Vec<TcpStream> = (0..1000).map(connect).collect();
    relay.signal("CONT");
    drop(burst);
    answers(relay.address, HEALTHZ, "200");
}

//! What strangers, builds and odd hosts cannot break: the process, its memory, its shutdown, its keys and its log.

use crate::support::{issuer::*, nix::*, *};
use crate::tokens::refused;
use jwt_simple::prelude::{ECDSAP256KeyPairLike, ES256KeyPair};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use serde_json::Value;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// It takes milliseconds, and a second where the other tests have the machine to themselves.
const AT_ONCE: Duration = Duration::from_secs(15);
/// How long a shutdown may take: 3 s where nothing else runs, and that is not here.
const BOUND: Duration = Duration::from_secs(9);
const HEALTHZ: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n";

/// With an admin listener, too.
fn setup(issuer: &Issuer) -> Setup {
    Setup::new(issuer).set("ADMIN_LISTEN", "127.0.0.1:0")
}

fn upgrade(token: &str) -> String {
    upgrade_request(&format!("Authorization: Bearer {token}\r\n"))
}

/// A token of a stranger's own key, under this name.
fn forged(issuer: &Issuer, kid: &str) -> String {
    let claims = raw_claims(&issuer.claims(json!({})));
    let key = ES256KeyPair::generate().with_key_id(kid);
    key.sign(claims).unwrap()
}

/// Exit status and standard error of a relay that does not start, after these shell commands.
fn fails(commands: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let script = format!("{commands}; exec \"$0\" \"$@\"");
    let mut command = relay_at("timeout");
    command.args(["10", "bash", "-c", &script]);
    command.arg(binary().get_program());
    command.env("NIX_RELAY_LISTEN", "127.0.0.1:0");
    command.env("NIX_RELAY_ALLOWED_ORG", ORG);
    command.env("NIX_RELAY_ISSUER", "http://127.0.0.1:1");
    let output = command.envs(variables.iter().copied()).output().unwrap();
    (output.status.code().unwrap(), texts(&output).1)
}

/// Lines that announce a body, which does not come.
fn announcements() -> Vec<String> {
    let lengths = (46..64).map(|power| 1_u64 << power);
    let lengths = lengths.chain([10, u64::MAX]).map(|n| n.to_string());
    let odd = ["18446744073709551616", "-1", "1e99", "ten", "", "5, 5"].map(String::from);
    let lines = lengths
        .chain(odd)
        .map(|length| format!("Content-Length: {length}\r\n"));
    let mut lines: Vec<String> = lines.collect();
    lines.push("Content-Length: 5\r\nContent-Length: 70368744177664\r\n".into());
    lines.push("Transfer-Encoding: chunked\r\n".into());
    lines.push("Transfer-Encoding: chunked\r\nContent-Length: 70368744177664\r\n".into());
    lines.push("Expect: 100-continue\r\nContent-Length: 70368744177664\r\n".into());
    lines
}

#[test]
fn whatever_length_a_request_announces() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    for (address, path) in [(relay.admin(), "/metrics"), (relay.address, "/relay")] {
        for (line, method) in announcements()
            .iter()
            .flat_map(|line| ["GET", "HEAD", "POST", "PUT"].map(|method| (line, method)))
        {
            for path in [path, "/healthz", "/"] {
                let request = format!("{method} {path} HTTP/1.1\r\nHost: relay\r\n{line}\r\n");
                let answer = exchange(address, request.as_bytes());
                assert!(answer.starts_with("HTTP/1.1 "), "{request}: {answer}");
            }
        }
        for line in announcements() {
            let answer = exchange(address, upgrade_request(&line).as_bytes());
            assert!(answer.starts_with("HTTP/1.1 40"), "{line}: {answer}");
        }
        assert!(exchange(address, HEALTHZ).ends_with("\r\n\r\nok\n"));
    }
    relay.connect(&issuer.token()).close();
    assert!(relay.peak_memory() < 64, "{} MiB", relay.peak_memory());
}

#[test]
fn a_body_that_does_not_come_holds_up_nothing() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    for address in [relay.admin(), relay.address] {
        let mut waiting = Vec::new();
        for (method, line) in [
            ("POST", "Content-Length: 2000"),
            ("GET", "Content-Length: 2000"),
        ] {
            let request = format!("{method} /healthz HTTP/1.1\r\nHost: relay\r\n{line}\r\n\r\n");
            let mut stream = tcp(address);
            stream.write_all(request.as_bytes()).unwrap();
            waiting.push(stream);
            let asked = Instant::now();
            assert!(exchange(address, HEALTHZ).ends_with("\r\n\r\nok\n"));
            assert!(asked.elapsed() < AT_ONCE, "after {:?}", asked.elapsed());
        }
    }
}

/// 16 at a time, 4 MiB each.
#[test]
fn a_head_without_an_end() {
    let issuer = Issuer::start();
    let relay = setup(&issuer).start();
    for start in [
        "GET /healthz HTTP/1.1\r\nX: ",
        "GET /",
        "X",
        "GET / HTTP/1.1\r\nHost: ",
    ] {
        for address in [relay.admin(), relay.address] {
            let mut stream = tcp(address);
            stream.write_all(start.as_bytes()).unwrap();
            stream.write_all(&[b'x'; 20_000]).unwrap();
            let answer = read_head(&mut stream);
            assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
            thread::scope(|scope| {
                let endless = || {
                    let mut stream = tcp(address);
                    let _ = stream.write_all(start.as_bytes());
                    (0..64).any(|_| stream.write_all(&[b'x'; 65536]).is_err())
                };
                (0..16).for_each(|_| drop(scope.spawn(endless)));
            });
        }
    }
    assert!(relay.peak_memory() < 64, "{} MiB", relay.peak_memory());
    relay.connect(&issuer.token()).close();
}

/// With as many descriptors as most systems allow.
fn scrapers(count: usize, request: &[u8]) {
    let issuer = Issuer::start();
    let setup = setup(&issuer).under("ulimit -n 1024");
    let relay = setup.set("HANDSHAKE_TIMEOUT_SECS", "600").start();
    relay.log.wait("fetched keys");
    let connect = |_| {
        let mut stream = tcp(relay.admin());
        let _ = stream.write_all(request);
        stream
    };
    let scrapers: Vec<TcpStream> = (0..count).map(connect).collect();
    let start = Instant::now();
    let sessions: Vec<Client> = (0..32).map(|_| relay.connect(&issuer.token())).collect();
    assert!(exchange(relay.admin(), HEALTHZ).ends_with("\r\n\r\nok\n"));
    assert!(start.elapsed() < AT_ONCE, "after {:?}", start.elapsed());
    let (threads, _) = relay.resources();
    assert!(threads < 450, "{threads} threads");
    drop((scrapers, sessions));
}

#[test]
fn idle_scrapers_take_no_descriptors_from_sessions() {
    scrapers(600, b"");
    scrapers(1100, b"");
}

#[test]
fn slow_scrapers_take_no_descriptors_from_sessions() {
    scrapers(1100, b"GET /metrics HTTP/1.1\r\nHost: rel");
    scrapers(
        1100,
        b"POST /metrics HTTP/1.1\r\nHost: relay\r\nContent-Length: 10\r\n\r\n",
    );
}

#[test]
fn scrapers_that_do_not_read_take_no_descriptors_from_sessions() {
    scrapers(1100, b"GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n");
}

/// A build runs on the same machine.
#[test]
fn a_build_asks_the_admin_listener_for_something_odd() {
    let farm = Farm::start_with(|setup| setup.set("ADMIN_LISTEN", "127.0.0.1:0"));
    let runner = farm.runner().with(native());
    let port = farm.relay.admin().port();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}
         printf \"%s\\r\\n\" \"GET /healthz HTTP/1.1\" \"Host: relay\" \"Content-Length: $1\" \"\" >&3
         read -r _ status _ <&3; echo answered $status; test -n \"$status\"; printf done > $out"
    );
    for length in ["70368744177664", "18446744073709551615"] {
        let script = script.replace("$1", length);
        let file = derivation(length, &script).replace("/bin/sh", "/bin/bash");
        let file = runner.expression(&format!("n{length}"), &file);
        let output = runner.build(&file).output().unwrap();
        let (_, log) = texts(&output);
        assert!(
            output.status.success() && log.contains("answered 200"),
            "{log}"
        );
    }
    assert!(exchange(farm.relay.address, HEALTHZ).ends_with("\r\n\r\nok\n"));
}

/// So many strangers, who do this again and again until the relay is gone or `stop` is set, each on 30 connections.
fn besiege<'a>(
    scope: &'a thread::Scope<'a, '_>,
    (strangers, request): (usize, &'a [u8]),
    address: SocketAddr,
    stop: &'a AtomicBool,
) {
    let again_and_again = move || {
        let mut kept = VecDeque::new();
        while !stop.load(Relaxed) {
            let Ok(mut stream) = TcpStream::connect(address) else {
                break;
            };
            let _ = stream.write_all(request);
            kept.push_back(stream);
            if kept.len() > 30 {
                kept.pop_front();
            }
        }
    };
    (0..strangers).for_each(|_| drop(scope.spawn(again_and_again)));
}

/// Ends a relay that has strangers at one of its ports, and sees that it does not take long.
fn besieged(
    mut relay: Relay,
    address: SocketAddr,
    strangers: (usize, &[u8]),
    end: impl FnOnce(&Relay),
) {
    let stop = AtomicBool::new(false);
    let took = thread::scope(|scope| {
        besiege(scope, strangers, address, &stop);
        // For them to come.
        thread::sleep(Duration::from_millis(300));
        end(&relay);
        let asked = Instant::now();
        assert_eq!(relay.wait().code(), Some(0));
        stop.store(true, Relaxed);
        asked.elapsed()
    });
    let start = String::from_utf8_lossy(&strangers.1[..strangers.1.len().min(20)]);
    println!("{start:?}: {took:?}");
    assert!(took < BOUND, "{start:?}: after {took:?}");
}

/// The requests of strangers, each for a kind of them.
fn strange_requests(issuer: &Issuer) -> Vec<String> {
    let stranger = issuer.token_with(json!({"repository_owner": "stranger"}));
    vec![
        String::new(),
        "GET /relay HTTP/1.1\r\nHost: re".into(),
        "\x16\x03\x01\x02\0\x01\0".into(),
        String::from_utf8_lossy(HEALTHZ).into(),
        "POST /relay HTTP/1.1\r\nHost: relay\r\nContent-Length: 70368744177664\r\n\r\n".into(),
        upgrade_request(""),
        upgrade("a.b.c"),
        upgrade(&forged(issuer, "unknown")),
        upgrade(&stranger),
    ]
}

/// With a grace that would show.
fn patient(setup: Setup) -> Setup {
    let setup = setup.set("HANDSHAKE_TIMEOUT_SECS", "600");
    setup.set("SHUTDOWN_GRACE_SECS", "5")
}

#[test]
fn strangers_do_not_hold_up_a_shutdown() {
    let issuer = Issuer::start();
    for request in strange_requests(&issuer) {
        let relay = patient(setup(&issuer)).start();
        let (address, strangers) = (relay.address, (8, request.as_bytes()));
        besieged(relay, address, strangers, |relay| relay.signal("TERM"));
    }
}

#[test]
fn strangers_of_the_admin_listener_do_not_hold_up_a_shutdown() {
    let issuer = Issuer::start();
    for request in &strange_requests(&issuer)[..6] {
        let relay = patient(setup(&issuer)).start();
        let (address, strangers) = (relay.admin(), (8, request.as_bytes()));
        besieged(relay, address, strangers, |relay| relay.signal("TERM"));
    }
}

/// The issuer takes connections and says nothing, so that everybody's token waits for it.
#[test]
fn strangers_of_a_mute_issuer_do_not_hold_up_a_shutdown() {
    let (issuer, mute) = (Issuer::start(), TcpListener::bind("127.0.0.1:0").unwrap());
    let url = format!("http://{}", mute.local_addr().unwrap());
    let relay = patient(setup(&issuer)).set("ISSUER", &url).start();
    let request = upgrade(&issuer.token_with(json!({"iss": url})));
    let (address, strangers) = (relay.address, (64, request.as_bytes()));
    besieged(relay, address, strangers, |relay| relay.signal("TERM"));
}

/// It has its grace all the same, until the second signal.
fn a_session_among(count: usize, request: impl Fn(&Issuer) -> String) {
    let issuer = Issuer::start();
    let setup = patient(setup(&issuer)).set("SHUTDOWN_GRACE_SECS", "600");
    let setup = setup.set("MAX_CONNECTIONS", "1");
    let relay = setup.set("QUEUE_TIMEOUT_SECS", "30").start();
    let mut client = relay.connect(&issuer.token());
    let request = request(&issuer);
    let (address, strangers) = (relay.address, (count, request.as_bytes()));
    besieged(relay, address, strangers, move |relay| {
        relay.signal("TERM");
        relay.log.wait("shutting down");
        thread::sleep(Duration::from_millis(500));
        client.send("still served");
        assert_eq!(client.receive(), b"still served");
        relay.signal("TERM");
        assert_eq!(client.until_close().1, 1001);
        client.close();
    });
}

#[test]
fn strangers_do_not_hold_up_a_shutdown_after_a_session() {
    for number in 0..9 {
        a_session_among(8, |issuer| strange_requests(issuer).remove(number));
    }
}

/// Nor those who could have had one: they are told at once, so that none of them is there, but always another.
#[test]
fn clients_without_a_permit_do_not_hold_up_a_shutdown() {
    a_session_among(64, |issuer| upgrade(&issuer.token()));
}

/// Published keys.
fn set(keys: &[Value]) -> String {
    json!({"keys": keys}).to_string()
}

/// The key that the issuer does not publish, under a name; and a token of it.
fn new_key(issuer: &Issuer, kid: &str) -> (String, String) {
    let key = ES256KeyPair::from_bytes(&keys().unpublished.to_bytes()).unwrap();
    let key = key.with_key_id(kid);
    let claims = raw_claims(&issuer.claims(json!({})));
    let jwk = jwk(&key.public_key().to_jwk(), json!({}));
    (set(&[jwk]), key.sign(claims).unwrap())
}

/// While strangers send tokens of keys that nobody has and of such as there are, a new key is let in soon after it is
/// published, and until then its tokens are told to come again.
fn a_rotation_among_strangers(kid: &str, delay: Duration) {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    let stop = AtomicBool::new(false);
    let requests = ["unknown", "p256"].map(|kid| upgrade(&forged(&issuer, kid)));
    let (published, token) = new_key(&issuer, kid);
    thread::scope(|scope| {
        for request in requests.iter().cycle().take(8) {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    relay.exchange(request.as_bytes());
                }
            });
        }
        relay.log.wait("they were asked for a moment ago");
        issuer.slow("/jwks", delay);
        issuer.answer("/jwks", 200, &published);
        let start = Instant::now();
        let mut told = Vec::new();
        while let Err(answer) = relay.try_connect(&token) {
            told.push(answer);
            if start.elapsed() > LIMIT / 2 {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let took = start.elapsed();
        stop.store(true, Relaxed);
        println!(
            "{kid}: let in after {took:?}, and told {} times to come again",
            told.len()
        );
        let is_503 = |answer: &String| {
            answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nRetry-After: 2\r\n")
        };
        assert!(
            told.iter().all(is_503),
            "{:?}",
            told.iter().find(|answer| !is_503(answer))
        );
        assert!(
            took < Duration::from_secs(5) + delay,
            "let in after {took:?}"
        );
    });
}

#[test]
fn a_new_key_among_strangers() {
    a_rotation_among_strangers("new", Duration::ZERO);
    a_rotation_among_strangers("new", Duration::from_secs(1));
}

#[test]
fn a_new_key_of_an_old_name_among_strangers() {
    a_rotation_among_strangers("p256", Duration::ZERO);
    a_rotation_among_strangers("p256", Duration::from_secs(1));
}

#[test]
fn strangers_make_few_requests_to_an_issuer() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    issuer.forget();
    let stop = AtomicBool::new(false);
    let requests = ["unknown", "p256"].map(|kid| upgrade(&forged(&issuer, kid)));
    thread::scope(|scope| {
        for request in requests.iter().cycle().take(8) {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    relay.exchange(request.as_bytes());
                }
            });
        }
        thread::sleep(Duration::from_secs(10));
        stop.store(true, Relaxed);
    });
    let asked = issuer.requests().len();
    println!("{asked} requests in ten seconds");
    assert!((6..=12).contains(&asked), "{asked} requests in ten seconds");
}

const OFFLINE: &str = "https://kubernetes.default.svc.cluster.local";

/// A key file of one key, of an issuer that nobody can ask, beside another that is asked; and a relay for both.
fn with_a_key_file(text: &str) -> (Issuer, Dir, Relay) {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let path = dir.write("jwks.json", text);
    let config = format!(
        "[[auth.rule]]\nname = 'offline'\nissuer = '{OFFLINE}'\nbound_claims.ref = '**'\n\
         [auth.jwks_files]\n'{OFFLINE}' = '{}'\n",
        path.display()
    );
    let relay = setup(&issuer).config(&config).start();
    (issuer, dir, relay)
}

fn offline_token(issuer: &Issuer, key: &ES256KeyPair) -> String {
    let claims = issuer.claims(json!({"iss": OFFLINE}));
    key.sign(raw_claims(&claims)).unwrap()
}

/// What is no key file, by the shell command that makes it: `$0` is where.
const NO_KEY_FILES: [&str; 6] = [
    "mkfifo $0",
    "mkdir $0",
    "ln -s /dev/zero $0",
    "ln -s /dev/tty $0",
    "truncate -s 600M $0",
    "ln -s $0 $0",
];

fn make(command: &str, path: &std::path::Path) {
    let script = format!("rm -rf $0; {command}");
    let status = Command::new("sh").args(["-c", &script]).arg(path).status();
    assert!(status.unwrap().success(), "{command}");
}

#[test]
fn what_is_no_key_file_is_named_at_the_start() {
    let dir = Dir::new();
    let path = dir.path("jwks.json");
    let config = format!(
        "[auth.jwks_files]\n'http://127.0.0.1:1' = '{}'\n",
        path.display()
    );
    let config = dir.write("config.toml", &config).display().to_string();
    for command in NO_KEY_FILES {
        make(command, &path);
        let (code, said) = fails(":", &[("NIX_RELAY_CONFIG", &config)]);
        assert!(
            code == 2 && said.contains(path.to_str().unwrap()),
            "{command}: {code} {said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn what_is_put_in_the_place_of_a_key_file() {
    let key = set(&published()[1..2]);
    for command in NO_KEY_FILES {
        let (issuer, dir, mut relay) = with_a_key_file(&key);
        let token = offline_token(&issuer, &keys().p256);
        relay.connect(&token).close();
        make(command, &dir.path("jwks.json"));
        // It is looked at again within seconds, and by then others must not notice.
        eventually(&format!("the log says so of {command}"), LIMIT / 3, || {
            let asked = Instant::now();
            assert!(exchange(relay.address, HEALTHZ).ends_with("\r\n\r\nok\n"));
            relay.connect(&issuer.token()).close();
            relay.connect(&token).close();
            assert!(
                asked.elapsed() < AT_ONCE,
                "{command}: after {:?}",
                asked.elapsed()
            );
            relay.log.text().contains("jwks.json")
        });
        assert!(
            relay.peak_memory() < 64,
            "{command}: {} MiB",
            relay.peak_memory()
        );
        let asked = Instant::now();
        relay.stop();
        assert!(
            asked.elapsed() < AT_ONCE,
            "{command}: after {:?}",
            asked.elapsed()
        );
    }
}

/// And no token makes us try them all.
#[test]
fn three_thousand_keys_of_one_name() {
    let same = jwk(
        &published()[1].to_string(),
        json!({"kid": "same", "alg": null}),
    );
    let (issuer, _dir, relay) = with_a_key_file(&set(&vec![same; 3000]));
    let key = ES256KeyPair::generate().with_key_id("same");
    let before = relay.processor_time();
    // The first has the file read again, so that the relay knows.
    refused(
        &relay,
        "a stranger",
        &offline_token(&issuer, &key),
        401,
        "signature",
    );
    for _ in 0..9 {
        relay.refused(upgrade(&offline_token(&issuer, &key)).as_bytes());
    }
    let used = relay.processor_time() - before;
    println!("{used} hundredths of a second");
    assert!(used < 300, "{used} hundredths of a second");
}

#[test]
fn a_key_file_for_an_issuer_that_no_rule_names() {
    let dir = Dir::new();
    let keys = dir.write("jwks.json", &set(&published()[1..2]));
    for issuer in [
        "http://127.0.0.1:1/",
        "https://127.0.0.1:1",
        "http://127.0.0.1",
        "other",
        "",
    ] {
        let config = format!("[auth.jwks_files]\n'{issuer}' = '{}'\n", keys.display());
        let config = dir.write("config.toml", &config).display().to_string();
        for commands in [":", "set -- --check"] {
            let (code, said) = fails(commands, &[("NIX_RELAY_CONFIG", &config)]);
            let names = said.contains("auth.jwks_files") && said.contains(&format!("{issuer:?}"));
            assert!(code == 2 && names, "{issuer}: {code} {said}");
        }
    }
}

/// Characters that are longer once they are escaped, and such as could end a value or a line.
const ESCAPED: [&str; 8] = [
    "\\",
    "\"",
    "\u{1}",
    "\u{e000}",
    "\u{10ffff}",
    "\u{202e}",
    "\n",
    "\\\"",
];

/// One line, of bounded length, in whose values no quote ends one early.
fn is_well_formed(line: &str, limit: usize) {
    assert!(line.len() <= limit, "{} bytes: {line}", line.len());
    assert!(
        !line.contains(|c: char| c.is_control() || c == '\u{202e}'),
        "{line}"
    );
    // What follows each `="…"` is the next name, or the end.
    let mut rest = line;
    while let Some((_, value)) = rest.split_once("=\"") {
        let mut chars = value.char_indices();
        let end = loop {
            match chars.next() {
                Some((_, '\\')) => drop(chars.next()),
                Some((at, '"')) => break at,
                Some(_) => {}
                None => panic!("a value does not end: {line}"),
            }
        };
        rest = &value[end + 1..];
        assert!(
            rest.is_empty() || rest.starts_with(' '),
            "a value ends early: {line}"
        );
    }
}

#[test]
fn a_line_of_the_log_is_short_whatever_a_client_sends() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    for text in ESCAPED {
        // Each place where the cut can be.
        for pad in 0..12 {
            let forwarded =
                "p".repeat(pad) + &text.replace('\n', "\u{1f600}").repeat(13_000 / text.len());
            let forwarded = forwarded.replace('\u{1}', "\t");
            let lines = format!("X-Forwarded-For: {forwarded}\r\nX-Forwarded-For: {forwarded}\r\n");
            let half = &lines[..lines.len() / 2];
            let (_, line) = relay.refused(upgrade_request(half).as_bytes());
            is_well_formed(&line, 1024);
            let claim = "p".repeat(pad) + &text.repeat(2000 / json!(text).to_string().len());
            let token =
                issuer.token_with(json!({"repository_owner": claim, "sub": claim, "ref": claim}));
            let (answer, line) = relay.refused(upgrade(&token).as_bytes());
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
            is_well_formed(&line, 1024);
        }
    }
}

#[test]
fn a_line_of_the_log_is_short_whatever_a_head_is() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let forwarded = format!("X-Forwarded-For: {}\r\n", "\\".repeat(7000));
    let long = "%22\\\"".repeat(1500);
    for request in [
        format!("GET /{long} HTTP/1.1\r\nHost: relay\r\n{forwarded}\r\n"),
        format!(
            "{} /relay HTTP/1.1\r\nHost: relay\r\n{forwarded}\r\n",
            "M".repeat(8000)
        ),
        format!("GET /relay HTTP/1.1\r\nHost: {long}\r\nHost: {long}\r\n{forwarded}\r\n"),
        format!(
            "GET /relay HTTP/1.1\r\nHost: relay\r\n{}\r\n",
            "X: \"\r\n".repeat(200)
        ),
        upgrade_request(&format!("{forwarded}Authorization: Bearer {long}\r\n")),
        upgrade_request(&format!("{forwarded}Authorization: {long}\r\n")),
        upgrade_request(&format!(
            "{forwarded}Authorization: Bearer {}.{0}.c\r\n",
            encode(&long)
        )),
        format!("{long}\r\n\r\n"),
    ] {
        let (_, line) = relay.refused(request.as_bytes());
        is_well_formed(&line, 1024);
    }
}

#[test]
fn an_issuers_words_are_cut() {
    let discovery = "/.well-known/openid-configuration";
    for text in ESCAPED {
        let long = text.repeat(900_000 / text.len().max(4));
        let issuer = Issuer::start();
        let named = json!({"issuer": issuer.url(), "jwks_uri": long});
        for document in [json!({"issuer": long}), json!({"issuer": [long]}), named] {
            issuer.answer(discovery, 200, &document.to_string());
            let relay = Relay::start(&issuer);
            is_well_formed(&relay.log.wait("could not fetch keys "), 1024);
        }
    }
    let issuer = Issuer::start();
    let long = format!("/{}", "\\\"".repeat(20_000));
    for line in ["Location", "Content-Type", "Content-Encoding"] {
        let status = if line == "Location" { 302 } else { 200 };
        issuer.answer_with(discovery, status, &[&format!("{line}: {long}")], "<html>");
        let relay = Relay::start(&issuer);
        is_well_formed(&relay.log.wait("could not fetch keys "), 1024);
    }
}

/// A copy that children inherit, with a number that no shell uses.
fn inherited(fd: impl AsFd) -> OwnedFd {
    let copy = fcntl_dupfd_cloexec(fd, 300).unwrap();
    fcntl_setfd(&copy, FdFlags::empty()).unwrap();
    copy
}

/// Shell commands that pass these as systemd does.
fn passing(fds: &[OwnedFd]) -> String {
    let moves = fds.iter().zip(3..);
    let moves = moves.map(|(fd, number)| format!("exec {number}<&{0} {0}<&-; ", fd.as_raw_fd()));
    let count = fds.len();
    moves.collect::<String>() + &format!("export LISTEN_FDS={count} LISTEN_PID=$$")
}

#[test]
fn all_sockets_that_are_passed_are_served() {
    let issuer = Issuer::start();
    for count in 1..=3 {
        let listen =
            |index| TcpListener::bind(["127.0.0.1:0", "[::1]:0", "127.0.0.1:0"][index]).unwrap();
        let sockets: Vec<TcpListener> = (0..count).map(listen).collect();
        let passed: Vec<OwnedFd> = sockets.iter().map(inherited).collect();
        let setup = Setup::new(&issuer).set("LISTEN", "127.0.0.1:1");
        let setup = setup.daemon("ls -l /proc/$$/fd; exec cat");
        let relay = setup.under(&passing(&passed)).start();
        for socket in &sockets {
            let stream = tcp(socket.local_addr().unwrap());
            stream.set_read_timeout(Some(AT_ONCE)).unwrap();
            let mut client = open(stream, &issuer.token()).unwrap();
            client.raw(&frame(0x88, &1000_u16.to_be_bytes()));
            let listed = String::from_utf8(client.until_close().0).unwrap();
            assert!(listed.contains("pipe:["), "{listed}");
            for fd in &passed {
                let inode = File::from(fd.try_clone().unwrap())
                    .metadata()
                    .unwrap()
                    .ino();
                assert!(!listed.contains(&format!("socket:[{inode}]")), "{listed}");
            }
        }
        drop(relay);
    }
}

#[test]
fn what_is_passed_and_cannot_be_served() {
    let (dir, good) = (Dir::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let unix = UnixListener::bind(dir.path("socket")).unwrap();
    let _client = TcpStream::connect(good.local_addr().unwrap()).unwrap();
    let accepted = good.accept().unwrap().0;
    let bound = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    );
    let others: [(&str, OwnedFd); 8] = [
        ("a Unix socket", unix.into()),
        (
            "a pair of Unix sockets",
            UnixStream::pair().unwrap().0.into(),
        ),
        ("an accepted connection", accepted.into()),
        ("UDP", UdpSocket::bind("127.0.0.1:0").unwrap().into()),
        ("a pipe", io::pipe().unwrap().0.into()),
        ("a file", File::open(dir.write("file", "")).unwrap().into()),
        ("a socket that does not listen", bound.unwrap()),
        ("a directory", File::open(dir.path("")).unwrap().into()),
    ];
    for (what, other) in &others {
        for fds in [
            vec![inherited(other)],
            vec![inherited(&good), inherited(other)],
            vec![inherited(other), inherited(&good)],
        ] {
            let (code, said) = fails(&passing(&fds), &[]);
            assert!(
                code == 1 && said.contains("LISTEN_FDS"),
                "{what}: {code} {said}"
            );
        }
    }
    let (code, said) = fails("export LISTEN_FDS=2 LISTEN_PID=$$; exec 3<&- 4<&-", &[]);
    assert!(
        code == 1 && said.contains("LISTEN_FDS"),
        "none: {code} {said}"
    );
}

#[test]
fn a_hangup_is_a_signal_to_stop() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    let mut client = relay.connect(&issuer.token());
    relay.signal("HUP");
    relay.log.wait("shutting down");
    client.send("still served");
    assert_eq!(client.receive(), b"still served");
    relay.signal("HUP");
    assert_eq!(client.until_close().1, 1001);
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
}

/// As the seccomp profile of a container does.
#[test]
fn a_system_call_that_is_refused() {
    let prctl = if cfg!(target_arch = "x86_64") {
        157
    } else {
        167
    };
    let eventfd = if cfg!(target_arch = "x86_64") {
        290
    } else {
        19
    };
    for (name, number) in [("pidfd_open", 434), ("eventfd", eventfd)] {
        for error in [1, 38] {
            // Load the number; is it this one? Then the error, else go on.
            let filter = format!(
                "exec perl -e '$f = pack(\"(SCCL)4\", 32,0,0,0, 21,0,1,{number}, 6,0,0,0x50000|{error},
                 6,0,0,0x7fff0000);
                 $p = pack(\"Sx6P\", 4, $f);
                 syscall({prctl}, 38, 1, 0, 0, 0) == 0 && syscall({prctl}, 22, 2, $p) == 0 or die;
                 exec @ARGV' \"$0\""
            );
            let (code, said) = fails(&filter, &[]);
            let is_clear = said.contains(name) && said.contains("seccomp");
            assert!([1, 2].contains(&code) && is_clear, "{name}: {code} {said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }
}

#[test]
fn a_claim_that_is_no_text_is_named() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    for name in ["sub", "jti", "nonce"] {
        for value in [json!(5), json!(true), json!([]), json!({}), json!(["x"])] {
            let token = issuer.token_with(json!({name: value}));
            refused(&relay, name, &token, 401, &format!("{name} is not a text"));
        }
    }
}

/// Ends a session, and returns the line about it.
fn ended(by: impl FnOnce(Client)) -> String {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("KEEPALIVE_SECS", "1").start();
    let mut client = relay.connect(&issuer.token());
    client.send("echo");
    client.receive_exactly(4);
    by(client);
    relay.log.wait("session ended ")
}

#[test]
fn a_connection_that_ends_in_order_is_closed() {
    type Ends = fn(Client);
    let by: [(&str, Ends); 4] = [
        ("all of it", drop),
        ("one side", |client| {
            client.0.get_ref().shutdown(Shutdown::Write).unwrap();
            eventually("the other side ends", LIMIT, || {
                client
                    .0
                    .get_ref()
                    .read(&mut [0; 99])
                    .is_ok_and(|length| length == 0)
            });
        }),
        ("in a frame", |mut client| {
            client.raw(&frame(0x82, &[0; 100])[..50])
        }),
        ("in a message", |mut client| client.raw(&frame(2, b"x"))),
    ];
    for (what, by) in by {
        let line = ended(by);
        let is_closed = line.contains(" reason=client-closed detail=\"");
        assert!(
            is_closed && line.contains("without a Close"),
            "{what}: {line}"
        );
    }
}

#[test]
fn a_connection_that_breaks_is_gone() {
    let line = ended(|client| {
        rustix::net::sockopt::set_socket_linger(client.0.get_ref(), Some(Duration::ZERO)).unwrap()
    });
    assert!(line.contains(" reason=client-gone "), "{line}");
    let line = ended(|client| {
        thread::spawn(move || {
            thread::sleep(LIMIT);
            drop(client);
        });
    });
    assert!(
        line.contains(" reason=client-gone ") && line.contains("no response"),
        "{line}"
    );
}

#[test]
fn a_client_that_is_killed_has_closed() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let home = Dir::new();
    for (number, ready) in [(1, &b"x"[..]), (2, &[b'x'; 100_000])] {
        let mut command = job(native(), &home);
        command
            .arg("--stdio")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command.env("NIX_RELAY_URL", format!("ws://{}", relay.address));
        let mut child = command
            .env("NIX_RELAY_TOKEN", issuer.token())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(ready).unwrap();
        let mut answer = vec![0; ready.len()];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut answer)
            .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let line = relay.log.wait(&format!("session ended session={number} "));
        assert!(line.contains(" reason=client-closed "), "{line}");
    }
}

#[test]
fn what_the_daemon_still_says_after_a_close() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("cat >/dev/null; head -c 8000000 /dev/zero")
        .start();
    for code in [1000, 1001, 3000, 4999] {
        let mut client = relay.connect(&issuer.token());
        client.send("some");
        client.raw(&frame(0x88, &u16::to_be_bytes(code)));
        let (output, told, _) = client.until_close();
        assert_eq!((output.len(), told), (8_000_000, code));
    }
    relay
        .log
        .wait("session ended session=4 reason=client-closed ");
}

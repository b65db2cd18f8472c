//! When descriptors, threads, processes, permits, room in /tmp or the log's reader run out: what goes on, and what
//! comes back.

use crate::support::*;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

/// With a good token; the answer, if it is not 101.
fn upgrade(relay: &Relay, issuer: &Issuer) -> String {
    relay.upgrade(&format!("Authorization: Bearer {}\r\n", issuer.token()))
}

/// Sessions, one after the other, until there is no room for another; and the answer to that one.
fn fill(relay: &Relay, issuer: &Issuer) -> (Vec<Client>, String) {
    let mut sessions = Vec::new();
    loop {
        match relay.try_connect(&issuer.token()) {
            Ok(client) => sessions.push(client),
            Err(answer) => return (sessions, answer),
        }
        assert!(sessions.len() < 100, "no end of room");
    }
}

/// Every client in the scarcity is served or told so; after it, the next client is served.
fn survives(relay: &Relay, issuer: &Issuer, complaint: &str) {
    let before = relay.at_rest();
    let (mut sessions, answer) = fill(relay, issuer);
    assert!(sessions.len() > 2, "{} sessions", sessions.len());
    assert!(answer.contains(" 503 "), "{answer}");
    for client in &mut sessions {
        client.send("still served");
        assert_eq!(client.receive(), b"still served");
    }
    let silent: Vec<TcpStream> = (0..100).map(|_| relay.tcp()).collect();
    relay.log.wait(complaint);
    sessions.iter_mut().for_each(Client::close);
    drop(silent);
    relay.back_to(before);
    let mut client = relay.connect(&issuer.token());
    client.send("served again");
    assert_eq!(client.receive(), b"served again");
}

#[test]
fn descriptors() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).under("ulimit -n 64").start();
    survives(&relay, &issuer, "cannot accept error=");
}

/// As a user of its own, since the limit is the user's, and root has none.
pub fn with_few_threads(setup: Setup, dir: &Dir) -> Setup {
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    // Another for each relay; no process has an id of over 22 bits.
    let user = (NUMBER.fetch_add(1, Relaxed) << 22) + std::process::id();
    let copy = dir.path("relay");
    let copy = copy.to_str().unwrap();
    setup.under(&format!(
        "install -m 755 \"$0\" {copy}
         exec setpriv --reuid={user} --clear-groups prlimit --nproc=24 {copy}"
    ))
}

#[test]
fn threads_and_processes() {
    let issuer = Issuer::start();
    let dir = Dir::new();
    let relay = with_few_threads(Setup::new(&issuer), &dir).start();
    survives(&relay, &issuer, "the relay is busy; try again later: ");
}

/// A fetch takes one, for the name of the issuer's host.
#[test]
fn threads_for_a_fetch() {
    let issuer = Issuer::start();
    let dir = Dir::new();
    let setup = Setup::new(&issuer).set("JWKS_CACHE_TTL_SECS", "1");
    let relay = with_few_threads(setup, &dir).start();
    relay.log.wait("fetched keys ");
    relay.limit("--nproc=1:24");
    relay.log.wait("could not fetch keys ");
    relay.limit("--nproc=24:24");
    relay.log.take();
    relay.log.wait("fetched keys ");
}

/// Nobody reads the log any more once it has said where the relay listens.
#[test]
fn a_log_without_a_reader() {
    let issuer = Issuer::start();
    let script = "echo 'to the log' >&2; exec cat";
    let setup = Setup::new(&issuer).daemon(script);
    let relay = setup
        .under("exec 2> >(exec sed '/listening address=/q' >&2)")
        .start();
    // That sed is its child, which nobody reaps.
    eventually("the reader is gone", LIMIT, || {
        relay.children().iter().all(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat"));
            stat.is_ok_and(|stat| stat.contains(") Z "))
        })
    });
    for _ in 0..10 {
        let mut client = relay.connect(&issuer.token());
        client.send("served");
        assert_eq!(client.receive(), b"served");
        client.close();
    }
    assert!(
        relay
            .exchange(b"nonsense\r\n\r\n")
            .starts_with("HTTP/1.1 400 ")
    );
}

/// The daemon says what happens when it writes there; where the tests run, the relay itself may lie in /tmp.
#[test]
fn a_full_tmp() {
    let issuer = Issuer::start();
    let full = format!(
        "exec 9<\"$0\"
         exec {} 'mount -t tmpfs -o size=4k none /tmp; cat /dev/zero >/tmp/full; exec /proc/self/fd/9'",
        project("test/support/own-mounts").display()
    );
    let setup = Setup::new(&issuer)
        .set("DAEMON_PATH", "sh")
        .set("EXTRA_ARGS", "-c cat</bin/sh>/tmp/file;cat");
    let relay = setup.env("TMPDIR", "/tmp").under(&full).start();
    let before = relay.at_rest();
    for number in 1..=3 {
        let mut client = relay.connect(&issuer.token());
        client.send(vec![b'x'; 4_000_000]);
        assert_eq!(client.receive_exactly(4_000_000), [b'x'; 4_000_000]);
        client.close();
        relay.log.wait(&format!("session ended session={number} "));
        assert!(
            relay
                .log
                .wait(&format!("says session={number} "))
                .contains("No space left")
        );
    }
    relay.back_to(before);
}

#[test]
fn one_client_more_than_permits() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("QUEUE_TIMEOUT_SECS", "30").start();
    let before = relay.at_rest();
    let mut sessions: Vec<Client> = (0..32).map(|_| relay.connect(&issuer.token())).collect();
    thread::scope(|scope| {
        let last = scope.spawn(|| relay.connect(&issuer.token()));
        eventually("it is being served", LIMIT, || {
            relay.has_thread("connection 33")
        });
        // A whole exchange, in which the other comes to its wait.
        relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
        assert!(!last.is_finished() && relay.children().len() == 32);
        sessions.pop().unwrap().close();
        let mut last = last.join().unwrap();
        last.send("served");
        assert_eq!(last.receive(), b"served");
    });
    drop(sessions);
    relay.back_to(before);
}

#[test]
fn no_permit_in_time() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "1");
    let relay = setup.start();
    let before = relay.at_rest();
    let mut client = relay.connect(&issuer.token());
    let answer = upgrade(&relay, &issuer);
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nRetry-After: "),
        "{answer}"
    );
    relay
        .log
        .wait("status=503 reason=\"all sessions are in use");
    client.send("still served");
    assert_eq!(client.receive(), b"still served");
    client.close();
    relay.back_to(before);
    drop(relay.connect(&issuer.token()));
}

/// A client that leaves the queue must not take the permit with it.
#[test]
fn a_client_that_does_not_wait() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "30");
    let relay = setup.start();
    let before = relay.at_rest();
    let mut client = relay.connect(&issuer.token());
    let mut impatient = relay.tcp();
    let head = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    std::io::Write::write_all(&mut impatient, head.as_bytes()).unwrap();
    eventually("it is being served", LIMIT, || {
        relay.has_thread("connection 2")
    });
    drop(impatient);
    client.close();
    relay.back_to(before);
    drop(relay.connect(&issuer.token()));
}

//! SIGTERM and SIGINT: who may finish, who is told to go, and that the process ends with 0.

use crate::support::*;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Instant;

/// A grace that no test outlives.
const LONG: &str = "600";

fn start(issuer: &Issuer, grace: &str) -> Relay {
    Setup::new(issuer).set("SHUTDOWN_GRACE_SECS", grace).start()
}

/// With a good token; the answer, if it is not 101.
fn upgrade(relay: &Relay, issuer: &Issuer) -> String {
    relay.upgrade(&format!("Authorization: Bearer {}\r\n", issuer.token()))
}

fn is_503(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nRetry-After: ")
}

#[test]
fn without_sessions_it_ends_at_once() {
    let issuer = Issuer::start();
    for name in ["TERM", "INT"] {
        let mut relay = start(&issuer, LONG);
        relay.signal(name);
        assert_eq!(relay.wait().code(), Some(0), "SIG{name}");
    }
}

#[test]
fn a_session_may_finish() {
    let issuer = Issuer::start();
    let mut relay = start(&issuer, LONG);
    let mut client = relay.connect(&issuer.token());
    relay.signal("TERM");
    relay.log.wait("shutting down grace_secs=600");
    client.send("still served");
    assert_eq!(client.receive(), b"still served");
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
    relay.log.wait("reason=client-closed ");
}

/// As under systemd's nix-relay.socket, which holds the port.
#[test]
fn connections_wait_in_a_passed_socket_for_the_next_relay() {
    let issuer = Issuer::start();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
    let pass = format!(
        "exec 3<&{}; export LISTEN_FDS=1 LISTEN_PID=$$",
        socket.as_raw_fd()
    );
    let start = || {
        let setup = Setup::new(&issuer).set("LISTEN", "127.0.0.1:1");
        setup.set("SHUTDOWN_GRACE_SECS", LONG).under(&pass).start()
    };

    let mut old = start();
    assert_eq!(old.address, socket.local_addr().unwrap());
    let mut session = old.connect(&issuer.token());
    old.signal("TERM");
    old.log.wait("shutting down");
    let mut waiting = old.tcp();
    let headers = format!("Authorization: Bearer {}\r\n", issuer.token());
    waiting
        .write_all(upgrade_request(&headers).as_bytes())
        .unwrap();
    session.send("still served");
    assert_eq!(session.receive(), b"still served");
    session.close();
    assert_eq!(old.wait().code(), Some(0));

    let _new = start();
    assert!(read_head(&mut waiting).starts_with("HTTP/1.1 101 "));
}

#[test]
fn after_the_grace_a_session_is_closed() {
    let issuer = Issuer::start();
    for name in ["TERM", "INT"] {
        let mut relay = start(&issuer, "1");
        let mut client = relay.connect(&issuer.token());
        relay.signal(name);
        let (_, code, reason) = client.until_close();
        assert_eq!(
            (code, reason.as_str()),
            (1001, "the relay is shutting down")
        );
        client.close();
        assert_eq!(relay.wait().code(), Some(0));
        relay.log.wait("reason=shutting-down ");
        relay.log.wait("connections_left=0");
    }
}

#[test]
fn a_second_signal_cuts_the_grace_short() {
    let issuer = Issuer::start();
    for at_once in [false, true] {
        let mut relay = start(&issuer, LONG);
        let mut client = relay.connect(&issuer.token());
        relay.signal("TERM");
        if !at_once {
            relay.log.wait("shutting down");
        }
        relay.signal("INT");
        assert_eq!(client.until_close().1, 1001);
        client.close();
        assert_eq!(relay.wait().code(), Some(0));
    }
}

#[test]
fn nobody_new_gets_in() {
    let issuer = Issuer::start();
    let mut relay = start(&issuer, LONG);
    let mut client = relay.connect(&issuer.token());
    relay.signal("TERM");
    relay.log.wait("shutting down");
    let answer = upgrade(&relay, &issuer);
    assert!(is_503(&answer), "{answer}");
    let answer = relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("\r\n\r\ndraining\n"),
        "{answer}"
    );
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
}

#[test]
fn who_waits_for_a_permit_gets_503() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "30");
    let mut relay = setup.set("SHUTDOWN_GRACE_SECS", LONG).start();
    let mut client = relay.connect(&issuer.token());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| upgrade(&relay, &issuer));
        eventually("it is being served", LIMIT, || {
            relay.has_thread("connection 2")
        });
        // A whole exchange, in which the other comes to its wait.
        relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
        assert!(!waiting.is_finished());
        relay.signal("TERM");
        let answer = waiting.join().unwrap();
        assert!(is_503(&answer), "{answer}");
    });
    client.close();
    assert_eq!(relay.wait().code(), Some(0));
}

#[test]
fn busy_sessions_all_hear_a_close() {
    let issuer = Issuer::start();
    let mut relay = start(&issuer, "1");
    let clients: Vec<Client> = (0..32).map(|_| relay.connect(&issuer.token())).collect();
    let busy = clients.into_iter().map(|mut client| {
        thread::spawn(move || {
            loop {
                client.send(vec![0; 65536]);
                match client.0.read().unwrap() {
                    Message::Close(close) => break u16::from(close.unwrap().code),
                    other => assert!(other.is_binary(), "{other:?}"),
                }
            }
        })
    });
    let busy: Vec<_> = busy.collect();
    relay.signal("TERM");
    for client in busy {
        assert_eq!(client.join().unwrap(), 1001);
    }
    assert_eq!(relay.wait().code(), Some(0));
    relay.log.wait("connections_left=0");
}

/// The clients are slower than their daemons, so that almost every one has half a frame when its session ends.
#[test]
fn a_frame_is_finished_before_the_close() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .daemon("exec cat /dev/zero")
        .set("SHUTDOWN_GRACE_SECS", "0");
    let relay = setup.start();
    let mut clients: Vec<Client> = (0..4).map(|_| relay.connect(&issuer.token())).collect();
    clients.iter_mut().for_each(|client| drop(client.receive()));
    relay.signal("TERM");
    thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                let (data, code, _) = client.until_close();
                assert!(data.iter().all(|byte| *byte == 0) && code == 1001, "{code}");
            });
        }
    });
}

/// They take all that a child can be given: 15 s, and are gone when the relay is.
#[test]
fn daemons_that_ignore_everything_are_killed_first() {
    let issuer = Issuer::start();
    let script = "trap '' TERM; echo ready; exec sleep 1000";
    let setup = Setup::new(&issuer)
        .set("SHUTDOWN_GRACE_SECS", "0")
        .daemon(script);
    let mut relay = setup.start();
    let clients: Vec<Client> = (0..32)
        .map(|_| {
            let mut client = relay.connect(&issuer.token());
            client.receive_exactly(6);
            client
        })
        .collect();
    let children = relay.children();
    assert_eq!(children.len(), 32);
    relay.signal("TERM");
    let asked = Instant::now();
    for mut client in clients {
        assert_eq!(client.until_close().1, 1001);
    }
    assert_eq!(relay.wait().code(), Some(0));
    assert!(asked.elapsed().as_secs() <= 20, "{:?}", asked.elapsed());
    let left = children
        .iter()
        .filter(|id| std::fs::exists(format!("/proc/{id}")).unwrap());
    assert_eq!(left.count(), 0);
}

/// They have no session, so that nobody hears more than that the connection ends or a 503 or 408.
#[test]
fn handshakes_do_not_hold_it() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer).set("HANDSHAKE_TIMEOUT_SECS", LONG);
    let mut relay = setup.set("SHUTDOWN_GRACE_SECS", "0").start();
    let silent: Vec<TcpStream> = (0..10).map(|_| relay.tcp()).collect();
    eventually("they are being served", LIMIT, || {
        (1..=10).all(|n| relay.has_thread(&format!("connection {n}")))
    });
    relay.signal("TERM");
    assert_eq!(relay.wait().code(), Some(0));
    drop(silent);
}

/// The issuer takes connections and says nothing.
#[test]
fn a_key_fetch_does_not_hold_it() {
    let issuer = Issuer::start();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    let setup = Setup::new(&issuer)
        .set("ISSUER", &url)
        .set("SHUTDOWN_GRACE_SECS", "0");
    let mut relay = setup.start();
    let asked = Instant::now();
    let token = issuer.token_with(json!({"iss": url}));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| relay.upgrade(&format!("Authorization: Bearer {token}\r\n")));
        let _fetch = mute.accept().unwrap();
        // The relay fetches at its start, too.
        eventually("it is being served", LIMIT, || {
            relay.has_thread("connection 1")
        });
        relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
        relay.signal("TERM");
        let answer = waiting.join().unwrap();
        assert!(is_503(&answer), "{answer}");
    });
    assert_eq!(relay.wait().code(), Some(0));
    assert!(asked.elapsed().as_secs() <= 20, "{:?}", asked.elapsed());
}

//! Connections that never come to a session: slow, silent, too big, or of another protocol.

use crate::support::*;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// It takes milliseconds, and a second where the other tests have the machine to themselves; the
/// clients that are in the way would stay for ten minutes.
const AT_ONCE: Duration = Duration::from_secs(5);

fn served_at_once(relay: &Relay, issuer: &Issuer) {
    let asked = Instant::now();
    let token = issuer.token();
    let mut client = relay.connect(&token);
    client.send("served");
    assert_eq!(client.receive(), b"served");
    assert!(
        asked.elapsed() < AT_ONCE,
        "served after {:?}",
        asked.elapsed()
    );
    client.close();
}

/// All that comes until the end of the connection, of whatever kind that is.
fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn status(answer: &str) -> &str {
    answer
        .strip_prefix("HTTP/1.1 ")
        .map_or(answer, |rest| &rest[..3])
}

#[test]
fn a_thousand_silent_connections() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("HANDSHAKE_TIMEOUT_SECS", "600")
        .start();
    let before = relay.at_rest();
    let mut silent: Vec<TcpStream> = (0..1000).map(|_| relay.tcp()).collect();
    served_at_once(&relay, &issuer);
    // The oldest had to make room, and were told.
    for stream in &mut silent[..700] {
        let answer = rest(stream);
        assert_eq!(status(&answer), "503", "{answer}");
        assert!(answer.contains("\r\nRetry-After: "), "{answer}");
    }
    // The youngest are still waited for.
    let youngest = silent.last_mut().unwrap();
    youngest
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n")
        .unwrap();
    assert_eq!(status(&rest(youngest)), "200");
    assert!(
        relay.resources().0 <= before.0 + 256,
        "{} threads",
        relay.resources().0
    );
    drop(silent);
    relay.back_to(before);
}

/// Sessions do not count as handshakes, and are not cut off for them.
#[test]
fn sessions_survive_a_flood() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("HANDSHAKE_TIMEOUT_SECS", "600")
        .start();
    let mut client = relay.connect(&issuer.token());
    let silent: Vec<TcpStream> = (0..600).map(|_| relay.tcp()).collect();
    served_at_once(&relay, &issuer);
    client.send("still there");
    assert_eq!(client.receive(), b"still there");
    drop(silent);
}

/// A flood of clients that send the first half of a head is no better than one of silent ones.
#[test]
fn a_thousand_halves() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("HANDSHAKE_TIMEOUT_SECS", "600")
        .start();
    let before = relay.at_rest();
    let halves: Vec<TcpStream> = (0..1000)
        .map(|_| {
            let mut stream = relay.tcp();
            let _ = stream.write_all(b"GET /relay HTTP/1.1\r\nHost: rel");
            stream
        })
        .collect();
    served_at_once(&relay, &issuer);
    drop(halves);
    relay.back_to(before);
}

#[test]
fn half_a_head_is_given_up_in_time() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("HANDSHAKE_TIMEOUT_SECS", "1")
        .start();
    let before = relay.at_rest();
    for half in [
        "",
        "G",
        "GET /relay HTTP/1.1\r\nHost: relay\r\n",
        "\r\n\r\n",
    ] {
        let answer = relay.exchange(half.as_bytes());
        assert_eq!(status(&answer), "408", "{half:?}: {answer}");
    }
    relay.back_to(before);
}

/// Every byte comes in time, the head does not.
#[test]
fn byte_after_byte_is_given_up_in_time() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("HANDSHAKE_TIMEOUT_SECS", "2")
        .start();
    let before = relay.at_rest();
    let slow: Vec<TcpStream> = (0..50).map(|_| relay.tcp()).collect();
    served_at_once(&relay, &issuer);
    thread::scope(|scope| {
        for mut stream in slow {
            scope.spawn(move || {
                let start = Instant::now();
                stream
                    .set_read_timeout(Some(Duration::from_millis(100)))
                    .unwrap();
                for byte in upgrade_request(&"X: y\r\n".repeat(100)).bytes() {
                    let _ = stream.write_all(&[byte]);
                    match stream.read(&mut [0; 12]) {
                        Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                        answered => return assert_eq!(answered.unwrap(), 12),
                    }
                    assert!(start.elapsed() < Duration::from_secs(20));
                }
                panic!("the whole head was read");
            });
        }
    });
    relay.back_to(before);
}

#[test]
fn heads_that_are_too_big() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let before = relay.at_rest();
    let long = upgrade_request(&format!("X: {}\r\n", "y".repeat(1 << 20)));
    let many = upgrade_request(&"X: y\r\n".repeat(1000));
    let endless = format!("GET /{}", "x".repeat(1 << 20));
    for head in [long, many, endless, "x".repeat(1 << 20)] {
        let mut stream = relay.tcp();
        // It may hang up on the way.
        let _ = stream.write_all(head.as_bytes());
        let answer = rest(&mut stream);
        assert!(
            ["431", "400"].contains(&status(&answer)),
            "{:.20}: {answer}",
            head
        );
    }
    let almost = upgrade_request(&format!("X: {}\r\n", "y".repeat(16000)));
    assert_eq!(status(&relay.exchange(almost.as_bytes())), "401");
    relay.back_to(before);
}

#[test]
fn bytes_that_are_not_this_protocol() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let before = relay.at_rest();
    let with = |headers: &str| upgrade_request(headers).into_bytes();
    let old = upgrade_request("").replace("HTTP/1.1", "HTTP/1.0");
    let mut token = with("Authorization: Bearer x\r\n");
    *token.iter_mut().rfind(|byte| **byte == b'x').unwrap() = 0xFF;
    let cases: [(&str, Vec<u8>, &str); 12] = [
        (
            "HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".into(),
            "400",
        ),
        (
            "TLS",
            b"\x16\x03\x01\x00\xC8\x01\x00\x00\xC4\x03\x03".into(),
            "400",
        ),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n".into(), "400"),
        ("HTTP/0.9", b"GET /relay\r\n\r\n".into(), "400"),
        ("HTTP/1.0", old.into(), "426"),
        ("NUL in a name", with("X\0: y\r\n"), "400"),
        ("NUL in a value", with("X: \0\r\n"), "400"),
        (
            "NUL in the path",
            b"GET /rel\0ay HTTP/1.1\r\nHost: relay\r\n\r\n".into(),
            "400",
        ),
        (
            "not UTF-8 in the path",
            b"GET /\xFF HTTP/1.1\r\nHost: relay\r\n\r\n".into(),
            "400",
        ),
        ("not UTF-8 in a token", token, "401"),
        ("a folded line", with("X: a\r\n b\r\n"), "400"),
        ("no colon", with("Authorization\r\n"), "400"),
    ];
    for (what, bytes, expected) in cases {
        let answer = relay.exchange(&bytes);
        assert_eq!(status(&answer), expected, "{what}: {answer}");
    }
    relay.back_to(before);
}

#[test]
fn two_authorizations() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let good = format!("Authorization: Bearer {}\r\n", issuer.token());
    for other in [
        "Authorization: Bearer x\r\n",
        "authorization: Basic eDp5\r\n",
        &good,
    ] {
        for headers in [format!("{good}{other}"), format!("{other}{good}")] {
            assert_eq!(status(&relay.upgrade(&headers)), "400", "{headers}");
        }
    }
}

/// What comes behind a head is not another request: one answer, and the end.
#[test]
fn a_request_behind_a_refused_one() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let good = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let health = "GET /healthz HTTP/1.1\r\nHost: relay\r\nContent-Length: 600\r\n\r\n";
    for first in [
        health,
        &upgrade_request("Authorization: Bearer x\r\n"),
        "x\r\n\r\n",
    ] {
        let answer = relay.exchange(format!("{first}{good}").as_bytes());
        assert_eq!(answer.matches("Content-Length: ").count(), 1, "{answer}");
        assert_ne!(status(&answer), "101");
    }
    assert!(!relay.log.text().contains("session opened"));
}

/// After 101, it is the WebSocket's.
#[test]
fn frames_behind_the_head() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("KEEPALIVE_SECS", "0").start();
    let head = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let close = frame(0x88, &1000_u16.to_be_bytes());
    let bytes = [head.as_bytes(), &frame(0x82, b"early"), &close].concat();
    let mut stream = relay.tcp();
    stream.write_all(&bytes).unwrap();
    let answer = rest(&mut stream);
    assert_eq!(status(&answer), "101");
    relay.log.wait("reason=client-closed detail=\"\" ");
    assert!(
        relay.log.wait("session ended").contains(" bytes_in=5 "),
        "{answer:?}"
    );
}

/// Whoever was refused and does not hang up is in nobody's way.
#[test]
fn refused_clients_that_stay() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let before = relay.at_rest();
    let stay = || {
        let mut stream = relay.tcp();
        stream
            .write_all(b"GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n")
            .unwrap();
        stream
    };
    let refused: Vec<TcpStream> = (0..400).map(|_| stay()).collect();
    served_at_once(&relay, &issuer);
    drop(refused);
    relay.back_to(before);
}

/// What a refused client goes on to send is read for a second, and by nobody who has others to serve.
#[test]
fn refused_clients_that_go_on_sending() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let before = relay.at_rest();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let mut stream = relay.tcp();
                scope.spawn(move || {
                    stream.write_all(b"GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n")?;
                    let start = Instant::now();
                    while start.elapsed() < 2 * AT_ONCE {
                        stream.write_all(&[0; 65536])?;
                    }
                    Ok::<(), std::io::Error>(())
                })
            })
            .collect();
        served_at_once(&relay, &issuer);
        for client in clients {
            assert!(client.join().unwrap().is_err(), "it may go on for ever");
        }
    });
    relay.back_to(before);
}

/// Where there is no place left, whoever comes is told so, and cannot keep the relay busy with it.
#[test]
fn clients_without_a_place_that_go_on_sending() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer).set("QUEUE_TIMEOUT_SECS", "30");
    let relay = setup.set("HANDSHAKE_TIMEOUT_SECS", "600").start();
    let request = upgrade_request(&format!("Authorization: Bearer {}\r\n", issuer.token()));
    let _sessions: Vec<Client> = (0..32).map(|_| relay.connect(&issuer.token())).collect();
    let sending = |request: &str| {
        let mut stream = relay.tcp();
        let _ = stream.write_all(request.as_bytes());
        stream
    };
    let _waiting: Vec<TcpStream> = (0..256).map(|_| sending(&request)).collect();
    let _silent: Vec<TcpStream> = (0..256).map(|_| sending("")).collect();
    let busy = (0..4).map(|_| sending("GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n"));
    let busy: Vec<TcpStream> = busy.collect();
    thread::scope(|scope| {
        for mut stream in busy {
            scope.spawn(move || {
                let start = Instant::now();
                while start.elapsed() < AT_ONCE && stream.write_all(&[0; 65536]).is_ok() {}
            });
        }
        let asked = Instant::now();
        let answer = relay.exchange(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n");
        assert_eq!(status(&answer), "200", "{answer}");
        assert!(asked.elapsed() < AT_ONCE, "after {:?}", asked.elapsed());
    });
}

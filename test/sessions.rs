//! Bytes between a client and its daemon: all of them, both ways at once, and what else a WebSocket has.

use crate::support::*;
use rustix::net::{connect_unspec, sockopt};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::Duration;
use tungstenite::error::ProtocolError;
use tungstenite::protocol::{Role, WebSocket, WebSocketConfig};
use tungstenite::{Error, Message};

const BINARY: u8 = 0x82;
const FIRST: u8 = 0x02;
const MIDDLE: u8 = 0x00;
const LAST: u8 = 0x80;
const PING: u8 = 0x89;
const CLOSE: u8 = 0x88;

fn random(length: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open("/dev/urandom")
        .unwrap()
        .take(length)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// A relay that sends no pings, with one session.
fn quiet() -> (Relay, Client) {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("KEEPALIVE_SECS", "0").start();
    let client = relay.connect(&issuer.token());
    (relay, client)
}

#[test]
fn full_duplex() {
    let (relay, mut client) = quiet();
    let sent = random(50_000_000);
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            // Of all sizes up to a megabyte, so that no boundary of ours is one of theirs.
            let mut rest = &sent[..];
            for size in (1..).map(|n| n * 7919 % 1_000_003) {
                let (now, later) = rest.split_at(rest.len().min(size));
                socket.write_all(&frame(BINARY, now)).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
        });
        client.receive_exactly(sent.len())
    });
    assert!(received == sent, "the bytes are others");
    client.close();
    let line = relay.log.wait("session ended");
    assert!(
        line.contains(" bytes_in=50000000 bytes_out=50000000 "),
        "{line}"
    );
}

/// A client that sends everything before it reads anything can wait for ever if the relay does.
#[test]
fn neither_direction_waits_for_the_other() {
    let issuer = Issuer::start();
    let script = "head -c 20000000 /dev/zero & exec cat >/dev/null";
    let relay = Setup::new(&issuer).daemon(script).start();
    let mut client = relay.connect(&issuer.token());
    for _ in 0..5 {
        client.send(vec![0; 4_000_000]);
    }
    client.receive_exactly(20_000_000);
}

/// Whatever is half sent when a ping comes, its answer is a frame of its own; and the last one is answered.
#[test]
fn pongs_between_large_frames() {
    const ALL: usize = 50_000_000;
    let issuer = Issuer::start();
    let script = format!("head -c {ALL} /dev/zero; exec cat");
    let relay = Setup::new(&issuer)
        .daemon(&script)
        .set("KEEPALIVE_SECS", "0")
        .start();
    let mut client = relay.connect(&issuer.token());
    let mut length = 0_usize;
    let mut pings = 0_u32;
    let mut last = Vec::new();
    while length < ALL || last != pings.to_be_bytes() {
        if length < ALL / 2 {
            pings += 1;
            client.raw(&frame(PING, &pings.to_be_bytes()));
        }
        match client.0.read().unwrap() {
            Message::Binary(bytes) if bytes.iter().all(|byte| *byte == 0) => length += bytes.len(),
            Message::Pong(payload) => last = payload.to_vec(),
            other => panic!("{other:.60?}"),
        }
    }
    assert_eq!(length, ALL);
}

/// Pongs alone fill the connection to a client that does not read yet. What waits then is the answer to the last ping.
#[test]
fn the_last_of_many_pings_is_answered() {
    const PINGS: u32 = 100_000;
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("head -c 1 >/dev/null; echo all pings are read >&2; exec cat")
        .set("KEEPALIVE_SECS", "0")
        .start();
    let mut client = relay.connect(&issuer.token());
    let ping = |number: u32| frame(PING, &[number.to_be_bytes().as_slice(), &[0; 121]].concat());
    client.raw(&(1..=PINGS).flat_map(ping).collect::<Vec<_>>());
    client.send("x");
    relay.log.wait("all pings are read");

    let (mut pongs, mut last) = (0, vec![]);
    while !last.starts_with(&PINGS.to_be_bytes()) {
        match client.0.read().unwrap() {
            Message::Pong(payload) => (pongs, last) = (pongs + 1, payload.to_vec()),
            other => panic!("{other:.60?}"),
        }
    }
    assert!(pongs < PINGS, "they never filled it");
}

#[test]
fn frames_of_every_length() {
    let (_relay, mut client) = quiet();
    for length in [0, 1, 125, 126, 65535, 65536, 4 << 20] {
        let sent = random(length);
        let mut socket = client.0.get_ref().try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| socket.write_all(&frame(BINARY, &sent)).unwrap());
            assert!(client.receive_exactly(sent.len()) == sent, "{length} bytes");
        });
    }
    client.send("still there");
    assert_eq!(client.receive(), b"still there");
}

#[test]
fn fragments_with_pings_in_between() {
    let (_relay, mut client) = quiet();
    for (first, payload) in [
        (FIRST, "one "),
        (PING, "a"),
        (MIDDLE, "two "),
        (MIDDLE, ""),
        (PING, "b"),
        (LAST, "three"),
    ] {
        client.raw(&frame(first, payload.as_bytes()));
    }
    let mut data = Vec::new();
    let mut pongs = Vec::new();
    while data.len() < "one two three".len() || pongs.len() < 2 {
        match client.0.read().unwrap() {
            Message::Binary(bytes) => data.extend_from_slice(&bytes),
            Message::Pong(bytes) => pongs.push(bytes),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(String::from_utf8(data).unwrap(), "one two three");
    assert_eq!(pongs, ["a", "b"]);
}

#[test]
fn no_empty_frame_is_sent() {
    let (relay, mut client) = quiet();
    for part in [&b""[..], b"x", b"", b"y"] {
        client.raw(&frame(BINARY, part));
    }
    client.raw(&[frame(FIRST, b""), frame(LAST, b"")].concat());
    client.raw(&frame(CLOSE, &1000_u16.to_be_bytes()));
    let mut frames = Vec::new();
    while let Ok(message) = client.0.read() {
        frames.push(message);
    }
    let empty = |message: &Message| message.is_binary() && message.is_empty();
    assert!(!frames.iter().any(empty), "{frames:?}");
    relay.log.wait("bytes_in=2 ");
}

#[test]
fn pings_come_and_a_client_that_answers_stays() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("KEEPALIVE_SECS", "1").start();
    let mut client = relay.connect(&issuer.token());
    for _ in 0..5 {
        // More than the three that a silent client is given; reading answers them.
        assert!(matches!(client.0.read().unwrap(), Message::Ping(_)));
    }
    client.send("still there");
    assert_eq!(client.receive(), b"still there");
}

#[test]
fn a_session_has_its_time() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("TIMEOUT_SECS", "1").start();
    let before = relay.at_rest();
    let (data, code, reason) = relay.connect(&issuer.token()).until_close();
    assert_eq!((data.len(), code), (0, 1008));
    assert!(reason.contains("daemon.timeout_secs"), "{reason}");
    relay.log.wait("session ended session=1 reason=timed-out ");
    relay.back_to(before);
}

/// tungstenite would read on until there is a message.
#[test]
fn a_session_has_its_time_whatever_comes() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("TIMEOUT_SECS", "1").start();
    let before = relay.at_rest();
    let client = relay.connect(&issuer.token());
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let parts = [frame(0x02, b""), frame(0x00, b"").repeat(1000)];
    let writer = thread::spawn(move || {
        socket.write_all(&parts[0]).unwrap();
        while socket.write_all(&parts[1]).is_ok() {}
    });
    relay.log.wait("session ended session=1 reason=timed-out ");
    writer.join().unwrap();
    relay.back_to(before);
}

/// What breaks a session off while its daemon is being ended is still told.
#[test]
fn a_violation_after_the_output_has_ended() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("trap '' TERM; echo ready; exec sleep 1000 >&-")
        .start();
    let mut client = relay.connect(&issuer.token());
    client.receive_exactly(6);
    client.raw(&frame(0x81, b"text"));
    assert_eq!(client.until_close().1, 1003);
    relay
        .log
        .wait("session ended session=1 reason=protocol-error ");
}

/// One session for each message; what it is closed with.
fn closed_after(message: &[u8]) -> (u16, String) {
    let (relay, mut client) = quiet();
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let code = thread::scope(|scope| {
        // The relay may have hung up by then.
        scope.spawn(move || socket.write_all(message));
        client.until_close().1
    });
    client.close();
    (code, relay.log.wait("session ended"))
}

#[test]
fn text_is_refused() {
    let (code, line) = closed_after(&frame(0x81, b"text"));
    assert_eq!(code, 1003);
    assert!(
        line.contains(" reason=protocol-error ") && line.contains(" bytes_in=0 "),
        "{line}"
    );
}

#[test]
fn more_than_4_mib_are_refused() {
    assert_eq!(
        closed_after(&frame(BINARY, &vec![0; (4 << 20) + 1])).0,
        1009
    );
}

#[test]
fn more_than_4_mib_in_fragments_are_refused() {
    let half = vec![0; 2 << 20];
    let message = [frame(FIRST, &half), frame(MIDDLE, &half), frame(LAST, b"x")].concat();
    assert_eq!(closed_after(&message).0, 1009);
}

#[test]
fn the_log_has_both_ends_of_a_session() {
    let (relay, mut client) = quiet();
    let peer = client.0.get_ref().local_addr().unwrap();
    let line = relay.log.wait("session opened");
    let identity = " rule=\"allowed_org\" sub=\"repo:example-org/project:ref:refs/heads/main\" ";
    assert!(
        line.contains(&format!(" session=1 peer={peer}{identity}")),
        "{line}"
    );
    client.send("12345");
    client.receive_exactly(5);
    client.close();
    let line = relay.log.wait("session ended");
    for part in [
        " session=1 reason=client-closed ",
        " bytes_in=5 bytes_out=5 ",
        " exit=\"nix-daemon ended with exit status: 0\"",
    ] {
        assert!(line.contains(part), "{line}");
    }
}

/// The other half of a closing handshake: a Close is answered with the code it has.
#[test]
fn a_close_is_answered() {
    let (_relay, mut client) = quiet();
    client.raw(&frame(CLOSE, &4321_u16.to_be_bytes()));
    let mut reader =
        WebSocket::from_raw_socket(client.0.get_ref().try_clone().unwrap(), Role::Client, None);
    match reader.read().unwrap() {
        Message::Close(Some(close)) => assert_eq!(u16::from(close.code), 4321),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.0.get_mut().read(&mut [0]).unwrap(), 0);
}

/// Three of its keepalives are more milliseconds than the kernel takes for a limit of its own.
#[test]
fn a_very_long_keepalive() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("KEEPALIVE_SECS", "1000000").start();
    let mut client = relay.connect(&issuer.token());
    client.send("echo");
    assert_eq!(client.receive(), b"echo");
}

/// What a client's Close leaves the daemon to say, of which it reads so many bytes a second.
fn output_after_a_close(script: &str, bytes_a_second: u32) -> (usize, u16, String) {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).daemon(script).start();
    let before = relay.at_rest();
    let stream = relay.tcp();
    sockopt::set_socket_recv_buffer_size(&stream, 64 << 10).unwrap();
    let mut client = open(stream, &issuer.token()).unwrap();
    client.raw(&frame(CLOSE, &4321_u16.to_be_bytes()));
    // One that has read a Close itself would answer it; this one has sent its own.
    let socket = client.0.get_ref().try_clone().unwrap();
    let limits = WebSocketConfig::default().read_buffer_size(64 << 10);
    let mut reader = WebSocket::from_raw_socket(socket, Role::Client, Some(limits));
    let mut read = 0;
    let end = loop {
        match reader.read().unwrap() {
            Message::Binary(bytes) => {
                read += bytes.len();
                thread::sleep(Duration::from_secs(1) * bytes.len() as u32 / bytes_a_second);
            }
            Message::Close(Some(close)) => {
                break (read, close.code.into(), close.reason.to_string());
            }
            other => panic!("{other:?}"),
        }
    };
    relay.log.wait(" reason=client-closed ");
    drop((client, reader));
    relay.back_to(before);
    end
}

#[test]
fn output_after_a_close_is_delivered() {
    let script = "cat >/dev/null; exec head -c 5000000 /dev/zero";
    for bytes_a_second in [u32::MAX, 1 << 20] {
        let end = output_after_a_close(script, bytes_a_second);
        assert_eq!(end, (5_000_000, 4321, String::new()));
    }
}

/// A client may be silent after its Close, for as long as its daemon is.
#[test]
fn output_long_after_a_close() {
    let issuer = Issuer::start();
    let script = "cat >/dev/null; sleep 4; exec head -c 200000 /dev/zero";
    let relay = Setup::new(&issuer)
        .daemon(script)
        .set("KEEPALIVE_SECS", "1")
        .start();
    // What comes first is up to the scheduler.
    let mut clients: Vec<_> = (0..20).map(|_| relay.connect(&issuer.token())).collect();
    for client in &mut clients {
        client.raw(&frame(CLOSE, &1000_u16.to_be_bytes()));
    }
    for mut client in clients {
        let (data, code, _) = client.until_close();
        assert_eq!((data.len(), code), (200_000, 1000));
    }
}

#[test]
fn a_daemon_that_fails_after_a_close() {
    let script = "cat >/dev/null; echo output; echo why >&2; exit 3";
    let reason = "nix-daemon ended with exit status: 3: why".into();
    assert_eq!(output_after_a_close(script, u32::MAX), (7, 1011, reason));
}

#[test]
fn a_client_that_resets_after_its_close() {
    let issuer = Issuer::start();
    let script = "cat >/dev/null; exec cat /dev/zero";
    let relay = Setup::new(&issuer).daemon(script).start();
    let before = relay.at_rest();
    let mut client = relay.connect(&issuer.token());
    client.raw(&frame(CLOSE, &1000_u16.to_be_bytes()));
    client.0.get_mut().read_exact(&mut [0; 1000]).unwrap();
    connect_unspec(client.0.get_ref()).unwrap();
    relay.log.wait(" reason=client-closed ");
    relay.back_to(before);
}

/// Pongs that wait for room do not take the place of a Close that waits for room, and none follows it. A kernel with so small a buffer may drop
/// what acknowledges the pings, and then nothing moves for a minute: such a session says nothing of this.
#[test]
fn a_close_amid_a_flood_of_pings() {
    let issuer = Issuer::start();
    let script = "exec head -c 1000000 /dev/zero";
    let relay = Setup::new(&issuer).daemon(script).start();
    let mut codes = Vec::new();
    for _ in 0..24 {
        let stream = relay.tcp();
        sockopt::set_socket_recv_buffer_size(&stream, 16 << 10).unwrap();
        let mut client = open(stream, &issuer.token()).unwrap();
        let mut socket = client.0.get_ref().try_clone().unwrap();
        let timeout = Some(Duration::from_secs(3));
        socket.set_read_timeout(timeout).unwrap();
        let pings = frame(PING, &[b'x'; 125]).repeat(200);
        thread::spawn(move || while socket.write_all(&pings).is_ok() {});
        loop {
            match client.0.read() {
                Ok(Message::Close(frame)) => {
                    codes.push(frame.map(|frame| frame.code.into()));
                    let next = client.0.read().unwrap_err();
                    let more = ProtocolError::ReceivedAfterClosing;
                    assert!(
                        !matches!(next, Error::Protocol(e) if e == more),
                        "a frame follows"
                    );
                }
                Ok(_) => continue,
                Err(Error::Io(e)) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("no Close, but {e}"),
            }
            break;
        }
        if codes.len() == 8 {
            break;
        }
    }
    assert!(
        codes.len() >= 4 && codes.iter().all(|code| *code == Some(1000)),
        "{codes:?}"
    );
}

/// Run as the unit runs it, the relay keeps nothing of what sessions had. It takes a second round to see what glibc would
/// do: once it has freed a large block, it takes such blocks from its heaps, and each thread may have one.
#[test]
fn memory_is_given_back() {
    const LENGTH: usize = 4 << 20;
    let issuer = Issuer::start();
    let unit = fs::read_to_string(project("nix/nix-relay.service")).unwrap();
    let variables = unit
        .lines()
        .filter_map(|line| line.strip_prefix("Environment=")?.split_once('='))
        .filter(|(name, _)| *name != "PATH");
    let setup = Setup::new(&issuer).daemon(&format!("head -c {LENGTH} >/dev/null"));
    let relay = variables
        .fold(setup, |setup, (name, value)| setup.env(name, value))
        .start();
    let before = relay.at_rest();
    for _ in 0..2 {
        let mut clients = [(); 16].map(|()| relay.connect(&issuer.token()));
        for client in &mut clients {
            client.send(vec![0; LENGTH]);
            assert_eq!(client.until_close().1, 1000);
        }
        drop(clients);
        relay.back_to(before);
    }
    let kept = relay.memory("RssAnon:");
    assert!(kept < 12 << 10, "{kept} KiB");
}

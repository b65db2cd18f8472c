//! Frames that no client should send: the right Close, the daemon ended, and nothing left.

use crate::support::*;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;

/// What one client sends, each in a session of its own, and the code it is closed with.
fn each_is_closed_with(cases: &[(&str, Vec<u8>, u16)]) {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).start();
    let before = relay.at_rest();
    for (number, (what, bytes, expected)) in (1..).zip(cases) {
        let mut client = relay.connect(&issuer.token());
        let mut socket = client.0.get_ref().try_clone().unwrap();
        let code = thread::scope(|scope| {
            // The relay may have hung up before the end of it.
            scope.spawn(move || socket.write_all(bytes));
            client.until_close().1
        });
        assert_eq!(code, *expected, "{what}");
        client.close();
        let line = relay.log.wait(&format!("session ended session={number} "));
        assert!(
            line.contains(" exit=\"nix-daemon ended with exit status: 0\""),
            "{what}: {line}"
        );
    }
    relay.back_to(before);
    assert!(!relay.log.text().contains("panicked"));
    let mut client = relay.connect(&issuer.token());
    client.send("still served");
    assert_eq!(client.receive(), b"still served");
}

/// A frame of that length, of which nothing more comes.
fn announced(first: u8, length: u64) -> Vec<u8> {
    [&[first, 0xFF][..], &length.to_be_bytes(), &[0; 4]].concat()
}

#[test]
fn malformed() {
    let mut cases = vec![
        ("unmasked", vec![0x82, 1, b'x'], 1002),
        ("unmasked ping", vec![0x89, 0], 1002),
        ("unmasked and empty", vec![0x82, 0], 1002),
    ];
    for bit in [0x40, 0x20, 0x10] {
        cases.push(("reserved bit", frame(0x82 | bit, b"x"), 1002));
        cases.push(("reserved bit of a ping", frame(0x89 | bit, b"x"), 1002));
    }
    for opcode in (0x3..=0x7).chain(0xB..=0xF) {
        cases.push(("reserved opcode", frame(0x80 | opcode, b"x"), 1002));
    }
    each_is_closed_with(&cases);
}

#[test]
fn control_frames() {
    each_is_closed_with(&[
        ("ping in fragments", frame(0x09, b"x"), 1002),
        (
            "close in fragments",
            frame(0x08, &1000_u16.to_be_bytes()),
            1002,
        ),
        ("ping of 126 bytes", frame(0x89, &[0; 126]), 1002),
        ("pong of 126 bytes", frame(0x8A, &[0; 126]), 1002),
        ("close of 126 bytes", frame(0x88, &[3; 126]), 1002),
        ("ping of 64 KiB", frame(0x89, &[0; 65536]), 1002),
    ]);
}

#[test]
fn order_of_fragments() {
    each_is_closed_with(&[
        ("continuation without a start", frame(0x00, b"x"), 1002),
        ("last without a start", frame(0x80, b"x"), 1002),
        (
            "message within a message",
            [frame(0x02, b"x"), frame(0x82, b"y")].concat(),
            1002,
        ),
        (
            "start within a message",
            [frame(0x02, b"x"), frame(0x02, b"y")].concat(),
            1002,
        ),
    ]);
}

#[test]
fn closes() {
    let mut cases = vec![
        ("one byte", frame(0x88, b"x"), 1002),
        ("no code", frame(0x88, b""), 1005),
    ];
    for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535_u16] {
        cases.push((
            "code that is not for sending",
            frame(0x88, &code.to_be_bytes()),
            1002,
        ));
    }
    cases.push((
        "reason that is not UTF-8",
        frame(0x88, &[3, 0xE8, 0xFF, 0xFE]),
        1007,
    ));
    each_is_closed_with(&cases);
}

#[test]
fn lengths() {
    let fragment = frame(0x02, &vec![0; 4 << 20]);
    each_is_closed_with(&[
        ("2^63", announced(0x82, 1 << 63), 1009),
        ("2^64 - 1", announced(0x82, u64::MAX), 1009),
        ("2^63 in a fragment", announced(0x02, 1 << 63), 1009),
        (
            "2^63 after a fragment",
            [frame(0x02, b"x"), announced(0x00, 1 << 63)].concat(),
            1009,
        ),
        ("4 MiB + 1", frame(0x82, &vec![0; (4 << 20) + 1]), 1009),
        (
            "4 MiB + 1 in fragments",
            [fragment, frame(0x80, b"x")].concat(),
            1009,
        ),
    ]);
}

#[test]
fn text() {
    each_is_closed_with(&[
        ("text", frame(0x81, b"text"), 1003),
        ("empty text", frame(0x81, b""), 1003),
        (
            "text in fragments",
            [frame(0x01, b"te"), frame(0x80, b"xt")].concat(),
            1003,
        ),
        ("text that is not UTF-8", frame(0x81, &[0xFF]), 1007),
    ]);
}

/// An empty fragment costs the client six bytes; a million of them must not cost us more than time.
#[test]
fn a_million_empty_fragments() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut client = relay.connect(&issuer.token());
    let fragments = [frame(0x02, b"first "), frame(0x00, b"").repeat(1_000_000)].concat();
    client.raw(&[fragments, frame(0x80, b"last")].concat());
    assert_eq!(client.receive_exactly(10), b"first last");
    assert!(relay.peak_memory() < 64, "{} MiB", relay.peak_memory());
}

/// The mask of each frame of the client is new (RFC 6455, section 5.3).
#[test]
fn masks_are_random() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = binary()
        .arg("--stdio")
        .env(
            "NIX_RELAY_URL",
            format!("ws://{}", listener.local_addr().unwrap()),
        )
        .env("NIX_RELAY_TOKEN", "a.b.c")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = client.stdin.take().unwrap();
    let mut socket = tungstenite::accept(listener.accept().unwrap().0).unwrap();
    let mut masks = std::collections::HashSet::new();
    for _ in 0..16 {
        stdin.write_all(b"x").unwrap();
        let mut frame = [0; 7];
        socket.get_mut().read_exact(&mut frame).unwrap();
        let [first, length, mask @ .., payload] = frame;
        assert_eq!((first, length, payload ^ mask[0]), (0x82, 0x81, b'x'));
        masks.insert(mask);
    }
    assert_eq!(masks.len(), 16);
    client.kill().unwrap();
    client.wait().unwrap();
}

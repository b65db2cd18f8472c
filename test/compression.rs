//! Messages that are one zstd stream in each direction, if the client asks for it.

use crate::support::{nix::*, *};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread;
use tungstenite::{Message, accept_hdr, handshake::server};
use zstd::stream::write;

const PROTOCOL: &str = "nix-relay.zstd";
/// A block that is not the last one, of a byte that is repeated: four bytes for 128 KiB.
const REPEATED: [u8; 4] = [0x02, 0x00, 0x10, b'x'];

/// A session whose messages are compressed.
fn connect(relay: &Relay, issuer: &Issuer) -> Client {
    let offer = format!("Sec-WebSocket-Protocol: {PROTOCOL}, binary\r\n");
    open_with(relay.tcp(), &issuer.token(), &offer).unwrap()
}

fn encoder(window_log: u32) -> write::Encoder<'static, Vec<u8>> {
    let mut encoder = write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(window_log).unwrap();
    encoder
}

/// The next message of a stream: whole blocks.
fn next(encoder: &mut write::Encoder<Vec<u8>>, bytes: &[u8]) -> Vec<u8> {
    encoder.write_all(bytes).unwrap();
    encoder.flush().unwrap();
    std::mem::take(encoder.get_mut())
}

/// What a stream holds, as far as it has come.
struct Expander(write::Decoder<'static, Vec<u8>>);

impl Expander {
    fn new() -> Expander {
        Expander(write::Decoder::new(Vec::new()).unwrap())
    }

    fn next(&mut self, message: &[u8]) -> Vec<u8> {
        self.0.write_all(message).unwrap();
        self.0.flush().unwrap();
        std::mem::take(self.0.get_mut())
    }
}

/// The beginning of a stream with the smallest window.
fn header() -> Vec<u8> {
    vec![0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x38]
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut source = std::fs::File::open("/dev/urandom").unwrap();
    source.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn each_direction_is_one_stream() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut client = connect(&relay, &issuer);
    let (mut encoder, mut expander) = (encoder(20), Expander::new());
    let mut total = 0;
    for part in [
        b"x".to_vec(),
        noise(1),
        noise(100_000),
        vec![0; 1 << 20],
        noise(3 << 20),
        b"the end".to_vec(),
    ] {
        client.send(next(&mut encoder, &part));
        let mut echo = Vec::new();
        while echo.len() < part.len() {
            let message = client.receive();
            assert!(!message.is_empty() && message.len() < (64 << 10) + 1024);
            echo.extend(expander.next(&message));
        }
        assert!(echo == part, "{} bytes", part.len());
        total += part.len();
    }
    client.close();
    // What is counted is what Nix reads and writes.
    let line = relay.log.wait("session ended session=1 ");
    let counted = format!(" bytes_in={total} bytes_out={total} ");
    assert!(line.contains(&counted), "{line}");
}

/// What the client said before would make it smaller.
#[test]
fn what_came_before_makes_the_next_smaller() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut client = connect(&relay, &issuer);
    let (mut encoder, part) = (encoder(20), noise(20_000));
    let mut lengths = Vec::new();
    for _ in 0..3 {
        client.send(next(&mut encoder, &part));
        let message = client.receive();
        lengths.push(message.len());
    }
    assert!(lengths[0] > 20_000 && lengths[2] < 200, "{lengths:?}");
}

/// A stream may consist of frames, and an empty message changes nothing.
#[test]
fn a_frame_that_ends_with_its_message() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut client = connect(&relay, &issuer);
    let mut expander = Expander::new();
    for part in [noise(1), vec![0; 65_536], vec![0; 65_537], noise(200_000)] {
        client.send("");
        client.send(zstd::encode_all(&part[..], 1).unwrap());
        let mut echo = Vec::new();
        while echo.len() < part.len() {
            echo.extend(expander.next(&client.receive()));
        }
        assert!(echo == part, "{} bytes", part.len());
    }
}

#[test]
fn what_is_no_such_stream() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let before = relay.at_rest();
    let text = "never the same word, and yet another one. "
        .repeat(20)
        .into_bytes();
    let whole = next(&mut encoder(20), &text);
    let wide = next(&mut encoder(21), &text);
    let skippable = [
        &[0x50, 0x2A, 0x4D, 0x18, 0xFF, 0xFF, 0xFF, 0x7F][..],
        &[0; 64],
    ]
    .concat();
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("garbage", vec![noise(100)]),
        ("text", vec![b"not compressed".to_vec()]),
        ("garbage later", vec![whole.clone(), noise(100)]),
        ("a window of 2 MiB", vec![wide]),
        ("half a header", vec![whole[..3].to_vec()]),
        ("cut in a block", vec![whole[..whole.len() - 1].to_vec()]),
        (
            "cut in a block's header",
            vec![whole.clone(), vec![REPEATED[0]]],
        ),
        (
            "a reserved block",
            vec![[header(), vec![0x06, 0, 0]].concat()],
        ),
        ("no frame, but a skippable one", vec![skippable]),
        (
            "a dictionary",
            vec![vec![
                0x28, 0xB5, 0x2F, 0xFD, 0x01, 0x38, 7, 0x02, 0, 0x10, 0,
            ]],
        ),
    ];
    let count = cases.len();
    for (what, messages) in cases {
        let mut client = connect(&relay, &issuer);
        for message in messages {
            client.send(message);
        }
        let (_, code, reason) = client.until_close();
        assert_eq!(code, 1007, "{what}: {reason}");
        client.close();
    }
    relay.log.wait(&format!(
        "session ended session={count} reason=protocol-error"
    ));
    relay.back_to(before);
    assert!(!relay.log.text().contains("panicked"));
}

/// 4 MiB that would be 128 GiB: memory has a limit, and so has what comes after the end.
#[test]
fn what_expands_without_end() {
    let issuer = Issuer::start();
    for (script, code, some) in [
        ("exec sleep 2", 1000, 1 << 20),
        ("cat | wc -c", 1001, 1 << 30),
    ] {
        let setup = Setup::new(&issuer).set("ADMIN_LISTEN", "127.0.0.1:0");
        let setup = setup.set("SHUTDOWN_GRACE_SECS", "0");
        let mut relay = setup.daemon(script).start();
        let peak = relay.peak_memory();
        let mut client = connect(&relay, &issuer);
        client.send([header(), REPEATED.repeat((1 << 20) - 4)].concat());
        eventually("some of it is delivered", LIMIT, || {
            let metrics = exchange(relay.admin(), b"GET /metrics HTTP/1.0\r\n\r\n");
            let bytes = metrics.split("direction=\"in\"} ").nth(1).unwrap();
            bytes.lines().next().unwrap().parse::<u64>().unwrap() > some
        });
        let now = relay.peak_memory();
        assert!(now < peak + 20, "{now} MiB");
        if code == 1001 {
            relay.signal("TERM");
        }
        assert_eq!(client.until_close().1, code, "{script}");
        relay.log.wait("session ended session=1 ");
        if code == 1001 {
            assert!(relay.wait().success());
        }
    }
}

fn client(address: SocketAddr, token: &str) -> Command {
    let mut command = Command::new(native());
    command
        .arg("--stdio")
        .env_clear()
        .env("NIX_RELAY_URL", format!("ws://{address}"))
        .env("NIX_RELAY_TOKEN", token)
        .env("NIX_RELAY_COMPRESS", "zstd")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn the_client_asks_for_it() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let text = String::from_utf8_lossy(&noise(300_000)).into_owned();
    let mut client = client(relay.address, &issuer.token()).spawn().unwrap();
    let mut stdin = client.stdin.take().unwrap();
    let sent = text.clone();
    thread::spawn(move || stdin.write_all(sent.as_bytes()).unwrap());
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == text.as_bytes());
}

/// What goes over the wire, and what an old relay's answer makes of it.
#[test]
#[allow(clippy::result_large_err, reason = "tungstenite's callback")]
fn what_the_client_sends() {
    for (answer, expected) in [(PROTOCOL, true), ("binary", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = client(listener.local_addr().unwrap(), "token")
            .spawn()
            .unwrap();
        let choose = |request: &server::Request, mut response: server::Response| {
            let offer = &request.headers()["Sec-WebSocket-Protocol"];
            assert_eq!(offer, "nix-relay.zstd, binary");
            let headers = response.headers_mut();
            headers.insert("Sec-WebSocket-Protocol", answer.parse().unwrap());
            Ok(response)
        };
        let mut websocket = accept_hdr(listener.accept().unwrap().0, choose).unwrap();
        client
            .stdin
            .as_mut()
            .unwrap()
            .write_all(&[b'x'; 10_000])
            .unwrap();
        let Message::Binary(message) = websocket.read().unwrap() else {
            panic!("no data");
        };
        match expected {
            true => assert!(Expander::new().next(&message) == [b'x'; 10_000]),
            false => assert!(message[..] == [b'x'; 10_000]),
        }
        client.kill().unwrap();
        client.wait().unwrap();
    }
}

#[test]
fn another_name() {
    let address = "127.0.0.1:9".parse().unwrap();
    let output = client(address, "token")
        .env("NIX_RELAY_COMPRESS", "gzip")
        .output()
        .unwrap();
    let expected = "nix-relay: NIX_RELAY_COMPRESS must be zstd, or not set\n";
    assert_eq!(texts(&output), (String::new(), expected.into()));
}

/// A real nix notices nothing of it.
#[test]
fn a_build_and_its_result() {
    let farm = Farm::start();
    let runner = farm.runner().with(native());
    let script = "i=0; while [ $i -lt 99999 ]; do echo \"$i lines\"; i=$((i + 1)); done > $out";
    let file = runner.derivation("lines", script);
    let asks = |mut command: Command| {
        let output = command.env("NIX_RELAY_COMPRESS", "zstd").output().unwrap();
        assert!(output.status.success(), "{}", texts(&output).1);
    };
    asks(runner.build(&file));
    let path = runner.out_path(&file);
    asks(runner.nix(&["copy", "--no-check-sigs", "--from", &runner.remote(), &path]));
    let (here, there) = (runner.file(&path), farm.file(&path));
    assert_eq!(fs::read(here).unwrap(), fs::read(there).unwrap());
}

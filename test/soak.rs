//! `test/soak [MINUTES]`: mixed sessions, several at once, against the real binary, built like those of the tests, so
//! that an overflow panics. A line a minute; ends with status 1 if the relay has more of anything than it had.

#[path = "support/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use std::{env, thread};
use support::*;
use zstd::stream::write::{Decoder, Encoder};

/// At once; the relay has fewer permits, so that some wait.
const CLIENTS: u64 = 12;
const PERMITS: &str = "8";
/// Threads, descriptors and children are counted when nobody is there: then the relay has what it had before its first
/// client. Its memory is as good as equal then, if malloc gives back what it could use later, in amounts that depend on
/// which sessions met: 0.7 MiB in either direction were seen. So the least of the last third of the lines is compared with
/// the most of the first third, and even in a short run there are two of each.
const MALLOC: &str =
    "glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=65536:glibc.malloc.mmap_threshold=131072";
const ALLOWED_KIB: u64 = 1024;
const LEAST_LINES: usize = 6;

/// A daemon that is what the first line it gets says.
const DAEMON: &str = "read word rest
    case $word in
        echo) exec cat;;
        zeros) head -c \"$rest\" /dev/zero;;
        fails) head -c 10000 /dev/zero | tr '\\0' x >&2; exit 3;;
        forks) sleep 1000 & exec cat;;
        slow) cat >/dev/null; sleep 1;;
    esac";

/// One visit of a client, of a kind that `dice` decides.
fn visit(relay: &Relay, issuer: &Issuer, dice: u64) {
    let refused = |request: &str, status: &str| {
        let answer = relay.exchange(request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    };
    let authorization =
        |token: &str| upgrade_request(&format!("Authorization: Bearer {token}\r\n"));
    let session = |first: &str| {
        let mut client = relay.connect(&issuer.token());
        client.send(format!("{first}\n"));
        client
    };
    let echo = |client: &mut Client, length: usize| {
        let mut socket = client.0.get_ref().try_clone().unwrap();
        let bytes = vec![dice as u8; length];
        thread::scope(|scope| {
            scope.spawn(|| socket.write_all(&frame(0x82, &bytes)).unwrap());
            assert!(client.receive_exactly(length) == bytes, "other bytes");
        });
    };
    // The mix: of 100 visits, how many are of a kind.
    match dice % 100 {
        0..26 => {
            let mut client = session("echo");
            echo(&mut client, 1000);
            client.close();
        }
        26..30 => {
            let offer = "Sec-WebSocket-Protocol: nix-relay.zstd\r\n";
            let mut client = open_with(relay.tcp(), &issuer.token(), offer).unwrap();
            let mut encoder = Encoder::new(Vec::new(), 1).unwrap();
            let mut decoder = Decoder::new(Vec::new()).unwrap();
            encoder.write_all(b"echo\n").unwrap();
            for length in [1000, 60_000, 10] {
                encoder.write_all(&vec![dice as u8; length]).unwrap();
                encoder.flush().unwrap();
                client.send(std::mem::take(encoder.get_mut()));
                while decoder.get_ref().len() < length {
                    decoder.write_all(&client.receive()).unwrap();
                    decoder.flush().unwrap();
                }
                assert!(
                    *decoder.get_ref() == vec![dice as u8; length],
                    "other bytes"
                );
                decoder.get_mut().clear();
            }
            client.close();
        }
        30..35 => {
            let mut client = session("echo");
            echo(&mut client, 4 << 20);
            client.close();
        }
        35..40 => assert_eq!(
            session("zeros 20000000").until_close(),
            (vec![0; 20_000_000], 1000, String::new())
        ),
        // Long for the pings, of which there is one a second.
        40..43 => {
            let mut client = session("forks");
            for _ in 0..20 {
                echo(&mut client, 10_000);
                thread::sleep(Duration::from_millis(100));
            }
            client.close();
        }
        43..50 => assert_eq!(session("fails").until_close().1, 1011),
        // Gone without a word, in the middle of a frame, of what the daemon writes, and while it takes its time.
        50..58 => session("echo").raw(&frame(0x82, &[0; 100_000])[..50_000]),
        58..63 => drop(session("zeros 20000000").receive()),
        63..66 => drop(session("slow")),
        66..70 => {
            let mut client = session("echo");
            client.raw(&frame(0x81, b"text"));
            assert_eq!(client.until_close().1, 1003);
        }
        // Stays, but neither reads nor answers pings.
        70 => {
            let client = session("zeros 100000000");
            let mut socket = client.0.get_ref();
            thread::sleep(Duration::from_secs(4));
            while socket.read(&mut [0; 65536]).is_ok_and(|length| length > 0) {}
        }
        71..78 => refused(&authorization("junk"), "401"),
        78..82 => refused(
            &authorization(&issuer.token_with(json!({"repository_owner": "x"}))),
            "403",
        ),
        82..85 => refused(&authorization(&issuer.token_with(json!({"exp": 1}))), "401"),
        85..88 => refused("GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n", "404"),
        88..91 => refused("GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n", "200"),
        91..94 => refused("junk\r\n\r\n", "400"),
        94 => refused(&"p".repeat(20 << 10), "431"),
        95 => refused("GET /relay HTTP", "408"),
        _ => relay
            .tcp()
            .write_all(authorization(&issuer.token()).as_bytes().split_at(100).0)
            .unwrap(),
    }
}

/// Adds up sessions opened, sessions ended, and panics.
fn count(log: String, sums: &mut [usize; 3]) {
    for (sum, part) in sums
        .iter_mut()
        .zip(["session opened ", "session ended ", "panicked"])
    {
        *sum += log.matches(part).count();
    }
}

fn main() {
    let minutes: f64 = env::args()
        .nth(1)
        .map_or(Ok(60.0), |text| text.parse())
        .expect("minutes, as a number");
    let start = Instant::now();
    let length = Duration::from_secs_f64(minutes * 60.0);
    let interval = Duration::from_secs(60).min(length / LEAST_LINES as u32);
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .daemon(DAEMON)
        .set("MAX_CONNECTIONS", PERMITS)
        .set("QUEUE_TIMEOUT_SECS", "30");
    let mut relay = setup
        .set("KEEPALIVE_SECS", "1")
        .set("HANDSHAKE_TIMEOUT_SECS", "1")
        .env("GLIBC_TUNABLES", MALLOC)
        .start();
    let before = relay.at_rest();
    let visits = AtomicU64::new(0);
    let mut sums = [0; 3];
    let mut memory = Vec::new();
    println!("minutes   visits sessions  RSS/KiB  threads  descriptors  children");
    while start.elapsed() < length || memory.len() < LEAST_LINES {
        let until = Instant::now() + interval;
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    while Instant::now() < until {
                        // Neighbours differ, and the order is the same in every run.
                        let dice = visits
                            .fetch_add(1, Relaxed)
                            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                            >> 33;
                        visit(&relay, &issuer, dice);
                    }
                });
            }
        });
        let at_rest = || {
            let (threads, descriptors) = relay.resources();
            let children = relay.children().len();
            let rest = threads <= before.0 && descriptors <= before.1 && children == 0;
            (rest, format!("{threads:8} {descriptors:12} {children:9}"))
        };
        let limit = Instant::now() + LIMIT;
        let (mut rest, mut counts) = at_rest();
        while !rest && Instant::now() < limit {
            thread::sleep(Duration::from_millis(10));
            (rest, counts) = at_rest();
        }
        count(relay.log.take(), &mut sums);
        let minutes = start.elapsed().as_secs_f64() / 60.0;
        // Without the pages of its own file: how many of those are there is a matter of what ran so far.
        memory.push(relay.memory("RssAnon:"));
        println!(
            "{minutes:7.1} {:8} {:8} {:8} {counts}",
            visits.load(Relaxed),
            sums[0],
            memory[memory.len() - 1]
        );
        assert!(
            rest,
            "it had {} threads and {} descriptors before its first client",
            before.0, before.1
        );
    }
    count(relay.stop(), &mut sums);
    let third = memory.len() / 3;
    let first = memory[..third].iter().max().unwrap();
    let last = memory[memory.len() - third..].iter().min().unwrap();
    assert!(
        *last <= first + ALLOWED_KIB,
        "at least {last} KiB in the last third, at most {first} KiB in the first"
    );
    assert_eq!(
        (sums[0], sums[2]),
        (sums[1], 0),
        "sessions opened and panics, sessions ended and none"
    );
    println!("nothing grows");
}

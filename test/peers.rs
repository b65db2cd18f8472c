//! Clients that vanish, stop reading or stop writing, and daemons that stop reading.

use crate::support::*;
use rustix::net::sockopt;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// A daemon that is what the first line it gets says; all but `stuck` end when their input does.
const DAEMON: &str = "read word
    case $word in
        echo) exec cat;;
        stuck) exec sleep 1000;;
        zeros) cat /dev/zero & cat >/dev/null; kill $!;;
        some) exec head -c 2000000 /dev/zero;;
        count) read go <\"$1\"; wc -c;;
    esac";

/// A relay with a keepalive of a second, so that a client is gone after three.
struct Stage {
    issuer: Issuer,
    relay: Relay,
    before: (usize, usize),
}

fn stage() -> Stage {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("LISTEN", "0.0.0.0:0")
        .set("KEEPALIVE_SECS", "1");
    let relay = setup.daemon(DAEMON).start();
    let before = relay.at_rest();
    Stage {
        issuer,
        relay,
        before,
    }
}

impl Stage {
    fn connect(&self, word: &str) -> Client {
        let mut client = self.relay.connect(&self.issuer.token());
        client.send(format!("{word}\n"));
        client
    }

    /// Until the session with this number is over for want of its client, another one is served, and
    /// no memory fills.
    fn client_goes(&self, number: u32) {
        let mut other = self.connect("echo");
        let start = Instant::now();
        let part = format!("session ended session={number} ");
        let line = loop {
            let asked = Instant::now();
            other.send("still served");
            assert_eq!(other.receive(), b"still served");
            assert!(
                asked.elapsed() < LIMIT / 6,
                "served after {:?}",
                asked.elapsed()
            );
            if let Some(line) = self
                .relay
                .log
                .text()
                .lines()
                .find(|line| line.contains(&part))
            {
                break line.to_owned();
            }
            assert!(start.elapsed() < LIMIT, "session {number} goes on");
        };
        assert!(line.contains(" reason=client-gone "), "{line}");
        let why = "no response for three keepalive intervals";
        assert!(!line.contains("keepalive") || line.contains(why), "{line}");
        other.close();
    }

    fn nothing_is_left(&self) {
        self.relay.back_to(self.before);
        assert!(
            self.relay.peak_memory() < 64,
            "{} MiB",
            self.relay.peak_memory()
        );
    }
}

#[test]
fn one_that_stops_in_the_middle() {
    let stage = stage();
    let parts: [&[u8]; 6] = [
        b"",
        &[0x82],
        &[0x82, 0xFE, 1],
        &frame(0x82, &[0; 100])[..50],
        &frame(2, b"x"),
        &[0x89, 0x84],
    ];
    let clients: Vec<Client> = parts
        .iter()
        .map(|part| {
            let mut client = stage.connect("echo");
            client.raw(part);
            client
        })
        .collect();
    (1..=parts.len() as u32).for_each(|number| stage.client_goes(number));
    stage.nothing_is_left();
    drop(clients);
}

#[test]
fn one_that_stops_reading() {
    let stage = stage();
    let client = stage.connect("zeros");
    stage.client_goes(1);
    stage.nothing_is_left();
    drop(client);
}

/// It gives signs of life, but what we write to it makes no progress.
#[test]
fn one_that_sends_pings_and_never_reads() {
    let stage = stage();
    let client = stage.connect("echo");
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let pings = frame(0x89, &[b'x'; 125]).repeat(100);
    let writer = thread::spawn(move || while socket.write_all(&pings).is_ok() {});
    stage.client_goes(1);
    writer.join().unwrap();
    stage.nothing_is_left();
}

/// And one that goes on sending data, while the daemon has much to say.
#[test]
fn one_that_sends_and_never_reads() {
    let stage = stage();
    let client = stage.connect("zeros");
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let message = frame(0x82, &[b'x'; 100_000]);
    let writer = thread::spawn(move || while socket.write_all(&message).is_ok() {});
    stage.client_goes(1);
    writer.join().unwrap();
    stage.nothing_is_left();
}

/// Nor does it keep its place when the daemon is gone already and all is in the kernel.
#[test]
fn one_that_sends_pings_and_does_not_read_the_end() {
    let stage = stage();
    let stream = stage.relay.tcp();
    sockopt::set_socket_recv_buffer_size(&stream, 16 << 10).unwrap();
    let mut client = open(stream, &stage.issuer.token()).unwrap();
    client.send("some\n");
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let pings = frame(0x89, &[b'x'; 125]).repeat(100);
    let writer = thread::spawn(move || while socket.write_all(&pings).is_ok() {});
    // The kernel may have taken all of it, and is given the time that a slow client needs: 90 s.
    eventually("the session is over", LIMIT * 2, || {
        let log = stage.relay.log.text();
        log.contains("session ended session=1 ")
    });
    writer.join().unwrap();
    stage.nothing_is_left();
}

/// Nothing is lost, nothing piles up, nobody else has to wait.
#[test]
fn a_daemon_that_stops_reading() {
    const ALL: u64 = 1 << 30;
    let issuer = Issuer::start();
    let dir = Dir::new();
    let go = dir.path("go");
    assert!(Command::new("mkfifo").arg(&go).status().unwrap().success());
    let relay = Setup::new(&issuer)
        .daemon(DAEMON)
        .set("EXTRA_ARGS", go.to_str().unwrap())
        .start();
    let mut client = relay.connect(&issuer.token());
    client.send("count\n");
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let sent = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let message = frame(0x82, &[0; 1 << 20]);
            for _ in 0..ALL >> 20 {
                socket.write_all(&message).unwrap();
                sent.fetch_add(1 << 20, Relaxed);
            }
        });
        let mut other = relay.connect(&issuer.token());
        other.send("echo\n");
        eventually("the pipe is full", LIMIT, || sent.load(Relaxed) >= 2 << 20);
        for _ in 0..1000 {
            other.send("still served");
            assert_eq!(other.receive(), b"still served");
        }
        assert!(
            sent.load(Relaxed) < 64 << 20,
            "{} bytes went somewhere",
            sent.load(Relaxed)
        );
        std::fs::write(&go, "go\n").unwrap();
    });
    client.raw(&frame(0x88, &1000_u16.to_be_bytes()));
    relay
        .log
        .wait(&format!("bytes_in={} ", ALL + "count\n".len() as u64));
    assert!(relay.peak_memory() < 64, "{} MiB", relay.peak_memory());
}

/// A network of two: this machine, and a namespace that can be cut off.
pub struct Network {
    pub name: String,
    pub address: String,
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}: {status}");
}

/// `ip -n`, which takes more than the network of a namespace and cannot do so in a chroot.
fn ip_within(name: &str, arguments: &str) {
    let namespace = format!("--net=/run/netns/{name}");
    let status = Command::new("nsenter")
        .args([&namespace, "ip"])
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}: {status}");
}

impl Network {
    pub fn new() -> Network {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = std::process::id();
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("nr{id}-{number}");
        let net = format!("10.213.{}", id % 256);
        let address = 4 * number + 1;
        let theirs = 4 * number + 2;
        ip(&format!("netns add {name}"));
        ip(&format!(
            "link add {name} type veth peer name {name}p netns {name}"
        ));
        ip(&format!("addr add {net}.{address}/30 dev {name}"));
        ip(&format!("link set {name} up"));
        ip_within(&name, &format!("addr add {net}.{theirs}/30 dev {name}p"));
        ip_within(&name, &format!("link set {name}p up"));
        Network {
            name,
            address: format!("{net}.{address}"),
        }
    }

    /// `ip` for the client's end.
    pub fn within(&self, arguments: &str) {
        ip_within(&self.name, arguments);
    }

    /// From within the namespace: a socket belongs to that in which it was made.
    fn connect(&self, stage: &Stage) -> Client {
        let port = stage.relay.address.port();
        let stream = thread::scope(|scope| {
            let from_within = || {
                let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), network).unwrap();
                TcpStream::connect((self.address.as_str(), port)).unwrap()
            };
            scope.spawn(from_within).join().unwrap()
        });
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        open(stream, &stage.issuer.token()).unwrap()
    }

    /// Neither side is told.
    pub fn cut(&self) {
        ip_within(&self.name, &format!("link set {}p down", self.name));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .status();
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// A client that answers pings until its network goes away.
fn vanishes(word: &str, then: impl FnOnce(&mut Client)) {
    let stage = stage();
    let network = Network::new();
    let mut client = network.connect(&stage);
    for _ in 0..4 {
        assert!(matches!(client.0.read().unwrap(), Message::Ping(_)));
    }
    client.send(format!("{word}\n"));
    then(&mut client);
    network.cut();
    let cut = Instant::now();
    stage
        .relay
        .log
        .wait("session ended session=1 reason=client-gone ");
    // Ten more for what does not end by itself.
    let limit = if word == "stuck" { 14 } else { 4 };
    assert!(
        cut.elapsed() < Duration::from_secs(limit + 2),
        "after {:?}",
        cut.elapsed()
    );
    stage.nothing_is_left();
}

#[test]
fn one_that_vanishes() {
    vanishes("echo", |client| {
        client.send("x");
        assert_eq!(client.receive(), b"x");
    });
}

#[test]
fn one_that_vanishes_while_the_daemon_writes() {
    vanishes("zeros", |client| {
        for _ in 0..100 {
            client.receive();
        }
    });
}

/// What it has sent already keeps the relay from reading more, and so from missing it.
#[test]
fn one_that_vanishes_while_the_daemon_does_not_read() {
    vanishes("stuck", |client| {
        client
            .0
            .get_ref()
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let message = frame(0x82, &[0; 1 << 20]);
        while client.0.get_mut().write_all(&message).is_ok() {}
    });
}

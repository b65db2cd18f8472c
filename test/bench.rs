//! What the relay costs, next to what else could carry the bytes: tables in Markdown. `bench [--quick] [--runs N]`.

#[path = "support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use the rest")]
mod support;

use rustix::net::RecvFlags;
use rustix::pipe::SpliceFlags;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use std::{array, env, thread};
use support::{nix::*, *};

const COLUMNS: [&str; 4] = ["no relay", "nix-relay", "OpenSSH", "websocat"];

fn main() {
    let arguments: Vec<String> = env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["sink", bytes] => sink(bytes.parse().unwrap()),
        ["source", bytes] => source(bytes.parse().unwrap()),
        [] => tables(5, false),
        ["--quick"] => tables(1, true),
        ["--runs", runs] => tables(runs.parse().unwrap(), false),
        _ => panic!("usage: bench [--quick | --runs N]"),
    }
}

fn tables(runs: usize, quick: bool) {
    let issuer = Issuer::start();
    println!("Medians of {runs} alternating runs, and in brackets the least and the most.\n");
    with_nix(&issuer, runs, quick);
    raw(&issuer, runs, if quick { 1 << 28 } else { 1 << 30 });
    growth(&issuer, if quick { 1 << 29 } else { 1 << 30 });
}

/// The middle one, and the span.
fn spread(values: &[f64], digits: usize) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high, middle) = (
        sorted[0],
        sorted[sorted.len() - 1],
        sorted[sorted.len() / 2],
    );
    format!("{middle:.digits$} [{low:.digits$}–{high:.digits$}]")
}

/// Takes that many bytes without looking at them, and answers with one.
fn sink(bytes: usize) {
    let (stdin, null) = (
        io::stdin(),
        File::options().write(true).open("/dev/null").unwrap(),
    );
    let mut left = bytes;
    while left > 0 {
        let taken =
            rustix::pipe::splice(&stdin, None, &null, None, left, SpliceFlags::empty()).unwrap();
        assert!(taken > 0, "{left} bytes are missing");
        left -= taken;
    }
    io::stdout().write_all(b".").unwrap();
}

fn source(bytes: usize) {
    let (chunk, stdout) = ([b'x'; 64 << 10], io::stdout());
    let mut left = bytes;
    while left > 0 {
        left -= rustix::io::write(&stdout, &chunk[..left.min(chunk.len())]).unwrap();
    }
}

/// A process that goes when this does.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `websocat`, with a shell command for each connection.
fn websocat(command: &str) -> (Server, SocketAddr) {
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let home = Dir::new();
    let mut server = job("websocat", &home);
    server.args([
        "-q",
        "--binary",
        "--exit-on-eof",
        &format!("ws-listen:{address}"),
        &format!("sh-c:{command}"),
    ]);
    let server = Server(
        server
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    eventually("websocat listens", LIMIT, || {
        TcpStream::connect(address).is_ok()
    });
    (server, address)
}

/// OpenSSH's server with a key of its own, for one user with another: the options for its client.
fn sshd(dir: &Dir) -> String {
    for key in ["host", "user"] {
        let mut make = Command::new("ssh-keygen");
        make.args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(dir.path(key));
        assert!(make.status().unwrap().success());
    }
    let _ = fs::create_dir("/run/sshd");
    let path = |name: &str| dir.path(name).display().to_string();
    let config = format!(
        "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nLogLevel ERROR\n",
        path("host"),
        path("user.pub")
    );
    let config = dir.write("sshd_config", &config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let socket: OwnedFd = socket.unwrap().into();
            let mut server = Command::new("/usr/sbin/sshd");
            server
                .arg("-i")
                .arg("-f")
                .arg(&config)
                .stdin(socket.try_clone().unwrap())
                .stdout(socket);
            let mut child = server.stderr(Stdio::null()).spawn().unwrap();
            thread::spawn(move || child.wait());
        }
    });
    format!(
        "-p {port} -i {} -o UserKnownHostsFile={} -o StrictHostKeyChecking=no",
        path("user"),
        path("known")
    )
}

/// Names as own-store gives them: stores with different ones cannot exchange paths.
const STORE: (&str, &str) = ("NIX_STORE_DIR", "/var/lib/nix-relay-test/store");

/// A nix that has its store in a directory, as root: so that the daemon can have another for its /nix.
struct Nix {
    home: Dir,
    variables: Vec<(&'static str, String)>,
    stores: [String; 4],
}

impl Nix {
    fn run(&self, column: usize, arguments: &[&str]) -> f64 {
        let mut command = job("nix", &self.home);
        command.args(arguments).envs(self.variables.iter().cloned());
        if let Some(url) = self.stores[column].split_once(' ') {
            command.env("NIX_RELAY_URL", url.1);
        }
        let start = Instant::now();
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}: nix {arguments:?}:\n{}",
            COLUMNS[column],
            texts(&output).1
        );
        start.elapsed().as_secs_f64()
    }
}

fn with_nix(issuer: &Issuer, runs: usize, quick: bool) {
    let (home, remote) = (Dir::new(), Dir::new());
    let own_store = project("test/support/own-store").display().to_string();
    let script = format!(
        "export HOME={0} NIX_CONFIG='{CONFIG}'\nexec {own_store} {0}/nix nix-daemon \"$@\"",
        remote.path("").display()
    );
    let daemon = remote.script("daemon", &script).display().to_string();
    let relay = Setup::new(issuer).set("DAEMON_PATH", &daemon).start();
    let (_server, address) = websocat(&format!("exec {daemon} --stdio"));
    let client = project("client.sh").display().to_string();
    let mut variables = vec![
        (STORE.0, STORE.1.into()),
        ("NIX_CONFIG", CONFIG.into()),
        ("NIX_SSHOPTS", sshd(&home)),
    ];
    variables.extend(token_variables(issuer));
    let stores = [
        format!("ssh-ng://localhost?remote-program={daemon}"),
        format!(
            "ssh-ng://localhost?remote-program={client} ws://{}",
            relay.address
        ),
        format!("ssh-ng://127.0.0.1?remote-program={daemon}"),
        format!("ssh-ng://localhost?remote-program={client} ws://{address}"),
    ];
    let nix = Nix {
        home,
        variables,
        stores,
    };
    let source = nix.home.path("source").display().to_string();
    let add = |name: &str, count: usize, bytes: u64| -> Vec<String> {
        let mut random = File::open("/dev/urandom").unwrap();
        let mut command = job("nix-store", &nix.home);
        command
            .env("NIX_CONFIG", CONFIG)
            .env(STORE.0, STORE.1)
            .args(["--store", &source, "--add"]);
        for number in 0..count {
            let mut content = Vec::new();
            Read::by_ref(&mut random)
                .take(bytes)
                .read_to_end(&mut content)
                .unwrap();
            let file = nix.home.path(&format!("{name}{number}"));
            fs::write(&file, content).unwrap();
            command.arg(file);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", texts(&output).1);
        texts(&output).0.lines().map(String::from).collect()
    };
    let large = add("large", 8, if quick { 4 << 20 } else { 32 << 20 });
    let small = add("small", if quick { 200 } else { 2000 }, 4096);
    let reset = || {
        let nix_dir = remote.path("nix");
        let _ = Command::new("chmod")
            .args(["-R", "u+w"])
            .arg(&nix_dir)
            .stderr(Stdio::null())
            .status();
        let _ = fs::remove_dir_all(&nix_dir);
        let mut init = job(&own_store, &remote);
        init.arg(&nix_dir)
            .args(["nix-store", "--init"])
            .env("NIX_CONFIG", CONFIG);
        assert!(init.status().unwrap().success());
    };
    let store = |column: usize| nix.stores[column].split(' ').next().unwrap();
    let copy = |column: usize, from: &str, to: &str, paths: &[String]| {
        let mut arguments = vec!["copy", "--no-check-sigs", "--from", from, "--to", to];
        arguments.extend(paths.iter().map(String::as_str));
        nix.run(column, &arguments)
    };
    let mut times: [[Vec<f64>; 5]; 4] = Default::default();
    for run in 0..runs {
        for (column, times) in times.iter_mut().enumerate() {
            reset();
            times[0].push(copy(column, &source, store(column), &large));
            let here = Dir::new();
            times[1].push(copy(
                column,
                store(column),
                here.path("").to_str().unwrap(),
                &large,
            ));
            times[2].push(copy(column, &source, store(column), &small));
            times[3].push(nix.run(column, &["store", "ping", "--store", store(column)]));
            let file = nix.home.write(
                "drv.nix",
                &derivation(&format!("x{run}{column}"), "echo x > $out"),
            );
            let file = file.to_str().unwrap();
            let build = [
                "build",
                "--eval-store",
                &source,
                "--store",
                store(column),
                "--no-link",
                "-f",
                file,
            ];
            times[4].push(nix.run(column, &build));
        }
        eprintln!("run {} of {runs} with nix is done", run + 1);
    }
    let (mib, many) = (if quick { 32 } else { 256 }, small.len());
    let names = [
        format!("`nix copy --to`, {mib} MiB in 8 paths"),
        "`nix copy --from`, the same".into(),
        format!("`nix copy --to`, {many} paths of 4 KiB"),
        "`nix store ping`".into(),
        "build of a trivial derivation".into(),
    ];
    println!(
        "| | {} (s) | {} |\n| --- | --- | --- | --- | --- |",
        COLUMNS[0],
        COLUMNS[1..].join(" | ")
    );
    let [floor, others @ ..] = &times;
    for (row, name) in names.iter().enumerate() {
        let ratios = others.each_ref().map(|other| {
            let ratios: Vec<f64> = other[row]
                .iter()
                .zip(&floor[row])
                .map(|(time, floor)| time / floor)
                .collect();
            spread(&ratios, 1)
        });
        println!(
            "| {name} | {} | {} |",
            spread(&floor[row], 2),
            ratios.join(" | ")
        );
    }
}

/// The seconds of CPU that a process has used.
fn cpu(id: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let fields: Vec<f64> = stat
        .rsplit(") ")
        .next()
        .unwrap()
        .split(' ')
        .map(|f| f.parse().unwrap_or(0.0))
        .collect();
    (fields[11] + fields[12]) / 100.0
}

/// The KiB of memory that it has now.
fn memory(id: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What is measured without nix: the relay, or websocat.
struct Subject {
    address: SocketAddr,
    id: u32,
    token: String,
}

impl Subject {
    fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        open(stream, &self.token).unwrap()
    }

    /// From as many clients at once, until the daemons have it all.
    fn up(&self, clients: &mut [Client], bytes_each: usize) -> (f64, f64) {
        // Frames of 64 KiB, made before the clock runs.
        let header = [
            &[0x82, 0xFF][..],
            &(64_u64 << 10).to_be_bytes(),
            &[1, 2, 3, 4],
        ]
        .concat();
        let burst = [header, vec![b'x'; 64 << 10]].concat().repeat(16);
        let (start, before) = (Instant::now(), cpu(self.id));
        thread::scope(|scope| {
            for client in clients {
                scope.spawn(|| {
                    for _ in 0..bytes_each >> 20 {
                        client.0.get_mut().write_all(&burst).unwrap();
                    }
                    assert_eq!(client.receive(), b".");
                });
            }
        });
        (start.elapsed().as_secs_f64(), cpu(self.id) - before)
    }

    /// Until the end of the connection.
    fn down(&self) -> (f64, f64) {
        let (start, before) = (Instant::now(), cpu(self.id));
        let client = self.connect();
        let mut unread = vec![0; 1 << 20];
        // With that flag, TCP drops what it has instead of copying it.
        while rustix::net::recv(client.0.get_ref(), &mut unread[..], RecvFlags::TRUNC)
            .is_ok_and(|(_, n)| n > 0)
        {}
        (start.elapsed().as_secs_f64(), cpu(self.id) - before)
    }

    /// Microseconds there and back, in order.
    fn ping_pong(&self) -> Vec<f64> {
        let (mut client, ping) = (self.connect(), frame(0x82, &[b'x'; 64]));
        let mut times: Vec<f64> = (0..10_000)
            .map(|_| {
                let start = Instant::now();
                client.raw(&ping);
                client.receive_exactly(64);
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

fn raw(issuer: &Issuer, runs: usize, bytes: usize) {
    let own = env::current_exe().unwrap().display().to_string();
    let daemons = [
        format!("exec {own} sink {bytes}"),
        format!("exec {own} source {bytes}"),
        "exec cat".into(),
        "exec true".into(),
    ];
    let relays = daemons
        .each_ref()
        .map(|daemon| Setup::new(issuer).daemon(daemon).start());
    let servers = daemons.each_ref().map(|daemon| websocat(daemon));
    let all: [[Subject; 4]; 2] = [
        array::from_fn(|n| Subject {
            address: relays[n].address,
            id: relays[n].child.id(),
            token: issuer.token(),
        }),
        array::from_fn(|n| Subject {
            address: servers[n].1,
            id: servers[n].0.0.id(),
            token: issuer.token(),
        }),
    ];
    const IDLE: usize = 32;
    const ROWS: [&str; 10] = [
        "up, GiB/s",
        "up, CPU s/GiB",
        "down, GiB/s",
        "down, CPU s/GiB",
        "64 bytes there and back, p50, µs",
        "the same, p99, µs",
        "new sessions per second",
        "memory at start, MiB",
        "for each idle session, KiB",
        "for each that has echoed a message of 1 MiB, KiB",
    ];
    let mut rows: [[Vec<f64>; 2]; 10] = Default::default();
    let gib = bytes as f64 / (1 << 30) as f64;
    for run in 0..runs {
        for (column, [sink, source, cat, end]) in all.iter().enumerate() {
            let mut note = |row: usize, value: f64| rows[row][column].push(value);
            if run == 0 {
                note(7, memory(cat.id) / 1024.0);
                let before = memory(cat.id);
                let mut clients: Vec<Client> = (0..IDLE).map(|_| cat.connect()).collect();
                note(8, (memory(cat.id) - before) / IDLE as f64);
                for client in &mut clients {
                    client.send(vec![b'x'; 1 << 20]);
                    client.receive_exactly(1 << 20);
                }
                note(9, (memory(cat.id) - before) / IDLE as f64);
            }
            let (secs, cpu) = sink.up(&mut [sink.connect()], bytes);
            note(0, gib / secs);
            note(1, cpu / gib);
            let (secs, cpu) = source.down();
            note(2, gib / secs);
            note(3, cpu / gib);
            let times = cat.ping_pong();
            note(4, times[times.len() / 2]);
            note(5, times[times.len() * 99 / 100]);
            let start = Instant::now();
            for _ in 0..200 {
                let _ = io::copy(end.connect().0.get_mut(), &mut io::sink());
            }
            note(6, 200.0 / start.elapsed().as_secs_f64());
        }
        eprintln!("run {} of {runs} without nix is done", run + 1);
    }
    println!(
        "\n| | {} | {} |\n| --- | --- | --- |",
        COLUMNS[1], COLUMNS[3]
    );
    for (number, (name, row)) in ROWS.iter().zip(&rows).enumerate() {
        let digits = if number < 4 {
            2
        } else {
            usize::from(number == 7)
        };
        println!(
            "| {name} | {} | {} |",
            spread(&row[0], digits),
            spread(&row[1], digits)
        );
    }
}

fn growth(issuer: &Issuer, bytes: usize) {
    let own = env::current_exe().unwrap().display().to_string();
    println!(
        "\n| sessions at once, each copying up | GiB/s in all | relay's CPU s/GiB | relay's most memory, MiB |"
    );
    println!("| --- | --- | --- | --- |");
    for sessions in [1, 8, 32, 128, 512] {
        let each = bytes / sessions;
        let setup = Setup::new(issuer)
            .daemon(&format!("exec {own} sink {each}"))
            .set("MAX_CONNECTIONS", "600");
        let relay = setup.under("ulimit -n 65536").start();
        let subject = Subject {
            address: relay.address,
            id: relay.child.id(),
            token: issuer.token(),
        };
        let mut clients: Vec<Client> = (0..sessions).map(|_| subject.connect()).collect();
        let ((secs, cpu), gib) = (
            subject.up(&mut clients, each),
            bytes as f64 / (1 << 30) as f64,
        );
        println!(
            "| {sessions} | {:.2} | {:.2} | {} |",
            gib / secs,
            cpu / gib,
            relay.peak_memory()
        );
    }
}

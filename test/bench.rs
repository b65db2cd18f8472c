//! What the relay costs, next to what else could carry the bytes: tables in Markdown.

#[path = "support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use the rest")]
mod support;

use rustix::net::RecvFlags;
use rustix::pipe::SpliceFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::any::Any;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use std::{env, thread};
use support::{issuer::now, nix::*, *};

const USAGE: &str = "bench [--quick | --runs N] [--against NIX-RELAY] [--load NAME] \
    [raw | steps | growth | nix | links]…";

/// What to measure, and how often.
struct Options {
    runs: usize,
    quick: bool,
    /// Another binary of nix-relay, as a further column.
    against: Option<String>,
    /// Of the raw table, only the rows of this load.
    load: Option<String>,
    tables: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Options {
        let mut options = Options {
            runs: 5,
            quick: false,
            against: None,
            load: None,
            tables: Vec::new(),
        };
        while let Some(argument) = arguments.next() {
            match &*argument {
                "--quick" => (options.runs, options.quick) = (1, true),
                "--runs" => options.runs = arguments.next().expect(USAGE).parse().expect(USAGE),
                "--against" => options.against = Some(arguments.next().expect(USAGE)),
                "--load" => options.load = Some(arguments.next().expect(USAGE)),
                "raw" | "steps" | "growth" | "nix" | "links" => options.tables.push(argument),
                _ => panic!("{USAGE}"),
            }
        }
        options
    }

    fn wants(&self, table: &str) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|name| name == table)
    }
}

fn main() {
    let arguments = env::args().skip(1).filter(|a| a != "--bench");
    let arguments: Vec<String> = arguments.collect();
    if arguments == ["daemon"] {
        return daemon();
    }

    let options = Options::parse(arguments.into_iter());
    let issuer = Issuer::start();
    println!(
        "Medians of {} alternating runs, and in brackets the least and the most.",
        options.runs
    );
    if options.wants("nix") {
        with_nix(&issuer, &options);
    }
    if options.wants("raw") {
        raw(&issuer, &options);
    }
    if options.wants("steps") {
        steps(&issuer, &options);
    }
    if options.wants("growth") {
        growth(&issuer, &options);
    }
    if options.wants("links") {
        links(&options);
    }
}

/// Rows by name, each with a value of every column for every run.
struct Table {
    columns: Vec<String>,
    rows: Vec<Row>,
}

struct Row {
    name: String,
    /// Behind the point.
    digits: usize,
    values: Vec<Vec<f64>>,
}

impl Table {
    fn new(columns: Vec<String>) -> Table {
        let rows = Vec::new();
        Table { columns, rows }
    }

    fn note(&mut self, name: &str, digits: usize, column: usize, value: f64) {
        let found = self.rows.iter().position(|row| row.name == name);
        let number = found.unwrap_or_else(|| {
            let values = vec![Vec::new(); self.columns.len()];
            let name = name.into();
            self.rows.push(Row {
                name,
                digits,
                values,
            });
            self.rows.len() - 1
        });
        self.rows[number].values[column].push(value);
    }

    /// All columns as they are, then how many times as much as each of the others the first is.
    fn print(&self) {
        let others = self.columns[1..].iter().map(|name| format!("÷ {name}"));
        print_row(
            ["".into()]
                .into_iter()
                .chain(self.columns.clone())
                .chain(others),
        );
        print_row(vec!["---".into(); 2 * self.columns.len()]);
        for row in &self.rows {
            let values = row.values.iter().map(|values| spread(values, row.digits));
            let first = &row.values[0];
            let others = row.values[1..].iter();
            let ratios = others.map(|other| spread(&ratios(first, other), 2));
            print_row([row.name.clone()].into_iter().chain(values).chain(ratios));
        }
    }

    /// The first column as it is, and how many times as much the others are.
    fn print_relative(&self) {
        let mut columns = self.columns.clone();
        columns[0] += " (s)";
        print_row(["".into()].into_iter().chain(columns));
        print_row(vec!["---".into(); self.columns.len() + 1]);
        for row in &self.rows {
            let first = &row.values[0];
            let others = row.values[1..].iter();
            let others = others.map(|other| spread(&ratios(other, first), 2));
            let texts = [row.name.clone(), spread(first, row.digits)];
            print_row(texts.into_iter().chain(others));
        }
    }
}

fn print_row(texts: impl IntoIterator<Item = String>) {
    let texts: Vec<String> = texts.into_iter().collect();
    println!("| {} |", texts.join(" | "));
}

/// Run by run.
fn ratios(values: &[f64], others: &[f64]) -> Vec<f64> {
    let pairs = values.iter().zip(others);
    pairs.map(|(value, other)| value / other).collect()
}

/// The median, and the span.
fn spread(values: &[f64], digits: usize) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some((low, high)) = sorted.first().zip(sorted.last()) else {
        return "–".into();
    };
    let median = sorted[sorted.len() / 2];
    if sorted.len() == 1 {
        return format!("{median:.digits$}");
    }
    format!("{median:.digits$} [{low:.digits$}–{high:.digits$}]")
}

/// Each column in turn, and another one first in each run.
fn turns(run: usize, columns: usize) -> impl Iterator<Item = usize> {
    (0..columns).map(move |turn| (run + turn) % columns)
}

/// What a daemon of the benchmark is told to do first, with a number of bytes behind it.
const SINK: u8 = b'i';
const SPLICING_SINK: u8 = b's';
const SOURCE: u8 = b'o';
const ECHO: u8 = b'e';
/// As nix-daemon reads, and writes. When it passes input on to the system's, it splices.
const DAEMON_BYTES: usize = 32 << 10;

fn order(task: u8, bytes: usize) -> Vec<u8> {
    [&[task][..], &bytes.to_be_bytes()].concat()
}

fn daemon() {
    let mut order = [0; 9];
    // A pipe is written to whole up to 4 KiB, and what comes behind is not for us.
    if rustix::io::read(io::stdin(), &mut order).is_ok_and(|length| length < order.len()) {
        return;
    }
    let bytes = usize::from_be_bytes(order[1..].try_into().unwrap());
    match order[0] {
        SINK => sink(bytes, |left| {
            let mut chunk = [0; DAEMON_BYTES];
            rustix::io::read(io::stdin(), &mut chunk[..left.min(DAEMON_BYTES)])
        }),
        SPLICING_SINK => {
            let null = File::options().write(true).open("/dev/null").unwrap();
            let all = SpliceFlags::empty();
            sink(bytes, |left| {
                rustix::pipe::splice(io::stdin(), None, &null, None, left, all)
            })
        }
        SOURCE => source(bytes),
        _ => panic!("{}", Command::new("cat").exec()),
    }
}

/// Takes that many bytes without looking at them, and answers with one.
fn sink(bytes: usize, take: impl Fn(usize) -> rustix::io::Result<usize>) {
    let mut left = bytes;
    while left > 0 {
        let taken = take(left).unwrap();
        assert!(taken > 0, "{left} bytes are missing");
        left -= taken;
    }
    io::stdout().write_all(b".").unwrap();
}

fn source(bytes: usize) {
    let chunk = [b'x'; DAEMON_BYTES];
    let mut left = bytes;
    while left > 0 {
        left -= rustix::io::write(io::stdout(), &chunk[..left.min(chunk.len())]).unwrap();
    }
}

/// A process that goes when this does, and with it those that it has started.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        signal("TERM", self.0.id());
        let _ = self.0.wait();
    }
}

/// A server under load, and what gets in.
struct Subject {
    address: SocketAddr,
    id: u32,
    token: String,
    /// Dropped, it is stopped.
    _process: Box<dyn Any>,
}

/// Starts a server that runs this shell script for each connection.
type Start<'a> = Box<dyn Fn(&str) -> Subject + 'a>;

/// The columns of the tables without nix. The relay has pipes for so many sessions at once.
fn subjects<'a>(
    issuer: &'a Issuer,
    options: &'a Options,
    sessions: &'a str,
) -> Vec<(String, Start<'a>)> {
    let relay = |binary: fn(&Options) -> Command| -> Start<'a> {
        Box::new(move |script| {
            let setup = Setup::of(binary(options), issuer).set("MAX_CONNECTIONS", sessions);
            let relay = setup.daemon(script).under("ulimit -n hard").start();
            Subject {
                address: relay.address,
                id: relay.child.id(),
                token: issuer.token_with(json!({"exp": now() + 3600})),
                _process: Box::new(relay),
            }
        })
    };
    let mut all = vec![
        ("nix-relay".to_owned(), relay(|_| binary())),
        ("tokio".to_owned(), Box::new(peer) as Start),
        ("websocat".to_owned(), Box::new(websocat)),
    ];
    if options.against.is_some() {
        let other = relay(|options| relay_at(options.against.as_ref().unwrap()));
        all.insert(1, ("the other".to_owned(), other));
    }
    all
}

/// The relay of test/peer.
fn peer(script: &str) -> Subject {
    let program = project("target/release/peer");
    let mut command = Command::new("bash");
    command.args(["-c", "ulimit -n hard; exec \"$@\"", "-"]);
    command.arg(program).args(["sh", "-c", script]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    Subject {
        address: line.trim().parse().unwrap(),
        id: child.id(),
        token: String::new(),
        _process: Box::new(Server(child)),
    }
}

fn websocat(script: &str) -> Subject {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let home = Dir::new();
    let mut command = job("bash", &home);
    command.args(["-c", "ulimit -n hard; exec \"$@\"", "-", "websocat"]);
    command.args(["-q", "--binary", "--exit-on-eof"]);
    command.args([format!("ws-listen:{address}"), format!("sh-c:{script}")]);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let id = child.id();
    eventually("websocat listens", LIMIT, || {
        TcpStream::connect(address).is_ok()
    });
    Subject {
        address,
        id,
        token: String::new(),
        _process: Box::new(Server(child)),
    }
}

/// Seconds, and seconds of the server's CPU.
struct Cost {
    secs: f64,
    cpu: f64,
}

impl Subject {
    /// What /proc says of it.
    fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.id)).unwrap()
    }

    /// The seconds of CPU that it has used.
    fn cpu(&self) -> f64 {
        let stat = self.proc("stat");
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks = |number: usize| fields[number].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    }

    /// The KiB of memory that it has now, or had at most.
    fn memory(&self, field: &str) -> f64 {
        let status = self.proc("status");
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        open(stream, &self.token).unwrap()
    }

    fn cost(&self, run: impl FnOnce()) -> Cost {
        let start = Instant::now();
        let before = self.cpu();
        run();
        Cost {
            secs: start.elapsed().as_secs_f64(),
            cpu: self.cpu() - before,
        }
    }

    /// Does the same on so many connections at once, which are there before the clock runs.
    fn load(&self, connections: usize, run: impl Fn(&mut Client) + Sync) -> Cost {
        let mut clients: Vec<Client> = (0..connections).map(|_| self.connect()).collect();
        self.cost(|| {
            thread::scope(|scope| {
                for client in &mut clients {
                    scope.spawn(|| run(client));
                }
            });
        })
    }

    /// Until the daemons have it all.
    fn up(&self, connections: usize, bytes: usize) -> Cost {
        self.to(SINK, connections, bytes)
    }

    fn up_spliced(&self, connections: usize, bytes: usize) -> Cost {
        self.to(SPLICING_SINK, connections, bytes)
    }

    fn to(&self, sink: u8, connections: usize, bytes: usize) -> Cost {
        let burst = burst();
        let each = bytes / connections;
        self.load(connections, |client| {
            client.send(order(sink, each));
            for _ in 0..each >> 20 {
                client.raw(&burst);
            }
            assert_eq!(client.receive(), b".");
        })
    }

    /// Until the clients have it all.
    fn down(&self, connections: usize, bytes: usize) -> Cost {
        let each = bytes / connections;
        self.load(connections, |client| {
            client.send(order(SOURCE, each));
            discard(client.0.get_ref(), each);
        })
    }

    /// Both ways at once, through cat.
    fn echo(&self, connections: usize, bytes: usize) -> Cost {
        let burst = burst();
        let each = bytes / connections;
        self.load(connections, |client| {
            client.send(order(ECHO, 0));
            let socket = client.0.get_ref();
            thread::scope(|scope| {
                scope.spawn(|| discard(socket, each));
                for _ in 0..each >> 20 {
                    let mut socket = socket;
                    socket.write_all(&burst).unwrap();
                }
            });
        })
    }

    /// Microseconds for 64 bytes there and back, in order.
    fn ping_pong(&self) -> Vec<f64> {
        let mut client = self.connect();
        let ping = frame(0x82, &[b'x'; 64]);
        client.send(order(ECHO, 0));
        let once = |_| {
            let start = Instant::now();
            client.raw(&ping);
            client.receive_exactly(64);
            start.elapsed().as_secs_f64() * 1e6
        };
        let mut times: Vec<f64> = (0..10_000).map(once).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

/// A MiB in frames of 64 KiB, masked as a client has to.
fn burst() -> Vec<u8> {
    let length = 64_usize << 10;
    let mut frame = vec![0x82, 0xFF];
    frame.extend(length.to_be_bytes());
    frame.extend([1, 2, 3, 4]);
    frame.resize(frame.len() + length, b'x');
    frame.repeat(16)
}

/// Takes so many bytes from a connection, the headers of frames included. With that flag, TCP drops what it has instead
/// of copying it.
fn discard(socket: &TcpStream, bytes: usize) {
    let mut unread = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let (_, length) = rustix::net::recv(socket, &mut unread[..], RecvFlags::TRUNC).unwrap();
        assert!(length > 0, "{left} bytes are missing");
        left = left.saturating_sub(length);
    }
}

/// The script that runs what `daemon` is.
fn bench_daemon() -> String {
    format!("exec {} daemon", env::current_exe().unwrap().display())
}

fn raw(issuer: &Issuer, options: &Options) {
    let bytes: usize = if options.quick { 1 << 28 } else { 1 << 30 };
    let gib = bytes as f64 / (1 << 30) as f64;
    let starts = subjects(issuer, options, "32");
    let mut table = Table::new(starts.iter().map(|(name, _)| name.clone()).collect());
    type Load = fn(&Subject, usize, usize) -> Cost;
    let loads: [(&str, Load); 4] = [
        ("up", Subject::up),
        ("up, spliced", Subject::up_spliced),
        ("down", Subject::down),
        ("both ways", Subject::echo),
    ];
    for run in 0..options.runs {
        // Where the kernel puts a process can make it some percent slower for as long as it lives.
        let columns: Vec<[Subject; 2]> = starts
            .iter()
            .map(|(_, start)| [start(&bench_daemon()), start("exit 0")])
            .collect();

        for (column, [subject, _]) in columns.iter().enumerate() {
            note_memory(&mut table, column, subject);
        }
        for (name, load) in loads {
            if options.load.as_ref().is_some_and(|wanted| wanted != name) {
                continue;
            }
            for connections in [1, 16, 32] {
                for column in turns(run, columns.len()) {
                    let cost = load(&columns[column][0], connections, bytes);
                    let name = format!("{name}, {connections} at once");
                    table.note(&format!("{name}, GiB/s"), 2, column, gib / cost.secs);
                    table.note(&format!("{name}, CPU s/GiB"), 2, column, cost.cpu / gib);
                }
            }
        }
        eprintln!("run {} of {} without nix is done", run + 1, options.runs);
        if options.load.is_some() {
            continue;
        }
        for column in turns(run, columns.len()) {
            let times = columns[column][0].ping_pong();
            let median = times[times.len() / 2];
            let late = times[times.len() * 99 / 100];
            table.note("64 bytes there and back, p50, µs", 0, column, median);
            table.note("the same, p99, µs", 0, column, late);
        }
        for column in turns(run, columns.len()) {
            note_sessions(&mut table, column, &columns[column][1]);
        }
    }
    println!();
    table.print();
}

fn note_memory(table: &mut Table, column: usize, subject: &Subject) {
    const IDLE: usize = 31;
    let now = || subject.memory("VmRSS:");
    let start = now();
    table.note("memory at start, MiB", 1, column, start / 1024.0);

    // The first one also brings in the code that all of them run.
    let _first = subject.connect();
    let start = now();
    let mut clients: Vec<Client> = (0..IDLE).map(|_| subject.connect()).collect();
    let each = (now() - start) / IDLE as f64;
    table.note("for each idle session, KiB", 0, column, each);

    for client in &mut clients {
        client.send(order(ECHO, 0));
        client.send(vec![b'x'; 1 << 20]);
        client.receive_exactly(1 << 20);
    }
    let each = (now() - start) / IDLE as f64;
    let name = "for each that has echoed a message of 1 MiB, KiB";
    table.note(name, 0, column, each);
}

/// Sessions one after the other, whose daemon exits at once.
fn note_sessions(table: &mut Table, column: usize, subject: &Subject) {
    const SESSIONS: usize = 300;
    let cost = subject.cost(|| {
        for _ in 0..SESSIONS {
            let _ = io::copy(subject.connect().0.get_mut(), &mut io::sink());
        }
    });
    let count = SESSIONS as f64;
    table.note("new sessions per second", 0, column, count / cost.secs);
    table.note("CPU ms for each", 2, column, cost.cpu * 1e3 / count);
}

/// What a connection costs up to each of its steps.
fn steps(issuer: &Issuer, options: &Options) {
    const CONNECTIONS: usize = 500;
    let mut subjects = subjects(issuer, options, "32");
    subjects.retain(|(name, _)| name == "nix-relay" || name == "the other");
    let mut table = Table::new(subjects.iter().map(|(name, _)| name.clone()).collect());
    let subjects: Vec<Subject> = subjects
        .iter()
        .map(|(_, start)| start("exec cat"))
        .collect();

    let stranger = issuer.token_with(json!({ "repository_owner": "nobody" }));
    let stranger = upgrade_request(&format!("Authorization: Bearer {stranger}\r\n"));
    let health = "GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n";
    type Step<'a> = (&'a str, Box<dyn Fn(&Subject) + 'a>);
    let ask = |request: String, status: &'static str| {
        Box::new(move |subject: &Subject| {
            let mut stream = TcpStream::connect(subject.address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let head = read_head(&mut stream);
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        })
    };
    let all: [Step; 5] = [
        (
            "accepted, and `/healthz` answered",
            ask(health.into(), "200"),
        ),
        ("no token: refused", ask(upgrade_request(""), "401")),
        ("token verified, no rule: refused", ask(stranger, "403")),
        ("session: 101", Box::new(|subject| drop(subject.connect()))),
        (
            "session: first byte through `cat`",
            Box::new(|subject| {
                let mut client = subject.connect();
                client.send("x");
                client.receive_exactly(1);
            }),
        ),
    ];
    for run in 0..options.runs {
        for (name, step) in &all {
            for column in turns(run, subjects.len()) {
                let mut times = Vec::new();
                let cost = subjects[column].cost(|| {
                    for _ in 0..CONNECTIONS {
                        let start = Instant::now();
                        step(&subjects[column]);
                        times.push(start.elapsed().as_secs_f64() * 1e6);
                    }
                    // What they leave behind is part of the cost.
                    eventually("the daemons are gone", LIMIT, || {
                        descendants(subjects[column].id).is_empty()
                    });
                });
                times.sort_by(f64::total_cmp);
                let cpu = cost.cpu * 1e6 / CONNECTIONS as f64;
                table.note(
                    &format!("{name}, p50, µs"),
                    0,
                    column,
                    times[times.len() / 2],
                );
                table.note(&format!("{name}, CPU µs"), 0, column, cpu);
            }
        }
        eprintln!("run {} of {} by steps is done", run + 1, options.runs);
    }
    println!();
    table.print();
}

fn growth(issuer: &Issuer, options: &Options) {
    let bytes: usize = if options.quick { 1 << 29 } else { 1 << 30 };
    let gib = bytes as f64 / (1 << 30) as f64;
    let starts = subjects(issuer, options, "600");
    let mut table = Table::new(starts.iter().map(|(name, _)| name.clone()).collect());
    for run in 0..options.runs {
        for connections in [1, 8, 32, 128, 512] {
            for column in turns(run, starts.len()) {
                let subject = starts[column].1(&bench_daemon());
                let cost = subject.up(connections, bytes);
                let peak = subject.memory("VmHWM:") / 1024.0;
                let name = format!("{connections} at once, up");
                table.note(&format!("{name}, GiB/s"), 2, column, gib / cost.secs);
                table.note(&format!("{name}, CPU s/GiB"), 2, column, cost.cpu / gib);
                table.note(&format!("{name}, most memory, MiB"), 0, column, peak);
            }
        }
        eprintln!("run {} of {} of growth is done", run + 1, options.runs);
    }
    println!();
    table.print();
}

/// What carries the bytes of a Nix.
struct Route {
    name: &'static str,
    /// A store, and what names the server of its client.
    store: String,
    variables: Vec<(&'static str, String)>,
}

/// A nix that has its store in a directory, as root: so that the daemon can have another for its /nix.
struct Nix {
    home: Dir,
    variables: Vec<(&'static str, String)>,
}

/// Names as own-store gives them: stores with different ones cannot exchange paths.
const STORE: (&str, &str) = ("NIX_STORE_DIR", "/var/lib/nix-relay-test/store");

impl Nix {
    fn command(&self, program: &str) -> Command {
        let mut command = job(program, &self.home);
        command.env("NIX_CONFIG", CONFIG).env(STORE.0, STORE.1);
        command
    }

    /// The seconds that it takes.
    fn run(&self, route: &Route, arguments: &[&str]) -> f64 {
        let mut command = self.command("nix");
        command.args(arguments).envs(self.variables.iter().cloned());
        command.envs(route.variables.iter().cloned());
        // Not a pipe, which clients may hold for longer than Nix runs.
        let log = self.home.path("log");
        command.stderr(File::create(&log).unwrap());
        let start = Instant::now();
        let status = command.stdout(Stdio::null()).status().unwrap();
        let secs = start.elapsed().as_secs_f64();
        let name = route.name;
        let log = || fs::read_to_string(&log).unwrap();
        assert!(status.success(), "{name}: nix {arguments:?}:\n{}", log());
        secs
    }

    fn copy(&self, route: &Route, from: &str, to: &str, paths: &[String]) -> f64 {
        let mut arguments = vec!["copy", "--no-check-sigs", "--from", from, "--to", to];
        arguments.extend(paths.iter().map(String::as_str));
        self.run(route, &arguments)
    }

    /// Adds files of random bytes to its store: their paths.
    fn add(&self, store: &str, name: &str, count: usize, bytes: u64) -> Vec<String> {
        let random = File::open("/dev/urandom").unwrap();
        let mut command = self.command("nix-store");
        command.args(["--store", store, "--add"]);
        for number in 0..count {
            let path = self.home.path(&format!("{name}{number}"));
            let mut file = File::create(&path).unwrap();
            io::copy(&mut (&random).take(bytes), &mut file).unwrap();
            command.arg(path);
        }
        added(command)
    }
}

fn added(mut command: Command) -> Vec<String> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", texts(&output).1);
    texts(&output).0.lines().map(String::from).collect()
}

fn with_nix(issuer: &Issuer, options: &Options) {
    let home = Dir::new();
    let remote = Dir::new();
    let own_store = own_store();
    let daemon = nix_daemon(&own_store, &remote);
    let relay = Setup::new(issuer).set("DAEMON_PATH", &daemon).start();
    let nix = Nix {
        variables: token_variables(issuer).into(),
        home,
    };
    let (proxy, _nginx) = nginx(&nix.home, relay.address, "127.0.0.1");
    let mut routes = routes(&nix.home, &daemon, relay.address, proxy);
    // One of before the client was in it has no such column.
    let against = options.against.as_ref().filter(|program| {
        let help = relay_at(program).arg("--help").output().unwrap();
        texts(&help).0.contains("--stdio")
    });
    let other = against.map(|program| {
        let setup = Setup::of(relay_at(program), issuer);
        let relay = setup.set("DAEMON_PATH", &daemon).start();
        routes.insert(2, through("the other, ws", program, relay.address));
        relay
    });

    let source = nix.home.path("source").display().to_string();
    let large = nix.add(
        &source,
        "large",
        8,
        if options.quick { 4 } else { 32 } << 20,
    );
    let small = nix.add(
        &source,
        "small",
        if options.quick { 200 } else { 2000 },
        4096,
    );
    let mib = if options.quick { 32 } else { 256 };
    let mut table = Table::new(routes.iter().map(|route| route.name.into()).collect());
    for run in 0..options.runs {
        for column in turns(run, routes.len()) {
            let route = &routes[column];
            let store = &*route.store;
            let mut note = |name: &str, secs| table.note(name, 2, column, secs);

            new_store(&own_store, &remote);
            let secs = nix.copy(route, &source, store, &large);
            note(&format!("`nix copy --to`, {mib} MiB in 8 paths"), secs);
            let here = Dir::new();
            let secs = nix.copy(route, store, here.path("").to_str().unwrap(), &large);
            note("`nix copy --from`, the same", secs);
            let secs = nix.copy(route, &source, store, &small);
            note(
                &format!("`nix copy --to`, {} paths of 4 KiB", small.len()),
                secs,
            );
            for _ in 0..5 {
                let secs = nix.run(route, &["store", "ping", "--store", store]);
                note("`nix store ping`", secs);
            }
            for number in 0..5 {
                let name = format!("x{run}-{column}-{number}");
                let file = nix
                    .home
                    .write("drv.nix", &derivation(&name, "echo x > $out"));
                let file = file.to_str().unwrap();
                let build = ["build", "--eval-store", &source, "--store", store];
                let secs = nix.run(route, &[&build[..], &["--no-link", "-f", file]].concat());
                note("build of a trivial derivation", secs);
            }
        }
        eprintln!("run {} of {} with nix is done", run + 1, options.runs);
    }
    drop((relay, other));
    println!();
    table.print_relative();
}

fn own_store() -> String {
    project("test/support/own-store").display().to_string()
}

/// A script that runs nix-daemon for the store in `remote`.
fn nix_daemon(own_store: &str, remote: &Dir) -> String {
    let script = format!(
        "export HOME={0} NIX_CONFIG='{CONFIG}'\nexec {own_store} {0}/nix nix-daemon \"$@\"",
        remote.path("").display()
    );
    remote.script("daemon", &script).display().to_string()
}

/// Through a relay at this address, with the client that is `program`.
fn through(name: &'static str, program: &str, address: SocketAddr) -> Route {
    Route {
        name,
        store: format!("ssh-ng://localhost?remote-program={program}"),
        variables: vec![("NIX_RELAY_URL", format!("ws://{address}"))],
    }
}

fn routes(home: &Dir, daemon: &str, relay: SocketAddr, proxy: SocketAddr) -> Vec<Route> {
    let client = env!("CARGO_BIN_EXE_nix-relay");
    let mut tls = through("nix-relay, wss", client, proxy);
    tls.variables = vec![
        ("NIX_RELAY_URL", format!("wss://localhost:{}", proxy.port())),
        ("SSL_CERT_FILE", home.path("ca.pem").display().to_string()),
    ];
    let client_sh = project("client.sh").display().to_string();
    let options = sshd(home, "127.0.0.1");
    let direct = |name, host| Route {
        name,
        store: format!("ssh-ng://{host}?remote-program={daemon}"),
        variables: vec![("NIX_SSHOPTS", options.clone())],
    };
    vec![
        direct("no relay", "localhost"),
        through("nix-relay, ws", client, relay),
        tls,
        through("client.sh, ws", &client_sh, relay),
        direct("OpenSSH", "127.0.0.1"),
    ]
}

/// Two network namespaces, for a server and for its clients, and the link between them, of test/peer.
struct Network {
    name: String,
    _link: Server,
}

/// Where the server is.
const SERVER: &str = "10.213.0.1";

impl Network {
    fn new(mbit: &str) -> Network {
        let name = format!("nr{}", std::process::id());
        let mut link = Command::new("nice");
        link.arg("-n-10").arg(project("target/release/link"));
        link.args([&name, mbit, "10"]);
        link.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = link.spawn().unwrap();
        let mut ready = BufReader::new(child.stdout.take().unwrap());
        ready.read_line(&mut String::new()).unwrap();
        let script = format!(
            "for end in a b; do
                ip netns add {name}$end; ip link set {name}$end netns {name}$end
                [ $end = a ] && address={SERVER} || address=10.213.0.2
                nsenter --net=/run/netns/{name}$end sh -ec \"
                    ip link set lo up; ip addr add $address/30 dev {name}$end; ip link set {name}$end up\"
            done"
        );
        let network = Network {
            name,
            _link: Server(child),
        };
        let status = Command::new("sh").args(["-ec", &script]).status();
        assert!(status.unwrap().success());
        network
    }

    /// For the server (a) or its clients (b): a socket belongs to the namespace in which it was made.
    fn within<T: Send>(&self, end: char, run: impl FnOnce() -> T + Send) -> T {
        let run = || {
            let namespace = File::open(format!("/run/netns/{}{end}", self.name)).unwrap();
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).unwrap();
            run()
        };
        thread::scope(|scope| scope.spawn(run).join().unwrap())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for end in ["a", "b"] {
            let mut ip = Command::new("ip");
            ip.args(["netns", "del", &format!("{}{end}", self.name)]);
            let _ = ip.status();
        }
    }
}

/// Adds to a store what is like a real closure, of files of this machine, in 16 paths: 40 MB of libraries, and headers, texts
/// and compressed files.
fn add_closure(nix: &Nix, store: &str) -> Vec<String> {
    let script = r#"
        gather() {
            name=$1 bytes=$2 && shift 2
            find "$@" -type f -printf '%s %p\n' | LC_ALL=C sort -k 2 | awk -v name="$name" -v all="$bytes" '
                size + $1 <= all { part = int(4 * size / all); size += $1; sub(/^[^ ]* /, ""); print >(name part) }
                END { if (size < all * 0.9) { print "too few files for the " name >"/dev/stderr"; exit 1 } }'
            for part in "$name"?; do
                mkdir "$part.d"; xargs -d '\n' cp --parents -t "$part.d" <"$part"
            done
        }
        mkdir closure; cd closure
        gather libraries 40000000 /usr/lib -name '*.so*' -size -8000k
        gather headers 15000000 /usr/include
        gather texts 15000000 /usr/share -size -1000k ! -name '*.gz' ! -name '*.png'
        gather compressed 16000000 /usr/share -name '*.gz' -size -1000k
        nix-store --store "$0" --add *.d"#;
    let mut shell = nix.command("bash");
    shell.args(["-euo", "pipefail", "-c", script, store]);
    shell.current_dir(nix.home.path(""));
    added(shell)
}

fn links(options: &Options) {
    let remote = Dir::new();
    let own_store = own_store();
    let daemon = nix_daemon(&own_store, &remote);
    let mut nix = Nix {
        home: Dir::new(),
        variables: Vec::new(),
    };
    let source = nix.home.path("source").display().to_string();
    let paths = add_closure(&nix, &source);

    println!();
    for mbit in ["100", "1000"] {
        let network = Network::new(mbit);
        let keys = Dir::new();
        let (issuer, relay, (proxy, _nginx), ssh) = network.within('a', || {
            let issuer = Issuer::start();
            let relay = Setup::new(&issuer).set("DAEMON_PATH", &daemon).start();
            let nginx = nginx(&keys, relay.address, SERVER);
            (issuer, relay, nginx, sshd(&keys, SERVER))
        });
        let routes = routes_over_link(&keys, &daemon, proxy, &ssh);
        let columns = routes.iter().map(|route| route.name.into());
        let mut table = Table::new(columns.collect());

        for run in 0..options.runs {
            for column in turns(run, routes.len()) {
                let route = &routes[column];
                let store = &*route.store;
                nix.variables = vec![("NIX_RELAY_TOKEN", issuer.token())];
                let target = Dir::new();
                let here = target.path("").display().to_string();
                let mut note = |name: &str, run: &(dyn Fn() -> f64 + Sync)| {
                    let name = format!("{mbit} Mbit/s: {name}");
                    table.note(&name, 2, column, network.within('b', run));
                };

                new_store(&own_store, &remote);
                note("`nix copy --to`, 86 MB", &|| {
                    nix.copy(route, &source, store, &paths)
                });
                note("`nix copy --from`, the same", &|| {
                    nix.copy(route, store, &here, &paths)
                });
                for _ in 0..5 {
                    let ping = ["store", "ping", "--store", store];
                    note("`nix store ping`", &|| nix.run(route, &ping));
                }
            }
            eprintln!(
                "run {} of {} at {mbit} Mbit/s is done",
                run + 1,
                options.runs
            );
        }
        drop(relay);
        table.print_relative();
    }
}

/// With TLS, which OpenSSH has as well.
fn routes_over_link(keys: &Dir, daemon: &str, proxy: SocketAddr, ssh: &str) -> Vec<Route> {
    let client = env!("CARGO_BIN_EXE_nix-relay");
    let client_sh = project("client.sh").display().to_string();
    let wss = |name, program: &str| {
        let mut route = through(name, program, proxy);
        let authority = keys.path("ca.pem").display().to_string();
        route.variables[0].1 = format!("wss://{proxy}");
        route.variables.push(("SSL_CERT_FILE", authority));
        route
    };
    let openssh = |name, more| Route {
        name,
        store: format!("ssh-ng://{SERVER}?remote-program={daemon}{more}"),
        variables: vec![("NIX_SSHOPTS", ssh.into())],
    };
    let mut zstd = wss("nix-relay, zstd", client);
    zstd.variables.push(("NIX_RELAY_COMPRESS", "zstd".into()));
    vec![
        wss("nix-relay", client),
        zstd,
        wss("client.sh", &client_sh),
        openssh("OpenSSH", ""),
        openssh("OpenSSH, compress=true", "&compress=true"),
    ]
}

/// An empty store for the daemon.
fn new_store(own_store: &str, remote: &Dir) {
    let directory = remote.path("nix");
    let mut writable = Command::new("chmod");
    writable
        .args(["-R", "u+w"])
        .arg(&directory)
        .stderr(Stdio::null());
    let _ = writable.status();
    let _ = fs::remove_dir_all(&directory);
    let mut init = job(own_store, remote);
    init.arg(&directory).args(["nix-store", "--init"]);
    assert!(init.env("NIX_CONFIG", CONFIG).status().unwrap().success());
}

/// nginx with TLS in front of a relay, by the file in nix/: its address. `ca.pem` is for its clients.
fn nginx(home: &Dir, relay: SocketAddr, host: &str) -> (SocketAddr, Server) {
    let make = format!(
        "make='openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
        $make -subj /CN=authority -keyout ca.key -out ca.pem
        $make -subj /CN=relay -addext subjectAltName=DNS:localhost,IP:{host} \
            -addext basicConstraints=critical,CA:FALSE \
            -CA ca.pem -CAkey ca.key -keyout relay.key -out relay.pem"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &make]).current_dir(home.path(""));
    assert!(shell.stderr(Stdio::null()).status().unwrap().success());

    let listener = TcpListener::bind((host, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let file = fs::read_to_string(project("nix/nginx.conf")).unwrap();
    let file = file
        .replace("listen 443 ssl;", &format!("listen {address} ssl;"))
        .replace("relay.example.com", "localhost")
        .replace("127.0.0.1:8080", &relay.to_string())
        .replace("/etc/ssl/", "");
    let text = format!(
        "daemon off; worker_processes 2; pid pid; events {{}}
        http {{ access_log off; client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c;
        uwsgi_temp_path d; scgi_temp_path e;\n{file}}}"
    );
    let conf = home.write("nginx.conf", &text);
    let mut command = Command::new("nginx");
    command.args(["-e", "stderr", "-p"]).arg(home.path(""));
    let child = command.arg("-c").arg(conf).spawn().unwrap();
    eventually("nginx listens", LIMIT, || {
        TcpStream::connect(address).is_ok()
    });
    (address, Server(child))
}

/// OpenSSH's server with a key of its own, for one user with another: the options for its client.
fn sshd(dir: &Dir, host: &str) -> String {
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
    let listener = TcpListener::bind((host, 0)).unwrap();
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

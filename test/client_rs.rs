//! client.rs, which is `nix-relay --stdio`: where it finds a token, when it tries again, what it says,
//! and what it leaves behind. What it does for a real nix is in nix.rs.

use crate::peers::Network;
use crate::proxies::{NGINX, Running};
use crate::support::{nix::*, *};
use rustix::net::{self, AddressFamily, SocketType, connect_unspec};
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tungstenite::WebSocket;

const GITLAB: &str = "GITLAB_OIDC_TOKEN";
const CIRCLE: &str = "CIRCLE_OIDC_TOKEN_V2";
/// Begins the line that it says before it waits.
const TRYING: &str = "trying again for up to ";

/// The client for a relay at this URL, as Nix runs it, without another variable.
fn client(url: impl Display) -> Command {
    let mut command = Command::new(native());
    command
        .arg("--stdio")
        .env_clear()
        .env("NIX_RELAY_URL", url.to_string())
        .stdin(Stdio::piped());
    command
}

/// The same, with a token of the issuer.
fn client_of(relay: &Relay, issuer: &Issuer) -> Command {
    let mut command = client(format!("ws://{}", relay.address));
    command.env("NIX_RELAY_TOKEN", issuer.token());
    command
}

/// The lines that it says before it fails, with nothing on standard output and no `nix-relay: `.
fn failures(command: &mut Command) -> Vec<String> {
    let output = command.output().unwrap();
    let (out, log) = texts(&output);
    assert_eq!((output.status.code(), out.as_str()), (Some(1), ""), "{log}");
    let line = |line: &str| line.strip_prefix("nix-relay: ").map(String::from);
    let lines = log.lines().map(line).collect::<Option<_>>();
    lines.unwrap_or_else(|| panic!("not its words: {log:?}"))
}

/// The only one.
fn failure(command: &mut Command) -> String {
    let mut lines = failures(command);
    assert_eq!(lines.len(), 1, "{lines:?}");
    lines.remove(0)
}

/// How it fails where it would try again.
fn failure_at_once(command: &mut Command) -> String {
    failure(command.env("NIX_RELAY_RETRY_SECS", "0"))
}

/// One that runs.
struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    log: Log,
}

impl Session {
    fn start(command: &mut Command) -> Session {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Session {
            stdin: child.stdin.take(),
            stdout: child.stdout.take().unwrap(),
            log: Log::of(child.stderr.take().unwrap()),
            child,
        }
    }

    /// What comes back from `cat`.
    fn echo(&mut self, text: &str) -> String {
        let mut answer = vec![0; text.len()];
        let sent = self.stdin.as_mut().unwrap().write_all(text.as_bytes());
        sent.and_then(|()| self.stdout.read_exact(&mut answer))
            .unwrap_or_else(|e| panic!("{e}: {}", self.log.text()));
        String::from_utf8(answer).unwrap()
    }

    /// All processes of it.
    fn processes(&self) -> Vec<u32> {
        [vec![self.child.id()], descendants(self.child.id())].concat()
    }

    fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child, LIMIT)
    }

    /// Its input ends, and it with that.
    fn end(mut self) {
        drop(self.stdin.take());
        assert_eq!((self.wait().code(), &*self.log.text()), (Some(0), ""));
    }

    /// What it says when it fails, after which none of its processes is left.
    fn failure(mut self) -> String {
        let all = self.processes();
        assert_eq!(self.wait().code(), Some(1));
        let is_there = |id: &u32| fs::exists(format!("/proc/{id}")).unwrap();
        eventually("its processes are gone", LIMIT, || {
            !all.iter().any(is_there)
        });
        let text = self.log.wait("nix-relay: ");
        let line = text
            .strip_prefix("nix-relay: ")
            .unwrap_or_else(|| panic!("{text:?}"));
        line.trim_end().to_owned()
    }
}

/// Answers each connection's request with the next of these, and those that follow with the last: nothing closes the
/// connection, RESET resets it, and anything else leaves it open.
fn server(answers: &[&str]) -> SocketAddr {
    let answers: Vec<String> = answers.iter().map(|&answer| answer.into()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut open = Vec::new();
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let mut stream: TcpStream = stream;
            read_head(&mut stream);
            match &*answers[number.min(answers.len() - 1)] {
                "" => continue,
                RESET => connect_unspec(&stream).unwrap(),
                answer => stream.write_all(answer.as_bytes()).unwrap(),
            }
            open.push(stream);
        }
    });
    address
}

const RESET: &str = "reset";

#[test]
fn what_cannot_be_is_said_before_anything_is_sent() {
    for (url, is) in [
        ("", "''"),
        ("https://relay", "'https://relay'"),
        ("relay:80", "'relay:80'"),
        ("ws://", "'ws://'"),
        ("ws://:80", "'ws://:80'"),
        ("ws://relay:99999", "'ws://relay:99999'"),
        ("ws://re lay", "'ws://re lay'"),
        ("ws://[::1]x:80", "'ws://[::1]x:80'"),
        ("https://user:secret@relay", "'relay'"),
    ] {
        let set = "set NIX_RELAY_URL to where the relay is, as wss://HOST or ws://HOST:PORT";
        assert_eq!(failure(&mut client(url)), format!("{set} (it is {is})"));
    }
    let relay = "ws://127.0.0.1:1";
    let alone = "it must be the token alone, without spaces, quotes or line breaks";
    for token in ["a\r\nX: y", "'ey.ey.sig'", "a b", "\n"] {
        let line = failure(client(relay).env("NIX_RELAY_TOKEN", token));
        assert_eq!(
            line,
            format!("the token from NIX_RELAY_TOKEN contains invalid characters: {alone}")
        );
    }
    for name in ["KEEPALIVE", "RETRY", "QUEUE"].map(|name| format!("NIX_RELAY_{name}_SECS")) {
        let line = failure(client(relay).env(&name, "1m"));
        assert_eq!(
            line,
            format!("{name} must be a whole number of seconds (it is '1m')")
        );
    }
    let line = failure(&mut client(relay));
    for name in [
        "NIX_RELAY_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        GITLAB,
        CIRCLE,
    ] {
        assert!(
            line.starts_with("no token: ") && line.contains(name),
            "{line}"
        );
    }
    let line = failure(client("wss://localhost").env("SSL_CERT_FILE", "/dev/null"));
    assert!(line.starts_with("SSL_CERT_FILE=/dev/null: "), "{line}");
}

#[test]
fn a_token_endpoint_that_fails() {
    let issuer = Issuer::start();
    let mut command = client("ws://127.0.0.1:1");
    command
        .envs(token_variables(&issuer))
        .env(GITLAB, issuer.token());
    let from = "no token from ACTIONS_ID_TOKEN_REQUEST_URL: ";
    for status in [302, 401, 404] {
        issuer.answer("/token", status, "http://127.0.0.1:1/");
        let line = failure(&mut command);
        assert!(
            line.starts_with(from) && line.contains(&status.to_string()),
            "{line}"
        );
    }
    for junk in [
        "{}",
        "[]",
        "{\"value\": 3}",
        "{\"value\": \"\"}",
        "{\"value\": null}",
    ] {
        issuer.answer("/token", 200, junk);
        assert_eq!(
            failure(&mut command),
            format!("{from}its answer has no .value"),
            "{junk}"
        );
    }
    for junk in ["", "<html>"] {
        issuer.answer("/token", 200, junk);
        let line = failure(&mut command);
        assert!(line.starts_with(&format!("{from}not JSON, ")), "{line}");
    }
    issuer.answer("/token", 200, "{\"value\": \"a b\"}");
    let invalid = "the token from ACTIONS_ID_TOKEN_REQUEST_URL contains invalid characters: ";
    assert!(failure(&mut command).starts_with(invalid));
    command.env("ACTIONS_ID_TOKEN_REQUEST_URL", "http://127.0.0.1:1/token");
    assert!(failure_at_once(&mut command).starts_with(&format!("{from}connection refused")));
}

/// One 500, one 429 and one reset, and then the token.
#[test]
fn a_token_endpoint_that_fails_for_the_moment() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let token = json!({"value": issuer.token()}).to_string();
    let good = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{token}",
        token.len()
    );
    let answers = [
        "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\n\r\n",
        RESET,
        &good,
    ];
    let endpoint = server(&answers);
    let mut command = client(format!("ws://{}", relay.address));
    command
        .env(
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            format!("http://{endpoint}/token"),
        )
        .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret");
    let mut session = Session::start(&mut command);
    assert_eq!(session.echo("x"), "x");
    let line = "nix-relay: no token from ACTIONS_ID_TOKEN_REQUEST_URL: http status: 500; trying again for up to 60 s\n";
    assert_eq!(session.log.text(), line);
}

#[test]
fn no_connection() {
    let junk = |url: &str| {
        let mut command = client(url);
        command.env("NIX_RELAY_TOKEN", "junk");
        command
    };
    let cause = |url: &str| {
        let line = failure_at_once(&mut junk(url));
        let cause = line.strip_prefix(&format!("cannot reach {url}: "));
        cause.unwrap_or_else(|| panic!("{line}")).to_owned()
    };
    let from = |answers: &[&str]| cause(&format!("ws://{}/relay", server(answers)));
    let refused = "connection refused; does a server run there, and is the port right?";
    assert_eq!(cause("ws://127.0.0.1:1/relay"), refused);
    assert_eq!(cause("ws://[::1]:1/relay"), refused);
    let unknown = cause("wss://nowhere.invalid/relay");
    let cannot = "cannot resolve nowhere.invalid: ";
    assert!(unknown.starts_with(cannot) && unknown.ends_with("; is the name right?"));
    let broke =
        "the connection broke without an answer; was the server, or a proxy before it, restarted?";
    assert_eq!(from(&[RESET]), broke);
    assert_eq!(from(&[""]), broke);
    let no_key = "HTTP/1.1 101 Hello\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n";
    let early = "HTTP/1.1 103 Early Hints\r\n\r\n";
    for answer in ["SSH-2.0-OpenSSH_9.2\r\n", no_key, early] {
        let line = from(&[answer]);
        assert!(
            line.starts_with("its answer is not a WebSocket handshake: ")
                && line.ends_with("; is it a relay that listens there?"),
            "{line}"
        );
    }

    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let line = cause(&format!("wss://{}/relay", relay.address));
    assert!(
        line.starts_with("TLS failed: ") && line.ends_with("; does that port speak TLS?"),
        "{line}"
    );
    let with_user = junk(&format!("ws://user:password@{}", relay.address))
        .output()
        .unwrap();
    let log = texts(&with_user).1;
    assert!(log.contains("401") && !log.contains("user"), "{log}");
}

/// A connection that nothing answers: the queue of its listener is full.
fn black_hole(address: SocketAddrV4) -> (TcpListener, TcpStream) {
    let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    net::bind(&socket, &address).unwrap();
    net::listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    let waiting = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, waiting)
}

#[test]
fn each_wait_has_a_limit() {
    let dir = certificates();
    let hole = black_hole(SocketAddrV4::new([127, 0, 0, 1].into(), 0));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let halting = TcpListener::bind("127.0.0.1:0").unwrap();
    let halting_address = halting.local_addr().unwrap();
    // The beginning of a record of TLS.
    let begin = |mut stream: TcpStream| stream.write_all(b"\x16\x03\x03\x00\x7a").map(|()| stream);
    thread::spawn(move || halting.incoming().flatten().map(begin).collect::<Vec<_>>());
    let (_tls, tls_address) = serve_tls(&dir, "good", &[]);
    let (hole, silent) = (hole.0.local_addr().unwrap(), silent.local_addr().unwrap());
    let cases = [
        (
            format!("ws://{hole}"),
            "no connection within 10 s; is a firewall in the way?",
        ),
        (
            format!("wss://{silent}"),
            "no TLS handshake within 10 s; does that port speak TLS?",
        ),
        (
            format!("wss://{halting_address}"),
            "no TLS handshake within 10 s; does that port speak TLS?",
        ),
        (
            format!("ws://{silent}"),
            "no answer within 40 s; is that the right port?",
        ),
        (
            format!("wss://{tls_address}"),
            "no answer within 40 s; is that the right port?",
        ),
    ];
    thread::scope(|scope| {
        for (url, expected) in cases {
            let dir = &dir;
            scope.spawn(move || {
                let start = Instant::now();
                let mut command = client(&url);
                command
                    .env("NIX_RELAY_TOKEN", "junk")
                    .env("SSL_CERT_FILE", dir.path("ca.pem"));
                assert_eq!(
                    failure_at_once(&mut command),
                    format!("cannot reach {url}/relay: {expected}")
                );
                assert!(start.elapsed() > Duration::from_secs(9) && start.elapsed() < LIMIT);
            });
        }
    });
}

/// A name with two addresses, of which the first never answers: the relay's, and the token endpoint's.
#[test]
fn all_addresses_of_a_name_are_tried() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer).set("LISTEN", "127.0.0.4:0").start();
    let hole = |port| black_hole(SocketAddrV4::new([127, 0, 0, 1].into(), port));
    let endpoint = TcpListener::bind("127.0.0.4:0").unwrap();
    let port = endpoint.local_addr().unwrap().port();
    let _holes = [hole(relay.address.port()), hole(port)];
    let body = json!({"value": issuer.token()}).to_string();
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    thread::spawn(move || {
        for mut stream in endpoint.incoming().flatten() {
            // One connection does nothing but find the address.
            if stream.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    let hosts = dir.write(
        "hosts",
        "127.0.0.1 relay.localhost\n127.0.0.4 relay.localhost\n",
    );
    let mut command = with_hosts(&hosts, native());
    command
        .arg("--stdio")
        .env_clear()
        .env(
            "NIX_RELAY_URL",
            format!("ws://relay.localhost:{}", relay.address.port()),
        )
        .env(
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            format!("http://relay.localhost:{port}/?x=y"),
        )
        .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret")
        .stdin(Stdio::piped());
    let start = Instant::now();
    let mut session = Session::start(&mut command);
    assert_eq!(session.echo("x"), "x");
    // The second was tried a moment after the first.
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "after {:?}",
        start.elapsed()
    );
    session.end();
}

/// A program for which this file is /etc/hosts.
fn with_hosts(hosts: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(project("test/support/own-mounts"));
    command.arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"");
    command.arg(hosts).arg(program);
    command
}

/// A private authority as `ca.pem`, and certificates of it with their keys: `good` for localhost and
/// relay.example.com, `expired`, `early` and `other`.
pub fn certificates() -> Dir {
    let dir = Dir::new();
    let make = "
        new='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config /dev/null'
        openssl req -x509 $new -subj /CN=authority -addext basicConstraints=critical,CA:TRUE \
            -keyout ca.key -out ca.pem
        printf '[ca]\\ndefault_ca=x\\n[x]\\nnew_certs_dir=.\\ndatabase=index\\nserial=serial\\n' >ca.conf
        printf 'default_md=sha256\\npolicy=p\\nunique_subject=no\\n[p]\\nCN=optional\\n' >>ca.conf
        touch index; echo 01 >serial
        make() {
            openssl req $new -subj /CN=relay -keyout $1.key -out $1.csr
            echo subjectAltName=$2 >$1.ext
            openssl ca -batch -notext -config ca.conf -cert ca.pem -keyfile ca.key -in $1.csr \
                -extfile $1.ext -out $1.pem -startdate $3 -enddate $4
        }
        good=DNS:localhost,DNS:relay.example.com,IP:127.0.0.1
        make good $good 20200101000000Z 20700101000000Z
        make expired $good 20200101000000Z 20200102000000Z
        make early $good 20690101000000Z 20700101000000Z
        make other DNS:other.example.com 20200101000000Z 20700101000000Z";
    let output = Command::new("sh")
        .args(["-ec", make])
        .current_dir(dir.path(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", texts(&output).1);
    dir
}

/// Killed when dropped.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// OpenSSL's server with one of these certificates. It says nothing, or with `-WWW` answers requests.
pub fn serve_tls(dir: &Dir, name: &str, arguments: &[&str]) -> (Server, SocketAddr) {
    let mut command = Command::new("openssl");
    command
        .args(["s_server", "-accept", "127.0.0.1:0"])
        .args([
            "-cert",
            &format!("{name}.pem"),
            "-key",
            &format!("{name}.key"),
        ])
        .args(arguments)
        .current_dir(dir.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut server = Server(command.spawn().unwrap());
    let line = Log::of(server.0.stdout.take().unwrap()).wait("ACCEPT ");
    let address = line.split_once("ACCEPT ").unwrap().1.parse().unwrap();
    (server, address)
}

#[test]
fn certificates_that_are_not_trusted() {
    let dir = certificates();
    let hint = "; does the server send its intermediate certificates? Otherwise, if the CA is your own, set SSL_CERT_FILE to its certificate";
    for (name, with_ca, cause) in [
        ("good", false, format!("unknown issuer{hint}")),
        ("expired", true, "certificate expired: ".into()),
        ("early", true, "certificate not valid yet: ".into()),
        (
            "other",
            true,
            "certificate not valid for name \"127.0.0.1\"; ".into(),
        ),
    ] {
        let (_server, address) = serve_tls(&dir, name, &["-WWW"]);
        let mut command = client(format!("wss://{address}"));
        command.env("NIX_RELAY_TOKEN", "junk");
        if with_ca {
            command.env("SSL_CERT_FILE", dir.path("ca.pem"));
        }
        let expected =
            format!("cannot reach wss://{address}/relay: the certificate is not trusted: {cause}");
        let line = failure(&mut command);
        assert!(line.starts_with(&expected), "{line}");
    }
}

/// One request, however long it would try.
#[test]
fn refusals_that_trying_again_would_not_change() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let stranger = issuer.token_with(json!({"repository_owner": "stranger"}));
    for (path, token, status) in [
        ("relay", "junk", 401),
        ("relay", &stranger, 403),
        ("no", "junk", 404),
    ] {
        let mut command = client(format!("ws://{}/{path}", relay.address));
        let line = failure(command.env("NIX_RELAY_TOKEN", token));
        assert!(line.starts_with(&format!("the relay refused: {status}: ")));
        let refused = format!(" status={status} ");
        relay.log.wait(&refused);
        assert_eq!(relay.log.text().matches(&refused).count(), 1);
    }
}

#[test]
fn through_nginx() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let proxy = Running::start(&NGINX, &[relay.address]);
    let through = |proxy: &Running| {
        let mut command = client("");
        command
            .envs(proxy.variables())
            .env("NIX_RELAY_TOKEN", issuer.token());
        command
    };
    let mut session = Session::start(&mut through(&proxy));
    assert_eq!(session.echo("x"), "x");
    session.end();

    let without = |text: String| text.replace("proxy_set_header Upgrade $http_upgrade;", "");
    let misled = Running::start_with(&NGINX, &[relay.address], without);
    let line = failure(&mut through(&misled));
    assert!(line.starts_with("the relay refused: 426: "), "{line}");

    // Nobody listens there.
    let page = Running::start(&NGINX, &["127.0.0.1:1".parse().unwrap()]);
    let expected = "a proxy or web server answered in the relay's place: 502: Bad Gateway; \
                    does the relay run, and is NIX_RELAY_URL right?";
    assert_eq!(failure_at_once(&mut through(&page)), expected);
}

/// What it says may come together with the relay's answer.
#[test]
fn a_daemon_that_speaks_first() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("head -c 6000 /dev/zero; exec cat")
        .start();
    let proxy = Running::start(&NGINX, &[relay.address]);
    for with_tls in [false, true].repeat(20) {
        let mut command = client_of(&relay, &issuer);
        if with_tls {
            command.envs(proxy.variables());
        }
        let mut session = Session::start(&mut command);
        let mut said = [1; 6000];
        session.stdout.read_exact(&mut said).unwrap();
        assert_eq!(said, [0; 6000]);
        assert_eq!(session.echo("x"), "x");
        session.end();
    }
}

/// The length decides what a frame's header and the end of its mask look like.
#[test]
fn messages_of_each_length() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut session = Session::start(&mut client_of(&relay, &issuer));
    let text: String = ('a'..='z').cycle().take(1 << 17).collect();
    for length in (1..10).chain(122..132).chain(65525..65545).chain([1 << 17]) {
        assert!(session.echo(&text[..length]) == text[..length], "{length}");
    }
    session.end();
}

/// In chunks, and with what would turn or move the rest of the line.
#[test]
fn what_others_say_is_made_plain() {
    let page = "HTTP/1.1 404 Gone\r\nTransfer-Encoding: chunked\r\n\r\n36\r\n<html><TITLE>\n404 \u{1b}[31mNo\u{9b}\u{202e}t \
                found</title>\r\n0\r\n\r\n";
    let text = "HTTP/1.1 403 No\r\nContent-Type: text/plain\r\nContent-Length: 5000000\r\n\r\nnot\u{7} \u{1b}[31my\u{202e}ou\nnor anyone else";
    for (answer, expected) in [
        (
            page,
            "a proxy or web server answered in the relay's place: 404: Not Found; does the relay run, and is NIX_RELAY_URL right?",
        ),
        (text, "the relay refused: 403: not [31myou"),
        (
            "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n",
            "a proxy or web server answered in the relay's place: 403: Forbidden; does the relay run, and is NIX_RELAY_URL right?",
        ),
    ] {
        let address = server(&[answer]);
        let start = Instant::now();
        let mut command = client(format!("ws://{address}"));
        assert_eq!(failure(command.env("NIX_RELAY_TOKEN", "junk")), expected);
        assert!(answer == text || start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_full_relay_that_has_room_later() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "0");
    let relay = setup.start();
    let mut only = relay.connect(&issuer.token());
    let mut session = Session::start(&mut client_of(&relay, &issuer));
    let line = session.log.wait("waiting for");
    assert!(
        line == "nix-relay: all sessions are in use; waiting for up to 3600 s",
        "{line}"
    );
    only.close();
    assert_eq!(session.echo("x"), "x");
    assert_eq!(session.log.text().lines().count(), 1);
}

/// And the last words when the time is over.
#[test]
fn a_relay_that_stays_broken() {
    let issuer = Issuer::start();
    issuer.answer("/jwks", 500, "");
    let relay = Relay::start(&issuer);
    let mut command = client_of(&relay, &issuer);
    let lines = failures(command.env("NIX_RELAY_RETRY_SECS", "4"));
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines
            .iter()
            .all(|line| line.starts_with("the relay refused: 503: ")),
        "{lines:?}"
    );
    assert!(
        lines[0].ends_with("trying again for up to 4 s"),
        "{lines:?}"
    );
    eventually("both are in the log", LIMIT, || {
        relay.log.text().matches(" status=503 ").count() >= 2
    });
}

/// By a header, since a 502 of a proxy may pass.
#[test]
fn a_nix_daemon_that_cannot_be_run_is_not_waited_for() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("DAEMON_PATH", "/nothing").start();
    let line = failure(&mut client_of(&relay, &issuer));
    assert!(line.starts_with("the relay refused: 502: "), "{line}");
}

/// That of the client, and Nix's behind what the action puts between them.
#[test]
fn the_log_of_a_build_gets_a_larger_pipe() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let messages = fs::read_to_string(project(".github/actions/client/messages")).unwrap();
    let wrapper = format!("{messages}\nexec {} --stdio", native().display());
    for wrap in [false, true] {
        let (log, stderr) = std::io::pipe().unwrap();
        let mut client = client_of(&relay, &issuer);
        let mut bash = Command::new("bash");
        let variables = client.get_envs();
        bash.args(["-c", &wrapper])
            .envs(variables.filter_map(|(name, value)| Some((name, value?))));
        let command = if wrap { &mut bash } else { &mut client };
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(stderr).spawn().unwrap();
        eventually("the pipe is larger", LIMIT, || {
            rustix::pipe::fcntl_getpipe_size(&log).unwrap() == 1 << 20
        });
        drop(child.stdin.take());
        assert!(wait(&mut child, LIMIT).success());
    }
}

#[test]
fn a_relay_that_is_restarted() {
    let issuer = Issuer::start();
    let mut relay = Relay::start(&issuer);
    let address = relay.address.to_string();
    let mut command = client_of(&relay, &issuer);
    assert_eq!(Session::start(&mut command).echo("x"), "x");
    relay.stop();
    let mut session = Session::start(&mut command);
    assert!(
        session
            .log
            .wait(TRYING)
            .contains("connection refused; trying")
    );
    let _relay = Setup::new(&issuer).set("LISTEN", &address).start();
    assert_eq!(session.echo("x"), "x");
}

/// As Nix is that was killed while its client waits for a session.
#[test]
fn whose_parent_is_gone_waits_no_longer() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer).set("MAX_CONNECTIONS", "1");
    let relay = setup.set("QUEUE_TIMEOUT_SECS", "0").start();
    let _only = relay.connect(&issuer.token());
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("\"$0\" --stdio & wait").arg(native());
    shell.env("NIX_RELAY_URL", format!("ws://{}", relay.address));
    shell
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let mut session = Session::start(&mut shell);
    session.log.wait("all sessions are in use");
    let client = descendants(session.child.id())[0];
    session.child.kill().unwrap();
    session.wait();
    eventually("the client is gone", LIMIT, || {
        !fs::exists(format!("/proc/{client}")).unwrap()
    });
}

/// A proxy for TLS that is known by a variable, and wants a password.
#[test]
fn through_a_proxy_of_the_environment() {
    let (issuer, dir) = (Issuer::start(), certificates());
    let relay = Relay::start(&issuer);
    let nginx = Running::start_with(&NGINX, &[relay.address], |text| text);
    let nginx_port = nginx.variables()[0]
        .1
        .rsplit(':')
        .next()
        .unwrap()
        .to_owned();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let conf = format!(
        "Port {port}\nListen 127.0.0.1\nBasicAuth user secret\nLogLevel Connect\nTimeout 60\n"
    );
    let hosts = dir.write("hosts", "127.0.0.1 localhost relay.test\n");
    let mut proxy = with_hosts(&hosts, "tinyproxy");
    proxy
        .arg("-d")
        .arg("-c")
        .arg(dir.write("conf", &conf))
        .stdout(Stdio::piped());
    let mut proxy = Server(proxy.spawn().unwrap());
    let log = Log::of(proxy.0.stdout.take().unwrap());
    eventually("the proxy listens", LIMIT, || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });

    let through = |user: &str, name: &str| {
        let mut command = client(format!("wss://{name}:{nginx_port}"));
        command
            .env("SSL_CERT_FILE", &nginx.variables()[1].1)
            .env("NIX_RELAY_TOKEN", issuer.token())
            .env("HTTPS_PROXY", format!("http://{user}127.0.0.1:{port}"));
        command
    };
    let url = format!("wss://relay.test:{nginx_port}/relay");
    // It got there, and found a certificate for another name: that of the tests is for localhost.
    let line = failure(&mut through("user:s%65cret@", "relay.test"));
    let untrusted = "the certificate is not trusted: certificate not valid for name \"relay.test\"";
    let by_proxy = format!(" through the proxy 127.0.0.1:{port}");
    let expected = format!("cannot reach {url}{by_proxy}: {untrusted}");
    assert!(line.starts_with(&expected), "{line}");
    log.wait("CONNECT relay.test:");
    let line = failure(&mut through("", "relay.test"));
    let refused = "it refused: 407: Proxy Authentication Required";
    assert_eq!(line, format!("cannot reach {url}{by_proxy}: {refused}"));
    let line = failure_at_once(through("", "relay.test").env("NO_PROXY", "relay.test"));
    let unknown = format!("cannot reach {url}: cannot resolve relay.test");
    assert!(line.starts_with(&unknown), "{line}");
    // Never for this machine.
    let mut session =
        Session::start(through("", "localhost").env("HTTPS_PROXY", "http://127.0.0.1:1"));
    assert_eq!(session.echo("x"), "x");
}

#[test]
fn how_a_session_ends() {
    let issuer = Issuer::start();
    let ends = |setup: Setup| {
        let relay = setup.start();
        let mut session = Session::start(&mut client_of(&relay, &issuer));
        session.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let mut data = String::new();
        session.stdout.read_to_string(&mut data).unwrap();
        (session, data)
    };
    let daemon = |script: &str| Setup::new(&issuer).daemon(script);

    let (session, data) = ends(daemon("read line; head -c 1000000 /dev/zero; echo end"));
    assert!(
        data.len() == 1_000_004 && data.ends_with("end\n"),
        "{} bytes",
        data.len()
    );
    let early = "the relay ended the session before standard input ended";
    assert_eq!(session.failure(), early);
    let (session, data) = ends(daemon("read line; echo some; echo boom >&2; exit 7"));
    assert_eq!(data, "some\n");
    let line = session.failure();
    assert!(
        line.starts_with("the relay ended the session: 1011: ") && line.contains("boom"),
        "{line}"
    );
    let (session, _) = ends(Setup::new(&issuer).set("TIMEOUT_SECS", "1"));
    assert!(
        session
            .failure()
            .starts_with("the relay ended the session: 1008: ")
    );

    let mut relay = Relay::start(&issuer);
    let proxy = Proxy::start(relay.address);
    let through = |address: SocketAddr| {
        let mut command = client(format!("ws://{address}"));
        let mut session = Session::start(command.env("NIX_RELAY_TOKEN", issuer.token()));
        assert_eq!(session.echo("x"), "x");
        session
    };
    let restarted = "; was the relay or a proxy restarted?";
    let session = through(proxy.address);
    proxy.reset();
    assert_eq!(
        session.failure(),
        format!("the session broke off: Connection reset by peer (os error 104){restarted}")
    );
    let session = through(relay.address);
    relay.signal("KILL");
    relay.wait();
    assert_eq!(
        session.failure(),
        format!("the session broke off: the connection was closed without a Close{restarted}")
    );
}

#[test]
fn tls_that_ends_without_a_word() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let nginx = Running::start_with(&NGINX, &[relay.address], |text| text);
    let [(_, url), (_, authority), ..] = &nginx.variables()[..] else {
        panic!("not a URL and a file");
    };
    let port = url.rsplit(':').next().unwrap().parse().unwrap();
    let proxy = Proxy::start(SocketAddr::new([127, 0, 0, 1].into(), port));
    let mut command = client(format!("wss://localhost:{}", proxy.address.port()));
    command.env("SSL_CERT_FILE", authority);
    let mut session = Session::start(command.env("NIX_RELAY_TOKEN", issuer.token()));
    assert_eq!(session.echo("x"), "x");
    proxy.end();
    assert_eq!(
        session.failure(),
        "the session broke off: the connection was closed without a Close; was the relay or a proxy restarted?"
    );
}

/// What was sent before a reset counts, even if sending is what fails first.
#[test]
fn last_words_before_a_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut socket = tungstenite::accept(stream).unwrap();
            socket.read().unwrap();
            let close = [&[0x88, 5, 0x03, 0xF3][..], b"why"].concat();
            socket.get_mut().write_all(&close).unwrap();
            // What it has not read makes that a reset.
        }
    });
    for _ in 0..40 {
        let mut command = client(&url);
        command.env("NIX_RELAY_TOKEN", "junk");
        let command = command.stdin(fs::File::open("/dev/zero").unwrap());
        let session = Session::start(command);
        assert_eq!(session.failure(), "the relay ended the session: 1011: why");
    }
}

/// Its reader goes, which is as good as an end of its input.
#[test]
fn an_output_that_breaks() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("read line; exec cat /dev/zero")
        .start();
    let Session {
        mut child,
        stdin,
        mut stdout,
        log,
    } = Session::start(&mut client_of(&relay, &issuer));
    let mut stdin = stdin.unwrap();
    stdin.write_all(b"go\n").unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    drop(stdout);
    assert_eq!(
        (wait(&mut child, LIMIT).code(), &*log.text()),
        (Some(1), "")
    );
    relay.log.wait(" reason=client-closed ");
}

/// Neither side is told.
#[test]
fn a_network_that_goes_away() {
    let (issuer, network) = (Issuer::start(), Network::new());
    let relay = Setup::new(&issuer).set("LISTEN", "0.0.0.0:0").start();
    let url = format!("ws://{}:{}", network.address, relay.address.port());
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{}", network.name))
        .arg(native())
        .arg("--stdio")
        .env_clear()
        .env("NIX_RELAY_URL", url)
        .env("NIX_RELAY_TOKEN", issuer.token())
        .env("NIX_RELAY_KEEPALIVE_SECS", "1")
        .stdin(Stdio::piped());
    let mut session = Session::start(&mut command);
    let warning = session.log.wait("warning: ");
    let unencrypted = format!(
        "the token goes unencrypted to {}; use wss:// instead",
        network.address
    );
    assert!(warning.ends_with(&unencrypted), "{warning}");
    assert_eq!(session.echo("x"), "x");
    network.cut();
    let cut = Instant::now();
    let line = session.log.wait("the session broke off: ");
    assert!(
        cut.elapsed() < Duration::from_secs(6),
        "after {:?}",
        cut.elapsed()
    );
    assert!(
        line.contains("no response") && line.contains("three keepalive intervals"),
        "{line}"
    );
    assert_eq!(session.wait().code(), Some(1));
}

/// What Nix does to its client as soon as it is done.
#[test]
fn killed_it_says_goodbye_and_leaves_nothing() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    for number in 1..=5 {
        let mut session = Session::start(&mut client_of(&relay, &issuer));
        assert_eq!(session.echo("x"), "x");
        let all = session.processes();
        session.child.kill().unwrap();
        drop(session.stdin.take());
        session.child.wait().unwrap();
        relay.log.wait(&format!(
            "session ended session={number} reason=client-closed "
        ));
        let is_there = |id: &u32| fs::exists(format!("/proc/{id}")).unwrap();
        eventually("its processes are gone", LIMIT, || {
            !all.iter().any(is_there)
        });
        assert_eq!(session.log.text(), "");
    }
}

#[test]
fn no_secret_is_in_an_argument_list() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut command = client(format!("ws://{}", relay.address));
    command
        .envs(token_variables(&issuer))
        .env(GITLAB, "ey.gitlab")
        .env(CIRCLE, "ey.circle");
    let mut session = Session::start(&mut command);
    assert_eq!(session.echo("x"), "x");
    let seen = |id: u32, what| fs::read_to_string(format!("/proc/{id}/{what}")).unwrap();
    assert!(descendants(session.child.id()).is_empty());
    let all = seen(session.child.id(), "cmdline");
    for secret in [issuer::REQUEST_TOKEN, "ey.", "eyJ"] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
    assert!(all.contains("--stdio"));
    session.end();
}

/// The most memory that a process has had, in KiB.
fn peak_memory(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A gibibyte each way, through memory for a few frames.
#[test]
fn memory_does_not_grow() {
    const ALL: u64 = 1 << 30;
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut session = Session::start(&mut client_of(&relay, &issuer));
    assert_eq!(session.echo("x"), "x");
    let at_start: Vec<u64> = session.processes().into_iter().map(peak_memory).collect();
    let mut stdin = session.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..ALL >> 20 {
            stdin.write_all(&chunk).unwrap();
        }
        stdin
    });
    let copied =
        std::io::copy(&mut session.stdout.by_ref().take(ALL), &mut std::io::sink()).unwrap();
    assert_eq!(copied, ALL);
    let at_end: Vec<u64> = session.processes().into_iter().map(peak_memory).collect();
    // The binary of the tests is much larger than that of a release, which has less than 8 MiB in all.
    let growth = at_end.iter().sum::<u64>() - at_start.iter().sum::<u64>();
    assert!(
        growth < 4096,
        "{at_start:?} KiB at the start, {at_end:?} at the end"
    );
    session.stdin = Some(writer.join().unwrap());
    session.end();
}

/// Until its first byte is sent.
#[test]
fn it_starts_fast() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = client(format!("ws://{}", listener.local_addr().unwrap()));
    command.env("NIX_RELAY_TOKEN", "junk");
    let time = |_| {
        let start = Instant::now();
        let mut session = Session::start(&mut command);
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let time = start.elapsed();
        let _ = session.child.kill();
        let _ = session.child.wait();
        time
    };
    let fastest = (0..20).map(time).min().unwrap();
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
}

/// Starts the client with a standard error that nobody reads.
#[test]
fn a_broken_standard_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = client("ws://127.0.0.1:1");
    command
        .env("NIX_RELAY_TOKEN", "junk")
        .env("NIX_RELAY_RETRY_SECS", "1")
        .stderr(writer);
    assert_eq!(
        command
            .stdout(Stdio::null())
            .stdin(Stdio::piped())
            .status()
            .unwrap()
            .code(),
        Some(1)
    );
}

#[test]
fn a_retry_after_without_end() {
    let later =
        "HTTP/1.1 503 Later\r\nRetry-After: 18446744073709551615\r\nContent-Length: 0\r\n\r\n";
    // The third pause is longer than a second.
    let mut command = client(format!("ws://{}", server(&[RESET, RESET, later])));
    command
        .env("NIX_RELAY_TOKEN", "junk")
        .env("NIX_RELAY_RETRY_SECS", "5");
    assert_eq!(failures(&mut command).len(), 2);
}

/// With sleeps that end at once: some doublings are more than there are seconds in a `Duration`.
#[test]
fn a_hundred_attempts() {
    let dir = Dir::new();
    let code = dir.write("sleep.c", "int clock_nanosleep(void) { return 0; }");
    let library = dir.path("sleep.so");
    let made = Command::new("cc")
        .args(["-shared", "-o"])
        .args([&library, &code])
        .status();
    assert!(made.unwrap().success());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = client(format!("ws://{}", listener.local_addr().unwrap()));
    command
        .env("NIX_RELAY_TOKEN", "junk")
        .env("NIX_RELAY_RETRY_SECS", u32::MAX.to_string());
    let mut session = Session::start(command.env("LD_PRELOAD", library));
    listener.set_nonblocking(true).unwrap();
    let mut attempts = 0;
    eventually("a hundred attempts", LIMIT, || {
        attempts += usize::from(listener.accept().is_ok());
        attempts == 100
    });
    assert!(
        session.child.try_wait().unwrap().is_none(),
        "{}",
        session.log.text()
    );
    session.child.kill().unwrap();
    session.child.wait().unwrap();
}

/// In the clear, anybody on the way could take it.
#[test]
fn a_secret_goes_only_where_it_is_safe() {
    let mut command = client("ws://127.0.0.1:1");
    command.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret");
    for url in [
        "http://tokens.invalid/",
        "ftp://localhost/",
        "tokens.invalid",
    ] {
        let line = failure(command.env("ACTIONS_ID_TOKEN_REQUEST_URL", url));
        assert_eq!(
            line,
            "no token from ACTIONS_ID_TOKEN_REQUEST_URL: it must be an https URL"
        );
    }
}

/// A relay of the test's own, with its one session in the hands of `then`.
fn one_session(then: impl FnOnce(WebSocket<TcpStream>) + Send + 'static) -> Command {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = client(format!("ws://{}", listener.local_addr().unwrap()));
    thread::spawn(move || then(tungstenite::accept(listener.accept().unwrap().0).unwrap()));
    command.env("NIX_RELAY_TOKEN", "junk");
    command
}

/// Bytes of a frame, what the client says, and the code that it answers with.
#[test]
fn what_no_relay_may_send() {
    for (frame, expected, code) in [
        (
            &b"\x88\x02\x03\xed"[..],
            "the relay ended the session: 1002: Protocol violation",
            1002,
        ),
        (
            b"\x81\x01x",
            "the session broke off: only binary messages carry data",
            1003,
        ),
        (
            b"\x81\x01\xff",
            "the session broke off: a text is not valid UTF-8",
            1007,
        ),
        (
            b"\x82\x7f\0\0\0\0\x10\0\0\0",
            "the session broke off: a message is longer than 4 MiB",
            1009,
        ),
        (
            b"\x83\x00",
            "the session broke off: WebSocket protocol error: Encountered invalid opcode: 3",
            1002,
        ),
    ] {
        let (sender, answer) = mpsc::channel();
        let mut command = one_session(move |mut peer| {
            peer.get_mut().write_all(frame).unwrap();
            let mut head = [0; 8];
            peer.get_mut().read_exact(&mut head).unwrap();
            let code = [head[6] ^ head[2], head[7] ^ head[3]];
            sender.send(u16::from_be_bytes(code)).unwrap();
        });
        assert_eq!(Session::start(&mut command).failure(), expected);
        assert_eq!(answer.recv_timeout(LIMIT).unwrap(), code, "{expected}");
    }
}

/// What is on its way back then is delivered, and the relay's Close decides.
#[test]
fn the_end_of_the_input() {
    for (code, reason, line) in [
        (1000, "", ""),
        (
            1011,
            "it \u{1b}broke",
            "nix-relay: the relay ended the session: 1011: it broke\n",
        ),
        (1001, "", "nix-relay: the relay ended the session: 1001\n"),
    ] {
        let mut command = one_session(move |mut peer| {
            assert_eq!(peer.read().unwrap(), Message::binary(b"last".to_vec()));
            assert!(peer.read().unwrap().is_close());
            // Not by tungstenite, which would first answer that.
            let stream = peer.get_mut();
            for _ in 0..100 {
                stream.write_all(b"\x82\x7e\xff\xff").unwrap();
                stream.write_all(&[b'x'; 0xffff]).unwrap();
            }
            stream.write_all(&[0x88, 2 + reason.len() as u8]).unwrap();
            stream.write_all(&u16::to_be_bytes(code)).unwrap();
            stream.write_all(reason.as_bytes()).unwrap();
            let _ = stream.read(&mut [0]);
        });
        let mut session = Session::start(&mut command);
        session.stdin.take().unwrap().write_all(b"last").unwrap();
        let mut data = Vec::new();
        session.stdout.read_to_end(&mut data).unwrap();
        assert_eq!(data.len(), 100 * 0xffff);
        assert_eq!(session.wait().success(), code == 1000);
        eventually("it has said why", LIMIT, || session.log.text() == line);
    }
}

/// It is asked again at once, but not all the time, and for as long as it may take.
#[test]
fn a_relay_that_stays_full() {
    let full = "HTTP/1.1 503 Full\r\nNix-Relay-Queue: full\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nfull";
    let (address, start) = (server(&[full, RESET, full]), Instant::now());
    let mut command = client(format!("ws://{address}"));
    command
        .env("NIX_RELAY_TOKEN", "junk")
        .env("NIX_RELAY_RETRY_SECS", "2");
    let lines = failures(command.env("NIX_RELAY_QUEUE_SECS", "4"));
    assert!(
        start.elapsed() > Duration::from_secs(4),
        "after {:?}",
        start.elapsed()
    );
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0], "all sessions are in use; waiting for up to 4 s");
    assert!(
        lines[1].contains("the connection broke") && lines[1].contains(TRYING),
        "{lines:?}"
    );
    assert_eq!(lines[2], "the relay refused: 503: full");
}

/// What a proxy says, and whether that may pass.
#[test]
fn answers_in_the_relays_place() {
    let place = "a proxy or web server answered in the relay's place: ";
    for (status, may_pass) in [
        ("521", true),
        ("408 Request Timeout", true),
        ("530", true),
        ("405 Not", false),
    ] {
        let code = &status[..3];
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\nerror code: {code}"
        );
        let mut command = client(format!("ws://{}", server(&[&answer])));
        command
            .env("NIX_RELAY_TOKEN", "junk")
            .env("NIX_RELAY_RETRY_SECS", "1");
        let lines = failures(&mut command);
        assert_eq!(lines.len(), 1 + usize::from(may_pass), "{lines:?}");
        assert_eq!(
            lines[0].starts_with(&format!("{place}{code}; ")),
            code.starts_with('5'),
            "{lines:?}"
        );
    }
    let old = "HTTP/1.0 503 Service Unavailable\r\n\r\n<html>";
    let line =
        failure_at_once(client(format!("ws://{}", server(&[old]))).env("NIX_RELAY_TOKEN", "junk"));
    assert!(
        line.ends_with("a proxy answered in the relay's place, by HTTP/1.0"),
        "{line}"
    );
}

/// A network that is there a moment later.
#[test]
fn no_route_to_the_relay() {
    let (issuer, network) = (Issuer::start(), Network::new());
    let relay = Setup::new(&issuer).set("LISTEN", "0.0.0.0:0").start();
    network.within(&format!("link set {}p down", network.name));
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{}", network.name))
        .arg(native())
        .arg("--stdio")
        .env_clear()
        .env(
            "NIX_RELAY_URL",
            format!("ws://{}:{}", network.address, relay.address.port()),
        )
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let mut session = Session::start(&mut command);
    let line = session.log.wait(TRYING);
    assert!(line.contains(": network is unreachable; "), "{line}");
    network.within(&format!("link set {}p up", network.name));
    assert_eq!(session.echo("x"), "x");
}

/// Answers each question about A or AAAA as told, with an address, a code, or nothing.
fn name_server(host: &str, answer: impl Fn(u8) -> Answer + Send + 'static) {
    let socket = UdpSocket::bind((host, 53)).unwrap();
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut packet) {
            let end = 12
                + packet[12..length]
                    .iter()
                    .position(|&byte| byte == 0)
                    .unwrap();
            let mut reply = packet[..end + 5].to_vec();
            let (code, data) = match answer(reply[end + 2]) {
                Answer::Silence => continue,
                Answer::Code(code) => (code, None),
                Answer::Address(address) => (0, Some(address)),
            };
            reply[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0]);
            if let Some(address) = data {
                reply[7] = 1;
                reply.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04");
                reply.extend(address);
            }
            socket.send_to(&reply, peer).unwrap();
        }
    });
}

enum Answer {
    Silence,
    Code(u8),
    Address([u8; 4]),
}

/// What is run with arguments that follow, and knows these name servers alone.
fn with_dns(resolv_conf: &str) -> Command {
    let dir = Dir::new();
    let mounts = "mount --bind \"$0\" /etc/resolv.conf && mount --bind \"$1\" /etc/nsswitch.conf && \
        rm -r \"${0%/*}\" && shift && exec \"$@\"";
    let mut command = Command::new(project("test/support/own-mounts"));
    command
        .arg(mounts)
        .arg(dir.write("resolv.conf", resolv_conf));
    command.arg(dir.write("nsswitch.conf", "hosts: files dns\n"));
    std::mem::forget(dir);
    command
}

/// The client for a relay of this name.
fn client_with_dns(url: &str, resolv_conf: &str) -> Command {
    let mut command = with_dns(resolv_conf);
    command
        .arg(native())
        .arg("--stdio")
        .env_clear()
        .stdin(Stdio::piped());
    command
        .env("NIX_RELAY_URL", url)
        .env("NIX_RELAY_TOKEN", "junk");
    command
}

const A: u8 = 1;

/// All of it may pass.
#[test]
fn name_servers_that_fail() {
    name_server("127.1.0.1", |_| Answer::Code(2));
    name_server("127.1.0.2", |_| Answer::Code(3));
    name_server("127.1.0.3", |_| Answer::Silence);
    let fails = "cannot reach wss://relay.example.com:1/relay: ";
    // Only a name that does not exist is given up at once.
    for (conf, expected, lines) in [
        (
            "nameserver 127.1.0.1",
            "cannot resolve relay.example.com: temporary failure in name resolution",
            2,
        ),
        (
            "nameserver 127.1.0.2",
            "cannot resolve relay.example.com: name or service not known",
            1,
        ),
        (
            "nameserver 127.1.0.3\noptions timeout:30",
            "no answer from the name servers within 20 s",
            2,
        ),
    ] {
        let mut command = client_with_dns("wss://relay.example.com:1", conf);
        let said = failures(command.env("NIX_RELAY_RETRY_SECS", "22"));
        assert_eq!(said.len(), lines, "{said:?}");
        assert!(
            said.iter()
                .all(|line| line.starts_with(&format!("{fails}{expected}"))),
            "{said:?}"
        );
    }
}

/// The first name server is silent, as it is for five seconds, and then no time is missing.
#[test]
fn a_name_server_that_is_silent() {
    name_server("127.1.0.4", |_| Answer::Silence);
    name_server("127.1.0.5", |kind| match kind {
        A => Answer::Address([127, 0, 0, 1]),
        _ => Answer::Code(0),
    });
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let url = format!("ws://relay.example.com:{}", relay.address.port());
    let mut command = client_with_dns(&url, "nameserver 127.1.0.4\nnameserver 127.1.0.5");
    let mut session = Session::start(command.env("NIX_RELAY_TOKEN", issuer.token()));
    assert_eq!(session.echo("x"), "x");
}

/// NO_PROXY for hosts on port 1, where nobody listens, and whether a proxy is asked for them.
#[test]
fn hosts_that_need_no_proxy() {
    let (dir, network) = (Dir::new(), Network::new());
    let hosts = dir.write("hosts", "127.0.0.1 relay.example.com\n");
    let address = &*network.address;
    let (net, host) = address.rsplit_once('.').unwrap();
    let name = "relay.example.com";
    for (list, host, by_proxy) in [
        ("example.com", name, false),
        ("other,.example.com", name, false),
        ("other *.example.com", name, false),
        ("EXAMPLE.com.", name, false),
        ("relay.example.com:1", name, false),
        ("relay.example.com:2", name, true),
        ("*", name, false),
        ("ample.com", name, true),
        ("", name, true),
        (",.,", name, true),
        ("example.com", "relay.example.com.", false),
        (address, address, false),
        (&format!("{address}:1"), address, false),
        (&format!("{net}.0/24"), address, false),
        (&format!("{address}/8"), address, false),
        (&format!("{net}.255/32"), address, true),
        (&format!("{net}.0/33"), address, true),
        (host, address, true),
        ("::/0", address, true),
    ] {
        let mut command = with_hosts(&hosts, native());
        command
            .arg("--stdio")
            .env_clear()
            .env("NIX_RELAY_TOKEN", "junk")
            .stdin(Stdio::piped());
        command
            .env("NIX_RELAY_URL", format!("wss://{host}:1"))
            .env("NO_PROXY", list);
        let line = failure_at_once(command.env("HTTPS_PROXY", "http://127.0.0.1:2"));
        assert_eq!(
            line.contains(" through the proxy 127.0.0.1:2: "),
            by_proxy,
            "{list}: {line}"
        );
    }
}

/// curl prefers small letters, and those for https to those for all.
#[test]
fn the_proxy_that_counts() {
    let all = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    for first in 0..all.len() {
        let mut command = client("wss://relay.invalid");
        command
            .env("NIX_RELAY_TOKEN", "junk")
            .env("HTTP_PROXY", "http://127.0.0.1:9");
        for (port, name) in all.iter().enumerate().skip(first) {
            command.env(name, format!("127.0.0.1:{}", port + 1));
        }
        let line = failure_at_once(&mut command);
        assert!(
            line.contains(&format!(" through the proxy 127.0.0.1:{}: ", first + 1)),
            "{line}"
        );
    }
}

/// A server that leaves out a certificate in between, one that wants a certificate itself, and files that are not
/// there or elsewhere.
#[test]
fn what_mends_a_certificate() {
    let dir = certificates();
    let make = "
        new='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config /dev/null -subj /CN=x'
        openssl req -x509 $new -CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:TRUE \
            -keyout between.key -out between.pem
        openssl req -x509 $new -CA between.pem -CAkey between.key -addext subjectAltName=IP:127.0.0.1 \
            -addext basicConstraints=critical,CA:FALSE -keyout leaf.key -out leaf.pem";
    let made = Command::new("sh")
        .args(["-ec", make])
        .current_dir(dir.path(""))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", texts(&made).1);
    let says = |(_, address): &(Server, SocketAddr), name: &str, file: &Path| {
        let mut command = client(format!("wss://{address}"));
        command.env("NIX_RELAY_TOKEN", "junk").env(name, file);
        let line = failure_at_once(&mut command);
        line.split_once("/relay: ").unwrap().1.to_owned()
    };
    let unknown = "the certificate is not trusted: unknown issuer; does the server send its intermediate certificates? Otherwise,";
    let (ca, missing) = (dir.path("ca.pem"), Path::new("/no-cert-file.crt"));
    let leaf = serve_tls(&dir, "leaf", &["-WWW"]);
    let line = says(&leaf, "SSL_CERT_FILE", &ca);
    assert_eq!(
        line,
        format!(
            "{unknown} SSL_CERT_FILE={} lacks its CA, or is not there",
            ca.display()
        )
    );
    let line = says(&leaf, "SSL_CERT_FILE", missing);
    assert_eq!(
        line,
        format!("{unknown} SSL_CERT_FILE=/no-cert-file.crt lacks its CA, or is not there")
    );
    let whole = serve_tls(&dir, "leaf", &["-WWW", "-cert_chain", "between.pem"]);
    let line = says(&whole, "NIX_SSL_CERT_FILE", &ca);
    assert_eq!(line, "a proxy answered in the relay's place, by HTTP/1.0");
    let wants = serve_tls(&dir, "good", &["-Verify", "1"]);
    let line = says(&wants, "SSL_CERT_FILE", &ca);
    assert!(
        line.contains("does it want a client certificate?"),
        "{line}"
    );
}

/// What it prints is the token of that attempt; its arguments are not for everybody to read.
#[test]
fn a_command_for_the_token() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "0")
        .start();
    let file = dir.write("token", "not.yet\n");
    let mut command = client_of(&relay, &issuer);
    command
        .env_remove("NIX_RELAY_TOKEN")
        .envs(token_variables(&issuer))
        .env("PATH", "/bin:/usr/bin");
    let script = format!("cat /proc/$$/cmdline >{0}.ran; cat {0}", file.display());
    command.env("NIX_RELAY_TOKEN_COMMAND", script);
    assert!(failure(&mut command).starts_with("the relay refused: 401: "));
    let ran = fs::read_to_string(dir.path("token.ran")).unwrap();
    assert_eq!(ran, "sh\0-c\0eval \"$NIX_RELAY_TOKEN_COMMAND\"\0");
    dir.write("token", &issuer.token());
    let mut session = Session::start(&mut command);
    assert_eq!(session.echo("x"), "x");
    let mut waiting = Session::start(&mut command);
    waiting.log.wait("all sessions are in use");
    fs::remove_file(&file).unwrap();
    waiting.log.wait("No such file");
    assert!(
        waiting
            .log
            .wait(TRYING)
            .contains("it ended with exit status: 1")
    );
    dir.write("token", &issuer.token());
    session.end();
    assert_eq!(waiting.echo("x"), "x");
}

#[test]
fn a_command_that_gives_no_token() {
    let mark = "mark-of-a-token-command";
    for (script, retried, said) in [
        (
            "exit 3",
            true,
            "no token from NIX_RELAY_TOKEN_COMMAND: it ended with exit status: 3",
        ),
        ("nonsense-of-the-test 2>/dev/null", true, "exit status: 127"),
        ("yes", false, "it printed more than 16 KiB"),
        (
            "echo a b",
            false,
            "the token from NIX_RELAY_TOKEN_COMMAND contains invalid characters",
        ),
        (
            "true",
            false,
            "the token from NIX_RELAY_TOKEN_COMMAND contains invalid characters",
        ),
        (
            "MARK=mark-of-a-token-command sleep 1000 & exec sleep 1000",
            true,
            "it did not end within 30 s",
        ),
    ] {
        let mut command = client("ws://127.0.0.1:1");
        command
            .env("NIX_RELAY_TOKEN_COMMAND", script)
            .env("PATH", "/bin:/usr/bin");
        let lines = failures(command.env(
            "NIX_RELAY_RETRY_SECS",
            if script.contains("MARK") { "31" } else { "1" },
        ));
        assert_eq!(lines.len(), 1 + usize::from(retried), "{lines:?}");
        assert!(lines.iter().all(|line| line.contains(said)), "{lines:?}");
    }
    assert!(!anyone_with(mark));
}

/// Each command of nix/providers.md, with stand-ins that print a token if they are asked as they should be.
#[test]
fn commands_of_the_page() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let (relay, token) = (Relay::start(&issuer), issuer.token());
    dir.write("nix-relay", &token);
    let relay_url = "https://relay.example.com";
    for (program, check) in [
        (
            "buildkite-agent",
            format!("[ \"$*\" = 'oidc request-token --audience {relay_url}' ]"),
        ),
        (
            "gcloud",
            format!("[ \"$*\" = 'auth print-identity-token --audiences={relay_url}' ]"),
        ),
        (
            "vault",
            "[ \"$*\" = 'read -field=token identity/oidc/token/nix-relay' ]".into(),
        ),
        (
            "curl",
            format!(
                "case \"$*\" in *secret*) exit 1 ;; *POST*'https://azure?'*) grep -q 'Bearer secret\"$' ;; \
            *Google*'&audience={relay_url}') ;; *) exit 1 ;; esac"
            ),
        ),
        (
            "jq",
            "[ \"$*\" = '-er .oidcToken' ] && cat >/dev/null".into(),
        ),
    ] {
        dir.script(
            program,
            &format!("set -e\n{check}\ncat {}", dir.path("nix-relay").display()),
        );
    }
    let page = fs::read_to_string(project("nix/providers.md")).unwrap();
    let table = page
        .split_once("| `NIX_RELAY_TOKEN_COMMAND` |\n| --- | --- |\n")
        .unwrap()
        .1;
    let rows: Vec<&str> = table
        .lines()
        .take_while(|line| line.starts_with("| "))
        .collect();
    assert_eq!(rows.len(), 6);
    for row in rows {
        let command = row
            .split_once(" | `")
            .unwrap()
            .1
            .strip_suffix("` |")
            .unwrap();
        let command = command
            .replace("\\|", "|")
            .replace("/var/run/secrets/tokens", dir.path("").to_str().unwrap());
        let mut client = client(format!("ws://{}", relay.address));
        client.env("PATH", format!("{}:/bin:/usr/bin", dir.path("").display()));
        client
            .env("SYSTEM_ACCESSTOKEN", "secret")
            .env("SYSTEM_OIDCREQUESTURI", "https://azure");
        let mut session = Session::start(client.env("NIX_RELAY_TOKEN_COMMAND", &command));
        assert_eq!(session.echo("x"), "x", "{command}");
        session.end();
    }
}

/// The relay has its keys although each of two lookups takes five seconds.
#[test]
fn an_issuer_whose_name_takes_long() {
    name_server("127.1.0.6", |_| Answer::Silence);
    name_server("127.1.0.7", |kind| match kind {
        A => Answer::Address([127, 0, 0, 1]),
        _ => Answer::Code(0),
    });
    let issuer = Issuer::start();
    let url = issuer.url().replace("127.0.0.1", "issuer.localhost");
    let document = json!({"issuer": url, "jwks_uri": format!("{url}/jwks")});
    issuer.answer(
        "/.well-known/openid-configuration",
        200,
        &document.to_string(),
    );
    let mut command = with_dns("nameserver 127.1.0.6\nnameserver 127.1.0.7");
    command.arg(native());
    let relay = Setup::of(command, &issuer).set("ISSUER", &url).start();
    relay.log.wait("fetched keys");
    assert!(
        !relay.log.text().contains("could not fetch"),
        "{}",
        relay.log.text()
    );
}

/// Of the two addresses of the token endpoint, the first never answers.
#[test]
fn all_addresses_of_a_token_endpoint_are_tried() {
    let (issuer, dir) = (Issuer::on("127.0.0.6:0"), Dir::new());
    let port: SocketAddr = issuer.url()["http://".len()..].parse().unwrap();
    let _hole = black_hole(SocketAddrV4::new([127, 0, 0, 5].into(), port.port()));
    let hosts = dir.write(
        "hosts",
        "127.0.0.5 tokens.localhost\n127.0.0.6 tokens.localhost\n",
    );
    let mut command = with_hosts(&hosts, native());
    command
        .arg("--stdio")
        .env_clear()
        .stdin(Stdio::piped())
        .env("NIX_RELAY_URL", "ws://127.0.0.1:1");
    command.envs(token_variables(&issuer));
    let url = format!("http://tokens.localhost:{}/token", port.port());
    let start = Instant::now();
    let line = failure_at_once(command.env("ACTIONS_ID_TOKEN_REQUEST_URL", url));
    assert!(
        line.starts_with("cannot reach ws://127.0.0.1:1/relay: "),
        "{line}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "after {:?}",
        start.elapsed()
    );
}

/// The relay reads the same variables for an issuer, and trusts an own authority beside the public ones.
#[test]
fn an_issuer_with_an_authority_of_its_own() {
    let (issuer, dir) = (Issuer::start(), certificates());
    let (_server, address) = serve_tls(&dir, "good", &["-WWW"]);
    let url = format!("https://localhost:{}", address.port());
    let document = json!({"issuer": url, "jwks_uri": format!("{url}/jwks")});
    fs::create_dir(dir.path(".well-known")).unwrap();
    dir.write(".well-known/openid-configuration", &document.to_string());
    dir.write("jwks", &json!({"keys": issuer::published()}).to_string());
    let with = |name: &str, path: &str| {
        let setup = Setup::new(&issuer).set("ISSUER", &url);
        setup.env(name, path).start()
    };
    let authority = dir.path("ca.pem");
    let relay = with("NIX_SSL_CERT_FILE", authority.to_str().unwrap());
    relay.log.wait("fetched keys");
    let relay = with("SSL_CERT_FILE", "/no-cert-file.crt");
    let line = relay.log.wait("could not fetch keys");
    assert!(line.contains("UnknownIssuer"), "{line}");
    let setup = Setup::new(&issuer).set("ISSUER", "https://issuer.invalid");
    let relay = setup
        .env("HTTPS_PROXY", "http://127.0.0.1:1")
        .env("NO_PROXY", "invalid")
        .start();
    let line = relay.log.wait("could not fetch keys");
    assert!(line.contains("failed to lookup"), "{line}");
}

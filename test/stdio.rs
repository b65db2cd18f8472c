//! `nix-relay --stdio`, the client in the relay's binary: where it finds a token, when it tries again, what it says,
//! and what it leaves behind. What it does for a real nix is in nix.rs.

use crate::peers::Network;
use crate::proxies::{NGINX, Running};
use crate::support::{nix::*, *};
use rustix::net::{self, AddressFamily, SocketType, connect_unspec};
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

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
        let text = self.log.text();
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
fn each_token_source_in_its_order() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    let mut number = 0;
    let mut who = |command: &mut Command| {
        number += 1;
        let mut session = Session::start(command);
        assert_eq!(session.echo("x"), "x");
        session.end();
        let line = relay.log.wait(&format!("session opened session={number} "));
        line.split("sub=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .to_owned()
    };
    let named = |name: &str| issuer.token_with(json!({"sub": name}));

    let mut command = client(format!("ws://{}", relay.address));
    assert_eq!(who(command.env(CIRCLE, named("circle"))), "circle");
    assert_eq!(who(command.env(GITLAB, named("gitlab"))), "gitlab");
    command.envs(token_variables(&issuer));
    assert_eq!(
        who(&mut command),
        "repo:example-org/project:ref:refs/heads/main"
    );
    assert_eq!(who(command.env("NIX_RELAY_TOKEN", named("given"))), "given");
    command.env("NIX_RELAY_URL", format!("ws://{}\r\n", relay.address));
    assert_eq!(
        who(command.env("NIX_RELAY_TOKEN", named("line") + "\r\n")),
        "line"
    );
    let empty = command
        .env("NIX_RELAY_TOKEN", "")
        .env("ACTIONS_ID_TOKEN_REQUEST_URL", "");
    assert_eq!(who(empty), "gitlab");

    let asked = issuer.requests();
    assert!(
        asked.contains(&"/token?audience=api%3A%2F%2Fnix-relay".into()),
        "{asked:?}"
    );
}

#[test]
fn the_audience_is_asked_for() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .set("AUDIENCE", "https://relay:1/a")
        .start();
    let mut command = client(format!("ws://{}/relay", relay.address));
    command.envs(token_variables(&issuer));
    assert!(failure(&mut command).starts_with("the relay refused: 401: "));
    command.env("NIX_RELAY_AUDIENCE", "https://relay:1/a");
    command.env(
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        format!("{}/token?a=b", issuer.url()),
    );
    assert_eq!(Session::start(&mut command).echo("x"), "x");
    let (asked, query) = (
        issuer.requests(),
        "/token?a=b&audience=https%3A%2F%2Frelay%3A1%2Fa",
    );
    assert!(asked.iter().any(|url| url == query), "{asked:?}");
}

#[test]
fn what_cannot_be_is_said_before_anything_is_sent() {
    for (url, is) in [
        ("", "not set"),
        ("https://relay", "'https://relay'"),
        ("relay:80", "'relay:80'"),
        ("ws://", "'ws://'"),
        ("ws://:80", "'ws://:80'"),
        ("ws://relay:99999", "'ws://relay:99999'"),
        ("ws://re lay", "'ws://re lay'"),
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
            format!("the token in NIX_RELAY_TOKEN contains invalid characters: {alone}")
        );
    }
    for name in ["NIX_RELAY_KEEPALIVE_SECS", "NIX_RELAY_RETRY_SECS"] {
        let line = failure(client(relay).env(name, "1m"));
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
    for file in ["/no/such/file", "/dev/null"] {
        let line = failure(client("wss://localhost").env("SSL_CERT_FILE", file));
        assert!(
            line.starts_with(&format!("SSL_CERT_FILE={file}: ")),
            "{line}"
        );
    }
}

/// What Nix passes for a store of ssh://.
#[test]
fn the_other_protocol_of_nix() {
    let remote = Runner::alone()
        .with(native())
        .remote()
        .replace("ssh-ng://", "ssh://");
    let output = Runner::alone()
        .nix(&["store", "ping", "--store", &remote])
        .output()
        .unwrap();
    let (_, log) = texts(&output);
    assert!(!output.status.success());
    assert!(
        log.contains("nix-relay: use ssh-ng:// instead of ssh://, as in ssh-ng://localhost?"),
        "{log}"
    );
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
        let expected = format!("{from}it answered with status {status}");
        assert_eq!(failure(&mut command), expected);
    }
    for junk in [
        "",
        "<html>",
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
    issuer.answer("/token", 200, "{\"value\": \"a b\"}");
    let invalid = "the token from ACTIONS_ID_TOKEN_REQUEST_URL contains invalid characters";
    assert_eq!(failure(&mut command), invalid);
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
    let line = "nix-relay: no token from ACTIONS_ID_TOKEN_REQUEST_URL: it answered with status 500; trying again for up to 60 s\n";
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
    let refused = "connection refused; does the relay run, and is the port right?";
    assert_eq!(cause("ws://127.0.0.1:1/relay"), refused);
    assert_eq!(cause("ws://[::1]:1/relay"), refused);
    assert_eq!(
        cause("wss://nowhere.invalid/relay"),
        "cannot resolve nowhere.invalid; is the name right?"
    );
    assert_eq!(from(&[RESET]), "connection reset; does the relay run?");
    assert_eq!(
        from(&[""]),
        "the connection was closed without an answer; does the relay run?"
    );
    let no_http = "its answer is not HTTP; is it a relay that listens there?";
    assert_eq!(from(&["SSH-2.0-OpenSSH_9.2\r\n"]), no_http);
    let no_key = "HTTP/1.1 101 Hello\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n";
    assert_eq!(
        from(&[no_key]),
        "its answer is not a WebSocket handshake: wrong Sec-WebSocket-Accept"
    );

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
            format!("ws://{silent}"),
            "no answer within 40 s; is it a relay that listens there?",
        ),
        (
            format!("wss://{tls_address}"),
            "no answer within 40 s; is it a relay that listens there?",
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
                // Not tried again, though there would be time.
                assert_eq!(
                    failure(&mut command),
                    format!("cannot reach {url}/relay: {expected}")
                );
                assert!(start.elapsed() > Duration::from_secs(9) && start.elapsed() < LIMIT);
            });
        }
    });
}

/// A name with two addresses, of which the first never answers.
#[test]
fn all_addresses_of_a_name_are_tried() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let relay = Setup::new(&issuer).set("LISTEN", "127.0.0.4:0").start();
    let _hole = black_hole(SocketAddrV4::new(
        [127, 0, 0, 1].into(),
        relay.address.port(),
    ));
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
        .env("NIX_RELAY_TOKEN", issuer.token())
        .stdin(Stdio::piped());
    let start = Instant::now();
    let mut session = Session::start(&mut command);
    assert_eq!(session.echo("x"), "x");
    // The first has not had all of the time for both.
    assert!(
        start.elapsed() < Duration::from_secs(9),
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
fn certificates() -> Dir {
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
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// OpenSSL's server with one of these certificates. It says nothing, or with `-WWW` answers requests.
fn serve_tls(dir: &Dir, name: &str, arguments: &[&str]) -> (Server, SocketAddr) {
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
    let hint = "; if the CA is your own, set SSL_CERT_FILE to its certificate";
    for (name, with_ca, cause) in [
        ("good", false, format!("unknown issuer{hint}")),
        ("expired", true, "it has expired".into()),
        ("early", true, "it is not valid yet".into()),
        (
            "other",
            true,
            "it is for another name than 127.0.0.1".into(),
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
        assert_eq!(failure(&mut command), expected);
    }
}

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
        let line =
            failure(client(format!("ws://{}/{path}", relay.address)).env("NIX_RELAY_TOKEN", token));
        let request = upgrade_request(&format!("Authorization: Bearer {token}\r\n"));
        let answer = relay.exchange(request.replace("/relay", &format!("/{path}")).as_bytes());
        let body = answer.split("\r\n\r\n").nth(1).unwrap().trim();
        assert_eq!(line, format!("the relay refused: {status}: {body}"));
        // Once by it, and once for the body.
        let refused = format!(" status={status} ");
        eventually("both are in the log", LIMIT, || {
            relay.log.text().matches(&refused).count() == 2
        });
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
    let text = "HTTP/1.1 403 No\r\nContent-Length: 5000000\r\n\r\nnot\u{7} you\nnor anyone else";
    for (answer, expected) in [
        (
            page,
            "a proxy or web server answered in the relay's place: 404: [31mNot found; does the relay run, and is NIX_RELAY_URL right?",
        ),
        (text, "the relay refused: 403: not you"),
        (
            "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n",
            "the relay refused: 403: Forbidden",
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
    let line = session.log.wait(TRYING);
    assert!(
        line.starts_with("nix-relay: the relay refused: 503: "),
        "{line}"
    );
    assert!(line.ends_with("trying again for up to 60 s"), "{line}");
    only.close();
    assert_eq!(session.echo("x"), "x");
    assert_eq!(session.log.text().lines().count(), 1);
}

/// And the last words when the time is over.
#[test]
fn a_relay_that_stays_broken() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("DAEMON_PATH", "/nothing").start();
    let mut command = client_of(&relay, &issuer);
    let lines = failures(command.env("NIX_RELAY_RETRY_SECS", "2"));
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines
            .iter()
            .all(|line| line.starts_with("the relay refused: 502: ")),
        "{lines:?}"
    );
    assert!(
        lines[0].ends_with("trying again for up to 2 s"),
        "{lines:?}"
    );
    assert!(relay.log.text().matches(" status=502 ").count() >= 2);
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

/// A client that waits has no input to miss.
#[test]
fn a_pause_ends_with_nix() {
    let mut command = client("ws://127.0.0.1:1");
    let session = Session::start(command.env("NIX_RELAY_TOKEN", "junk"));
    session.log.wait(TRYING);
    let Session {
        mut child,
        stdin,
        stdout,
        ..
    } = session;
    drop((stdin, stdout));
    let start = Instant::now();
    assert_eq!(wait(&mut child, LIMIT).code(), Some(1));
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "it went on trying"
    );
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
    let untrusted = "the certificate is not trusted: it is for another name than relay.test";
    assert_eq!(line, format!("cannot reach {url}: {untrusted}"));
    log.wait("CONNECT relay.test:");
    let line = failure(&mut through("", "relay.test"));
    assert_eq!(
        line,
        format!("cannot reach {url}: the proxy of HTTPS_PROXY refused: 407")
    );
    let line = failure(through("", "relay.test").env("NO_PROXY", "relay.test"));
    assert_eq!(
        line,
        format!("cannot reach {url}: cannot resolve relay.test; is the name right?")
    );
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

    let (mut session, data) = ends(daemon("read line; head -c 1000000 /dev/zero; echo end"));
    assert!(
        data.len() == 1_000_004 && data.ends_with("end\n"),
        "{} bytes",
        data.len()
    );
    assert_eq!((session.wait().code(), &*session.log.text()), (Some(0), ""));
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
    let proxy = Proxy::start(&relay);
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
        format!("the session broke off: connection reset{restarted}")
    );
    let session = through(relay.address);
    relay.signal("KILL");
    relay.wait();
    assert_eq!(
        session.failure(),
        format!("the session broke off: the connection was closed{restarted}")
    );
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
fn no_secret_is_given_to_another_process() {
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
    let started = descendants(session.child.id());
    assert!(!started.is_empty());
    let mut all = seen(session.child.id(), "cmdline");
    all.extend(
        started
            .iter()
            .map(|&id| seen(id, "cmdline") + &seen(id, "environ")),
    );
    assert!(all.contains("NIX_RELAY_URL="));
    for secret in [issuer::REQUEST_TOKEN, "ey.", "eyJ"] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
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

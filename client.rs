//! `nix-relay --stdio`: connects standard input and output to a relay, as Nix's
//! `remote-program`. Finds a token, connects, tries again where that may help, and says in one
//! line why there is no session or how it ended. Promises that each secret is only ever sent to
//! the server that it is for, and never appears in an argument list, a child's environment or a
//! message.

use crate::copy::{End, Keepalive, Link, Patience, Pipes, Wire};
use crate::util::{is_loopback, proxy_from_env, secs, trusted_roots, web_agent};
use crate::{poll, util};
use jwt_simple::{prelude::Base64, reexports::ct_codecs::Encoder};
use rustix::event::{PollFd, PollFlags};
use rustix::io::{FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::pipe::fcntl_setpipe_size;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{env, fs, thread};
use tungstenite::handshake::{client::generate_key, derive_accept_key};
use tungstenite::protocol::{Role, frame::coding::CloseCode};
use ureq::http::{StatusCode, Uri};
use ureq::{Proxy, ProxyProtocol};

const AGENT: &str = concat!("nix-relay/", env!("CARGO_PKG_VERSION"));

/// For connecting by TCP, and again for the TLS handshake.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
const TCP_LATE: &str = "no connection within 10 s; is a firewall in the way?";
const TLS_LATE: &str = "no TLS handshake within 10 s; does that port speak TLS?";
/// For the relay's answer. A full relay keeps its clients waiting for `queue_timeout_secs`,
/// which is 30 by default.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);
const ANSWER_LATE: &str = "no answer within 40 s; is it a relay that listens there?";
/// For the whole request to the token endpoint.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);
const TOKEN_LATE: &str = "no answer within 30 s";
/// The pause between attempts, which doubles each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// The size of the two pipes to Nix. With smaller ones, Nix and the client often wait for
/// each other.
const PIPE_BYTES: usize = 512 << 10;
/// Limits on an answer's head and body.
const MAX_HEADERS: usize = 128;
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// How much of a text from the other side is shown.
const MAX_SHOWN_CHARS: usize = 400;
/// Characters that change the direction of writing (Unicode Standard Annex 9).
const TURNS: [char; 12] = [
    '\u{61C}', '\u{200E}', '\u{200F}', '\u{202A}', '\u{202B}', '\u{202C}', '\u{202D}', '\u{202E}',
    '\u{2066}', '\u{2067}', '\u{2068}', '\u{2069}',
];

/// The variables that hold a job's token, or the secret to get one with.
const NIX_RELAY: &str = "NIX_RELAY_TOKEN";
const ACTIONS_URL: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
const ACTIONS: &str = "ACTIONS_ID_TOKEN_REQUEST_TOKEN";
const GITLAB: &str = "GITLAB_OIDC_TOKEN";
const CIRCLE: &str = "CIRCLE_OIDC_TOKEN_V2";
const SECRETS: [&str; 4] = [NIX_RELAY, ACTIONS, GITLAB, CIRCLE];
/// The descriptor from which the child reads the secrets.
const SECRETS_FD: &str = "NIX_RELAY_SECRETS_FD";

const NO_TOKEN: &str = "no token: set NIX_RELAY_TOKEN, or let the job have one: \
    GitHub or Forgejo (permission id-token: write) sets ACTIONS_ID_TOKEN_REQUEST_URL and \
    _TOKEN, GitLab (id_tokens) GITLAB_OIDC_TOKEN, CircleCI CIRCLE_OIDC_TOKEN_V2";
/// The message when Nix passes --serve.
pub const WRONG_STORE: &str =
    "use ssh-ng:// instead of ssh://, as in ssh-ng://localhost?remote-program=nix-relay";
const FOR_NIX: &str =
    "this is for Nix to run: nix build --store 'ssh-ng://localhost?remote-program=nix-relay'";

/// The secret variables that are set, and their values.
type Secrets = BTreeMap<String, String>;
/// A connection to a relay that has answered 101.
struct Session {
    socket: TcpStream,
    tls: Option<ClientConnection>,
    /// The bytes that came after the answer's head.
    rest: Vec<u8>,
}

pub fn run() -> ExitCode {
    if io::stdin().is_terminal() || io::stdout().is_terminal() {
        return fail(FOR_NIX);
    }
    let Some(secrets) = secrets() else {
        return ExitCode::FAILURE;
    };
    if let Some(status) = run_in_child(&secrets) {
        return status;
    }

    match carry(&secrets) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(text) => fail(&text),
    }
}

fn fail(text: &str) -> ExitCode {
    eprintln!("nix-relay: {text}");
    ExitCode::FAILURE
}

/// The secrets from the environment, or in the child those that its parent passes on. None
/// if the parent has ended.
fn secrets() -> Option<Secrets> {
    if let Some(number) = variable(SECRETS_FD) {
        let pipe = fs::File::open(format!("/proc/self/fd/{number}")).ok()?;
        return serde_json::from_reader(pipe).ok();
    }

    let found = |name: &str| Some((name.to_owned(), variable(name)?));
    Some(SECRETS.into_iter().filter_map(found).collect())
}

/// Runs the client as a child and waits for it. Nix kills the process that it started as
/// soon as it is done. The child survives that, sees the end of its input, and sends a
/// Close, so the relay can tell a session that is over from one whose client has vanished.
/// Returns None in the child itself, and if no child can be started.
fn run_in_child(secrets: &Secrets) -> Option<ExitCode> {
    if variable(SECRETS_FD).is_some() {
        return None;
    }
    let (reader, writer) = io::pipe().ok()?;
    fcntl_setfd(&reader, FdFlags::empty()).ok()?;

    // In a process group of its own, the child is also safe from Ctrl-C.
    let mut command = Command::new(env::current_exe().ok()?);
    command.arg("--stdio").process_group(0);
    for name in SECRETS {
        command.env_remove(name);
    }
    command.env(SECRETS_FD, reader.as_raw_fd().to_string());
    let mut child = command.spawn().ok()?;

    // This fails if the child has ended already; then it has also said why.
    drop(reader);
    let _ = serde_json::to_writer(writer, secrets);
    let ended_well = child.wait().is_ok_and(|status| status.success());
    Some(ExitCode::from(u8::from(!ended_well)))
}

/// Runs the client, from reading its settings to the end of the session. Returns whether the
/// session ended well, or else a message.
fn carry(secrets: &Secrets) -> Result<bool, String> {
    let relay = Relay::from_environment()?;
    let keepalive = seconds("NIX_RELAY_KEEPALIVE_SECS", 30)?;
    let budget = seconds("NIX_RELAY_RETRY_SECS", 60)?;
    if relay.tls.is_none() && !is_loopback(&relay.host) {
        let host = &relay.host;
        eprintln!("nix-relay: warning: the token goes unencrypted to {host}; use wss:// instead");
    }

    let connected = end_without_reader().map_err(|e| format!("cannot start a thread: {e}"))?;
    let session = connect(&relay, secrets, secs(budget))?;
    connected.store(true, Ordering::Relaxed);
    copy(session, keepalive).unwrap_or_else(|e| Err(e.to_string()))
}

fn copy(session: Session, keepalive: u32) -> io::Result<Result<bool, String>> {
    let socket = Arc::new(session.socket);
    let mut keepalive = Keepalive::new(&socket, keepalive)?;
    let link = Link::new(Wire::new(socket, session.tls)?, Role::Client)?;
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let pipes = Pipes {
        source: stdin.as_fd(),
        source_ended: None,
        sink: stdout.as_fd(),
    };

    for pipe in [pipes.source, pipes.sink] {
        ioctl_fionbio(pipe, true)?;
        // An unprivileged user may be refused this.
        let _ = fcntl_setpipe_size(pipe, PIPE_BYTES);
    }
    link.run(&[], session.rest, &pipes, || {
        while link.end().is_none() {
            let until = keepalive.check(&link);
            poll::ready([Some(link.over())], until);
        }
    })?;
    if !matches!(link.end(), Some(End::Gone(_))) {
        link.close(Some(CloseCode::Normal), "", &Patience::short());
    }
    Ok(describe(link.end()))
}

fn describe(end: Option<&End>) -> Result<bool, String> {
    Err(match end {
        Some(End::SourceEnded) => return Ok(true),
        Some(End::SinkClosed) => return Ok(false),
        Some(End::Closed(Some(close))) if close.code == CloseCode::Normal => return Ok(true),
        Some(End::Closed(Some(close))) => {
            let said = with(&u16::from(close.code).to_string(), &plain(&close.reason));
            format!("the relay ended the session: {said}")
        }
        Some(End::Closed(None)) => "the relay ended the session without a reason".into(),
        Some(End::Gone(how)) => {
            format!("the session broke off: {how}; was the relay or a proxy restarted?")
        }
        Some(End::Violation(_, what)) => format!("the session broke off: {}", plain(what)),
        _ => "the session broke off".into(),
    })
}

/// Until there is a session, ends the process when nobody reads its output any more, which
/// its waits and pauses would not notice.
fn end_without_reader() -> io::Result<Arc<AtomicBool>> {
    let connected = Arc::new(AtomicBool::new(false));
    let seen = connected.clone();
    let watch = move || {
        let stdout = io::stdout();
        let [gone] = poll::ready([Some(PollFd::new(&stdout, PollFlags::empty()))], None);
        if !gone.is_empty() && !seen.load(Ordering::Relaxed) {
            process::exit(1);
        }
    };
    thread::Builder::new().spawn(watch)?;
    Ok(connected)
}

/// Opens a session, with as many attempts as there is time for, while they may help.
fn connect(relay: &Relay, secrets: &Secrets, budget: Duration) -> Result<Session, String> {
    let deadline = Instant::now() + budget;
    let mut pause = FIRST_PAUSE;

    loop {
        let token = token(secrets);
        let failure = match token.and_then(|token| relay.attempt(&token)) {
            Ok(session) => return Ok(session),
            Err(failure) => failure,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(at_least) = failure.again_after.filter(|_| !left.is_zero()) else {
            return Err(failure.text);
        };

        if pause == FIRST_PAUSE {
            let (what, secs) = (failure.without_question(), budget.as_secs());
            eprintln!("nix-relay: {what}; trying again for up to {secs} s");
        }
        // Clients that failed together should not come back together.
        let random = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
        let jittered = pause.min(LONGEST_PAUSE).mul_f64(0.5 + random);
        thread::sleep((at_least + jittered).min(left));
        pause *= 2;
    }
}

/// Why an attempt led to no session.
struct Failure {
    /// What went wrong, and after a semicolon how to mend it.
    text: String,
    /// The least time to wait before the next attempt. None if another attempt would end the
    /// same way.
    again_after: Option<Duration>,
}

impl Failure {
    fn new(text: impl Into<String>, is_temporary: bool) -> Failure {
        let again_after = is_temporary.then_some(Duration::ZERO);
        let text = text.into();
        Failure { text, again_after }
    }

    /// Adds what was being tried.
    fn during(self, what: &str) -> Failure {
        let text = with(what, &self.text);
        Failure { text, ..self }
    }

    fn without_question(&self) -> &str {
        self.text.split(';').next().unwrap_or_default()
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        if let Some(e) = e.get_ref().and_then(|e| e.downcast_ref()) {
            return Failure::new(tls_failure(e), false);
        }

        let words = util::system_words(&e);
        match e.kind() {
            ErrorKind::ConnectionRefused => {
                let text = format!("{words}; does the relay run, and is the port right?");
                Failure::new(text, true)
            }
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                Failure::new(format!("{words}; does the relay run?"), true)
            }
            ErrorKind::UnexpectedEof => Failure::new(
                format!("{words} without an answer; does the relay run?"),
                true,
            ),
            // The message is one of ours.
            ErrorKind::Other => Failure::new(e.to_string(), false),
            _ => Failure::new(words, false),
        }
    }
}

impl From<ureq::Error> for Failure {
    fn from(e: ureq::Error) -> Failure {
        match e {
            ureq::Error::Timeout(_) => Failure::new(TOKEN_LATE, false),
            e => e.into_io().into(),
        }
    }
}

fn tls_failure(e: &rustls::Error) -> String {
    use CertificateError::*;
    let rustls::Error::InvalidCertificate(e) = e else {
        return format!("TLS failed: {e}; does that port speak TLS?");
    };
    let cause = match e {
        Expired | ExpiredContext { .. } => "it has expired".into(),
        NotValidYet | NotValidYetContext { .. } => "it is not valid yet".into(),
        NotValidForNameContext { expected, .. } => {
            format!("it is for another name than {}", expected.to_str())
        }
        e => {
            let cause = match e {
                UnknownIssuer => "unknown issuer".into(),
                e => e.to_string(),
            };
            format!("{cause}; if the CA is your own, set SSL_CERT_FILE to its certificate")
        }
    };
    with("the certificate is not trusted", &cause)
}

/// The token for one attempt.
fn token(secrets: &Secrets) -> Result<String, Failure> {
    let given = |name| Some((name, secrets.get(name)?.clone()));
    let (name, token) = match (given(NIX_RELAY), variable(ACTIONS_URL), given(ACTIONS)) {
        (Some(given), ..) => given,
        (None, Some(url), Some((_, secret))) => {
            let failed =
                |failure: Failure| failure.during("no token from ACTIONS_ID_TOKEN_REQUEST_URL");
            (
                ACTIONS_URL,
                request_token(&url, secret.trim_end()).map_err(failed)?,
            )
        }
        _ => given(GITLAB)
            .or_else(|| given(CIRCLE))
            .ok_or(Failure::new(NO_TOKEN, false))?,
    };

    // Other characters could end the header line and begin another.
    let token = token.trim_end_matches(['\r', '\n']);
    let belongs = |c: char| c.is_ascii_alphanumeric() || "._~+/=-".contains(c);
    if !token.is_empty() && token.chars().all(belongs) {
        return Ok(token.to_owned());
    }
    Err(Failure::new(
        match name {
            ACTIONS_URL => format!("the token from {name} contains invalid characters"),
            _ => format!(
                "the token in {name} contains invalid characters: it must be the token alone, \
                 without spaces, quotes or line breaks"
            ),
        },
        false,
    ))
}

/// Asks for a token in the way of GitHub and Forgejo Actions.
fn request_token(url: &str, secret: &str) -> Result<String, Failure> {
    let agent = web_agent(url).map_err(|e| Failure::new(e, false))?;
    let audience = variable("NIX_RELAY_AUDIENCE").unwrap_or("api://nix-relay".into());
    let request = agent.get(url).query("audience", audience);
    let request = request.config().timeout_global(Some(TOKEN_TIMEOUT)).build();
    let request = request.header("Authorization", format!("Bearer {secret}"));

    let mut answer = request.call()?;
    let status = answer.status();
    if status != StatusCode::OK {
        let is_temporary = status.is_server_error() || may_pass(status);
        let text = format!("it answered with status {}", status.as_u16());
        return Err(Failure::new(text, is_temporary));
    }
    let body = answer
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER_BYTES as u64);
    let json = util::parse_json(&body.read_to_vec()?).unwrap_or_default();
    match json["value"].as_str() {
        Some(token) if !token.is_empty() => Ok(token.to_owned()),
        _ => Err(Failure::new("its answer has no .value", false)),
    }
}

/// Where the relay is, and how to reach it.
struct Relay {
    uri: Uri,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    tls: Option<Arc<ClientConfig>>,
    proxy: Option<Proxy>,
}

impl Relay {
    fn from_environment() -> Result<Relay, String> {
        let url = variable("NIX_RELAY_URL").unwrap_or_default();
        let url = url.trim_end_matches(['\r', '\n']);
        let mut relay = Relay::parse(url).ok_or_else(|| {
            let found = match url.rsplit('@').next() {
                Some("") | None => "not set".to_owned(),
                Some(url) => format!("'{}'", plain(url)),
            };
            let example = "as wss://HOST or ws://HOST:PORT";
            format!("set NIX_RELAY_URL to where the relay is, {example} (it is {found})")
        })?;

        // Without TLS, the proxy would see the token.
        if relay.uri.scheme_str() == Some("wss") {
            relay.tls = Some(tls_config()?);
            let is_for = |proxy: &Proxy| !proxy.is_no_proxy(&relay.uri);
            relay.proxy = match is_loopback(&relay.host) {
                true => None,
                false => proxy_from_env()?.filter(is_for),
            };
            let protocol = relay.proxy.as_ref().map(Proxy::protocol);
            if protocol.is_some_and(|protocol| protocol != ProxyProtocol::Http) {
                return Err("HTTPS_PROXY: expected a proxy as http://HOST:PORT".into());
            }
        }
        Ok(relay)
    }

    fn parse(url: &str) -> Option<Relay> {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?;
        let default_port = match scheme {
            "wss" => 443,
            "ws" => 80,
            _ => return None,
        };
        // Leaves out a user name and password.
        let place = uri.authority()?.as_str().rsplit('@').next()?;
        let host = uri.host().filter(|host| !host.is_empty())?;
        let port = match place.strip_prefix(host)? {
            "" => default_port,
            port => port.strip_prefix(':')?.parse().ok()?,
        };

        let path = match uri.path_and_query()?.as_str() {
            "/" => "/relay",
            path => path,
        };
        Some(Relay {
            uri: format!("{scheme}://{place}{path}").parse().ok()?,
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            tls: None,
            proxy: None,
        })
    }

    fn attempt(&self, token: &str) -> Result<Session, Failure> {
        let opened = self.open(token);
        opened.map_err(|failure| failure.during(&format!("cannot reach {}", self.uri)))?
    }

    /// The outer error means that the relay could not be reached, the inner one that it
    /// refused.
    fn open(&self, token: &str) -> Result<Result<Session, Failure>, Failure> {
        let socket = self.dial()?;
        let Some(config) = &self.tls else {
            let upgraded =
                self.upgrade(&mut Timed::new(&socket, ANSWER_TIMEOUT, ANSWER_LATE), token)?;
            return Ok(upgraded.map(|rest| Session {
                socket,
                tls: None,
                rest,
            }));
        };

        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        let tls = ClientConnection::new(config.clone(), name);
        let mut tls = tls.map_err(io::Error::other)?;
        tls.complete_io(&mut Timed::new(&socket, STEP_TIMEOUT, TLS_LATE))?;
        let mut timed = Timed::new(&socket, ANSWER_TIMEOUT, ANSWER_LATE);
        let upgraded = self.upgrade(&mut rustls::Stream::new(&mut tls, &mut timed), token)?;
        Ok(upgraded.map(|mut rest| {
            // Takes what has been decrypted already. The error only says that there is no more.
            let _ = tls.reader().read_to_end(&mut rest);
            Session {
                socket,
                tls: Some(tls),
                rest,
            }
        }))
    }

    /// Connects to the relay by TCP, or through a proxy (RFC 9110, section 9.3.6).
    fn dial(&self) -> Result<TcpStream, Failure> {
        let Some(proxy) = &self.proxy else {
            return Ok(dial(&self.host, self.port)?);
        };

        let place = format!("{}:{}", self.uri.host().unwrap_or_default(), self.port);
        let mut request = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n");
        if let Some(user) = proxy.username() {
            let both = format!("{user}:{}", proxy.password().unwrap_or_default());
            let both = Base64::encode_to_string(both).unwrap_or_default();
            request += &format!("Proxy-Authorization: Basic {both}\r\n");
        }
        let failed = |failure: Failure| failure.during("the proxy of HTTPS_PROXY");
        let socket = dial(proxy.host(), proxy.port()).map_err(|e| failed(e.into()))?;
        let mut timed = Timed::new(&socket, ANSWER_TIMEOUT, ANSWER_LATE);
        let answer = exchange(&mut timed, &(request + "\r\n")).map_err(failed)?;
        if answer.status.is_success() {
            return Ok(socket);
        }
        let code = answer.status.as_u16();
        let text = format!("the proxy of HTTPS_PROXY refused: {code}");
        Err(Failure::new(text, may_pass(answer.status)))
    }

    /// Asks for a WebSocket (RFC 6455, section 4.1). Returns the bytes that came after the
    /// answer's head.
    fn upgrade(
        &self,
        stream: &mut (impl Read + Write),
        token: &str,
    ) -> Result<Result<Vec<u8>, Failure>, Failure> {
        let key = generate_key();
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let place = self.uri.authority().map_or("", |place| place.as_str());
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {place}\r\nUser-Agent: {AGENT}\r\n\
             Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: {key}\r\nAuthorization: Bearer {token}\r\n\r\n"
        );

        let mut answer = exchange(stream, &request)?;
        if answer.status != StatusCode::SWITCHING_PROTOCOLS {
            let body = read_body(&mut answer, stream);
            return Ok(Err(refusal(&answer, &body)));
        }
        let accept = derive_accept_key(key.as_bytes());
        for (name, expected) in [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", &accept)] {
            if !answer.header(name).eq_ignore_ascii_case(expected) {
                let text = format!("its answer is not a WebSocket handshake: wrong {name}");
                return Err(Failure::new(text, false));
            }
        }
        Ok(Ok(answer.rest))
    }
}

/// Connects to the first address of a name that answers. Each address may take its share of
/// the time that is left, so that a silent one leaves some for the others.
fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let deadline = Instant::now() + STEP_TIMEOUT;
    let place = (host.trim_matches(['[', ']']).to_owned(), port);
    let (sender, found) = mpsc::channel();
    thread::Builder::new().spawn(move || sender.send(place.to_socket_addrs()))?;
    let found = found.recv_timeout(STEP_TIMEOUT);

    let mut failure = io::Error::other(format!("cannot resolve {host}; is the name right?"));
    let mut addresses = found
        .into_iter()
        .flatten()
        .flatten()
        .collect::<Vec<_>>()
        .into_iter();
    while let Some(address) = addresses.next() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() as u32 + 1);
        match TcpStream::connect_timeout(&address, share.max(Duration::from_millis(1))) {
            Ok(socket) => return socket.set_nodelay(true).map(|()| socket),
            Err(e) => failure = late(e, TCP_LATE),
        }
    }
    Err(failure)
}

/// Trusts Mozilla's authorities, or those in SSL_CERT_FILE instead.
fn tls_config() -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    match trusted_roots()? {
        Some(own) => {
            let own = own.iter().map(|root| CertificateDer::from(root.der()));
            roots.add_parsable_certificates(own);
        }
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    }

    let config = ClientConfig::builder().with_root_certificates(roots);
    Ok(Arc::new(config.with_no_client_auth()))
}

/// A socket during one step of the connection, with a deadline for the whole step.
struct Timed<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
    late: &'static str,
}

impl Timed<'_> {
    fn new<'a>(socket: &'a TcpStream, limit: Duration, late: &'static str) -> Timed<'a> {
        let deadline = Instant::now() + limit;
        Timed {
            socket,
            deadline,
            late,
        }
    }

    fn limited<T>(&self, step: impl FnOnce(&TcpStream) -> io::Result<T>) -> io::Result<T> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = Some(left.max(Duration::from_millis(1)));
        self.socket.set_read_timeout(left)?;
        self.socket.set_write_timeout(left)?;
        step(self.socket).map_err(|e| late(e, self.late))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.limited(|mut socket| socket.read(bytes))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limited(|mut socket| socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn late(e: io::Error, text: &str) -> io::Error {
    match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => io::Error::other(text),
        _ => e,
    }
}

/// The answer to a request, as far as it was read.
struct Answer {
    status: StatusCode,
    headers: Vec<(String, String)>,
    /// The bytes that came after its head.
    rest: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        let mut all = self.headers.iter();
        let found = all.find(|(found, _)| found.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value)
    }
}

fn exchange(stream: &mut (impl Read + Write), request: &str) -> Result<Answer, Failure> {
    stream.write_all(request.as_bytes())?;
    stream.flush()?;

    let mut bytes = Vec::new();
    while bytes.len() < MAX_ANSWER_BYTES {
        let mut chunk = [0; 4096];
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        bytes.extend(&chunk[..length]);

        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Response::new(&mut headers);
        let Ok(parsed) = head.parse(&bytes) else {
            break;
        };
        let status = head.code.and_then(|code| StatusCode::from_u16(code).ok());
        if let (httparse::Status::Complete(length), Some(status)) = (parsed, status) {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let header = |header: &httparse::Header| (header.name.into(), text(header.value));
            let headers = head.headers.iter().map(header).collect();
            let rest = bytes.split_off(length);
            return Ok(Answer {
                status,
                headers,
                rest,
            });
        }
    }
    Err(Failure::new(
        "its answer is not HTTP; is it a relay that listens there?",
        false,
    ))
}

/// The body of an answer, or as much of it as arrives.
fn read_body(answer: &mut Answer, stream: &mut impl Read) -> String {
    let mut body = std::mem::take(&mut answer.rest);
    let length = answer.header("Content-Length").parse();
    let length = length.unwrap_or(MAX_ANSWER_BYTES).min(MAX_ANSWER_BYTES);
    let mut chunk = [0; 4096];
    // A chunked body ends with an empty chunk (RFC 9112, section 7.1).
    while body.len() < length && !body.ends_with(b"0\r\n\r\n") {
        match stream.read(&mut chunk) {
            Ok(length @ 1..) => body.extend(&chunk[..length]),
            _ => break,
        }
    }

    let text = String::from_utf8_lossy(&body);
    let is_chunked = !answer.header("Transfer-Encoding").is_empty();
    match text.split_once("\r\n") {
        Some((_, behind_size)) if is_chunked => behind_size.to_owned(),
        _ => text.into_owned(),
    }
}

/// The message for an answer that is no WebSocket: a refusal by the relay, or a page by
/// something in front of it.
fn refusal(answer: &Answer, body: &str) -> Failure {
    let status = answer.status;
    let code = status.as_u16().to_string();
    let is_page = answer.header("Content-Type").starts_with("text/html") || body.starts_with('<');
    let said = plain(match is_page {
        true => title(body).unwrap_or_default(),
        false => body.lines().next().unwrap_or_default(),
    });
    let said = match said.strip_prefix(&code).unwrap_or(&said).trim_start() {
        "" => status.canonical_reason().unwrap_or_default(),
        said => said,
    };

    let said = with(&code, said);
    let text = match is_page {
        true => format!(
            "a proxy or web server answered in the relay's place: {said}; does the relay run, \
             and is NIX_RELAY_URL right?"
        ),
        false => format!("the relay refused: {said}"),
    };
    let wait = answer.header("Retry-After").parse().unwrap_or_default();
    let again_after = may_pass(status).then_some(Duration::from_secs(wait));
    Failure { text, again_after }
}

fn title(page: &str) -> Option<&str> {
    let lower = page.to_ascii_lowercase();
    let tag = lower.find("<title")?;
    let start = tag + lower[tag..].find('>')? + 1;
    let length = lower[start..].find("</title")?;
    Some(&page[start..start + length])
}

/// Whether the same request may succeed soon.
fn may_pass(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 502 | 503 | 504)
}

/// Makes a text from the other side safe for one line on a terminal: nothing in it moves the
/// cursor or changes the direction of writing.
fn plain(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let kept = line
        .chars()
        .filter(|&c| !c.is_control() && !TURNS.contains(&c));
    kept.take(MAX_SHOWN_CHARS).collect()
}

/// `what: detail`, or just `what` if there is no detail.
fn with(what: &str, detail: &str) -> String {
    match detail {
        "" => what.to_owned(),
        _ => format!("{what}: {detail}"),
    }
}

/// Returns None if the variable is unset or empty.
fn variable(name: &str) -> Option<String> {
    let value = env::var_os(name).filter(|value| !value.is_empty())?;
    Some(value.to_string_lossy().into_owned())
}

fn seconds(name: &str, default: u32) -> Result<u32, String> {
    let value = variable(name).unwrap_or(default.to_string());
    let invalid = |_| format!("{name} must be a whole number of seconds (it is '{value}')");
    value.parse().map_err(invalid)
}

//! `nix-relay --stdio`: connects standard input and output to a relay, as Nix's
//! `remote-program`. Finds a token, connects, tries again where that may help, and says in one
//! line why there is no session or how it ended. Promises that each secret is only ever sent to
//! the server that it is for, and never appears in an argument list or a message.

use crate::config::secs;
use crate::copy::{
    self, CLOSE_TIMEOUT, End, Half, Keepalive, Link, Pipes, Reason, Receiving, Stream,
};
use crate::http::COMPRESSED;
use crate::poll::{self, lock};
use crate::web::{self, AGENT, LOOKUP_TIMEOUT, STEP_TIMEOUT, is_loopback, proxy_for, text_of};
use jwt_simple::{prelude::Base64, reexports::ct_codecs::Encoder};
use rustix::io::ioctl_fionbio;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, getppid, kill_process_group};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{thread, vec};
use tungstenite::client::client_with_config;
use tungstenite::error::ProtocolError;
use tungstenite::http::{HeaderMap, Response, header};
use tungstenite::protocol::{Role, frame::coding::CloseCode};
use tungstenite::{ClientRequestBuilder, Error, HandshakeError};
use ureq::Proxy;
use ureq::config::Config;
use ureq::http::{StatusCode, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// For each answer, be it a proxy's or the relay's: if that is full, it keeps its clients waiting
/// for `queue_timeout_secs`, which is 30 at most.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);
/// What glibc and musl say of a name that does not exist.
const UNKNOWN_NAME: [&str; 2] = ["name or service not known", "name does not resolve"];
/// How long one address of a name is waited for before another is tried beside it (RFC 8305,
/// section 5).
const HEAD_START: Duration = Duration::from_millis(250);
/// How much is read from the relay at a time. rustls returns no more than one record.
const READ_BYTES: usize = 16 << 10;
/// For the command that prints a token.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause between attempts, which doubles each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// How often those who wait are told so: some CI systems end a job that says nothing for long.
const REMINDER: Duration = Duration::from_secs(60);
/// The size of the two pipes to Nix. With smaller ones, Nix and the client often wait for
/// each other.
const PIPE_BYTES: usize = 512 << 10;
/// The size of standard error, and of Nix's own, which a wrapper may leave to us as 3. With
/// `builders`, Nix's log of a build goes there, and Nix reads none of it while another build waits
/// for its session. An unprivileged user gets no more (pipe(7)).
const LOG_BYTES: usize = 1 << 20;
const NIX_STDERR: &str = "/dev/fd/3";
/// Limits on the head or body of an answer, and on a token.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
const MAX_TOKEN_BYTES: u64 = 16 << 10;

/// How much of a text from the other side is shown.
const MAX_SHOWN_CHARS: usize = 400;
/// Characters that change the direction of writing (Unicode Standard Annex 9).
const TURNS: [char; 12] = [
    '\u{61C}', '\u{200E}', '\u{200F}', '\u{202A}', '\u{202B}', '\u{202C}', '\u{202D}', '\u{202E}',
    '\u{2066}', '\u{2067}', '\u{2068}', '\u{2069}',
];

const COMPRESS: &str = "NIX_RELAY_COMPRESS";
const TOKEN: &str = "NIX_RELAY_TOKEN";
const COMMAND: &str = "NIX_RELAY_TOKEN_COMMAND";
const ACTIONS_URL: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
const ACTIONS_SECRET: &str = "ACTIONS_ID_TOKEN_REQUEST_TOKEN";
const NO_TOKEN_FROM_COMMAND: &str = "no token from NIX_RELAY_TOKEN_COMMAND";
const NO_TOKEN_FROM_ACTIONS: &str = "no token from ACTIONS_ID_TOKEN_REQUEST_URL";
const TOKENS_OF_JOBS: [&str; 2] = ["GITLAB_OIDC_TOKEN", "CIRCLE_OIDC_TOKEN_V2"];
const NO_TOKEN: &str = "no token: set NIX_RELAY_TOKEN or NIX_RELAY_TOKEN_COMMAND, or let the job \
    have one: GitHub or Forgejo (permission id-token: write) sets ACTIONS_ID_TOKEN_REQUEST_URL \
    and _TOKEN, GitLab (id_tokens) GITLAB_OIDC_TOKEN, CircleCI CIRCLE_OIDC_TOKEN_V2";
/// The message when Nix passes --serve.
pub const WRONG_STORE: &str =
    "use ssh-ng:// instead of ssh://, as in ssh-ng://localhost?remote-program=nix-relay";
const FOR_NIX: &str =
    "this is for Nix to run: nix build --store 'ssh-ng://localhost?remote-program=nix-relay'";

/// A connection to a relay that has answered 101.
struct Session {
    socket: Arc<TcpStream>,
    stream: Arc<dyn Stream>,
    receiving: Receiving,
    compressed: bool,
}

pub fn run() -> ExitCode {
    if io::stdin().is_terminal() || io::stdout().is_terminal() {
        return crate::fail(1, FOR_NIX);
    }
    carry().unwrap_or_else(|text| crate::fail(1, &text))
}

/// Runs the client, from reading its settings to the end of the session. Fails with a message.
fn carry() -> Result<ExitCode, String> {
    let target = Target::from_environment()?;
    let keepalive = seconds("NIX_RELAY_KEEPALIVE_SECS", 30)?;
    let retry = seconds("NIX_RELAY_RETRY_SECS", 60)?;
    let queue = seconds("NIX_RELAY_QUEUE_SECS", 3600)?;
    if target.tls.is_none() && !is_loopback(&target.host) {
        say(&format!(
            "warning: the token goes unencrypted to {}; use wss:// instead",
            target.host
        ));
    }

    let session = connect(&target, secs(retry), secs(queue))?;
    let (end, all_sent) = copy(session, keepalive).map_err(|e| e.to_string())?;
    outcome(&end, all_sent)
}

/// A line on standard error, which may be broken.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "nix-relay: {text}");
}

/// Returns how the session ended, and whether all of standard input was sent by then.
fn copy(session: Session, keepalive: u32) -> io::Result<(End, bool)> {
    let mut keepalive = Keepalive::new(keepalive);
    let link = Link::new(
        &session.socket,
        session.stream,
        Role::Client,
        session.compressed,
    )?;
    let stdin = io::stdin();
    let pipes = Pipes {
        source: stdin.as_fd(),
        // The end of a pipe is seen by reading it.
        source_ended: link.over.poll_fd(),
        sink: io::stdout(),
    };

    for pipe in [pipes.source, pipes.sink.as_fd()] {
        ioctl_fionbio(pipe, true)?;
        // An unprivileged user may be refused this.
        let _ = fcntl_setpipe_size(pipe, PIPE_BYTES);
    }
    let _ = fcntl_setpipe_size(io::stderr(), LOG_BYTES);
    if let Ok(log) = File::options().read(true).write(true).open(NIX_STDERR) {
        let _ = fcntl_setpipe_size(log, LOG_BYTES);
    }
    link.run(&[], session.receiving, pipes, || {
        while link.end.get().is_none() {
            let until = keepalive.check(&link);
            poll::ready([link.news.poll_fd()], until);
            link.news.reset();
        }
        // If all was sent, a Close of ours has followed it.
        if let Some(end) = link.end.get()
            && end.reason != Reason::Gone
            && !link.all_sent.load(Relaxed)
        {
            link.close(end.code, &end.detail, CLOSE_TIMEOUT);
        }
    })?;
    let end = link.end.get().cloned().unwrap_or(copy::FAILED);
    Ok((end, link.all_sent.load(Relaxed)))
}

fn outcome(end: &End, all_sent: bool) -> Result<ExitCode, String> {
    let detail = plain(&end.detail);
    let ended = "the relay ended the session";
    Err(match (end.reason, end.code) {
        // Nobody reads standard output, so there is nobody to tell.
        (Reason::Failed, _) => return Ok(ExitCode::FAILURE),
        (Reason::Closed, Some(CloseCode::Normal)) if all_sent => return Ok(ExitCode::SUCCESS),
        (Reason::Closed, Some(CloseCode::Normal)) => format!("{ended} before standard input ended"),
        (Reason::Closed, Some(code)) => format!("{ended}: {}", with(&code.to_string(), &detail)),
        (Reason::Closed, None) if detail.is_empty() => format!("{ended} without a reason"),
        (Reason::Closed | Reason::Gone, _) => {
            format!("the session broke off: {detail}; was the relay or a proxy restarted?")
        }
        _ => format!("the session broke off: {detail}"),
    })
}

/// Why something could not be had.
struct Failure {
    /// What went wrong, and after a semicolon how to mend it.
    text: String,
    /// The least time to wait before another attempt. None if that would end the same way.
    again_after: Option<Duration>,
    /// Whether the relay is there, and all its sessions are in use.
    is_full: bool,
}

impl Failure {
    /// One that may pass.
    fn passing(text: impl Into<String>) -> Failure {
        Failure {
            again_after: Some(Duration::ZERO),
            ..Failure::lasting(text)
        }
    }

    /// One that stays.
    fn lasting(text: impl Into<String>) -> Failure {
        Failure {
            text: text.into(),
            again_after: None,
            is_full: false,
        }
    }

    /// Adds what was being tried.
    fn during(self, what: &str) -> Failure {
        let text = format!("{what}: {}", self.text);
        Failure { text, ..self }
    }
}

impl From<ureq::Error> for Failure {
    fn from(e: ureq::Error) -> Failure {
        let text = e.to_string();
        match e {
            ureq::Error::Io(e) => e.into(),
            ureq::Error::StatusCode(code) if !may_pass(code) => Failure::lasting(text),
            ureq::Error::Other(e) => Failure::lasting(e.to_string()),
            ureq::Error::ConnectProxyFailed(e) if e.contains(" 4") => {
                Failure::lasting(format!("the proxy refused: {e}"))
            }
            _ => Failure::passing(text),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        if let Some(e) = e.get_ref().and_then(|e| e.downcast_ref()) {
            return Failure::lasting(tls_words(e));
        }

        if e.kind() == ErrorKind::NotFound {
            return Failure::lasting(system_words(&e));
        }

        Failure::passing(match e.kind() {
            ErrorKind::ConnectionRefused => {
                "connection refused; does a server run there, and is the port right?".into()
            }
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => {
                "the connection broke without an answer; was the server, or a proxy before it, \
                 restarted?"
                    .into()
            }
            ErrorKind::TimedOut => {
                let secs = STEP_TIMEOUT.as_secs();
                format!("no connection within {secs} s; is a firewall in the way?")
            }
            // Nothing to read within the limit.
            ErrorKind::WouldBlock => {
                let secs = ANSWER_TIMEOUT.as_secs();
                format!("no answer within {secs} s; is that the right port?")
            }
            _ => system_words(&e),
        })
    }
}

fn tls_words(e: &rustls::Error) -> String {
    let untrusted = "the certificate is not trusted";
    match e {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            let own = match web::first_set(&web::AUTHORITIES) {
                Some((name, path)) => format!("{name}={path} lacks its CA, or is not there"),
                None => "if the CA is your own, set SSL_CERT_FILE to its certificate".into(),
            };
            format!(
                "{untrusted}: unknown issuer; does the server send its intermediate \
                 certificates? Otherwise, {own}"
            )
        }
        rustls::Error::InvalidCertificate(e) => format!("{untrusted}: {e}"),
        rustls::Error::AlertReceived(alert) => format!(
            "the server refused TLS with the alert {alert:?}; does it serve that \
             name, and does it want a client certificate?"
        ),
        e => format!("TLS failed: {e}; does that port speak TLS?"),
    }
}

/// Whether the same request may succeed soon.
fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..)
}

/// Opens a session, with as many attempts as there is time for, while they may help. `retry` is
/// for a relay that is not there, `queue` for one that is full.
fn connect(target: &Target, retry: Duration, queue: Duration) -> Result<Session, String> {
    let nix = getppid();
    let mut pause = FIRST_PAUSE;
    let mut not_there_until = None;
    let mut full_until = None;
    let mut next_line = Instant::now();

    loop {
        let start = Instant::now();
        let failure = match token().and_then(|token| target.attempt(&token)) {
            Ok(session) => return Ok(session),
            Err(failure) => failure,
        };
        let (until, limit) = if failure.is_full {
            (&mut full_until, queue)
        } else {
            (&mut not_there_until, retry)
        };
        if until.is_none() {
            next_line = start;
        }
        let until = *until.get_or_insert(start + limit);
        let left = until.saturating_duration_since(Instant::now());
        let Some(at_least) = failure.again_after.filter(|_| !left.is_zero()) else {
            return Err(failure.text);
        };

        if next_line <= Instant::now() {
            next_line = Instant::now() + REMINDER;
            let what = failure.text.split(';').next().unwrap_or_default();
            let left = left.as_secs_f64().ceil();
            say(&if failure.is_full {
                format!("all sessions are in use; waiting for up to {left} s")
            } else {
                format!("{what}; trying again for up to {left} s")
            });
        }
        if failure.is_full {
            not_there_until = None;
            pause = FIRST_PAUSE;
        }
        thread::sleep(at_least.saturating_add(jittered(pause)).min(left));
        // Without Nix there is nobody to wait for.
        if getppid() != nix {
            return Err(failure.text);
        }
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// Clients that failed together should not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + random)
}

/// The token for one attempt, without the end of its line.
fn token() -> Result<String, Failure> {
    let (source, token) = if let Some(token) = variable(TOKEN) {
        (TOKEN, token)
    } else if variable(COMMAND).is_some() {
        (
            COMMAND,
            run_token_command().map_err(|e| e.during(NO_TOKEN_FROM_COMMAND))?,
        )
    } else if let (Some(url), Some(secret)) = (variable(ACTIONS_URL), variable(ACTIONS_SECRET)) {
        let token = request_token(&url, secret.trim_end());
        (
            ACTIONS_URL,
            token.map_err(|e| e.during(NO_TOKEN_FROM_ACTIONS))?,
        )
    } else {
        web::first_set(&TOKENS_OF_JOBS).ok_or_else(|| Failure::lasting(NO_TOKEN))?
    };

    let token = token.trim_end_matches(['\r', '\n']);
    // Other characters could end the line of the header that it becomes, and begin another.
    let belongs = |c: char| c.is_ascii_alphanumeric() || "._~+/=-".contains(c);
    if !token.is_empty() && token.chars().all(belongs) {
        return Ok(token.to_owned());
    }
    Err(Failure::lasting(format!(
        "the token from {source} contains invalid characters: it must be the token alone, \
         without spaces, quotes or line breaks"
    )))
}

/// Runs the command that prints a token, and kills it if that takes too long. The shell takes it
/// from the environment, because everybody can read an argument list. Its standard error is ours.
fn run_token_command() -> Result<String, Failure> {
    let mut child = Command::new("sh")
        .args(["-c", &format!("eval \"${COMMAND}\"")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let group = Pid::from_child(&child);
    let result = in_thread(move || {
        let mut printed = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_TOKEN_BYTES + 1).read_to_end(&mut printed)?;
        }
        child.wait().map(|status| (printed, status))
    })?;

    let Ok(result) = result.recv_timeout(COMMAND_TIMEOUT) else {
        let _ = kill_process_group(group, Signal::KILL);
        let secs = COMMAND_TIMEOUT.as_secs();
        return Err(Failure::passing(format!("it did not end within {secs} s")));
    };
    let (printed, status) = result?;
    if printed.len() as u64 > MAX_TOKEN_BYTES {
        return Err(Failure::lasting("it printed more than 16 KiB"));
    }
    if !status.success() {
        return Err(Failure::passing(format!("it ended with {status}")));
    }
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

/// Asks for a token in the way of GitHub and Forgejo Actions.
fn request_token(url: &str, secret: &str) -> Result<String, Failure> {
    if !web::is_https_or_loopback(url) {
        return Err(Failure::lasting("it must be an https URL"));
    }
    let audience = variable("NIX_RELAY_AUDIENCE").unwrap_or("api://nix-relay".into());
    let answer = web::get_json(url, Dialling, |request| {
        let request = request.query("audience", &audience);
        request.header("Authorization", format!("Bearer {secret}"))
    })?;
    match answer["value"].as_str() {
        Some(token) if !token.is_empty() => Ok(token.to_owned()),
        _ => Err(Failure::lasting("its answer has no .value")),
    }
}

/// Runs something in a thread of its own, because it may take longer than we wait for it.
fn in_thread<T: Send + 'static>(
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<mpsc::Receiver<T>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().spawn(move || sender.send(run()))?;
    Ok(receiver)
}

/// The addresses of a host. An unknown name is `NotFound`; std tells it from name servers that fail
/// by the words of the C library alone.
fn look_up(host: &str, port: u16) -> io::Result<vec::IntoIter<SocketAddr>> {
    let place = (host.trim_matches(['[', ']']).to_owned(), port);
    let found = in_thread(move || place.to_socket_addrs())?;
    let secs = LOOKUP_TIMEOUT.as_secs();
    let late = |_| io::Error::other(format!("no answer from the name servers within {secs} s"));
    let found = found.recv_timeout(LOOKUP_TIMEOUT).map_err(late)?;
    found.map_err(|e| {
        let words = e.to_string().to_lowercase();
        let words = words.rsplit(": ").next().unwrap_or_default();
        let kind = if UNKNOWN_NAME.contains(&words) {
            ErrorKind::NotFound
        } else {
            ErrorKind::Other
        };
        let text = format!("cannot resolve {host}: {words}; is the name right?");
        io::Error::new(kind, text)
    })
}

/// Connects to the first of these addresses that answers. While one does not, the next is tried
/// beside it.
fn dial(addresses: vec::IntoIter<SocketAddr>) -> io::Result<TcpStream> {
    let (sender, answers) = mpsc::channel();
    let mut failure = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in addresses {
        let sender = sender.clone();
        let connect = move || sender.send(TcpStream::connect_timeout(&address, STEP_TIMEOUT));
        thread::Builder::new().spawn(connect)?;
        match answers.recv_timeout(HEAD_START) {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(e)) => failure = e,
            Err(_) => {}
        }
    }

    drop(sender);
    for answer in answers {
        match answer {
            Ok(socket) => return Ok(socket),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

/// For ureq, which tries the addresses of a name in turn: finds the one that answers.
#[derive(Debug)]
struct Dialling;

impl Resolver for Dialling {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let default_port = if uri.scheme_str() == Some("http") {
            80
        } else {
            443
        };
        let port = uri.port_u16().unwrap_or(default_port);
        let addresses = look_up(uri.host().unwrap_or_default(), port)?;
        let mut found = self.empty();
        found.push(match addresses.as_slice() {
            [one] => *one,
            _ => dial(addresses)?.peer_addr()?,
        });
        Ok(found)
    }
}

/// Where the relay is, and how to reach it.
struct Target {
    uri: Uri,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    tls: Option<Arc<ClientConfig>>,
    proxy: Option<Proxy>,
    compresses: bool,
}

impl Target {
    fn from_environment() -> Result<Target, String> {
        let url = variable("NIX_RELAY_URL").unwrap_or_default();
        let url = url.trim_end_matches(['\r', '\n']);
        let mut target = Target::parse(url).ok_or_else(|| {
            let shown = plain(url.rsplit('@').next().unwrap_or_default());
            let example = "as wss://HOST or ws://HOST:PORT";
            format!("set NIX_RELAY_URL to where the relay is, {example} (it is '{shown}')")
        })?;

        match variable(COMPRESS).as_deref() {
            None => {}
            Some("zstd") => target.compresses = true,
            Some(_) => return Err(format!("{COMPRESS} must be zstd, or not set")),
        }
        // Without TLS, the proxy would see the token.
        if target.uri.scheme_str() == Some("wss") {
            target.tls = Some(tls_config()?);
            target.proxy = proxy_for(&target.host, target.port)?;
        }
        Ok(target)
    }

    fn parse(url: &str) -> Option<Target> {
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
        Some(Target {
            uri: format!("{scheme}://{place}{path}").parse().ok()?,
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            tls: None,
            proxy: None,
            compresses: false,
        })
    }

    /// Asks for a session.
    fn attempt(&self, token: &str) -> Result<Session, Failure> {
        let through = match &self.proxy {
            None => String::new(),
            Some(proxy) => format!(" through the proxy {}:{}", proxy.host(), proxy.port()),
        };
        let place = format!("cannot reach {}{through}", self.uri);
        let (socket, stream) = self.reach().map_err(|failure| failure.during(&place))?;
        let half = |writes| Half {
            stream: stream.clone(),
            writes,
        };
        let mut request = ClientRequestBuilder::new(self.uri.clone())
            .with_header("User-Agent", AGENT)
            .with_header("Authorization", format!("Bearer {token}"));
        // A relay that does not know the first one takes the second.
        if self.compresses {
            request = request
                .with_sub_protocol(COMPRESSED)
                .with_sub_protocol("binary");
        }
        let limits = Some(copy::limits(READ_BYTES));

        let failure = match client_with_config(request, half(true), limits) {
            Ok((mut websocket, answer)) => {
                let protocol = text_of(answer.headers(), header::SEC_WEBSOCKET_PROTOCOL);
                websocket.get_mut().writes = false;
                return Ok(Session {
                    socket,
                    stream,
                    receiving: Receiving {
                        websocket,
                        may_hold_more: true,
                    },
                    compressed: protocol == COMPRESSED,
                });
            }
            Err(HandshakeError::Failure(Error::Http(answer)))
                if !answer.status().is_informational() =>
            {
                return Err(refusal(*answer, half(false)));
            }
            Err(HandshakeError::Failure(e)) => no_handshake(e),
            Err(HandshakeError::Interrupted(_)) => io::Error::from(ErrorKind::WouldBlock).into(),
        };
        Err(failure.during(&place))
    }

    /// Connects, and if it is wss, by TLS.
    fn reach(&self) -> Result<(Arc<TcpStream>, Arc<dyn Stream>), Failure> {
        let socket = Arc::new(self.connect()?);
        let stream: Arc<dyn Stream> = match &self.tls {
            None => socket.clone(),
            Some(config) => Arc::new(self.shake_hands(&socket, config)?),
        };
        Ok((socket, stream))
    }

    fn shake_hands(
        &self,
        socket: &Arc<TcpStream>,
        config: &Arc<ClientConfig>,
    ) -> Result<Tls, Failure> {
        let name = ServerName::try_from(self.host.clone());
        let name = name.map_err(|e| Failure::lasting(e.to_string()))?;
        let connection = ClientConnection::new(config.clone(), name);
        let mut connection = connection.map_err(io::Error::other)?;
        // It should accept a frame whole.
        connection.set_buffer_limit(Some(copy::HEADER_BYTES + copy::CHUNK_BYTES));

        // The answer may take longer than this.
        socket.set_read_timeout(Some(STEP_TIMEOUT))?;
        let secs = STEP_TIMEOUT.as_secs();
        let silent = format!("no TLS handshake within {secs} s; does that port speak TLS?");
        // It also returns when the server has begun, and then is silent.
        while connection.is_handshaking() {
            connection
                .complete_io(&mut &**socket)
                .map_err(|e| match e.kind() {
                    ErrorKind::WouldBlock => Failure::passing(&*silent),
                    _ => e.into(),
                })?;
        }
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Tls {
            socket: socket.clone(),
            connection: Mutex::new(connection),
        })
    }

    /// Connects to the relay by TCP, or through a proxy (RFC 9110, section 9.3.6).
    fn connect(&self) -> Result<TcpStream, Failure> {
        let proxy = self.proxy.as_ref();
        let addresses = match proxy {
            None => look_up(&self.host, self.port),
            Some(proxy) => look_up(proxy.host(), proxy.port()),
        };
        let socket = dial(addresses?)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let Some(proxy) = proxy else {
            return Ok(socket);
        };

        let place = format!("{}:{}", self.uri.host().unwrap_or_default(), self.port);
        let mut request = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n");
        if let Some(user) = proxy.username() {
            let both = format!("{user}:{}", proxy.password().unwrap_or_default());
            let both = Base64::encode_to_string(both).unwrap_or_default();
            request += &format!("Proxy-Authorization: Basic {both}\r\n");
        }
        ask_proxy(&socket, &(request + "\r\n"))?;
        Ok(socket)
    }
}

/// TLS over a socket. Both halves of the WebSocket share it.
struct Tls {
    socket: Arc<TcpStream>,
    connection: Mutex<ClientConnection>,
}

impl Stream for Tls {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut tls = lock(&self.connection);
        loop {
            match tls.reader().read(buffer) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // The same as without TLS: an end of the connection without a Close.
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                done => return done,
            }
            tls.read_tls(&mut &*self.socket)?;
            tls.process_new_packets().map_err(io::Error::other)?;
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        // rustls has room for more once it has sent what it holds.
        self.flush()?;
        lock(&self.connection).writer().write(bytes)
    }

    fn flush(&self) -> io::Result<()> {
        let mut tls = lock(&self.connection);
        while tls.wants_write() {
            tls.write_tls(&mut &*self.socket)?;
        }
        Ok(())
    }
}

/// Sends a request to a proxy. Reads nothing behind the head of its answer.
fn ask_proxy(mut socket: &TcpStream, request: &str) -> Result<(), Failure> {
    socket.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && (head.len() as u64) < MAX_ANSWER_BYTES {
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        head.extend(byte);
    }

    let status = head
        .splitn(3, |&byte| byte == b' ')
        .nth(1)
        .unwrap_or_default();
    let Ok(status) = StatusCode::from_bytes(status) else {
        return Err(Failure::lasting("its answer is not HTTP; is it a proxy?"));
    };
    if status.is_success() {
        return Ok(());
    }
    let text = format!("it refused: {}", in_words(status));
    Err(if may_pass(status.as_u16()) {
        Failure::passing(text)
    } else {
        Failure::lasting(text)
    })
}

/// For a server with a certificate of one of `web::authorities`.
fn tls_config() -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let all = web::authorities()?;
    roots.add_parsable_certificates(all.iter().map(|root| CertificateDer::from(root.der())));

    let config = ClientConfig::builder().with_root_certificates(roots);
    Ok(Arc::new(config.with_no_client_auth()))
}

/// What it means that a handshake led to no answer.
fn no_handshake(e: Error) -> Failure {
    match e {
        Error::Io(e) => e.into(),
        Error::Protocol(ProtocolError::HandshakeIncomplete) => {
            io::Error::from(ErrorKind::UnexpectedEof).into()
        }
        // Some proxies answer so while the relay is not there.
        Error::Protocol(ProtocolError::WrongHttpVersion) => {
            Failure::passing("a proxy answered in the relay's place, by HTTP/1.0")
        }
        e => Failure::lasting(format!(
            "its answer is not a WebSocket handshake: {e}; is it a relay that listens there?"
        )),
    }
}

/// What an answer means that is no WebSocket: a refusal by the relay, or a page by something in
/// front of it.
fn refusal(answer: Response<Option<Vec<u8>>>, wire: Half) -> Failure {
    let (head, body) = answer.into_parts();
    let (status, headers) = (head.status, &head.headers);
    let body = read_body(headers, body.unwrap_or_default(), wire);
    // Our codes end with 503, and those of large proxies begin with 520.
    let is_ours = text_of(headers, header::CONTENT_TYPE).starts_with("text/plain")
        && (400..=503).contains(&status.as_u16());
    let text = if is_ours {
        let line = plain(body.lines().next().unwrap_or_default());
        format!("the relay refused: {}", with(status.as_str(), &line))
    } else {
        format!(
            "a proxy or web server answered in the relay's place: {}; does the relay run, and is \
             NIX_RELAY_URL right?",
            in_words(status)
        )
    };
    let wait = text_of(headers, header::RETRY_AFTER).parse();
    let wait = Duration::from_secs(wait.unwrap_or_default());
    let may_pass = may_pass(status.as_u16()) && text_of(headers, "Nix-Relay-Retry") != "no";
    Failure {
        text,
        again_after: may_pass.then_some(wait),
        is_full: text_of(headers, "Nix-Relay-Queue") == "full",
    }
}

/// The body of an answer, or as much of it as arrives, after what has arrived already.
fn read_body(headers: &HeaderMap, mut body: Vec<u8>, wire: Half) -> String {
    let length = text_of(headers, header::CONTENT_LENGTH)
        .parse()
        .unwrap_or(0);
    let missing = MAX_ANSWER_BYTES
        .min(length)
        .saturating_sub(body.len() as u64);
    let _ = wire.take(missing).read_to_end(&mut body);
    String::from_utf8_lossy(&body).into_owned()
}

fn in_words(status: StatusCode) -> String {
    with(
        status.as_str(),
        status.canonical_reason().unwrap_or_default(),
    )
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

/// What the system says of an error, without its number.
fn system_words(e: &io::Error) -> String {
    let words = e.to_string().to_lowercase();
    words
        .split(" (os error")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Returns None if the variable is unset or empty.
fn variable(name: &'static str) -> Option<String> {
    Some(web::first_set(&[name])?.1)
}

fn seconds(name: &'static str, default: u32) -> Result<u32, String> {
    let value = variable(name).unwrap_or(default.to_string());
    let invalid = |_| format!("{name} must be a whole number of seconds (it is '{value}')");
    value.parse().map_err(invalid)
}

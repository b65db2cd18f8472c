//! nix-relay carries the Nix worker protocol from a WebSocket to a fresh `nix-daemon --stdio`, for whoever brings an
//! OIDC token that the configuration lets in.
//!
//! ```text
//!  accept ─► http ─► oidc ─► policy ─► permit ─► session ─────────────► end
//!            head    who is  may       may they  nix-daemon spawned,    child reaped, permit
//!            in      it?     they?     now?      101, bytes both ways   back, one log line
//!            └── an answer of one line where a step says no ──┘
//! ```
//!
//! The modules stand in the order in which a connection meets them. Everything is synchronous: a thread for each
//! connection, which waits in one poll(2) for both sides of its session at once.
#![forbid(unsafe_code)]

/// What the operator said: TOML, environment and defaults become one validated `Config`. Reads the configuration file
/// and the environment, nothing else. Promises that whatever is in a `Config` can be used as it is, and that an error
/// is one line that names where it comes from.
mod config {
    use std::{env, fs, path::Path};
    use toml::{Table, Value, de::DeTable};
    use tungstenite::http::uri::Authority;

    /// Every key, in its table, with its default.
    const DEFAULTS: &str = include_str!("config.example.toml");

    /// The effective configuration; README.md says what each key means.
    #[derive(serde::Deserialize)]
    pub struct Config {
        pub listen: String,
        pub shutdown_grace_secs: u32,
        pub handshake_timeout_secs: u32,
        pub keepalive_secs: u32,
        pub issuer: String,
        pub audience: String,
        pub allowed_org: String,
        pub jwks_cache_ttl_secs: u32,
        pub nix_daemon_path: String,
        pub extra_args: Vec<String>,
        pub timeout_secs: u32,
        pub max_connections: u32,
        pub queue_timeout_secs: u32,
    }

    /// Defaults, then the file at `path` if there is one, then the environment: `NIX_RELAY_` and the key in capitals
    /// (with `NIX_` once only), where that is not empty. Also as TOML.
    ///
    /// Fails with one line: `FILE:LINE: KEY: what is wrong`, or `VARIABLE: what is wrong`.
    pub fn load(path: Option<&Path>) -> Result<(Config, String), String> {
        let mut settings: Table = DEFAULTS.parse().map_err(|e| format!("defaults: {e}"))?;
        if let Some(path) = path {
            read(path, &mut settings)?;
        }
        for (table, keys) in settings.clone() {
            for (key, old) in keys.as_table().into_iter().flatten() {
                let name = format!("NIX_RELAY_{}", key.trim_start_matches("nix_").to_uppercase());
                let text = env::var_os(&name).unwrap_or_default();
                let text = text.to_str().ok_or_else(|| format!("{name}: must be UTF-8"))?;
                let value = match old {
                    _ if text.is_empty() => continue,
                    Value::Integer(_) => text.parse().map_or(text.into(), Value::Integer),
                    Value::Array(_) => text.split_whitespace().collect::<Vec<_>>().into(),
                    _ => text.into(),
                };
                set(&mut settings, &table, key, value).map_err(|e| format!("{name}: {e}"))?;
            }
        }
        let config = typed(&settings)?;
        if config.allowed_org.is_empty() {
            let set = "set auth.allowed_org (NIX_RELAY_ALLOWED_ORG) to the organisation whose jobs may";
            return Err(format!("nobody could connect: {set}"));
        }
        Ok((config, settings.to_string()))
    }

    fn read(path: &Path, settings: &mut Table) -> Result<(), String> {
        let file = path.display();
        let text = fs::read_to_string(path).map_err(|e| format!("{file}: {e}"))?;
        let at = |start| format!("{file}:{}", text[..start].matches('\n').count() + 1);
        let invalid = |e: toml::de::Error| {
            let place = at(e.span().map_or(0, |span| span.start));
            format!("{place}: {}", e.message())
        };
        let values: Table = text.parse().map_err(invalid)?;
        for (table, keys) in DeTable::parse(&text).map_err(invalid)?.get_ref() {
            let (name, place) = (table.get_ref().as_ref(), at(table.span().start));
            let (Some(keys), true) = (keys.get_ref().as_table(), settings.contains_key(name)) else {
                return Err(format!("{place}: {name}: unknown table or key"));
            };
            for key in keys.keys() {
                let (place, key) = (at(key.span().start), key.get_ref().as_ref());
                set(settings, name, key, values[name][key].clone())
                    .map_err(|e| format!("{place}: {name}.{key}: {e}"))?;
            }
        }
        Ok(())
    }

    /// One setting at a time, so that whatever is wrong afterwards is wrong with this one.
    fn set(settings: &mut Table, table: &str, key: &str, value: Value) -> Result<(), String> {
        let old = settings.get_mut(table).and_then(|keys| keys.get_mut(key));
        *old.ok_or("unknown key")? = value.clone();
        typed(settings)?;
        let host_port = |a: Authority| a.port_u16().is_some() && !a.host().is_empty();
        let wrong = match (key, value.as_str(), value.as_integer()) {
            ("listen", Some(text), _) if !text.parse().is_ok_and(host_port) => "must be HOST:PORT or [IPV6]:PORT",
            ("issuer", Some(url), _) if !super::oidc::is_safe(url) => "must be an https URL (http for loopback alone)",
            // The daemon runs in /, so a path relative to where the relay started would mislead.
            ("nix_daemon_path", Some(path), _) if path.contains('/') && !path.starts_with('/') => {
                "must be an absolute path, or a name to look up in PATH"
            }
            ("audience" | "nix_daemon_path", Some(""), _) => "must not be empty",
            ("shutdown_grace_secs" | "keepalive_secs" | "queue_timeout_secs", ..) => return Ok(()),
            (_, _, Some(0)) => "must be at least 1",
            _ => return Ok(()),
        };
        Err(format!("{wrong}, not {value}"))
    }

    /// The keys of all tables, whose names differ.
    fn typed(settings: &Table) -> Result<Config, String> {
        let keys = settings.values().filter_map(Value::as_table).flatten();
        let all: Table = keys.map(|(key, value)| (key.clone(), value.clone())).collect();
        all.try_into().map_err(|e| e.message().to_owned())
    }
}

/// Who is calling: a token and the keys that its issuer publishes become verified claims. Talks to the issuer (OpenID
/// Connect Discovery 1.0, RFC 7517), from a thread of its own. Promises that a `Claims` exists only after signature,
/// issuer, audience and times of its token were checked (RFC 7519, RFC 8725), and that a token goes nowhere from
/// here, the log included.
mod oidc {
    use super::http::{Answer, INVALID_TOKEN, RETRY};
    use super::{config::Config, lock, secs};
    use jwt_simple::{JWTError, prelude::*};
    use log::{info, warn};
    use serde_json::{Map, Value};
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};
    use std::{io, net::IpAddr, thread};
    use ureq::{Agent, http::Uri};

    /// How far the issuer's clock and ours may be apart, in seconds.
    const CLOCK_SKEW: u64 = 60;
    const MAX_DOCUMENT_BYTES: u64 = 1 << 20;
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// For the discovery document and the key set together.
    const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
    /// Keys that could not be fetched again for so long are believed no more.
    const MAX_KEY_AGE: Duration = Duration::from_secs(24 * 3600);
    /// Between fetches that are made because a token names an unknown key, or after one failed; and while there are
    /// no keys.
    const PAUSE: Duration = Duration::from_secs(30);
    const SHORT_PAUSE: Duration = Duration::from_secs(1);

    /// Issuers are reached by https, or by http on this machine alone.
    pub fn is_safe(url: &str) -> bool {
        let uri: Uri = url.parse().unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        match uri.scheme_str() {
            Some("http") => host == "localhost" || address.is_ok_and(|ip| ip.is_loopback()),
            scheme => scheme == Some("https") && !host.is_empty(),
        }
    }

    /// The claims of a token that was verified.
    pub struct Claims(Map<String, Value>);

    impl Claims {
        /// A claim that is a string.
        pub fn text(&self, name: &str) -> Option<&str> {
            self.0.get(name).and_then(Value::as_str)
        }
    }

    type Verified = Result<JWTClaims<NoCustomClaims>, jwt_simple::Error>;
    type Verify = dyn Fn(&str, &VerificationOptions) -> Verified + Send + Sync;

    /// A published key, bound to one algorithm: the key decides on that, never the token.
    struct Key {
        id: Option<String>,
        verify: Box<Verify>,
    }

    /// One for each algorithm that a JSON Web Key is good for: none if its kind is unknown, it is too weak or not for
    /// signatures; several if it is of RSA and does not say.
    fn parse(jwk: &Value) -> Vec<Key> {
        let (text, id) = (jwk.to_string(), jwk["kid"].as_str());
        let mut keys = Vec::new();
        macro_rules! try_each {
            ($($kind:ty),*) => {$(
                if let Ok(key) = <$kind>::from_jwk(&text) {
                    let verify = move |t: &str, o: &VerificationOptions| key.verify_token(t, Some(o.clone()));
                    keys.push(Key { id: id.map(String::from), verify: Box::new(verify) });
                }
            )*};
        }
        try_each!(RS256PublicKey, RS384PublicKey, RS512PublicKey);
        try_each!(PS256PublicKey, PS384PublicKey, PS512PublicKey);
        try_each!(ES256PublicKey, ES384PublicKey, Ed25519PublicKey);
        keys
    }

    /// An issuer, its keys, and the thread that fetches them.
    pub struct Issuer {
        url: String,
        audience: String,
        cache_ttl: Duration,
        agent: Agent,
        /// What it has published, and when we asked for that.
        keys: Mutex<Option<(Instant, Arc<Vec<Key>>)>>,
        requests: Sender<Sender<()>>,
    }

    impl Issuer {
        /// Begins to fetch the keys, and waits for nothing. Fails without a thread.
        pub fn start(config: &Config) -> io::Result<Arc<Issuer>> {
            let agent = Agent::config_builder().timeout_connect(Some(CONNECT_TIMEOUT)).max_idle_connections(0);
            let agent = agent.max_redirects(0).user_agent(concat!("nix-relay/", env!("CARGO_PKG_VERSION"))).build();
            let (requests, receiver) = mpsc::channel();
            let issuer = Arc::new(Issuer {
                url: config.issuer.clone(),
                audience: config.audience.clone(),
                cache_ttl: secs(config.jwks_cache_ttl_secs),
                agent: agent.new_agent(),
                keys: Mutex::default(),
                requests,
            });
            let refreshed = issuer.clone();
            let thread = thread::Builder::new().name("keys".into());
            thread.spawn(move || refreshed.refresh(&receiver))?;
            Ok(issuer)
        }

        /// The thread: fetches at once, when the keys have aged, and when a token needs others; then it drops what
        /// was sent with the request, and so wakes who waits for that.
        fn refresh(&self, requests: &Receiver<Sender<()>>) {
            let (mut asked, mut waiting): (Option<Instant>, Option<Sender<()>>) = (None, None);
            loop {
                let now = Instant::now();
                let mut pause = self.cache_ttl;
                match self.fetch(now + FETCH_TIMEOUT) {
                    Ok(keys) => {
                        info!("fetched keys issuer={:?} count={}", self.url, keys.len());
                        *lock(&self.keys) = Some((now, Arc::new(keys)));
                    }
                    Err(e) => {
                        warn!("could not fetch keys issuer={:?} error={e:?}", self.url);
                        pause = pause.min(PAUSE);
                    }
                }
                drop(waiting);
                requests.try_iter().for_each(drop);
                let quiet = if self.keys().is_some() { PAUSE } else { SHORT_PAUSE };
                let due = Instant::now() + pause;
                let next = || requests.recv_timeout(due.saturating_duration_since(Instant::now()));
                waiting = next().ok();
                while waiting.is_some() && asked.is_some_and(|at| at.elapsed() < quiet) {
                    drop(waiting);
                    waiting = next().ok();
                }
                asked = waiting.as_ref().map(|_| Instant::now()).or(asked);
            }
        }

        /// The keys, unless they are too old to be believed.
        fn keys(&self) -> Option<Arc<Vec<Key>>> {
            let keys = lock(&self.keys).clone().filter(|(at, _)| at.elapsed() < MAX_KEY_AGE);
            keys.map(|(_, keys)| keys)
        }

        /// Discovery document, then key set (OpenID Connect Discovery 1.0, sections 4.1 to 4.3).
        fn fetch(&self, deadline: Instant) -> Result<Vec<Key>, String> {
            let url = self.url.trim_end_matches('/');
            let document = self.get(&format!("{url}/.well-known/openid-configuration"), deadline)?;
            if document["issuer"] != self.url {
                return Err(format!("discovery names another issuer, {}", document["issuer"]));
            }
            let url = document["jwks_uri"].as_str().unwrap_or_default();
            if !is_safe(url) {
                return Err(format!("the jwks_uri must be an https URL, not {url:?}"));
            }
            let set = self.get(url, deadline)?;
            let keys: Vec<Key> = set["keys"].as_array().into_iter().flatten().flat_map(parse).collect();
            if keys.is_empty() { Err(format!("{url}: no key of use")) } else { Ok(keys) }
        }

        fn get(&self, url: &str, deadline: Instant) -> Result<Value, String> {
            let left = deadline.saturating_duration_since(Instant::now());
            let request = self.agent.get(url).config().timeout_global(Some(left)).build();
            let body = request.call().and_then(|mut answer| match answer.status().as_u16() {
                200 => answer.body_mut().with_config().limit(MAX_DOCUMENT_BYTES).read_json(),
                status => Err(ureq::Error::StatusCode(status)),
            });
            body.map_err(|e| format!("{url}: {e}"))
        }

        /// Answers 401 if the token does not verify, and 503 if there are no keys to tell. Waits only if it names a
        /// key that is not in the cache, and then for one fetch at most.
        pub fn verify(&self, token: &str) -> Result<Claims, Answer> {
            let invalid = |why: &str| Answer::new(401, INVALID_TOKEN, &format!("the token does not verify: {why}"));
            let claims = token.split('.').nth(1).unwrap_or_default();
            let claims = Base64UrlSafeNoPadding::decode_to_vec(claims, None).unwrap_or_default();
            let claims = serde_json::from_slice::<Map<String, Value>>(&claims);
            let (Ok(header), Ok(claims)) = (Token::decode_metadata(token), claims) else {
                return Err(invalid("it is not a signed JSON Web Token"));
            };
            if claims.get("iss").and_then(Value::as_str) != Some(&self.url) {
                return Err(invalid("its issuer is not one that this relay trusts"));
            }
            let id = header.key_id();
            let fits = |key: &&Key| id.is_none() || key.id.as_deref() == id;
            let mut keys = self.keys();
            if !keys.as_ref().is_some_and(|keys| keys.iter().any(|key| fits(&key))) {
                let (request, fetched) = mpsc::channel();
                let _ = self.requests.send(request);
                let _ = fetched.recv_timeout(FETCH_TIMEOUT + CONNECT_TIMEOUT);
                keys = self.keys();
            }
            let keys = keys.ok_or_else(|| Answer::new(503, RETRY, "the issuer's keys cannot be had now"))?;
            let options = VerificationOptions {
                allowed_issuers: Some([self.url.clone()].into()),
                allowed_audiences: Some([self.audience.clone()].into()),
                time_tolerance: Some(coarsetime::Duration::from_secs(CLOCK_SKEW)),
                ..VerificationOptions::default()
            };
            let mut why = "its issuer publishes no key for it".to_owned();
            for key in keys.iter().filter(fits) {
                match (key.verify)(token, &options).map(|claims| claims.expires_at) {
                    Ok(Some(_)) => return Ok(Claims(claims)),
                    Ok(None) => why = "it never expires".into(),
                    Err(e) => match e.downcast_ref() {
                        // All keys for other algorithms say so; it must not hide the true reason.
                        Some(JWTError::AlgorithmMismatch) => {}
                        Some(e) => why = JWTError::to_string(e),
                        None => why = "a part of it cannot be read".into(),
                    },
                }
            }
            Err(invalid(&why))
        }
    }
}

/// May they: verified claims against the configuration, and who that makes the caller. Pure: touches nothing.
/// Promises that whoever matches nothing gets nothing.
mod policy {
    use super::{config::Config, http::Answer, oidc::Claims, shown};

    /// Claims that tell an operator whose job it was, where a token has them.
    const IDENTITY: [&str; 6] = ["sub", "repository", "ref", "event_name", "actor", "run_id"];

    /// The rule `allowed_org`: `repository_owner` is that, letter case aside, as GitHub and Forgejo have it. Says who
    /// the caller is, as `rule="…" sub="…" …`, every value escaped; or answers 403.
    pub fn authorize(config: &Config, claims: &Claims) -> Result<String, Answer> {
        let owner = claims.text("repository_owner").unwrap_or_default();
        if !owner.eq_ignore_ascii_case(&config.allowed_org) {
            let why = format!("the token is good, but not for this relay: repository_owner is {}", shown(owner));
            return Err(Answer::new(403, &[], &why));
        }
        let known = IDENTITY.iter().filter_map(|name| Some(format!(" {name}={}", shown(claims.text(name)?))));
        Ok(format!("rule=\"allowed_org\"{}", known.collect::<String>()))
    }
}

/// A request head in, a status out; nothing else of HTTP (RFC 9110, RFC 9112, RFC 6455 section 4). Reads and writes
/// the client's socket. Promises that every wait ends by a deadline, that a head is never longer than 16 KiB, and
/// that no answer is lost to a reset because the client still sends.
mod http {
    use super::poll;
    use jwt_simple::reexports::ct_codecs::{Base64, Decoder};
    use rustix::event::PollFlags;
    use std::io::{self, Read, Write};
    use std::net::{Shutdown, TcpStream};
    use std::time::{Duration, Instant};
    use std::{fmt::Display, os::fd::AsFd};
    use tungstenite::handshake::server::{create_response, write_response};
    use tungstenite::http::{HeaderValue, Request, Response, Version, header};

    /// So no token is longer, either.
    const MAX_HEAD_BYTES: usize = 16 << 10;

    /// Headers that some answers have.
    pub type Headers = &'static [(&'static str, &'static str)];
    pub const INVALID_TOKEN: Headers = &[("WWW-Authenticate", "Bearer realm=\"nix-relay\", error=\"invalid_token\"")];
    pub const RETRY: Headers = &[("Retry-After", "5")];
    const UPGRADE: Headers = &[("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")];

    /// Any answer but 101: a status, and one line that says what is wrong and what would mend it.
    pub struct Answer {
        pub status: u16,
        pub line: String,
        /// What only the log is told.
        pub cause: String,
        headers: Headers,
    }

    impl Answer {
        pub fn new(status: u16, headers: Headers, line: &str) -> Answer {
            Answer { status, headers, line: line.into(), cause: String::new() }
        }

        pub fn because(self, cause: impl Display) -> Answer {
            Answer { cause: format!(": {cause}"), ..self }
        }

        /// Sends it, gives the client `linger` to hear it, and ends the connection.
        pub fn send(&self, mut socket: &TcpStream, with_body: bool, linger: Duration) -> io::Result<()> {
            let (kind, length) = ("text/plain; charset=utf-8", (self.line.len() + 1).to_string());
            let all = [("Content-Type", kind), ("Content-Length", &length), ("Connection", "close")];
            let response = Response::builder().status(self.status);
            let response = all.iter().chain(self.headers).fold(response, |to, (name, value)| to.header(*name, *value));
            let mut bytes = Vec::new();
            let response = response.body(()).map_err(io::Error::other)?;
            write_response(&mut bytes, &response).map_err(io::Error::other)?;
            if with_body {
                writeln!(bytes, "{}", self.line)?;
            }
            socket.write_all(&bytes)?;
            self::linger(socket, linger)
        }
    }

    /// Ends our side of a connection, and waits for the client to end its own. What it still sends is read: left
    /// unread, it would make the kernel send a reset, which can overtake our last words.
    pub fn linger(mut socket: &TcpStream, limit: Duration) -> io::Result<()> {
        socket.shutdown(Shutdown::Write)?;
        let until = Instant::now() + limit;
        while !poll::ready([Some((socket.as_fd(), PollFlags::IN))], until)[0].is_empty()
            && socket.read(&mut [0; 4096])? > 0
        {}
        Ok(())
    }

    /// A request head, and what came behind it.
    pub struct Head {
        pub request: Request<()>,
        pub rest: Vec<u8>,
    }

    impl Head {
        /// `None`: the client left before it had sent a whole head.
        pub fn read(mut socket: &TcpStream, deadline: Instant) -> Result<Option<Head>, Answer> {
            let mut bytes = Vec::with_capacity(1024);
            while bytes.len() < MAX_HEAD_BYTES {
                if !poll::ready([Some((socket.as_fd(), PollFlags::IN))], deadline)[0].is_empty() {
                    let have = bytes.len();
                    bytes.resize(MAX_HEAD_BYTES, 0);
                    let length = socket.read(&mut bytes[have..]).unwrap_or(0);
                    bytes.truncate(have + length);
                    let head = Head::parse(&bytes)?;
                    if head.is_some() || length == 0 {
                        return Ok(head);
                    }
                } else if Instant::now() >= deadline {
                    return Err(Answer::new(408, &[], "the request head did not come in time"));
                }
            }
            Err(Answer::new(431, &[], "the request head is longer than 16 KiB"))
        }

        /// tungstenite's own parser knows GET alone; others must hear 405, and HEAD its answer.
        fn parse(bytes: &[u8]) -> Result<Option<Head>, Answer> {
            let bad = |e: &dyn Display| Answer::new(400, &[], &format!("not HTTP/1.1: {e}"));
            let mut headers = [httparse::EMPTY_HEADER; 100];
            let mut parsed = httparse::Request::new(&mut headers);
            let length = match parsed.parse(bytes) {
                Ok(httparse::Status::Partial) => return Ok(None),
                Ok(httparse::Status::Complete(length)) => length,
                Err(e @ httparse::Error::TooManyHeaders) => {
                    return Err(Answer::new(431, &[], &e.to_string()));
                }
                Err(e) => return Err(bad(&e)),
            };
            let mut request = Request::builder()
                .method(parsed.method.unwrap_or_default())
                .uri(parsed.path.unwrap_or_default())
                .version([Version::HTTP_10, Version::HTTP_11][usize::from(parsed.version == Some(1))]);
            for header in parsed.headers {
                request = request.header(header.name, header.value);
            }
            let request = request.body(()).map_err(|e| bad(&e))?;
            Ok(Some(Head { request, rest: bytes[length..].to_vec() }))
        }

        /// The bytes of the 101, if this is a WebSocket upgrade (RFC 6455, section 4.2).
        pub fn switching_protocols(&self) -> Result<Vec<u8>, Answer> {
            let refused = |e| Answer::new(426, UPGRADE, &format!("this is a WebSocket, which client.sh can open: {e}"));
            let mut response = create_response(&self.request).map_err(refused)?;
            let name = header::SEC_WEBSOCKET_PROTOCOL;
            let offers = self.request.headers().get_all(&name).iter();
            let mut offers = offers.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
            if offers.any(|offer| offer.trim_ascii() == b"binary") {
                response.headers_mut().insert(name, HeaderValue::from_static("binary"));
            }
            let mut bytes = Vec::new();
            write_response(&mut bytes, &response).map_err(refused)?;
            Ok(bytes)
        }

        /// The token of `Authorization: Bearer` (RFC 6750), or of `Basic` as its password.
        pub fn token(&self) -> Result<String, Answer> {
            let mut all = self.request.headers().get_all(header::AUTHORIZATION).iter();
            let (first, second) = (all.next(), all.next());
            if second.is_some() {
                return Err(Answer::new(400, &[], "more than one Authorization header"));
            }
            let text = first.and_then(|value| value.to_str().ok()).unwrap_or_default();
            let (scheme, rest) = text.split_once(' ').unwrap_or_default();
            let basic = |pair: Vec<u8>| Some(String::from_utf8(pair).ok()?.split_once(':')?.1.to_owned());
            let token = match scheme.to_ascii_lowercase().as_str() {
                "bearer" => Some(rest.trim().to_owned()),
                "basic" => Base64::decode_to_vec(rest.trim(), None).ok().and_then(basic),
                _ => None,
            };
            let line = "send an OIDC token, as a Bearer token or as the password of Basic";
            token.ok_or_else(|| Answer::new(401, &[("WWW-Authenticate", "Bearer realm=\"nix-relay\"")], line))
        }
    }
}

/// What every wait for a client or a child rests on: poll(2), with a limit.
mod poll {
    use rustix::event::{PollFd, PollFlags, Timespec};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::time::Instant;

    /// A descriptor to wait for, if there is one.
    pub fn on(fd: &Option<impl AsFd>, events: PollFlags) -> Option<(BorrowedFd<'_>, PollFlags)> {
        fd.as_ref().map(|fd| (fd.as_fd(), events))
    }

    /// Waits until a descriptor is ready for its events (or broken, which always counts) or until the time has come,
    /// and says what each is ready for: nothing, at the deadline and now and then without a reason.
    pub fn ready<const N: usize>(fds: [Option<(BorrowedFd<'_>, PollFlags)>; N], until: Instant) -> [PollFlags; N] {
        let polled = fds.iter().flatten();
        let mut polled: Vec<_> = polled.map(|(fd, e)| PollFd::from_borrowed_fd(*fd, *e)).collect();
        let left = until.saturating_duration_since(Instant::now());
        // It fails when a signal comes, and when memory is short: both pass.
        let _ = rustix::event::poll(&mut polled, Timespec::try_from(left).ok().as_ref());
        let mut answers = polled.iter().map(PollFd::revents);
        fds.map(|fd| fd.and_then(|_| answers.next()).unwrap_or(PollFlags::empty()))
    }
}

/// nix-daemon on one side, the WebSocket on the other, and how it ends. Owns the connection and the child. Promises
/// that neither direction ever waits for the other, that each session ends in `Session::run` with one `End`, from
/// which log and Close are made, and that by then the child is reaped and its process group gone.
mod session {
    use super::{config::Config, http, poll, secs, shown};
    use log::{info, warn};
    use rustix::event::PollFlags;
    use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
    use std::io::{self, ErrorKind, IoSlice, Read, Write};
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
    use std::time::{Duration, Instant};
    use std::{env, iter, net::TcpStream, sync::Arc};
    use tungstenite::error::{Error, ProtocolError::ResetWithoutClosingHandshake};
    use tungstenite::protocol::frame::{FrameHeader, coding::Control, coding::Data, coding::OpCode};
    use tungstenite::protocol::{Role, WebSocket, WebSocketConfig};
    use tungstenite::{Bytes, Message};

    const PIPE_BYTES: usize = 1 << 20;
    /// The largest frame we send, and how much of the client's is read at once.
    const CHUNK_BYTES: usize = 256 << 10;
    const MAX_MESSAGE_BYTES: usize = 16 << 20;
    /// Of the child's standard error, in the log.
    const MAX_LINE_BYTES: usize = 4 << 10;
    /// RFC 6455, section 5.5: a control frame holds 125 bytes, and the code of a Close is two.
    const MAX_REASON_BYTES: usize = 123;
    /// With more than this unsent, a pong is dropped: the last one does (RFC 6455, section 5.5.3).
    const MAX_UNSENT_BYTES: usize = CHUNK_BYTES + 4096;
    /// Intervals without a sign of life after which a client counts as gone.
    const KEEPALIVES: u32 = 3;
    /// The client has so long to take a Close, and again to end the connection after it.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
    /// And so long to take, and before it, what a child left that has exited.
    const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
    /// What a child hears whose session is over, and the seconds that it then has. Its standard input is closed by
    /// then: that makes nix-daemon cancel its builds and let go of its locks. The last step, which only the kernel
    /// can delay, is repeated.
    const LADDER: [(Option<Signal>, u32); 3] = [(None, 10), (Some(Signal::TERM), 5), (Some(Signal::KILL), 5)];

    /// A running child, leader of a process group of its own. Dropped, it is killed and reaped.
    pub struct Daemon {
        child: Child,
        stdin: Option<ChildStdin>,
        stdout: Option<ChildStdout>,
        stderr: Option<ChildStderr>,
        /// Readable once it has exited.
        exit: Option<OwnedFd>,
        /// Of its standard error: the line that is not whole yet, and the one before.
        line: Vec<u8>,
        last_line: String,
    }

    impl Daemon {
        /// Fails if the program cannot be run, with why.
        pub fn spawn(config: &Config) -> io::Result<Daemon> {
            let mut command = Command::new(&config.nix_daemon_path);
            command.args(&config.extra_args).current_dir("/").process_group(0).env_remove("NOTIFY_SOCKET");
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let ours = |name: &str| name.starts_with("NIX_RELAY_") || name.starts_with("ACTIONS_");
            for (name, _) in env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
                command.env_remove(name);
            }
            let mut child = command.spawn()?;
            let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
            let (stderr, line, last_line) = (child.stderr.take(), Vec::new(), String::from("it gave no reason"));
            let mut daemon = Daemon { child, stdin, stdout, stderr, exit: None, line, last_line };
            daemon.exit = Some(pidfd_open(Pid::from_child(&daemon.child), PidfdFlags::empty())?);
            if let (Some(stdin), Some(stdout)) = (&daemon.stdin, &daemon.stdout) {
                rustix::io::ioctl_fionbio(stdin, true)?;
                // May be refused to an unprivileged user; then smaller pipes do.
                let _ = rustix::pipe::fcntl_setpipe_size(stdin, PIPE_BYTES);
                let _ = rustix::pipe::fcntl_setpipe_size(stdout, PIPE_BYTES);
            }
            Ok(daemon)
        }

        /// As much of the input as it takes at once.
        fn feed(&mut self, input: &mut Bytes) {
            match self.stdin.as_mut().map_or(Ok(input.len()), |stdin| stdin.write(input)) {
                Ok(written) => drop(input.split_to(written)),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                // It wants no more, but may still have something to say.
                Err(_) => (self.stdin, *input) = (None, Bytes::new()),
            }
        }

        /// What it has written to its standard error, line by line, to the log.
        fn log_stderr(&mut self, session: u64) {
            let mut chunk = [0; MAX_LINE_BYTES];
            let length = self.stderr.as_mut().map_or(0, |pipe| pipe.read(&mut chunk).unwrap_or(0));
            self.stderr = self.stderr.take().filter(|_| length > 0);
            for &byte in &chunk[..length] {
                self.line.push(byte);
                if byte == b'\n' || self.line.len() == MAX_LINE_BYTES {
                    self.end_line(session);
                }
            }
        }

        fn end_line(&mut self, session: u64) {
            if !self.line.trim_ascii().is_empty() {
                self.last_line = String::from_utf8_lossy(self.line.trim_ascii_end()).into_owned();
                info!("nix-daemon says session={session} line={:?}", self.last_line);
            }
            self.line.clear();
        }

        /// Sees to it that the child ends, and its group; says whether all was well, and how it did.
        fn end(&mut self, session: u64) -> (bool, String) {
            (self.stdin, self.stdout) = (None, None);
            for (signal, wait) in LADDER.into_iter().chain(iter::repeat(LADDER[LADDER.len() - 1])) {
                if let Some(signal) = signal {
                    warn!("nix-daemon outlives its session session={session} signal={}", signal.as_raw());
                    let _ = kill_process_group(Pid::from_child(&self.child), signal);
                }
                let until = Instant::now() + secs(wait);
                let mut exited = false;
                while Instant::now() < until {
                    let fds = [poll::on(&self.exit, PollFlags::IN), poll::on(&self.stderr, PollFlags::IN)];
                    let [exit, stderr] = poll::ready(fds, until);
                    exited = !exit.is_empty();
                    if !stderr.is_empty() {
                        self.log_stderr(session);
                    } else if exited {
                        break;
                    }
                }
                if exited {
                    break;
                }
            }
            self.end_line(session);
            self.kill_group();
            match self.child.wait().map(|status| status.code().ok_or(status.signal().unwrap_or_default())) {
                Ok(Ok(code)) => (code == 0, format!("nix-daemon exited with status {code}")),
                Ok(Err(signal)) => (false, format!("nix-daemon was killed by signal {signal}")),
                Err(e) => (false, format!("nix-daemon is lost: {e}")),
            }
        }

        /// To be called before the child is reaped: after that, another group may have the number.
        fn kill_group(&self) {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            if let Ok(None) = self.child.try_wait() {
                self.kill_group();
                let _ = self.child.wait();
            }
        }
    }

    /// The connection, which never blocks. Where writing fails for good, the next poll says that it is broken.
    struct Wire {
        socket: Arc<TcpStream>,
        /// What could not be sent yet: whole frames, but for the first, which may be half gone.
        unsent: Vec<u8>,
    }

    impl Wire {
        fn send(&mut self, opcode: OpCode, payload: &[u8]) {
            let mut header = Vec::with_capacity(14);
            let frame = FrameHeader { opcode, ..FrameHeader::default() };
            let _ = frame.format(payload.len() as u64, &mut header);
            let parts = [IoSlice::new(&header), IoSlice::new(payload)];
            let idle = self.unsent.is_empty();
            let sent = if idle { (&*self.socket).write_vectored(&parts).unwrap_or(0) } else { 0 };
            self.unsent.extend_from_slice(&header[sent.min(header.len())..]);
            self.unsent.extend_from_slice(&payload[sent.saturating_sub(header.len())..]);
        }

        /// For when the socket, which was full, can take more.
        fn send_more(&mut self) {
            let sent = (&*self.socket).write(&self.unsent).unwrap_or(0);
            self.unsent.drain(..sent);
        }
    }

    impl Read for Wire {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            (&*self.socket).read(buffer)
        }
    }

    /// tungstenite answers pings here, with whole frames.
    impl Write for Wire {
        fn write(&mut self, frame: &[u8]) -> io::Result<usize> {
            if self.unsent.len() < MAX_UNSENT_BYTES {
                self.unsent.extend_from_slice(frame);
            }
            Ok(frame.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Why a session ended: a name, the code of the Close that the client gets (RFC 6455, section 7.4.1) if it gets
    /// one, and what else there is to say.
    struct End(&'static str, Option<u16>, String);

    const EXITED: &str = "daemon-exited";

    fn end(name: &'static str, code: impl Into<Option<u16>>, detail: impl ToString) -> Option<End> {
        Some(End(name, code.into(), detail.to_string()))
    }

    /// One client and one child.
    pub struct Session {
        number: u64,
        client: WebSocket<Wire>,
        /// tungstenite may hold a message that it has read already.
        buffered: bool,
        daemon: Daemon,
        /// What the client sent and the child has not taken yet.
        input: Bytes,
        chunk: Vec<u8>,
        keepalive: Duration,
        /// When the client last gave a sign of life.
        alive: Instant,
        ping: Instant,
        deadline: Instant,
        bytes_in: u64,
        bytes_out: u64,
    }

    impl Session {
        /// `switching` is the 101, to be sent first, and `rest` what came behind the request. Fails when the
        /// connection cannot be made ready.
        #[rustfmt::skip]
        pub fn new(
            number: u64, config: &Config, socket: Arc<TcpStream>, (switching, rest): (Vec<u8>, Vec<u8>), daemon: Daemon,
        ) -> io::Result<Session> {
            // None at all is one that is as long as the session.
            let keepalive = secs(if config.keepalive_secs > 0 { config.keepalive_secs } else { config.timeout_secs });
            // For a peer that vanishes while nothing is read from it, in milliseconds.
            let limit = (keepalive * KEEPALIVES).as_millis().min(i32::MAX as u128) as u32;
            rustix::net::sockopt::set_tcp_user_timeout(&socket, limit)?;
            socket.set_nonblocking(true)?;
            let limits = WebSocketConfig::default().read_buffer_size(CHUNK_BYTES).write_buffer_size(0);
            let limits = limits.max_message_size(Some(MAX_MESSAGE_BYTES)).max_frame_size(Some(MAX_MESSAGE_BYTES));
            let (alive, buffered) = (Instant::now(), !rest.is_empty());
            let wire = Wire { socket, unsent: switching };
            let client = WebSocket::from_partially_read(wire, rest, Role::Server, Some(limits));
            let (ping, deadline) = (alive + keepalive, alive + secs(config.timeout_secs));
            let (input, chunk, bytes_in, bytes_out) = (Bytes::new(), vec![0; CHUNK_BYTES], 0, 0);
            Ok(Session {
                number, client, buffered, daemon, input, chunk, keepalive, alive, ping, deadline, bytes_in, bytes_out,
            })
        }

        /// Carries bytes until it is over, which is at once when `closing` hangs up; then ends both sides, and logs
        /// how that went.
        pub fn run(mut self, closing: BorrowedFd<'_>) {
            let start = Instant::now();
            let End(reason, code, mut detail) = loop {
                if let Some(end) = self.turn(closing) {
                    break end;
                }
            };
            self.daemon.stdin = None;
            if reason != EXITED {
                self.hang_up(code, &detail, CLOSE_TIMEOUT);
            }
            let (success, fate) = self.daemon.end(self.number);
            if reason == EXITED {
                detail = if success { detail } else { format!("{fate}: {}", self.daemon.last_line) };
                self.hang_up(Some(if success { 1000 } else { 1011 }), &detail, DRAIN_TIMEOUT);
            }
            let (number, secs, detail) = (self.number, start.elapsed().as_secs_f64(), shown(&detail));
            let (bytes_in, bytes_out) = (self.bytes_in, self.bytes_out);
            info!(
                "session ended session={number} reason={reason} detail={detail} secs={secs:.3} \
                 bytes_in={bytes_in} bytes_out={bytes_out} exit={fate:?}"
            );
        }

        /// Waits for what happens next, and does what that asks for. Nothing else in here waits: so neither direction
        /// waits for the other.
        fn turn(&mut self, closing: BorrowedFd<'_>) -> Option<End> {
            let (wire, daemon) = (self.client.get_ref(), &self.daemon);
            // The child waits while the client has not taken this, and the client while the child has not taken its
            // input.
            let (full, listening) = (!wire.unsent.is_empty(), self.input.is_empty());
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, listening);
            wanted.set(PollFlags::OUT, full);
            let fds = [
                Some((wire.socket.as_fd(), wanted)),
                poll::on(&daemon.stdin, PollFlags::OUT).filter(|_| !listening),
                poll::on(&daemon.stdout, PollFlags::IN).filter(|_| !full),
                poll::on(&daemon.stderr, PollFlags::IN),
                poll::on(&daemon.exit, PollFlags::IN).filter(|_| !full),
                Some((closing, PollFlags::IN)),
            ];
            let silence = self.alive + self.keepalive * KEEPALIVES;
            let at_once = listening && self.buffered;
            let until = if at_once { self.alive } else { self.deadline.min(self.ping).min(silence) };
            let [client, stdin, stdout, stderr, exit, closing] = poll::ready(fds, until);
            let broken = client.intersects(PollFlags::HUP | PollFlags::ERR);

            if client.contains(PollFlags::OUT) {
                self.client.get_mut().send_more();
            }
            if !stdin.is_empty() {
                self.daemon.feed(&mut self.input);
            }
            if !stderr.is_empty() {
                self.daemon.log_stderr(self.number);
            }
            if !stdout.is_empty() {
                let stdout = self.daemon.stdout.as_mut()?;
                let length = stdout.read(&mut self.chunk).unwrap_or(0);
                if length == 0 {
                    return end(EXITED, None, "");
                }
                self.bytes_out += length as u64;
                self.client.get_mut().send(OpCode::Data(Data::Binary), &self.chunk[..length]);
            } else if !exit.is_empty() {
                return end(EXITED, None, "");
            }
            if listening && (self.buffered || broken || client.contains(PollFlags::IN)) {
                let message = self.client.read();
                self.buffered = message.is_ok();
                if let Some(end) = self.receive(message) {
                    return Some(end);
                }
            } else if broken {
                return end("client-gone", None, "the connection broke");
            }
            let (now, wire) = (Instant::now(), self.client.get_mut());
            // It takes what is unsent; or it sends, if nothing was; or it may not send, and that is our doing.
            let sends = client.contains(PollFlags::IN) || !listening || !wire.unsent.is_empty();
            if client.contains(PollFlags::OUT) || !full && sends {
                self.alive = now;
            }
            if !closing.is_empty() {
                return end("shutting-down", 1001, "the relay is shutting down");
            } else if now >= self.deadline {
                return end("timed-out", 1008, "daemon.timeout_secs are over");
            } else if now >= self.alive + self.keepalive * KEEPALIVES {
                return end("client-gone", None, "it gave no sign of life for three keepalives");
            } else if now >= self.ping {
                self.ping = now + self.keepalive;
                if wire.unsent.is_empty() {
                    wire.send(OpCode::Control(Control::Ping), &[]);
                }
            }
            None
        }

        fn receive(&mut self, message: Result<Message, Error>) -> Option<End> {
            match message {
                Ok(Message::Binary(payload)) => {
                    self.bytes_in += payload.len() as u64;
                    self.input = payload;
                    self.daemon.feed(&mut self.input);
                    None
                }
                Ok(Message::Text(_)) => end("protocol-error", 1003, "only binary messages carry data"),
                Ok(Message::Close(close)) => end("client-closed", close.map(|close| close.code.into()), ""),
                Ok(_) => None,
                Err(Error::Io(e)) if e.kind() == ErrorKind::WouldBlock => None,
                Err(Error::Capacity(e)) => end("protocol-error", 1009, e),
                Err(e @ Error::Utf8(_)) => end("protocol-error", 1007, e),
                Err(Error::Protocol(ResetWithoutClosingHandshake)) => {
                    end("client-gone", None, "it hung up without a Close")
                }
                Err(Error::Protocol(e)) => end("protocol-error", 1002, e),
                Err(e) => end("client-gone", None, e),
            }
        }

        /// Sends a Close with this code, or with none (RFC 6455, section 5.5.1), and hangs up.
        fn hang_up(&mut self, code: Option<u16>, reason: &str, limit: Duration) {
            let cut = if code.is_some() { reason.floor_char_boundary(MAX_REASON_BYTES) } else { 0 };
            let code = code.into_iter().flat_map(u16::to_be_bytes);
            let payload: Vec<u8> = code.chain(reason.bytes().take(cut)).collect();
            let wire = self.client.get_mut();
            wire.send(OpCode::Control(Control::Close), &payload);
            // One write takes no longer than that, however slow the client is.
            let _ = wire.socket.set_nonblocking(false);
            let _ = wire.socket.set_write_timeout(Some(limit));
            wire.send_more();
            let _ = http::linger(&wire.socket, limit);
        }
    }
}

/// Text that a client or an issuer chose, fit for a line of the log: quoted, escaped, cut short.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(256).collect::<String>())
}

fn secs(secs: u32) -> Duration {
    Duration::from_secs(secs.into())
}

/// A panic elsewhere must not become one here: what is behind these locks is valid at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// main: arguments, logging, the accept loop, who may be in, shutdown.

use config::Config;
use http::{Answer, Head, Headers, RETRY};
use log::{error, info, warn};
use oidc::Issuer;
use session::{Daemon, Session};
use signal_hook::{consts, iterator::Signals};
use std::io::{self, PipeReader};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{collections::VecDeque, env, fmt::Display, os::fd::AsFd, path::Path, thread};
use tungstenite::http::Method;

const USAGE: &str = "usage: nix-relay [--check] [CONFIG.toml]    (or NIX_RELAY_CONFIG=CONFIG.toml)
Carries the Nix worker protocol from a WebSocket to nix-daemon, for callers with an OIDC token.
  --check    validate the configuration, print it as it is in effect, and exit
  --help     print this, and exit
  --version  print the version, and exit
";

/// Connections that have no session yet.
const MAX_HANDSHAKES: u32 = 256;
/// Before trying again when descriptors or threads have run out.
const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
/// For an answer to be sent, which any socket has room for, and for the client to hear it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_secs(1);
/// After the grace, for the sessions to end: as long as the ladder of `session` needs.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(19);

/// What every connection needs.
struct Relay {
    config: Config,
    issuer: Arc<Issuer>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    /// Hangs up when the sessions are to end.
    closing: PipeReader,
}

/// Who is in, and who may be.
#[derive(Default)]
struct Gate {
    connections: u32,
    /// Those of them whose request, or whose end after a refusal, we wait for, the oldest first.
    awaited: VecDeque<Arc<TcpStream>>,
    /// Sessions that may yet begin.
    permits: u32,
    /// How many times the relay was told to stop; once is enough to let nobody in.
    signals: u32,
}

impl Relay {
    fn change(&self, change: impl FnOnce(&mut Gate)) {
        change(&mut lock(&self.gate));
        self.gate_changed.notify_all();
    }

    fn wait(&self, limit: Duration, done: impl Fn(&Gate) -> bool) -> MutexGuard<'_, Gate> {
        let gate = self.gate_changed.wait_timeout_while(lock(&self.gate), limit, |g| !done(g));
        gate.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Something of the gate's, given back when dropped.
struct Held(Arc<Relay>, fn(&mut Gate));

impl Drop for Held {
    fn drop(&mut self) {
        self.0.change(self.1);
    }
}

fn main() -> ExitCode {
    let say = |text: &str| {
        print!("{text}");
        ExitCode::SUCCESS
    };
    let (checks, arguments): (Vec<_>, Vec<_>) = env::args_os().skip(1).partition(|argument| argument == "--check");
    let path = match &arguments[..] {
        [] => env::var_os("NIX_RELAY_CONFIG").unwrap_or_default(),
        [only] if only == "--help" => return say(USAGE),
        [only] if only == "--version" => return say(concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n")),
        [only] if !only.to_string_lossy().starts_with('-') => only.clone(),
        _ => {
            eprint!("nix-relay: did not expect {arguments:?}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let path = Some(Path::new(&path)).filter(|path| !path.as_os_str().is_empty());
    let config = match config::load(path) {
        Ok((_, text)) if !checks.is_empty() => return say(&text),
        Ok((config, _)) => config,
        Err(e) => {
            eprintln!("nix-relay: {}", e.replace('\n', " "));
            return ExitCode::from(2);
        }
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let Err(e) = run(config) else { return ExitCode::SUCCESS };
    error!("{e}");
    ExitCode::FAILURE
}

/// Until it was told to stop and nobody is left, or their time is over. Fails if it cannot start.
fn run(config: Config) -> io::Result<()> {
    let listener = TcpListener::bind(&config.listen)
        .map_err(|e| io::Error::other(format!("cannot listen on {}: {e}", config.listen)))?;
    let mut signals = Signals::new([consts::SIGTERM, consts::SIGINT])?;
    let grace = secs(config.shutdown_grace_secs);
    let (closing, close) = io::pipe()?;
    let relay = Arc::new(Relay {
        issuer: Issuer::start(&config)?,
        gate: Mutex::new(Gate { permits: config.max_connections, ..Gate::default() }),
        gate_changed: Condvar::new(),
        closing,
        config,
    });
    info!("listening address={}", listener.local_addr()?);
    let (accepting, signalled) = (relay.clone(), relay.clone());
    let thread = |name: &str| thread::Builder::new().name(name.into());
    thread("accept").spawn(move || accept(&accepting, &listener))?;
    let count = move || signals.forever().for_each(|_| signalled.change(|gate| gate.signals += 1));
    thread("signals").spawn(count)?;
    while relay.wait(Duration::MAX, |gate| gate.signals > 0).signals == 0 {}
    info!("shutting down grace_secs={}", grace.as_secs());
    drop(relay.wait(grace, |gate| gate.connections == 0 || gate.signals > 1));
    drop(close);
    let left = relay.wait(SHUTDOWN_TIMEOUT, |gate| gate.connections == 0).connections;
    info!("shut down connections_left={left}");
    Ok(())
}

/// Hands every connection to a thread of its own. Nothing ends this. Where too many have no session yet, the one that
/// we have waited for longest goes, so that silent clients keep nobody out.
fn accept(relay: &Arc<Relay>, listener: &TcpListener) {
    for number in 1.. {
        let socket = match listener.accept() {
            Ok((socket, _)) => Arc::new(socket),
            Err(e) => {
                warn!("cannot accept error={e:?}");
                thread::sleep(SCARCITY_PAUSE);
                continue;
            }
        };
        let _ = socket.set_write_timeout(Some(ANSWER_TIMEOUT)).and(socket.set_nodelay(true));
        let mut gate = lock(&relay.gate);
        let sessions = relay.config.max_connections - gate.permits;
        if gate.connections >= MAX_HANDSHAKES + sessions {
            let oldest = gate.awaited.pop_front();
            drop(gate);
            let leaving = oldest.as_ref().unwrap_or(&socket);
            refuse(leaving, &busy("too many handshakes"), true, Duration::ZERO);
            // Its thread, if it has one, reads the end of the connection.
            let _ = leaving.shutdown(Shutdown::Both);
            if oldest.is_none() {
                continue;
            }
            gate = lock(&relay.gate);
        }
        gate.connections += 1;
        gate.awaited.push_back(socket.clone());
        drop(gate);
        let visit = Held(relay.clone(), |gate| gate.connections -= 1);
        let served = socket.clone();
        let thread = thread::Builder::new().name(format!("connection {number}"));
        if let Err(e) = thread.spawn(move || serve(&visit.0, &served, number)) {
            lock(&relay.gate).awaited.pop_back();
            refuse(&socket, &busy(e), true, Duration::ZERO);
            thread::sleep(SCARCITY_PAUSE);
        }
    }
}

fn busy(cause: impl Display) -> Answer {
    Answer::new(503, RETRY, "the relay is busy; try again later").because(cause)
}

/// Answers something else than 101. All refusals are logged, but not how healthy we are.
fn refuse(socket: &TcpStream, answer: &Answer, with_body: bool, linger: Duration) {
    let (status, line) = (answer.status, &answer.line);
    let peer = socket.peer_addr().map_or_else(|e| e.to_string(), |peer| peer.to_string());
    if !["ok", "draining"].contains(&line.as_str()) {
        info!("refused peer={peer} status={status} reason={}", shown(&format!("{line}{}", answer.cause)));
    }
    let _ = answer.send(socket, with_body, linger);
}

/// One connection, from its first byte to its last.
fn serve(relay: &Arc<Relay>, socket: &Arc<TcpStream>, number: u64) {
    let head = Head::read(socket, Instant::now() + secs(relay.config.handshake_timeout_secs));
    let heard = || lock(&relay.gate).awaited.retain(|other| !Arc::ptr_eq(other, socket));
    heard();
    let with_body = !matches!(&head, Ok(Some(head)) if head.request.method() == Method::HEAD);
    match head.and_then(|head| head.map(|head| admit(relay, socket, number, head)).transpose()) {
        Ok(None) => {}
        Ok(Some((session, _permit))) => session.run(relay.closing.as_fd()),
        Err(answer) => {
            lock(&relay.gate).awaited.push_back(socket.clone());
            refuse(socket, &answer, with_body, LINGER);
            heard();
        }
    }
}

/// The session that a request asks for, and the permit for it; or why there is none.
fn admit(relay: &Arc<Relay>, socket: &Arc<TcpStream>, number: u64, head: Head) -> Result<(Session, Held), Answer> {
    let path = head.request.uri().path();
    let allow: Headers = match path {
        "/relay" => &[("Allow", "GET")],
        "/healthz" => &[("Allow", "GET, HEAD")],
        _ => return Err(Answer::new(404, &[], "there is nothing here; the relay is at /relay")),
    };
    if !allow[0].1.split(", ").any(|method| method == head.request.method()) {
        return Err(Answer::new(405, allow, "this path does not know the method"));
    } else if path == "/healthz" {
        let draining = lock(&relay.gate).signals > 0;
        return Err(if draining { Answer::new(503, &[], "draining") } else { Answer::new(200, &[], "ok") });
    }
    let switching = head.switching_protocols()?;
    let token = head.token()?;
    let claims = relay.issuer.verify(&token)?;
    let identity = policy::authorize(&relay.config, &claims)?;
    let mut gate = relay.wait(secs(relay.config.queue_timeout_secs), |gate| gate.permits > 0 || gate.signals > 0);
    if gate.signals > 0 {
        return Err(Answer::new(503, RETRY, "the relay is shutting down; try again later"));
    } else if gate.permits == 0 {
        return Err(Answer::new(503, RETRY, "all sessions are in use; try again later"));
    }
    gate.permits -= 1;
    drop(gate);
    let permit = Held(relay.clone(), |gate| gate.permits += 1);

    let daemon = Daemon::spawn(&relay.config).map_err(|e| {
        let line = "nix-daemon does not start; the relay's log has the cause";
        Answer::new(502, &[], line).because(format!("{}: {e}", relay.config.nix_daemon_path))
    })?;
    let peer = socket.peer_addr().map_err(busy)?;
    let session = Session::new(number, &relay.config, socket.clone(), (switching, head.rest), daemon).map_err(busy)?;
    info!("session opened session={number} peer={peer} {identity}");
    Ok((session, permit))
}

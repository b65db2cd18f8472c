//! nix-relay carries the Nix worker protocol from a WebSocket to a fresh `nix-daemon --stdio`,
//! for every caller whose OIDC token the configuration allows. The modules stand in the order in
//! which a reader needs them, and each one uses only those below it:
//!
//! ```text
//!  accept ─► http ─► oidc ─► policy ─► permit ─► session ─────────────► end
//!            head    who is  may       may they  nix-daemon spawned,    child reaped, permit
//!            in      it?     they?     now?      101, bytes both ways   back, one log line
//!            └── an answer of one line where a step says no ──┘
//! ```
//!
//! Each connection has a thread, and each session has two more, which copy. `nix-relay --stdio`,
//! which an unchanged nix runs in place of ssh, is in client.rs; it uses `copy` and what is below.
#![forbid(unsafe_code)]

mod client;

use config::Config;
use connection::Relay;
use log::{error, info, warn};
use sd_notify::NotifyState;
use signal_hook::{consts, iterator::Signals};
use std::ffi::OsString;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, thread};

const USAGE: &str = "\
usage: nix-relay [--check] [CONFIG.toml]    the relay (or NIX_RELAY_CONFIG=CONFIG.toml)
       nix-relay --stdio                    its client, which Nix runs; see README.md
Carries the Nix worker protocol from a WebSocket to nix-daemon, for callers with an OIDC token.
  --check    validate the configuration, print it as it is in effect, and exit
  --help     print this, and exit
  --version  print the version, and exit
";

/// How long sessions may take to end after the grace: as long as `session`'s termination steps,
/// and a little more.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(19);

/// How many new connections may wait to be accepted. Once they are more, the kernel drops what
/// comes, and a client tries again only a second later. std would set 128.
const BACKLOG: i32 = 4096;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let words: Vec<_> = arguments
        .iter()
        .map(|argument| argument.to_string_lossy())
        .collect();
    let words: Vec<&str> = words.iter().map(|word| word.as_ref()).collect();

    match words[..] {
        ["--help"] => print(USAGE),
        ["--version"] => print(concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n")),
        ["--stdio"] => client::run(),
        // Nix passes this for a store of ssh://.
        ["--serve", ..] => fail(1, client::WRONG_STORE),
        ["--check"] => check(config_path(None)),
        ["--check", path] | [path, "--check"] if !path.starts_with('-') => {
            let path = arguments.iter().find(|argument| *argument != "--check");
            check(config_path(path))
        }
        [] => relay(config_path(None)),
        [path] if !path.starts_with('-') => relay(config_path(arguments.first())),
        _ => fail(2, &format!("unexpected arguments: {arguments:?}\n{USAGE}")),
    }
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(status: u8, text: &str) -> ExitCode {
    eprintln!("nix-relay: {}", text.trim_end());
    ExitCode::from(status)
}

/// The file named by the argument, or else by the variable, if that is not empty.
fn config_path(argument: Option<&OsString>) -> Option<PathBuf> {
    let variable = env::var_os("NIX_RELAY_CONFIG").filter(|path| !path.is_empty());
    argument.cloned().or(variable).map(PathBuf::from)
}

/// `nix-relay --check`. It does not listen, ask an issuer or open a key file, so it also works
/// on another machine than the relay's.
fn check(path: Option<PathBuf>) -> ExitCode {
    for warning in config::warnings() {
        eprintln!("nix-relay: warning: {warning}");
    }
    let loaded = config::load(path.as_deref());
    match loaded.and_then(|(_, effective)| oidc::check_environment().map(|()| effective)) {
        Ok(effective) => print(&effective),
        Err(e) => fail(2, &e),
    }
}

/// Runs the relay until it is told to stop and all sessions have ended or the grace is over.
fn relay(path: Option<PathBuf>) -> ExitCode {
    let loaded = config::load(path.as_deref());
    let prepared = loaded.and_then(|(config, _)| Ok((oidc::Issuers::new(&config)?, config)));
    let (issuers, config) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => return fail(2, &e),
    };

    start_log();
    for warning in config::warnings() {
        warn!("{warning}");
    }
    match serve(config, issuers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Makes env_logger write to standard error. The journal adds the time itself, and takes the
/// priority from the line (systemd.exec(5), sd-daemon(3)).
fn start_log() {
    let environment = env_logger::Env::default().default_filter_or("info");
    let mut logger = env_logger::Builder::from_env(environment);

    let stderr = fs::metadata("/dev/stderr").map(|file| format!("{}:{}", file.dev(), file.ino()));
    let journal = env::var("JOURNAL_STREAM").ok();
    if journal.is_some() && journal == stderr.ok() {
        logger.format(|to, record| {
            let priority = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            writeln!(to, "<{priority}>{}", record.args())
        });
    }
    logger.init();
}

/// Runs until the relay is told to stop and all sessions have ended or the grace is over. Fails
/// if it cannot start.
fn serve(config: Config, issuers: oidc::Issuers) -> io::Result<()> {
    if std::process::id() == 1 {
        warn!("running as PID 1, which does not reap orphans: start the container with --init");
    }

    let (listener, is_passed) = match passed_listener()? {
        Some(listener) => (listener, true),
        None => (listen(&config.server.listen)?, false),
    };
    let admin_listen = config.server.admin_listen.clone();
    let grace = Duration::from_secs(config.server.shutdown_grace_secs.into());
    let relay = Arc::new(Relay::new(config, issuers)?);

    watch_signals(relay.clone())?;
    relay.issuers.start()?;
    info!("relay listening address={}", listener.local_addr()?);
    let accepting = relay.clone();
    start("accept", move || {
        connection::accept(&accepting, &listener, is_passed)
    })?;
    if !admin_listen.is_empty() {
        start_admin(&admin_listen, relay.clone())?;
    }

    let _ = sd_notify::notify(&[NotifyState::Ready]);
    relay.draining.wait(None);
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("shutting down grace_secs={}", grace.as_secs());
    relay.wait_until_idle(grace);
    relay.close_sessions();
    let left = relay.wait_until_idle(SHUTDOWN_TIMEOUT);
    info!("shut down connections_left={left}");
    Ok(())
}

fn start_admin(address: &str, relay: Arc<Relay>) -> io::Result<()> {
    let listener = listen(address)?;
    info!("admin listening address={}", listener.local_addr()?);
    start("admin", move || {
        metrics::serve(&listener, || relay.draining.is_set())
    })
}

/// Also watches SIGCHLD, only so that it is not ignored: if the program that started us ignores
/// it, so would we, and the kernel would reap our children (waitpid(2)).
fn watch_signals(relay: Arc<Relay>) -> io::Result<()> {
    let mut signals = Signals::new([consts::SIGTERM, consts::SIGINT, consts::SIGCHLD])?;
    start("signals", move || {
        for signal in signals.forever() {
            if signal != consts::SIGCHLD {
                relay.stop();
            }
        }
    })
}

fn listen(address: &str) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).and_then(|listener| {
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(listener)
    });
    listener.map_err(|e| io::Error::other(format!("cannot listen on {address}: {e}")))
}

/// The socket that systemd listens on for us, if it does (sd_listen_fds(3)).
fn passed_listener() -> io::Result<Option<TcpListener>> {
    let listener = listenfd::ListenFd::from_env().take_tcp_listener(0)?;
    if let Some(listener) = &listener {
        listener.set_nonblocking(false)?;
        rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::CLOEXEC)?;
    }
    Ok(listener)
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
}

/// The states of a connection, from its first byte to a session or a refusal, each with a limit
/// in time and in number. Promises that a connection in a later state takes no place from those
/// whose request is being read, that a permit is always given back, and that nothing ends the
/// accept loop.
///
/// | state | limit in time | limit in number; beyond it |
/// | --- | --- | --- |
/// | reading, verifying | `handshake_timeout_secs` | `MAX_LOBBY`, with those who hear |
/// | hearing a refusal | `LINGER` | the one waited for longest goes |
/// | waiting for keys | one fetch (`oidc`) | as many an issuer; 503 at once |
/// | waiting for a permit | `queue_timeout_secs` | `MAX_QUEUE` a rule; 503 at once |
/// | session | `timeout_secs` | `max_connections`, and a rule's own; waits |
mod connection {
    use crate::config::Config;
    use crate::http::{Answer, Head, RETRY};
    use crate::oidc::Issuers;
    use crate::poll::{self, Event};
    use crate::session::{self, Daemon};
    use crate::util::{lock, quoted, secs};
    use crate::{metrics, policy};
    use log::{info, warn};
    use rustix::event::{PollFd, PollFlags};
    use std::collections::{BTreeMap, VecDeque};
    use std::io;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::sync::{Arc, Condvar, Mutex, PoisonError};
    use std::thread;
    use std::time::{Duration, Instant};

    const MAX_LOBBY: usize = 256;
    const MAX_QUEUE: usize = 64;
    /// How long sending an answer may take. Any socket has room for one.
    const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
    /// How long a client may take to read its answer.
    const LINGER: Duration = Duration::from_secs(1);
    /// How long to wait before trying again when descriptors, threads or places have run out.
    const SCARCITY_PAUSE: Duration = Duration::from_millis(100);

    /// What every connection needs.
    pub struct Relay {
        config: Config,
        pub issuers: Issuers,
        lobby: Lobby,
        permits: Mutex<Permits>,
        /// How many connections there are, in all states.
        connections: Mutex<u32>,
        /// Notified when a connection has ended, or when waiting for that is to stop.
        left: Condvar,
        /// The number of the latest session.
        sessions: AtomicU64,
        /// Set when no new session may start.
        pub draining: Event,
        /// Set when the sessions must end.
        pub closing: Event,
    }

    impl Relay {
        /// Fails without descriptors.
        pub fn new(config: Config, issuers: Issuers) -> io::Result<Relay> {
            Ok(Relay {
                permits: Mutex::new(Permits::new(&config)),
                config,
                issuers,
                lobby: Lobby::default(),
                connections: Mutex::new(0),
                left: Condvar::new(),
                sessions: AtomicU64::new(0),
                draining: Event::new()?,
                closing: Event::new()?,
            })
        }

        /// To be called for each SIGTERM or SIGINT. The first one stops new sessions, the second
        /// one ends those that run.
        pub fn stop(&self) {
            if self.draining.is_set() {
                self.close_sessions();
            }
            self.draining.set();
        }

        pub fn close_sessions(&self) {
            self.closing.set();
            // A thread that is about to wait holds this lock; without it, it would miss the
            // notification.
            let _connections = lock(&self.connections);
            self.left.notify_all();
        }

        /// Waits until no connection is left, or until the sessions must end (if they need not
        /// yet), but at most for `limit`. Returns how many connections are left.
        pub fn wait_until_idle(&self, limit: Duration) -> u32 {
            let is_closing = self.closing.is_set();
            let waits = |left: &mut u32| *left > 0 && self.closing.is_set() == is_closing;
            let waited = self
                .left
                .wait_timeout_while(lock(&self.connections), limit, waits);
            *waited.unwrap_or_else(PoisonError::into_inner).0
        }
    }

    /// Hands every connection to a thread of its own. Never returns, except with a listener that
    /// was passed to us: while we drain, new connections wait in it for the next relay, and none
    /// is refused.
    pub fn accept(relay: &Arc<Relay>, listener: &TcpListener, is_passed: bool) {
        let mut number = 0;
        loop {
            if is_passed {
                let connection = Some(PollFd::new(listener, PollFlags::IN));
                poll::ready([connection, Some(relay.draining.poll_fd())], None);
                if relay.draining.is_set() {
                    return;
                }
            }
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(e) => {
                    warn!("cannot accept error={e:?}");
                    thread::sleep(SCARCITY_PAUSE);
                    continue;
                }
            };
            number += 1;
            let socket = Arc::new(socket);
            let _ = socket.set_write_timeout(Some(ANSWER_TIMEOUT));
            let _ = socket.set_nodelay(true);

            relay.lobby.enter(number, &socket);
            *lock(&relay.connections) += 1;
            let connection = Connection {
                relay: relay.clone(),
                socket: socket.clone(),
                peer: peer.to_string(),
                number,
                in_lobby: true,
            };
            let thread = thread::Builder::new().name(format!("connection {number}"));
            if let Err(e) = thread.spawn(move || connection.serve()) {
                let answer = busy().because(e);
                log_refusal(&peer.to_string(), &answer);
                let _ = answer.send(&socket, true);
                thread::sleep(SCARCITY_PAUSE);
            }
        }
    }

    fn busy() -> Answer {
        Answer::new(503, RETRY, "the relay is busy; try again later")
    }

    fn shutting_down() -> Answer {
        Answer::new(503, RETRY, "the relay is shutting down; try again later")
    }

    fn log_refusal(peer: &str, answer: &Answer) {
        metrics::add_refusal(answer.status);
        let reason = quoted(&format!("{}{}", answer.line, answer.cause));
        info!(
            "refused peer={peer} status={} reason={reason}",
            answer.status
        );
    }

    /// One client, until it is served or refused.
    struct Connection {
        relay: Arc<Relay>,
        socket: Arc<TcpStream>,
        /// For the log: the client's address, and what a proxy says about it.
        peer: String,
        number: u64,
        in_lobby: bool,
    }

    impl Drop for Connection {
        fn drop(&mut self) {
            self.leave_lobby();
            *lock(&self.relay.connections) -= 1;
            self.relay.left.notify_one();
        }
    }

    impl Connection {
        /// Serves the connection from its first byte to its last.
        fn serve(mut self) {
            let timeout = secs(self.relay.config.server.handshake_timeout_secs);
            let head = Head::read(&self.socket, Instant::now() + timeout);
            if !self.relay.lobby.stop_waiting(self.number) {
                self.refuse(&busy().because("too many connections wait"), true);
                return;
            }

            let mut with_body = true;
            let served = match head {
                Ok(None) => return,
                Ok(Some(head)) => {
                    with_body = head.request.method() != "HEAD";
                    self.peer += &head.forwarded_for();
                    self.route(head)
                }
                Err(answer) => Err(answer),
            };
            if let Err(answer) = served {
                self.refuse(&answer, with_body);
            }
        }

        fn route(&mut self, head: Head) -> Result<(), Answer> {
            let wrong_method = |allow| Answer::new(405, allow, "method not allowed on this path");
            head.check_host()?;

            match (head.request.uri().path(), head.request.method().as_str()) {
                ("/relay", "GET") => self.open_session(head),
                ("/relay", _) => Err(wrong_method(&[("Allow", "GET")])),
                ("/healthz", method @ ("GET" | "HEAD")) => {
                    let health = Answer::health(self.relay.draining.is_set());
                    self.send(&health, method == "GET");
                    Ok(())
                }
                ("/healthz", _) => Err(wrong_method(&[("Allow", "GET, HEAD")])),
                _ => Err(Answer::new(
                    404,
                    &[],
                    "there is nothing here; the relay is at /relay",
                )),
            }
        }

        /// The picture at the top of this file. Returns when the session is over.
        fn open_session(&mut self, head: Head) -> Result<(), Answer> {
            let relay = self.relay.clone();
            let upgrade = head.upgrade_response()?;
            let token = head.token()?;

            let identity = relay.issuers.verify(&token, || self.leave_lobby())?;
            let grant = policy::authorize(&relay.config.rules, &identity)?;

            self.leave_lobby();
            let Some(_permit) = self.wait_for_permit(grant.rule)? else {
                info!("left the queue peer={} {}", self.peer, grant.description);
                return Ok(());
            };

            let daemon = Daemon::spawn(&relay.config, grant.arguments)?;
            let opening = session::Opening {
                number: relay.sessions.fetch_add(1, Relaxed) + 1,
                client: format!("peer={} {}", self.peer, grant.description),
                upgrade,
                rest: head.rest,
            };
            let served = session::run(&relay.config, opening, &self.socket, daemon, &relay.closing);
            served.map_err(|e| busy().because(e))
        }

        /// Returns None if the client has left.
        fn wait_for_permit(&self, rule: usize) -> Result<Option<Permit>, Answer> {
            let relay = &self.relay;
            if relay.draining.is_set() {
                return Err(shutting_down());
            }
            let turn = Arc::new(Event::new().map_err(|e| busy().because(e))?);
            if lock(&relay.permits).take_or_queue(rule, &turn)? {
                return Ok(Some(Permit::new(relay, rule)));
            }

            let has_left = self.wait_for_turn(&turn);

            let granted = !lock(&relay.permits).leave_queue(&turn);
            // A permit that came too late goes back at once.
            let permit = granted.then(|| Permit::new(relay, rule));
            if has_left {
                Ok(None)
            } else if relay.draining.is_set() {
                Err(shutting_down())
            } else {
                permit.map(Some).ok_or_else(full)
            }
        }

        /// Waits until it is our turn, the time in the queue is over, or the relay drains.
        /// Returns true if the client has left.
        fn wait_for_turn(&self, turn: &Event) -> bool {
            let until = Instant::now() + secs(self.relay.config.daemon.queue_timeout_secs);
            let draining = &self.relay.draining;

            while !turn.is_set() && !draining.is_set() && Instant::now() < until {
                let socket = PollFd::new(&self.socket, PollFlags::RDHUP);
                let fds = [Some(socket), Some(turn.poll_fd()), Some(draining.poll_fd())];
                let [hangup, ..] = poll::ready(fds, Some(until));
                if !hangup.is_empty() {
                    return true;
                }
            }
            false
        }

        fn leave_lobby(&mut self) {
            if std::mem::take(&mut self.in_lobby) {
                self.relay.lobby.leave(self.number);
            }
        }

        /// Sends an answer other than 101, and logs it.
        fn refuse(&mut self, answer: &Answer, with_body: bool) {
            log_refusal(&self.peer, answer);
            self.send(answer, with_body);
        }

        /// Sends an answer. If there is a place for it, waits until the client has read it.
        fn send(&mut self, answer: &Answer, with_body: bool) {
            let sent = answer.send(&self.socket, with_body);
            self.in_lobby = self
                .relay
                .lobby
                .wait_again(self.number, &self.socket, self.in_lobby);
            if sent.is_ok() && self.in_lobby {
                poll::linger(&self.socket, LINGER);
            }
        }
    }

    fn full() -> Answer {
        Answer::new(503, RETRY, "all sessions are in use; try again later")
    }

    /// The connections whose request is being read or verified, and those that are being refused.
    #[derive(Default)]
    struct Lobby {
        places: Mutex<Places>,
        left: Condvar,
    }

    #[derive(Default)]
    struct Places {
        taken: usize,
        /// The connections among them whose next bytes, or whose end, we wait for, by number.
        waited_for: BTreeMap<u64, Arc<TcpStream>>,
    }

    impl Lobby {
        /// Waits for a place. If there is none, the connection that has been waited for longest
        /// must go, so that silent clients keep nobody out. Connections that are being verified
        /// leave in a moment.
        fn enter(&self, number: u64, socket: &Arc<TcpStream>) {
            let mut places = lock(&self.places);
            while places.taken >= MAX_LOBBY {
                if let Some((_, longest)) = places.waited_for.pop_first() {
                    // Its thread then reads end of file, answers, and leaves.
                    let _ = longest.shutdown(Shutdown::Read);
                }
                let waited = self.left.wait_timeout(places, SCARCITY_PAUSE);
                places = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            places.taken += 1;
            places.waited_for.insert(number, socket.clone());
        }

        /// To be called when the head has been read. Returns false if the connection had to go.
        fn stop_waiting(&self, number: u64) -> bool {
            lock(&self.places).waited_for.remove(&number).is_some()
        }

        /// Waits for a client to read its answer. Returns whether there is a place for that: the
        /// one it has (`has_place`), or a new one.
        fn wait_again(&self, number: u64, socket: &Arc<TcpStream>, has_place: bool) -> bool {
            let mut places = lock(&self.places);
            if !has_place {
                if places.taken >= MAX_LOBBY {
                    return false;
                }
                places.taken += 1;
            }
            places.waited_for.insert(number, socket.clone());
            true
        }

        fn leave(&self, number: u64) {
            let mut places = lock(&self.places);
            places.taken -= 1;
            places.waited_for.remove(&number);
            self.left.notify_one();
        }
    }

    /// A counting semaphore with a limit for everybody, and one for each rule that sets its own.
    /// Each permit that is given back wakes one waiter at most.
    struct Permits {
        free: u32,
        /// For each rule, if it has a limit.
        free_of_rule: Vec<Option<u32>>,
        queue: VecDeque<Waiting>,
    }

    struct Waiting {
        rule: usize,
        turn: Arc<Event>,
    }

    impl Permits {
        fn new(config: &Config) -> Permits {
            let of_rule = |rule: &crate::config::Rule| rule.max_connections.map(u32::from);
            Permits {
                free: config.daemon.max_connections.into(),
                free_of_rule: config.rules.iter().map(of_rule).collect(),
                queue: VecDeque::new(),
            }
        }

        fn take(&mut self, rule: usize) -> bool {
            let of_rule = &mut self.free_of_rule[rule];
            if self.free == 0 || *of_rule == Some(0) {
                return false;
            }
            self.free -= 1;
            *of_rule = of_rule.map(|free| free - 1);
            true
        }

        /// Returns true if a permit was taken, and false if the caller must wait until `turn` is
        /// set. Fails if too many wait already.
        fn take_or_queue(&mut self, rule: usize, turn: &Arc<Event>) -> Result<bool, Answer> {
            // This overtakes nobody: a waiter who could have this permit would have it already.
            if self.take(rule) {
                return Ok(true);
            }
            let waiting = self
                .queue
                .iter()
                .filter(|waiting| waiting.rule == rule)
                .count();
            if waiting >= MAX_QUEUE {
                return Err(full().because("too many wait already"));
            }
            self.queue.push_back(Waiting {
                rule,
                turn: turn.clone(),
            });
            Ok(false)
        }

        /// Returns false if it was the caller's turn already.
        fn leave_queue(&mut self, turn: &Arc<Event>) -> bool {
            let length = self.queue.len();
            self.queue
                .retain(|waiting| !Arc::ptr_eq(&waiting.turn, turn));
            self.queue.len() < length
        }

        fn give_back(&mut self, rule: usize) {
            self.free += 1;
            let of_rule = &mut self.free_of_rule[rule];
            *of_rule = of_rule.map(|free| free + 1);

            for index in 0..self.queue.len() {
                if self.take(self.queue[index].rule) {
                    if let Some(next) = self.queue.remove(index) {
                        next.turn.set();
                    }
                    return;
                }
            }
        }
    }

    /// The right to one session. It is given back when dropped.
    struct Permit {
        relay: Arc<Relay>,
        rule: usize,
    }

    impl Permit {
        /// For a permit that was taken.
        fn new(relay: &Arc<Relay>, rule: usize) -> Permit {
            Permit {
                relay: relay.clone(),
                rule,
            }
        }
    }

    impl Drop for Permit {
        fn drop(&mut self) {
            lock(&self.relay.permits).give_back(self.rule);
        }
    }
}

/// Reads a request head and writes a status; nothing else of HTTP (RFC 9110, RFC 9112, RFC 6455
/// section 4). Reads and writes the client's socket. Promises that every wait has a deadline,
/// that a head is never longer than 16 KiB, and that an answer is one line, whatever the client
/// sent.
mod http {
    use crate::poll;
    use crate::util::quoted;
    use jwt_simple::reexports::ct_codecs::{Base64, Decoder};
    use std::fmt::Display;
    use std::io::{self, Read, Write};
    use std::net::TcpStream;
    use std::time::{Instant, SystemTime};
    use tungstenite::handshake::derive_accept_key;
    use tungstenite::http::{HeaderMap, Request, StatusCode, Version, header};

    /// This limits the length of a token, too.
    const MAX_HEAD_BYTES: usize = 16 << 10;
    const MAX_HEADERS: usize = 100;
    /// The part of X-Forwarded-For that is logged.
    const MAX_FORWARDED_CHARS: usize = 200;
    /// The first bytes of the PROXY protocol, versions 1 and 2.
    const PROXY_HEADERS: [&[u8]; 2] = [b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"];
    /// The first byte of TLS: a record that holds a handshake.
    const TLS_HANDSHAKE: u8 = 0x16;

    type Headers = &'static [(&'static str, &'static str)];
    const NO_TOKEN: Headers = &[("WWW-Authenticate", "Bearer realm=\"nix-relay\"")];
    pub const INVALID_TOKEN: Headers = &[(
        "WWW-Authenticate",
        "Bearer realm=\"nix-relay\", error=\"invalid_token\"",
    )];
    pub const RETRY: Headers = &[("Retry-After", "5")];
    const UPGRADE: Headers = &[("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")];

    /// Any answer but 101: a status, and one line that says what is wrong and how to mend it.
    pub struct Answer {
        pub status: u16,
        pub line: String,
        /// Logged, not sent.
        pub cause: String,
        headers: Headers,
    }

    impl Answer {
        pub fn new(status: u16, headers: Headers, line: &str) -> Answer {
            Answer {
                status,
                headers,
                line: line.into(),
                cause: String::new(),
            }
        }

        /// The answer of `/healthz`.
        pub fn health(draining: bool) -> Answer {
            if draining {
                Answer::new(503, &[], "draining")
            } else {
                Answer::new(200, &[], "ok")
            }
        }

        /// Adds a cause that is logged, but not sent.
        pub fn because(self, cause: impl Display) -> Answer {
            Answer {
                cause: format!(": {cause}"),
                ..self
            }
        }

        /// Sends the answer, which is the last one on its connection.
        pub fn send(&self, mut socket: &TcpStream, with_body: bool) -> io::Result<()> {
            let status = StatusCode::from_u16(self.status).map_err(io::Error::other)?;
            let date = httpdate::fmt_http_date(SystemTime::now());
            let length = self.line.len() + 1;
            let connection = if self.status == 426 {
                "upgrade, close"
            } else {
                "close"
            };

            let mut answer = format!(
                "HTTP/1.1 {status}\r\nDate: {date}\r\nContent-Type: text/plain; charset=utf-8\r\n\
                 Content-Length: {length}\r\nConnection: {connection}\r\n"
            );
            for (name, value) in self.headers {
                answer += &format!("{name}: {value}\r\n");
            }
            answer += "\r\n";
            if with_body {
                answer += &format!("{}\n", self.line);
            }
            socket.write_all(answer.as_bytes())
        }
    }

    /// A request head, and the bytes that came after it.
    pub struct Head {
        pub request: Request<()>,
        pub rest: Vec<u8>,
    }

    impl Head {
        /// Returns None if the client left before it had sent a whole head.
        pub fn read(mut socket: &TcpStream, deadline: Instant) -> Result<Option<Head>, Answer> {
            let mut bytes = vec![0; MAX_HEAD_BYTES];
            let mut length = 0;

            while length < MAX_HEAD_BYTES {
                if poll::readable(&socket, deadline) {
                    let more = socket.read(&mut bytes[length..]).unwrap_or(0);
                    length += more;
                    let head = Head::parse(&bytes[..length])?;
                    if head.is_some() || more == 0 {
                        return Ok(head);
                    }
                }
                if Instant::now() >= deadline {
                    return Err(Answer::new(
                        408,
                        &[],
                        "the request head did not come in time",
                    ));
                }
            }
            Err(Answer::new(
                431,
                &[],
                "the request head is longer than 16 KiB",
            ))
        }

        /// Returns None if the head is not complete yet. tungstenite's own parser accepts
        /// nothing but GET, and we must answer HEAD, and 405 to other methods.
        fn parse(bytes: &[u8]) -> Result<Option<Head>, Answer> {
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut parsed = httparse::Request::new(&mut headers);
            let length = match parsed.parse(bytes) {
                Ok(httparse::Status::Partial) => return Ok(None),
                Ok(httparse::Status::Complete(length)) => length,
                Err(httparse::Error::TooManyHeaders) => {
                    let line = format!("the request has more than {MAX_HEADERS} headers");
                    return Err(Answer::new(431, &[], &line));
                }
                Err(e) => return Err(not_http(bytes, e)),
            };

            let version = if parsed.version == Some(1) {
                Version::HTTP_11
            } else {
                Version::HTTP_10
            };
            let mut request = Request::builder()
                .method(parsed.method.unwrap_or_default())
                .uri(parsed.path.unwrap_or_default())
                .version(version);
            for header in parsed.headers {
                request = request.header(header.name, header.value);
            }
            let request = request.body(()).map_err(|e| not_http(bytes, e))?;
            Ok(Some(Head {
                request,
                rest: bytes[length..].to_vec(),
            }))
        }

        /// RFC 9112, section 3.2: exactly one Host; only HTTP/1.0 may go without.
        pub fn check_host(&self) -> Result<(), Answer> {
            match self.request.headers().get_all(header::HOST).iter().count() {
                1 => Ok(()),
                0 if self.request.version() == Version::HTTP_10 => Ok(()),
                0 => Err(bad_request("the request has no Host header")),
                _ => Err(bad_request("the request has more than one Host header")),
            }
        }

        /// The bytes of the 101, if this is a WebSocket upgrade (RFC 6455, section 4.2).
        pub fn upgrade_response(&self) -> Result<Vec<u8>, Answer> {
            let headers = self.request.headers();
            let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
            let has_body = lengths.any(|length| length != "0");
            if has_body || headers.contains_key(header::TRANSFER_ENCODING) {
                return Err(bad_request("a WebSocket upgrade has no body"));
            }
            if headers.get_all(header::SEC_WEBSOCKET_KEY).iter().count() > 1 {
                return Err(bad_request("more than one Sec-WebSocket-Key header"));
            }
            if let Some(what) = self.missing_for_upgrade() {
                let line =
                    format!("expected a WebSocket upgrade, but {what}; does a proxy remove it?");
                return Err(Answer::new(426, UPGRADE, &line));
            }

            let accept = derive_accept_key(self.header(header::SEC_WEBSOCKET_KEY));
            let mut offers = elements(headers, header::SEC_WEBSOCKET_PROTOCOL);
            let protocol = match offers.find(|name| *name == "binary") {
                Some(_) => "sec-websocket-protocol: binary\r\n",
                None => "",
            };
            let response = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                 sec-websocket-accept: {accept}\r\n{protocol}\r\n"
            );
            Ok(response.into_bytes())
        }

        /// What this request lacks to be a WebSocket upgrade.
        fn missing_for_upgrade(&self) -> Option<&'static str> {
            let headers = self.request.headers();
            let has = |name, member: &str| {
                elements(headers, name).any(|element| element.eq_ignore_ascii_case(member))
            };
            let nonce = Base64::decode_to_vec(self.header(header::SEC_WEBSOCKET_KEY), None);

            let wanted = [
                (
                    self.request.version() == Version::HTTP_11,
                    "the request is not HTTP/1.1",
                ),
                (
                    has(header::CONNECTION, "upgrade"),
                    "Connection does not name Upgrade",
                ),
                (
                    has(header::UPGRADE, "websocket"),
                    "Upgrade does not name websocket",
                ),
                (
                    self.header(header::SEC_WEBSOCKET_VERSION) == b"13",
                    "Sec-WebSocket-Version is not 13",
                ),
                (
                    nonce.is_ok_and(|nonce| nonce.len() == 16),
                    "Sec-WebSocket-Key is not 16 bytes in base64",
                ),
            ];
            wanted
                .iter()
                .find(|(is_there, _)| !is_there)
                .map(|(_, what)| *what)
        }

        /// The first value of a header, or nothing if there is none.
        fn header(&self, name: header::HeaderName) -> &[u8] {
            let value = self.request.headers().get(name);
            value.map_or(&[], |value| value.as_bytes())
        }

        /// What proxies say about where the request came from, as ` forwarded_for="…"` for the
        /// log. Proxies append, so we keep the end.
        pub fn forwarded_for(&self) -> String {
            let said: Vec<_> = self
                .request
                .headers()
                .get_all("X-Forwarded-For")
                .iter()
                .collect();
            if said.is_empty() {
                return String::new();
            }

            let said: Vec<_> = said
                .iter()
                .map(|value| String::from_utf8_lossy(value.as_bytes()))
                .collect();
            let said = said.join(", ");
            let cut = said.chars().count().saturating_sub(MAX_FORWARDED_CHARS);
            let end: String = said.chars().skip(cut).collect();
            format!(" forwarded_for={}", quoted(&end))
        }

        /// The token from `Authorization: Bearer` (RFC 6750), or from `Basic` as its password.
        pub fn token(&self) -> Result<String, Answer> {
            let mut all = self.request.headers().get_all(header::AUTHORIZATION).iter();
            let value = all
                .next()
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default();
            if all.next().is_some() {
                return Err(bad_request("more than one Authorization header"));
            }

            let (scheme, rest) = value.split_once(' ').unwrap_or_default();
            let token = match scheme.to_ascii_lowercase().as_str() {
                "bearer" => Some(rest.trim().to_owned()),
                "basic" => password(rest.trim()),
                _ => None,
            };
            let line = "send an OIDC token, as a Bearer token or as the password of Basic";
            token.ok_or_else(|| Answer::new(401, NO_TOKEN, line))
        }
    }

    fn bad_request(line: &str) -> Answer {
        Answer::new(400, &[], line)
    }

    /// The answer to bytes that are not a request head. Proxies are often configured for another
    /// protocol, so we name the likely ones.
    fn not_http(bytes: &[u8], error: impl Display) -> Answer {
        if PROXY_HEADERS.iter().any(|header| bytes.starts_with(header)) {
            bad_request("expected HTTP/1.1, not the PROXY protocol; turn it off in the proxy")
        } else if bytes.first() == Some(&TLS_HANDSHAKE) {
            bad_request(
                "expected HTTP/1.1, not TLS; use ws://, or wss:// through a proxy that does TLS",
            )
        } else {
            bad_request(&format!("expected HTTP/1.1: {error}"))
        }
    }

    /// The members of a comma-separated list, across all header lines of that name (RFC 9110,
    /// section 5.6.1).
    fn elements(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
        let lines = headers.get_all(name).into_iter();
        let members = lines.flat_map(|line| line.to_str().unwrap_or_default().split(','));
        members.map(|member| member.trim_matches([' ', '\t']))
    }

    /// The password from the credentials of `Basic` (RFC 7617).
    fn password(credentials: &str) -> Option<String> {
        let pair = Base64::decode_to_vec(credentials, None).ok()?;
        let pair = String::from_utf8(pair).ok()?;
        Some(pair.split_once(':')?.1.to_owned())
    }
}

/// Who is calling: verifies a token with its issuer's keys, and returns its claims. Fetches keys
/// from the issuers (OpenID Connect Discovery 1.0, RFC 7517), or reads them from files. Promises
/// that an `Identity` exists only after the signature, issuer, audience and times of its token
/// were checked (RFC 7519, RFC 8725), that a token is only checked with the keys of the issuer
/// that it names, that a token whose key is cached never waits, and that this module never
/// passes a token on, not even to the log.
mod oidc {
    use crate::config::Config;
    use crate::http::{Answer, INVALID_TOKEN, RETRY};
    use crate::metrics;
    use crate::util::{self, lock, secs};
    use jwt_simple::JWTError;
    use jwt_simple::prelude::*;
    use log::{info, warn};
    use serde::de::{Deserializer, Error, MapAccess, Visitor};
    use serde_json::{Map, Value};
    use std::collections::{BTreeMap, HashSet};
    use std::fs::{self, Metadata};
    use std::os::unix::fs::MetadataExt;
    use std::panic::{self, AssertUnwindSafe};
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Condvar, Mutex, PoisonError};
    use std::time::{Duration, Instant, SystemTime};
    use std::{fmt, io, thread};

    /// How far the issuer's clock and ours may differ.
    const CLOCK_SKEW_SECS: u64 = 60;
    /// For fetching the discovery document and the key set together.
    const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
    /// How long a token may wait for a fetch, which may have started earlier.
    const WAIT_TIMEOUT: Duration = Duration::from_secs(11);
    /// How many tokens may wait for the keys of one issuer.
    const MAX_WAITING: u32 = 64;
    /// Keys that could not be refreshed for this long are no longer trusted.
    const MAX_KEY_AGE: Duration = Duration::from_secs(24 * 3600);
    /// The least time between two fetches that tokens ask for, and after one that failed.
    const REFETCH_PAUSE: Duration = Duration::from_secs(30);
    /// The same, as long as there are no keys at all.
    const FIRST_FETCH_PAUSE: Duration = Duration::from_secs(1);

    /// The claims of a token.
    pub type Claims = Map<String, Value>;

    /// A verified caller.
    pub struct Identity {
        pub issuer: String,
        pub audiences: Vec<String>,
        pub claims: Claims,
    }

    type Verify = dyn Fn(&str, &VerificationOptions) -> Result<(), jwt_simple::Error> + Send + Sync;

    /// A published key. The key decides on the algorithm, never the token.
    struct Key {
        id: Option<String>,
        /// One for each algorithm that the key may be used with. An RSA key that does not say
        /// has several.
        verifiers: Vec<Box<Verify>>,
    }

    impl Key {
        /// Returns None if the key is of an unknown kind, too weak, or not for signatures.
        fn parse(jwk: &Value) -> Option<Key> {
            let text = jwk.to_string();
            let mut verifiers: Vec<Box<Verify>> = Vec::new();
            macro_rules! try_each {
                ($($kind:ty),*) => {$(
                    if let Ok(key) = <$kind>::from_jwk(&text) {
                        verifiers.push(Box::new(move |token, options| {
                            let options = Some(options.clone());
                            key.verify_token::<NoCustomClaims>(token, options).map(drop)
                        }));
                    }
                )*};
            }
            try_each!(RS256PublicKey, RS384PublicKey, RS512PublicKey);
            try_each!(PS256PublicKey, PS384PublicKey, PS512PublicKey);
            try_each!(ES256PublicKey, ES384PublicKey, Ed25519PublicKey);

            let id = jwk["kid"].as_str().map(String::from);
            (!verifiers.is_empty()).then_some(Key { id, verifiers })
        }
    }

    /// The usable keys of a key set (RFC 7517, section 5).
    fn parse_set(set: &Value) -> Result<Vec<Key>, String> {
        let keys: Vec<Key> = set["keys"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Key::parse)
            .collect();
        if keys.is_empty() {
            Err("no usable key".into())
        } else {
            Ok(keys)
        }
    }

    /// A token that has been parsed, but not verified.
    struct Token<'a> {
        text: &'a str,
        key_id: Option<String>,
        claims: Claims,
    }

    impl Token<'_> {
        fn parse(text: &str) -> Result<Token<'_>, String> {
            let mut parts = text.split('.').map_while(object);
            let (Some(header), Some(claims)) = (parts.next(), parts.next()) else {
                return Err("it is not a signed JSON Web Token".into());
            };
            if header.contains_key("crit") {
                return Err("it has a critical extension, and this relay knows none".into());
            }
            // jwt-simple would accept a token without it.
            if !claims.get("exp").is_some_and(Value::is_number) {
                return Err("exp is missing or not a number".into());
            }
            let key_id = header.get("kid").and_then(Value::as_str).map(String::from);
            Ok(Token {
                text,
                key_id,
                claims,
            })
        }
    }

    /// The JSON object in one part of a token.
    fn object(part: &str) -> Option<Claims> {
        let json = Base64UrlSafeNoPadding::decode_to_vec(part, None).ok()?;
        let mut reader = serde_json::Deserializer::from_slice(&json);
        let object = reader.deserialize_map(Members).ok()?;
        reader.end().is_ok().then_some(object)
    }

    /// Reads the members of a JSON object that anybody may have written. A name that occurs
    /// twice is refused, since other programs may read the first where we read the last (RFC
    /// 7519, section 4).
    struct Members;

    impl<'de> Visitor<'de> for Members {
        type Value = Claims;

        fn expecting(&self, to: &mut fmt::Formatter) -> fmt::Result {
            to.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Claims, A::Error> {
            let mut all = Claims::new();
            while let Some((name, value)) = members.next_entry()? {
                if all.insert(name, value).is_some() {
                    return Err(A::Error::custom("duplicate member name"));
                }
            }
            Ok(all)
        }
    }

    /// Why a token was not accepted, which also says whether newer keys could help.
    enum Rejection {
        Final(String),
        /// No key has the name that the token gives, or there are no keys.
        KeyUnknown,
        /// Newer keys could help: some issuers replace a key and keep its name.
        BadSignature(String),
    }

    fn invalid_token(why: &str) -> Answer {
        Answer::new(
            401,
            INVALID_TOKEN,
            &format!("the token does not verify: {why}"),
        )
    }

    /// All issuers that are trusted.
    pub struct Issuers(Vec<Arc<Issuer>>);

    impl Issuers {
        /// The issuers of all rules. Fails with a message if a key file, SSL_CERT_FILE or a
        /// proxy cannot be used.
        pub fn new(config: &Config) -> Result<Issuers, String> {
            check_environment()?;
            let mut audiences = BTreeMap::<_, HashSet<_>>::new();
            for rule in &config.rules {
                audiences
                    .entry(&rule.issuer)
                    .or_default()
                    .insert(rule.audience.clone());
            }

            let ttl = secs(config.auth.jwks_cache_ttl_secs);
            let mut issuers = Vec::new();
            for (url, audiences) in audiences {
                let source = match config.auth.jwks_files.get(url) {
                    Some(path) => Source::File(KeyFile::open(path)?),
                    None => Source::Web(ttl),
                };
                issuers.push(Arc::new(Issuer::new(url, audiences, source)));
            }
            Ok(Issuers(issuers))
        }

        /// Starts fetching the keys of each issuer, without waiting for any. Fails if there are
        /// no threads.
        pub fn start(&self) -> io::Result<()> {
            for issuer in &self.0 {
                if let Source::Web(ttl) = issuer.source {
                    let issuer = issuer.clone();
                    let thread = thread::Builder::new().name("keys".into());
                    thread.spawn(move || issuer.refresh_forever(ttl))?;
                }
            }
            Ok(())
        }

        /// Answers 401 if the token does not verify, and 503 if the keys of its issuer are
        /// unavailable or were asked for a moment ago. Calls `before_wait` before it waits.
        pub fn verify(&self, token: &str, before_wait: impl FnOnce()) -> Result<Identity, Answer> {
            let token = Token::parse(token).map_err(|why| invalid_token(&why))?;
            let named = token.claims.get("iss").and_then(Value::as_str);
            let issuer = self.0.iter().find(|issuer| Some(&*issuer.url) == named);
            let issuer = issuer
                .ok_or_else(|| invalid_token("its issuer is not one that this relay trusts"))?;

            let rejection = match issuer.check(&token) {
                Ok(()) => return Ok(issuer.identity(token)),
                Err(rejection) => rejection,
            };
            let why = match &rejection {
                Rejection::Final(why) => return Err(invalid_token(why)),
                Rejection::KeyUnknown => "no matching key in the issuer's key set",
                Rejection::BadSignature(why) => why,
            };
            before_wait();
            match (issuer.refresh(), &rejection) {
                (Ok(()), _) => match issuer.check(&token) {
                    Ok(()) => Ok(issuer.identity(token)),
                    Err(Rejection::Final(why) | Rejection::BadSignature(why)) => {
                        Err(invalid_token(&why))
                    }
                    Err(Rejection::KeyUnknown) => Err(invalid_token(why)),
                },
                (Err(_), Rejection::BadSignature(why)) => Err(invalid_token(why)),
                (Err(cause), _) => {
                    let line = "the issuer's keys are unavailable; try again later";
                    Err(Answer::new(503, RETRY, line).because(cause))
                }
            }
        }
    }

    /// Fails with a message if SSL_CERT_FILE or a proxy's variable cannot be used.
    pub fn check_environment() -> Result<(), String> {
        util::trusted_roots()?;
        util::proxy_from_env()?;
        Ok(())
    }

    /// Where the keys of an issuer come from.
    enum Source {
        /// The issuer itself. Keys are fetched again after this time.
        Web(Duration),
        File(KeyFile),
    }

    pub struct Issuer {
        url: String,
        audiences: HashSet<String>,
        source: Source,
        cache: Mutex<Cache>,
        /// `wanted` wakes the thread that fetches, `fetched` those who wait for it.
        wanted: Condvar,
        fetched: Condvar,
    }

    #[derive(Default)]
    struct Cache {
        /// The keys, and when they were fetched.
        keys: Option<(Instant, Arc<Vec<Key>>)>,
        /// When a token last asked for a fetch, or a fetch last failed.
        last_attempt: Option<Instant>,
        /// Whether a fetch is wanted or under way, and whether a token wants it.
        busy: bool,
        wanted_by_token: bool,
        /// How many fetches have ended, and whether the last one worked.
        ended: u64,
        worked: bool,
        /// How many tokens wait for a fetch.
        waiting: u32,
    }

    impl Issuer {
        fn new(url: &str, audiences: HashSet<String>, source: Source) -> Issuer {
            Issuer {
                url: url.into(),
                audiences,
                source,
                cache: Mutex::default(),
                wanted: Condvar::new(),
                fetched: Condvar::new(),
            }
        }

        /// To be called for a token that has been verified.
        fn identity(&self, token: Token) -> Identity {
            let audiences = match token.claims.get("aud") {
                Some(Value::Array(several)) => several.clone(),
                one => one.cloned().into_iter().collect(),
            };
            let audiences = audiences
                .iter()
                .filter_map(Value::as_str)
                .map(String::from)
                .collect();
            Identity {
                issuer: self.url.clone(),
                audiences,
                claims: token.claims,
            }
        }

        /// The cached keys, unless they are too old to be trusted.
        fn keys(&self) -> Option<Arc<Vec<Key>>> {
            match &self.source {
                Source::File(file) => Some(file.keys()),
                Source::Web(_) => {
                    let cache = lock(&self.cache);
                    let (at, keys) = cache.keys.as_ref()?;
                    (at.elapsed() < MAX_KEY_AGE).then(|| keys.clone())
                }
            }
        }

        /// Verifies a token with the cached keys.
        fn check(&self, token: &Token) -> Result<(), Rejection> {
            let keys = self.keys().ok_or(Rejection::KeyUnknown)?;
            // OpenID Connect Core 1.0, section 10.1.
            if token.key_id.is_none() && keys.len() > 1 {
                let why = "it names no key (kid), and its issuer has several";
                return Err(Rejection::Final(why.into()));
            }
            let is_named = |key: &&Key| token.key_id.is_none() || key.id == token.key_id;
            let named: Vec<&Key> = keys.iter().filter(is_named).collect();
            if named.is_empty() {
                return Err(Rejection::KeyUnknown);
            }

            let options = VerificationOptions {
                allowed_issuers: Some([self.url.clone()].into()),
                allowed_audiences: Some(self.audiences.clone()),
                time_tolerance: Some(coarsetime::Duration::from_secs(CLOCK_SKEW_SECS)),
                ..VerificationOptions::default()
            };
            let mut rejection =
                Rejection::BadSignature("no matching key in the issuer's key set".into());
            for verify in named.iter().flat_map(|key| &key.verifiers) {
                let Err(e) = verify(token.text, &options) else {
                    return Ok(());
                };
                match e.downcast_ref() {
                    // This comes from the verifiers for other algorithms, and must not hide the
                    // real reason.
                    Some(JWTError::AlgorithmMismatch) => {}
                    Some(e @ JWTError::InvalidSignature) => {
                        rejection = Rejection::BadSignature(e.to_string())
                    }
                    Some(e) => return Err(Rejection::Final(e.to_string())),
                    None => {
                        rejection = Rejection::BadSignature("a part of it cannot be read".into())
                    }
                }
            }
            Err(rejection)
        }

        /// Has the keys fetched again for a token, and waits for that fetch or for one that is
        /// under way. Fails with the reason if it did not work, if too many wait, or if it was
        /// tried a moment ago.
        fn refresh(&self) -> Result<(), String> {
            if let Source::File(_) = self.source {
                return Ok(());
            }
            let mut cache = lock(&self.cache);
            if cache.waiting >= MAX_WAITING {
                return Err("too many wait for them already".into());
            }
            if !cache.busy {
                let pause = if cache.keys.is_some() {
                    REFETCH_PAUSE
                } else {
                    FIRST_FETCH_PAUSE
                };
                if cache.last_attempt.is_some_and(|at| at.elapsed() < pause) {
                    return Err("they were asked for a moment ago".into());
                }
                cache.busy = true;
                cache.wanted_by_token = true;
                self.wanted.notify_one();
            }

            let ended = cache.ended;
            cache.waiting += 1;
            let waited = self
                .fetched
                .wait_timeout_while(cache, WAIT_TIMEOUT, |cache| cache.ended == ended);
            let mut cache = waited.unwrap_or_else(PoisonError::into_inner).0;
            cache.waiting -= 1;
            if cache.ended > ended && cache.worked {
                Ok(())
            } else {
                Err("they could not be fetched".into())
            }
        }

        /// Fetches the keys when they are too old, when a token needs new ones, and a while
        /// after a failure. Nobody else fetches them.
        fn refresh_forever(&self, ttl: Duration) {
            let mut pause = Duration::ZERO;
            loop {
                let cache = lock(&self.cache);
                let waited = self
                    .wanted
                    .wait_timeout_while(cache, pause, |cache| !cache.wanted_by_token);
                let mut cache = waited.unwrap_or_else(PoisonError::into_inner).0;
                let for_token = std::mem::take(&mut cache.wanted_by_token);
                cache.busy = true;
                drop(cache);

                let begun = Instant::now();
                // ureq panics if it gets no thread to look up a name.
                let fetching = AssertUnwindSafe(|| self.fetch_jwks());
                let fetched = panic::catch_unwind(fetching)
                    .unwrap_or_else(|_| Err("the fetch panicked, for want of a thread".into()));

                let mut cache = lock(&self.cache);
                cache.busy = false;
                cache.wanted_by_token = false;
                cache.ended += 1;
                cache.worked = fetched.is_ok();
                // The first fetch does not count: a token with an unknown key may ask for another.
                if for_token && cache.keys.is_some() || fetched.is_err() {
                    cache.last_attempt = Some(Instant::now());
                }
                pause = if fetched.is_ok() {
                    ttl
                } else {
                    ttl.min(REFETCH_PAUSE)
                };
                metrics::add_jwks_refresh(fetched.is_ok());
                match fetched {
                    Ok(keys) => {
                        info!("fetched keys issuer={:?} count={}", self.url, keys.len());
                        cache.keys = Some((begun, Arc::new(keys)));
                    }
                    Err(e) => warn!("could not fetch keys issuer={:?} error={e:?}", self.url),
                }
                self.fetched.notify_all();
            }
        }

        /// Fetches the discovery document and then the key set (OpenID Connect Discovery 1.0,
        /// sections 4.1 to 4.3).
        fn fetch_jwks(&self) -> Result<Vec<Key>, String> {
            let deadline = Instant::now() + FETCH_TIMEOUT;
            let url = self.url.trim_end_matches('/');
            let document =
                util::get_json(&format!("{url}/.well-known/openid-configuration"), deadline)?;
            if document["issuer"] != self.url {
                return Err(format!(
                    "issuer mismatch in the discovery document: {}",
                    document["issuer"]
                ));
            }

            let url = document["jwks_uri"].as_str().unwrap_or_default();
            if !util::is_https_or_loopback(url) {
                return Err(format!("the jwks_uri must be an https URL, not {url:?}"));
            }
            let set = util::get_json(url, deadline)?;
            parse_set(&set).map_err(|e| format!("{url}: {e}"))
        }
    }

    /// A key set in a file, which is read again when it changes.
    struct KeyFile {
        path: PathBuf,
        read: Mutex<(Option<Stamp>, Arc<Vec<Key>>)>,
    }

    /// Changes when a file is written or replaced.
    type Stamp = (u64, u64, Option<SystemTime>);

    impl KeyFile {
        /// Fails with a message if the file cannot be used.
        fn open(path: &Path) -> Result<KeyFile, String> {
            let stamp = stamp(path);
            let keys = Arc::new(read_set(path)?);
            Ok(KeyFile {
                path: path.into(),
                read: Mutex::new((stamp, keys)),
            })
        }

        /// The keys of the file as it is now, or if it cannot be used, those it had before.
        fn keys(&self) -> Arc<Vec<Key>> {
            let mut read = lock(&self.read);
            let now = stamp(&self.path);
            if now != read.0 {
                read.0 = now;
                match read_set(&self.path) {
                    Ok(keys) => {
                        info!("read keys file={:?} count={}", self.path, keys.len());
                        read.1 = Arc::new(keys);
                    }
                    Err(e) => warn!("could not read keys, going on with the old ones error={e:?}"),
                }
            }
            read.1.clone()
        }
    }

    fn stamp(path: &Path) -> Option<Stamp> {
        let of = |file: Metadata| (file.ino(), file.len(), file.modified().ok());
        fs::metadata(path).ok().map(of)
    }

    fn read_set(path: &Path) -> Result<Vec<Key>, String> {
        let failed = |e: &dyn fmt::Display| format!("auth.jwks_files: {}: {e}", path.display());
        let text = fs::read_to_string(path).map_err(|e| failed(&e))?;
        let set = util::parse_json(text.as_bytes()).map_err(|e| failed(&e))?;
        parse_set(&set).map_err(|e| failed(&e))
    }
}

/// May the caller do this: checks a verified identity against the rules. Pure: it touches
/// nothing else. Promises that a caller who matches no rule gets nothing.
mod policy {
    use crate::config::Rule;
    use crate::http::Answer;
    use crate::oidc::{Claims, Identity};
    use crate::util::quoted;
    use serde_json::Value;

    /// Claims that tell an operator whose job it was. They are logged if the token has them.
    const LOGGED_CLAIMS: [&str; 8] = [
        "sub",
        "repository",
        "ref",
        "event_name",
        "actor",
        "run_id",
        "project_path",
        "pipeline_id",
    ];

    /// What a caller is allowed.
    pub struct Grant<'a> {
        /// The index of the rule that allows it.
        pub rule: usize,
        /// The arguments for nix-daemon.
        pub arguments: &'a [String],
        /// For the log: `rule="…" sub="…" …`, with every value escaped.
        pub description: String,
    }

    /// Returns what the first matching rule grants. Answers 403 if there is none, and says what
    /// is wrong for the rule that comes nearest.
    pub fn authorize<'a>(rules: &'a [Rule], identity: &Identity) -> Result<Grant<'a>, Answer> {
        let mut nearest: Option<Vec<&str>> = None;
        for (index, rule) in rules.iter().enumerate() {
            if rule.issuer != identity.issuer || !identity.audiences.contains(&rule.audience) {
                continue;
            }

            let misfits = misfits(rule, &identity.claims);
            if misfits.is_empty() {
                let description = describe(rule, &identity.claims);
                return Ok(Grant {
                    rule: index,
                    arguments: &rule.extra_args,
                    description,
                });
            }
            if nearest
                .as_ref()
                .is_none_or(|nearest| misfits.len() < nearest.len())
            {
                nearest = Some(misfits);
            }
        }

        let why = match nearest.as_deref() {
            Some([name, ..]) => match identity.claims.get(*name) {
                Some(value) => format!("{name} is {}", quoted(&text(value).unwrap_or_default())),
                None => format!("{name} is missing"),
            },
            _ => "none is for its issuer and audience".into(),
        };
        Err(Answer::new(
            403,
            &[],
            &format!("the token is valid, but no rule allows it: {why}"),
        ))
    }

    fn describe(rule: &Rule, claims: &Claims) -> String {
        let mut description = format!("rule={}", quoted(&rule.name));
        for name in LOGGED_CLAIMS {
            if let Some(value) = claims.get(name).and_then(text) {
                description += &format!(" {name}={}", quoted(&value));
            }
        }
        description
    }

    /// The claims that do not match what the rule binds them to.
    fn misfits<'a>(rule: &'a Rule, claims: &Claims) -> Vec<&'a str> {
        let bound = rule.bound_claims.iter();
        let misfits = bound.filter(|(name, patterns)| !fits(rule, patterns, claims.get(*name)));
        misfits.map(|(name, _)| name.as_str()).collect()
    }

    /// Whether the claim's value, or one of its values, matches one of the patterns.
    fn fits(rule: &Rule, patterns: &[String], claim: Option<&Value>) -> bool {
        let values = match claim {
            Some(Value::Array(several)) => several.as_slice(),
            one => one.map_or(&[][..], std::slice::from_ref),
        };
        values.iter().filter_map(text).any(|value| {
            patterns.iter().any(|pattern| {
                if rule.ignores_case {
                    matches(&pattern.to_ascii_lowercase(), &value.to_ascii_lowercase())
                } else {
                    matches(pattern, &value)
                }
            })
        })
    }

    /// A string as it is, a number or a boolean as JSON prints it, and nothing else.
    fn text(value: &Value) -> Option<String> {
        match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
            _ => None,
        }
    }

    /// `**` matches any characters, `*` any characters but `/`, and everything else only itself.
    fn matches(pattern: &str, text: &str) -> bool {
        let text = text.as_bytes();
        // For each length: whether the part of the pattern read so far matches so much of the text.
        let mut reached = vec![false; text.len() + 1];
        reached[0] = true;

        let mut rest = pattern.as_bytes();
        while let [first, after @ ..] = rest {
            rest = after;
            if *first != b'*' {
                for at in (0..text.len()).rev() {
                    reached[at + 1] = reached[at] && text[at] == *first;
                }
                reached[0] = false;
                continue;
            }

            let crosses = rest.first() == Some(&b'*');
            rest = if crosses { &rest[1..] } else { rest };
            for at in 0..text.len() {
                reached[at + 1] |= reached[at] && (crosses || text[at] != b'/');
            }
        }
        reached[text.len()]
    }
}

/// Connects nix-daemon and a WebSocket until one of them ends. Owns the child. Promises that
/// each session has exactly one reason to end, which the log and the Close are made from, and
/// that the child is reaped and its process group killed by then.
mod session {
    use crate::config::Config;
    use crate::copy::{End, Keepalive, Link, Patience, Pipes, Wire};
    use crate::http::Answer;
    use crate::metrics::{self, Reason};
    use crate::poll::{self, Event};
    use crate::util::{quoted, secs, without_escapes};
    use log::{info, warn};
    use rustix::event::{PollFd, PollFlags};
    use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
    use std::io::{self, Read};
    use std::net::TcpStream;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
    use std::sync::Arc;
    use std::sync::atomic::Ordering::Relaxed;
    use std::time::{Duration, Instant};
    use std::{env, mem};
    use tungstenite::protocol::Role;
    use tungstenite::protocol::frame::coding::CloseCode;

    /// The total size of the input pipes of all sessions. An unprivileged user whose pipes
    /// exceed 64 MiB gets only tiny ones from then on (pipe(7)). Output pipes are a quarter as
    /// large, since they gain less.
    const PIPES_BYTES: u32 = 40 << 20;
    const SMALLEST_PIPE_LOG2: u32 = 18;
    const LARGEST_PIPE_LOG2: u32 = 20;
    /// The longest line of the child's standard error in the log. A longer one is split.
    const MAX_LINE_BYTES: usize = 4 << 10;
    /// The environment variables that nix-daemon gets, by their names and by prefixes of names.
    const KEPT_VARIABLES: [&str; 15] = [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LOCALE_ARCHIVE",
        "TZ",
        "TMPDIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
    ];
    const KEPT_PREFIXES: [&str; 4] = ["LC_", "XDG_", "GC_", "NIX_"];
    const OWN_PREFIX: &str = "NIX_RELAY_";

    /// How a child is ended when its session is over. Its standard input has been closed by
    /// then, which makes nix-daemon cancel its builds and release its locks.
    struct TerminationStep {
        wait: Duration,
        then: Signal,
    }

    /// The last step is repeated: only the kernel can delay a SIGKILL.
    const TERMINATION_STEPS: [TerminationStep; 2] = [
        TerminationStep {
            wait: Duration::from_secs(10),
            then: Signal::TERM,
        },
        TerminationStep {
            wait: Duration::from_secs(5),
            then: Signal::KILL,
        },
    ];

    /// A session that is about to start.
    pub struct Opening {
        pub number: u64,
        /// Who the client is, for the log.
        pub client: String,
        /// The 101.
        pub upgrade: Vec<u8>,
        /// The bytes that came after the request head.
        pub rest: Vec<u8>,
    }

    /// Copies bytes until the session is over, ends both sides, and logs the result. Fails
    /// before anything is sent if there are no threads or descriptors.
    pub fn run(
        config: &Config,
        opening: Opening,
        socket: &Arc<TcpStream>,
        mut daemon: Daemon,
        closing: &Event,
    ) -> io::Result<()> {
        let start = Instant::now();
        let number = opening.number;
        let deadline = start + secs(config.daemon.timeout_secs);
        let keepalive = Keepalive::new(socket, config.server.keepalive_secs)?;
        let link = Link::new(Wire::new(socket.clone(), None)?, Role::Server)?;
        let supervisor = Supervisor {
            number,
            link: &link,
            keepalive,
            deadline,
            closing,
        };

        let pipes = Pipes {
            source: daemon.stdout.as_fd(),
            source_ended: Some(daemon.exited.as_fd()),
            sink: daemon.stdin.as_fd(),
        };
        // Whoever has the 101 is counted.
        metrics::SESSIONS_ACTIVE.add(1);
        link.run(&opening.upgrade, opening.rest, &pipes, || {
            info!("session opened session={number} {}", opening.client);
            supervisor.run(&daemon.exited, &mut daemon.process);
        })
        .inspect_err(|_| metrics::SESSIONS_ACTIVE.sub(1))?;

        let ending = Ending::of(link.end());
        let patience = Patience::new(config.server.keepalive_secs, deadline);
        let (fate, detail) = end_both_sides(&link, &ending, daemon, number, &patience);
        metrics::add_session(ending.reason, start.elapsed());
        metrics::SESSIONS_ACTIVE.sub(1);
        info!(
            "session ended session={number} reason={} detail={} secs={:.3} bytes_in={} \
             bytes_out={} exit={:?}",
            ending.reason.name(),
            quoted(&detail),
            start.elapsed().as_secs_f64(),
            link.received.load(Relaxed),
            link.sent.load(Relaxed),
            fate.description,
        );
        Ok(())
    }

    /// Closes the child's input and output, sends the client a Close if it can still receive
    /// one, and makes sure that the child ends. Returns how the child ended, and the detail for
    /// the log. If the child ended by itself, that comes first, because the Close says how.
    fn end_both_sides(
        link: &Link,
        ending: &Ending,
        daemon: Daemon,
        number: u64,
        patience: &Patience,
    ) -> (Fate, String) {
        let Daemon {
            stdin,
            stdout,
            exited,
            mut process,
        } = daemon;
        drop((stdin, stdout));

        if ending.reason != Reason::DaemonExited {
            if ending.reason != Reason::ClientGone {
                link.close(ending.code, &ending.detail, &Patience::short());
            }
            return (process.terminate(&exited, number), ending.detail.clone());
        }

        let fate = process.terminate(&exited, number);
        let (code, detail) = if fate.success {
            (CloseCode::Normal, String::new())
        } else {
            let reason = Some(&*process.stderr.last_line).filter(|line| !line.is_empty());
            let reason = reason.unwrap_or("it gave no reason");
            (CloseCode::Error, format!("{}: {reason}", fate.description))
        };
        // Much of the output may still be on its way, and a reset would overtake it.
        link.close(Some(code), &detail, patience);
        (fate, detail)
    }

    /// How a session ended: for the log, the metrics and the client's Close.
    struct Ending {
        reason: Reason,
        /// RFC 6455, section 7.4.1. None if the client's own Close had no code.
        code: Option<CloseCode>,
        detail: String,
    }

    impl Ending {
        fn of(end: Option<&End>) -> Ending {
            let new = |reason, code, detail: &str| Ending {
                reason,
                code,
                detail: detail.into(),
            };
            match end {
                Some(End::Closed(frame)) => new(
                    Reason::ClientClosed,
                    frame.as_ref().map(|frame| frame.code),
                    "",
                ),
                Some(End::Gone(how)) => new(Reason::ClientGone, None, how),
                Some(End::Violation(code, what)) => new(Reason::ProtocolError, Some(*code), what),
                Some(End::SourceEnded) => new(Reason::DaemonExited, None, ""),
                Some(End::TimedOut) => {
                    let detail = "the session reached daemon.timeout_secs";
                    new(Reason::TimedOut, Some(CloseCode::Policy), detail)
                }
                Some(End::ShuttingDown) => new(
                    Reason::ShuttingDown,
                    Some(CloseCode::Away),
                    "the relay is shutting down",
                ),
                Some(End::SinkClosed | End::Failed) | None => new(
                    Reason::RelayFailed,
                    Some(CloseCode::Error),
                    "the relay failed; its log has the cause",
                ),
            }
        }
    }

    /// What the connection's own thread does while two other threads copy.
    struct Supervisor<'a> {
        number: u64,
        link: &'a Link,
        keepalive: Keepalive,
        deadline: Instant,
        closing: &'a Event,
    }

    impl Supervisor<'_> {
        /// Returns when the session is over.
        fn run(mut self, exited: &OwnedFd, process: &mut Process) {
            let mut is_running = true;
            while self.link.end().is_none() {
                let check = self.keepalive.check(self.link);
                let until = check.map_or(self.deadline, |check| check.min(self.deadline));
                let fds = [
                    Some(self.link.over()),
                    Some(self.closing.poll_fd()),
                    process.stderr.poll_fd(),
                    is_running.then(|| PollFd::new(exited, PollFlags::IN)),
                ];
                let [_, closing, stderr, exit] = poll::ready(fds, Some(until));

                if !stderr.is_empty() {
                    process.stderr.log(self.number);
                }
                if !exit.is_empty() {
                    is_running = false;
                    // Processes that it started and left behind could write for ever.
                    process.kill_group();
                }
                if !closing.is_empty() {
                    self.link.finish(End::ShuttingDown);
                } else if Instant::now() >= self.deadline {
                    self.link.finish(End::TimedOut);
                }
            }
        }
    }

    /// A running child, which leads a process group of its own.
    pub struct Daemon {
        stdin: ChildStdin,
        stdout: ChildStdout,
        /// Becomes readable when the child has exited.
        exited: OwnedFd,
        process: Process,
    }

    impl Daemon {
        /// Answers 502 if the program cannot be run.
        pub fn spawn(config: &Config, arguments: &[String]) -> Result<Daemon, Answer> {
            let program = &config.daemon.nix_daemon_path;
            Daemon::try_spawn(config, arguments).map_err(|e| {
                let line = "nix-daemon does not start; the relay's log has the cause";
                Answer::new(502, &[], line).because(format!("{program}: {e}"))
            })
        }

        fn try_spawn(config: &Config, arguments: &[String]) -> io::Result<Daemon> {
            let mut command = Command::new(&*config.daemon.nix_daemon_path);
            command.args(arguments).current_dir("/").process_group(0);
            command
                .env_clear()
                .envs(env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_kept)));
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());

            let mut child = command.spawn()?;
            let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
            // From here on, the child is killed and reaped whatever fails.
            let mut process = Process {
                child,
                stderr: Stderr::default(),
            };
            let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
                return Err(io::Error::other("no pipes"));
            };
            process.stderr.pipe = Some(stderr);

            rustix::io::ioctl_fionbio(&stdin, true)?;
            rustix::io::ioctl_fionbio(&stdout, true)?;
            let share = (PIPES_BYTES / config.daemon.max_connections).max(1).ilog2();
            let size = 1 << share.clamp(SMALLEST_PIPE_LOG2, LARGEST_PIPE_LOG2);
            // An unprivileged user may be refused this. Smaller pipes work, too.
            let _ = rustix::pipe::fcntl_setpipe_size(&stdin, size);
            let _ = rustix::pipe::fcntl_setpipe_size(&stdout, size / 4);
            let exited = pidfd_open(Pid::from_child(&process.child), PidfdFlags::empty())?;
            Ok(Daemon {
                stdin,
                stdout,
                exited,
                process,
            })
        }
    }

    /// Whether nix-daemon gets this variable. Names of proxies are common in both cases.
    fn is_kept(name: &str) -> bool {
        let kept = KEPT_VARIABLES.contains(&name)
            || KEPT_VARIABLES.contains(&&*name.to_ascii_lowercase())
            || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        kept && !name.starts_with(OWN_PREFIX)
    }

    /// A child process and its standard error. When dropped, it is killed and reaped.
    struct Process {
        child: Child,
        stderr: Stderr,
    }

    /// How a child ended.
    struct Fate {
        success: bool,
        description: String,
    }

    impl Process {
        fn kill_group(&self) {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }

        /// Makes sure that the child and its process group end.
        fn terminate(&mut self, exited: &OwnedFd, number: u64) -> Fate {
            let last = &TERMINATION_STEPS[TERMINATION_STEPS.len() - 1];
            for step in TERMINATION_STEPS.iter().chain(std::iter::repeat(last)) {
                if self.exits(exited, number, Instant::now() + step.wait) {
                    break;
                }
                let signal = step.then.as_raw();
                warn!("nix-daemon outlives its session session={number} signal={signal}");
                let _ = kill_process_group(Pid::from_child(&self.child), step.then);
            }

            self.stderr.end_line(number);
            // This must come before the child is reaped: after that, its number may belong to
            // another group.
            self.kill_group();
            match self.child.wait() {
                Ok(status) => Fate {
                    success: status.success(),
                    description: match (status.code(), status.signal()) {
                        (Some(code), _) => format!("nix-daemon exited with status {code}"),
                        (None, signal) => {
                            format!(
                                "nix-daemon was killed by signal {}",
                                signal.unwrap_or_default()
                            )
                        }
                    },
                },
                Err(e) => Fate {
                    success: false,
                    description: format!("nix-daemon is lost: {e}"),
                },
            }
        }

        /// Returns whether the child exits in time. Logs what it says until then.
        fn exits(&mut self, exited: &OwnedFd, number: u64, until: Instant) -> bool {
            loop {
                let exited = PollFd::new(exited, PollFlags::IN);
                let [exit, stderr] =
                    poll::ready([Some(exited), self.stderr.poll_fd()], Some(until));
                if !stderr.is_empty() {
                    self.stderr.log(number);
                }
                if Instant::now() >= until || stderr.is_empty() && !exit.is_empty() {
                    return !exit.is_empty();
                }
            }
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            if let Ok(None) = self.child.try_wait() {
                self.kill_group();
                let _ = self.child.wait();
            }
        }
    }

    /// A child's standard error, on its way to the log.
    #[derive(Default)]
    struct Stderr {
        pipe: Option<ChildStderr>,
        /// The current line as far as it was read, and whether it is the rest of a line that was
        /// too long.
        line: Vec<u8>,
        is_continued: bool,
        /// The last line that had words in it, without terminal escapes and at most
        /// MAX_LINE_BYTES long.
        last_line: String,
    }

    impl Stderr {
        fn poll_fd(&self) -> Option<PollFd<'_>> {
            self.pipe
                .as_ref()
                .map(|pipe| PollFd::new(pipe, PollFlags::IN))
        }

        /// Reads what is available, and logs each complete line.
        fn log(&mut self, number: u64) {
            let mut chunk = [0; MAX_LINE_BYTES];
            let length = self
                .pipe
                .as_mut()
                .map_or(0, |pipe| pipe.read(&mut chunk).unwrap_or(0));
            if length == 0 {
                self.pipe = None;
            }

            for &byte in &chunk[..length] {
                if byte == b'\n' {
                    self.end_line(number);
                    self.is_continued = false;
                    continue;
                }
                self.line.push(byte);
                if self.line.len() == MAX_LINE_BYTES {
                    self.end_line(number);
                    self.is_continued = true;
                }
            }
        }

        fn end_line(&mut self, number: u64) {
            let line = mem::take(&mut self.line);
            let line = without_escapes(&String::from_utf8_lossy(&line));
            if !line.trim().is_empty() {
                info!("nix-daemon says session={number} line={line:?}");
            }
            if line.contains(char::is_alphanumeric) && !self.is_continued {
                self.last_line = line.trim().into();
            }
        }
    }
}

/// Copies in both directions between a WebSocket and a pair of pipes. `inward` reads messages
/// and writes their payload to a pipe; `outward` reads a pipe and sends binary messages. Each
/// runs in a thread of its own; the thread that starts them supervises. Promises that reading
/// never waits for writing, that no lock is held while anything waits, that only the first
/// reason to end counts, and that both threads are gone when `run` returns.
mod copy {
    use crate::metrics;
    use crate::poll::{self, Event};
    use crate::util::{self, lock};
    use rustix::buffer::spare_capacity;
    use rustix::event::{PollFd, PollFlags};
    use rustix::io::Errno;
    use rustix::net::sockopt;
    use rustix::rand::{GetRandomFlags, getrandom};
    use std::io::{self, ErrorKind, Read, Write};
    use std::net::TcpStream;
    use std::ops::Range;
    use std::os::fd::BorrowedFd;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
    use std::sync::{Arc, Mutex, OnceLock};
    use std::thread;
    use std::time::{Duration, Instant};
    use tungstenite::error::{CapacityError, Error, ProtocolError};
    use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};
    use tungstenite::protocol::frame::{Frame, FrameHeader};
    use tungstenite::protocol::{CloseFrame, Role, WebSocket, WebSocketConfig};
    use tungstenite::{Bytes, Message};

    /// How much is read from a pipe for one message. What a program writes at once, often 32 or
    /// 64 KiB, goes in one piece.
    const CHUNK_BYTES: usize = 64 << 10;
    /// Room for a frame's header before its payload: 14 bytes are the most (RFC 6455, section
    /// 5.2), and 16 leave the payload aligned.
    const HEADER_BYTES: usize = 16;
    /// How much is read from the peer at a time. tungstenite clears this much memory before each
    /// read. rustls returns no more than one record.
    const READ_BYTES: usize = 128 << 10;
    const TLS_READ_BYTES: usize = 16 << 10;
    /// A larger message from the peer ends the session.
    const MAX_MESSAGE_BYTES: usize = 4 << 20;
    /// RFC 6455, section 5.5: a control frame holds 125 bytes, and the code of a Close takes two
    /// of them.
    const MAX_REASON_BYTES: usize = 123;
    /// A peer that does not respond for so many keepalive intervals is gone.
    const KEEPALIVES: u32 = 3;
    /// How long the peer may take to receive a Close, and then to end its side of the connection.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
    /// poll(2) reports a socket as writable when a third of its buffer is free. A slow peer may
    /// take very long to free that much, so we try without it.
    const LITTLE_ROOM_CHECK: Duration = Duration::from_secs(1);
    /// About the smallest send buffer that Linux gives a socket.
    const SMALLEST_BUFFER: usize = 5 << 10;
    const BROKEN: PollFlags = PollFlags::ERR.union(PollFlags::HUP);

    /// Why a session ended.
    pub enum End {
        /// The peer sent a Close, with this code and reason if it gave them.
        Closed(Option<CloseFrame>),
        /// The peer does not respond, or the connection broke. Says how.
        Gone(String),
        /// The peer broke the protocol: the code for the Close (RFC 6455, section 7.4.1), and
        /// what it did.
        Violation(CloseCode, String),
        /// The pipe that `outward` reads has ended, and the socket has taken everything from it.
        SourceEnded,
        /// Nobody reads the pipe that `inward` writes.
        SinkClosed,
        /// The supervisor ended the session.
        TimedOut,
        ShuttingDown,
        /// One of the threads panicked.
        Failed,
    }

    /// How long to wait while a peer receives what is on its way to it.
    pub struct Patience {
        /// How long it may go without receiving anything.
        pub standstill: Duration,
        pub deadline: Instant,
    }

    impl Patience {
        /// For a peer with this keepalive interval. With 0, only the deadline counts.
        pub fn new(keepalive_secs: u32, deadline: Instant) -> Patience {
            let standstill = match keepalive_secs {
                0 => deadline.saturating_duration_since(Instant::now()),
                keepalive => util::secs(keepalive) * KEEPALIVES,
            };
            Patience {
                standstill,
                deadline,
            }
        }

        /// When it is over if the peer receives nothing from now on.
        fn limit(&self) -> Instant {
            self.deadline.min(Instant::now() + self.standstill)
        }

        /// For a peer that has only a Close to receive.
        pub fn short() -> Patience {
            Patience {
                standstill: CLOSE_TIMEOUT,
                deadline: Instant::now() + CLOSE_TIMEOUT,
            }
        }
    }

    /// The connection that both halves of a WebSocket share. It does not block.
    pub struct Wire {
        socket: Arc<TcpStream>,
        tls: Option<Mutex<rustls::ClientConnection>>,
        start: Instant,
        /// When bytes last came from the peer, and when the socket last accepted some, in
        /// milliseconds since `start`.
        heard: AtomicU64,
        taken: AtomicU64,
    }

    impl Wire {
        /// A connection. If `tls` is given, its handshake must be complete.
        pub fn new(
            socket: Arc<TcpStream>,
            mut tls: Option<rustls::ClientConnection>,
        ) -> io::Result<Wire> {
            socket.set_nonblocking(true)?;
            if let Some(tls) = &mut tls {
                // It should accept a frame whole.
                tls.set_buffer_limit(Some(HEADER_BYTES + CHUNK_BYTES));
            }
            Ok(Wire {
                socket,
                tls: tls.map(Mutex::new),
                start: Instant::now(),
                heard: AtomicU64::new(0),
                taken: AtomicU64::new(0),
            })
        }

        fn note(&self, moment: &AtomicU64) {
            moment.store(self.start.elapsed().as_millis() as u64, Relaxed);
        }

        fn since(&self, moment: &AtomicU64) -> Instant {
            self.start + Duration::from_millis(moment.load(Relaxed))
        }

        fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = match &self.tls {
                None => (&*self.socket).read(buffer)?,
                Some(tls) => self.read_tls(&mut lock(tls), buffer)?,
            };

            self.note(&self.heard);
            Ok(length)
        }

        fn read_tls(
            &self,
            tls: &mut rustls::ClientConnection,
            buffer: &mut [u8],
        ) -> io::Result<usize> {
            loop {
                match tls.reader().read(buffer) {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    done => return done,
                }

                tls.read_tls(&mut &*self.socket)?;
                tls.process_new_packets().map_err(io::Error::other)?;
            }
        }

        fn write(&self, bytes: &[u8]) -> io::Result<usize> {
            let Some(tls) = &self.tls else {
                let length = (&*self.socket).write(bytes)?;
                self.note(&self.taken);
                return Ok(length);
            };

            // rustls has room for more once it has sent what it holds.
            let mut tls = lock(tls);
            self.send_tls(&mut tls)?;
            let length = tls.writer().write(bytes)?;
            match self.send_tls(&mut tls) {
                Err(e) if e.kind() != ErrorKind::WouldBlock => Err(e),
                _ => Ok(length),
            }
        }

        fn send_tls(&self, tls: &mut rustls::ClientConnection) -> io::Result<()> {
            while tls.wants_write() {
                tls.write_tls(&mut &*self.socket)?;
                self.note(&self.taken);
            }
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            match &self.tls {
                None => Ok(()),
                Some(tls) => self.send_tls(&mut lock(tls)),
            }
        }
    }

    /// The half that reads. What tungstenite would answer by itself is dropped, because the
    /// other half answers.
    struct Receiving(Arc<Wire>);

    impl Read for Receiving {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Receiving {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The half that writes. A `WebSocket` of tungstenite would copy each message once more.
    struct Sending {
        wire: Arc<Wire>,
        role: Role,
        /// One frame, and what the socket has yet to accept of it.
        buffer: Vec<u8>,
        unsent: Range<usize>,
        /// To be sent after that frame. If there is more to answer, only the last ping counts
        /// (RFC 6455, section 5.5.3).
        pong: Option<Bytes>,
    }

    impl Sending {
        /// Sends what there is to send.
        fn flush(&mut self) -> io::Result<()> {
            loop {
                while !self.unsent.is_empty() {
                    match self.wire.write(&self.buffer[self.unsent.clone()])? {
                        0 => return Err(ErrorKind::WriteZero.into()),
                        length => self.unsent.start += length,
                    }
                }
                self.wire.flush()?;
                match self.pong.take() {
                    Some(payload) => self.control(Control::Pong, &payload)?,
                    None => return Ok(()),
                }
            }
        }

        /// Makes a message of what a pipe holds. Everything before must be sent.
        fn read(&mut self, source: BorrowedFd) -> Result<usize, Errno> {
            self.clear();
            let length = rustix::io::read(source, spare_capacity(&mut self.buffer))?;
            if length > 0 {
                self.frame(OpCode::Data(Data::Binary))?;
            }
            Ok(length)
        }

        /// Makes a control frame. Everything before must be sent.
        fn control(&mut self, control: Control, payload: &[u8]) -> Result<(), Errno> {
            self.clear();
            self.buffer.extend_from_slice(payload);
            self.frame(OpCode::Control(control))
        }

        fn clear(&mut self) {
            self.buffer.clear();
            self.buffer.resize(HEADER_BYTES, 0);
        }

        /// Makes the payload in the buffer a frame (RFC 6455, section 5.2). Fails without
        /// randomness, and then there is nothing to send.
        fn frame(&mut self, opcode: OpCode) -> Result<(), Errno> {
            let mut header = FrameHeader {
                opcode,
                ..FrameHeader::default()
            };
            let (room, payload) = self.buffer.split_at_mut(HEADER_BYTES);
            if self.role == Role::Client {
                let mut mask = [0; 4];
                getrandom(&mut mask, GetRandomFlags::empty())?;
                apply_mask(payload, mask);
                header.mask = Some(mask);
            }

            let length = payload.len() as u64;
            let start = HEADER_BYTES - header.len(length);
            let written = header.format(length, &mut &mut room[start..]);
            written.map_err(|_| Errno::NOBUFS)?;
            self.unsent = start..self.buffer.len();
            Ok(())
        }
    }

    /// RFC 6455, section 5.3.
    fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
        let key = u32::from_ne_bytes(mask);
        let (words, rest) = payload.as_chunks_mut();
        for word in words {
            *word = (u32::from_ne_bytes(*word) ^ key).to_ne_bytes();
        }
        for (byte, key) in rest.iter_mut().zip(mask) {
            *byte ^= key;
        }
    }

    /// The pipes of a session. They do not block.
    pub struct Pipes<'a> {
        pub source: BorrowedFd<'a>,
        /// Once this is readable, an empty source has ended.
        pub source_ended: Option<BorrowedFd<'a>>,
        pub sink: BorrowedFd<'a>,
    }

    /// What happened to bytes for the peer.
    enum Sent {
        All,
        /// The rest needs a `flush`.
        Partly,
        Broken,
    }

    /// One WebSocket, and what its threads share.
    pub struct Link {
        wire: Arc<Wire>,
        role: Role,
        sending: Mutex<Sending>,
        /// Whether the socket has yet to accept some of what was sent.
        unsent: AtomicBool,
        /// Whether `inward` is waiting for its pipe, and so reads nothing from the peer.
        sink_is_full: AtomicBool,
        end: OnceLock<End>,
        over: Event,
        /// Payload, in bytes.
        pub received: AtomicU64,
        pub sent: AtomicU64,
    }

    impl Link {
        /// Fails without descriptors.
        pub fn new(wire: Wire, role: Role) -> io::Result<Link> {
            let wire = Arc::new(wire);
            let sending = Sending {
                wire: wire.clone(),
                role,
                buffer: Vec::with_capacity(HEADER_BYTES + CHUNK_BYTES),
                unsent: 0..0,
                pong: None,
            };

            Ok(Link {
                wire,
                role,
                sending: Mutex::new(sending),
                unsent: AtomicBool::new(false),
                sink_is_full: AtomicBool::new(false),
                end: OnceLock::new(),
                over: Event::new()?,
                received: AtomicU64::new(0),
                sent: AtomicU64::new(0),
            })
        }

        /// Sends `head` and copies both ways until the session is over, while `supervise` waits
        /// for that. `rest` is what came after the peer's head. Fails before anything is sent if
        /// there are no threads.
        pub fn run(
            &self,
            head: &[u8],
            rest: Vec<u8>,
            pipes: &Pipes,
            supervise: impl FnOnce(),
        ) -> io::Result<()> {
            let read_bytes = match self.wire.tls {
                None => READ_BYTES,
                Some(_) => TLS_READ_BYTES,
            };
            let limits = WebSocketConfig::default()
                .read_buffer_size(read_bytes)
                .max_message_size(Some(MAX_MESSAGE_BYTES))
                .max_frame_size(Some(MAX_MESSAGE_BYTES));
            let wire = Receiving(self.wire.clone());
            let has_rest = !rest.is_empty();
            let receiving = WebSocket::from_partially_read(wire, rest, self.role, Some(limits));

            thread::scope(|scope| {
                let _guard = EndOnPanic(self);
                let thread = |name: &str| thread::Builder::new().name(name.into());
                // The lock keeps everybody from sending before the head, which waits until both
                // threads exist.
                let sending = lock(&self.sending);
                let inward = move || self.inward(receiving, has_rest, pipes.sink);
                let inward = thread("inward").spawn_scoped(scope, inward)?;
                let outward = move || self.outward(pipes.source, pipes.source_ended);
                let outward = match thread("outward").spawn_scoped(scope, outward) {
                    Ok(outward) => outward,
                    Err(e) => {
                        self.finish(End::Failed);
                        return Err(e);
                    }
                };
                // It is short, and a new socket has room for it.
                let _ = self.wire.write(head);
                drop(sending);

                supervise();

                // A panic has been reported by now, and has ended the session.
                let _ = (inward.join(), outward.join());
                Ok(())
            })
        }

        /// Ends the session, unless it has ended already.
        pub fn finish(&self, end: End) {
            if self.end.set(end).is_ok() {
                self.over.set();
            }
        }

        /// How the session ended, if it has.
        pub fn end(&self) -> Option<&End> {
            self.end.get()
        }

        /// Becomes readable when the session is over.
        pub fn over(&self) -> PollFd<'_> {
            self.over.poll_fd()
        }

        /// WebSocket → pipe.
        fn inward(&self, mut peer: WebSocket<Receiving>, has_rest: bool, sink: BorrowedFd) {
            let _guard = EndOnPanic(self);
            // A read clears memory, and an idle session should use none: so we wait first.
            let mut wait = !has_rest;
            let mut owes_pong = false;

            while self.end.get().is_none() {
                if wait {
                    self.await_message(&mut owes_pong);
                }

                let message = peer.read();
                wait = message.is_err();
                let done = match message {
                    Ok(Message::Binary(payload)) => self.deliver(&payload, sink),
                    Ok(Message::Ping(payload)) => {
                        let pong = |sending: &mut Sending| {
                            sending.pong = Some(payload);
                            sending.flush()
                        };
                        owes_pong |= !matches!(self.attempt(pong), Sent::All);
                        Ok(())
                    }
                    Ok(Message::Text(_)) => {
                        let what = "only binary messages carry data".into();
                        Err(End::Violation(CloseCode::Unsupported, what))
                    }
                    Ok(Message::Close(frame)) => Err(End::Closed(frame)),
                    Ok(_) => Ok(()),
                    Err(e) => failed_read(e),
                };
                if let Err(end) = done {
                    self.finish(end);
                }
            }
        }

        /// Waits for more from the peer, and meanwhile sends a pong that is still due.
        fn await_message(&self, owes_pong: &mut bool) {
            let mut events = PollFlags::IN;
            events.set(PollFlags::OUT, *owes_pong);
            let socket = PollFd::new(&self.wire.socket, events);

            let [socket, _] = poll::ready([Some(socket), Some(self.over())], None);
            if socket.contains(PollFlags::OUT) {
                *owes_pong = !matches!(self.attempt(Sending::flush), Sent::All);
            }
        }

        /// Writes the payload of a message to the pipe. A child that reads no more may still
        /// have something to say, so what it does not take is dropped. A client whose reader is
        /// gone is of no use.
        fn deliver(&self, mut payload: &[u8], sink: BorrowedFd) -> Result<(), End> {
            self.received.fetch_add(payload.len() as u64, Relaxed);
            metrics::BYTES_IN.add(payload.len() as u64);

            while !payload.is_empty() && self.end.get().is_none() {
                match rustix::io::write(sink, payload) {
                    Ok(length) => payload = &payload[length..],
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => self.await_sink(sink)?,
                    Err(_) if self.role == Role::Server => return Ok(()),
                    Err(_) => return Err(End::SinkClosed),
                }
            }
            Ok(())
        }

        /// Waits until the pipe has room. Fails if the connection breaks meanwhile.
        fn await_sink(&self, sink: BorrowedFd) -> Result<(), End> {
            let sink = PollFd::from_borrowed_fd(sink, PollFlags::OUT);
            let socket = PollFd::new(&self.wire.socket, PollFlags::empty());

            self.sink_is_full.store(true, Relaxed);
            let [_, socket, _] = poll::ready([Some(sink), Some(socket), Some(self.over())], None);
            // We did not read, so the peer's silence does not count.
            self.wire.note(&self.wire.heard);
            self.sink_is_full.store(false, Relaxed);

            if socket.intersects(BROKEN) {
                return Err(End::Gone("the connection broke".into()));
            }
            Ok(())
        }

        /// Pipe → WebSocket.
        fn outward(&self, source: BorrowedFd, source_ended: Option<BorrowedFd>) {
            let _guard = EndOnPanic(self);
            let mut ended = false;

            while self.end.get().is_none() {
                let mut read = None;
                let sent = self.attempt(|sending| {
                    sending.flush()?;
                    read = Some(sending.read(source));
                    sending.flush()
                });

                if let Some(Ok(length)) = read {
                    self.sent.fetch_add(length as u64, Relaxed);
                    metrics::BYTES_OUT.add(length as u64);
                }
                match (sent, read) {
                    // `inward` finds out why.
                    (Sent::Broken, _) => return,
                    (Sent::Partly, _) => {
                        let until = Some(Instant::now() + LITTLE_ROOM_CHECK);
                        poll::ready([Some(self.room()), Some(self.over())], until);
                    }
                    (Sent::All, None | Some(Ok(1..) | Err(Errno::INTR))) => {}
                    (Sent::All, Some(Err(Errno::AGAIN))) if !ended => {
                        let source = PollFd::from_borrowed_fd(source, PollFlags::IN);
                        let on_end = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
                        let fds = [Some(source), source_ended.map(on_end), Some(self.over())];
                        let [_, end, _] = poll::ready(fds, None);
                        // The source may have written something just before: look once more.
                        ended = !end.is_empty();
                    }
                    (Sent::All, Some(Ok(0) | Err(_))) => self.finish(End::SourceEnded),
                }
            }
        }

        /// Becomes writable when the socket has room.
        fn room(&self) -> PollFd<'_> {
            PollFd::new(&self.wire.socket, PollFlags::OUT)
        }

        /// Takes one step with the half that sends. What the socket does not accept stays in the
        /// buffer.
        fn attempt(&self, step: impl FnOnce(&mut Sending) -> io::Result<()>) -> Sent {
            let mut sending = lock(&self.sending);
            match step(&mut sending) {
                Ok(()) => {
                    if self.unsent.swap(false, Relaxed) {
                        // The peer has received what was waiting. Its pongs come only after that.
                        self.wire.note(&self.wire.heard);
                    }
                    Sent::All
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    // From now on the peer must receive something.
                    if !self.unsent.swap(true, Relaxed) {
                        self.wire.note(&self.wire.taken);
                    }
                    Sent::Partly
                }
                Err(_) => Sent::Broken,
            }
        }

        /// Sends a Close, after what is half sent. Once the peer has received everything, or
        /// `patience` is over, ends our side of the connection, and waits at most
        /// `CLOSE_TIMEOUT` for the peer to end its own.
        pub fn close(&self, code: Option<CloseCode>, reason: &str, patience: &Patience) {
            let reason = &reason[..reason.floor_char_boundary(MAX_REASON_BYTES)];
            let mut close = Some(Frame::close(code.map(|code| CloseFrame {
                code,
                reason: reason.into(),
            })));
            let mut step = |sending: &mut Sending| {
                sending.flush()?;
                if let Some(frame) = close.take() {
                    sending.control(Control::Close, frame.payload())?;
                }
                sending.flush()
            };

            let limit = patience.limit();
            while let Sent::Partly = self.attempt(&mut step) {
                if Instant::now() >= limit {
                    break;
                }
                let until = limit.min(Instant::now() + LITTLE_ROOM_CHECK);
                poll::ready([Some(self.room())], Some(until));
            }

            self.drain(patience);
            poll::linger(&self.wire.socket, CLOSE_TIMEOUT);
        }

        /// Waits until the peer has received what the kernel holds for it. A socket becomes
        /// writable when its buffer is large enough for more than it holds (socket(7)). So we
        /// shrink the buffer in steps: each time the socket becomes writable, the peer has
        /// received something. What the peer sends is read and dropped.
        fn drain(&self, patience: &Patience) {
            let mut socket = &*self.wire.socket;
            let room_in = |size: usize, until| {
                // The kernel doubles this value, and has a smallest size.
                let _ = sockopt::set_socket_send_buffer_size(&self.wire.socket, size / 2);
                let events = PollFd::new(&self.wire.socket, PollFlags::IN | PollFlags::OUT);
                let [ready] = poll::ready([Some(events)], Some(until));
                ready
            };

            let mut size = sockopt::socket_send_buffer_size(socket).unwrap_or(0);
            let mut ready = room_in(0, Instant::now());
            let mut limit = patience.limit();
            while !ready.intersects(BROKEN | PollFlags::OUT) && Instant::now() < limit {
                ready = room_in(size, limit);
                let is_open = !ready.contains(PollFlags::IN)
                    || socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0);
                if !is_open {
                    return;
                }
                if ready.contains(PollFlags::OUT) && size > SMALLEST_BUFFER {
                    size -= size / 16;
                    ready.remove(PollFlags::OUT);
                    limit = patience.limit();
                }
            }
        }
    }

    /// What an error from tungstenite's `read` means. It is no error that there is nothing to read.
    fn failed_read(error: Error) -> Result<(), End> {
        let violation = |code, what: String| Err(End::Violation(code, what));
        match error {
            Error::Io(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(())
            }
            Error::Capacity(CapacityError::MessageTooLong { .. }) => {
                let limit = MAX_MESSAGE_BYTES >> 20;
                violation(
                    CloseCode::Size,
                    format!("a message is longer than {limit} MiB"),
                )
            }
            Error::Utf8(e) => violation(CloseCode::Invalid, e),
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
                Err(End::Gone("the connection was closed".into()))
            }
            Error::Protocol(e) => violation(CloseCode::Protocol, e.to_string()),
            Error::Io(e) => Err(End::Gone(util::system_words(&e))),
            e => Err(End::Gone(e.to_string())),
        }
    }

    /// Ends the session if its thread panics.
    struct EndOnPanic<'a>(&'a Link);

    impl Drop for EndOnPanic<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.finish(End::Failed);
            }
        }
    }

    /// Decides when to ping the peer, and when it has not responded for too long. Belongs to the
    /// thread that supervises.
    pub struct Keepalive {
        /// None means never.
        interval: Option<Duration>,
        next_ping: Instant,
    }

    impl Keepalive {
        /// Pings every `secs` seconds. 0 disables pings, and the limit on silence with them.
        pub fn new(wire: &TcpStream, secs: u32) -> io::Result<Keepalive> {
            let interval = (secs > 0).then(|| Duration::from_secs(secs.into()));
            if let Some(interval) = interval {
                // For a peer that vanishes while we do not read from it.
                let limit = (interval * KEEPALIVES).as_millis().min(i32::MAX as u128) as u32;
                sockopt::set_tcp_user_timeout(wire, limit)?;
            }
            Ok(Keepalive {
                interval,
                next_ping: Instant::now() + interval.unwrap_or_default(),
            })
        }

        /// Sends a ping if it is time, and ends the session if the peer is gone. Returns when to
        /// call this again.
        ///
        /// The peer is there if its socket has accepted something in the last three intervals,
        /// as long as we have something to send. Otherwise it is there if it has sent something,
        /// or if we did not read.
        pub fn check(&mut self, link: &Link) -> Option<Instant> {
            let interval = self.interval?;
            let now = Instant::now();

            if now >= self.next_ping {
                self.next_ping = now + interval;
                link.attempt(|sending| {
                    sending.flush()?;
                    sending.control(Control::Ping, &[])?;
                    sending.flush()
                });
            }

            let last_sign = if link.unsent.load(Relaxed) {
                link.wire.since(&link.wire.taken)
            } else if link.sink_is_full.load(Relaxed) {
                now
            } else {
                link.wire.since(&link.wire.heard)
            };
            let limit = last_sign + interval * KEEPALIVES;
            if now >= limit {
                link.finish(End::Gone(
                    "no response for three keepalive intervals".into(),
                ));
            }
            Some(limit.min(self.next_ping))
        }
    }
}

/// What the operator wants: turns defaults, file and environment into one validated `Config`.
/// Reads the configuration file and the environment, nothing else. Promises that everything in a
/// `Config` can be used as it is, and that an error says where it comes from.
mod config {
    use crate::util::is_https_or_loopback;
    use serde::{Deserialize, Serialize};
    use std::collections::BTreeMap;
    use std::fmt::{self, Display};
    use std::num::NonZeroU32;
    use std::ops::Deref;
    use std::path::{Path, PathBuf};
    use std::{env, fs};
    use toml::de::{DeTable, DeValue, Deserializer, Error};
    use toml::{Spanned, Value};
    use tungstenite::http::uri::Authority;

    /// Every key that has a default.
    const DEFAULTS: &str = include_str!("config.example.toml");

    /// The variables, each with the table and the key that it sets.
    const VARIABLES: [(&str, &str, &str); 14] = [
        ("NIX_RELAY_LISTEN", "server", "listen"),
        ("NIX_RELAY_ADMIN_LISTEN", "server", "admin_listen"),
        (
            "NIX_RELAY_SHUTDOWN_GRACE_SECS",
            "server",
            "shutdown_grace_secs",
        ),
        (
            "NIX_RELAY_HANDSHAKE_TIMEOUT_SECS",
            "server",
            "handshake_timeout_secs",
        ),
        ("NIX_RELAY_KEEPALIVE_SECS", "server", "keepalive_secs"),
        ("NIX_RELAY_ISSUER", "auth", "issuer"),
        ("NIX_RELAY_AUDIENCE", "auth", "audience"),
        ("NIX_RELAY_ALLOWED_ORG", "auth", "allowed_org"),
        (
            "NIX_RELAY_JWKS_CACHE_TTL_SECS",
            "auth",
            "jwks_cache_ttl_secs",
        ),
        ("NIX_RELAY_DAEMON_PATH", "daemon", "nix_daemon_path"),
        ("NIX_RELAY_EXTRA_ARGS", "daemon", "extra_args"),
        ("NIX_RELAY_TIMEOUT_SECS", "daemon", "timeout_secs"),
        ("NIX_RELAY_MAX_CONNECTIONS", "daemon", "max_connections"),
        (
            "NIX_RELAY_QUEUE_TIMEOUT_SECS",
            "daemon",
            "queue_timeout_secs",
        ),
    ];

    /// The effective configuration. config.example.toml says what each key means.
    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub struct Config {
        pub server: Server,
        pub auth: Auth,
        pub daemon: Daemon,
        /// The rules of `auth.rule` in their order, then that of `auth.allowed_org`.
        #[serde(skip)]
        pub rules: Vec<Rule>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub struct Server {
        pub listen: Address,
        pub admin_listen: AddressOrNone,
        pub shutdown_grace_secs: u32,
        pub handshake_timeout_secs: NonZeroU32,
        /// 0 disables keepalives.
        pub keepalive_secs: u32,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub struct Auth {
        issuer: IssuerUrl,
        audience: NonEmpty,
        allowed_org: Organisation,
        pub jwks_cache_ttl_secs: NonZeroU32,
        /// From issuer to the path of its key set.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        pub jwks_files: BTreeMap<String, PathBuf>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rule: Vec<WrittenRule>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub struct Daemon {
        pub nix_daemon_path: Program,
        extra_args: Vec<String>,
        pub timeout_secs: NonZeroU32,
        pub max_connections: NonZeroU32,
        pub queue_timeout_secs: u32,
    }

    /// A rule as it is written.
    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    struct WrittenRule {
        name: NonEmpty,
        issuer: Option<IssuerUrl>,
        audience: Option<NonEmpty>,
        bound_claims: BoundClaims,
        extra_args: Option<Vec<String>>,
        max_connections: Option<NonZeroU32>,
    }

    /// A rule with everything filled in that it leaves out.
    pub struct Rule {
        pub name: String,
        pub issuer: String,
        pub audience: String,
        /// For each claim, the patterns of which one must match.
        pub bound_claims: BTreeMap<String, Vec<String>>,
        pub ignores_case: bool,
        pub extra_args: Vec<String>,
        pub max_connections: Option<NonZeroU32>,
    }

    /// Defines a type for each kind of text, and what is valid for it.
    macro_rules! texts {
        ($($name:ident: $is_valid:expr, $expected:expr;)*) => {$(
            #[derive(Deserialize, Serialize, Clone)]
            #[serde(try_from = "String")]
            pub struct $name(String);

            impl TryFrom<String> for $name {
                type Error = String;

                fn try_from(text: String) -> Result<$name, String> {
                    let is_valid: fn(&str) -> bool = $is_valid;
                    if is_valid(&text) {
                        Ok($name(text))
                    } else {
                        Err(format!(concat!("expected ", $expected, ", not {:?}"), text))
                    }
                }
            }

            impl Display for $name {
                fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
                    to.write_str(&self.0)
                }
            }

            impl Deref for $name {
                type Target = str;

                fn deref(&self) -> &str {
                    &self.0
                }
            }
        )*};
    }

    texts! {
        Address: is_address, "HOST:PORT or [IPV6]:PORT";
        AddressOrNone: |text| text.is_empty() || is_address(text), "HOST:PORT or nothing";
        IssuerUrl: is_https_or_loopback, "an https URL (http for loopback alone)";
        NonEmpty: |text| !text.is_empty(), "a text that is not empty";
        Organisation: |text| !text.contains('*'),
            "the name of one organisation (patterns are for auth.rule)";
        // The daemon runs in /, so a path relative to where the relay was started would mislead.
        Program: |text| text.starts_with('/') || !text.is_empty() && !text.contains('/'),
            "an absolute path, or a name in PATH";
    }

    fn is_address(text: &str) -> bool {
        let authority = text.parse::<Authority>();
        authority.is_ok_and(|authority| {
            authority.port_u16().is_some() && !authority.host().is_empty() && !text.contains('@')
        })
    }

    /// Claims, and the patterns for each.
    #[derive(Deserialize, Serialize)]
    #[serde(try_from = "BTreeMap<String, Value>")]
    struct BoundClaims(BTreeMap<String, Value>);

    impl TryFrom<BTreeMap<String, Value>> for BoundClaims {
        type Error = String;

        fn try_from(claims: BTreeMap<String, Value>) -> Result<BoundClaims, String> {
            if claims.is_empty() {
                return Err(
                    "expected at least one claim: without any, everybody would be let in".into(),
                );
            }
            for (name, patterns) in &claims {
                if texts_of(patterns).is_none_or(|texts| texts.is_empty()) {
                    let expected = "expected a text, a whole number, a boolean, or a list of these";
                    return Err(format!("{expected} for {name}, not {patterns}"));
                }
            }
            Ok(BoundClaims(claims))
        }
    }

    /// The patterns of a claim, as texts.
    fn texts_of(patterns: &Value) -> Option<Vec<String>> {
        match patterns {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Integer(_) | Value::Boolean(_) => Some(vec![patterns.to_string()]),
            Value::Array(several) => {
                let texts = several
                    .iter()
                    .map(|one| if one.is_array() { None } else { texts_of(one) });
                texts
                    .collect::<Option<Vec<_>>>()
                    .map(|texts| texts.concat())
            }
            _ => None,
        }
    }

    /// Applies defaults, file and environment, in that order. Also returns the effective
    /// configuration as TOML. An error begins with the file or the variable that it comes from.
    pub fn load(path: Option<&Path>) -> Result<(Config, String), String> {
        let text = match path {
            Some(path) => {
                fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?
            }
            None => String::new(),
        };
        let invalid = |mut e: Error| {
            e.set_input(Some(&text));
            format!(
                "{}: {}",
                path.unwrap_or(Path::new("defaults")).display(),
                e.to_string().trim_end()
            )
        };
        let mut settings = DeTable::parse(&text).map_err(invalid)?;
        let defaults = DeTable::parse(DEFAULTS).map_err(|e| e.to_string())?;
        add_missing(settings.get_mut(), defaults.get_ref());
        let mut config =
            Config::deserialize(Deserializer::from(settings.clone())).map_err(invalid)?;

        let mut values = Vec::new();
        for (variable, ..) in VARIABLES {
            let value = env::var_os(variable).unwrap_or_default().into_string();
            values.push(value.map_err(|_| format!("{variable}: expected UTF-8"))?);
        }
        for ((variable, table, key), value) in VARIABLES.into_iter().zip(&values) {
            if value.is_empty() {
                continue;
            }
            set(settings.get_mut(), table, key, value);
            let typed = Config::deserialize(Deserializer::from(settings.clone()));
            config = typed.map_err(|e| format!("{variable}: {}", e.message()))?;
        }

        let effective = toml::to_string(&config).map_err(|e| e.to_string())?;
        config.rules = config.auth.rules(&config.daemon.extra_args)?;
        Ok((config, effective))
    }

    /// A sentence for each variable that looks like a setting of the relay and is none.
    pub fn warnings() -> impl Iterator<Item = String> {
        let known = |name: &str| {
            name == "NIX_RELAY_CONFIG" || VARIABLES.iter().any(|(known, ..)| *known == name)
        };
        let names = env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        names
            .filter(move |name| name.starts_with("NIX_RELAY_") && !known(name))
            .map(|name| format!("{name:?} is no setting of the relay; is it spelt right?"))
    }

    /// Adds the default of each key that the file does not have.
    fn add_missing<'a>(settings: &mut DeTable<'a>, defaults: &DeTable<'a>) {
        for (name, defaults) in defaults {
            let table = settings
                .entry(name.clone())
                .or_insert_with(|| defaults.clone());
            if let (DeValue::Table(table), DeValue::Table(defaults)) =
                (table.get_mut(), defaults.get_ref())
            {
                for (key, default) in defaults {
                    table.entry(key.clone()).or_insert_with(|| default.clone());
                }
            }
        }
    }

    /// Sets a key to the text of a variable, as the type that the key has so far: a number, a
    /// list of words, or a text.
    fn set<'a>(settings: &mut DeTable<'a>, table: &str, key: &str, text: &'a str) {
        let setting = settings
            .get_mut(table)
            .and_then(|table| match table.get_mut() {
                DeValue::Table(table) => table.get_mut(key),
                _ => None,
            });
        let Some(setting) = setting else { return };

        let unplaced = |value| Spanned::new(0..0, value);
        let as_text = |text: &'a str| DeValue::String(text.into());
        let value = match setting.get_ref() {
            DeValue::Array(_) => DeValue::Array(
                text.split_whitespace()
                    .map(|word| unplaced(as_text(word)))
                    .collect(),
            ),
            DeValue::Integer(_) if text.parse::<i64>().is_ok() => {
                DeValue::parse(text).map_or_else(|_| as_text(text), Spanned::into_inner)
            }
            _ => as_text(text),
        };
        *setting = unplaced(value);
    }

    impl Auth {
        /// All rules, in the order in which they are tried. Fails if there are none.
        fn rules(&self, extra_args: &[String]) -> Result<Vec<Rule>, String> {
            let resolve = |rule: &WrittenRule| Rule {
                name: rule.name.to_string(),
                issuer: rule.issuer.as_ref().unwrap_or(&self.issuer).to_string(),
                audience: rule.audience.as_ref().unwrap_or(&self.audience).to_string(),
                bound_claims: rule.bound_claims.patterns(),
                ignores_case: false,
                extra_args: rule
                    .extra_args
                    .clone()
                    .unwrap_or_else(|| extra_args.to_vec()),
                max_connections: rule.max_connections,
            };
            let mut rules: Vec<Rule> = self.rule.iter().map(resolve).collect();

            if !self.allowed_org.is_empty() {
                let owner = vec![self.allowed_org.to_string()];
                rules.push(Rule {
                    name: "allowed_org".into(),
                    issuer: self.issuer.to_string(),
                    audience: self.audience.to_string(),
                    bound_claims: BTreeMap::from([("repository_owner".into(), owner)]),
                    ignores_case: true,
                    extra_args: extra_args.to_vec(),
                    max_connections: None,
                });
            }
            if rules.is_empty() {
                return Err(
                    "nobody could connect: set auth.allowed_org (NIX_RELAY_ALLOWED_ORG) to the \
                            organisation whose jobs may, or add a rule"
                        .into(),
                );
            }
            Ok(rules)
        }
    }

    impl BoundClaims {
        fn patterns(&self) -> BTreeMap<String, Vec<String>> {
            let patterns = |value| texts_of(value).unwrap_or_default();
            self.0
                .iter()
                .map(|(name, value)| (name.clone(), patterns(value)))
                .collect()
        }
    }
}

/// Counts what the relay does, and serves the numbers to Prometheus (text format 0.0.4) on a
/// listener of their own. Promises that no label holds what a client chose, and that this
/// listener answers whatever happens on the relay's own: the two share only the counters.
mod metrics {
    use log::warn;
    use std::collections::VecDeque;
    use std::error::Error;
    use std::fmt::{Display, Write};
    use std::net::TcpListener;
    use std::panic::{self, AssertUnwindSafe};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
    use std::thread;
    use std::time::Duration;
    use tiny_http::{Header, Method, Request, Response, Server};

    /// A number that several threads change. A gauge may go down, a counter does not.
    pub struct Counter(AtomicU64);

    impl Counter {
        const fn new() -> Counter {
            Counter(AtomicU64::new(0))
        }

        pub fn add(&self, more: u64) {
            self.0.fetch_add(more, Relaxed);
        }

        pub fn sub(&self, less: u64) {
            self.0.fetch_sub(less, Relaxed);
        }

        fn get(&self) -> u64 {
            self.0.load(Relaxed)
        }
    }

    /// Why a session ended, in the log and in the metrics.
    #[derive(Clone, Copy, PartialEq)]
    pub enum Reason {
        ClientClosed,
        ClientGone,
        DaemonExited,
        ProtocolError,
        RelayFailed,
        ShuttingDown,
        TimedOut,
    }

    const REASONS: [Reason; 7] = [
        Reason::ClientClosed,
        Reason::ClientGone,
        Reason::DaemonExited,
        Reason::ProtocolError,
        Reason::RelayFailed,
        Reason::ShuttingDown,
        Reason::TimedOut,
    ];

    impl Reason {
        pub fn name(self) -> &'static str {
            match self {
                Reason::ClientClosed => "client-closed",
                Reason::ClientGone => "client-gone",
                Reason::DaemonExited => "daemon-exited",
                Reason::ProtocolError => "protocol-error",
                Reason::RelayFailed => "relay-failed",
                Reason::ShuttingDown => "shutting-down",
                Reason::TimedOut => "timed-out",
            }
        }
    }

    const STATUSES: [u16; 10] = [400, 401, 403, 404, 405, 408, 426, 431, 502, 503];
    /// Upper limits of the histogram's buckets, in seconds. A last bucket has no limit.
    const BUCKETS_SECS: [u64; 5] = [1, 10, 100, 1000, 10000];

    /// Payload from clients and to them, in bytes.
    pub static BYTES_IN: Counter = Counter::new();
    pub static BYTES_OUT: Counter = Counter::new();
    pub static SESSIONS_ACTIVE: Counter = Counter::new();
    static REFUSALS: [Counter; STATUSES.len()] = [const { Counter::new() }; STATUSES.len()];
    static REFRESHED: Counter = Counter::new();
    static NOT_REFRESHED: Counter = Counter::new();
    static ENDED: [Counter; REASONS.len()] = [const { Counter::new() }; REASONS.len()];
    static SESSION_MILLIS: Counter = Counter::new();
    /// Each session is counted in one bucket. The text adds them up.
    static SESSIONS_BY_LENGTH: [Counter; BUCKETS_SECS.len() + 1] =
        [const { Counter::new() }; BUCKETS_SECS.len() + 1];

    /// Counts a connection that got this status and no session.
    pub fn add_refusal(status: u16) {
        if let Some(index) = STATUSES.iter().position(|known| *known == status) {
            REFUSALS[index].add(1);
        }
    }

    /// Counts a fetch of an issuer's keys.
    pub fn add_jwks_refresh(worked: bool) {
        if worked {
            REFRESHED.add(1)
        } else {
            NOT_REFRESHED.add(1)
        }
    }

    /// Counts a session that has ended.
    pub fn add_session(reason: Reason, length: Duration) {
        ENDED[reason as usize].add(1);
        SESSION_MILLIS.add(length.as_millis() as u64);
        let fits = |limit: &u64| length <= Duration::from_secs(*limit);
        let bucket = BUCKETS_SECS
            .iter()
            .position(fits)
            .unwrap_or(BUCKETS_SECS.len());
        SESSIONS_BY_LENGTH[bucket].add(1);
    }

    /// The head of one metric in the text.
    struct Metric {
        name: &'static str,
        kind: &'static str,
        help: &'static str,
    }

    impl Metric {
        fn head(&self, text: &mut String) {
            let Metric { name, kind, help } = self;
            let _ = writeln!(text, "# HELP nix_relay_{name} {help}");
            let _ = writeln!(text, "# TYPE nix_relay_{name} {kind}");
        }

        /// Writes all series of a metric. They exist from the start: Prometheus sees no increase
        /// without a zero before it.
        fn series<L: Display>(
            &self,
            text: &mut String,
            label: &str,
            series: impl IntoIterator<Item = (L, u64)>,
        ) {
            self.head(text);
            for (value, count) in series {
                let _ = writeln!(
                    text,
                    "nix_relay_{}{{{label}=\"{value}\"}} {count}",
                    self.name
                );
            }
        }
    }

    fn counter(name: &'static str, help: &'static str) -> Metric {
        Metric {
            name,
            kind: "counter",
            help,
        }
    }

    fn gauge(name: &'static str, help: &'static str) -> Metric {
        Metric {
            name,
            kind: "gauge",
            help,
        }
    }

    /// All metrics, as they are now.
    fn render() -> String {
        let mut text = String::new();
        let version = [(env!("CARGO_PKG_VERSION"), 1)];
        gauge("build_info", "The version of nix-relay.").series(&mut text, "version", version);

        let bytes = [("in", BYTES_IN.get()), ("out", BYTES_OUT.get())];
        counter("bytes_total", "Payload from clients and to them.").series(
            &mut text,
            "direction",
            bytes,
        );
        let refreshes = [("ok", REFRESHED.get()), ("error", NOT_REFRESHED.get())];
        counter("jwks_refreshes_total", "Fetches of an issuer's keys.")
            .series(&mut text, "result", refreshes);
        let refusals = STATUSES.iter().zip(REFUSALS.iter().map(Counter::get));
        counter(
            "refusals_total",
            "Connections that got this status, and no session.",
        )
        .series(&mut text, "status", refusals);
        let ended = REASONS
            .iter()
            .map(|reason| (reason.name(), ENDED[*reason as usize].get()));
        counter("sessions_total", "Sessions that have ended, by why.")
            .series(&mut text, "reason", ended);

        gauge("sessions_active", "Sessions that have begun and not ended.").head(&mut text);
        let _ = writeln!(text, "nix_relay_sessions_active {}", SESSIONS_ACTIVE.get());
        render_lengths(&mut text);
        text
    }

    /// The histogram of how long sessions took.
    fn render_lengths(text: &mut String) {
        let help = "How long sessions took.";
        Metric {
            name: "session_seconds",
            kind: "histogram",
            help,
        }
        .head(text);

        let mut sessions = 0;
        for (index, count) in SESSIONS_BY_LENGTH.iter().enumerate() {
            sessions += count.get();
            let limit = BUCKETS_SECS
                .get(index)
                .map_or("+Inf".into(), u64::to_string);
            let _ = writeln!(
                text,
                "nix_relay_session_seconds_bucket{{le={limit:?}}} {sessions}"
            );
        }
        let sum = SESSION_MILLIS.get() as f64 / 1000.0;
        let _ = writeln!(text, "nix_relay_session_seconds_sum {sum}");
        let _ = writeln!(text, "nix_relay_session_seconds_count {sessions}");
    }

    /// How long to wait after a failure.
    const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
    /// When nothing has come from a scraper for this long, the kernel asks whether it is there.
    /// It gives up after twice as long.
    const KEEPALIVE: Duration = Duration::from_secs(30);
    const SEND_TIMEOUT: Duration = Duration::from_secs(1);
    /// How often to look for requests to a broken server, and whether another one has broken.
    const LIVENESS_CHECK: Duration = Duration::from_secs(1);
    type ServerError = Box<dyn Error + Send + Sync>;
    /// How many servers are kept for those who are connected to them.
    const MAX_SERVERS: usize = 64;

    /// Serves `/metrics` and `/healthz` for ever. tiny_http's accept thread ends with the first
    /// accept(2) that fails, and panics without telling anybody if there are no descriptors or
    /// threads; nor can a server start without a thread. So another server is started whenever
    /// one breaks. Those who are connected to a broken one are still answered.
    pub fn serve(listener: &TcpListener, is_draining: impl Fn() -> bool) {
        limit_silence(listener);
        let panicked = note_panics();
        let mut servers = VecDeque::new();

        loop {
            let serving = || {
                answer_waiting(servers.iter(), &is_draining);
                servers.push_front(start_server(listener)?);
                servers.truncate(MAX_SERVERS);
                serve_until_broken(&servers, &panicked, &is_draining)
            };
            if let Ok(Err(e)) = panic::catch_unwind(AssertUnwindSafe(serving)) {
                warn!("cannot serve metrics error={e:?}");
            }
            thread::sleep(SCARCITY_PAUSE);
        }
    }

    /// Returns a flag that is set when tiny_http's accept thread panics. That thread has no name.
    /// Those of its pool have none either, and may panic later, because of a lock that it held.
    fn note_panics() -> Arc<AtomicBool> {
        let panicked = Arc::new(AtomicBool::new(false));
        let (note, report) = (panicked.clone(), panic::take_hook());
        panic::set_hook(Box::new(move |panic| {
            let words = panic.payload_as_str().unwrap_or_default();
            if thread::current().name().is_none() && !words.contains("PoisonError") {
                note.store(true, Relaxed);
            }
            report(panic);
        }));
        panicked
    }

    /// Fails if there are no descriptors for the server and a connection, which would break it.
    fn start_server(listener: &TcpListener) -> Result<Server, ServerError> {
        let _spare = [listener.try_clone()?, listener.try_clone()?];
        Server::from_listener(listener.try_clone()?, None)
    }

    /// Returns when the first server accepts no more connections. The others are broken already.
    fn serve_until_broken(
        servers: &VecDeque<Server>,
        panicked: &AtomicBool,
        is_draining: &impl Fn() -> bool,
    ) -> Result<(), ServerError> {
        while !panicked.swap(false, Relaxed) {
            if let Some(request) = servers[0].recv_timeout(LIVENESS_CHECK)? {
                answer(request, is_draining());
            }
            answer_waiting(servers.iter().skip(1), is_draining);
        }
        Ok(())
    }

    fn answer_waiting<'a>(
        servers: impl Iterator<Item = &'a Server>,
        is_draining: &impl Fn() -> bool,
    ) {
        for server in servers {
            while let Ok(Some(request)) = server.try_recv() {
                answer(request, is_draining());
            }
        }
    }

    /// tiny_http would wait for ever for a scraper that has vanished. Its sockets inherit these
    /// options from the listener.
    fn limit_silence(listener: &TcpListener) {
        use rustix::net::sockopt;
        let _ = sockopt::set_socket_keepalive(listener, true);
        let _ = sockopt::set_tcp_keepidle(listener, KEEPALIVE);
        let _ = sockopt::set_tcp_keepintvl(listener, KEEPALIVE);
        let _ = sockopt::set_tcp_user_timeout(listener, 2 * KEEPALIVE.as_millis() as u32);
        // Nor may a scraper that does not read hold the thread that answers.
        let _ = sockopt::set_socket_timeout(listener, sockopt::Timeout::Send, Some(SEND_TIMEOUT));
    }

    fn answer(request: Request, is_draining: bool) {
        let is_get = matches!(request.method(), Method::Get | Method::Head);
        let path = request.url().split('?').next().unwrap_or_default();
        let (status, text) = match path {
            "/metrics" if is_get => (200, render()),
            "/healthz" if is_get && is_draining => (503, "draining\n".into()),
            "/healthz" if is_get => (200, "ok\n".into()),
            "/metrics" | "/healthz" => (405, "method not allowed on this path\n".into()),
            _ => (
                404,
                "there is nothing here; try /metrics or /healthz\n".into(),
            ),
        };

        let mut response = Response::from_string(text).with_status_code(status);
        if status == 405
            && let Ok(allow) = "Allow: GET, HEAD".parse::<Header>()
        {
            response.add_header(allow);
        }
        // A scraper that has left does not hear this.
        let _ = request.respond(response);
    }
}

/// Every wait for a client, a child or another thread uses this: poll(2), with a limit.
mod poll {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
    use std::io::{self, Read};
    use std::net::{Shutdown, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    /// Something that happens once, and that any number of threads can wait for: an eventfd(2)
    /// that is never read.
    pub struct Event {
        fd: OwnedFd,
        happened: AtomicBool,
    }

    impl Event {
        /// Fails without descriptors.
        pub fn new() -> io::Result<Event> {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Event {
                fd,
                happened: AtomicBool::new(false),
            })
        }

        /// Wakes everybody who waits now or later.
        pub fn set(&self) {
            self.happened.store(true, SeqCst);
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }

        pub fn is_set(&self) -> bool {
            self.happened.load(SeqCst)
        }

        /// To wait for this along with other things.
        pub fn poll_fd(&self) -> PollFd<'_> {
            PollFd::new(&self.fd, PollFlags::IN)
        }

        /// Waits for this alone, at most until `until`.
        pub fn wait(&self, until: Option<Instant>) {
            while !self.is_set() && until.is_none_or(|until| Instant::now() < until) {
                ready([Some(self.poll_fd())], until);
            }
        }
    }

    /// Waits until a descriptor is readable or broken. Returns false at the deadline, or
    /// earlier; callers loop.
    pub fn readable(fd: &impl AsFd, until: Instant) -> bool {
        let [ready] = ready([Some(PollFd::new(fd, PollFlags::IN))], Some(until));
        !ready.is_empty()
    }

    /// Waits until a descriptor is ready for its events or broken, at most until `until`.
    /// Returns what each one is ready for. May return early, for example on a signal; callers
    /// loop.
    pub fn ready<const N: usize>(
        fds: [Option<PollFd<'_>>; N],
        until: Option<Instant>,
    ) -> [PollFlags; N] {
        let mut polled: Vec<_> = fds.iter().flatten().cloned().collect();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());

        // This fails on a signal and when memory is short. Both pass.
        let _ = rustix::event::poll(&mut polled, timeout.as_ref());

        let mut answers = polled.iter().map(PollFd::revents);
        fds.map(|fd| {
            fd.and_then(|_| answers.next())
                .unwrap_or(PollFlags::empty())
        })
    }

    /// Ends our side of a connection, and waits at most `limit` for the peer to end its own.
    /// Reads what the peer still sends: if it were left unread, the kernel would send a reset,
    /// which can overtake our last words.
    pub fn linger(mut socket: &TcpStream, limit: Duration) {
        let until = Instant::now() + limit;
        let mut open = socket.shutdown(Shutdown::Write).is_ok();
        while open && Instant::now() < until {
            if readable(&socket, until) {
                open = socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0);
            }
        }
    }
}

/// What several modules need: requests to web servers, text for the log, locks.
mod util {
    use serde_json::Value;
    use std::io::{self, ErrorKind};
    use std::net::IpAddr;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::time::{Duration, Instant};
    use std::{env, fs};
    use ureq::http::{StatusCode, Uri, header};
    use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
    use ureq::{Agent, Proxy, ProxyProtocol};

    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    const MAX_DOCUMENT_BYTES: u64 = 1 << 20;
    /// The length of a text in the log that somebody else chose.
    const MAX_QUOTED_CHARS: usize = 256;
    /// The variables in which ureq looks for a proxy; the first that is set counts.
    const PROXY_VARIABLES: [&str; 6] = [
        "ALL_PROXY",
        "all_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
    ];

    /// Whether a URL is https, or http to this machine.
    pub fn is_https_or_loopback(url: &str) -> bool {
        let uri: Uri = url.parse().unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        match uri.scheme_str() {
            Some("https") => !host.is_empty(),
            Some("http") => is_loopback(host),
            _ => false,
        }
    }

    /// Whether a URL's host is this machine.
    pub fn is_loopback(host: &str) -> bool {
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        host == "localhost"
            || host.ends_with(".localhost")
            || address.is_ok_and(|address| address.is_loopback())
    }

    /// The certificates in SSL_CERT_FILE, if it is set. None stands for Mozilla's, which are
    /// compiled in. Fails with a message.
    pub fn trusted_roots() -> Result<Option<Vec<Certificate<'static>>>, String> {
        let Some(path) = env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        let unusable = |cause: &str| format!("SSL_CERT_FILE={}: {cause}", path.display());
        let pem = fs::read(&path).map_err(|e| unusable(&e.to_string()))?;

        let mut roots = Vec::new();
        for item in ureq::tls::parse_pem(&pem) {
            if let Ok(PemItem::Certificate(root)) = item {
                roots.push(root);
            }
        }
        if roots.is_empty() {
            return Err(unusable("there is no certificate in it"));
        }
        Ok(Some(roots))
    }

    /// The proxy for https, as ureq reads it from the environment: ALL_PROXY, HTTPS_PROXY or
    /// HTTP_PROXY, in this order, and NO_PROXY. Fails with a message if one of them cannot be
    /// used.
    pub fn proxy_from_env() -> Result<Option<Proxy>, String> {
        for name in PROXY_VARIABLES {
            let url = env::var(name).unwrap_or_default();
            let is_http = |proxy: Proxy| proxy.protocol() == ProxyProtocol::Http;
            if !url.is_empty() && !Proxy::new(&url).is_ok_and(is_http) {
                return Err(format!(
                    "{name}: expected a proxy as http://HOST:PORT, or nothing"
                ));
            }
        }
        Ok(Proxy::try_from_env())
    }

    /// For requests to `url`. Uses no proxy for this machine, follows no redirects and keeps no
    /// connections. Fails with a message if the environment holds something that cannot be used.
    pub fn web_agent(url: &str) -> Result<Agent, String> {
        let uri: Uri = url.parse().unwrap_or_default();
        let proxy = if is_loopback(uri.host().unwrap_or_default()) {
            None
        } else {
            proxy_from_env()?
        };
        let roots = match trusted_roots()? {
            Some(roots) => roots.into(),
            None => RootCerts::WebPki,
        };

        let config = Agent::config_builder()
            .proxy(proxy)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .max_redirects(0)
            .max_idle_connections(0)
            .http_status_as_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("nix-relay/", env!("CARGO_PKG_VERSION")));
        Ok(config.build().new_agent())
    }

    /// The JSON at a URL. Fails with a message that names the URL.
    pub fn get_json(url: &str, deadline: Instant) -> Result<Value, String> {
        get(url, deadline).map_err(|e| format!("{url}: {e}"))
    }

    fn get(url: &str, deadline: Instant) -> Result<Value, String> {
        let left = deadline.saturating_duration_since(Instant::now());
        let request = web_agent(url)?
            .get(url)
            .config()
            .timeout_global(Some(left))
            .build();
        let mut answer = request.call().map_err(|e| e.to_string())?;

        let header = |name| {
            let value = answer
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let (status, coding) = (answer.status(), header(header::CONTENT_ENCODING));
        let content_type = header(header::CONTENT_TYPE);
        if status.is_redirection() {
            let target = header(header::LOCATION);
            return Err(format!(
                "status {status}, a redirect to {target:?}, which is not followed"
            ));
        }
        if status != StatusCode::OK {
            return Err(format!("status {status}"));
        }
        if !coding.is_empty() && coding != "identity" {
            return Err(format!(
                "Content-Encoding {coding:?}, though identity was asked for"
            ));
        }

        let body = answer
            .body_mut()
            .with_config()
            .limit(MAX_DOCUMENT_BYTES)
            .read_to_vec();
        let body = body.map_err(|e| e.to_string())?;
        parse_json(&body).map_err(|e| format!("not JSON, with Content-Type {content_type:?}: {e}"))
    }

    /// Parses JSON, after a byte order mark if there is one (RFC 8259, section 8.1).
    pub fn parse_json(text: &[u8]) -> serde_json::Result<Value> {
        serde_json::from_slice(text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text))
    }

    /// Prepares a text for the log that a client or an issuer chose: quoted, escaped and cut short.
    pub fn quoted(text: &str) -> String {
        format!(
            "{:?}",
            text.chars().take(MAX_QUOTED_CHARS).collect::<String>()
        )
    }

    /// Removes terminal escapes (ECMA-48) and other control characters.
    pub fn without_escapes(text: &str) -> String {
        let mut plain = String::new();
        let mut chars = text.chars().peekable();
        while let Some(char) = chars.next() {
            match (char, chars.peek()) {
                // A control sequence ends with a letter or similar,
                ('\u{1b}', Some('[')) => {
                    chars.next();
                    chars.find(|char| ('@'..='~').contains(char));
                }
                // an operating system command with BEL or another escape,
                ('\u{1b}', Some(']')) => {
                    chars.find(|char| ['\u{7}', '\u{1b}'].contains(char));
                    chars.next_if_eq(&'\\');
                }
                // and everything else with the first character that is not an intermediate.
                ('\u{1b}', _) => {
                    chars.find(|char| !(' '..='/').contains(char));
                }
                _ if char.is_control() && char != '\t' => {}
                _ => plain.push(char),
            }
        }
        plain
    }

    /// What a system error says, without its number.
    pub fn system_words(e: &io::Error) -> String {
        match e.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "connection reset".into(),
            ErrorKind::UnexpectedEof => "the connection was closed".into(),
            _ => {
                let words = e.to_string().to_lowercase();
                words.split(" (os error").next().unwrap_or_default().into()
            }
        }
    }

    pub fn secs(secs: impl Into<u32>) -> Duration {
        Duration::from_secs(secs.into().into())
    }

    /// A panic elsewhere must not cause another here. What these locks protect is valid at any
    /// time.
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

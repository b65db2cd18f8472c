//! nix-relay carries the Nix worker protocol from a WebSocket to a fresh `nix-daemon --stdio`,
//! for every caller whose OIDC token the configuration allows. The modules stand in the order in
//! which a reader needs them, and each one uses only those below it:
//!
//! ```text
//!  accept ─► http ─► oidc ─► policy ─► permit ─► session ─────────► end
//!            head    who is  may       may they  nix-daemon spawned,  child reaped, permit
//!            in      it?     they?     now?      101, bytes both ways back, one log line
//!            └── an answer of one line where a step says no ──┘
//! ```
//!
//! Each connection has a thread, and each session has two more, which copy. `nix-relay --stdio`,
//! which an unchanged nix runs in place of ssh, is in client.rs; it uses `copy` and what is below,
//! and `fail`.
#![forbid(unsafe_code)]

mod client;

use config::{Config, Server, secs};
use connection::{Port, Relay};
use log::{Level, error, info, warn};
use oidc::Issuers;
use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{PidfdFlags, geteuid, getpid, pidfd_open};
use sd_notify::NotifyState;
use session::Daemon;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{env, thread};
use systemd_journal_logger::connected_to_journal;

const USAGE: &str = "\
usage: nix-relay [--check] [CONFIG.toml]    the relay (or NIX_RELAY_CONFIG=CONFIG.toml)
       nix-relay --stdio                    its client, which Nix runs; see README.md
Carries the Nix worker protocol from a WebSocket to nix-daemon, for callers with an OIDC token.
  --check    validate the configuration, print it as it is in effect, and exit
  --help     print this, and exit
  --version  print the version, and exit
";
const VERSION: &str = concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n");

/// How many new connections may wait to be accepted. Once they are more, the kernel drops what
/// comes, and a client tries again only a second later. std would set 128.
const BACKLOG: i32 = 4096;

/// How long sessions may take to end after the grace: a Close, their children, a line in the log.
const SHUTDOWN_TIMEOUT: Duration = session::TERMINATION_TIME.saturating_add(Duration::from_secs(4));

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into())
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();

    match arguments[..] {
        ["--help"] => print(USAGE),
        ["--version"] => print(VERSION),
        ["--stdio"] => client::run(),
        // Nix passes this for a store of ssh://.
        ["--serve", ..] => fail(1, client::WRONG_STORE),
        ["--check"] => check(None),
        ["--check", path] | [path, "--check"] if !path.starts_with('-') => check(Some(path)),
        [] => relay(None),
        [path] if !path.starts_with('-') => relay(Some(path)),
        _ => fail(2, &format!("unexpected arguments: {arguments:?}\n{USAGE}")),
    }
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Says why on standard error, if there is somebody to read it. Returns the status to exit with.
fn fail(status: u8, text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "nix-relay: {}", text.trim_end());
    ExitCode::from(status)
}

/// `nix-relay --check`. It does not listen, ask an issuer or open a key file, so it also works
/// on another machine than the relay's.
fn check(path: Option<&str>) -> ExitCode {
    for warning in config::warnings() {
        fail(0, &format!("warning: {warning}"));
    }
    match config::load(path) {
        Ok(config) => print(&config.effective),
        Err(e) => fail(2, &e),
    }
}

/// Runs the relay until it is told to stop and all sessions have ended or the grace is over.
fn relay(path: Option<&str>) -> ExitCode {
    let loaded = config::load(path);
    let (issuers, config) = match loaded.and_then(|config| Ok((Issuers::new(&config)?, config))) {
        Ok(loaded) => loaded,
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

    if connected_to_journal() {
        logger.format(|to, record| {
            let priority = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                _ => 6,
            };
            writeln!(to, "<{priority}>{}", record.args())
        });
    }
    logger.init();
}

/// Warns of what will harm sessions, and of rights that they do not need.
fn warn_of_surroundings(config: &Config) {
    if getpid().is_init() {
        warn!("running as PID 1, which does not reap orphans: start the container with --init");
    }
    if geteuid().is_root() {
        warn!("running as root: a user of its own is enough");
    }
    if access(DAEMON_SOCKET, Access::WRITE_OK) == Err(Errno::ACCESS) {
        warn!("{DAEMON_SOCKET} is closed to this user: add it to that file's group");
    }
    // Dropped, and so killed, at once.
    if let Err(answer) = Daemon::spawn(config, &config.daemon.extra_args) {
        warn!(
            "if it stays so, each session will be answered {}{}",
            answer.status.0, answer.cause
        );
    }
}

/// Where Nix's own daemon listens, which `nix-daemon --stdio` forwards to unless it is root.
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// Runs until the relay is told to stop and all sessions have ended or the grace is over. Fails
/// if it cannot start.
fn serve(config: Config, issuers: Issuers) -> io::Result<()> {
    let refused = "pidfd_open(2), of Linux 5.3, is refused; does a seccomp profile forbid it";
    let itself = pidfd_open(getpid(), PidfdFlags::empty());
    itself.map_err(|e| io::Error::other(format!("{refused}: {e}")))?;
    metrics::BUILD_INFO.add(env!("CARGO_PKG_VERSION"), 1);

    let ports = ports(&config.server)?;
    warn_of_surroundings(&config);
    let grace = secs(config.server.shutdown_grace_secs);
    let relay = Arc::new(Relay::new(config, issuers)?);
    watch_signals(relay.clone())?;
    relay.issuers.start()?;
    for port in ports {
        connection::start(relay.clone(), port)?;
    }

    let _ = sd_notify::notify(&[NotifyState::Ready]);
    while !relay.draining.is_set() {
        poll::ready([relay.draining.poll_fd()], None);
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("shutting down grace_secs={}", grace.as_secs());
    relay.wait_for_guests(grace, true);
    relay.closing.set();
    let left = relay.wait_for_guests(SHUTDOWN_TIMEOUT, false);
    info!("shut down connections_left={left}");
    Ok(())
}

/// Stops the relay on SIGTERM, SIGINT and SIGHUP. Watches SIGCHLD only so that it is not ignored:
/// if the program that started us ignores it, so would we, and the kernel would reap our children
/// (waitpid(2)).
fn watch_signals(relay: Arc<Relay>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGCHLD])?;
    let watch = move || {
        let stops = signals.forever().filter(|signal| *signal != SIGCHLD);
        stops.for_each(|_| relay.stop());
    };
    thread::Builder::new().name("signals".into()).spawn(watch)?;
    Ok(())
}

/// Everything that we listen on.
fn ports(server: &Server) -> io::Result<Vec<Arc<Port>>> {
    let mut ports = passed_ports()?;
    if ports.is_empty() {
        ports.push(Port::new(listen(&server.listen)?, connection::RELAY));
    }
    if !server.admin_listen.is_empty() {
        ports.push(Port::new(listen(&server.admin_listen)?, connection::ADMIN));
    }
    Ok(ports)
}

fn listen(address: &str) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).and_then(|listener| {
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(listener)
    });
    listener.map_err(|e| io::Error::other(format!("cannot listen on {address}: {e}")))
}

/// The sockets that systemd listens on for us, if it does (sd_listen_fds(3)). Fails if one of
/// them is something else.
fn passed_ports() -> io::Result<Vec<Arc<Port>>> {
    let mut passed = listenfd::ListenFd::from_env();
    let mut ports = Vec::new();
    for index in 0..passed.len() {
        let socket = passed.take_tcp_listener(index).ok().flatten();
        let listener = socket.filter(|socket| socket_acceptconn(socket) == Ok(true));
        let listener = listener.ok_or_else(|| io::Error::other(EXPECTED_FDS))?;
        listener.set_nonblocking(true)?;
        ports.push(Port::new(listener, connection::PASSED));
    }
    Ok(ports)
}

const EXPECTED_FDS: &str =
    "LISTEN_FDS: expected only TCP sockets that listen (ListenStream=HOST:PORT, Accept=no)";

/// The states of a connection, from its first byte to a session or a refusal, each with a limit
/// in time and in number. A connection has exactly one `State`: in the lobby of its listener we
/// wait for the client, or verify its token; then it is a guest, and takes no place from those
/// whose request is being read. Promises that a permit is always given back, and that nothing but a
/// shutdown ends an accept loop.
///
/// | state | type | limit in time | limit in number; beyond it |
/// | --- | --- | --- | --- |
/// | reading the head | `Lobby` | `handshake_timeout_secs` | `MAX_LOBBY` a port; the oldest goes |
/// | hearing a refusal | `Lobby` | `LINGER` | as above, among the same |
/// | waiting for keys | `Guest` | `KEYS_TIMEOUT` | `MAX_WAITING` an issuer; 503 at once |
/// | waiting for a permit | `Guest` | `queue_timeout_secs` | `MAX_QUEUE` a rule; 503 at once |
/// | session | `Guest`, `Permit` | `timeout_secs` | `max_connections`; waits, as above |
/// | end of a session | `Guest`, `Permit` | `TERMINATION_TIME`, `TAIL_TIMEOUT` | as above |
mod connection {
    use crate::config::{Config, Rule, secs};
    use crate::http::{self, Answer, Head, Status};
    use crate::metrics::{self, Count};
    use crate::oidc::{self, Identity, Issuers, Verdict};
    use crate::policy;
    use crate::poll::{self, Event, Permit, Semaphore, lock};
    use crate::session::{self, Daemon};
    use crate::text::quoted;
    use log::{info, warn};
    use rustix::event::{PollFd, PollFlags};
    use std::collections::VecDeque;
    use std::io::{self, ErrorKind};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
    use std::sync::{Arc, Mutex, Weak};
    use std::thread;
    use std::time::{Duration, Instant};

    const NOTHING: &str = "there is nothing here; the relay is at /relay, and its metrics are at \
        /metrics of server.admin_listen";
    const MAX_LOBBY: usize = 256;
    const MAX_QUEUE: u64 = 64;
    /// How long a token may wait for its issuer's keys. With `queue_timeout_secs` after that, a
    /// client has its answer within 40 seconds.
    const KEYS_TIMEOUT: Duration = Duration::from_secs(8);
    /// How long sending an answer may take. Any socket has room for one.
    const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
    /// How long a client may take to read its answer.
    const LINGER: Duration = Duration::from_secs(1);
    /// How long to wait before trying again when descriptors or threads have run out.
    const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
    /// How often to look for a seat in a full lobby. Somebody who must go mostly does so at once.
    const LOBBY_CHECK: Duration = Duration::from_millis(2);
    /// How often to look whether the guests have left, while we drain.
    const GUESTS_CHECK: Duration = Duration::from_millis(20);

    /// What every connection needs.
    pub struct Relay {
        config: Config,
        pub issuers: Issuers,
        permits: Semaphore,
        /// The permits of each rule.
        own_permits: Vec<Semaphore>,
        /// How many wait for a permit of each rule.
        waiting: Vec<Count>,
        /// Each guest has a clone of this. Guests are the connections that are past the lobby:
        /// they wait for keys or a permit, or have a session. Only they hold up a shutdown.
        guests: Arc<()>,
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
            let most = config.daemon.max_connections.into();
            metrics::SESSIONS_LIMIT.count().add(u64::from(most));
            let own = |rule: &Rule| Semaphore::new(rule.max_connections.into());
            Ok(Relay {
                permits: Semaphore::new(most)?,
                own_permits: config.rules.iter().map(own).collect::<Result<_, _>>()?,
                waiting: config.rules.iter().map(|_| Count::new()).collect(),
                config,
                issuers,
                guests: Arc::default(),
                sessions: AtomicU64::new(0),
                draining: Event::new()?,
                closing: Event::new()?,
            })
        }

        /// To be called for each signal to stop. The first one stops new sessions, the second
        /// one ends those that run.
        pub fn stop(&self) {
            if self.draining.is_set() {
                self.closing.set();
            }
            self.draining.set();
        }

        /// Waits until no guest is left, but at most for `limit`. A grace ends before that if the
        /// sessions must end. Returns how many guests are left.
        pub fn wait_for_guests(&self, limit: Duration, is_grace: bool) -> usize {
            let until = Instant::now() + limit;
            loop {
                let guests = Arc::strong_count(&self.guests) - 1;
                let is_over = Instant::now() >= until || is_grace && self.closing.is_set();
                if guests == 0 || is_over {
                    return guests;
                }
                thread::sleep(GUESTS_CHECK);
            }
        }
    }

    /// Starts to accept connections. Fails if there are no threads.
    pub fn start(relay: Arc<Relay>, port: Arc<Port>) -> io::Result<()> {
        let address = port.listener.local_addr()?;
        info!("{} listening address={address}", port.service.name);
        let accepting = thread::Builder::new().spawn(|| port.accept(relay));
        accepting.map(drop)
    }

    /// What a listener serves.
    pub struct Service {
        name: &'static str,
        /// Whether systemd has passed it to us. Then new connections wait in it for the next
        /// relay while we drain, and none is refused.
        is_passed: bool,
        routes: [Route; 2],
    }

    pub const RELAY: Service = Service {
        name: "relay",
        is_passed: false,
        routes: [HEALTH, ("/relay", &["GET"], http::ONLY_GET)],
    };
    pub const PASSED: Service = Service {
        is_passed: true,
        ..RELAY
    };
    pub const ADMIN: Service = Service {
        name: "admin",
        is_passed: false,
        routes: [HEALTH, METRICS],
    };

    /// A path, its methods, and the answer to another method.
    type Route = (&'static str, &'static [&'static str], Status);
    const HEALTH: Route = ("/healthz", &["GET", "HEAD"], http::ONLY_GET_OR_HEAD);
    const METRICS: Route = ("/metrics", &["GET", "HEAD"], http::ONLY_GET_OR_HEAD);

    /// A listener, and those of its connections that are in the lobby.
    pub struct Port {
        listener: TcpListener,
        service: Service,
        /// The seats in the lobby, the oldest first.
        lobby: Mutex<VecDeque<Weak<Seat>>>,
    }

    impl Port {
        pub fn new(listener: TcpListener, service: Service) -> Arc<Port> {
            Arc::new(Port {
                listener,
                service,
                lobby: Mutex::default(),
            })
        }

        /// Hands every connection to a thread of its own. Returns only with a listener that was
        /// passed to us, once we drain.
        fn accept(self: Arc<Port>, relay: Arc<Relay>) {
            for number in 1_u64.. {
                if self.service.is_passed {
                    let connection = poll::input(&self.listener);
                    poll::ready([connection, relay.draining.poll_fd()], None);
                    if relay.draining.is_set() {
                        return;
                    }
                }
                let (socket, peer) = match self.listener.accept() {
                    Ok((socket, peer)) => (Arc::new(socket), peer.to_string()),
                    // Another relay was faster.
                    Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
                    Err(e) => {
                        warn!("cannot accept error={e:?}");
                        thread::sleep(SCARCITY_PAUSE);
                        continue;
                    }
                };
                let _ = socket.set_write_timeout(Some(ANSWER_TIMEOUT));
                let _ = socket.set_nodelay(true);

                let connection = Connection {
                    relay: relay.clone(),
                    port: self.clone(),
                    state: State::Lobby(self.enter(&socket)),
                    socket: socket.clone(),
                    peer: peer.clone(),
                };
                let thread = thread::Builder::new().name(format!("connection {number}"));
                if let Err(e) = thread.spawn(|| connection.serve()) {
                    let answer = busy().because(e);
                    log_refusal(&peer, &answer);
                    let _ = answer.send(&socket, true);
                    thread::sleep(SCARCITY_PAUSE);
                }
            }
        }

        /// Waits for a seat in the lobby. If there is none, the connection that has been waited
        /// for longest must go, so that silent clients keep nobody out. Connections that are
        /// being verified leave in a moment.
        fn enter(&self, socket: &Arc<TcpStream>) -> Arc<Seat> {
            loop {
                let mut lobby = lock(&self.lobby);
                lobby.retain(|seat| seat.strong_count() > 0);
                if lobby.len() < MAX_LOBBY {
                    let seat = Arc::new(Seat {
                        socket: socket.clone(),
                        is_waited_for: AtomicBool::new(true),
                    });
                    lobby.push_back(Arc::downgrade(&seat));
                    return seat;
                }
                let mut seats = lobby.iter().filter_map(Weak::upgrade);
                if let Some(longest) = seats.find(|seat| seat.stop_waiting()) {
                    // Its thread then reads end of file, answers, and leaves.
                    let _ = longest.socket.shutdown(Shutdown::Read);
                }
                drop(lobby);
                thread::sleep(LOBBY_CHECK);
            }
        }
    }

    /// A seat in the lobby. It is free when this is dropped.
    struct Seat {
        socket: Arc<TcpStream>,
        /// Whether we wait for the client, who may then have to go.
        is_waited_for: AtomicBool,
    }

    impl Seat {
        /// Returns false if we do not wait for the client now.
        fn stop_waiting(&self) -> bool {
            self.is_waited_for.swap(false, Relaxed)
        }
    }

    enum State {
        Lobby(Arc<Seat>),
        Guest { _counted: Arc<()> },
    }

    fn busy() -> Answer {
        Answer::new(http::RETRY_LATER, "the relay is busy; try again later")
    }

    fn full() -> Answer {
        Answer::new(http::FULL, "all sessions are in use; try again later")
    }

    fn log_refusal(peer: &str, answer: &Answer) {
        let status = answer.status.0;
        metrics::REFUSALS.add(&status.to_string(), 1);
        let reason = quoted(&format!("{}{}", answer.line, answer.cause));
        info!("refused peer={peer} status={status} reason={reason}");
    }

    /// One client, until it is served or refused.
    struct Connection {
        relay: Arc<Relay>,
        port: Arc<Port>,
        state: State,
        socket: Arc<TcpStream>,
        /// For the log: the client's address, and what a proxy says about it.
        peer: String,
    }

    impl Connection {
        /// Serves the connection from its first byte to its last.
        fn serve(mut self) {
            let timeout = secs(self.relay.config.server.handshake_timeout_secs);
            let head = Head::read(&self.socket, Instant::now() + timeout);
            if let State::Lobby(seat) = &self.state
                && !seat.stop_waiting()
            {
                return self.answer(&busy().because("too many connections wait"), true);
            }

            let mut with_body = true;
            let served = match head {
                Ok(None) => return,
                Ok(Some(head)) => {
                    with_body = head.request.method() != "HEAD";
                    self.peer += &head.forwarded_for().unwrap_or_default();
                    self.route(head)
                }
                Err(answer) => Err(answer),
            };
            if let Err(answer) = served {
                self.answer(&answer, with_body);
            }
        }

        /// Ok after a session. Any other answer is an `Err`, 200 included.
        fn route(&mut self, head: Head) -> Result<(), Answer> {
            head.check_host()?;
            let path = head.request.uri().path();
            let mut routes = self.port.service.routes.iter();
            let route = routes.find(|(known, ..)| *known == path);
            let Some(&(path, methods, other)) = route else {
                return Err(Answer::new(http::NOT_FOUND, NOTHING));
            };
            if !methods.contains(&head.request.method().as_str()) {
                return Err(Answer::new(other, "method not allowed on this path"));
            }
            Err(match path {
                "/relay" => return self.open_session(head),
                "/metrics" => Answer::new(http::OK, metrics::render().trim_end()),
                _ if self.relay.draining.is_set() => Answer::new(http::DRAINING, "draining"),
                _ => Answer::new(http::OK, "ok"),
            })
        }

        /// Takes the client through the steps of the picture at the top of this file. Returns when
        /// the session is over.
        fn open_session(&mut self, head: Head) -> Result<(), Answer> {
            let relay = self.relay.clone();
            let upgrade = head.upgrade_response()?;
            let identity = self.verify(&relay.issuers, &head.token()?)?;
            let grant = policy::authorize(&relay.config.rules, &identity)?;
            let _permits = self.wait_for_permits(grant.rule)?;

            let daemon = Daemon::spawn(&relay.config, grant.arguments)?;
            let opening = session::Opening {
                number: relay.sessions.fetch_add(1, Relaxed) + 1,
                client: format!("peer={} {}", self.peer, grant.description),
                upgrade,
                compressed: head.protocol() == http::COMPRESSED,
                rest: head.rest,
            };
            let served = session::run(&relay.config, opening, &self.socket, daemon, &relay.closing);
            served.map_err(|e| busy().because(e))
        }

        /// Verifies a token, and waits for newer keys if it needs them.
        fn verify(&mut self, issuers: &Issuers, token: &str) -> Result<Identity, Answer> {
            let came = Instant::now();
            let until = came + KEYS_TIMEOUT;
            loop {
                let (fetched, _place) = match issuers.verify(token, came)? {
                    Verdict::Verified(identity) => return Ok(identity),
                    Verdict::NeedsKeys(fetched, place) => (fetched, place),
                };
                if Instant::now() >= until {
                    return Err(oidc::no_keys("they did not come in time"));
                }
                self.wait_for(fetched.poll_fd(), until)?;
            }
        }

        /// Waits for a permit of the rule, and for one of the relay.
        fn wait_for_permits(&mut self, rule: usize) -> Result<Vec<Permit>, Answer> {
            let relay = self.relay.clone();
            let too_many = || full().because("too many wait already");
            let _place = relay.waiting[rule].enter(MAX_QUEUE).ok_or_else(too_many)?;
            let _counted = metrics::SESSIONS_WAITING.count().enter(u64::MAX);

            let until = Instant::now() + secs(relay.config.daemon.queue_timeout_secs);
            let mut taken = Vec::new();
            for permits in [&relay.own_permits[rule], &relay.permits] {
                taken.push(loop {
                    self.wait_for(permits.poll_fd(), until)?;
                    if let Some(permit) = permits.take() {
                        break permit;
                    }
                    if Instant::now() >= until {
                        return Err(full());
                    }
                });
            }
            Ok(taken)
        }

        /// Leaves the lobby, and waits until a descriptor is readable, at most until `until`.
        /// Fails if the client leaves or the relay drains.
        fn wait_for(&mut self, fd: PollFd, until: Instant) -> Result<(), Answer> {
            let draining = &self.relay.draining;
            // While we drain, nobody becomes a guest: that would hold up the shutdown.
            if !draining.is_set() {
                self.state = State::Guest {
                    _counted: self.relay.guests.clone(),
                };
            }
            let socket = PollFd::new(&self.socket, PollFlags::RDHUP);
            let [_, hangup, _] = poll::ready([fd, socket, draining.poll_fd()], Some(until));
            if draining.is_set() {
                return Err(Answer::new(
                    http::RETRY_LATER,
                    "the relay is shutting down; try again later",
                ));
            }
            if !hangup.is_empty() {
                return Err(Answer::new(
                    http::CLIENT_LEFT,
                    "the client left while it waited",
                ));
            }
            Ok(())
        }

        /// Sends an answer, and waits in the lobby until the client has read it. We do not wait for
        /// a guest: a client should send nothing before its answer, and then nothing unread causes
        /// a reset.
        fn answer(&mut self, answer: &Answer, with_body: bool) {
            if answer.status.0 >= 400 {
                log_refusal(&self.peer, answer);
            }
            let sent = answer.send(&self.socket, with_body);
            if let State::Lobby(seat) = &self.state
                && sent.is_ok()
            {
                seat.is_waited_for.store(true, Relaxed);
                poll::linger(&self.socket, LINGER);
            }
        }
    }
}

/// May the caller do this: checks a verified identity against the rules. Pure: it touches
/// nothing else. Promises that a caller who matches no rule gets nothing.
mod policy {
    use crate::config::{Rule, values};
    use crate::http::{self, Answer};
    use crate::oidc::Identity;
    use crate::text::quoted;
    use regex_lite::Regex;
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
        let claims = &identity.claims;
        let mut nearest = usize::MAX;
        let mut why = "none is for its issuer and audience".to_owned();
        for (index, rule) in rules.iter().enumerate() {
            let audience = rule.audience.as_str().into();
            if rule.issuer != identity.issuer || !values(&claims["aud"]).contains(&audience) {
                continue;
            }
            let wrong = wrong_claims(rule, claims);
            let Some(name) = wrong.first() else {
                return Ok(Grant {
                    rule: index,
                    arguments: &rule.extra_args,
                    description: describe(rule, claims),
                });
            };
            if wrong.len() < nearest {
                nearest = wrong.len();
                why = match claim(claims, name) {
                    Value::Null => format!("{name} is missing"),
                    value => format!(
                        "{name} is {}",
                        quoted(&text(value).unwrap_or(value.to_string()))
                    ),
                };
            }
        }
        let line = format!("the token is valid, but no rule allows it: {why}");
        Err(Answer::new(http::FORBIDDEN, &line))
    }

    fn describe(rule: &Rule, claims: &Value) -> String {
        let mut description = format!("rule={}", quoted(&rule.name));
        for name in LOGGED_CLAIMS {
            if let Some(value) = text(&claims[name]) {
                description += &format!(" {name}={}", quoted(&value));
            }
        }
        description
    }

    /// The value of a claim, or of a member of a claim, if the name is a JSON pointer (RFC 6901).
    /// Null if it is not there.
    fn claim<'a>(claims: &'a Value, name: &str) -> &'a Value {
        if name.starts_with('/') {
            claims.pointer(name).unwrap_or(&Value::Null)
        } else {
            &claims[name]
        }
    }

    /// The claims that do not match what the rule binds them to.
    fn wrong_claims<'a>(rule: &'a Rule, claims: &Value) -> Vec<&'a str> {
        let bound = rule.bound_claims.iter();
        let wrong = bound.filter(|(name, patterns)| !fits(patterns, claim(claims, name)));
        wrong.map(|(name, _)| name.as_str()).collect()
    }

    /// Whether the claim's value, or one of its values, matches one of the patterns.
    fn fits(patterns: &[Regex], claim: &Value) -> bool {
        let mut values = values(claim).iter().filter_map(text);
        values.any(|value| patterns.iter().any(|pattern| pattern.is_match(&value)))
    }

    /// A string as it is, a number or a boolean as JSON prints it, and nothing else.
    fn text(value: &Value) -> Option<String> {
        match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
            _ => None,
        }
    }
}

/// Who is calling: verifies a token with its issuer's keys, and returns its claims. Fetches keys
/// from the issuers (OpenID Connect Discovery 1.0, RFC 7517), or reads them from files. Promises
/// that an `Identity` exists only after the signature, issuer, audience and times of its token
/// were checked (RFC 7519, RFC 8725), that a token is only checked with the keys of the issuer
/// that it names, that a token whose key is cached never waits, and that this module never
/// passes a token on, not even to the log.
mod oidc {
    use crate::config::{Config, secs};
    use crate::http::{self, Answer};
    use crate::metrics::{self, Count, Entered};
    use crate::poll::{self, Event, lock};
    use crate::text::{quoted, without_escapes};
    use crate::web;
    use jwt_simple::JWTError;
    use jwt_simple::prelude::*;
    use log::{info, warn};
    use serde_json::Value;
    use std::collections::{BTreeMap, HashSet};
    use std::error::Error;
    use std::panic::{self, AssertUnwindSafe};
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};
    use std::{fmt, fs, io, thread};
    use ureq::unversioned::resolver::DefaultResolver;

    /// How far the issuer's clock and ours may differ.
    const CLOCK_SKEW_SECS: u64 = 60;
    /// How many tokens may wait for the keys of one issuer.
    const MAX_WAITING: u64 = 64;
    /// Keys that could not be refreshed for this long are no longer trusted.
    const MAX_KEY_AGE: Duration = Duration::from_secs(24 * 3600);
    /// How long after a failure to try again if no token asks.
    const RETRY_PAUSE: Duration = Duration::from_secs(30);
    /// The least time between two fetches that tokens ask for: anybody can write one that does.
    const FETCH_INTERVAL: Duration = Duration::from_secs(3);
    /// How often to read a key file.
    const FILE_CHECK: Duration = Duration::from_secs(5);
    /// How many keys of one name are tried for a token.
    const MAX_TRIED: usize = 4;

    /// A verified caller.
    pub struct Identity {
        pub issuer: String,
        /// A JSON object.
        pub claims: Value,
    }

    type Verify = dyn Fn(&str, &VerificationOptions) -> Result<(), jwt_simple::Error> + Send + Sync;

    /// A published key. The key decides on the algorithm, never the token.
    pub(crate) struct Key {
        id: Option<String>,
        /// One for each algorithm that the key may be used with. An RSA key that does not say
        /// has several.
        verifiers: Vec<Box<Verify>>,
    }

    impl Key {
        /// Returns None if the key is of an unknown kind, too weak, or not for signatures.
        pub(crate) fn parse(jwk: &Value) -> Option<Key> {
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
        let keys = set["keys"].as_array().into_iter().flatten();
        let keys: Vec<Key> = keys.filter_map(Key::parse).collect();
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
        /// A JSON object.
        claims: Value,
    }

    impl Token<'_> {
        fn parse(text: &str) -> Result<Token<'_>, String> {
            let mut parts = text.split('.').map_while(object);
            let (Some(header), Some(claims)) = (parts.next(), parts.next()) else {
                return Err("it is not a signed JSON Web Token".into());
            };
            if header.get("crit").is_some() {
                return Err("it has a critical extension, and this relay knows none".into());
            }
            // jwt-simple would accept a token without it.
            if !claims["exp"].is_number() {
                return Err("exp is missing or not a number".into());
            }
            // Its own message would not name the claim.
            for name in ["sub", "jti", "nonce"] {
                if !claims[name].is_null() && !claims[name].is_string() {
                    return Err(format!("{name} is not a text"));
                }
            }
            let key_id = header.get("kid").and_then(Value::as_str).map(String::from);
            Ok(Token {
                text,
                key_id,
                claims,
            })
        }
    }

    /// The members of a JSON object, in their order.
    #[derive(Deserialize)]
    struct Members(#[serde(with = "tuple_vec_map")] Vec<(String, Value)>);

    /// The JSON object in one part of a token. One that has a name twice at its top level is
    /// refused: other programs may read the first where we read the last (RFC 7519, section 4).
    fn object(part: &str) -> Option<Value> {
        let json = Base64UrlSafeNoPadding::decode_to_vec(part, None).ok()?;
        let Members(members) = serde_json::from_slice(&json).ok()?;
        let count = members.len();
        let object: Value = members.into_iter().collect();
        (object.as_object()?.len() == count).then_some(object)
    }

    /// What the cached keys say of a token.
    pub enum Verdict<'a> {
        Verified(Identity),
        /// The key that it names is not among them, or has been replaced by another of that name.
        /// Newer keys have been asked for. The event comes when they have been fetched, or could
        /// not be; the token has a place among those that wait.
        NeedsKeys(Arc<Event>, Entered<'a>),
    }

    fn invalid_token(why: &str) -> Answer {
        // It may have words of the token in it.
        let line = &format!("the token does not verify: {why}");
        Answer::new(http::INVALID_TOKEN, &without_escapes(line))
    }

    /// The token may be good, and the keys to tell are missing.
    pub fn no_keys(cause: impl fmt::Display) -> Answer {
        Answer::new(http::RETRY_LATER, NO_KEYS).because(cause)
    }

    /// Why a token does not verify.
    enum Rejection {
        Final(String),
        /// With other keys it could.
        WithTheseKeys(String),
    }

    const NO_EVENTS: &str = "eventfd(2) fails; does a seccomp profile forbid it";
    const NO_KEYS: &str = "the issuer's keys are unavailable; try again later";
    const NO_KEY: &str = "no matching key in the issuer's key set";

    /// All issuers that are trusted.
    pub struct Issuers(pub(crate) Vec<Arc<Issuer>>);

    impl Issuers {
        /// The issuers of all rules. Fails with a message if a key file cannot be used, and
        /// without descriptors.
        pub fn new(config: &Config) -> Result<Issuers, String> {
            let mut audiences = BTreeMap::<&String, HashSet<String>>::new();
            for rule in &config.rules {
                let audiences = audiences.entry(&rule.issuer).or_default();
                audiences.insert(rule.audience.clone());
            }

            let mut issuers = Vec::new();
            for (url, audiences) in audiences {
                let ttl = secs(config.auth.jwks_cache_ttl_secs);
                let source = config
                    .auth
                    .jwks_files
                    .get(url)
                    .cloned()
                    .map_or(Source::Web(ttl), Source::File);
                let mut cache = Cache::default();
                // A key file is read at once.
                if let Source::File(_) = source {
                    cache.keys = Some((Instant::now(), Arc::new(source.load(url)?)));
                }
                issuers.push(Arc::new(Issuer {
                    url: url.clone(),
                    audiences,
                    source,
                    cache: Mutex::new(cache),
                    waiting: Count::new(),
                    wanted: Event::new().map_err(|e| format!("{NO_EVENTS}: {e}"))?,
                }));
            }
            Ok(Issuers(issuers))
        }

        /// Starts a thread for each issuer that keeps its keys fresh, without waiting for any.
        /// Fails if there are no threads.
        pub fn start(&self) -> io::Result<()> {
            for issuer in &self.0 {
                let issuer = issuer.clone();
                thread::Builder::new().spawn(move || issuer.keep_fresh())?;
            }
            Ok(())
        }

        /// Verifies a token that came at this moment. Answers 401 if no newer keys could help,
        /// and 503 if they could, but cannot be had or may not be asked for yet.
        pub fn verify(&self, token: &str, came: Instant) -> Result<Verdict<'_>, Answer> {
            let token = Token::parse(token).map_err(|why| invalid_token(&why))?;
            let named = token.claims["iss"].as_str();
            let issuer = self.0.iter().find(|issuer| Some(&*issuer.url) == named);
            let unknown = "its issuer is not one that this relay trusts";
            let issuer = issuer.ok_or_else(|| invalid_token(unknown))?;

            // Read before the keys: otherwise a fetch that ends in between would count as tried.
            let latest = lock(&issuer.cache).latest;
            match issuer.check(&token) {
                Ok(()) => Ok(Verdict::Verified(Identity {
                    issuer: issuer.url.clone(),
                    claims: token.claims,
                })),
                Err(Rejection::Final(why)) => Err(invalid_token(&why)),
                Err(Rejection::WithTheseKeys(why)) => {
                    let fetched = latest.filter(|(begun, _)| *begun >= came);
                    issuer.ask(&why, fetched)
                }
            }
        }
    }

    /// Where the keys of an issuer come from.
    enum Source {
        /// The issuer itself. Keys are fetched again after this time.
        Web(Duration),
        /// A file.
        File(PathBuf),
    }

    pub(crate) struct Issuer {
        url: String,
        audiences: HashSet<String>,
        source: Source,
        cache: Mutex<Cache>,
        waiting: Count,
        /// Wakes the thread that fetches.
        wanted: Event,
    }

    /// When a fetch began, and whether it worked.
    type Fetch = (Instant, bool);

    /// What is known of an issuer's keys. A token whose key is missing asks for a fetch, and waits
    /// for one that began after it came: an earlier one may have missed its key.
    #[derive(Default)]
    struct Cache {
        /// The keys, and when the fetch began that brought them.
        keys: Option<(Instant, Arc<Vec<Key>>)>,
        /// The latest fetch that has ended.
        latest: Option<Fetch>,
        /// Set when the next fetch ends, or the one that runs. None if no token waits for that.
        next: Option<Arc<Event>>,
        /// When a token last asked for a fetch.
        asked: Option<Instant>,
    }

    impl Issuer {
        /// Verifies a token with the cached keys, unless they are too old to be trusted.
        fn check(&self, token: &Token) -> Result<(), Rejection> {
            let cached = lock(&self.cache).keys.clone();
            let cached = cached.filter(|(begun, _)| begun.elapsed() < MAX_KEY_AGE);
            let no_key = || Rejection::WithTheseKeys(NO_KEY.into());
            let (_, keys) = cached.ok_or_else(no_key)?;
            // OpenID Connect Core 1.0, section 10.1.
            if token.key_id.is_none() && keys.len() > 1 {
                let why = "it names no key (kid), and its issuer has several";
                return Err(Rejection::Final(why.into()));
            }

            let options = self.options();
            let is_named = |key: &&Key| token.key_id.is_none() || key.id == token.key_id;
            let named = keys.iter().filter(is_named).take(MAX_TRIED);
            let mut rejection = no_key();
            for verify in named.flat_map(|key| &key.verifiers) {
                let Err(e) = verify(token.text, &options) else {
                    return Ok(());
                };
                match e.downcast_ref() {
                    // This comes from the verifiers for other algorithms, and must not hide the
                    // real reason.
                    Some(JWTError::AlgorithmMismatch) => {}
                    Some(e @ JWTError::InvalidSignature) => {
                        rejection = Rejection::WithTheseKeys(e.to_string())
                    }
                    // Other keys would not help, so a job may be told what it can change.
                    e => {
                        let claims = &token.claims;
                        let why = match e {
                            Some(JWTError::TokenHasExpired) => {
                                let now = Clock::now_since_epoch().as_secs();
                                format!("it expired at {}, and now it is {now}", claims["exp"])
                            }
                            Some(JWTError::RequiredAudienceMismatch) => format!(
                                "its audience is {}, and this relay wants one of {:?}",
                                claims["aud"], self.audiences
                            ),
                            e => {
                                e.map_or("a part of it cannot be read".into(), ToString::to_string)
                            }
                        };
                        return Err(Rejection::Final(why));
                    }
                }
            }
            Err(rejection)
        }

        /// What a token must say of itself.
        fn options(&self) -> VerificationOptions {
            VerificationOptions {
                allowed_issuers: Some([self.url.clone()].into()),
                allowed_audiences: Some(self.audiences.clone()),
                time_tolerance: Some(coarsetime::Duration::from_secs(CLOCK_SKEW_SECS)),
                ..VerificationOptions::default()
            }
        }

        /// Asks for newer keys, for a token that does not verify and why. Answers 401 if the keys
        /// are of a fetch that began after the token came (`fetched`), and 503 if that fetch did
        /// not work, if too many wait, or if a token asked a moment ago.
        fn ask(&self, why: &str, fetched: Option<Fetch>) -> Result<Verdict<'_>, Answer> {
            match fetched {
                Some((_, true)) => return Err(invalid_token(why)),
                Some((_, false)) => return Err(no_keys("they could not be fetched")),
                None => {}
            }

            let mut cache = lock(&self.cache);
            let too_many = || no_keys("too many wait for them already");
            let place = self.waiting.enter(MAX_WAITING).ok_or_else(too_many)?;
            let fetched = match cache.next.clone() {
                Some(next) => next,
                None => {
                    if cache
                        .asked
                        .is_some_and(|asked| asked.elapsed() < FETCH_INTERVAL)
                    {
                        return Err(no_keys("they were asked for a moment ago"));
                    }
                    let next = Arc::new(Event::new().map_err(no_keys)?);
                    cache.asked = Some(Instant::now());
                    cache.next = Some(next.clone());
                    self.wanted.set();
                    next
                }
            };
            Ok(Verdict::NeedsKeys(fetched, place))
        }

        /// Fetches the keys when they are too old, when a token needs newer ones, and a while
        /// after a failure. Nobody else fetches them.
        fn keep_fresh(&self) {
            loop {
                let begun = Instant::now();
                // ureq panics if it gets no thread to look up a name.
                let loading = AssertUnwindSafe(|| self.source.load(&self.url));
                let loaded = panic::catch_unwind(loading)
                    .unwrap_or_else(|_| Err("the fetch panicked, for want of a thread".into()));
                let pause = match self.source {
                    Source::File(_) => FILE_CHECK,
                    Source::Web(ttl) if loaded.is_ok() => ttl.min(MAX_KEY_AGE / 2),
                    Source::Web(ttl) => ttl.min(RETRY_PAUSE),
                };
                self.note(begun, loaded);

                let until = Instant::now() + pause;
                while !self.wanted.is_set() && Instant::now() < until {
                    poll::ready([self.wanted.poll_fd()], Some(until));
                }
            }
        }

        /// Keeps what a fetch has brought, and tells those who wait for it.
        fn note(&self, begun: Instant, loaded: Result<Vec<Key>, String>) {
            let mut cache = lock(&self.cache);
            cache.latest = Some((begun, loaded.is_ok()));
            let result = if loaded.is_ok() { "ok" } else { "error" };
            metrics::JWKS_REFRESHES.add(result, 1);
            match loaded {
                Ok(keys) => cache.keys = Some((begun, Arc::new(keys))),
                Err(e) => warn!(
                    "could not fetch keys issuer={:?} error={}",
                    self.url,
                    quoted(&e)
                ),
            }
            // Those who asked after it began may ask once more.
            cache.asked = cache.asked.filter(|asked| *asked <= begun);
            self.wanted.reset();
            if let Some(next) = cache.next.take() {
                next.set();
            }
        }
    }

    impl Source {
        fn load(&self, issuer: &str) -> Result<Vec<Key>, String> {
            match self {
                Source::Web(_) => fetch_jwks(issuer),
                Source::File(path) => {
                    read_set(path).map_err(|e| format!("auth.jwks_files: {}: {e}", path.display()))
                }
            }
        }
    }

    /// Fetches the discovery document and then the key set (OpenID Connect Discovery 1.0,
    /// sections 4.1 to 4.3).
    pub(crate) fn fetch_jwks(issuer: &str) -> Result<Vec<Key>, String> {
        let get = |url: &str| {
            web::get_json(url, DefaultResolver::default(), |request| request)
                .map_err(|e| format!("{url}: {e}"))
        };
        let url = issuer.trim_end_matches('/');
        let document = get(&format!("{url}/.well-known/openid-configuration"))?;
        let named = &document["issuer"];
        if named != issuer {
            return Err(format!(
                "issuer mismatch in the discovery document: {named}"
            ));
        }

        let url = document["jwks_uri"].as_str().unwrap_or_default();
        if !web::is_https_or_loopback(url) {
            return Err(format!("the jwks_uri must be an https URL, not {url:?}"));
        }
        let keys = parse_set(&get(url)?).map_err(|e| format!("{url}: {e}"))?;
        info!("fetched keys issuer={issuer:?} count={}", keys.len());
        Ok(keys)
    }

    /// Reads a key set from a regular file of the size that a fetched one may have. Others could
    /// make us wait.
    fn read_set(path: &Path) -> Result<Vec<Key>, Box<dyn Error>> {
        let file = fs::metadata(path)?;
        if !file.is_file() || file.len() > web::MAX_DOCUMENT_BYTES {
            return Err("expected a regular file of at most 1 MiB".into());
        }
        let set = web::parse_json(&fs::read(path)?)?;
        Ok(parse_set(&set)?)
    }
}

/// Connects nix-daemon and a WebSocket until one of them ends. Owns the child. Promises that
/// each session has exactly one reason to end, which the log says, and the Close if the client
/// did not close before, and that the child is reaped and its process group killed before its
/// permit is given back.
mod session {
    use crate::config::{Config, secs};
    use crate::copy::{self, CLOSE_TIMEOUT, End, KEEPALIVES, Keepalive, Link, Pipes, Reason};
    use crate::http::{self, Answer};
    use crate::metrics;
    use crate::poll::{self, Event};
    use crate::text::{quoted, without_escapes};
    use log::{info, warn};
    use rustix::io::{Errno, ioctl_fionbio};
    use rustix::net::sockopt;
    use rustix::pipe::fcntl_setpipe_size;
    use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
    use std::io::{self, PipeReader, PipeWriter, Read};
    use std::net::TcpStream;
    use std::num::NonZeroU32;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};
    use std::sync::Arc;
    use std::sync::atomic::Ordering::Relaxed;
    use std::time::{Duration, Instant};
    use std::{env, iter, mem};
    use tungstenite::protocol::Role;
    use tungstenite::protocol::frame::coding::CloseCode;

    /// How long a client may take to receive what the kernel holds for it when its session is
    /// over: 4 MiB at most (tcp(7), tcp_wmem), so 48 KiB a second are enough.
    const TAIL_TIMEOUT: Duration = Duration::from_secs(90);
    /// The total size of the input pipes of up to 160 sessions. An unprivileged user whose pipes
    /// exceed 64 MiB gets only tiny ones from then on (pipe(7)). Output pipes are a quarter as
    /// large, since they gain less.
    const PIPES_BYTES: u32 = 40 << 20;
    const SMALLEST_PIPE_LOG2: u32 = 18;
    const LARGEST_PIPE_LOG2: u32 = 20;
    /// The longest line of the child's standard error in the log. A longer one is split.
    const MAX_LINE_BYTES: usize = 4 << 10;
    /// What a pipe holds (64 KiB, pipe(7)), in reads of that size.
    const MAX_REST_READS: usize = (64 << 10) / MAX_LINE_BYTES;
    /// The environment variables that nix-daemon gets, by their names and by prefixes of names.
    const KEPT_VARIABLES: [&str; 19] = [
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
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    ];
    const KEPT_PREFIXES: [&str; 4] = ["LC_", "XDG_", "GC_", "NIX_"];
    const OWN_PREFIX: &str = "NIX_RELAY_";
    const NOT_STARTED: &str = "nix-daemon does not start; the relay's log has the cause";
    /// Why a child may not start at one time, and start at another.
    const SCARCITY: [Errno; 4] = [Errno::AGAIN, Errno::MFILE, Errno::NFILE, Errno::NOMEM];

    /// How a child is ended when its session is over. Its standard input is closed first (not if
    /// it has closed its output itself), and then nix-daemon cancels its builds and releases its
    /// locks. After that its group gets these signals, each after this many seconds.
    const STEPS: [(u64, Signal); 2] = [(10, Signal::TERM), (5, Signal::KILL)];
    /// How long that takes at most, unless the kernel holds a child up.
    pub const TERMINATION_TIME: Duration = Duration::from_secs(STEPS[0].0 + STEPS[1].0);

    /// A session that is about to start.
    pub struct Opening {
        pub number: u64,
        /// Who the client is, for the log.
        pub client: String,
        /// The 101.
        pub upgrade: Vec<u8>,
        /// Whether it says that messages are compressed.
        pub compressed: bool,
        /// The bytes that came after the request head.
        pub rest: Vec<u8>,
    }

    /// Copies bytes until the session is over, ends both sides, and logs the result. Fails
    /// before anything is sent if there are no threads or descriptors.
    pub fn run(
        config: &Config,
        opening: Opening,
        socket: &Arc<TcpStream>,
        daemon: Daemon,
        closing: &Event,
    ) -> io::Result<()> {
        let start = Instant::now();
        let number = opening.number;
        let keepalive_secs = config.server.keepalive_secs;
        // For a client that vanishes while we do not read from it. 0 stands for the default, and
        // what is too long for the kernel leaves it.
        let silence = keepalive_secs.saturating_mul(KEEPALIVES * 1000);
        let _ = sockopt::set_tcp_user_timeout(socket, silence);
        let link = Link::new(socket, socket.clone(), Role::Server, opening.compressed)?;
        let mut session = Session {
            number,
            start,
            link: &link,
            keepalive: Keepalive::new(keepalive_secs),
            deadline: start + secs(config.daemon.timeout_secs),
            closing,
            exited: Some(&daemon.exited),
            process: daemon.process,
        };
        let pipes = Pipes {
            source: daemon.stdout.as_fd(),
            source_ended: poll::input(&daemon.exited),
            sink: daemon.stdin,
        };

        // Whoever has the 101 is counted.
        let _active = metrics::SESSIONS_ACTIVE.count().enter(u64::MAX);
        let mut exit = None;
        let receiving = link.receiving(opening.rest);
        link.run(&opening.upgrade, receiving, pipes, || {
            info!("session opened session={number} {}", opening.client);
            exit = session.supervise();
        })?;
        drop(daemon.stdout);
        let end = link.end.get().cloned().unwrap_or(copy::FAILED);
        let exit = exit.unwrap_or_else(|| session.terminate());

        session.report(&end, &exit);
        Ok(())
    }

    /// What the connection's own thread does while two other threads copy.
    struct Session<'a> {
        number: u64,
        start: Instant,
        link: &'a Link,
        keepalive: Keepalive,
        deadline: Instant,
        closing: &'a Event,
        /// None once the child has exited.
        exited: Option<&'a OwnedFd>,
        process: Process,
    }

    impl Session<'_> {
        /// Returns when the session is over, for one of three reasons:
        /// - The client has closed (`end`). Then the child's input ends, and what it still has to
        ///   say is sent.
        /// - The child's output has ended (`all_sent`), as it also does in the end after that. Then
        ///   the child is reaped, and the Close says how it ended.
        /// - The session was broken off (`over`). Then the Close says why, if the client is there,
        ///   and the child is the caller's to end.
        fn supervise(&mut self) -> Option<Exit> {
            while self.link.end.get().is_none() && !self.link.all_sent.load(Relaxed) {
                self.wait(None);
            }
            // If nothing broke it off, the client has closed, or the child's output has ended.
            let exit = (!self.link.over.is_set()).then(|| self.terminate());
            // The client has its time from now on.
            self.link.note_alive();
            while !self.link.over.is_set() && !self.link.all_sent.load(Relaxed) {
                self.wait(None);
            }

            if let Some(Exit { end: own, .. }) = &exit
                && !self.link.over.is_set()
            {
                self.link.set_end(own.clone());
                let code = match own.code {
                    // A client's code is answered with the same one (RFC 6455, section 5.5.1).
                    Some(CloseCode::Normal) => self.link.end.get().and_then(|end| end.code),
                    code => code,
                };
                self.link.close(code, &own.detail, TAIL_TIMEOUT);
            } else {
                // Whoever has set `over` is about to set this.
                let end = self.link.end.wait();
                if end.reason != Reason::Gone {
                    self.link.close(end.code, &end.detail, CLOSE_TIMEOUT);
                }
            }
            exit
        }

        /// Waits for something to happen, and sees to it. During a step of the child's termination,
        /// which says until when, neither a shutdown nor the deadline matters.
        fn wait(&mut self, step: Option<Instant>) {
            let until = step.unwrap_or_else(|| {
                let check = self.keepalive.check(self.link);
                check.map_or(self.deadline, |check| check.min(self.deadline))
            });
            // poll needs four, so `news` stands in for what does not matter now, or any more.
            let news = self.link.news.poll_fd();
            let closing = step.map_or(self.closing.poll_fd(), |_| news.clone());
            let exited = self.exited.map_or(news.clone(), poll::input);
            let stderr = self.process.stderr.pipe.as_ref();
            let stderr = stderr.map_or(news.clone(), poll::input);

            let fds = [news, closing, exited, stderr];
            let [_, closing, exited, stderr] = poll::ready(fds, Some(until));
            self.link.news.reset();
            if !stderr.is_empty() {
                self.process.stderr.log(self.number);
            }
            if !exited.is_empty() && self.exited.take().is_some() {
                // Processes that it started and left behind could write for ever. It is not reaped
                // yet: after that, its number may belong to another group.
                self.process.kill_group(Signal::KILL);
            }
            if step.is_none() && !closing.is_empty() {
                self.link.finish(copy::SHUTTING_DOWN);
            } else if step.is_none() && Instant::now() >= self.deadline {
                self.link.finish(copy::TIMED_OUT);
            }
        }

        /// Counts and logs a session that has ended.
        fn report(&self, end: &End, exit: &Exit) {
            let reason = metrics::SESSIONS.values[end.reason as usize];
            let length = self.start.elapsed();
            metrics::add_session(reason, length);
            info!(
                "session ended session={} reason={reason} detail={} secs={:.3} bytes_in={} \
                 bytes_out={} exit={:?}",
                self.number,
                quoted(&end.detail),
                length.as_secs_f64(),
                self.link.received.get(),
                self.link.sent.get(),
                exit.description,
            );
        }

        /// Makes sure that the child and its process group end, and reaps the child.
        fn terminate(&mut self) -> Exit {
            // Only the kernel can delay a SIGKILL, so that is repeated.
            for (secs, signal) in STEPS.into_iter().chain(iter::repeat(STEPS[1])) {
                let until = Instant::now() + Duration::from_secs(secs);
                while self.exited.is_some() && Instant::now() < until {
                    self.wait(Some(until));
                }
                if self.exited.is_none() {
                    break;
                }
                warn!(
                    "nix-daemon outlives its session session={} signal={}",
                    self.number,
                    signal.as_raw()
                );
                self.process.kill_group(signal);
            }
            self.process.reap(self.number)
        }
    }

    /// A running child, which leads a process group of its own.
    pub struct Daemon {
        stdin: PipeWriter,
        stdout: PipeReader,
        /// Becomes readable when the child has exited.
        exited: OwnedFd,
        process: Process,
    }

    impl Daemon {
        /// Answers 502 if the program cannot be run, and 503 if that may pass.
        pub fn spawn(config: &Config, arguments: &[String]) -> Result<Daemon, Answer> {
            let program = &*config.daemon.nix_daemon_path;
            let mut command = Command::new(program);
            command.args(arguments).current_dir("/").process_group(0);
            let kept = env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_kept));
            command.env_clear().envs(kept);
            Daemon::start(command, config.daemon.max_connections).map_err(|e| {
                let may_pass = Errno::from_io_error(&e).is_some_and(|e| SCARCITY.contains(&e));
                let status = if may_pass {
                    http::RETRY_LATER
                } else {
                    http::BAD_GATEWAY
                };
                Answer::new(status, NOT_STARTED).because(format!("{program}: {e}"))
            })
        }

        fn start(mut command: Command, max_connections: NonZeroU32) -> io::Result<Daemon> {
            let (input, stdin) = io::pipe()?;
            let (stdout, output) = io::pipe()?;
            let (stderr, errors) = io::pipe()?;
            ioctl_fionbio(&stdin, true)?;
            ioctl_fionbio(&stdout, true)?;
            let share = (PIPES_BYTES / max_connections).max(1).ilog2();
            let size = 1 << share.clamp(SMALLEST_PIPE_LOG2, LARGEST_PIPE_LOG2);
            // An unprivileged user may be refused this. Smaller pipes work, too.
            let _ = fcntl_setpipe_size(&stdin, size);
            let _ = fcntl_setpipe_size(&stdout, size / 4);

            let command = command.stdin(input).stdout(output).stderr(errors);
            // Once it runs, it is killed and reaped whatever fails.
            let process = Process {
                child: command.spawn()?,
                is_reaped: false,
                stderr: Stderr {
                    pipe: Some(stderr),
                    ..Stderr::default()
                },
            };
            Ok(Daemon {
                stdin,
                stdout,
                exited: pidfd_open(Pid::from_child(&process.child), PidfdFlags::empty())?,
                process,
            })
        }
    }

    /// Whether nix-daemon gets this variable.
    fn is_kept(name: &str) -> bool {
        let is_known = KEPT_VARIABLES.contains(&name)
            || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        is_known && !name.starts_with(OWN_PREFIX)
    }

    /// A child process and its standard error. When dropped, it is killed and reaped.
    struct Process {
        child: Child,
        /// Whether its number may belong to another by now.
        is_reaped: bool,
        stderr: Stderr,
    }

    /// How a child ended.
    struct Exit {
        description: String,
        /// The end of its session, if nothing else ended that before.
        end: End,
    }

    impl Process {
        fn kill_group(&self, signal: Signal) {
            let _ = kill_process_group(Pid::from_child(&self.child), signal);
        }

        /// For a child that has exited, and whose group was killed.
        fn reap(&mut self, number: u64) -> Exit {
            self.stderr.end(number);
            self.is_reaped = true;
            let (description, is_success) = match self.child.wait() {
                Ok(status) => (format!("nix-daemon ended with {status}"), status.success()),
                Err(e) => (format!("nix-daemon is lost: {e}"), false),
            };
            let said = match &*self.stderr.last_line {
                "" => "it gave no reason",
                line => line,
            };
            let (code, detail) = if is_success {
                (CloseCode::Normal, String::new())
            } else {
                (CloseCode::Error, format!("{description}: {said}"))
            };
            let end = End::new(Reason::DaemonExited, Some(code), detail);
            Exit { description, end }
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            if !self.is_reaped {
                self.kill_group(Signal::KILL);
                let _ = self.child.wait();
            }
        }
    }

    /// A child's standard error, on its way to the log.
    #[derive(Default)]
    struct Stderr {
        pipe: Option<PipeReader>,
        /// The current line as far as it was read, and whether it is the rest of a line that was
        /// too long.
        line: Vec<u8>,
        is_continued: bool,
        /// The last line that had words in it, without terminal escapes and at most
        /// MAX_LINE_BYTES long. One that says that it is an error is not replaced by others.
        last_line: String,
    }

    impl Stderr {
        /// Logs what the pipe still holds when the child has exited.
        fn end(&mut self, number: u64) {
            // No more than that: processes outside of its group may go on writing.
            let holds_more = |pipe: &PipeReader| poll::readable(pipe, Instant::now());
            for _ in 0..MAX_REST_READS {
                if self.pipe.as_ref().is_some_and(holds_more) {
                    self.log(number);
                }
            }
            self.end_line(number);
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
                self.line.push(byte);
                if byte == b'\n' || self.line.len() == MAX_LINE_BYTES {
                    self.end_line(number);
                    self.is_continued = byte != b'\n';
                }
            }
        }

        fn end_line(&mut self, number: u64) {
            let line = mem::take(&mut self.line);
            let line = without_escapes(&String::from_utf8_lossy(&line));
            if !line.trim().is_empty() {
                info!("nix-daemon says session={number} line={line:?}");
            }
            let is_error = |line: &str| line.trim_start().starts_with("error:");
            let is_better = is_error(&line) || !is_error(&self.last_line);
            if line.contains(char::is_alphanumeric) && !self.is_continued && is_better {
                self.last_line = line.trim().into();
            }
        }
    }
}

/// Copies in both directions between a WebSocket and a pair of pipes. `inward` reads messages
/// and writes their payload to a pipe; `outward` reads a pipe and sends binary messages. Each
/// runs in a thread of its own; the thread that starts them supervises. Promises that reading
/// from the peer never waits for writing to it, that no lock is held while anything waits, that
/// only the first reason to end counts, and that both threads are gone when `run` returns.
mod copy {
    use crate::metrics::{self, Count};
    use crate::poll::{self, Event, lock};
    use rustix::buffer::spare_capacity;
    use rustix::event::{PollFd, PollFlags};
    use rustix::io::{Errno, retry_on_intr};
    use rustix::net::sockopt;
    use rustix::rand::{GetRandomFlags, getrandom};
    use std::borrow::Cow;
    use std::io::{self, ErrorKind, Read, Write};
    use std::net::{Shutdown, TcpStream};
    use std::ops::Range;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::sync::{Arc, Mutex, OnceLock};
    use std::time::{Duration, Instant};
    use std::{mem, thread};
    use tungstenite::error::{CapacityError, Error, ProtocolError};
    use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};
    use tungstenite::protocol::frame::{Frame, FrameHeader};
    use tungstenite::protocol::{CloseFrame, Role, WebSocket, WebSocketConfig};
    use tungstenite::{Bytes, Message};
    use zstd::stream::write::Encoder;
    use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

    /// How much is read from a pipe for one message. What a program writes at once, often 32 or
    /// 64 KiB, goes in one piece.
    pub const CHUNK_BYTES: usize = 64 << 10;
    /// Room for a frame's header before its payload: 14 bytes are the most (RFC 6455, section
    /// 5.2), and 16 leave the payload aligned.
    pub const HEADER_BYTES: usize = 16;
    /// How much is read from the peer at a time: two messages of the usual size, whole, so that
    /// none has to be moved to make room for its rest. tungstenite clears this much memory before
    /// each read.
    const READ_BYTES: usize = 2 * (CHUNK_BYTES + HEADER_BYTES);
    /// A larger message from the peer ends the session.
    const MAX_MESSAGE_BYTES: usize = 4 << 20;
    /// RFC 6455, section 5.5: a control frame holds 125 bytes, and the code of a Close takes two
    /// of them.
    const MAX_REASON_BYTES: usize = 123;
    /// A peer that does not respond for this many keepalive intervals is gone.
    pub const KEEPALIVES: u32 = 3;
    /// How long the peer may take to receive a Close if nothing else is on its way, and then to
    /// end its side of the connection.
    pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
    /// poll(2) reports a socket as writable when a third of its buffer is free. A slow peer may
    /// take very long to free that much, so we also try this often.
    const CHECK: Duration = Duration::from_secs(1);
    /// Of zstd's levels, the one that keeps up with 1 Gbit/s. Its window is 512 KiB.
    const LEVEL: i32 = 1;
    /// The peer's window is 1 MiB at most.
    const MAX_WINDOW_LOG2: u32 = 20;
    /// How many bytes zstd wants next: after a block the header of another (RFC 8878, section
    /// 3.1.1.2), and after a frame none.
    const AFTER_BLOCK: [usize; 2] = [3, 0];

    /// Why a session ended. `metrics::SESSIONS` has the names, in this order.
    #[derive(Clone, Copy, PartialEq)]
    pub enum Reason {
        /// The peer sent a Close, or ended the connection in order.
        Closed,
        /// The peer does not respond, or the connection broke.
        Gone,
        DaemonExited,
        ProtocolError,
        Failed,
        ShuttingDown,
        TimedOut,
    }

    /// How a session ended. Made where that happens; the log, the metrics, the Close and the
    /// client's last words come from it.
    #[derive(Clone)]
    pub struct End {
        pub reason: Reason,
        /// For the Close (RFC 6455, section 7.4.1). None if the peer gave none, or is gone.
        pub code: Option<CloseCode>,
        pub detail: Cow<'static, str>,
    }

    impl End {
        pub fn new(reason: Reason, code: Option<CloseCode>, detail: String) -> End {
            let detail = detail.into();
            End {
                reason,
                code,
                detail,
            }
        }
    }

    pub const FAILED: End = End {
        reason: Reason::Failed,
        code: Some(CloseCode::Error),
        detail: Cow::Borrowed("the relay failed; its log has the cause"),
    };
    pub const SHUTTING_DOWN: End = End {
        reason: Reason::ShuttingDown,
        code: Some(CloseCode::Away),
        detail: Cow::Borrowed("the relay is shutting down"),
    };
    pub const TIMED_OUT: End = End {
        reason: Reason::TimedOut,
        code: Some(CloseCode::Policy),
        detail: Cow::Borrowed("the session reached daemon.timeout_secs"),
    };
    /// The peer ended the connection without a Close.
    const NO_CLOSE: End = End {
        reason: Reason::Closed,
        code: None,
        detail: Cow::Borrowed("the connection was closed without a Close"),
    };
    const TEXT: End = End {
        reason: Reason::ProtocolError,
        code: Some(CloseCode::Unsupported),
        detail: Cow::Borrowed("only binary messages carry data"),
    };
    const BROKEN: End = End {
        reason: Reason::Gone,
        code: None,
        detail: Cow::Borrowed("the connection broke"),
    };
    const SILENT: End = End {
        reason: Reason::Gone,
        code: None,
        detail: Cow::Borrowed("no response for three keepalive intervals"),
    };
    const NO_READER: End = End {
        reason: Reason::Failed,
        code: Some(CloseCode::Error),
        detail: Cow::Borrowed("nobody reads the output any more"),
    };
    const TOO_LONG: End = End {
        reason: Reason::ProtocolError,
        code: Some(CloseCode::Size),
        detail: Cow::Borrowed("a message is longer than 4 MiB"),
    };
    const NOT_UTF8: End = End {
        reason: Reason::ProtocolError,
        code: Some(CloseCode::Invalid),
        detail: Cow::Borrowed("a text is not valid UTF-8"),
    };
    const NOT_ZSTD: End = End {
        reason: Reason::ProtocolError,
        code: Some(CloseCode::Invalid),
        detail: Cow::Borrowed(
            "expected whole blocks of a zstd stream, with a window of at most 1 MiB",
        ),
    };

    /// What carries the bytes of a session: a socket, or TLS over one.
    pub trait Stream: Send + Sync {
        fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
        fn write(&self, bytes: &[u8]) -> io::Result<usize>;
        /// Sends what `write` has only kept.
        fn flush(&self) -> io::Result<()>;
    }

    impl Stream for TcpStream {
        fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
            Read::read(&mut &*self, buffer)
        }

        fn write(&self, bytes: &[u8]) -> io::Result<usize> {
            Write::write(&mut &*self, bytes)
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The half that reads. It also writes for a client's handshake; after that, what tungstenite
    /// would answer by itself is dropped, because the other half answers.
    pub struct Half {
        pub stream: Arc<dyn Stream>,
        pub writes: bool,
    }

    impl Read for Half {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.stream.read(buffer)
        }
    }

    impl Write for Half {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.writes {
                self.stream.write(bytes)
            } else {
                Ok(bytes.len())
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            if self.writes {
                self.stream.flush()?;
            }
            Ok(())
        }
    }

    /// For a half that reads this many bytes at a time.
    pub fn limits(read_bytes: usize) -> WebSocketConfig {
        WebSocketConfig::default()
            .read_buffer_size(read_bytes)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES))
    }

    /// The half that sends. A `WebSocket` of tungstenite would copy each message once more.
    struct Sending {
        stream: Arc<dyn Stream>,
        role: Role,
        /// One frame, and what the socket has yet to accept of it.
        buffer: Vec<u8>,
        unsent: Range<usize>,
        /// Whether the socket has accepted some of it since the last step.
        has_progressed: bool,
        /// A control frame to be sent after that one. Of several that wait only the last is sent:
        /// of several pings, only the last need be answered (RFC 6455, section 5.5.3). But a ping
        /// of ours replaces nothing.
        control: Option<(Control, Bytes)>,
        /// Whether it is a Close, or one was sent. Nothing follows that (RFC 6455, section 5.5.1).
        closed: bool,
        /// Makes data a zstd stream (RFC 8878), if that was asked for.
        encoder: Option<Encoder<'static, Vec<u8>>>,
    }

    impl Sending {
        /// Sends what there is to send.
        fn flush(&mut self) -> io::Result<()> {
            loop {
                while !self.unsent.is_empty() {
                    match self.stream.write(&self.buffer[self.unsent.clone()])? {
                        0 => return Err(ErrorKind::WriteZero.into()),
                        length => self.unsent.start += length,
                    }
                    self.has_progressed = true;
                }
                self.stream.flush()?;
                let Some((control, payload)) = self.control.take() else {
                    return Ok(());
                };
                self.room().extend_from_slice(&payload);
                self.frame(OpCode::Control(control))?;
            }
        }

        /// The empty buffer, to add a payload to. Everything before must be sent.
        fn room(&mut self) -> &mut Vec<u8> {
            self.buffer.clear();
            self.buffer.resize(HEADER_BYTES, 0);
            // A payload that does not compress has made it larger.
            self.buffer.shrink_to(HEADER_BYTES + CHUNK_BYTES);
            &mut self.buffer
        }

        /// Makes the payload in the buffer the next blocks of a zstd stream (RFC 8878), if the peer
        /// wants one. If this or the next function fails, the payload is lost, and with it the
        /// connection.
        // Inlined, it would take a page of stack from each idle session.
        #[inline(never)]
        fn compress(&mut self) -> io::Result<()> {
            if let Some(encoder) = &mut self.encoder {
                encoder.write_all(&self.buffer[HEADER_BYTES..])?;
                encoder.flush()?;
                self.buffer.truncate(HEADER_BYTES);
                self.buffer.append(encoder.get_mut());
            }
            Ok(())
        }

        /// Makes a frame of the payload in the buffer (RFC 6455, section 5.2).
        fn frame(&mut self, opcode: OpCode) -> io::Result<()> {
            let (room, payload) = self.buffer.split_at_mut(HEADER_BYTES);
            let mut header = FrameHeader {
                opcode,
                ..FrameHeader::default()
            };
            if self.role == Role::Client {
                let mut mask = [0; 4];
                retry_on_intr(|| getrandom(&mut mask, GetRandomFlags::empty()))?;
                header.mask = Some(mask);
                apply_mask(payload, mask);
            }

            let length = payload.len() as u64;
            let start = HEADER_BYTES - header.len(length);
            let written = header.format(length, &mut &mut room[start..]);
            written.map_err(io::Error::other)?;
            self.unsent = start..self.buffer.len();
            Ok(())
        }
    }

    /// Expands what the peer has compressed.
    pub(crate) fn new_decoder() -> DCtx<'static> {
        let mut decoder = DCtx::create();
        let _ = decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG2));
        decoder
    }

    /// RFC 6455, section 5.3.
    fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
        // Enough at a time for the compiler to use wide registers.
        let keys = [mask; 64];
        for part in payload.chunks_mut(keys.as_flattened().len()) {
            for (byte, key) in part.iter_mut().zip(keys.as_flattened()) {
                *byte ^= key;
            }
        }
    }

    /// The pipes of a session. They do not block.
    pub struct Pipes<'a, S> {
        pub source: BorrowedFd<'a>,
        /// Once this is readable, an empty source has ended.
        pub source_ended: PollFd<'a>,
        /// Dropped once nothing more comes from the peer.
        pub sink: S,
    }

    /// The half of a WebSocket that reads.
    pub struct Receiving {
        pub websocket: WebSocket<Half>,
        /// Whether it may hold bytes that came after the peer's head.
        pub may_hold_more: bool,
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
        socket: Arc<TcpStream>,
        stream: Arc<dyn Stream>,
        role: Role,
        compressed: bool,
        sending: Mutex<Sending>,
        /// When the peer last showed that it is there: by accepting something, or if there is
        /// nothing to accept, by sending something.
        last_alive: Mutex<Instant>,
        /// Whether the socket has yet to accept some of what we send.
        is_full: AtomicBool,
        /// How the session ended, if it has. If the peer has closed it, the other direction still
        /// goes on.
        pub end: OnceLock<End>,
        /// Set when both threads must stop.
        pub over: Event,
        /// Whether the source has ended, and the socket has accepted everything from it.
        pub all_sent: AtomicBool,
        /// Set when `end` or `all_sent` has changed. The supervisor resets it.
        pub news: Event,
        /// Payload, in bytes.
        pub received: Count,
        pub sent: Count,
    }

    impl Link {
        /// A WebSocket on a stream over this socket, whose binary messages are `compressed`. Fails
        /// without descriptors.
        pub fn new(
            socket: &Arc<TcpStream>,
            stream: Arc<dyn Stream>,
            role: Role,
            compressed: bool,
        ) -> io::Result<Link> {
            socket.set_nonblocking(true)?;
            let sending = Sending {
                stream: stream.clone(),
                role,
                buffer: Vec::with_capacity(HEADER_BYTES + CHUNK_BYTES),
                unsent: 0..0,
                has_progressed: false,
                control: None,
                closed: false,
                encoder: compressed
                    .then(|| Encoder::new(Vec::new(), LEVEL))
                    .transpose()?,
            };

            Ok(Link {
                socket: socket.clone(),
                stream,
                role,
                compressed,
                sending: Mutex::new(sending),
                last_alive: Mutex::new(Instant::now()),
                is_full: AtomicBool::new(false),
                end: OnceLock::new(),
                over: Event::new()?,
                all_sent: AtomicBool::new(false),
                news: Event::new()?,
                received: Count::new(),
                sent: Count::new(),
            })
        }

        /// The half that reads, where `rest` came after the peer's head.
        pub fn receiving(&self, rest: Vec<u8>) -> Receiving {
            let half = Half {
                stream: self.stream.clone(),
                writes: false,
            };
            let limits = Some(limits(READ_BYTES));
            Receiving {
                may_hold_more: !rest.is_empty(),
                websocket: WebSocket::from_partially_read(half, rest, self.role, limits),
            }
        }

        /// Sends `head` and copies both ways, while `supervise` waits for the session to be over.
        /// Then the connection is closed. Fails before anything is sent if there are no threads.
        pub fn run<S: AsFd + Send>(
            &self,
            head: &[u8],
            receiving: Receiving,
            pipes: Pipes<S>,
            supervise: impl FnOnce(),
        ) -> io::Result<()> {
            thread::scope(|scope| {
                let _guard = OverOnPanic(self);
                // The lock keeps everybody from sending before the head, which waits until both
                // threads exist.
                let sending = lock(&self.sending);
                let inward = move || self.inward(receiving, pipes.sink);
                let inward = thread::Builder::new().spawn_scoped(scope, inward)?;
                let outward = move || self.outward(pipes.source, pipes.source_ended);
                let outward = thread::Builder::new().spawn_scoped(scope, outward);
                let outward = outward.inspect_err(|_| self.over.set())?;
                // It is short, and a new socket has room for it.
                let _ = self.stream.write(head);
                drop(sending);

                supervise();
                self.over.set();
                // tungstenite's `read` returns only with a message, which need not come while the
                // peer goes on sending parts of one. Now what it sends is answered with a reset.
                let _ = self.socket.shutdown(Shutdown::Both);
                // A panic has been reported by now, and has ended the session.
                let _ = (inward.join(), outward.join());
                Ok(())
            })
        }

        /// Ends the session, unless it has ended already, and stops both threads. `over` comes
        /// first: whoever sees the end must see that all stops.
        pub fn finish(&self, end: End) {
            self.over.set();
            self.set_end(end);
        }

        /// Records how the session ended, unless it has ended already. Both threads go on.
        pub fn set_end(&self, end: End) {
            let _ = self.end.set(end);
            self.news.set();
        }

        pub fn note_alive(&self) {
            *lock(&self.last_alive) = Instant::now();
        }

        /// Waits until a descriptor is ready, the session is over, or `until`.
        fn wait(&self, fd: PollFd, until: Option<Instant>) -> PollFlags {
            let [ready, _] = poll::ready([fd, self.over.poll_fd()], until);
            ready
        }

        /// WebSocket → pipe.
        fn inward(&self, receiving: Receiving, sink: impl AsFd) {
            let _guard = OverOnPanic(self);
            let mut peer = receiving.websocket;
            // A read clears memory, and an idle session should use none: so we wait first.
            let mut wait = !receiving.may_hold_more;
            let mut owes_pong = false;
            let mut decoder = self.compressed.then(new_decoder);

            while !self.over.is_set() {
                if wait {
                    self.await_message(&mut owes_pong);
                }
                // A client that sends, but accepts nothing, is not there. A relay is: its child
                // may read nothing for long.
                if self.role == Role::Client || !self.is_full.load(Relaxed) {
                    self.note_alive();
                }
                let message = peer.read();
                wait = message.is_err();
                let done = match message {
                    Ok(Message::Binary(payload)) => match &mut decoder {
                        None => self.deliver(&payload, sink.as_fd()),
                        Some(decoder) => self.expand(decoder, &payload, sink.as_fd()),
                    },
                    Ok(Message::Ping(payload)) => {
                        owes_pong |= !matches!(self.control(Control::Pong, payload), Sent::All);
                        Ok(())
                    }
                    Ok(Message::Text(_)) => Err(TEXT),
                    Ok(Message::Close(frame)) => {
                        self.note_close(frame);
                        break;
                    }
                    Ok(_) => Ok(()),
                    Err(e) => self.failed_read(e),
                };
                if let Err(end) = done {
                    self.finish(end);
                }
            }

            // Only now: a child that ends when its input does is not why the session ended.
            drop(sink);
        }

        /// Records the peer's Close. A relay goes on sending: its child may have more to say.
        fn note_close(&self, frame: Option<CloseFrame>) {
            if self.role == Role::Client {
                self.over.set();
            }
            let (code, reason) = frame.map(|frame| (frame.code, frame.reason)).unzip();
            let reason = reason.unwrap_or_default().to_string();
            self.set_end(End::new(Reason::Closed, code, reason));
        }

        /// Waits for more from the peer, and meanwhile sends a pong that is still due.
        fn await_message(&self, owes_pong: &mut bool) {
            let mut events = PollFlags::IN;
            events.set(PollFlags::OUT, *owes_pong);
            let ready = self.wait(PollFd::new(&self.socket, events), None);
            if ready.contains(PollFlags::OUT) {
                *owes_pong = !matches!(self.attempt(Sending::flush), Sent::All);
            }
        }

        /// Delivers what the next blocks of a zstd stream hold.
        pub(crate) fn expand(
            &self,
            decoder: &mut DCtx,
            blocks: &[u8],
            sink: BorrowedFd,
        ) -> Result<(), End> {
            let mut input = InBuffer::around(blocks);
            let mut part = Vec::with_capacity(CHUNK_BYTES);
            let mut wanted = 0;
            // If it has filled the part, there may be more.
            while input.pos() < blocks.len() || part.len() == part.capacity() && wanted > 0 {
                let output = &mut OutBuffer::around(&mut part);
                let hint = decoder.decompress_stream(output, &mut input);
                wanted = hint.map_err(|_| NOT_ZSTD)?;
                self.deliver(&part, sink)?;
                if self.over.is_set() {
                    return Ok(());
                }
            }
            if AFTER_BLOCK.contains(&wanted) {
                Ok(())
            } else {
                Err(NOT_ZSTD)
            }
        }

        /// Writes the payload of a message to the pipe. A child that reads no more may still
        /// have something to say, so what it does not take is dropped. A client whose reader is
        /// gone is of no use.
        fn deliver(&self, mut payload: &[u8], sink: BorrowedFd) -> Result<(), End> {
            self.received.add(payload.len() as u64);
            metrics::BYTES.add("in", payload.len() as u64);

            while !payload.is_empty() && !self.over.is_set() {
                match rustix::io::write(sink, payload) {
                    Ok(length) => payload = &payload[length..],
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => self.await_sink(sink)?,
                    Err(_) if self.role == Role::Server => return Ok(()),
                    Err(_) => return Err(NO_READER),
                }
            }
            Ok(())
        }

        /// Waits until the pipe has room. Fails if the connection breaks meanwhile.
        fn await_sink(&self, sink: BorrowedFd) -> Result<(), End> {
            let sink = PollFd::from_borrowed_fd(sink, PollFlags::OUT);
            let room = self.wait(sink, Some(Instant::now() + CHECK));
            // We did not read, so the peer's silence does not count.
            if !self.is_full.load(Relaxed) {
                self.note_alive();
            }
            // What came before it broke is delivered while there is room.
            if room.is_empty() && self.is_broken() {
                Err(BROKEN)
            } else {
                Ok(())
            }
        }

        /// What an error from tungstenite's `read` means. Nothing to read is no error.
        fn failed_read(&self, error: Error) -> Result<(), End> {
            Err(match error {
                Error::Io(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Error::Io(e) => End::new(Reason::Gone, None, e.to_string()),
                Error::Capacity(CapacityError::MessageTooLong { .. }) => TOO_LONG,
                Error::Utf8(_) => NOT_UTF8,
                // Once a reset has been reported, later reads look like an end.
                Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
                    if self.is_broken() { BROKEN } else { NO_CLOSE }
                }
                e => End::new(
                    Reason::ProtocolError,
                    Some(CloseCode::Protocol),
                    e.to_string(),
                ),
            })
        }

        fn is_broken(&self) -> bool {
            let socket = PollFd::new(&self.socket, PollFlags::empty());
            // Without an event that we ask for, only errors and hangups are reported.
            poll::ready([socket], Some(Instant::now())) != [PollFlags::empty()]
        }

        /// Pipe → WebSocket. If the connection breaks, what came before may say why, and `inward`
        /// has a moment to read it.
        fn outward(&self, source: BorrowedFd, source_ended: PollFd) {
            let _guard = OverOnPanic(self);
            let mut ended = false;

            while !self.over.is_set() {
                let mut read = None;
                let sent = self.attempt(|sending| {
                    sending.flush()?;
                    if sending.closed {
                        return Ok(());
                    }
                    let length = rustix::io::read(source, spare_capacity(sending.room()));
                    read = Some(length);
                    if let Ok(1..) = length {
                        sending.compress()?;
                        sending.frame(OpCode::Data(Data::Binary))?;
                    }
                    sending.flush()
                });

                if let Some(Ok(length)) = read {
                    self.sent.add(length as u64);
                    metrics::BYTES.add("out", length as u64);
                }
                match (sent, read) {
                    (Sent::Broken, _) => {
                        poll::ready([self.over.poll_fd()], Some(Instant::now() + CLOSE_TIMEOUT));
                        if !self.over.is_set() {
                            self.finish(BROKEN);
                        }
                    }
                    (Sent::Partly, _) => {
                        let room = PollFd::new(&self.socket, PollFlags::OUT);
                        self.wait(room, Some(Instant::now() + CHECK));
                    }
                    (Sent::All, None | Some(Ok(1..) | Err(Errno::INTR))) => {}
                    (Sent::All, Some(Err(Errno::AGAIN))) if !ended => {
                        let fds = [
                            poll::input(&source),
                            source_ended.clone(),
                            self.over.poll_fd(),
                        ];
                        let [_, end, _] = poll::ready(fds, None);
                        // The source may have written something just before: look once more.
                        ended = !end.is_empty();
                    }
                    (Sent::All, Some(Ok(0) | Err(_))) => return self.end_source(),
                }
            }
        }

        /// A client's Close asks for the end. A relay's says how the child ended, and comes later.
        fn end_source(&self) {
            self.all_sent.store(true, Relaxed);
            if self.role == Role::Client {
                self.send_close(Some(CloseCode::Normal), "", || self.over.is_set());
            }
            self.news.set();
        }

        /// Takes one step with the half that sends. What the socket does not accept stays in the
        /// buffer.
        fn attempt(&self, step: impl FnOnce(&mut Sending) -> io::Result<()>) -> Sent {
            let mut sending = lock(&self.sending);
            let sent = match step(&mut sending) {
                Ok(()) => Sent::All,
                Err(e) if e.kind() == ErrorKind::WouldBlock => Sent::Partly,
                Err(_) => Sent::Broken,
            };

            let has_progressed = mem::take(&mut sending.has_progressed);
            let is_full = matches!(sent, Sent::Partly);
            let was_full = self.is_full.swap(is_full, Relaxed);
            // A peer that begins to be slow has its time from now on. One that takes some, or all,
            // is there.
            if was_full != is_full || was_full && has_progressed {
                self.note_alive();
            }
            sent
        }

        /// Sends a control frame after what is half sent, unless a Close came before it.
        fn control(&self, control: Control, payload: Bytes) -> Sent {
            self.attempt(|sending| {
                let is_needless = control == Control::Ping && sending.control.is_some();
                if !sending.closed && !is_needless {
                    sending.closed = control == Control::Close;
                    sending.control = Some((control, payload));
                }
                sending.flush()
            })
        }

        /// Sends a Close, after what is half sent, and waits at most `limit` until the peer has
        /// received everything. Then ends our side of the connection, and waits at most
        /// `CLOSE_TIMEOUT` for the peer to end its own.
        pub fn close(&self, code: Option<CloseCode>, reason: &str, limit: Duration) {
            let until = Instant::now() + limit;
            self.send_close(code, reason, || Instant::now() >= until);
            // The smallest buffer has room only when the peer has received all that it held.
            let _ = sockopt::set_socket_send_buffer_size(&self.socket, 0);
            let room = PollFd::new(&self.socket, PollFlags::OUT);
            while poll::ready([room.clone()], Some(until)) == [PollFlags::empty()]
                && Instant::now() < until
            {}
            poll::linger(&self.socket, CLOSE_TIMEOUT);
        }

        fn send_close(&self, code: Option<CloseCode>, reason: &str, gives_up: impl Fn() -> bool) {
            let reason = reason[..reason.floor_char_boundary(MAX_REASON_BYTES)].into();
            let frame = Frame::close(code.map(|code| CloseFrame { code, reason }));
            let mut sent = self.control(Control::Close, frame.into_payload());
            while matches!(sent, Sent::Partly) && !gives_up() {
                let room = PollFd::new(&self.socket, PollFlags::OUT);
                poll::ready([room], Some(Instant::now() + CHECK));
                sent = self.attempt(Sending::flush);
            }
        }
    }

    /// Ends the session if its thread panics.
    struct OverOnPanic<'a>(&'a Link);

    impl Drop for OverOnPanic<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.finish(FAILED);
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
        pub fn new(secs: u32) -> Keepalive {
            let interval = (secs > 0).then(|| Duration::from_secs(secs.into()));
            Keepalive {
                interval,
                next_ping: Instant::now() + interval.unwrap_or_default(),
            }
        }

        /// Sends a ping if it is time, and ends the session if the peer is gone. Returns when to
        /// call this again.
        pub fn check(&mut self, link: &Link) -> Option<Instant> {
            let interval = self.interval?;
            let now = Instant::now();

            if now >= self.next_ping {
                self.next_ping = now + interval;
                link.control(Control::Ping, Bytes::new());
            }

            let limit = *lock(&link.last_alive) + interval * KEEPALIVES;
            if now >= limit {
                link.finish(SILENT);
            }
            Some(limit.min(self.next_ping))
        }
    }
}

/// Reads a request head and writes a status; nothing else of HTTP (RFC 9110, RFC 9112, RFC 6455
/// section 4). Reads and writes the client's socket. Promises that every wait has a deadline,
/// that a head is never longer than 16 KiB, and that a refusal is one line, whatever the client
/// sent.
mod http {
    use crate::poll;
    use crate::text::quoted;
    use headers::HeaderMapExt;
    use headers::authorization::{Authorization, Basic, Bearer};
    use jwt_simple::reexports::ct_codecs::{Base64, Decoder};
    use rustix::buffer::spare_capacity;
    use std::fmt::Display;
    use std::io::{self, Write};
    use std::net::TcpStream;
    use std::time::{Instant, SystemTime};
    use tungstenite::handshake::derive_accept_key;
    use tungstenite::http::{Request, Version, header};

    /// This limits the length of a token, too.
    const MAX_HEAD_BYTES: usize = 16 << 10;
    const MAX_HEADERS: usize = 100;
    /// The part of X-Forwarded-For that is logged.
    const MAX_FORWARDED_BYTES: usize = 200;
    const WANTED: &str = "send an OIDC token, as a Bearer token or as the password of Basic";
    /// How other protocols begin that a proxy may be configured for, and what to do then: the
    /// PROXY protocol, versions 1 and 2, and TLS, by a record that holds a handshake.
    const OTHER_PROTOCOLS: [(&[u8], &str); 3] = [
        (
            b"PROXY ",
            "not the PROXY protocol; turn it off in the proxy",
        ),
        (
            b"\r\n\r\n\0\r\nQUIT\n",
            "not the PROXY protocol; turn it off in the proxy",
        ),
        (
            b"\x16",
            "not TLS; use ws://, or wss:// through a proxy that does TLS",
        ),
    ];

    /// The subprotocol (RFC 6455, section 1.9) by which the binary messages of each direction are
    /// one zstd stream (RFC 8878), of which each message is whole blocks.
    pub const COMPRESSED: &str = "nix-relay.zstd";
    /// Those that we speak, the preferred one first.
    const PROTOCOLS: [&str; 2] = [COMPRESSED, "binary"];

    /// A status, its words, and the header lines that belong to it.
    #[derive(Clone, Copy)]
    pub struct Status(pub u16, &'static str, &'static str);

    pub const OK: Status = Status(200, "OK", "");
    pub const BAD_REQUEST: Status = Status(400, "Bad Request", "");
    pub const NO_TOKEN: Status = Status(
        401,
        "Unauthorized",
        "WWW-Authenticate: Bearer realm=\"nix-relay\"\r\n",
    );
    pub const INVALID_TOKEN: Status = Status(
        401,
        "Unauthorized",
        "WWW-Authenticate: Bearer realm=\"nix-relay\", error=\"invalid_token\"\r\n",
    );
    pub const FORBIDDEN: Status = Status(403, "Forbidden", "");
    pub const NOT_FOUND: Status = Status(404, "Not Found", "");
    pub const ONLY_GET: Status = Status(405, "Method Not Allowed", "Allow: GET\r\n");
    pub const ONLY_GET_OR_HEAD: Status = Status(405, "Method Not Allowed", "Allow: GET, HEAD\r\n");
    pub const TIMEOUT: Status = Status(408, "Request Timeout", "");
    pub const UPGRADE_REQUIRED: Status = Status(
        426,
        "Upgrade Required",
        "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\n",
    );
    pub const HEAD_TOO_LARGE: Status = Status(431, "Request Header Fields Too Large", "");
    /// The client left before it had an answer. Nobody hears this; nginx logs the same number.
    pub const CLIENT_LEFT: Status = Status(499, "Client Closed Request", "");
    /// The header tells our client that this stays. A proxy's 502 may pass.
    pub const BAD_GATEWAY: Status = Status(502, "Bad Gateway", "Nix-Relay-Retry: no\r\n");
    pub const DRAINING: Status = Status(503, "Service Unavailable", "");
    pub const RETRY_LATER: Status = Status(503, "Service Unavailable", "Retry-After: 2\r\n");
    /// The second line tells our client to wait for longer.
    pub const FULL: Status = Status(
        503,
        "Service Unavailable",
        "Retry-After: 2\r\nNix-Relay-Queue: full\r\n",
    );

    /// Any answer but 101: a status, and one line that says what is wrong and what would mend it.
    pub struct Answer {
        pub status: Status,
        pub line: String,
        /// Logged, not sent.
        pub cause: String,
    }

    impl Answer {
        pub fn new(status: Status, line: &str) -> Answer {
            Answer {
                status,
                line: line.into(),
                cause: String::new(),
            }
        }

        /// Adds a cause that is logged, but not sent.
        pub fn because(mut self, cause: impl Display) -> Answer {
            self.cause = format!(": {cause}");
            self
        }

        /// Sends the answer, which is the last one on its connection.
        pub fn send(&self, mut socket: &TcpStream, with_body: bool) -> io::Result<()> {
            let date = httpdate::fmt_http_date(SystemTime::now());
            let length = self.line.len() + 1;
            let Status(code, words, headers) = self.status;
            let mut answer = format!(
                "HTTP/1.1 {code} {words}\r\nDate: {date}\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\
                 Content-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
            );
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
        pub fn read(socket: &TcpStream, deadline: Instant) -> Result<Option<Head>, Answer> {
            let mut bytes = Vec::with_capacity(MAX_HEAD_BYTES);
            while bytes.len() < MAX_HEAD_BYTES {
                if poll::readable(&socket, deadline) {
                    let more = rustix::io::read(socket, spare_capacity(&mut bytes)).unwrap_or(0);
                    let head = Head::parse(&bytes)?;
                    if head.is_some() || more == 0 {
                        return Ok(head);
                    }
                }
                if Instant::now() >= deadline {
                    return Err(Answer::new(
                        TIMEOUT,
                        "the request head did not come in time",
                    ));
                }
            }
            Err(Answer::new(
                HEAD_TOO_LARGE,
                "the request head is longer than 16 KiB",
            ))
        }

        /// Returns None if the head is not complete yet. tungstenite's own parser accepts
        /// nothing but GET, and we must answer HEAD, and 405 to other methods.
        pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Head>, Answer> {
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut parsed = httparse::Request::new(&mut headers);
            let length = match parsed.parse(bytes) {
                Ok(httparse::Status::Partial) => return Ok(None),
                Ok(httparse::Status::Complete(length)) => length,
                Err(e) => return Err(not_http(bytes, e)),
            };

            let version = match parsed.version {
                Some(1) => Version::HTTP_11,
                _ => Version::HTTP_10,
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
            if self.only(header::HOST)?.is_none() && self.request.version() != Version::HTTP_10 {
                return Err(Answer::new(BAD_REQUEST, "the request has no Host header"));
            }
            Ok(())
        }

        /// The value of a header that may not come twice. None if it is not there.
        fn only(&self, name: header::HeaderName) -> Result<Option<&str>, Answer> {
            let mut values = self.request.headers().get_all(&name).iter();
            let value = values
                .next()
                .map(|value| value.to_str().unwrap_or_default());
            if values.next().is_some() {
                let line = format!("the request has more than one {name} header");
                return Err(Answer::new(BAD_REQUEST, &line));
            }
            Ok(value)
        }

        /// The bytes of the 101, if this is a WebSocket upgrade (RFC 6455, section 4.2).
        pub fn upgrade_response(&self) -> Result<Vec<u8>, Answer> {
            let headers = self.request.headers();
            let length = self.only(header::CONTENT_LENGTH)?.unwrap_or("0");
            if length != "0" || headers.contains_key(header::TRANSFER_ENCODING) {
                return Err(Answer::new(BAD_REQUEST, "a WebSocket upgrade has no body"));
            }

            let key = self.only(header::SEC_WEBSOCKET_KEY)?.unwrap_or_default();
            let nonce = Base64::decode_to_vec(key, None).unwrap_or_default();
            let version = self.only(header::SEC_WEBSOCKET_VERSION)?;
            let wrong = if self.request.version() != Version::HTTP_11 {
                "the request is not HTTP/1.1"
            } else if !self.has(header::CONNECTION, "upgrade") {
                "Connection does not name Upgrade"
            } else if !self.has(header::UPGRADE, "websocket") {
                "Upgrade does not name websocket"
            } else if version != Some("13") {
                "Sec-WebSocket-Version is not 13"
            } else if nonce.len() != 16 {
                "Sec-WebSocket-Key is not 16 bytes in base64"
            } else {
                return Ok(self.switching_protocols(key));
            };
            let line =
                format!("expected a WebSocket upgrade, but {wrong}; does a proxy change it?");
            Err(Answer::new(UPGRADE_REQUIRED, &line))
        }

        fn switching_protocols(&self, key: &str) -> Vec<u8> {
            let accept = derive_accept_key(key.as_bytes());
            let protocol = match self.protocol() {
                "" => String::new(),
                name => format!("sec-websocket-protocol: {name}\r\n"),
            };
            let response = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                 sec-websocket-accept: {accept}\r\n{protocol}\r\n"
            );
            response.into_bytes()
        }

        /// The first of our subprotocols that the client offers, or nothing.
        pub fn protocol(&self) -> &'static str {
            let is_offered = |name: &&str| self.has(header::SEC_WEBSOCKET_PROTOCOL, name);
            PROTOCOLS.into_iter().find(is_offered).unwrap_or_default()
        }

        /// Whether a header, which is a comma-separated list across all its lines (RFC 9110,
        /// section 5.6.1), has this member.
        fn has(&self, name: header::HeaderName, member: &str) -> bool {
            let lines = self.request.headers().get_all(name).into_iter();
            let mut members = lines.flat_map(|line| line.to_str().unwrap_or_default().split(','));
            members.any(|found| found.trim_matches([' ', '\t']).eq_ignore_ascii_case(member))
        }

        /// What proxies say about where the request came from, as ` forwarded_for="…"` for the
        /// log, if they do. Proxies append, so we keep the end of the last line.
        pub fn forwarded_for(&self) -> Option<String> {
            let lines = self.request.headers().get_all("X-Forwarded-For");
            let last = String::from_utf8_lossy(lines.iter().next_back()?.as_bytes());
            let start = last.len().saturating_sub(MAX_FORWARDED_BYTES);
            let end = &last[last.ceil_char_boundary(start)..];
            Some(format!(" forwarded_for={}", quoted(end)))
        }

        /// The token from `Authorization: Bearer` (RFC 6750), or from `Basic` as its password (RFC
        /// 7617).
        pub fn token(&self) -> Result<String, Answer> {
            self.only(header::AUTHORIZATION)?;
            let headers = self.request.headers();
            let bearer = headers.typed_get::<Authorization<Bearer>>();
            let token = bearer.map(|bearer| bearer.token().to_owned()).or_else(|| {
                let basic = headers.typed_get::<Authorization<Basic>>()?;
                Some(basic.password().to_owned())
            });
            token.ok_or_else(|| Answer::new(NO_TOKEN, WANTED))
        }
    }

    /// The answer to bytes that are not a request head. Proxies are often configured for another
    /// protocol, so we name the likely ones.
    fn not_http(bytes: &[u8], error: impl Display) -> Answer {
        let known = OTHER_PROTOCOLS
            .iter()
            .find(|(start, _)| bytes.starts_with(start));
        let what = known.map_or(error.to_string(), |(_, what)| what.to_string());
        Answer::new(BAD_REQUEST, &format!("expected HTTP/1.1: {what}"))
    }
}

/// Turns defaults, file and environment into one validated `Config`. Reads the configuration file,
/// the environment, and the authorities that this names. Promises that everything in a
/// `Config` can be used as it is, and that an error says where it comes from.
mod config {
    use crate::web::{self, first_set, is_https_or_loopback};
    use regex_lite::Regex;
    use serde::{Deserialize, Serialize};
    use serde_json::Value as Json;
    use std::collections::BTreeMap;
    use std::fmt::{self, Display};
    use std::num::NonZeroU32;
    use std::ops::Deref;
    use std::path::PathBuf;
    use std::time::Duration;
    use std::{env, fs};
    use toml::de::{DeTable, DeValue, Deserializer, Error};
    use toml::{Table, Value};
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

    /// The others that we know: this module's own, and the client's.
    const OTHER_VARIABLES: [&str; 7] = [
        "NIX_RELAY_CONFIG",
        "NIX_RELAY_URL",
        "NIX_RELAY_TOKEN",
        "NIX_RELAY_TOKEN_COMMAND",
        "NIX_RELAY_RETRY_SECS",
        "NIX_RELAY_QUEUE_SECS",
        "NIX_RELAY_COMPRESS",
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
        /// All of it as TOML.
        #[serde(skip)]
        pub effective: String,
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
        pub extra_args: Vec<String>,
        pub timeout_secs: NonZeroU32,
        pub max_connections: NonZeroU32,
        pub queue_timeout_secs: QueueTimeout,
    }

    /// A rule as it is written.
    #[derive(Deserialize, Serialize, Clone)]
    #[serde(deny_unknown_fields)]
    struct WrittenRule {
        name: NonEmpty,
        issuer: Option<IssuerUrl>,
        audience: Option<NonEmpty>,
        bound_claims: BoundClaims,
        extra_args: Option<Vec<String>>,
        max_connections: Option<NonZeroU32>,
    }

    /// For each claim, the patterns of which one must match.
    type Patterns = BTreeMap<String, Vec<Regex>>;

    /// A rule with everything filled in that it leaves out.
    pub struct Rule {
        pub name: String,
        pub issuer: String,
        pub audience: String,
        pub bound_claims: Patterns,
        pub extra_args: Vec<String>,
        pub max_connections: NonZeroU32,
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

    /// At most as long as proxies and clients wait for an answer. A client asks again after it.
    const MAX_QUEUE_TIMEOUT_SECS: u32 = 30;

    #[derive(Deserialize, Serialize, Clone, Copy)]
    #[serde(try_from = "u32")]
    pub struct QueueTimeout(u32);

    impl TryFrom<u32> for QueueTimeout {
        type Error = String;

        fn try_from(secs: u32) -> Result<QueueTimeout, String> {
            match secs {
                0..=MAX_QUEUE_TIMEOUT_SECS => Ok(QueueTimeout(secs)),
                _ => Err(format!(
                    "expected at most {MAX_QUEUE_TIMEOUT_SECS}, not {secs}: clients ask again"
                )),
            }
        }
    }

    impl From<QueueTimeout> for u32 {
        fn from(timeout: QueueTimeout) -> u32 {
            timeout.0
        }
    }

    pub fn secs(secs: impl Into<u32>) -> Duration {
        Duration::from_secs(secs.into().into())
    }

    fn is_address(text: &str) -> bool {
        let authority = text.parse::<Authority>();
        authority.is_ok_and(|authority| {
            authority.port_u16().is_some() && !authority.host().is_empty() && !text.contains('@')
        })
    }

    /// Claims, and a pattern or a list of patterns for each.
    #[derive(Deserialize, Serialize, Clone)]
    #[serde(try_from = "BTreeMap<String, Json>")]
    struct BoundClaims(BTreeMap<String, Json>);

    impl TryFrom<BTreeMap<String, Json>> for BoundClaims {
        type Error = &'static str;

        fn try_from(claims: BTreeMap<String, Json>) -> Result<BoundClaims, &'static str> {
            let is_pattern =
                |value: &Json| value.is_string() || value.is_boolean() || value.is_i64();
            let is_bound = |patterns: &Json| {
                let patterns = values(patterns);
                !patterns.is_empty() && patterns.iter().all(is_pattern)
            };
            if !claims.is_empty() && claims.values().all(is_bound) {
                Ok(BoundClaims(claims))
            } else {
                Err(UNBOUND)
            }
        }
    }

    const UNBOUND: &str = "expected at least one claim, and for each a text, a whole number, a \
        boolean, or a list of these that is not empty: without any, everybody would be let in";

    /// The elements of a list, or the one value that it is.
    pub fn values(value: &Json) -> &[Json] {
        match value {
            Json::Array(several) => several,
            one => std::slice::from_ref(one),
        }
    }

    /// Compiles patterns: `**` matches any characters, `*` any characters but `/`, and everything
    /// else only itself. One that is too long for the library would match no token, and is left
    /// out.
    fn compile(claims: BoundClaims, flags: &str) -> Patterns {
        let regex = |pattern: &Json| {
            let text = pattern.as_str().map_or(pattern.to_string(), String::from);
            let literal = regex_lite::escape(&text);
            let pattern = literal.replace(r"\*\*", ".*").replace(r"\*", "[^/]*");
            Regex::new(&format!("^(?{flags}:{pattern})$")).ok()
        };
        let patterns = |(name, written): (String, Json)| {
            let patterns = values(&written).iter().filter_map(regex);
            (name, patterns.collect())
        };
        claims.0.into_iter().map(patterns).collect()
    }

    /// Applies defaults, file and environment, in that order. The file's path may come from the
    /// environment, too. An error begins with the file or the variable that it comes from.
    pub fn load(path: Option<&str>) -> Result<Config, String> {
        let variable = first_set(&["NIX_RELAY_CONFIG"]).map(|(_, path)| path);
        let path = path.map(String::from).or(variable);
        let text = path.as_ref().map_or(Ok(String::new()), fs::read_to_string);
        let name = path.unwrap_or("defaults".into());
        let text = text.map_err(|e| format!("{name}: {e}"))?;
        let invalid = |mut e: Error| {
            e.set_input(Some(&text));
            format!("{name}: {}", e.to_string().trim_end())
        };
        let mut settings = DeTable::parse(&text).map_err(invalid)?;
        let defaults = DeTable::parse(DEFAULTS).map_err(invalid)?;
        add_missing(settings.get_mut(), defaults.get_ref());
        let mut config = Config::deserialize(Deserializer::from(settings)).map_err(invalid)?;

        let words = |e: toml::ser::Error| e.to_string();
        for (variable, table, key) in VARIABLES {
            let text = env::var_os(variable).unwrap_or_default().into_string();
            let text = text.map_err(|_| format!("{variable}: expected UTF-8"))?;
            if !text.is_empty() {
                let mut settings = Table::try_from(&config).map_err(words)?;
                let setting = &mut settings[table][key];
                *setting = match setting {
                    Value::Array(_) => text.split_whitespace().collect::<Vec<_>>().into(),
                    // What is no number stays a text, and the error says so.
                    Value::Integer(_) => text.parse::<i64>().map_or(text.into(), Value::from),
                    _ => text.into(),
                };
                config = settings
                    .try_into()
                    .map_err(|e| format!("{variable}: {}", e.message()))?;
            }
        }
        web::check_environment()?;
        config.effective = toml::to_string(&config).map_err(words)?;
        config.rules = config.auth.rules(&config.daemon)?;
        Ok(config)
    }

    /// A sentence for each variable that looks like a setting of the relay and is none.
    pub fn warnings() -> impl Iterator<Item = String> {
        let known = |name: &str| {
            OTHER_VARIABLES.contains(&name) || VARIABLES.iter().any(|(known, ..)| *known == name)
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

    impl Auth {
        /// All rules, in the order in which they are tried. Fails if there are none, or if keys
        /// are given for an issuer that none is for.
        fn rules(&self, daemon: &Daemon) -> Result<Vec<Rule>, String> {
            let resolve = |rule: WrittenRule| Rule {
                name: rule.name.0,
                issuer: rule.issuer.unwrap_or(self.issuer.clone()).0,
                audience: rule.audience.unwrap_or(self.audience.clone()).0,
                bound_claims: compile(rule.bound_claims, "s"),
                extra_args: rule.extra_args.unwrap_or(daemon.extra_args.clone()),
                max_connections: rule.max_connections.unwrap_or(daemon.max_connections),
            };
            let mut rules: Vec<Rule> = self.rule.iter().cloned().map(resolve).collect();

            if !self.allowed_org.is_empty() {
                let owner = (
                    "repository_owner".into(),
                    self.allowed_org.to_string().into(),
                );
                rules.push(Rule {
                    name: "allowed_org".into(),
                    issuer: self.issuer.to_string(),
                    audience: self.audience.to_string(),
                    bound_claims: compile(BoundClaims([owner].into()), "si"),
                    extra_args: daemon.extra_args.clone(),
                    max_connections: daemon.max_connections,
                });
            }
            if rules.is_empty() {
                return Err(NOBODY.into());
            }
            for url in self.jwks_files.keys() {
                if rules.iter().all(|rule| rule.issuer != *url) {
                    return Err(format!(
                        "auth.jwks_files: no rule is for the issuer {url:?}"
                    ));
                }
            }
            Ok(rules)
        }
    }

    const NOBODY: &str = "nobody could connect: set auth.allowed_org (NIX_RELAY_ALLOWED_ORG) to \
        the organisation whose jobs may, or add a rule";
}

/// Counts what the relay does: one table, and its text for Prometheus (text format 0.0.4).
/// Promises that no label holds what a client chose.
mod metrics {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::time::Duration;

    /// A number that several threads change.
    pub struct Count(AtomicU64);

    impl Count {
        pub const fn new() -> Count {
            Count(AtomicU64::new(0))
        }

        pub fn add(&self, more: u64) {
            self.0.fetch_add(more, SeqCst);
        }

        pub fn get(&self) -> u64 {
            self.0.load(SeqCst)
        }

        /// Counts the caller until it drops the result. Returns None if there are `limit` already.
        pub fn enter(&self, limit: u64) -> Option<Entered<'_>> {
            let entered = Entered(self);
            (self.0.fetch_add(1, SeqCst) < limit).then_some(entered)
        }
    }

    /// Leaves the count when dropped.
    pub struct Entered<'a>(&'a Count);

    impl Drop for Entered<'_> {
        fn drop(&mut self) {
            self.0.0.fetch_sub(1, SeqCst);
        }
    }

    /// A metric, and its series: one for each value of its label, which exist from the start, as
    /// Prometheus sees no increase without a zero before it.
    pub struct Metric {
        /// Its help and its type, as lines.
        head: &'static str,
        pub values: &'static [&'static str],
        /// The names of its series, with their label.
        series: &'static [&'static str],
        /// What a count is divided by to be shown.
        unit: f64,
        counts: &'static [Count],
    }

    impl Metric {
        /// Adds to the series of this value. Ignores a value that it does not know.
        pub fn add(&self, value: &str, more: u64) {
            if let Some(index) = self.values.iter().position(|known| *known == value) {
                self.counts[index].add(more);
            }
        }

        /// The count of a metric without a label.
        pub fn count(&self) -> &Count {
            &self.counts[0]
        }
    }

    /// Defines the metrics, and the table of all. A row is the family's name, type and help, which
    /// only the first of a family has; then the start of each series' name, the values of its
    /// label, and the rest of the name: `nix_relay_bytes_total{direction="` `in` `"}`.
    macro_rules! table {
        ($($id:ident: $($family:literal $kind:literal $help:literal)?,
            $name:literal [$($value:expr),*] $end:literal $($unit:literal)?;)*) => {
            $(pub static $id: Metric = Metric {
                head: concat!($(
                    "# HELP nix_relay_", $family, " ", $help, "\n",
                    "# TYPE nix_relay_", $family, " ", $kind, "\n",
                )?),
                values: &[$($value),*],
                series: &[$(concat!("nix_relay_", $name, $value, $end)),*],
                unit: 1.0 $(* $unit)?,
                counts: {
                    static COUNTS: [Count; [$($value),*].len()] = [const { Count::new() }; _];
                    &COUNTS
                },
            };)*
            static TABLE: &[&Metric] = &[$(&$id),*];
        };
    }

    table! {
        BUILD_INFO: "build_info" "gauge" "The version of nix-relay.",
            "build_info{version=\"" [env!("CARGO_PKG_VERSION")] "\"}";
        BYTES: "bytes_total" "counter" "Payload from clients and to them.",
            "bytes_total{direction=\"" ["in", "out"] "\"}";
        JWKS_REFRESHES: "jwks_refreshes_total" "counter" "Fetches of an issuer's keys.",
            "jwks_refreshes_total{result=\"" ["ok", "error"] "\"}";
        REFUSALS: "refusals_total" "counter" "Connections that got this status, and no session.",
            "refusals_total{status=\""
            ["400", "401", "403", "404", "405", "408", "426", "431", "499", "502", "503"] "\"}";
        SESSIONS: "sessions_total" "counter" "Sessions that have ended, by why.",
            "sessions_total{reason=\""
            ["client-closed", "client-gone", "daemon-exited", "protocol-error", "relay-failed",
                "shutting-down", "timed-out"] "\"}";
        SESSIONS_ACTIVE: "sessions_active" "gauge" "Sessions that have begun and not ended.",
            "sessions_active" [""] "";
        SESSIONS_LIMIT: "sessions_limit" "gauge" "How many sessions there may be at once.",
            "sessions_limit" [""] "";
        SESSIONS_WAITING: "sessions_waiting" "gauge" "Clients that wait for a session.",
            "sessions_waiting" [""] "";
        SESSION_BUCKETS: "session_seconds" "histogram" "How long sessions took.",
            "session_seconds_bucket{le=\"" ["1", "10", "100", "1000", "10000", "+Inf"] "\"}";
        SESSION_SUM: , "session_seconds_sum" [""] "" 1000.0;
        SESSION_COUNT: , "session_seconds_count" [""] "";
    }

    /// Counts a session that has ended.
    pub fn add_session(reason: &str, length: Duration) {
        SESSIONS.add(reason, 1);
        SESSION_SUM.count().add(length.as_millis() as u64);
        SESSION_COUNT.count().add(1);
        for limit in SESSION_BUCKETS.values {
            if limit
                .parse()
                .is_ok_and(|limit: f64| length.as_secs_f64() <= limit)
            {
                SESSION_BUCKETS.add(limit, 1);
            }
        }
    }

    /// All metrics, as they are now.
    pub fn render() -> String {
        let mut text = String::new();
        for metric in TABLE {
            text += metric.head;
            for (series, count) in metric.series.iter().zip(metric.counts) {
                let value = count.get() as f64 / metric.unit;
                text += &format!("{series} {value}\n");
            }
        }
        text
    }
}

/// Requests to web servers: an issuer's documents, and a client's token. Promises that each step
/// of a request has a limit in time and each document one in length, that no redirect is
/// followed, and that no request for this machine goes to a proxy.
mod web {
    use cidr::IpInet;
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    use serde_json::Value;
    use std::net::IpAddr;
    use std::path::Path;
    use std::time::Duration;
    use std::{env, fmt, fs};
    use ureq::http::{HeaderMap, StatusCode, Uri, header};
    use ureq::tls::{Certificate, RootCerts, TlsConfig};
    use ureq::typestate::WithoutBody;
    use ureq::unversioned::resolver::Resolver;
    use ureq::unversioned::transport::DefaultConnector;
    use ureq::{Agent, Proxy, ProxyProtocol, RequestBuilder};

    pub const AGENT: &str = concat!("nix-relay/", env!("CARGO_PKG_VERSION"));
    /// A resolver asks a silent name server for 5 s, often twice, before it asks the next one.
    pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);
    /// ureq tries the addresses of a name in turn, and gives all of them this.
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// For each other step of a request.
    pub const STEP_TIMEOUT: Duration = Duration::from_secs(10);
    pub const MAX_DOCUMENT_BYTES: u64 = 1 << 20;
    /// For https, as curl reads them: the first that is set counts.
    const PROXIES: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    const NO_PROXY: [&str; 2] = ["no_proxy", "NO_PROXY"];
    pub const AUTHORITIES: [&str; 2] = ["SSL_CERT_FILE", "NIX_SSL_CERT_FILE"];

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

    /// The first of these variables that is set and not empty, and its value. Bytes that are not
    /// UTF-8 become U+FFFD.
    pub fn first_set(names: &[&'static str]) -> Option<(&'static str, String)> {
        let value = |name| {
            let value = env::var_os(name)?.to_string_lossy().into_owned();
            (!value.is_empty()).then_some(value)
        };
        names.iter().find_map(|&name| Some((name, value(name)?)))
    }

    /// Mozilla's authorities, which are compiled in, and those in SSL_CERT_FILE, or else in
    /// NIX_SSL_CERT_FILE. A file that is not there counts as empty: Nix's shells name one. Fails
    /// with a message if the file cannot be used.
    pub fn authorities() -> Result<Vec<Certificate<'static>>, String> {
        // One of them, TUBITAK's, may sign any name here, not only those below .tr. OpenSSL does
        // the same.
        let mozilla = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
        let mut all: Vec<_> = mozilla.map(|root| Certificate::from_der(root)).collect();
        let is_there = |path: &str| Path::new(path).try_exists().unwrap_or(true);
        let set = first_set(&AUTHORITIES).filter(|(_, path)| is_there(path));
        if let Some((name, path)) = set {
            let unusable = |cause: &dyn fmt::Display| format!("{name}={path}: {cause}");
            let pem = fs::read(&path).map_err(|e| unusable(&e))?;
            let count = all.len();
            let found = CertificateDer::pem_slice_iter(&pem);
            all.extend(
                found
                    .flatten()
                    .map(|one| Certificate::from_der(&one).to_owned()),
            );
            if all.len() == count {
                return Err(unusable(&"there is no certificate in it"));
            }
        }
        Ok(all)
    }

    /// The proxy for https to a host, as curl reads it from the environment. There is none for
    /// this machine, nor for what NO_PROXY names. Fails with a message if it cannot be used.
    pub fn proxy_for(host: &str, port: u16) -> Result<Option<Proxy>, String> {
        let Some((name, url)) = first_set(&PROXIES) else {
            return Ok(None);
        };
        let host = host.trim_matches(['[', ']', '.']).to_ascii_lowercase();
        let (_, list) = first_set(&NO_PROXY).unwrap_or_default();
        let mut entries = list.split([',', ' ', '\t']);
        if is_loopback(&host) || entries.any(|entry| covers(entry, &host, port)) {
            return Ok(None);
        }
        match Proxy::new(&url) {
            Ok(proxy) if proxy.protocol() == ProxyProtocol::Http => Ok(Some(proxy)),
            _ => Err(format!(
                "{name}: expected a proxy as http://HOST:PORT, or nothing"
            )),
        }
    }

    /// Whether an entry of NO_PROXY is for a host: `*`, a domain and all below it, an address, or
    /// a network, each perhaps with a port.
    fn covers(entry: &str, host: &str, port: u16) -> bool {
        let entry = match entry.rsplit_once(':') {
            Some((start, end)) if end.parse() == Ok(port) && !start.ends_with(':') => start,
            _ => entry,
        };
        let domain = entry
            .trim_matches(['[', ']', '*', '.'])
            .to_ascii_lowercase();
        let below = host.strip_suffix(&domain).filter(|_| !domain.is_empty());
        entry == "*"
            || match (host.parse(), domain.parse::<IpInet>()) {
                (Ok(address), network) => network.is_ok_and(|net| net.contains(&address)),
                _ => below.is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
            }
    }

    /// Fails with a message if authorities or a proxy in the environment cannot be used.
    pub fn check_environment() -> Result<(), String> {
        authorities()?;
        proxy_for("example.com", 443).map(drop)
    }

    type Request = RequestBuilder<WithoutBody>;

    /// The JSON at a URL. `prepare` completes the request. What is wrong with the answer or the
    /// environment is an `Other`.
    pub fn get_json(
        url: &str,
        resolver: impl Resolver,
        prepare: impl FnOnce(Request) -> Request,
    ) -> Result<Value, ureq::Error> {
        let other = |text: String| ureq::Error::Other(text.into());
        let uri: Uri = url.parse().unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        let proxy = proxy_for(host, uri.port_u16().unwrap_or(443)).map_err(other)?;
        let roots = RootCerts::from(authorities().map_err(other)?);
        let config = Agent::config_builder()
            .proxy(proxy)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_resolve(Some(LOOKUP_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_send_request(Some(STEP_TIMEOUT))
            .timeout_recv_response(Some(STEP_TIMEOUT))
            .timeout_recv_body(Some(STEP_TIMEOUT))
            .max_redirects(0)
            .accept_encoding("identity")
            .user_agent(AGENT);
        let connector = DefaultConnector::default();
        let agent = Agent::with_parts(config.build(), connector, resolver);
        let mut answer = prepare(agent.get(url)).call()?;
        check(answer.status(), answer.headers()).map_err(other)?;
        let body = answer.body_mut().with_config().limit(MAX_DOCUMENT_BYTES);
        let body = body.read_to_vec()?;
        let kind = text_of(answer.headers(), header::CONTENT_TYPE);
        parse_json(&body).map_err(|e| other(format!("not JSON, with Content-Type {kind:?}: {e}")))
    }

    /// Fails unless the answer has the body that was asked for.
    fn check(status: StatusCode, headers: &HeaderMap) -> Result<(), String> {
        let coding = text_of(headers, header::CONTENT_ENCODING);
        if status.is_redirection() {
            let target = text_of(headers, header::LOCATION);
            Err(format!(
                "status {status}, a redirect to {target:?}, which is not followed"
            ))
        } else if status != StatusCode::OK {
            Err(format!("status {status}"))
        } else if !["", "identity"].contains(&coding) {
            Err(format!(
                "Content-Encoding {coding:?}, though identity was asked for"
            ))
        } else {
            Ok(())
        }
    }

    /// The first value of a header, or nothing.
    pub fn text_of(headers: &HeaderMap, name: impl header::AsHeaderName) -> &str {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default()
    }

    /// Parses JSON, after a byte order mark if there is one (RFC 8259, section 8.1).
    pub fn parse_json(text: &[u8]) -> serde_json::Result<Value> {
        serde_json::from_slice(text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text))
    }
}

/// Waits for descriptors, by poll(2), and what threads share: events, semaphores, locks.
mod poll {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
    use std::io::{self, Read};
    use std::net::{Shutdown, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
    use std::time::{Duration, Instant};

    /// Something that happens, and that any number of threads can wait for: an eventfd(2).
    pub struct Event {
        fd: OwnedFd,
        happened: AtomicBool,
    }

    impl Event {
        /// Fails without descriptors.
        pub fn new() -> io::Result<Event> {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            Ok(Event {
                fd: eventfd(0, flags)?,
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

        /// For an event that may happen again. Only the thread that waits calls this, and looks at
        /// its condition again afterwards.
        pub fn reset(&self) {
            self.happened.store(false, SeqCst);
            let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        }

        /// To wait for this along with other things.
        pub fn poll_fd(&self) -> PollFd<'_> {
            input(&self.fd)
        }
    }

    /// A counting semaphore that poll(2) can wait for: an eventfd(2) whose value is how many
    /// permits are free.
    pub struct Semaphore(Arc<OwnedFd>);

    impl Semaphore {
        /// Fails without descriptors.
        pub fn new(permits: u32) -> io::Result<Semaphore> {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
            Ok(Semaphore(Arc::new(eventfd(permits, flags)?)))
        }

        /// Returns None if no permit is free.
        pub fn take(&self) -> Option<Permit> {
            rustix::io::read(&self.0, &mut [0; 8]).ok()?;
            Some(Permit(self.0.clone()))
        }

        /// Becomes readable when a permit is free.
        pub fn poll_fd(&self) -> PollFd<'_> {
            input(&self.0)
        }
    }

    /// One permit of a semaphore. It is given back when dropped.
    pub struct Permit(Arc<OwnedFd>);

    impl Drop for Permit {
        fn drop(&mut self) {
            let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
        }
    }

    /// For a wait until a descriptor is readable.
    pub fn input(fd: &impl AsFd) -> PollFd<'_> {
        PollFd::new(fd, PollFlags::IN)
    }

    /// Waits until a descriptor is readable or broken. Returns false at the deadline, or
    /// earlier; callers loop.
    pub fn readable(fd: &impl AsFd, until: Instant) -> bool {
        let [ready] = ready([input(fd)], Some(until));
        !ready.is_empty()
    }

    /// Waits until a descriptor is ready for its events or broken, at most until `until`.
    /// Returns what each one is ready for. May return early, for example on a signal; callers
    /// loop.
    pub fn ready<const N: usize>(
        mut fds: [PollFd<'_>; N],
        until: Option<Instant>,
    ) -> [PollFlags; N] {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        // This fails on a signal and when memory is short. Both pass.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        fds.map(|fd| fd.revents())
    }

    /// Ends our side of a connection, and waits at most `limit` for the peer to end its own.
    /// Reads what the peer still sends: if it were left unread, the kernel would send a reset,
    /// which can overtake our last words.
    pub fn linger(mut socket: &TcpStream, limit: Duration) {
        let until = Instant::now() + limit;
        let mut open = socket.shutdown(Shutdown::Write).is_ok();
        while open && Instant::now() < until {
            if readable(&socket, until) {
                open = !matches!(socket.read(&mut [0; 4096]), Ok(0));
            }
        }
    }

    /// A panic elsewhere must not cause another here. What these locks protect is valid at any
    /// time.
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Text that somebody else chose, made fit for a log, a terminal or a message.
mod text {
    /// How much of a text in the log somebody else may choose, as it stands there.
    const MAX_QUOTED_BYTES: usize = 400;

    /// Prepares a text for the log that a client or an issuer chose: quoted, escaped, and then
    /// cut short. An escape may be cut as well, so what follows the cut must not complete one.
    pub fn quoted(text: &str) -> String {
        let mut quoted = format!("{text:?}");
        if quoted.len() > MAX_QUOTED_BYTES {
            quoted.truncate(quoted.floor_char_boundary(MAX_QUOTED_BYTES));
            quoted += "…\"";
        }
        quoted
    }

    /// Removes terminal escapes (ECMA-48) and other control characters.
    pub fn without_escapes(text: &str) -> String {
        let mut plain = strip_ansi_escapes::strip_str(text);
        plain.retain(|char| !char.is_control() || char == '\t');
        plain
    }
}

//! Daemons that end, fail, or will not end: what the client hears of it, and that nothing is left.

use crate::support::*;
use rustix::net::sockopt;
use std::io::{ErrorKind, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// A relay for one session at a time, whose daemon is this script.
struct Stage {
    issuer: Issuer,
    relay: Relay,
    before: (usize, usize),
}

fn stage(script: &str) -> Stage {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "5");
    let relay = setup.set("KEEPALIVE_SECS", "1").daemon(script).start();
    let before = relay.at_rest();
    Stage {
        issuer,
        relay,
        before,
    }
}

impl Stage {
    fn connect(&self) -> Client {
        self.relay.connect(&self.issuer.token())
    }

    /// All output of a session whose daemon ends by itself, and its Close.
    fn session(&self) -> (Vec<u8>, u16, String) {
        let mut client = self.connect();
        let end = client.until_close();
        client.close();
        end
    }

    /// The first session has left no process, thread or descriptor, and its permit is back.
    fn nothing_is_left(&self) {
        self.relay.log.wait("session ended session=1 ");
        self.relay.back_to(self.before);
        drop(self.connect());
    }
}

#[test]
fn all_output_comes_before_the_close() {
    let stage = stage("head -c 5000000 /dev/zero; echo end");
    let (data, code, reason) = stage.session();
    assert_eq!((data.len(), &data[5_000_000..]), (5_000_004, &b"end\n"[..]));
    assert_eq!((code, reason.as_str()), (1000, ""));
    stage.relay.log.wait(" reason=daemon-exited detail=\"\" ");
    stage.nothing_is_left();
}

/// Much of its output is still on its way when the daemon is long gone. The client reads 400 KiB in a second, and sends
/// a ping so often.
fn all_output_comes_slowly(keepalive_secs: &str, length: usize, between_pings: Duration) {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer).set("KEEPALIVE_SECS", keepalive_secs);
    let setup = setup.daemon(&format!("exec head -c {length} /dev/zero"));
    let relay = setup.start();
    let before = relay.at_rest();
    let stream = relay.tcp();
    sockopt::set_socket_recv_buffer_size(&stream, 64 << 10).unwrap();
    let mut client = open(stream, &issuer.token()).unwrap();
    let mut read = 0;
    let mut last_ping = Instant::now();
    let (code, reason) = loop {
        match client.0.read() {
            Ok(Message::Binary(bytes)) => {
                read += bytes.len();
                thread::sleep(Duration::from_secs(1) * bytes.len() as u32 / (400 << 10));
                if last_ping.elapsed() >= between_pings {
                    last_ping = Instant::now();
                    let _ = client.0.get_mut().write_all(&frame(0x89, b"ping"));
                }
            }
            Ok(Message::Close(close)) => {
                let close = close.unwrap();
                break (u16::from(close.code), close.reason.to_string());
            }
            Ok(_) => {}
            Err(e) => panic!("{e} after {read} bytes"),
        }
    };
    assert_eq!((read, code, reason.as_str()), (length, 1000, ""));
    client.close();
    relay.back_to(before);
}

/// What a client sends all the time must not make the end of the connection come before the output.
#[test]
fn all_output_comes_however_slowly_it_is_read() {
    all_output_comes_slowly("30", 2_600_000, Duration::ZERO);
}

/// That it takes something is sign of life enough, while it has something to take.
#[test]
fn all_output_comes_to_a_client_that_says_nothing() {
    all_output_comes_slowly("1", 6_000_000, Duration::MAX);
}

/// Nor is it in a hurry because it said nothing for a while.
#[test]
fn all_output_comes_to_a_client_that_says_little() {
    all_output_comes_slowly("1", 2_600_000, Duration::from_secs(5));
}

/// Without keepalives, no silence is too long.
#[test]
fn all_output_comes_without_keepalives() {
    all_output_comes_slowly("0", 2_600_000, Duration::from_secs(3));
}

#[test]
fn a_failure_has_status_and_last_line() {
    let stage = stage("echo output; echo first >&2; printf 'last line' >&2; exit 7");
    let (data, code, reason) = stage.session();
    assert_eq!((data.as_slice(), code), (&b"output\n"[..], 1011));
    assert_eq!(reason, "nix-daemon ended with exit status: 7: last line");
    stage
        .relay
        .log
        .wait("nix-daemon says session=1 line=\"first\"");
    stage.nothing_is_left();
}

/// 38 bytes stand before the line, so that one of these is cut inside a character, were it not for us.
#[test]
fn a_long_reason_is_cut_between_characters() {
    let line = "ä".repeat(100);
    for (first, length) in [("", 122), ("x", 123)] {
        let (_, code, reason) = stage(&format!("echo '{first}{line}' >&2; exit 7")).session();
        let whole = format!("nix-daemon ended with exit status: 7: {first}{line}");
        assert_eq!((code, reason.as_str()), (1011, &whole[..length]));
    }
}

/// What a terminal would take for a command is for nobody: neither in the log nor in the Close.
#[test]
fn a_reason_in_colours() {
    let line =
        "\\033[31;1merror:\\033[0m \\033]8;;http://a\\033\\\\it\\033]8;;\\007 is \\033(Bred\\007";
    let stage = stage(&format!("printf '{line}\\n' >&2; exit 1"));
    let (_, code, reason) = stage.session();
    let expected = "nix-daemon ended with exit status: 1: error: it is red";
    assert_eq!((code, reason.as_str()), (1011, expected));
    stage
        .relay
        .log
        .wait("nix-daemon says session=1 line=\"error: it is red\"");
    stage.nothing_is_left();
    assert!(!stage.relay.log.text().contains("[31"));
}

/// Not what comes behind it to end a colour, a paragraph or a drawing.
#[test]
fn the_reason_is_the_last_line_with_words_in_it() {
    let long = format!("the reason {}", "x".repeat(5000));
    for lines in [
        r"first\nthe reason\n\n",
        r"first\nthe reason\n  \t\r\n",
        r"first\nthe reason\n\033[0m\n",
        r"first\nthe reason\n\033[0m",
        r"first\nthe reason\n  }\n---\n",
        r"first\r\nthe reason\r\n",
        // Of more than 4 KiB, of which the log has two lines and the second is no beginning.
        &format!(r"first\n{long}\n"),
        &long,
    ] {
        let (_, code, reason) = stage(&format!("printf '{lines}' >&2; exit 1")).session();
        let is_it = reason.starts_with("nix-daemon ended with exit status: 1: the reason");
        assert!(code == 1011 && is_it, "{lines:.60}: {reason}");
        assert!(!reason.contains(char::is_control), "{reason:?}");
    }
}

#[test]
fn killed_by_a_signal() {
    let stage = stage("kill -9 $$");
    let (_, code, reason) = stage.session();
    assert!(
        code == 1011 && reason.starts_with("nix-daemon ended with signal: 9 (SIGKILL)"),
        "{reason}"
    );
    stage.nothing_is_left();
}

#[test]
fn a_daemon_that_does_not_exist() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer)
        .set("MAX_CONNECTIONS", "1")
        .set("QUEUE_TIMEOUT_SECS", "1");
    let relay = setup.set("DAEMON_PATH", "/nonexistent/daemon").start();
    let before = relay.at_rest();
    for _ in 0..3 {
        // The permit is back each time: there would be a 503 without it.
        let answer = relay.upgrade(&format!("Authorization: Bearer {}\r\n", issuer.token()));
        assert!(
            answer.starts_with("HTTP/1.1 502 ") && !answer.contains("nonexistent"),
            "{answer}"
        );
    }
    relay
        .log
        .wait("log has the cause: /nonexistent/daemon: No such file");
    let text = relay.log.text();
    let warning = " each session will be answered 502: /nonexistent/daemon: No such file";
    assert!(text.contains(warning), "{text}");
    relay.back_to(before);
}

/// As root we have more than we need; as somebody else perhaps less.
#[test]
fn a_user_from_whom_the_socket_of_nix_is_kept() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let copy = dir.path("relay").display().to_string();
    let root = Relay::start(&issuer).log.text();
    let relay = Setup::new(&issuer).under(&format!(
        "install -m 755 \"$0\" {copy}
         exec unshare --mount bash -c 'mount -t tmpfs none /nix
           mkdir -p /nix/var/nix && mkdir -m 700 /nix/var/nix/daemon-socket
           exec setpriv --reuid=1 --clear-groups {copy}'"
    ));
    let other = relay.start().log.text();
    for (warning, of_root) in [("running as root", true), ("socket is closed to", false)] {
        assert!(root.contains(warning) == of_root, "{root}");
        assert!(other.contains(warning) != of_root, "{other}");
    }
}

#[test]
fn a_daemon_that_never_reads() {
    let stage = stage("exec sleep 1000");
    let mut client = stage.connect();
    // Until nothing more goes: pipe, relay and both sockets are full.
    client
        .0
        .get_ref()
        .set_write_timeout(Some(LIMIT / 60))
        .unwrap();
    let message = frame(0x82, &[0; 1 << 20]);
    let full = (0..1000).find_map(|_| client.0.get_mut().write_all(&message).err());
    assert_eq!(full.map(|e| e.kind()), Some(ErrorKind::WouldBlock));
    drop(client);
    stage
        .relay
        .log
        .wait("session ended session=1 reason=client-gone ");
    stage.nothing_is_left();
}

#[test]
fn a_daemon_that_ignores_sigterm() {
    let stage = stage("trap '' TERM; echo ready; exec sleep 1000");
    let mut client = stage.connect();
    client.receive_exactly(6);
    let closed = Instant::now();
    // Its own Close comes when the daemon is gone.
    client.close();
    stage
        .relay
        .log
        .wait("session ended session=1 reason=client-closed ");
    let secs = closed.elapsed().as_secs_f64();
    assert!(
        (14.0..19.0).contains(&secs),
        "killed after {secs} s, not 15"
    );
    let signals = stage
        .relay
        .log
        .text()
        .matches("outlives its session session=1 ")
        .count();
    assert_eq!(signals, 2, "TERM and KILL");
    stage
        .relay
        .log
        .wait("exit=\"nix-daemon ended with signal: 9 (SIGKILL)\"");
    stage.nothing_is_left();
}

/// A daemon that does end when its standard input does, hears no signal.
#[test]
fn a_daemon_that_cleans_up_has_the_time_to() {
    let stage = stage("cat >/dev/null; sleep 3; echo 'cleaned up' >&2");
    stage.connect().close();
    stage
        .relay
        .log
        .wait("exit=\"nix-daemon ended with exit status: 0\"");
    assert!(stage.relay.log.text().contains("line=\"cleaned up\""));
    assert!(!stage.relay.log.text().contains("outlives"));
    stage.nothing_is_left();
}

#[test]
fn a_grandchild_that_keeps_stdout_open() {
    let stage = stage("sleep 1000 & echo output");
    assert_eq!(stage.session(), (b"output\n".to_vec(), 1000, String::new()));
    stage.nothing_is_left();
}

/// Nor is one left that keeps no pipe open.
#[test]
fn a_grandchild_outlives_nobody() {
    let mark = format!("MARK=grandchild-{}", std::process::id());
    let stage = stage(&format!(
        "{mark} sleep 1000 <&- >&- 2>&- & read line; exit 0"
    ));
    let mut client = stage.connect();
    eventually("it is there", LIMIT, || anyone_with(&mark));
    client.send("line\n");
    assert_eq!(client.until_close(), (vec![], 1000, String::new()));
    client.close();
    eventually("it is gone", LIMIT, || !anyone_with(&mark));
    stage.nothing_is_left();
}

/// Nor by the daemon that the relay starts to see whether it can, and kills, even if that has ended by then: beside busy
/// threads, it often has.
#[test]
fn what_the_start_leaves_behind() {
    let mark = format!("MARK=start-{}", std::process::id());
    let script = format!("{mark} sleep 1000 <&- >&- 2>&- & exit 0");
    let issuer = Issuer::start();
    let started = AtomicBool::new(false);
    let busy = || {
        while !started.load(Relaxed) {
            std::hint::spin_loop()
        }
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(busy);
        }
        let start = |_| drop(Setup::new(&issuer).daemon(&script).start());
        (0..15).for_each(start);
        started.store(true, Relaxed);
    });
    eventually("it is gone", LIMIT, || !anyone_with(&mark));
}

/// A process of another group is not ours to kill, but no reason to go on.
#[test]
fn a_grandchild_that_has_left_the_group() {
    let stage = stage("setsid sh -c 'echo $$; exec sleep 1000' & read line");
    let mut client = stage.connect();
    let id = String::from_utf8(client.receive()).unwrap();
    client.send("line\n");
    assert_eq!(client.until_close(), (vec![], 1000, String::new()));
    client.close();
    signal("KILL", id.trim().parse().unwrap());
    stage.nothing_is_left();
}

#[test]
fn a_daemon_that_closes_stdout_and_lives_on() {
    let stage = stage("echo output; exec sleep 1000 >&-");
    let (data, code, _) = stage.session();
    assert_eq!((data.as_slice(), code), (&b"output\n"[..], 1011));
    stage
        .relay
        .log
        .wait("exit=\"nix-daemon ended with signal: 15 (SIGTERM)\"");
    stage.nothing_is_left();
}

#[test]
fn much_on_stderr() {
    let stage = stage("head -c 104857600 /dev/zero | tr '\\0' x >&2; echo output; exit 3");
    let (data, code, reason) = stage.session();
    assert_eq!((data.as_slice(), code), (&b"output\n"[..], 1011));
    assert!(
        reason.starts_with("nix-daemon ended with exit status: 3: xxx"),
        "{reason}"
    );
    assert!(
        stage.relay.peak_memory() < 64,
        "{} MiB",
        stage.relay.peak_memory()
    );
    stage.nothing_is_left();
    let text = stage.relay.log.text();
    assert_eq!(
        text.matches("session=1 line=\"xxx").count(),
        25600,
        "lines of 4 KiB"
    );
    assert!(text.lines().all(|line| line.len() < 4096 + 100));
}

#[test]
fn a_daemon_that_dies_while_input_is_coming() {
    let stage = stage("head -c 10; echo enough >&2; exit 3");
    let mut client = stage.connect();
    let mut socket = client.0.get_ref().try_clone().unwrap();
    let message = frame(0x82, &[b'x'; 100_000]);
    let writer = thread::spawn(move || while socket.write_all(&message).is_ok() {});
    let end = client.until_close();
    assert_eq!(
        end,
        (
            vec![b'x'; 10],
            1011,
            "nix-daemon ended with exit status: 3: enough".into()
        )
    );
    // The writer does not care, and is cut off.
    writer.join().unwrap();
    stage.nothing_is_left();
}

#[test]
fn what_a_daemon_finds_around_it() {
    let issuer = Issuer::start();
    let script = "echo pwd=$(pwd) group=$(cut -d' ' -f5 /proc/$$/stat) id=$$; ls -l /proc/$$/fd";
    let (data, ..) = Setup::new(&issuer)
        .daemon(script)
        .start()
        .connect(&issuer.token())
        .until_close();
    let text = String::from_utf8(data).unwrap();
    for gone in ["socket:", "pidfd", "eventfd"] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
    let line = text.lines().find(|line| line.starts_with("pwd=")).unwrap();
    let (group, id) = line
        .strip_prefix("pwd=/ group=")
        .unwrap()
        .split_once(" id=")
        .unwrap();
    assert_eq!(group, id, "a group of its own");
}

/// What it needs, and nothing else that the relay or its container was given.
#[test]
fn the_environment_of_a_daemon() {
    let dir = Dir::new();
    let certificate = dir.path("certificate").display().to_string();
    let made = Command::new("openssl")
        .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes".split(' '))
        .args(["-config", "/dev/null", "-subj", "/CN=ca", "-keyout"])
        .args(["/dev/null", "-out", &certificate])
        .output();
    assert!(made.unwrap().status.success());
    let kept = [
        ("HOME", "/home"),
        ("USER", "a"),
        ("LOGNAME", "b"),
        ("SHELL", "/bin/c"),
        ("LANG", "C"),
        ("LC_ALL", "C"),
        ("LC_TIME", "d"),
        ("LOCALE_ARCHIVE", "/e"),
        ("TZ", "UTC"),
        ("TMPDIR", "/f"),
        ("XDG_CACHE_HOME", "/g"),
        ("GC_NPROCS", "1"),
        ("NIX_CONFIG", "cores = 1"),
        ("NIX_REMOTE", "h"),
        ("SSL_CERT_FILE", &*certificate),
        ("SSL_CERT_DIR", "/etc/ssl/certs"),
        ("NIX_SSL_CERT_FILE", "/i"),
        ("http_proxy", "http://127.0.0.1:1"),
        ("https_proxy", "http://127.0.0.1:2"),
        ("all_proxy", "http://127.0.0.1:3"),
        ("no_proxy", "localhost"),
        ("HTTP_PROXY", "http://127.0.0.1:4"),
        ("HTTPS_PROXY", "http://127.0.0.1:5"),
        ("ALL_PROXY", "http://127.0.0.1:6"),
        ("NO_PROXY", "127.0.0.1"),
    ];
    let gone = [
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("GITLAB_OIDC_TOKEN", "secret"),
        ("CIRCLE_OIDC_TOKEN_V2", "secret"),
        ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret"),
        ("NIX_RELAY_TOKEN", "secret"),
        ("CREDENTIALS_DIRECTORY", "/run/secret"),
        ("LISTEN_FDS", "1"),
        ("LISTEN_PID", "1"),
        ("NOTIFY_SOCKET", "/run/x"),
        ("INVOCATION_ID", "x"),
        ("JOURNAL_STREAM", "1:2"),
        ("RUST_LOG", "info"),
        ("LD_PRELOAD", ""),
        ("ENV", "x"),
        ("MINE", "x"),
    ];
    let issuer = Issuer::start();
    let mut setup = Setup::new(&issuer).set("DAEMON_PATH", "env");
    for (name, value) in kept.iter().chain(&gone) {
        setup = setup.env(name, value);
    }
    let relay = setup.config("daemon.extra_args = []").start();
    let (data, ..) = relay.connect(&issuer.token()).until_close();
    let text = String::from_utf8(data).unwrap();
    let mut found: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with("PATH="))
        .collect();
    assert_eq!(found.len() + 1, text.lines().count(), "no PATH: {text}");
    let mut expected: Vec<_> = kept
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    // What the tests themselves run under may have more of these.
    let mine = |line: &&str| expected.iter().any(|kept| kept == line);
    found.retain(|line| mine(line) || !may_stay(line));
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Whether a variable is of a kind that is kept.
fn may_stay(line: &str) -> bool {
    let kinds = ["LC_", "XDG_", "GC_", "NIX_"];
    kinds.iter().any(|kind| line.starts_with(kind)) && !line.starts_with("NIX_RELAY_")
}

#[test]
fn what_a_daemon_is_told() {
    let issuer = Issuer::start();
    let setup = Setup::new(&issuer).daemon("for a; do echo \"[$a]\"; done");
    let relay = setup.set("EXTRA_ARGS", "--stdio  --option=x").start();
    let (data, ..) = relay.connect(&issuer.token()).until_close();
    assert_eq!(
        String::from_utf8(data).unwrap(),
        "[--stdio]\n[--option=x]\n"
    );
}

/// A child inherits that SIGCHLD is ignored, and the kernel would then reap the child's own children.
#[test]
fn a_relay_that_was_started_with_sigchld_ignored() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer)
        .daemon("exit 3")
        .under("trap '' CHLD")
        .start();
    let (_, code, reason) = relay.connect(&issuer.token()).until_close();
    assert_eq!(code, 1011);
    assert_eq!(
        reason,
        "nix-daemon ended with exit status: 3: it gave no reason"
    );
}

/// Whether it gets the permit or not, the next one does.
#[test]
fn a_permit_for_a_client_that_hangs_up() {
    let stage = stage("exec cat");
    for round in 0..40 {
        let holder = stage.connect();
        let mut waiting = stage.relay.tcp();
        let token = format!("Authorization: Bearer {}\r\n", stage.issuer.token());
        let request = upgrade_request(&token);
        waiting.write_all(request.as_bytes()).unwrap();
        // It waits by then, mostly; and the permit comes a moment after the holder has gone.
        thread::sleep(Duration::from_millis(20));
        drop(holder);
        thread::sleep(Duration::from_micros(250) * round);
        drop(waiting);
    }
    let mut client = stage.connect();
    client.send("served");
    assert_eq!(client.receive(), b"served");
    drop(client);
    stage.relay.back_to(stage.before);
}

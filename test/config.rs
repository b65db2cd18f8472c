//! Configuration: every key and variable, which of them wins, and what is refused.

use crate::support::*;
use std::ffi::OsStr;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output};
use toml::{Table, Value};

/// A key, its variable, its default, another value for it in TOML, and a third one as text and as TOML.
const KEYS: [(&str, &str, &str, &str, &str, &str); 14] = [
    (
        "server.listen",
        "NIX_RELAY_LISTEN",
        "'0.0.0.0:8080'",
        "'127.0.0.1:1'",
        "[::1]:65535",
        "'[::1]:65535'",
    ),
    (
        "server.admin_listen",
        "NIX_RELAY_ADMIN_LISTEN",
        "''",
        "'127.0.0.1:1'",
        "[::1]:65535",
        "'[::1]:65535'",
    ),
    (
        "server.shutdown_grace_secs",
        "NIX_RELAY_SHUTDOWN_GRACE_SECS",
        "30",
        "0",
        "7",
        "7",
    ),
    (
        "server.handshake_timeout_secs",
        "NIX_RELAY_HANDSHAKE_TIMEOUT_SECS",
        "10",
        "1",
        "7",
        "7",
    ),
    (
        "server.keepalive_secs",
        "NIX_RELAY_KEEPALIVE_SECS",
        "30",
        "60",
        "0",
        "0",
    ),
    (
        "auth.issuer",
        "NIX_RELAY_ISSUER",
        "'https://token.actions.githubusercontent.com'",
        "'https://gitlab.example.com'",
        "http://127.0.0.1:8000/x",
        "'http://127.0.0.1:8000/x'",
    ),
    (
        "auth.audience",
        "NIX_RELAY_AUDIENCE",
        "'api://nix-relay'",
        "'https://relay.example.com'",
        "a b",
        "'a b'",
    ),
    // Without it nobody could connect; so this one is always given.
    (
        "auth.allowed_org",
        "NIX_RELAY_ALLOWED_ORG",
        "'given'",
        "'org'",
        "5",
        "'5'",
    ),
    (
        "auth.jwks_cache_ttl_secs",
        "NIX_RELAY_JWKS_CACHE_TTL_SECS",
        "3600",
        "60",
        "7",
        "7",
    ),
    (
        "daemon.nix_daemon_path",
        "NIX_RELAY_DAEMON_PATH",
        "'nix-daemon'",
        "'/nix/bin/nix-daemon'",
        "nix-daemon2",
        "'nix-daemon2'",
    ),
    (
        "daemon.extra_args",
        "NIX_RELAY_EXTRA_ARGS",
        "['--stdio']",
        "['--stdio', 'a b']",
        "--stdio  --debug",
        "['--stdio', '--debug']",
    ),
    (
        "daemon.timeout_secs",
        "NIX_RELAY_TIMEOUT_SECS",
        "3600",
        "60",
        "4294967295",
        "4294967295",
    ),
    (
        "daemon.max_connections",
        "NIX_RELAY_MAX_CONNECTIONS",
        "32",
        "1",
        "1000",
        "1000",
    ),
    (
        "daemon.queue_timeout_secs",
        "NIX_RELAY_QUEUE_TIMEOUT_SECS",
        "30",
        "20",
        "0",
        "0",
    ),
];

fn value(toml: &str) -> Value {
    format!("x = {toml}").parse::<Table>().unwrap()["x"].clone()
}

/// `--check`, with an organisation.
fn check() -> Command {
    let mut command = binary();
    command.arg("--check").env("NIX_RELAY_ALLOWED_ORG", "given");
    command
}

/// The effective configuration.
fn effective(command: &mut Command) -> Table {
    let output = command.output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{stdout}");
    stdout.parse().unwrap_or_else(|e| panic!("{e}\n{stdout}"))
}

/// Exit 2, nothing on stdout, and what stderr says.
fn error(command: &mut Command) -> String {
    let (status, stdout, stderr) = code_and_texts(command);
    assert_eq!((status, &*stdout), (Some(2), ""), "{stderr}");
    assert!(
        stderr.starts_with("nix-relay: ") && stderr.ends_with('\n'),
        "{stderr}"
    );
    stderr
}

fn code_and_texts(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    (
        status.code(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

#[test]
fn environment_beats_file_beats_default() {
    let dir = Dir::new();
    let defaults = effective(&mut check());
    let printed: usize = defaults
        .values()
        .map(|table| table.as_table().unwrap().len())
        .sum();
    assert_eq!(printed, KEYS.len(), "a key that is not tested: {defaults}");
    for (key, variable, default, in_file, text, as_toml) in KEYS {
        let (table, name) = key.split_once('.').unwrap();
        let file = dir.write("config.toml", &format!("[{table}]\n{name} = {in_file}\n"));
        let with = |variable: &str, text: &str| {
            let mut command = check();
            if name == "allowed_org" {
                command.env_remove("NIX_RELAY_ALLOWED_ORG");
            }
            effective(command.arg(&file).env(variable, text))[table][name].clone()
        };
        assert_eq!(
            defaults[table][name],
            value(default),
            "the default of {key}"
        );
        assert_eq!(with("UNRELATED", ""), value(in_file), "{key} in a file");
        assert_eq!(with(variable, text), value(as_toml), "{variable}");
        assert_eq!(with(variable, ""), value(in_file), "an empty {variable}");
        let alone = effective(check().env(variable, text))[table][name].clone();
        assert_eq!(alone, value(as_toml), "{variable} without a file");
    }
}

#[test]
fn what_check_prints_is_a_configuration_with_the_same_effect() {
    let dir = Dir::new();
    let mut command = binary();
    let mut text = String::new();
    for (key, _, _, in_file, _, _) in KEYS {
        text += &format!("{key} = {in_file}\n");
    }
    let published = json!({"keys": issuer::published()}).to_string();
    let keys = dir.write("keys.json", &published);
    text += "[[auth.rule]]\nname = 'a'\nbound_claims = { ref = ['a', 5], x = true }\n";
    text += "[[auth.rule]]\nname = 'b'\nissuer = 'https://example.com'\nbound_claims.ref = 'b'\nextra_args = []\nmax_connections = 3\n";
    text += &format!(
        "[auth.jwks_files]\n'https://example.com' = '{}'\n",
        keys.display()
    );
    let first = effective(command.arg("--check").arg(dir.write("1.toml", &text)));
    let second = dir.write("2.toml", &first.to_string());
    assert_eq!(effective(binary().arg("--check").arg(second)), first);
}

#[test]
fn errors_in_a_file() {
    let dir = Dir::new();
    let rows = [
        ("[server]\n\nlissten = 1", "3", "server.lissten"),
        ("\nserver.lissten = 1", "2", "server.lissten"),
        ("server = { lissten = 1 }", "1", "server.lissten"),
        (
            "[server]\nlisten = '0.0.0.0:1'\n[server.tls]\nkey = 1",
            "3",
            "server.tls",
        ),
        (
            "[daemon]\ntimeout_secs = 1\n\n[sever]\nlisten = 1",
            "4",
            "sever",
        ),
        ("# comment\nlisten = '0.0.0.0:1'", "2", "listen"),
        ("server = 5", "1", "server"),
        ("[[server]]\nlisten = '0.0.0.0:1'", "1", "server"),
        ("[server]\nlisten = 8080", "2", "server.listen"),
        ("[server]\nlisten = ''", "2", "server.listen"),
        ("[server]\nlisten = 'relay'", "2", "server.listen"),
        ("[server]\nlisten = ':8080'", "2", "server.listen"),
        ("[server]\nlisten = '127.0.0.1:65536'", "2", "server.listen"),
        ("[server]\nlisten = '::1:8080'", "2", "server.listen"),
        (
            "[server]\nlisten = \"127.0.0.1:1\\n\\n2\"",
            "2",
            "server.listen",
        ),
        (
            "[server]\nlisten = '''\n127.0.0.1:1\n\n2'''",
            "2",
            "server.listen",
        ),
        (
            "[server]\nshutdown_grace_secs = '30'",
            "2",
            "server.shutdown_grace_secs",
        ),
        (
            "[server]\nshutdown_grace_secs = -1",
            "2",
            "server.shutdown_grace_secs",
        ),
        (
            "[server]\nshutdown_grace_secs = 1.5",
            "2",
            "server.shutdown_grace_secs",
        ),
        (
            "[server]\nshutdown_grace_secs = 4294967296",
            "2",
            "server.shutdown_grace_secs",
        ),
        (
            "[server]\nhandshake_timeout_secs = 0",
            "2",
            "server.handshake_timeout_secs",
        ),
        (
            "[server]\nkeepalive_secs = false",
            "2",
            "server.keepalive_secs",
        ),
        ("[auth]\nissuer = ''", "2", "auth.issuer"),
        ("[auth]\nissuer = 'token.example.com'", "2", "auth.issuer"),
        (
            "[auth]\nissuer = 'http://token.example.com'",
            "2",
            "auth.issuer",
        ),
        (
            "[auth]\nissuer = ['https://token.example.com']",
            "2",
            "auth.issuer",
        ),
        ("[auth]\naudience = ''", "2", "auth.audience"),
        ("[auth]\nallowed_org = ['a', 'b']", "2", "auth.allowed_org"),
        (
            "[auth]\njwks_cache_ttl_secs = 0",
            "2",
            "auth.jwks_cache_ttl_secs",
        ),
        (
            "[daemon]\nnix_daemon_path = ''",
            "2",
            "daemon.nix_daemon_path",
        ),
        (
            "[daemon]\nnix_daemon_path = './nix-daemon'",
            "2",
            "daemon.nix_daemon_path",
        ),
        ("[daemon]\nextra_args = '--stdio'", "2", "daemon.extra_args"),
        ("[daemon]\nextra_args = [\n  '--stdio',\n  5,\n]", "4", ""),
        ("[daemon]\ntimeout_secs = 0", "2", "daemon.timeout_secs"),
        (
            "[daemon]\nmax_connections = 0",
            "2",
            "daemon.max_connections",
        ),
        (
            "[daemon]\nqueue_timeout_secs = { secs = 1 }",
            "2",
            "daemon.queue_timeout_secs",
        ),
        ("[auth]\nallowed_org = '*'", "2", "auth.allowed_org"),
        ("[server]\nadmin_listen = 'on'", "2", "server.admin_listen"),
        ("auth.rule = 5", "1", "auth.rule"),
        ("auth.rule = [5]", "1", "auth.rule"),
        ("[auth.rule]\nname = 'a'", "1", "auth.rule"),
        ("[[auth.rule]]\nbound_claims = { ref = 'a' }", "1", "name"),
        ("[[auth.rule]]\nname = 'a'", "1", "bound_claims"),
        (
            "[[auth.rule]]\nname = ''\nbound_claims = { ref = 'a' }",
            "2",
            "auth.rule: name",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims = {}",
            "3",
            "auth.rule: bound_claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = []",
            "3",
            "auth.rule: bound_claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = { a = 'b' }",
            "3",
            "auth.rule: bound_claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = [['b']]",
            "3",
            "auth.rule: bound_claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 1.5",
            "3",
            "auth.rule: bound_claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\nclaims.x = 'a'",
            "4",
            "claims",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\nissuer = 'http://example.com'",
            "4",
            "auth.rule: issuer",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\naudience = ''",
            "4",
            "auth.rule: audience",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\nextra_args = '--stdio'",
            "4",
            "rule.extra_args",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\nmax_connections = 0",
            "4",
            "max_connections",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\nmax_connections = '2'",
            "4",
            "max_connections",
        ),
        ("[auth]\njwks_files = 'keys.json'", "2", "jwks_files"),
        (
            "[auth.jwks_files]\n'https://example.com' = 5",
            "2",
            "example.com",
        ),
        (
            "[[auth.rule]]\nname = 'a'\nbound_claims.ref = 'a'\n\n[[auth.rule]]\nname = 'b'\nbound_claims.ref = []",
            "7",
            "auth.rule: bound_claims",
        ),
        ("[server", "1", ""),
        ("[server]\nlisten = 'never closed\n", "2", ""),
        ("[server]\n\nlisten 1", "3", ""),
        (
            "[server]\nlisten = '0.0.0.0:1'\nlisten = '0.0.0.0:1'",
            "3",
            "",
        ),
        ("[server]\n[server]", "2", ""),
    ];
    for (text, line, key) in rows {
        let file = dir.write("relay.toml", text);
        let error = error(check().arg(&file));
        let place = format!("{}: TOML parse error at line {line}, ", file.display());
        assert!(
            error.contains(&place),
            "not line {line} for\n{text}\n{error}"
        );
        // toml shows the line, and says what was expected below it.
        let key = key.rsplit(['.', ' ']).next().unwrap();
        assert!(error.contains(key), "no {key} for\n{text}\n{error}");
        let why = error.lines().last().unwrap();
        assert!(!why.contains('|'), "no reason for\n{text}\n{error}");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let dir = Dir::new();
    let latin = dir.path("latin.toml");
    std::fs::write(&latin, b"[auth]\nallowed_org = 'caf\xe9'\n").unwrap();
    for path in [&dir.path("missing.toml"), &dir.path(""), &latin] {
        assert!(error(check().arg(path)).contains(&*path.to_string_lossy()));
        let error = error(check().env("NIX_RELAY_CONFIG", path));
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
    }
}

#[test]
fn errors_in_a_variable() {
    for (variable, bad) in [
        ("NIX_RELAY_LISTEN", "8080"),
        ("NIX_RELAY_LISTEN", "127.0.0.1:http"),
        ("NIX_RELAY_LISTEN", "127.0.0.1:1\n\n2"),
        ("NIX_RELAY_SHUTDOWN_GRACE_SECS", "soon"),
        ("NIX_RELAY_SHUTDOWN_GRACE_SECS", "-1"),
        ("NIX_RELAY_SHUTDOWN_GRACE_SECS", "30s"),
        ("NIX_RELAY_SHUTDOWN_GRACE_SECS", "1\n2"),
        ("NIX_RELAY_HANDSHAKE_TIMEOUT_SECS", "0"),
        ("NIX_RELAY_KEEPALIVE_SECS", "1.5"),
        ("NIX_RELAY_KEEPALIVE_SECS", " "),
        ("NIX_RELAY_ISSUER", "http://token.example.com"),
        ("NIX_RELAY_ISSUER", "https://"),
        ("NIX_RELAY_JWKS_CACHE_TTL_SECS", "0"),
        ("NIX_RELAY_DAEMON_PATH", "bin/nix-daemon"),
        ("NIX_RELAY_TIMEOUT_SECS", "4294967296"),
        ("NIX_RELAY_TIMEOUT_SECS", "99999999999999999999"),
        ("NIX_RELAY_MAX_CONNECTIONS", "0"),
        ("NIX_RELAY_QUEUE_TIMEOUT_SECS", "0x10"),
    ] {
        let error = error(check().env(variable, bad));
        assert!(
            error.contains(&format!("{variable}: ")),
            "{variable}={bad}: {error}"
        );
    }
    for (_, variable, ..) in KEYS {
        let error = error(check().env(variable, OsStr::from_bytes(b"\xff")));
        assert!(
            error.contains(&format!("{variable}: ")),
            "{variable}: {error}"
        );
    }
}

#[test]
fn without_an_organisation_nobody_could_connect() {
    let dir = Dir::new();
    let without = dir.write("without.toml", "[auth]\naudience = 'api://nix-relay'\n");
    let empty = dir.write("empty.toml", "[auth]\nallowed_org = ''\n");
    for arguments in [&[][..], &[&*without], &[&*empty]] {
        for check in [true, false] {
            let mut command = binary();
            command.args(arguments).args(check.then_some("--check"));
            let error = error(command.env("NIX_RELAY_ALLOWED_ORG", ""));
            assert!(error.contains("auth.allowed_org") && error.contains("NIX_RELAY_ALLOWED_ORG"));
        }
    }
}

#[test]
fn arguments() {
    let version = format!("nix-relay {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        code_and_texts(binary().arg("--version")),
        (Some(0), version, String::new())
    );
    let (code, help, stderr) = code_and_texts(binary().arg("--help"));
    assert_eq!((code, &*stderr), (Some(0), ""));
    for part in [
        "nix-relay [--check] [CONFIG.toml]",
        "--check ",
        "--help ",
        "--version ",
        "NIX_RELAY_CONFIG",
    ] {
        assert!(help.contains(part), "no {part:?} in {help}");
    }
    for wrong in [
        &["--chekc"][..],
        &["-x"],
        &["--check", "--config=x"],
        &["a.toml", "b.toml"],
    ] {
        let (code, stdout, stderr) = code_and_texts(binary().args(wrong));
        assert_eq!((code, &*stdout), (Some(2), ""), "{wrong:?}");
        assert!(
            stderr.contains(wrong[wrong.len() - 1]),
            "{wrong:?}: {stderr}"
        );
    }
}

#[test]
fn where_the_file_is() {
    let dir = Dir::new();
    let file =
        |name: &str, audience: &str| dir.write(name, &format!("auth.audience = '{audience}'\n"));
    let argument = file("argument.toml", "argument");
    let variable = file("variable.toml", "variable");
    let audience = |command: &mut Command| effective(command)["auth"]["audience"].to_string();
    let from = |path: &Path| {
        let mut command = check();
        command.env("NIX_RELAY_CONFIG", path);
        command
    };
    assert_eq!(audience(&mut from(&variable)), "\"variable\"");
    assert_eq!(audience(from(&variable).arg(&argument)), "\"argument\"");
    assert_eq!(audience(&mut from(Path::new(""))), "\"api://nix-relay\"");
}

#[test]
fn check_neither_listens_nor_asks_the_issuer() {
    let issuer = Issuer::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let with = |command: &mut Command| {
        let output = command
            .env("NIX_RELAY_ALLOWED_ORG", "given")
            .env("NIX_RELAY_LISTEN", &address)
            .env("NIX_RELAY_ISSUER", issuer.url());
        code_and_texts(output)
    };
    assert_eq!(with(binary().arg("--check")).0, Some(0));
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err() && issuer.requests().is_empty());
    // Without it, the address that is taken is an error, and says so.
    let (code, _, log) = with(&mut binary());
    assert!(
        code == Some(1) && log.contains(&address) && log.lines().count() == 1,
        "{log}"
    );
}

/// There may be others, so it changes nothing; but it may be one of ours, misspelt.
#[test]
fn a_variable_of_no_key_is_ignored_with_a_warning() {
    let mut other = check();
    let output = other.env("NIX_RELAY_MAX_CONNECTION", "5").output().unwrap();
    assert_eq!(output.stdout, check().output().unwrap().stdout);
    let said = String::from_utf8(output.stderr).unwrap();
    let warning = "nix-relay: warning: \"NIX_RELAY_MAX_CONNECTION\" is no setting of the relay";
    assert!(said.starts_with(warning), "{said}");

    // The client's are no mistake.
    effective(check().env("NIX_RELAY_URL", "wss://relay.example.com"));

    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("MAX_CONNECTION", "5").start();
    let line = relay.log.wait("\"NIX_RELAY_MAX_CONNECTION\" is no setting");
    assert!(line.contains(" WARN "), "{line}");
}

//! The static build, alone: a chroot with nothing in it but the binary, etc/resolv.conf and a CA file.

use crate::support::*;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::{fs, thread};

const ISSUER: &str = "https://issuer.example.org";

/// What `cargo static` makes, without `--release`: it is linked the same. One signature needs no optimised cryptography,
/// whose compilation would take longer than all the tests do; what is left goes on beside them, and gives way.
fn build() -> PathBuf {
    let target = project("target").display().to_string();
    let mut command = Command::new("nice");
    command.args([
        env!("CARGO"),
        "static",
        "--locked",
        "--quiet",
        "--target-dir",
        &target,
    ]);
    command.args(["--config", "profile.dev.package.'*'.opt-level = 0"]);
    assert!(command.current_dir(project("")).status().unwrap().success());
    let libc = if cfg!(target_env = "musl") {
        "musl"
    } else {
        "gnu"
    };
    project(&format!(
        "target/{}-unknown-linux-{libc}/debug/nix-relay",
        std::env::consts::ARCH
    ))
}

/// Killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a closure where there is no network but a loopback of its own, with every port free.
fn in_own_network(run: impl FnOnce() + Send + 'static) {
    let mut holder = Command::new("unshare");
    let holder = holder.args([
        "--net",
        "sh",
        "-c",
        "ip link set lo up && echo up && exec cat",
    ]);
    let mut holder = Server(
        holder
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut line = String::new();
    BufReader::new(holder.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "up\n");
    let namespace = fs::File::open(format!("/proc/{}/ns/net", holder.0.id())).unwrap();
    let inside = thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        run();
    });
    inside
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// A DNS server for which every name has the address 127.0.0.1 and no other (RFC 1035, section 4); not where resolvers
/// look that were not told.
fn serve_names() {
    let socket = UdpSocket::bind("127.0.0.2:53").unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((_, client)) = socket.recv_from(&mut query) {
            let end = 12 + query[12..].iter().position(|&byte| byte == 0).unwrap() + 5;
            let found = query[end - 4..end] == [0, 1, 0, 1];
            let mut answer = query[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, found.into(), 0, 0, 0, 0]);
            answer.extend(&query[12..end]);
            if found {
                answer.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
            }
            socket.send_to(&answer, client).unwrap();
        }
    });
}

/// An issuer that speaks TLS: files, the certificate of ISSUER, and the CA that signed it.
fn serve_keys(dir: &Dir) -> Server {
    let openssl = |arguments: &str| {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(dir.path(""));
        command
    };
    let certificate =
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config /dev/null -subj";
    for arguments in [
        format!(
            "{certificate} /CN=ca -keyout ca.key -out ca.pem -addext basicConstraints=critical,CA:TRUE"
        ),
        format!(
            "{certificate} /CN=issuer -keyout key -out cert -CA ca.pem -CAkey ca.key -addext subjectAltName=DNS:{}",
            ISSUER.trim_start_matches("https://")
        ),
    ] {
        let output = openssl(&arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let key: serde_json::Value =
        serde_json::from_str(&issuer::keys().p256.public_key().to_jwk()).unwrap();
    fs::create_dir(dir.path(".well-known")).unwrap();
    let discovery = json!({"issuer": ISSUER, "jwks_uri": format!("{ISSUER}/jwks")});
    dir.write(".well-known/openid-configuration", &discovery.to_string());
    dir.write("jwks", &json!({"keys": [key]}).to_string());
    let mut server = openssl("s_server -accept 127.0.0.1:443 -cert cert -key key -WWW");
    let mut server = Server(
        server
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    Log::of(server.0.stdout.take().unwrap()).wait("ACCEPT");
    server
}

#[test]
fn three_files_are_enough() {
    let binary = build();
    let (root, keys) = (Dir::new(), Dir::new());
    // Of a dynamic kind, so that it is loaded anywhere, but in no need of a loader.
    assert_eq!(
        fs::read(&binary).unwrap()[16..18],
        [3, 0],
        "not position-independent"
    );
    fs::copy(binary, root.path("nix-relay")).unwrap();
    fs::create_dir(root.path("etc")).unwrap();
    root.write("etc/resolv.conf", "nameserver 127.0.0.2\n");
    in_own_network(move || {
        serve_names();
        let _server = serve_keys(&keys);
        fs::copy(keys.path("ca.pem"), root.path("ca.pem")).unwrap();
        let issuer = Issuer::start();
        let token = issuer.token_with(json!({"iss": ISSUER}));
        // There is no other program for a daemon.
        let start = |authorities: &str| {
            let setup = Setup::new(&issuer)
                .set("ISSUER", ISSUER)
                .env("SSL_CERT_FILE", authorities);
            let setup = setup
                .set("DAEMON_PATH", "/nix-relay")
                .set("EXTRA_ARGS", "--version");
            setup
                .under(&format!(
                    "exec chroot {} /nix-relay",
                    root.path("").display()
                ))
                .start()
        };

        let relay = start("/ca.pem");
        let (data, code, _) = relay.connect(&token).until_close();
        let version = concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!((&data[..], code), (version.as_bytes(), 1000));

        let relay = start("");
        assert!(
            relay
                .log
                .wait("could not fetch keys")
                .contains("certificate"),
            "{}",
            relay.log.text()
        );
        assert!(
            relay
                .try_connect(&token)
                .is_err_and(|answer| answer.starts_with("HTTP/1.1 503 "))
        );
    });
}

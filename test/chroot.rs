//! The static file, alone: in a chroot with nothing in it but itself, etc/resolv.conf and a CA file; and on other releases,
//! with NSS modules that it must not load.

use crate::support::{nix::*, *};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs, thread};

const ISSUER: &str = "https://issuer.example.org";

const VERSION: &str = concat!("nix-relay ", env!("CARGO_PKG_VERSION"), "\n");

/// What Fedora and Arch, and what Ubuntu's and Debian's desktops have in /etc/nsswitch.conf.
const HOSTS: [&str; 2] = [
    "files mymachines resolve [!UNAVAIL=return] myhostname dns",
    "files mdns4_minimal [NOTFOUND=return] dns",
];

/// The file that is tested, and whether it is the one that releases have.
struct Static {
    path: PathBuf,
    genuine: bool,
}

/// What NIX_RELAY_STATIC names, or else what `cargo static` makes. Where Rust has no musl target it is linked with glibc,
/// and then the client cannot look up names, nor the relay on other releases.
fn static_file() -> Static {
    if let Some(path) = env::var_os("NIX_RELAY_STATIC") {
        return Static {
            path: path.into(),
            genuine: true,
        };
    }
    let arch = env::consts::ARCH;
    let musl = has_musl();
    let libc = if musl { "musl" } else { "gnu" };
    match (musl, arch) {
        (true, "aarch64") => build(&["static-arm"]),
        (true, _) => build(&["static"]),
        (false, _) => build(&[
            "build",
            "--bin=nix-relay",
            "--target=host-tuple",
            "--config=target.'cfg(unix)'.rustflags = ['-C', 'target-feature=+crt-static']",
        ]),
    }
    let path = format!("target/{arch}-unknown-linux-{libc}/debug/nix-relay");
    Static {
        path: project(&path),
        genuine: musl,
    }
}

fn has_musl() -> bool {
    let target = format!("--target={}-unknown-linux-musl", env::consts::ARCH);
    let mut rustc = Command::new("rustc");
    let output = rustc.args(["--print=target-libdir", &target]).output();
    Path::new(texts(&output.unwrap()).0.trim()).exists()
}

/// Without `--release`: it is linked the same. One signature needs no optimised cryptography, whose compilation would take
/// longer than all the tests do; what is left goes on beside them, and gives way.
fn build(arguments: &[&str]) {
    let mut command = Command::new("nice");
    command.arg(env!("CARGO")).args(arguments);
    command.args(["--locked", "--quiet", "--target-dir"]);
    command.arg(project("target"));
    command.args(["--config", "profile.dev.package.'*'.opt-level = 0"]);
    assert!(command.current_dir(project("")).status().unwrap().success());
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

/// A directory with the file under test and what else it may need, for a chroot.
struct Chroot {
    files: Dir,
    /// The root directory of a release, over which the files are laid.
    release: Option<String>,
    issuer: Issuer,
    _keys: (Dir, Server),
}

impl Chroot {
    fn new(binary: &Path, release: Option<String>) -> Chroot {
        let (files, keys) = (Dir::new(), Dir::new());
        fs::copy(binary, files.path("nix-relay")).unwrap();
        fs::create_dir(files.path("etc")).unwrap();
        files.write("etc/resolv.conf", "nameserver 127.0.0.2\n");
        let server = serve_keys(&keys);
        fs::copy(keys.path("ca.pem"), files.path("ca.pem")).unwrap();
        Chroot {
            files,
            release,
            issuer: Issuer::start(),
            _keys: (keys, server),
        }
    }

    /// Shell commands that become the file under test; its arguments may follow.
    fn enter(&self) -> String {
        let files = self.files.path("").display().to_string();
        let Some(release) = &self.release else {
            return format!("exec chroot {files} /nix-relay");
        };
        let own_mounts = project("test/support/own-mounts").display().to_string();
        let lay = "mount -t overlay overlay -o lowerdir=$0:$1 $0 && shift && exec chroot $0 /nix-relay $*";
        format!("exec {own_mounts} '{lay}' {files} {release}")
    }

    /// A relay for whose daemon there is no other program.
    fn relay(&self, authorities: &str) -> Relay {
        let setup = Setup::new(&self.issuer)
            .set("ISSUER", ISSUER)
            .set("DAEMON_PATH", "/nix-relay")
            .set("EXTRA_ARGS", "--version");
        let setup = setup.env("SSL_CERT_FILE", authorities);
        setup.under(&self.enter()).start()
    }

    fn token(&self) -> String {
        self.issuer.token_with(json!({"iss": ISSUER}))
    }

    /// The relay gets keys, and starts a session.
    fn try_relay(&self) -> Relay {
        let relay = self.relay("/ca.pem");
        let (data, code, _) = relay.connect(&self.token()).until_close();
        assert_eq!((&data[..], code), (VERSION.as_bytes(), 1000));
        relay
    }

    /// The client finds the relay by its name.
    fn try_client(&self, relay: &Relay) {
        let home = Dir::new();
        let mut client = job("sh", &home);
        let url = format!("ws://relay.example.org:{}", relay.address.port());
        client
            .args(["-c", &format!("{} --stdio", self.enter())])
            .env("NIX_RELAY_URL", url)
            .env("NIX_RELAY_TOKEN", self.token())
            .env("NIX_RELAY_RETRY_SECS", "0");
        let client = client.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = client.stderr(Stdio::piped()).spawn().unwrap();
        drop(client.stdin.take());
        let status = wait(&mut client, LIMIT);
        let (mut out, mut err) = (String::new(), String::new());
        let (stdout, stderr) = (&mut client.stdout, &mut client.stderr);
        stdout.as_mut().unwrap().read_to_string(&mut out).unwrap();
        stderr.as_mut().unwrap().read_to_string(&mut err).unwrap();
        // That daemon does not wait for the end of its input, which may come later than its own.
        let ended = status.success() || err.ends_with("before standard input ended\n");
        assert!(ended && out == VERSION, "{status}: {out}{err}");
    }
}

#[test]
fn three_files_are_enough() {
    let file = static_file();
    // Of a dynamic kind, so that it is loaded anywhere, but in no need of a loader.
    assert_eq!(
        fs::read(&file.path).unwrap()[16..18],
        [3, 0],
        "not position-independent"
    );
    in_own_network(move || {
        serve_names();
        let chroot = Chroot::new(&file.path, None);
        let relay = chroot.try_relay();
        if file.genuine {
            chroot.try_client(&relay);
        } else {
            // Past what collects the output of tests that pass.
            let untested =
                "\nno musl target: the client in a chroot was not tested; test/musl does\n";
            std::io::stderr().write_all(untested.as_bytes()).unwrap();
        }

        let relay = chroot.relay("");
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
                .try_connect(&chroot.token())
                .is_err_and(|answer| answer.starts_with("HTTP/1.1 503 "))
        );
    });
}

/// NIX_RELAY_RELEASES has the root directories of the releases, with a colon between two.
#[test]
#[ignore = "needs the root directories of other releases: test/musl makes them"]
fn other_releases_have_modules_that_it_does_not_load() {
    let releases = env::var("NIX_RELAY_RELEASES").expect("NIX_RELAY_RELEASES is not set");
    let file = static_file();
    in_own_network(move || {
        serve_names();
        for (release, hosts) in releases.split(':').flat_map(|r| HOSTS.map(|h| (r, h))) {
            println!("{release} with hosts: {hosts}");
            for module in ["mymachines", "resolve", "myhostname", "mdns4_minimal"] {
                let libraries = format!("{release}/usr/lib/{}-linux-gnu", env::consts::ARCH);
                let library = format!("{libraries}/libnss_{module}.so.2");
                assert!(Path::new(&library).exists(), "no {library}");
            }
            let chroot = Chroot::new(&file.path, Some(release.into()));
            let nsswitch = format!("hosts: {hosts}\n");
            chroot.files.write("etc/nsswitch.conf", &nsswitch);
            let relay = chroot.try_relay();
            chroot.try_client(&relay);
        }
    });
}

//! What a runner has: a client, a nix with a store of its own; and a relay whose daemon is a real
//! nix-daemon, with another store.

use super::*;
use rustix::net::connect_unspec;
use std::net::TcpListener;
use std::process::Output;

/// The client that is a script.
pub fn script() -> PathBuf {
    project("client.sh")
}

/// And the one that is the relay's own binary.
pub fn native() -> PathBuf {
    env!("CARGO_BIN_EXE_nix-relay").into()
}

/// Nothing of it depends on the machine: builders use /bin/sh, and nobody substitutes.
pub const CONFIG: &str = "sandbox = false\nbuild-users-group =\nsubstituters =\n\
                      extra-experimental-features = nix-command flakes\n";

/// A command in the environment of a job: no variable but PATH and HOME.
pub fn job(program: impl AsRef<std::ffi::OsStr>, home: &Dir) -> Command {
    let tools = project("target/tools/bin").display().to_string();
    let path = format!("{tools}:{}", env::var("PATH").unwrap());
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", path)
        .env("HOME", home.path(""))
        .stdin(Stdio::null());
    command
}

/// What a GitHub job finds to get its token with.
pub fn token_variables(issuer: &Issuer) -> [(&'static str, String); 2] {
    [
        (
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            format!("{}/token", issuer.url()),
        ),
        (
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
            issuer::REQUEST_TOKEN.into(),
        ),
    ]
}

/// A relay with a real nix-daemon, whose store is `remote`.
pub struct Farm {
    pub issuer: Issuer,
    pub relay: Relay,
    remote: Dir,
}

impl Farm {
    pub fn start() -> Farm {
        Farm::start_with(|setup| setup)
    }

    pub fn start_with(change: impl FnOnce(Setup) -> Setup) -> Farm {
        let (issuer, remote) = (Issuer::start(), Dir::new());
        let own_store = project("test/support/own-store").display().to_string();
        // Of several daemons that find no database and make one, a Nix of 2.8 lets some fail.
        let mut first = job(&own_store, &remote);
        let init = first.arg(remote.path("nix")).args(["nix-store", "--init"]);
        assert!(init.env("NIX_CONFIG", CONFIG).status().unwrap().success());
        let in_remote = format!("{own_store} {}", remote.path("nix").display());
        let setup = Setup::new(&issuer)
            .daemon("exec $NIX_IN_REMOTE nix-daemon \"$@\"")
            .env("NIX_IN_REMOTE", &in_remote);
        let setup = setup
            .env("NIX_CONFIG", CONFIG)
            .env("HOME", remote.path("").to_str().unwrap());
        Farm {
            relay: change(setup).start(),
            issuer,
            remote,
        }
    }

    pub fn runner(&self) -> Runner {
        self.runner_for(self.relay.address)
    }

    /// One that reaches the relay at another address.
    pub fn runner_for(&self, address: SocketAddr) -> Runner {
        Runner {
            url: format!("ws://{address}"),
            token: token_variables(&self.issuer),
            client: script(),
            local: Dir::new(),
        }
    }

    /// A program for which the remote store is its own.
    pub fn command(&self, program: &str) -> Command {
        let mut command = job(project("test/support/own-store"), &self.remote);
        command
            .arg(self.remote.path("nix"))
            .arg(program)
            .env("NIX_CONFIG", CONFIG);
        command
    }

    /// Where a store path is among the files of the remote store.
    pub fn file(&self, store_path: &str) -> PathBuf {
        in_store(&self.remote, store_path)
    }
}

/// A machine with nix and a client, client.sh if not told otherwise, and a store of its own.
pub struct Runner {
    url: String,
    token: [(&'static str, String); 2],
    client: PathBuf,
    local: Dir,
}

impl Runner {
    /// One that is not given a relay.
    pub fn alone() -> Runner {
        Runner {
            url: String::new(),
            token: Default::default(),
            client: script(),
            local: Dir::new(),
        }
    }

    /// The same with another client.
    pub fn with(self, client: PathBuf) -> Runner {
        Runner { client, ..self }
    }

    /// Whether something that was started for it is still there.
    pub fn has_processes(&self) -> bool {
        anyone_with(&format!("HOME={}", self.local.path("").display()))
    }

    pub fn nix(&self, arguments: &[&str]) -> Command {
        let mut command = job(project("test/support/own-store"), &self.local);
        command
            .arg(self.local.path("nix"))
            .arg("nix")
            .args(arguments);
        command
            .env("NIX_CONFIG", CONFIG)
            .env("NIX_RELAY_URL", &self.url)
            .envs(self.token.clone());
        command
    }

    /// The standard output of a `nix` that must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.nix(arguments).output().unwrap();
        let (out, log) = texts(&output);
        assert!(output.status.success(), "nix {arguments:?}:\n{log}");
        out
    }

    /// The store behind the relay.
    pub fn remote(&self) -> String {
        format!(
            "ssh-ng://localhost?remote-program={}",
            self.client.display()
        )
    }

    /// A file with a derivation of these attributes; `args` is a script for /bin/sh.
    pub fn derivation(&self, name: &str, script: &str) -> String {
        self.expression(name, &derivation(name, script))
    }

    pub fn expression(&self, name: &str, text: &str) -> String {
        self.local
            .write(&format!("{name}.nix"), text)
            .display()
            .to_string()
    }

    /// `nix build` on the remote store.
    pub fn build(&self, file: &str) -> Command {
        let remote = self.remote();
        self.nix(&[
            "build",
            "--eval-store",
            "auto",
            "--store",
            &remote,
            "-L",
            "--no-link",
            "-f",
            file,
        ])
    }

    /// The path of the result, whether or not it is there.
    pub fn out_path(&self, file: &str) -> String {
        self.run(&["eval", "--raw", "-f", file, "outPath"])
    }

    /// Where a store path is among the files of this machine's store.
    pub fn file(&self, store_path: &str) -> PathBuf {
        in_store(&self.local, store_path)
    }
}

pub fn derivation(name: &str, script: &str) -> String {
    format!(
        "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\"; \
         args = [ \"-c\" ''{script}'' ]; }}"
    )
}

fn in_store(dir: &Dir, store_path: &str) -> PathBuf {
    dir.path("nix").join(
        store_path
            .trim()
            .strip_prefix("/var/lib/nix-relay-test/")
            .unwrap(),
    )
}

/// The first two numbers of Nix's version.
pub fn nix_version() -> (u32, u32) {
    let output = Command::new("nix").arg("--version").output().unwrap();
    let (line, _) = texts(&output);
    let numbers = line.split_whitespace().last().unwrap_or_default();
    let mut numbers = numbers.split('.').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Whether Nix says that it does not accept a path because nobody it trusts has signed it.
pub fn lacks_signature(log: &str) -> bool {
    // The first is what 2.8 says, the second is what all after it say.
    [
        "lacks a valid signature",
        "lacks a signature by a trusted key",
    ]
    .iter()
    .any(|words| log.contains(words))
}

/// Standard output and standard error.
pub fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Carries TCP to a relay until it resets every connection.
pub struct Proxy {
    pub address: SocketAddr,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sockets = Arc::new(Mutex::new(Vec::new()));
        let kept = sockets.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(target) else {
                    return;
                };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
                kept.lock().unwrap().extend([client, server]);
            }
        });
        Proxy { address, sockets }
    }

    pub fn reset(&self) {
        for socket in self.sockets.lock().unwrap().iter() {
            connect_unspec(socket).unwrap();
        }
    }

    pub fn end(&self) {
        for socket in self.sockets.lock().unwrap().iter() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

# The server, and the systemd unit in which it runs.
{
  lib,
  openssl,
  rustPlatform,
  testers,
  util-linux,
  versionCheckHook,
}:
rustPlatform.buildRustPackage (finalAttrs: {
  pname = "nix-relay";
  version = "0.1.0";

  # What is built or tested here, so that nothing else causes a new build.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../client.rs
      ../client.sh
      ../config.example.toml
      ../main.rs
      ../test
      ./nix-relay.service
      ./nix-relay.socket
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = [ "--bin=nix-relay" ];

  nativeCheckInputs = [
    openssl
    util-linux
  ];
  cargoTestFlags = [ "--test=black-box" ];
  # test/run runs these too; here they cannot run. All others do, so that a new one is not forgotten.
  checkFlags = map (test: "--skip=${test}") [
    # It takes root to make a namespace or a mount, and to become another user.
    "admin::a_moment_without_threads"
    "chroot::"
    "peers::one_that_vanishes"
    "proxies::"
    "scarcity::a_full_tmp"
    "scarcity::threads"
    "stdio::a_network_that_goes_away"
    # A Nix with a store of its own.
    "builders::"
    "nix::"
    "nixos::"
    "own::"
    "stdio::the_other_protocol_of_nix"
    "trouble::"
    "trust::"
    # curl, websocat, nginx, promtool.
    "action::"
    "admin::alert_rules"
    "admin::prometheus_can_read_them"
    "client::"
    "stdio::a_daemon_that_speaks_first"
    "stdio::through_"
    # The documentation.
    "docs::"
    "rules::the_recipes"
  ];

  nativeInstallCheckInputs = [ versionCheckHook ];
  doInstallCheck = true;

  postInstall = ''
    install -Dm444 -t $out/lib/systemd/system nix/nix-relay.{service,socket}
    substituteInPlace $out/lib/systemd/system/nix-relay.service --replace-fail /usr/local/bin $out/bin
  '';

  passthru.tests.nixos = testers.runNixOSTest ./vm-test.nix;

  meta = {
    description = "Remote Nix builds for CI runners that hold an OIDC token and no SSH key";
    # Where this is published: your fork or mirror.
    homepage = "https://github.com/your-organisation/nix-relay";
    changelog = "${finalAttrs.meta.homepage}/releases/tag/v${finalAttrs.version}";
    license = lib.licenses.mit;
    mainProgram = "nix-relay";
    platforms = lib.platforms.linux;
  };
})

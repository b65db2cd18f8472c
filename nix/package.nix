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
    "audit::process_one_says_what_it_needs"
    "children::a_user_from_whom"
    "chroot::"
    "client_rs::a_name_server"
    "client_rs::a_network_that_goes_away"
    "client_rs::all_addresses"
    "client_rs::an_issuer_whose_name"
    "client_rs::hosts_that_need_no_proxy"
    "client_rs::name_servers"
    "client_rs::no_route"
    "peers::one_that_vanishes"
    "proxies::"
    "scarcity::a_full_tmp"
    "scarcity::threads"
    # A Nix with a store of its own.
    "builders::"
    "compression::a_build"
    "nix::"
    "nixos::"
    "own::"
    "strangers::a_build_asks"
    "trouble::"
    "trust::"
    # curl, websocat, nginx, promtool.
    "action::"
    "admin::alert_rules"
    "admin::prometheus_can_read_them"
    "client_rs::a_daemon_that_speaks_first"
    "client_rs::through_"
    "client_sh::"
    "clients::"
    # The documentation, and the action.
    "client_rs::commands_of_the_page"
    "client_rs::the_log_of_a_build"
    "docs::"
    "rules::a_token_signed_by_hand"
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

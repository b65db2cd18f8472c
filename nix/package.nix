# The server, and the systemd unit in which it runs.
{
  lib,
  rustPlatform,
  testers,
}:
let
  inherit (lib.importTOML ../Cargo.toml) package;
  # Where this is published: your fork or mirror.
  homepage = "https://github.com/your-organisation/nix-relay";
in
rustPlatform.buildRustPackage {
  pname = package.name;
  inherit (package) version;

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
  cargoBuildFlags = [ "--bin=${package.name}" ];

  # The others want root, network namespaces, a Nix or the documentation; test/run has them all.
  cargoTestFlags = [ "--test=black-box" ];
  checkFlags = [
    "audit::"
    "config::"
    "frames::"
    "handshakes::"
    "http::"
    "rules::"
    "tokens::"
    "--skip=rules::the_recipes"
  ];

  postInstall = ''
    install -Dm444 -t $out/lib/systemd/system nix/nix-relay.{service,socket}
    substituteInPlace $out/lib/systemd/system/nix-relay.service --replace-fail /usr/local/bin $out/bin
  '';

  passthru.tests.nixos = testers.runNixOSTest ./vm-test.nix;

  meta = {
    inherit (package) description;
    inherit homepage;
    changelog = "${homepage}/releases/tag/v${package.version}";
    license = lib.licenses.mit;
    mainProgram = package.name;
    platforms = lib.platforms.linux;
  };
}

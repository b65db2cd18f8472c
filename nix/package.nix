# The server, and the systemd unit in which it runs.
{ lib, rustPlatform }:
let
  inherit (builtins.fromTOML (builtins.readFile ../Cargo.toml)) package;
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
      ../client.sh
      ../config.example.toml
      ../main.rs
      ../test
      ./nix-relay.service
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = [ "--bin=${package.name}" ];

  # The others want root, network namespaces or a Nix; test/run has them all.
  cargoTestFlags = [ "--test=black-box" ];
  checkFlags = [
    "config::"
    "http::"
    "tokens::"
  ];

  postInstall = ''
    install -Dm444 -t $out/lib/systemd/system nix/nix-relay.service
    substituteInPlace $out/lib/systemd/system/nix-relay.service --replace-fail /usr/local/bin $out/bin
  '';

  meta = {
    inherit (package) description;
    license = lib.licenses.mit;
    mainProgram = package.name;
    platforms = lib.platforms.linux;
  };
}

# What `nix flake check` builds.
{ pkgs }:
let
  inherit (import ./. { inherit pkgs; }) nix-relay nix-relay-client;
  # The module's cases, with the lib of nixpkgs.
  module = import ../test/module.nix { inherit (pkgs) lib; };
in
{
  inherit nix-relay nix-relay-client;

  lints = nix-relay.overrideAttrs (old: {
    pname = "nix-relay-lints";
    nativeBuildInputs = old.nativeBuildInputs ++ [
      pkgs.clippy
      pkgs.rustfmt
      pkgs.shellcheck
    ];
    buildPhase = ''
      cargo fmt --check
      cargo clippy --offline --all-targets -- --deny warnings
      shellcheck client.sh test/run test/demo test/support/setup.sh test/support/own-store
    '';
    doCheck = false;
    installPhase = "touch $out";
  });

  module =
    assert pkgs.lib.assertMsg (module.failures == { }) (builtins.toJSON module.failures);
    pkgs.writeText "nix-relay-module" (builtins.toJSON module.written);

  nixos = pkgs.testers.runNixOSTest ./vm-test.nix;
}

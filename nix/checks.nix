# What `nix flake check` builds.
{
  nixpkgs,
  nixosModules,
  pkgs,
}:
let
  inherit (pkgs) lib;
  inherit (import ./. { inherit pkgs; }) nix-relay nix-relay-client;
  # The module's cases, with the lib of nixpkgs.
  module = import ../test/module.nix { inherit lib; };

  # The example, for a machine that needs no hardware configuration.
  example = (import ./example/flake.nix).outputs {
    nix-relay = { inherit nixosModules; };
    nixpkgs.lib.nixosSystem =
      { modules }:
      nixpkgs.lib.nixosSystem {
        modules =
          builtins.filter (module: !builtins.isPath module || builtins.pathExists module) modules
          ++ [
            {
              boot.isContainer = true;
              nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
            }
          ];
      };
  };
in
{
  inherit nix-relay nix-relay-client;

  lints = nix-relay.overrideAttrs (old: {
    pname = "nix-relay-lints";
    # All that has been written, but not what was built of it.
    src = lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.difference ../. (
        lib.fileset.unions [
          (lib.fileset.maybeMissing ../.git)
          (lib.fileset.maybeMissing ../target)
        ]
      );
    };
    nativeBuildInputs = old.nativeBuildInputs ++ [
      pkgs.clippy
      pkgs.rustfmt
      pkgs.shellcheck
    ];
    buildPhase = "bash test/lint";
    doCheck = false;
    doInstallCheck = false;
    installPhase = "touch $out";
  });

  module =
    assert lib.assertMsg (module.failures == { }) (builtins.toJSON module.failures);
    pkgs.writeText "nix-relay-module" (builtins.toJSON module.written);

  # Evaluated, but not built.
  example = pkgs.writeText "nix-relay-example" (
    builtins.unsafeDiscardStringContext example.nixosConfigurations.builder.config.system.build.toplevel.drvPath
  );

  inherit (nix-relay.tests) nixos;
}

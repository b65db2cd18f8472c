# What the flake offers.
{ nixpkgs, ... }:
let
  inherit (nixpkgs) lib;
  linux = [
    "x86_64-linux"
    "aarch64-linux"
  ];
  darwin = [
    "x86_64-darwin"
    "aarch64-darwin"
  ];
  # nixpkgs is about to do without x86_64-darwin.
  known = builtins.filter (system: nixpkgs.legacyPackages ? ${system});
  on = systems: f: lib.genAttrs (known systems) (system: f nixpkgs.legacyPackages.${system});
  own = pkgs: import ./. { inherit pkgs; };
  nixosModules = rec {
    # By its path, so that it counts once under both names, and errors name it. `nix flake check` of Nix 2.8 refuses a
    # bare path.
    nix-relay.imports = [ ./module.nix ];
    client.imports = [ ./client-module.nix ];
    default = nix-relay;
  };
in
{
  packages =
    on linux (pkgs: own pkgs // { default = (own pkgs).nix-relay; })
    // on darwin (pkgs: rec {
      inherit (own pkgs) nix-relay-client;
      default = nix-relay-client;
    });

  overlays.default = final: _: own final;

  inherit nixosModules;

  devShells = on linux (pkgs: {
    default = import ./shell.nix { inherit pkgs; };
  });

  apps = on linux (pkgs: {
    default = {
      type = "app";
      program = lib.getExe (own pkgs).nix-relay;
      meta.description = "The relay: `nix run . -- CONFIG.toml`";
    };
    demo = {
      type = "app";
      program = lib.getExe (import ./demo.nix pkgs);
      meta.description = "A real remote build on this machine, run from a checkout";
    };
  });

  formatter = on (linux ++ darwin) (pkgs: pkgs.nixfmt-tree);

  checks = on linux (pkgs: import ./checks.nix { inherit nixpkgs nixosModules pkgs; });
}

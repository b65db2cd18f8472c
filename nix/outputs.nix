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
in
{
  packages =
    on linux (pkgs: own pkgs // { default = (own pkgs).nix-relay; })
    // on darwin (pkgs: rec {
      inherit (own pkgs) nix-relay-client;
      default = nix-relay-client;
    });

  overlays.default = final: _: own final;

  nixosModules = rec {
    nix-relay = import ./module.nix;
    default = nix-relay;
  };

  devShells = on linux (pkgs: {
    default = import ./shell.nix { inherit pkgs; };
  });

  apps = on linux (pkgs: rec {
    default = demo;
    demo = {
      type = "app";
      program = lib.getExe (import ./demo.nix pkgs);
      meta.description = "A real remote build on this machine, run from a checkout";
    };
  });

  formatter = on (linux ++ darwin) (pkgs: pkgs.nixfmt-tree);

  checks = on linux (pkgs: import ./checks.nix { inherit pkgs; });
}

# The packages, for Nix without flakes as well: `nix-build nix -A nix-relay`.
{
  pkgs ? import <nixpkgs> { },
}:
{
  nix-relay = pkgs.callPackage ./package.nix { };
  nix-relay-static = pkgs.pkgsStatic.callPackage ./package.nix { };
  nix-relay-client = pkgs.callPackage ./client.nix { };
}

# What test/run and test/demo need, but for root: `nix develop -c test/run`.
{
  pkgs ? import <nixpkgs> { },
}:
pkgs.mkShell {
  packages = import ./tools.nix pkgs;
  # For `cargo static`.
  buildInputs = [ pkgs.glibc.static ];
}

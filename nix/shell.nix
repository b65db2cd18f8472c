# What test/run and test/demo need, but for root: `nix develop -c test/run`.
{
  pkgs ? import <nixpkgs> { },
}:
pkgs.mkShell {
  packages = import ./tools.nix pkgs;
  # For the static file of test/chroot.rs: this Rust has no musl target.
  buildInputs = [ pkgs.glibc.static ];
}

# `nix run .#demo`: test/demo, which builds in its own directory and so cannot be in the store.
pkgs:
pkgs.writeShellApplication {
  name = "nix-relay-demo";
  runtimeInputs = import ./tools.nix pkgs;
  text = ''
    [[ -x test/demo ]] || { echo 'run this at the top of a checkout of nix-relay' >&2; exit 1; }
    exec test/demo "$@"
  '';
}

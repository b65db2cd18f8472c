# The programs that the commands in test/ need.
pkgs: [
  pkgs.bubblewrap
  pkgs.caddy
  pkgs.cargo
  pkgs.clippy
  pkgs.curl
  pkgs.haproxy
  pkgs.iproute2
  pkgs.nginx
  pkgs.nix
  pkgs.openssl
  pkgs.pkg-config
  pkgs.prometheus.cli # promtool
  pkgs.rustc
  pkgs.rustfmt
  pkgs.shellcheck
  pkgs.stdenv.cc
  pkgs.systemd
  pkgs.tinyproxy
  pkgs.util-linux
  pkgs.websocat
]

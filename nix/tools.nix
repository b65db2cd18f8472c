# The programs that the commands in test/ need.
pkgs: [
  pkgs.bubblewrap
  # Without its other names, which would hide real programs.
  (pkgs.runCommand "busybox" { } "mkdir -p $out/bin && ln -s ${pkgs.busybox}/bin/busybox $out/bin")
  pkgs.caddy
  pkgs.cargo
  pkgs.clippy
  pkgs.curl
  pkgs.e2fsprogs
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

# Sourced by the commands in test/: goes to the top of the project, and installs what they need.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# Debian keeps servers where only root looks.
PATH=$PWD/target/tools/bin:$PATH:/usr/sbin

# Whether something is there: a program, a library, or a program of a certain kind.
has() {
  case $1 in
    # Debian's compilers do not depend on it.
    libc) echo 'int main() {}' | cc -x c -o /dev/null - 2>/dev/null ;;
    # Where it is /bin/busybox, it is the shell of Nix's sandbox, in which there are no libraries.
    'static busybox') type -P busybox >/dev/null && [[ ! -e /bin/busybox || $(ldd /bin/busybox 2>&1) != *'=>'* ]] ;;
    OpenSSL) pkg-config --exists openssl 2>/dev/null ;;
    *) type -P "$1" >/dev/null ;;
  esac
}

as_root() {
  if ((UID == 0)); then
    "$@"
  elif has sudo; then
    sudo "$@"
  else
    echo "not root, and there is no sudo to run: $*" >&2
    return 1
  fi
}

# need THING=PACKAGE…: on Debian installs the packages of what is missing; elsewhere says what that is.
need() {
  local pair things=() packages=()
  has cargo || { echo "cargo is missing: install a Rust toolchain first" >&2; exit 1; }
  for pair; do
    has "${pair%=*}" && continue
    things+=("${pair%=*}") packages+=("${pair#*=}")
  done
  ((${#packages[@]})) || return 0
  has apt-get || { echo "please install: ${things[*]}" >&2; exit 1; }
  # Cargo needs them to download crates.
  packages+=(ca-certificates)
  echo "installing with apt-get, which takes about a minute: ${packages[*]}"
  as_root apt-get update -qq
  # No package may start the service that it brings.
  as_root env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 \
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
}

# need_crate NAME@VERSION MINUTES: installs a program with cargo in target/tools.
need_crate() {
  has "${1%@*}" && return
  echo "installing with cargo in target/tools, which takes about $2 minutes on two cores: $1"
  cargo install --locked --root target/tools "$1"
}

# What runs a real nix with a store of its own.
need_nix() {
  need cc=gcc libc=libc6-dev nix=nix-bin unshare=util-linux mount=mount "$@"
  # Only root can make it. test/support/own-store mounts stores there.
  [[ -d /var/lib/nix-relay-test ]] || as_root mkdir /var/lib/nix-relay-test
}

# The same, and what client.sh runs.
need_client_sh() {
  # No release of Debian has websocat. Building it takes OpenSSL.
  has websocat || set -- pkg-config=pkg-config OpenSSL=libssl-dev "$@"
  need_nix curl=curl "$@"
  need_crate websocat@1.14.1 2
}

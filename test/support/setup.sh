# Sourced by the commands in test/: goes to the top of the project, and sees to it that what they need is there.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# need PROGRAM=PACKAGE…: on Debian installs the packages of programs that are missing; elsewhere names them.
need() {
  local pair sudo='' programs=() packages=()
  PATH=$PWD/target/tools/bin:$PATH
  command -v cargo >/dev/null || { echo "cargo is missing: install a Rust toolchain first" >&2; exit 1; }
  for pair; do
    type -P "${pair%=*}" >/dev/null && continue
    programs+=("${pair%=*}") packages+=("${pair#*=}")
  done
  # websocat links OpenSSL.
  if ! [[ $(type -P websocat) || -e /usr/include/openssl/ssl.h ]]; then
    programs+=(OpenSSL) packages+=(libssl-dev)
  fi
  if ((${#packages[@]})); then
    type -P apt-get >/dev/null || { echo "please install: ${programs[*]}" >&2; exit 1; }
    ((UID == 0)) || sudo=sudo
    echo "installing with apt-get: ${packages[*]}"
    $sudo apt-get update -qq
    # No package is to start the service that it brings.
    $sudo env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 \
      apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
  fi
  if ! type -P websocat >/dev/null; then
    echo "installing with cargo, in target/tools: websocat"
    cargo install --quiet --locked --root target/tools websocat@1.14.1
  fi
  # Where own-store mounts stores, which it could not make without root.
  [[ -d /var/lib/nix-relay-test ]] || { ((UID == 0)) || sudo=sudo; $sudo mkdir /var/lib/nix-relay-test; }
}

# Everything that runs a real nix through client.sh.
need_nix() {
  need cc=gcc curl=curl jq=jq nix=nix-bin pkg-config=pkg-config unshare=util-linux "$@"
}

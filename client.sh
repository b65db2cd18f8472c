#!/usr/bin/env bash
# Carries stdin and stdout to a nix-relay, with an OIDC token of this CI job:
#   nix build --store 'ssh-ng://localhost?remote-program=/path/to/client.sh'
# NIX_RELAY_URL says where the relay is; README.md has the rest. Arguments are ignored.
set -euo pipefail

fail() {
  printf 'nix-relay-client: %s\n' "$1" >&2
  exit 1
}

# Tokens leave the environment at once, and are given to the one program that needs each.
secrets=(NIX_RELAY_TOKEN ACTIONS_ID_TOKEN_REQUEST_TOKEN GITLAB_OIDC_TOKEN CIRCLE_OIDC_TOKEN_V2)
export -n "${secrets[@]}" ACTIONS_ID_TOKEN_REQUEST_URL token=''

for program in curl jq websocat cat sh; do
  type -P "$program" >/dev/null || fail "$program is not installed (curl, jq and websocat must be)"
done

url=${NIX_RELAY_URL:-}
[[ $url =~ ^wss?://[^/?#]+(.*)$ ]] ||
  fail "set NIX_RELAY_URL to where the relay is, as wss://HOST or ws://HOST:PORT (it is '$url')"
[[ ${BASH_REMATCH[1]} == [/?]* ]] || url+=/relay

# The token that GitHub and Forgejo give to a job with the permission id-token: write.
actions_token() {
  local audience answer request=$ACTIONS_ID_TOKEN_REQUEST_URL
  audience=$(jq -rn --arg audience "${NIX_RELAY_AUDIENCE:-api://nix-relay}" '$audience | @uri')
  [[ $request == *\?* ]] && request+='&' || request+='?'
  if ! answer=$(printf 'Authorization: Bearer %s' "$ACTIONS_ID_TOKEN_REQUEST_TOKEN" |
    curl -sS --fail --retry 2 --connect-timeout 10 --max-time 30 -H @- "${request}audience=$audience" 2>&1); then
    answer=${answer##*curl: }
    answer=${answer#(*) }
    fail "no token from ACTIONS_ID_TOKEN_REQUEST_URL: ${answer%%$'\n'*}"
  fi
  # Where there is no input at all, jq succeeds, so that its output must decide.
  token=$(printf '%s' "$answer" | jq -r '.value | strings' 2>/dev/null) || token=''
  [[ $token ]] || fail 'no token from ACTIONS_ID_TOKEN_REQUEST_URL: its answer has no .value'
}

if [[ ${NIX_RELAY_TOKEN:-} ]]; then
  token=$NIX_RELAY_TOKEN
elif [[ ${ACTIONS_ID_TOKEN_REQUEST_URL:-} && ${ACTIONS_ID_TOKEN_REQUEST_TOKEN:-} ]]; then
  actions_token
elif [[ ${GITLAB_OIDC_TOKEN:-} ]]; then
  token=$GITLAB_OIDC_TOKEN
elif [[ ${CIRCLE_OIDC_TOKEN_V2:-} ]]; then
  token=$CIRCLE_OIDC_TOKEN_V2
else
  fail 'no token: set NIX_RELAY_TOKEN, or let the job have one: GitHub or Forgejo (permission id-token: write) sets ACTIONS_ID_TOKEN_REQUEST_URL and _TOKEN, GitLab (id_tokens) GITLAB_OIDC_TOKEN, CircleCI CIRCLE_OIDC_TOKEN_V2'
fi
# What else could stand there would become a header line of its own.
[[ $token =~ ^[A-Za-z0-9._~+/=-]+$ ]] || fail 'the token has characters that no token has'

# Asks as websocat did, for what websocat does not tell: why there is no session.
refusal() {
  local answer status
  answer=$(printf 'Authorization: Bearer %s' "$token" |
    curl -sS --noproxy '*' --http1.1 --max-time 10 -w '\n%{http_code}' -H @- \
      -H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' \
      -H 'Sec-WebSocket-Key: bml4LXJlbGF5LWNsaWVudA==' "http${url#ws}" 2>&1 |
    tr -d '\000-\011\013-\037') || true
  status=${answer##*$'\n'} answer=${answer%%$'\n'*}
  if [[ $status != 000 && $status != 101 ]]; then
    echo "the relay refused: $status: ${answer:0:400}"
  elif [[ $1 == *'status code ('* ]]; then
    answer=${1##*status code (}
    echo "the relay refused: ${answer%)}"
  else
    answer=${answer#curl: (*) }
    echo "cannot reach $url: ${answer:-$1}"
  fi
}

# Makes one line of what websocat says. It holds stdout open until then, so that Nix, which
# gives up at the end of that, waits for the line.
explain() {
  local line connected='' said=''
  while IFS= read -r line; do
    case $line in
      *'Connected to ws'*) connected=yes && continue ;;
      *'The close message is Some('*'status_code: 1000,'*) continue ;;
      *'The close message is Some('*)
        line=${line#*status_code: } && line=${line% \})}
        line="the relay ended the session: ${line/, reason: /: }" ;;
      'websocat: error running') continue ;;
      'websocat: '* | thread*panicked*)
        line=${line#websocat: } && line=${line//WebSocketError: /}
        [[ $connected ]] && line="the session broke off: $line" || line=$(refusal "$line") ;;
      *) continue ;;
    esac
    [[ $said ]] || printf 'nix-relay-client: %s\n' "$line" >&2
    said=yes
  done
}

# Two lines of websocat's log, which have the filter's "es" in common; more would show the token.
export RUST_LOG='websocat::ws_peer=debug,websocat::ws_client_peer=info/es'
# Its own standard input and output would be slow (threads, 8 KiB at a time) or lose the end of an answer (without: a
# buffer that is not flushed again after it met a full pipe). So two cats stand between, of which none may hold open
# what another waits to see the end of, nor be the child that websocat kills when it ends. A frame can be left half sent,
# too, until the next one: a ping mends that.
cats='unset WEBSOCAT_BASIC_AUTH; exec 5<&0 2>/dev/null; cat <&3 4>&- 5<&- & cat <&5 >&4 3<&- &'
exec 3<&0 4>&1 2> >(explain)
WEBSOCAT_BASIC_AUTH=oidc:$token exec websocat --binary --exit-on-eof --ping-interval 1 "$url" "sh-c:$cats"

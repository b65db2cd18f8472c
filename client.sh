#!/usr/bin/env bash
# Carries stdin and stdout to a nix-relay, with an OIDC token of this CI job:
#   nix build --store 'ssh-ng://localhost?remote-program=/path/to/client.sh'
# NIX_RELAY_URL says where the relay is; README.md has the rest.
#
# websocat has the session. This shell reads what websocat logs, says in one line what went wrong, and asks with curl
# what websocat does not tell. Nix kills this shell when it is done; `guard` then ends the session.
set -euo pipefail
# Patterns match bytes: a token is ASCII, and so is what may be shown of an answer.
LC_ALL=C
# bash 3.2 takes these from variables alone.
is_url='^(wss?://)([^/?#@]*@)?([^/?#@]+)([^#]*)'
is_http='^http://([^/?#@]*@)?([^/?#@]+)'
is_here='^(([^:]+\.)?localhost|127\.[0-9.]+|\[::1])(:[0-9]*)?$'
has_value='"value"[[:space:]]*:[[:space:]]*"([^"\]+)"'
has_status=$'^(.*)\nstatus ([0-9]+)$'
has_code='status_code: ([0-9]+), reason: "(.*)" }'
is_old='^websocat (0|1\.[0-9]|1\.1[0-3])\.'

say() {
  printf 'nix-relay-client: %s\n' "$1" >&2
}

fail() {
  say "$1"
  exit 1
}

# Text from the other side on one line, short, and without what a terminal would obey.
shown() {
  local text=${1#"${1%%[![:space:]]*}"}
  text=${text%%[$'\r\n']*}
  text=${text:0:400}
  printf '%s' "${text//[^ -~]/?}"
}

[[ ${1:-} != --serve ]] ||
  fail 'use ssh-ng:// instead of ssh://, as in ssh-ng://localhost?remote-program=/path/to/client.sh'

missing=''
for program in curl websocat cat env sh sleep; do
  type -P "$program" >/dev/null || missing+=", $program"
done
[[ ! $missing ]] || fail "not installed: ${missing#, }"

# What may mend a connection that ended with these words.
advice() {
  local own='if the CA is your own, set SSL_CERT_FILE to its certificate'
  [[ ! $authorities ]] || own="$authorities lacks its CA, or is not there"
  case $1 in
    *'alert certificate required'* | *'alert handshake failure'*)
      printf 'does it want a client certificate? There is none'
      ;;
    *'certificate has expired'* | *'certificate is not yet valid'*) printf 'check the certificate, and the clock' ;;
    *mismatch* | *'subject name'*) printf 'does the relay run, and is NIX_RELAY_URL right?' ;;
    *certificate*) printf 'does the server send its intermediate certificates? Otherwise, %s' "$own" ;;
    *) printf 'does the relay run, and is NIX_RELAY_URL right?' ;;
  esac
}

# Nix's own variable counts too, and a file that is not there does not: Nix's shells name one.
authorities=${SSL_CERT_FILE:-${NIX_SSL_CERT_FILE:-}}
unset SSL_CERT_FILE
[[ ! -e $authorities ]] || export SSL_CERT_FILE=$authorities

# Where a token may come from, in this order. Secrets leave the environment at once, and only the program that needs one
# gets it.
sources=(NIX_RELAY_TOKEN NIX_RELAY_TOKEN_COMMAND ACTIONS_ID_TOKEN_REQUEST_URL GITLAB_OIDC_TOKEN CIRCLE_OIDC_TOKEN_V2)
secrets=("${sources[@]}" ACTIONS_ID_TOKEN_REQUEST_TOKEN)
export -n "${secrets[@]}" token=''

given=${NIX_RELAY_URL:-}
while [[ $given == *[$'\r\n'] ]]; do given=${given%?}; done
if ! [[ $given =~ $is_url ]]; then
  # A user name and password are not shown.
  [[ $given ]] && given="it is '${given##*@}'" || given='it is not set'
  fail "set NIX_RELAY_URL to where the relay is, as wss://HOST or ws://HOST:PORT ($given)"
fi
scheme=${BASH_REMATCH[1]} host=${BASH_REMATCH[3]} path=${BASH_REMATCH[4]}
[[ $path && $path != / ]] || path=/relay
url=$scheme$host$path
[[ $scheme == wss:// || $host =~ $is_here ]] ||
  say "warning: the token goes unencrypted to $host; use wss:// instead"

keepalive=${NIX_RELAY_KEEPALIVE_SECS:-30} queue=${NIX_RELAY_QUEUE_SECS:-3600}
[[ $keepalive:$queue =~ ^[0-9]{1,9}:[0-9]{1,9}$ ]] ||
  fail "NIX_RELAY_KEEPALIVE_SECS ('$keepalive') and NIX_RELAY_QUEUE_SECS ('$queue') must be whole numbers of seconds"
keepalive=$((10#$keepalive)) queue=$((10#$queue))

# The output of the user's own command, which sees all secrets.
command_token() {
  local answer='' limit=(env) status=''
  # This ends the command, too. BusyBox before 1.30 has another one.
  ! timeout 9 true 2>/dev/null || limit=(timeout 30)
  # The command's text could hold a secret, so it is in no argument list.
  # shellcheck disable=SC2016
  IFS= read -r -d '' -n 16400 -t 31 answer < <(
    export "${secrets[@]}"
    "${limit[@]}" sh -c 'eval "$NIX_RELAY_TOKEN_COMMAND"' </dev/null 3<&- 4>&- || status=$?
    printf '\nstatus %s' "${status:-0}"
  ) && no_token 'it printed more than 16 KiB'
  [[ $answer =~ $has_status && ${BASH_REMATCH[2]} != 124 ]] || no_token 'it did not end within 30 s'
  [[ ${BASH_REMATCH[2]} == 0 ]] || no_token "it ended with status ${BASH_REMATCH[2]}"
  token=${BASH_REMATCH[1]}
}

# The token that GitHub and Forgejo give to a job with the permission id-token: write.
actions_token() {
  local answer status request=$ACTIONS_ID_TOKEN_REQUEST_URL
  local options=(-q -sS --fail -G -w '\n%{http_code}' --retry 2 --retry-connrefused --connect-timeout 10 --max-time 30)
  if [[ $request != https://* ]]; then
    [[ $request =~ $is_http && ${BASH_REMATCH[2]} =~ $is_here ]] ||
      no_token "it must begin with https://, or the job's secret would go unencrypted"
    options+=(--noproxy '*')
  fi
  # What curl says of a first try may stand before the answer to the next.
  answer=$(curl "${options[@]}" -H @<(printf 'Authorization: Bearer %s' "$ACTIONS_ID_TOKEN_REQUEST_TOKEN") \
    --data-urlencode "audience=${NIX_RELAY_AUDIENCE:-api://nix-relay}" "$request" 2>&1) || true
  status=${answer##*$'\n'} words=${answer##*curl: (}
  if [[ $status == 000 ]]; then
    words=$(shown "${words#*) }")
    [[ $words != *'certificate problem'* ]] || words+="; $(advice "$words")"
    no_token "$words"
  fi
  [[ $status == 200 ]] || no_token "it answered with status $status"
  [[ $answer =~ $has_value ]] || no_token 'its answer has no .value'
  token=${BASH_REMATCH[1]}
}

no_token() {
  fail "no token from $source: $1"
}

get_token() {
  for source in "${sources[@]}"; do
    [[ $source != ACTIONS_* || ${ACTIONS_ID_TOKEN_REQUEST_TOKEN:-} ]] || continue
    [[ ! ${!source:-} ]] || break
  done
  case $source in
    NIX_RELAY_TOKEN_COMMAND) command_token ;;
    ACTIONS_*) actions_token ;;
    *) token=${!source:-} ;;
  esac
  [[ $token || $source != CIRCLE* ]] ||
    fail 'no token: set NIX_RELAY_TOKEN or NIX_RELAY_TOKEN_COMMAND, or let the job have one: GitHub or Forgejo (permission id-token: write) sets ACTIONS_ID_TOKEN_REQUEST_URL and _TOKEN, GitLab (id_tokens) GITLAB_OIDC_TOKEN, CircleCI CIRCLE_OIDC_TOKEN_V2'
  while [[ $token == *[$'\r\n'] ]]; do token=${token%?}; done
  # What else could stand there would become a header line of its own.
  [[ $token =~ ^[A-Za-z0-9._~+/=-]+$ ]] ||
    fail "the token from $source contains invalid characters: it must be the token alone, without spaces, quotes or line breaks"
}

# Its process id, and then what two modules of websocat log, if it has an "e": so there is no line for each message. Other
# modules would show the token.
#
# websocat's own standard input and output would be slow, or lose the end of an answer. So two cats stand between, which
# are no children of it, as it would kill them. When one has brought the end of the answer to Nix, there is no use for the
# other; until then the log stays open.
#
# websocat may leave a frame half sent until the next one. A ping each second mends that, and is the clock of `carry`.
session() {
  # shellcheck disable=SC2016
  local cats='trap "" PIPE
    unset WEBSOCAT_BASIC_AUTH RUST_LOG
    exec 5<&0
    {
      cat <&3 2>/dev/null 4>&- 5<&- &
      input=$!
      exec >&4 3<&- 4>&-
      cat <&5 &
      echo "cat $!" >&2
      wait "$!"
      kill "$input"
    } &'
  # Without TLS it need not read a hundred certificates, which takes a tenth of a second.
  [[ $scheme == wss:// ]] || export SSL_CERT_FILE=/dev/null SSL_CERT_DIR=/dev/null
  export RUST_LOG='websocat::ws_peer=debug,websocat::ws_client_peer=info/e' WEBSOCAT_BASIC_AUTH="oidc:$token"
  sh -c 'echo "$PPID"'
  exec websocat --binary --close-status-code 1000 --ping-interval 1 "$url" "sh-c:$cats" 2>&1
}

# Ends websocat as soon as nobody can tell its process id any more, as the session is over, or Nix has killed this shell.
# It has 5 s to end by itself: then the relay hears a Close.
guard() {
  local websocat second
  read -r websocat
  read -r || true
  for ((second = 0; second < 5; second++)); do
    kill -0 "$websocat"
    sleep 1
  done
  kill -KILL "$websocat"
}

# Starts websocat, and waits until it has a session; else `said` is what it said first.
connect() {
  local line second
  said=''
  exec 6> >(guard >/dev/null 2>&1 3<&- 4>&-)
  exec 5< <(session 6>&-)
  read -r websocat <&5
  echo "$websocat" >&6
  # A full relay lets its clients wait for 30 s, and answers then.
  for ((second = 0; second < 40; second++)); do
    # Nix may be gone; while we wait, nothing else would tell.
    kill -0 "$parent" 2>/dev/null || exit 1
    while IFS= read -r -t 1 line <&5; do
      case $line in
        *'] Connected to ws'*) return 0 ;;
        'websocat: '* | thread*panicked*) said=${said:-${line#websocat: }} ;;
      esac
    done
  done
  exec 6>&-
  said=${said//WebSocketError: /}
  said=$(shown "${said:-no answer within 40 s}")
  return 1
}

# Finds why there is no session: `reason`, and whether the relay is `full`. Asks as websocat did, and reads no more of the
# answer than it shows, as that may be long, or the session that websocat did not get.
diagnose() {
  local seconds=11 curl line status='' text='' body='' version
  version=$(websocat --version 2>&1) || true
  ! [[ $version =~ $is_old ]] || fail "$version is too old: install 1.14 or newer (cargo install websocat)"
  # A full relay lets curl wait, too.
  [[ $said != *'(503 '* ]] || seconds=40
  exec 7< <(
    sh -c 'echo "$PPID"'
    exec curl -q -sS -D - -N --noproxy '*' --http1.1 --connect-timeout 10 --max-time "$seconds" "http${url#ws}" \
      -H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' \
      -H 'Sec-WebSocket-Key: bml4LXJlbGF5LWNsaWVudA==' -H @<(printf 'Authorization: Bearer %s' "$token") 2>&1
  )
  read -r curl <&7
  full=''
  while IFS= read -r -n 4096 line <&7; do
    line=${line%$'\r'}
    case $line in
      HTTP/*) status=${line#* } ;;
      [Nn]ix-[Rr]elay-[Qq]ueue:*full*) full=yes ;;
      [Cc]ontent-[Tt]ype:*text/plain*) text=yes ;;
      '' | 'curl: ('*) break ;;
    esac
  done
  [[ ! $status || $status == 101* ]] || IFS= read -r -d '' -n 16384 body <&7 || true
  kill "$curl" 2>/dev/null || true

  # The relay's codes end with 503, and those of large proxies begin with 520.
  if [[ $text && ($status == 4* || $status == 50[0-3]*) ]]; then
    body=$(shown "$body")
    reason="the relay refused: ${status%% *}: ${body:-$(shown "${status#* }")}"
  elif [[ $status && $status != 101* ]]; then
    reason="a proxy or web server answered in the relay's place: $(shown "${status/ /: }"); $(advice '')"
  elif [[ $said == *'(503 '* ]]; then
    # Now it has room.
    full=yes reason="the relay refused: $said"
  else
    [[ $line != 'curl: ('* ]] || said=$(shown "${line#curl: (*) }")
    reason="cannot reach $url: $said; $(advice "$said")"
  fi
}

# Whether Nix has taken some of the answer since the last time, or lets some wait: either way, the answer of a ping may
# have to wait behind that. Only Linux tells.
busy() {
  local before=$taken
  { read -r _ taken <"/proc/$output/io"; } 2>/dev/null || return
  [[ $taken != "$before" ]] || { read -r -t 0 <"/proc/$output/fd/0"; } 2>/dev/null
}

# The session is over. Only the first reason is said: the rest follows from it.
over() {
  [[ $end || ! $1 ]] || say "$1"
  end=${end:-badly}
  exec 6>&-
}

# Reads what websocat logs until it has ended, and Nix has all of the answer.
carry() {
  local line output='' silent=0 taken='' end=''
  while IFS= read -r line <&5; do
    case $line in
      'cat '[0-9]*) output=${line#cat } ;;
      *'] Sending WebSocket ping')
        ! busy || silent=0
        ((keepalive == 0 || ++silent <= 3 * keepalive)) ||
          over "the session broke off: no response from the relay for three keepalive intervals ($((3 * keepalive)) s)"
        ;;
      *'] The close message is Some('*)
        [[ $line =~ $has_code ]]
        [[ ${BASH_REMATCH[1]} != 1000 ]] || end=${end:-well}
        over "the relay ended the session: ${BASH_REMATCH[1]}: $(shown "${BASH_REMATCH[2]//\\\"/\"}")"
        ;;
      *'] The close message is None') over 'the relay ended the session without a reason' ;;
      *'] incoming None') over 'the session broke off: the connection was closed; was the relay or a proxy restarted?' ;;
      *'] Received '*) silent=0 ;;
      'websocat: '* | thread*panicked*)
        line=${line#websocat: }
        line="the session broke off: $(shown "${line//WebSocketError: /}")"
        # That Nix takes no more is not worth a line.
        [[ $line != *'Broken pipe'* ]] || kill -0 "$output" 2>/dev/null || line=''
        over "$line"
        ;;
    esac
  done
  over 'the session broke off: websocat was killed'
  [[ $end == well ]]
}

exec 3<&0 4>&1 </dev/null
# Nix; or this shell, if that is another user's.
parent=$PPID
kill -0 "$parent" 2>/dev/null || parent=$$
SECONDS=0 next=0
while get_token && start=$SECONDS && ! connect; do
  diagnose
  [[ $full && $SECONDS -lt $queue ]] || fail "$reason"
  if ((SECONDS >= next)); then
    say "all sessions are in use; waiting for up to $((queue - SECONDS)) s"
    next=$((SECONDS + 60))
  fi
  # Where the relay does not hold its clients.
  ((SECONDS > start + 4)) || sleep 5
done
carry

#!/usr/bin/env bash
# Carries stdin and stdout to a nix-relay, with an OIDC token of this CI job:
#   nix build --store 'ssh-ng://localhost?remote-program=/path/to/client.sh'
# NIX_RELAY_URL says where the relay is; README.md has the rest.
set -euo pipefail
# Patterns match bytes: a token is ASCII, and so is what may be shown of an answer.
LC_ALL=C
# bash 3.2 takes these from variables alone.
is_url='^(wss?://)([^/?#@]*@)?([^/?#@]+)([^#]*)'
has_user='^([^/]*//)?[^/?#]*@(.*)$'
is_here='^(([^:]+\.)?localhost|127\.[0-9.]+|\[::1])(:[0-9]*)?$'
has_value='"value"[[:space:]]*:[[:space:]]*"([^"\]+)"'
has_title='<[Tt][Ii][Tt][Ll][Ee][^>]*>([^<]+)'
is_old='^websocat (0|1\.[0-9]|1\.1[0-3])\.'

say() {
  printf 'nix-relay-client: %s\n' "$1" >&2
}

fail() {
  say "$1"
  exit 1
}

# Tokens leave the environment at once, and are given to the one program that needs each.
secrets=(NIX_RELAY_TOKEN ACTIONS_ID_TOKEN_REQUEST_TOKEN GITLAB_OIDC_TOKEN CIRCLE_OIDC_TOKEN_V2)
export -n "${secrets[@]}" ACTIONS_ID_TOKEN_REQUEST_URL token=''

[[ ${1:-} != --serve ]] ||
  fail 'use ssh-ng:// instead of ssh://, as in ssh-ng://localhost?remote-program=/path/to/client.sh'

for program in curl websocat cat sh; do
  type -P "$program" >/dev/null || fail "$program is not installed (curl and websocat must be)"
done

given=${NIX_RELAY_URL:-}
while [[ $given == *[$'\r\n'] ]]; do given=${given%?}; done
if ! [[ $given =~ $is_url ]]; then
  # A user name is not shown.
  [[ $given =~ $has_user ]] && given=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
  [[ $given ]] && given="it is '$given'" || given='it is not set'
  fail "set NIX_RELAY_URL to where the relay is, as wss://HOST or ws://HOST:PORT ($given)"
fi
scheme=${BASH_REMATCH[1]} host=${BASH_REMATCH[3]} path=${BASH_REMATCH[4]}
[[ $path && $path != / ]] || path=/relay
url=$scheme$host$path
[[ $scheme == wss:// || $host =~ $is_here ]] ||
  say "warning: the token goes unencrypted to $host; use wss:// instead"

keepalive=${NIX_RELAY_KEEPALIVE_SECS:-30}
[[ $keepalive =~ ^[0-9]{1,9}$ ]] ||
  fail "NIX_RELAY_KEEPALIVE_SECS must be a whole number of seconds (it is '$keepalive')"
keepalive=$((10#$keepalive))

# Text as a part of a URL's query.
encoded() {
  local text=$1 byte
  while [[ $text ]]; do
    printf -v byte '%d' "'$text"
    if [[ $text == [A-Za-z0-9._~-]* ]]; then
      printf '%s' "${text:0:1}"
    else
      printf '%%%02X' $((byte & 255))
    fi
    text=${text:1}
  done
}

# The token that GitHub and Forgejo give to a job with the permission id-token: write.
actions_token() {
  local answer status request=$ACTIONS_ID_TOKEN_REQUEST_URL
  [[ $request == *\?* ]] && request+='&' || request+='?'
  request+=audience=$(encoded "${NIX_RELAY_AUDIENCE:-api://nix-relay}")
  # What curl says of a first try may stand before the answer to the next.
  answer=$(printf 'Authorization: Bearer %s' "$ACTIONS_ID_TOKEN_REQUEST_TOKEN" |
    curl -q -sS --fail --retry 2 --retry-connrefused --connect-timeout 10 --max-time 30 -w '\n%{http_code}' \
      -H @- "$request" 2>&1) || true
  status=${answer##*$'\n'}
  if [[ $status == 000 ]]; then
    answer=${answer##*curl: (}
    answer=${answer#*) }
    fail "no token from $source: ${answer%%$'\n'*}"
  fi
  [[ $status == 200 ]] || fail "no token from $source: it answered with status $status"
  [[ $answer =~ $has_value ]] || fail "no token from $source: its answer has no .value"
  token=${BASH_REMATCH[1]}
}

if [[ ${NIX_RELAY_TOKEN:-} ]]; then
  source='in NIX_RELAY_TOKEN' token=$NIX_RELAY_TOKEN
elif [[ ${ACTIONS_ID_TOKEN_REQUEST_URL:-} && ${ACTIONS_ID_TOKEN_REQUEST_TOKEN:-} ]]; then
  source=ACTIONS_ID_TOKEN_REQUEST_URL
  actions_token
  source="from $source"
elif [[ ${GITLAB_OIDC_TOKEN:-} ]]; then
  source='in GITLAB_OIDC_TOKEN' token=$GITLAB_OIDC_TOKEN
elif [[ ${CIRCLE_OIDC_TOKEN_V2:-} ]]; then
  source='in CIRCLE_OIDC_TOKEN_V2' token=$CIRCLE_OIDC_TOKEN_V2
else
  fail 'no token: set NIX_RELAY_TOKEN, or let the job have one: GitHub or Forgejo (permission id-token: write) sets ACTIONS_ID_TOKEN_REQUEST_URL and _TOKEN, GitLab (id_tokens) GITLAB_OIDC_TOKEN, CircleCI CIRCLE_OIDC_TOKEN_V2'
fi
while [[ $token == *[$'\r\n'] ]]; do token=${token%?}; done
# What else could stand there would become a header line of its own.
[[ $token =~ ^[A-Za-z0-9._~+/=-]+$ ]] ||
  fail "the token $source contains invalid characters: it must be the token alone, without spaces, quotes or line breaks"

# Text from the other side on one line, short, and without what a terminal would obey.
shown() {
  local text=$1
  text=${text#"${text%%[![:space:]]*}"}
  text=${text:0:400}
  text=${text%"${text##*[![:space:]]}"}
  printf '%s' "${text//[^ -~]/?}"
}

# Says why curl, which asked as websocat did, had no answer: its line of the error.
unreachable() {
  local code=${1#curl: (} words=${1#curl: (*) }
  code=${code%%)*}
  case $code:$words in
    1:* | 8:*) words='its answer is not HTTP; is it a relay that listens there?' ;;
    6:*) words+='; is the name right?' ;;
    7:*) words+='; does the relay run, and is the port right?' ;;
    28:Operation*) words='no answer within 10 s; is it a relay that listens there?' ;;
    28:*SSL*) words='no TLS handshake within 10 s; does that port speak TLS?' ;;
    28:*) words='no connection within 10 s; is a firewall in the way?' ;;
    35:*) words="TLS failed: $words; does that port speak TLS?" ;;
    52:* | 56:*) words+='; does the relay run?' ;;
    60:*expired | 60:*'not yet valid' | 60:*'subject name'*) words="the certificate is not trusted: $words" ;;
    60:*) words="the certificate is not trusted: $words; if the CA is your own, set SSL_CERT_FILE to its certificate" ;;
  esac
  printf 'cannot reach %s: %s' "$url" "$words"
}

# Says what an answer's status, reason phrase, type and body mean.
refused() {
  local status=$1 reason=$2 type=$3 body=$4
  body=${body#"${body%%[![:space:]]*}"}
  if [[ $type == *text/html* || $body == '<'* ]]; then
    [[ $body =~ $has_title ]] && reason=$(shown "${BASH_REMATCH[1]}")
    reason=${reason#"$status"}
    reason=${reason# }
    printf '%s' "a proxy or web server answered in the relay's place: $status${reason:+: $reason}"
    printf '; does the relay run, and is NIX_RELAY_URL right?'
  else
    body=${body%%$'\n'*}
    body=${body:-$reason}
    printf '%s' "the relay refused: $status${body:+: $(shown "$body")}"
  fi
}

# Asks as websocat did, for what websocat does not tell. After the process id, the answer, or the error, is on stdout.
ask() {
  printf 'Authorization: Bearer %s' "$token" |
    curl -q -sS -D - -N --noproxy '*' --http1.1 --connect-timeout 10 --max-time 11 -H @- \
      -H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' \
      -H 'Sec-WebSocket-Key: bml4LXJlbGF5LWNsaWVudA==' "http${url#ws}" 2>&1 &
  echo "$!"
}

# Says why there is no session, from what `ask` finds and what websocat said. Reads no more of an answer than it shows,
# as that may be long, or the session that websocat did not get.
diagnosis() {
  local curl line status=100 reason='' type='' body='' said=$1
  IFS= read -r curl
  while [[ $status == 1?? && $status != 101 ]]; do
    IFS= read -r -n 4096 line || break
    [[ $line == HTTP/* ]] || break
    line=${line%$'\r'} && line=${line#* }
    status=${line%% *} reason=${line#"$status"}
    while [[ $status != 101 ]] && IFS= read -r -n 4096 line && [[ ${line%$'\r'} ]]; do
      [[ $line != [Cc]ontent-[Tt]ype:* ]] || type=$line
    done
  done
  [[ $status == 1?? ]] || IFS= read -r -d '' -n 16384 body || true
  kill "$curl" 2>/dev/null || true
  if [[ $status != 1?? ]]; then
    refused "$(shown "$status")" "$(shown "$reason")" "$type" "$body"
  elif [[ $status == 100 && $line == 'curl: ('* ]]; then
    unreachable "$line"
  elif [[ $said == *'status code ('* ]]; then
    said=${said##*status code (}
    printf 'the relay refused: %s' "${said%)}"
  else
    [[ $said != *certificate* ]] || said+='; if the CA is your own, set SSL_CERT_FILE to its certificate'
    printf 'cannot reach %s: %s' "$url" "$said"
  fi
}

# Says, for a person, why websocat has no session.
no_session() {
  local version
  version=$(websocat --version 2>&1) || true
  if [[ $version =~ $is_old ]]; then
    say "$version is too old: install 1.14 or newer (cargo install websocat)"
  else
    say "$(ask | diagnosis "$1")"
  fi
}

# Whether Nix has yet to take what came, or takes it now, so that we do not wait for the relay. Only Linux tells.
busy() {
  local name value before=$switches
  [[ -r /proc/$output/status ]] || return
  ! read -r -t 0 <"/proc/$output/fd/0" || return 0
  while read -r name value; do
    [[ $name != voluntary_ctxt_switches: ]] || switches=$value
  done <"/proc/$output/status"
  [[ $switches != "$before" ]]
} 2>/dev/null

# Whether Nix has killed this shell, even if it does not yet wait for it: then, on Linux, there is no working directory.
killed() {
  ! kill -0 "$$" 2>/dev/null || [[ -e /proc/self/cwd && ! -e /proc/$$/cwd ]]
}

# A second of a session has passed: is there still anybody at either end?
tick() {
  if killed; then
    # The end of its input has websocat send a Close. This sees to it that it ends.
    kill "$input" 2>/dev/null || true
    ((++orphaned < 5)) || kill -KILL "$websocat" 2>/dev/null || true
  fi
  ! busy || silent=0
  ((keepalive == 0 || ++silent <= 3 * keepalive)) && return
  broken "no response from the relay for three keepalive intervals ($((3 * keepalive)) s)"
  kill -KILL "$websocat" 2>/dev/null || true
}

# The first thing that went wrong is said, the rest follows from it.
ended() {
  [[ $failed ]] || say "$1"
  failed=yes
}

broken() {
  ended "the session broke off: $1"
}

# Reads what websocat logs, says in one line what went wrong, and ends it when nobody is at the other end. It holds
# stdout open until then, so that Nix, which gives up at the end of that, waits for the line.
supervise() {
  local websocat line second connected='' error='' failed='' silent=0 orphaned=0 input='' output='' switches=''
  IFS= read -r websocat
  # A full relay lets its clients wait for 30 s, and answers then.
  for ((second = 0; second < 40; second++)); do
    ! killed || break
    while IFS= read -r -t 1 line; do
      case $line in
        *'Connected to ws'*) connected=yes && break 2 ;;
        'websocat: '* | thread*panicked*) error=${error:-$line} ;;
      esac
    done
  done
  if [[ ! $connected ]]; then
    kill -KILL "$websocat" 2>/dev/null || true
    error=${error:-no answer within 40 s; is it a relay that listens there?}
    error=${error#websocat: }
    no_session "$(shown "${error//WebSocketError: /}")"
    return 1
  fi

  while IFS= read -r line; do
    case $line in
      'cats '*) input=${line#cats } output=${input#* } input=${input% *} ;;
      *'] Sending WebSocket ping') tick ;;
      *'] The close message is Some('*'{ status_code: 1000, reason: '*) ;;
      *'] The close message is Some('*)
        line=${line#*status_code: }
        line=${line/, reason: \"/: }
        line=${line%\" \})}
        line=${line%: }
        line=${line//\\\"/\"}
        ended "the relay ended the session: $(shown "$line")" ;;
      *'] The close message is None') ended 'the relay ended the session without a reason' ;;
      *'] incoming None') broken 'the connection was closed; was the relay or a proxy restarted?' ;;
      *'] Received '*) silent=0 ;;
      'websocat: error running') ;;
      'websocat: '* | thread*panicked*)
        # Nix takes no more, which is not worth a line.
        if [[ $line == *'Broken pipe'* ]] && ! kill -0 "$output" 2>/dev/null; then failed=yes; fi
        line=${line#websocat: }
        broken "$(shown "${line//WebSocketError: /}")" ;;
    esac
  done
  [[ ! $input ]] || kill "$input" 2>/dev/null || true
  [[ ! $failed ]]
}

# What websocat logs, with its process id as the first line: all of two of its modules that has an "e", so that there is
# no line for each message. Other modules would show the token.
#
# Its own standard input and output would be slow (threads, 8 KiB at a time) or lose the end of an answer (without: a
# buffer that is not flushed again after it met a full pipe). So two cats stand between, of which none may hold open
# what another waits to see the end of, nor be the child that websocat kills when it ends. A frame can be left half sent,
# too, until the next one: a ping mends that, and is the clock of `supervise`.
session() {
  # shellcheck disable=SC2016
  local cats='unset WEBSOCAT_BASIC_AUTH RUST_LOG; exec 5<&0; cat <&3 2>/dev/null 4>&- 5<&- & input=$!
    cat <&5 >&4 2>/dev/null 3<&- & echo "cats $input $!" >&2'
  echo "${BASHPID:-$(exec sh -c 'echo "$PPID"')}"
  # Without TLS it need not read a hundred certificates.
  [[ $scheme == wss:// ]] || export SSL_CERT_FILE=/dev/null SSL_CERT_DIR=/dev/null
  export RUST_LOG='websocat::ws_peer=debug,websocat::ws_client_peer=info/e'
  WEBSOCAT_BASIC_AUTH=oidc:$token exec websocat --binary --exit-on-eof --ping-interval 1 "$url" "sh-c:$cats"
}

# Nix kills the program that it started as soon as it is done. That is this shell, which websocat outlives for as long as
# it takes to see the end of its input, and to close the session.
exec 3<&0 4>&1 6>&2
# This shell would say that websocat was killed.
{ session 2>&1 6>&- | supervise 2>&6 6>&-; } 2>/dev/null || exit 1

# shellcheck shell=bash
# A migration from host a to host b, with an observer outside of both, and belay's own judge over all of it.
#
# The observer runs on this machine; the hosts reach it over eth1, which nothing that is done to the data path touches.

readonly MIGRATION_PORT=7700
MIGRATIONS=0
OBSERVER_PID='' SEND='' RECEIVE='' STORY=''

# Certificates, made once a run on host a, as an operator would make them.
need_keys() {
  [ ! -e "$WORK/keys" ] || return 0
  LABEL=keygen on a 60 "exec /lab/bin/belay keygen --out /lab/keys" || die "belay keygen failed on host a: $(last_words "$SAID_IN")"
  : >"$WORK/keys"
}

# Starts observer, destination and source. The options are words of `belay receive` and `belay send`.
# Leaves the orders' names in RECEIVE and SEND, and in STORY the folder where the verdict will be.
start_migration() { # label, fabric, receive options, send options
  local label=$1 options
  MIGRATIONS=$((MIGRATIONS + 1)) MIGRATION_FABRIC=$2
  printf -v STORY '%s/story-%02d-%s' "$OUT" "$MIGRATIONS" "$label"
  mkdir -p "$STORY"
  need_keys
  start_observer || return
  options="--json --output-to $OUT_WORLD:$OBSERVER_PORT"
  start_on b "receive-$label" "exec /lab/bin/belay receive $options --listen $B_DATA:$MIGRATION_PORT $(fabric_options "$2" b)" \
    "--cert /lab/keys/destination.crt --key /lab/keys/destination.key --peer-cert /lab/keys/source.crt --state-dir /run/belay $3"
  RECEIVE=$ORDER SAID_IN=$OUT/b/$RECEIVE
  await_line b "$RECEIVE" '"event":"listening"' 30 || return
  start_on a "send-$label" "exec /lab/bin/belay send $options --to $B_DATA:$MIGRATION_PORT $(fabric_options "$2" a)" \
    "--cert /lab/keys/source.crt --key /lab/keys/source.key --peer-cert /lab/keys/destination.crt --state-dir /run/belay --check $4"
  SEND=$ORDER SAID_IN=$OUT/a/$SEND
}

# What belay is told to choose a fabric.
fabric_options() { # fabric, host
  case $1 in
    tcp) printf '%s' "$TCP_OPTIONS" ;;
    verbs) printf '%s' '--fabric verbs --trusted-fabric --ib-dev rxe0 --gid-index 1' ;;
  esac
}
TCP_OPTIONS=''

start_observer() {
  local end=$((SECONDS + 20))
  bounded_files setpriv --pdeathsig KILL "$OUT/bin/belay" observe --json --listen 127.0.0.1:0 --log "$STORY/packets.log" >"$STORY/observer.out" 2>"$STORY/observer.err" </dev/null &
  OBSERVER_PID=$!
  OBSERVER_PORT=''
  until [ -e "$STORY/observer.out" ] && OBSERVER_PORT=$(sed -n 's/.*"event":"listening","address":"127.0.0.1:\([0-9]*\)".*/\1/p' "$STORY/observer.out") && [ -n "$OBSERVER_PORT" ]; do
    [ "$SECONDS" -lt "$end" ] || return 124
    kill -0 "$OBSERVER_PID" || return
    pause_a_moment
  done
}

# Ends the observer and waits until it has written the packets down.
stop_observer() {
  [ -n "$OBSERVER_PID" ] || return 0
  kill -TERM "$OBSERVER_PID" 2>/dev/null || true
  wait "$OBSERVER_PID" || true
  OBSERVER_PID=''
}

# A number of the newest event of a kind in what an order wrote, or nothing.
event_number() { # host, order, event, field
  sed -n "s/.*\"event\":\"$3\".*\"$4\":\([0-9]*\).*/\1/p" "$OUT/$1/$2.out" | tail -1
}

count_events() { # host, order, event
  grep -c "\"event\":\"$3\"" "$OUT/$1/$2.out" || true
}

# Waits until so much of RAM has landed, three checkpoints have committed and a packet is out.
await_mid_pull() { # percent, seconds
  local end=$((SECONDS + $2))
  until awk -v percent="$1" '
      function number(name) { return match($0, "\"" name "\":[0-9]+") ? substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0 : 0 }
      /"event":"committed"/ { commits++ }
      /"event":"pull"/ { landed = number("landed_frames"); absent = number("absent_frames"); out = number("released_packets") }
      END { exit !(commits >= 3 && out >= 1 && absent > 0 && landed * 100 >= (landed + absent) * percent) }' "$OUT/b/$RECEIVE.out"; do
    if has_ended a "$SEND" || has_ended b "$RECEIVE"; then return 1; fi
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

# Starts a migration and waits until it is in mid-pull. On a busy machine an emulated host may be too slow for one of belay's own bounds (a
# guest that does not stop in time): then the guest has not moved, which the source says (exit code 5) and which is no word on what is tried
# here. It is started once more then, and that is told.
reach_mid_pull() { # percent, seconds, and what start_migration takes
  local percent=$1 seconds=$2
  shift 2
  start_migration "$@" && await_mid_pull "$percent" "$seconds" && return
  guest_has_not_moved || return
  remark "$1 is started again, its guest did not move: $(sed -n 's/.*"event":"failed","what":"\([^"]*\)".*/\1/p' "$OUT/a/$SEND.out" | tail -1)"
  clear_migration
  start_migration "$@" && await_mid_pull "$percent" "$seconds"
}

guest_has_not_moved() {
  local code=0
  [ -n "$SEND" ] || return
  await a "$SEND" 20 || code=$?
  [ "$code" = 5 ]
}

# Judges the migration by what all three wrote down: each of the judge's claims is a check, with the figures it rests on.
judge_migration() { # the migration's name in the checks, further options of `belay judge`
  local line claim code=0
  stop_observer
  # shellcheck disable=SC2086 # the options are words
  "$OUT/bin/belay" judge --source "$OUT/a/$SEND.out" --destination "$OUT/b/$RECEIVE.out" --packets "$STORY/packets.log" ${2-} \
    >"$STORY/verdict.txt" 2>&1 || code=$?
  if [ "$code" != 0 ] && [ "$code" != 20 ]; then
    not_ok "$1: judged" "$(tail -qn 2 "$STORY/verdict.txt" | tr '\n' ' ')"
    return
  fi
  if grep -q "\"event\":\"connected\".*\"fabric\":\"$MIGRATION_FABRIC\"" "$OUT/a/$SEND.out"; then
    ok "$1: carried by $MIGRATION_FABRIC"
  else
    not_ok "$1: carried by $MIGRATION_FABRIC" 'the two hosts agreed on something else'
  fi
  while IFS= read -r line; do
    claim=${line:7} claim=${claim%%: *}
    case $line in
      '  ok   '*) ok "$1: $claim" "${line#*: }" ;;
      'WRONG  '*) not_ok "$1: $claim" "${line#*: }" ;;
    esac
  done <"$STORY/verdict.txt"
}

# Whether the source and the destination ended with these exit codes; `lost` stands for a host that was powered off.
expect_exits() { # name, source's code, destination's code, seconds
  local wanted=$2 order=$SEND host=a code
  for host in a b; do
    if [ "$wanted" != lost ]; then
      code=0
      await "$host" "$order" "$4" || code=$?
      SAID_IN=$OUT/$host/$order
      if [ "$code" = "$wanted" ]; then
        ok "$1: host $host ends with exit code $wanted"
      elif [ "$code" = 124 ]; then
        not_ok "$1: host $host ends with exit code $wanted" "it had not ended after $4 s: $(last_words "$SAID_IN")"
        signal_order "$host" "$order" KILL
      else
        not_ok "$1: host $host ends with exit code $wanted" "it was $code: $(last_words "$SAID_IN")"
      fi
    fi
    wanted=$3 order=$RECEIVE
  done
}

# Ends what a failed migration may have left on the hosts, so that the next one finds its port free.
clear_migration() {
  local host order=$SEND
  stop_observer
  for host in a b; do
    if [ -n "$order" ] && is_up "$host" && ! has_ended "$host" "$order"; then
      signal_order "$host" "$order" KILL
      await "$host" "$order" 20 || true
    fi
    order=$RECEIVE
  done
  SEND='' RECEIVE=''
}

# The guest of the suites, no busier than such a path can tether: emulated hosts encrypt and carry about a megabyte a second, and each
# pause of a guest under nested KVM takes tens of milliseconds there. A busier one is slowed down by back-pressure, as it should be,
# and shows less in the same time.
GUEST='--memory 16M --working-set 2M --dirty-rate 1k --drive kvm --period 50ms'

# What both ends of a migration that went wrong said last.
story_words() { printf 'source: %s; destination: %s' "$(last_words "$OUT/a/$SEND")" "$(last_words "$OUT/b/$RECEIVE")"; }

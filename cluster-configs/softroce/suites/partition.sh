# shellcheck shell=bash
# partition: the data path is cut at a seeded moment of the pull and healed at another, or one host's RDMA port or device goes. Whatever each host then believes, the
# outside, whose own path to both hosts is untouched, never sees two guests that show anything new.

ABOUT='the link between the hosts is cut and healed at seeded moments, a port goes down, a device is removed: never two guests that show anything new'
NEEDS=(belay)

# How a link fails: frames vanish both ways, or one way only, or the cable is pulled.
readonly CUTS='silent one-way-from-a one-way-from-b cable'

run_suite() {
  local fabric kind cuts=$CUTS
  [ -z "$QUICK" ] || cuts='silent cable'
  for fabric in $FABRICS; do
    for kind in $cuts; do long_cut "$fabric" "$kind"; done
    for kind in silent cable; do short_cut "$fabric" "$kind"; done
    if [ "$fabric" = verbs ]; then for kind in $PORT_LOSSES; do port_loss "$kind"; done; fi
  done
}

cut_link() { # kind
  case $1 in
    silent) drop_frames b a ;;
    one-way-from-a) drop_frames a ;;
    one-way-from-b) drop_frames b ;;
    cable) pull_cable ;;
  esac
}

# What a host's own RDMA port or device can do in the middle of a migration. The kernel tells (IBV_EVENT_PORT_ERR,
# RDMA_CM_EVENT_DEVICE_REMOVAL), and the operator of that host is to hear it, and no guess.
readonly PORT_LOSSES='port-down-on-b port-down-on-a device-removed-on-b device-removed-on-a'
readonly PORT_DOWN='port 1 of the RDMA device rxe0 (went|is) down' DEVICE_REMOVED='the RDMA device rxe0 was removed'
# A queue pair tries for 1.9 s, by the specification up to four times as long, and a source whose own port is down waits for the lease of
# five seconds to run out: twice the longer, because the hosts are emulated.
readonly PORT_LOSS_BOUND_MS=15000

# Leaves the order in LOSS; when it began is the first thing it says. A removal ends when nobody has the device open any more.
lose_port() { # kind, host
  local what='ip link set eth0 down'
  [ "${1%-on-*}" = port-down ] || what='rdma link delete rxe0'
  start_on "$2" "${1%-on-*}" "cat /proc/uptime; exec /usr/bin/$what"
  LOSS=$ORDER
  await_line "$2" "$LOSS" '^[0-9]' 20
}

# A device whose port was down is made anew too: on rxe, requests of rdma_cm that leave a host whose interface has been down are not answered
# any more, whoever makes them.
renew_device() { # kind, host
  await "$2" "$LOSS" 30 && LABEL=renewed on "$2" 20 '/usr/bin/rdma link delete rxe0 2>/dev/null; exec /usr/bin/rdma link add rxe0 type rxe netdev eth0'
}

# A named failure within its bound on the host whose port it is, the guest caught, the old destination shut out.
port_loss() { # kind
  local name percent host=${1##*-} order=$SEND words=$DEVICE_REMOVED lost_ms told_ms
  choose 10 70 && percent=$CHOSEN
  name="verbs, ${1//-/ } at $percent %"
  reach_mid_pull "$percent" 90 "$1" verbs "--hold-pull-at $percent" "$GUEST --lease 5s --run-on 2s" ||
    { not_ok "$name: reached" "$(story_words)"; clear_migration; return; }
  if [ "$host" = a ]; then order=$SEND; else order=$RECEIVE; fi
  [ "${1%-on-*}" != port-down ] || words=$PORT_DOWN
  lose_port "$1" "$host" || not_ok "$name: it happens" "$(last_words "$OUT/$host/$LOSS")"
  lost_ms=$(calculate "${LINE%% *} * 1000" 0)
  if await_line "$host" "$order" "\"event\":\"(noticed|state)\".*$words" 60; then
    told_ms=$(sed -n 's/.*"at_us":\([0-9]*\)[0-9]\{3\},.*/\1/p' <<<"$LINE")
    figure 'told after' "$((told_ms - lost_ms))" ms
    if [ $((told_ms - lost_ms)) -le "$PORT_LOSS_BOUND_MS" ]; then ok "$name: host $host says what happened, in time"; else not_ok "$name: host $host says what happened, in time" "$PORT_LOSS_BOUND_MS ms are allowed"; fi
  else
    not_ok "$name: host $host says what happened, in time" "$(story_words)"
  fi
  if await_line a "$SEND" '"event":"caught"' 60; then ok "$name: the guest is caught"; else not_ok "$name: the guest is caught" "$(story_words)"; fi
  [ "${1%-on-*}" != port-down ] || LABEL=port-up on "$host" 20 '/usr/bin/ip link set eth0 up' || not_ok "$name: undone" "$(last_words "$SAID_IN")"
  expect_shut_out "$name"
  expect_one_at_a_time "$name"
  clear_migration
  check "$name: the device goes once nobody uses it, and can be made anew" renew_device "$1" "$host"
}

# Longer than the lease: the source catches the guest while it is cut off, and the old destination comes back to nothing.
long_cut() { # fabric, kind
  local name percent heal_after_ms
  choose 10 70 && percent=$CHOSEN
  choose 0 1500 && heal_after_ms=$CHOSEN
  name="$1, $2 cut at $percent %"
  reach_mid_pull "$percent" 90 "cut-$2" "$1" "--hold-pull-at $percent" "$GUEST --lease 1s --run-on 2s" ||
    { not_ok "$name: reached" "$(story_words)"; heal; clear_migration; return; }
  cut_link "$2" || { not_ok "$name: the link is cut" "$(last_words "$SAID_IN")"; clear_migration; return; }
  if await_line a "$SEND" '"event":"caught"' 60; then
    figure 'noticed to running' "$(calculate "$(event_number a "$SEND" caught noticed_to_running_us) / 1000" 1)" ms
    ok "$name: the guest is caught while the link is cut"
  else
    not_ok "$name: the guest is caught while the link is cut" "$(story_words)"
  fi
  # A guest that runs on host a and a host b that comes back at any moment of that.
  pass_ms "$heal_after_ms"
  heal
  figure 'healed after the catch' "$heal_after_ms" ms
  expect_shut_out "$name"
  expect_one_at_a_time "$name"
  clear_migration
}

# The old destination must stop its guest for good: told by the source (13), or fenced until its operator gives it up (11).
expect_shut_out() { # name
  local code=0
  await a "$SEND" 60 || code=$?
  SAID_IN=$OUT/a/$SEND
  if [ "$code" = 10 ]; then ok "$1: host a ends with exit code 10"; else not_ok "$1: host a ends with exit code 10" "it was $code: $(last_words "$SAID_IN")"; fi
  await b "$RECEIVE" 3 || true
  if ! has_ended b "$RECEIVE"; then
    await_line b "$RECEIVE" '"event":"state","state":"fenced"' 30 || true
    signal_order b "$RECEIVE" TERM
  fi
  code=0
  await b "$RECEIVE" 30 || code=$?
  SAID_IN=$OUT/b/$RECEIVE
  case $code in
    11) ok "$1: host b fenced its guest and ends with exit code 11" ;;
    13) ok "$1: host b heard that its guest is void and ends with exit code 13" ;;
    *) not_ok "$1: host b gives its guest up" "exit code $code: $(last_words "$SAID_IN")" ;;
  esac
}

# Much shorter than the lease: a hiccup. Nobody fences, nobody catches, the guest arrives.
short_cut() { # fabric, kind
  local name percent cut_ms
  choose 10 60 && percent=$CHOSEN
  choose 50 400 && cut_ms=$CHOSEN
  name="$1, $2 hiccup at $percent %"
  reach_mid_pull "$percent" 90 "hiccup-$2" "$1" '--check --run-on 500ms' "$GUEST --lease 8s" ||
    { not_ok "$name: reached" "$(story_words)"; heal; clear_migration; return; }
  interrupt_for "$2" "$cut_ms" || not_ok "$name: the link is cut and healed" 'the hosts took too long for it'
  expect_exits "$name" 0 0 120
  figure 'cut for about' "$cut_ms" ms
  expect_one_at_a_time "$name"
  clear_migration
}

# The judge's claims; and, counted here from the observer's packets without belay: new packets come from the source, then from the
# destination, then if it was caught from the source, and never change hands otherwise.
expect_one_at_a_time() { # name
  local hands
  judge_migration "$1"
  hands=$(awk '!seen[$3]++ && $2 != last { printf "%s%s", (NR > 1 ? " " : ""), $2; last = $2 }' "$STORY/packets.log")
  case $hands in
    'source destination' | 'source destination source') ok "$1: never two guests that show anything new" "$hands" ;;
    *) not_ok "$1: never two guests that show anything new" "new packets came from: $hands" ;;
  esac
}

# shellcheck shell=bash
# demo: a guest driven by KVM moves from host a to host b; host b loses its power in mid-pull; the guest comes back on host a.

# A host whose processor another program takes for a second is slow, not dead: these hosts are emulated on what is left over.
LEASE=5s

ABOUT='host b is powered off in mid-pull: the guest is caught on host a, every byte and packet checked; then one goes to release'
NEEDS=(belay)

run_suite() {
  local fabric round rounds=3
  [ -z "$QUICK" ] || rounds=1
  for fabric in $FABRICS; do
    for ((round = 1; round <= rounds; round++)); do power_loss "$fabric"; done
    [ -n "$QUICK" ] || { to_release "$fabric"; source_loss "$fabric"; }
  done
}

# The pull is held where it is to be interrupted, because an emulated host may do much between two looks at it.
power_loss() { # fabric
  local name percent seed
  choose 15 80 && percent=$CHOSEN
  choose 1 9999 && seed=$CHOSEN
  name="$1, power lost at $percent %"
  need_hosts
  reach_mid_pull "$percent" 90 power-loss "$1" "--hold-pull-at $percent" "$GUEST --lease $LEASE --seed $seed --run-on 500ms" ||
    { not_ok "$name: reached" "$(story_words)"; clear_migration; return; }
  power_off b
  expect_exits "$name" 10 lost 60
  figure 'noticed to running' "$(calculate "$(event_number a "$SEND" caught noticed_to_running_us) / 1000" 1)" ms
  figure 'guest seed' "$seed" ''
  judge_migration "$name"
  clear_migration
}

# The same, left alone: every page lands, the source writes the release down, the guest is checked on host b.
to_release() { # fabric
  local name="$1, to release"
  need_hosts
  start_migration release "$1" '--check --run-on 500ms' "$GUEST --lease $LEASE" || { not_ok "$name: started" "$(story_words)"; clear_migration; return; }
  expect_exits "$name" 0 0 120
  figure 'total migration time' "$(calculate "$(event_number a "$SEND" released total_us) / 1e6" 1)" s
  judge_migration "$name"
  clear_migration
}

# The other host loses its power: nothing was released, so the guest is stopped on host b and shown to nobody; its memory is kept
# until the operator gives it up (SIGTERM).
source_loss() { # fabric
  local name="$1, source's power lost" code=0
  reach_mid_pull 40 90 source-loss "$1" '--hold-pull-at 40' "$GUEST --lease $LEASE" ||
    { not_ok "$name: reached" "$(story_words)"; clear_migration; return; }
  power_off a
  if await_line b "$RECEIVE" '"event":"state","state":"fenced"' 60; then
    ok "$name: the guest is fenced on host b"
  else
    not_ok "$name: the guest is fenced on host b" "$(last_words "$OUT/b/$RECEIVE")"
  fi
  signal_order b "$RECEIVE" TERM
  expect_exits "$name" lost 11 30
  clear_migration
}

# shellcheck shell=bash
# loss: a path that loses and delays packets, but lives. Slow is not dead: nobody is fenced, nothing is caught, the guest arrives.

ABOUT='packets are lost and delayed on the way: slow is not dead, the guest arrives and all of it is checked'
NEEDS=(belay)

# netem's words for both directions. With a rate netem counts a frame's delay from the frame before it, so that jitter never lets one
# overtake another: on a path that reorders, a reliable connection begins again and again, which is true of RoCE and not what is tried
# here.
readonly DISTURBANCES=('loss 0.3%' 'delay 10ms 3ms rate 1gbit' 'loss 0.2% delay 5ms 2ms rate 1gbit')

run_suite() {
  local fabric what
  for fabric in $FABRICS; do
    for what in "${DISTURBANCES[@]}"; do
      disturbed "$fabric" "$what"
      [ -z "$QUICK" ] || break
    done
  done
}

disturbed() { # fabric, netem's words
  local name="$1, $2"
  disturb "$2" || { not_ok "$name: netem" "$(last_words "$SAID_IN")"; return; }
  # The lease is longer than retransmission takes where a round trip has ten milliseconds and more: that is what it is chosen by.
  start_migration "loss" "$1" '--check --run-on 300ms' "$GUEST --lease 5s" || not_ok "$name: started" "$(story_words)"
  expect_exits "$name" 0 0 180
  if [ "$(count_events a "$SEND" noticed)" = 0 ]; then ok "$name: nobody was taken for dead"; else not_ok "$name: nobody was taken for dead" "$(story_words)"; fi
  dropped_packets a && dropped_packets b
  heal
  figure 'total migration time' "$(calculate "$(event_number a "$SEND" released total_us) / 1e6" 1)" s
  judge_migration "$name"
  clear_migration
}

# What netem did, so that a suite that disturbed nothing is seen.
dropped_packets() { # host
  LABEL=netem on "$1" 20 '/usr/bin/tc -s qdisc show dev eth0' || return
  figure "frames sent by host $1" "$(sed -n 's/.* \([0-9]*\) pkt.*/\1/p' <<<"$SAID" | head -1)" ''
  figure "dropped by netem on host $1" "$(sed -n 's/.*(dropped \([0-9]*\),.*/\1/p' <<<"$SAID" | head -1)" ''
}

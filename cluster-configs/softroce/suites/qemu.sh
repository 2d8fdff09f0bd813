# shellcheck shell=bash
# qemu: an unmodified QEMU with a Linux under KVM on host a is moved to one on host b by `belay send … qemu` and `belay receive … qemu`. Where
# the hosts' kernel can tether a QEMU guest, host b loses its power in mid-pull, and the guest goes on in the standby on host a.

ABOUT='a QEMU guest under KVM is moved to host b; with kernel 6.12 host b is powered off in mid-pull and the guest caught in its standby on host a, then one goes to release'
NEEDS=(belay qemu)
# The guest's RAM, which its QEMU and belay share, what the QEMUs themselves take, and belay's checkpoint ring.
NEEDS_MIB=1536

run_suite() {
  local fabric
  remark "the hosts' QEMU is $HOSTS_QEMU_VERSION"
  for fabric in $FABRICS; do
    moved "$fabric"
    case $KERNEL in
      6.1) tether_refused "$fabric" ;;
      *) caught_in_standby "$fabric"; released "$fabric" ;;
    esac
  done
}

# No tether: every kernel and every QEMU that belay supports.
moved() { # fabric
  local name="$1, moved"
  start_guest "$name" "moved-$1" || { clear_guest; return; }
  start_qemu_migration moved "$1" '' '--policy none' || { not_ok "$name: started" "$(story_words)"; clear_guest; return; }
  expect_exits "$name" 0 0 180
  carried "$name"
  left_qemu_ended "$name"
  figure blackout "$(milliseconds_of blackout took_us)" ms
  figure 'total migration time' "$(calculate "$(event_number a "$SEND" released total_us) / 1e6" 1)" s
  goes_on_where_it_was "$name"
  right_all_along "$name" "$OUT"/{a,b}/"$CONSOLE"
  clear_guest
}

# A kernel without asynchronous write protection says so before the guest is touched.
tether_refused() { # fabric
  local name="$1, a tether where the kernel has none" before
  start_guest "$name" "refused-$1" || { clear_guest; return; }
  start_qemu_migration refused "$1" '' "$QEMU_TETHER" || { not_ok "$name: started" "$(story_words)"; clear_guest; return; }
  expect_exits "$name" 5 3 60
  if grep -q '"event":"failed".*userfaultfd lacks.*WP_ASYNC' "$OUT/a/$SEND.out"; then ok "$name: the source says what the kernel lacks"; else not_ok "$name: the source says what the kernel lacks" "$(story_words)"; fi
  before=$(newest_tick "$OUT/a/$CONSOLE")
  if await_tick a "$CONSOLE" $((before + 20)) 60; then ok "$name: the guest goes on on host a"; else not_ok "$name: the guest goes on on host a" "$(story_words)"; fi
  right_all_along "$name" "$OUT/a/$CONSOLE"
  clear_guest
}

# The pull is held where it is to be interrupted. What host b had committed when its power went must be in the guest that comes back.
caught_in_standby() { # fabric
  local name percent tick first epoch last caught standby
  choose 15 80 && percent=$CHOSEN
  name="$1, power lost at $percent %"
  start_guest "$name" "caught-$1" || { clear_guest; return; }
  start_qemu_migration caught "$1" "--hold-pull-at $percent" "$QEMU_TETHER --release never" || { not_ok "$name: started" "$(story_words)"; clear_guest; return; }
  standby=$OUT/a/$CONSOLE.standby
  # Two seconds of its own on host b, and after its last word there two more checkpoints: one of them began after that word.
  if ! await_epoch 3 180 || ! tick=$(newest_tick "$OUT/b/$CONSOLE") || ! await_tick b "$CONSOLE" $((tick + 20)) 120; then
    not_ok "$name: reached" "$(story_words)"
    clear_guest
    return
  fi
  tick=$(newest_tick "$OUT/b/$CONSOLE") epoch=$(committed_epoch b "$RECEIVE")
  await_epoch $((epoch + 2)) 60 || { not_ok "$name: reached" "$(story_words)"; clear_guest; return; }
  power_off b
  expect_exits "$name" 10 lost 60
  carried "$name"
  caught=$(event_number a "$SEND" caught epoch) last=$(committed_epoch b "$RECEIVE")
  figure 'checkpoints before' "$last" '' && figure 'caught at epoch' "${caught:-none}" ''
  # Host b may have lost its power between a commit and its word about it.
  if [ -n "$caught" ] && [ "$caught" -ge "$last" ] && [ "$caught" -le $((last + 1)) ]; then ok "$name: caught at the last commit"; else not_ok "$name: caught at the last commit" "$(story_words)"; fi
  left_qemu_ended "$name"
  await_tick a "$CONSOLE.standby" 1 60 || true
  first=$(first_tick "$standby") last=$(newest_tick "$OUT/b/$CONSOLE")
  figure 'covered by a commit' "$tick" '' && figure 'back at tick' "$first" '' && figure 'last on host b' "$last" ''
  figure 'noticed to running' "$(milliseconds_of caught noticed_to_running_us)" ms
  if [ "$first" -gt "$tick" ] && [ "$first" -le $((last + 2)) ] && await_tick a "$CONSOLE.standby" $((first + 20)) 60; then
    ok "$name: the guest goes on in the standby from there"
  else
    not_ok "$name: the guest goes on in the standby from there" "its last words there: $(tail -n 2 "$standby" 2>/dev/null | tr -s '\n\r' ' ')"
  fi
  right_all_along "$name" "$OUT"/{a,b}/"$CONSOLE" "$standby"
  clear_guest
}

# A tether that ends well: everything lands, the source writes the release down, the guest is host b's.
released() { # fabric
  local name="$1, tethered to release"
  start_guest "$name" "released-$1" || { clear_guest; return; }
  start_qemu_migration released "$1" '' "$QEMU_TETHER" || { not_ok "$name: started" "$(story_words)"; clear_guest; return; }
  expect_exits "$name" 0 0 180
  carried "$name"
  figure checkpoints "$(count_events b "$RECEIVE" committed)" ''
  figure 'a pause, median' "$(calculate "$(event_number b "$RECEIVE" tether-summary pause_p50_us) / 1000" 1)" ms
  if [ "$(count_events b "$RECEIVE" committed)" -ge 1 ]; then ok "$name: it was tethered until then"; else not_ok "$name: it was tethered until then" "$(story_words)"; fi
  left_qemu_ended "$name"
  figure blackout "$(milliseconds_of blackout took_us)" ms
  figure 'total migration time' "$(calculate "$(event_number a "$SEND" released total_us) / 1e6" 1)" s
  goes_on_where_it_was "$name"
  right_all_along "$name" "$OUT"/{a,b}/"$CONSOLE"
  clear_guest
}

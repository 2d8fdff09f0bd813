# shellcheck shell=bash
# qemu: an unmodified QEMU with a Linux under KVM on host a is moved to one on host b by `belay send … qemu` and `belay receive … qemu`. Where
# the hosts' kernel can tether a QEMU guest, host b loses its power in mid-pull, and the guest goes on in the standby on host a.
#
# The guest checks its memory all along and counts on its serial port, which each host keeps in the shared folder: what it says is there
# after its host has gone. A KVM of an emulated processor runs it, so a page it touches first costs milliseconds.

ABOUT='a QEMU guest under KVM is moved to host b; with kernel 6.12 host b is powered off in mid-pull and the guest caught in its standby on host a, then one goes to release'
NEEDS=(belay qemu)
# The guest's RAM, which its QEMU and belay share, what the QEMUs themselves take, and belay's checkpoint ring.
NEEDS_MIB=1536

readonly QEMU_GUEST_MIB=128
# Little is written, as by the other suites' guests, and it counts ten times a second: each letter is a write to the shared folder.
readonly QEMU_GUEST_WORK='parts=1 mib=2 at_once=1 tick_ms=100'
readonly QEMU_BOOT_LIMIT_S=180
# A host whose processor another program takes for a second is slow, not dead.
# Nor does a checkpoint's pause take milliseconds there: the guest is stopped for 100 to 300 ms each time.
readonly QEMU_TETHER='--lease 5s --period 250ms'

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

# The whole command line of the guest's QEMU on a host. It is the same on both but for the console.
qemu_words() { # host
  printf '%s' "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -machine q35,accel=kvm,memory-backend=ram -cpu host " \
    "-smp 1 -m $QEMU_GUEST_MIB -object memory-backend-file,id=ram,size=${QEMU_GUEST_MIB}M,mem-path=/dev/shm/guest,share=on " \
    "-serial file:/lab/$1/$CONSOLE -kernel /opt/guest/vmlinuz -initrd /opt/guest/initramfs " \
    "-append 'console=ttyS0 quiet loglevel=0 panic=-1 nokaslr mitigations=off no_timer_check $QEMU_GUEST_WORK'"
}

# Starts a guest on host a and waits until it counts. Its QEMU's order is left in QEMU, the name of its consoles in CONSOLE.
start_guest() { # name of the checks, label
  local host
  CONSOLE=console-$2 QEMU=''
  need_hosts
  for host in $HOSTS; do need_qemu "$host" || { not_ok "$1: QEMU on host $host" "$(last_words "$SAID_IN")"; return 1; }; done
  start_on a "qemu-$2" "exec $(qemu_words a) -qmp unix:/run/guest.qmp,server=on,wait=off"
  QEMU=$ORDER
  await_tick a "$CONSOLE" 10 "$QEMU_BOOT_LIMIT_S" && return
  not_ok "$1: a guest boots on host a" "its QEMU: $(last_words "$OUT/a/$QEMU"); its console: $(tail -n 3 "$OUT/a/$CONSOLE" 2>/dev/null | tr -s '\n\r' ' ')"
  return 1
}

# Starts destination and source of that guest; leaves RECEIVE and SEND.
start_qemu_migration() { # label, fabric, options of belay receive, options of belay send
  need_keys
  MIGRATION_FABRIC=$2 SEND='' RECEIVE=''
  start_on b "receive-$1" "exec /lab/bin/belay receive --json --listen $B_DATA:$MIGRATION_PORT $(fabric_options "$2" b)" \
    "--cert /lab/keys/destination.crt --key /lab/keys/destination.key --peer-cert /lab/keys/source.crt --state-dir /run/belay $3 qemu -- $(qemu_words b)"
  RECEIVE=$ORDER
  await_line b "$RECEIVE" '"event":"listening"' 30 || return
  start_on a "send-$1" "exec /lab/bin/belay send --json --to $B_DATA:$MIGRATION_PORT $(fabric_options "$2" a)" \
    "--cert /lab/keys/source.crt --key /lab/keys/source.key --peer-cert /lab/keys/destination.crt --state-dir /run/belay --run-dir /run/belay $4 qemu --qmp /run/guest.qmp"
  SEND=$ORDER
}

# Ends everything of a guest's on the hosts that are up.
clear_guest() {
  local host
  clear_migration
  for host in $HOSTS; do
    is_up "$host" || continue
    LABEL=clear on "$host" 30 'killall -q -KILL qemu-system-x86_64; n=0
      while pgrep qemu-system >/dev/null; do [ $((n += 1)) -lt 200 ] || exit 1; usleep 100000; done; rm -f /dev/shm/guest*' || true
  done
}

# What a console counts: the numbers of its whole ticks, the newest, the first. Of a tick in which a guest moved each console may have a part.
ticks() { sed -n 's/^tick \([0-9]*\) steps.*/\1/p' "$1" 2>/dev/null || true; }
newest_tick() { local tick; tick=$(tail -n 4 "$1" 2>/dev/null | ticks /dev/stdin | tail -1); printf '%d' "${tick:-0}"; }
first_tick() { local tick; tick=$(ticks "$1" | head -1); printf '%d' "${tick:-0}"; }

await_tick() { # host, console, number, seconds
  local end=$((SECONDS + $4))
  until [ "$(newest_tick "$OUT/$1/$2")" -ge "$3" ]; do
    is_up "$1" || return 125
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

# The newest epoch that an order said has committed; 0 before the first.
committed_epoch() { local epoch; epoch=$(event_number "$1" "$2" committed epoch); printf '%d' "${epoch:-0}"; } # host, order

await_epoch() { # number, seconds: at host b, whose belay may not end meanwhile
  local end=$((SECONDS + $2))
  until [ "$(committed_epoch b "$RECEIVE")" -ge "$1" ]; do
    if has_ended a "$SEND" || has_ended b "$RECEIVE"; then return 1; fi
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

carried() { # name
  if grep -q "\"event\":\"connected\".*\"fabric\":\"$MIGRATION_FABRIC\"" "$OUT/a/$SEND.out"; then
    ok "$1: carried by $MIGRATION_FABRIC"
  else
    not_ok "$1: carried by $MIGRATION_FABRIC" "$(story_words)"
  fi
}

# The guest's own words, on each console that it had: no number twice or left out, and nothing wrong with its memory.
right_all_along() { # name, console files...
  local name=$1 file wrong='' count=0
  shift
  for file in "$@"; do
    if grep -qaE 'WRONG|Kernel panic|BUG:|Oops' "$file"; then wrong+="${file##*/}: $(grep -aEm1 'WRONG|Kernel panic|BUG:|Oops' "$file"); "; fi
    wrong+=$(ticks "$file" | awk -v of="${file##*/}" 'NR > 1 && $1 != before + 1 {printf "%s: %d after %d; ", of, $1, before} {before = $1}')
    count=$((count + $(ticks "$file" | wc -l)))
  done
  figure ticks "$count" ''
  if [ -z "$wrong" ]; then ok "$name: the guest found its memory right all along, and counts without a gap"; else not_ok "$name: the guest found its memory right all along, and counts without a gap" "$wrong"; fi
}

# The guest went from one console to another where it was, and goes on there.
goes_on_where_it_was() { # name
  local left came
  await_tick b "$CONSOLE" 1 60 || { not_ok "$1: the guest goes on on host b where it was" "it says nothing there; $(story_words)"; return; }
  left=$(newest_tick "$OUT/a/$CONSOLE") came=$(first_tick "$OUT/b/$CONSOLE")
  figure 'left at tick' "$left" '' && figure 'came at tick' "$came" ''
  if [ "$came" -gt "$left" ] && [ "$came" -le $((left + 2)) ] && await_tick b "$CONSOLE" $((came + 20)) 60; then
    ok "$1: the guest goes on on host b where it was"
  else
    not_ok "$1: the guest goes on on host b where it was" "its last words there: $(tail -n 2 "$OUT/b/$CONSOLE" | tr -s '\n\r' ' ')"
  fi
}

# The QEMU that the guest left can never run it again.
left_qemu_ended() { # name
  local code=0
  await a "$QEMU" 30 || code=$?
  if [ "$code" != 124 ] && [ "$code" != 125 ]; then ok "$1: the QEMU it left on host a has ended"; else not_ok "$1: the QEMU it left on host a has ended" "it runs after 30 s"; fi
}

milliseconds_of() { calculate "$(event_number a "$SEND" "$1" "$2") / 1000" 1; } # event of the source's, its field in microseconds

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

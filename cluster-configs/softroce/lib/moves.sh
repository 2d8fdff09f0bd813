# shellcheck shell=bash
# A QEMU guest of the hosts (lib/qemu.sh) that is moved from host a to host b: its command line, both belays, and what it says of itself.
#
# The guest checks its memory all along and counts on its serial port, which each host keeps in the shared folder: what it says is there
# after its host has gone. A KVM of an emulated processor runs it, so a page it touches first costs milliseconds.

readonly QEMU_GUEST_MIB=128
# Little is written, as by the other suites' guests, and it counts ten times a second: each letter is a write to the shared folder.
readonly QEMU_GUEST_WORK='parts=1 mib=2 at_once=1 tick_ms=100'
readonly QEMU_BOOT_LIMIT_S=180
# A host whose processor another program takes for a second is slow, not dead.
# Nor does a checkpoint's pause take milliseconds there: the guest is stopped for 100 to 300 ms each time.
readonly QEMU_TETHER='--lease 5s --period 250ms'

# The guest's address where it has a network, and where it tells its count.
readonly TAP_GUEST=10.78.0.2 TAP_EVERYBODY=10.78.0.255

# The whole command line of the guest's QEMU on a host. It is the same on both but for the console and the tap.
qemu_words() { # host, end of its console's name, tap
  local network='' more=''
  if [ -n "${3-}" ]; then
    network="-netdev tap,id=n0,ifname=$3,script=no,downscript=no -device virtio-net-pci,netdev=n0,romfile="
    more="address=$TAP_GUEST beacon=$TAP_EVERYBODY"
  fi
  printf '%s' "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -machine q35,accel=kvm,memory-backend=ram -cpu host " \
    "-smp 1 -m $QEMU_GUEST_MIB -object memory-backend-file,id=ram,size=${QEMU_GUEST_MIB}M,mem-path=/dev/shm/guest,share=on " \
    "-serial file:/lab/$1/$CONSOLE${2-} -kernel /opt/guest/vmlinuz -initrd /opt/guest/initramfs${3:+-net} $network " \
    "-append 'console=ttyS0 quiet loglevel=0 panic=-1 nokaslr mitigations=off no_timer_check $QEMU_GUEST_WORK $more'"
}

# Starts a guest on host a and waits until it counts. Its QEMU's order is left in QEMU, the name of its consoles in CONSOLE.
start_guest() { # name of the checks, label, tap
  local host
  CONSOLE=console-$2 QEMU=''
  need_hosts
  for host in $HOSTS; do need_qemu "$host" || { not_ok "$1: QEMU on host $host" "$(last_words "$SAID_IN")"; return 1; }; done
  start_on a "qemu-$2" "exec $(qemu_words a '' "${3-}") -qmp unix:/run/guest.qmp,server=on,wait=off"
  QEMU=$ORDER
  await_tick a "$CONSOLE" 10 "$QEMU_BOOT_LIMIT_S" && return
  not_ok "$1: a guest boots on host a" "its QEMU: $(last_words "$OUT/a/$QEMU"); its console: $(tail -n 3 "$OUT/a/$CONSOLE" 2>/dev/null | tr -s '\n\r' ' ')"
  return 1
}

# Starts destination and source of that guest; leaves RECEIVE and SEND. With a tap the guest's network goes through it, and its standby has the tap
# of that name with an s at the end.
start_qemu_migration() { # label, fabric, options of belay receive, options of belay send, tap
  local tap=${5:+--tap $5} standby=''
  [ -z "$tap" ] || standby="-- $(qemu_words a .standby "${5}s")"
  need_keys
  MIGRATION_FABRIC=$2 SEND='' RECEIVE=''
  start_on b "receive-$1" "exec /lab/bin/belay receive --json --listen $B_DATA:$MIGRATION_PORT $(fabric_options "$2" b)" \
    "--cert /lab/keys/destination.crt --key /lab/keys/destination.key --peer-cert /lab/keys/source.crt --state-dir /run/belay $3 qemu $tap -- $(qemu_words b '' "${5-}")"
  RECEIVE=$ORDER
  await_line b "$RECEIVE" '"event":"listening"' 30 || return
  start_on a "send-$1" "exec /lab/bin/belay send --json --to $B_DATA:$MIGRATION_PORT $(fabric_options "$2" a)" \
    "--cert /lab/keys/source.crt --key /lab/keys/source.key --peer-cert /lab/keys/destination.crt --state-dir /run/belay --run-dir /run/belay $4 qemu --qmp /run/guest.qmp $tap $standby"
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

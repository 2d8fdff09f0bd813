# shellcheck shell=bash
# tap: what a QEMU guest sends through a tap is held by the kernel of host b until its checkpoint has committed. First belay's tests of that gate
# against the hosts' kernel, then a guest that tells its count by its network card at every tick, on three ways out of a tether: belay on host b is
# killed, the guest is released, host b loses its power. Whoever is on host b's network never hears what the caught guest has not said.

ABOUT="the gate before a guest's tap, inside a host; with kernel 6.12 a guest that sends through it is moved to host b: belay killed there, released, host b powered off: nobody heard what had not committed"
NEEDS=(belay glue-tests qemu)
NEEDS_MIB=1536

# Long enough that several of the guest's frames are held at any moment, and that it has most of the time for itself.
readonly TAP_TETHER='--lease 5s --period 3s'
# A tethered guest of an emulated host may need a second for a tick.
readonly TAP_LIMIT_S=150

run_suite() {
  local fabric
  run_tests belay_vmm_glue qemu::tap::
  for fabric in $FABRICS; do
    case $KERNEL in
      6.1) skip "$fabric, behind a gate" 'this kernel cannot tether a QEMU guest' ;;
      *) left_shut "$fabric"; opened_at_release "$fabric"; power_lost "$fabric" ;;
    esac
  done
}

# A tap on a host, with an address by which its own programs hear the guest. What is before the tap stays as it is.
make_tap() { # host, tap
  LABEL=tap on "$1" 20 "[ -e /sys/class/net/$2 ] || { /usr/bin/ip tuntap add $2 mode tap user root && /usr/bin/ip address replace 10.78.0.1/24 brd $TAP_EVERYBODY dev $2 && /usr/bin/ip link set $2 up; }"
}

# The guest's initramfs with the host's modules for its network card beside it; and its program, which is also the one that hears it.
with_modules() { # host
  LABEL=modules on "$1" 60 '[ -e /opt/guest/listener ] || { cd /opt/guest && cpio -id <initramfs && mv init listener && cd / && find modules | cpio -o -H newc >/opt/guest/modules && cat /opt/guest/initramfs /opt/guest/modules >/opt/guest/initramfs-net; }'
}

# Starts a guest on host a that is heard there, and its move to host b, where it is heard behind the gate; waits until it is tethered and frames of it
# have come through.
tethered() { # name, label, fabric, options of belay send
  local host
  need_hosts
  declare -gA HEARD=()
  for host in $HOSTS; do
    need_qemu "$host" && with_modules "$host" && make_tap "$host" vm1 || { not_ok "$1: a tap and a guest on host $host" "$(last_words "$SAID_IN")"; return 1; }
    start_on "$host" "heard-$2" 'export hear=7; exec /opt/guest/listener'
    HEARD[$host]=$ORDER
  done
  make_tap a vm1s || { not_ok "$1: a tap for the standby" "$(last_words "$SAID_IN")"; return 1; }
  start_guest "$1" "$2" vm1 || return
  await_heard a 1 60 || { not_ok "$1: it is heard before it moves" "its console: $(tail -n 3 "$OUT/a/$CONSOLE" | tr -s '\n\r' ' ')"; return 1; }
  start_qemu_migration "$2" "$3" '' "$TAP_TETHER $4" vm1 || { not_ok "$1: started" "$(story_words)"; return 1; }
  await_epoch 3 180 && await_tick b "$CONSOLE" 1 60 && await_heard b 1 "$TAP_LIMIT_S" && return
  look_at_gate
  not_ok "$1: its frames leave once they have committed" "the newest heard is $(newest_heard b), of $(newest_tick "$OUT/b/$CONSOLE"); the gate: $(gate_words); $(story_words)"
  return 1
}

# What was heard on a host's network, newest last.
all_heard() { sed -n 's/^heard \([0-9]*\)$/\1/p' "$OUT/$1/${HEARD[$1]}.out" 2>/dev/null || true; } # host
newest_heard() { local heard; heard=$(all_heard "$1" | tail -1); printf '%d' "${heard:-0}"; } # host

await_heard() { # host, number, seconds
  local end=$((SECONDS + $3))
  until [ "$(newest_heard "$1")" -ge "$2" ]; do
    is_up "$1" || return 125
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

# Some seconds of its own on host b; then until it has said more than was heard: the gate holds something.
await_held() { # name
  local end=$((SECONDS + TAP_LIMIT_S)) from
  from=$(newest_heard b)
  until [ "$(newest_heard b)" -ge $((from + 10)) ] && [ "$(newest_tick "$OUT/b/$CONSOLE")" -ge $(($(newest_heard b) + 3)) ]; do
    if has_ended a "$SEND" || has_ended b "$RECEIVE" || [ "$SECONDS" -ge "$end" ]; then
      not_ok "$1: its frames come through, and later than it says them" "$(newest_heard b) heard, of $(newest_tick "$OUT/b/$CONSOLE"), $from at first; $(story_words)"
      return 1
    fi
    pause_a_moment
  done
}

# The state of all that is before the tap, for whoever asks why nothing is heard.
look_at_gate() {
  LABEL=gate on b 20 '/usr/bin/tc -s qdisc show; /usr/bin/tc -s filter show dev vm1 ingress; /usr/bin/ip -s link; /usr/bin/ip address' || true
}
gate_words() { sed -n '/^qdisc \(plug\|ingress\)/,/backlog/p' "$SAID_IN.out" | tr -s '\n ' ' '; }

# The gate loses no frame and changes no order: from the first that was heard to the newest each number is there once.
heard_without_a_gap() { # name
  local wrong
  wrong=$(all_heard b | awk 'NR > 1 && $1 != before + 1 {printf "%d after %d; ", $1, before} {before = $1}')
  figure 'frames heard' "$(all_heard b | wc -l)" '' && figure 'newest heard' "$(newest_heard b)" ''
  if [ "$(newest_heard b)" -gt 0 ] && [ -z "$wrong" ]; then ok "$1: its frames leave once they have committed, each once and in order"; else not_ok "$1: its frames leave once they have committed, each once and in order" "$wrong"; fi
}

# The guest is in its standby. It tells its count after it has said it on its console: who comes back with tick N has sent N - 1 and before.
nobody_ahead() { # name, the last tick that it said on host b when that was struck
  local first heard
  await_tick a "$CONSOLE.standby" 1 60 || true
  first=$(first_tick "$OUT/a/$CONSOLE.standby") heard=$(newest_heard b)
  figure 'newest heard' "$heard" '' && figure 'back at tick' "$first" '' && figure 'last on host b' "$2" ''
  if [ "$heard" -gt 0 ] && [ "$first" -gt "$heard" ]; then ok "$1: nobody has heard what the caught guest has not said"; else not_ok "$1: nobody has heard what the caught guest has not said" "heard $heard, back at $first"; fi
  if await_heard a $((first + 10)) 60; then ok "$1: the guest goes on in the standby and is heard"; else not_ok "$1: the guest goes on in the standby and is heard" "$(newest_heard a) was heard there; $(story_words)"; fi
  right_all_along "$1" "$OUT"/{a,b}/"$CONSOLE" "$OUT/a/$CONSOLE.standby"
}

# Also those who hear it.
clear_guest_and_ears() {
  local host
  clear_guest
  for host in "${!HEARD[@]}"; do
    is_up "$host" || continue
    signal_order "$host" "${HEARD[$host]}" KILL
    await "$host" "${HEARD[$host]}" 20 || true
  done
}

# belay alone is killed on host b, not its host and not its QEMU: what the plug holds stays there.
left_shut() { # fabric
  local name="$1, belay killed behind a gate" last
  tethered "$name" "shut-$1" "$1" '--release never' && await_held "$name" || { clear_guest_and_ears; return; }
  LABEL=strike on b 20 "kill -KILL \$(cat /tmp/pids/$RECEIVE)" || true
  expect_exits "$name" 10 137 60
  last=$(newest_tick "$OUT/b/$CONSOLE")
  if LABEL=ended on b 30 'while pgrep qemu-system >/dev/null; do usleep 20000; done'; then ok "$name: its QEMU on host b has ended"; else not_ok "$name: its QEMU on host b has ended" 'it runs after 30 s'; fi
  nobody_ahead "$name" "$last"
  heard_without_a_gap "$name"
  look_at_gate
  figure 'held for ever' "$(sed -n '/^qdisc plug/,/backlog/s/.*backlog \([^ ]*\)b .*/\1/p' "$SAID_IN.out")" B
  if grep -q '^qdisc plug .* dev belay-' "$SAID_IN.out" && grep -q 'Redirect to device belay-' "$SAID_IN.out"; then ok "$name: the gate stands, and is shut"; else not_ok "$name: the gate stands, and is shut" "$(gate_words)"; fi
  clear_guest_and_ears
}

# The next belay takes that gate away, with what it held, and puts up its own; after the release there is none.
opened_at_release() { # fabric
  local name="$1, released behind a gate" last
  tethered "$name" "opened-$1" "$1" '--release 20s' || { clear_guest_and_ears; return; }
  expect_exits "$name" 0 0 180
  last=$(newest_tick "$OUT/b/$CONSOLE")
  if await_heard b $((last + 20)) 60; then ok "$name: the guest is host b's own, and is heard"; else not_ok "$name: the guest is host b's own, and is heard" "$(newest_heard b) was heard, of $(newest_tick "$OUT/b/$CONSOLE"); $(story_words)"; fi
  # Of the guest before, whose count had gone further, nothing has come out.
  heard_without_a_gap "$name"
  look_at_gate
  if grep -q 'dev vm1 ' "$SAID_IN.out" && ! grep -qE 'belay-|qdisc (ingress|plug)' "$SAID_IN.out"; then ok "$name: nothing stays of a gate"; else not_ok "$name: nothing stays of a gate" "$(gate_words)"; fi
  right_all_along "$name" "$OUT"/{a,b}/"$CONSOLE"
  clear_guest_and_ears
}

power_lost() { # fabric
  local name="$1, power lost behind a gate"
  tethered "$name" "lost-$1" "$1" '--release never' && await_held "$name" || { clear_guest_and_ears; return; }
  power_off b
  expect_exits "$name" 10 lost 60
  nobody_ahead "$name" "$(newest_tick "$OUT/b/$CONSOLE")"
  heard_without_a_gap "$name"
  clear_guest_and_ears
}

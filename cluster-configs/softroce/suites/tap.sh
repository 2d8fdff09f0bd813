# shellcheck shell=bash
# tap: what a QEMU guest sends through a tap is held by the kernel of host b until its checkpoint has committed. First belay's tests of that gate
# against the hosts' kernel, then a guest that tells its count by its network card at every tick: host b loses its power, and whoever was on
# its network has heard nothing that the caught guest has not said.

ABOUT="the gate before a guest's tap, inside a host; with kernel 6.12 a guest that sends through it is moved to host b, which is powered off: nobody heard what had not committed"
NEEDS=(belay glue-tests qemu)
NEEDS_MIB=1536

run_suite() {
  local fabric
  run_tests belay_vmm_glue qemu::tap::
  for fabric in $FABRICS; do
    case $KERNEL in
      6.1) skip "$fabric, power lost behind a gate" "this kernel cannot tether a QEMU guest" ;;
      *) heard_what_committed "$fabric" ;;
    esac
  done
}

# A tap on a host, with an address by which its own programs hear the guest.
make_tap() { # host, tap
  LABEL=tap on "$1" 20 "/usr/bin/ip tuntap add $2 mode tap user root && /usr/bin/ip address replace 10.78.0.1/24 brd $TAP_EVERYBODY dev $2 && /usr/bin/ip link set $2 up"
}

# The guest's initramfs with the host's modules for its network card beside it; and its program, which is also the one that hears it.
with_modules() { # host
  LABEL=modules on "$1" 60 'cd /opt/guest && cpio -id <initramfs && mv init listener && cd / && find modules | cpio -o -H newc >/opt/guest/modules && cat /opt/guest/initramfs /opt/guest/modules >/opt/guest/initramfs-net'
}

# What was heard on a host's network, newest last.
newest_heard() { local heard; heard=$(sed -n 's/^heard \([0-9]*\)$/\1/p' "$OUT/$1/$HEARD.out" 2>/dev/null | tail -1); printf '%d' "${heard:-0}"; }

await_heard() { # host, number, seconds
  local end=$((SECONDS + $3))
  until [ "$(newest_heard "$1")" -ge "$2" ]; do
    is_up "$1" || return 125
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

heard_what_committed() { # fabric
  local name="$1, power lost behind a gate" host tick last heard first count
  need_hosts
  for host in $HOSTS; do
    need_qemu "$host" && with_modules "$host" && make_tap "$host" vm1 || { not_ok "$name: a tap and a guest on host $host" "$(last_words "$SAID_IN")"; return; }
  done
  make_tap a vm1s || { not_ok "$name: a tap for the standby" "$(last_words "$SAID_IN")"; return; }
  start_guest "$name" "tap-$1" vm1 || { clear_guest; return; }
  start_on b "heard-$1" 'export hear=7; exec /opt/guest/listener'
  HEARD=$ORDER
  start_qemu_migration tap "$1" '' "$QEMU_TETHER --release never" vm1 || { not_ok "$name: started" "$(story_words)"; clear_guest; return; }
  if ! await_epoch 3 180 || ! await_tick b "$CONSOLE" 1 60; then
    not_ok "$name: reached" "$(story_words)"
    clear_guest
    return
  fi
  tick=$(newest_tick "$OUT/b/$CONSOLE")
  # Frames flow: what it says now is heard, some epochs later.
  if await_heard b "$((tick + 20))" 60; then ok "$name: its frames leave once they have committed"; else not_ok "$name: its frames leave once they have committed" "the newest heard is $(newest_heard b), of $(newest_tick "$OUT/b/$CONSOLE"); $(story_words)"; fi
  LABEL=gate on b 20 '/usr/bin/tc -s qdisc show; /usr/bin/tc -s filter show dev vm1 ingress; /usr/bin/ip -s link; /usr/bin/ip address; cat /proc/net/snmp /proc/net/udp' || true
  power_off b
  expect_exits "$name" 10 lost 60
  await_tick a "$CONSOLE.standby" 1 60 || true
  first=$(first_tick "$OUT/a/$CONSOLE.standby") heard=$(newest_heard b) last=$(newest_tick "$OUT/b/$CONSOLE") count=$(grep -c '^heard ' "$OUT/b/$HEARD.out")
  figure 'frames heard' "$count" '' && figure 'newest heard' "$heard" '' && figure 'back at tick' "$first" '' && figure 'last on host b' "$last" ''
  # It tells its count after it has said it on its console: who comes back with tick N has sent N - 1 and before.
  if [ "$heard" -gt 0 ] && [ "$first" -gt "$heard" ]; then ok "$name: nobody has heard what the caught guest has not said"; else not_ok "$name: nobody has heard what the caught guest has not said" "heard $heard, back at $first"; fi
  if await_tick a "$CONSOLE.standby" $((first + 20)) 60; then ok "$name: the guest goes on in the standby"; else not_ok "$name: the guest goes on in the standby" "$(story_words)"; fi
  right_all_along "$name" "$OUT"/{a,b}/"$CONSOLE" "$OUT/a/$CONSOLE.standby"
  clear_guest
}

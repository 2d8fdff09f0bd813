# shellcheck shell=bash
# The data path between the hosts: cut, healed, made slow. The way out (eth1) is never touched.

# (/usr/bin/tc in full: busybox has a `tc` of its own, which its shell prefers and which knows no netem.)

# All frames vanish on their way out of the named hosts; carrier and addresses stay, as when a switch in between fails.
drop_frames() { # host...
  local host
  for host in "$@"; do LABEL="cut" on "$host" 20 "/usr/bin/tc qdisc replace dev eth0 root netem loss 100%" || return; done
}

# The cable is pulled: both ends lose their carrier.
pull_cable() { monitor a "set_link eth0 off"; monitor b "set_link eth0 off"; }

# The path fails for so many milliseconds. Timed where it happens: orders take their time to reach an emulated host.
interrupt_for() { # kind (silent or cable), milliseconds
  local one other
  case $1 in
    cable) pull_cable; pass_ms "$2"; heal ;;
    silent)
      local cut="/usr/bin/tc qdisc replace dev eth0 root netem loss 100% && usleep ${2}000; exec /usr/bin/tc qdisc del dev eth0 root"
      start_on a hiccup "$cut" && one=$ORDER
      start_on b hiccup "$cut" && other=$ORDER
      await a "$one" 20 && await b "$other" 20
      ;;
  esac
}

# Time that is meant to pass because its length is what is tried out; nothing is waited for.
pass_ms() { read -rt "$(calculate "$1 / 1000" 3)" _ <>"$WORK/nothing" || true; }

# Makes the path whole again whatever was done to it, on the hosts that are up.
heal() {
  local host
  for host in $HOSTS; do
    is_up "$host" || continue
    monitor "$host" "set_link eth0 on"
  done
  for host in $HOSTS; do
    is_up "$host" || continue
    LABEL="heal" on "$host" 20 "/usr/bin/tc qdisc del dev eth0 root 2>/dev/null; true" || return
  done
}

# netem on both ends, for example `loss 1%` or `delay 20ms 5ms rate 1gbit` (without a rate, jitter reorders frames).
disturb() { # netem arguments
  local host
  for host in $HOSTS; do LABEL=disturb on "$host" 20 "/usr/bin/tc qdisc replace dev eth0 root netem $*" || return; done
}

# shellcheck shell=bash
# The data path between the hosts: cut, healed, made slow. The way out (eth1) is never touched.

# All frames vanish on their way out of the named hosts; carrier and addresses stay, as when a switch in between fails.
drop_frames() { # host...
  local host
  for host in "$@"; do LABEL=cut on "$host" 20 "tc qdisc replace dev eth0 root netem loss 100%" || return; done
}

# The cable is pulled: both ends lose their carrier.
pull_cable() { monitor a "set_link eth0 off"; monitor b "set_link eth0 off"; }

# Makes the path whole again whatever was done to it, on the hosts that are up.
heal() {
  local host
  for host in $HOSTS; do
    is_up "$host" || continue
    monitor "$host" "set_link eth0 on"
    LABEL=heal on "$host" 20 "tc qdisc del dev eth0 root 2>/dev/null; true" || return
  done
}

# netem on both ends, for example `loss 1%` or `delay 20ms 5ms`.
disturb() { # netem arguments
  local host
  for host in $HOSTS; do LABEL=disturb on "$host" 20 "tc qdisc replace dev eth0 root netem $*" || return; done
}

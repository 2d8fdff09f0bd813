# shellcheck shell=bash
# smoke: is everything there? Devices, verbs between the hosts, rdma_cm, and what belay itself says of a host.

ABOUT='both hosts come up, rxe0 carries verbs and rdma_cm between them, and belay finds what it needs'
NEEDS=(belay)

run_suite() {
  local host
  for host in $HOSTS; do
    LABEL=devinfo check "host $host has an active RoCE device" on "$host" 20 "ibv_devinfo -d rxe0 | tee /dev/stderr | grep -q PORT_ACTIVE"
  done
  same_counters
  pingpong
  rping_pair
  for host in $HOSTS; do belay_check "$host"; done
}

# A guest takes its time stamp counter along, and KVM without TSC scaling, which emulated hosts have not, refuses it where the counter is
# faster by more than 250 ppm.
same_counters() {
  local host mhz=()
  for host in $HOSTS; do
    LABEL=tsc on "$host" 20 "dmesg | sed -nE 's/.*tsc: .* ([0-9]+\.[0-9]+) MHz.*/\1/p' | tail -1" || true
    mhz+=("${SAID:-0}")
    figure "host $host" "${SAID:-0}" MHz
  done
  if holds "${mhz[0]} > 0 && ${mhz[1]} > 0 && ${mhz[0]} / ${mhz[1]} < 1.0002 && ${mhz[1]} / ${mhz[0]} < 1.0002"; then
    ok "both hosts' time stamp counters have one frequency"
  else
    not_ok "both hosts' time stamp counters have one frequency" 'one was measured wrong, on a busy machine: no guest can move between these hosts'
  fi
}

# RC queue pairs with addresses exchanged over TCP. ibv_rc_pingpong checks the buffer's content with -c.
pingpong() {
  local server port=18515 arguments='-d rxe0 -g 1 -s 4096 -n 200 -c'
  start_on a pingpong-server "exec timeout 60 ibv_rc_pingpong $arguments -p $port"
  server=$ORDER SAID_IN=$OUT/a/$server
  await_listener a "$server" $port 30 || { not_ok 'RC queue pairs between the hosts' "no listener: $(last_words "$SAID_IN")"; return; }
  LABEL=pingpong-client check 'RC queue pairs between the hosts' on b 60 "exec ibv_rc_pingpong $arguments -p $port $A_DATA"
  SAID_IN=$OUT/a/$server
  check 'RC queue pairs between the hosts, the other end' await a "$server" 30
}

# rping's client succeeds even when its server fails: both ends count.
rping_pair() {
  local server
  start_on a rping-server "exec timeout 60 rping -s -a $A_DATA -C 20 -v"
  server=$ORDER SAID_IN=$OUT/a/$server
  LABEL=await-listener on a 30 "until rdma resource show cm_id | grep -q LISTEN; do usleep 20000; done" ||
    { not_ok 'rdma_cm between the hosts' "no listener: $(last_words "$OUT/a/$server")"; return; }
  LABEL=rping-client check 'rdma_cm between the hosts' on b 60 "exec rping -c -a $A_DATA -C 20 -v"
  SAID_IN=$OUT/a/$server
  check 'rdma_cm between the hosts, the other end' await a "$server" 30
}

belay_check() { # host
  LABEL=belay-check check "belay check on host $1" on "$1" 30 "exec /lab/bin/belay check"
}

# shellcheck shell=bash
# smoke: is everything there? Devices, verbs between the hosts, rdma_cm, and what belay itself says of a host.

ABOUT='both hosts come up, rxe0 carries verbs and rdma_cm between them, and belay finds what it needs'
NEEDS=(belay)

run_suite() {
  local host
  for host in $HOSTS; do
    LABEL=devinfo check "host $host has an active RoCE device" on "$host" 20 "ibv_devinfo -d rxe0 | tee /dev/stderr | grep -q PORT_ACTIVE"
  done
  pingpong
  rping_pair
  for host in $HOSTS; do belay_check "$host"; done
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

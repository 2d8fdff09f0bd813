# shellcheck shell=bash
# The two hosts: started, listened to over their serial lines, cut off, powered off, and never left behind.
#
# A host is a QEMU with software emulation. Two FIFO pairs join it to the lab: the agent's serial line and QEMU's own monitor.
# Needs from the lab: OUT (results folder, shared with the hosts), WORK (sockets and FIFOs), KERNEL_IMAGE, INITRAMFS.

# shellcheck source=hosts.conf
. "$LAB/hosts.conf"

readonly HOSTS='a b'
readonly BOOT_LIMIT_S=120
declare -A HOST_PID=() AGENT_IN=() AGENT_OUT=() MONITOR_IN=()

# The value of A_NAME or B_NAME.
of_host() { local name=${1^^}_$2; printf '%s' "${!name}"; }

start_host() { # a or b
  local host=$1 number=${BOOTS[$1]:-0} server fifo console=()
  BOOTS[$host]=$((number + 1))
  mkdir -p "$OUT/$host" "$OUT/orders"
  for fifo in agent monitor; do
    rm -f "$WORK/$host.$fifo".{in,out}
    mkfifo "$WORK/$host.$fifo".{in,out}
  done
  # Host a listens, because only a listening QEMU takes its peer again after that has been powered off.
  case $host in a) server=on ;; *) server=off ;; esac
  [ -z "${KEEP-}" ] || console=(-chardev "pty,id=console" -serial chardev:console)
  qemu-system-x86_64 -name "belay-lab-$host" -nodefaults -no-user-config -display none -no-reboot \
    -machine q35 -accel tcg,thread=multi -cpu max -smp "$HOST_CPUS" -m "$HOST_MEMORY_MIB" \
    -kernel "$KERNEL_IMAGE" -initrd "$INITRAMFS" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off belay.host=$host belay.data=$(of_host "$host" DATA)/24 belay.out=$OUT_SELF/24" \
    -chardev "file,id=log,path=$OUT/$host/console.log,append=on" -serial chardev:log \
    -chardev "pipe,id=agent,path=$WORK/$host.agent" -serial chardev:agent \
    ${console[@]+"${console[@]}"} \
    -chardev "pipe,id=monitor,path=$WORK/$host.monitor" -mon chardev=monitor,mode=readline \
    -fsdev "local,id=lab,path=$OUT,security_model=none" -device virtio-9p-pci,fsdev=lab,mount_tag=lab \
    -device virtio-rng-pci \
    -netdev "stream,id=data,addr.type=unix,addr.path=$WORK/data,server=$server" \
    -device "virtio-net-pci,id=eth0,netdev=data,mac=$(of_host "$host" MAC),romfile=,addr=0x8" \
    -netdev user,id=out \
    -device "virtio-net-pci,id=eth1,netdev=out,mac=$(of_host "$host" OUT_MAC),romfile=,addr=0x9" \
    >"$OUT/$host/qemu.log" 2>&1 </dev/null &
  HOST_PID[$host]=$!
  printf '%s\n' "$!" >"$WORK/$host.pid"
  # Opened for both ways, so that opening does not wait and a dead QEMU does not look like an end of file.
  local orders words monitor
  exec {orders}<>"$WORK/$host.agent.in" {words}<>"$WORK/$host.agent.out" {monitor}<>"$WORK/$host.monitor.in"
  AGENT_IN[$host]=$orders AGENT_OUT[$host]=$words MONITOR_IN[$host]=$monitor
  # Nobody reads what the monitor says; a FIFO that nobody empties would stop QEMU once it is full.
  cat <"$WORK/$host.monitor.out" >"$OUT/$host/monitor.log" 2>&1 &
  MONITOR_CAT[$host]=$!
}
declare -A BOOTS=() MONITOR_CAT=() HALF_HEARD=()

# Whether a host's QEMU runs.
is_up() { [ -n "${HOST_PID[$1]-}" ] && kill -0 "${HOST_PID[$1]}" 2>/dev/null; }

# Makes sure that both hosts are up, whole and joined, whatever a suite before this one did to them.
need_hosts() {
  local host started=''
  # A host that lost its peer keeps the socket, the other way round it does not: host b goes with host a.
  if ! is_up a && is_up b; then power_off b; fi
  for host in $HOSTS; do
    is_up "$host" && continue
    [ "$host" = a ] || wait_for_file "$WORK/data" 20 || die "host a does not listen for host b" "Its QEMU says: $(tail -3 "$OUT/a/qemu.log")"
    start_host "$host"
    started+=" $host"
  done
  [ -n "$started" ] || return 0
  for host in $started; do await_ready "$host"; done
  on b 20 "busybox ping -c 1 -W 10 $A_DATA" || die "host b does not reach host a" "Look at $OUT/b/console.log."
  note "hosts up:$started (kernel $KERNEL_RELEASE)"
}

wait_for_file() { # path, seconds
  local end=$((SECONDS + $2))
  until [ -e "$1" ]; do
    [ "$SECONDS" -lt "$end" ] || return 1
    pause_a_moment
  done
}

# Between two looks at something that cannot be waited for otherwise.
pause_a_moment() { read -rt 0.02 _ <>"$WORK/nothing" || true; }

await_ready() { # host
  local end=$((SECONDS + BOOT_LIMIT_S))
  until [ -e "$WORK/$1.ready" ]; do
    hear "$1" 1
    is_up "$1" || die "host $1 ended while it booted" "Its QEMU says: $(tail -3 "$OUT/$1/qemu.log")"
    [ "$SECONDS" -lt "$end" ] || die "host $1 was not up after $BOOT_LIMIT_S s" "Look at $OUT/$1/console.log."
  done
}

# Takes one line that a host's agent says, if one comes within so many seconds, and writes it down as a file: functions in
# subshells see it too.
hear() { # host, seconds
  local line=''
  if ! read -rt "$2" line <&"${AGENT_OUT[$1]}"; then
    # The time may have been up in the middle of a line: the rest of it comes later.
    HALF_HEARD[$1]+=$line
    return 0
  fi
  line=${HALF_HEARD[$1]-}$line line=${line%$'\r'}
  HALF_HEARD[$1]=''
  case $line in
    ready) : >"$WORK/$1.ready" ;;
    'done '*) line=${line#done }; printf '%s\n' "${line##* }" >"$WORK/done.${line% *}" ;;
    *) printf '%s\n' "$line" >>"$OUT/$1/agent.log" ;;
  esac
}

tell() { printf '%s\n' "$2" >&"${AGENT_IN[$1]}"; }
monitor() { printf '%s\n' "$2" >&"${MONITOR_IN[$1]}"; }

# Power gone: no FIN, no flush, nothing said to anybody.
power_off() { # host
  local pid=${HOST_PID[$1]-}
  [ -n "$pid" ] || return 0
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  [ -z "${MONITOR_CAT[$1]-}" ] || { kill "${MONITOR_CAT[$1]}" 2>/dev/null; wait "${MONITOR_CAT[$1]}" 2>/dev/null; } || true
  unset "HOST_PID[$1]"
  HALF_HEARD[$1]=''
  local orders=${AGENT_IN[$1]} words=${AGENT_OUT[$1]} monitor=${MONITOR_IN[$1]}
  exec {orders}>&- {words}>&- {monitor}>&-
  rm -f "$WORK/$1.ready" "$WORK/$1.pid"
  # A host's listening socket is made anew with it.
  [ "$1" != a ] || rm -f "$WORK/data"
}

stop_hosts() {
  local host
  for host in $HOSTS; do power_off "$host"; done
}

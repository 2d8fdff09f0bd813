# shellcheck shell=bash
# The two hosts: started, listened to over their serial lines, cut off, powered off, and never left behind.
#
# A host is a QEMU with software emulation. Two FIFO pairs join it to the lab: the agent's serial line and QEMU's own monitor.
# The two cards are joined by Unix datagrams, a frame each: with a stream, a peer that is powered off in the middle of a frame leaves the
# other card waiting for its rest, and rxe's queue pairs, which count the frames they have sent, can then not be destroyed.
# Needs from the lab: OUT (results folder, shared with the hosts), WORK (sockets and FIFOs), KERNEL_IMAGE, INITRAMFS.

# shellcheck source=hosts.conf
. "$LAB/hosts.conf"

readonly HOSTS='a b'
readonly BOOT_LIMIT_S=300
declare -A HOST_PID=() AGENT_IN=() AGENT_OUT=() MONITOR_IN=()

# The value of A_NAME or B_NAME.
of_host() { local name=${1^^}_$2; printf '%s' "${!name}"; }

start_host() { # a or b
  local host=$1 peer=b number=${BOOTS[$1]:-0} fifo console=() alone=(setpriv --pdeathsig KILL)
  [ "$host" = a ] || peer=a
  BOOTS[$host]=$((number + 1)) MEMORY_MIB[$host]=${NEEDS_MIB:-$HOST_MEMORY_MIB}
  mkdir -p "$OUT/$host" "$OUT/orders"
  for fifo in agent monitor; do
    rm -f "$WORK/$host.$fifo".{in,out}
    mkfifo "$WORK/$host.$fifo".{in,out}
  done
  # A host ends with its lab, however that ends, unless it is to be kept.
  [ -z "${KEEP-}" ] || { console=(-chardev "pty,id=console" -serial chardev:console); alone=(); }
  bounded_files "${alone[@]}" qemu-system-x86_64 -name "belay-lab-$host" -nodefaults -no-user-config -display none -no-reboot \
    -machine q35 -accel "tcg,thread=multi,tb-size=$HOST_TRANSLATION_MIB" -cpu max -smp "$HOST_CPUS" -m "${MEMORY_MIB[$host]}" \
    -kernel "$KERNEL_IMAGE" -initrd "$INITRAMFS" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check $(time_stamp_counter) belay.host=$host belay.data=$(of_host "$host" DATA)/24 belay.out=$OUT_SELF/24" \
    -chardev "file,id=log,path=$OUT/$host/console.log,append=on" -serial chardev:log \
    -chardev "pipe,id=agent,path=$WORK/$host.agent" -serial chardev:agent \
    ${console[@]+"${console[@]}"} \
    -chardev "pipe,id=monitor,path=$WORK/$host.monitor" -mon chardev=monitor,mode=readline \
    -fsdev "local,id=lab,path=$OUT,security_model=none" -device virtio-9p-pci,fsdev=lab,mount_tag=lab \
    -device virtio-rng-pci \
    -netdev "dgram,id=data,local.type=unix,local.path=$WORK/data.$host,remote.type=unix,remote.path=$WORK/data.$peer" \
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
declare -A BOOTS=() MEMORY_MIB=() MONITOR_CAT=() HALF_HEARD=()

# What a host's kernel is told of its time stamp counter, which is this machine's. A host that boots while others have the processors
# measures it wrong, by as much as eightfold: its clock then runs as wrong, and KVM takes no guest of a host with a faster counter. Where the
# processors' frequency changes, /proc/cpuinfo does not tell the counter's, and hosts measure it themselves.
time_stamp_counter() {
  [ -e /sys/devices/system/cpu/cpu0/cpufreq ] || awk -F: '$1 ~ /^cpu MHz/ {printf "tsc_early_khz=%d", $2 * 1000; exit}' /proc/cpuinfo
}

# Whether a host's QEMU runs.
is_up() { [ -n "${HOST_PID[$1]-}" ] && kill -0 "${HOST_PID[$1]}" 2>/dev/null; }

# Makes sure that both hosts are up, whole, joined and large enough, whatever a suite before this one did to them.
need_hosts() {
  local host started=''
  for host in $HOSTS; do
    if is_up "$host" && [ "${MEMORY_MIB[$host]}" -ge "${NEEDS_MIB:-$HOST_MEMORY_MIB}" ]; then continue; fi
    power_off "$host"
    start_host "$host"
    started+=" $host"
  done
  [ -n "$started" ] || return 0
  for host in $started; do await_ready "$host"; done
  on b 20 "busybox ping -c 1 -W 10 $A_DATA" || die "host b does not reach host a" "Look at $OUT/b/console.log."
  note "hosts up:$started (kernel $KERNEL_RELEASE)"
}

# Runs a program, in the background only, whose files cannot grow beyond a bound: a host's logs come through its QEMU. What is
# beyond it fails with EFBIG where it is written.
bounded_files() { # command...
  trap '' XFSZ
  ulimit -c 0 -f "$((LOG_LIMIT_MIB * 1024))"
  exec "$@"
}
readonly LOG_LIMIT_MIB=128

# The most memory that a host's QEMU has had, in MiB; 0 for one that is gone.
peak_memory_mib() { # host
  local kib
  kib=$(sed -n 's/^VmHWM:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/${HOST_PID[$1]-none}/status" 2>/dev/null) || true
  printf '%d' $((${kib:-0} / 1024))
}
declare -A PEAK_MIB=([a]=0 [b]=0)

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
  local pid=${HOST_PID[$1]-} peak
  [ -n "$pid" ] || return 0
  peak=$(peak_memory_mib "$1")
  [ "$peak" -le "${PEAK_MIB[$1]}" ] || PEAK_MIB[$1]=$peak
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  [ -z "${MONITOR_CAT[$1]-}" ] || { kill "${MONITOR_CAT[$1]}" 2>/dev/null; wait "${MONITOR_CAT[$1]}" 2>/dev/null; } || true
  unset "HOST_PID[$1]"
  HALF_HEARD[$1]=''
  local orders=${AGENT_IN[$1]} words=${AGENT_OUT[$1]} monitor=${MONITOR_IN[$1]}
  exec {orders}>&- {words}>&- {monitor}>&-
  rm -f "$WORK/$1.ready" "$WORK/$1.pid" "$WORK/data.$1"
}

stop_hosts() {
  local host
  for host in $HOSTS; do power_off "$host"; done
}

# shellcheck shell=bash
# perftest: ib_read_lat, ib_read_bw, ib_write_bw between the hosts, and belay's lanes, faults and pulls beside them. Function and
# ratios: emulated processors say nothing about a card's speed.

ABOUT="perftest's programs and belay-bench between the hosts, interleaved, same sizes; medians, and what belay adds"
NEEDS=(belay bench)

# Operations by size, so that each measurement takes about as long.
PERFTEST_SIZES='4096:300 65536:100 1048576:12'
# Memory that is read and pulled; a host's own is HOST_MEMORY_MIB.
PERFTEST_MEMORY=24M
PERFTEST_TOUCHES=400
# One ib_read_lat after another differs by a third here, so a round has several of them, each with faults right behind it.
PERFTEST_FAULT_PAIRS=3
PERFTEST_PORT=7710
declare -A MEASURED=()
WIRE_SERVER=''

run_suite() {
  local rounds=5 round fabric
  [ -z "$QUICK" ] || rounds=2
  MEASURED=()
  need_keys
  for fabric in $FABRICS; do serve_wire "$fabric" || return 0; done
  # Round by round and size by size, never one program's rounds together: the machine's other work then falls on all alike.
  for ((round = 1; round <= rounds; round++)); do
    one_round || break
  done
  if [ "$round" -gt "$rounds" ]; then
    perftest_table "$rounds"
    for fabric in $FABRICS; do perftest_bounds "$fabric"; done
    absence_of_a_copy "$([ -n "$QUICK" ] && echo 1 || echo 3)"
  fi
  for fabric in "${!WIRE_SERVERS[@]}"; do end_wire "$fabric"; done
}

one_round() {
  local pair size count program fabric
  for pair in $PERFTEST_SIZES; do
    size=${pair%:*} count=${pair#*:}
    for program in ib_read_lat ib_read_bw ib_write_bw; do
      measure "$program" "$size" "$count" || return 1
      for fabric in $FABRICS; do wire "$fabric" "$(test_beside "$program")" "$size" "$count" || return 1; done
    done
  done
  for fabric in $FABRICS; do
    for ((pair = 1; pair <= PERFTEST_FAULT_PAIRS; pair++)); do
      measure ib_read_lat 4096 300 && wire_fault "$fabric" || return 1
    done
    wire_pull "$fabric" || return 1
  done
}

# The test of `belay-bench wire` that does what a program of perftest does.
test_beside() { # program
  case $1 in
    ib_read_lat) echo read-lat ;;
    ib_read_bw) echo read-bw ;;
    ib_write_bw) echo write-bw ;;
  esac
}

# A program of perftest is tried again: its queue pairs now and then end in an error of rxe's (status 9 of a WRITE), which is no
# word about belay. The client's figure is added to MEASURED.
measure() { # program, bytes, iterations
  local try why
  for try in 1 2 3; do
    measure_once "$@" && return 0
    why="$try: $(last_words "$SAID_IN")"
    remark "$1 at $2 bytes failed, try $why"
  done
  not_ok "$1 at $2 bytes" "$why"
  return 1
}

# One run, server on host a, client on host b. Never with -R: its server closes and opens its listener again, and a quick client is
# refused. What failed is in SAID_IN.
measure_once() { # program, bytes, iterations
  local program=$1 options="-d rxe0 -x 1 -F -s $2 -n $3" server value code=0
  start_on a "$program-server" "exec timeout 60 $program $options"
  server=$ORDER SAID_IN=$OUT/a/$server
  await_listener a "$server" 18515 30 || return 1
  LABEL=$program-client on b 60 "exec timeout 55 $program $options $A_DATA" || code=$?
  [ "$code" = 0 ] || signal_order a "$server" TERM
  await a "$server" 30 || code=$?
  [ "$code" = 0 ] || return 1
  value=$(perftest_value "$program" <<<"$SAID")
  [ -n "$value" ] || return 1
  MEASURED[$program.$2]+="$value "
}

# The figure of perftest's table: t_typical in µs, or the average bandwidth in MiB/s (it calls 2^20 bytes a MB). belay-bench prints
# the same columns.
perftest_value() { # program or test
  case $1 in
    *[_-]lat) awk '/^ *[0-9]+ +[0-9]+ / {value = $5} END {print value}' ;;
    *) awk '/^ *[0-9]+ +[0-9]+ / {value = $4} END {print value}' ;;
  esac
}

# A server of belay-bench on host a for each fabric, for the whole suite.
serve_wire() { # fabric
  local port
  port=$(wire_port "$1")
  start_on a "wire-server-$1" "exec /lab/bin/belay-bench wire --listen $A_DATA:$port --clients 0 --idle 300s $(wire_options "$1")" \
    '--cert /lab/keys/source.crt --key /lab/keys/source.key --peer-cert /lab/keys/destination.crt'
  WIRE_SERVER=$ORDER SAID_IN=$OUT/a/$ORDER
  WIRE_SERVERS[$1]=$ORDER
  await_listener a "$WIRE_SERVER" "$port" 30 || { not_ok "belay-bench over $1 listens" "$(last_words "$SAID_IN")"; return 1; }
}
declare -A WIRE_SERVERS=()

wire_port() { case $1 in tcp) echo $PERFTEST_PORT ;; verbs) echo $((PERFTEST_PORT + 1)) ;; esac; }

wire_options() { # fabric
  case $1 in
    tcp) echo '--fabric tcp' ;;
    verbs) echo '--fabric verbs --trusted-fabric -d rxe0 -x 1' ;;
  esac
}

end_wire() { # fabric
  signal_order a "${WIRE_SERVERS[$1]}" TERM
  await a "${WIRE_SERVERS[$1]}" 20 || true
}

# One client on host b; its output is in SAID.
wire_client() { # fabric, label, words
  local fabric=$1 label=$2
  shift 2
  LABEL=wire-$label-$fabric on b 180 "exec timeout 170 /lab/bin/belay-bench wire --to $A_DATA:$(wire_port "$fabric") -F $*" \
    "$(wire_options "$fabric") --memory $PERFTEST_MEMORY" \
    '--cert /lab/keys/destination.crt --key /lab/keys/destination.key --peer-cert /lab/keys/source.crt'
}

# Windows of operations are waited for as the ring's writer and the engine do, which look for a completion and then sleep (-e). A host has
# one processor, and whoever only looks takes it from the software device.
wire() { # fabric, test, bytes, operations
  local value waiting='' name="belay-bench $2 over $1 at $3 bytes"
  case $2 in *-bw) waiting=-e ;; esac
  wire_client "$1" "$2" "$2 -s $3 -n $4 $waiting" || { not_ok "$name" "client: $(last_words "$SAID_IN")"; return 1; }
  value=$(perftest_value "$2" <<<"$SAID")
  [ -n "$value" ] || { not_ok "$name" "no line of figures: $(last_words "$SAID_IN")"; return 1; }
  MEASURED[$1.$2.$3]+="$value "
}

# Faults that the engine serves, divided by what perftest found right before them and the floor.
wire_fault() { # fabric
  local touching floor read
  wire_client "$1" fault "fault --rounds 1 -n $PERFTEST_TOUCHES" || { not_ok "faults over $1" "client: $(last_words "$SAID_IN")"; return 1; }
  touching=$(row_value 'engine, touching thread') floor=$(row_value 'uffd floor, touching thread')
  read=${MEASURED[ib_read_lat.4096]% } read=${read##* }
  MEASURED[$1.fault]+="$touching " MEASURED[$1.floor]+="$floor "
  MEASURED[$1.fault.lean]+="$(named_value fault_over_lean_loop) "
  MEASURED[$1.fault.over]+="$(calculate "$touching / ($read + $floor)" 4) "
}

# The engine's pull, divided by the best that perftest found in the same round.
wire_pull() { # fabric
  local rate best=0 size read
  wire_client "$1" pull 'pull --rounds 1' || { not_ok "pull over $1" "client: $(last_words "$SAID_IN")"; return 1; }
  rate=$(awk '$NF == "engine" {print $4}' <<<"$SAID")
  for size in 4096 65536 1048576; do
    read=${MEASURED[ib_read_bw.$size]% } read=${read##* }
    ! holds "$read > $best" || best=$read
  done
  MEASURED[$1.pull]+="$rate "
  MEASURED[$1.pull.over]+="$(calculate "$rate / $best" 4) "
}

# t_typical of a named row of belay-bench's table, in SAID.
row_value() { # name
  awk -v name="$1" 'index($0, " " name " ") == 1 {sub(name, ""); print $5}' <<<"$SAID"
}

# A named ratio of belay-bench, in SAID.
named_value() { awk -v name="$1" '$1 == name {print $2}' <<<"$SAID"; } # name

perftest_table() { # rounds
  local pair size latency read write fabric
  for pair in $PERFTEST_SIZES; do
    size=${pair%:*}
    perftest_row perftest "$size" ib_read_lat."$size" ib_read_bw."$size" ib_write_bw."$size"
    latency=$LATENCY read=$READ write=$WRITE
    for fabric in $FABRICS; do perftest_row "belay $fabric" "$size" "$fabric.read-lat.$size" "$fabric.read-bw.$size" "$fabric.write-bw.$size"; done
    figure 'ib_read_lat typical' "$latency" us
    figure 'ib_read_bw' "$read" MiB/s
    figure 'ib_write_bw' "$write" MiB/s
    figure rounds "$1" ''
    # A read that takes longer than a retry does, or moves less than a modem, is not the network working.
    if holds "$latency > 0 && $latency < 1000000 && $read > 0.1 && $write > 0.1"; then
      ok "$size bytes read and written"
    else
      not_ok "$size bytes read and written" 'these figures are not those of a working link'
    fi
  done
}

# Prints a line of the table; leaves the medians in LATENCY, READ, WRITE.
perftest_row() { # who, bytes, keys of latency, read and write
  LATENCY=$(median "${MEASURED[$3]}") READ=$(median "${MEASURED[$4]}") WRITE=$(median "${MEASURED[$5]}")
  remark "$(printf '%8d %-12s read %8.1f us   reads %8.1f MiB/s   writes %8.1f MiB/s' "$2" "$1" "$LATENCY" "$READ" "$WRITE")"
}

# The engine and the checkpoint lane against perftest. Over tcp the ratios are told and judged by nobody: another wire.
perftest_bounds() { # fabric
  local over write
  over=$(median "${MEASURED[$1.fault.over]}")
  figure 'touching thread' "$(median "${MEASURED[$1.fault]}")" us
  figure 'userfaultfd floor' "$(median "${MEASURED[$1.floor]}")" us
  figure 'over ib_read_lat + floor' "$over" ''
  # The leanest loop that does the same work: on one emulated processor the two do not simply add up.
  figure 'over a lean loop' "$(median "${MEASURED[$1.fault.lean]}")" ''
  judge_bound "$1" "a demand fault over $1" "$over <= 1.3" 'the goal is 1.3'
  over=$(median "${MEASURED[$1.pull.over]}")
  figure pull "$(median "${MEASURED[$1.pull]}")" MiB/s
  figure 'over ib_read_bw at its best size' "$over" ''
  judge_bound "$1" "the background pull over $1" "$over >= 0.9" 'the goal is 0.9'
  over=$(median "$(ratios "${MEASURED[$1.write-bw.65536]}" "${MEASURED[ib_write_bw.65536]}")")
  figure 'writes of 64 KiB' "$(median "${MEASURED[$1.write-bw.65536]}")" MiB/s
  figure 'over ib_write_bw' "$over" ''
  judge_bound "$1" "checkpoint writes over $1" "$over >= 0.9" 'the goal is 0.9'
  source_cost "$1"
}

# Each round's value over what perftest found right before it.
ratios() { # values, perftest's
  local -a ours theirs
  local round
  read -ra ours <<<"$1"
  read -ra theirs <<<"$2"
  for round in "${!ours[@]}"; do printf '%s ' "$(calculate "${ours[round]} / ${theirs[round]}" 4)"; done
}

# What the source's threads spend on a page; those that answer the bench's questions are not counted.
source_cost() { # fabric
  local name="the source's CPU a page over $1" ns
  wire_client "$1" cpu 'cpu --rounds 5' || { not_ok "$name" "client: $(last_words "$SAID_IN")"; return; }
  ns=$(named_value source_cpu_ns_per_page)
  figure 'from N to 4N pages' "$ns" ns
  figure 'context switches' "$(named_value source_switches_per_page)" ''
  judge_bound "$1" "$name" "$ns <= 100" 'there should be none'
}

# Where the engine's threads are while they pull the same pages over tcp and over verbs. Over tcp the kernel copies them out of its buffers:
# the control, which shows how often a copy is seen. Over verbs nothing copies a page on its way; the threads have little to do there, so
# that few samples are theirs, and the number of those that copy is compared, not their part.
absence_of_a_copy() { # rounds
  local fabric name share copying all control=0
  [[ " $FABRICS " == *' verbs '* ]] || return 0
  for fabric in tcp verbs; do
    name="where the engine's threads are over $fabric"
    [ -n "${WIRE_SERVERS[$fabric]-}" ] || serve_wire "$fabric" || return 0
    wire_client "$fabric" profile "profile --rounds $1" || { not_ok "$name" "client: $(last_words "$SAID_IN")"; continue; }
    share=$(named_value copying_share) copying=$(named_value profile_copying)
    all="$(named_value profile_samples) + $(named_value profile_apart)"
    figure 'samples' "$(named_value profile_samples)" ''
    figure 'that copy' "$copying" ''
    figure "in the device's or an interrupt's work" "$(named_value profile_apart)" ''
    figure 'part that copies' "$share" ''
    case $fabric in
      tcp)
        control=$copying
        judge_copying "$name: a copy is seen" "$all >= 100 && $share >= 0.05 && $copying >= 50" 'the profile does not see it'
        ;;
      verbs) judge_copying "$name: no copy" "$all >= 100 && $control >= 50 && $copying * 50 <= $control" 'something copies' ;;
    esac
  done
}

# Few samples say nothing.
judge_copying() { # name, condition, why not
  if holds "$2"; then ok "$1"; else not_ok "$1" "$3, or there are too few samples"; fi
}

judge_bound() { # fabric, name, condition, why not
  if [ "$1" != verbs ] || holds "$3"; then ok "$2"; else not_ok "$2" "$4"; fi
}

# shellcheck shell=bash
# perftest: latency and bandwidth between the hosts. Function and ratios: emulated processors say nothing about a card's speed.

ABOUT='ib_read_lat, ib_read_bw and ib_write_bw between the hosts, interleaved, same sizes; medians'
NEEDS=()

# Iterations by size, so that each measurement takes about as long.
PERFTEST_SIZES='4096:300 65536:100 1048576:12'
declare -A MEASURED=()

run_suite() {
  local rounds=3 round pair size count program
  [ -z "$QUICK" ] || rounds=1
  MEASURED=()
  # Round by round and size by size, never one program's rounds together: the machine's other work then falls on all alike.
  for ((round = 1; round <= rounds; round++)); do
    for pair in $PERFTEST_SIZES; do
      size=${pair%:*} count=${pair#*:}
      for program in ib_read_lat ib_read_bw ib_write_bw; do
        measure "$program" "$size" "$count" || return 0
      done
    done
  done
  perftest_table "$rounds"
}

# One run of a program of perftest, server on host a, client on host b; the client's figure is added to MEASURED.
# Never with -R: its server closes and opens its listener again, and a quick client is refused.
measure() { # program, bytes, iterations
  local program=$1 size=$2 options="-d rxe0 -x 1 -F -s $2 -n $3" server value
  start_on a "$program-server" "exec timeout 120 $program $options"
  server=$ORDER
  if ! await_listener a "$server" 18515 30; then
    not_ok "$program at $size bytes" "no listener: $(last_words "$OUT/a/$server")"
    return 1
  fi
  LABEL=$program-client on b 120 "exec timeout 110 $program $options $A_DATA" ||
    { not_ok "$program at $size bytes" "client: $(last_words "$SAID_IN")"; return 1; }
  await a "$server" 30 || { not_ok "$program at $size bytes" "server: $(last_words "$OUT/a/$server")"; return 1; }
  value=$(perftest_value "$program" <<<"$SAID")
  [ -n "$value" ] || { not_ok "$program at $size bytes" "no line of figures: $(last_words "$SAID_IN")"; return 1; }
  MEASURED[$program.$size]+="$value "
}

# The figure of perftest's table: t_typical in µs, or the average bandwidth in MiB/s (it calls 2^20 bytes a MB).
perftest_value() { # program
  case $1 in
    *_lat) awk '/^ *[0-9]+ +[0-9]+ / {value = $5} END {print value}' ;;
    *) awk '/^ *[0-9]+ +[0-9]+ / {value = $4} END {print value}' ;;
  esac
}

perftest_table() { # rounds
  local pair size program latency read write
  remark "$(printf '%8s %18s %18s %18s' bytes 'ib_read_lat [us]' 'ib_read_bw [MiB/s]' 'ib_write_bw [MiB/s]')"
  for pair in $PERFTEST_SIZES; do
    size=${pair%:*}
    latency=$(median "${MEASURED[ib_read_lat.$size]}") read=$(median "${MEASURED[ib_read_bw.$size]}") write=$(median "${MEASURED[ib_write_bw.$size]}")
    remark "$(printf '%8d %18.1f %18.1f %18.1f' "$size" "$latency" "$read" "$write")"
    figure 'ib_read_lat typical' "$latency" us
    figure 'ib_read_bw' "$read" MiB/s
    figure 'ib_write_bw' "$write" MiB/s
    figure rounds "$1" ''
    # A read that takes longer than a retry does, or moves less than a modem, is not the network working.
    if awk -v l="$latency" -v r="$read" -v w="$write" 'BEGIN {exit !(l > 0 && l < 100000 && r > 0.1 && w > 0.1)}'; then
      ok "$size bytes read and written"
    else
      not_ok "$size bytes read and written" 'these figures are not those of a working link'
    fi
  done
}

# shellcheck shell=bash
# Commands given to the hosts. An order has a name of its own; its output is OUT/HOST/NAME.out and .err as it is written, so that
# it can be waited for and survives the host.

ORDERS=0

# Starts a command on a host and leaves its order's name in ORDER.
start_on() { # host, label, command...
  local host=$1 label=$2
  shift 2
  ORDERS=$((ORDERS + 1))
  printf -v ORDER '%03d-%s' "$ORDERS" "$label"
  : >"$OUT/$host/$ORDER.out"
  printf '%s\n' "$*" >"$OUT/orders/$ORDER"
  tell "$host" "run $ORDER"
}

# Waits until an order has ended; its exit code is the function's. 124: it has not ended in time, 125: the host is gone.
await() { # host, order, seconds
  local end=$((SECONDS + $3))
  until [ -e "$WORK/done.$2" ]; do
    hear "$1" 1
    [ -e "$WORK/done.$2" ] && break
    is_up "$1" || return 125
    [ "$SECONDS" -lt "$end" ] || return 124
  done
  return "$(<"$WORK/done.$2")"
}

# Whether an order has ended already.
has_ended() { # host, order
  [ -e "$WORK/done.$2" ] || hear "$1" 0.01
  [ -e "$WORK/done.$2" ]
}

# Runs a command on a host to its end and leaves its standard output in SAID, and where its files are in SAID_IN.
on() { # host, seconds, command...
  local host=$1 limit=$2 code=0
  shift 2
  start_on "$host" "${LABEL:-on-$host}" "$@"
  await "$host" "$ORDER" "$limit" || code=$?
  [ "$code" != 124 ] || tell "$host" "signal $ORDER KILL"
  SAID_IN=$OUT/$host/$ORDER
  SAID=$(<"$SAID_IN.out")
  return "$code"
}

# The last words of an order, for a failed check.
last_words() { # path without .out or .err
  local words
  words=$(tail -qn 3 "$1.err" "$1.out" 2>/dev/null | tr -s '\n\t ' ' ' | cut -c1-300)
  printf '%s' "${words:-nothing said}"
}

signal_order() { tell "$1" "signal $2 $3"; } # host, order, signal

# Waits for a line in what an order writes, looking for a pattern of grep -E. The line is left in LINE.
await_line() { # host, order, pattern, seconds
  local end=$((SECONDS + $4)) file=$OUT/$1/$2.out
  until LINE=$(grep -aEm1 -- "$3" "$file"); do
    if has_ended "$1" "$2"; then
      LINE=$(grep -aEm1 -- "$3" "$file") && return 0
      return 1
    fi
    is_up "$1" || return 125
    [ "$SECONDS" -lt "$end" ] || return 124
    pause_a_moment
  done
}

# Waits until an order on a host listens at a TCP port, by looking into that host.
await_listener() { # host, order, port, seconds
  local hex
  printf -v hex '%04X' "$3"
  LABEL=await-listener on "$1" "$4" "until grep -qE ':$hex [0-9A-F:]+ 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 20000; done" &&
    ! has_ended "$1" "$2"
}

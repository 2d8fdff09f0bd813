# shellcheck shell=bash
# What the lab says while it works: notes on stderr, so that stdout carries results and nothing else.

LAB_STARTED_US=${EPOCHREALTIME/[.,]/}

# Seconds since the lab began, with one decimal.
lab_seconds() {
  local us=$((${EPOCHREALTIME/[.,]/} - LAB_STARTED_US))
  printf '%d.%d' $((us / 1000000)) $((us / 100000 % 10))
}

# A step of the work, with the time it began.
note() { printf '# %6s s  %s\n' "$(lab_seconds)" "$*" >&2; }

# Something a person should know though the lab goes on.
warn() { printf 'lab: warning: %s\n' "$*" >&2; }

# The lab cannot go on: what happened, and on a second line what to do next.
die() {
  printf 'lab: %s\n' "$1" >&2
  [ -z "${2-}" ] || printf '     %s\n' "$2" >&2
  exit "${3:-1}"
}

# A wrong command line.
usage_error() { die "$1" "\`lab --help\` tells what is possible." 2; }

# shellcheck shell=bash
# A run of the lab: its folders, its time limit, its suites one after the other, and its end.
#
# A suite is suites/NAME.sh. It sets ABOUT (what it shows, one line), NEEDS (belay, bench, transport-tests, glue-tests, qemu, or nothing) and, where a host's
# usual memory is not enough for it, NEEDS_MIB, and defines run_suite, which tells checks (lib/results.sh) about hosts that are up and joined (lib/hosts.sh).

# In the order in which `all` runs them: what the later ones build on comes first.
all_suites() { printf '%s\n' smoke conformance perftest demo kill qemu tap partition loss cpu; }

is_suite() { all_suites | grep -qx -- "$1"; }

list_suites() {
  local name
  for name in $(all_suites); do
    (
      # shellcheck source=/dev/null
      . "$LAB/suites/$name.sh"
      printf '%-12s %s\n' "$name" "$ABOUT"
    )
  done
  printf '%-12s %s\n' ci 'smoke, conformance and a short demo: what CI runs' all 'all of them'
}

# Seeded choice of a whole number, the same sequence for the same seed whatever else happens.
RANDOM_STATE=0
seed_random() { RANDOM_STATE=$(($1 * 2654435761 % 4294967296)); }
choose() { # from, to; leaves CHOSEN
  RANDOM_STATE=$(((RANDOM_STATE * 1664525 + 1013904223) % 4294967296))
  CHOSEN=$(($1 + (RANDOM_STATE >> 8) % ($2 - $1 + 1)))
}

open_run() {
  local kept
  # A program that asked for JSON on stdout gets nothing else there.
  if [ "$JSON" = - ]; then exec {REAL_STDOUT}>&1 1>&2; fi
  if [ -z "$OUT" ]; then
    kept=$REPOSITORY/target/softroce
    mkdir -p "$kept"
    forget_old_runs "$kept"
    OUT=$kept/$(date +%Y%m%d-%H%M%S)-$$
  fi
  mkdir -p "$OUT" || die "the folder for logs, $OUT, cannot be made" "--out DIR names another."
  OUT=$(cd "$OUT" && pwd)
  forget_dead_labs
  # Unix socket paths are short: not under OUT.
  WORK=$(mktemp -d -t belay-lab.XXXXXX)
  printf '%s\n' "$$" >"$WORK/lab.pid"
  printf '%s\n' "$OUT" >"$WORK/out"
  mkfifo "$WORK/nothing"
  trap 'end_run $?' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'warn "the time of $LIMIT_S s was up (--limit)"; exit 3' USR1
  start_alarm
  QEMU_VERSION=$(qemu-system-x86_64 --version | sed -n '1s/.*version //p')
  BELAY_VERSION=$(cd "$REPOSITORY" && git describe --always --dirty 2>/dev/null || echo unknown)
  prepare_image "$KERNEL"
}

# The folders of labs that were killed (their hosts went with them); those of kept hosts stay.
forget_dead_labs() {
  local work file
  for work in "${TMPDIR:-/tmp}"/belay-lab.??????; do
    [ -e "$work/lab.pid" ] || continue
    for file in "$work"/*.pid; do
      ! kill -0 "$(<"$file")" 2>/dev/null || continue 2
    done
    rm -rf "$work"
  done
}

# The last ten runs' logs are kept; a run whose lab still lives is not touched.
forget_old_runs() {
  local run
  while read -r run; do
    kill -0 "${run##*-}" 2>/dev/null || rm -rf "${1:?}/$run"
  done < <(find "$1" -mindepth 1 -maxdepth 1 -type d -name '2*-*' -printf '%f\n' | sort -r | tail -n +10)
}

# The whole run has a limit, whatever it waits for: bash takes a signal between two commands, and every wait here is short.
start_alarm() {
  local lab=$$
  (
    trap 'kill "$timer" 2>/dev/null; exit' TERM
    sleep "$LIMIT_S" &
    timer=$!
    wait "$timer"
    kill -USR1 "$lab"
  ) </dev/null >/dev/null 2>&1 &
  ALARM=$!
}

run_suites() {
  local name
  for name in ${SUITE_NAMES[@]+"${SUITE_NAMES[@]}"}; do run_one "$name"; done
}

# FABRICS, of what --fabric says; without it verbs, where this belay has it.
choose_fabrics() {
  local has_verbs=''
  [ -x "$OUT/bin/belay" ] || return 0
  if "$OUT/bin/belay" help send | grep -q -- '--trusted-fabric'; then has_verbs=yes; fi
  case $FABRIC in
    both) FABRICS='tcp verbs' ;;
    '') if [ -n "$has_verbs" ]; then FABRICS=verbs; else FABRICS=tcp; fi ;;
    *) FABRICS=$FABRIC ;;
  esac
  [ -z "$has_verbs" ] || TCP_OPTIONS='--fabric tcp'
}

run_one() {
  local began
  SUITE=$1 ABOUT='' NEEDS=() NEEDS_MIB=$HOST_MEMORY_MIB
  seed_random "$SEED"
  # shellcheck source=/dev/null
  . "$LAB/suites/$1.sh"
  need_binaries ${NEEDS[@]+"${NEEDS[@]}"}
  choose_fabrics
  need_hosts
  heal
  began=$SECONDS
  remark "$1: $ABOUT"
  run_suite
  end_suite "$((SECONDS - began))" "seed=$SEED${QUICK:+ quick}"
}

finish_run() {
  [ -z "$KEEP" ] || keep_hosts
  [ "${#SUITE_NAMES[@]}" -gt 0 ] || return 0
  [ -n "${KEPT-}" ] || stop_hosts
  results_json >"$OUT/results.json"
  case $JSON in
    '') ;;
    -) cat "$OUT/results.json" >&"$REAL_STDOUT" ;;
    *) cp "$OUT/results.json" "$JSON" ;;
  esac
  note "logs and results: $OUT"
  note "memory of the hosts at most: a ${PEAK_MIB[a]} MiB, b ${PEAK_MIB[b]} MiB"
  printf '%d passed, %d failed, %d skipped\n' "$PASSED" "$FAILED" "$SKIPPED"
  if [ "$FAILED" -gt 0 ] || [ "$((PASSED + SKIPPED))" = 0 ]; then exit 1; fi
}

# However the run ends: no QEMU, no helper and no temporary folder of it is left, unless the hosts are to be kept.
end_run() { # exit code
  trap '' INT TERM USR1
  kill "$ALARM" 2>/dev/null || true
  [ -z "${OBSERVER_PID-}" ] || kill "$OBSERVER_PID" 2>/dev/null || true
  if [ -n "${KEPT-}" ]; then exit "$1"; fi
  stop_hosts
  rm -rf "$WORK" "${OUT:?}/bin"
  exit "$1"
}

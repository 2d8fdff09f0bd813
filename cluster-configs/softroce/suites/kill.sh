# shellcheck shell=bash
# kill: `belay soak` inside one host, over its own rxe0: migrations that are struck in a known place, each judged by what its processes
# said and did and by what an observer saw.
#
# Source and destination are two processes of one host: what is shown is that no SIGKILL and no SIGSTOP in any phase of a migration that
# goes over queue pairs and registered memory loses a promise, with the kernel giving a dead process's queue pairs and memory back as it
# does on any host. What the death of a whole host or of the path between two does is shown by `demo` and `partition`. A link cut is not
# among these strikes: what RDMA carries passes through no relay.

ABOUT="inside a host: migrations over its own rxe0 are struck in every phase by SIGKILL and SIGSTOP, in many with a process that takes over, and each is judged; none may lose a promise"
NEEDS=(belay)
# A run has guest RAM (64 MiB) several times over, and a soak begins none without 600 MiB and a spare.
NEEDS_MIB=1536

# PHASE/STRIKE, and after an @ the place in that phase where it must be: frozen right before a trailer's write is frozen between check and
# write. Every phase is here, every strike that there is over verbs, and a kill while the source folds.
readonly KILL_CASES='
  prepare/host-kill switch/source-kill handover/destination-kill pull/server-kill landing/guard-kill epoch/destination-kill
  record/host-kill commit/freeze@commit-due output/observer-cut fold/destination-kill tethered/freeze release/source-kill catch/freeze'
readonly KILL_CASES_QUICK='switch/source-kill pull/server-kill commit/freeze@commit-due fold/destination-kill catch/freeze'
# Strikes after which the command is started again with --takeover: `belay send` with the guest's memory in files that it left, `belay receive`
# with a VMM apart that it left. Each in the phases where what is left differs: nothing moved yet, half of a switch, pages missing, a record
# half written, a fold, a tether, a release half done, a catch half done.
readonly KILL_TAKEOVERS='
  prepare/source-takeover switch/source-takeover handover/server-takeover pull/source-takeover pull/server-takeover landing/server-takeover
  epoch/server-takeover record/source-takeover commit/server-takeover output/source-takeover fold/source-takeover tethered/source-takeover
  tethered/server-takeover release/source-takeover release/server-takeover catch/source-takeover'
readonly KILL_TAKEOVERS_QUICK='pull/server-takeover tethered/source-takeover'
# Emulated hosts: a lease of four seconds, and everything else in proportion.
readonly KILL_PACE=8
# Both roles, the observer and a nested guest share one emulated processor.
readonly KILL_LIMIT_S=900

run_suite() {
  local fabric kills=$KILL_CASES takeovers=$KILL_TAKEOVERS
  [ -z "$QUICK" ] || kills=$KILL_CASES_QUICK takeovers=$KILL_TAKEOVERS_QUICK
  for fabric in $FABRICS; do
    if soak "$fabric" "$fabric" "$kills"; then judge_folds "$fabric"; fi
    soak "$fabric, taken over" "$fabric" "$takeovers" || true
  done
}

soak() { # name of the checks, fabric, cases
  local cases=() one code order end=$((SECONDS + KILL_LIMIT_S))
  for one in $3; do
    choose_case "$2" "$one" || { not_ok "$1: a case of $one" 'no seed of two hundred comes to that place'; return 1; }
    cases+=("$CASE")
  done
  # From memory: each run starts the program several times.
  start_on a soak "cp /lab/bin/belay /opt/belay && exec /opt/belay soak --json --jobs 1 --slow-host $KILL_PACE ${cases[*]/#/--case }"
  order=$ORDER SAID_IN=$OUT/a/$ORDER LINES_JUDGED=0 RUNS_TOLD=0
  while :; do
    code=0
    await a "$order" 2 || code=$?
    judge_runs
    if [ "$code" != 124 ] || [ "$SECONDS" -ge "$end" ]; then break; fi
  done
  if [ "$code" = 124 ]; then
    signal_order a "$order" KILL
    not_ok "$1: all of the soak within $KILL_LIMIT_S s" "$RUNS_TOLD of ${#cases[@]} runs were told"
    return 1
  fi
  SUM=$(grep '^{"event":"soak"' "$SAID_IN.out") || { not_ok "$1: the soak sums up" "exit code $code: $(last_words "$SAID_IN")"; return 1; }
  judge_sum "$1" "${#cases[@]}"
  nothing_left "$1"
}

# A case with a seed of the lab's choice, left in CASE; where a place is wanted, one that comes there.
choose_case() { # fabric, PHASE/STRIKE[@PLACE]
  local try place=''
  [[ $2 != *@* ]] || place=${2#*@}
  for ((try = 0; try < 200; try++)); do
    choose 1 999999
    CASE=$1/${2%@*}/$CHOSEN
    [ -n "$place" ] || return 0
    ! "$OUT/bin/belay" soak --plan --case "$CASE" | grep -q "at $place number" || return 0
  done
  return 1
}

# A check a run, of the lines that have come since; those that were made again because a lease had run out by itself are remarks.
judge_runs() {
  local line name landed wrong whole
  whole=$(wc -l <"$SAID_IN.out")
  [ "$whole" -gt "$LINES_JUDGED" ] || return 0
  while IFS= read -r line; do
    name=$(sed -n 's/^{"case":{"fabric":"\([a-z]*\)","phase":"\([a-z]*\)","strike":"\([a-z-]*\)","seed":\([0-9]*\)}.*/\1\/\2\/\3\/\4/p' <<<"$line")
    landed=$(json_text landed <<<"$line")
    wrong=$(sed -n 's/.*"wrong":\[\(.*\)\],"landed":.*/\1/p' <<<"$line" | cut -c1-400)
    case $line in
      *'"outcome":"held"'*) RUNS_TOLD=$((RUNS_TOLD + 1)); ok "$name" "$landed; the guest's end: $(json_text home <<<"$line")" ;;
      *'"outcome":"void"'*) remark "$name is made again: $wrong" ;;
      *) RUNS_TOLD=$((RUNS_TOLD + 1)); not_ok "$name" "$landed; $wrong; again: belay soak --slow-host $KILL_PACE --case $name" ;;
    esac
  done < <(sed -n "$((LINES_JUDGED + 1)),${whole}p" "$SAID_IN.out" | grep '^{"case":')
  LINES_JUDGED=$whole
}

# The first text, or number, of a name in a line of JSON; nothing where there is none.
json_text() { { grep -oEm1 "\"$1\":\"[^\"]*\"" || true; } | head -1 | cut -d'"' -f4; }
json_number() { { grep -oEm1 "\"$1\":[0-9]+" || true; } | head -1 | cut -d: -f2; }

# What the soak itself counted, in its last line.
judge_sum() { # name of the checks, runs
  local held broken
  held=$(json_number held <<<"$SUM") broken=$(json_number broken <<<"$SUM")
  figure held "$held" ''
  figure broken "$broken" ''
  figure 'made again' "$(json_number void <<<"$SUM")" ''
  figure phases "$(grep -o '"by_phase":{[^}]*}' <<<"$SUM" | { grep -oE '"[a-z]+/[a-z]+"' || true; } | wc -l)" ''
  if [ "$held" = "$2" ] && [ "$broken" = 0 ]; then ok "$1: every promise held in every run"; else not_ok "$1: every promise held in every run" "$2 runs were asked for"; fi
}

# Catching is hardest while the source takes a checkpoint in: at least one of the kills came while it stood there.
judge_folds() { # fabric
  local folded
  folded=$(json_number kills_after_folding <<<"$SUM")
  figure 'kills while the source stood in a fold' "$folded" ''
  if [ "$folded" -ge 1 ]; then ok "$1: a guest is caught whose checkpoints were being folded"; else not_ok "$1: a guest is caught whose checkpoints were being folded" 'no kill came while the source stood in a fold'; fi
}

# Everything a killed process had is given back by the kernel, on the device too: it takes its time, but ends.
nothing_left() { # fabric
  LABEL=left check "$1: no process, file, queue pair or registered memory of any run is left" on a 60 '
    look() { pgrep -l belay; ls /dev/shm; rdma resource show qp link rxe0 | grep " pid "; rdma resource show mr | grep " pid "; }
    until [ -z "$(look)" ]; do [ $((n += 1)) -lt 100 ] || { look; exit 1; }; usleep 100000; done'
}

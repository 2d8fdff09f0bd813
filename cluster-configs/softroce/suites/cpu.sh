# shellcheck shell=bash
# cpu: what the source spends on a page that is pulled from it. Over verbs that must be nothing: N and 4N pages cost the same.
#
# The *process* is measured: run time of each of its threads as the scheduler counts it (/proc/PID/task/*/schedstat, nanoseconds) and
# their context switches. rxe's own softirq work is the network card here and nobody's process, but the kernel charges it to whoever
# it interrupts: with one CPU a trace of it is seen. A process that waits for the same time costs something too (timers, heartbeats),
# so that is measured in the same run, once every page has landed, and taken off.

ABOUT="the source process's CPU time and context switches while N and 4N pages are pulled: over verbs no difference, over tcp one"
NEEDS=(belay)

readonly CPU_SIZES_MIB='8 32'
declare -A CPU_MS=() CPU_SWITCHES=() CPU_PAGES=()

run_suite() {
  local fabric size round rounds=3
  [ -z "$QUICK" ] || rounds=1
  CPU_MS=() CPU_SWITCHES=() CPU_PAGES=()
  for ((round = 1; round <= rounds; round++)); do
    for size in $CPU_SIZES_MIB; do
      for fabric in $FABRICS; do measure_pull "$fabric" "$size" || return 0; done
    done
  done
  for fabric in $FABRICS; do judge_cost "$fabric"; done
}

# One untethered migration: its pull, then as long a wait with nothing to pull. Untethered, because folding checkpoints is work for
# what the guest writes, not for a page that is pulled.
measure_pull() { # fabric, MiB
  local fabric=$1 size=$2 name="$1, $2 MiB" t0 t1 t2
  local -A at=()
  start_migration cpu "$fabric" '--check --run-on 200ms' "--memory ${size}M --drive kvm --guest scanner --policy none --release 12s" &&
    await_line a "$SEND" '"state":"serving"' 60 ||
    { not_ok "$name: started" "$(story_words)"; clear_migration; return 1; }
  sample_source && at[0]=$SAMPLE t0=$SAMPLED_AT
  await_line b "$RECEIVE" '"event":"all-landed"' 180 || { not_ok "$name: every page landed" "$(story_words)"; clear_migration; return 1; }
  sample_source && at[1]=$SAMPLE t1=$SAMPLED_AT
  pass_ms 3000
  sample_source && at[2]=$SAMPLE t2=$SAMPLED_AT
  await a "$SEND" 60 && await b "$RECEIVE" 60 || { not_ok "$name: released" "$(story_words)"; clear_migration; return 1; }
  keep_cost "$fabric" "$size" "${at[0]}" "${at[1]}" "${at[2]}" "$t0" "$t1" "$t2"
  clear_migration
}

# Nanoseconds of run time and context switches of all of the source's threads, and when that was (seconds of the host's uptime).
# The threads, by name, are in the order's error file.
sample_source() {
  LABEL=sample on a 30 '
    pid=$(cat /tmp/pids/'"$SEND"'); ns=0; switches=0
    for task in /proc/$pid/task/*; do
      [ -r $task/schedstat ] || continue
      read -r run _ <$task/schedstat
      more=$(sed -n "s/.*ctxt_switches:[^0-9]*//p" $task/status | { read -r a; read -r b; echo $((a + b)); })
      ns=$((ns + run)) switches=$((switches + more))
      echo "$(cat $task/comm) $run ns $more switches" >&2
    done
    read -r up _ </proc/uptime
    echo $ns $switches $up' || return
  read -r SAMPLE SAMPLED_SWITCHES SAMPLED_AT <<<"$SAID"
  SAMPLE+=" $SAMPLED_SWITCHES"
}

# What the pull cost beyond waiting.
keep_cost() { # fabric, MiB, three samples, three times
  local key=$1.$2
  read -r ms switches <<<"$(awk -v s="$3 $4 $5" -v t0="$6" -v t1="$7" -v t2="$8" 'BEGIN {
    split(s, v, " "); wait = (t1 - t0) / (t2 - t1)
    printf "%.3f %.1f", (v[3] - v[1] - (v[5] - v[3]) * wait) / 1e6, v[4] - v[2] - (v[6] - v[4]) * wait }')"
  CPU_MS[$key]+="$ms " CPU_SWITCHES[$key]+="$switches "
  CPU_PAGES[$key]=$(event_number a "$SEND" switch-sent peer_frames)
}

judge_cost() { # fabric
  local few=${CPU_SIZES_MIB% *} many=${CPU_SIZES_MIB#* } extra_ms extra_switches pages us size
  remark "$(printf '%-6s %8s %22s %26s' fabric pages 'CPU beyond waiting [ms]' 'switches beyond waiting')"
  for size in $few $many; do
    remark "$(printf '%-6s %8d %22.1f %26.0f' "$1" "${CPU_PAGES[$1.$size]}" "$(median "${CPU_MS[$1.$size]}")" "$(median "${CPU_SWITCHES[$1.$size]}")")"
  done
  pages=$((${CPU_PAGES[$1.$many]} - ${CPU_PAGES[$1.$few]}))
  extra_ms=$(calculate "$(median "${CPU_MS[$1.$many]}") - $(median "${CPU_MS[$1.$few]}")" 1)
  extra_switches=$(calculate "$(median "${CPU_SWITCHES[$1.$many]}") - $(median "${CPU_SWITCHES[$1.$few]}")" 0)
  us=$(calculate "$extra_ms * 1000 / $pages" 2)
  figure 'further pages' "$pages" ''
  figure 'further CPU time' "$extra_ms" ms
  figure 'a page' "$us" us
  figure 'further context switches' "$extra_switches" ''
  case $1 in
    verbs)
      # Pages that went through the process would wake it, once for several at best; over tcp one takes hundreds of microseconds.
      if holds "$us < 25 && $extra_switches < $pages / 50"; then
        ok "$1: a further page costs the source's process nothing"
      else
        not_ok "$1: a further page costs the source's process nothing" 'it costs time or context switches'
      fi
      ;;
    *)
      # The proof that this measure sees work where there is some.
      if holds "$us > 25"; then
        ok "$1: a further page costs the source's process time, and this measure sees it"
      else
        not_ok "$1: a further page costs the source's process time, and this measure sees it" 'it saw none'
      fi
      ;;
  esac
}

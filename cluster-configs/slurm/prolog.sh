#!/bin/sh
# Slurm Prolog: is this node fit to carry guests by RDMA? Runs as root on each node of an allocation, before the job.
#
#   slurm.conf:  Prolog=/etc/slurm/belay/prolog.sh    Epilog=/etc/slurm/belay/epilog.sh    TaskProlog=/etc/slurm/belay/task-prolog.sh
#                PrologFlags=Alloc,Contain            # before the first step, also for salloc; and a cgroup for every process of a job
#                ProctrackType=proctrack/cgroup       # so that nothing of a job outlives it
#                PropagateResourceLimitsExcept=MEMLOCK
#                NodeName=… Feature=belay             # jobs say --constraint=belay
#   slurmd.service:  LimitMEMLOCK=infinity            # jobs inherit slurmd's; RDMA pins guest memory
#
# Jobs that did not ask for the feature are let through untouched. For one that did: if RDMA is broken here the node is drained
# with what `belay check` says is wrong, and a non-zero end has Slurm put the job back into the queue. Otherwise the job gets a
# directory of its own, /run/belay/job-ID, which the epilog removes; TaskProlog names it BELAY_RUN_DIR. (Slurm advises against its
# own commands in a prolog: scontrol is called only where a node is drained.)
set -u

BELAY=${BELAY:-/usr/bin/belay}
RUN=${BELAY_RUN:-/run/belay}
# belay check looks at devices through the driver; a card that has fallen off the bus can make that hang.
BOUND=${BELAY_CHECK_SECONDS:-20}

case ",${SLURM_JOB_CONSTRAINTS:-}," in
  *[!A-Za-z0-9_-]belay[!A-Za-z0-9_-]*) ;;
  *) exit 0 ;;
esac

say() { logger -t belay-prolog -- "$*" 2>/dev/null || echo "belay-prolog: $*" >&2; }

drain() {
  say "job ${SLURM_JOB_ID:-?}: draining ${SLURMD_NODENAME:-this node}: $*"
  scontrol update NodeName="${SLURMD_NODENAME:?}" State=DRAIN Reason="belay: $*" || say "scontrol could not drain"
  exit 1
}

case ${SLURM_JOB_ID:-} in
  '' | *[!0-9]*) say "no job id in the environment"; exit 1 ;;
esac

answer=$(timeout "$BOUND" "$BELAY" check --json 2>&1)
code=$?
case $code in
  0 | 3) ;; # 3: something that moving guests needs is missing; which is in the answer.
  124) drain "check gave no answer within $BOUND s" ;;
  126 | 127) drain "$BELAY cannot be run" ;;
  *) drain "check ended with $code: $(printf '%s' "$answer" | tail -n 1 | cut -c 1-120)" ;;
esac

# The JSON has one key a line. A node is fit if guests can move at all (nothing missing), libraries, connection manager and
# locked memory are there, and some port has a GID (of BELAY_IB_DEV, where that is set). A second port without a cable is no fault.
broken=$(printf '%s\n' "$answer" | awk -v device="${BELAY_IB_DEV:-}" '
  function value(line) {
    line = substr(line, index(line, ": ") + 2)
    sub(/^"/, "", line); sub(/",?$/, "", line); gsub(/\\"/, "\"", line)
    return line
  }
  /^ *"detail": / { detail = value($0) }
  /^ *"name": / { name = value($0) }
  /^ *"verdict": / {
    verdict = value($0)
    if (verdict == "missing" || (verdict != "ok" && name ~ /^(rdma libraries|rdma connections|memlock)$/))
      print name ": " detail
    else if (name == "rdma gid" && verdict == "ok" && (device == "" || index(detail, device " ") == 1))
      fit = 1
    else if (verdict != "ok" && name ~ /^rdma / && why == "" && (device == "" || index(detail, device)))
      why = name ": " detail
  }
  END { if (!fit) print (why != "" ? why : "no RDMA port that can be used " (device != "" ? "on " device : "was found")) }
' | head -n 1 | cut -c 1-200)
[ -z "$broken" ] || drain "$broken"

umask 022
mkdir -p -- "$RUN" || drain "$RUN cannot be made"
# The folder is root's: whoever owns a job's directory in it can neither replace it nor make one for another job.
mkdir -m 0700 -- "$RUN/job-$SLURM_JOB_ID" 2>/dev/null || [ -d "$RUN/job-$SLURM_JOB_ID" ] || drain "$RUN/job-$SLURM_JOB_ID cannot be made"
[ -z "${SLURM_JOB_UID:-}" ] || chown -- "$SLURM_JOB_UID" "$RUN/job-$SLURM_JOB_ID" || drain "$RUN/job-$SLURM_JOB_ID cannot be given to the job"
exit 0

#!/bin/sh
# Slurm Epilog: removes what a job's belay left under /run/belay. Runs as root on each node of an allocation, after the job.
#
# Only the job's own directory goes: sockets, and page states of a guest that is not here any more. Never /var/lib/belay (or
# wherever --state-dir of `belay send` points): what a release has written down there keeps this host from resuming a guest that
# another one owns.
#
# Nothing is removed under a process that still runs: with proctrack/cgroup none does. If one does (a VMM whose page server has
# died keeps its guest's memory for ten minutes), the end is non-zero, Slurm drains the node and a person looks at it.
set -u

RUN=${BELAY_RUN:-/run/belay}
PROC=${BELAY_PROC:-/proc}

say() { logger -t belay-epilog -- "$*" 2>/dev/null || echo "belay-epilog: $*" >&2; }

case ${SLURM_JOB_ID:-} in
  '' | *[!0-9]*) say "no job id in the environment"; exit 1 ;;
esac
directory=$RUN/job-$SLURM_JOB_ID
[ -e "$directory" ] || [ -L "$directory" ] || exit 0
if [ -L "$directory" ] || [ ! -d "$directory" ]; then
  say "$directory is not a directory; left as it is"
  exit 1
fi

# A process of belay that was started by this job.
for process in "$PROC"/[0-9]*; do
  case $(readlink "$process/exe" 2>/dev/null) in
    */belay | */belay\ \(deleted\)) ;;
    *) continue ;;
  esac
  if tr '\0' '\n' <"$process/environ" 2>/dev/null | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID"; then
    say "belay process ${process##*/} of job $SLURM_JOB_ID still runs; $directory is left as it is"
    exit 1
  fi
done

# rm does not follow symbolic links, and stays on this file system. The path itself lies in a folder only root can write.
rm -rf --one-file-system -- "$directory" || { say "$directory could not be removed"; exit 1; }
exit 0

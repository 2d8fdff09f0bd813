#!/bin/sh
# Slurm TaskProlog: tells a job's processes the directory that the prolog made for them. What it prints becomes their environment.
#   belay receive --listen unix:$BELAY_RUN_DIR/receive.sock --state-dir $BELAY_RUN_DIR …
directory=${BELAY_RUN:-/run/belay}/job-${SLURM_JOB_ID:-}
[ ! -d "$directory" ] || echo "export BELAY_RUN_DIR=$directory"

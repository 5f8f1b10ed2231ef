#!/usr/bin/env bash
# Submit a chain of jobs, where a cluster forbids requeueing: each resumes where the last one stopped.
#   slurm/submit_chain.sh 5 --nodes=4 --gpus-per-node=8 --time=04:00:00 slurm/pretrain.sbatch CONFIG ...
# The arguments after the count are passed to sbatch. A job that finds the run finished ends at once.
set -euo pipefail

usage() {
    echo "usage: slurm/submit_chain.sh JOBS [sbatch options] SCRIPT [arguments]" >&2
    exit 2
}
if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then usage; fi
command -v sbatch >/dev/null || {
    echo "submit_chain.sh: sbatch is not on the PATH: run this on a login node" >&2
    exit 2
}
jobs=$1
shift
export MLM_MAX_RESTARTS=0 # the next job resumes, this one is not restarted
after=()
for ((number = 1; number <= jobs; number++)); do
    id=$(sbatch --parsable --no-requeue "${after[@]}" "$@")
    id=${id%%;*}
    after=(--dependency="afterany:$id")
    echo "job $number of $jobs: $id"
done

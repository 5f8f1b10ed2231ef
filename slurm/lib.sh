# shellcheck shell=bash
# Code shared by the job scripts, which source it inside a job. See docs/slurm.md, and cluster.env.example for
# the settings of a cluster.
set -uo pipefail

say() { printf 'mlm-train: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "slurm/*.sbatch run inside a Slurm job: start them with sbatch"
MLM_ROOT=${MLM_ROOT:-$SLURM_SUBMIT_DIR}
[[ -d $MLM_ROOT/mlm_train ]] || die "$MLM_ROOT holds no mlm_train: run sbatch there, or set MLM_ROOT"
[[ $MLM_ROOT != *:* ]] || die "$MLM_ROOT: Python's path cannot hold a colon; rename the folder"
settings=${MLM_CLUSTER_ENV:-$MLM_ROOT/slurm/cluster.env}
# shellcheck disable=SC1090
if [[ -f $settings ]]; then . "$settings"; fi

# The rendezvous address. The port is below the system's ephemeral ports and above those of Ray, and changes
# with each restart: processes that survive on a lost node may still hold the last one.
restarts=${SLURM_RESTART_COUNT:-0}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20480 + (SLURM_JOB_ID + 4099 * restarts) % 12288))
export MASTER_ADDR MASTER_PORT

processes=${MLM_NPROC:-${SLURM_GPUS_ON_NODE:-1}} # per node
max_restarts=${MLM_MAX_RESTARTS:-5}
# A restart after a checkpoint requested by a signal is not a failure: a long run has one at each time limit.
# It resets the count.
begins=$PWD/.mlm-train-job-$SLURM_JOB_ID
failures=$((restarts - $(cat "$begins" 2>/dev/null || echo 0)))
export MLM_PYTHON=${MLM_PYTHON:-$MLM_ROOT/.venv/bin/python}
export PYTHONPATH=$MLM_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Only with an image: a plain srun does not know pyxis' options.
container=()
if [[ -n ${MLM_IMAGE:-} ]]; then
    mounts=${MLM_MOUNTS:-$PWD,$MLM_ROOT}
    if [[ -z ${MLM_MOUNTS:-} && $PWD$MLM_ROOT == *[,:]* ]]; then
        die "$PWD or $MLM_ROOT: pyxis takes , and : in a path for its own; set MLM_MOUNTS, or rename the folder"
    fi
    container=(--container-image="$MLM_IMAGE" --container-mounts="$mounts"
        --container-workdir="$PWD")
fi

# launch OPTIONS... CONFIG...: torchrun's agent on every node. With MLM_NODES, N or MIN:MAX, the run takes so many
# of the job's nodes, and another one replaces a lost one, as often as there may be lost ones, or
# MLM_RANK_RESTARTS times.
launch() {
    local fewest=${MLM_NODES:-$SLURM_NNODES} meet=()
    local most=${fewest#*:}
    fewest=${fewest%:*}
    ((most <= SLURM_NNODES)) || die "MLM_NODES=$MLM_NODES: the job has $SLURM_NNODES nodes"
    if ((SLURM_NNODES > 1)); then meet=(--nodes "$fewest:$most" --rendezvous "$MASTER_ADDR:$MASTER_PORT"); fi
    local command=("$MLM_PYTHON" -m mlm_train launch --nproc "$processes" "${meet[@]}"
        --max-restarts "${MLM_RANK_RESTARTS:-$((SLURM_NNODES - fewest))}" "$@")
    if ((fewest == SLURM_NNODES)); then
        step per_node "${command[@]}"
        return
    fi
    # srun's exit code counts the tasks of lost nodes, which Slurm kills. Those that end by themselves leave theirs.
    # Where the node of this script is lost, --no-kill has Slurm keep the job without it: another node then
    # requeues the job, if that node's slurmd does not answer.
    rm -f "$begins".task-*
    # shellcheck disable=SC2016
    step per_node --no-kill bash -c 'trap : USR1 TERM
        "$@"
        code=$?
        echo "$code" >"$0.task-$SLURM_PROCID"
        if ((SLURM_PROCID)) && ! slurmd_answers "$MASTER_ADDR"; then scontrol requeue "$SLURM_JOB_ID"; fi
        exit "$code"' "$begins" "${command[@]}"
    if [[ -s $begins.task-0 ]]; then code=$(sort -n "$begins".task-* | tail -n 1); fi # 0: on this node
    rm -f "$begins".task-*
}

# slurmd_answers NODE: whether a node is there, as far as that can be found out.
slurmd_answers() {
    local node address port
    node=$(scontrol -o show node "$1") || return 0
    address=$(grep -om1 "NodeAddr=[^ ]*" <<<"$node")
    # A node has a port of its own, or that of all.
    port=$( (grep -o " Port=[0-9]*" <<<"$node" || scontrol show config | grep "^SlurmdPort") | grep -om1 "[0-9]*" | head -n 1)
    [[ -z $address || -z $port ]] || timeout 10 bash -c "</dev/tcp/${address#*=}/$port" 2>/dev/null
}
export -f slurmd_answers

# per_node COMMAND...: one task on every node, with all of its CPUs. Replaces the shell: call it in `step`.
# --ntasks too, since the allocation's own overrides --ntasks-per-node. After a failed task the others have a
# minute to end and report; killed at once, their exit codes would hide the first one's.
per_node() {
    exec srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=60 --cpu-bind=none \
        "${container[@]}" "$@"
}

# on_first_node COMMAND...: one task on this shell's node, beside other steps.
on_first_node() {
    exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" --cpu-bind=none \
        "${container[@]}" "$@"
}

# per_rank COMMAND...: one task per rank, with the environment variables that torchrun would set.
per_rank() {
    # shellcheck disable=SC2016
    exec srun --ntasks=$((SLURM_NNODES * processes)) --ntasks-per-node="$processes" --wait=60 \
        "${container[@]}" bash -c '
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            export LOCAL_WORLD_SIZE=$1
            shift
            exec "$@"' rank "$processes" "$@"
}

# step COMMAND...: run it, and forward SIGUSR1 and SIGTERM to it. Sets `code` to its exit code.
# A trap interrupts `wait`, which is then called again.
step() {
    local pid result interrupted
    code=127
    check_restarts
    "$@" &
    pid=$!
    trap 'interrupted=1; pass_on USR1' USR1
    trap 'interrupted=1; pass_on TERM' TERM
    while :; do
        interrupted=0
        wait "$pid"
        result=$?
        if ((result != 127)); then code=$result; fi
        if ((!interrupted)); then break; fi
    done
    trap - USR1 TERM
}

asked= # the last signal received
pass_on() {
    asked=$1
    say "job $SLURM_JOB_ID got SIG$1, passed on"
    scancel --signal="$1" "$SLURM_JOB_ID" 2>/dev/null # to the tasks: srun would kill them at SIGTERM
}

# Restarts by Slurm itself, after a lost node or a preemption, count too.
check_restarts() {
    if ((failures > max_restarts)); then
        say "job $SLURM_JOB_ID was restarted $failures times, MLM_MAX_RESTARTS=$max_restarts: it ends here"
        leave 1
    fi
}

# finish CODE: end the job with this code, or requeue the job, which kills this shell.
#   0 done, 2 bad input, 130 Ctrl-C    end
#   143 after SIGTERM                  end, except after a preemption, where Slurm restarts the job
#   85 after SIGUSR1                   requeue
#   75 hung, others                    requeue, up to MLM_MAX_RESTARTS times since the last 85 or 143
finish() {
    local code=$1
    case $code in
        0 | 2 | 130) leave "$code" ;;
        85 | 143) echo $((restarts + 1)) >"$begins" ;; # with a checkpoint
    esac
    if job_says JobState=CANCELLED; then leave "$code"; fi
    if ! job_says JobState=RUNNING; then exit "$code"; fi # Slurm is already ending it
    if [[ $code == 143 || $asked == TERM ]] && ! job_says PreemptTime=[0-9]; then leave "$code"; fi
    if ((code == 85 || code == 143)); then
        say "job $SLURM_JOB_ID saved a checkpoint, back into the queue"
    elif ((failures >= max_restarts)); then
        say "job $SLURM_JOB_ID ended with exit code $code and was restarted $failures times," \
            "MLM_MAX_RESTARTS=$max_restarts: it ends here"
        leave "$code"
    else
        say "job $SLURM_JOB_ID ended with exit code $code, back into the queue:" \
            "restart $((failures + 1)) of at most $max_restarts"
    fi
    if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; fi
    leave "$code"
}

# leave CODE: end the job for good.
leave() {
    rm -f "$begins"
    exit "$1"
}

job_says() {
    local description
    for _ in {1..24}; do # up to two minutes, for a restarting controller
        if description=$(scontrol show job "$SLURM_JOB_ID"); then break; fi
        sleep 5
    done
    [[ $description =~ [[:space:]]$1 ]]
}

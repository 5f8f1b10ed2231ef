#!/usr/bin/env bash
# Undo cluster_up.sh: cancel jobs, end the daemons that it started, delete network and folder. Processes are
# ended by the pid they left, once they are known to be of this cluster; again is fine.
set -uo pipefail

base=${CLUSTER_DIR:?set CLUSTER_DIR to the folder of cluster_up.sh}
export SLURM_CONF=$base/etc/slurm.conf

# ours PID NAME: whether it runs that program, in this cluster's environment.
ours() {
    [[ -r /proc/$1/exe && $(basename "$(readlink "/proc/$1/exe")") == "$2"* ]] &&
        grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$1/environ" 2>/dev/null
}

# end PID NAME: SIGTERM, and SIGKILL ten seconds later.
end() {
    local tenth
    ours "$1" "$2" || return 0
    kill -TERM "$1" 2>/dev/null
    for ((tenth = 0; tenth < 100; tenth++)); do
        ours "$1" "$2" || return 0
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null
}

if [[ -s $base/run/slurmctld.pid ]] && timeout 5 scontrol ping >/dev/null 2>&1; then
    timeout 10 scancel --state=PENDING --user=root
    timeout 10 scancel --user=root
    for ((tenth = 0; tenth < 100; tenth++)); do
        if [[ -z $(timeout 5 squeue -h 2>/dev/null) ]]; then break; fi
        sleep 0.1
    done
fi
for file in "$base"/run/slurmd.*.pid; do
    if [[ -s $file ]]; then end "$(<"$file")" slurmd; fi
done
for daemon in slurmctld slurmdbd mariadbd; do
    if [[ -s $base/run/$daemon.pid ]]; then end "$(<"$base/run/$daemon.pid")" "$daemon"; fi
done
# What a killed slurmd left: managers of steps, which ignore SIGTERM, and their jobs' processes.
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    if ours "$pid" slurmstepd ||
        { ours "$pid" "" && [[ -z ${SLURM_JOB_ID:-} ]] && grep -qz '^SLURM_JOB_ID=' "$process/environ" 2>/dev/null; }; then
        kill -KILL "$pid" 2>/dev/null
    fi
done
if [[ -s $base/run/munged.pid ]]; then end "$(<"$base/run/munged.pid")" munged; fi
if [[ -s $base/run/number ]]; then
    number=$(<"$base/run/number")
    for link in "/sys/class/net/mlmslurm$number-"*; do ip link del "${link##*/}" 2>/dev/null; done # with its peer
    for namespace in "/run/netns/mlm$number-node"*; do ip netns del "${namespace##*/}" 2>/dev/null; done
    ip link del "mlmslurm$number" 2>/dev/null
fi
if [[ -f $base/env.sh || -f $base/run/number ]]; then rm -rf "$base"; fi
exit 0

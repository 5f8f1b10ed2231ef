#!/usr/bin/env bash
# A real Slurm of several nodes on this one machine, for tests: no systemd, no containers. Each node is a
# network namespace with a hostname, an address and GPUs that are none. It keeps accounts: a database of its
# own, whose socket lies in its folder, and one account `us` that root belongs to. As root, on Debian or Ubuntu.
# Several may run side by side: each takes a number that is free, and its names, addresses and ports by it.
#
#   export CLUSTER_DIR=/tmp/somewhere; tests/slurm/cluster_up.sh && . "$CLUSTER_DIR/env.sh"
#   kill -9 "$(<"$CLUSTER_DIR/run/slurmd.node2.pid")"    # a node dies
#   tests/slurm/cluster_up.sh --node node2               # and comes back
#   tests/slurm/cluster_down.sh
#
# CLUSTER_NODES (4), CLUSTER_CPUS a node (8), CLUSTER_GPUS a node (8; 0: none).
set -Eeuo pipefail  # E: what fails in a function is undone, too

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${CLUSTER_DIR:?set CLUSTER_DIR to a folder of its own, with a short path}
nodes=${CLUSTER_NODES:-4}
cpus=${CLUSTER_CPUS:-8}
gpus=${CLUSTER_GPUS:-8}
export SLURM_CONF=$base/etc/slurm.conf

say() { printf 'cluster_up: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

install_slurm() {
    local program policy=/usr/sbin/policy-rc.d made=
    for program in slurmctld slurmd srun munged slurmdbd mariadbd mariadb-install-db; do
        if command -v "$program" >/dev/null; then continue; fi
        if [[ ! -e $policy ]]; then # packages start no daemons of the system then
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod +x "$policy"
            made=1
        fi
        # One at a time: tests/analyze/browser.py installs too, maybe in a process beside this one.
        flock /tmp/mlm-train-apt.lock apt-get update -qq
        DEBIAN_FRONTEND=noninteractive flock /tmp/mlm-train-apt.lock apt-get install -y -qq --no-install-recommends \
            slurmctld slurmd slurm-client munge iproute2 slurmdbd mariadb-server-core mariadb-client-core >&2
        if [[ $made ]]; then rm -f "$policy"; fi
        return
    done
}

# on_node NODE COMMAND...: with that node's network, hostname and /etc/hosts.
on_node() {
    # shellcheck disable=SC2016
    nsenter "--net=/run/netns/mlm$(<"$base/run/number")-$1" unshare --uts --mount sh -c '
        hostname "$1"
        mount --bind "$2/hosts" /etc/hosts
        mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
        shift 2
        exec "$@"' sh "$1" "$base" "${@:2}"
}

address() { echo "$subnet.$((10 + $1))"; }

# The number is taken by making the bridge, which one of two at once can. What a killed test run left keeps its own.
take_number() {
    for ((number = 0; number < 64; number++)); do
        if ip link add "mlmslurm$number" type bridge 2>>"$base/log/network.log"; then
            echo "$number" >"$base/run/number"
            subnet=10.231.$number
            port=$((16817 + 200 * number))
            return
        fi
    done
    return 1
}

make_network() {
    local i
    ip addr add "$subnet.1/24" dev "mlmslurm$number"
    ip link set "mlmslurm$number" up
    for ((i = 1; i <= nodes; i++)); do
        ip netns add "mlm$number-node$i"
        ip link add "mlmslurm$number-$i" type veth peer name eth0 netns "mlm$number-node$i"
        ip link set "mlmslurm$number-$i" master "mlmslurm$number" up
        ip -n "mlm$number-node$i" addr add "$(address "$i")/24" dev eth0
        ip -n "mlm$number-node$i" link set eth0 up
        ip -n "mlm$number-node$i" link set lo up
    done
}

write_names() {
    local i
    {
        printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "$subnet.1" "$(hostname)"
        for ((i = 1; i <= nodes; i++)); do printf '%s node%d\n' "$(address "$i")" "$i"; done
    } >"$base/hosts"
    # A node reaches no name server, and would wait for one.
    {
        sed '/^hosts:/d' /etc/nsswitch.conf
        echo 'hosts: files'
    } >"$base/nsswitch.conf"
}

write_config() {
    local i gres=
    if ((gpus)); then
        gres=" Gres=gpu:$gpus"
        echo "NodeName=node[1-$nodes] Name=gpu File=$base/dev/gpu[0-$((gpus - 1))]" >"$base/etc/gres.conf"
        for ((i = 0; i < gpus; i++)); do mknod "$base/dev/gpu$i" c 1 3; done # /dev/null's numbers
    fi
    # cred_expire: a requeued job waits for so long, 120 s by default.
    # preempt_send_user_signal: a preempted job gets the signal of its --signal before it is ended.
    cat >"$SLURM_CONF" <<CONF
ClusterName=mlm
SlurmctldHost=$(hostname -s)($subnet.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$base/munge/munge.socket,cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
PlugStackConfig=$base/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$subnet.1
AccountingStoragePort=$((port + 100))
AccountingStoragePass=$base/munge/munge.socket
AccountingStorageEnforce=associations
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=15
ReturnToService=2
$( ((gpus)) && echo GresTypes=gpu)
$(for ((i = 1; i <= nodes; i++)); do
        printf 'NodeName=node%d NodeHostname=node%d NodeAddr=%s Port=%d CPUs=%d RealMemory=4000%s State=UNKNOWN\n' \
            "$i" "$i" "$(address "$i")" "$((port + i))" "$cpus" "$gres"
    done)
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low   Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high  Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
    (umask 077 && cat >"$base/etc/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$base/munge/munge.socket
DbdHost=$(hostname -s)
DbdAddr=$subnet.1
DbdPort=$((port + 100))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PidFile=$base/run/slurmdbd.pid
LogFile=$base/log/slurmdbd.log
CONF
    : >"$base/etc/plugstack.conf"
    echo CgroupAutomount=no >"$base/etc/cgroup.conf"
    printf 'export CLUSTER_DIR=%q SLURM_CONF=%q\n' "$base" "$SLURM_CONF" >"$base/env.sh"
}

# soon COMMAND...: until it succeeds, 30 seconds at most.
soon() {
    local end=$((SECONDS + 30))
    until "$@" >>"$base/log/soon.log" 2>&1; do
        if ((SECONDS > end)); then return 1; fi
        sleep 0.1
    done
}

start_accounting() {
    mariadb-install-db --no-defaults --user=root --datadir="$base/sql" --skip-test-db \
        --auth-root-authentication-method=normal >"$base/log/sql.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$base/sql" --socket="$base/run/sql.socket" --skip-networking \
        --pid-file="$base/run/mariadbd.pid" --innodb-buffer-pool-size=64M >>"$base/log/sql.log" 2>&1 </dev/null &
    soon test -S "$base/run/sql.socket"
    MYSQL_UNIX_PORT=$base/run/sql.socket slurmdbd </dev/null
    soon sacctmgr --immediate add cluster mlm
    sacctmgr --immediate add account us Description=us Organization=us >&2
    sacctmgr --immediate add user root Account=us >&2
}

start_daemons() {
    local i
    (umask 077 && head -c 128 /dev/urandom >"$base/munge/munge.key")
    munged --key-file="$base/munge/munge.key" --socket="$base/munge/munge.socket" \
        --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" \
        --seed-file="$base/munge/munged.seed" --num-threads=2
    start_accounting
    slurmctld -c </dev/null
    for ((i = 1; i <= nodes; i++)); do on_node "node$i" slurmd -N "node$i" </dev/null; done
}

all_up() {
    [[ $(sinfo -h -N -p batch -t idle,alloc,mix -o %N 2>/dev/null | sort -u | wc -l) == "$nodes" ]]
}

[[ $(id -u) == 0 ]] || die "must be root"
if [[ ${1:-} == --node ]]; then
    on_node "$2" slurmd -N "$2" </dev/null
    exit
fi
install_slurm
"$here/cluster_down.sh"
mkdir -p "$base"/{etc,run,log,state,spool,dev,munge}
chmod 755 "$base" "$base/munge"
failed() {
    say "it did not start; its logs end:"
    tail -n 10 "$base"/log/*.log >&2 || true
    "$here/cluster_down.sh"
}
trap failed ERR
take_number
make_network
write_names
write_config
start_daemons
soon all_up
say "$(sinfo -h -p batch -o '%D nodes, %c CPUs and %G each')"

#!/usr/bin/env bash
# A real Slurm cluster with several nodes on one machine: slurmctld, slurmdbd, MariaDB, munge, a slurmd a node. Debian 12, root.
#
#   cluster.sh install             apt-get the packages (starts no service)
#   cluster.sh up|down|status      boot (3 s), stop, show
#   cluster.sh env                 print `export SLURM_CONF=...` for the caller's shell
#   cluster.sh exec CMD...         run CMD where Slurm's commands work (in NET=netns: on the control host)
#   cluster.sh sh NODE CMD...      run CMD inside a node
#   cluster.sh node-kill NODE      power a node off: slurmd, steps and tasks die at once; in NET=netns its network, too, so
#                                  that nobody hears of it
#   cluster.sh node-up NODE        power it on again
#
# CLUSTER_DIR  where everything of it lives, default .slurm-test in the repository's root. A short path: it has sockets.
# NET          loopback: nodes share the machine's network, node i is 127.A.B.(10+i). netns: each has its own network.
# NODES, CPUS, GPUS   nodes, and what each claims to have; the GPUs are null devices
# OWNER        a process; when it is gone the cluster goes down
# Partitions: main (default), high, and low and grace, which high preempts: without and with a time of grace (20 s).
#
# Each node has its own UTS, PID and mount namespace: hostname says the node's name, and one kill ends all that runs on it.
# It ends only processes that it started, by PID.
set -euo pipefail

SELF=$(readlink -f "${BASH_SOURCE[0]}")
ROOT=$(readlink -m "${CLUSTER_DIR:-$(dirname "$SELF")/../../.slurm-test}")
kept() { cat "$ROOT/$1" 2>/dev/null || echo "$2"; } # what `up` was told: FILE DEFAULT
NET=${NET:-$(kept net loopback)}
NODES=${NODES:-$(kept nodes 2)}
CPUS=${CPUS:-8} GPUS=${GPUS:-2}
PACKAGES=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core iproute2)
ETC=$ROOT/etc PIDS=$ROOT/pid LOG=$ROOT/log SPOOL=$ROOT/spool
export SLURM_CONF=$ETC/slurm.conf PATH=$PATH:/usr/sbin:/sbin

die() { echo "cluster.sh: $*" >&2; exit 1; }
live() { local s; s=$(sed 's/.*) //;s/ .*//' "/proc/$1/stat" 2>/dev/null) && [ "$s" != Z ]; } # a zombie is dead
child() { local children; children=$(cat "/proc/$1/task/$1/children" 2>/dev/null) || true; echo "${children%% *}"; }
nodes() { seq -f 'node%g' 1 "$NODES"; }
wait_for() { # SECONDS WHAT CMD...
  local tries=$(($1 * 20)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do tries=$((tries - 1)); ((tries > 0)) || die "no $what; see $LOG"; sleep 0.05; done
}

# ---- addresses. One number gives 32 ports below the ephemeral ones and 127.A.B: slurmctld and slurmd listen on all
# addresses (NoInAddrAny makes srun hang), so two clusters must differ in their ports too.
slot() { kept slot 0; }
port() { case $1 in ctl) echo $((10240 + 32 * $(slot))) ;; dbd) echo $((10241 + 32 * $(slot))) ;;
  node*) echo $((10241 + 32 * $(slot) + ${1#node})) ;; esac; }
addr() { # ctl | nodeN
  local net; [ "$NET" = netns ] && net=10.213.7 || net=127.$((1 + $(slot) / 256)).$(($(slot) % 256))
  [ "$1" = ctl ] && echo "$net.10" || echo "$net.$((10 + ${1#node}))"
}
choose_slot() { # the one of this folder's name, or the next whose ports are free
  local slot taken i
  slot=$(kept slot $(($(cksum <<<"$ROOT" | cut -d' ' -f1) % 640)))
  taken=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | sed -n 's/^ *[0-9]*: [0-9A-F]*:\([0-9A-F]*\) .*/\1/p' | sort -u)
  for ((i = 0; i < 640; i++, slot = (slot + 1) % 640)); do
    for p in $taken; do (((16#$p - 10240) / 32 == slot && 16#$p >= 10240)) && continue 2; done
    echo "$slot" >"$ROOT/slot"; return
  done
  die "no free ports"
}

# ---- hosts
spawn_host() { # HOST CMD...: run CMD as a host of its own
  local host=$1 network=(); shift
  [ "$NET" = netns ] && network=(nsenter "--net=/proc/$(cat "$PIDS/net-$host")/ns/net")
  # bash is PID 1 in there: it reaps orphans, and when it dies the kernel ends the rest
  # shellcheck disable=SC2016  # expanded inside
  setsid "${network[@]}" unshare --uts --pid --mount --propagation private --fork --kill-child --mount-proc \
    bash -c 'echo "$1" >/proc/sys/kernel/hostname; mount --bind "$2" /etc/hosts; shift 2
             "$@" & main=$!
             while kill -0 $main 2>/dev/null; do wait $main || true; done' \
    init "$host" "$ETC/hosts" "$@" >"$LOG/$host.out" 2>&1 </dev/null &
  echo $! >"$PIDS/$host"
}
link() { # NODE up|down
  [ "$NET" = loopback ] || nsenter -t "$(cat "$PIDS/net-$1")" -n ip link set eth0 "$2"
}
start_node() { mkdir -p "$SPOOL/$1"; spawn_host "$1" slurmd -D -N "$1" -f "$SLURM_CONF"; }
inside() { # HOST CMD...
  local unshare init; unshare=$(cat "$PIDS/$1"); shift
  init=$(child "$unshare")
  exec nsenter -t "$init" --uts --pid --mount --net -- env -C "$PWD" "$@"
}
client() { if [ "$NET" = netns ]; then (inside ctl "$@"); else "$@"; fi; }

net_up() { # a process holds each network namespace; nothing is made in the machine's own
  local host pid switch
  for host in switch ctl $(nodes); do
    setsid unshare --net sleep infinity >/dev/null 2>&1 </dev/null &
    echo $! >"$PIDS/net-$host"
  done
  for host in switch ctl $(nodes); do
    # shellcheck disable=SC2016  # expanded inside
    wait_for 5 "network of $host" bash -c '[ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]' \
      _ "$(cat "$PIDS/net-$host")"
  done
  switch=$(cat "$PIDS/net-switch")
  nsenter -t "$switch" -n sh -c 'ip link add br0 type bridge && ip link set br0 up && ip link set lo up'
  for host in ctl $(nodes); do
    pid=$(cat "$PIDS/net-$host")
    nsenter -t "$switch" -n ip link add "v-$host" type veth peer name eth0 netns "$pid"
    nsenter -t "$switch" -n sh -c "ip link set v-$host master br0 && ip link set v-$host up"
    nsenter -t "$pid" -n sh -c "ip link set lo up && ip addr add $(addr "$host")/24 dev eth0 && ip link set eth0 up"
  done
}

# ---- configuration
write_conf() {
  local host i
  head -c 1024 /dev/urandom >"$ETC/munge.key"; chmod 600 "$ETC/munge.key"
  { echo '127.0.0.1 localhost'; for host in ctl $(nodes); do echo "$(addr "$host") $host"; done; } >"$ETC/hosts"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl($(addr ctl))
SlurmctldPort=$(port ctl)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# cred_expire is also how long a requeued job waits before it starts again (120 s if not said)
AuthInfo=socket=$ROOT/munge/sock,cred_expire=5
StateSaveLocation=$SPOOL/ctl
SlurmdSpoolDir=$SPOOL/%n
SlurmctldPidFile=$SPOOL/slurmctld.pid
SlurmdPidFile=$SPOOL/slurmd-%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# with --signal and a time of grace, a preempted job gets the signal that it asked for
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$(addr ctl)
AccountingStoragePort=$(port dbd)
AccountingStoragePass=$ROOT/munge/sock
AccountingStorageTRES=gres/gpu
JobCompType=jobcomp/none
# what follows makes tests fast
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
KillWait=${KILL_WAIT:-4}
MinJobAge=600
InactiveLimit=0
WaitTime=0
$(for host in $(nodes); do
    echo "NodeName=$host NodeAddr=$(addr "$host") Port=$(port "$host") CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN"
  done)
PartitionName=main  Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=high  Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low   Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-20}
CONF
  # plain files, and a count without files, are refused
  for ((i = 0; i < GPUS; i++)); do [ -c "$ROOT/dev/gpu$i" ] || mknod "$ROOT/dev/gpu$i" c 1 3; done
  echo "Name=gpu File=$ROOT/dev/gpu[0-$((GPUS - 1))]" >"$ETC/gres.conf"
  cat >"$ETC/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/sock
DbdHost=ctl
DbdAddr=$(addr ctl)
DbdPort=$(port dbd)
SlurmUser=root
PidFile=$SPOOL/slurmdbd.pid
LogFile=$LOG/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$ETC/slurmdbd.conf"
}

# ---- the whole
up() {
  local program host
  [ "$(id -u)" = 0 ] || die "needs root"
  [ ! -s "$PIDS/ctl" ] || ! live "$(cat "$PIDS/ctl")" || die "already up"
  for program in munged slurmctld slurmd slurmdbd mariadbd mariadb nsenter ip; do
    command -v $program >/dev/null || die "no $program: run '$SELF install'"
  done
  rm -rf "$PIDS" "$SPOOL" "$LOG" "$ROOT/db" "$ROOT/munge"
  mkdir -p "$ETC" "$PIDS" "$LOG" "$SPOOL/ctl" "$ROOT/munge" "$ROOT/dev" "$ROOT/db/data"
  chmod 755 "$ROOT" "$ETC" "$ROOT/munge"
  chmod 700 "$ROOT/db" # the database has no passwords: only a socket in a folder of root's
  echo "$NET" >"$ROOT/net"; echo "$NODES" >"$ROOT/nodes"
  choose_slot
  write_conf
  trap '[ $? = 0 ] || down' EXIT # a failed boot leaves nothing running; its logs stay
  munged --foreground --force --num-threads=2 --key-file="$ETC/munge.key" --socket="$ROOT/munge/sock" \
    --pid-file="$PIDS/munged.pid" --log-file="$LOG/munged.log" --seed-file="$ROOT/munge/seed" >"$LOG/munged.out" 2>&1 </dev/null &
  echo $! >"$PIDS/munged"
  # an empty folder will do: mariadbd makes its own files
  mariadbd --no-defaults --user=root --datadir="$ROOT/db/data" --socket="$ROOT/db/sock" --skip-networking --skip-grant-tables \
    --pid-file="$PIDS/mariadbd.pid" --innodb-buffer-pool-size=32M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
    --innodb-flush-log-at-trx-commit=0 --performance-schema=0 --key-buffer-size=1M --max-connections=50 \
    >"$LOG/mariadbd.log" 2>&1 </dev/null &
  echo $! >"$PIDS/mariadbd"
  if [ "$NET" = netns ]; then net_up; fi
  wait_for 20 mariadbd mariadb --no-defaults -uroot -S "$ROOT/db/sock" -e 'select 1'
  wait_for 10 munged test -S "$ROOT/munge/sock"
  # slurmdbd must listen before slurmctld starts; it finds MariaDB's socket by MYSQL_UNIX_PORT
  # shellcheck disable=SC2016  # expanded inside
  spawn_host ctl bash -c '
    MYSQL_UNIX_PORT=$1 slurmdbd -D &
    for _ in $(seq 400); do (exec 3<>"/dev/tcp/$2/$3") 2>/dev/null && break; sleep 0.05; done
    exec slurmctld -D -f "$SLURM_CONF"' ctl "$ROOT/db/sock" "$(addr ctl)" "$(port dbd)"
  for host in $(nodes); do start_node "$host"; done
  wait_for 30 slurmctld client scontrol ping
  wait_for 30 "idle nodes" all_idle
  if [ -n "${OWNER:-}" ]; then watch_owner >/dev/null 2>&1 </dev/null & echo $! >"$PIDS/watch"; fi
}
all_idle() { [ "$(client sinfo -h -N -p main -t idle -o %N | wc -l)" = "$NODES" ]; }
watch_owner() { trap '' INT; while live "$OWNER"; do sleep 1; done; rm -f "$PIDS/watch"; down; }

stop() { # NAME [SIGNAL]: signal what `up` started and wait until it is gone
  local pid child tries; [ -s "$PIDS/$1" ] || return 0
  pid=$(cat "$PIDS/$1"); child=$(child "$pid") # a host's init: gone only when all in it is
  if live "$pid"; then kill "-${2:-TERM}" "$pid" 2>/dev/null || true; fi
  for ((tries = 400; tries > 0; tries--)); do live "$pid" || { [ -n "$child" ] && live "$child"; } || break; sleep 0.025; done
  ((tries > 0)) || kill -KILL "$pid" 2>/dev/null || true
  rm -f "$PIDS/$1"
}
down() {
  local host
  stop watch
  for host in $(nodes) ctl; do stop "$host" KILL; done
  stop mariadbd; stop munged
  for host in switch ctl $(nodes); do stop "net-$host" KILL; done
  rm -rf "$PIDS"
}
status() {
  local name
  for name in munged mariadbd ctl $(nodes); do
    if [ -s "$PIDS/$name" ] && live "$(cat "$PIDS/$name")"; then echo "$name: up"; else echo "$name: down"; fi
  done
  [ ! -s "$PIDS/ctl" ] || client sinfo -N -l
}

case ${1:-} in
  install) apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${PACKAGES[@]}" ;;
  up) up ;; down) down ;; status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  exec) shift; if [ "$NET" = netns ]; then inside ctl "$@"; else exec "$@"; fi ;;
  sh) shift; inside "$@" ;;
  node-kill) link "$2" down; stop "$2" KILL ;;
  node-up) link "$2" up; start_node "$2" ;;
  *) sed -n '2,21p' "$SELF"; exit 2 ;;
esac

#!/usr/bin/env bash
# sbatch [--nodes 4 --gpus-per-node 8 --time 8:00:00 ...] slurm/train.sh CONFIG [key=value ...]
#
# Runs one task a node, an agent that starts the node's processes. Before its time limit, and when it is
# preempted, the job saves, is requeued with the same id, and goes on by itself. Variables that may stand
# before `sbatch`:
#   SBATCH_SIGNAL=USR1@300   seconds before the time limit at which the job saves (here: 120)
#   QWENLORA_ENV=FILE        the site's set-up: modules, Python environment, container (default: env.sh beside this file)
#   QWENLORA=COMMAND         the qwenlora command (default: .venv/bin/qwenlora of the clone, else the one on the PATH)
#   QWENLORA_HOME=FOLDER     the folder of this file, where Slurm does not know it
#SBATCH --job-name=qwenlora
#SBATCH --nodes=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Tasks are srun's matter: with --ntasks-per-node here, Slurm would take the fewest of --nodes=2-4.
set -o pipefail # no -u: conda and modules, which env.sh sources, may use unset variables

if (($# == 0)); then
    echo "usage: sbatch [--nodes 4 --gpus-per-node 8 ...] slurm/train.sh CONFIG [key=value ...]" >&2
    exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: not in a Slurm job; start it with sbatch, or train on this machine: qwenlora train $1" >&2
    exit 2
fi

# Slurm runs a copy of this file; the job record has the path of the original
here=${QWENLORA_HOME:-}
if [[ -z $here ]]; then
    command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
    here=${command%%/train.sh*}
fi
if [[ ! -f $here/job.sh ]]; then
    echo "error: job.sh is not in '$here', where train.sh should be; set QWENLORA_HOME to the folder of train.sh" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"

lead=${SBATCH_SIGNAL:-USR1@120}
lead=${lead##*@}
[[ $lead =~ ^[0-9]+$ ]] || lead=60 # Slurm's default when only a signal is named
export QWENLORA_LEAD_S=$lead
job_begin "${QWENLORA_ENV:-$here/env.sh}"

command=${QWENLORA:-$here/../.venv/bin/qwenlora}
((${#container[@]})) || [[ -x $command ]] || command=${QWENLORA:-qwenlora}
if ! ((${#container[@]} + ${#srun_options[@]})) && ! command -v "$command" >/dev/null; then
    echo "error: no command '$command' on $(uname -n); activate its environment in ${QWENLORA_ENV:-$here/env.sh}," \
        "set QWENLORA to it, or run 'make train' in the clone first" >&2
    exit 2
fi

# The one task on a node gets all of the job's CPUs there, for its ranks to share. They are bound, where Slurm
# can, so that jobs on the same node keep apart.
cpu_bind=()
if scontrol show config | grep -Eq '^TaskPlugin +=.*(affinity|cgroup)'; then cpu_bind=(--cpu-bind=cores); fi
# Agents end each other; srun must not: when a node or an agent is lost, the others go on without it (--no-kill,
# --kill-on-bad-exit=0, --wait=0). The first agent ends those that hang after it.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --no-kill --kill-on-bad-exit=0 --wait=0 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" ${cpu_bind[@]+"${cpu_bind[@]}"} \
    ${srun_options[@]+"${srun_options[@]}"} ${container[@]+"${container[@]}"} "$command" train "$@"
job_end $?

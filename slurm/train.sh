#!/usr/bin/env bash
# One node: sbatch --gpus-per-node 8 --time 8:00:00 slurm/train.sh CONFIG [key=value ...]
# Run it from the clone's folder (or set QWENLORA to the qwenlora command). A minute and a half before the time limit the
# run is asked to stop: it saves, leaves with 75, and the same command goes on from there.
#SBATCH --job-name=qwenlora
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=USR1@90
#SBATCH --output=slurm-%j.out
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch [--gpus-per-node 8 ...] slurm/train.sh CONFIG [key=value ...]" >&2
    exit 2
fi
command=${QWENLORA:-.venv/bin/qwenlora}
if ! command -v "$command" >/dev/null; then
    echo "error: no $command in $PWD; run 'make train' there first, or set QWENLORA to the qwenlora command" >&2
    exit 2
fi
# all CPUs of the job for the one task, from which the ranks start
exec srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "$command" train "$@"

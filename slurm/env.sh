# shellcheck shell=bash
# The one place where a site sets up its jobs: sourced by the batch shell of every job, before srun. Copy it, and name
# the copy in QWENLORA_ENV (sbatch) or in a site file's env_file (qwenlora submit). What is exported here, ranks see.
#
# Modules, and a Python environment that all nodes see (its qwenlora is the one that runs):
#   module load cuda/12.8
#   source /shared/envs/qwenlora/bin/activate
#   source /shared/miniforge3/bin/activate qwenlora
#
# Several nodes with InfiniBand, the interface to meet on:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#
# A container (the command must exist in it; qwenlora submit names these in the site file: python, srun_args):
#   container=(apptainer exec --nv --bind /shared /shared/qwenlora.sif)            # Apptainer
#   srun_options=(--container-image=/shared/qwenlora.sqsh --container-mounts=/shared)   # Pyxis
#
# Keys come from the environment of who submits, or from a file that only they can read; never from here.

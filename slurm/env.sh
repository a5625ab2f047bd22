# shellcheck shell=bash
# A site's set-up of its jobs, and the only place for it: the batch shell of every job sources this file
# before srun. Copy it, and name the copy in QWENLORA_ENV (sbatch) or as env_file in a site file (qwenlora
# submit). Ranks get what is exported here.
#
# Modules, and a Python environment that all nodes see (its qwenlora is the one that runs):
#   module load cuda/12.8
#   source /shared/envs/qwenlora/bin/activate
#   source /shared/miniforge3/bin/activate qwenlora
#
# Several nodes with InfiniBand: the interface on which they meet:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#
# A container, as the project's apptainer.def makes one (the command must exist in it; for qwenlora submit, a
# site file has python and srun_args instead):
#   container=(apptainer exec --nv --bind /shared /shared/qwenlora.sif)            # Apptainer
#   srun_options=(--container-image=/shared/qwenlora.sqsh --container-mounts=/shared)   # Pyxis
#
# Keys do not belong here: they come from the submitter's environment, or from a file that only the submitter
# can read.

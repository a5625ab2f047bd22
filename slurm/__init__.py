"""The shell scripts that sbatch reads, and the questions that are put to Slurm (query.py)."""

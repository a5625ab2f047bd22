"""From a config to a job: what is refused, written and handed to Slurm."""

"""What sbatch reads."""

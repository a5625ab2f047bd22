"""qwenlora: LoRA fine-tuning of a Qwen, from one YAML file, on one GPU, one node or a Slurm cluster."""

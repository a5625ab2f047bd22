"""The training loop: transformers.Trainer with our order, evaluation, saving and resuming."""

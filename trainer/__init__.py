"""What every rank runs: model, strategy, training, metrics."""

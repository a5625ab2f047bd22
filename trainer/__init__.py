"""The code that every rank runs: model, strategy, training, metrics."""

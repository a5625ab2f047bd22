"""Files of rows become tokens on disk, in the order of training. Nothing here imports torch."""

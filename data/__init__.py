"""From files of rows to tokens on disk, and the order in which they are trained. Nothing here imports
torch."""

"""`qwenlora report` and `qwenlora export`: a run written up, an adapter made ready for others."""

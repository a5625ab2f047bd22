"""`qwenlora chat`."""

"""`qwenlora compare`."""

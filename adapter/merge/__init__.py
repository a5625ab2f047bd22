"""`qwenlora merge`."""

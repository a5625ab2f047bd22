"""The command line: each command checks its arguments, and calls the package that does the work."""

"""`python -m qwenlora`: the same as `qwenlora`."""

from qwenlora.cli.main import main

main()

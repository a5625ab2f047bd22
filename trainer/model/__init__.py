"""The model of a run: the base, its files, its adapter, and the embedded tiny one."""

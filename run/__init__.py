"""The run folder: its paths, its records and who may use it; what the agent and the ranks of an attempt
share."""

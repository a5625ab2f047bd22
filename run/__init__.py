"""The run folder: paths, records and lock; and values that the agent and the ranks of an attempt share."""

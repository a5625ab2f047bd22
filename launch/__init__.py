"""How processes start: the command line, and the agent that runs once a node."""

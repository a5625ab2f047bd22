"""The agent that ssh.py starts on another machine: `python -m qwenlora.launch.remote_agent`."""

import os
import sys

from qwenlora.launch.agent import run_follower
from qwenlora.launch.ssh import ASSIGNMENT, Assignment
from qwenlora.run.lossy_output import escape_what_the_terminal_lacks


def main() -> int:
    """Run this machine's part; return the exit code."""
    escape_what_the_terminal_lacks()
    assignment = Assignment.model_validate_json(os.environ.pop(ASSIGNMENT))
    return run_follower(assignment.config, assignment.allocation)


if __name__ == "__main__":
    sys.exit(main())

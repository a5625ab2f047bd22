"""What an agent passes on: to its ranks values in an environment variable, to its forkserver what to
start."""

import os
from dataclasses import dataclass

from pydantic import TypeAdapter

_VARIABLE = "QWENLORA_HANDOVER"


@dataclass(frozen=True)
class Handover:
    """The values for a rank. attempt: its number, 0 without an agent; resume: which checkpoint; allowed:
    config keys that may differ from earlier attempts; prepare_s: seconds of preparation; beats: the node's
    folder for signs of life (heartbeat.py), if any; only_check: do the checks before a start, then leave;
    screen: where rank 0 borrows the agent's screen (lent_screen.py), unless its own output is that; nohup:
    the agent ignores SIGHUP, and so do its ranks; memory: the node's files for snapshots (snapshots.py)."""

    attempt: int = 0
    resume: str = "auto"
    allowed: tuple[str, ...] = ()
    prepare_s: float = 0.0
    beats: str = ""
    only_check: bool = False
    screen: str = ""
    nohup: bool = False
    memory: tuple[str, ...] = ()

    @property
    def by_agent(self) -> bool:
        """Whether an agent started this process and looks after the run folder."""
        return self.attempt > 0 or self.only_check

    def environment(self) -> dict[str, str]:
        """Return the environment variables that carry this."""
        return {_VARIABLE: _JSON.dump_json(self).decode()}


@dataclass(frozen=True)
class Start:
    """What a forkserver is to start: processes of trainer/main.py. arguments: of each; log: a file, for what
    they write to standard error; variables: those of each, which its environment has besides the
    forkserver's."""

    arguments: list[str]
    log: str
    variables: list[dict[str, str]]

    @classmethod
    def parse(cls, line: bytes) -> "Start":
        """Return what a line of JSON holds."""
        return _START.validate_json(line)

    def line(self) -> bytes:
        """Return this as a line of JSON."""
        return _START.dump_json(self) + b"\n"


_JSON = TypeAdapter(Handover)
_START = TypeAdapter(Start)


def received() -> Handover:
    """Return the agent's values. Without an agent, QWENLORA_RESUME chooses a checkpoint."""
    if _VARIABLE not in os.environ:
        return Handover(resume=os.environ.get("QWENLORA_RESUME", "auto"))
    return _JSON.validate_json(os.environ[_VARIABLE])

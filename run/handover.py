"""The values that an agent passes to its ranks in an environment variable, and their defaults."""

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
    the agent ignores SIGHUP, and so do its ranks."""

    attempt: int = 0
    resume: str = "auto"
    allowed: tuple[str, ...] = ()
    prepare_s: float = 0.0
    beats: str = ""
    only_check: bool = False
    screen: str = ""
    nohup: bool = False

    @property
    def by_agent(self) -> bool:
        """Whether an agent started this process and looks after the run folder."""
        return self.attempt > 0 or self.only_check

    def environment(self) -> dict[str, str]:
        """Return the environment variables that carry this."""
        return {_VARIABLE: _JSON.dump_json(self).decode()}


_JSON = TypeAdapter(Handover)


def received() -> Handover:
    """Return the agent's values. Without an agent, QWENLORA_RESUME chooses a checkpoint."""
    if _VARIABLE not in os.environ:
        return Handover(resume=os.environ.get("QWENLORA_RESUME", "auto"))
    return _JSON.validate_json(os.environ[_VARIABLE])

"""What an agent tells its ranks, by way of the environment; and what a rank started by hand assumes
instead."""

import json
import os
from dataclasses import asdict, dataclass

_NAME = "QWENLORA_HANDOVER"


@dataclass(frozen=True)
class Handover:
    """attempt: its number, 0 without an agent; resume: which checkpoint; allowed: config keys that may differ
    from it.

    prepare_s: seconds that preparation took; beats: the node's folder for signs of life (heartbeat.py), if
    any;
    only_check: ranks check what they can before the start, and leave; screen: where rank 0 borrows the
    agent's screen (lent_screen.py), if its own standard output is not that.
    """

    attempt: int = 0
    resume: str = "auto"
    allowed: tuple[str, ...] = ()
    prepare_s: float = 0.0
    beats: str = ""
    only_check: bool = False
    screen: str = ""

    @property
    def by_agent(self) -> bool:
        """Whether an agent started this process and looks after the run folder."""
        return self.attempt > 0 or self.only_check

    def as_json(self) -> str:
        """Return this as text."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> "Handover":
        """Return what as_json wrote."""
        values = json.loads(text)
        return cls(**values | {"allowed": tuple(values["allowed"])})

    def environment(self) -> dict[str, str]:
        """Return the environment variables that carry this."""
        return {_NAME: self.as_json()}


def received() -> Handover:
    """Return what the agent said. By hand: QWENLORA_RESUME chooses a checkpoint."""
    if _NAME not in os.environ:
        return Handover(resume=os.environ.get("QWENLORA_RESUME", "auto"))
    return Handover.of_json(os.environ[_NAME])

"""What an agent tells its ranks, by way of the environment; and what a rank started by hand assumes instead."""

import json
import os
from dataclasses import asdict, dataclass

_NAME = "QWENLORA_HANDOVER"


@dataclass(frozen=True)
class Handover:
    """attempt: its number, 0 without an agent; resume: which checkpoint; allowed: config keys that may differ from it.

    prepare_s: seconds that preparation took.
    """

    attempt: int = 0
    resume: str = "auto"
    allowed: tuple[str, ...] = ()
    prepare_s: float = 0.0

    @property
    def by_agent(self) -> bool:
        """Whether an agent started this process and looks after the run folder."""
        return self.attempt > 0

    def environment(self) -> dict[str, str]:
        """Return the environment variables that carry this."""
        return {_NAME: json.dumps(asdict(self))}


def received() -> Handover:
    """Return what the agent said. By hand: QWENLORA_RESUME chooses a checkpoint."""
    if _NAME not in os.environ:
        return Handover(resume=os.environ.get("QWENLORA_RESUME", "auto"))
    values = json.loads(os.environ[_NAME])
    return Handover(**values | {"allowed": tuple(values["allowed"])})

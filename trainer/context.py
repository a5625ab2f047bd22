"""The facts that all stages of an attempt share."""

from dataclasses import dataclass

from qwenlora.run.checkpoints import Chosen
from qwenlora.run.heartbeat import Heart
from qwenlora.run.records import Facts, Identity, State
from qwenlora.trainer.process import Process
from qwenlora.trainer.ranks.stop import Stop
from qwenlora.trainer.record.chronicle import Chronicle


@dataclass(frozen=True)
class Context:
    """One rank's view. identity: of the checkpoints that it writes; chosen: the checkpoint to resume from, if
    any; before: its state; chronicle: None except on rank 0."""

    process: Process
    heart: Heart
    facts: Facts
    identity: Identity
    stop: Stop
    chronicle: Chronicle | None
    chosen: Chosen
    before: State | None

    @property
    def step(self) -> int:
        """The last step that is trained, 0 before any."""
        return self.before.step if self.before else 0

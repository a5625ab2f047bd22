"""The records of one attempt on rank 0, from its start to its end."""

from dataclasses import dataclass

from qwenlora.run.records import Facts, Reason
from qwenlora.trainer.process import Process
from qwenlora.trainer.record import wandb_run
from qwenlora.trainer.record.chronicle import Chronicle
from qwenlora.trainer.record.metrics import MetricsFile
from qwenlora.trainer.record.progress import ProgressCallback
from qwenlora.trainer.record.wandb_run import WandbCallback


@dataclass(frozen=True)
class Recording:
    """Writes, sends and shows numbers. wandb: None when W&B is off; wandb_place: where its run is seen."""

    chronicle: Chronicle
    metrics: MetricsFile
    progress: ProgressCallback
    wandb: WandbCallback | None
    wandb_place: str

    @classmethod
    def start(cls, process: Process, facts: Facts, chronicle: Chronicle) -> "Recording":
        """Start W&B, if it is on, and the other records."""
        run, warn = process.run, process.warn
        wandb, place = wandb_run.start(process.config, run, facts, warn)
        return cls(chronicle, MetricsFile(run.metrics, warn), ProgressCallback(process.console), wandb, place)

    def send(self, values: dict[str, float]) -> None:
        """Send numbers to W&B, if it is on."""
        if self.wandb:
            self.wandb.send(values)

    def go_back_to(self, step: int, *, evaluation_too: bool) -> None:
        """Forget the records after a step, and send W&B again what killed attempts may not have sent.
        evaluation_too: forget the step's own evaluation, which will be repeated."""
        self.metrics.forget_after(step, evaluation_too=evaluation_too)
        lost = self.chronicle.run.history.first_step_of_the_killed()
        if self.wandb and lost:
            self.wandb.send_again(self.metrics.since(lost))

    def close(self, reason: Reason) -> None:
        """Write and send what waits. reason: how the attempt ended."""
        self.metrics.close()
        if self.wandb:
            self.wandb.summarize(self.chronicle.summary(reason))
            self.wandb.finish(exit_code=1 if reason == "failed" else 0)

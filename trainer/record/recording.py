"""The records of one attempt on rank 0, from its start to its end."""

from dataclasses import dataclass

from qwenlora.configs.schema import TrackerName
from qwenlora.run.records import Facts, Reason
from qwenlora.trainer.process import Process
from qwenlora.trainer.record.chronicle import Chronicle
from qwenlora.trainer.record.metrics import MetricsFile
from qwenlora.trainer.record.progress import ProgressCallback
from qwenlora.trainer.record.tracker_libraries import MLflow, SwanLab, TensorBoard, Trackio
from qwenlora.trainer.record.trackers import Trackers
from qwenlora.trainer.record.wandb_run import WandbTracker

KINDS: dict[TrackerName, type[WandbTracker | TensorBoard | MLflow | SwanLab | Trackio]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


@dataclass(frozen=True)
class Recording:
    """Writes, sends and shows numbers."""

    chronicle: Chronicle
    metrics: MetricsFile
    progress: ProgressCallback
    trackers: Trackers

    @classmethod
    def start(cls, process: Process, facts: Facts, chronicle: Chronicle) -> "Recording":
        """Start the trackers that log.to names, and the other records."""
        config, run, warn = process.config, process.run, process.warn
        trackers = Trackers([KINDS[name](config, run, warn) for name in dict.fromkeys(config.log.to)], warn)
        sizes = {
            f"data/{side}_{name}": count
            for side, counts in facts.data.items()
            for name, count in (("rows", counts.rows), ("tokens", counts.tokens))
        }
        trackers.summarize({"data/bad_rows": facts.bad_rows, **sizes})
        return cls(chronicle, MetricsFile(run.metrics, warn), ProgressCallback(process.console), trackers)

    def go_back_to(self, step: int, *, evaluation_too: bool) -> None:
        """Forget the records after a step, and send trackers again what killed attempts may not have sent.
        evaluation_too: forget the step's own evaluation, which will be repeated."""
        self.metrics.forget_after(step, evaluation_too=evaluation_too)
        lost = self.chronicle.run.history.first_step_of_the_killed()
        first = min(step + 1 - evaluation_too, lost or step + 1)
        self.trackers.go_back_to(step, list(self.metrics.since(first)))

    def close(self, reason: Reason) -> None:
        """Write and send what waits. reason: how the attempt ended."""
        self.metrics.close()
        self.trackers.summarize(self.chronicle.summary(reason))
        self.trackers.finish(failed=reason == "failed")

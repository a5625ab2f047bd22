"""TensorBoard, MLflow, SwanLab and trackio, through their own writers. They keep their files in the run
folder, unless their own variables (MLFLOW_TRACKING_URI, SWANLAB_MODE, TRACKIO_DIR ...) say otherwise; keys
come from their variables or logins."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qwenlora.configs import Config
from qwenlora.configs.keys import flat
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import as_yaml
from qwenlora.trainer.record.metrics import Line
from qwenlora.trainer.record.trackers import keep_id, known_id, named, reach, reason, without_password

PROJECT = "qwenlora"
_LOSSES = ("train/loss", "eval/loss")  # those of a step that is trained again are the same
_LONGEST_PARAM = 6000  # characters that MLflow takes
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # that it takes at once
_AGAIN_S = 300.0  # between two tries: each may take twenty seconds


class _Library(ABC):
    """What the four have in common. The run's id there is kept in the run folder."""

    name: str

    def __init__(self, config: Config, run: RunFolder, warn: Callable[[str], None]) -> None:
        self.config, self.run, self.warn = config, run, warn
        self.folder = run.tracked(self.name)
        self.id_file = self.folder / "run_id"

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at a step."""

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Send these lines once more."""
        for line in lines:
            self.log(int(line["step"]), named(line))

    def summarize(self, values: Mapping[str, object]) -> None:  # noqa: B027
        """Do nothing: only W&B shows such a summary."""


class TensorBoard(_Library):
    """Event files; those of an attempt hide the later steps of the attempts before it."""

    name, title = "tensorboard", "TensorBoard"

    def start(self) -> str:
        """Load the writer; the files are made when it is known from which step training goes on."""
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[..., Any] = SummaryWriter
        return f"tensorboard --logdir {os.path.relpath(self.run.path)}"

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Hide what is after the step, and what the lines repeat."""
        first = min([step + 1, *(int(line["step"]) for line in lines)])
        self._writer = self._open(str(self.folder), purge_step=first, flush_secs=10)
        super().go_back_to(step, lines)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, *, failed: bool) -> None:
        """Write what waits."""
        self._writer.close()


class _OncePerStep(_Library):
    """A store that forgets nothing: what it has already of a step that is trained again is not sent twice."""

    def __init__(self, config: Config, run: RunFolder, warn: Callable[[str], None]) -> None:
        super().__init__(config, run, warn)
        self._has: set[tuple[int, str, float]] = set()  # steps and losses

    @abstractmethod
    def losses_of(self, name: str) -> Iterable[tuple[int, float]]:
        """Return the steps and values that the store has under a name."""

    @abstractmethod
    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers that the store does not have."""

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Look at what the store has, and send of the lines what it lacks."""
        self._has = {(at, name, value) for name in _LOSSES for at, value in self.losses_of(name)}
        super().go_back_to(step, lines)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers, unless the store has the losses among them."""
        losses = {(step, name, values[name]) for name in _LOSSES if name in values}
        if not losses or losses - self._has:
            self.send(step, values)


class MLflow(_OncePerStep):
    """A run on the tracking server, or in a database in the run folder. The library sends at once, and what a
    server did not take it forgets: so numbers wait here while there is no answer."""

    name, title = "mlflow", "MLflow"

    def __init__(self, config: Config, run: RunFolder, warn: Callable[[str], None]) -> None:
        super().__init__(config, run, warn)
        self._waiting: list[Any] = []  # mlflow's Metrics
        self._again_at = 0.0  # in seconds of the monotonic clock
        self._warned = False

    def start(self) -> str:
        """Go on with the run, or make it; its parameters are the config."""
        # an outage must not hold training up for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.folder.mkdir(exist_ok=True)
        ours = f"sqlite:///{self.folder / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", ours)
        self._client = MlflowClient(uri)
        self._id = known_id(self.id_file)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = self._experiment(str(self.folder / "artifacts") if uri == ours else None)
            self._id = self._client.create_run(experiment, run_name=self.run.path.name).info.run_id
            params = [Param(key, as_yaml(value)[:_LONGEST_PARAM]) for key, value in flat(self.config).items()]
            for first in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])
            keep_id(self.id_file, self._id)
        return f"run {self._id} in {without_password(uri)}"

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name, artifacts))

    def losses_of(self, name: str) -> Iterable[tuple[int, float]]:
        """Return what the run has under a name."""
        return [(metric.step, metric.value) for metric in self._client.get_metric_history(self._id, name)]

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() < self._again_at:
            return
        try:
            self._flush()
        except Exception as error:  # whatever the library raises
            self._again_at = time.monotonic() + _AGAIN_S
            if not self._warned:
                self.warn(f"MLflow does not answer ({reason(error)}): its numbers wait, training goes on")
            self._warned = True

    def _flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, self._waiting[:_MOST_METRICS])
            del self._waiting[:_MOST_METRICS]

    def finish(self, *, failed: bool) -> None:
        """Send what waits, and end the run."""
        self._flush()
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class SwanLab(_Library):
    """SwanLab's run; online after `swanlab login`, else offline. It takes each step once by itself."""

    name, title = "swanlab", "SwanLab"

    def start(self) -> str:
        """Go on with the run, or make it; offline each attempt has a folder of its own, under one id."""
        import swanlab

        theirs = swanlab.Settings()
        mode = theirs.mode if "mode" in theirs.model_fields_set else "online" if theirs.api_key else "offline"
        if mode == "online":
            try:
                reach(theirs.api_host)
            except OSError as error:
                mode = "offline"
                self.warn(
                    f"SwanLab cannot be used ({error}): this attempt is kept on disk; `swanlab sync` sends it"
                )
        self._run = swanlab.init(
            mode=mode,
            project=theirs.project.name or PROJECT,
            name=theirs.experiment.name or self.run.path.name,
            id=keep_id(self.id_file),
            resume="allow",
            log_dir=str(self.folder),
            config=self.config.model_dump(mode="json", by_alias=True),
            settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}),
        )
        return f"{mode}, in {self.folder}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at a step."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """Close the run."""
        self._run.finish("crashed" if failed else "success")


class Trackio(_OncePerStep):
    """trackio's run, in a database in the run folder, or where its variables say."""

    name, title = "trackio", "trackio"

    def start(self) -> str:
        """Go on with the run, or make it."""
        os.environ.setdefault("TRACKIO_DIR", str(self.folder))  # read at import
        import trackio

        # its runs are found by their names, which two run folders may share
        self._name = f"{self.run.path.name}-{keep_id(self.id_file)}"
        self._run = trackio.init(
            PROJECT,
            name=self._name,
            resume="allow",
            config=self.config.model_dump(mode="json", by_alias=True),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"{self._name}, in {os.environ['TRACKIO_DIR']}"

    def losses_of(self, name: str) -> Iterable[tuple[int, float]]:
        """Return what the run has under a name; nothing where it is kept elsewhere."""
        from trackio.sqlite_storage import SQLiteStorage

        lines = SQLiteStorage.get_logs(PROJECT, self._name)
        return [(int(line["step"]), float(line[name])) for line in lines if name in line]

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at a step."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """Write what waits."""
        self._run.finish()

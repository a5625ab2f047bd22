"""What the trackers of log.to hold of a run, read back by their own libraries: [(step, train/loss)]."""

import os
from collections.abc import Iterator
from pathlib import Path

from qwenlora.run.folder import RunFolder

Losses = list[tuple[int, float]]
NAME = "train/loss"


def tensorboard(run: RunFolder) -> Losses:
    """Return what TensorBoard shows: not what a later attempt has hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.tracked("tensorboard")), {"scalars": 0})
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(NAME)]


def mlflow(run: RunFolder) -> Losses:
    """Return the history of the one run of the database. It must be over."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.tracked('mlflow') / 'mlflow.db'}")
    ((experiment,),) = [[each for each in client.search_experiments() if each.name == "qwenlora"]]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.path.name
    assert found.data.params["lora.lora_dropout"] == "0.1"
    return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, NAME)]


def swanlab(run: RunFolder) -> Losses:
    """Return what all attempts wrote under the run's one id; a step that several wrote counts once, as on
    SwanLab's server."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    folder = run.tracked("swanlab")
    files = sorted(folder.glob("run-*/run-*.swanlab"))
    assert {file.stem for file in files} == {f"run-{(folder / 'run_id').read_text()}"}

    def records(file: Path) -> Iterator[Record]:
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record()
            record.ParseFromString(data)
            yield record

    begun = [file for file in files if file.stat().st_size]  # one of a killed attempt may be empty
    scalars = [record.scalar for file in begun for record in records(file)]
    return list(dict.fromkeys((one.step, one.value.number) for one in scalars if one.key == NAME))


def trackio(run: RunFolder) -> Losses:
    """Return the history of the one run of the database."""
    os.environ["TRACKIO_DIR"] = str(run.tracked("trackio"))  # read at import
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = Api().runs("qwenlora")
    lines = SQLiteStorage.get_logs("qwenlora", found.name)
    return [(line["step"], line[NAME]) for line in lines if NAME in line]

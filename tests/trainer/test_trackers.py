"""Whatever a tracker of log.to does, training goes on, and the user is told once."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from qwenlora.configs import load_config
from qwenlora.configs.schema import Config, Data, Log, Model
from qwenlora.launch.refusals import check_start
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record.tracker_libraries import MLflow, SwanLab
from qwenlora.trainer.record.trackers import Trackers, Unused

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


class Fake:
    """A tracker that fails in one of its methods."""

    title = "Fake"

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def _called(self, name: str, *given: object) -> None:
        self.calls.append((name, *given))
        if name == self.fails:
            raise RuntimeError("no\nanswer from http://me:geheim@host/x")

    def start(self) -> str:
        self._called("start")
        return "there"

    def log(self, step, values) -> None:
        self._called("log", step, values)

    def go_back_to(self, step, lines) -> None:
        self._called("go_back_to", step, lines)

    def summarize(self, values) -> None:
        self._called("summarize", values)

    def finish(self, *, failed) -> None:
        self._called("finish", failed)


def lived(trackers: Trackers) -> None:
    """Call all that a run calls."""
    trackers.go_back_to(3, [])
    for step in (4, 5):
        trackers.on_log(
            None, TrainerState(global_step=step), TrainerControl(), {"loss": 1.0, "eval_loss": 2.0}
        )
    trackers.summarize({"a": 1})
    trackers.finish(failed=False)


@pytest.mark.parametrize("fails", ["start", "go_back_to", "log", "summarize", "finish"])
def test_a_tracker_that_raises_is_left_out_with_one_warning(fails):
    warned = []
    broken, other = Fake(fails), Fake()
    other.title = "Other"
    trackers = Trackers([broken, other], warned.append)
    lived(trackers)
    assert broken.calls[-1][0] == fails, "nothing is asked of it any more"
    assert [call[0] for call in other.calls] == ["start", "go_back_to", "log", "log", "summarize", "finish"]
    assert other.calls[2] == ("log", 4, {"train/loss": 1.0, "eval/loss": 2.0})
    (line,) = warned
    assert line.startswith("Fake ")
    assert "(no answer from http://host/x)" in line
    assert trackers.places == {"Fake": "off" if fails == "start" else "there", "Other": "there"}


def test_a_tracker_that_is_off_says_why():
    class Off(Fake):
        def start(self) -> str:
            raise Unused("no key")

    trackers = Trackers([off := Off()], pytest.fail)
    lived(trackers)
    assert (trackers.places, off.calls) == ({"Fake": "off (no key)"}, [])


def test_a_library_that_is_missing_is_refused_before_the_start(monkeypatch):
    config = load_config(TINY, ["log.to=[wandb,mlflow]"])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "qwenlora.launch.refusals.find_spec", lambda name: None if name == "mlflow" else found(name)
    )
    with pytest.raises(ValueError, match=r"^log.to=mlflow needs .*: pip install 'qwenlora\[mlflow\]', or"):
        check_start(config)


class Server:
    """mlflow's client, as far as it is asked. down: whether it answers."""

    down = True

    def __init__(self) -> None:
        self.metrics, self.ended = [], ""

    def log_batch(self, run_id, metrics) -> None:
        if self.down:
            raise OSError("no answer")
        assert len(metrics) <= 1000
        self.metrics += [(metric.key, metric.step, metric.value) for metric in metrics]

    def get_metric_history(self, run_id, name) -> list:
        return [] if self.down else [SimpleNamespace(step=1, value=0.5)] * (name == "train/loss")

    def set_terminated(self, run_id, status) -> None:
        self.ended = status


@pytest.fixture
def mlflow(tmp_path):
    """MLflow's tracker before a server that does not answer, and what it warns of."""
    warned = []
    config = Config(run_dir="my", model=Model(name_or_path="tiny"), data=Data(train="example"))
    tracker = MLflow(config, RunFolder(tmp_path), warned.append)
    tracker._client, tracker._id = Server(), "the-run"
    return tracker, tracker._client, warned


def test_numbers_wait_while_mlflow_does_not_answer(mlflow):
    tracker, server, warned = mlflow
    tracker.log(2, {"train/loss": 0.25})
    server.down = False
    tracker.log(3, {"train/loss": 0.125})
    assert server.metrics == [], "it is not asked at each step"
    tracker._again_at = 0.0
    tracker.log(4, {f"train/{number}": 1.0 for number in range(1500)})
    assert server.metrics[:2] == [("train/loss", 2, 0.25), ("train/loss", 3, 0.125)]
    assert len(server.metrics) == 1502
    assert warned == ["MLflow does not answer (no answer): its numbers wait, training goes on"]
    tracker.finish(failed=True)
    assert server.ended == "FAILED"


def test_numbers_that_wait_are_sent_at_the_end(mlflow):
    tracker, server, _ = mlflow
    tracker.log(2, {"train/loss": 0.25})
    with pytest.raises(OSError, match="no answer"):
        tracker.finish(failed=False)
    server.down = False
    tracker.finish(failed=False)
    assert (server.metrics, server.ended) == ([("train/loss", 2, 0.25)], "FINISHED")


def test_a_step_that_mlflow_has_is_sent_again_only_with_another_loss(mlflow):
    tracker, server, _ = mlflow
    server.down = False
    tracker.go_back_to(0, [{"step": 1, "loss": 0.5, "time": 1.0, "tokens_per_s": 3.0}])
    assert server.metrics == []
    tracker.log(1, {"train/loss": 0.75})
    tracker.log(2, {"train/loss": 0.5})
    tracker.log(1, {"attempt/number": 2.0})
    assert server.metrics == [("train/loss", 1, 0.75), ("train/loss", 2, 0.5), ("attempt/number", 1, 2.0)]


def test_swanlab_without_its_server_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "0" * 20)
    monkeypatch.setenv("SWANLAB_API_HOST", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    config = Config(
        run_dir="my", model=Model(name_or_path="tiny"), data=Data(train="example"), log=Log(to=["swanlab"])
    )
    run, warned = RunFolder("my"), []
    run.path.mkdir()
    trackers = Trackers([SwanLab(config, run, warned.append)], warned.append)
    lived(trackers)
    assert trackers.places["SwanLab"].startswith("offline, in ")
    (line,) = warned
    assert "no answer from http://127.0.0.1:9" in line
    (file,) = run.tracked("swanlab").glob("run-*/run-*.swanlab")
    assert b"0" * 20 not in file.read_bytes()

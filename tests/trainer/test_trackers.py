"""Whatever a tracker of log.to does, training goes on, and the user is told once."""

import importlib.util
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from qwenlora.configs import load_config
from qwenlora.configs.schema import Config, Data, Log, Model
from qwenlora.launch.refusals import check_start
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record.tracker_libraries import SwanLab
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
            raise RuntimeError("no\nanswer")

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
    assert "(no answer)" in line
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

"""Which way a process takes, by who started it and for what; what it imports; and what a refusal leaves."""

import os
import subprocess
import sys

import pytest
from rich.console import Console

from qwenlora.run.folder import PREPARE_ONLY, RunFolder
from qwenlora.run.handover import Handover
from qwenlora.trainer import main as module
from qwenlora.trainer.main import main


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts main in this process, whose screen and signals stay as they are."""
    (tmp_path / "my.yaml").write_text("model: {name_or_path: tiny}\ndata: {train: example}\n")
    calls = []
    monkeypatch.setattr("qwenlora.trainer.process.take_screen", lambda *_, **__: Console(quiet=True))
    monkeypatch.setattr("qwenlora.trainer.process.faulthandler.register", lambda *_, **__: None)
    monkeypatch.setattr(module, "die_with_parent", lambda: calls.append("die with the agent"))
    monkeypatch.setattr(module.StopRequest, "listen", lambda _, nohup: calls.append("listen"))
    monkeypatch.setattr("qwenlora.trainer.ranks.rendezvous.meet", lambda *_: calls.append("meet"))

    def start(*arguments, rank=0, handover=None):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name, value in (handover.environment() if handover else {}).items():
            monkeypatch.setenv(name, value)
        return main([str(tmp_path / "my.yaml"), f"run_dir={tmp_path / 'run'}", *arguments])

    start.calls = calls
    return start


@pytest.mark.parametrize(
    ("arguments", "rank", "handover", "expected"),
    [
        ([PREPARE_ONLY], 0, Handover(attempt=3), ["die with the agent", "_prepare prepare 3"]),
        ([], 1, Handover(attempt=3), ["listen", "die with the agent", "_train rank-1 3"]),
        ([], 1, Handover(only_check=True), ["listen", "die with the agent", "_check_only rank-1 0"]),
        ([], 0, None, ["listen", "_prepare_and_train rank-0 1"]),
        ([], 1, None, ["listen", "meet", "_train rank-1 0"]),
    ],
)
def test_a_process_takes_one_way(start, monkeypatch, arguments, rank, handover, expected):
    for way in ("_prepare", "_train", "_check_only", "_prepare_and_train"):

        def work(process, way=way):
            start.calls.append(f"{way} {process.name} {process.attempt}")
            return 0

        monkeypatch.setattr(module, way, work)
    assert start(*arguments, rank=rank, handover=handover) == 0
    assert start.calls == expected


def test_a_refusal_without_an_agent_leaves_the_run_as_it_was(start, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("these rows cannot be trained")

    monkeypatch.setattr("qwenlora.trainer.prepare.prepare", lambda *_: None)
    monkeypatch.setattr(module, "_train", lambda _: 0)
    assert start() == 0
    run = RunFolder(tmp_path / "run")
    run.metrics.touch()  # as a run has that was trained
    before = run.config.read_text()
    monkeypatch.setattr("qwenlora.trainer.prepare.prepare", refuse)
    assert start("train.max_steps=9") == 2
    assert run.config.read_text() == before
    assert run.history.attempts()[-1].reason == "refused"
    (error,) = run.errors(2)
    assert (error.process, error.message, error.ours) == ("rank-0", "these rows cannot be trained", False)


# a process that was forked from an agent's forkserver, and prepares and trains. It is a rank alone: DDP would
# copy the base, to send it to nobody
FORKED = """
import sys
from qwenlora.trainer import forkserver
from qwenlora.trainer.main import main
forkserver._import_libraries()
import torch
torch.nn.parallel.DistributedDataParallel.__init__ = None
assert main([*sys.argv[1:], "run_dir=run", "train.max_steps=1"], captured=False) == 0
print("imported:", *{"bitsandbytes", "datasets", "deepspeed", "mlflow", "pandas", "wandb"} & {*sys.modules})
"""


@pytest.mark.slow
def test_a_rank_alone_needs_no_ddp_and_imports_no_library_that_it_does_not_need(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name_or_path: tiny}\ndata: {train: example}\n")
    command = [sys.executable, "-c", FORKED, "my.yaml", "log.wandb=off"]
    alone = os.environ | dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0") | {"WORLD_SIZE": "1"}
    alone["MASTER_ADDR"] = "127.0.0.1"
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "imported:"

"""W&B is on where the user wants it, and its failures never stop training."""

import json
import socket
import time

import pytest

from qwenlora.configs.schema import Config, Data, Log, Model
from qwenlora.trainer.record.wandb_run import mode_of

CONFIG = Config(run_dir="unused", model=Model(name_or_path="tiny"), data=Data(train="example"))


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "off"),
        ({"WANDB_API_KEY": "x" * 40}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "x" * 40}, "off"),
    ],
)
def test_auto_follows_the_environment(monkeypatch, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of(CONFIG)[0] == mode


def test_a_login_in_netrc_counts(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode_of(CONFIG)[0] == "online"


def test_the_config_decides_when_it_says_so(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode_of(CONFIG.model_copy(update={"log": Log(wandb="off")}))[0] == "off"


@pytest.mark.slow
def test_an_unreachable_server_costs_seconds_and_one_warning(qwenlora, tmp_path):
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        key = "0123456789abcdef0123456789abcdef01234567"
        (tmp_path / "my.yaml").write_text(
            "model: {name_or_path: tiny}\ndata: {train: example}\ntrain: {max_steps: 3, save_strategy:"
            " 'no'}\n"
        )
        start = time.monotonic()
        answer = qwenlora(
            "train",
            "my.yaml",
            "run_dir=run",
            WANDB_BASE_URL=f"http://127.0.0.1:{closed.getsockname()[1]}",
            WANDB_API_KEY=key,
        )
    seconds = time.monotonic() - start
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.count("warning:") == 1, answer.stdout
    assert "warning: W&B cannot be used (no answer from http://127.0.0.1:" in answer.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")), "it is kept on disk"
    assert seconds < 85  # W&B itself would have tried for 90
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), f"{path} holds the key"

"""W&B is on where the user wants it, and its failures never stop training."""

import json
import os
import socket
import sys
import time

import pytest
import wandb
from click.testing import CliRunner
from wandb.cli.cli import cli

from qwenlora.configs.schema import Config, Data, Log, Model
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record.trackers import Trackers
from qwenlora.trainer.record.wandb_choice import choose
from qwenlora.trainer.record.wandb_run import WandbTracker

KEY = ("0123456789abcdef" * 3)[:40]


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """W&B's settings and netrc are the test's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")  # else a login asks the server who it is
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def chosen(monkeypatch=None, environment=None, **log):
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    config = Config(
        run_dir="runs/my", model=Model(name_or_path="tiny"), data=Data(train="example"), log=Log(**log)
    )
    return choose(config, RunFolder(config.run_dir))


@pytest.mark.parametrize(
    ("environment", "mode", "why"),
    [
        ({}, "off", "no W&B key: `wandb login`, or log.wandb=offline"),
        ({"WANDB_API_KEY": KEY}, "online", "logged in"),
        ({"WANDB_API_KEY": "too-short"}, "online", "logged in"),  # the start says what is wrong with it
        ({"WANDB_MODE": "offline"}, "offline", "WANDB_MODE=offline"),
        ({"WANDB_MODE": "dryrun"}, "offline", "WANDB_MODE=dryrun"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "off", "WANDB_MODE=disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, "off", "WANDB_DISABLED=true"),
        ({"WANDB_DISABLED": "false", "WANDB_API_KEY": KEY}, "online", "logged in"),
    ],
)
def test_auto_follows_the_variables(monkeypatch, environment, mode, why):
    assert chosen(monkeypatch, environment)[:2] == (mode, why)


def test_wandb_is_not_imported_where_nothing_of_it_is_set_up(monkeypatch, tmp_path):
    for name in ("WANDB_CONFIG_DIR", "NETRC", "WANDB_SILENT"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    assert chosen()[:2] == ("off", "no W&B key: `wandb login`, or log.wandb=offline")


@pytest.mark.parametrize(
    "file", ["home/.netrc", "home/_netrc", "home/.config/wandb/settings", "wandb/settings"]
)
def test_wandb_is_asked_where_a_file_of_it_exists(monkeypatch, tmp_path, file):
    for name in ("WANDB_CONFIG_DIR", "NETRC", "WANDB_SILENT"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    login, settings = f"machine api.wandb.ai login user password {KEY}\n", "[default]\nmode = offline\n"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(settings if file.endswith("settings") else login)
    (tmp_path / file).chmod(0o600)
    assert chosen().mode == ("offline" if file.endswith("settings") else "online")


@pytest.mark.parametrize("server", [None, "https://wandb.example.org"])
def test_a_login_counts_whatever_host_wandb_writes_into_netrc(tmp_path, server):
    wandb.login(key=KEY, host=server, verify=False)
    wandb.teardown()
    assert KEY in (tmp_path / "netrc").read_text()
    choice = chosen()
    assert (choice.mode, choice.why) == ("online", "logged in")
    assert choice.server == server or server is None


def test_a_key_for_another_server_is_no_login(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert chosen().mode == "off"


@pytest.mark.parametrize(
    ("command", "mode"), [("offline", "offline"), ("disabled", "off"), ("enabled", "online")]
)
def test_the_modes_that_wandbs_commands_set_are_heeded(monkeypatch, command, mode):
    assert CliRunner().invoke(cli, [command]).exit_code == 0
    wandb.teardown()
    assert chosen(monkeypatch, {"WANDB_API_KEY": KEY}).mode == mode


NAMES = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "their-name", "WANDB_RUN_ID": "abc123"}


def test_wandbs_names_and_folder_are_heeded(monkeypatch, tmp_path):
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "elsewhere"), **NAMES}
    choice = chosen(monkeypatch, environment)
    assert choice.project == "theirs"
    assert choice.name == "their-name"
    assert choice.id == "abc123"
    assert choice.folder == str(tmp_path / "elsewhere")


def test_without_names_the_runs_own_are_used(tmp_path):
    choice = chosen(wandb="offline")
    assert (choice.project, choice.name, choice.folder) == ("qwenlora", "my", str(tmp_path / "runs" / "my"))


@pytest.mark.parametrize(
    ("environment", "log", "mode", "why"),
    [
        ({"WANDB_API_KEY": KEY}, {"wandb": "off"}, "off", "log.wandb=off"),
        ({"WANDB_MODE": "online"}, {"wandb": "off"}, "off", "log.wandb=off, not WANDB_MODE=online"),
        ({"WANDB_MODE": "dryrun"}, {"wandb": "offline"}, "offline", "log.wandb=offline"),
        (
            {"WANDB_MODE": "disabled", "WANDB_DISABLED": "1"},
            {"wandb": "offline"},
            "offline",
            "log.wandb=offline, not WANDB_MODE=disabled, not WANDB_DISABLED=1",
        ),
        (
            {"WANDB_MODE": "offline", **NAMES},
            {"wandb_project": "ours", "wandb_name": "their-name"},
            "offline",
            "WANDB_MODE=offline; log.wandb_project=ours, not WANDB_PROJECT=theirs",
        ),
    ],
)
def test_what_the_config_says_wins_and_is_said(monkeypatch, environment, log, mode, why):
    choice = chosen(monkeypatch, environment, **log)
    assert (choice.mode, choice.why) == (mode, why)
    assert choice.project == log.get("wandb_project", "qwenlora")


def test_the_run_is_kept_where_wandb_is_told_and_under_its_names(monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the config wins
    monkeypatch.setenv("WANDB_DIR", str(folder))
    for name, value in NAMES.items():
        monkeypatch.setenv(name, value)
    config = Config(
        run_dir="runs/my",
        model=Model(name_or_path="tiny"),
        data=Data(train="example"),
        log=Log(wandb="offline", wandb_name="ours"),
    )
    run = RunFolder(config.run_dir)
    run.path.mkdir(parents=True)
    tracker = WandbTracker(config, run, pytest.fail)
    place = tracker.start()
    session = tracker.session
    assert (session.project, session.name, session.id) == ("theirs", "ours", "abc123")
    tracker.finish(failed=False)
    assert place == (
        f"offline, in {folder}/wandb (log.wandb=offline, not WANDB_MODE=disabled; log.wandb_name=ours, not"
        " WANDB_NAME=their-name)"
    )
    assert list(folder.glob("wandb/offline-run-*-abc123/run-abc123.wandb"))
    assert run.wandb_id.read_text() == "abc123"


def test_settings_that_wandb_refuses_are_a_warning(monkeypatch):
    warned = []
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    config = Config(run_dir="runs/my", model=Model(name_or_path="tiny"), data=Data(train="example"))
    trackers = Trackers([WandbTracker(config, RunFolder(config.run_dir), warned.append)], warned.append)
    assert trackers.places == {"W&B": "off"}
    assert len(warned) == 1
    assert warned[0].startswith("W&B cannot be used (")
    assert "'dryrun'" in warned[0], "what it takes"


@pytest.mark.slow
def test_an_unreachable_server_costs_seconds_and_one_warning(qwenlora, tmp_path):
    with socket.socket() as closed:  # bound, not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
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
            WANDB_API_KEY=KEY,
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
            assert KEY.encode() not in path.read_bytes(), f"{path} holds the key"

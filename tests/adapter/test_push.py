"""An adapter goes to a hub when that is asked for, whole, and never with what is private."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import hub_stub
import pytest

from qwenlora.adapter.publish import push
from qwenlora.adapter.publish.export import export
from qwenlora.adapter.publish.push import Target
from qwenlora.cli import main as cli

KEY = "the-key-of-the-hub-0123456789"
COMMAND = (sys.executable, "-c", "from qwenlora.cli.main import main; main()", "export")


@pytest.fixture
def hub():
    with hub_stub.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held") / "my run"
    shutil.copytree(tiny_run[0], folder, ignore=shutil.ignore_patterns("logs", "wandb", "checkpoint-*"))
    return folder


@pytest.fixture
def pushed(run, hub, tmp_path):
    """Return what runs the command, and returns its answer."""

    def pushed(*options: str, **environment: str) -> subprocess.CompletedProcess:
        ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": KEY, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [*COMMAND, str(run), *options],
            env=os.environ | ours | {"HF_HOME": str(tmp_path / "hub")} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return pushed


def test_the_hub_receives_what_an_export_has(pushed, hub, run, tmp_path):
    answer = pushed("--push", "my-org/my-model", "--private")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"pushed to {hub.url}/my-org/my-model\n")
    assert (hub.repos, hub.commits) == ({"my-org/my-model": True}, ["qwenlora export"])
    assert hub.keys == {f"Bearer {KEY}"}
    export(run, tmp_path / "out", called="my-org/my-model", name="my run")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {path: content for (_, path), content in hub.files.items()} == files
    assert b'"my-org/my-model"' in files["README.md"] or b"'my-org/my-model'" in files["README.md"]
    hub.repos["my-org/my-model"] = False
    answer = pushed("--push", "my-org/my-model", "--private", "--to", str(tmp_path / "kept"))
    assert (answer.returncode, len(hub.commits)) == (2, 1)
    assert answer.stderr.startswith(
        "error: my-org/my-model is there and public, and --private asks for a private"
    )
    assert (tmp_path / "kept" / "README.md").exists()


def test_what_the_hub_refuses_is_one_line(pushed, hub):
    hub.fails = 403
    answer = pushed("--push", "my-org/my-model")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: my-org/my-model cannot be pushed: ")
    assert len(answer.stderr.splitlines()) == 1
    assert KEY not in answer.stderr


def test_what_is_private_is_refused_before_the_hub_is_asked(pushed, hub, tmp_path):
    answer = pushed("--push", "my-org/my-model", "--license", "AKIA" + "A" * 16)
    assert (answer.returncode, hub.repos, hub.keys) == (2, {}, set())
    assert answer.stderr.startswith("error: nothing was exported: README.md would hold what looks like a key")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a folder, --to tiny, or a repository, --push ORG/NAME"),
        (["--to", "x", "--private"], "--private says how it is pushed; add --push ORG/NAME"),
        (["--push", "tiny"], "--push tiny is no name on a hub; write it like my-org/my-model"),
        (["--push", "a/b", "--to", "x.zip"], "--to x.zip with --push names a folder, not a .zip: "),
        (["--push", "a/b"], "--push needs the hub, and HF_HUB_OFFLINE is set; unset it"),
    ],
)
def test_what_cannot_work_is_refused_first(options, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.app(["export", "no-run", *options])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_without_a_key_the_way_to_one_is_said(monkeypatch):
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        Target("my-org/my-model").check()


@pytest.mark.parametrize("private", [True, False])
def test_modelscope_is_asked_as_its_library_wants_it(monkeypatch, tmp_path, private):
    import modelscope_hub
    from modelscope_hub.errors import AlreadyExistsError, NetworkError
    from modelscope_hub.types import RepoInfo

    api = create_autospec(modelscope_hub.HubApi, instance=True)
    monkeypatch.setattr(modelscope_hub, "HubApi", lambda: api)
    target = Target("my-org/my-model", "modelscope", private)
    target.check()
    api.create_repo.side_effect = AlreadyExistsError("it is there")
    api.get_repo.return_value = RepoInfo(private=private)
    assert target.push(tmp_path) == "https://modelscope.cn/models/my-org/my-model"
    visibility = "private" if private else "public"
    api.create_repo.assert_called_once_with("my-org/my-model", "model", visibility=visibility)
    assert api.upload_folder.call_args.args == ("my-org/my-model", "model", tmp_path)
    api.get_repo.side_effect = NetworkError("no answer")
    with pytest.raises(ValueError, match="^my-org/my-model cannot be pushed: .*no answer"):
        target.push(tmp_path)


def test_a_hubs_missing_library_is_refused(monkeypatch):
    monkeypatch.setattr(push, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'qwenlora\[modelscope\]'"):
        Target("my-org/my-model", "modelscope").check()

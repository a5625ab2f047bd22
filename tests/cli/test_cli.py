"""The command line answers fast, and every refusal is one clear line with exit code 2, before any model is
loaded."""

import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from qwenlora.cli import main as cli
from qwenlora.cli import version
from qwenlora.configs import load_config
from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.run import code
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import package
from qwenlora.trainer import data_check

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def refused(answer) -> str:
    """Return the one line of a refusal."""
    assert answer.returncode == 2, answer.stdout + answer.stderr
    text = (answer.stderr + answer.stdout.removeprefix("preparing model and data ...\n")).strip()
    assert "Traceback" not in text
    assert text.startswith("error: ")
    return text.removeprefix("error: ")


def test_help_imports_nothing_of_the_commands(qwenlora):
    script = (
        "import sys; from qwenlora.cli.main import app; app(['--help'], standalone_mode=False);"
        " print(sorted(name for name in sys.modules if name.startswith(('qwenlora.', 'torch', 'pydantic'))))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "train" in answer.stdout
    names = "'qwenlora.cli', 'qwenlora.cli.main', 'qwenlora.run', 'qwenlora.run.lossy_output'"
    assert answer.stdout.endswith(f"[{names}]\n")


def test_help_answers_in_half_a_second(qwenlora):
    def seconds():
        start = time.perf_counter()
        assert qwenlora("--help").returncode == 0
        return time.perf_counter() - start

    assert any(seconds() < 0.5 for _ in range(30))  # a busy machine is not the command's fault


def test_config_show_prints_what_would_run(qwenlora):
    answer = qwenlora("config", "show", TINY, "lora.r=3")
    assert answer.returncode == 0
    assert "  r: 3\n" in answer.stdout


def test_a_terminal_that_lacks_characters_shows_the_others(qwenlora):
    answer = qwenlora("config", "show", TINY, "run_dir=模型😀", PYTHONIOENCODING="ascii")
    assert answer.returncode == 0, answer.stderr
    assert "run_dir: \\u6a21\\u578b\\U0001f600" in answer.stdout


def test_unknown_key(qwenlora):
    line = refused(qwenlora("train", TINY, "lora.rnk=3"))
    assert line.startswith("command line: lora.rnk=3: no such key; ")


def test_missing_config_file(qwenlora, tmp_path):
    assert refused(qwenlora("train", "no.yaml")) == f"no config file no.yaml (looked in {tmp_path})"


def test_missing_data_file(qwenlora, tmp_path):
    line = refused(qwenlora("train", TINY, "data.train=no.jsonl"))
    assert line == f"data.train=no.jsonl: no such file (looked for {tmp_path}/no.jsonl)"


def test_empty_data(qwenlora, tmp_path):
    (tmp_path / "my.jsonl").touch()
    assert (
        refused(qwenlora("train", TINY, "data.train=my.jsonl"))
        == "data.train=my.jsonl is empty: it has no rows"
    )


def test_no_assistant_turn_anywhere(qwenlora, tmp_path):
    row = {"conversations": [{"from": "human", "value": "在吗？"}]}
    (tmp_path / "my.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    line = refused(qwenlora("train", TINY, "data.train=my.jsonl"))
    assert line == (
        "my.jsonl:1: no assistant turn: there is nothing to learn from; the same for all 3 rows\n"
        "mend or remove them, or leave them out: data.on_bad_row: skip"
    )


def test_model_folder_without_config_json(qwenlora, tmp_path):
    (tmp_path / "model").mkdir()
    line = refused(qwenlora("train", TINY, "model.name_or_path=./model"))
    assert (
        line == "model.name_or_path=./model has no config.json; name the folder that holds the model's files"
    )


def test_model_that_is_not_there(qwenlora, tmp_path):
    line = refused(qwenlora("train", TINY, "model.name_or_path=./no"))
    assert line == (
        f"model.name_or_path=./no: no such folder (looked for {tmp_path}/no); a hub name has one slash"
    )
    line = refused(qwenlora("train", TINY, "model.name_or_path=Qwen/NoSuchModel"))
    assert line.startswith(
        "model.name_or_path=Qwen/NoSuchModel cannot be loaded (offline: HF_HUB_OFFLINE is set): "
    )


def test_model_of_an_unknown_kind(qwenlora, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for kind, words in (
        ("qwen", "does not recognize this architecture"),
        ("clip", "is of type clip, which this"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        assert words in refused(qwenlora("train", TINY, "model.name_or_path=./model"))


def test_more_ranks_than_micro_batches(qwenlora):
    line = refused(qwenlora("train", TINY, "--nproc", 4))
    assert line == (
        "train.global_batch_size=20 makes 2 micro-batches of per_device_train_batch_size=10, fewer than 4"
        " processes; set train.per_device_train_batch_size: 5"
    )


def test_run_folder_that_holds_another_config(qwenlora, tmp_path, tiny_run):
    shutil.copytree(tiny_run[0], tmp_path / "runs" / "tiny")
    line = refused(qwenlora("train", TINY, "lora.r=8"))
    assert line == (
        f"run_dir={tmp_path}/runs/tiny holds a run with another config: lora.r was 32, now 8; choose another"
        " run_dir, or set the old run aside with --fresh (to go on all the same: --allow-config-change"
        " lora.r)"
    )
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()


def test_run_folder_whose_data_changed(qwenlora, tmp_path, tiny_run):
    shutil.copytree(tiny_run[0], tmp_path / "runs" / "tiny")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "adapter")
    facts = tmp_path / "runs" / "tiny" / "facts.json"
    facts.write_text(
        facts.read_text().replace('"sha256": "', '"sha256": "0').replace('"stamp": "', '"stamp": "0')
    )
    line = refused(qwenlora("train", TINY))
    assert line.startswith(f"run_dir={tmp_path}/runs/tiny was trained on other data: ")


@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_system_that_is_not_linux(monkeypatch, capsys, command):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit) as left:
        cli.app([command, "x"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: qwenlora runs on Linux, this is Windows: its checkpoints rely on Linux's file semantics"
        " (rename over an existing name, fsync of folders); on Windows, WSL2 works\n"
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_listed_help_is_the_command_s(name):
    """And the command is loaded: its options are sound."""
    command = cli.load(name)
    about, _, example = command.help.rpartition("\n\n")
    assert " ".join(about.split()) == cli.help_of(name)
    words = re.fullmatch(rf"Example: (?:.*[ (])?qwenlora {name}((?: [\w./=:,-]+)*)(?:[)> ].*)?", example)
    assert words, f"{name} has an example"
    command.make_context(name, shlex.split(words[1] or ""))
    assert command.name == name.split()[-1]


def test_no_command_imports_torch_before_it_needs_it():
    modules = {f"qwenlora.cli.{module}" for module in cli.COMMANDS.values()}
    script = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print('torch' in"
        " sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


@pytest.fixture
def run(tmp_path, tiny):
    """A run's folder with nothing but a config and an adapter, which has nothing but ones in it."""
    model, lora = Model(name_or_path=str(tiny)), Lora(r=1, lora_alpha=1)
    folder = RunFolder(str(tmp_path / "done"))
    folder.adapter.mkdir(parents=True)
    folder.config.write_text(
        to_yaml(Config(run_dir="done", model=model, data=Data(train="example"), lora=lora))
    )
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0}
    settings |= {"target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": str(tiny)}
    (folder.adapter / "adapter_config.json").write_text(json.dumps(settings))
    ones = {}
    for layer in range(4):
        for half, shape in (("A", (1, 256)), ("B", (256, 1))):
            ones[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight"] = np.ones(
                shape
            )
    save_file(ones, folder.adapter / "adapter_model.safetensors")
    return folder.path


def test_commands_that_compute_nothing_do_without_torch(run, tiny, tmp_path):
    """And show the tokens that training, which has torch, would see."""
    four_bits = shutil.copytree(tiny, tmp_path / "four")
    settings = json.loads((four_bits / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (four_bits / "config.json").write_text(json.dumps(settings))
    config = [str(TINY), f"run_dir={tmp_path}/run"]
    commands = [
        (["verify", str(run)], 0),
        (["export", str(run), "--to", f"{tmp_path}/exported"], 0),
        (["data", "preview", *config, "--ids"], 0),
        (["data", "preview", *config, f"model.name_or_path={four_bits}"], 0),
        (["data", "check", *config], 0),
        (["data", "check", *config, "data.train=no.jsonl"], 2),
        (["train", *config, "lora.rnk=3"], 2),
    ]
    script = f"""
import sys
from qwenlora.cli.main import app
for command, _ in {commands}:
    try:
        app(command)
    except SystemExit as left:
        heavy = [name for name in ("torch", "peft", "datasets") if sys.modules.get(name)]
        print("end of", *command, left.code, *heavy)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ends = [line for line in answer.stdout.splitlines() if line.startswith("end of")]
    assert ends == [" ".join(["end of", *command, str(code)]) for command, code in commands], answer.stderr
    shown = io.StringIO()
    data_check.preview(load_config(TINY), "train", 1, 3, ids=True, console=Console(file=shown, width=80))
    assert shown.getvalue() in answer.stdout


def test_a_config_that_is_wrong_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "my.yaml").write_text("train: {max_stepz: 3}\n")
    script = (
        "import sys; from qwenlora.cli import main\ntry: main.main()\nfinally: print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, "data", "check", str(tmp_path / "my.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (2, "False\n")
    assert "max_stepz" in answer.stderr


def test_the_version_has_the_commit_of_a_clone(qwenlora):
    clone = package() if (package() / ".git").exists() else None  # the tests mostly run what was installed
    head = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip() if clone else ""
    text = qwenlora("--version").stdout
    assert text.startswith(metadata.version("qwenlora"))
    assert f" (commit {commit}" in text if commit else text.strip() == metadata.version("qwenlora")


def test_a_package_outside_of_a_clone_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(code, "package", lambda: tmp_path)
    assert version.text() == metadata.version("qwenlora")


def test_no_disk_space_for_one_checkpoint(tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*mount, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine allows no mount namespaces, in which the small disk is made")
    (tmp_path / "small").mkdir()
    script = 'mount -t tmpfs -o size=18m small small && exec "$@"'
    command = [sys.executable, "-c", "from qwenlora.cli.main import main; main()"]
    answer = subprocess.run(
        [*mount, "sh", "-c", script, "sh", *command, "train", str(TINY), "run_dir=small/run"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    line = refused(answer)
    assert line.startswith(f"run_dir={tmp_path}/small/run has ")
    assert line.endswith(
        " MiB free, one checkpoint needs 7 MiB; free some, or choose a run_dir on another disk"
    )


def test_several_problems_are_named_at_once(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name: x}\ndata: {train: y, colour: red}\n")
    lines = refused(qwenlora("train", "my.yaml")).splitlines()
    assert lines == [
        "my.yaml:1: model.name_or_path is missing: a folder, a hub name (Qwen/Qwen2.5-7B-Instruct), or"
        " `tiny`: a small Qwen3 made on the spot",
        "my.yaml:1: model.name=x: no such key; did you mean model.name_or_path?",
        "my.yaml:2: data.colour=red: no such key; data has: train, eval, eval_fraction, format, columns,"
        " roles, encoding, on_bad_row, train_on, chat_template_kwargs, max_length, overlength,"
        " split_replies, packing, num_proc, cache_dir",
    ]

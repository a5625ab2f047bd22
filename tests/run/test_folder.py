"""A run folder belongs to one config, knows its attempts, and never loses what training made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_facts import make_facts

from qwenlora.configs import load_config
from qwenlora.run.folder import RunFolder


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        f"model: {{name_or_path: tiny}}\ndata: {{train: example}}\nrun_dir: {tmp_path}/runs/我的 run\n"
    )
    return lambda *overrides: load_config(file, overrides)


@pytest.fixture
def run(config):
    run = RunFolder(config().run_dir)
    claim(run, config())
    return run


def claim(run, config, **how):
    with run.claim(config, **how):
        pass


def test_a_new_folder_holds_the_resolved_config_and_the_code(run, config):
    assert load_config(run.config) == config()
    code = json.loads(run.code.read_text())
    assert set(code) == {"format", "git", "versions", "python", "command", "folder"}
    assert code["versions"]["torch"]


class TestRelativeNames:
    """They are those of the folder in which the last attempt was started, wherever one reads them."""

    @pytest.fixture
    def project(self, tmp_path, monkeypatch):
        folder = tmp_path / "project"
        (folder / "models" / "qwen").mkdir(parents=True)
        (folder / "rows.jsonl").touch()
        monkeypatch.chdir(folder)
        return folder

    @staticmethod
    def started(run_dir):
        text = "{model: {name_or_path: models/qwen}, data: {train: [rows.jsonl, {path: '*.jsonl'}, o/hub]}}"
        Path("my.yaml").write_text(text)
        config = load_config("my.yaml", {"run_dir": str(run_dir)})
        run = RunFolder(config.run_dir)
        claim(run, config)
        return run

    @staticmethod
    def names(folder):
        config = RunFolder(folder).read_config()
        rows = [entry if isinstance(entry, str) else entry.path for entry in config.data.train]
        return config.model.name_or_path, rows

    @pytest.mark.parametrize("run_dir", ["runs/a", "/elsewhere"])
    def test_from_another_folder(self, project, tmp_path, monkeypatch, run_dir):
        run = self.started(run_dir.replace("/elsewhere", str(tmp_path / "elsewhere")))
        monkeypatch.chdir(tmp_path)
        rows = [f"{project}/rows.jsonl", f"{project}/*.jsonl", "o/hub"]
        assert self.names(run.path) == (f"{project}/models/qwen", rows)
        assert load_config(run.config).model.name_or_path == "models/qwen"

    def test_after_a_move_of_everything_and_by_an_older_version(self, project, tmp_path, monkeypatch):
        run = self.started("runs/a")
        code = json.loads(run.code.read_text())
        code.pop("folder")
        run.code.write_text(json.dumps(code))
        monkeypatch.chdir(tmp_path)
        project.rename(tmp_path / "moved")
        assert self.names("moved/runs/a")[0] == f"{tmp_path}/moved/models/qwen"

    def test_after_a_resume_in_another_folder(self, project, tmp_path, monkeypatch):
        run = self.started(tmp_path / "elsewhere")
        other = tmp_path / "other"
        (other / "models" / "qwen").mkdir(parents=True)
        monkeypatch.chdir(other)
        self.started(run.path)
        monkeypatch.chdir(tmp_path)
        assert self.names(run.path)[0] == f"{other}/models/qwen"

    def test_where_it_was_started_is_not_known(self, project, tmp_path, monkeypatch):
        run = self.started(tmp_path / "elsewhere")
        run.code.unlink()
        assert self.names(run.path)[0] == f"{project}/models/qwen"
        monkeypatch.chdir(tmp_path)
        assert self.names(run.path) == ("models/qwen", ["rows.jsonl", "*.jsonl", "o/hub"])


def test_a_run_that_never_trained_may_change_its_config(run, config):
    claim(run, config("lora.r=8"))
    assert load_config(run.config).lora.r == 8


def test_a_trained_run_refuses_another_config_by_name(run, config):
    run.metrics.touch()
    with pytest.raises(
        ValueError, match=r"holds a run with another config: lora\.r was 16, now 8; choose another run"
    ):
        claim(run, config("lora.r=8"))
    assert load_config(run.config).lora.r == 16


def test_how_a_run_is_watched_started_cut_and_how_long_it_is_may_change(run, config):
    run.metrics.touch()
    free = ["log.wandb=off", "launch.nproc_per_node=2", "train.max_steps=9", "checkpoint.async=false"]
    with run.claim(config(*free, "train.save_steps=7", "train.save_strategy=steps")) as changed:
        assert set(changed) == {
            *(key.split("=")[0] for key in free),
            "train.save_steps",
            "train.save_strategy",
        }
        assert changed.length
    with run.claim(config(*free, "train.save_strategy=no")) as changed:
        assert not changed.length


def test_a_key_that_is_allowed_to_change_may_and_no_other(run, config):
    run.metrics.touch()
    change = config("train.learning_rate=1", "lora.r=8")
    with pytest.raises(ValueError, match=r"--allow-config-change train\.learning_rate"):
        claim(run, change, allowed=["lora.r"])
    with pytest.raises(ValueError, match=r"config: lora\.r was"):
        claim(run, change, allowed=["train.learning_rate", "lora.r_of"])
    claim(run, change, allowed=["train", "lora.r"])
    assert load_config(run.config).lora.r == 8


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=bfloat16",
        "data.max_length=64",
        "lora.lora_dropout=0.5",
        "train.seed=1",
        "train.learning_rate=1",
        "strategy.quantization=nf4",
    ],
)
def test_whatever_changes_the_numbers_makes_another_run(run, config, override):
    run.metrics.touch()
    with pytest.raises(ValueError, match=override.split("=")[0]):
        claim(run, config(override))


def test_fresh_sets_the_old_run_aside_and_keeps_it(run, config):
    run.metrics.write_text("{}\n")
    for _ in range(2):
        claim(run, config("lora.r=8"), fresh=True)
        run.metrics.write_text("new\n")
    aside = sorted(path.name for path in run.path.parent.iterdir())
    assert aside == ["我的 run", "我的 run.old-1", "我的 run.old-2"]
    assert (run.path.parent / "我的 run.old-1" / "metrics.jsonl").read_text() == "{}\n"


def test_a_folder_of_something_else_is_not_taken(tmp_path, config):
    run = RunFolder(config().run_dir)
    run.path.mkdir(parents=True)
    (run.path / "thesis.docx").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        claim(run, config())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        claim(RunFolder(tmp_path / "file"), config())
    with pytest.raises(ValueError, match=r"cannot write to run_dir=.*: Not a directory"):
        claim(RunFolder(tmp_path / "file" / "below"), config())


def test_a_run_is_done_when_its_adapter_is_there(run):
    run.begin_attempt(1)
    run.end_attempt("done")
    assert not run.done
    run.adapter.mkdir()
    assert run.done
    run.begin_attempt(1)
    run.end_attempt("refused")
    assert run.done
    run.begin_attempt(1)
    run.end_attempt("stopped")
    assert not run.done, "it was made longer, and is under way"


def test_what_is_refused_leaves_config_and_facts_as_they_were(run, config):
    run.metrics.touch()
    run.facts.write_text("{}")
    run.code.write_text("of the commit that trained it")
    run.diff.unlink(missing_ok=True)

    def refuse() -> None:
        with run.claim(config("train.max_steps=9")):
            run.facts.write_text("other")
            run.diff.write_text("changed since")
            assert run.code.read_text() != "of the commit that trained it"
            raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        refuse()
    assert load_config(run.config) == config()
    assert run.facts.read_text() == "{}"
    assert run.code.read_text() == "of the commit that trained it"
    assert not run.diff.exists()


def test_fresh_behind_a_link_stays_on_that_disk(tmp_path, config):
    run, there = RunFolder(config().run_dir), tmp_path / "scratch" / "run"
    there.mkdir(parents=True)
    run.path.parent.mkdir(parents=True)
    run.path.symlink_to(there)
    claim(run, config())
    run.metrics.write_text("old\n")
    claim(run, config(), fresh=True)
    assert run.path.is_symlink()
    assert (tmp_path / "scratch" / "run.old-1" / "metrics.jsonl").exists()
    assert not run.metrics.exists()


def test_checkpoints_are_listed_newest_first(run):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x", ".checkpoint-200", "checkpoint-30"):
        (run.path / name).mkdir()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-100", "checkpoint-30", "checkpoint-9"]


HOLD = """
import sys
from qwenlora.configs import load_config
from qwenlora.run.folder import RunFolder
config = load_config(sys.argv[1])
with RunFolder(config.run_dir).claim(config):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_in_use_is_refused_and_free_again_afterwards(run, config, fresh):
    argv = [sys.executable, "-c", HOLD, str(run.config)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {other.pid} on "):
            claim(run, config("lora.r=8"), fresh=fresh)
        assert load_config(run.config).lora.r == 16, "what the other process uses is left alone"
        other.stdin.close()
        assert other.wait(60) == 0
    claim(run, config(), fresh=fresh)


def test_an_argument_that_is_no_utf_8_is_recorded_all_the_same(run, config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qwenlora", "train", "caf\udce9.yaml"])
    with run.claim(config()):
        pass
    assert json.loads(run.code.read_text())["command"][-1] == "caf\ufffd.yaml"


def test_a_pack_may_hold_all_rows_and_otherwise_the_longest_row_is_the_longest():
    assert make_facts().longest == 20
    assert make_facts(packing=True).longest == 90

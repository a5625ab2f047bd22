"""What was prepared stands until anything that it was made of changes."""

import os
import time
from importlib import metadata

import pytest

from qwenlora.configs import load_config
from qwenlora.data import freshness
from qwenlora.run import package
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.prepare import prepare


@pytest.fixture
def config(tmp_path, tiny):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "1+1?", "output": "2"}\n' * 30)
    (tmp_path / "my.yaml").write_text(
        f"run_dir: {tmp_path}/runs/my\nmodel: {{name_or_path: {tiny}}}\ndata: {{train:"
        f" {tmp_path}/rows.jsonl}}\n"
    )
    time.sleep(1.1)  # what has just been written might change within the clock's tick
    return lambda *overrides: load_config(tmp_path / "my.yaml", overrides)


@pytest.fixture
def run(config):
    run = RunFolder(config().run_dir)
    with run.claim(config()):
        prepare(config(), run)
    return run


def stands(config, run) -> bool:
    return freshness.is_current(config, run, on_gpu=False)


def test_a_second_start_prepares_nothing(config, run):
    assert stands(config(), run)
    assert stands(config("log.wandb=off", "launch.nproc_per_node=2", "checkpoint.async=false"), run)
    assert stands(config("strategy.name=zero3", "strategy.offload=params"), run)
    assert stands(config("train.max_steps=5", "train.save_strategy=no", "train.on_nan=skip"), run)


OTHERS = ["data.max_length=99", "model.dtype=bfloat16", "train.learning_rate=1e-5", "lora.r=4"]


@pytest.mark.parametrize("change", [*OTHERS, "strategy.sequence_parallel=2", "strategy.quantization=nf4"])
def test_another_config_is_prepared(config, run, change):
    assert not stands(config(change), run)


def test_on_a_gpu_packing_may_be_decided_otherwise(config, run):
    assert not freshness.is_current(config(), run, on_gpu=True)


def test_a_package_that_has_come_or_changed_is_looked_at_again(config, run, monkeypatch):
    theirs = metadata.version
    for name in ("flash-linear-attention", "causal-conv1d", "flash-attn", "bitsandbytes"):
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "version", lambda one, new=name: "9" if one == new else theirs(one))
            assert not stands(config(), run), name
    assert stands(config(), run)


def test_a_changed_file_is_seen_even_with_its_old_time_and_size(config, run, tmp_path):
    file = tmp_path / "rows.jsonl"
    before = file.stat()
    file.write_text(file.read_text().replace("2", "3", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert not stands(config(), run)


@pytest.mark.parametrize("lost", ["data", "facts", "rows"])
def test_what_is_gone_is_made_again(config, run, tmp_path, lost):
    folder = next(
        path for path in (tmp_path / "runs" / ".prepared").iterdir() if (path / "index.json").exists()
    )
    {"data": folder / "train" / "ids.bin", "facts": run.facts, "rows": folder / "index.json"}[lost].unlink()
    assert not stands(config(), run)


def test_a_full_disk_is_left_to_preparation_to_say(config, run):
    run.facts.write_text(run.read_facts().revised(checkpoint_bytes=10**18).text())
    assert not stands(config(), run)


def test_what_only_the_hub_knows_is_always_asked_for(config):
    assert freshness.stamp(config(), "Qwen/Qwen2.5-7B", on_gpu=False) == ""
    assert (
        freshness.stamp(config("model.tokenizer=Qwen/Qwen2.5-7B"), config().model.name_or_path, on_gpu=False)
        == ""
    )


def test_a_file_that_has_just_been_written_is_not_trusted(config, run, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert freshness.stamp(config(), config().model.name_or_path, on_gpu=False) == ""


def test_what_other_code_prepared_is_prepared_again(config, run, tmp_path, monkeypatch):
    package.snapshot(tmp_path / "copy")
    code = tmp_path / "copy" / "qwenlora"
    monkeypatch.setattr(package, "package", lambda: code)

    def stamp() -> str:
        return freshness.stamp(config(), config().model.name_or_path, on_gpu=False)

    assert stamp() == run.read_facts().stamp, "a copy of the package is the same code"
    stamps = {stamp()}
    for name in ("data/rows.py", "configs/schema.py", "run/records.py", "trainer/model/base.py"):
        with (code / name).open("a") as file:
            file.write("# changed\n")
        stamps.add(stamp())
    (code / "trainer" / "model" / "new.py").touch()
    stamps.add(stamp())
    (code / "trainer" / "model" / "new.py").rename(code / "trainer" / "model" / "other_name.py")
    stamps.add(stamp())
    assert len(stamps) == 7
    assert not stands(config(), run)
    for name in ("adapter/verify.py", "cli/main.py", "jobs/task.py"):
        with (code / name).open("a") as file:
            file.write("# changed\n")
    assert stamp() in stamps, "no preparation depends on these"

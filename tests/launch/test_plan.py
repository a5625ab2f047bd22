"""The agent builds the right command, counts GPUs without torch, and explains a run before it starts."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import commands, hardware
from qwenlora.launch.dry_run import dry_run
from qwenlora.launch.refusals import check_start
from qwenlora.run.folder import RunFolder

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where no run is: in a clone there may be a runs/tiny."""
    monkeypatch.chdir(tmp_path)


def test_the_torchrun_command_is_a_list_and_asks_for_a_free_port(tmp_path):
    argv = commands.torchrun_argv([f"{tmp_path}/a b; rm -rf x/config.yaml", "lora.r=3"], 2)
    assert argv == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--signals-to-handle=SIGQUIT",
        "-m",
        "qwenlora.trainer.main",
        f"{tmp_path}/a b; rm -rf x/config.yaml",
        "lora.r=3",
    ]


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-5f,GPU-6a,", 2)]
)
def test_visible_gpus_are_counted_as_the_environment_says(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu_count() == count


def test_gpus_are_counted_by_nvidia_smi(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.gpu_count() == 2


def test_a_dry_run_shows_config_numbers_and_a_command_to_paste():
    arguments = ["my configs/tiny.yaml", "launch.nproc_per_node=2", "train.global_batch_size=40"]
    text = dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "name_or_path: tiny" in text
    assert "# rows                120\n" in text
    assert "# global batch        40 rows = 2 processes x 10 x 2 accumulated\n" in text
    assert "# steps               120, 3 an epoch\n" in text
    command = shlex.split(text.rstrip().rpartition("# command")[2])
    assert command == commands.torchrun_argv(arguments, 2)


def test_a_dry_run_refuses_what_a_start_would_refuse_and_says_what_is_done():
    config = load_config(TINY)
    run = RunFolder(config.run_dir)
    with run.claim(config):
        run.begin_attempt(1)
        run.metrics.touch()
        run.adapter.mkdir()
        run.end_attempt("done")
    assert f"# run folder          {run.path} (done: 0 steps)\n" in dry_run(config, [str(TINY)])
    other = load_config(TINY, ["lora.r=4"])
    with pytest.raises(ValueError, match=r"holds a run with another config: lora\.r was 32, now 4"):
        dry_run(other, [str(TINY)])
    assert f"# run folder          {run.path}\n" in dry_run(other, [str(TINY)], fresh=True)
    assert f"{run.path} (done" in dry_run(other, [str(TINY)], allowed=["lora.r"])
    with pytest.raises(ValueError, match=r"--allow-config-change lora\.rank: no such key"):
        dry_run(other, [str(TINY)], allowed=["lora.rank"])


def test_a_dry_run_says_what_auto_is_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = dry_run(load_config(TINY), [str(TINY)])
    said = (
        "# strategy            auto: ddp, no GPU: the whole model in each process (where there are GPUs:"
        " decided at the"
    )
    assert f"{said} start)\n" in text
    assert "DeepSpeed" not in text.partition("# rows")[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    text = dry_run(load_config(TINY), [str(TINY)])
    assert (
        "# strategy            auto: decided at the start, from the base's size and the GPUs' memory\n"
        in text
    )


def test_a_dry_run_shows_deepspeed_s_config_behind_hashes():
    pytest.importorskip("deepspeed")
    arguments = ["strategy.name=zero2", "launch.nproc_per_node=2", "train.global_batch_size=40"]
    text = dry_run(load_config(TINY, arguments), [str(TINY), *arguments])
    assert "# strategy            zero2\n" in text
    block = text.partition("# DeepSpeed's config\n")[2].splitlines()
    assert all(line.startswith("# ") for line in block)
    made = json.loads("\n".join(line[2:] for line in block))
    assert (made["zero_optimization"]["stage"], made["gradient_accumulation_steps"]) == (2, 2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["strategy.name=fsdp", "strategy.quantization=nf4"],
            "strategy.name=fsdp with strategy.quantization=nf4: ",
        ),
        (
            ["strategy.name=ddp", "strategy.offload=params"],
            "strategy.name=ddp with strategy.offload=params: ",
        ),
        (["strategy.sequence_parallel=3"], "strategy.sequence_parallel=3 on 2 processes"),
    ],
)
def test_what_cannot_run_is_refused_before_the_start(overrides, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_start(load_config(TINY, overrides), 1, 2)


def test_a_deepspeed_config_that_contradicts_is_refused_before_the_start(tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3}')
    config = load_config(TINY, ["strategy.name=zero2", f"strategy.deepspeed_config={tmp_path}/ds.json"])
    with pytest.raises(
        ValueError, match=r"ds\.json: gradient_clipping=3, but train\.max_grad_norm=1: expected 1\.0;"
    ):
        check_start(config, 1, 1)


def test_a_gpu_is_taken_for_granted_on_a_job_s_nodes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = load_config(TINY, ["strategy.name=fsdp", "strategy.offload=params"])
    check_start(config, 1, 1)
    with pytest.raises(ValueError, match="on a machine without GPUs"):
        check_start(config)

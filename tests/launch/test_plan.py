"""The agent builds the right command, counts GPUs without torch, and explains a run before it starts."""

import shlex
import sys
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import hardware, plan

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_the_torchrun_command_is_a_list_and_asks_for_a_free_port(tmp_path):
    argv = plan.torchrun_argv([f"{tmp_path}/a b; rm -rf x/config.yaml", "lora.r=3"], 2)
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


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-5f,GPU-6a,", 2)])
def test_visible_gpus_are_counted_as_the_environment_says(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu_count() == count


def test_gpus_are_counted_by_nvidia_smi(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.gpu_count() == 2


def test_a_dry_run_shows_config_numbers_and_a_command_to_paste():
    arguments = ["my configs/tiny.yaml", "launch.nproc_per_node=2", "train.global_batch_size=40"]
    text = plan.dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "name_or_path: tiny" in text
    assert "# rows                120\n" in text
    assert "# global batch        40 rows = 2 processes x 10 x 2 accumulated\n" in text
    assert "# steps               120, 3 an epoch\n" in text
    command = shlex.split(text.rstrip().rpartition("# command")[2])
    assert command == plan.torchrun_argv(arguments, 2)

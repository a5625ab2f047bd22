"""A dry run explains a run before it starts."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import commands
from qwenlora.launch.dry_run import dry_run
from qwenlora.run.folder import RunFolder

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


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
    strategy = (
        "# strategy            auto: ddp, no GPU: the whole model in each process (where there are GPUs:"
        " decided at the"
    )
    assert f"{strategy} start)\n" in text
    assert "DeepSpeed" not in text.partition("# rows")[2]
    auto = dry_run(load_config(TINY, ["train.per_device_train_batch_size=auto"]), [str(TINY)])
    assert (
        "# global batch        20 rows = 1 process x as many as fit x what is accumulated: found at" in auto
    )
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


def test_a_dry_run_shows_the_command_to_paste():
    arguments = ["my configs/tiny.yaml", "launch.launcher=deepspeed", "launch.nproc_per_node=2"]
    text = dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "  launcher: deepspeed\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("# command"))
    command = shlex.split(line.removeprefix("# command"))
    port = command.pop(4)
    assert port.startswith("--master_port=")
    assert 10_000 <= int(port.partition("=")[2]) < 32_000
    assert command == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus=2",
        "--no_local_rank",
        "--module",
        "qwenlora.trainer.main",
        *arguments,
    ]


def test_a_dry_run_of_several_hosts_counts_them():
    file = "hosts"
    Path(file).write_text("node1 slots=2\nnode2 slots=2\n")
    arguments = [
        str(TINY),
        "launch.launcher=deepspeed",
        f"launch.hostfile={file}",
        "train.global_batch_size=40",
    ]
    text = dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "# processes           4 on 2 hosts\n" in text
    assert "# global batch        40 rows = 4 processes x 10 x 1 accumulated\n" in text
    assert "deepspeed.launcher.runner --hostfile=hosts --master_port=" in text
    assert "# hosts               node1 node2; by hand, DeepSpeed needs pdsh to reach them\n" in text
    by_torchrun = dry_run(load_config(TINY, arguments[2:]), arguments)
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node1:" in by_torchrun

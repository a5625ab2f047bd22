"""Runs of the tiny model as Slurm jobs, for tests/slurm/."""

import json
import math
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import forked
import numpy as np

import qwenlora

TRAIN = str(Path(qwenlora.__path__[0], "slurm", "train.sh"))
QWENLORA = str(Path(sys.executable).with_name("qwenlora"))
ALL_STEPS = ("train.save_steps=1", "train.save_total_limit=null")
CONFIG = """
model: {name_or_path: tiny}
data: {train: example}
lora: {lora_dropout: 0.1}
train: {global_batch_size: 16, per_device_train_batch_size: 4, max_steps: STEPS, learning_rate: 3e-3,
        save_strategy: steps, save_steps: 4, save_total_limit: 2}
log: {logging_steps: 4, wandb: off}
launch: {nproc_per_node: 1}
"""
EVALUATES = "train: {eval_strategy: steps, eval_steps: 6, "


def write_config(folder: Path, steps: int, *, evaluates: bool = False) -> str:
    text = CONFIG.replace("STEPS", str(steps))
    if evaluates:
        text = text.replace("example}", "example, eval: example}").replace("train: {", EVALUATES)
    (folder / "my.yaml").write_text(text)
    return "my.yaml"


def sbatch(cluster, folder: Path, *arguments: object, options: tuple[str, ...] = (), **env: str) -> str:
    """Submit slurm/train.sh with arguments to two nodes; return the job's id."""
    options = ("--nodes=2", "--time=20", *options)
    return cluster.sbatch(*options, TRAIN, *arguments, cwd=folder, env={"QWENLORA": QWENLORA} | env)


def node_process(cluster, node: str, *how: str) -> str:
    """Return the pid, on that node, of the first process that pgrep finds."""
    return cluster.script("sh", node, "pgrep", *how).split()[0]


def locally(folder: Path, config: str, name: str, processes: int, *more: str) -> None:
    """Run a config on this machine, undisturbed, without Slurm."""
    arguments = ["train", config, f"run_dir=runs/{name}", "--nproc", str(processes), *more]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    answer = forked.run(
        [*forked.COMMAND, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def attempts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, attempt: int, step: int, timeout_s: float = 600.0) -> None:
    """Wait until that attempt has trained that step."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            progress = json.loads((run / "progress.json").read_text())
        except (OSError, ValueError):
            progress = {"attempt": 0, "step": 0}
        if (progress["attempt"], progress["step"]) >= (attempt, step):
            return
        time.sleep(0.1)
    raise AssertionError(f"attempt {attempt} did not come to step {step}")


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_exact(run: Path, folder: Path) -> None:
    """The adapter is, to the bit, that of a run which was stopped and resumed with the same ranks at the same
    steps, and the losses are those of the undisturbed run. folder: has that one, with as many ranks as the
    first attempt that trained, and ALL_STEPS."""
    trained = [one for one in attempts(run) if one.get("last_step", 0) >= one.get("first_step", math.inf)]
    before = "run"
    for number, (last, one) in enumerate(pairwise(trained), 1):
        if last["processes"] == one["processes"]:
            continue  # then the adapter is also the undisturbed one's
        name = f"{run.parent.parent.name}-{number}"
        more = (f"--resume={folder}/runs/{before}/{one['resumed_from']}", *ALL_STEPS)
        locally(folder, "my.yaml", name, one["processes"], *more)
        before = name
    assert adapter(run) == adapter(folder / "runs" / before)
    expected, got = losses(folder / "runs/run"), losses(run)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose([*got.values()], [*expected.values()], rtol=1e-5)

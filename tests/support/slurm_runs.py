"""Runs of the tiny model as Slurm jobs, for tests/slurm/."""

import json
import os
import sys
import time
from pathlib import Path

import forked

import qwenlora

TRAIN = str(Path(qwenlora.__path__[0], "slurm", "train.sh"))
QWENLORA = str(Path(sys.executable).with_name("qwenlora"))
CONFIG = """
model: {name_or_path: tiny}
data: {train: example}
lora: {lora_dropout: 0.1}
train: {global_batch_size: 16, per_device_train_batch_size: 4, max_steps: STEPS, learning_rate: 3e-3,
        save_strategy: steps, save_steps: 4, save_total_limit: 2}
log: {logging_steps: 4, wandb: off}
launch: {nproc_per_node: 1}
"""


def write_config(folder: Path, steps: int) -> str:
    (folder / "my.yaml").write_text(CONFIG.replace("STEPS", str(steps)))
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

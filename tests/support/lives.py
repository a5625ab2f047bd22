"""A run that is killed again and again, and what must hold after each time; for tests/chaos/."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import forked

from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder, step_of

SABOTEUR = Path(__file__).parent / "saboteur" / "sitecustomize.py"
COMMAND = [*forked.COMMAND, "train"]

CONFIG = """
model: {name_or_path: tiny}
data: {train: example, eval: example}
lora: {lora_dropout: 0.1}
train: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: STEPS, learning_rate: 3e-3,
        eval_strategy: steps, eval_steps: 3, save_strategy: steps, save_steps: 2, save_total_limit: 2}
log: {logging_steps: 3, wandb: off}
"""


def write_config(folder: Path, steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "my.yaml"
    file.write_text(CONFIG.replace("STEPS", str(steps)))
    return file


@dataclass
class Life:
    """One run folder, and the command that is given again and again."""

    config: Path
    name: str
    processes: int

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.parent / self.name)

    @property
    def argv(self) -> list[str]:
        """The command; one process is started by hand, without an agent, which is another way to be
        killed."""
        arguments = [str(self.config), f"run_dir={self.run.path}"]
        if self.processes == 1:
            return [sys.executable, "-m", "qwenlora.trainer.main", *arguments]
        return [*COMMAND, *arguments, "--nproc", str(self.processes)]

    def start(self, plan: dict | None = None) -> subprocess.Popen:
        """Give the command. plan: what the saboteur does."""
        plan_of_saboteur = {"QWENLORA_CHAOS": json.dumps(plan or {}), forked.SABOTAGE: str(SABOTEUR)}
        environment = os.environ | plan_of_saboteur
        return forked.Popen(
            self.argv,
            env=environment,
            cwd=self.config.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def attempt(self, plan: dict | None = None) -> tuple[int, str]:
        """Give the command and wait; return its exit code and what it said. Each attempt must keep what was
        saved."""
        before = max(self.newest(), *self.unnamed())
        with self.start(plan) as process:
            said = process.communicate(timeout=300)[0]
        self.wait_for_silence()
        assert "Traceback" not in said, said
        assert self.newest() >= before, f"checkpoint-{before} was lost: {said}"
        if "resuming from checkpoint-" in said:
            assert f"resuming from checkpoint-{before}\n" in said, said
        assert not before or "starting from the first step" not in said, said
        return process.returncode, said

    def newest(self) -> int:
        """Return the step of the newest whole checkpoint, 0 without one. A name that is no whole one is a
        failure."""
        flaws = {path.name: checkpoints.flaw(path) for path in self.run.checkpoints()}
        assert not any(flaws.values()), flaws
        return max((step_of(path) for path in self.run.checkpoints()), default=0)

    def unnamed(self) -> list[int]:
        """Return the steps of checkpoints that were killed when they were whole and had no name yet, and 0;
        the next attempt gives them theirs."""
        staged = self.run.path.glob(".staging-checkpoint-*")
        return [0, *(checkpoints.read(path).step for path in staged if not checkpoints.flaw(path))]

    def wait_for_silence(self) -> None:
        """Wait until no process of this run is left: the kernel ends them one after the other."""
        import psutil

        for _ in range(1200):
            left = [
                one
                for one in psutil.process_iter(["cmdline", "name"])
                # one that is about to end has no command line any more
                if str(self.run.config) in (one.info["cmdline"] or [])
                or (not one.info["cmdline"] and one.info["name"].startswith(("rank-", "prepare")))
            ]
            if not left:
                return
            time.sleep(0.05)
        raise AssertionError(f"still there: {left}")

    def history(self) -> list[tuple]:
        """Return all that was logged and does not depend on the clock: (step, loss, grad_norm, lr,
        eval_loss)."""
        keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        return [tuple(line.get(key) for key in keys) for line in lines]

    def adapter(self) -> bytes:
        return (self.run.adapter / "adapter_model.safetensors").read_bytes()

    def assert_equals(self, undisturbed: "Life") -> None:
        """The final history and adapter are those of the run that nobody disturbed, to the bit."""
        assert self.history() == undisturbed.history()
        assert self.adapter() == undisturbed.adapter()
        leftovers = [
            p.name
            for p in self.run.path.iterdir()
            if p.name.startswith((".staging", ".removing", ".adapter"))
        ]
        assert not leftovers

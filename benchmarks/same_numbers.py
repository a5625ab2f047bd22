"""Whether a change leaves the numbers alone: five runs, and the SHA-256 of what each has trained.

python benchmarks/same_numbers.py FOLDER [NAME ...]

Run it with the package before a change and after it, on the same machine; the printed table must not differ.
FOLDER keeps the runs, in which a difference can be looked for. NAME: only these runs.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from qwenlora.cli.main import main; main()"]
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SHORT = "train.max_steps=40"
DROPOUT = "lora.lora_dropout=0.1"
# {name: the arguments of each attempt, in order}
RUNS = {
    "tiny": [[]],
    "two-ranks": [[SHORT, DROPOUT, "--nproc", "2"]],
    "zero3": [["train.max_steps=20", "strategy.name=zero3", "--nproc", "2"]],
    "nf4": [["train.max_steps=20", "strategy.quantization=nf4"]],
    "resumed": [["train.max_steps=15", DROPOUT], [SHORT, DROPOUT]],
}


def main(folder: Path, names: list[str]) -> None:
    """Make the runs and print, for each, the hash of its adapter and of its logged losses and gradient
    norms."""
    for name in names or RUNS:
        for arguments in RUNS[name]:
            run_dir = folder / name
            overrides = [
                f"run_dir={run_dir}",
                "log.wandb=off",
                "train.save_strategy=steps",
                "train.save_steps=10",
            ]
            command = [*COMMAND, "train", str(TINY), *overrides, *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        adapter = hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        lines = [
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        numbers = json.dumps([[line.get(key) for key in keys] for line in lines])
        metrics = hashlib.sha256(numbers.encode()).hexdigest()
        print(f"{name:10} adapter {adapter[:16]} metrics {metrics[:16]}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])

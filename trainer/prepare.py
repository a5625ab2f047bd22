"""Everything that is done once before the ranks start: the base model is found, the data tokenised, limits checked.

`python -m qwenlora.trainer.main runs/my-run/config.yaml --prepare-only`: a process of its own, so that no rank waits
in a collective meanwhile. What it counted is left in the run folder's prepared/facts.json for whoever shows it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qwenlora.configs import Config
from qwenlora.data import prepared
from qwenlora.jobs.disk import write_atomically
from qwenlora.jobs.run import RunFolder
from qwenlora.trainer import model as models
from qwenlora.trainer.training import check_settings

# what a checkpoint holds for each trainable number: itself and Adam's two moments, in float32
CHECKPOINT_BYTES_PER_PARAMETER = 12
TOKENIZER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Facts:
    """What is known before the first step. data: the prepared folder's counts, by side."""

    base: str
    base_fingerprint: str
    data_folder: str
    files_key: str
    data: dict[str, dict[str, Any]]
    parameters: models.Parameters
    checkpoint_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        return vars(self) | {"parameters": self.parameters._asdict()}

    @property
    def data_identity(self) -> str:
        """What the rows are, whichever version of the code prepared them."""
        return " ".join(f"{side}:{counts['sha256']}" for side, counts in self.data.items())


def prepare(config: Config, run: RunFolder, console: Console | None = None) -> Facts:
    """Make the run folder ready for ranks. Raises: ValueError when the run cannot start. console: for progress bars."""
    _check_device(config)
    base = models.base_of(config, run)
    tokenizer = models.load_tokenizer(config, base)
    fingerprint = models.fingerprint(config, base)
    parameters = models.count_parameters(config, base)
    checkpoint_bytes = parameters.trainable * CHECKPOINT_BYTES_PER_PARAMETER + TOKENIZER_BYTES
    _check_space(run.path, checkpoint_bytes)
    key = prepared.key_of(config.data, tokenizer)
    run.prepared.mkdir(exist_ok=True)
    counts = prepared.prepare(config.data, tokenizer, run.prepared / key, console)
    check_settings(config, counts["train"]["rows"])
    files = prepared.files_key(config.data)
    facts = Facts(base, fingerprint, key, files, counts, parameters, checkpoint_bytes)
    if run.trained and run.facts.exists():
        _refuse_another(run, read_facts(run), facts)
    write_atomically(run.facts, json.dumps(facts.as_dict(), indent=1, ensure_ascii=False))
    return facts


def read_facts(run: RunFolder) -> Facts:
    """Return what prepare left in the run folder."""
    values: dict[str, Any] = json.loads(run.facts.read_text(encoding="utf-8"))
    return Facts(**values | {"parameters": models.Parameters(**values["parameters"])})


def _refuse_another(run: RunFolder, then: Facts, now: Facts) -> None:
    if then.data_identity != now.data_identity:
        what = "other data: the files or the tokenizer changed since"
    elif then.base_fingerprint != now.base_fingerprint:
        what = "a base model with other weights"
    else:
        return
    raise ValueError(
        f"run_dir={run.path} was trained on {what};"
        " restore them, choose another run_dir, or --fresh to set the old run aside"
    )


def _check_device(config: Config) -> None:
    if torch.cuda.is_available():
        return
    if config.model.dtype == "float16":
        raise ValueError("model.dtype=float16 needs a GPU, and there is none here; set model.dtype: auto or bfloat16")
    if config.model.attn_implementation.startswith("flash"):
        raise ValueError(
            f"model.attn_implementation={config.model.attn_implementation} needs a GPU, and there is none here;"
            " set model.attn_implementation: sdpa"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"run_dir={folder} has {free / 2**20:.0f} MiB free, one checkpoint needs {needed / 2**20:.0f} MiB;"
            " free some, or choose a run_dir on another disk"
        )

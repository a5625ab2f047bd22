"""Preparation before the ranks start: find the base, tokenise the rows, refuse what would fail later. It is a
process of its own, trainer/main.py with --prepare-only, so that no rank waits in a collective meanwhile. Its
counts go to the run folder's facts.json."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from qwenlora.configs import Config, combinations
from qwenlora.data import freshness, prepared
from qwenlora.data.report import notes_of
from qwenlora.plan.plan import bytes_of_checkpoint
from qwenlora.run.changes import allows
from qwenlora.run.checkpoints import flaw
from qwenlora.run.disk import free_bytes, write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Facts
from qwenlora.trainer.loop.arguments import check_optimizer, check_settings
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model import pretrained, quantised, router_loss, row_states, suitability
from qwenlora.trainer.model.files import check_files
from qwenlora.trainer.model.lora import count_parameters
from qwenlora.trainer.ranks import gpus
from qwenlora.trainer.spread import sequence

SMALL_FILES_BYTES = 2**16


def prepare(
    config: Config, run: RunFolder, console: Console | None = None, allowed: tuple[str, ...] = ()
) -> Facts:
    """Make the run folder ready for the ranks; return its facts. Raises: ValueError when it cannot. console:
    for progress bars; allowed: config keys that may differ from the run's earlier attempts."""
    _check_device(config)
    check_optimizer(config.train)
    check_files(config)
    base = pretrained.base_of(config, run)
    model_config = pretrained.load_config_of(config, base)
    quantised.check(config, kind := pretrained.quantised_files(model_config))
    suitability.check_task(config, model_config)
    sequence.check(config, model_config)
    if packs_rows(config):
        row_states.check(config, model_config)
    stamp = freshness.stamp(config, base, on_gpu=torch.cuda.is_available())  # before anything is read
    tokenizer = pretrained.load_tokenizer(config, base)
    fingerprint = models.fingerprint(config, base)
    whole = (checkpoint for checkpoint in run.checkpoints() if not flaw(checkpoint, thorough=False))
    parameters = count_parameters(config, base, next(whole, None))
    checkpoint_bytes = bytes_of_checkpoint(parameters) + SMALL_FILES_BYTES
    checkpoint_bytes += len(tokenizer.backend_tokenizer.to_str(True).encode())
    _check_space(run.path, checkpoint_bytes)
    rows = prepare_rows(config, tokenizer, pretrained.embeddings_of(config, base), run, console)
    longest = max(counts.longest for counts in rows.counts.values())
    suitability.check_lengths(config, model_config, longest)
    facts = Facts(
        base=base,
        base_fingerprint=fingerprint,
        data_folder=str(rows.folder),
        files_key=rows.files_key,
        data=rows.counts,
        packing=packs_rows(config),
        bad_rows=rows.index.bad.count,
        notes=[
            *pretrained.notes_on(config, base),
            *router_loss.notes_on(config, model_config, parameters),
            *row_states.notes_on(model_config),
            *suitability.notes_on_lengths(model_config, longest),
            *notes_of(config, rows),
        ],
        parameters=parameters,
        checkpoint_bytes=checkpoint_bytes,
        stamp=stamp,
        text_only=not rows.trains_turns(tokenizer),
        base_quantised=kind,
    )
    check_settings(config, facts.units)
    if run.trained and run.facts.exists():
        _refuse_other_data(run, run.read_facts(), facts, allowed)
    run.write_facts(facts)
    return facts


def prepare_rows(
    config: Config, tokenizer: Any, embeddings: int, run: RunFolder, console: Console | None = None
) -> prepared.Prepared:
    """Return the run's rows as tokens. embeddings: how many tokens the base has one for. Raises: ValueError
    when they cannot be trained as the config says."""

    def say(line: str) -> None:
        if console:
            console.print(line, soft_wrap=True)

    rows = prepared.prepare(config.data, tokenizer, run.cache(config), console, say)
    if rows.index.bad.count:
        write_atomically(run.bad_rows, "".join(f"{line}\n" for line in rows.bad_lines()))
    else:
        run.bad_rows.unlink(missing_ok=True)
    rows.refuse(config.data, tokenizer, embeddings)
    if rows.index.bad.count:
        say(f"left out, all of them listed in {run.bad_rows}: {rows.bad_report}")
    return rows


def packs_rows(config: Config) -> bool:
    """Whether rows are packed on this machine."""
    return combinations.packs_rows(config, on_gpu=torch.cuda.is_available())


def _refuse_other_data(run: RunFolder, then: Facts, now: Facts, allowed: tuple[str, ...] = ()) -> None:
    """Refuse to resume with other rows or base weights than the run was trained on. Raises: ValueError."""
    if not allows("data", allowed) and then.packing != now.packing:
        was, is_now = ("on" if packing else "off" for packing in (then.packing, now.packing))
        raise ValueError(
            f"run_dir={run.path} was trained with packing {was}, here it would be {is_now} (data.packing:"
            " auto is on with a GPU, and off with strategy.sequence_parallel under sdpa); go on as it was,"
            " choose another run_dir, or --fresh to set the old run aside"
        )
    if then.data_identity != now.data_identity and not allows("data", allowed):
        what, key = "other data: the files or the tokenizer changed since", "data"
    elif then.base_fingerprint not in (now.base_fingerprint, models.UNKNOWN) and not allows("model", allowed):
        fingerprints = f"then {then.base_fingerprint}, now {now.base_fingerprint}"
        what, key = f"a base model with other weights ({fingerprints})", "model"
    else:
        return
    raise ValueError(
        f"run_dir={run.path} was trained on {what}; restore them, choose another run_dir, or --fresh to set"
        f" the old run aside (to go on all the same: --allow-config-change {key})"
    )


def _check_device(config: Config) -> None:
    gpus.check()
    if torch.cuda.is_available():
        _check_attention(config.model.attn_implementation)
        return
    if config.model.dtype == "float16":
        raise ValueError(
            "model.dtype=float16 needs a GPU, and there is none here; set model.dtype: auto or bfloat16"
        )
    if config.model.attn_implementation.startswith("flash"):
        raise ValueError(
            f"model.attn_implementation={config.model.attn_implementation} needs a GPU, and there is none"
            " here; set model.attn_implementation: sdpa"
        )


def _check_attention(name: str) -> None:
    """Refuse flash attention without its package. Raises: ValueError."""
    packages = {
        "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
        "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    }
    available, package = packages.get(name, (lambda: True, ""))
    if not available() and not is_kernels_available():  # the hub's kernels, which transformers takes instead
        raise ValueError(
            f"model.attn_implementation={name} needs the package {package}, which is not here, or is too old:"
            f" pip install {package}, or set model.attn_implementation: sdpa"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise ValueError(
            f"run_dir={folder} has {free / 2**20:.0f} MiB free, one checkpoint needs {needed / 2**20:.0f}"
            " MiB; free some, or choose a run_dir on another disk"
        )

"""Whether an adapter is whole, fits its base and holds something: `qwenlora verify runs/tiny`.

Reads the adapter's file and the base's config.json; no weight of the base is loaded. What the adapter must
hold is what peft itself would make for that base, on torch's meta device. Answers' quality is compare.py's.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwenlora.adapter.subject import CONFIG, Subject, adapter_config
from qwenlora.run import checkpoints
from qwenlora.run.disk import broken_seal, sha256
from qwenlora.trainer.model import base as models

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# what no config of a run can set, and would change what an adapter does without changing a shape
PLAIN = {
    "alpha_pattern": {},
    "rank_pattern": {},
    "init_lora_weights": True,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "fan_in_fan_out": False,
}
STACKED = "gate_up_proj"  # two matrices in one: peft gives it twice the rank by such a pattern
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # .bin: peft before 0.7


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter that is right. numbers: of all tensors; still: modules whose lora_B is all
    zero."""

    file: Path
    sha256: str
    tensors: int
    numbers: int
    dtypes: tuple[str, ...]
    modules: tuple[str, ...]
    still: tuple[str, ...]
    architecture: str
    same_weights: bool | None
    config: dict[str, Any]


def check(subject: Subject) -> Facts:
    """Return an adapter's facts.

    Raises: ValueError naming what is wrong: the file, a name or shape that does not fit the base, a number
    that is none, an adapter that changes nothing, a checkpoint that is not as it was written, a base with
    other weights.
    """
    if subject.adapter is None:
        raise ValueError(
            f"{subject.named} is a model, not an adapter; name a run, a checkpoint or an adapter's folder"
        )
    folder = subject.adapter
    own_checkpoint = subject.run is not None and folder != subject.run.adapter
    if (own_checkpoint or (folder / checkpoints.MANIFEST).exists()) and (why := checkpoints.flaw(folder)):
        raise ValueError(f"{folder} {why}")
    if why := broken_seal(folder):
        raise ValueError(f"{folder} {why}; copy it anew, or train it again")
    file, weights = read(folder)
    config = adapter_config(folder)
    _refuse_other_settings(subject, config)
    architecture = _fits(subject, file, weights)
    if odd := [name for name, values in sorted(weights.items()) if values.dtype not in DTYPES]:
        raise ValueError(
            f"{file}: {odd[0]} is {weights[odd[0]].dtype}{_more(odd)}, expected float32, float64, float16 or"
            " bfloat16"
        )
    if broken := [name for name, values in sorted(weights.items()) if not values.isfinite().all()]:
        raise ValueError(
            f"{file}: {broken[0]} holds numbers that are not finite{_more(broken)}; train it again"
        )
    seconds = {
        name: bool(values.any())
        for name, values in weights.items()
        if ".lora_B" in name or "embedding_B" in name
    }
    others = [name for name in weights if "lora_" not in name]
    scaled = config.get("lora_alpha") != 0 and any(
        bool(v.any()) for n, v in weights.items() if "lora_A" in n or "g_A" in n
    )
    if seconds and not scaled and not others:
        raise ValueError(
            f"{file}: every lora_A is zero, or lora_alpha is, so the adapter changes nothing; train it again"
        )
    if seconds and not any(seconds.values()) and not others:
        raise ValueError(
            f"{file}: every lora_B is zero, so the adapter changes nothing: it was saved before its first"
            " step, or gathered wrong; train it again"
        )
    return Facts(
        file,
        sha256(file),
        len(weights),
        sum(values.numel() for values in weights.values()),
        tuple(sorted({str(values.dtype).removeprefix("torch.") for values in weights.values()})),
        tuple(sorted({_module(name) for name in weights})),
        tuple(sorted(name for name, moved in seconds.items() if not moved)),
        architecture,
        _same_weights(subject),
        config,
    )


def read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return an adapter's file and its tensors, on the CPU. Raises: ValueError when it cannot be read."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has {CONFIG}, but no {WEIGHTS[0]}; copy it there, or train it again")
    try:
        if file.suffix == ".bin":
            held: Any = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with safe_open(file, framework="pt") as opened:
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, TypeError) as error:
        raise _unreadable(file, error) from None
    except Exception as error:  # weights_only refuses with what pickle raises
        raise _unreadable(file, error) from None
    if not isinstance(held, Mapping) or not all(isinstance(values, Tensor) for values in held.values()):
        raise ValueError(f"{file} holds no tensors by name; expected what peft's save_pretrained writes")
    if not held:
        raise ValueError(f"{file} is empty: it holds no tensor; train it again")
    return file, dict(held)


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    )


def _fits(subject: Subject, file: Path, weights: dict[str, Tensor]) -> str:
    """Return the base's architecture, once names and shapes are those that peft makes for it."""
    base = models.load_config_of(subject.config, subject.base)
    with torch.device("meta"), _silently():
        model = AutoModelForCausalLM.from_config(
            base, trust_remote_code=subject.config.model.trust_remote_code
        )
        try:
            model = get_peft_model(model, PeftConfig.from_pretrained(str(subject.adapter)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file.parent / CONFIG} does not fit {subject.base}: {str(error).splitlines()[0]}"
            ) from None
        needed = get_peft_model_state_dict(model, save_embedding_layers=False)
        known = get_peft_model_state_dict(model, save_embedding_layers=True)
    if missing := sorted(set(needed) - set(weights)):
        raise ValueError(
            f"{file} lacks {missing[0]}{_more(missing)}, which its {CONFIG} and {subject.base} need"
        )
    extra = sorted(
        name for name in set(weights) - set(needed) if ".base_layer." not in name and name in known
    )
    if extra:
        raise ValueError(
            f"{file} has {extra[0]}{_more(extra)} besides, a matrix of the base that peft would put in the"
            " place of the base's own; save the adapter without it (save_embedding_layers=False), or name it"
            " in modules_to_save"
        )
    if unknown := sorted(set(weights) - set(known)):
        raise ValueError(f"{file} has {unknown[0]}{_more(unknown)}, which {subject.base} has no place for")
    for name in sorted(weights):
        if weights[name].shape != known[name].shape:
            raise ValueError(
                f"{file}: {name} is {_size(weights[name])}, {subject.base} needs {_size(known[name])}; it was"
                " trained on another base: name that with --base"
            )
    return str((base.architectures or [type(model).__name__])[0])


@contextmanager
def _silently() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_other_settings(subject: Subject, config: dict[str, Any]) -> None:
    """Refuse an adapter whose adapter_config.json no longer says what its run trained: no shape would
    tell."""
    if subject.run is None:
        return
    lora = subject.config.lora
    trained_with = {key: getattr(lora, key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")} | PLAIN
    for key, trained in trained_with.items():
        found = config.get(key, trained)
        if isinstance(found, dict):  # peft notes its own for experts, whose matrices are stacked
            found = {module: value for module, value in found.items() if not module.endswith(STACKED)}
        if found != trained:
            raise ValueError(
                f"{subject.adapter}/{CONFIG} says {key}={found}, the run was trained with {trained}; copy the"
                " file anew"
            )


def _same_weights(subject: Subject) -> bool | None:
    """Return whether the base has the weights that a run was trained on; None: not known.

    Raises: ValueError when it has others.
    """
    if subject.run is None or not subject.run.facts.is_file():
        return None
    try:
        trained_on = subject.run.read_facts().base_fingerprint
    except ValueError as error:
        raise ValueError(f"{subject.run.facts} cannot be read: {error}") from None
    if trained_on == models.UNKNOWN:
        return None
    if (found := models.fingerprint(subject.config, subject.base)) != trained_on:
        raise ValueError(
            f"{subject.named} was trained on a base with other weights than {subject.base} has now"
            f" (fingerprint {trained_on}, found {found}); name the folder with the right ones with --base"
        )
    return True


def show(subject: Subject) -> int:
    """Print an adapter's facts; return the exit code."""
    facts = check(subject)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    size = f"{'/'.join(facts.dtypes)}, {facts.file.stat().st_size / 1e6:,.1f} MB"
    table.add_row("adapter", f"whole: {facts.tensors} tensors, {facts.numbers:,} numbers, {size}")
    table.add_row("kind", _kind(facts))
    said = ", and has the weights that it was trained on (samples of each, or the hub's commit)" * bool(
        facts.same_weights
    )
    table.add_row("base", f"{subject.base} ({facts.architecture}): names and shapes fit{said}")
    table.add_row("sha256", facts.sha256)
    Console(markup=False, highlight=False).print(table)
    if facts.still:
        print(
            f"warning: {len(facts.still)} modules are unchanged, their lora_B is zero: {facts.still[0]}",
            file=sys.stderr,
        )
    return 0


def _kind(facts: Facts) -> str:
    config = facts.config
    name = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    counts = Counter(module.rpartition(".")[2] for module in facts.modules)
    whole = f"; whole: {', '.join(config['modules_to_save'])}" if config.get("modules_to_save") else ""
    on = ", ".join(f"{count} {module}" for module, count in sorted(counts.items()))
    return f"{name}, r {config.get('r')}, alpha {config.get('lora_alpha')}, on {on}{whole}"


def _module(name: str) -> str:
    """Return the module that a tensor of an adapter belongs to."""
    name = name.removeprefix("base_model.model.")
    return (
        name.partition(".lora_")[0]
        if ".lora_" in name
        else name.removesuffix(".weight").removesuffix(".base_layer")
    )


def _size(values: Tensor) -> str:
    return " x ".join(map(str, values.shape))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

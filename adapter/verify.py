"""Whether an adapter is whole, fits its base and changes something: `qwenlora verify runs/tiny`.

No weight of the base is loaded: names and shapes are compared with those that peft makes for its config.json.
compare/ judges the answers.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from qwenlora.adapter.adapter_file import check_numbers, read_adapter
from qwenlora.adapter.deferred import Deferred
from qwenlora.adapter.ordinary import ordinary_base, ordinary_shapes
from qwenlora.adapter.subject import ADAPTER_CONFIG, AdapterConfig, Subject, lora_kind, read_adapter_config
from qwenlora.plan.adapter import PATTERNS
from qwenlora.run import checkpoints
from qwenlora.run.disk import broken_seal, sha256
from qwenlora.run.format import and_more
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model import quantised
from qwenlora.trainer.model.files import without_peft_s_own
from qwenlora.trainer.model.headers import TensorValues
from qwenlora.trainer.model.names import has_vision, todays

if TYPE_CHECKING:
    from qwenlora.adapter import peft_shapes
    from qwenlora.trainer.model import pretrained
else:
    peft_shapes = Deferred("qwenlora.adapter.peft_shapes", quietly=False)
    pretrained = Deferred("qwenlora.trainer.model.pretrained", quietly=False)

# keys that a run's config cannot set, and that change what an adapter does but no shape
PLAIN = {"alora_invocation_tokens": None, "layer_replication": None, "fan_in_fan_out": False}
SET = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "trainable_token_indices"),
    *PATTERNS,
)


@dataclass(frozen=True)
class VerifiedAdapter:
    """An adapter in which nothing is wrong. numbers: in all tensors; unchanged: modules whose lora_B is zero,
    or that are as they began.

    same_weights: True if the base has the weights that the adapter was trained on, None if that is not known.
    """

    file: Path
    sha256: str
    tensors: int
    numbers: int
    dtypes: tuple[str, ...]
    modules: tuple[str, ...]
    unchanged: tuple[str, ...]
    architecture: str
    same_weights: bool | None
    config: AdapterConfig


def check_adapter(subject: Subject) -> VerifiedAdapter:
    """Return an adapter's facts. Raises: ValueError naming the file, tensor or setting that is wrong."""
    if subject.adapter is None:
        raise ValueError(
            f"{subject.name} is a model, not an adapter; name a run, a checkpoint or an adapter's folder"
        )
    folder = subject.adapter
    _check_files(folder, is_checkpoint=subject.run is not None and folder != subject.run.adapter)
    file, weights = read_adapter(folder)
    config = read_adapter_config(folder)
    _check_settings(subject, config)
    architecture = _check_shapes(subject, file, weights)
    check_numbers(file, weights)
    changed = _changed_modules(weights, begun=subject.config.lora.takes_from_base)
    _check_change(file, weights, config, changed)
    return VerifiedAdapter(
        file,
        sha256(file),
        len(weights),
        sum(values.raw.size for values in weights.values()),
        tuple(sorted({values.dtype for values in weights.values()})),
        tuple(sorted({_module_of(name) for name in weights})),
        tuple(sorted(name for name, is_changed in changed.items() if not is_changed)),
        architecture,
        _check_base_weights(subject),
        config,
    )


def _check_files(folder: Path, *, is_checkpoint: bool) -> None:
    """Raise ValueError when a file is missing, or is not as it was written."""
    if (is_checkpoint or (folder / checkpoints.MANIFEST).exists()) and (flaw := checkpoints.flaw(folder)):
        raise ValueError(f"{folder} {flaw}")
    if flaw := broken_seal(folder):
        raise ValueError(f"{folder} {flaw}; copy it anew, or train it again")


def _changed_modules(weights: Mapping[str, TensorValues], *, begun: bool) -> dict[str, bool]:
    """Return {lora_B: whether its layer computes something else than the base}. begun: whether the beginning
    lies beside what was trained, [A; A0] and [B, -B0]."""
    changed = {}
    for name, values in weights.items():
        if ".lora_B" not in name and "embedding_B" not in name:
            continue
        changed[name] = bool(values.numbers.any())
        if begun:
            a, a0 = np.split(_matrix(weights[name.replace("lora_B", "lora_A")]), 2)
            b, minus_b0 = np.split(_matrix(values), 2, axis=1)
            changed[name] = bool(b.any()) and bool((a != a0).any() or (b != -minus_b0).any())
    return changed


def _matrix(values: TensorValues) -> npt.NDArray[Any]:
    return values.numbers.reshape(values.raw.shape)


def _check_change(
    file: Path, weights: Mapping[str, TensorValues], config: AdapterConfig, changed: Mapping[str, bool]
) -> None:
    """Raise ValueError when an adapter changes nothing."""
    if not changed or any("lora_" not in name for name in weights):
        return
    lora_a = [values for name, values in weights.items() if "lora_A" in name or "g_A" in name]
    if config.get("lora_alpha") == 0 or not any(bool(values.numbers.any()) for values in lora_a):
        raise ValueError(
            f"{file}: every lora_A is zero, or lora_alpha is, so the adapter changes nothing; train it again"
        )
    if not any(changed.values()):
        raise ValueError(
            f"{file}: every lora_B is zero, or as it began, so the adapter changes nothing: it was saved"
            " before its first step, its learning rate was 0, or it was gathered wrong; train it again"
        )


def _check_shapes(subject: Subject, file: Path, weights: Mapping[str, TensorValues]) -> str:
    """Return the base's architecture. Raises: ValueError unless peft makes the same names and shapes."""
    base = ordinary_base(subject)
    found = {name: values.raw.shape for name, values in weights.items()}
    if base and ordinary_shapes(read_adapter_config(file.parent), base.config) == found:
        return base.config.architectures[0]
    return peft_shapes.check_shapes(subject, file, weights)


def _check_settings(subject: Subject, config: AdapterConfig) -> None:
    """Refuse an adapter_config.json that differs from what the run trained with: no shape would show it."""
    if subject.run is None:
        return
    lora = subject.config.lora.in_files
    expected = {key: getattr(lora, key) for key in SET} | PLAIN
    for key, trained in expected.items():
        value = config.get(key, trained)
        if key in PATTERNS and key in config:
            value = without_peft_s_own(config, lora, key)
        if value != trained:
            raise ValueError(
                f"{subject.adapter}/{ADAPTER_CONFIG} says {key}={value}, the run was trained with {trained};"
                " copy the file anew"
            )


def _check_base_weights(subject: Subject) -> bool | None:
    """Return True if the run was trained on this base, None: not known. Raises: ValueError for another."""
    if subject.run is None or not subject.run.facts.is_file():
        return None
    try:
        trained_on = subject.run.read_facts().base_fingerprint
    except ValueError as error:
        raise ValueError(f"{subject.run.facts} cannot be read: {error}") from None
    if trained_on == models.UNKNOWN:
        return None
    if (fingerprint := models.fingerprint(subject.config, subject.base)) != trained_on:
        if quantised_base_of(subject) and not _is_quantised(subject):
            return None  # as the model in full precision, into which it can be merged
        raise ValueError(
            f"{subject.name} was trained on a base with other weights than {subject.base} has now"
            f" (fingerprint {trained_on}, found {fingerprint}); name the folder with the right ones with"
            " --base"
        )
    return True


def quantised_base_of(subject: Subject) -> str:
    """Return how the files are quantised that a run was trained over; empty when they are not."""
    if subject.run is None or not subject.run.facts.is_file():
        return ""
    return quantised.trained_over(subject.run.read_facts())


def _is_quantised(subject: Subject) -> bool:
    if ordinary_base(subject):
        return False
    return bool(pretrained.quantised_files(pretrained.load_config_of(subject.config, subject.base)))


def notes_on(subject: Subject) -> list[str]:
    """Return what the user is told about an adapter's base."""
    base = ordinary_base(subject)
    notes = base.notes if base else pretrained.notes_on(subject.config, subject.base)
    notes += [] if base else _notes_on_names(subject)
    if (kind := quantised_base_of(subject)) and not _is_quantised(subject):
        notes.append(
            f"trained over quantised files ({kind}); that they were made from {subject.base} is not checked"
        )
    return notes


def _notes_on_names(subject: Subject) -> list[str]:
    """Return what the user is told about an adapter whose names vLLM would not find in the base."""
    if subject.adapter is None or not has_vision(pretrained.read_config_of(subject.config, subject.base)):
        return []
    _, weights = read_adapter(subject.adapter)
    today = todays(weights)
    if not (older := sorted(weights.keys() - today.keys())):
        return []
    return [
        f"names of its tensors ({older[0]}{and_more(older)}) lack language_model, without which vLLM leaves"
        " them out and says nothing: `qwenlora export` of its run writes today's names"
    ]


def print_check(subject: Subject) -> int:
    """Check an adapter and print its facts; return the exit code."""
    verified = check_adapter(subject)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    size = f"{'/'.join(verified.dtypes)}, {verified.file.stat().st_size / 1e6:,.1f} MB"
    table.add_row("adapter", f"whole: {verified.tensors} tensors, {verified.numbers:,} numbers, {size}")
    table.add_row("kind", _kind(verified))
    weights = ", and has the weights that it was trained on (samples of each, or the hub's commit)"
    fits = f"{subject.base} ({verified.architecture}): names and shapes fit"
    table.add_row("base", fits + weights * bool(verified.same_weights))
    table.add_row("sha256", verified.sha256)
    Console(markup=False, highlight=False).print(table)
    for note in notes_on(subject):
        print(f"note: {note}", file=sys.stderr)
    if unchanged := verified.unchanged:
        print(
            f"warning: {len(unchanged)} modules are unchanged, their lora_B is zero, or as it began:"
            f" {unchanged[0]}",
            file=sys.stderr,
        )
    return 0


def _kind(verified: VerifiedAdapter) -> str:
    config = verified.config
    counts = Counter(module.rpartition(".")[2] for module in verified.modules)
    whole = f"; whole: {', '.join(config['modules_to_save'])}" if config.get("modules_to_save") else ""
    tokens = config.get("trainable_token_indices") or []
    named = [tokens] if isinstance(tokens, list) else list(tokens.values())
    if number := len({token for ids in named for token in ids}):
        whole += f"; embeddings of {number} token{'s' * (number > 1)}"
    on = ", ".join(f"{count} {module}" for module, count in sorted(counts.items()))
    return f"{lora_kind(config)}, r {config.get('r')}, alpha {config.get('lora_alpha')}, on {on}{whole}"


def _module_of(name: str) -> str:
    """Return the module that a tensor of an adapter belongs to."""
    name = name.removeprefix("base_model.model.")
    for part in (".lora_", ".token_adapter."):
        if part in name:
            return name.partition(part)[0]
    return name.removesuffix(".weight").removesuffix(".base_layer")

"""Bases whose files are quantised (GPTQ, AWQ, 4 bits of bitsandbytes ...): LoRA trains over them, but nothing
can be merged into them, since an adapter's change is smaller than their steps."""

from collections.abc import Mapping
from contextlib import suppress

from qwenlora.configs.schema import Config
from qwenlora.run.records import Facts
from qwenlora.trainer.model.damage import read_json
from qwenlora.trainer.model.headers import CONFIG, find_file

HOW = "merge into the model in full precision that they were made from: --base FOLDER_OR_HUB_NAME"


def kind_of(settings: object) -> str:
    """Return how a base's files are quantised, as `bitsandbytes, 4 bits`; empty when they are not. settings:
    quantization_config of its config.json."""
    if not settings:
        return ""
    keys = settings if isinstance(settings, Mapping) else vars(settings)
    method = str(getattr(keys.get("quant_method"), "value", keys.get("quant_method") or "quantised"))
    loaded = next((n for n in (4, 8) if keys.get(f"load_in_{n}bit") or keys.get(f"_load_in_{n}bit")), None)
    bits = keys.get("bits") or keys.get("w_bit") or loaded
    return f"{method}, {bits} bits" if bits else method


def check(config: Config, kind: str) -> None:
    """Refuse to quantise anew what the files hold quantised. kind: kind_of's. Raises: ValueError."""
    asked = config.strategy.quantization
    same = {"nf4": "bitsandbytes, 4 bits", "int8": "bitsandbytes, 8 bits"}
    if kind and asked != "none" and kind != same[asked]:
        raise ValueError(
            f"strategy.quantization={asked}: the files of model.name_or_path={config.model.name_or_path} are"
            f" quantised already ({kind}); set strategy.quantization: none"
        )


def note(kind: str) -> str:
    """Return what the user of such a base is told. kind: kind_of's."""
    return f"the base is quantised in its files ({kind}), into which no adapter can be merged; {HOW}"


def trained_over(facts: Facts) -> str:
    """Return how the files of a run's base are quantised; empty when they are not, or that is not known."""
    if facts.base_quantised:
        return facts.base_quantised
    with suppress(OSError, ValueError):  # of an older version: its base may be gone
        if file := find_file(facts.base, CONFIG, local=True):
            return kind_of(read_json(file).get("quantization_config"))
    return ""

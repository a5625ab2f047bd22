"""What is refused of the model files that a config names, before torch is imported: it takes seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlora.configs.schema import Config, Lora
from qwenlora.plan.adapter import PATTERNS
from qwenlora.trainer.model.base import TINY, resolve
from qwenlora.trainer.model.damage import AGAIN, check_file, check_tokenizer, read_json, weight_files

# two matrices in one: where peft renames modules to it, it sets twice the rank and the alpha by this pattern;
# one of the two alone is a user's
STACKED = r".*\.gate_up_proj"


def peft_s_own(saved: Mapping[str, Any], lora: Lora, key: str) -> dict[str, int]:
    """Return what peft itself added to an adapter's rank_pattern or alpha_pattern. saved: its settings."""
    twice = {pattern: 2 * getattr(lora, of) for pattern, of in PATTERNS.items()}
    both = all((saved.get(pattern) or {}).get(STACKED) == twice[pattern] for pattern in PATTERNS)
    return {STACKED: twice[key]} if both and STACKED not in getattr(lora, key) else {}


def without_peft_s_own(saved: Mapping[str, Any], lora: Lora, key: str) -> dict[str, int]:
    """Return an adapter's rank_pattern or alpha_pattern without what peft itself added. saved: as there."""
    own = peft_s_own(saved, lora, key)
    return {name: number for name, number in (saved.get(key) or {}).items() if name not in own}


def check_files(config: Config) -> None:
    """Refuse a base, tokenizer or adapter that is missing or damaged, as far as it shows without loading it.
    Raises: ValueError naming it."""
    check_init_from(config.lora)
    model = config.model
    folder = None
    if model.name_or_path != TINY:
        folder = Path(resolve(model.name_or_path, "model.name_or_path"))
        if folder.is_dir() and not weight_files(folder):
            raise ValueError(f"model.name_or_path={folder} holds no weights (model*.safetensors); {AGAIN}")
    if model.tokenizer:
        folder = Path(resolve(model.tokenizer, "model.tokenizer"))
    if folder:
        check_tokenizer(folder)


def check_init_from(lora: Lora) -> None:
    """Refuse an adapter that is damaged, or whose settings are not the config's. Raises: ValueError."""
    if not lora.init_from:
        return
    folder = Path(lora.init_from).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file():
        inside = sorted(found.parent.name for found in folder.glob("*/adapter_config.json"))
        hint = f"; in it are {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"lora.init_from={lora.init_from} is no adapter folder: it has no adapter_config.json{hint}"
        )
    saved = read_json(file)
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "trainable_token_indices"):
        if saved.get(key, getattr(lora, key)) != getattr(lora, key):
            raise ValueError(
                f"lora.init_from={lora.init_from} has {key}={saved[key]}, the config says"
                f" {getattr(lora, key)}; set lora.{key}: {saved[key]}"
            )
    for key in PATTERNS:
        if (has := without_peft_s_own(saved, lora, key)) != (ours := getattr(lora, key)):
            raise ValueError(
                f"lora.init_from={lora.init_from} has {key}={has}, the config says {ours}; set lora.{key}:"
                f" {has}"
            )
    files = list(folder.glob("adapter_model.*"))
    if not files:
        raise ValueError(f"lora.init_from={lora.init_from} has no adapter_model.safetensors; {AGAIN}")
    for weights in files:
        check_file(weights)

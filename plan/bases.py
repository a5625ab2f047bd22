"""The base of a plan: its config.json in a folder or in the hub's cache, else what bases.yaml knows of it."""

import functools
from importlib import resources
from pathlib import Path

import yaml

from qwenlora.configs.schema import Model
from qwenlora.data.chunks import JsonObject
from qwenlora.plan.shape import Shape, read_values, shape_of

TINY = "tiny"  # model.name_or_path of the embedded model
# what a hub name adds to the size without another shape
_VARIANTS = {"instruct", "base", "chat", "thinking", "coder", "math", "2507", "hf"}
_TINY_SHAPE: JsonObject = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def shape_of_base(model: Model) -> tuple[Shape, str]:
    """Return the shape of the config's base, and where it is from. Raises: ValueError when it is unknown."""
    values, source = values_of_base(model)
    return shape_of(values, f"{model.name_or_path}: {source}"), source


def values_of_base(model: Model) -> tuple[JsonObject, str]:
    """Return the values of the base's config.json, and where they are from. Raises: ValueError when the base
    is unknown."""
    name = model.name_or_path
    if name == TINY:
        return _TINY_SHAPE, "the embedded model"
    if folder := folder_of(name, model.revision):
        cached = " in the hub's cache" * (folder != Path(name).expanduser())
        return read_values(folder), f"its config.json{cached}"
    if entry := _entry(name):
        return known()[entry], f"the table of known Qwens ({entry})"
    raise ValueError(
        f"model.name_or_path={name}: no such folder, not in the hub's cache, and not among the Qwens that a"
        f" plan knows ({', '.join(known())}); name a folder with its config.json, which is all a plan needs"
    )


@functools.cache
def known() -> dict[str, JsonObject]:
    """Return {name: values of config.json} of the Qwens in bases.yaml."""
    text = resources.files(__package__).joinpath("bases.yaml").read_text(encoding="utf-8")
    values: dict[str, JsonObject] = yaml.safe_load(text)
    return values


def _entry(name: str) -> str | None:
    """Return the longest entry whose words a hub name has, if the others are variants of the same shape."""
    words = name.rpartition("/")[2].lower().split("-")
    fitting = [entry for entry in known() if set(entry.lower().split("-")) <= set(words)]
    entry = max(fitting, key=len, default=None)
    rest = set(words) - set(entry.lower().split("-")) if entry else set(words)
    return entry if rest <= _VARIANTS else None


def folder_of(name: str, revision: str | None) -> Path | None:
    """Return a base's folder, or that of the hub's cache; None if it is not here."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _in_cache(name, revision)


def _in_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # late: most plans need a folder or the table

    if name.count("/") != 1:
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None

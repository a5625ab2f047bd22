"""Damage of a model's or adapter's folder that shows without loading it: files that are missing, cut short,
empty or Git LFS pointers, and a config.json of another model. An error names the file and the cure."""

import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from qwenlora.run.format import and_more
from qwenlora.trainer.model.headers import (
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    INDEX,
    WEIGHTS,
    Stored,
    stored_in,
)

OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
POINTER = b"version https://git-lfs"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt"),
)
Keys = dict[str, Any]  # of a JSON file, as anyone wrote it
AGAIN = "copy or download it again"


@cache  # both folders are asked for several times in a process
def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a file of a tokenizer that cannot be read."""
    for file in (folder / name for name in TOKENIZER_FILES):
        if file.is_file():
            (read_json if file.suffix == ".json" else _read_text)(file)


@cache
def check_model(folder: Path) -> None:
    """Raise ValueError when a model's config.json or weights are damaged, or of different models. A folder
    without weights passes."""
    files = weight_files(folder)
    for file in files:
        check_file(file)
    for file in (folder / CONFIG, folder / GENERATION_CONFIG):
        if file.is_file():
            read_json(file)
    for file in files if (folder / CONFIG).is_file() else []:
        for stored in stored_in(file) if file.suffix == ".safetensors" else []:
            _check_embeddings(folder / CONFIG, file, stored)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would load. Raises: ValueError for a broken index."""
    for single, index in ((WEIGHTS, INDEX), OLD_WEIGHTS):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [
                folder / name
                for name in sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            ]
            if lost := [file.name for file in files if not file.is_file()]:
                raise ValueError(
                    f"{folder} lacks {lost[0]}{and_more(lost)}, which its {index} names; {AGAIN}"
                )
            return files
    return []


def check_file(file: Path) -> None:
    """Raise ValueError for a file of weights that is empty, a pointer, or cut short."""
    _check_start(file)
    if file.suffix == ".safetensors":
        size, whole = file.stat().st_size, max((stored.stop for stored in stored_in(file)), default=0)
        if size < whole:
            raise ValueError(f"{file} is cut short: it has {size:,} of {whole:,} bytes; {AGAIN}")
        return
    with file.open("rb") as opened:
        is_zip = opened.read(2) == b"PK"  # torch.save's format; the one before torch 1.6 is no zip
    if is_zip and not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut short; {AGAIN}")


def read_json(file: Path) -> Keys:
    """Return a JSON file's keys. Raises: ValueError naming the file when it is broken."""
    try:
        keys = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}; {AGAIN}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{file} holds no keys; {AGAIN}")
    return keys


def _read_text(file: Path) -> str:
    try:
        _check_start(file)
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; {AGAIN}") from None


def _check_start(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if not start:
        raise ValueError(f"{file} is empty; {AGAIN}")
    if start == POINTER:
        raise ValueError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or"
            " download it again"
        )


def _check_embeddings(config_file: Path, file: Path, stored: Stored) -> None:
    """Refuse a config.json of another model than the weights are of, as their embeddings tell."""
    parts = stored.name.split(".")
    if parts[-2:] != ["embed_tokens", "weight"] or "visual" in parts or stored.dtype not in FLOATS:
        return
    config = read_json(config_file)
    text = config.get("text_config") or config
    for key, number in zip(("vocab_size", "hidden_size"), stored.shape, strict=False):
        if text.get(key, number) != number:
            raise ValueError(
                f"{config_file} says {key}={text[key]}, and {stored.name} in {file.name} is for {number}:"
                " they are of different models; download both again"
            )

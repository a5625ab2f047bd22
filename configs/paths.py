"""Names of files in a config that are relative to the folder in which its command was started."""

import glob
from collections.abc import Sequence
from pathlib import Path

from qwenlora.configs.schema import Config, SourceEntry, Sources

_OURS = ("tiny", "example")  # a model and rows that come with qwenlora


def located(config: Config, folders: Sequence[Path]) -> Config:
    """Return a config whose relative names of models and rows are absolute, where one of the folders has
    them. Other names stay: of the hub, or of files that are gone."""
    model, data = config.model, config.data
    names = {"name_or_path": _locate(model.name_or_path, folders)}
    if model.tokenizer:
        names["tokenizer"] = _locate(model.tokenizer, folders)
    rows = {"train": _locate_rows(data.train, folders), "eval": _locate_rows(data.eval, folders)}
    return config.model_copy(
        update={"model": model.model_copy(update=names), "data": data.model_copy(update=rows)}
    )


def _locate_rows(sources: Sources | None, folders: Sequence[Path]) -> Sources | None:
    if isinstance(sources, list):
        return [_locate_entry(entry, folders) for entry in sources]
    return None if sources is None else _locate_entry(sources, folders)


def _locate_entry(entry: str | SourceEntry, folders: Sequence[Path]) -> str | SourceEntry:
    if isinstance(entry, str):
        return _locate(entry, folders)
    return entry.model_copy(update={"path": _locate(entry.path, folders)})


def _locate(name: str, folders: Sequence[Path]) -> str:
    if name in _OURS or name.startswith("~"):
        return name
    there = (folder / name for folder in folders if _is_in(folder, name))
    return str(next(there, name))


def _is_in(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists() or any(glob.iglob(str(folder / name), recursive=True))  # noqa: PTH207
    except OSError:  # a name that is too long
        return False

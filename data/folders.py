"""The data files of a folder, by split, as the datasets library would read it.

The `configs` of a README.md decide; else the names of folders, then those of files: train, validation or dev,
test or eval. A folder without such names has one split, train, with all its files. The rules are written here
because importing the library takes seconds; tests/data/test_folders.py compares the two.
"""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from qwenlora.configs.schema import SourceEntry
from qwenlora.configs.yaml_file import parse_yaml
from qwenlora.data.bad_row import show
from qwenlora.data.row_io import EXTENSIONS, extension

CARD = "README.md"
DEFAULT_SPLIT = "train"
_NO_ROWS = ("dataset_info.json", "dataset_infos.json")  # they describe data sets: the hub's, LLaMA-Factory's
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_FOLDERS = {split: re.compile(rf"(.*[-._ 0-9])?({words})([-._ 0-9].*)?") for split, words in _WORDS.items()}
_FILES = {split: re.compile(rf"(.*[-._ 0-9])?({words})[-._ 0-9].*") for split, words in _WORDS.items()}
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", re.ASCII)

Splits = dict[str, list[Path]]


class _SplitFiles(BaseModel):
    split: str
    path: str | list[str]


class _Configuration(BaseModel):
    config_name: str
    data_files: str | list[str] | list[_SplitFiles] | None = None
    data_dir: str = ""
    default: bool = False


class _Card(BaseModel):
    configs: list[_Configuration] = []


class _Named(NamedTuple):
    """A source that names a folder. key: where it stands in the config, for messages."""

    folder: Path
    key: str
    entry: SourceEntry

    @property
    def is_called(self) -> str:
        return f"{self.key}={self.folder}"

    def has_no(self, what: str, wanted: str | None, known: list[str], example: str) -> ValueError:
        """Return the refusal of a split or configuration that the folder does not have."""
        return ValueError(
            f"{self.is_called} has no {what} {wanted}, but {', '.join(known)}; name one: {self.key}: {{path:"
            f" {self.folder}, {example}: ...}}"
        )


def files_of(folder: Path, entry: SourceEntry, key: str, note: Callable[[str], None]) -> list[Path]:
    """Return the files of the entry's split, in order. key: of the config; note: is called with a line on
    what is left out. Raises: ValueError when the folder has no data files, or no such split or configuration.
    """
    named = _Named(folder, key, entry)
    visible = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    known = [shown_as_is(path) for path in visible if _has_rows(path)]
    if not known:
        texts = any(path.suffix == ".txt" for path in visible)
        cure = f"; to read its plain texts, name them: {key}: {folder}/**/*.txt" if texts else ""
        known_ones = f"{', '.join(EXTENSIONS)}, also .gz and .zst"
        raise ValueError(f"{named.is_called} has no data files ({known_ones}){cure}")
    splits = _splits_of_card(named) or _splits_by_name(folder, known)
    split = _split(named, splits, known)
    files = splits[split]
    if left := [path for path in visible if path not in set(files)]:
        which = f" (split {split}: {_some(files, folder)})" if set(files) != set(known) else ""
        what = "a split or a file" if len(splits) > 1 else "a file"
        note(
            f"{folder}: {_are(len(files), ' file')} read{which}, {_are(len(left))} not"
            f" ({_some(left, folder)}); name {what} to have it read"
        )
    return files


def _split(named: _Named, splits: Splits, known: list[Path]) -> str:
    """Return the split that is meant, which has files. known: all data files of the folder."""
    split = named.entry.split
    if split not in splits and split == DEFAULT_SPLIT and list(map(set, splits.values())) == [set(known)]:
        (split,) = splits  # there is no doubt which files are meant
    if split not in splits:
        raise named.has_no("split", split, list(splits), "split")
    if not splits[split]:
        raise ValueError(f"{named.is_called}: no file is there that its {CARD} names for the split {split}")
    return split


def _some(files: list[Path], folder: Path) -> str:
    return ", ".join(str(path.relative_to(folder)) for path in files[:5]) + (" ..." if len(files) > 5 else "")


def _are(count: int, what: str = "") -> str:
    return f"{count}{what} is" if count == 1 else f"{count}{what and what + 's'} are"


def shown_as_is(path: Path) -> Path:
    """Refuse a name that cannot be shown, such as a GBK name from a zip archive."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"a file's name is not UTF-8: {show(str(path), 300)}; rename it") from None
    return path


def _has_rows(path: Path) -> bool:
    return extension(path) in EXTENSIONS and path.name not in _NO_ROWS


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _splits_by_name(folder: Path, files: list[Path]) -> Splits:
    """Return the splits that the names of files, or of the folders that they are in, say."""
    inside = {path: path.relative_to(folder) for path in files}
    shards = {path: _SHARD.fullmatch(name.as_posix()) for path, name in inside.items()}
    splits: Splits = {}
    for path, match in shards.items():
        if match:
            splits.setdefault(match["split"], []).append(path)
    if splits:
        return splits
    for patterns, names in (
        (_FOLDERS, {path: name.parent.parts for path, name in inside.items()}),
        (_FILES, {path: (name.name,) for path, name in inside.items()}),
    ):
        for split, pattern in patterns.items():
            if found := [path for path in files if any(map(pattern.fullmatch, names[path]))]:
                splits[split] = found
        if splits:
            return splits
    return {DEFAULT_SPLIT: files}


# ---- README.md


def _splits_of_card(named: _Named) -> Splits | None:
    """Return the splits that the README.md lists, if it does, in the configuration that the entry names."""
    configurations = {one.config_name: one for one in _card(named.folder).configs}
    name = named.entry.name
    if not configurations:
        if name is not None:
            raise ValueError(
                f"{named.is_called}: name={name} is not used, since the folder has no {CARD} that lists"
                " configurations (configs:); remove it"
            )
        return None
    if name is None:
        defaults = [one for one in configurations.values() if one.default or one.config_name == "default"]
        chosen = next(iter(defaults or configurations.values()))
        if not defaults and len(configurations) > 1:
            raise ValueError(
                f"{named.is_called} has several configurations: {', '.join(configurations)}; name one:"
                f" {named.key}: {{path: {named.folder}, name: {chosen.config_name}}}"
            )
    elif name in configurations:
        chosen = configurations[name]
    else:
        raise named.has_no("configuration", name, list(configurations), "name")
    return _splits_of(chosen, named.folder)


def _card(folder: Path) -> _Card:
    """Return what the front matter of a folder's README.md says on data files."""
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return _Card()
    match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    if not match or "configs:" not in match[1]:
        return _Card()
    value = parse_yaml(f"\n{match[1]}", str(path))  # the line break stands for the first ---
    try:
        return _Card.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"][:3]))
        raise ValueError(
            f"{path}: {place} is not as the hub has it ({problem['msg']}); expected {{config_name: ...,"
            " data_files: ...}; correct it, or name files instead of the folder"
        ) from None


def _splits_of(configuration: _Configuration, folder: Path) -> Splits:
    """Return a configuration's splits; one whose files are not there is empty."""
    root, listed = folder / configuration.data_dir, configuration.data_files
    if listed is None:
        return _splits_by_name(root, [path for path in sorted(root.rglob("*")) if _has_rows(path)])
    splits: Splits = {}
    for one in [listed] if isinstance(listed, str) else listed:
        split, patterns = (DEFAULT_SPLIT, one) if isinstance(one, str) else (one.split, one.path)
        found = splits.setdefault(split, [])
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (its ** matches files)
            found += [shown_as_is(root / name) for name in sorted(names) if (root / name).is_file()]
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}

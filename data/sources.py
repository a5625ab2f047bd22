"""The files, folders, globs, hub data sets and `example` that data.train and data.eval name."""

import glob
import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from qwenlora.configs import foreign, foreign_data
from qwenlora.configs.schema import Data, SourceEntry
from qwenlora.data import folders, hub, row_io
from qwenlora.data.bad_row import show
from qwenlora.data.folders import DEFAULT_SPLIT, shown_as_is
from qwenlora.data.row_io import EXTENSIONS, TEXT, Chunk, extension
from qwenlora.data.shapes import KEYS, RowOptions
from qwenlora.data.tables import dataset_chunks
from qwenlora.run.records import SideName

SIDES: tuple[SideName, ...] = ("train", "eval")
EXAMPLES = {"train": "train.jsonl", "eval": "rephrased.jsonl"}
_SAVED = ("state.json", "dataset_dict.json")  # files that datasets' save_to_disk writes


class Source(NamedTuple):
    """An entry of data.train or data.eval: its files in order, or an opened datasets.Dataset."""

    name: str
    side: SideName
    files: list[Path]
    options: RowOptions
    encoding: str | None
    weight: float
    dataset: Any = None

    def chunks(self, note: Callable[[str], None] = lambda _: None) -> Iterator[tuple[int, Chunk]]:
        """Yield (number of the file, chunk) for all of its rows."""
        if self.dataset is not None:
            yield from ((0, chunk) for chunk in dataset_chunks(self.dataset))
            return
        for number, path in enumerate(self.files):
            for chunk in row_io.read_chunks(path, self.encoding, note):
                yield number, chunk

    def place(self, file: int, line: int) -> str:
        """Return a row's place, for messages."""
        return f"{self.name if self.dataset is not None else self.files[file]}:{line}"


def find(data: Data, note: Callable[[str], None] = lambda _: None) -> list[Source]:
    """Return the sources of both sides; no row is read. note: is called with a line on files that folders
    leave out. Raises: ValueError for entries that do not exist or cannot be opened."""
    sources = []
    for side in SIDES:
        for entry in _entries(data, side):
            paths, dataset = _files(entry, side, note)
            if side == "eval" and entry.weight != 1:
                raise ValueError(
                    f"data.eval: {entry.path} has weight {entry.weight}; evaluation sees every row once"
                )
            options, encoding = _options(entry, data), entry.encoding or data.encoding
            sources.append(Source(entry.path, side, paths, options, encoding, entry.weight, dataset))
    return sources


def _entries(data: Data, side: SideName) -> list[SourceEntry]:
    value = data.train if side == "train" else data.eval
    entries = value if isinstance(value, list) else [value] if value else []
    return [SourceEntry(path=entry) if isinstance(entry, str) else entry for entry in entries]


def _options(entry: SourceEntry, data: Data) -> RowOptions:
    options = RowOptions(
        entry.format or data.format,
        data.columns if entry.columns is None else entry.columns,
        data.roles if entry.roles is None else entry.roles,
    )
    for theirs, ours in options.columns.items():
        if ours is not None and ours not in KEYS:
            if theirs in KEYS:  # as LLaMA-Factory has them
                raise ValueError(
                    f"data.columns: {{{theirs}: {ours}}}: the rows' own key stands first; write {{{ours}:"
                    f" {theirs}}}"
                )
            raise ValueError(
                f"data.columns: {{{theirs}: {ours}}}: rows have no {ours} here; known: {', '.join(KEYS)}, and"
                f" null to ignore {theirs}"
            )
    return options


def _files(entry: SourceEntry, side: SideName, note: Callable[[str], None]) -> tuple[list[Path], Any]:
    """Return an entry's files, and its data set if it names one."""
    name, key = entry.path, f"data.{side}"
    if name == "example":
        _refuse_unused(entry, key, "rows that come with qwenlora")
        return [Path(str(resources.files("qwenlora.data") / "examples" / EXAMPLES[side]))], None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            if _is_saved_dataset(path):
                _refuse_unused(entry, key, "a data set of save_to_disk", "split")
                return _opened(_from_disk(path, entry, side))
            _refuse_unused(entry, key, "a folder", "split", "name", "encoding")
            return folders.files_of(path, entry, key, note), None
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~somebody who does not exist
        raise ValueError(f"{key}={show(name)}: {getattr(error, 'strerror', None) or error}") from None
    if exists:
        if not path.is_file():
            raise ValueError(f"{key}={name} is a pipe or device, not a file; write its rows to one")
        _refuse_unused(entry, key, "a file", "encoding")
        _look_at_dataset_info(path, entry, key, note)
        return [path], None
    if not set("*?[").isdisjoint(name):
        _refuse_unused(entry, key, "a glob", "encoding")
        return _matches(path, f"{key}={name}"), None
    if _is_hub_name(name):
        _refuse_unused(entry, key, "a data set of the hub", "split", "name", "revision")
        return _opened(_from_hub(entry, side))
    raise ValueError(f"{key}={name}: no such file (looked for {path.absolute()})")


def _look_at_dataset_info(path: Path, entry: SourceEntry, key: str, note: Callable[[str], None]) -> None:
    """Say what LLaMA-Factory's dataset_info.json has on a file; refuse that file itself."""
    if path.name == foreign.INFO and (found := foreign.foreign(path)):
        raise ValueError(
            f"{key}={path} is {found.what}: it has no rows, but names their files; write a config from it:"
            f" qwenlora config from {path} > my.yaml"
        )
    if not (entry.columns or entry.roles or entry.format) and (described := foreign_data.beside(path)):
        note(
            f"{path}: LLaMA-Factory's {foreign.INFO} beside it describes it; to have it read so: {key}:"
            f" {json.dumps(described, ensure_ascii=False)}"
        )


def _refuse_unused(entry: SourceEntry, key: str, what: str, *used: str) -> None:
    """Refuse a key that has no meaning for what the entry names."""
    for name, default in {"split": DEFAULT_SPLIT, "name": None, "revision": None, "encoding": None}.items():
        if name not in used and (value := getattr(entry, name)) != default:
            raise ValueError(
                f"{key}: {{path: {entry.path}, {name}: {value}}}: {entry.path} is {what}, for which {name} is"
                " not used; remove it"
            )


def _matches(pattern: Path, key: str) -> list[Path]:
    """Return the files of a glob. key: of the config, for messages."""
    paths = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))  # noqa: PTH207 (also absolute)
    files = [shown_as_is(path) for path in paths if path.is_file()]
    if not files:
        raise ValueError(f"{key}: no file matches (looked in {Path.cwd()})")
    return files


def _opened(dataset: Any) -> tuple[list[Path], Any]:
    return [Path(file["filename"]) for file in dataset.cache_files], dataset


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _is_hub_name(name: str) -> bool:
    organisation, slash, rest = name.partition("/")
    is_name = slash and organisation.strip(".~") and rest and "/" not in rest
    return bool(is_name and extension(Path(rest)) not in (*EXTENSIONS, TEXT))


def _from_hub(entry: SourceEntry, side: SideName) -> Any:
    hub.ask(entry.path, "dataset")
    import datasets  # takes half a second, and local files do without

    why = hub.why_offline()
    datasets.config.HF_HUB_OFFLINE = bool(datasets.config.HF_HUB_OFFLINE or why)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(entry.path, entry.name, split=entry.split, revision=entry.revision)
    except Exception as error:  # of the hub, the network, pyarrow, or the data set's own files
        offline = f" (offline: {why})" if why else ""
        cure = f"; {hub.advice(entry.path, 'dataset')}" if why else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"data.{side}={entry.path}: no such file, and no data set of the hub that can be loaded{offline}:"
            f" {reason}{cure}"
        ) from None


def _from_disk(folder: Path, entry: SourceEntry, side: SideName) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of pyarrow, or of files that are missing
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"data.{side}={folder}: this data set of save_to_disk cannot be loaded: {reason}"
        ) from None
    if not isinstance(dataset, datasets.DatasetDict):
        if entry.split not in (DEFAULT_SPLIT, str(dataset.split)):
            raise ValueError(
                f"data.{side}={folder} has no splits: it is one data set; remove split: {entry.split}"
            )
        return dataset
    if entry.split not in dataset:
        raise ValueError(
            f"data.{side}={folder} has no split {entry.split}, but {', '.join(dataset)}; name one:"
            f" data.{side}: {{path: {folder}, split: ...}}"
        )
    return dataset[entry.split]

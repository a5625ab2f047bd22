"""What data.train and data.eval name, found: files, folders, globs, data sets of the hub, the example rows.

`find(config.data)` looks, and reads nothing. Raises ValueError for what is not there.
"""

import glob
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwenlora.configs.schema import Data
from qwenlora.configs.schema import Source as Named
from qwenlora.data import files
from qwenlora.data.files import COMPRESSED, EXTENSIONS, Chunk
from qwenlora.data.rows import Options

SideName = Literal["train", "eval"]
SIDES: tuple[SideName, ...] = ("train", "eval")
EXAMPLES = {"train": "train.jsonl", "eval": "rephrased.jsonl"}


class Source(NamedTuple):
    """One entry of data.train or data.eval. files: what it consists of, in order; dataset: of the hub, opened."""

    name: str
    side: SideName
    files: list[Path]
    options: Options
    encoding: str | None
    weight: float
    dataset: Any = None

    def chunks(self, note: Callable[[str], None] = lambda _: None) -> Iterator[tuple[int, Chunk]]:
        """Yield (number of the file, chunk) for all of its rows."""
        if self.dataset is not None:
            yield from ((0, chunk) for chunk in files.dataset_chunks(self.dataset))
            return
        for number, path in enumerate(self.files):
            for chunk in files.read_chunks(path, self.encoding, note):
                yield number, chunk

    def place(self, file: int, line: int) -> str:
        """Return where a row stands, as messages say it."""
        return f"{self.name if self.dataset is not None else self.files[file]}:{line}"


def find(data: Data, note: Callable[[str], None] = lambda _: None) -> list[Source]:
    """Return the sources of both sides. note: hears of files in folders that are left out."""
    found = []
    for side in SIDES:
        for entry in _entries(data, side):
            paths, dataset = _files(entry, side, note)
            if side == "eval" and entry.weight != 1:
                raise ValueError(f"data.eval: {entry.path} has weight {entry.weight}; evaluation sees every row once")
            options = Options(
                entry.format or data.format,
                data.columns if entry.columns is None else entry.columns,
                data.roles if entry.roles is None else entry.roles,
            )
            encoding = entry.encoding or data.encoding
            found.append(Source(entry.path, side, paths, options, encoding, entry.weight, dataset))
    return found


def _entries(data: Data, side: SideName) -> list[Named]:
    named = data.train if side == "train" else data.eval
    listed = named if isinstance(named, list) else [named] if named else []
    if not listed and named is not None:
        raise ValueError(f"data.{side}=[] names nothing; name a file")
    return [Named(path=entry) if isinstance(entry, str) else entry for entry in listed]


def _files(entry: Named, side: SideName, note: Callable[[str], None]) -> tuple[list[Path], Any]:
    name = entry.path
    if name == "example":
        return [Path(str(resources.files("qwenlora.data") / "examples" / EXAMPLES[side]))], None
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, side, note), None
    if path.exists():
        return [path], None
    if any(character in name for character in "*?["):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ValueError(f"data.{side}={name}: no file matches (looked in {Path.cwd()})")
        return matches, None
    if _is_hub_name(name):
        dataset = _from_hub(entry, side)
        return [Path(file["filename"]) for file in dataset.cache_files], dataset
    raise ValueError(f"data.{side}={name}: no such file (looked for {path.absolute()})")


def _in_folder(folder: Path, side: SideName, note: Callable[[str], None]) -> list[Path]:
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in there if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    known = [path for path in visible if _extension(path) in EXTENSIONS]
    if not known:
        raise ValueError(f"data.{side}={folder} has no data files ({', '.join(EXTENSIONS)}, also .gz and .zst)")
    if left := [path.name for path in visible if path not in set(known)]:
        shown = ", ".join(left[:5]) + (" ..." if len(left) > 5 else "")
        note(f"{folder}: {len(known)} files are read, {len(left)} are not ({shown}); name a file to have it read")
    return known


def _extension(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _is_hub_name(name: str) -> bool:
    organisation, slash, rest = name.partition("/")
    return bool(slash and organisation.strip(".~") and rest and "/" not in rest and _extension(Path(rest)) not in EXTENSIONS)


def _from_hub(entry: Named, side: SideName) -> Any:
    import datasets  # half a second, which files of one's own do without

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(entry.path, entry.name, split=entry.split, revision=entry.revision)
    except Exception as error:  # of the hub, the network, pyarrow, or the data set's own files
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"data.{side}={entry.path}: no such file, and no data set of the hub that can be loaded{offline}: {reason}"
        ) from None

"""Rows as tokens on disk: prepared once for all runs with the same data, opened memory-mapped by every rank.

| file of <cache>/<key>/ | holds |
|---|---|
| {train,eval}/ids.bin, trained.bin | int32 and bool [tokens] |
| .../weights.bin | float32 [tokens], of their loss; only where one is neither 0 nor 1 |
| .../starts, lengths, trained_lengths, row_of.npy | [pieces] of an epoch |
| .../places.npy | int32 [rows, 3]: source, file, line |
| .../used.npy | int32 [distinct ids], ascending |
| .../whole, digests.npy | [rows]: tokens before data.overlength; 16 bytes |
| train/pack_rows, pack_ends.npy | packing.py's packs |
| bad.jsonl | every row that was left out, and why |
| index.json | the counts (counts.py); written last |

The key is a hash of everything the tokens depend on: the files' bytes, the tokenizer, options and this code.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from rich.console import Console

from qwenlora.configs.schema import Config, Data
from qwenlora.data import build, sources
from qwenlora.data.bad_row import printable
from qwenlora.data.cache import FileState, build_once, digest_of, state_of
from qwenlora.data.chat import Tokens
from qwenlora.data.counts import BadRowPlace, PreparedIndex
from qwenlora.data.packing import Packs
from qwenlora.data.sources import Source
from qwenlora.data.turns import TURN_END
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import and_more
from qwenlora.run.package import code_hash
from qwenlora.run.records import SideCounts, SideName

# options that the prepared rows depend on, as opposed to num_proc, packing ...
_OPTIONS = ("max_length", "overlength", "split_replies", "train_on", "eval_fraction")
# libraries that the tokens depend on, and files of this folder that they do not depend on
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow", "datasets")
_NO_MATTER = {"__init__.py", "cache.py", "freshness.py", "hub.py", "order.py", "report.py", "survey.py"}


class Side(NamedTuple):
    """The pieces of one side, memory-mapped. A piece is a row, or a part of a long row. ids: int32 [tokens],
    trained: bool [tokens]; starts: int64 [pieces]; lengths, trained_lengths, row_of (the piece's row): int32
    [pieces]; places: int32 [rows, 3], source, file and line; weights: float32 [tokens], None: all are 1."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    trained_lengths: npt.NDArray[np.int32]
    row_of: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, number: int) -> Tokens:
        """Return the tokens of one piece."""
        part = slice(int(self.starts[number]), int(self.starts[number]) + int(self.lengths[number]))
        return Tokens(
            self.ids[part], self.trained[part], None if self.weights is None else self.weights[part]
        )


@dataclass(frozen=True)
class Prepared:
    """A prepared folder. sources: as the config names them, in its order; files_key: hash of their bytes."""

    folder: Path
    index: PreparedIndex
    sources: list[Source]
    files_key: str

    @property
    def counts(self) -> dict[SideName, SideCounts]:
        """The counts of each side."""
        return self.index.sides

    @property
    def bad_report(self) -> str:
        """The first bad rows with their places, and the totals."""
        return self.index.bad.report(self.sources)

    def bad_lines(self) -> Iterator[str]:
        """Yield every bad row as `place: reason`."""
        line = TypeAdapter(BadRowPlace)
        with (self.folder / "bad.jsonl").open(encoding="utf-8") as file:
            for text in file:
                yield line.validate_json(text).text(self.sources)

    def place(self, side: SideName, row: int) -> str:
        """Return a row's place, for messages. row: its number in the folder's places.npy."""
        source, file, line = map(int, np.load(self.folder / side / "places.npy", mmap_mode="r")[row])
        return self.sources[source].place(file, line)

    def refuse(self, data: Data, tokenizer: Any, embeddings: int) -> None:
        """Raise ValueError when these rows cannot be trained as the config says. embeddings: how many tokens
        the base has one for."""
        if self.index.bad.count and data.on_bad_row == "error":
            raise ValueError(self.index.bad.refusal(self.sources))
        for source, its_counts in zip(self.sources, self.index.sources, strict=True):
            if not its_counts.read:
                raise ValueError(f"data.{source.side}={source.name} is empty: it has no rows")
            if its_counts.bad == its_counts.read:
                raise ValueError(
                    f"data.{source.side}={source.name}: none of its rows can be trained\n{self.bad_report}"
                )
        for side, side_counts in self.counts.items():
            self._refuse_side(side, side_counts, data)
        if "train" not in self.counts:
            raise ValueError(f"data.eval_fraction={data.eval_fraction} leaves no row to train on; lower it")
        if data.eval_fraction and "eval" not in self.counts:
            raise ValueError(
                f"data.eval_fraction={data.eval_fraction} leaves no row to evaluate on: there are only"
                f" {self.counts['train'].rows}; raise it, set it to null, or name a file: data.eval"
            )
        self._refuse_endless(data, tokenizer)
        self._refuse_without_embedding(tokenizer, embeddings)

    def _refuse_side(self, side: str, counts: SideCounts, data: Data) -> None:
        if counts.overlength and data.overlength == "error":
            source, file, line = counts.longest_place
            raise ValueError(
                f"{counts.overlength:,} of {counts.read_rows:,} {side} rows are longer than"
                f" data.max_length={data.max_length} tokens (the longest,"
                f" {self.sources[source].place(file, line)}, has {counts.longest_read:,}); raise"
                " data.max_length, or set data.overlength: truncate, drop or split"
            )
        if not counts.rows:
            raise ValueError(
                f"no {side} row is left: {counts.dropped:,} of {counts.read_rows:,} were dropped as longer"
                f" than data.max_length={data.max_length} tokens, the others have weight too low; raise it"
            )
        if not counts.trained_tokens:
            raise ValueError(f"no {side} row has a token to train on")

    def _refuse_endless(self, data: Data, tokenizer: Any) -> None:
        """Refuse conversations that never teach the model to end its turn."""
        if self.trains_turns(tokenizer) is False:
            raise ValueError(
                f"no train row trains the end of a turn ({TURN_END}), so the model would never stop; raise"
                " data.max_length, or use a tokenizer that has this token"
            )

    def trains_turns(self, tokenizer: Any) -> bool | None:
        """Whether a training row trains the end of a turn; None when there are no turns, only texts."""
        end = tokenizer.convert_tokens_to_ids(TURN_END)
        side = self.side("train")
        assert side is not None, "there are training rows"
        has_turns = False
        for start in range(0, len(side.ids), 2**22):  # a part at a time, up to the first that trains an end
            part = slice(start, start + 2**22)
            ends = side.ids[part] == end
            has_turns = has_turns or bool(ends.any())
            if (ends & side.trained[part]).any():
                return True
        return False if has_turns else None

    def _refuse_without_embedding(self, tokenizer: Any, embeddings: int) -> None:
        """Refuse tokens that the base has no embedding for: rows have them, or padding."""
        sides = (used_tokens(self.folder, side) for side in self.counts)
        used = np.unique(np.concatenate([*sides, [tokenizer.pad_token_id]]))
        missing = used[used >= embeddings].astype(int).tolist()
        if missing:
            names = ", ".join(printable(tokenizer.decode([token])) for token in missing[:3])
            raise ValueError(
                f"the base has no embedding for {names}{and_more(missing, 3)}, which the rows or their"
                f" padding use: it has {embeddings:,}, the tokenizer {len(tokenizer):,} tokens; enlarge the"
                f" base once (transformers: model.resize_token_embeddings({len(tokenizer)}),"
                " save_pretrained), or name the base's own tokenizer"
            )

    def side(self, side: SideName) -> Side | None:
        """Return the pieces of train or eval, memory-mapped; None when there are none."""
        return open_side(self.folder, side)

    def packs(self) -> Packs:
        """Return the packs of the training pieces."""
        return open_packs(self.folder)


def prepare(
    data: Data,
    tokenizer: Any,
    cache: Path,
    console: Console | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Return the rows that a config names as tokens: from the cache, or made now. It does not call refuse().

    console: for a progress bar; say: is called with a line when another process is waited for.
    Raises: ValueError for files that are missing, damaged or changed meanwhile, or a cache without space.
    """
    notes: list[str] = []
    found = sources.find(data, notes.append)

    def states() -> list[FileState]:
        return [_state_of(path) for source in found for path in source.files]

    before = states()  # the key is for these: later changes, also while this waits, are refused
    of_files = files_key(found, cache)
    folder = cache / key_of(data, found, tokenizer, of_files)

    def refuse_a_change() -> None:
        if states() != before:
            raise ValueError("a data file was changed while it was read; start again")

    def make(staging: Path) -> PreparedIndex:
        refuse_a_change()
        index = build.build_arrays(staging, found, tokenizer, data, console)
        refuse_a_change()
        return index

    try:
        index = build_once(folder, PreparedIndex, make, say)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache} cannot hold the prepared rows: {error.strerror or error}; free some"
            " space there, or set data.cache_dir to a folder that can be written"
        ) from error
    return Prepared(folder, index.revised(notes=[*notes, *index.notes]), found, of_files)


def key_of(data: Data, found: list[Source], tokenizer: Any, of_files: str) -> str:
    """Return the hash that names these sources' prepared rows. of_files: files_key() of the same sources."""
    digest = hashlib.sha256(json.dumps([metadata.version(name) for name in _LIBRARIES]).encode())
    digest.update(code_hash(("data",), but=_NO_MATTER).encode())
    digest.update(json.dumps([getattr(data, option) for option in _OPTIONS]).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    # the template may use these
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    for source in found:
        options = source.options
        parts: list[object] = [source.side, source.weight, source.encoding, options.format]
        parts += [dict(options.columns), dict(options.roles), [path.suffixes[-2:] for path in source.files]]
        if source.dataset is not None:  # two splits of it may lie in one file
            parts.append(source.dataset._fingerprint)
        digest.update(json.dumps(parts, sort_keys=True).encode())
    digest.update(of_files.encode())
    return digest.hexdigest()[:16]


def files_key(found: list[Source], cache: Path) -> str:
    """Return the hash of the files' bytes alone."""
    digest = hashlib.sha256()
    for source in found:
        digest.update(source.side.encode())
        for path in source.files:
            try:
                digest.update(digest_of(path, cache).encode())
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()[:16]


def other_files(config: Config, run: RunFolder) -> bool:
    """Return whether the data files have changed since a run's rows were made from them."""
    return files_key(sources.find(config.data), run.cache(config)) != run.read_facts().files_key


def _state_of(path: Path) -> FileState:
    try:
        return state_of(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def open_side(folder: Path, side: SideName) -> Side | None:
    """Return the pieces of train or eval, memory-mapped; None when there are none."""
    folder /= side
    if not folder.is_dir():
        return None
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in Side._fields[2:-1]}
    if not (folder / "ids.bin").stat().st_size:  # an empty file cannot be mapped
        return Side(np.empty(0, np.int32), np.empty(0, np.bool_), **arrays)
    ids = np.memmap(folder / "ids.bin", np.int32, "r")
    trained = np.memmap(folder / "trained.bin", np.bool_, "r")
    weighted = (folder / "weights.bin").exists()
    weights = np.memmap(folder / "weights.bin", np.float32, "r") if weighted else None
    return Side(ids, trained, **arrays, weights=weights)


def used_tokens(folder: Path, side: SideName) -> npt.NDArray[np.int32]:
    """Return the ids that one side's rows have, ascending: int32 [distinct ids]."""
    ids: npt.NDArray[np.int32] = np.load(folder / side / "used.npy")
    return ids


def open_packs(folder: Path) -> Packs:
    """Return the packs of the training pieces."""
    return Packs(
        *(np.load(folder / "train" / f"pack_{name}.npy", mmap_mode="r") for name in ("rows", "ends"))
    )

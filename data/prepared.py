"""Tokens on disk: written once before any rank starts, opened as memory-mapped arrays by every rank.

prepared/<key>/{train,eval}/: ids.npy int32 [tokens], trained.npy bool [tokens], starts.npy int64 [rows + 1]
prepared/<key>/facts.json   : what was counted. It is written last, and the folder is renamed into place when whole.
The key is a hash of everything the tokens depend on: the files' bytes, the tokenizer, the options and this code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from qwenlora.configs.schema import Data
from qwenlora.data import chat, rows
from qwenlora.data.chat import Tokens

SIDES = ("train", "eval")
CHUNK_ROWS = 500


class Side(NamedTuple):
    """The rows of one side, memory-mapped.

    ids: int32 [tokens], trained: bool [tokens], starts: int64 [rows + 1], the first token of each row.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [rows], tokens."""
        return np.diff(self.starts)

    @property
    def trained_lengths(self) -> npt.NDArray[np.int64]:
        """int64 [rows], trained tokens."""
        counts = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return np.asarray(counts[self.starts[1:]] - counts[self.starts[:-1]], np.int64)

    def row(self, number: int) -> Tokens:
        """Return the tokens of one row."""
        part = slice(self.starts[number], self.starts[number + 1])
        return Tokens(self.ids[part], self.trained[part])


def key_of(config: Data, tokenizer: Any) -> str:
    """Return the hash that names the prepared data of this config, tokenizer and code."""
    digest = hashlib.sha256()
    for module in (rows, chat, None):
        digest.update(Path(module.__file__ or "" if module else __file__).read_bytes())
    digest.update(json.dumps([config.max_length, config.overlength]).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    digest.update(files_key(config).encode())
    return digest.hexdigest()[:16]


def files_key(config: Data) -> str:
    """Return the hash of the files' bytes alone, which needs no tokenizer."""
    digest = hashlib.sha256()
    for side in SIDES:
        for path in _files(config, side):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(b"/")
    return digest.hexdigest()[:16]


def prepare(config: Data, tokenizer: Any, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Write the tokens of config's rows into folder, unless they are there; return the facts that were counted.

    console: where a progress bar may be shown.

    Raises: ValueError for rows that cannot be trained.
    """
    if (folder / "facts.json").is_file():
        return read_facts(folder)
    staging = folder.with_name(f"{folder.name}.staging-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    facts: dict[str, Any] = {}
    for side in SIDES:
        if files := _files(config, side):
            read = rows.read_rows(files)
            tokens = _encode(tokenizer, read, side, console)
            facts[side] = _fit(tokens, read, config, side)
            kept = [row for row in tokens if len(row.ids)]
            _check(kept, tokenizer, side)
            facts[side] |= _write(kept, staging / side)
    (staging / "facts.json").write_text(json.dumps(facts, indent=1))
    try:
        staging.rename(folder)
    except OSError:  # another process was faster; its folder is as good as ours
        if not (folder / "facts.json").is_file():
            raise
        shutil.rmtree(staging)
    return read_facts(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return {side: {sha256, rows, tokens, trained_tokens, longest, truncated, dropped}}."""
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


def open_side(folder: Path, side: str) -> Side | None:
    """Return the prepared rows of train or eval, memory-mapped; None when there are none."""
    if not (folder / side).is_dir():
        return None
    return Side(*(np.load(folder / side / f"{name}.npy", mmap_mode="r") for name in Side._fields))


def _files(config: Data, side: str) -> list[Path]:
    source = config.train if side == "train" else config.eval
    return rows.source_files(source, side) if source else []


def _encode(tokenizer: Any, read: list[rows.Row], side: str, console: Console | None) -> list[Tokens]:
    chunks: Iterable[int] = range(0, len(read), CHUNK_ROWS)
    if console:
        hidden = not console.is_terminal
        chunks = track(chunks, f"tokenising {side}", console=console, transient=True, disable=hidden)
    return [tokens for start in chunks for tokens in chat.encode(tokenizer, read[start : start + CHUNK_ROWS])]


def _fit(tokens: list[Tokens], read: list[rows.Row], config: Data, side: str) -> dict[str, Any]:
    """Apply data.overlength in place (a dropped row is left empty) and count what was done."""
    counts: dict[str, Any] = {"truncated": 0, "dropped": 0}
    long = [n for n, row in enumerate(tokens) if len(row.ids) > config.max_length]
    if long and config.overlength == "error":
        worst = max(long, key=lambda n: len(tokens[n].ids))
        raise ValueError(
            f"{len(long)} of {len(tokens)} {side} rows are longer than data.max_length={config.max_length} tokens"
            f" (the longest, {read[worst].place}, has {len(tokens[worst].ids)});"
            " raise data.max_length, or set data.overlength: truncate or drop"
        )
    for n in long:
        if config.overlength == "drop":
            tokens[n] = Tokens(tokens[n].ids[:0], tokens[n].trained[:0])
            counts["dropped"] += 1
            continue
        tokens[n] = Tokens(tokens[n].ids[: config.max_length], tokens[n].trained[: config.max_length])
        counts["truncated"] += 1
        if not tokens[n].trained.any():
            raise ValueError(
                f"{read[n].place}: truncated to data.max_length={config.max_length} tokens, nothing of the reply is"
                " left to train on; raise data.max_length, or set data.overlength: drop"
            )
    return counts


def _check(kept: list[Tokens], tokenizer: Any, side: str) -> None:
    if not kept:
        raise ValueError(f"every {side} row was dropped as longer than data.max_length; raise it")
    end = tokenizer.convert_tokens_to_ids(rows.TURN_END)
    if not any((row.ids[row.trained] == end).any() for row in kept):
        raise ValueError(
            f"no {side} row trains the end of a turn ({rows.TURN_END}), so the model would never stop;"
            " raise data.max_length, or use a tokenizer that has this token"
        )


def _write(kept: list[Tokens], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    lengths = [len(row.ids) for row in kept]
    ids = np.concatenate([row.ids for row in kept])
    trained = np.concatenate([row.trained for row in kept])
    np.save(folder / "ids.npy", ids)
    np.save(folder / "trained.npy", trained)
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    digest = hashlib.sha256(ids.tobytes() + trained.tobytes() + np.asarray(lengths, np.int64).tobytes())
    return {
        "sha256": digest.hexdigest(),
        "rows": len(kept),
        "tokens": len(ids),
        "trained_tokens": int(trained.sum()),
        "longest": max(lengths),
    }

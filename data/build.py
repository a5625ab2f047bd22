"""Rows made into arrays on disk, by all cores, in the order of the files whatever finishes first.

One process reads and writes, the others (forked, so that they have the tokenizer) decode and tokenise a megabyte at a
time. `build(folder, sources, tokenizer, data)` fills a folder with what prepared.py opens and returns what was counted.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qwenlora.configs.schema import Data
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.files import BadRow, Chunk
from qwenlora.data.fit import fit
from qwenlora.data.packing import pack
from qwenlora.data.rows import KNOWN, Options, Row, shape_of, to_row
from qwenlora.data.sources import SIDES, SideName, Source
from qwenlora.jobs.orphans import die_with_parent

SHOWN_BAD_ROWS = 20
SMALL_BYTES = 2**22  # less than this is not worth other processes
IN_FLIGHT = 3  # chunks a process, so that none waits and memory stays small
BYTES_A_TOKEN = 5  # on disk: an int32 and a bool


class Job(NamedTuple):
    """What every chunk is treated with."""

    data: Data
    encoder: Encoder


class Piece(NamedTuple):
    """Arrays of the pieces and rows of one chunk and side.

    ids: int32 [tokens], trained: bool [tokens], lengths: int32 [pieces], row_of: int32 [pieces], number of a row here;
    lines, whole: int32 [rows], whole: tokens before data.overlength; digests: uint8 [rows, 16].
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    row_of: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    whole: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint8]


class Done(NamedTuple):
    """A chunk's outcome. bad: (line, reason); counts: {side: {what: how many}}."""

    read: int
    bad: list[tuple[int, str]]
    sides: dict[SideName, Piece]
    counts: dict[SideName, Counter[str]]


def treat(job: Job, source: Source, shape: str | None, chunk: Chunk, *, tokenise: bool) -> Done:
    """Return the pieces of a chunk's rows. tokenise: false only looks for bad rows."""
    bad: list[tuple[int, str]] = []
    rows: list[Row] = []
    read = 0
    for line, row in rows_of(chunk, shape, source.options):
        read += 1
        if isinstance(row, BadRow):
            bad.append((line, str(row)))
        else:
            rows.append(row)
    if not tokenise:
        for row in rows:
            try:
                job.encoder.render(row)
            except BadRow as error:
                bad.append((row.line, str(error)))
        return Done(read, sorted(bad), {}, {})
    held: dict[SideName, list[tuple[Row, bytes, int, list[Tokens]]]] = {side: [] for side in SIDES}
    counts: dict[SideName, Counter[str]] = {side: Counter() for side in SIDES}
    for row, tokens in zip(rows, job.encoder.encode(rows), strict=True):
        digest = row.digest
        side = side_of(digest, source, job.data)
        try:
            if isinstance(tokens, BadRow):
                raise tokens
            pieces = [tokens]
            if len(tokens.ids) > job.data.max_length:
                fitted = fit(row, tokens, job.encoder, job.data)
                pieces = fitted.pieces
                counts[side].update(
                    overlength=1,
                    truncated=fitted.cut,
                    dropped=not pieces and job.data.overlength != "error",  # then all is refused
                    split=len(pieces) > 1,
                    lost_replies=fitted.lost if pieces else 0,
                )
            held[side].append((row, digest, len(tokens.ids), pieces))
        except BadRow as error:
            bad.append((row.line, str(error)))
    return Done(read, sorted(bad), {side: _arrays(found) for side, found in held.items() if found}, counts)


def rows_of(chunk: Chunk, shape: str | None, options: Options) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (line, row or why it is none) for each row of a chunk."""
    for line, value in chunk.values():
        try:
            if isinstance(value, BadRow):
                raise value
            yield line, to_row(line, value, shape or shape_of(value, options), options)
        except BadRow as error:
            yield line, error


def read(sources: list[Source]) -> Iterator[tuple[int, int, int, Row | BadRow]]:
    """Yield (number of the source, of its file, line, row) for every row, in order, in this process alone."""
    for number, source in enumerate(sources):
        for file, chunk, shape in _shaped(source):
            for line, row in rows_of(chunk, shape, source.options):
                yield number, file, line, row


def _shaped(source: Source, note: Callable[[str], None] = lambda _: None) -> Iterator[tuple[int, Chunk, str | None]]:
    """Yield (number of the file, chunk, shape of the file's rows) for all of a source's chunks."""
    shape, before = None, -1
    for file, chunk in source.chunks(note):
        if file != before:
            shape, before = None, file
        shape = shape or _first_shape(chunk, source.options)
        yield file, chunk, shape


def side_of(digest: bytes, source: Source, data: Data) -> SideName:
    """Return where a row belongs: by data.eval_fraction, its digest decides, whatever stands beside it."""
    if source.side == "train" and data.eval_fraction and _share(digest[:8]) < data.eval_fraction:
        return "eval"
    return source.side


def _share(part: bytes) -> float:
    """Return a number in [0, 1) that a digest decides."""
    return int.from_bytes(part, "big") / 2.0 ** (8 * len(part))


def _arrays(held: list[tuple[Row, bytes, int, list[Tokens]]]) -> Piece:
    pieces = [piece for *_, found in held for piece in found]
    empty = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_))
    return Piece(
        np.concatenate([piece.ids for piece in pieces or [empty]]),
        np.concatenate([piece.trained for piece in pieces or [empty]]),
        np.array([len(piece.ids) for piece in pieces], np.int32),
        np.repeat(np.arange(len(held), dtype=np.int32), [len(found) for *_, found in held]),
        np.array([row.line for row, *_ in held], np.int32),
        np.array([whole for *_, whole, _ in held], np.int32),
        np.frombuffer(b"".join(digest for _, digest, *_ in held), np.uint8).reshape(-1, 16),
    )


# ---- the other processes

_job: Job | None = None  # set before they are forked


def _begin() -> None:
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the one that started us decides


def _treat(source: Source, shape: str | None, chunk: Chunk, tokenise: bool) -> Done:
    assert _job is not None, "forked before the job was set"
    return treat(_job, source, shape, chunk, tokenise=tokenise)


def build(
    folder: Path,
    sources: list[Source],
    tokenizer: Any,
    data: Data,
    console: Console | None = None,
    states: Callable[[], list[Any]] = list,
) -> dict[str, Any]:
    """Write the pieces of all sources into folder/train and folder/eval; return what was counted.

    states: what the files are like; asked before and after, since a file that changes meanwhile is refused.
    Raises: ValueError for files that cannot be read to their end.
    """
    global _job
    start, before = time.monotonic(), states()
    size = sum(path.stat().st_size for source in sources for path in source.files)
    _check_space(folder, size)
    processes = 0 if size < SMALL_BYTES else data.num_proc or len(os.sched_getaffinity(0))
    _job = Job(data, Encoder(tokenizer, data.train_on))
    written = _Written(folder, sources, data)
    memory = _Memory()
    with _Pool(processes) as pool, _bar(console, size) as progress:
        waiting: deque[tuple[int, int, Chunk, Future[Done]]] = deque()

        def take() -> None:
            number, file, chunk, future = waiting.popleft()
            try:
                written.add(number, file, future.result())
            except BrokenProcessPool:
                raise ValueError(
                    "a process that prepared the data was killed, most likely for lack of memory;"
                    f" lower data.num_proc (now {processes})"
                ) from None
            memory.look()
            progress(sources[number], file, chunk.read, written.read)

        for number, source in enumerate(sources):
            for file, chunk, shape in _shaped(source, written.notes.append):
                # bad rows are refused in the end: then those to come are counted, no more (cutting needs their tokens)
                tokenise = not (written.bad_rows and data.on_bad_row == "error") or data.overlength == "truncate"
                waiting.append((number, file, chunk, pool.submit(_treat, source, shape, chunk, tokenise)))
                if len(waiting) > IN_FLIGHT * processes:
                    take()
        while waiting:
            take()
    memory.look(at_once=True)
    if states() != before:
        raise ValueError("a data file was changed while it was read; start again")
    if written.bad_rows and data.on_bad_row == "error":
        raise ValueError(refusal(written.counts(), sources))
    facts = written.finish()
    return facts | {
        "seconds": round(time.monotonic() - start, 3),
        "processes": max(processes, 1),
        "peak_memory_bytes": memory.peak,
    }


def _first_shape(chunk: Chunk, options: Options) -> str | None:
    """Return the shape of the first row that has one."""
    for _, value in chunk.values():
        if not isinstance(value, BadRow):
            try:
                return shape_of(value, options)
            except BadRow:
                continue
    return None


class _Pool:
    """The other processes; with none of them, work is done at once."""

    def __init__(self, processes: int) -> None:
        self.executor: ProcessPoolExecutor | None = None
        if processes:
            self.executor = ProcessPoolExecutor(processes, get_context("fork"), _begin)
            self.executor.submit(int).result()  # forked now, before a progress bar has its thread

    def submit(self, do: Callable[..., Done], *arguments: Any) -> Future[Done]:
        if self.executor:
            return self.executor.submit(do, *arguments)
        future: Future[Done] = Future()
        future.set_result(do(*arguments))
        return future

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(cancel_futures=True)


class _Memory:
    """The most memory seen, in bytes, of this process and those it forked; shared pages count once."""

    def __init__(self) -> None:
        self.peak, self._last = 0, 0.0

    def look(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if now - self._last < 2 and not at_once:
            return
        self._last = now
        me = psutil.Process()
        total = 0
        for process in (me, *me.children()):
            try:
                total += process.memory_full_info().pss
            except (psutil.Error, AttributeError):  # it has ended; or the kernel has no smaps
                continue
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak = max(self.peak, total or own)


def _bar(console: Console | None, total: int) -> Any:
    """Return a context that gives progress(source, file, bytes of the file read, rows read)."""
    bar = Progress(
        TextColumn("preparing data"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        transient=True,
        disable=console is None or not console.is_terminal,
    )

    class Bar:
        def __enter__(self) -> Callable[[Source, int, int, int], None]:
            bar.start()
            task = bar.add_task("", total=total or None, rows=0)
            done: dict[Path, int] = {}

            def progress(source: Source, file: int, read: int, rows: int) -> None:
                path = source.files[file]
                done[path] = max(done.get(path, 0), read)
                bar.update(task, completed=sum(done.values()), rows=rows)

            return progress

        def __exit__(self, *_: object) -> None:
            bar.stop()

    return Bar()


def _check_space(folder: Path, size: int) -> None:
    free, needed = shutil.disk_usage(folder).free, 2 * size  # a token is about three bytes of text
    if free < needed:
        raise ValueError(
            f"data.cache_dir={folder.parent} has {free / 2**20:,.0f} MiB free, the prepared rows need about"
            f" {needed / 2**20:,.0f} MiB; free some, or set data.cache_dir to another disk"
        )


# ---- the files


class _Written:
    """What has been written and counted so far."""

    def __init__(self, folder: Path, sources: list[Source], data: Data) -> None:
        self.folder, self.sources, self.data = folder, sources, data
        self.read = self.bad_rows = 0
        self.first_bad: list[tuple[int, int, int, str]] = []
        self.notes: list[str] = []
        self._bad_file = (folder / "bad.jsonl").open("w", encoding="utf-8")
        self._sides: dict[SideName, _Side] = {}
        self._by_source = [Counter[str]() for _ in sources]

    def add(self, source: int, file: int, done: Done) -> None:
        self.read += done.read
        self.bad_rows += len(done.bad)
        self._by_source[source].update(read=done.read, bad=len(done.bad))
        for line, reason in done.bad:
            if len(self.first_bad) < SHOWN_BAD_ROWS:
                self.first_bad.append((source, file, line, reason))
            self._bad_file.write(json.dumps([source, file, line, reason], ensure_ascii=False) + "\n")
        for side, piece in done.sides.items():
            if side not in self._sides:
                self._sides[side] = _Side(self.folder / side)
            self._sides[side].add(source, file, piece)
            self._by_source[source].update(tokens=len(piece.ids), trained_tokens=int(piece.trained.sum()))
        for side, counts in done.counts.items():
            if side in self._sides:
                self._sides[side].counts.update(counts)

    def counts(self) -> dict[str, Any]:
        """Return the counts of good and bad rows."""
        among = sum(counts["read"] for counts in self._by_source if counts["bad"])
        return {"read": self.read, "bad": self.bad_rows, "bad_among": among, "first_bad": self.first_bad}

    def finish(self) -> dict[str, Any]:
        """Write the rest; return all that was counted."""
        self._bad_file.close()
        weights = np.array([source.weight for source in self.sources])
        sides = {side: self._sides[side].finish(weights) for side in SIDES if side in self._sides}
        if "train" in sides:
            lengths = np.load(self.folder / "train" / "lengths.npy")
            packs = pack(lengths, self.data.max_length)
            np.save(self.folder / "train" / "pack_rows.npy", packs.rows)
            np.save(self.folder / "train" / "pack_ends.npy", packs.ends)
            packed = hashlib.sha256(packs.rows.tobytes() + packs.ends.tobytes()).hexdigest()
            sides["train"] |= {"packs": len(packs), "packs_sha256": packed}
        return self.counts() | {
            "sides": sides,
            "sources": [dict(counts) for counts in self._by_source],
            "overlap": self._overlap(),
            "notes": self.notes,
        }

    def _overlap(self) -> dict[str, Any]:
        """Return which rows stand on both sides: {"rows": of eval, "first": [[side, row number] ...]}."""
        if not all(side in self._sides for side in SIDES):
            return {"rows": 0, "first": []}
        train, eval_ = (self._sides[side].digests() for side in SIDES)
        there = np.flatnonzero(np.isin(eval_, train))
        return {"rows": len(there), "first": there[:5].tolist()}


class _Side:
    """One side's files as they grow."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("wb") for name in ("ids", "trained")}
        self._hash = {name: hashlib.sha256() for name in self._files}
        self._lists: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("lengths", "trained_lengths", "row_of", "digests", "places", "whole")
        }
        self._rows = 0

    def add(self, source: int, file: int, piece: Piece) -> None:
        for name, values in (("ids", piece.ids), ("trained", piece.trained)):
            self._files[name].write(values.tobytes())
            self._hash[name].update(values.tobytes())
        totals = np.concatenate([[0], np.cumsum(piece.trained, dtype=np.int64)])
        ends = np.cumsum(piece.lengths, dtype=np.int64)
        lists = self._lists
        lists["lengths"].append(piece.lengths)
        lists["trained_lengths"].append((totals[ends] - totals[ends - piece.lengths]).astype(np.int32))
        lists["row_of"].append(piece.row_of + self._rows)
        lists["digests"].append(piece.digests)
        lists["whole"].append(piece.whole)
        places = np.empty((len(piece.lines), 3), np.int32)
        places[:, 0], places[:, 1], places[:, 2] = source, file, piece.lines
        lists["places"].append(places)
        self._rows += len(piece.lines)

    def digests(self) -> npt.NDArray[Any]:
        """Return the digests of all rows as one value each."""
        return np.ascontiguousarray(np.concatenate(self._lists["digests"])).view("V16").ravel()

    def finish(self, weights: npt.NDArray[np.float64]) -> dict[str, Any]:
        """Write the rest; return what was counted. weights: of the sources."""
        for file in self._files.values():
            file.close()
        arrays = {name: np.concatenate(parts) for name, parts in self._lists.items()}
        lengths = arrays["lengths"]
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1]
        seen = np.repeat(np.arange(len(lengths)), self._repeats(arrays, weights))
        used = {
            "starts": starts[seen],
            "lengths": lengths[seen],
            "trained_lengths": arrays["trained_lengths"][seen],
            "row_of": arrays["row_of"][seen],
        }
        for name, values in (used | {name: arrays[name] for name in ("places", "whole", "digests")}).items():
            np.save(self.folder / f"{name}.npy", values)
        digest = hashlib.sha256()
        for part in self._hash.values():
            digest.update(part.digest())
        for name in ("starts", "lengths"):
            digest.update(np.asarray(used[name], np.int64).tobytes())
        counts = {what: self.counts[what] for what in ("overlength", "truncated", "dropped", "split", "lost_replies")}
        return counts | {
            "sha256": digest.hexdigest(),
            "rows": len(seen),
            "read_rows": self._rows,
            "tokens": int(used["lengths"].sum(dtype=np.int64)),
            "trained_tokens": int(used["trained_lengths"].sum(dtype=np.int64)),
            "longest": int(used["lengths"].max(initial=0)),
            "longest_read": int(arrays["whole"].max(initial=0)),
            "longest_place": arrays["places"][int(arrays["whole"].argmax())].tolist(),
            "duplicates": self._rows - len(np.unique(self.digests())),
        }

    def _repeats(self, arrays: dict[str, npt.NDArray[Any]], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return how often an epoch sees each piece: its source's weight, the fraction by a hash of its row."""
        wanted = weights[arrays["places"][:, 0]]
        repeats = np.floor(wanted).astype(np.int64)
        if (part := wanted - repeats).any():
            shares = arrays["digests"][:, 8:].copy().view(">u8").ravel() / 2.0**64  # not the bits of eval_fraction
            repeats += shares < part
        return np.asarray(repeats[arrays["row_of"]], np.int64)


def bad_report(facts: dict[str, Any], sources: list[Source]) -> str:
    """Return the first bad rows with their places, and the totals; empty when there are none.

    facts: {bad, first_bad, bad_among: rows of the sources that have bad ones}.
    """
    if not facts["bad"]:
        return ""
    lines = [f"{sources[source].place(file, line)}: {reason}" for source, file, line, reason in facts["first_bad"]]
    help_ = f"\n{KNOWN}" if any("unknown shape" in line for line in lines) else ""
    total, bad = facts["bad_among"], facts["bad"]
    reasons = {reason for *_, reason in facts["first_bad"]}
    if bad == total > 1 and len(reasons) == 1:  # one sentence says it all
        return f"{lines[0]}; the same for {'all ' if bad <= SHOWN_BAD_ROWS else 'the first 20 of '}{total:,} rows{help_}"
    shown = "\n  ".join(lines)
    more = f"\n  and {bad - len(lines):,} more" if bad > len(lines) else ""
    return f"{bad:,} of {total:,} rows cannot be trained:\n  {shown}{more}{help_}"


def refusal(facts: dict[str, Any], sources: list[Source]) -> str:
    """Return the report, and what can be done."""
    return f"{bad_report(facts, sources)}\nmend or remove them, or leave them out: data.on_bad_row: skip"


def bad_lines(folder: Path, sources: list[Source]) -> Iterator[str]:
    """Yield every bad row as `place: reason`."""
    with (folder / "bad.jsonl").open(encoding="utf-8") as file:
        for text in file:
            source, number, line, reason = json.loads(text)
            yield f"{sources[source].place(number, line)}: {reason}"

"""Rows made into arrays on disk, by all cores, in the order of the files.

One process reads and writes; forks of it, which have the tokenizer, decode and tokenise a megabyte at a time.
"""

import gc
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qwenlora.configs.schema import Data
from qwenlora.data.arrays import ArrayWriter
from qwenlora.data.chat import Encoder
from qwenlora.data.counts import PreparedIndex
from qwenlora.data.row_io import Chunk
from qwenlora.data.sources import Source
from qwenlora.data.tokenise import TokenisedChunk, Tokenising, chunks_with_shape, tokenise_chunk
from qwenlora.run.disk import free_bytes
from qwenlora.run.long_work import LongWork
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.signals import STOP_SIGNALS

SMALL_BYTES = 2**22  # less than this is not worth other processes
IN_FLIGHT = 3  # chunks a process, so that no process waits and memory stays small


_using: Tokenising | None = None  # set before the others are forked


def _begin(parent: int) -> None:
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop


def _tokenise(source: Source, shape: str | None, chunk: Chunk, check_only: bool) -> TokenisedChunk:
    assert _using is not None, "forked before it was set"
    return tokenise_chunk(_using, source, shape, chunk, check_only=check_only)


def build_arrays(
    folder: Path, sources: list[Source], tokenizer: Any, data: Data, console: Console | None = None
) -> PreparedIndex:
    """Write the pieces of all sources into folder/train and folder/eval; return the index.
    Raises: ValueError for damaged files, bad rows (with data.on_bad_row=error) or too little space."""
    global _using
    start = time.monotonic()
    size = sum(path.stat().st_size for source in sources for path in source.files)
    _check_space(folder, size)
    processes = data.num_proc or len(os.sched_getaffinity(0))
    if size < SMALL_BYTES or processes == 1:
        processes = 0  # this one does all the work
    _using = Tokenising(data, Encoder(tokenizer, data.train_on))
    writer = ArrayWriter(folder, sources, data)
    memory = _PeakMemory()
    with _collecting_only_what_is_new(), _Pool(processes) as pool, _bar(console, size) as progress:
        for number, file, chunk, tokenised in _in_order(pool, writer):
            writer.add(number, file, tokenised)
            memory.look()
            progress(sources[number], file, chunk.read, writer.read)
    memory.look(at_once=True)
    if writer.bad_rows and data.on_bad_row == "error":
        raise ValueError(writer.bad().refusal(sources))
    return writer.finish().revised(
        seconds=round(time.monotonic() - start, 3), processes=max(processes, 1), peak_memory_bytes=memory.peak
    )


def _in_order(pool: "_Pool", writer: ArrayWriter) -> Iterator[tuple[int, int, Chunk, TokenisedChunk]]:
    """Yield (number of the source, of its file, chunk, the same tokenised), in the order of the files."""
    data = writer.data
    waiting: deque[tuple[int, int, Chunk, Future[TokenisedChunk]]] = deque()
    for number, source in enumerate(writer.sources):
        for file, chunk, shape in chunks_with_shape(source, writer.notes.append):
            # after a bad row all is refused in the end, so later chunks are only checked for more of them
            # (with truncation, only tokens show them)
            check_only = writer.bad_rows > 0 and data.on_bad_row == "error" and data.overlength != "truncate"
            waiting.append((number, file, chunk, pool.submit(_tokenise, source, shape, chunk, check_only)))
            if len(waiting) > IN_FLIGHT * pool.processes:
                yield _first(waiting, pool.processes)
    while waiting:
        yield _first(waiting, pool.processes)


def _first(
    waiting: deque[tuple[int, int, Chunk, Future[TokenisedChunk]]], processes: int
) -> tuple[int, int, Chunk, TokenisedChunk]:
    number, file, chunk, future = waiting.popleft()
    try:
        return number, file, chunk, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a process that prepared the data was killed, most likely for lack of memory; lower"
            f" data.num_proc (now {processes})"
        ) from None


@contextmanager
def _collecting_only_what_is_new() -> Iterator[None]:
    """Keep the garbage collector, here and in the forks, off all that torch and transformers hold."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Pool:
    """The forked processes; with 0 of them, submit() does the work itself."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.executor: ProcessPoolExecutor | None = None
        if processes:
            self.executor = ProcessPoolExecutor(processes, get_context("fork"), _begin, (os.getpid(),))
            self.executor.submit(int).result()  # forked now, before a progress bar has its thread

    def submit(self, do: Callable[..., TokenisedChunk], *arguments: Any) -> Future[TokenisedChunk]:
        if self.executor:
            return self.executor.submit(do, *arguments)
        future: Future[TokenisedChunk] = Future()
        future.set_result(do(*arguments))
        return future

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(cancel_futures=True)


class _PeakMemory:
    """Peak memory, in bytes, of this process and its forks; shared pages count once."""

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


@contextmanager
def _bar(console: Console | None, total: int) -> Iterator[Callable[[Source, int, int, int], None]]:
    """Show how far it is while the block runs; yield progress(source, file, bytes of it read, rows read)."""
    done: dict[str, int] = {}
    with LongWork(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
        expand=True,
    ) as bar:
        task = bar.add_task("preparing data", total=total or None, rows=0)

        def progress(source: Source, file: int, read: int, rows: int) -> None:
            place = source.place(file, 0)
            done[place] = max(done.get(place, 0), read)
            bar.update(task, completed=sum(done.values()), rows=rows)

        yield progress


def _check_space(folder: Path, size: int) -> None:
    free, needed = free_bytes(folder), 2 * size  # a token is about three bytes of text
    if free < needed:
        raise ValueError(
            f"data.cache_dir={folder.parent} has {free / 2**20:,.0f} MiB free, the prepared rows need about"
            f" {needed / 2**20:,.0f} MiB; free some, or set data.cache_dir to another disk"
        )

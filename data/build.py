"""Rows made into arrays on disk, by all cores, in the order of the files whatever finishes first.

One process reads and writes, the others (forked, so that they have the tokenizer) decode and tokenise a
megabyte at a time. `build(folder, sources, tokenizer, data)` fills a folder with what prepared.py opens and
returns what was counted.
"""

import gc
import os
import resource
import shutil
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
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qwenlora.configs.schema import Data
from qwenlora.data.arrays import Written, refusal
from qwenlora.data.chat import Encoder
from qwenlora.data.row_io import Chunk
from qwenlora.data.sources import Source
from qwenlora.data.tokenise import Done, Job, shaped, treat
from qwenlora.run.orphans import die_with_parent

SMALL_BYTES = 2**22  # less than this is not worth other processes
IN_FLIGHT = 3  # chunks a process, so that none waits and memory stays small


_job: Job | None = None  # set before they are forked


def _begin(parent: int) -> None:
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the one that started us decides


def _treat(source: Source, shape: str | None, chunk: Chunk, tokenise: bool) -> Done:
    assert _job is not None, "forked before the job was set"
    return treat(_job, source, shape, chunk, tokenise=tokenise)


def build(
    folder: Path, sources: list[Source], tokenizer: Any, data: Data, console: Console | None = None
) -> dict[str, Any]:
    """Write the pieces of all sources into folder/train and folder/eval; return what was counted.

    Raises: ValueError for files that cannot be read to their end.
    """
    global _job
    start = time.monotonic()
    size = sum(path.stat().st_size for source in sources for path in source.files)
    _check_space(folder, size)
    processes = data.num_proc or len(os.sched_getaffinity(0))
    if size < SMALL_BYTES or processes == 1:
        processes = 0  # no others
    _job = Job(data, Encoder(tokenizer, data.train_on))
    written = Written(folder, sources, data)
    memory = _Memory()
    with _collecting_only_what_is_new(), _Pool(processes) as pool, _bar(console, size) as progress:
        waiting: deque[tuple[int, int, Chunk, Future[Done]]] = deque()

        def take() -> None:
            number, file, chunk, future = waiting.popleft()
            try:
                written.add(number, file, future.result())
            except BrokenProcessPool:
                raise ValueError(
                    "a process that prepared the data was killed, most likely for lack of memory; lower"
                    f" data.num_proc (now {processes})"
                ) from None
            memory.look()
            progress(sources[number], file, chunk.read, written.read)

        for number, source in enumerate(sources):
            for file, chunk, shape in shaped(source, written.notes.append):
                # bad rows are refused in the end: then those to come are counted, no more (cutting needs
                # their tokens)
                tokenise = (
                    not (written.bad_rows and data.on_bad_row == "error") or data.overlength == "truncate"
                )
                waiting.append((number, file, chunk, pool.submit(_treat, source, shape, chunk, tokenise)))
                if len(waiting) > IN_FLIGHT * processes:
                    take()
        while waiting:
            take()
    memory.look(at_once=True)
    if written.bad_rows and data.on_bad_row == "error":
        raise ValueError(refusal(written.counts(), sources))
    facts = written.finish()
    return facts | {
        "seconds": round(time.monotonic() - start, 3),
        "processes": max(processes, 1),
        "peak_memory_bytes": memory.peak,
    }


@contextmanager
def _collecting_only_what_is_new() -> Iterator[None]:
    """Keep the garbage collector from walking over all that torch and transformers hold, here and in the
    forks."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Pool:
    """The other processes; with none of them, work is done at once."""

    def __init__(self, processes: int) -> None:
        self.executor: ProcessPoolExecutor | None = None
        if processes:
            self.executor = ProcessPoolExecutor(processes, get_context("fork"), _begin, (os.getpid(),))
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
            done: dict[str, int] = {}

            def progress(source: Source, file: int, read: int, rows: int) -> None:
                place = source.place(file, 0)
                done[place] = max(done.get(place, 0), read)
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

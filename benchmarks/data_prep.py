"""python benchmarks/data_prep.py --peer-python PATH: preparing rows, against TRL and a plain map, on the same
cores.

Each measurement is a process of its own, held to --cores cores; ours and theirs take turns, so that a busy
machine is busy for all. Rows and tokens are compared one by one before a number is shown. `--million`
prepares a generated file instead and watches the memory of all its processes from outside. What the numbers
mean: README.md beside this file.

The parts that run in the peer's interpreter need trl, datasets and transformers there, and not qwenlora.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
TRL = "trl==1.16.0"
MAX_LENGTH = 2048
SETTLED_S = 2.5  # a file's digest is remembered once its last change is two seconds old
SAMPLE_S = 0.5  # a sample takes about ten milliseconds
CHECKED_ROWS = 500
PACKAGES = ("qwenlora", "trl", "transformers", "tokenizers", "datasets", "torch", "numpy")
ROLES = {"human": "user", "gpt": "assistant"}
Facts = dict[str, Any]


class Measured(NamedTuple):
    """One line of the table. alone: num_proc is None, which is TRL's default; after: whose caches it
    finds."""

    label: str
    part: str
    alone: bool = False
    after: str | None = None


MEASURED = {
    "ours": Measured("qwenlora", "ours"),
    "trl": Measured("TRL, as many processes", "trl"),
    "trl_alone": Measured("TRL, no other process", "trl", alone=True),
    "map": Measured("plain map, as many processes", "map"),
    "map_alone": Measured("plain map, no other process", "map", alone=True),
    "ours_again": Measured("qwenlora, second start", "ours", after="ours"),
    "trl_again": Measured("TRL, second start", "trl", alone=True, after="trl_alone"),
}


def main() -> None:
    """Run the measurements that the command line asks for."""
    options = read_options()
    if options.part:
        run_part(options)
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with tempfile.TemporaryDirectory(prefix="data-prep-", dir=options.folder) as folder:
            measure = measure_million if options.million else measure_peers
            found = measure(options, Path(folder), console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """Return the command line, checked."""
    parser = argparse.ArgumentParser(description="Time the preparation of rows, against TRL and a plain map.")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(sys.executable), help=f"an interpreter with {TRL}"
    )
    parser.add_argument(
        "--data", type=Path, default=ASSETS / "data" / "medical_qa_sharegpt.jsonl", help="ShareGPT rows"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=ASSETS / "tokenizers" / "qwen3", help="a Qwen's, in a folder"
    )
    parser.add_argument(
        "--cores", type=int, nargs="+", help="cores, and processes, to measure with (default: 1 and all)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is measured, in turns")
    parser.add_argument(
        "--million", action="store_true", help="prepare a generated file and watch its memory"
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of that file")
    parser.add_argument("--folder", type=Path, help="where temporary files go (--million: 2.5 GB)")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--num-proc", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    there = len(os.sched_getaffinity(0))
    options.cores = options.cores or ([there] if options.million else sorted({1, there}))
    if not all(1 <= cores <= there for cores in options.cores):
        parser.error(f"--cores {' '.join(map(str, options.cores))}: this machine has {there} for us")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    for path, name in (
        (options.data, "--data"),
        (options.tokenizer, "--tokenizer"),
        (options.folder, "--folder"),
    ):
        if path and not path.exists():
            parser.error(f"{name} {path}: no such file or folder")
    return options


# ---- against the peers


def measure_peers(options: argparse.Namespace, folder: Path, console: Console) -> Facts:
    """Measure ours, TRL and the plain map in turns; check that all made the same tokens; show and return it
    all."""
    check_peer(options.peer_python)
    messages = folder / "messages.jsonl"
    rows = write_messages(options.data, messages)
    here, there = Path(sys.executable), options.peer_python
    results: dict[int, dict[str, list[Facts]]] = {cores: defaultdict(list) for cores in options.cores}
    for repeat in range(1, options.repeats + 1):
        for cores in options.cores:
            for name, measured in MEASURED.items():  # in turns
                work = folder / f"{repeat}-{cores}" / (measured.after or name)
                work.mkdir(parents=True, exist_ok=True)
                python, data = (here, options.data) if measured.part == "ours" else (there, messages)
                num_proc = 0 if measured.alone else cores
                facts = start_part(measured.part, python, data, cores, num_proc, work, options)
                results[cores][name].append(facts)
                console.print(
                    f"{cores} cores, turn {repeat}: {measured.label}: {facts['seconds']:.2f} s",
                    highlight=False,
                )
            check_same(folder / f"{repeat}-{cores}", rows)
    tokens, trained = check_counts(results, rows)
    for cores in options.cores:
        show_peers(console, cores, results[cores], rows, tokens)
    versions = {name: results[options.cores[0]][name][0]["versions"] for name in ("ours", "trl")}
    machine = machine_facts() | {"versions": versions}
    console.print(
        f"{rows:,} rows, {tokens:,} tokens, {trained:,} of them trained by qwenlora; every row has the same"
        f" token ids everywhere; {machine['cpu']}, {machine['cores']} cores",
        highlight=False,
    )
    for name, packages in versions.items():
        console.print(f"{'qwenlora' if name == 'ours' else 'peer'}: {packages}", highlight=False)
    return {"rows": rows, "tokens": tokens, "trained_tokens": trained, "machine": machine, "cores": results}


def check_peer(python: Path) -> None:
    """Raise ValueError unless an interpreter has trl."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    try:
        answer = subprocess.run([python, "-c", code], check=False)
    except OSError as error:
        raise ValueError(f"--peer-python {python}: {error.strerror}") from None
    if answer.returncode:
        raise ValueError(
            f"--peer-python {python} has no trl; install it there: {python} -m pip install {TRL}"
        )


def write_messages(source: Path, target: Path) -> int:
    """Write ShareGPT rows as TRL's messages, which costs TRL no time then; return how many."""
    count = 0
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as file:
        for line in lines:
            turns = json.loads(line)["conversations"]
            messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            count += 1
    return count


def check_same(work: Path, rows: int) -> None:
    """Assert that all made the same tokens of every row."""
    ours = read_ids(work / "ours" / "ours.npz")
    assert len(ours) == rows, f"{len(ours)} rows here, {rows} in the file"
    for name, measured in MEASURED.items():
        theirs = read_ids(work / (measured.after or name) / f"{measured.part}.npz")
        assert len(theirs) == rows, f"{len(theirs)} rows in {name}, {rows} in the file"
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert mine.tolist() == other.tolist(), (
                f"row {number} has other tokens in {name}: {mine} and {other}"
            )


def check_counts(results: dict[int, dict[str, list[Facts]]], rows: int) -> tuple[int, int]:
    """Assert that every measurement did the whole work; return the tokens, and how many ours trains."""
    every = [facts for found in results.values() for name in found for facts in found[name]]
    (tokens,) = {facts["tokens"] for facts in every}
    (trained,) = {facts["trained_tokens"] for found in results.values() for facts in found["ours"]}
    assert {facts["rows"] for facts in every} == {rows}
    assert 0 < trained < tokens
    return tokens, trained


def show_peers(console: Console, cores: int, found: dict[str, list[Facts]], rows: int, tokens: int) -> None:
    """Print the table of one number of cores."""
    table = Table(title=f"{cores} core{'s' * (cores > 1)}: seconds of each turn, and what their median makes")
    for heading in ("what", "seconds", "median", "rows/s", "tokens/s", "x qwenlora"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    middle = {name: median(facts["seconds"] for facts in found[name]) for name in MEASURED}
    for name, measured in MEASURED.items():
        seconds, against = middle[name], middle["ours_again" if measured.after else "ours"]
        each = " ".join(f"{facts['seconds']:.2f}" for facts in found[name])
        speeds = [f"{count / seconds:,.0f}" for count in (rows, tokens)]
        table.add_row(measured.label, each, f"{seconds:.2f}", *speeds, f"{seconds / against:.2f}")
    console.print(table)
    best = {peer: min(middle[peer], middle[f"{peer}_alone"]) / middle["ours"] for peer in ("trl", "map")}
    console.print(
        f"TRL takes {middle['trl'] / middle['ours']:.2f} times as long with as many processes,"
        f" {best['trl']:.2f} times at its best (wanted: 2); the plain map {best['map']:.2f} times at its"
        f" best; second start in {middle['ours_again']:.3f} s (wanted: under 0.5)",
        highlight=False,
    )
    load = median(facts["load_seconds"] for facts in found["trl"])
    console.print(
        f"not in TRL's and the map's time: load_dataset of the file, {load:.2f} s\n", highlight=False
    )


# ---- a million rows


def measure_million(options: argparse.Namespace, folder: Path, console: Console) -> Facts:
    """Prepare a generated file, watched from outside; check that it was done; show and return what was
    seen."""
    cores = options.cores[-1]
    data = folder / "rows.jsonl"
    console.print(f"writing {options.rows:,} rows to {data}")
    write_rows(options.data, data, options.rows)
    time.sleep(SETTLED_S)
    here = Path(sys.executable)
    console.print(f"preparing {data.stat().st_size / 1e9:.2f} GB on {cores} cores")
    with Watch() as watch:
        cold = start_part("million", here, data, cores, cores, folder, options, watch)
    again = start_part("ours_again", here, data, cores, cores, folder, options)
    checked = start_part("check", here, data, cores, cores, folder, options)
    assert cold["rows"] == again["rows"] == checked["rows"] == options.rows, (cold, again, checked)
    assert cold["tokens"] == again["tokens"] == checked["tokens"]
    assert 0 < cold["trained_tokens"] < cold["tokens"]
    assert checked["same"] == min(CHECKED_ROWS, options.rows)
    disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    found = {
        "rows": options.rows,
        "file_bytes": data.stat().st_size,
        "tokens": cold["tokens"],
        "trained_tokens": cold["trained_tokens"],
        "cores": cores,
        "seconds": cold["seconds"],
        "peak_pss_bytes": watch.peak_pss,
        "peak_rss_bytes": watch.peak_rss,
        "peak_memory_bytes_own": cold["peak_memory_bytes"],
        "samples": watch.samples,
        "packing_seconds": checked["packing_seconds"],
        "packs": checked["packs"],
        "pack_fill": checked["pack_fill"],
        "second_start_seconds": again["seconds"],
        "disk_bytes": disk,
        "machine": machine_facts() | {"versions": cold["versions"]},
    }
    table = Table(title=f"{options.rows:,} rows on {cores} cores", show_header=False)
    for name, value in (
        ("file, prepared folder", f"{found['file_bytes'] / 1e9:.2f} GB, {disk / 1e9:.2f} GB"),
        ("tokens, trained ones", f"{found['tokens']:,}, {found['trained_tokens']:,}"),
        ("prepared in", f"{found['seconds']:.1f} s"),
        (
            "rows/s, tokens/s",
            f"{options.rows / cold['seconds']:,.0f}, {cold['tokens'] / cold['seconds']:,.0f}",
        ),
        (
            "peak memory of all processes, shared pages once (PSS)",
            f"{watch.peak_pss / 1e9:.2f} GB (wanted: under 3)",
        ),
        ("the same, shared pages in each (RSS)", f"{watch.peak_rss / 1e9:.2f} GB, {watch.samples} samples"),
        ("peak memory as qwenlora tells it", f"{cold['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("of the time, packing", f"{checked['packing_seconds']:.2f} s"),
        ("packs, how full", f"{checked['packs']:,}, {checked['pack_fill']:.4%}"),
        ("second start", f"{again['seconds']:.3f} s (wanted: under 0.5)"),
        ("rows compared with apply_chat_template", f"{checked['same']:,}, all the same"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores; {cold['versions']}", highlight=False
    )
    return found


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write rows like those of source: the same lengths in characters, in new words; the same ones each time.

    A clause is replaced by the halves of two others that are as long together. Whole clauses would come back
    so often that the tokenizer's cache of words knew them, which it does not in real text.
    """
    rows = [json.loads(line)["conversations"] for line in source.open(encoding="utf-8")]
    split = [
        [
            (turn["from"], re.findall(r"[^，。？！；、]+[，。？！；、]*|^[，。？！；、]+", turn["value"]))
            for turn in row
        ]
        for row in rows
    ]
    heads: dict[int, list[str]] = defaultdict(list)
    tails: dict[int, list[str]] = defaultdict(list)
    for row in split:
        for _, clauses in row:
            for clause in clauses:
                heads[len(clause)].append(clause[: len(clause) // 2])
                tails[len(clause)].append(clause[len(clause) // 2 :])
    draw = random.Random(0).random

    def new(length: int) -> str:
        first, second = heads[length], tails[length]
        return first[int(draw() * len(first))] + second[int(draw() * len(second))]

    with target.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = split[int(draw() * len(split))]
            turns = [
                {"from": who, "value": "".join(new(len(clause)) for clause in said)} for who, said in row
            ]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


class Watch:
    """Samples the memory of a process and all that it starts, from outside, until the block ends."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.peak_pss = self.peak_rss = self.samples = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_S):
            if self.pid is None:
                continue
            pss = rss = 0
            for pid in family(self.pid):
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue  # it has ended
                sizes = {
                    name: int(size)
                    for name, size in re.findall(r"^(Pss|Rss):\s+(\d+) kB", text, re.MULTILINE)
                }
                pss, rss = pss + sizes.get("Pss", 0) * 1024, rss + sizes.get("Rss", 0) * 1024
            self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)
            self.samples += bool(rss)


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started, and they."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child))


# ---- a part: one measurement in a process of its own


def start_part(
    part: str,
    python: Path,
    data: Path,
    cores: int,
    num_proc: int,
    work: Path,
    options: argparse.Namespace,
    watch: Watch | None = None,
) -> Facts:
    """Run one part of this file in an interpreter; return what it measured. Raises: ValueError when it
    fails."""
    answer, log = work / f"{part}.json", work / f"{part}.log"
    answer.unlink(missing_ok=True)
    command: list[str | Path] = [python, Path(__file__).absolute(), "--part", part, "--work", work]
    command += ["--cores", str(cores), "--num-proc", str(num_proc)]
    command += ["--data", data.absolute(), "--tokenizer", options.tokenizer.absolute()]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),  # empty at first: cold
        "HF_DATASETS_CACHE": str(work / "hf" / "datasets"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(cores),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        if watch:
            watch.pid = process.pid
        process.wait()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{part} ended with {process.returncode}: {' '.join(last)}")
    facts: Facts = json.loads(answer.read_text(encoding="utf-8"))
    return facts


def run_part(options: argparse.Namespace) -> None:
    """Measure one part in this process, held to its cores."""
    (cores,) = options.cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    facts = PARTS[options.part](options)
    answer = options.work / f"{options.part}.json"
    answer.write_text(json.dumps(facts | {"versions": versions()}), encoding="utf-8")


def part_ours(options: argparse.Namespace) -> Facts:
    """Prepare with qwenlora; the cache in the work folder decides whether this is a first or a second
    start."""
    facts, rows = prepare_ours(options)
    side = rows.side("train")
    write_ids(options.work, "ours", (side.row(number).ids for number in range(len(side))))
    return facts


def part_million(options: argparse.Namespace) -> Facts:
    """Prepare with qwenlora in a process that has loaded what a run's has: torch, transformers, peft."""
    import qwenlora.trainer.prepare  # noqa: F401

    return prepare_ours(options)[0]


def part_again(options: argparse.Namespace) -> Facts:
    """Open with qwenlora what is prepared."""
    return prepare_ours(options)[0]


def prepare_ours(options: argparse.Namespace) -> tuple[Facts, Any]:
    """Return what preparing with qwenlora took, until the rows could be trained, and the rows."""
    from qwenlora.configs.schema import Data
    from qwenlora.data import prepared

    tokenizer = load_tokenizer(options.tokenizer)
    data = Data(
        train=str(options.data), num_proc=options.num_proc, max_length=MAX_LENGTH, overlength="truncate"
    )
    start = time.perf_counter()
    rows = prepared.prepare(data, tokenizer, options.work / "cache")
    rows.refuse(data, tokenizer, len(tokenizer))
    side, packs = rows.side("train"), rows.packs()
    seconds = time.perf_counter() - start
    assert side is not None, "there are rows"
    counts = rows.counts["train"]
    assert not rows.index.bad.count, rows.bad_report
    assert len(side) == counts.rows
    assert int(side.lengths.sum(dtype=np.int64)) == len(side.ids) == counts.tokens
    assert len(packs) == counts.packs
    facts = {name: getattr(counts, name) for name in ("rows", "tokens", "trained_tokens", "packs")}
    facts |= {name: getattr(rows.index, name) for name in ("processes", "peak_memory_bytes")}
    return facts | {"seconds": seconds, "build_seconds": rows.index.seconds}, rows


def part_check(options: argparse.Namespace) -> Facts:
    """Compare some prepared rows with what the tokenizer itself makes of them, and time the packing alone."""
    from qwenlora.data.packing import pack

    facts, rows = prepare_ours(options)
    side, packs = rows.side("train"), rows.packs()
    lengths = np.array(side.lengths)
    start = time.perf_counter()
    again = pack(lengths, MAX_LENGTH)
    seconds = time.perf_counter() - start
    assert again.rows.tolist() == packs.rows.tolist()
    assert again.ends.tolist() == packs.ends.tolist()
    assert np.bincount(packs.rows, minlength=len(side)).tolist() == [1] * len(side), "each row is packed once"
    assert int(packs.lengths(lengths).max()) <= MAX_LENGTH
    tokenizer = load_tokenizer(options.tokenizer)
    wanted = set(random.Random(0).sample(range(len(side)), min(CHECKED_ROWS, len(side))))
    same = 0
    with options.data.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number in wanted:
                turns = json.loads(line)["conversations"]
                messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
                ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
                tokens = side.row(number)
                assert tokens.ids.tolist() == ids[:MAX_LENGTH], f"row {number} has other tokens"
                assert tokens.trained.any(), f"row {number} trains nothing"
                same += 1
    fill = counts_of(lengths) / (len(packs) * MAX_LENGTH)
    return facts | {"packing_seconds": seconds, "same": same, "pack_fill": fill}


def part_trl(options: argparse.Namespace) -> Facts:
    """Construct TRL's SFTTrainer on a Qwen3 of few parameters; time the part that prepares the rows."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(options.tokenizer)
    size = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(size)
    settings = SFTConfig(
        output_dir=str(options.work / "trl"),
        dataset_num_proc=options.num_proc or None,
        packing=False,
        max_length=MAX_LENGTH,
        assistant_only_loss=False,  # Qwen's templates mark no replies
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    spent: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._prepare_dataset(*arguments, **named)
            spent.append(time.perf_counter() - start)
            return dataset

    dataset, load_seconds = load_rows(options.data)
    start = time.perf_counter()
    trainer = Timed(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    construction = time.perf_counter() - start
    (seconds,) = spent
    facts = write_ids(options.work, "trl", trainer.train_dataset["input_ids"])
    return facts | {"seconds": seconds, "load_seconds": load_seconds, "construction_seconds": construction}


def part_map(options: argparse.Namespace) -> Facts:
    """Tokenise with nothing but datasets.map and the tokenizer's own template."""
    tokenizer = load_tokenizer(options.tokenizer)
    dataset, load_seconds = load_rows(options.data)

    def tokens(row: Facts) -> Facts:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)}

    start = time.perf_counter()
    dataset = dataset.map(tokens, num_proc=options.num_proc or None)
    seconds = time.perf_counter() - start
    return write_ids(options.work, "map", dataset["input_ids"]) | {
        "seconds": seconds,
        "load_seconds": load_seconds,
    }


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer, having used it once, so that what it imports lazily is there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    return tokenizer


def load_rows(file: Path) -> tuple[Any, float]:
    """Return a file of messages as a Dataset on disk, and the seconds that took."""
    from datasets import load_dataset

    start = time.perf_counter()
    dataset = load_dataset("json", data_files=str(file), split="train")
    return dataset, time.perf_counter() - start


def write_ids(work: Path, name: str, rows: Any) -> Facts:
    """Keep the ids of all rows, to be compared; return how many there are."""
    arrays = [np.asarray(ids, np.int32) for ids in rows]
    lengths = np.array([len(ids) for ids in arrays], np.int64)
    np.savez(work / f"{name}.npz", ids=np.concatenate(arrays), lengths=lengths)
    return {"rows": len(lengths), "tokens": counts_of(lengths)}


def read_ids(file: Path) -> list[Any]:
    """Return int32 [length] for each row that a part made."""
    with np.load(file) as held:
        ids, ends = held["ids"], np.concatenate([[0], np.cumsum(held["lengths"])]).tolist()
    return [ids[start:end] for start, end in pairwise(ends)]


def counts_of(lengths: Any) -> int:
    """Return the tokens of rows of these lengths."""
    return int(lengths.sum(dtype=np.int64))


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts() -> Facts:
    """Return what machine this is."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", text)
    return {"cpu": model[1] if model else platform.machine(), "cores": len(os.sched_getaffinity(0))}


PARTS: dict[str, Callable[[argparse.Namespace], Facts]] = {
    "ours": part_ours,
    "ours_again": part_again,
    "million": part_million,
    "check": part_check,
    "trl": part_trl,
    "map": part_map,
}

if __name__ == "__main__":
    main()

"""One model of a base and an adapter, or several: `qwenlora merge runs/tiny merged`.

The base is read and the merged model written tensor by tensor, so that the largest model merges in the memory
of a few of its tensors. The formulas are peft's own, in float32, rounded once. Before success is said, the
logits of base and adapter are compared with those of the files that were written, both computed layer by
layer (streamed.py).
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils import logging as transformers_logging

from qwenlora.adapter import verify
from qwenlora.adapter.answers import Question, check_text, prompt_of, questions
from qwenlora.adapter.loading import DTYPES, tokenizer_of
from qwenlora.adapter.merge import combined
from qwenlora.adapter.merge.streamed import Compared, Streamed, compare
from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.subject import Subject
from qwenlora.adapter.weight_files import Entry, MergedFiles, Rounded, opened, size_of
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model.base_files import SLICE

PROMPTS = (
    "你好",
    "你是谁？请简单介绍一下自己。",
    "Why is the sky blue?",
    "把这句话翻译成英语：今天天气很好，我们去公园散步吧。",
    "Write a Python function that returns the n-th Fibonacci number.",
    "小明有 12 个苹果，吃了 5 个，又买了 8 个，现在有几个？",
    "List three things to keep in mind when you store food in a fridge.",
)
ENOUGH = 0.95  # of what an adapter changes; rounding that leaves less is told
OWN_PROMPTS = 5  # training questions that are asked, too
MOST_PROMPTS, LONGEST_PROMPT = 32, 512  # tokens


def merge(
    subjects: list[Subject],
    out: Path,
    *,
    weights: str | None = None,
    combine: str = "cat",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    prompts: Path | None = None,
) -> int:
    """Make the folder out, or nothing; return the exit code. The arguments are the command's.

    Raises: ValueError for what cannot be merged, and when the merged model's logits are not those of base and
    adapter.
    """
    transformers_logging.set_verbosity_error()
    first = subjects[0]
    shares = combined.shares_of(weights, len(subjects))
    wanted, shard_size = _dtype(dtype), size_of(max_shard_size)
    out = free_folder(out, read=tuple(folder for one in subjects for folder in (one.adapter, one.base)))
    for subject in subjects:
        verify.check(subject)
    combined.check(subjects, shares, combine)
    config = _config_of(first)
    tokenizer = tokenizer_of(first)
    asked = _asked(first, prompts)
    batch = _batch(tokenizer, asked, config.get_text_config().vocab_size)
    trust, revision = first.config.model.trust_remote_code, first.config.model.revision
    say(f"merging {', '.join(subject.label for subject in subjects)} into {first.base}")
    if any(subject.run and subject.config.strategy.quantization != "none" for subject in subjects):
        say(
            "note: trained over a quantised base, merged into its full-precision weights, with which it is"
            " compared: answers may differ a little from those in training"
        )

    with (
        Progress(transient=True, disable=not sys.stdout.isatty()) as progress,
        opened(first.base, revision) as files,
    ):
        base = Streamed(config, files, trust_remote_code=trust)
        base.attach(combined.adapted(base, subjects, shares, combine))
        unmerged = base.logits(batch, progress, "base and adapter")
        untied = not base.still_tied()
        entries = _entries(base, wanted, untied)
        with staging(out, sum(entry.size for entry in entries.values())) as folder:
            with MergedFiles(folder, entries, shard_size) as made:
                rounded, kept = _write(base, made, entries, progress)
            config.tie_word_embeddings = config.tie_word_embeddings and not untied
            with opened(str(folder)) as written:
                merged = Streamed(config, written, trust_remote_code=trust)
                again = Streamed(config, Rounded(written, rounded), trust_remote_code=trust)
                compared = compare(unmerged, merged, again, batch, progress)
            if not compared.judged <= compared.bound < math.inf:
                prompt = asked[compared.worst].messages[-1]["content"]
                raise ValueError(f"{out} was not made: on {prompt!r} {_said(compared)}; please report this")
            _write_beside(first, folder, tokenizer, wanted, untied)
    _report(out, made, entries, untied, compared)
    if kept < ENOUGH:
        coarse = "/".join(sorted({_name(entry.dtype) for entry in entries.values()}))
        say(
            f"warning: rounding to {coarse} leaves {kept:.0%} of what the adapter changes in the weights;"
            " --dtype fp32 keeps all of it, and so does serving the adapter unmerged"
        )
    return 0


def say(line: str) -> None:
    """Print a line, at once."""
    print(line, flush=True)


# what is refused, before anything is read


def _dtype(name: str) -> torch.dtype | None:
    """Return the dtype of the merged weights; None: that of the base's files."""
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; expected {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, DTYPES[name])


def _config_of(subject: Subject) -> Any:
    config = models.load_config_of(subject.config, subject.base)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{subject.base} is quantised in its files, and what is merged into it would be rounded away;"
            " name the model it was made from with --base"
        )
    return config


# the merged weights


def _entries(base: Streamed, dtype: torch.dtype | None, untied: bool) -> dict[str, Entry]:
    """Return what is to be written: the tensors of the base's files, and of matrices no longer tied the
    second."""
    entries = {name: Entry(dtype or place.dtype, place.shape) for name, place in base.files.places.items()}
    for parameter in base.tied if untied else ():
        if not base.names(parameter):
            one = entries[_source(base, parameter)]
            entries |= dict.fromkeys(base.as_filed(parameter, torch.empty(one.shape, device="meta")), one)
    return entries


def _source(base: Streamed, parameter: str) -> str:
    """Return the tensor of the files that a parameter is, by itself or because it is tied to another."""
    return next(name for tied in (parameter, *base.tied) for name in base.names(tied))


def _write(
    base: Streamed, made: MergedFiles, entries: dict[str, Entry], progress: Progress
) -> tuple[set[str], float]:
    """Write all tensors; return the names of those that were rounded, and how much of the adapter's change is
    left."""
    task = progress.add_task("merging", total=made.size)
    places, rounded = base.files.places, set()
    left, kept, changed = dict(entries), 0.0, 0.0
    for parameter, values in base.merged():
        filed = base.as_filed(parameter, values)
        dtype = next((entries[name].dtype for name in filed if name in left), torch.float32)
        if dtype != torch.float32 and (base.names(parameter) or parameter in base.tied):
            here, change = _left_of_the_change(base.value(parameter), values, dtype)
            kept, changed = kept + here, changed + change
        for name, part in filed.items():
            if name in left:
                made.write(name, part)
                progress.advance(task, left.pop(name).size)
                rounded.add(name)
    for name, entry in left.items():
        source = name if name in places else _source(base, base.tied[0])
        count = math.prod(entry.shape)
        for start in range(0, count, SLICE):
            made.write(name, base.files.read(source, start, min(start + SLICE, count)), start)
            progress.advance(task, min(SLICE, count - start) * entry.dtype.itemsize)
        if torch.promote_types(places[source].dtype, entry.dtype) != entry.dtype:
            rounded.add(name)
    made.finish()
    return rounded, kept / changed if changed else 1.0


def _left_of_the_change(before: Tensor, merged: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return what of a change rounding leaves, along it, and the change, both as sums of squares.

    before: the base's weight. A change that is small beside a weight's last bit is rounded away; where the
    base itself has that dtype, all of such changes are.
    """
    if before.shape != merged.shape:
        return 0.0, 0.0
    left = whole = 0.0
    for old, new in zip(
        torch.split(before.flatten(), SLICE), torch.split(merged.flatten(), SLICE), strict=True
    ):
        change = new.float() - old.float()
        left += float(((new.to(dtype).float() - old.float()) * change).sum(dtype=torch.float64))
        whole += float((change * change).sum(dtype=torch.float64))
    return left, whole


def _write_beside(
    subject: Subject, folder: Path, tokenizer: Any, dtype: torch.dtype | None, untied: bool
) -> None:
    """Write all that is no weight; config.json, which makes a folder a model, last."""
    tokenizer.save_pretrained(folder)
    held = _file_of(subject, CONFIG_NAME)
    assert held is not None
    for script in held.parent.glob("*.py"):
        shutil.copyfile(script, folder / script.name)
    own = Path(subject.adapter or "") / GENERATION_CONFIG_NAME
    if generation := own if own.is_file() else _file_of(subject, GENERATION_CONFIG_NAME):
        shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
    # as the base has it: transformers would write it in today's spelling, which other engines may not know
    config = json.loads(held.read_text(encoding="utf-8"))
    if untied:
        config["tie_word_embeddings"] = False
    if dtype:
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
            config[key] = _name(dtype)
    (folder / CONFIG_NAME).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _file_of(subject: Subject, name: str) -> Path | None:
    revision = subject.config.model.revision
    found = cached_file(subject.base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


# the comparison


def _asked(subject: Subject, prompts: Path | None) -> list[Question]:
    """Return the questions of a file; without one those that are built in, and the first of the run's own."""
    if prompts is None:
        own: list[Question] = []
        with suppress(ValueError, OSError):  # the run's data need not be there any more
            own = list(islice(questions(subject.config.data), OWN_PROMPTS)) if subject.run else []
        return [Question([{"role": "user", "content": text}]) for text in PROMPTS] + own
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {prompts} cannot be read as text: {error}") from None
    if not lines:
        raise ValueError(f"--prompts {prompts} is empty; expected a prompt a line")
    for number, line in enumerate(lines, 1):
        check_text(line, f"--prompts {prompts}: prompt {number}")
    if len(lines) > MOST_PROMPTS:
        say(f"note: the first {MOST_PROMPTS} of {len(lines)} prompts are compared")
    return [Question([{"role": "user", "content": text}]) for text in lines[:MOST_PROMPTS]]


def _batch(tokenizer: Any, asked: list[Question], vocabulary: int) -> Mapping[str, Tensor]:
    """Return the prompts as the chat template has them, of long ones the end."""
    texts = [prompt_of(tokenizer, question) for question in asked]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][-LONGEST_PROMPT:] for text in texts]
    if (highest := max(map(max, ids))) >= vocabulary:
        raise ValueError(
            f"the tokenizer makes token {highest}, the base has {vocabulary}; they do not belong together"
        )
    padded: Mapping[str, Tensor] = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return padded


def _report(
    out: Path, made: MergedFiles, entries: dict[str, Entry], untied: bool, compared: Compared
) -> None:
    dtypes = "/".join(sorted({_name(entry.dtype) for entry in entries.values()}))
    files = "1 file" if len(made.files) == 1 else f"{len(made.files)} files"
    size = f"{made.size / 1e9:,.1f} GB" if made.size > 1e9 else f"{made.size / 1e6:,.1f} MB"
    say(f"{out}: {made.numbers:,} parameters, {dtypes}, {size} in {files}")
    if untied:
        say(
            "embeddings and head, one matrix in the base, differ now: both are written, tie_word_embeddings"
            " is false"
        )
    say(_said(compared))
    say(f'load it: AutoModelForCausalLM.from_pretrained("{out}")')


def _said(compared: Compared) -> str:
    typical = f", typically {compared.judged:.2g}" if compared.judged != compared.difference else ""
    return (
        "the merged model's logits differ from those of base and adapter by at most"
        f" {compared.difference:.2g}{typical} (rounding alone causes {compared.rounding:.2g}, the bound is"
        f" {compared.bound:.2g})"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

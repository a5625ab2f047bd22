"""Merge a base and an adapter, or several, into a model: `qwenlora merge runs/tiny merged`.

Tensors are read, merged by peft's formulas in float32, rounded once and written one at a time, so the memory
of a few is enough for any model. The logits of base and adapter are compared with those of the written files.
"""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)
from transformers.utils import logging as transformers_logging

from qwenlora.adapter import verify
from qwenlora.adapter.answers import Question, check_text, prompt_of, training_questions
from qwenlora.adapter.loading import DTYPES, load_tokenizer
from qwenlora.adapter.merge.combined import attach_adapters, check_combination, parse_weights
from qwenlora.adapter.merge.streamed import LogitDifference, StreamedModel, compare_logits
from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.subject import Subject
from qwenlora.adapter.weight_files import (
    RoundedFiles,
    SafetensorsWriter,
    TensorSpec,
    open_weights,
    parse_size,
)
from qwenlora.run.format import count, size
from qwenlora.run.long_work import LongWork
from qwenlora.trainer.model import pretrained, quantised
from qwenlora.trainer.model.architecture import loader_of
from qwenlora.trainer.model.base_files import SLICE
from qwenlora.trainer.model.damage import read_json
from qwenlora.trainer.model.endings import (
    Settings,
    generation_settings,
    is_text_only,
    set_end,
    set_model_end,
    settings_text,
)
from qwenlora.trainer.model.names import VISION

PROMPTS = (
    "你好",
    "你是谁？请简单介绍一下自己。",
    "Why is the sky blue?",
    "把这句话翻译成英语：今天天气很好，我们去公园散步吧。",
    "Write a Python function that returns the n-th Fibonacci number.",
    "小明有 12 个苹果，吃了 5 个，又买了 8 个，现在有几个？",
    "List three things to keep in mind when you store food in a fridge.",
)
PROCESSORS = (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME)
ENOUGH = 0.95  # share of the adapter's change; if rounding leaves less, the user is warned
OWN_PROMPTS = 5  # training questions that are added to PROMPTS
MOST_PROMPTS, LONGEST_PROMPT = 32, 512  # LONGEST_PROMPT: tokens


class MergeOptions(NamedTuple):
    """The command's options. dtype: one of DTYPES; prompts: a file of prompts to compare logits on."""

    weights: str | None = None
    combine: str = "cat"
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    prompts: Path | None = None


class _Written(NamedTuple):
    """The merged weights. rounded: names of rounded tensors; kept: the share left of the adapter's change."""

    text: str
    rounded: set[str]
    kept: float
    dtypes: str


def merge(subjects: list[Subject], out: Path, options: MergeOptions | None = None) -> int:
    """Make the folder out; return the exit code. Raises: ValueError for adapters or logits that misfit."""
    options = options or MergeOptions()
    transformers_logging.set_verbosity_error()
    first = subjects[0]
    weights = parse_weights(options.weights, len(subjects))
    dtype, shard_size = _parse_dtype(options.dtype), parse_size(options.max_shard_size)
    out = free_folder(out, read=tuple(folder for each in subjects for folder in (each.adapter, each.base)))
    config = _base_config(first)
    modules = [module for subject in subjects for module in verify.check_adapter(subject).modules]
    vision = any(VISION in module.split(".") for module in modules)
    check_combination(subjects, weights, options.combine)
    tokenizer = load_tokenizer(first)
    questions = _read_prompts(options.prompts) if options.prompts else _default_prompts(first)
    batch = _batch(tokenizer, questions, config.get_text_config().vocab_size)
    trust, revision = first.config.model.trust_remote_code, first.config.model.revision
    say(f"merging {', '.join(subject.label for subject in subjects)} into {first.base}")
    for note in verify.notes_on(first):
        say(f"note: {note}")
    if any(map(_trained_over_quantised, subjects)):
        say(
            "note: trained over a quantised base, merged into its full-precision weights, with which it is"
            " compared: answers may differ a little from those in training"
        )

    with LongWork() as progress, open_weights(first.base, revision) as files:
        base = StreamedModel(config, files, trust_remote_code=trust, vision=vision)
        base.attach(attach_adapters(base, subjects, weights, options.combine))
        unmerged = base.logits(batch, progress, "base and adapter")
        untied = not base.still_tied()
        specs = _plan(base, dtype, untied)
        with staging(out, sum(spec.size for spec in specs.values())) as folder:
            with SafetensorsWriter(folder, specs, shard_size) as writer:
                written = _write_weights(base, writer, specs, progress)
            config.tie_word_embeddings = config.tie_word_embeddings and not untied
            with open_weights(str(folder)) as merged_files:
                rounded_files = RoundedFiles(merged_files, written.rounded)
                merged, rounded = (
                    StreamedModel(config, each, trust_remote_code=trust)
                    for each in (merged_files, rounded_files)
                )
                logits = compare_logits(unmerged, merged, rounded, batch, progress)
            if not logits.judged <= logits.bound < math.inf:
                prompt = questions[logits.worst].messages[-1]["content"]
                raise ValueError(f"{out} was not made: on {prompt!r} {_describe(logits)}; please report this")
            _write_other_files(first, folder, tokenizer, dtype, tied=config.tie_word_embeddings)
    _report(out, loader_of(config), written, untied, logits)
    return 0


def say(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)


def _parse_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of the merged weights; None: that of the base's files."""
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; expected {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, DTYPES[name])


def _base_config(subject: Subject) -> Any:
    config = pretrained.load_config_of(subject.config, subject.base)
    if kind := pretrained.quantised_files(config):
        raise ValueError(
            f"{subject.base} is quantised in its files ({kind}), in which the adapter's change would be"
            f" rounded away; {quantised.HOW}"
        )
    return config


def _trained_over_quantised(subject: Subject) -> bool:
    by_config = subject.run is not None and subject.config.strategy.quantization != "none"
    return by_config or bool(verify.quantised_base_of(subject))


def _plan(base: StreamedModel, dtype: torch.dtype | None, untied: bool) -> dict[str, TensorSpec]:
    """Return the tensors to write: the base's, and of two that are no longer tied the second."""
    specs = {name: TensorSpec(dtype or place.dtype, place.shape) for name, place in base.files.places.items()}
    for parameter in base.tied if untied else ():
        if not base.names(parameter):
            spec = specs[_source(base, parameter)]
            specs |= dict.fromkeys(base.as_filed(parameter, torch.empty(spec.shape, device="meta")), spec)
    return specs


def _source(base: StreamedModel, parameter: str) -> str:
    """Return the name in the files of a parameter, or of the parameter that it is tied to."""
    return next(name for tied in (parameter, *base.tied) for name in base.names(tied))


def _write_weights(
    base: StreamedModel, writer: SafetensorsWriter, specs: dict[str, TensorSpec], progress: LongWork
) -> _Written:
    """Write all tensors: those that the adapter changes, merged, then the others as they are."""
    task = progress.add_task("merging", total=writer.size)
    rounded: set[str] = set()
    missing, kept, changed = dict(specs), 0.0, 0.0
    for parameter, values in base.merged():
        filed = base.as_filed(parameter, values)
        dtype = next((specs[name].dtype for name in filed if name in missing), torch.float32)
        if dtype != torch.float32 and (base.names(parameter) or parameter in base.tied):
            kept_here, changed_here = _kept_change(base.value(parameter), values, dtype)
            kept, changed = kept + kept_here, changed + changed_here
        for name in filed.keys() & missing.keys():
            writer.write(name, filed[name])
            progress.advance(task, missing.pop(name).size)
            rounded.add(name)
    for name, spec in missing.items():
        source = name if name in base.files.places else _source(base, base.tied[0])
        _copy(base, source, writer, name, spec)
        progress.advance(task, spec.size)
        if torch.promote_types(base.files.places[source].dtype, spec.dtype) != spec.dtype:
            rounded.add(name)
    writer.finish()
    dtypes = "/".join(sorted({_name(spec.dtype) for spec in specs.values()}))
    files = count(len(writer.files), "file")
    text = f"{writer.numbers:,} parameters, {dtypes}, {size(writer.size)} in {files}"
    return _Written(text, rounded, kept / changed if changed else 1.0, dtypes)


def _copy(base: StreamedModel, source: str, writer: SafetensorsWriter, name: str, spec: TensorSpec) -> None:
    """Write a tensor of the base's files, a slice at a time."""
    count = math.prod(spec.shape)
    for start in range(0, count, SLICE):
        writer.write(name, base.files.read(source, start, min(start + SLICE, count)), start)


def _kept_change(before: Tensor, merged: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the part of a weight's change that rounding leaves, and the whole, both as sums of squares.

    A change smaller than the weight's last bit is rounded away if the base itself has that dtype.
    """
    if before.shape != merged.shape:
        return 0.0, 0.0
    kept = whole = 0.0
    for old, new in zip(
        torch.split(before.flatten(), SLICE), torch.split(merged.flatten(), SLICE), strict=True
    ):
        change = new.float() - old.float()
        kept += float(((new.to(dtype).float() - old.float()) * change).sum(dtype=torch.float64))
        whole += float((change * change).sum(dtype=torch.float64))
    return kept, whole


def _write_other_files(
    subject: Subject, folder: Path, tokenizer: Any, dtype: torch.dtype | None, *, tied: bool
) -> None:
    """Write everything but weights; last config.json, which makes the folder a model."""
    config_file = _file_of(subject, CONFIG_NAME)
    assert config_file is not None
    processors = filter(None, (_file_of(subject, name) for name in PROCESSORS))  # of pictures
    for file in (*config_file.parent.glob("*.py"), *processors):
        shutil.copyfile(file, folder / file.name)
    # the base's own text: transformers would write today's keys, which other engines may not know
    config = read_json(config_file)
    generation = _generation_of(subject, tokenizer)
    if not is_text_only(generation, tokenizer):
        set_end(tokenizer, text_only=False)
        set_model_end(config, tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / GENERATION_CONFIG_NAME).write_text(settings_text(generation), encoding="utf-8")
    if not tied and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False
    if dtype:
        keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, _name(dtype))
    (folder / CONFIG_NAME).write_text(settings_text(config), encoding="utf-8")


def _generation_of(subject: Subject, tokenizer: Any) -> Settings:
    """Return the merged model's generation_config.json: the adapter's, else made as training makes it."""
    assert subject.adapter is not None
    own = subject.adapter / GENERATION_CONFIG_NAME
    if own.is_file():
        return read_json(own)
    text_only = bool(subject.run and subject.run.facts.is_file() and subject.run.read_facts().text_only)
    return generation_settings(subject.base, subject.config.model.revision, tokenizer, text_only=text_only)


def _file_of(subject: Subject, name: str) -> Path | None:
    revision = subject.config.model.revision
    file = cached_file(subject.base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None


def _default_prompts(subject: Subject) -> list[Question]:
    """Return the built-in questions and the first of the run's own."""
    own: list[Question] = []
    with suppress(ValueError, OSError):  # the run's data may no longer be there
        own = list(islice(training_questions(subject.config.data), OWN_PROMPTS)) if subject.run else []
    return [*map(Question.from_text, PROMPTS), *own]


def _read_prompts(file: Path) -> list[Question]:
    """Return the questions of a file: its lines."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {file} cannot be read as text: {error}") from None
    if not lines:
        raise ValueError(f"--prompts {file} is empty; expected a prompt a line")
    for number, line in enumerate(lines, 1):
        check_text(line, f"--prompts {file}: prompt {number}")
    if len(lines) > MOST_PROMPTS:
        say(f"note: the first {MOST_PROMPTS} of {len(lines)} prompts are compared")
    return list(map(Question.from_text, lines[:MOST_PROMPTS]))


def _batch(tokenizer: Any, questions: list[Question], vocabulary: int) -> Mapping[str, Tensor]:
    """Return the questions as token ids, padded on the left; of long ones the last LONGEST_PROMPT."""
    texts = [prompt_of(tokenizer, question) for question in questions]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][-LONGEST_PROMPT:] for text in texts]
    if (highest := max(map(max, ids))) >= vocabulary:
        raise ValueError(
            f"the tokenizer makes token {highest}, the base has {vocabulary}; they do not belong together"
        )
    padded: Mapping[str, Tensor] = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return padded


def _report(out: Path, loader: str, written: _Written, untied: bool, logits: LogitDifference) -> None:
    say(f"{out}: {written.text}")
    if untied:
        say(
            "embeddings and head, one matrix in the base, differ now: both are written, tie_word_embeddings"
            " is false"
        )
    say(_describe(logits))
    say(f'load it: {loader}.from_pretrained("{out}")')
    if written.kept < ENOUGH:
        say(
            f"warning: rounding to {written.dtypes} leaves {written.kept:.0%} of the adapter's change of the"
            " weights; --dtype fp32 keeps all of it, and so does serving the adapter unmerged"
        )


def _describe(logits: LogitDifference) -> str:
    typical = f", typically {logits.judged:.2g}" if logits.judged != logits.difference else ""
    return (
        "the merged model's logits differ from those of base and adapter by at most"
        f" {logits.difference:.2g}{typical} (rounding alone causes {logits.rounding:.2g}, the bound is"
        f" {logits.bound:.2g})"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

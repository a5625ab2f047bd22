"""The base model and the tuned one, asked the same questions: `qwenlora compare runs/tiny`.

Greedy answers to the training questions, side by side, and how many are exactly the reference, before and after.
"""

import sys
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from qwenlora.configs import load_config
from qwenlora.configs.schema import Data
from qwenlora.data.rows import TURN_END, Message
from qwenlora.data.survey import rows_of_side
from qwenlora.jobs.run import RunFolder
from qwenlora.trainer import model as models

BATCH = 40


class Question(NamedTuple):
    """A conversation up to its first reply, and that reply."""

    messages: list[Message]
    reference: str
    tools: list[Any] | None = None


def compare(folder: Path, *, show: int, limit: int, max_new_tokens: int) -> tuple[int, int]:
    """Print the comparison of a run; return (exact before, exact after).

    Raises: ValueError for a run without adapter.
    """
    run = RunFolder(folder)
    if not (run.adapter / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no finished run: {run.adapter} is not there; train it first")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = load_config(run.config)
    base_name = models.base_of(config, run)  # not as it was then: the folder may have moved
    tokenizer = models.load_tokenizer(config, base_name)
    asked = list(islice(questions(config.data), limit))
    if not asked:
        raise ValueError(f"data.train={config.data.train}: no row begins with a question, so there is nothing to ask")
    model = PeftModel.from_pretrained(models.load_base(config, base_name), run.adapter).eval()
    model.config.use_cache = True
    with model.disable_adapter():
        before = list(answers(model, tokenizer, asked, max_new_tokens, "asking the base model"))
    after = list(answers(model, tokenizer, asked, max_new_tokens, "asking the tuned model"))
    exact = [sum(_same(a, q.reference) for a, q in zip(said, asked, strict=True)) for said in (before, after)]

    console = Console()
    table = Table(show_lines=True)
    for name in ("question", "expected", "base model", "tuned"):
        table.add_column(name, overflow="fold", ratio=1)
    for number in range(0, len(asked), max(1, len(asked) // max(show, 1)))[:show]:
        question = asked[number]
        tuned = escape(_short(after[number], 200))
        style = "green" if _same(after[number], question.reference) else "red"
        table.add_row(
            escape(question.messages[-1]["content"]),
            escape(question.reference),
            escape(_short(before[number], 60)),
            f"[{style}]{tuned}[/]",
        )
    if show:
        console.print(table)
    shares = [f"{count} of {len(asked)} ({count / len(asked):.1%})" for count in exact]
    console.print(
        f"exact answers to training questions: before {shares[0]}, after {shares[1]}", highlight=False, soft_wrap=True
    )
    return exact[0], exact[1]


def questions(data: Data) -> Iterator[Question]:
    """Yield each training row's turns before its first reply, and that reply."""
    for _, row in rows_of_side(data, "train"):
        first = next((n for n, message in enumerate(row.messages) if message["role"] == "assistant"), 0)
        if first and row.messages[first]["content"]:
            yield Question(row.messages[:first], row.messages[first]["content"], row.tools)


def answers(model: Any, tokenizer: Any, asked: list[Question], max_new_tokens: int, what: str) -> Iterator[str]:
    """Yield the model's greedy answers, in order."""
    batches = range(0, len(asked), BATCH)
    for start in track(batches, description=what, transient=True, disable=not sys.stdout.isatty()):
        texts = [
            tokenizer.apply_chat_template(
                question.messages,
                tools=question.tools,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for question in asked[start : start + BATCH]
        ]
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        with torch.inference_mode():
            generated = model.generate(
                **batch,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
                pad_token_id=tokenizer.pad_token_id,
            )
        replies = generated[:, batch["input_ids"].shape[1] :]
        yield from (text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True))


def _same(answer: str, reference: str) -> bool:
    """Exact, but for white space around and for how an accent is encoded (tokens hold NFC)."""
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", reference).strip()


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

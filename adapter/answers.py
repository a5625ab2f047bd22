"""Questions as a model sees them, and its answers, in batches."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from qwenlora.configs.schema import Data
from qwenlora.data.rows import Row
from qwenlora.data.survey import rows_of_side
from qwenlora.data.turns import THINK, THOUGHT, TURN_END, TURN_START, Message

END_OF_TEXT = "<|endoftext|>"
BATCH = 40  # questions at once


class Question(NamedTuple):
    """A conversation up to a reply, and what the reply should be, where that is known."""

    messages: list[Message]
    reference: str = ""
    tools: list[Any] | None = None


class Answer(NamedTuple):
    """What was said. text: all of it; thought, answer: its parts; cut: it was not at its end."""

    text: str
    thought: str
    answer: str
    cut: bool


class Sampling(NamedTuple):
    """How the next token is chosen. temperature 0: always the likeliest; top_k 0: from all. seed None: as it
    comes."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


def question_of(row: Row) -> Question | None:
    """Return a row's turns before its first reply, and that reply without a thought before it.

    None when the row does not begin with a question.
    """
    first = next((n for n, message in enumerate(row.messages) if message["role"] == "assistant"), 0)
    if not first or not row.messages[first]["content"]:
        return None
    return Question(row.messages[:first], parts(row.messages[first]["content"])[1], row.tools)


def questions(data: Data) -> Iterator[Question]:
    """Yield the question of each training row that begins with one."""
    for _, row in rows_of_side(data, "train"):
        if question := question_of(row):
            yield question


def prompt_of(tokenizer: Any, question: Question, *, thinking: bool = False) -> str:
    """Return the text that the model goes on from. thinking: for templates that know enable_thinking
    (Qwen3's).

    Raises: ValueError when the chat template refuses the turns.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            question.messages,
            tools=question.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except Exception as error:  # a template raises what it likes (jinja2's raise_exception)
        raise ValueError(
            f"the model's chat template refuses this: {' '.join(str(error).split())[:200]}"
        ) from error
    return text


def generation(tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """Return model.generate's arguments: they override all that the model's own generation config would
    add."""
    known = tokenizer.get_vocab()
    ends = [known[token] for token in (TURN_END, END_OF_TEXT) if token in known]
    sampled = sampling.temperature > 0
    return {
        "do_sample": sampled,
        "temperature": sampling.temperature if sampled else None,
        "top_p": sampling.top_p if sampled else None,
        "top_k": sampling.top_k if sampled else None,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_text(text: str, what: str) -> None:
    """Raise ValueError for text that cannot be sent as it is. what: its name in the message."""
    if not text.strip():
        raise ValueError(f"{what} is empty; write what is asked")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text at character {error.start + 1:,}; convert it") from None
    for mark in (TURN_START, TURN_END):
        if mark in text:
            raise ValueError(f"{what} contains {mark}, which would forge a turn; write it differently")


def context_of(config: Any) -> int:
    """Return how many tokens a model takes, question and answer together. config: transformers'."""
    return int(config.get_text_config().max_position_embeddings)


def begins_thinking(prompt: str) -> bool:
    """Return whether a prompt ends within a thought, as templates of models do that always think."""
    return prompt.rstrip().endswith(THINK)


def parts(text: str, *, opened: bool = False, whole: bool = True) -> tuple[str, str]:
    """Return the thought and the answer in what a model said.

    opened: the prompt ended within the thought. whole: false while more may come, which makes both only
    longer.
    """
    text = text.lstrip()
    if not opened:
        if not whole and THINK.startswith(text):  # maybe the start of it
            return "", ""
        if not text.startswith(THINK):
            return "", text.rstrip()
        text = text.removeprefix(THINK)
    thought, end, answer = text.partition(THOUGHT)
    if not end and not whole:
        maybe = next(n for n in range(len(THOUGHT) - 1, -1, -1) if thought.endswith(THOUGHT[:n]))
        thought = thought[: len(thought) - maybe]
    return thought.strip(), answer.strip()


def answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    sampling: Sampling,
    what: str,
    *,
    batch_size: int = BATCH,
    thinking: bool = False,
) -> Iterator[Answer]:
    """Yield the model's answers, in order; fewer at once when the GPU is full. what: beside the progress bar.

    Raises: ValueError when the GPU is full with a single question.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(what, total=len(asked))
        done, size = 0, batch_size
        while done < len(asked):
            some = asked[done : done + size]
            found = _batch(model, tokenizer, some, sampling, thinking)
            if not found:
                if size == 1:
                    raise ValueError(
                        "the GPU is full with one question; shorten it, or free some memory (nvidia-smi)"
                    )
                torch.cuda.empty_cache()
                size = max(1, size // 2)
                continue
            yield from found
            done += len(some)
            progress.advance(task, len(some))


def _batch(
    model: Any, tokenizer: Any, asked: Sequence[Question], sampling: Sampling, thinking: bool
) -> list[Answer] | None:
    """Return the answers to some questions; None when the GPU is full."""
    prompts = [prompt_of(tokenizer, question, thinking=thinking) for question in asked]
    batch = tokenizer(
        prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left"
    )
    rooms = [max(0, context_of(model.config) - int(length)) for length in batch["attention_mask"].sum(1)]
    sampling = sampling._replace(max_new_tokens=min(sampling.max_new_tokens, max(1, *rooms)))
    options = generation(tokenizer, sampling)
    try:
        with torch.inference_mode():
            generated = model.generate(**batch.to(model.device), **options)
    except torch.OutOfMemoryError:
        return None
    said = [
        ids[:room]
        for ids, room in zip(generated[:, batch["input_ids"].shape[1] :].tolist(), rooms, strict=True)
    ]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [
        Answer(
            text.strip(),
            *parts(text, opened=begins_thinking(prompt)),
            set(options["eos_token_id"]).isdisjoint(ids),
        )
        for prompt, ids, text in zip(prompts, said, texts, strict=True)
    ]

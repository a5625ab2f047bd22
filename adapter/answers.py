"""Questions as a model reads them, and its answers, generated in batches."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from qwenlora.configs.schema import Data
from qwenlora.data.rows import Row
from qwenlora.data.survey import rows_of_side
from qwenlora.data.template import ENABLE_THINKING, has_default
from qwenlora.data.turns import END_OF_TEXT, THINK, THOUGHT, TURN_END, TURN_START, Message, is_learnt
from qwenlora.run.long_work import LongWork

BATCH = 40  # questions at once


class Question(NamedTuple):
    """A conversation up to a reply. reference: the expected reply; empty where it is not known."""

    messages: list[Message]
    reference: str = ""
    tools: list[Any] | None = None

    @classmethod
    def from_text(cls, text: str) -> "Question":
        """Return a question that begins a conversation."""
        return cls([Message(role="user", content=text)])


class Answer(NamedTuple):
    """A model's answer. text: thought and answer; cut: generation stopped before the model ended it."""

    text: str
    thought: str
    answer: str
    cut: bool


class Sampling(NamedTuple):
    """How the next token is chosen. temperature 0: the likeliest; top_k 0: of all; seed None: not seeded."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


def question_of(row: Row) -> Question | None:
    """Return the turns before a row's first trained reply; the reference is its answer. None without a
    question."""
    first = next((n for n, message in enumerate(row.messages) if is_learnt(message)), 0)
    if not first or not row.messages[first]["content"]:
        return None
    return Question(row.messages[:first], split_thought(row.messages[first]["content"])[1], row.tools)


def training_questions(data: Data) -> Iterator[Question]:
    """Yield the questions that training rows begin with."""
    for _, row in rows_of_side(data, "train"):
        if question := question_of(row):
            yield question


def prompt_of(tokenizer: Any, question: Question, *, thinking: bool | None = None) -> str:
    """Return the prompt. thinking: Qwen3's enable_thinking; None: as data.chat_template_kwargs says, else
    off. Raises: ValueError when the template fails."""
    as_set = thinking is None and has_default(tokenizer, ENABLE_THINKING)
    try:
        text: str = tokenizer.apply_chat_template(
            question.messages,
            tools=question.tools,
            tokenize=False,
            add_generation_prompt=True,
            **({} if as_set else {ENABLE_THINKING: bool(thinking)}),
        )
    except Exception as error:  # templates raise any kind of error (jinja2's raise_exception)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the model's chat template refuses this: {reason}") from error
    return text


def generate_arguments(tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """Return model.generate's arguments. They override the model's own generation config."""
    known = tokenizer.get_vocab()
    sampled = sampling.temperature > 0
    return {
        "do_sample": sampled,
        "temperature": sampling.temperature if sampled else None,
        "top_p": sampling.top_p if sampled else None,
        "top_k": sampling.top_k if sampled else None,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": [known[token] for token in (TURN_END, END_OF_TEXT) if token in known],
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_text(text: str, name: str) -> None:
    """Raise ValueError for text that cannot be sent to a model. name: of the text, for the message."""
    if not text.strip():
        raise ValueError(f"{name} is empty; write a question")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8 text at character {error.start + 1:,}; convert it") from None
    for mark in (TURN_START, TURN_END, END_OF_TEXT):
        if mark in text:
            raise ValueError(f"{name} contains {mark}, which would forge a turn; write it differently")


def context_length(config: Any) -> int:
    """Return how many tokens a model takes, question and answer together. config: transformers'."""
    return int(config.get_text_config().max_position_embeddings)


def begins_thinking(prompt: str) -> bool:
    """Return whether a prompt ends inside a thought: templates of models that always think open it."""
    return prompt.rstrip().endswith(THINK)


def split_thought(text: str, *, opened: bool = False, complete: bool = True) -> tuple[str, str]:
    """Return (thought, answer) of generated text. opened: the prompt ended inside the thought.

    complete: False while more text may come, which will only make both parts longer.
    """
    text = text.lstrip()
    if not opened:
        if not complete and THINK.startswith(text):  # perhaps a part of the mark
            return "", ""
        if not text.startswith(THINK):
            return "", text.rstrip()
        text = text.removeprefix(THINK)
    thought, end, answer = text.partition(THOUGHT)
    if not end and not complete:
        partial = next(n for n in range(len(THOUGHT) - 1, -1, -1) if thought.endswith(THOUGHT[:n]))
        thought = thought[: len(thought) - partial]
    return thought.strip(), answer.strip()


def generate_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    sampling: Sampling,
    title: str,
    *,
    batch_size: int = BATCH,
    thinking: bool | None = None,
) -> Iterator[Answer]:
    """Yield answers, in order; a full GPU halves batches. Raises: ValueError when one question fills it."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with LongWork() as progress:
        task = progress.add_task(title, total=len(questions))
        done, size = 0, batch_size
        while done < len(questions):
            batch = questions[done : done + size]
            answers = _generate_batch(model, tokenizer, batch, sampling, thinking)
            if not answers:
                if size == 1:
                    raise ValueError(
                        "the GPU is full with one question; shorten it, or free some memory (nvidia-smi)"
                    )
                torch.cuda.empty_cache()
                size = max(1, size // 2)
                continue
            yield from answers
            done += len(batch)
            progress.advance(task, len(batch))


def _generate_batch(
    model: Any, tokenizer: Any, questions: Sequence[Question], sampling: Sampling, thinking: bool | None
) -> list[Answer] | None:
    """Return the answers to a batch; None when the GPU is full."""
    prompts = [prompt_of(tokenizer, question, thinking=thinking) for question in questions]
    batch = tokenizer(
        prompts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left"
    )
    limit = context_length(model.config)
    rooms = [max(0, limit - int(length)) for length in batch["attention_mask"].sum(1)]
    sampling = sampling._replace(max_new_tokens=min(sampling.max_new_tokens, max(1, *rooms)))
    options = generate_arguments(tokenizer, sampling)
    try:
        with torch.inference_mode():
            generated = model.generate(**batch.to(model.device), **options)
    except torch.OutOfMemoryError:
        return None
    new_ids = generated[:, batch["input_ids"].shape[1] :].tolist()
    replies = [ids[:room] for ids, room in zip(new_ids, rooms, strict=True)]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    ends = set(options["eos_token_id"])
    return [
        Answer(text.strip(), *split_thought(text, opened=begins_thinking(prompt)), cut=ends.isdisjoint(ids))
        for prompt, ids, text in zip(prompts, replies, texts, strict=True)
    ]

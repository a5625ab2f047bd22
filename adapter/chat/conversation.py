"""The model's side of a chat (terminal.py is the screen's): the turns, and answers while they come."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, TextStreamer
from transformers.cache_utils import DynamicLayer

from qwenlora.adapter.answers import (
    Question,
    Sampling,
    begins_thinking,
    check_text,
    context_length,
    generate_arguments,
    prompt_of,
    split_thought,
)
from qwenlora.adapter.merge.combined import BASE_CHANGING_STARTS
from qwenlora.data.turns import Message

STOPPED = "stopped"  # ChatReply.cut of an answer that the user stopped
ROOM = 4  # a fourth of the model's context is kept for an answer, or --max-new-tokens if that is less
ShowPiece = Callable[[str, bool], None]  # gets a piece of text, and whether it belongs to a thought


class ChatReply(NamedTuple):
    """A model's reply. speed: tokens a second after the first; cut: why it ended before the model ended it.

    forgotten: how many of the oldest questions no longer fit the context, and are left out from now on.
    """

    thought: str
    answer: str
    tokens: int
    speed: float
    cut: str = ""
    forgotten: int = 0


class Conversation:
    """The turns so far, and the model that answers. system: the system prompt, which may be changed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool | None = None,
    ) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.limit: int = context_length(model.config)
        self._model, self._tokenizer, self._sampling, self._thinking = model, tokenizer, sampling, thinking
        self._last_messages: list[Message] = []
        self._stop = _Stop()
        self._cache: DynamicCache | None = None
        self._cached_ids: list[int] = []

    def ask(self, text: str, show: ShowPiece) -> ChatReply:
        """Answer a question; keep both if the answer is not empty. Raises: ValueError for a bad question."""
        self._stop.requested = False
        check_text(text, "the question")
        system = [Message(role="system", content=self.system)] if self.system else []
        turns, forgotten = self._fit(system, [*self.turns, Message(role="user", content=text)])
        self._last_messages = [*system, *turns]
        reply = self._reply(self._last_messages, show, base=False)._replace(forgotten=forgotten)
        # templates leave earlier thoughts out, so they are not kept
        self.turns = [*turns, Message(role="assistant", content=reply.answer)] if reply.answer else turns[:-1]
        return reply

    def ask_base(self, show: ShowPiece) -> ChatReply:
        """Answer the last question by the base; keep nothing. Raises: ValueError without base or question."""
        self._stop.requested = False
        if not hasattr(self._model, "disable_adapter"):
            raise ValueError("this is a model without an adapter: it is the base")
        adapters = self._model.peft_config.values()
        if any(config.bias != "none" for config in adapters):  # peft does not restore biases
            raise ValueError(
                "this adapter trained the base's biases, which cannot be taken off; chat with the base"
            )
        if any(str(config.init_lora_weights).startswith(BASE_CHANGING_STARTS) for config in adapters):
            raise ValueError(
                "loading this adapter changed the base's own weights (init_lora_weights); chat with the base"
            )
        if not self._last_messages:
            raise ValueError("there is no question yet")
        return self._reply(self._last_messages, show, base=True)

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns, self._last_messages = [], []

    def stop(self) -> None:
        """End the answer at its next token; a signal handler may call this."""
        self._stop.requested = True

    def _fit(self, system: list[Message], turns: list[Message]) -> tuple[list[Message], int]:
        """Drop the oldest questions so that an answer has room; return the turns and the number dropped."""
        room = min(self._sampling.max_new_tokens, self.limit // ROOM)
        for start in range(0, len(turns), 2):
            length = len(self._ids(self._prompt([*system, *turns[start:]])))
            if length + room <= self.limit or (start == len(turns) - 1 and length < self.limit):
                return turns[start:], start // 2
        raise ValueError(f"the question has {length:,} tokens, the model takes {self.limit:,}; shorten it")

    def _prompt(self, messages: list[Message]) -> str:
        return prompt_of(self._tokenizer, Question(messages), thinking=self._thinking)

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _reply(self, messages: list[Message], show: ShowPiece, *, base: bool) -> ChatReply:
        prompt = self._prompt(messages)
        ids = self._ids(prompt)
        room = self.limit - len(ids)
        sampling = self._sampling._replace(max_new_tokens=min(self._sampling.max_new_tokens, room))
        stream = _Stream(self._tokenizer, show, opened=begins_thinking(prompt))
        cache = None if base else self._cache_for(ids)
        self._cache = None
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            generated = self._generate(ids, sampling, stream, cache, base=base)
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step
            stream.end()
            self._stop.requested = True
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ValueError(
                f"the GPU is full with {len(ids):,} tokens; /reset, ask something shorter, or begin with"
                " --quantization nf4"
            ) from None
        else:
            if cache is not None:
                self._cache, self._cached_ids = cache, generated[: cache.get_seq_length()]
            stream.ended = generated[-1] in generate_arguments(self._tokenizer, sampling)["eos_token_id"]
        cut = "" if stream.ended else self._why_cut(room)
        return ChatReply(*stream.shown, stream.tokens, stream.speed, cut)

    def _generate(
        self, ids: list[int], sampling: Sampling, stream: "_Stream", cache: DynamicCache | None, *, base: bool
    ) -> list[int]:
        """Return the ids of the prompt and the reply; the stream shows the reply meanwhile."""
        if self._stop.requested:
            raise KeyboardInterrupt
        input_ids = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode(), self._model.disable_adapter() if base else nullcontext():
            generated = self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                streamer=stream,
                stopping_criteria=[self._stop],
                **generate_arguments(self._tokenizer, sampling),
            )
        return generated[0].tolist()  # type: ignore[no-any-return]

    def _why_cut(self, room: int) -> str:
        if self._stop.requested:
            return STOPPED
        if room < self._sampling.max_new_tokens:
            return f"cut: the model's context of {self.limit:,} tokens is full"
        return f"cut: --max-new-tokens {self._sampling.max_new_tokens}"

    def _cache_for(self, ids: list[int]) -> DynamicCache | None:
        """Return the cache, cut to its first ids that match, or a new one; None if layers cannot be cut."""
        cache = self._cache
        if cache is not None:
            pairs = zip(self._cached_ids, ids[:-1], strict=False)  # generate needs a token to read
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same < len(self._cached_ids):
                cache.crop(same - len(self._cached_ids))
            if cache.get_seq_length() == same:
                return cache
        cache = DynamicCache(config=self._model.config)
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def uses_thinking(tokenizer: Any, requested: bool | None) -> bool | None:
    """Return enable_thinking, as requested; None: the default. Raises: ValueError if the template cannot."""
    question = Question.from_text("?")
    thinking, plain = (prompt_of(tokenizer, question, thinking=value) for value in (True, False))
    always = begins_thinking(plain)
    if requested and thinking == plain and not always:
        raise ValueError(
            "--thinking: this model's chat template has no enable_thinking, as Qwen3's has; leave it out"
        )
    if requested is False and always:
        raise ValueError(
            "--no-thinking: this model's chat template begins every answer with a thought; leave it out"
        )
    return requested


class _Stop(StoppingCriteria):
    """Ends an answer once requested is set."""

    requested = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)


class _Stream(TextStreamer):
    """Text as tokens come, in whole characters. shown: (thought, answer) so far; ended: by the model."""

    def __init__(self, tokenizer: Any, show: ShowPiece, *, opened: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shown = ("", "")
        self.tokens, self.ended = 0, False
        self._show, self._opened, self._text = show, opened, ""
        self._first = self._last = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second after the first token; 0 for a single token."""
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is ignored, or a token."""
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            self._last = time.perf_counter()
            self._first = self._first or self._last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show the new part of the text."""
        self._text += text
        now = split_thought(self._text, opened=self._opened, complete=stream_end)
        for before, text, is_thought in zip(self.shown, now, (True, False), strict=True):
            if len(text) > len(before):
                self._show(text[len(before) :], is_thought)
        self.shown = now

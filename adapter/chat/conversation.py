"""The model's side of a chat: what it is sent, what it says while it says it, and what is kept of that.

`Conversation(model, tokenizer, Sampling()).ask("几点开门？", print_piece)`. The screen is terminal.py's.
"""

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
    context_of,
    generation,
    parts,
    prompt_of,
)
from qwenlora.adapter.merge.combined import STARTS
from qwenlora.data.turns import Message

STOPPED = "stopped"  # why an answer is cut: it was asked to
ROOM = 4  # an answer finds at least a fourth of the model's context, or --max-new-tokens
Show = Callable[[str, bool], None]  # hears a piece of text, and whether it is of a thought


class Reply(NamedTuple):
    """What was said. speed: tokens a second, once it began; cut: why it ended before the model ended it;
    forgotten: how many of the oldest questions no longer fit the model's context, and are left out from now
    on."""

    thought: str
    answer: str
    tokens: int
    speed: float
    cut: str = ""
    forgotten: int = 0


class Conversation:
    """Questions and answers so far, and the model that answers. system: the system prompt, which may be
    changed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool = False,
    ) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.limit: int = context_of(model.config)
        self._model, self._tokenizer, self._sampling, self._thinking = model, tokenizer, sampling, thinking
        self._asked: list[Message] = []
        self._stopped = _Stopped()
        self._cache: DynamicCache | None = None
        self._read: list[int] = []  # the tokens that the cache holds

    def ask(self, text: str, show: Show) -> Reply:
        """Return the answer to a question, in this conversation. show: hears it piece by piece.

        An empty answer leaves no trace. Raises: ValueError for a text that cannot be sent.
        """
        self._stopped.asked = False
        check_text(text, "the question")
        system = [Message(role="system", content=self.system)] if self.system else []
        turns, forgotten = self._fitted(system, [*self.turns, Message(role="user", content=text)])
        self._asked = [*system, *turns]
        reply = self._say(self._asked, show, base=False)._replace(forgotten=forgotten)
        # templates leave earlier thoughts out, so they are not kept
        self.turns = [*turns, Message(role="assistant", content=reply.answer)] if reply.answer else turns[:-1]
        return reply

    def ask_base(self, show: Show) -> Reply:
        """Return what the base answers to the last question, as it was asked; the conversation goes on
        without it.

        Raises: ValueError when there is no base beside the model, or no question yet.
        """
        self._stopped.asked = False
        if not hasattr(self._model, "disable_adapter"):
            raise ValueError("this is a model without an adapter: it is the base")
        if any(
            config.bias != "none" for config in self._model.peft_config.values()
        ):  # peft puts no bias back
            raise ValueError(
                "this adapter trained the base's biases, which cannot be taken off; chat with the base"
            )
        if any(
            str(config.init_lora_weights).startswith(STARTS) for config in self._model.peft_config.values()
        ):
            raise ValueError(
                "loading this adapter changed the base's own weights (init_lora_weights); chat with the base"
            )
        if not self._asked:
            raise ValueError("nothing was asked yet")
        return self._say(self._asked, show, base=True)

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns, self._asked = [], []

    def stop(self) -> None:
        """End the answer at its next token; a signal handler may call this."""
        self._stopped.asked = True

    def _fitted(self, system: list[Message], turns: list[Message]) -> tuple[list[Message], int]:
        """Return the turns without as many of the oldest questions as leave an answer room, and their
        number."""
        room = min(self._sampling.max_new_tokens, self.limit // ROOM)
        for start in range(0, len(turns), 2):
            length = len(self._ids([*system, *turns[start:]]))
            if length + room <= self.limit or (start == len(turns) - 1 and length < self.limit):
                return turns[start:], start // 2
        raise ValueError(f"the question has {length:,} tokens, the model takes {self.limit:,}; shorten it")

    def _ids(self, messages: list[Message]) -> list[int]:
        text = prompt_of(self._tokenizer, Question(messages), thinking=self._thinking)
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _say(self, messages: list[Message], show: Show, *, base: bool) -> Reply:
        ids = self._ids(messages)
        sampling = self._sampling._replace(
            max_new_tokens=min(self._sampling.max_new_tokens, self.limit - len(ids))
        )
        opened = begins_thinking(prompt_of(self._tokenizer, Question(messages), thinking=self._thinking))
        stream = _Stream(self._tokenizer, show, opened=opened)
        cache = None if base else self._cache_of(ids)
        self._cache = None
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        begun = torch.tensor([ids], device=self._model.device)
        try:
            if self._stopped.asked:
                raise KeyboardInterrupt
            with torch.inference_mode(), self._model.disable_adapter() if base else nullcontext():
                generated = self._model.generate(
                    input_ids=begun,
                    attention_mask=torch.ones_like(begun),
                    past_key_values=cache,
                    streamer=stream,
                    stopping_criteria=[self._stopped],
                    **generation(self._tokenizer, sampling),
                )
        except KeyboardInterrupt:  # a second one, in the middle of a step
            stream.end()
            self._stopped.asked = True
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ValueError(
                f"the GPU is full with {len(ids):,} tokens; /reset, ask something shorter, or begin with"
                " --quantization nf4"
            ) from None
        else:
            if cache is not None:
                self._cache, self._read = cache, generated[0, : cache.get_seq_length()].tolist()
            stream.ended = generated[0, -1].item() in generation(self._tokenizer, sampling)["eos_token_id"]
        cut = ""
        if not stream.ended and self._stopped.asked:
            cut = STOPPED
        elif not stream.ended:
            longest = f"--max-new-tokens {self._sampling.max_new_tokens}"
            full = sampling.max_new_tokens < self._sampling.max_new_tokens
            cut = f"cut: the model's context of {self.limit:,} tokens is full" if full else f"cut: {longest}"
        return Reply(*stream.shown, stream.tokens, stream.speed, cut)

    def _cache_of(self, ids: list[int]) -> DynamicCache | None:
        """Return the keys and values of those first tokens that were read before; None where no part can be
        kept."""
        cache = self._cache
        if cache is not None:
            pairs = zip(self._read, ids[:-1], strict=False)  # generate wants at least one token to read
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same < len(self._read):
                cache.crop(same - len(self._read))
            if cache.get_seq_length() == same:
                return cache
        cache = DynamicCache(config=self._model.config)
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def thinks(tokenizer: Any, asked: bool | None) -> bool:
    """Return what the template's enable_thinking is. asked: --thinking, --no-thinking, or neither.

    Raises: ValueError when the template cannot do what is asked.
    """
    one = Question([Message(role="user", content="?")])
    thinking, plain = (prompt_of(tokenizer, one, thinking=value) for value in (True, False))
    always = begins_thinking(plain)
    if asked and thinking == plain and not always:
        raise ValueError(
            "--thinking: this model's chat template has no enable_thinking, as Qwen3's has; leave it out"
        )
    if asked is False and always:
        raise ValueError(
            "--no-thinking: this model's chat template begins every answer with a thought; leave it out"
        )
    return bool(asked)


class _Stopped(StoppingCriteria):
    """Ends an answer once that is asked for."""

    asked = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)


class _Stream(TextStreamer):
    """Text as tokens come: a character that several tokens make is waited for. shown: (thought, answer) so
    far."""

    def __init__(self, tokenizer: Any, show: Show, *, opened: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shown = ("", "")
        self.tokens, self.ended = 0, False
        self._show, self._opened, self._text = show, opened, ""
        self._first = self._last = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second after the first one; 0 when there are no more."""
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is passed over, or a token."""
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            self._last = time.perf_counter()
            self._first = self._first or self._last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show what is new."""
        self._text += text
        now = parts(self._text, opened=self._opened, whole=stream_end)
        for before, said, thought in zip(self.shown, now, (True, False), strict=True):
            if len(said) > len(before):
                self._show(said[len(before) :], thought)
        self.shown = now

"""Rows as tokens, and which of them are trained: the replies and their end-of-turn token.

The rendered text is tokenised whole, so the ids are those of `tokenizer.apply_chat_template(messages,
tokenize=True)`. Qwen's templates do not mark replies ({% generation %} is missing), so a reply is located
among the tokens: after `<|im_start|>`, `assistant`, line break, and up to `<|im_end|>`; turns.py refuses text
that could forge these. Tokens are consecutive bytes of the text: when a turn's first tokens are exactly the
header's, the rest is exactly the reply. A check of the rendered text finds templates that change a reply.
"""

import json
import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwenlora.data.bad_row import BadRow, or_bad
from qwenlora.data.replies import NO_THOUGHT, NOTHING, OPEN_THOUGHT, prompted
from qwenlora.data.rows import Row
from qwenlora.data.turns import (
    END_OF_TEXT,
    THINK,
    TURN_END,
    TURN_START,
    Message,
    reply,
    without_empty_thought,
)

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float32]

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_HEADER = "assistant\n"
_ENDS_OF_TEXT = (END_OF_TEXT, "</s>")


class Tokens(NamedTuple):
    """A row, or a piece of it. ids: int32 [length]; trained: bool [length], true where learnt, false at 0;
    weights: float32 [length], of each trained token's loss; None: all are 1."""

    ids: Ids
    trained: Mask
    weights: Weights | None = None

    def given_weights(self) -> Weights:
        """Return the weights, 0 where a token is not trained."""
        return np.asarray(
            self.trained * (np.float32(1) if self.weights is None else self.weights), np.float32
        )


def forget_calls(tokenizer: Any) -> None:
    """Take from a tokenizer what earlier calls left in it, or in its files: truncation, padding, splitting of
    special tokens, BPE dropout. Each would change the ids of a text, and those that it is saved with."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokenizer.split_special_tokens = backend.encode_special_tokens = False
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None


class Encoder:
    """Turns rows into tokens. tokenizer: a fast one with a ChatML template; train_on: as data.train_on."""

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self._start, self._end = (tokenizer.convert_tokens_to_ids(mark) for mark in (TURN_START, TURN_END))
        self._header = self._ids([_HEADER])[0]
        prompts = (NOTHING, OPEN_THOUGHT, NO_THOUGHT)
        self._of_prompt = dict(zip(prompts, self._ids(list(prompts)), strict=True))
        for text, ids in ((_HEADER, self._header), *self._of_prompt.items()):
            if tokenizer.decode(ids) != text:
                raise ValueError(
                    f"this tokenizer changes {text!r} to {tokenizer.decode(ids)!r}; a Qwen's keeps it"
                )
        known = [tokenizer.convert_tokens_to_ids(token) for token in _ENDS_OF_TEXT]
        unknown = (None, tokenizer.unk_token_id)
        self._end_of_text = next((token for token in known if token not in unknown), tokenizer.eos_token_id)
        self._takes_thoughts = "reasoning_content" in str(tokenizer.chat_template)
        self._takes_calls = "tool_calls" in str(tokenizer.chat_template)
        self._takes_tools = "tools" in str(tokenizer.chat_template)
        self._writes_no_thought = self._writes_no_thought_itself()
        self._opens_thoughts = any(map(self._opens_thought, ({}, {"enable_thinking": True})))
        named = (token for token in tokenizer.special_tokens_map.values() if isinstance(token, str))
        of_text = (token for token, number in zip(_ENDS_OF_TEXT, known, strict=True) if number not in unknown)
        self._marks = sorted({*named, *of_text} - {TURN_START, TURN_END})

    def encode(self, rows: list[Row]) -> list[Tokens | BadRow]:
        """Return the tokens of each row, or why it cannot be trained."""
        if self._writes_no_thought:  # a row's own empty thought is rendered alike, and masked alike
            rows = list(map(_without_empty_thoughts, rows))
        texts = self._render_all(rows)
        prompts = [or_bad(self._prompts, *pair) for pair in zip(rows, texts, strict=True)]
        ids = self._ids([text if isinstance(text, str) else "" for text in texts])
        return [or_bad(self._tokens, *parts) for parts in zip(rows, ids, prompts, strict=True)]

    def _writes_no_thought_itself(self) -> bool:
        turns = [Message(role="user", content="?"), reply("!")]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template may raise any error, then for rows, too
            return False
        return f"{TURN_START}{_HEADER}{NO_THOUGHT}" in text

    def _opens_thought(self, options: dict[str, bool]) -> bool:
        """Return whether the generation prompt opens a thought, which a reply then goes on with."""
        turns = [Message(role="user", content="?")]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception:  # a template may raise any error, then for rows, too
            return False
        return text.endswith(f"{TURN_START}{_HEADER}{OPEN_THOUGHT}")

    def _refuse_marks(self, text: str, row: Row) -> None:
        """Refuse turns with control tokens, as the end of text. text: the row as it is rendered."""
        for mark in (mark for mark in self._marks if mark in text):  # perhaps the template's own
            parts = [(f"a turn ({message['role']})", message) for message in row.messages]
            for what, value in (*parts, ("the list of tools", row.tools)):
                if mark in json.dumps(value, ensure_ascii=False):
                    raise BadRow(f"{what} contains {mark}, a control token of this tokenizer; remove it")

    def _render_all(self, rows: list[Row]) -> list[str | BadRow]:
        plain = [row.messages for row in rows if row.text is None and not row.tools]
        if len(plain) == len(rows) and not self._has_thoughts(plain):
            try:  # all at once: transformers' argument checks take longer than the template
                texts: list[str | BadRow] = self.tokenizer.apply_chat_template(plain, tokenize=False)
                return texts
            except Exception:  # noqa: S110 (then one by one: a template raises any error, and does not say for which row)
                pass
        return [or_bad(self.render, row) for row in rows]

    def _has_thoughts(self, conversations: list[list[Message]]) -> bool:
        return not self._takes_thoughts and any(
            "reasoning_content" in m for turns in conversations for m in turns
        )

    def render(self, row: Row) -> str:
        """Return the row as the model's own template writes it. Raises: BadRow when the template refuses."""
        if row.text is not None:
            return row.text
        if self._has_thoughts([row.messages]):
            raise BadRow(
                "has reasoning_content, which this model's template leaves out; write it into the reply:"
                " <think>...</think>, or ignore it: data.columns: {reasoning_content: null}"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(row.messages, tools=row.tools, tokenize=False)
        except Exception as error:  # a template may raise any error (jinja2's raise_exception)
            raise BadRow(
                f"the model's chat template refuses this row: {' '.join(str(error).split())[:200]}"
            ) from error
        return text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        forget_calls(self.tokenizer)  # of others, between two calls of this
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def _tokens(self, row: Row, text_ids: list[int], prompts: list[str]) -> Tokens:
        if row.text is not None:
            ids = np.array([*text_ids, self._end_of_text], np.int32)
            parts = [(0, len(ids), row.weight)]
        else:
            ids = np.array(text_ids, np.int32)
            parts = self._weighted(row, self._spans(ids, prompts), len(ids))
        weights = np.zeros(len(ids), np.float32)
        for start, end, weight in parts:
            weights[start:end] = weight
        weights[:1] = 0  # the first token has nothing before it to be predicted from
        needed = any(weight not in (0, 1) for *_, weight in parts)
        return Tokens(ids, weights > 0, weights if needed else None)

    def _weighted(self, row: Row, spans: list[tuple[int, int]], length: int) -> list[tuple[int, int, float]]:
        """Return (start, end, weight) of what train_on trains. spans: of all replies."""
        replies = [message for message in row.messages if message["role"] == "assistant"]
        if self.train_on == "all":
            if any("weight" in message for message in row.messages):
                raise BadRow(
                    "has turns with weights (0 for replies in a prompt), and data.train_on=all trains all"
                    " turns alike; set data.train_on: assistant, or ignore the weights' key in data.columns"
                )
            return [(0, length, row.weight)]
        weights = [row.weight * reply.get("weight", 1.0) for reply in replies]
        parts = [(*span, weight) for span, weight in zip(spans, weights, strict=True)]
        if self.train_on == "last_assistant":
            parts = parts[-1:]
            if not parts[0][2]:
                raise BadRow("its last reply has weight 0: there is nothing to learn from")
        return parts

    def _spans(self, ids: Ids, prompts: list[str]) -> list[tuple[int, int]]:
        """Return [start, end) in tokens of every reply, its end-of-turn token included. prompts: what the
        prompt has of each."""
        starts, ends = np.flatnonzero(ids == self._start), np.flatnonzero(ids == self._end)
        if len(starts) != len(ends) or not (starts < ends).all() or not (ends[:-1] < starts[1:]).all():
            raise BadRow(
                "the chat template's turns do not end as they begin; expected ChatML, as all Qwens have"
            )
        spans = []
        for start, end in zip((starts + 1).tolist(), ends.tolist(), strict=True):
            after = start + len(self._header)
            if ids[start:after].tolist() == self._header:
                spans.append((after, end + 1))
        if len(spans) != len(prompts):
            raise BadRow(
                "a reply's first characters melt with the line break before it; remove white space there"
            )
        for number, prompt in enumerate(prompts):
            start, end = spans[number]
            after = start + len(self._of_prompt[prompt])
            if ids[start:after].tolist() != self._of_prompt[prompt]:
                raise BadRow(
                    f"a reply's first characters melt with {prompt.split()[-1]} before it; remove white space"
                    " there"
                )
            spans[number] = (after, end)
        return spans

    def _prompts(self, row: Row, text: str) -> list[str]:
        """Return what the prompt has of each reply. text: the row as it is rendered. Raises: BadRow when
        replies differ, tools or calls are left out, or turns hold control tokens."""
        if row.text is not None:
            return []
        self._refuse_marks(text, row)
        left_out = ["tools"] if row.tools and not self._takes_tools else []
        if not self._takes_calls and any("tool_calls" in message for message in row.messages):
            left_out.append("calls")
        if left_out:
            raise BadRow(
                f"has {' and '.join(left_out)}, which the chat template of {self.tokenizer.name_or_path}"
                " leaves out; set model.tokenizer to one whose template takes them, as those of Qwen2.5 and"
                " Qwen3, or ignore tools: data.columns: {tools: null}"
            )
        turns = [turn[2] for turn in _TURN.finditer(text) if turn[1] == "assistant"]
        replies = [message for message in row.messages if message["role"] == "assistant"]
        if len(turns) != len(replies):
            raise BadRow(
                f"the chat template wrote {len(turns)} assistant turns for {len(replies)}; expected ChatML"
                " (<|im_start|>assistant ... <|im_end|>), as all Qwens have"
            )
        return [prompted(*pair, opens=self._opens_thoughts) for pair in zip(turns, replies, strict=True)]


def _without_empty_thoughts(row: Row) -> Row:
    if not any(THINK in message["content"] for message in row.messages):
        return row
    messages: list[Message] = [
        {**m, "content": without_empty_thought(m["content"])} if m["role"] == "assistant" else m
        for m in row.messages
    ]
    return row._replace(messages=messages)

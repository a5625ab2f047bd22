"""Rows longer than max_length, as data.overlength says: cut, dropped, or split where a turn begins.

`fit(row, tokens, encoder, data)` gives the pieces that are trained. A piece never lacks trained tokens, and a
reply is never trained without the question before it, unless data.split_replies asks for that.
"""

from typing import NamedTuple

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.rows import Message, Row


class Fitted(NamedTuple):
    """The pieces of one long row. cut: it was truncated; lost: replies that fit into no piece."""

    pieces: list[Tokens]
    cut: bool = False
    lost: int = 0


def fit(row: Row, tokens: Tokens, encoder: Encoder, data: Data) -> Fitted:
    """Return a long row's pieces, each at most max_length tokens; none when it is dropped (or refused later).

    Raises: BadRow when what is cut off is all that would have been trained.
    """
    size = data.max_length
    if data.overlength == "truncate":
        piece = _part(tokens, 0, size)
        if not piece.trained.any():
            raise BadRow(
                f"truncated to data.max_length={size} tokens of {len(tokens.ids)}, nothing of the reply is"
                " left to train on; raise data.max_length, or set data.overlength: drop or split"
            )
        return Fitted([piece], cut=True)
    if data.overlength != "split":
        return Fitted([])
    if row.text is not None:
        return Fitted([part for part in _windows(tokens, size) if part.trained.any()])
    return _split(row, encoder, data)


def _part(tokens: Tokens, start: int, end: int) -> Tokens:
    trained = tokens.trained[start:end].copy()
    trained[:1] = False
    return Tokens(tokens.ids[start:end], trained)


def _windows(tokens: Tokens, size: int) -> list[Tokens]:
    """Return consecutive pieces that share one token, so that every token is predicted in one of them."""
    return [_part(tokens, start, start + size) for start in range(0, max(len(tokens.ids) - 1, 1), size - 1)]


def _split(row: Row, encoder: Encoder, data: Data) -> Fitted:
    """Cut a conversation between exchanges (a user's turn and what follows it), as many to a piece as fit.

    Every piece is a conversation of its own, rendered by the template, with the row's system turn and tools.
    """
    system = [message for message in row.messages if message["role"] == "system"]
    exchanges = _exchanges(row.messages[len(system) :])
    if data.train_on == "last_assistant":
        return _last_reply(row, system, exchanges, encoder, data)
    pieces: list[Tokens] = []
    lost = 0
    first = 0
    while first < len(exchanges):
        # the most exchanges that fit, by halving: longer conversations are longer in tokens, too
        fitting, low, high = None, first + 1, len(exchanges)
        while low <= high:
            middle = (low + high) // 2
            tokens = _encoded(row, system, exchanges[first:middle], encoder)
            if tokens is None or len(tokens.ids) <= data.max_length:
                fitting, low = (tokens, middle), middle + 1
            else:
                high = middle - 1
        if fitting is None:
            parts = _in_windows(row, system, exchanges[first : first + 1], encoder, data)
            pieces += parts
            lost += 0 if parts else sum(message["role"] == "assistant" for message in exchanges[first])
            first += 1
        else:
            tokens, first = fitting
            if tokens is not None and tokens.trained.any():
                pieces.append(tokens)
    return Fitted(pieces, lost=lost)


def _last_reply(
    row: Row, system: list[Message], exchanges: list[list[Message]], encoder: Encoder, data: Data
) -> Fitted:
    """Return the last reply with as many exchanges before it as fit."""
    replies = [
        n
        for n, exchange in enumerate(exchanges)
        if any(message["role"] == "assistant" for message in exchange)
    ]
    exchanges = exchanges[: replies[-1] + 1]
    for first in range(len(exchanges)):
        tokens = _encoded(row, system, exchanges[first:], encoder)
        if tokens is not None and len(tokens.ids) <= data.max_length:
            return Fitted([tokens])
    parts = _in_windows(row, system, exchanges[-1:], encoder, data)
    return Fitted(parts, lost=0 if parts else 1)


def _in_windows(
    row: Row, system: list[Message], exchanges: list[list[Message]], encoder: Encoder, data: Data
) -> list[Tokens]:
    if not data.split_replies:
        return []
    tokens = _encoded(row, system, exchanges, encoder)
    assert tokens is not None, "exchanges without a reply always fit"
    return [part for part in _windows(tokens, data.max_length) if part.trained.any()]


def _exchanges(messages: list[Message]) -> list[list[Message]]:
    found: list[list[Message]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if not found or (message["role"] == "user" and before and before["role"] != "user"):
            found.append([])
        found[-1].append(message)
    return found


def _encoded(
    row: Row, system: list[Message], exchanges: list[list[Message]], encoder: Encoder
) -> Tokens | None:
    """Return the tokens of a part of a row; None when there is no reply in it."""
    messages = [message for exchange in exchanges for message in exchange]
    if not any(message["role"] == "assistant" for message in messages):
        return None
    (tokens,) = encoder.encode([row._replace(messages=[*system, *messages])])
    if isinstance(tokens, BadRow):
        raise tokens
    return tokens

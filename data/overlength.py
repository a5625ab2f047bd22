"""Rows longer than max_length, as data.overlength says: truncated, dropped, or split where a turn begins.

Each piece has tokens to train on. Only with data.split_replies is a reply trained without its question.
"""

from itertools import pairwise
from typing import NamedTuple

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.rows import Row
from qwenlora.data.turns import Message, is_learnt

Exchange = list[Message]  # a user's turn and all turns up to the next user's


class CutRow(NamedTuple):
    """The pieces of a long row. lost_replies: how many replies fit into no piece."""

    pieces: list[Tokens]
    truncated: bool = False
    lost_replies: int = 0


def cut_to_length(row: Row, tokens: Tokens, encoder: Encoder, data: Data) -> CutRow:
    """Return a long row's pieces, if any. Raises: BadRow when truncation leaves no trained token."""
    limit = data.max_length
    if data.overlength == "truncate":
        piece = _piece(tokens, 0, limit)
        if not piece.trained.any():
            raise BadRow(
                f"truncated to data.max_length={limit} tokens of {len(tokens.ids)}, nothing of the reply is"
                " left to train on; raise data.max_length, or set data.overlength: drop or split"
            )
        return CutRow([piece], truncated=True)
    if data.overlength != "split":
        return CutRow([])
    if row.text is not None:
        return CutRow(_windows(tokens, limit))
    return _Splitter(row, encoder, data).split()


def _piece(tokens: Tokens, start: int, end: int) -> Tokens:
    trained = tokens.trained[start:end].copy()
    trained[:1] = False  # nothing before it to predict it from
    weights = None if tokens.weights is None else tokens.weights[start:end]
    return Tokens(tokens.ids[start:end], trained, weights)


def _windows(tokens: Tokens, size: int) -> list[Tokens]:
    """Return pieces with tokens to train on; they overlap by one, so that every token is predicted."""
    starts = range(0, max(len(tokens.ids) - 1, 1), size - 1)
    pieces = [_piece(tokens, start, start + size) for start in starts]
    return [piece for piece in pieces if piece.trained.any()]


class _Splitter:
    """Splits a conversation between exchanges; each piece also has the row's system turn and tools."""

    def __init__(self, row: Row, encoder: Encoder, data: Data) -> None:
        self.row, self.encoder, self.data = row, encoder, data
        self.system = [message for message in row.messages if message["role"] == "system"]
        self.exchanges = _exchanges(row.messages[len(self.system) :])

    def split(self) -> CutRow:
        """Return pieces of as many exchanges as fit."""
        if self.data.train_on == "last_assistant":
            return self._last_reply()
        pieces: list[Tokens] = []
        lost = first = 0
        while first < len(self.exchanges):
            end, tokens = self._longest_fitting(first)
            if end == first:
                parts = self._in_windows(self.exchanges[first])
                pieces += parts
                lost += 0 if parts else _replies(self.exchanges[first])
                end = first + 1
            elif tokens is not None and tokens.trained.any():
                pieces.append(tokens)
            first = end
        return CutRow(pieces, lost_replies=lost)

    def _longest_fitting(self, first: int) -> tuple[int, Tokens | None]:
        """Return the end of the most exchanges from first that fit (first if none does), and their tokens,
        None without a reply. Bisection works, since more exchanges are more tokens."""
        best: tuple[int, Tokens | None] = (first, None)
        low, high = first + 1, len(self.exchanges)
        while low <= high:
            middle = (low + high) // 2
            tokens = self._encoded(self.exchanges[first:middle])
            if self._fits(tokens):
                best, low = (middle, tokens), middle + 1
            else:
                high = middle - 1
        return best

    def _last_reply(self) -> CutRow:
        """Return the last reply with as many exchanges before it as fit."""
        last = max(number for number, exchange in enumerate(self.exchanges) if _replies(exchange))
        for first in range(last + 1):
            tokens = self._encoded(self.exchanges[first : last + 1])
            if tokens is not None and self._fits(tokens):
                return CutRow([tokens])
        parts = self._in_windows(self.exchanges[last])
        return CutRow(parts, lost_replies=0 if parts else 1)

    def _fits(self, tokens: Tokens | None) -> bool:
        return tokens is None or len(tokens.ids) <= self.data.max_length

    def _in_windows(self, exchange: Exchange) -> list[Tokens]:
        if not self.data.split_replies:
            return []
        tokens = self._encoded([exchange])
        assert tokens is not None, "an exchange without a reply always fits"
        return _windows(tokens, self.data.max_length)

    def _encoded(self, exchanges: list[Exchange]) -> Tokens | None:
        """Return the tokens of a part of the row; None when there is no reply in it."""
        if not any(map(_replies, exchanges)):
            return None
        messages = [message for exchange in exchanges for message in exchange]
        (tokens,) = self.encoder.encode([self.row._replace(messages=[*self.system, *messages])])
        if isinstance(tokens, BadRow):
            raise tokens
        return tokens


def _exchanges(messages: list[Message]) -> list[Exchange]:
    exchanges = [messages[:1]] if messages else []
    for before, message in pairwise(messages):
        if message["role"] == "user" and before["role"] != "user":
            exchanges.append([])
        exchanges[-1].append(message)
    return exchanges


def _replies(exchange: Exchange) -> int:
    return sum(map(is_learnt, exchange))

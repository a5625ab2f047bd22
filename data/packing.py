"""Rows put together into packs of at most max_length tokens, over the whole data set at once.

A pack takes the longest row left, then rows of the most frequent length, and last one or two rows that fill
it to the last token. Rows of equal length are interchangeable, so a pattern of lengths is used as often as
rows are left for it: a million rows take a second. Nothing is random: the same lengths give the same packs.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Packs of rows: pack p is rows[ends[p - 1] : ends[p]]. rows: int64 [rows]; ends: int64 [packs]."""

    rows: Numbers
    ends: Numbers

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, pack: int) -> Numbers:
        return self.rows[self.ends[pack - 1] if pack else 0 : self.ends[pack]]

    def lengths(self, row_lengths: npt.NDArray[np.integer]) -> Numbers:
        """Return int64 [packs]: the tokens in each pack."""
        totals = np.concatenate([[0], np.cumsum(row_lengths[self.rows], dtype=np.int64)])
        return np.asarray(np.diff(totals[np.concatenate([[0], self.ends])]), np.int64)


def pack(lengths: npt.NDArray[np.integer], max_length: int) -> Packs:
    """Return packs of rows of these lengths, int [rows], > 0. Raises: ValueError for one over max_length."""
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit into a pack of {max_length}")
    by_length = np.argsort(lengths, kind="stable")
    left = np.bincount(lengths, minlength=max_length + 1)  # rows of each length
    taken = np.cumsum(left) - left  # place in by_length of the next row of each length
    available = sum(1 << size for size in np.flatnonzero(left).tolist())
    groups: list[Numbers] = []
    ends: list[Numbers] = []
    done = 0
    while available:
        pattern = _fill(available, left, max_length)
        times = min(int(left[size]) // count for size, count in Counter(pattern).items())
        assert times > 0, "a pattern uses more rows than are left"
        columns = []
        for size in pattern:
            columns.append(by_length[taken[size] : taken[size] + times])
            taken[size] += times
            left[size] -= times
            if not left[size]:
                available &= ~(1 << size)
        groups.append(np.stack(columns, axis=1).ravel())
        ends.append(done + len(pattern) * np.arange(1, times + 1))
        done += len(pattern) * times
    empty = [np.empty(0, np.int64)]
    return Packs(np.concatenate(groups or empty), np.concatenate(ends or empty))


def _fill(available: int, left: Numbers, max_length: int) -> list[int]:
    """Return the lengths of one pack. available: bit l is set while rows of length l are left.

    The longest row first; then one or two that fill the rest to the last token; where there are none, the
    most frequent length, so that lengths of all kinds are left for the last packs.
    """
    # available reversed: bit max_length - l for length l; shifted, it shows which lengths make pairs
    mirror = int(f"{available:0{max_length + 1}b}"[::-1], 2)
    pattern: list[int] = []
    used = Counter[int]()
    room = max_length
    while room and (fitting := available & ((2 << room) - 1)):
        if available >> room & 1:
            sizes = [room]
        elif pairs := _upper(
            available & (mirror >> (max_length - room)), room, int(left[room // 2]) - used[room // 2]
        ):
            size = (pairs & -pairs).bit_length() - 1
            sizes = [size, room - size]
        elif not pattern:
            sizes = [fitting.bit_length() - 1]
        else:
            free = left[: room + 1].copy()
            for size, count in used.items():
                free[size : size + 1] -= count
            sizes = [int(free.argmax())]
        for size in sizes:
            pattern.append(size)
            used[size] += 1
            room -= size
            if used[size] == left[size]:
                available &= ~(1 << size)
                mirror &= ~(1 << (max_length - size))
    return pattern


def _upper(pairs: int, room: int, middle: int) -> int:
    """Return the bits of the longer rows of pairs that fill room. middle: rows left of length room / 2."""
    half, odd = divmod(room, 2)
    upper = pairs >> (half + odd) << (half + odd)
    return upper if odd or middle >= 2 else upper & ~(1 << half)


def spread(lengths: npt.NDArray[np.integer], packs: int, max_length: int) -> list[list[int]] | None:
    """Return rows dealt to packs, about equal in tokens; None when a pack would exceed max_length.
    lengths: int [rows]. Longest first, each to the emptiest pack (Graham's LPT rule); some may stay empty."""
    dealt: list[list[int]] = [[] for _ in range(packs)]
    totals = np.zeros(packs, np.int64)
    for row in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        least = int(totals.argmin())
        dealt[least].append(row)
        totals[least] += int(lengths[row])
    return None if totals.max(initial=0) > max_length else dealt

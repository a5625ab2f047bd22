"""Numbers, durations and texts as people read them."""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml


def number(value: float | None) -> str:
    """Return a number with four significant digits, whole if it is an int or over 1000; - for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def count(amount: int, noun: str, ending: str = "s") -> str:
    """Return "1 attempt" or "2 attempts". ending: of the plural."""
    return f"{amount:,} {noun}{ending * (amount != 1)}"


def size(count: int) -> str:
    """Return bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.1f} MB"


def shape(lengths: Iterable[int]) -> str:
    """Return a tensor's shape, as 2 x 3."""
    return " x ".join(map(str, lengths))


def and_more(names: Sequence[object], shown: int = 1) -> str:
    """Return ` and N more` for the names after the first ones, which the message shows."""
    return f" and {len(names) - shown:,} more" if len(names) > shown else ""


def short(text: str, longest: int = 2000) -> str:
    """Return a text cut to so many characters, with how many more there were."""
    rest = len(text) - longest
    return f"{text[:longest]} ... ({rest:,} more characters)" if rest > 0 else text


def ago(seconds: float) -> str:
    """Return a duration in its largest unit: 59 s, 2 h, 3 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 59 s, 2 min 5 s, 26 h 0 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(seconds: float) -> str:
    """Return a duration as H:MM:SS, from a day on as "1 day, 2:03:04"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{count(days, 'day')}, " * (days > 0) + f"{hours}:{minutes:02}:{rest:02}"


def printable(text: str) -> str:
    """Return a text without the characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def as_yaml(value: Any) -> str:
    """Return a plain value as YAML has it, on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return printable(text.removesuffix("\n...\n").strip())

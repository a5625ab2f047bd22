"""Numbers, sizes, durations and lists, as messages, reports and model cards show them."""

from collections.abc import Iterable, Sequence
from datetime import timedelta


def number(value: float | None) -> str:
    """Return four significant digits; whole numbers and large ones without decimals; - for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def short(text: str, longest: int = 2000) -> str:
    """Return a text cut to so many characters, with how many more there were."""
    rest = len(text) - longest
    return f"{text[:longest]} ... ({rest:,} more characters)" if rest > 0 else text


def duration(time: timedelta) -> str:
    """Return a duration in its two largest units."""
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{ending * (count != 1)}"


def size(count: int) -> str:
    """Return bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.1f} MB"


def shape(lengths: Iterable[int]) -> str:
    """Return a tensor's shape, as 2 x 3."""
    return " x ".join(map(str, lengths))


def and_more(names: Sequence[str]) -> str:
    """Return how many names there are beside the first, which the message names."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

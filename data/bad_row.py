"""The error for a row that cannot be trained, and how messages show values: printable, on one line."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

Result = TypeVar("Result")


class BadRow(ValueError):  # noqa: N818 (it is passed on in place of a row)
    """A row that cannot be trained, though the rows after it can be read. Its text is one printable line.
    roles, columns: data.roles and data.columns as they should be, when its roles or keys are the reason."""

    def __init__(
        self,
        reason: str,
        roles: Mapping[str, str] | None = None,
        columns: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__(printable(reason))
        self.roles, self.columns = dict(roles or {}), dict(columns or {})


def or_bad(make: Callable[..., Result], *arguments: Any) -> Result | BadRow:
    """Return make(*arguments), or the BadRow that it raises, or that stands among the arguments."""
    if bad := next((argument for argument in arguments if isinstance(argument, BadRow)), None):
        return bad
    try:
        return make(*arguments)
    except BadRow as error:
        return error


def show(value: Any, width: int = 60) -> str:
    """Return a value as a message shows it: JSON on one line, cut to width characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (RecursionError, ValueError, TypeError):  # TypeError: keys of Parquet's maps
        text = f"<{type(value).__name__}>"
    return printable(text if len(text) <= width else text[: width - 3] + "...")


def show_names(names: Iterable[Any]) -> str:
    """Return keys, or columns, as a message lists them: the first ten."""
    shown = [
        printable(name if len(name) <= 40 else name[:37] + "...") for name in map(str, islice(names, 11))
    ]
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "") or "(none)"


def printable(text: str) -> str:
    """Return text with surrogates, line breaks and control characters written as escapes."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)

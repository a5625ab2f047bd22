"""How messages show values, and what was expected of them."""

import difflib
import json
import re
from collections.abc import Iterable

from pydantic_core import ErrorDetails

_PREFIX = re.compile(r"^(Value error, |Input should be |(String|List) should have )|, not \d+$")
_PLAINER = {
    "a valid ": "a ",
    "a integer": "an integer",
    "a array": "a list",
    "an array": "a list",
    "an object": "a mapping {key: value}",
}


def expected(errors: Iterable[ErrorDetails]) -> str:
    """Return what was expected of a value. errors: pydantic's, one for each type that it may have."""
    kinds = []
    for error in errors:
        text = _PREFIX.sub("", error["msg"])
        for theirs, ours in _PLAINER.items():
            text = text.replace(theirs, ours)
        kinds.append(text)
    return " or ".join(dict.fromkeys(kinds))


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return `did you mean X?` with the most similar of the known names, or otherwise."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def show(value: object) -> str:
    """Return a value as a message shows it: on one line, at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."

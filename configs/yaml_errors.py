"""PyYAML's errors in words of a config: which line, what is wrong with it, what to write."""

import re
from collections.abc import Callable

import yaml

from qwenlora.configs.wording import show

_Words = str | Callable[[list[str], int], str]


def explain(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """Return the line, from 1, and what is wrong there. text: the whole YAML."""
    lines = text.splitlines() or [""]
    problem, context = error.problem or "", error.context or ""
    line = error.problem_mark.line if error.problem_mark else 0
    begin = error.context_mark.line if error.context_mark else line
    for pattern, words, at_begin in _PROBLEMS:
        if match := re.search(pattern, f"{problem} {context}"):
            at = min(begin if at_begin else line, len(lines) - 1)
            said = words if isinstance(words, str) else words(lines, at)
            said = said.format(*match.groups(), begin=begin + 1)
            shown = f": {show(lines[at].strip())}" if lines[at].strip() else ""
            return at + 1, f"{said}{shown}"
    return line + 1, problem


def _second_colon(lines: list[str], at: int) -> str:
    """Return why a `: ` is one too many in a line."""
    above = next((line for line in reversed(lines[:at]) if line.strip()), "")
    if len(re.findall(r":(?=\s|$)", lines[at])) > 1:
        return "a value with a colon and a space; put it in quotes"
    if _indent(lines[at]) > _indent(above):
        return "indented further than the line above it, which is no section; indent them alike"
    return "the line above it has no colon and space after its key"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


_UNLIKE = "indented unlike the lines of its section, which begins in line {begin}; indent them alike"
# (pattern of `problem context`, words, whether the line is the one where the whole thing begins)
_PROBLEMS: tuple[tuple[str, _Words, bool], ...] = (
    ("^mapping values are not allowed", _second_colon, False),
    (r"^expected <block end>, but found '([\]}])'", "a {0} that closes nothing; remove it", False),
    (
        "^expected <block end>, but found '<scalar>'",
        "text after the end of a value; put it all in quotes",
        False,
    ),
    (
        "^expected <block end>.*block collection",
        "a key among the items of a list; indent it as its section",
        False,
    ),
    ("^expected <block end>", _UNLIKE, False),
    (r"^found character '\\t'", "a tab; indent with spaces", False),
    ("^found character '(.)' that cannot start", "a value that begins with {0}; put it in quotes", False),
    (
        r"^expected ',' or '([\]}])'",
        "a comma, or the {0} of what begins in line {begin}, is missing before it",
        False,
    ),
    ("^found unexpected end of stream", "a quote that is not closed", True),
    ("^found unknown escape character '(.)'", r"a \{0} in double quotes; use single ones, or \\{0}", False),
    ("^found undefined alias '(.*?)'", "*{0} names nothing; put it in quotes", False),
    (
        "^could not determine a constructor for the tag '(.*?)'",
        "{0} is not known; put the value in quotes",
        False,
    ),
    ("^but found another document", "a second document begins; keep one", False),
    ("^could not find expected ':'", "a key without a colon", True),
    (
        "^expected '<document start>', but found '<block",
        "indented unlike the first line; indent them alike",
        False,
    ),
    ("found '<stream end>'", "a [ or {{ that is not closed", False),
    (r"^expected the node content, but found '(.)'", "no value before the {0}", False),
)

"""The pages of the project, for tests that read them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from qwenlora.configs.keys import SECTIONS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")

KEY = re.compile(rf"(?<![\w./:-])(?:{'|'.join(SECTIONS)})\.\w+(?![\w/(]|\.\w)")
_END = re.compile(r"\s(?:>|\||&&|;|&)\s")  # of a command in a line of a shell


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path, *languages: str) -> list[str]:
    """Return the blocks of code in these languages; "": without one."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def spans(page: Path) -> list[str]:
    """Return the code within sentences."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in _SPAN.findall(text)]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of ours that a page has, without `qwenlora`."""
    lines = [line for text in fences(page, "", "bash") for line in text.replace("\\\n", " ").splitlines()]
    for line in (*lines, *spans(page)):
        for part in re.split(_END, line):
            words = part.replace("[", "").replace("]", "") if "[-" in part else part
            if re.match(r"(\$ )?(srun .*|CUDA_\w+= )?(\.venv/bin/)?qwenlora( |$)", words):
                yield shlex.split(words.partition("qwenlora")[2], comments=True)
            elif script := re.match(r"sbatch .*/train\.sh( .*)", words):
                yield ["train", *shlex.split(script[1], comments=True)]


def headings(page: Path) -> list[str]:
    """Return the headings, with their #."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"^#+ .*$", text, re.MULTILINE)

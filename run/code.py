"""The code of a run: package versions, the command, the git commit and the changes since."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from qwenlora.run.disk import write_atomically
from qwenlora.run.package import package
from qwenlora.run.records import Code

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy", "qwenlora")
_LONGEST_DIFF = 2**22  # bytes


def versions() -> dict[str, str | None]:
    """Return the installed version of each package that numbers depend on; None where it is missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def record(facts: Path, diff: Path) -> None:
    """Write versions, command and commit to facts (JSON), and git's changes since the commit to diff."""
    git, changes = _git()
    # an argument need not be UTF-8, JSON must
    *command, folder = (
        text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for text in (*sys.argv, str(Path.cwd()))
    )
    code = Code(
        git=git, versions=versions(), python=platform.python_version(), command=command, folder=folder
    )
    write_atomically(facts, code.text())
    if changes:
        write_atomically(diff, changes)
    else:
        diff.unlink(missing_ok=True)


def own_commit() -> str | None:
    """Return the commit of the package's own clone, with -dirty after changes; None without a clone."""
    return _commit(package()) if (package() / ".git").exists() else None


def _commit(folder: Path) -> str | None:
    return _ask_git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None


def _ask_git(folder: Path, *arguments: str) -> str:
    """Return git's output; empty when it fails or is missing."""
    if not shutil.which("git"):
        return ""
    answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    return answer.stdout.decode(errors="replace") if answer.returncode == 0 else ""


def _git() -> tuple[str | None, str]:
    """Return the commit and the changes since, of the package's own clone, or else of the current folder."""
    folder = package() if (package() / ".git").exists() else Path.cwd()
    commit = _commit(folder)
    changes = _ask_git(folder, "diff", "HEAD") if commit and commit.endswith("-dirty") else ""
    if len(changes) > _LONGEST_DIFF:
        changes = changes[:_LONGEST_DIFF] + "\n(cut here: the changes are longer)\n"
    return commit, changes

"""The files of the installed package: which they are, their hash, and a copy of them for a job that starts
later."""

import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path

import qwenlora

# what setup.cfg installs; users keep data of their own in a clone's folders, which must not come along
PATTERNS = (
    "*.py",
    "*.yaml",
    "*.sh",
    "py.typed",
    "schema.json",
    "page.html",
    "report.html",
    "card.md",
    "general.jsonl",
    "examples/*.jsonl",
    "clusters/*.yaml",
)


def package() -> Path:
    """Return the folder of the package that is running."""
    return Path(qwenlora.__file__).parent


def files(source: Path | None = None) -> list[Path]:
    """Return every file of a package, sorted. source: its folder; default: of the one that is running."""
    source = source or package()
    # a clone's root also holds .venv/, tests/ and runs/, which are no rooms
    rooms = {
        init.parent for room in source.glob("*/__init__.py") for init in room.parent.rglob("__init__.py")
    }
    return sorted(
        file for folder in (source, *rooms) for pattern in PATTERNS for file in folder.glob(pattern)
    )


def code_hash(rooms: Collection[str] = (), *, but: Collection[str] = ()) -> str:
    """Return a hash of the package's own code, whatever version it says it is.

    rooms: only files of these, such as "data"; default: of all. but: file names that are left out.
    """
    digest = hashlib.sha256()
    for file in files():
        name = file.relative_to(package())
        if file.suffix in (".py", ".sh") and file.name not in but and (not rooms or name.parts[0] in rooms):
            digest.update(str(name).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def snapshot(folder: Path, source: Path | None = None) -> None:
    """Copy a package to folder/qwenlora, to be found through PYTHONPATH=folder. source: as for files()."""
    source = source or package()
    for file in files(source):
        target = folder / "qwenlora" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)

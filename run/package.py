"""The files of the installed package: their list, their hash, and a copy for a job that starts later."""

import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path

import qwenlora

# as in setup.cfg; a clone's folders may also hold a user's data, which must not come along
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
    "counterparts/*.yaml",
    "tiny.jinja",
)


def package() -> Path:
    """Return the folder of the package that is running."""
    return Path(qwenlora.__file__).parent


def files(source: Path | None = None) -> list[Path]:
    """Return every file of a package, sorted. source: its folder; default: the running package's."""
    source = source or package()
    # only packages: a clone's root also has .venv/, tests/ and runs/
    rooms = {
        init.parent for room in source.glob("*/__init__.py") for init in room.parent.rglob("__init__.py")
    }
    return sorted(
        file for folder in (source, *rooms) for pattern in PATTERNS for file in folder.glob(pattern)
    )


def code_hash(rooms: Collection[str] = (), *, but: Collection[str] = ()) -> str:
    """Return a hash of the package's code. rooms: top folders, default: all; but: file names to leave out."""
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

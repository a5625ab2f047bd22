"""A copy of the package as it is now, for a job that starts later."""

import shutil
from pathlib import Path

import qwenlora

# what setup.cfg installs; users keep data of their own in a clone's folders, which must not come along
FILES = (
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


def snapshot(folder: Path, source: Path | None = None) -> None:
    """Copy the package to folder/qwenlora, to be found through PYTHONPATH=folder. source: a package; default: this."""
    source = source or package()
    rooms = [source, *sorted(init.parent for init in source.glob("*/__init__.py"))]
    for room in rooms:
        for file in (found for pattern in FILES for found in room.glob(pattern)):
            target = folder / "qwenlora" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)

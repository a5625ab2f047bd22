"""Pages name what is there: links lead somewhere, files exist, docs/architecture.md has every module."""

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, name_of

ROOMS = ("cli", "adapter", "jobs", "trainer", "launch", "data", "run", "configs", "slurm")
MAP = ROOT / "docs" / "architecture.md"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# a path from the root, in backticks or not; `configs/my...` is what a user would call a file
_PATH = re.compile(
    rf"(?<![\w/.-])((?:{'|'.join(ROOMS)}|tests|docs|benchmarks|\.github|\.ci)/(?!my)[\w./-]*)(?![\w*{{<])"
)
# `name` in `file`, `name` and `other` in `file`
_IN_FILE = re.compile(r"(`[\w.]+`(?:(?:, | and )`[\w.]+`)*)\s+in\s+`((?:\w+/)+\w+\.(?:py|sh))`")
_SUFFIXES = (".py", ".sh", ".yaml", ".yml", ".json", ".jsonl", ".md", ".html", ".svg")
_MODULE = re.compile(r"(?<![\w/])qwenlora((?:\.\w+)+)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_pages_and_headings(page):
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_of_the_project_exist(page):
    for path in _PATH.findall(page.read_text(encoding="utf-8")):
        path = path.rstrip(".")
        if path.endswith(("/", *_SUFFIXES)) and "/my" not in path:
            assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_modules_and_what_they_hold_exist(page):
    for dotted in _MODULE.findall(page.read_text(encoding="utf-8")):
        place, names = ROOT, dotted[1:].split(".")
        while names and place.is_dir():
            folder, file = place / names[0], place / f"{names[0]}.py"
            if not (folder.is_dir() or file.is_file()):
                break
            place, names = (folder if folder.is_dir() else file), names[1:]
        source = (place / "__init__.py" if place.is_dir() else place).read_text(encoding="utf-8")
        found = len(names) < 2 and all(re.search(rf"\b{name}\b", source) for name in names)
        assert found, f"{name_of(page)} names qwenlora{dotted}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_finds_in_a_file_is_there(page):
    for names, path in _IN_FILE.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([^`]+)`", names):
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", source), f"{name_of(page)} names {name} in {path}"


def test_the_map_has_every_module():
    text = MAP.read_text(encoding="utf-8")
    modules = [
        name_of(file)
        for room in ROOMS
        for file in sorted((ROOT / room).rglob("*.py"))
        if file.name != "__init__.py"
    ]
    assert len(modules) > 80
    assert [module for module in modules if f"`{module}`" not in text] == []

"""The site is made without a warning, and asks no other host for anything."""

import re

import pytest
from pages import ROOT

_LOADED = re.compile(
    r"<(?:script|img|source|iframe)\b[^>]*\bsrc=\"?(?P<source>[^\"\s>]+)"
    r"|<link\b[^>]*\bhref=\"?(?P<link>[^\"\s>]+)|url\(['\"]?(?P<url>http[^)]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the site, made as `make docs` makes it."""
    pytest.importorskip("material", reason="the test extra of setup.cfg is not installed as a whole")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(autouse=True)
def no_notice(monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")


def test_it_is_made_without_a_warning_and_has_every_page(site):
    """strict: a warning, as of a link or an anchor that leads nowhere, would have been an error."""
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    made = {file.relative_to(site) for file in site.rglob("*.html")}
    assert {page for page in pages if page.name != "README.html"} <= made
    assert (site / "project" / "configs" / "tiny.yaml").is_file()


def test_nothing_is_loaded_from_another_host(site):
    for file in (*site.rglob("*.html"), *site.rglob("*.css")):
        for loaded in _LOADED.finditer(file.read_text(encoding="utf-8")):
            address = next(filter(None, loaded.groups()))
            assert not address.startswith(("http", "//")), f"{file.relative_to(site)} loads {address}"


@pytest.mark.slow
def test_a_page_from_disk_finds_what_is_searched_for(site, browse):
    """And asks for nothing that is not there: the console has no error."""
    outer = site / "outer.html"
    script = """
      const page = document.querySelector("iframe").contentDocument;
      const query = page.querySelector("[data-md-component=search-query]");
      query.focus();
      query.value = "on_nan";
      query.dispatchEvent(new KeyboardEvent("keyup"));
      const found = () => page.querySelector(".md-search-result__item")?.textContent ?? "";
      const wait = setInterval(() => {
        if (!found().includes("train.on_nan")) return;
        clearInterval(wait);
        console.log("found");
        }, 50);
    """
    outer.write_text(f"<iframe src=index.html></iframe><script>onload = () => {{{script}}}</script>")
    lines, _ = browse(outer, "--allow-file-access-from-files", "--virtual-time-budget=20000")
    assert [line for line in lines if "found" not in line] == []
    assert len(lines) == 1

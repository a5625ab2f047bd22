"""The Chinese pages say what the English ones say: they have the same commands, keys and headings."""

import re

import pytest
from pages import KEY, PAGES, ROOT, commands, headings, name_of

TRANSLATED = {ROOT / "README.md": ROOT / "README.zh.md"} | {
    ROOT / "docs" / page.relative_to(ROOT / "docs" / "zh"): page
    for page in sorted((ROOT / "docs" / "zh").rglob("*.md"))
}


def keys(page):
    return set(KEY.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("english", TRANSLATED, ids=name_of)
def test_a_page_has_the_commands_keys_and_headings_of_the_english_one(english):
    chinese = TRANSLATED[english]
    assert list(commands(chinese)) == list(commands(english)), f"correct {name_of(chinese)}"
    assert keys(chinese) == keys(english)
    levels = [[heading.split()[0] for heading in headings(page)] for page in (chinese, english)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("english", TRANSLATED, ids=name_of)
def test_both_pages_link_to_each_other(english):
    chinese = TRANSLATED[english]
    for word, page, other in (("中文", english, chinese), ("English", chinese, english)):
        link = re.search(rf"\[{word}\]\((\S+)\)", page.read_text(encoding="utf-8"))
        assert (page.parent / link[1]).resolve() == other


def test_the_first_three_pages_and_the_readme_are_translated():
    assert len(TRANSLATED) >= 4
    assert set(TRANSLATED) <= set(PAGES)

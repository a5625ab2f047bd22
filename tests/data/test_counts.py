"""Bad rows are reported by reason: each once, with how many rows have it. Roles are named all at once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.data.counts import SHOWN_KINDS, SHOWN_PLACES, BadRowPlace, BadRows
from qwenlora.data.shapes import RowOptions
from qwenlora.data.sources import Source

SOURCES = [Source("my.jsonl", "train", [Path("my.jsonl")], RowOptions(), None, 1.0)]


def report(reasons: dict[int, str], among: int, roles: dict[int, dict[str, str]] | None = None) -> str:
    """Return the report on bad rows. reasons: of lines."""
    bad = BadRows(among=among)
    for line, reason in reasons.items():
        bad.add(BadRowPlace(0, 0, line, reason), (roles or {}).get(line, {}))
    return bad.report(SOURCES)


def test_a_reason_that_all_rows_have_stands_once():
    lines = dict.fromkeys(range(1, 122), "is empty")
    assert report(lines, 121) == "my.jsonl:1: is empty; the same for all 121 rows"


def test_a_reason_that_several_rows_have_stands_once_with_the_first_places():
    assert report({2: "is empty", 3: "has no text", 5: "is empty"}, 9) == (
        "3 of 9 rows cannot be trained:\n"
        "  my.jsonl:2: is empty; the same for 1 more row: my.jsonl:5\n"
        "  my.jsonl:3: has no text"
    )
    assert report(dict.fromkeys(range(2, 122), "is empty"), 500) == (
        "120 of 500 rows cannot be trained:\n"
        "  my.jsonl:2: is empty; the same for 119 more rows: my.jsonl:3, my.jsonl:4, my.jsonl:5, my.jsonl:6"
        " ..."
    )


def test_the_one_row_of_a_file_is_not_called_all():
    assert report({1: "is empty"}, 1) == "1 of 1 rows cannot be trained:\n  my.jsonl:1: is empty"


def test_roles_of_all_rows_are_named_together():
    shown = report({1: "a", 2: "b", 3: "a"}, 3, {1: {"bot": "assistant"}, 2: {"Kunde": "user"}})
    assert shown.endswith("\nall roles at once: data.roles: {bot: assistant, Kunde: user}")


@pytest.mark.parametrize("roles", [{}, {"bot": "assistant"}])
def test_a_single_role_is_not_repeated(roles):
    assert "at once" not in report({1: "a", 2: "a"}, 2, {1: roles, 2: roles})


@given(st.lists(st.sampled_from([f"reason {number}" for number in range(30)]), min_size=1, max_size=200))
def test_every_bad_row_is_counted_once(reasons):
    bad = BadRows(among=1000)
    for line, reason in enumerate(reasons, 1):
        bad.add(BadRowPlace(0, 0, line, reason), {})
    assert bad.count == len(reasons)
    assert len(bad.kinds) == min(SHOWN_KINDS, len(set(reasons)))
    for reason, kind in bad.kinds.items():
        lines = [line for line, other in enumerate(reasons, 1) if other == reason]
        assert kind.rows == len(lines)
        assert [place.line for place in kind.first] == lines[:SHOWN_PLACES]
    rest = sum(reason not in bad.kinds for reason in reasons)
    assert (f"\n  and {rest:,} more" in bad.report(SOURCES)) == (rest > 0)
    assert BadRows.model_validate_json(bad.model_dump_json()) == bad

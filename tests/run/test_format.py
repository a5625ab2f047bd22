"""Numbers and durations are shown short, and texts without what a terminal would obey."""

import pytest

from qwenlora.run.format import ago, and_more, as_yaml, clock, count, duration, number, printable, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0, "0"), (7, "7"), (58190, "58,190"), (0.012934, "0.01293"), (6.306994, "6.307")),
        *((12345.6, "12,346"), (-1234.5, "-1,234"), (1e15, "1e+15"), (float("nan"), "nan")),
        (float("inf"), "inf"),
    ],
)
def test_a_number_has_the_digits_that_matter(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "texts"),
    [
        (-3, ("0 s", None, None)),
        (0, ("0 s", "0 s", "0:00:00")),
        (59.4, ("59 s", "59 s", "0:00:59")),
        (61, ("1 min", "1 min 1 s", "0:01:01")),
        (7200, ("2 h", "2 h 0 min", "2:00:00")),
        (90061, ("1 d", "25 h 1 min", "1 day, 1:01:01")),
        (172800, ("2 d", "48 h 0 min", "2 days, 0:00:00")),
    ],
)
def test_a_duration_is_shown_in_three_ways(seconds, texts):
    for show, text in zip((ago, duration, clock), texts, strict=True):
        assert text is None or show(seconds) == text


def test_counts_sizes_and_texts():
    assert (count(1, "run"), count(0, "run"), count(1200, "run")) == ("1 run", "0 runs", "1,200 runs")
    assert (size(2_500_000), size(2_500_000_000)) == ("2.5 MB", "2.5 GB")
    assert count(2, "process", "es") == "2 processes"
    assert [and_more("abc", shown) for shown in (1, 2, 3)] == [" and 2 more", " and 1 more", ""]
    assert printable("a\x1b[31m\nb") == "a\ufffd[31m\ufffdb"
    assert as_yaml([{"path": "a b", "weight": 2.0}, True]) == "[{path: a b, weight: 2.0}, true]"

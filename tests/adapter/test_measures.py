"""Answers and references as numbers."""

import random

import pytest

from qwenlora.adapter.compare.measures import contains, count_different, is_exact, similarity


def rouge_l(answer, reference):
    """ROUGE-L's F1 on characters, from its definition: the longest common subsequence by dynamic
    programming."""
    before = [0] * (len(reference) + 1)
    for one in answer:
        row = [0]
        for number, other in enumerate(reference):
            row.append(before[number] + 1 if one == other else max(before[number + 1], row[-1]))
        before = row
    precision, recall = before[-1] / len(answer), before[-1] / len(reference)
    return 2 * precision * recall / (precision + recall) if before[-1] else 0.0


def test_similarity_is_rouge_l_on_characters():
    draw = random.Random(0)
    for _ in range(300):
        pair = [
            "".join(draw.choices("多少小时 abc,。", k=draw.randint(1, 40))).strip() or "x" for _ in range(2)
        ]
        assert similarity(*pair) == pytest.approx(rouge_l(*pair), abs=1e-12)


def test_similarity_goes_from_none_to_all():
    assert similarity("每天八小时", "每天八小时") == 1
    assert similarity("每天八小时", "abc") == 0
    assert similarity("每天八小时", "每天七小时") == pytest.approx(0.8)
    assert similarity("", "") == 1
    assert similarity("", "a") == 0


def test_white_space_around_and_how_an_accent_is_encoded_do_not_matter():
    assert is_exact(" cafe\u0301\n", "café")
    assert similarity(" cafe\u0301\n", "café") == 1
    assert contains("one cafe\u0301 more", "café ")
    assert count_different(["café", " cafe\u0301", "tea"]) == 2


def test_inside_a_text_every_character_matters():
    assert not is_exact("十五分钟。", "十五分钟")
    assert contains("约十五分钟。", "十五分钟")
    assert not contains("约十 五分钟。", "十五分钟")

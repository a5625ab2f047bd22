"""How an answer is to its reference, as numbers: functions of texts alone, without a model.

Texts are compared in NFC (what a tokenizer of Qwen's keeps), without the white space around them.
"""

import unicodedata
from collections.abc import Iterable

from rapidfuzz.distance import Indel


def normal(text: str) -> str:
    """Return a text as it is compared."""
    return unicodedata.normalize("NFC", text).strip()


def same(answer: str, reference: str) -> bool:
    """Whether an answer is exactly its reference."""
    return normal(answer) == normal(reference)


def holds(answer: str, reference: str) -> bool:
    """Whether an answer holds its reference, word for word, with whatever before and after it."""
    return normal(reference) in normal(answer)


def similarity(answer: str, reference: str) -> float:
    """Return ROUGE-L's F1 on characters, 0 to 1: twice the longest common subsequence by both lengths' sum.

    Characters, since Chinese has no spaces between words. Two empty texts are alike: 1.
    Source: Lin, ROUGE (2004), with beta 1; as rapidfuzz computes it: 1 - Indel distance / (len a + len b).
    """
    return float(Indel.normalized_similarity(normal(answer), normal(reference)))


def different(answers: Iterable[str]) -> int:
    """Return how many different answers there are."""
    return len({normal(answer) for answer in answers})

"""How close an answer is to its reference, as numbers: functions of texts alone, without a model."""

import unicodedata
from collections.abc import Iterable

from rapidfuzz.distance import Indel


def normalize(text: str) -> str:
    """Return a text as it is compared: in NFC (as Qwen's tokenizers have it), without outer white space."""
    return unicodedata.normalize("NFC", text).strip()


def is_exact(answer: str, reference: str) -> bool:
    """Whether an answer is exactly its reference."""
    return normalize(answer) == normalize(reference)


def contains(answer: str, reference: str) -> bool:
    """Whether an answer contains its reference word for word, with any text before and after it."""
    return normalize(reference) in normalize(answer)


def similarity(answer: str, reference: str) -> float:
    """Return ROUGE-L's F1, 0 to 1: twice the longest common subsequence by both lengths' sum.

    Of characters, since Chinese has no spaces between words; two empty texts give 1. Source: Lin, ROUGE
    (2004), with beta 1; as rapidfuzz computes it: 1 - Indel distance / (len a + len b).
    """
    return float(Indel.normalized_similarity(normalize(answer), normalize(reference)))


def count_different(answers: Iterable[str]) -> int:
    """Return how many different answers there are."""
    return len({normalize(answer) for answer in answers})

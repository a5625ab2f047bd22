"""The vocabulary of a first-generation Qwen, qwen.tiktoken, as Qwen2's tokenizer with the same ids.

tiktoken joins the neighbours whose joint text has the lowest rank. Qwen2's tokenizer.json lists for each
token the two that make it: those that remain when the token itself is tokenised with the ranks below its own.
Any text inside a longer text is joined in the same order, so no other two ever make the token.
Source: https://github.com/QwenLM/Qwen/blob/main/tokenization_note.md
"""

import binascii
from base64 import b64decode
from pathlib import Path
from typing import Any

from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenlora.data.turns import END_OF_TEXT, TURN_END, TURN_START

VOCABULARY = "qwen.tiktoken"
# in the order of their ids, which follow the vocabulary, as in Qwen-1's code
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{number}|>" for number in range(205)))
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def convert_tokenizer(file: Path, max_length: int) -> Any:
    """Return a Qwen2Tokenizer with Qwen-1's ids and ChatML. Raises: ValueError for a bad vocabulary file."""
    ranks = _ranks(file)
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    tokenizer = Qwen2Tokenizer(
        vocab={spelled[token]: rank for token, rank in ranks.items()},
        merges=[(spelled[left], spelled[right]) for left, right in _merges(file, ranks)],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.eos_token = TURN_END  # a reply's end
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _ranks(file: Path) -> dict[bytes, int]:
    """Return {token: rank}, in the order of the ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file}, line {number}: {line[:40]!r} is not a token in base64 and its rank; download it"
                " again"
            ) from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{file} has no token for the byte {missing[0]:#04x}; it is not whole, download it again"
        )
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{file}: its {len(ranks)} ranks are not 0, 1, 2 ...; it is not whole, download it again"
        )
    return ranks


def _merges(file: Path, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two parts of each token of several bytes."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joint, at = min((ranks.get(parts[n] + parts[n + 1], rank), n) for n in range(len(parts) - 1))
            if joint >= rank:
                raise ValueError(f"{file}: token {rank} ({token!r}) is made of no two tokens before it")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((parts[0], parts[1]))
    return merges

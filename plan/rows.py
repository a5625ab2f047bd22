"""How many rows and tokens a run has: as its preparation counted them, else guessed from their texts."""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qwenlora.configs.paths import located
from qwenlora.configs.schema import Config, Data
from qwenlora.data import sources
from qwenlora.data.bad_row import BadRow
from qwenlora.data.rows import Row
from qwenlora.data.survey import survey
from qwenlora.data.tokenise import read_rows, repeats_of, side_of
from qwenlora.data.turns import Message
from qwenlora.run.folder import RunFolder

BYTES_A_TOKEN = (
    4.8  # of UTF-8, in Chinese and in English rows; right within a tenth (tests/plan/test_rows.py)
)
FEW = 50  # bytes of files, beside data.max_length: more of them fill a pack
TOKENS_A_TURN = 5  # of a chat template: its marks and the role


class RowCounts(NamedTuple):
    """The training rows of an epoch. tokens: of all rows; trained: those of them that are learnt; longest: of
    a row, 0: unknown; packs: of data.max_length, where they are known; counted: by a tokenizer, not guessed;
    missing: why there are no rows: each counts as long as it may be, and all of it as learnt."""

    rows: int
    tokens: int
    trained: int
    longest: int
    packs: int = 0
    counted: bool = False
    missing: str = ""

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return self.tokens / self.rows


def rows_of(config: Config) -> RowCounts:
    """Return the rows of a run: from its facts.json, if data are the same by name, else guessed. Where data
    are not here, as on a laptop, one row as long as it may be. Raises: ValueError when the files of rows
    cannot be read, or have none."""
    if counted := _counted(config):
        return counted
    try:
        sources.find(config.data)
    except ValueError as error:
        length = config.data.max_length
        return RowCounts(1, length, length, length, missing=str(error))
    return guess(config.data)


def _counted(config: Config) -> RowCounts | None:
    """Return the rows as the run's last preparation counted them; None where there is none for these data and
    this tokenizer, or its files are damaged."""
    run, here = RunFolder(config.run_dir), located(config, [Path.cwd()])
    with suppress(OSError, ValueError, KeyError):
        train, before = run.read_facts().data["train"], run.read_config()
        if train.rows and train.tokens and _counted_by(before) == _counted_by(here):
            return RowCounts(
                train.rows, train.tokens, train.trained_tokens, train.longest, train.packs, counted=True
            )
    return None


def _counted_by(config: Config) -> tuple[Data, str, str | None]:
    return config.data, config.model.name_or_path, config.model.tokenizer


def guess(data: Data) -> RowCounts:
    """Return the rows of data.train, their tokens by the bytes of their texts. A row that is too long counts
    data.max_length. Raises: ValueError when they cannot be read, or there are none."""
    found = sources.find(data)
    rows = tokens = trained = longest = 0
    for number, _, _, row in read_rows(found):
        if isinstance(row, BadRow) or side_of(row.digest, found[number], data) != "train":
            continue
        seen = repeats_of(row.digest, found[number].weight)
        length, learnt = (min(count, data.max_length) for count in _tokens(row, data))
        rows, tokens, trained = rows + seen, tokens + seen * length, trained + seen * learnt
        longest = max(longest, length)
    if not rows:
        survey(data.model_copy(update={"on_bad_row": "error"}))  # it says why none can be trained
        raise ValueError(f"data.train={data.train} has no rows to train")
    return RowCounts(rows, tokens, max(trained, 1), longest)


def tokens_of_few(data: Data) -> int:
    """Return the tokens of rows that are so few that they may not fill a pack, as guessed; 0 for others."""
    try:
        found = sources.find(data)
        bytes_there = sum(file.stat().st_size for source in found for file in source.files)
        are_few = all(source.files for source in found) and bytes_there < FEW * data.max_length
        return guess(data).tokens if are_few else 0
    except (ValueError, OSError):  # the preparation says it
        return 0


def _tokens(row: Row, data: Data) -> tuple[int, int]:
    """Return about how many tokens a row has, and how many of them are trained."""
    if row.text is not None:
        length = _of_text(row.text)
        return length, length
    turns = [(turn["role"], TOKENS_A_TURN + _of_text(_text(turn))) for turn in row.messages]
    length = sum(tokens for _, tokens in turns) + (_of_text(_json(row.tools)) if row.tools else 0)
    replies = [tokens for role, tokens in turns if role == "assistant"]
    learnt = {"assistant": sum(replies), "last_assistant": replies[-1] if replies else 0, "all": length}
    return length, learnt[data.train_on]


def _text(turn: Message) -> str:
    calls = _json(turn["tool_calls"]) if "tool_calls" in turn else ""
    return turn["content"] + turn.get("reasoning_content", "") + calls


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _of_text(text: str) -> int:
    return round(len(text.encode("utf-8", "surrogatepass")) / BYTES_A_TOKEN)

"""A look at a config's rows before training: `qwenlora data check` and `qwenlora data preview`. Both use the
run's own tokenizer and template. Training starts from the rows that the check prepared."""

import tempfile
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from qwenlora.configs import Config, combinations
from qwenlora.configs.schema import Data
from qwenlora.data import prepared, report
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.overlength import cut_to_length
from qwenlora.data.survey import rows_of_side, survey
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.hardware import gpu_count
from qwenlora.run.records import SideName
from qwenlora.trainer.model import pretrained, suitability

TRAINED = "black on green"


def check(config: Config, page: Path | None, console: Console) -> int:
    """Show what the rows are like, and write the same as HTML; return 0, or 2 when training would be refused.
    page: the HTML file; by default it lies beside the run folder."""
    run = RunFolder(config.run_dir)
    page = page or run.path.with_name(f"{run.path.name}.data.html")
    tokenizer, model_config = _tokenizer_and_config(config)
    embeddings = int(model_config.get_text_config().vocab_size)
    # a check reads all rows, whatever training would do about bad ones
    data = config.data.model_copy(update={"on_bad_row": "skip"})
    rows = prepared.prepare(data, tokenizer, run.cache(config), console, console.print)
    longest = max((counts.longest for counts in rows.counts.values()), default=0)  # none: all rows are bad
    suitability.check_lengths(config, model_config, longest)
    notes = [*suitability.notes_on_lengths(model_config, longest), *report.notes_of(config, rows)]
    listed = page.with_suffix(".bad_rows.txt")
    listed.unlink(missing_ok=True)  # of an earlier check
    if rows.index.bad.count:
        listed.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(listed, "".join(f"{line}\n" for line in rows.bad_lines()))
        notes.append(f"all bad rows are listed in {listed}")
        if config.data.on_bad_row == "skip":
            notes.append(f"left out: {rows.bad_report}")
    packing = combinations.packs_rows(config, on_gpu=gpu_count() > 0)
    findings = report.data_report(rows, config, tokenizer, embeddings, packing=packing, notes=notes)
    findings.show(console)
    findings.write(page)
    console.print(f"the same as a page: {page}", soft_wrap=True)
    return 2 if findings.refusal else 0


def preview(config: Config, side: SideName, first: int, count: int, *, ids: bool, console: Console) -> None:
    """Show rows as the model sees them, trained tokens coloured. first: the first row's number, from 1; ids:
    show a table of tokens and ids. Raises: ValueError when there is no such row, or a row is bad."""
    tokenizer, _ = _tokenizer_and_config(config)
    encoder = Encoder(tokenizer, config.data.train_on)
    shown = 0
    for place, row in islice(rows_of_side(config.data, side), first - 1, first - 1 + count):
        (tokens,) = encoder.encode([row])
        if isinstance(tokens, BadRow):
            raise ValueError(f"{place}: {tokens}")
        pieces, note = [tokens], ""
        if len(tokens.ids) > config.data.max_length:
            pieces = cut_to_length(row, tokens, encoder, config.data).pieces
            note = f", longer than data.max_length={config.data.max_length}: {_outcome(config, len(pieces))}"
        console.print(Text(f"{place}: {_counts(tokens)}{note}", style="bold"), soft_wrap=True)
        for piece in pieces:
            if ids:
                console.print(_table(tokenizer, piece))
            else:  # soft_wrap: no line breaks but the row's own
                console.print(_coloured(tokenizer, piece, console), soft_wrap=True)
        shown += 1
    if not shown:
        raise ValueError(_no_row(config.data, side, first))
    legend = (
        Text("trained tokens look like this", style=TRAINED)
        if console.color_system
        else f"trained tokens: {_marked('like this', console)}"
    )
    console.print(legend)


def _no_row(data: Data, side: SideName, first: int) -> str:
    """Return why there is no such row to show. Raises: ValueError listing the bad rows, where all are."""
    rows = sum(1 for _ in rows_of_side(data, side))
    if side == "eval" and data.eval is None and data.eval_fraction is None:
        return "there are no eval rows: neither data.eval nor data.eval_fraction is set"
    if not rows:
        survey(data.model_copy(update={"on_bad_row": "error"}))
    return f"there is no {side} row number {first}: {rows:,} can be trained"


def _tokenizer_and_config(config: Config) -> tuple[Any, Any]:
    """Return tokenizer and transformers' config of the base. Raises: ValueError when it writes no text."""
    transformers_logging.disable_progress_bar()
    # the tiny model is built in a run folder, and the real one, with weights, is only for runs
    with tempfile.TemporaryDirectory() as folder:
        base = pretrained.base_of(config, RunFolder(folder), weights=False)
        model_config = pretrained.load_config_of(config, base)
        suitability.check_task(config, model_config)
        return pretrained.load_tokenizer(config, base), model_config


def _outcome(config: Config, pieces: int) -> str:
    """Return what happens to an over-length row. pieces: the rows that are made of it."""
    policy = config.data.overlength
    if not pieces:
        return "refused" if policy == "error" else "dropped"
    return f"split into {pieces} row{'s' * (pieces > 1)}" if policy == "split" else "truncated"


def _counts(tokens: Tokens) -> str:
    trained = int(tokens.trained.sum())
    weights = "" if tokens.weights is None else " (×: the weight of their loss)"
    return f"{len(tokens.ids):,} tokens, {trained:,} trained{weights}"


def _stretches(tokens: Tokens) -> list[tuple[int, int]]:
    """Return [start, end) of each stretch of tokens that are all untrained, or trained with one weight."""
    borders = np.flatnonzero(np.diff(tokens.given_weights())) + 1
    edges = [0, *borders.tolist(), len(tokens.ids)]
    return list(pairwise(edges))


def _coloured(tokenizer: Any, tokens: Tokens, console: Console) -> Text:
    text = Text()
    for start, end in _stretches(tokens):
        words = tokenizer.decode(tokens.ids[start:end]).replace("\t", "⇥")
        if not tokens.trained[start]:
            text.append(words)
        else:
            text.append(_marked(words, console), style=TRAINED)
            text.append(_times(tokens, start), style="bold")
    return text


def _marked(words: str, console: Console) -> str:
    """Return trained words as they are where they get a colour, else in brackets that the screen can show."""
    if console.color_system:
        return words
    try:
        "⟦⟧".encode(console.encoding)
    except UnicodeEncodeError:  # GBK, ASCII
        return f"[[{words}]]"
    return f"⟦{words}⟧"


def _times(tokens: Tokens, place: int) -> str:
    """Return a trained token's weight as it is shown, empty for 1."""
    weight = 1.0 if tokens.weights is None else float(tokens.weights[place])
    return "" if weight == 1 else f"×{weight:.6g}"


def _table(tokenizer: Any, tokens: Tokens) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("position", "id", "token", "trained"):
        table.add_column(name, justify="left" if name == "token" else "right", overflow="fold")
    for number, (token, trained) in enumerate(zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True)):
        words = Text(repr(tokenizer.decode([token]))[1:-1], style=TRAINED if trained else "")
        table.add_row(str(number), str(token), words, f"yes{_times(tokens, number)}" if trained else "")
    return table

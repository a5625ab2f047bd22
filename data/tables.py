"""Rows of tables: CSV and TSV, Parquet, and data sets of the datasets library."""

import csv
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from qwenlora.data.bad_row import BadRow, printable, show
from qwenlora.data.chunks import CHUNK_ROWS, MAX_LINE_BYTES, Decoded, Values, in_chunks


def csv_rows(
    path: Path, texts: Iterator[str], raw: IO[bytes], delimiter: str | None, note: Callable[[str], None]
) -> Iterator[Values]:
    """Yield the rows of CSV text; the first line names the columns. delimiter: None to guess it."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = split_lines(texts)
    head = next(lines, "")
    if delimiter is None:
        delimiter = max(",;\t", key=head.count)
        if delimiter != ",":
            note(f"{path} is read as separated by {show(delimiter)}")
    reader = csv.reader(chain([head] if head else [], lines), delimiter=delimiter, strict=True)

    def rows() -> Iterator[Decoded]:
        start = 1
        try:
            names = [name.strip() for name in next(filter(None, reader), [])]
            if (twice := _twice(names)) is not None:
                raise ValueError(f"{path}:{start}: the column {show(twice)} stands twice; rename one")
            if not all(names):
                raise ValueError(f"{path}:{start}: a column has no name; the first line names the columns")
            start = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(names):
                    yield start, dict(zip(names, fields, strict=True))
                elif fields:
                    yield (
                        start,
                        BadRow(
                            f"has {len(fields)} columns, the first line names {len(names)}; a text with a"
                            f" {show(delimiter)} or a line break is written in double quotes"
                        ),
                    )
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{_csv_problem(start, reader.line_num, str(error))}") from None

    yield from in_chunks(rows(), raw)


def _csv_problem(start: int, line: int, problem: str) -> str:
    """Return `line: what is wrong`. start: line on which the row begins."""
    if problem == "unexpected end of data":
        return (
            f"{start}: not valid CSV: a double quote is opened in the row that begins here, and never closed"
        )
    if problem.startswith("new-line character"):
        return f"{line}: not valid CSV: lines end with a carriage return alone; convert the file: mac2unix"
    return (
        f"{line}: not valid CSV: {printable(problem)}; a text with a quote or a line break is put in double"
        f" quotes,"
        ' and a quote in it twice: "say ""hi"""'
    )


def split_lines(texts: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in parts, each with its line break."""
    rest = ""
    for text in texts:
        whole, newline, tail = text.rpartition("\n")
        if newline:
            yield from (f"{line}\n" for line in (rest + whole).split("\n"))
            rest = tail
        else:
            rest += text
    if rest:
        yield rest


def parquet_rows(path: Path, raw: IO[bytes]) -> Iterator[Values]:
    """Yield the rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    done = 0
    try:
        table = parquet.ParquetFile(raw)
        names, total, size = table.schema_arrow.names, table.metadata.num_rows, path.stat().st_size
        if (twice := _twice(names)) is not None:
            raise ValueError(f"the column {show(twice)} stands twice")
        for batch in table.iter_batches(batch_size=CHUNK_ROWS):
            values = [_without_nulls(row) for row in batch.to_pylist()]
            rows: list[Decoded] = list(enumerate(values, done + 1))
            done += len(values)
            yield Values(rows, size * done // max(total, done))  # a damaged count is no reason to stop
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        place = f"{path}: Parquet cannot be read" + (f" after row {done:,}" if done else "")
        raise ValueError(f"{place}: {_arrow_problem(error)}") from None


def dataset_chunks(dataset: Any) -> Iterator[Values]:
    """Yield the rows of a datasets.Dataset. Raises: ValueError when they cannot be read."""
    done = 0
    try:
        for columns in dataset.with_format(None).iter(batch_size=CHUNK_ROWS):
            names = list(columns)
            values = [
                _without_nulls(dict(zip(names, fields, strict=True)))
                for fields in zip(*columns.values(), strict=True)
            ]
            yield Values(list(enumerate(values, done + 1)), 0)
            done += len(values)
    except Exception as error:  # of pyarrow, or of images and sound that cannot be decoded
        raise ValueError(f"the data set cannot be read after row {done:,}: {_arrow_problem(error)}") from None


def _twice(names: list[str]) -> str | None:
    """Return the first name that occurs twice, if any."""
    return next((name for name in names if names.count(name) > 1), None)


def _without_nulls(value: object) -> object:
    """Return a value without null keys: Arrow gives all rows the keys of any of them. nulls.py reads those of
    tools and calls."""
    if isinstance(value, dict):
        return {
            key: item if key in ("tools", "functions", "arguments") else _without_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arrow_problem(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "a date is outside the years 1 to 9999; write it as text, or drop the column"
    return f"{printable(' '.join(str(error).split()))}; make the file again"

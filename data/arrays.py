"""The files of a prepared folder as they grow, what is counted of them, and the report on rows that were left
out."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from qwenlora.configs.schema import Data
from qwenlora.data.packing import pack
from qwenlora.data.rows import KNOWN
from qwenlora.data.sources import SIDES, SideName, Source
from qwenlora.data.tokenise import Done, Piece, repeats_of

SHOWN_BAD_ROWS = 20


class Written:
    """What has been written and counted so far."""

    def __init__(self, folder: Path, sources: list[Source], data: Data) -> None:
        self.folder, self.sources, self.data = folder, sources, data
        self.read = self.bad_rows = 0
        self.first_bad: list[tuple[int, int, int, str]] = []
        self.notes: list[str] = []
        self._bad_file = (folder / "bad.jsonl").open("w", encoding="utf-8")
        self._sides: dict[SideName, _Side] = {}
        self._by_source = [Counter[str]() for _ in sources]

    def add(self, source: int, file: int, done: Done) -> None:
        self.read += done.read
        self.bad_rows += len(done.bad)
        self._by_source[source].update(read=done.read, bad=len(done.bad))
        for line, reason in done.bad:
            if len(self.first_bad) < SHOWN_BAD_ROWS:
                self.first_bad.append((source, file, line, reason))
            self._bad_file.write(json.dumps([source, file, line, reason], ensure_ascii=False) + "\n")
        for side, piece in done.sides.items():
            if side not in self._sides:
                self._sides[side] = _Side(self.folder / side)
            self._sides[side].add(source, file, piece)
            self._by_source[source].update(tokens=len(piece.ids), trained_tokens=int(piece.trained.sum()))
        for side, counts in done.counts.items():
            if side in self._sides:
                self._sides[side].counts.update(counts)

    def counts(self) -> dict[str, Any]:
        """Return the counts of good and bad rows."""
        among = sum(counts["read"] for counts in self._by_source if counts["bad"])
        return {"read": self.read, "bad": self.bad_rows, "bad_among": among, "first_bad": self.first_bad}

    def finish(self) -> dict[str, Any]:
        """Write the rest; return all that was counted."""
        self._bad_file.close()
        weights = [source.weight for source in self.sources]
        once = [1.0] * len(weights)  # evaluation sees every row once
        sides = {
            side: self._sides[side].finish(weights if side == "train" else once)
            for side in SIDES
            if side in self._sides
        }
        if "train" in sides:
            lengths = np.load(self.folder / "train" / "lengths.npy")
            packs = pack(lengths, self.data.max_length)
            np.save(self.folder / "train" / "pack_rows.npy", packs.rows)
            np.save(self.folder / "train" / "pack_ends.npy", packs.ends)
            packed = hashlib.sha256(packs.rows.tobytes() + packs.ends.tobytes()).hexdigest()
            sides["train"] |= {"packs": len(packs), "packs_sha256": packed}
        return self.counts() | {
            "sides": sides,
            "sources": [dict(counts) for counts in self._by_source],
            "overlap": self._overlap(),
            "notes": self.notes,
        }

    def _overlap(self) -> dict[str, Any]:
        """Return which rows stand on both sides: {"rows": how many of eval, "first": their numbers}."""
        if not all(side in self._sides for side in SIDES):
            return {"rows": 0, "first": []}
        train, eval_ = (self._sides[side].digests() for side in SIDES)
        there = np.flatnonzero(np.isin(eval_, train))
        return {"rows": len(there), "first": there[:5].tolist()}


class _Side:
    """One side's files as they grow."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self._files: dict[str, IO[bytes]] = {
            name: (folder / f"{name}.bin").open("wb") for name in ("ids", "trained")
        }
        self._hash = {name: hashlib.sha256() for name in self._files}
        self._lists: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("lengths", "trained_lengths", "row_of", "digests", "places", "whole")
        }
        self._rows = 0

    def add(self, source: int, file: int, piece: Piece) -> None:
        for name, values in (("ids", piece.ids), ("trained", piece.trained)):
            self._files[name].write(values.tobytes())
            self._hash[name].update(values.tobytes())
        totals = np.concatenate([[0], np.cumsum(piece.trained, dtype=np.int64)])
        ends = np.cumsum(piece.lengths, dtype=np.int64)
        lists = self._lists
        lists["lengths"].append(piece.lengths)
        lists["trained_lengths"].append((totals[ends] - totals[ends - piece.lengths]).astype(np.int32))
        lists["row_of"].append(piece.row_of + self._rows)
        lists["digests"].append(piece.digests)
        lists["whole"].append(piece.whole)
        places = np.empty((len(piece.lines), 3), np.int32)
        places[:, 0], places[:, 1], places[:, 2] = source, file, piece.lines
        lists["places"].append(places)
        self._rows += len(piece.lines)

    def digests(self) -> npt.NDArray[Any]:
        """Return the digests of all rows as one value each."""
        return np.ascontiguousarray(np.concatenate(self._lists["digests"])).view("V16").ravel()

    def finish(self, weights: list[float]) -> dict[str, Any]:
        """Write the rest; return what was counted. weights: of the sources."""
        for file in self._files.values():
            file.close()
        arrays = {name: np.concatenate(parts) for name, parts in self._lists.items()}
        lengths = arrays["lengths"]
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1]
        seen = np.arange(len(lengths))
        if any(weight != 1 for weight in weights):
            seen = np.repeat(seen, self._repeats(arrays, weights))
        used = {
            "starts": starts[seen],
            "lengths": lengths[seen],
            "trained_lengths": arrays["trained_lengths"][seen],
            "row_of": arrays["row_of"][seen],
        }
        for name, values in (used | {name: arrays[name] for name in ("places", "whole", "digests")}).items():
            np.save(self.folder / f"{name}.npy", values)
        digest = hashlib.sha256()
        for part in self._hash.values():
            digest.update(part.digest())
        for name in ("starts", "lengths"):
            digest.update(np.asarray(used[name], np.int64).tobytes())
        counts = {
            what: self.counts[what]
            for what in ("overlength", "truncated", "dropped", "split", "lost_replies")
        }
        return counts | {
            "sha256": digest.hexdigest(),
            "rows": len(seen),
            "read_rows": self._rows,
            "tokens": int(used["lengths"].sum(dtype=np.int64)),
            "trained_tokens": int(used["trained_lengths"].sum(dtype=np.int64)),
            "longest": int(used["lengths"].max(initial=0)),
            "longest_read": int(arrays["whole"].max(initial=0)),
            "longest_place": arrays["places"][int(arrays["whole"].argmax())].tolist(),
            "duplicates": self._rows - len(np.unique(self.digests())),
        }

    def _repeats(self, arrays: dict[str, npt.NDArray[Any]], weights: list[float]) -> npt.NDArray[np.int64]:
        """Return how often an epoch sees each piece."""
        rows = zip(arrays["digests"], arrays["places"][:, 0].tolist(), strict=True)
        of_row = np.array(
            [repeats_of(digest.tobytes(), weights[source]) for digest, source in rows], np.int64
        )
        return np.asarray(of_row[arrays["row_of"]], np.int64)


def bad_report(facts: dict[str, Any], sources: list[Source]) -> str:
    """Return the first bad rows with their places, and the totals; empty when there are none.

    facts: {bad, first_bad, bad_among: rows of the sources that have bad ones}.
    """
    if not facts["bad"]:
        return ""
    lines = [
        f"{sources[source].place(file, line)}: {reason}" for source, file, line, reason in facts["first_bad"]
    ]
    help_ = f"\n{KNOWN}" if any("unknown shape" in line for line in lines) else ""
    total, bad = facts["bad_among"], facts["bad"]
    reasons = {reason for *_, reason in facts["first_bad"]}
    if bad == total > 1 and len(reasons) == 1:  # one sentence says it all
        which = "all" if bad <= SHOWN_BAD_ROWS else f"the first {SHOWN_BAD_ROWS} of"
        return f"{lines[0]}; the same for {which} {total:,} rows{help_}"
    shown = "\n  ".join(lines)
    more = f"\n  and {bad - len(lines):,} more" if bad > len(lines) else ""
    return f"{bad:,} of {total:,} rows cannot be trained:\n  {shown}{more}{help_}"


def refusal(facts: dict[str, Any], sources: list[Source]) -> str:
    """Return the report, and what can be done."""
    return f"{bad_report(facts, sources)}\nmend or remove them, or leave them out: data.on_bad_row: skip"


def bad_lines(folder: Path, sources: list[Source]) -> Iterator[str]:
    """Yield every bad row as `place: reason`."""
    with (folder / "bad.jsonl").open(encoding="utf-8") as file:
        for text in file:
            source, number, line, reason = json.loads(text)
            yield f"{sources[source].place(number, line)}: {reason}"

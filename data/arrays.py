"""The files of a prepared folder, written as chunks come in, and their counts."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from qwenlora.configs.schema import Data
from qwenlora.data.counts import BadRowPlace, BadRows, Overlap, PreparedIndex, SourceCounts
from qwenlora.data.marks import Unfilled
from qwenlora.data.packing import pack
from qwenlora.data.sources import SIDES, Source
from qwenlora.data.tokenise import TokenArrays, TokenisedChunk, repeats_of
from qwenlora.run.records import SideCounts, SideName


class ArrayWriter:
    """Writes a prepared folder. read, bad_rows: rows so far; notes: warnings so far."""

    def __init__(self, folder: Path, sources: list[Source], data: Data) -> None:
        self.folder, self.sources, self.data = folder, sources, data
        self.read = self.bad_rows = 0
        self.notes: list[str] = []
        self._unfilled = Unfilled()
        self._bad = BadRows()
        self._bad_file = (folder / "bad.jsonl").open("w", encoding="utf-8")
        self._sides: dict[SideName, _SideWriter] = {}
        self._by_source = [Counter[str]() for _ in sources]

    def add(self, source: int, file: int, chunk: TokenisedChunk) -> None:
        """Write a chunk. source, file: numbers, from 0."""
        self.read += chunk.read
        self.bad_rows += len(chunk.bad)
        self._by_source[source].update(read=chunk.read, bad=len(chunk.bad))
        for line, row in chunk.bad:
            place = BadRowPlace(source, file, line, str(row))
            self._bad.add(place, row.roles)
            self._bad_file.write(json.dumps(place, ensure_ascii=False) + "\n")
        for line, names in chunk.unfilled:
            self._unfilled.add(self.sources[source].place(file, line), names)
        for side, arrays in chunk.sides.items():
            if side not in self._sides:
                self._sides[side] = _SideWriter(self.folder / side)
            self._sides[side].add(source, file, arrays)
            self._by_source[source].update(tokens=len(arrays.ids), trained_tokens=int(arrays.trained.sum()))
        for side, counts in chunk.counts.items():
            if side in self._sides:
                self._sides[side].counts.update(counts)

    def bad(self) -> BadRows:
        """Return the bad rows so far."""
        self._bad.among = sum(counts["read"] for counts in self._by_source if counts["bad"])
        return self._bad

    def finish(self) -> PreparedIndex:
        """Write the rest; return the index."""
        self._bad_file.close()
        weights = [source.weight for source in self.sources]
        once = [1.0] * len(weights)  # evaluation sees every row once
        sides = {
            side: self._sides[side].finish(weights if side == "train" else once)
            for side in SIDES
            if side in self._sides
        }
        if "train" in sides:
            sides["train"] = self._write_packs(sides["train"])
        return PreparedIndex(
            read_rows=self.read,
            bad=self.bad(),
            sides=sides,
            sources=[SourceCounts.model_validate(counts) for counts in self._by_source],
            overlap=self._overlap(),
            notes=[*self.notes, *self._unfilled.notes()],
        )

    def _write_packs(self, counts: SideCounts) -> SideCounts:
        lengths = np.load(self.folder / "train" / "lengths.npy")
        packs = pack(lengths, self.data.max_length)
        np.save(self.folder / "train" / "pack_rows.npy", packs.rows)
        np.save(self.folder / "train" / "pack_ends.npy", packs.ends)
        digest = hashlib.sha256(packs.rows.tobytes() + packs.ends.tobytes()).hexdigest()
        return counts.model_copy(update={"packs": len(packs), "packs_sha256": digest})

    def _overlap(self) -> Overlap:
        if not all(side in self._sides for side in SIDES):
            return Overlap()
        train, evaluation = (self._sides[side].digests() for side in SIDES)
        rows = np.flatnonzero(np.isin(evaluation, train))
        return Overlap(rows=len(rows), first=rows[:5].tolist())


class _SideWriter:
    """Writes the files of one side."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self._files: dict[str, IO[bytes]] = {}
        self._hash: dict[str, Any] = {}
        for name in ("ids", "trained"):
            self._open(name)
        self._parts: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("lengths", "trained_lengths", "row_of", "digests", "places", "whole")
        }
        self._used = np.zeros(0, np.bool_)  # [ids]: whether a token has this id
        self._rows = 0

    def add(self, source: int, file: int, arrays: TokenArrays) -> None:
        if arrays.weights is not None and "weights" not in self._files:
            self._start_weights()
        self._write("ids", arrays.ids)
        self._write("trained", arrays.trained)
        if "weights" in self._files:
            weights = arrays.trained.astype(np.float32) if arrays.weights is None else arrays.weights
            self._write("weights", weights)
            self.counts["weighted_tokens"] += int((weights != arrays.trained).sum())
        self._used = np.pad(self._used, (0, max(0, int(arrays.ids.max(initial=-1)) + 1 - len(self._used))))
        self._used[arrays.ids] = True
        totals = np.concatenate([[0], np.cumsum(arrays.trained, dtype=np.int64)])
        ends = np.cumsum(arrays.lengths, dtype=np.int64)
        parts = self._parts
        parts["lengths"].append(arrays.lengths)
        parts["trained_lengths"].append((totals[ends] - totals[ends - arrays.lengths]).astype(np.int32))
        parts["row_of"].append(arrays.row_of + self._rows)
        parts["digests"].append(arrays.digests)
        parts["whole"].append(arrays.whole)
        places = np.empty((len(arrays.lines), 3), np.int32)
        places[:, 0], places[:, 1], places[:, 2] = source, file, arrays.lines
        parts["places"].append(places)
        self._rows += len(arrays.lines)

    def _open(self, name: str) -> None:
        self._files[name] = (self.folder / f"{name}.bin").open("wb")
        self._hash[name] = hashlib.sha256()

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        self._files[name].write(values.tobytes())
        self._hash[name].update(values.tobytes())

    def _start_weights(self) -> None:
        """Begin the file of weights, of which all earlier tokens have 1 if trained."""
        self._open("weights")
        self._files["trained"].flush()
        with (self.folder / "trained.bin").open("rb") as trained:
            while part := trained.read(2**22):
                self._write("weights", np.frombuffer(part, np.bool_).astype(np.float32))

    def digests(self) -> npt.NDArray[Any]:
        """Return the digests of all rows as one value each."""
        return np.ascontiguousarray(np.concatenate(self._parts["digests"])).view("V16").ravel()

    def finish(self, weights: list[float]) -> SideCounts:
        """Write the rest; return the counts. weights: of the sources."""
        for file in self._files.values():
            file.close()
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        starts = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])[:-1]
        pieces = np.arange(len(starts))  # of an epoch, in order
        if any(weight != 1 for weight in weights):
            pieces = np.repeat(pieces, self._repeats(arrays, weights))
        epoch = {
            "starts": starts[pieces],
            "lengths": arrays["lengths"][pieces],
            "trained_lengths": arrays["trained_lengths"][pieces],
            "row_of": arrays["row_of"][pieces],
        }
        for name, values in (epoch | {name: arrays[name] for name in ("places", "whole", "digests")}).items():
            np.save(self.folder / f"{name}.npy", values)
        np.save(self.folder / "used.npy", np.flatnonzero(self._used).astype(np.int32))
        digest = hashlib.sha256()
        for part in self._hash.values():
            digest.update(part.digest())
        for name in ("starts", "lengths"):
            digest.update(np.asarray(epoch[name], np.int64).tobytes())
        source, file_number, line = arrays["places"][int(arrays["whole"].argmax())].tolist()
        return SideCounts(
            sha256=digest.hexdigest(),
            rows=len(pieces),
            read_rows=self._rows,
            tokens=int(epoch["lengths"].sum(dtype=np.int64)),
            trained_tokens=int(epoch["trained_lengths"].sum(dtype=np.int64)),
            longest=int(epoch["lengths"].max(initial=0)),
            longest_read=int(arrays["whole"].max(initial=0)),
            longest_place=(source, file_number, line),
            duplicates=self._rows - len(np.unique(self.digests())),
            overlength=self.counts["overlength"],
            truncated=self.counts["truncated"],
            dropped=self.counts["dropped"],
            split=self.counts["split"],
            lost_replies=self.counts["lost_replies"],
            masked_replies=self.counts["masked_replies"],
            weighted_tokens=self.counts["weighted_tokens"],
        )

    def _repeats(self, arrays: dict[str, npt.NDArray[Any]], weights: list[float]) -> npt.NDArray[np.int64]:
        """Return how often an epoch sees each piece."""
        rows = zip(arrays["digests"], arrays["places"][:, 0].tolist(), strict=True)
        of_row = np.array(
            [repeats_of(digest.tobytes(), weights[source]) for digest, source in rows], np.int64
        )
        return np.asarray(of_row[arrays["row_of"]], np.int64)

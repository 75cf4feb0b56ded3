"""Pairs of documents that are duplicates, found by sorting their keys outside of memory.

Runs: some documents in a row, each of their key columns sorted. Slices: one column, and one range of its values,
gathered from all runs; documents with the same key lie side by side there, and their signatures are compared. So a
process holds the keys of one run, or one slice, however many documents there are. It maps each run once, and holds none
open. A pair may be found by many keys; the last stage gathers the pairs of a range of documents, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.assemble import runs_of
from data_tools.clean.attributes import (
    BATCH_DOCUMENTS,
    Corpus,
    Documents,
    Location,
    Reopening,
    map_batches,
    work_path,
)
from data_tools.clean.sketch import Bytes, Keys, Sketch
from data_tools.executors import Advance
from data_tools.job import Stage
from data_tools.work import write_batches

RUN_BYTES = 1 << 27
"""Of the keys of a run."""
MAX_RUN_DOCUMENTS = 1 << 22
SORT_BYTES = 28
"""For each document, to sort one column."""
SLICE_DOCUMENTS = 1 << 21
"""About how many documents one slice of a key column holds."""
SLICE_BYTES = 100
"""Of each of these documents, while they are compared."""
GROUPS_OF_KEY = 1 << 7
"""Units of work for a key column: with more slices than that, a unit takes several, one after another."""
KEY_BYTES = 12
"""Of a key and its document in a run."""
WORKER_BYTES = 1 << 24
"""Of keys that are worth a further worker process."""
MAX_ROUNDS = 64
"""Documents of one key that no earlier one of these many was a duplicate of are left to their other keys."""
COMPARED_AT_ONCE, FAULT_BYTES = 1 << 16, 1 << 16
"""Pairs; and what the kernel may map of a file where one signature is read."""
MAPPED_FILES = 1 << 14
"""Of which a process may map 65,530."""
JOINED_DOCUMENTS = 1 << 22
"""Whose pairs are gathered by one unit."""
PAIR_BYTES = 80
"""Of a pair that is gathered."""

KEY_SCHEMA = pa.schema({"key": pa.uint64(), "document": pa.uint32()})
"""Of each batch in a file of keys: one key column, sorted; documents are counted from the run's first."""
PAIR_SCHEMA = pa.schema({"first": pa.uint64(), "second": pa.uint64()})
"""Of pairs: an earlier document, and one that is a duplicate of it; each batch is sorted by the second."""

Pairs = npt.NDArray[np.uint64]
"""A row for each pair: an earlier document, and one that is a duplicate of it."""


@dataclass(frozen=True)
class Runs(Reopening):
    """The documents of the whole input: in order, where each stands and its signature; and by their keys.

    Run n holds the documents from n * `run_documents` on.
    """

    corpus: Corpus
    sketch: Sketch
    folder: Path
    run_documents: int

    def __len__(self) -> int:
        return -(-self.corpus.num_documents // self.run_documents)

    def extent(self, number: int) -> tuple[int, int]:
        """The first document of a run, and the one behind its last."""
        first = number * self.run_documents
        return first, min(first + self.run_documents, self.corpus.num_documents)

    def stage(self) -> Stage:
        document_bytes = KEY_BYTES * self.sketch.num_keys
        sizes = [document_bytes * (last - first) for first, last in map(self.extent, range(len(self)))]
        return Stage("sort", sizes, self.keys_path, self.sort)

    def documents_path(self, number: int) -> Path:
        return work_path(self.folder, 2 * number, f"run-{number:06d}-documents.arrow")

    def keys_path(self, number: int) -> Path:
        return work_path(self.folder, 2 * number, f"run-{number:06d}-keys.arrow")

    def sort(self, number: int, advance: Advance) -> None:
        """Commit the documents of a run, and then each of its key columns, sorted."""
        first, last = self.extent(number)
        batches = self.corpus.batches(first, last, ["id", "file", "row", "signature"])
        start = next(batches)
        write_batches(self.documents_path(number), start.schema, chain([start], batches))
        keys = np.empty((self.sketch.num_keys, last - first), np.uint64)
        place = 0
        for batch in self.corpus.batches(first, last, ["keys"]):
            keys[:, place : place + len(batch)] = batch["keys"].flatten().to_numpy().reshape(len(batch), -1).T
            place += len(batch)
        write_batches(self.keys_path(number), KEY_SCHEMA, map(_sorted_column, keys))
        advance((last - first) * KEY_BYTES * self.sketch.num_keys)

    @cached_property
    def _documents(self) -> Any:
        """The documents of a run: batches of BATCH_DOCUMENTS."""
        return lru_cache(MAPPED_FILES)(lambda number: map_batches(self.documents_path(number)))

    @cached_property
    def keys(self) -> Any:
        """The key columns of a run: a batch for each."""
        return lru_cache(MAPPED_FILES)(lambda number: map_batches(self.keys_path(number)))

    def _placed(self, documents: Documents) -> Iterator[tuple[slice, pa.RecordBatch, Documents]]:
        """In which batches ascending documents lie: which of them, the batch, and their rows in it."""
        runs, rows = np.divmod(documents.astype(np.int64), self.run_documents)
        batches, rows = np.divmod(rows, BATCH_DOCUMENTS)
        for run, first, last in runs_of(runs):
            for batch, begin, end in runs_of(batches[first:last]):
                places = slice(first + begin, first + end)
                yield places, self._documents(run)[batch], rows[places]

    def locations(self, documents: Documents) -> list[Location]:
        """Where documents stand, whose numbers are ascending."""
        parts = self.corpus.parts
        indices = self.corpus.parts_of(documents)
        found = []
        for some, batch, rows in self._placed(documents):
            records = batch.select(["id", "file", "row"]).take(pa.array(rows)).to_pylist()
            found += [
                self.corpus.location(parts[index], record["id"], record["file"], record["row"])
                for index, record in zip(indices[some].tolist(), records, strict=True)
            ]
        return found

    def signatures(self, documents: Documents) -> Bytes:
        """Of documents whose numbers are ascending."""
        signatures = np.empty((len(documents), self.sketch.signature_bytes), np.uint8)
        for some, batch, rows in self._placed(documents):
            signatures[some] = _signatures(batch)[rows]
        return signatures

    def count_equal_bytes(self, first: Documents, second: Documents) -> npt.NDArray[np.int64]:
        """In how many places the signatures of each pair of documents agree."""
        at_once = self.corpus.memory.fitting(FAULT_BYTES, COMPARED_AT_ONCE)
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(first), at_once):
            block = slice(start, start + at_once)
            wanted, places = np.unique(np.concatenate([first[block], second[block]]), return_inverse=True)
            signatures = self.signatures(wanted)
            ones, others = np.split(places, 2)
            found.append((signatures[ones] == signatures[others]).sum(axis=1))
            self.corpus.memory.release_mapped()
        return np.concatenate(found)


def _sorted_column(keys: Keys) -> pa.RecordBatch:
    order = np.argsort(keys, kind="stable")
    return pa.RecordBatch.from_arrays([pa.array(keys[order]), pa.array(order.astype(np.uint32))], schema=KEY_SCHEMA)


def _signatures(batch: pa.RecordBatch) -> Bytes:
    column = batch["signature"]
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return data.reshape(len(column), width)


@dataclass(frozen=True)
class Matching(Reopening):
    """Compares documents that share a key, and commits files of pairs, which join every duplicate to an earlier one."""

    runs: Runs
    folder: Path
    slice_documents: int

    @cached_property
    def num_slices(self) -> int:
        """Of a key column. A power of two, so that the slices share the values of a key exactly."""
        return 1 << max(0, (self.runs.corpus.num_documents - 1) // self.slice_documents).bit_length()

    @cached_property
    def num_groups(self) -> int:
        return min(self.num_slices, GROUPS_OF_KEY)

    def stages(self) -> Iterator[Stage]:
        num_documents, num_keys = self.runs.corpus.num_documents, self.runs.sketch.num_keys
        max_workers = 1 + num_documents * KEY_BYTES * num_keys // WORKER_BYTES
        sizes = [num_documents * KEY_BYTES // self.num_groups] * (num_keys * self.num_groups)
        yield Stage("compare", sizes, self.path, self.match, max_workers)
        yield Stage("join", [0] * len(self.pair_files), self.joined_path, self.join, max_workers)

    def path(self, number: int) -> Path:
        key, group = divmod(number, self.num_groups)
        return self.folder / f"by-key-{self.num_groups}" / f"{key:03d}" / f"{group:06d}.arrow"

    def joined_path(self, number: int) -> Path:
        return work_path(self.folder / "joined", number, f"{number:06d}.arrow")

    @property
    def pair_files(self) -> list[Path]:
        """The pairs of each range of documents."""
        return list(map(self.joined_path, range(-(-self.runs.corpus.num_documents // JOINED_DOCUMENTS))))

    def match(self, number: int, advance: Advance) -> None:
        """Commit the pairs of a key column's slices of one group, those of each slice sorted."""
        key, group = divmod(number, self.num_groups)
        size = self.num_slices // self.num_groups
        bounds = [self._bounds(key, run, range(group * size, (group + 1) * size)) for run in range(len(self.runs))]

        def batches() -> Iterator[pa.RecordBatch]:
            for index in range(size):
                pieces = self._gathered(key, [each[index : index + 2] for each in bounds])
                yield pair_batch([*self.matches(pieces)])
                self.runs.corpus.memory.release_mapped()
                advance(self.runs.corpus.num_documents * KEY_BYTES // self.num_slices)

        write_batches(self.path(number), PAIR_SCHEMA, batches())

    def join(self, number: int, advance: Advance) -> None:
        """Commit the pairs whose second document is in a range: each once, or, of very many, a few times."""
        extent = np.array([number * JOINED_DOCUMENTS, (number + 1) * JOINED_DOCUMENTS], np.uint64)
        most = self.runs.corpus.memory.fitting(PAIR_BYTES, JOINED_DOCUMENTS)

        def batches() -> Iterator[pa.RecordBatch]:
            found, size = list[Pairs](), 0
            for path in map(self.path, range(self.runs.sketch.num_keys * self.num_groups)):
                for batch in map_batches(path):
                    begin, end = np.searchsorted(batch["second"].to_numpy(), extent).tolist()
                    if end > begin:
                        found.append(as_pairs(batch.slice(begin, end - begin)))
                        size += end - begin
                    if size >= most:
                        yield pair_batch(found)
                        found, size = [], 0
                self.runs.corpus.memory.release_mapped()
            yield pair_batch(found)

        write_batches(self.joined_path(number), PAIR_SCHEMA, batches())

    def _bounds(self, key: int, run: int, slices: range) -> list[int]:
        """Where each of these slices begins in a run, and where the last ends."""
        keys = self.runs.keys(run)[key]["key"].to_numpy()
        edges = [number * ((1 << 64) // self.num_slices) for number in (*slices, slices.stop)]
        found: list[int] = np.searchsorted(
            keys, np.array([edge for edge in edges if edge < 1 << 64], np.uint64)
        ).tolist()
        return found if len(found) == len(edges) else [*found, len(keys)]

    def matches(self, pieces: Iterable[list[tuple[Keys, Documents]]]) -> Iterator[Pairs]:
        """The pairs of documents with the same key that are duplicates; the pieces come in document order.

        Of one key, all documents are compared with the first; those that were no duplicates of it with their first, and
        so on. Many copies of one text take one round: never every document with every other.
        """
        leaders = [(np.zeros(0, np.uint64), np.zeros(0, np.uint64))]
        for gathered in pieces:
            keys, documents = (np.concatenate(columns) for columns in zip(*leaders, *gathered, strict=True))
            # Leaders before others, and both in document order: a stable sort leaves those of one key in order.
            order = np.argsort(keys, kind="stable")
            keys, documents = keys[order], documents[order]
            leaders = []
            while len(keys) and len(leaders) < MAX_ROUNDS:
                is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
                leaders.append((keys[is_first], documents[is_first]))
                kept = leaders[-1][1][np.cumsum(is_first) - 1][~is_first]
                keys, documents = keys[~is_first], documents[~is_first]
                is_same = self.are_duplicates(kept, documents)
                yield np.stack([kept[is_same], documents[is_same]], axis=1)
                keys, documents = keys[~is_same], documents[~is_same]

    def _gathered(self, key: int, bounds: list[list[int]]) -> Iterator[list[tuple[Keys, Documents]]]:
        """The keys and documents of a slice in document order: at once, unless one key has very many documents."""
        pieces: list[tuple[Keys, Documents]] = []
        size = 0
        for run, (first, last) in enumerate(bounds):
            keys, documents = (column.to_numpy()[first:last] for column in self.runs.keys(run)[key])
            pieces.append((keys, documents.astype(np.uint64) + np.uint64(run * self.runs.run_documents)))
            size += last - first
            if size >= 2 * self.slice_documents or run == len(bounds) - 1:
                yield pieces
                pieces, size = [], 0

    def are_duplicates(self, first: Documents, second: Documents) -> npt.NDArray[np.bool_]:
        is_same: npt.NDArray[np.bool_] = self.runs.count_equal_bytes(first, second) >= self.runs.sketch.min_equal_bytes
        return is_same


def pair_batch(found: list[Pairs]) -> pa.RecordBatch:
    """Pairs sorted by their second document, each once."""
    pairs = np.concatenate([np.zeros((0, 2), np.uint64), *found])
    pairs = pairs[np.lexsort(pairs.T)]
    is_new = np.ones(len(pairs), bool)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    columns = [pa.array(np.ascontiguousarray(column)) for column in pairs[is_new].T]
    return pa.RecordBatch.from_arrays(columns, schema=PAIR_SCHEMA)


def as_pairs(batch: pa.RecordBatch) -> Pairs:
    return np.stack([column.to_numpy() for column in batch.columns], axis=1)

"""Pairs of documents that are duplicates, found by sorting their keys outside of memory.

Runs: some parts at a time, each of their key columns sorted. Slices: one column, and one range of its values, gathered
from all runs; documents with the same key lie side by side there, and their signatures are compared. So a process
holds the keys of one run, or one slice, however many documents there are. It maps each run once, and holds none open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.clean.attributes import Corpus, Documents, Location, Reopening, by_file, map_batches, work_path
from data_tools.clean.sketch import Bytes, Keys, Sketch
from data_tools.executors import Advance
from data_tools.job import Stage
from data_tools.work import write_batches
from megatrain.atomic import committed

RUN_BYTES = 1 << 27
"""Of the keys of a run."""
MAX_RUN_DOCUMENTS = 1 << 22
SLICE_DOCUMENTS = 1 << 21
"""About how many documents one slice of a key column holds."""
GROUPS_OF_KEY = 1 << 7
"""Units of work for a key column: with more slices than that, a unit takes several, one after another."""
KEY_BYTES = 12
"""Of a key and its document in a run."""
MAX_ROUNDS = 64
"""Documents of one key that no earlier one of these many was a duplicate of are left to their other keys."""
COMPARED_AT_ONCE = 1 << 16
MAPPED_FILES = 1 << 14
"""Of which a process may map 65,530."""
BATCH_DOCUMENTS = 1 << 16

KEY_SCHEMA = pa.schema({"key": pa.uint64(), "document": pa.uint32()})
"""Of each batch in a file of keys: one key column, sorted; documents are counted from the run's first."""

Pairs = npt.NDArray[np.uint64]
"""A row for each pair: an earlier document, and one that is a duplicate of it."""


class Run(NamedTuple):
    """Documents [first_document, first_document + num_documents), those of parts [first_part, last_part)."""

    first_part: int
    last_part: int
    first_document: int
    num_documents: int


@dataclass(frozen=True)
class Runs(Reopening):
    """The documents of the whole input: in order, where each stands and its signature; and by their keys."""

    corpus: Corpus
    sketch: Sketch
    folder: Path
    run_documents: int

    @cached_property
    def first_parts(self) -> list[int]:
        """The part with which each run begins, and the one behind the last."""
        firsts, num_documents = self.corpus.parts["first_document"], self.corpus.num_documents
        if not num_documents:
            return [len(firsts)]
        # A part without documents at the end belongs to the last run.
        numbers = np.minimum(firsts, np.uint64(num_documents - 1)) // np.uint64(self.run_documents)
        return [*np.flatnonzero(np.diff(numbers.astype(np.int64), prepend=-1)).tolist(), len(firsts)]

    @cached_property
    def first_documents(self) -> Documents:
        starts: Documents = self.corpus.parts["first_document"][self.first_parts[:-1]]
        return starts

    def __len__(self) -> int:
        return len(self.first_parts) - 1

    def __getitem__(self, number: int) -> Run:
        first, last = self.first_parts[number : number + 2]
        document = int(self.first_documents[number])
        next_document = int(self.first_documents[number + 1]) if number + 1 < len(self) else self.corpus.num_documents
        return Run(first, last, document, next_document - document)

    def stage(self) -> Stage:
        sizes = [
            run.num_documents * KEY_BYTES * self.sketch.num_keys for run in map(self.__getitem__, range(len(self)))
        ]
        return Stage("sort", sizes, self.keys_path, self.sort)

    def documents_path(self, number: int) -> Path:
        return work_path(self.folder, 2 * number, f"run-{number:06d}.documents")

    def keys_path(self, number: int) -> Path:
        return self.documents_path(number).with_suffix(".keys")

    def sort(self, number: int, advance: Advance) -> None:
        """Commit the documents of a run, and then each of its key columns, sorted."""
        run = self[number]
        batches = self._attributes(run, ["id", "file", "row", "signature"])
        first = next(batches)
        write_batches(self.documents_path(number), first.schema, chain([first], batches))
        keys = np.empty((self.sketch.num_keys, run.num_documents), np.uint64)
        start = 0
        for batch in self._attributes(run, ["keys"]):
            keys[:, start : start + len(batch)] = batch["keys"].flatten().to_numpy().reshape(len(batch), -1).T
            start += len(batch)
        write_batches(self.keys_path(number), KEY_SCHEMA, map(_sorted_column, keys))
        advance(run.num_documents * KEY_BYTES * self.sketch.num_keys)

    def _attributes(self, run: Run, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Some attributes of a run's documents, in batches that are as large as they may be."""
        tables: list[pa.Table] = []
        size = 0
        for index in range(run.first_part, run.last_part):
            tables.append(self.corpus.columns(self.corpus.parts[index], names))
            size += len(tables[-1])
            if size >= BATCH_DOCUMENTS or index == run.last_part - 1:
                yield from pa.concat_tables(tables).combine_chunks().to_batches()
                tables, size = [], 0

    @cached_property
    def _documents(self) -> Any:
        """The batches of documents of a run, and with which document of the run each begins."""

        def opened(number: int) -> tuple[list[pa.RecordBatch], Documents]:
            batches = map_batches(self.documents_path(number))
            sizes = np.array([len(batch) for batch in batches], np.uint64)
            return batches, np.cumsum(sizes) - sizes

        return lru_cache(MAPPED_FILES)(opened)

    @cached_property
    def keys(self) -> Any:
        """The key columns of a run: a batch for each."""
        return lru_cache(MAPPED_FILES)(lambda number: map_batches(self.keys_path(number)))

    def _placed(self, documents: Documents) -> Iterator[tuple[slice, pa.RecordBatch, Documents]]:
        """In which batches ascending documents lie: which of them, the batch, and their rows in it."""
        for number, some, rows in by_file(self.first_documents, documents):
            batches, starts = self._documents(number)
            for index, fewer, rows_of_batch in by_file(starts, rows):
                yield slice(some.start + fewer.start, some.start + fewer.stop), batches[index], rows_of_batch

    def locations(self, documents: Documents) -> list[Location]:
        """Where documents stand, whose numbers are ascending."""
        parts = self.corpus.parts
        indices = np.searchsorted(parts["first_document"], documents, side="right") - 1
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
        wanted, places = np.unique(np.concatenate([first, second]), return_inverse=True)
        signatures = self.signatures(wanted)
        num_equal: npt.NDArray[np.int64] = (signatures[places[: len(first)]] == signatures[places[len(first) :]]).sum(
            axis=1
        )
        return num_equal


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

    def stage(self) -> Stage:
        num_units = self.runs.sketch.num_keys * self.num_groups
        size = self.runs.corpus.num_documents * KEY_BYTES // self.num_groups
        return Stage("compare", [size] * num_units, self.path, self.match)

    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(self.runs.sketch.num_keys * self.num_groups)]

    def path(self, number: int) -> Path:
        key, group = divmod(number, self.num_groups)
        return self.folder / f"{key:03d}" / f"{group:06d}.pairs"

    def match(self, number: int, advance: Advance) -> None:
        """Commit the pairs of a key column's slices of one group."""
        key, group = divmod(number, self.num_groups)
        size = self.num_slices // self.num_groups
        bounds = [self._bounds(key, run, range(group * size, (group + 1) * size)) for run in range(len(self.runs))]
        with committed(self.path(number)) as unfinished, unfinished.open("wb") as file:
            for index in range(size):
                for pairs in self.matches(self._gathered(key, [each[index : index + 2] for each in bounds])):
                    file.write(pairs.tobytes())
                advance(self.runs.corpus.num_documents * KEY_BYTES // self.num_slices)

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
            pieces.append((keys, documents.astype(np.uint64) + self.runs.first_documents[run]))
            size += last - first
            if size >= 2 * self.slice_documents or run == len(bounds) - 1:
                yield pieces
                pieces, size = [], 0

    def are_duplicates(self, first: Documents, second: Documents) -> npt.NDArray[np.bool_]:
        blocks = [slice(start, start + COMPARED_AT_ONCE) for start in range(0, len(first), COMPARED_AT_ONCE)]
        num_equal = [self.runs.count_equal_bytes(first[block], second[block]) for block in blocks]
        is_same: npt.NDArray[np.bool_] = np.concatenate([np.zeros(0, np.int64), *num_equal]) >= (
            self.runs.sketch.min_equal_bytes
        )
        return is_same

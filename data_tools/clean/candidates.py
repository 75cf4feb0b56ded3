"""Pairs of documents that are duplicates, found by sorting their keys outside of memory.

Runs: some surveyed parts at a time, each of their key columns sorted. Slices: one column, and one range of its values,
merged from all runs; documents with the same key lie side by side there, and their signatures are compared. So a
process holds one run, or one slice, however many documents there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.clean.job import Job, Task
from data_tools.clean.sketch import Bytes, Keys, Sketch, equal_bytes
from data_tools.clean.survey import Corpus, SurveyedPart, read_columns
from data_tools.work import Advance, write_batches

RUN_DOCUMENTS = 1 << 18
SLICE_DOCUMENTS = 1 << 21
"""About how many documents one slice of a key column holds."""
KEY_BYTES = 12
"""Of a key and its document in a run."""
MAX_ROUNDS = 64
"""Documents of one key that no earlier one of these many was a duplicate of are left to their other keys."""
COMPARED_AT_ONCE = 1 << 14

Documents = npt.NDArray[np.uint64]
PAIR_SCHEMA = pa.schema([pa.field("kept", pa.uint64()), pa.field("document", pa.uint64())])


class Run(NamedTuple):
    """Documents [first, first + num_documents): signatures in order, each key column sorted."""

    path: Path
    parts: tuple[SurveyedPart, ...]

    @property
    def first_document(self) -> int:
        """Number of its first document."""
        return self.parts[0].first_document

    @property
    def num_documents(self) -> int:
        """How many it holds."""
        return sum(part.num_documents for part in self.parts)


class Slice(NamedTuple):
    """Values [number, number + 1) * 2^64 / num_slices of one key column."""

    key: int
    number: int
    num_slices: int

    def path(self, work: Path) -> Path:
        """Where its pairs are, or will be."""
        return work / f"pairs-{self.key:03d}-{self.number:06d}.arrow"

    def bounds(self, keys: Keys) -> tuple[int, int]:
        """Where the slice begins and ends in a sorted column."""
        width = (1 << 64) // self.num_slices
        first = int(np.searchsorted(keys, np.uint64(self.number * width)))
        if self.number == self.num_slices - 1:
            return first, len(keys)
        return first, int(np.searchsorted(keys, np.uint64((self.number + 1) * width)))


RunFiles = tuple[Run, ...]


def find_pairs(corpus: Corpus, sketch: Sketch, job: Job) -> tuple[RunFiles, list[Path]]:
    """The runs, and files of pairs, PAIR_SCHEMA, in which every duplicate is joined to an earlier document."""
    folder = job.work / "pairs"
    folder.mkdir(exist_ok=True)
    runs = tuple(_plan_runs(corpus, folder))
    job.run(
        "sort",
        RunSorter(sketch),
        [Task(run.path, run.num_documents * KEY_BYTES * sketch.num_keys, run) for run in runs],
    )
    # A power of two, so that the slices share the values of a key exactly.
    num_slices = 1 << max(0, (corpus.num_documents - 1) // SLICE_DOCUMENTS).bit_length()
    slice_bytes = corpus.num_documents * KEY_BYTES // num_slices
    slices = [Slice(key, number, num_slices) for key in range(sketch.num_keys) for number in range(num_slices)]
    job.run("compare", Matcher(folder, runs, sketch), [Task(each.path(folder), slice_bytes, each) for each in slices])
    return runs, [each.path(folder) for each in slices]


def _plan_runs(corpus: Corpus, folder: Path) -> Iterator[Run]:
    group: list[SurveyedPart] = []
    size = number = 0
    for part in corpus.parts:
        group.append(part)
        size += part.num_documents
        if size >= RUN_DOCUMENTS:
            yield Run(folder / f"run-{number:06d}.arrow", tuple(group))
            group, size, number = [], 0, number + 1
    if size:
        yield Run(folder / f"run-{number:06d}.arrow", tuple(group))


@dataclass(frozen=True)
class RunSorter:
    """Commits runs."""

    sketch: Sketch

    def __call__(self, run: Run, advance: Advance) -> None:
        """Columns: signature, and for key k `key_k`, sorted, with `document_k`, counted from the run's first."""
        tables = [read_columns(part.path, ["signature", "keys"]) for part in run.parts]
        table = pa.concat_tables(tables).combine_chunks()
        keys = _flat(table["keys"]).reshape(table.num_rows, self.sketch.num_keys)
        columns = {"signature": table["signature"]}
        for key in range(self.sketch.num_keys):
            order = np.argsort(keys[:, key], kind="stable")
            columns[f"key_{key}"] = pa.array(keys[order, key])
            columns[f"document_{key}"] = pa.array(order.astype(np.uint32))
        result = pa.table(columns)
        write_batches(run.path, result.schema, result.to_batches())
        advance(run.num_documents * KEY_BYTES * self.sketch.num_keys)


@dataclass(frozen=True)
class Matcher:
    """Commits the pairs of slices."""

    folder: Path
    runs: RunFiles
    sketch: Sketch

    def __call__(self, piece: Slice, advance: Advance) -> None:
        """Compare the documents of the slice that share a key."""
        keys, documents = self._shared(piece)
        pairs = (list(map(pa.array, pair)) for pair in self._rounds(keys, documents))
        batches = (pa.RecordBatch.from_arrays(columns, schema=PAIR_SCHEMA) for columns in pairs)
        write_batches(piece.path(self.folder), PAIR_SCHEMA, batches)
        advance(sum(run.num_documents for run in self.runs) * KEY_BYTES // piece.num_slices)

    def _shared(self, piece: Slice) -> tuple[Keys, Documents]:
        """The documents of the slice that share their key with another, by key, then by number."""
        # Empty ones first: there are no runs where the input has no documents.
        keys, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for run in self.runs:
            table = read_columns(run.path, [f"key_{piece.key}", f"document_{piece.key}"])
            column = _numpy(table.column(0))
            first, last = piece.bounds(column)
            keys.append(column[first:last].copy())
            documents.append(_numpy(table.column(1))[first:last] + np.uint64(run.first_document))
        all_keys, all_documents = np.concatenate(keys), np.concatenate(documents)
        # Runs come in document order, so a stable sort leaves documents of one key in order.
        order = np.argsort(all_keys, kind="stable")
        all_keys, all_documents = all_keys[order], all_documents[order]
        equals_next = all_keys[1:] == all_keys[:-1]
        is_shared = np.concatenate([[False], equals_next]) | np.concatenate([equals_next, [False]])
        if len(all_keys) < 2:
            is_shared = np.zeros(len(all_keys), bool)
        return all_keys[is_shared], all_documents[is_shared]

    def _rounds(self, keys: Keys, documents: Documents) -> Iterator[tuple[Documents, Documents]]:
        """Compare all of a key with its first; then those that were no duplicates of it with their first, and so on.

        Many copies of one text take one round, whatever their number: never every document with every other.
        """
        for _ in range(MAX_ROUNDS):
            if len(keys) == 0:
                return
            is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
            firsts = documents[is_first][np.cumsum(is_first) - 1]
            kept, others, other_keys = firsts[~is_first], documents[~is_first], keys[~is_first]
            is_same = np.concatenate(
                [
                    self._are_same(kept[start : start + COMPARED_AT_ONCE], others[start : start + COMPARED_AT_ONCE])
                    for start in range(0, len(others), COMPARED_AT_ONCE)
                ]
                or [np.zeros(0, bool)]
            )
            yield kept[is_same], others[is_same]
            keys, documents = other_keys[~is_same], others[~is_same]

    def _are_same(self, first: Documents, second: Documents) -> npt.NDArray[np.bool_]:
        return equal_places(self.runs, first, second) >= self.sketch.min_equal_bytes


def equal_places(runs: RunFiles, first: Documents, second: Documents) -> npt.NDArray[np.int64]:
    """In how many places the signatures of each pair of documents agree."""
    wanted, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    found = signatures(runs, wanted)
    return equal_bytes(found[places[: len(first)]], found[places[len(first) :]])


def signatures(runs: RunFiles, documents: Documents) -> Bytes:
    """The signatures of documents, whose numbers are ascending."""
    starts = np.array([run.first_document for run in runs], np.uint64)
    indices = np.searchsorted(starts, documents, side="right") - 1
    found = []
    for index in np.unique(indices).tolist():
        wanted = documents[indices == index] - np.uint64(runs[index].first_document)
        column = read_columns(runs[index].path, ["signature"]).column(0).take(pa.array(wanted)).combine_chunks()
        found.append(_fixed_bytes(column))
    return np.concatenate(found)


def _fixed_bytes(column: Any) -> Bytes:
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return data.reshape(len(column), width)


def _flat(column: pa.ChunkedArray) -> Keys:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.uint64)


def _numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A mapped column of one batch, without a copy."""
    values: npt.NDArray[Any] = column.chunk(0).to_numpy(zero_copy_only=True)
    return values

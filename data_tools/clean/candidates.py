"""Pairs of documents that are duplicates, found by sorting their keys outside of memory.

Runs: some tagged parts at a time, each of their key columns sorted. Slices: one column, and one range of its values,
merged from all runs; documents with the same key lie side by side there, and their signatures are compared. So a
process holds one run, or one slice, however many documents there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.clean.attributes import Corpus, Documents, TaggedPart, by_file, read_columns
from data_tools.clean.job import Job, Task
from data_tools.clean.sketch import Bytes, Keys, Sketch
from data_tools.executors import Advance
from data_tools.work import write_batches

RUN_DOCUMENTS = 1 << 18
SLICE_DOCUMENTS = 1 << 21
"""About how many documents one slice of a key column holds."""
KEY_BYTES = 12
"""Of a key and its document in a run."""
MAX_ROUNDS = 64
"""Documents of one key that no earlier one of these many was a duplicate of are left to their other keys."""
COMPARED_AT_ONCE = 1 << 14

PAIR_SCHEMA = pa.schema({"kept": pa.uint64(), "document": pa.uint64()})


class Run(NamedTuple):
    """Documents [first, first + num_documents): signatures in order, each key column sorted."""

    path: Path
    parts: tuple[TaggedPart, ...]

    @property
    def first_document(self) -> int:
        return self.parts[0].first_document

    @property
    def num_documents(self) -> int:
        return sum(part.num_documents for part in self.parts)


class KeyRange(NamedTuple):
    """Values [number, number + 1) * 2^64 / num_slices of one key column."""

    key: int
    number: int
    num_slices: int

    def path(self, work: Path) -> Path:
        return work / f"pairs-{self.key:03d}-{self.number:06d}.arrow"

    def bounds(self, keys: Keys) -> tuple[int, int]:
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
    run_tasks = [Task(run.path, run.num_documents * KEY_BYTES * sketch.num_keys, run) for run in runs]
    job.run("sort", partial(_sort_run, sketch), run_tasks)
    # A power of two, so that the slices share the values of a key exactly.
    num_slices = 1 << max(0, (corpus.num_documents - 1) // SLICE_DOCUMENTS).bit_length()
    slice_bytes = corpus.num_documents * KEY_BYTES // num_slices
    slices = [KeyRange(key, number, num_slices) for key in range(sketch.num_keys) for number in range(num_slices)]
    slice_tasks = [Task(each.path(folder), slice_bytes, each) for each in slices]
    job.run("compare", partial(_match_range, folder, runs, sketch), slice_tasks)
    return runs, [each.path(folder) for each in slices]


def _plan_runs(corpus: Corpus, folder: Path) -> Iterator[Run]:
    group: list[TaggedPart] = []
    size = number = 0
    for part in corpus.parts:
        group.append(part)
        size += part.num_documents
        if size >= RUN_DOCUMENTS:
            yield Run(folder / f"run-{number:06d}.arrow", tuple(group))
            group, size, number = [], 0, number + 1
    if size:
        yield Run(folder / f"run-{number:06d}.arrow", tuple(group))


def _sort_run(sketch: Sketch, run: Run, advance: Advance) -> None:
    """Commit a run. Columns: signature; for key k `key_k`, sorted, and `document_k`, counted from the run's first."""
    tables = [read_columns(part.path, ["signature", "keys"]) for part in run.parts]
    table = pa.concat_tables(tables).combine_chunks()
    keys = table["keys"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, sketch.num_keys)
    columns = {"signature": table["signature"]}
    for key in range(sketch.num_keys):
        order = np.argsort(keys[:, key], kind="stable")
        columns[f"key_{key}"] = pa.array(keys[order, key])
        columns[f"document_{key}"] = pa.array(order.astype(np.uint32))
    result = pa.table(columns)
    write_batches(run.path, result.schema, result.to_batches())
    advance(run.num_documents * KEY_BYTES * sketch.num_keys)


def _match_range(folder: Path, runs: RunFiles, sketch: Sketch, key_range: KeyRange, advance: Advance) -> None:
    """Compare the documents of a slice that share a key, and commit the pairs that are duplicates."""
    keys, documents = _sharing_keys(runs, key_range)
    pairs = (list(map(pa.array, pair)) for pair in _rounds(runs, sketch, keys, documents))
    batches = (pa.RecordBatch.from_arrays(columns, schema=PAIR_SCHEMA) for columns in pairs)
    write_batches(key_range.path(folder), PAIR_SCHEMA, batches)
    advance(sum(run.num_documents for run in runs) * KEY_BYTES // key_range.num_slices)


def _sharing_keys(runs: RunFiles, key_range: KeyRange) -> tuple[Keys, Documents]:
    """The documents of the slice that share their key with another, by key, then by number."""
    # Empty ones first: there are no runs where the input has no documents.
    keys, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for run in runs:
        table = read_columns(run.path, [f"key_{key_range.key}", f"document_{key_range.key}"])
        column = _numpy(table.column(0))
        first, last = key_range.bounds(column)
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


def _rounds(runs: RunFiles, sketch: Sketch, keys: Keys, documents: Documents) -> Iterator[tuple[Documents, Documents]]:
    """Compare all of a key with its first; then those that were no duplicates of it with their first, and so on.

    Many copies of one text take one round, whatever their number: never every document with every other.
    """
    for _ in range(MAX_ROUNDS):
        if len(keys) == 0:
            return
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
        firsts = documents[is_first][np.cumsum(is_first) - 1]
        kept, others, other_keys = firsts[~is_first], documents[~is_first], keys[~is_first]
        blocks = (slice(start, start + COMPARED_AT_ONCE) for start in range(0, len(others), COMPARED_AT_ONCE))
        num_equal = [count_equal_bytes(runs, kept[block], others[block]) for block in blocks]
        is_same = np.concatenate([np.zeros(0, np.int64), *num_equal]) >= sketch.min_equal_bytes
        yield kept[is_same], others[is_same]
        keys, documents = other_keys[~is_same], others[~is_same]


def count_equal_bytes(runs: RunFiles, first: Documents, second: Documents) -> npt.NDArray[np.int64]:
    """In how many places the signatures of each pair of documents agree."""
    wanted, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    found = _signatures(runs, wanted)[places]
    num_equal: npt.NDArray[np.int64] = (found[: len(first)] == found[len(first) :]).sum(axis=1)
    return num_equal


def _signatures(runs: RunFiles, documents: Documents) -> Bytes:
    """The signatures of documents, whose numbers are ascending."""
    found = []
    for index, rows in by_file([run.first_document for run in runs], documents):
        column = read_columns(runs[index].path, ["signature"]).column(0).take(rows).combine_chunks()
        width = column.type.byte_width
        data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
        found.append(data.reshape(len(column), width))
    return np.concatenate(found)


def _numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A mapped column of one batch, without a copy."""
    values: npt.NDArray[Any] = column.chunk(0).to_numpy(zero_copy_only=True)
    return values

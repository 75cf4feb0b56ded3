"""From pairs to clusters (union-find), and which documents of a cluster are kept: the first, or all that are unlike it.

A file of 8 bytes a document is mapped for this; what is written to it can be written back to disk, so it may be larger
than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.clean.attributes import Corpus, Documents, Reopening, map_batches
from data_tools.clean.candidates import PAIR_SCHEMA, Matching, pair_batch
from data_tools.clean.output import Decisions
from data_tools.clean.sketch import Keys
from data_tools.executors import Advance
from data_tools.job import Stage, one_unit
from data_tools.work import write_batches
from megatrain.atomic import committed

BLOCK_DOCUMENTS = 1 << 20
DOCUMENT_BYTES = 200
"""Of each document of a block."""
BUCKET_DOCUMENTS, MAX_BUCKETS = 1 << 21, 128
"""Documents whose clusters one unit represents, and how many such units: as many files are open at a time."""


@dataclass(frozen=True)
class Clustering:
    """From the pairs to, for each document, the number of the first of its cluster: a file of 8 bytes each."""

    matching: Matching
    path: Path
    member_files: Sequence[Path] = ()
    """Where what is not the first of its cluster is listed, by the number of that first."""

    def stage(self) -> Stage:
        return one_unit("cluster", self.path, self.make)

    def make(self) -> None:
        corpus = self.matching.runs.corpus
        with committed(self.path) as unfinished:
            parents = _identity(unfinished, corpus)
            for path in self.matching.pair_files:
                for first, second in read_pairs(path, corpus):
                    unite(parents, first, second)
            for block in _blocks(corpus):
                find_roots(parents, block)
            parents.flush()
            if self.member_files:
                self._list_members(parents, corpus)

    def _list_members(self, parents: Documents, corpus: Corpus) -> None:
        with ExitStack() as opened:
            paths = [opened.enter_context(committed(path)) for path in self.member_files]
            writers = [opened.enter_context(pa.ipc.new_file(str(path), PAIR_SCHEMA)) for path in paths]
            ends = [corpus.num_documents * (bucket + 1) // len(writers) for bucket in range(len(writers))]
            for block in _blocks(corpus):
                firsts = parents[block]
                order = np.argsort(firsts, kind="stable")
                order = order[firsts[order] != block[order]]
                begins = np.searchsorted(firsts[order], np.array([0, *ends], np.uint64))
                for writer, (begin, end) in zip(writers, pairwise(begins.tolist()), strict=True):
                    columns = (pa.array(each[order[begin:end]]) for each in (firsts, block))
                    writer.write_batch(pa.RecordBatch.from_arrays([*columns], schema=PAIR_SCHEMA))


def _identity(path: Path, corpus: Corpus) -> np.memmap[Any, np.dtype[np.uint64]]:
    """A mapped file in which each document stands for itself."""
    shape = (max(corpus.num_documents, 1),)
    numbers: np.memmap[Any, np.dtype[np.uint64]] = np.memmap(path, np.uint64, "w+", shape=shape)
    for block in _blocks(corpus):
        numbers[block[0] : block[-1] + 1] = block
    return numbers


def _block_size(corpus: Corpus) -> int:
    return corpus.memory.fitting(DOCUMENT_BYTES, BLOCK_DOCUMENTS)


def _blocks(corpus: Corpus) -> Iterator[Documents]:
    """All documents, some at a time; behind each block, pages of mapped files may go."""
    for start in range(0, corpus.num_documents, _block_size(corpus)):
        yield np.arange(start, min(start + _block_size(corpus), corpus.num_documents), dtype=np.uint64)
        corpus.memory.release_mapped()


def read_pairs(path: Path, corpus: Corpus) -> Iterator[tuple[Documents, Documents]]:
    """The first and the second documents of pairs, some at a time."""
    for batch in map_batches(path):
        for start in range(0, len(batch), _block_size(corpus)):
            first, second = (column.to_numpy() for column in batch.slice(start, _block_size(corpus)).columns)
            yield first, second
            corpus.memory.release_mapped()


def unite(parents: Documents, first: Documents, second: Documents) -> None:
    """Join the clusters of each pair; the smaller root stays, so a root is the first document of its cluster."""
    while len(first):
        roots, others = find_roots(parents, first), find_roots(parents, second)
        differ = roots != others
        first, second = roots[differ], others[differ]
        np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))


def find_roots(parents: Documents, documents: Documents) -> Documents:
    """The root of each document. Pointer jumping: a step halves the way of each that is not there yet."""
    climbing = documents
    while len(climbing):
        above = parents[climbing]
        beyond = parents[above]
        moves = above != beyond
        climbing = climbing[moves]
        parents[climbing] = beyond[moves]
    return parents[documents]


@dataclass(frozen=True)
class Representation:
    """Keeps of each cluster the first document, of those not like it the first, and so on: each the others' measure."""

    matching: Matching
    folder: Path
    firsts: Path

    @property
    def member_files(self) -> list[Path]:
        num_documents = self.matching.runs.corpus.num_documents
        number = min(MAX_BUCKETS, 1 + num_documents // BUCKET_DOCUMENTS)
        return [self.folder / f"{bucket:03d}-members.arrow" for bucket in range(number)]

    def stages(self) -> Iterator[Stage]:
        yield Stage("represent", [0] * len(self.member_files), self._pairs_path, self.represent)
        yield one_unit("assign", self.firsts, self.assign)

    def _pairs_path(self, number: int) -> Path:
        return self.folder / f"{number:03d}-pairs.arrow"

    def represent(self, number: int, advance: Advance) -> None:
        pairs = (pairs[pairs[:, 0] != pairs[:, 1]] for pairs in self.matching.matches(self._gathered(number)))
        write_batches(self._pairs_path(number), PAIR_SCHEMA, (pair_batch([each]) for each in pairs))

    def _gathered(self, number: int) -> Iterator[list[tuple[Keys, Documents]]]:
        for firsts, members in read_pairs(self.member_files[number], self.matching.runs.corpus):
            own = np.unique(firsts)
            yield [(own, own), (firsts, members)]

    def assign(self) -> None:
        corpus = self.matching.runs.corpus
        with committed(self.firsts) as unfinished:
            firsts = _identity(unfinished, corpus)
            for number in range(len(self.member_files)):
                for kept, dropped in read_pairs(self._pairs_path(number), corpus):
                    firsts[dropped] = kept
            firsts.flush()


def cluster_sizes(path: Path, corpus: Corpus) -> dict[int, int]:
    """How many clusters of each size above 1 there are, by a file of the first document of each one's cluster."""
    firsts = np.memmap(path, np.uint64, "r")
    sizes: Counter[int] = Counter()
    with committed(path.with_suffix(".counts")) as unfinished:
        counts = np.memmap(unfinished, np.uint32, "w+", shape=(max(corpus.num_documents, 1),))
        for block in _blocks(corpus):
            np.add.at(counts, firsts[block], 1)
        for block in _blocks(corpus):
            values, numbers = np.unique(counts[block], return_counts=True)
            sizes.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    return {size: count for size, count in sorted(sizes.items()) if size > 1}


@dataclass(frozen=True)
class KeepFirst(Reopening):
    """Drops each document but the first of its cluster."""

    path: Path
    reason: str

    @cached_property
    def firsts(self) -> Documents:
        return np.memmap(self.path, np.uint64, "r")

    def __call__(self, corpus: Corpus, part: Any) -> Decisions:
        first, number = int(part["first_document"]), int(part["num_documents"])
        kept = self.firsts[first : first + number]
        is_own = kept == np.arange(first, first + number, dtype=np.uint64)
        reason = pa.array(np.zeros(number, np.int32), mask=is_own)
        reasons = pa.DictionaryArray.from_arrays(reason, [self.reason])
        return Decisions(reasons, kept)

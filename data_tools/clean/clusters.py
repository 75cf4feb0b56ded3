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

from data_tools.clean.attributes import Corpus, Documents, Reopening
from data_tools.clean.candidates import Matching, Pairs
from data_tools.clean.output import Decisions
from data_tools.clean.sketch import Keys
from data_tools.executors import Advance
from data_tools.job import Stage, one_unit
from megatrain.atomic import committed

BLOCK_DOCUMENTS = 1 << 20
MAX_BUCKETS = 128
"""Files that are open at a time."""


@dataclass(frozen=True)
class Clustering:
    """From the pairs to, for each document, the number of the first of its cluster: a file of 8 bytes each."""

    pair_files: Sequence[Path]
    num_documents: int
    path: Path
    member_files: Sequence[Path] = ()
    """Where what is not the first of its cluster is listed, by the number of that first."""

    def stage(self) -> Stage:
        return one_unit("cluster", self.path, self.make)

    def make(self) -> None:
        with committed(self.path) as unfinished:
            parents = _identity(unfinished, self.num_documents)
            for path in self.pair_files:
                for pairs in read_pairs(path):
                    unite(parents, pairs[:, 0], pairs[:, 1])
            for block in _blocks(self.num_documents):
                find_roots(parents, block)
            parents.flush()
            if self.member_files:
                self._list_members(parents)

    def _list_members(self, parents: Documents) -> None:
        with ExitStack() as opened:
            paths = [opened.enter_context(committed(path)) for path in self.member_files]
            files = [opened.enter_context(path.open("wb")) for path in paths]
            for block in _blocks(self.num_documents):
                firsts = parents[block]
                members = np.stack([firsts, block], axis=1)[firsts != block]
                members = members[np.argsort(members[:, 0], kind="stable")]
                ends = [self.num_documents * (bucket + 1) // len(files) for bucket in range(len(files))]
                begins = np.searchsorted(members[:, 0], np.array([0, *ends], np.uint64))
                for file, (begin, end) in zip(files, pairwise(begins.tolist()), strict=True):
                    file.write(members[begin:end].tobytes())


def _identity(path: Path, num_documents: int) -> np.memmap[Any, np.dtype[np.uint64]]:
    """A mapped file in which each document stands for itself."""
    numbers: np.memmap[Any, np.dtype[np.uint64]] = np.memmap(path, np.uint64, "w+", shape=(max(num_documents, 1),))
    for block in _blocks(num_documents):
        numbers[block[0] : block[-1] + 1] = block
    return numbers


def _blocks(num_documents: int) -> Iterator[Documents]:
    starts = range(0, num_documents, BLOCK_DOCUMENTS)
    return (np.arange(start, min(start + BLOCK_DOCUMENTS, num_documents), dtype=np.uint64) for start in starts)


def read_pairs(path: Path) -> Iterator[Pairs]:
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, np.uint64, 2 * BLOCK_DOCUMENTS)):
            yield numbers.reshape(-1, 2)


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
        number = min(MAX_BUCKETS, 1 + num_documents // self.matching.slice_documents)
        return [self.folder / f"{bucket:03d}.members" for bucket in range(number)]

    def stages(self) -> Iterator[Stage]:
        yield Stage("represent", [0] * len(self.member_files), self._pairs_path, self.represent)
        yield one_unit("assign", self.firsts, self.assign)

    def _pairs_path(self, number: int) -> Path:
        return self.folder / f"{number:03d}.pairs"

    def represent(self, number: int, advance: Advance) -> None:
        with committed(self._pairs_path(number)) as unfinished, unfinished.open("wb") as file:
            for pairs in self.matching.matches(self._gathered(number)):
                file.write(pairs[pairs[:, 0] != pairs[:, 1]].tobytes())

    def _gathered(self, number: int) -> Iterator[list[tuple[Keys, Documents]]]:
        for members in read_pairs(self.member_files[number]):
            firsts = np.unique(members[:, 0])
            yield [(firsts, firsts), (members[:, 0], members[:, 1])]

    def assign(self) -> None:
        with committed(self.firsts) as unfinished:
            firsts = _identity(unfinished, self.matching.runs.corpus.num_documents)
            for number in range(len(self.member_files)):
                for pairs in read_pairs(self._pairs_path(number)):
                    firsts[pairs[:, 1]] = pairs[:, 0]
            firsts.flush()


def cluster_sizes(path: Path, num_documents: int) -> dict[int, int]:
    """How many clusters of each size above 1 there are, by a file of the first document of each one's cluster."""
    firsts = np.memmap(path, np.uint64, "r")
    sizes: Counter[int] = Counter()
    with committed(path.with_suffix(".counts")) as unfinished:
        counts = np.memmap(unfinished, np.uint32, "w+", shape=(max(num_documents, 1),))
        for block in _blocks(num_documents):
            np.add.at(counts, firsts[block], 1)
        for block in _blocks(num_documents):
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

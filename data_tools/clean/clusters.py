"""From pairs to clusters (union-find), of which the first document is kept.

Two files of 8 and 4 bytes a document are mapped for this; what is written to them can be written back to disk, so they
may be larger than memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.clean.output import Documents, PartDecisions
from data_tools.clean.survey import SurveyedPart

BLOCK_DOCUMENTS = 1 << 20


def cluster(pair_files: Sequence[Path], num_documents: int, path: Path) -> None:
    """Write to `path`, for each document, the number of the first document of its cluster: 8 bytes each."""
    unfinished = path.with_suffix(".tmp")
    firsts = np.memmap(unfinished, np.uint64, "w+", shape=(max(num_documents, 1),))
    for start in range(0, num_documents, BLOCK_DOCUMENTS):
        stop = min(start + BLOCK_DOCUMENTS, num_documents)
        firsts[start:stop] = np.arange(start, stop, dtype=np.uint64)
    for kept, dropped in _pairs(pair_files):
        _unite(firsts, kept, dropped)
    for start in range(0, num_documents, BLOCK_DOCUMENTS):
        _roots(firsts, np.arange(start, min(start + BLOCK_DOCUMENTS, num_documents), dtype=np.uint64))
    firsts.flush()
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.rename(path)


def cluster_sizes(path: Path, num_documents: int) -> dict[int, int]:
    """How many clusters of each size above 1 the file that `cluster` wrote has."""
    firsts = np.memmap(path, np.uint64, "r")
    counts_path = path.with_suffix(".counts")
    counts = np.memmap(counts_path, np.uint32, "w+", shape=(max(num_documents, 1),))
    for start in range(0, num_documents, BLOCK_DOCUMENTS):
        np.add.at(counts, firsts[start : min(start + BLOCK_DOCUMENTS, num_documents)], 1)
    sizes: Counter[int] = Counter()
    for start in range(0, num_documents, BLOCK_DOCUMENTS):
        values, numbers = np.unique(counts[start : start + BLOCK_DOCUMENTS], return_counts=True)
        sizes.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    counts_path.unlink()
    return {size: count for size, count in sorted(sizes.items()) if size > 1}


@dataclass(frozen=True)
class ClusterDecisions:
    """The first document of each cluster is kept, by the file that `cluster` wrote."""

    path: Path
    reason: str

    def of(self, part: SurveyedPart) -> PartDecisions:
        """What is to be done with the documents of a part."""
        if part.num_documents == 0:
            return PartDecisions([], np.zeros(0, np.uint64))
        offset = part.first_document * 8
        firsts = np.memmap(self.path, np.uint64, "r", offset, shape=(part.num_documents,))
        own = np.arange(part.first_document, part.first_document + part.num_documents, dtype=np.uint64)
        reasons = [self.reason if dropped else None for dropped in (firsts != own).tolist()]
        return PartDecisions(reasons, np.array(firsts))


def _pairs(files: Sequence[Path]) -> Iterator[tuple[Documents, Documents]]:
    for path in files:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for start in range(0, batch.num_rows, BLOCK_DOCUMENTS):
                    piece = batch.slice(start, BLOCK_DOCUMENTS)
                    yield piece["kept"].to_numpy(), piece["document"].to_numpy()


def _unite(parents: Documents, first: Documents, second: Documents) -> None:
    """Join the clusters of each pair; the smaller root stays, so a root is the first document of its cluster."""
    while len(first):
        roots, others = _roots(parents, first), _roots(parents, second)
        differ = roots != others
        first, second = roots[differ], others[differ]
        np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))


def _roots(parents: Documents, documents: Documents) -> Documents:
    """The root of each document; on the way, each is hung directly under it."""
    roots = parents[documents]
    while True:
        above = parents[roots]
        if np.array_equal(above, roots):
            break
        roots = above
    parents[documents] = roots
    return roots

"""From pairs to clusters (union-find), of which the first document is kept; and how far clusters reach.

Two files of 8 and 4 bytes a document are mapped for this; what is written to them can be written back to disk, so they
may be larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from data_tools.clean.attributes import Corpus, Documents, TaggedPart
from data_tools.clean.candidates import COMPARED_AT_ONCE, Run, RunFiles, count_equal_bytes
from data_tools.clean.job import Job, Task
from data_tools.clean.output import Decisions
from data_tools.clean.sketch import Sketch
from data_tools.executors import Advance
from megatrain.atomic import commit_bytes, committed

BLOCK_DOCUMENTS = 1 << 20


def cluster(pair_files: Sequence[Path], num_documents: int, path: Path) -> None:
    """Write to `path`, for each document, the number of the first document of its cluster: 8 bytes each."""
    with committed(path) as unfinished:
        firsts = np.memmap(unfinished, np.uint64, "w+", shape=(max(num_documents, 1),))
        blocks = range(0, num_documents, BLOCK_DOCUMENTS)
        numbers = [(start, min(start + BLOCK_DOCUMENTS, num_documents)) for start in blocks]
        for start, stop in numbers:
            firsts[start:stop] = np.arange(start, stop, dtype=np.uint64)
        for kept, dropped in _pairs(pair_files):
            _unite(firsts, kept, dropped)
        for start, stop in numbers:
            _roots(firsts, np.arange(start, stop, dtype=np.uint64))
        firsts.flush()


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


def decide(firsts: Path, reason: str, part: TaggedPart) -> Decisions:
    """Keep the first document of each cluster, by the file that `cluster` wrote."""
    own, kept = _own_and_first(firsts, part.first_document, part.num_documents)
    return Decisions([reason if dropped else None for dropped in (kept != own).tolist()], kept)


def _own_and_first(firsts: Path, first_document: int, num_documents: int) -> tuple[Documents, Documents]:
    """The numbers of some documents in a row, and of the first document of each one's cluster."""
    own = np.arange(first_document, first_document + num_documents, dtype=np.uint64)
    return own, np.fromfile(firsts, np.uint64, num_documents, offset=8 * first_document)


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
    """The root of each document, with path compression."""
    roots = parents[documents]
    while True:
        above = parents[roots]
        if np.array_equal(above, roots):
            break
        roots = above
    parents[documents] = roots
    return roots


def measure_chains(corpus: Corpus, runs: RunFiles, firsts: Path, sketch: Sketch, job: Job) -> dict[str, Any] | None:
    """The least similarity of a document that is dropped to the one kept, and how many are below the threshold.

    They are dropped by way of others: a is like b, b like c, and a and c may have nothing in common. None where nothing
    is dropped.
    """
    tasks = [Task(_chains_path(run), run.num_documents * sketch.signature_bytes, run) for run in runs]
    job.run("chains", partial(_measure_run, runs, firsts, sketch), tasks)
    found = [orjson.loads(_chains_path(run).read_bytes()) for run in runs]
    _, num_equal, dropped, kept = min(found, key=lambda each: each[1:], default=[0, 0, 0, 0])
    if dropped == kept:
        return None
    kept_location, location = corpus.locations(np.array([kept, dropped], np.uint64))
    return {
        "least_similarity": round(sketch.similarity(num_equal), 4),
        **location._asdict(),
        "kept_id": kept_location.id,
        "documents": sum(each[0] for each in found),
    }


def _measure_run(runs: RunFiles, firsts: Path, sketch: Sketch, run: Run, advance: Advance) -> None:
    """Commit in how few places two signatures agree, of which documents, and how many are below the threshold."""
    own, kept = _own_and_first(firsts, run.first_document, run.num_documents)
    dropped, kept = own[kept != own], kept[kept != own]
    least = [sketch.signature_bytes, 0, 0]
    num_below = 0
    for start in range(0, len(dropped), COMPARED_AT_ONCE):
        pairs = slice(start, start + COMPARED_AT_ONCE)
        num_equal = count_equal_bytes(runs, kept[pairs], dropped[pairs])
        num_below += int((num_equal < sketch.min_equal_bytes).sum())
        at = int(num_equal.argmin())
        least = min(least, [int(num_equal[at]), int(dropped[pairs][at]), int(kept[pairs][at])])
    commit_bytes(_chains_path(run), orjson.dumps([num_below, *least]))
    advance(run.num_documents * sketch.signature_bytes)


def _chains_path(run: Run) -> Path:
    return run.path.with_suffix(".chains")

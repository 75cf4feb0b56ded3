"""How far clusters of near duplicates reach: a is like b, b like c, and a and c may have nothing in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_tools.clean.candidates import COMPARED_AT_ONCE, Run, RunFiles, equal_places
from data_tools.clean.job import Job, Task
from data_tools.clean.sketch import Sketch
from data_tools.clean.survey import Corpus
from data_tools.work import Advance
from megatrain.data.format import commit_bytes


@dataclass(frozen=True)
class ChainMeter:
    """Compares what is dropped from a run with what is kept instead, by signature."""

    runs: RunFiles
    firsts: Path
    sketch: Sketch

    def __call__(self, run: Run, advance: Advance) -> None:
        """Commit in how few places two signatures agree, of which documents, and how many are below the threshold."""
        offset = run.first_document * 8
        kept = np.memmap(self.firsts, np.uint64, "r", offset, shape=(run.num_documents,))
        own = np.arange(run.first_document, run.first_document + run.num_documents, dtype=np.uint64)
        dropped, kept = own[kept != own], kept[kept != own]
        least = [self.sketch.signature_bytes, 0, 0]
        num_below = 0
        for start in range(0, len(dropped), COMPARED_AT_ONCE):
            pairs = slice(start, start + COMPARED_AT_ONCE)
            num_equal = equal_places(self.runs, kept[pairs], dropped[pairs])
            num_below += int((num_equal < self.sketch.min_equal_bytes).sum())
            at = int(num_equal.argmin())
            least = min(least, [int(num_equal[at]), int(dropped[pairs][at]), int(kept[pairs][at])])
        commit_bytes(_result(run), orjson.dumps([num_below, *least]))
        advance(run.num_documents * self.sketch.signature_bytes)


def _result(run: Run) -> Path:
    return run.path.with_suffix(".chains")


def measure_chains(corpus: Corpus, runs: RunFiles, firsts: Path, sketch: Sketch, job: Job) -> dict[str, Any] | None:
    """The least similarity of a document that is dropped to the one kept, and how many are below the threshold.

    None where nothing is dropped.
    """
    tasks = [Task(_result(run), run.num_documents * sketch.signature_bytes, run) for run in runs]
    job.run("chains", ChainMeter(runs, firsts, sketch), tasks)
    found = [orjson.loads(_result(run).read_bytes()) for run in runs]
    _, num_equal, dropped, kept = min(found, key=lambda each: each[1:], default=[0, 0, 0, 0])
    if dropped == kept:
        return None
    kept_place, place = corpus.places(np.array([kept, dropped], np.uint64))
    return {
        "least_similarity": round(sketch.similarity(num_equal), 4),
        **place._asdict(),
        "kept_id": kept_place.id,
        "documents": sum(each[0] for each in found),
    }

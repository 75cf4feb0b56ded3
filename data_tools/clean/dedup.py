"""`megatrain-data dedup`: of documents that are the same, or nearly, the first in input order stays.

Stages: `read` (a sketch of every document), `index`, `sort` (by keys), `compare`, `join`, `cluster`, `list` (of what is
dropped), `tally`, `write`, `publish`; `represent` and `assign` behind `cluster` where it is by representatives.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.clean.candidates import (
    MAX_RUN_DOCUMENTS,
    RUN_BYTES,
    SLICE_BYTES,
    SLICE_DOCUMENTS,
    SORT_BYTES,
    Matching,
    Runs,
)
from data_tools.clean.clusters import Clustering, KeepFirst, Representation, cluster_sizes
from data_tools.clean.job import REPORT_FILE, Cleaning
from data_tools.clean.report import Lister, Tally
from data_tools.clean.sketch import ExactSketch, MinHashSketch, Sketch
from data_tools.job import Effort, Stage, committed_names
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError

MAX_PERMUTATIONS = 2048


@dataclass(frozen=True)
class DedupOptions:
    """What decides the bytes of the result, beside the inputs."""

    read: ReadOptions
    method: str = "exact"
    """`exact` or `minhash`; the rest is for minhash."""
    threshold: float = 0.8
    num_permutations: int = 256
    ngram: int = 5
    cluster_by: str = "connected"
    """`connected`: the first of each cluster stays; `representative`: also what is not like it."""

    def sketch(self) -> Sketch:
        """What stands in for a text. Raises ConfigError where the options make no sense."""
        if self.method == "exact":
            return ExactSketch()
        if not 0.1 <= self.threshold <= 1:
            raise ConfigError(f"--threshold {self.threshold} should be from 0.1 to 1; 0.8 is usual.")
        if not 16 <= self.num_permutations <= MAX_PERMUTATIONS:
            raise ConfigError(f"--num-permutations {self.num_permutations} should be from 16 to {MAX_PERMUTATIONS}.")
        if self.ngram < 1:
            raise ConfigError(f"--ngram {self.ngram} should be at least 1; 5 is usual.")
        return MinHashSketch(self.threshold, self.num_permutations, self.ngram)

    def described(self) -> dict[str, Any]:
        """As it stands in a report; an option that has come later only where it is given."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("cluster_by", "connected")}


def find_pairs(cleaning: Cleaning, sketch: Sketch, folder: Path) -> Generator[Stage, None, Matching]:
    """The stages in which all documents are read, and those that are alike are paired; gives the pairs."""
    corpus = yield from cleaning.tag(sketch, folder)
    key_bytes = 8 * sketch.num_keys
    run_documents = corpus.memory.fitting(key_bytes + SORT_BYTES, min(MAX_RUN_DOCUMENTS, RUN_BYTES // key_bytes))
    runs = Runs(corpus, sketch, folder / "runs" / str(run_documents), run_documents)
    yield runs.stage()
    matching = Matching(runs, folder / "pairs", corpus.memory.fitting(SLICE_BYTES, SLICE_DOCUMENTS))
    yield from matching.stages()
    return matching


def dedup(
    inputs: Sequence[str], out: Path, options: DedupOptions, effort: Effort, restart: bool
) -> dict[str, Any] | None:
    """Write the input without its duplicates to `out`, or go on where an earlier run of the same command was stopped.

    Returns the report; None where other processes are to do the rest. Raises ConfigError where `out` holds anything
    else.
    """
    sketch = options.sketch()
    files = find_inputs_apart(out, inputs, options.read, effort.say)
    command = {"command": "dedup", "inputs": list(inputs), "part_bytes": effort.part_bytes, **options.described()}
    cleaning = Cleaning(Origin(command, files), options.read, out, effort)

    def stages(folder: Path) -> Iterator[Stage]:
        if REPORT_FILE in committed_names(folder):
            yield cleaning.publish(folder)
        else:
            matching = yield from find_pairs(cleaning, sketch, folder)
            runs, corpus = matching.runs, matching.runs.corpus
            firsts = folder / "firsts"
            representation = Representation(matching, folder / "clusters", firsts)
            if options.cluster_by == "representative":
                representation.folder.mkdir(exist_ok=True)
                components, members = folder / "components", representation.member_files
                yield Clustering(matching, components, members).stage()
                yield from representation.stages()
            else:
                yield Clustering(matching, firsts).stage()
            decide = KeepFirst(firsts, f"{options.method} duplicate")
            lister = Lister(corpus, folder, decide, runs, options.method == "minhash")
            yield from cleaning.write(lister, partial(_describe, lister, runs, firsts))

    return cleaning.run(restart, stages)


def _describe(lister: Lister, runs: Runs, firsts: Path, tally: Tally) -> dict[str, Any]:
    """What the report says of clusters; the similarities of its examples are added to the tally."""
    for reason in tally["reasons"].values():
        for example in reason["examples"]:
            kept, dropped = (np.array([each["document"]], np.uint64) for each in (example["kept"], example))
            example["similarity"] = round(runs.sketch.similarity(int(runs.count_equal_bytes(kept, dropped)[0])), 4)
    sizes = cluster_sizes(firsts, runs.corpus)
    described: dict[str, Any] = {"clusters": {str(size): number for size, number in sizes.items()}}
    return described | ({"chains": _chains(runs, tally)} if lister.measures else {})


def _chains(runs: Runs, tally: Tally) -> dict[str, Any] | None:
    """The least similarity of a document that is dropped to the one kept, and how many are below the threshold.

    They are dropped by way of others: a is like b, b like c, and a and c may have nothing in common. None where nothing
    is dropped.
    """
    if tally["least"] is None:
        return None
    num_equal, dropped, kept = tally["least"]
    kept_location, location = runs.locations(np.array([kept, dropped], np.uint64))
    return {
        "least_similarity": round(runs.sketch.similarity(num_equal), 4),
        **location._asdict(),
        "kept_id": kept_location.id,
        "documents": tally["below"],
    }

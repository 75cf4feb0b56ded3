"""`megatrain-data dedup`: of documents that are the same, or nearly, the first in input order stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.clean.attributes import tag
from data_tools.clean.candidates import RunFiles, count_equal_bytes, find_pairs
from data_tools.clean.clusters import cluster, cluster_sizes, decide, measure_chains
from data_tools.clean.job import REPORT_FOLDER, Effort, Job, run_once
from data_tools.clean.report import render, write_and_report
from data_tools.clean.sketch import ExactSketch, MinHashSketch, Sketch
from data_tools.outputs import find_inputs_apart
from data_tools.units import ReadOptions
from megatrain.atomic import commit_bytes
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


def dedup(inputs: Sequence[str], out: Path, options: DedupOptions, effort: Effort, restart: bool) -> dict[str, Any]:
    """Write the input without its duplicates to `out`, or go on where an earlier run of the same command was stopped.

    Returns the report. Raises ConfigError where `out` holds anything else.
    """
    sketch = options.sketch()
    files = find_inputs_apart(out, inputs, options.read, effort.say)
    command = {"command": "dedup", "inputs": list(inputs), "part_bytes": effort.part_bytes, **asdict(options)}

    def make(job: Job) -> dict[str, Any]:
        corpus = tag(files, options.read, sketch, job)
        runs, pair_files = find_pairs(corpus, sketch, job)
        firsts = job.work / "firsts"
        job.run_in_one("cluster", partial(cluster, pair_files, corpus.num_documents, firsts), firsts)
        decisions = partial(decide, firsts, f"{options.method} duplicate")
        report = write_and_report(command, corpus, out, options.read, decisions, job)
        sizes = partial(cluster_sizes, firsts, corpus.num_documents)  # by one: it counts in a file
        report["clusters"] = job.share("clusters", lambda: {str(size): n for size, n in sizes().items()})
        if options.method == "minhash":
            report["chains"] = measure_chains(corpus, runs, firsts, sketch, job)
        _add_similarities(report, runs, sketch)
        commit_bytes(out / REPORT_FOLDER / "report.txt", render(report).encode(), job.work)
        return report

    return run_once(out, command, files, restart, effort, make)


def _add_similarities(report: dict[str, Any], runs: RunFiles, sketch: Sketch) -> None:
    for reason in report["reasons"].values():
        for example in reason["examples"]:
            kept, dropped = (np.array([each["document"]], np.uint64) for each in (example["kept"], example))
            example["similarity"] = round(sketch.similarity(int(count_equal_bytes(runs, kept, dropped)[0])), 4)

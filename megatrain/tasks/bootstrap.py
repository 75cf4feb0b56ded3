"""How far a figure may be from what more examples would give: the bootstrap (Efron 1979), with a fixed seed.

A figure is a function of sums over examples: a mean of their values and their number, BLEU of counts of n-grams. So of
each sample only sums are made. Figures of several models on the same examples are sampled together, and so paired
(Koehn 2004), by putting their columns side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95

Floats: TypeAlias = NDArray[np.float64]


class Figure(NamedTuple):
    """What is summed over examples, [examples, columns], and what follows from the sums, [columns]. ``signature``: how
    it was computed, where there are several ways."""

    columns: Floats
    of_sums: Callable[[Floats], float]
    signature: str | None = None

    @property
    def value(self) -> float:
        return self.of_sums(self.columns.sum(0))


class Sampled(NamedTuple):
    """Of a figure over all samples: the standard deviation, and the ends of the confidence interval (percentiles)."""

    stderr: float
    low: float
    high: float


def mean(values: Floats) -> Figure:
    """The mean of one value an example."""
    return ratio(values, np.ones(len(values)))


def ratio(values: Floats, per: Floats) -> Figure:
    """The sum of ``values`` over that of ``per``."""
    return Figure(np.stack([values, per], 1), lambda sums: float(sums[0] / sums[1]))


def difference(one: Figure, other: Figure) -> Figure:
    """Of one figure for two models on the same examples, in the same order: the first's less the second's."""
    width = one.columns.shape[1]
    columns = np.concatenate([one.columns, other.columns], 1)
    return Figure(columns, lambda sums: one.of_sums(sums[:width]) - other.of_sums(sums[width:]), one.signature)


def bootstrap(figures: Sequence[Figure], clusters: Sequence[Hashable] | None = None) -> list[Sampled | None]:
    """Each figure over samples of the examples, drawn with replacement; None where there is one example or cluster.

    ``clusters``: of each example; those of one are drawn together, as near copies must be, which say the same again.
    """
    columns = np.concatenate([figure.columns for figure in figures], 1)
    if clusters is not None:
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
        summed = np.zeros((len(numbers), columns.shape[1]))
        np.add.at(summed, [numbers[cluster] for cluster in clusters], columns)
        columns = summed
    if len(columns) < 2:
        return [None for _ in figures]
    cuts = np.cumsum([figure.columns.shape[1] for figure in figures])[:-1]
    parts = (np.split(sums, cuts) for sums in _sums(columns))
    sampled = [[figure.of_sums(own) for figure, own in zip(figures, each, strict=True)] for each in parts]
    return [_sampled(np.array(values)) for values in zip(*sampled, strict=True)]


def _sums(columns: Floats) -> Any:
    """The sums of each sample, which is drawn as how often it has each row: memory for one sample at a time."""
    random, count = np.random.default_rng(SEED), len(columns)
    for _ in range(NUM_SAMPLES):
        yield np.bincount(random.integers(count, size=count), minlength=count) @ columns


def _sampled(values: Floats) -> Sampled:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return Sampled(float(values.std(ddof=1)), float(low), float(high))

"""Which dataset the j-th sample of a mixture comes from, for any j, and how many of that dataset come before it.

A block of ``BLOCK`` samples holds a whole number of each dataset, in proportion to its weight, spread as evenly as can
be: any stretch of the run, one batch included, sees the weights that were asked for. Every block is alike, so the j-th
sample is a table look-up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16


class Mixture:
    """The interleaving of datasets in proportion to ``weights`` (any positive numbers), exact to 1/65,536.

    A positive weight is at least 1/65,536. Raises ValueError for what makes no mixture, and for more than 65,536.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        given = np.asarray(weights, dtype=np.float64)
        if given.ndim != 1 or not given.size or not np.isfinite(given).all() or (given < 0).any() or not given.any():
            raise ValueError(f"weights must be finite, not negative, and not all zero: {list(weights)}")
        if np.count_nonzero(given) > BLOCK:
            raise ValueError(f"a mixture holds at most {BLOCK:,} datasets: {np.count_nonzero(given):,} given")
        self.quotas = _apportion(given)
        self._dataset = _interleave(self.quotas)
        order = np.argsort(self._dataset, kind="stable")
        first = np.cumsum(self.quotas) - self.quotas
        self._before = np.empty(BLOCK, dtype=np.int64)  # how many of the same dataset lie earlier in the block
        self._before[order] = np.arange(BLOCK) - np.repeat(first, self.quotas)

    def lookup(self, sample: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each sample number: its dataset, and the count of that dataset's samples before it."""
        block, offset = np.divmod(sample, BLOCK)
        dataset = self._dataset[offset]
        return dataset, block * self.quotas[dataset] + self._before[offset]

    def counts_before(self, sample: int) -> NDArray[np.int64]:
        """How many samples of each dataset lie before number ``sample``."""
        block, offset = divmod(sample, BLOCK)
        within = np.bincount(self._dataset[:offset], minlength=len(self.quotas))
        return block * self.quotas + within


def _apportion(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers that sum to BLOCK, by largest remainder. A positive weight gets at least one, and what that is more
    than its share comes off the others in proportion."""
    is_positive = weights > 0
    with np.errstate(over="ignore"):
        total = weights.sum()
    share = weights / total if np.isfinite(total) else weights / weights.max() / (weights / weights.max()).sum()
    least = np.zeros(len(share), dtype=np.bool_)
    exact = share * BLOCK
    while (small := is_positive & ~least & (exact < 1)).any():
        least |= small
        rest = share[~least].sum()
        exact = np.where(least, 1.0, share * ((BLOCK - np.count_nonzero(least)) / rest if rest else 0.0))
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - int(quotas.sum())]] += 1
    return quotas


def _interleave(quotas: NDArray[np.int64]) -> NDArray[np.int64]:
    """The block's order: the i-th of a dataset's n samples belongs at (i + 1/2) / n of the block."""
    offset = np.concatenate([(np.arange(quota) + 0.5) / quota if quota else np.empty(0) for quota in quotas])
    dataset = np.repeat(np.arange(len(quotas)), quotas)
    return dataset[np.lexsort((dataset, offset))]

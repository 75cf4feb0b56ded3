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
    """The interleaving of datasets in proportion to ``weights`` (any positive numbers), exact to 1/65,536."""

    def __init__(self, weights: Sequence[float]) -> None:
        share = np.asarray(weights, dtype=np.float64)
        if share.ndim != 1 or not share.size or not np.isfinite(share).all() or (share < 0).any() or share.sum() <= 0:
            raise ValueError(f"weights must be finite, not negative, and not all zero: {list(weights)}")
        self.quotas = _apportion(share / share.sum())
        self._dataset = _spread(self.quotas)
        self._before = np.empty(BLOCK, dtype=np.int64)  # how many of the same dataset lie earlier in the block
        for number, quota in enumerate(self.quotas):
            self._before[self._dataset == number] = np.arange(quota)

    def lookup(self, sample: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each sample number: its dataset, and the count of that dataset's samples before it."""
        block, place = np.divmod(sample, BLOCK)
        dataset = self._dataset[place]
        return dataset, block * self.quotas[dataset] + self._before[place]

    def counts_before(self, sample: int) -> NDArray[np.int64]:
        """How many samples of each dataset lie before number ``sample``."""
        block, place = divmod(sample, BLOCK)
        within = np.bincount(self._dataset[:place], minlength=len(self.quotas))
        return block * self.quotas + within


def _apportion(share: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers that sum to BLOCK, by largest remainder; a positive share gets at least one."""
    quotas = np.floor(share * BLOCK).astype(np.int64)
    quotas[(quotas == 0) & (share > 0)] = 1
    remainder = share * BLOCK - quotas
    while (gap := BLOCK - int(quotas.sum())) != 0:
        chosen = np.argsort(-remainder if gap > 0 else np.where(quotas > 1, remainder, np.inf), kind="stable")[
            : abs(gap)
        ]
        quotas[chosen] += np.sign(gap)
        remainder[chosen] -= np.sign(gap)
    return quotas


def _spread(quotas: NDArray[np.int64]) -> NDArray[np.int64]:
    """The block's order: the i-th of a dataset's n samples belongs at (i + 1/2) / n of the block."""
    place = np.concatenate([(np.arange(quota) + 0.5) / quota if quota else np.empty(0) for quota in quotas])
    dataset = np.repeat(np.arange(len(quotas)), quotas)
    return dataset[np.lexsort((dataset, place))]

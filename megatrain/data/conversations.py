"""Which part of each document fits into a sample, in datasets that say which tokens are scored; no torch.

A conversation is never continued in another sample, where its answers would lack what they answer: one that is too long
ends with the last whole answer that fits. No end is invented for an answer that does not fit; it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.config import DataConfig
from megatrain.data.dataset import Dataset
from megatrain.data.shard import ScoredRuns

Ints = NDArray[np.int64]


class Dropped(NamedTuple):
    """What is left out of samples. ``conversations``: of which no whole answer fits, or nothing is scored; of those
    that are shortened, ``answers``: how many were cut within an answer, ``prompts``: elsewhere. ``tokens``: of all."""

    conversations: int = 0
    answers: int = 0
    prompts: int = 0
    tokens: int = 0

    @staticmethod
    def total(parts: Iterable[Dropped]) -> Dropped:
        return Dropped(*(sum(counts) for counts in zip(Dropped(), *parts, strict=True)))

    def text(self, seq_len: int) -> str:
        """For the user."""
        shortened = self.answers + self.prompts
        return (
            f"{shortened + self.conversations:,} conversations do not fit into data.seq_len={seq_len}: {shortened:,} "
            f"end with their last whole answer ({self.answers:,} were cut within an answer, {self.prompts:,} "
            f"elsewhere), {self.conversations:,} have no whole answer and are left out; {self.tokens:,} tokens in all"
        )


def advice(dataset: Dataset, config: DataConfig) -> str | None:
    """How to train on a dataset that says which tokens are scored; None where nothing is to be said."""
    if not dataset.has_scored or dataset.holds_pairs or (config.packing == "best_fit" and config.document_mask):
        return None
    return (
        f"{dataset.path} is of prompts and answers: set data.packing=best_fit and data.document_mask=true, or answers "
        "lie in other samples than their prompts, and see other conversations."
    )


class Documents(NamedTuple):
    """Where documents begin, how long they are, and how many of the tokens after their first are not scored."""

    starts: Ints
    lengths: Ints
    num_unscored: Ints
    dropped: Dropped = Dropped()


def whole_pairs(starts: Ints, lengths: Ints, runs: ScoredRuns, seq_len: int, target_len: int) -> Documents:
    """The documents, which lie end to end, of which what is not scored has at most ``seq_len`` tokens, and what is
    scored, behind it, 1 to ``target_len``."""
    targets = runs.count_before(starts + lengths) - runs.count_before(starts)
    sources = lengths - targets
    is_kept = (targets > 0) & (targets <= target_len) & (sources > 0) & (sources <= seq_len)
    left_out = Dropped(conversations=int(np.count_nonzero(~is_kept)), tokens=int(lengths[~is_kept].sum()))
    return Documents(starts[is_kept], lengths[is_kept], sources[is_kept] - 1, left_out)


def shortened(starts: Ints, lengths: Ints, runs: ScoredRuns, seq_len: int) -> Documents:
    """Documents, which lie end to end, as far as they go into samples of ``seq_len``.

    Text that is scored as a whole is no conversation, and stays as long as it is.
    """
    first_targets, stops = starts + 1, starts + lengths
    num_scored = runs.count_before(stops) - runs.count_before(first_targets)
    cut = starts + seq_len + 1
    is_cut = (cut < stops) & (num_scored < lengths - 1)
    answer_ends = np.append(0, runs.bounds[1::2])
    last_whole = answer_ends[answer_ends.searchsorted(cut, side="right") - 1]
    stops = np.where(is_cut, np.maximum(last_whole, first_targets), stops)
    num_scored = runs.count_before(stops) - runs.count_before(first_targets)
    is_kept = num_scored > 0
    dropped = Dropped(
        conversations=int(np.count_nonzero(~is_kept)),
        answers=int(np.count_nonzero(is_kept & is_cut & runs.is_inside(cut))),
        prompts=int(np.count_nonzero(is_kept & is_cut & ~runs.is_inside(cut))),
        tokens=int(lengths.sum() - (stops - starts)[is_kept].sum()),
    )
    kept = (stops - starts)[is_kept]
    return Documents(starts[is_kept], kept, kept - 1 - num_scored[is_kept], dropped)

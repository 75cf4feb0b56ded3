"""What an objective is: how the samples of a dataset become what a model reads, and what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatrain.data.augmentation import Augmentation
from megatrain.data.dataset import Dataset
from megatrain.data.sample import Source

MOST_PACKED_DOCUMENTS = 1 << 20
"""So many are packed in a second, only to be counted."""


class DataSettings(Protocol):
    """What of ``data:`` decides how datasets are cut into samples, in a config or in a checkpoint."""

    @property
    def seq_len(self) -> int: ...

    @property
    def document_mask(self) -> bool: ...

    @property
    def packing(self) -> str: ...

    @property
    def scores_after_eod(self) -> bool: ...


class Objective(Protocol):
    """Makes samples: inputs, targets and mask, each a function of the seed and the sample's place in the run.

    It has no state: every layout, and a run that was resumed, gets the same samples.
    """

    def num_samples(self, dataset: Dataset) -> int:
        """About so many samples a training dataset has, without a plan being made of a large one."""
        ...

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        """Leave in ``folder`` what the sources of training datasets map there. For one process alone."""
        ...

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        """The samples to train on. ``folder``: where ``store_plans`` was called. ``augmentation``: what is done to the
        dataset's documents."""
        ...

    def evaluation_source(self, dataset: Dataset) -> Source:
        """The samples to evaluate on, which do not depend on the run's seed."""
        ...

"""What an objective is: how the samples of a dataset become what a model reads, and what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from megatrain.data.augmentation import Augmentation
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


DatasetT = TypeVar("DatasetT", contravariant=True)
"""What it makes samples of: a dataset of text, or of images."""


class Objective(Protocol[DatasetT]):
    """Makes samples: inputs, targets and mask, each a function of the seed and the sample's place in the run.

    It has no state: every layout, and a run that was resumed, gets the same samples.
    """

    def refuse_unsuited(self, dataset: DatasetT) -> None:
        """Raise ConfigError or DataError where a dataset has not what the samples are made of."""
        ...

    def num_samples(self, dataset: DatasetT) -> int:
        """About so many samples a training dataset has, without a plan being made of a large one."""
        ...

    def store_plans(self, datasets: Sequence[DatasetT], folder: Path) -> None:
        """Leave in ``folder`` what the sources of training datasets map there. For one process alone."""
        ...

    def training_source(self, dataset: DatasetT, folder: Path, augmentation: Augmentation | None) -> Source:
        """The samples to train on. ``folder``: where ``store_plans`` was called. ``augmentation``: what is done to the
        dataset's documents."""
        ...

    def evaluation_source(self, dataset: DatasetT) -> Source:
        """The samples to evaluate on, which do not depend on the run's seed."""
        ...

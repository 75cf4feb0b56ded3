"""How often a run sees each of its training datasets; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatrain.config import RunConfig
from megatrain.data.dataset import Dataset, open_dataset
from megatrain.data.order import DataOrder, SamplingSettings
from megatrain.errors import DataError

MOST_EPOCHS = 4.0
"""Up to about so many, repeated text teaches nearly as much as new text: Muennighoff et al., "Scaling Data-Constrained
Language Models" (2023)."""


class Epochs(NamedTuple):
    """How often a whole run sees the dataset at ``path``."""

    path: str
    epochs: float

    def text(self) -> str:
        return f"{self.path} {self.epochs:.2f}"

    @property
    def warning(self) -> str | None:
        """What to do about too many; None: they are not."""
        if self.epochs <= MOST_EPOCHS:
            return None
        return (
            f"{self.path} is seen {self.epochs:.1f} times in train.steps: text that is repeated more than about "
            f"{MOST_EPOCHS:.0f} times teaches less and less. Add text, give it a smaller weight, or train fewer steps."
        )


def planned_epochs(config: RunConfig) -> list[Epochs]:
    """Those of a run from its start, by the size of its datasets; none where one of them is not on this machine.

    Packed samples are counted as if no space was left free in them.
    """
    paths = [entry.path for entry in config.data.train]
    if not all(Path(path).is_dir() for path in paths):
        return []
    try:
        datasets = [open_dataset(path) for path in paths]
    except DataError:  # which a start says; a config can be right without its data
        return []
    num_samples = tuple(max((dataset.num_tokens - 1) // config.data.seq_len, 1) for dataset in datasets)
    weights = tuple(entry.weight for entry in config.data.train)
    settings = SamplingSettings(config.train.global_batch_size, weights, config.data.seq_len, num_samples)
    return epochs_of(DataOrder.begin(config.run.seed, settings), config.train.steps, datasets)


def epochs_of(order: DataOrder, num_steps: int, datasets: Sequence[Dataset]) -> list[Epochs]:
    """Those of the first ``num_steps`` in this order."""
    paths = [str(dataset.path) for dataset in datasets]
    return [Epochs(path, count) for path, count in zip(paths, order.num_epochs(num_steps), strict=True)]

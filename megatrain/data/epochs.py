"""How often a run sees each of its training datasets, and how many steps are so many epochs; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatrain.config import RunConfig, checks
from megatrain.config.problem import Problem, config_error
from megatrain.data.dataset import Dataset
from megatrain.data.images import AnyDataset, open_for
from megatrain.data.order import DataOrder, SamplingSettings
from megatrain.errors import DataError

MOST_EPOCHS = 4.0
"""Up to about so many, repeated text teaches nearly as much as new text: Muennighoff et al., "Scaling Data-Constrained
Language Models" (2023)."""


class Epochs(NamedTuple):
    """How often a whole run sees the dataset at ``path``."""

    path: str
    epochs: float
    is_text: bool = True
    """Images are seen many times, augmented anew each time."""

    def text(self) -> str:
        return f"{self.path} {self.epochs:.2f}"

    @property
    def warning(self) -> str | None:
        """What to do about too many; None: they are not."""
        if self.epochs <= MOST_EPOCHS or not self.is_text:
            return None
        return (
            f"{self.path} is seen {self.epochs:.1f} times: text that is repeated more than about "
            f"{MOST_EPOCHS:.0f} times teaches less and less. Add text, give it a smaller weight, or train fewer steps."
        )


class Length(NamedTuple):
    """How long a run is: its steps, and how often it sees each dataset."""

    num_steps: int
    epochs: list[Epochs]


def planned_length(config: RunConfig, num_samples_of: Callable[[AnyDataset], int]) -> Length | None:
    """That of a run from its start, by the size of its datasets; None where one of them is not on this machine.

    ``num_samples_of``: what the run's objective makes of one. Raises ConfigError as ``num_steps`` does.
    """
    paths = [entry.path for entry in config.data.train]
    if not all(Path(path).is_dir() for path in paths):
        return None
    try:
        datasets = [open_for(path, images=config.model.description.reads_images) for path in paths]
    except DataError:  # which a start says; a config can be right without its data
        return None
    num_samples = tuple(max(num_samples_of(dataset), 1) for dataset in datasets)
    weights = tuple(entry.weight for entry in config.data.train)
    settings = SamplingSettings(config.train.global_batch_size, weights, config.data.seq_len, num_samples)
    order = DataOrder.begin(config.run.seed, settings)
    steps = num_steps(config, order)
    return Length(steps, epochs_of(order, steps, datasets))


def num_steps(config: RunConfig, order: DataOrder) -> int:
    """Steps of the whole run in this order: train.steps, or as many as train.epochs takes.

    Raises ConfigError where one step is more than an epoch, or where the config asks for more steps than there are.
    """
    wanted = config.train.epochs
    if wanted is None:
        assert config.train.steps is not None
        return config.train.steps
    steps = order.first_step_after_epochs(wanted)
    if (found := order.num_epochs(steps)[0]) >= wanted + 1:
        size = order.settings(steps).num_samples[0]
        reason = f"the last step goes through data.train.0 again, whose epoch is {size} samples: {found:.2f} epochs"
        nearest = "a smaller train.global_batch_size, or train.steps in its place"
        raise config_error("The config", [Problem("train.epochs", wanted, reason, nearest, is_value=False)])
    if problems := checks.length(config, steps, f"the steps of train.epochs={wanted:g}"):
        raise config_error("The config", problems)
    return steps


def with_default_warmup(config: RunConfig, steps: int) -> RunConfig:
    """The config with a warm-up of no more than ``steps`` where it was left out."""
    schedule = config.schedule
    if "warmup_steps" in schedule.model_fields_set or schedule.warmup_steps <= steps:
        return config
    return config.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": steps})})


def epochs_of(order: DataOrder, num_steps: int, datasets: Sequence[AnyDataset]) -> list[Epochs]:
    """Those of the first ``num_steps`` in this order."""
    pairs = zip(datasets, order.num_epochs(num_steps), strict=True)
    return [Epochs(str(dataset.path), count, isinstance(dataset, Dataset)) for dataset, count in pairs]

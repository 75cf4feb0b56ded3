"""The vocabulary of a model beside that of its data's tokenizer. Needs no torch."""

from __future__ import annotations

from megatrain.config import RunConfig
from megatrain.data.dataset import Dataset
from megatrain.errors import ConfigError


def resolve_vocabulary(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with the vocabulary that the dataset's tokenizer decides, where the user left it open.

    Raises ConfigError where the model knows too few ids.
    """
    given = config.model.vocab_size
    if given is None:
        model = config.model.model_copy(update={"vocab_size": dataset.vocab_size})
        return config.model_copy(update={"model": model})
    if given < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but {dataset.path} has token ids up to {dataset.vocab_size - 1}: set it to "
            f"{dataset.vocab_size} or more, or leave it null."
        )
    return config


def unused_vocabulary(config: RunConfig, dataset: Dataset) -> str | None:
    """A question, where most of the model's ids are never in the data: it may be another tokenizer's."""
    given = config.model.vocab_size
    if given is None or given <= 2 * dataset.vocab_size:
        return None
    return (
        f"model.vocab_size is {given}, more than twice the {dataset.vocab_size} of the tokenizer of {dataset.path}: is "
        "that the tokenizer you mean? The other ids are never trained; null takes as many as the tokenizer has."
    )

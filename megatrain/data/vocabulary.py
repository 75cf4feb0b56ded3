"""The vocabulary of a model beside that of its data's tokenizer, or its labels. Needs no torch."""

from __future__ import annotations

from megatrain.config import RunConfig
from megatrain.data.dataset import Dataset
from megatrain.data.format import TOKENIZER_FILE
from megatrain.data.images import AnyDataset, ImageDataset
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import CheckpointError, ConfigError
from megatrain.families import FAMILIES


def resolve_vocabulary(config: RunConfig, dataset: AnyDataset) -> RunConfig:
    """The config with the vocabulary that the dataset's tokenizer decides, where the user left it open.

    With ``run.resize_token_embeddings`` the model gets as many ids as the tokenizer has, or keeps its own where they
    are more. Raises ConfigError where the model knows too few ids, or another number of labels.
    """
    if isinstance(dataset, Dataset):
        config = _with_target_vocabulary(config, dataset)
        _refuse_other_number(config.model.num_labels, dataset)  # type: ignore[attr-defined]
    given = config.model.vocab_size
    if given is None or (config.run.resize_token_embeddings and given < dataset.vocab_size):
        model = config.model.model_copy(update={"vocab_size": dataset.vocab_size})
        return config.model_copy(update={"model": model})
    if isinstance(dataset, ImageDataset) and given != dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but {dataset.path} has {dataset.vocab_size} labels: set it to that, or "
            "leave it null."
        )
    if given < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but {dataset.path} has token ids up to {dataset.vocab_size - 1}: set it to "
            f"{dataset.vocab_size} or more, or leave it null."
        )
    return config


def _with_target_vocabulary(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The same of the vocabulary of the targets of pairs, where it is another one."""
    if dataset.manifest.target_tokenizer_sha256 is None:
        return config
    model, size = config.model, dataset.target_vocab_size
    if not model.description.reads_another_vocabulary:
        able = " or ".join(name for name, family in FAMILIES.items() if "decoder_vocab_size" in family.own_keys)
        raise ConfigError(
            f"The sources and the targets of {dataset.path} have a tokenizer each, which a model with one embedding "
            f"cannot read: set model.family={able} with model.share_encoder_decoder_embeddings=false, or tokenize the "
            "pairs without --target-tokenizer."
        )
    given: int | None = getattr(model, "decoder_vocab_size")  # noqa: B009
    if given is None:
        return config.model_copy(update={"model": model.model_copy(update={"decoder_vocab_size": size})})
    if given < size:
        raise ConfigError(
            f"model.decoder_vocab_size is {given}, but targets of {dataset.path} have token ids up to {size - 1}: set "
            f"it to {size} or more, or leave it null."
        )
    return config


def _refuse_other_number(num_labels: int | None, dataset: Dataset) -> None:
    """Raise ConfigError where a classifier of texts has another number of labels than its data."""
    if num_labels is None:
        return
    if dataset.label_names is None:
        raise ConfigError(
            f"model.num_labels is {num_labels}, but {dataset.path} has no labels: tokenize records that have some with "
            "`megatrain-data tokenize --label-key KEY`."
        )
    found = len(dataset.label_names)
    if num_labels != found:
        raise ConfigError(f"model.num_labels is {num_labels}, but {dataset.path} has {found} labels: set it to that.")


def refuse_other_tokens(dataset: Dataset, tokenizer: bytes | None, folder: object) -> None:
    """Raise CheckpointError where a token of the checkpoint's tokenizer has another id, or none, in the dataset's, or
    where the checkpoint in ``folder`` has no tokenizer to compare."""
    if tokenizer is None:
        raise CheckpointError(
            f"run.init_from: {folder} has no tokenizer.json, so whether the tokenizer of {dataset.path} only adds "
            "tokens to it is not known: set run.resize_token_embeddings=false."
        )
    known = Tokenizer(tokenizer, f"{folder}/{TOKENIZER_FILE}", CheckpointError).ids
    ours = dataset.tokenizer.ids
    other = next((token for token, number in known.items() if ours.get(token) != number), None)
    if other is not None:
        raise CheckpointError(
            f"run.init_from: the tokenizer of {dataset.path} is not that of {folder} with further tokens: {other!r} is "
            f"{known[other]} there and {ours.get(other, 'no token')} here. Add tokens behind those that are there."
        )


def unused_vocabulary(config: RunConfig, dataset: Dataset) -> str | None:
    """A question, where most of the model's ids are never in the data: it may be another tokenizer's."""
    given = config.model.vocab_size
    if given is None or given <= 2 * dataset.vocab_size:
        return None
    return (
        f"model.vocab_size is {given}, more than twice the {dataset.vocab_size} of the tokenizer of {dataset.path}: is "
        "that the tokenizer you mean? The other ids are never trained; null takes as many as the tokenizer has."
    )

"""Which documents are transformed as they are read for training, and with which random numbers.

All of it is a function of the seed, the dataset's digest, the epoch and the document: the same on every rank, under
every layout, and after a resume. The unit is a document's part in a sample: documents are longer than samples, or cut.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from megatrain.config import RunConfig, TrainingDataset
from megatrain.config.problem import as_yaml
from megatrain.data.dataset import Dataset
from megatrain.data.images import AnyDataset
from megatrain.data.transforms import (
    SHORTEST,
    FillInTheMiddle,
    SpanCorruption,
    TokenMasking,
    Tokens,
    Transform,
    generator_of,
)
from megatrain.errors import ConfigError, DataError

MAX_LISTED = 20
"""Of a tokenizer's tokens, in a message."""


class DocumentPart(NamedTuple):
    """Tokens [begin, end) of a sample, which are those of a document from its token number ``offset`` on."""

    document: int
    offset: int
    begin: int
    end: int


@dataclass(frozen=True)
class Augmentation:
    """What is done to the documents of one dataset.

    ``function`` to all of them; then one of the ``choices``, each to a share of the documents; then ``masking`` to what
    the model sees.
    """

    dataset: Dataset
    seed: int
    function: Transform | None
    choices: tuple[tuple[float, Transform], ...]
    masking: TokenMasking | None

    def apply(self, parts: Iterable[DocumentPart], epoch: int, tokens: Tokens) -> Tokens:
        """Transform a sample's tokens in place; its tokens as the model is to see them.

        The tokens that begin and end documents stay where they are.
        """
        spans = []
        for part in parts:
            end = part.end - int(tokens[part.end - 1] == self.dataset.eod_id)
            begin = part.begin + int(part.offset == 0 and tokens[part.begin] == self.dataset.bos_id)
            spans.append((part, slice(begin, end)))
        for part, span in spans:
            if self.function is not None and span.start < span.stop:
                tokens[span] = self.function(tokens[span].copy(), self._random("function", part, epoch))
            choice = self._choice(part.document, epoch)
            if choice is not None and span.stop - span.start >= SHORTEST:
                tokens[span] = choice(tokens[span], self._random("choice", part, epoch))
        if self.masking is None:
            return tokens
        seen = tokens.copy()
        for part, span in spans:
            seen[span] = self.masking(tokens[span], self._random("masking", part, epoch))
        return seen

    def _choice(self, document: int, epoch: int) -> Transform | None:
        """The same for every part of a document in an epoch."""
        drawn = xxhash.xxh3_64_intdigest(f"{self.dataset.digest}/{epoch}/{document}".encode(), self.seed) / 2**64
        for rate, transform in self.choices:
            if drawn < rate:
                return transform
            drawn -= rate
        return None

    def _random(self, name: str, part: DocumentPart, epoch: int) -> np.random.Generator:
        return generator_of(f"{self.dataset.digest}/{epoch}/{part.document}/{part.offset}/{name}", self.seed)


def open_augmentations(config: RunConfig, datasets: Sequence[AnyDataset]) -> list[Augmentation | None]:
    """For each training dataset what is done to its documents, None for nothing.

    Raises ConfigError where a sentinel is no control token of the dataset's tokenizer, or a function of the user's
    cannot be imported or is no transform.
    """
    pairs = enumerate(zip(config.data.train, datasets, strict=True))
    return [_open(entry, dataset, config.run.seed, f"data.train.{number}") for number, (entry, dataset) in pairs]


def _open(entry: TrainingDataset, dataset: AnyDataset, seed: int, key: str) -> Augmentation | None:
    fill, spans, masking = entry.fill_in_the_middle, entry.span_corruption, entry.token_masking
    if (entry.transform, fill, spans, masking) == (None, None, None, None):
        return None
    assert isinstance(dataset, Dataset), "megatrain.config.checks refuses them of images"
    rearranging = {"fill_in_the_middle": fill, "span_corruption": spans, "transform": entry.transform}
    if dataset.has_scored and (found := [name for name, value in rearranging.items() if value is not None]):
        raise ConfigError(
            f"{key}.{found[0]}: {dataset.path} says which of its tokens are scored, and they must stay where they are: "
            "leave it out."
        )
    sentinels = Sentinels(dataset)
    choices: list[tuple[float, Transform]] = []
    if fill is not None:
        names = ("prefix_token", "middle_token", "suffix_token")
        prefix, middle, suffix = (
            sentinels.id_of(getattr(fill, name), f"{key}.fill_in_the_middle.{name}") for name in names
        )
        choices.append((fill.rate, FillInTheMiddle(prefix, middle, suffix, fill.spm_rate)))
    if spans is not None:
        numbered = sentinels.numbered(spans.sentinel_token, f"{key}.span_corruption.sentinel_token")
        choices.append((spans.rate, SpanCorruption(numbered, spans.corrupted, spans.mean_span_tokens)))
    mask = None
    if masking is not None:
        mask_id = sentinels.id_of(masking.mask_token, f"{key}.token_masking.mask_token")
        mask = TokenMasking(mask_id, masking.rate, tuple(dataset.tokenizer.control.values()))
    function = None if entry.transform is None else _import(entry.transform, dataset, f"{key}.transform")
    return Augmentation(dataset, seed, function, tuple(choices), mask)


class Sentinels:
    """The added tokens of a dataset's tokenizer that no text became, but for those that begin and end documents."""

    def __init__(self, dataset: Dataset) -> None:
        tokenizer = dataset.tokenizer
        taken = {dataset.eod_id, dataset.bos_id, tokenizer.ids.get(tokenizer.unknown or "")}
        self._path = dataset.path
        self.ids = {
            token: number
            for token, number in tokenizer.added.items()
            if number not in taken and not tokenizer.comes_from_text(token)
        }

    def id_of(self, token: str, key: str) -> int:
        if token in self.ids:
            return self.ids[token]
        known = [*self.ids][:MAX_LISTED] + ["..."] * (len(self.ids) > MAX_LISTED)
        raise ConfigError(
            f"{key}: {as_yaml(token)} given; it must be an added token of the tokenizer of {self._path} that no text "
            f"becomes, other than those that begin and end documents (it has: {', '.join(known) or 'none'}). "
            "Tokenize the text with a tokenizer that has it, or name another."
        )

    def numbered(self, pattern: str, key: str) -> tuple[int, ...]:
        """The ids of the tokens with 0, 1, ... for the braces, as far as they go."""
        found = [self.id_of(pattern.replace("{}", "0"), key)]
        while (token := pattern.replace("{}", str(len(found)))) in self.ids:
            found.append(self.ids[token])
        return tuple(found)


@dataclass(frozen=True)
class _UserFunction:
    """A transform of the user's, held to what a transform must be."""

    name: str
    function: Transform
    dataset: Dataset

    def __call__(self, tokens: Tokens, random: np.random.Generator) -> Tokens:
        """What the function gives. Raises DataError where it fails, or gives anything but as many ids."""
        count = len(tokens)
        try:
            result = np.asarray(self.function(tokens, random))
        except Exception as error:
            raise DataError(f"{self.name} failed on {count} tokens of {self.dataset.path}: {error!r}.") from error
        if result.shape != (count,) or result.dtype.kind not in "iu":
            raise DataError(
                f"{self.name} made {result.dtype} {list(result.shape)} of {count} tokens of {self.dataset.path}: a "
                "transform gives back as many token ids as it is given."
            )
        if count and not 0 <= result.min() <= result.max() < self.dataset.vocab_size:
            raise DataError(
                f"{self.name} gave the id {result.min() if result.min() < 0 else result.max()} for tokens of "
                f"{self.dataset.path}, whose ids are 0 to {self.dataset.vocab_size - 1}."
            )
        return result.astype(np.int64)


def _import(name: str, dataset: Dataset, key: str) -> Transform:
    """Import the function ``module:function``, and try it twice on the first document."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises as it is imported
        raise ConfigError(f"{key}: {name} given; it cannot be imported: {error!r}.") from None
    if not callable(function):
        raise ConfigError(f"{key}: {name} given; it is no function.")
    transform = _UserFunction(name, function, dataset)
    sample = dataset.document(0)[0 if dataset.bos_id is None else 1 : -1].astype(np.int64)
    try:
        first, again = (transform(sample.copy(), np.random.Generator(np.random.Philox(key=7))) for _ in range(2))
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not np.array_equal(first, again):
        raise ConfigError(
            f"{key}: {name} given; it made two different things of the same tokens. Whatever is random in it must come "
            "from the generator that it is given."
        )
    return transform

"""Span corruption (T5): spans of a text are left out of the source, and the target names them.

Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 3.1.4, with the lengths of its
`random_spans_noise_mask`. Each span leaves a sentinel in the source, and stands behind the same sentinel in the target;
both end with the end-of-document token. The text of a sample is as long as fills the source: no token is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from megatrain.config import ObjectiveConfig
from megatrain.config.corruption import Lengths, corrupted_lengths
from megatrain.data.augmentation import Augmentation, Sentinels
from megatrain.data.dataset import Dataset
from megatrain.data.order import Samples
from megatrain.data.packing import PackingPlan
from megatrain.data.sample import Ints, Sample, Source
from megatrain.data.transforms import random_parts
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.objective import DataSettings


def corrupt(
    tokens: Ints, lengths: Lengths, sentinels: Sequence[int], end: int, random: np.random.Generator
) -> tuple[Ints, Ints]:
    """Source and target of a text of ``lengths.text`` tokens; ``sentinels``: at least as many as spans, first the one
    of the first span. Every division into so many spans is equally likely."""
    count = lengths.num_spans
    kept = random_parts(lengths.num_kept, count, random) if lengths.num_kept else np.zeros(count, dtype=np.int64)
    moved = random_parts(lengths.num_moved, count, random)
    parts = np.split(tokens, np.cumsum(np.stack([kept, moved], axis=1).ravel())[:-1])
    marks = [np.array([sentinel]) for sentinel in sentinels[:count]]
    source = chain.from_iterable(zip(parts[0::2], marks, strict=True))
    target = chain.from_iterable(zip(marks, parts[1::2], strict=True))
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


class SpanCorruption:
    """The objective of an encoder-decoder model on text; ``data.seq_len`` tokens of source a sample."""

    def __init__(self, config: ObjectiveConfig, data: DataSettings, seed: int) -> None:
        self._spans, self._seed = config.span_corruption, seed
        self._lengths = corrupted_lengths(data.seq_len, config.span_corruption)

    def refuse_unsuited(self, dataset: Dataset) -> None:
        self._sentinels(dataset)

    def num_samples(self, dataset: Dataset) -> int:
        return dataset.num_tokens // self._lengths.text

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        """Where samples begin follows from their length."""

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        return self._source(dataset, self._seed)

    def evaluation_source(self, dataset: Dataset) -> Source:
        return self._source(dataset, 0)

    def _source(self, dataset: Dataset, seed: int) -> SpanSource:
        return SpanSource(dataset, self._lengths, self._sentinels(dataset), seed)

    def _sentinels(self, dataset: Dataset) -> tuple[int, ...]:
        """Raises ConfigError where they are too few, or the dataset has no one text."""
        if dataset.target_tokenizer_path is not None:
            raise ConfigError(
                f"{dataset.path} is of pairs whose sources and targets have a tokenizer each, and span corruption "
                "reads one text: tokenize plain text, or pairs without --target-tokenizer."
            )
        key = "objective.span_corruption.sentinel_token"
        sentinels = Sentinels(dataset).numbered(self._spans.sentinel_token, key)
        if len(sentinels) < self._lengths.num_spans:
            raise ConfigError(
                f"{key}: the tokenizer of {dataset.path} has {len(sentinels)} sentinels, and a sample of "
                f"data.seq_len={self._lengths.source} has {self._lengths.num_spans} spans: set data.seq_len to less, "
                "or objective.span_corruption.mean_span_tokens to more."
            )
        return sentinels


@dataclass(frozen=True)
class SpanSource:
    """A dataset cut into texts that fill a source, wherever its documents end; what is left at the end is not used."""

    dataset: Dataset
    lengths: Lengths
    sentinels: tuple[int, ...]
    seed: int
    all_scored: bool = field(default=True, init=False)
    plan: PackingPlan | None = field(default=None, init=False)
    left_out: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"{self.dataset.path} has {self.dataset.num_tokens:,} tokens, too few for one sample of data.seq_len="
                f"{self.seq_len}, which has {self.lengths.text}: tokenize more text, or set data.seq_len to less."
            )

    @property
    def seq_len(self) -> int:
        return self.lengths.source

    @property
    def num_samples(self) -> int:
        return self.dataset.num_tokens // self.lengths.text

    def num_targets(self, samples: Samples) -> int:
        return len(samples) * self.lengths.target

    def num_bytes(self) -> int:
        """Of the spans; sentinels stand for no text. As an evaluation takes them."""
        every = (self.sample(number, 0, number).targets_M for number in range(self.num_samples))
        return sum(int(self.dataset.token_bytes[targets].sum()) for targets in every)

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        """The spans depend on the seed and on ``number``, so that each epoch has others."""
        text = self.dataset.window(index * self.lengths.text, self.lengths.text).astype(np.int64)
        key = xxhash.xxh3_64_intdigest(f"span corruption/{number}".encode(), self.seed)
        random = np.random.Generator(np.random.Philox(key=key))
        source, target = corrupt(text, self.lengths, self.sentinels, self.dataset.eod_id, random)
        start = self.dataset.tokenizer.decoder_start(self.dataset.eod_id)
        return Sample(
            tokens_T=np.concatenate([[start], target[:-1]]),
            targets_M=target,
            loss_mask_M=None,
            positions_T=np.arange(len(target)),
            document_ids_T=None,
            source_tokens_S=source,
            source_positions_S=np.arange(len(source)),
        )

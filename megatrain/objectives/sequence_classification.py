"""Classification of texts: the label of each is predicted at its first token ([CLS]).

A sample holds several texts, each alone, laid end to end: neither attention nor positions cross their borders, so that
next to nothing is padding. A text that is too long for a sample is cut; of two texts first the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatrain.config import ModelConfig, ObjectiveConfig
from megatrain.data.augmentation import Augmentation
from megatrain.data.dataset import Dataset
from megatrain.data.packing import WHOLE, count_samples, make_plan, open_plan, store_plan
from megatrain.data.sample import Ints, Sample, Source
from megatrain.errors import ConfigError
from megatrain.objectives.objective import DataSettings
from megatrain.objectives.planned import PlannedSource
from megatrain.objectives.rows import filled

SHORTEST_PAIR = 5
"""A token of each text, what begins the first, and what ends both."""


class SequenceClassification:
    """The objective of a classifier of texts."""

    def __init__(self, config: ObjectiveConfig, model: ModelConfig, data: DataSettings) -> None:
        self._seq_len, self._model = data.seq_len, model
        self._num_slots = config.most_targets(model, data.seq_len)

    def num_samples(self, dataset: Dataset) -> int:
        """Exact, which takes a second for a million texts."""
        return count_samples(dataset, self._seq_len, WHOLE)

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        for dataset in datasets:
            self.refuse_unsuited(dataset)
            store_plan(dataset, self._seq_len, folder, WHOLE)

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        assert augmentation is None, "megatrain.config.checks refuses them"
        return LabeledSource(dataset, open_plan(dataset, self._seq_len, folder, WHOLE), self._num_slots)

    def evaluation_source(self, dataset: Dataset) -> Source:
        self.refuse_unsuited(dataset)
        return LabeledSource(dataset, make_plan(dataset, self._seq_len, WHOLE), self._num_slots)

    def refuse_unsuited(self, dataset: Dataset) -> None:
        if dataset.label_names is None or dataset.bos_id is None:
            lacking = "labels" if dataset.label_names is None else "token that begins its documents"
            raise ConfigError(
                f"{dataset.path} has no {lacking}, which classification needs: tokenize the texts with `megatrain-data "
                "tokenize --label-key KEY --bos-token '[CLS]' --eod-token '[SEP]'`."
            )
        num_segments = self._model.sizes["segments"]
        if dataset.has_text_pairs and num_segments < 2:
            raise ConfigError(
                f"{dataset.path} is of two texts each, which are two segments: model.type_vocab_size must be 2 or more "
                f"(it is {num_segments})."
            )
        if dataset.has_text_pairs and self._seq_len < SHORTEST_PAIR:
            raise ConfigError(
                f"data.seq_len is {self._seq_len}, and of the two texts of {dataset.path} with what begins and ends "
                f"them a sample holds something from {SHORTEST_PAIR} tokens on: set it to that or more."
            )


@dataclass(frozen=True)
class LabeledSource(PlannedSource):
    """Texts packed into samples by a plan. ``num_slots``: targets of each; those that its texts do not fill are not
    scored."""

    num_slots: int

    def num_bytes(self) -> int:
        """None: what is predicted is no text."""
        return 0

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        """Alike at each place of the run."""
        chunks = list(self.plan.chunks(index))
        documents = [self._document(start, length) for start, length in chunks]
        row = filled(documents, self.seq_len, self.dataset.eod_id)
        slots = np.zeros((2, self.num_slots), dtype=np.int64)
        lengths = np.array([len(document) for document in documents])
        labels = [self.dataset.label_at(start) for start, _ in chunks]
        slots[:, : len(chunks)] = np.cumsum(lengths) - lengths, labels
        return Sample(
            tokens_T=row.tokens,
            targets_M=slots[1],
            loss_mask_M=np.arange(self.num_slots) < len(chunks),
            positions_T=row.positions,
            document_ids_T=row.document_ids,
            target_places_M=slots[0],
            segments_T=self._segments(documents) if self.dataset.has_text_pairs else None,
        )

    def _document(self, start: int, length: int) -> Ints:
        """As much of it as a sample holds."""
        tokens = self.dataset.window(start, length).astype(np.int64)
        if length <= self.seq_len:
            return tokens
        if not self.dataset.has_text_pairs:
            return np.append(tokens[: self.seq_len - 1], self._eod)
        middle = self._border(tokens)
        first, second = shares(middle - 1, length - middle - 2, self.seq_len - 3)
        parts = tokens[: 1 + first], self._eod, tokens[middle + 1 : middle + 1 + second], self._eod
        return np.concatenate(parts)

    def _border(self, tokens: Ints) -> int:
        """Where the first of two texts ends."""
        return int((tokens == self.dataset.eod_id).argmax())

    @cached_property
    def _eod(self) -> Ints:
        return np.array([self.dataset.eod_id])

    def _segments(self, documents: Sequence[Ints]) -> Ints:
        """1 behind the end of a document's first text."""
        segments = np.zeros(self.seq_len, dtype=np.int64)
        at = 0
        for tokens in documents:
            segments[at + self._border(tokens) + 1 : at + len(tokens)] = 1
            at += len(tokens)
        return segments


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How much is left of two texts that are together longer than ``room``: the longer one is cut to the other's
    length, then both, as ``longest_first`` of the library tokenizers does it."""
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)

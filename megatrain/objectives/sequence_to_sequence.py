"""Sequence to sequence: the target of each pair from its source, as in translation.

A sample holds several pairs, laid end to end: as many as its source and its target have room for. A pair's tokens see
its own alone, so that it is as if it were alone, and next to nothing is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.config import ObjectiveConfig
from megatrain.data.augmentation import Augmentation
from megatrain.data.dataset import Dataset
from megatrain.data.packing import count_samples, make_plan, open_plan, pairs_of, store_plan
from megatrain.data.sample import Ints, Sample, Source
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.objective import DataSettings
from megatrain.objectives.planned import PlannedSource
from megatrain.objectives.rows import filled


class SequenceToSequence:
    """The objective of an encoder-decoder model on pairs: ``data.seq_len`` tokens of source a sample, and
    ``objective.target_len`` of target."""

    def __init__(self, config: ObjectiveConfig, data: DataSettings) -> None:
        self._source_len, self._target_len = data.seq_len, config.target_len or data.seq_len
        self._packing = pairs_of(self._target_len)

    def refuse_unsuited(self, dataset: Dataset) -> None:
        if not dataset.holds_pairs:
            raise ConfigError(
                f"{dataset.path} has no pairs of a source and a target, which objective.type=sequence_to_sequence "
                "needs: tokenize the records with `megatrain-data tokenize --source-key KEY --target-key KEY`."
            )

    def num_samples(self, dataset: Dataset) -> int:
        """Exact, which takes a second for a million pairs."""
        self.refuse_unsuited(dataset)
        return count_samples(dataset, self._source_len, self._packing)

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        for dataset in datasets:
            self.refuse_unsuited(dataset)
            store_plan(dataset, self._source_len, folder, self._packing)

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        return PairSource(dataset, open_plan(dataset, self._source_len, folder, self._packing), self._target_len)

    def evaluation_source(self, dataset: Dataset) -> Source:
        self.refuse_unsuited(dataset)
        return PairSource(dataset, make_plan(dataset, self._source_len, self._packing), self._target_len)


@dataclass(frozen=True)
class PairSource(PlannedSource):
    """Pairs packed into samples by a plan. What they leave free is filled with end-of-document tokens, not scored."""

    target_len: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"No pair of {self.dataset.path} fits into a sample: its source into data.seq_len={self.seq_len}, its "
                f"target into objective.target_len={self.target_len}. Give more."
            )

    @property
    def left_out(self) -> str | None:
        dropped = self.plan.dropped
        if not dropped.conversations:
            return None
        return (
            f"{dropped.conversations:,} pairs of {dropped.tokens:,} tokens are left out: their sources do not fit into "
            f"data.seq_len={self.seq_len}, or their targets into objective.target_len={self.target_len}"
        )

    def num_bytes(self) -> int:
        """UTF-8 bytes of the targets of all samples."""
        every = (piece for sample in range(self.num_samples) for piece in self.plan.chunks(sample))
        return sum(self.dataset.scored_bytes(start, num_targets + 1) for start, num_targets in every)

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        """Alike at each place of the run."""
        pairs = list(self.pairs(index))
        eod = self.dataset.target_eod_id
        source = filled([pair for pair, _ in pairs], self.seq_len, self.dataset.eod_id)
        target = filled([pair for _, pair in pairs], self.target_len, eod)
        inputs = np.roll(target.tokens, 1)
        inputs[target.positions == 0] = self.dataset.target_tokenizer.decoder_start(eod)
        return Sample(
            tokens_T=inputs,
            targets_M=target.tokens,
            loss_mask_M=~target.is_filling,
            positions_T=target.positions,
            # Filling sees the last source, for it must see some.
            document_ids_T=np.minimum(target.document_ids, len(pairs) - 1).astype(np.int32),
            source_tokens_S=source.tokens,
            source_positions_S=source.positions,
            source_document_ids_S=source.document_ids,
        )

    def pairs(self, index: int) -> Iterator[tuple[Ints, Ints]]:
        """Source and target of each pair of a sample, each with its end."""
        for start, num_targets in self.plan.chunks(index):
            tokens = self.dataset.window(start, num_targets + 1).astype(np.int64)
            first = int(self.dataset.scored(start, num_targets + 1).argmax())
            yield tokens[:first], tokens[first:]

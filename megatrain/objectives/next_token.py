"""Next-token prediction: each token's target is the token after it.

So a sample of ``seq_len`` inputs has ``seq_len`` targets, the same tokens shifted by one, and attention is causal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.data.augmentation import Augmentation, DocumentPart
from megatrain.data.dataset import Dataset
from megatrain.data.order import Samples
from megatrain.data.packing import PackingPlan, count_samples, make_plan, open_plan, store_plan
from megatrain.data.sample import Ints, Sample, Source
from megatrain.errors import DataError
from megatrain.objectives.objective import MOST_PACKED_DOCUMENTS, DataSettings
from megatrain.objectives.planned import PlannedSource


class NextToken:
    """The objective of a causal model: ``data`` says how its datasets are cut into samples."""

    def __init__(self, data: DataSettings) -> None:
        self._data = data

    def refuse_unsuited(self, dataset: Dataset) -> None:
        """Each has tokens."""

    def num_samples(self, dataset: Dataset) -> int:
        """Of many documents, packed samples are counted as if no space was left free in them."""
        if self._data.packing == "best_fit" and dataset.num_documents <= MOST_PACKED_DOCUMENTS:
            return count_samples(dataset, self._data.seq_len)
        return (dataset.num_tokens - 1) // self._data.seq_len

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        if self._data.packing == "best_fit":
            for dataset in datasets:
                store_plan(dataset, self._data.seq_len, folder)

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        data = self._data
        if data.packing == "concat":
            return ConcatSource(dataset, data.seq_len, data.document_mask, data.scores_after_eod, augmentation)
        return PackedSource(dataset, open_plan(dataset, data.seq_len, folder), data.document_mask, augmentation)

    def evaluation_source(self, dataset: Dataset) -> Source:
        """Concat samples whatever the packing, in which every token counts.

        Where the dataset says which tokens are scored, conversations packed whole, none of which sees another.
        """
        data = self._data
        if dataset.has_scored:
            return PackedSource(dataset, make_plan(dataset, data.seq_len), document_mask=True)
        return ConcatSource(dataset, data.seq_len, data.document_mask, data.scores_after_eod)


@dataclass(frozen=True)
class ConcatSource:
    """A dataset cut every ``seq_len`` tokens: sample k's inputs are tokens [kL, kL + L), its targets one token on.

    What is left at the end and fills no sample is not used. With ``document_mask``, a sample also says where documents
    begin in it, so that attention and positions can start anew there. Without ``score_after_eod``, a target that begins
    a document does not count: what stands before it is another document. Nor does one that the dataset does not score.
    ``augmentation``: what is done to the documents; None, as for an evaluation: nothing.
    """

    dataset: Dataset
    seq_len: int
    document_mask: bool = False
    score_after_eod: bool = True
    augmentation: Augmentation | None = None
    plan: PackingPlan | None = field(default=None, init=False)
    left_out: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"{self.dataset.path} has {self.dataset.num_tokens:,} tokens, too few for one sample of data.seq_len="
                f"{self.seq_len} and its last target: tokenize more text, or set data.seq_len to less."
            )

    @property
    def num_samples(self) -> int:
        return max(self.dataset.num_tokens - 1, 0) // self.seq_len

    @property
    def all_scored(self) -> bool:
        """Whether every target of every sample counts."""
        return self.score_after_eod and not self.dataset.has_scored

    def num_targets(self, samples: Samples) -> int:
        """Scored targets of these samples together."""
        if self.all_scored:
            return len(samples) * self.seq_len
        if self.dataset.has_scored:
            return sum(int(np.count_nonzero(self._scored(index))) for index in samples.index.tolist())
        return len(samples) * self.seq_len - sum(map(self._num_begun, *_runs(samples.index)))

    def num_bytes(self) -> int:
        """UTF-8 bytes of the text behind the scored targets of all samples."""
        count = self.num_samples * self.seq_len
        if self.dataset.has_scored:
            return sum(self.dataset.scored_bytes(k * self.seq_len + 1, self.seq_len) for k in range(self.num_samples))
        every = self.dataset.window_bytes(1, count)  # targets are the tokens after the first
        if self.score_after_eod:
            return every
        begins = 1 + self.dataset.document_starts(1, count)
        return every - sum(self.dataset.window_bytes(begin, 1) for begin in begins.tolist())

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        return _shifted_by_one(self, index, epoch)

    def fill(
        self,
        index: int,
        tokens: NDArray[np.int64],
        document_ids: NDArray[np.int32] | None,
        scored: NDArray[np.bool_] | None,
    ) -> None:
        """Write a sample's seq_len + 1 tokens; the document's number of each input; which targets count."""
        start = index * self.seq_len
        if scored is not None:
            scored[:] = self._scored(index)
        tokens[:] = self.dataset.window(start, self.seq_len + 1)
        if document_ids is not None:
            begins = self.dataset.document_starts(start, self.seq_len)
            document_ids[:] = 0
            document_ids[begins[begins > 0]] = 1
            np.cumsum(document_ids, out=document_ids)

    def parts(self, index: int) -> Iterator[DocumentPart]:
        """The documents, or parts of them, in a sample's seq_len + 1 tokens, in their order."""
        start, length = index * self.seq_len, self.seq_len + 1
        document = self.dataset.document_at(start)
        offset = start - self.dataset.document_range(document)[0]
        begins = self.dataset.document_starts(start, length)
        for begin, end in pairwise([0, *begins[begins > 0].tolist(), length]):
            yield DocumentPart(document, offset, begin, end)
            document, offset = document + 1, 0

    def _scored(self, index: int) -> NDArray[np.bool_]:
        """Which targets of a sample count."""
        first = index * self.seq_len + 1
        scored = self.dataset.scored(first, self.seq_len)
        if not self.score_after_eod:
            scored[self.dataset.document_starts(first, self.seq_len)] = False
        return scored

    def _num_begun(self, first: int, last: int) -> int:
        """Documents that begin in the targets of samples ``first`` to ``last``."""
        at = self.dataset.document_at
        return at((last + 1) * self.seq_len) - at(first * self.seq_len)


@dataclass(frozen=True)
class PackedSource(PlannedSource):
    """Documents packed into samples by a plan.

    What a sample's chunks leave free is filled with end-of-document tokens, behind them: not scored, seen by none of
    them, and with ``document_mask`` a document of its own.
    """

    document_mask: bool = False
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"{self.dataset.path} has no document of two tokens or more, so nothing to predict: tokenize text."
            )

    def num_bytes(self) -> int:
        """UTF-8 bytes of the text behind the scored targets of all samples."""
        every = (chunk for sample in range(self.num_samples) for chunk in self.plan.chunks(sample))
        return sum(self.dataset.scored_bytes(start + 1, num_targets) for start, num_targets in every)

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        return _shifted_by_one(self, index, epoch)

    def fill(
        self, index: int, tokens: Ints, document_ids: NDArray[np.int32] | None, scored: NDArray[np.bool_] | None
    ) -> None:
        """Write a sample's seq_len + 1 tokens, for each input the number of its chunk, and which targets count."""
        at = number = 0
        if scored is not None:
            scored[:] = False
        for number, (start, num_targets) in enumerate(self.plan.chunks(index)):
            tokens[at : at + num_targets + 1] = self.dataset.window(start, num_targets + 1)
            if scored is not None:
                scored[at : at + num_targets] = self.dataset.scored(start + 1, num_targets)
            if document_ids is not None:
                document_ids[at : at + num_targets + 1] = number
            at += num_targets + 1
        tokens[at:] = self.dataset.eod_id
        if document_ids is not None:
            document_ids[at:] = number + 1

    def parts(self, index: int) -> Iterator[DocumentPart]:
        at = 0
        for start, num_targets in self.plan.chunks(index):
            document = self.dataset.document_at(start)
            offset = start - self.dataset.document_range(document)[0]
            yield DocumentPart(document, offset, at, at := at + num_targets + 1)


def _shifted_by_one(source: ConcatSource | PackedSource, index: int, epoch: int) -> Sample:
    """A sample's tokens as the model sees them, and each one's successor."""
    length = source.seq_len
    tokens = np.empty(length + 1, dtype=np.int64)
    ids = np.empty(length, dtype=np.int32) if source.document_mask else None
    scored = None if source.all_scored else np.empty(length, dtype=np.bool_)
    source.fill(index, tokens, ids, scored)
    augmentation = source.augmentation
    seen = tokens if augmentation is None else augmentation.apply(source.parts(index), epoch, tokens)
    positions = np.arange(length) if ids is None else _positions(ids)
    return Sample(seen[:-1], tokens[1:], scored, positions, ids)


def _runs(numbers: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Where runs of numbers that follow each other begin, and where they end."""
    ends = np.flatnonzero(np.diff(numbers, append=-1) != 1) if len(numbers) else np.empty(0, dtype=np.int64)
    return numbers[np.append(0, ends[:-1] + 1)[: len(ends)]].tolist(), numbers[ends].tolist()


def _positions(document_ids: NDArray[np.int32]) -> Ints:
    """The position of each token in its document's part of the sample."""
    index = np.arange(len(document_ids))
    begins = np.zeros_like(index)
    begins[1:] = np.where(document_ids[1:] != document_ids[:-1], index[1:], 0)
    return index - np.maximum.accumulate(begins)

"""Masked language modeling: some tokens of each document are hidden from the model, to be predicted (Devlin et al.
2018).

A sample holds documents, or pieces of those that are too long, each alone: it begins with the token that begins
documents ([CLS]), ends with the one that ends them ([SEP]), and neither attention nor positions cross its border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.config import MaskedLMConfig
from megatrain.data.augmentation import Augmentation, Sentinels
from megatrain.data.dataset import Dataset
from megatrain.data.order import Samples
from megatrain.data.packing import ALONE, count_samples, make_plan, open_plan, store_plan
from megatrain.data.sample import Ints, Sample, Source
from megatrain.data.transforms import generator_of
from megatrain.data.words import Words
from megatrain.errors import DataError
from megatrain.objectives.objective import MOST_PACKED_DOCUMENTS, DataSettings
from megatrain.objectives.planned import PlannedSource
from megatrain.objectives.rows import Row, filled

NUM_TRIED = 8
"""Samples of a dataset that are looked at for words before training."""


class MaskedLM:
    """The objective of an encoder."""

    def __init__(self, data: DataSettings, config: MaskedLMConfig, seed: int) -> None:
        self._seq_len, self._config, self._seed = data.seq_len, config, seed

    def refuse_unsuited(self, dataset: Dataset) -> None:
        if dataset.bos_id is None:
            raise DataError(
                f"{dataset.path} has no token that begins its documents, which masked language modeling needs: "
                "tokenize the text with --bos-token '[CLS]' --eod-token '[SEP]', or what they are called in the "
                "tokenizer."
            )
        if dataset.has_scored:
            raise DataError(
                f"{dataset.path} says which of its tokens are scored, and masked language modeling chooses them "
                "itself: tokenize plain text."
            )
        _mask_id(dataset, self._config)

    def num_samples(self, dataset: Dataset) -> int:
        if dataset.num_documents <= MOST_PACKED_DOCUMENTS:
            return count_samples(dataset, self._seq_len, ALONE)
        return dataset.num_tokens // self._seq_len

    def store_plans(self, datasets: Sequence[Dataset], folder: Path) -> None:
        for dataset in datasets:
            self.refuse_unsuited(dataset)
            store_plan(dataset, self._seq_len, folder, ALONE)

    def training_source(self, dataset: Dataset, folder: Path, augmentation: Augmentation | None) -> Source:
        assert augmentation is None, "megatrain.config.checks refuses them"
        return MaskedSource(dataset, open_plan(dataset, self._seq_len, folder, ALONE), self._config, self._seed)

    def evaluation_source(self, dataset: Dataset) -> Source:
        """Each run predicts the same tokens, whatever its seed."""
        self.refuse_unsuited(dataset)
        return MaskedSource(dataset, make_plan(dataset, self._seq_len, ALONE), self._config, seed=0)


def _mask_id(dataset: Dataset, config: MaskedLMConfig) -> int:
    return Sentinels(dataset).id_of(config.mask_token, "objective.masked_lm.mask_token")


@dataclass(frozen=True)
class _Vocabulary:
    """``text_ids``: of tokens that text becomes, which are those that can be selected, and put in another's place.
    ``is_text``: of each id, whether it is one of them."""

    mask_id: int
    text_ids: Ints
    is_text: NDArray[np.bool_]
    words: Words

    @staticmethod
    def of(dataset: Dataset, config: MaskedLMConfig) -> _Vocabulary:
        tokenizer, size = dataset.tokenizer, dataset.vocab_size
        is_text = np.zeros(size, dtype=np.bool_)
        is_text[[number for token, number in tokenizer.ids.items() if number < size]] = True
        markers = [number for number in (dataset.bos_id, dataset.eod_id) if number is not None]
        is_text[[*tokenizer.control.values(), *markers]] = False
        return _Vocabulary(_mask_id(dataset, config), np.flatnonzero(is_text), is_text, Words(tokenizer, size))


@dataclass(frozen=True)
class MaskedSource(PlannedSource):
    """A dataset packed into samples of ``plan.seq_len`` tokens, of which some are hidden, chosen by ``seed`` and place.

    Each sample has ``num_slots`` targets, so that devices need not count them; those that its documents do not fill are
    not scored.
    """

    config: MaskedLMConfig
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"{self.dataset.path} has no text to hide tokens of: tokenize text.")
        self._vocabulary  # noqa: B018 (made before the first step)
        first = range(min(self.num_samples, NUM_TRIED))
        if self.config.whole_word_mask and not any(len(self._chosen(self._row(k), k)) for k in first):
            raise DataError(
                f"{self.dataset.path} has no word that can be selected in its first {len(first)} samples: each has "
                f"more tokens than {self.config.mlm_probability:g} of a sample's, as in text without spaces. Set "
                "objective.masked_lm.whole_word_mask=false."
            )

    @property
    def num_slots(self) -> int:
        """Targets of a sample at the most."""
        return self.config.most_targets(self.seq_len)

    def num_targets(self, samples: Samples) -> int:
        """By the plan; of whole words, and where some text is unknown to the tokenizer, by making the samples."""
        unknown = self.dataset.manifest.unknown
        if self.config.whole_word_mask or unknown is None or unknown.tokens:
            places = zip(samples.index.tolist(), samples.number.tolist(), strict=True)
            return sum(len(self._chosen(self._row(index), number)) for index, number in places)
        return int(self._num_chosen(self.plan.num_targets(samples.index)).sum())

    def num_bytes(self) -> int:
        """None: hidden tokens are predicted from those on either side, so that bits per byte would mean nothing."""
        return 0

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        row = self._row(index)
        chosen = self._chosen(row, number)
        slots = np.zeros((2, self.num_slots), dtype=np.int64)
        slots[:, : len(chosen)] = chosen, row.tokens[chosen]
        return Sample(
            tokens_T=self._hidden(row.tokens, chosen, number),
            targets_M=slots[1],
            loss_mask_M=np.arange(self.num_slots) < len(chosen),
            positions_T=row.positions,
            document_ids_T=row.document_ids,
            target_places_M=slots[0],
        )

    def _row(self, index: int) -> Row:
        bos, eod = [self.dataset.bos_id], [self.dataset.eod_id]
        pieces = (self.dataset.window(start, count) for start, count in self.plan.chunks(index))
        return filled([np.concatenate([bos, piece, eod]) for piece in pieces], self.seq_len, self.dataset.eod_id)

    def _chosen(self, row: Row, number: int) -> Ints:
        """The tokens that are selected, by their place in the sample, in order."""
        random = self._random("chosen", number)
        is_text = ~row.is_filling & (row.positions > 0) & (np.roll(row.positions, -1) > 0)  # no bos, no eod
        candidates = np.flatnonzero(is_text & self._vocabulary.is_text[row.tokens])
        count = min(int(self._num_chosen(is_text.sum())), len(candidates))
        if not self.config.whole_word_mask:
            return np.sort(random.permutation(candidates)[:count])
        is_begin = np.ones(len(candidates), dtype=np.bool_)
        is_begin[1:] = (np.diff(candidates) > 1) | ~self._vocabulary.words.continues(row.tokens[candidates])
        word, lengths = np.cumsum(is_begin) - 1, np.diff(np.flatnonzero(np.append(is_begin, True)))
        is_chosen: NDArray[np.bool_] = np.zeros(len(lengths), dtype=np.bool_)
        for each in random.permutation(len(lengths)).tolist():
            is_chosen[each] = lengths[each] <= count
            count -= int(lengths[each]) * int(is_chosen[each])
            if not count:
                break
        chosen: Ints = candidates[is_chosen[word]]
        return chosen

    def _hidden(self, tokens: Ints, chosen: Ints, number: int) -> Ints:
        """What the model reads: of the chosen tokens most are the mask, some are random, and the rest stays."""
        random, config = self._random("hidden", number), self.config
        kind, replacement = random.random(len(chosen)), random.choice(self._vocabulary.text_ids, len(chosen))
        is_mask = kind < config.mask_replace_prob
        is_random = ~is_mask & (kind < config.mask_replace_prob + config.random_replace_prob)
        seen: Ints = tokens.copy()
        seen[chosen[is_mask]] = self._vocabulary.mask_id
        seen[chosen[is_random]] = replacement[is_random]
        return seen

    def _num_chosen(self, num_tokens: Ints | np.int64) -> Ints:
        """Of so many tokens of text, at least one."""
        return np.maximum(np.rint(num_tokens * self.config.mlm_probability), 1).astype(np.int64)

    def _random(self, name: str, number: int) -> np.random.Generator:
        return generator_of(f"masked_lm/{name}/{number}", self.seed)

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary.of(self.dataset, self.config)

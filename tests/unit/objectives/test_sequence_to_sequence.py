"""Pairs in samples: each whole, in one sample of an epoch, and seen by itself."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from data_tools.supervised import SourceAndTarget
from megatrain.config import DataConfig, ObjectiveConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.order import Samples
from megatrain.errors import ConfigError
from megatrain.objectives.sequence_to_sequence import PairSource, SequenceToSequence
from tests.supervised import make_answers

END_TEXT = "<|endoftext|>"


def make_pairs() -> list[tuple[str, str]]:
    draw = random.Random(4)
    words = ["so ", "the ", "\n", END_TEXT, "question"]
    return [("".join(draw.choices(words, k=draw.randint(1, 9))), "x" * draw.randint(1, 30)) for _ in range(200)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(make_answers(tmp_path_factory.mktemp("pairs"), make_pairs(), None, SourceAndTarget(END_TEXT)))


def source_of(dataset: Dataset, folder: Path, seq_len: int = 64, target_len: int = 40) -> PairSource:
    data = DataConfig(train=({"path": "x"},), seq_len=seq_len)  # type: ignore[arg-type]
    objective = SequenceToSequence(ObjectiveConfig(target_len=target_len), data)
    objective.store_plans([dataset], folder)
    found = objective.training_source(dataset, folder, None)
    assert isinstance(found, PairSource)
    assert objective.num_samples(dataset) == found.num_samples == objective.evaluation_source(dataset).num_samples
    return found


def test_every_pair_is_in_one_sample(dataset: Dataset, tmp_path: Path) -> None:
    """A literal end of a document in a source is text; both sides are encoded by themselves, and end."""
    samples = source_of(dataset, tmp_path)
    found = [pair for index in range(samples.num_samples) for pair in samples.pairs(index)]
    ends = [dataset.eod_id]
    encode = dataset.tokenizer.encode  # a token is a byte: of one character at a time no control token is seen
    expected = [tuple([*chain(*map(encode, text)), *ends] for text in pair) for pair in make_pairs()]
    fitting = [pair for pair in expected if len(pair[0]) <= 64 and len(pair[1]) <= 40]
    assert sorted((source.tolist(), target.tolist()) for source, target in found) == sorted(fitting)
    assert samples.plan.dropped.conversations == len(expected) - len(fitting) > 0
    every = np.arange(samples.num_samples)
    counted = samples.num_targets(Samples(every, every, every, every))
    masks = [samples.sample(index, 0, 0).loss_mask_M for index in every.tolist()]
    assert counted == sum(int(mask.sum()) for mask in masks if mask is not None)
    assert counted == sum(len(target) for _, target in fitting)


def test_a_sample_is_its_pairs_and_little_filling(dataset: Dataset, tmp_path: Path) -> None:
    samples = source_of(dataset, tmp_path)
    num_targets = 0
    for index in range(samples.num_samples):
        row = samples.sample(index, 0, 7)
        assert row.source_tokens_S is not None and row.source_document_ids_S is not None
        assert row.document_ids_T is not None and row.loss_mask_M is not None
        assert (len(row.source_tokens_S), len(row.tokens_T)) == (64, 40)
        assert set(row.document_ids_T.tolist()) <= set(row.source_document_ids_S.tolist())
        num_targets += int(row.loss_mask_M.sum())
        for number, (source, target) in enumerate(samples.pairs(index)):
            own = row.document_ids_T == number
            own &= row.loss_mask_M
            assert row.targets_M[own].tolist() == target.tolist()
            assert row.tokens_T[own].tolist() == [dataset.eod_id, *target[:-1].tolist()]
            assert row.positions_T[own].tolist() == list(range(len(target)))
            assert row.source_tokens_S[row.source_document_ids_S == number].tolist() == source.tolist()
    assert num_targets > 0.6 * 40 * samples.num_samples


def test_prompts_and_answers_are_no_pairs(tmp_path: Path) -> None:
    answers = open_dataset(make_answers(tmp_path, [("a question", "an answer")] * 9))
    with pytest.raises(ConfigError, match="--source-key KEY --target-key KEY"):
        source_of(answers, tmp_path)

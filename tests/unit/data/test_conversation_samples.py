"""Conversations as samples: what is scored in them, what is cut, what is left out, and what is counted of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatrain.config import DataConfig, RunConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.augmentation import open_augmentations
from megatrain.data.batches import BatchMaker, EvaluationBatches
from megatrain.data.conversations import Dropped, advice, shortened
from megatrain.data.order import Samples
from megatrain.data.packing import open_plan, store_plan
from megatrain.data.shard import ScoredRuns
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.next_token import ConcatSource, NextToken, PackedSource
from tests.runs import TinyData, tiny_config
from tests.supervised import make_answers

SEQ_LEN = 48

Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prompts and answers in bytes, of which some do not fit into a sample, in several shards."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(5)
    pairs = [("p" * rng.randint(1, 60), "".join(rng.choices("abc", k=rng.randint(1, 40)))) for _ in range(200)]
    pairs += [("p" * (SEQ_LEN - 10), "a" * 10), ("p" * (SEQ_LEN - 10), "a" * 11)]  # just in, and just not
    return open_dataset(make_answers(folder, pairs))


def packed(dataset: Dataset, folder: Path) -> PackedSource:
    store_plan(dataset, SEQ_LEN, folder)
    return PackedSource(dataset, open_plan(dataset, SEQ_LEN, folder), document_mask=True)


def all_of(source: PackedSource | ConcatSource) -> Samples:
    every = np.arange(source.num_samples)
    return Samples(np.zeros_like(every), np.zeros_like(every), every, every)


def runs_of(masks: list[Mask]) -> ScoredRuns:
    bounds, base = [], 0
    for mask in masks:
        bounds += (base + np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))).tolist()
        base += len(mask)
    edges = np.array(bounds, dtype=np.int64)
    lengths = np.where(np.arange(len(edges)) % 2, np.diff(edges, prepend=0), 0)
    return ScoredRuns(edges, np.cumsum(lengths))


def kept_tokens(mask: Mask, seq_len: int) -> int:
    """How many tokens of a document are kept, said token by token; 0: it is left out."""
    length = len(mask)
    if length > seq_len + 1 and not mask[1:].all():
        ends = [end for end in range(2, seq_len + 2) if mask[end - 1] and not mask[end]]
        length = max(ends, default=0)
    return length if mask[1:length].any() else 0


@given(st.integers(2, 12), st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_long_conversations_end_with_a_whole_answer(seq_len: int, documents: list[list[bool]]) -> None:
    masks = [np.array(mask) for mask in documents]
    lengths = np.array([len(mask) for mask in masks])
    found = shortened(np.cumsum(lengths) - lengths, lengths, runs_of(masks), seq_len)
    kept = [(k, length) for k, mask in enumerate(masks) if (length := kept_tokens(mask, seq_len))]
    assert found.lengths.tolist() == [length for _, length in kept]
    assert found.starts.tolist() == [int(lengths[:k].sum()) for k, _ in kept]
    assert found.num_unscored.tolist() == [int((~masks[k][1:length]).sum()) for k, length in kept]
    dropped = found.dropped
    assert dropped.tokens == lengths.sum() - found.lengths.sum()
    assert dropped.conversations == len(masks) - len(kept)
    cut = [(k, masks[k][seq_len : seq_len + 2].all()) for k, length in kept if length < len(masks[k])]
    assert (dropped.answers, dropped.prompts) == (
        sum(inside for _, inside in cut),
        sum(not inside for _, inside in cut),
    )


def test_each_answer_that_fits_is_scored_once(dataset: Dataset, tmp_path: Path) -> None:
    source = packed(dataset, tmp_path)
    lengths = np.concatenate([*dataset.document_lengths()])
    fits = lengths <= SEQ_LEN + 1
    expected = [
        document[1:][dataset.scored(begin + 1, len(document) - 1)].tolist()
        for k in np.flatnonzero(fits).tolist()
        for document, (begin, _) in [(dataset.document(k), dataset.document_range(k))]
    ]
    found: list[list[int]] = []
    for batch in BatchMaker([source], 7).make(all_of(source)):
        assert batch.loss_mask_BM is not None
        assert batch.document_ids_BT is not None
        for targets, mask, ids in zip(batch.targets_BM, batch.loss_mask_BM, batch.document_ids_BT, strict=True):
            assert mask.any(), "each sample teaches something"
            found += [targets[mask & (ids == number)].tolist() for number in ids[mask].unique().tolist()]
    assert sorted(found) == sorted(expected)
    assert all(answer[-1] == dataset.eod_id for answer in found), "the end that an answer has is scored"
    assert source.plan.dropped == Dropped(int((~fits).sum()), 0, 0, int(lengths[~fits].sum()))
    assert (~fits).sum() > 10
    assert f"{(~fits).sum()} have no whole answer" in source.plan.dropped.text(SEQ_LEN)


@pytest.mark.parametrize("kind", ["concat", "concat, documents apart", "packed"])
def test_the_count_of_targets_is_the_masks(kind: str, dataset: Dataset, tmp_path: Path) -> None:
    source = packed(dataset, tmp_path) if kind == "packed" else ConcatSource(dataset, SEQ_LEN, True, kind == "concat")
    maker, every = BatchMaker([source], 4), all_of(source)
    for rows in (slice(0, 1), slice(3, 20), slice(None)):
        masks = [batch.loss_mask_BM for batch in maker.make(every.rows(rows))]
        assert maker.num_targets(every.rows(rows)) == sum(int(mask.sum()) for mask in masks if mask is not None)
    texts = [dataset.token_bytes[batch.targets_BM[batch.loss_mask_BM].numpy()].sum() for batch in maker.make(every)]
    assert source.num_bytes() == sum(texts)


def test_text_is_mixed_with_conversations(dataset: Dataset, tiny_data: TinyData, tmp_path: Path) -> None:
    """In one micro-batch every target of the text counts, and of the conversation the answers."""
    sources = [ConcatSource(open_dataset(tiny_data.prose), SEQ_LEN, True, True), packed(dataset, tmp_path)]
    index = np.array([0, 0])
    both = Samples(np.array([0, 1]), index, index, np.arange(2))
    (batch,) = BatchMaker(sources, 2).make(both)
    assert batch.loss_mask_BM is not None
    assert batch.loss_mask_BM[0].all()
    assert int(batch.loss_mask_BM[1].sum()) == sources[1].num_targets(both.rows(slice(1, 2))) < SEQ_LEN


def test_evaluation_packs_conversations_and_counts_answers(dataset: Dataset, tiny_data: TinyData) -> None:
    objective = NextToken(DataConfig.model_validate({"train": [str(dataset.path)], "seq_len": SEQ_LEN}))
    source = objective.evaluation_source(dataset)
    batches = EvaluationBatches(BatchMaker([source], 4), 0, 1)
    masks = [batch.loss_mask_BM for batch in batches]
    assert batches.num_targets == sum(int(mask.sum()) for mask in masks if mask is not None)
    assert isinstance(source, PackedSource)
    assert isinstance(objective.evaluation_source(open_dataset(tiny_data.prose)), ConcatSource)
    prompts = ConcatSource(dataset, 2)
    each = (all_of(prompts).rows(slice(k, k + 1)) for k in range(prompts.num_samples))
    nothing = next(k for k, one in enumerate(each) if not prompts.num_targets(one))
    assert nothing == 0
    with pytest.raises(DataError, match="Nothing is scored in the samples of"):
        EvaluationBatches(BatchMaker([prompts], 4), 0, 1, limit=1)


def test_conversations_keep_their_tokens(dataset: Dataset, tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path)
    config["data"]["train"] = [{"path": str(dataset.path), "transform": "numpy:sort"}]
    with pytest.raises(ConfigError, match=r"data.train.0.transform: .* says which of its tokens are scored"):
        open_augmentations(RunConfig.model_validate(config), [dataset])
    apart = {"train": [str(dataset.path)], "seq_len": SEQ_LEN, "packing": "best_fit", "document_mask": True}
    assert advice(dataset, DataConfig.model_validate(apart)) is None
    assert "set data.packing=best_fit and data.document_mask=true" in str(
        advice(dataset, DataConfig.model_validate({**apart, "document_mask": False}))
    )


def test_what_was_dropped_is_read_back(dataset: Dataset, tmp_path: Path) -> None:
    plans = [packed(dataset, tmp_path).plan for _ in range(2)]
    assert plans[0].dropped == plans[1].dropped
    assert plans[0].dropped.tokens > 0

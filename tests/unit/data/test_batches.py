from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.batch import document_starts
from megatrain.data import Dataset, open_dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches, TrainingBatches
from megatrain.data.order import DataOrder, Samples, SamplingSettings
from megatrain.errors import DataError
from megatrain.objectives.next_token import ConcatSource
from tests.runs import TinyData

SEQ_LEN = 48


@pytest.fixture(scope="module")
def prose(tiny_data: TinyData) -> Dataset:
    return open_dataset(tiny_data.prose)


@pytest.fixture(scope="module")
def held_out(tiny_data: TinyData) -> Dataset:
    return open_dataset(tiny_data.held_out)


def _all_tokens(dataset: Dataset) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.concatenate([dataset.document(k) for k in range(dataset.num_documents)]).astype(np.int64)


def samples_of(windows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Samples:
    zeros = np.zeros_like(windows)
    return Samples(zeros, zeros, windows, windows)


def test_windows_follow_each_other_targets_are_next_tokens(prose: Dataset) -> None:
    tokens = _all_tokens(prose)
    windows = ConcatSource(prose, SEQ_LEN)
    assert windows.num_samples == (len(tokens) - 1) // SEQ_LEN
    chosen = np.array([0, 7, windows.num_samples - 1])
    (batch,) = BatchMaker([windows], 3).make(samples_of(chosen))
    for row, k in enumerate(chosen.tolist()):
        assert batch.tokens_BT[row].tolist() == tokens[k * SEQ_LEN : (k + 1) * SEQ_LEN].tolist()
        assert batch.targets_BM[row].tolist() == tokens[k * SEQ_LEN + 1 : (k + 1) * SEQ_LEN + 1].tolist()
        assert batch.positions_BT[row].tolist() == list(range(SEQ_LEN))
    assert batch.document_ids_BT is None
    assert batch.loss_mask_BM is None


def test_a_too_short_dataset_is_refused_by_name(tmp_path: Path, held_out: Dataset) -> None:
    with pytest.raises(DataError, match=r"held-out has .* too few for one sample of data\.seq_len=1000000"):
        ConcatSource(held_out, 1_000_000)


def test_a_document_mask_restarts_positions_at_each_document(prose: Dataset) -> None:
    windows = ConcatSource(prose, SEQ_LEN, document_mask=True)
    begins = {prose.document_range(k)[0] for k in range(prose.num_documents)}
    inside = [k for k in range(windows.num_samples) if begins & set(range(k * SEQ_LEN + 1, (k + 1) * SEQ_LEN))]
    exact = [k for k in range(windows.num_samples) if k * SEQ_LEN in begins]
    chosen = np.array([*inside[:20], *exact[:3], 1])
    (batch,) = BatchMaker([windows], len(chosen)).make(samples_of(chosen))
    assert batch.document_ids_BT is not None
    for row, k in enumerate(chosen.tolist()):
        document, position = 0, 0
        for column in range(SEQ_LEN):
            if column > 0 and k * SEQ_LEN + column in begins:
                document, position = document + 1, 0
            assert batch.document_ids_BT[row, column] == document
            assert batch.positions_BT[row, column] == position
            position += 1
    assert inside


@pytest.mark.parametrize("document_mask", [False, True])
def test_targets_after_documents_can_be_left_out(document_mask: bool, prose: Dataset) -> None:
    source = ConcatSource(prose, SEQ_LEN, document_mask, score_after_eod=False)
    every = np.arange(source.num_samples)
    (batch,) = BatchMaker([source], len(every)).make(samples_of(every))
    assert batch.loss_mask_BM is not None
    begins = {prose.document_range(k)[0] for k in range(prose.num_documents)}
    expected = [[k * SEQ_LEN + 1 + t not in begins for t in range(SEQ_LEN)] for k in every.tolist()]
    assert batch.loss_mask_BM.tolist() == expected
    assert bool((batch.tokens_BT[~batch.loss_mask_BM] == prose.eod_id).all())
    inside = source.num_samples * SEQ_LEN
    count = source.num_targets(samples_of(every))
    assert count == sum(map(sum, expected)) == inside - sum(0 < b <= inside for b in begins)


def test_targets_are_counted_without_making_windows(prose: Dataset) -> None:
    source = ConcatSource(prose, SEQ_LEN, score_after_eod=False)
    maker, rng = BatchMaker([source], 64), np.random.default_rng(1)
    for count in (0, 1, 2, 40):
        for windows in (rng.integers(source.num_samples, size=count), 5 + np.arange(count)):
            masks = [batch.loss_mask_BM for batch in maker.make(samples_of(windows))]
            assert source.num_targets(samples_of(windows)) == sum(int(mask.sum()) for mask in masks if mask is not None)


def test_bytes_of_unscored_targets_are_not_counted(prose: Dataset) -> None:
    every, without = ConcatSource(prose, SEQ_LEN), ConcatSource(prose, SEQ_LEN, score_after_eod=False)
    count = every.num_samples * SEQ_LEN
    firsts = [prose.document(k)[0] for k in range(prose.num_documents) if 0 < prose.document_range(k)[0] <= count]
    assert every.num_bytes() == prose.window_bytes(1, count)
    assert every.num_bytes() - without.num_bytes() == int(prose.token_bytes[firsts].sum()) > 0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_and_micro_batches_share_the_global_batch(
    num_ranks: int, micro_batch_size: int, prose: Dataset, held_out: Dataset
) -> None:
    sources = [ConcatSource(prose, SEQ_LEN), ConcatSource(held_out, SEQ_LEN)]
    settings = SamplingSettings(8, (1.0, 1.0), SEQ_LEN, tuple(source.num_samples for source in sources))
    order = DataOrder.begin(3, settings)
    found = []
    for rank in range(num_ranks):
        batches = TrainingBatches(BatchMaker(sources, micro_batch_size), order, rank, num_ranks)
        for step in (0, 1, 5):
            micro = batches.micro_batches(step)
            assert len(micro) == 8 // num_ranks // micro_batch_size
            found += [
                (int(number), tuple(tokens))
                for batch in micro
                for number, tokens in zip(batch.sample_ids_B, batch.tokens_BT.tolist(), strict=True)
            ]
        assert batches.num_targets(0) == 8 * SEQ_LEN
        batches.close()
    parts = [astuple(order.batch(step)) for step in (0, 1, 5)]
    (whole,) = BatchMaker(sources, 24).make(Samples(*map(np.concatenate, zip(*parts, strict=True))))
    expected = zip(whole.sample_ids_B.tolist(), map(tuple, whole.tokens_BT.tolist()), strict=True)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 7, 10_000])
def test_evaluation_scores_each_window_exactly_once(
    num_ranks: int, limit: int | None, prose: Dataset, held_out: Dataset
) -> None:
    sources = [ConcatSource(prose, SEQ_LEN), ConcatSource(held_out, SEQ_LEN)]
    scored: Counter[tuple[int, ...]] = Counter()
    num_targets, lengths = 0, set()
    for rank in range(num_ranks):
        evaluation = EvaluationBatches(BatchMaker(sources, 4), rank, num_ranks, limit)
        batches = list(evaluation)
        lengths.add((len(batches), len(evaluation), evaluation.num_targets))
        for batch in batches:
            mask = (
                torch.ones_like(batch.tokens_BT, dtype=torch.bool) if batch.loss_mask_BM is None else batch.loss_mask_BM
            )
            num_targets += int(mask.sum())
            assert bool((mask.all(dim=1) | ~mask.any(dim=1)).all())
            scored.update(tuple(row) for row, kept in zip(batch.tokens_BT.tolist(), mask[:, 0], strict=True) if kept)
    assert len(lengths) == 1
    total = sum(source.num_samples for source in sources)
    if limit == 7:
        assert num_targets == 8 * SEQ_LEN  # four of each source
    else:
        every = Counter(
            tuple(source.dataset.window(k * SEQ_LEN, SEQ_LEN).tolist())
            for source in sources
            for k in range(source.num_samples)
        )
        assert scored == every
        assert num_targets == total * SEQ_LEN
    assert lengths.pop()[2] == num_targets


def test_a_batch_is_moved_by_one_copy(prose: Dataset) -> None:
    (batch,) = BatchMaker([ConcatSource(prose, SEQ_LEN, True, score_after_eod=False)], 3).make(samples_of(np.arange(3)))
    tensors = [x for x in batch if x is not None]
    own = [name for name in batch._fields if not name.startswith(("source_", "target_places", "pixels", "segments"))]
    assert len(tensors) == len(own)  # of next-token prediction
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    copies = Counter[str]()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            copies[func.name()] += 1
            return func(*args, **(kwargs or {}))

    with Copies():
        moved = batch.to(torch.device("meta"))
    assert copies["aten::_to_copy"] == 1
    assert [(x.shape, x.dtype, x.is_meta) for x in moved if x is not None] == [
        (x.shape, x.dtype, True) for x in tensors
    ]
    assert all(x.is_contiguous() for x in tensors)
    assert batch.document_starts is not None
    assert batch.document_ids_BT is not None
    assert batch.document_starts.tolist() == document_starts(batch.document_ids_BT).tolist()

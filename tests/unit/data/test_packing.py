"""Best-fit packing: what is scored, what is cut, what is left free; and the stored plan, whole, torn or another's."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.batch import Batch
from megatrain.data import Dataset, open_dataset
from megatrain.data import packing as packing_module
from megatrain.data.batches import BatchMaker, EvaluationBatches, TrainingBatches
from megatrain.data.conversations import Documents
from megatrain.data.order import DataOrder, Samples, SamplingSettings
from megatrain.data.packing import PackingPlan, best_fit, open_plan, pack_documents, store_plan
from megatrain.errors import DataError
from megatrain.objectives.next_token import ConcatSource, PackedSource
from tests.runs import TinyData

SEQ_LEN = 64

Ints = NDArray[np.int64]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents of 2 to some 400 tokens, in several shards, some of just SEQ_LEN tokens and around it."""
    folder = tmp_path_factory.mktemp("packing")
    rng = random.Random(3)
    lengths = [*rng.choices(range(1, 400), k=300), *range(SEQ_LEN - 3, SEQ_LEN + 3), 2 * SEQ_LEN - 1, 2 * SEQ_LEN]
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh", k=length))}) + "\n" for length in lengths]
    (folder / "in.jsonl").write_text("".join(lines))
    train_tokenizer([str(folder / "in.jsonl")], 257, folder / "tokenizer.json", ReadOptions())  # bytes alone
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    options = TokenizeOptions(shard_tokens=20_000)
    tokenize([str(folder / "in.jsonl")], folder / "tokenizer.json", folder / "out", options, effort)
    return open_dataset(folder / "out")


def packed(dataset: Dataset, folder: Path, document_mask: bool = False, seq_len: int = SEQ_LEN) -> PackedSource:
    store_plan(dataset, seq_len, folder)
    return PackedSource(dataset, open_plan(dataset, seq_len, folder), document_mask)


def samples_of(windows: Ints) -> Samples:
    zeros = np.zeros_like(windows)
    return Samples(zeros, zeros, windows, windows)


def all_pieces(plan: PackingPlan) -> list[list[tuple[int, int]]]:
    return [list(plan.chunks(sample)) for sample in range(plan.num_samples)]


def best_fit_one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """The textbook's way; the loads of its bins."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [k for k, load in enumerate(loads) if load + size <= capacity]
        if fitting:
            loads[max(fitting, key=lambda k: loads[k])] += size
        else:
            loads.append(size)
    return loads


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=120))))
@settings(max_examples=60, deadline=None)
def test_bins_fill_as_by_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    bins = best_fit(np.array(sizes, dtype=np.int64), capacity)
    loads = np.bincount(bins, weights=sizes) if sizes else np.empty(0)
    assert sorted(loads.tolist()) == sorted(best_fit_one_by_one(sizes, capacity))


@given(st.integers(1, 20), st.lists(st.integers(1, 70), max_size=80))
@settings(max_examples=60, deadline=None)
def test_every_pair_in_a_document_scores_once(seq_len: int, lengths: list[int]) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    documents = Documents(starts, sizes, np.zeros_like(sizes))
    batch = pack_documents(documents, seq_len)
    scored: list[int] = []
    for row in batch.to_pylist():
        assert row["targets"] == sum(row["piece_targets"]) > 0
        assert sum(min(targets + 1, seq_len) for targets in row["piece_targets"]) <= seq_len, "a sample is overfull"
        for start, targets in zip(row["piece_start"], row["piece_targets"], strict=True):
            scored += range(start, start + targets)
    expected = [at for start, length in zip(starts, lengths, strict=True) for at in range(start, start + length - 1)]
    assert sorted(scored) == expected, "inputs whose target is scored: all but the last token of each document"
    pieces = {
        (start, targets + 1)
        for row in batch.to_pylist()
        for start, targets in zip(row["piece_start"], row["piece_targets"], strict=True)
    }
    short = (sizes > 1) & (sizes <= seq_len)
    whole = set(zip(starts[short].tolist(), sizes[short].tolist(), strict=True))
    assert whole <= pieces, "a document that fits is one piece"
    assert batch.equals(pack_documents(documents, seq_len))


@pytest.mark.parametrize("document_mask", [False, True])
def test_batches_hold_documents_and_score_only_their_pairs(
    document_mask: bool, dataset: Dataset, tmp_path: Path
) -> None:
    source = packed(dataset, tmp_path, document_mask)
    every = np.arange(source.num_samples)
    scored: list[tuple[int, int]] = []
    for batch in BatchMaker([source], 7).make(samples_of(every)):
        assert batch.loss_mask_BM is not None
        assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BM[:, :-1]), "a target is the next input"
        scored += zip(
            batch.tokens_BT[batch.loss_mask_BM].tolist(), batch.targets_BM[batch.loss_mask_BM].tolist(), strict=True
        )
        ends_BT = batch.tokens_BT == dataset.eod_id
        assert not (batch.loss_mask_BM & ends_BT).any(), "nothing is asked behind the end of a document"
        if document_mask:
            check_documents(batch, ends_BT)
        else:
            assert batch.document_ids_BT is None
    pairs = []
    for k in range(dataset.num_documents):
        tokens = dataset.document(k).tolist()
        pairs += pairwise(tokens)
    assert sorted(scored) == sorted(pairs)
    assert source.num_targets(samples_of(every)) == len(pairs) == dataset.num_tokens - dataset.num_documents


def check_documents(batch: Batch, ends_BT: torch.Tensor) -> None:
    """Documents of a sample, and the filling behind them, do not see one another."""
    assert batch.document_ids_BT is not None and batch.loss_mask_BM is not None
    same = batch.document_ids_BT[:, 1:] == batch.document_ids_BT[:, :-1]
    assert ends_BT[:, :-1][~same].all(), "what follows another document follows its end"
    for ids, scored, positions in zip(batch.document_ids_BT, batch.loss_mask_BM, batch.positions_BT, strict=True):
        for number in ids.unique():
            mine = ids == number
            assert positions[mine].tolist() == list(range(int(mine.sum()))), "positions start anew at each document"
            outside = mine & ~scored
            assert outside.sum() <= 1 or outside.sum() == mine.sum(), "all scored but the last, or filling"


def test_samples_are_full_and_cut_only_overlong_documents(
    dataset: Dataset, tiny_data: TinyData, tmp_path: Path
) -> None:
    for source in (packed(dataset, tmp_path), packed(open_dataset(tiny_data.prose), tmp_path, seq_len=512)):
        pieces = all_pieces(source.plan)
        begins = {start for sample in pieces for start, _ in sample}
        for k in range(source.dataset.num_documents):
            start, stop = source.dataset.document_range(k)
            inside = sum(start <= begin < stop for begin in begins)
            assert inside == max(1, -(-(stop - start - 1) // source.seq_len))
        used = sum(min(targets + 1, source.seq_len) for sample in pieces for _, targets in sample)
        assert used > 0.98 * source.num_samples * source.seq_len


def test_data_ranks_share_a_global_batch_of_targets(dataset: Dataset, tmp_path: Path) -> None:
    source = packed(dataset, tmp_path)
    order = DataOrder.begin(5, SamplingSettings(12, (1.0,), SEQ_LEN, (source.num_samples,)))
    ranks = [TrainingBatches(BatchMaker([source], 2), order, rank, 3) for rank in range(3)]
    for step in (0, 1, 2, 20, 1000):
        counts = {rank.num_targets(step) for rank in ranks}
        masks = [batch.loss_mask_BM for rank in ranks for batch in rank.micro_batches(step)]
        assert counts == {sum(int(mask.sum()) for mask in masks if mask is not None)}
    for rank in ranks:
        rank.close()


def test_evaluating_packed_samples_scores_each_target_once(dataset: Dataset, tmp_path: Path) -> None:
    source = packed(dataset, tmp_path)
    ranks = [EvaluationBatches(BatchMaker([source], 4), rank, 3) for rank in range(3)]
    masks = [batch.loss_mask_BM for rank in ranks for batch in rank]
    expected = dataset.num_tokens - dataset.num_documents
    assert sum(int(mask.sum()) for mask in masks if mask is not None) == ranks[0].num_targets == expected


def test_concat_windows_need_no_mask(dataset: Dataset) -> None:
    maker = BatchMaker([ConcatSource(dataset, SEQ_LEN)], 4)
    chosen = np.arange(8)
    assert [batch.loss_mask_BM for batch in maker.make(samples_of(chosen))] == [None, None]
    assert maker.num_targets(samples_of(chosen)) == 8 * SEQ_LEN


def test_many_blocks_hold_every_pair_too(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "BLOCK_DOCUMENTS", 50)
    source = packed(dataset, tmp_path)
    every = np.arange(source.num_samples)
    assert source.num_targets(samples_of(every)) == dataset.num_tokens - dataset.num_documents
    each = [sum(targets for _, targets in pieces) for pieces in all_pieces(source.plan)]
    assert [source.num_targets(samples_of(every[k : k + 1])) for k in every] == each
    begins = [start for pieces in all_pieces(source.plan) for start, _ in pieces]
    assert len(begins) == len(set(begins))


def test_a_plan_is_made_once_and_reproducible(dataset: Dataset, tmp_path: Path) -> None:
    assert store_plan(dataset, SEQ_LEN, tmp_path / "a")
    assert not store_plan(dataset, SEQ_LEN, tmp_path / "a")
    assert store_plan(dataset, SEQ_LEN, tmp_path / "b")
    (first,), (second,) = list((tmp_path / "a").iterdir()), list((tmp_path / "b").iterdir())
    assert first.read_bytes() == second.read_bytes()


def test_a_torn_or_foreign_plan_is_made_again(dataset: Dataset, tmp_path: Path) -> None:
    store_plan(dataset, SEQ_LEN, tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    store_plan(dataset, SEQ_LEN // 2, tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    rng = random.Random(1)
    flipped = [bytearray(good) for _ in range(12)]
    for data in flipped:
        data[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    torn = [b"", good[:7], good[:16], good[: len(good) // 2], good[:-1], good + b"\0"]
    for bad in [*torn, *map(bytes, flipped), other.read_bytes()]:
        path.write_bytes(bad)
        (tmp_path / f".{path.name}.tmp").write_bytes(bad)
        assert store_plan(dataset, SEQ_LEN, tmp_path), "it was taken for good"
        assert path.read_bytes() == good
        assert sorted(tmp_path.iterdir()) == sorted([path, other.parent]), "what a kill left half done is gone"


def test_a_missing_or_unwritable_plan_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=dataset.digest):
        open_plan(dataset, SEQ_LEN, tmp_path)
    (tmp_path / "packing").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        store_plan(dataset, SEQ_LEN, tmp_path / "packing")

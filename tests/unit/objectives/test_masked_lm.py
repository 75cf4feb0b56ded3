"""What is asked of an encoder, and what it reads instead, in real samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertForMaskedLM

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.units import ReadOptions
from megatrain.batch import Batch
from megatrain.config import DataConfig, MaskedLMConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches, TrainingBatches
from megatrain.data.order import DataOrder, Samples, SamplingSettings
from megatrain.data.sample import Sample
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.masked_lm import MaskedLM, MaskedSource
from megatrain.train.convert import import_folder
from megatrain.train.evaluation import evaluate_checkpoint
from tests.runs import TinyData
from tests.tiny_data import QUIET

SEQ_LEN = 96


@pytest.fixture(scope="module")
def dataset(masked_data: TinyData) -> Dataset:
    return open_dataset(masked_data.prose)


@pytest.fixture(scope="module")
def source(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> MaskedSource:
    return source_of(dataset, tmp_path_factory.mktemp("plan"))


def source_of(dataset: Dataset, folder: Path, seed: int = 1, **config: Any) -> MaskedSource:
    settings = DataConfig.model_validate({"train": [str(dataset.path)], "seq_len": SEQ_LEN})
    objective = MaskedLM(settings, MaskedLMConfig(**config), seed)
    objective.store_plans([dataset], folder)
    source = objective.training_source(dataset, folder, None)
    assert isinstance(source, MaskedSource)
    assert objective.num_samples(dataset) == source.num_samples
    return source


def places_of(source: MaskedSource, first: int = 0) -> Samples:
    every = np.arange(source.num_samples)
    return Samples(0 * every, 0 * every, every, first + every)


def asked(sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places and targets that are scored."""
    assert sample.target_places_M is not None and sample.loss_mask_M is not None
    return sample.target_places_M[sample.loss_mask_M], sample.targets_M[sample.loss_mask_M]


def original(sample: Sample) -> NDArray[np.int64]:
    """The tokens before any was hidden."""
    places, targets = asked(sample)
    tokens = sample.tokens_T.copy()
    tokens[places] = targets
    return tokens


def test_each_document_is_packed_alone_with_its_ends(source: MaskedSource, dataset: Dataset) -> None:
    """All of every document once an epoch: pieces from shard to shard, each between [CLS] and [SEP]."""
    found: list[tuple[int, ...]] = []
    for index in range(source.num_samples):
        sample = source.sample(index, 0, index)
        tokens = original(sample)
        assert sample.document_ids_T is not None
        for number in range(sample.document_ids_T.max() + 1):
            piece = tokens[sample.document_ids_T == number]
            if piece[0] == dataset.eod_id:  # the free space
                assert set(piece.tolist()) == {dataset.eod_id}
                continue
            assert (piece[0], piece[-1]) == (dataset.bos_id, dataset.eod_id)
            assert sample.positions_T[sample.document_ids_T == number].tolist() == list(range(len(piece)))
            found.append(tuple(piece[1:-1].tolist()))
    assert dataset.manifest.num_shards > 3
    expected = []
    for k in range(dataset.num_documents):
        text = dataset.document(k)[1:-1].tolist()
        expected += [tuple(text[at : at + SEQ_LEN - 2]) for at in range(0, len(text), SEQ_LEN - 2)]
    assert sorted(found) == sorted(expected)


def test_targets_are_text_at_the_asked_rate(source: MaskedSource, dataset: Dataset) -> None:
    """Over a million tokens: no control token is asked or put in; 80% are masked, 10% random, 10% as they were."""
    special = {*dataset.tokenizer.control.values(), dataset.bos_id, dataset.eod_id}
    mask_id = dataset.tokenizer.ids["[MASK]"]
    num_text = num_asked = num_masked = num_kept = num_tokens = 0
    number = 0
    while num_tokens < 1_000_000:
        for index in range(source.num_samples):
            sample = source.sample(index, 0, number)
            places, targets = asked(sample)
            seen = sample.tokens_T[places]
            assert special.isdisjoint(targets.tolist())
            assert special.isdisjoint(seen[seen != mask_id].tolist())
            assert seen.max() < dataset.vocab_size
            assert len(set(places.tolist())) == len(places)
            num_text += int(np.isin(original(sample), list(special), invert=True).sum())
            num_asked, num_masked = num_asked + len(places), num_masked + int((seen == mask_id).sum())
            num_kept += int((seen == targets).sum())
            number, num_tokens = number + 1, num_tokens + SEQ_LEN
    assert abs(num_asked / num_text - 0.15) < 3 * (0.15 * 0.85 / num_text) ** 0.5 + 0.003  # at least one a sample
    assert abs(num_masked / num_asked - 0.8) < 3 * (0.8 * 0.2 / num_asked) ** 0.5
    chance = 0.1 / (dataset.vocab_size - len(special))  # that a random token is the token itself
    assert abs(num_kept / num_asked - 0.1 - chance) < 3 * (0.1 * 0.9 / num_asked) ** 0.5


def test_a_mask_follows_from_seed_and_place(source: MaskedSource, dataset: Dataset, tmp_path: Path) -> None:
    def lists(sample: Sample) -> list[list[int]]:
        return [x.tolist() for x in asked(sample)] + [sample.tokens_T.tolist()]

    assert lists(source.sample(3, 0, 50)) == lists(source.sample(3, 0, 50))
    assert lists(source.sample(3, 1, 50 + source.num_samples)) != lists(source.sample(3, 0, 50)), "a new epoch"
    assert lists(source_of(dataset, tmp_path, seed=2).sample(3, 0, 50)) != lists(source.sample(3, 0, 50))
    settings = DataConfig.model_validate({"train": [str(dataset.path)], "seq_len": SEQ_LEN})
    evaluated = [MaskedLM(settings, MaskedLMConfig(), seed).evaluation_source(dataset) for seed in (1, 2)]
    assert lists(evaluated[0].sample(3, 0, 3)) == lists(evaluated[1].sample(3, 0, 3)), "whatever the run's seed"


def test_words_are_asked_whole_or_not(dataset: Dataset, tmp_path: Path) -> None:
    """By the tokenizer's own word ids, of each document's text; the rate of tokens stays."""
    source = source_of(dataset, tmp_path, whole_word_mask=True)
    num_asked = num_text = num_longer = 0
    for index in range(source.num_samples):
        sample = source.sample(index, 0, index)
        tokens, is_asked = original(sample), np.zeros(SEQ_LEN, dtype=bool)
        is_asked[asked(sample)[0]] = True
        assert sample.document_ids_T is not None
        for number in range(sample.document_ids_T.max() + 1):
            inside = np.flatnonzero(sample.document_ids_T == number)[1:-1]
            encoding = dataset.tokenizer._library.encode(dataset.tokenizer.decode(tokens[inside].tolist()))
            if encoding.ids != tokens[inside].tolist():  # a piece that begins within a character
                continue
            words = np.array(encoding.word_ids)
            for word in set(words.tolist()):
                chosen = is_asked[inside[words == word]]
                assert chosen.all() or not chosen.any()
                num_longer += len(chosen) > 1 and bool(chosen.all())
            num_text += len(inside)
        num_asked += int(is_asked.sum())
    assert num_longer > 100
    assert abs(num_asked / num_text - 0.15) < 0.01
    samples = places_of(source, first=7)
    made = [source.sample(index, 0, number) for index, number in zip(samples.index, samples.number, strict=True)]
    assert source.num_targets(samples) == sum(len(asked(sample)[0]) for sample in made)


def test_a_batch_has_a_fixed_number_of_targets(source: MaskedSource) -> None:
    """So nothing on the device depends on how many are scored, which the plan says."""
    samples = places_of(source)
    batches = BatchMaker([source], 4).make(samples)
    assert {batch.targets_BM.shape[1] for batch in batches} == {round(0.15 * (SEQ_LEN - 2))}
    masks = [batch.loss_mask_BM for batch in batches]
    assert source.num_targets(samples) == sum(int(mask.sum()) for mask in masks if mask is not None)
    whole = [source.num_targets(samples.rows(slice(k, k + 1))) for k in range(source.num_samples)]
    assert min(whole) >= 1
    assert sum(whole) == source.num_targets(samples)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_ask_the_same_of_a_global_batch(num_ranks: int, source: MaskedSource, dataset: Dataset) -> None:
    order = DataOrder.begin(3, SamplingSettings(8, (1.0,), SEQ_LEN, (source.num_samples,), (source.plan.checksum,)))
    ranks = [TrainingBatches(BatchMaker([source], 2), order, rank, num_ranks) for rank in range(num_ranks)]
    (whole,) = BatchMaker([source], 8).make(order.batch(41))
    parts = [batch for rank in ranks for batch in rank.micro_batches(41)]
    for name in Batch._fields:
        if name != "document_starts" and getattr(whole, name) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for rank in ranks:
        rank.close()


def test_evaluation_asks_the_same_on_any_ranks(source: MaskedSource) -> None:
    few = replace(source, seed=0)

    def asked_on(num_ranks: int) -> list[tuple[int, list[int], list[int]]]:
        ranks = [EvaluationBatches(BatchMaker([few], 4), rank, num_ranks) for rank in range(num_ranks)]
        found = []
        for batch in (batch for rank in ranks for batch in rank):
            assert batch.loss_mask_BM is not None and batch.target_places_BM is not None
            rows = zip(batch.sample_ids_B, batch.target_places_BM, batch.targets_BM, batch.loss_mask_BM, strict=True)
            found += [(int(n), at[mask].tolist(), to[mask].tolist()) for n, at, to, mask in rows if mask.any()]
        assert sum(len(targets) for _, _, targets in found) == ranks[0].num_targets
        return found

    assert asked_on(1) == asked_on(3) == asked_on(2)
    assert len(asked_on(1)) == source.num_samples


def test_datasets_that_cannot_be_masked_are_refused(tiny_data: TinyData, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no token that begins its documents.*--bos-token '\[CLS\]'"):
        source_of(open_dataset(tiny_data.prose), tmp_path)
    with pytest.raises(ConfigError, match=r"objective.masked_lm.mask_token: <mask> given; it must be an added token"):
        source_of(dataset, tmp_path, mask_token="<mask>").sample(0, 0, 0)


def test_text_without_spaces_has_no_words(dataset: Dataset, tmp_path: Path) -> None:
    """It would train on nothing."""
    text = b"".join(orjson.dumps({"text": chr(0x4E00 + k) * 40}) + b"\n" for k in range(9))
    (tmp_path / "text.jsonl").write_bytes(text)
    options = TokenizeOptions(ReadOptions(), "[SEP]", "[CLS]")
    tokenize([str(tmp_path / "text.jsonl")], dataset.tokenizer_path, tmp_path / "set", options, QUIET)
    source_of(open_dataset(tmp_path / "set"), tmp_path)
    with pytest.raises(DataError, match="has no word that can be selected in its first 8 samples: each has more"):
        source_of(open_dataset(tmp_path / "set"), tmp_path, whole_word_mask=True)


def test_samples_without_text_are_not_evaluated(dataset: Dataset, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=dataset.vocab_size, **sizes)).save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"--seq-len 2: a sample of masked_lm has a token and what .* Give 3 or more"):
        evaluate_checkpoint(tmp_path / "bert", dataset.path, 2, show_progress=False)

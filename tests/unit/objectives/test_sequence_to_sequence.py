"""Pairs in samples: each whole, in one sample of an epoch, and seen by itself."""

from __future__ import annotations

import random
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.supervised import SourceAndTarget
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from data_tools.units import ReadOptions
from data_tools.verify import verify_dataset
from megatrain.config import DataConfig, ObjectiveConfig, RunConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.dataset import require_same_tokenizer
from megatrain.data.order import Samples
from megatrain.data.vocabulary import resolve_vocabulary
from megatrain.errors import ConfigError, DataError
from megatrain.objectives.sequence_to_sequence import PairSource, SequenceToSequence
from megatrain.objectives.span_corruption import SpanCorruption
from tests.runs import TinyData, tiny_config
from tests.supervised import make_answers
from tests.tiny_data import silent

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
    assert f"{len(expected) - len(fitting)} pairs of " in (samples.left_out or "")
    assert "fit into data.seq_len=64, or their targets into objective.target_len=40" in (samples.left_out or "")
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


@pytest.fixture(scope="module")
def two_tokenizers(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same pairs; targets have more tokens than sources, and padding."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "targets.txt").write_text("x" * 30 + "question")
    train_tokenizer([str(folder / "targets.txt")], 262, folder / "target.json", ReadOptions(), ["<pad>"])
    target = load_tokenizer(folder / "target.json", END_TEXT)
    supervision = SourceAndTarget(END_TEXT, None, target)
    return open_dataset(make_answers(folder, make_pairs(), dataset.tokenizer_path, supervision))


def test_each_side_has_its_own_tokenizer(dataset: Dataset, two_tokenizers: Dataset, tmp_path: Path) -> None:
    samples, target = source_of(two_tokenizers, tmp_path), two_tokenizers.target_tokenizer
    assert (two_tokenizers.vocab_size, two_tokenizers.target_vocab_size) == (257, target.vocab_size)
    assert target.vocab_size > 257
    found = [pair for index in range(samples.num_samples) for pair in samples.pairs(index)]
    of_one = {tuple(source.tolist()) for source, _ in all_pairs(dataset, tmp_path / "one")}
    assert {tuple(source.tolist()) for source, _ in found} >= of_one  # shorter targets: more of them fit
    texts = {target.decode(ids[:-1].tolist()) for _, ids in found}
    assert texts == {text for _, text in make_pairs()}
    assert {int(ids[-1]) for _, ids in found} == {two_tokenizers.target_eod_id}
    sample = samples.sample(0, 0, 0)
    assert sample.tokens_T[0] == target.added["<pad>"]
    assert two_tokenizers.text_of(two_tokenizers.document(0)) == END_TEXT.join(make_pairs()[0])
    assert samples.num_bytes() == sum(len(target.decode(ids[:-1].tolist())) for _, ids in found)


def all_pairs(dataset: Dataset, folder: Path) -> list[tuple[Any, Any]]:
    folder.mkdir()
    samples = source_of(dataset, folder)
    return [pair for index in range(samples.num_samples) for pair in samples.pairs(index)]


def test_a_model_of_one_vocabulary_refuses_two(
    dataset: Dataset, two_tokenizers: Dataset, tiny_data: TinyData, tmp_path: Path
) -> None:
    """And what was tokenized with another tokenizer of targets than the rest."""
    model = {"family": "marian", "num_key_value_heads": None, "share_encoder_decoder_embeddings": False}
    given = tiny_config(tiny_data, tmp_path / "run", objective={"type": "sequence_to_sequence"})
    configs = {
        name: RunConfig.model_validate({**given, "model": {**given["model"], **model, "vocab_size": None, **keys}})
        for name, keys in {
            "open": {},
            "shared": {"share_encoder_decoder_embeddings": True},
            "small": {"decoder_vocab_size": 257},
        }.items()
    }
    resolved = resolve_vocabulary(configs["open"], two_tokenizers).model
    assert (resolved.vocab_size, resolved.target_vocab_size) == (257, two_tokenizers.target_vocab_size)
    with pytest.raises(ConfigError, match="share_encoder_decoder_embeddings=false"):
        resolve_vocabulary(configs["shared"], two_tokenizers)
    with pytest.raises(ConfigError, match=r"model\.decoder_vocab_size is 257"):
        resolve_vocabulary(configs["small"], two_tokenizers)
    data = configs["open"].data
    with pytest.raises(ConfigError, match="span corruption reads one text"):
        SpanCorruption(ObjectiveConfig(), data, seed=0).refuse_unsuited(two_tokenizers)
    with pytest.raises(DataError, match="--target-tokenizer"):
        require_same_tokenizer([two_tokenizers, dataset])


def test_verify_finds_another_target_tokenizer(two_tokenizers: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_tokenizers.path, copy)
    verify_dataset(str(copy), silent)
    (copy / "target_tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"target_tokenizer\.json"):
        verify_dataset(str(copy), silent)

"""What a classifier of texts reads, and what it is asked: each text alone, with its label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_tools.labeled import LabeledText
from megatrain.config import DataConfig, ModelConfig, ObjectiveConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.order import Samples
from megatrain.data.sample import Sample, Source
from megatrain.errors import ConfigError
from megatrain.objectives import make_objective
from megatrain.objectives.sequence_classification import shares
from tests.labeled_data import CLASSIFIER, NUM_LABELS, make_labeled
from tests.runs import TinyData

SEQ_LEN = 48
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, **CLASSIFIER}


def source_of(dataset: Dataset, folder: Path, seq_len: int = SEQ_LEN, **model: int) -> Source:
    settings = DataConfig.model_validate({"train": [str(dataset.path)], "seq_len": seq_len})
    objective = make_objective(ObjectiveConfig(), ModelConfig(**{**SIZES, **model}), settings, seed=1)
    objective.store_plans([dataset], folder)
    source = objective.training_source(dataset, folder, None)
    assert objective.num_samples(dataset) == source.num_samples
    return source


def texts_of(sample: Sample) -> list[tuple[list[int], int]]:
    """Tokens and label of each text that is asked."""
    assert sample.target_places_M is not None and sample.document_ids_T is not None
    found = []
    for place, label, counts in zip(sample.target_places_M, sample.targets_M, sample.loss_mask_M, strict=True):  # type: ignore[arg-type]
        if counts:
            is_here = sample.document_ids_T == sample.document_ids_T[place]
            assert sample.positions_T[is_here].tolist() == list(range(int(is_here.sum())))
            found.append((sample.tokens_T[is_here].tolist(), int(label)))
    return found


def test_each_text_is_asked_once_with_its_label(labeled_data: TinyData, tmp_path: Path) -> None:
    """Over borders of shards; a pair that is too long is cut as the library of tokenizers cuts it."""
    dataset = open_dataset(labeled_data.prose)
    source = source_of(dataset, tmp_path)
    assert dataset.num_shards > 1 and dataset.label_names == [str(number) for number in range(NUM_LABELS)]
    assert dataset.bos_id is not None
    library = tokenizers.Tokenizer.from_file(str(labeled_data.tokenizer))
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", dataset.eod_id), ("[CLS]", dataset.bos_id))
    library.enable_truncation(SEQ_LEN, strategy="longest_first")
    expected, num_cut = [], 0
    for line in Path(str(labeled_data.prose) + ".jsonl").read_text().splitlines():
        row = json.loads(line)
        encoded = library.encode(row["text"], row["other"])
        expected.append((encoded.ids, int(row["label"])))
        num_cut += bool(encoded.overflowing)
    assert num_cut > 5
    samples = [source.sample(index, 0, index) for index in range(source.num_samples)]
    assert sorted(text for sample in samples for text in texts_of(sample)) == sorted(expected)
    every = np.arange(source.num_samples)
    places = Samples(0 * every, 0 * every, every, every)
    assert source.num_targets(places) == dataset.num_documents
    assert sum(SEQ_LEN - len(ids) for sample in samples for ids, _ in texts_of(sample)[:1]) > 0
    share = sum(len(ids) for ids, _ in expected) / (source.num_samples * SEQ_LEN)
    assert share > 0.9


def test_the_second_text_is_another_segment(labeled_data: TinyData, tmp_path: Path) -> None:
    dataset = open_dataset(labeled_data.held_out)
    source = source_of(dataset, tmp_path)
    for index in range(source.num_samples):
        sample = source.sample(index, 0, 0)
        assert sample.segments_T is not None and sample.document_ids_T is not None
        for number in range(len(texts_of(sample))):
            is_here = sample.document_ids_T == number
            ends = np.flatnonzero(sample.tokens_T[is_here] == dataset.eod_id)
            assert len(ends) == 2
            assert sample.segments_T[is_here].tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])


def test_a_single_long_text_keeps_its_ends(labeled_data: TinyData, tmp_path: Path) -> None:
    rows = [{"text": "one two three " * 30, "label": "long"}, {"text": "[SEP] is text", "label": "short"}]
    dataset = open_dataset(make_labeled(rows, labeled_data.tokenizer, tmp_path / "single", LabeledText("[SEP]")))
    source = source_of(dataset, tmp_path, num_labels=2)
    found = [text for index in range(source.num_samples) for text in texts_of(source.sample(index, 0, 0))]
    for ids, _ in found:
        assert (ids[0], ids[-1]) == (dataset.bos_id, dataset.eod_id)
        assert not {dataset.bos_id, dataset.eod_id} & set(ids[1:-1])
    assert sorted(len(ids) == SEQ_LEN for ids, _ in found) == [False, True]
    assert source.sample(0, 0, 0).segments_T is None


@pytest.mark.parametrize(
    ("first", "second", "room"), [(10, 50, 40), (50, 10, 40), (30, 31, 41), (50, 50, 7), (3, 90, 9)]
)
def test_long_pairs_are_cut_longest_first(first: int, second: int, room: int) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.enable_truncation(room, strategy="longest_first")
    ids = library.encode("a " * first, "b " * second).ids
    assert shares(first, second, room) == (ids.count(0), ids.count(1))


def test_what_cannot_be_classified_is_refused(labeled_data: TinyData, tiny_data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no labels, which classification needs: tokenize the texts"):
        source_of(open_dataset(tiny_data.prose), tmp_path)
    with pytest.raises(ConfigError, match=r"two segments: model.type_vocab_size must be 2 or more \(it is 1\)"):
        source_of(open_dataset(labeled_data.prose), tmp_path, type_vocab_size=1)
    with pytest.raises(ConfigError, match=r"data.seq_len is 4, .* a sample holds something from 5 tokens on"):
        source_of(open_dataset(labeled_data.prose), tmp_path, seq_len=4)

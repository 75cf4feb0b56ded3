"""Span corruption: source and target rebuild the text, in the share and the spans that are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megatrain.config import DataConfig, ObjectiveConfig, RunConfig
from megatrain.config.corruption import corrupted_lengths, lengths_of
from megatrain.config.schema import Spans
from megatrain.data import open_dataset
from megatrain.errors import ConfigError
from megatrain.objectives.span_corruption import SpanCorruption, corrupt
from tests.runs import TinyData, tiny_config

SENTINELS, END = tuple(range(999, 899, -1)), 0


def rebuilt(source: list[int], target: list[int], sentinels: tuple[int, ...]) -> list[int]:
    """The text, by putting what stands behind each sentinel of the target in its place."""
    assert source[-1] == target[-1] == END
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[last := token] = []
        else:
            spans[last].append(token)
    assert list(spans) == list(sentinels[: len(spans)])
    return [part for token in source[:-1] for part in spans.get(token, [token])]


@pytest.mark.parametrize("corrupted", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("num_tokens", [*range(1, 21), 100, 568])
def test_source_and_target_rebuild_the_text(num_tokens: int, corrupted: float) -> None:
    text, lengths = np.arange(1, num_tokens + 1), lengths_of(num_tokens, corrupted, 3.0)
    for seed in range(5):
        source, target = corrupt(text, lengths, SENTINELS, END, np.random.default_rng(seed))
        assert rebuilt(source.tolist(), target.tolist(), SENTINELS) == text.tolist()
        assert (len(source), len(target)) == (lengths.source, lengths.target)


def test_lengths_are_those_of_t5() -> None:
    """512 tokens of source and 114 of target: google-research/text-to-text-transfer-transformer's defaults."""
    lengths = corrupted_lengths(512, Spans())
    assert (lengths.text, lengths.source, lengths.target) == (568, 512, 114)
    assert lengths.num_moved == round(0.15 * 568)
    assert lengths.num_spans == round(lengths.num_moved / 3)


@pytest.mark.parametrize("seq_len", [3, 4, 17, 300])
@pytest.mark.parametrize("spans", [Spans(), Spans(corrupted=0.4, mean_span_tokens=1.0), Spans(mean_span_tokens=20.0)])
def test_a_text_fills_its_source(seq_len: int, spans: Spans) -> None:
    assert corrupted_lengths(seq_len, spans).source == seq_len


def test_spans_that_leave_nothing_between_are_refused(tmp_path: Path) -> None:
    config = tiny_config(TinyData(*[tmp_path] * 4), tmp_path)
    config["model"] |= {"family": "t5", "num_key_value_heads": None}
    config["objective"] = {"span_corruption": {"corrupted": 0.6, "mean_span_tokens": 1.0}}
    with pytest.raises(ValidationError, match=r"objective.span_corruption.mean_span_tokens: 1.0 given; spans so short"):
        RunConfig.model_validate(config)


@pytest.mark.parametrize(
    ("section", "given", "words"),
    [
        ("train", {"precision": "fp16"}, r"train.precision: fp16 given; overflows in the layers of family t5"),
        ("data", {"document_mask": True}, r"data.document_mask: .* not read where objective.type is span_corruption"),
        ("data", {"packing": "best_fit"}, r"data.packing: .* not read where objective.type is span_corruption"),
        (
            "objective",
            {"span_corruption": {"corrupted": 0.8}},
            r"data.seq_len: 64 given; makes targets of 1\d\d",
        ),
        ("objective", {"type": "sequence_to_sequence", "target_len": 65}, r"objective.target_len: 65 given; must be"),
    ],
)
def test_what_a_t5_cannot_have_is_refused(section: str, given: dict[str, object], words: str, tmp_path: Path) -> None:
    config = tiny_config(TinyData(*[tmp_path] * 4), tmp_path)
    config["model"] |= {"family": "t5", "num_key_value_heads": None}
    config[section] = {**config.get(section, {}), **given}
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(config)


def test_every_place_of_the_run_has_other_spans(sentinel_data: Path) -> None:
    dataset = open_dataset(sentinel_data)
    objective = SpanCorruption(ObjectiveConfig(), DataConfig(train=({"path": "x"},), seq_len=40), seed=3)  # type: ignore[arg-type]
    source = objective.training_source(dataset, Path(), None)
    first, again, later = (source.sample(2, epoch, number) for epoch, number in ((0, 5), (0, 5), (1, 77)))
    assert first.source_tokens_S is not None and later.source_tokens_S is not None
    assert np.array_equal(first.tokens_T, again.tokens_T)
    assert not np.array_equal(first.tokens_T, later.tokens_T)
    ids = dataset.tokenizer.ids
    assert {ids["<extra_id_0>"], dataset.eod_id} <= set(first.source_tokens_S.tolist())
    sentinels = [ids[f"<extra_id_{k}>"] for k in range(20)]  # by their names, whatever their ids
    found = [token for token in first.targets_M.tolist() if token in sentinels]
    assert found == sentinels[: len(found)] and len(found) > 1
    assert first.tokens_T[0] == dataset.eod_id  # the tokenizer has no <pad>
    assert np.array_equal(first.tokens_T[1:], first.targets_M[:-1])
    assert len(first.source_tokens_S) == 40
    evaluated = objective.evaluation_source(dataset)
    assert evaluated.num_bytes() == sum(
        int(dataset.token_bytes[evaluated.sample(k, 0, k).targets_M].sum()) for k in range(evaluated.num_samples)
    )


def test_too_few_sentinels_are_refused_by_key(sentinel_data: Path) -> None:
    data = DataConfig(train=({"path": "x"},), seq_len=600)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"objective.span_corruption.sentinel_token: .* has 20 sentinels, .* has 33 spans"
    ):
        SpanCorruption(ObjectiveConfig(), data, 3).training_source(open_dataset(sentinel_data), Path(), None)

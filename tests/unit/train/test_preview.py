"""What a check of a config finds in its datasets, before a run starts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data_tools.supervised import SourceAndTarget
from megatrain.config import RunConfig
from megatrain.errors import DataError, MegatrainError
from megatrain.train.preview import check_data, length
from tests.labeled_data import CLASSIFIER
from tests.runs import TinyData, tiny_config
from tests.supervised import make_answers

ALONE = {"packing": "best_fit", "document_mask": True}
BERT: dict[str, Any] = {"family": "bert", "num_key_value_heads": None}
T5 = {**BERT, "family": "t5"}
VIT = {**BERT, "family": "vit", "image_size": 28, "patch_size": 4, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("model", "data", "objective", "words"),
    [
        (BERT, ALONE, {}, "has no token that begins its documents"),
        (CLASSIFIER, ALONE, {}, "has no labels"),
        (T5, {}, {}, "sentinel_token: <extra_id_0> given"),
        (T5, {}, {"type": "sequence_to_sequence"}, "has no pairs of a source and a target"),
        (VIT, {"seq_len": 50}, {}, "is a dataset of tokenized text"),
    ],
)
def test_unsuited_datasets_are_refused(
    model: dict[str, Any], data: dict[str, Any], objective: dict[str, Any], words: str, tiny_data: TinyData
) -> None:
    given = tiny_config(tiny_data, Path("run"), model=model, data=data, objective=objective)
    with pytest.raises(MegatrainError, match=words):
        check_data("text", RunConfig.model_validate(given))


def test_datasets_without_a_sample_are_refused(tmp_path: Path) -> None:
    pairs = make_answers(tmp_path, [("a source", "target")] * 3, None, SourceAndTarget("<|endoftext|>"))
    data, objective = {"train": [str(pairs)], "validation": [], "seq_len": 8}, {"type": "sequence_to_sequence"}
    given = tiny_config(TinyData(*[pairs] * 4), Path("run"), model=T5, objective=objective)
    for seq_len in (9, 8):
        config = RunConfig.model_validate({**given, "data": {**data, "seq_len": seq_len}})
        with pytest.raises(DataError, match=r"No pair of .* fits into a sample") if seq_len == 8 else nullcontext():
            assert length(config) is not None


def test_addresses_are_read_through_the_cache(masked_data: TinyData, tmp_path: Path) -> None:
    """The run's own: another place may not be writable."""
    data = {**ALONE, "train": [masked_data.prose.as_uri()], "validation": [], "cache_dir": str(tmp_path)}
    given = tiny_config(masked_data, Path("run"), model=BERT, data=data)
    assert check_data("text", RunConfig.model_validate(given), must_exist=True) == []
    assert (tmp_path / "objects").is_dir()


def test_a_masks_token_is_looked_for(masked_data: TinyData) -> None:
    given = tiny_config(masked_data, Path("run"), model=BERT, data=ALONE)
    assert check_data("text", RunConfig.model_validate(given)) == []
    given["objective"] = {"masked_lm": {"mask_token": "<mask>"}}
    with pytest.raises(MegatrainError, match=r"mask_token: <mask> given"):
        check_data("text", RunConfig.model_validate(given))
